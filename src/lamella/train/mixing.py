"""The samples of each optimizer step: new data, optionally with a fraction of replayed old data.

Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv 2403.08763.

Replay is compute-equivalent: a run has as many steps as without it, and replayed samples replace new ones.

    step 1   new new new OLD        number of old samples: floor(alpha B), plus one with the remaining probability
    step 2   new new new new        their source: drawn from the past mixture p
    step 3   new OLD new new        which: the next of the samples that the source's runs have used, in an order of
                                    their own, reshuffled in each epoch

Everything is drawn before the run begins, from the seeds alone, so an interrupted run resumes with the same samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from lamella.data.samples import Sample
from lamella.errors import TrainingError, listed
from lamella.files import write
from lamella.train.runs import samples_digest


class ReplayedSample(NamedTuple):
    """A replayed sample.

    Attributes:
        step: the optimizer step, from 1.
        source: the name of its dataset.
        number: its index in the dataset.
    """

    step: int
    source: str
    number: int


@dataclass(frozen=True)
class Replay:
    """What to replay, and how much.

    Attributes:
        samples: the past datasets by name.
        fraction: alpha, the expected fraction of replayed samples in every batch.
        mixture: p, the proportion of each of them in the past; see :func:`past_mixture`. Optional for a single one.
        seen: the indices of each dataset that its runs have used; all by default.
        seed: of all random draws here. A second replay needs another one.
    """

    samples: Mapping[str, Sequence[Sample]]
    fraction: float
    mixture: Mapping[str, float] = field(default_factory=dict)
    seen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise TrainingError(f"a replay of {self.fraction:g}: give a share of every batch, from 0 to 1")
        if not self.samples or set(self.shares) != set(self.samples) or min(self.shares.values()) < 0:
            raise TrainingError(
                f"the datasets {listed(self.samples)} have the mixture {listed(self.mixture)}: give a share for each"
            )
        if not math.isclose(sum(self.shares.values()), 1, abs_tol=1e-6):
            raise TrainingError(
                f"the shares of the past data, {listed(self.shares.values())}, sum to {sum(self.shares.values())}"
            )
        for name, samples in self.samples.items():
            known = self.indices(name)
            if not known or not 0 <= known[0] <= known[-1] < len(samples):
                raise TrainingError(
                    f"the indices of seen samples of '{name}' are empty or outside its {len(samples)} samples"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that determine the replay, as JSON values."""
        content = {name: [samples_digest(each), self.indices(name)] for name, each in self.samples.items()}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return {"fraction": self.fraction, "mixture": self.shares, "seed": self.seed, "samples": digest}

    @property
    def shares(self) -> dict[str, float]:
        """The mixture p by dataset."""
        return dict(self.mixture) or (dict.fromkeys(self.samples, 1.0) if len(self.samples) == 1 else {})

    def indices(self, name: str) -> list[int]:
        """Return the indices of one dataset that may be replayed, sorted."""
        return sorted(set(self.seen.get(name, range(len(self.samples[name])))))


