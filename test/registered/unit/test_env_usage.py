"""How the tree uses environment variables: through the registry, by declared names, and every name is used."""

import ast
import re
import unittest
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sglang.srt import environ_names as upstream
from sglang.srt.environ import declared_variables
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = ROOT / "python"
NAME = re.compile(r"\bSGL(?:ANG)?_[A-Z0-9][A-Z0-9_]*[A-Z0-9]\b")
REGISTRY = re.compile(r"srt/environ(_\w+)?\.py$")
# Where a reader makes a variable act. Tests and their harness are no product, and a table of what acts reads nothing.
PRODUCT_HOMES = ("python/sglang/srt/", "python/sglang/kernels/", "scripts/")
TABLE = "python/sglang/srt/arg_groups/effect.py"
HARNESS = "python/sglang/test/"
# What the test harness does otherwise on a CI machine, as the docs of these variables say.
HARNESS_VARIABLES = ("SGLANG_IS_IN_CI", "SGLANG_IS_IN_CI_AMD")
SELF_TESTS = ("test_environ.py", "test_environ_check.py", "test_env_usage.py")


@cache
def sources(*folders: str) -> dict[str, str]:
    """Text of the Python and shell files under folders of the tree, the registry and its tests left out."""
    found = {}
    for folder in folders:
        base = ROOT / folder
        for path in [base] if base.is_file() else sorted(base.rglob("*")):
            if path.is_file() and (path.suffix in (".py", ".sh") or path.parent.name == ".ci"):
                name = path.relative_to(ROOT).as_posix()
                if not REGISTRY.search(name) and path.name not in SELF_TESTS:
                    found[name] = path.read_text(encoding="utf-8")
    return found


def direct_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each access to os.environ or os.getenv with a SGLANG_ or SGL_ literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            target, keys = node.func, node.args[:1]
        elif isinstance(node, ast.Subscript):
            target, keys = node.value, [node.slice]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            target, keys = node.comparators[0], [node.left]
        else:
            continue
        if re.search(r"\b(environ|getenv|putenv|unsetenv)\b", ast.unparse(target)):
            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and NAME.fullmatch(key.value):
                    yield node.lineno, key.value


class TestUsage(CustomTestCase):
    def test_every_name_in_the_product_is_known(self):
        declared = declared_variables()
        unknown = [
            f"{path}: {name}"
            for path, text in sources("python").items()
            for name in sorted(set(NAME.findall(text)))
            if upstream.canonical_name(name) not in declared and upstream.lookup(name) is None
        ]
        self.assertEqual(unknown, [], "declare these in srt/environ.py")

    def test_only_the_registry_reads_the_environment(self):
        found = [
            f"{path}:{line}: {name}"
            for path, text in sources("python").items()
            if path.endswith(".py")
            for line, name in direct_reads(ast.parse(text))
        ]
        self.assertEqual(found, [], "use envs.NAME.get(), .set(), .override() or .is_set()")

    def test_the_reader_check_sees_each_form(self):
        code = (
            "import os\nfrom os import environ, getenv\n"
            "os.environ['SGLANG_A1']\nos.environ.get('SGLANG_A2', 1)\nos.getenv('SGLANG_A3')\ngetenv('SGL_A4')\n"
            "'SGLANG_A5' in os.environ\nenviron.pop('SGLANG_A6')\nos.environ['SGLANG_A7'] = '1'\n"
            "os.environ.setdefault('SGLANG_A8', '1')\nos.environ['HOME']\nenvs.SGLANG_A9.get()\n"
        )
        self.assertEqual(sorted(name[-2:] for _, name in direct_reads(ast.parse(code))), [f"A{i}" for i in range(1, 9)])

    def test_every_effective_variable_is_read(self):
        unread = []
        for name, field in declared_variables().items():
            # A variable of the test harness is read by the harness; by a test alone counts for none.
            homes = PRODUCT_HOMES + ((HARNESS,) if name in HARNESS_VARIABLES else ())
            if not field.pending and not [
                path for path in self.readers(name) if path.startswith(homes) and path != TABLE
            ]:
                unread.append(name)
        self.assertEqual(unread, [], 'nothing reads these; read them, or declare pending="the capability"')

    def test_the_harness_keeps_its_variables_to_itself(self):
        for name in HARNESS_VARIABLES:
            self.assertEqual({path.startswith(HARNESS) for path in self.readers(name)}, {True}, name)

    def test_no_pending_variable_is_read_by_the_product(self):
        wrong = [
            f"{name}: {', '.join(readers)}"
            for name, field in declared_variables().items()
            if field.pending
            and (readers := [path for path in self.readers(name) if path.startswith("python/sglang/srt")])
        ]
        self.assertEqual(wrong, [], "these are read now: drop pending= from their declaration")

    def test_readers_of_the_product_are_told_from_tests(self):
        self.assertIn("python/sglang/srt/platforms/rocm.py", self.readers("SGLANG_FAKE_ROCM_ARCH"))
        found = [path.startswith(PRODUCT_HOMES) for path in ("test/a.py", "python/sglang/test/a.py", "scripts/a.sh")]
        self.assertEqual(found, [False, False, True])

    def readers(self, name: str) -> list[str]:
        """Files that read the variable: through envs, through upstream's helpers, or by name in a shell script."""
        python = re.compile(rf"\benvs\.{name}\b|get_(bool|int)_env_var\(\s*[\"']{name}[\"']")
        shell = re.compile(rf"\$\{{?{name}\b")
        return [
            path
            for path, text in sources("python", "scripts", "test", ".ci").items()
            if name in text and (python if path.endswith(".py") else shell).search(text)
        ]


if __name__ == "__main__":
    unittest.main()
