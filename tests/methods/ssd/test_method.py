"""SSD: its formulas, its bound, what it may touch, the guard, and plans of several families."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.errors import CalibrationError, ExportError, LamellaError, MethodError
from lamella.files import Work
from lamella.measure import Fisher, fisher
from lamella.methods.ssd import (
    RetentionGuard,
    adaptive_alpha,
    dampen,
    dampening,
    importances,
    make_plan,
    select_weights,
)
from lamella.methods.ssd.method import forget
from lamella.plan import Factors, Plan, apply_factors, read_factors
from lamella.plan.selection import select_parameters
from lamella.stack import Stack, weights
from lamella.train import blocks
from lamella.zoo.nano import nano

CLASSES = 4


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Importances over many magnitudes, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp(3 * torch.randn(shape, generator=generator))
    return values * (torch.rand(shape, generator=generator) > 0.1)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip
    images, labels = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def data(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images whose brightest corner is their class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    images = torch.rand(count, 1, 6, 6, generator=generator)
    for place, label in enumerate(labels.tolist()):
        images[place, 0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 1
    return images, labels


def parts() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = data()
    return (images[labels == 0], labels[labels == 0]), (images[labels > 0], labels[labels > 0])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


@pytest.fixture(scope="module")
def measured(model: nn.Module) -> tuple[Fisher, Fisher]:
    gone, kept = parts()
    return importances(model, gone, retain=kept)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def accuracy(model: nn.Module, given: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(given[0]).argmax(1) == given[1]).float().mean())


# The two formulas


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("lam", [0.1, 1.0, 30.0])
def test_selection_and_dampening_are_the_paper_s_weight_by_weight(alpha: float, lam: float) -> None:
    theta, f, d = torch.randn(7, 9), drawn((7, 9), 1), drawn((7, 9), 2)
    found = apply_factors(_holding(theta), {"weight": dampening(f, d, alpha, lam)}).weight.detach()
    for place in np.ndindex(7, 9):
        t, a, b = (float(each[place]) for each in (theta, f, d))
        expected = t * min(lam * b / a, 1) if a > alpha * b else t
        assert float(found[place]) == pytest.approx(expected, rel=1e-6, abs=0)


def _holding(theta: Tensor) -> nn.Module:
    linear = nn.Linear(theta.shape[1], theta.shape[0], bias=False)
    linear.weight = nn.Parameter(theta.clone())
    return linear


def test_no_magnitude_grows_and_no_sign_changes() -> None:
    theta, f, d = torch.randn(50, 60), drawn((50, 60), 1), drawn((50, 60), 2)
    for lam in (0.0, 0.5, 1.0, 100.0):
        found = apply_factors(_holding(theta), {"weight": dampening(f, d, 0.7, lam)}).weight.detach()
        assert (found.abs() <= theta.abs()).all() and (found * theta >= 0).all()


def test_weights_that_only_the_forget_set_knows_become_zero() -> None:
    f, d = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = dampening(f, d, 1.5)
    assert found.where.tolist() == [True, True, False, True] and found.values.tolist() == [0.0, 0.5, 0.0]


def test_lambda_zero_zeroes_what_is_selected_and_a_large_one_changes_nothing() -> None:
    theta, f, d = torch.randn(20, 20), drawn((20, 20), 1), drawn((20, 20), 2) + 1e-6
    none = apply_factors(_holding(theta), {"weight": dampening(f, d, 1.0, 0.0)}).weight
    chosen = select_weights(f, d, 1.0)
    assert chosen.any() and not none[chosen].any() and torch.equal(none[~chosen], theta[~chosen])
    all_kept = apply_factors(_holding(theta), {"weight": dampening(f, d, 1.0, 1e12)}).weight
    assert torch.equal(all_kept, theta)


def test_selections_are_nested_and_an_infinite_alpha_selects_nothing() -> None:
    f, d = drawn((40, 40), 1), drawn((40, 40), 2)
    chosen = [select_weights(f, d, alpha) for alpha in (0.5, 1.0, 3.0, 20.0, math.inf)]
    assert all(not (b & ~a).any() for a, b in itertools.pairwise(chosen))
    assert chosen[0].sum() > chosen[3].sum() > 0 == chosen[4].sum()


def test_the_adaptive_alpha_is_a_percentile_without_nan_and_infinity() -> None:
    f, d = drawn((300,), 1), drawn((300,), 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = f.numpy() / d.numpy()
    finite = ratios[np.isfinite(ratios)].astype(np.float64)
    for share in (0.01, 0.1):
        alpha = adaptive_alpha(lambda: iter([f[:100] / d[:100], f[100:] / d[100:]]), int(1000 * share), 1000)
        assert alpha == pytest.approx(np.percentile(finite, 100 - math.log(1 + 100 * share)), rel=1e-6)


# A whole model


def test_a_class_is_forgotten_and_the_others_stay(model: nn.Module) -> None:
    gone, kept = parts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert accuracy(model, gone) == accuracy(model, kept) == 1
    found = forget(model, gone, retain=kept, alpha=2.0, guard=kept)
    assert accuracy(found.model, gone) <= 0.1 and accuracy(found.model, kept) >= 0.95
    assert found.guard is not None and found.guard.passed
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, each in found.model.named_parameters() if each is not model.get_parameter(name)}
    assert changed == set(found.dampening.factors)
    assert all(a is b for a, b in zip(model.buffers(), found.model.buffers(), strict=True))
    assert found.dampening.untouched == ["1.running_mean", "1.running_var"]


def test_no_ratio_exceeds_the_bound_so_an_alpha_from_there_on_is_refused(model: nn.Module, measured: Any) -> None:
    f, d = measured
    bound = d.samples / f.samples
    assert bound == 4
    for name in f.tensors:
        ratio = f.tensors[name] / d.tensors[name]
        assert not (ratio > bound * (1 + 1e-5)).any()
    with pytest.raises(MethodError, match=r"alpha 4 can select nothing: 15 of 60 samples .* 4 times") as error:
        dampen(model, f, d, alpha=4.0)
    assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="alpha 10 can select nothing"):
        dampen(model, f, d)  # the published default, on one class of four
    assert dampen(model, f, d, alpha=3.9).bound == 4


def test_forgetting_everything_selects_nothing_at_alpha_1(model: nn.Module) -> None:
    whole = fisher(model, data())
    assert all(not select_weights(each, each, 1.0).any() for each in whole.tensors.values())
    with pytest.raises(MethodError, match="alpha 1 can select nothing: 60 of 60"):
        dampen(model, whole, whole, alpha=1.0)


def test_an_alpha_that_selects_nothing_says_the_highest_ratio(model: nn.Module) -> None:
    gone, kept = parts()
    f, r = importances(model, gone, retain=kept, reference_of="retain")
    highest = max(float((f.tensors[n] / r.tensors[n]).nan_to_num(0).max()) for n in f.tensors)
    with pytest.raises(MethodError, match=f"selects nothing: the highest ratio is {highest:.4g}"):
        dampen(model, f, r, alpha=highest * 2, reference_of="retain")
    done = dampen(model, f, r, alpha=highest / 2, reference_of="retain")
    assert done.bound is None and done.total.selected > 0


def test_both_references_select_the_same_by_percentile(model: nn.Module) -> None:
    """F_D is F_f and F_r together, so the order of the ratios is the same; what is dampened most differs."""
    gone, kept = parts()
    full, rest = (
        dampen(model, *importances(model, gone, retain=kept, reference_of=of), variant="assd", reference_of=of)
        for of in ("full", "retain")
    )
    shares = [each.total.share for each in (full, rest)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert rest.total.removed >= full.total.removed


def test_a_kept_importance_gives_the_same_edit(model: nn.Module, measured: Any, tmp_path: Path) -> None:
    gone, kept = parts()
    measured[1].save(tmp_path / "fisher.safetensors")
    ours = forget(model, gone, retain=kept, alpha=2.0)
    theirs = forget(model, gone, importance=tmp_path / "fisher.safetensors", alpha=2.0)
    assert same(ours.model, theirs.model)


def test_the_report_counts_what_was_done(model: nn.Module, measured: Any) -> None:
    done = dampen(model, *measured, alpha=2.0)
    changed = apply_factors(model, done.factors)
    for row in done.parameters:
        before, after = model.get_parameter(row.name).double(), changed.get_parameter(row.name).double()
        assert row.weights == before.numel()
        assert row.selected == int(
            select_weights(measured[0].tensors[row.name], measured[1].tensors[row.name], 2.0).sum()
        )
        assert row.mass == pytest.approx(float(before.detach().abs().sum()), rel=1e-9)
        assert row.removed == pytest.approx(float((before - after).detach().abs().sum()), rel=1e-4, abs=1e-6)
    by_layer = done.by_layer(model)
    assert [row.name for row in by_layer] == ["0", "1", "5", "7"]
    assert sum(row.selected for row in by_layer) == done.total.selected > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": ["5", "7.weight"]}, {"5.weight", "5.bias", "7.weight"}),
        ({"layers": ["*.bias"]}, {"0.bias", "1.bias", "5.bias", "7.bias"}),
        ({"skip": ["norm"]}, {"0.weight", "0.bias", "5.weight", "5.bias", "7.weight", "7.bias"}),
        ({"skip": ["norm", "bias"]}, {"0.weight", "5.weight", "7.weight"}),
    ],
)
def test_only_what_is_named_changes(model: nn.Module, options: dict[str, Any], expected: set[str]) -> None:
    gone, kept = parts()
    assert set(select_parameters(model, **options)) == expected
    found = forget(model, gone, retain=kept, alpha=1.2, **options)
    assert set(found.dampening.factors) <= expected
    for name, parameter in found.model.named_parameters():
        assert name in expected or parameter is model.get_parameter(name)


@pytest.mark.parametrize("variant", ["ssd", "assd", "lfssd"])
def test_every_variant_runs_and_needs_its_own_importances(model: nn.Module, variant: Any) -> None:
    gone, kept = parts()
    given = (gone[0], kept[0]) if variant == "lfssd" else (gone, kept)
    alpha = None if variant == "assd" else 1.5
    found = forget(model, given[0], retain=given[1], variant=variant, alpha=alpha)
    assert 0 < found.dampening.total.share < 1 and not same(found.model, model)
    other = fisher(model, gone, kind="fisher" if variant == "lfssd" else "label-free")
    with pytest.raises(MethodError, match="needs importances of the kind"):
        dampen(model, other, other, variant=variant, alpha=alpha)


# The guard


def test_a_guard_that_fails_gives_the_original_back(model: nn.Module) -> None:
    gone, kept = parts()
    found = forget(model, gone, retain=kept, alpha=0.001, lam=0.001, guard=kept)
    assert found.model is model and found.guard is not None and not found.guard.passed
    assert found.guard.measure == "accuracy" and found.guard.lost == pytest.approx(1 - found.guard.after)
    with pytest.raises(MethodError, match="max_drop -1"):
        forget(model, gone, retain=kept, alpha=2.0, guard=kept, max_drop=-1)


def test_a_decoder_is_guarded_by_its_perplexity() -> None:
    stack = Stack(nano("llama"))
    rows = blocks(torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0)), loss_on="all")
    verdict = RetentionGuard.of(stack.model, nano("llama", seed=1), rows, 0.05)
    losses = [
        [m(input_ids=r["input_ids"][None], labels=r["labels"][None]).loss.item() for r in rows]
        for m in (stack.model, nano("llama", seed=1))
    ]
    assert verdict.measure == "perplexity"
    assert verdict.before == pytest.approx(math.exp(np.mean(losses[0])), rel=1e-5)
    assert verdict.lost == pytest.approx(math.exp(np.mean(losses[1]) - np.mean(losses[0])) - 1, rel=1e-4)


# Plans


def tokens(seed: int, count: int) -> list[Any]:
    return blocks(torch.randint(3, 128, (count, 10), generator=torch.Generator().manual_seed(seed)), loss_on="all")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "opt_post_norm"])
def test_a_plan_scales_the_weights_of_any_family_and_tied_ones_once(name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    gone, kept = tokens(0, 2), tokens(1, 6)
    plan = make_plan(stack, gone, retain=kept, alpha=2.0, work=Work(tmp_path))
    view = lamella.apply(stack, plan)
    done = dampen(stack, *importances(stack, gone, retain=kept), alpha=2.0)
    assert list(done.factors) == [n for n in weights(stack.model) if n in done.factors]
    by_hand = {n: p.detach().clone() for n, p in stack.model.named_parameters()}
    for parameter, each in done.factors.items():
        by_hand[parameter][each.where] *= each.values
    for parameter, expected in by_hand.items():
        assert torch.equal(view.get_parameter(parameter), expected)
    if stack.config.tie_word_embeddings:
        assert view.get_output_embeddings().weight is view.get_input_embeddings().weight
    told = plan.provenance
    assert (told["alpha"], told["bound"]) == (2.0, 4.0)
    assert told["forget"]["estimator"] == {"kind": "fisher", "loss": "cross-entropy", "batch": 1, "order": "any"}
    assert sum(site["selected"] for site in told["sites"]) == told["total"]["selected"] > 0
    (tmp_path / "again").mkdir()
    plan.write(tmp_path / "again" / "plan.json")
    again = Plan.read(tmp_path / "again" / "plan.json")
    assert again == plan
    factors = read_factors(again.weights[0].located, again.weights[0].sha256)
    assert all(isinstance(each, Factors) for each in factors.values()) and factors.keys() == done.factors.keys()


def test_sites_restrict_a_plan_and_stand_in_it(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan = make_plan(
        stack, tokens(0, 2), retain=tokens(1, 6), alpha=2.0, layers=["layers.1.mlp", "head"], work=Work(tmp_path)
    )
    assert plan.weights[0].sites == ["layers.1.mlp", "head"]
    plan = make_plan(
        stack, tokens(0, 2), retain=tokens(1, 6), alpha=2.0, layers=["*.down_proj.weight"], work=Work(tmp_path)
    )
    assert plan.weights[0].sites == [f"layers.{i}.mlp" for i in range(4)]


def test_a_classifier_of_the_family_table_gets_a_plan_too(tmp_path: Path) -> None:
    stack, generator = Stack(nano("vit")), torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 3, 16, 16, generator=generator), torch.arange(12) % 3
    gone, kept = (images[:3], labels[:3]), (images[3:], labels[3:])
    plan = make_plan(stack, gone, retain=kept, alpha=2.0, work=Work(tmp_path))
    assert not torch.equal(lamella.apply(stack, plan)(images).logits, stack.model(images).logits)


def test_the_same_request_gives_the_same_plan(tmp_path: Path) -> None:
    plans = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        plans.append(
            make_plan(Stack(nano("llama")), tokens(0, 2), retain=tokens(1, 6), alpha=2.0, work=Work(tmp_path)).dump()
        )
    assert plans[0] == plans[1] and json.loads(plans[0])["provenance"]["stale"] is False


def test_an_importance_of_other_weights_is_reported_as_stale(tmp_path: Path) -> None:
    stack, other = Stack(nano("llama")), nano("llama", seed=1)
    d = fisher(other, tokens(1, 8))
    assert make_plan(stack, tokens(0, 2), importance=d, alpha=2.0, work=Work(tmp_path)).provenance["stale"] is True


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, MethodError, "give either retain"),
        ({"retain": "kept", "importance": "file"}, MethodError, "give either retain"),
        ({"retain": "gone"}, CalibrationError, "2 samples are to be forgotten and retained at once"),
        ({"retain": "kept", "variant": "isdd"}, MethodError, "variant 'isdd'"),
        ({"retain": "kept", "variant": "assd", "alpha": 3.0}, MethodError, "assd determines alpha itself:"),
        ({"retain": "kept", "alpha": 0.0}, MethodError, "alpha 0"),
        ({"retain": "kept", "alpha": math.nan}, MethodError, "alpha nan"),
        ({"retain": "kept", "alpha": 4.0}, MethodError, "can select nothing"),
        ({"retain": "kept", "lam": -1.0}, MethodError, "lam -1"),
        ({"retain": "kept", "lam": math.inf}, MethodError, "lam inf"),
        ({"retain": "kept", "reference_of": "half"}, MethodError, "reference_of 'half'"),
        ({"retain": "kept", "skip": ["head"]}, MethodError, "skip 'head'"),
        ({"retain": "kept", "layers": ["conv9"]}, MethodError, "layers 'conv9' names no parameter"),
        ({"retain": "kept", "layers": ["layers.0.norm"]}, LamellaError, "'layers.0.norm' is not a site"),
        ({"retain": "kept", "layers": ["layers.9"]}, LamellaError, "out of range"),
        ({"retain": "kept", "layers": ["norm"], "skip": ["norm"]}, MethodError, "skip leaves no parameter"),
        ({"importance": Path("nowhere.safetensors")}, MethodError, "is not a file of importances"),
        ({"retain": "kept", "alpha": 2.0, "work": Work(Path("/proc/nowhere"))}, ExportError, "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: dict[str, Any], error: type[LamellaError], message: str
) -> None:
    stack, gone, kept = Stack(nano("llama")), tokens(0, 2), tokens(1, 6)
    given = {"gone": gone, "kept": kept, "file": Path("f")}
    filled = {name: given.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(error, match=message) as raised:
        make_plan(stack, gone, **{"alpha": 2.0} | filled) if "variant" not in options else make_plan(
            stack, gone, **filled
        )
    assert "\n" not in str(raised.value)


def test_importances_of_another_model_are_refused(model: nn.Sequential, measured: Any) -> None:
    f, d = measured
    with pytest.raises(MethodError, match=r"the importances of '7\.weight' are \[4, 12\], but it is \[9, 12\]"):
        dampen(nn.Sequential(*model[:7], nn.Linear(12, 9)), f, d, alpha=2.0)
    with pytest.raises(MethodError, match=r"the importances lack '8\.weight'"):
        dampen(nn.Sequential(*model, nn.Linear(4, 4)), f, d, alpha=2.0)
    wider = dict(d.tensors) | {"7.weight": torch.ones(9, 12)}
    with pytest.raises(MethodError, match=r"the importances of '7\.weight' are \[9, 12\], but it is \[4, 12\]"):
        dampen(model, f, replace(d, tensors=wider), alpha=2.0)
    few = replace(d, tensors={"7.weight": d.tensors["7.weight"]})
    with pytest.raises(MethodError, match=r"lacks '0\.weight'"):
        dampen(model, f, few, alpha=2.0)


def test_layers_that_nothing_depends_on_are_refused(model: nn.Module, measured: Any) -> None:
    f, d = (replace(each, tensors=dict(each.tensors) | {"7.bias": torch.zeros(4)}) for each in measured)
    with pytest.raises(MethodError, match="no weight that may change has a gradient"):
        dampen(model, f, d, variant="assd", layers=["7.bias"])
    with pytest.raises(MethodError, match="selects nothing: the highest ratio is 0"):
        dampen(model, f, d, alpha=2.0, layers=["7.bias"])
