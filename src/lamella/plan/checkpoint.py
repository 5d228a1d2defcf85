"""Safetensors checkpoints as byte ranges: read from their headers and copied through a fixed buffer.

No tensor is ever built, so memory does not depend on the size of the checkpoint, and tensors of every dtype are copied
unchanged. A narrower tensor is read row by row.

A safetensors file consists of an 8-byte little-endian length, a JSON header of that length, and the bytes of the
tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lamella.errors import CheckpointError
from lamella.reading import open_file, parse_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LICENCE = ("LICENSE*", "NOTICE*")
SHARD_SIZE = 5_000_000_000  # bytes, the default of transformers and of the hub
BUFFER = 8 << 20
LONGEST_HEADER = 100_000_000  # the limit of the format's reference implementation

_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")


@dataclass(frozen=True)
class Range:
    """One tensor on disk.

    Attributes:
        name: name of the tensor.
        file: file that contains it.
        start: offset of its first byte in the file.
        size: its size in bytes.
        dtype: its dtype as the safetensors header names it.
        shape: its shape.
        keep: for a tensor of one or two dimensions, the entries of each dimension that are copied [kept], or None for
            all of them. If empty, the whole tensor is copied.
    """

    name: str
    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    keep: tuple[np.ndarray | None, ...] = ()

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the copied part."""
        if not self.keep:
            return self.shape
        return tuple(n if kept is None else len(kept) for n, kept in zip(self.shape, self.keep, strict=True))

    @property
    def kept_size(self) -> int:
        """The size of the copied part in bytes."""
        return self.size // max(math.prod(self.shape), 1) * math.prod(self.kept_shape) if self.keep else self.size


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a safetensors folder, read from the headers alone; see :func:`read`.

    Attributes:
        folder: the folder.
        tensors: its tensors, in the order of its files and their bytes.
    """

    folder: Path
    tensors: tuple[Range, ...]

    @cached_property
    def _layers(self) -> dict[str, dict[int, dict[str, Range]]]:
        """Tensors with a layer index: by the prefix before the index, the index, and the rest of the name."""
        groups: dict[str, dict[int, dict[str, Range]]] = defaultdict(lambda: defaultdict(dict))
        for tensor in self.tensors:
            if match := _NUMBERED.fullmatch(tensor.name):
                groups[match[1]][int(match[2])][match[3]] = tensor
        return groups

    def layers(self, prefix: str, count: int) -> tuple[str, list[dict[str, Range]]]:
        """Return the tensors of each layer, by the rest of their name.

        Args:
            prefix: prefix of the layers' parameter names in the model, such as ``model.layers.``.
            count: number of layers in the config.

        Returns:
            The prefix that the file uses and the layers in order. The prefix differs from the model's if it is the only
            one with indices (checkpoints saved without the head, or with an older layout).

        Raises:
            CheckpointError: if layers are missing, or their names are ambiguous.
        """
        groups = self._layers
        names = [prefix] if prefix in groups else list(groups)
        if len(names) != 1:
            found = ", ".join(sorted(groups)) or "no numbered tensors"
            raise CheckpointError(
                f"{self.folder}: no tensors named {prefix}N (found: {found}); export it from memory instead"
            )
        layers = groups[names[0]]
        wrong = sorted(set(range(count)) ^ set(layers))
        if wrong:
            problem = "has tensors of" if wrong[0] in layers else "lacks"
            raise CheckpointError(
                f"{self.folder}: {problem} layer {wrong[0]}, but its config.json has {count} layers; get it again"
            )
        return names[0], [layers[layer] for layer in range(count)]

    def reordered(self, prefix: str, order: Sequence[int]) -> list[Range]:
        """Return the tensors of a checkpoint whose layer i is this one's layer ``order[i]``.

        Args:
            prefix: prefix of the layers in the file; see :meth:`layers`.
            order: index of the original layer for each new layer.
        """
        layers = self._layers[prefix]
        inside = {tensor.name for layer in layers.values() for tensor in layer.values()}
        outside = [tensor for tensor in self.tensors if tensor.name not in inside]
        return outside + [
            replace(tensor, name=f"{prefix}{index}.{rest}")
            for index, layer in enumerate(order)
            for rest, tensor in layers[layer].items()
        ]


def is_safetensors(folder: Path | None) -> bool:
    """Return whether a folder holds a checkpoint that :func:`read` can read."""
    return folder is not None and ((folder / INDEX).is_file() or (folder / SINGLE).is_file())


def copy_licence(folder: Path, out: Path) -> None:
    """Copy the licence files of a model to a folder made from it.

    Args:
        folder: folder of the model.
        out: the folder to copy them to.
    """
    for file in (file for pattern in LICENCE for file in folder.glob(pattern) if file.is_file()):
        shutil.copyfile(file, out / file.name)


def read(folder: Path) -> Checkpoint:
    """Locate every tensor of a checkpoint, and check that the checkpoint is complete.

    Args:
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: for a folder without safetensors, a missing or truncated shard, or a damaged header.
    """
    if not is_safetensors(folder):
        raise CheckpointError(f"{folder}: no {SINGLE} in it; give the folder of a safetensors checkpoint")
    if not (folder / INDEX).is_file():
        return Checkpoint(folder, tuple(read_header(folder / SINGLE)))
    weight_map = read_index(folder)
    found = {
        tensor.name: tensor for shard in sorted(set(weight_map.values())) for tensor in read_header(folder / shard)
    }
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / shard}: lacks the tensor {name}, which {INDEX} lists; get it again")
    return Checkpoint(folder, tuple(found.values()))


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor according to the index of a folder.

    Args:
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: for an index that is damaged, or that names anything but files in the folder.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; get it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / INDEX}: puts {name} into '{shard}', which is not a safetensors file in the folder; get "
                "it again"
            )
    return weight_map


def digest(tensors: Sequence[Range]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    found, view = hashlib.sha256(), memoryview(bytearray(BUFFER))
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)};".encode())
        with tensor.file.open("rb") as file:
            for some in _pieces(tensor, file.fileno(), view):
                found.update(some)
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with open_file(path) as file:  # opening a pipe would block
            document = parse_json(file.read())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; give the folder of a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); get it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: is not a JSON object; get it again")
    return document


def read_header(file: Path) -> list[Range]:
    """Return the tensors of one file, in the order of their bytes.

    Args:
        file: a safetensors file.

    Raises:
        CheckpointError: for a file that is missing, truncated, or not a safetensors file.
    """
    if not file.is_file():  # opening a pipe would block
        raise CheckpointError(f"{file}: is missing; the checkpoint is incomplete, get it again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(f"{file}: is truncated or not a safetensors file ({size} bytes); get it again")
            header = parse_json(stream.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        tensors = [_range(file, data, name, entry) for name, entry in header.items()]
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); get it again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: its safetensors header is damaged; get it again") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = data
    for tensor in tensors:  # the format allows neither gaps nor overlaps
        bits = _BITS.get(tensor.dtype)
        if tensor.start != end or tensor.size < 0 or (bits and math.prod(tensor.shape) * bits != 8 * tensor.size):
            raise CheckpointError(f"{file}: the header entry of {tensor.name} is damaged; get it again")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{file}: has {size} bytes but its header describes {end}; get it again")
    return tensors


def _range(file: Path, data: int, name: str, entry: Any) -> Range:
    """Return the tensor of one header entry; ``data`` is the offset of the first tensor byte in the file."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not whole:
        raise TypeError
    return Range(name, file, data + start, end - start, dtype, tuple(shape))


