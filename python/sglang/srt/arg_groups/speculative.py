"""The settings of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg

SPECULATIVE = "Speculative decoding"
# Largest number of draft tokens of a chain; a verify step has one more row per request.
MAX_STEPS = 8
DEFAULT_STEPS = 3


@dataclass(frozen=True)
class SpecArgs:
    """The part of ``ServerArgs`` on speculative decoding: which model drafts tokens, and how many."""

    speculative_algorithm: Annotated[
        str | None,
        Arg(
            "Draft tokens with the checkpoint's MTP layer and verify them in one step; output stays the same. Both "
            "names mean this.",
            SPECULATIVE,
            choices=("EAGLE", "NEXTN"),
            upstream_only=("EAGLE3", "STANDALONE", "NGRAM", "DFLASH", "DSPARK"),
            auto="none",
        ),
    ] = None
    speculative_draft_model_path: Annotated[
        str | None,
        Arg(
            "Folder whose MTP layer drafts tokens.",
            SPECULATIVE,
            aliases=("--speculative-draft-model",),
            metavar="FOLDER",
            auto="the model's own",
        ),
    ] = None
    speculative_num_steps: Annotated[
        int | None,
        Arg("Draft tokens per step.", SPECULATIVE, minimum=1, maximum=MAX_STEPS, auto=str(DEFAULT_STEPS)),
    ] = None
    speculative_eagle_topk: Annotated[
        int | None, Arg("Draft tokens per position. Only 1, a chain, is supported.", SPECULATIVE, minimum=1, auto="1")
    ] = None
    speculative_num_draft_tokens: Annotated[
        int | None,
        Arg(
            "Rows per request in a verify step: --speculative-num-steps plus one.",
            SPECULATIVE,
            minimum=2,
            maximum=MAX_STEPS + 1,
            auto="--speculative-num-steps + 1",
        ),
    ] = None
