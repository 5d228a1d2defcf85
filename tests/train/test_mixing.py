"""Replay: how much is replayed, from which data, in which order, and that nothing else changes."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella import train
from lamella.errors import TrainingError
from lamella.train import (
    Feed,
    Order,
    Replay,
    Task,
    TrainConfig,
    TrainingLog,
    blocks,
    infinite,
    past_mixture,
    response_loss,
    rewarm,
)
from lamella.zoo.nano import nano


def samples(count: int, first: int = 3) -> Any:
    """Blocks that differ: block k holds the number k in base 100."""
    rows = torch.tensor([[first, k // 100 + 3, k % 100 + 3, 5, 6, 7] for k in range(count)])
    return blocks(rows)


NEW, OLD, OLDER = samples(40, 10), samples(30, 20), samples(20, 30)


def order(fraction: float, steps: int = 50, size: int = 4, seed: int = 0, **options: Any) -> Order:
    return Order(NEW, steps, size, seed, Replay({"old": OLD}, fraction, **options))


def test_the_recurrence_gives_the_official_weights() -> None:
    """Pile 300B, then SlimPajama in two splits of 100B with 5 % replay: the weights of the authors' configs."""
    past = past_mixture({}, 0, "pile", 300, 0.05)
    assert past == {"pile": 1.0}
    past = past_mixture(past, 300, "sp1", 100, 0.05)
    shares = {name: 100 * 0.05 * share for name, share in past.items()}
    assert shares == {"pile": pytest.approx(3.8125, abs=1e-12), "sp1": pytest.approx(1.1875, abs=1e-12)}
    past = past_mixture(past, 400, "sp2", 100, 0.05)
    shares = {name: 100 * 0.05 * share for name, share in past.items()}
    assert shares == {
        "pile": pytest.approx(3.088125, abs=1e-12),
        "sp1": pytest.approx(0.961875, abs=1e-12),
        "sp2": pytest.approx(0.95, abs=1e-12),
    }
    assert sum(past.values()) == pytest.approx(1, abs=1e-12)


def test_the_past_of_a_dataset_that_comes_back_is_one_share() -> None:
    past = past_mixture({"a": 0.5, "b": 0.5}, 10, "a", 10, 0.2)
    assert past == {"a": pytest.approx(0.25 + 0.05 + 0.4), "b": pytest.approx(0.25 + 0.05)}


def test_without_replay_and_with_a_share_of_0_the_order_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(7)  # the order without replay: epochs, each reshuffled
    plain = [int(n) for _ in range(5) for n in torch.randperm(40, generator=generator)]
    assert Order(NEW, 50, 4, 7).picks == plain
    assert order(0.0, seed=7).picks == plain
    assert order(0.0).replayed == []


def test_new_data_keeps_its_order_under_replay() -> None:
    plain, mixed = Order(NEW, 50, 4, 0), order(0.3)
    assert mixed.consumed == plain.picks[: len(mixed.consumed)]
    assert len(mixed) == len(plain) and len(mixed.consumed) + len(mixed.replayed) == 200


def test_a_share_of_1_never_touches_new_data() -> None:
    mixed = order(1.0)
    assert mixed.consumed == [] and len(mixed.replayed) == 200
    assert all(int(mixed[place]["input_ids"][0]) == 20 for place in range(200))


def test_every_batch_holds_the_floor_or_one_more_and_shares_are_right_over_many_draws() -> None:
    alpha, size, steps = 0.05, 12, 100_000
    mixed = Order(NEW, steps, size, 0, Replay({"old": OLD}, alpha, seed=3))
    per_step = Counter(each.step for each in mixed.replayed)
    counts = [per_step[step] for step in range(1, steps + 1)]
    assert set(counts) == {0, 1}
    spread = math.sqrt(0.6 * 0.4 / steps)
    assert abs(sum(counts) / steps - alpha * size) < 3 * spread
    assert len(mixed.consumed) == steps * size - sum(counts)
    assert set(Counter(each.step for each in order(0.3, size=10, steps=200).replayed).values()) == {3}


def test_sources_are_drawn_by_their_mixture() -> None:
    mixture = {"old": 0.7625, "older": 0.2375}
    replay = Replay({"old": OLD, "older": OLDER}, 0.5, mixture, seed=1)
    drawn = [each.source for each in Order(NEW, 10_000, 20, 0, replay).replayed]
    share = drawn.count("old") / len(drawn)
    assert len(drawn) == 100_000
    assert abs(share - 0.7625) < 3 * math.sqrt(0.7625 * 0.2375 / len(drawn))


