"""The paths of one sample: skips and repeats as actions, the searches over them, and the study of a set of samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge, Le

from lamella.errors import MethodError
from lamella.methods.cola.samples import Path, PathAnswerer, Problem, same, text_digest
from lamella.methods.cola.tree import random_search, tree_search
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.signature import Named
from lamella.stack import Stack

ACTIONS = ("skip", "repeat")


@dataclass(frozen=True)
class PathSettings:
    """Settings of the searches; the defaults are those of the authors' code.

    Attributes:
        simulations: N, the budget of each search (the paper: 200).
        penalty: lambda, the UCB penalty of a path per model length.
        explore: weight of the UCB's exploration term.
        p_random: probability that the selection takes a random child.
        root_block: numbers of consecutive layers that are skipped or repeated at the root of the tree.
        inner_block: the same below the root.
        times: additional executions of a repeated block (the paper: 1 to 4; the code: 1).
        most_visits: maximum number of executions of one layer.
        length: minimum and maximum length of a path; if None, 0.6 to 1.2 times the number of layers.
        protect: number of first and of last layers that are never edited.
        tokens: maximum number of new tokens of an open answer.
        chat: whether prompts are formatted with the tokenizer's chat template.
        seed: random seed of every search.
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
        """Return the minimum and maximum length of a path.

        Args:
            layers: number of layers of the model.

        Raises:
            MethodError: if ``length`` or ``protect`` does not fit the model.
        """
        shortest, longest = self.length or (math.ceil(0.6 * layers), math.floor(1.2 * layers))
        if not shortest <= layers <= longest:
            raise MethodError(
                f"cola: length {shortest} to {longest} must include {layers}, the number of layers of the model"
            )
        if sum(self.protect) >= layers:
            raise MethodError(
                f"cola: protect {self.protect} leaves none of {layers} layers to edit: give smaller values"
            )
        return shortest, longest


def skip(path: Path, p: int, k: int) -> Path:
    """Remove the k entries from position p on.

    Args:
        path: the path.
        p: position of the first removed entry.
        k: number of entries.

    >>> skip((0, 1, 2, 3), 1, 2)
    (0, 3)
    """
    return path[:p] + path[p + k :]


def repeat(path: Path, p: int, k: int, times: int = 1) -> Path:
    """Run the k entries from position p on again, in place.

    Args:
        path: the path.
        p: position of the first repeated entry.
        k: number of entries.
        times: number of additional executions.

    >>> repeat((0, 1, 2, 3), 1, 2)
    (0, 1, 2, 1, 2, 3)
    """
    return path[: p + k] + path[p : p + k] * times + path[p + k :]


def edits(
    path: Path, at_root: bool, *, layers: int, settings: PathSettings, actions: Sequence[str] = ACTIONS
) -> list[Path]:
    """Return all paths that one legal edit makes of this one, without duplicates.

    Args:
        path: the path.
        at_root: whether it is the root of the tree.
        layers: number of layers of the model.
        settings: settings of the search.
        actions: ``skip``, ``repeat`` or both.
    """
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
class PathSearchResult:
    """The result of one search for one target.

    Attributes:
        target: the rewarded answer.
        simulations: number of simulations run.
        depth: maximum number of edits between the model and an evaluated path.
        valid: paths that gave the target, shortest first.
        invalid: the other paths, shortest first.
    """

    target: str
    simulations: int
    depth: int
    valid: tuple[Path, ...]
    invalid: tuple[Path, ...]

    @property
    def evaluations(self) -> int:
        """The number of evaluated paths."""
        return len(self.valid) + len(self.invalid)

    @property
    def best(self) -> Path | None:
        """The shortest path that gives the target."""
        return self.valid[0] if self.valid else None


def find_paths(
    answerer: Callable[[Path], str],
    target: str,
    layers: int,
    settings: PathSettings,
    *,
    actions: Sequence[str] = ACTIONS,
    evaluations: int | None = None,
) -> PathSearchResult:
    """Search paths on which a model gives one answer.

    Args:
        answerer: returns the answer along a path, such as a :class:`PathAnswerer`.
        target: the rewarded answer.
        layers: number of layers of the model.
        settings: settings of the search.
        actions: ``skip``, ``repeat`` or both.
        evaluations: if given, a random search with that many evaluations instead of a tree search.
    """
    root = tuple(range(layers))
    legal = partial(edits, layers=layers, settings=settings, actions=actions)

    def reward(path: Path) -> float:
        return float(same(answerer(path), target))

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
    return PathSearchResult(
        target, search.simulations, search.depth, valid, tuple(f.state for f in ranked if not f.reward)
    )


@dataclass(frozen=True)
class ProblemStudy:
    """All searches for one sample.

    Attributes:
        sample: the prompt with its answer.
        base: the answer of the unchanged model.
        searches: for the right answer: ``tree``, ``random`` (as many evaluations), ``skip``, ``repeat`` (one action).
        wrong: the tree search for each wrong answer.
        executed: number of layers executed in this run.
        unshared: number of layers that would have been executed without sharing prefixes.
    """

    sample: Problem
    base: str
    searches: dict[str, PathSearchResult]
    wrong: tuple[PathSearchResult, ...]
    executed: int = field(default=0, compare=False)
    unshared: int = field(default=0, compare=False)

    @property
    def right(self) -> bool:
        """Whether the unchanged model answers correctly."""
        return same(self.base, self.sample.answer)


def study_sample(
    stack: Stack,
    tokenizer: Any,
    sample: Problem,
    settings: PathSettings,
    known: dict[Path, str] | None = None,
    note: Callable[[Path, str], None] = lambda path, answer: None,
) -> ProblemStudy:
    """Search one sample, with every control; the searches share answers and hidden states.

    Args:
        stack: the opened model.
        tokenizer: its tokenizer.
        sample: the prompt with its answer.
        settings: settings of the searches.
        known: cached answers by path.
        note: callback for each new answer.
    """
    answerer = PathAnswerer(stack, tokenizer, sample, settings.tokens, settings.chat, known, note)
    search = partial(find_paths, answerer, layers=len(stack), settings=settings)
    base = answerer(tuple(range(len(stack))))
    tree = search(sample.answer)
    searches = {
        "tree": tree,
        "random": search(sample.answer, evaluations=tree.evaluations),
        "skip": search(sample.answer, actions=("skip",)),
        "repeat": search(sample.answer, actions=("repeat",)),
    }
    wrong = tuple(search(target) for target in sample.wrong_targets)
    return ProblemStudy(sample, base, searches, wrong, answerer.tree.executed, answerer.unshared)


@dataclass(frozen=True)
class PathStudy:
    """The searches for a set of samples; :func:`~lamella.methods.cola.page.report` aggregates them.

    Attributes:
        model: the model that was studied.
        stack: name of its stack.
        settings: settings of the searches.
        samples: the study of each sample.
    """

    model: ModelReference
    stack: str
    settings: PathSettings
    samples: tuple[ProblemStudy, ...]

    def plans(self) -> dict[str, Plan]:
        """Return a plan of the shortest correct path for each sample; it was chosen with knowledge of the answer."""
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
        """Return the valid and invalid paths of every search as JSON values."""
        samples = [asdict(each) | {"right": each.right} for each in self.samples]
        for each in samples:  # the number of executed layers depends on the journal, the result does not
            del each["executed"], each["unshared"]
        model, settings = self.model.model_dump(), asdict(self.settings)
        return {"schema": "lamella.cola/1", "model": model, "settings": settings, "samples": samples}
