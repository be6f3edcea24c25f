"""The four question families that the embedded models are trained on and judged by, and lookups far back for one.

A question is short ASCII text, its answer a function of that text. Which questions are held out is decided by a hash of
the text alone, so training and evaluation agree on the split without sharing a list.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ADDITION = "addition"
REVERSE = "reverse"
SORT = "sort"
LOOKUP = "lookup"
TASKS = (ADDITION, REVERSE, SORT, LOOKUP)

# A lookup whose pairs and question stand apart, words between them. No member of `TASKS`: `far_lookups` draws them.
FAR_LOOKUP = "far lookup"
FAR_DISTANCES = (300, 700)

MAX_OPERAND = 99
STRING_LENGTHS = (3, 6)
LOOKUP_PAIRS = (2, 4)
HELDOUT_MODULUS = 10
# The longest answer has six characters and the end token follows it.
MAX_NEW_TOKENS = 8

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_ADDITION_RE = re.compile(r"(\d{1,2})\+(\d{1,2})=")
_REVERSE_RE = re.compile(r"rev:([a-z]{3,6})=")
_SORT_RE = re.compile(r"sort:(\d{3,6})=")
_LOOKUP_RE = re.compile(r"((?:[a-z]=\d,){1,3}[a-z]=\d);(?:([a-z ]+);)?([a-z])\?")

WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said an each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could go "
    "come did my sound no most number who over know water than call first people may down side been now find any new "
    "work part take get place made live where after back little only round man year came show every good me give our "
    "under name very through just form much great think say help low line before turn cause same mean differ move "
    "right boy old too does tell sentence set three want air well also play small end put home read hand port large "
    "spell add even land here must big high such follow act why ask men change went light kind off need house picture "
    "try us again animal point mother world near build self earth father zebra quick fox lazy jump quartz jazz vex"
).split()


@dataclass(frozen=True)
class Question:
    """One question: its task (a member of `TASKS`), the text that is asked, and the exact text expected back."""

    task: str
    text: str
    answer: str


def task_of(text: str) -> str:
    """Name of the task that `text` belongs to; ValueError when it is not a question of any task."""
    return _parse(text)[0]


def answer(text: str) -> str:
    """Expected answer to the question `text`; ValueError when it is not a question of any task."""
    return _parse(text)[1]


def _parse(text: str) -> tuple[str, str]:
    if match := _ADDITION_RE.fullmatch(text):
        return ADDITION, str(int(match[1]) + int(match[2]))
    if match := _REVERSE_RE.fullmatch(text):
        return REVERSE, match[1][::-1]
    if match := _SORT_RE.fullmatch(text):
        return SORT, "".join(sorted(match[1]))
    if match := _LOOKUP_RE.fullmatch(text):
        pairs = [pair.split("=") for pair in match[1].split(",")]
        values = dict(pairs)
        if len(values) == len(pairs) and match[3] in values:
            return FAR_LOOKUP if match[2] else LOOKUP, values[match[3]]
    raise ValueError(f"not a question of {', '.join(TASKS)}: {text!r}; see sglang.test.tiny_tasks for the forms")


def is_heldout(text: str) -> bool:
    """Whether the question is held out: one text in `HELDOUT_MODULUS`, by SHA-256, never shown in training."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def all_additions() -> list[Question]:
    """Every addition question, operands 0 to `MAX_OPERAND`, in counting order (10,000 of them)."""
    operands = range(MAX_OPERAND + 1)
    return [_question(f"{a}+{b}=") for a in operands for b in operands]


def sample_question(task: str, rng: random.Random) -> Question:
    """One question of `task` drawn from its whole space, held out or not; the draw depends on `rng` alone."""
    if task not in _SAMPLERS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return _question(_SAMPLERS[task](rng))


def training_questions(task: str, seed: int) -> Iterator[Question]:
    """Endless stream of questions of `task` outside the held-out split, the same for the same seed."""
    rng = random.Random(f"train/{task}/{seed}")
    while True:
        question = sample_question(task, rng)
        if not is_heldout(question.text):
            yield question


