"""The paths of one sample: skips and repeats as actions, the searches over them, and what a set of samples gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge, Le

from lamella.errors import MethodError
from lamella.methods.cola.samples import Path, PathReader, Problem, same, text_digest
from lamella.methods.cola.tree import random_search, tree_search
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.signature import Named
from lamella.stack import Stack

ACTIONS = ("skip", "repeat")


@dataclass(frozen=True)
class Settings:
    """Everything that a search depends on beside the model and the sample; defaults of the authors' code.

    Attributes:
        simulations: N, the budget of each search (the paper: 200).
        penalty: lambda, how much a path that is longer by the whole model loses in the UCB.
        explore: the weight of the UCB's exploration term.
        p_random: how often selection takes a random child.
        root_block: sizes of the blocks that are skipped or repeated at the root of the tree.
        inner_block: the same below it.
        times: how many more times a block is run (the paper: 1 to 4; the code: once).
        most_visits: the most executions of one layer.
        length: shortest and longest path; from 0.6 to 1.2 times the model's layers when left out.
        protect: how many of the first and last layers are never edited.
        tokens: the most new tokens of an open answer.
        chat: whether prompts go through the tokenizer's chat template.
        seed: of every search.
    """

    simulations: Annotated[int, Named("sims"), Ge(1)] = 100
    penalty: Annotated[float, Ge(0)] = 5.0
    explore: Annotated[float, Ge(0)] = math.sqrt(2)
    p_random: Annotated[float, Ge(0), Le(1)] = 0.1
    root_block: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 3, 4)
    inner_block: tuple[Annotated[int, Ge(1)], ...] = (1,)
    times: tuple[Annotated[int, Ge(1)], ...] = (1,)
    most_visits: Annotated[int, Ge(1)] = 2
    length: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None = None
    protect: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (0, 0)
    tokens: Annotated[int, Ge(1)] = 10
    chat: bool = False
    seed: Annotated[int, Ge(0)] = 42

    def bounds(self, layers: int) -> tuple[int, int]:
        """The shortest and the longest path for a model of that many layers."""
        shortest, longest = self.length or (math.ceil(0.6 * layers), math.floor(1.2 * layers))
        if not shortest <= layers <= longest:
            raise MethodError(f"cola: length {shortest} to {longest} must hold the {layers} layers of the model itself")
        if sum(self.protect) >= layers:
            raise MethodError(
                f"cola: protect {self.protect} leaves none of {layers} layers to edit: give smaller numbers"
            )
        return shortest, longest


def skip(path: Path, p: int, k: int) -> Path:
    """Without the k entries from position p on.

    >>> skip((0, 1, 2, 3), 1, 2)
    (0, 3)
    """
    return path[:p] + path[p + k :]


def repeat(path: Path, p: int, k: int, times: int = 1) -> Path:
    """With the k entries from position p on run again, in place.

    >>> repeat((0, 1, 2, 3), 1, 2)
    (0, 1, 2, 1, 2, 3)
    """
    return path[: p + k] + path[p : p + k] * times + path[p + k :]


def edits(
    path: Path, at_root: bool, *, layers: int, settings: Settings, actions: Sequence[str] = ACTIONS
) -> list[Path]:
    """Every path that one legal edit makes of this one, without duplicates."""
    shortest, longest = settings.bounds(layers)
    first, last = settings.protect[0], layers - settings.protect[1]
    found: list[Path] = []
    for k in settings.root_block if at_root else settings.inner_block:
        for p in range(len(path) - k + 1):
            block = path[p : p + k]
            if min(block) < first or max(block) >= last:
                continue
            if "skip" in actions:
                found.append(skip(path, p, k))
            if "repeat" in actions:
                found += [repeat(path, p, k, times) for times in settings.times]
    fitting = (new for new in dict.fromkeys(found) if shortest <= len(new) <= longest)
    return [new for new in fitting if max(Counter(new).values()) <= settings.most_visits]


@dataclass(frozen=True)
class Found:
    """One search for one target.

    Attributes:
        target: the answer that was rewarded.
        simulations: how many were run.
        depth: the most edits between the model and a path that was evaluated.
        valid, invalid: the paths that gave the target and those that did not, each the shortest first.
    """

    target: str
    simulations: int
    depth: int
    valid: tuple[Path, ...]
    invalid: tuple[Path, ...]

    @property
    def evaluations(self) -> int:
        return len(self.valid) + len(self.invalid)

    @property
    def best(self) -> Path | None:
        """The shortest path that gives the target."""
        return self.valid[0] if self.valid else None


def find_paths(
    reader: Callable[[Path], str],
    target: str,
    layers: int,
    settings: Settings,
    *,
    actions: Sequence[str] = ACTIONS,
    evaluations: int | None = None,
) -> Found:
    """Search paths on which a model gives one answer.

    Args:
        reader: the answer along a path, such as a :class:`PathReader`.
        target: the answer that is rewarded.
        layers: of the model.
        settings: of the search.
        actions: ``skip``, ``repeat`` or both.
        evaluations: search at random, with that many evaluations, instead of in a tree.
    """
    root = tuple(range(layers))
    legal = partial(edits, layers=layers, settings=settings, actions=actions)

    def reward(path: Path) -> float:
        return float(same(reader(path), target))

    if evaluations is not None:
        search = random_search(root, legal, reward, evaluations=evaluations, seed=settings.seed)
    else:
        search = tree_search(
            root,
            legal,
            reward,
            size=lambda path: len(path) / layers,
            simulations=settings.simulations,
            penalty=settings.penalty,
            explore=settings.explore,
            p_random=settings.p_random,
            seed=settings.seed,
        )
    ranked = sorted(search.evaluated, key=lambda found: (-found.reward, len(found.state)))
    valid = tuple(found.state for found in ranked if found.reward)
    return Found(target, search.simulations, search.depth, valid, tuple(f.state for f in ranked if not f.reward))


@dataclass(frozen=True)
class ProblemStudy:
    """All searches for one sample.

    Attributes:
        sample: the prompt with its answer.
        base: what the model itself answers.
        searches: for the right answer: ``tree``, ``random`` (as many evaluations), ``skip``, ``repeat`` (one action).
        wrong: the tree search for each wrong answer.
        executed, asked: layers that this run executed, and would have executed with every path on its own.
    """

    sample: Problem
    base: str
    searches: dict[str, Found]
    wrong: tuple[Found, ...]
    executed: int = field(default=0, compare=False)
    asked: int = field(default=0, compare=False)

    @property
    def right(self) -> bool:
        """Whether the model itself answers correctly."""
        return same(self.base, self.sample.answer)


def study_sample(
    stack: Stack,
    tokenizer: Any,
    sample: Problem,
    settings: Settings,
    known: dict[Path, str] | None = None,
    note: Callable[[Path, str], None] = lambda path, answer: None,
) -> ProblemStudy:
    """Search one sample, with every control; the searches share answers and hidden states."""
    reader = PathReader(stack, tokenizer, sample, settings.tokens, settings.chat, known, note)
    search = partial(find_paths, reader, layers=len(stack), settings=settings)
    base = reader(tuple(range(len(stack))))
    tree = search(sample.answer)
    searches = {
        "tree": tree,
        "random": search(sample.answer, evaluations=tree.evaluations),
        "skip": search(sample.answer, actions=("skip",)),
        "repeat": search(sample.answer, actions=("repeat",)),
    }
    wrong = tuple(search(target) for target in sample.wrong_targets)
    return ProblemStudy(sample, base, searches, wrong, reader.tree.executed, reader.asked)


@dataclass(frozen=True)
class PathStudy:
    """The searches for a set of samples; :func:`~lamella.methods.cola.page.report` sums them up."""

    model: ModelReference
    stack: str
    settings: Settings
    samples: tuple[ProblemStudy, ...]

    def plans(self) -> dict[str, Plan]:
        """By sample, the shortest path found that answers it correctly. It was chosen by the answer."""
        plans = {}
        for each in self.samples:
            best = each.searches["tree"].best
            if best is not None:
                path = {self.stack: PhasedPath(prefill=list(best), decode=list(best))}
                about = {
                    "sample": each.sample.id,
                    "prompt_sha256": text_digest(each.sample.prompt),
                    "chosen_by": "the answer",
                }
                provenance = {"method": "cola", "options": asdict(self.settings), **about}
                plans[each.sample.id] = Plan(model=self.model, path=path, provenance=provenance)
        return plans

    def as_dict(self) -> dict[str, Any]:
        """The paths that answered and those that did not, for every search, ready for JSON."""
        samples = [asdict(each) | {"right": each.right} for each in self.samples]
        for each in samples:  # what was executed depends on the journal, the result does not
            del each["executed"], each["asked"]
        model, settings = self.model.model_dump(), asdict(self.settings)
        return {"schema": "lamella.cola/1", "model": model, "settings": settings, "samples": samples}
