"""LAC: a layer is void for a token when the norm of the token's residual stream does not grow enough in it.

Shemiranifar, "Void in Language Models", arXiv 2505.14467 (L2 Adaptive Computation).

    D_l = |h_l+1| - |h_l|                                      signed; per token, float32
    lambda_l = alpha * (max_{j<l} D_j - min_{j<l} D_j)          from earlier layers alone; lambda_0 = 0
    layer l is void for the token   iff   D_l < lambda_l

The decision needs the layer's output, so LAC itself saves no compute. Its three modes differ in how the decision is
used: ``trace`` only records it; ``readout`` applies the head to the output of the token's last active layer, as the
authors' code does, so that "30 % of layers used" amounts to an early exit and not to 70 % of the compute saved;
``carry`` passes the unchanged residual stream on, as the paper words it, and breaks the model. A plan that skips the
layers that are mostly void (Lamella's extension) is the only use of LAC that is faster.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, MinLen
from torch import Tensor

from lamella.data import Text
from lamella.errors import CalibrationError, MethodError, listed
from lamella.measure import Tokens, by_name, sequences
from lamella.plan import ModelReference, PhasedPath, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import method
from lamella.runtime import LayerCall, Pass, Policy, apply, parallel, traced
from lamella.stack import Stack

Mode = Literal["trace", "readout", "carry"]
Stats = Literal["prefix", "skip_first"]
Precision = Literal["float32", "model"]
CHOICES = {"mode": ("trace", "readout", "carry"), "stats": ("prefix", "skip_first"), "dtype": ("float32", "model")}


class LAC(Policy):
    """L2 Adaptive Computation over the layers of one forward pass; no state is kept between tokens or calls.

    Args:
        stack: the model.
        alpha: fraction of the range of norm growth in earlier layers that an active layer must reach; the paper
            evaluates with 0.8.
        mode: treatment of void layers: ``trace``, ``readout`` or ``carry``.
        stats: ``prefix`` as in the paper, or ``skip_first``, which excludes layer 0 from the range: with small
            embeddings its growth dwarfs that of all other layers.
        dtype: ``float32``, or ``model`` to compute norms in the model's own precision as the authors' code does.

    Raises:
        MethodError: for an unknown mode, statistic or precision, or an alpha that is not finite.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        alpha: float = 0.8,
        mode: Mode = "readout",
        stats: Stats = "prefix",
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(stack)
        for name, value in {"mode": mode, "stats": stats, "dtype": dtype}.items():
            if value not in CHOICES[name]:
                raise MethodError(f"void: unknown {name} '{value}'; known are {', '.join(CHOICES[name])}")
        if not math.isfinite(alpha):
            raise MethodError(f"void: alpha {alpha} is not finite; the paper's is 0.8")
        self.alpha, self.mode, self.stats, self.dtype = alpha, mode, stats, dtype

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer, record whether it was active for each token, and treat void tokens as the mode says.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        out = call(h)
        norm = self._norm(out)
        growth = norm - self._norm(h)
        memory = run.memory
        threshold = torch.zeros_like(growth)
        if "most" in memory:
            threshold = self.alpha * (memory["most"] - memory["least"])
        active = growth >= threshold
        if not (call.index == 0 and self.stats == "skip_first"):
            memory["most"] = torch.maximum(memory.get("most", growth), growth)
            memory["least"] = torch.minimum(memory.get("least", growth), growth)
        run.note("norm", call.index, norm)
        run.note("growth", call.index, growth)
        run.note("threshold", call.index, threshold)
        run.note("active", call.index, active)
        if self.mode == "carry":
            # Position 0, the sink, is never skipped: its norm explodes in one layer and dwarfs every other growth.
            return run.choose(call, ~(active | self._sink(run, h)), h, out)
        if self.mode == "readout":
            shadow = torch.where(active.unsqueeze(-1), out, memory.get("shadow", h))
            memory["shadow"] = shadow
            return shadow if call.index == self.layers - 1 else out
        return out

    def _norm(self, h: Tensor) -> Tensor:
        return (h.float() if self.dtype == "float32" else h).norm(dim=-1)

    def _sink(self, run: Pass, h: Tensor) -> Tensor:
        """Mark the first token of each row: [batch, time] bool."""
        columns = torch.arange(run.phase.start, run.phase.end, device=h.device)[None]
        if run.padding is None:
            return columns == 0
        first = run.padding.int().argmin(dim=1, keepdim=True).to(h.device)
        return columns == first


@dataclass(frozen=True)
class Activity:
    """Which layers were active for which input token.

    Attributes:
        prompt: [tokens, layers] bool, without the first token of each prompt.
        response: [tokens, layers] bool, for the generated tokens as inputs.
        sink: [prompts, layers] bool, for the first token of each prompt.
    """

    prompt: Tensor
    response: Tensor
    sink: Tensor

    def usage(self) -> dict[str, float]:
        """Return the percentage of active layers per phase and for the first tokens."""
        return {name: 100 * float(active.float().mean()) for name, active in vars(self).items()}

    def frequency(self, phase: Literal["prompt", "response"]) -> Tensor:
        """Return the fraction of tokens for which each layer was active: [layers], float64."""
        active: Tensor = getattr(self, phase)
        return active.double().mean(dim=0)


def lac_plan(stack: Stack, **params: Any) -> Plan:
    """Return a plan that runs LAC itself; ``params`` are the parameters of :class:`LAC`."""
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="void", params=params)})


