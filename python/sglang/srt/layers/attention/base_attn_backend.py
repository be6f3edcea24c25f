"""What every attention backend is, the interface of compressed attention, and the registry of backends by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from sglang.srt.configs.attention_backends import BackendDeclaration, declare
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention.plans import NoRows
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch, StepPlan


@dataclass(frozen=True)
class AttentionContext:
    """What a backend works on; window_pages: ``WindowPages.table``, None where no pool follows a window."""

    model_config: ModelConfig
    req_to_token_pool: ReqToTokenPool
    pools: ModelPools
    device: torch.device
    window_pages: torch.Tensor | None = None


class UnplannedStepError(NotImplementedError):
    """A backend was given a kind of step that it cannot plan."""


class AttentionBackend(ABC):
    """Owns metadata, layouts and pool access of attention; the kernels that it calls are ops.

    The plan of a step is stored in the batch (``forward_batch.attn_plan``), so one backend can have several steps in
    flight.
    ``prefers`` names the implementation that those ops prefer; None: the first that fits.
    """

    prefers: str | None = None
    # Whether an extend step whose lengths are on the device (``ForwardBatch.bounds``) can be planned, and captured.
    plans_bounds = False

    def replays_extend(self, batch: ModelWorkerBatch) -> bool:
        """Whether a captured extend step suits ``batch``, if one of its size is there."""
        return self.plans_bounds

    def plan(self, forward_batch: ForwardBatch) -> object:
        """The plan that the layers of the step share. Raises UnplannedStepError for a kind of step without a plan."""
        if forward_batch.batch_size == 0:
            return NoRows()
        if forward_batch.kind is None:
            return self.plan_extend(forward_batch)
        return (
            self.plan_decode(forward_batch)
            if forward_batch.kind.rows_per_request == 1
            else self.plan_uniform(forward_batch)
        )

    def plans_like(self, other: object) -> bool:
        """Whether the plan of a step that the backend ``other`` has made is one that this backend would make."""
        return False

    @abstractmethod
    def plan_decode(self, forward_batch: ForwardBatch) -> object:
        """The plan of one token per request."""

    @abstractmethod
    def plan_extend(self, forward_batch: ForwardBatch) -> object:
        """The plan of packed rows, any number per request."""

    def plan_uniform(self, forward_batch: ForwardBatch) -> object:
        """The plan of several tokens per request, the same number for each: each row attends like a request that
        ends with it."""
        return self.plan_decode(forward_batch.single_rows())

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the step; called once before the layers."""
        forward_batch.attn_plan = StepPlan(attention=self.plan(forward_batch))

    # The tensors of a captured plan stay in place; a replay reads their contents at that time.
    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None:
        """Forget earlier captures, and make room for steps of up to ``max_bs`` requests."""
        raise UnplannedStepError(f"{type(self).__name__} does not capture graphs")

    def init_forward_metadata_capture(self, forward_batch: ForwardBatch) -> None:
        """Plan a step that is about to be captured; its tensors must persist."""
        raise UnplannedStepError(f"{type(self).__name__} does not capture graphs")

    def init_forward_metadata_replay(self, forward_batch: ForwardBatch) -> None:
        """Update the captured plan of this size, and set it on ``forward_batch``."""
        raise UnplannedStepError(f"{type(self).__name__} does not capture graphs")


class CompressedLayer(Protocol):
    """What a backend reads of an attention layer over a window and, where ``ratio`` is not 0, compressed entries.

    ``sinks`` [H] float32 is one logit per head that adds only to the denominator of the softmax.
    """

    layer_id: int
    ratio: int  # 0, 4 or 128 tokens per entry
    scale: float
    sinks: torch.Tensor


class Compressor(Protocol):
    """What a backend reads of a compressor: it pools ``ratio`` tokens to one entry of width ``head_dim``.

    Rows of its two products have one part of head_dim columns, or two where windows overlap (ratio 4): the first part
    of the window before and the second part of the window itself make an entry.
    """

    layer_id: int
    ratio: int
    head_dim: int
    pool: str  # the pool of its entries; its states are in the pool of this name plus "_state"
    position_bias: torch.Tensor  # [ratio, parts * head_dim] float32
    norm: RMSNorm
    rotary_emb: RotaryEmbedding  # rotates the last columns of an entry by the position of its first token


