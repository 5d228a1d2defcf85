"""From evidence to the report of a conversion: what was changed, what it cost, and how equal the result is."""

from __future__ import annotations

from typing import Any

from lamella.result import Summary, Table
from lamella.results import Edit, Evidence
from lamella.runtime import EditEvidence

NORMS = {"rms": "RMSNorm", "crms": "CRMSNorm"}
FOLDED = {"nothing": "nothing", "bias": "the bias", "affine": "gain and bias"}


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables."""
    assert isinstance(evidence, EditEvidence)
    found, name = evidence.findings, (evidence.model or {}).get("name", "the model")
    form, error = found["form"], found["error"]["float64"]
    share = error["largest"] / error["size"] if error["size"] else 0.0
    differ = f"differ by {share:.1g} of the largest" if share else "are equal"
    verdict = f"{name} has {NORMS[form['norm']]} now, and computes the same: in float64 outputs {differ}."
    tables = [_changed(found), _errors(found), *([_means(found)] if "after" in found["mean"] else [])]
    return Summary(verdict, [*tables, *Edit.summary(evidence).tables])


def _changed(found: dict[str, Any]) -> Table:
    form, tied = found["form"], found["tied"]
    rows: list[list[Any]] = [
        ["norms swapped", len(found["norms"])],
        ["writers of the stream recentred", len(found["recentred"])],
        *([["vectors folded into what they scale", len(found["scales"])]] if found["scales"] else []),
        ["places recentred where the stream begins", len(found["entrances"])],
        ["linear maps that read it", len(found["readers"])],
        ["folded into them", FOLDED[form["fold"]]],
        ["embedding and head", _tie(tied)],
        ["parameters before", found["parameters"]["before"]],
        ["parameters more or less", found["parameters"]["delta"]],
    ]
    return Table("What was changed", ["", ""], rows)


def _tie(tied: dict[str, bool]) -> str:
    if not tied["before"]:
        return "not tied"
    return "one tensor, recentred after the lookup" if tied["after"] else "untied"


def _errors(found: dict[str, Any]) -> Table:
    rows = [[name, each["largest"], each["size"]] for name, each in found["error"].items()]
    return Table("On random inputs", ["precision", "largest difference", "largest output"], rows)


def _means(found: dict[str, Any]) -> Table:
    before, after = found["mean"]["before"], found["mean"]["after"]
    rows = [[name, max(before[name]), max(after[name])] for name in before]
    return Table("Largest |mean| / rms of the stream before a layer", ["stack", "before", "after"], rows)
