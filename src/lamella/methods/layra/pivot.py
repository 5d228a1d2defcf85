"""Measure where the stages of a model begin and end; an addition of Lamella to the paper's fixed first 10 + last 2.

The paper takes its layers from studies of models that read a language, work in another one (mostly English), and answer
in the first: "Do Llamas work in English?" (Wendler et al. 2024), "How do large language models handle multilingualism?"
(Zhao et al. 2024). Four curves over the layers l = 1 .. L test whether *this* model does so:

    pivot       probability of English tokens and of the text's own language, decoded from layer l's output by the
                final norm and head; between the crossings is the middle stage
    probe       accuracy of a linear classifier of the language from a window's mean hidden state; low in the middle
    alignment   cosine of mean hidden states of translations, minus that of random pairs; high in the middle
    gradient    each layer's fraction of the squared gradient of LoRA's B at initialisation, on the new text; only a
    hint

Models below about a billion parameters may show no crossing; then the fixed edges are used, and a note says so.
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
from lamella.methods.layra.recipe import AdapterShape, with_adapters
from lamella.registry import command
from lamella.results import Study
from lamella.stack import Context, Stack, join
from lamella.train import Sample, collate, response_loss

DISTINCT = 10.0  # a token belongs to a language if it is at least this many times as frequent there
FLAT = 0.05  # minimum range of a curve, and minimum lead, for a cut
AGREE = 0.1  # fraction of the depth within which cuts agree
BATCHES = 4  # for the gradient
BATCH = 4  # samples per batch
Cut = tuple[int, int]  # number of layers of the first and of the last stage


@dataclass(kw_only=True)
class Pivots(Study):
    """Result of the study.

    Attributes:
        edges: the layers to adapt: the cut of the pivot curves, or the fixed one if there is none.
        cuts: of each curve, as first and last layers; None without a middle stage.
        curves: by name, one value per layer; ``pivot LANGUAGE`` is the probability of English minus that of the
            language.
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
            found = [f"No pivot to English was found: the fixed edges, {first} + {last} of {layers}, are used."]
        else:
            found = [f"English leads in all but the first {first} and the last {last} layers (the middle stage)."]
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
        languages: samples of several languages; their held-out text is used if they have no others.
        english: the language in which the model is assumed to work.
        parallel: token ids of sentences with those of their translations [time], for the alignment.
        first: fixed number of first layers as a fallback; scaled to the depth by default.
        last: fixed number of last layers as a fallback; scaled to the depth by default.
        seed: random seed of the adapters whose gradient is computed.

    Returns:
        The cuts and curves.

    Raises:
        MethodError: without English and another language.
    """
    if english not in languages or len(languages) < 2:
        raise MethodError(f"languages {listed(languages)}: give '{english}' and at least one other")
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
    """Mean probability of English tokens minus that of the language's own, decoded after each layer [layers].

    Args:
        stack: the model.
        rows: text of the language.
        english: English text.
    """
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
    """Iterate over the layers with the residual stream after each.

    Args:
        stack: the model.
        context: context of the input.
    """
    last = stack.architecture.names[-1]
    for position, h in stack.walk(context.h, 0, len(stack), context):
        if position.sublayer == last:
            yield position.layer, join(h)


def own_tokens(ours: Sequence[Sample], theirs: Sequence[Sample], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens that are specific to each of two texts, by their frequencies; shared ones belong to neither.

    Args:
        ours: the first text.
        theirs: the second text.
        vocabulary: vocabulary size.
    """
    counts = [
        torch.bincount(torch.cat([row["input_ids"].cpu() for row in rows]), minlength=vocabulary).double()
        for rows in (ours, theirs)
    ]
    ours_often, theirs_often = (each / each.sum() for each in counts)
    own, other = ours_often > DISTINCT * theirs_often, theirs_often > DISTINCT * ours_often
    return own.nonzero()[:, 0], other.nonzero()[:, 0]


@torch.no_grad()
def means(stack: Stack, rows: Sequence[Sample]) -> Tensor:
    """Return the mean hidden state over the tokens of each row after each layer [layers, rows, hidden].

    Args:
        stack: the model.
        rows: samples with ``input_ids`` [time].
    """
    found = []
    for row in rows:
        context = stack.context(row["input_ids"][None].to(stack.device))
        found.append(torch.stack([h[0].float().mean(0).cpu() for _, h in outputs(stack, context)]))
    return torch.stack(found, dim=1)


def probe(states: Mapping[str, Tensor], ridge: float = 1.0) -> list[float]:
    """Accuracy of a linear classifier of the language, fitted on every other row and tested on the rest [layers].

    Least squares on standardised hidden states, with one output per language.

    Args:
        states: hidden states of each language, as from :func:`means`.
        ridge: penalty on the squared weights.
    """
    layers = len(next(iter(states.values())))
    labels = torch.cat([torch.full((each.shape[1],), index) for index, each in enumerate(states.values())])
    train = torch.cat([torch.arange(each.shape[1]) % 2 == 0 for each in states.values()])
    if train.all():
        raise MethodError("a language has only one sample: give at least two, for training and test of a classifier")
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
    """Mean cosine of translations, minus that of all other pairs [layers].

    Args:
        ours: mean hidden states [layers, rows, hidden].
        theirs: those of the translations [layers, rows, hidden].
    """
    ours, theirs = (nn.functional.normalize(each.double(), dim=-1) for each in (ours, theirs))
    cosines = ours @ theirs.transpose(1, 2)  # [layers, rows, rows]
    rows = cosines.shape[1]
    same = cosines.diagonal(dim1=1, dim2=2).mean(-1)
    others = (cosines.sum((1, 2)) - rows * same) / max(rows * (rows - 1), 1)
    return (same - others).tolist()


def gradient(stack: Stack, rows: Sequence[Sample], seed: int = 0) -> list[float]:
    """Each layer's fraction of the squared gradient of new adapters' B, on some batches [layers].

    Args:
        stack: the model.
        rows: new text.
        seed: random seed of the adapters.
    """
    view, lora = with_adapters(stack, sites_of_layers(range(len(stack))), AdapterShape(), seed)
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
    """Find where English takes the lead, and where the language takes it back for good; None without both.

    Layer l belongs to the first stage while English does not lead at its output; the last stage starts after the last
    layer at whose output English leads.

    >>> crossing([-0.1, -0.1, 0.2, 0.3, 0.1, -0.4])
    (2, 1)
    """
    ahead = [index for index, value in enumerate(curve) if value > 0]
    if not ahead or ahead[-1] == len(curve) - 1 or ahead[0] == 0:
        return None
    return ahead[0], len(curve) - 1 - ahead[-1]


def stages(lead: Sequence[float]) -> Cut | None:
    """The crossings of a pivot curve on which English leads significantly.

    >>> stages([-0.02, 0.01, -0.01]), stages([-0.2, 0.3, -0.3])
    (None, (1, 1))
    """
    return crossing(lead) if max(lead) > FLAT else None


def between(curve: Sequence[float], low: bool) -> Cut | None:
    """Find the range in which a curve is beyond half of its height, as numbers of layers before and after it.

    Args:
        curve: one value per layer.
        low: whether the curve is low in the middle stage.

    Returns:
        The cut; None for a flat curve, and if the range reaches an end of the stack.

    >>> between([1.0, 0.9, 0.2, 0.1, 0.8], low=True)
    (2, 1)
    """
    if max(curve) - min(curve) < FLAT:
        return None
    half = (max(curve) + min(curve)) / 2
    return crossing([half - value if low else value - half for value in curve])


def _row(ids: Tensor) -> Sample:
    return {"input_ids": torch.as_tensor(ids)}
