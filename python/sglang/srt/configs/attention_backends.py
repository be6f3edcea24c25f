"""Declarations of attention backends for the settings: families, platforms, graphs, page sizes, cache dtypes.

A backend declares itself by the literal arguments of ``register_attention_backend`` in its own file. They are read from
the source here, so that judging a command line imports no kernel; a backend of another package is known once its module
has been imported.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Families of softmax attention: keys and values per head, one latent row that all heads share, or one row next to
# compressed entries (DeepSeek V4).
GQA, MLA, COMPRESSED = "gqa", "mla", "compressed"
# Backends of upstream that are taken as a preference, with the platforms where they exist.
UNBUILT_ATTENTION_BACKENDS = {"aiter": ("hip",)}
_FOLDER = Path(__file__).parents[1] / "layers" / "attention"
_DECORATOR = "register_attention_backend"


@dataclass(frozen=True)
class LatentShapes:
    """Widths of latent attention: the latent row, a head's part without and with rotation, and a head's value."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class BackendDeclaration:
    """One backend for one family.

    platforms: the kinds (cpu, cuda, hip) on which it runs. graphs: its decode step can be captured. page_sizes and
    cache_dtypes: the only ones that it takes; empty: all.
    """

    name: str
    family: str
    platforms: tuple[str, ...]
    graphs: bool = False
    page_sizes: tuple[int, ...] = ()
    cache_dtypes: tuple[str, ...] = ()


_declared: dict[tuple[str, str], BackendDeclaration] = {}


def declare(declaration: BackendDeclaration) -> None:
    """Make a backend known to the settings; called by ``register_attention_backend``."""
    _declared[declaration.name, declaration.family] = declaration


def attention_backends(family: str | None = None) -> dict[str, BackendDeclaration]:
    """The backends of a family by name; without one, each name's first declaration."""
    found: dict[str, BackendDeclaration] = {}
    for (name, of_family), declaration in {**_in_tree(), **_declared}.items():
        if family in (None, of_family):
            found.setdefault(name, declaration)
    return found


def attention_backend_names() -> tuple[str, ...]:
    """The values of ``--attention-backend``."""
    return (*attention_backends(), *UNBUILT_ATTENTION_BACKENDS)


@functools.cache
def _in_tree() -> dict[tuple[str, str], BackendDeclaration]:
    declarations = [declaration for path in sorted(_FOLDER.glob("*_backend*.py")) for declaration in read_source(path)]
    return {(declaration.name, declaration.family): declaration for declaration in declarations}


def read_source(path: Path) -> list[BackendDeclaration]:
    """The declarations of a source file; raises ValueError if an argument is not a literal."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _DECORATOR:
                found.append(_read_call(call, path))
    return found


def _read_call(call: ast.Call, path: Path) -> BackendDeclaration:
    try:
        positional = [ast.literal_eval(argument) for argument in call.args]
        named: dict[str, Any] = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        return BackendDeclaration(*positional, **named)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name}, line {call.lineno}: {_DECORATOR} needs literal arguments: {error}") from None
