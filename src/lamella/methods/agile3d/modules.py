"""The networks: the encoder, which runs once per scene, and the model that joins it to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import Clicks, apply_clicks
from lamella.methods.agile3d.decoder import ClickDecoder, EncodedScene
from lamella.methods.agile3d.scene import ClickScene, Tokens, tokenise
from lamella.methods.agile3d.sparse import Pairs, SparseConv, SparseGrids, transposed

MOMENTUM = 0.02  # momentum of the running statistics of batch norms


class SceneEncoder(Protocol):
    """The interface of an encoder; a custom one may wrap MinkowskiEngine or spconv.

    Attributes:
        dims: D, the number of coordinates of its scenes.
        channels: C, the number of feature channels.
        reach: distance around a click within which tokens weigh more in training, in the units of the coordinates.
    """

    dims: int
    channels: int
    reach: float

    def tokenise(self, scene: ClickScene) -> Tokens:
        """Return the tokens of a scene."""

    def __call__(self, scenes: Sequence[Tokens]) -> Tensor:
        """Return the concatenated features of the tokens of several scenes [N, C]."""


@dataclass(frozen=True)
class UNetWidths:
    """Widths and depths of a sparse U-Net; the defaults are the paper's (Res16UNet34C).

    Attributes:
        stem: channels at the finest level.
        down: channels after each halving of the resolution.
        up: channels after each doubling.
        blocks: number of residual blocks at each level, down path first.
    """

    stem: int = 32
    down: tuple[int, ...] = (32, 64, 128, 256)
    up: tuple[int, ...] = (256, 128, 96, 96)
    blocks: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)


NANO = UNetWidths(16, (32, 48), (32, 32), (1, 1, 1, 1))


class SparseUNet(nn.Module):
    """A residual U-Net over voxels with their colours as input (Choy et al., 2019).

    Args:
        widths: widths and depths of its levels.
        voxel: side of a voxel in metres; the paper uses 0.05.
    """

    dims = 3
    reach = 0.3  # metres: the paper's tau

    def __init__(self, widths: UNetWidths = UNetWidths(), voxel: float = 0.05) -> None:
        super().__init__()
        self.widths, self.voxel = widths, voxel
        self.channels = widths.up[-1]
        skips = (widths.stem, *widths.down[:-1])  # channels of each resolution on the way down
        blocks = iter(widths.blocks)
        self.stem = SparseConvBlock(3, widths.stem, 5**3)
        self.down = nn.ModuleList(
            Level(before, before, 0, after, next(blocks)) for before, after in pairwise((widths.stem, *widths.down))
        )
        self.up = nn.ModuleList(
            Level(before, after, skip, after, next(blocks))
            for (before, after), skip in zip(pairwise((widths.down[-1], *widths.up)), reversed(skips), strict=True)
        )

    def tokenise(self, scene: ClickScene) -> Tokens:
        """Return one token for each voxel that contains points."""
        return tokenise(scene, self.voxel)

    def forward(self, scenes: Sequence[Tokens]) -> Tensor:
        """Compute features at full resolution for the concatenated scenes [N, C]."""
        grid = SparseGrids([each.grid for each in scenes])
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
    """A change of resolution, followed by residual blocks at the new resolution.

    Args:
        before: input channels.
        changed: channels after the change of resolution.
        skip: channels of the skip connection from the down path.
        after: output channels.
        blocks: number of residual blocks.
    """

    def __init__(self, before: int, changed: int, skip: int, after: int, blocks: int) -> None:
        super().__init__()
        self.change = SparseConvBlock(before, changed, 2**3)
        self.blocks = nn.ModuleList(
            SparseResidualBlock(changed + skip if n == 0 else after, after) for n in range(blocks)
        )

    def forward(self, x: Tensor, pairs: Pairs, grid: SparseGrids, skip: Tensor | None = None) -> Tensor:
        """Compute the features of the cells of another resolution.

        Args:
            x: input features [N, before].
            pairs: pairs from the cells of ``x`` to those of ``grid``.
            grid: the cells of the output.
            skip: features of the skip connection, if any.
        """
        x = self.change(x, pairs, len(grid))
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for block in self.blocks:
            x = block(x, grid)
        return x


class SparseConvBlock(nn.Module):
    """A sparse convolution, a batch norm and a ReLU."""

    def __init__(self, channels_in: int, channels_out: int, offsets: int) -> None:
        super().__init__()
        self.conv = SparseConv(channels_in, channels_out, offsets)
        self.norm = nn.BatchNorm1d(channels_out, momentum=MOMENTUM)

    def forward(self, x: Tensor, pairs: Pairs, cells: int) -> Tensor:
        """Apply convolution, norm and activation, see :meth:`SparseConv.forward`."""
        return relu(self.norm(self.conv(x, pairs, cells)))


class SparseResidualBlock(nn.Module):
    """A residual block of two convolutions with a kernel of 3 cells a side."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = SparseConvBlock(channels_in, channels_out, 3**3)
        self.second = SparseConv(channels_out, channels_out, 3**3)
        self.norm = nn.BatchNorm1d(channels_out, momentum=MOMENTUM)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            linear = nn.Linear(channels_in, channels_out, bias=False)
            self.shortcut = nn.Sequential(linear, nn.BatchNorm1d(channels_out, momentum=MOMENTUM))

    def forward(self, x: Tensor, grid: SparseGrids) -> Tensor:
        """Apply the block to features [N, channels_in] of a grid.

        Args:
            x: features `[N, channels_in]`.
            grid: the sparse grid of the N voxels.
        """
        pairs = grid.neighbours(3)
        h = self.norm(self.second(self.first(x, pairs, len(grid)), pairs, len(grid)))
        return relu(h + self.shortcut(x))


