"""The study of a model's questions, whatever batches they come in, and plans: what they say, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.data import MARK, ImageText, ImageTextRow, Processing
from lamella.errors import MethodError, PlanError
from lamella.methods.dmllm_token_redundancy import (
    VisualTokenSchedule,
    dmllm_token_redundancy,
    plan,
    recommend,
    settings,
)
from lamella.methods.dmllm_token_redundancy.method import TokenPruning
from lamella.runtime import Denoising, Sampler
from lamella.stack import open_model
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples


def questions_of(with_images: str) -> list[ImageTextRow]:
    """Questions of one task, with an image (i) or without (t)."""
    return [
        ImageTextRow(
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
    model, rows = open_model(made.double()), questions_of("ttiit")

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
        dmllm_token_redundancy(open_model(made), ImageText(questions_of("tt"), Processing(processor)))


def test_a_plan_says_the_schedule_that_it_was_asked_for() -> None:
    made, processor = shapes_vlm("llava_llada")
    model, questions = open_model(made), ImageText(questions_of("it"), Processing(processor))
    for kind, pruning, schedule in (
        ("one-shot", TokenPruning(2, 0.5, 0.25), VisualTokenSchedule.one_shot(2, 0.5, 0.25)),
        ("progressive", TokenPruning(-1, 0.5, 0.25), recommend("scratch", 30, 6)),
        ("withdraw", TokenPruning(3, 0.0), recommend("ar2diff", 30, 6)),
        ("withdraw", TokenPruning(3, 0.5), VisualTokenSchedule.withdraw(3, 0.5)),
    ):
        series = plan(model, questions, kind=kind, pruning=pruning)
        assert schedule is not None and series.points[0].policies == {}
        how = {"criterion": "fastv", "positions": "compact", "order": "position", "seed": 0}
        assert series.points[1].policies["text"].params == settings(schedule, **how)
    with pytest.raises(MethodError, match="layers 0 to 5"):
        plan(model, questions, pruning=TokenPruning(layer=6))


def test_a_plan_goes_to_disk_as_the_whole_model_that_runs_it_and_in_no_other_form(tmp_path: Path) -> None:
    made, processor = shapes_vlm("llava_llada")
    made.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = lamella.open(tmp_path / "model")
    questions = ImageText(questions_of("i"), Processing(processor))
    early = plan(model, questions, pruning=TokenPruning(keep=0.25))[1]
    for form in ("plain", "portable"):
        with pytest.raises(PlanError, match="native"):
            lamella.export(model, early, tmp_path / form, form=form)
    loaded = lamella.load(lamella.export(model, early, tmp_path / "native", form="native"))
    inputs = questions.prompts(list(questions))
    sampler = Sampler(length=3, steps=3)

    def logits(view: Any) -> torch.Tensor:
        request = Denoising(view, sampler=sampler, **inputs)
        request.advance()
        assert request.logits is not None
        return request.logits

    torch.testing.assert_close(logits(loaded.model), logits(lamella.apply(model, early)), rtol=0, atol=0)
    assert not torch.equal(logits(loaded.model), logits(model.model))
