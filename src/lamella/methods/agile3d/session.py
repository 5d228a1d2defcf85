"""A session: one scene, encoded once, and the clicks on it so far; it can be undone, saved and played again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.files import write
from lamella.methods.agile3d.clicks import BACKGROUND, Click, Clicks
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.ply import write_ply
from lamella.methods.agile3d.scene import Scene
from lamella.reading import parse_json, read_text

SCHEMA = "lamella.clicks/1"
MOST = 64  # objects of one scene: far above what training has seen
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ClickLog:
    """What was clicked in one scene, in its order.

    Attributes:
        scene: the digest of its points.
        clicks: label and point of each.
    """

    scene: str
    clicks: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: str | Path) -> ClickLog:
        """A log from its file.

        Raises:
            CalibrationError: when it is none.
        """
        try:
            said = parse_json(read_text(path, "give a file that a session has saved"))
            if not isinstance(said, dict) or said.get("schema") != SCHEMA or not isinstance(said.get("scene"), str):
                raise ValueError(f"it is no document of the schema {SCHEMA}")
            return cls(said["scene"], tuple(_checked(each) for each in said["clicks"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}: no log of clicks ({error}): give one that a session has saved") from None

    def dump(self) -> str:
        """As JSON."""
        clicks = [{"object": label, "point": point} for label, point in self.clicks]
        return json.dumps({"schema": SCHEMA, "scene": self.scene, "clicks": clicks}, indent=1) + "\n"


def _checked(click: Any) -> tuple[int, int]:
    label, point = click["object"], click["point"]
    if type(label) is not int or type(point) is not int:
        raise ValueError("a click does not say an object and a point")
    return label, point


class Session:
    """One user's work on one scene.

    Args:
        model: is not changed.
        scene: what is clicked; its true objects, if it has any, are not looked at.
    """

    def __init__(self, model: ClickSegmenter, scene: Scene) -> None:
        self.model, self.scene = model, scene
        self.tokens = model.tokenise(scene)
        with torch.no_grad():
            (self.encoded,) = model.encode([self.tokens])
        self._points: list[int] = []
        self._clicks: Clicks = ()

    @property
    def clicks(self) -> Clicks:
        """Label and token of each click, the first one first."""
        return self._clicks

    def add(self, label: int, point: int) -> None:
        """Click a point of an object, from 1, or of the background, 0; it counts for the whole of its cell.

        Raises:
            CalibrationError: for a point or an object that there is not; nothing is changed.
        """
        if not 0 <= point < len(self.scene):
            raise CalibrationError(
                f"point {point} is outside {self.scene.name}: click one of its {len(self.scene)} points"
            )
        if not BACKGROUND <= label <= MOST:
            raise CalibrationError(f"object {label}: give 1 to {MOST}, or 0 for the background")
        self._points.append(point)
        self._clicks += (Click(label, int(self.tokens.of_point[point])),)

    def add_seen(self, label: int, eye: Floats, direction: Floats, reach: float) -> int:
        """Click the point that one sees there: of those beside the line of sight, the nearest to the eye.

        Args:
            eye: where one looks from [3].
            direction: of the look [3], of any length.
            reach: how far beside the line a point may be.

        Returns:
            The point.

        Raises:
            CalibrationError: when one sees none, or there is no such object; nothing is changed.
        """
        d = np.asarray(direction, float) / np.linalg.norm(direction)
        away = self.scene.coords - np.asarray(eye, float)  # [P, 3]
        along = away @ d
        beside = np.linalg.norm(away - along[:, None] * d, axis=1)
        seen = np.flatnonzero((along > 0) & (beside <= reach))  # none where a number is not finite
        if not len(seen):
            raise CalibrationError(f"there is no point of {self.scene.name} where you clicked: click on one")
        point = int(seen[along[seen].argmin()])
        self.add(label, point)
        return point

    def undo(self) -> None:
        """Take the last click back.

        Raises:
            CalibrationError: when there is none.
        """
        if not self._points:
            raise CalibrationError("there is no click to take back")
        self._points.pop()
        self._clicks = self._clicks[:-1]

    def labels(self) -> Tensor:
        """The label of every point [P]: 0 everywhere before the first click."""
        return self.model.labels(self.encoded, self._clicks)[self.tokens.of_point]

    @property
    def log(self) -> ClickLog:
        """What was clicked and not taken back."""
        pairs = zip(self._clicks, self._points, strict=True)
        return ClickLog(self.scene.digest, tuple((click.label, point) for click, point in pairs))

    def save(self, path: str | Path) -> None:
        """Write the log.

        Raises:
            ExportError: when it cannot be written.
        """
        write(path, self.log.dump())

    def replay(self, log: ClickLog) -> None:
        """Click again what was clicked, in place of what has been clicked here.

        Raises:
            CalibrationError: for clicks on another scene, or beyond this one; nothing is changed.
        """
        if log.scene != self.scene.digest:
            raise CalibrationError(f"these clicks are on another scene than {self.scene.name}: open that one")
        before = self._points, self._clicks
        self._points, self._clicks = [], ()
        try:
            for label, point in log.clicks:
                self.add(label, point)
        except CalibrationError:
            self._points, self._clicks = before
            raise

    def export(self, path: str | Path) -> None:
        """Write the points as a PLY with the label of each.

        Raises:
            ExportError: when it cannot be written.
        """
        write_ply(Path(path), self.scene, self.labels().cpu().numpy())
