"""What is exchanged: the vectors of a low-rank map, with a pool of spare ones, without a change of what is computed.

    E = W + c B A            c = 1/r        A [r, in], B [out, r], W frozen
    row i of A is exchanged:     W <- W + c B[:, i] (A[i] - new)      E stays
    column j of B is exchanged:  W <- W + c (B[:, j] - new) A[j]      E stays

Pools hold q = min(in, out) vectors. Each place of A and B walks through its pool as on a ring, and a vector that leaves
is stored where it came from. Its counterpart's gradient and optimizer state were of the vector that is gone: the state
is reset, and for a few steps the counterpart does not move.
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
from lamella.methods.switchlora.optimizer import COLUMNS, ROWS, forget
from lamella.train import Hook, Lora, TrainingRun
from lamella.train.lora import ADAPTER

GAIN = (2 / 6) ** 0.5  # of a leaky ReLU with slope sqrt 5, as Kaiming's uniform start of a linear map has it
SLOWED = 0.3  # what is left of the first rate of exchange after the share ``descent`` of the steps
SLOWEST = 1e-8
POOLS = "pools.safetensors"


@dataclass(frozen=True)
class Frequency:
    """How often vectors are exchanged; in each step about r / interval of every A and of every B.

    Attributes:
        interval: steps after which each vector was exchanged once, at the beginning.
        descent: the share of all steps after which exchange has slowed down to three tenths.
        freeze: steps for which the counterpart of an exchanged vector does not move.
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
        """Of all vectors, how many are exchanged in a step, counted from 0, of a run of so many."""
        return max(SLOWED ** ((step + 1) / (self.descent * steps)), SLOWEST) / self.interval


