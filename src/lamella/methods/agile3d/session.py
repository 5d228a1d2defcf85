"""A labelling session: one encoded scene and the clicks on it so far, with undo, save and replay."""

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
from lamella.methods.agile3d.images import dump_image
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.ply import dump_ply
from lamella.methods.agile3d.scene import ClickScene
from lamella.reading import parse_json, read_text

SCHEMA = "lamella.clicks/1"
CLICKS = ".clicks.json"  # suffix of the files of click logs
MOST = 64  # maximum number of objects in a scene, far above the number seen in training
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ClickLog:
    """The clicks on one scene, in order.

    Attributes:
        scene: digest of the scene.
        clicks: label and point index of each click.
    """

    scene: str
    clicks: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: str | Path) -> ClickLog:
        """Read a log from a file.

        Args:
            path: the file.

        Raises:
            CalibrationError: if it is not a valid log.
        """
        return cls.parse(read_text(path, "give a file saved by a session"), str(path))

    @classmethod
    def parse(cls, text: str | bytes, name: str) -> ClickLog:
        """Parse a log from the content of its file.

        Args:
            text: content of the file.
            name: its name, for messages.

        Raises:
            CalibrationError: if it is not a valid log.
        """
        try:
            return cls.of(parse_json(text))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{name}: not a valid click log ({error}): give one saved by a session") from None

    @classmethod
    def of(cls, document: Any) -> ClickLog:
        """Create a log from its parsed JSON document.

        Args:
            document: the parsed document.

        Raises:
            ValueError: if it is not a valid log; so do KeyError and TypeError.
        """
        if (
            not isinstance(document, dict)
            or document.get("schema") != SCHEMA
            or not isinstance(document.get("scene"), str)
        ):
            raise ValueError(f"it is not a document of schema {SCHEMA}")
        return cls(document["scene"], tuple(_checked(each) for each in document["clicks"]))

    def document(self) -> dict[str, Any]:
        """Return the log as a JSON-serialisable document."""
        clicks = [{"object": label, "point": point} for label, point in self.clicks]
        return {"schema": SCHEMA, "scene": self.scene, "clicks": clicks}

    def dump(self) -> str:
        """Return the log as JSON text."""
        return json.dumps(self.document(), indent=1) + "\n"


def _checked(click: Any) -> tuple[int, int]:
    label, point = click["object"], click["point"]
    if type(label) is not int or type(point) is not int:
        raise ValueError("a click must have an object and a point, both integers")
    return label, point


class Session:
    """One user's session on one scene.

    Args:
        model: the model; it is not changed.
        scene: the scene to label; its ground truth, if any, is not used.
    """

    def __init__(self, model: ClickSegmenter, scene: ClickScene) -> None:
        self.model, self.scene = model, scene
        self.tokens = model.tokenise(scene)
        with torch.no_grad():
            (self.encoded,) = model.encode([self.tokens])
        self._points: list[int] = []
        self._clicks: Clicks = ()

    @property
    def clicks(self) -> Clicks:
        """Label and token of each click, in order."""
        return self._clicks

    def add(self, label: int, point: int) -> None:
        """Click a point; the click applies to its whole cell.

        Args:
            label: the object, from 1, or 0 for the background.
            point: index of the point.

        Raises:
            CalibrationError: if the point or object does not exist; nothing is changed.
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
        """Click the visible point along a line of sight: on the first surface it hits, the point closest to the line.

        Args:
            label: the object, from 1, or 0 for the background.
            eye: position of the viewer [3].
            direction: direction of the line of sight [3], of any length.
            reach: maximum distance of a point from the line, and depth behind the first such point; where points are
                drawn as discs, their radius.

        Returns:
            Index of the point.

        Raises:
            CalibrationError: if no point is hit, or the object does not exist; nothing is changed.
        """
        d = np.asarray(direction, float) / np.linalg.norm(direction)
        away = self.scene.coords_3d - np.asarray(eye, float)  # [P, 3]
        along = away @ d
        beside = np.linalg.norm(away - along[:, None] * d, axis=1)
        seen = np.flatnonzero((along > 0) & (beside <= reach))  # empty if a value is not finite
        if not len(seen):
            raise CalibrationError(f"there is no point of {self.scene.name} at the click: click on a point")
        first = seen[along[seen] <= along[seen].min() + reach]
        point = int(first[beside[first].argmin()])
        self.add(label, point)
        return point

    def undo(self) -> None:
        """Undo the last click.

        Raises:
            CalibrationError: if there is none.
        """
        if not self._points:
            raise CalibrationError("there is no click to undo")
        self._points.pop()
        self._clicks = self._clicks[:-1]

    def labels(self) -> Tensor:
        """Predict the label of every point [P]; all 0 before the first click."""
        return self.model.labels(self.encoded, self._clicks)[self.tokens.of_point]

    @property
    def log(self) -> ClickLog:
        """The log of all clicks that were not undone."""
        pairs = zip(self._clicks, self._points, strict=True)
        return ClickLog(self.scene.digest, tuple((click.label, point) for click, point in pairs))

    def save(self, path: str | Path) -> None:
        """Write the click log to a file.

        Args:
            path: the file to write.

        Raises:
            ExportError: if it cannot be written.
        """
        write(path, self.log.dump())

    def replay(self, log: ClickLog) -> None:
        """Replace the clicks of this session by those of a log.

        Args:
            log: the clicks to make.

        Raises:
            CalibrationError: if the log is of another scene or has invalid clicks; nothing is changed.
        """
        if log.scene != self.scene.digest:
            raise CalibrationError(f"these clicks belong to another scene than {self.scene.name}: open that scene")
        before = self._points, self._clicks
        self._points, self._clicks = [], ()
        try:
            for label, point in log.clicks:
                self.add(label, point)
        except CalibrationError:
            self._points, self._clicks = before
            raise

    def exported(self) -> bytes:
        """Return the content of a file with the label of each point: a PLY file, or a grey PNG for an image."""
        labels = self.labels().cpu().numpy()
        return dump_image(self.scene, labels) if self.scene.is_image else dump_ply(self.scene, labels)

    def export(self, path: str | Path) -> None:
        """Write a file with the label of each point, see :meth:`exported`.

        Args:
            path: the file to write.

        Raises:
            ExportError: if it cannot be written.
        """
        write_bytes(path, self.exported())
