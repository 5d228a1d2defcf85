"""What the reproduction of caprecover makes of captions."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"
CAPTIONS = ["red circle at a1 and blue square at c2", "green cross at d4"]
WORDS = sorted({word for each in CAPTIONS for word in each.split()})


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    return {"input_ids": [1 + WORDS.index(word) for word in text.split()]}


@pytest.mark.parametrize("wrong", [("square",), ("red", "d4"), ()])
def test_words_that_are_read_count_for_their_attribute_and_caption_alone(
    wrong: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(REPRODUCTIONS), *sys.path])
    words_read = run_path(str(REPRODUCTIONS / "caprecover.py"))["words_read"]
    missed = torch.tensor([1 + WORDS.index(word) for word in wrong])

    def logits(x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.where(torch.isin(ids, missed), 0, ids), 1 + len(WORDS)).float()

    names: Any = tokenizer
    names.eos_token_id = 0
    found = words_read(SimpleNamespace(tokenizer=names, logits=logits), torch.zeros(2, 3), CAPTIONS)
    captions = [[each.split()[:4] for each in caption.split(" and ")] for caption in CAPTIONS]
    assert found == {
        name: [sum(words[place] not in wrong for words in objects) / len(objects) for objects in captions]
        for name, place in (("colour", 0), ("shape", 1), ("cell", 3))
    }
