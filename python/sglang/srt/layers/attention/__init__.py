"""Attention backends; each registers itself by name when its module is imported."""

import importlib
import pkgutil


def load_attention_backends() -> None:
    """Import every ``*_backend`` module of this package, so that each backend is registered."""
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        if module.name.endswith("_backend"):
            importlib.import_module(module.name)
