"""FFN-SkipLLM: each generated token skips a run of MLP sublayers, starting where its residual stream first saturates.

Jaiswal et al., "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping",
arXiv 2404.03865.

    u_l = h_l + attn_l(h_l)          always runs, so every layer's KV cache is complete
    h_l+1 = u_l + mlp_l(u_l)         c_l = cosine(u_l, h_l+1), per token

    layers      0 1 2 3 4 | 5 6 7 8 9 10 .. 24 | 25 .. 29       the first and last few always run
    one token             | M M . . . .  M  M  |                c_6 > threshold: the next k MLPs are skipped

The prompt and the first generated tokens run every MLP, and so does every sixth token after that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from lamella.data import Text
from lamella.errors import MethodError
from lamella.measure import Tokens, sequences
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.progress import track
from lamella.registry import method
from lamella.runtime import LayerCall, Pass, Policy, apply, parallel, traced
from lamella.stack import Stack, join

Placement = Literal["saturated", "random", "anywhere"]
PLACEMENTS = ("saturated", "random", "anywhere")
REACHED = 0.95  # fraction of the target number of skipped MLPs that a calibrated threshold must reach
MEASURED = 512  # calibration tokens on which a plan is tried out
TINY = 1e-12  # lower bound of norms, against division by zero
STARTS = 4096  # number of random start layers; later tokens reuse them


class FFNSkip(Policy):
    """Skip a run of MLP sublayers per generated token.

    Args:
        stack: the model of L layers.
        max_skips: k of the paper, the number of consecutive MLPs that a token skips.
        threshold: the cosine above which a token counts as saturated.
        cold: how many layers at the start and at the end always run; if None, see :func:`cold_layers`.
        warmup: number of generated tokens that run every MLP before any token skips.
        interleave: after the warm-up, how many consecutive tokens skip and how many then run every MLP; (1, 0) skips at
            every token.
        placement: where a run starts: at the first ``saturated`` layer, or, as controls, at a ``random`` layer of the
            same window, or ``anywhere`` in the stack; random starts are the same for every row.
        seed: random seed of the start layers.

    Attributes:
        window: the layers that may be skipped.

    Raises:
        MethodError: for settings out of range.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        max_skips: int,
        threshold: float,
        cold: tuple[int, int] | None = None,
        warmup: int = 16,
        interleave: tuple[int, int] = (5, 1),
        placement: Placement = "saturated",
        seed: int = 0,
    ) -> None:
        super().__init__(stack)
        cold = cold_layers(len(stack)) if cold is None else cold
        if len(cold) != 2 or len(interleave) != 2:
            raise MethodError("ffn-skip: cold and interleave are two numbers each, such as 5, 5 and 5, 1")
        if placement not in PLACEMENTS:
            raise MethodError(f"unknown placement '{placement}'; known are {', '.join(PLACEMENTS)}")
        if not -1 <= threshold <= 1:
            raise MethodError(f"threshold {threshold} is no cosine: give a value from -1 to 1")
        first, last = (0, 0) if placement == "anywhere" else cold
        if min(first, last, max_skips, warmup) < 0 or interleave[0] < 1 or interleave[1] < 0:
            raise MethodError(
                "ffn-skip: cold, max_skips and warmup must be at least 0, and interleave must start with at least 1"
            )
        if first + last >= len(stack):
            raise MethodError(f"cold {first},{last} leaves none of {len(stack)} layers to skip: give smaller values")
        self.window = range(first, len(stack) - last)
        if max_skips > len(self.window):
            raise MethodError(f"max_skips {max_skips} is more than the {len(self.window)} layers between the cold ones")
        self.max_skips, self.threshold, self.placement = max_skips, threshold, placement
        self.warmup, self.interleave = warmup, interleave
        drawn = np.random.default_rng(seed)
        self._starts = drawn.integers(self.window.start, self.window.stop - max_skips, STARTS, endpoint=True)
        self.steady_after, self.period = warmup, sum(interleave)

    def begin(self, run: Pass) -> None:
        """Choose the tokens of this pass that may skip."""
        never = self.max_skips == 0 or (self.placement == "saturated" and self.threshold == 1)
        if never or not run.phase.any_response:
            return
        # Decisions are made on the host, where small arrays are cheap; only cosines are copied from the device.
        order = run.phase.order(torch.device("cpu")).numpy()
        turn = order - self.warmup - 1  # the first token that may skip has turn 0
        waiting = (turn >= 0) & (turn % sum(self.interleave) < self.interleave[0])
        if waiting.any():
            begun = np.full_like(order, self.layers)  # the number of layers stands for "not begun"
            run.memory.update(waiting=waiting, begun=begun, last=-self.layers, cosine=0.0)
            run.memory["start"] = self._starts[order % STARTS]

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run one layer, with its MLP only for the tokens that do not skip it.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        layer, memory = call.index, run.memory
        if "begun" not in memory or not self.window.start - 1 <= layer < self.window.stop:
            return call(h)
        if layer in self.window and memory["waiting"] is not None:
            self._begin_runs(layer, memory)
        mid = call.attn(h)
        if layer < memory["last"] + self.max_skips:
            begun = memory["begun"]
            full = (layer < begun) | (begun + self.max_skips <= layer)
            out = call.mlp_where(mid, torch.from_numpy(full).expand(h.shape[:2]))
        else:
            out = call.mlp(mid)
        if memory["waiting"] is not None and self.placement == "saturated":
            memory["cosine"] = _cosine(join(mid), out)
            if run.trace is not None:
                run.note("cosine", layer, torch.as_tensor(memory["cosine"]).expand(h.shape[:2]))
        return out

    def _begin_runs(self, layer: int, memory: dict[str, Any]) -> None:
        """Start the runs of the waiting tokens that are ready at this layer."""
        if self.placement == "saturated":
            cosine = memory["cosine"]
            if (cosine if isinstance(cosine, float) else cosine.max()) <= self.threshold:
                return
            ready = cosine > self.threshold
        else:
            ready = memory["start"] == layer
        begins = memory["waiting"] & ready
        if begins.any():
            memory["begun"] = np.where(begins, layer, memory["begun"])
            memory["last"] = layer
            waiting = memory["waiting"] & ~begins
            memory["waiting"] = waiting if waiting.any() else None


