#!/usr/bin/env python3
"""Train the embedded model that thinks, calls a calculator and reads its results, and save it as a Hugging Face folder.

    python scripts/train_tool_model.py --max-seconds 150 --output-dir OUT

The conversations are those of `sglang.test.tool_tasks`, written by the chat template that is saved with the model; the
model is the DeepSeek-V3 of `train_tiny_models.py`, its calls have the form of DeepSeek-V3 (`--tool-call-parser
deepseekv3`). Only replies are learned, each after a whole conversation. Needs torch, transformers and safetensors.
"""

import argparse
import random
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_model_files import (  # noqa: E402
    EOS,
    MODEL_CONFIGS,
    NUM_BYTES,
    SPECIAL_TOKENS,
    encode,
    write_tokenizer_files,
)
from train_tiny_models import (  # noqa: E402
    IGNORE,
    DocumentPool,
    Trainer,
    add_training_arguments,
    assume_plain_positions,
    pad_documents,
    train_and_check,
)

from sglang.embedded_models import TOOLS_MODEL  # noqa: E402
from sglang.test.tool_tasks import KINDS, ToolTask, tool_task  # noqa: E402

WIDTH = 640
# The tokens whose text the parsers look for, and those of a list of tools and of a result.
VISIBLE = ("<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
           "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")  # fmt: skip
MORE_TOKENS = ("<|tools|>", "<|tool|>", *VISIBLE)
TEMPLATE = """{{- bos_token -}}
{%- set first = messages[0] -%}
{%- if first['role'] == 'system' or tools -%}
  {{- '<|system|>' -}}
  {%- if first['role'] == 'system' -%}{{- first['content'] -}}{%- endif -%}
  {%- if tools -%}{{- '<|tools|>' -}}{%- endif -%}
  {%- for tool in tools or [] -%}
    {%- set function = tool['function'] -%}
    {{- function['name'] + '(' + (function.get('parameters') or {}).get('properties', {}) | join(',') + ')\\n' -}}
  {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message may only come first') -}}{%- endif -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + message['content'] -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<|tool|>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|assistant|>' + (message['content'] or '') -}}
    {%- if message.get('tool_calls') -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in message['tool_calls'] -%}
        {%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
        {{- call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- else -%}
    {{- raise_exception('this model knows the roles system, user, assistant and tool, not ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- set thinks = thinking | default(enable_thinking | default(true)) -%}
  {{- '<|assistant|>' + ('<think>' if thinks else '</think>') -}}
{%- endif -%}
"""
_IDS = {text: NUM_BYTES + number for number, text in enumerate((*SPECIAL_TOKENS, *MORE_TOKENS))}
_SPLIT = re.compile("(" + "|".join(map(re.escape, _IDS)) + ")")


def token_ids(text: str) -> list[int]:
    """The saved tokenizer's ids of ``text``."""
    return [i for part in _SPLIT.split(text) for i in ([_IDS[part]] if part in _IDS else encode(part))]


def spoken(task: ToolTask) -> str:
    """The reply after the thought."""
    if not task.calls:
        return task.content
    calls = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in task.calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


class Writer:
    """Makes documents of tasks: tokens, and labels in the reply alone."""

    def __init__(self) -> None:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(TEMPLATE)

    def prompt(self, task: ToolTask, thinks: bool) -> str:
        return self._template.render(
            messages=task.messages,
            tools=task.tools,
            bos_token=SPECIAL_TOKENS[0],
            eos_token=SPECIAL_TOKENS[1],
            add_generation_prompt=True,
            thinking=thinks,
        )

    def document(self, task: ToolTask, thinks: bool) -> tuple[list[int], list[int]]:
        prompt = token_ids(self.prompt(task, thinks))
        reply = token_ids(f"{task.thought}</think>{spoken(task)}" if thinks else spoken(task))
        labels = [IGNORE] * (len(prompt) - 1) + [*reply, EOS] + [IGNORE]
        return [*prompt, *reply, EOS], labels

    def pool(self, count: int, rng: random.Random, heldout: bool, kind: str | None = None) -> DocumentPool:
        """``count`` documents; those that are longer than ``WIDTH`` are drawn again."""
        documents: list[tuple[list[int], list[int]]] = []
        while len(documents) < count:
            document = self.document(tool_task(rng, heldout, kind), thinks=rng.random() < 0.7)
            if len(document[0]) <= WIDTH:
                documents.append(document)
        return pad_documents(documents, WIDTH)


class ToolTrainer(Trainer):
    row_lengths = ((0.0, (640,)), (0.6, (640, 2560)))

    def config(self) -> dict[str, Any]:
        return MODEL_CONFIGS["deepseek-v3-tiny"]

    def documents(self) -> DocumentPool:
        return Writer().pool(self.args.documents, random.Random(f"tools/{self.args.seed}"), heldout=False)

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer_files(folder, MORE_TOKENS, TEMPLATE, VISIBLE)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> str:
        """Share of held-out conversations of which every token of the reply is the most likely one, by kind."""
        parts = []
        for kind in KINDS:
            pool = Writer().pool(128, random.Random(f"held out/{kind}"), heldout=True, kind=kind).to(self.device)
            labels = pool.labels.long()
            predicted = model(input_ids=pool.tokens.long(), use_cache=False).logits.argmax(-1)
            right = ((predicted == labels) | (labels == IGNORE)).all(1)
            parts.append(f"{kind} {int(right.sum())}/{len(right)}")
        return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TOOLS_MODEL, help="name of the folder")
    add_training_arguments(parser)
    parser.set_defaults(documents=80_000, max_seconds=150.0)
    args = parser.parse_args()
    assume_plain_positions()
    train_and_check(ToolTrainer, args)


if __name__ == "__main__":
    main()
