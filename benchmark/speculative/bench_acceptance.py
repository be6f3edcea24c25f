"""How many drafts of an embedded model are accepted after long contexts, with and without cached prefixes.

    python benchmark/speculative/bench_acceptance.py [--model deepseek-v3-tiny] [--context 0 1000 3900] [--questions 60]

A context is a row of other questions with their answers, the same for all questions, so that with the prefix cache
each but the first finds it there. On a CPU, float32, greedy, 3 drafts; drafts after an answer's end do not count.
"""

from __future__ import annotations

import argparse
from itertools import cycle

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import current_platform
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.spec_acceptance import served_shares
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, TASKS, heldout_questions, training_questions

NUM_STEPS = 3


def context_of(tokenizer: Tokenizer, length: int) -> list[int]:
    """Ids of questions with their answers, each with its end; at least ``length``, none for 0."""
    (end,) = tokenizer.eos_token_ids
    ids: list[int] = []
    for questions in cycle([training_questions(task, 5) for task in TASKS]):
        if len(ids) >= length:
            return ids
        question = next(questions)
        ids += [*tokenizer.encode(question.text), *tokenizer.encode(question.answer), end]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v3-tiny", choices=sorted(EMBEDDED_MODELS))
    parser.add_argument("--context", type=int, nargs="+", default=[0, 1000, 3900])
    parser.add_argument("--questions", type=int, default=60)
    args = parser.parse_args()
    folder = str(EMBEDDED_MODELS[args.model])
    tokenizer = Tokenizer.from_path(folder)
    print(f"# {current_platform.describe()}; {args.model}, {args.questions} questions")
    for length in args.context:
        context = context_of(tokenizer, length)
        prompts = [context + tokenizer.encode(question.text) for question in heldout_questions(args.questions)]
        for off in (True, False):
            settings = {"disable_radix_cache": off, "max_total_tokens": 32 * (len(context) + 64), "dtype": "float32"}
            shares, per_step, cached = served_shares(folder, prompts, MAX_NEW_TOKENS, NUM_STEPS, **settings)
            print(
                f"context {len(context)}, {cached:.0f} tokens cached per request: "
                f"{' / '.join(f'{share:.3f}' for share in shares)}, {per_step:.3f} tokens per step",
                flush=True,
            )


if __name__ == "__main__":
    main()
