"""The page of ``lamella trace``: every token of one answer, the layers that ran for it, and the image of the prompt."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lamella.extras import require
from lamella.formatting import number
from lamella.report.figures import Figure, Heatmap
from lamella.report.page import finite, render_page

STATES = ("nothing ran", "attention ran", "MLP ran", "both ran")
ACTIVITY = ("void", "attention", "MLP", "active")  # of L2 Adaptive Computation, which classifies whole layers
NAMES = {
    "first": "the first token", "image": "the image", "prompt": "the prompt", "answer": "the answer"
}  # fmt: skip
MAX_PIXELS = 512  # maximum width and height of the image in the page


def render_trace(report: dict[str, Any]) -> str:
    """Render the page of a trace: one file that needs no network.

    Args:
        report: the findings of ``lamella trace``; with a grid of image tokens, also the ``image``.
    """
    report = finite(report)
    note, shares = _distinguishing(report)
    figures: dict[str, Figure] = _by_pass(report) if "passes" in report else {"trace": _by_token(report, note)}
    data: dict[str, Any] = {}
    if "image" in report and "image_grid" in report:
        rows, columns, views = report["image_grid"]["rows"], report["image_grid"]["columns"], _views(report, note)
        data["image_grid"] = {"rows": rows, "columns": columns, "views": views}
        figures["image_grid"] = _overlay(views[0], rows, columns, report["image"])
    choices = [(index, view["name"]) for index, view in enumerate(data.get("image_grid", {}).get("views", []))]
    context = {
        "report": report,
        "params": {name: _formatted(value) for name, value in report["params"].items()},
        "names": NAMES,
        "verdict": _verdict(report, note, shares),
        "views": choices,
        "note": note,
        "shares": shares,
    }
    return render_page(Path(__file__).with_name("trace.html"), figures, data, **context)


def _overlay(view: dict[str, Any], rows: int, columns: int, source: str) -> Heatmap:
    """Return the first frame of a view over the image; the script of the page shows the others."""
    values = view["frames"][0]["values"]
    return Heatmap(
        "column",
        "row",
        [values[row * columns : (row + 1) * columns] for row in range(rows)],
        view["name"],
        least=view["least"],
        most=view["most"],
        square=True,
        background=source,
        title="the image, darkened where its tokens ran few layers",
    )


def _formatted(value: Any) -> str:
    """Format a parameter: few digits, lists without brackets, mappings as values with their names."""
    if isinstance(value, dict):
        return " and ".join(f"{_formatted(each)} of {name}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_formatted, value))
    return number(value) if isinstance(value, float) else str(value)


def _by_token(report: dict[str, Any], note: str) -> Heatmap:
    """Return a heat map of tokens (columns) and layers (rows): what ran, or ``note`` if all layers did."""
    tokens, names = report["tokens"], ACTIVITY if _measures(report) else STATES
    states = [
        [int(a) + 2 * int(m) for a, m in zip(attn, mlp, strict=True)]
        for attn, mlp in zip(report["attn"], report["mlp"], strict=True)
    ]
    values = report["notes"][note] if note else states
    phases = [token["phase"] for token in tokens]

    def hover(layer: int, column: int) -> str:
        token = tokens[column]
        lines = [f"layer {layer}: {names[states[column][layer]]}", f"“{token['text']}” → “{token['next']}”"]
        return "\n".join(lines + [f"{name}: {number(row[column][layer])}" for name, row in report["notes"].items()])

    layers, columns = range(len(states[0])), range(len(tokens))
    return Heatmap(
        "token",
        "layer",
        [[values[column][layer] for column in columns] for layer in layers],
        note or "sublayers",
        columns=[token["text"] for token in tokens],
        upwards=True,
        categories=() if note else names,
        least=0.0 if note else None,
        hover=[[hover(layer, column) for column in columns] for layer in layers],
        vertical=[column - 0.5 for column in columns[1:] if phases[column] != phases[column - 1]],
    )


def _by_pass(report: dict[str, Any]) -> dict[str, Figure]:
    """Return what each pass ran, for each layer and for each token."""
    passes, tokens = report["passes"], report["tokens"]
    committed = [
        (column, _pass_of(passes, token["step"])) for column, token in enumerate(tokens) if token["step"] is not None
    ]
    by_layer, by_token = ([each[name] for each in passes] for name in ("by_layer", "by_token"))
    texts = [token["text"] for token in tokens]
    return {
        "layers": Heatmap("layer", "pass", by_layer, "share of the tokens", least=0.0, most=1.0),
        "tokens": Heatmap(
            "token", "pass", by_token, "share of the sublayers", columns=texts, path=committed, least=0.0, most=1.0
        ),
    }


def _pass_of(passes: list[dict[str, Any]], step: int) -> int:
    """Return the last pass of a step, which commits its tokens."""
    return max(number for number, each in enumerate(passes) if each["step"] == step)


def _views(report: dict[str, Any], note: str) -> list[dict[str, Any]]:
    """Return what can be drawn over the image: by name, frames with a value for each of its tokens."""
    cells = report["image_grid"]["cells"]
    if "passes" in report:
        rows = [[each["by_token"][cell] for cell in cells] for each in report["passes"]]
        return [_view("layers that ran", rows, "pass")]
    ran = [[(a + m) / 2 for a, m in zip(report["attn"][cell], report["mlp"][cell], strict=True)] for cell in cells]
    name = "layers that were active" if _measures(report) else "layers that ran"
    notes = {each: [values[cell] for cell in cells] for each, values in report["notes"].items()}
    found = {**notes, name: ran} if note else {name: ran, **notes}
    return [_view(each, [list(row) for row in zip(*values, strict=True)], "layer") for each, values in found.items()]


def _view(name: str, rows: list[list[float | None]], by: str) -> dict[str, Any]:
    """Return the values of each token: over all layers or passes, and of each single one."""
    values = np.array(rows, dtype=float)  # [layers or passes, tokens]
    known = np.isfinite(values)
    mean = np.divide(
        np.where(known, values, 0).sum(0), known.sum(0), where=known.any(0), out=np.full(values.shape[1], np.nan)
    )
    frames = [{"label": f"all {by}{'es' if by == 'pass' else 's'}", "values": mean.tolist()}]
    frames += [{"label": f"{by} {number}", "values": row} for number, row in enumerate(rows)]
    return finite({"name": name, "frames": frames, "least": min(0.0, np.nanmin(values)), "most": np.nanmax(values)})


def png(image: np.ndarray) -> str:
    """Encode an image as a data URL.

    Args:
        image: RGB values [height, width, 3].
    """
    drawn = require("PIL.Image", "vision", "drawing images").fromarray(image)
    drawn.thumbnail((MAX_PIXELS, MAX_PIXELS))
    drawn.save(written := BytesIO(), format="PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def _measures(report: dict[str, Any]) -> bool:
    return bool(report["policy"] == "l2 adaptive computation")


def _verdict(report: dict[str, Any], note: str, shares: dict[str, float]) -> str:
    name = report["model"]["name"]
    if note:
        each = ", ".join(f"{number(share)} on {NAMES[phase]}" for phase, share in shares.items())
        return f"All of {name}'s layers ran; {note} in a layer: {each}."
    (phase, share), *others = report["usage"].items()
    were = "were active" if _measures(report) else "ran"
    rest = "".join(f", {100 * other:.0f} % on {NAMES[each]}" for each, other in others)
    return f"{100 * share:.0f} % of {name}'s layers {were} on {NAMES[phase]}{rest}."


def _distinguishing(report: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the reason that differs between tokens although all layers ran, such as experts, and its mean by phase.

    Empty if the layers differ, or the policy gave no reason.
    """
    if "passes" in report or not report["notes"] or min(report["usage"].values()) < 1:
        return "", {}
    note, values = next(iter(report["notes"].items()))
    values_of: dict[str, list[float]] = {phase: [] for phase in report["usage"]}
    for token, row in zip(report["tokens"], values, strict=True):
        values_of[token["phase"]] += [each for each in row if each is not None]
    return note, {phase: fmean(each) for phase, each in values_of.items() if each}
