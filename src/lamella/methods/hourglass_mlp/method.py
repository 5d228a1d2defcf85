"""Hourglass MLP: the skip at a wide latent, narrow hidden layers, and many of them (Chen et al., arXiv 2510.01796).

    conventional     narrow -> wide -> narrow, the skip connects narrow ends
    hourglass        wide -> narrow -> wide, the skip connects wide ends; lifted once, by weights that may stay random

What the shape is worth is a question of parameters: ``frontier`` trains both families on a task and plots what each
reaches at each parameter count. In a trained language model, the same idea replaces a feed-forward sublayer by a series
of narrow sub-blocks (Liao et al., arXiv 2602.06471): they are fitted to the sublayer's outputs, and the model is
healed.
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
from lamella.methods.hourglass_mlp.fitting import FitResult, fit_part
from lamella.methods.hourglass_mlp.modules import HourglassSublayer
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
    """Replace feed-forward sublayers by narrow sub-blocks that are fitted to their outputs.

    Fitting alone does not preserve quality: heal the model afterwards (``lamella heal``).

    Args:
        stack: a decoder; it is not changed.
        calibration: text whose tokens the sub-blocks are fitted to, 50 thousand or more; the last tenth validates the
            fit.
        layers: layers whose sublayers are replaced; defaults to those whose removal changes the output least.
        count: number of sublayers if ``layers`` is empty.
        blocks: K, the sub-blocks per sublayer.
        share: parameters of their linear layers as a fraction of those of the sublayer; norms are not counted.
        config: settings of each regression; its seed also initialises the sub-blocks.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The plan with the fitted sub-blocks, their sizes and R^2.

    Raises:
        MethodError: for layers that the model does not have, or a fraction below the smallest shape.
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
        network = new_sublayer(stack, position, inner, config.seed)
        fitted = fit_sublayer(stack, calibration, position, network, config, folder / site)
        modules[site], networks[site] = ModuleReference(name="hourglass-mlp", params={"inner": list(inner)}), network
        findings.append(
            {
                "site": site,
                "before": sum(each.numel() for each in held),
                "parameters": sum(each.numel() for each in network.parameters()),
                "inner": list(inner),
                "explained": {"fitted": fitted.explained[0], "held_out": fitted.explained[1]},
                "rows": fitted.rows,
                "missed": missed.get(position),
            }
        )
    plan = keep_modules(Plan(model=reference, modules=modules), networks, folder)
    return Edit(stack=stack, plan=plan, findings={"sublayers": findings})


def check(stack: Stack, layers: Sequence[int], count: int) -> None:
    """Check the requested sublayers.

    Args:
        stack: the model.
        layers: the requested layers.
        count: the requested number of layers.

    Raises:
        MethodError: for sublayers that the model does not have.
    """
    if "mlp" not in stack.architecture.names:
        raise MethodError(f"{stack.name} has no feed-forward sublayers: give a model that has them")
    if max(layers, default=0) >= len(stack) or len(set(layers)) < len(layers):
        raise MethodError(f"layers {listed(layers)}: layers must be different and between 0 and {len(stack) - 1}")
    if count > len(stack):
        raise MethodError(f"count {count}: {stack.name} has {len(stack)} layers: give 1 to {len(stack)}")


def sensitivity(stack: Stack, calibration: Text) -> dict[Position, float]:
    """Measure how much the output changes without each feed-forward sublayer: the Jensen-Shannon divergence in nats.

    Args:
        stack: the model.
        calibration: text to measure on.
    """
    distance = OutputDistance(stack, calibration)
    return {each: distance.of([each]) for each in stack.positions if each.sublayer == "mlp"}


def new_sublayer(stack: Stack, position: Position, inner: Sequence[int], seed: int) -> HourglassSublayer:
    """Create untrained sub-blocks.

    Args:
        stack: the model.
        position: position of the sublayer.
        inner: inner width of each sub-block.
        seed: random seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * len(stack) + position.layer)
        return HourglassSublayer(stack, [position], inner=list(inner)).to(stack.device)


def fit_sublayer(
    stack: Stack, calibration: Text, position: Position, network: HourglassSublayer, config: TrainConfig, out: Path
) -> FitResult:
    """Fit sub-blocks to the inputs and outputs of a sublayer, scaled initially to the size of its output.

    Args:
        stack: the model.
        calibration: text to record on.
        position: position of the sublayer.
        network: the sub-blocks, trained in place.
        config: settings of the regression.
        out: folder of the run.
    """
    recording = record(stack, calibration, position)
    network.ffn.start(recording.variance**0.5)
    return fit_part(network.ffn, recording, config, out=out)
