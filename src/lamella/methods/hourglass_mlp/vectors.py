"""The dataset: pairs of vectors, such as flattened images with their targets.

prototype    an image -> the first training image of its class (generative classification)
denoise      clamp(x + N(0, sigma^2), 0, 1) -> x, with new noise in every epoch
upscale      half the side, bicubic without antialiasing -> x
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamella.arrays import read_npz
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.measure import Recording
from lamella.reading import FileRefused
from lamella.signature import Fixture
from lamella.train import squared_error
from lamella.zoo.worlds import render, scenes

TASKS = ("prototype", "denoise", "upscale")
SOURCES = ("digits", "scenes")
DIGITS = 1300  # rows of scikit-learn's 1797 for training and validation; the others are the test split
HELD_OUT = 200  # of these, rows for validation
SHUFFLED = 42  # the seed of the fixed permutation


@dataclass(frozen=True)
class Noisy:
    """The squared error on inputs with new noise, which is only added in training mode.

    Attributes:
        sigma: standard deviation of the noise.
    """

    sigma: float

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of a batch."""
        x = noisy(batch["x"], self.sigma) if model.training else batch["x"]
        return squared_error(model, {"x": x, "y": batch["y"]})


def noisy(x: Tensor, sigma: float) -> Tensor:
    """Compute clamp(x + N(0, sigma^2), 0, 1) with torch's generator.

    Args:
        x: the inputs.
        sigma: standard deviation of the noise.
    """
    return (x + sigma * torch.randn_like(x)).clamp(0, 1)


@dataclass(frozen=True)
class Vectors:
    """A task from vectors to vectors in [0, 1], in three splits.

    Attributes:
        name: name of the task.
        train, held_out, test: rows x [d_x] and y [d_y]; ``held_out`` is used for selection and ``test`` for results.
        sigma: noise that is added to training rows in each step; the other splits have fixed noise. 0 for none.
    """

    metavar = "VECTORS"
    source_help = "digits:TASK or scenes:TASK with prototype, denoise or upscale, or a .npz file with x and y"
    example = Fixture("scenes:upscale", settings={"rows": 60, "side": 4})

    name: str
    train: Recording
    held_out: Recording
    test: Recording
    sigma: float = 0.0

    @classmethod
    def open(cls, name: str, *, rows: int = 2000, side: int = 16, sigma: float = 0.25) -> Vectors:
        """Open a built-in task, or a file.

        Args:
            name: a name in the format of ``source_help``; a file has x [rows, d_x] and y [rows, d_y], with y in [0, 1].
            rows: scenes to render; a fifth is for testing, a tenth for validation. Digits are not affected.
            side: pixels per side of a scene.
            sigma: standard deviation of the noise of ``denoise``.

        Returns:
            The task.

        Raises:
            CalibrationError: for an unknown task, an invalid file, or too few rows.
        """
        if name.endswith(".npz"):
            return cls._file(Path(name))
        source, _, task = name.partition(":")
        if source not in SOURCES or task not in TASKS or (source, task) == ("scenes", "prototype"):
            raise CalibrationError(f"there is no task '{name}': give {cls.source_help}")
        if source == "digits":
            images, classes = _digits()
            return cls.of(name, images, task, DIGITS, HELD_OUT, sigma, classes)
        if rows < 40 or side < 4 or 32 % side:
            raise CalibrationError(f"rows {rows}, side {side}: give at least 40 rows, and a side of 4, 8, 16 or 32")
        return cls.of(name, _scenes(rows, side), task, rows - rows // 5, rows // 10, sigma)

    @classmethod
    def of(
        cls,
        name: str,
        images: Tensor,
        task: str,
        first: int,
        held_out: int,
        sigma: float,
        classes: Tensor | None = None,
    ) -> Vectors:
        """Build a task from images.

        Args:
            name: name of the task.
            images: in [0, 1] [rows, side, side].
            task: one of :data:`TASKS`.
            first: number of rows for training and validation; the others are the test split.
            held_out: of these, the last ones, for validation.
            sigma: standard deviation of the noise of ``denoise``.
            classes: class of each image [rows], for ``prototype``.
        """
        x, y = images.flatten(1), images.flatten(1)
        begin = first - held_out
        noise = sigma if task == "denoise" else 0.0
        if task == "prototype":
            assert classes is not None
            y = x[[int((classes[:begin] == each).nonzero()[0]) for each in classes.tolist()]]
        elif task == "upscale":
            half = nn.functional.interpolate(images[:, None], scale_factor=0.5, mode="bicubic", antialias=False)
            x = half.clamp(0, 1).flatten(1)
        if noise:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SHUFFLED)
                x = torch.cat([x[:begin], noisy(x[begin:], noise)])
        train, chosen, test = (Recording(x[part], y[part]) for part in _parts(begin, first))
        return cls(name, train, chosen, test, noise)

    @classmethod
    def _file(cls, path: Path) -> Vectors:
        try:
            held = read_npz(path)
        except FileRefused as error:
            raise CalibrationError(f"{path}: not a valid file ({error}): save x and y with numpy.savez") from None
        if any(part not in held or held[part].dtype.kind not in "fiub" for part in ("x", "y")):
            raise CalibrationError(f"{path}: x and y of real numbers are missing: save them with numpy.savez")
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            x, y = (torch.from_numpy(held[part].astype(np.float32)) for part in ("x", "y"))
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 40 or not x.shape[1] or not y.shape[1]:
            raise CalibrationError(
                f"{path}: x is {list(x.shape)} and y {list(y.shape)}: give matrices with the same 40 or more rows"
            )
        if not torch.isfinite(x).all():
            raise CalibrationError(f"{path}: x has values that are not finite: remove these rows")
        if not (y.min() >= 0 and y.max() <= 1):
            raise CalibrationError(f"{path}: y must be between 0 and 1 like the outputs of the networks: rescale it")
        order = torch.from_numpy(np.random.default_rng(SHUFFLED).permutation(len(x)))
        first = len(x) - len(x) // 5
        parts = _parts(first - len(x) // 10, first)
        train, chosen, test = (Recording(x[order[part]], y[order[part]]) for part in parts)
        return cls(path.name, train, chosen, test)

    @property
    def d_in(self) -> int:
        """Input size."""
        return self.train.x.shape[1]

    @property
    def d_out(self) -> int:
        """Output size."""
        return self.train.y.shape[1]

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The training loss."""
        return Noisy(self.sigma) if self.sigma else squared_error

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, self.test):
            for each in (part.x, part.y):
                digest.update(each.contiguous().numpy().tobytes())
        rows = [len(self.train), len(self.held_out), len(self.test)]
        return {"name": self.name, "rows": rows, "sigma": self.sigma, "sha256": digest.hexdigest()}


def _parts(begin: int, first: int) -> tuple[slice, slice, slice]:
    return slice(0, begin), slice(begin, first), slice(first, None)


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in a fixed order: images in [0, 1] [1797, 8, 8] and their classes."""
    data = require("sklearn.datasets", "vision", "digits").load_digits()
    order = np.random.default_rng(SHUFFLED).permutation(len(data.images))
    return torch.from_numpy(data.images[order] / 16.0).float(), torch.from_numpy(data.target[order])


def _scenes(rows: int, side: int) -> Tensor:
    """Render shapes as greyscale images, reduced by averaging [rows, side, side]."""
    rendered = np.stack([render(scene, seed=(0, row)) for row, scene in enumerate(islice(scenes("calibration"), rows))])
    grey = torch.from_numpy(rendered).float().mean(dim=-1) / 255
    return nn.functional.avg_pool2d(grey, grey.shape[-1] // side)
