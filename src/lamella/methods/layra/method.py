"""LayRA: continually adding new languages to multilingual language models, with LoRA in the first and last layers.

Owodunni and Kumar, "Continually Adding New Languages to Multilingual Language Models", arXiv 2509.11414.

A released model lacks a language, and the data that it was trained on is not at hand, so nothing can be replayed.
Trained on the new language alone, it forgets those that it has. LayRA leaves the middle of the stack as it is::

    layers     0 .. a-1     |     a .. L-b-1      |   L-b .. L-1
               encode the   |   work in the       |   say it in the
               language     |   inner language    |   language again
               W + (alpha/r) B A  |   W, frozen   |   W + (alpha/r) B A

    for each language:      train A, B on its text alone;  theta <- theta + Delta;  measure all languages
    in the end:             theta + lambda Delta + lambda' (theta_instruct - theta)      (arithmetic.py)

The paper's S, the first 10 and the last 2 layers of 32, follows from studies of how multilingual models work. Where the
stages of *your* model begin and end can be measured (pivot.py; ours), and whether the choice pays is asked by controls
of the same size in other layers (baselines.py).

What is adapted decides neither the memory of training nor its time in proportion: the lowest layer is adapted, so
gradients cross the whole stack, and all activations are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.layra.edges import Edges
from lamella.methods.layra.languages import Language, Matrix, measure
from lamella.methods.layra.recipe import TRAINING, Shape, adapted, learn
from lamella.plan.fingerprint import revision
from lamella.registry import method
from lamella.results import Result
from lamella.stack import Stack
from lamella.train import Adapter, TrainConfig, TrainingLog, concatenate, merge

Protocol = Literal["sequential", "series", "joint", "separate"]
NONE: dict[str, Language] = {}


@dataclass(kw_only=True)
class Added(Result):
    """A model with languages added; its folder is that of a peft adapter.

    Attributes:
        stack: the model with everything merged; it shares all other tensors with the original.
        adapter: all languages as one adapter for the original.
        adapters: what was trained at each step. In sequence, each is for the model with those before it merged.
        edges: the adapted layers.
        matrix: bits per byte of every language, before and after each step.
        logs: of the training runs.
    """

    stack: Stack
    adapter: Adapter
    adapters: dict[str, Adapter]
    edges: Edges
    matrix: Matrix
    logs: dict[str, TrainingLog]

    kind: ClassVar[str] = "adapter"
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.findings = {
            "layers": {**asdict(self.edges), "adapted": list(self.edges.indices)},
            "parameters": {name: each.parameters for name, each in self.adapters.items()},
            "matrix": asdict(self.matrix),
        }
        self.notes = notes(self.matrix)

    def write(self, folder: Path) -> None:
        """The adapter of all languages as plain peft loads and merges it, and in ``steps`` what each step trained."""
        self.adapter.write_into(folder)
        for name, each in self.adapters.items() if len(self.adapters) > 1 else ():
            place = folder / "steps" / name
            place.mkdir(parents=True)
            each.write_into(place)

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """All languages as one adapter, from a folder of results."""
        return Adapter.open(path)


def notes(matrix: Matrix) -> list[str]:
    """What a reader must know, each in one sentence."""
    found = [f"{name}: {matrix.learning(name):.3f} bits per byte learnt." for name in matrix.new]
    if matrix.old:
        rises = {name: matrix.forgetting(names=[name]) for name in matrix.old}
        worst = max(rises, key=lambda name: rises[name])
        found.append(
            f"Old languages cost {matrix.forgetting():.3f} bits per byte more on average, {worst} most "
            f"({rises[worst]:.3f})."
        )
    else:
        found.append("No old language was measured, so nothing is known of what was forgotten.")
    again = [f"{name} {loss:.3f}" for name, loss in matrix.retention().items() if loss > 0]
    if again:
        found.append(f"Lost again since their own turn, in bits per byte: {', '.join(again)}.")
    return found


@method("layra", paper="2509.11414", purpose="adapt", brief={"steps": 3})
def layra(
    stack: Stack,
    languages: dict[str, Language],
    old: dict[str, Language] = NONE,
    *,
    first: Annotated[int, Ge(0)] | None = None,
    last: Annotated[int, Ge(0)] | None = None,
    protocol: Protocol = "sequential",
    weight: float = 1.0,
    shape: Shape = Shape(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Added:
    """Teach a model new languages by adapters in its first and last layers, and measure what it forgets.

    Args:
        stack: a pre-trained decoder, not an instruction-tuned one; it is not changed.
        languages: what to learn, in this order: raw text of each new language, nothing else.
        old: what the model should keep: English first of all, which usually loses most. Nothing trains on it.
        first: how many layers at the bottom are adapted, a; the paper's 10 of 28 or 32, scaled to the depth.
        last: how many at the top, b; the paper's 2, scaled to the depth.
        protocol: ``sequential`` merges each language's adapter and starts a fresh one; ``series`` trains on the same
            adapter; ``joint`` is one adapter on the mixture of all; ``separate`` learns each from the original, and
            adds them up.
        weight: what each language's adapter counts, lambda, under ``separate``.
        shape: rank, scale and targets of the adapters.
        config: of the training of each language: the paper's rate of 3e-4 and one pass. With ``eval_every`` its log has
            the held-out losses of all languages on the way. Its seed is also that of the adapters' random halves.
        work: where an interrupted run goes on from, to the same result.

    Returns:
        The model with all languages, as adapters and merged.

    Raises:
        MethodError: for options that do not fit each other or the model.
        TrainingError: when training cannot start or stay finite.
    """
    edges = Edges.of(len(stack), first, last)
    _check(stack, languages, old, protocol, weight)
    known = {**old, **languages}
    held_out = {name: each.held_out for name, each in known.items()} if config.eval_every else None
    adapters: dict[str, Adapter] = {}
    logs: dict[str, TrainingLog] = {}
    matrix = Matrix(tuple(old), tuple(languages))
    matrix.add("before", measure(stack.model, known, config.batch))
    base, current = revision(stack.model), stack
    folder = work.directory()
    view, lora = adapted(stack, edges.sites, shape, config.seed)
    for number, (step, samples) in enumerate(_steps(languages, protocol).items()):
        turn = replace(config, seed=config.seed + number)
        if number and protocol != "series":
            start = current if protocol == "sequential" else stack
            view, lora = adapted(start, edges.sites, shape, turn.seed)
        out = folder / f"{number + 1}-{step}"
        adapters[step], logs[step] = learn(view, lora, samples, turn, out=out, held_out=held_out)
        current = merge(stack, _whole(adapters, base, protocol, weight))
        matrix.add(step, measure(current.model, known, config.batch))
    whole = _whole(adapters, base, protocol, weight)
    return Added(stack=current, adapter=whole, adapters=adapters, edges=edges, matrix=matrix, logs=logs)


def _steps(languages: Mapping[str, Language], protocol: Protocol) -> dict[str, list[Any]]:
    """What is trained on, one step after the other."""
    if protocol != "joint":
        return {name: list(each.samples) for name, each in languages.items()}
    return {"+".join(languages): [sample for each in languages.values() for sample in each.samples]}


def _whole(adapters: Mapping[str, Adapter], base: str, protocol: Protocol, weight: float) -> Adapter:
    """All that was learnt so far, as one adapter for the original."""
    if protocol in ("series", "joint"):
        return list(adapters.values())[-1]  # it has all languages
    weights = [weight if protocol == "separate" else 1.0] * len(adapters)
    return concatenate([replace(each, base=base) for each in adapters.values()], weights)


def _check(
    stack: Stack, languages: Mapping[str, Language], old: Mapping[str, Language], protocol: str, weight: float
) -> None:
    if not stack.architecture.causal:
        raise MethodError(f"layra works on decoders; {stack.name} is a {stack.architecture.name}")
    if weight != 1.0 and protocol != "separate":
        raise MethodError(f"weight {weight:g} is for protocol 'separate'; the others train what they add")
    if not languages:
        raise MethodError("there are no languages to learn: give one at least")
    if both := sorted(set(languages) & set(old)):
        raise MethodError(f"'{both[0]}' is given as a new and as an old language: call one of them otherwise")
    if empty := [name for name, each in languages.items() if not each.samples]:
        raise MethodError(f"the language '{empty[0]}' has no samples to learn from: give some")
