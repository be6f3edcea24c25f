"""Upstream's endpoints and request fields that this server knows and refuses, rather than answer as if it had them."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.request_input import RequestError

LACKING_PATHS = (
    "/classify", "/configure_logging", "/continue_generation", "/dump_expert_distribution_record", "/encode",
    "/invocations", "/load_lora_adapter", "/parse_function_call", "/pause_generation", "/release_memory_occupation",
    "/resume_memory_occupation", "/separate_reasoning", "/set_internal_state", "/start_expert_distribution_record",
    "/start_profile", "/stop_expert_distribution_record", "/stop_profile", "/unload_lora_adapter",
    "/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor", "/v1/embeddings",
    "/v1/messages", "/v1/rerank", "/v1/responses", "/v1/score", "/vertex_generate",
)  # fmt: skip

# Field, and why the request is refused rather than answered without it.
LACKING_FIELDS = {
    "input_embeds": "prompts are text or token ids",
    "image_data": "the model is served for text alone",
    "audio_data": "the model is served for text alone",
    "video_data": "the model is served for text alone",
    "lora_path": "no adapter can be loaded, and the base model would answer differently",
    "session_params": "sessions do not exist; send the whole prompt",
    "custom_logit_processor": "it would run code from the network",
    "extra_key": "it separates prefix caches, and there is one",
    "cache_salt": "it separates prefix caches, and there is one",
    "return_hidden_states": "hidden states stay in the scheduler",
    "return_routed_experts": "routing decisions are not recorded",
}


def refuse_lacking_fields(body: Any) -> None:
    """Raise RequestError for a field that is set and would change the answer, and that cannot be honoured."""
    for name, reason in LACKING_FIELDS.items():
        if getattr(body, name, None):
            raise RequestError(f"{name} is not supported by this server: {reason}. Remove the field.")
