"""What makes every layer of the decoder readable, and the encoder one whose modalities run apart.

    L = sum_{j=1..N_d} CE(Head(LN(y_j)), target)      teacher forcing; one head, one norm, all of it trains

Both stacks run whole while they train, and all layers of the decoder read the encoder's final states. With
``encoder_exits``, ours, some batches read states of an earlier layer, drawn for each modality by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.data import ImageText
from lamella.data.samples import NO_LOSS
from lamella.errors import MethodError
from lamella.evaluate.scored import scored_states
from lamella.methods.mue.policy import MODALITIES, OFF, Propagate, Reduce, StreamExits, TokenExits
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import with_policies
from lamella.stack import Model, Stack, last_stack
from lamella.train import Task, TrainConfig, TrainingLog, fit, own
from lamella.train.losses import mean_over_positions

SLUG = "mue"
TRAINING = TrainConfig(lr=3e-5, batch=8, accumulate=8, weight_decay=0.01, schedule="linear", warmup=0.06)
Work = Mapping[str, Sequence[tuple[float, ...]]]


@dataclass(frozen=True)
class Exiting:
    """How a model is trained to be left early, and how it is then left.

    Attributes:
        loss: of all layers of the decoder (``layerwise``), or of the ``final`` one, for comparison.
        reduction: layers' losses are added (``sum``), or their ``mean`` is taken, which only rescales.
        smoothing: of labels; the authors take 0.1 for captions and none for entailment.
        encoder_exits: q: the share of batches that read the encoder at an exit from half of its depth on.
        reduce: what S of a stream is, ``flat``, ``mean`` or ``min``.
        min_layer: layers of each stack that always run; 1 in the paper, and 2 is safe where norms come first.
        propagate: what later tokens see of one that has left: its ``state``, or ``none``.
        decay: (beta, tau') of the decoder's threshold for texts, in the paper 0.95 and 1; it stays when left out.
        answer: the most tokens of an answer, N of the decay; 16 for captions.
    """

    loss: Literal["layerwise", "final"] = "layerwise"
    reduction: Literal["sum", "mean"] = "sum"
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    encoder_exits: Annotated[float, Ge(0), Le(1)] = 0.0
    reduce: Reduce = "flat"
    min_layer: Annotated[int, Ge(1)] = 1
    propagate: Propagate = "state"
    decay: tuple[Annotated[float, Ge(0), Le(1)], Annotated[float, Ge(0)]] | None = None
    answer: Annotated[int, Ge(1)] = 16

    def params(self, tau: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """The settings of both policies, by stack, with these thresholds of ``image``, ``text`` and ``decoder``."""
        both = {"min_layer": self.min_layer}
        decoder: dict[str, Any] = {"threshold": tau.get("decoder", OFF), "propagate": self.propagate, **both}
        if self.decay is not None:
            decoder |= {"decay": list(self.decay), "steps": self.answer}
        return {"encoder": {name: tau.get(name, OFF) for name in MODALITIES} | {"reduce": self.reduce} | both,
                "decoder": decoder}  # fmt: skip


def pair_of(model: Model) -> tuple[Stack, Stack]:
    """The encoder and the decoder of a model that reads images.

    Raises:
        MethodError: for any other model.
    """
    stacks = model.stacks
    if not {"encoder", "decoder"} <= set(stacks):
        kinds = " and ".join(each.name for each in model.architectures.values())
        raise MethodError(f"{SLUG} works on encoder-decoders; {model.name} is a {kinds}")
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    if not encoder.architecture.images:
        raise MethodError(
            f"{SLUG} works on models that read images; {model.name} reads {encoder.architecture.modality} alone"
        )
    return encoder, decoder


def planned(model: Model, params: Mapping[str, dict[str, Any]], work: Work | None = None) -> Plan:
    """The plan of exits with these settings, by stack."""
    policies = {
        stack: PolicyReference(name=SLUG, params=each, work=list((work or {}).get(stack, ())))
        for stack, each in params.items()
    }
    return Plan(model=ModelReference.of(model), policies=policies)


def exiting(model: Model, settings: Exiting, tau: Mapping[str, float]) -> Any:
    """A view of a model with exits at these thresholds."""
    encoder, decoder = pair_of(model)
    params = settings.params(tau)
    policies = {
        "encoder": StreamExits(encoder, **params["encoder"]),
        "decoder": TokenExits(decoder, **params["decoder"]),
    }
    return with_policies(model, planned(model, params), policies)


def train(
    model: Model, samples: ImageText, settings: Exiting, config: TrainConfig, out: Path
) -> tuple[Any, TrainingLog]:
    """Fine-tune the whole model, its modalities apart from the start.

    Args:
        model: it is not changed.
        samples: prompts with their answers, which carry the loss.
        settings: of the loss, and of exits drawn while training.
        config: of the training.
        out: a folder for checkpoints; an interrupted run goes on from there.

    Returns:
        The trained view, all of whose exits are off, and the log.
    """
    view = exiting(model, settings, {})
    return view, train_view(view, samples, settings, config, out)


def train_view(view: Any, samples: ImageText, settings: Exiting, config: TrainConfig, out: Path) -> TrainingLog:
    """The same for a view whose exits are off, in place; its tensors become its own."""
    own(view)
    encoder: StreamExits = view.lamella_policy_encoder

    def loss(view: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        encoder.leaves = drawn(settings.encoder_exits, encoder.layers) if view.training else None
        try:
            return layerwise_loss(view, batch, settings)
        finally:
            encoder.leaves = None

    said = {"plan": view.lamella_plan.digest, "encoder": type(encoder).__name__, "exiting": str(settings)}
    log = fit(view, samples, Task(loss, collate=samples.batch), config, out=out, settings=said)
    view.eval()
    return log


def drawn(share: float, layers: int) -> dict[str, int] | None:
    """An exit for each modality from half of the depth on, for this share of batches; None for the others."""
    if float(torch.rand(())) >= share:
        return None
    return {name: int(torch.randint((layers + 1) // 2, layers + 1, ())) for name in MODALITIES}


def layerwise_loss(view: Any, batch: dict[str, Tensor], settings: Exiting) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of labels at every layer of the decoder, in nats per token, and that of the last layer.

    Logits are made a chunk of positions at a time, and never kept.

    Args:
        view: of :func:`exiting`, with exits off.
        batch: what :class:`lamella.data.ImageText` makes.
        settings: of the loss.
    """
    policy: TokenExits = view.lamella_policy
    policy.heard = []
    _, labels = scored_states(view, batch)
    streams, policy.heard = policy.heard, None
    carries, stack = batch["labels"] != NO_LOSS, last_stack(view)

    def chunk(y: Tensor, labels: Tensor) -> Tensor:
        logits = stack.logits(stack.normed(y)).float()
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=settings.smoothing)

    read = streams if settings.loss == "layerwise" else streams[-1:]
    each = torch.stack([mean_over_positions(chunk, y[carries], labels) for y in read])
    return each.sum() if settings.reduction == "sum" else each.mean(), {"last layer": each[-1].detach()}
