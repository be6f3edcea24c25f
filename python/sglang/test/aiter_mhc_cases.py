"""Expected results of AITER's fused mHC between sub-blocks, on a device or with the fake."""

from __future__ import annotations

import logging
import unittest
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre, hc_post_pre_torch
from sglang.kernels.ops.mhc.hc_post_pre_aiter import mhc_config
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.test.kernel_choice import fresh_decisions

EPS, ITERATIONS = 1e-6, 20


def crossing(rows: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[object]:
    """Arguments of ``mhc.hc_post_pre`` for four streams, with a float32 gain of the norm."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    row, x = random(rows, width).to(dtype), random(rows, 4, width).to(dtype)
    post, comb = torch.sigmoid(random(rows, 4)) * 2, torch.softmax(random(rows, 4, 4) * 2, -1)
    fn, base, scale = random(24, 4 * width) / width**0.5, random(24), random(3).abs() + 0.5
    tensors = [part.to(device) for part in (row, x, post, comb, fn, base, scale)]
    return [*tensors, EPS, EPS, ITERATIONS, (1 + 0.1 * random(width)).to(device), EPS]


@contextmanager
def aiter_asked_for(*, only: str = "") -> Iterator[None]:
    """AITER switched on, everything decided again, and a failing kernel raises; ``only`` forces one implementation."""
    with ExitStack() as stack:
        stack.enter_context(envs.SGLANG_USE_AITER.override(True))
        stack.enter_context(envs.SGLANG_KERNELS.override(f"mhc.hc_post_pre={only}" if only else ""))
        mhc_config.cache_clear()
        stack.enter_context(fresh_decisions())
        REGISTRY.start_serving()
        stack.callback(setattr, REGISTRY, "serving", False)
        yield


class AiterMhcCases(unittest.TestCase):
    """Parity with the torch reference; subclasses say where, and which widths."""

    device = "cpu"
    widths: tuple[int, ...] = (512, 1280)
    rows: tuple[int, ...] = (1, 7, 64)

    def check(self, args: list[object], bound: float, name: str) -> bool:
        """Compare the op with its reference, the norm aside; returns norm_fused."""
        *found, norm_fused = hc_post_pre(*args)
        plain = args if norm_fused else [*args[:10], None, 0.0]
        *wanted, _ = hc_post_pre_torch(*plain)  # type: ignore[arg-type]
        for part, of_reference in zip(found, wanted, strict=True):
            self.assertEqual((part.dtype, part.shape), (of_reference.dtype, of_reference.shape), name)
            error = (part.float() - of_reference.float()).abs().max() / of_reference.float().abs().max()
            self.assertLessEqual(float(error), bound, name)
        return bool(norm_fused)

    def test_hip_kernel(self) -> None:
        with aiter_asked_for(only="aiter"):
            for width in self.widths:
                for rows in self.rows:
                    args = crossing(rows, width, self.device)
                    self.assertFalse(self.check(args, 0.01, f"{rows} x {width}"), "its gain is float32")
                    args[10] = args[10].to(torch.bfloat16)  # type: ignore[attr-defined]
                    folded = self.check(args, 0.02, f"{rows} x {width} bf16 gain")
                    self.assertEqual(folded, width in (1280, 2560, 4096, 7168))

    def test_triton_kernels(self) -> None:
        with aiter_asked_for(only="aiter_triton"):
            for width in (*self.widths, 320):
                for rows in self.rows:
                    self.assertFalse(self.check(crossing(rows, width, self.device), 0.03, f"{rows} x {width}"))

    def test_which_is_chosen(self) -> None:
        """The HIP kernel for whole blocks of dense streams, else the Triton kernels for up to 64 rows, else ours."""
        with aiter_asked_for():
            self.assertEqual(REGISTRY.chosen(hc_post_pre), "aiter")
            record = REGISTRY.records[hc_post_pre.name]
            hc_post_pre(*crossing(8, 512, self.device))
            self.assertEqual(dict(record.calls_refused), {})
            hc_post_pre(*crossing(8, 320, self.device))
            self.assertEqual(dict(record.calls_refused), {"aiter": 1})
            hc_post_pre(*crossing(65, 320, self.device))
            self.assertEqual(dict(record.calls_refused), {"aiter": 2, "aiter_triton": 1})
            repeated = crossing(3, 512, self.device)
            repeated[1] = repeated[1][:, :1].expand(-1, 4, -1)  # type: ignore[index]
            self.check(repeated, 0.03, "the streams of the first layer")
            self.assertEqual(dict(record.calls_refused), {"aiter": 3, "aiter_triton": 1})

    def test_shape_without_configuration(self) -> None:
        """The next implementation runs; it is looked up once and logged once."""
        from unittest import mock

        calls = []

        def failing(name: str, M: int, C: int, mode: str | None = None) -> tuple[dict[str, int], bool]:
            calls.append((M, C))
            raise KeyError(f"no configuration for {M} x {C}")

        lookup = mock.patch("aiter.ops.triton.utils.mhc_config_utils.get_mhc_config", failing)
        with aiter_asked_for(), lookup, self.assertLogs(level=logging.WARNING) as logs:
            for _ in range(100):
                hc_post_pre(*crossing(2, 320, self.device))
                hc_post_pre(*crossing(3, 320, self.device))
        self.assertEqual(calls, [(2, 320), (3, 320)])
        self.assertEqual(len(logs.output), 2, logs.output)
        mhc_config.cache_clear()
