"""Filters, penalties, seeds and log-probabilities of the sampler against a float64 loop over plain lists."""

from __future__ import annotations

import math
import unittest
from typing import Any
from unittest import mock

import torch

from sglang.kernels.ops.sampling.draw import draw, draw_torch, filter_torch
from sglang.kernels.ops.sampling.greedy import greedy_sample, greedy_torch
from sglang.kernels.ops.sampling.seeded import seeded_sample_torch, uniform_from_seed_torch
from sglang.srt.layers import sampler as sampler_module
from sglang.srt.layers.logits_processor import LogitsProcessorOutput, RowFault
from sglang.srt.layers.sampler import Sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams, SamplingParamsError, sample_seed
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.draw_truth import both_forms, judge_draw
from sglang.test.op_cases import cases_of
from sglang.test.op_cases.sampling import RowOf, draw_args
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def info_of(
    params: list[SamplingParams], vocab: int, seeds: list[int] | None = None, **row: object
) -> SamplingBatchInfo:
    seeds = seeds or list(range(len(params)))
    rows = [
        SamplingRow(p, seed, row.get("prompt", []), row.get("output", []), row.get("stop", []))
        for p, seed in zip(params, seeds)
    ]
    return SamplingBatchInfo.from_rows(rows, vocab, CPU)


def filtered_probs(logits: torch.Tensor, info: SamplingBatchInfo) -> torch.Tensor:
    """What the reference draws from."""
    columns = (column.view(-1) for column in (info.top_ks, info.top_ps, info.min_ps))
    return filter_torch(logits / info.temperatures, *columns, info.wanted)


