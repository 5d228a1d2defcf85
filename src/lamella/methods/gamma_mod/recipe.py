"""Training of a mixture of depths, and calibration of its thresholds.

    L = L_task + lambda * sum over converted layers of CE(z, selected)    trains everything: model and router

Training processes the best tokens of a sequence, serving those with p above a threshold. The calibrated threshold of a
layer is the quantile of p on calibration prompts that processes the same fraction as training; the authors' thresholds
are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
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
    """Training and serving of a mixture of depths.

    Attributes:
        skip: rho: fraction of the skippable tokens that skip in training. Released checkpoints use 0.5 and 0.34.
        router_loss: lambda, the weight of the router loss.
        mask: whether all tokens after the image are processed in training; otherwise any token may skip, with the same
            total number.
        text_rows: for rows without an image, training processes all tokens (``keep``), or the prompt and the best
            answer tokens, half of all (``half``). Both are released, for different models.
        positions: position ids of processed tokens: new ones in each layer (``compact``, as released), or ``original``.
        start: initialisation of the router: ``random`` as released, or ``keep`` (an addition of Lamella), which changes
            nothing at first.
        routers: one ``shared`` router; for comparison, one per ``layer`` or ``modality``.
        served: thresholds ``calibrated`` to the fractions in training, or the authors' ``constants``.
    """

    skip: Annotated[float, Ge(0), Lt(1)] = 0.5
    router_loss: Annotated[float, Ge(0)] = 0.01
    mask: bool = True
    text_rows: Literal["keep", "half"] = "keep"
    positions: Literal["compact", "original"] = "compact"
    start: Literal["random", "keep"] = "random"
    routers: Routers = "shared"
    served: Literal["calibrated", "constants"] = "calibrated"


def convert(stack: Stack, layers: Sequence[int], routing: Routing, seed: int) -> Any:
    """Create a view of the model with converted layers and weights of its own, in training mode.

    Args:
        stack: the model.
        layers: layers to convert.
        routing: routing of tokens.
        seed: random seed of the router.
    """
    params: dict[str, Any] = {"layers": list(layers), "positions": routing.positions, "start": routing.start}
    params |= {"routers": routing.routers, "seed": seed}
    view = apply(stack, plan_of(stack, params))
    own(view)
    policy: MixtureOfDepths = view.lamella_policy
    policy.training_share, policy.masks, policy.text_rows = routing.skip, routing.mask, routing.text_rows
    return view


def plan_of(stack: Stack, params: dict[str, Any], work: Sequence[tuple[float, ...]] = ()) -> Plan:
    """Return the plan of a mixture of depths.

    Args:
        stack: the model.
        params: settings of the policy.
        work: fraction of tokens that each sublayer processes.
    """
    reference = PolicyReference(name="gamma-mod", params=params, work=list(work))
    return Plan(model=ModelReference.of(stack), policies={stack.stack: reference})


def train(view: Any, samples: Samples | ImageText, routing: Routing, config: TrainConfig, out: Path) -> TrainingLog:
    """Train a converted model and its router, in place.

    Args:
        view: a view made by :func:`convert`.
        samples: prompts with their answers; the task loss covers the answers.
        routing: routing of tokens, with the weight of the router loss.
        config: training configuration.
        out: folder for checkpoints, from which an interrupted run resumes.

    Raises:
        MethodError: for a batch without answers.
    """
    policy: MixtureOfDepths = view.lamella_policy

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not (batch["labels"][:, 1:] != NO_LOSS).any():
            raise MethodError("gamma-mod: the samples of a batch have no answers, so there is no loss: give answers")
        task = response_loss(model, batch)
        router = policy.router_loss
        return task + routing.router_loss * router, {"ce": task.detach(), "router": router.detach()}

    settings = {"plan": view.lamella_plan.digest, "routing": str(routing)}
    log = fit(view, samples, Task(loss, collate=batching(samples)), config, out=out, settings=settings)
    policy.router_loss = policy.router_loss.detach()
    return log


# Observation


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of all tokens of some rows, concatenated.

    Attributes:
        p: the router's probability of processing, in float64 [tokens, layers].
        ran: whether the token was processed [tokens, layers] bool.
        prompt: mask of prompt tokens, including images [tokens] bool.
        image: mask of image tokens [tokens] bool.
        row: row of each token [tokens].
        loss: mean cross-entropy of the answers, in nats.
    """

    p: Tensor
    ran: Tensor
    prompt: Tensor
    image: Tensor
    row: Tensor
    loss: float

    def kept(self) -> dict[str, list[float]]:
        """Return the fraction of tokens of each kind that each layer processed."""
        kinds = dict(zip(KINDS, (self.image, self.prompt & ~self.image, ~self.prompt), strict=True))
        return {name: self.ran[those].float().mean(0).tolist() for name, those in kinds.items() if those.any()}

    def work(self, layers: Sequence[int], stack: Stack) -> list[tuple[float, ...]]:
        """Return the fraction of tokens that each sublayer of the whole stack processed.

        Args:
            layers: the converted layers.
            stack: the model.
        """
        shares = dict(zip(layers, self.ran.double().mean(0).tolist(), strict=True))
        return [(shares.get(layer, 1.0),) * len(stack.architecture.names) for layer in range(len(stack))]


@torch.no_grad()
def observe(view: Any, samples: Samples | ImageText) -> RoutingTrace:
    """Record the routing of samples, in the current mode of the view.

    Args:
        view: the view.
        samples: the samples.
    """
    policy: MixtureOfDepths = view.lamella_policy
    layers, stack = list(policy.index_of), last_stack(view)
    token = policy_image(view)
    found: list[tuple[Tensor, ...]] = []
    loss = labels = row = 0.0
    for batch in track(list(labelled_batches(samples, BATCH, stack.device)), "gamma-mod: which tokens run"):
        trace = traced(view)
        states, targets = scored_states(view, batch)
        loss += float(torch.nn.functional.cross_entropy(stack.logits(states).float(), targets, reduction="sum"))
        labels += len(targets)
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
    return RoutingTrace(p, ran, prompt, image, number, loss / max(labels, 1))


def policy_image(view: Any) -> int:
    """Return the id of image tokens; -1 for a model without images."""
    named = last_stack(view).architecture.images
    return int(getattr(view.config, named)) if named else -1


def quantile(p: Tensor, keep: float) -> float:
    """Return the threshold above which this fraction of tokens lies; -1 if all of them are to be processed.

    Args:
        p: probabilities [tokens].
        keep: the fraction.

    >>> quantile(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)
    0.25
    """
    passing = len(p) - round(keep * len(p))
    return threshold(p.double(), passing) if passing else -1.0


def calibrate(seen: RoutingTrace) -> dict[str, list[float]]:
    """Return for each layer the thresholds that keep the observed fractions of prompts and of answers."""
    found: dict[str, list[float]] = {}
    for name, those in (("prefill", seen.prompt), ("decode", ~seen.prompt)):
        p, shares = seen.p[those], seen.ran[those].double().mean(0).tolist()
        found[name] = [quantile(p[:, index], share) for index, share in enumerate(shares)]
    return found
