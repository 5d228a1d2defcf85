"""Refit: corrects a pruned model in closed form, without training steps.

Behind every gap of a plan, the residual stream should be what it is in the original at the same point. The last linear
layer in front of the gap is corrected so that it comes as close as possible, from the first gap to the last:

    x [in]     input of that linear layer in the pruned model, all earlier gaps corrected
    y [out]    the original's residual stream behind the gap
    e [out]    y minus the pruned model's residual stream at the same point
    D = argmin  sum_t w_t ||e_t - D x_t||^2 + ridge m ||D||^2        m = mean diagonal of X^T W X
    W <- W + D

The ridge shrinks towards the given weights; held-out text chooses it, and may choose to change nothing. A narrower
sublayer is a gap as well: the contribution of its removed channels or heads is missing.

The weights of tokens decide. In many models the first token is an attention sink, whose residual stream is hundreds of
times as large as that of the others. A plain fit sees nothing else, and a fit without it ruins the model. Therefore
every token counts by its relative error, w = 1 / ||y||^2, and the first one 16 times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import CalibrationError, MethodError
from lamella.measure import Tokens, describe, sequences
from lamella.plan import Plan, alter_stack, apply_tensors
from lamella.plan.width import kept_entries
from lamella.progress import track
from lamella.stack import Context, Hidden, Parallel, Position, Stack, groups_at, join, share, silencers
from lamella.train.log import TrainingLog
from lamella.train.trained import Healed

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
FIRST = 16.0  # weight of the first token of a sequence, relative to the others
HELD_OUT = 0.2  # fraction of the sequences that is held out, the last ones
SLIGHT = 1e-2  # relative deviation due to rounding in half precision


@dataclass(frozen=True)
class LeastSquares:
    """Sums over tokens that determine a weighted least-squares problem, in float64.

    Attributes:
        gram: X^T W X [in, in]; a bias is the weight of one more input, which is always 1.
        cross: X^T W E [in, out].
        squares: sum of w ||e||^2.
        total: sum of w ||y||^2.
        biased: whether the last input is that of a bias.
    """

    gram: Tensor
    cross: Tensor
    squares: Tensor
    total: Tensor
    biased: bool

    @classmethod
    def of(cls, x: Tensor, e: Tensor, y: Tensor, counts: Tensor, *, biased: bool = False) -> LeastSquares:
        """Return the sums over some tokens.

        Args:
            x: inputs of the linear layer [tokens, in].
            e: what should be added to its outputs [tokens, out].
            y: vectors to which errors are relative [tokens, out].
            counts: how much each token counts [tokens].
            biased: whether the linear layer has a bias.
        """
        x, e, counts = x.double(), e.double(), counts.double()
        w = counts / y.double().square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if biased else x
        weighted = (x * w[:, None]).T
        return cls(weighted @ x, weighted @ e, w @ e.square().sum(-1), counts.sum(), biased)

    def __add__(self, other: LeastSquares) -> LeastSquares:
        """Return the sums over the tokens of both."""
        return LeastSquares(
            self.gram + other.gram,
            self.cross + other.cross,
            self.squares + other.squares,
            self.total + other.total,
            self.biased,
        )

    def solve(self, ridge: float) -> Tensor:
        """Return D, transposed [in, out]; the last row is that of a bias.

        Args:
            ridge: penalty on D, relative to the mean diagonal of the Gram matrix (for a bias, to its own entry);
                infinity changes nothing.
        """
        if math.isinf(ridge):
            return torch.zeros_like(self.cross)
        gram, diagonal = self.gram.clone(), self.gram.diagonal()
        inputs = len(diagonal) - self.biased
        penalty = torch.cat([diagonal[:inputs].mean().expand(inputs), diagonal[inputs:]])
        gram.diagonal().add_(ridge * penalty.clamp(min=torch.finfo(penalty.dtype).tiny))  # inputs may all be 0
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(gram))

    def error(self, correction: Tensor) -> float:
        """Return the mean of ||e - D x||^2 / ||y||^2.

        Args:
            correction: D, transposed [in, out].
        """
        explained = ((2 * self.cross - self.gram @ correction) * correction).sum()
        return float((self.squares - explained) / self.total)


@dataclass(frozen=True)
class PlanGap:
    """Where a plan leaves something out.

    Attributes:
        site: the last sublayer in front, or the narrower one, whose linear layer is corrected.
        behind: the boundary behind what is missing, at which the residual stream should be the original's.
    """

    site: Position
    behind: Position


def gaps_of(stack: Stack, plan: Plan, *, parallel: bool = False) -> list[PlanGap]:
    """Return the gaps of a plan, in the order in which they run.

    Args:
        stack: the original.
        plan: the plan.
        parallel: whether the sublayers of a layer have the same input, so that one that is kept stands in front of the
            others.

    Raises:
        MethodError: for a plan that repeats or moves layers, or only removes the first ones.
    """
    chain, widths, first = plan.chain(stack.stack), plan.widths, stack.architecture.names[0]
    if not chain.in_order:
        raise MethodError("refit: this plan repeats or moves layers, which leaves no gap to correct: train instead")
    kept = set(stack.positions) - chain.skipped - stack.dropped
    narrower = {(layer, "mlp") for layer in widths.channels} | {(layer, "attn") for layer in widths.heads}
    found: dict[Position, Position] = {}
    site = None
    for layer in groups_at("block", stack.positions):
        for position in sorted(layer, key=lambda each: each not in kept) if parallel else layer:
            if position in kept:
                site = position
                if site in narrower or widths.hidden is not None:
                    found[site] = stack.after(site)
            elif site is not None and position in chain.skipped:
                found[site] = Position(position.layer + 1, first) if parallel else stack.after(position)
    if chain.skipped and not found:
        raise MethodError("refit: nothing is left in front of the removed sublayers: train instead")
    return [PlanGap(*each) for each in found.items()]


@torch.no_grad()
def refit(stack: Stack, plan: Plan, tokens: Tokens, *, ridges: Sequence[float] = RIDGES) -> Healed:
    """Correct linear layers of a pruned model so that its residual stream is the original's behind every gap.

    Both models run once. Memory holds the residual stream of all sequences at one point of each model, and the Gram
    matrix of one linear layer.

    Args:
        stack: the original; it is not changed.
        plan: a plan that removes layers or sublayers, or narrows them.
        tokens: text [sequences, time], with an attention mask if there is padding; or images with text. The last fifth
            of the sequences is held out to choose the ridge of each gap.
        ridges: candidates for the ridge; infinity changes nothing.

    Returns:
        The model with the corrected weights, under the same plan. ``findings["refit"]`` has for each gap the corrected
        ``site``, the ``ridge`` (None: nothing changed), and the mean squared relative error of the residual stream on
        held-out text ``before`` and ``after``.

    Raises:
        MethodError: for a plan or a model to which this does not apply.
        CalibrationError: for fewer than two sequences.
    """
    _check(stack, plan)
    inputs = sequences(tokens)
    if len(inputs) < 2:
        raise CalibrationError("refit: one sequence cannot be split into fitted and held-out text: give at least two")
    models = _Models(stack, plan)
    rows = [models.start(each) for each in inputs]
    gaps = gaps_of(stack, plan, parallel=models.are_parallel(rows[0]))
    held_out = max(1, round(HELD_OUT * len(rows)))
    changed: dict[str, Tensor] = {}
    findings: list[dict[str, Any]] = []
    for gap in track(gaps, "refitting"):
        for row in rows:
            models.run_to(gap, row)
        path, linear = models.linear_at(gap, rows[0])
        fitted, other = (models.sums(gap, linear, part) for part in (rows[:-held_out], rows[-held_out:]))
        errors = {ridge: other.error(fitted.solve(ridge)) for ridge in ridges}
        ridge = min(errors, key=errors.__getitem__)
        if math.isfinite(ridge):
            _correct(linear, (fitted + other).solve(ridge))
            changed |= {f"{path}.{name}": each for name, each in linear.named_parameters(recurse=False)}
        findings.append(
            {
                "site": f"{stack.prefix}{gap.site.site}",
                "ridge": ridge if math.isfinite(ridge) else None,
                "before": other.error(other.solve(math.inf)),
                "after": errors[ridge],
            }
        )
    model = apply_tensors(stack.model, _in_original(stack, plan, changed))
    settings = {"plan": plan.digest, "text": describe(tokens), "held_out": held_out, "ridges": [str(r) for r in ridges]}
    healed = Stack(model, name=f"{stack.name}, refitted", stack=stack.stack)
    return Healed(stack=healed, plan=plan, log=TrainingLog(settings), findings={"refit": findings})


@dataclass
class _SequenceRun:
    """A sequence on its way through both models.

    Attributes:
        contexts: of the original and of the pruned model.
        hidden: hidden states of both models [1, time, hidden].
        at: the boundaries of these hidden states.
    """

    contexts: tuple[Context, Context]
    hidden: tuple[Hidden, Hidden]
    at: tuple[Position, Position]


class _Models:
    """The original and the pruned model, whose linear layers are corrected one after another.

    Args:
        stack: the original.
        plan: the plan.
    """

    def __init__(self, stack: Stack, plan: Plan) -> None:
        self.stack, self.channels = stack, plan.widths.hidden
        self.pruned = Stack(share(alter_stack(stack, plan).model), name=stack.name, stack=stack.stack)
        self.skipped = plan.chain(stack.stack).skipped

    def start(self, inputs: Mapping[str, Tensor]) -> _SequenceRun:
        """Return a sequence before the first sublayer."""
        inputs = {name: each.to(self.stack.device) for name, each in inputs.items()}
        contexts = self.stack.context(inputs), self.pruned.context(inputs)
        return _SequenceRun(contexts, (contexts[0].h, contexts[1].h), (self.stack.positions[0],) * 2)

    def are_parallel(self, row: _SequenceRun) -> bool:
        """Return whether the sublayers of a layer have the same input."""
        context, first = row.contexts[0], self.stack.positions[0]
        return isinstance(self.stack.run(context.h, first, self.stack.after(first), context), Parallel)

    def run_to(self, gap: PlanGap, row: _SequenceRun) -> None:
        """Run the original to behind a gap, and the pruned model to before the sublayer in front of it."""
        y = self.stack.run(row.hidden[0], row.at[0], gap.behind, row.contexts[0])
        h = self.pruned.run(row.hidden[1], row.at[1], gap.site, row.contexts[1], self.skipped)
        self.stack.check_finite(gap.site, y)
        row.hidden, row.at = (y, h), (gap.behind, gap.site)

    def run_site(self, gap: PlanGap, row: _SequenceRun) -> Tensor:
        """Return the residual stream of the pruned model behind a gap [1, time, hidden]."""
        return join(self.pruned.run(row.hidden[1], gap.site, self.pruned.after(gap.site), row.contexts[1]))

    def linear_at(self, gap: PlanGap, row: _SequenceRun) -> tuple[str, nn.Linear | Conv1D]:
        """Return the linear layer that writes the result of a sublayer to the residual stream, and its path.

        Raises:
            MethodError: if there is none, as in a mixture of experts, or if a norm follows it.
        """
        architecture, layer = self.stack.architecture, self.pruned.layers[gap.site.layer]
        out = architecture[gap.site.sublayer].out or _found_by_trial(self.pruned, gap.site)
        linear = dict(layer.named_modules()).get(out)
        if isinstance(linear, nn.Linear | Conv1D) and linear.weight.is_floating_point():
            run = partial(self.run_site, gap, row)
            silent = _with_output(linear, torch.zeros_like, run)
            twice = _with_output(linear, silent.reshape_as, run)  # the residual stream is added to itself
            if float((twice.double() - 2 * silent.double()).norm()) <= SLIGHT * float(silent.double().norm()):
                return f"{architecture.prefix}{gap.site.layer}.{out}", linear
        raise MethodError(
            f"refit: {gap.site.site} of {self.stack.name} does not end in a linear layer that adds to the "
            "residual stream: train instead"
        )

    def sums(self, gap: PlanGap, linear: nn.Module, rows: Sequence[_SequenceRun]) -> LeastSquares:
        """Return the least-squares problem of a gap on some sequences, without padding."""
        return reduce(add, (self._sums_of(gap, linear, row) for row in rows))

    def _sums_of(self, gap: PlanGap, linear: nn.Module, row: _SequenceRun) -> LeastSquares:
        inputs: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        h = self.run_site(gap, row)
        hook.remove()
        real = row.contexts[0].real
        y = join(row.hidden[0])[real].double()
        y = y if self.channels is None else y[:, list(self.channels)]
        x = inputs[0].reshape(*real.shape, -1)[real]
        counts = torch.where(real.cumsum(-1)[real] == 1, FIRST, 1.0)
        return LeastSquares.of(x, y - h[real], y, counts, biased=linear.bias is not None)


def _check(stack: Stack, plan: Plan) -> None:
    """Raise a :class:`MethodError` for a plan or a model to which this does not apply."""
    plan.check_fits(stack)
    others = [name for name in ("weights", "modules", "adapters", "policies", "rewrite") if getattr(plan, name)]
    if others:
        raise MethodError(f"refit: this plan has {others[0]}, but only removed and narrower layers are corrected")
    if any(plan.chain(name).skipped for name in stack.stacks if name != stack.stack):
        raise MethodError(f"refit: this plan changes several stacks of {stack.name}: train instead")
    if stack.architecture.denoises:
        raise MethodError(f"refit: {stack.name} predicts masked tokens, and text without masks would be fitted")


def _found_by_trial(stack: Stack, site: Position) -> str:
    """Return the path in its layer of the only module without which a sublayer adds nothing; empty if there is none."""
    paths = {name.rpartition(".")[0] for name in silencers(stack, *site)}
    return paths.pop() if len(paths) == 1 else ""


def _with_output(linear: nn.Module, output: Callable[[Tensor], Tensor], run: Callable[[], Tensor]) -> Tensor:
    """Return the result of ``run`` while a linear layer returns ``output`` of its own output."""
    hook = linear.register_forward_hook(lambda module, args, own: output(own))
    found = run()
    hook.remove()
    return found


def _correct(linear: nn.Linear | Conv1D, correction: Tensor) -> None:
    """Add a correction [in, out] to the weight of a linear layer, and its last row to the bias if there is one."""
    weight = correction[: linear.nx if isinstance(linear, Conv1D) else linear.in_features]
    changes = {"weight": weight if isinstance(linear, Conv1D) else weight.T, "bias": correction[-1]}
    for name, parameter in list(linear.named_parameters(recurse=False)):
        new = (parameter.double() + changes[name]).to(parameter.dtype)
        setattr(linear, name, nn.Parameter(new, requires_grad=parameter.requires_grad))


def _in_original(stack: Stack, plan: Plan, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original's parameters with the changed entries of narrower ones."""
    if not plan.width:
        return dict(changed)
    kept = kept_entries(stack.model, stack.layers, stack.architecture.wiring, plan.widths)
    found = {}
    for name, tensor in changed.items():
        found[name] = stack.model.get_parameter(name).detach().clone()
        entries = kept.get(name, [None] * tensor.ndim)
        where = [torch.arange(size) if each is None else each for size, each in zip(tensor.shape, entries, strict=True)]
        found[name][torch.meshgrid(*where, indexing="ij")] = tensor.detach()
    return found
