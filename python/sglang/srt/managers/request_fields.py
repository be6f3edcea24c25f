"""Unsupported fields of request bodies: refused if they would change the output, otherwise logged once."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from typing import Any

from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_UNKNOWN_FIELD_CHARS, MAX_UNKNOWN_FIELDS_LOGGED, MAX_WARNINGS

logger = logging.getLogger(__name__)

_BANNED = "use logit_bias to exclude tokens"
_FORM = "output is constrained by one of json_schema, regex, ebnf and structural_tag in sampling_params"
_TEXT_ALONE = "only text is supported"
_ONE_CACHE = "it selects a prefix cache, but there is only one"
_SPLIT = "prefill and decode are not split between servers"
_EXTRA_OUTPUT = "the reply would not contain what it requests"

# Field of upstream's, of OpenAI's or of vLLM's API, and why a request that uses it is refused.
REFUSED_FIELDS: dict[str, str] = {
    # Output constraints, which other endpoints support.
    **dict.fromkeys(
        (
            "regex", "ebnf", "json_schema", "structural_tag", "guided_json", "guided_regex", "guided_choice",
            "guided_grammar", "structured_outputs",
        ),
        _FORM,
    ),
    "guided_whitespace_pattern": "use the server's --constrained-json-whitespace-pattern",
    "allowed_token_ids": _BANNED,
    "bad_words": _BANNED,
    # Parts of the prompt that would be missing.
    **dict.fromkeys(
        ("image_data", "audio_data", "video_data", "images_config", "mm_processor_kwargs", "media_io_kwargs"),
        _TEXT_ALONE,
    ),
    "input_embeds": "prompts are text or token ids",
    "prompt_embeds": "prompts are text or token ids",
    "documents": "documents do not reach the prompt",
    "chat_template": "the server's own template is used (--chat-template)",
    "add_generation_prompt": "the prompt always opens the assistant's turn, or continues it (continue_final_message)",
    "add_special_tokens": "special tokens are added by the tokenizer's rules; send token ids for another prompt",
    "truncate_prompt_tokens": "a prompt is never cut on request",
    # Other models, other code, other state.
    "lora_path": "adapters are not supported, and the base model would answer differently",
    "session_params": "sessions do not exist; send the whole prompt",
    "session_id": "sessions do not exist; send the whole prompt",
    "custom_logit_processor": "it would run code from the network",
    "custom_params": "they are read by custom logit processors, which do not exist here",
    "logits_processors": "it would run code from the network",
    "vllm_xargs": "extensions of vLLM are not supported",
    "extra_key": _ONE_CACHE,
    "cache_salt": _ONE_CACHE,
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room", "kv_transfer_params"), _SPLIT),
    # Other ways to choose tokens.
    "stop_regex": "stops are strings (stop) or token ids (stop_token_ids)",
    "use_beam_search": "tokens are sampled one by one",
    "length_penalty": "it belongs to beam search, and tokens are sampled one by one",
    "early_stopping": "it belongs to beam search, and tokens are sampled one by one",
    "thinking_token_budget": "the thought is not limited separately",
    "repetition_detection": "only stop conditions end an answer early",
    # Tools and other kinds of answer.
    "functions": "no function call would be recognised",
    "function_call": "no function call would be recognised",
    "web_search_options": "the server does not search the web",
    "audio": "the server replies with text",
    "echo": "only /v1/completions returns the prompt",
    "best_of": "every sample is returned: use n",
    "verbosity": "the model has no verbosity setting",
    "separate_reasoning": "only /v1/chat/completions separates thought and answer",
    "include_reasoning": "use separate_reasoning of /v1/chat/completions",
    # Other forms of the answer.
    "prompt_logprobs": "use echo and logprobs of /v1/completions, or logprob_start_len of /generate",
    "include_stop_str_in_output": "use no_stop_trim",
    "return_tokens_as_token_ids": "use /generate, which returns token ids",
    "return_token_ids": "use /generate, which returns token ids",
    "return_prompt_token_ids": "use /tokenize",
    "return_hidden_states": "hidden states stay in the scheduler",
    "return_routed_experts": "routing decisions are not recorded",
    **dict.fromkeys(("return_entropy", "return_bytes", "return_meta_info"), _EXTRA_OUTPUT),
    "return_cached_tokens_details": "start the server with --enable-cache-report",
}  # fmt: skip

# Values that have no effect, in addition to null, false, zero and empty values.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "add_generation_prompt": (True,),
    # The default for each kind of prompt differs between the endpoints.
    "add_special_tokens": (),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "json_schema": (),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "verbosity": ("medium",),
}

# Fields without influence on the answer: labels, accounting, scheduling, routing between servers.
TOLERATED_FIELDS = frozenset(
    (
        "background", "bootstrap_pair_key", "cache_control", "conversation_id", "custom_labels", "data_parallel_rank",
        "decode_tp_size", "external_trace_header", "guided_decoding_backend", "include_obfuscation", "log_metrics",
        "metadata", "model", "no_logs", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key",
        "prompt_cache_retention", "routed_dp_rank", "routed_experts_start_len", "safety_identifier", "service_tier",
        "spaces_between_special_tokens", "stream_reasoning", "truncation_side", "user",
    )
)  # fmt: skip


def refuse_field(name: str, value: Any) -> None:
    """Raise RequestError if the known field ``name`` is not supported and ``value`` has an effect."""
    reason = REFUSED_FIELDS.get(name)
    if reason is None or value is None:
        return
    harmless = _HARMLESS_VALUES.get(name)
    if value in harmless if harmless is not None else not value:
        return
    raise RequestError(f"{name} is not supported by this server: {reason}. Remove the field.", param=name)


class UnknownFields:
    """Handles fields that are in no schema, and logs each of their names once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def judge(
        self, fields: Mapping[str, Any], known: Collection[str], where: str = "", warnings: list[str] | None = None
    ) -> None:
        """Check unknown fields by name and value; ``known`` are names that a misspelled one may mean.

        ``where`` stands before each name, as ``stream_options.``. ``warnings`` is extended, up to a limit. Raises
        RequestError for a refused field.
        """
        for name, value in fields.items():
            refuse_field(name, value)
        for name in fields:
            # A refused field without effect is accepted.
            if name not in TOLERATED_FIELDS and name not in REFUSED_FIELDS:
                self._note(where + name[:MAX_UNKNOWN_FIELD_CHARS], known, warnings)

    def _note(self, name: str, known: Collection[str], warnings: list[str] | None) -> None:
        if name not in self._logged and len(self._logged) < MAX_UNKNOWN_FIELDS_LOGGED:
            self._logged.add(name)
            logger.warning("%s", _warning(name, known))
            if len(self._logged) == MAX_UNKNOWN_FIELDS_LOGGED:
                logger.warning("%d unknown fields were logged; further ones are not.", MAX_UNKNOWN_FIELDS_LOGGED)
        if warnings is not None and len(warnings) < MAX_WARNINGS:
            text = _warning(name, known)
            if text not in warnings:
                warnings.append(text)


def _warning(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.rpartition(".")[2], known, 1, 0.75)
    return f"Request field {name!r} is unknown and is ignored" + (f"; did you mean {close[0]!r}?" if close else ".")
