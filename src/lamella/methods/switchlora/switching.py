"""The exchange of vectors of a low-rank adapter with a pool, without a change of the computed function.

    E = W + c B A            c = 1/r        A [r, in], B [out, r], W frozen
    row i of A is exchanged:     W <- W + c B[:, i] (A[i] - new)      E is unchanged
    column j of B is exchanged:  W <- W + c (B[:, j] - new) A[j]      E is unchanged

Pools hold q = min(in, out) vectors. Each position of A and B cycles through its pool, and a vector that leaves is
stored in its slot of the pool. The gradient and optimizer state of its counterpart belonged to the removed vector: the
state is reset, and the counterpart is frozen for a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.switchlora.optimizer import COLUMNS, ROWS, reset_state
from lamella.needs import memory_map
from lamella.train import Hook, Lora, TrainingRun
from lamella.train.lora import ADAPTER
from lamella.train.sharding import gathered, replicated

GAIN = (2 / 6) ** 0.5  # of a leaky ReLU with slope sqrt 5, as in the Kaiming-uniform initialisation of a linear layer
DECAY = 0.3  # factor of the exchange rate after the fraction ``descent`` of the steps
MIN_DECAY = 1e-8
POOLS = "pools.safetensors"


@dataclass(frozen=True)
class ExchangeFrequency:
    """How often vectors are exchanged: per step about r / interval of every A and of every B.

    Attributes:
        interval: steps in which each vector is exchanged once, at the beginning.
        descent: fraction of all steps after which the rate of exchange has decayed to three tenths.
        freeze: steps for which the counterpart of an exchanged vector is frozen.
    """

    interval: Annotated[float, Gt(0)] = 40.0
    descent: Annotated[float, Gt(0)] = 0.1
    freeze: Annotated[int, Ge(0)] = 5

    def __post_init__(self) -> None:
        if self.interval < 2 * self.freeze:
            raise MethodError(
                f"interval {self.interval:g}: with {self.freeze} frozen steps after each exchange, at least "
                f"{2 * self.freeze} are needed"
            )

    def share(self, step: int, steps: int) -> float:
        """Return the fraction of all vectors that are exchanged in a step.

        Args:
            step: the step, counted from 0.
            steps: the number of steps of the run.
        """
        return max(DECAY ** ((step + 1) / (self.descent * steps)), MIN_DECAY) / self.interval


class VectorExchange:
    """One linear layer with its pools.

    Args:
        layer: peft's layer, whose base weight is owned by the view; it is changed in place.
        generator: the random number generator of the pools.
        file: where the pools are kept, so that only vectors that were exchanged take memory; None keeps all in memory.
    """

    def __init__(self, layer: Any, generator: torch.Generator, file: Path | None = None) -> None:
        self.use(layer)
        self.scale: float = layer.scaling[ADAPTER]
        r, (m, n) = len(self.a), self.weight.shape
        q = min(m, n)
        spreads = ((m**0.5 * r / n**1.5) ** 0.25 * GAIN**0.5, (r / (m * n) ** 0.5) ** 0.25 * GAIN**0.5)
        pools = {
            half: (2 * torch.rand(q, size, generator=generator) - 1) * 3**0.5 * spread
            for half, size, spread in zip("ab", (n, m), spreads, strict=True)
        }
        pools = pools if file is None else memory_map(pools, file)
        self.pool_a, self.pool_b = pools["a"], pools["b"]
        self.switches = q > r
        last = torch.arange(max(q - r, 0), max(q - r, 0) + r) % q
        self.slots_a, self.slots_b = last, last.roll(r // 2)
        self.next_a, self.next_b = 0, r // 2
        self.frozen_a, self.frozen_b = torch.zeros(r, dtype=torch.long), torch.zeros(r, dtype=torch.long)
        with torch.no_grad():
            self.a.copy_(self.pool_a[self.slots_a])
            self.b.copy_(self.pool_b[self.slots_b].T)
            self._fold(-self.b.float() @ self.a.float())

    def use(self, layer: Any) -> None:
        """Exchange the vectors of a layer: of the copy that a sharded run trains.

        Args:
            layer: peft's layer with the same values.
        """
        base = layer.get_base_layer().weight
        self.a, self.b = (getattr(layer, f"lora_{half}")[ADAPTER].weight for half in "AB")
        self.weight = base.T if layer.fan_in_fan_out else base  # [out, in]

    @torch.no_grad()
    def available(self) -> int:
        """Return how many vectors of A and B may be exchanged now without frozen or exchanged counterparts."""
        if not self.switches:
            return 0
        r = len(self.a)
        free_a = (self.next_b - int((self.frozen_a > 0).sum()) - self.next_a) % r
        free_b = (self.next_a - int((self.frozen_b > 0).sum()) - self.next_b) % r
        return min(free_a, free_b)

    @torch.no_grad()
    def switch(self, count: int, freeze: int) -> tuple[Tensor, Tensor]:
        """Exchange rows of A and columns of B, and return their indices `[count]` and `[count]`.

        Args:
            count: the number of vectors.
            freeze: steps for which the counterparts are frozen.
        """
        r, q = len(self.a), len(self.pool_a)
        rows, columns = ((first + torch.arange(count)) % r for first in (self.next_a, self.next_b))
        a, b = gathered(self.a.detach()), gathered(self.b.detach())
        old = a[rows].float()
        self._store(self.pool_a, self.slots_a, rows, old, (self.slots_a[self.next_a - 1] + 1 + torch.arange(count)) % q)
        a[rows] = self.pool_a[self.slots_a[rows]].to(a)
        self._fold(b[:, rows].float() @ (old - a[rows].float()))
        old = b[:, columns].float()
        self._store(
            self.pool_b, self.slots_b, columns, old.T, (self.slots_b[self.next_b - 1] + 1 + torch.arange(count)) % q
        )
        b[:, columns] = self.pool_b[self.slots_b[columns]].T.to(b)
        self._fold((old - b[:, columns].float()) @ a[columns].float())
        for ours, whole in ((self.a, a), (self.b, b)):
            ours.copy_(replicated(whole, ours))
        self.frozen_b[rows] = freeze
        self.frozen_a[columns] = freeze
        self.next_a, self.next_b = (self.next_a + count) % r, (self.next_b + count) % r
        return rows, columns

    @torch.no_grad()
    def freeze_gradients(self) -> None:
        """Zero the gradients of frozen vectors, and count down their frozen steps."""
        assert self.a.grad is not None and self.b.grad is not None
        self.a.grad.masked_fill_(replicated(self.frozen_a[:, None] > 0, self.a), 0)
        self.b.grad.masked_fill_(replicated(self.frozen_b > 0, self.b), 0)
        for frozen in (self.frozen_a, self.frozen_b):
            frozen.sub_(1).clamp_(min=0)

    def state(self) -> dict[str, Tensor]:
        """Return the state to save, besides A, B, W and the optimizer's state."""
        return {
            "pool_a": self.pool_a,
            "pool_b": self.pool_b,
            "slots_a": self.slots_a,
            "slots_b": self.slots_b,
            "frozen_a": self.frozen_a,
            "frozen_b": self.frozen_b,
            "next": torch.tensor([self.next_a, self.next_b]),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a saved state."""
        for name, tensor in self.state().items():
            if name != "next":
                tensor.copy_(state[name])
        self.next_a, self.next_b = state["next"].tolist()

    def _fold(self, product: Tensor) -> None:
        """Add c times a product `[out, in]` to W in float32, rounded once."""
        self.weight.copy_(self.weight.float() + replicated(self.scale * product, self.weight))

    @staticmethod
    def _store(pool: Tensor, slots: Tensor, positions: Tensor, old: Tensor, targets: Tensor) -> None:
        """Store vectors in their slots, and let their positions point to the next slots."""
        pool[slots[positions]] = old.to(pool)
        slots[positions] = targets


def base_weights(lora: Lora) -> list[str]:
    """Return the names of the weights W of all linear layers with adapters."""
    return [f"{name}.base_layer.weight" for name in lora.modules]


class SwitchHook(Hook):
    """Exchanges a few vectors of a view's adapters in every step, between the gradients and the update.

    Args:
        lora: new adapters; all of their linear layers get pools, and their base weights change.
        frequency: how often vectors are exchanged.
        steps: the number of steps of the run.
        seed: random seed of the pools, and of the number of exchanges per step.
        folder: where the pools are kept; None keeps them in memory.

    Attributes:
        exchanges: by the name of the linear layer.
    """

    splits = True

    def __init__(
        self, lora: Lora, frequency: ExchangeFrequency, steps: int, seed: int, folder: Path | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.exchanges = {
            name: VectorExchange(
                lora.view.get_submodule(name), generator, None if folder is None else folder / f"{name}.safetensors"
            )
            for name in lora.modules
        }
        self.frequency, self.steps, self.seed = frequency, steps, seed
        self.changes = base_weights(lora)

    @property
    def unswitched(self) -> list[str]:
        """The linear layers whose vectors are never exchanged, since they are not larger than the rank."""
        return [name for name, each in self.exchanges.items() if not each.switches]

    def begin(self, run: TrainingRun) -> None:
        """Use the layers of the model that is trained."""
        for name, each in self.exchanges.items():
            each.use(run.model.get_submodule(name))

    def before_update(self, run: TrainingRun) -> None:
        """Exchange vectors and freeze their counterparts."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step)  # identical in every process
        share = self.frequency.share(run.step, self.steps)
        exchanged = 0
        for each in self.exchanges.values():
            if each.a.grad is None:  # not used in this step
                continue
            expected = len(each.a) * share
            count = min(int(expected) + int(torch.rand((), generator=generator) < expected % 1), each.available())
            if count:
                self.reset(run.optimizer, each, *each.switch(count, self.frequency.freeze))
            each.freeze_gradients()
            exchanged += count
        run.note("exchanged", torch.tensor(exchanged / len(self.exchanges)))

    def reset(self, optimizer: torch.optim.Optimizer, one: VectorExchange, rows: Tensor, columns: Tensor) -> None:
        """Reset the state of the counterparts; new vectors keep the state of their position.

        Args:
            optimizer: the optimizer.
            one: the linear layer.
            rows: the exchanged rows of A.
            columns: the exchanged columns of B.
        """
        reset_state(optimizer, one.b, rows, COLUMNS)
        reset_state(optimizer, one.a, columns, ROWS)

    def save(self, folder: Path) -> None:
        """Save the state of all exchanges in a checkpoint folder."""
        tensors = {f"{name}/{key}": each for name, one in self.exchanges.items() for key, each in one.state().items()}
        save_file(tensors, folder / POOLS)

    def load(self, folder: Path) -> None:
        """Load the state of all exchanges from a checkpoint folder."""
        tensors = load_file(folder / POOLS)
        for name, each in self.exchanges.items():
            each.load({key: tensors[f"{name}/{key}"] for key in each.state()})
