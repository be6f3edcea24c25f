"""Each kind of operation that no graph can replay is inserted once; the lint names the operation and the line."""

import json
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.capture_lint import (
    CaptureViolation,
    HostList,
    capture_lint,
    collect_violations,
    find_problem,
)
from sglang.srt.model_executor.forward_batch_info import DECODE
from sglang.srt.model_executor.step_graphs import StepGraphs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

CPU, META = torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
ARCHITECTURES = {
    "dsv2": "DeepseekV2ForCausalLM",
    "dsv3": "DeepseekV3ForCausalLM",
    "q35": "Qwen3_5ForCausalLM",
    "q35moe": "Qwen3_5MoeForCausalLM",
}


def offences():
    """Name -> (a body that breaks the rule, text of the message)."""
    x = torch.randn(4, 3)
    rows = torch.tensor([0, 2])
    return {
        "item": (lambda: x.sum().item(), "_local_scalar_dense"),
        "int": (lambda: int(x[0, 0]), "_local_scalar_dense"),
        "branch": (lambda: 1 if x.sum() > 0 else 2, "_local_scalar_dense"),
        "index": (lambda: [1, 2, 3][rows[0]], "_local_scalar_dense"),
        "tolist": (lambda: rows.tolist(), "tolist"),
        "numpy": (lambda: x.numpy(), "numpy"),
        "nonzero": (lambda: x.nonzero(), "nonzero"),
        "where": (lambda: torch.where(x > 0), "nonzero"),
        "unique": (lambda: rows.unique(), "unique"),
        "masked_select": (lambda: x.masked_select(x > 0), "masked_select"),
        "mask": (lambda: x[x > 0], "mask"),
        "mask written": (lambda: x.__setitem__(x > 9, 0.0), "mask"),
        "equal": (lambda: torch.equal(x, x), "equal"),
        "bincount": (lambda: torch.bincount(rows), "bincount"),
        "repeat": (lambda: torch.repeat_interleave(rows, rows), "repeat_interleave"),
        "temporary": (lambda: torch.tensor([1, 2]), "host values"),
        "list as index": (lambda: x[[0, 2]], "host values"),
    }


