"""Scores: measured arrays with named dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scores:
    """A measurement over sites.

    Attributes:
        name: what was measured, with its unit if it has one.
        dims: name of each axis, such as ``("layer",)`` or ``("start", "length")``.
        values: the array.
        provenance: data, seed and options of the measurement.
    """

    name: str
    dims: tuple[str, ...]
    values: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.dims):
            raise ValueError(f"scores '{self.name}': {self.values.ndim} axes but {len(self.dims)} names")

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values, with None for values that are not finite."""
        values = self.values.astype(object)
        values[~np.isfinite(self.values)] = None  # JSON has no NaN
        return {"name": self.name, "dims": list(self.dims), "values": values.tolist(), "provenance": self.provenance}
