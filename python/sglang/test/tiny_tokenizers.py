"""Small tokenizer folders for tests: byte-level BPE, SentencePiece-like BPE with byte fallback, and WordPiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The five boxing wizards jump quickly.",
    "naïve café über straße 你好世界 привет мир 😀👍🏽 zażółć",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 22))",
    "27+58=85 rev:abcd=dcba sort:3142=1234 stop STOP ### END</s>",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _special() -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<|pad|>")]


def byte_level_tokenizer() -> Tokenizer:
    """BPE over bytes as in GPT-2: every byte string is representable; ``<s>`` is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=_special(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama-2's arrangement: word boundary marks, unknown characters as bytes, the first space stripped."""
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    words = ["▁", *sorted({char for line in CORPUS for char in line if ord(char) < 0x250})]
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = []
    for left, right in (("▁", "T"), ("h", "e"), ("▁T", "he"), ("o", "w"), ("▁", "b"), ("q", "u")):
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special()[:2])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    """Words and ``##`` pieces; a token's leading space depends on its neighbour."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *_special()], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizer(folder: str, tokenizer: Tokenizer, **config: Any) -> str:
    """Save ``tokenizer`` with a tokenizer_config.json; ``config`` adds to or replaces its keys. Returns ``folder``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(f"{folder}/tokenizer.json")
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
