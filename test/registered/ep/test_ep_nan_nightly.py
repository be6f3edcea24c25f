"""Over several ranks a request whose rows are NaN ends, and the other requests get the tokens of sound weights."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=300, suite="nightly-cpu", nightly=True)

# The token whose row of the embedding is NaN; no other request has it.
BAD = 3
PROMPTS = [[20 + (7 * i + 5 * number) % 200 for i in range(9 + 6 * number)] for number in range(6)]
SPOILED = [[*PROMPTS[number][:at], BAD, *PROMPTS[number][at:]] for number, at in ((1, 0), (3, 11), (5, 39))]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True, "logit_bias": {str(BAD): -1e4}}

GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MORI = {"moe_a2a_backend": "mori"}
MODES: dict[str, dict[str, Any]] = {
    "all-reduce": {"ep_size": 2},
    "groups, gathered": {"ep_size": 2, **GROUPS},
    "mori normal": MORI,
    "groups, mori low latency": {"deepep_mode": "low_latency", **MORI, **GROUPS},
}


class TestNan(CustomTestCase):
    def setUp(self) -> None:
        # Ranks share the cores of the machine.
        self.enterContext(mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}))

    def spoiled(self, model: str) -> str:
        """A copy of an embedded model whose embedding of BAD is NaN."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()), model)
        shutil.copytree(EMBEDDED_MODELS[model], folder)
        tensors = load_file(folder / "model.safetensors")
        (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[name][BAD] = torch.nan
        save_file(tensors, folder / "model.safetensors")
        return str(folder)

    def answers(self, folder: str, prompts: list[list[int]], **settings: Any) -> list[Any]:
        """What each of ``prompts``, asked at once, gets: a result or an error."""
        with Engine(model_path=folder, random_seed=1, chunked_prefill_size=16, **settings) as engine:

            async def ask() -> list[Any]:
                asked = (engine.async_generate(None, GREEDY, ids) for ids in prompts)
                return await asyncio.gather(*asked, return_exceptions=True)

            return engine._run(ask())

    def test_only_the_spoiled_requests_end(self) -> None:
        for model in ("deepseek-v3-tiny", "qwen3.5-moe-tiny"):
            wanted = [result["output_ids"] for result in self.answers(str(EMBEDDED_MODELS[model]), PROMPTS)]
            folder = self.spoiled(model)
            for mode, settings in MODES.items():
                with self.subTest(model=model, mode=mode):
                    found = self.answers(folder, [*SPOILED, *PROMPTS, *SPOILED], tp_size=2, **settings)
                    self.assertEqual([result["output_ids"] for result in found[3:9]], wanted)
                    for error in found[:3] + found[9:]:
                        self.assertIn("not numbers", str(error))


if __name__ == "__main__":
    unittest.main()
