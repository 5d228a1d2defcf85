"""Summaries and figures: losses, the anchor by epoch and by layer, and retention against gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import percent, share
from lamella.report.figures import Figure, Lines, Scatter
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained
from lamella.train import TrainedEvidence

PRECISIONS = "bleu1_precision"
COLUMNS = ("rouge1", "rouge2", "rougeL", "bleu", PRECISIONS, "length", "distinct")


def summary(evidence: Evidence) -> Summary:
    """Return the verdict and tables of any command of the method."""
    found, trained = evidence.findings, Trained.summary(evidence)
    name = (evidence.model or {}).get("name", "the model")
    tables = [*trained.tables]
    if "scores" in found:
        tables.insert(0, _scores(found["scores"]))
    if "epochs" in found:
        tables += [_epochs(found["epochs"]), _layers(found)]
        verdict = f"{name} was trained to summarise, anchored to its gap-sentence solution."
    elif "parameters" in found:
        sizes = found["parameters"]
        tables.append(Table("Parameters", ["", ""], [[who, count] for who, count in sizes.items()]))
        size = percent(share(sizes["student"], sizes["teacher"]))
        verdict = f"A student with {size} of the parameters of {name} was distilled from it."
    else:
        rows = [[site, mass] for site, mass in found["importance"]["sums"].items()]
        tables.append(Table("Fisher information: sum of F", ["layer", "sum of F"], rows))
        verdict = f"{name} was trained on gap sentences."
    return Summary(verdict, tables, trained.lines)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    texts = next(iter(scores.values()))["texts"]
    heads = ["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "word precision", "length", "distinct"]
    title = f"Scores of {texts} summaries of test pairs; word precision (BLEU-1) is not BLEU"
    return Table(title, heads, [[who, *(each[name] for name in COLUMNS)] for who, each in scores.items()])


def _epochs(rows: list[dict[str, Any]]) -> Table:
    heads = ["epoch", "lambda", "task loss", "penalty", "gradient norm of anchor / task"]
    return Table("By epoch", heads, [[row["epoch"], row["lambda"], row["task"], row["penalty"], row["ratio"]]
                                     for row in rows])  # fmt: skip


def _layers(found: Mapping[str, Any]) -> Table:
    last, sums = found["epochs"][-1]["sites"], found["importance"]["sums"]
    rows = [[site, sums[site], each["drift"], each["penalty"]] for site, each in last.items()]
    return Table("By layer, at the end", ["layer", "sum of F", "drift", "penalty"], rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Return the losses; for the main command also the drift of layers, and retention against gain."""
    assert isinstance(evidence, TrainedEvidence)
    found = evidence.findings
    lines = {"training": [(point["step"], point.get("task", point["loss"])) for point in evidence.curve]}
    watched = found.get("held_out_losses") or [
        {"step": point["step"], "held-out": point["loss"]} for point in evidence.held_out
    ]
    for name in (name for name in (watched[0] if watched else {}) if name != "step"):
        lines[f"held-out: {name}" if "held_out_losses" in found else name] = [(e["step"], e[name]) for e in watched]
    panels: list[Figure] = [Scatter("step", "loss (nats per token)", lines, joined=True)]
    if found.get("gap losses"):
        points = [(point["step"], point["loss"]) for point in found["gap losses"]]
        gap = {"gap sentences, training": points}
        panels.insert(0, Scatter("step of the gap-sentence training", "loss (nats per token)", gap, joined=True))
    if "epochs" in found:
        kept = [(each["summaries"], each["gap sentences"] - watched[0]["gap sentences"]) for each in watched]
        gained = "held-out loss of summaries (nats)"
        rise = "increase of the gap-sentence loss (nats)"
        panels += [_drift(found["epochs"]), Scatter(gained, rise, {"by epoch": kept}, joined=True)]
    return panels


def _drift(rows: list[dict[str, Any]]) -> Lines:
    """Plot the drift of each layer after the first, the middle and the last epoch."""
    shown = {row["epoch"]: row for row in (rows[0], rows[len(rows) // 2], rows[-1])}
    lines = {f"after epoch {epoch}": [site["drift"] for site in row["sites"].values()] for epoch, row in shown.items()}
    return Lines("layer (in the order of the table)", "drift from the gap-sentence solution", lines)
