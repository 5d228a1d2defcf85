"""Losses: plain functions over chunks of positions.

A model's final states are small, its logits are not: [positions, vocabulary]. So losses first gather the states of the
positions that carry loss, and make logits a chunk at a time, forward and backward.
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

CHUNK = 256  # positions whose logits are held at once
PROJECTION = "lamella_projection"


def response_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the labels, in nats per token.

    A view runs as it is served: each row's first ``prompt_lengths`` columns are prompt, the others generated. Of an
    encoder-decoder, the encoder reads ``input_ids`` and the decoder writes ``labels``.

    Args:
        model: a model or a view.
        batch: what :func:`lamella.train.collate` returns.
    """
    states, labels = scored_states(model, batch)
    logits = last_stack(model).logits

    def chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits(states), labels)

    return mean_over_positions(chunk, states, labels)


NOISE = 1e-3  # epsilon: the least share of masks


def diffusion_loss(model: Any, batch: Batch, *, by_count: bool = False) -> Tensor:
    """The masked-diffusion loss, in nats per token (LLaDA, arXiv 2502.09992, eq. 3).

        t ~ U(0, 1) for each row,  p = (1 - eps) t + eps,  each label becomes a mask with probability p
        1 / labels * sum over masks of -log p(token) / p

    Args:
        model: a model that predicts masked tokens, or a view of one.
        batch: what :func:`lamella.train.collate` returns, and what the model takes beside it, such as images; tokens
            without a label are never masked.
        by_count: draw how many of a row's labels become masks, evenly from one to all, and divide by their share
            instead of p (eq. 14). The same on average without eps, and far less noisy for short answers, of which a
            single mask may else weigh 1 / eps.

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
    """The response loss over all labels of some samples, in nats per token; the model's mode stays as it is.

    Args:
        model: a model or a view.
        samples: such as :func:`lamella.train.blocks` makes.
        batch: samples in one forward pass.
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
    """Cross-entropy plus ``weight`` times the squared error of the logits (LoRA-Drop's second objective).

    Args:
        model: the model or view that trains.
        batch: what :func:`lamella.train.collate` returns.
        teacher: the unmodified model; it gets no gradient.
        weight: of the squared error; 0.05 in the release of arXiv 2601.02569.

    Returns:
        The loss, and its two parts ``ce`` and ``mse``.
    """
    ce, mse = cross_entropy_and_distance(model, batch, teacher, logit_mse)
    return ce + weight * mse, {"ce": ce, "mse": mse}


def cross_entropy_and_distance(
    model: Any, batch: Batch, teacher: Any, apart: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Cross-entropy, and how far the logits are from a teacher's, each as a mean over the labels [2].

    Args:
        model: the model or view that trains.
        batch: what :func:`lamella.train.collate` returns.
        teacher: of the same vocabulary; it gets no gradient.
        apart: the sum over positions, of the model's logits and the teacher's [positions, vocabulary].
    """
    states, labels = scored_states(model, batch)
    with torch.no_grad():
        teacher_states, _ = scored_states(teacher, batch)
    logits, teacher_logits = last_stack(model).logits, last_stack(teacher).logits

    def chunk(states: Tensor, teacher_states: Tensor, labels: Tensor) -> Tensor:
        ours = logits(states)
        with torch.no_grad():
            theirs = teacher_logits(teacher_states)
        return torch.stack([cross_entropy(ours, labels), apart(ours, theirs)])

    return mean_over_positions(chunk, states, teacher_states, labels)


def distillation_loss(
    model: Any,
    batch: Batch,
    *,
    teacher: Any,
    pairs: Sequence[tuple[int, int]] = (),
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The divergence of a model's distribution from the teacher's, in nats per token (Minitron, section 3).

    With ``pairs``, the distance of states inside the two models is added: of the embeddings' output and of the normed
    input of paired layers, the mean of all. It weighs as much as the divergence, whatever their scales; the weight has
    no gradient. A model whose stream is narrower needs a :func:`projection`.

    Args:
        model: the model that trains.
        batch: what :func:`lamella.train.collate` returns; positions with labels count, the labels themselves do not.
        teacher: the original; it gets no gradient.
        pairs: (layer of the model, layer of the teacher).
        temperature: of both distributions; the gradient keeps its scale.

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
    """Direct preference optimisation (arXiv 2305.18290, eq. 7), mean over pairs of continuations.

        - log sigmoid( beta ( log p(good)/p_0(good) - log p(bad)/p_0(bad) ) )

    Args:
        model: the model that trains.
        good, bad: what :func:`lamella.train.collate` returns; rows of both with the same prompts.
        reference: p_0; it gets no gradient.
        beta: how dear a distance from the reference is.

    Returns:
        The loss, and the share of pairs that are ranked right against the reference.
    """
    margin = continuation_log_probs(model, good) - continuation_log_probs(model, bad)
    with torch.no_grad():
        base = continuation_log_probs(reference, good) - continuation_log_probs(reference, bad)
    loss = -nn.functional.logsigmoid(beta * (margin - base)).mean()
    return loss, {"ranked": (margin.detach() > base).float().mean()}


def continuation_log_probs(model: Any, batch: Batch) -> Tensor:
    """The log probability of each row's labels after its prompt, in nats, float32 [batch]."""
    positions = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
    in_prompt = positions < batch["prompt_lengths"][:, None]
    labels = batch["labels"].masked_fill(in_prompt, NO_LOSS)
    states, wanted = scored_states(model, {**batch, "labels": labels})
    logits = last_stack(model).logits

    def chunk(states: Tensor, wanted: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits(states).float(), wanted, reduction="none")

    pieces = zip(states.split(CHUNK), wanted.split(CHUNK), strict=True)
    values = torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])
    rows = (labels[:, 1:] != NO_LOSS).nonzero()[:, 0]
    return values.new_zeros(len(labels)).index_add(0, rows, values)


