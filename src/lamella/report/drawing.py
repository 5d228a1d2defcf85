"""The drawing of a stack: one column per layer, with its attention on top and its MLP below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lamella.formatting import number
from lamella.report.figures import Figure

ROW = 32  # layers per row on a wide screen
STATES = {"kept": "kept", "cut": "cut", "prompt": "runs on the prompt only", "some": "runs for some generated tokens"}
STRIPED = ("prompt", "some")
SUBLAYERS = ("attn", "mlp")


@dataclass(frozen=True)
class Shade:
    """A score that can colour the drawing.

    Attributes:
        name, label, meaning: the key, the name on the switch, and the meaning of a high value.
        values: one per sublayer, in order; None where it was not measured.
    """

    name: str
    label: str
    meaning: str
    values: Sequence[float | None]

    def levels(self) -> list[float | None]:
        """Return every value mapped to 0 to 1 on a logarithmic scale, since a few sublayers dominate."""
        positive = [value for value in self.values if value is not None and value > 0]
        if not positive:
            return [None if value is None else 0.0 for value in self.values]
        low, high = math.log(min(positive)), math.log(max(positive))
        width = (high - low) or 1.0
        return [
            None if value is None else 0.0 if value <= 0 else round((math.log(value) - low) / width, 4)
            for value in self.values
        ]

    def legend(self) -> dict[str, str]:
        """Return the label, meaning and range of the score."""
        known = [value for value in self.values if value is not None]
        low, high = (number(min(known)), number(max(known))) if known else ("", "")
        return {"label": self.label, "meaning": self.meaning, "low": low, "high": high}


def shade(name: str, label: str, meaning: str, values: Sequence[float | None] | None, layers: int) -> list[Shade]:
    """Return a score of sublayers, or of layers (shared by their sublayers); empty if it was not measured."""
    if values is None or len(values) not in (layers, len(SUBLAYERS) * layers):
        return []
    if len(values) == layers:
        values = [value for value in values for _ in SUBLAYERS]
    return [Shade(name, label, meaning, values)] if any(value is not None for value in values) else []


@dataclass(frozen=True)
class StackDrawing(Figure):
    """A stack, layer by layer; at most one per page, with a switch for its colours.

    Attributes:
        states: of each layer, a key of :data:`STATES` for ``attn`` and ``mlp``.
        shades: the scores that can colour it; the first is shown initially.
        order: the sites removed by each step of the search.
    """

    states: Sequence[Mapping[str, str]]
    shades: Sequence[Shade] = ()
    order: Sequence[Sequence[str]] = ()

    kind: ClassVar[str] = "stack"

    @property
    def is_empty(self) -> bool:
        """Whether there are no layers."""
        return not self.states

    @property
    def scores(self) -> dict[str, dict[str, str]]:
        """The legend of each score, for the page's script."""
        return {each.name: each.legend() for each in self.shades}

    def layout(self) -> dict[str, Any]:
        """Return the data for the template."""
        step = {site: number for number, sites in enumerate(self.order, start=1) for site in sites}
        levels = {each.name: each.levels() for each in self.shades}
        columns: list[dict[str, Any]] = []
        for layer, layer_states in enumerate(self.states):
            sublayers = []
            for which, kind in enumerate(SUBLAYERS):
                sublayer = len(SUBLAYERS) * layer + which
                site, state = f"layers.{layer}.{kind}", layer_states[kind]
                removed = step.get(site) if state != "kept" else None
                facts = [STATES[state] + (f", removed in step {removed}" if removed else "")]
                facts += [f"{each.label.lower()} {number(each.values[sublayer])}" for each in self.shades]
                sublayers.append(
                    {
                        "site": site,
                        "kind": kind,
                        "state": state,
                        "striped": state in STRIPED,
                        "step": removed,
                        "facts": facts,
                        "values": [each.values[sublayer] for each in self.shades],
                        "levels": {name: values[sublayer] for name, values in levels.items()},
                        "level": levels[self.shades[0].name][sublayer] if self.shades else None,
                    }
                )
            columns.append({"layer": layer, "sublayers": sublayers})
        rows = math.ceil(len(columns) / ROW) or 1
        present = {sublayer["state"] for column in columns for sublayer in column["sublayers"]}
        return {
            "columns": columns,
            "per_row": math.ceil(len(columns) / rows),
            "states": {state: words for state, words in STATES.items() if state in present},
            "scores": self.scores,
            "choices": [(each.name, each.label) for each in self.shades],
            "ordered": bool(step),
        }
