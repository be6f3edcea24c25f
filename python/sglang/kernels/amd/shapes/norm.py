"""Norms of DeepSeek-V2-Lite, DeepSeek-V3 and Qwen3.5 layers, decode and prefill."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.kernels.amd.shapes import WIDE_BUFFER_LOAD, ServingShape, shape_only

WIDE = {"rms_norm_kernel": (WIDE_BUFFER_LOAD,)}


def shapes() -> Iterator[ServingShape]:
    for name, hidden in (("v2lite", 2048), ("v3", 7168)):
        for tokens in (1, 128, 8192):
            yield ServingShape(
                "norm.fused_add_rms_norm",
                f"{name}-t{tokens}",
                lambda n=tokens, d=hidden: (shape_only(n, d), shape_only(n, d), shape_only(d), 1e-6),
                WIDE,
            )
    yield ServingShape("norm.rms_norm", "v3-t128", lambda: (shape_only(128, 7168), shape_only(7168), 1e-6), WIDE)
    yield ServingShape(
        "norm.rms_norm",
        "latent-t128",
        lambda: (shape_only(128, 576)[:, :512], shape_only(512), 1e-6),
        WIDE,
    )
    yield ServingShape(
        "norm.fused_add_gemma_rms_norm",
        "qwen35-t128",
        lambda: (shape_only(128, 2048), shape_only(128, 2048), shape_only(2048), 1e-6),
        WIDE,
    )
    yield ServingShape(
        "norm.gemma_rms_norm",
        "qwen35-q-heads-t128",
        lambda: (shape_only(128, 16, 512)[..., :256], shape_only(256), 1e-6),
        WIDE,
    )
    yield ServingShape(
        "norm.gated_rms_norm",
        "qwen35-gdn-t128",
        lambda: (shape_only(128, 32, 128), shape_only(128, 32, 128), shape_only(128), 1e-6),
        WIDE,
    )
