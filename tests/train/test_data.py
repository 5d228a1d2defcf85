"""Training samples and their batches."""

from __future__ import annotations

import pytest
import torch

from lamella.errors import TrainingError
from lamella.train import blocks, collate, pairs

TOKENS = torch.arange(10, 34).reshape(3, 8)


class Words:
    """A tokenizer of digits: each is its own token, 1 begins a text, 2 ends it."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(digit) + 10 for digit in text]}


def test_only_response_tokens_carry_loss() -> None:
    [sample] = pairs([([5, 6, 7], [8, 9])])
    assert sample["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert sample["labels"].tolist() == [-100, -100, -100, 8, 9]
    assert int(sample["prompt_lengths"]) == 3


def test_all_tokens_carry_loss_but_the_first_which_nothing_predicts() -> None:
    [sample] = pairs([([5, 6], [8, 9])], loss_on="all")
    assert sample["labels"].tolist() == [-100, 6, 8, 9]
    assert int(sample["prompt_lengths"]) == 2
    assert blocks(TOKENS)[0]["labels"].tolist() == [-100, *range(11, 18)]


def test_text_is_begun_once_and_ended() -> None:
    [sample] = pairs([("34", "56")], Words())
    assert sample["input_ids"].tolist() == [1, 13, 14, 15, 16, 2]
    assert int(sample["prompt_lengths"]) == 3
    with pytest.raises(TrainingError, match="sample 0 is text"):
        pairs([("34", "56")])


def test_rows_are_cut_at_their_end_and_never_to_the_prompt_alone() -> None:
    [sample] = pairs([([5, 6], [7, 8, 9])], max_length=4)
    assert sample["input_ids"].tolist() == [5, 6, 7, 8]
    for example in (([5, 6, 7, 8], [9]), ([], [9]), ([5], [])):
        with pytest.raises(TrainingError, match=r"sample 1 .* both a prompt and a response"):
            pairs([([5], [6]), example], max_length=4)


def test_prompts_of_blocks_are_drawn_from_the_seed_within_their_bounds() -> None:
    tokens = TOKENS[:1].expand(200, -1)
    drawn = [int(sample["prompt_lengths"]) for sample in blocks(tokens, (2, 5), seed=1)]
    assert set(drawn) == {2, 3, 4, 5}
    assert drawn == [int(sample["prompt_lengths"]) for sample in blocks(tokens, (2, 5), seed=1)]
    assert drawn != [int(sample["prompt_lengths"]) for sample in blocks(tokens, (2, 5), seed=2)]
    assert {int(sample["prompt_lengths"]) for sample in blocks(tokens, 3)} == {3}


@pytest.mark.parametrize("prompt", [8, (5, 8), (4, 2), -1])
def test_prompts_that_leave_no_response_are_refused(prompt: int | tuple[int, int]) -> None:
    with pytest.raises(TrainingError, match="prompts shorter than time"):
        blocks(TOKENS, prompt)


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate(pairs([([5, 6], [7, 8, 9]), ([4], [3])]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 3, -100, -100, -100]]
    assert batch["prompt_lengths"].tolist() == [2, 1]


def test_further_tensors_of_the_samples_come_along() -> None:
    samples = [sample | {"weight": torch.tensor(0.5), "gate": torch.ones(8)} for sample in blocks(TOKENS, 2)]
    batch = collate(samples)
    assert batch["weight"].shape == (3,) and batch["gate"].shape == (3, 8)
