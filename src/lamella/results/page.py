"""The documents of a result, made only from its evidence: the page and the model card."""

from __future__ import annotations

from collections.abc import Iterable

from lamella.report.figures import Figure, Lines, named
from lamella.report.page import finite, render_page
from lamella.result import Evidence, Summary, Table
from lamella.train import TrainedEvidence


def render(evidence: Evidence, summary: Summary, figures: Iterable[Figure] = ()) -> str:
    """Return the page of a result: one self-contained file.

    Args:
        evidence: the evidence of the result.
        summary: the summary of the evidence.
        figures: the method's figures; those without data are omitted.

    Raises:
        LamellaError: if plotly or jinja2 is missing.
    """
    document = finite(evidence.model_dump(by_alias=True))
    return render_page("result.html", named(figures), evidence=document, summary=summary)


def card(evidence: Evidence, summary: Summary, title: str) -> str:
    """Return the ``README.md`` of a folder: what was done, the results, and how to reproduce them.

    Args:
        evidence: the evidence of the result.
        summary: the summary of the evidence.
        title: title of the method.
    """
    name = (evidence.model or {}).get("name")
    heading = f"{name}, by {evidence.method}" if name else evidence.method
    options = ", ".join(f"{name}={value}" for name, value in evidence.provenance.get("options", {}).items())
    return "\n\n".join(
        [
            f"# {inline(heading)}",
            inline(title),
            inline(summary.verdict),
            *(f"## {inline(table.title)}\n\n{markdown(table)}" for table in summary.tables),
            *map(inline, summary.lines),
            *(f"Note: {inline(note)}" for note in evidence.notes),
            f"`{evidence.method}` of Lamella {evidence.provenance['version']}; "
            f"options: {inline(options) or 'defaults'}. "
            "`evidence.json` has every measurement, `report.html` shows them.",
        ]
    )


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    rows = [table.headers, ["---"] * len(table.columns), *table.cells]
    return "\n".join(f"| {' | '.join(map(inline, row))} |" for row in rows)


def inline(text: str) -> str:
    """Return a text escaped for one line of Markdown."""
    text = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "|<>[]`*\\" else c for c in text)


def curves(evidence: Evidence) -> Lines:
    """Return the figure of the training losses by point of the log."""
    assert isinstance(evidence, TrainedEvidence)
    return Lines("point of the log", "loss, nats", {"training": [point["loss"] for point in evidence.curve]})
