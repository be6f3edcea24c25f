"""Tensors of a checkpoint folder, read only from safetensors files, with progress; errors name the file."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sglang.srt.models.checkpoint_model import WeightLoadError

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Seconds between log lines if there is no terminal for a progress bar.
_LOG_INTERVAL_S = 10.0


def find_weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Files to read, with the tensors that an index lists for each. Raises WeightLoadError for missing files."""
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_index(index)
    single = folder / SINGLE_NAME
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f" It has {', '.join(others)}: convert them to safetensors." if others else ""
        raise WeightLoadError(f"{folder} contains no *.safetensors file, the only supported weight format.{hint}")
    return dict.fromkeys(files)


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightLoadError(f"{index} is not a safetensors index ({type(error).__name__}: {error}).") from None
    files: dict[Path, list[str]] = {}
    for tensor, file in sorted(names.items()):
        if Path(file).name != file:
            raise WeightLoadError(f"{index} places {tensor} in {file!r}, which is not a file of that folder.")
        files.setdefault(index.parent / file, []).append(tensor)
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise WeightLoadError(f"{index} names {len(absent)} missing files: {', '.join(absent)}. Download them again.")
    return dict(sorted(files.items()))


def iterate_safetensors(
    folder: str | Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """``wanted`` (name, host tensor) pairs of a folder. Raises WeightLoadError for corrupt files, missing tensors."""
    for path, promised in _with_progress(_wanted_files(folder, wanted)):
        with _reading(path, promised) as (file, names):
            yield from ((name, file.get_tensor(name)) for name in names if wanted(name))


def tensor_dtypes(folder: str | Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    """The safetensors dtype ("BF16", "F8_E4M3", ...) of each tensor with a ``wanted`` name; no tensor is read."""
    dtypes: dict[str, str] = {}
    for path, promised in _wanted_files(folder, wanted).items():
        with _reading(path, promised) as (file, names):
            dtypes |= {name: file.get_slice(name).get_dtype() for name in names if wanted(name)}
    return dtypes


def _wanted_files(folder: str | Path, wanted: Callable[[str], bool]) -> dict[Path, list[str] | None]:
    """The files that hold tensors with ``wanted`` names, according to the index if there is one."""
    files = find_weight_files(Path(folder))
    return {path: names for path, names in files.items() if names is None or any(map(wanted, names))}


@contextmanager
def _reading(path: Path, promised: list[str] | None) -> Iterator[tuple[Any, list[str]]]:
    """An open file and the tensors to take from it; errors in the block are raised with the file's name."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            held = list(file.keys())
            absent = sorted(set(promised or ()) - set(held))
            if absent:
                raise WeightLoadError(f"{path} lacks tensors that {INDEX_NAME} lists for it: {', '.join(absent)}.")
            yield file, held if promised is None else promised
    except SafetensorError as error:
        raise WeightLoadError(
            f"{path} ({path.stat().st_size} bytes) is truncated or corrupt: {error}. Download the file again."
        ) from error
    except OSError as error:
        raise WeightLoadError(f"{path} cannot be read: {error}.") from error


def _with_progress(files: dict[Path, list[str] | None]) -> Iterator[tuple[Path, list[str] | None]]:
    """The items of ``files``, with a progress bar if stderr is a terminal, otherwise with log lines."""
    on_terminal, last = sys.stderr.isatty(), time.monotonic()
    bar = tqdm(files.items(), desc="Loading safetensors", unit="file", disable=not on_terminal)
    for done, item in enumerate(bar, 1):
        yield item
        if not on_terminal and (done == len(files) or time.monotonic() - last >= _LOG_INTERVAL_S):
            last = time.monotonic()
            logger.info("loaded %d of %d safetensors files (%s)", done, len(files), item[0].name)