def filtered_by_loop(logits: list[float], p: SamplingParams) -> list[float]:
    """Temperature, top-k, top-p, min-p, one id at a time in float64; normalised."""
    scaled = [x / p.temperature for x in logits]
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = order if p.top_k == -1 else order[: p.top_k]
    mass = sum(probs[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if nucleus and reached >= p.top_p - 1e-12 and p.top_p < 1.0:
            break
        nucleus.append(i)
        reached += probs[i] / mass
    best = max(probs)
    final = {i for i in nucleus if probs[i] >= p.min_p * best}
    total = sum(probs[i] for i in final)
    return [probs[i] / total if i in final else 0.0 for i in range(len(probs))]


class TestBounds(CustomTestCase):
    """At the ends of what a request may ask for, all that the sampler computes is still finite and still right."""

    def test_drafts_are_edited_as_tokens_are(self) -> None:
        sharp = SamplingParams(temperature=0.0, logit_bias={"2": 90.0})
        info = info_of([sharp, SamplingParams(temperature=0.0)], 4)
        logits = torch.tensor([[1.0, 30.0, -2.0, 0.5]] * 2)
        self.assertEqual(Sampler().draft(logits, info, None).tolist(), [2, 1])

    def test_extremes_draw_what_they_must(self) -> None:
        logits = torch.tensor([[1.0, 30.0, -2.0, 0.5]])
        cases = [
            ({"top_p": 1e-30}, {1}),
            ({"temperature": 1.1e-6}, {1}),
            ({"temperature": 1.1e-6, "logit_bias": {"2": 1e30}}, {2}),
            ({"temperature": 1.1e-6, "logit_bias": {"1": -1e30}, "repetition_penalty": 1e-6}, {0}),
            ({"temperature": 1e30, "min_new_tokens": 2, "stop_token_ids": [1, 2]}, {0, 3}),
        ]
        for fields, allowed in cases:
            with self.subTest(fields):
                params = SamplingParams.from_request(fields)
                params.verify(4)
                info = info_of([params], 4, prompt=[0], stop=params.stop_token_ids)
                probs = filtered_probs(info.apply_edits(logits) if info.edits_logits() else logits, info)
                self.assertTrue(bool(probs.isfinite().all()), probs)
                self.assertEqual({int(i) for i in probs[0].nonzero()}, allowed)

    def test_past_the_bounds_is_refused(self) -> None:
        past = [
            {"top_p": 1e-300}, {"temperature": 1e300}, {"repetition_penalty": 1e-300}, {"logit_bias": {"1": 1e300}},
            {"logit_bias": {"1": -1e39}}, {"logit_bias": {"1": NAN}}, {"temperature": INF},
        ]  # fmt: skip
        for fields in past:
            with self.subTest(fields), self.assertRaisesRegex(SamplingParamsError, next(iter(fields))):
                SamplingParams.from_request(fields).verify(4)


class TestFilters(CustomTestCase):
    def test_against_the_loop(self) -> None:
        generator = torch.Generator().manual_seed(1)
        grid = [
            SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
            for t in (0.3, 1.0, 2.5)
            for k in (-1, 1, 2, 7, 100)
            for p in (1.0, 0.9, 0.35, 1e-6)
            for m in (0.0, 0.2, 1.0)
        ]
        logits = torch.randn(len(grid), 23, generator=generator) * 3
        logits[5, 4] = logits[5, 9] = 6.0
        logits[6, 2:] = -INF
        probs = filtered_probs(logits, info_of(grid, 23))
        probs = probs / probs.sum(-1, keepdim=True)
        for row, params in enumerate(grid):
            if params.top_k == 1:
                continue  # greedy rows are not drawn from these probabilities
            wanted = filtered_by_loop(logits[row].double().tolist(), params)
            alone = filtered_probs(logits[row : row + 1], info_of([params], 23))[0]
            for found in (probs[row], alone / alone.sum()):
                torch.testing.assert_close(
                    found.double(), torch.tensor(wanted, dtype=torch.float64), atol=2e-6, rtol=1e-5, msg=f"{params}"
                )

    def test_top_p_keeps_no_more_than_it_needs(self) -> None:
        probs = filtered_probs(torch.zeros(1, 2), info_of([SamplingParams(top_p=0.5)], 2))
        self.assertEqual(probs.tolist(), [[0.5, 0.0]])

    def test_draws_follow_the_distribution(self) -> None:
        n = 40_000
        logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -INF]).repeat(n, 1)
        info = info_of([SamplingParams(temperature=0.8)] * n, 5, seeds=list(range(n)))
        ids = Sampler()(LogitsProcessorOutput(logits), info, positions=torch.arange(n))
        share = torch.bincount(ids, minlength=5) / n
        torch.testing.assert_close(share, torch.softmax(logits[0] / 0.8, -1), atol=0.01, rtol=0)


