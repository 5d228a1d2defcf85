"""Continual pre-training: what each stage replays, keeps and measures, and that annealed branches stay branches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamella.errors import MethodError, TrainingError
from lamella.files import Work
from lamella.methods.continual_pretrain import TRAINING, ContinualDataset, ContinualPretrainer
from lamella.methods.continual_pretrain import continual_pretrain as pretrain
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import (
    Cosine,
    Healed,
    Infinite,
    Order,
    TrainConfig,
    blocks,
    collate,
    mean_loss,
    response_loss,
    rewarm,
)
from lamella.zoo.nano import nano


def dataset(name: str, seed: int, letters: int = 8, low: int = 3) -> ContinualDataset:
    """Rows that repeat a short random word, of few letters from ``low`` on."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(low, low + letters, (24, 4), generator=generator)
    samples = blocks(words.repeat(1, 3), loss_on="all")
    return ContinualDataset(name, samples[:18], samples[18:])


A, B, C = dataset("a", 0), dataset("b", 1, low=40), dataset("c", 2, low=80)
RUN: dict[str, Any] = {"lr": 1e-2, "batch": 4, "eval_every": 5}


def configured(options: dict[str, Any]) -> dict[str, Any]:
    """Options, those of a config in one."""
    names = {each.name for each in fields(TrainConfig)} & options.keys()
    config = replace(TRAINING, **{name: options[name] for name in names})
    return {"config": config, **{name: each for name, each in options.items() if name not in names}}


def runner(out: Path, **options: Any) -> ContinualPretrainer:
    return ContinualPretrainer(Stack(nano("llama")), out=out, **configured(RUN | options))


def continual_pretrain(stack: Stack, samples: Any, plan: Plan | None = None, **options: Any) -> Healed:
    return pretrain(stack, samples, plan, **configured(options))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rates(stage: Any) -> dict[str, Any]:
    return stage.log.settings["schedule"]


def test_every_dataset_seen_so_far_is_measured_at_every_point(tmp_path: Path) -> None:
    run = runner(tmp_path, replay=0.25)
    for each, steps in ((A, 10), (B, 10), (C, 5)):
        run.fit(each, steps)
    first, second, third = run.curves.stages
    assert [set(stage.log.held_out[0].parts) for stage in (first, second, third)] == [
        {"a"},
        {"a", "b"},
        {"a", "b", "c"},
    ]
    assert [step for step, _ in run.curves.of("a")] == [0, 5, 10, 10, 15, 20, 20, 25]
    assert (second.start, second.end, run.steps) == (10, 20, 25)
    for name, each in {"a": A, "b": B, "c": C}.items():
        assert run.curves.of(name)[-1][1] == pytest.approx(mean_loss(run.model, each.held_out, batch=4), abs=1e-5)


def test_curves_are_what_they_say(tmp_path: Path) -> None:
    run = runner(tmp_path, replay=0)
    run.fit(A, 15)
    after_a = run.curves.of("a")[-1][1]
    run.fit(B, 15)
    a, b = (mean_loss(run.model, each.held_out) for each in (A, B))
    assert run.curves.forgetting() == {"a": pytest.approx(a - after_a, abs=1e-5)}
    before_b = next(loss for step, loss in run.curves.of("b") if step == 15)
    assert run.curves.adaptation()["b"] == pytest.approx(before_b - b, abs=1e-5)
    assert run.curves.average() == pytest.approx((a + b) / 2, abs=1e-5)
    curve = [loss for step, loss in run.curves.of("a") if step >= 15]
    assert run.curves.spike("a") == pytest.approx(max(curve[0], *curve[2:]) / curve[0] - 1, abs=1e-3)
    assert run.curves.forgetting()["a"] > 0 and run.curves.adaptation()["b"] > 0.5


def test_replay_lessens_forgetting(tmp_path: Path) -> None:
    lost = {}
    for fraction in (0.0, 0.25, 0.5):
        run = runner(tmp_path / str(fraction), replay=fraction, eval_every=20)
        run.fit(A, 10)
        run.fit(B, 10)
        lost[fraction] = run.curves.forgetting()["a"]
    assert lost[0.0] > lost[0.25] > lost[0.5]


