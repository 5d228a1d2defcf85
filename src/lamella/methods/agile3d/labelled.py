"""The result of labelling: for each scene its labelled points, and the clicks, from which labelling can resume."""

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
    """Click logs of earlier sessions, of any scenes.

    Attributes:
        of_scenes: logs by the digest of their scene.
        metadata: provenance.
    """

    metavar: ClassVar[str] = "CLICKS"
    summaries: ClassVar[str] = "a file saved by a session, or a folder written by `label`"

    of_scenes: Mapping[str, ClickLog]
    metadata: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path) -> ClickLogs:
        """Read one log, or all logs of a folder.

        Args:
            name: a file or a folder.

        Raises:
            CalibrationError: if a file is missing or not a click log.
        """
        path = Path(name)
        files = sorted(path.glob(f"*{CLICKS}")) if path.is_dir() else [path]
        if not files:
            raise CalibrationError(f"{path} has no file *{CLICKS}: give a click log saved by a session")
        logs = {log.scene: log for log in map(ClickLog.read, files)}
        digest = hashlib.sha256("".join(log.dump() for log in logs.values()).encode()).hexdigest()
        return cls(logs, {"clicks": str(name), "scenes": len(logs), "sha256": digest})

    def describe(self) -> dict[str, Any]:
        """Return the provenance of these logs."""
        return dict(self.metadata)


@dataclass(kw_only=True)
class LabelledScenes(Result):
    """Scenes labelled by clicks.

    Attributes:
        logs: click logs, by the file stem of their scene.
        exports: contents of the label files, by file name.
    """

    logs: dict[str, ClickLog] = field(default_factory=dict)
    exports: dict[str, bytes] = field(default_factory=dict)

    kind: ClassVar[str] = "labelled"
    needs_folder: ClassVar[bool] = True

    @classmethod
    def of(cls, sessions: Iterable[Session]) -> LabelledScenes:
        """Collect the labels and click logs of sessions."""
        found, summaries = cls(), []
        for index, session in enumerate(sessions, start=1):
            name = f"{index:03}-{session.scene.stem}"
            labels, log = session.labels().cpu().numpy(), session.log
            found.logs[name] = log
            found.exports[name + session.scene.suffix] = session.exported()
            counts = {str(label): int((labels == label).sum()) for label in np.unique(labels)}
            summaries.append({"scene": session.scene.name, "clicks": len(log.clicks), "points": counts})
        found.findings = {"scenes": summaries}
        return found

    def write(self, folder: Path) -> None:
        """Write the labels and clicks of each scene."""
        for name, content in self.exports.items():
            (folder / name).write_bytes(content)
        for name, log in self.logs.items():
            (folder / f"{name}{CLICKS}").write_text(log.dump(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the labels and click logs of a result folder.

        Raises:
            CalibrationError: if a log is damaged.
        """
        evidence = Evidence.read(path)
        logs = {each.name.removesuffix(CLICKS): ClickLog.read(each) for each in sorted(Path(path).glob(f"*{CLICKS}"))}
        exports = {each.name: each.read_bytes() for name in logs for each in sorted(Path(path).glob(f"{name}.*"))}
        exports = {name: content for name, content in exports.items() if not name.endswith(CLICKS)}
        return cls(logs=logs, exports=exports, findings=evidence.findings, notes=evidence.notes)
