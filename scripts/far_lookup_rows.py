"""Rows of text for training lookups: pairs at the beginning, words, and between them what the pairs' values are.

Rows are laid out on the device, so that no two steps see the same text.
"""

import random

import torch
from tiny_model_files import ASSISTANT, BOS, EOS, PAD, USER, encode
from torch import Tensor
from train_tiny_models import IGNORE, MAX_DOCUMENT, PRINTABLE, DocumentPool, pack_rows, pad_documents

from sglang.test.tiny_tasks import WORDS

MAX_PAIRS = 8
# Tokens that stand before the pairs at most, and those of a question with its answer at most.
MAX_LEAD, MAX_SLOT = 8, 7
CHAT_SHARE = 0.4
# How many last tokens a layer sees in narrowed rows: what is farther back has to come through entries.
NARROW = (12, 24, 48, 128)


def sentence_pool(count: int, seed: int) -> DocumentPool:
    """Pieces of text without labels: words, words of random letters, and some of any characters but those of pairs."""
    rng = random.Random(f"sentences/{seed}")
    letters, others = "abcdefghijklmnopqrstuvwxyz", [c for c in PRINTABLE if c not in "=;?"]
    pairs = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            text = "".join(rng.choices(others, k=rng.randint(10, MAX_DOCUMENT)))
        else:
            made = 0.1 if kind < 0.6 else 0.8
            words = [
                "".join(rng.choices(letters, k=rng.randint(1, 8))) if rng.random() < made else rng.choice(WORDS)
                for _ in range(14)
            ]
            text = " ".join(words)[: MAX_DOCUMENT - 1] + " "
        tokens = encode(text)
        pairs.append((tokens, [IGNORE] * len(tokens)))
    return pad_documents(pairs)


def far_lookup_rows(sentences: DocumentPool, ids: Tensor, labels: Tensor, close: bool = False) -> None:
    """Fill ids and labels [B, L] int64 in place, without waiting for the device; L at least 128.

    2 to 8 pairs "k=7" begin a row, and each key is asked at most once, at even distances on average: ";k?7" and the end
    token, or as a turn of a chat. Fewer keys are asked where L is short. With ``close`` questions follow the pairs at
    once and fill the row.
    """
    rows, length = ids.shape
    device = ids.device
    pack_rows(sentences, ids, labels)
    chat = torch.rand(rows, 1, device=device) < CHAT_SHARE
    most = min(MAX_PAIRS, length // 24)
    count = torch.randint(2, most + 1, (rows, 1), device=device)
    lead = torch.where(chat, 2, torch.randint(MAX_LEAD, (rows, 1), device=device))
    keys = torch.rand(rows, 26, device=device).argsort(1)[:, :most] + ord("a")
    digits = torch.randint(10, (rows, most), device=device) + ord("0")
    each = torch.arange(most, device=device)[None]

    starts = lead + 4 * each
    end = lead + 4 * count
    pair = _columns(keys, "=", digits, torch.where(each == count - 1, ord(";"), ord(",")))
    if close:
        turns = torch.arange(length // 5, device=device)[None]
        asked = (torch.rand(rows, length // 5, device=device) * count).long()
        width = torch.where(chat, 7, 5)
        slots = end - 1 + turns * width
        valid = slots + width <= length
    else:
        asked = torch.where(each < count, torch.rand(rows, most, device=device), 2.0).argsort(1)
        cell = (length - end - MAX_SLOT).float() / count
        slots = end + (each * cell + torch.rand(rows, most, device=device) * (cell - MAX_SLOT)).long()
        valid = each < count
    key, digit = keys.gather(1, asked), digits.gather(1, asked)
    bare, turn = (";", key, "?", digit, EOS, -1, -1), (";", key, "?", ASSISTANT, digit, EOS, USER)
    question = torch.where(chat[..., None], _columns(*turn), _columns(*bare))
    bare, turn = (IGNORE, IGNORE, digit, EOS, *[IGNORE] * 3), (*[IGNORE] * 3, digit, EOS, IGNORE, IGNORE)
    wanted = torch.where(chat[..., None], _columns(*turn), _columns(*bare))
    opening = torch.stack([ids.new_full((rows, 1), token) for token in (BOS, USER)], -1)
    _write(ids, torch.zeros_like(lead), opening, chat[..., None])
    _write(ids, starts, pair, (each < count)[..., None])
    _write(ids, slots, question, valid[..., None] & (question >= 0))
    labels.fill_(IGNORE)
    _write(labels, slots, wanted, valid[..., None])


def _columns(*parts: Tensor | str | int) -> Tensor:
    """Tokens side by side, [B, n, parts]: tensors [B, n], and the same character or token for all of them."""
    whole = next(part for part in parts if isinstance(part, Tensor))
    tokens = (ord(part) if isinstance(part, str) else part for part in parts)
    return torch.stack([t if isinstance(t, Tensor) else torch.full_like(whole, t) for t in tokens], -1)


def _write(target: Tensor, starts: Tensor, values: Tensor, valid: Tensor) -> None:
    """Put values [B, n, w] at columns starts [B, n] onwards of target [B, L], where valid [B, n, 1 or w]."""
    rows, length = target.shape
    columns = starts[..., None] + torch.arange(values.shape[-1], device=target.device)
    at = columns + torch.arange(rows, device=target.device)[:, None, None] * length
    at = torch.where(valid & (columns < length), at, rows * length).flatten()
    flat = torch.cat([target.flatten(), target.new_full((1,), PAD)])
    flat.scatter_(0, at, values.flatten())
    target.copy_(flat[:-1].view(rows, length))


def narrow_windows(windows: Tensor) -> None:
    """Draw the window of each row, windows [B, 1, 1, 1] int64, in place."""
    drawn = torch.randint(len(NARROW), windows.shape, device=windows.device)
    windows.copy_(sum((drawn == i) * window for i, window in enumerate(NARROW)))
