"""Groups of ranks: see ``parallel_state``."""

from sglang.srt.distributed.parallel_state import (
    ParallelState,
    Pending,
    ProcessGroupHandle,
    get_parallel_state,
    get_tp_group,
    get_world_group,
    init_parallel_state,
    is_dp_attention_enabled,
    is_lost_peer,
    leave_groups,
    override_parallel_state,
)

__all__ = [
    "ParallelState",
    "Pending",
    "ProcessGroupHandle",
    "get_parallel_state",
    "get_tp_group",
    "get_world_group",
    "init_parallel_state",
    "is_dp_attention_enabled",
    "is_lost_peer",
    "leave_groups",
    "override_parallel_state",
]
