#!/usr/bin/env python3
"""Train the embedded DeepSeek V4 and its MTP layer, and save both as one Hugging Face folder.

    python scripts/train_deepseek_v4_tiny.py --max-seconds 420 --output-dir OUT

The tasks are those of `train_tiny_models.py`, and lookups whose pair stands hundreds of tokens back. Training begins
with questions close after their pairs, as lookups are learned last and all else is easy afterwards. Then rows of three
kinds take turns: packed documents; short rows in which layers see so few last tokens that a pair is met through
compressed entries alone; long rows. Every entry is seen at first; the indexer learns at the same time, and chooses from
the middle of the time on. Matrices are trained by Muon: with AdamW alone, at 2e-3 and 3e-3, lookups stayed at half. The
folder of the best score is kept. Needs torch, transformers and safetensors; made for a GPU.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_deepseek_v4 import (  # noqa: E402
    NEVER,
    DenseDeepseekV4,
    Pass,
    decoder_layer,
    grouped_output,
    head_of,
    norm,
    rotated_queries,
    turn,
)
from far_lookup_rows import far_lookup_rows, narrow_windows, sentence_pool  # noqa: E402
from muon import Muon  # noqa: E402
from sinkhorn_training import choose_kernels  # noqa: E402
from tiny_model_files import DEEPSEEK_V4, encode, write_tokenizer_files  # noqa: E402
from train_mtp_layer import CHAIN_WEIGHTS, DraftTrainer, chain_mask  # noqa: E402
from train_tiny_models import (  # noqa: E402
    IGNORE,
    ROOT,
    _shares,
    build_pool,
    document,
    pack_rows,
    pad_documents,
)
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from sglang.test.tiny_tasks import ADDITION, LOOKUP, TASKS, far_lookups, heldout_questions  # noqa: E402
from sglang.test.v4_mtp_reference import V4Mtp  # noqa: E402

NAME = "deepseek-v4-tiny"
MAX_LENGTH = 2304


Step = Callable[[], None]


@dataclass(frozen=True)
class Rows:
    """What a step trains on: rows of ``length`` tokens, of lookups or packed, with the indexer's choice or without."""

    length: int
    lookups: bool = False
    close: bool = False
    narrow: bool = False
    select: bool = False


SHORT, MIDDLE, PACKED = Rows(64), Rows(256), Rows(1024, select=True)
CLOSE = Rows(128, lookups=True, close=True)
NEAR = Rows(128, lookups=True, narrow=True)
FAR, CHOSEN, LONG = (Rows(n, lookups=True, select=chosen) for n, chosen in ((1024, False), (1024, True), (2048, True)))
# Share of the time from which on these rows take turns.
STAGES: tuple[tuple[float, tuple[Rows, ...]], ...] = (
    (0.0, (CLOSE,)),
    (0.12, (CLOSE, SHORT, NEAR, SHORT)),
    (0.3, (NEAR, SHORT, FAR, SHORT, CLOSE, MIDDLE)),
    (0.55, (SHORT, FAR, SHORT, CHOSEN, SHORT, PACKED)),
    (0.85, (SHORT, FAR, SHORT, CHOSEN, SHORT, LONG, SHORT, PACKED)),
)
# Parameters of two or more dimensions whose names hold these are no matrices of products inside the model.
NO_MATRICES = ("embed_tokens", "lm_head", "mlp.gate.weight", "hc", "position_bias")
# Tokens whose next one is no answer count so much in the indexer's loss.
PLAIN_TOKEN = 0.02
# What a saved folder keeps in float32.
FP32_PARTS = ("norm", "hc", "sink", "position_bias", "ape", "gate.bias", "e_score_correction_bias")