class TestSeeds(CustomTestCase):
    def test_draw_depends_on_seed_and_position_only(self) -> None:
        logits = torch.randn(6, 101, generator=torch.Generator().manual_seed(0))
        params, positions = SamplingParams(temperature=1.3, top_p=0.95, top_k=50), torch.arange(6) + 17
        seeds = [5, -3, 2**40, 5, 0, 9]
        together = Sampler()(LogitsProcessorOutput(logits), info_of([params] * 6, 101, seeds), positions=positions)
        for row, seed in enumerate(seeds):
            alone = Sampler()(
                LogitsProcessorOutput(logits[row : row + 1]),
                info_of([params], 101, [seed]),
                positions=positions[row : row + 1],
            )
            self.assertEqual(int(alone), int(together[row]))

    def test_samples_of_one_request_have_seeds_of_their_own(self) -> None:
        seeds = [0, 1, 2, 3, -1, -2, 5, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), -(2**63) + 1]
        derived = {(seed, index): sample_seed(seed, index) for seed in seeds for index in range(1, 1024)}
        self.assertTrue(all(-(2**63) <= value < 2**63 for value in derived.values()))
        self.assertEqual(len({*derived.values(), *seeds}), len(derived) + len(seeds), "two samples share a seed")
        # The draw keeps 32 bits of a seed: no two samples of a request may meet there either.
        for seed in seeds:
            values = torch.tensor([derived[seed, index] for index in range(1, 1024)])
            draws = uniform_from_seed_torch(values, torch.full((1023,), 7))
            self.assertEqual(draws.unique().numel(), 1023)
            self.assertLess(abs(float(draws.mean()) - 0.5), 0.05)
        params = SamplingParams(sampling_seed=7, stop=["x"])
        self.assertIs(params.for_sample(0), params)
        self.assertEqual(params.for_sample(3), SamplingParams(sampling_seed=sample_seed(7, 3), stop=["x"]))
        self.assertEqual(params.sampling_seed, 7)
        unseeded = SamplingParams()
        self.assertIs(unseeded.for_sample(3), unseeded)

    def test_uniforms_look_uniform_and_differ(self) -> None:
        seeds, positions = torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)
        u = uniform_from_seed_torch(seeds, positions)
        self.assertTrue(bool(((u >= 0) & (u < 1)).all()))
        self.assertGreater(u.unique().numel(), 39_990)
        counts = torch.histc(u.float(), bins=20, min=0, max=1)
        self.assertLess(float((counts - 2000).abs().max()), 200)
        grid = u.view(200, 200)
        self.assertLess(abs(float(torch.corrcoef(torch.stack([grid[:-1].flatten(), grid[1:].flatten()]))[0, 1])), 0.03)

    def test_never_an_id_of_zero_probability(self) -> None:
        probs = torch.zeros(1000, 7)
        probs[:, 3] = 1e-30
        ids = seeded_sample_torch(probs, torch.arange(1000), torch.zeros(1000, dtype=torch.int64))
        self.assertEqual(ids.unique().tolist(), [3])


class TestGreedy(CustomTestCase):
    def test_ids_in_range_and_first_of_ties(self) -> None:
        logits = torch.tensor([[1.0, 3.0, 3.0], [-INF] * 3, [NAN] * 3, [0.0, NAN, 5.0], [-1e4, -1e4, -2e4]])
        ids, faults = (found.tolist() for found in greedy_sample(logits))
        self.assertEqual(ids, [1, 0, 0, 1, 0])
        self.assertEqual(faults, [0, *[RowFault.LOGITS] * 3, 0])

    def test_every_case_by_hand(self) -> None:
        for case in cases_of(greedy_sample):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                logits = case.args[0].to(dtype)
                ids, faults = (found.tolist() for found in greedy_torch(logits))
                for row, values in enumerate(logits.tolist()):
                    order = [(value != value, 0.0 if value != value else value) for value in values]
                    best = order.index(max(order))
                    with self.subTest(case.name, dtype=dtype, row=row):
                        self.assertEqual(ids[row], best)
                        self.assertEqual(faults[row], 0 if math.isfinite(values[best]) else RowFault.LOGITS)

    def test_mixed_rows(self) -> None:
        logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(2))
        params = [
            SamplingParams(temperature=0.0),
            SamplingParams(),
            SamplingParams(top_k=1),
            SamplingParams(temperature=1e-9),
        ]
        ids = Sampler()(LogitsProcessorOutput(logits), info_of(params, 33), positions=torch.arange(4)).tolist()
        best = logits.argmax(-1).tolist()
        self.assertEqual([ids[0], ids[2], ids[3]], [best[0], best[2], best[3]])

    def test_rows_that_cannot_be_sampled_are_marked(self) -> None:
        logits = torch.randn(5, 9)
        logits[1] = -INF
        logits[2, 4] = NAN
        logits[3, 0] = INF
        for params in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.5)):
            output = LogitsProcessorOutput(logits)
            ids = Sampler()(output, info_of([params] * 5, 9), positions=torch.arange(5))
            self.assertEqual((output.row_faults != 0).tolist(), [False, True, True, True, False])
            self.assertTrue(bool(((ids >= 0) & (ids < 9)).all()))

    def test_empty_batch(self) -> None:
        nobody = torch.empty(0, dtype=torch.int64)
        ids = Sampler()(LogitsProcessorOutput(torch.empty(0, 9)), info_of([], 9), positions=nobody)
        self.assertEqual(ids.tolist(), [])


