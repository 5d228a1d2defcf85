"""The networks: an encoder that runs once a scene, and the model that joins it to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import Clicks, overwritten
from lamella.methods.agile3d.decoder import ClickDecoder, Encoded
from lamella.methods.agile3d.scene import Scene, Tokens, tokenise
from lamella.methods.agile3d.sparse import Grids, Pairs, SparseConv, transposed

MOMENTUM = 0.02  # of the running statistics of batch norms


class Encoder(Protocol):
    """What a model needs of an encoder; one of your own may wrap MinkowskiEngine or spconv.

    Attributes:
        dims: D, of the coordinates of its scenes.
        channels: C, of its features.
        reach: how far around a click tokens count for more in training, in the units of the coordinates.
    """

    dims: int
    channels: int
    reach: float

    def tokenise(self, scene: Scene) -> Tokens:
        """The tokens of a scene."""

    def __call__(self, scenes: Sequence[Tokens]) -> Tensor:
        """The features of the tokens of several scenes, behind one another [N, C]."""


@dataclass(frozen=True)
class Widths:
    """How wide and deep a sparse U-Net is; left out, as in the paper (Res16UNet34C).

    Attributes:
        stem: channels at the finest level.
        down: channels after each halving of the resolution.
        up: channels after each doubling.
        blocks: residual blocks at each level, those on the way down first.
    """

    stem: int = 32
    down: tuple[int, ...] = (32, 64, 128, 256)
    up: tuple[int, ...] = (256, 128, 96, 96)
    blocks: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)


NANO = Widths(16, (32, 48), (32, 32), (1, 1, 1, 1))


class SparseUNet(nn.Module):
    """A residual U-Net over voxels, whose input is their colour (Choy et al., 2019).

    Args:
        widths: of its levels.
        voxel: side of a voxel, in metres; the paper's 0.05.
    """

    dims = 3
    reach = 0.3  # metres: the paper's tau

    def __init__(self, widths: Widths = Widths(), voxel: float = 0.05) -> None:
        super().__init__()
        self.widths, self.voxel = widths, voxel
        self.channels = widths.up[-1]
        skips = (widths.stem, *widths.down[:-1])  # channels of each resolution on the way down
        blocks = iter(widths.blocks)
        self.stem = Convolved(3, widths.stem, 5**3)
        self.down = nn.ModuleList(
            Level(before, before, 0, after, next(blocks)) for before, after in pairwise((widths.stem, *widths.down))
        )
        self.up = nn.ModuleList(
            Level(before, after, skip, after, next(blocks))
            for (before, after), skip in zip(pairwise((widths.down[-1], *widths.up)), reversed(skips), strict=True)
        )

    def tokenise(self, scene: Scene) -> Tokens:
        """One token for each voxel with points in it."""
        return tokenise(scene, self.voxel)

    def forward(self, scenes: Sequence[Tokens]) -> Tensor:
        """Features at full resolution [N, C]."""
        grid = Grids([each.grid for each in scenes])
        x = self.stem(torch.cat([each.colours for each in scenes]), grid.neighbours(5), len(grid))
        passed = []
        for level in self.down:
            coarse, pairs = grid.coarser
            passed.append((x, grid, pairs))
            x, grid = level(x, pairs, coarse), coarse
        for level in self.up:
            skip, grid, pairs = passed.pop()
            x = level(x, transposed(pairs), grid, skip)
        return x


class Level(nn.Module):
    """A change of resolution, and residual blocks at the new one.

    Args:
        before, changed, after: channels before and after the change, and after the blocks.
        skip: channels that join from the way down.
        blocks: how many.
    """

    def __init__(self, before: int, changed: int, skip: int, after: int, blocks: int) -> None:
        super().__init__()
        self.change = Convolved(before, changed, 2**3)
        self.blocks = nn.ModuleList(Block(changed + skip if n == 0 else after, after) for n in range(blocks))

    def forward(self, x: Tensor, pairs: Pairs, grid: Grids, skip: Tensor | None = None) -> Tensor:
        """Features of one resolution along pairs to those of the cells of another."""
        x = self.change(x, pairs, len(grid))
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for block in self.blocks:
            x = block(x, grid)
        return x


class Convolved(nn.Module):
    """A sparse convolution, a batch norm and a rectifier."""

    def __init__(self, channels_in: int, channels_out: int, offsets: int) -> None:
        super().__init__()
        self.conv = SparseConv(channels_in, channels_out, offsets)
        self.norm = nn.BatchNorm1d(channels_out, momentum=MOMENTUM)

    def forward(self, x: Tensor, pairs: Pairs, cells: int) -> Tensor:
        return relu(self.norm(self.conv(x, pairs, cells)))


class Block(nn.Module):
    """A residual block of two convolutions of 3 cells a side."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = Convolved(channels_in, channels_out, 3**3)
        self.second = SparseConv(channels_out, channels_out, 3**3)
        self.norm = nn.BatchNorm1d(channels_out, momentum=MOMENTUM)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            linear = nn.Linear(channels_in, channels_out, bias=False)
            self.shortcut = nn.Sequential(linear, nn.BatchNorm1d(channels_out, momentum=MOMENTUM))

    def forward(self, x: Tensor, grid: Grids) -> Tensor:
        pairs = grid.neighbours(3)
        h = self.norm(self.second(self.first(x, pairs, len(grid)), pairs, len(grid)))
        return relu(h + self.shortcut(x))


class ClickSegmenter(nn.Module):
    """An encoder that sees a scene once, and a decoder that answers every click.

    Args:
        encoder: a :class:`SparseUNet`, or any :class:`Encoder` that is a module.
        decoder: of the encoder's dimensions.
    """

    def __init__(self, encoder: Encoder, decoder: ClickDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder.channels, decoder.hidden)
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    def tokenise(self, scene: Scene) -> Tokens:
        """The tokens of a scene, where the model is.

        Raises:
            CalibrationError: for a picture where the model segments scenes in space, and the other way round.
        """
        if scene.coords.shape[1] != self.encoder.dims:
            kind = {2: "picture", 3: "scene in space"}[self.encoder.dims]
            raise CalibrationError(f"{scene.name} is no {kind}, as this model segments: give one, or another model")
        return self.encoder.tokenise(scene).to(self.device)

    def encode(self, scenes: Sequence[Tokens]) -> list[Encoded]:
        """Several scenes in one pass; each is encoded as it is alone, once the norms no longer train."""
        f = self.project(self.encoder(scenes)).split([len(each) for each in scenes])
        return [Encoded(each, self.decoder.place(tokens.coords)) for each, tokens in zip(f, scenes, strict=True)]

    def decode(self, scene: Encoded, clicks: Clicks, layers: int | None = None) -> list[Tensor]:
        """Logits after each layer; see :meth:`ClickDecoder.forward`."""
        found: list[Tensor] = self.decoder(scene, clicks, layers)
        return found

    @torch.no_grad()
    def labels(self, scene: Encoded, clicks: Clicks, layers: int | None = None) -> Tensor:
        """The label of every token [N]: clicked ones have the label that they were clicked with."""
        if not clicks:
            return torch.zeros(len(scene.f), dtype=torch.long, device=scene.f.device)
        return overwritten(self.decode(scene, clicks, layers)[-1].argmax(dim=1), clicks)
