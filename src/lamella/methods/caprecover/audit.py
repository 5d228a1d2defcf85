"""The audit of labels: every cut, every reader, every defence, by attackers who know the defence and who do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lamella.data import Captioned, Encoded, Lazy, batches
from lamella.errors import CalibrationError
from lamella.files import Finished, Work
from lamella.methods.caprecover.guard import Guard, scales
from lamella.methods.caprecover.readers import READERS, Linear, Reader, nearest
from lamella.methods.caprecover.victim import Victim
from lamella.progress import tracker
from lamella.train import EarlyStopping, TrainConfig, fit, supervised

EPOCHS, LEAST = 20, 300  # the published number; and steps, where there are few pictures
BATCH = 64
HELD_OUT = 5  # one in so many of the attacker's pictures chooses the checkpoint
ALIGNED = 0.5  # what the published alignment to text weighs
FIRST = 2**62  # requests of the judge: no training uses them


@dataclass(frozen=True)
class Sets:
    """What an attacker has, and what he is judged on.

    Attributes:
        train, test: by cut, the features of each picture, read when they are asked for.
        train_labels, test_labels: [pictures].
        scale: by cut, the standard deviation of what is sent.
    """

    train: Mapping[str, Sequence[Tensor]]
    train_labels: Tensor
    test: Mapping[str, Sequence[Tensor]]
    test_labels: Tensor
    scale: Mapping[str, float]

    @classmethod
    def of(
        cls,
        victim: Victim,
        train: Sequence[Captioned],
        test: Sequence[Captioned],
        cuts: Sequence[str],
        work: Work = Work(),
        depends: Any = None,
    ) -> Sets:
        """Run the victim once over all pictures.

        Args:
            work: where an interrupted run finds the features that it has recorded.
            depends: JSON values that say which victim and which pictures these are.

        Raises:
            CalibrationError: for pictures without classes, or too few of them.
        """
        if any(each.label is None for each in (*train, *test)):
            raise CalibrationError(
                "these pictures have no classes: give a folder with a folder for each class, or recover captions"
            )
        if len(train) < 2 * HELD_OUT or not test:
            raise CalibrationError(f"{len(train)} pictures for an attacker and {len(test)} to judge him: give more")
        ours = recorded(victim, train, cuts, work, "attacker", depends)
        theirs = recorded(victim, test, cuts, work, "judge", depends)
        labels = [torch.tensor([each.label for each in part]) for part in (train, test)]
        return cls(ours, labels[0], theirs, labels[1], scales(ours))

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train_labels, self.test_labels]).max()) + 1

    @property
    def majority(self) -> float:
        """The accuracy of naming the attacker's most frequent class."""
        most = self.train_labels.bincount().argmax()
        return float((self.test_labels == most).double().mean())

    def shuffled(self, seed: int) -> Sets:
        """The attacker's features belong to other pictures: what is read then is the prior."""
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(seed))
        return replace(self, train={cut: Lazy(order.tolist(), each.__getitem__) for cut, each in self.train.items()})


def recorded(
    victim: Victim,
    pictures: Sequence[Captioned],
    cuts: Sequence[str],
    work: Work = Work(),
    name: str = "features",
    depends: Any = None,
) -> dict[str, Sequence[Tensor]]:
    """What leaves the device at each cut, for each picture; see :class:`lamella.data.Encoded`."""

    def encode(some: list[Captioned]) -> dict[str, Tensor]:
        return victim.features(victim.prepare(some), cuts)

    found = Encoded.of(pictures, encode, work, name, [list(cuts), depends], BATCH)
    return {cut: found.column(cut) for cut in cuts}


class Eavesdropping:
    """The loss of a reader on what is sent: the defence's noise is drawn anew in every step.

    Args:
        guard, cut, scale: of what is sent.
        texts: a vector for each class [classes, width], to which a linear reader's first map is drawn.
    """

    def __init__(self, guard: Guard, cut: str, scale: float, texts: Tensor | None = None) -> None:
        self.guard, self.cut, self.scale, self.texts = guard, cut, scale, texts

    def __call__(self, reader: Any, batch: Mapping[str, Tensor]) -> Tensor:
        request = int(torch.randint(FIRST, ()))
        sent = self.guard.send(self.cut, batch["x"], self.scale, request)
        if self.texts is None or not isinstance(reader, Linear):
            return cross_entropy(reader(sent), batch["y"])
        v = reader.first(reader.standardised(sent).flatten(1))
        drawn = cosine_similarity(v, self.texts[batch["y"]]).mean()
        return cross_entropy(reader.second(v), batch["y"]) - ALIGNED * drawn


