"""The context in which inputs are loaded: the tokenizer or processor of the model, the seed and the split."""

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
    """What the loader of an input needs to know about the run that it loads for.

    Attributes:
        opener: returns the tokenizer of the model when the first input needs it; None if there is no model.
        seed: random seed, for instance for choosing windows of a text.
        split: which split of its source the input is read from.
        processing_opener: returns the processor of the model, for images and text; None if there is no model.
    """

    opener: Callable[[], Any] | None = None
    seed: int = 0
    split: Split = "calibration"
    processing_opener: Callable[[], Processing] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            MethodError: if there is no model.
        """
        if self.opener is None:
            raise MethodError("text needs the tokenizer of a model: give a model, or token ids")
        return self.opener()

    @cached_property
    def processing(self) -> Processing:
        """The model's processor.

        Raises:
            MethodError: if there is no model.
        """
        if self.processing_opener is None:
            raise MethodError("images need the processor of a model: give a model")
        return self.processing_opener()
