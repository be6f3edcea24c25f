"""Serves the tiny DeepSeek V4 over window pools of several sizes, and counts what happens to windows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.window_companion import WindowCompanion
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness, numbers
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import Answers, difference

SIZES = {"max_total_tokens": 16384, "max_running_requests": 8, "context_length": 1024, "random_seed": 1}
NUM_PAGES = 64  # of KV, by SIZES


def window_prompts() -> dict[str, list[int]]:
    """Prompts that share 512, 256 or no tokens, in the order in which they come; some twice, and longer then."""
    generator = torch.Generator().manual_seed(5)
    first, second, third = (torch.randint(3, 512, (700,), generator=generator).tolist() for _ in range(3))
    return {
        "first": first[:540],
        "second": second[:610],
        "hit-512": first[:520] + second[:30],
        "hit-256": first[:300] + second[30:70],
        "third": third[:530],
        "page": first[:257],
        "below-page": second[-1:] + first[:244],
        "first again": first[:600],
        "one": second[:1],
        "second again": second,
        "third again": third[:550],
    }


@contextmanager
def window_events() -> Iterator[Counter[str]]:
    """Counts pages given back, evicted and revived, hits that end before a tombstone, and retractions."""
    counts: Counter[str] = Counter()

    def counted(name: str, kind: type, method: str) -> Any:
        plain: Callable[..., Any] = getattr(kind, method)

        def counting(*args: Any) -> Any:
            result = plain(*args)
            counts[name] += 1 if result is None else result
            return result

        return patch.object(kind, method, counting)

    usable_len = WindowCompanion.usable_len

    def counting_usable(companion: WindowCompanion, node: Any, num_tokens: int) -> int:
        usable = usable_len(companion, node, num_tokens)
        counts["hits cut short"] += usable < num_tokens
        return usable

    with ExitStack() as stack:
        for name, kind, method in (
            ("evicted", WindowCompanion, "evict"), ("revived", WindowPages, "move"),
            ("given back", WindowPages, "take_back"), ("retracted", Scheduler, "_retract"),
        ):  # fmt: skip
            stack.enter_context(counted(name, kind, method))
        stack.enter_context(patch.object(WindowCompanion, "usable_len", counting_usable))
        yield counts


def serve_windows(
    folder: str, steps: int = 0, retract: bool = False, abort: str = "", **options: Any
) -> tuple[Answers, dict[str, int]]:
    """Answers to ``window_prompts``, which come one after the other, and cached tokens, by request.

    Freed windows are poisoned. steps: drafts per chain. retract: now and then without need. abort: a request.
    """
    spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps} if steps else {}
    with envs.SGLANG_DEBUG_POOL_CHECK.override(True), ExitStack() as stack:
        if retract:
            stack.enter_context(envs.SGLANG_TEST_RETRACT.override(True))
            stack.enter_context(envs.SGLANG_TEST_RETRACT_INTERVAL.override(5))
        engine = EngineHarness(folder, **{**SIZES, **spec, **options})
    for number, (rid, prompt) in enumerate(window_prompts().items()):
        params = SamplingParams(
            temperature=0.7 * (number % 2), max_new_tokens=20, ignore_eos=True, sampling_seed=number
        )
        engine.submit(rid, prompt, params, return_logprob=True)
        for _ in range(4):
            engine.step()
        if rid == abort:
            engine.inbox.append(AbortReq(rid=rid))
    results = engine.run()
    answers = {rid: (result.output_ids, numbers(result.output_logprobs.logprobs)) for rid, result in results.items()}
    return answers, {rid: result.cached_tokens for rid, result in results.items()}


class WindowCase(CustomTestCase):
    """``check`` holds answers against those of windows as long as KV, without a prefix cache; ``FORMATS`` of both."""

    FORMATS: dict[str, Any] = {}
    folder: str
    hf: Any
    plain: Answers

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)  # small products: more threads only wait for one another
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.hf, _ = save_tiny_v4_mtp(cls.folder)
        cls.plain, _ = serve_windows(cls.folder, swa_full_tokens_ratio=1.0, disable_radix_cache=True, **cls.FORMATS)

    def check(self, pages: int, *events: str, abort: str = "", **what: Any) -> dict[str, int]:
        """The same answers over so many pages of the window, where ``events`` really happened; cached tokens."""
        with window_events() as counts:
            ratio = pages / NUM_PAGES
            found, cached = serve_windows(
                self.folder, abort=abort, swa_full_tokens_ratio=ratio, **{**self.FORMATS, **what}
            )
        self.assertEqual(set(found), set(self.plain))
        wanted = {rid: answer for rid, answer in self.plain.items() if rid != abort}
        self.assertEqual(difference(found, wanted, 1e-4), "")
        self.assertTrue(all(counts[name] for name in events), counts)
        return cached
