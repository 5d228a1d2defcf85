"""A network of a method's own with the weights of a file that anyone may have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from lamella.errors import CheckpointError
from lamella.plan.checkpoint import read_header

Network = TypeVar("Network", bound=nn.Module)


def filled(build: Callable[[], Network], file: Path) -> Network:
    """The network that ``build`` makes, with the weights of a safetensors file, in evaluation mode.

    It is made on the meta device first, and takes room only when the file holds exactly its tensors, whatever sizes a
    document beside the file claims.

    Raises:
        CheckpointError: for a file that is missing or damaged, or holds other tensors.
    """
    stored = {each.name: list(each.shape) for each in read_header(file)}
    with torch.device("meta"):
        claimed = {name: list(each.shape) for name, each in build().state_dict().items()}
    differ = next((name for name in {**claimed, **stored} if claimed.get(name) != stored.get(name)), None)
    if differ is not None:
        has, wanted = stored.get(differ, "missing"), claimed.get(differ, "nothing")
        raise CheckpointError(f"{file}: {differ} is {has} where the network has {wanted}")
    network = build()
    network.load_state_dict(load_file(file))
    return network.eval()
