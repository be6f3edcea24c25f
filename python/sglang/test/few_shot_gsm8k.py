"""Few-shot word problems with a number as the answer (the layout of GSM8K), sent to a running server.

    python -m sglang.test.few_shot_gsm8k --data-path test.jsonl --num-questions 200

The file holds one JSON object per line with "question" and "answer", the answer ending in "#### NUMBER". Its first
--num-shots entries are shown as examples and are not asked. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang.test.run_eval import Client, EvalError, ask_all

STOP = ("Question", "Assistant:", "<|separator|>")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class GSM8KResult:
    """``accuracy`` and ``invalid`` (replies without a number) are fractions; ``latency`` in seconds."""

    accuracy: float
    invalid: float
    latency: float
    output_throughput: float
    num_questions: int


def parse_number(text: str) -> float | None:
    """The last number of ``text``, commas between digits left out; None when there is none."""
    found = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d)", "", text))
    return float(found[-1]) if found else None


def read_questions(path: str) -> list[tuple[str, str]]:
    """(question, worked answer) pairs of a JSONL file; raises EvalError naming the line that has none."""
    pairs = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EvalError(f"--data-path {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = (entry["question"], entry["answer"])
        except (ValueError, TypeError, KeyError) as error:
            raise EvalError(f"{path}:{number}: expected an object with 'question' and 'answer' ({error!r})") from None
        if parse_number(pair[1]) is None:
            raise EvalError(f"{path}:{number}: the answer holds no number")
        pairs.append(pair)
    return pairs


def make_prompts(pairs: Sequence[tuple[str, str]], num_shots: int, num_questions: int) -> list[tuple[str, float]]:
    """(prompt, expected number) of the questions after the first ``num_shots``, which are the examples."""
    asked = pairs[num_shots : num_shots + num_questions]
    if not asked:
        raise EvalError(f"{len(pairs)} questions are not enough for {num_shots} examples and a question")
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs[:num_shots])
    prompts = []
    for question, answer in asked:
        expected = parse_number(answer)
        assert expected is not None
        prompts.append((f"{examples}Question: {question}\nAnswer:", expected))
    return prompts


def server_url(host: str, port: int) -> str:
    """``host`` with its scheme put in front where it has none."""
    return f"{host if '://' in host else 'http://' + host}:{port}"


def run_eval(args: argparse.Namespace) -> GSM8KResult:
    """Send the questions of ``args`` (see ``make_parser``) and print accuracy and throughput; raises EvalError."""
    prompts = make_prompts(read_questions(args.data_path), args.num_shots, args.num_questions)
    if len(prompts) < args.num_questions:
        print(f"{args.data_path} has {len(prompts)} of the {args.num_questions} questions asked for")
    client = Client(server_url(args.host, args.port))
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "stop": list(STOP)}

    def ask(prompt: str) -> tuple[str, int]:
        """Text and output tokens of the reply."""
        body = {"text": prompt, "sampling_params": sampling}
        return client.post("/generate", body, lambda reply: (reply["text"], reply["meta_info"]["completion_tokens"]))

    started = time.perf_counter()
    replies = ask_all(ask, [prompt for prompt, _ in prompts], args.parallel)
    latency = time.perf_counter() - started
    numbers = [parse_number(text) for text, _ in replies]
    right = sum(number == expected for number, (_, expected) in zip(numbers, prompts, strict=True))
    result = GSM8KResult(
        accuracy=right / len(prompts),
        invalid=sum(number is None for number in numbers) / len(prompts),
        latency=latency,
        output_throughput=sum(tokens for _, tokens in replies) / latency,
        num_questions=len(prompts),
    )
    print(f"Accuracy: {result.accuracy:.3f}")
    print(f"Invalid: {result.invalid:.3f}")
    print(f"Latency: {result.latency:.3f} s")
    print(f"Output throughput: {result.output_throughput:.3f} token/s")
    return result


def make_parser(description: str | None = __doc__, data_path: str | None = None) -> argparse.ArgumentParser:
    """The flags; ``data_path`` is the file that is read when none is named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=data_path is None, default=data_path, help="Local JSONL file.")
    parser.add_argument("--num-shots", type=int, default=5, help="Examples before each question. Default: 5.")
    parser.add_argument("--num-questions", type=int, default=200, help="Default: 200.")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="Default: 512.")
    parser.add_argument("--parallel", type=int, default=128, help="Requests in flight. Default: 128.")
    parser.add_argument("--host", default="http://127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run_eval(make_parser().parse_args(argv))
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
