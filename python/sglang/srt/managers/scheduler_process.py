"""Entry point of one scheduler process: joins its group, loads the model, reports ready, serves."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from sglang.kernels.compile_watch import watch_compilations
from sglang.kernels.registry import REGISTRY, KernelConfigError
from sglang.srt.arg_groups.model_config import read_model_config
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.constrained.llguidance_backend import GrammarError, GuidanceBackend
from sglang.srt.distributed.kernel_agreement import require_same_kernels
from sglang.srt.distributed.parallel_state import get_parallel_state, init_parallel_state, is_lost_peer, leave_groups
from sglang.srt.environ import envs
from sglang.srt.layers.moe.token_dispatcher.base import ExchangeConfigError
from sglang.srt.managers.child_context import ChildContext, parse_child_arguments
from sglang.srt.managers.dp_sync import DpStepSync
from sglang.srt.managers.grammar_manager import GrammarManager
from sglang.srt.managers.io_struct import GrammarReady, ShutdownReq
from sglang.srt.managers.ipc import Sender
from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.request_grammar import grammar_refusal
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_config import SchedulerConfig
from sglang.srt.managers.scheduler_io import FollowerChannel, RankZeroChannel, SchedulerChannel
from sglang.srt.managers.step_profiler import StepProfiler
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.pool_plan import PoolPlanError
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.state_companion import StateCompanion
from sglang.srt.mem_cache.window_companion import WindowCompanion
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import make_runner
from sglang.srt.model_executor.warm_up import warm_up
from sglang.srt.model_loader.weight_utils import WeightLoadError
from sglang.srt.platforms import PlatformError, current_platform
from sglang.srt.server_args import ServerArgs, get_global_server_args, set_global_server_args_for_scheduler
from sglang.srt.speculative.draft_utils import make_speculator
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.utils.common import end_process
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError
from sglang.srt.utils.logging_config import configure_logging

logger = logging.getLogger(__name__)

USER_ERRORS = (
    ConfigError, ExchangeConfigError, KernelConfigError, PlatformError, PoolPlanError, TokenizerError, WeightLoadError
)  # fmt: skip

# Seconds for all ranks to end together; the launcher kills them a little later.
END_S = 4.0
LOST_PEER = "another rank of this replica has gone; this one ends too, and the launcher names the one that failed first"


def make_memory(runner: ModelRunner, args: ServerArgs) -> ReqMemory:
    """Allocator and prefix tree over the runner's pools."""
    page_size = runner.memory.page_size
    states, window = runner.memory.state_slots, runner.memory.window
    allocator = TokenToKVPoolAllocator(runner.pools.size(FULL), page_size, window)
    spec = SpecInfo.of(args.speculative_num_steps)
    width, ahead = (1, 0) if spec is None else (spec.num_draft_tokens, spec.slots_ahead)
    companions: list[PrefixCompanion[Any]] = [] if states is None else [StateCompanion(states)]
    if window is not None:
        companions.append(WindowCompanion(window, 2 * width + ahead))
        if envs.SGLANG_DEBUG_POOL_CHECK.get():
            runner.pools.poison_windows()
            window.on_return = runner.pools.fill_window_page
    tree = RadixCache(allocator, page_size, args.disable_radix_cache, companions)
    return ReqMemory(allocator, runner.req_to_token_pool, tree, width, ahead)


def make_grammars(
    args: ServerArgs, model_config: ModelConfig, tokenizer: Tokenizer | None, announce: Callable[[str], None] | None
) -> GrammarManager:
    """Loads the tokenizer for grammars, for a server that supports constrained output."""
    refusal = grammar_refusal(args)
    if tokenizer is None or refusal is not None:
        return GrammarManager(refusal or "there is no tokenizer")
    try:
        return GrammarManager(
            GuidanceBackend(tokenizer.to_json(), model_config.vocab_size, model_config.eos_token_ids), announce
        )
    except GrammarError as error:
        logger.warning("requests with constrained output will be refused: %s", error)
        return GrammarManager(str(error))


