"""The policy that drops image tokens: between the attention and the MLP of a layer, in one step, permanently.

The selection is fixed and stored in the request (``run.denoising.state``), never on the model. Without a cache, later
passes run the remaining tokens only; with a prefix cache, each layer's entries of the other tokens are deleted once. A
forward pass that belongs to no request counts as a first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lamella.errors import PlanError
from lamella.measure.image_tokens import ATTENDING, CRITERIA, TokenFeatures, choose
from lamella.methods.dmllm_token_redundancy.schedule import Drop, VisualTokenSchedule, count
from lamella.runtime import Denoising, LayerCall, Pass, Policy, PositionInputs
from lamella.runtime.denoising import COMMITS
from lamella.stack import Stack, join

STATE = "dmllm-token-redundancy"


@dataclass
class PrunedRequest:
    """State of one request.

    Attributes:
        image: mask of image tokens [rows, columns] bool.
        kept: mask of the image tokens that are still kept.
        before: the same at the beginning of the step.
        step: index of that step.
        done: number of drops that have happened.
        absent: by layer of a prefix cache, the image tokens that were already dropped when the prompt was encoded.
        order: the kept columns of each row, best first, since the last drop.
        merged: for tokens merged before the first layer: row, columns and hidden states.
        hidden: with a prefix cache, the hidden states of the prompt where tokens will be selected later.
        selections: the columns of each row kept by each drop, with its step.
    """

    image: Tensor
    kept: Tensor
    before: Tensor
    step: int = 0
    done: int = 0
    absent: dict[int, Tensor] = field(default_factory=dict)
    order: list[Tensor] = field(default_factory=list)
    merged: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    hidden: Tensor | None = None
    selections: list[tuple[int, list[Tensor]]] = field(default_factory=list)


class VisualTokens(Policy):
    """A schedule with a selection criterion.

    Args:
        stack: the language model of a masked-diffusion vision-language model.
        drops: see :class:`VisualTokenSchedule`.
        layer: see :class:`VisualTokenSchedule`.
        withdrawn: see :class:`VisualTokenSchedule`.
        criterion: a key of :data:`lamella.measure.image_tokens.CRITERIA`.
        positions: position ids after dropped tokens: ``compact``, as in the authors' code, or ``original``. Keys that a
            prefix cache already contains keep their positions.
        order: order of the kept tokens: by ``position``, or by ``score`` as in the authors' code; it affects position
            ids only.
        seed: random seed of the random criterion.

    Raises:
        MethodError: for a schedule that does not fit the model.
        PlanError: for a model that takes no images, or an unknown criterion.
    """

    denoises = True

    def __init__(
        self,
        stack: Stack,
        drops: list[tuple[float, float]],
        layer: int = -1,
        withdrawn: int | None = None,
        criterion: str = "fastv",
        positions: Literal["compact", "original"] = "compact",
        order: Literal["position", "score"] = "position",
        seed: int = 0,
    ) -> None:
        super().__init__(stack)
        if not stack.architecture.images:
            raise PlanError(f"{stack.name} takes no images, but this plan drops image tokens: give a model that does")
        if criterion not in CRITERIA:
            raise PlanError(f"unknown criterion '{criterion}' for image tokens: choose one of {', '.join(CRITERIA)}")
        if criterion in ATTENDING and layer < 0 and any(keep for _, keep in drops):
            raise PlanError(f"{criterion} needs the attention of a layer: give a layer from 0 on")
        self.schedule = VisualTokenSchedule(tuple(Drop(*each) for each in drops), layer, withdrawn)
        self.schedule.check_fits(len(stack))
        self.criterion, self.positions, self.order, self.seed = criterion, positions, order, seed
        self._stack, self._position_inputs = stack, PositionInputs(stack)

    # A pass

    def begin(self, run: Pass) -> None:
        """Get the state of the request, and note the beginning of a step."""
        request = self._request(run)
        if request is not None:
            step = 0 if run.denoising is None else run.denoising.step
            if step != request.step:
                request.step, request.before = step, request.kept
            run.memory[STATE] = request

    def _request(self, run: Pass) -> PrunedRequest | None:
        """Return the state of the request; None if it has no image."""
        kept = {} if run.denoising is None else run.denoising.state
        if STATE not in kept:
            image = run.images
            if image is None or not image.any():
                return None
            if run.real is not None:
                image = image & run.real
            if run.denoising is not None:  # add the columns of the answer
                more = run.denoising.tokens.shape[1] - image.shape[1]
                image = torch.cat([image, image.new_zeros(len(image), more)], dim=1)
            kept[STATE] = PrunedRequest(image, image, image)
        found: PrunedRequest = kept[STATE]
        return found

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer on the tokens that are kept, and drop tokens if it is due.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        request: PrunedRequest | None = run.memory.get(STATE)
        if request is None:
            return call(h)
        target = self.schedule.layer
        if call.index == 0:
            h = self._with_merged(h, run, request)
            if target == -1:
                h = self._drop(call, h, run, request, None)
        some = self._kept_call(call, run, request, self._dropped(request, call.index))
        if not (call.index == target and request.done < len(self.schedule.drops)) and (
            call.index != self.schedule.withdrawn
        ):
            return some.scatter(h, some(some.gather(h)))
        x, weights = some.gather(h), None
        if call.index == target and self._due(request, run) and self.criterion in ATTENDING:
            mid, *weights = some.attn_with_weights(x)
        else:
            mid = some.attn(x)
        h = some.scatter(h, join(mid))
        if call.index == target:
            h = self._drop(some, h, run, request, weights)
        rest = self._kept_call(call, run, request, self._dropped(request, call.index + 1), cached=False)
        return rest.scatter(h, rest.mlp(rest.gather(h)))

    def _dropped(self, request: PrunedRequest, layer: int) -> Tensor:
        """Return the image tokens that are dropped at the input of a layer [rows, columns] bool."""
        if self.schedule.withdrawn is not None and layer > self.schedule.withdrawn:
            return request.image
        return request.image & ~(request.kept if layer > self.schedule.layer else request.before)

    def _kept_call(
        self, call: LayerCall, run: Pass, request: PrunedRequest, gone: Tensor, cached: bool = True
    ) -> LayerCall:
        """Return the call of a layer with the kept tokens at their positions."""
        start, end = run.phase.start, run.phase.end
        cache = None if run.denoising is None else run.denoising.cache
        encoding = start == 0
        if cache is not None and cached:
            if encoding:
                request.absent[call.index] = gone
            elif gone.any():
                cache.delete(call.index, gone)
        passing = gone[:, start:end]
        some = call
        if passing.any():
            real = torch.ones_like(passing) if run.real is None else run.real
            some = call.tokens(real & ~passing)
        if self.positions == "original" or not cached:
            return some
        missing = gone if encoding else request.absent[call.index]
        if not missing.any():
            return some
        return some.moved(self._position_inputs, self._at(run, request, missing)[:, start:end])

    def _at(self, run: Pass, request: PrunedRequest, missing: Tensor) -> Tensor:
        """Return the position id of every column, with gaps of dropped tokens closed [rows, columns]."""
        if run.denoising is None:
            at = torch.arange(missing.shape[1], device=missing.device).expand(len(missing), -1)
        else:
            at = run.denoising.positions
        at = (at - missing.long().cumsum(dim=1)).clamp(min=0)
        if self.order == "score":
            at = at.clone()
            for row, columns in enumerate(request.order):
                columns = columns[~missing[row, columns]]
                at[row, columns] = at[row, columns.sort().values]
        return at

    def _with_merged(self, h: Tensor, run: Pass, request: PrunedRequest) -> Tensor:
        """Return the embeddings, with those of merged tokens inserted."""
        if run.phase.start > 0 or not request.merged:
            return h
        h = h.clone()
        for row, columns, states in request.merged:
            h[row, columns] = states
        return h

    # A drop

    def _due(self, request: PrunedRequest, run: Pass) -> list[Drop]:
        """Return the drops that happen in this pass."""
        steps = 1 if run.denoising is None else run.denoising.steps
        waiting = self.schedule.drops[request.done :]
        return [each for each in waiting if self.schedule.begins(each, steps) <= request.step]

    def _drop(
        self, call: LayerCall, h: Tensor, run: Pass, request: PrunedRequest, attention: list[Tensor] | None
    ) -> Tensor:
        """Select the tokens to keep; return the hidden states [rows, time, hidden] with merged tokens."""
        if run.denoising is not None and run.denoising.cache is not None and run.phase.start == 0:
            request.hidden = h  # later passes do not contain the prompt
        for drop in self._due(request, run):
            gradient = self._gradient(run) if self.criterion == "signal" and drop.keep else None
            kept, merged = self._chosen(call, h, run, request, drop.keep, attention, gradient)
            request.done += 1
            request.selections.append((request.step, kept))
            request.kept, request.order = torch.zeros_like(request.image), kept
            for row, columns in enumerate(kept):
                request.kept[row, columns] = True
            if self.schedule.layer == -1:
                request.before = request.kept
            if run.phase.start == 0 and merged:
                h = h.clone()
                for row, columns, states in merged:
                    h[row, columns] = states
                if self.schedule.layer == -1:
                    request.merged = merged
        return h

    def _chosen(
        self,
        call: LayerCall,
        h: Tensor,
        run: Pass,
        request: PrunedRequest,
        keep: float,
        attention: list[Tensor] | None,
        gradient: Tensor | None,
    ) -> tuple[list[Tensor], list[tuple[int, Tensor, Tensor]]]:
        """Return the columns of each row to keep, best first, and the states of merged tokens."""
        start, end = run.phase.start, run.phase.end
        states = h if start == 0 else request.hidden
        question = ~request.image[:, start:end] if run.real is None else run.real & ~request.image[:, start:end]
        if run.denoising is not None and start == 0:  # only the question, not the masks of the answer
            question = question & (torch.arange(end, device=h.device) < run.denoising.length)
        kept: list[Tensor] = []
        merged: list[tuple[int, Tensor, Tensor]] = []
        for row, columns in enumerate(each.nonzero().flatten() for each in request.kept):
            k = min(count(int(request.image[row].sum()), keep), len(columns))
            if k in (0, len(columns)):
                kept.append(columns[:k])
                continue
            assert states is not None
            image, text = states[row, columns], h[row, question[row]]
            seen = self._inputs_of(call, request, row, columns, image, text, question[row], attention, gradient)
            chosen = choose(self.criterion, seen, k)
            kept.append(columns[chosen.index])
            if chosen.states is not None:
                merged.append((row, kept[-1], chosen.states))
        return kept, merged

    def _inputs_of(
        self,
        call: LayerCall,
        request: PrunedRequest,
        row: int,
        columns: Tensor,
        image: Tensor,
        text: Tensor,
        question: Tensor,
        attention: list[Tensor] | None,
        gradient: Tensor | None,
    ) -> TokenFeatures:
        """Collect the criterion's inputs for one row."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 31 * row + request.done)
        slope = None if gradient is None else gradient[row, columns]
        if attention is None:
            return TokenFeatures(image, text, gradient=slope, generator=generator)
        weights, keys = attention
        index = torch.full((request.image.shape[1] + 1,), -1, device=keys.device)
        index[keys[row]] = torch.arange(keys.shape[1], device=keys.device)  # an empty slot maps to the last entry
        to_image = weights[row][:, :, index[columns]]
        if call.some is not None:  # only kept tokens run
            held = call.some.held[row]
            to_image, asks = to_image[:, held], question[call.some.index[row][held]]
        elif call.run.real is not None:
            real = call.run.real[row]
            to_image, asks = to_image[:, real], question[real]
        else:
            asks = question
        return TokenFeatures(image, text, to_image, to_image[:, asks], slope, generator)

    def _gradient(self, run: Pass) -> Tensor:
        """Return the gradient of the next answer tokens' log-probability at l* [rows, time, hidden]."""
        request: Denoising | None = run.denoising
        if request is None or request.cache is not None:
            raise PlanError("criterion signal needs a pass over prompt and answer: denoise with cache 'none'")
        stack, layer = self._stack, self.schedule.layer
        inputs: dict[str, Any] = {"input_ids": request.tokens, "position_ids": request.positions, **request.prompt}
        if not request.real.all():
            inputs["attention_mask"] = request.real
        index = (0, "attn") if layer < 0 else (layer, "mlp")
        context = stack.context(inputs)
        h = join(stack.run(context.h, 0, index, context)).detach()
        with torch.enable_grad():
            h.requires_grad_()
            logits = stack.head(stack.run(h, index, len(stack), context)).float()
            if stack.architecture.shifted:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            masked = request.tokens == request.mask_token
            masked[:, : request.block[0]] = masked[:, request.block[1] :] = False
            confidence = logits.log_softmax(dim=-1).amax(dim=-1).masked_fill(~masked, -torch.inf)
            per_block = request.steps // request.sampler.blocks
            coming = COMMITS[request.sampler.commits](int(masked[0].sum()), request.step_of_block, per_block)
            [gradient] = torch.autograd.grad(confidence.topk(max(coming, 1), dim=1).values.sum(), h)
        return gradient
