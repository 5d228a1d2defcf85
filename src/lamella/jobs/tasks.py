"""What the models of a compression reach on tasks, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.evaluate.tasks import score


def scores(models: Mapping[str, Any], tokenizer: Any, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Score models on the same questions.

    Args:
        models: by name, the original first.
        names: of tasks that need no permission; see :func:`lamella.evaluate.tasks.score`.

    Returns:
        For evidence, of each metric of each task the ``scores`` by model with their standard errors over questions; of
        all but the first also the ``difference`` from it, where all answered the same questions one by one.
    """
    found = {name: score(model, tokenizer, names, seed=seed) for name, model in models.items()}
    rows = []
    for same in zip(*found.values(), strict=True):
        base = same[0]
        each = {name: {"mean": one.value.mean, "error": one.value.error} for name, one in zip(found, same, strict=True)}
        for name, one in list(zip(found, same, strict=True))[1:]:
            if (since := one.since(base)) is not None:
                each[name]["difference"] = vars(since)
        rows.append({key: base.as_dict()[key] for key in ("task", "metric", "questions", "version")} | {"scores": each})
    return rows