def test_what_is_replayed_was_consumed_and_the_past_follows_the_recurrence(tmp_path: Path) -> None:
    run = runner(tmp_path, replay=0.5)
    for each, steps in ((A, 3), (B, 4), (C, 5)):
        run.fit(each, steps)
    # 12 of a; then 16, half of them a again; then 20, half of them from the past
    assert run.mixture == {
        "a": pytest.approx((12 + 8 + 10 * 20 / 28) / 48),
        "b": pytest.approx((8 + 10 * 8 / 28) / 48),
        "c": pytest.approx(10 / 48),
    }
    consumed: dict[str, set[int]] = {}
    orders = []
    for stage in run.curves.stages:
        file = stage.folder / "replay.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        assert all(number in consumed[source] for _, source, number in rows)
        assert len(rows) + len(stage.consumed) == 4 * (stage.end - stage.start)
        assert len(rows) == (0 if stage.name == "a" else 2 * (stage.end - stage.start))  # alpha B is a whole number
        consumed[stage.name] = set(stage.consumed)
        orders.append([number for _, source, number in rows if source == "a"])
    assert len(consumed["a"]) == 12 < len(A.samples)
    assert orders[1][:4] != orders[2][:4]
    assert run.curves.stages[0].consumed == Order(A.samples, 3, 4, 0).consumed


@pytest.mark.parametrize(("schedule", "keeps"), [("rewarm", False), ("infinite", True)])
def test_the_optimizer_is_reset_where_the_schedule_starts_anew_and_kept_where_it_goes_on(
    schedule: Any, keeps: bool, tmp_path: Path
) -> None:
    runs = {}
    for reset in (None, True, False):
        run = runner(tmp_path / str(reset), schedule=schedule, reset_optimizer=reset, replay=0)
        for each in (A, B):
            run.fit(each, 5)
        runs[reset] = weights(run.model)
        assert (run.curves.stages[1].log.settings["optimizer"] is None) == (not keeps if reset is None else reset)
    assert same(runs[None], runs[not keeps]) and not same(runs[True], runs[False])


def test_rewarming_starts_anew_and_an_infinite_schedule_goes_on(tmp_path: Path) -> None:
    again = runner(tmp_path / "rewarm", replay=0)
    assert [rates(again.fit(each, steps)) for each, steps in ((A, 10), (B, 5))] == [
        rewarm(10, 1e-2).as_dict(),
        rewarm(5, 1e-2).as_dict(),
    ]
    endless = runner(tmp_path / "infinite", schedule="infinite", replay=0)
    for each, steps in ((A, 10), (B, 5)):
        endless.fit(each, steps, log_every=1)
    logged = [point.lr for stage in endless.curves.stages for point in stage.log.train]
    schedule = Infinite(1e-2, 5.5e-3, 1e-3, 1, 6)
    assert logged == pytest.approx([schedule(t) for t in range(1, 16)], rel=1e-12)
    own = runner(tmp_path / "own", schedule=lambda steps: Cosine(1e-2, 0.0, 2, steps), replay=0)
    assert rates(own.fit(A, 7)) == Cosine(1e-2, 0.0, 2, 7).as_dict()


def test_an_annealed_branch_does_not_touch_the_run(tmp_path: Path) -> None:
    """With a branch taken in between, the next stage is bitwise the same as without."""
    results = {}
    for anneals in (False, True):
        run = runner(tmp_path / str(anneals), schedule="infinite", replay=0.25)
        run.fit(A, 10)
        before = weights(run.model)
        if anneals:
            branch = run.anneal(6, log_every=1)
            assert same(weights(run.model), before) and not same(weights(branch.stack.model), before)
            schedule = Infinite(1e-2, 5.5e-3, 1e-3, 1, 6, 10, 16)
            assert [p.lr for p in branch.log.train] == pytest.approx([schedule(t) for t in range(11, 17)], rel=1e-12)
            assert branch.log.train[-1].lr == pytest.approx(1e-3, rel=1e-12)
            assert branch.log.held_out[0].parts == run.curves.last.parts
            saved = load_file(run.curves.stages[-1].folder / "checkpoint-10" / "trained.safetensors")
            assert same(saved, before)
        run.fit(B, 10)
        results[anneals] = weights(run.model)
    assert same(results[False], results[True])


