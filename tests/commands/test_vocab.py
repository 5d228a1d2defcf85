"""The choice of tokens: what is kept, what it costs, and what other commands do with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamella
from lamella.commands.vocab import covering, within
from lamella.data import load_text
from lamella.errors import LamellaError, MethodError, PlanError
from lamella.plan import Plan, PlanSeries
from lamella.plan.tokenizer import Merges, cut_tokenizer, settings_of
from lamella.planners import planner
from lamella.zoo import open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
SMALL = {"sequences": 2, "length": 32}
TOKENIZER = open_tokenizer(NANO_LLAMA)
MERGES = Merges(settings_of(TOKENIZER))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocab") / "tokens"
    lamella.run("vocab", NANO_LLAMA, "pydoc", coverage=(0.9, 1.0, 0.5), out=out, **SMALL)
    return out


def test_each_plan_covers_its_share_of_the_text(chosen: Path) -> None:
    series = PlanSeries.read(chosen)
    ids = TOKENIZER(load_text("pydoc", "calibration"), add_special_tokens=False, verbose=False)["input_ids"]
    counts = Counter(ids)
    assert series[0].vocab is None and series.points[0].scores["coverage"] == 1
    for plan, point, share in zip(list(series)[1:], series.points[1:], (1.0, 0.9, 0.5), strict=True):
        covered = sum(counts[token] for token in plan.vocab or ()) / len(ids)
        assert covered == point.scores["coverage"] >= share
        assert MERGES.closed(plan.vocab or ()) == plan.vocab
    sizes = [point.scores["tokens"] for point in series.points]
    losses = [point.scores["loss"] for point in series.points]
    assert sizes == sorted(sizes, reverse=True) and losses[1] <= losses[0] and losses[1] < losses[-1]


def test_fewer_tokens_would_not_cover_the_share() -> None:
    counts = Counter({300: 5, 400: 3, 500: 2})
    order = sorted(range(512), key=lambda token: (-counts[token], token))
    assert covering(MERGES, order, counts, 0.5) == MERGES.closed([300])
    assert covering(MERGES, order, counts, 0.51) == MERGES.closed([300, 400])
    assert covering(MERGES, order, counts, 1.0) == MERGES.closed([300, 400, 500])


@pytest.mark.parametrize("number", [259, 300, 512, 600])
def test_at_most_this_many_tokens_are_kept(number: int) -> None:
    kept = within(MERGES, range(512), number)
    assert MERGES.closed(kept) == kept and min(number, 512) - 3 <= len(kept) <= number


def test_fewer_tokens_than_every_text_needs_are_refused() -> None:
    with pytest.raises(PlanError, match="keep 258: bytes and special tokens alone are 259 tokens: keep more"):
        lamella.run("vocab", NANO_LLAMA, "pydoc", keep=(258,), **SMALL)


def test_a_budget_chooses_a_plan() -> None:
    result = lamella.run("vocab", NANO_LLAMA, "pydoc", coverage=(1.0, 0.9, 0.5), parameters=0.99, **SMALL).result
    shares = [point.scores["parameters"] for point in result.points]
    assert shares[result.chosen] <= 0.99 < shares[result.chosen - 1]


def test_models_with_different_tokens_are_compared_by_their_loss_per_byte(chosen: Path, tmp_path: Path) -> None:
    lamella.run("apply", chosen / "plan.json", NANO_LLAMA, out=tmp_path / "smaller")
    outcome = lamella.run(
        "eval", NANO_LLAMA, "stdlib", changed=[str(chosen / "plan.json"), str(tmp_path / "smaller")], **SMALL
    )
    found = outcome.evidence.findings["per_byte"]
    whole, plan, folder = found.values()
    assert plan["loss"] == folder["loss"] and plan["length"] > whole["length"] and plan["bytes"] == whole["bytes"]
    assert plan["difference"]["mean"] == pytest.approx(plan["loss"]["mean"] - whole["loss"]["mean"])
    assert "nats per byte" in str(outcome.summary.tables[0].columns)
    same = lamella.run("eval", NANO_LLAMA, "stdlib", changed=[str(NANO_LLAMA)], **SMALL)
    assert "results" in same.evidence.findings


def test_the_smaller_model_is_an_ordinary_one_and_can_be_healed(chosen: Path, tmp_path: Path) -> None:
    lamella.run("apply", chosen / "plan.json", NANO_LLAMA, out=tmp_path / "smaller")
    plan = Plan.read(chosen)
    assert json.loads((tmp_path / "smaller" / "config.json").read_text())["vocab_size"] == len(plan.vocab or ())
    healed = lamella.run(
        "heal", tmp_path / "smaller", "pydoc", steps=1, sequences=8, length=16, out=tmp_path / "healed"
    )
    assert healed.evidence.model["name"] == "smaller"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "healed")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path / "healed").config.vocab_size


def test_chat_speaks_the_tokens_of_a_plan(lamella: Any, chosen: Path, tmp_path: Path) -> None:
    lamella("apply", chosen, NANO_LLAMA, "-o", tmp_path / "smaller")
    arguments = ["--prompt", "The first", "--tokens", "8", "--json"]
    exported, viewed = (
        json.loads(lamella("chat", *given, *arguments).out)["messages"]
        for given in ([tmp_path / "smaller"], [NANO_LLAMA, "--plan", chosen / "plan.json"])
    )
    assert exported == viewed and viewed[1]["content"]


@pytest.mark.parametrize("command", ["heal", "compress"])
def test_commands_on_tokens_of_the_original_refuse_the_plan(command: str, chosen: Path) -> None:
    with pytest.raises(MethodError, match=f"{command}: the plan keeps some tokens only .* give it to {command}"):
        lamella.run(command, NANO_LLAMA, "pydoc", plan=chosen, **SMALL)


def test_it_is_no_planner_of_compress() -> None:
    with pytest.raises(MethodError, match="vocab is a command by itself: run `lamella vocab`"):
        planner("vocab")


def test_images_are_refused_as_a_test() -> None:
    with pytest.raises(LamellaError):
        lamella.run("vocab", NANO_LLAMA, "pydoc", test="shapes:caption", **SMALL)


@pytest.mark.slow
def test_smollm2_keeps_its_predictions_on_the_text_that_was_counted(tmp_path: Path) -> None:
    series = lamella.run("vocab", "smollm2", "general", coverage=(1.0,), sequences=1, length=64).result
    plan, stack, tokenizer = series[-1], lamella.open("smollm2"), open_tokenizer("smollm2")
    text = load_text("general", "calibration").tokenized_by(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    smaller = cut_tokenizer(tokenizer, plan.vocab)
    new = smaller(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert [plan.vocab[token] for token in new] == ids
    series.write(tmp_path / "series.json")
    lamella.run("apply", tmp_path / "series.json", "smollm2", out=tmp_path / "out", out_of_core=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = stack.model(input_ids=torch.tensor([ids[:64]])).logits[..., plan.vocab]
        found = exported(input_ids=torch.tensor([new[:64]])).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert sum(each.numel() for each in exported.parameters()) < 0.86 * sum(p.numel() for p in stack.model.parameters())
