"""What a model consists of, and what each means of making it smaller would save and cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt, MinLen

from lamella.commands.compress.forms import Form, Torch
from lamella.data import ImageText, Text
from lamella.errors import MethodError
from lamella.evaluate import FidelityTest
from lamella.formatting import counted, estimate, number, percent, ratio, share, size
from lamella.measure import angular_distance, block_influence
from lamella.plan import ModelReference, Plan
from lamella.plan.export import natural_form
from lamella.progress import track
from lamella.registry import command
from lamella.report.figures import Bars, Figure, Scatter
from lamella.result import Evidence, Summary, Table
from lamella.results import Study
from lamella.runtime import apply
from lamella.search import window
from lamella.signature import Settings, Split
from lamella.stack import Stack

TOKENS, CHANNELS = 0.5, 0.25  # shares of the vocabulary and of the MLPs' channels that are removed as examples
Share = Annotated[float, Gt(0), Lt(1)]


class Overview(Study):
    """The parts of a model, and what could be saved."""

    kind = "overview"

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise parts and savings in tables."""
        found = evidence.findings
        whole = sum(found["parts"].values())
        parts = [[name, size(value), percent(share(value, whole))] for name, value in found["parts"].items()]
        rows = [
            [
                each["name"],
                size(each["bytes"]),
                ratio(each["speedup"]),
                estimate(each["kl"]) if each["kl"] else "",
                each["how"],
            ]
            for each in found["savings"]
        ]
        text = (
            f"{found['model']} opens as {found['architecture']} with {counted(found['layers'], 'layer')}. "
            + _advice(found)
        )
        columns = ["without", "weights", "decode speed-up", "KL, nats", "how"]
        return Summary(
            text,
            [
                Table("Weights", ["part", "bytes", "share"], parts),
                Table("What each means saves, before healing", columns, rows),
            ],
        )


def _advice(found: dict[str, Any]) -> str:
    """Return what quantisation gains here, what the smallest cut costs, and the next command."""
    int8 = next((each for each in found["savings"] if each["name"] == "precision: int8"), None)
    cut = next(each for each in found["savings"] if each["kl"] is not None and each is not int8)
    gain = (
        ""
        if int8 is None
        else f"8-bit weights decode at {ratio(int8['speedup'])}, for {number(int8['kl']['mean'])} nats. "
    )
    return (
        f"{gain}Without {cut['name']} it would decode at {ratio(cut['speedup'])}, for {number(cut['kl']['mean'])} nats "
        f"before healing. Next: lamella compress {found['model']} --speedup 1.8."
    )