def test_only_what_goes_on_can_be_annealed_and_only_after_its_cool_down(tmp_path: Path) -> None:
    run = runner(tmp_path / "rewarm")
    run.fit(A, 2)
    with pytest.raises(TrainingError, match="only an infinite schedule"):
        run.anneal(2)
    early = runner(tmp_path / "early", schedule=Infinite(1e-2, 5e-3, 1e-3, 1, 8))
    with pytest.raises(TrainingError, match="after its first dataset"):
        early.anneal(2)
    early.fit(A, 4)
    with pytest.raises(TrainingError, match="cool-down lasts to step 8"):
        early.anneal(2)


def test_a_dataset_that_comes_back_goes_on_in_its_order(tmp_path: Path) -> None:
    run = runner(tmp_path, schedule="infinite", replay=0)
    run.fit(A, 3)
    run.fit(A, 4)
    whole = Order(A.samples, 7, 4, 0).consumed
    assert run.curves.stages[0].consumed + run.curves.stages[1].consumed == whole


def test_auto_replay_follows_the_measured_shift(tmp_path: Path) -> None:
    decisions = {}
    for name, second in {"weak": dataset("a too", 3), "strong": B}.items():
        run = runner(tmp_path / name, eval_every=20)
        run.fit(A, 15)
        losses = [mean_loss(run.model, each.held_out) for each in (second, A)]
        stage = run.fit(second, 2)
        assert stage.shift == pytest.approx(losses, abs=1e-5)
        decisions[name] = stage.replayed
    assert decisions == {"weak": 0.05, "strong": 0.25}
    bare = runner(tmp_path / "bare")
    bare.fit(A, 1)
    with pytest.raises(TrainingError, match="give each dataset some"):
        bare.fit(ContinualDataset("b", B.samples), 1)


def test_a_killed_run_of_several_stages_goes_on_to_the_bit(tmp_path: Path) -> None:
    def whole(out: Path, kill: Callable[[ContinualPretrainer], None] | None = None) -> dict[str, Tensor]:
        run = runner(out, schedule="infinite", replay="auto")
        run.fit(A, 6)
        run.anneal(2)
        if kill:
            kill(run)
        run.fit(B, 6)
        return weights(run.model)

    def kill(run: ContinualPretrainer) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        run.model.model.layers[1].forward = broken

    expected = whole(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "cut", kill)
    assert same(whole(tmp_path / "cut"), expected)


def test_pre_training_data_that_is_remembered_can_be_replayed(tmp_path: Path) -> None:
    run = runner(tmp_path, replay=0.5)
    run.remember(A, samples=300)
    run.remember(C, samples=100)
    assert run.mixture == {"a": 0.75, "c": 0.25}
    stage = run.fit(B, 20)
    rows = json.loads((stage.folder / "replay.json").read_text())["rows"]
    assert {source for _, source, _ in rows} == {"a", "c"} and len(rows) == 40
    assert set(run.curves.forgetting()) == {"a", "c"}


