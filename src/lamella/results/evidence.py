"""Evidence: what every measured record says of where it comes from."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lamella", "torch", "transformers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """The machine line, versions, thread count and date, as every record carries them."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def machine() -> str:
    """One line: processor or accelerator, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    return f"{torch.cuda.get_device_name()}; {line}" if torch.cuda.is_available() else line


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", listing.read_text()) if listing.exists() else None
    return re.sub(r"\(R\)|\(TM\)", "", found[1]).strip() if found else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
