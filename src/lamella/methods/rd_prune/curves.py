"""Rate-distortion curves: how much the output changes when a single layer loses its smallest weights.

    layer i    w sorted by |w|:  [smallest ... largest]
    amount q   the first int(q n / Q) of them are zero, all other layers are unchanged
    distortion of an input: the mean squared difference of the output, which are the logits

Measurements run on a copy that shares the model's tensors; the model itself is never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.files import Journal
from lamella.methods.rd_prune.probes import Inputs, Probe, module_of, probe_of
from lamella.plan import fingerprint
from lamella.progress import tracker
from lamella.reading import read_journal
from lamella.stack import Stack, Weight, matrices

Reduce = Literal["mean", "worst"]
SCHEMA = "lamella.curves/1"
HEADER = {"schema", "weights", "calibration", "output", "grid", "layers"}


@dataclass(frozen=True)
class Distortion:
    """A mean squared difference of outputs.

    Attributes:
        mean: mean over inputs.
        worst: that of the worst input.
    """

    mean: float
    worst: float

    @classmethod
    def of(cls, per_input: Tensor) -> Distortion:
        """Reduce the distortions of single inputs [inputs]."""
        return cls(float(per_input.mean()), float(per_input.max()))


@dataclass(frozen=True)
class Curve:
    """The measurements of one layer.

    Attributes:
        size: number of weights of the layer.
        zeros: number of weights that are already zero; removing these costs nothing and is not measured.
        uses: how often an input (for a decoder: a token) multiplies with each weight; 0 where that could not be
            counted.
        severs: whether the output no longer depends on the input without the layer.
        mean: mean distortions at the amounts 0/Q to Q/Q [Q + 1].
        worst: worst distortions at these amounts [Q + 1].
    """

    size: int
    zeros: int
    uses: float
    severs: bool
    mean: list[float]
    worst: list[float]


@dataclass(frozen=True)
class Curves:
    """The curves of all layers of a model on one calibration set; they serve any budget.

    Attributes:
        header: hash of the weights, calibration data and grid that they belong to.
        silent: distortion of an all-zero output, above which a prediction is meaningless.
        layers: each layer's curve, by the name of its matrix.
    """

    header: dict[str, Any]
    silent: Distortion
    layers: dict[str, Curve] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Q, the number of steps of a curve."""
        return int(self.header["grid"])

    @property
    def sizes(self) -> np.ndarray:
        """The number of weights of each layer [layers]."""
        return np.array([curve.size for curve in self.layers.values()], np.int64)

    @cached_property
    def pruned(self) -> np.ndarray:
        """The number of weights that each amount removes [layers, Q + 1]."""
        return self.sizes[:, None] * np.arange(self.grid + 1) // self.grid

    def distortion(self, reduce: Reduce) -> np.ndarray:
        """Return the curves [layers, Q + 1], in float64."""
        return np.array([getattr(curve, reduce) for curve in self.layers.values()])

    def check_model(self, model: nn.Module) -> None:
        """Check that the curves belong to a model with its present weights.

        Raises:
            MethodError: when they belong to other weights.
        """
        if self.header["weights"] != fingerprint.tensors(model):
            raise MethodError("these curves belong to other weights than those of this model: measure them again")

    @classmethod
    def read(cls, path: str | Path) -> Curves:
        """Read the file that :func:`rate_distortion` wrote.

        Raises:
            MethodError: when the file is missing, has another format, or is incomplete.
        """
        found = _read(Path(path))
        if found is None or set(found.layers) != set(found.header["layers"]):
            raise MethodError(f"{path}: holds no complete curves: measure them again")
        return found


