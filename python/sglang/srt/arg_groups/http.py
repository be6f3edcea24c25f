"""The settings of the HTTP server: address, admission, time limits, keys, and what is logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg
from sglang.srt.parser.reasoning_parser import REASONING_PARSERS
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS

HTTP = "HTTP server"
ADMISSION = "Admission and time limits"
LOGGING = "Logging"
API = "API related"


@dataclass(frozen=True)
class HttpArgs:
    """The part of ``ServerArgs`` that the HTTP process reads. None means that a default is chosen at start."""

    host: Annotated[str, Arg("Address to listen on.", HTTP)] = "127.0.0.1"
    port: Annotated[int, Arg("Port to listen on.", HTTP, minimum=1, maximum=65535)] = 30000
    skip_server_warmup: Annotated[bool, Arg("Do not send a warm-up request after start.", HTTP)] = False
    max_connections: Annotated[int, Arg("Most connections at once; more get status 503.", ADMISSION, minimum=1)] = 4096
    max_request_bytes: Annotated[
        int, Arg("Most bytes of a request body; a larger one gets status 413.", ADMISSION, minimum=1, human=True)
    ] = 16 << 20
    max_queued_requests: Annotated[
        int | None,
        Arg(
            "Most waiting requests; more get status 503.",
            ADMISSION,
            minimum=1,
            auto="2048; none for the Engine",
        ),
    ] = None
    max_queued_tokens: Annotated[
        int | None,
        Arg(
            "Most tokens of waiting requests, prompts and maximum outputs; more get status 503.",
            ADMISSION,
            minimum=1,
            human=True,
            auto="no limit",
        ),
    ] = None
    request_timeout: Annotated[
        float | None,
        Arg(
            "Seconds after which an unfinished request ends with an error. A request may set a shorter time.",
            ADMISSION,
            above=0,
            auto="no limit",
        ),
    ] = None
    drain_timeout: Annotated[
        float,
        Arg(
            "Seconds for running requests to finish after SIGTERM; then they end with an error.",
            ADMISSION,
            minimum=0,
        ),
    ] = 20.0
    log_level: Annotated[str, Arg("Log level.", LOGGING, choices=("debug", "info", "warning", "error", "critical"))] = (
        "info"
    )
    log_level_http: Annotated[
        str | None,
        Arg(
            "Log level of HTTP: one line per request at `info` and below.",
            LOGGING,
            choices=("debug", "info", "warning", "error", "critical"),
            auto="as --log-level",
        ),
    ] = None
    uvicorn_access_log_exclude_prefixes: Annotated[
        list[str] | None,
        Arg(
            "Prefixes of paths whose successful requests are not logged; those of probes never are.",
            LOGGING,
            auto="none",
        ),
    ] = None
    log_requests: Annotated[bool, Arg("Log each request and its outcome.", LOGGING)] = False
    log_requests_level: Annotated[
        int,
        Arg(
            "How much of a request: 0 ids, counts and times; 1 sampling parameters too; 2 the beginnings of prompt and "
            "output too; 3 all of them.",
            LOGGING,
            minimum=0,
            maximum=3,
        ),
    ] = 2
    log_requests_format: Annotated[
        str, Arg("Plain text, or one JSON object per line.", LOGGING, choices=("text", "json"))
    ] = "text"
    profile_dir: Annotated[
        str | None,
        Arg(
            "Folder for the traces of `/start_profile`.",
            LOGGING,
            auto="profiles are refused",
            metavar="FOLDER",
        ),
    ] = None
    enable_metrics: Annotated[bool, Arg("Serve Prometheus metrics at `/metrics`.", LOGGING)] = False
    decode_log_interval: Annotated[int, Arg("Number of decode steps between two log lines.", LOGGING, minimum=1)] = 40
    api_key: Annotated[str | None, Arg("Bearer token that every request must have.", API, auto="none needed")] = None
    api_key_file: Annotated[
        str | None, Arg("File that contains the API key, so that `ps` does not show it.", API, metavar="FILE")
    ] = None
    admin_api_key: Annotated[
        str | None,
        Arg("Bearer token of the administrative endpoints.", API, auto="the API key; without any, only loopback may"),
    ] = None
    admin_api_key_file: Annotated[str | None, Arg("File that contains the admin API key.", API, metavar="FILE")] = None
    allowed_hosts: Annotated[
        str | None,
        Arg(
            "Comma-separated host names by which clients may address the server; `*` allows every name.",
            API,
            auto="loopback names if bound to loopback without a key, else every name",
        ),
    ] = None
    allowed_origins: Annotated[
        str | None,
        Arg(
            "Comma-separated origins of web pages that may call the API (CORS); `*` allows every page.",
            API,
            auto="no page of another origin",
        ),
    ] = None
    served_model_name: Annotated[
        str | None, Arg("Model name in replies; it must not contain a colon.", API, auto="the model path")
    ] = None
    chat_template: Annotated[
        str | None, Arg("File of a Jinja chat template.", API, auto="the tokenizer's", metavar="FILE")
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Arg(
            "Form in which the model thinks: the thought is then in `reasoning_content`, not in `content`.",
            API,
            choices=tuple(REASONING_PARSERS),
            auto="thoughts stay in the content",
        ),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Arg(
            "Form in which the model calls tools: calls are then in `tool_calls`. Without it, tools are refused.",
            API,
            choices=tuple(TOOL_CALL_PARSERS),
            auto="tools are refused",
        ),
    ] = None
    grammar_backend: Annotated[
        str,
        Arg(
            "Backend that constrains output to a JSON schema, a regular expression or a grammar; `none` refuses these.",
            API,
            choices=("llguidance", "none"),
            upstream_only=("xgrammar", "outlines"),
        ),
    ] = "llguidance"
    constrained_json_whitespace_pattern: Annotated[
        str | None,
        Arg(
            "Regular expression for the white space between the tokens of JSON that follows a schema.",
            API,
            auto="any, up to 40 characters in a row",
        ),
    ] = None
    constrained_json_disable_any_whitespace: Annotated[
        bool, Arg("Allow no white space between the tokens of JSON that follows a schema.", API)
    ] = False
    enable_cache_report: Annotated[bool, Arg("Report cached prompt tokens in `usage`.", API)] = False
    sampling_defaults: Annotated[
        str,
        Arg(
            "Where sampling defaults come from: the model's generation_config.json, or OpenAI's values.",
            API,
            choices=("model", "openai"),
        ),
    ] = "model"
