"""Where the stages of a model begin and end, measured; ours, beside the paper's fixed first 10 + last 2.

The paper takes its layers from studies of models that read a language, work in another one (mostly English), and answer
in the first: "Do Llamas work in English?" (Wendler et al. 2024), "How do large language models handle
multilingualism?" (Zhao et al. 2024). Four curves over the layers l = 1 .. L ask whether *this* model does so:

    pivot       the final norm and head read layer l's output: how much probability lies on tokens of English, and how
                much on those of the text's own language; between the crossings is the middle stage
    probe       how often a linear classifier tells the language from a window's mean state; low in the middle
    alignment   cosine of mean states of translations, above that of random pairs; high in the middle
    gradient    each layer's share of the squared gradient of LoRA's B at the start, on the new text; no cut, a hint

Models below about a billion parameters may show no crossing; then the fixed edges are taken, and the study says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lamella.errors import MethodError, listed
from lamella.methods.layra.edges import Edges, sites_of_layers
from lamella.methods.layra.languages import Language
from lamella.methods.layra.recipe import Shape, adapted
from lamella.registry import command
from lamella.results import Study
from lamella.stack import Context, Stack, join
from lamella.train import Sample, collate, response_loss

DISTINCT = 10.0  # a token is a language's own when it is so many times as frequent there
FLAT = 0.05  # a curve that moves less over the layers cuts nothing, nor does a lead that never gets so large
AGREE = 0.1  # of the depth: cuts that are no farther apart agree
BATCHES = 4  # of samples, for the gradient
BATCH = 4  # samples of each
Cut = tuple[int, int]  # how many layers the first stage and the last stage have


@dataclass(kw_only=True)
class Pivots(Study):
    """What the study found.

    Attributes:
        edges: what to adapt: the cut of the pivot curves, or the fixed one where there is none.
        cuts: of each curve, as first and last layers; None where it has no middle stage.
        curves: by name, one number for each layer; ``pivot LANGUAGE`` is the mass on English less that on its own.
        found: whether the edges come from the pivot curves.
    """

    edges: Edges
    cuts: dict[str, Cut | None]
    curves: dict[str, list[float]]
    found: bool

    def __post_init__(self) -> None:
        cuts = {name: None if cut is None else list(cut) for name, cut in self.cuts.items()}
        self.findings = {"edges": asdict(self.edges), "cuts": cuts, "curves": self.curves, "found": self.found}
        self.notes = self._notes()

    def _notes(self) -> list[str]:
        first, last, layers = self.edges.first, self.edges.last, self.edges.layers
        if not self.found:
            found = [f"No pivot to English was found: the fixed edges, {first} + {last} of {layers}, are taken."]
        else:
            found = [f"The middle stage, in which English leads, leaves the first {first} and the last {last} layers."]
        room = max(1, round(AGREE * layers))
        for name, cut in self.cuts.items():
            if cut is None:
                found.append(f"{name}: no middle stage.")
            elif max(abs(cut[0] - first), abs(cut[1] - last)) > room:
                found.append(f"{name} disagrees: it cuts at {cut[0]} + {cut[1]}.")
        return found


@command("layra", "pivot", brief={"languages": {"eng": "pydoc", "deu": "pydoc"}})
def pivot(
    stack: Stack,
    languages: dict[str, Language],
    *,
    english: str = "eng",
    parallel: Sequence[tuple[Tensor, Tensor]] | None = None,
    first: Annotated[int, Ge(0)] | None = None,
    last: Annotated[int, Ge(0)] | None = None,
    seed: int = 0,
) -> Pivots:
    """Measure where a model's language stages begin and end, to choose the layers that LayRA adapts.

    Args:
        stack: a decoder; it is not changed.
        languages: samples of several languages; their held-out text is used where they have no other.
        english: which of them the model is thought to work in.
        parallel: token ids of sentences with those of their translations [time], for the alignment.
        first, last: the fixed edges to fall back to; scaled to the depth when left out.
        seed: of the adapters whose gradient is taken.

    Raises:
        MethodError: without English and another language.
    """
    if english not in languages or len(languages) < 2:
        raise MethodError(f"the languages are {listed(languages)}: give '{english}' and at least one other")
    text = {name: list(each.samples or each.held_out) for name, each in languages.items()}
    fixed = Edges.of(len(stack), first, last)
    curves: dict[str, list[float]] = {}
    cuts: dict[str, Cut | None] = {}
    for name in languages:
        if name != english:
            curves[f"pivot {name}"] = lead(stack, text[name], text[english])
            cuts[f"pivot {name}"] = stages(curves[f"pivot {name}"])
    of_pivots = [cut for cut in cuts.values() if cut is not None]
    curves["probe"] = probe({name: means(stack, rows) for name, rows in text.items()})
    cuts["probe"] = between(curves["probe"], low=True)
    if parallel:
        curves["alignment"] = alignment(*(means(stack, [_row(pair[side]) for pair in parallel]) for side in (0, 1)))
        cuts["alignment"] = between(curves["alignment"], low=False)
    new = [row for name, rows in text.items() if name != english for row in rows[: BATCHES * BATCH]]
    curves["gradient"] = gradient(stack, new, seed)
    edges = fixed
    if of_pivots:
        edges = Edges(len(stack), *(round(median(cut[side] for cut in of_pivots)) for side in (0, 1)))
    return Pivots(edges=edges, cuts=cuts, curves=curves, found=bool(of_pivots))


# Curves


@torch.no_grad()
def lead(stack: Stack, rows: Sequence[Sample], english: Sequence[Sample]) -> list[float]:
    """The mean mass on English tokens less that on the language's own, read off after each layer [layers]."""
    own, theirs = own_tokens(rows, english, stack.unembedding.weight.shape[0])
    total, count = torch.zeros(len(stack), dtype=torch.float64), 0
    for row in rows:
        context = stack.context(row["input_ids"][None].to(stack.device))
        for layer, h in outputs(stack, context):
            mass = torch.softmax(stack.head(h)[0].float(), -1)  # [time, vocabulary]
            total[layer] += float((mass[:, theirs].sum(-1) - mass[:, own].sum(-1)).sum())
        count += len(row["input_ids"])
    return (total / count).tolist()


