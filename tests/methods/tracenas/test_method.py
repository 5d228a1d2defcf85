"""TraceNAS: Phi is the paper's, shapes keep to the budget, and the winner is a really smaller model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamella
from lamella.errors import BudgetError, MethodError
from lamella.files import Work
from lamella.methods.tracenas import TRAINING, Genome, GradientTraces, PrunedShape, SearchSpace, phi, recover, tracenas
from lamella.plan import ModelReference, Plan, materialise
from lamella.plan.export import export, natural_form
from lamella.stack import Stack
from lamella.train import blocks
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"population": 6, "elites": 2, "iterations": 3, "rank": 4, "tolerance": 0.05}


def opened(name: str = "llama", **overrides: Any) -> Stack:
    return Stack(nano(name, **overrides))


def space_of(stack: Stack, params: float = 0.8, **options: Any) -> SearchSpace:
    return SearchSpace.of(stack, params=params, tolerance=0.05, min_layers=3, multiple=2, **options)


def plan_of(stack: Stack, space: SearchSpace, traces: GradientTraces, cut: PrunedShape) -> Plan:
    point = space.point(cut, traces.saliency)
    return Plan(model=ModelReference.of(stack), drop=point.drop, width=point.width)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_whole_model_scores_two_for_every_layer_whatever_the_loss_is_scaled_by(name: str) -> None:
    stack = opened(name)
    traces = GradientTraces(stack, IDS, rank=4)
    shares = np.ones((len(stack), 2))
    assert phi(traces.base, traces.of(Plan(model=ModelReference.of(stack))), shares) == pytest.approx(8, abs=1e-4)

    space = space_of(stack)
    cut = space.cut(space.sample(np.random.default_rng(0), np.zeros((4, 2))))
    small = traces.of(plan_of(stack, space, traces, cut))
    scaled = type(small)({sublayer: 7 * trace for sublayer, trace in small.sublayers.items()}, 7 * small.loss)
    for agreement in ("pearson", "cosine"):
        plain = phi(traces.base, small, space.shares(cut), agreement)
        assert phi(traces.base, scaled, space.shares(cut), agreement) == pytest.approx(plain, abs=1e-5)
    assert phi(traces.base, scaled, space.shares(cut), "dot") != pytest.approx(
        phi(traces.base, small, space.shares(cut), "dot"), rel=1e-3
    )


def test_phi_sums_the_kept_share_times_the_correlation_of_each_sublayer_that_stays() -> None:
    stack = opened()
    traces = GradientTraces(stack, IDS, rank=4)
    space = space_of(stack, 0.7)
    cut = PrunedShape((True, False, True, True), (4, 4, 2, 2), (16, 48, 24, 48))
    small = traces.of(plan_of(stack, space, traces, cut))
    shares = space.shares(cut)
    expected = sum(
        shares[layer, kind] * np.corrcoef(small.sublayers[layer, name], traces.base.sublayers[layer, name])[0, 1]
        for layer in (0, 2, 3)
        for kind, name in enumerate(("attn", "mlp"))
    )
    assert phi(traces.base, small, shares) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_samples_are_within_the_window_and_rounded_as_the_model_allows(name: str) -> None:
    stack = opened(name)
    space = space_of(stack)
    rng = np.random.default_rng(0)
    whole = sum(parameter.numel() for parameter in stack.model.parameters())
    seen = set()
    for _ in range(20):
        cut = space.cut(space.sample(rng, np.arange(8.0).reshape(4, 2)))
        seen.add(cut)
        point = space.point(cut, GradientTraces(stack, IDS, rank=2).saliency)
        smaller = materialise(stack, Plan(model=ModelReference.of(stack), drop=point.drop, width=point.width)).model
        count = sum(parameter.numel() for parameter in smaller.parameters())
        assert count == space.parameters(cut)
        assert abs(count / whole - 0.8) <= 0.8 * 0.05
        assert sum(cut.keep) >= 3 and all(channels % space.multiple == 0 for channels in cut.channels)
        kv_heads = getattr(stack.config, "num_key_value_heads", 1)
        shared = kv_heads < stack.config.num_attention_heads
        assert all(heads % (kv_heads if shared else 1) == 0 for heads in cut.heads)
    assert len(seen) > 10


def test_important_layers_are_wider_and_stay() -> None:
    stack = opened()
    space = space_of(stack)
    prior = np.array([[4.0, 4.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng, prior) for _ in range(200)]
    width, stays = (np.mean([getattr(genome, name) for genome in drawn], axis=0) for name in ("width", "keep"))
    assert width[1].sum() < width[2].sum() < width[0].sum()
    assert stays[1] < stays[0]


def test_the_winner_is_the_best_that_was_scored_and_a_really_smaller_model(tmp_path: Path) -> None:
    stack = opened()
    series = tracenas(stack, IDS, params=0.8, min_layers=3, **SMALL)
    whole, winner = series[0], series[1]
    assert not whole.removed and series.points[1].scores["phi"] == max(e["phi"] for e in series.provenance["best"])
    traces = GradientTraces(stack, IDS, rank=4)
    space = SearchSpace.of(stack, params=0.8, tolerance=0.05, min_layers=3)
    again = traces.of(winner)
    shares = np.array(
        [
            [
                len(winner.widths.heads[layer].keep) / space.whole.heads if layer in winner.widths.heads else 1,
                len(winner.widths.channels.get(layer, range(space.whole.channels))) / space.whole.channels,
            ]
            for layer in range(4)
        ]
    )
    assert phi(traces.base, again, shares) == pytest.approx(series.points[1].scores["phi"], abs=1e-4)

    folder = export(stack, winner, tmp_path / "out", form=natural_form(winner, stack))
    opened_again = lamella.open(folder).model
    assert sum(parameter.numel() for parameter in opened_again.parameters()) == series.points[1].scores["parameters"]
    with torch.no_grad():
        view = lamella.apply(stack, winner)
        torch.testing.assert_close(opened_again(IDS).logits, view(IDS).logits, rtol=0, atol=1e-5)


def test_an_interrupted_search_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, options = opened(), {"params": 0.8, "min_layers": 3, **SMALL}
    expected = tracenas(stack, IDS, **options)
    scored: list[Any] = []
    of = GradientTraces.of

    def counting(self: GradientTraces, plan: Plan) -> Any:
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(plan)
        return of(self, plan)

    monkeypatch.setattr(GradientTraces, "of", counting)
    with pytest.raises(KeyboardInterrupt):
        tracenas(stack, IDS, work=Work(tmp_path), **options)
    scored_before, scored = len(scored), []
    monkeypatch.setattr(GradientTraces, "of", lambda self, plan: (scored.append(plan), of(self, plan))[1])
    found = tracenas(stack, IDS, work=Work(tmp_path), **options)
    assert found.dump() == expected.dump()
    assert len(scored) + scored_before == expected.provenance["evaluations"]


def test_the_seed_decides() -> None:
    stack = opened()
    best = [tracenas(stack, IDS, params=0.8, min_layers=3, seed=seed, **SMALL).provenance["best"] for seed in (1, 1, 2)]
    assert best[0] == best[1] != best[2]


def test_budgets_that_no_shape_meets_say_what_can_be_had() -> None:
    stack = opened()
    with pytest.raises(BudgetError, match="are possible;"):
        tracenas(stack, IDS, params=0.05)
    for options in ({"attn": (0.8, 0.4)}, {"min_layers": 9}, {"elites": 30}):
        with pytest.raises(MethodError):
            tracenas(stack, IDS, **{"params": 0.8, **options})


def test_a_cut_off_sublayer_counts_nothing_and_is_no_error() -> None:
    stack = opened()
    with torch.no_grad():
        stack.layers[1].mlp.down_proj.weight.zero_()  # the channels' gradients are zero now
    traces = GradientTraces(stack, IDS, rank=4)
    assert np.isfinite(phi(traces.base, traces.of(Plan(model=ModelReference.of(stack))), np.ones((4, 2))))


def test_recovery_trains_the_smaller_model_alone(tmp_path: Path) -> None:
    stack = opened()
    series = tracenas(stack, IDS, params=0.8, min_layers=3, **SMALL)
    before = {name: value.clone() for name, value in stack.model.state_dict().items()}
    samples = blocks(IDS.repeat(4, 1))
    healed = recover(stack, series[1], samples, config=replace(TRAINING, steps=20, lr=3e-3), work=Work(tmp_path))
    losses = [point.loss for point in healed.log.train]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in stack.model.state_dict().items())
    smaller = sum(parameter.numel() for parameter in healed.stack.model.parameters())
    assert smaller == series.points[1].scores["parameters"]


def test_genomes_round_to_the_nearest_shape() -> None:
    space = space_of(opened())
    whole = space.whole
    genome = Genome(np.ones(4, bool), np.tile([0.49, 0.51], (4, 1)))
    cut = space.cut(genome)
    step = whole.kv_heads if whole.kv_heads < whole.heads else 1
    assert cut.heads[0] == max(step, round(0.49 * whole.heads / step) * step)
    assert abs(cut.channels[0] - 0.51 * whole.channels) <= space.multiple / 2
