"""The result of reading plans: for each its walls as a mask, its openings as boxes, and both as vectors."""

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
from lamella.methods.muranet.judge import Recognition
from lamella.methods.muranet.plans import BOXES, WALLS
from lamella.methods.muranet.vector import WALL, SnappedOpening, snap, vector
from lamella.report.images import png_base64
from lamella.results import Evidence, Result

SHOWN = 4  # plans shown on the page
RESERVED = (BOXES, "evidence.json")  # files of the whole result
SIDE = 512  # maximum side of such an image in pixels
INK = {"door": (234, 88, 12), "window": (14, 165, 233)}  # colours of openings in it
OTHER, MASONRY = (22, 163, 74), (51, 65, 85)


@dataclass(kw_only=True)
class Readings(Result):
    """Recognised plans.

    Attributes:
        contents: contents of the files, by name.
    """

    contents: dict[str, bytes] = field(default_factory=dict)

    kind: ClassVar[str] = "readings"
    needs_folder: ClassVar[bool] = True

    @classmethod
    def of(cls, plans: Sequence[FloorPlan], output: Sequence[Recognition], classes: Sequence[str]) -> Readings:
        """Create the result from predictions; files are named after the plans, with a number where names collide.

        Args:
            plans: the plans.
            output: the prediction for each plan.
            classes: names of the classes of openings.
        """
        found, rows, images = cls(), [], []
        coco: dict[str, list[Any]] = {"images": [], "annotations": []}
        coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(classes)]
        for index, (plan, each) in enumerate(zip(plans, output, strict=True)):
            stem = Path(plan.name).stem
            while f"{stem}.svg" in found.contents or f"{stem}.json" in RESERVED:
                stem = f"{index:04}-{stem}"
            openings = in_walls(each, classes)
            size = (plan.image.shape[0], plan.image.shape[1])
            svg, document = vector(each.walls, openings, size)
            found.contents |= {f"{stem}.svg": svg.encode(), f"{stem}.json": (json.dumps(document) + "\n").encode()}
            if each.walls is not None:
                found.contents[stem + WALLS] = png(each.walls > WALL)
            coco["images"].append({"id": index, "file_name": plan.name, "width": size[1], "height": size[0]})
            coco["annotations"] += as_coco(each, index, len(coco["annotations"]))
            fraction = None if each.walls is None else float((each.walls > WALL).mean())
            counts = {name: sum(one.kind == name for one in openings) for name in classes}
            rows.append({"plan": plan.name, "walls": fraction, "outlines": len(document["walls"]), "openings": counts,
                         "snapped": sum(one.snapped for one in openings)})  # fmt: skip
            if fraction == 0:
                found.notes.append(f"{plan.name}: the network recognises no wall: is it a floor plan?")
            if index < SHOWN:
                images.append({"plan": plan.name, "image": side_by_side(plan, each, classes), "truth": plan.labelled})
        found.contents[BOXES] = (json.dumps(coco, indent=1) + "\n").encode()
        found.findings = {"plans": rows, "images": images}
        return found

    def write(self, folder: Path) -> None:
        """Write the mask, SVG and JSON of each plan, and all boxes in COCO format."""
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the result from a folder.

        Raises:
            LamellaError: when there is none.
        """
        evidence = Evidence.read(path)
        endings = (WALLS, ".svg", ".json")
        files = sorted(file for file in Path(path).iterdir() if file.name.endswith(endings))
        contents = {file.name: file.read_bytes() for file in files if file.name != "evidence.json"}
        return cls(contents=contents, findings=evidence.findings, notes=evidence.notes)


def in_walls(output: Recognition, classes: Sequence[str]) -> list[SnappedOpening]:
    """Return the openings of a plan, each snapped to the nearest wall.

    Args:
        output: the prediction for the plan.
        classes: names of the classes of openings.
    """
    mask = None if output.walls is None else output.walls > WALL
    return [
        snap(Box(*box), classes[label], score, mask)
        for box, label, score in zip(output.boxes.tolist(), output.labels.tolist(), output.scores.tolist(), strict=True)
    ]


def as_coco(output: Recognition, image: int, first: int) -> list[dict[str, Any]]:
    """Return the predicted boxes of a plan as COCO annotations, with scores.

    Args:
        output: the prediction for the plan.
        image: COCO id of the plan.
        first: COCO id of the first annotation.
    """
    rows = zip(output.boxes.tolist(), output.labels.tolist(), output.scores.tolist(), strict=True)
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
    """Encode a mask as PNG, white where it is true."""
    file = io.BytesIO()
    require("PIL.Image", "vision", "writing masks").fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def paint(
    walls: NDArray[np.bool_] | None, boxes: Sequence[Sequence[float]], names: Sequence[str], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Paint walls and openings in colours on white [height, width, 3].

    Args:
        walls: mask of the walls [height, width]; None for none.
        boxes: x0, y0, x1, y1 of each opening in pixels.
        names: class of each opening.
        size: height and width in pixels.
    """
    image = np.full((*size, 3), 255, np.uint8)
    if walls is not None:
        image[walls] = MASONRY
    for (x0, y0, x1, y1), name in zip(boxes, names, strict=True):
        columns, rows = slice(round(x0), max(round(x1), round(x0) + 1)), slice(round(y0), max(round(y1), round(y0) + 1))
        image[rows, columns] = INK.get(name, OTHER)
    return image


def side_by_side(plan: FloorPlan, output: Recognition, classes: Sequence[str]) -> str:
    """Return a plan, the prediction and, if known, the ground truth side by side, as a Base64 PNG.

    Args:
        plan: the plan.
        output: the prediction for it.
        classes: names of the classes of openings.
    """
    size = (plan.image.shape[0], plan.image.shape[1])
    mask = None if output.walls is None else output.walls > WALL
    names = [classes[label] for label in output.labels.tolist()]
    row = [plan.image, paint(mask, output.boxes.tolist(), names, size)]
    if plan.boxes is not None and plan.walls is not None:  # as ``labelled``
        true = [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for _, cx, cy, w, h in plan.boxes.tolist()]
        row.append(paint(plan.walls, true, [plan.classes[int(k)] for k in plan.boxes[:, 0]], size))
    step = max(1, -(-max(size) // SIDE))
    return png_base64(each[::step, ::step] for each in row)
