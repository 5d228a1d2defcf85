"""Page of a healed model: fidelity before and after, the loss on every text, corrections, and the selected samples."""

from __future__ import annotations

from lamella.formatting import number
from lamella.report.figures import Figure
from lamella.report.healing import corrections, training
from lamella.result import Evidence, Summary, Table
from lamella.runtime.edit import fidelity_table
from lamella.train import TrainedEvidence


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the loss by step.

    Args:
        evidence: the evidence of the training.
    """
    assert isinstance(evidence, TrainedEvidence)
    return [training(evidence.curve)]


def summary(evidence: Evidence) -> Summary:
    """Summarise the model before and after training, in a sentence and tables.

    Args:
        evidence: the evidence of the training.
    """
    assert isinstance(evidence, TrainedEvidence)
    name = (evidence.model or {}).get("name", "the model")
    recipe, lines = evidence.findings["recipe"], []
    verdict = f"{recipe} has {'corrected' if recipe == 'refit' else 'trained'} {name}."
    tables = []
    if evidence.fidelity and evidence.before:
        before, after = (each["perplexity"]["mean"] for each in (evidence.before, evidence.fidelity))
        verdict = f"{recipe} took {name} from perplexity {number(before)} to {number(after)}."
        tables.append(fidelity_table(evidence.fidelity, evidence.before))
    rows = [
        [f"{evidence.data[role]['data']} ({which})", evidence.held_out[0][which], evidence.held_out[-1][which]]
        for which, role in (("new", "training"), ("old", "replay"))
        if evidence.held_out and which in evidence.held_out[0]
    ]
    if rows:
        tables.append(Table("Held-out loss, nats per token", ["text", "before", "after"], rows))
    if gaps := evidence.findings.get("refit"):
        tables.append(corrections(gaps))
    if past := evidence.settings.get("replay"):
        lines.append(f"replayed: {past['fraction']:.0%} of every batch, from {evidence.data['replay']['data']}")
    if chosen := evidence.findings.get("selection"):
        rows = [[each["cluster"], each["size"], each["cds"], each["selected"]] for each in chosen["clusters"]]
        title = f"{chosen['budget']} of {chosen['pool']} samples, most of them from the most damaged clusters"
        tables.append(Table(title, ["cluster", "samples", "damage, nats", "selected"], rows))
        lines.append(f"{len(chosen['refused'])} samples were rejected, since they contradict selected ones")
    return Summary(verdict, tables, lines)
