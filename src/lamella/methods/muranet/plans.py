"""The input data: floor plans from a folder with masks and boxes, of CubiCasa5K, as images alone, or synthetic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from lamella.data import InputContext
from lamella.data.images import inside, read_image
from lamella.errors import CalibrationError
from lamella.methods.muranet.cubicasa import is_cubicasa, open_cubicasa
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.raster import STYLES, floor_plans
from lamella.reading import check_in_folder, parse_json, read_text
from lamella.signature import Fixture

BUILT_IN = "synthetic"
BOXES, WALLS = "annotations.json", ".walls.png"  # a folder's boxes, and how the name of a mask ends
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MOST_CLASSES = 1000
EXPECTED = f"give an image, a folder with {BOXES}, CubiCasa5K, or `{BUILT_IN}`"


@dataclass(frozen=True)
class FloorPlans(Sequence[FloorPlan]):
    """Floor plans with their labels, if known.

    Attributes:
        items: the plans; those of a folder are read on access.
        classes: classes of openings.
        metadata: description for the provenance.
    """

    metavar = "PLANS"
    source_help = (
        f"an image, a folder of images (with {BOXES} and masks *{WALLS} for training) or of CubiCasa5K, or `{BUILT_IN}`"
    )
    example = Fixture(BUILT_IN, settings={"count": 3, "side": 64})

    items: Sequence[FloorPlan]
    classes: tuple[str, ...]
    metadata: Mapping[str, Any]

    @classmethod
    def open(
        cls, name: str | Path, context: InputContext, *, count: int = 800, side: int = 128, style: str = "mixed"
    ) -> FloorPlans:
        """Open plans; each is read once, so that a damaged one is reported before anything runs.

        Args:
            name: an image; a folder of images; a folder with ``annotations.json`` in COCO format, whose boxes are
                openings, and beside each image ``a.jpg`` its walls, the light pixels of ``a.walls.png``; the folder of
                CubiCasa5K, of which the training or the test split is read, or of one of its plans; or ``synthetic``,
                whose test plans are never trained on.
            context: the split and the seed.
            count: maximum number of plans.
            side: side of a synthetic plan in pixels.
            style: style of a synthetic plan's walls: solid, grey, double, or mixed.

        Raises:
            CalibrationError: for a missing or damaged file, a mask of another size or without walls, or a box outside
                its plan.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        if str(name) == BUILT_IN:
            return cls.of(
                synthetic_plans(context, count, side, style), split=context.split, seed=context.seed, style=style
            )
        path = Path(name)
        if path.is_file() and path.suffix.lower() in IMAGES:
            return cls.of(Folder([(path, None)], ()), path.name)
        if not path.is_dir():
            raise CalibrationError(f"no floor plans '{path}': {EXPECTED}")
        if is_cubicasa(path):
            return cls.of(open_cubicasa(path, context.split, count), path.name, split=context.split)
        return cls.of(Folder.open(path, count), path.name)

    @classmethod
    def of(cls, items: Sequence[FloorPlan], name: str = BUILT_IN, **metadata: Any) -> FloorPlans:
        """Create a dataset of plans, all of which are read once for a digest.

        Args:
            items: the plans.
            name: name of the dataset.
            **metadata: further metadata for the provenance.
        """
        digest, classes = hashlib.sha256(), tuple[str, ...]()
        for each in items:
            digest.update(hashlib.sha256(each.content()).digest())
            classes = each.classes or classes
        return cls(items, classes, {"data": name, **metadata, "plans": len(items), "sha256": digest.hexdigest()})

    def describe(self) -> dict[str, Any]:
        """Return the description for the provenance."""
        return dict(self.metadata)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[FloorPlan]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> FloorPlan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FloorPlan]: ...
    def __getitem__(self, index: int | slice) -> FloorPlan | Sequence[FloorPlan]:
        return self.items[index]

    def check_labels(self, classes: Sequence[str] | None = None) -> None:
        """Check that walls and boxes of all plans are known, and the classes match.

        Raises:
            CalibrationError: otherwise.
        """
        for plan in self:
            if not plan.labelled:
                missing = f"no {Path(plan.name).stem}{WALLS}" if plan.walls is None else f"no boxes in {BOXES}"
                raise CalibrationError(f"{plan.name} has {missing}: give plans with walls and boxes")
        if not self.classes:
            raise CalibrationError(f"these plans define no class of openings: give categories in {BOXES}")
        if classes is not None and tuple(classes) != self.classes:
            raise CalibrationError(
                f"these plans have the classes {', '.join(self.classes)}, the model has {', '.join(classes)}: "
                "give plans with the same classes"
            )


