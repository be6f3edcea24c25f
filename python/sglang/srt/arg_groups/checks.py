"""Errors and warnings about settings that need neither a model nor a machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.network import is_loopback

DISPATCH_LIMIT = "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"


def _parallelism(args: ServerArgs) -> Iterator[str]:
    tp, dp, ep = args.tp_size, args.dp_size, args.ep_size
    meets = args.nccl_port
    if meets is not None and meets <= args.port < meets + args.num_replicas:
        yield f"--port {args.port} is also that of the ranks, --nccl-port {meets}: choose another for one of them"
    if args.enable_dp_attention and tp % dp:
        yield f"--dp-size {dp} does not divide --tp-size {tp}: with --enable-dp-attention it splits those ranks"
    if args.moe_a2a_backend == "none":
        if tp % ep:
            yield f"--ep-size {ep} does not divide --tp-size {tp}: it splits those ranks"
        if args.deepep_mode == "low_latency":
            yield "--deepep-mode low_latency needs --moe-a2a-backend mori, which is none here"
    elif args.chunked_prefill_size == -1:
        yield (
            "--chunked-prefill-size -1 never cuts a prompt, and --moe-a2a-backend mori dispatches at most "
            f"{DISPATCH_LIMIT} tokens at once: give a size"
        )


def _shared_experts(args: ServerArgs) -> Iterator[str]:
    if args.disable_shared_experts_fusion and args.enforce_shared_experts_fusion:
        yield "--disable-shared-experts-fusion and --enforce-shared-experts-fusion contradict: drop one"


def _chunks(args: ServerArgs) -> Iterator[str]:
    chunk, page = args.chunked_prefill_size, args.page_size or 1
    if chunk is not None and chunk > 0 and chunk % page:
        near = max(page, chunk - chunk % page)
        yield f"--chunked-prefill-size {chunk} is not a multiple of --page-size {page}: use {near}"
    if chunk == -1 and args.enable_mixed_chunk:
        yield "--enable-mixed-chunk needs chunks, and --chunked-prefill-size -1 turns them off: drop one"
    if args.max_total_tokens is not None and args.max_total_tokens < page:
        yield f"--max-total-tokens {args.max_total_tokens} is less than one page: --page-size is {page}"


def _names_and_text(args: ServerArgs) -> Iterator[str]:
    if args.served_model_name is not None and (":" in args.served_model_name or not args.served_model_name):
        yield f"--served-model-name must be a name without a colon, got {args.served_model_name!r}"
    for flag, key in (("--api-key", args.api_key), ("--admin-api-key", args.admin_api_key)):
        if key == "":
            yield f"{flag} must not be empty: leave it out for no key"
    try:
        overrides = json.loads(args.json_model_override_args)
    except ValueError as error:
        yield f"--json-model-override-args is not valid JSON: {error}"
        return
    if not isinstance(overrides, dict):
        yield f"--json-model-override-args must be a JSON object, got {args.json_model_override_args}"


def _graph_sizes(args: ServerArgs) -> Iterator[str]:
    for flag, sizes, most_flag, most in (
        ("--cuda-graph-bs", args.cuda_graph_bs, "--cuda-graph-max-bs", args.cuda_graph_max_bs),
        (
            "--piecewise-cuda-graph-tokens",
            args.piecewise_cuda_graph_tokens,
            "--piecewise-cuda-graph-max-tokens",
            args.piecewise_cuda_graph_max_tokens,
        ),
    ):
        if sizes and most and max(sizes) > most:
            yield f"{flag} has {max(sizes)}, but {most_flag} is {most}: raise the latter or drop it"


def _speculative(args: ServerArgs) -> Iterator[str]:
    steps, tokens = args.speculative_num_steps, args.speculative_num_draft_tokens
    given = {
        "--speculative-draft-model-path": args.speculative_draft_model_path,
        "--speculative-num-steps": steps,
        "--speculative-eagle-topk": args.speculative_eagle_topk,
        "--speculative-num-draft-tokens": tokens,
    }
    named = [flag for flag, value in given.items() if value is not None]
    if args.speculative_algorithm is None:
        if named:
            yield f"{named[0]} was given without --speculative-algorithm: add --speculative-algorithm NEXTN"
        return
    if args.speculative_eagle_topk not in (None, 1):
        yield f"--speculative-eagle-topk {args.speculative_eagle_topk} requests a tree of draft tokens: use 1, a chain"
    if steps is not None and tokens is not None and tokens != steps + 1:
        yield f"--speculative-num-draft-tokens {tokens} must be --speculative-num-steps {steps} + 1: use {steps + 1}"
    if args.enable_mixed_chunk:
        yield "--enable-mixed-chunk and --speculative-algorithm cannot be combined: drop one"


RULES: tuple[Callable[[ServerArgs], Iterator[str]], ...] = (
    _parallelism,
    _shared_experts,
    _chunks,
    _names_and_text,
    _graph_sizes,
    _speculative,
)


def remarks(args: ServerArgs) -> list[str]:
    """Warnings about flags that are accepted."""
    found = []
    if args.api_key is None and not is_loopback(args.host):
        closed = "" if args.admin_api_key else "; administrative endpoints are closed"
        anyone = f"anyone who can reach port {args.port} may run inference"
        found.append(f"--host {args.host} without --api-key: {anyone}{closed}")
    elif args.api_key is None and args.admin_api_key:
        found.append(
            "--admin-api-key protects only the administrative endpoints: set --api-key too to protect inference"
        )
    return found
