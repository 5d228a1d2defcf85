"""Results of the commands: a vision transformer with local paths, and a trained iFormer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lamella.methods.iformer.folder import read_folder, write_folder
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.modules import LayerPlan
from lamella.methods.iformer.network import StageShape
from lamella.methods.iformer.vision import Vision
from lamella.results import Result
from lamella.train import TrainingLog

PLAN = "plan.json"


@dataclass(kw_only=True)
class Ramped(Result):
    """A vision transformer in which some heads are replaced by local paths.

    Attributes:
        vision: the network.
        geometry: geometry of the original.
        layers: plan of each layer.
        kernel: side of the convolutions.
        origin: fingerprint of the original.
        log: training log, if it was healed.
    """

    vision: Vision
    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    kernel: int
    origin: str
    log: TrainingLog | None = None

    kind: ClassVar[str] = "ramped"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        return {"kept": [len(each.kept) for each in self.layers], **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Write the weights, the data needed to read them, and the plan in readable form."""
        document = {"geometry": asdict(self.geometry), "layers": [asdict(each) for each in self.layers],
                "kernel": self.kernel, "origin": self.origin}  # fmt: skip
        write_folder(folder, self.kind, self.vision.model, self.vision.preprocessing, document, self.log)
        plan = {f"blocks.{number}.attn": asdict(each) for number, each in enumerate(self.layers)}
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the network in a folder.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        parts, preprocessing = read_folder(Path(path), cls.kind)
        return cls(vision=Vision.from_model(parts.pop("model"), preprocessing), **parts)


@dataclass(kw_only=True)
class IFormerClassifier(Result):
    """A trained iFormer.

    Attributes:
        vision: the network.
        shape: its shape.
        classes: number of classes.
        log: training log.
    """

    vision: Vision
    shape: StageShape
    classes: int
    log: TrainingLog

    kind: ClassVar[str] = "classifier"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        return {"shape": asdict(self.shape), "classes": self.classes, **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Write weights, shape and log."""
        document = {"shape": asdict(self.shape), "classes": self.classes}
        write_folder(folder, self.kind, self.vision.model, self.vision.preprocessing, document, self.log)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the network in a folder.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        parts, preprocessing = read_folder(Path(path), cls.kind)
        return cls(vision=Vision.from_model(parts.pop("model"), preprocessing), **parts)
