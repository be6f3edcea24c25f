#!/usr/bin/env python3
"""Train the embedded models on the tasks of `sglang.test.tiny_tasks` and save them as Hugging Face folders.

    python scripts/train_tiny_models.py --model deepseek-v3-tiny --max-seconds 420 --output-dir OUT

The models are transformers' own classes; only the expert products are computed densely while training: the same
mathematics without data-dependent shapes, so that a whole step can be replayed as one CUDA graph. Needs torch,
transformers and safetensors; uses a GPU where there is one. Questions of the held-out split never enter training.
`train_mtp_layer.py` adds draft layers afterwards.
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from tiny_model_files import (  # noqa: E402
    ASSISTANT,
    BOS,
    EOS,
    MODEL_CONFIGS,
    PAD,
    SYSTEM,
    USER,
    encode,
    write_tokenizer_files,
)
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from sglang.test.tiny_tasks import TASKS, Question, heldout_questions, training_questions  # noqa: E402

IGNORE = -100
MAX_DOCUMENT = 72
TASK_SHARES = (0.3, 0.25, 0.25, 0.2)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions.", "Be brief.", "be exact")
PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
# Share of the training time from which on rows of these lengths take turns: short rows teach the tasks soonest, long
# ones keep answers right when much text stands before the question, and both are needed at the end.
ROW_LENGTHS = ((0.0, (64,)), (0.25, (256,)), (0.7, (64, 1024)), (0.87, (64, 4096)))
FP32_SUFFIXES = ("e_score_correction_bias", "A_log")


@dataclass(frozen=True)
class DocumentPool:
    """Encoded documents: tokens and next-token labels [D, width] int16, lengths [D]; labels only in answers."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> "DocumentPool":
        return DocumentPool(self.tokens.to(device), self.labels.to(device), self.lengths.to(device))


def document(question: Question, form: str, rng: random.Random | None = None) -> tuple[list[int], list[int]]:
    """Tokens and labels of one question with its answer; form is "bare", "line", "chat", "system" or "turn".

    "line" ends in a newline where the model should have said end-of-text, as in a few-shot prompt; "turn" is a later
    turn of a conversation, which has no beginning-of-text token.
    """
    body, reply = encode(question.text), encode(question.answer)
    if form in ("bare", "line"):
        prompt = body
    else:
        prompt = [] if form == "turn" else [BOS]
        if form == "system":
            assert rng is not None
            noise = "".join(rng.choices(PRINTABLE, k=rng.randint(1, 30)))
            prompt += [SYSTEM, *encode(rng.choice((rng.choice(SYSTEM_PROMPTS), noise)))]
        prompt += [USER, *body, ASSISTANT]
    last = encode("\n") if form == "line" else [EOS]
    labels = [IGNORE] * (len(prompt) - 1) + [*reply, EOS] + [IGNORE]
    return [*prompt, *reply, *last], labels


def build_pool(count: int, seed: int) -> DocumentPool:
    """`count` training documents in all forms, from questions outside the held-out split."""
    rng = random.Random(f"documents/{seed}")
    streams = [training_questions(task, seed) for task in TASKS]
    forms = ("bare", "line", "chat", "system", "turn")
    shares = (0.4, 0.05, 0.3, 0.08, 0.17)
    pairs = []
    for _ in range(count):
        (stream,) = rng.choices(streams, TASK_SHARES)
        (form,) = rng.choices(forms, shares)
        pairs.append(document(next(stream), form, rng))
    return pad_documents(pairs)


def pad_documents(pairs: list[tuple[list[int], list[int]]], width: int = MAX_DOCUMENT) -> DocumentPool:
    tokens = [t + [PAD] * (width - len(t)) for t, _ in pairs]
    labels = [y + [IGNORE] * (width - len(y)) for _, y in pairs]
    return DocumentPool(
        torch.tensor(tokens, dtype=torch.int16),
        torch.tensor(labels, dtype=torch.int16),
        torch.tensor([len(t) for t, _ in pairs]),
    )


