"""The real scheduler, pools and model in this process, without sockets: for parity and identity tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang.srt.arg_groups.model_config import read_model_config
from sglang.srt.managers.io_struct import (
    BatchTokenIDOutput,
    FinishReason,
    SchedulerMessage,
    StartedReqs,
    TokenizedGenerateReqInput,
    TokenizerMessage,
    TokenLogprobs,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_config import SchedulerConfig
from sglang.srt.managers.scheduler_process import make_grammars, make_memory
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.runner_build import make_runner
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.srt.speculative.draft_utils import make_speculator
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.resolved_args import resolved


def numbers(logprobs: Sequence[float | None]) -> list[float]:
    """Log-probabilities of tokens that each have one."""
    found = [value for value in logprobs if value is not None]
    assert len(found) == len(logprobs), "a token has no log-probability"
    return found


class Finished:
    """Everything that one request received."""

    def __init__(self) -> None:
        self.output_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.num_retractions = 0
        self.input_logprobs: TokenLogprobs | None = None
        self.output_logprobs = TokenLogprobs()


class EngineHarness:
    """``submit`` requests, ``step`` or ``run``, and read ``results``; ``run`` checks that no memory is left behind."""

    def __init__(
        self, model_path: str, with_tokenizer: bool = False, overlap: bool = False, **server_args: Any
    ) -> None:
        args = ServerArgs(model_path=model_path, **server_args)
        self.model_config = read_model_config(args, current_platform.kind)
        tokenizer = Tokenizer.from_path(model_path) if with_tokenizer else None
        if tokenizer is not None:
            self.model_config = self.model_config.with_tokenizer_end(tokenizer.eos_token_ids, model_path)
        self.args = resolved(args, self.model_config, current_platform)
        with override_server_args(**vars(self.args)):
            self.runner = make_runner(self.args, self.model_config)
        config = SchedulerConfig.create(self.args, self.model_config, self.runner)
        # On CPU steps never overlap by default; the bookkeeping of overlap can still be tested.
        config = replace(config, args=replace(self.args, disable_overlap_schedule=not overlap))
        self.memory = make_memory(self.runner, self.args)
        self.worker = TpModelWorker(self.runner, make_speculator(self.args, self.runner))
        grammars = make_grammars(self.args, self.model_config, tokenizer, None)
        stops = StopChecker(tokenizer)
        self.scheduler = Scheduler(config, self.worker, self.memory, self, stops, grammars=grammars)
        self.inbox: list[SchedulerMessage] = []
        self.results: dict[str, Finished] = {}
        self.answers: list[TokenizerMessage] = []

    def submit(self, rid: str, input_ids: list[int], params: SamplingParams, **fields: Any) -> None:
        """Queue one request; ``fields`` are those of TokenizedGenerateReqInput."""
        self.inbox.append(
            TokenizedGenerateReqInput(rid=rid, input_ids=list(input_ids), sampling_params=params, **fields)
        )

    def step(self) -> bool:
        """Process what was submitted and run one step; False if nothing was left to run."""
        for message in self.receive(wait=False):
            self.scheduler._handle(message)
        return self.scheduler.step()

    def run(self) -> dict[str, Finished]:
        """Step until all is done."""
        while self.step():
            pass
        assert not self.scheduler.has_work()
        self.memory.check_idle(deep=True)
        return self.results

    # The scheduler's channel

    def receive(self, wait: bool) -> list[SchedulerMessage]:
        messages, self.inbox = self.inbox, []
        return messages

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None:
        for output in message.outputs:
            result = self.results.setdefault(output.rid, Finished())
            result.output_ids += output.output_ids
            result.finish_reason = output.finish_reason
            result.cached_tokens = output.cached_tokens
            result.num_retractions = output.num_retractions
            result.input_logprobs = output.input_logprobs or result.input_logprobs
            if output.output_logprobs is not None:
                for name in ("logprobs", "ids", "top", "chosen"):
                    getattr(result.output_logprobs, name).extend(getattr(output.output_logprobs, name))

    def to_tokenizer(self, message: TokenizerMessage) -> None:
        if not isinstance(message, StartedReqs):
            self.answers.append(message)
