"""What trains a mixture of depths, and what its thresholds are afterwards.

    L = L_task + lambda * sum over converted layers of CE(z, chosen)      everything trains: model and router

Training keeps the best tokens of a sequence, serving those whose p is above a threshold. The calibrated threshold of
a layer is the quantile of p on calibration prompts that keeps as many of them as training did; the authors' are
constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lamella.data import ImageText, Samples
from lamella.errors import MethodError
from lamella.evaluate.scored import labelled_batches, scored_states
from lamella.methods.gamma_mod.policy import MixtureOfDepths, Routers
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.progress import track
from lamella.runtime import apply, traced, untraced
from lamella.search import threshold
from lamella.stack import Stack, last_stack
from lamella.train import NO_LOSS, Task, TrainConfig, TrainingLog, batching, fit, own, response_loss

TRAINING = TrainConfig(lr=2e-5, batch=8, accumulate=2)
BATCH = 8
PREFILL, DECODE = 0.005, 0.5  # the authors' thresholds
KINDS = ("image", "prompt", "answer")


@dataclass(frozen=True)
class Routing:
    """How a mixture of depths is trained and served.

    Attributes:
        skip: rho: of the tokens that may pass, how many do in training. Released checkpoints have 0.5 and 0.34.
        router_loss: lambda, the weight of the routers' loss.
        mask: whether in training all tokens behind the image are processed; without, any token may pass, as many in
            all.
        text_rows: of rows without an image, training processes all tokens (``keep``), or those of the prompt and the
            best of the answer, half of all (``half``). Both are released, for different models.
        positions: of processed tokens: counted anew in each layer, ``compact``, as released, or ``original``.
        start: of the router: ``random`` as released, or ``keep`` (ours), which at first changes nothing.
        routers: one that is ``shared``; for comparison, one for each ``layer`` or ``modality``.
        served: with thresholds ``calibrated`` to what training kept, or with the authors' ``constants``.

    Raises:
        MethodError: for numbers out of range.
    """

    skip: float = 0.5
    router_loss: float = 0.01
    mask: bool = True
    text_rows: Literal["keep", "half"] = "keep"
    positions: Literal["compact", "original"] = "compact"
    start: Literal["random", "keep"] = "random"
    routers: Routers = "shared"
    served: Literal["calibrated", "constants"] = "calibrated"

    def __post_init__(self) -> None:
        if not 0 <= self.skip < 1 or not self.router_loss >= 0:
            raise MethodError("gamma-mod: skip is from 0 to below 1, and router_loss is at least 0")


def converted(stack: Stack, layers: Sequence[int], routing: Routing, seed: int) -> Any:
    """A view of the model whose layers are converted, with weights of its own, in its training execution."""
    params: dict[str, Any] = {"layers": list(layers), "positions": routing.positions, "start": routing.start}
    params |= {"routers": routing.routers, "seed": seed}
    view = apply(stack, planned(stack, params))
    own(view)
    policy: MixtureOfDepths = view.lamella_policy
    policy.training_share, policy.masks, policy.text_rows = routing.skip, routing.mask, routing.text_rows
    return view


def planned(stack: Stack, params: dict[str, Any], work: Sequence[tuple[float, ...]] = ()) -> Plan:
    """The plan of a mixture of depths."""
    reference = PolicyReference(name="gamma-mod", params=params, work=list(work))
    return Plan(model=ModelReference.of(stack), policies={stack.stack: reference})


def train(view: Any, samples: Samples | ImageText, routing: Routing, config: TrainConfig, out: Path) -> TrainingLog:
    """Train a converted model and its router, in place.

    Args:
        view: of :func:`converted`.
        samples: prompts with their answers, which carry the task's loss.
        routing: of it, the weight of the router's loss.
        config: of the training.
        out: a folder for checkpoints; an interrupted run goes on from there.

    Raises:
        MethodError: for a batch without answers.
    """
    policy: MixtureOfDepths = view.lamella_policy

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not (batch["labels"][:, 1:] != NO_LOSS).any():
            raise MethodError("gamma-mod: the samples of a batch have no answers, which carry the loss: give some")
        task = response_loss(model, batch)
        router = policy.router_loss
        return task + routing.router_loss * router, {"ce": task.detach(), "router": router.detach()}

    settings = {"plan": view.lamella_plan.digest, "routing": str(routing)}
    log = fit(view, samples, Task(loss, collate=batching(samples)), config, out=out, settings=settings)
    policy.router_loss = policy.router_loss.detach()
    return log


# What runs


@dataclass(frozen=True)
class Seen:
    """What the converted layers have made of all tokens of some rows, which stand one behind the other.

    Attributes:
        p: the router's probability of being processed, in float64 [tokens, layers].
        ran: whether it was [tokens, layers] bool.
        prompt, image: which are of a prompt, and of an image, which is a part of it [tokens] bool.
        row: of each token [tokens].
        loss: mean cross-entropy of the answers, in nats.
    """

    p: Tensor
    ran: Tensor
    prompt: Tensor
    image: Tensor
    row: Tensor
    loss: float

    def kept(self) -> dict[str, list[float]]:
        """The share of tokens of each kind that each layer has processed."""
        kinds = dict(zip(KINDS, (self.image, self.prompt & ~self.image, ~self.prompt), strict=True))
        return {name: self.ran[those].float().mean(0).tolist() for name, those in kinds.items() if those.any()}

    def work(self, layers: Sequence[int], stack: Stack) -> list[tuple[float, ...]]:
        """The share of tokens that each sublayer of the whole stack has processed."""
        shares = dict(zip(layers, self.ran.double().mean(0).tolist(), strict=True))
        return [(shares.get(layer, 1.0),) * len(stack.architecture.names) for layer in range(len(stack))]


@torch.no_grad()
def observed(view: Any, samples: Samples | ImageText) -> Seen:
    """What a view makes of samples, in the execution that it is set to."""
    policy: MixtureOfDepths = view.lamella_policy
    layers, stack = list(policy.place), last_stack(view)
    token = policy_image(view)
    found: list[tuple[Tensor, ...]] = []
    loss = labels = row = 0.0
    for batch in track(list(labelled_batches(samples, BATCH, stack.device)), "gamma-mod: which tokens run"):
        trace = traced(view)
        states, wanted = scored_states(view, batch)
        loss += float(torch.nn.functional.cross_entropy(stack.logits(states).float(), wanted, reduction="sum"))
        labels += len(wanted)
        executed, of_prompt, notes = trace.joined()
        ids = batch["input_ids"].cpu()
        real = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
        rows = (torch.arange(len(ids))[:, None] + row).expand_as(ids)
        mlp = policy.sublayers.index("mlp")
        found.append((
            (torch.from_numpy(notes["odds"]).double()[real][:, layers] + policy.bias).sigmoid(),
            torch.from_numpy(executed)[real][:, layers, mlp],
            torch.from_numpy(of_prompt)[real],
            (ids == token)[real],
            rows[real],
        ))  # fmt: skip
        row += len(ids)
    untraced(view)
    p, ran, prompt, image, number = (torch.cat(each) for each in zip(*found, strict=True))
    return Seen(p, ran, prompt, image, number, loss / max(labels, 1))


def policy_image(view: Any) -> int:
    """The token that stands for a position of an image; -1 in a model without."""
    named = last_stack(view).architecture.images
    return int(getattr(view.config, named)) if named else -1


def quantile(p: Tensor, keep: float) -> float:
    """The threshold above which this share of tokens lies [tokens]; -1 where all of them are to be processed.

    >>> quantile(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)
    0.25
    """
    passing = len(p) - round(keep * len(p))
    return threshold(p.double(), passing) if passing else -1.0


def calibrated(seen: Seen) -> dict[str, list[float]]:
    """For each layer the thresholds that keep, of prompts and of answers, what was kept while this was seen."""
    found: dict[str, list[float]] = {}
    for name, those in (("prefill", seen.prompt), ("decode", ~seen.prompt)):
        p, shares = seen.p[those], seen.ran[those].double().mean(0).tolist()
        found[name] = [quantile(p[:, place], share) for place, share in enumerate(shares)]
    return found
