"""What the commands return: a vision transformer with local paths, and a trained iFormer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lamella.methods.iformer.folder import read_folder, write_folder
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.modules import Layer
from lamella.methods.iformer.network import Shape
from lamella.methods.iformer.vision import Vision
from lamella.results import Result
from lamella.train import TrainingLog

PLAN = "plan.json"


@dataclass(kw_only=True)
class Ramped(Result):
    """A vision transformer whose early heads are local paths.

    Attributes:
        vision: the network.
        geometry: of what it was.
        layers: the plan.
        kernel: of the convolutions, on a side.
        origin: the fingerprint of what it was.
        log: of its healing, where it was healed.
    """

    vision: Vision
    geometry: Geometry
    layers: tuple[Layer, ...]
    kernel: int
    origin: str
    log: TrainingLog | None = None

    kind: ClassVar[str] = "ramped"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"kept": [len(each.kept) for each in self.layers], **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Weights, what is needed to read them, and the plan for readers."""
        said = {"geometry": asdict(self.geometry), "layers": [asdict(each) for each in self.layers],
                "kernel": self.kernel, "origin": self.origin}  # fmt: skip
        write_folder(folder, self.kind, self.vision.model, self.vision.looks, said, self.log)
        plan = {f"blocks.{number}.attn": asdict(each) for number, each in enumerate(self.layers)}
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        parts, looks = read_folder(Path(path), cls.kind)
        return cls(vision=Vision.around(parts.pop("model"), looks), **parts)


@dataclass(kw_only=True)
class Classifier(Result):
    """A trained iFormer.

    Attributes:
        vision: the network.
        shape: its layers.
        classes: that it names.
        log: of its training.
    """

    vision: Vision
    shape: Shape
    classes: int
    log: TrainingLog

    kind: ClassVar[str] = "classifier"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"shape": asdict(self.shape), "classes": self.classes, **self.vision.describe()}

    def write(self, folder: Path) -> None:
        """Weights, shape and log."""
        said = {"shape": asdict(self.shape), "classes": self.classes}
        write_folder(folder, self.kind, self.vision.model, self.vision.looks, said, self.log)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        parts, looks = read_folder(Path(path), cls.kind)
        return cls(vision=Vision.around(parts.pop("model"), looks), **parts)