def _cosine(u: Tensor, out: Tensor) -> float | np.ndarray:
    """Compute the float32 cosine of two tensors [batch, time, hidden]: a float for one token, else [batch, time]."""
    if u.numel() == u.shape[-1] and u.dtype == torch.float32 and u.device.type == "cpu":
        a, b = u.reshape(-1), out.reshape(-1)  # on the CPU, call overhead dominates for a single token
        return a.dot(b).item() / max(math.sqrt(a.dot(a).item() * b.dot(b).item()), TINY)
    return torch.cosine_similarity(u.detach().float(), out.detach().float(), dim=-1, eps=TINY).cpu().numpy()


def cold_layers(layers: int) -> tuple[int, int]:
    """Return how many layers at the start and at the end always run: 5 of 32 as in the paper, in proportion.

    Args:
        layers: number of layers of the model.

    >>> cold_layers(32), cold_layers(4)
    ((5, 5), (1, 1))
    """
    ends = min(5, max(1, round(layers * 5 / 32)))
    return ends, ends


@torch.no_grad()
def saturation(stack: Stack, tokens: Tokens) -> Tensor:
    """Measure the cosine between the residual stream before and after each layer's MLP.

    Args:
        stack: the opened model.
        tokens: token ids [sequences, time]; a few hundred tokens are enough.

    Returns:
        Cosines [tokens, layers] in float32, without the first token of each sequence, which is an attention sink.
    """
    rows = []
    for row in track(sequences(tokens), "saturation"):
        context = stack.context(row)
        layers, before = [], context.h
        for position, h in stack.walk(context.h, 0, len(stack), context):
            now = join(h)[context.real][1:].float()
            if position.sublayer == "mlp":
                stack.check_finite(position, h)
                layers.append(torch.cosine_similarity(before, now, dim=-1).cpu())
            before = now
        rows.append(torch.stack(layers, dim=1))
    return torch.cat(rows)


def expected_threshold(cosines: Tensor, window: range, max_skips: int, reach: float = REACHED) -> float:
    """Return the largest threshold that would reach the target, if skipping did not change later tokens.

    Args:
        cosines: of calibration tokens [tokens, layers], as returned by :func:`saturation`.
        window: the layers that may be skipped.
        max_skips: the target number of skipped MLPs per token.
        reach: the fraction of ``max_skips`` to reach on average.
    """
    # A run may start at layer l once the cosine of layer l - 1 passes the threshold; late starts skip fewer.
    before = torch.cat([torch.zeros_like(cosines[:, :1]), cosines], dim=1)[:, window.start : window.stop]
    possible = torch.tensor([min(max_skips, window.stop - layer) for layer in window])

    def skipped(threshold: float) -> float:
        passes = before > threshold
        first = passes.int().argmax(dim=1)
        return float((possible[first] * passes.any(dim=1)).double().mean())

    candidates = torch.quantile(before.flatten()[: 2**24], torch.linspace(0, 1, 401)).tolist()
    reaching = [value for value in candidates if skipped(value) >= reach * max_skips]
    return round(max(reaching, default=-1.0), 6)


