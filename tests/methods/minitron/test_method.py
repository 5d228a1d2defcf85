"""Minitron: the best units are kept first, removing silent units changes nothing, and healing starts correctly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import lamella
from lamella.errors import BudgetError, MethodError
from lamella.methods.minitron import TRAINING, ModelShape, Ranking, activation_importance, contest, minitron, rank, trim
from lamella.methods.minitron.space import ShapeSpace
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.plan.export import export, natural_form
from lamella.stack import Stack
from lamella.stack.wiring import Sizes
from lamella.train import blocks, distil
from lamella.zoo.nano import nano

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Stack:
    stack = Stack(nano(name, **overrides))
    stack.model.generation_config.eos_token_id = None
    return stack


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def ranked(stack: Stack) -> tuple[Ranking, Sizes]:
    whole = ModelReference.of(stack).sizes
    assert whole is not None
    depth = np.arange(len(stack), 0, -1.0)
    return rank(activation_importance(stack, CALIBRATION), depth, whole.kv_heads), whole


def everything(whole: Sizes, **changes: int) -> ModelShape:
    shape = {
        "layers": 4,
        "hidden": whole.hidden,
        "mlp": whole.channels,
        "heads": whole.heads,
        "kv_heads": whole.kv_heads,
    }
    return ModelShape(**{**shape, **changes})


def plan_of(stack: Stack, shape: ModelShape, **options: Any) -> Plan:
    ranking, whole = ranked(stack)
    return PlanSeries(model=ModelReference.of(stack), points=[trim(ranking, shape, whole, **options)])[0]


def silenced(stack: Stack, neurons: list[int], heads: list[int]) -> Stack:
    """A copy in which these neurons and heads put out nothing, in every layer."""
    model = copy.deepcopy(stack.model)
    for layer in Stack(model).layers:
        if stack.architecture.name == "gpt2":
            for head in heads:  # values of these heads: the third part of the fused map, whose columns are outputs
                entries = slice(64 + 8 * head, 64 + 8 * head + 8)
                layer.attn.c_attn.weight[:, entries] = 0
                layer.attn.c_attn.bias[entries] = 0
            layer.mlp.c_fc.weight[:, neurons] = 0  # the activation of 0 is 0
            layer.mlp.c_fc.bias[neurons] = 0
        else:
            for head in heads:  # queries share values, so the output of the head is silenced
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
            layer.mlp.up_proj.weight[neurons] = 0
    return Stack(model)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_that_put_out_nothing_are_cut_first_and_for_nothing(name: str) -> None:
    stack = opened(name)
    count = 128 if name == "gpt2" else 64
    gone = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: int(0.3 * count)].tolist()
    stack = silenced(stack, gone, [])
    _, whole = ranked(stack)
    plan = plan_of(stack, everything(whole, mlp=count - len(gone)))
    assert set(plan.width["layers.2.mlp.channels"]) == set(range(count)) - set(gone)  # type: ignore[arg-type]
    close(lamella.apply(stack, plan)(IDS).logits, stack.model(IDS).logits)


@pytest.mark.usefixtures("no_gradients")
def test_heads_that_put_out_nothing_are_cut_first_and_for_nothing() -> None:
    stack = silenced(opened("gpt2"), [], [1, 2])
    _, whole = ranked(stack)
    plan = plan_of(stack, everything(whole, heads=2, kv_heads=2))
    assert set(plan.widths.heads[3].keep) == {0, 3}
    close(lamella.apply(stack, plan)(IDS).logits, stack.model(IDS).logits)
    for name in FAMILIES[:-1]:  # one query head of each group
        stack = silenced(opened(name), [], [1, 2])
        _, whole = ranked(stack)
        ranking = rank(_with_silent_heads(stack, [1, 2]), np.ones(4), whole.kv_heads)
        point = trim(ranking, everything(whole, heads=2), whole)
        plan = PlanSeries(model=ModelReference.of(stack), points=[point])[0]
        assert plan.widths.heads[0].keep in ([0, 3], [3, 0])
        close(lamella.apply(stack, plan)(IDS).logits, stack.model(IDS).logits)


def _with_silent_heads(stack: Stack, heads: list[int]) -> Any:
    """Scores in which these heads count for nothing: behind shared values, their outputs are large but unused."""
    importance = activation_importance(stack, CALIBRATION)
    importance.heads.values[:, heads] = 0
    return importance


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", FAMILIES[:-1])
def test_hidden_channels_that_carry_nothing_are_cut_first(name: str, rescale: bool) -> None:
    stack, gone = opened(name), [2, 3, 11, 29]
    stack.base.embed_tokens.weight[:, gone] = 0
    for layer in stack.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0
    _, whole = ranked(stack)
    plan = plan_of(stack, everything(whole, hidden=28), rescale=rescale)
    assert set(plan.widths.hidden or ()) == set(range(32)) - set(gone)
    view, expected = lamella.apply(stack, plan), stack.model(IDS).logits
    if rescale:
        close(view(IDS).logits, expected)
    else:  # the paper's: exact once every gain is multiplied by the root of d / d_kept, and epsilon by d / d_kept
        assert (view(IDS).logits - expected).abs().max() > 1e-3
        for module in view.modules():
            if hasattr(module, "variance_epsilon") and module.weight.shape == (28,):
                module.weight.mul_((32 / 28) ** 0.5)
                module.variance_epsilon *= 32 / 28
        close(view(IDS).logits, expected)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_shape_is_the_whole_model(name: str) -> None:
    stack = opened(name)
    ranking, whole = ranked(stack)
    point = trim(ranking, everything(whole), whole)
    assert point.width == {} and point.drop == []


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_made_louder_moves_to_the_top(name: str) -> None:
    stack = opened(name)
    before = activation_importance(stack, CALIBRATION).heads.values
    head = int(before[1].argmin())
    layer = stack.layers[1]
    if name == "gpt2":
        layer.attn.c_attn.weight[:, 64 + 8 * head : 72 + 8 * head] *= 50
    else:
        layer.self_attn.v_proj.weight[8 * (head // 2) : 8 * (head // 2) + 8] *= 50
    ranking, whole = ranked(stack)
    group = head if name == "gpt2" else head // 2
    assert ranking.groups[1, 0] == group
    heads, kv_heads = (1, 1) if name == "gpt2" else (2, 1)
    kept = plan_of(stack, everything(whole, heads=heads, kv_heads=kv_heads)).widths.heads[1]
    assert set(kept.kv_of) == {group} and head in kept.keep


def test_heads_are_grouped_by_key_value_head_and_not_the_other_way_round() -> None:
    heads = np.array([[5.0, 1, 2, 9, 8, 7]])  # groups of three: (5, 1, 2) and (9, 8, 7)
    stack = opened("llama")
    importance = activation_importance(stack, CALIBRATION)
    importance = replace(importance, heads=replace(importance.heads, values=heads))
    ranking = rank(importance, np.zeros(1), kv_heads=2)
    assert ranking.groups.tolist() == [[1, 0]] and ranking.heads.tolist() == [[[0, 2, 1], [3, 4, 5]]]
    whole = Sizes(32, 64, heads=6, kv_heads=2, head_dim=8)
    shape = ModelShape(layers=1, hidden=32, mlp=64, heads=4, kv_heads=2)
    [kept] = trim(ranking, shape, whole).width.values()
    assert (kept.keep, kept.kv_of) == ([3, 4, 0, 2], [1, 1, 0, 0])  # type: ignore[union-attr]
    [alone] = trim(ranking, ModelShape(1, 32, 64, 3, 1), whole).width.values()
    assert (alone.keep, alone.kv_of) == ([3, 4, 5], [1, 1, 1])  # type: ignore[union-attr]


def test_head_merging_pairs_head_i_with_head_2k_minus_i_plus_1() -> None:
    stack = opened("llama")
    importance = activation_importance(stack, CALIBRATION)
    heads = replace(importance.heads, values=np.array([[6.0, 5, 4, 3, 2, 1]]))
    importance = replace(importance, heads=heads)
    grouped = rank(importance, np.zeros(1), kv_heads=1)
    whole = Sizes(32, 64, heads=6, kv_heads=1, head_dim=8)
    merges = {
        kept: trim(grouped, ModelShape(1, 32, 64, kept, 1), whole, merge_heads=True).width["layers.0.attn.heads"].merge  # type: ignore[union-attr]
        for kept in (2, 3, 4, 5)
    }
    # By hand, 1-based: n = 6, K = 4: i = 3 with 6, i = 4 with 5. K = 2: i = 1 with 4, i = 2 with 3.
    assert merges == {2: [3, 2], 3: [5, 4, 3], 4: [None, None, 5, 4], 5: [None, None, None, None, 5]}
    own_keys = rank(importance, np.zeros(1), kv_heads=6)
    many = Sizes(32, 64, heads=6, kv_heads=6, head_dim=8)
    [kept] = trim(own_keys, ModelShape(1, 32, 64, 4, 4), many, merge_heads=True).width.values()
    assert kept.merge == [None, None, 5, 4]  # type: ignore[union-attr]


def test_the_layers_that_change_the_residual_stream_least_are_dropped_even_one_that_does_nothing() -> None:
    stack = opened("llama")
    with torch.no_grad():
        layer = stack.layers[2]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        assert minitron(stack, CALIBRATION, layers=3, params=0.7)[-1].drop == ["layers.2"]
        plan = minitron(stack, CALIBRATION, layers=3, hidden=32, mlp=64)[-1]
        assert plan.drop == ["layers.2"] and plan.width == {}
        close(lamella.apply(stack, plan)(IDS).logits, stack.model(IDS).logits)


@pytest.mark.usefixtures("no_gradients")
def test_by_perplexity_the_layer_whose_loss_is_cheapest_is_dropped() -> None:
    stack = opened("llama")
    losses = []
    for layer in range(4):
        view = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}"]))
        losses.append(float(view(CALIBRATION, labels=CALIBRATION).loss))
    plan = minitron(stack, CALIBRATION, layers=3, hidden=32, mlp=64, depth="ppl")[-1]
    assert plan.drop == [f"layers.{int(np.argmin(losses))}"]


@pytest.mark.usefixtures("no_gradients")
def test_a_contiguous_run_of_layers_goes_where_the_residual_stream_changes_least() -> None:
    stack = opened("llama")
    hidden = [[], [], [], [], []]
    for row in CALIBRATION.split(1):
        context = stack.context(row)
        for point in range(5):
            hidden[point].append(stack.run(context.h, 0, point, context).flatten(0, 1).double())
    at = [torch.cat(rows) for rows in hidden]
    turns = [float(torch.arccos(torch.cosine_similarity(at[i], at[i + 2], dim=-1)).mean()) for i in range(3)]
    plan = minitron(stack, CALIBRATION, layers=2, hidden=32, mlp=64, depth="contiguous")[-1]
    first = int(np.argmin(turns))
    assert plan.drop == [f"layers.{first}", f"layers.{first + 1}"]
    with pytest.raises(MethodError, match="how many to keep"):
        minitron(stack, CALIBRATION, depth="contiguous")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_series_meets_its_budget_with_shapes_that_export_plainly(name: str, tmp_path: Path) -> None:
    stack = opened(name)
    series = minitron(stack, CALIBRATION, params=0.6)
    whole, last = series.provenance["shapes"][0], series.points[-1].scores["parameters"]
    total = lamella.cost(stack).parameters
    assert abs(last / total - 0.6) <= 0.05 * 0.6 and whole["layers"] == 4
    for plan, shape in zip(series, series.provenance["shapes"], strict=True):
        assert lamella.cost(stack, plan).parameters == plan.provenance["scores"]["parameters"]
        assert natural_form(plan) == "plain"
        assert plan.removed == 0 or shape != whole
    assert len(series.provenance["candidates"]) > 1
    plan = series[-1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export(stack, plan, tmp_path / "out")).eval()
    with torch.no_grad():
        close(loaded(IDS).logits, lamella.apply(stack, plan)(IDS).logits)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == last
    works = [sum(map(sum, plan.work)) for plan in series]
    assert works == sorted(works, reverse=True) and len(set(works)) == len(works)


def without_mlps(stack: Stack) -> Stack:
    """A copy whose MLPs output nothing, so that only heads and the hidden size matter."""
    model = copy.deepcopy(stack.model)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data *= 10
    return Stack(model)


def test_of_shapes_of_one_size_the_one_that_learns_best_is_kept_and_not_the_most_even() -> None:
    stack = without_mlps(opened("llama"))
    even = minitron(stack, CALIBRATION, params=0.6, candidates=1).provenance
    assert even["shapes"][-1]["heads"] == 2 and even["contest"] == []
    found = minitron(stack, CALIBRATION, params=0.6).provenance
    assert found["shapes"][-1]["heads"] == 4
    divergences = {shape["heads"]: shape["kl"] for shape in found["contest"]}
    assert divergences[4] < divergences[2] / 2


def test_padding_does_not_change_the_choice() -> None:
    stack = opened("llama")
    padding = torch.zeros(4, 5, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, CALIBRATION], dim=1),
        "attention_mask": torch.cat([padding, torch.ones_like(CALIBRATION)], dim=1),
    }
    expected, found = (
        [shape["kl"] for shape in minitron(stack, tokens, params=0.6, trial_steps=3).provenance["contest"]]
        for tokens in (CALIBRATION, padded)
    )
    assert len(expected) == 4 and found == pytest.approx(expected, rel=1e-3)


def test_a_shortlist_has_every_number_of_heads_before_a_second_shape_of_any() -> None:
    space = ShapeSpace.of(opened("llama"), 8)
    near = space.near(0.6, {}, 0.1)
    found = space.shortlist(near, 3)
    assert len({shape.heads for shape in near}) == 2 and [shape.heads for shape in found[:2]] in ([2, 4], [4, 2])
    assert found[0] == min(near, key=space.unevenness) and space.shortlist(near, 100)[:3] == found
    assert set(space.shortlist(near, 100)) == set(near)


def test_smaller_points_keep_a_part_of_what_larger_ones_keep() -> None:
    series = minitron(opened("llama"), CALIBRATION)
    for larger, smaller in zip(series.points[1:], series.points[2:], strict=False):
        for site, kept in larger.width.items():
            if site.endswith("channels") and site in smaller.width:
                indices = [each if isinstance(each, list) else each.keep for each in (kept, smaller.width[site])]
                assert indices[0][: len(indices[1])] == indices[1]


def test_a_cut_of_more_than_half_warns_and_says_how_far_to_go() -> None:
    with pytest.warns(UserWarning, match=r"\d\d% of the parameters are left: more than half .* prune to about 5\d%"):
        minitron(opened("llama"), CALIBRATION, params=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minitron(opened("llama"), CALIBRATION)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_heads": 1}, "kv_heads without heads"),
        ({"heads": 3}, "heads 3 with kv_heads 2"),
        ({"heads": 4, "kv_heads": 1}, "each key-value head keeps the same number of its 2 query heads"),
        ({"hidden": 33, "mlp": 8}, "hidden 33 is out of range: give 1 to 32"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError) as error:
        minitron(opened("llama"), CALIBRATION, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_norms_that_subtract_the_mean_cannot_be_rescaled() -> None:
    with pytest.raises(MethodError, match="the norms of gpt2 models subtract the mean"):
        minitron(opened("gpt2"), CALIBRATION, rescale=True)


def test_a_budget_that_no_shape_meets_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"the nearest are hidden=\d+ mlp=\d+ heads=\d+ \(\d+\)") as error:
        minitron(opened("llama"), CALIBRATION, params=0.9999, tolerance=1e-9)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_healing_gives_an_ordinary_smaller_model_and_leaves_the_original(name: str, tmp_path: Path) -> None:
    stack = opened(name)
    before = {key: tensor.clone() for key, tensor in stack.model.state_dict().items()}
    plan = minitron(stack, CALIBRATION, params=0.6)[-1]
    samples = blocks(CALIBRATION, loss_on="all")
    config = replace(TRAINING, steps=12, lr=3e-3, log_every=1)
    healed = distil(stack, plan, samples, config=config, out=tmp_path / "run")
    assert all(torch.equal(tensor, before[key]) for key, tensor in stack.model.state_dict().items())
    assert healed.log.train[-1].loss < 0.8 * healed.log.train[0].loss
    assert healed.plan.width == {} and healed.plan.drop == [] and not hasattr(healed.stack.model, "lamella_projection")
    folder = export(healed.stack, healed.plan, tmp_path / "out", form=natural_form(healed.plan, healed.stack))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        close(loaded(IDS).logits, healed.stack.model.eval()(IDS).logits)
        cut = lamella.apply(stack, plan)(IDS).logits
        assert (loaded(IDS).logits - cut).abs().max() > 1e-2
    again = minitron(healed.stack, CALIBRATION, params=0.7)  # and it can be cut once more
    assert again[-1].removed > 0


def test_much_depth_gone_adds_states_inside_through_one_projection(tmp_path: Path) -> None:
    stack = opened("llama")
    with pytest.warns(UserWarning, match="more than half"):
        plan = minitron(stack, CALIBRATION, layers=2, hidden=24, mlp=64)[-1]
    samples = blocks(CALIBRATION, loss_on="all")
    healed = distil(stack, plan, samples, config=replace(TRAINING, steps=3, log_every=1), out=tmp_path)
    assert set(healed.log.train[0].parts) == {"kl", "states", "alpha"}
    for point in healed.log.train:  # both terms weigh the same at every step
        assert point.parts["alpha"] * point.parts["states"] == pytest.approx(point.parts["kl"], rel=1e-4)
        assert point.loss == pytest.approx(2 * point.parts["kl"], rel=1e-4)
    assert len(healed.stack) == 2 and not hasattr(healed.stack.model, "lamella_projection")


def test_a_contest_compares_candidates_on_held_out_text(tmp_path: Path) -> None:
    stack = opened("llama")
    series = minitron(stack, CALIBRATION)
    samples = blocks(CALIBRATION, loss_on="all")
    config = replace(TRAINING, steps=4, eval_every=2)
    curves = contest(stack, [series[1], series[-1]], samples, samples[:2], config=config, out=tmp_path)
    assert [sorted(curve) for curve in curves] == [[0, 2, 4]] * 2
    assert curves[0][0] < curves[1][0]  # the smaller cut is closer before training


def test_the_shape_of_every_point_is_in_the_provenance() -> None:
    series = minitron(opened("llama"), CALIBRATION, hidden=28, mlp=56, heads=2, layers=3)
    assert series.provenance["shapes"][-1] == asdict(ModelShape(3, 28, 56, 2, 2))
    assert len(series) == 2 and series.provenance["options"]["hidden"] == 28
