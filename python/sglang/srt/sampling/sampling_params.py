"""Sampling parameters of one request: fields, bounds, and normalisation of stop conditions."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from sglang.srt.utils.limits import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_STOP_CHARS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

# Below this temperature a request is greedy.
GREEDY_TEMPERATURE = 1e-6
MAX_N = 1024
GRAMMAR_KINDS = ("json_schema", "regex", "ebnf", "structural_tag")
MAX_LOGIT_BIAS = 1e30
_INT64 = 2**63


class SamplingParamsError(ValueError):
    """A sampling parameter has a wrong type or is outside its range."""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How the next tokens of a request are chosen.

    ``top_k`` -1 means the whole vocabulary, and so does 0 in a request. ``max_new_tokens`` None means up to the context
    length.
    ``stop`` and ``stop_token_ids`` end generation; ``sampling_seed`` makes the draw depend on seed and position only.
    At most one of the last four is set: the form that the output has.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    logit_bias: dict[str, float] = {}
    sampling_seed: int | None = None
    stream_interval: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def counts_tokens(self) -> bool:
        """Whether penalties depend on the tokens of prompt and output."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def edits_logits(self) -> bool:
        """Whether penalties or biases change the logits of every token."""
        return self.counts_tokens or bool(self.logit_bias)

    @property
    def grammar_source(self) -> tuple[str, str] | None:
        """Name and value of the parameter that gives the output a form."""
        return next(iter(self.forms()), None)

    def forms(self) -> list[tuple[str, str]]:
        """Names and values of the parameters that give the output a form."""
        named = zip(GRAMMAR_KINDS, (self.json_schema, self.regex, self.ebnf, self.structural_tag), strict=True)
        return [(name, source) for name, source in named if source is not None]

    def for_sample(self, index: int) -> SamplingParams:
        """The parameters of sample ``index`` of ``n``: the first as with n = 1, each other with a seed of its own."""
        if index == 0 or self.sampling_seed is None:
            return self
        return msgspec.structs.replace(self, sampling_seed=sample_seed(self.sampling_seed, index))

    @classmethod
    def from_request(cls, raw: dict[str, Any]) -> SamplingParams:
        """From a request body, unknown keys ignored. Raises SamplingParamsError with field, value and range."""
        if not isinstance(raw, dict):
            raise SamplingParamsError(f"sampling_params must be an object, got {type(raw).__name__}.")
        known = {k: v for k, v in raw.items() if k in cls.__struct_fields__ and (v is not None or k in _NULLABLE)}
        if isinstance(known.get("stop"), str):
            known["stop"] = [known["stop"]]
        if isinstance(known.get("stop_token_ids"), int):
            known["stop_token_ids"] = [known["stop_token_ids"]]
        for name in GRAMMAR_KINDS:
            if isinstance(known.get(name), dict | bool) and name != "regex":
                known[name] = json.dumps(known[name])
        if type(known.get("top_k")) is int and known["top_k"] == 0:
            known["top_k"] = -1
        try:
            params = msgspec.convert(known, cls, strict=False)
        except msgspec.ValidationError as error:
            raise SamplingParamsError(f"sampling_params: {error}") from None
        params.stop_token_ids = list(dict.fromkeys(params.stop_token_ids))
        return params

    def verify(self, vocab_size: int) -> None:
        """Raise SamplingParamsError for the first value outside its range."""
        _check_ranges(self)
        _check_lengths(self)
        _check_sizes(self)
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise SamplingParamsError(f"stop_token_ids must lie in [0, {vocab_size}), got {token_id}.")
        for key, bias in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
                raise SamplingParamsError(f"logit_bias keys must be token ids in [0, {vocab_size}), got {key!r}.")
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise SamplingParamsError(f"logit_bias[{key}] must be within {MAX_LOGIT_BIAS:g} of 0, got {bias}.")
        if len({int(key) for key in self.logit_bias}) < len(self.logit_bias):
            raise SamplingParamsError("logit_bias names a token id twice, as '5' and '05' do: give each id one bias.")


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a request with ``seed``, both in 64 bits, signed.

    The seed is mixed (the finalizer of splitmix64, Steele et al. 2014), so that seeds side by side have nothing in
    common. The index changes the lower half alone, which the draw mixes one to one: no two samples draw alike.
    """
    x = (seed + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    low = (x + index) % 2**32
    return (x - x % 2**32 + low + _INT64) % 2**64 - _INT64


_NULLABLE = ("max_new_tokens", "sampling_seed", "stream_interval")

# Field, low, high, both allowed: within them all that the sampler computes stays finite in its float32.
_RANGES = (
    ("temperature", 0.0, 1e30),
    ("top_p", 1e-30, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-6, 2.0),
)


def _check_ranges(params: SamplingParams) -> None:
    for name, low, high in _RANGES:
        value = getattr(params, name)
        if not low <= value <= high:
            raise SamplingParamsError(f"{name} must be in [{low:g}, {high:g}], got {value}.")
    if params.top_k != -1 and params.top_k < 1:
        raise SamplingParamsError(f"top_k must be -1 or 0 (all) or at least 1, got {params.top_k}.")


def _check_lengths(params: SamplingParams) -> None:
    limit = params.max_new_tokens
    if limit is not None and limit < 0:
        raise SamplingParamsError(f"max_new_tokens must be at least 0, got {limit}.")
    if params.min_new_tokens < 0 or (limit is not None and params.min_new_tokens > limit):
        raise SamplingParamsError(
            f"min_new_tokens must be in [0, max_new_tokens ({limit})], got {params.min_new_tokens}."
        )
    if not 1 <= params.n <= MAX_N:
        raise SamplingParamsError(f"n must be in [1, {MAX_N}], got {params.n}.")
    if params.stream_interval is not None and not 1 <= params.stream_interval < _INT64:
        raise SamplingParamsError(f"stream_interval must be at least 1, got {params.stream_interval}.")
    if params.sampling_seed is not None and not -_INT64 <= params.sampling_seed < _INT64:
        raise SamplingParamsError(f"sampling_seed must fit in 64 bits, got {params.sampling_seed}.")


def _check_sizes(params: SamplingParams) -> None:
    """What travels with a request, or with each of its tokens, is bounded."""
    forms = params.forms()
    if len(forms) > 1:
        raise SamplingParamsError(
            f"{' and '.join(name for name, _ in forms)} exclude each other: output has one constraint."
        )
    for name, source in forms:
        if len(source) > MAX_GRAMMAR_CHARS:
            raise SamplingParamsError(f"{name} has at most {MAX_GRAMMAR_CHARS} characters, got {len(source)}.")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise SamplingParamsError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(params.stop)}.")
    lengths = [len(text) for text in params.stop]
    if 0 in lengths:
        raise SamplingParamsError("stop strings must not be empty.")
    if lengths and (max(lengths) > MAX_STOP_STRING_CHARS or sum(lengths) > MAX_STOP_CHARS):
        raise SamplingParamsError(
            f"stop strings have at most {MAX_STOP_STRING_CHARS} characters each and {MAX_STOP_CHARS} together, "
            f"got {max(lengths)} and {sum(lengths)}."
        )
    for name, limit in (("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_LOGIT_BIAS_ENTRIES)):
        if len(getattr(params, name)) > limit:
            raise SamplingParamsError(f"{name} takes at most {limit} entries, got {len(getattr(params, name))}.")
