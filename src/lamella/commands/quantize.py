"""A checkpoint in fewer bits, for torch or for llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.files import new_folder
from lamella.formatting import size
from lamella.plan import checkpoint
from lamella.plan.quantize import write_gguf, write_int8
from lamella.registry import command
from lamella.result import Documents, Evidence, Result, Summary
from lamella.zoo import LazyCheckpoint, check_folder, open_config, open_tokenizer

Kind = Literal["q8_0", "int8", "bf16", "f16", "f32"]
SUFFIX = ".gguf"
PLACES = {"int8": "int8", "q8_0": f"model-q8_0{SUFFIX}"}  # beside a checkpoint


@dataclass(kw_only=True)
class Quantised(Result):
    """A checkpoint in fewer bits, which is written from its files.

    Attributes:
        folder: the checkpoint.
        name: of the model.
        to: what matrices become.
    """

    folder: Path
    name: str
    to: Kind

    kind: ClassVar[str] = "quantised"
    needs_folder: ClassVar[bool] = True

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write int8 as a checkpoint folder, anything else as a GGUF file in a folder, with the documents."""
        with new_folder(out, size=0, overwrite=overwrite, source=self.folder) as place:
            self.findings["file"], self.findings["after"] = self._written(place)
            for name, text in documents().items():
                (place / name).write_text(text, encoding="utf-8")

    def _written(self, place: Path) -> tuple[str, int]:
        """What was written, and the bytes of its weights."""
        config = open_config(self.folder)
        if self.to == "int8":
            made = place / "made" / "int8"  # a folder of its own, since the one around it is locked while it is written
            after = write_int8(self.folder, config, open_tokenizer(self.folder), made, False)
            for path in made.iterdir():
                path.rename(place / path.name)
            shutil.rmtree(made.parent)
            return "model.safetensors", after
        file = f"{self.name}-{self.to}{SUFFIX}"
        return file, write_gguf(self.folder, config, open_tokenizer(self.folder), place / file, self.to, name=self.name)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        found = evidence.findings
        before, after = size(found["before"]), size(found["after"]) if "after" in found else "fewer"
        return Summary(f"{found['kind']}: {after} where the checkpoint's weights take {before}.")


@command("quantize", verb="quantize", on="any")
def quantize(model: LazyCheckpoint, *, kind: Kind = "q8_0") -> Quantised:
    """Write a checkpoint in fewer bits: a GGUF file for llama.cpp, or int8 for torch.

    Takes what `compress` and `apply` wrote as plain checkpoints, too: cut first, then quantise.

    Example: lamella quantize small --kind q8_0 -o small-q8

    Args:
        model: a checkpoint folder or a zoo name.
        kind: q8_0: a GGUF file for llama.cpp, 8 bits a weight; bf16, f16 or f32: the same in more. int8: a folder for
            torch, which needs the extra quantize.

    Returns:
        What is written in its folder: for int8 a checkpoint, else the GGUF file.

    Raises:
        CheckpointError: for a folder that is missing, damaged or quantised already.
        ArchitectureError: for a family that llama.cpp has no place for.
    """
    folder = model.folder
    check_folder(folder)
    if getattr(open_config(folder), "quantization_config", None) is not None:
        raise CheckpointError(f"{folder}: is quantised already: give the checkpoint before it was")
    before = sum(tensor.size for tensor in checkpoint.read(folder).tensors)
    findings = {"kind": kind, "before": before}
    return Quantised(folder=folder, name=Path(model.describe()).name, to=kind, findings=findings)


def write_beside(folder: Path, to: Literal["int8", "q8_0"]) -> dict[str, Any]:
    """Write a checkpoint in fewer bits into its own folder, for evidence; where its form has none, say so.

    Args:
        folder: a checkpoint.
        to: a key of :data:`PLACES`.
    """
    try:
        config, tokenizer, place = open_config(folder), open_tokenizer(folder), folder / PLACES[to]
        if to == "int8":
            after = write_int8(folder, config, tokenizer, place, False)
        else:
            after = write_gguf(folder, config, tokenizer, place, to, name=folder.name)
    except (ArchitectureError, ExportError) as error:
        return {"form": to, "refused": str(error).replace(f"{folder}: ", "")}
    before = sum(tensor.size for tensor in checkpoint.read(folder).tensors)
    return {"form": to, "before": before, "after": after, "output": PLACES[to]}
