"""Hourglass MLP: the skip at a wide latent, the hidden layer narrow, and many of them (Chen et al., arXiv 2510.01796).

    conventional     narrow -> wide -> narrow, the skip joins narrow ends
    hourglass        wide -> narrow -> wide, the skip joins wide ends; lifted there once, by numbers that may stay drawn

What the shape is worth is a question of parameters: ``frontier`` trains both families on a task and draws what each
reaches with how many. In a trained language model the same idea replaces a feed-forward sublayer by narrow sub-blocks
after one another (Liao et al., arXiv 2602.06471): they are fitted to what the sublayer did, and the model is healed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from lamella.data import Text
from lamella.errors import MethodError, listed
from lamella.files import Work
from lamella.measure import OutputDistance, record
from lamella.methods.hourglass_mlp.fitting import Fitted, fit_part
from lamella.methods.hourglass_mlp.modules import Sublayer
from lamella.methods.hourglass_mlp.network import inner_widths
from lamella.plan import ModelReference, ModuleReference, Plan, keep_modules, parameters_at
from lamella.registry import method
from lamella.results import Edit
from lamella.stack import Position, Stack
from lamella.train import TrainConfig

FITTING = TrainConfig(steps=2000, lr=1e-3, schedule="cosine", batch=256, eval_every=200, save_every=500)


@method("hourglass-mlp", paper="2510.01796", purpose="rewrite", brief={"blocks": 2, "steps": 4, "batch": 8})
def hourglass_mlp(
    stack: Stack,
    calibration: Text,
    *,
    layers: tuple[Annotated[int, Ge(0)], ...] = (),
    count: Annotated[int, Ge(1)] = 1,
    blocks: Annotated[int, Ge(1)] = 4,
    share: Annotated[float, Gt(0)] = 1.0,
    config: TrainConfig = FITTING,
    work: Work = Work(),
) -> Edit:
    """Put narrow sub-blocks in place of feed-forward sublayers, fitted to what those did.

    Fitting alone is no claim of quality: heal the model afterwards (``lamella heal``).

    Args:
        stack: a decoder; it is not changed.
        calibration: text whose tokens the sub-blocks are fitted to, 50 thousand or more; the last tenth judges the fit.
        layers: whose sublayers; when left out, those without which the output changes least.
        count: how many, where ``layers`` is left out.
        blocks: K sub-blocks in place of one sublayer.
        share: how many parameters their maps have, as a share of those that the sublayer's maps have; norms are cheap.
        config: of each regression; its seed is that of the sub-blocks' start, too.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The plan with the fitted sub-blocks, their sizes and R^2.

    Raises:
        MethodError: for layers that the model does not have, or a share below the smallest shape.
        CalibrationError: for too little text.
    """
    check(stack, layers, count)
    missed = {} if layers else sensitivity(stack, calibration)
    chosen = [Position(layer, "mlp") for layer in layers] or sorted(sorted(missed, key=missed.__getitem__)[:count])
    reference, folder = ModelReference.of(stack), work.directory()
    modules, networks, findings = {}, {}, []
    for position in chosen:
        [site] = reference.sites({stack.stack: [position]})
        held = [stack.model.get_parameter(name) for name in parameters_at(stack, [site])]
        maps = sum(each.numel() for each in held if each.ndim > 1)
        inner = inner_widths(stack.architecture.sizes_of(stack.config).hidden, int(share * maps), blocks)
        network = fresh(stack, position, inner, config.seed)
        fitted = fitted_to(stack, calibration, position, network, config, folder / site)
        modules[site], networks[site] = ModuleReference(name="hourglass-mlp", params={"inner": list(inner)}), network
        findings.append(
            {
                "site": site,
                "before": sum(each.numel() for each in held),
                "parameters": sum(each.numel() for each in network.parameters()),
                "inner": list(inner),
                "explained": {"fitted": fitted.explained[0], "held out": fitted.explained[1]},
                "rows": fitted.rows,
                "missed": missed.get(position),
            }
        )
    plan = keep_modules(Plan(model=reference, modules=modules), networks, folder)
    return Edit(stack=stack, plan=plan, findings={"sublayers": findings})


def check(stack: Stack, layers: Sequence[int], count: int) -> None:
    """Raise a :class:`MethodError` for sublayers that the model does not have."""
    if "mlp" not in stack.architecture.names:
        raise MethodError(f"{stack.name} has no feed-forward sublayers: give a model that has")
    if max(layers, default=0) >= len(stack) or len(set(layers)) < len(layers):
        raise MethodError(f"layers {listed(layers)}: give each once, of 0 to {len(stack) - 1}")
    if count > len(stack):
        raise MethodError(f"count {count}: {stack.name} has {len(stack)} layers, so give 1 to {len(stack)}")


def sensitivity(stack: Stack, calibration: Text) -> dict[Position, float]:
    """How far the output moves without each feed-forward sublayer: the Jensen-Shannon divergence in nats."""
    distance = OutputDistance(stack, calibration)
    return {each: distance.of([each]) for each in stack.positions if each.sublayer == "mlp"}


def fresh(stack: Stack, position: Position, inner: Sequence[int], seed: int) -> Sublayer:
    """Sub-blocks that have seen nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * len(stack) + position.layer)
        return Sublayer(stack, [position], inner=list(inner)).to(stack.device)


def fitted_to(
    stack: Stack, calibration: Text, position: Position, network: Sublayer, config: TrainConfig, out: Path
) -> Fitted:
    """Fit sub-blocks to what a sublayer reads and adds, from a start at the size of what it adds."""
    recording = record(stack, calibration, position)
    network.ffn.start(recording.variance**0.5)
    return fit_part(network.ffn, recording, config, out=out)
