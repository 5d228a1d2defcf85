"""Images: an image backbone replaces the sparse U-Net, so that the same decoder segments objects in images.

An image is a scene whose points are its pixels. Tokens are the 4 x 4 pixel cells of a feature pyramid (Lin et al.,
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
from lamella.methods.agile3d.scene import ClickScene, Tokens, tokenise
from lamella.zoo import timm_features

OBJECTS = ".objects.png"  # suffix of the files with the object of each pixel
STRIDE = 4  # width of a token in pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet mean and standard deviation


def image_scene(
    colours: NDArray[np.uint8], objects: NDArray[np.int64] | None = None, name: str = "the image"
) -> ClickScene:
    """Convert an image, and the object of each of its pixels, to a scene.

    Args:
        colours: RGB values [height, width, 3] uint8.
        objects: ground-truth object of each pixel [height, width], if known.
        name: name of the scene.
    """
    y, x = np.indices(colours.shape[:2])
    coords = np.stack([x, y], axis=2).reshape(-1, 2).astype(np.float32)
    is_image = None if objects is None else objects.reshape(-1)
    return ClickScene(coords, (colours.reshape(-1, 3) / 255).astype(np.float32), is_image, name)


def read_scene(file: Path) -> ClickScene:
    """Read an image file, with the objects of ``.objects.png`` of the same name beside it, if that exists.

    Args:
        file: the image file.

    Raises:
        CalibrationError: if either file cannot be read, or their sizes differ.
    """
    beside = file.with_name(file.stem + OBJECTS)
    known = None if not beside.is_file() else read_image(beside, file.name)
    colours = read_image(file, file.name)
    if known is None:
        return image_scene(colours, name=file.name)
    if known.shape != colours.shape or (known != known[..., :1]).any():
        raise CalibrationError(
            f"{beside}: not a grey image of the size of {file.name}: give the object id of each pixel as grey value"
        )
    return image_scene(colours, known[..., 0].astype(np.int64), file.name)


def parse_image(data: bytes, path: PurePath) -> ClickScene:
    """Decode an image from the content of its file.

    Args:
        data: content of the file.
        path: its name, for messages.

    Raises:
        CalibrationError: if it cannot be decoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "upload"
        file.write_bytes(data)
        return image_scene(read_image(file, path.name), name=path.name)


def dump_image(scene: ClickScene, labels: NDArray[np.int64]) -> bytes:
    """Return the content of a grey PNG whose values are the labels of the pixels, up to 255.

    Args:
        scene: the image.
        labels: label of each pixel [P].
    """
    x, y = scene.coords.astype(np.int64).T
    grey = np.zeros((y.max() + 1, x.max() + 1), np.uint8)
    grey[y, x] = labels
    file = io.BytesIO()
    require("PIL.Image", "vision", "writing images").fromarray(grey).save(file, "PNG")
    return file.getvalue()


class ImageEncoder(nn.Module):
    """A timm backbone with a feature pyramid over its feature maps of stride 4 and more.

    Args:
        name: name of the timm model.
        channels: channels of the pyramid.
        pretrained: download timm's pretrained weights.
        weights: file with pretrained weights to load instead.
        frozen: train only the pyramid.
        levels: indices of the feature maps to use, 0 is the finest; all if None.

    Raises:
        MethodError: for an unknown timm model, or one without such feature maps.
        LamellaError: if timm is not installed.
    """

    dims = 2
    reach = 24.0  # pixels: six tokens, as the paper's 0.3 m are six voxels

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
            raise MethodError(f"{weights} does not match the weights of {name}: give its weights ({error})") from None
        info = self.backbone.feature_info
        maps = [index for index, reduction in enumerate(info.reduction()) if reduction >= STRIDE]
        if not maps or info.reduction()[maps[0]] != STRIDE:
            raise MethodError(f"{name} has no feature map of stride {STRIDE}: choose another backbone")
        known = range(len(maps))
        if levels is not None and not (levels and set(levels) <= set(known)):
            raise MethodError(f"levels {listed(levels)}: {name} has {', '.join(map(str, known))}")
        self.finest = maps[0]
        self.maps = [maps[level] for level in sorted(set(known if levels is None else levels))]
        self.lateral = nn.ModuleList(nn.Conv2d(info.channels()[index], channels, 1) for index in self.maps)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Set the training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def tokenise(self, scene: ClickScene) -> Tokens:
        """Return one token for each 4 x 4 pixels."""
        return tokenise(scene, STRIDE)

    def forward(self, scenes: Sequence[Tokens]) -> Tensor:
        """Return the concatenated features of the tokens of several images [N, C]."""
        found = []
        for tokens in scenes:
            x, y = tokens.cells.T
            found.append(self.pyramid(self._pixels(tokens.scene))[0, :, y, x].T)
        return torch.cat(found)

    def pyramid(self, pixels: Tensor) -> Tensor:
        """Return the finest level of the pyramid [1, C, height / 4, width / 4] of an image [1, 3, height, width]."""
        maps = self.backbone(pixels)
        x: Tensor | None = None
        for index, lateral in reversed([*zip(self.maps, self.lateral, strict=True)]):
            candidates = lateral(maps[index])
            x = candidates if x is None else candidates + interpolate(x, size=candidates.shape[-2:])
        assert x is not None
        fine: Tensor = self.smooth(interpolate(x, size=maps[self.finest].shape[-2:]))
        return fine

    def _pixels(self, scene: ClickScene) -> Tensor:
        """Convert a scene to a normalised image tensor [1, 3, height, width]."""
        x, y = scene.coords.astype(np.int64).T
        image = np.zeros((3, y.max() + 1, x.max() + 1), np.float32)
        image[:, y, x] = ((scene.colours - MEAN) / STD).T
        return torch.from_numpy(image).to(self.smooth.weight.device)[None]
