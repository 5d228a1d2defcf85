"""The test of changed models depends on the test input only."""

from __future__ import annotations

from pathlib import Path

import torch

from lamella.inputs import Opening
from lamella.registry import get_method
from lamella.stack import Stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


def test_test_windows_are_the_same_for_every_method_and_seed() -> None:
    windows = []
    for slug, seed in (("irepair", 1), ("irepair", 7), ("ssd", 0)):
        opening = Opening(get_method(slug), {"seed": seed})
        opening._model(Stack, NANO_LLAMA)
        windows.append(opening.judge().tokens)
    for slug, settings in (("compress", {"seed": 3, "sequences": 2, "length": 16}), ("eval", {"seed": 3})):
        entry = get_method(slug)
        opening = Opening(entry, {next(iter(entry.signature.inputs)): NANO_LLAMA, **settings})
        opened = {name: opening(entry.signature.inputs[name]) for name in entry.signature.inputs if name != "plan"}
        windows.append(opened["test"].tokens)
    assert all(torch.equal(each, windows[0]) for each in windows)


def test_windows_of_a_test_are_set_where_nothing_else_reads_text() -> None:
    entry = get_method("eval")
    opening = Opening(entry, {"model": NANO_LLAMA, "sequences": 2, "length": 16})
    assert [opening(entry.signature.inputs[name]) for name in ("model", "test")][1].tokens.shape == (2, 16)
