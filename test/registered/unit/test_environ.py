"""The registry of environment variables: reading, bounds, overrides, the page."""

import contextlib
import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

from sglang.srt import environ_names as upstream
from sglang.srt.environ import (
    EnvBool,
    EnvError,
    EnvInt,
    Envs,
    EnvStr,
    declared_variables,
    envs,
)
from sglang.srt.utils.common import get_bool_env_var, get_int_env_var
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]


class Sample:
    """Fields of every type, outside the real registry."""

    SGLANG_SAMPLE_BOOL = EnvBool(False, doc="A boolean.")
    SGLANG_SAMPLE_INT = EnvInt(4, minimum=1, unit="rows", doc="An integer.")
    SGLANG_SAMPLE_STR = EnvStr("auto", choices=("auto", "bf16"), doc="A choice.")
    SGLANG_SAMPLE_SECRET = EnvStr("", secret=True, choices=("", "hunter2"), doc="A secret.")


BOOL, INT, STR = Sample.SGLANG_SAMPLE_BOOL, Sample.SGLANG_SAMPLE_INT, Sample.SGLANG_SAMPLE_STR


class EnvironTestCase(CustomTestCase):
    def setUp(self):
        self.enterContext(mock.patch.dict(os.environ))
        for name in [n for n in os.environ if n.startswith(("SGLANG_", "SGL_"))]:
            del os.environ[name]
        BOOL._warned = False

    def assert_refused(self, field, text, *parts):
        os.environ[field.name] = text
        with self.assertRaises(EnvError) as caught:
            field.get()
        for part in (field.name, *parts):
            self.assertIn(part, str(caught.exception))


