"""Findings of a rewrite: recentred, replaced, folded and untied modules, parameters, and numerical error."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm.checking import is_tied, means, output, precise, probe
from lamella.methods.pre_rmsnorm.rewrite import Form, find_branches
from lamella.plan import Plan
from lamella.plan.rewriting import wirings_of, with_rewrite
from lamella.stack import Model

MOST = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}  # relative error


@torch.no_grad()
def conversion(model: Model, plan: Plan, form: Form, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Rewrite a model by a plan, compare the result with the original, and return the findings.

    Args:
        model: the original model.
        plan: the plan with the rewrite.
        form: the form of the norms.
        seed: random seed of the inputs.

    Returns:
        The findings, and notes for the user.

    Raises:
        PlanError: for a model that cannot take this form.
        MethodError: when the result computes a different function.
    """

    def error(of: Model) -> dict[str, float]:
        return _error(of, with_rewrite(of, plan.rewrite), seed)

    # Not a loop, whose variable would keep one copy while the next is made.
    errors = {"float64": max(map(error, precise(model)), key=lambda each: each["largest"] / each["size"])}
    result = with_rewrite(model, plan.rewrite)
    errors[_dtype(model)] = _error(model, result, seed)
    branches = find_branches(model.model, wirings_of(model.architectures))
    tied = is_tied(model.model)
    inputs = probe(model, seed)
    before, after = _parameters(model.model), _parameters(result.model)
    findings: dict[str, Any] = {
        "form": vars(form),
        "norms": [norm.path for branch in branches for norm in branch.norms],
        "recentred": [writer.path for branch in branches for writer in branch.writers],
        "scales": [w.scaled.path for branch in branches for w in branch.writers if w.scaled is not None],
        "entrances": [
            entrance.path for branch in branches for entrance in (*branch.entrances, branch.first) if entrance
        ],
        "readers": [reader.path for branch in branches for norm in branch.norms for reader in norm.readers],
        "tied": {"before": tied, "after": is_tied(result.model)},
        "parameters": {"before": before, "after": after, "delta": after - before},
        "error": errors,
        "mean": {"before": means(model, inputs)} | ({"after": means(result, inputs)} if form.norm == "rms" else {}),
    }
    return findings, _notes(model, findings)


def _error(model: Model, result: Model, seed: int) -> dict[str, float]:
    """Return the largest difference of the outputs on random inputs, and the largest output.

    Raises:
        MethodError: when the difference is larger than rounding explains.
    """
    inputs = probe(model, seed)
    expected = output(model.model, inputs).double()
    found = output(result.model, inputs).double()
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= MOST[_dtype(model)] * size:
        raise MethodError(
            f"{model.name}: the rewritten model differs by {error:.2g} where outputs reach {size:.2g}, more than "
            f"rounding in {_dtype(model)}: some unknown module reads or writes its residual stream; "
            "remove hooks and adapters first"
        )
    return {"largest": error, "size": size}


def _dtype(model: Model) -> str:
    whole: Any = model.model
    return str(whole.dtype).removeprefix("torch.")


def _parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _notes(model: Model, findings: dict[str, Any]) -> list[str]:
    notes, whole = [], cast(Any, model.model)
    if findings["tied"]["before"] and not findings["tied"]["after"]:
        table = whole.get_input_embeddings().weight.numel()
        notes.append(f"Embedding and head shared one tensor and now have two, which costs {table:,} parameters.")
    if not all(stack.architecture.norm for stack in model.stacks.values()):
        notes.append(
            "Its last hidden states are the residual stream, whose mean is now zero; pooled outputs are unchanged."
        )
    if _has_dropout(whole):
        notes.append("Its branches have dropout, which gives their outputs a mean: in training, the results differ.")
    return notes


def _has_dropout(model: Any) -> bool:
    names = ("resid_pdrop", "hidden_dropout", "dropout", "hidden_dropout_prob")
    return any(getattr(model.config, name, 0.0) > 0 for name in names)
