"""The settings of the HTTP server: address, admission, time limits, keys, and what is logged."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag
from sglang.srt.parser.reasoning_parser import REASONING_PARSERS
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS

HTTP = "HTTP server"
ADMISSION = "Admission and time limits"
LOGGING = "Logging"
API = "API related"


@dataclass(frozen=True)
class HttpArgs:
    """The part of ``ServerArgs`` that the HTTP process reads. None means that a default is chosen at start."""

    host: str = flag("127.0.0.1", "Address to listen on.", HTTP)
    port: int = flag(30000, "Port to listen on.", HTTP, minimum=1, maximum=65535)
    skip_server_warmup: bool = flag(False, "Do not send a warm-up request after start.", HTTP)
    max_connections: int = flag(4096, "Most connections at once; more get status 503.", ADMISSION, minimum=1)
    max_request_bytes: int = flag(
        16 << 20, "Most bytes of a request body; a larger one gets status 413.", ADMISSION, minimum=1, human=True
    )
    max_queued_requests: int | None = flag(
        None, "Most waiting requests; more get status 503.", ADMISSION, minimum=1, auto="2048; none for the Engine"
    )
    max_queued_tokens: int | None = flag(
        None,
        "Most tokens of waiting requests, prompts and maximum outputs; more get status 503.",
        ADMISSION,
        minimum=1,
        human=True,
        auto="no limit",
    )
    request_timeout: float | None = flag(
        None,
        "Seconds after which an unfinished request ends with an error. A request may set a shorter time.",
        ADMISSION,
        above=0,
        auto="no limit",
    )
    drain_timeout: float = flag(
        20.0, "Seconds for running requests to finish after SIGTERM; then they end with an error.", ADMISSION, minimum=0
    )
    log_level: str = flag("info", "Log level.", LOGGING, choices=("debug", "info", "warning", "error", "critical"))
    log_level_http: str | None = flag(
        None,
        "Log level of HTTP: one line per request at `info` and below.",
        LOGGING,
        choices=("debug", "info", "warning", "error", "critical"),
        auto="as --log-level",
    )
    uvicorn_access_log_exclude_prefixes: list[str] | None = flag(
        None,
        "Prefixes of paths whose successful requests are not logged; those of probes never are.",
        LOGGING,
        auto="none",
    )
    log_requests: bool = flag(False, "Log each request and its outcome.", LOGGING)
    log_requests_level: int = flag(
        2,
        "How much of a request: 0 ids, counts and times; 1 sampling parameters too; 2 the beginnings of prompt and "
        "output too; 3 all of them.",
        LOGGING,
        minimum=0,
        maximum=3,
    )
    log_requests_format: str = flag(
        "text", "Plain text, or one JSON object per line.", LOGGING, choices=("text", "json")
    )
    profile_dir: str | None = flag(
        None, "Folder for the traces of `/start_profile`.", LOGGING, auto="profiles are refused", metavar="FOLDER"
    )
    enable_metrics: bool = flag(False, "Serve Prometheus metrics at `/metrics`.", LOGGING)
    decode_log_interval: int = flag(40, "Number of decode steps between two log lines.", LOGGING, minimum=1)
    api_key: str | None = flag(None, "Bearer token that every request must have.", API, auto="none needed")
    api_key_file: str | None = flag(
        None, "File that contains the API key, so that `ps` does not show it.", API, metavar="FILE"
    )
    admin_api_key: str | None = flag(
        None, "Bearer token of the administrative endpoints.", API, auto="the API key; without any, only loopback may"
    )
    admin_api_key_file: str | None = flag(None, "File that contains the admin API key.", API, metavar="FILE")
    allowed_hosts: str | None = flag(
        None,
        "Comma-separated host names by which clients may address the server; `*` allows every name.",
        API,
        auto="loopback names if bound to loopback without a key, else every name",
    )
    allowed_origins: str | None = flag(
        None,
        "Comma-separated origins of web pages that may call the API (CORS); `*` allows every page.",
        API,
        auto="no page of another origin",
    )
    served_model_name: str | None = flag(
        None, "Model name in replies; it must not contain a colon.", API, auto="the model path"
    )
    chat_template: str | None = flag(
        None, "File of a Jinja chat template.", API, auto="the tokenizer's", metavar="FILE"
    )
    reasoning_parser: str | None = flag(
        None,
        "Form in which the model thinks: the thought is then in `reasoning_content`, not in `content`.",
        API,
        choices=tuple(REASONING_PARSERS),
        auto="thoughts stay in the content",
    )
    tool_call_parser: str | None = flag(
        None,
        "Form in which the model calls tools: calls are then in `tool_calls`. Without it, tools are refused.",
        API,
        choices=tuple(TOOL_CALL_PARSERS),
        auto="tools are refused",
    )
    grammar_backend: str = flag(
        "llguidance",
        "Backend that constrains output to a JSON schema, a regular expression or a grammar; `none` refuses these.",
        API,
        choices=("llguidance", "none"),
        upstream_only=("xgrammar", "outlines"),
    )
    constrained_json_whitespace_pattern: str | None = flag(
        None,
        "Regular expression for the white space between the tokens of JSON that follows a schema.",
        API,
        auto="any, up to 40 characters in a row",
    )
    constrained_json_disable_any_whitespace: bool = flag(
        False, "Allow no white space between the tokens of JSON that follows a schema.", API
    )
    enable_cache_report: bool = flag(False, "Report cached prompt tokens in `usage`.", API)
    sampling_defaults: str = flag(
        "model",
        "Where sampling defaults come from: the model's generation_config.json, or OpenAI's values.",
        API,
        choices=("model", "openai"),
    )
