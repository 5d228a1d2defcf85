"""Plans of the first edition, ``lamella.plan/1``: one stack, one policy, no modules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lamella.plan.document import Document
from lamella.stack import ARCHITECTURES


class Model1(Document):
    """Which model a plan is for."""

    architecture: str
    weights: str | None = None
    family: str
    layers: Annotated[int, Field(ge=1, le=10_000)]
    name: str | None = None
    sizes: dict[str, Any] | None = None

    @property
    def stack(self) -> str:
        return ARCHITECTURES[self.family].stack if self.family in ARCHITECTURES else "text"

    def upgraded(self) -> dict[str, Any]:
        stack = {"family": self.family, "layers": self.layers, "sizes": self.sizes}
        known = self.model_dump(include={"architecture", "weights", "name"})
        return known | {"stacks": {self.stack: stack}}


class Decision1(Document):
    """What a plan, or a point of a series, decides."""

    drop: list[str] = Field(default_factory=list)
    width: dict[str, Any] = Field(default_factory=dict)
    path: dict[str, Any] = Field(default_factory=dict)
    weights: list[dict[str, Any]] = Field(default_factory=list)
    policy: dict[str, Any] | None = None

    def decision(self, stack: str) -> dict[str, Any]:
        decided = {name: getattr(self, name) for name in ("drop", "width", "path", "weights")}
        return decided | {"policies": {} if self.policy is None else {stack: self.policy}}


class Plan1(Decision1):
    """What every named site of one model does."""

    schema_: Literal["lamella.plan/1"] = Field(alias="schema")
    model: Model1
    provenance: dict[str, Any] = Field(default_factory=dict)

    def upgraded(self) -> dict[str, Any]:
        whole = {"model": self.model.upgraded(), "provenance": self.provenance}
        return whole | self.decision(self.model.stack)


class Point1(Decision1):
    """One plan of a series."""

    scores: dict[str, Any] = Field(default_factory=dict)


class Series1(Document):
    """The plans of one search."""

    schema_: Literal["lamella.series/1"] = Field(alias="schema")
    model: Model1
    points: Annotated[list[Point1], Field(min_length=1)]
    provenance: dict[str, Any] = Field(default_factory=dict)

    def upgraded(self) -> dict[str, Any]:
        points = [point.decision(self.model.stack) | {"scores": point.scores} for point in self.points]
        return {"model": self.model.upgraded(), "points": points, "provenance": self.provenance}