def outputs(stack: Stack, context: Context) -> Iterator[tuple[int, Tensor]]:
    """Each layer with the stream after it."""
    last = stack.architecture.names[-1]
    for position, h in stack.walk(context.h, 0, len(stack), context):
        if position.sublayer == last:
            yield position.layer, join(h)


def own_tokens(ours: Sequence[Sample], theirs: Sequence[Sample], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Which tokens are one text's own and which the other's, by their frequencies; shared ones are neither's."""
    counts = [
        torch.bincount(torch.cat([row["input_ids"].cpu() for row in rows]), minlength=vocabulary).double()
        for rows in (ours, theirs)
    ]
    ours_often, theirs_often = (each / each.sum() for each in counts)
    own, other = ours_often > DISTINCT * theirs_often, theirs_often > DISTINCT * ours_often
    return own.nonzero()[:, 0], other.nonzero()[:, 0]


@torch.no_grad()
def means(stack: Stack, rows: Sequence[Sample]) -> Tensor:
    """The mean state of each row after each layer [layers, rows, hidden]."""
    found = []
    for row in rows:
        context = stack.context(row["input_ids"][None].to(stack.device))
        found.append(torch.stack([h[0].float().mean(0).cpu() for _, h in outputs(stack, context)]))
    return torch.stack(found, dim=1)


def probe(states: Mapping[str, Tensor], ridge: float = 1.0) -> list[float]:
    """How often a linear classifier, fitted on every other row, names the language of the rest [layers].

    Least squares on standardised states, with one output for each language.

    Args:
        states: of each language, as :func:`means` gives them.
        ridge: of the squared weights.
    """
    layers = len(next(iter(states.values())))
    labels = torch.cat([torch.full((each.shape[1],), place) for place, each in enumerate(states.values())])
    train = torch.cat([torch.arange(each.shape[1]) % 2 == 0 for each in states.values()])
    if train.all():
        raise MethodError("a language has one sample only: give two or more, to fit a classifier and to judge it")
    wanted = nn.functional.one_hot(labels, len(states)).double()
    found = []
    for layer in range(layers):
        x = torch.cat([each[layer] for each in states.values()]).double()
        x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        gram = x[train] @ x[train].T + ridge * torch.eye(int(train.sum()), dtype=x.dtype)
        weights = x[train].T @ torch.linalg.solve(gram, wanted[train])
        found.append(float(((x[~train] @ weights).argmax(-1) == labels[~train]).double().mean()))
    return found


def alignment(ours: Tensor, theirs: Tensor) -> list[float]:
    """The mean cosine of translations, less that of all other pairs [layers]; both [layers, rows, hidden]."""
    ours, theirs = (nn.functional.normalize(each.double(), dim=-1) for each in (ours, theirs))
    cosines = ours @ theirs.transpose(1, 2)  # [layers, rows, rows]
    rows = cosines.shape[1]
    same = cosines.diagonal(dim1=1, dim2=2).mean(-1)
    others = (cosines.sum((1, 2)) - rows * same) / max(rows * (rows - 1), 1)
    return (same - others).tolist()


def gradient(stack: Stack, rows: Sequence[Sample], seed: int = 0) -> list[float]:
    """Each layer's share of the squared gradient of fresh adapters' B, on some batches [layers]."""
    view, lora = adapted(stack, sites_of_layers(range(len(stack))), Shape(), seed)
    total = torch.zeros(len(stack), dtype=torch.float64)
    parameters = {name: each for name, each in view.named_parameters() if lora.trains(name) and ".lora_B." in name}
    with torch.enable_grad():
        for start in range(0, len(rows), BATCH):
            batch = {name: each.to(stack.device) for name, each in collate(rows[start : start + BATCH]).items()}
            found = torch.autograd.grad(response_loss(view, batch), list(parameters.values()))
            for name, each in zip(parameters, found, strict=True):
                layer = int(name.removeprefix(stack.architecture.prefix).split(".", 1)[0])
                total[layer] += float(each.double().square().sum())
    return (total / total.sum()).tolist()


# Cuts


def crossing(curve: Sequence[float]) -> Cut | None:
    """Where English overtakes, and where the language takes over again for good; None without both.

    Layer l belongs to the first stage while English does not lead at its output; the last stage begins with the first
    layer of those at the end at whose outputs it leads no more.

    >>> crossing([-0.1, -0.1, 0.2, 0.3, 0.1, -0.4])
    (2, 1)
    """
    ahead = [place for place, value in enumerate(curve) if value > 0]
    if not ahead or ahead[-1] == len(curve) - 1 or ahead[0] == 0:
        return None
    return ahead[0], len(curve) - 1 - ahead[-1]


def stages(lead: Sequence[float]) -> Cut | None:
    """The crossings of a pivot curve on which English leads by more than chance.

    >>> stages([-0.02, 0.01, -0.01]), stages([-0.2, 0.3, -0.3])
    (None, (1, 1))
    """
    return crossing(lead) if max(lead) > FLAT else None


def between(curve: Sequence[float], low: bool) -> Cut | None:
    """The stretch in which a curve is beyond half of its height, as the layers before it and behind it.

    Args:
        curve: one number for each layer.
        low: whether the middle stage is where it is low.

    Returns:
        None for a flat curve, and for one whose stretch reaches an end of the stack.

    >>> between([1.0, 0.9, 0.2, 0.1, 0.8], low=True)
    (2, 1)
    """
    if max(curve) - min(curve) < FLAT:
        return None
    half = (max(curve) + min(curve)) / 2
    return crossing([half - value if low else value - half for value in curve])


def _row(ids: Tensor) -> Sample:
    return {"input_ids": torch.as_tensor(ids)}
