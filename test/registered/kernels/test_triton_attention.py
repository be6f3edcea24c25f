"""Triton attention split and merged in Triton's interpreter; truths of the cache and state ops.

test_triton_interpreted runs the same bodies on every case.
"""

import math
import os
import subprocess
import sys
import unittest
from unittest import mock

import torch

import sglang.kernels.ops.attention.attention_state as attention_state
import sglang.kernels.ops.attention.kv_cache as kv_cache
from sglang.kernels.ops.attention import decode_attention, extend_attention, extend_ragged, launchers, tiles
from sglang.kernels.ops.attention.launchers import launch_decode, launch_extend
from sglang.kernels.ops.attention.tiles import RowShape, Tile, split_count
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.op_cases.attention import indptr
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=12, suite="stage-b-test-cpu")

# Triton decides at its import whether bodies are compiled or interpreted, so they are interpreted in another process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_of(op):
    return next(impl for impl in op.impls if impl.name == "triton")


def clone(args):
    return tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def holds(kept, row):
    """Whether ``kept`` is ``row`` rounded to its dtype, except ties."""
    if kept.dtype == row.dtype:
        return torch.equal(kept, row)
    codes = torch.arange(256, dtype=torch.uint8).view(kept.dtype).double()
    best = (row.double().unsqueeze(-1) - codes[codes.isfinite()]).abs().amin(-1)
    return torch.equal((row.double() - kept.double()).abs(), best)


def table_of(lens, capacity, total, generator):
    """A request table with scrambled slots 1 .. total-2; unused entries name the last slot, which callers poison."""
    table = torch.full((len(lens) + 1, capacity), total - 1, dtype=torch.int32)
    order = torch.randperm(total - 2, generator=generator).int() + 1
    start = 0
    for row, length in enumerate(lens):
        table[row + 1, :length] = order[start : start + length]
        start += length
    return table, torch.arange(len(lens)) + 1, torch.tensor(lens)


class TestInterpreter(CustomTestCase):
    @unittest.skipIf(INTERPRETED, "this is the other process")
    def test_bodies(self):
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, __file__, "TestInterpretedBodies"]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIn("Ran 4 tests", result.stderr)
        self.assertNotIn("skipped", result.stderr)


