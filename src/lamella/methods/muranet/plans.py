"""The input: floor plans, from a folder with masks and boxes, as pictures alone, or made by chance."""

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
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.raster import STYLES, floor_plans
from lamella.reading import check_in_folder, parse_json, read_text
from lamella.signature import Fixture

BUILT_IN = "synthetic"
BOXES, WALLS = "annotations.json", ".walls.png"  # a folder's boxes, and how the name of a mask ends
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MOST_CLASSES = 1000
WANTED = f"give a picture, a folder with {BOXES}, or `{BUILT_IN}`"


@dataclass(frozen=True)
class FloorPlans(Sequence[FloorPlan]):
    """Floor plans, with what is known of them.

    Attributes:
        items: the plans; those of a folder are read when they are asked for.
        classes: of openings.
        said: what provenance says of them.
    """

    metavar = "PLANS"
    source_help = f"a picture, a folder of them (with {BOXES} and masks *{WALLS} to learn from), or `{BUILT_IN}`"
    example = Fixture(BUILT_IN, settings={"count": 3, "side": 64})

    items: Sequence[FloorPlan]
    classes: tuple[str, ...]
    said: Mapping[str, Any]

    @classmethod
    def open(
        cls, name: str | Path, context: InputContext, *, count: int = 800, side: int = 128, style: str = "mixed"
    ) -> FloorPlans:
        """Read plans; each is looked at once, so that a damaged one is named before anything runs.

        Args:
            name: a picture; a folder of pictures; one that has ``annotations.json`` in the form of COCO, whose boxes
                are of openings, and beside each picture ``a.jpg`` its walls, the light pixels of ``a.walls.png``; or
                ``synthetic``: those for testing are never trained on.
            count: at most so many plans.
            side: pixels of a synthetic one.
            style: of a synthetic one's walls: solid, grey, double, or mixed.

        Raises:
            CalibrationError: for what is missing or damaged, a mask of another size or without walls, or a box outside.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        if str(name) == BUILT_IN:
            return cls.of(made(context, count, side, style), split=context.split, seed=context.seed, style=style)
        path = Path(name)
        if path.is_file() and path.suffix.lower() in PICTURES:
            return cls.of(Folder([(path, None)], ()), path.name)
        if not path.is_dir():
            raise CalibrationError(f"no floor plans '{path}': {WANTED}")
        return cls.of(Folder.open(path, count), path.name)

    @classmethod
    def of(cls, items: Sequence[FloorPlan], name: str = BUILT_IN, **said: Any) -> FloorPlans:
        """These plans, all of which are looked at once."""
        digest, classes = hashlib.sha256(), tuple[str, ...]()
        for each in items:
            digest.update(hashlib.sha256(each.content()).digest())
            classes = each.classes or classes
        return cls(items, classes, {"data": name, **said, "plans": len(items), "sha256": digest.hexdigest()})

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[FloorPlan]:
        return iter(self.items)

    @overload
    def __getitem__(self, place: int) -> FloorPlan: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[FloorPlan]: ...
    def __getitem__(self, place: int | slice) -> FloorPlan | Sequence[FloorPlan]:
        return self.items[place]

    def check(self, classes: Sequence[str] | None = None) -> None:
        """Raise unless walls and boxes of all are known, and classes are those.

        Raises:
            CalibrationError: then.
        """
        for plan in self:
            if not plan.labelled:
                missing = f"no {Path(plan.name).stem}{WALLS}" if plan.walls is None else f"no boxes in {BOXES}"
                raise CalibrationError(f"{plan.name} has {missing} beside it: give plans with walls and boxes")
        if not self.classes:
            raise CalibrationError(f"these plans know no class of opening: give categories in {BOXES}")
        if classes is not None and tuple(classes) != self.classes:
            raise CalibrationError(
                f"these plans have the classes {', '.join(self.classes)}, and the model knows {', '.join(classes)}: "
                "give plans with the same"
            )


def made(context: InputContext, count: int, side: int, style: str) -> list[FloorPlan]:
    """Synthetic plans of the part that is wanted."""
    if style not in ("mixed", *STYLES):
        raise CalibrationError(f"style '{style}': choose one of mixed, {', '.join(STYLES)}")
    part: Literal["train", "test"] = "test" if context.split == "test" else "train"
    styles = STYLES if style == "mixed" else [each for each in STYLES if each == style]
    return list(islice(floor_plans(part, context.seed, side, styles), count))


@dataclass(frozen=True)
class Folder(Sequence[FloorPlan]):
    """Plans in files, each with the boxes that are known of it.

    Attributes:
        files: each with x, y, w, h and class of its openings, or None.
        classes: of openings.
    """

    files: Sequence[tuple[Path, Sequence[Sequence[float]] | None]]
    classes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, count: int) -> Folder:
        """The plans that a document of boxes names, else all pictures of a folder."""
        if (folder / BOXES).is_file():
            found = _from_coco(folder)
            return cls(found.files[:count], found.classes)
        files = sorted(
            each for each in folder.iterdir() if each.suffix.lower() in PICTURES and not each.name.endswith(WALLS)
        )
        if not files:
            raise CalibrationError(f"{folder} holds no picture and no {BOXES}: give another folder")
        return cls([(check_in_folder(each), None) for each in files[:count]], ())

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, place: int) -> FloorPlan: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[FloorPlan]: ...
    def __getitem__(self, place: int | slice) -> FloorPlan | Sequence[FloorPlan]:
        if isinstance(place, slice):
            return Folder(self.files[place], self.classes)
        file, boxes = self.files[place]
        picture = read_image(file, "plans")
        beside = file.with_name(file.stem + WALLS)
        walls = _mask(check_in_folder(beside), picture.shape[:2], file.name) if beside.is_file() else None
        truth = None if boxes is None else _checked(boxes, picture.shape[:2], file)
        return FloorPlan(file.name, picture, walls, truth, self.classes)


def _mask(file: Path, size: tuple[int, ...], of: str) -> NDArray[np.bool_]:
    """The light pixels of a mask.

    Raises:
        CalibrationError: for another size than its plan has, or no such pixel.
    """
    walls: NDArray[np.bool_] = read_image(file, of).mean(axis=2) >= 128
    if walls.shape != size:
        raise CalibrationError(
            f"{file}: {walls.shape[1]} x {walls.shape[0]} pixels, and {of} has {size[1]} x {size[0]}: give one size"
        )
    if not walls.any():
        raise CalibrationError(f"{file} shows no wall: make walls white, or leave this plan out")
    return walls


def _checked(boxes: Sequence[Sequence[float]], size: tuple[int, ...], file: Path) -> NDArray[np.float32]:
    """Boxes x, y, w, h, class as class, cx, cy, w, h.

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
    """What a document in the form of COCO says.

    Raises:
        CalibrationError: for anything else, or a file that is not in the folder.
    """
    path = folder / BOXES
    try:
        said = parse_json(read_text(check_in_folder(path)))
        names = {int(each["id"]): str(each["name"]) for each in said["categories"]}
        places = {number: place for place, number in enumerate(sorted(names))}
        images = {int(each["id"]): str(each["file_name"]) for each in said["images"]}
        boxes: dict[int, list[list[float]]] = {number: [] for number in images}
        for each in said["annotations"]:
            x, y, w, h = map(float, each["bbox"])
            boxes[int(each["image_id"])].append([x, y, w, h, places[int(each["category_id"])]])
    except CalibrationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CalibrationError(
            f"{path}: no boxes in the form of COCO ({reason}): give images, categories and annotations with bbox"
        ) from None
    if not 1 <= len(names) <= MOST_CLASSES or len(set(names.values())) < len(names):
        raise CalibrationError(f"{path} has {len(names)} categories: give 1 to {MOST_CLASSES}, of different names")
    if not images:
        raise CalibrationError(f"{path} names no image: give some")
    files = [(inside(folder, name, path.name), boxes[number]) for number, name in images.items()]
    return Folder(files, tuple(names[number] for number in sorted(names)))
