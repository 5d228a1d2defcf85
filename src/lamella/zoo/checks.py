"""Quick checks of a model by its name, before anything is opened."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from lamella.errors import CheckpointError, DownloadError
from lamella.zoo.libraries import parse_name
from lamella.zoo.opening import check_folder, library_in
from lamella.zoo.pull import ZOO, check_hub_id

SECONDS = 10.0  # timeout of a query to the hub


def check_model(model: str | Path, allow_pickle: bool = False) -> None:
    """Check that a model can be opened, without opening it: a complete folder, a known name, or an existing hub id.

    Args:
        model: a folder, a name of the zoo or of a library, or a hub id.
        allow_pickle: whether pickle checkpoints may be opened.

    Raises:
        CheckpointError: for a folder that is missing, incomplete or unsafe, or a name that resembles one of the zoo.
        DownloadError: for a hub id that does not exist, or if the hub cannot be reached.
    """
    path, name = Path(model).expanduser(), str(model)
    if path.is_dir():
        if library_in(path) == "transformers":
            check_folder(path, allow_pickle)
        return
    models = [entry.name for entry in ZOO.values() if entry.is_model]
    if name in models or parse_name(name) is not None:
        return
    check_hub_id(name, path)
    if "/" not in name and (near := difflib.get_close_matches(name, models, n=1, cutoff=0.8)):
        raise CheckpointError(f"there is no model {name}; did you mean {near[0]}?")
    _check_exists(name)


def check_pickle(path: Path, allow_pickle: bool = False) -> None:
    """Check that a path is no pickle, unless pickles may be opened.

    Args:
        path: a file, which is taken for a pickle, or a folder.
        allow_pickle: whether pickles may be opened.

    Raises:
        CheckpointError: for a file that may not be opened.
    """
    if path.is_file() and not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code: give a folder, or add --allow-pickle (allow_pickle in Python) if "
            "you trust its author"
        )


@cache
def _check_exists(hub_id: str) -> None:
    """Query the hub once, where a download would try five times; not for cached models, or in offline mode."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return
    try:
        HfApi().model_info(hub_id, timeout=SECONDS)
    except GatedRepoError as error:
        raise DownloadError(
            f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"the hub has no model {hub_id}: check the name, or give a local folder") from error
    except Exception as error:  # of the network, many kinds from many libraries
        raise DownloadError(
            f"'{hub_id}' is neither a local folder nor a zoo name, and the hub cannot be reached "
            f"({type(error).__name__}): check the name and the network, or give a local folder"
        ) from error
