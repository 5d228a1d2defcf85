"""LoRA-Drop: at most steps, a layer reuses its output of the last full step, with a small learned correction.

Rajabzadeh et al., "LoRA-Drop: Temporal LoRA Decoding for Efficient LLM Inference", arXiv 2601.02569.

    step        prompt  1 2 3 [4] 5 6 7 [8] ...            [refresh] every c-th step runs everything
    kept        run     run ...
    droppable   run     a + s B A h                        a: the layer's output at the last refresh

``h`` itself is not added: a new token reaches the rest of the network through ``B A h`` and the kept layers. Droppable
layers only store keys at refresh steps, which also saves cache memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from lamella.data import ImageText, Samples
from lamella.errors import MethodError
from lamella.files import Work
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import command, method
from lamella.runtime import LayerCall, Pass, Policy, apply, keep_policy
from lamella.stack import Stack
from lamella.train import Healed, TrainConfig, distilled_loss, fit_policy, response_loss

Reuse = Literal["output", "delta", "skip"]
REUSES = ("output", "delta", "skip")
TRAINING = TrainConfig(steps=300, lr=1e-3)  # the authors' learning rate, 1e-5, has little effect in so few steps


class LoRADrop(Policy):
    """Temporal reuse of layer outputs with low-rank corrections.

    Args:
        stack: the model, of hidden size d.
        droppable: the layers that reuse their output; never layer 0.
        refresh_every: c of the paper: every c-th generated token runs all layers; 1 is the original model.
        keys: ``skip`` as in the released code: at other steps droppable layers store nothing; ``update`` stores keys
            and values.
        reuse: ``output`` as in the paper; ``delta`` (an addition of Lamella) adds the layer's update of the last
            refresh to the new token's own residual stream; ``skip`` reuses nothing: the layer is the identity plus the
            correction.
        rank: rank of the corrections (alpha / rank) B A h, A [rank, d], B [d, rank], B initialised to 0.
        alpha: scale of the corrections.
        seed: random seed of A.

    Raises:
        MethodError: for settings out of range.
    """

    takes = "token"

    def __init__(
        self,
        stack: Stack,
        *,
        droppable: Sequence[int],
        refresh_every: int = 4,
        keys: Literal["skip", "update"] = "skip",
        reuse: Reuse = "output",
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
    ) -> None:
        super().__init__(stack)
        if reuse not in REUSES or keys not in ("skip", "update"):
            raise MethodError(f"lora-drop: reuse must be one of {', '.join(REUSES)}, and keys must be skip or update")
        if refresh_every < 1 or rank < 1:
            raise MethodError("lora-drop: refresh_every and rank must be at least 1")
        wrong = [layer for layer in droppable if not 0 < layer < len(stack)]
        if wrong:
            raise MethodError(
                f"lora-drop: layer {wrong[0]} cannot be dropped: give layers between 1 and {len(stack) - 1}"
            )
        self.index_of = {layer: index for index, layer in enumerate(sorted(set(droppable)))}
        self.refresh_every, self.keys, self.reuse = refresh_every, keys, reuse
        if keys == "skip" and refresh_every > 1:
            self.sparse = frozenset(self.index_of)
        self.period = refresh_every
        self.scale = alpha / rank
        d = stack.config.hidden_size
        like = next(stack.model.parameters())
        bound = 1 / math.sqrt(d)  # Kaiming-uniform with a = sqrt 5
        noise = torch.rand(len(self.index_of), rank, d, generator=torch.Generator().manual_seed(seed))
        self.a = nn.Parameter(((2 * noise - 1) * bound).to(like))
        self.b = nn.Parameter(torch.zeros(len(self.index_of), d, rank).to(like))
        self.sees_all_keys = False  # only in training: the visibility of the released code, which differs from serving

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer, or reuse its output.

        Args:
            call: the layer.
            h: its input [batch, tokens, hidden].
            run: the forward pass.
        """
        if call.index not in self.index_of:
            return call(h)
        return self._whole(call, h, run) if run.cache is None else self._step(call, h, run)

    def _step(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        assert run.cache is not None
        name = f"anchor.{call.index}"
        step = run.phase.end - run.phase.longest  # 0 for the prompt, which is a refresh too
        if step > 0 and step % self.refresh_every:
            if self.keys == "update":
                call.store_keys(h)
            anchor = run.cache.state.get(name)
            return self._reused(call.index, h, anchor)
        out = call(h)
        if self.reuse != "skip":
            run.cache.state[name] = (out if self.reuse == "output" else out - h)[:, -1:]
        return out

    def _whole(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run all steps in parallel: refresh tokens attend to one another, and the others reuse their outputs."""
        order = run.phase.order(h.device).expand(h.shape[:2])
        age = torch.where(order > 0, order % self.refresh_every, 0)  # steps since the last refresh
        refresh = age == 0
        hidden_keys = self.keys == "skip" and not self.sees_all_keys and not bool(refresh.all())
        out = call(h, keys=refresh if hidden_keys else None)
        source = torch.arange(h.shape[1], device=h.device) - age
        taken = (out if self.reuse == "output" else out - h).gather(1, source.unsqueeze(-1).expand_as(h))
        return run.choose(call, ~refresh, self._reused(call.index, h, taken), out)

    def _reused(self, layer: int, h: Tensor, anchor: Tensor | None) -> Tensor:
        index = self.index_of[layer]
        correction = self.scale * (h @ self.a[index].T @ self.b[index].T)
        if anchor is None or self.reuse == "skip":
            return h + correction
        return anchor + correction if self.reuse == "output" else h + anchor + correction


def released_layers(layers: int) -> list[int]:
    """The droppable layers of the authors' code: all except every fourth.

    >>> released_layers(8)
    [1, 2, 3, 5, 6, 7]
    """
    return [layer for layer in range(layers) if layer % 4]


def spread_layers(layers: int, count: int, keep_first: int = 2, keep_last: int = 1) -> list[int]:
    """Choose ``count`` droppable layers, evenly spaced between the kept ones at both ends.

    Args:
        layers: number of layers of the model.
        count: number of layers to choose.
        keep_first: number of layers at the start that are never chosen.
        keep_last: number of layers at the end that are never chosen.

    >>> spread_layers(8, 2)
    [3, 5]
    """
    free = range(keep_first, layers - keep_last)
    if not 0 < count <= len(free):
        raise MethodError(f"cannot drop {count} layers: {max(len(free), 0)} of {layers} are droppable")
    return [free[int((index + 0.5) * len(free) / count)] for index in range(count)]


@command("lora-drop", "tune")
def tune(
    stack: Stack,
    plan: Plan,
    train: Samples | ImageText,
    *,
    config: TrainConfig = TRAINING,
    objective: Literal["ce", "ce+logit_mse"] = "ce",
    train_keys: Literal["match", "release"] = "match",
    work: Work = Work(),
) -> Healed:
    """Train only the corrections, under serving conditions, with the model frozen.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: text with prompts of various lengths, or prompts about images with their answers; prompts run all layers.
        config: training settings.
        objective: ``ce``, or ``ce+logit_mse``, which adds 0.05 times the squared error to the original model's logits.
        train_keys: ``match`` hides the keys that serving does not store from a droppable layer; ``release`` shows all,
            as in the authors' code.
        work: folder from which an interrupted run resumes.

    Returns:
        The model with trained corrections.
    """
    out = work.directory()
    view = apply(stack, plan)
    policy: LoRADrop = view.lamella_policy
    policy.sees_all_keys = train_keys == "release"
    teacher = stack.model

    def loss(model: Any, inputs: dict[str, Tensor]) -> Any:
        return distilled_loss(model, inputs, teacher=teacher) if "mse" in objective else response_loss(model, inputs)

    settings = {"objective": objective, "train_keys": train_keys, "plan": plan.digest}
    log = fit_policy(view, train, loss, config, out=out, settings=settings)
    policy.sees_all_keys = False
    return Healed(stack=stack, plan=keep_policy(plan, policy, out), log=log)


@method("lora-drop", paper="2601.02569", purpose="skip")
def lora_drop(
    stack: Stack,
    *,
    share: Annotated[float, Gt(0), Le(1)] | None = None,
    droppable: Literal["spread", "release"] = "spread",
    keep_first: Annotated[int, Ge(0)] = 2,
    keep_last: Annotated[int, Ge(0)] = 1,
    refresh_every: Annotated[int, Ge(1)] = 4,
    keys: Literal["skip", "update"] = "skip",
    reuse: Reuse = "output",
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 16.0,
    seed: int = 0,
) -> PlanSeries:
    """Reuse the outputs of some layers between refresh steps; corrections start at zero and are trained by healing.

    Args:
        stack: the opened model of L layers.
        share: p of the paper, fraction of all layers that are droppable; 0.5 is a common choice. If None, the series
            contains every number of them.
        droppable: ``spread`` spaces them evenly; ``release`` takes all except every fourth, as in the authors' code.
        keep_first: layers at the start that ``spread`` keeps.
        keep_last: layers at the end that ``spread`` keeps.
        refresh_every: c of the paper: interval of full steps.
        keys: ``skip`` stores keys of droppable layers at full steps only, ``update`` at every step.
        reuse: between full steps, the last ``output`` as in the paper; ``delta`` (an addition of Lamella), the layer's
            last update of the residual stream; ``skip``, only the correction.
        rank: rank of the corrections.
        alpha: scale of the corrections.
        seed: random seed of the corrections.

    Returns:
        The series of plans, starting with the whole model, with the remaining fraction of layer work and of cache.

    Raises:
        MethodError: for a fraction of less than one layer, or of more layers than are droppable.
    """
    layers = len(stack)
    free = layers - keep_first - keep_last
    if droppable == "release":
        chosen = [released_layers(layers)]
    elif share is None:
        chosen = [spread_layers(layers, count, keep_first, keep_last) for count in range(1, free + 1)]
    else:
        chosen = [spread_layers(layers, round(share * layers), keep_first, keep_last)]
    left = 1 / refresh_every
    points = [Point()]
    for dropped in chosen:
        params = {"droppable": dropped, "refresh_every": refresh_every, "keys": keys, "reuse": reuse}
        params |= {"rank": rank, "alpha": alpha, "seed": seed}
        work = [(left, left) if layer in dropped else (1.0, 1.0) for layer in range(layers)]
        scores = {"layer work": sum(attn for attn, _ in work) / layers}
        points.append(
            Point(policies={stack.stack: PolicyReference(name="lora-drop", params=params, work=work)}, scores=scores)
        )
    return PlanSeries(model=ModelReference.of(stack), points=points)
