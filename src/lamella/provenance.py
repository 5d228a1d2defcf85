"""Provenance: where a result comes from. It is written by the registry, not by methods."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("lamella", "torch", "transformers", "safetensors", "numpy")


def stamp(
    provenance: dict[str, Any], method: str, command: str, options: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Record in the provenance of a result which method made it, how and from what, in place.

    Args:
        provenance: the provenance of the result.
        method: the slug.
        command: name of the further command; empty for the method itself.
        options: options with their values.
        inputs: inputs by name.
    """
    found = {
        "method": method,
        **({"command": command} if command else {}),
        "version": package_version("lamella"),
        "options": {name: plain(value) for name, value in options.items() if name != "seed" and value is not None},
        "inputs": {name: describe(value) for name, value in inputs.items() if value is not None},
        **({"seed": options["seed"]} if "seed" in options else {}),
        "machine": machine(),
    }
    own = {name: value for name, value in provenance.items() if name not in found}
    provenance.clear()
    provenance.update(found | own)


def describe(value: Any) -> Any:
    """Return the description of an input for provenance: its own, or a digest of its content.

    Tensors, alone or by name, are described by the shape of the first and a hash of their values.

    Args:
        value: the input.
    """
    if hasattr(value, "describe"):
        return value.describe()
    parts = [value[name] for name in sorted(value)] if isinstance(value, Mapping) else [value]
    if parts and all(hasattr(part, "cpu") for part in parts):
        digest = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()
        return {"shape": list(parts[0].shape), "sha256": digest}
    description: dict[str, Any] = {"type": type(value).__name__}
    if isinstance(value, str | Path):
        return str(value)
    return description | ({"count": len(value)} if hasattr(value, "__len__") else {})


def plain(value: Any) -> Any:
    """Convert the value of an option to JSON values.

    Args:
        value: the value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)


def environment() -> dict[str, Any]:
    """Return the machine, versions, thread count and date, as recorded in all evidence."""
    import torch

    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def machine() -> str:
    """Describe processor or accelerator, cores and memory in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    torch = sys.modules.get("torch")  # not imported here, for methods that do not use it
    return f"{torch.cuda.get_device_name()}; {line}" if torch is not None and torch.cuda.is_available() else line


def package_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", listing.read_text()) if listing.exists() else None
    return re.sub(r"\(R\)|\(TM\)", "", found[1]).strip() if found else platform.machine()
