"""The routes that were measured, and why one was chosen, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting
from lamella.report.figures import Points, Scatter

COLUMNS = ("model", "weights", "decode speed-up", "KL, nats", "perplexity", "same top token")
LOOKUP = "on top, with prompt lookup"  # a column, if it was measured


def columns(evidence: dict[str, Any]) -> list[str]:
    """Return the columns of the table of routes.

    Args:
        evidence: the evidence of the compression.
    """
    return [*COLUMNS, *([LOOKUP] if _has_lookup(evidence) else [])]


def _has_lookup(evidence: dict[str, Any]) -> bool:
    return any("lookup" in each for each in evidence.get("routes", ()))


def rows(evidence: dict[str, Any]) -> list[list[str]]:
    """Return a row for each route.

    Args:
        evidence: the evidence of the compression.
    """
    return [
        [
            each["name"],
            formatting.size(each["bytes"]),
            _speed(each["decode_speedup"]),
            formatting.estimate(each["fidelity"]["kl"]),
            formatting.estimate(each["fidelity"]["perplexity"]),
            formatting.percent(each["fidelity"]["top1"]["mean"]),
            *([_speed(each.get("lookup", {}).get("speedup"))] if _has_lookup(evidence) else []),
        ]
        for each in evidence.get("routes", ())
    ]


def notes(evidence: dict[str, Any]) -> list[str]:
    """Describe the program, and what was run for each form.

    Args:
        evidence: the evidence of the compression.
    """
    runs = {each["form"]: each["run"] for each in evidence.get("routes", ()) if each["form"]}
    return [*where(evidence), *(f"{form}: {run}." for form, run in runs.items()), *lookup(evidence)]


def lookup(evidence: dict[str, Any]) -> list[str]:
    """Return the sentence on what prompt lookup gains on top of the result, if it gains anything.

    Args:
        evidence: the evidence of the compression.
    """
    model = "healed" if "healing" in evidence else "cut" if evidence["chosen"]["cut"] else "original"
    name = ", ".join(filter(None, [model, evidence["chosen"]["quantised"]]))
    found = next((each.get("lookup") for each in evidence.get("routes", ()) if each["name"] == name), None)
    if found is None or found["speedup"]["median"] <= 1:
        return []
    answers, equal, tied = len(found["texts"]), found["equal"], found["tied"]
    lost = "nothing lost"
    if equal < answers:
        lost = f"{equal} of {answers} answers equal those of plain greedy decoding (differing after a tie: {tied}"
        lost += f", without one: {answers - equal - tied})" if equal + tied < answers else ")"
    return [
        f"With prompt lookup, generate(..., prompt_lookup_num_tokens={found['candidates']}): "
        f"{formatting.ratio(found['speedup']['median'])} on top on {', '.join(found['texts'])}, {lost}."
    ]


def where(evidence: dict[str, Any]) -> list[str]:
    """Return the sentence on how another program than torch was measured, if one was.

    Args:
        evidence: the evidence of the compression.
    """
    runtime = evidence["runtime"]
    if runtime["name"] == "torch":
        return []
    threads = f"{runtime['threads']} thread{'' if runtime['threads'] == 1 else 's'}"
    return [
        f"Speed is that of {runtime['name']} ({runtime['version']}) on {threads}, and speed-ups are relative to the "
        f"original as a {runtime['reference']} file."
    ]


def figure(evidence: dict[str, Any]) -> Scatter:
    """Plot fidelity against speed, with areas proportional to weights, for models whose speed was measured.

    Args:
        evidence: the evidence of the compression.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    timed = [each for each in evidence.get("routes", ()) if each["decode_speedup"]]
    for each in timed:
        groups.setdefault("quantised" if each["form"] else "not quantised", []).append(each)
    front = sorted(_place(each) for each in timed if each["pareto"])
    series = {"Pareto front": Points(front, mark="band")} if len(front) > 1 else {}
    return Scatter(
        f"decode speed-up over the original, in {evidence['runtime']['name']}",
        "KL from the original, nats",
        series | {name: _points(models) for name, models in groups.items()},
        guides=target(evidence),
        suffix="\u00d7",
    )


def target(evidence: dict[str, Any]) -> dict[str, float]:
    """Return the guide of a speed axis at the target; empty if the goal is no speed-up.

    Args:
        evidence: the evidence of the compression.
    """
    goal = evidence["goal"]
    return {"target": goal["value"]} if goal["name"] == "speedup" else {}


def reason(evidence: dict[str, Any]) -> str:
    """Say in one sentence why this route was chosen; empty if quantisation was not allowed.

    Args:
        evidence: the evidence of the compression.
    """
    chosen, goal = evidence["chosen"], evidence["goal"]
    others = dict(chosen["alternatives"])
    cut = others.pop("cut", None)
    if not others:
        return ""
    fastest = max(others, key=lambda form: float(others[form]["speedup"]))
    form = fastest if chosen["cut"] or goal["name"] == "loss" else chosen["quantised"]
    alone = others[form]
    speed, weights = formatting.ratio(alone["speedup"]), formatting.size(alone["weights"])
    found = f"reaches {speed} with {weights} of weights and costs {alone['kl']:.2g} nats"
    if goal["name"] == "loss":
        return f"{chosen['route']} is the fastest measured route to {goal['text']}; {form} alone {found}."
    if chosen["cut"]:
        return f"A cut is needed for {goal['text']}: {form} alone {found}."
    other = "" if cut is None else f"; a cut alone would cost {cut['kl']:.2g}"
    return f"{form} alone is enough for {goal['text']}: it {found}{other}."


def _place(route: dict[str, Any]) -> tuple[float, float]:
    """Return speed-up and KL divergence of a route."""
    return route["decode_speedup"]["median"], route["fidelity"]["kl"]["mean"]


def _points(models: list[dict[str, Any]]) -> Points:
    kl = [each["fidelity"]["kl"] for each in models]
    speeds = [each["decode_speedup"] for each in models]
    return Points(
        [_place(each) for each in models],
        x_range=[(speed["low"], speed["high"]) for speed in speeds],
        y_range=[(each["mean"] - (each["error"] or 0.0), each["mean"] + (each["error"] or 0.0)) for each in kl],
        sizes=[each["bytes"] for each in models],
        labels=[each["name"] for each in models],
        hover=[
            f"{each['name']}\n{_speed(each['decode_speedup'])}, KL {formatting.estimate(each['fidelity']['kl'])}\n"
            f"weights: {formatting.size(each['bytes'])}"
            for each in models
        ],
    )


def _speed(speed: dict[str, float] | None) -> str:
    return formatting.MISSING if speed is None else f"{formatting.ratio(speed['median'])} ({formatting.spread(speed)})"
