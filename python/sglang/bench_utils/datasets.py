"""Prompts for benchmarks: random lengths, shared prefixes, and local ShareGPT or JSONL files; nothing is downloaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang.srt.utils.hf_tokenizer import Tokenizer

DATASET_NAMES = ("sharegpt", "random", "random-ids", "generated-shared-prefix", "custom")
# Known from upstream; each needs a download or an input other than text.
UPSTREAM_ONLY_DATASETS = ("image", "mmmu", "mooncake", "longbench_v2", "openai", "random-image")
# Text that is cut after a token may be tokenized differently; this many corrections are tried.
MAX_CORRECTIONS = 10
SHORTEST_SHAREGPT_TOKENS = 2


class DatasetError(ValueError):
    """The requested prompts cannot be made; the message states why and what to do."""


@dataclass(frozen=True)
class DatasetRow:
    """One request: its prompt as text or ids, the prompt's length and the tokens to generate."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose and shape the prompts."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset-name", default="sharegpt", choices=(*DATASET_NAMES, *UPSTREAM_ONLY_DATASETS), metavar="NAME",
        help=f"One of {', '.join(DATASET_NAMES)}. Default: sharegpt.",
    )  # fmt: skip
    group.add_argument("--dataset-path", default="", help="Local file of sharegpt, custom or random prompts.")
    group.add_argument("--num-prompts", type=int, default=1000, help="Requests to send. Default: 1000.")
    group.add_argument("--sharegpt-output-len", type=int, help="Tokens to generate instead of the file's answers.")
    group.add_argument("--sharegpt-context-len", type=int, help="Leave out what is longer, prompt and output.")
    group.add_argument("--random-input-len", type=int, default=1024, help="Longest random prompt. Default: 1024.")
    group.add_argument("--random-output-len", type=int, default=1024, help="Longest random output. Default: 1024.")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0,
        help="Shortest random length over the longest; 1.0 fixes the lengths. Default: 0.0.",
    )  # fmt: skip
    group.add_argument("--gsp-num-groups", type=int, default=64, help="Shared system prompts. Default: 64.")
    group.add_argument("--gsp-prompts-per-group", type=int, default=16, help="Requests for each. Default: 16.")
    group.add_argument("--gsp-system-prompt-len", type=int, default=2048, help="Tokens. Default: 2048.")
    group.add_argument("--gsp-question-len", type=int, default=128, help="Tokens. Default: 128.")
    group.add_argument("--gsp-output-len", type=int, default=256, help="Tokens. Default: 256.")
    group.add_argument("--tokenize-prompt", action="store_true", help="Send token ids: lengths are then exact.")
    group.add_argument("--apply-chat-template", action="store_true", help="Wrap sharegpt and custom prompts.")
    group.add_argument("--seed", type=int, default=1, help="Seed of prompts, lengths and arrivals. Default: 1.")


