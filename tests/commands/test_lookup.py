"""Prompt lookup beside routes: the same text, with what it gains, and the differences that are ties."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lamella
from lamella import formatting
from lamella.commands.compress.forms import Torch
from lamella.commands.compress.lookup import add_lookup
from lamella.commands.compress.routes import variants_of
from lamella.commands.compress.tradeoff import LOOKUP, columns, lookup, rows
from lamella.evaluate.drafting import is_tie
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime.drafting import TOKENS
from lamella.zoo import open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


def test_every_route_that_was_timed_has_the_gain_of_prompt_lookup() -> None:
    stack, tokenizer = lamella.open(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    text = lamella.load_text("pydoc", "test")
    prompts = {"a": lamella.windows(tokenizer, text, 1, 48), "b": torch.tensor([[5, 6, 7, 8] * 6])}
    dynamic = Plan(model=ModelReference.of(stack), path={"text": PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 5])})
    cut = Plan(model=ModelReference.of(stack), drop=["layers.2.mlp", "layers.3"])
    models = {"original": (stack, None), "cut": (stack, cut), "dynamic": (stack, dynamic)}
    variants = variants_of(models, Torch().shown(stack, "q8_0"))
    timed = {name: each[0].program == "torch" for name, each in variants.items()}
    routes: list[dict[str, Any]] = [{"name": name, "decode_speedup": {"median": 1.0} if timed[name] else None}
                                    for name in variants]  # fmt: skip
    add_lookup(routes, variants, prompts)
    found = {each["name"]: each["lookup"] for each in routes if "lookup" in each}
    assert list(found) == ["original", "original, int8", "cut", "cut, int8"]
    for name, each in found.items():
        assert each["texts"] == ["a", "b"] and each["candidates"] == TOKENS
        assert each["speedup"]["low"] > 0
        assert each["equal"] + each["tied"] == 2  # no difference that is more than a tie
        assert each["equal"] == 2 or "int8" in name


@pytest.mark.parametrize(("logits", "tied"), [([1.0, 2.0, 2.0], True), ([1.0, 2.0, 2.01], False)])
def test_a_difference_is_a_tie_if_rounding_explains_it(logits: list[float], tied: bool) -> None:
    class Model(torch.nn.Module):
        dtype = torch.float32

        def forward(self, ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.tensor(logits).expand(1, ids.shape[1], 3))

    assert is_tie(Model(), torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 2]]), 2) is tied


def evidence(median: float, equal: int, tied: int) -> dict[str, Any]:
    speed = {"median": median, "low": median, "high": median}
    kl = {"mean": 0.1, "error": 0.01}
    fidelity = {"kl": kl, "perplexity": kl, "top1": kl}
    route = {"name": "cut, int8", "bytes": 1, "decode_speedup": speed, "fidelity": fidelity, "form": "int8", "run": ""}
    given = {"speedup": speed, "texts": ["a", "b"], "candidates": 8, "equal": equal, "tied": tied}
    return {
        "chosen": {"cut": True, "quantised": "int8"},
        "routes": [route | {"lookup": given}, route | {"name": "cut"}],
    }


def test_what_prompt_lookup_gains_is_reported_with_every_difference() -> None:
    start = "With prompt lookup, generate(..., prompt_lookup_num_tokens=8): 1.29\u00d7 on top on a, b, "
    assert lookup(evidence(1.29, 2, 0)) == [start + "nothing lost."]
    differing = "1 of 2 answers equal those of plain greedy decoding (differing after a tie: "
    assert lookup(evidence(1.29, 1, 1)) == [start + differing + "1)."]
    assert lookup(evidence(1.29, 1, 0)) == [start + differing + "0, without one: 1)."]
    assert lookup(evidence(0.95, 2, 0)) == []  # it is in the table all the same
    found = evidence(0.95, 2, 0)
    assert columns(found)[-1] == LOOKUP
    assert [row[-1] for row in rows(found)] == ["0.95\u00d7 (0.95 to 0.95)", formatting.MISSING]
