"""The networks of Hourglass MLP against their formulas, in float64 and by hand."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.measure import Recording
from lamella.methods.hourglass_mlp import FrozenLift, HourglassFFN, HourglassMLP, inner_widths, size_of
from lamella.methods.hourglass_mlp.network import ffn_size
from lamella.train import TrainConfig, fit, supervised

SHAPES = [(64, 64, 66, (10, 10, 10, 10)), (16, 64, 96, (8,)), (64, 64, 64, (96, 192)), (5, 3, 7, ())]
X = torch.rand(12, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(network: HourglassMLP, x: Tensor, d_in: int, training: bool) -> Tensor:
    """The paper's equations, one feature at a time where BN is."""
    state = {name: each.double() for name, each in network.state_dict().items()}
    z = x @ state["lift.weight"].T
    for i in range(len(network.blocks)):
        mean, variance = state[f"blocks.{i}.norm.running_mean"], state[f"blocks.{i}.norm.running_var"]
        if training:
            mean, variance = z.mean(0), ((z - z.mean(0)) ** 2).mean(0)
        normed = (z - mean) / (variance + 1e-5).sqrt()
        hidden = (normed @ state[f"blocks.{i}.w1.weight"].T).clamp(min=0)
        z = z + hidden @ state[f"blocks.{i}.w2.weight"].T
    return 1 / (1 + (-(z @ state["readout.weight"].T)).exp())


@pytest.mark.parametrize("training", [True, False])
def test_the_network_computes_the_papers_equations(training: bool) -> None:
    torch.manual_seed(0)
    network = HourglassMLP(64, 20, 80, (12, 6, 9)).double()
    for block in network.blocks:
        block.norm.running_mean.uniform_(-1, 1)
        block.norm.running_var.uniform_(0.5, 2)
    expected = by_hand(network, X, 64, training)
    torch.testing.assert_close(network.train(training)(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d_in", "d_out", "d_latent", "d_hidden"), SHAPES)
def test_parameters_are_as_many_as_the_formula_says(
    d_in: int, d_out: int, d_latent: int, d_hidden: tuple[int, ...]
) -> None:
    for lift, readout in product(("trained", "frozen", "none"), (True, False)):
        if (lift == "none" and d_latent != d_in) or (not readout and d_latent != d_out):
            continue
        network = HourglassMLP(d_in, d_out, d_latent, d_hidden, lift=lift, readout=readout)
        trainable = sum(each.numel() for each in network.parameters())
        formula = 2 * d_latent * sum(d_hidden)
        formula += d_latent * d_in * (lift != "none") + d_latent * d_out * readout
        held = d_latent * d_in if lift == "frozen" else 0
        assert network.size == size_of(d_in, d_out, d_latent, d_hidden, lift, readout) == (formula, formula - held)
        assert trainable == formula - held


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        ((3072, 3072, 3546, (270,) * 5), 31.4e6),  # the paper's frontier on ImageNet-32, denoising
        ((768, 3072, 3546, (16,) * 5), 14.2e6),  # and super-resolution
        ((784, 784, 785, (115,) * 4), 1.95e6),  # MNIST, generative classification
    ],
)
def test_published_shapes_have_their_published_sizes(
    shape: tuple[int, int, int, tuple[int, ...]], total: float
) -> None:
    assert size_of(*shape).total == pytest.approx(total, rel=5e-3)


def test_a_block_whose_second_map_is_zero_is_the_identity() -> None:
    torch.manual_seed(0)
    with_blocks = HourglassMLP(64, 64, 80, (12, 12)).double()
    without = HourglassMLP(64, 64, 80, ()).double()
    without.load_state_dict({name: each for name, each in with_blocks.state_dict().items() if "blocks" not in name})
    for block in with_blocks.blocks:
        nn.init.zeros_(block.w2.weight)
    assert torch.equal(with_blocks(X), without(X))


def test_without_blocks_and_maps_it_is_the_sigmoid_of_its_input() -> None:
    network = HourglassMLP(64, 64, 64, (), lift="none", readout=False)
    assert torch.equal(network(X), torch.sigmoid(X)) and network.size == (0, 0)


def test_as_wide_hidden_as_skip_it_is_the_square_residual_mlp() -> None:
    torch.manual_seed(0)
    network = HourglassMLP(64, 64, 64, (64,), lift="none", readout=False).double()
    block = network.blocks[0]
    normed = (X - X.mean(0)) / (X.var(0, correction=0) + 1e-5).sqrt()
    expected = torch.sigmoid(X + torch.relu(normed @ block.w1.weight.T) @ block.w2.weight.T)
    torch.testing.assert_close(network.train()(X), expected, rtol=1e-12, atol=1e-12)


def test_nothing_has_a_bias_or_an_affine_norm() -> None:
    network = HourglassMLP(8, 8, 12, (4, 4))
    assert all(each.ndim == 2 for each in network.parameters())


# The frozen lift