class TestDraw(CustomTestCase):
    """The reference of the draw against one row after the other in float64."""

    def test_every_case(self) -> None:
        for case in cases_of(draw):
            with self.subTest(case.name):
                ids, faults = draw_torch(*case.args)
                self.assertEqual(judge_draw(case.args, ids, faults, faults), 0)

    def test_where_a_sort_is_spared_and_where_not(self) -> None:
        """Past 4096 ids a host sorts the best 1024 alone, unless a row's filter reaches further."""
        rows = [RowOf(top_p=0.9), RowOf(top_k=1024), RowOf(), RowOf(0.3, top_p=0.999), RowOf(greedy=True)]
        logits = torch.randn(5, 6001, generator=torch.Generator().manual_seed(6)) * 4
        tied = (logits * 2).round() / 2
        for given in (logits, tied, logits / 10):
            for chosen in (rows, [*rows[:4], RowOf(top_k=1025)], [*rows[:4], RowOf(top_p=0.9999999)]):
                args = draw_args(given, chosen, 11)
                ids, faults = draw_torch(*args)
                self.assertLess(judge_draw(args, ids, faults, torch.zeros_like(faults)), 2)

    def test_a_row_with_no_allowed_id_is_the_requests_own_fault(self) -> None:
        info = info_of([SamplingParams(temperature=0.0), SamplingParams(top_p=0.9), SamplingParams()], 40)
        info.vocab_mask = torch.tensor([[0, 0], [1 << 30, 0], [0, 1]], dtype=torch.int32)
        output = LogitsProcessorOutput(torch.randn(3, 40, generator=torch.Generator().manual_seed(3)))
        ids = Sampler()(output, info, positions=torch.arange(3))
        self.assertEqual(output.row_faults.tolist(), [RowFault.EDITED, 0, 0])
        self.assertEqual(ids.tolist()[1:], [30, 32])


