"""Training of MuE: every decoder layer learns to predict, and the encoder processes its modalities separately.

    L = sum_{j=1..N_d} CE(Head(LN(y_j)), target)      teacher forcing; one head, one norm, all parameters are trained

Both stacks run all their layers during training, and all decoder layers attend to the encoder's final states. With
``encoder_exits``, Lamella's own, some batches attend to states of an earlier layer, chosen at random for each modality.
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
from lamella.methods.mue.policy import MODALITIES, OFF, ModalityExits, Propagate, Reduce, TokenExits
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import with_policies
from lamella.stack import Model, Stack, last_stack
from lamella.train import Task, TrainConfig, TrainingLog, fit, own
from lamella.train.losses import mean_over_positions

SLUG = "mue"
TRAINING = TrainConfig(lr=3e-5, batch=8, accumulate=8, weight_decay=0.01, schedule="linear", warmup=0.06)
LayerWork = Mapping[str, Sequence[tuple[float, ...]]]


@dataclass(frozen=True)
class ExitSettings:
    """Settings of the training loss and of the exits.

    Attributes:
        loss: sum over all decoder layers (``layerwise``), or the ``final`` layer only, as a control.
        reduction: reduction of the layers' losses: ``sum``, or ``mean``, which only rescales.
        smoothing: label smoothing; the authors use 0.1 for captions and none for entailment.
        encoder_exits: q, the fraction of batches whose decoder attends to an encoder exit in the upper half of the
            depth.
        reduce: saturation S of a modality: ``flat``, ``mean`` or ``min`` over its tokens.
        min_layer: number of layers of each stack that always run; 1 in the paper, 2 is safer for pre-norm models.
        propagate: keys and values of an exited token: from its ``state``, or ``none``.
        decay: (beta, tau') of the decoder's threshold for long texts, 0.95 and 1 in the paper; constant if None.
        answer: maximum number of tokens of an answer, N of the decay; 16 for captions.
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
        """Return the settings of both policies by stack, given thresholds of ``image``, ``text`` and ``decoder``."""
        both = {"min_layer": self.min_layer}
        decoder: dict[str, Any] = {"threshold": tau.get("decoder", OFF), "propagate": self.propagate, **both}
        if self.decay is not None:
            decoder |= {"decay": list(self.decay), "steps": self.answer}
        return {"encoder": {name: tau.get(name, OFF) for name in MODALITIES} | {"reduce": self.reduce} | both,
                "decoder": decoder}  # fmt: skip


def pair_of(model: Model) -> tuple[Stack, Stack]:
    """Return the encoder and the decoder of a model with image inputs.

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
            f"{SLUG} works on models with image inputs; {model.name} takes {encoder.architecture.modality} only"
        )
    return encoder, decoder


def exit_plan(model: Model, params: Mapping[str, dict[str, Any]], work: LayerWork | None = None) -> Plan:
    """Return the plan of exits.

    Args:
        model: the model.
        params: settings of the policies, by stack.
        work: fraction of tokens that runs each sublayer of each layer, by stack.
    """
    policies = {
        stack: PolicyReference(name=SLUG, params=each, work=list((work or {}).get(stack, ())))
        for stack, each in params.items()
    }
    return Plan(model=ModelReference.of(model), policies=policies)


def exit_view(model: Model, settings: ExitSettings, tau: Mapping[str, float]) -> Any:
    """Return a view of a model with exits at these thresholds.

    Args:
        model: an encoder-decoder model.
        settings: settings of the exits.
        tau: threshold on the cosine by exit (``image``, ``text``, ``decoder``); an exit that is not named is off.
    """
    encoder, decoder = pair_of(model)
    params = settings.params(tau)
    policies = {
        "encoder": ModalityExits(encoder, **params["encoder"]),
        "decoder": TokenExits(decoder, **params["decoder"]),
    }
    return with_policies(model, exit_plan(model, params), policies)


def train(
    model: Model, samples: ImageText, settings: ExitSettings, config: TrainConfig, out: Path
) -> tuple[Any, TrainingLog]:
    """Fine-tune the whole model, with its modalities processed separately from the start.

    Args:
        model: the model; it is not changed.
        samples: prompts with their answers, which carry the loss.
        settings: settings of the loss, and of random exits during training.
        config: training settings.
        out: a folder for checkpoints, from which an interrupted run resumes.

    Returns:
        The trained view, with all exits off, and the log.
    """
    view = exit_view(model, settings, {})
    return view, train_view(view, samples, settings, config, out)


def train_view(view: Any, samples: ImageText, settings: ExitSettings, config: TrainConfig, out: Path) -> TrainingLog:
    """Fine-tune a view in place, with its exits off; it gets its own copies of the tensors.

    Args:
        view: a view with exits, see :func:`exit_view`.
        samples: prompts with their answers, which carry the loss.
        settings: settings of the loss, and of random exits during training.
        config: training settings.
        out: a folder for checkpoints, from which an interrupted run resumes.
    """
    own(view)
    encoder: ModalityExits = view.lamella_policy_encoder

    def loss(view: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        encoder.fixed_exits = random_exits(settings.encoder_exits, encoder.layers) if view.training else None
        try:
            return layerwise_loss(view, batch, settings)
        finally:
            encoder.fixed_exits = None

    described = {"plan": view.lamella_plan.digest, "encoder": type(encoder).__name__, "exiting": str(settings)}
    log = fit(view, samples, Task(loss, collate=samples.batch), config, out=out, settings=described)
    view.eval()
    return log


def random_exits(share: float, layers: int) -> dict[str, int] | None:
    """Draw a random exit in the upper half of the depth per modality, for a fraction of batches; otherwise None.

    Args:
        share: fraction of batches with random exits, 0 to 1.
        layers: number of layers of the encoder.
    """
    if float(torch.rand(())) >= share:
        return None
    return {name: int(torch.randint((layers + 1) // 2, layers + 1, ())) for name in MODALITIES}


def layerwise_loss(view: Any, batch: dict[str, Tensor], settings: ExitSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the labels summed over the decoder layers, in nats per token, and that of the last layer.

    Logits are computed for a chunk of positions at a time, and never kept.

    Args:
        view: a view of :func:`exit_view`, with exits off.
        batch: a batch of :class:`lamella.data.ImageText`.
        settings: settings of the loss.
    """
    policy: TokenExits = view.lamella_policy
    policy.recorded_hidden = []
    _, labels = scored_states(view, batch)
    hidden, policy.recorded_hidden = policy.recorded_hidden, None
    carries, stack = batch["labels"] != NO_LOSS, last_stack(view)

    def chunk(y: Tensor, labels: Tensor) -> Tensor:
        logits = stack.logits(stack.normed(y)).float()
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=settings.smoothing)

    scored = hidden if settings.loss == "layerwise" else hidden[-1:]
    each = torch.stack([mean_over_positions(chunk, y[carries], labels) for y in scored])
    return each.sum() if settings.reduction == "sum" else each.mean(), {"last layer": each[-1].detach()}
