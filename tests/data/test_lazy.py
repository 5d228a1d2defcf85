"""Data sets are lazy: opening one decodes nothing, and items come in order. Encodings are computed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lamella.data import CaptionedImages, Encoded, ImageText, InputContext, Lazy, Processing, batches
from lamella.errors import CalibrationError, ExportError
from lamella.files import Work
from lamella.zoo.vlm import shapes_vlm

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp"}


class Decodings(list[str]):
    """The files that Pillow has decoded."""


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decodings:
    found, load = Decodings(), ImageFile.ImageFile.load

    def counted(self: Any) -> Any:
        if self.tile:  # not decoded yet
            found.append(str(self.format))
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return found


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def images(folder: Path, count: int = 10) -> list[Path]:
    folder.mkdir(parents=True)
    kinds = list(FORMATS)
    files = [folder / f"{number:02d}{FORMATS[kinds[number % 3]]}" for number in range(count)]
    for number, file in enumerate(files):
        Image.fromarray(pixels(number)).save(file)
    return files


def eager(file: Path) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


def captions(folder: Path, files: list[Path]) -> None:
    lines = [json.dumps({"file_name": each.name, "text": f"image {each.stem}"}) for each in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows(folder: Path, files: list[Path], end: str = "\n") -> Path:
    names = [str(each.relative_to(folder)) for each in files]
    lines = [json.dumps({"image": each, "prompt": f"what is über {each}?", "answer": each}) for each in names]
    (folder / "rows.jsonl").write_bytes((end.join(["", *lines, ""])).encode())
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def context() -> InputContext:
    _, processor = shapes_vlm("llava", num_hidden_layers=2)
    processing = Processing(processor)
    return InputContext(lambda: processing.tokenizer, 0, "whole", lambda: processing)


# Opening decodes nothing


@pytest.mark.parametrize("described", [True, False])
def test_opening_captioned_images_decodes_none(described: bool, decoded: Decodings, tmp_path: Path) -> None:
    files = images(tmp_path / "images")
    if described:
        captions(tmp_path / "images", files)
    found = CaptionedImages.open(tmp_path / "images", InputContext())
    assert [each.text for each in found.items] == [f"image {n:02d}" if described else "" for n in range(10) if n % 5]
    found.items[2:5]
    assert not decoded
    assert found.items[1].image.shape == (12, 10, 3)
    assert len(decoded) == 1


def test_opening_images_with_text_decodes_none(context: InputContext, decoded: Decodings, tmp_path: Path) -> None:
    found = ImageText.open(rows(tmp_path, images(tmp_path / "images")), context)
    assert [row.answer for row in found] == [row.answer for row in found[:]] and len(found[3].images) == 1
    assert not decoded
    found.batch(found[2:4])
    assert len(decoded) == 2, "each image of a batch is decoded once"


# Items are as decoding gives them, in their order


def test_images_are_those_that_decoding_gives(tmp_path: Path) -> None:
    files = images(tmp_path / "images")
    expected = [eager(file) for file in files]
    train = CaptionedImages.open(tmp_path / "images", InputContext())
    for part, numbers in ((train, (1, 2, 3, 4, 6, 7, 8, 9)), (train.part("test"), (0, 5))):
        for _ in range(2):
            for each, number in zip(part.items, numbers, strict=True):
                np.testing.assert_array_equal(each.image, expected[number])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n \n"])
def test_rows_are_found_by_their_offsets(end: str, context: InputContext, tmp_path: Path) -> None:
    files = images(tmp_path / "images")
    found = ImageText.open(rows(tmp_path, files, end), context)
    for order in (range(10), reversed(range(10))):
        for number in order:
            name = str(files[number].relative_to(tmp_path))
            assert found[number].messages[0]["content"] == f"<image>\nwhat is über {name}?"
            assert found[number].answer == name
            np.testing.assert_array_equal(found[number].images[0], eager(files[number]))


def test_batches_are_in_order_and_leave_the_random_state(context: InputContext, tmp_path: Path) -> None:
    found = ImageText.open(rows(tmp_path, images(tmp_path / "images")), context)
    before = torch.get_rng_state()
    for batch, start in zip(found.batches(4), (0, 4, 8), strict=True):
        expected = context.processing.batch(list(found[start : start + 4]))
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_built_in_images_depend_on_the_seed_alone(name: str) -> None:
    def drawn(seed: int) -> list[bytes]:
        return [each.image.tobytes() for each in CaptionedImages.open(name, InputContext(seed=seed), count=12).items]

    assert drawn(0) == drawn(0) and (drawn(0) == drawn(1)) == (name == "digits")


def test_a_slice_is_lazy_and_an_index_may_be_negative() -> None:
    asked: list[int] = []

    def decode(number: int) -> int:
        asked.append(number)
        return number**2

    found = Lazy(range(10), decode)
    part = found[2:9][1:]
    assert not asked and len(part) == 6
    assert part[-1] == 64 and asked == [8]
    assert list(part) == [9, 16, 25, 36, 49, 64]
    with pytest.raises(IndexError):
        found[10]


# What the headers do not show is refused when it is reached


def test_damage_behind_the_header_is_refused_by_name_when_the_image_is_reached(
    context: InputContext, tmp_path: Path
) -> None:
    files = images(tmp_path / "images")
    whole = files[4].read_bytes()
    assert files[4].suffix == ".jpg"
    files[4].write_bytes(whole[:-20])
    found = ImageText.open(rows(tmp_path, files), context)
    with pytest.raises(CalibrationError, match=r"rows.jsonl line 6: the image 04.jpg cannot be read") as error:
        list(found.batches(3))
    assert "\n" not in str(error.value)
    opened = CaptionedImages.open(tmp_path / "images", InputContext())
    with pytest.raises(CalibrationError, match=r"the image 04\.jpg cannot be read"):
        [each.image for each in opened.items]


def test_an_image_that_disappears_is_refused_by_name(context: InputContext, tmp_path: Path) -> None:
    files = images(tmp_path / "images")
    found = CaptionedImages.open(tmp_path / "images", InputContext())
    files[1].unlink()
    with pytest.raises(CalibrationError, match=r"the image 01\.jpg cannot be read"):
        _ = found.items[0].image


def test_provenance_knows_another_image(context: InputContext, tmp_path: Path) -> None:
    files = images(tmp_path / "images")
    file = rows(tmp_path, files)

    def described() -> tuple[Any, Any]:
        return CaptionedImages.open(tmp_path / "images", InputContext()).describe(), ImageText.open(
            file, context
        ).describe()

    before = described()
    assert described() == before
    Image.fromarray(pixels(99)).save(files[1])
    assert all(one["sha256"] != other["sha256"] for one, other in zip(described(), before, strict=True))


# Encodings


class Stopped(Exception):
    pass


class Encoder:
    """Encodes numbers, and is stopped before the batch of a given number."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.seen = stop, []  # type: ignore[var-annotated]

    def __call__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        if self.stop in numbers:
            raise Stopped
        self.seen += numbers
        x = torch.tensor(numbers, dtype=torch.float32)
        return {"a": x[:, None, None] + torch.arange(6).view(2, 3) / 7, "b": x.bfloat16(), "c": x.long()}