class TestLint(CustomTestCase):
    def test_an_error_behind_an_offence_is_not_taken_for_it(self):
        with self.assertRaisesRegex(MemoryError, "planted"), collect_violations(), capture_lint(CPU):
            torch.ones(1).item()
            raise MemoryError("planted")
        with self.assertRaisesRegex(CaptureViolation, "_local_scalar_dense"), collect_violations(), capture_lint(CPU):
            torch.ones(1).item()

    def test_every_offence_is_named_with_its_line(self):
        for name, (body, wanted) in offences().items():
            with self.subTest(name), torch.inference_mode():
                with self.assertRaisesRegex(CaptureViolation, rf"{wanted}.*test_capture_lint\.py:\d+ in "):
                    with capture_lint(CPU):
                        body()
                body()

    def test_what_a_graph_replays_passes(self):
        x, rows = torch.randn(4, 3), torch.tensor([0, 2])
        with torch.inference_mode(), capture_lint(CPU):
            y = torch.nn.functional.linear(x, x).float().to(torch.float64)[rows]
            y[rows[:1] * 0] = 0.0
            y.masked_fill_(y > 0, 1.0)
            y.index_copy_(0, rows[:1] * 0, x[:1].double() @ x.double().t())
            torch.repeat_interleave(rows, rows, output_size=2)
            torch.where(y > 0, y, 0.0).sum(-1).topk(1)
            torch.cat((y, y)).contiguous().split((1, 3))
            torch.nn.functional.one_hot(rows, 4)

    def test_devices(self):
        """Only the arguments name a device: "meta" stands for one."""
        host, host_number, device = torch.randn(2), torch.tensor(2.0), torch.empty(2, device="meta")
        found = [
            (aten.copy_.default, (device, host), {}, "between host and device"),
            (aten.copy_.default, (host, device), {}, "between host and device"),
            (aten._to_copy.default, (device,), {"device": CPU}, "between host and device"),
            (aten._to_copy.default, (host_number,), {"device": META}, "between host and device"),
            (aten.index.Tensor, (device, [host.long()]), {}, "host tensor"),
            (aten.cat.default, ([device, host],), {}, "host tensor"),
        ]
        for func, args, kwargs, wanted in found:
            self.assertIn(wanted, find_problem(func, args, kwargs) or "nothing")
        for func, args, kwargs in (
            (aten._to_copy.default, (device,), {"dtype": torch.float64}),
            (aten._to_copy.default, (device,), {"device": META}),
            (aten.copy_.default, (device, device), {}),
            (aten.mul.Tensor, (device, host_number), {}),
            (aten.mul.Tensor, (host, host), {}),
        ):
            self.assertIsNone(find_problem(func, args, kwargs))
        with self.assertRaisesRegex(CaptureViolation, "between host and device"), capture_lint(META):
            device.cpu()

    def test_host_lists_cannot_be_read(self):
        lens = HostList([1, 2])
        for read in (lambda: lens[0], lambda: len(lens), lambda: list(lens), lambda: max(lens), lambda: 1 in lens):
            with self.assertRaisesRegex(CaptureViolation, "host-side list"):
                read()

    def test_references_of_ops_are_exempt_on_a_cpu_alone(self):
        from sglang.kernels.ops.attention.decode_attention import slots_of

        table, one = torch.zeros(2, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        with capture_lint(CPU):
            slots_of(table, one, one)
        with self.assertRaisesRegex(CaptureViolation, "_local_scalar_dense.*decode_attention.py"), capture_lint(META):
            slots_of(table, one, one)


class TestDecodeSteps(CustomTestCase):
    """The eager decode step of the served models: everything around the ops."""

    def harness(self, name):
        with tempfile.TemporaryDirectory() as folder:
            config = {**TINY_CONFIGS[name], "architectures": [ARCHITECTURES[name]]}
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            harness = ModelHarness(folder, num_slots=256, max_requests=8, load_format="dummy")
        context = harness.context()
        harness.backend = make_attention_backend("triton", context)
        return harness

    def test_models_pass(self):
        for name in ARCHITECTURES:
            harness = self.harness(name)
            requests = [harness.new_request() for _ in range(3)]
            harness.extend([(request, list(range(5, 9 + i))) for i, request in enumerate(requests)])
            forward = harness.model.forward

            def linted(ids, positions, forward_batch, forward=forward):
                forward_batch.seq_lens_cpu = HostList(forward_batch.seq_lens_cpu)
                with capture_lint(CPU):
                    return forward(ids, positions, forward_batch)

            with self.subTest(name), mock.patch.object(harness.model, "forward", linted):
                harness.decode([(request, 7) for request in requests])

    def test_an_offence_in_a_model_refuses_the_bucket(self):
        calls = []

        def forward(forward_batch):
            calls.append(forward_batch.batch_size)
            if forward_batch.batch_size == 4:
                forward_batch.seq_lens.max().item()
            if forward_batch.batch_size == 8:
                sum(forward_batch.seq_lens_cpu)
            return LogitsProcessorOutput(forward_batch.positions.unsqueeze(1).float())

        backend = mock.MagicMock()
        graphs = StepGraphs(DECODE, forward, backend, [1, 2, 4, 8], 16, CPU, padding_row=0, has_state=False)
        with self.assertLogs("sglang.srt.model_executor.bucket_graphs", "WARNING"), torch.inference_mode():
            graphs.capture(lambda: SimpleNamespace(capture=lambda body: body()))
        self.assertEqual(sorted(graphs.refused), [4, 8])
        self.assertRegex(
            graphs.refused[4], r"_local_scalar_dense.*test_capture_lint\.py:\d+ in forward: forward_batch\.seq_lens"
        )
        self.assertRegex(graphs.refused[8], r"host-side list.*test_capture_lint\.py")
        self.assertEqual([graphs.bucket_of(size) for size in (1, 2, 3, 5)], [1, 2, None, None])
        self.assertEqual(calls.count(2), 3)


if __name__ == "__main__":
    unittest.main()
