"""The folder of a model: as it is given, or by its id in the local Hugging Face cache; nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.configs.errors import ConfigError

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_model_id(text: str) -> bool:
    """Whether ``text`` is written as an id, and names nothing on this machine."""
    return _ID.fullmatch(text) is not None and not text.startswith(".") and not Path(text).exists()


def cached_folder(model_id: str, revision: str | None = None) -> str | None:
    """The folder of a model in the cache of ``HF_HOME``; None where the cache does not have it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder: str = snapshot_download(model_id, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder


def download_line(model_id: str, revision: str | None = None) -> str:
    """The command that puts a model there."""
    return f"hf download {model_id}" + ("" if revision is None else f" --revision {revision}")


def existing_config(model_path: str) -> Path:
    """The config.json of a folder; raises ConfigError where there is none."""
    folder = Path(model_path)
    if not os.path.isdir(folder):  # unlike Path, refuses no name
        exists = os.path.exists(folder)
        if not exists and "/" not in model_path:
            raise ConfigError(
                f"unknown model {model_path!r}: it is neither a folder nor one of the models of the package "
                f"({', '.join(EMBEDDED_MODELS)}). Nothing is downloaded from a hub."
            )
        what = "a file, not a folder" if exists else "not a folder on this machine"
        raise ConfigError(
            f"unknown model path {model_path!r}: it is {what}{_no_id(model_path)}. Nothing is fetched from a hub: "
            "download the model and pass the folder that contains its config.json, tokenizer.json and *.safetensors."
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"model path {model_path!r} has no config.json: pass the folder of a model in Hugging Face format "
            "(config.json, tokenizer.json and *.safetensors)."
        )
    return config_file


def _no_id(model_path: str) -> str:
    """What is said of a path that looks like an id of the hub."""
    if not is_model_id(model_path):
        return ""
    return f", and as an id it is not in the local Hugging Face cache: `{download_line(model_path)}` puts it there"


def folder_problems(model_path: str, revision: str | None = None) -> list[str]:
    """What is wrong with the name of a model, before torch is loaded to read its config."""
    if not model_path or model_path in EMBEDDED_MODELS:
        return []
    if is_model_id(model_path) and (revision is not None or cached_folder(model_path) is not None):
        return []
    try:
        existing_config(model_path)
    except ConfigError as error:
        return error.problems
    return []
