"""Process groups of tensor parallelism; one rank by default."""

from sglang.srt.distributed.parallel_state import ProcessGroupHandle, get_tp_group, init_tp_group, override_tp_group

__all__ = ["ProcessGroupHandle", "get_tp_group", "init_tp_group", "override_tp_group"]
