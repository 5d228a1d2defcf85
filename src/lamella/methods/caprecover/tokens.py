"""The token audit: how many input tokens an eavesdropper recovers where a language model is cut.

    h_k [tokens, hidden] --linear--> e [tokens, hidden] --nearest--> token

The front of the model runs on the attacker's device too, so the attacker has its embedding. One linear layer from
hidden states to embeddings is fitted in closed form by ridge regression; the predicted token is the one with the most
similar embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import normalize

from lamella.data import Text
from lamella.errors import CalibrationError, MethodError, listed
from lamella.methods.caprecover.audit import EVALUATION_REQUEST, interval
from lamella.methods.caprecover.method import parse_defences
from lamella.progress import track
from lamella.registry import command
from lamella.results import Study
from lamella.signature import Split
from lamella.stack import Stack, join

RIDGE = 1e-3  # ridge penalty, relative to the mean square of the inputs
ROWS = 4096  # tokens that are in float64 at once


@command("caprecover", "tokens", brief={"cuts": (0, 2), "guards": ("none", "gaussian:10"), "seeds": 1, "sequences": 5})
def tokens(
    stack: Stack,
    calibration: Text,
    test: Annotated[Text | None, Split("test")] = None,
    *,
    cuts: tuple[Annotated[int, Ge(0)], ...] = (),
    guards: tuple[str, ...] = ("none", "uniform", "gaussian:3", "gaussian:10"),
    seeds: Annotated[int, Ge(1)] = 3,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Audit a split language model: the fraction of input tokens that an eavesdropper recovers after a layer.

    Args:
        stack: a decoder; it is not changed.
        calibration: the attacker's text.
        test: the victims' text; if None, the test split of the calibration data.
        cuts: layers after which the model is cut; if empty, five evenly spaced ones.
        guards: defences: none, uniform, gaussian:10, fixed:10 (in units of a cut's standard deviation), bits:8,
            top:0.1, pooled.
        seeds: number of noise seeds, for the interval.
        seed: random seed of the first one.

    Returns:
        For each cut and defence the fraction of tokens recovered by attackers who know the defence and who do not.

    Raises:
        MethodError: for an unknown layer or defence.
        CalibrationError: for too little text.
    """
    layers = list(cuts) or sorted({round(n * (len(stack) - 1) / 4) for n in range(5)})
    if max(layers) >= len(stack):
        raise MethodError(f"cuts {listed(cuts)}: give layers from 0 to {len(stack) - 1}")
    defences = parse_defences(guards)
    test_text = calibration.part("test") if test is None else test
    embedding = stack.base.get_submodule(stack.architecture.embedding).weight.detach().float().cpu()

    def attack(layer: int) -> list[dict[str, Any]]:
        train, judge = (hidden_states(stack, each.tokens, [layer]) for each in (calibration, test_text))
        if len(train.ids) < 2 * train.h[layer].shape[-1]:
            raise CalibrationError(
                f"{len(train.ids)} tokens are too few to fit a linear layer of {train.h[layer].shape[-1]} dimensions: "
                "give more with --sequences and --length"
            )
        scale = float(train.h[layer].std())
        name, rows = f"layers.{layer}", []
        clean = RidgeRegression.of(train.h[layer], embedding[train.ids])
        for guard in defences:
            found: dict[str, list[float]] = {"adaptive": [], "static": []}
            for each in range(seed, seed + seeds):
                sent, overheard = (
                    guard.send(name, part.h[layer], scale, first + each)
                    for part, first in ((train, 0), (judge, EVALUATION_REQUEST))
                )
                knows = clean if guard.kind == "none" else RidgeRegression.of(sent, embedding[train.ids])
                for who, attacker in (("adaptive", knows), ("static", clean)):
                    found[who].append(float((attacker.tokens(overheard, embedding) == judge.ids).double().mean()))
            results = {who: interval(values) for who, values in found.items()}
            rows.append({"cut": name, "guard": str(guard), "ratio": guard.ratio(scale), **results})
        return rows

    rows = [row for layer in layers for row in attack(layer)]  # the hidden states of one layer are in memory at once
    train_ids, judge_ids = (each.tokens.flatten().cpu() for each in (calibration, test_text))
    majority_token = int(train_ids.bincount().argmax())
    findings: dict[str, Any] = {
        "tokens": rows,
        "majority": float((judge_ids == majority_token).double().mean()),
        "token_counts": {"attacker": len(train_ids), "judge": len(judge_ids)},
    }
    return Study(findings=findings)


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of a text.

    Attributes:
        ids: token ids [tokens].
        h: hidden states after each layer [tokens, hidden], by layer.
    """

    ids: Tensor
    h: dict[int, Tensor]


@torch.no_grad()
def hidden_states(stack: Stack, ids: Tensor, layers: Sequence[int]) -> HiddenStates:
    """Compute the hidden states after some layers.

    Args:
        stack: the decoder.
        ids: token ids [sequences, time].
        layers: indices of the layers.
    """
    last = stack.architecture.names[-1]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for row in track(ids.split(1), "computing hidden states"):
        context = stack.context(row.to(stack.device))
        for at, h in stack.walk(context.h, 0, max(layers) + 1, context):
            if at.sublayer == last and at.layer in found:
                found[at.layer].append(join(h)[context.real].float().cpu())
    return HiddenStates(ids.flatten().cpu(), {layer: torch.cat(each) for layer, each in found.items()})


@dataclass(frozen=True)
class RidgeRegression:
    """A linear layer with bias, fitted in float64.

    Attributes:
        weight: [hidden, width].
        bias: [width].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> RidgeRegression:
        """Fit y [rows, width] from x [rows, hidden] by ridge regression.

        Args:
            x: inputs `[rows, hidden]`.
            y: targets `[rows, width]`.
        """
        mean_x, mean_y = (each.mean(0, dtype=torch.float64) for each in (x, y))
        gram, products = mean_x.new_zeros(len(mean_x), len(mean_x)), mean_x.new_zeros(len(mean_x), len(mean_y))
        for some_x, some_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
            centred = some_x - mean_x
            gram += centred.T @ centred
            products += centred.T @ (some_y - mean_y)
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
        weight = torch.linalg.solve(gram, products)
        return cls(weight, mean_y - mean_x @ weight)

    def tokens(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the token with the most similar embedding for each row [rows].

        Args:
            x: hidden states [rows, hidden].
            embedding: the embedding matrix [vocabulary, width].
        """
        table = normalize(embedding, dim=1).T
        points = [(rows.double() @ self.weight + self.bias).float() for rows in x.split(512)]
        return torch.cat([(normalize(each, dim=1) @ table).argmax(1) for each in points])