def projection(model: Any, teacher: Any, seed: int = 0) -> None:
    """Give a model one linear map from its stream to its teacher's, for :func:`distillation_loss`; it trains along.

    Nothing where the streams are equally wide. Delete the model's attribute ``PROJECTION`` after training.
    """
    ours, theirs = model.config.hidden_size, teacher.config.hidden_size
    if ours != theirs:
        some = next(model.parameters())
        linear = nn.Linear(ours, theirs, bias=False, device=some.device, dtype=some.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * ours**-0.5)
        setattr(model, PROJECTION, linear)


def forward_kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The sum over positions of KL(teacher || model), in float32 and in nats: both [positions, vocabulary].

    Multiplied by the square of the temperature, so that the gradient's scale does not depend on it.
    """
    if temperature != 1:  # each pass over logits takes long, also one that divides them by one
        logits, teacher = logits.float() / temperature, teacher.float() / temperature
    ours = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    theirs = torch.log_softmax(teacher, dim=-1, dtype=torch.float32)
    return torch.dot(theirs.exp().flatten(), (theirs - ours).flatten()) * temperature**2


def cosine_distance(states: Tensor, teacher: Tensor) -> Tensor:
    """The mean over positions of 1 - cosine, in float32: both [positions, hidden]."""
    return 1 - nn.functional.cosine_similarity(states.float(), teacher.float(), dim=-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over positions of -log p(label), in float32: logits [positions, vocabulary], labels [positions]."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def logit_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """The sum over positions of the squared error, mean over the vocabulary: both [positions, vocabulary]."""
    return (logits.float() - teacher.float()).square().mean(dim=-1).sum()


def _states(model: Any, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The final states at positions with labels, and what is inside the model there [positions, hidden].

    Inside are, where any layers are named, the embedding's output and the normed input of each of them.
    """
    if not layers:
        return scored_states(model, batch)[0], []
    stack = Stack(model)
    if not stack.architecture.cuttable:
        raise TrainingError(
            f"states inside {stack.architecture.name} models are not known: leave pairs out; known are "
            f"{', '.join(cuttable())}"
        )
    carries = batch["labels"][:, 1:] != NO_LOSS
    seen: dict[int, Tensor] = {}

    def note(place: int, h: Tensor) -> None:
        seen[place] = h[:, :-1][carries]

    def note_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(-1, args[0] if args else kwargs["hidden_states"])

    hooks = [stack.layers[0].register_forward_pre_hook(note_input, with_kwargs=True)]
    for layer in layers:
        norm = stack.layers[layer].get_submodule(stack.architecture.wiring.norms[0])
        hooks.append(norm.register_forward_hook(lambda module, args, out, layer=layer: note(layer, out)))
    try:
        states, _ = scored_states(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return states, [seen[place] for place in (-1, *layers)]


def mean_with_frozen_head(chunk: Callable[..., Tensor], states: Tensor, *rows: Tensor) -> Tensor:
    """The same where only ``states`` need a gradient, which is taken at once: each chunk's logits are made only once.

    Args:
        chunk: from a stretch of ``states`` and of each of ``rows`` to one sum over its positions.
        states: what the gradient is for [positions, hidden].
        rows: further tensors with one entry for each position [positions, ...].
    """
    mean: Tensor = _Summed.apply(chunk, states, *rows) / len(states)
    return mean


class _Summed(torch.autograd.Function):
    """The sum of chunks' sums; the gradient of the first of the rows is known when the forward pass ends."""

    @staticmethod
    def forward(ctx: Any, chunk: Callable[..., Tensor], states: Tensor, *rows: Tensor) -> Tensor:
        total, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
        for start in range(0, len(states), CHUNK):
            stretch = slice(start, start + CHUNK)
            piece = states[stretch].detach().requires_grad_()
            with torch.enable_grad():
                value = chunk(piece, *(each[stretch] for each in rows))
            gradient[stretch] = torch.autograd.grad(value, piece)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        ctx.rows = len(rows)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return None, upstream * gradient, *[None] * ctx.rows


def mean_over_positions(chunk: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The mean of ``chunk``'s sums over positions. Its logits are made again in the backward pass, never kept.

    Args:
        chunk: from a stretch of each of ``rows`` to a sum over its positions.
        rows: tensors with one entry for each position [positions, ...].
    """
    pieces = zip(*(each.split(CHUNK) for each in rows), strict=True)
    sums = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum(dim=0) / len(rows[0])
