"""Norms that become batch norms, and attention without a softmax: identities, closed forms, loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamella.methods.slab.modules import LinearAttention, PRepBN, RepBN, TokenMask, initial_repbn, linear_attention


def settled(width: int = 6, seed: int = 0) -> RepBN:
    """With statistics, gains, shifts and eta that are not what they begin with."""
    torch.manual_seed(seed)
    rep = RepBN(width, torch.randn(width), torch.randn(width), eta=0.7).double()
    rep.bn.running_mean.normal_()
    rep.bn.running_var.uniform_(0.3, 3)
    return rep.eval()


def test_in_evaluation_it_is_a_scale_and_a_shift() -> None:
    rep, x = settled(), torch.randn(2, 5, 6, dtype=torch.float64)
    a, b = rep.closed()
    torch.testing.assert_close(rep(x), a * x + b, rtol=1e-12, atol=1e-12)
    wide = nn.BatchNorm1d(6).double().eval()  # the same as one batch norm
    root = (rep.bn.running_var + rep.bn.eps).sqrt()
    wide.running_mean.copy_(rep.bn.running_mean)
    wide.running_var.copy_(rep.bn.running_var)
    wide.weight.data.copy_(rep.bn.weight + rep.eta * root)
    wide.bias.data.copy_(rep.bn.bias + rep.eta * rep.bn.running_mean)
    torch.testing.assert_close(rep(x), wide(x.flatten(0, 1)).view_as(x), rtol=1e-10, atol=1e-10)


def test_statistics_are_of_all_tokens_and_of_no_padding() -> None:
    real = TokenMask(torch.tensor([[True, True, False], [True, False, False]]))
    rep = RepBN(4, real=real).train()
    x = torch.randn(2, 3, 4)
    out = rep(x)
    tokens = x[real.mask]
    torch.testing.assert_close(rep.bn.running_mean, 0.1 * tokens.mean(0))
    torch.testing.assert_close(rep.bn.running_var, 0.9 + 0.1 * tokens.var(0))
    expected = (tokens - tokens.mean(0)) / (tokens.var(0, correction=0) + 1e-5).sqrt() + tokens
    torch.testing.assert_close(out[real.mask], expected, rtol=1e-5, atol=1e-5)
    everywhere = (x - tokens.mean(0)) / (tokens.var(0, correction=0) + 1e-5).sqrt() + x
    torch.testing.assert_close(out, everywhere, rtol=1e-5, atol=1e-5)  # what does not count is normed all the same
    other = torch.where(real.mask[..., None], x, torch.full_like(x, 1e6))
    fresh = RepBN(4, real=real).train()
    torch.testing.assert_close(fresh(other)[real.mask], out[real.mask])


def test_gamma_falls_over_the_steps_after_the_warm_ones() -> None:
    norm = nn.LayerNorm(4)
    place = PRepBN(norm, initial_repbn(norm, "norm"), steps=10, warm=3, first=0.8)
    gammas = []
    for step in range(16):
        place.step.fill_(step)
        gammas.append(place.gamma)
    assert gammas[:3] == [1.0] * 3 and gammas[3] == pytest.approx(0.8) and gammas[8] == pytest.approx(0.4)
    assert gammas[13:] == [0.0] * 3


@pytest.mark.parametrize("init", ["norm", "vision", "zero"])
def test_at_first_it_is_the_norm_exactly_and_evaluation_is_repbn_alone(init: str) -> None:
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 4)
    place = PRepBN(norm, initial_repbn(norm, init), steps=10).train()
    assert torch.equal(place(x), norm(x) + 0 * place.rep(x))
    warm = PRepBN(norm, initial_repbn(norm, init), steps=10, warm=2).train()
    assert torch.equal(warm(x), norm(x)) and int(warm.rep.bn.num_batches_tracked) == 0
    place.eval()
    assert torch.equal(place(x), place.rep(x))
    place.mixed = True
    assert torch.equal(place(x), norm(x))


def test_halfway_the_two_are_mixed() -> None:
    norm = nn.LayerNorm(4)
    place = PRepBN(norm, initial_repbn(norm, "norm"), steps=4).train()
    place.step.fill_(3)
    x = torch.randn(6, 4)
    rep = initial_repbn(norm, "norm").train()
    torch.testing.assert_close(place(x), 0.25 * norm(x) + 0.75 * rep(x))
    place.step.fill_(4)
    torch.testing.assert_close(place(x), initial_repbn(norm, "norm").train()(x))


def test_zero_begins_as_a_part_of_the_norm() -> None:
    norm = nn.RMSNorm(4)
    place = PRepBN(norm, initial_repbn(norm, "zero"), steps=4).train()
    place.step.fill_(1)
    x = torch.randn(6, 4)
    torch.testing.assert_close(place(x), 0.75 * norm(x))


# Attention


def slowly(module: LinearAttention, x: Tensor) -> Tensor:
    """Every pair of tokens by itself, and the convolution position by position."""
    batch, tokens, dim = x.shape
    width = dim // module.heads
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    k = k + module.position
    out = torch.zeros_like(x)
    for b in range(batch):
        for head in range(module.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(tokens):
                weights = torch.stack([(q[b, i, part].relu() * k[b, j, part].relu()).sum() for j in range(tokens)])
                out[b, i, part] = (weights[:, None] * v[b, :, part]).sum(0) / (weights.sum() + 1e-6)
                if module.local is not None:
                    out[b, i, part] += local(module, v[b, :, part], i)
    return module.proj(out)


def local(module: LinearAttention, v: Tensor, i: int) -> Tensor:
    kernel, side = module.local.weight, module.side
    reach = kernel.shape[-1] // 2
    row, column = divmod(i, side)
    total = module.local.bias.clone()
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            y, x = row + dy, column + dx
            if 0 <= y < side and 0 <= x < side:
                total = total + kernel[:, 0, dy + reach, dx + reach] * v[y * side + x]
    return total


@pytest.mark.parametrize(("tokens", "heads", "kernel"), [(9, 2, 3), (16, 1, 5), (4, 2, 0)])
@torch.no_grad()
def test_it_is_what_a_loop_over_pairs_finds(tokens: int, heads: int, kernel: int) -> None:
    torch.manual_seed(0)
    module = LinearAttention(8, heads, tokens, kernel).double()
    nn.init.normal_(module.position)
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), slowly(module, x), rtol=1e-9, atol=1e-9)


def test_both_orders_of_the_products_are_one_function() -> None:
    for tokens, width in ((64, 4), (4, 64)):
        q, k, v = torch.rand(2, 3, tokens, width), torch.rand(2, 3, tokens, width), torch.randn(2, 3, tokens, width)
        short, long = q @ (k.transpose(-2, -1) @ v), (q @ k.transpose(-2, -1)) @ v
        total = (q @ k.transpose(-2, -1)).sum(-1, keepdim=True) + 1e-6
        for out in (short, long):
            torch.testing.assert_close(linear_attention(q, k, v), out / total, rtol=1e-4, atol=1e-4)


def test_equal_keys_give_the_mean_and_a_query_of_nothing_gives_nothing() -> None:
    v = torch.randn(1, 1, 6, 4)
    k = torch.ones(1, 1, 6, 4)
    torch.testing.assert_close(
        linear_attention(torch.rand(1, 1, 6, 4) + 0.1, k, v), v.mean(2, keepdim=True).expand_as(v)
    )
    assert torch.equal(linear_attention(torch.zeros(1, 1, 6, 4), k, v), torch.zeros_like(v))


def test_a_grid_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="give a square"):
        LinearAttention(8, 2, 10)
    with pytest.raises(ValueError, match="supports neither masks"):
        LinearAttention(8, 2, 9)(torch.zeros(1, 9, 8), is_causal=True)
