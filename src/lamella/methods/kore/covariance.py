"""What old inputs excite in the linear maps of a model (step 1).

    z = x / |max x|            x [tokens, n]: what a map reads of one sample; the largest entry of all, not of its size
    C = 1/256 sum over samples of z^T z

The 256 is a constant, however many samples there are. Matrices of further samples are simply added, so calibration can
go on, and what one injection of knowledge has measured serves the next. Maps that read the same share one matrix: the
queries, keys and values of a layer, its gate and up projection. Nothing but the matrices is held.

Of images with text, the positions of images are tokens as any other, as in the paper. They are many, so C is mostly
theirs; ``balanced`` (ours) lets image and text of a sample weigh alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from lamella.plan.fingerprint import revision
from lamella.progress import track

SAMPLES = 256
SLIGHT = 1e-3  # of the largest size: a maximum below is no scale to divide by, and the size takes its place
SCHEMA = "lamella.covariance/1"


@dataclass
class Covariance:
    """C of the inputs of linear maps.

    Attributes:
        matrices: [n, n], by the first of the maps that read the same.
        reads: the name of the matrix of every map.
        tokens: how many were read, without padding.
        base: which weights the model has; see :func:`lamella.plan.fingerprint.revision`.
        images: how many of the tokens were positions of images.
        later: which weights models have that began with those and learnt by it; it serves their next round.
    """

    matrices: dict[str, Tensor]
    reads: dict[str, str]
    tokens: int
    base: str
    images: int = 0
    later: tuple[str, ...] = ()

    def of(self, name: str) -> Tensor:
        """C [n, n] of what a map reads.

        Raises:
            MethodError: for a map that was not measured.
        """
        if name not in self.reads:
            raise MethodError(f"nothing was measured of what {name} reads: measure all maps that are to be trained")
        return self.matrices[self.reads[name]]

    def __add__(self, other: Covariance) -> Covariance:
        """Of the samples of both, such as those of the next round, of whose model it then is.

        Raises:
            MethodError: for other maps.
        """
        shapes = [{name: c.shape for name, c in each.matrices.items()} for each in (self, other)]
        if self.reads != other.reads or shapes[0] != shapes[1]:
            raise MethodError("these covariances are of other linear maps: measure the same ones")
        matrices = {name: each + other.matrices[name] for name, each in self.matrices.items()}
        return Covariance(matrices, self.reads, self.tokens + other.tokens, other.base, self.images + other.images)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        said = {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("reads", "tokens", "base", "images", "later")},
        }
        with replacing(path) as partial:
            save_file(self.matrices, partial, {"lamella": json.dumps(said)})

    @classmethod
    def read(cls, path: Path, base: str | None = None) -> Covariance:
        """Read what :meth:`save` wrote.

        Args:
            base: the weights that it must be of, or have led to; None for any.

        Raises:
            MethodError: for a file that is missing, damaged, or of other weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {}).get("lamella", "{}"))
                matrices = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise MethodError(f"{path} cannot be read ({type(error).__name__}): measure again") from None
        try:
            counts = int(said["tokens"]), int(said.get("images", 0))
            later = tuple(map(str, said.get("later", ())))
            found = cls(matrices, dict(said["reads"]), counts[0], str(said["base"]), counts[1], later)
            whole = said["schema"] == SCHEMA and set(found.reads.values()) == set(matrices)
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole or any(each.ndim != 2 or each.shape[0] != each.shape[1] for each in matrices.values()):
            raise MethodError(f"{path} holds no covariances of inputs: give what --save-covariance has written")
        if base not in (None, found.base, *found.later):
            raise MethodError(f"{path} is of other weights than this model has: measure again")
        if not all(bool(torch.isfinite(each).all()) for each in matrices.values()):
            raise NumericsError(f"{path} has values that are not finite: measure again")
        return found


