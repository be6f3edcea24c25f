"""Checks of MORI's own transport over its fake, and of callers written for sglang; they raise when a rule is broken."""

from __future__ import annotations

import logging
import os
import unittest
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sglang.srt.distributed.parallel_state import ProcessGroupHandle, override_parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.token_dispatcher.base import DispatchError, EpConfig, ExchangeConfigError, SendBatch
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_plan import ASYNC_LL, INTRA_NODE, MoriKernel, plan_exchange
from sglang.srt.layers.moe.token_dispatcher.moriep import (
    MoriEPDispatcher,
    MoriEPNormalCombineInput,
    MoriEPNormalDispatchOutput,
    MoriTransport,
    check_mori_compatibility,
    init_mori_op,
    op_arguments,
)
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.test.ep_world import MODEL, process_state
from sglang.test.process_ranks import run_processes

CASE = unittest.TestCase()
LIMIT = 4
CPU = torch.device("cpu")


def over_fake(work: Callable[[int, ProcessGroupHandle], None]) -> None:
    """``work(rank, group)`` on two processes under the HIP policy over MORI's fake."""

    def child(rank: int) -> None:
        everyone = dist.group.WORLD
        with override_platform(RocmOverFakesPlatform(("mori",))):
            work(rank, ProcessGroupHandle(rank, 2, everyone, everyone))

    run_processes(2, child)


def sizes(rank: int, kernel: MoriKernel, **changes: Any) -> EpConfig:
    config = plan_exchange(MoriConfig(2, LIMIT), kernel, rank, 8, 16, 3, torch.float32)
    return replace(config, **changes)


