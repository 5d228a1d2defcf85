"""Images from folders as people hold them, and the built-in ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lamella
from lamella.data import CaptionedImages, InputContext, LabelledImages
from lamella.errors import CalibrationError

READER = InputContext()


def folder(place: Path, count: int = 10, captions: bool = True) -> Path:
    place.mkdir()
    lines = []
    for number in range(count):
        pixels = np.full((12, 9 + number, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"image {number}"}))
    if captions:
        (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


@pytest.mark.parametrize("captions", [True, False])
def test_one_in_five_images_is_for_testing(captions: bool, tmp_path: Path) -> None:
    found = CaptionedImages.open(folder(tmp_path / "images", captions=captions), READER)
    test = found.part("test")
    assert [int(each.image[0, 0, 0]) // 10 for each in test.items] == [0, 5]
    assert [int(each.image[0, 0, 0]) // 10 for each in found.items] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert found.items[0].text == ("image 1" if captions else "")


def test_the_parts_of_built_in_images_never_meet() -> None:
    for name in ("digits", "shapes"):
        found = CaptionedImages.open(name, READER, count=40)
        rows = [{each.image.tobytes() for each in part.items} for part in (found, found.part("test"))]
        assert rows[0].isdisjoint(rows[1]) and min(map(len, rows)) > 30


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no images 'nothing': give a folder"):
        CaptionedImages.open("nothing", READER)
    with pytest.raises(CalibrationError, match="count 0"):
        CaptionedImages.open("digits", READER, count=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no images"):
        CaptionedImages.open(tmp_path / "empty", READER)
    place = folder(tmp_path / "images")
    (place / "1.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"metadata.jsonl line 2: the image 1.png cannot be read"):
        CaptionedImages.open(place, READER)
    for line, message in (
        ('{"text": "one"}', "line 1 names no image"),
        ('{"file_name": "../x.png"}', "outside the folder"),
        (r'{"file_name": "a\u0000b.png"}', "there is no image"),
        (json.dumps({"file_name": "x" * 5000}), "there is no image"),
    ):
        (place / "metadata.jsonl").write_text(line)
        with pytest.raises(CalibrationError, match=message):
            CaptionedImages.open(place, READER).part("test")


@pytest.mark.parametrize("captions", [True, False])
def test_links_and_pipes_in_a_folder_are_refused(captions: bool, tmp_path: Path) -> None:
    place = folder(tmp_path / "images", captions=captions)
    (place / "9.png").rename(tmp_path / "secret.png")
    (place / "9.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(
        CalibrationError, match="outside the folder" if captions else "links in a folder are not followed"
    ):
        CaptionedImages.open(place, READER)
    (place / "9.png").unlink()
    (place / "9.png").symlink_to(place / "8.png")
    with pytest.raises(CalibrationError, match="links in a folder are not followed"):
        CaptionedImages.open(place, READER)
    (place / "9.png").unlink()
    os.mkfifo(place / "9.png")
    with pytest.raises(CalibrationError, match="no image '9.png'" if captions else "is not a regular file"):
        CaptionedImages.open(place, READER)


def test_captions_that_are_a_link_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "images")
    (place / "metadata.jsonl").rename(tmp_path / "secret.jsonl")
    (place / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(CalibrationError, match="links in a folder are not followed"):
        CaptionedImages.open(place, READER)


def by_class(place: Path, **counts: int) -> Path:
    """A folder with a folder of that many images for each class, each image of another colour."""
    for number, (name, count) in enumerate(counts.items()):
        (place / name).mkdir(parents=True)
        for image in range(count):
            pixels = np.full((8, 8, 3), 20 * number + image, np.uint8)
            Image.fromarray(pixels).save(place / name / f"{image}.png")
    return place


def test_folders_in_a_folder_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    place = by_class(tmp_path / "animals", dog=10, ant=5, cat=10)
    (place / "empty").mkdir()
    found = LabelledImages.open(place, READER)
    assert (found.classes, len(found), found.describe()["classes"]) == (3, 20, 3)
    assert [(each.text, each.label) for each in found.items[:4]] == [("ant", 0), ("cat", 1), ("dog", 2), ("ant", 0)]
    assert sorted(str(each.label) for each in found.part("test").items) == ["0", "1", "1", "2", "2"]
    assert [each.label for each in LabelledImages.open(place, READER, count=4).items] == [0, 1, 2, 0]
    names = sorted(str(file.relative_to(place)) for file in place.rglob("*.png"))
    lines = [json.dumps({"file_name": name, "text": f"a {name}"}) for name in names]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    told = CaptionedImages.open(place, READER).items  # captions do not take classes away
    assert [(each.text, each.label) for each in told[:4]] == [(f"a ant/{n}.png", 0) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["flat", "mixed", "shapes", "nothing"])
def test_sources_without_classes_are_refused_where_classes_are_needed(name: str, tmp_path: Path) -> None:
    folder(tmp_path / "flat", captions=False)
    by_class(folder(tmp_path / "mixed", captions=False), ant=5)
    given = name if name == "shapes" else str(tmp_path / name)
    if name != "nothing":
        assert not CaptionedImages.open(given, READER, count=12).classes
    with pytest.raises(CalibrationError, match="no images" if name == "nothing" else "have no classes") as error:
        LabelledImages.check(given)
    assert given in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", [("caprecover", "", ["digits"]), ("slab", "vision", [])])
def test_images_without_classes_are_refused_before_a_model_is_opened(
    command: tuple[str, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamella.inputs import Opening

    def opens(*_: object) -> None:
        raise AssertionError("something is opened")

    monkeypatch.setattr(Opening, "__call__", opens)
    slug, name, before = command
    with pytest.raises(CalibrationError, match="have no classes"):
        lamella.run(slug, *before, command=name, images=str(folder(tmp_path / "flat", captions=False)))


def test_caprecover_and_slab_vision_take_a_folder_of_class_folders(tmp_path: Path) -> None:
    place = by_class(tmp_path / "images", dark=20, light=20)
    audit = lamella.run(
        "caprecover", "digits", images=place, cuts="pooled", attackers="gap", guards="none", seeds=1, steps=2
    )
    assert audit.evidence.findings["classes"] == 2 and audit.evidence.findings["images"] == {
        "attacker": 32,
        "judge": 8,
    }
    small = {"size": 8, "patch": 4, "channels": 1, "width": 8, "depth": (1,), "heads": 2}
    network = lamella.run("slab", place, command="vision", steps=3, batch=8, **small)
    assert network.result.classes == 2
