"""Counting different correct answers among sampled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.errors import CalibrationError
from lamella.methods.slr import diversity, first_answer
from lamella.methods.slr.answers import ChoiceQuestion
from lamella.zoo import open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
ANIMALS = ("dog", "polar bear", "bear", "fox", "goose")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A dog.", "dog"),
        ("DOGS are nice", "dog"),
        ("I like foxes", "fox"),
        ("the polar bear and the dog", "polar bear"),
        ("bear, dog", "bear"),
        ("dogma", None),
        ("", None),
    ],
)
def test_an_answer_is_the_one_that_a_text_names_first(text: str, named: str | None) -> None:
    assert first_answer(text, ANIMALS) == named


class Scripted(torch.nn.Module):
    """A model that writes what it is told to."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.rows, self.given, self.weight = rows, {}, torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.given = options
        prompt = input_ids.expand(len(self.rows), -1)
        return torch.cat([prompt, torch.tensor(self.rows)[:, None]], dim=1)


class Numbered:
    chat_template, pad_token_id, eos_token_id = None, None, 7

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, len(text), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, row: list[int], **_: Any) -> str:
        return ["dog", "A bear!", "nothing", "bear"][row[0]]


def test_different_right_answers_and_the_share_that_is_right_are_counted() -> None:
    model = Scripted([0, 1, 2, 3])
    found = diversity(model, Numbered(), [ChoiceQuestion("Name one", ANIMALS)], samples=4)
    assert (found.distinct, found.valid) == (2, 0.75)
    assert found.varieties[0].counts == {"bear": 2, "dog": 1}
    expected = {"min_p": 0.1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 8}
    assert model.given.items() >= (expected | {"num_return_sequences": 4, "pad_token_id": 7}).items()


def test_the_same_seed_gives_the_same_answers_whatever_else_is_drawn() -> None:
    model, tokenizer = open_stack(NANO_LLAMA).model, open_tokenizer(NANO_LLAMA)
    asked = [ChoiceQuestion("The statement is", ("a", "the", "of", "not", "is"))]
    runs = []
    for noise, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(noise)
        runs.append(diversity(model, tokenizer, asked, samples=24, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_nothing_to_ask_is_refused() -> None:
    for questions, samples in (([], 4), ([ChoiceQuestion("x", ANIMALS)], 0)):
        with pytest.raises(CalibrationError, match="give at least 1 of each"):
            diversity(Scripted([0]), Numbered(), questions, samples=samples)