def rows_of(rank: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights and ids that ``rank`` dispatches."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(count, 8, generator=generator).topk(3).indices.int()
    return torch.randn(count, 16, generator=generator), torch.rand(count, 3, generator=generator), ids


def check_delivery() -> None:
    """Rows and types that MORI allocates and delivers are the planned ones with every release."""
    import mori

    op_class = mori.ops.EpDispatchCombineOp
    dispatch, combine = op_class.dispatch, op_class.combine

    def swapped(place: int, change: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
        def deliver(*args: Any, **kwargs: Any) -> Any:
            out = list(dispatch(*args, **kwargs))
            out[place] = change(out[place])
            return tuple(out)

        return deliver

    def work(rank: int, group: ProcessGroupHandle) -> None:
        for kernel in (INTRA_NODE, ASYNC_LL):
            config = sizes(rank, kernel)
            for rows in (config.max_recv - 2, config.max_recv + 2):
                with mock.patch.object(op_class, "max_num_tokens_to_recv", lambda self, rows=rows: rows):
                    said = f"allocated {rows} received rows where {config.max_recv} are planned"
                    CASE.assertRaisesRegex(ExchangeConfigError, said, MoriTransport, config, kernel, group)
            x, weights, ids = rows_of(rank)
            scaled = replace(config, scale_dim=2)
            scales = torch.rand(3, 2)
            for asked, sent, place, change in (
                (config, None, 0, torch.Tensor.half),
                (config, None, 0, lambda t: t[:-1]),
                (config, None, 0, lambda t: t[:, :-1]),
                (config, None, 1, torch.Tensor.double),
                (config, None, 1, lambda t: t[:, :-1]),
                (scaled, scales, 2, torch.Tensor.half),
                (scaled, scales, 2, lambda t: None),
                (config, None, 3, torch.Tensor.long),
                (config, None, 4, torch.Tensor.long),
                (config, None, 4, lambda t: t[0]),
            ):  # fmt: skip
                transport = MoriTransport(asked, kernel, group)
                with mock.patch.object(op_class, "dispatch", swapped(place, change)):
                    with CASE.assertRaisesRegex(DispatchError, "MORI delivered .* is planned"):
                        transport.dispatch_send(SendBatch(x, weights, sent, ids, [3, 3]))
            for change in (torch.Tensor.half, lambda t: t[:-1], lambda t: t[:, :-1]):
                transport = MoriTransport(config, kernel, group)
                batch = transport.dispatch_send(SendBatch(x, weights, None, ids, [3, 3]))
                transport.dispatch_recv()
                out = lambda *args, change=change, **kwargs: (change(combine(*args, **kwargs)[0]), None)  # noqa: E731
                with mock.patch.object(op_class, "combine", out):
                    with CASE.assertRaisesRegex(DispatchError, "MORI delivered .* is planned"):
                        transport.combine_send(batch.hidden.clone(), ids)

    over_fake(work)


def check_own_bound() -> None:
    """Errors that MORI would not find are refused before MORI is called: rows past the buffers, too few results."""

    def work(rank: int, group: ProcessGroupHandle) -> None:
        x, weights, ids = rows_of(rank)
        capped = MoriTransport(sizes(rank, ASYNC_LL, max_total_recv_tokens=4), ASYNC_LL, group)
        with CASE.assertRaisesRegex(DispatchError, r"ranks bring \[3, 3\] rows to buffers of 4"):
            capped.dispatch_send(SendBatch(x, weights, None, ids, [3, 3]))
        with CASE.assertRaisesRegex(DispatchError, "up to 8 rows, none said, to buffers of 4"):
            capped.dispatch_send(SendBatch(x, weights, None, ids))
        for transport, rows in ((capped, [2, 2]), (MoriTransport(sizes(rank, INTRA_NODE), INTRA_NODE, group), None)):
            most = 8 if rows is None else sum(rows)
            batch = transport.dispatch_send(SendBatch(x[:2], weights[:2], None, ids[:2], rows))
            transport.dispatch_recv()
            for wrong in (
                torch.zeros(most - 1, 16),
                torch.zeros(most, 15),
                torch.zeros(most, 16, dtype=torch.bfloat16),
            ):
                said = f"to combine, but {most} rows may have arrived"
                CASE.assertRaisesRegex(DispatchError, said, transport.combine_send, wrong, ids[:2])
            transport.combine_send(batch.hidden[:most].clone(), ids[:2])
            transport.combine_recv()

    over_fake(work)


def check_releases() -> None:
    """If ranks have different releases of MORI, all stop; also if the release lacks the kernel."""

    def work(rank: int, group: ProcessGroupHandle) -> None:
        import mori

        with mock.patch.object(mori.ops, "EpDispatchCombineKernelType", Enum("Kernels", ["IntraNode"])):
            with CASE.assertRaisesRegex(ExchangeConfigError, "no kernel AsyncLL: install MORI 1.1.0"):
                op_arguments(sizes(rank, ASYNC_LL), ASYNC_LL)
        with mori.fake_version(f"1.{rank + 1}.0"):
            with CASE.assertRaisesRegex(ExchangeConfigError, r"ranks \[1\] run another MORI"):
                MoriTransport(sizes(rank, ASYNC_LL), ASYNC_LL, group)

    over_fake(work)


class DispatchDtype(Enum):
    """As sglang's callers name the types of dispatched rows."""

    bf16 = "BF16"
    fp8 = "FP8"


class DeepEPMode(Enum):
    """As sglang's callers name the modes."""

    NORMAL = "normal"
    LOW_LATENCY = "low_latency"


def check_callers() -> None:
    """Calls in the form of sglang's own: the names, the order and the number of arguments."""

    def work(rank: int, group: ProcessGroupHandle) -> None:
        import mori

        kwargs: dict[str, Any] = {"rank": 0, "max_total_recv_tokens": 0, "num_qp_per_pe": 2}
        check_mori_compatibility(kwargs)
        CASE.assertEqual(len(kwargs), 3)
        with mori.fake_version("1.0.0"), CASE.assertLogs(level="WARNING"):
            check_mori_compatibility(kwargs)
        CASE.assertEqual(kwargs, {"rank": 0, "num_qp_per_pe": 2})
        with mori.fake_version("1.0.0"), CASE.assertRaisesRegex(ExchangeConfigError, "lacks max_total_recv_tokens=64"):
            check_mori_compatibility({"max_total_recv_tokens": 64})
        with CASE.assertRaisesRegex(ExchangeConfigError, "lacks unheard_of=1"):
            check_mori_compatibility(refused := {"rank": 0, "unheard_of": 1})
        CASE.assertEqual(refused, {"rank": 0, "unheard_of": 1})

        op = init_mori_op(group, 3, 8, 4, 16, torch.bfloat16, num_max_dispatch_tokens_per_rank=LIMIT)
        CASE.assertEqual((op.max_num_tokens_to_recv(), op.config.kernel_type.name), (2 * LIMIT, "IntraNode"))
        CASE.assertIs(init_mori_op(group, 3, 8, 4, 16, torch.bfloat16, num_max_dispatch_tokens_per_rank=LIMIT), op)
        low = (DeepEPMode.LOW_LATENCY, 1, DispatchDtype.fp8, DispatchDtype.bf16, False)
        op = init_mori_op(group, 3, 8, 4, 256, torch.bfloat16, LIMIT, *low)
        CASE.assertEqual((op.config.kernel_type.name, op.config.scale_dim), ("AsyncLL", 2))
        sdma = init_mori_op(group, 3, 8, 4, 16, torch.bfloat16, LIMIT, DeepEPMode.NORMAL, enable_sdma=True)
        CASE.assertEqual(sdma.config.kernel_type.name, "AsyncLL")
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(5):
            op = init_mori_op(group, 3, 8, 4, 16, torch.bfloat16, LIMIT, "normal", instance_id=7)
        CASE.assertEqual((op.max_num_tokens_to_recv(), op.config.max_total_recv_tokens), (4, 0))
        with CASE.assertRaisesRegex(ExchangeConfigError, "8 experts are not 2 x 3"):
            init_mori_op(group, 3, 8, 3, 16, torch.bfloat16, LIMIT)

        state = process_state(rank, 2, 2)
        with envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(LIMIT), override_parallel_state(state):
            layer = MODEL.build(state, moe_a2a_backend="mori")
        assert isinstance(layer, MoriEPMoE)
        step = MODEL.step([3, 2], seed=4)
        x, topk = step.x[rank], step.topk[rank]
        output = layer.dispatcher.dispatch(hidden_states=x, topk_output=topk)
        CASE.assertEqual(output.hidden_states.shape[0], 2 * LIMIT)
        CASE.assertLessEqual(int(output.num_recv_tokens_per_expert), 5)
        CASE.assertIs(output.origin_topk_ids, topk.ids)
        combine_input = layer.run_moe_core(dispatch_output=output)
        CASE.assertIsInstance(combine_input, MoriEPNormalCombineInput)
        received = combine_input._replace(topk_ids=output.topk_ids)
        # A refused call ends the step, as any error does.
        result = layer.dispatcher.combine(combine_input=combine_input)[: x.shape[0]]
        torch.testing.assert_close(result, MODEL.truth(step, rank), rtol=1e-5, atol=1e-5)
        layer.dispatcher.dispatch(x, topk)
        with CASE.assertRaisesRegex(DispatchError, "origin_topk_ids"):
            layer.dispatcher.combine(received)

        # A record that a caller built, of fewer rows than the buffer, and one that says how many rows may be valid.
        hidden = torch.randn(6, MODEL.hidden)
        ids, weights = torch.full((6, MODEL.top_k), 4 * rank, dtype=torch.int32), torch.rand(6, MODEL.top_k)
        total = torch.tensor([2], dtype=torch.int32)
        built = MoriEPNormalDispatchOutput(hidden, None, ids, weights, total, ids, weights, torch.float32)
        whole = layer.run_moe_core(built)
        CASE.assertEqual(whole.hidden_states.shape, (6, MODEL.hidden))
        cut = layer.run_moe_core(built._replace(recv_cap=3))
        CASE.assertEqual(cut.hidden_states.shape, (3, MODEL.hidden))
        torch.testing.assert_close(cut.hidden_states[:2], whole.hidden_states[:2])
        dist.barrier()

    over_fake(work)


@contextmanager
def _variables(**values: str) -> Any:
    with mock.patch.dict(os.environ, values):
        yield


def check_warning() -> None:
    """The dispatcher warns if shared experts should overlap an exchange that occupies the compute units."""
    logger = "sglang.srt.layers.moe.token_dispatcher.moriep"

    def make(kind: str, mode: str, rank: int = 0) -> list[str]:
        config = sizes(rank, INTRA_NODE, two_phase=mode == "two_phase", rows_by_source=False)
        platform = RocmOverFakesPlatform(("mori",))
        with override_platform(platform), mock.patch.object(type(platform), "kind", kind):
            with CASE.assertLogs(logger, level="WARNING") as logs:
                logging.getLogger(logger).warning("the first line")
                MoriEPDispatcher(PortableTransport(config, ProcessGroupHandle(rank, 2), CPU, False), CPU)
        return logs.output[1:]

    with _variables(SGLANG_ROCM_USE_MULTI_STREAM="0"):
        CASE.assertEqual(make("hip", "sync"), [])
    with _variables(SGLANG_ROCM_USE_MULTI_STREAM="1"):
        said = make("hip", "sync")
        CASE.assertEqual(len(said), 1)
        for part in ("deepseek.shared_experts", "--deepep-mode low_latency", "MORI_ENABLE_SDMA=1"):
            CASE.assertIn(part, said[0])
        CASE.assertEqual((make("cuda", "sync"), make("hip", "sync", rank=1)), ([], []))
        CASE.assertIn("unless MORI_ENABLE_SDMA=1", make("hip", "two_phase")[0])
        with _variables(MORI_ENABLE_SDMA="1"):
            CASE.assertEqual(make("hip", "two_phase"), [])
    with _variables(SGLANG_STREAM_SITES="qwen3_5.shared_experts=on"):
        CASE.assertIn("qwen3_5.shared_experts", make("hip", "sync")[0])
        CASE.assertEqual(make("cuda", "sync"), [])


MORI_CHECKS: dict[str, Callable[[], None]] = {
    "delivery": check_delivery,
    "own bound": check_own_bound,
    "releases": check_releases,
    "callers": check_callers,
    "warning": check_warning,
}
