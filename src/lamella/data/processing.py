"""How a model's own processor reads rows of images and text, some at a time.

The processor puts as many positions in the place of an image as the model has for it, and makes of all images what the
model takes beside the tokens. A row is then::

    pad pad | image image image image  where is the circle ? | row one column two <eos>
            |<---------------- prompt --------------------->|<------- answer ------->|
            0                                        prompt_lengths                time

padded on the left, as for generation. Of a conversation, earlier answers carry loss too, and are part of the prompt.
An encoder-decoder reads the prompt alone, padded on the right, and writes the answer.
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
class Conversation:
    """One row as people hold it.

    Attributes:
        images: in the order of their marks.
        messages: a conversation, each with ``role`` and ``content``, in which ``<image>`` stands for an image; the last
            one is the answer.
        where: it was found, for messages.
        task: what kind of row it is, where there are several.

    Raises:
        CalibrationError: for a row without prompt or answer, or with more or fewer images than marks.
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
                f"{self.where} has {len(self.images)} images and {marks} times {MARK} in its text: write it once for "
                "each, or leave it out, and the images come first"
            )
        if any(MARK in text for text in texts[first:]):
            raise CalibrationError(f"{self.where} has {MARK} behind an answer: put images before the first answer")

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def text(self) -> bytes:
        """The messages, to be hashed."""
        return repr([(each["role"], each["content"]) for each in self.messages]).encode()

    def content(self) -> bytes:
        """All that decides what a model makes of it, to be hashed."""
        return b"".join([self.text(), *(f"{each.shape}".encode() + each.tobytes() for each in self.images)])


