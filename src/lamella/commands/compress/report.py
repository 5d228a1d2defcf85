"""The report of ``lamella compress``: what was removed, and its gains and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella import formatting
from lamella.commands.compress import tasks, tradeoff
from lamella.evaluate.confidence import guarantee
from lamella.report.drawing import STRIPED, StackDrawing, shade
from lamella.report.figures import Figure, Points, Scatter
from lamella.report.healing import ROWS, corrections, training
from lamella.report.page import finite, render_page

COSTS = (
    ("parameters", "parameters", formatting.count),
    ("sublayers", "sublayers per generated token", formatting.count),
    ("macs", "multiply-accumulates per token", formatting.count),
    ("bytes_per_token", "bytes read per token", formatting.size),
    ("kv_bytes_per_token", "cache per token", formatting.size),
)
SCORES = (
    ("removed_alone", "Removed alone", "change of the output (JSD, nats) when only this sublayer is removed"),
    ("sublayer_influence", "Sublayer influence", "rotation of the residual stream by this sublayer (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "rotation of the residual stream by the whole layer (1 − cosine)"),  # noqa: RUF001
)


TIMES = "\u00d7"
AXES = {  # label and unit of the x axis
    "measured": ("measured decode speed-up", TIMES),
    "predicted": ("predicted decode speed-up", TIMES),
    "sublayers": ("sublayers removed", ""),
}
MEASURES = {"kl": "KL from the original, nats", "perplexity": "perplexity"}


def render(evidence: dict[str, Any]) -> str:
    """Render the page ``report.html``: one file that needs no network.

    Args:
        evidence: the evidence of ``lamella compress``, schema ``lamella.evidence/2``.
    """
    evidence = finite(evidence)
    base, chosen = evidence["base"], evidence["chosen"]
    layers = evidence["layers"]
    scores = evidence.get("scores", {})
    shades = [found for score in SCORES for found in shade(*score, scores.get(score[0]), len(layers))]
    title = f"the layers of {evidence['model']['name']}"
    stack = StackDrawing(layers, shades, scores.get("removal_order", ()), title=title)
    figures = curves(evidence) | {"stack": stack, "speed": speed(evidence), "routes": tradeoff.figure(evidence)}
    if "healing" in evidence:
        figures["training"] = training(evidence["healing"]["curve"])
    return render_page(
        Path(__file__).with_name("report.html"),
        figures,
        evidence=evidence,
        verdict=verdict(evidence),
        guaranteed=guaranteed(evidence),
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
        reason=tradeoff.reason(evidence),
        routes=tradeoff.rows(evidence),
        route_columns=tradeoff.columns(evidence),
        route_notes=tradeoff.notes(evidence),
        axes=_axes(evidence),
        facts=_facts(evidence),
        rows=ROWS,
        corrections=corrections,
        phased=any(sublayer in STRIPED for layer in layers for sublayer in layer.values()),
        deciding=any(sublayer == "some" for layer in layers for sublayer in layer.values()),
    )


def _facts(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how the model was made, for the provenance."""
    chosen = evidence["chosen"]
    options = ", ".join(f"{name} {value}" for name, value in evidence["options"].items())
    quantised = evidence.get("quantised", {})
    output = quantised.get("output") or f"not written: {quantised.get('refused')}"
    return [
        ("model", f"{evidence['model']['name']} ({evidence['model']['family']}, {evidence['model']['layers']} layers)"),
        ("method", f"{chosen['method']}, plan {chosen['point']} of its series" + (f"; {options}" if options else "")),
        ("export", f"{chosen['form']} checkpoint"),
        ("removed", ", ".join(chosen["drop"]) or "nothing on every token"),
        *([(quantised["form"], output)] if quantised else []),
    ]


def gone(evidence: dict[str, Any]) -> int:
    """Return how many sublayers a generated token skips.

    Args:
        evidence: the evidence of the compression.
    """
    return sum(state != "kept" for layer in evidence["layers"] for state in layer.values())


def fate(evidence: dict[str, Any]) -> str:
    """Describe what happens to the sublayers that are not kept.

    Args:
        evidence: the evidence of the compression.
    """
    states = {state for layer in evidence["layers"] for state in layer.values()}
    if "some" in states:
        return "skipped on some generated tokens"
    return "skipped on generated tokens" if "prompt" in states else "removed"


