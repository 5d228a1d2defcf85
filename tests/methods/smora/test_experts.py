"""The experts of one map: the paper's identities, both kernels, gates, gradients, and the balance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lamella.errors import MethodError
from lamella.methods.smora import KERNELS, LoadBalance, RankExperts, choose
from lamella.methods.smora.baselines import HydraLora, LoraMixture, MosLora
from lamella.plan import attach


def random_experts(
    inputs: int = 24, outputs: int = 20, dtype: torch.dtype = torch.float32, **settings: object
) -> RankExperts:
    """Experts with a B that is not 0."""
    torch.manual_seed(0)
    made = RankExperts(inputs, outputs, **{"r": 16, "k": 4, **settings}).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        made.lora_B.copy_(torch.randn(made.lora_B.shape) / 4)
    return made


def by_hand(made: RankExperts, x: Tensor, bias_in_gate: bool = True) -> Tensor:
    """The change of one token after the other, in float64, as the formula says it."""
    a, b, router, bias = (each.double() for each in (made.lora_A, made.lora_B, made.lora_router, made.lora_biases))
    out = []
    for token in x.double().flatten(0, -2):
        z = torch.sigmoid(router @ token)
        scores = [(float(z[i // made.p] + bias[i]), i) for i in range(made.r)]
        chosen = [i for _, i in sorted(scores, key=lambda each: (-each[0], each[1]))[: made.k]]
        s = {i: z[i // made.p] + (bias[i] if bias_in_gate else 0) for i in chosen}
        gates = {i: made.k * s[i] / sum(s.values()) for i in chosen}
        out.append(made.alpha / made.k * sum(gates[i] * b[:, i] * (a[i] @ token) for i in chosen))
    return torch.stack(out).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("bias_in_gate", [True, False])
def test_it_computes_the_formula_token_by_token(kernel: str, p: int, bias_in_gate: bool) -> None:
    made, x, y = random_experts(p=p, bias_in_gate=bias_in_gate), torch.randn(3, 7, 24), torch.randn(3, 7, 20)
    with torch.no_grad():
        made.lora_biases.copy_((torch.randn(16 // p) / 10).repeat_interleave(p))
        made.kernel = kernel  # type: ignore[assignment]
        expected = y + by_hand(made, x, bias_in_gate).float()
        torch.testing.assert_close(made.eval()(x, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_mixture_of_loras_is_one_lora_with_gates_over_blocks(count: int) -> None:
    torch.manual_seed(0)
    each_a, each_b = torch.randn(count, 8, 32) / 6, torch.randn(count, 24, 8) / 3
    x, gates = torch.randn(50, 32), torch.rand(50, count)
    mixture = sum(gates[:, e : e + 1] * linear(linear(x, each_a[e]), each_b[e]) for e in range(count))
    one = linear(linear(x, each_a.flatten(0, 1)) * gates.repeat_interleave(8, dim=1), torch.cat(list(each_b), dim=1))
    assert float((mixture - one).abs().max()) < 1e-5


def test_all_ranks_with_constant_scores_are_a_lora_bitwise() -> None:
    made, x, y = random_experts(r=16, k=16), torch.randn(5, 24), torch.randn(5, 20)
    with torch.no_grad():
        made.lora_router.zero_()  # sigmoid gives 0.5 everywhere
        lora = y + 16.0 / 16 * linear(linear(x, made.lora_A), made.lora_B)
        assert torch.equal(made(x, y), lora)


def test_one_block_of_all_ranks_is_a_lora() -> None:
    made, x, y = random_experts(r=16, k=16, p=16), torch.randn(5, 24), torch.randn(5, 20)
    with torch.no_grad():
        assert made.lora_router.shape == (1, 24)
        torch.testing.assert_close(made(x, y), y + linear(linear(x, made.lora_A), made.lora_B), rtol=0, atol=1e-6)


def test_fresh_experts_change_nothing_bitwise() -> None:
    made, x = RankExperts(24, 20, r=16, k=4), torch.randn(2, 5, 24)
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.randn(2, 5, 20).to(dtype)
        assert torch.equal(made(x.to(dtype), y), y) and made(x.to(dtype), y).dtype == dtype


def test_gates_are_k_in_number_with_mean_1_and_what_is_not_chosen_has_no_gradient() -> None:
    made, x = random_experts(), torch.randn(40, 24)
    route = made.route(x)
    assert route.ranks.shape == route.gates.shape == (40, 4)
    assert all(len(set(ranks)) == 4 for ranks in route.ranks.tolist())
    torch.testing.assert_close(route.gates.mean(-1), torch.ones(40), rtol=0, atol=1e-6)
    for kernel in KERNELS:
        made.kernel = kernel
        made.zero_grad()
        made(x[:1], torch.zeros(1, 20)).square().sum().backward()
        chosen = set(made.route(x[:1]).ranks[0].tolist())
        assert made.lora_A.grad is not None and made.lora_B.grad is not None and made.lora_router.grad is not None
        for rank in range(16):
            grads = [made.lora_A.grad[rank], made.lora_B.grad[:, rank], made.lora_router.grad[rank]]
            assert all(bool(each.any()) == (rank in chosen) for each in grads)


def test_both_kernels_and_all_their_gradients_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.methods.smora.modules.GATHERED", 500)  # so that it goes through tokens in parts
    found = []
    for kernel in KERNELS:
        made = random_experts()
        made.kernel = kernel
        x = torch.randn(3, 21, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = made(x, torch.zeros(3, 21, 20))
        y.square().mean().backward()
        found.append([y, x.grad, *(each.grad for each in made.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_gradients_are_those_of_the_function(kernel: str) -> None:
    made = random_experts(6, 5, dtype=torch.float64, r=6, k=2)
    made.kernel = kernel  # type: ignore[assignment]
    x = torch.randn(4, 6, dtype=torch.float64)
    z = torch.sigmoid(linear(x, made.lora_router)).sort(descending=True).values
    assert float((z[:, 1] - z[:, 2]).detach().min()) > 1e-4  # away from ties, where the choice jumps

    def function(x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        route = choose(torch.sigmoid(linear(x, router)), made.lora_biases, 2)
        return KERNELS[kernel](x, a, b, route)  # type: ignore[index]

    given = [each.detach().requires_grad_() for each in (x, made.lora_A, made.lora_B, made.lora_router)]
    assert torch.autograd.gradcheck(function, given)


def test_no_token_gives_nothing() -> None:
    for kernel in KERNELS:
        made = random_experts()
        made.kernel = kernel
        assert made(torch.zeros(0, 24), torch.zeros(0, 20)).shape == (0, 20)


# The balance.


def balanced(made: RankExperts, u: float = 0.25) -> LoadBalance:
    return LoadBalance({"map": made}, u)


def a_pass(made: RankExperts, x: Tensor, around: Callable[..., Tensor] | None = None) -> None:
    y = torch.zeros(*x.shape[:-1], 20, requires_grad=True)
    out = made(x, y) if around is None else around(made, x, y)
    out.sum().backward()


def test_the_balance_moves_by_u_towards_the_idle_in_training_alone() -> None:
    made, x = random_experts(), torch.randn(9, 24)
    counts = torch.bincount(made.route(x).ranks.flatten(), minlength=16).float()
    a_pass(made.train(), x)
    balanced(made).update()
    assert torch.equal(made.lora_biases, 0.25 * torch.sign(9 * 4 / 16 - counts))
    assert set(made.lora_biases.tolist()) <= {-0.25, 0.0, 0.25} and made.lora_biases.unique().numel() > 1
    before = made.lora_biases.clone()
    a_pass(made.eval(), x)
    with torch.no_grad():
        made.train()(x, torch.zeros(9, 20))
    balanced(made).update()
    assert torch.equal(made.lora_biases, before)
    balanced(made).update()  # nothing was counted since
    assert torch.equal(made.lora_biases, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_moves_it_once_and_routes_alike_both_times(use_reentrant: bool) -> None:
    x, grads, vectors = torch.randn(9, 24), [], []
    for checkpointed in (False, True):
        made = random_experts().train()
        even = balanced(made, u=5.0)  # so far that another route would be taken after it
        around = (lambda made, *given: checkpoint(made, *given, use_reentrant=use_reentrant)) if checkpointed else None
        for _ in range(3):
            a_pass(made, x, around)
            even.update()
        grads.append([each.grad for each in made.parameters()])
        vectors.append(made.lora_biases)
    assert torch.equal(*vectors)
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_does_not_count() -> None:
    made, x = random_experts().train(), torch.randn(2, 9, 24)
    made.token_mask = torch.ones(2, 9, dtype=torch.bool)
    made.token_mask[0, :6] = False
    a_pass(made, x)
    assert made.counts is not None and int(made.counts.sum()) == 12 * 4
    assert torch.equal(made.counts, torch.bincount(made.route(x)[0][made.token_mask].flatten(), minlength=16))


def test_blocks_are_counted_by_rank_and_stay_alike() -> None:
    made, x = random_experts(p=4, k=8).train(), torch.randn(30, 24)
    for _ in range(5):
        a_pass(made, x)
        assert made.counts is not None and made.counts.shape == (16,)
        balanced(made, 0.01).update()
    assert torch.equal(made.lora_biases, made.lora_biases[::4].repeat_interleave(4))


def test_scores_pushed_below_0_leave_gates_finite_with_mean_1() -> None:
    z = torch.rand(50, 8)
    for bias in (-0.5, -1.0, -7.0):
        route = choose(z, torch.full((8,), bias), 2)
        assert torch.isfinite(route.gates).all() and (route.gates >= 0).all()
        torch.testing.assert_close(route.gates.mean(-1), torch.ones(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 17}, "k 17 of r 16: give the number of ranks per token, from 1 to r"),
        ({"k": 0}, "k 0 of r 16"),
        ({"r": 0, "k": 0}, "k 0 of r 0"),
        ({"p": 3}, "p 3: the size of blocks of ranks must divide r 16 and k 4"),
        ({"p": 8}, "p 8: the size of blocks"),
        ({"p": 0}, "p 0: the size of blocks"),
    ],
)
def test_ranks_that_cannot_be_chosen_so_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        random_experts(**settings)  # type: ignore[arg-type]


# What it is compared with.


def test_baselines_compute_what_their_papers_say() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 24), torch.zeros(6, 20)
    for how in ("top-1", "top-2", "soft", "smear"):
        made = LoraMixture(24, 20, experts=4, r=3, alpha=6, mixing=how).eval()  # type: ignore[arg-type]
        nn.init.normal_(made.lora_B)
        a, b = made.lora_A.unflatten(0, (4, 3)), made.lora_B.unflatten(1, (4, 3)).transpose(0, 1)
        g = torch.softmax(linear(x, made.lora_router), -1)
        if how == "top-1":
            g = (g == g.max(-1, keepdim=True).values).float()
        if how == "top-2":
            g = torch.where(g >= g.topk(2).values[:, 1:], g, 0)
            g = g / g.sum(-1, keepdim=True)
        if how == "smear":
            mean_a, mean_b = torch.einsum("ne,erd->nrd", g, a), torch.einsum("ne,eor->nor", g, b)
            expected = torch.einsum("nor,nrd,nd->no", mean_b, mean_a, x)
        else:
            expected = torch.einsum("ne,eor,erd,nd->no", g, b, a, x)
        torch.testing.assert_close(made(x, y), 2 * expected, rtol=1e-4, atol=1e-4)
    hydra = HydraLora(24, 20, experts=4, r=3, alpha=6)
    nn.init.normal_(hydra.lora_B)
    heads = hydra.lora_B.unflatten(1, (4, 3)).transpose(0, 1)
    g = torch.softmax(linear(x, hydra.lora_router), -1)
    expected = 2 * torch.einsum("ne,eor,rd,nd->no", g, heads, hydra.lora_A, x)
    torch.testing.assert_close(hydra(x, y), expected, rtol=1e-4, atol=1e-4)
    mos = MosLora(24, 20, r=4, alpha=8)
    nn.init.normal_(mos.lora_B)
    torch.testing.assert_close(mos(x, y), 2 * x @ mos.lora_A.T @ mos.lora_mixer.T @ mos.lora_B.T, rtol=1e-4, atol=1e-4)


def test_a_top_1_mixture_is_soft_while_it_trains() -> None:
    torch.manual_seed(0)
    made, x = LoraMixture(24, 20), torch.randn(200, 24)
    trains, runs = made.train().gates(x), made.eval().gates(x)
    assert set(runs.unique().tolist()) == {0.0, 1.0} and ((trains > 0) & (trains < 1)).any()
    torch.testing.assert_close(trains.sum(-1), torch.ones(200))


def test_each_map_of_a_model_has_a_router_of_its_own() -> None:
    view = nn.ModuleDict({"one": nn.Linear(24, 20), "two": nn.Linear(24, 20)})
    made = attach(view, ["one", "two"], lambda inputs, outputs: RankExperts(inputs, outputs, r=16, k=4), seed=3)
    routers = [each.lora_router for each in made.values()]
    assert not torch.equal(*routers) and all(each.abs().max() > 0 for each in routers)
