"""The log of a training run, from which reports draw curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamella.errors import TrainingError
from lamella.files import write
from lamella.reading import parse_json


@dataclass(frozen=True)
class Logged:
    """One point of a curve.

    Attributes:
        step: optimizer steps so far.
        loss: mean over the steps since the previous point, or over the held-out samples.
        parts: the named parts of the loss, averaged in the same way.
        lr: learning rate of the last of these steps; None for held-out points.
    """

    step: int
    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    lr: float | None = None


@dataclass
class TrainingLog:
    """The settings and curves of a run.

    Attributes:
        settings: all settings that determine the result.
        train: the training curve.
        held_out: the curve on the held-out samples, including before the first step; empty without such samples.
    """

    settings: Mapping[str, Any]
    train: list[Logged] = field(default_factory=list)
    held_out: list[Logged] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """The number of samples read in all steps and processes; repeated samples count each time."""
        steps = self.train[-1].step if self.train else 0
        return steps * math.prod(self.settings[name] for name in ("batch", "accumulate", "processes"))

    def write(self, path: Path) -> None:
        """Write the log as JSON."""
        write(path, self.dump())

    def dump(self) -> str:
        """Return the log as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """Read a log written by :meth:`write`.

        Raises:
            TrainingError: for a file that is missing or not such a log.
        """
        try:
            content = parse_json(path.read_bytes())
            train, held_out = ([_point(**point) for point in content[curve]] for curve in ("train", "held_out"))
            if not isinstance(content["settings"], dict):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}: is not the log of a training run ({error.__class__.__name__}): give the folder of one"
            ) from None
        return cls(content["settings"], train, held_out)


def _point(step: Any, loss: Any, parts: Any = (), lr: Any = None) -> Logged:
    parts = dict(parts)
    numbers = [loss, *parts.values(), *([] if lr is None else [lr])]
    if not isinstance(step, int) or not all(isinstance(number, int | float) for number in numbers):
        raise TypeError
    return Logged(step, loss, parts, lr)