def write(
    tensors: Sequence[Range], folder: Path, progress: Progress | None = None, shard_size: int = SHARD_SIZE
) -> None:
    """Write tensors into ``folder`` as one safetensors file, or as shards with an index.

    Args:
        tensors: what to copy; each range has the new name of its tensor.
        folder: an existing folder.
        progress: called with the number of bytes written so far and in total.
        shard_size: maximum size of a shard in bytes; exceeded only by a single tensor that is larger.
    """
    shards = _shards(tensors, shard_size)
    total = sum(tensor.kept_size for tensor in tensors)
    weight_map: dict[str, str] = {}
    done = 0
    buffer = bytearray(BUFFER)
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (folder / name).open("wb", buffering=0) as target:
            target.write(_header(shard))
            for written in _copy(shard, target, buffer):
                done += written
                if progress is not None:
                    progress(done, total)
            os.fsync(target.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Range], shard_size: int) -> list[list[Range]]:
    shards: list[list[Range]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.kept_size for other in shards[-1]) + tensor.kept_size > shard_size:
            shards.append([])
        shards[-1].append(tensor)
    # Wide dtypes come first, as in the reference writer, so that every tensor is aligned; otherwise in reading order.
    return [sorted(shard, key=lambda tensor: -_BITS.get(tensor.dtype, 8)) for shard in shards]


def _header(tensors: Sequence[Range]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.kept_size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.kept_shape, "data_offsets": offsets}
        end += tensor.kept_size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def _copy(tensors: Sequence[Range], target: Any, buffer: bytearray) -> Iterator[int]:
    """Copy the bytes of the tensors in turn, yielding the number of bytes of each write."""
    view = memoryview(buffer)
    source, opened = -1, None
    try:
        for tensor in tensors:
            if tensor.file != opened:
                if source >= 0:
                    os.close(source)
                source, opened = os.open(tensor.file, os.O_RDONLY), tensor.file
            for some in _pieces(tensor, source, view):
                _write_all(target, some)
                yield len(some)
    finally:
        if source >= 0:
            os.close(source)


def _pieces(tensor: Range, source: int, view: memoryview) -> Iterator[memoryview]:
    """Yield the copied part of a tensor in pieces that fit the buffer."""
    if tensor.keep:
        yield from _rows(tensor, source, view)
        return
    position, end = tensor.start, tensor.start + tensor.size
    while position < end:
        count = os.preadv(source, [view[: end - position]], position)
        if count == 0:
            raise CheckpointError(f"{tensor.file}: became shorter while it was read; export again")
        yield view[:count]
        position += count


def _rows(tensor: Range, source: int, view: memoryview) -> Iterator[memoryview]:
    """Yield the copied part of a tensor, as many rows at a time as fit the buffer."""
    rows = range(tensor.shape[0]) if tensor.keep[0] is None else tensor.keep[0].tolist()
    columns = None if len(tensor.keep) == 1 else tensor.keep[1]
    if tensor.size == 0 or tensor.size % math.prod(tensor.shape):
        raise CheckpointError(f"{tensor.file}: the values of {tensor.name} do not fill whole bytes; export from memory")
    width, item = tensor.size // tensor.shape[0], tensor.size // math.prod(tensor.shape)
    view = view if width <= len(view) else memoryview(bytearray(width))
    at_once = len(view) // width
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        for index, row in enumerate(some):
            count = os.preadv(source, [view[index * width : (index + 1) * width]], tensor.start + row * width)
            if count < width:
                raise CheckpointError(f"{tensor.file}: became shorter while it was read; export again")
        block = np.frombuffer(view[: len(some) * width], dtype=f"V{item}").reshape(len(some), -1)
        block = block if columns is None else np.take(block, columns, axis=1)
        yield block.view(np.uint8).reshape(-1).data


def _write_all(target: Any, data: memoryview) -> None:
    while data:  # an unbuffered write may be short
        data = data[target.write(data) :]
