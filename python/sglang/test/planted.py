"""Faults inserted into the processes of a server: what one rank does instead at some call of the product.

A folder that goes onto PYTHONPATH holds ``sitecustomize.py``, which every Python process runs first.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock


class Plant(NamedTuple):
    """At call ``number`` of ``owner.method`` of ``module`` on rank ``rank``, ``statement`` runs first.

    It may ``return`` in the place of the call, and knows ``os``, ``signal`` and the call's ``args``.
    """

    module: str
    owner: str
    method: str
    statement: str
    number: int = 1
    rank: int = 1


_TEXT = """
import importlib.util
import os
import signal
import sys

PLANT = {plant!r}


def plant(module):
    name, owner, method, _, number, rank = PLANT
    owner, calls = getattr(module, owner), []
    original = getattr(owner, method)

    def planted(*args, **kwargs):
        from sglang.srt.distributed.parallel_state import get_world_group

        calls.append(1)
        if get_world_group().rank == rank and len(calls) >= number:
            {statement}
        return original(*args, **kwargs)

    setattr(owner, method, planted)


class Finder:
    def find_spec(self, name, path, target=None):
        if name != PLANT[0]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            plant(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Inside the block, processes that are started have ``plant``."""
    with TemporaryDirectory() as folder:
        text = textwrap.dedent(_TEXT).format(plant=tuple(plant), statement=plant.statement)
        Path(folder, "sitecustomize.py").write_text(text)
        others = os.environ.get("PYTHONPATH", "")
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(part for part in (folder, others) if part)}):
            yield
