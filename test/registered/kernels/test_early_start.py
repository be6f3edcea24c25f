"""Kernels that may begin before the one ahead of them has ended: each waits before it reads or writes anything."""

import ast
import re
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.kernels import launch
from sglang.kernels.ops import norm
from sglang.kernels.ops.moe.fused_experts import order_pairs, weighted_sum
from sglang.kernels.ops.norm.rmsnorm import rms_norm_triton
from sglang.kernels.ops.quant.group_fp8 import block_product
from sglang.test.amd_gate.driver import Launch, compile_only
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

OPS = Path(norm.__file__).parents[1]
TOUCHES_MEMORY = re.compile(r"\b(ld|st|atom|red|cp)\.\S*(global|async|bulk)")


def is_call(node: ast.AST, name: str) -> bool:
    """Whether a statement or expression is ``name(...)``."""
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


# What a kernel may read before it waits: weights of a layer.
BEFORE_THE_WAIT = {
    "few_tokens_logits_kernel": {"w_ptr"},
    "norm_logits_kernel": {"gate_ptr"},
    "norm_product_kernel": {"w_ptr"},
}


def pointers(statement: ast.AST, known: dict[str, set[str]]) -> set[str]:
    """Pointer arguments that a statement uses, also through variables that ``known`` says are made of such."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return {name for name in names if name.endswith("_ptr")}.union(*(known.get(name, set()) for name in names))


def kernels_that_wait(tree: ast.Module) -> dict[str, set[str]]:
    """Functions of a file that wait, as statements of their own, and pointers by which each has read before; raises
    AssertionError for one that does more than that."""
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        waits = [number for number, one in enumerate(node.body) if is_call(one, "wait_for_kernel_ahead")]
        if not waits:
            continue
        made_of: dict[str, set[str]] = {}
        read: set[str] = set()
        for statement in node.body[: waits[0]]:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # the docstring
            assert isinstance(statement, ast.Assign), f"{node.name}: {ast.unparse(statement)}"
            for call in (one for one in ast.walk(statement) if isinstance(one, ast.Call)):
                called = ast.unparse(call.func)
                if called == "tl.load":
                    read |= pointers(call.args[0], made_of)
                else:
                    allowed = called in ("tl.arange", "tl.program_id", "tl.minimum") or called.endswith(".to")
                    assert allowed, f"{node.name}: {called} before the wait"
            for target in statement.targets:
                made_of[ast.unparse(target)] = pointers(statement.value, made_of)
        found[node.name] = read
    return found


def launches(tree: ast.Module) -> dict[str, bool]:
    """Kernels that a file launches, ``kernel[grid](...)``, and whether each launch of one is with ``early_start()``."""
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            kernel = ast.unparse(node.func.value).rpartition(".")[2]
            if kernel.endswith("_kernel"):
                early = any(word.arg is None and is_call(word.value, "early_start") for word in node.keywords)
                found[kernel] = early and found.get(kernel, True)
    return found


class TestEarlyStart(CustomTestCase):
    def test_who_starts_early_waits_first(self):
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(OPS.rglob("*.py"))]
        read = {name: pointers for tree in trees for name, pointers in kernels_that_wait(tree).items()}
        self.assertEqual({name: pointers for name, pointers in read.items() if pointers}, BEFORE_THE_WAIT)
        waiting = set(read)
        early = {kernel for tree in trees for kernel, is_early in launches(tree).items() if is_early}
        self.assertGreater(len(early), 20)
        self.assertEqual(early - waiting, set(), "launched early, but does not wait first")
        self.assertEqual(waiting - early, set(), "waits, but is not always launched early")

    def test_only_gpus_that_know_it_are_asked(self):
        asked = {}
        for kind, arch in (("cuda", "sm_80"), ("cuda", "sm_90"), ("cuda", "sm_100"), ("hip", "gfx942"), ("cpu", "cpu")):
            with mock.patch.object(launch, "current_platform", SimpleNamespace(kind=kind, arch=arch)):
                asked[arch] = launch.early_start()
        self.assertEqual([arch for arch, options in asked.items() if options], ["sm_90", "sm_100"])

    def compiled(self, arch: str, kind: str) -> list[Launch]:
        """A norm, both launches of the ordering, a product of one 8-bit row and a weighted sum."""

        def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        platform = SimpleNamespace(kind=kind, arch=arch)
        with mock.patch.object(launch, "current_platform", platform), compile_only(arch) as driver:
            rms_norm_triton(empty(3, 2048), empty(2048), 1e-6)
            ids = empty(3, 8, dtype=torch.int32)
            order_pairs(ids, 16, 16)
            eight_bits = torch.float8_e4m3fn if kind == "cuda" else torch.float8_e4m3fnuz
            q, w = empty(1, 2048, dtype=eight_bits), empty(256, 2048, dtype=eight_bits)
            scales = empty(1, 16, dtype=torch.float32), empty(2, 16, dtype=torch.float32)
            block_product(q, scales[0], w, scales[1], torch.bfloat16)
            weighted_sum(empty(24, 2048), empty(3, 8, dtype=torch.float32), ids)
            return list(driver.launches)

    def test_the_wait_stands_before_all_memory(self):
        found = self.compiled("sm_90", "cuda")
        self.assertEqual(len(found), 5)
        for one in found:
            with self.subTest(kernel=one.kernel):
                self.assertTrue(one.metadata["launch_pdl"])
                before, wait, after = one.assembly.partition("griddepcontrol.wait")
                self.assertTrue(wait)
                if one.kernel in BEFORE_THE_WAIT:
                    before = before.replace("ld.global", "")
                self.assertNotRegex(before, TOUCHES_MEMORY)
                self.assertRegex(after, TOUCHES_MEMORY)
                self.assertIn("griddepcontrol.launch_dependents", after)

    def test_other_gpus_run_no_more_instructions_than_before(self):
        for one in self.compiled("gfx942", "hip"):
            self.assertNotIn("griddep", one.assembly)


if __name__ == "__main__":
    unittest.main()
