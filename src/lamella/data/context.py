"""What the loaders of inputs may need of the run that they load for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lamella.data.processing import Processing
from lamella.data.sources import Split
from lamella.errors import MethodError


@dataclass(frozen=True)
class InputContext:
    """For whom an input is read.

    Attributes:
        opener: gives the tokenizer of the model, when the first input asks for it; None without a model.
        seed: of what is drawn, such as which windows of a text.
        split: the part of a source that is wanted.
        processing_opener: gives what the model reads images and text with.
    """

    opener: Callable[[], Any] | None = None
    seed: int = 0
    split: Split = "calibration"
    processing_opener: Callable[[], Processing] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            MethodError: when there is no model.
        """
        if self.opener is None:
            raise MethodError("text is read with a model's tokenizer: give a model, or token ids")
        return self.opener()

    @cached_property
    def processing(self) -> Processing:
        """The model's processor.

        Raises:
            MethodError: when there is no model.
        """
        if self.processing_opener is None:
            raise MethodError("images are read with a model's processor: give a model")
        return self.processing_opener()
