"""What judges a changed model depends on the test alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lamella.data import Reader
from lamella.jobs import run as runner
from lamella.jobs.held_out import held_out
from lamella.registry import get_method
from lamella.zoo import open_stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


def test_test_windows_are_the_same_for_every_method_and_seed() -> None:
    stack = open_stack(NANO_LLAMA)
    windows = []
    for slug, seed in (("irepair", 1), ("irepair", 7), ("ssd", 0)):
        opening = runner.Opening(get_method(slug), {"seed": seed})
        opening._model(runner.Stack, NANO_LLAMA)
        windows.append(runner._judge(opening, stack, [], None)[0])
    reader = Reader(partial(AutoTokenizer.from_pretrained, NANO_LLAMA), seed=3)
    windows.append(held_out(reader, stack, runner.TEST, "pydoc")[0])
    assert all(torch.equal(each, windows[0]) for each in windows)
