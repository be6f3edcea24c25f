"""Upstream's endpoints that this server knows and refuses, rather than answer as if it had them."""

from __future__ import annotations

UNSUPPORTED_PATHS = (
    "/classify", "/configure_logging", "/continue_generation", "/dump_expert_distribution_record", "/encode",
    "/invocations", "/load_lora_adapter", "/parse_function_call", "/pause_generation", "/release_memory_occupation",
    "/resume_memory_occupation", "/separate_reasoning", "/set_internal_state", "/start_expert_distribution_record",
    "/stop_expert_distribution_record", "/unload_lora_adapter",
    "/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor", "/v1/embeddings",
    "/v1/messages", "/v1/rerank", "/v1/score", "/vertex_generate",
)  # fmt: skip
