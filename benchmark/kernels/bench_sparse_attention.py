"""Time of sparse attention in one pass, split and unsplit, against rows gathered first, in a replayed graph.

    python benchmark/kernels/bench_sparse_attention.py [--heads 64 128] [--k 192 640 1152] [--q 1 32 1024] [--tune]

8-bit rows of 584 bytes, a window of 128 and K - 128 entries, every row elsewhere in its pool. "one" is one program per
row and block of heads, "split N" distributes its rows over N programs, "table" is what the op chooses (N programs, or
two passes), "gather" makes bfloat16 rows of all that is attended to and then attends to those. TB/s counts 584 bytes
per row once, queries and results; "copy" is what the card copies. The note says how many times faster than "gather",
and the part of copy bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from timing import describe_device, graph_time

from sglang.kernels.ops.attention import sparse_splits
from sglang.kernels.ops.attention.sparse_attention import sparse_attention_triton
from sglang.kernels.ops.attention.sparse_attention_triton import load_row_tile
from sglang.kernels.ops.attention.sparse_splits import SparseTile, choose_passes, sparse_tile, split_count
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.srt.platforms import current_platform
from sglang.test.cache_pools import make_pages

DIM, ROPE, WINDOW, ROW_BYTES = 512, 64, 128, 584
TILES = tuple(
    SparseTile(heads, block, warps, stages)
    for heads in (16, 32, 64)
    for block in (16, 32, 64)
    for warps in (4, 8)
    for stages in (1, 2, 3)
    if heads * block >= 512
)


@triton.jit
def gather_kernel(
    cache_ptr, scales_ptr, ids_ptr, out_ptr, page_stride, scale_page_stride, num_ids, out_stride, first,
    PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (rows, blocks): rows ``ids`` [Q, num_ids] as bfloat16 at out [Q, K, DIM], from place ``first`` on."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * num_ids + place, mask=place < num_ids, other=-1).to(tl.int64)
    tile = load_row_tile(
        cache_ptr, scales_ptr, page_stride, scale_page_stride, ids, ids >= 0, PER_PAGE, WIDTH, 8, DIM, DIM, tl.bfloat16
    )
    at = out_ptr + row * out_stride + (first + place)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(at, tile, mask=(place < num_ids)[:, None])


class Shape:
    """Q rows of ``heads`` heads over K rows each."""

    def __init__(self, heads: int, k: int, q: int) -> None:
        self.heads, self.k, self.q = heads, k, q
        device, dtype = "cuda", fp8_dtype(current_platform.arch)
        # Large enough that what is read is not in the cache from the call before.
        pages = max(256, min(4096, q * k // 64))
        self.window = self._filled(make_pages(pages // 4, 256, DIM, ROPE, dtype, device))
        self.entries = self._filled(make_pages(pages, 64, DIM, ROPE, dtype, device))
        self.query = torch.randn(q, heads, DIM, device=device).bfloat16()
        self.sinks = torch.zeros(heads, device=device)
        self.window_ids = torch.randint(256, pages // 4 * 256, (q, WINDOW), dtype=torch.int32, device=device)
        self.chosen = torch.randint(0, (pages - 1) * 64, (q, k - WINDOW), dtype=torch.int32, device=device)
        self.table = torch.arange(1, pages, dtype=torch.int32, device=device).unsqueeze(0)
        self.requests = torch.zeros(q, dtype=torch.int64, device=device)
        self.visible = torch.full((q,), k, dtype=torch.int32, device=device)
        self.entry_ids = (self.chosen + 64).contiguous()

    @staticmethod
    def _filled(pages: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        pages[0].view(torch.uint8).random_(0, 0x40)
        pages[1].fill_(127)
        return pages

    @property
    def num_bytes(self) -> float:
        """What one call must move."""
        return self.q * (ROW_BYTES * self.k + 2 * 2 * self.heads * DIM + 4 * self.k)

    @property
    def flops(self) -> float:
        """Of both products."""
        return 4.0 * self.q * self.heads * DIM * self.k

    def attend(self, splits: int | None, tile: SparseTile | None = None) -> Callable[[], torch.Tensor]:
        """The op's kernel."""
        args = (
            self.query, self.window[0], self.window_ids, self.sinks, DIM**-0.5, self.window[1], *self.entries,
            self.chosen, self.table, self.requests, self.visible, 64,
        )  # fmt: skip
        return lambda: sparse_attention_triton(*args, tile=tile, splits=splits)

    def gather(self) -> Callable[[], torch.Tensor]:
        """Gather to bfloat16, then attend to what was gathered."""
        rows = torch.empty(self.q, self.k, DIM, dtype=torch.bfloat16, device="cuda")
        ids = torch.arange(self.q * self.k, dtype=torch.int32, device="cuda").view(self.q, self.k)

        def run() -> torch.Tensor:
            first = 0
            for (cache, scales), places in ((self.window, self.window_ids), (self.entries, self.entry_ids)):
                count = places.shape[1]
                gather_kernel[(self.q, triton.cdiv(count, 32))](
                    cache, scales, places, rows, cache.stride(0), scales.stride(0), count, rows.stride(0), first,
                    PER_PAGE=cache.shape[1], WIDTH=cache.shape[2], DIM=DIM, BLOCK=32, num_warps=8,
                )  # fmt: skip
                first += count
            return sparse_attention_triton(self.query, rows.view(-1, DIM), ids, self.sinks, DIM**-0.5)

        return run


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(graph_time([lambda: target.copy_(source)]))


