"""The plan of a launch: mistakes that are reported before torch is loaded, models by name, what is logged."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt import server_args
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate, plan_launch
from sglang.srt.entrypoints.launch import check_plan
from sglang.srt.environ import envs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.utils.common import get_free_port
from sglang.srt.utils.network import PortError, bind
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.version import __version__

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

CPU = CpuPlatform()
PROGRAM = """
import atexit, sys
slow = {"torch", "numpy", "starlette", "uvicorn"}
atexit.register(lambda: print("loaded", sorted(slow & set(sys.modules))))
"""


def program(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(server_args.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": path, **environ}
    return subprocess.run([sys.executable, "-c", PROGRAM + code], env=env, capture_output=True, text=True, timeout=60)


class TestEarlyErrors(CustomTestCase):
    def check(self, words: list[str], status: int, beginning: str, **environ: str) -> None:
        for command, argv in (("launch_server", words), ("cli.main", ["serve", *words])):
            with self.subTest(command, words=words):
                done = program(
                    f"from sglang.{command} import main; sys.argv[1:] = {argv!r}; sys.exit(main())", **environ
                )
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertTrue((done.stderr or done.stdout).startswith(beginning), done.stderr + done.stdout)
                self.assertTrue(done.stdout.endswith("loaded []\n"), done.stdout)

    def test_flags(self) -> None:
        self.check(["--prot", "1"], 2, "error: unknown flag --prot: did you mean --port?\n")

    def test_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            self.check(["--port", port], 2, f"error: Cannot listen on 127.0.0.1 port {port}")
            # A port that stands next to a wrong flag may be a mistake too.
            self.check(["--port", port, "--tp", "0"], 2, "error: --tp-size must be at least 1, got 0\n")

    def test_host(self) -> None:
        """No name at all, and an address that is kept for documentation (RFC 5737)."""
        for host in ("256.1.1.1", "192.0.2.1"):
            with self.assertRaisesRegex(PortError, f"^Cannot listen on {host} port 1025: .*--host must be a name or"):
                bind(host, 1025)

    def test_variables(self) -> None:
        self.check([], 2, "error: unknown environment variable SGLANG_USE_AITR", SGLANG_USE_AITR="1")

    def test_where_torch_cannot_be_imported(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "torch.py").write_text("raise RuntimeError('torch was imported')")
            path = os.pathsep.join((folder, str(Path(server_args.__file__).parents[2])))
            for words, environ, said in (
                (["--no-such-flag"], {}, "error: unknown flag --no-such-flag: --help lists all flags\n"),
                (["--tp", "0"], {}, "error: --tp-size must be at least 1, got 0\n"),
                ([], {"SGLANG_USE_AITR": "1"}, "error: unknown environment variable SGLANG_USE_AITR; did you mean"),
                (["--model-path", "/no/model"], {}, "error: model: unknown model path '/no/model': it is not a folder"),
                (["--model-path", "no/model"], {}, "error: model: unknown model path 'no/model': it is not a folder"),
                (["--model-path", "/" + "m" * 300], {}, "error: model: unknown model path '/mmm"),
                (["--model-path", folder], {}, f"error: model: model path '{folder}' has no config.json"),
                # With nothing wrong the launch continues, and it is the import that fails.
                (["--skip-server-warmup"], {}, "RuntimeError: torch was imported\n"),
            ):
                command = [sys.executable, "-m", "sglang.launch_server", "--port", str(get_free_port()), *words]
                env = {**os.environ, "PYTHONPATH": path, **environ}
                done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
                refused = said.startswith("error")
                self.assertEqual(done.returncode, 2 if refused else 1)
                self.assertTrue(done.stderr.startswith(said) if refused else done.stderr.endswith(said), done.stderr)

    def test_help_and_version(self) -> None:
        self.check(["--help"], 0, "usage: sglang.launch_server")
        self.check(["--vers"], 0, f"sglang-amd {__version__}")

    def test_closed_standard_streams(self) -> None:
        """Of a caller that gives none, as some supervisors do: children have three, and sockets other numbers."""
        look = "import os; raise SystemExit({os.readlink(f'/proc/self/fd/{i}') for i in range(3)} != {os.devnull})"
        code = (
            "import subprocess, sys; from sglang import launch_server\n"
            f'look = [sys.executable, "-c", {look!r}]\n'
            "launch_server.launch_server = lambda _: 40 + subprocess.run(look).returncode\n"
            f"launch_server.serve(['--port', '{get_free_port()}'])"
        )
        command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
        self.assertEqual(subprocess.run(command, timeout=60).returncode, 40)

    def test_a_dry_run_says_all_at_once(self) -> None:
        code = "from sglang.srt.arg_groups.parse import read; print(read(['--dry-run', '--tpp']).start_errors())"
        done = program(code)
        self.assertEqual(done.stdout, "[]\nloaded []\n")

    def test_a_dry_run_applies_forced_kernels(self) -> None:
        for text, said in (
            ("sampling.greedy", "SGLANG_KERNELS takes op=implementation pairs"),
            ("sampling.gready=torch", "Did you mean 'sampling.greedy'?"),
            ("sampling.greedy=triton", "which cannot run: not for cpu"),
        ):
            # In addition to another mistake.
            args = read(["--dry-run", "--tp", "3"])
            with self.subTest(text), envs.SGLANG_KERNELS.override(text), fresh_decisions(), override_platform(CPU):
                errors = plan_launch(args).errors
                self.assertEqual(len(errors), 2, errors)
                self.assertIn(said, " ".join(errors))
        with envs.SGLANG_KERNELS.override("sampling.greedy=torch"), fresh_decisions(), override_platform(CPU):
            self.assertEqual(plan_launch(read(["--dry-run"])).errors, [])


class TestOtherCommands(CustomTestCase):
    def test_what_is_wrong_with_a_command_line_is_said_before_torch_is_loaded(self) -> None:
        code = (
            "import runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
            "finally: print('torch' in sys.modules)"
        )
        for module, flags, said in (
            ("sglang.plan", ["--tp", "0", "--nope"], "unknown flag --nope"),
            ("sglang.plan", ["--platform", "abacus"], "abacus"),
            ("sglang.bench_one_batch", ["--nope"], "--nope"),
            ("sglang.bench_one_batch", ["--batch-size", "0"], "--batch-size must be at least 1"),
            ("sglang.kernels", ["--nope"], "--nope"),
            *(
                (module, ["--help"], "usage: ")
                for module in ("sglang.plan", "sglang.bench_one_batch", "sglang.kernels")
            ),
        ):
            command = [sys.executable, "-c", code, module, *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            self.assertIn(said, done.stdout + done.stderr)
            self.assertEqual(done.stdout.splitlines()[-1], "False", (module, flags))
            self.assertEqual(done.returncode, 0 if flags == ["--help"] else 2)


class TestEmbeddedModels(CustomTestCase):
    def test_names(self) -> None:
        for name in EMBEDDED_MODELS:
            plan = evaluate(read(["--model-path", name]), CPU, {})
            self.assertEqual(plan.errors, [])
            self.assertEqual(plan.args.model_path, plan.args.tokenizer_path)
            self.assertEqual(Path(plan.args.model_path), EMBEDDED_MODELS[name])
            self.assertEqual(plan.args.served_model_name, name)
        self.assertEqual(evaluate(read([]), CPU, {}).args.served_model_name, "deepseek-v3-tiny")
        given = evaluate(read(["--model-path", "deepseek-v2-tiny", "--served-model-name", "mine"]), CPU, {})
        self.assertEqual(given.args.served_model_name, "mine")
        text = next(spec.arg.help for spec in server_args.specs() if spec.name == "model_path")
        self.assertIn(", ".join(EMBEDDED_MODELS), text)

    def test_overrides_that_cannot_be_read_hide_nothing_else(self) -> None:
        for text, said in (("{", "not valid JSON"), ("[1]", "must be a JSON object")):
            words = ["--model-path", "deepseek-v2-tiny", "--json-model-override-args", text, "--tp", "3"]
            overrides, parts = evaluate(read(words), CPU, {}).errors
            self.assertIn(said, overrides)
            self.assertIn("does not divide", parts)  # of the model as it is on disk

    def test_a_folder_of_that_name_comes_first(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.addCleanup(os.chdir, os.getcwd())
            os.chdir(folder)
            Path("deepseek-v2-tiny").mkdir()
            plan = evaluate(read(["--model-path", "deepseek-v2-tiny"]), CPU, {})
        self.assertEqual(plan.args.model_path, "deepseek-v2-tiny")
        self.assertIn("config.json", plan.errors[0])


class TestLog(CustomTestCase):
    def lines(self, *words: str) -> list[str]:
        with self.assertLogs("sglang.srt.entrypoints.launch", "INFO") as logs:
            check_plan(evaluate(read(words), CPU, {}))
        return [record.getMessage() for record in logs.records]

    def test_one_line_for_what_was_chosen_and_one_for_each_given_setting_that_changed(self) -> None:
        (line,) = self.lines("--random-seed", "7")
        for part in ("serving", "deepseek-v3-tiny on cpu: float32", "4096 tokens", "random seed 7", "--dry-run shows"):
            self.assertIn(part, line)
        changed, _ = self.lines("--schedule-policy", "lpm", "--disable-radix-cache")
        self.assertTrue(changed.startswith("schedule_policy: lpm -> fcfs ("), changed)


class TestModelIds(CustomTestCase):
    """Ids in a cache that holds one model, under the branch main and one more."""

    def setUp(self) -> None:
        cache = Path(self.enterContext(tempfile.TemporaryDirectory()))
        model = cache / "models--org--tiny-1.5"
        self.folder = model / "snapshots" / ("a" * 40)
        self.folder.parent.mkdir(parents=True)
        shutil.copytree(EMBEDDED_MODELS["deepseek-v3-tiny"], self.folder)
        (model / "refs").mkdir()
        for branch in ("main", "other"):
            (model / "refs" / branch).write_text("a" * 40)
        self.enterContext(mock.patch("huggingface_hub.constants.HF_HUB_CACHE", str(cache)))

    def test_an_id_that_the_cache_has(self) -> None:
        for more in ([], ["--revision", "other"], ["--revision", "a" * 40]):
            plan = evaluate(read(["--model-path", "org/tiny-1.5", *more]), CPU, {})
            self.assertEqual(plan.errors, [])
            args = plan.args
            self.assertEqual((args.model_path, args.served_model_name), (str(self.folder), "org/tiny-1.5"))
            self.assertEqual(args.tokenizer_path, str(self.folder))
        given = evaluate(read(["--model-path", "org/tiny-1.5", "--served-model-name", "mine"]), CPU, {})
        self.assertEqual(given.args.served_model_name, "mine")
        other = evaluate(read(["--tokenizer-path", "org/tiny-1.5"]), CPU, {})
        self.assertEqual((other.errors, other.args.tokenizer_path), ([], str(self.folder)))

    def test_an_id_that_it_has_not(self) -> None:
        for words, line in (
            (["--model-path", "org/other"], "`hf download org/other`"),
            (["--model-path", "org/tiny-1.5", "--revision", "v2"], "`hf download org/tiny-1.5 --revision v2`"),
            (["--tokenizer-path", "org/other"], "`hf download org/other`"),
            (["--speculative-draft-model-path", "org/d"], "`hf download org/d`"),
        ):
            errors = evaluate(read(words), CPU, {}).errors
            self.assertTrue(any(line in error for error in errors), errors)
        for path in ("/org/other", "./org/other", "org/other/more", "../other"):
            (error, *_) = evaluate(read(["--model-path", path]), CPU, {}).errors
            self.assertNotIn("hf download", error)

    def test_a_folder_of_the_same_name_goes_before(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        with tempfile.TemporaryDirectory() as here:
            os.chdir(here)
            shutil.copytree(EMBEDDED_MODELS["deepseek-v3-tiny"], "org/tiny-1.5")
            plan = evaluate(read(["--model-path", "org/tiny-1.5", "--revision", "main"]), CPU, {})
            self.assertEqual((plan.errors, plan.args.model_path), ([], "org/tiny-1.5"))
            self.assertIn("--revision has no effect", " ".join(plan.warnings))


if __name__ == "__main__":
    unittest.main()