@method("ffn-skip", paper="2404.03865", purpose="skip")
@torch.no_grad()
def ffn_skip(
    stack: Stack,
    calibration: Text,
    *,
    max_skips: Annotated[int, Ge(0)] | None = None,
    threshold: Annotated[float, Ge(-1), Le(1)] | Literal["auto"] = "auto",
    cold: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] | None = None,
    warmup: Annotated[int, Ge(0)] = 16,
    interleave: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(0)]] = (5, 1),
    placement: Placement = "saturated",
    seed: Annotated[int, Ge(0)] = 0,
) -> PlanSeries:
    """Skip MLP sublayers of saturated tokens during generation; attention always runs, so the KV cache stays complete.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], on which the threshold and the expected fraction of skipped
            MLPs are determined.
        max_skips: number of MLPs that one token may skip; if None, the series holds every possible number.
        threshold: the cosine above which a token counts as saturated; ``auto`` takes the largest value that still skips
            95 % of ``max_skips`` per token, since the paper's 0.95 is exceeded at every layer of some models and at no
            layer of others.
        cold: layers at the start and at the end that always run; if None, 5 and 5 of 32, in proportion.
        warmup: number of generated tokens that run every MLP before any token skips.
        interleave: after the warm-up, how many consecutive tokens skip and how many then run every MLP.
        placement: ``saturated`` is the method; ``random`` (within the same layers) and ``anywhere`` are controls that
            choose the first skipped MLP at random.
        seed: random seed of the controls.

    Returns:
        The plan series, starting with the unchanged model, each plan with the fraction of MLPs that it skips on
        calibration text, warm-up aside.

    Raises:
        MethodError: for more cold layers than the model has, or more skips than there are layers between them.
    """
    ends = cold_layers(len(stack)) if cold is None else cold
    limit = 0.95 if threshold == "auto" else threshold
    settings: dict[str, Any] = {"cold": list(ends), "warmup": warmup, "interleave": list(interleave)}
    settings |= {"placement": placement, "seed": seed}
    # Constructed before the long work, since the constructor checks the settings.
    window = FFNSkip(stack, max_skips=max_skips or 0, threshold=limit, **settings).window
    wanted = range(1, len(window) + 1) if max_skips is None else [max_skips]
    cosines = saturation(stack, calibration) if threshold == "auto" and placement == "saturated" else None
    points = [Point()]
    for count in track(list(wanted), "ffn-skip: plans"):

        def skipped(limit: float, count: int = count) -> Tensor:
            return _skipped(stack, {"max_skips": count, "threshold": limit} | settings, calibration)

        if cosines is None:
            share = skipped(limit)
        else:
            low, high = (expected_threshold(cosines, window, count, reach) for reach in (1.0, REACHED))
            limit, share = _calibrated(skipped, low, high, REACHED * count)
        share = share * interleave[0] / sum(interleave)
        params = {"max_skips": count, "threshold": limit} | settings
        policy = PolicyReference(name="ffn-skip", params=params, work=[(1.0, 1 - float(each)) for each in share])
        points.append(
            Point(policies={stack.stack: policy}, scores={"threshold": limit, "skipped MLPs": float(share.mean())})
        )
    return PlanSeries(model=ModelReference.of(stack), points=points)


def _calibrated(skipped: Callable[[float], Tensor], low: float, high: float, wanted: float) -> tuple[float, Tensor]:
    """Find the largest threshold between two bounds that skips the target number of MLPs per token, to about 1 %.

    Tokens that attend to tokens with skipped MLPs are less saturated, so the threshold must be lower than the profile
    of the unchanged model suggests. Returns the threshold and the fraction of tokens that skip each layer's MLP
    [layers].
    """
    share = skipped(high)
    if float(share.sum()) >= wanted:
        return high, share
    few, many, best = (
        float(share.sum()),
        wanted / REACHED,
        None,
    )  # at ``high``, and estimated from the profile at ``low``
    for _ in range(7):
        position = min(max((many - 1.005 * wanted) / (many - few), 0.05), 0.95)  # linear interpolation
        middle = round(low + position * (high - low), 6)
        share = skipped(middle)
        found = float(share.sum())
        if found < wanted:
            high, few = middle, found
            continue
        low, many, best = middle, found, share
        if found < 1.01 * wanted:
            break
    return low, skipped(low) if best is None else best


def _skipped(stack: Stack, params: dict[str, Any], calibration: Tokens) -> Tensor:
    """Measure the fraction of tokens that skip each layer's MLP, with calibration text as answer [layers]."""
    always = PolicyReference(name="ffn-skip", params=params | {"warmup": 0, "interleave": [1, 0]})
    view = apply(stack, Plan(model=ModelReference.of(stack), policies={stack.stack: always}))
    trace = traced(view)
    rows = sequences(calibration)
    for row in rows[: max(1, MEASURED // rows[0]["input_ids"].shape[1])]:
        ids = row["input_ids"]
        if "attention_mask" in row:
            ids = ids[:, row["attention_mask"][0].bool()]
        parallel(view, ids.to(stack.device), torch.ones(1, dtype=torch.long), logits_to_keep=1)
    ran, prompt, _ = trace.joined()
    return torch.from_numpy(1 - ran[~prompt][..., 1].mean(axis=0))