def test_a_frozen_lift_is_bit_identical_after_training_and_the_optimizer_has_no_state_for_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = HourglassMLP(16, 16, 24, (6, 6), lift="frozen", seed=3)
    before = network.lift.weight.clone()
    x = torch.rand(40, 16, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(steps=5, lr=1e-2, batch=8, weight_decay=0.1)
    fit(network, Recording(x, x), supervised(), config, out=tmp_path)
    assert torch.equal(network.lift.weight, before)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    shapes = sorted(tuple(each["exp_avg"].shape) for each in state.values())
    assert shapes == sorted([(6, 24), (24, 6), (6, 24), (24, 6), (16, 24)])
    assert not any("lift" in name for name in load_file(checkpoint / "trained.safetensors"))


def test_a_checkpoint_holds_the_seed_of_a_frozen_lift_and_gives_the_same_matrix(tmp_path: Path) -> None:
    one, other = (HourglassMLP(16, 8, 24, (6,), lift="frozen", seed=seed) for seed in (11, 0))
    assert not torch.equal(one.lift.weight, other.lift.weight)
    save_file(one.state_dict(), tmp_path / "network.safetensors")
    stored = load_file(tmp_path / "network.safetensors")
    assert stored["lift.seed"].tolist() == [1, 11] and "lift.weight" not in stored
    other.load_state_dict(stored)
    assert torch.equal(one.lift.weight, other.lift.weight)
    x = torch.rand(4, 16)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_a_lift_is_drawn_as_linear_maps_are_and_nobody_else_draws_from_it() -> None:
    state = torch.get_rng_state()
    weight = FrozenLift(100, 400, seed=5).weight
    assert torch.equal(torch.get_rng_state(), state)
    bound = 1 / math.sqrt(100)
    assert -bound <= weight.min() < -0.999 * bound and 0.999 * bound < weight.max() <= bound
    standard_error = bound / math.sqrt(3) / math.sqrt(weight.numel())
    assert abs(float(weight.mean())) < 4 * standard_error
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_the_numbers_of_a_lift_are_those_of_pcg64() -> None:
    """From the definition of PCG64 (O'Neill 2014, XSL-RR 128/64), in whole numbers; numpy only seeds it."""
    import numpy as np

    state = np.random.PCG64(7).state["state"]
    number, mask, expected = state["state"], (1 << 128) - 1, []
    for _ in range(6):
        number = (number * 0x2360ED051FC65DA44385DF649FCCF645 + state["inc"]) & mask
        folded, turn = (number >> 64) ^ (number & ((1 << 64) - 1)), number >> 122
        bits = ((folded >> turn) | (folded << (64 - turn))) & ((1 << 64) - 1)
        expected.append((2 * ((bits >> 11) * 2.0**-53) - 1) / math.sqrt(3))
    assert FrozenLift(3, 2, seed=7).weight.flatten().tolist() == torch.tensor(expected).tolist()


def test_a_lift_of_another_generator_is_refused() -> None:
    lift = FrozenLift(3, 2)
    with pytest.raises(MethodError, match="generator 9"):
        lift.load_state_dict({"seed": torch.tensor([9, 0])})


# Feed-forward sub-blocks


def test_sub_blocks_compute_their_formula_after_one_another() -> None:
    torch.manual_seed(0)
    ffn = HourglassFFN(8, (3, 5), eps=1e-6).double()
    for block in ffn.blocks:
        nn.init.uniform_(block.norm.weight, 0.5, 2)
    h = torch.randn(2, 4, 8, dtype=torch.float64)
    stream = h.clone()
    for block in ffn.blocks:
        normed = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
        gate, up = normed @ block.gate.weight.T, normed @ block.up.weight.T
        stream = stream + (gate / (1 + (-gate).exp()) * up) @ block.down.weight.T
    torch.testing.assert_close(h + ffn(h), stream, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "blocks", "share"), [(576, 4, 1.0), (64, 3, 0.5), (32, 2, 0.77)])
def test_inner_widths_are_the_widest_that_fit(width: int, blocks: int, share: float) -> None:
    parameters, norms = int(share * 3 * width * 4 * width), blocks * width
    inner = inner_widths(width, parameters, blocks)
    assert len(inner) == blocks
    assert ffn_size(width, inner) - norms <= parameters < ffn_size(width, tuple(each + 1 for each in inner)) - norms
    assert sum(each.numel() for each in HourglassFFN(width, inner).parameters()) == ffn_size(width, inner)


# Bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            lambda: HourglassMLP(8, 8, 12, (4,), lift="none"),
            "without a lift d_latent must equal d_in, but they are 12 and 8",
        ),
        (lambda: HourglassMLP(8, 8, 12, (4,), readout=False), "without a read-out"),
        (lambda: HourglassMLP(8, 8, 12, (4, 0)), r"d_hidden\[1\] is 0"),
        (lambda: HourglassMLP(8, 8, 12, (4,), lift="fixed"), "lift 'fixed'"),
        (lambda: FrozenLift(8, 8, seed=-1), "seed of the lift is -1"),
        (lambda: HourglassFFN(8, ()), "give at least one width"),
        (lambda: inner_widths(64, 500, 4), "fewer than the 768 of the smallest shape"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given: object, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        given()  # type: ignore[operator]


def test_a_batch_of_one_is_refused_while_training_as_batch_norm_does() -> None:
    network = HourglassMLP(4, 4, 6, (2,))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.train()(torch.rand(1, 4))
    assert network.eval()(torch.rand(1, 4)).shape == (1, 4)