@unittest.skipUnless(INTERPRETED, "run by TestInterpreter in a process of its own")
class TestInterpretedBodies(CustomTestCase):
    def test_split_counts_agree_in_decode(self):
        generator = torch.Generator().manual_seed(0)
        lens = [1, 0, 70, 33]
        table = table_of(lens, 90, sum(lens) + 2, generator)
        latent = torch.randn(sum(lens) + 2, 1, 40, generator=generator)
        keys = torch.randn(2, sum(lens) + 2, 2, 24, generator=generator)
        latent[-1] = keys[:, -1] = float("nan")
        for heads in (5, 70):
            q = torch.randn(len(lens), heads, 40, generator=generator)
            shape = RowShape.of(40, 32, value_is_key=True)
            wanted = decode_attention.decode_attention_torch(q, latent, None, *table, 0.2, 32)
            for splits, one_head_programs in ((1, 1), (2, 0), (5, 0), (5, 9999)):
                with mock.patch.object(launchers, "MERGE_PROGRAMS", one_head_programs):
                    close(launch_decode(q, latent, latent, *table, 0.2, shape, Tile(16, 16, 4, 1), splits), wanted)
        q = torch.randn(len(lens), 6, 24, generator=generator)
        wanted = decode_attention.decode_attention_torch(q, keys[0], keys[1], *table, 0.3)
        gate = torch.randn(len(lens), 6, 2, 24, generator=generator)[:, :, 1]
        gate[:2, 1, 5] = torch.nan  # of a request without tokens too
        for splits in (1, 3, 8):
            args = (q, keys[0], keys[1], *table, 0.3, RowShape.of(24, 24), Tile(16, 16, 4, 1), splits)
            close(launch_decode(*args), wanted)
            close(launch_decode(*args, gate=gate), wanted * gate.sigmoid())
        for rows, repeat in ((3, 1), (8, 1), (4, 2)):
            wrong = torch.randn(rows, 6, 24, generator=generator)
            with self.assertRaisesRegex(ValueError, f"{rows} queries are not {repeat} of each of 4 requests"):
                launch_decode(wrong, keys[0], keys[1], *table, 0.3, RowShape.of(24, 24), repeat=repeat)

    def test_split_counts_agree_in_extend(self):
        generator = torch.Generator().manual_seed(0)
        q_lens, kv_lens = [3, 1, 0, 20], [40, 70, 5, 20]
        bounds = [indptr(lens) for lens in (q_lens, kv_lens)]
        slots = torch.randperm(sum(kv_lens) + 3, generator=generator)[: sum(kv_lens)]
        q = torch.randn(sum(q_lens), 6, 40, generator=generator)
        latent = torch.randn(sum(kv_lens) + 3, 1, 40, generator=generator)
        shape = RowShape.of(40, 32, value_is_key=True)
        wanted = extend_attention.extend_attention_torch(q, latent, None, slots, *bounds, 0.2, 32)
        for rows, splits in ((16, 1), (16, 2), (32, 5)):
            tile = Tile(rows, 16, 4, 1)
            close(launch_extend(q, latent, latent, slots, *bounds, 0.2, shape, tile=tile, splits=splits)[0], wanted)

    def test_a_part_of_nan_is_a_part_and_not_nothing(self):
        """The first key of one request is NaN: so is all of it, also where others read its other keys."""
        generator = torch.Generator().manual_seed(0)
        q_lens, kv_lens = [3, 1, 20], [40, 70, 20]
        bounds = [indptr(lens) for lens in (q_lens, kv_lens)]
        slots, table = torch.arange(sum(kv_lens)), table_of(kv_lens, 90, sum(kv_lens) + 2, generator)
        q = torch.randn(sum(q_lens), 6, 40, generator=generator)
        latent = torch.randn(sum(kv_lens) + 2, 1, 40, generator=generator)
        shape, tile = RowShape.of(40, 32, value_is_key=True), Tile(16, 16, 4, 1)
        broken, of_decode = latent.clone(), latent.clone()
        broken[kv_lens[0], 0, 39] = of_decode[table[0][2, 0], 0, 39] = torch.nan
        wanted = extend_attention.extend_attention_torch(q, latent, None, slots, *bounds, 0.2, 32)
        wanted[q_lens[0]] = torch.nan
        decoded = decode_attention.decode_attention_torch(q[:3], latent, None, *table, 0.2, 32)
        decoded[1] = torch.nan
        for splits in (1, 2, 5):
            close(launch_extend(q, broken, broken, slots, *bounds, 0.2, shape, tile=tile, splits=splits)[0], wanted)
            close(launch_decode(q[:3], of_decode, of_decode, *table, 0.2, shape, tile, splits), decoded)
        _, lse = launch_extend(q, broken, broken, slots, *bounds, 0.2, shape, with_lse=True, tile=tile)
        self.assertEqual(lse.isnan().any(1).nonzero().flatten().tolist(), [q_lens[0]])
        state = torch.randn(2, 3, 8, generator=generator), torch.tensor([[0.0, 1, -math.inf], [math.nan, math.nan, 2]])
        other = torch.randn(2, 3, 8, generator=generator), torch.tensor([[1.0, math.nan, math.nan], [0, -math.inf, 3]])
        for found, of_reference in zip(
            triton_of(attention_state.merge_states).fn(*state, *other),
            attention_state.merge_states_torch(*state, *other),
            strict=True,
        ):
            close(found, of_reference)

    def test_merged_parts_are_the_whole(self):
        generator = torch.Generator().manual_seed(0)
        q_lens, prefix, new = [3, 2], [20, 0], [3, 2]
        q = torch.randn(5, 4, 24, generator=generator)
        k = torch.randn(25, 4, 24, generator=generator)
        v = torch.randn(25, 4, 16, generator=generator)
        old_rows = torch.arange(20)
        new_rows = torch.arange(20, 25)
        packed = torch.cat((old_rows, new_rows))
        q_bounds, new_bounds = indptr(q_lens), indptr(new)
        all_bounds = indptr([23, 2])
        wanted = extend_ragged.extend_ragged_torch(q, k[packed], v[packed], q_bounds, all_bounds, 0.3)
        for extend, merge in (
            (attention_state.extend_state_torch, attention_state.merge_states_torch),
            (triton_of(attention_state.extend_state).fn, triton_of(attention_state.merge_states).fn),
        ):
            part = extend(q, k[new_rows], v[new_rows], q_bounds, new_bounds, 0.3, True)
            other = extend(q, k[old_rows], v[old_rows], q_bounds, indptr(prefix), 0.3, False)
            close(merge(*part, *other)[0], wanted)