class ClickSegmenter(nn.Module):
    """An encoder that runs once per scene, and a decoder that runs for every click.

    Args:
        encoder: a :class:`SparseUNet`, or any :class:`SceneEncoder` that is a module.
        decoder: the decoder, of the encoder's dimensions.
    """

    def __init__(self, encoder: SceneEncoder, decoder: ClickDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder.channels, decoder.hidden)
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.project.weight.device

    def tokenise(self, scene: ClickScene) -> Tokens:
        """Return the tokens of a scene, on the device of the model.

        Raises:
            CalibrationError: for an image if the model segments scenes in space, and vice versa.
        """
        if scene.coords.shape[1] != self.encoder.dims:
            kind = {2: "image", 3: "scene in space"}[self.encoder.dims]
            raise CalibrationError(
                f"{scene.name} is no {kind}, which this model segments: give another scene, or another model"
            )
        return self.encoder.tokenise(scene).to(self.device)

    def encode(self, scenes: Sequence[Tokens]) -> list[EncodedScene]:
        """Encode several scenes in one pass; in evaluation mode the result is the same as one by one."""
        f = self.project(self.encoder(scenes)).split([len(each) for each in scenes])
        return [EncodedScene(each, self.decoder.place(tokens.coords)) for each, tokens in zip(f, scenes, strict=True)]

    def decode(self, scene: EncodedScene, clicks: Clicks, layers: int | None = None) -> list[Tensor]:
        """Return the logits after each layer, see :meth:`ClickDecoder.forward`.

        Args:
            scene: the encoded scene.
            clicks: the clicks so far.
            layers: number of decoder layers to run; all if None.
        """
        found: list[Tensor] = self.decoder(scene, clicks, layers)
        return found

    @torch.no_grad()
    def labels(self, scene: EncodedScene, clicks: Clicks, layers: int | None = None) -> Tensor:
        """Predict the label of every token [N]; clicked tokens keep the label of their click.

        Args:
            scene: the encoded scene.
            clicks: the clicks so far.
            layers: number of decoder layers to run; all if None.
        """
        if not clicks:
            return torch.zeros(len(scene.f), dtype=torch.long, device=scene.f.device)
        return apply_clicks(self.decode(scene, clicks, layers)[-1].argmax(dim=1), clicks)
