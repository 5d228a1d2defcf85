"""Quantise a checkpoint, for torch or for llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.extras import require
from lamella.files import new_folder
from lamella.formatting import size
from lamella.plan import checkpoint
from lamella.plan.quantize import LLAMA_CPP, write_gguf, write_int8
from lamella.registry import command
from lamella.result import Documents, Evidence, Result, Summary
from lamella.zoo import LazyCheckpoint, check_folder, open_config, open_tokenizer

Kind = Literal["q8_0", "int8", "q4_k_m", "bf16", "f16", "f32"]
SUFFIX = ".gguf"


@dataclass(kw_only=True)
class Quantised(Result):
    """A checkpoint to be written with quantised weights.

    Attributes:
        folder: the checkpoint.
        name: name of the model.
        to: type of the quantised matrices.
    """

    folder: Path
    name: str
    to: Kind

    kind: ClassVar[str] = "quantised"
    needs_folder: ClassVar[bool] = True

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write int8 as a checkpoint folder, other types as a GGUF file in a folder, with the documents."""
        with new_folder(out, size=0, overwrite=overwrite, source=self.folder) as out_folder:
            self.findings["file"], self.findings["after"] = self._written(out_folder)
            for name, text in documents().items():
                (out_folder / name).write_text(text, encoding="utf-8")

    def _written(self, out: Path) -> tuple[str, int]:
        """Write the weights, and return the name of their file and their size in bytes."""
        config = open_config(self.folder)
        if self.to == "int8":
            made = out / "made" / "int8"  # a subfolder, since the folder itself is locked while it is written
            after = write_int8(self.folder, config, open_tokenizer(self.folder), made, False)
            for path in made.iterdir():
                path.rename(out / path.name)
            shutil.rmtree(made.parent)
            return "model.safetensors", after
        checkpoint.copy_licence(self.folder, out)
        file = f"{self.name}-{self.to}{SUFFIX}"
        return file, write_gguf(self.folder, config, open_tokenizer(self.folder), out / file, self.to, name=self.name)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the sizes before and after."""
        found = evidence.findings
        before, after = size(found["before"]), size(found["after"]) if "after" in found else "fewer"
        return Summary(f"{found['kind']}: {after}, from {before} of the checkpoint's weights.")


@command("quantize", verb="quantize", on="any")
def quantize(model: LazyCheckpoint, *, kind: Kind = "q8_0") -> Quantised:
    """Quantise a checkpoint: a GGUF file for llama.cpp, or int8 for torch.

    Plain checkpoints written by `compress` and `apply` can be quantised, too: prune first, then quantise.

    Example: lamella quantize small --kind q8_0 -o small-q8

    Args:
        model: a checkpoint folder or a zoo name.
        kind: q8_0: a GGUF file for llama.cpp with 8-bit weights; q4_k_m: with 4 to 8 bits, which needs the extra
            llama-cpp; bf16, f16 or f32: with more bits. int8: a folder for torch, which needs the extra quantize.

    Returns:
        The files to write: a checkpoint for int8, else a GGUF file.

    Raises:
        CheckpointError: if the folder is missing, damaged or already quantised.
        ArchitectureError: for a family that llama.cpp does not support.
        LamellaError: if llama.cpp is needed and not installed.
    """
    if kind == "q4_k_m":
        require("xllamacpp", *LLAMA_CPP)
    folder = model.folder
    check_folder(folder)
    if getattr(open_config(folder), "quantization_config", None) is not None:
        raise CheckpointError(f"{folder}: is already quantised: give the unquantised checkpoint")
    before = sum(tensor.size for tensor in checkpoint.read(folder).tensors)
    findings = {"kind": kind, "before": before}
    return Quantised(folder=folder, name=Path(model.describe()).name, to=kind, findings=findings)


def write_beside(folder: Path, to: Kind) -> dict[str, Any]:
    """Quantise a checkpoint into its own folder, and describe the result, or why it cannot be quantised.

    Args:
        folder: a checkpoint.
        to: type of the quantised matrices.
    """
    output = "int8" if to == "int8" else f"model-{to}{SUFFIX}"
    try:
        config, tokenizer, path = open_config(folder), open_tokenizer(folder), folder / output
        if to == "int8":
            after = write_int8(folder, config, tokenizer, path, False)
        else:
            after = write_gguf(folder, config, tokenizer, path, to, name=folder.name)
    except (ArchitectureError, ExportError) as error:
        return {"form": to, "refused": str(error).replace(f"{folder}: ", "")}
    before = sum(tensor.size for tensor in checkpoint.read(folder).tensors)
    return {"form": to, "before": before, "after": after, "output": output}
