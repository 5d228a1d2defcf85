"""Loading weights from untrusted files: every tensor must be present, in the expected shape.

All weights pass through here, whichever library the model belongs to. Without the check, transformers and diffusers
leave random values, or none, where a tensor is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lamella.errors import CheckpointError
from lamella.plan.checkpoint import read, read_header

Network = TypeVar("Network", bound=nn.Module)
Shape = Sequence[int]

OPTIONAL = "num_batches_tracked"  # missing in older files, which batch norms of torch load nevertheless


def pretrained(kind: Any, place: str | Path, **options: Any) -> Any:
    """Load a model with ``kind.from_pretrained``, and refuse an incomplete checkpoint.

    A tensor may be absent if the library can derive it: a tensor that is tied to another one, or a computed buffer.

    Args:
        kind: a model class of transformers or diffusers, or an auto class.
        place: folder of the checkpoint, or its hub id.
        options: passed on to ``from_pretrained``.

    Raises:
        CheckpointError: for a tensor that is missing or has another shape; one line that names it.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that the report lists every mismatch
    model, report = kind.from_pretrained(place, **options)
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise _mismatch(place, name, stored, wanted)
    _check_none_missing(place, report["missing_keys"])
    return model


def load_network(build: Callable[[], Network], file: Path) -> Network:
    """Build a network with ``build`` and load the weights of a safetensors file into it, in evaluation mode.

    It is built on the meta device first and allocated only if the file contains exactly its tensors, whatever sizes a
    document next to the file claims.

    Args:
        build: builds the network.
        file: the safetensors file.

    Raises:
        CheckpointError: for a file that is missing or damaged, or contains other tensors.
    """
    stored = {each.name: each.shape for each in read_header(file)}
    with torch.device("meta"):
        check_tensors(build(), stored, file)
    return fill(build(), load_file(file), file).eval()


def fill(network: Network, tensors: Mapping[str, Tensor], where: str | Path) -> Network:
    """Load tensors into a network as its weights; a network on the meta device takes them over without a copy.

    Args:
        network: the network.
        tensors: the tensors by name.
        where: what to call their origin in messages, such as the file.

    Returns:
        The network.

    Raises:
        CheckpointError: if a tensor is missing, unknown, or of another shape.
    """
    check_tensors(network, {name: each.shape for name, each in tensors.items()}, where)
    on_meta = any(each.is_meta for each in network.parameters())
    network.load_state_dict(tensors, strict=False, assign=on_meta)
    return network


def load_some(
    network: nn.Module, folder: Path, choice: Callable[[str], bool], device: torch.device | str = "cpu"
) -> None:
    """Load some tensors of a checkpoint into a network on the meta device; other parameters stay there.

    Args:
        network: the network, whose parameters have the names of the tensors; its buffers are moved to the device.
        folder: a folder with safetensors.
        choice: from a name to whether the tensor is loaded; tied parameters are loaded together.
        device: the device of the loaded tensors.

    Raises:
        CheckpointError: for a chosen tensor that is missing.
    """
    stored = {each.name: each.file for each in read(folder).tensors}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, known in names.items():
        if not any(map(choice, known)):
            continue
        name = next((each for each in known if each in stored), "")
        _check_none_missing(folder, [] if name else known)
        with safe_open(stored[name], "pt") as file:
            loaded[parameter] = nn.Parameter(file.get_tensor(name).to(device, parameter.dtype))
    for path, module in network.named_modules():
        for name, own in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if own in loaded:
                setattr(module, name, loaded[own])
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{path}.{name}".removeprefix(".")
            if full in stored:
                with safe_open(stored[full], "pt") as file:
                    buffer = file.get_tensor(full)
            setattr(module, name, buffer.to(device))


def check_tensors(network: nn.Module, stored: Mapping[str, Shape], where: str | Path) -> None:
    """Check that stored tensors are exactly those of a network.

    For tied parameters, one of them is enough.

    Args:
        network: the network, which may be on the meta device.
        stored: shapes of the stored tensors by name.
        where: what to call their origin in messages, such as the file.

    Raises:
        CheckpointError: if a tensor is missing, unknown, or of another shape; one line that names it.
    """
    own = network.state_dict(keep_vars=True)
    for name in (each for each in {**own, **stored} if each in stored):  # in the order of the network
        wanted = own[name].shape if name in own else None
        if wanted is None or list(stored[name]) != list(wanted):
            raise _mismatch(where, name, stored[name], wanted)
    known = {id(own[name]) for name in stored}
    absent = [name for name, each in own.items() if id(each) not in known and name.rpartition(".")[2] != OPTIONAL]
    _check_none_missing(where, absent)


@contextmanager
def at_most(parameters: int, config: Path) -> Iterator[None]:
    """Limit the number of parameters built in this context, since a config may ask for millions of layers.

    Args:
        parameters: maximum number of parameters that may be registered.
        config: file of the config, for the message.

    Raises:
        CheckpointError: if one more is registered.
    """
    left = iter(range(parameters))

    def count(*_: object) -> None:
        if next(left, None) is None:
            raise CheckpointError(f"{config}: asks for more layers than the weights have: get it again")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _mismatch(where: str | Path, name: str, shape: Shape, wanted: Shape | None) -> CheckpointError:
    has = "nothing" if wanted is None else list(wanted)
    return CheckpointError(f"{where}: {name} is {list(shape)} where the network has {has}: get it again")


def _check_none_missing(where: str | Path, names: Collection[str]) -> None:
    if names:
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(f"{where} lacks tensors of the network: {min(names)} is missing{more}: get it again")
