"""The experts that every token goes to, and whether they can be computed as routed ones."""

from __future__ import annotations

from typing import NamedTuple

from sglang.srt.configs.quantization import QuantConfig


class SharedExperts(NamedTuple):
    """One gated MLP ``module`` of inner ``width`` next to routed experts of ``routed_width`` in each of ``blocks``, the
    names of MoE blocks. ``refusal``: why the model never computes it as routed experts."""

    module: str
    width: int
    routed_width: int
    blocks: tuple[str, ...]
    refusal: str = ""

    @property
    def num_slots(self) -> int:
        """How many experts of the routed width they make up."""
        return self.width // self.routed_width if self.routed_width else 0

    def fusion_refusal(self, quant_config: QuantConfig | None, moe_a2a_backend: str) -> str:
        """Why they cannot be slots of the routed experts' weights; "" if they can."""
        if not self.blocks or not self.width:
            return "the model has no shared experts"
        if self.refusal:
            return self.refusal
        if self.width % self.routed_width:
            return f"shared experts are {self.width} wide, and routed ones {self.routed_width}"
        if moe_a2a_backend != "none":
            return f"--moe-a2a-backend {moe_a2a_backend} would send every token to the shared experts' rank"
        if quant_config is None:
            return ""
        for mlp in self.blocks:
            matrices = [f"{mlp}.{self.module}.{name}_proj" for name in ("gate", "up", "down")]
            formats = {quant_config.format_of(name) for name in (f"{mlp}.experts", *matrices)}
            if len(formats) > 1:
                return f"{mlp}: shared and routed experts are not quantised alike"
            routed = formats.pop()
            if routed is not None and routed.name == "mxfp4":
                return f"{mlp}: experts in MXFP4 have no slots, which would be read as a dense MLP too"
            if routed is not None and self.num_slots > 1 and self.routed_width % routed.block.rows:
                return (
                    f"experts of width {self.routed_width} are not split at {routed.name} blocks of {routed.block.rows}"
                )
        return ""
