"""LayRA: continually adding new languages to multilingual language models, with LoRA in the first and last layers.

Owodunni and Kumar, "Continually Adding New Languages to Multilingual Language Models", arXiv 2509.11414.

A released model lacks a language, and its training data is not available, so it cannot be replayed. Trained on the new
language alone, it forgets those that it has. LayRA leaves the middle of the stack unchanged::

    layers     0 .. a-1     |     a .. L-b-1      |   L-b .. L-1
               encode the   |   work in the       |   generate in the
               language     |   inner language    |   language
               W + (alpha/r) B A  |   W, frozen   |   W + (alpha/r) B A

    for each language:      train A, B on its text alone;  theta <- theta + Delta;  measure all languages
    in the end:             theta + lambda Delta + lambda' (theta_instruct - theta)      (arithmetic.py)

The paper's S, the first 10 and the last 2 layers of 32, follows from studies of how multilingual models work. The
stages of *your* model can be measured (pivot.py, an addition of Lamella), and baselines of the same size in other
layers test whether the choice pays (baselines.py).

Memory and time of training do not shrink in proportion to the adapted layers: the lowest layer is adapted, so gradients
pass through the whole stack, and all activations are kept.
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
from lamella.methods.layra.recipe import TRAINING, AdapterShape, learn, with_adapters
from lamella.plan.fingerprint import revision
from lamella.registry import method
from lamella.results import Result
from lamella.stack import Stack
from lamella.train import Adapter, TrainConfig, TrainingLog, concatenate, merge

Protocol = Literal["sequential", "series", "joint", "separate"]
NONE: dict[str, Language] = {}


@dataclass(kw_only=True)
class Added(Result):
    """A model with new languages; its folder is that of a peft adapter.

    Attributes:
        stack: the model with everything merged; it shares all other tensors with the original.
        adapter: all languages as one adapter for the original.
        adapters: the adapter of each step. With ``sequential``, each is for the model with the previous ones merged.
        edges: the adapted layers.
        matrix: bits per byte of every language, before and after each step.
        logs: training logs.
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
        """Write the adapter of all languages, which plain peft loads and merges, and in ``steps`` that of each step."""
        self.adapter.write_into(folder)
        for name, each in self.adapters.items() if len(self.adapters) > 1 else ():
            place = folder / "steps" / name
            place.mkdir(parents=True)
            each.write_into(place)

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """Read all languages as one adapter, from a result folder."""
        return Adapter.open(path)


def notes(matrix: Matrix) -> list[str]:
    """Summarise the matrix in sentences."""
    found = [f"{name}: {matrix.learning(name):.3f} bits per byte learned." for name in matrix.new]
    if matrix.old:
        rises = {name: matrix.forgetting(names=[name]) for name in matrix.old}
        worst = max(rises, key=lambda name: rises[name])
        found.append(
            f"Loss on old languages rose by {matrix.forgetting():.3f} bits per byte on average, most for {worst} "
            f"({rises[worst]:.3f})."
        )
    else:
        found.append("No old language was measured, so forgetting is unknown.")
    again = [f"{name} {loss:.3f}" for name, loss in matrix.retention().items() if loss > 0]
    if again:
        found.append(f"Forgotten again since they were learned, in bits per byte: {', '.join(again)}.")
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
    shape: AdapterShape = AdapterShape(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Added:
    """Add languages to a model by adapters in its first and last layers, and measure what it forgets.

    Args:
        stack: a pre-trained decoder, not an instruction-tuned one; it is not changed.
        languages: languages to learn, in order: raw text only.
        old: languages to keep: English first, which usually loses most. They are not trained on.
        first: a, number of adapted layers at the bottom; the paper's 10 of 28 or 32, scaled to the depth.
        last: b, number at the top; the paper's 2, scaled to the depth.
        protocol: ``sequential`` merges each language's adapter and starts a new one; ``series`` continues the same
            adapter; ``joint`` trains one adapter on the mixture of all; ``separate`` trains each on the original, and
            adds them.
        weight: lambda, weight of each language's adapter with ``separate``.
        shape: rank, scale and targets of the adapters.
        config: training settings per language: the paper's learning rate of 3e-4 and one epoch. With ``eval_every``,
            the log contains the held-out losses of all languages. The seed also initialises the adapters.
        work: folder from which an interrupted run resumes with the same result.

    Returns:
        The model with all languages, as adapters and merged.

    Raises:
        MethodError: for options that do not fit each other or the model.
        TrainingError: when training cannot start or does not stay finite.
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
    view, lora = with_adapters(stack, edges.sites, shape, config.seed)
    for number, (step, samples) in enumerate(_steps(languages, protocol).items()):
        turn = replace(config, seed=config.seed + number)
        if number and protocol != "series":
            start = current if protocol == "sequential" else stack
            view, lora = with_adapters(start, edges.sites, shape, turn.seed)
        out = folder / f"{number + 1}-{step}"
        adapters[step], logs[step] = learn(view, lora, samples, turn, out=out, held_out=held_out)
        current = merge(stack, _whole(adapters, base, protocol, weight))
        matrix.add(step, measure(current.model, known, config.batch))
    whole = _whole(adapters, base, protocol, weight)
    return Added(stack=current, adapter=whole, adapters=adapters, edges=edges, matrix=matrix, logs=logs)


def _steps(languages: Mapping[str, Language], protocol: Protocol) -> dict[str, list[Any]]:
    """Training samples of each step."""
    if protocol != "joint":
        return {name: list(each.samples) for name, each in languages.items()}
    return {"+".join(languages): [sample for each in languages.values() for sample in each.samples]}


def _whole(adapters: Mapping[str, Adapter], base: str, protocol: Protocol, weight: float) -> Adapter:
    """Combine all steps so far into one adapter for the original."""
    if protocol in ("series", "joint"):
        return list(adapters.values())[-1]  # it contains all languages
    weights = [weight if protocol == "separate" else 1.0] * len(adapters)
    return concatenate([replace(each, base=base) for each in adapters.values()], weights)


def _check(
    stack: Stack, languages: Mapping[str, Language], old: Mapping[str, Language], protocol: str, weight: float
) -> None:
    if not stack.architecture.causal:
        raise MethodError(f"layra works on decoders; {stack.name} is a {stack.architecture.name}")
    if weight != 1.0 and protocol != "separate":
        raise MethodError(f"weight {weight:g} is only for protocol 'separate'; the others train the combined adapter")
    if not languages:
        raise MethodError("there are no languages to learn: give at least one")
    if both := sorted(set(languages) & set(old)):
        raise MethodError(f"'{both[0]}' is both a new and an old language: rename one of them")
    if empty := [name for name, each in languages.items() if not each.samples]:
        raise MethodError(f"the language '{empty[0]}' has no samples to learn from: give some")