def length_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The length flags for a result record."""
    names = ("sharegpt_output_len", "random_input_len", "random_output_len", "random_range_ratio")
    return {name: getattr(args, name) for name in names}


def get_dataset(args: argparse.Namespace, tokenizer: Tokenizer) -> list[DatasetRow]:
    """The requests for ``args``; the same flags and seed give the same requests."""
    rng = np.random.default_rng(args.seed)
    name = args.dataset_name
    if name in UPSTREAM_ONLY_DATASETS:
        raise DatasetError(
            f"--dataset-name {name} is known from upstream but not implemented here: use {', '.join(DATASET_NAMES)}"
        )
    if args.num_prompts < 1:
        raise DatasetError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    if name == "generated-shared-prefix":
        return sample_shared_prefix(args, tokenizer, rng)
    if name == "random-ids" or (name == "random" and not args.dataset_path):
        if name == "random":
            print("--dataset-name random without --dataset-path: prompts are random tokens, as with random-ids")
        return sample_random(args, tokenizer, rng)
    if not args.dataset_path:
        raise DatasetError(f"--dataset-name {name} needs --dataset-path with a local file: nothing is downloaded")
    conversations = _read_conversations(args.dataset_path, name)
    if name == "random":
        return sample_random(args, tokenizer, rng, [prompt for prompt, _ in conversations])
    return sample_conversations(args, tokenizer, rng, conversations)


def random_lengths(rng: np.random.Generator, longest: int, ratio: float, count: int) -> list[int]:
    """``count`` lengths, uniform between ``longest * ratio`` (at least 1) and ``longest``, both included."""
    if longest < 1 or not 0.0 <= ratio <= 1.0:
        raise DatasetError(f"lengths must be at least 1 and --random-range-ratio in [0, 1], got {longest} and {ratio}")
    return rng.integers(max(int(longest * ratio), 1), longest + 1, size=count).tolist()


def sample_random(
    args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator, texts: Sequence[str] = ()
) -> list[DatasetRow]:
    """Prompts of random length: random tokens, or ``texts`` in random order, repeated or cut to the length."""
    inputs = random_lengths(rng, args.random_input_len, args.random_range_ratio, args.num_prompts)
    outputs = random_lengths(rng, args.random_output_len, args.random_range_ratio, args.num_prompts)
    pieces = [ids for text in texts if (ids := tokenizer.encode(text, add_special_tokens=False))]
    if texts and not pieces:
        raise DatasetError(f"{args.dataset_path} contains no prompt with a token in it")
    order = rng.permutation(len(pieces)).tolist()
    vocab = ordinary_ids(tokenizer)
    rows = []
    for index, (length, output_len) in enumerate(zip(inputs, outputs, strict=True)):
        if pieces:
            ids = pieces[order[index % len(order)]]
            ids = (ids * (length // len(ids) + 1))[:length]
        else:
            ids = _draw(rng, vocab, length)
        rows.append(_row(ids, length, output_len, args.tokenize_prompt, tokenizer))
    return rows


def sample_shared_prefix(args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator) -> list[DatasetRow]:
    """Groups of prompts that share a system prompt and differ in the question, shuffled."""
    vocab = ordinary_ids(tokenizer)
    total = args.gsp_system_prompt_len + args.gsp_question_len
    rows = []
    for _ in range(args.gsp_num_groups):
        system = _draw(rng, vocab, args.gsp_system_prompt_len)
        shared = tokenizer.decode(system)
        for _ in range(args.gsp_prompts_per_group):
            question = _draw(rng, vocab, args.gsp_question_len)
            if args.tokenize_prompt:
                rows.append(DatasetRow(system + question, total, args.gsp_output_len))
                continue
            text = f"{shared}\n\n{tokenizer.decode(question)}"
            rows.append(DatasetRow(text, len(tokenizer.encode(text)), args.gsp_output_len))
    if not rows:
        raise DatasetError("--gsp-num-groups and --gsp-prompts-per-group must be at least 1")
    return [rows[i] for i in rng.permutation(len(rows))]


def sample_conversations(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    conversations: Sequence[tuple[str, str | int]],
) -> list[DatasetRow]:
    """First turns of a file in random order, with the output length of its answers, or the fixed one of the flag."""
    fixed = args.sharegpt_output_len
    if fixed is not None and fixed < 1:
        raise DatasetError(f"--sharegpt-output-len must be at least 1, got {fixed}")
    is_sharegpt = args.dataset_name == "sharegpt"
    rows: list[DatasetRow] = []
    for index in rng.permutation(len(conversations)):
        if len(rows) == args.num_prompts:
            break
        prompt, answer = conversations[index]
        if args.apply_chat_template:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = tokenizer.encode(prompt)
        output_len = fixed or (answer if isinstance(answer, int) else len(tokenizer.encode(answer, False)))
        if is_sharegpt and min(len(ids), output_len) < SHORTEST_SHAREGPT_TOKENS:
            continue
        if args.sharegpt_context_len and len(ids) + output_len > args.sharegpt_context_len:
            continue
        if not ids or output_len < 1:
            raise DatasetError(f"{args.dataset_path}: prompt {prompt!r:.60} or its answer has no token")
        rows.append(DatasetRow(ids if args.tokenize_prompt else prompt, len(ids), output_len))
    if len(rows) < args.num_prompts:
        print(f"{args.dataset_path} gives {len(rows)} of the {args.num_prompts} requested prompts")
    if not rows:
        raise DatasetError(f"{args.dataset_path} contains no usable prompt")
    return rows


def _read_conversations(path: str, name: str) -> list[tuple[str, str | int]]:
    """(first prompt, its answer as text or as a number of tokens) of each entry of a JSON list or JSONL file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_list = text.lstrip().startswith("[")
        entries = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DatasetError(f"--dataset-path {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"--dataset-path {path} is neither a JSON list nor JSON lines: {error}") from None
    found = [turns for entry in entries if (turns := _turns(entry)) is not None]
    if not found:
        raise DatasetError(
            f"--dataset-path {path} has no usable entry for --dataset-name {name}: each needs 'conversations' with at "
            "least two turns (each 'value' or 'content'), or 'prompt' with 'output_len'"
        )
    return found


def _turns(entry: Any) -> tuple[str, str | int] | None:
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("prompt"), str):
        answer = entry.get("output_len", entry.get("completion"))
        return (entry["prompt"], answer) if isinstance(answer, (int, str)) else None
    turns = entry.get("conversations") or entry.get("conversation") or []
    texts = [turn.get("value", turn.get("content")) for turn in turns if isinstance(turn, dict)]
    if len(texts) < 2 or not isinstance(texts[0], str) or not isinstance(texts[1], str):
        return None
    return texts[0], texts[1]


def ordinary_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids that stand for whole characters: the vocabulary without special tokens and parts of characters."""
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids]
    whole = [i for i in ids if (text := tokenizer.decode([i])) and "\ufffd" not in text]
    if not whole:
        raise DatasetError("the tokenizer has no token that is text: no prompt can be made of it")
    return np.array(whole)


def _draw(rng: np.random.Generator, vocab: np.ndarray, count: int) -> list[int]:
    return vocab[rng.integers(0, len(vocab), size=count)].tolist()


def _row(ids: list[int], length: int, output_len: int, as_ids: bool, tokenizer: Tokenizer) -> DatasetRow:
    if as_ids:
        return DatasetRow(ids, length, output_len)
    text, got = text_of_length(tokenizer, ids, length)
    return DatasetRow(text, got, output_len)


def text_of_length(tokenizer: Tokenizer, ids: list[int], length: int) -> tuple[str, int]:
    """(text made of ``ids`` that encodes to ``length`` tokens, its length); special tokens that encoding adds count.

    Not every length is possible: the true length is returned; it differs in the rare case that no correction helps.
    """
    added = len(tokenizer.encode(""))
    wanted = max(1, length - added)
    text = tokenizer.decode(ids[:wanted])
    for _ in range(MAX_CORRECTIONS):
        body = tokenizer.encode(text, add_special_tokens=False)
        if len(body) == wanted:
            break
        body = body[:wanted] if len(body) > wanted else body + (ids * (wanted // len(ids) + 1))[: wanted - len(body)]
        text = tokenizer.decode(body)
    return text, len(tokenizer.encode(text))
