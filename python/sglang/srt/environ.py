"""Every environment variable of the engine: its type, default, bounds and meaning, declared once.

Read one with `envs.SGLANG_X.get()`; nothing else in the tree reads a SGLANG_ variable. `check_environment` is the
launch check.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from sglang.srt.environ_fields import EnvBool, EnvError, EnvField, EnvInt, EnvSection, EnvStr

if TYPE_CHECKING:
    from sglang.srt.environ_check import EnvReport

__all__ = [
    "EnvBool",
    "EnvError",
    "EnvField",
    "EnvInt",
    "EnvStr",
    "Envs",
    "check_environment",
    "declared_variables",
    "envs",
]


class _General(EnvSection, title="General Configuration"):
    SGLANG_PLATFORM = EnvStr(
        "",
        choices=("", "cpu", "cuda", "rocm"),
        doc="Platform whose policy is used. Not set: ROCm, CUDA or CPU, by what torch reports. `rocm` without a GPU "
        "needs the vendor fakes on `PYTHONPATH`.",
    )
    SGLANG_API_KEY = EnvStr("", secret=True, doc="The API key, if neither `--api-key` nor `--api-key-file` is given.")
    SGLANG_ADMIN_API_KEY = EnvStr(
        "", secret=True, doc="The admin API key, if neither `--admin-api-key` nor its file is given."
    )
    SGLANG_KERNELS = EnvStr(
        "",
        doc="Comma-separated `op=implementation` pairs that force an implementation, for bisection, such as "
        "`sampling.greedy=torch`. One that cannot run is an error. `python -m sglang.kernels` lists ops.",
    )
    SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION = EnvBool(
        False,
        doc="`/health` generates one token, as `/health_generate` always does. False: it only looks at the state.",
    )
    SGLANG_HEALTH_CHECK_TIMEOUT = EnvInt(
        20,
        minimum=1,
        unit="seconds",
        doc="Time that a health check waits for the scheduler, or that a process of the engine may be silent, before "
        "it answers 503.",
    )
    SGLANG_TORCH_INDEX_URL = EnvStr(
        "",
        secret=True,
        doc="Package index from which the set-up scripts install torch. Not set: torch's CPU index where no GPU is "
        "seen, else pip's own.",
    )


class _Tuning(EnvSection, title="Performance Tuning"):
    SGLANG_OPT_USE_MULTI_STREAM_OVERLAP = EnvBool(
        True,
        doc="DeepSeek V4: in decode graphs, pool and select compressed entries on a second stream that overlaps the "
        "queries. CUDA: for one token, where one H200 gains 1 % of a step, and nothing beyond (N). ROCm: off unless "
        "`SGLANG_ROCM_USE_MULTI_STREAM` is set too. CPU: there are no streams.",
    )
    SGLANG_STREAM_SITES = EnvStr(
        "",
        doc="Comma-separated `site=on` or `site=off` pairs that override which places overlap on a second stream, for "
        "measurements, such as `qwen3_5.qk_norm=off`. `/server_info` lists the sites.",
    )
    SGLANG_TRACE_OVERLAP = EnvBool(
        False,
        doc="Measure with events how much of each side computation overlapped the main one, by site and step size, for "
        "the log, `/metrics` and `/server_info`.",
    )


class _Mori(EnvSection, title="MORI Configuration"):
    SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK = EnvInt(
        4096,
        minimum=1,
        unit="tokens",
        doc="Tokens that one rank may dispatch in one forward (prefill chunk, decode batch, graph bucket, draft "
        "tokens) with `--moe-a2a-backend mori`, which sizes its buffers by it. Automatic sizes are lowered to it; an "
        "explicit one above it is refused. Raise it for longer prefill chunks; every buffer grows with it: 8 ranks of "
        "4096 rows with 7168 bf16 columns take 448 MiB (S).",
    )
    SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS = EnvInt(
        0,
        minimum=0,
        unit="tokens",
        doc="Received tokens for which one rank allocates memory, from 1 to world size times "
        "`SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK`, rounded up to a multiple of the world size. 0 means that "
        "maximum, which hardly ever arrives: a cap saves its memory. A step that could bring more runs its experts in "
        "rounds, each of which exchanges again and may read every expert again (F). With MORI's IntraNode kernel the "
        "cap is rounded down, holds at least one row of each rank, and a rank sends at most cap / world size rows in "
        "a round (S).",
        requires="MORI 1.1.0 or later where MORI carries the tokens by another kernel than IntraNode, unless 0",
    )
    SGLANG_MORI_MOE_MAX_INPUT_TOKENS = EnvInt(
        0,
        minimum=0,
        unit="tokens",
        doc="Most rows of the receive buffer that the experts compute. They compute the rows that can arrive, raised "
        "to a tuned size; this reduces that size, but never below what can arrive (logged once, counted). 0 means no "
        "cut. It hardly pays: computing only what can arrive saves 18 to 39 % of a layer (N) and needs no setting.",
    )
    SGLANG_MORI_DISPATCH_DTYPE = EnvStr(
        "auto",
        choices=("auto", "bf16", "fp8", "fp4"),
        doc="Type of the tokens on the way to the experts. `auto`: by the type of the expert weights. `bf16`: the "
        "model's own type. A type that the weights do not have is refused. fp8 sends half the bytes and changes no bit "
        "of the result (F).",
    )
    SGLANG_MORI_COMBINE_DTYPE = EnvStr(
        "auto",
        choices=("auto", "bf16", "fp8", "fp8_direct_cast"),
        platform="hip",
        doc="Type of the tokens on the way back from the experts; `auto` is the model's own type, `fp8` is scaled by "
        "blocks (IntraNode and AsyncLL kernels): half the bytes, for sums that are rounded once more (S). No effect "
        "where MORI does not carry the tokens.",
    )
    SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD = EnvInt(
        256,
        minimum=0,
        unit="tokens",
        platform="hip",
        doc="Between nodes, kernel InterNodeV1LL serves up to this value of "
        "`SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK`, InterNodeV1 above (S). It decides nothing on "
        "one machine of 8 GPUs.",
    )
    SGLANG_MORI_QP_PER_TRANSFER = EnvInt(
        4,
        minimum=1,
        unit="queue pairs",
        platform="hip",
        doc="RDMA queue pairs that one KV transfer uses.",
        pending="prefill-decode disaggregation over MORI",
    )
    SGLANG_MORI_POST_BATCH_SIZE = EnvInt(
        -1,
        minimum=-1,
        unit="work requests",
        platform="hip",
        doc="RDMA work requests posted to a queue pair at once. -1 leaves it to MORI.",
        pending="prefill-decode disaggregation over MORI",
    )
    SGLANG_MORI_NUM_WORKERS = EnvInt(
        4,
        minimum=1,
        unit="threads",
        platform="hip",
        doc="Threads that run KV transfers.",
        pending="prefill-decode disaggregation over MORI",
    )


class _Models(EnvSection, title="Model-Specific Options"):
    SGLANG_USE_AITER = EnvBool(
        False,
        platform="hip",
        doc="Use AITER's kernels where they fit: greedy sampling (vocabularies that are multiples of 16) and routed "
        "experts in 16 or 8 bits (loaded into AITER's weight layout, which no other kernel reads: every step then "
        "fuses shared experts that can be) (F). `/server_info` lists what runs.",
        requires="the package `aiter`",
    )
    SGLANG_USE_AITER_UNIFIED_ATTN = EnvBool(
        False, platform="hip", doc="Use AITER's unified attention kernel.", pending="AITER's attention"
    )
    SGLANG_ROCM_FUSED_DECODE_MLA = EnvBool(
        False,
        platform="hip",
        doc="Fuse rotary embedding and latent attention in MLA decode. AMD's images set it.",
        pending="a fused MLA decode kernel",
    )
    SGLANG_ROCM_DISABLE_LINEARQUANT = EnvBool(
        False,
        platform="hip",
        doc="Keep linear layers unquantised when experts are quantised on load. AMD's images set it to 0.",
        pending="quantisation of experts alone",
    )
    SGLANG_MOE_PADDING = EnvBool(
        False,
        platform="hip",
        doc="Pad expert weights in memory for faster access; values stay the same. AMD's images set it.",
        pending="padded expert weights",
    )
    SGLANG_USE_ROCM700A = EnvBool(
        False,
        platform="hip",
        doc="Work around a collective of ROCm 7.0 alpha under attention data parallelism. AMD's images set it.",
        pending="collectives other than torch's",
    )
    SGLANG_ROCM_USE_MULTI_STREAM = EnvBool(
        False,
        platform="hip",
        doc="DeepSeek MoE: run shared experts on a second stream, overlapping routed experts. ROCm: off unless set. "
        "CUDA: on by default, `SGLANG_STREAM_SITES` turns it off. CPU: there are no streams. One H200 gains 4 to 8 % "
        "of V2-Lite's unfused step up to 64 tokens, and nothing where both sides wait for memory, as in V3's experts "
        "over two GPUs (N).",
        requires="a hardware queue for each stream, so `GPU_MAX_HW_QUEUES` of at least 5 over several ranks with an "
        "all-to-all (the launcher sets what the streams need unless it is set; a smaller value is warned of); pays "
        "best with `--deepep-mode low_latency` (MORI AsyncLL) and `MORI_ENABLE_SDMA=1`",
    )
    SGLANG_ALT_STREAM = EnvBool(
        False,
        platform="hip",
        doc="Qwen3.5: create the second stream, on which shared experts overlap routed experts. ROCm: off unless "
        "set. CUDA: on unasked, `SGLANG_STREAM_SITES` turns it off. CPU: there are no streams. Where fusion is "
        "impossible upstream reports 1.4 to 3.1 % of TPOT on MI355X from concurrency 8 on, and a loss of 0.5 % at 4 "
        "(sglang PR 25885).",
        requires="`--disable-shared-experts-fusion` where shared experts would be fused",
    )
    SGLANG_GDN_QKVZ_BA_ALT_STREAM = EnvBool(
        False,
        platform="hip",
        doc="Qwen3.5: also split the two input projections of a GDN layer over both streams, in captured steps. ROCm: "
        "off unless set. CUDA: on unasked, `SGLANG_STREAM_SITES` turns it off. One H200 gains up to 2.5 % of a step "
        "up to 32 tokens and loses 0.8 % at 128 (N).",
        requires="`SGLANG_ALT_STREAM`",
    )
    SGLANG_QK_NORM_ALT_STREAM = EnvBool(
        False,
        platform="hip",
        doc="Qwen3.5: also split the query and key norms over both streams, in captured steps; other steps keep the "
        "one launch that norms, rotates and stores. ROCm: off unless set. CUDA: off (upstream: on), since one H200 "
        "loses up to 1.6 % of a step (N); `SGLANG_STREAM_SITES` turns it on.",
        requires="`SGLANG_ALT_STREAM`",
    )
    SGLANG_OPT_USE_TRITON_FUSED_MHC = EnvBool(
        True,
        doc="DeepSeek V4: where one sub-block ends and the next begins, one op leaves the streams, enters them and "
        "norms the row, in steps of up to 64 tokens on gfx95x and 256 on sm_90; other steps run an op for each. "
        "AITER's kernels run it with `SGLANG_USE_AITER` from AITER 0.1.14 on (F), else Triton's (C). "
        "`/server_info`: `kernels`, op `mhc.hc_post_pre`.",
    )
    SGLANG_PREP_IN_CUDA_GRAPH = EnvBool(
        True,
        doc="DeepSeek V4: a decode graph plans its own step, from lengths on the device; else each replay is planned "
        "before it. Both give the same plan. A verify graph, whose lengths are known within it alone, always plans.",
    )
    SGLANG_OPT_C4_SPARSE_TOPK = EnvInt(
        0,
        minimum=0,
        unit="entries",
        doc="DeepSeek V4: a check that layers of ratio 4 attend to so many entries, which the checkpoint alone decides "
        "(`index_topk`): another number is refused. 0: no check.",
    )
    SGLANG_MAMBA_SSM_DTYPE = EnvStr(
        "",
        choices=("", "float32", "bfloat16", "float16"),
        doc="Type of the recurrent state of linear-attention layers. Not set: the checkpoint's `mamba_ssm_dtype`.",
    )
    SGLANG_MAMBA_CONV_DTYPE = EnvStr(
        "",
        choices=("", "float32", "bfloat16", "float16"),
        doc="Type of the convolution state of linear-attention layers. Not set: the type of the activations.",
    )


class _Tests(EnvSection, title="Testing & Debugging (Internal/CI)"):
    SGLANG_IS_IN_CI = EnvBool(False, doc="The process runs in CI: tests give a server ten minutes to start.")
    SGLANG_IS_IN_CI_AMD = EnvBool(
        False, doc="The process runs in CI on AMD runners: tests give a server an hour to start."
    )
    SGLANG_FAKE_ROCM_ARCH = EnvStr(
        "gfx942",
        choices=("gfx942", "gfx950"),
        platform="hip",
        doc="Architecture whose policy and 8-bit types are used when HIP's paths run over the vendor fakes on a CPU. "
        "No effect on a GPU.",
    )
    SGLANG_ALLOW_VENDOR_FAKES = EnvBool(
        False,
        platform="hip",
        doc="Run on the CPU over fakes of AITER and MORI that are on `PYTHONPATH` although torch is a ROCm build. "
        "False: that combination is refused, since a fake would answer in place of AMD's kernels.",
    )
    SGLANG_EMULATOR_TINYGRAD = EnvStr(
        "",
        doc="Root of a checkout of tinygrad, with which `scripts/amd_emulate.py` and its test run AMD's machine code "
        "on a CPU. Not set: they say that nothing was run.",
    )
    SGLANG_TEST_RETRACT = EnvBool(
        False, doc="Retract running requests at intervals, as if memory had run out; tokens stay the same."
    )
    SGLANG_TEST_RETRACT_INTERVAL = EnvInt(
        3, minimum=1, unit="steps", doc="Scheduler steps between retractions.", requires="`SGLANG_TEST_RETRACT`"
    )
    SGLANG_DEBUG_STREAM_OVERLAP = EnvBool(
        False,
        doc="Check at each overlap of two streams that the sides share no storage that one of them writes, and no "
        "collective; a conflict stops the step. Kernels outside torch's dispatcher are not seen.",
    )
    SGLANG_DEBUG_POOL_CHECK = EnvBool(
        False,
        doc="Check the accounting of all memory pools at each idle step, a leak stops the server; fill what a window "
        "gives back with NaN, a request that reads it ends; and hold the plan of each step of DeepSeek V4 that is not "
        "captured against its lengths, which waits for the device.",
    )


class Envs(_General, _Tuning, _Mori, _Models, _Tests):
    """All declarations; one instance, `envs`. Attributes are fields, not values, and cannot be assigned."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"envs.{name} cannot be assigned; use envs.{name}.set(value) or .override(value)")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"envs.{name} cannot be deleted; use envs.{name}.clear()")

    if not TYPE_CHECKING:  # a type checker would otherwise accept every name

        def __getattr__(self, name: str) -> NoReturn:
            from sglang.srt.environ_check import misspelt

            meant = misspelt(name, _FIELDS)
            hint = "" if meant is None else f"; did you mean {meant}?"
            raise AttributeError(f"no environment variable {name} is declared in environ.py{hint}")


envs = Envs()
_FIELDS: dict[str, EnvField[Any]] = {
    name: field for section in Envs.__bases__ for name, field in vars(section).items() if isinstance(field, EnvField)
}


def declared_variables() -> Mapping[str, EnvField[Any]]:
    """Every declared field by its name, in order of declaration."""
    return dict(_FIELDS)


def check_environment(environ: Mapping[str, str] | None = None, platform_kind: str | None = None) -> EnvReport:
    """Check all SGLANG_ and SGL_ names and values of an environment (default: os.environ) before a launch.

    `platform_kind` ("cpu", "cuda", "hip") enables the warning for variables of another platform. A caller that finds
    `report.errors` prints them and exits with status 2.
    """
    from sglang.srt.environ_check import check

    return check(os.environ if environ is None else environ, _FIELDS, platform_kind)
