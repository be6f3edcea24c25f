"""Time and host memory of the prefix cache: insert and match of many sequences, half of them sharing a prefix.

    python benchmark/radix_cache/bench_radix_cache.py

Prints machine and versions, then min / median / max over the repeats for the sequences as given, twice as long, and
twice as many. Linear in tokens means that the nanoseconds per token stay the same down the column.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import check_integrity
from sglang.test.device_time import describe_machine


@dataclass(frozen=True)
class Workload:
    """``num_seqs`` sequences of ``length`` tokens; every second one starts with the same ``shared`` tokens."""

    num_seqs: int
    length: int
    shared: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.length

    def sequences(self) -> list[list[int]]:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 100_000, size=(self.num_seqs, self.length))
        tokens[::2, : self.shared] = tokens[0, : self.shared]
        return tokens.tolist()


def timed(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def fill(cache: RadixCache, sequences: list[list[int]]) -> None:
    """Insert as finished requests do: allocate every slot, insert, give the duplicates back."""
    for tokens in sequences:
        slots = cache.allocator.alloc(len(tokens))
        assert slots is not None
        result = cache.insert(tokens, slots)
        cache.allocator.free(slots[: result.prefix_len])


def match_all(cache: RadixCache, sequences: list[list[int]]) -> None:
    for tokens in sequences:
        matched = cache.match_prefix(tokens).slot_ids.numel()
        assert matched == len(tokens), f"{matched} of {len(tokens)} tokens matched"


def new_cache(load: Workload, page_size: int) -> RadixCache:
    size = load.num_tokens + load.length
    return RadixCache(TokenToKVPoolAllocator(size + -size % page_size, page_size), page_size)


def host_bytes(load: Workload, page_size: int) -> tuple[int, int]:
    """Bytes that the filled tree keeps, and how far the resident set grew for them."""
    sequences = load.sequences()
    cache = new_cache(load, page_size)
    gc.collect()
    resident = resident_bytes()
    tracemalloc.start()
    fill(cache, sequences)
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    check_integrity(cache, held=0)
    return traced, resident_bytes() - resident


def resident_bytes() -> int:
    """Resident set of this process; its peak where /proc is not there."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(load: Workload, page_size: int, repeats: int) -> None:
    sequences = load.sequences()
    times: dict[str, list[float]] = {"insert": [], "match": [], "evict": []}
    for _ in range(repeats):
        cache = new_cache(load, page_size)
        times["insert"].append(timed(lambda: fill(cache, sequences)))  # noqa: B023
        times["match"].append(timed(lambda: match_all(cache, sequences)))  # noqa: B023
        times["evict"].append(timed(lambda: cache.evict(cache.total_size())))  # noqa: B023
    print(f"{load.num_seqs} sequences of {load.length} tokens, half sharing {load.shared}, page size {page_size}")
    for name, seconds in times.items():
        low, mid, high = min(seconds), statistics.median(seconds), max(seconds)
        print(
            f"  {name:6s} ms min / median / max: {low * 1e3:7.1f} / {mid * 1e3:7.1f} / {high * 1e3:7.1f}"
            f"   median {mid / load.num_tokens * 1e9:6.1f} ns per token, "
            f"{mid / load.num_seqs * 1e6:6.1f} us per sequence"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, default=1000)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--shared", type=int, default=500)
    parser.add_argument("--page-size", type=int, default=1, help="every length must be a multiple of it")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.length % args.page_size or args.shared % args.page_size or args.length < args.shared:
        parser.error("--length and --shared must be multiples of --page-size, and --shared at most --length")
    print(describe_machine())
    n, length, shared = args.num_seqs, args.length, args.shared
    base = Workload(n, length, shared)
    traced, resident = host_bytes(base, args.page_size)
    print(
        f"host memory of the tree with {n} sequences of {length} tokens: {traced / 1e6:.1f} MB traced, "
        f"resident set +{resident / 1e6:.1f} MB"
    )
    for load in (base, Workload(n, 2 * length, 2 * shared), Workload(2 * n, length, shared)):
        report(load, args.page_size, args.repeats)


if __name__ == "__main__":
    main()
