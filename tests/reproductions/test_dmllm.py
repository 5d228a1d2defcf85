"""The two small models that denoise: what their tokens see while they learn, and what they begin with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lamella.data import Processing
from lamella.evaluate.scored import read_inputs
from lamella.zoo.vlm import shapes_vlm

sys.path.insert(0, str(Path(__file__).parents[2] / "reproductions"))

from harness import dmllm
from harness.dmllm import Asked, Sight

KINDS = list(dmllm.KINDS.values())


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**read_inputs(model, batch)).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sight", ["apart", "causal"])
def test_a_question_among_others_is_read_as_if_it_were_the_only_one(kind: str, sight: Sight) -> None:
    made, processor = shapes_vlm(kind)
    made, batch_of = made.double(), dmllm.reading(Processing(processor), sight)
    rows = dmllm.asked_together(3, seed=1)
    assert {len(row.said) for row in rows} != {1}
    together = batch_of(rows)
    found, labels = logits(made, together), together["labels"]
    for number, row in enumerate(rows):
        carries = labels[number] >= 0
        alone = [batch_of([Asked(row.picture, [one])]) for one in row.said]
        apart = torch.cat([logits(made, one)[one["labels"] >= 0] for one in alone])
        assert torch.equal(labels[number][carries], torch.cat([one["labels"][one["labels"] >= 0] for one in alone]))
        torch.testing.assert_close(found[number][carries], apart, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_what_a_model_sees_by_itself(kind: str) -> None:
    made, processor = shapes_vlm(kind)
    batch = dmllm.reading(Processing(processor), "all")(dmllm.asked(4, seed=1))
    real = batch["attention_mask"][:, 0, 0]  # of the first token, which sees all that there is
    found, own = logits(made, batch), logits(made, {**batch, "attention_mask": real.long()})
    assert not real.all()
    torch.testing.assert_close(found[real], own[real], atol=1e-5, rtol=0)


def test_questions_begin_anywhere_about_the_end_of_the_picture() -> None:
    _, processor = shapes_vlm("llava_llada")
    rows = dmllm.asked(64, seed=1)
    near, far = (dmllm.reading(Processing(processor), "all", gap)(rows) for gap in (0, 20))
    moved = (far["position_ids"] - near["position_ids"])[near["input_ids"] != 0]
    assert torch.equal(far["labels"], near["labels"]) and -20 <= moved.min() < -10 and 10 < moved.max() <= 20
    assert (far["position_ids"] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_sees_itself_alone_is_the_same_whatever_the_answer(kind: str) -> None:
    made, processor = shapes_vlm(kind)
    batch = dmllm.reading(Processing(processor), "prompt")(dmllm.asked(4, seed=1))
    carries = batch["labels"] >= 0
    masks = batch["input_ids"].masked_fill(carries, processor.tokenizer.mask_token_id)
    found, other = logits(made, batch), logits(made, {**batch, "input_ids": masks})
    assert torch.equal(found[~carries], other[~carries]) and not torch.equal(found[carries], other[carries])


def test_both_models_have_a_token_for_each_cell_and_learn_in_two_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    learned = []
    monkeypatch.setattr(dmllm, "learn", lambda model, *given: learned.append((given[1], given[2])))
    for provenance in dmllm.PROVENANCES:
        model = dmllm.trained(provenance, quick=True)
        ids = dmllm.prompts(model, dmllm.shown("colour", 1, "test", 0))["input_ids"]
        assert int((ids == model.model.config.image_token_id).sum()) == 16
    assert [sight for sight, _ in learned] == ["apart", "all", "causal", "prompt"]