@torch.no_grad()
def activity(
    stack: Stack,
    prompts: Tokens,
    *,
    alpha: float = 0.8,
    stats: Stats = "prefix",
    dtype: Precision = "float32",
    max_new_tokens: Annotated[int, Ge(1)] = 50,
) -> Activity:
    """Record which layers are active while a model processes prompts and answers them greedily.

    Args:
        stack: the opened model.
        prompts: token ids [prompts, time], alone or with an attention mask (left padding).
        alpha: see :class:`LAC`; the paper's 0.8 by default.
        stats: see :class:`LAC`.
        dtype: see :class:`LAC`.
        max_new_tokens: length of each answer in tokens.

    Raises:
        CalibrationError: when every prompt is a single token.
    """
    model: Any = stack.model
    view = apply(stack, lac_plan(stack, alpha=alpha, mode="trace", stats=stats, dtype=dtype))
    kept: dict[str, list[Tensor]] = {"prompt": [], "response": [], "sink": []}
    for row in sequences(prompts):
        ids = row["input_ids"].to(stack.device)
        if "attention_mask" in row:
            ids = ids[:, row["attention_mask"][0].bool()]
        length = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,  # unused, since there is only one row
        )
        trace = traced(view)
        parallel(view, ids, torch.tensor([length]), logits_to_keep=1)
        active = torch.from_numpy(trace.joined()[2]["active"][0]).bool()
        kept["sink"].append(active[:1])
        kept["prompt"].append(active[1:length])
        kept["response"].append(active[length:])
    if not any(map(len, kept["prompt"])):
        raise CalibrationError("every prompt is a single token, the sink, which does not count: give longer prompts")
    return Activity(**{name: torch.cat(rows) for name, rows in kept.items()})


@method("void", paper="2505.14467", purpose="skip")
def void(
    stack: Stack,
    calibration: Text,
    *,
    mode: Literal["plan", "trace", "readout", "carry"] = "plan",
    alpha: Annotated[float, Ge(0), Le(1)] = 0.2,
    below: Annotated[float, Ge(0), Le(1)] | None = None,
    protect: Annotated[tuple[int, ...], MinLen(1)] = (0, 1, -1),
    keys: Literal["fill", "local", "intersect"] = "fill",
    stats: Stats = "prefix",
    dtype: Precision = "float32",
    max_new_tokens: int = 50,
) -> PlanSeries:
    """Skip the layers that are void for most tokens, separately for prompts and answers; or run LAC itself.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time]; their first halves are the prompts that the model answers.
        mode: ``plan`` skips whole layers and is faster; ``trace``, ``readout`` and ``carry`` run every layer before
            they decide, see :class:`LAC`: they show LAC's decisions and save no compute.
        alpha: fraction of the range of norm growth in earlier layers that an active layer must reach. With the paper's
            0.8 most layers of a small model are void for every token, which does not rank them.
        below: skip, in each phase, the layers that are active for less than this fraction of its tokens. If omitted,
            each plan of the series skips one more layer while generating, the least active first, and prompts run all
            layers.
        protect: layers that are never skipped.
        keys: attention keys of a layer that prompts skip and answers run: ``fill`` computes the prompt's keys there,
            ``local`` attends to generated tokens alone (this changes the model), ``intersect`` skips it in both phases.
        stats: ``prefix`` as in the paper, or ``skip_first``, which excludes layer 0 from the range of growth.
        dtype: ``float32``, or ``model`` to compute norms in the model's own precision as the authors' code does.
        max_new_tokens: length in tokens of the answers in which activity is measured.

    Returns:
        The series of plans, starting with the whole model.

    Raises:
        MethodError: for protected layers that the stack does not have.
    """
    model = ModelReference.of(stack)
    lac: dict[str, Any] = {"alpha": alpha, "stats": stats, "dtype": dtype}
    if mode != "plan":
        policies = lac_plan(stack, mode=mode, **lac).policies
        return PlanSeries(model=model, points=[Point(), Point(policies=policies)])
    layers = len(stack)
    if any(not -layers <= layer < layers for layer in protect):
        raise MethodError(f"protect {listed(protect)}: name layers of a stack of {layers}")
    protected = {layer % layers for layer in protect}

    inputs = by_name(calibration).items()
    prompts = {name: value[:, : value.shape[1] // 2] for name, value in inputs}  # the model answers them
    measured = activity(stack, prompts, max_new_tokens=max_new_tokens, **lac)
    frequencies = {"prompt": measured.frequency("prompt"), "response": measured.frequency("response")}
    everything = list(range(layers))
    if below is None:
        free = [layer for layer in everything if layer not in protected]
        free.sort(key=lambda layer: (float(frequencies["response"][layer]), layer))
        paths = [
            PhasedPath(prefill=everything, decode=sorted(protected.union(free[count:])))
            for count in range(1, len(free) + 1)
        ]
    else:
        prompt, response = (
            [layer for layer in everything if layer in protected or float(frequency[layer]) >= below]
            for frequency in frequencies.values()
        )
        if keys == "intersect":
            response = [layer for layer in response if layer in prompt]
        if keys == "local" and not set(response) <= set(prompt):
            warnings.warn("keys 'local' changes the model: some layers do not attend to the prompt", stacklevel=3)
        paths = [PhasedPath(prefill=prompt, decode=response, keys="local" if keys == "local" else "fill")]
    points = [
        Point(),
        *(Point(path={stack.architecture.stack: path}, scores=_scores(path, frequencies)) for path in paths),
    ]
    return PlanSeries(model=model, points=points, provenance={"usage": measured.usage()})


def _scores(path: PhasedPath, frequencies: dict[str, Tensor]) -> dict[str, float]:
    return {
        "prompt layers": float(len(path.prefill)),
        "answer layers": float(len(path.decode)),
        "least activity kept": float(min(frequencies["response"][layer] for layer in path.decode)),
    }