@command("overview", verb="overview", brief={"sequences": 2, "length": 16, "fractions": (0.2,)})
def overview(
    stack: Stack,
    calibration: Annotated[Text, Settings(sequences=4)],
    test: Annotated[Text | ImageText, Split("test")],
    *,
    fractions: Annotated[tuple[Share, ...], MinLen(1)] = (0.1, 0.2, 0.3),
) -> Overview:
    """Show what a model consists of, and what quantisation, fewer tokens, channels or layers would save and cost.

    Speed and loss of 8-bit weights are measured, as is the loss of removing layers: of the two cuts that single passes
    over a text suggest (block influence, angular distance), the better one. All other speeds are predicted by the cost
    model. The page can be sent to somebody who asks whether it is worth it.

    Example: lamella overview smollm2 -o overview

    Args:
        stack: a decoder; it is not changed.
        calibration: text on which layers are compared.
        test: another text, on which the loss is measured.
        fractions: fractions of all layers that are removed.

    Returns:
        Parts, and savings with their cost.

    Raises:
        MethodError: for a test on images.
    """
    if not isinstance(test, Text):
        raise MethodError("overview measures losses on a text: give a text as test, not images")
    plain, *quantised = Torch().forms(stack, True, True)
    fidelity = FidelityTest(stack, test.tokens)
    rows = [_row("nothing", plain, 1.0, None, "")]
    for form in quantised:
        rows.append(
            _row(
                f"precision: {form.name}", form, form.speedup.median, vars(fidelity.of(form.view(stack)).kl), "measured"
            )
        )
    parts = parts_of(stack)
    rows += _widths(plain, parts, len(stack))
    layers = len(stack)
    influence = np.argsort(block_influence(stack, calibration).values, kind="stable")
    angles = angular_distance(stack, calibration).values
    for count in track(sorted({max(1, round(each * layers)) for each in fractions}), "overview: removing layers"):
        start = window(layers, count, angles[:, count].__getitem__)
        cuts = {tuple(sorted(influence[:count].tolist())), tuple(range(start, start + count))}
        plans = [
            Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in cut]) for cut in sorted(cuts)
        ]
        losses = [fidelity.of(apply(stack, plan)).kl for plan in plans]
        best = min(range(len(plans)), key=lambda number: losses[number].mean)
        plan = plans[best]
        name = f"{counted(count, 'layer')} of {layers}"
        rows.append(
            {
                "name": name,
                "bytes": plain.bytes(stack, plan),
                "speedup": plain.predicted(plan),
                "kl": vars(losses[best]),
                "how": f"predicted; {natural_form(plan, stack)} export",
            }
        )
    return Overview(
        findings={
            "model": stack.name,
            "architecture": stack.architecture.name,
            "layers": layers,
            "parts": parts,
            "savings": rows,
        },
        data={"calibration": calibration.describe(), "test": test.describe()},
    )


def _row(name: str, form: Form, speedup: float, kl: dict[str, Any] | None, how: str) -> dict[str, Any]:
    return {"name": name, "bytes": form.weights(), "speedup": speedup, "kl": kl, "how": how}


def _widths(form: Form, parts: dict[str, int], layers: int) -> Iterator[dict[str, Any]]:
    """Yield what a smaller vocabulary and narrower MLPs would save, by their share of weights and of a step."""
    whole, step = form.weights(), form.times.step(None, layers)
    tokens = parts["embedding and head"] * TOKENS
    how = "see lamella vocab"
    yield {"name": "half of the tokens", "bytes": whole - tokens, "speedup": None, "kl": None, "how": how}
    faster = step / (step - CHANNELS * form.times.mlp * layers)
    how = "predicted; see minitron"
    name = "a quarter of the MLP channels"
    yield {"name": name, "bytes": whole - parts["MLP"] * CHANNELS, "speedup": faster, "kl": None, "how": how}


def parts_of(stack: Stack) -> dict[str, int]:
    """Return the bytes of the weights of each part of a model; shared weights are counted once.

    Args:
        stack: the model.
    """
    found: dict[str, int] = {"embedding and head": 0, "attention": 0, "MLP": 0, "rest": 0}
    seen: set[int] = set()

    def take(part: str, parameters: Any) -> None:
        for each in parameters:
            if id(each) not in seen:
                seen.add(id(each))
                found[part] += each.nbytes

    heads = (stack.model.get_input_embeddings(), stack.model.get_output_embeddings())
    for module in filter(None, heads):
        take("embedding and head", module.parameters())
    for layer in stack.layers:
        for sublayer in stack.architecture.sublayers:
            part = "MLP" if sublayer.name == "mlp" else "attention"
            for child in sublayer.modules:
                take(part, layer.get_submodule(child).parameters())
    take("rest", stack.model.parameters())
    return found


def figures(evidence: Evidence) -> list[Figure]:
    """Return the shares of the parts, and the loss of each means over its speed-up.

    Args:
        evidence: the evidence of an overview.
    """
    found = evidence.findings
    points = {
        each["name"]: [(each["speedup"], each["kl"]["mean"])] for each in found["savings"] if each["kl"] is not None
    }
    parts = found["parts"]
    return [
        Bars("", "MB", {"weights": [each / 1e6 for each in parts.values()]}, list(parts), title="Weights by part"),
        Scatter("decode speed-up", "KL, nats", points, title="What each means costs, before healing"),
    ]
