"""Covariance of the inputs of a model's linear layers on old samples (step 1).

    z = x / |max x|            x [tokens, n]: input of a layer for one sample; max is the largest entry, not magnitude
    C = 1/256 sum over samples of z^T z

The 256 is a constant, independent of the number of samples. Matrices of further samples are simply added, so
calibration can continue, and the measurement of one round of knowledge injection serves the next. Layers with the same
input share one matrix: the queries, keys and values of a layer, its gate and up projection. Only the matrices are
stored.

For images with text, image positions are ordinary tokens, as in the paper. There are many of them, so they dominate C;
``balanced`` (an addition of Lamella) gives image and text of a sample equal weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.data import ImageText
from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.evaluate.scored import read_inputs
from lamella.files import replacing
from lamella.measure import Tokens, sequences
from lamella.needs import free_memory, memory_map
from lamella.plan.fingerprint import revision
from lamella.progress import track

SAMPLES = 256
SLIGHT = 1e-3  # relative to the largest magnitude: below it, the magnitude is used for scaling instead of the maximum
SCHEMA = "lamella.covariance/1"


@dataclass
class Covariance:
    """C of the inputs of linear layers.

    Attributes:
        matrices: [n, n], by the first of the layers with the same input.
        reads: the name of the matrix of every layer.
        tokens: number of tokens, without padding.
        base: fingerprint of the model's weights; see :func:`lamella.plan.fingerprint.revision`.
        images: number of tokens that were image positions.
        later: fingerprints of models that were trained from those weights with it; it serves their next round.
    """

    matrices: dict[str, Tensor]
    reads: dict[str, str]
    tokens: int
    base: str
    images: int = 0
    later: tuple[str, ...] = ()

    def of(self, name: str) -> Tensor:
        """C [n, n] of the input of a linear layer.

        Raises:
            MethodError: for a layer that was not measured.
        """
        if name not in self.reads:
            raise MethodError(f"the input of {name} was not measured: measure all linear layers that are to be trained")
        return self.matrices[self.reads[name]]

    def __add__(self, other: Covariance) -> Covariance:
        """Combine the samples of both, such as those of the next round; the result belongs to the model of ``other``.

        Raises:
            MethodError: for other layers.
        """
        shapes = [{name: c.shape for name, c in each.matrices.items()} for each in (self, other)]
        if self.reads != other.reads or shapes[0] != shapes[1]:
            raise MethodError("these covariances are of different linear layers: measure the same ones")
        matrices = {name: each + other.matrices[name] for name, each in self.matrices.items()}
        return Covariance(matrices, self.reads, self.tokens + other.tokens, other.base, self.images + other.images)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        metadata = {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("reads", "tokens", "base", "images", "later")},
        }
        with replacing(path) as partial:
            save_file(self.matrices, partial, {"lamella": json.dumps(metadata)})

    @classmethod
    def read(cls, path: Path, base: str | None = None) -> Covariance:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            base: the weights that it must belong to, directly or as ``later``; None for any.

        Raises:
            MethodError: for a file that is missing, damaged, or of other weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("lamella", "{}"))
                matrices = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise MethodError(f"cannot read {path} ({type(error).__name__}): measure again") from None
        try:
            counts = int(metadata["tokens"]), int(metadata.get("images", 0))
            later = tuple(map(str, metadata.get("later", ())))
            found = cls(matrices, dict(metadata["reads"]), counts[0], str(metadata["base"]), counts[1], later)
            whole = metadata["schema"] == SCHEMA and set(found.reads.values()) == set(matrices)
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole or any(each.ndim != 2 or each.shape[0] != each.shape[1] for each in matrices.values()):
            raise MethodError(f"{path} holds no covariances of inputs: give a file written by --save-covariance")
        if base not in (None, found.base, *found.later):
            raise MethodError(f"{path} belongs to other weights than this model's: measure again")
        if not all(bool(torch.isfinite(each).all()) for each in matrices.values()):
            raise NumericsError(f"{path} has values that are not finite: measure again")
        return found


@torch.no_grad()
def input_covariance(
    view: Any,
    names: Sequence[str],
    old: Tokens | ImageText,
    *,
    balanced: bool = False,
    folder: Path | None = None,
    most: int | None = None,
) -> Covariance:
    """Run a model on old samples, and accumulate the covariance of its linear layers' inputs.

    Args:
        view: the model; hooks are registered on its modules and removed again.
        names: names of its linear layers.
        old: tokens [sequences, time], or with an attention mask, whose padding is ignored; one sequence is one sample.
            Or images with text, one row each, with prompt and answers.
        balanced: give image positions as much weight as all text, in each sample that has both.
        folder: where matrices are kept if they take more than ``most``: the model then runs on all samples once to see
            which inputs are the same, and once for each part of the matrices, which are read from there with the same
            result.
        most: bytes of matrices in memory; a quarter of the free memory by default.

    Returns:
        The covariances.

    Raises:
        CalibrationError: for empty or too short text.
        NumericsError: for activations that are not finite, with the name of the layer.
    """
    sizes = {name: 4 * view.get_submodule(name).weight.shape[-1] ** 2 for name in names}
    most = free_memory() // 4 if most is None else most
    sums = _CovarianceSums(adds=folder is None or sum(sizes.values()) <= most)
    tokens, images = _run(view, names, old, balanced, sums)
    silent = [name for name in names if name not in sums.reads]
    if silent:
        raise CalibrationError(f"{silent[0]} gets no input when the model runs: exclude it")
    matrices = sums.matrices
    for number, part in enumerate([] if sums.adds else _parts(sums.reads.values(), sizes, most)):
        assert folder is not None
        some = _CovarianceSums()
        _run(view, part, old, balanced, some)
        matrices |= memory_map(some.matrices, folder / f"covariance-{number}.safetensors")
    return Covariance(matrices, sums.reads, tokens, revision(view), images)


def _parts(names: Iterable[str], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return layers with different inputs, in parts whose matrices take at most that many bytes."""
    parts: list[list[str]] = [[]]
    for name in dict.fromkeys(names):
        if parts[-1] and sum(sizes[each] for each in [*parts[-1], name]) > most:
            parts.append([])
        parts[-1].append(name)
    return parts


