"""Images with text: files as people hold them, what is refused, and batches through the models' own processors."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, Florence2Processor

from lamella.data import ImageText, ImageTextRow, InputContext, Processing
from lamella.errors import CalibrationError, LamellaError
from lamella.zoo.vlm import SHAPES_VLM, shapes_vlm
from lamella.zoo.worlds import examples, word_tokenizer

NANO = Path(__file__).parents[1] / "models" / "nano-llama"
SMALL = {"num_hidden_layers": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<eos>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MADE: dict[str, Any] = {}


def made(kind: str) -> tuple[Any, Processing]:
    """A small model with what it reads rows with."""
    if kind not in MADE:
        model, processor = shapes_vlm(kind, **SMALL)
        MADE[kind] = model, Processing(processor)
    return MADE[kind]


def context(split: Any = "calibration", kind: str = "llava", seed: int = 0) -> InputContext:
    processing = made(kind)[1]
    return InputContext(lambda: processing.tokenizer, seed, split, lambda: processing)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, the first of which are red, green and blue."""
    (tmp_path / "images").mkdir()
    for number, colour in enumerate(
        ["red", "green", "blue", "white", "black", "yellow", "purple", "cyan", "grey", "tan"]
    ):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / name


def rows(count: int, shown: int | None = None) -> list[dict[str, str]]:
    return [
        {"image": f"images/{n if shown is None else n % shown}.png", "prompt": f"what {n}?", "answer": "red"}
        for n in range(count)
    ]


# Files as people hold them.


def test_rows_are_read_as_people_hold_them(folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what colour?"}]
    inline = [{"type": "image", "image": "images/1.png"}, {"type": "text", "text": "what colour?"}]
    says = {"role": "assistant", "content": "red"}
    file = written(
        folder,
        {"image": "images/0.png", "prompt": "what colour?", "answer": "red"},
        {"images": ["images/0.png", "images/1.png"], "question": "<image> or <image>?", "completion": "red"},
        {"image": "images/0.png", "messages": [{"role": "user", "content": parts}, says]},
        {"messages": [{"role": "user", "content": inline}, says]},
        {"image": "images/2.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"},
                                                      {"from": "gpt", "value": "red"}]},
        {"file_name": "images/0.png", "text": "a red square"},
        {"prompt": "without a image?", "answer": "no"},
    )  # fmt: skip
    found = ImageText.open(file, context("whole"))
    said = [tuple(each["content"] for each in row.messages) for row in found]
    assert said == [
        ("<image>\nwhat colour?", "red"), ("<image> or <image>?", "red"), ("<image>what colour?", "red"),
        ("<image>what colour?", "red"), ("<image>\nwhat?", "red"), ("<image>\n", "a red square"),
        ("without a image?", "no"),
    ]  # fmt: skip
    assert [len(row.images) for row in found] == [1, 2, 1, 1, 1, 1, 0]
    assert [row.images[0][0, 0].tolist() for row in found[:5]] == [
        [255, 0, 0], [255, 0, 0], [255, 0, 0], [0, 128, 0], [0, 0, 255]
    ]  # fmt: skip
    assert found.describe() | {"sha256": ""} == {
        "data": str(file),
        "split": "whole",
        "rows": 7,
        "images": 7,
        "sha256": "",
    }


def test_a_file_is_cut_in_two_and_rows_of_one_image_stay_together(folder: Path) -> None:
    file = written(folder, *rows(20, shown=10))
    kept, judged = (ImageText.open(file, context(split)) for split in ("calibration", "test"))
    assert len(kept) == 16 and len(judged) == 4
    seen = [{each.images[0].tobytes() for each in part} for part in (kept, judged)]
    assert not seen[0] & seen[1] and len(seen[1]) == 2
    assert [each.content() for each in kept.part("test")] == [each.content() for each in judged]
    assert kept.describe()["sha256"] != judged.describe()["sha256"]
    joined = [{"images": ["images/0.png", "images/9.png"], "prompt": "<image><image> same?", "answer": "no"}]
    kept, judged = (ImageText.open(written(folder, *rows(10), *joined), context(s)) for s in ("calibration", "test"))
    assert not {p.tobytes() for r in kept for p in r.images} & {p.tobytes() for r in judged for p in r.images}
    with pytest.raises(CalibrationError, match="one image only"):
        ImageText.open(written(folder, *rows(4, shown=1)), context())


def test_a_folder_has_its_own_splits(folder: Path) -> None:
    written(folder, *rows(3), name="train.jsonl")
    written(folder, *rows(2), name="test.jsonl")
    assert len(ImageText.open(folder, context())) == 3 and len(ImageText.open(folder, context("test"))) == 2
    (folder / "test.jsonl").unlink()
    with pytest.raises(CalibrationError, match=r"no train\.jsonl and test\.jsonl"):
        ImageText.open(folder, context())


