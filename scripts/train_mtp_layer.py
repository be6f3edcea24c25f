#!/usr/bin/env python3
"""Train the draft layer (MTP) of an embedded model on the frozen model's own hidden rows, and add it to its folder.

    python scripts/train_mtp_layer.py --model deepseek-v3-tiny --max-seconds 600
    python scripts/train_mtp_layer.py --model deepseek-v3-tiny --max-seconds 75 --resume --lr 1e-3 \\
        --lengths 64 1024 64 4096 --tokens-per-step 8192 --contexts 1000 3900

The layer learns the model's own next-token distributions in chains of drafts, as it is served: the first draft reads
the model's hidden rows, each later one the layer's own output, and a chain attends to rows of first drafts and to
itself. Only rows of answers are learned. Tensors of the model stay byte for byte. The second command continues from the
folder's layer, with rows as long as the model's context. Needs what `train_tiny_models.py` needs; uses a GPU where
there is one.
"""

import argparse
import copy
import inspect
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_model_files import EOS, PAD, encode  # noqa: E402
from train_tiny_models import FP32_SUFFIXES, IGNORE, ROOT, build_pool, document, pack_rows  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from sglang.test.mtp_reference import is_qwen, layer_tensors, read_layer_tensors  # noqa: E402
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, TASKS, heldout_questions, training_questions  # noqa: E402

# Drafts of a chain, and what each weighs in the loss.
CHAIN_WEIGHTS = (1.0, 0.8, 0.6)
# How many questions are scored after a long context.
CONTEXT_QUESTIONS = 20
# What a config.json says of the layer.
MTP_KEYS: dict[str, dict[str, Any]] = {
    "deepseek-v3-tiny": {"num_nextn_predict_layers": 1},
    "qwen3.5-moe-tiny": {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
}


class ChainCache:
    """Keys and values of the drafts of a chain so far, [B, heads, rows, D] each, under the name of a cache."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.parts.append((keys, values))
        return torch.cat([k for k, _ in self.parts], 2), torch.cat([v for _, v in self.parts], 2)


class DraftLayer(nn.Module):
    """The layer under the names of transformers' ``MtpLayer``; it begins as the model's last one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        last, hidden = model.model.layers[-1], model.config.hidden_size
        norm = type(last.input_layernorm)
        self.enorm, self.hnorm = (norm(hidden, eps=model.config.rms_norm_eps).to(model.device) for _ in range(2))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, device=model.device)
        nn.init.normal_(self.eh_proj.weight, 0, 0.02)
        with torch.no_grad():
            self.eh_proj.weight.add_(0.7 * torch.eye(hidden, device=model.device).repeat(1, 2))
        self.mtp_block, self.post_norm = copy.deepcopy(last), copy.deepcopy(model.model.norm)
        self.requires_grad_(True)
        # transformers 5.24 changed the argument's name.
        has = inspect.signature(self.mtp_block.forward).parameters
        self.cache_name = "cache" if "cache" in has else "past_key_values"

    def forward(self, embedded: Tensor, hidden: Tensor, cache: ChainCache, **inputs: Any) -> Tensor:
        """embedded [B, rows, H] of the tokens, hidden [B, rows, H] of the rows before them -> [B, rows, H]."""
        rows = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return self.post_norm(self.mtp_block(rows, **inputs, **{self.cache_name: cache}))


def chain_mask(length: int, starts: list[int]) -> Tensor:
    """Which keys a draft sees, [1, 1, rows, keys] bool; ``starts`` are the rows of the drafts so far, its own last.

    Row i of draft k continues the chain that began at row i: it sees the first drafts up to row i, and of every later
    draft the row i alone.
    """
    rows = torch.arange(length)
    parts = [rows[:, None] >= torch.arange(starts[0])[None]]
    parts += [rows[:, None] == torch.arange(count)[None] for count in starts[1:]]
    return torch.cat(parts, 1)[None, None]


