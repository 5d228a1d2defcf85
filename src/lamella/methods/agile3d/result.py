"""The result of training: a model that answers clicks, as a folder that is read back without running anything in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from lamella.errors import CheckpointError, MethodError
from lamella.methods.agile3d.decoder import ClickDecoder
from lamella.methods.agile3d.modules import NANO, ClickSegmenter, SparseUNet, Widths
from lamella.methods.agile3d.pictures import PictureEncoder
from lamella.plan import fingerprint
from lamella.plan.filling import filled
from lamella.reading import parse_json, read_text
from lamella.results import Result
from lamella.train import TrainingLog
from lamella.zoo import ZOO

SCHEMA = "lamella.agile3d/1"
SHAPE, WEIGHTS, LOG = "segmenter.json", "model.safetensors", "log.json"
ENCODERS: dict[str, Widths] = {"res16unet34c": Widths(), "nano": NANO}
LARGEST = {"hidden": 4096, "heads": 64, "feedforward": 16_384, "layers": 64, "background": 1024}


@dataclass(frozen=True)
class Shape:
    """How large a model is.

    Attributes:
        encoder: a sparse U-Net, the paper's or one with 0.3 million parameters; or for pictures a public image network.
        voxel: side of a voxel, in metres; the paper's 0.05. In pictures, 4 x 4 pixels take its place.
        hidden: d, the width of queries and features; 128.
        heads: of each attention; 8.
        feedforward: F; 1024.
        layers: L, of the decoder; 3.
        background: B, learned queries for the background; 10.
        shared: let one layer run L times.

    Raises:
        MethodError: for values out of range.
    """

    encoder: Literal["res16unet34c", "nano", "efficientnet-lite0"] = "res16unet34c"
    voxel: float = 0.05
    hidden: int = 128
    heads: int = 8
    feedforward: int = 1024
    layers: int = 3
    background: int = 10
    shared: bool = False

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise MethodError(f"{name}={getattr(self, name)}: give 1 to {most}")
        if self.hidden % self.heads or self.hidden % 2:
            raise MethodError(f"hidden={self.hidden}: give an even multiple of the {self.heads} heads")
        if not 0 < self.voxel < 1000:
            raise MethodError(f"voxel={self.voxel:g}: give the side of a voxel in metres")

    @property
    def public(self) -> bool:
        """Whether its encoder has public weights, which are in the zoo."""
        return self.encoder not in ENCODERS

    def build(self, weights: Path | None = None, frozen: bool = False) -> ClickSegmenter:
        """A model of this shape with fresh weights.

        Args:
            weights: a file of those of a public encoder.
            frozen: train what stands above it alone.
        """
        sizes = (self.hidden, self.heads, self.feedforward, self.layers, self.background)
        encoder: SparseUNet | PictureEncoder
        if self.public:
            encoder = PictureEncoder(ZOO[self.encoder].architecture, weights=weights, frozen=frozen)
        else:
            encoder = SparseUNet(ENCODERS[self.encoder], self.voxel)
        return ClickSegmenter(encoder, ClickDecoder(encoder.dims, *sizes, shared=self.shared))


@dataclass(kw_only=True)
class Segmenter(Result):
    """A trained model for interactive segmentation.

    Attributes:
        model: in evaluation mode.
        shape: of it.
        log: of its training.
    """

    model: ClickSegmenter
    shape: Shape
    log: TrainingLog

    kind: ClassVar[str] = "segmenter"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"shape": asdict(self.shape), "sha256": fingerprint.state(self.model)}

    def write(self, folder: Path) -> None:
        """Weights, shape and log."""
        save_file({name: each.contiguous() for name, each in self.model.state_dict().items()}, folder / WEIGHTS)
        said = {"schema": SCHEMA} | asdict(self.shape)
        (folder / SHAPE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> Segmenter:
        """The model in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        path = Path(path)
        try:
            said = parse_json(read_text(path / SHAPE, "give a folder that agile3d has written"))
            if not isinstance(said, dict) or said.pop("schema", None) != SCHEMA:
                raise ValueError(f"{SHAPE} is no document of the schema {SCHEMA}")
            if said.keys() != {each.name for each in fields(Shape)}:
                raise ValueError(f"{SHAPE} does not name each size once")
            shape = TypeAdapter(Shape).validate_json(json.dumps(said), strict=True)
            model = filled(shape.build, path / WEIGHTS)
            log = TrainingLog.read(path / LOG)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{SHAPE}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise CheckpointError(f"{path}: no segmenter ({reason}): train one with `lamella run agile3d`") from None
        except Exception as error:  # each part has its own for a damaged file
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path}: no segmenter ({reason}): train one with `lamella run agile3d`") from None
        return cls(model=model, shape=shape, log=log)
