"""A model that uses slices as a result: a checkpoint with its processor and its training log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.errors import CheckpointError
from lamella.methods.hires_llava.network import HiResLlava, HiResLlavaProcessor
from lamella.results import Result
from lamella.train import TrainingLog
from lamella.zoo import open_model, open_processor

LOG = "log.json"


@dataclass(kw_only=True)
class Restored(Result):
    """A trained model that uses slices; ``lamella.open`` loads its folder.

    Attributes:
        model: the model, in evaluation mode.
        processor: its processor, which makes the tiles.
        log: training log.
    """

    model: HiResLlava
    processor: HiResLlavaProcessor
    log: TrainingLog

    kind: ClassVar[str] = "restored"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        names = ("restored", "branches", "sampler", "window", "most_slices", "overlap", "view", "order")
        return {name: getattr(self.model.config, name) for name in names}

    def write(self, folder: Path) -> None:
        """Write the model, its processor and the training log into a folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: Path) -> Restored:
        """Read a result from a folder.

        Raises:
            CheckpointError: for a damaged folder, or one with another model.
        """
        model = open_model(path).model
        if not isinstance(model, HiResLlava):
            raise CheckpointError(f"{path} holds a {type(model).__name__}: give a folder written by hires-llava")
        return cls(model=model, processor=open_processor(path), log=TrainingLog.read(path / LOG))
