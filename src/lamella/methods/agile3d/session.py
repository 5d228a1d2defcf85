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
from lamella.files import write, write_bytes
from lamella.methods.agile3d.clicks import BACKGROUND, Click, Clicks
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.pictures import dump_picture
from lamella.methods.agile3d.ply import dump_ply
from lamella.methods.agile3d.scene import Scene
from lamella.reading import parse_json, read_text

SCHEMA = "lamella.clicks/1"
CLICKS = ".clicks.json"  # how the name of a log ends
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
        return cls.parse(read_text(path, "give a file that a session has saved"), str(path))

    @classmethod
    def parse(cls, text: str | bytes, name: str) -> ClickLog:
        """A log from the content of its file.

        Raises:
            CalibrationError: when it is none; it says the name.
        """
        try:
            return cls.of(parse_json(text))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{name}: no log of clicks ({error}): give one that a session has saved") from None

    @classmethod
    def of(cls, said: Any) -> ClickLog:
        """A log from the value of its document.

        Raises:
            ValueError: when it is none; so for KeyError and TypeError.
        """
        if not isinstance(said, dict) or said.get("schema") != SCHEMA or not isinstance(said.get("scene"), str):
            raise ValueError(f"it is no document of the schema {SCHEMA}")
        return cls(said["scene"], tuple(_checked(each) for each in said["clicks"]))

    def document(self) -> dict[str, Any]:
        """The value of its document."""
        clicks = [{"object": label, "point": point} for label, point in self.clicks]
        return {"schema": SCHEMA, "scene": self.scene, "clicks": clicks}

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(self.document(), indent=1) + "\n"


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
        """Click the point that one sees there: on the first surface along the line of sight, the point closest to it.

        Args:
            eye: where one looks from [3].
            direction: of the look [3], of any length.
            reach: how far beside the line a point may be, and how far behind the first such point; where points are
                drawn as discs, their radius.

        Returns:
            The point.

        Raises:
            CalibrationError: when one sees none, or there is no such object; nothing is changed.
        """
        d = np.asarray(direction, float) / np.linalg.norm(direction)
        away = self.scene.placed - np.asarray(eye, float)  # [P, 3]
        along = away @ d
        beside = np.linalg.norm(away - along[:, None] * d, axis=1)
        seen = np.flatnonzero((along > 0) & (beside <= reach))  # none where a number is not finite
        if not len(seen):
            raise CalibrationError(f"there is no point of {self.scene.name} where you clicked: click on one")
        first = seen[along[seen] <= along[seen].min() + reach]
        point = int(first[beside[first].argmin()])
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

    def exported(self) -> bytes:
        """The content of a file with the label of each point: a PLY, or of a picture a grey PNG."""
        labels = self.labels().cpu().numpy()
        return dump_picture(self.scene, labels) if self.scene.flat else dump_ply(self.scene, labels)

    def export(self, path: str | Path) -> None:
        """Write that file.

        Raises:
            ExportError: when it cannot be written.
        """
        write_bytes(path, self.exported())
