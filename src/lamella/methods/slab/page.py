"""From evidence to which norms are folded, and what became of the network."""

from __future__ import annotations

from typing import Any

from lamella.formatting import counted, number, percent
from lamella.report.figures import Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Edit, Evidence, Trained
from lamella.results.page import curves
from lamella.train import TrainedEvidence

STAGES = {"trained": "after training", "refreshed": "with new statistics", "merged": "with the norms folded"}


def summary(evidence: Evidence) -> Summary:
    """What is folded, for any command of the method."""
    found = evidence.findings
    if "accuracy" in found:
        return _seen(found)
    name = (evidence.model or {}).get("name", "the model")
    if isinstance(evidence, TrainedEvidence):
        told = Trained.summary(evidence)
        sites = counted(len(found["sites"]), "norm")
        verdict = f"Trained, and then folded into what reads them: {sites} of {name}."
        return Summary(verdict, told.tables, [*told.lines, *_kept(found)])
    rows = [[each["site"], each["varies"], "folded" if each["folded"] else ""] for each in found["norms"]]
    folded = sum(each["folded"] for each in found["norms"])
    verdict = f"Folded into what reads them: {folded} of {counted(len(rows), 'norm')} of {name}."
    table = Table("How much the RMS of tokens varies at each norm", ["norm", "variation", ""], rows)
    return Summary(verdict, [table, *Edit.summary(evidence).tables], _kept(found))


def _kept(found: dict[str, Any]) -> list[str]:
    tied = counted(len(found["kept"]), "norm")
    return [f"not folded, since what reads it is tied to another weight: {tied}"] if found["kept"] else []


def _seen(found: dict[str, Any]) -> Summary:
    accuracy = found["accuracy"]
    rows = [[told, percent(accuracy[stage])] for stage, told in STAGES.items() if stage in accuracy]
    named = percent(accuracy.get("merged", accuracy["trained"]))
    verdict = f"A network of {counted(found['parameters'], 'parameter')} names {named} of the kept images."
    lines = [f"folding the norms moves outputs by up to {number(accuracy['moved'])}"] if "moved" in accuracy else []
    return Summary(verdict, [Table("Kept images that are named", ["", "share"], rows)], lines)


def figures(evidence: Evidence) -> list[Figure]:
    """The losses of a training."""
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    return [Lines("point of the log", "loss", {"training": evidence.findings.get("loss", [])})]