def _run(
    view: Any, names: Sequence[str], old: Tokens | ImageText, balanced: bool, sums: _CovarianceSums
) -> tuple[int, int]:
    """Run a model on all samples, and return how many tokens and how many image positions they have."""
    tokens = images = 0
    handles = [view.get_submodule(name).register_forward_pre_hook(partial(sums.read, name)) for name in names]
    try:
        for row, real, image in _samples(old):
            sums.begin(_weights(real, image) if balanced else real.float())
            tokens, images = tokens + int(real.sum()), images + int(image.sum())
            inputs = read_inputs(view, row)
            view(**{name: each.to(view.device) for name, each in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tokens, images


@dataclass
class _CovarianceSums:
    """C of each input, accumulated while samples run.

    Attributes:
        matrices, reads: see :class:`Covariance`.
        seen: inputs of the current sample that were added, by the first layer that gets them.
        weights: weight of each position of the sample [time]; 0 is padding.
        adds: whether matrices are added; otherwise only ``reads`` is filled.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.ones(0))
    adds: bool = True

    def begin(self, weights: Tensor) -> None:
        """Start another sample."""
        self.seen, self.weights = {}, weights

    def read(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward hook of a layer: add its input, unless another layer has the same input."""
        [x] = args
        known = next((other for other, seen in self.seen.items() if seen is x), None)
        self.reads.setdefault(name, known or name)
        if known is not None:
            return
        self.seen[name] = x
        if not self.adds:
            return
        z = _weighted(x, self.weights, name)
        if name not in self.matrices:
            self.matrices[name] = z.new_zeros(z.shape[1], z.shape[1])
        self.matrices[name].addmm_(z.T, z, alpha=1 / SAMPLES)  # in place, to avoid a second matrix of this size


def _samples(old: Tokens | ImageText) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Iterate over samples: the model's inputs, a mask of real tokens, and a mask of image positions [time]."""
    what = "covariance of old inputs"
    if isinstance(old, ImageText):
        for sample in track(old, what):
            batch = old.batch([sample])
            yield batch, batch["attention_mask"][0].bool(), old.kinds(batch)["image"][0]
        return
    for row in track(sequences(old), what):
        real = row.get("attention_mask", torch.ones_like(row["input_ids"]))[0].bool()
        yield row, real, torch.zeros_like(real)


def _weights(real: Tensor, image: Tensor) -> Tensor:
    """Weight of each position [time], so that image and text have equal weight and the total is unchanged."""
    parts = [part for part in (image, real & ~image) if part.any()]
    weights = torch.zeros(len(real))
    for part in parts:
        weights[part] = int(real.sum()) / (len(parts) * int(part.sum()))
    return weights


def _weighted(x: Tensor, weights: Tensor, name: str) -> Tensor:
    """Compute z [tokens, n] of a layer's input, without padding; inputs of experts are not weighted."""
    rows, weights = x.reshape(-1, x.shape[-1]), weights.to(x.device)
    if len(rows) != len(weights):
        return normalised(rows.float(), name)
    real = weights > 0
    return normalised(rows[real].float(), name) * weights[real, None].sqrt()


def normalised(x: Tensor, name: str = "x") -> Tensor:
    """Divide by the magnitude of the largest entry, or by the largest magnitude if that entry is close to 0.

    Args:
        x: input of a layer [tokens, n].
        name: name of the layer for messages.

    Raises:
        NumericsError: for values that are not finite.
    """
    if not torch.isfinite(x).all():
        raise NumericsError(f"the input of {name} is not finite on the old samples: check the weights or use float32")
    size, largest = float(x.abs().max()), abs(float(x.max()))
    scale = largest if largest > SLIGHT * size else size
    return x / scale if scale else x


def equal_rank(names: Mapping[str, tuple[int, int]], r: int) -> int:
    """Compute the largest rank at which B alone has at most as many parameters as both factors of a LoRA of rank r.

    For a layer with fewer outputs than the rank, only as many directions as outputs count: the others are empty.

    >>> layer = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
    ...          "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    >>> equal_rank(layer, 128)
    235

    Args:
        names: n (in) and m (out) of each linear layer.
        r: rank of the LoRA.
    """
    both = r * sum(inputs + outputs for inputs, outputs in names.values())
    outputs = [each for _, each in names.values()]
    found = max(1, both // sum(outputs))
    while found < max(outputs) and sum(each * min(found + 1, each) for each in outputs) <= both:
        found += 1
    return found
