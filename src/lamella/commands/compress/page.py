"""Page, model card and summary of a compression."""

from __future__ import annotations

from typing import Any

from lamella.commands.compress import tasks, tradeoff
from lamella.commands.compress.card import model_card
from lamella.commands.compress.report import guaranteed, render, verdict
from lamella.result import Evidence, Summary, Table


def document(evidence: Evidence) -> dict[str, Any]:
    """Return the evidence as a dictionary, without fields that were not measured.

    Args:
        evidence: the evidence of the compression.
    """
    found = {name: value for name, value in evidence.model_dump(by_alias=True).items() if value is not None}
    return found | {"options": found["chosen"]["options"], "seed": evidence.provenance.get("seed", 0)}


def page(evidence: Evidence) -> str:
    """Render the page ``report.html``.

    Args:
        evidence: the evidence of the compression.
    """
    return render(document(evidence))


def card(evidence: Evidence) -> str:
    """Render the model card ``README.md``.

    Args:
        evidence: the evidence of the compression.
    """
    return model_card(document(evidence))


def summary(evidence: Evidence) -> Summary:
    """Summarise gains and losses, and compare the planners if there are several.

    Args:
        evidence: the evidence of the compression.
    """
    found = document(evidence)
    tables = [_cost(found)]
    if scores := tasks.rows(found):
        tables.append(Table("Tasks, ± standard error", tasks.columns(found), scores))
    if models := tradeoff.rows(found):
        tables.append(Table("Routes", tradeoff.columns(found), models))
    if len(found["curves"]) > 1:
        tables.append(_methods(found))
    lines = [guaranteed(found)] if found.get("agreement") else []
    lines += tradeoff.lookup(found)
    if narrower := found["chosen"].get("narrower"):
        lines.append(f"remaining sizes: {narrower}")
    if quantised := found.get("quantised"):
        lines.append(f"{quantised['form']}: {quantised.get('output') or 'not written, ' + quantised['refused']}")
    return Summary(" ".join(filter(None, [tradeoff.reason(found), verdict(found)])), tables, lines)


def _cost(found: dict[str, Any]) -> Table:
    """Return the table of the original and the result."""
    chosen, base = found["chosen"], found["base"]
    fidelity = chosen["fidelity"]
    whole = {"perplexity": f"{fidelity['base_perplexity']['mean']:.2f}"}
    rows: list[list[str]] = [
        ["parameters", f"{base['cost']['parameters'] / 1e6:.1f} M", f"{chosen['cost']['parameters'] / 1e6:.1f} M"],
        ["sublayers per token", f"{base['cost']['sublayers']:g}", f"{chosen['cost']['sublayers']:g}"],
        ["cache per token", f"{base['cost']['kv_bytes_per_token']} B", f"{chosen['cost']['kv_bytes_per_token']} B"],
        *([name, whole.get(name, ""), value] for name, value in _quality(fidelity).items()),
    ]
    for old, new in zip(base["timings"], chosen["timings"], strict=True):
        for what in ("decode", "prefill"):
            ratio = new[f"{what}_speedup"]
            seconds = "decode_seconds_per_step" if what == "decode" else "prefill_seconds"
            speed = f"{new[seconds] * 1e3:.1f} ms  ({ratio['median']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})"
            rows.append([f"{what}, batch {old['batch']}", f"{old[seconds] * 1e3:.1f} ms", speed])
    columns = ["", "original", "changed"]
    if "healing" in found:  # training changes what the model predicts, not its shape or speed
        columns = ["", "original", "cut", "healed"]
        healed = _quality(found["healing"]["fidelity"])
        rows = [[*row, healed.get(row[0], "")] for row in rows]
        for other in found["healing"]["unseen"]:
            kls = [f"{other['fidelity'][when]['kl']['mean']:.4f} nats" for when in ("cut", "healed")]
            rows.append([f"KL on {other['text']['data']}", "", *kls])
    title = f"{found['model']['name']} with {chosen['method']}: predicted {chosen['predicted_speedup']:.2f}x"
    return Table(title, columns, rows)


def _methods(found: dict[str, Any]) -> Table:
    """Return the table of the planners at the target."""
    rows = []
    for curve in found["curves"]:
        point = next(point for point in curve["points"] if point["chosen"])
        speed, fidelity = point["measured_speedup"], point["fidelity"]
        rows.append(
            [
                curve["method"],
                f"{point['sublayers_removed']:g}",
                f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})",
                f"{fidelity['kl']['mean']:.4f}",
                f"{fidelity['perplexity']['mean']:.2f}",
                f"{fidelity['top1']['mean']:.1%}",
                "yes" if point["pareto"] else "",
                f"{curve['seconds']:.0f} s",
            ]
        )
    columns = ["method", "sublayers removed", "decode speed-up", "KL", "perplexity", "same top", "Pareto", "search"]
    return Table(f"All routes to {found['goal']['text']}", columns, rows)


def _quality(fidelity: dict[str, Any]) -> dict[str, str]:
    return {
        "perplexity": f"{fidelity['perplexity']['mean']:.2f}",
        "same top token": f"{fidelity['top1']['mean']:.1%}",
        "KL from the original": f"{fidelity['kl']['mean']:.4f} nats",
    }