def same(encoded: Encoded) -> Iterator[bool]:
    direct = Encoder()(list(range(len(encoded))))
    for number, row in enumerate(encoded):
        yield all(
            row[name].dtype == each.dtype and torch.equal(row[name], each[number]) for name, each in direct.items()
        )


def test_encodings_are_those_of_the_encoder_and_computed_once(tmp_path: Path) -> None:
    first = Encoder()
    found = Encoded.of(range(10), first, Work(tmp_path), "numbers", ["these"], size=4)
    assert all(same(found)) and first.seen == list(range(10)) and len(found) == 10
    assert [float(each) for each in found.column("b")[2:5]] == [2, 3, 4]
    assert found[-1]["c"] == 9 and [int(row["c"]) for row in found[6:9]] == [6, 7, 8]
    with pytest.raises(IndexError):
        found[10]
    again = Encoder()
    assert all(same(Encoded.of(range(10), again, Work(tmp_path), "numbers", ["these"], size=4))) and not again.seen
    other = Encoder()
    Encoded.of(range(10), other, Work(tmp_path), "numbers", ["others"], size=4)
    assert other.seen == list(range(10)), "what was encoded under other conditions is not reused"


def test_a_stopped_encoding_goes_on_behind_its_last_whole_file(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        Encoded.of(range(10), Encoder(stop=9), Work(tmp_path), "numbers", None, size=4)
    (tmp_path / "numbers" / "000001.safetensors").write_bytes(b"half a file")
    again = Encoder()
    assert all(same(Encoded.of(range(10), again, Work(tmp_path), "numbers", None, size=4)))
    assert again.seen == [4, 5, 6, 7, 8, 9]


def test_encodings_that_cannot_be_written_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "000000.safetensors").mkdir()
    with pytest.raises(ExportError, match=r"000000.safetensors: cannot be written") as error:
        Encoded.of(range(3), Encoder(), Work(tmp_path), "numbers", None)
    assert "\n" not in str(error.value)
