"""The page of ``lamella trace``: every token of one answer, the layers that it ran, and the picture it is about."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import numpy as np

from lamella.extras import require
from lamella.report.numbers import number
from lamella.report.page import filled, finite

STATES = ("nothing ran", "attention ran", "MLP ran", "both ran")
ACTIVITY = ("void", "attention", "MLP", "active")  # of L2 Adaptive Computation, which judges whole layers
NAMES = {
    "first": "the first token", "image": "the image", "prompt": "the prompt", "answer": "the answer"
}  # fmt: skip
MOST_PIXELS = 512  # of the picture in the page, on a side


def render_trace(report: dict[str, Any], picture: np.ndarray | None = None) -> str:
    """The page ``trace.html``: one file that needs no network.

    Args:
        report: as :func:`lamella.jobs.trace.trace` returns it.
        picture: what the model saw [height, width, 3], where the report says how its tokens lie over it.
    """
    report = finite(report)
    data: dict[str, Any] = _by_pass(report) if "passes" in report else _by_token(report)
    if picture is not None and "picture" in report:
        grid = report["picture"]
        data["picture"] = {
            "source": _png(picture), "rows": grid["rows"], "columns": grid["columns"], "views": _views(report)
        }  # fmt: skip
    views = [(place, view["name"]) for place, view in enumerate(data.get("picture", {}).get("views", []))]
    params = {name: _told(value) for name, value in report["params"].items()}
    return filled("trace.html", data, report=report, params=params, names=NAMES, verdict=_verdict(report), views=views)


def _told(value: Any) -> str:
    """A parameter as people read it: few digits, lists without brackets."""
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return number(value) if isinstance(value, float) else str(value)


def _by_token(report: dict[str, Any]) -> dict[str, Any]:
    states = [
        [int(a) + 2 * int(m) for a, m in zip(attn, mlp, strict=True)]
        for attn, mlp in zip(report["attn"], report["mlp"], strict=True)
    ]
    names = ACTIVITY if _measures(report) else STATES
    return {"trace": {"tokens": report["tokens"], "states": states, "names": names, "notes": report["notes"]}}


def _by_pass(report: dict[str, Any]) -> dict[str, Any]:
    passes, tokens = report["passes"], report["tokens"]
    heat = {"x": "layer", "y": "pass", "most": 1}
    return {
        "heats": [
            {**heat, "name": "layers", "values": [each["by_layer"] for each in passes]},
            {**heat, "name": "tokens", "x": "token", "values": [each["by_token"] for each in passes],
             "labels": [token["text"] for token in tokens],
             "dots": [[column, _pass_of(passes, token["step"])] for column, token in enumerate(tokens)
                      if token["step"] is not None]},
        ]
    }  # fmt: skip


def _pass_of(passes: list[dict[str, Any]], step: int) -> int:
    """The last pass of a step, which commits its tokens."""
    return max(number for number, each in enumerate(passes) if each["step"] == step)


def _views(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What can be drawn over the picture: by name, frames with a value for each of its tokens."""
    cells = report["picture"]["cells"]
    if "passes" in report:
        rows = [[each["by_token"][cell] for cell in cells] for each in report["passes"]]
        return [_view("layers that ran", rows, "pass")]
    ran = [[(a + m) / 2 for a, m in zip(report["attn"][cell], report["mlp"][cell], strict=True)] for cell in cells]
    name = "layers that were active" if _measures(report) else "layers that ran"
    notes = {note: [values[cell] for cell in cells] for note, values in report["notes"].items()}
    return [
        _view(each, [list(row) for row in zip(*values, strict=True)], "layer")
        for each, values in {name: ran, **notes}.items()
    ]


def _view(name: str, rows: list[list[float | None]], by: str) -> dict[str, Any]:
    """A value of each token: over all layers or passes, and of each alone."""
    values = np.array(rows, dtype=float)  # [layers or passes, tokens]
    known = np.isfinite(values)
    mean = np.divide(
        np.where(known, values, 0).sum(0), known.sum(0), where=known.any(0), out=np.full(values.shape[1], np.nan)
    )
    frames = [{"label": f"all {by}{'es' if by == 'pass' else 's'}", "values": mean.tolist()}]
    frames += [{"label": f"{by} {number}", "values": row} for number, row in enumerate(rows)]
    return finite({"name": name, "frames": frames, "least": min(0.0, np.nanmin(values)), "most": np.nanmax(values)})


def _png(picture: np.ndarray) -> str:
    """A picture as a page holds it."""
    image = require("PIL.Image", "vision", "drawing pictures").fromarray(picture)
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    image.save(written := BytesIO(), format="PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def _measures(report: dict[str, Any]) -> bool:
    return bool(report["policy"] == "l2 adaptive computation")


def _verdict(report: dict[str, Any]) -> str:
    (phase, share), *others = report["usage"].items()
    were = "were active" if _measures(report) else "ran"
    rest = "".join(f", {100 * other:.0f} % on {NAMES[name]}" for name, other in others)
    return f"{100 * share:.0f} % of {report['model']['name']}'s layers {were} on {NAMES[phase]}{rest}."
