"""HIP's policy over fakes on a CPU: which platform is chosen, its streams, and graphs that repeat what was recorded."""

import importlib
import unittest
from unittest import mock

import torch

from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.ops.sampling.greedy import fits_aiter
from sglang.kernels.spec import Impl, Op
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.environ import EnvError, envs
from sglang.srt.platforms import PlatformError, override_platform, rocm, select_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, RocmPlatform, find_fakes
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=6, suite="stage-a-test-cpu")


class TestChoice(CustomTestCase):
    def test_architecture_and_queues(self):
        self.assertEqual(find_fakes(), ("aiter", "mori"))
        for arch, dtype in (("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)):
            with envs.SGLANG_FAKE_ROCM_ARCH.override(arch):
                platform = select_platform("rocm")
            self.assertEqual((platform.kind, platform.device_type, platform.arch), ("hip", "cpu", arch))
            self.assertEqual(platform.fakes, ("aiter", "mori"))
            self.assertEqual(platform.queue_variable, RocmPlatform.queue_variable)
            self.assertRegex(platform.describe(), rf"hip \({arch}\) over FAKE aiter, mori")
            self.assertEqual(fp8_dtype(arch), dtype)
        with mock.patch.dict("os.environ", {"SGLANG_FAKE_ROCM_ARCH": "gfx90a"}), self.assertRaises(EnvError):
            select_platform("rocm")

    def test_fakes_never_answer_for_a_rocm_build_of_torch_unasked(self):
        for visible in (True, False):
            with (
                mock.patch.object(torch.version, "hip", "7.0"),
                mock.patch("torch.cuda.is_available", mock.Mock(return_value=visible)),
            ):
                for name in ("rocm", "") if visible else ("rocm",):
                    with self.assertRaisesRegex(PlatformError, "aiter, mori .* are the FAKES.*SGLANG_ALLOW_VENDOR_"):
                        select_platform(name)
                    with mock.patch.object(rocm, "find_fakes", lambda: ("mori",)):
                        with self.assertRaisesRegex(PlatformError, "mori on its path is the FAKE of this project"):
                            select_platform(name)
                    with envs.SGLANG_ALLOW_VENDOR_FAKES.override(True):
                        platform = select_platform(name)
                    self.assertEqual((type(platform), platform.device_type), (RocmOverFakesPlatform, "cpu"))
                    self.assertEqual(platform.fakes, ("aiter", "mori"))

    def test_without_fakes(self):
        with mock.patch.object(rocm, "find_fakes", tuple):
            with self.assertRaisesRegex(PlatformError, "no vendor fake is on PYTHONPATH"):
                select_platform("rocm")
            with mock.patch.object(torch.version, "hip", "7.0"), mock.patch("torch.cuda.is_available", lambda: True):
                self.assertEqual((type(select_platform("")), select_platform("").fakes), (RocmPlatform, ()))

    def test_the_backend_of_gpus_and_its_graphs_run_where_they_are_asked_for(self):
        for asked, backend, no_graphs in ((None, "torch_native", True), ("triton", "triton", False)):
            platform = RocmOverFakesPlatform(("mori",))
            args = evaluate(ServerArgs(skip_tokenizer_init=True, attention_backend=asked), platform).args
            found = (args.attention_backend, args.disable_cuda_graph, args.disable_overlap_schedule)
            self.assertEqual(found, (backend, no_graphs, True))

    def test_the_fakes_that_are_found_are_those_that_import(self):
        for name in find_fakes():
            self.assertTrue(importlib.import_module(name).__doc__.startswith("FAKE"))


class OverFakes(CustomTestCase):
    def setUp(self):
        torch.set_num_threads(1)
        self.platform = RocmOverFakesPlatform(find_fakes())
        self.enterContext(override_platform(self.platform))


class TestStreams(OverFakes):
    def test_work_is_queued_where_it_is_asked_for(self):
        platform, side = self.platform, self.platform.create_stream()
        self.assertTrue(platform.is_default_stream())
        with platform.use_stream(side):
            side.wait_stream(platform.main)
            self.assertIs(platform.current_stream(), side)
            self.assertFalse(platform.is_default_stream())
        self.assertTrue(platform.is_default_stream())
        self.assertNotEqual(platform.create_stream().name, side.name)

    def test_aiter_never_runs_on_a_side_stream_nor_in_a_graph(self):
        """Its greedy kernel launches on the default stream, whichever is current."""
        from aiter import VendorWouldCorrupt, greedy_sample

        logits, out = torch.randn(2, 32), torch.empty(2, dtype=torch.int32)
        self.assertTrue(fits_aiter(logits))
        greedy_sample(out, logits)
        with self.platform.use_stream(self.platform.create_stream()):
            self.assertFalse(fits_aiter(logits))
            with self.assertRaisesRegex(VendorWouldCorrupt, "default stream"):
                greedy_sample(out, logits)
        self.assertFalse(self.platform.create_graph().capture(lambda: fits_aiter(logits)))


class TestGraph(OverFakes):
    def captured(self, body):
        graph = self.platform.create_graph()
        with torch.inference_mode():
            return graph, graph.capture(body)

    def test_a_replay_reads_and_writes_the_storages_of_the_capture(self):
        x, weight, total = torch.ones(4, 3), torch.randn(5, 3), torch.zeros(1)

        def step():
            hidden = torch.nn.functional.linear(x, weight).view(2, 10)[:, ::2]
            scratch = torch.empty(2, 5)
            torch.mul(hidden, 2.0, out=scratch)
            scratch[0].add_(1.0)
            total.add_(1.0)
            return scratch.softmax(-1), hidden.topk(2).indices

        graph, (out, best) = self.captured(step)
        before = out.data_ptr()
        for value in (2.0, -1.0):
            x.fill_(value)
            x[1, 2] = 3 * value
            graph.replay()
            wanted, wanted_best = step()
            self.assertEqual(out.data_ptr(), before)
            self.assertTrue(torch.equal(out, wanted) and torch.equal(best, wanted_best))
        self.assertEqual(total.item(), 5.0)
        self.assertFalse(self.platform.is_capturing())

    def test_what_the_host_decides_stays_as_it_was_at_capture(self):
        rows, x = torch.tensor([1]), torch.arange(4.0)
        graph, out = self.captured(lambda: x[: int(rows)] * 2 if int(rows) < 2 else x)
        rows.fill_(3)
        x.add_(5)
        graph.replay()
        self.assertEqual(out.tolist(), [10.0])

    def test_a_kernel_decides_anew_and_its_inside_is_not_recorded(self):
        """Its reference reads on the host what a kernel reads on the device."""
        calls = []

        def reference(x, rows):
            calls.append(int(rows))
            return x[: int(rows)].sum(0, keepdim=True)

        op = Op("planted.sum", Impl("torch", reference))
        with fresh_decisions():
            from sglang.kernels.registry import REGISTRY

            self.addCleanup(REGISTRY.ops.pop, op.name)
            x, rows = torch.ones(4, 2), torch.tensor([1])
            graph, out = self.captured(lambda: op(x, rows) * 10)
            rows.fill_(3)
            graph.replay()
            self.assertEqual((out.tolist(), calls), ([[30.0, 30.0]], [1, 3]))
            self.assertEqual(len(graph._calls), 2)

    def test_a_result_of_another_shape_is_refused(self):
        x = torch.tensor([1.0, 0.0])
        graph, _ = self.captured(lambda: x.nonzero())
        x.fill_(1.0)
        with self.assertRaisesRegex(PlatformError, r"nonzero.* gave torch.int64 \(2, 1\), where torch.int64 \(1, 1\)"):
            graph.replay()

    def test_one_capture_at_a_time(self):
        with self.assertRaisesRegex(PlatformError, "while another"):
            self.captured(lambda: self.captured(lambda: None))
        self.assertFalse(self.platform.is_capturing())

    def test_collectives_meet_again(self):
        def rank(number):
            import torch.distributed as dist

            x = torch.full((3,), float(number + 1))

            def step():
                parts = [torch.empty(3) for _ in range(2)]
                dist.all_gather(parts, x * 2)
                total = x.clone()
                dist.all_reduce(total)
                return torch.cat(parts), total

            graph, (gathered, total) = self.captured(step)
            for add in (1.0, 2.0):
                x.add_(add)
                graph.replay()
            assert gathered.tolist() == [8.0] * 3 + [10.0] * 3, gathered
            assert total.tolist() == [9.0] * 3, total

        run_processes(2, rank)


if __name__ == "__main__":
    unittest.main()
