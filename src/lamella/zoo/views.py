"""Input types that are views of an opened model, such as a denoiser or an image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from lamella.errors import ArchitectureError, CheckpointError
from lamella.zoo.libraries import parse_name
from lamella.zoo.opening import open_model
from lamella.zoo.pull import check_hub_id


class View:
    """A type of model that a method works on, made from any model opened by :func:`open_model`.

    Subclasses define in :meth:`of` how to make it from an opened model, and in :meth:`built_in` which built-in models
    the method has.

    Attributes:
        metavar, source_help: name and description of such an input on the command line.
        noun: its name in error messages, such as ``pipeline of diffusers``.
        libraries: allowed libraries of its model.
        classes: names of the allowed classes of its model; see :func:`open_model`.
        dtype: of the weights; see :func:`open_model`.
        names: of the built-in models.
    """

    metavar: ClassVar[str] = "MODEL"
    source_help: ClassVar[str]
    noun: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[torch.dtype | str | None] = "float32"
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the view of an opened model, or of a model in memory."""
        raise NotImplementedError

    @classmethod
    def built_in(cls, name: str) -> Self:
        """Return the built-in model of one of the ``names``."""
        raise NotImplementedError

    @classmethod
    def open(cls, name: Any) -> Self:
        """Open a model.

        Args:
            name: anything that ``lamella.open`` takes, of an allowed library; or the name of a built-in model.

        Raises:
            CheckpointError: for a model that is missing, damaged, or of another library.
            ArchitectureError: for a model of another kind.
        """
        if isinstance(name, str | Path) and str(name) in cls.names:
            return cls.built_in(str(name))
        try:
            return cls.of(open_model(name, dtype=cls.dtype, libraries=cls.libraries, classes=cls.classes))
        except (CheckpointError, ArchitectureError) as error:
            what = name if isinstance(name, str | Path) else getattr(name, "name", type(name).__name__)
            raise type(error)(f"{what} is no {cls.noun} ({error}): give {cls.source_help}") from None

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check that there is a model of that name, without opening it.

        Raises:
            CheckpointError: if there is none.
        """
        path = Path(name).expanduser()
        if path.is_dir() or str(name) in cls.names or parse_name(name) is not None:
            return
        if "transformers" not in cls.libraries:
            raise CheckpointError(f"there is no folder {name}: give {cls.source_help}")
        check_hub_id(str(name), path)
