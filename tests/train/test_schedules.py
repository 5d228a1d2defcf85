"""Learning rates: the paper's formulas at the ends of all phases, continuous, and never 0 at the beginning."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from lamella.errors import TrainingError
from lamella.train import (
    Constant,
    Cosine,
    Infinite,
    Schedule,
    StepDecay,
    constant,
    infinite,
    rewarm,
    step_decay,
    warmup_stable_decay,
)

HIGH, CONST, LOW = 3e-4, 1.65e-4, 3e-5  # of the paper's 405M models
EXACT = 1e-12


def near(value: float) -> object:
    return pytest.approx(value, rel=EXACT, abs=EXACT * LOW)


def test_rewarming_follows_its_formula_at_every_step() -> None:
    schedule = Cosine(HIGH, LOW, warmup=10, end=1000)
    for t in range(1, 1001):
        warming = HIGH * t / 10
        falling = LOW + (HIGH - LOW) / 2 * (1 + math.cos(math.pi * (t - 10) / 990))
        assert schedule(t) == near(warming if t <= 10 else falling)
    assert (schedule(10), schedule(1000), schedule(5000)) == (near(HIGH), near(LOW), near(LOW))
    assert schedule(505) == near((HIGH + LOW) / 2)


def test_a_cosine_that_is_cut_off_at_its_floor_is_another_curve() -> None:
    ours = Cosine(HIGH, LOW, 0, 1000)
    clamped = [max(HIGH / 2 * (1 + math.cos(math.pi * t / 1000)), LOW) for t in (500, 900)]
    assert [ours(500), ours(900)] != pytest.approx(clamped, rel=0.05)


@pytest.mark.parametrize("cooldown", ["cosine", "invsqrt"])
def test_infinite_has_the_papers_values_where_its_phases_end(cooldown: str) -> None:
    schedule = Infinite(HIGH, CONST, LOW, 10, 600, 850, 1000, cooldown)  # type: ignore[arg-type]
    at = {1: HIGH / 10, 10: HIGH, 600: CONST, 725: CONST, 850: CONST, 1000: LOW, 2000: LOW}
    assert {t: schedule(t) for t in at} == {t: near(rate) for t, rate in at.items()}
    assert schedule(925) == near(math.sqrt(CONST * LOW))  # half way down an exponential
    middle = (HIGH + CONST) / 2
    if cooldown == "invsqrt":
        middle = HIGH + (CONST - HIGH) * ((1 / math.sqrt(6)) - 1) / ((1 / math.sqrt(11)) - 1)
    assert schedule(305) == near(middle)


SHAPES = {
    "cosine": Cosine(HIGH, LOW, 10, 1000),
    "infinite": Infinite(HIGH, CONST, LOW, 10, 600, 850, 1000),
    "inverse square root": Infinite(HIGH, CONST, LOW, 10, 600, 850, 1000, "invsqrt"),
    "endless": Infinite(HIGH, CONST, LOW, 10, 600),
    "warm-up-stable-decay": Infinite(HIGH, HIGH, LOW, 10, 10, 850, 1000),
    "constant": Constant(HIGH, 10),
}


@pytest.mark.parametrize("schedule", SHAPES.values(), ids=SHAPES)
def test_rates_are_continuous_and_monotone_in_each_phase(schedule: Schedule) -> None:
    rates = [schedule(t) for t in range(1, 1200)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[9:]))


def former(schedule: Schedule, t: int) -> float:
    """The rate at step t, written out phase by phase."""
    s = vars(schedule)

    def cosine(begin: int, end: int, low: float) -> float:
        x = (min(t, end) - begin) / (end - begin) if end > begin else 1.0
        return low + (s["high"] - low) / 2 * (1 + math.cos(math.pi * x))

    if t <= s["warmup"]:
        return s["high"] * t / max(s["warmup"], 1)
    match schedule:
        case Constant():
            return s["high"]
        case Cosine():
            return cosine(s["warmup"], s["end"], s["low"])
        case StepDecay():
            return s["high"] if t <= s["until"] else s["low"]
    if t <= s["cooled"] and s["cooldown"] == "cosine":
        return cosine(s["warmup"], s["cooled"], s["const"])
    if t <= s["cooled"]:
        x, a = (t - s["warmup"]) / (s["cooled"] - s["warmup"]), s["timescale"]
        return s["high"] + (s["const"] - s["high"]) * (1 / math.sqrt(1 + a * x) - 1) / (1 / math.sqrt(1 + a) - 1)
    if s["anneal"] in (None, s["end"]) or t <= s["anneal"]:
        return s["const"]
    return s["const"] * (s["low"] / s["const"]) ** ((min(t, s["end"]) - s["anneal"]) / (s["end"] - s["anneal"]))


EDGES = {
    "a cosine to 0 without warm-up": Cosine(HIGH, 0.0, 0, 50),
    "a cosine of no steps": Cosine(HIGH, LOW, 20, 20),
    "a rate of 0": Cosine(0.0, 0.0, 2, 20),
    "constant from the first step": Constant(HIGH),
    "stepped": StepDecay(HIGH, LOW, 5, 30),
    "stepped at once": StepDecay(HIGH, LOW, 0, 0),
    "stepped where the warm-up ends": StepDecay(HIGH, LOW, 5, 5),
    "cooled where the warm-up ends": Infinite(HIGH, CONST, LOW, 10, 10),
    "cooled by a root where the warm-up ends": Infinite(HIGH, CONST, LOW, 10, 10, cooldown="invsqrt"),
    "no warm-up, no anneal": Infinite(HIGH, CONST, LOW, 0, 40, 80, 80, "invsqrt", 3.0),
}


@pytest.mark.parametrize("schedule", (SHAPES | EDGES).values(), ids=SHAPES | EDGES)
def test_every_rate_is_that_of_the_formula(schedule: Schedule) -> None:
    assert [schedule(t) for t in range(1, 1200)] == [near(former(schedule, t)) for t in range(1, 1200)]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Constant(HIGH, 10), "constant_with_warmup", {}),
        (Cosine(HIGH, LOW, 10, 1000), "cosine_with_min_lr", {"min_lr_rate": LOW / HIGH}),
        (Cosine(HIGH, 0.0, 0, 1000), "cosine", {}),
    ],
)
def test_rates_are_those_of_transformers_a_step_earlier(
    ours: Constant | Cosine, theirs: str, options: dict[str, float]
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], HIGH)
    scheduler = get_scheduler(theirs, optimizer, ours.warmup, 1000, options)
    for t in range(1, 1001):
        optimizer.step()
        scheduler.step()
        assert ours(t) == near(scheduler.get_last_lr()[0])


def stretched(schedule: Schedule, by: int) -> Schedule:
    """The same curve over more steps."""
    ends = ("warmup", "cooled", "anneal", "end")
    return replace(schedule, **{name: each * by for name, each in vars(schedule).items() if name in ends and each})


@pytest.mark.parametrize("schedule", SHAPES.values(), ids=SHAPES)
def test_there_is_no_jump_where_one_phase_ends(schedule: Schedule) -> None:
    """The largest change from step to step shrinks as the same curve is drawn with more steps; a jump would stay."""
    long = stretched(schedule, 100)
    largest = max(abs(a - b) for a, b in pairwise(long(t) for t in range(1, 120_000)))
    assert largest <= HIGH / 1000 * (1 + 1e-9)  # the warm-up's own steps


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_no_schedule_begins_with_rate_0(warmup: int) -> None:
    for schedule in (Cosine(HIGH, LOW, warmup, 100), Infinite(HIGH, CONST, LOW, warmup, 60), Constant(HIGH, warmup)):
        assert schedule(0) == schedule(1) >= HIGH / 7 or warmup == 0
        assert schedule(0) > LOW


def test_without_cool_down_it_is_warm_up_stable_decay() -> None:
    schedule = warmup_stable_decay(1000, HIGH)
    assert {schedule(t) for t in range(10, 851)} == {HIGH}
    assert schedule(1000) == near(HIGH / 10)
    assert schedule(925) == near(HIGH * math.sqrt(0.1))


def test_a_stepped_rate_is_high_up_to_its_step_and_a_tenth_behind_it() -> None:
    schedule = step_decay(1100, HIGH)
    assert {schedule(t) for t in range(1, 1001)} == {HIGH}
    assert all(schedule(t) == near(HIGH / 10) for t in range(1001, 1200))
    assert step_decay(100, HIGH, warmup=0.1)(5) == near(HIGH / 2)


def test_an_anneal_of_no_steps_is_none() -> None:
    without, none = Infinite(HIGH, CONST, LOW, 10, 600), Infinite(HIGH, CONST, LOW, 10, 600, 1000, 1000)
    assert all(none(t) == without(t) for t in range(1, 1500))
    assert without(10**9) == CONST


def test_a_later_run_goes_on_where_the_earlier_one_stopped() -> None:
    whole = SHAPES["inverse square root"]
    later = whole.after(400)
    assert [later(t) for t in range(1, 700)] == [whole(t) for t in range(401, 1100)]
    assert later(0) == whole(401)
    assert later.as_dict() == {**whole.as_dict(), "done": 400}
    assert whole.after(0) is whole


def test_named_recipes_hold_the_papers_constants() -> None:
    for made, named in ((rewarm(1000, HIGH), SHAPES["cosine"]), (infinite(1000, HIGH), SHAPES["infinite"])):
        ours, theirs = made.as_dict(), named.as_dict()
        assert ours == {name: near(each) if isinstance(each, float) else each for name, each in theirs.items()}
    assert infinite(1000, HIGH, anneal=None, cooldown="invsqrt").anneal is None
    assert constant(1000, HIGH) == Constant(HIGH, 10)
    for make in (rewarm, infinite, warmup_stable_decay, constant, step_decay):
        assert make(1, HIGH)(1) == HIGH  # the shortest run
        assert json.loads(json.dumps(make(7, HIGH).as_dict())) == make(7, HIGH).as_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(HIGH, LOW, 20, 10), "end at steps 20, 10: give them in ascending order"),
        (lambda: Cosine(LOW, HIGH, 1, 10), "give ascending rates from 0"),
        (lambda: Cosine(math.inf, LOW, 1, 10), "give ascending rates from 0"),
        (lambda: Infinite(HIGH, CONST, LOW, 10, 5), "give them in ascending order"),
        (lambda: Infinite(HIGH, CONST, LOW, 1, 5, 7), "both the start and the end"),
        (lambda: Infinite(HIGH, CONST, 0.0, 1, 5), "give positive numbers"),
        (lambda: Infinite(HIGH, CONST, LOW, 1, 5, cooldown="line"), "cosine or invsqrt"),  # type: ignore[arg-type]
        (lambda: Constant(-1.0), "give ascending rates from 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as error:
        make()  # type: ignore[operator]
    assert "\n" not in str(error.value)
