"""What old inputs excite in the linear maps of a model (step 1).

    z = x / |max x|            x [tokens, n]: what a map reads of one sample; the largest entry of all, not of its size
    C = 1/256 sum over samples of z^T z

The 256 is a constant, however many samples there are. Matrices of further samples are simply added, so calibration can
go on, and what one injection of knowledge has measured serves the next. Maps that read the same share one matrix: the
queries, keys and values of a layer, its gate and up projection. Nothing but the matrices is held.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import CalibrationError, MethodError, NumericsError
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
    """

    matrices: dict[str, Tensor]
    reads: dict[str, str]
    tokens: int
    base: str

    def of(self, name: str) -> Tensor:
        """C [n, n] of what a map reads.

        Raises:
            MethodError: for a map that was not measured.
        """
        if name not in self.reads:
            raise MethodError(f"nothing was measured of what {name} reads: measure all maps that are to be trained")
        return self.matrices[self.reads[name]]

    def __add__(self, other: Covariance) -> Covariance:
        """Of the samples of both, such as those of the next round.

        Raises:
            MethodError: for other maps.
        """
        shapes = [{name: c.shape for name, c in each.matrices.items()} for each in (self, other)]
        if self.reads != other.reads or shapes[0] != shapes[1]:
            raise MethodError("these covariances are of other linear maps: measure the same ones")
        matrices = {name: each + other.matrices[name] for name, each in self.matrices.items()}
        return Covariance(matrices, self.reads, self.tokens + other.tokens, self.base)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        said = {"schema": SCHEMA, "reads": self.reads, "tokens": self.tokens, "base": self.base}
        with replacing(path) as partial:
            save_file(self.matrices, partial, {"lamella": json.dumps(said)})

    @classmethod
    def read(cls, path: Path, base: str | None = None) -> Covariance:
        """Read what :meth:`save` wrote.

        Args:
            base: the weights that it must be of; None for any.

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
            found = cls(matrices, dict(said["reads"]), int(said["tokens"]), str(said["base"]))
            whole = said["schema"] == SCHEMA and set(found.reads.values()) == set(matrices)
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole or any(each.ndim != 2 or each.shape[0] != each.shape[1] for each in matrices.values()):
            raise MethodError(f"{path} holds no covariances of inputs: give what --save-covariance has written")
        if base not in (None, found.base):
            raise MethodError(f"{path} is of other weights than this model has: measure again")
        if not all(bool(torch.isfinite(each).all()) for each in matrices.values()):
            raise NumericsError(f"{path} has values that are not finite: measure again")
        return found


@torch.no_grad()
def input_covariance(view: Any, names: Sequence[str], tokens: Tokens) -> Covariance:
    """Read old text with a model, and keep what its linear maps were given.

    Args:
        view: the model; hooks are set on its own modules and taken off again.
        names: of its linear maps.
        tokens: [sequences, time], or with an attention mask, whose padding is left out. One sequence is one sample.

    Raises:
        CalibrationError: for empty or too short text.
        NumericsError: for activations that are not finite, by the name of the map.
    """
    rows = sequences(tokens)
    matrices: dict[str, Tensor] = {}
    reads: dict[str, str] = {}
    given: dict[str, Tensor] = {}  # of the present sample: what was added up already
    real = torch.ones(0, dtype=torch.bool)

    def hook(name: str) -> Any:
        def read(_: Any, args: tuple[Tensor, ...]) -> None:
            [x] = args
            known = next((other for other, seen in given.items() if seen is x), None)
            reads.setdefault(name, known or name)
            if known is None:
                given[name] = x
                z = normalised(_real(x, real).float(), name)
                if name not in matrices:
                    matrices[name] = z.new_zeros(z.shape[1], z.shape[1])
                matrices[name].addmm_(z.T, z, alpha=1 / SAMPLES)  # in place: nothing as large is held beside it

        return read

    handles = [view.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for row in track(rows, "covariance of old inputs"):
            mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
            real = mask.bool()
            view(**{name: each.to(view.device) for name, each in row.items()}, use_cache=False)
            given.clear()
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in names if name not in reads]
    if silent:
        raise CalibrationError(f"{silent[0]} reads nothing when the model runs: leave it out")
    count = sum(int(row.get("attention_mask", torch.ones_like(row["input_ids"])).sum()) for row in rows)
    return Covariance(matrices, reads, count, revision(view))


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """What is no padding [tokens, n]; some layers see their tokens flattened."""
    rows, real = x.reshape(-1, x.shape[-1]), mask.flatten().to(x.device)
    return rows[real] if len(rows) == len(real) else rows


def normalised(x: Tensor, name: str = "x") -> Tensor:
    """z [tokens, n]: divided by the size of the largest entry, or by the largest size where that entry is next to 0.

    Raises:
        NumericsError: for values that are not finite.
    """
    if not torch.isfinite(x).all():
        raise NumericsError(f"what {name} reads of the old text is not finite: check the weights, or take float32")
    size, largest = float(x.abs().max()), abs(float(x.max()))
    scale = largest if largest > SLIGHT * size else size
    return x / scale if scale else x


def equal_rank(names: Mapping[str, tuple[int, int]], r: int) -> int:
    """The rank at which B alone has as many numbers as both halves of a LoRA of rank r.

    >>> layer = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
    ...          "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    >>> equal_rank(layer, 128)
    235

    Args:
        names: n (in) and m (out) of each map.
        r: of the LoRA.
    """
    both = sum(inputs + outputs for inputs, outputs in names.values())
    return max(1, r * both // sum(outputs for _, outputs in names.values()))
