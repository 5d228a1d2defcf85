"""Exchanging vectors: what is computed stays, what left comes back, and nothing moves beside its counterpart."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.switchlora import (
    ExchangeFrequency,
    SwitchHook,
    VectorAdamW,
    VectorExchange,
    per_vector,
    reset_state,
)
from lamella.stack import Stack, share
from lamella.train import Lora, TrainConfig, add_lora, own
from lamella.zoo.nano import nano

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(kind: str = "llama", r: int = 8) -> tuple[Stack, Lora]:
    stack = Stack(nano(kind))
    view = share(stack.model)
    lora = add_lora(view, r, alpha=1)
    own(view, lambda name: ".base_layer." in name)
    return stack, lora


def exchange(r: int = 8, sizes: tuple[int, int] = (24, 40)) -> VectorExchange:
    """Of one linear map from 24 to 40."""
    model = nn.ModuleDict({"linear": nn.Linear(*sizes, bias=False)})
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=1, target_modules=["linear"]), model)
    return VectorExchange(model["linear"], torch.Generator().manual_seed(0))


def effective(one: VectorExchange) -> Tensor:
    return one.weight.detach().double() + one.scale * one.b.detach().double() @ one.a.detach().double()


def everything(one: VectorExchange) -> dict[str, Tensor]:
    return one.state() | {name: getattr(one, name).detach() for name in ("a", "b", "weight")}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neither_pools_nor_exchanges_change_what_is_computed(kind: str) -> None:
    stack, lora = adapted(kind)
    switching = SwitchHook(lora, ExchangeFrequency(), 100, seed=0)
    with torch.no_grad():
        before = stack.model(IDS).logits
        torch.testing.assert_close(lora.view(IDS).logits, before, rtol=0, atol=2e-5)
        for each in switching.exchanges.values():
            for _ in range(20):
                each.switch(each.available(), freeze=0)
        torch.testing.assert_close(lora.view(IDS).logits, before, rtol=0, atol=2e-5)
        assert torch.equal(stack.model(IDS).logits, before)  # the caller's model is as it was


def test_every_exchange_leaves_the_weight_where_it_was() -> None:
    one = exchange()
    for _ in range(200):
        before = effective(one)
        rows, columns = one.switch(random.Random(0).randint(1, one.available()), freeze=0)
        assert (effective(one) - before).abs().max() <= 1e-6
        assert not set(rows.tolist()) & set(columns.tolist())


def test_pools_have_the_spread_that_balances_both_halves() -> None:
    m, n, r = 600, 300, 16
    one = exchange(r, (n, m))
    gain = 3**-0.5
    expected = ((m**0.5 * r / n**1.5) ** 0.25 * gain**0.5, (r / (m * n) ** 0.5) ** 0.25 * gain**0.5)
    assert one.pool_a.shape == (300, 300) and one.pool_b.shape == (300, 600)
    for pool, spread in zip((one.pool_a, one.pool_b), expected, strict=True):
        assert pool.std().item() == pytest.approx(spread, rel=0.01)
        assert pool.abs().max().item() == pytest.approx(3**0.5 * spread, rel=0.001)  # uniform
    product = one.b.detach() @ one.a.detach() / r
    assert (product @ torch.randn(n, 4000)).std().item() == pytest.approx(gain, rel=0.1)


def test_an_exchange_and_its_reverse_restore_everything() -> None:
    one = exchange()
    before = {name: each.clone() for name, each in everything(one).items()}
    one.switch(3, freeze=0)
    after = {name: each.clone() for name, each in one.state().items()}
    assert not torch.equal(after["slots_a"], before["slots_a"])
    one.next_a, one.next_b = before["next"].tolist()
    for slots, old, first in (
        (one.slots_a, before["slots_a"], one.next_a),
        (one.slots_b, before["slots_b"], one.next_b),
    ):
        slots[first - 1] = old[first] - 1  # so that the next ones to load are those that left
    one.switch(3, freeze=0)
    now = everything(one)
    assert torch.equal(now["a"], before["a"]) and torch.equal(now["b"], before["b"])
    torch.testing.assert_close(now["weight"], before["weight"], rtol=0, atol=1e-7)
    assert torch.equal(now["pool_a"], before["pool_a"])  # what was loaded goes back to where it was


def test_what_left_waits_in_the_pool_and_comes_back_trained() -> None:
    one = exchange(r=8, sizes=(12, 12))
    with torch.no_grad():
        one.a[0] += 1.0
    trained, slot = one.a[0].clone(), int(one.slots_a[0])
    one.switch(1, freeze=0)
    assert torch.equal(one.pool_a[slot], trained) and not torch.equal(one.a[0], trained)
    for _ in range(100):
        one.switch(1, freeze=0)
        if slot in one.slots_a.tolist():
            break
    assert torch.equal(one.a[one.slots_a.tolist().index(slot)], trained)


def test_nothing_is_exchanged_or_moves_beside_what_is_exchanged_or_frozen() -> None:
    """Ten thousand steps of a random number of exchanges, against a plain account of who may move."""
    one, freeze, generator = exchange(r=16, sizes=(24, 40)), 5, random.Random(0)
    waits: dict[tuple[str, int], int] = {}  # vectors that may not move, and for how many steps yet
    for _ in range(10_000):
        one.a.grad, one.b.grad = torch.ones_like(one.a), torch.ones_like(one.b)
        count = min(generator.choice([0, 0, 1, 2, 3]), one.available())
        rows, columns = one.switch(count, freeze)
        for row in rows.tolist():
            assert ("a", row) not in waits  # it is not frozen itself
            waits["b", row] = freeze
        for column in columns.tolist():
            assert ("b", column) not in waits
            waits["a", column] = freeze
        assert not {i for side, i in waits if side == "a"} & {i for side, i in waits if side == "b"}
        one.freeze_gradients()
        held = {("a", i) for i in (one.a.grad.abs().sum(1) == 0).nonzero()[:, 0].tolist()}
        held |= {("b", i) for i in (one.b.grad.abs().sum(0) == 0).nonzero()[:, 0].tolist()}
        assert held == set(waits)  # for exactly so many steps
        waits = {each: left - 1 for each, left in waits.items() if left > 1}


def test_a_map_no_wider_than_the_rank_is_said_to_stay() -> None:
    assert exchange(r=24).available() == 0 and exchange(r=23).available() > 0
    _, lora = adapted(r=16)  # keys and values of the model are 16 wide
    switching = SwitchHook(lora, ExchangeFrequency(), 100, seed=0)
    assert {name.rpartition(".")[2] for name in switching.unswitched} == {"k_proj", "v_proj"}


def test_the_frequency_falls_as_the_paper_says() -> None:
    often = ExchangeFrequency(interval=40, descent=0.1)
    assert often.share(99, 1000) == pytest.approx(0.3 / 40)
    assert often.share(0, 1000) == pytest.approx(0.3**0.01 / 40)
    assert ExchangeFrequency(descent=1e-3).share(999, 1000) == pytest.approx(1e-8 / 40)
    with pytest.raises(MethodError, match="interval 9: with 5 frozen steps"):
        ExchangeFrequency(interval=9)


def test_as_many_are_exchanged_as_are_asked_for_on_average() -> None:
    _, lora = adapted(r=8)
    frequency, steps = ExchangeFrequency(interval=20, descent=0.5, freeze=0), 200
    switching = SwitchHook(lora, frequency, steps, seed=0)
    for each in lora.view.parameters():
        each.grad = torch.zeros_like(each)
    counted: list[float] = []
    optimizer: Any = SimpleNamespace(state={})
    for step in range(steps):
        run: Any = SimpleNamespace(
            step=step, optimizer=optimizer, note=lambda name, value: counted.append(float(value))
        )
        switching.before_update(run)
    shares = torch.tensor([8 * frequency.share(step, steps) for step in range(steps)], dtype=torch.float64)
    maps = len(switching.exchanges)
    spread = float((maps * (shares % 1) * (1 - shares % 1)).sum()) ** 0.5
    assert abs(sum(counted) * maps - float(maps * shares.sum())) <= 3 * spread


def test_the_hook_resets_the_counterparts_of_what_it_exchanges_and_nothing_else() -> None:
    _, lora = adapted(r=8)
    switching = SwitchHook(lora, ExchangeFrequency(interval=10, descent=1.0), 100, seed=0)
    trained = {name: each for name, each in lora.view.named_parameters() if lora.trains(name)}
    optimizer = per_vector(1.0)(lora.view, trained, TrainConfig(lr=1e-2))
    run: Any = SimpleNamespace(step=0, optimizer=optimizer, note=lambda name, value: None)
    torch.manual_seed(0)

    def gradients() -> None:
        for each in trained.values():
            each.grad = torch.randn_like(each)

    for _ in range(3):
        gradients()
        optimizer.step()
    exchanged = 0
    for run.step in range(8):
        gradients()
        before = {
            name: (one.slots_a.clone(), one.slots_b.clone(), _state(optimizer, one.a, 0), _state(optimizer, one.b, 1))
            for name, one in switching.exchanges.items()
        }
        switching.before_update(run)
        for name, one in switching.exchanges.items():
            slots_a, slots_b, of_rows, of_columns = before[name]
            rows, columns = one.slots_a != slots_a, one.slots_b != slots_b
            exchanged += int(rows.sum() + columns.sum())
            for old, new, gone in ((of_rows, _state(optimizer, one.a, 0), columns),
                                   (of_columns, _state(optimizer, one.b, 1), rows)):  # fmt: skip
                assert not new[gone].any() and torch.equal(new[~gone], old[~gone])
        optimizer.step()
    assert exchanged > 100


def _state(optimizer: torch.optim.Optimizer, one: Tensor, axis: int) -> Tensor:
    """Count of steps and both moments of each vector [vectors, numbers]."""
    return torch.cat([each.movedim(axis, 0).clone() for each in optimizer.state[one].values()], dim=1)


# The optimizer.


def test_without_exchanges_it_is_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 9), (9, 4), (7,))]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    mine = VectorAdamW(
        [{"params": [each], "axis": axis} for each, axis in zip(ours, (0, 1, None), strict=True)], lr=1e-2
    )
    known = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        known.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_forgotten_starts_from_scratch_and_nothing_else_does(axis: int) -> None:
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(5, 5))
    optimizer = VectorAdamW([{"params": [one], "axis": axis}], lr=1e-2)

    def step() -> None:
        one.grad = torch.randn_like(one)
        optimizer.step()

    for _ in range(7):
        step()
    before = {name: each.clone() for name, each in optimizer.state[one].items()}
    reset_state(optimizer, one, torch.tensor([1, 3]), axis)
    for name, each in optimizer.state[one].items():
        gone, old = each.movedim(axis, 0), before[name].movedim(axis, 0)
        assert not gone[[1, 3]].any() and torch.equal(gone[[0, 2, 4]], old[[0, 2, 4]])
    was = one.detach().clone()
    step()
    moved = (one.detach() - was).movedim(axis, 0)[[1, 3]]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-4, atol=0)  # Adam's first step


def test_pools_in_files_are_those_in_memory_and_the_files_do_not_change(tmp_path: Path) -> None:
    hooks = [SwitchHook(adapted()[1], ExchangeFrequency(), 100, seed=0, folder=folder) for folder in (None, tmp_path)]
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == len(hooks[1].exchanges)
    for ours, theirs in zip(*(hook.exchanges.values() for hook in hooks), strict=True):
        for _ in range(20):
            count = ours.available()
            for each in (ours, theirs):
                each.switch(count, freeze=0)
        kept = theirs.state()
        assert all(torch.equal(each, kept[name]) for name, each in ours.state().items())
    assert all(file.read_bytes() == content for file, content in files.items())
