"""Healing: train back what a plan cost, by its method's own recipe, and say what that brought."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lamella.errors import ExportError, MethodError
from lamella.evaluate import FidelityTest, environment
from lamella.plan import Plan
from lamella.plan.export import export, natural_form
from lamella.registry import get_method
from lamella.report import check_installed, render_healing
from lamella.runtime import apply
from lamella.train import Healed, blocks
from lamella.zoo import load_text, open_stack, open_tokenizer, windows


def heal(
    model: Any,
    plan: Plan,
    out: str | Path,
    *,
    text: str = "pydoc",
    test: str = "stdlib",
    sequences: int = 64,
    length: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a model under a plan with the recipe of the plan's method, and export the result.

    Args:
        model: anything that :func:`lamella.open` takes.
        plan: a plan for it, of a method with a recipe.
        out: the folder to write: the checkpoint with its plan, ``log.json``, ``evidence.json`` and ``heal.html``.
            Beside it, ``.OUT.training`` lets an interrupted run go on.
        text: what to train on, its calibration split; prompts of many lengths are cut from it.
        test: what to measure on; by default text of another kind, so that the gain is not memorisation.
        sequences, length: of the training text, in blocks of tokens.
        seed: of everything that is drawn.
        overwrite: replace ``out``.
        options: of the recipe, such as ``steps`` and ``lr``.

    Returns:
        The evidence: fidelity before and after, and the training's curve.

    Raises:
        MethodError: when the plan's method has no recipe.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    out = Path(out)
    slug = plan.policy.name if plan.policy is not None else plan.provenance.get("method", "")
    recipe = get_method(slug).train
    if recipe is None:
        raise MethodError(f"{slug} has no healing recipe of its own; `lamella methods` says which methods have one")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists: choose another folder, or add --overwrite to replace it")
    check_installed()
    stack = open_stack(model)
    plan.check_fits(stack)
    tokenizer = open_tokenizer(stack.path or model)
    to_train, to_test = load_text(text, "calibration"), load_text(test, "test")
    tokens = windows(tokenizer, to_train, sequences, length, seed)
    test_tokens = windows(tokenizer, to_test, 8, 256, seed)
    fidelity = FidelityTest(stack, test_tokens)
    before = fidelity.of(apply(stack, plan))

    work = out.parent / f".{out.name}.training"
    torch.manual_seed(seed)
    samples = blocks(tokens, (length // 8, length // 2), seed=seed)
    healed: Healed = recipe(stack, plan, samples, out=work, seed=seed, **(options or {}))
    after = fidelity.of(apply(healed.stack, healed.plan))

    evidence = {
        "schema": "lamella.healing/1",
        "model": stack.name,
        "method": slug,
        "data": {"training": to_train.provenance(tokens), "test": to_test.provenance(test_tokens)},
        "before": before.as_dict(),
        "after": after.as_dict(),
        "settings": dict(healed.log.settings),
        "curve": [{"step": point.step, "loss": point.loss, **point.parts} for point in healed.log.train],
        "seed": seed,
        "environment": environment(),
    }
    trained = healed.stack is not stack
    reference = healed.plan.model.model_copy(update={"weights": None}) if trained else plan.model
    final = healed.plan.model_copy(update={"model": reference})
    documents = {"evidence.json": json.dumps(evidence, indent=2) + "\n", "heal.html": render_healing(evidence)}
    export(
        healed.stack,
        final,
        out,
        form=natural_form(final, healed.stack),
        overwrite=overwrite,
        tokenizer=tokenizer,
        files=documents,
    )
    shutil.rmtree(work, ignore_errors=True)
    return evidence
