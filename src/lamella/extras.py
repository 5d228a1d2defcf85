"""Packages that only some of the work needs: they are there, or one line says how to get them."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lamella.errors import LamellaError

NAMES = {
    "PIL": "pillow",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
}  # of packages that are imported by another name


def is_installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported for the answer."""
    return sys.modules[module] is not None if module in sys.modules else find_spec(module) is not None


def require(module: str, extra: str, what: str) -> Any:
    """A module of an optional package.

    Args:
        module: to import.
        extra: of Lamella that brings it.
        what: needs it, for the message.

    Raises:
        LamellaError: when it is missing.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise LamellaError(f"{what} needs {NAMES.get(package, package)}: pip install 'lamella[{extra}]'") from None