def narrower(evidence: dict[str, Any]) -> str:
    """Describe the axes that are narrower than in the original; empty if there are none.

    Args:
        evidence: the evidence of the compression.
    """
    return str(evidence["chosen"].get("narrower", ""))


def verdict(evidence: dict[str, Any]) -> str:
    """Return the sentence at the top of the page and of the model card.

    Args:
        evidence: the evidence of the compression.
    """
    chosen, fidelity = evidence["chosen"], evidence["chosen"]["fidelity"]
    changes = [f"narrower layers ({narrower(evidence)})"] if narrower(evidence) else []
    if chosen["quantised"]:
        changes.append(f"{'4' if chosen['quantised'] == 'q4_k_m' else '8'}-bit weights")
    if gone(evidence) or not changes:
        changes.append(f"{gone(evidence)} of {sum(map(len, evidence['layers']))} sublayers {fate(evidence)}")
    speed = formatting.ratio(chosen["timings"][0]["decode_speedup"]["median"])
    before, after = (formatting.number(fidelity[name]["mean"]) for name in ("base_perplexity", "perplexity"))
    where = "" if evidence["runtime"]["name"] == "torch" else f" in {evidence['runtime']['name']}"
    healed = ""
    if "healing" in evidence:
        healed = f", and after healing to {formatting.number(evidence['healing']['fidelity']['perplexity']['mean'])}"
    return (
        f"{evidence['model']['name']} now generates text with a speed-up of {speed}{where}, "
        f"with {' and '.join(changes)}; "
        f"perplexity goes from {before} to {after}{healed}."
    )


def guaranteed(evidence: dict[str, Any]) -> str:
    """Return the sentence on the agreement with the original; empty if its bounds were not measured.

    Args:
        evidence: the evidence of the compression.
    """
    return guarantee(evidence["agreement"]) if evidence.get("agreement") else ""


def _share(before: float, after: float) -> float:
    """Return the remaining share in percent, for a bar."""
    return round(min(100 * after / before, 100), 2) if before else 0.0