class Piece(NamedTuple):
    """A stretch of a row: what is asked, or an answer."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Processing:
    """A model's processor, or the tokenizer of one that reads text alone.

    Attributes:
        processor: of transformers.
        encodes: whether the model is an encoder-decoder.
    """

    processor: Any
    encodes: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def takes_images(self) -> bool:
        """Whether it takes images."""
        return hasattr(self.processor, "image_processor")

    @cached_property
    def inserts_images(self) -> bool:
        """Whether it puts an image before each text by itself (Florence-2), so that texts have no marks."""
        try:
            self._called(["a"], [np.zeros((32, 32, 3), dtype=np.uint8)], {})
        except Exception:  # mostly: an image without its mark
            return False
        return True

    @cached_property
    def image_ids(self) -> list[int]:
        """The tokens that stand for the positions of an image."""
        ids = getattr(self.processor, "image_token_ids", None) or [getattr(self.processor, "image_token_id", None)]
        return [each for each in ids if each is not None]

    def batch(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        """Some rows as a model takes them, with their answers; images and text alone may be mixed.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [batch, time], ``prompt_lengths`` [batch] (columns before
            the last answer), and what the processor makes of the images. Labels are -100 where there is no answer. Of
            an encoder-decoder, ``labels`` [batch, written] are what it writes, and nothing is prompt.

        Raises:
            CalibrationError: for rows that the processor refuses.
        """
        rows = list(rows)  # each is read once
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

    def prompts(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        """The same rows before their answers, for ``generate``; see :meth:`batch`."""
        columns, beside = self._columns(list(rows))
        batch = self._padded(columns, "right" if self.encodes else "left") | beside
        del batch[LABELS]
        return batch

    def question(self, text: str, pictures: Sequence[Image] = ()) -> dict[str, Tensor]:
        """One question, about pictures if there are any, for ``generate``.

        Raises:
            CalibrationError: for pictures that the processor refuses.
        """
        asked = f"{MARK * len(pictures)}\n{text}" if pictures else text
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": "?"})
        return self.prompts([Conversation(tuple(pictures), turns, "the question")])

    def grid(self, batch: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """How the tokens of a batch's only picture lie over it, as rows and columns; None where they form no grid."""
        if (sizes := batch.get("image_grid_thw")) is not None:
            merged = self.processor.image_processor.merge_size
            frames, rows, columns = sizes[0].tolist()
            return (rows // merged, columns // merged) if len(sizes) == frames == 1 else None
        views = batch["pixel_values"].shape[:-3]  # tiles of one picture have no common grid
        ids = torch.tensor(self.image_ids, device=batch[IDS].device)
        side = math.isqrt(count := int(torch.isin(batch[IDS], ids).sum()))
        return (side, side) if math.prod(views) == 1 and side * side == count > 0 else None

    def seen(self, picture: Image) -> Image:
        """What of a picture the model sees: its middle, where the processor cuts that out."""
        if not getattr(self.processor.image_processor, "do_center_crop", False):
            return picture
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return picture[top : top + side, left : left + side]

    def places(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which positions of a batch are what: every token is one of ``image``, ``prompt`` and ``answer``.

        Returns:
            [batch, time] bool each. Of an encoder-decoder, ``answer`` is of what it writes.
        """
        answer, real = batch[LABELS] != NO_LABEL, batch["attention_mask"].bool()
        image = real & torch.isin(batch[IDS], torch.tensor(self.image_ids, dtype=torch.long, device=real.device))
        prompt = real & ~image if self.encodes else real & ~image & ~answer
        return {"image": image, "prompt": prompt, "answer": answer}

    # From rows to tokens.

    def _columns(self, rows: Sequence[Conversation]) -> tuple[list[Columns], dict[str, Tensor]]:
        """The tokens of all rows before their last answer, and what the processor makes of all images."""
        pieces = [self._pieces(row) for row in rows]
        columns, beside = self._first([each[0].text for each in pieces], rows)
        for row, (_, *later) in zip(columns, pieces, strict=True):
            for text, is_answer in later:
                tokens = self._tokens(text, ends=is_answer and self._template is None)  # a template ends turns itself
                _extend(row, tokens, tokens if is_answer else [NO_LABEL] * len(tokens))
        return columns, beside

    def _pieces(self, row: Conversation) -> list[Piece]:
        """A conversation up to its last answer: what is asked and what was answered, in turn."""
        *earlier, last = (place for place, each in enumerate(row.messages) if each["role"] == "assistant")
        pieces: list[Piece] = []
        before = ""
        for place in [last] if self.encodes else [*earlier, last]:
            text = self._text(row.messages[:place])
            if not text.startswith(before):  # some templates write earlier answers anew: then they are prompt
                pieces, before = [], ""
            pieces.append(Piece(text[len(before) :], False))
            if place != last:
                pieces.append(Piece(row.messages[place]["content"], True))
                before = text + row.messages[place]["content"]
        return pieces

    @cached_property
    def _template(self) -> Any:
        """What writes conversations, the processor or its tokenizer; None where texts stand as they are."""
        owners = (self.processor, self.tokenizer)
        return next((each for each in owners if getattr(each, "chat_template", None)), None)

    def _text(self, messages: Sequence[Message]) -> str:
        """A conversation as text, up to where an answer begins."""
        if self._template is not None:
            shown = [{"role": each["role"], "content": self._content(each["content"])} for each in messages]
            text: str = self._template.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
            return text
        text = messages[0]["content"]
        for each in messages[1:]:  # an answer follows at once, as it will be written
            text += each["content"] if each["role"] == "assistant" and not self.encodes else f"\n{each['content']}"
        if self.takes_images and self.inserts_images:
            return text.replace(MARK, "").strip()
        return text.replace(MARK, self._mark)

    @cached_property
    def _mark(self) -> str:
        """What stands for an image in a text."""
        mark: str = getattr(self.processor, "image_token", MARK)
        if getattr(self.processor, "return_mm_token_type_ids", False):  # places are counted by images, which must part
            start, end = (getattr(self.tokenizer, f"vision_{side}_token", "") for side in ("start", "end"))
            mark = f"{start}{mark}{end}"
        return mark

    def _content(self, text: str) -> Any:
        """The content of a message in the form of its template: one that knows no images takes text alone."""
        if not self.takes_images:
            return text
        if "image" not in str(self._template.chat_template):
            return text.replace(MARK, self._mark)
        parts = (part.strip("\n") for part in re.split(f"({MARK})", text))
        return [{"type": "image"} if part == MARK else {"type": "text", "text": part} for part in parts if part]

    def _first(self, texts: Sequence[str], rows: Sequence[Conversation]) -> tuple[list[Columns], dict[str, Tensor]]:
        """What comes before the first answers: with images through the processor, without through the tokenizer."""
        begins = getattr(self.tokenizer, "bos_token", None)
        special = {} if begins is None or not texts[0].startswith(begins) else {"add_special_tokens": False}
        seeing = [place for place, row in enumerate(rows) if row.images]
        beside: dict[str, Tensor] = {}
        found = {}
        if seeing:
            some, beside = self._shown([texts[place] for place in seeing], [rows[place] for place in seeing], special)
            found = dict(zip(seeing, some, strict=True))
        for place, text in enumerate(texts):
            if place not in found:
                found[place] = {IDS: list(self.tokenizer(text, **special)[IDS])}
            found[place][LABELS] = [NO_LABEL] * len(found[place][IDS])
        return [found[place] for place in range(len(rows))], beside

    def _shown(
        self, texts: list[str], rows: Sequence[Conversation], special: dict[str, bool]
    ) -> tuple[list[Columns], dict[str, Tensor]]:
        """What the processor makes of texts with images: of each its tokens, of all together what is beside them."""
        where = ", ".join(dict.fromkeys(row.where for row in rows))
        if not self.takes_images:
            raise CalibrationError(f"{where}: this model reads no images: give one that does, or rows of text")
        try:
            called = self._called(texts, [image for row in rows for image in row.images], special)
        except Exception as error:  # of a processor, anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CalibrationError(f"{where}: the model's processor refuses it ({reason})") from error
        real = called.pop("attention_mask").bool()
        of_tokens = {name: called.pop(name) for name in list(called) if name == IDS or name.endswith("token_type_ids")}
        found = [
            {name: values[place][real[place]].tolist() for name, values in of_tokens.items()}
            for place in range(len(rows))
        ]
        return found, called

    def _called(self, texts: list[str], images: Sequence[Image], special: dict[str, bool]) -> dict[str, Any]:
        pillow = require("PIL.Image", "vision", "reading images")
        shown = [pillow.fromarray(image) for image in images]
        return dict(self.processor(text=texts, images=shown, padding=True, return_tensors="pt", **special))

    def _tokens(self, text: str, ends: bool) -> list[int]:
        end = [self.tokenizer.eos_token_id] if ends and self.tokenizer.eos_token_id is not None else []
        return [*self.tokenizer(text, add_special_tokens=False)[IDS], *end]

    def _padded(self, rows: Sequence[Columns], side: str) -> dict[str, Tensor]:
        """All columns of some rows, and which are tokens [batch, time]."""
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
    """What an opened model reads images and text with.

    Args:
        model: it says how it reads, and where it lies.
        name: what it was opened by, where it lies nowhere.
    """
    return Processing(
        open_processor(model.path or name), bool(getattr(model.model.config, "is_encoder_decoder", False))
    )


def _extend(row: Columns, tokens: list[int], labels: list[int]) -> None:
    """Text behind what a row has already."""
    more = {IDS: tokens, LABELS: labels}
    for name, values in row.items():
        values += more.get(name, [0] * len(tokens))
