"""Drafts: the predicted gain is that of a simulation, training raises the accept rate, other tools take the result."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lamella
from lamella.commands.draft import own_text
from lamella.errors import MethodError
from lamella.evaluate.drafting import pass_costs, predicted_gain
from lamella.files import Work
from lamella.train import TrainedEvidence
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
BRIEF: dict[str, Any] = {"remove": (0.34,), "steps": 60, "sequences": 16, "length": 64, "prompts": 1}


@pytest.mark.parametrize(("accepted", "step"), [(0.9, 0.1), (0.6, 0.3), (0.2, 0.5)])
def test_the_predicted_gain_is_that_of_a_simulation(accepted: float, step: float) -> None:
    passes = [1.0, 1.05, 1.1, 1.2, 1.4]
    drawn = random.Random(0)

    def simulated(proposed: int) -> float:
        tokens = seconds = 0.0
        for _ in range(40_000):
            kept = next((n for n in range(proposed) if drawn.random() >= accepted), proposed)
            tokens, seconds = tokens + kept + 1, seconds + proposed * step + passes[proposed]
        return tokens / seconds

    gains = {proposed: simulated(proposed) for proposed in range(1, len(passes))}
    best, gain = predicted_gain(accepted, step, passes)
    assert gain == pytest.approx(max(gains.values()), rel=0.02)
    assert gains[best] == pytest.approx(max(gains.values()), rel=0.02)


def test_passes_are_relative_to_one_token() -> None:
    found = pass_costs(nano("llama"), 3)
    assert len(found) == 4 and found[0] == 1 and all(each > 0 for each in found)


def test_the_target_writes_what_follows_and_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = lamella.open(NANO_LLAMA)
    tokens = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    alone = own_text(target, tokens[1:2], 1, Work())
    work = Work(tmp_path)
    found = own_text(target, tokens, 0, work)
    assert found.shape == tokens.shape and torch.equal(found[:, :4], tokens[:, :4])
    assert torch.equal(found[1:2], alone)  # each row has its own seed
    assert not torch.equal(found, tokens)
    monkeypatch.setattr("lamella.commands.draft.decode", None)
    assert torch.equal(own_text(target, tokens, 0, work), found)


def test_a_draft_is_accepted_more_often_and_runs_in_transformers(tmp_path: Path) -> None:
    target = lamella.open(NANO_LLAMA)
    before = target.model.generation_config.to_dict()
    result = lamella.run("draft", NANO_LLAMA, target=NANO_LLAMA, out=tmp_path / "draft", **BRIEF)
    found = result.evidence.findings
    trained = next(row for row in found["rows"] if row["form"] == "")
    assert trained["accepted"] > found["before"] and trained["layers"] == 2 and found["trained"]
    gains = [each for kinds in found["gains"].values() for rows in kinds.values() for each in rows]
    assert gains and all(each["equal"] or each["tied"] for each in gains)
    assert target.model.generation_config.to_dict() == before

    draft: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft.config.num_hidden_layers == len(target) - 2
    assert draft.generation_config.num_assistant_tokens == found["chosen"]["tokens"]
    ids, settings = torch.tensor([[5, 6, 7, 8]]), {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = target.model.generate(ids, **settings)
    assert torch.equal(target.model.generate(ids, assistant_model=draft, **settings), plain)
    evidence = TrainedEvidence.read(tmp_path / "draft")
    assert "accepts" in result.summary.verdict and evidence.kind == "draft" and evidence.curve


@pytest.mark.parametrize("learnt", [0.999, 2.0])  # stopped before training, or trained and then compared
def test_training_that_does_not_raise_the_accept_rate_is_not_kept(
    learnt: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamella.commands.draft.LEARNT", learnt)
    result = lamella.run("draft", NANO_LLAMA, target=NANO_LLAMA, out=tmp_path / "draft", **BRIEF | {"remove": (0.0,)})
    found = result.evidence.findings
    assert found["rows"][0]["accepted"] == 1 and not found["trials"] and not found["trained"]
    assert "training did not raise it" in result.summary.verdict
    whole, written = (lamella.open(each).model.state_dict() for each in (NANO_LLAMA, tmp_path / "draft"))
    assert all(torch.equal(written[name], value) for name, value in whole.items())


def test_a_target_with_other_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="other tokens"):
        lamella.run("draft", "smollm2", target=NANO_LLAMA, out=tmp_path / "draft", **BRIEF)