def test_the_world_of_shapes_is_built_in() -> None:
    found = ImageText.open("shapes:colour+count", context(seed=3), rows=6)
    again = examples(["colour", "count"], 6, "calibration", seed=3)
    for row, each in zip(found, again, strict=True):
        assert row.messages[0]["content"] == f"<image>\n{each.prompt}" and row.answer == each.answer
        assert np.array_equal(row.images[0], each.image) and row.task == each.task
    assert {row.task for row in ImageText.open("shapes", context(), rows=8)} == {
        "colour",
        "count",
        "position",
        "relation",
    }
    assert ImageText.open("shapes", context(), rows=2, pixels=64)[0].images[0].shape == (64, 64, 3)
    test = found.part("test")
    assert not {row.images[0].tobytes() for row in test} & {row.images[0].tobytes() for row in found}
    with pytest.raises(CalibrationError, match="no task 'weight'"):
        ImageText.open("shapes:weight", context())
    with pytest.raises(CalibrationError, match="has the splits calibration and test, not 'whole'"):
        ImageText.open("shapes", context("whole"))


# What is refused, each in one line with file and line.


def refused(folder: Path, row: Any, match: str) -> None:
    file = written(folder, {"prompt": "what?", "answer": "red"}, row)
    with pytest.raises(LamellaError, match=match) as error:
        ImageText.open(file, context("whole"))
    assert "\n" not in str(error.value) and "rows.jsonl line 2" in str(error.value)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": "images/0.png", "prompt": "what?"}, "no prompt with an answer"),
        ({"image": "images/0.png", "prompt": "what?", "answer": "  "}, "no prompt with an answer"),
        ({"answer": "red"}, "no prompt with an answer"),
        (["images/0.png"], "is no JSON object"),
        ({"image": "images/0.png", "prompt": "<image> or <image>?", "answer": "red"}, "1 images and 2 marks <image>"),
        ({"prompt": "<image> what?", "answer": "red"}, "0 images and 1 marks <image>"),
        ({"images": ["images/0.png"] * 2, "prompt": "<image>?", "answer": "red"}, "2 images and 1 marks"),
        ({"image": "images/none.png", "prompt": "what?", "answer": "red"}, "no image 'images/none.png'"),
        ({"image": "../secret.png", "prompt": "what?", "answer": "red"}, "outside the folder"),
        ({"image": "/etc/passwd", "prompt": "what?", "answer": "red"}, "outside the folder"),
        ({"image": "http://example.org/a.png", "prompt": "what?", "answer": "red"}, "no image 'http://example.org"),
        ({"image": 3, "prompt": "what?", "answer": "red"}, "images are paths"),
        ({"messages": [{"role": "user", "content": "what?"}]}, "no prompt with an answer"),
        ({"messages": [{"role": "assistant", "content": "red"}]}, "no prompt with an answer"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "red"}]}, "messages without role or content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}]},
         "messages without role or content"),
        ({"image": "images/0.png", "messages": [
            {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"},
            {"role": "user", "content": "<image> and this?"}, {"role": "assistant", "content": "blue"}]},
         "put images before the first answer"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_with_its_line(row: Any, match: str, folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes((folder / "images" / "0.png").read_bytes())
    refused(folder, row, match)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: Any) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    secret.write_bytes((folder / "images" / "0.png").read_bytes())
    os.symlink(secret, folder / "images" / "link.png")
    refused(folder, {"image": "images/link.png", "prompt": "what?", "answer": "red"}, "outside the folder")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_no_image_is_refused_and_never_run(folder: Path) -> None:
    whole = (folder / "images" / "0.png").read_bytes()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file\n"
    damaged = {
        "text.png": b"not a image",
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "script.eps": script,
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
        refused(folder, {"image": name, "prompt": "what?", "answer": "red"}, f"the image {name} cannot be read")
    (folder / "bomb.png").write_bytes(bomb())
    refused(folder, {"image": "bomb.png", "prompt": "what?", "answer": "red"}, "bomb.png")


def test_an_empty_file_and_a_name_of_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no rows for the split whole"):
        ImageText.open(written(folder), context("whole"))
    with pytest.raises(LamellaError, match=r"no-such-thing\.jsonl"):
        ImageText.open("no-such-thing.jsonl", context())
    with pytest.raises(CalibrationError, match="rows 0: give at least 1"):
        ImageText.open("shapes", context(), rows=0)


def test_a_model_without_images_reads_text_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    processing = Processing(tokenizer)
    plain = InputContext(lambda: tokenizer, 0, "calibration", lambda: processing)
    with pytest.raises(CalibrationError, match="shapes row 0 has an image, but this model takes text only"):
        ImageText.open("shapes", plain)
    row = ImageTextRow((), ({"role": "user", "content": "What purrs?"}, {"role": "assistant", "content": "A cat."}))
    batch = processing.batch([row])
    assert (
        tokenizer.decode(batch["input_ids"][0][int(batch["prompt_lengths"][0]) :], skip_special_tokens=True) == "A cat."
    )


# Batches.


def mixed(count: int = 5) -> list[ImageTextRow]:
    """Rows with an image, with two, and without; prompts and answers of many lengths."""
    tasks = ["colour", "list", "position", "caption"]
    found = []
    for number, each in enumerate(examples(tasks, count, seed=9)):
        images = (each.image, each.image[::-1].copy())[: 1 + number % 3 % 2] if number % 3 < 2 else ()
        said = "<image>" * len(images) + each.prompt
        messages = ({"role": "user", "content": said}, {"role": "assistant", "content": each.answer})
        found.append(ImageTextRow(images, messages, f"row {number}"))
    assert [len(each.images) for each in found[:3]] == [1, 2, 0]
    return found


@pytest.mark.parametrize("kind", SHAPES_VLM)
def test_a_batch_is_what_the_processor_makes_of_its_rows(kind: str) -> None:
    """Rows one by one through the processor by hand: prompt, then answer and end."""
    _, processing = made(kind)
    processor, tokenizer = processing.processor, processing.tokenizer
    shown = mixed()
    batch = processing.batch(shown)
    places = processing.kinds(batch)
    for row, ids, mask, labels, length, image, prompt, answer in zip(
        shown, batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], batch["prompt_lengths"],
        *places.values(), strict=True,
    ):  # fmt: skip
        mark = "<vision><image></vision>" if kind.startswith("qwen") else "<image>"
        text = row.messages[0]["content"].replace("<image>", mark)
        images = [Image.fromarray(each) for each in row.images] or None
        by_hand = processor(text=text, images=images, return_tensors="pt")["input_ids"][0].tolist()
        wanted = [*tokenizer(row.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert ids[mask].tolist() == by_hand + wanted
        assert ids[length:].tolist() == labels[length:].tolist() == wanted and (labels[:length] == -100).all()
        assert bool(mask[-1]) and not mask[: len(mask) - len(by_hand + wanted)].any(), "padded on the left"
        per_image = 16 if kind == "idefics3" else 64
        assert int(image.sum()) == per_image * len(row.images)
        assert int(answer.sum()) == len(wanted) and bool((answer | image | prompt).eq(mask).all())
        assert not (answer & image).any() and not (prompt & (answer | image)).any()


@pytest.mark.parametrize("kind", SHAPES_VLM)
@torch.no_grad()
def test_a_mixed_batch_says_what_its_rows_say_alone(kind: str) -> None:
    model, processing = made(kind)
    shown = mixed()
    together = processing.batch(shown)
    logits = model(**read(together), use_cache=False).logits
    for row, said, labels in zip(shown, logits, together["labels"], strict=True):
        alone = processing.batch([row])
        own = model(**read(alone), use_cache=False).logits[0]
        torch.testing.assert_close(said[-len(own) :], own, atol=2e-5, rtol=1e-4)
        assert torch.equal(labels[-len(own) :], alone["labels"][0])


def read(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl_moe"])
@torch.no_grad()
def test_prompts_are_the_batch_without_answers_and_generate(kind: str) -> None:
    model, processing = made(kind)
    shown = mixed(3)
    prompts = processing.prompts(shown)
    for row, ids, mask in zip(shown, prompts["input_ids"], prompts["attention_mask"].bool(), strict=True):
        alone = processing.batch([row])
        assert ids[mask].tolist() == alone["input_ids"][0, : int(alone["prompt_lengths"][0])].tolist()
    out = model.generate(**prompts, max_new_tokens=3, do_sample=False)
    for row, said in zip(shown, out[:, prompts["input_ids"].shape[1] :], strict=True):
        own = processing.prompts([row])
        alone = model.generate(**own, max_new_tokens=3, do_sample=False)[0, own["input_ids"].shape[1] :]
        assert said[: len(alone)].tolist() == alone.tolist()


def test_every_answer_of_a_conversation_carries_loss_and_the_last_one_is_the_answer() -> None:
    _, processing = made("llava")
    said = ["<image> what colour?", "red", "how many?", "two shapes", "where?", "row one"]
    messages = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said))
    row = ImageTextRow((examples(["colour"], 1)[0].image,), messages)
    check_conversation(processing, row, "<image> " * 64 + "what colour ? red <eos> how many ? two shapes <eos> where ?")


def check_conversation(processing: Processing, row: ImageTextRow, prompt: str) -> None:
    batch, tokenizer = processing.batch([row]), processing.tokenizer
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    length = int(batch["prompt_lengths"][0])
    assert tokenizer.decode(ids[1:length]) == prompt and tokenizer.decode(ids[length:]) == "row one <eos>"
    assert tokenizer.decode(labels[labels != -100], skip_special_tokens=True) == "red two shapes row one"
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_a_chat_template_writes_conversations_and_is_followed() -> None:
    _, processor = shapes_vlm("llava", **SMALL)
    processor.chat_template = TEMPLATE
    processing = Processing(processor)
    messages = ({"role": "user", "content": "<image>\nwhat colour?"}, {"role": "assistant", "content": "red"},
                {"role": "user", "content": "where?"}, {"role": "assistant", "content": "row one"})  # fmt: skip
    row = ImageTextRow((examples(["colour"], 1)[0].image,), messages)
    batch, tokenizer = processing.batch([row]), processing.tokenizer
    text = TEMPLATE and processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
         {"role": "user", "content": [{"type": "text", "text": "where?"}]}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    whole = processor(text=text, images=[Image.fromarray(row.images[0])], return_tensors="pt")["input_ids"][0]
    length = int(batch["prompt_lengths"][0])
    assert batch["input_ids"][0, :length].tolist() == whole.tolist()
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "red row one <eos>"


def test_a_chat_template_that_knows_no_images_is_given_text() -> None:
    _, processor = shapes_vlm("llava", **SMALL)
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processing = Processing(processor)
    row = ImageTextRow(
        (examples(["colour"], 1)[0].image,),
        ({"role": "user", "content": "<image>\nwhat colour?"}, {"role": "assistant", "content": "red"}),
    )
    ids, image = processing.batch([row])["input_ids"][0], processor.tokenizer.convert_tokens_to_ids("<image>")
    text = "user: <image>\nwhat colour?<eos>assistant: red<eos>"
    whole = processor(text=text, images=[Image.fromarray(row.images[0])], return_tensors="pt")["input_ids"][0]
    assert ids.tolist() == whole.tolist() and int((ids == image).sum()) == 64


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer() -> None:
    _, processing = made("llava")
    both = Processing(processing.processor, encodes=True)
    shown = mixed(4)
    batch, alone = both.batch(shown), processing.batch(shown)
    places = both.kinds(batch)
    for place, row in enumerate(shown):
        answer = [*both.tokenizer(row.answer, add_special_tokens=False)["input_ids"], both.tokenizer.eos_token_id]
        labels = batch["labels"][place]
        assert labels[: len(answer)].tolist() == answer and (labels[len(answer) :] == -100).all()
        mask = batch["attention_mask"][place].bool()
        length = int(mask.sum())
        assert mask[:length].all(), "padded on the right"
        before = alone["input_ids"][place, : int(alone["prompt_lengths"][place])]
        assert batch["input_ids"][place, :length].tolist() == before[before != both.tokenizer.pad_token_id].tolist()
        assert int(places["image"][place].sum()) == 64 * len(row.images) and int(places["answer"][place].sum()) == len(
            answer
        )
    assert batch["prompt_lengths"].tolist() == [0] * len(shown)


def test_a_processor_that_places_images_itself_gets_texts_without_marks() -> None:
    tokenizer = word_tokenizer()
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square, image_seq_length=16)
    processor = Florence2Processor(images, tokenizer)
    processing = Processing(processor, encodes=True)
    assert processing.inserts_images and not made("llava")[1].inserts_images
    shown = [row for row in mixed(8) if len(row.images) == 1]
    batch = processing.batch(shown)
    for row, ids, mask in zip(shown, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        text = row.messages[0]["content"].removeprefix("<image>")
        by_hand = processor(text=text, images=Image.fromarray(row.images[0]), return_tensors="pt")
        assert ids[mask].tolist() == by_hand["input_ids"][0].tolist()
    assert processing.kinds(batch)["image"].sum(dim=1).tolist() == [16] * len(shown)
    assert batch["pixel_values"].shape == (len(shown), 3, 32, 32)


def test_what_the_processor_refuses_is_one_line_with_the_row() -> None:
    _, processing = made("qwen2_vl")
    image = examples(["colour"], 1)[0].image
    messages = ({"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "red"})
    odd = ImageTextRow((image[:1].repeat(300, axis=1),), messages, "row 7")  # no model takes a line
    with pytest.raises(CalibrationError, match="row 7: the model's processor refuses it") as error:
        processing.batch([odd])
    assert "\n" not in str(error.value)
