"""The result of CoLa: every path, one plan for each sample, and the predictor if one was trained."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path as File
from typing import ClassVar

from lamella.methods.cola.paths import PathStudy
from lamella.methods.cola.predictor import PathPredictor
from lamella.results import Study


@dataclass(kw_only=True)
class Paths(Study):
    """The searches of a set of samples; their aggregates are the findings.

    Attributes:
        study: every path, valid or not; None if only the evidence was loaded.
        predictor: the path predictor, if one was trained.
    """

    study: PathStudy | None = None
    predictor: PathPredictor | None = None

    needs_folder: ClassVar[bool] = True

    def write(self, folder: File) -> None:
        """Write study, plans and predictor to a folder."""
        assert self.study is not None
        (folder / "study.json").write_text(json.dumps(self.study.as_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "plans").mkdir()
        plans = self.study.plans()
        for number, each in enumerate(self.study.samples):
            if (plan := plans.get(each.sample.id)) is not None:
                name = re.sub(r"[^A-Za-z0-9.-]", "_", each.sample.id)
                plan.write(folder / "plans" / f"{number:03d}-{name}.json")
        if self.predictor is not None:
            self.predictor.save(folder / "predictor.safetensors")