@torch.no_grad()
def input_covariance(view: Any, names: Sequence[str], old: Tokens | ImageText, *, balanced: bool = False) -> Covariance:
    """Read old samples with a model, and keep what its linear maps were given.

    Args:
        view: the model; hooks are set on its own modules and taken off again.
        names: of its linear maps.
        old: tokens [sequences, time], or with an attention mask, whose padding is left out; one sequence is one sample.
            Or images with text, a row each, with prompt and answers.
        balanced: let the positions of images weigh as much as all text, in each sample that has both.

    Raises:
        CalibrationError: for empty or too short text.
        NumericsError: for activations that are not finite, by the name of the map.
    """
    sums = _Sums()
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
    silent = [name for name in names if name not in sums.reads]
    if silent:
        raise CalibrationError(f"{silent[0]} reads nothing when the model runs: leave it out")
    return Covariance(sums.matrices, sums.reads, tokens, revision(view), images)


@dataclass
class _Sums:
    """C of each input, added up while samples run.

    Attributes:
        matrices, reads: see :class:`Covariance`.
        seen: what was added up of the present sample, by the first map that reads it.
        weights: what each position of it counts [time]; 0 is padding.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.ones(0))

    def begin(self, weights: Tensor) -> None:
        """Go on with another sample."""
        self.seen, self.weights = {}, weights

    def read(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The hook of a map: add up what it reads, unless another one has read the same."""
        [x] = args
        known = next((other for other, seen in self.seen.items() if seen is x), None)
        self.reads.setdefault(name, known or name)
        if known is not None:
            return
        self.seen[name] = x
        z = _weighted(x, self.weights, name)
        if name not in self.matrices:
            self.matrices[name] = z.new_zeros(z.shape[1], z.shape[1])
        self.matrices[name].addmm_(z.T, z, alpha=1 / SAMPLES)  # in place: nothing as large is held beside it


def _samples(old: Tokens | ImageText) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Samples one by one: what the model takes, which positions are tokens, and which of these an image's [time]."""
    what = "covariance of old inputs"
    if isinstance(old, ImageText):
        for shown in track(old, what):
            batch = old.batch([shown])
            yield batch, batch["attention_mask"][0].bool(), old.kinds(batch)["image"][0]
        return
    for row in track(sequences(old), what):
        real = row.get("attention_mask", torch.ones_like(row["input_ids"]))[0].bool()
        yield row, real, torch.zeros_like(real)


def _weights(real: Tensor, image: Tensor) -> Tensor:
    """What each position counts [time], so that image and text count alike, and all of them as before."""
    parts = [part for part in (image, real & ~image) if part.any()]
    weights = torch.zeros(len(real))
    for part in parts:
        weights[part] = int(real.sum()) / (len(parts) * int(part.sum()))
    return weights


def _weighted(x: Tensor, weights: Tensor, name: str) -> Tensor:
    """z [tokens, n] of what a map reads, without padding; what an expert reads of a sample counts as it is."""
    rows, weights = x.reshape(-1, x.shape[-1]), weights.to(x.device)
    if len(rows) != len(weights):
        return normalised(rows.float(), name)
    real = weights > 0
    return normalised(rows[real].float(), name) * weights[real, None].sqrt()


def normalised(x: Tensor, name: str = "x") -> Tensor:
    """z [tokens, n]: divided by the size of the largest entry, or by the largest size where that entry is next to 0.

    Raises:
        NumericsError: for values that are not finite.
    """
    if not torch.isfinite(x).all():
        raise NumericsError(f"what {name} reads of the old samples is not finite: check weights, or take float32")
    size, largest = float(x.abs().max()), abs(float(x.max()))
    scale = largest if largest > SLIGHT * size else size
    return x / scale if scale else x


def equal_rank(names: Mapping[str, tuple[int, int]], r: int) -> int:
    """The rank at which B alone has as many numbers as both halves of a LoRA of rank r, and no more.

    Of a map with fewer outputs than directions, as many directions as outputs count: the others are empty.

    >>> layer = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
    ...          "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    >>> equal_rank(layer, 128)
    235

    Args:
        names: n (in) and m (out) of each map.
        r: of the LoRA.
    """
    both = r * sum(inputs + outputs for inputs, outputs in names.values())
    outputs = [each for _, each in names.values()]
    found = max(1, both // sum(outputs))
    while found < max(outputs) and sum(each * min(found + 1, each) for each in outputs) <= both:
        found += 1
    return found
