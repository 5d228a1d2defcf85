"""A pool needs memory for one module at a time, however many adapters it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lamella.methods.lora_recycling import AdapterPool, attach, average, closeness, randomise, updates
from lamella.stack import Stack, share
from lamella.train import Adapter, adapters, add_lora, merge
from lamella.zoo.nano import nano

RANK, FEW, MANY = 4, 3, 12
MERGES = ["average", "arithmetic", "ties", "dare", "dare-ties", "magnitude", "tsv", "core"]
FACTORISED = {"average", "arithmetic", "tsv", "core"}


class AliveTensors(TorchDispatchMode):
    """Records the largest number of bytes in all tensors that were alive at once, other than those of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.ignored = {each.data_ptr() for each in model.parameters()}
        self.seen: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, found)):
            if isinstance(each, Tensor) and each.data_ptr() not in self.ignored:
                self.seen[id(each)] = each
        self.peak = max(self.peak, sum({each.data_ptr(): each.nbytes for each in self.seen.values()}.values()))
        return found


@pytest.fixture(autouse=True)
def files_are_read_outside_of_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors makes tensors in a way that no dispatch mode supports; what is read is seen when it is used."""
    read = adapters._read_pair

    def outside(file: Path, name: str) -> adapters.Pair:
        with _disable_current_modes():
            return read(file, name)

    monkeypatch.setattr(adapters, "_read_pair", outside)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(nano("llama", num_hidden_layers=4))


@pytest.fixture(scope="module")
def pools(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with few and with many adapters."""
    folders = {count: tmp_path_factory.mktemp(f"pool of {count}") for count in (FEW, MANY)}
    for count, folder in folders.items():
        for seed in range(count):
            some(stack, seed).write(folder / str(seed))
    return folders


def some(stack: Stack, seed: int) -> Adapter:
    found = add_lora(share(stack.model), RANK, RANK, seed=seed).adapter()
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: (a, 0.3 * torch.randn(b.shape, generator=generator)) for name, (a, b) in found.pairs.items()}
    return replace(found, pairs=pairs)


def largest_pair(stack: Stack) -> int:
    """Bytes of the largest factors of a module."""
    return max(a.nbytes + b.nbytes for a, b in some(stack, 0).pairs.values())


def growth(stack: Stack, sources: dict[int, Any], job: Callable[[AdapterPool], Any]) -> float:
    """Bytes by which the peak of a job grows with each adapter of a pool."""
    peaks = {}
    for count, source in sources.items():
        with torch.no_grad(), AliveTensors(stack.model) as alive:
            job(AdapterPool.open(source, least_norm=0.0))
        peaks[count] = alive.peak
    few, many = sorted(peaks)
    return (peaks[many] - peaks[few]) / (many - few)


RANDOM = {count: f"random:count={count},r={RANK}" for count in (FEW, MANY)}


@pytest.mark.parametrize("kind", ["files", "random"])
def test_checking_and_choosing_need_the_memory_of_one_adapter_s_module(
    kind: str, stack: Stack, pools: dict[int, Path]
) -> None:
    own = some(stack, 99)

    def job(pool: AdapterPool) -> None:
        members = pool.members(stack)
        chosen = members.take(list(members.norms))
        assert max(closeness(each, own) for each in chosen) <= 1

    assert growth(stack, pools if kind == "files" else RANDOM, job) == 0


@pytest.mark.parametrize("how", MERGES)
def test_merges_need_the_memory_of_one_module(how: Any, stack: Stack, pools: dict[int, Path]) -> None:
    """Factorised merges need that module of all adapters, the others of one."""

    def job(pool: AdapterPool) -> None:
        members = pool.members(stack)
        for _ in updates(members.take(list(members.norms)), 0.5, how=how):
            pass

    found, one = growth(stack, pools, job), largest_pair(stack)
    assert found <= 8 * one if how in FACTORISED else found == 0
    assert 8 * one < sum(a.nbytes + b.nbytes for a, b in some(stack, 0).pairs.values())  # of one whole adapter


def test_an_average_is_merged_and_judged_one_module_at_a_time(stack: Stack, pools: dict[int, Path]) -> None:
    def job(pool: AdapterPool) -> None:
        members = pool.members(stack)
        merge(stack, average(members.take(list(members.norms))))

    assert growth(stack, pools, job) <= 8 * largest_pair(stack)


def test_coefficients_need_each_chosen_adapter_once_be_it_of_the_pool_or_random(
    stack: Stack, pools: dict[int, Path]
) -> None:
    whole = sum(a.nbytes + b.nbytes for a, b in some(stack, 0).pairs.values())
    for control in (list, randomise):

        def job(pool: AdapterPool, control: Any = control) -> None:
            members = pool.members(stack)
            mixed = attach(share(stack.model), control(members.take(list(members.norms))), lambda name: name)
            mixed.model(torch.ones(1, 2, dtype=torch.long))

        assert whole <= growth(stack, pools, job) <= whole + 8 * largest_pair(stack)


def test_a_stored_adapter_is_the_same_and_is_read_on_access(stack: Stack, tmp_path: Path) -> None:
    adapter = some(stack, 0)
    stored = adapter.stored(tmp_path / "stored.safetensors")
    loaded = stored.loaded()
    (tmp_path / "stored.safetensors").unlink()
    assert stored.modules == adapter.modules and stored.scales == adapter.scales
    for name, pair in adapter.pairs.items():
        assert all(map(torch.equal, loaded.pairs[name], pair))
    with pytest.raises(Exception, match="cannot be read"):
        stored.delta(stored.modules[0])
