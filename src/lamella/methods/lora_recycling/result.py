"""The result: all arms side by side, the verdict on merging, and the best merge as a plain adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lamella.evaluate import Estimate
from lamella.methods.lora_recycling.judge import AnswerScores, is_sure
from lamella.methods.lora_recycling.pool import Members
from lamella.methods.lora_recycling.trial import TrialArm
from lamella.results import Result
from lamella.stack import Stack
from lamella.train import Adapter

COEFFICIENTS = "coefficients.json"
WORTH = {True: "was worthwhile", False: "was harmful", None: "was not shown to be worthwhile"}


@dataclass(frozen=True)
class MergeVerdict:
    """The best arm with the pool compared with the best arm without it, both selected by held-out loss.

    Attributes:
        ours, other: these arms.
        gain: paired difference of their accuracy on the test.
        saved: paired difference of their loss, in nats per token; positive if ours is lower.
        worth: whether merging was worthwhile; None if the interval of the gain contains 0.
    """

    ours: TrialArm
    other: TrialArm
    gain: Estimate
    saved: Estimate

    @classmethod
    def of(cls, arms: Sequence[TrialArm]) -> MergeVerdict:
        """Compare the arms."""
        ours, other = (min((each for each in arms if each.of_pool is is_ours), key=lambda arm: arm.held_out.loss)
                       for is_ours in (True, False))  # fmt: skip
        return cls(ours, other, ours.test.above(other.test), ours.test.below(other.test))

    @property
    def worth(self) -> bool | None:
        """Whether merging was worthwhile; None if undecided."""
        return is_sure(self.gain)

    @property
    def sentence(self) -> str:
        """The verdict as a sentence."""
        return (
            f"Merging {WORTH[self.worth]} on this pool: with its weights ({self.ours.name}), "
            f"{self.ours.test.accuracy:.3f} of the test is answered, without them ({self.other.name}) "
            f"{self.other.test.accuracy:.3f}, a difference of {self.gain} (and of {self.saved} nats per token)."
        )


@dataclass(kw_only=True)
class Recycled(Result):
    """The best merge of a pool for a task, as a plain adapter and merged, with all of its controls.

    Attributes:
        stack: the model with the adapter merged; it shares all other tensors with the original.
        adapter: adapter of the best arm with the pool, selected by held-out loss.
        arms: all arms.
        selected: the merged members, the most useful first.
        members: members of the pool, and the reasons for rejecting the others.
        verdict: whether merging was worthwhile.
    """

    stack: Stack
    adapter: Adapter
    arms: Sequence[TrialArm]
    selected: Sequence[str]
    members: Members
    verdict: MergeVerdict

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
        """Write the adapter, which plain peft loads and merges."""
        self.adapter.write_into(folder)

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """Read the adapter from a result folder."""
        return Adapter.open(path)


def table(arms: Sequence[TrialArm], other: AnswerScores) -> list[dict[str, Any]]:
    """Results of every arm, with its paired difference to ``other``.

    Args:
        arms: the arms.
        other: results of the arm to compare with.
    """
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
    """Convert coefficients to rounded lists."""
    return {name: [round(float(each), 6) for each in values] for name, values in coefficients.items()}
