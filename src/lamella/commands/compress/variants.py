"""Quantised variants of models: fidelity, speed and size with and without 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lamella.errors import ExportError
from lamella.evaluate import FidelityTest, bench
from lamella.evaluate.fidelity import predicting_stack
from lamella.extras import require
from lamella.plan.quantize import NEEDS, Int8Linear, int8_copy, q8_0_bytes, q8_0_copy
from lamella.stack import open_model

UNQUANTISED = "unquantised"
RUN = {
    "int8": "int8 weights and bfloat16 activations, in eager mode with torch's own kernel",
    "q8_0": "dequantised weights of a q8_0 file, in the original's precision; llama.cpp's speed is not measured",
}


@dataclass(frozen=True)
class Quantize:
    """Also write the result with 8-bit weights, in the same folder.

    Attributes:
        kind: q8_0: a GGUF file for llama.cpp. int8: a folder for torch, which needs the extra quantize.
    """

    kind: Literal["q8_0", "int8"] = "q8_0"

    prefixed: ClassVar[bool] = True


def forms(quantize: Quantize | None) -> tuple[str, ...]:
    """Return the forms to measure: int8, which runs in torch, and the requested one.

    Args:
        quantize: the request.
    """
    return tuple(dict.fromkeys(["int8", *([] if quantize is None else [quantize.kind])]))


def check_quantised(quantize: Quantize | None, form: str) -> None:
    """Check, before long work, that its result can be quantised.

    Args:
        quantize: the request.
        form: form of the export.

    Raises:
        ExportError: for a form of export that cannot be quantised.
    """
    if quantize is None:
        return
    if form not in ("auto", "plain"):
        raise ExportError(f"{form} checkpoints cannot be quantised: leave form or quantize out")
    if quantize.kind == "int8":
        require("torchao", *NEEDS)


def variants(
    test: FidelityTest,
    models: Mapping[str, Any],
    forms: tuple[str, ...] = ("int8",),
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure models, and quantised variants of the first and the last of them.

    Decoding at batch 1 is timed in interleaved runs, as a ratio to the original. The speed of llama.cpp is not
    measured: for fidelity, the dequantised weights of its file are used.

    Args:
        test: the fidelity test against the original.
        models: models by name, the original first; views and models with the same vocabulary.
        forms: forms of quantisation, of :data:`RUN`. A model without linear layers that can be int8 has no such form,
            and a dynamic view has none.
        known: fidelities that were measured before, by the names of models.

    Returns:
        For each variant ``name``, ``form`` (None: unquantised), ``run`` (what was measured), ``bytes`` of its weights,
        ``fidelity``, and ``decode_speedup`` and ``decode_seconds_per_step``, which are None if it did not run.
    """
    names = list(models)
    found: dict[str, tuple[str | None, Any, int]] = {}
    for name, model in models.items():
        found[name] = None, model, _bytes(model)
        if name not in (names[0], names[-1]) or hasattr(model, "lamella_policy"):
            continue
        if "int8" in forms:
            integers = int8_copy(model)
            if any(isinstance(module, Int8Linear) for module in integers.modules()):
                found[f"{name}, int8"] = "int8", integers, _bytes(integers)
        if "q8_0" in forms:
            found[f"{name}, q8_0"] = "q8_0", q8_0_copy(model), q8_0_bytes(model)
    timings = bench({name: model for name, (form, model, _) in found.items() if form != "q8_0"}, tokens=16)
    known, rows = known or {}, []
    for name, (form, model, size) in found.items():
        timing = timings[name][0].as_dict() if name in timings else {}
        rows.append(
            {
                "name": name,
                "form": form,
                "run": UNQUANTISED if form is None else RUN[form],
                "bytes": size,
                "fidelity": known[name] if name in known else test.of(model).as_dict(),
                "decode_speedup": timing.get("decode_speedup"),
                "decode_seconds_per_step": timing.get("decode_seconds_per_step"),
            }
        )
    return rows


def _bytes(model: Any) -> int:
    """Return the bytes of a model's weights, without those that the plan of a view removes."""
    stack = predicting_stack(open_model(model))
    removed = [
        stack.layers[layer].get_submodule(child).parameters()
        for layer, name in stack.dropped
        for child in stack.architecture[name].modules
    ]
    excluded = {each for parameters in removed for each in parameters}
    return sum(each.nbytes for each in model.parameters() if each not in excluded)