def test_only_what_was_seen_is_replayed_and_all_of_it_before_any_comes_again() -> None:
    seen = Order(OLD, 4, 4, seed=5).consumed
    mixed = Order(NEW, 16, 4, 5, Replay({"old": OLD}, 0.5, seen={"old": seen}, seed=5))
    indices = [each.number for each in mixed.replayed]
    assert len(seen) == 16 and set(indices) == set(seen)
    assert set(Counter(indices).values()) == {2}
    assert indices[:16] != seen and indices[:16] != sorted(seen)  # not as the first time, though the seed is the same
    for place, pick in enumerate(mixed.picks):
        expected = NEW[pick] if isinstance(pick, int) else OLD[pick[1]]
        assert torch.equal(mixed[place]["input_ids"], expected["input_ids"])


def test_another_seed_replays_in_another_order() -> None:
    replays = [Replay({"old": OLD}, 0.5, seed=seed) for seed in (0, 1)]
    first, second = ([each.number for each in Order(NEW, 50, 4, 0, replay).replayed] for replay in replays)
    assert first != second
    assert order(0.5).picks == order(0.5).picks


def test_skipping_goes_on_in_the_order_of_the_new_data() -> None:
    whole = Order(NEW, 50, 4, 2)
    assert Order(NEW, 20, 4, 2, skip=120).picks == whole.picks[120:]


RUN: dict[str, Any] = {"steps": 12, "schedule": rewarm(12, 3e-3), "batch": 2, "save_every": 4, "log_every": 3}
REPLAY = Replay({"old": OLD}, 0.4, seen={"old": range(0, 30, 2)}, seed=9)


def fit(model: Any, samples: Any, loss: Any, *, out: Path, **options: Any) -> TrainingLog:
    """The loop with a loss, fed and with a config by those options that belong there."""
    names = [each.name for each in fields(TrainConfig)]
    config = TrainConfig(**{name: options.pop(name) for name in names if name in options})
    feed = Feed(samples, replay=options.pop("replay", None), skip=options.pop("skip", 0))
    return train.fit(model, feed, Task(loss), config, out=out, **options)


def weights(model: Any) -> list[torch.Tensor]:
    return [each.detach() for each in model.parameters()]


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_training_with_a_share_of_0_is_plain_training_bit_exactly(tmp_path: Path) -> None:
    plain, mixed, other = nano("gpt2"), nano("gpt2"), nano("gpt2")  # with dropout: the random state counts
    fit(plain, NEW, response_loss, out=tmp_path / "plain", **RUN)
    fit(mixed, NEW, response_loss, out=tmp_path / "mixed", replay=Replay({"old": OLD}, 0.0), **RUN)
    fit(other, NEW, response_loss, out=tmp_path / "other", replay=Replay({"old": OLD}, 0.5), **RUN)
    assert same(plain, mixed) and not same(plain, other)


def test_training_on_the_past_alone_does_not_depend_on_the_new_data(tmp_path: Path) -> None:
    replay = Replay({"old": OLD}, 1.0)
    ours, theirs = nano("llama"), nano("llama")
    fit(ours, NEW, response_loss, out=tmp_path / "ours", replay=replay, **RUN)
    fit(theirs, samples(40, 50), response_loss, out=tmp_path / "theirs", replay=replay, **RUN)
    assert same(ours, theirs)


