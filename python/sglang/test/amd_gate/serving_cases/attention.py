"""Arguments without contents at which served models call the ops of ``kernels/ops/attention``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.attention_state import extend_state, merge_states
from sglang.kernels.ops.attention.compress import compress
from sglang.kernels.ops.attention.decode_attention import decode_attention
from sglang.kernels.ops.attention.extend_attention import extend_attention
from sglang.kernels.ops.attention.extend_ragged import extend_ragged
from sglang.kernels.ops.attention.kv_cache import gather_slots, write_kv
from sglang.kernels.ops.attention.mla_decode_project import mla_decode_project
from sglang.kernels.ops.attention.prepare_compressed import prepare_compressed
from sglang.kernels.ops.attention.prepare_gqa import prepare_gqa
from sglang.kernels.ops.attention.prepare_mla import prepare_mla
from sglang.kernels.ops.attention.select_entries import select_entries
from sglang.kernels.ops.attention.sparse_attention import sparse_attention
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.cache_pools import make_pages
from sglang.test.op_cases import Case
from sglang.test.op_cases.attention import expanded_views

# (requests, new tokens of each, tokens of each) at which kernels are compiled: whole contexts, and split ones.
EXTEND_SHAPES = ((4, 2048, 8192), (1, 64, 1024))

# Local heads, chosen entries or pages of a context that are all attended to, and rows of the step.
SPARSE_SHAPES = ((64, 512, 1), (64, 512, 128), (64, 0, 32), (128, 1024, 8), (128, 1024, 4096), (16, 1024, 32))

# (requests, tokens of each) at which kernels are compiled: split contexts, and whole ones.
DECODE_SHAPES = ((8, 8192), (512, 1152))


def attention_state_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """One part of a long prefix and its merge, 16 and 128 heads in bf16, without contents."""
    for heads in (16, 128):
        q = torch.empty(2048, heads, 192, dtype=torch.bfloat16, device=device)
        kv = torch.empty(8192, heads, 256, dtype=torch.bfloat16, device=device)
        rows = torch.empty(8192, 576, dtype=torch.bfloat16, device=device)
        k, v, tail = expanded_views(kv, rows, 128, 64)
        bounds = torch.empty(5, dtype=torch.int64, device=device)
        for causal in (False, True):
            case = Case(f"h{heads} causal={causal}", (q, k, v, bounds, bounds.clone(), 192**-0.5, causal, tail))
            yield extend_state, case
        out = torch.empty(2048, heads, 128, dtype=torch.bfloat16, device=device)
        lse = torch.empty(2048, heads, dtype=torch.float32, device=device)
        yield merge_states, Case(f"h{heads}", (out, lse, out.clone(), lse.clone()))


def compress_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Compressors of both ratios and of the indexer, in a decode step and a prefill, without contents."""
    dtype = fp8_dtype(current_platform.arch)
    for num_rows, count, apart in ((32, 32, True), (4096, 1032, False)):
        for ratio, parts, dim in ((4, 2, 512), (4, 2, 128), (128, 1, 512)):
            kv = torch.empty(num_rows, parts * dim, dtype=torch.bfloat16, device=device)
            states = torch.empty(1024, parts * dim, dtype=torch.float32, device=device)
            ids = torch.empty(num_rows, dtype=torch.int64, device=device)
            sources = torch.empty(count, parts * ratio, dtype=torch.int64, device=device)
            entries = torch.empty(count, dtype=torch.int64, device=device)
            args = (
                kv, kv.clone(), states, states.clone(), ids, sources, states[:ratio].clone(), states[0, :dim], 1e-6,
                torch.empty(8192, 64, dtype=torch.float32, device=device), entries, entries.clone(),
            )  # fmt: skip
            name = f"m{ratio} d{dim} t{num_rows}"
            plain = torch.empty(4096, dim, dtype=torch.bfloat16, device=device)
            yield compress, Case(name, (*args, plain, None, apart))
            tail = 64 if dim == 512 else None
            yield compress, Case(f"{name} fp8", (*args, *make_pages(64, 256 // ratio, dim, tail, dtype, device), apart))


def kv_cache_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """A decode step of 128 requests and a prefill of 8192 tokens in bf16, without contents; 8-bit caches for decode."""
    for tokens in (128, 8192):
        slots = torch.empty(tokens, dtype=torch.int64, device=device)
        for heads, dim in ((2, 256), (8, 128)):
            k = torch.empty(tokens, heads, dim, dtype=torch.bfloat16, device=device)
            cache = torch.empty(1 << 14, heads, dim, dtype=torch.bfloat16, device=device)
            yield write_kv, Case(f"kv {tokens}x{heads}x{dim}", (k, k.clone(), cache, cache.clone(), slots))
        if tokens == 128:
            coarse = torch.empty_like(cache, dtype=fp8_dtype(current_platform.arch))
            yield write_kv, Case(f"kv {tokens}x8x128 fp8", (k, k.clone(), coarse, coarse.clone(), slots))
        bounds = torch.empty(9, dtype=torch.int64, device=device)
        table = torch.empty(64, 8192, dtype=torch.int32, device=device)
        yield gather_slots, Case(f"slots {tokens}", (table, bounds[:8], bounds[:8].clone(), bounds, tokens))


def mla_extend_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """A few new tokens per request after a long prefix, in bf16, without contents."""
    for heads in (16, 128):
        for batch, new, total in ((8, 4, 8192), (512, 2, 1152)):
            q = torch.empty(batch * new, heads, 576, dtype=torch.bfloat16, device=device)
            latent = torch.empty(batch * total, 1, 576, dtype=torch.bfloat16, device=device)
            slots = torch.empty(batch * total, dtype=torch.int64, device=device)
            bounds = torch.empty(batch + 1, dtype=torch.int64, device=device)
            args = (q, latent, None, slots, bounds, bounds.clone(), 192**-0.5, 512)
            yield extend_attention, Case(f"mla_h{heads} {batch}x{new} of {total}", args)
        coarse = torch.empty_like(latent, dtype=fp8_dtype(current_platform.arch))
        yield extend_attention, Case(f"mla_h{heads} 512x2 of 1152 fp8", (q, coarse, *args[2:]))


def extend_attention_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Prefill and a cached prefix with grouped heads of 256 and 128 in bf16, without contents."""
    for heads, kv_heads, dim in ((16, 2, 256), (32, 8, 128)):
        for batch, new, total in EXTEND_SHAPES:
            q = torch.empty(batch * new, heads, dim, dtype=torch.bfloat16, device=device)
            cache = torch.empty(batch * total, kv_heads, dim, dtype=torch.bfloat16, device=device)
            slots = torch.empty(batch * total, dtype=torch.int64, device=device)
            bounds = torch.empty(batch + 1, dtype=torch.int64, device=device)
            args = (q, cache, torch.empty_like(cache), slots, bounds, bounds.clone(), dim**-0.5)
            yield extend_attention, Case(f"gqa_{heads}x{kv_heads}_d{dim} {batch}x{new} of {total}", args)
        coarse = torch.empty_like(cache, dtype=fp8_dtype(current_platform.arch))
        name = f"gqa_{heads}x{kv_heads}_d{dim} {batch}x{new} of {total} fp8"
        yield extend_attention, Case(name, (q, coarse, coarse.clone(), *args[3:]))


def prepare_compressed_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Layers of V4 in decode and prefill, whole and on one of eight ranks, without contents."""
    dtype = fp8_dtype(current_platform.arch)
    table = torch.empty(8192, 64, dtype=torch.float32, device=device)
    weight = torch.empty(512, dtype=torch.float32, device=device)
    for num_rows, heads in ((32, 64), (4096, 64), (32, 16)):
        q = torch.empty(num_rows, heads, 512, dtype=torch.bfloat16, device=device)
        kv = torch.empty(num_rows, 1536, dtype=torch.bfloat16, device=device)[:, 1024:]
        ids = torch.empty(num_rows, dtype=torch.int64, device=device)
        args = (q, kv, ids, table, weight, 1e-6, ids.clone())
        plain = torch.empty(4096, 512, dtype=torch.bfloat16, device=device)
        yield prepare_compressed, Case(f"h{heads} t{num_rows}", (*args, plain))
        pages = make_pages(64, 256, 512, 64, dtype, device)
        yield prepare_compressed, Case(f"h{heads} t{num_rows} fp8", (*args, *pages))


def prepare_gqa_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Qwen3.5 layers without contents: decode and prefill in bf16, and float32, which the proofs use."""
    table = torch.empty(4096, 64, device=device)
    for label, tokens, dtype in (("t1", 1, None), ("t8192", 8192, None), ("t8 fp32", 8, torch.float32)):
        shapes = bfloat16s(device, (tokens, 36 * 256), (256,), (1 << 14, 2, 256))
        both, weight, cache = (tensor.to(dtype) if dtype else tensor for tensor in shapes)
        q = both[:, : 32 * 256].unflatten(-1, (16, 2, 256))[:, :, 0]
        k, v = both[:, 32 * 256 :].unflatten(-1, (4, 256)).split(2, dim=1)
        index = torch.empty(tokens, dtype=torch.int64, device=device)
        args = (q, k, v, weight, weight.clone(), index, table, cache, cache.clone(), index, 1e-6, True)
        yield prepare_gqa, Case(f"qwen35 {label}", args)


def prepare_mla_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """DeepSeek layers in bf16, without contents: decode in the absorbed form, a prefill in place."""
    table = torch.empty(4096, 64, device=device)
    for name, tokens, heads in (("v2lite", 1, 16), ("v2lite", 128, 16), ("v3", 128, 128), ("v3", 8192, 128)):
        q, kv_a, weight, cache, queries = bfloat16s(
            device, (tokens, heads, 192), (tokens, 576), (512,), (1 << 14, 576), (tokens, heads, 576)
        )
        index = torch.empty(tokens, dtype=torch.int64, device=device)
        placed = (queries,) if tokens <= 128 else ()
        last = (index, 1e-6, False, *placed)
        yield prepare_mla, Case(f"{name} t{tokens}", (q, kv_a, index, table, weight, cache, *last))
        if placed:
            w_kc = bfloat16s(device, (heads, 256, 512))[0][:, :128]
            yield prepare_mla, Case(f"{name} t{tokens} absorbed", (q, kv_a, index, table, weight, cache, *last, w_kc))
        if tokens == 128:
            coarse = torch.empty_like(cache, dtype=fp8_dtype(current_platform.arch))
            yield prepare_mla, Case(f"{name} t{tokens} fp8", (q, kv_a, index, table, weight, coarse, *last))


def extend_ragged_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Expanded latent attention in bf16, without contents: keys of 128 + 64, values of 128, 16 to 128 heads."""
    for heads in (16, 128):
        for batch, new, total in EXTEND_SHAPES:
            q = torch.empty(batch * new, heads, 192, dtype=torch.bfloat16, device=device)
            kv = torch.empty(batch * total, heads, 256, dtype=torch.bfloat16, device=device)
            rows = torch.empty(batch * total, 576, dtype=torch.bfloat16, device=device)
            k, v, tail = expanded_views(kv, rows, 128, 64)
            bounds = torch.empty(batch + 1, dtype=torch.int64, device=device)
            name = f"mha_h{heads}_192_128 {batch}x{new} of {total}"
            yield extend_ragged, Case(name, (q, k, v, bounds, bounds.clone(), 192**-0.5, tail))


def select_entries_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Decode steps and a prefill over contexts of 8k and 128k tokens, without contents, in both formats."""
    dtype = fp8_dtype(current_platform.arch)
    for num_rows, pages, top_k in ((1, 32, 512), (128, 32, 512), (32, 512, 1024), (4096, 32, 1024)):
        q = torch.empty(num_rows, 64, 128, dtype=torch.bfloat16, device=device)
        weights = torch.empty(num_rows, 64, dtype=torch.float32, device=device)
        table = torch.empty(8, pages, dtype=torch.int32, device=device)
        visible = torch.empty(num_rows, dtype=torch.int32, device=device)
        rest = (table, visible.long(), visible, 64, top_k)
        name = f"q{num_rows} ctx{pages * 256} k{top_k}"
        plain = torch.empty(4096, 128, dtype=torch.bfloat16, device=device)
        yield select_entries, Case(name, (q, weights, plain, *rest))
        keys, scales = make_pages(64, 64, 128, None, dtype, device)
        yield select_entries, Case(f"{name} fp8", (q, weights, keys, *rest, scales))


def sparse_attention_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Layers of V4-Flash and V4-Pro, whole and on one of eight ranks, without contents, in both formats."""
    dtype = fp8_dtype(current_platform.arch)
    for heads, num_chosen, num_rows in SPARSE_SHAPES:
        q = torch.empty(num_rows, heads, 512, dtype=torch.bfloat16, device=device)
        ids = torch.empty(num_rows, 128, dtype=torch.int32, device=device)
        sinks = torch.empty(heads, dtype=torch.float32, device=device)
        chosen = torch.empty(num_rows, num_chosen, dtype=torch.int32, device=device) if num_chosen else None
        table, visible = torch.empty(8, 32, dtype=torch.int32, device=device), ids[:, 0].contiguous()
        requests, per_page = visible.long(), 64 if num_chosen else 2
        of_entries = (chosen, table, requests, visible, per_page)
        name = f"h{heads} k{num_chosen or 64} q{num_rows}"
        rows = [torch.empty(64 * size, 512, dtype=torch.bfloat16, device=device) for size in (256, per_page)]
        yield sparse_attention, Case(name, (q, rows[0], ids, sinks, 0.04, None, rows[1], None, *of_entries))
        pages = [make_pages(64, size, 512, 64, dtype, device) for size in (256, per_page)]
        args = (q, pages[0][0], ids, sinks, 0.04, pages[0][1], *pages[1], *of_entries)
        yield sparse_attention, Case(f"{name} fp8", args)
        if heads == 64 and num_rows == 1:
            yield sparse_attention, Case(f"h{heads} window fp8", args[:6])
            rows = [plain.float() for plain in rows]
            args = (q.float(), rows[0], ids, sinks, 0.04, None, rows[1], None, *of_entries)
            yield sparse_attention, Case(f"{name} fp32", args)


def serving_table(batch: int, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table = torch.empty(batch, tokens, dtype=torch.int32, device=device)
    index = torch.empty(batch, dtype=torch.int64, device=device)
    return table, index, torch.empty_like(index)


def decode_attention_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models, without contents: grouped heads of 256 and 128, 16 to 128 latent heads."""
    fp8 = fp8_dtype(current_platform.arch)
    for batch, tokens, dtype in (*((*shape, torch.bfloat16) for shape in DECODE_SHAPES), (8, 1152, torch.float32)):
        table = serving_table(batch, tokens, device)
        rows = batch * tokens
        suffix = f"bs{batch} ctx{tokens}" + (" fp32" if dtype == torch.float32 else "")
        for heads, kv_heads, dim in ((16, 2, 256), (32, 8, 128)):
            q = torch.empty(batch, heads, dim, dtype=dtype, device=device)
            cache = torch.empty(rows, kv_heads, dim, dtype=dtype, device=device)
            args = (q, cache, torch.empty_like(cache), *table, dim**-0.5)
            yield decode_attention, Case(f"gqa_{heads}x{kv_heads}_d{dim} {suffix}", args)
            if dim == 256:
                gate = q.new_empty(batch, heads, 2, dim)[:, :, 1]
                yield decode_attention, Case(f"gqa_{heads}x{kv_heads}_d{dim} {suffix} gated", (*args, 0, gate))
            if dtype == torch.bfloat16:
                coarse = torch.empty_like(cache, dtype=fp8)
                name = f"gqa_{heads}x{kv_heads}_d{dim} {suffix} fp8"
                yield decode_attention, Case(name, (q, coarse, coarse.clone(), *args[3:]))
        for heads in (16, 32, 64, 128):
            q = torch.empty(batch, heads, 576, dtype=dtype, device=device)
            latent = torch.empty(rows, 576, dtype=dtype, device=device)
            of_table = (None, *table, 192**-0.5, 512)
            yield decode_attention, Case(f"mla_h{heads} {suffix}", (q, latent.unsqueeze(1), *of_table))
            w_vc = torch.empty(heads, 256, 512, dtype=dtype, device=device)[:, 128:].transpose(1, 2)
            args = (q, latent, *table, w_vc, 192**-0.5)
            yield mla_decode_project, Case(f"mla_h{heads} {suffix}", args)
            yield mla_decode_project, Case(f"mla_h{heads} {suffix} quantised", (*args, fp8))
            if dtype == torch.bfloat16 and heads in (16, 128):
                coarse = torch.empty_like(latent, dtype=fp8)
                yield decode_attention, Case(f"mla_h{heads} {suffix} fp8", (q, coarse.unsqueeze(1), *of_table))


def verify_attention_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Two and four rows per request of served models, without contents."""
    for width, batch in ((2, 8), (4, 8), (4, 128)):
        table = torch.empty(batch, 8192, dtype=torch.int32, device=device)
        index = torch.empty(batch, dtype=torch.int64, device=device)
        rest, rows = (table, index, torch.empty_like(index)), batch * 8192
        cache = torch.empty(rows, 2, 256, dtype=torch.bfloat16, device=device)
        q = cache.new_empty(batch * width, 16, 256)
        name = f"bs{batch} w{width}"
        args = (q, cache, torch.empty_like(cache), *rest, 256**-0.5)
        yield decode_attention, Case(f"gqa_16x2_d256 {name}", args)
        gate = q.new_empty(batch * width, 16, 2, 256)[:, :, 1]
        yield decode_attention, Case(f"gqa_16x2_d256 {name} gated", (*args, 0, gate))
        for heads in (16, 128):
            q, latent = cache.new_empty(batch * width, heads, 576), cache.new_empty(rows, 1, 576)
            yield decode_attention, Case(f"mla_h{heads} {name}", (q, latent, None, *rest, 192**-0.5, 512))


CASES = (
    attention_state_cases,
    compress_cases,
    kv_cache_cases,
    mla_extend_cases,
    extend_attention_cases,
    prepare_compressed_cases,
    prepare_gqa_cases,
    prepare_mla_cases,
    extend_ragged_cases,
    select_entries_cases,
    sparse_attention_cases,
    decode_attention_cases,
    verify_attention_cases,
)
