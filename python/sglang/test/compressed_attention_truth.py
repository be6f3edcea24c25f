"""Layers of compressed attention made of random products, on a backend, and in float64 over whole sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from sglang.kernels.ops.attention.packed_rows import store_rows_torch
from sglang.srt.configs.cache_layout import FULL, SWA, CacheTypes, join
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import DeepseekV4HipRadixBackend
from sglang.srt.layers.rotary_embedding import plain_inverse_frequencies
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch, StepKind

CPU = torch.device("cpu")
HIDDEN, HEADS, DIM, ROPE, INDEX_HEADS, INDEX_DIM, TOP_K = 20, 3, 24, 8, 3, 16, 16
VOCAB, CONTEXT, EPS = 512, 1280, 1e-6
RATIOS = (0, 4, 128)

# Keys as DeepSeek-V4-Flash spells them, tiny.
CONFIG_JSON = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "num_hidden_layers": len(RATIOS), "num_attention_heads": HEADS, "head_dim": DIM, "qk_rope_head_dim": ROPE,
    "q_lora_rank": 8, "o_groups": 3, "o_lora_rank": 8, "sliding_window": 128, "compress_ratios": list(RATIOS),
    "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 256, "beta_fast": 32,
                     "beta_slow": 1},
    "max_position_embeddings": CONTEXT, "index_n_heads": INDEX_HEADS, "index_head_dim": INDEX_DIM, "index_topk": TOP_K,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hash_layers": 0,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "rms_norm_eps": EPS,
}  # fmt: skip


class TruthCompressor:
    """A compressor of ``ratio``: its two products, and what a backend reads of it."""

    def __init__(self, layer_id: int, ratio: int, pool: str, dim: int, generator: torch.Generator) -> None:
        self.layer_id, self.ratio, self.pool, self.head_dim = layer_id, ratio, pool, dim
        width = dim * (2 if ratio == 4 else 1)
        self.kv, self.gate = (torch.randn(HIDDEN, width, generator=generator) for _ in range(2))
        self.position_bias = torch.randn(ratio, width, generator=generator)
        self.norm: Any = SimpleNamespace(weight=1 + 0.3 * torch.randn(dim, generator=generator), eps=EPS)
        angles = torch.outer(torch.arange(CONTEXT), plain_inverse_frequencies(ROPE, 100.0))
        self.rotary_emb: Any = SimpleNamespace(cos_sin_cache=torch.cat((angles.cos(), angles.sin()), dim=1))

    def true_entries(self, x: torch.Tensor) -> torch.Tensor:
        """Entries [L // ratio, dim] of the hidden rows x [L, HIDDEN], float64."""
        dim, count = self.head_dim, len(x) // self.ratio
        windows = x[: count * self.ratio].view(count, self.ratio, HIDDEN)
        values, gates = windows @ self.kv.double(), windows @ self.gate.double() + self.position_bias.double()
        if self.ratio == 4:
            # The first columns of the window before, of which the first window has none.
            nothing = torch.zeros(min(count, 1), 4, dim, dtype=torch.float64)
            before = torch.cat((nothing - torch.inf, gates[:-1, :, :dim])), torch.cat((nothing, values[:-1, :, :dim]))
            gates, values = (torch.cat((a, b[..., dim:]), 1) for a, b in zip(before, (gates, values), strict=True))
        pooled = (gates.softmax(1) * values).sum(1)
        pooled = pooled / (pooled.square().mean(1, keepdim=True) + EPS).sqrt() * self.norm.weight.double()
        cos, sin = self.rotary_emb.cos_sin_cache[: count * self.ratio : self.ratio].double().chunk(2, dim=1)
        turned = torch.view_as_complex(pooled[:, -ROPE:].reshape(count, ROPE // 2, 2)) * torch.complex(cos, sin)
        return torch.cat((pooled[:, :-ROPE], torch.view_as_real(turned).flatten(1)), dim=1)


class TruthLayer:
    """One layer: queries, rows, compressors; what a backend reads of it; and its output by float64."""

    def __init__(self, layer_id: int, ratio: int, generator: torch.Generator) -> None:
        def random_product(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / HIDDEN**0.5

        self.layer_id, self.ratio, self.scale = layer_id, ratio, 0.4
        self.sinks = torch.randn(HEADS, generator=generator)
        self.rows, self.queries = random_product(HIDDEN, DIM), random_product(HIDDEN, HEADS * DIM)
        self.main = TruthCompressor(layer_id, ratio, f"c{ratio}", DIM, generator) if ratio else None
        self.index = TruthCompressor(layer_id, ratio, "c4_index", INDEX_DIM, generator) if ratio == 4 else None
        self.index_queries = random_product(HIDDEN, INDEX_HEADS * INDEX_DIM)
        self.index_weights = random_product(HIDDEN, INDEX_HEADS)

    def on_backend(
        self, x: torch.Tensor, backend: DeepseekV4HipRadixBackend, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """What the backend makes of a step's hidden rows x [N, HIDDEN] -> [N, HEADS, DIM]."""
        entries = None
        plan = backend._plan_of(forward_batch, len(x))
        if plan is not None:
            store_rows_torch(x @ self.rows, plan.store_slots, *backend.pools["swa"].layer(self.layer_id))
        for compressor in (self.main, self.index):
            if compressor is not None:
                backend.compress(x @ compressor.kv, x @ compressor.gate, compressor, forward_batch)
        if self.index is not None:
            queries = (x @ self.index_queries).view(-1, INDEX_HEADS, INDEX_DIM)
            entries = backend.select_entries(queries, x @ self.index_weights, self, forward_batch)
        return backend.attend_compressed((x @ self.queries).view(-1, HEADS, DIM), self, forward_batch, entries)

    def truth(self, x: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """The output [n, HEADS, DIM] float64 at ``positions`` of the sequence x [L, HIDDEN] float64."""
        rows = x @ self.rows.double()
        queries = (x @ self.queries.double()).view(-1, HEADS, DIM)
        entries = self.main.true_entries(x) if self.main is not None else rows[:0]
        keys = self.index.true_entries(x) if self.index is not None else None
        out = []
        for t in positions:
            seen = entries[: (t + 1) // self.ratio] if self.ratio else entries
            if keys is not None:
                query = (x[t] @ self.index_queries.double()).view(INDEX_HEADS, INDEX_DIM)
                scores = (x[t] @ self.index_weights.double() @ (query @ keys[: len(seen)].T).relu()).tolist()
                best = sorted(range(len(seen)), key=lambda entry: (-scores[entry], entry))[:TOP_K]
                seen = seen[best]
            attended = torch.cat((rows[max(0, t - 127) : t + 1], seen))
            scores = queries[t] @ attended.T * self.scale
            weights = torch.cat((scores, self.sinks.double().unsqueeze(1)), dim=1).softmax(1)[:, :-1]
            out.append(weights @ attended)
        return torch.stack(out)


@dataclass
class TruthRequest:
    """A sequence in the pools: its row of the request table, its tokens, its pages."""

    row: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class AttentionHarness:
    """Layers of every ratio over pools of scrambled pages, all poisoned where nothing was written yet.

    drafts: with the rings of speculation, and the layer that drafts.
    """

    def __init__(self, num_pages: int = 60, drafts: bool = False, seed: int = 0, kv: str = "float32") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = DeepseekV4Config.from_hf(CONFIG_JSON)
        self.layers = [TruthLayer(i, ratio, generator) for i, ratio in enumerate(RATIOS)]
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        types = CacheTypes(kv=kv)
        layout = self.config.cache_layout(1, types, 2 if drafts else 0)
        if drafts:
            layout = join([layout, self.config.draft_layout(1, types)])
        tokens = num_pages * PAGE_SIZE
        self.pools = ModelPools(layout, {FULL: tokens, SWA: tokens}, PAGE_SIZE, CPU)
        self.window = WindowPages(num_pages, num_pages, PAGE_SIZE)
        self.requests = ReqToTokenPool(64, CONTEXT)
        config: Any = SimpleNamespace(text=self.config)
        context = AttentionContext(config, self.requests, self.pools, CPU, self.window.table)
        self.context: Any = context
        self.backend = DeepseekV4HipRadixBackend(context)
        self.random = random.Random(seed)
        self.reset()

    def reset(self) -> None:
        """Forget every request; poison shows each read of a row that was not written."""
        for buffer in self.pools.buffers():
            # All bits set is NaN in every format but FNUZ's values, whose scale is NaN then.
            buffer.fill_(torch.nan if buffer.is_floating_point() else 255)
        self.requests.clear()
        self.requests.req_to_token[: self.requests.padding_row].fill_(1)
        last = self.pools.size(FULL) // PAGE_SIZE
        self.free = self.random.sample(range(1, last + 1), last)
        self.lend_windows()

    def lend_windows(self) -> None:
        """Give every page of slots a page of the window, scattered."""
        last = self.pools.size(FULL) // PAGE_SIZE
        self.window.clear()
        self.window.lend(self.random.sample(range(1, last + 1), last))

    def new_request(self, prefix_of: TruthRequest | None = None, num_pages: int = 0) -> TruthRequest:
        """A request that shares the first pages of another one."""
        row = self.requests.alloc()
        assert row is not None
        request = TruthRequest(row)
        if prefix_of is not None:
            request.tokens = prefix_of.tokens[: num_pages * PAGE_SIZE]
            request.pages = prefix_of.pages[:num_pages]
            self.requests.write(row, 0, self.slots(request, 0, len(request.tokens)))
        return request

    def drop(self, *requests: TruthRequest) -> None:
        """Forget requests; their pages stay as they are."""
        for request in requests:
            self.requests.free(request.row)

    def slots(self, request: TruthRequest, start: int, end: int) -> torch.Tensor:
        """Slots of positions, with new pages where there are none yet."""
        while len(request.pages) * PAGE_SIZE < end:
            request.pages.append(self.free.pop())
        return torch.tensor([request.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)])

    def batch(self, chunks: Sequence[tuple[TruthRequest, Sequence[int]]], kind: StepKind | None) -> ModelWorkerBatch:
        """The next tokens of each request; those of a step of one kind get into the table by ``finish``."""
        rows = [request.row for request, _ in chunks]
        starts = [len(request.tokens) for request, _ in chunks]
        ends = [start + len(tokens) for start, (_, tokens) in zip(starts, chunks, strict=True)]
        slots = [self.slots(request, start, end) for (request, _), start, end in zip(chunks, starts, ends, strict=True)]
        if kind is None:
            ids = torch.tensor([token for _, tokens in chunks for token in tokens])
            for row, start, mine in zip(rows, starts, slots, strict=True):
                self.requests.write(row, start, mine)
            return ModelWorkerBatch.extend(rows, starts, ends, ids, torch.cat(slots))
        return ModelWorkerBatch.uniform(kind, rows, ends, torch.cat(slots))

    def step(
        self, chunks: Sequence[tuple[TruthRequest, Sequence[int]]], kind: StepKind | None = None
    ) -> list[list[torch.Tensor]]:
        """Run the next tokens of each request; by layer and request, outputs [tokens, HEADS, DIM]."""
        forward_batch = ForwardBatch.from_worker_batch(self.batch(chunks, kind), CPU, self.backend)
        self.backend.init_forward_metadata(forward_batch)
        return self.run(forward_batch, chunks)

    def run(
        self, forward_batch: ForwardBatch, chunks: Sequence[tuple[TruthRequest, Sequence[int]]]
    ) -> list[list[torch.Tensor]]:
        """The layers of a planned step; then the requests have its tokens."""
        x = self.embedding[torch.tensor([token for _, tokens in chunks for token in tokens])]
        outputs = []
        for layer in self.layers:
            out = layer.on_backend(x, self.backend, forward_batch)
            outputs.append(list(out.split([len(tokens) for _, tokens in chunks])))
        for request, tokens in chunks:
            start = len(request.tokens)
            request.tokens = [*request.tokens, *tokens]
            self.requests.write(request.row, start, self.slots(request, start, len(request.tokens)))
        return outputs

    def truths(self, tokens: Sequence[int], positions: Sequence[int]) -> list[torch.Tensor]:
        """By layer, the outputs of a sequence at ``positions``."""
        x = self.embedding[torch.tensor(tokens)].double()
        return [layer.truth(x, positions) for layer in self.layers]

    def check(self, chunks: Sequence[tuple[TruthRequest, Sequence[int]]], outputs: list[list[torch.Tensor]]) -> None:
        """AssertionError if outputs of the last step differ from those of the whole sequences; checks some of many."""
        for number, (request, new) in enumerate(chunks):
            rows = sorted({*self.random.sample(range(len(new)), min(24, len(new))), 0, len(new) - 1})
            start = len(request.tokens) - len(new)
            for layer, truth in enumerate(self.truths(request.tokens, [start + row for row in rows])):
                torch.testing.assert_close(outputs[layer][number][rows].double(), truth, rtol=0, atol=1e-4)

    def step_and_check(
        self, chunks: Sequence[tuple[TruthRequest, Sequence[int]]], kind: StepKind | None = None
    ) -> None:
        """``step``, then ``check``."""
        self.check(chunks, self.step(chunks, kind))

    def random_tokens(self, count: int) -> list[int]:
        """Token ids."""
        return [self.random.randrange(VOCAB) for _ in range(count)]
