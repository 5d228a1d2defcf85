"""Merges without training: against dense arithmetic, by hand, and in their limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.lora_recycling import (
    EntryMerge,
    attach,
    average,
    closeness,
    core,
    cosine,
    groups,
    inner,
    norm,
    randomise,
    tsv,
)
from lamella.stack import Stack, share
from lamella.train import Adapter, add_lora, merge
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def some(stack: Stack, seed: int, r: int, alpha: int, **where) -> Adapter:
    """An adapter that does something: its B is random too."""
    found = add_lora(share(stack.model), r, alpha, seed=seed, **where).adapter()
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: (a, 0.1 * torch.randn(b.shape, generator=generator)) for name, (a, b) in found.pairs.items()}
    return replace(found, pairs=pairs)


@pytest.fixture(params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest) -> tuple[Stack, list[Adapter]]:
    """A model and three adapters of other ranks, scales and modules."""
    stack = Stack(nano(request.param))
    up, down = ("up_proj", "down_proj") if request.param == "llama" else ("c_fc", "c_attn")
    return stack, [
        some(stack, 1, 4, 8),
        some(stack, 2, 3, 9, targets=[up]),
        some(stack, 3, 2, 1, targets=[down], sites=["layers.1", "layers.2"]),
    ]


def dense(adapter: Adapter, name: str) -> Tensor:
    """s B A in float64, from nothing but its parts."""
    if name not in adapter.pairs:
        return torch.zeros(())
    a, b = (half.double() for half in adapter.pairs[name])
    found = adapter.scales[name] * (b @ a)
    return found.T if adapter.transposed else found


def by_hand(stack: Stack, adapters: list[Adapter], weights: list[float]):
    model = share(stack.model)
    for name in {name for each in adapters for name in each.pairs}:
        module = model.get_submodule(name)
        update = sum(weight * dense(each, name) for each, weight in zip(adapters, weights, strict=True))
        module.weight = nn.Parameter((module.weight.double() + update).float(), requires_grad=False)
    return model(IDS).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def attached(stack: Stack, adapters: list[Adapter], **options):
    return attach(share(stack.model), adapters, groups(stack, options.get("granularity", "module")), **options)


@pytest.mark.parametrize("granularity", ["model", "layer", "sublayer", "module", "rank"])
def test_all_weights_zero_is_the_model_to_the_bit(world, granularity: str) -> None:
    stack, adapters = world
    found = attached(stack, adapters, granularity=granularity)
    assert torch.equal(found.model(IDS).logits, stack.model(IDS).logits)
    assert torch.equal(merge(stack, found.adapter()).model(IDS).logits, stack.model(IDS).logits)


def test_per_module_coefficients_of_one_nth_are_the_simple_average_of_dense_weights(world) -> None:
    stack, adapters = world
    found = attached(stack, adapters, activation="identity")
    for each in found.tensors.values():
        each.fill_(1 / 3)
    wanted = by_hand(stack, adapters, [1 / 3] * 3)
    close(found.model(IDS).logits, wanted)
    close(merge(stack, average(adapters)).model(IDS).logits, wanted)


def test_the_concatenated_form_is_the_merged_dense_form_for_any_coefficients(world) -> None:
    stack, adapters = world
    found = attached(stack, adapters, granularity="rank", activation="sigmoid", init="normal", seed=3)
    said = found.model(IDS).logits
    assert (said - stack.model(IDS).logits).abs().max() > 1e-2
    close(merge(stack, found.adapter()).model(IDS).logits, said)


def test_one_adapter_with_coefficient_1_is_that_adapter(world) -> None:
    stack, adapters = world
    found = attached(stack, adapters[:1], activation="identity", init="target")
    close(found.model(IDS).logits, by_hand(stack, adapters[:1], [1.0]))


def test_tying_gives_1_L_2L_and_7L_coefficients_and_a_sum_of_ranks() -> None:
    stack = Stack(nano("llama"))
    adapters = [some(stack, 1, 4, 8), some(stack, 2, 3, 9)]
    counts = {each: attached(stack, adapters, granularity=each).tensors for each in
              ("model", "layer", "sublayer", "module", "rank")}  # fmt: skip
    assert [len(each) for each in counts.values()] == [1, 4, 8, 28, 28]
    assert {len(each) for each in counts["module"].values()} == {2}
    assert {len(each) for each in counts["rank"].values()} == {7}


def test_initial_weights_are_those_of_their_names() -> None:
    stack = Stack(nano("llama"))
    adapters = [some(stack, seed, 2, 2) for seed in range(4)]

    def start(init: str, activation: str = "identity") -> Tensor:
        return next(iter(attached(stack, adapters, init=init, activation=activation).coefficients().values()))

    assert start("equal").tolist() == [0.5] * 4 and start("target").tolist() == [1, 0, 0, 0]
    close(start("equal", "square"), torch.full((4,), 0.25))
    close(start("zero", "softmax"), torch.full((4,), 0.25))
    assert start("zero", "leaky_relu").tolist() == [0] * 4
    with pytest.raises(MethodError, match="softmax is over adapters"):
        attached(stack, adapters, granularity="rank", activation="softmax")


# Entries: one module "m" with given updates.


def of(*updates: list[list[float]]) -> list[Adapter]:
    """Adapters whose updates of one module are these matrices."""
    found = []
    for each in updates:
        matrix = torch.tensor(each)
        found.append(Adapter({"m": (torch.eye(matrix.shape[1]), matrix)}, {"m": 1.0}))
    return found


def test_ties_of_full_density_and_equal_signs_is_the_mean() -> None:
    adapters = of([[1.0, -2.0]], [[3.0, -4.0]])
    assert EntryMerge(adapters, [1.0, 1.0], density=1.0).delta("m").tolist() == [[2.0, -3.0]]


def test_ties_trims_elects_signs_and_averages_those_that_agree_as_by_hand() -> None:
    adapters = of([[4.0, 0.1, -3.0, 0.2]], [[-1.0, 2.0, -5.0, 0.3]], [[6.0, -2.0, 0.5, 0.1]])
    # trimmed to two each: [4, 0, -3, 0], [0, 2, -5, 0], [6, -2, 0, 0]; sums [10, 0, -8, 0], the tie counts as +
    assert EntryMerge(adapters, [1.0] * 3, density=0.5).delta("m").tolist() == [[5.0, 2.0, -4.0, 0.0]]
    # by frequency the first three have signs +, a tie, and -
    assert EntryMerge(adapters, [1.0] * 3, density=0.5, sign="frequency").delta("m").tolist() == [[5.0, 2.0, -4.0, 0.0]]


def test_mass_and_frequency_elect_different_signs() -> None:
    adapters = of([[5.0]], [[-1.0]], [[-2.0]])
    assert EntryMerge(adapters, [1.0] * 3, density=1.0).delta("m").tolist() == [[5.0]]
    assert EntryMerge(adapters, [1.0] * 3, density=1.0, sign="frequency").delta("m").tolist() == [[-1.5]]


@pytest.mark.parametrize("how", ["ties", "dare", "dare-ties", "magnitude"])
def test_weights_count_once(how: str) -> None:
    stack = Stack(nano("llama"))
    adapters, name = [some(stack, seed, 4, 8) for seed in range(3)], "model.layers.0.mlp.up_proj"
    one, tenth = (EntryMerge(adapters, [weight] * 3, how, 0.4).delta(name) for weight in (1.0, 0.1))
    assert one.abs().max() > 0
    torch.testing.assert_close(tenth, 0.1 * one, atol=1e-7, rtol=1e-5)


def test_trimming_is_of_each_adapter_and_module_not_of_all_together() -> None:
    small, large = of([[0.1, 0.2, 0.3, 0.4]], [[10.0, 20.0, 30.0, 40.0]])
    found = EntryMerge([small, large], [1.0, 1.0], "magnitude", 0.5).delta("m")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 30.3, 40.4]]))


def test_dare_has_the_linear_sum_for_expectation_and_keeps_all_at_p_1() -> None:
    stack = Stack(nano("llama"))
    adapters, name = [some(stack, seed, 4, 8) for seed in range(2)], "model.layers.1.self_attn.k_proj"
    total = (dense(adapters[0], name) + dense(adapters[1], name)).float()
    kept = EntryMerge(adapters, [1.0, 1.0], "dare", 1.0).delta(name)
    torch.testing.assert_close(kept, total, atol=1e-6, rtol=1e-6)
    masks = torch.stack([EntryMerge(adapters, [1.0] * 2, "dare", 0.5, seed=seed).delta(name) for seed in range(2000)])
    errors = (masks.mean(0) - total).abs() / (masks.std(0) / math.sqrt(len(masks)))
    assert (errors <= 3).float().mean() >= 0.99  # 99.7 % are expected
    dropped = (masks == 0).float().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.01)  # where both are dropped


def test_every_adapter_has_one_weight() -> None:
    (one,) = of([[1.0]])
    with pytest.raises(MethodError, match="give one weight each"):
        EntryMerge([one], [1.0, 2.0])


# Factors


def test_tsv_of_orthogonal_tasks_at_full_rank_is_the_plain_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q for _ in "uv")
    adapters = []
    for start in (0, 3, 6):  # subspaces that have nothing in common
        part = slice(start, start + 3)
        sizes = torch.rand(3, generator=generator) + 0.5
        adapters.append(Adapter({"m": (right[part], left[:, part] * sizes)}, {"m": 2.0}))
    found, wanted = tsv(adapters, [1.0, 0.5, -1.0], k=3), adapters[0].delta("m") + 0.5 * adapters[1].delta("m")
    close(found.delta("m"), wanted - adapters[2].delta("m"))


def test_tsv_has_orthonormal_vectors_where_tasks_overlap() -> None:
    stack = Stack(nano("llama"))
    adapters = [some(stack, seed, 6, 8) for seed in range(3)]
    found, name = tsv(adapters, [1.0] * 3, k=4), "model.layers.0.mlp.down_proj"
    a, b = found.pairs[name]
    assert a.shape[0] == b.shape[1] == 12
    close(a @ a.T, torch.eye(12))
    directions = b / b.norm(dim=0)
    close(directions.T @ directions, torch.eye(12))
    sizes = torch.cat([torch.linalg.svdvals(dense(each, name).float())[:4] for each in adapters])
    close(b.norm(dim=0), sizes)


def test_core_space_is_the_linear_sum_and_at_a_smaller_rank_its_best_approximation(world) -> None:
    stack, adapters = world
    weights = [0.5, -1.0, 2.0]
    close(merge(stack, core(adapters, weights)).model(IDS).logits, by_hand(stack, adapters, weights))
    name = adapters[1].modules[0]
    whole = sum(weight * dense(each, name) for each, weight in zip(adapters, weights, strict=True))
    u, s, v = torch.linalg.svd(whole)
    close(core(adapters, weights, rank=2).delta(name).double(), (u[:, :2] * s[:2]) @ v[:2])


def test_closeness_by_factors_is_that_of_dense_updates(world) -> None:
    _, (one, two, three) = world
    modules = sorted({*one.modules, *two.modules})
    pairs = [(dense(one, name).flatten(), dense(two, name).flatten()) for name in modules]
    for name in modules:
        ours, theirs = (dense(each, name) for each in (one, two))
        assert inner(one, two, name) == pytest.approx(float((ours * theirs).sum()), abs=1e-5)
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) if b.numel() > 1 else 0.0 for a, b in pairs]
    assert closeness(two, one) == pytest.approx(sum(cosines) / len(modules), abs=1e-5)
    assert closeness(two, one, "clamp-pm") == pytest.approx(sum(max(c, 0) for c in cosines) / len(modules), abs=1e-5)
    sizes = [math.sqrt(sum(float((dense(each, n) ** 2).sum()) for n in each.modules)) for each in (one, two)]
    assert norm(one) == pytest.approx(sizes[0], rel=1e-5)
    total = sum(float((a * b).sum()) for a, b in pairs)
    assert closeness(two, one, "macro") == pytest.approx(total / sizes[0] / sizes[1], abs=1e-5)
    apart = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    assert closeness(two, one, "l2") == pytest.approx(-math.log1p(apart), rel=1e-4)
    for how, of_entries in (
        ("clamp", lambda a, b: (a * b).clamp(min=0).sum() / (a.norm() * b.norm())),
        ("abs", lambda a, b: (a * b).abs().sum() / (a.norm() * b.norm())),
        ("quasi-fim", lambda a, b: torch.cosine_similarity(a**2, b**2, dim=0).sqrt()),
    ):
        each = [float(of_entries(a, b)) if b.numel() > 1 else 0.0 for a, b in pairs]
        assert closeness(two, one, how) == pytest.approx(sum(each) / len(modules), abs=1e-5)
    assert closeness(one, one) == pytest.approx(1.0) and cosine(two, three, two.modules[0]) == 0.0


def test_random_weights_have_the_spread_and_shapes_of_what_they_replace_and_leave_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(rank: int, spread: float) -> Adapter:
        a = 1 + spread * torch.randn(rank, 256, generator=generator)  # a mean, which the spread does not count
        return Adapter({"m": (a, 3 * torch.randn(512, rank, generator=generator))}, {"m": 0.5}, base="here")

    adapters = [drawn(16, 9.0), drawn(32, 0.5), drawn(64, 2.0)]
    found = randomise(adapters, keep=[0], seed=1)
    assert found[0] is adapters[0]
    for half in (0, 1):
        ours, theirs = (torch.cat([each.pairs["m"][half].flatten() for each in of[1:]]) for of in (found, adapters))
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)
        assert abs(float(ours.mean())) < 0.05 * float(ours.std())
    for ours, theirs in zip(found, adapters, strict=True):
        assert [each.shape for each in ours.pairs["m"]] == [each.shape for each in theirs.pairs["m"]]
        assert (ours.scales, ours.base) == (theirs.scales, theirs.base)
    assert norm(found[1]) > 0  # a control with B = 0 would be the model itself
    assert torch.equal(randomise(adapters, seed=1)[2].pairs["m"][0], randomise(adapters, seed=1)[2].pairs["m"][0])
