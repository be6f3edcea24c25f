"""From given to resolved settings: small pure steps, each of which explains what it changes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from sglang.srt.arg_groups.attention import choose_attention_backend, choose_page_size
from sglang.srt.arg_groups.checks import DISPATCH_LIMIT
from sglang.srt.arg_groups.speculative import DEFAULT_STEPS
from sglang.srt.arg_groups.steps import Change, Context, Step
from sglang.srt.configs.attention_backends import attention_backends
from sglang.srt.configs.cache_layout import STATE
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.server_args import ServerArgs


def _device(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    present = context.platform.device_type
    if args.device == "auto":
        yield Change("device", "auto", present, f"platform {context.platform.kind}")
    elif args.device != present:
        fix = "set SGLANG_PLATFORM=cpu" if args.device == "cpu" else "drop it, or run where torch sees a GPU"
        yield f"--device {args.device} is not the device of platform {context.platform.kind}, {present}: {fix}"


def _model_limits(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    model = context.model
    if model is None:
        return
    if args.context_length is None:
        yield Change("context_length", None, model.context_len, "max_position_embeddings of the model")
    name = str(model.dtype).removeprefix("torch.")
    if args.dtype == "auto":
        reason = "on CPU, auto means float32" if context.platform.kind == "cpu" else "the checkpoint's"
        yield Change("dtype", "auto", name, reason)
    else:
        yield Change("dtype", args.dtype, name, "the same type by torch's name")


def _weight_format(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    if args.quantization is None and context.model is not None and context.model.quant_config is not None:
        yield Change("quantization", None, context.model.quant_config.method, "the checkpoint's")


def _defaults(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """Every field that stays None until here and needs neither model nor other fields than the page size."""
    on_cpu = context.platform.device_type == "cpu"
    where, page = "on CPU" if on_cpu else "on a GPU", args.page_size or 1
    # A page larger than the default chunk makes the chunk one page.
    chunk = min(2048 if on_cpu else 8192, args.max_prefill_tokens)
    chunk = max(page, chunk - chunk % page)
    memory_reason = "on CPU, other programs need memory too" if on_cpu else "the rest is for activations"
    for name, value, reason in (
        ("tokenizer_path", args.model_path, "the tokenizer of the model folder"),
        ("served_model_name", args.model_path, "the model path"),
        ("mem_fraction_static", 0.5 if on_cpu else 0.88, memory_reason),
        ("max_running_requests", 64 if on_cpu else 256, f"default {where}"),
        ("page_size", page, "default"),
        ("chunked_prefill_size", chunk, f"default {where} up to --max-prefill-tokens, in pages of {page}"),
        ("sampling_backend", "pytorch", "the only sampler"),
        ("random_seed", secrets.randbelow(2**31), "random, because --random-seed is not given"),
        ("dist_timeout", 600, "default, in seconds"),
    ):
        if getattr(args, name) is None:
            yield Change(name, None, value, reason)


def _schedule(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    if args.schedule_policy == "lpm" and args.disable_radix_cache:
        yield Change("schedule_policy", "lpm", "fcfs", "--disable-radix-cache leaves no prefixes to match")


def _graphs(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    platform, backend = context.platform, args.attention_backend
    if not platform.supports_graphs:
        yield Change("disable_cuda_graph", args.disable_cuda_graph, True, "the host does not capture graphs")
    elif backend in (declared := attention_backends()) and not declared[backend].graphs:
        reason = f"attention backend {backend} does not capture graphs"
        yield Change("disable_cuda_graph", args.disable_cuda_graph, True, reason)
    if platform.device_type == "cpu":
        reason = "on the host a step ends before the next is prepared"
        yield Change("disable_overlap_schedule", args.disable_overlap_schedule, True, reason)


def _speculation(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """How many draft tokens, and by which model."""
    name = args.speculative_algorithm
    if name is None:
        return
    tokens = args.speculative_num_draft_tokens
    steps = args.speculative_num_steps or (tokens - 1 if tokens else DEFAULT_STEPS)
    for field_name, value, reason in (
        ("speculative_num_steps", steps, "--speculative-num-draft-tokens - 1" if tokens else "default"),
        ("speculative_eagle_topk", 1, "a chain"),
        ("speculative_num_draft_tokens", steps + 1, "--speculative-num-steps + 1"),
        ("speculative_draft_model_path", args.model_path, "the model's own MTP layer"),
    ):
        if getattr(args, field_name) is None:
            yield Change(field_name, None, value, reason)
    flag, model = f"--speculative-algorithm {name}", context.model
    if model is not None and model.text.mtp_refusal and args.speculative_draft_model_path in (None, args.model_path):
        yield f"{flag} needs an MTP layer: {model.text.mtp_refusal}. Drop it, or name a folder that has one"


def _state_slots(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """Each running request holds one slot: an automatic number of requests is lowered to the number of slots."""
    slots, running = args.max_mamba_cache_size, args.max_running_requests
    if slots is None or running is None or context.model is None:
        return
    if not context.model.text.cache_layout().has(STATE):
        yield f"--max-mamba-cache-size {slots} was given, but the model has no recurrent states: drop it"
    elif slots < running and "max_running_requests" not in context.given:
        yield Change("max_running_requests", running, slots, f"--max-mamba-cache-size {slots}")
    elif slots < running:
        yield f"--max-mamba-cache-size {slots} is below --max-running-requests {running}, each of which needs a slot"


def _entries(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    text = None if context.model is None else context.model.text
    if isinstance(text, DeepseekV4Config) and context.sparse_topk not in (0, text.index_topk):
        yield (
            f"SGLANG_OPT_C4_SPARSE_TOPK={context.sparse_topk} would change what the model computes: its checkpoint "
            f"attends to {text.index_topk} entries (index_topk). Unset it"
        )


def _recurrent_state(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    if args.mamba_ssm_dtype is not None:
        return
    if context.mamba_ssm_dtype:
        yield Change("mamba_ssm_dtype", None, context.mamba_ssm_dtype, "SGLANG_MAMBA_SSM_DTYPE")
    elif context.model is not None:
        named = context.model.text.state_dtype
        yield Change("mamba_ssm_dtype", None, named or "float32", "the checkpoint's" if named else "no such state")


def _parallel_modes(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    if args.enable_dp_attention and args.dp_size == 1:
        yield Change("enable_dp_attention", True, False, "--dp-size 1 is one attention group")
    if args.load_balance_method == "auto":
        yield Change("load_balance_method", "auto", "round_robin", "default")
    if args.moe_a2a_backend == "mori":
        reason = "--moe-a2a-backend mori splits the experts over all ranks"
        yield Change("ep_size", args.ep_size, args.tp_size, reason)
        if args.deepep_mode == "auto":
            yield Change("deepep_mode", "auto", "normal", "for --moe-a2a-backend mori, auto is normal")


def _group_chunk(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """A prefill chunk is shared by the attention groups."""
    chunk, groups, page = args.chunked_prefill_size, args.attn_dp_size, args.page_size or 1
    if chunk is not None and chunk > 0 and groups > 1:
        part = max(page, chunk // groups // page * page)
        yield Change("chunked_prefill_size", chunk, part, f"for each of {groups} attention groups")


def _dispatch_limit(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """No forward of a rank may have more tokens than may be dispatched: automatic values are lowered to the limit."""
    limit, page, rows = context.dispatch_limit, args.page_size or 1, args.speculative_num_draft_tokens or 1
    if args.moe_a2a_backend != "mori" or not limit or args.max_running_requests is None:
        return
    if args.chunked_prefill_size is None or args.chunked_prefill_size == -1:
        return

    def refusal(size: str) -> str:
        return f"{size} is above {DISPATCH_LIMIT}={limit}: lower the first or raise the second"

    def refused_requests(flag: str, count: int) -> Iterator[str]:
        if count * rows > limit:
            each = f", each with {rows} rows in a verify step (--speculative-num-draft-tokens), {count * rows} in all,"
            yield refusal(f"{flag} {count}{each if rows > 1 else ''}")

    yield from refused_requests("--cuda-graph-bs", max(args.cuda_graph_bs or [0]))
    yield from refused_requests("--cuda-graph-max-bs", args.cuda_graph_max_bs or 0)
    running, chunk = args.max_running_requests, args.chunked_prefill_size
    if limit < rows:
        yield refusal(f"--speculative-num-draft-tokens {rows}, the rows of one request in a verify step,")
    elif "max_running_requests" in context.given:
        yield from refused_requests("--max-running-requests", running)
    else:
        # A mixed step holds a chunk and every running request, a verify step several rows of each request.
        most = max(1, limit // 2) if args.enable_mixed_chunk else limit // rows
        running = min(running, most)
        each = f" for {rows} rows of each request" if rows > 1 else ""
        yield Change("max_running_requests", args.max_running_requests, running, f"{DISPATCH_LIMIT}={limit}{each}")
    beside = running if args.enable_mixed_chunk else 0
    largest = (limit - beside) // page * page
    if chunk <= largest:
        return
    mixed = f" next to {beside} running requests (--enable-mixed-chunk)" if beside else ""
    if largest < page:
        yield refusal(f"--page-size {page}{mixed}")
    elif "chunked_prefill_size" in context.given:
        groups = f" on each of {args.attn_dp_size} attention groups" if args.attn_dp_size > 1 else ""
        yield refusal(f"--chunked-prefill-size {chunk}{groups}{mixed}")
    else:
        yield Change("chunked_prefill_size", chunk, largest, f"{DISPATCH_LIMIT}={limit}")


def _experts(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    ep = args.ep_size
    if context.model is None or (ep == 1 and args.moe_a2a_backend == "none"):
        return
    experts = context.model.text.num_routed_experts
    if not experts:
        yield f"the model has no experts: drop --ep-size {ep} and --moe-a2a-backend {args.moe_a2a_backend}"
    elif experts % ep:
        forced = " (--tp-size, by --moe-a2a-backend mori)" if args.moe_a2a_backend == "mori" else ""
        yield f"--ep-size {ep}{forced} does not divide the model's {experts} experts: use a divisor"


def _shared_experts_fusion(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """On by default if the shared experts can be stored as additional routed experts."""
    if context.model is None or args.disable_shared_experts_fusion:
        return
    refusal = context.model.shared_fusion_refusal(args.moe_a2a_backend)
    if refusal and args.enforce_shared_experts_fusion:
        yield f"--enforce-shared-experts-fusion cannot be served: {refusal}. Drop it; results are the same"
    elif refusal:
        yield Change("disable_shared_experts_fusion", False, True, refusal)


def _tensor_parallel(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    if context.model is None or args.tp_size == 1 or args.tp_size % args.attn_dp_size or args.tp_size % args.ep_size:
        return
    uneven = context.model.text.uneven_parts(args.tp_size // args.attn_dp_size, args.tp_size // args.ep_size)
    if uneven:
        sizes = ", ".join(f"{name} {size}" for name, size in uneven.items())
        parted = f" in {args.attn_dp_size} attention groups" if args.attn_dp_size > 1 else ""
        ranks = f"--tp-size {args.tp_size}{parted}"
        yield f"{ranks} does not divide {sizes} of the model: use a smaller power of two"


STEPS: tuple[Step, ...] = (
    _device,
    _model_limits,
    _weight_format,
    _parallel_modes,
    choose_page_size,
    _defaults,
    _state_slots,
    _speculation,
    _group_chunk,
    _dispatch_limit,
    _schedule,
    choose_attention_backend,
    _graphs,
    _recurrent_state,
    _entries,
    _experts,
    _shared_experts_fusion,
    _tensor_parallel,
)