def build(context: ChildContext, args: ServerArgs) -> tuple[Scheduler, ModelConfig]:
    """All parts of a scheduler process."""
    config = context.config
    place = config.place
    current_platform.set_device(place.local_rank)
    logger.info("platform: %s", current_platform.describe())
    backend = "nccl" if current_platform.device_type == "cuda" else "gloo"
    state = init_parallel_state(
        place.rank,
        args.tp_size,
        config.dist_init_method,
        backend,
        timeout_s=float(args.dist_timeout or 600),
        attn_dp_size=args.attn_dp_size,
        ep_size=args.ep_size,
        local_rank=place.local_rank,
    )
    model_config = read_model_config(args, current_platform.kind)
    tokenizer = None
    if not args.skip_tokenizer_init:
        source = args.tokenizer_path or args.model_path
        tokenizer = Tokenizer.from_path(source, with_template=False)
        model_config = model_config.with_tokenizer_end(tokenizer.eos_token_ids, source)
    REGISTRY.freeze()
    require_same_kernels(state.world)
    runner = make_runner(args, model_config, config.needed)
    scheduler_config = SchedulerConfig.create(args, model_config, runner, place.dp_rank)
    worker = TpModelWorker(runner, make_speculator(args, runner))
    if not args.skip_server_warmup:
        most = scheduler_config.prefill.chunk_tokens or args.max_prefill_tokens
        warm_up(runner, most, worker.run_step, worker.decode_kind)
        require_same_kernels(state.world)  # a kernel may have failed on only one rank
    sync: DpStepSync | None = None
    peers: list[int] = []
    if state.attn_dp_size > 1:
        sync = DpStepSync(state, runner.graph_bucket)
        peers = [peer for peer in range(state.attn_dp_size) if peer != place.dp_rank]
    channel: SchedulerChannel = FollowerChannel(state.tp)
    announce: Callable[[str], None] = lambda _: None  # noqa: E731
    if state.tp.rank == 0:
        channel = RankZeroChannel(config.ipc, state.tp, place.dp_rank, peers)
        inbox = Sender(config.ipc.schedulers[place.dp_rank])
        announce = lambda rid: inbox.send(GrammarReady(rid=rid))  # noqa: E731
    memory, stops = make_memory(runner, args), StopChecker(tokenizer)
    grammars = make_grammars(args, model_config, tokenizer, announce)
    return Scheduler(scheduler_config, worker, memory, channel, stops, sync, grammars), model_config


def make_profiler(scheduler: Scheduler, context: ChildContext) -> StepProfiler:
    """The profiler of the steps of ``scheduler``, which handles profiling messages before it sees them."""
    metrics, label = scheduler.metrics, context.config.place.label or "TP0"
    profiler = StepProfiler(
        get_global_server_args().profile_dir,
        label.replace(" ", "-"),
        lambda: metrics.num_prefill_steps + metrics.num_decode_steps + metrics.num_idle_steps,
    )
    scheduler.profile = profiler.handle
    return profiler


def _force_exit() -> None:
    logger.warning("the ranks have not ended together within %g s; this one exits without the others", END_S)
    os._exit(1)


def _end_within_bound() -> None:
    timer = threading.Timer(END_S, _force_exit)
    timer.daemon = True
    timer.start()


def end_together(context: ChildContext) -> Callable[[], None]:
    """Asks the loops of all ranks to end after the same step."""
    state, config = get_parallel_state(), context.config
    inbox = Sender(config.ipc.schedulers[config.place.dp_rank])

    def ask() -> None:
        _end_within_bound()
        if state.tp.rank == 0:  # the others learn it from there
            inbox.send(ShutdownReq())

    return ask


def leave(scheduler: Scheduler) -> None:
    """Destroy this rank's groups together with the other ranks; end the process if they do not do so in time."""
    _end_within_bound()
    scheduler.worker.runner.drop_graphs()  # a graph holds the communicators that it uses
    current_platform.synchronize()
    try:
        leave_groups(END_S / 2)
    except RuntimeError as error:
        logger.warning("ending the groups of ranks failed: %s", str(error).partition("\n")[0])
        os._exit(1)
    logger.info("left the groups of ranks")


def end_after_lost_peer(context: ChildContext, error: Exception) -> NoReturn:
    """Log one line, and exit without the destructors of the groups, which would print long errors or wait."""
    logger.error(LOST_PEER)
    logger.debug("what the collective said", exc_info=error)
    context.report_error(LOST_PEER, user_error=False, lost_peer=True)
    os._exit(1)


def serve(scheduler: Scheduler, context: ChildContext, info: dict[str, Any]) -> int:
    """Report ready with ``info``, and run the loop until it is asked to end; the exit status."""
    several = get_parallel_state().world.size > 1
    with context.serving(info, end_together(context)) if several else context.serving(info):
        profiler = make_profiler(scheduler, context)

        def on_turn() -> None:
            context.pulse.beat()
            profiler.turn()

        try:
            scheduler.event_loop(on_turn)
            if several:
                leave(scheduler)
        except Exception as error:
            if several and is_lost_peer(error):
                end_after_lost_peer(context, error)
            context.report_error(f"{type(error).__name__}: {error}", user_error=False)
            raise
    return 0


def main() -> int:
    context = parse_child_arguments()
    config = context.config
    args = config.server_args
    prefix = f"scheduler {config.place.label}".strip()
    configure_logging(args.log_level, prefix)
    set_global_server_args_for_scheduler(args)
    torch.set_grad_enabled(False)
    try:
        scheduler, model_config = build(context, args)
    except USER_ERRORS as error:
        context.report_error(str(error), user_error=True)
        return 2
    except Exception as error:
        if is_lost_peer(error):
            end_after_lost_peer(context, error)
        context.report_error(f"{prefix}: {type(error).__name__}: {error}\n{traceback.format_exc()}", user_error=False)
        return 1
    REGISTRY.start_serving()
    watch_compilations()
    info = {
        "max_total_num_tokens": scheduler.memory.allocator.size,
        "max_req_len": scheduler.config.max_req_len,
        "context_len": model_config.context_len,
        "vocab_size": model_config.vocab_size,
        "platform": current_platform.describe(),
        "fakes": list(current_platform.fakes),
    }
    return serve(scheduler, context, info)


if __name__ == "__main__":
    end_process(main())
