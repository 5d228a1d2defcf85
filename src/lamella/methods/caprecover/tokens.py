"""What an eavesdropper reads of the words themselves, where a language model is cut.

    h_k [tokens, hidden] --linear--> e [tokens, hidden] --nearest--> token

The front of the model is on the attacker's own device, so he has its embedding. He needs one linear map from streams to
embeddings, which a ridge regression finds at once; the token is the one whose embedding is the most similar.
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
from lamella.methods.caprecover.audit import FIRST, interval
from lamella.methods.caprecover.method import parsed
from lamella.progress import track
from lamella.registry import command
from lamella.results import Study
from lamella.signature import Split
from lamella.stack import Stack, join

RIDGE = 1e-3  # of the mean square of the inputs


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
    """Audit a split language model: how many of its input tokens an eavesdropper reads behind a layer.

    Args:
        stack: a decoder; it is not changed.
        calibration: the attacker's text.
        test: that of others, which he listens to; the test split of his own when left out.
        cuts: layers behind which the model is cut; five evenly spaced ones when left out.
        guards: defences, as in caprecover.
        seeds: of the noise, for the interval.
        seed: the first of them.

    Returns:
        By cut and defence the share of tokens that are read, by attackers who know the defence and who do not.

    Raises:
        MethodError: for a layer or a defence that there is not.
        CalibrationError: for too little text.
    """
    layers = list(cuts) or sorted({round(n * (len(stack) - 1) / 4) for n in range(5)})
    if max(layers) >= len(stack):
        raise MethodError(f"cuts {listed(cuts)}: give layers from 0 to {len(stack) - 1}")
    defences = parsed(guards)
    heard = calibration.part("test") if test is None else test
    train, judge = (streams(stack, each.tokens, layers) for each in (calibration, heard))
    if len(train.ids) < 2 * train.h[layers[0]].shape[-1]:
        raise CalibrationError(
            f"{len(train.ids)} tokens are too few for a linear map of {train.h[layers[0]].shape[-1]} dimensions: give "
            "more with --sequences and --length"
        )
    embedding = stack.base.get_submodule(stack.architecture.embedding).weight.detach().float().cpu()
    rows = []
    for layer in layers:
        scale = float(train.h[layer].std())
        name = f"layers.{layer}"
        clean = Linear.of(train.h[layer], embedding[train.ids])
        for guard in defences:
            found: dict[str, list[float]] = {"adaptive": [], "static": []}
            for each in range(seed, seed + seeds):
                sent, overheard = (
                    guard.send(name, part.h[layer], scale, first + each) for part, first in ((train, 0), (judge, FIRST))
                )
                knows = clean if guard.kind == "none" else Linear.of(sent, embedding[train.ids])
                for who, reader in (("adaptive", knows), ("static", clean)):
                    found[who].append(float((reader.tokens(overheard, embedding) == judge.ids).double().mean()))
            told = {who: interval(values) for who, values in found.items()}
            rows.append({"cut": name, "guard": str(guard), "ratio": guard.ratio(scale), **told})
    most = int(train.ids.bincount().argmax())
    findings: dict[str, Any] = {
        "tokens": rows,
        "majority": float((judge.ids == most).double().mean()),
        "read": {"attacker": len(train.ids), "judge": len(judge.ids)},
    }
    return Study(findings=findings)


@dataclass(frozen=True)
class Streams:
    """Token ids [tokens], and by layer the stream behind it at each of them [tokens, hidden]."""

    ids: Tensor
    h: dict[int, Tensor]


@torch.no_grad()
def streams(stack: Stack, ids: Tensor, layers: Sequence[int]) -> Streams:
    """What is sent behind some layers."""
    last = stack.architecture.names[-1]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for row in track(ids.split(1), "listening"):
        context = stack.context(row.to(stack.device))
        for at, h in stack.walk(context.h, 0, max(layers) + 1, context):
            if at.sublayer == last and at.layer in found:
                found[at.layer].append(join(h)[context.real].float().cpu())
    return Streams(ids.flatten().cpu(), {layer: torch.cat(each) for layer, each in found.items()})


@dataclass(frozen=True)
class Linear:
    """A linear map with a bias, in float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Linear:
        """The ridge regression of y [rows, wide] on x [rows, hidden]."""
        x, y = x.double(), y.double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
        weight = torch.linalg.solve(gram, x.T @ y)
        return cls(weight, mean_y - mean_x @ weight)

    def tokens(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The most similar token of each row [rows]."""
        table = normalize(embedding, dim=1).T
        points = [(rows.double() @ self.weight + self.bias).float() for rows in x.split(512)]
        return torch.cat([(normalize(each, dim=1) @ table).argmax(1) for each in points])
