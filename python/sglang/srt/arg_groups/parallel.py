"""The settings of parallelism: tensor, data and expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg
from sglang.srt.arg_groups.upstream import UPSTREAM_ONLY

PARALLEL = "Parallelism and multi-node"
EXPERTS = "Expert parallelism"


@dataclass(frozen=True)
class ParallelArgs:
    """The part of ``ServerArgs`` that says how ranks share the work."""

    tp_size: Annotated[
        int,
        Arg("Ranks over which each layer is split.", PARALLEL, aliases=("--tensor-parallel-size", "--tp"), minimum=1),
    ] = 1
    dp_size: Annotated[
        int,
        Arg(
            "Replicas of `--tp-size` ranks each; with `--enable-dp-attention`, attention groups among those ranks.",
            PARALLEL,
            aliases=("--data-parallel-size", "--dp"),
            minimum=1,
        ),
    ] = 1
    enable_dp_attention: Annotated[
        bool,
        Arg("Split the ranks into `--dp-size` groups that attend to different requests and share experts.", PARALLEL),
    ] = False
    load_balance_method: Annotated[
        str,
        Arg(
            "Which replica or attention group a request goes to: in turn, or the one with the fewest tokens to hold.",
            PARALLEL,
            choices=("auto", "round_robin", "total_tokens"),
            upstream_only=("total_requests", "follow_bootstrap_room", "shortest_queue", "minimum_tokens"),
        ),
    ] = "auto"
    nccl_port: Annotated[
        int | None, Arg("Local port of the ranks' rendezvous.", PARALLEL, minimum=1, maximum=65535, auto="a free one")
    ] = None
    dist_timeout: Annotated[int | None, Arg("Seconds that a collective may take.", PARALLEL, minimum=1, auto="600")] = (
        None
    )
    ep_size: Annotated[
        int,
        Arg(
            "Parts into which the experts are split; divides `--tp-size`. `--moe-a2a-backend mori` makes it that.",
            EXPERTS,
            aliases=("--expert-parallel-size", "--ep"),
            minimum=1,
        ),
    ] = 1
    moe_a2a_backend: Annotated[
        str,
        Arg(
            "Token exchange between expert ranks: none sums over all, mori sends each token to the ranks it needs.",
            EXPERTS,
            choices=("none", "mori"),
            upstream_only=UPSTREAM_ONLY["moe_a2a_backend"],
        ),
    ] = "none"
    deepep_mode: Annotated[
        str,
        Arg(
            "Mode of DeepEP or MoriEP: normal for throughput, low_latency (AsyncLL with MoriEP) for small batches. "
            "With mori, auto is normal.",
            EXPERTS,
            choices=("auto", "normal", "low_latency"),
        ),
    ] = "auto"
    disable_shared_experts_fusion: Annotated[
        bool, Arg("Compute shared experts separately, never as additional routed experts.", EXPERTS)
    ] = False
    enforce_shared_experts_fusion: Annotated[
        bool, Arg("Always compute shared experts as routed experts; refuse to start if that is impossible.", EXPERTS)
    ] = False

    @property
    def num_replicas(self) -> int:
        """Independent copies of the model, of ``tp_size`` ranks each."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def attn_dp_size(self) -> int:
        """Attention groups of one replica."""
        return self.dp_size if self.enable_dp_attention else 1
