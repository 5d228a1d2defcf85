"""The trace of ``lamella trace``: token by token and layer by layer, what ran while a model answered a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lamella.errors import CalibrationError
from lamella.methods.void import lac_plan
from lamella.plan import Plan
from lamella.runtime import apply, traced
from lamella.stack import Stack

PHASES = ("first", "prompt", "answer")


@torch.no_grad()
def trace(
    stack: Stack, tokenizer: Any, inputs: dict[str, torch.Tensor], plan: Plan | None = None, *, alpha: float = 0.8,
    tokens: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """Answer one prompt greedily and note what ran for every token.

    Without a plan nothing is skipped, and what is noted is L2 Adaptive Computation: the layers that were active for a
    token (see :mod:`lamella.methods.void`).

    Args:
        stack: the opened model.
        tokenizer: its tokenizer.
        inputs: ``input_ids`` [1, time] and what else the model takes.
        plan: a plan that decides while the model runs.
        alpha: of L2 Adaptive Computation.
        tokens: the most new tokens.

    Returns:
        ``tokens`` (each with ``text``, its ``phase`` and the ``next`` token that its forward led to), ``attn`` and
        ``mlp`` [tokens, layers] bool, ``notes`` by name [tokens, layers] where the policy gave reasons, and ``usage``,
        the share of sublayers that ran in each phase. The first token, an attention sink, is a phase of its own.

    Raises:
        CalibrationError: for more than one prompt.
        PlanError: for a plan that decides nothing while the model runs.
    """
    if inputs["input_ids"].shape[0] != 1:
        raise CalibrationError("a trace shows one prompt at a time: give a single one")
    view = apply(stack, plan or lac_plan(stack, alpha=alpha, mode="trace"))
    seen = traced(view)
    ids = view.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0]
    executed, prompt, notes = seen.joined()
    ran, reasons = executed[0], {name: values[0] for name, values in notes.items()}
    if "active" in reasons:
        ran = np.repeat(reasons.pop("active").astype(bool)[..., None], 2, axis=-1)
    phases = np.where(prompt[0], "prompt", "answer")
    phases[0] = "first"
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    return {
        "schema": "lamella.trace/1",
        "model": {"name": stack.name, "layers": len(stack)},
        "policy": "l2 adaptive computation" if plan is None else plan.policy.name if plan.policy else "path",
        "params": {"alpha": alpha} if plan is None else plan.policy.params if plan.policy else {},
        "tokens": [
            {"text": text, "phase": str(phase), "next": following}
            for text, phase, following in zip(texts, phases, texts[1:], strict=False)
        ],
        "attn": ran[..., 0].tolist(),
        "mlp": ran[..., 1].tolist(),
        "notes": {name: _listed(values) for name, values in reasons.items()},
        "usage": {phase: float(ran[phases == phase].mean()) for phase in PHASES if (phases == phase).any()},
    }


def _listed(values: np.ndarray) -> list[list[float | None]]:
    return [[None if not np.isfinite(value) else round(float(value), 4) for value in row] for row in values]
