"""The settings of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag

SPECULATIVE = "Speculative decoding"
# Largest number of draft tokens of a chain; a verify step has one more row per request.
MAX_STEPS = 8
DEFAULT_STEPS = 3


@dataclass(frozen=True)
class SpecArgs:
    """The part of ``ServerArgs`` on speculative decoding: which model drafts tokens, and how many."""

    speculative_algorithm: str | None = flag(
        None,
        "Draft tokens with the checkpoint's MTP layer and verify them in one step; output stays the same. Both "
        "names mean this.",
        SPECULATIVE,
        choices=("EAGLE", "NEXTN"),
        upstream_only=("EAGLE3", "STANDALONE", "NGRAM", "DFLASH", "DSPARK"),
        auto="none",
    )
    speculative_draft_model_path: str | None = flag(
        None,
        "Folder whose MTP layer drafts tokens.",
        SPECULATIVE,
        aliases=("--speculative-draft-model",),
        metavar="FOLDER",
        auto="the model's own",
    )
    speculative_num_steps: int | None = flag(
        None, "Draft tokens per step.", SPECULATIVE, minimum=1, maximum=MAX_STEPS, auto=str(DEFAULT_STEPS)
    )
    speculative_eagle_topk: int | None = flag(
        None, "Draft tokens per position. Only 1, a chain, is supported.", SPECULATIVE, minimum=1, auto="1"
    )
    speculative_num_draft_tokens: int | None = flag(
        None,
        "Rows per request in a verify step: --speculative-num-steps plus one.",
        SPECULATIVE,
        minimum=2,
        maximum=MAX_STEPS + 1,
        auto="--speculative-num-steps + 1",
    )
