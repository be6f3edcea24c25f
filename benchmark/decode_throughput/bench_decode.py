"""Tokens per second on a bare CPU, this engine next to transformers' generate, in one run with rounds interleaved.

    python benchmark/decode_throughput/bench_decode.py

The model has DeepSeek-V3's layout with real head sizes (sglang.test.bench_checkpoint), in float32. Both sides get the
same prompts of 64 tokens and generate 64, greedily, without an end token; the engine runs end to end (`sglang.Engine`:
scheduler in a process of its own, detokenizer, sockets), transformers with its KV cache and every attention and experts
implementation that it has for this model, of which the fastest counts. Prints min / median / max over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang.srt.managers.process_launch import SPIN_COUNT

# Both sides run under the thread settings of the engine's processes; libgomp reads them when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import sglang  # noqa: E402
from sglang.test.bench_checkpoint import CONFIG, make_checkpoint  # noqa: E402
from sglang.test.device_time import describe_machine  # noqa: E402

# Attention, experts: what transformers can run this model with on a CPU.
HF_VARIANTS = [(a, e) for a in ("eager", "sdpa") for e in ("eager", "batched_mm", "grouped_mm")]
# A variant that is this many times slower than the fastest in the warm-up round is not timed further.
HOPELESS = 1.5
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Figures:
    """Output tokens per second over the rounds."""

    name: str
    batch_size: int
    min: float
    median: float
    max: float

    @classmethod
    def of(cls, name: str, batch_size: int, rates: list[float]) -> Figures:
        return cls(name, batch_size, min(rates), statistics.median(rates), max(rates))


def transformers_side(folder: Path, attention: str, experts: str) -> Generate:
    """Greedy generation by transformers with one choice of implementations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
        return out[:, ids.shape[1] :].tolist()

    return generate


def engine_side(engine: sglang.Engine) -> Generate:
    """Greedy generation by this engine."""

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return [reply["output_ids"] for reply in engine.generate(input_ids=prompts, sampling_params=sampling)]

    return generate


def timed_round(
    sides: dict[str, Generate], prompts: list[list[int]], new_tokens: int
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """(output tokens per second, output ids) of each side on the same prompts."""
    rates, outputs = {}, {}
    for name, generate in sides.items():
        started = time.perf_counter()
        outputs[name] = generate(prompts, new_tokens)
        rates[name] = len(prompts) * new_tokens / (time.perf_counter() - started)
        if any(len(ids) != new_tokens for ids in outputs[name]):
            raise RuntimeError(f"{name} did not generate {new_tokens} tokens for every prompt")
    return rates, outputs


def measure(sides: dict[str, Generate], args: argparse.Namespace, batch_size: int) -> tuple[list[Figures], float]:
    """(figures of each side, share of the sequences on which the sides agree); a short warm-up round is not counted."""
    rng = np.random.default_rng(batch_size)

    def prompts() -> list[list[int]]:
        return rng.integers(2, CONFIG["vocab_size"], size=(batch_size, args.input_len)).tolist()

    warm, _ = timed_round(sides, prompts(), max(1, args.output_len // 4))
    ours, *theirs = sides
    fastest = max((warm[name] for name in theirs), default=0.0)
    kept = {name: sides[name] for name in sides if name == ours or warm[name] * HOPELESS >= fastest}
    rates: dict[str, list[float]] = {name: [] for name in kept}
    same = total = 0
    for _ in range(args.rounds):
        found, outputs = timed_round(kept, prompts(), args.output_len)
        for name, rate in found.items():
            rates[name].append(rate)
        for name in kept:
            if name != ours:
                same += sum(a == b for a, b in zip(outputs[ours], outputs[name], strict=True))
                total += batch_size
    return [Figures.of(name, batch_size, values) for name, values in rates.items()], same / max(1, total)


def report(figures: list[Figures], agreement: float) -> None:
    ours, *theirs = figures
    for row in figures:
        print(f"  {row.name:34s} {row.min:9.1f} / {row.median:9.1f} / {row.max:9.1f}")
    if theirs:
        best = max(theirs, key=lambda row: row.median)
        print(f"  ratio of medians to the fastest of transformers ({best.name}): {ours.median / best.median:.2f}")
        print(f"  sequences with the same tokens: {100 * agreement:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-only", action="store_true", help="Leave transformers out.")
    parser.add_argument("--checkpoint", type=Path, help="Folder for the model. Default: a temporary folder, kept.")
    parser.add_argument("--result-file", help="Write all figures as one JSON object.")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    folder = make_checkpoint(args.checkpoint)
    print(f"{describe_machine()}, transformers {transformers.__version__}; {torch.get_num_threads()} threads")
    print(f"{args.input_len} tokens in, {args.output_len} out, float32, greedy; output tokens/s min / median / max")
    everything = []
    with sglang.Engine(model_path=str(folder), log_level="error", max_running_requests=max(args.batch_size)) as engine:
        sides = {"sglang-amd": engine_side(engine)}
        if not args.engine_only:
            for attention, experts in HF_VARIANTS:
                name = f"transformers {attention} + {experts}"
                sides[name] = transformers_side(folder, attention, experts)
        for batch_size in args.batch_size:
            print(f"batch {batch_size}", flush=True)
            figures, agreement = measure(sides, args, batch_size)
            report(figures, agreement)
            everything += [asdict(row) for row in figures]
    if args.result_file:
        Path(args.result_file).write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
