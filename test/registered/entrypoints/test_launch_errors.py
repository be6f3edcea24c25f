"""Every way to start the server wrongly: one clear reason, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang.embedded_models import default_model_path
from sglang.srt.utils.common import get_free_port
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")


def launch(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(get_free_port()), *arguments]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=120)


class TestLaunchErrors(CustomTestCase):
    def setUp(self) -> None:
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def model_copy(self) -> Path:
        target = Path(tempfile.mkdtemp(dir=self.folder)) / "model"
        shutil.copytree(default_model_path(), target)
        return target

    def refused(self, result: subprocess.CompletedProcess[str], *words: str) -> None:
        self.assertEqual(result.returncode, 2, result.stderr[-3000:])
        self.assertNotIn("Traceback", result.stderr)
        for word in words:
            self.assertIn(word, result.stderr)

    def test_settings(self) -> None:
        cases: tuple[tuple[tuple[str, ...], dict[str, str], tuple[str, ...]], ...] = (
            (("--model-path", "/no/such/model"), {}, ("/no/such/model", "hub")),
            ((), {"SGLANG_USE_AITR": "1"}, ("SGLANG_USE_AITR", "SGLANG_USE_AITER")),
            ((), {"SGLANG_HEALTH_CHECK_TIMEOUT": "soon"}, ("SGLANG_HEALTH_CHECK_TIMEOUT", "soon")),
            (("--chunked-prefil-sise", "8"), {}, ("--chunked-prefill-size",)),
            # Flags that contradict come together with other errors.
            (
                ("--disable-shared-experts-fusion", "--enforce-shared-experts-fusion", "--page-size", "0"),
                {},
                ("--enforce-shared-experts-fusion", "--page-size"),
            ),
            ((), {"SGLANG_KERNELS": "sampling.greedy=tritn"}, ("sampling.greedy", "tritn")),
            ((), {"SGLANG_PLATFORM": "rocm"}, ("SGLANG_PLATFORM=rocm", "HIP")),
            (("--max-total-tokens", "100000000000"), {}, ("100000000000",)),
        )
        # A launch is mostly imports, on one core.
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(lambda case: launch(*case[0], env=case[1]), cases)
            for (flags, variables, words), result in zip(cases, results, strict=True):
                with self.subTest(flags=flags, variables=variables):
                    self.refused(result, *words)

    def test_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            self.refused(launch("--port", port), port, "in use")

    def test_config_without_a_needed_key(self) -> None:
        model = self.model_copy()
        config = json.loads((model / "config.json").read_text())
        del config["kv_lora_rank"], config["hidden_size"]
        (model / "config.json").write_text(json.dumps(config))
        self.refused(launch("--model-path", str(model)), "kv_lora_rank", "hidden_size", "config.json")

    def test_a_folder_without_tokenizer(self) -> None:
        model = self.model_copy()
        (model / "tokenizer.json").unlink()
        self.refused(launch("--model-path", str(model)), "tokenizer.json", "--tokenizer-path")

    def test_upstream_beside_us(self) -> None:
        info = Path(self.folder, "sglang-0.5.12.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.12\n")
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), self.folder])
        self.refused(launch(env={"PYTHONPATH": path}), "'sglang' 0.5.12", "pip uninstall sglang")

    def test_checkpoints_that_do_not_fit(self) -> None:
        for damage, words in (
            (self.drop_and_reshape, ("model.norm.weight", "missing", "lm_head.weight", "shape")),
            (self.truncate_file, ("model.safetensors",)),
        ):
            with self.subTest(damage=damage.__name__):
                model = self.model_copy()
                damage(model / "model.safetensors")
                self.refused(launch("--model-path", str(model)), *words)

    def drop_and_reshape(self, file: Path) -> None:
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(3, 5)
        save_file(tensors, file, {"format": "pt"})

    def truncate_file(self, file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])


if __name__ == "__main__":
    unittest.main()
