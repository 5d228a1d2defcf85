"""The job of ``lamella quantize``: a checkpoint in fewer bits, for torch or for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.files import check_free
from lamella.plan import checkpoint
from lamella.quantize import KINDS, write_gguf, write_int8
from lamella.zoo import check_folder, open_config, open_tokenizer, resolve

FORMS = ("int8", *reversed(KINDS))
SUFFIX = ".gguf"
PLACES = {"int8": "int8", "q8_0": f"model-q8_0{SUFFIX}"}  # beside a checkpoint


def quantize(model: str | Path, out: str | Path, *, to: str = "q8_0", overwrite: bool = False) -> dict[str, Any]:
    """Write a checkpoint in fewer bits.

    Args:
        model: a checkpoint folder or a zoo name.
        out: for ``int8`` the folder to write, else the file, which ends in ``.gguf``.
        to: ``int8``, a folder for torch; or what matrices become in a GGUF file for llama.cpp: ``q8_0`` (8 bits),
            ``bf16``, ``f16`` or ``f32``.
        overwrite: replace ``out``.

    Returns:
        ``output``, ``form``, and the bytes of the weights ``before`` and ``after``.

    Raises:
        ExportError: when ``out`` exists or cannot be written, or the form cannot hold the model.
        CheckpointError: for a folder that is missing, damaged or quantised already.
        ArchitectureError: for a family that llama.cpp has no place for.
    """
    out = Path(out)
    if to not in FORMS:
        raise ExportError(f"unknown form '{to}': choose one of {', '.join(FORMS)}")
    if (out.suffix == SUFFIX) != (to in KINDS):
        raise ExportError(f"{out}: {to} is {'a folder' if to == 'int8' else f'a file, whose name ends in {SUFFIX}'}")
    folder = resolve(model)
    if not isinstance(folder, Path):
        raise CheckpointError(f"{model} is no folder here: quantise a local checkpoint, or a zoo name")
    check_folder(folder)
    check_free(out, overwrite)
    config, tokenizer = open_config(folder), open_tokenizer(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{folder}: is quantised already: give the checkpoint before it was")
    if to == "int8":
        after = write_int8(folder, config, tokenizer, out, overwrite)
    else:
        after = write_gguf(folder, config, tokenizer, out, to, name=Path(model).name)
    before = sum(tensor.size for tensor in checkpoint.read(folder).tensors)
    return {"output": str(out), "form": to, "before": before, "after": after}


def write_beside(folder: Path, to: str) -> dict[str, Any]:
    """Write a checkpoint in fewer bits into its own folder, for evidence; where its form has none, say so.

    Args:
        folder: a checkpoint.
        to: a key of :data:`PLACES`.
    """
    try:
        report = quantize(folder, folder / PLACES[to], to=to)
    except (ArchitectureError, ExportError) as error:
        return {"form": to, "refused": str(error).replace(f"{folder}: ", "")}
    return report | {"output": PLACES[to]}