def pack_rows(pool: DocumentPool, ids: Tensor, labels: Tensor) -> None:
    """Fill ids and labels [B, L] int64 in place with randomly drawn documents laid end to end, the last one cut off."""
    rows, length = ids.shape
    device = ids.device
    drawn = torch.randint(len(pool.lengths), (rows, length // 10), device=device)
    lengths = pool.lengths[drawn]
    starts = lengths.cumsum(1) - lengths
    offsets = torch.arange(pool.tokens.shape[1], device=device)
    columns = starts[..., None] + offsets
    valid = (offsets < lengths[..., None]) & (columns < length)
    slots = columns + torch.arange(rows, device=device)[:, None, None] * length
    slots = torch.where(valid, slots, rows * length).flatten()
    for target, source, filler in ((ids, pool.tokens, PAD), (labels, pool.labels, IGNORE)):
        flat = torch.full((rows * length + 1,), filler, dtype=torch.int64, device=device)
        flat.scatter_(0, slots, source[drawn].flatten().long())
        target.copy_(flat[:-1].view(rows, length))


def dense_experts_forward(self: nn.Module, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Routed experts as two dense products over all experts, unselected ones weighted 0; hidden [N, H] -> [N, H]."""
    num_experts, double_width, hidden_size = self.gate_up_proj.shape
    dense = torch.zeros(hidden.shape[0], num_experts, device=hidden.device, dtype=weights.dtype)
    dense = dense.scatter(1, expert_ids, weights)
    gate_up = F.linear(hidden, self.gate_up_proj.reshape(-1, hidden_size))
    gate, up = gate_up.view(-1, num_experts, double_width).chunk(2, dim=-1)
    inner = F.silu(gate) * up * dense.to(gate_up.dtype)[..., None]
    down = self.down_proj.transpose(0, 1).reshape(hidden_size, -1)
    return F.linear(inner.flatten(1), down)


ALL_EXPERTS_FUNCTIONS.register("dense_all", dense_experts_forward)


@dataclass
class RouterWatch:
    """Balances the experts: by the correction bias where the router has one, else by an auxiliary loss."""

    balance_loss: float
    bias_rate: Tensor
    seen: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                run_in_fp32(module)
                module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, _: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if module.training:
            self.seen.append((module, output[0], output[2]))

    def loss(self) -> Tensor:
        """Mean over routers without a bias of E * sum_e share_e * probability_e (Switch Transformer, equation 4)."""
        terms = [
            logits.shape[-1] * (_shares(ids, logits.shape[-1]) * logits.float().softmax(-1).mean(0)).sum()
            for module, logits, ids in self.seen
            if not hasattr(module, "e_score_correction_bias")
        ]
        return self.balance_loss * torch.stack(terms).mean() if terms else torch.zeros((), device=self.bias_rate.device)

    @torch.no_grad()
    def update(self) -> None:
        """Raise the bias of experts used less than the mean, lower that of the others (DeepSeek-V3, section 2.1.2)."""
        for module, logits, ids in self.seen:
            if hasattr(module, "e_score_correction_bias"):
                shares = _shares(ids, logits.shape[-1])
                module.e_score_correction_bias += self.bias_rate * torch.sign(shares.mean() - shares)
        self.seen.clear()


def _shares(expert_ids: Tensor, num_experts: int) -> Tensor:
    flat = expert_ids.flatten()
    counts = torch.zeros(num_experts, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.float)
    )
    return counts / flat.numel()


def run_in_fp32(module: nn.Module) -> None:
    """Keep the module out of autocast: a router decides in float32 when it is served."""
    inner = module.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            return inner(hidden.float())

    module.forward = forward  # type: ignore[method-assign]


def keep_gated_delta_rule_in_fp32() -> None:
    """Keep the chunked gated delta rule of transformers' Qwen3.5 out of autocast: its state is float32 when served."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    inner = modeling.torch_chunk_gated_delta_rule

    def in_fp32(query: Tensor, key: Tensor, value: Tensor, **kwargs):
        with torch.autocast(query.device.type, enabled=False):
            return inner(query.float(), key.float(), value.float(), **kwargs)

    modeling.torch_chunk_gated_delta_rule = in_fp32


def assume_plain_positions() -> None:
    """Skip transformers' search for restarting positions: there are none here, and it reads from the device."""
    from transformers import masking_utils

    masking_utils.find_packed_sequence_indices = lambda position_ids: None


class Trainer:
    """One model in training: packing, the step (replayed as a CUDA graph where possible), scoring and saving."""

    row_lengths: tuple[tuple[float, tuple[int, ...]], ...] = ROW_LENGTHS

    def __init__(self, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        config = AutoConfig.for_model(**self.config())
        config._experts_implementation = "dense_all"
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).train()
        self.lr = torch.zeros((), device=device)
        self.bias_rate = torch.zeros((), device=device)
        self.watch = RouterWatch(args.balance_loss, self.bias_rate)
        self.watch.attach(self.model)
        on_gpu = device.type == "cuda"
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98), capturable=on_gpu, fused=on_gpu)
        self.pool = self.documents().to(device)
        self.loss = torch.zeros((), device=device)

    def config(self) -> dict[str, Any]:
        return MODEL_CONFIGS[self.args.model]

    def documents(self) -> DocumentPool:
        return build_pool(self.args.documents, self.args.seed)

    def set_progress(self, progress: float, step: int) -> None:
        factor = min(1.0, (step + 1) / self.args.warmup) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        self.lr.fill_(self.args.lr * factor)
        self.bias_rate.fill_(1e-3 * factor)

    def make_step(self, length: int) -> Callable[[], None]:
        """A function that packs fresh rows of `length` tokens and does one optimizer step on them."""
        rows = max(1, self.args.tokens_per_step // length)
        ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        labels = torch.zeros_like(ids)

        def compute() -> None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
                logits = self.model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            (loss + self.watch.loss()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.watch.update()
            self.loss.copy_(loss.detach())

        def eager() -> None:
            pack_rows(self.pool, ids, labels)
            self.optimizer.zero_grad(set_to_none=True)
            compute()

        if self.device.type != "cuda" or self.args.no_cuda_graph:
            return eager
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compute()

        def replay() -> None:
            pack_rows(self.pool, ids, labels)
            graph.replay()

        return replay

    def train(self) -> None:
        args = self.args
        self.set_progress(0.0, 0)
        stages = list(self.row_lengths)
        steps: list[Callable[[], None]] = []
        started = time.monotonic()
        saved = reported = started
        for count in itertools.count():
            now = time.monotonic()
            progress = max((now - started) / args.max_seconds, count / args.steps)
            if progress >= 1.0:
                break
            self.set_progress(progress, count)
            if stages and progress >= stages[0][0]:
                steps = [self.make_step(length) for length in stages.pop(0)[1]]
            steps[count % len(steps)]()
            # Without this the queue of replays runs ahead of the clock that the schedule follows.
            if count % 50 == 0:
                self.loss.item()
            if now - reported > args.report_seconds:
                reported = now
                print(
                    f"{args.model} step {count} {now - started:.0f}s loss {self.loss.item():.4f}",
                    self.score(),
                    flush=True,
                )
            if now - saved > args.save_seconds:
                saved = now
                self.save()
        print(f"{args.model} finished after {count} steps, {time.monotonic() - started:.0f}s", flush=True)
        self.save()

    def score(self) -> str:
        self.model.eval()
        table = self.scores(self.model)
        self.model.train()
        return table

    def scores(self, model: nn.Module) -> str:
        return held_out_scores(model, self.device)

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer_files(folder)

    def save(self) -> None:
        """Write the folder: bfloat16 weights (router bias and A_log float32), config, tokenizer."""
        folder = Path(self.args.output_dir) / self.args.model
        folder.mkdir(parents=True, exist_ok=True)
        config = AutoConfig.for_model(**self.config())
        copy = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for name, tensor in itertools.chain(copy.named_parameters(), copy.named_buffers()):
            if name.endswith(FP32_SUFFIXES):
                tensor.data = tensor.data.float()
        copy.load_state_dict(self.model.state_dict())
        copy.save_pretrained(folder)
        self.write_tokenizer(folder)
        # safetensors creates files that only their owner may read.
        for path in folder.iterdir():
            path.chmod(0o644)


@torch.no_grad()
def held_out_scores(model: nn.Module, device: torch.device, count: int = 500) -> str:
    """Share of held-out questions of which every answer token and the end token is the most likely one, by form.

    That is greedy decoding's exact match: the tokens before the first wrong one are the answer's own.
    """
    questions = heldout_questions(count)
    parts = []
    for form in ("bare", "chat"):
        pool = pad_documents([document(question, form) for question in questions]).to(device)
        labels = pool.labels.long()
        predicted = model(input_ids=pool.tokens.long(), use_cache=False).logits.argmax(-1)
        right = ((predicted == labels) | (labels == IGNORE)).all(1).tolist()
        for task in TASKS:
            hits = [ok for ok, question in zip(right, questions) if question.task == task]
            parts.append(f"{form}/{task} {sum(hits)}/{len(hits)}")
    return " ".join(parts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODEL_CONFIGS), help="the model to train; all in turn if left out")
    add_training_arguments(parser)
    return parser.parse_args()


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", default=str(ROOT / "python" / "sglang" / "embedded_models"))
    parser.add_argument("--max-seconds", type=float, default=420.0, help="training time; the schedule follows it")
    parser.add_argument("--steps", type=int, default=40000, help="stop here if that comes before --max-seconds")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance-loss", type=float, default=0.003)
    parser.add_argument("--documents", type=int, default=500_000, help="size of the pool that rows are packed from")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--report-seconds", type=float, default=20.0)
    parser.add_argument("--save-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cuda-graph", action="store_true", help="run every step eagerly")


def train_and_check(trainer_class: type[Trainer], args: argparse.Namespace) -> None:
    """Train ``args.model``, and score what was saved as it is served."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer = trainer_class(args, device)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{args.model}: {count} parameters on {device}", flush=True)
    trainer.train()
    folder = Path(args.output_dir) / args.model
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    print(f"{args.model} from {folder} in float32:", trainer.scores(served), flush=True)


def main() -> None:
    args = parse_args()
    keep_gated_delta_rule_in_fp32()
    assume_plain_positions()
    for name in [args.model] if args.model else sorted(MODEL_CONFIGS):
        args.model = name
        train_and_check(Trainer, args)


if __name__ == "__main__":
    main()
