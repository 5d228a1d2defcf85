"""Routes of a compression: the original, the cut and the healed model, with their weights as they are and in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lamella.commands.compress.forms import SECONDS, STEPS, Means, is_int8, weight_bytes
from lamella.errors import ExportError
from lamella.evaluate import FidelityTest, Ratio, bench
from lamella.extras import require
from lamella.plan.quantize import NEEDS, int8_copy, q8_0_bytes, q8_0_copy

UNQUANTISED = "unquantised"
HEALED = "healed"  # a model with the shape, and so the speed, of the cut
RUN = {
    "int8": "int8 weights and bfloat16 activations, in eager mode with torch's own kernel",
    "q8_0": "dequantised weights of a q8_0 file, in the original's precision; llama.cpp's speed is not measured",
}


@dataclass(frozen=True)
class Quantize:
    """Also write the result in 8 bits, in the same folder.

    Attributes:
        kind: q8_0: a GGUF file for llama.cpp. int8: a folder for torch, which needs the extra quantize.
    """

    kind: Literal["q8_0", "int8"] = "q8_0"

    prefixed: ClassVar[bool] = True


def requested(quantize: Quantize | None) -> tuple[str, ...]:
    """Return the forms to measure: int8, which runs in torch, and the requested one.

    Args:
        quantize: the request.
    """
    return tuple(dict.fromkeys(["int8", *([] if quantize is None else [quantize.kind])]))


def check_quantised(quantize: Quantize | None, form: str, allow: Sequence[Means] = ()) -> None:
    """Check, before long work, that its result can be quantised.

    Args:
        quantize: the request.
        form: form of the export.
        allow: the means that were requested.

    Raises:
        ExportError: for a form of export that cannot be quantised.
        LamellaError: if torchao is needed and not installed.
    """
    if (quantize is not None or "quantize" in allow) and form not in ("auto", "plain"):
        raise ExportError(f"{form} checkpoints cannot be quantised: leave form or quantize out")
    if "quantize" in allow or (quantize is not None and quantize.kind == "int8"):
        require("torchao", *NEEDS)


@dataclass(frozen=True)
class Candidate:
    """A route whose speed and fidelity were measured before.

    Attributes:
        model: the model that it runs.
        speedup: its decode speed-up over the original.
        fidelity: its fidelity to the original, as in evidence.
    """

    model: Any
    speedup: Ratio
    fidelity: dict[str, Any]


def routes(
    test: FidelityTest,
    models: Mapping[str, Any],
    forms: tuple[str, ...] = ("int8",),
    measured: Mapping[str, Candidate] | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure models with their weights as they are, and quantised.

    Decoding at batch 1 is timed in interleaved runs, as a ratio to the original. A healed model has the speed of the
    cut. The speed of llama.cpp is not measured: for fidelity, the dequantised weights of its file are used.

    Args:
        test: the fidelity test against the original.
        models: ``original``, ``cut`` and ``healed``, as far as they exist: views and models with the same vocabulary.
        forms: forms of quantisation, of :data:`RUN`. A model without linear layers that can be int8 has no such form,
            and a dynamic view has none.
        measured: further routes by name, which were measured before.
        known: fidelities that were measured before, by the names of routes.

    Returns:
        For each route ``name``, ``form`` (None: unquantised), ``run`` (what was measured), ``bytes`` of its weights,
        ``fidelity``, and ``decode_speedup``, which is None if it did not run; ``pareto`` is true if no other route is
        both faster and closer to the original.
    """
    found: dict[str, tuple[str | None, Any, int]] = {}
    for name, model in models.items():
        found[name] = None, model, weight_bytes(model)
        if hasattr(model, "lamella_policy"):
            continue
        if "int8" in forms:
            integers = int8_copy(model)
            if is_int8(integers):
                found[f"{name}, int8"] = "int8", integers, weight_bytes(integers)
        if "q8_0" in forms:
            found[f"{name}, q8_0"] = "q8_0", q8_0_copy(model), q8_0_bytes(model)
    timed = {name: model for name, (form, model, _) in found.items() if form != "q8_0" and not name.startswith(HEALED)}
    speeds = {name: timing.decode_speedup for name, (timing, *_) in bench(timed, tokens=STEPS, seconds=SECONDS).items()}
    rows, known = [], known or {}
    for name, (form, model, size) in found.items():
        speed = speeds.get(name.replace(HEALED, "cut"))
        rows.append(_row(name, form, size, known[name] if name in known else test.of(model).as_dict(), speed))
    for name, each in (measured or {}).items():
        form = "int8" if is_int8(each.model) else None
        rows.append(_row(name, form, weight_bytes(each.model), each.fidelity, each.speedup))
    places = [_place(row) for row in rows]
    return [
        row | {"pareto": place is not None and not any(other and beats(other, place) for other in places)}
        for row, place in zip(rows, places, strict=True)
    ]


def beats(other: tuple[float, float], place: tuple[float, float]) -> bool:
    """Return whether another route is at least as fast and as close to the original, and better in one of the two.

    Args:
        other: speed-up and KL divergence of the other route.
        place: those of the route.
    """
    return other[0] >= place[0] and other[1] <= place[1] and other != place


def _row(name: str, form: str | None, size: int, fidelity: dict[str, Any], speed: Ratio | None) -> dict[str, Any]:
    return {
        "name": name,
        "form": form,
        "run": UNQUANTISED if form is None else RUN[form],
        "bytes": size,
        "fidelity": fidelity,
        "decode_speedup": None if speed is None else vars(speed),
    }


def _place(row: dict[str, Any]) -> tuple[float, float] | None:
    """Return speed-up and KL divergence of a route; None if its speed was not measured."""
    return row["decode_speedup"] and (row["decode_speedup"]["median"], row["fidelity"]["kl"]["mean"])
