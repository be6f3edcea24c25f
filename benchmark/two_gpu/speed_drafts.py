"""What speculation costs and gives over two GPUs that share the experts: time per step, and the break-even length.

    python benchmark/two_gpu/speed_drafts.py [--models v3 v4] [--batches 1 8 32] [--steps 0 1 3] [--seconds 200]
    python benchmark/two_gpu/speed_drafts.py --models v4-fp8 --steps 0 --exchanges default rounds "one stream"

Layers of published sizes with dummy weights of 16 or 8 bits, attention groups over MORI's protocol, every step
captured. Each group has ``--batches`` requests of 128 tokens. Time per step is taken between two lengths of the answer,
so that no prefill counts. Drafts of an untrained layer are wrong, so a step of speculation gives one token: its time
over that of a step without is the break-even length: speculation gains from so many tokens per step on. TPOT at other
lengths follows. Next to so few layers (V3: 4, V4-Flash: 8) the layer that drafts weighs more than next to all of them.
``--exchanges`` names ways to exchange tokens and to run shared experts, each in an Engine of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.platforms import current_platform
from sglang.test.published_sizes import BLOCK_FP8, DEEPSEEK_V3, DEEPSEEK_V4_FLASH_8L

# Tokens per step for which TPOT is shown.
LENGTHS = (1.0, 1.8, 2.6)
SHORT, LONG, PROMPT = 8, 72, 128
# Of the pool, for each request: V4 takes pages of 256 tokens.
REQUEST_TOKENS = 1024
# Latency of the last answer over that of the first; above it requests waited, and the time is not that of one step.
WAITED = 1.5

MODELS = {
    "v3": {**DEEPSEEK_V3, "num_hidden_layers": 4, "num_nextn_predict_layers": 1},
    "v4": DEEPSEEK_V4_FLASH_8L,
    "v4-fp8": {**DEEPSEEK_V4_FLASH_8L, "quantization_config": BLOCK_FP8},
    # For a trial on a CPU.
    "small": {
        **DEEPSEEK_V3, "num_hidden_layers": 3, "num_nextn_predict_layers": 1,
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
        "vocab_size": 1024, "q_lora_rank": 64, "kv_lora_rank": 64,
    },
}  # fmt: skip

# Settings of the Engine, and variables.
EXCHANGES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "default": ({}, {}),
    "rounds": ({}, {"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": "40"}),
    "one stream": ({}, {"SGLANG_STREAM_SITES": "deepseek.shared_experts=off"}),
    "low latency": ({"deepep_mode": "low_latency"}, {}),
}


def step_ms(engine: Engine, batch: int, runs: int) -> list[float]:
    """Milliseconds per step of ``batch`` requests at once, of several runs."""

    def answer(tokens: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(3, 1000, (batch, PROMPT), generator=generator).tolist()
        params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        began = time.perf_counter()
        replies = engine.generate(input_ids=prompts, sampling_params=params)
        took = time.perf_counter() - began
        told = [reply["meta_info"] for reply in replies]
        ends = sorted(each["e2e_latency"] for each in told)
        if ends[-1] > WAITED * ends[0]:
            raise RuntimeError(f"{tokens} tokens took {ends[0]:.3f} to {ends[-1]:.3f} s: some waited for memory")
        return took, statistics.fmean(each.get("spec_verify_ct") or tokens - 1 for each in told)

    found = []
    for run in range(runs + 1):
        short, long = answer(SHORT), answer(LONG)
        if run:
            found.append((long[0] - short[0]) / (long[1] - short[1]) * 1e3)
    return found


def bench(folder: str, num_steps: int, exchange: str, args: argparse.Namespace) -> dict[int, list[float]]:
    """Times per step by requests of a group, with chains of ``num_steps`` drafts."""
    of_exchange, variables = EXCHANGES[exchange]
    settings: dict[str, Any] = {"tp_size": args.world, "cuda_graph_bs": args.batches, "random_seed": 1}
    if args.world > 1:
        settings |= {"dp_size": args.world, "enable_dp_attention": True, "moe_a2a_backend": "mori"}
    if num_steps:
        settings |= {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps}
    sizes = {"max_running_requests": max(args.batches), "max_total_tokens": REQUEST_TOKENS * max(args.batches)}
    with mock.patch.dict(os.environ, variables), Engine(
        model_path=folder, load_format="dummy", context_length=2048, skip_tokenizer_init=True, log_level="error",
        skip_server_warmup=True, disable_radix_cache=True, **sizes, **settings, **of_exchange,
    ) as engine:  # fmt: skip
        found = {batch: step_ms(engine, batch * args.world, args.runs) for batch in args.batches}
        state = engine.get_server_info()["internal_states"][0]
    refused = {kind: told["refused"] for kind, told in state["graphs"].items() if told["refused"]}
    if refused:
        print(f"  graphs were refused, and ran eagerly: {refused}")
    return found


def table(times: dict[int, dict[int, list[float]]]) -> list[str]:
    """Lines of one model: times by number of drafts, then by requests of a group."""
    lines = []
    for batch, plain in times[0].items():
        base = statistics.median(plain)
        lines.append(f"  {batch:>3} requests per group: {base:.3f} ms per step ({min(plain):.3f} .. {max(plain):.3f})")
        for steps in (steps for steps in times if steps):
            took = statistics.median(times[steps][batch])
            spread = f"{min(times[steps][batch]):.3f} .. {max(times[steps][batch]):.3f}"
            tpot = ", ".join(f"{base * length / took:.2f} at {length}" for length in LENGTHS if length <= steps + 1)
            lines.append(
                f"      {steps} drafts: {took:.3f} ms per step ({spread}), break-even at {took / base:.2f} tokens per "
                f"step; TPOT without over with: {tpot}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["v3", "v4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 3, 1], help="drafts of a chain; 0 goes first")
    parser.add_argument("--exchanges", nargs="+", choices=list(EXCHANGES), default=["default"])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="no server starts later")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    print(f"# {args.world} x {current_platform.describe()}, torch {torch.__version__}")
    ends = time.perf_counter() + args.seconds
    with tempfile.TemporaryDirectory() as holder:
        for name in args.models:
            folder = Path(holder, name)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(MODELS[name]))
            for exchange in args.exchanges:
                times: dict[int, dict[int, list[float]]] = {}
                for steps in sorted(args.steps, key=bool):
                    if time.perf_counter() < ends:
                        began = time.perf_counter()
                        times[steps] = bench(str(folder), steps, exchange, args)
                        print(f"  {name}, {steps} drafts: {time.perf_counter() - began:.0f} s in all", flush=True)
                if 0 in times:
                    title = f"{name}, {exchange}: median (min .. max) of {args.runs} runs"
                    print(title, *table(times), sep="\n", flush=True)


if __name__ == "__main__":
    main()