def synthetic_plans(context: InputContext, count: int, side: int, style: str) -> list[FloorPlan]:
    """Return synthetic plans of the requested split.

    Args:
        context: gives the split and the random seed.
        count: number of plans.
        side: side of a plan in pixels.
        style: drawing style, or ``mixed`` for all.
    """
    if style not in ("mixed", *STYLES):
        raise CalibrationError(f"style '{style}': choose one of mixed, {', '.join(STYLES)}")
    part: Literal["train", "test"] = "test" if context.split == "test" else "train"
    styles = STYLES if style == "mixed" else [each for each in STYLES if each == style]
    return list(islice(floor_plans(part, context.seed, side, styles), count))


@dataclass(frozen=True)
class Folder(Sequence[FloorPlan]):
    """Plans in files, with their boxes if known.

    Attributes:
        files: each with x, y, w, h and class of its openings, or None.
        classes: classes of openings.
    """

    files: Sequence[tuple[Path, Sequence[Sequence[float]] | None]]
    classes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, count: int) -> Folder:
        """Open the plans that a file of boxes names; without one, all images of a folder.

        Args:
            folder: the folder.
            count: maximum number of plans.
        """
        if (folder / BOXES).is_file():
            found = _from_coco(folder)
            return cls(found.files[:count], found.classes)
        files = sorted(
            each for each in folder.iterdir() if each.suffix.lower() in IMAGES and not each.name.endswith(WALLS)
        )
        if not files:
            raise CalibrationError(f"{folder} holds no image and no {BOXES}: give another folder")
        return cls([(check_in_folder(each), None) for each in files[:count]], ())

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> FloorPlan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FloorPlan]: ...
    def __getitem__(self, index: int | slice) -> FloorPlan | Sequence[FloorPlan]:
        if isinstance(index, slice):
            return Folder(self.files[index], self.classes)
        file, boxes = self.files[index]
        image = read_image(file, "plans")
        mask_file = file.with_name(file.stem + WALLS)
        walls = _mask(check_in_folder(mask_file), image.shape[:2], file.name) if mask_file.is_file() else None
        truth = None if boxes is None else _centred_boxes(boxes, image.shape[:2], file)
        return FloorPlan(file.name, image, walls, truth, self.classes)


def _mask(file: Path, size: tuple[int, ...], of: str) -> NDArray[np.bool_]:
    """Read the light pixels of a mask.

    Raises:
        CalibrationError: for another size than that of its plan, or a mask without such pixels.
    """
    walls: NDArray[np.bool_] = read_image(file, of).mean(axis=2) >= 128
    if walls.shape != size:
        raise CalibrationError(
            f"{file}: {walls.shape[1]} x {walls.shape[0]} pixels, but {of} has {size[1]} x {size[0]}: give equal sizes"
        )
    if not walls.any():
        raise CalibrationError(f"{file} shows no wall: make walls white, or remove this plan")
    return walls


def _centred_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, ...], file: Path) -> NDArray[np.float32]:
    """Convert boxes x, y, w, h, class to class, cx, cy, w, h.

    Raises:
        CalibrationError: for one that is empty or not inside its plan.
    """
    height, width = size
    for x, y, w, h, _ in boxes:
        if not (w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= width + 0.5 and y + h <= height + 0.5):
            raise CalibrationError(
                f"{file.parent / BOXES}: the box [{x:g}, {y:g}, {w:g}, {h:g}] is not inside {file.name} of "
                f"{width} x {height} pixels: give x, y, width and height in its pixels"
            )
    found = [[k, x + w / 2, y + h / 2, w, h] for x, y, w, h, k in boxes]
    return np.array(found, np.float32).reshape(-1, 5)


def _from_coco(folder: Path) -> Folder:
    """Read a document in COCO format.

    Raises:
        CalibrationError: for another format, or a file that is not in the folder.
    """
    path = folder / BOXES
    try:
        document = parse_json(read_text(check_in_folder(path)))
        names = {int(each["id"]): str(each["name"]) for each in document["categories"]}
        indices = {identifier: index for index, identifier in enumerate(sorted(names))}
        images = {int(each["id"]): str(each["file_name"]) for each in document["images"]}
        boxes: dict[int, list[list[float]]] = {identifier: [] for identifier in images}
        for each in document["annotations"]:
            x, y, w, h = map(float, each["bbox"])
            boxes[int(each["image_id"])].append([x, y, w, h, indices[int(each["category_id"])]])
    except CalibrationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CalibrationError(
            f"{path}: no boxes in COCO format ({reason}): give images, categories and annotations with bbox"
        ) from None
    if not 1 <= len(names) <= MOST_CLASSES or len(set(names.values())) < len(names):
        raise CalibrationError(f"{path} has {len(names)} categories: give 1 to {MOST_CLASSES} with unique names")
    if not images:
        raise CalibrationError(f"{path} lists no image: give at least one")
    files = [(inside(folder, name, path.name), boxes[identifier]) for identifier, name in images.items()]
    return Folder(files, tuple(names[identifier] for identifier in sorted(names)))