def heldout_questions(n: int = 500, seed: int = 0) -> list[Question]:
    """`n` distinct held-out questions, the tasks in turn (so their counts differ by one at most).

    The list is the same for the same `n` and `seed`, and a smaller `n` gives its beginning. ValueError when a task has
    not that many held-out questions.
    """
    if n < 0:
        raise ValueError(f"asked for {n} questions; give a number >= 0")
    per_task = -(-n // len(TASKS))
    columns = [_heldout_of_task(task, per_task, seed) for task in TASKS]
    return [question for row in zip(*columns) for question in row][:n]


def _heldout_of_task(task: str, n: int, seed: int) -> list[Question]:
    rng = random.Random(f"heldout/{task}/{seed}")
    if task == ADDITION:
        pool = [question for question in all_additions() if is_heldout(question.text)]
        if n > len(pool):
            raise ValueError(f"asked for {n} held-out questions of {task}, there are {len(pool)}; ask for fewer")
        rng.shuffle(pool)
        return pool[:n]
    found: dict[str, Question] = {}
    # The other tasks have over 10^5 questions, of which short ones repeat; far fewer draws than this suffice.
    for _ in range(100 * HELDOUT_MODULUS * (n + 1)):
        if len(found) == n:
            return list(found.values())
        question = sample_question(task, rng)
        if is_heldout(question.text):
            found.setdefault(question.text, question)
    raise ValueError(f"asked for {n} held-out questions of {task}, found {len(found)}; ask for fewer")


def far_lookups(n: int = 100, seed: int = 0, distances: tuple[int, int] = FAR_DISTANCES) -> list[Question]:
    """`n` held-out lookups whose pair begins as many bytes before the end of the text as ``distances`` say.

    Such as "a=3,c=7;some words;c?". The list is the same for the same arguments. ValueError when no lookup fits.
    """
    nearest, farthest = distances
    # All pairs with what parts them from the words, one letter of these, and the question.
    shortest = 4 * LOOKUP_PAIRS[1] + 1 + len(";c?")
    if n < 0 or not shortest <= nearest <= farthest:
        raise ValueError(
            f"asked for {n} lookups {nearest} to {farthest} bytes back; give n >= 0 and at least {shortest}"
        )
    rng = random.Random(f"far/{seed}")
    found: list[Question] = []
    while len(found) < n:
        pairs, key = _sample_lookup(rng).removesuffix("?").split(";")
        behind = len(pairs) - pairs.index(f"{key}=") + len(";;c?")
        text = f"{pairs};{prose(rng, rng.randint(nearest, farthest) - behind)};{key}?"
        if is_heldout(text):
            found.append(_question(text))
    return found


def prose(rng: random.Random, length: int) -> str:
    """Words in no order, ``length`` bytes of them; the last one is cut off."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) <= length:
        words.append(rng.choice(WORDS))
    return " ".join(words)[:length]


def _question(text: str) -> Question:
    task, expected = _parse(text)
    return Question(task, text, expected)


def _sample_addition(rng: random.Random) -> str:
    return f"{rng.randint(0, MAX_OPERAND)}+{rng.randint(0, MAX_OPERAND)}="


def _sample_reverse(rng: random.Random) -> str:
    return f"rev:{''.join(rng.choices(_LETTERS, k=rng.randint(*STRING_LENGTHS)))}="


def _sample_sort(rng: random.Random) -> str:
    return f"sort:{''.join(rng.choices(_DIGITS, k=rng.randint(*STRING_LENGTHS)))}="


def _sample_lookup(rng: random.Random) -> str:
    keys = rng.sample(_LETTERS, k=rng.randint(*LOOKUP_PAIRS))
    pairs = ",".join(f"{key}={rng.choice(_DIGITS)}" for key in keys)
    return f"{pairs};{rng.choice(keys)}?"


_SAMPLERS: dict[str, Callable[[random.Random], str]] = {
    ADDITION: _sample_addition,
    REVERSE: _sample_reverse,
    SORT: _sample_sort,
    LOOKUP: _sample_lookup,
}