class Trainer:
    """The model in training: rows, the step (replayed as a CUDA graph where there is one), scores and saving."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        self.model = new_model(args.seed).to(device)
        self.dense = DenseDeepseekV4(self.model, MAX_LENGTH).to(device)
        self.lr, self.bias_rate = torch.zeros((), device=device), torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        wide = {name: p for name, p in self.model.named_parameters() if p.dim() >= 2}
        decayed = [p for name, p in wide.items() if any(part in name for part in NO_MATRICES)]
        matrices = [p for name, p in wide.items() if not any(part in name for part in NO_MATRICES)]
        self.muon = Muon(matrices, self.lr, args.weight_decay)
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98), capturable=on_gpu, fused=on_gpu)
        self.documents = build_pool(args.documents, args.seed).to(device)
        self.sentences = sentence_pool(args.documents // 10, args.seed).to(device)
        self.losses = torch.zeros(2, device=device)
        self.steps: dict[Rows, Step] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if on_gpu and not args.no_cuda_graph else None
        self.best = -1.0

    def set_progress(self, progress: float, step: int) -> None:
        factor = min(1.0, (step + 1) / self.args.warmup) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        self.lr.fill_(self.args.lr * factor)
        self.bias_rate.fill_(1e-3 * factor)

    def make_step(self, rows: Rows) -> Step:
        """A function that lays out fresh rows and does one optimizer step on them."""
        count = max(1, self.args.tokens_per_step // rows.length)
        ids = torch.zeros(count, rows.length, dtype=torch.int64, device=self.device)
        labels = torch.zeros_like(ids)
        windows = ids.new_full((count, 1, 1, 1), self.model.config.sliding_window)

        def lay_out() -> None:
            if rows.lookups:
                far_lookup_rows(self.sentences, ids, labels, rows.close)
            else:
                pack_rows(self.documents, ids, labels)
            if rows.narrow:
                narrow_windows(windows)

        def compute() -> None:
            weights = (labels != IGNORE) * (1.0 - PLAIN_TOKEN) + PLAIN_TOKEN if rows.length > SHORT.length else None
            asked = Pass(windows, rows.select, weights)
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False, enabled=self.device.type == "cuda"):
                logits = self.dense(ids, asked)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            index = torch.stack(asked.index_losses).mean() if asked.index_losses else torch.zeros_like(loss)
            (loss + index).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.muon.step()
            self.balance(asked)
            self.losses[int(rows.lookups)].copy_(loss.detach())

        def eager() -> None:
            lay_out()
            self.model.zero_grad(set_to_none=True)
            compute()

        return eager if self.graph_pool is None else self.captured(rows, lay_out, compute, eager)

    def captured(self, rows: Rows, lay_out: Step, compute: Step, eager: Step) -> Step:
        """The step with its computation in a CUDA graph; where that fails, it is said and the step stays eager."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # One pool for all graphs: nothing that a replay leaves there is read by another.
        try:
            with torch.cuda.graph(graph, pool=self.graph_pool):
                compute()
        except RuntimeError as error:
            print(f"{rows} eagerly, as no graph could be made of it: {error!r:.300}", flush=True)
            return eager

        def replay() -> None:
            lay_out()
            graph.replay()

        return replay

    @torch.no_grad()
    def balance(self, asked: Pass) -> None:
        """Raise the bias of experts used less than the mean, lower that of the others (DeepSeek-V3, section 2.1.2)."""
        for gate, chosen in asked.routed:
            shares = _shares(chosen, gate.num_experts)
            gate.e_score_correction_bias += self.bias_rate * torch.sign(shares.mean() - shares)

    def train(self, seconds: float) -> None:
        started = reported = time.monotonic()
        counted = 0
        self.set_progress(0.0, 0)
        stages = list(STAGES)
        turns: tuple[Rows, ...] = ()
        for count in itertools.count():
            now = time.monotonic()
            progress = max((now - started) / seconds, count / self.args.steps)
            if progress >= 1.0:
                break
            self.set_progress(progress, count)
            if stages and progress >= stages[0][0]:
                turns = stages.pop(0)[1]
                for rows in turns:
                    self.steps[rows] = self.steps.get(rows) or self.make_step(rows)
            self.steps[turns[count % len(turns)]]()
            # Without this the queue of replays runs ahead of the clock that the schedule follows.
            if count % 20 == 0:
                self.losses.tolist()
            if now - reported > self.args.report_seconds:
                rate, counted = (count - counted) / (now - reported), count
                if not self.report(f"step {count} {now - started:.0f}s {rate:.1f}/s"):
                    return
                # Time for the scores counts in no rate.
                reported = time.monotonic()
        self.report(f"after {count} steps, {time.monotonic() - started:.0f}s")

    def report(self, when: str) -> bool:
        """Print losses and scores, and save the model if none before was better; False if the losses are lost."""
        packed, lookups = self.losses.tolist()
        shares = held_out_shares(self.dense)
        parts = " ".join(f"{name} {share:.3f}" for name, share in shares.items())
        score = sum(shares[f"{form}/{task}"] for form in ("bare", "chat") for task in (ADDITION, LOOKUP, "far"))
        print(f"{when} loss {packed:.3f} lookups {lookups:.3f} | {parts}", flush=True)
        if score > self.best:
            self.best = score
            save(self.model, Path(self.args.output_dir) / NAME)
        return math.isfinite(packed + lookups)