class TestFields(EnvironTestCase):
    def test_bool_words(self):
        for text in ("1", "true", "TRUE", "yes", "Y", "on", " 1 ", "\ton\n"):
            os.environ[BOOL.name] = text
            self.assertIs(BOOL.get(), True, text)
        with BOOL.override(True):
            for text in ("0", "False", "no", "n", "OFF", " 0"):
                os.environ[BOOL.name] = text
                self.assertIs(BOOL.get(), False, text)
        for text in ("2", "enable", "None", "tru", "-1"):
            self.assert_refused(BOOL, text, repr(text), "true or false")

    def test_read_at_each_call(self):
        self.assertEqual(INT.get(), 4)
        os.environ[INT.name] = "5"
        self.assertEqual(INT.get(), 5)
        os.environ[INT.name] = "6"
        self.assertEqual(INT.get(), 6)

    def test_empty_is_unset(self):
        for text in ("", "  "):
            os.environ[INT.name] = text
            self.assertEqual(INT.get(), 4)
            self.assertFalse(INT.is_set())

    def test_numbers(self):
        for text in ("0", "-1"):
            self.assert_refused(INT, text, "out of range", "of at least 1 (rows)", "default 4")
        for text in ("4.0", "1e0", "0x4", "1_0", "four", "+", "٣", "true", "None"):
            self.assert_refused(INT, text, "whole number")
        os.environ[INT.name] = " +7 "
        self.assertEqual(INT.get(), 7)

    def test_choices(self):
        self.assert_refused(STR, "fp8", "one of auto, bf16")

    def test_set_validates_before_writing(self):
        INT.set(8)
        for value in (0, "many", 2.5, True, ""):
            with self.assertRaises(EnvError):
                INT.set(value)
            self.assertEqual(os.environ[INT.name], "8")
        BOOL.set(True)
        self.assertEqual(os.environ[BOOL.name], "true")
        self.assertTrue(BOOL.is_set())
        BOOL.clear()
        self.assertFalse(BOOL.is_set())

    def test_set_none_then_outside_write(self):
        INT.set(3)
        INT.set(None)
        self.assertNotIn(INT.name, os.environ)
        self.assertEqual(INT.get(), 4)
        os.environ[INT.name] = "5"
        self.assertEqual(INT.get(), 5)

    def test_override_restores_on_error(self):
        os.environ[INT.name] = "2"
        with self.assertRaises(KeyError), INT.override(7):
            self.assertEqual(INT.get(), 7)
            with STR.override("bf16"), INT.override(None):
                self.assertEqual(INT.get(), 4)
            self.assertEqual(INT.get(), 7)
            raise KeyError
        self.assertEqual(os.environ[INT.name], "2")
        self.assertNotIn(STR.name, os.environ)
        with self.assertRaises(EnvError), INT.override(0):
            self.fail("the block must not run")
        self.assertEqual(os.environ[INT.name], "2")

    def test_override_in_exit_stack(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(INT.override("6"))
            self.assertEqual(INT.get(), 6)
        self.assertEqual(INT.get(), 4)

    def test_the_old_name_forwards_and_the_new_name_wins(self):
        os.environ["SGL_SAMPLE_BOOL"] = "1"
        with self.assertWarnsRegex(FutureWarning, f"SGL_SAMPLE_BOOL is an old name; set {BOOL.name}"):
            self.assertTrue(BOOL.get())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertTrue(BOOL.get(), "the second read is silent")
            os.environ[BOOL.name] = "0"
            self.assertFalse(BOOL.get())
        del os.environ[BOOL.name]
        with BOOL.override(None):
            self.assertFalse(BOOL.is_set())
        self.assertEqual(os.environ["SGL_SAMPLE_BOOL"], "1")
        BOOL.clear()
        self.assertNotIn("SGL_SAMPLE_BOOL", os.environ)
        os.environ["SGL_SAMPLE_BOOL"] = "perhaps"
        with self.assertRaisesRegex(EnvError, "SGL_SAMPLE_BOOL='perhaps'"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            BOOL.get()

    def test_secret_is_never_shown(self):
        os.environ["SGLANG_SAMPLE_SECRET"] = "tr0ub4dor"
        with self.assertRaises(EnvError) as caught:
            Sample.SGLANG_SAMPLE_SECRET.get()
        self.assertNotIn("tr0ub4dor", str(caught.exception))

    def test_a_field_needs_a_doc_and_one_name(self):
        with self.assertRaises(TypeError):
            EnvBool(False)
        with self.assertRaisesRegex(TypeError, "needs a doc"):
            EnvBool(False, doc=" ")
        with self.assertRaises(RuntimeError):
            type("Other", (), {"SGLANG_OTHER": BOOL})
        self.assertEqual(BOOL.name, "SGLANG_SAMPLE_BOOL")


class TestRegistry(EnvironTestCase):
    def test_truth_and_length_are_refused(self):
        for use in (bool, len):
            with self.assertRaisesRegex(RuntimeError, r"envs.SGLANG_USE_AITER.get\(\)"):
                use(envs.SGLANG_USE_AITER)

    def test_assignment_deletion_and_misspelling_are_refused(self):
        with self.assertRaisesRegex(AttributeError, r"SGLANG_USE_AITER.set\(value\)"):
            envs.SGLANG_USE_AITER = True
        with self.assertRaises(AttributeError):
            envs.SGLANG_NEW = True
        with self.assertRaisesRegex(AttributeError, r"clear\(\)"):
            del envs.SGLANG_USE_AITER
        with self.assertRaisesRegex(AttributeError, "did you mean SGLANG_USE_AITER?"):
            _ = envs.SGLANG_USE_AITR
        self.assertFalse(hasattr(envs, "SGLANG_NOTHING_OF_THE_KIND"))
        self.assertIs(envs.SGLANG_USE_AITER, Envs.SGLANG_USE_AITER)

    def test_required_variables(self):
        expected = {
            "SGLANG_USE_AITER": False,
            "SGLANG_ROCM_USE_MULTI_STREAM": False,
            "SGLANG_ALT_STREAM": False,
            "SGLANG_GDN_QKVZ_BA_ALT_STREAM": False,
            "SGLANG_QK_NORM_ALT_STREAM": False,
            "SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": 0,
            "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK": 4096,
            "SGLANG_MORI_MOE_MAX_INPUT_TOKENS": 0,
            "SGLANG_MORI_DISPATCH_DTYPE": "auto",
            "SGLANG_MORI_COMBINE_DTYPE": "auto",
            "SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD": 256,
            "SGLANG_MORI_QP_PER_TRANSFER": 4,
            "SGLANG_MORI_POST_BATCH_SIZE": -1,
            "SGLANG_MORI_NUM_WORKERS": 4,
            "SGLANG_OPT_USE_TRITON_FUSED_MHC": True,
            "SGLANG_HEALTH_CHECK_TIMEOUT": 20,
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": False,
        }
        self.assertEqual({name: getattr(envs, name).get() for name in expected}, expected)
        for name in ("SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS", "SGLANG_MORI_MOE_MAX_INPUT_TOKENS"):
            self.assert_refused(getattr(envs, name), "-1", "at least 0")

    def test_declarations_are_sound(self):
        for name, field in declared_variables().items():
            with self.subTest(name):
                self.assertEqual(field.name, name)
                self.assertIsNone(upstream.lookup(name), "declared here, so it leaves environ_names.json")
                self.assertTrue(field.doc.endswith("."))
                self.assertIn(field.platform, ("", "cpu", "cuda", "hip"))
                if field.default_text():
                    self.assertEqual(field.parse(field.default_text()), field.default)

    def test_upstream_names_are_sound(self):
        tables = (upstream.NUMERICS, upstream.REPLACED, upstream.REJECTED)
        names = [name for table in tables for name in table]
        self.assertEqual(len(names), len(set(names)), "a name has two classes")
        self.assertGreater(len(names), 60)
        self.assertEqual([n for n in names if not n.startswith(("SGLANG_", "SGL_")) or n.endswith("_")], [])
        self.assertEqual([n for n in upstream.DEFAULTS if n not in upstream.NUMERICS], [])
        for table in (upstream.REPLACED, upstream.REJECTED):
            self.assertEqual([n for n, advice in table.items() if not advice], [])

    def test_upstream_readers(self):
        os.environ["SGLANG_USE_AITER"] = "on"
        self.assertTrue(get_bool_env_var("SGLANG_USE_AITER"))
        self.assertTrue(get_bool_env_var("SGLANG_MOE_PADDING", "true"))
        self.assertEqual(get_int_env_var("SGLANG_MORI_NUM_WORKERS", 9), 9)
        os.environ["OTHER_SWITCH"] = "2"
        self.assertEqual(get_int_env_var("OTHER_SWITCH"), 2)
        os.environ["OTHER_NUMBER"] = "abc"
        with self.assertRaisesRegex(EnvError, "OTHER_NUMBER='abc'.* the default 56"):
            get_int_env_var("OTHER_NUMBER", 56)
        with self.assertRaisesRegex(EnvError, "OTHER_SWITCH='2'"):
            get_bool_env_var("OTHER_SWITCH")
        with self.assertRaisesRegex(EnvError, "not declared"):
            get_bool_env_var("SGLANG_SET_CPU_AFFINITY")
        with self.assertRaisesRegex(EnvError, "declared as bool"):
            get_int_env_var("SGLANG_USE_AITER")


class TestImport(EnvironTestCase):
    def test_import_is_light(self):
        """It loads only modules of the standard library, and few: not json, argparse or subprocess."""
        code = (
            "import sys; before = set(sys.modules); import sglang.srt.environ; new = set(sys.modules) - before;"
            "print(*sorted(m for m in new if m.split('.')[0] not in sys.stdlib_module_names));"
            "print(len(new), sorted(new & {'argparse', 'asyncio', 'json', 'socket', 'subprocess'}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.path_env(), capture_output=True, text=True, check=True
        )
        foreign, slow = done.stdout.splitlines()
        self.assertTrue(all(name.split(".")[0] == "sglang" for name in foreign.split()), foreign)
        self.assertLess(len(foreign.split()), 8, foreign)
        self.assertTrue(slow.endswith(" []"), slow)

    def path_env(self):
        return {**os.environ, "PYTHONPATH": str(ROOT / "python")}


class TestPage(CustomTestCase):
    PAGE = "docs/references/environment_variables.md"

    def test_page_is_what_the_registry_renders(self):
        command = [sys.executable, str(ROOT / "scripts/gen_docs.py"), "--check", self.PAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_one_row_a_variable(self):
        page = (ROOT / self.PAGE).read_text().splitlines()
        for name in [*declared_variables(), *(row.name for row in upstream.FOREIGN)]:
            self.assertEqual(sum(line.startswith(f"| `{name}` |") for line in page), 1, name)
        rows = [line for line in page if line.startswith("| `")]
        self.assertEqual({line.count(" | ") for line in rows}, {2})

    def test_generator_check(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "scripts").mkdir()
            for name in ("gen_docs.py", "environment_variables_page.py", "environment_variables_page.txt"):
                (root / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
            (root / "python").symlink_to(ROOT / "python")

            def generate(*args):
                command = [sys.executable, str(root / "scripts/gen_docs.py"), *args, self.PAGE]
                return subprocess.run(command, capture_output=True, text=True)

            missing = generate("--check")
            self.assertEqual((missing.returncode, (root / self.PAGE).exists()), (1, False))
            self.assertEqual(generate().returncode, 0)
            self.assertEqual(generate("--check").returncode, 0)
            page = root / self.PAGE
            page.write_text(page.read_text().replace("`4096`", "`4095`"))
            stale = generate("--check")
            self.assertEqual(stale.returncode, 1)
            self.assertIn("`4095`", stale.stdout)


if __name__ == "__main__":
    unittest.main()