def _memory(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return peak memory as bars on one scale; either model may be unmeasured."""
    rows = [{"name": name, **memory} for name, memory in (("original", before), ("changed", after)) if memory]
    most = max((row["peak_bytes"] for row in rows), default=0)
    return [row | {"share": _share(most, row["peak_bytes"])} for row in rows]


def curves(evidence: dict[str, Any]) -> dict[str, Figure]:
    """Plot fidelity against compression: a figure for each measure of fidelity and each axis, such as ``kl-measured``.

    Args:
        evidence: the evidence of the compression.
    """
    every = [point["fidelity"]["perplexity"]["mean"] for curve in evidence["curves"] for point in curve["points"]]
    positive = [value for value in every if value is not None and value > 0]
    figures: dict[str, Figure] = {}
    for axis, _ in _axes(evidence):
        title, suffix = AXES[axis]
        target = {} if axis == "sublayers" else tradeoff.target(evidence)
        for measure, label in MEASURES.items():
            figures[f"{measure}-{axis}"] = Scatter(
                title,
                label,
                _front(evidence, measure, axis) | _curves(evidence, measure, axis),
                guides=target,
                suffix=suffix,
                from_zero=measure == "kl",
                log_y=measure == "perplexity" and bool(positive) and max(positive) > 20 * min(positive),
                title=label,
            )
    return figures


def _curves(evidence: dict[str, Any], measure: str, axis: str) -> dict[str, Points]:
    """Return one curve per method, from the unchanged model down, and a ring around the chosen point."""
    series, chosen = {}, {}
    for curve in evidence["curves"]:
        found = [
            each for each in curve["points"] if _coordinate(each, axis) is not None and _mean(each, measure) is not None
        ]
        found = sorted(found, key=lambda each: _coordinate(each, axis))
        at = [(_coordinate(each, axis), _mean(each, measure)) for each in found]
        errors = [each["fidelity"][measure]["error"] or 0.0 for each in found]
        series[curve["method"]] = Points(
            at,
            joined=True,
            dashed=curve["baseline"],
            x_range=[(each["measured_speedup"]["low"], each["measured_speedup"]["high"]) for each in found]
            if axis == "measured"
            else (),
            y_range=[(mean - error, mean + error) for (_, mean), error in zip(at, errors, strict=True)],
            hover=[_hover(curve, each, measure) for each in found],
        )
        if curve["method"] == evidence["chosen"]["route"]:
            rings = [point for point, each in zip(at, found, strict=True) if each["chosen"]]
            chosen = {"chosen plan": Points(rings, mark="ring")}
    return series | chosen


def _front(evidence: dict[str, Any], measure: str, axis: str) -> dict[str, Points]:
    """Return the Pareto front, if several methods are compared at equal speed."""
    if axis != "measured" or len(evidence["curves"]) < 2:
        return {}
    points = [point for curve in evidence["curves"] for point in curve["points"] if point["pareto"]]
    known = [(_coordinate(each, axis), _mean(each, measure)) for each in points]
    front = sorted((x, y) for x, y in known if x is not None and y is not None)
    return {"Pareto front": Points(front, mark="band")} if len(front) > 1 else {}


def _coordinate(point: dict[str, Any], axis: str) -> Any:
    """Return the coordinate of a point on an axis; None if its speed was not measured."""
    if axis == "measured":
        return point["measured_speedup"] and point["measured_speedup"]["median"]
    return point["sublayers_removed"] if axis == "sublayers" else point["predicted_speedup"]


def _mean(point: dict[str, Any], measure: str) -> Any:
    return point["fidelity"][measure]["mean"]


def _hover(curve: dict[str, Any], point: dict[str, Any], measure: str) -> str:
    """Return the tooltip of a point."""
    measured, predicted = point["measured_speedup"], formatting.ratio(point["predicted_speedup"])
    lines = [
        f"{curve['method']}, {point['sublayers_removed']} sublayers removed{', chosen' if point['chosen'] else ''}",
        f"{MEASURES[measure]}: {formatting.estimate(point['fidelity'][measure])}",
        f"same top token: {formatting.percent(point['fidelity']['top1']['mean'])}",
        f"speed-up: {formatting.ratio(measured and measured['median'])} measured, {predicted} predicted",
    ]
    return "\n".join(lines)


def _axes(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the axes of the curves: methods are compared at equal speed, so measured speed comes first."""
    axes = [("sublayers", "Sublayers removed"), ("predicted", "Predicted speed-up")]
    if any(point["measured_speedup"] for curve in evidence["curves"] for point in curve["points"]):
        axes.insert(0, ("measured", "Measured speed-up"))
    return axes


def speed(evidence: dict[str, Any]) -> Scatter:
    """Plot measured speed-ups with their quartiles; the cost model predicts only decoding at batch 1.

    Args:
        evidence: the evidence of the compression.
    """
    names: list[str] = []
    measured, quartiles, predicted = [], [], []
    for timing in evidence["chosen"]["timings"]:
        for phase in ("decode", "prefill"):
            found = timing[f"{phase}_speedup"]
            if phase == "decode" and timing["batch"] == 1:
                predicted.append((evidence["chosen"]["predicted_speedup"], float(len(names))))
            measured.append((found["median"], float(len(names))))
            quartiles.append((found["low"], found["high"]))
            names.append(f"{phase}, batch {timing['batch']}")
    hover = [
        f"{name}: {formatting.ratio(x)}, quartiles {low:.2f} to {high:.2f}"
        for name, (x, _), (low, high) in zip(names, measured, quartiles, strict=True)
    ]
    series = {
        "measured": Points(measured, x_range=quartiles, hover=hover),
        "cost model": Points(predicted, mark="diamond"),
    }
    guides = {"original": 1.0} | tradeoff.target(evidence)
    return Scatter("speed-up over the original", "", series, rows=names, guides=guides, suffix=TIMES,
                   title="Speed-up over the original")  # fmt: skip


def _chosen_points(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chosen plan of every method, the closest to the original first."""
    rows = []
    for curve in evidence["curves"]:
        for point in curve["points"]:
            if point["chosen"]:
                best = curve["method"] == evidence["chosen"]["route"]
                rows.append({"curve": curve, "point": point, "best": best})
    return sorted(rows, key=lambda row: (not row["best"], row["point"]["fidelity"]["kl"]["mean"]))


def _tails(base: str, changed: str) -> dict[str, str]:
    """Split two answers into their common beginning and the rest of each."""
    ours, theirs = base.split(" "), changed.split(" ")
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        same = min(len(ours), len(theirs))
    common = " ".join(ours[:same]) + (" " if same else "")
    return {"common": common, "base_tail": " ".join(ours[same:]), "changed_tail": " ".join(theirs[same:])}