def new_model(seed: int) -> Any:
    """transformers' model with tables of experts by token, and streams that differ from the start."""
    settings = dict(DEEPSEEK_V4)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "tid2eid"):
                order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(-1)
                module.tid2eid.copy_(order[:, : config.num_experts_per_tok])
        for layer in model.model.layers:
            for hyper in (layer.attn_hc, layer.ffn_hc):
                hyper.base.normal_(0, 0.5, generator=generator)
                hyper.base[-(config.hc_mult**2) :] += 2 * torch.eye(config.hc_mult).flatten()
    return model


@torch.no_grad()
def held_out_shares(dense: DenseDeepseekV4) -> dict[str, float]:
    """Share of held-out questions of which every answer token is the most likely one, by form and task.

    "far" are lookups 300 to 700 tokens back, "2000" those 1,900 to 2,100 back.
    """
    groups = [(heldout_questions(500), 72)]
    if dense.main_cos.is_cuda:
        groups += [(far_lookups(100), 768), (far_lookups(32, 0, (1900, 2100)), 2176)]
    names = {768: "far", 2176: "2000"}
    found: dict[str, float] = {}
    device = dense.main_cos.device
    for form in ("bare", "chat"):
        for questions, width in groups:
            pool = pad_documents([document(question, form) for question in questions], width)
            ids, labels = pool.tokens.long().to(device), pool.labels.long().to(device)
            right = [
                ((dense(part, Pass()).argmax(-1) == wanted) | (wanted == IGNORE)).all(1)
                for part, wanted in zip(ids.split(50 if width > 72 else 500), labels.split(50 if width > 72 else 500))
            ]
            hits = torch.cat(right).tolist()
            for name in [names[width]] if width in names else TASKS:
                own = [ok for ok, question in zip(hits, questions) if width in names or question.task == name]
                found[f"{form}/{name}"] = sum(own) / len(own)
    return {f"{form}/far": 0.0 for form in ("bare", "chat")} | found


def saved(name: str, tensor: Tensor) -> Tensor:
    """The tensor as a folder keeps it: matrices of products in bfloat16."""
    plain = not tensor.is_floating_point() or any(part in name for part in FP32_PARTS)
    return tensor.detach().to("cpu", None if plain else torch.bfloat16).contiguous()


