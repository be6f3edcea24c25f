"""Steps of resolution that follow from the model's attention: its backend, and the size of pages."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.srt.arg_groups.steps import Change, Context
from sglang.srt.configs.attention_backends import UNBUILT_ATTENTION_BACKENDS, BackendDeclaration, attention_backends
from sglang.srt.server_args import ServerArgs


def choose_page_size(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """The only page size that the model's cache allows, if there is just one."""
    page = None if context.model is None else context.model.text.cache_layout().page_size
    if page is None:
        return
    why = f"compressed entries and states of the model follow pages of {page} tokens"
    if args.page_size == page:
        return
    if args.page_size is not None:
        yield f"--page-size {args.page_size} cannot be served: {why}. Drop the flag"
        return
    yield Change("page_size", None, page, why)
    chunk, total = args.chunked_prefill_size, args.max_total_tokens
    if chunk is not None and chunk > 0 and chunk % page:
        near = max(page, chunk - chunk % page)
        yield f"--chunked-prefill-size {chunk} is not a multiple of a page, and {why}: use {near}"
    if total is not None and total < page:
        yield f"--max-total-tokens {total} is less than one page, and {why}"


def choose_attention_backend(args: ServerArgs, context: Context) -> Iterator[Change | str]:
    """The requested backend if it can serve the model here, else the first that can."""
    asked, kind = args.attention_backend, context.platform.kind
    on_cpu = context.platform.device_type == "cpu"
    family = None if context.model is None else context.model.text.attention_family
    of_family = attention_backends(family)
    fallback, reason = "torch_native" if on_cpu else "triton", "the portable GPU backend"
    reason = "tensors live on the host" if on_cpu else reason
    if fallback not in of_family and of_family:
        fallback = next((name for name, one in of_family.items() if kind in one.platforms), next(iter(of_family)))
        reason = f"for {family} attention"
    if asked is None:
        yield Change("attention_backend", None, fallback, reason)
        if fallback in of_family:
            yield from _backend_limits(args, of_family[fallback])
        return
    declared = of_family.get(asked)
    platforms = declared.platforms if declared else UNBUILT_ATTENTION_BACKENDS.get(asked, ())
    if not platforms:
        known = ", ".join(sorted(of_family))
        yield f"--attention-backend {asked} has no {family} attention, which the model needs: use {known}"
    elif kind not in platforms:
        yield f"--attention-backend {asked} needs platform {' or '.join(platforms)}, and this is {kind}: use {fallback}"
    elif declared is None:
        yield Change("attention_backend", asked, fallback, f"{asked} is a preference, and this build lacks it")
    else:
        yield from _backend_limits(args, declared)


def _backend_limits(args: ServerArgs, declared: BackendDeclaration) -> Iterator[str]:
    """Errors for settings that the backend does not support."""
    for flag, value, taken in (
        ("--page-size", args.page_size, declared.page_sizes),
        ("--kv-cache-dtype", args.kv_cache_dtype, declared.cache_dtypes),
    ):
        if taken and value not in taken:
            sizes = ", ".join(str(one) for one in taken)
            yield f"{flag} {value} is not supported by --attention-backend {declared.name}, which takes {sizes}"
