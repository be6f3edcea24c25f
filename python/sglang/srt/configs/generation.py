"""What a model folder says about generation: the ids that end a turn, and the sampling values it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.configs.errors import ConfigError
from sglang.srt.sampling.sampling_params import SamplingParams, SamplingParamsError

GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# transformers keeps only the most likely token if top_p is 0; the sampler's least top_p does the same.
_LEAST_TOP_P = 1e-30


def end_token_ids(section: Mapping[str, Any], vocab_size: int, prefix: str = "") -> tuple[int, ...]:
    """The ids of ``eos_token_id``: none, one or a list. Raises ConfigError for one outside the vocabulary."""
    value = section.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int:
            raise ConfigError(
                f"key {prefix}eos_token_id must be a token id or a list of token ids, found {token_id!r:.100}"
            )
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"key {prefix}eos_token_id: {token_id!r:.100} is not in the vocabulary of {vocab_size} tokens"
            )
    return tuple(dict.fromkeys(ids))


def sampling_defaults(generation: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Sampling parameters of a generation_config.json, with their meaning there, and what was changed to keep that
    meaning.

    ``top_k`` 0 is no limit, and ``do_sample`` false is greedy whatever the other keys say. Raises ConfigError that
    names every value that the sampler cannot follow.
    """
    given = {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None}
    problems = [
        f"key {key} must be a number, found {value!r:.100}"
        for key, value in given.items()
        if type(value) not in (int, float)
    ]
    do_sample = generation.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        problems.append(f"key do_sample must be true or false, found {do_sample!r:.100}")
    if problems:
        raise ConfigError(*problems)
    settled, notes = dict(given), []
    if type(settled.get("top_k")) is float and settled["top_k"].is_integer():
        settled["top_k"] = int(settled["top_k"])
    if settled.get("top_k") == 0:
        settled["top_k"] = -1
        notes.append("top_k 0: all tokens")
    if settled.get("top_p") == 0:
        settled["top_p"] = _LEAST_TOP_P
        notes.append("top_p 0: only the most likely token")
    for key, value in settled.items():
        try:
            SamplingParams.from_request({key: value}).verify(vocab_size=1)
        except SamplingParamsError as error:
            problems.append(
                f"key {key} = {given[key]!r:.100} cannot be a default of requests ({error}); correct the file, or "
                "pass --sampling-defaults openai"
            )
    if problems:
        raise ConfigError(*problems)
    if do_sample is False:
        kept = {key: settled[key] for key in ("repetition_penalty",) if key in settled}
        return {"temperature": 0.0, **kept}, ["do_sample false: greedy where a request names no temperature"]
    return settled, notes