class Exchange:
    """One linear map with its pools.

    Args:
        layer: peft's, whose base weight is the view's own; it is changed in place.
        drawn: of the candidates.
    """

    def __init__(self, layer: Any, drawn: torch.Generator) -> None:
        base = layer.get_base_layer()
        self.a, self.b = (getattr(layer, f"lora_{half}")[ADAPTER].weight for half in "AB")
        self.scale: float = layer.scaling[ADAPTER]
        self._weight = base.weight.T if layer.fan_in_fan_out else base.weight  # [out, in]
        r, (m, n) = len(self.a), self._weight.shape
        q = min(m, n)
        spreads = ((m**0.5 * r / n**1.5) ** 0.25 * GAIN**0.5, (r / (m * n) ** 0.5) ** 0.25 * GAIN**0.5)
        self.pool_a, self.pool_b = (
            (2 * torch.rand(q, size, generator=drawn) - 1) * 3**0.5 * spread
            for size, spread in zip((n, m), spreads, strict=True)
        )
        self.switches = q > r
        last = torch.arange(max(q - r, 0), max(q - r, 0) + r) % q
        self.slots_a, self.slots_b = last, last.roll(r // 2)
        self.next_a, self.next_b = 0, r // 2
        self.frozen_a, self.frozen_b = torch.zeros(r, dtype=torch.long), torch.zeros(r, dtype=torch.long)
        with torch.no_grad():
            self.a.copy_(self.pool_a[self.slots_a])
            self.b.copy_(self.pool_b[self.slots_b].T)
            self._fold(-self.b.float() @ self.a.float())

    @torch.no_grad()
    def room(self) -> int:
        """How many vectors of each may be exchanged now: none whose counterpart is frozen, or is exchanged too."""
        if not self.switches:
            return 0
        r = len(self.a)
        ahead_a = (self.next_b - int((self.frozen_a > 0).sum()) - self.next_a) % r
        ahead_b = (self.next_a - int((self.frozen_b > 0).sum()) - self.next_b) % r
        return min(ahead_a, ahead_b)

    @torch.no_grad()
    def switch(self, count: int, freeze: int) -> tuple[Tensor, Tensor]:
        """Exchange ``count`` rows of A and columns of B; which ones [count], and [count]."""
        r, q = len(self.a), len(self.pool_a)
        rows, columns = ((first + torch.arange(count)) % r for first in (self.next_a, self.next_b))
        old = self.a[rows].float()
        self._store(self.pool_a, self.slots_a, rows, old, (self.slots_a[self.next_a - 1] + 1 + torch.arange(count)) % q)
        self.a[rows] = self.pool_a[self.slots_a[rows]].to(self.a)
        self._fold(self.b[:, rows].float() @ (old - self.a[rows].float()))
        old = self.b[:, columns].float()
        self._store(
            self.pool_b, self.slots_b, columns, old.T, (self.slots_b[self.next_b - 1] + 1 + torch.arange(count)) % q
        )
        self.b[:, columns] = self.pool_b[self.slots_b[columns]].T.to(self.b)
        self._fold((old - self.b[:, columns].float()) @ self.a[columns].float())
        self.frozen_b[rows] = freeze
        self.frozen_a[columns] = freeze
        self.next_a, self.next_b = (self.next_a + count) % r, (self.next_b + count) % r
        return rows, columns

    @torch.no_grad()
    def hold(self) -> None:
        """No gradient for what is frozen; one step of it is over."""
        assert self.a.grad is not None and self.b.grad is not None
        self.a.grad[self.frozen_a > 0] = 0
        self.b.grad[:, self.frozen_b > 0] = 0
        for frozen in (self.frozen_a, self.frozen_b):
            frozen.sub_(1).clamp_(min=0)

    def state(self) -> dict[str, Tensor]:
        """All that a run which goes on must know, beside A, B and the optimizer's state."""
        return {
            "weight": self._weight.detach().contiguous(),
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
        """Go on from what :meth:`state` gave."""
        for name, tensor in self.state().items():
            if name not in ("weight", "next"):
                tensor.copy_(state[name])
        self._weight.copy_(state["weight"])
        self.next_a, self.next_b = state["next"].tolist()

    def _fold(self, product: Tensor) -> None:
        """Add c times a product [out, in] to W in float32, rounded once."""
        self._weight.copy_(self._weight.float() + self.scale * product)

    @staticmethod
    def _store(pool: Tensor, slots: Tensor, places: Tensor, old: Tensor, targets: Tensor) -> None:
        """Put vectors back into their slots, and let their places point at the next ones."""
        pool[slots[places]] = old.to(pool)
        slots[places] = targets


class Switching(Hook):
    """Exchanges vectors of a view's adapters, a few in every step, between the gradients and the update.

    Args:
        lora: fresh adapters; all of their linear maps get pools, and the weights beside them change.
        frequency: how often.
        steps: of the whole run.
        seed: of the pools, and of how many are exchanged in each step.

    Attributes:
        exchanges: by the name of the linear map.
    """

    def __init__(self, lora: Lora, frequency: Frequency, steps: int, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.exchanges = {name: Exchange(lora.view.get_submodule(name), drawn) for name in lora.modules}
        self.frequency, self.steps, self.seed = frequency, steps, seed

    @property
    def still(self) -> list[str]:
        """The linear maps of which nothing is ever exchanged, since they are no wider than the rank."""
        return [name for name, each in self.exchanges.items() if not each.switches]

    def before_update(self, run: TrainingRun) -> None:
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step)  # the same in every process
        share = self.frequency.share(run.step, self.steps)
        exchanged = 0
        for each in self.exchanges.values():
            if each.a.grad is None:  # it did not run in this step
                continue
            wanted = len(each.a) * share
            count = min(int(wanted) + int(torch.rand((), generator=drawn) < wanted % 1), each.room())
            if count:
                self.reset(run.optimizer, each, *each.switch(count, self.frequency.freeze))
            each.hold()
            exchanged += count
        run.note("exchanged", torch.tensor(exchanged / len(self.exchanges)))

    def reset(self, optimizer: torch.optim.Optimizer, one: Exchange, rows: Tensor, columns: Tensor) -> None:
        """Forget the state of the counterparts; what came in keeps that of its place, since they have not changed."""
        forget(optimizer, one.b, rows, COLUMNS)
        forget(optimizer, one.a, columns, ROWS)

    def save(self, folder: Path) -> None:
        tensors = {f"{name}/{key}": each for name, one in self.exchanges.items() for key, each in one.state().items()}
        save_file(tensors, folder / POOLS)

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / POOLS)
        for name, each in self.exchanges.items():
            each.load({key: tensors[f"{name}/{key}"] for key in each.state()})
