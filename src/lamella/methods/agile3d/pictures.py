"""Pictures: an image network in place of the sparse one, so that the same decoder segments what is clicked in them.

A picture is a scene whose points are its pixels. Tokens are the cells of 4 x 4 pixels of a feature pyramid (Lin et al.,
2017), coordinates are (x, y).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lamella.data.images import read_image
from lamella.errors import CalibrationError, CheckpointError, MethodError, listed
from lamella.extras import require
from lamella.methods.agile3d.scene import Scene, Tokens, tokenise
from lamella.zoo import timm_features

OBJECTS = ".objects.png"  # how the name of a picture of objects ends
STRIDE = 4  # pixels of a token's side
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of colours, as image networks are used to them


def pictured(colours: NDArray[np.uint8], objects: NDArray[np.int64] | None = None, name: str = "the picture") -> Scene:
    """A picture [height, width, 3], and the object of each of its pixels [height, width], as a scene."""
    y, x = np.indices(colours.shape[:2])
    coords = np.stack([x, y], axis=2).reshape(-1, 2).astype(np.float32)
    flat = None if objects is None else objects.reshape(-1)
    return Scene(coords, (colours.reshape(-1, 3) / 255).astype(np.float32), flat, name)


def read_scene(file: Path) -> Scene:
    """A picture from its file, with objects where a file ``.objects.png`` of the same name lies beside it.

    Raises:
        CalibrationError: when either cannot be read, or their sizes differ.
    """
    beside = file.with_name(file.stem + OBJECTS)
    known = None if not beside.is_file() else read_image(beside, file.name)
    colours = read_image(file, file.name)
    if known is None:
        return pictured(colours, name=file.name)
    if known.shape != colours.shape or (known != known[..., :1]).any():
        raise CalibrationError(
            f"{beside}: no grey picture of the size of {file.name}: give the number of the object at each pixel"
        )
    return pictured(colours, known[..., 0].astype(np.int64), file.name)


def parse_picture(data: bytes, path: PurePath) -> Scene:
    """A picture from the content of its file; what it is called is for messages.

    Raises:
        CalibrationError: when it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(data)
        return pictured(read_image(file, path.name), name=path.name)


def dump_picture(scene: Scene, labels: NDArray[np.int64]) -> bytes:
    """The content of a grey PNG whose values are the labels of the pixels [P], up to 255."""
    x, y = scene.coords.astype(np.int64).T
    grey = np.zeros((y.max() + 1, x.max() + 1), np.uint8)
    grey[y, x] = labels
    file = io.BytesIO()
    require("PIL.Image", "vision", "writing pictures").fromarray(grey).save(file, "PNG")
    return file.getvalue()


class PictureEncoder(nn.Module):
    """A network of timm, with a feature pyramid over those of its maps that are a quarter as wide, or less.

    Args:
        name: of timm's.
        channels: of the pyramid.
        pretrained: take timm's weights, which come from the network.
        weights: a file of them to take instead.
        frozen: train the pyramid alone.
        levels: the maps that it is made of, from 0, the finest; all when left out.

    Raises:
        MethodError: for a network that timm does not have, or that has no such maps.
        LamellaError: when timm is missing.
    """

    dims = 2
    reach = 24.0  # pixels: as many tokens as the paper's 0.3 m of its voxels

    def __init__(
        self,
        name: str = "resnet18",
        channels: int = 64,
        *,
        pretrained: bool = False,
        weights: Path | None = None,
        frozen: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.frozen = channels, frozen
        try:
            self.backbone = timm_features(name, weights, pretrained=pretrained)
        except CheckpointError as error:
            raise MethodError(f"{weights} does not hold the weights of {name}: give those ({error})") from None
        info = self.backbone.feature_info
        maps = [place for place, reduction in enumerate(info.reduction()) if reduction >= STRIDE]
        if not maps or info.reduction()[maps[0]] != STRIDE:
            raise MethodError(f"{name} has no features at a quarter of the width: choose another network")
        known = range(len(maps))
        if levels is not None and not (levels and set(levels) <= set(known)):
            raise MethodError(f"levels {listed(levels)}: {name} has {', '.join(map(str, known))}")
        self.finest = maps[0]
        self.maps = [maps[level] for level in sorted(set(known if levels is None else levels))]
        self.lateral = nn.ModuleList(nn.Conv2d(info.channels()[place], channels, 1) for place in self.maps)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> PictureEncoder:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def tokenise(self, scene: Scene) -> Tokens:
        """One token for each 4 x 4 pixels."""
        return tokenise(scene, STRIDE)

    def forward(self, scenes: Sequence[Tokens]) -> Tensor:
        """Features of the tokens of several pictures, behind one another [N, C]."""
        found = []
        for tokens in scenes:
            x, y = tokens.cells.T
            found.append(self.pyramid(self._pixels(tokens.scene))[0, :, y, x].T)
        return torch.cat(found)

    def pyramid(self, pixels: Tensor) -> Tensor:
        """The finest map of the pyramid [1, C, height / 4, width / 4] of a picture [1, 3, height, width]."""
        maps = self.backbone(pixels)
        x: Tensor | None = None
        for place, lateral in reversed([*zip(self.maps, self.lateral, strict=True)]):
            here = lateral(maps[place])
            x = here if x is None else here + interpolate(x, size=here.shape[-2:])
        assert x is not None
        fine: Tensor = self.smooth(interpolate(x, size=maps[self.finest].shape[-2:]))
        return fine

    def _pixels(self, scene: Scene) -> Tensor:
        """The picture that a scene is [1, 3, height, width], its colours as the network is used to them."""
        x, y = scene.coords.astype(np.int64).T
        picture = np.zeros((3, y.max() + 1, x.max() + 1), np.float32)
        picture[:, y, x] = ((scene.colours - MEAN) / SPREAD).T
        return torch.from_numpy(picture).to(self.smooth.weight.device)[None]
