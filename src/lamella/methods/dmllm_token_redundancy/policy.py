"""What decides which image tokens are there: between the attention and the MLP of a layer, in one step, for good.

What is chosen is frozen, and lies in the request (``run.denoising.state``), never on the model. Without a cache later
passes run the tokens that are left alone; with a prefix cache each layer's entries of the others are deleted, once. A
forward that belongs to no request is a first step of its own.
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
class Request:
    """What is remembered of one request.

    Attributes:
        image: the columns of image tokens [rows, columns] bool.
        kept: those that are still there.
        before: those that were when the step began.
        step: which step that is.
        done: how many drops have happened.
        absent: of layers that a prefix cache holds, the image tokens that were gone when the prompt was encoded.
        order: the columns kept of each row, the best first, since the last drop.
        merged: of tokens merged before the first layer, by row, their columns and states.
        stream: with a prefix cache, the stream of the prompt where tokens will be chosen later.
        selections: the columns kept of each row by each drop, with its step.
    """

    image: Tensor
    kept: Tensor
    before: Tensor
    step: int = 0
    done: int = 0
    absent: dict[int, Tensor] = field(default_factory=dict)
    order: list[Tensor] = field(default_factory=list)
    merged: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    stream: Tensor | None = None
    selections: list[tuple[int, list[Tensor]]] = field(default_factory=list)


class VisualTokens(Policy):
    """A schedule with a criterion.

    Args:
        stack: the text of a masked-diffusion model that reads images.
        drops, layer, withdrawn: see :class:`VisualTokenSchedule`.
        criterion: a key of :data:`lamella.measure.image_tokens.CRITERIA`.
        positions: of the tokens behind a gap: moved up, as the authors' code does, or as they were. Keys that a prefix
            cache holds already stay where they are.
        order: of the tokens kept: that of the image, or their score's, as in the authors' code; only positions tell.
        seed: of the random criterion.

    Raises:
        MethodError: for a schedule that does not fit the model, or an unknown criterion.
        PlanError: for a model that reads no images.
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
            raise PlanError(f"{stack.name} reads no images, of which this plan leaves tokens out: give one that does")
        if criterion not in CRITERIA:
            raise PlanError(f"no criterion '{criterion}' for image tokens: choose one of {', '.join(CRITERIA)}")
        if criterion in ATTENDING and layer < 0 and any(keep for _, keep in drops):
            raise PlanError(f"{criterion} looks at the attention of a layer: give a layer from 0 on")
        self.schedule = VisualTokenSchedule(tuple(Drop(*each) for each in drops), layer, withdrawn)
        self.schedule.check_fits(len(stack))
        self.criterion, self.positions, self.order, self.seed = criterion, positions, order, seed
        self._stack, self._position_inputs = stack, PositionInputs(stack)

    # A pass

    def begin(self, run: Pass) -> None:
        request = self._request(run)
        if request is not None:
            step = 0 if run.denoising is None else run.denoising.step
            if step != request.step:
                request.step, request.before = step, request.kept
            run.memory[STATE] = request

    def _request(self, run: Pass) -> Request | None:
        """What is remembered; None where no image is shown."""
        kept = {} if run.denoising is None else run.denoising.state
        if STATE not in kept:
            image = run.images
            if image is None or not image.any():
                return None
            if run.real is not None:
                image = image & run.real
            if run.denoising is not None:  # columns of the answer, too
                more = run.denoising.tokens.shape[1] - image.shape[1]
                image = torch.cat([image, image.new_zeros(len(image), more)], dim=1)
            kept[STATE] = Request(image, image, image)
        found: Request = kept[STATE]
        return found

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        request: Request | None = run.memory.get(STATE)
        if request is None:
            return call(h)
        target = self.schedule.layer
        if call.index == 0:
            h = self._with_merged(h, run, request)
            if target == -1:
                h = self._drop(call, h, run, request, None)
        here = self._placed(call, run, request, self._gone(request, call.index))
        if not (call.index == target and request.done < len(self.schedule.drops)) and (
            call.index != self.schedule.withdrawn
        ):
            return here.scatter(h, here(here.gather(h)))
        x, weights = here.gather(h), None
        if call.index == target and self._due(request, run) and self.criterion in ATTENDING:
            mid, *weights = here.attn_with_weights(x)
        else:
            mid = here.attn(x)
        h = here.scatter(h, join(mid))
        if call.index == target:
            h = self._drop(here, h, run, request, weights)
        rest = self._placed(call, run, request, self._gone(request, call.index + 1), cached=False)
        return rest.scatter(h, rest.mlp(rest.gather(h)))

    def _gone(self, request: Request, layer: int) -> Tensor:
        """The image tokens that are not there at the input of a layer [rows, columns] bool."""
        if self.schedule.withdrawn is not None and layer > self.schedule.withdrawn:
            return request.image
        return request.image & ~(request.kept if layer > self.schedule.layer else request.before)

    def _placed(self, call: LayerCall, run: Pass, request: Request, gone: Tensor, cached: bool = True) -> LayerCall:
        """The call of the tokens that are there, at their positions."""
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

    def _at(self, run: Pass, request: Request, missing: Tensor) -> Tensor:
        """The position of every column, moved up to where tokens are missing [rows, columns]."""
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

    def _with_merged(self, h: Tensor, run: Pass, request: Request) -> Tensor:
        """The embeddings, with those of merged tokens in their place."""
        if run.phase.start > 0 or not request.merged:
            return h
        h = h.clone()
        for row, columns, states in request.merged:
            h[row, columns] = states
        return h

    # A drop

    def _due(self, request: Request, run: Pass) -> list[Drop]:
        """The drops that happen in this pass."""
        steps = 1 if run.denoising is None else run.denoising.steps
        waiting = self.schedule.drops[request.done :]
        return [each for each in waiting if self.schedule.begins(each, steps) <= request.step]

    def _drop(self, call: LayerCall, h: Tensor, run: Pass, request: Request, attention: list[Tensor] | None) -> Tensor:
        """Choose the tokens that stay; the stream [rows, time, hidden], with what was merged into them."""
        if run.denoising is not None and run.denoising.cache is not None and run.phase.start == 0:
            request.stream = h  # of which later passes see nothing
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
        request: Request,
        keep: float,
        attention: list[Tensor] | None,
        gradient: Tensor | None,
    ) -> tuple[list[Tensor], list[tuple[int, Tensor, Tensor]]]:
        """The columns of each row that stay, the best first, and the states of those that are merged."""
        start, end = run.phase.start, run.phase.end
        shown = h if start == 0 else request.stream
        spoken = ~request.image[:, start:end] if run.real is None else run.real & ~request.image[:, start:end]
        if run.denoising is not None and start == 0:  # what is asked, not the masks of its answer
            spoken = spoken & (torch.arange(end, device=h.device) < run.denoising.length)
        kept: list[Tensor] = []
        merged: list[tuple[int, Tensor, Tensor]] = []
        for row, columns in enumerate(each.nonzero().flatten() for each in request.kept):
            k = min(count(int(request.image[row].sum()), keep), len(columns))
            if k in (0, len(columns)):
                kept.append(columns[:k])
                continue
            assert shown is not None
            image, text = shown[row, columns], h[row, spoken[row]]
            seen = self._seen(call, request, row, columns, image, text, spoken[row], attention, gradient)
            chosen = choose(self.criterion, seen, k)
            kept.append(columns[chosen.index])
            if chosen.states is not None:
                merged.append((row, kept[-1], chosen.states))
        return kept, merged

    def _seen(
        self,
        call: LayerCall,
        request: Request,
        row: int,
        columns: Tensor,
        image: Tensor,
        text: Tensor,
        spoken: Tensor,
        attention: list[Tensor] | None,
        gradient: Tensor | None,
    ) -> TokenFeatures:
        """What the criterion sees of one row."""
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + 31 * row + request.done)
        slope = None if gradient is None else gradient[row, columns]
        if attention is None:
            return TokenFeatures(image, text, gradient=slope, generator=drawn)
        weights, keys = attention
        place = torch.full((request.image.shape[1] + 1,), -1, device=keys.device)
        place[keys[row]] = torch.arange(keys.shape[1], device=keys.device)  # an empty one goes to the last place
        to_image = weights[row][:, :, place[columns]]
        if call.some is not None:  # of the tokens that are there
            held = call.some.held[row]
            to_image, asks = to_image[:, held], spoken[call.some.index[row][held]]
        elif call.run.real is not None:
            real = call.run.real[row]
            to_image, asks = to_image[:, real], spoken[real]
        else:
            asks = spoken
        return TokenFeatures(image, text, to_image, to_image[:, asks], slope, drawn)

    def _gradient(self, run: Pass) -> Tensor:
        """How the log-probability of the answer tokens to come hangs on the stream at l* [rows, time, hidden]."""
        request: Denoising | None = run.denoising
        if request is None or request.cache is not None:
            raise PlanError("the signal of the answer needs a pass over prompt and answer: denoise with cache 'none'")
        stack, layer = self._stack, self.schedule.layer
        given: dict[str, Any] = {"input_ids": request.tokens, "position_ids": request.positions, **request.prompt}
        if not request.real.all():
            given["attention_mask"] = request.real
        place = (0, "attn") if layer < 0 else (layer, "mlp")
        context = stack.context(given)
        h = join(stack.run(context.h, 0, place, context)).detach()
        with torch.enable_grad():
            h.requires_grad_()
            logits = stack.head(stack.run(h, place, len(stack), context)).float()
            if stack.architecture.shifted:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            masked = request.tokens == request.mask_token
            masked[:, : request.block[0]] = masked[:, request.block[1] :] = False
            likely = logits.log_softmax(dim=-1).amax(dim=-1).masked_fill(~masked, -torch.inf)
            per_block = request.steps // request.sampler.blocks
            coming = COMMITS[request.sampler.commits](int(masked[0].sum()), request.step_of_block, per_block)
            [gradient] = torch.autograd.grad(likely.topk(max(coming, 1), dim=1).values.sum(), h)
        return gradient
