"""What output of a given form costs: the same batch with and without a form, alternately, in one process.

    python benchmark/structured_output/bench_structured.py

Every request decodes --output-len tokens: with a form, texts in a JSON list that is long enough; without one, past the
end of the sequence. Printed are seconds of all decode steps (min / median / max), by the clock and of the CPU,
and the ratio in the pairs of turns: geometric mean and 95 % interval. On a CPU masks are made after the forward; on a
GPU next to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import GuidanceBackend, grammar_of
from sglang.srt.managers.grammar_manager import GrammarManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.bench_checkpoint import make_checkpoint
from sglang.test.device_time import describe_machine
from sglang.test.engine_harness import EngineHarness
from sglang.test.paired import paired_ratio, rounds_within

SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"type": "string", "pattern": "^[A-Za-z ]{3,30}$"},
                                               "size": {"type": "integer", "minimum": 0, "maximum": 99999}},
              "required": ["name", "size"], "additionalProperties": False},
    "minItems": 1000,
}  # fmt: skip


def serve(engine: EngineHarness, grammar: str | None, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the end of the prefill to the end of the batch, by the clock and of the CPU."""
    prompts = np.random.default_rng(seed).integers(2, engine.model_config.vocab_size, (args.batch_size, args.input_len))
    params = SamplingParams(max_new_tokens=args.output_len, temperature=args.temperature, ignore_eos=True)
    engine.results.clear()
    for number, prompt in enumerate(prompts.tolist()):
        engine.submit(f"{seed} {number}", prompt, params, grammar=grammar)
    while len(engine.scheduler.running_reqs) < args.batch_size:
        engine.step()
    began, cpu = time.perf_counter(), time.process_time()
    results = engine.run()
    seconds = time.perf_counter() - began, time.process_time() - cpu
    lengths = {len(result.output_ids) for result in results.values()}
    assert lengths == {args.output_len}, f"outputs of {lengths} tokens"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=600.0, help="Fewer rounds where they take longer than this.")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--model-path", type=Path, help="Default: the checkpoint of the decode bench.")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--tokenizer-path", help="Default: that of an embedded model.")
    args = parser.parse_args()
    print(describe_machine())
    folder = str(args.model_path or make_checkpoint())
    size = args.batch_size * (args.input_len + args.output_len + 16)
    engine = EngineHarness(
        folder, load_format=args.load_format, max_running_requests=args.batch_size, max_total_tokens=2 * size,
        overlap=torch.cuda.is_available(), chunked_prefill_size=args.batch_size * args.input_len,
        max_prefill_tokens=args.batch_size * args.input_len,
    )  # fmt: skip
    tokenizer = Tokenizer.from_path(args.tokenizer_path or str(EMBEDDED_MODELS["qwen3.5-moe-tiny"]))
    vocab = engine.model_config.vocab_size
    backend = GuidanceBackend(tokenizer.to_json(), vocab, [*tokenizer.eos_token_ids])
    engine.scheduler.grammars = GrammarManager(backend)
    grammar = grammar_of("json_schema", json.dumps(SCHEMA), {"whitespace_flexible": False})
    print(f"{folder}, vocabulary {vocab} ({tokenizer.vocab_size} with text), batch {args.batch_size}, "
          f"{args.input_len} tokens in, {args.output_len} out")  # fmt: skip
    turns: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    for number in rounds_within(args.rounds, args.seconds):
        for name in ("without", "with") if number % 2 else ("with", "without"):
            seconds = serve(engine, grammar if name == "with" else None, number, args)
            if number:
                turns[name].append(seconds)
    for index, clock in enumerate(("clock", "CPU")):
        columns = {name: [seconds[index] for seconds in pairs] for name, pairs in turns.items()}
        for name, values in columns.items():
            print(f"{clock:5s} {name:7s} {min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f} s")
        print(f"{clock:5s} with over without: {paired_ratio(columns['without'], columns['with'])}")


if __name__ == "__main__":
    main()