def trained(
    sets: Sets, cut: str, reader: Reader, guard: Guard, config: TrainConfig, out: Path, texts: Tensor | None = None
) -> nn.Module:
    """An attacker who knows the defence; what he is at his best on pictures that he kept back.

    Args:
        config: where it says no steps, the published epochs, or as many as small data need.
    """
    features, labels = sets.train[cut], sets.train_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rank = {} if texts is None or reader != "linear" else {"rank": texts.shape[1]}
        model = READERS[reader](features[0].shape, sets.classes, **rank)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed)).tolist()
    rows = Lazy(order, lambda row: {"x": features[row], "y": labels[row]})
    kept = len(rows) // HELD_OUT
    given, held_out = rows[kept:], rows[:kept]
    steps = config.steps or max(LEAST, EPOCHS * len(given) // config.batch)
    every = max(1, steps // 10)
    config = replace(config, steps=steps, eval_every=every, save_every=steps, log_every=every)
    loss = Eavesdropping(guard, cut, sets.scale[cut], texts)
    fit(
        model,
        given,
        supervised(loss),
        config,
        out=out,
        trainable=lambda name: True,
        held_out=held_out,
        hooks=[EarlyStopping(patience=steps)],
        settings={"guard": str(guard), "cut": cut, "reader": reader},
    )
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, sets: Sets, cut: str, guard: Guard) -> float:
    """How often an attacker names the class, on pictures that nobody has seen, under requests that nobody has seen."""
    right = 0
    parts = zip(batches(sets.test[cut], BATCH, torch.stack), sets.test_labels.split(BATCH), strict=True)
    for number, (features, labels) in enumerate(parts):
        sent = guard.send(cut, features, sets.scale[cut], FIRST + number)
        right += int((model(sent).argmax(1) == labels).sum())
    return right / len(sets.test_labels)


def audited(
    sets: Sets,
    *,
    cuts: Sequence[str],
    readers: Sequence[Reader],
    guards: Sequence[Guard],
    seeds: Sequence[int],
    config: TrainConfig,
    work: Work,
    depends: Any,
    texts: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Train and judge all attackers; what an interrupted run has found is not found again.

    Returns:
        For each cut, reader and defence the accuracies of attackers who know the defence and who do not, with an
        interval over seeds.
    """
    known = Finished(work.journal("attackers"), depends)
    found: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {}
    place = work.directory("attackers")

    def attack(cut: str, reader: Reader, seed: int) -> dict[str, dict[str, float]]:
        def of(guard: Guard) -> nn.Module:
            name = f"{cut}-{reader}-{guard}-{seed}".replace(":", "-")
            return trained(sets, cut, reader, guard, replace(config, seed=seed), place / name, texts)

        clean = of(Guard())
        scores = {}
        for guard in guards:
            knows = clean if guard.kind == "none" else of(guard)
            both = {"adaptive": knows, "static": clean}
            scores[str(guard)] = {name: accuracy(model, sets, cut, guard) for name, model in both.items()}
        return scores

    with tracker("attacking", len(cuts) * len(readers) * len(seeds)) as count:
        for cut in cuts:
            for reader in readers:
                for seed in seeds:
                    name = f"{cut} {reader} {seed}"
                    found[cut, reader, seed] = known.once(name, partial(attack, cut, reader, seed))
                    count()
    return [
        {
            "cut": cut,
            "reader": reader,
            "guard": str(guard),
            **{who: interval([found[cut, reader, seed][str(guard)][who] for seed in seeds]) for who in WHO},
        }
        for cut in cuts
        for reader in readers
        for guard in guards
    ]


WHO = ("adaptive", "static")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds with its 95 % interval by Student's t, and the values."""
    mean = float(np.mean(values))
    half = 0.0
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def of_link(
    victim: Victim, x: Tensor, labels: Tensor, cuts: Sequence[str], guards: Sequence[Guard]
) -> list[dict[str, Any]]:
    """What each defence costs at each cut: bytes, the task's accuracy, and how far its output moves."""
    plain = victim.output(x)
    features = victim.features(x, cuts)
    spread = scales(features)
    rows = []
    for cut in cuts:
        for guard in guards:

            def link(name: str, given: Tensor, guard: Guard = guard) -> Tensor:
                return guard.receive(name, guard.send(name, given, spread[name], FIRST), spread[name], FIRST)

            found = victim.received(x, [cut], link)
            rows.append(
                {
                    "cut": cut,
                    "guard": str(guard),
                    "shape": list(features[cut].shape[1:]),
                    "bytes": guard.sent(features[cut].shape),
                    "ratio": guard.ratio(spread[cut]),
                    "moved": float((found - plain).abs().max()),
                    "task": float((found.argmax(1) == labels).double().mean()) if plain.ndim == 2 else None,
                }
            )
    return rows


def retrieved(sets: Sets, cut: str) -> float:
    """The baseline: the class of the most similar picture that the attacker has."""
    near = nearest(sets.train[cut], sets.test[cut])
    return float((sets.train_labels[near] == sets.test_labels).double().mean())


def recommended(
    attacks: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    *,
    max_leak: float,
    max_bytes: float | None,
    loses: float = 0.01,
) -> dict[str, Any] | None:
    """The first cut, so the least work for the device, and a defence, at which no attacker reads more than he may.

    Args:
        max_leak: the highest accuracy of the strongest attacker.
        max_bytes: that a request may send; None: any number.
        loses: what the task may lose of its accuracy.

    Returns:
        The row of the link with its leak; None where there is none.
    """
    whole = max((row["task"] or 0.0) for row in links)
    for row in links:
        leak = max(
            each[who]["high"]
            for each in attacks
            for who in WHO
            if (each["cut"], each["guard"]) == (row["cut"], row["guard"])
        )
        fits = max_bytes is None or row["bytes"] <= max_bytes
        if leak <= max_leak and fits and (row["task"] is None or row["task"] >= whole - loses):
            return dict(row) | {"leak": leak}
    return None
