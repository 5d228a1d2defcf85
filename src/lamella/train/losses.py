"""Losses: plain functions over chunks of positions.

The final hidden states of a model are small, but its logits [positions, vocabulary] are not. So losses first gather the
states of the positions with labels, and compute logits chunk by chunk, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamella.data.samples import NO_LOSS, Sample, collate, count_labels
from lamella.errors import TrainingError
from lamella.evaluate.scored import read_inputs, scored_states
from lamella.measure import masked, masked_by_count, predicting
from lamella.runtime import check_masked
from lamella.stack import Stack, cuttable, last_stack
from lamella.train.task import Batch

CHUNK = 256  # positions whose logits are in memory at once
PROJECTION = "lamella_projection"


def response_loss(model: Any, batch: Batch) -> Tensor:
    """Return the cross-entropy of the labels, in nats per token.

    A view runs as in generation: each row's first ``prompt_lengths`` columns are prompt, the others generated. In an
    encoder-decoder, the encoder reads ``input_ids`` and the decoder predicts ``labels``.

    Args:
        model: a model or a view.
        batch: what :func:`lamella.train.collate` returns.
    """
    states, labels = scored_states(model, batch)
    logits = last_stack(model).logits

    def chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits(states), labels)

    return mean_over_positions(chunk, states, labels)


NOISE = 1e-3  # epsilon: the minimum fraction of masks


def diffusion_loss(model: Any, batch: Batch, *, by_count: bool = False) -> Tensor:
    """Return the masked diffusion loss, in nats per token (LLaDA, arXiv 2502.09992, eq. 3).

        t ~ U(0, 1) for each row,  p = (1 - eps) t + eps,  each label becomes a mask with probability p
        1 / labels * sum over masks of -log p(token) / p

    Args:
        model: a model that predicts masked tokens, or a view of one.
        batch: what :func:`lamella.train.collate` returns, and further inputs of the model, such as images; tokens
            without a label are never masked.
        by_count: draw the number of masked labels in each row, uniformly from one to all, and divide by their fraction
            instead of p (eq. 14). The same in expectation without eps, and with much lower variance for short answers,
            where a single mask may otherwise weigh 1 / eps.

    Raises:
        ArchitectureError: for a model that does not predict masked tokens.
    """
    stack = check_masked(model)
    eligible = batch["labels"] != NO_LOSS
    if by_count:
        chosen, ratios = masked_by_count(eligible)
    else:
        ratios = (1 - NOISE) * torch.rand(len(eligible)) + NOISE
        chosen = masked(eligible, ratios)
    noisy = batch["input_ids"].masked_fill(chosen, stack.config.mask_token_id)
    hidden = stack.hidden({**read_inputs(model, batch), "input_ids": noisy})
    states, labels = predicting(stack, hidden, chosen), batch["input_ids"][chosen]
    weights = (1 / ratios).to(states.device).repeat_interleave(chosen.sum(dim=1))

    def chunk(states: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        each = torch.nn.functional.cross_entropy(stack.logits(states).float(), labels, reduction="none")
        return (each * weights).sum()

    return mean_over_positions(chunk, states, labels, weights) * (len(states) / eligible.sum())


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Sample], *, batch: int = 8) -> float:
    """Return the response loss over all labels of some samples, in nats per token; the model's mode is unchanged.

    Args:
        model: a model or a view.
        samples: such as :func:`lamella.train.blocks` makes.
        batch: samples per forward pass.
    """
    device = next(model.parameters()).device
    total = labels = 0.0
    for start in range(0, len(samples), batch):
        each = {name: values.to(device) for name, values in collate(samples[start : start + batch]).items()}
        count = count_labels(each)
        total += float(response_loss(model, each)) * count
        labels += count
    return total / labels


def distilled_loss(model: Any, batch: Batch, *, teacher: Any, weight: float = 0.05) -> tuple[Tensor, dict[str, Tensor]]:
    """Return cross-entropy plus ``weight`` times the squared error of the logits (LoRA-Drop's second objective).

    Args:
        model: the trained model or view.
        batch: what :func:`lamella.train.collate` returns.
        teacher: the unmodified model; it gets no gradient.
        weight: of the squared error; 0.05 in the release of arXiv 2601.02569.

    Returns:
        The loss, and its two parts ``ce`` and ``mse``.
    """
    ce, mse = cross_entropy_and_distance(model, batch, teacher, logit_mse)
    return ce + weight * mse, {"ce": ce, "mse": mse}


def cross_entropy_and_distance(
    model: Any, batch: Batch, teacher: Any, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the cross-entropy and the distance of the logits from a teacher's, each as a mean over the labels [2].

    Args:
        model: the trained model or view.
        batch: what :func:`lamella.train.collate` returns.
        teacher: with the same vocabulary; it gets no gradient.
        distance: from the model's and the teacher's logits [positions, vocabulary] to the sum over positions.
    """
    states, labels = scored_states(model, batch)
    with torch.no_grad():
        teacher_states, _ = scored_states(teacher, batch)
    logits, teacher_logits = last_stack(model).logits, last_stack(teacher).logits

    def chunk(states: Tensor, teacher_states: Tensor, labels: Tensor) -> Tensor:
        ours = logits(states)
        with torch.no_grad():
            theirs = teacher_logits(teacher_states)
        return torch.stack([cross_entropy(ours, labels), distance(ours, theirs)])

    return mean_over_positions(chunk, states, teacher_states, labels)


def distillation_loss(
    model: Any,
    batch: Batch,
    *,
    teacher: Any,
    pairs: Sequence[tuple[int, int]] = (),
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Return the divergence of a model's distribution from the teacher's, in nats per token (Minitron, section 3).

    With ``pairs``, the distance of intermediate states of the two models is added: of the embeddings' output and of the
    normed input of paired layers, averaged. It is scaled to the size of the divergence; the scale has no gradient. A
    model with a smaller hidden size needs a :func:`projection`.

    Args:
        model: the trained model.
        batch: what :func:`lamella.train.collate` returns; only the positions of the labels are used, not their values.
        teacher: the original; it gets no gradient.
        pairs: (layer of the model, layer of the teacher).
        temperature: of both distributions; the scale of the gradient does not depend on it.

    Returns:
        The loss; with ``pairs`` also its parts ``kl`` and ``states``, and the weight ``alpha``.
    """
    states, inside = _states(model, batch, [layer for layer, _ in pairs])
    with torch.no_grad():
        teacher_states, teacher_inside = _states(teacher, batch, [layer for _, layer in pairs])
    logits, teacher_logits = last_stack(model).logits, last_stack(teacher).logits

    def chunk(states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher_logits(teacher_states)
        return forward_kl(logits(states), theirs, temperature)

    head = last_stack(model).unembedding
    trains = head is not None and any(each.requires_grad for each in head.parameters())
    mean = mean_over_positions if trains or not states.requires_grad else mean_with_frozen_head
    kl = mean(chunk, states, teacher_states)
    if not pairs:
        return kl
    project = getattr(model, PROJECTION, nn.Identity())
    distances = [cosine_distance(project(ours), theirs) for ours, theirs in zip(inside, teacher_inside, strict=True)]
    distance = torch.stack(distances).mean()
    alpha = torch.where(distance > 0, kl / distance, 0).detach()
    return kl + alpha * distance, {"kl": kl, "states": distance, "alpha": alpha}


def dpo_loss(
    model: Any, good: Batch, bad: Batch, *, reference: Any, beta: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of direct preference optimisation (arXiv 2305.18290, eq. 7), mean over pairs of continuations.

        - log sigmoid( beta ( log p(good)/p_0(good) - log p(bad)/p_0(bad) ) )

    Args:
        model: the trained model.
        good: the preferred continuations, as returned by :func:`lamella.train.collate`.
        bad: the rejected continuations of the same prompts.
        reference: p_0; it gets no gradient.
        beta: strength of the penalty for divergence from the reference.

    Returns:
        The loss, and the fraction of pairs that are ranked correctly relative to the reference.
    """
    margin = continuation_log_probs(model, good) - continuation_log_probs(model, bad)
    with torch.no_grad():
        base = continuation_log_probs(reference, good) - continuation_log_probs(reference, bad)
    loss = -nn.functional.logsigmoid(beta * (margin - base)).mean()
    return loss, {"ranked": (margin.detach() > base).float().mean()}


def continuation_log_probs(model: Any, batch: Batch) -> Tensor:
    """Return the log probability of each row's labels after its prompt, in nats, float32 [batch].

    Args:
        model: the model.
        batch: ``input_ids`` and ``labels`` [batch, time], and ``prompt_lengths`` [batch], the tokens of each prompt.
    """
    positions = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
    in_prompt = positions < batch["prompt_lengths"][:, None]
    return label_log_probs(model, {**batch, "labels": batch["labels"].masked_fill(in_prompt, NO_LOSS)})


def label_log_probs(model: Any, batch: Batch) -> Tensor:
    """Return the log probability of each row's labels, in nats, float32 [batch].

    Args:
        model: a model or a view. A view runs as in generation: each row's first ``prompt_lengths`` columns are prompt.
        batch: ``input_ids`` and ``labels`` [batch, time], and ``prompt_lengths`` [batch], the tokens of each prompt.
    """
    states, targets = scored_states(model, batch)
    logits = last_stack(model).logits

    def chunk(states: Tensor, targets: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits(states).float(), targets, reduction="none")

    pieces = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    values = torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])
    rows = (batch["labels"][:, 1:] != NO_LOSS).nonzero()[:, 0]
    return values.new_zeros(len(batch["labels"])).index_add(0, rows, values)


