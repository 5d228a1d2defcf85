"""Routes of a compression: the original, the cut and the healed model, with their weights as they are and quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lamella.commands.compress.forms import Form, Means, Program, Runtime, Variant
from lamella.errors import ExportError
from lamella.evaluate import FidelityTest, Ratio
from lamella.extras import require
from lamella.plan import Plan
from lamella.plan.quantize import LLAMA_CPP, NEEDS
from lamella.stack import Stack

UNQUANTISED = "unquantised"
HEALED = "healed"  # a model with the shape, and so the speed, of the cut
DEQUANTISED = "fidelity in torch, with the weights that the file gives back; llama.cpp also rounds activations"
RUN = {
    ("torch", "int8"): "int8 weights and bfloat16 activations, in eager mode with torch's own kernel",
    ("torch", "q8_0"): "dequantised weights of a q8_0 file, in the original's precision; llama.cpp's speed is not "
    "measured: --runtime llama.cpp measures it",
    ("llama.cpp", "q8_0"): f"speed in llama.cpp, with 8-bit weights; {DEQUANTISED}",
    ("llama.cpp", "q4_k_m"): f"speed in llama.cpp, with weights of 4 to 8 bits; {DEQUANTISED}",
}


@dataclass(frozen=True)
class Quantize:
    """Also write the result in 8 bits, in the same folder.

    Attributes:
        kind: q8_0: a GGUF file for llama.cpp. int8: a folder for torch, which needs the extra quantize.
    """

    kind: Literal["q8_0", "int8"] = "q8_0"

    prefixed: ClassVar[bool] = True


def check_quantised(
    quantize: Quantize | None, form: str, allow: Sequence[Means] = (), program: Program = "torch"
) -> None:
    """Check, before long work, that its result can be quantised.

    Args:
        quantize: the request.
        form: form of the export.
        allow: the means that were requested.
        program: the program that runs the result.

    Raises:
        ExportError: for a form of export that cannot be quantised.
        LamellaError: if torchao or llama.cpp is needed and not installed.
    """
    if program == "llama.cpp":
        require("xllamacpp", *LLAMA_CPP)
        if form not in ("auto", "plain"):
            raise ExportError(f"{form} checkpoints do not run in llama.cpp: leave form out")
        if quantize is not None:
            raise ExportError("with llama.cpp the chosen form is written as a GGUF file: leave quantize out")
        return
    if (quantize is not None or "quantize" in allow) and form not in ("auto", "plain"):
        raise ExportError(f"{form} checkpoints cannot be quantised: leave form or quantize out")
    if "quantize" in allow or (quantize is not None and quantize.kind == "int8"):
        require("torchao", *NEEDS)


@dataclass(frozen=True)
class Candidate:
    """A route whose speed and fidelity were measured before.

    Attributes:
        form: the form of its weights.
        size: bytes of its weights.
        speedup: its decode speed-up over the original.
        fidelity: its fidelity to the original, as in evidence.
    """

    form: Form
    size: int
    speedup: Ratio
    fidelity: dict[str, Any]


def variants_of(models: Mapping[str, tuple[Stack, Plan | None]], forms: Sequence[Form]) -> dict[str, Variant]:
    """Return models in several forms, by the names of their routes.

    Args:
        models: ``original``, ``cut`` and ``healed``, as far as they exist, with their plans.
        forms: the forms, that of the weights as they are first; a dynamic plan has no other.
    """
    return {
        ", ".join(filter(None, [name, form.name])): (form, stack, plan)
        for name, (stack, plan) in models.items()
        for form in forms
        if not form.name or plan is None or plan.is_static
    }


def routes(
    test: FidelityTest,
    runtime: Runtime,
    variants: Mapping[str, Variant],
    measured: Mapping[str, Candidate] | None = None,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure models with their weights as they are, and quantised.

    Decoding at batch 1 is timed in interleaved runs, as a ratio to the original. A healed model has the speed of the
    cut. A form that the program does not run has no speed: only its fidelity is measured.

    Args:
        test: the fidelity test against the original.
        runtime: the program that runs the models.
        variants: the models, as :func:`variants_of` returns them.
        measured: further routes by name, which were measured before.
        known: fidelities that were measured before, by the names of routes.

    Returns:
        For each route ``name``, ``form`` (None: unquantised), ``run`` (what was measured), ``bytes`` of its weights,
        ``fidelity``, and ``decode_speedup``, which is None if it did not run; ``pareto`` is true if no other route is
        both faster and closer to the original.
    """
    timed = {
        name: each for name, each in variants.items() if each[0].program == runtime.name and not name.startswith(HEALED)
    }
    speeds = {name: timing.decode_speedup for name, (timing, *_) in runtime.bench(timed).items()}
    rows, known = [], known or {}
    for name, (form, stack, plan) in variants.items():
        speed = speeds.get(name.replace(HEALED, "cut"))
        fidelity = known[name] if name in known else test.of(form.view(stack, plan)).as_dict()
        rows.append(_row(name, form, runtime.name, form.bytes(stack, plan), fidelity, speed))
    for name, each in (measured or {}).items():
        rows.append(_row(name, each.form, runtime.name, each.size, each.fidelity, each.speedup))
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


def _row(
    name: str, form: Form, program: Program, size: int, fidelity: dict[str, Any], speed: Ratio | None
) -> dict[str, Any]:
    return {
        "name": name,
        "form": form.name or None,
        "run": RUN[program, form.name] if form.name else UNQUANTISED,
        "bytes": size,
        "fidelity": fidelity,
        "decode_speedup": None if speed is None else vars(speed),
    }


def _place(row: dict[str, Any]) -> tuple[float, float] | None:
    """Return speed-up and KL divergence of a route; None if its speed was not measured."""
    return row["decode_speedup"] and (row["decode_speedup"]["median"], row["fidelity"]["kl"]["mean"])
