"""What labelling leaves: for each scene its points with labels, and the clicks that gave them, to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lamella.errors import CalibrationError
from lamella.methods.agile3d.session import CLICKS, ClickLog, Session
from lamella.results import Evidence, Result


@dataclass(frozen=True)
class ClickLogs:
    """Clicks of earlier sessions, on any scenes.

    Attributes:
        of_scenes: by the digest of their scenes.
        said: what provenance says of them.
    """

    metavar: ClassVar[str] = "CLICKS"
    source_help: ClassVar[str] = "a file that a session has saved, or a folder that `label` has written"

    of_scenes: Mapping[str, ClickLog]
    said: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> ClickLogs:
        """Read one log, or those of a folder.

        Raises:
            CalibrationError: for what is missing or no log of clicks.
        """
        path = Path(name)
        files = sorted(path.glob(f"*{CLICKS}")) if path.is_dir() else [path]
        if not files:
            raise CalibrationError(f"{path} holds no file *{CLICKS}: give one that a session has saved")
        logs = {log.scene: log for log in map(ClickLog.read, files)}
        digest = hashlib.sha256("".join(log.dump() for log in logs.values()).encode()).hexdigest()
        return cls(logs, {"clicks": str(name), "scenes": len(logs), "sha256": digest})

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)


@dataclass(kw_only=True)
class Labelled(Result):
    """Scenes that were labelled by clicks.

    Attributes:
        logs: what was clicked, by the name of the files of a scene.
        exports: the contents of the files with the labels of its points, likewise.
    """

    logs: dict[str, ClickLog] = field(default_factory=dict)
    exports: dict[str, bytes] = field(default_factory=dict)

    kind: ClassVar[str] = "labelled"
    needs_folder: ClassVar[bool] = True

    @classmethod
    def of(cls, sessions: Iterable[Session]) -> Labelled:
        """What these sessions have come to."""
        found, told = cls(), []
        for number, session in enumerate(sessions, start=1):
            name = f"{number:03}-{session.scene.stem}"
            labels, log = session.labels().cpu().numpy(), session.log
            found.logs[name] = log
            found.exports[name + session.scene.ending] = session.exported()
            counts = {str(label): int((labels == label).sum()) for label in np.unique(labels)}
            told.append({"scene": session.scene.name, "clicks": len(log.clicks), "points": counts})
        found.findings = {"scenes": told}
        return found

    def write(self, folder: Path) -> None:
        """For each scene its labels and its clicks."""
        for name, content in self.exports.items():
            (folder / name).write_bytes(content)
        for name, log in self.logs.items():
            (folder / f"{name}{CLICKS}").write_text(log.dump(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those in a folder of results.

        Raises:
            CalibrationError: when a log is damaged.
        """
        evidence = Evidence.read(path)
        logs = {each.name.removesuffix(CLICKS): ClickLog.read(each) for each in sorted(Path(path).glob(f"*{CLICKS}"))}
        exports = {each.name: each.read_bytes() for name in logs for each in sorted(Path(path).glob(f"{name}.*"))}
        exports = {name: content for name, content in exports.items() if not name.endswith(CLICKS)}
        return cls(logs=logs, exports=exports, findings=evidence.findings, notes=evidence.notes)