def projection(model: Any, teacher: Any, seed: int = 0) -> None:
    """Add a linear projection to the hidden size of the teacher, for :func:`distillation_loss`; it is trained too.

    Nothing is added if the hidden sizes are equal. Delete the model's attribute ``PROJECTION`` after training.

    Args:
        model: the trained model, changed in place.
        teacher: the teacher.
        seed: random seed of the initial weights.
    """
    ours, theirs = model.config.hidden_size, teacher.config.hidden_size
    if ours != theirs:
        example = next(model.parameters())
        linear = nn.Linear(ours, theirs, bias=False, device=example.device, dtype=example.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * ours**-0.5)
        setattr(model, PROJECTION, linear)


def forward_kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the sum over positions of KL(teacher || model), in float32 and in nats.

    Multiplied by the square of the temperature, so that the gradient's scale does not depend on it.

    Args:
        logits: logits of the model [positions, vocabulary].
        teacher: logits of the teacher [positions, vocabulary].
        temperature: divisor of both logits.
    """
    if temperature != 1:  # each pass over logits is slow, even a division by 1
        logits, teacher = logits.float() / temperature, teacher.float() / temperature
    ours = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    theirs = torch.log_softmax(teacher, dim=-1, dtype=torch.float32)
    return torch.dot(theirs.exp().flatten(), (theirs - ours).flatten()) * temperature**2


def cosine_distance(states: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over positions of 1 - cosine similarity, in float32.

    Args:
        states: hidden states of the model [positions, hidden].
        teacher: hidden states of the teacher [positions, hidden].
    """
    return 1 - nn.functional.cosine_similarity(states.float(), teacher.float(), dim=-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over positions of -log p(label), in float32 and in nats.

    Args:
        logits: logits [positions, vocabulary].
        labels: token ids [positions].
    """
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def logit_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of the logits, the mean over the vocabulary and the sum over positions.

    Args:
        logits: logits of the model [positions, vocabulary].
        teacher: logits of the teacher [positions, vocabulary].
    """
    return (logits.float() - teacher.float()).square().mean(dim=-1).sum()


def _states(model: Any, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the final and intermediate states of a model at positions with labels [positions, hidden].

    If any layers are given, the intermediate states are the embedding's output and the normed input of each of them.
    """
    if not layers:
        return scored_states(model, batch)[0], []
    stack = Stack(model)
    if not stack.architecture.cuttable:
        raise TrainingError(
            f"intermediate states of {stack.architecture.name} models are unknown: omit pairs; known are "
            f"{', '.join(cuttable())}"
        )
    labelled = batch["labels"][:, 1:] != NO_LOSS
    inside: dict[int, Tensor] = {}

    def record(layer: int, h: Tensor) -> None:
        inside[layer] = h[:, :-1][labelled]

    def record_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(-1, args[0] if args else kwargs["hidden_states"])

    hooks = [stack.layers[0].register_forward_pre_hook(record_input, with_kwargs=True)]
    for layer in layers:
        norm = stack.layers[layer].get_submodule(stack.architecture.wiring.norms[0])
        hooks.append(norm.register_forward_hook(lambda module, args, out, layer=layer: record(layer, out)))
    try:
        states, _ = scored_states(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return states, [inside[layer] for layer in (-1, *layers)]


def mean_with_frozen_head(chunk: Callable[..., Tensor], states: Tensor, *rows: Tensor) -> Tensor:
    """Return the mean where only ``states`` need a gradient, computed in the forward pass: one pass over logits.

    Args:
        chunk: from a chunk of ``states`` and of each of ``rows`` to a sum over its positions.
        states: the tensor that needs a gradient [positions, hidden].
        rows: further tensors with one entry for each position [positions, ...].
    """
    mean: Tensor = _Summed.apply(chunk, states, *rows) / len(states)
    return mean


class _Summed(torch.autograd.Function):
    """The sum of the chunks' sums; the gradient of the states is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, chunk: Callable[..., Tensor], states: Tensor, *rows: Tensor) -> Tensor:
        total, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            piece = states[part].detach().requires_grad_()
            with torch.enable_grad():
                value = chunk(piece, *(each[part] for each in rows))
            gradient[part] = torch.autograd.grad(value, piece)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        ctx.rows = len(rows)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return None, upstream * gradient, *[None] * ctx.rows


def mean_over_positions(chunk: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return the mean of ``chunk``'s sums over positions. Its logits are recomputed in the backward pass, never stored.

    Args:
        chunk: from a chunk of each of ``rows`` to a sum over its positions.
        rows: tensors with one entry for each position [positions, ...].
    """
    pieces = zip(*(each.split(CHUNK) for each in rows), strict=True)
    sums = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum(dim=0) / len(rows[0])
