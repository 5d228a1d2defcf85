"""The report of ``lamella compress``: what was cut, what it brought and what it cost."""

from __future__ import annotations

from typing import Any

from lamella import formatting
from lamella.report import tasks, variants
from lamella.report.drawing import STRIPED, drawing, shade
from lamella.report.healing import ROWS, training
from lamella.report.page import filled, finite

COSTS = (
    ("parameters", "parameters", formatting.count),
    ("sublayers", "sublayers a generated token runs", formatting.count),
    ("macs", "multiply-accumulates per token", formatting.count),
    ("bytes_per_token", "bytes read per token", formatting.size),
    ("kv_bytes_per_token", "cache per token", formatting.size),
)
SCORES = (
    ("removed_alone", "Removed alone", "how far the output moves (JSD, nats) when this sublayer alone is left out"),
    ("sublayer_influence", "Sublayer influence", "how far this sublayer turns the stream (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "how far the whole layer turns the stream (1 − cosine)"),  # noqa: RUF001
)


def render(evidence: dict[str, Any]) -> str:
    """The page ``report.html``: one file that needs no network.

    Args:
        evidence: as ``lamella compress`` writes it, schema ``lamella.evidence/1``.
    """
    evidence = finite(evidence)
    base, chosen = evidence["base"], evidence["chosen"]
    layers = evidence["layers"]
    scores = evidence.get("scores", {})
    shades = [found for score in SCORES for found in shade(*score, scores.get(score[0]), len(layers))]
    stack = drawing(layers, shades, scores.get("removal_order", ()))
    data = {
        "scores": stack["scores"],
        "curves": _curves(evidence),
        "speed": _speed(evidence),
        "target": evidence["target_speedup"],
        "variants": variants.points(evidence),
    }
    if "healing" in evidence:
        data["training"] = training(evidence["healing"]["curve"])
    return filled(
        "report.html",
        data,
        evidence=evidence,
        stack=stack,
        verdict=verdict(evidence),
        costs=[
            {
                "what": label,
                "before": unit(base["cost"][name]),
                "after": unit(chosen["cost"][name]),
                "change": formatting.change(base["cost"][name], chosen["cost"][name]),
                "share": _share(base["cost"][name], chosen["cost"][name]),
            }
            for name, label, unit in COSTS
        ],
        memory=_memory(base.get("memory"), chosen.get("memory")),
        timings=list(zip(base["timings"], chosen["timings"], strict=True)),
        samples=[sample | _tails(sample["base"], sample["changed"]) for sample in evidence.get("samples", ())],
        methods=_chosen_points(evidence),
        scores=tasks.rows(evidence),
        score_columns=tasks.columns(evidence) if evidence.get("tasks") else [],
        variants=variants.rows(evidence),
        variant_columns=variants.COLUMNS,
        variant_notes=variants.notes(evidence),
        axes=_axes(evidence),
        facts=_facts(evidence),
        rows=ROWS,
        phased=any(sublayer in STRIPED for layer in layers for sublayer in layer.values()),
        deciding=any(sublayer == "some" for layer in layers for sublayer in layer.values()),
    )


def _facts(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """How the model was made, for the provenance."""
    chosen = evidence["chosen"]
    options = ", ".join(f"{name} {value}" for name, value in evidence["options"].items())
    quantised = evidence.get("quantised", {})
    said = quantised.get("output") or f"not written: {quantised.get('refused')}"
    return [
        ("model", f"{evidence['model']['name']} ({evidence['model']['family']}, {evidence['model']['layers']} layers)"),
        ("method", f"{chosen['method']}, plan {chosen['point']} of its series" + (f"; {options}" if options else "")),
        ("export", f"{chosen['form']} checkpoint"),
        ("gone", ", ".join(chosen["drop"]) or "nothing on every token"),
        *([(quantised["form"], said)] if quantised else []),
    ]


def gone(evidence: dict[str, Any]) -> int:
    """How many sublayers a generated token does without."""
    return sum(state != "kept" for layer in evidence["layers"] for state in layer.values())


def fate(evidence: dict[str, Any]) -> str:
    """What became of the sublayers that are not kept."""
    states = {state for layer in evidence["layers"] for state in layer.values()}
    if "some" in states:
        return "skipped on some generated tokens"
    return "skipped on generated tokens" if "prompt" in states else "removed"


def narrower(evidence: dict[str, Any]) -> str:
    """What is left of each axis that is narrower than in the original; nothing where all are as wide."""
    return str(evidence["chosen"].get("narrower", ""))


def verdict(evidence: dict[str, Any]) -> str:
    """The one sentence at the top of the page and of the model card."""
    chosen, fidelity = evidence["chosen"], evidence["chosen"]["fidelity"]
    changes = [f"narrower layers ({narrower(evidence)})"] if narrower(evidence) else []
    if gone(evidence) or not changes:
        changes.append(f"{gone(evidence)} of {sum(map(len, evidence['layers']))} sublayers {fate(evidence)}")
    speed = formatting.ratio(chosen["timings"][0]["decode_speedup"]["median"])
    before, after = (formatting.number(fidelity[name]["mean"]) for name in ("base_perplexity", "perplexity"))
    healed = ""
    if "healing" in evidence:
        healed = f", and after healing to {formatting.number(evidence['healing']['fidelity']['perplexity']['mean'])}"
    return (
        f"{evidence['model']['name']} now generates {speed} as fast, with {' and '.join(changes)}; "
        f"perplexity goes from {before} to {after}{healed}."
    )


def _share(before: float, after: float) -> float:
    """What is left, in percent, for a bar."""
    return round(min(100 * after / before, 100), 2) if before else 0.0


def _memory(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Peak memory as bars on one scale; either model may be unmeasured."""
    rows = [{"name": name, **memory} for name, memory in (("original", before), ("changed", after)) if memory]
    most = max((row["peak_bytes"] for row in rows), default=0)
    return [row | {"share": _share(most, row["peak_bytes"])} for row in rows]


def _curves(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """One curve per method, its points from the whole model down."""
    curves = []
    for curve in evidence["curves"]:
        points = [
            {
                "sublayers": point["sublayers_removed"],
                "predicted": point["predicted_speedup"],
                "measured": point["measured_speedup"],
                "kl": point["fidelity"]["kl"],
                "perplexity": point["fidelity"]["perplexity"],
                "top1": point["fidelity"]["top1"]["mean"],
                "chosen": point["chosen"],
                "pareto": point["pareto"],
            }
            for point in sorted(curve["points"], key=lambda point: point["sublayers_removed"])
        ]
        best = curve["method"] == evidence["chosen"]["method"]
        curves.append({"name": curve["method"], "baseline": curve["baseline"], "best": best, "points": points})
    return curves


def _axes(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """What the curves can be drawn against: methods are compared at equal speed, so that comes first."""
    axes = [("sublayers", "Sublayers removed"), ("predicted", "Predicted speed-up")]
    if any(point["measured_speedup"] for curve in evidence["curves"] for point in curve["points"]):
        axes.insert(0, ("measured", "Measured speed-up"))
    return axes


def _speed(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured speed-ups with their spread; the cost model speaks of decoding at batch 1 only."""
    rows = []
    for timing in evidence["chosen"]["timings"]:
        for what in ("decode", "prefill"):
            modelled = what == "decode" and timing["batch"] == 1
            predicted = evidence["chosen"]["predicted_speedup"] if modelled else None
            name = f"{what}, batch {timing['batch']}"
            rows.append({"name": name, "measured": timing[f"{what}_speedup"], "predicted": predicted})
    return rows


def _chosen_points(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """Every method's answer to the target, the closest to the original first among those as fast."""
    rows = []
    for curve in evidence["curves"]:
        for point in curve["points"]:
            if point["chosen"]:
                best = curve["method"] == evidence["chosen"]["method"]
                rows.append({"curve": curve, "point": point, "best": best})
    return sorted(rows, key=lambda row: (not row["best"], row["point"]["fidelity"]["kl"]["mean"]))


def _tails(base: str, changed: str) -> dict[str, str]:
    """Where two answers part: the words they begin with in common, and what each goes on with."""
    ours, theirs = base.split(" "), changed.split(" ")
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        same = min(len(ours), len(theirs))
    common = " ".join(ours[:same]) + (" " if same else "")
    return {"common": common, "base_tail": " ".join(ours[same:]), "changed_tail": " ".join(theirs[same:])}
