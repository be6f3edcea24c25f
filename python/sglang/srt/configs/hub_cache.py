"""Models named by their id on Hugging Face's hub: looked up in the local cache, never downloaded."""

from __future__ import annotations

import re
from pathlib import Path

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
