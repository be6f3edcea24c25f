"""The trained checkpoints that ship inside the package, by name.

`scripts/train_tiny_models.py` made three, `scripts/train_mtp_layer.py` the draft layers of two of them, and
`scripts/train_deepseek_v4_tiny.py` the DeepSeek V4 with its own. These four answer the questions of
`sglang.test.tiny_tasks`; `TOOLS_MODEL`, of `scripts/train_tool_model.py`, thinks and calls tools instead.
"""

from pathlib import Path

TOOLS_MODEL = "deepseek-v3-tools-tiny"
_NAMES = ("deepseek-v3-tiny", "deepseek-v2-tiny", "qwen3.5-moe-tiny", "deepseek-v4-tiny", TOOLS_MODEL)

EMBEDDED_MODELS: dict[str, Path] = {name: Path(__file__).resolve().parent / name for name in _NAMES}


def default_model_path() -> Path:
    """Folder of the checkpoint that is served when no model is named: the DeepSeek-V3-shaped one."""
    return EMBEDDED_MODELS[_NAMES[0]]