DROP = ["layers.1.mlp", "layers.2"]


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize(
    "decision",
    [{"drop": DROP}, {"path": {"text": PhasedPath(prefill=[0, 2, 1, 3], decode=[0, 2, 1, 3])}}],
    ids=["cut", "moved"],
)
def test_a_plan_is_healed_as_it_is_served(decision: dict[str, Any], lora: int | None, tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = Plan(model=ModelReference.of(stack), **decision)
    before = weights(stack.model)
    options = {"steps": 15, "lr": 1e-2, "work": Work(tmp_path), "held_out": {"new": A.held_out}}
    healed = continual_pretrain(stack, A.samples, plan, lora=lora, **options)
    assert same(weights(stack.model), before) and healed.plan is plan
    assert weights(healed.stack.model).keys() == before.keys()  # adapters are merged and gone
    old, new = (mean_loss(apply(each, plan), A.held_out) for each in (stack, healed.stack))
    assert new == pytest.approx(healed.log.held_out[-1].loss, abs=1e-4)
    assert new < old - 0.5


def test_what_is_forgotten_shows_without_replay(tmp_path: Path) -> None:
    held_out = {"new": B.held_out, "old": A.held_out}
    options = {"steps": 4, "lr": 1e-2, "eval_every": 2, "held_out": held_out, "work": Work(tmp_path)}
    healed = continual_pretrain(Stack(nano("llama")), B.samples, **options)
    points = healed.log.held_out
    assert [set(point.parts) for point in points] == [{"new", "old"}] * 3
    for name, samples in held_out.items():
        assert points[-1].parts[name] == pytest.approx(mean_loss(healed.stack.model, samples), abs=1e-4)
    again = continual_pretrain(Stack(nano("llama")), B.samples, **options)  # a finished run is read, not trained again
    assert again.log == healed.log


def test_a_layer_that_runs_twice_is_healed_once(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    again = [0, 1, 1, 2, 3]
    plan = Plan(model=ModelReference.of(stack), path={"text": PhasedPath(prefill=again, decode=again)})
    healed = continual_pretrain(
        stack, A.samples, plan, steps=10, lr=1e-2, work=Work(tmp_path), held_out={"new": A.held_out}
    )
    assert mean_loss(apply(healed.stack, plan), A.held_out) == pytest.approx(healed.log.held_out[-1].loss, abs=1e-5)
    with pytest.raises(TrainingError, match="the adapters of a layer that runs twice would differ"):
        continual_pretrain(stack, A.samples, plan, steps=1, lora=4)


def test_what_a_plan_does_not_run_is_not_trained() -> None:
    stack = Stack(nano("llama"))
    healed = continual_pretrain(stack, A.samples, Plan(model=ModelReference.of(stack), drop=DROP), steps=3, lr=1e-2)
    before, after = weights(stack.model), weights(healed.stack.model)
    left = {name for name in before if torch.equal(before[name], after[name])}
    gone = {name for name in before if name.startswith(("model.layers.2.", "model.layers.1.mlp."))}
    assert gone <= left and not any("layers.0" in name for name in left)


def test_one_infinite_run_ends_with_its_anneal_and_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    healed = continual_pretrain(
        Stack(nano("llama")), A.samples, schedule="infinite", steps=20, lr=1e-2, work=Work(tmp_path),
        held_out={"new": A.held_out}, eval_every=1,
    )  # fmt: skip
    assert [point.step for point in healed.log.held_out] == list(range(21))
    assert healed.log.train[-1].lr == pytest.approx(1e-3, rel=1e-12)
    assert (tmp_path / "1-new" / "checkpoint-17" / "trained.safetensors").exists()


def test_without_past_or_with_alpha_0_it_is_plain_training(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plain = continual_pretrain(stack, A.samples, steps=5)
    zero = continual_pretrain(stack, A.samples, steps=5, past=B.samples, replay=0.0)
    some = continual_pretrain(stack, A.samples, steps=5, past=B.samples, replay=0.25)
    first, second, third = (weights(each.stack.model) for each in (plain, zero, some))
    assert same(first, second) and not same(first, third)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": 0.1}, "needs past data"),
        ({"schedule": "sideways"}, "choose one of rewarm, infinite, wsd, cosine, constant"),
        ({"schedule": "infinite", "steps": 1}, "need at least 2"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        continual_pretrain(Stack(nano("llama")), A.samples, **options)


def test_nothing_can_be_read_before_anything_was_trained(tmp_path: Path) -> None:
    run = runner(tmp_path)
    for ask in (run.healed, run.curves.average):
        with pytest.raises(TrainingError):
            ask()


def test_mean_loss_weighs_by_labels_and_leaves_the_mode() -> None:
    model = nano("llama")
    ragged = [*A.samples[:2], *blocks(torch.arange(3, 9)[None])]
    whole = response_loss(model, collate(ragged)).item()
    assert mean_loss(model, ragged, batch=2) == pytest.approx(whole, abs=1e-5)
    assert not model.training
