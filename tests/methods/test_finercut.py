"""FinerCut as the paper defines it, against loops that run the whole transformers model for every candidate."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import LongTensor, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamella
from lamella.data import load_text, windows
from lamella.errors import MethodError
from lamella.files import Work
from lamella.measure import OutputDistance
from lamella.methods import finercut as module
from lamella.methods.finercut import finercut
from lamella.plan import PlanSeries, apply_static
from lamella.search import Cost
from lamella.stack import Position, Stack, positions_of
from lamella.zoo.nano import NANO, nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
EVERY = positions_of(6)  # the sublayers of the nano Llama
Kept = frozenset[Position]


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def tokens() -> LongTensor:
    return windows(AutoTokenizer.from_pretrained(NANO_LLAMA), load_text("pydoc", "calibration"), 3, 64)


@pytest.fixture(scope="module")
def naive_jsd(stack: Stack, tokens: LongTensor) -> Callable[[Kept], float]:
    """The true Jensen-Shannon divergence to the original in float64, the whole model run with masking hooks."""
    model = stack.model

    def log_probabilities(removed: Kept) -> Tensor:
        hooks = []
        for number, sublayer in removed:
            layer = model.model.layers[number]
            part = {"mlp": layer.mlp.down_proj, "attn": layer.self_attn.o_proj}[sublayer]
            hooks.append(part.register_forward_hook(lambda _, __, out: torch.zeros_like(out)))
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits.double()
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)

    log_p = log_probabilities(frozenset())

    @cache
    def jsd(removed: Kept) -> float:
        log_q = log_probabilities(removed)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        both = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
        return float(both.mean() / 2)

    return jsd


def naive_order(
    jsd: Callable[[Kept], float], steps: int, protected: int, release_after: int, group: int = 1
) -> list[tuple[tuple[Position, ...], float]]:
    """The paper's greedy loop: layers before ``protected`` become candidates after ``release_after`` removals."""
    groups = [EVERY[start : start + group] for start in range(0, len(EVERY), group)]
    left = [each for each in groups if each[0].layer >= protected]
    held = [each for each in groups if each[0].layer < protected]
    removed: Kept = frozenset()
    order = []
    for _ in range(steps):
        best = min(left, key=lambda each: jsd(removed | set(each)))
        removed |= set(best)
        order.append((best, jsd(removed)))
        left.remove(best)
        if len(removed) >= release_after:
            left, held = left + held, []
    return order


def order_of(series: PlanSeries) -> list[tuple[Position, ...]]:
    drops = [plan.dropped for plan in series]
    return [tuple(sorted(after - before)) for before, after in pairwise(drops)]


def distances(series: PlanSeries, name: str = "jsd") -> list[float]:
    return [point.scores[name] for point in series.points]


def assert_same(series: PlanSeries, expected: list[tuple[tuple[Position, ...], float]]) -> None:
    assert order_of(series) == [group for group, _ in expected]
    assert distances(series) == pytest.approx([0.0, *(value for _, value in expected)], abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NANO if name != "vit"])
def test_removing_nothing_is_the_identity_to_the_bit(name: str) -> None:
    stack = Stack(nano(name))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    series = finercut(stack, ids, share=0.0)
    assert len(series) == 1 and series[0].drop == []
    with torch.no_grad():
        assert torch.equal(apply_static(stack, series[0])(ids).logits, stack.model(ids).logits)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.4])
def test_the_search_chooses_what_the_naive_search_chooses(
    x: float, stack: Stack, tokens: LongTensor, naive_jsd
) -> None:
    series = finercut(stack, tokens, share=1.0, exclude_front=x)
    protected, release = int(12 * x / 2) + 1, int(12 * x) + 1
    assert_same(series, naive_order(naive_jsd, 11, protected, release))


@pytest.mark.parametrize("seed", range(3))
def test_it_does_so_on_other_calibration_text(seed: int, stack: Stack) -> None:
    tokens = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(seed))
    measure = OutputDistance(stack, tokens)
    series = finercut(stack, tokens, share=0.5, exclude_front=0.0)
    assert_same(series, naive_order(measure.of, 6, 1, 1))


