"""The study of a model's questions: whatever batches they come in, with images and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lamella.data import MARK, ImageText, Processing, Shown
from lamella.errors import MethodError
from lamella.methods.dmllm_token_redundancy import dmllm_token_redundancy
from lamella.stack import open_model
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples


def asked(with_images: str) -> list[Shown]:
    """Questions of one task, with an image (i) or without (t)."""
    return [
        Shown(
            (each.image,) if kind == "i" else (),
            (
                {"role": "user", "content": f"{MARK}\n{each.prompt}" if kind == "i" else each.prompt},
                {"role": "assistant", "content": each.answer},
            ),
            task=each.task,
        )
        for kind, each in zip(with_images, examples(["colour"], len(with_images), "test"), strict=True)
    ]


def test_batches_and_the_order_of_questions_do_not_matter() -> None:
    made, processor = shapes_vlm("llava_llada")
    model, rows = open_model(made.double()), asked("ttiit")

    def studied(order: list[int], batch: int) -> dict[str, Any]:
        questions = ImageText([rows[place] for place in order], Processing(processor))
        found: dict[str, Any] = dmllm_token_redundancy(model, questions, length=3, batch=batch).findings["tasks"]
        return found["colour"]

    whole = studied([0, 1, 2, 3, 4], 5)
    for order, batch in (([0, 1, 2, 3, 4], 2), ([2, 0, 3, 1, 4], 2), ([2, 3, 0, 1, 4], 3), ([0, 1, 2, 3, 4], 1)):
        found = studied(order, batch)
        assert found["rows"] == 5 and found["lengths"] == whole["lengths"] and found["flops"] == whole["flops"]
        assert found["agreement"] == whole["agreement"]
        for name in ("kl", "loss", "mass"):
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(whole[name]), rtol=1e-4, atol=1e-7)


def test_a_task_without_images_is_refused_by_name() -> None:
    made, processor = shapes_vlm("llava_llada")
    with pytest.raises(MethodError, match="needs questions about images; the 2 of 'colour' have none"):
        dmllm_token_redundancy(open_model(made), ImageText(asked("tt"), Processing(processor)))