def rate_distortion(
    model: nn.Module | Stack,
    inputs: Inputs,
    *,
    grid: int = 100,
    path: str | Path | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Curves:
    """Measure the curve of every matrix of a model (linear layers, convolutions, experts).

    It takes up to layers x grid forward passes over the inputs, in eval mode; batch norm statistics do not change.
    Weights that are already zero (by an earlier round's masks) are not measured again.

    Args:
        model: any torch module, or a stack; the stack of a decoder is measured faster. It is not changed.
        inputs: for a module, its input [inputs, ...], or several by name; for a decoder, token ids [sequences, time],
            alone or with an ``attention_mask``. A few hundred, without labels. Standard-normal noise works too.
        grid: Q, the number of steps between nothing and everything; the authors' default.
        path: a file to which results are written as they are measured; an interrupted measurement resumes from it, and
            a complete one is read.
        output: maps the module's return value to its outputs before the softmax [inputs, ...]; if None, ``.logits``,
            the first of a tuple, or the tensor itself.

    Raises:
        MethodError: for a grid below 1, a model without matrices, or a file that cannot be written or holds other
            curves.
        CalibrationError: for empty inputs.
        NumericsError: when the output of the model is not finite.
    """
    if grid < 1:
        raise MethodError(f"grid {grid}: give at least one step between nothing and everything")
    found = prunable(model)
    names = list(found)
    header = {
        "schema": SCHEMA,
        "weights": fingerprint.tensors(module_of(model)),
        "calibration": _digest(inputs),
        "output": "logits" if output is None else getattr(output, "__qualname__", type(output).__qualname__),
        "grid": grid,
        "layers": names,
    }
    curves = None if path is None else _read(Path(path))
    if curves is not None:
        _check_same(curves.header, header, Path(path or ""))
        if set(curves.layers) == set(names):
            return Curves(curves.header, curves.silent, {name: curves.layers[name] for name in names})
    probe = probe_of(model, inputs, output)
    done = {} if curves is None else dict(curves.layers)
    silent = Distortion.of(probe.silent)
    journal = _journal(path, header | {"silent": vars(silent)})
    uses = probe.uses()
    with tracker("rate-distortion curves", len(names) * grid) as count:
        for name in names:
            if name not in done:
                done[name] = _curve(probe, found[name], grid, uses.get(name, 0.0), count)
                journal.add({"layer": name} | vars(done[name]))
            else:
                count(grid)
    return Curves(header, silent, {name: done[name] for name in names})


def prunable(model: nn.Module | Stack) -> dict[str, Weight]:
    """Return the matrices of a model by name.

    Raises:
        MethodError: when it has none.
    """
    found = matrices(module_of(model))
    if not found:
        raise MethodError(
            f"a {type(module_of(model)).__name__} has no linear layer and no convolution: nothing to prune"
        )
    return found


def magnitude_order(weight: Tensor) -> Tensor:
    """Return the flat indices of a matrix in the order of growing magnitude [weights]; ties keep their order."""
    return weight.detach().abs().flatten().argsort(stable=True)


def zero_at(weight: Tensor, indices: Tensor) -> Tensor:
    """Return a copy of a matrix with zeros at some indices of its flattened form.

    Args:
        weight: the matrix.
        indices: indices into the flattened matrix `[removed]`.
    """
    changed = weight.detach().clone(memory_format=torch.contiguous_format)
    changed.view(-1)[indices] = 0
    return changed


@torch.no_grad()
def joint_distortion(
    model: nn.Module | Stack,
    masks: Mapping[str, Tensor],
    inputs: Inputs,
    output: Callable[[Any], Tensor] | None = None,
) -> Distortion:
    """Measure the distortion with all layers masked together, which the sum of the curves predicts.

    Args:
        model: as in :func:`rate_distortion`.
        masks: the weights to keep of each matrix, by name, bool in its shape.
        inputs: as in :func:`rate_distortion`.
        output: as in :func:`rate_distortion`.
    """
    return masked_distortion(probe_of(model, inputs, output), matrices(module_of(model)), masks)


@torch.no_grad()
def masked_distortion(probe: Probe, found: Mapping[str, Weight], masks: Mapping[str, Tensor]) -> Distortion:
    """Measure the joint distortion of masks with an existing probe.

    Args:
        probe: a probe of the model; its matrices are restored afterwards.
        found: the matrices of the model by name.
        masks: masks of the weights to keep by the name of the matrix, each with the shape of its matrix, bool.
    """
    originals = {name: found[name].of(probe.model) for name in masks}
    try:
        for name, weight in originals.items():
            found[name].put(probe.model, weight.detach() * masks[name].to(weight.device))
        return Distortion.of(probe.distortion(list(masks)))
    finally:
        for name, weight in originals.items():
            found[name].put(probe.model, weight)


@torch.no_grad()
def _curve(probe: Probe, matrix: Weight, grid: int, uses: float, count: Callable[..., None]) -> Curve:
    weight = matrix.of(probe.model)
    order = magnitude_order(weight)
    zeros = int((weight == 0).sum())
    distortions = {0: Distortion(0.0, 0.0)}
    severs = False
    try:
        for q in range(1, grid + 1):
            pruned = matrix.size * q // grid
            if pruned <= zeros:
                distortions[q] = distortions[0]
            else:
                matrix.put(probe.model, zero_at(weight, order[:pruned]))
                distortions[q] = Distortion.of(probe.distortion([matrix.name]))
                severs = q == grid and probe.is_constant
            count(note=matrix.name)
    finally:
        matrix.put(probe.model, weight)
    return Curve(
        matrix.size,
        zeros,
        uses,
        severs,
        [distortions[q].mean for q in range(grid + 1)],
        [distortions[q].worst for q in distortions],
    )


def _digest(inputs: Inputs) -> str:
    parts = {"": inputs} if isinstance(inputs, Tensor) else inputs
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {list(parts[name].shape)} {parts[name].dtype};".encode())
        digest.update(parts[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# The file of curves is a journal: its first line is the header, followed by one line for each layer.


def _journal(path: str | Path | None, header: dict[str, Any]) -> Journal:
    try:
        journal = Journal(None if path is None else Path(path), _is_line)
    except OSError as error:
        raise MethodError(f"{path}: cannot write curves there ({error.strerror}): give another file") from None
    if not journal.found:
        journal.add(header)
    return journal


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and (set(line) > HEADER or set(line) == {"layer", *Curve.__dataclass_fields__})


def _read(path: Path) -> Curves | None:
    """Read a file of curves up to the first incomplete line; None if there is no file."""
    if not path.exists():
        return None
    try:
        header, *lines = read_journal(path, _is_line)
        silent = Distortion(**header.pop("silent"))
        if header["schema"] != SCHEMA:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise MethodError(f"{path}: is not a file of rate-distortion curves: give another file") from None
    return Curves(header, silent, {line.pop("layer"): Curve(**line) for line in lines})


def _check_same(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    causes = {"layers": "another model", "weights": "other weights", "calibration": "other calibration data"}
    causes |= {
        key: f"{what} {theirs[key]}, not {ours[key]}" for key, what in (("output", "the"), ("grid", "a grid of"))
    }
    for key in ("layers", "weights", "calibration", "output", "grid"):
        if theirs[key] != ours[key]:
            raise MethodError(f"{path}: holds the curves of {causes[key]}: give another file, or remove this one")
