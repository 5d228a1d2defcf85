"""What comes back: all arms side by side, whether merging was worth it, and the best merge as a plain adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lamella.evaluate import Estimate
from lamella.methods.lora_recycling.judge import Judged, is_sure
from lamella.methods.lora_recycling.pool import Members
from lamella.methods.lora_recycling.trial import Arm
from lamella.results import Result
from lamella.stack import Stack
from lamella.train import Adapter

COEFFICIENTS = "coefficients.json"
SAID = {True: "was worth it", False: "was not worth it: it did harm", None: "was not shown to be worth it"}


@dataclass(frozen=True)
class Verdict:
    """The best of the arms with weights of the pool against the best of all others, both chosen by held-out loss.

    Attributes:
        ours, other: those arms.
        gain: by how much more of the test ours answers, in pairs.
        saved: by how many nats per token its loss is lower.
        worth: whether merging was worth it; None where the interval of the gain holds 0.
    """

    ours: Arm
    other: Arm
    gain: Estimate
    saved: Estimate

    @classmethod
    def of(cls, arms: Sequence[Arm]) -> Verdict:
        ours, other = (min((each for each in arms if each.of_pool is is_ours), key=lambda arm: arm.held_out.loss)
                       for is_ours in (True, False))  # fmt: skip
        return cls(ours, other, ours.test.above(other.test), ours.test.below(other.test))

    @property
    def worth(self) -> bool | None:
        return is_sure(self.gain)

    @property
    def sentence(self) -> str:
        """The verdict as one."""
        return (
            f"Merging {SAID[self.worth]} on this pool: with its weights ({self.ours.name}) "
            f"{self.ours.test.accuracy:.3f} of the test is answered, without them ({self.other.name}) "
            f"{self.other.test.accuracy:.3f}, a difference of {self.gain} (and of {self.saved} nats per token)."
        )


@dataclass(kw_only=True)
class Recycled(Result):
    """The best merge of a pool for a task, as a plain adapter and merged, beside all of its controls.

    Attributes:
        stack: the model with the adapter merged; it shares all other tensors with the original.
        adapter: of the best arm with weights of the pool, chosen by held-out loss.
        arms: all of them.
        selected: the members that were merged, the most useful first.
        members: of the pool, and why the others were refused.
        verdict: whether it was worth it.
    """

    stack: Stack
    adapter: Adapter
    arms: Sequence[Arm]
    selected: Sequence[str]
    members: Members
    verdict: Verdict

    kind: ClassVar[str] = "recycled"
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rows = table(self.arms, self.verdict.other.test)
        verdict = self.verdict
        self.findings = {
            "arms": rows,
            "verdict": {
                "worth": verdict.worth,
                "ours": verdict.ours.name,
                "other": verdict.other.name,
                "gain": verdict.gain.mean,
                "error": verdict.gain.error,
                "saved": verdict.saved.mean,
            },
            "selected": list(self.selected),
            "norms": dict(self.members.norms),
            "refused": dict(self.members.refused),
            "curves": {arm.name: [point.loss for point in arm.log.held_out] for arm in self.arms if arm.log},
        }
        fitted = [arm for arm in self.arms if arm.of_pool and arm.coefficients is not None]
        if fitted:
            best = min(fitted, key=lambda arm: arm.held_out.loss)
            assert best.coefficients is not None
            self.findings["coefficients"] = {"arm": best.name, "by module": as_lists(best.coefficients)}
            self.files = {COEFFICIENTS: json.dumps(self.findings["coefficients"], indent=1) + "\n"}
        self.notes = [verdict.sentence, *self.notes]

    def write(self, folder: Path) -> None:
        """The adapter as plain peft loads and merges it."""
        self.adapter.write_into(folder)

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """The adapter in a folder of results."""
        return Adapter.open(path)


def table(arms: Sequence[Arm], other: Judged) -> list[dict[str, Any]]:
    """Every arm with its figures, and its difference to ``other`` in pairs."""
    return [
        {
            "arm": arm.name,
            "of_pool": arm.of_pool,
            "held_out_loss": arm.held_out.loss,
            "held_out_accuracy": arm.held_out.accuracy,
            "accuracy": arm.test.accuracy,
            "loss": arm.test.loss,
            "difference": arm.test.above(other).mean,
            "error": arm.test.above(other).error,
        }
        for arm in arms
    ]


def as_lists(coefficients: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(float(each), 6) for each in values] for name, values in coefficients.items()}