def save(model: Any, folder: Path) -> None:
    """Write the folder: weights, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = AutoModelForCausalLM.from_config(model.config)
    for name, tensor in itertools.chain(copy.named_parameters(), copy.named_buffers()):
        tensor.data = saved(name, model.state_dict()[name]) if name in model.state_dict() else tensor.data
    copy.config.dtype = torch.bfloat16
    copy.save_pretrained(folder)
    write_tokenizer_files(folder)
    # safetensors creates files that only their owner may read.
    for path in folder.iterdir():
        path.chmod(0o644)


class V4DraftTrainer(DraftTrainer):
    """The MTP layer of a saved folder in training; "hidden" are the streams of the model after its last layer."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.folder = Path(args.output_dir) / NAME
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.dense = DenseDeepseekV4(self.model, MAX_LENGTH).to(device)
        self.layer = V4Mtp(self.model).float().to(device).requires_grad_(True)
        last, own = self.model.model.layers[-1], self.layer
        own.layer.load_state_dict(last.state_dict())
        own.head.load_state_dict(self.model.model.hc_head.state_dict())
        own.norm.load_state_dict(self.model.model.norm.state_dict())
        with torch.no_grad():
            for projection in (own.e_proj, own.h_proj):
                noise = 0.02 * torch.randn_like(projection.weight)
                projection.weight.copy_(0.7 * torch.eye(len(noise), device=device) + noise)
        self.answers = self.greedy_answers()

    def hidden(self, ids: Tensor) -> Tensor:
        """The model's streams [B, L, n, H]."""
        with torch.no_grad():
            return self.dense.streams(ids, Pass())

    def own_logits(self, hidden: Tensor) -> Tensor:
        return self.dense.logits(hidden)

    def chain(self, ids: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of each draft, [B, L - k, V]: row i of draft k is the prediction of token i + k + 1."""
        own = self.layer
        parts: list[Tensor] = []
        starts: list[int] = []
        for k in range(1, len(CHAIN_WEIGHTS) + 1):
            embedded = self.model.model.embed_tokens(ids[:, k:])
            starts.append(embedded.shape[1])
            streams = own.e_proj(norm(own.enorm, embedded)).unsqueeze(2)
            streams = streams + own.h_proj(norm(own.hnorm, hidden[:, : starts[-1]]))
            rows = torch.arange(starts[-1])[:, None] + k
            keys = torch.cat([torch.arange(count) + first for first, count in enumerate(starts, 1)])
            seen = chain_mask(starts[-1], starts) & (rows - keys < self.model.config.sliding_window)
            asked = Pass(rope=self.dense.rope(k, k + starts[-1]))
            hidden = decoder_layer(own.layer, streams, ids[:, k:], asked, ChainAttention(parts, seen.to(self.device)))
            yield self.own_head(hidden)

    def own_head(self, streams: Tensor) -> Tensor:
        return self.model.lm_head(norm(self.layer.norm, head_of(self.layer.head, streams)))

    def save(self) -> None:
        """Add the layer to the folder."""
        path = self.folder / "model.safetensors"
        tensors = load_file(path) | {name: saved(name, tensor) for name, tensor in self.layer.tensors().items()}
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)


@dataclass
class ChainAttention:
    """Attention of a draft over the rows of the drafts so far that ``seen`` [1, 1, rows, keys] names."""

    parts: list[Tensor]
    seen: Tensor

    def __call__(self, module: nn.Module, hidden: Tensor, asked: Pass) -> Tensor:
        rope = asked.rope["main"]
        queries, _ = rotated_queries(module, hidden, rope)
        self.parts.append(turn(norm(module.kv_norm, module.kv_proj(hidden)), *rope))
        keys = torch.cat(self.parts, 1)
        scores = torch.einsum("bhqd,bkd->bhqk", queries, keys).masked_fill(~self.seen, NEVER)
        sinks = module.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return grouped_output(module, torch.einsum("bhqk,bkd->bhqd", shares, keys), rope)


@torch.no_grad()
def compare_with_transformers(folder: Path, device: torch.device) -> str:
    """The folder in transformers' own forward pass against the one that was trained, over 700 tokens."""
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    text = far_lookups(1, 1, (690, 700))[0].text
    ids = torch.tensor([encode(text)[:640]], device=device)
    with_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    logits = served(ids, use_cache=False).logits
    worst = (logits - DenseDeepseekV4(served, MAX_LENGTH).to(device)(ids, Pass())).abs().max().item()
    torch.backends.cuda.matmul.allow_tf32 = with_tf32
    return f"transformers' logits differ by {worst:.2g} (their deviation is {logits.std().item():.2f})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default=str(ROOT / "python" / "sglang" / "embedded_models"))
    parser.add_argument("--max-seconds", type=float, default=420.0, help="of wall time, the MTP layer's included")
    parser.add_argument("--mtp-share", type=float, default=0.18, help="of that time, for the MTP layer")
    parser.add_argument("--steps", type=int, default=60000, help="stop here if that comes before the time")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--documents", type=int, default=200_000, help="size of the pool that rows are packed from")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--report-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cuda-graph", action="store_true", help="run every step eagerly")
    parser.add_argument("--mtp-only", action="store_true", help="train the MTP layer of the folder that is there")
    return parser.parse_args()


def main() -> None:
    started = time.monotonic()
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    folder, deadline = Path(args.output_dir) / NAME, started + args.max_seconds
    if not args.mtp_only:
        print(choose_kernels(device), flush=True)
        trainer = Trainer(args, device)
        count = sum(p.numel() for p in trainer.model.parameters())
        print(f"{NAME}: {count} parameters on {device}, {time.monotonic() - started:.0f}s to begin", flush=True)
        trainer.train(deadline - time.monotonic() - args.mtp_share * args.max_seconds)
        del trainer
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    shares = held_out_shares(DenseDeepseekV4(served, MAX_LENGTH).to(device))
    print("as saved:", " ".join(f"{name} {share:.3f}" for name, share in shares.items()), flush=True)
    print(compare_with_transformers(folder, device), flush=True)
    args.model, args.tokens_per_step, args.documents = f"{NAME} MTP", 4096, 60_000
    drafts = V4DraftTrainer(args, device)
    args.max_seconds = max(5.0, deadline - time.monotonic() - 5.0)
    drafts.train()
    with torch.no_grad():
        for name, parameter in drafts.layer.named_parameters():
            parameter.copy_(saved(name, parameter))
    print(f"{NAME} MTP as saved: {drafts.score()}", flush=True)
    drafts.save()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size} bytes, {time.monotonic() - started:.0f}s in all", flush=True)


if __name__ == "__main__":
    main()
