"""Two GPUs give the tokens of one: experts over both under graphs, attention groups, streams, cuts and rounds.

    python benchmark/two_gpu/identity.py [--models dsv3-k q35moe-k] [--only NAME ...] [--embedded NAME ...] [--kill]
    python benchmark/two_gpu/identity.py --drafts [--models dsv3-k dsv4-k] [--only NAME ...] [--seconds 280]

Kernel-sized checkpoints with random weights in float32, made by transformers; greedy tokens of single prompts and of 64
at once, through the Engine. Every mode that changes a token is named, and the exit status is 1. With ``--embedded`` the
trained models answer their held-out questions instead, and the scores are compared. With ``--kill`` one rank of two is
killed in the middle of a reply, and the client must be told which.

With ``--drafts`` the modes are those of speculation, and of DeepSeek V4 with and without it, greedy and sampled,
against one GPU without speculation. Weights are dummies of a vocabulary of 16 ids, so drafts of an untrained layer are
accepted now and then; a mode in which none was, none was rejected, no rank was idle or a graph was refused fails too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.platforms import current_platform
from sglang.test.tiny_checkpoints import COMPRESSED_CONFIGS, KERNEL_SIZED_CONFIGS, save_tiny_checkpoint
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, heldout_questions

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MORI = {"tp_size": 2, "moe_a2a_backend": "mori"}
SERIAL = {"SGLANG_STREAM_SITES": "deepseek.shared_experts=off,qwen3_5.shared_experts=off"}
OVERLAPPED = {"SGLANG_STREAM_SITES": "deepseek.shared_experts=on,qwen3_5.shared_experts=on"}


@dataclass(frozen=True)
class Mode:
    """Settings of the Engine, and variables."""

    name: str
    settings: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)


MODES = (
    Mode("all-reduce", {"tp_size": 2, "ep_size": 2}),
    Mode("gathered groups", {"tp_size": 2, "ep_size": 2, **GROUPS}),
    Mode("normal", {**MORI}, SERIAL),
    Mode("normal, two streams", {**MORI}, OVERLAPPED),
    Mode("groups, normal", {**MORI, **GROUPS}, SERIAL),
    Mode("groups, normal, two streams", {**MORI, **GROUPS}, OVERLAPPED),
    Mode("groups, low latency, two streams", {**MORI, **GROUPS, "deepep_mode": "low_latency"}, OVERLAPPED),
    Mode("groups, rounds", {**MORI, **GROUPS}, {"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": "40"}),
    Mode("groups, cut by hand", {**MORI, **GROUPS}, {"SGLANG_MORI_MOE_MAX_INPUT_TOKENS": "16"}),
    Mode("groups, no graphs", {**MORI, **GROUPS, "disable_cuda_graph": True}),
    Mode("groups, no overlap", {**MORI, **GROUPS, "disable_overlap_schedule": True}),
)


def drafts(num_steps: int) -> dict[str, Any]:
    return {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps}


# Those most worth their time first.
DRAFT_MODES = (
    Mode("groups, 3 drafts", {**MORI, **GROUPS, **drafts(3)}),
    Mode("gathered groups, 3 drafts", {"tp_size": 2, "ep_size": 2, **GROUPS, **drafts(3)}),
    Mode("normal, 3 drafts", {**MORI, **drafts(3)}),
    Mode("groups, 1 draft", {**MORI, **GROUPS, **drafts(1)}),
    Mode("groups, no drafts", {**MORI, **GROUPS}),
    Mode("groups, 3 drafts, no graphs", {**MORI, **GROUPS, **drafts(3), "disable_cuda_graph": True}),
    Mode("groups, low latency, two streams, 3 drafts",
         {**MORI, **GROUPS, **drafts(3), "deepep_mode": "low_latency"}, OVERLAPPED),
    Mode("groups, rounds, 3 drafts", {**MORI, **GROUPS, **drafts(3)}, {"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": "40"}),
    Mode("groups, 3 drafts, no overlap", {**MORI, **GROUPS, **drafts(3), "disable_overlap_schedule": True}),
    Mode("all-reduce, 3 drafts", {"tp_size": 2, "ep_size": 2, **drafts(3)}),
)  # fmt: skip
DRAFT_MODELS = {
    "dsv3-k": "DeepseekV3ForCausalLM", "q35moe-k": "Qwen3_5MoeForCausalLM", "dsv4-k": "DeepseekV4ForCausalLM",
}  # fmt: skip
VOCAB = 16


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 90, (64,), generator=generator).tolist()
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]


def tokens(model: str, mode: Mode) -> list[list[int]]:
    """Output ids of three prompts alone, then of all at once."""
    options = {"max_total_tokens": 16384, "max_running_requests": 64, "random_seed": 1, "dtype": "float32"}
    options |= {"cuda_graph_bs": [1, 4, 16, 32, 64], "skip_server_warmup": True, "log_level": "error"}
    options["skip_tokenizer_init"] = True
    asked = prompts()
    with mock.patch.dict(os.environ, mode.variables), Engine(model_path=model, **options, **mode.settings) as engine:
        results = [engine.generate(input_ids=ids, sampling_params=GREEDY) for ids in asked[:3]]
        results += engine.generate(input_ids=asked, sampling_params=GREEDY)
    return [result["output_ids"] for result in results]


def write_draft_model(name: str, folder: str) -> None:
    """A config with an MTP layer, for dummy weights."""
    sizes = {**KERNEL_SIZED_CONFIGS, **COMPRESSED_CONFIGS}[name] | {"vocab_size": VOCAB, "rms_norm_eps": 1e-6}
    layer = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
    os.makedirs(folder, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps({"architectures": [DRAFT_MODELS[name]], **sizes, **layer}))


def drafted_tokens(model: str, mode: Mode, count: int) -> list[list[int]]:
    """Output ids of two prompts alone, then of ``count`` at once, which end after different numbers of tokens."""
    options = {"max_total_tokens": 40960, "max_running_requests": 32, "random_seed": 1, "dtype": "float32"}
    options |= {"cuda_graph_bs": [1, 8, 32], "skip_server_warmup": True, "skip_tokenizer_init": True}
    options |= {"load_format": "dummy", "log_level": "error", "watchdog_timeout": 90}
    generator = torch.Generator().manual_seed(11)
    lengths = [280, 1, *torch.randint(1, 90, (count - 2,), generator=generator).tolist()]
    asked = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    warmth = [{"temperature": 0.7 * (number % 2), "sampling_seed": number} for number in range(count)]
    params = [{"max_new_tokens": 8 + number % 24, "ignore_eos": True, **each} for number, each in enumerate(warmth)]
    with mock.patch.dict(os.environ, mode.variables), Engine(model_path=model, **options, **mode.settings) as engine:
        results = [engine.generate(input_ids=ids, sampling_params=each) for ids, each in zip(asked[:2], params)]
        results += engine.generate(input_ids=asked, sampling_params=params)
        states = engine.get_server_info()["internal_states"]
    expect_events(mode, states)
    return [result["output_ids"] for result in results]


def expect_events(mode: Mode, states: list[dict[str, Any]]) -> None:
    """RuntimeError unless what the mode is about has happened."""
    refused = {kind: each["refused"] for state in states for kind, each in state["graphs"].items() if each["refused"]}
    made, accepted = (sum(state[name] for state in states) for name in ("num_drafts", "num_accepted_drafts"))
    idle = [state["num_idle_steps"] for state in states]
    if mode.settings:
        print(f"          {accepted} of {made} drafts accepted, idle steps {idle}", flush=True)
    problems = {
        f"graphs were refused: {refused}": refused,
        "nothing was accepted, or nothing rejected": "speculative_algorithm" in mode.settings
        and not 0 < accepted < made,
        "no group was idle": "dp_size" in mode.settings and not all(idle),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise RuntimeError("; ".join(found))


def score(model: str, mode: Mode) -> int:
    """Held-out questions answered, one at a time and 64 at once."""
    questions = heldout_questions(64, seed=5)
    options = {"max_total_tokens": 16384, "max_running_requests": 64, "random_seed": 1, "dtype": "float32"}
    params = {"temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS}
    with (
        mock.patch.dict(os.environ, mode.variables),
        Engine(model_path=model, skip_server_warmup=True, log_level="error", **options, **mode.settings) as engine,
    ):
        replies = [engine.generate(question.text, params) for question in questions[:8]]
        replies += engine.generate([question.text for question in questions], params)
    asked = questions[:8] + questions
    return sum(reply["text"].strip() == question.answer for question, reply in zip(asked, replies, strict=True))


def kill_one_rank(model: str, mode: Mode) -> bool:
    """Whether the other rank's client learns within the watchdog's time that the second rank was killed."""
    with (
        mock.patch.dict(os.environ, mode.variables),
        Engine(
            model_path=model, skip_server_warmup=True, log_level="error", max_total_tokens=16384, **mode.settings
        ) as engine,
    ):
        stream = engine.generate("27+58=", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
        next(stream)
        victim = next(child for child in engine._processes.processes if "TP1" in child.name)
        os.kill(victim.popen.pid, signal.SIGKILL)
        began = time.perf_counter()
        try:
            for _ in stream:
                pass
            told = "the reply ended as if nothing had happened"
        except RuntimeError as error:
            told = str(error)
        seconds = time.perf_counter() - began
    good = victim.name in told
    print(f"{'named    ' if good else 'UNNAMED  '} {mode.name}: {victim.name} killed, after {seconds:.1f} s: {told}")
    return good


def check(name: str, model: str, modes: list[Mode], measure: Any, ends: float) -> bool:
    began = time.perf_counter()
    wanted = measure(model, Mode("one GPU", {}))
    print(f"one GPU   {name}, {time.perf_counter() - began:.0f} s", flush=True)
    good = True
    for mode in modes:
        began = time.perf_counter()
        if began > ends:
            print(f"not run   {name} {mode.name}: no time is left")
            continue
        try:
            found = measure(model, mode)
        except Exception as error:  # a mode that cannot run is a failure with its reason, and the next one is tried
            found = f"{type(error).__name__}: {error}"
        same = found == wanted
        good &= same
        detail = "" if same else f": {_difference(wanted, found)}"
        verdict = "same     " if same else "DIFFERENT"
        print(f"{verdict} {name} {mode.name}, {time.perf_counter() - began:.0f} s{detail}", flush=True)
    return good


def _difference(wanted: Any, found: Any) -> str:
    if not isinstance(found, list):
        return f"{found} instead of {wanted if isinstance(wanted, int) else 'tokens'}"
    rows = [row for row, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
    return f"{len(rows)} of {len(wanted)} outputs, rows {rows[:8]}"


def main() -> None:
    modes_of = {mode.name: mode for mode in (*MODES, *DRAFT_MODES)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted({*KERNEL_SIZED_CONFIGS, *DRAFT_MODELS}))
    parser.add_argument("--only", nargs="+", choices=list(modes_of))
    parser.add_argument("--embedded", nargs="+", choices=list(EMBEDDED_MODELS), default=[])
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--drafts", action="store_true")
    parser.add_argument("--count", type=int, default=64, help="requests at once, with --drafts")
    parser.add_argument("--seconds", type=float, default=1e9, help="no mode starts later")
    args = parser.parse_args()
    modes = [mode for mode in (DRAFT_MODES if args.drafts else MODES) if args.only is None or mode.name in args.only]
    print(f"# {current_platform.describe()}, {torch.cuda.device_count()} GPUs, torch {torch.__version__}")
    ends, good = time.perf_counter() + args.seconds, True
    if args.kill:
        model = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
        sys.exit(0 if all([kill_one_rank(model, mode) for mode in modes]) else 1)
    for name in args.embedded:
        good &= check(name, str(EMBEDDED_MODELS[name]), modes, score, ends)
    if not args.embedded:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.models or (DRAFT_MODELS if args.drafts else KERNEL_SIZED_CONFIGS):
                path = str(Path(folder, name))
                if args.drafts:
                    write_draft_model(name, path)
                    good &= check(name, path, modes, partial(drafted_tokens, count=args.count), ends)
                else:
                    save_tiny_checkpoint(name, path)
                    good &= check(name, path, modes, tokens, ends)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
