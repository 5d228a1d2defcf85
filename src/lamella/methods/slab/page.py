"""Summary and figures: the folded norms, and the quality of the network."""

from __future__ import annotations

from typing import Any

from lamella.formatting import counted, number, percent
from lamella.report.figures import Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Edit, Evidence, Trained
from lamella.results.page import curves
from lamella.train import TrainedEvidence

STAGES = {"trained": "after training", "refreshed": "with refreshed statistics", "merged": "with the norms folded"}


def summary(evidence: Evidence) -> Summary:
    """Summarise the result of any command of the method."""
    found = evidence.findings
    if "accuracy" in found:
        return _vision(found)
    name = (evidence.model or {}).get("name", "the model")
    if isinstance(evidence, TrainedEvidence):
        trained = Trained.summary(evidence)
        sites = counted(len(found["sites"]), "norm")
        verdict = f"Trained, and then folded into the next layers: {sites} of {name}."
        return Summary(verdict, trained.tables, [*trained.lines, *_kept(found)])
    rows = [[each["site"], each["varies"], "folded" if each["folded"] else ""] for each in found["norms"]]
    folded = sum(each["folded"] for each in found["norms"])
    verdict = f"Folded into the next layers: {folded} of {counted(len(rows), 'norm')} of {name}."
    table = Table("Variation of the tokens' RMS at each norm", ["norm", "variation", ""], rows)
    return Summary(verdict, [table, *Edit.summary(evidence).tables], _kept(found))


def _kept(found: dict[str, Any]) -> list[str]:
    tied = counted(len(found["kept"]), "norm")
    return [f"not folded, since the next layer has a tied weight: {tied}"] if found["kept"] else []


def _vision(found: dict[str, Any]) -> Summary:
    accuracy = found["accuracy"]
    rows = [[label, percent(accuracy[stage])] for stage, label in STAGES.items() if stage in accuracy]
    correct = percent(accuracy.get("merged", accuracy["trained"]))
    size = counted(found["parameters"], "parameter")
    verdict = f"A network of {size} classifies {correct} of the held-out images correctly."
    lines = [f"folding the norms changes outputs by up to {number(accuracy['moved'])}"] if "moved" in accuracy else []
    return Summary(verdict, [Table("Accuracy on held-out images", ["", "accuracy"], rows)], lines)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the losses of a training."""
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    return [Lines("point of the log", "loss", {"training": evidence.findings.get("loss", [])})]
