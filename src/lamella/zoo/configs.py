"""The configs of checkpoints, read without running what lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from lamella.errors import ArchitectureError, CheckpointError, DownloadError, LamellaError
from lamella.plan import checkpoint, native
from lamella.registry import import_network
from lamella.zoo.pull import ZOO

CONFIG = "config.json"


def native_metadata(folder: Path) -> native.NativeMetadata | None:
    """What the config of a folder says of a native export; None for any other checkpoint.

    Raises:
        CheckpointError: when the config is damaged, or says what no export does.
    """
    return native.read_metadata(checkpoint.read_json(folder / CONFIG), str(folder / CONFIG))


def register_class(place: Path | str) -> None:
    """Let transformers know the class of a method's own, where a checkpoint's config names one that it does not."""
    if isinstance(place, Path) and (place / CONFIG).is_file():
        kind = str(checkpoint.read_json(place / CONFIG).get("model_type"))
        if kind not in CONFIG_MAPPING:
            import_network(kind)


def open_config(place: Path | str) -> Any:
    """The config of a checkpoint, which asks for no code but that of transformers and Lamella.

    Raises:
        ArchitectureError: when the model comes with modelling code of its own.
        CheckpointError: when its layers ask for code from elsewhere.
    """
    metadata = native_metadata(place) if isinstance(place, Path) else None
    register_class(place)
    if isinstance(place, Path) and metadata is not None and metadata.is_own_class:
        kind = native.config_class(checkpoint.read_json(place / CONFIG)["model_type"])
        config = load_from(kind.from_pretrained, place)
    else:
        config = load_from(AutoConfig.from_pretrained, place, trust_remote_code=False)
    for what in ("_attn_implementation", "_experts_implementation"):
        asked = getattr(config, what, None)
        if isinstance(asked, str) and "/" in asked:  # kernels of the hub
            raise CheckpointError(f"{place}: its config asks to run code of '{asked}': remove {what[1:]} from it")
    return config


def load_from(load: Callable[..., Any], place: Path | str, **options: Any) -> Any:
    """What transformers loads from a place; whatever it makes of damaged files is one line."""
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
                f"{place}: this transformers does not know the architecture; {reason[:200]}"
            ) from error
        if isinstance(place, Path) or not isinstance(error, OSError | RuntimeError | KeyError):
            raise CheckpointError(f"{place}: cannot be loaded: {reason[:300]}") from error
        known = ", ".join(name for name, entry in ZOO.items() if entry.kind == "model")
        raise DownloadError(
            f"'{place}' is no folder here and no zoo name ({known}), and the hub did not answer for it: check the "
            f"name, the network, or give a local folder ({reason[:120]})"
        ) from error