class CompressedBackend(AttentionBackend):
    """Attention of DeepSeek V4: one softmax over a window of stored rows and over compressed entries.

    One row per token is key and value of all heads. In a layer the calls come in the order below; each sees what the
    calls before it stored, except that ``prepare`` may overlap the two calls after it. DeepSeek-V4 report;
    transformers' ``deepseek_v4`` is the truth.
    """

    def complete_plan(self, forward_batch: ForwardBatch) -> None:
        """Plan now, before streams fork, what the layers of this step would plan at their first call."""

    @abstractmethod
    def prepare(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: RMSNorm,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        layer: CompressedLayer,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Norm and rotate queries q [N, H, D]; norm with ``norm``, rotate and store the rows kv [N, D] of this step's
        tokens.

        positions [N]; cos_sin_cache as ``rope.rotary_tail`` has it. -> the queries.
        """

    @abstractmethod
    def compress(
        self, kv: torch.Tensor, gate: torch.Tensor, compressor: Compressor, forward_batch: ForwardBatch
    ) -> None:
        """Store the entries that this step's tokens close, of its two products kv, gate [N, parts * head_dim]."""

    @abstractmethod
    def select_entries(
        self, q: torch.Tensor, weights: torch.Tensor, layer: CompressedLayer, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """The entries of the layer that each row attends to, the lowest number first among equal scores.

        q [N, Hi, Di] rotated, weights [N, Hi] float -> entry numbers [N, K] int32, -1 past the last one that is seen.
        """

    @abstractmethod
    def attend_compressed(
        self, q: torch.Tensor, layer: CompressedLayer, forward_batch: ForwardBatch, entries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over the window and over ``entries``, None for all that the row sees. q [N, H, D] -> [N, H, D]."""


Family = TypeVar("Family")


def backend_of(forward_batch: ForwardBatch, family: type[Family]) -> Family:
    """The backend of the step, as the interface that a layer needs; raises TypeError when it is of another family."""
    backend = forward_batch.attn_backend
    for part in getattr(backend, "parts", (backend,)):
        if isinstance(part, family):
            return part
    raise TypeError(f"the layer needs a {family.__name__}, and the step has {type(backend).__name__}")


BackendFactory = Callable[[AttentionContext], AttentionBackend]
_FACTORIES: dict[tuple[str, str], BackendFactory] = {}


def register_attention_backend(
    name: str,
    family: str,
    *,
    platforms: tuple[str, ...],
    graphs: bool = False,
    page_sizes: tuple[int, ...] = (),
    cache_dtypes: tuple[str, ...] = (),
) -> Callable[[BackendFactory], BackendFactory]:
    """Class decorator: a backend that ``--attention-backend`` calls ``name``, for models of one family.

    The other arguments declare what settings need to know; see ``BackendDeclaration``. These are read from the source
    of the ``*_backend*.py`` files of this package, so the arguments are literals.
    """
    declaration = BackendDeclaration(name, family, platforms, graphs, page_sizes, cache_dtypes)

    def register(factory: BackendFactory) -> BackendFactory:
        if (name, family) in _FACTORIES:
            raise ValueError(f"attention backend {name!r} is registered twice for {family}")
        declare(declaration)
        _FACTORIES[name, family] = factory
        return factory

    return register


def create_attention_backend(name: str, ctx: AttentionContext) -> AttentionBackend:
    """The backend called ``name`` for the family of the model; raises ValueError that names the known ones."""
    family = ctx.model_config.text.attention_family
    if (name, family) not in _FACTORIES:
        known = sorted(known for known, of_family in _FACTORIES if of_family == family)
        raise ValueError(f"unknown attention backend {name!r} for a {family} model; known: {', '.join(known)}")
    return _FACTORIES[name, family](ctx)