class TestFaults(CustomTestCase):
    """A row from which nothing can be sampled is marked with the reason; no id is made up for it, nor for others."""

    def sample(
        self, logits: torch.Tensor, params: list[SamplingParams], **row: object
    ) -> tuple[list[int], list[int], LogitsProcessorOutput]:
        output = LogitsProcessorOutput(logits)
        info = info_of(params, logits.shape[1], **row)
        ids = Sampler()(output, info, True, [1] * len(params), positions=torch.arange(len(params)))
        self.assertTrue(bool(((ids >= 0) & (ids < logits.shape[1])).all()), "an id that the device cannot use")
        return ids.tolist(), output.row_faults.tolist(), output

    def test_ids_outside_the_vocabulary(self) -> None:
        answers = [1, 77777, -3, 31, 32, 2**31 - 1, 0]
        wanted = [0, *[RowFault.TOKEN_ID] * 2, 0, *[RowFault.TOKEN_ID] * 2, 0]
        logits = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
        healthy = [0, 3, 6]

        def kernel(out: torch.Tensor, given: torch.Tensor) -> None:
            out.copy_(torch.tensor(answers))

        def op(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor(answers), torch.zeros(7, dtype=torch.int64)

        def draw(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor(answers), torch.zeros(7, dtype=torch.int64)

        greedy, drawn = SamplingParams(temperature=0.0), SamplingParams()
        paths = {
            "AITER, by the sampler's names": ({"_use_aiter": True, "_aiter_greedy_sample": kernel}, [greedy] * 7),
            "op table, all greedy": ({"greedy_sample": op}, [greedy] * 7),
            "torch": ({"_use_aiter": False, "greedy_torch": op}, [greedy] * 7),
            "drawn": ({"draw": draw}, [drawn] * 7),
            "greedy rows next to sampled ones": ({"draw": draw}, [greedy, drawn] * 3 + [drawn]),
        }
        for path, (names, params) in paths.items():
            with self.subTest(path), mock.patch.multiple(sampler_module, **names):
                ids, faults, output = self.sample(logits, params)
                self.assertEqual(faults, wanted)
                self.assertEqual((output.row_faults != 0).tolist(), [bool(fault) for fault in wanted])
                self.assertEqual([ids[row] for row in healthy], [answers[row] for row in healthy])

    def test_the_models_fault_comes_first(self) -> None:
        logits = torch.zeros(2, 32)
        logits[0, 3] = NAN

        def op(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([77, 78]), greedy_torch(given)[1]

        with mock.patch.multiple(sampler_module, greedy_sample=op):
            _, faults, _ = self.sample(logits, [SamplingParams(temperature=0.0)] * 2)
        self.assertEqual(faults, [RowFault.LOGITS, RowFault.TOKEN_ID])

    def test_edited_logits_that_are_not_finite(self) -> None:
        """The model's logits are sound, but what is drawn from is not; the row next to it never notices."""
        cases = [
            ({"min_new_tokens": 1}, [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0]),  # every id is forbidden
            ({"temperature": 2e-6}, [], [1.0, 2.0, 3e33, 4.0]),  # past float32 once scaled
            ({"temperature": 2e-6}, [], [-3e33, -2e33, -1e33, -3e33]),
            ({"logit_bias": {"2": 3e38}}, [], [1.0, 2.0, 3e38, 4.0]),
            ({"repetition_penalty": 1e-6}, [], [1.0, 2.0, 3e33, 4.0]),
        ]
        for fields, stop, row in cases:
            for greedy in (False, True):
                if greedy and "temperature" in fields:
                    continue
                edited = SamplingParams(**fields)
                edited.top_k = 1 if greedy else -1
                other = SamplingParams(temperature=0.0) if greedy else SamplingParams(top_p=0.9)
                neighbour = [0.5, -1.0, 2.0, 0.0]
                logits = torch.tensor([row, neighbour])
                rows = [SamplingRow(params, seed, [2], [], stop) for seed, params in enumerate((edited, other))]
                for form, info in both_forms(rows, 4):
                    with self.subTest(fields, greedy=greedy, form=form):
                        output = LogitsProcessorOutput(logits)
                        ids = Sampler()(output, info, positions=torch.arange(2))
                        self.assertEqual(output.row_faults.tolist(), [RowFault.EDITED, 0])
                        alone = Sampler()(
                            LogitsProcessorOutput(logits[1:]),
                            info_of([other], 4, [1], prompt=[2]),
                            positions=torch.tensor([1]),
                        )
                        self.assertEqual(int(ids[1]), int(alone))

    def test_what_an_edit_hides_of_the_models_faults(self) -> None:
        """NaN or +inf at an id that is forbidden, nothing finite, and next to an edit that changes nothing of it."""
        bad = [[1.0, NAN, 2.0, 3.0], [1.0, INF, 2.0, 3.0], [-INF] * 4, [1.0, 2.0, NAN, 0.0], [1.0, 2.0, 3.0, 4.0]]
        for fields in ({"min_new_tokens": 2}, {"min_new_tokens": 2, "frequency_penalty": 1.0}, {"top_k": 1}):
            params = SamplingParams(**{"temperature": 0.8, "repetition_penalty": 2.0, **fields})
            rows = [SamplingRow(params, seed, [2], [3], [1]) for seed in range(5)]
            for form, info in both_forms(rows, 4):
                with self.subTest(fields, form=form):
                    output = LogitsProcessorOutput(torch.tensor(bad))
                    Sampler()(output, info, positions=torch.arange(5))
                    self.assertEqual(output.row_faults.tolist(), [RowFault.LOGITS] * 4 + [0])

    def test_a_greedy_row_is_judged_as_such_whoever_is_beside_it(self) -> None:
        logits = torch.tensor([[1.0, 3e33, 2.0], [1.0, 2.0, 3.0]])
        cold = SamplingParams(temperature=2e-6, top_k=1)
        for params in ([cold, cold], [cold, SamplingParams()]):
            ids, faults, _ = self.sample(logits, params)
            self.assertEqual((ids[0], faults), (1, [0, 0]))


class TestUpstreamsCallers(CustomTestCase):
    """``SamplingBatchInfo`` by upstream's keywords and shapes gives what ``from_rows`` gives."""

    def info(self, rows: int, vocab: int, greedy: bool = False, **fields: object) -> SamplingBatchInfo:
        values = {
            "temperatures": torch.ones(rows, 1), "top_ps": torch.ones(rows), "min_ps": torch.zeros(rows),
            "top_ks": torch.zeros(rows, dtype=torch.int32), "is_all_greedy": greedy, "need_top_p_sampling": False,
            "need_top_k_sampling": False, "need_min_p_sampling": False, "vocab_size": vocab, "device": "cpu",
        }  # fmt: skip
        return SamplingBatchInfo(**{**values, **fields})

    def test_filters(self) -> None:
        logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(8)) * 2
        params = [SamplingParams(top_k=k, top_p=0.8, min_p=0.1, temperature=0.7) for k in (-1, 1, 3, 40)]
        for top_ks in ([0, 1, 3, 40], [1 << 30, 1, 3, 40], [-1, 1, 3, 1 << 30]):
            given = self.info(
                4, 40, temperatures=torch.full((4, 1), 0.7), top_ps=torch.full((4,), 0.8), min_ps=torch.full((4,), 0.1),
                top_ks=torch.tensor(top_ks, dtype=torch.int32), need_top_p_sampling=True, need_top_k_sampling=True,
                need_min_p_sampling=True, is_any_greedy=True, sampling_seed=torch.arange(4),
            )  # fmt: skip
            ids = Sampler()(LogitsProcessorOutput(logits), given, positions=torch.arange(4))
            wanted = Sampler()(LogitsProcessorOutput(logits), info_of(params, 40), positions=torch.arange(4))
            self.assertEqual(ids.tolist(), wanted.tolist())

    def test_without_seeds_draws_differ(self) -> None:
        logits, positions = torch.zeros(64, 1000), torch.zeros(64, dtype=torch.int64)
        drawn = {tuple(Sampler()(LogitsProcessorOutput(logits), self.info(64, 1000), positions=positions).tolist())
                 for _ in range(2)}  # fmt: skip
        self.assertEqual(len(drawn), 2)
        self.assertGreater(len(set(drawn.pop())), 32)

    def test_what_is_not_known_here_is_refused(self) -> None:
        with self.assertRaisesRegex(TypeError, "xtc_thresholds"):
            self.info(1, 4, xtc_thresholds=torch.ones(1))


class TestEdits(CustomTestCase):
    def test_penalties_against_the_loop(self) -> None:
        params = SamplingParams(
            frequency_penalty=0.4, presence_penalty=-0.7, repetition_penalty=1.5, logit_bias={"3": -5, "0": 2.5}
        )
        prompt = [1, 1, 2]
        rows = [SamplingRow(p, seed, prompt, [4, 4, 5]) for seed, p in enumerate((params, SamplingParams()))]
        logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
        for form, info in both_forms(rows, 8):
            output = [4, 4, 5]
            for drawn in ([6, 1], [6, 2]):
                info.update(torch.tensor(drawn))
                output = output + [drawn[0]]
                wanted = []
                for i, x in enumerate(logits[0].tolist()):
                    if i in prompt + output:
                        x = x / 1.5 if x > 0 else x * 1.5
                    x -= 0.4 * output.count(i) + (-0.7 if i in output else 0.0)
                    wanted.append(x + {3: -5, 0: 2.5}.get(i, 0.0))
                edited = info.apply_edits(logits)
                torch.testing.assert_close(edited[0], torch.tensor(wanted), msg=form)
                torch.testing.assert_close(edited[1], logits[1])

    def test_a_host_edits_as_a_device_does(self) -> None:
        """Every kind of edit, by exactly the same numbers, token after token: new ids, repeated ids, and all ids."""
        penalties = {"frequency_penalty": 0.3, "presence_penalty": -0.2, "repetition_penalty": 1.7}
        kinds: list[dict[str, Any]] = [
            penalties, {}, {"repetition_penalty": 0.6}, {"logit_bias": {"3": 2.5, "90": -1e30}},
            {"min_new_tokens": 40}, {**penalties, "logit_bias": {"0": 9.0}, "min_new_tokens": 3}, {},
            {"frequency_penalty": -2.0}, {"presence_penalty": 1.5, "min_new_tokens": 2},
        ]  # fmt: skip
        generator = torch.Generator().manual_seed(8)
        vocab, texts = 97, ([], [5], [7, 7, 96, 0])
        for kept in (kinds, kinds[:1], kinds[4:5], kinds[3:4]):
            rows = [
                SamplingRow(SamplingParams(**fields), seed, texts[seed % 3], texts[seed % 2], [3, 96])
                for seed, fields in enumerate(kept)
            ]
            (_, host), (_, device) = both_forms(rows, vocab)
            for step in range(160):
                logits = torch.randn(len(kept), vocab, generator=generator) * 4
                logits[:, step % vocab] = (NAN, INF, -INF, 0.0)[step % 4]
                given = logits.to((torch.float32, torch.bfloat16)[step % 2])
                before = given.clone()
                torch.testing.assert_close(
                    host.apply_edits(given), device.apply_edits(given).float(), rtol=0, atol=0, equal_nan=True
                )
                drawn, told = torch.randint(vocab, (len(kept),), generator=generator), []
                for info in (host, device):
                    output = LogitsProcessorOutput(given)
                    ids = Sampler()(output, info, positions=torch.full((len(kept),), step))
                    told.append((ids.tolist(), output.row_faults.tolist()))
                    torch.testing.assert_close(given, before, rtol=0, atol=0, equal_nan=True)
                    info.update(drawn)
                self.assertEqual(*told)

    def test_edits_of_another_vocabulary_are_refused(self) -> None:
        info = info_of([SamplingParams(presence_penalty=1.0)], 8)
        with self.assertRaisesRegex(ValueError, "8 ids, but logits have 9"):
            info.apply_edits(torch.zeros(1, 9))

    def test_min_new_tokens_forbids_stop_ids_until_reached(self) -> None:
        rows = [SamplingRow(SamplingParams(temperature=0.0, min_new_tokens=2), 0, [], [], [2, 3])]
        logits = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
        for form, info in both_forms(rows, 4):
            drawn = []
            for _ in range(3):
                ids = Sampler()(LogitsProcessorOutput(logits), info)
                info.update(ids)
                drawn.append(int(ids))
            self.assertEqual(drawn, [1, 1, 2], form)

    def test_logprobs_are_the_models_own(self) -> None:
        logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(4))
        params = [SamplingParams(temperature=0.0, logit_bias={"7": 50.0})] * 3
        output = LogitsProcessorOutput(logits)
        ids = Sampler()(output, info_of(params, 11), True, [2, 0, 1], [(), (5, 3), ()])
        self.assertEqual(ids.tolist(), [7, 7, 7])
        wanted = torch.log_softmax(logits.double(), -1)
        torch.testing.assert_close(output.row_logprobs.token.double(), wanted[:, 7])
        best = wanted[0].topk(2)
        found = output.row_logprobs.read(output.row_logprobs.tensors())
        self.assertEqual([i for _, i in found.top[0]], best.indices.tolist())
        self.assertEqual([len(row) for row in found.top], [2, 0, 1])
        self.assertEqual([i for _, i in found.chosen[1]], [5, 3])
        self.assertAlmostEqual(found.chosen[1][0][0], float(wanted[1, 5]), places=5)


if __name__ == "__main__":
    unittest.main()
