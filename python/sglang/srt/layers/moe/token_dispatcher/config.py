"""The MORI settings of one process, read once and checked against the world they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.layers.moe.token_dispatcher.base import ExchangeConfigError
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.common import get_bool_env_var, get_int_env_var

# Ranks of one node.
NODE = 8


@dataclass(frozen=True)
class MoriConfig:
    """Sizes in tokens (rows); types as the variables spell them; ``low_latency`` is ``--deepep-mode low_latency``,
    ``copy_engines`` MORI_ENABLE_SDMA, ``combine_groups`` MORI_FP8_COMBINE_SCALE_DIM."""

    world_size: int
    max_dispatch_tokens: int
    max_recv_tokens: int = 0
    moe_max_input_tokens: int = 0
    dispatch_dtype: str = "auto"
    combine_dtype: str = "auto"
    inter_kernel_switch: int = 256
    low_latency: bool = False
    copy_engines: bool = False
    combine_groups: int = 56

    def __post_init__(self) -> None:
        worst = self.world_size * self.max_dispatch_tokens
        if not 0 <= self.max_recv_tokens <= worst:
            raise ExchangeConfigError(
                f"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS={self.max_recv_tokens} must be 0 (the worst case) or in "
                f"1..{worst}: {self.world_size} ranks times SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK="
                f"{self.max_dispatch_tokens}"
            )

    @classmethod
    def from_env(cls, world_size: int, low_latency: bool = False, **known: Any) -> MoriConfig:
        """The SGLANG_MORI_* variables but the ``known`` ones, of ``world_size`` ranks. Raises ExchangeConfigError."""
        values: dict[str, Any] = dict(
            max_dispatch_tokens=envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.get(),
            max_recv_tokens=envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.get(),
            moe_max_input_tokens=envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS.get(),
            dispatch_dtype=envs.SGLANG_MORI_DISPATCH_DTYPE.get(),
            combine_dtype=envs.SGLANG_MORI_COMBINE_DTYPE.get(),
            inter_kernel_switch=envs.SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD.get(),
            copy_engines=get_bool_env_var("MORI_ENABLE_SDMA"),
            combine_groups=get_int_env_var("MORI_FP8_COMBINE_SCALE_DIM", 56),
        )
        return cls(world_size=world_size, low_latency=low_latency, **{**values, **known})


def mori_setting_problems(args: ServerArgs) -> list[str]:
    """What is wrong with SGLANG_MORI_* variables; where unused, what suits any world of one node will do."""
    world = args.tp_size if args.moe_a2a_backend == "mori" else max(args.tp_size, NODE)
    try:
        MoriConfig.from_env(world)
    except ExchangeConfigError as error:
        return [str(error)]
    return []
