"""Flags of upstream sglang (option strings of 0.5.12, and some of 0.5.23) that this engine lacks, and what they get.

A flag that would change what is computed, who may talk to the server, or the topology is refused. One that would not is
accepted, has no effect, and is said once at start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

# Values of our own flags that upstream knows and this engine lacks.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "attention_backend": (
        "flex_attention", "nsa", "dsv4", "compressed", "cutlass_mla", "fa3", "fa4", "flashinfer", "flashmla",
        "trtllm_mla", "tokenspeed_mla", "trtllm_mha", "dual_chunk_flash_attn", "wave", "intel_amx", "ascend",
        "intel_xpu",
    ),
    "load_format": (
        "pt", "npcache", "sharded_state", "gguf", "bitsandbytes", "mistral", "layered", "flash_rl", "remote",
        "remote_instance", "fastsafetensors", "private", "runai_streamer",
    ),
    "quantization": (
        "awq", "awq_marlin", "gptq", "gptq_marlin", "bitsandbytes", "gguf", "w8a8_int8", "w8a8_fp8", "w4afp8",
        "moe_wna16", "qoq", "mxfp4", "mxfp8", "modelopt", "modelopt_fp8", "modelopt_fp4", "petit_nvfp4",
        "compressed-tensors", "quark", "auto-round", "unquant",
    ),
    "moe_a2a_backend": ("deepep", "mooncake", "nixl", "ascend_fuseep", "flashinfer", "megamoe"),
}  # fmt: skip

# One word a flag: names joined by "|"; then "=" when a value follows, "=+" or "=*" for a list, "=?" for an optional
# one; then "~a,b" for values that ask for nothing, with which a refused flag is accepted.
_REFUSED = (
    (
        "speculative decoding is not implemented",
        "--speculative-algorithm= --speculative-draft-model-path|--speculative-draft-model= "
        "--speculative-draft-model-revision= --speculative-draft-load-format= --speculative-num-steps= "
        "--speculative-eagle-topk= --speculative-num-draft-tokens= --speculative-dflash-block-size= "
        "--speculative-accept-threshold-single= --speculative-accept-threshold-acc= --speculative-token-map= "
        "--speculative-attention-mode= --speculative-draft-attention-backend= "
        "--speculative-draft-window-size|--speculative-dflash-draft-window-size= --speculative-moe-runner-backend= "
        "--speculative-moe-a2a-backend= --speculative-draft-model-quantization= "
        "--speculative-ngram-min-bfs-breadth= --speculative-ngram-max-bfs-breadth= --speculative-ngram-match-type= "
        "--speculative-ngram-max-trie-depth= --speculative-ngram-capacity= "
        "--speculative-ngram-external-corpus-path= --speculative-ngram-external-sam-budget= "
        "--speculative-ngram-external-corpus-max-tokens= --speculative-adaptive --speculative-adaptive-config= "
        "--speculative-skip-dp-mlp-sync --enable-multi-layer-eagle",
    ),
    (
        "prefill and decode run in one server: disaggregation is not implemented",
        "--disaggregation-mode=~null --disaggregation-transfer-backend= --disaggregation-bootstrap-port= "
        "--disaggregation-ib-device= --disaggregation-decode-enable-radix-cache "
        "--disaggregation-decode-enable-offload-kvcache --num-reserved-decode-tokens= "
        "--disaggregation-decode-polling-interval= --encoder-only --language-only --encoder-transfer-backend= "
        "--encoder-urls=+ --enable-adaptive-dispatch-to-encoder --enable-pdmux --pdmux-config-path= "
        "--sm-group-num=",
    ),
    (
        "attention groups are set by --enable-dp-attention and --dp-size alone; dense layers follow them",
        "--enable-attn-tp-input-scattered --moe-dense-tp-size= --attn-dp-size=~1",
    ),
    (
        "experts lie in order, once each, over --ep-size parts: copies and rebalancing are not implemented",
        "--moe-data-parallel-size|--moe-dp-size=~1 --ep-num-redundant-experts=~0 --ep-dispatch-algorithm= "
        "--init-expert-location=~trivial --enable-eplb --eplb-algorithm= --eplb-rebalance-num-iterations= "
        "--eplb-rebalance-layers-per-chunk= --eplb-min-rebalancing-utilization-threshold= "
        "--elastic-ep-backend=~none --enable-elastic-expert-backup --enable-deepep-waterfill --elastic-ep-rejoin "
        "--enable-ep-moe --enable-deepep-moe",
    ),
    (
        "a step is one batch: a dispatch is always followed by its own receive",
        "--enable-two-batch-overlap --tbo-token-distribution-threshold=",
    ),
    (
        "pipeline parallelism is not implemented",
        "--pipeline-parallel-size|--pp-size|--pp=~1 --pp-max-micro-batch-size= --pp-async-batch-depth=~0",
    ),
    (
        "context parallelism is not implemented",
        "--attention-context-parallel-size|--attn-cp-size=~1 --enable-nsa-prefill-context-parallel "
        "--nsa-prefill-cp-mode= --enable-prefill-context-parallel --prefill-cp-mode=",
    ),
    (
        "several nodes are not implemented: the ranks of a server share one machine",
        "--nnodes=~1 --node-rank=~0",
    ),
    (
        "the ranks are processes of this machine; Ray is not implemented",
        "--use-ray",
    ),
    (
        "weights are plain or fp8 in 128x128 blocks (--quantization); other formats are not implemented",
        "--quantization-param-path= --modelopt-quant= --modelopt-checkpoint-restore-path= "
        "--modelopt-checkpoint-save-path= --modelopt-export-path= --quantize-and-serve --rl-quant-profile= "
        "--torchao-config= --flashinfer-mxfp4-moe-precision=~default --enable-quant-communications",
    ),
    (
        "the language-model head has the dtype of the weights",
        "--enable-fp32-lm-head",
    ),
    (
        "LoRA adapters are not implemented",
        "--enable-lora --enable-lora-overlap-loading --max-lora-rank= --lora-target-modules=* --lora-paths=* "
        "--max-loras-per-batch= --max-loaded-loras= --lora-eviction-policy= --lora-backend= --max-lora-chunk-size= "
        "--experts-shared-outer-loras --no-experts-shared-outer-loras --lora-use-virtual-experts "
        "--lora-strict-loading --no-lora-strict-loading --lora-drain-wait-threshold=",
    ),
    (
        "only text generation is implemented",
        "--is-embedding --enable-multimodal --enable-mis --prefill-only-disable-kv-cache",
    ),
    (
        "each phase uses the one backend of --attention-backend",
        "--prefill-attention-backend=~torch_native --decode-attention-backend=~torch_native",
    ),
    (
        "sparse attention is not implemented",
        "--enable-hisparse --hisparse-config|--hierarchical-sparse-attention-extra-config=",
    ),
    (
        "diffusion language models are not implemented",
        "--dllm-algorithm= --dllm-algorithm-config=",
    ),
    (
        "weights and experts stay on the device; offloading is not implemented",
        "--cpu-offload-gb=~0 --offload-group-size=~-1 --offload-num-in-group= --offload-prefetch-step= "
        "--offload-mode= --kt-weight-path= --kt-method= --kt-cpuinfer= --kt-threadpool-count= "
        "--kt-num-gpu-experts= --kt-max-deferred-experts-per-token=",
    ),
    (
        "weights come from safetensors files of --model-path",
        "--custom-weight-loader=* --decrypted-config-file= --decrypted-draft-config-file= "
        "--delete-ckpt-after-loading --remote-instance-weight-loader-seed-instance-ip= "
        "--remote-instance-weight-loader-seed-instance-service-port= "
        "--remote-instance-weight-loader-send-weights-group-ports= --remote-instance-weight-loader-backend= "
        "--remote-instance-weight-loader-start-seed-via-transfer-engine --modelexpress-config= "
        "--checkpoint-engine-wait-weights-before-ready --engine-info-bootstrap-port=",
    ),
    (
        "the checksum of a model is not verified",
        "--model-checksum=?",
    ),
    (
        "model code and hooks are never taken from elsewhere",
        "--forward-hooks= --model-impl=~auto,sglang --model-config-parser=~auto",
    ),
    (
        "the server speaks plain HTTP; put a proxy in front of it",
        "--ssl-keyfile= --ssl-certfile= --ssl-ca-certs= --ssl-keyfile-password= --enable-ssl-refresh --grpc-mode "
        "--grpc-http-sidecar-port=",
    ),
    (
        "the outputs or inputs that it adds to the API are not implemented",
        "--enable-custom-logit-processor --enable-return-hidden-states --enable-return-routed-experts "
        "--enable-return-indexer-topk --preferred-sampling-params= --completion-template= "
        "--hf-chat-template-name= --tool-server= --enable-streaming-session --strip-thinking-cache "
        "--enable-strict-thinking",
    ),
    (
        "requests are ordered by --schedule-policy alone",
        "--enable-priority-scheduling --disable-priority-preemption --default-priority-value= "
        "--abort-on-priority-when-disabled --schedule-low-priority-values-first "
        "--priority-scheduling-preemption-threshold=",
    ),
    (
        "batch-invariant numerics are not promised",
        "--enable-deterministic-inference --rl-on-policy-target=",
    ),
    (
        "only the tokenizer of the tokenizers library is used",
        "--tokenizer-mode=~auto --tokenizer-backend=~huggingface",
    ),
    (
        "GPUs are taken from the first visible one on: choose with HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES",
        "--base-gpu-id=~0 --gpu-id-step=~1",
    ),
)

_NO_EFFECT = (
    (
        "with --enable-dp-attention the head is always split inside an attention group",
        "--enable-dp-lm-head --enable-dp-attention-local-control-broadcast",
    ),
    (
        "no remote code is ever run",
        "--trust-remote-code",
    ),
    (
        "a local folder has no revision and nothing is downloaded",
        "--revision= --download-dir=",
    ),
    (
        "replies carry the raw text: reasoning and tool calls stay in the message content",
        "--reasoning-parser= --tool-call-parser=",
    ),
    (
        "constrained decoding is not implemented, and requests that ask for it are refused",
        "--grammar-backend= --constrained-json-whitespace-pattern= --constrained-json-disable-any-whitespace "
        "--disable-outlines-disk-cache",
    ),
    (
        "weights are read by one safetensors loader",
        "--model-loader-extra-config= --weight-loader-disable-mmap --weight-loader-prefetch-checkpoints "
        "--weight-loader-prefetch-num-threads= --weight-loader-drop-cache-after-load",
    ),
    (
        "there is one tokenizer and one detokenizer",
        "--tokenizer-worker-num= --detokenizer-worker-num= --enable-tokenizer-batch-encode "
        "--disable-tokenizer-batch-decode --enable-dynamic-batch-tokenizer --dynamic-batch-tokenizer-batch-size= "
        "--dynamic-batch-tokenizer-batch-timeout= --batch-notify-size=",
    ),
    (
        "each op picks its own kernel; SGLANG_KERNELS forces one",
        "--moe-runner-backend= --fp8-gemm-backend= --fp4-gemm-backend= --linear-attn-backend= "
        "--linear-attn-decode-backend= --linear-attn-prefill-backend= --mamba-backend= --nsa-prefill-backend= "
        "--nsa-decode-backend= --dsa-prefill-backend= --dsa-decode-backend= --mm-attention-backend= "
        "--disable-flashinfer-autotune --flashinfer-mla-disable-ragged --enable-flashinfer-mla "
        "--disable-chunked-prefix-cache --triton-attention-reduce-in-fp32 --triton-attention-num-kv-splits= "
        "--triton-attention-split-tile-size= --enable-fused-qk-norm-rope --enable-fused-moe-sum-all-reduce "
        "--disable-flashinfer-cutlass-moe-fp4-allgather --mamba-scheduler-strategy= --mamba-track-interval=",
    ),
    (
        "collectives are torch's",
        "--disable-custom-all-reduce --enable-mscclpp --enable-torch-symm-mem --enable-symm-mem --enable-nccl-nvls "
        "--pre-warm-nccl --enable-p2p-check --enable-aiter-allreduce-fusion --enable-flashinfer-allreduce-fusion "
        "--enforce-disable-flashinfer-allreduce-fusion --deepep-config= --mooncake-ib-device= "
        "--prefill-round-robin-balance",
    ),
    (
        "models run eagerly, without compilation or captured graphs of this kind",
        "--enable-torch-compile --enable-torch-compile-debug-mode --torch-compile-max-bs= "
        "--disable-piecewise-cuda-graph --enable-piecewise-cuda-graph --enforce-piecewise-cuda-graph "
        "--piecewise-cuda-graph-tokens=+ --piecewise-cuda-graph-compiler= --piecewise-cuda-graph-max-tokens= "
        "--enable-breakable-cuda-graph --enable-profile-cuda-graph --enable-cudagraph-gc --debug-cuda-graph "
        "--disable-cuda-graph-padding --cuda-graph-bs-decode=+ --cuda-graph-max-bs-decode= "
        "--cuda-graph-backend-decode= --cuda-graph-bs-prefill=+ --cuda-graph-backend-prefill= "
        "--record-nolora-graph --no-record-nolora-graph",
    ),
    (
        "the ranks share one machine and meet at --nccl-port",
        "--dist-init-addr|--nccl-init-addr=",
    ),
    (
        "work is not overlapped in this way",
        "--enable-single-batch-overlap",
    ),
    (
        "the scheduler has no such knob",
        "--num-continuous-decode-steps= --scheduler-recv-interval= --prefill-max-requests= "
        "--enable-dynamic-chunking --enable-prefill-delayer --prefill-delayer-max-delay-passes= "
        "--prefill-delayer-token-usage-low-watermark= --prefill-delayer-forward-passes-buckets=+ "
        "--prefill-delayer-wait-seconds-buckets=+ --prefill-delayer-queue-min-ratio= "
        "--prefill-delayer-max-delay-ms= --sleep-on-idle --soft-watchdog-timeout=",
    ),
    (
        "memory is split between the KV pool and the recurrent states by need",
        "--swa-full-tokens-ratio= --disable-hybrid-swa-memory --hybrid-kvcache-ratio=? --mamba-full-memory-ratio= "
        "--enable-memory-saver --enable-weights-cpu-backup --enable-draft-weights-cpu-backup",
    ),
    (
        "the prefix cache has one tier, on the device",
        "--enable-hierarchical-cache --hicache-ratio= --hicache-size= --hicache-write-policy= "
        "--hicache-io-backend= --hicache-mem-layout= --hicache-storage-backend= --hicache-storage-prefetch-policy= "
        "--hicache-storage-backend-extra-config= --enable-lmcache",
    ),
    (
        "only text is served",
        "--disable-fast-image-processor --keep-mm-feature-on-device --enable-broadcast-mm-inputs-process "
        "--mm-process-config= --mm-enable-dp-encoder --limit-mm-data-per-request= --enable-prefix-mm-cache "
        "--enable-mm-global-cache --enable-precise-embedding-interpolation",
    ),
    (
        "this log or measurement is not implemented",
        "--log-level-http= --log-requests-level= --log-requests-format= --log-requests-target=+ "
        "--uvicorn-access-log-exclude-prefixes=* --crash-dump-folder= --show-time-cost --enable-mfu-metrics "
        "--enable-metrics-for-all-schedulers --tokenizer-metrics-custom-labels-header= "
        "--tokenizer-metrics-allowed-custom-labels=+ --extra-metric-labels= --bucket-time-to-first-token=+ "
        "--bucket-inter-token-latency=+ --bucket-e2e-request-latency=+ --collect-tokens-histogram "
        "--prompt-tokens-buckets=+ --generation-tokens-buckets=+ --gc-warning-threshold-secs= "
        "--enable-request-time-stats-logging --kv-events-config= --enable-forward-pass-metrics "
        "--forward-pass-metrics-worker-id= --forward-pass-metrics-ipc-name= --enable-trace --otlp-traces-endpoint= "
        "--export-metrics-to-file --export-metrics-to-file-dir= --enable-layerwise-nvtx-marker "
        "--expert-distribution-recorder-mode= --expert-distribution-recorder-buffer-size= "
        "--enable-expert-distribution-metrics --enable-nan-detection --debug-tensor-dump-output-folder= "
        "--debug-tensor-dump-layers=+ --debug-tensor-dump-input-file= --debug-tensor-dump-inject= "
        "--msprobe-dump-config=",
    ),
    (
        "the HTTP server has no such setting",
        "--fastapi-root-path= --enable-http2 --warmups= --file-storage-path= --weight-version= "
        "--stream-response-default-include-usage --custom-sigquit-handler=",
    ),
    (
        "the operating system places processes and collects garbage",
        "--numa-node=+ --gc-threshold=+",
    ),
)


# Names that reports and unmerged changes use for a flag that is called otherwise.
MISNAMED = {"--moriep-mode": "--deepep-mode", "--mori-mode": "--deepep-mode", "--deepseek-mode": "--deepep-mode"}


@dataclass(frozen=True)
class UpstreamFlag:
    """A flag that this engine lacks; ``nargs`` is 0, 1, "+", "*" or "?"; ``harmless`` values make a refusal moot."""

    names: tuple[str, ...]
    nargs: int | str
    refused: bool
    reason: str
    harmless: tuple[str, ...]

    def is_moot(self, words: list[str]) -> bool:
        return len(words) == 1 and words[0] in self.harmless


@functools.cache
def upstream_flags() -> dict[str, UpstreamFlag]:
    """Every lacking flag by each of its names."""
    result: dict[str, UpstreamFlag] = {}
    for table, refused in ((_REFUSED, True), (_NO_EFFECT, False)):
        for reason, text in table:
            for word in text.split():
                spec, _, harmless = word.partition("~")
                names, equals, shape = spec.partition("=")
                flag = UpstreamFlag(
                    names=tuple(names.split("|")),
                    nargs=(shape or 1) if equals else 0,
                    refused=refused,
                    reason=reason,
                    harmless=tuple(harmless.split(",")) if harmless else (),
                )
                result.update(dict.fromkeys(flag.names, flag))
    return result


def distinct_flags() -> list[UpstreamFlag]:
    """Every lacking flag once, in the order of the tables."""
    return list(dict.fromkeys(upstream_flags().values()))


def verdicts(given: Iterable[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
    """(errors, warnings) for lacking flags with their words; flags that share a reason share a line."""
    lines: dict[tuple[bool, str], list[str]] = {}
    for name, words in given:
        flag = upstream_flags()[name]
        if not flag.is_moot(words):
            shown = name if flag.nargs == 0 or len(words) != 1 else f"{name} {words[0]}"
            shared = lines.setdefault((flag.refused, flag.reason), [])
            if shown not in shared:
                shared.append(shown)
    errors, warnings = [], []
    for (refused, reason), names in lines.items():
        if refused:
            errors.append(f"{_list(names)} {'is' if len(names) == 1 else 'are'} refused: {reason}")
        else:
            warnings.append(f"{_list(names)} {'has' if len(names) == 1 else 'have'} no effect: {reason}")
    return errors, warnings


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

