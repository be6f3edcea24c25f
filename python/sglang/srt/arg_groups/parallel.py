"""The settings of parallelism: tensor, data and expert."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag
from sglang.srt.arg_groups.upstream import UPSTREAM_ONLY

PARALLEL = "Parallelism and multi-node"
EXPERTS = "Expert parallelism"


@dataclass(frozen=True)
class ParallelArgs:
    """The part of ``ServerArgs`` that says how ranks share the work."""

    tp_size: int = flag(
        1, "Ranks over which each layer is split.", PARALLEL, aliases=("--tensor-parallel-size", "--tp"), minimum=1
    )
    dp_size: int = flag(
        1,
        "Replicas of `--tp-size` ranks each; with `--enable-dp-attention`, attention groups among those ranks.",
        PARALLEL,
        aliases=("--data-parallel-size", "--dp"),
        minimum=1,
    )
    enable_dp_attention: bool = flag(
        False, "Split the ranks into `--dp-size` groups that attend to different requests and share experts.", PARALLEL
    )
    load_balance_method: str = flag(
        "auto",
        "Which replica or attention group a request goes to: in turn, or the one with the fewest tokens to hold.",
        PARALLEL,
        choices=("auto", "round_robin", "total_tokens"),
        upstream_only=("total_requests", "follow_bootstrap_room", "shortest_queue", "minimum_tokens"),
    )
    nccl_port: int | None = flag(
        None, "Local port of the ranks' rendezvous.", PARALLEL, minimum=1, maximum=65535, auto="a free one"
    )
    dist_timeout: int | None = flag(None, "Seconds that a collective may take.", PARALLEL, minimum=1, auto="600")
    ep_size: int = flag(
        1,
        "Parts into which the experts are split; divides `--tp-size`. `--moe-a2a-backend mori` makes it that.",
        EXPERTS,
        aliases=("--expert-parallel-size", "--ep"),
        minimum=1,
    )
    moe_a2a_backend: str = flag(
        "none",
        "Token exchange between expert ranks: none sums over all, mori sends each token to the ranks it needs.",
        EXPERTS,
        choices=("none", "mori"),
        upstream_only=UPSTREAM_ONLY["moe_a2a_backend"],
    )
    deepep_mode: str = flag(
        "auto",
        "Mode of DeepEP or MoriEP: normal for throughput, low_latency (AsyncLL with MoriEP) for small batches. "
        "With mori, auto is normal.",
        EXPERTS,
        choices=("auto", "normal", "low_latency"),
    )
    disable_shared_experts_fusion: bool = flag(
        False, "Compute shared experts separately, never as additional routed experts.", EXPERTS
    )
    enforce_shared_experts_fusion: bool = flag(
        False, "Always compute shared experts as routed experts; refuse to start if that is impossible.", EXPERTS
    )

    @property
    def num_replicas(self) -> int:
        """Independent copies of the model, of ``tp_size`` ranks each."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def attn_dp_size(self) -> int:
        """Attention groups of one replica."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def steps_differ(self) -> bool:
        """Whether the ranks of one replica may run different steps at a time, or exchange tokens within one."""
        return self.attn_dp_size > 1 or self.moe_a2a_backend != "none"
