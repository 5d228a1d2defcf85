"""Quantisation beside cutting: the same models whole and in 8 bits, by fidelity, speed and size."""

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

AS_IT_IS = "as it is"
RUN = {
    "int8": "int8 weights and bfloat16 activations, eagerly, on torch's own kernel",
    "q8_0": "what a q8_0 file gives back, in the original's precision; its speed is llama.cpp's and not measured here",
}


@dataclass(frozen=True)
class Quantize:
    """The result in 8 bits, too, in the same folder.

    Attributes:
        kind: q8_0: a GGUF file for llama.cpp. int8: a folder for torch, which needs the extra quantize.
    """

    kind: Literal["q8_0", "int8"] = "q8_0"

    prefixed: ClassVar[bool] = True


def forms(quantize: Quantize | None) -> tuple[str, ...]:
    """The forms to measure: int8, which runs here, and what is asked for."""
    return tuple(dict.fromkeys(["int8", *([] if quantize is None else [quantize.kind])]))


def check_quantised(quantize: Quantize | None, form: str) -> None:
    """Check, before long work, that its result can be quantised.

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
    """Measure models, and what quantisation makes of the first and of the last of them.

    Decoding at batch 1 is timed in turn, as a ratio to the original's. What llama.cpp runs has no speed here: the
    weights that its file gives back are computed with, for fidelity.

    Args:
        test: against the original.
        models: by name, the original first; views and models with the same vocabulary.
        forms: of quantisation, out of :data:`RUN`. A model without linear maps that can be int8 has no such form, and
            one that decides while it runs has none.
        known: fidelity that has been measured already, by the names of models.

    Returns:
        For evidence, of each a ``name``, ``form`` (None: as it is), what was ``run``, the ``bytes`` of its weights,
        its ``fidelity``, and ``decode_speedup`` and ``decode_seconds_per_step``, which are None where nothing ran.
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
                "run": AS_IT_IS if form is None else RUN[form],
                "bytes": size,
                "fidelity": known[name] if name in known else test.of(model).as_dict(),
                "decode_speedup": timing.get("decode_speedup"),
                "decode_seconds_per_step": timing.get("decode_seconds_per_step"),
            }
        )
    return rows


def _bytes(model: Any) -> int:
    """What is kept of a model; a view holds what its plan leaves out, too."""
    stack = predicting_stack(open_model(model))
    gone = [
        stack.layers[layer].get_submodule(child).parameters()
        for layer, name in stack.dropped
        for child in stack.architecture[name].modules
    ]
    left_out = {each for parameters in gone for each in parameters}
    return sum(each.nbytes for each in model.parameters() if each not in left_out)
