"""Tensors that are kept on disk and not in memory."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.files import replacing
from lamella.needs.recorder import current_recorder


def memory_map(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Write tensors to a file, and return them as they are read from it: in parts, when they are needed.

    In a recording nothing is written, and the tensors take no memory.

    Args:
        tensors: tensors by name; nobody else should hold them.
        path: the safetensors file.
    """
    recorder = current_recorder()
    if recorder is not None:
        return {name: recorder.uncounted(each) for name, each in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial)
    return load_file(path)
