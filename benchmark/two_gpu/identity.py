"""Two GPUs give the tokens of one: experts over both under graphs, attention groups, streams, cuts and rounds.

    python benchmark/two_gpu/identity.py [--models dsv3-k q35moe-k] [--only NAME ...] [--embedded NAME ...] [--kill]

Kernel-sized checkpoints with random weights in float32, made by transformers; greedy tokens of single prompts and of 64
at once, through the Engine. Every mode that changes a token is named, and the exit status is 1. With ``--embedded`` the
trained models answer their held-out questions instead, and the scores are compared. With ``--kill`` one rank of two is
killed in the middle of a reply, and the client must be told which.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.platforms import current_platform
from sglang.test.tiny_checkpoints import KERNEL_SIZED_CONFIGS, save_tiny_checkpoint
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, heldout_questions

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MORI = {"tp_size": 2, "moe_a2a_backend": "mori"}
SERIAL = {"SGLANG_STREAM_SITES": "deepseek.shared_experts=off,qwen3_5.shared_experts=off"}
BESIDE = {"SGLANG_STREAM_SITES": "deepseek.shared_experts=on,qwen3_5.shared_experts=on"}


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
    Mode("normal, two streams", {**MORI}, BESIDE),
    Mode("groups, normal", {**MORI, **GROUPS}, SERIAL),
    Mode("groups, normal, two streams", {**MORI, **GROUPS}, BESIDE),
    Mode("groups, low latency, two streams", {**MORI, **GROUPS, "deepep_mode": "low_latency"}, BESIDE),
    Mode("groups, rounds", {**MORI, **GROUPS}, {"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": "40"}),
    Mode("groups, cut by hand", {**MORI, **GROUPS}, {"SGLANG_MORI_MOE_MAX_INPUT_TOKENS": "16"}),
    Mode("groups, no graphs", {**MORI, **GROUPS, "disable_cuda_graph": True}),
    Mode("groups, no overlap", {**MORI, **GROUPS, "disable_overlap_schedule": True}),
)


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


def check(name: str, model: str, modes: list[Mode], measure: Any) -> bool:
    wanted = measure(model, Mode("one GPU", {}))
    good = True
    for mode in modes:
        began = time.perf_counter()
        try:
            found = measure(model, mode)
        except Exception as error:  # a mode that cannot run is a failure with its reason, and the next one is tried
            found = f"{type(error).__name__}: {error}"
        same = found == wanted
        good &= same
        detail = "" if same else f": {_difference(wanted, found)}"
        print(f"{'same     ' if same else 'DIFFERENT'} {name} {mode.name}, {time.perf_counter() - began:.0f} s{detail}")
    return good


def _difference(wanted: Any, found: Any) -> str:
    if not isinstance(found, list):
        return f"{found} instead of {wanted if isinstance(wanted, int) else 'tokens'}"
    rows = [row for row, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
    return f"{len(rows)} of {len(wanted)} outputs, rows {rows[:8]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(KERNEL_SIZED_CONFIGS), default=list(KERNEL_SIZED_CONFIGS))
    parser.add_argument("--only", nargs="+", choices=[mode.name for mode in MODES])
    parser.add_argument("--embedded", nargs="+", choices=list(EMBEDDED_MODELS), default=[])
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    modes = [mode for mode in MODES if args.only is None or mode.name in args.only]
    print(f"# {current_platform.describe()}, {torch.cuda.device_count()} GPUs")
    good = True
    if args.kill:
        model = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
        sys.exit(0 if all([kill_one_rank(model, mode) for mode in modes]) else 1)
    for name in args.embedded:
        good &= check(name, str(EMBEDDED_MODELS[name]), modes, score)
    if not args.embedded:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.models:
                save_tiny_checkpoint(name, str(Path(folder, name)))
                good &= check(name, str(Path(folder, name)), modes, tokens)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
