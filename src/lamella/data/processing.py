"""Batches of images and text, made by the model's own processor.

The processor replaces each image mark by as many tokens as the model uses for an image, and adds the pixel values.
A row is then::

    pad pad | image image image image  where is the circle ? | row one column two <eos>
            |<---------------- prompt --------------------->|<------- answer ------->|
            0                                        prompt_lengths                time

padded on the left, as for generation. In a conversation, earlier answers carry loss too, and belong to the prompt.
An encoder-decoder encodes the prompt alone, padded on the right, and generates the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamella.data.images import Image
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.measure.labelled import NO_LABEL
from lamella.stack import Model
from lamella.zoo import open_processor

MARK = "<image>"  # where an image stands in a text
IDS, LABELS = "input_ids", "labels"
Columns = dict[str, list[int]]  # of one row, what the model takes of each of its tokens, and its labels
Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class ImageTextRow:
    """One row of images and text: a conversation that ends with the answer.

    Attributes:
        images: the images, in the order of their marks.
        messages: the turns, each with ``role`` and ``content``, in which ``<image>`` stands for an image; the last one
            is the answer.
        where: where the row was found, for error messages.
        task: the kind of the row, if a dataset has several.

    Raises:
        CalibrationError: if the row has no prompt or no answer, or more or fewer images than marks.
    """

    images: Sequence[Image]
    messages: tuple[Message, ...]
    where: str = "a row"
    task: str = ""

    def __post_init__(self) -> None:
        roles = [each["role"] for each in self.messages]
        if len(roles) < 2 or roles[-1] != "assistant" or not self.answer.strip():
            raise CalibrationError(f"{self.where} has no prompt with an answer: give both")
        texts = [each["content"] for each in self.messages]
        marks, first = sum(text.count(MARK) for text in texts), roles.index("assistant")
        if marks != len(self.images):
            raise CalibrationError(
                f"{self.where} has {len(self.images)} images and {marks} marks {MARK} in its text: write it once for "
                "each image, or leave it out to have all images first"
            )
        if any(MARK in text for text in texts[first:]):
            raise CalibrationError(f"{self.where} has {MARK} after an answer: put images before the first answer")

    @property
    def answer(self) -> str:
        """The content of the last message."""
        return self.messages[-1]["content"]

    def text(self) -> bytes:
        """Return the messages as bytes, for hashing."""
        return repr([(each["role"], each["content"]) for each in self.messages]).encode()

    def content(self) -> bytes:
        """Return all that determines the row, messages and pixels, as bytes, for hashing."""
        return b"".join([self.text(), *(f"{each.shape}".encode() + each.tobytes() for each in self.images)])


class TextSegment(NamedTuple):
    """A part of a row: a prompt or an answer."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Processing:
    """The processor of a model, or the tokenizer of a model that takes text only.

    Attributes:
        processor: the processor or tokenizer of transformers.
        encodes: whether the model is an encoder-decoder.
    """

    processor: Any
    encodes: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer within the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def takes_images(self) -> bool:
        """Whether the processor takes images."""
        return hasattr(self.processor, "image_processor")

    @cached_property
    def inserts_images(self) -> bool:
        """Whether the processor puts an image before each text by itself (Florence-2), so that texts have no marks."""
        try:
            self._encoded(["a"], [np.zeros((32, 32, 3), dtype=np.uint8)], {})
        except Exception:  # usually since the text has no mark for the image
            return False
        return True

    @cached_property
    def image_ids(self) -> list[int]:
        """The token ids that stand for image positions."""
        ids = getattr(self.processor, "image_token_ids", None) or [getattr(self.processor, "image_token_id", None)]
        return [each for each in ids if each is not None]

    def batch(self, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        """Encode rows with their answers; rows with and without images may be mixed.

        Args:
            rows: the rows.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [batch, time], ``prompt_lengths`` [batch] (columns before
            the last answer), and the image inputs of the processor. Labels are -100 outside of answers. For an
            encoder-decoder, ``labels`` [batch, target time] are the tokens of the decoder, and ``prompt_lengths`` are
            0.

        Raises:
            CalibrationError: if the processor refuses the rows.
        """
        rows = list(rows)  # each row is decoded once
        columns, beside = self._columns(rows)
        answers = [self._tokens(row.answer, ends=True) for row in rows]
        if self.encodes:
            labels = pad_sequence([torch.tensor(each) for each in answers], True, NO_LABEL)
            nothing = torch.zeros(len(rows), dtype=torch.long)
            return self._padded(columns, "right") | beside | {LABELS: labels, "prompt_lengths": nothing}
        for row, answer in zip(columns, answers, strict=True):
            _extend(row, answer, answer)
        batch = self._padded(columns, "left") | beside
        lengths = batch[IDS].shape[1] - torch.tensor([len(answer) for answer in answers])
        return batch | {"prompt_lengths": lengths}

    def prompts(self, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        """Encode the rows without their answers, for ``generate``; see :meth:`batch`."""
        columns, beside = self._columns(list(rows))
        batch = self._padded(columns, "right" if self.encodes else "left") | beside
        del batch[LABELS]
        return batch

    def question(self, text: str, images: Sequence[Image] = ()) -> dict[str, Tensor]:
        """Encode one question, about any images that are given, for ``generate``.

        Args:
            text: the question.
            images: the images, each [height, width, 3].

        Raises:
            CalibrationError: if the processor refuses the images.
        """
        content = f"{MARK * len(images)}\n{text}" if images else text
        turns = ({"role": "user", "content": content}, {"role": "assistant", "content": "?"})
        return self.prompts([ImageTextRow(tuple(images), turns, "the question")])

    def grid(self, batch: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Return the grid (rows, columns) of the image tokens of a batch with one image; None if they form none."""
        if (sizes := batch.get("image_grid_thw")) is not None:
            merged = self.processor.image_processor.merge_size
            frames, rows, columns = sizes[0].tolist()
            return (rows // merged, columns // merged) if len(sizes) == frames == 1 else None
        views = batch["pixel_values"].shape[:-3]  # tiles of one image have no common grid
        ids = torch.tensor(self.image_ids, device=batch[IDS].device)
        side = math.isqrt(count := int(torch.isin(batch[IDS], ids).sum()))
        return (side, side) if math.prod(views) == 1 and side * side == count > 0 else None

    def visible(self, image: Image) -> Image:
        """Return the part of an image that the model sees: the center crop, if the processor crops."""
        if not getattr(self.processor.image_processor, "do_center_crop", False):
            return image
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side]

    def kinds(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Classify the tokens of a batch as ``image``, ``prompt`` or ``answer``.

        Returns:
            A boolean mask [batch, time] for each. For an encoder-decoder, ``answer`` is a mask of the decoder's tokens.
        """
        answer, real = batch[LABELS] != NO_LABEL, batch["attention_mask"].bool()
        image = real & torch.isin(batch[IDS], torch.tensor(self.image_ids, dtype=torch.long, device=real.device))
        prompt = real & ~image if self.encodes else real & ~image & ~answer
        return {"image": image, "prompt": prompt, "answer": answer}

    # From rows to tokens.

    def _columns(self, rows: Sequence[ImageTextRow]) -> tuple[list[Columns], dict[str, Tensor]]:
        """Return the tokens of all rows before their last answer, and the image inputs of the batch."""
        segments = [self._segments(row) for row in rows]
        columns, beside = self._first([each[0].text for each in segments], rows)
        for row, (_, *later) in zip(columns, segments, strict=True):
            for text, is_answer in later:
                tokens = self._tokens(text, ends=is_answer and self._template is None)  # a template ends turns itself
                _extend(row, tokens, tokens if is_answer else [NO_LABEL] * len(tokens))
        return columns, beside

    def _segments(self, row: ImageTextRow) -> list[TextSegment]:
        """Split a conversation before its last answer into prompts and answers, in turn."""
        *earlier, last = (index for index, each in enumerate(row.messages) if each["role"] == "assistant")
        segments: list[TextSegment] = []
        before = ""
        for turn in [last] if self.encodes else [*earlier, last]:
            text = self._text(row.messages[:turn])
            if not text.startswith(
                before
            ):  # some templates render earlier answers differently: then they belong to the prompt
                segments, before = [], ""
            segments.append(TextSegment(text[len(before) :], False))
            if turn != last:
                segments.append(TextSegment(row.messages[turn]["content"], True))
                before = text + row.messages[turn]["content"]
        return segments

    @cached_property
    def _template(self) -> Any:
        """The processor or tokenizer with a chat template; None if there is none, and texts are used as they are."""
        owners = (self.processor, self.tokenizer)
        return next((each for each in owners if getattr(each, "chat_template", None)), None)

    def _text(self, messages: Sequence[Message]) -> str:
        """Render messages as text, up to where the answer begins."""
        if self._template is not None:
            shown = [{"role": each["role"], "content": self._content(each["content"])} for each in messages]
            text: str = self._template.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
            return text
        text = messages[0]["content"]
        for each in messages[1:]:  # an answer follows directly, as it will be generated
            text += each["content"] if each["role"] == "assistant" and not self.encodes else f"\n{each['content']}"
        if self.takes_images and self.inserts_images:
            return text.replace(MARK, "").strip()
        return text.replace(MARK, self._mark)

    @cached_property
    def _mark(self) -> str:
        """The text that stands for an image."""
        mark: str = getattr(self.processor, "image_token", MARK)
        if getattr(
            self.processor, "return_mm_token_type_ids", False
        ):  # positions are counted per image, so images must be separated
            start, end = (getattr(self.tokenizer, f"vision_{side}_token", "") for side in ("start", "end"))
            mark = f"{start}{mark}{end}"
        return mark

    def _content(self, text: str) -> Any:
        """Return the content of a message in the form of the chat template: one without image parts takes text only."""
        if not self.takes_images:
            return text
        if "image" not in str(self._template.chat_template):
            return text.replace(MARK, self._mark)
        parts = (part.strip("\n") for part in re.split(f"({MARK})", text))
        return [{"type": "image"} if part == MARK else {"type": "text", "text": part} for part in parts if part]

    def _first(self, texts: Sequence[str], rows: Sequence[ImageTextRow]) -> tuple[list[Columns], dict[str, Tensor]]:
        """Encode the texts before the first answers: with images by the processor, without images by the tokenizer."""
        begins = getattr(self.tokenizer, "bos_token", None)
        special = {} if begins is None or not texts[0].startswith(begins) else {"add_special_tokens": False}
        seeing = [index for index, row in enumerate(rows) if row.images]
        beside: dict[str, Tensor] = {}
        found = {}
        if seeing:
            some, beside = self._shown([texts[index] for index in seeing], [rows[index] for index in seeing], special)
            found = dict(zip(seeing, some, strict=True))
        for index, text in enumerate(texts):
            if index not in found:
                found[index] = {IDS: list(self.tokenizer(text, **special)[IDS])}
            found[index][LABELS] = [NO_LABEL] * len(found[index][IDS])
        return [found[index] for index in range(len(rows))], beside

    def _shown(
        self, texts: list[str], rows: Sequence[ImageTextRow], special: dict[str, bool]
    ) -> tuple[list[Columns], dict[str, Tensor]]:
        """Encode texts with images: the tokens of each row, and the image inputs of all rows together."""
        where = ", ".join(dict.fromkeys(row.where for row in rows))
        if not self.takes_images:
            raise CalibrationError(f"{where}: this model takes no images: give one that does, or rows of text")
        try:
            encoded = self._encoded(texts, [image for row in rows for image in row.images], special)
        except Exception as error:  # a processor may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CalibrationError(f"{where}: the model's processor refuses it ({reason})") from error
        real = encoded.pop("attention_mask").bool()
        of_tokens = {
            name: encoded.pop(name) for name in list(encoded) if name == IDS or name.endswith("token_type_ids")
        }
        found = [
            {name: values[index][real[index]].tolist() for name, values in of_tokens.items()}
            for index in range(len(rows))
        ]
        return found, encoded

    def _encoded(self, texts: list[str], images: Sequence[Image], special: dict[str, bool]) -> dict[str, Any]:
        pillow = require("PIL.Image", "vision", "reading images")
        shown = [pillow.fromarray(image) for image in images]
        return dict(self.processor(text=texts, images=shown, padding=True, return_tensors="pt", **special))

    def _tokens(self, text: str, ends: bool) -> list[int]:
        end = [self.tokenizer.eos_token_id] if ends and self.tokenizer.eos_token_id is not None else []
        return [*self.tokenizer(text, add_special_tokens=False)[IDS], *end]

    def _padded(self, rows: Sequence[Columns], side: str) -> dict[str, Tensor]:
        """Pad the columns of rows, and add the attention mask [batch, time]."""
        fillers = {IDS: self.tokenizer.pad_token_id or 0, LABELS: NO_LABEL}
        names = dict.fromkeys(name for row in rows for name in row)
        lengths = [len(row[IDS]) for row in rows]
        width = max(lengths)

        def filled(values: Sequence[int], filler: int) -> list[int]:
            rest = [filler] * (width - len(values))
            return [*rest, *values] if side == "left" else [*values, *rest]

        batch = {
            name: torch.tensor([filled(row.get(name) or [0] * len(row[IDS]), fillers.get(name, 0)) for row in rows])
            for name in names
        }
        return batch | {"attention_mask": torch.tensor([filled([1] * length, 0) for length in lengths])}


def open_processing(model: Model, name: str | Path) -> Processing:
    """Open the processor of an opened model.

    Args:
        model: the opened model.
        name: the name that it was opened by, for models that have no folder.
    """
    return Processing(
        open_processor(model.path or name), bool(getattr(model.model.config, "is_encoder_decoder", False))
    )


def _extend(row: Columns, tokens: list[int], labels: list[int]) -> None:
    """Append tokens to a row; other columns are filled with zeros."""
    more = {IDS: tokens, LABELS: labels}
    for name, values in row.items():
        values += more.get(name, [0] * len(tokens))
