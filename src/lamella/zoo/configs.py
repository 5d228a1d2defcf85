"""Configs of checkpoints, read without executing code next to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from lamella.errors import ArchitectureError, CheckpointError, DownloadError, LamellaError
from lamella.plan import checkpoint, native
from lamella.registry import import_network
from lamella.zoo.published import config_of, is_published
from lamella.zoo.pull import ZOO

CONFIG = "config.json"


def native_metadata(folder: Path) -> native.NativeMetadata | None:
    """Return the metadata of a native export in the config of a folder; None for any other checkpoint.

    Raises:
        CheckpointError: if the config is damaged, or has invalid metadata.
    """
    return native.read_metadata(checkpoint.read_json(folder / CONFIG), str(folder / CONFIG))


def register_class(place: Path | str) -> None:
    """Register a method's own model class with transformers, if a checkpoint's config names an unknown one."""
    if isinstance(place, Path) and (place / CONFIG).is_file():
        kind = str(checkpoint.read_json(place / CONFIG).get("model_type"))
        if kind not in CONFIG_MAPPING and not is_published(place):
            import_network(kind)


def open_config(place: Path | str) -> Any:
    """Return the config of a checkpoint, which needs no code except transformers' and Lamella's.

    Raises:
        ArchitectureError: if the model comes with its own modelling code.
        CheckpointError: if its layers need code from elsewhere.
    """
    metadata = native_metadata(place) if isinstance(place, Path) else None
    register_class(place)
    if isinstance(place, Path) and metadata is not None and metadata.is_own_class:
        kind = native.config_class(checkpoint.read_json(place / CONFIG)["model_type"])
        config = load_from(kind.from_pretrained, place)
    elif is_published(place):
        config = load_from(config_of, place)
    else:
        config = load_from(AutoConfig.from_pretrained, place, trust_remote_code=False)
    for what in ("_attn_implementation", "_experts_implementation"):
        implementation = getattr(config, what, None)
        if isinstance(implementation, str) and "/" in implementation:  # kernels of the hub
            raise CheckpointError(
                f"{place}: its config asks to run code of '{implementation}': remove {what[1:]} from it"
            )
    return config


def load_from(load: Callable[..., Any], place: Path | str, **options: Any) -> Any:
    """Load an object with transformers, turning any error on damaged files into a one-line message.

    Args:
        load: a ``from_pretrained`` function.
        place: local folder, or hub id.
        **options: further arguments of ``load``.
    """
    try:
        return load(place, **options)
    except LamellaError:
        raise
    except Exception as error:  # transformers raises many kinds, from many libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise ArchitectureError(
                f"{place} needs code that comes with it, which Lamella never runs: if you trust it, load it with "
                "transformers, and open the model in memory (lamella.open(model) in Python)"
            ) from error
        if "model type" in reason or "Unrecognized" in reason:
            raise ArchitectureError(
                f"{place}: this version of transformers does not support the architecture; {reason[:200]}"
            ) from error
        if isinstance(place, Path) or not isinstance(error, OSError | RuntimeError | KeyError):
            raise CheckpointError(f"{place}: cannot be loaded: {reason[:300]}") from error
        known = ", ".join(name for name, entry in ZOO.items() if entry.is_model)
        raise DownloadError(
            f"'{place}' is neither a local folder nor a zoo name ({known}), and the hub query failed: check the "
            f"name, the network, or give a local folder ({reason[:120]})"
        ) from error