def packed_context(length: int) -> list[int]:
    """At least ``length`` tokens of questions with their answers, one after the other."""
    ids: list[int] = []
    for questions in itertools.cycle([training_questions(task, 5) for task in TASKS]):
        if len(ids) >= length:
            return ids
        ids += document(next(questions), "bare")[0]
    raise AssertionError


class DraftTrainer:
    """A frozen model, its draft layer in training, and the score of the drafts on held-out questions."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.source = ROOT / "python" / "sglang" / "embedded_models" / args.model
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        self.model = model.to(self.device).eval().requires_grad_(False)
        # Two dense products suit a GPU; products of the chosen experts alone cost a CPU less.
        self.model.config._experts_implementation = "dense_all" if self.device.type == "cuda" else "grouped_mm"
        self.layer = DraftLayer(self.model)
        if args.resume:
            read_layer_tensors(self.model.config, self.layer, load_file(self.source / "model.safetensors"))
        self.answers = self.greedy_answers()

    def hidden(self, ids: Tensor) -> Tensor:
        """The model's rows after its final norm, ids [B, L] -> [B, L, H]."""
        with torch.no_grad():
            return self.model.model(ids, use_cache=False).last_hidden_state

    def own_logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [B, L, V] of what ``hidden`` returned."""
        return self.model.lm_head(hidden)

    def chain(self, ids: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of each draft, [B, L - k, V]: row i of draft k is the prediction of token i + k + 1."""
        cache, starts = ChainCache(), []
        for k in range(1, len(CHAIN_WEIGHTS) + 1):
            embedded = self.model.model.embed_tokens(ids[:, k:])
            starts.append(embedded.shape[1])
            positions = (torch.arange(starts[-1], device=self.device) + k)[None]
            hidden = self.layer(
                embedded,
                hidden[:, : starts[-1]],
                cache,
                position_embeddings=self.model.model.rotary_emb(embedded, position_ids=self.by_axis(positions)),
                attention_mask=chain_mask(starts[-1], starts).to(self.device),
                position_ids=positions,
            )
            yield self.model.lm_head(hidden)

    def by_axis(self, positions: Tensor) -> Tensor:
        """Positions [1, rows] as the model's rotation wants them: Qwen3.5's once for each of its three axes."""
        return positions.expand(3, 1, -1) if is_qwen(self.model.config) else positions

    def loss(self, ids: Tensor, labels: Tensor, hidden: Tensor) -> Tensor:
        """Cross-entropy of each draft against the model's own distribution, over the rows of answers."""
        with torch.no_grad():
            own = self.own_logits(hidden).softmax(-1)
        total = torch.zeros((), device=self.device)
        for k, (logits, weight) in enumerate(zip(self.chain(ids, hidden), CHAIN_WEIGHTS, strict=True), 1):
            wanted = labels[:, k:] != IGNORE
            total = total + weight * F.cross_entropy(logits[wanted], own[:, k:][wanted])
        return total

    def train(self) -> None:
        args = self.args
        clock = time.monotonic if self.device.type == "cuda" else time.process_time
        pool = build_pool(args.documents, args.seed).to(self.device)
        started = clock()
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        reported, step, progress = started, 0, 0.0
        while progress < 1.0:
            length = args.lengths[step % len(args.lengths)]
            ids = torch.zeros(max(1, args.tokens_per_step // length), length, dtype=torch.int64, device=self.device)
            labels = torch.zeros_like(ids)
            pack_rows(pool, ids, labels)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            loss = self.loss(ids, labels, self.hidden(ids))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            now = clock()
            progress = max((now - started) / args.max_seconds, step / args.steps)
            if now - reported > args.report_seconds:
                reported = now
                print(
                    f"{args.model} step {step} {now - started:.0f}s loss {loss.item():.4f} {self.scores()}", flush=True
                )
        print(f"{args.model} finished after {step} steps, {clock() - started:.0f}s", flush=True)

    def scores(self) -> str:
        """The score of the questions alone, and of the first of them after each of ``--contexts``."""
        parts = [self.score([self.answers])]
        for length in self.args.contexts:
            context = packed_context(length)
            # One by one: the attention of a chain over long rows is large.
            behind = [[(context + tokens, len(context) + root)] for tokens, root in self.answers[:CONTEXT_QUESTIONS]]
            parts.append(f"behind {len(context)} tokens {self.score(behind)}")
        return "; ".join(parts)

    @torch.no_grad()
    def score(self, batches: list[list[tuple[list[int], int]]]) -> str:
        """Share of drafts accepted at each position in the cycles of a greedy server; none is after the end.

        batches: texts that are run together, each with where its answer begins.
        """
        accepted, drafted = [0] * len(CHAIN_WEIGHTS), [0] * len(CHAIN_WEIGHTS)
        cycles = made = 0
        for batch in batches:
            ids = self._padded([tokens for tokens, _ in batch])
            guesses = [logits.argmax(-1).tolist() for logits in self.chain(ids, self.hidden(ids))]
            for row, (tokens, root) in enumerate(batch):
                while root < len(tokens) - 1:
                    wanted = tokens[root + 1 : root + 1 + len(guesses)]
                    hits = [guess[row][root - 1] == token for guess, token in zip(guesses, wanted)]
                    length = (hits + [False]).index(False)
                    for k in range(len(wanted)):
                        drafted[k] += 1
                        accepted[k] += k < length
                    step = min(length + 1, len(tokens) - 1 - root)
                    cycles, made, root = cycles + 1, made + step, root + step
        shares = [f"{k}: {a / d:.3f} of {d}" for k, (a, d) in enumerate(zip(accepted, drafted), 1)]
        return f"accepted at {', '.join(shares)}; mean length {made / cycles:.3f}"

    @torch.no_grad()
    def greedy_answers(self) -> list[tuple[list[int], int]]:
        """Held-out questions with what the model answers: tokens up to its end, and where the answer begins."""
        prompts = [encode(question.text) for question in heldout_questions(500)]
        documents = [list(prompt) for prompt in prompts]
        for _ in range(MAX_NEW_TOKENS):
            chosen = self.own_logits(self.hidden(self._padded(documents))).argmax(-1)
            for row, tokens in zip(chosen.tolist(), documents, strict=True):
                if tokens[-1] != EOS:
                    tokens.append(row[len(tokens) - 1])
        return [(tokens, len(prompt)) for tokens, prompt in zip(documents, prompts, strict=True)]

    def _padded(self, documents: list[list[int]]) -> Tensor:
        longest = max(map(len, documents))
        return torch.tensor([[*tokens, *[PAD] * (longest - len(tokens))] for tokens in documents], device=self.device)

    def save(self) -> None:
        """Write the folder with the layer in its weights (bfloat16, router bias float32) and in its config."""
        folder = Path(self.args.output_dir) / self.args.model
        if folder != self.source:
            shutil.copytree(self.source, folder, dirs_exist_ok=True)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, tensor in layer_tensors(self.model.config, self.layer).items():
            dtype = torch.float32 if name.endswith(FP32_SUFFIXES) else torch.bfloat16
            tensors[name] = tensor.to("cpu", dtype).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
        config_path = folder / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) | MTP_KEYS[self.args.model]
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MTP_KEYS), required=True)
    parser.add_argument("--output-dir", default=str(ROOT / "python" / "sglang" / "embedded_models"))
    parser.add_argument("--max-seconds", type=float, default=600.0, help="of GPU or CPU; the schedule follows them")
    parser.add_argument("--steps", type=int, default=20000, help="stop here if that comes before --max-seconds")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--documents", type=int, default=60_000, help="size of the pool that rows are packed from")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64] * 7 + [512], help="of rows, in rotation")
    parser.add_argument("--resume", action="store_true", help="begin with the layer that the folder has")
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="score drafts behind so many tokens too")
    parser.add_argument("--report-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    trainer = DraftTrainer(args)
    print(
        f"{args.model}: {sum(p.numel() for p in trainer.layer.parameters())} parameters; {trainer.scores()}", flush=True
    )
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.layer.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    print(f"{args.model} as saved: {trainer.scores()}", flush=True)
    trainer.save()


if __name__ == "__main__":
    main()