@pytest.mark.parametrize(
    ("level", "candidates"),
    [
        ("attn", [(each,) for each in EVERY[::2]]),
        ("mlp", [(each,) for each in EVERY[1::2]]),
        ("block", list(zip(EVERY[::2], EVERY[1::2], strict=True))),
    ],
)
def test_levels_remove_what_they_name(level: str, candidates: list, stack: Stack, tokens, naive_jsd) -> None:
    series = finercut(stack, tokens, share=0.5, exclude_front=0.0, level=level)
    removed: Kept = frozenset()
    left, expected = candidates[1:], []
    for step in range(6 // len(candidates[0])):
        best = min(left, key=lambda each: naive_jsd(removed | set(each)))
        removed |= set(best)
        expected.append((best, naive_jsd(removed)))
        left.remove(best)
        if step == 0:
            left.append(candidates[0])
    assert_same(series, expected[: len(series) - 1])
    assert len(series) == 1 + min(6 // len(candidates[0]), 6)


def test_the_first_step_of_greedy_is_the_first_of_one_shot(stack: Stack, tokens: LongTensor) -> None:
    greedy, one_shot = (finercut(stack, tokens, strategy=name, share=0.1) for name in ("greedy", "one_shot"))
    assert order_of(greedy) == order_of(one_shot)
    assert distances(greedy) == pytest.approx(distances(one_shot), abs=1e-7)


def test_one_shot_ranks_alone_and_measures_each_prefix(stack: Stack, tokens: LongTensor, naive_jsd) -> None:
    series = finercut(stack, tokens, strategy="one_shot", share=0.5, exclude_front=0.0)
    ranked = sorted(EVERY[2:], key=lambda sublayer: naive_jsd(frozenset({sublayer})))[:6]
    prefixes = [naive_jsd(frozenset(ranked[:k])) for k in range(1, 7)]
    assert_same(series, [((sublayer,), value) for sublayer, value in zip(ranked, prefixes, strict=True)])
    dearest = finercut(stack, tokens, strategy="one_shot", largest=True, share=0.5, exclude_front=0.0)
    back = sorted(EVERY[2:], key=lambda sublayer: -naive_jsd(frozenset({sublayer})))[:6]
    assert order_of(dearest) == [(sublayer,) for sublayer in back]


@pytest.mark.parametrize("strategy", ["greedy", "lazy", "one_shot"])
def test_running_to_the_end_and_cutting_short_is_running_short(strategy: str, stack: Stack, tokens) -> None:
    whole = finercut(stack, tokens, share=1.0, strategy=strategy)
    for count in (1, 3, 6):
        short = finercut(stack, tokens, share=count / 12, strategy=strategy)
        assert order_of(short) == order_of(whole)[:count]
        assert distances(short) == pytest.approx(distances(whole)[: count + 1], abs=1e-7)


def test_the_share_counts_sublayers(stack: Stack, tokens: LongTensor) -> None:
    for share, removed in ((0.0, 0), (0.08, 0), (1 / 12, 1), (0.25, 3), (0.3, 3), (1.0, 11)):
        assert len(finercut(stack, tokens[:1], share=share)[-1].skipped) == removed
    for share, removed in ((0.25, 2), (0.5, 6), (1.0, 10)):
        assert len(finercut(stack, tokens[:1], share=share, level="block")[-1].skipped) == removed


@pytest.mark.parametrize(("layers", "protected", "release"), [(32, 13, 26), (30, 13, 25), (6, 3, 5)])
def test_front_layers_are_protected_and_come_back_as_in_the_paper(
    layers: int, protected: int, release: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x = 0.4: n_ex = int(2L x / 2) + 1 layers, which join right after int(2L x) + 1 removals."""
    measured: dict[int, set[Position]] = {}
    every = positions_of(layers)

    class Costs:
        """Front sublayers are the cheapest, so they go as soon as they may."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def cost(self, removed: tuple, candidate: tuple[Position, ...], bound: float) -> Cost:
            measured.setdefault(len(removed), set()).update(candidate)
            return Cost(float(sum(every.index(each) for group in (*removed, candidate) for each in group)))

    monkeypatch.setattr(module, "OutputDistance", Costs)
    stack = Stack(nano("llama", num_hidden_layers=layers))
    series = finercut(stack, torch.zeros(1, 2, dtype=torch.long), share=1.0)
    order = [group[0] for group in order_of(series)]
    behind = [each for each in every if each.layer >= protected]
    release = min(release, len(behind))
    assert all(measured[step] == set(behind) - set(order[:step]) for step in range(release))
    assert measured[release] == set(every) - set(order[:release])
    assert order[: release + 1] == [*behind[:release], every[0]]


def test_it_stops_before_the_distance_passes_the_threshold(stack: Stack, tokens: LongTensor) -> None:
    whole = finercut(stack, tokens, share=1.0)
    limit = (distances(whole)[3] + distances(whole)[4]) / 2
    passing = next(k for k, value in enumerate(distances(whole)) if value > limit)
    stopped = finercut(stack, tokens, share=1.0, stop_when=limit)
    assert order_of(stopped) == order_of(whole)[: passing - 1] and max(distances(stopped)) <= limit
    assert len(finercut(stack, tokens, stop_when=0.0)) == 1


def test_it_stops_as_soon_as_the_budget_is_met(stack: Stack, tokens: LongTensor) -> None:
    whole = finercut(stack, tokens, share=1.0)
    attentions = lambda gone: sum(name == "attn" for _, name in gone)  # noqa: E731
    stopped = finercut(stack, tokens, share=1.0, until=lambda gone: attentions(gone) >= 2)
    counts = [attentions(plan.skipped) for plan in whole]
    assert len(stopped) - 1 == counts.index(2)
    assert order_of(stopped) == order_of(whole)[: len(stopped) - 1]
    assert len(finercut(stack, tokens, until=lambda gone: True)) == 1


@pytest.mark.parametrize("share", [2 / 12, 3 / 12, 5 / 12])
@pytest.mark.parametrize("x", [0.0, 0.3])
def test_refining_is_never_worse_than_either_parent(share: float, x: float, stack: Stack, tokens, naive_jsd) -> None:
    options = {"share": share, "exclude_front": x}
    plain = finercut(stack, tokens, **options)
    refined = finercut(stack, tokens, **options, refine=True)
    final = refined[-1].skipped
    assert len(final) == len(plain[-1].skipped)
    assert distances(refined)[-1] == pytest.approx(naive_jsd(final), abs=1e-6)
    assert distances(refined)[-1] <= distances(plain)[-1] + 1e-9
    protected = int(12 * x / 2) + 1
    blocks, removed = [set(EVERY[2 * i : 2 * i + 2]) for i in range(protected, 6)], frozenset()
    for _ in range(len(final) // 2):
        removed |= min((block for block in blocks if not block & removed), key=lambda block: naive_jsd(removed | block))
    if len(final) % 2:
        left = [sublayer for block in blocks for sublayer in block if sublayer not in removed]
        removed |= {min(left, key=lambda sublayer: naive_jsd(removed | {sublayer}))}
    assert distances(refined)[-1] <= naive_jsd(removed) + 1e-6
    assert refined.points[:-1] == plain.points[:-1]


@pytest.mark.parametrize("strategy", ["greedy", "lazy", "one_shot"])
def test_an_interrupted_run_ends_with_the_same_result(strategy: str, stack: Stack, tokens, tmp_path: Path) -> None:
    options = {"share": 0.6, "strategy": strategy, "work": Work(tmp_path / "work")}
    whole = finercut(stack, tokens, share=0.6, strategy=strategy)

    def killer(steps: int) -> Callable[[Kept], bool]:
        def until(gone: Kept) -> bool:
            if len(gone) == steps:
                raise KeyboardInterrupt
            return False

        return until

    for steps in range(7):
        with pytest.raises(KeyboardInterrupt):
            finercut(stack, tokens, **options, until=killer(steps))
        if steps % 2:
            continue  # interrupted twice
        again = finercut(stack, tokens, **options)
        assert order_of(again) == order_of(whole)
        assert distances(again) == pytest.approx(distances(whole), abs=1e-7)
        options["work"] = Work(tmp_path / f"work-{steps}")


def test_a_run_killed_while_it_wrote_goes_on_and_measures_nothing_twice(
    stack: Stack, tokens: LongTensor, tmp_path: Path
) -> None:
    work = Work(tmp_path)
    path = tmp_path / "finercut.jsonl"
    whole = finercut(stack, tokens, share=0.6, work=work)
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        path.write_text("".join(lines[:kept])[:-4])  # killed while it wrote the last of these lines
        again = finercut(stack, tokens, share=0.6, work=work)
        assert order_of(again) == order_of(whole)
        assert distances(again) == pytest.approx(distances(whole), abs=1e-7)
    measured = []
    original = OutputDistance.cost
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDistance, "cost", lambda *args: measured.append(args) or original(*args))
        finercut(stack, tokens, share=0.6, work=work)
    assert measured == []  # all was in the journal


def test_a_journal_of_other_text_or_options_is_not_used(stack: Stack, tokens: LongTensor, tmp_path: Path) -> None:
    work = Work(tmp_path)
    finercut(stack, tokens, share=0.25, work=work)
    other = tokens.flip(0, 1)
    series = finercut(stack, other, share=0.25, work=work)
    assert distances(series) == pytest.approx(distances(finercut(stack, other, share=0.25)), abs=1e-9)
    assert (tmp_path / "finercut.jsonl").read_text().count("\n") == 4


def test_lazy_is_valid_and_asks_less(stack: Stack, tokens: LongTensor, naive_jsd) -> None:
    measured: dict[str, int] = {}
    for strategy in ("greedy", "lazy"):
        calls: list = []
        original = OutputDistance.cost
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                OutputDistance, "cost", lambda *a, calls=calls, original=original: calls.append(a) or original(*a)
            )
            series = finercut(stack, tokens, share=0.75, exclude_front=0.0, strategy=strategy)
        measured[strategy] = len(calls)
    for plan, value in zip(series, distances(series), strict=True):
        assert value == pytest.approx(naive_jsd(plan.skipped), abs=1e-6)
    assert measured["lazy"] < 0.7 * measured["greedy"]


def test_greedy_lands_among_the_best_of_all_220_sets(stack: Stack, tokens: LongTensor, naive_jsd) -> None:
    """Every set of 3 of the 12 sublayers, measured by brute force."""
    chosen = finercut(stack, tokens, share=0.25, exclude_front=0.0)[-1].skipped
    everything = sorted(naive_jsd(frozenset(each)) for each in itertools.combinations(EVERY, 3))
    assert len(everything) == 220
    assert everything.index(naive_jsd(chosen)) < 22
    assert naive_jsd(chosen) < statistics.median(everything) / 2


@pytest.mark.xfail(reason="the best of all 220 sets of this model is itself only 3 times better than the median set")
def test_greedy_is_5_times_better_than_the_median_of_all_220_sets(stack: Stack, tokens: LongTensor, naive_jsd) -> None:
    chosen = finercut(stack, tokens, share=0.25, exclude_front=0.0)[-1].skipped
    everything = [naive_jsd(frozenset(each)) for each in itertools.combinations(EVERY, 3)]
    assert 5 * naive_jsd(chosen) <= statistics.median(everything)


@pytest.mark.parametrize("distance", ["jsd_repo", "kl", "angular", "norm", "perplexity"])
def test_every_distance_plans_and_reports_its_own_scores(distance: str, stack: Stack, tokens: LongTensor) -> None:
    series = finercut(stack, tokens, distance=distance, share=0.25, exclude_front=0.0)
    measure = OutputDistance(stack, tokens, distance)
    assert distances(series, distance)[0] == pytest.approx(measure.of(()) if distance == "perplexity" else 0.0)
    for plan, value in zip(list(series)[1:], distances(series, distance)[1:], strict=True):
        assert value == pytest.approx(measure.of(plan.skipped), rel=1e-5)
    first = min(EVERY[2:], key=lambda sublayer: measure.of({sublayer}))
    assert order_of(series)[0] == (first,)


def test_provenance_says_what_was_done(stack: Stack, tokens: LongTensor) -> None:
    series = finercut(stack, tokens, share=0.1)
    assert series.provenance["method"] == "finercut"
    assert series.provenance["options"] == {
        "distance": "jsd", "level": "sublayer", "exclude_front": 0.4, "strategy": "greedy", "largest": False,
        "refine": False, "share": 0.1,
    }  # fmt: skip
    assert series.provenance["inputs"]["calibration"]["shape"] == [3, 64]
    assert series.provenance["version"] == lamella.__version__
    assert series[-1].drop == [order_of(series)[0][0].site]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": True}, "choose strategy one_shot"),
        ({"exclude_front": 0.9}, "protects all 6 layers"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict, message: str, stack: Stack, tokens: LongTensor) -> None:
    with pytest.raises(MethodError, match=message) as error:
        finercut(stack, tokens, **options)
    assert "\n" not in str(error.value)
