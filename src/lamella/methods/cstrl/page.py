"""What a run says: losses, what the anchor did by epoch and by layer, and what was kept for what was gained."""

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
    """The verdict in words and tables, for any command of the method."""
    found, told = evidence.findings, Trained.summary(evidence)
    name = (evidence.model or {}).get("name", "the model")
    tables = [*told.tables]
    if "scores" in found:
        tables.insert(0, _scores(found["scores"]))
    if "epochs" in found:
        tables += [_epochs(found["epochs"]), _layers(found)]
        verdict = f"{name} has learnt to summarise, held where gap sentences had left it."
    elif "parameters" in found:
        sizes = found["parameters"]
        tables.append(Table("Parameters", ["", ""], [[who, count] for who, count in sizes.items()]))
        size = percent(share(sizes["student"], sizes["teacher"]))
        verdict = f"A student with {size} of the parameters of {name} has learnt from it."
    else:
        rows = [[site, mass] for site, mass in found["importance"]["sums"].items()]
        tables.append(Table("Importance, the sum of F", ["layer", "sum"], rows))
        verdict = f"{name} has learnt which sentences matter."
    return Summary(verdict, tables, told.lines)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    texts = next(iter(scores.values()))["texts"]
    heads = ["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "precision of words", "length", "different"]
    title = f"{texts} summaries of pairs that nothing was learnt from; the precision of words is no BLEU"
    return Table(title, heads, [[who, *(each[name] for name in COLUMNS)] for who, each in scores.items()])


def _epochs(rows: list[dict[str, Any]]) -> Table:
    heads = ["epoch", "lambda", "task loss", "penalty", "gradient of the anchor / of the task"]
    return Table("By epoch", heads, [[row["epoch"], row["lambda"], row["task"], row["penalty"], row["ratio"]]
                                     for row in rows])  # fmt: skip


def _layers(found: Mapping[str, Any]) -> Table:
    last, sums = found["epochs"][-1]["sites"], found["importance"]["sums"]
    rows = [[site, sums[site], each["drift"], each["penalty"]] for site, each in last.items()]
    return Table("By layer, at the end", ["layer", "sum of F", "drift", "penalty"], rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Losses; and of the main command the drift of layers, and what was kept for what was gained."""
    assert isinstance(evidence, TrainedEvidence)
    found = evidence.findings
    lines = {"training": [(point["step"], point.get("task", point["loss"])) for point in evidence.curve]}
    watched = found.get("watched") or [
        {"step": point["step"], "held out": point["loss"]} for point in evidence.held_out
    ]
    for name in (name for name in (watched[0] if watched else {}) if name != "step"):
        lines[f"held out: {name}" if "watched" in found else name] = [(each["step"], each[name]) for each in watched]
    drawn: list[Figure] = [Scatter("step", "loss, nats per token", lines, joined=True)]
    if found.get("gap curve"):
        points = [(point["step"], point["loss"]) for point in found["gap curve"]]
        gap = {"gap sentences, training": points}
        drawn.insert(0, Scatter("step of the gap sentences", "loss, nats per token", gap, joined=True))
    if "epochs" in found:
        kept = [(each["summaries"], each["gap sentences"] - watched[0]["gap sentences"]) for each in watched]
        gained = "held-out loss of summaries, nats: further left is more gained"
        rise = "rise of the loss of gap sentences, nats"
        drawn += [_drift(found["epochs"]), Scatter(gained, rise, {"by epoch": kept}, joined=True)]
    return drawn


def _drift(rows: list[dict[str, Any]]) -> Lines:
    """How far each layer has moved, after the first, the middle and the last epoch."""
    shown = {row["epoch"]: row for row in (rows[0], rows[len(rows) // 2], rows[-1])}
    lines = {f"after epoch {epoch}": [site["drift"] for site in row["sites"].values()] for epoch, row in shown.items()}
    return Lines("layer, in the order of the table", "drift from the gap-sentence solution", lines)
