"""The page of a search: the shape of the result and how far it is from the original, before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lamella
from lamella.data import load_text, windows
from lamella.evaluate import FidelityTest
from lamella.plan import PlanSeries
from lamella.runtime import apply
from lamella.zoo import open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
QUICK = {"params": 0.8, "tolerance": 0.1, "population": 4, "elites": 2, "iterations": 2, "rank": 2}


def test_the_page_has_the_shape_and_the_fidelity_of_the_best_plan(tmp_path: Path) -> None:
    done = lamella.run("tracenas", NANO_LLAMA, out=tmp_path / "out", sequences=2, length=64, **QUICK)
    stack, plan = open_stack(NANO_LLAMA), PlanSeries.read(tmp_path / "out" / "series.json")[1]
    shape, fidelity, _ = done.summary.tables
    whole = stack.config.num_attention_heads, stack.config.intermediate_size
    wanted = []
    for layer in range(len(stack)):
        heads, channels = plan.widths.heads.get(layer), plan.widths.channels.get(layer)
        widths = [whole[0] if heads is None else len(heads.keep), whole[1] if channels is None else len(channels)]
        wanted.append([layer, "", "dropped"] if f"layers.{layer}" in plan.drop else [layer, *widths])
    assert [list(row) for row in shape.rows] == wanted
    tokens = windows(open_tokenizer(NANO_LLAMA), load_text("pydoc", "test"), 2, 64, 42)  # the default seed
    with torch.no_grad():
        expected = FidelityTest(stack, tokens).of(apply(stack, plan)).as_dict()
    assert done.evidence.provenance["fidelity"]["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (shape.title, "KL from the original, nats", fidelity.rows[0][1], "<figure>"):
        assert text in page
