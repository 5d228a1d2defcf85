"""Side files of plans: safetensors files identified by their hash, with bit masks packed into bytes.

The shapes of packed bits are in the file's metadata under a single key, because the order of several keys differs
between runs, and the file name contains the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import PlanError
from lamella.reading import parse_json

Shapes = dict[str, list[int]]


def write(tensors: Mapping[str, Tensor], path: str | Path, schema: str, shapes: Shapes | None) -> str:
    """Write a side file and return its SHA-256.

    Args:
        tensors: the tensors by name.
        path: the file.
        schema: key of the metadata.
        shapes: shapes of packed bits by name; None if nothing is packed.
    """
    save_file(dict(tensors), str(path), metadata=None if shapes is None else {schema: json.dumps(shapes)})
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(path: str | Path, schema: str, what: str, sha256: str | None = None) -> tuple[dict[str, Tensor], Shapes]:
    """Read a side file and the shapes in its metadata.

    Args:
        path: the file.
        schema: key of the metadata.
        what: what the file contains, for messages.
        sha256: expected hash of the file; None if any is accepted.

    Raises:
        PlanError: for a file that is missing, damaged, of another hash, or of another schema.
    """
    path = Path(path)
    try:
        if not path.is_file():  # opening a pipe would block
            raise FileNotFoundError
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = parse_json(metadata.get(schema, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise PlanError(
            f"{what}: {path} cannot be read ({error.__class__.__name__}): keep the file next to its plan"
        ) from None
    if sha256 is not None and digest != sha256:
        raise PlanError(f"{what}: {path} is not the one that the plan was made with: its hash differs")
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise PlanError(f"{what}: {path} is not a file of {what}: make the plan again")
    return tensors, shapes


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(length) is int and length >= 0 for length in value)


def named(
    folder: Path, name: str, tensors: Mapping[str, Tensor], schema: str = "", shapes: Shapes | None = None
) -> tuple[str, str]:
    """Write a side file atomically under a name that contains its hash.

    Args:
        folder: folder of the file.
        name: start of the file name.
        tensors: the tensors by name.
        schema: key of the metadata.
        shapes: shapes of packed bits by name; None if nothing is packed.

    Returns:
        The file name and the SHA-256.
    """
    partial = folder / f".{name}-{secrets.token_hex(4)}.partial"
    try:
        digest = write(tensors, partial, schema, shapes)
        return partial.replace(folder / f"{name}-{digest[:12]}.safetensors").name, digest
    finally:
        partial.unlink(missing_ok=True)


def pack(bits: Tensor) -> Tensor:
    """Pack eight bits into each byte, the first bit highest.

    Args:
        bits: bool tensor of any shape.
    """
    return torch.from_numpy(np.packbits(bits.cpu().numpy().ravel()))


def unpack(packed: Tensor, shape: list[int], where: str) -> Tensor:
    """Return the bool tensor that :func:`pack` packed.

    Args:
        packed: the packed bytes, uint8.
        shape: shape of the bool tensor.
        where: what to call the tensor in messages.

    Raises:
        PlanError: if the number of bytes does not match the shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8) or count == 0:
        raise PlanError(f"{where} has {packed.numel()} values ({packed.dtype}) for {count} bits: make the plan again")
    return torch.from_numpy(np.unpackbits(packed.numpy().ravel(), count=count).astype(bool)).view(shape)
