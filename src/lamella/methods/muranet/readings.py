"""What reading plans leaves: for each its walls as a mask, its openings as boxes, and all of it as vectors."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from lamella.extras import require
from lamella.methods.muranet.drawing import Box
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.judge import Recognised
from lamella.methods.muranet.plans import BOXES, WALLS
from lamella.methods.muranet.vector import WALL, Placed, snapped, vector
from lamella.report.images import png_base64
from lamella.results import Evidence, Result

SHOWN = 4  # plans that are drawn on the page
OURS = (BOXES, "evidence.json")  # files of the house, and of all plans
SIDE = 512  # pixels of such a picture, at most
INK = {"door": (234, 88, 12), "window": (14, 165, 233)}  # of openings in it
OTHER, MASONRY = (22, 163, 74), (51, 65, 85)


@dataclass(kw_only=True)
class Readings(Result):
    """Plans that were read.

    Attributes:
        contents: of the files, by name.
    """

    contents: dict[str, bytes] = field(default_factory=dict)

    kind: ClassVar[str] = "readings"
    needs_folder: ClassVar[bool] = True

    @classmethod
    def of(cls, plans: Sequence[FloorPlan], seen: Sequence[Recognised], classes: Sequence[str]) -> Readings:
        """What was seen in plans; files have the names of the plans, numbered where two are alike."""
        found, told, pictures = cls(), [], []
        coco: dict[str, list[Any]] = {"images": [], "annotations": []}
        coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(classes)]
        for number, (plan, each) in enumerate(zip(plans, seen, strict=True)):
            stem = Path(plan.name).stem
            while f"{stem}.svg" in found.contents or f"{stem}.json" in OURS:
                stem = f"{number:04}-{stem}"
            openings = in_walls(each, classes)
            size = (plan.picture.shape[0], plan.picture.shape[1])
            svg, said = vector(each.walls, openings, size)
            found.contents |= {f"{stem}.svg": svg.encode(), f"{stem}.json": (json.dumps(said) + "\n").encode()}
            if each.walls is not None:
                found.contents[stem + WALLS] = png(each.walls > WALL)
            coco["images"].append({"id": number, "file_name": plan.name, "width": size[1], "height": size[0]})
            coco["annotations"] += as_coco(each, number, len(coco["annotations"]))
            share = None if each.walls is None else float((each.walls > WALL).mean())
            counts = {name: sum(one.kind == name for one in openings) for name in classes}
            told.append({"plan": plan.name, "walls": share, "outlines": len(said["walls"]), "openings": counts,
                         "snapped": sum(one.snapped for one in openings)})  # fmt: skip
            if share == 0:
                found.notes.append(f"{plan.name} shows no wall that the network knows: is it a floor plan?")
            if number < SHOWN:
                pictures.append({"plan": plan.name, "picture": beside(plan, each, classes), "truth": plan.labelled})
        found.contents[BOXES] = (json.dumps(coco, indent=1) + "\n").encode()
        found.findings = {"plans": told, "pictures": pictures}
        return found

    def write(self, folder: Path) -> None:
        """For each plan its mask, its SVG and JSON; and the boxes of all in the form of COCO."""
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those in a folder of results.

        Raises:
            LamellaError: when there is none.
        """
        evidence = Evidence.read(path)
        endings = (WALLS, ".svg", ".json")
        files = sorted(file for file in Path(path).iterdir() if file.name.endswith(endings))
        contents = {file.name: file.read_bytes() for file in files if file.name != "evidence.json"}
        return cls(contents=contents, findings=evidence.findings, notes=evidence.notes)


def in_walls(seen: Recognised, classes: Sequence[str]) -> list[Placed]:
    """The openings of a plan, each in the wall that is nearest."""
    mask = None if seen.walls is None else seen.walls > WALL
    return [
        snapped(Box(*box), classes[label], score, mask)
        for box, label, score in zip(seen.boxes.tolist(), seen.labels.tolist(), seen.scores.tolist(), strict=True)
    ]


def as_coco(seen: Recognised, image: int, first: int) -> list[dict[str, Any]]:
    """Boxes of a plan as COCO has them, as they were found, with scores."""
    rows = zip(seen.boxes.tolist(), seen.labels.tolist(), seen.scores.tolist(), strict=True)
    return [
        {
            "id": first + n,
            "image_id": image,
            "category_id": label,
            "bbox": [round(each, 3) for each in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 4),
        }
        for n, ((x0, y0, x1, y1), label, score) in enumerate(rows)
    ]


def png(mask: NDArray[np.bool_]) -> bytes:
    """A mask as the content of a PNG, white where it holds."""
    file = io.BytesIO()
    require("PIL.Image", "vision", "writing masks").fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def painted(
    walls: NDArray[np.bool_] | None, boxes: Sequence[Sequence[float]], names: Sequence[str], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Walls and openings in colours on white [height, width, 3]; boxes are x0, y0, x1, y1."""
    picture = np.full((*size, 3), 255, np.uint8)
    if walls is not None:
        picture[walls] = MASONRY
    for (x0, y0, x1, y1), name in zip(boxes, names, strict=True):
        columns, rows = slice(round(x0), max(round(x1), round(x0) + 1)), slice(round(y0), max(round(y1), round(y0) + 1))
        picture[rows, columns] = INK.get(name, OTHER)
    return picture


def beside(plan: FloorPlan, seen: Recognised, classes: Sequence[str]) -> str:
    """A plan, what was recognised, and its truth where it is known, side by side as the text of a PNG."""
    size = (plan.picture.shape[0], plan.picture.shape[1])
    mask = None if seen.walls is None else seen.walls > WALL
    names = [classes[label] for label in seen.labels.tolist()]
    row = [plan.picture, painted(mask, seen.boxes.tolist(), names, size)]
    if plan.boxes is not None and plan.walls is not None:  # as ``labelled``
        true = [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for _, cx, cy, w, h in plan.boxes.tolist()]
        row.append(painted(plan.walls, true, [plan.classes[int(k)] for k in plan.boxes[:, 0]], size))
    step = max(1, -(-max(size) // SIDE))
    return png_base64(each[::step, ::step] for each in row)