@pytest.mark.parametrize("call", [2, 5, 11])
def test_an_interrupted_run_resumes_bit_exactly(call: int, tmp_path: Path) -> None:
    """Schedule, mixer and random state: interrupted before, just after and well after a checkpoint."""
    schedule = infinite(12, 3e-3)
    options = RUN | {"schedule": schedule, "replay": REPLAY, "eval_every": 2, "held_out": {"a": NEW[:3], "b": OLD}}
    whole, resumed = nano("gpt2"), nano("gpt2")
    log = fit(whole, NEW, response_loss, out=tmp_path / "whole", **options)
    calls = 0

    def interrupted(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        if calls == call:
            raise KeyboardInterrupt
        return response_loss(model, batch)

    interrupted.__qualname__ = response_loss.__qualname__
    with pytest.raises(KeyboardInterrupt):
        fit(nano("gpt2"), NEW, interrupted, out=tmp_path / "cut", **options)
    again = fit(resumed, NEW, response_loss, out=tmp_path / "cut", **options)
    assert same(whole, resumed) and again == log
    assert [point.step for point in log.held_out] == [0, 2, 4, 6, 8, 10, 12]
    assert (tmp_path / "cut" / "replay.json").read_bytes() == (tmp_path / "whole" / "replay.json").read_bytes()


def test_the_manifest_names_what_the_run_saw(tmp_path: Path) -> None:
    shown: list[int] = []

    def watching(model: Any, batch: Any) -> torch.Tensor:
        shown.extend(int(row[1] - 3) * 100 + int(row[2] - 3) for row in batch["input_ids"] if row[0] == 20)
        return response_loss(model, batch)

    fit(nano("llama"), NEW, watching, out=tmp_path, replay=REPLAY, **RUN)
    manifest = json.loads((tmp_path / "replay.json").read_text())
    assert manifest["columns"] == ["step", "source", "number"]
    assert [index for _, _, index in manifest["rows"]] == shown != []
    assert {index % 2 for index in shown} == {0}  # those that were named as seen


def test_each_held_out_set_has_a_curve_of_its_own(tmp_path: Path) -> None:
    model = nano("llama")
    log = fit(model, NEW, response_loss, out=tmp_path, held_out={"new": NEW, "old": OLD[:5]}, **RUN)
    alone = {
        name: fit(nano("llama"), NEW, response_loss, out=tmp_path / name, held_out=each, **RUN).held_out
        for name, each in {"new": NEW, "old": OLD[:5]}.items()
    }
    for point, new, old in zip(log.held_out, alone["new"], alone["old"], strict=True):
        assert point.parts == {"new": new.loss, "old": old.loss}
        assert point.loss == pytest.approx((new.loss + old.loss) / 2)


def test_the_log_holds_the_rates_of_the_schedule(tmp_path: Path) -> None:
    schedule = infinite(12, 3e-3, warmup=0.25)
    for done in (0, 5):
        options = RUN | {"schedule": schedule.after(done), "log_every": 1}
        log = fit(nano("llama"), NEW, response_loss, out=tmp_path / str(done), **options)
        assert [point.lr for point in log.train] == [schedule(done + t) for t in range(1, 13)]
        kept = TrainingLog.read(tmp_path / str(done) / "log.json").settings["schedule"]
        assert kept == schedule.after(done).as_dict() and kept["shape"] == "infinite"


def test_accumulated_batches_are_one_step_of_the_schedule_and_of_the_mixer(tmp_path: Path) -> None:
    models = []
    for batch, accumulate in ((6, 1), (2, 3)):
        models.append(nano("llama"))
        options = RUN | {"batch": batch, "accumulate": accumulate, "log_every": 1, "replay": REPLAY}
        log = fit(models[-1], NEW, response_loss, out=tmp_path / str(batch), **options)
        assert [point.lr for point in log.train] == [RUN["schedule"](t) for t in range(1, 13)]
    for ours, theirs in zip(*map(weights, models), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_kept_optimizer_makes_two_runs_one(tmp_path: Path) -> None:
    """Six steps and six more with the first run's optimizer equal twelve, bit-exactly; with a new one they do not."""
    schedule = infinite(12, 3e-3)
    whole = nano("llama")
    fit(whole, NEW, response_loss, out=tmp_path / "whole", **RUN | {"schedule": schedule})
    for keep in (True, False):
        model, half = nano("llama"), RUN | {"steps": 6, "schedule": schedule}
        first, second = tmp_path / f"{keep} 1", tmp_path / f"{keep} 2"
        fit(model, NEW, response_loss, out=first, **half)
        later = half | {"schedule": schedule.after(6), "skip": 12, "after": first if keep else None}
        fit(model, NEW, response_loss, out=second, **later)
        assert same(model, whole) == keep


def test_an_optimizer_state_of_something_else_is_refused(tmp_path: Path) -> None:
    fit(nano("llama"), NEW, response_loss, out=tmp_path / "a", trainable=lambda name: "norm" in name, **RUN)
    for folder, message in (("a", "optimizer state of other parameters"), ("no", "no checkpoint with an optimizer")):
        with pytest.raises(TrainingError, match=message):
            fit(nano("llama"), NEW, response_loss, out=tmp_path / "b", after=tmp_path / folder, **RUN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.5}, "from 0 to 1"),
        ({"samples": {}}, "give a share for each"),
        ({"samples": {"a": OLD, "b": OLD}}, "give a share for each"),
        ({"samples": {"a": OLD, "b": OLD}, "mixture": {"a": 0.5, "b": 0.6}}, "sum to 1.1"),
        ({"seen": {"old": [30]}}, "are empty or outside its 30 samples"),
        ({"seen": {"old": []}}, "are empty or outside its 30 samples"),
    ],
)
def test_replay_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Replay(**{"samples": {"old": OLD}, "fraction": 0.1, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, "omit lr and warmup"),
        ({"warmup": 0.1}, "omit lr and warmup"),
        ({"schedule": "cosine"}, "needs lr"),
        ({"eval_every": -1}, "eval_every -1: give at least 1"),
    ],
)
def test_rates_that_contradict_each_other_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(nano("llama"), NEW, response_loss, out=tmp_path, **RUN | change)


def test_a_run_with_another_replay_or_schedule_is_not_resumed(tmp_path: Path) -> None:
    fit(nano("llama"), NEW, response_loss, out=tmp_path, replay=REPLAY, **RUN)
    for change in ({"replay": Replay({"old": OLD}, 0.4, seed=9)}, {"schedule": rewarm(12, 1e-3)}):
        with pytest.raises(TrainingError, match="contains a run with"):
            fit(nano("llama"), NEW, response_loss, out=tmp_path, **RUN | {"replay": REPLAY} | change)