@dataclass(frozen=True)
class Feed:
    """The training data of a run, for more than samples in a shuffled order.

    Attributes:
        samples: the new data, reshuffled in each epoch.
        along: more data, of which every sample is joined by one each, under other roles, each in its own order.
        replay: old samples that replace some new ones.
        skip: how many samples of the new data's order an earlier run with the same seed has used.
    """

    samples: Sequence[Any]
    along: Sequence[Sequence[Any]] = ()
    replay: Replay | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if not all(map(len, (self.samples, *self.along))):
            raise TrainingError("there are no training samples: give some")

    def order(self, steps: int, size: int, seed: int) -> Order:
        """Return the order of the samples in a run.

        Args:
            steps: number of optimizer steps.
            size: samples per step, over all processes.
            seed: random seed.
        """
        return Order(self.samples, steps, size, seed, self.replay, self.skip, self.along)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that determine the order and the samples, as JSON values."""
        return {
            "samples": samples_digest(self.samples),
            **({"along": list(map(samples_digest, self.along))} if self.along else {}),
            "replay": self.replay and self.replay.as_dict(),
            "skip": self.skip,
        }


def past_mixture(
    past: Mapping[str, float], consumed: float, name: str, tokens: float, fraction: float
) -> dict[str, float]:
    """Return the mixture of all data used after one more run: p_{i+1} of the paper's weights.

        p' = (N p + T (alpha p + (1 - alpha) e_name)) / (N + T)

    Replayed data counts again.

    Args:
        past: p by dataset, before the run; empty before the first one.
        consumed: N, tokens (or samples) before the run.
        name: the run's new dataset.
        tokens: T of the run, replayed ones included.
        fraction: alpha of the run.
    """
    alpha = fraction if past else 0.0
    mixed = {source: share * (consumed + alpha * tokens) / (consumed + tokens) for source, share in past.items()}
    mixed[name] = mixed.get(name, 0.0) + (1 - alpha) * tokens / (consumed + tokens)
    return mixed


class Order(Dataset[Sample]):
    """All samples of a run in order.

    As one long epoch of full batches, the samples of a step depend neither on the number of processes nor on where the
    run was interrupted.

    Args:
        samples: the new data, reshuffled in each epoch.
        steps: optimizer steps.
        size: samples per step.
        seed: of the order of the new data, which is the same with and without replay.
        replay: what to mix in.
        skip: how many samples of the new data's order an earlier run has used.
        along: more data; every sample is joined by one of each.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        steps: int,
        size: int,
        seed: int,
        replay: Replay | None = None,
        skip: int = 0,
        along: Sequence[Sequence[Sample]] = (),
    ) -> None:
        self.samples = samples
        self.size = size
        self.old: Mapping[str, Sequence[Sample]] = replay.samples if replay else {}
        counts = _counts(replay, steps, size)
        fresh = iter(_passes(len(samples), skip + steps * size - sum(counts), seed)[skip:])
        past = iter(_past(replay, sum(counts)))
        self.picks: list[int | tuple[str, int]] = []
        for count in counts:
            self.picks += [next(fresh) for _ in range(size - count)]
            self.picks += [next(past) for _ in range(count)]
        self.along = [
            (more, _passes(len(more), steps * size, seed + number)) for number, more in enumerate(along, start=1)
        ]

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> Sample:
        pick = self.picks[index]
        sample = self.samples[pick] if isinstance(pick, int) else self.old[pick[0]][pick[1]]
        for more, picks in self.along:
            sample = {**sample, **more[picks[index]]}
        return sample

    @property
    def consumed(self) -> list[int]:
        """The indices of the new samples in the order in which they are used."""
        return [pick for pick in self.picks if isinstance(pick, int)]

    @property
    def replayed(self) -> list[ReplayedSample]:
        """The list of replayed samples."""
        return [
            ReplayedSample(index // self.size + 1, *pick)
            for index, pick in enumerate(self.picks)
            if isinstance(pick, tuple)
        ]

    def write_manifest(self, path: Path) -> None:
        """Write the replayed samples as JSON: rows of step, dataset and index."""
        content: dict[str, Any] = {"columns": ReplayedSample._fields, "rows": self.replayed}
        write(path, json.dumps(content) + "\n")


def _counts(replay: Replay | None, steps: int, size: int) -> list[int]:
    """Return how many samples of each step are replayed: floor(alpha B), and one more at random."""
    if replay is None or replay.fraction == 0:
        return [0] * steps
    expected = round(replay.fraction * size, 9)
    whole = math.floor(expected)
    draws = torch.rand(steps, generator=_generator(replay.seed, "counts"), dtype=torch.float64)
    return [whole + int(draw < expected - whole) for draw in draws.tolist()]


def _past(replay: Replay | None, count: int) -> list[tuple[str, int]]:
    """Return the replayed samples in order."""
    if replay is None or count == 0:
        return []
    names = list(replay.samples)
    shares = torch.tensor([replay.shares[name] for name in names], dtype=torch.float64)
    drawn = torch.multinomial(shares, count, replacement=True, generator=_generator(replay.seed, "sources")).tolist()
    left = {}
    for place, name in enumerate(names):
        known = replay.indices(name)
        order = _passes(len(known), drawn.count(place), _generator(replay.seed, name))
        left[name] = iter([known[number] for number in order])
    return [(names[place], next(left[names[place]])) for place in drawn]


def _passes(count: int, length: int, seed: int | torch.Generator) -> list[int]:
    """Return the first ``length`` of the numbers below ``count``, reshuffled in each pass."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(length / count))]
    return torch.cat(passes)[:length].tolist() if passes else []


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return a separate generator for each purpose, so that no random draws are correlated."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
