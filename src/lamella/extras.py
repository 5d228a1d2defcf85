"""Optional packages: imported on demand, with an error message that names the extra to install."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lamella.errors import LamellaError

NAMES = {
    "PIL": "pillow",
    "fasttext": "fasttext-numpy2",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
}  # packages whose name differs from that of their module


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return sys.modules[module] is not None if module in sys.modules else find_spec(module) is not None


def require(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        extra: the extra of Lamella that installs it.
        what: the feature that needs it, for the message.

    Raises:
        LamellaError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise LamellaError(f"{what} needs {NAMES.get(package, package)}: pip install 'lamella[{extra}]'") from None