def tune(shape: Shape) -> Iterator[tuple[float, int, SparseTile]]:
    """Every tile and number of splits that runs, with its seconds."""
    for tile in TILES:
        if tile.heads > max(16, shape.heads):
            continue
        for splits in (1, 2, 4, 8, 16) if shape.q * shape.heads // tile.heads < 1024 else (1,):
            try:
                yield statistics.median(graph_time([shape.attend(splits, tile)], 3, 0.005)), splits, tile
            except Exception as error:  # a tile that the device cannot hold
                if "resource" not in str(error) and "shared" not in str(error):
                    raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--k", type=int, nargs="+", default=[192, 640, 1152])
    parser.add_argument("--q", type=int, nargs="+", default=[1, 8, 32, 128, 256, 512, 1024, 4096])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="try every tile and split, and print the best three")
    args = parser.parse_args()
    torch.manual_seed(0)
    copied = copy_bandwidth()
    print(f"# {describe_device()}; {sparse_splits.__name__}; copy {copied / 1e12:.2f} TB/s; median of {args.runs} runs")
    print(f"{'heads':>5}{'K':>6}{'Q':>6}  {'form':<10}{'us':>10}{'TB/s':>7}{'TFLOP/s':>9}{'/gather':>9}{'of copy':>9}")
    for heads in args.heads:
        for k in args.k:
            for q in args.q:
                shape = Shape(heads, k, q)
                if args.tune:
                    for seconds, splits, tile in sorted(tune(shape), key=lambda row: row[0])[:3]:
                        print(f"{heads:>5}{k:>6}{q:>6}  {1e6 * seconds:10.1f} us, {splits} splits, {tile}", flush=True)
                    continue
                chosen = split_count(q, heads, k)
                passes = choose_passes(q, heads, k)
                form = f"table {chosen}" if passes is None else "table, two"
                forms = {"gather": shape.gather(), form: shape.attend(None), "one": shape.attend(1)}
                several = 2 if chosen == 1 else chosen
                forms[f"split {several}"] = shape.attend(several)
                times = {name: statistics.median(graph_time([run], args.runs)) for name, run in forms.items()}
                for name, seconds in times.items():
                    rate = shape.num_bytes / seconds
                    print(
                        f"{heads:>5}{k:>6}{q:>6}  {name:<10}{1e6 * seconds:10.1f}{rate / 1e12:7.2f}"
                        f"{shape.flops / seconds / 1e12:9.1f}{times['gather'] / seconds:9.2f}{rate / copied:9.2f}",
                        flush=True,
                    )
                print(f"# tile {dataclasses.astuple(passes or sparse_tile(q, heads))}")
                del shape, forms
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