class TestTiles(CustomTestCase):
    def test_the_tile_follows_architecture_and_cache(self):
        """Types of query and cache: rows and warps of the extend tile over latent rows, rows of the decode tile."""
        latent, wide = RowShape.of(576, 512, value_is_key=True), RowShape.of(256, 256)
        exact, served, coarse = torch.float32, torch.bfloat16, torch.float8_e4m3fn
        for arch, dtype, cache, extend, decode in (
            ("gfx942", served, served, (32, 8), 32), ("gfx942", served, coarse, (32, 4), 32),
            ("gfx950", served, coarse, (32, 8), 32), ("gfx942", exact, coarse, (16, 4), 16),
            ("sm_90", served, coarse, (64, 8), 64), ("sm_90", served, served, (64, 8), 64),
        ):  # fmt: skip
            with self.subTest(arch=arch, cache=cache), mock.patch.object(tiles, "current_platform") as on:
                on.arch = arch
                tile = tiles.extend_tile(latent, dtype, cache)
                self.assertEqual((tile.rows, tile.num_warps), extend)
                tile, heads_are_rows = tiles.decode_tile(latent, 64, dtype, cache)
                self.assertEqual((tile.rows, heads_are_rows), (decode, dtype != exact))
                self.assertEqual(tiles.extend_tile(wide, dtype, cache), tiles.extend_tile(wide, dtype, dtype))


class TestReferences(CustomTestCase):
    """References of ops that return more than attention outputs, against loops in float64."""

    def test_extend_state(self):
        for case in cases_of(attention_state.extend_state):
            q, k, v, qo, kv, scale, causal, *tail = case.args
            out, lse = attention_state.extend_state_torch(*case.args)
            if tail:
                k = torch.stack([torch.hstack((k[:, head], *tail)) for head in range(k.shape[1])], dim=1)
            group = q.shape[1] // k.shape[1]
            for i in range(len(qo) - 1):
                for row in range(int(qo[i]), int(qo[i + 1])):
                    end = int(kv[i + 1]) - (int(qo[i + 1]) - 1 - row if causal else 0)
                    for head in range(q.shape[1]):
                        logits = [float(q[row, head].double() @ key.double()) * scale
                                  for key in k[int(kv[i]) : end, head // group]]  # fmt: skip
                        if not logits:
                            self.assertEqual(float(lse[row, head]), -math.inf)
                            self.assertEqual(float(out[row, head].abs().max()), 0.0)
                            continue
                        total = sum(math.exp(value) for value in logits)
                        self.assertAlmostEqual(float(lse[row, head]), math.log(total), places=4)
                        weights = torch.tensor([math.exp(value) / total for value in logits], dtype=torch.float64)
                        close(out[row, head].double(), weights @ v[int(kv[i]) : end, head // group].double())

    def test_merge(self):
        for case in cases_of(attention_state.merge_states):
            out_a, lse_a, out_b, lse_b = case.args
            out, lse = attention_state.merge_states_torch(*case.args)
            a, b = (value.double().exp() for value in (lse_a, lse_b))
            total = a + b
            empty = total == 0
            wanted = (a.unsqueeze(-1) * out_a + b.unsqueeze(-1) * out_b) / total.masked_fill(empty, 1).unsqueeze(-1)
            close(out.double(), wanted)
            close(lse.double(), total.log())

    def test_cache_ops(self):
        for case in cases_of(kv_cache.write_kv):
            k, v, k_cache, v_cache, slots = clone(case.args)
            kv_cache.write_kv_torch(k, v, k_cache, v_cache, slots)
            for rows, cache, before in ((k, k_cache, case.args[2]), (v, v_cache, case.args[3])):
                for slot in range(cache.shape[0]):
                    row = [i for i, other in enumerate(slots.tolist()) if other == slot]
                    self.assertTrue(holds(cache[slot], rows[row[0]] if row else before[slot].to(rows.dtype)))
        for case in cases_of(kv_cache.gather_slots):
            table, rows, starts, indptr, total = case.args
            wanted = []
            for row, start, first, end in zip(rows.tolist(), starts.tolist(), indptr.tolist(), indptr.tolist()[1:]):
                wanted += table[row, start : start + end - first].tolist()
            self.assertEqual(kv_cache.gather_slots_torch(*case.args).tolist(), wanted)
            self.assertEqual(len(wanted), total)


class TestSplitCount(CustomTestCase):
    def test_it_fills_and_stays_within_bounds(self):
        tile = Tile(16, 64, 4, 1)
        self.assertGreater(split_count(1, 8192, tile, 4), 30)
        self.assertGreater(split_count(4, 8192, Tile(16, 64, 4, 1, residents=2), 4), split_count(4, 8192, tile, 4))
        self.assertEqual(split_count(1000, 8192, tile, 4), 1)
        self.assertEqual(split_count(1, 64, tile, 4), 1)
        self.assertEqual(split_count(1, 100, tile, 4), 2)
        self.assertEqual(split_count(1, 512, tile, 4, min_blocks=4), 2)
        self.assertEqual(split_count(1, 1 << 20, tile, 1 << 40), 1)


if __name__ == "__main__":
    unittest.main()
