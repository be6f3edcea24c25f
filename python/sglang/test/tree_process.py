"""A benchmark's process that imports the engine of a chosen tree, and replies line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TreeProcess:
    """A script which runs on the engine in ``tree`` (a folder with python/sglang in it).

    The script first prints the path of its engine as JSON, then replies to each line of JSON on its standard input with
    one on its standard output. Raises RuntimeError if the engine belongs to another tree, or if the process ends.
    """

    def __init__(self, tree: Path, command: Sequence[str]) -> None:
        paths = [str(tree.resolve() / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found = Path(self._answer())
        if tree.resolve() not in found.parents:
            raise RuntimeError(f"the engine of {tree} was imported from {found}")

    def run(self, question: Any) -> Any:
        """The reply to one request; both are JSON."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Close the input of the process, which ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)
