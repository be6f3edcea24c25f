"""Exact-match score of a running server on held-out questions: `python -m sglang.test.run_eval`.

Greedy answers are compared with the exact text expected. Exit code 0 when addition and lookups reach `--min-score`
(and, with `--compare`, transformers answers as well within `--tolerance` questions), 1 when they do not or the server
fails.
"""

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from sglang.test.tiny_tasks import (
    ADDITION,
    FAR_LOOKUP,
    LOOKUP,
    MAX_NEW_TOKENS,
    Question,
    far_lookups,
    heldout_questions,
)

GATED_TASKS = (ADDITION, LOOKUP, FAR_LOOKUP)
REQUEST_TIMEOUT_S = 3600.0
# Questions by --num-examples and --seed.
EVALS: dict[str, Callable[[int, int], list[Question]]] = {"tiny": heldout_questions, "far": far_lookups}
Answer = TypeVar("Answer")


class EvalError(RuntimeError):
    """The evaluation failed; the message states the request and the reply."""


class Client:
    """Sends questions to one server; `base_url` without a trailing path, `api` is "generate" or "chat"."""

    def __init__(self, base_url: str, api: str = "generate", api_key: str | None = None):
        self.api = api
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Loopback traffic must not go to a proxy.
        self._http = httpx.Client(
            headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=None)
        )

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def ask(self, text: str) -> str:
        """The server's greedy completion of the question `text`; EvalError when it gives none."""
        if self.api == "chat":
            messages = [{"role": "user", "content": text}]
            body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
            return self.post(
                "/v1/chat/completions", body, lambda reply: reply["choices"][0]["message"]["content"] or ""
            )
        sampling_params = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
        return self.post("/generate", {"text": text, "sampling_params": sampling_params}, lambda reply: reply["text"])

    def post(self, path: str, body: dict[str, Any], pick: Callable[[Any], Answer]) -> Answer:
        """What `pick` finds in the reply; EvalError says what came back instead of one."""
        url = self.base_url + path
        try:
            reply = self._http.post(url, json=body)
        except httpx.HTTPError as error:
            raise EvalError(
                f"POST {url} failed: {error}; is the server up, and are --host and --port its own?"
            ) from error
        if reply.status_code != 200:
            raise EvalError(f"POST {url} answered {reply.status_code}: {reply.text[:500]}")
        try:
            return pick(reply.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EvalError(f"POST {url} answered with no completion in it: {reply.text[:500]!r}") from error


def ask_all(ask: Callable[[str], Answer], texts: Sequence[str], num_threads: int) -> list[Answer]:
    """The answers in the order of the texts, asked by `num_threads` threads at a time."""
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        futures = [pool.submit(ask, text) for text in texts]
        try:
            return [future.result() for future in futures]
        except EvalError:
            pool.shutdown(cancel_futures=True)
            raise


def transformers_answers(model_path: str, questions: Sequence[Question], api: str = "generate") -> list[str]:
    """Answers of transformers' own greedy `generate` in float32 on CPU, to the prompt that the server's `api` makes."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise EvalError(
            f"--reference transformers needs transformers and torch: {error}; install the extra 'test'"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, question in enumerate(questions):
        if api == "chat":
            messages = [{"role": "user", "content": question.text}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered, add_special_tokens=False).input_ids
        else:
            ids = tokenizer(question.text).input_ids
        by_length[len(ids)].append((index, ids))
    answers = [""] * len(questions)
    # Prompts of one length at a time: without padding, batching cannot change an answer.
    for group in by_length.values():
        prompts = torch.tensor([ids for _, ids in group])
        with torch.no_grad():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        for (index, ids), row in zip(group, out.tolist()):
            answers[index] = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    return answers


def correct_by_task(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Task -> (exact matches, questions sent), for every task."""
    counts: dict[str, tuple[int, int]] = {}
    for question, given in zip(questions, answers):
        right, asked = counts.get(question.task, (0, 0))
        counts[question.task] = (right + (given == question.answer), asked + 1)
    return counts


def print_report(who: str, counts: dict[str, tuple[int, int]]) -> int:
    """Print one line per task and the overall score; returns the number of exact matches."""
    right = sum(count for count, _ in counts.values())
    asked = sum(count for _, count in counts.values())
    print(f"{who}:")
    for task, (hits, of) in counts.items():
        print(f"  {task:<10} {hits:>4} / {of:<4} exact match {hits / of:.3f}")
    print(f"Score: {right / asked:.3f}", flush=True)
    return right


def failures(counts: dict[str, tuple[int, int]], min_score: float) -> list[str]:
    """One sentence for each gated task below `min_score`."""
    return [
        f"{task} scored {counts[task][0] / counts[task][1]:.3f}, below --min-score {min_score}"
        for task in GATED_TASKS
        if task in counts and counts[task][0] < min_score * counts[task][1]
    ]


def run_eval(args: argparse.Namespace) -> list[str]:
    """Run the evaluation, print the tables, and return the reasons to fail (none: passed)."""
    questions = EVALS[args.eval_name](args.num_examples, args.seed)
    problems: list[str] = []
    answers: dict[str, list[str]] = {}
    right: dict[str, int] = {}
    if args.reference is None or args.compare:
        base_url = args.base_url or f"http://{args.host}:{args.port}"
        started = time.perf_counter()
        with contextlib.closing(Client(base_url, args.api, args.api_key)) as client:
            answers["server"] = ask_all(client.ask, [question.text for question in questions], args.num_threads)
        print(f"Total latency: {time.perf_counter() - started:.3f} s")
        counts = correct_by_task(questions, answers["server"])
        right["server"] = print_report(f"server {base_url} ({args.api})", counts)
        problems += failures(counts, args.min_score)
    if args.reference is not None:
        answers["reference"] = transformers_answers(args.model_path, questions, args.api)
        counts = correct_by_task(questions, answers["reference"])
        right["reference"] = print_report(f"transformers {args.model_path} ({args.api})", counts)
        problems += [f"transformers: {reason}" for reason in failures(counts, args.min_score)]
    if args.compare:
        difference = abs(right["server"] - right["reference"])
        differing = sum(mine != theirs for mine, theirs in zip(answers["server"], answers["reference"]))
        print(f"Difference: {difference} questions ({differing} answers differ)")
        if difference > args.tolerance:
            problems.append(f"the scores differ by {difference} questions, more than --tolerance {args.tolerance}")
    return problems


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang.test.run_eval", description=__doc__)
    parser.add_argument("--base-url", help="the server's address; overrides --host and --port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api-key")
    parser.add_argument("--api", choices=("generate", "chat"), default="generate", help="/generate or chat completions")
    parser.add_argument("--eval-name", default="tiny", help="'tiny', or 'far' for lookups 300 to 700 tokens back")
    parser.add_argument("--num-examples", type=int, default=500)
    parser.add_argument("--num-threads", type=int, default=64, help="requests in flight at a time")
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions are drawn")
    parser.add_argument("--min-score", type=float, default=0.95, help="bar for addition and for lookups")
    parser.add_argument("--reference", choices=("transformers",), help="score this on the same questions")
    parser.add_argument("--model-path", help="the checkpoint folder for --reference")
    parser.add_argument("--compare", action="store_true", help="score both and require that they agree")
    parser.add_argument("--tolerance", type=int, default=2, help="questions by which --compare lets scores differ")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and cross-check the command line; a wrong one ends the process with exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.eval_name not in EVALS:
        parser.error(f"--eval-name {args.eval_name}: not here; the evaluations are {', '.join(EVALS)}")
    if args.num_examples < 1 or args.num_threads < 1:
        parser.error("--num-examples and --num-threads must be at least 1")
    if not 0.0 <= args.min_score <= 1.0:
        parser.error(f"--min-score {args.min_score}: give a share between 0 and 1")
    if args.reference is not None and args.model_path is None:
        parser.error("--reference transformers needs --model-path, the folder of the checkpoint")
    if args.compare and args.reference is None:
        parser.error("--compare needs --reference transformers --model-path DIR to compare with")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        problems = run_eval(args)
    except (EvalError, ValueError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
