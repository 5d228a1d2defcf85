"""A model that reads slices, as a result: a checkpoint with its processor, and how it was trained."""

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
    """A trained model that reads slices; ``lamella.open`` opens what is written.

    Attributes:
        model: in evaluation mode.
        processor: that makes its tiles.
        log: of the training.
    """

    model: HiResLlava
    processor: HiResLlavaProcessor
    log: TrainingLog

    kind: ClassVar[str] = "restored"
    needs_folder: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        said = ("restored", "branches", "sampler", "window", "most_slices", "overlap", "view", "order")
        return {name: getattr(self.model.config, name) for name in said}

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: Path) -> Restored:
        """What lies in a folder.

        Raises:
            CheckpointError: for one that is damaged, or holds another model.
        """
        model = open_model(path).model
        if not isinstance(model, HiResLlava):
            raise CheckpointError(f"{path} holds a {type(model).__name__}: give a folder that hires-llava has written")
        return cls(model=model, processor=open_processor(path), log=TrainingLog.read(path / LOG))
