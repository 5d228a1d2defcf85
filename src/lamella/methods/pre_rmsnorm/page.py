"""Summary of a rewrite: the changed modules, the change in parameters, and the numerical error."""

from __future__ import annotations

from typing import Any

from lamella.result import Summary, Table
from lamella.results import Edit, Evidence
from lamella.runtime import EditEvidence

NORMS = {"rms": "RMSNorm", "crms": "CRMSNorm"}
FOLDED = {"nothing": "nothing", "bias": "the bias", "affine": "gain and bias"}


def summary(evidence: Evidence) -> Summary:
    """Return the verdict and the tables."""
    assert isinstance(evidence, EditEvidence)
    found, name = evidence.findings, (evidence.model or {}).get("name", "the model")
    form, error = found["form"], found["error"]["float64"]
    relative = error["largest"] / error["size"] if error["size"] else 0.0
    difference = f"differ by {relative:.1g} of the largest output" if relative else "are equal"
    verdict = f"{name} has {NORMS[form['norm']]} now and computes the same function: in float64, outputs {difference}."
    tables = [_changed(found), _errors(found), *([_means(found)] if "after" in found["mean"] else [])]
    return Summary(verdict, [*tables, *Edit.summary(evidence).tables])


def _changed(found: dict[str, Any]) -> Table:
    form, tied = found["form"], found["tied"]
    rows: list[list[Any]] = [
        ["norms replaced", len(found["norms"])],
        ["modules that write to the residual stream, recentred", len(found["recentred"])],
        *([["scaling vectors folded into the modules before them", len(found["scales"])]] if found["scales"] else []),
        ["recentring hooks at the start of the residual stream", len(found["entrances"])],
        ["projections that read the residual stream", len(found["readers"])],
        ["folded into these projections", FOLDED[form["fold"]]],
        ["embedding and head", _tie(tied)],
        ["parameters before", found["parameters"]["before"]],
        ["change in parameters", found["parameters"]["delta"]],
    ]
    return Table("Changes", ["", ""], rows)


def _tie(tied: dict[str, bool]) -> str:
    if not tied["before"]:
        return "not tied"
    return "one tensor, recentred after the lookup" if tied["after"] else "untied"


def _errors(found: dict[str, Any]) -> Table:
    rows = [[name, each["largest"], each["size"]] for name, each in found["error"].items()]
    return Table("Difference on random inputs", ["precision", "largest difference", "largest output"], rows)


def _means(found: dict[str, Any]) -> Table:
    before, after = found["mean"]["before"], found["mean"]["after"]
    rows = [[name, max(before[name]), max(after[name])] for name in before]
    return Table("Largest |mean| / rms of the residual stream before a layer", ["stack", "before", "after"], rows)
