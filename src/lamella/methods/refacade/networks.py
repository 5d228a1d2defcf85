"""Networks of diffusers from a folder: by its config and its safetensors, of classes that are named here.

Nothing in a folder is executed. A network is made on the meta device first, with a bound on how many parameters it has;
only when those of the file have the shapes that the config claims are they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

from lamella.errors import CheckpointError, LamellaError, reason_of
from lamella.extras import require
from lamella.plan.filling import check_tensors, fill
from lamella.reading import parse_json, read_text

CONFIG, NAMES = "config.json", ("diffusion_pytorch_model", "model")
LARGEST = 2**17  # of any number in a config
LONGEST = 2**13  # of the places that positions are made for: Wan has 1,024
MEND = "give the folder of one that diffusers has written, with safetensors"


def read_network(folder: Path, kinds: Sequence[str]) -> Any:
    """The network in a folder, frozen and in evaluation mode.

    Args:
        kinds: classes of diffusers that it may be of.

    Raises:
        CheckpointError: when it is missing, damaged, or of another class.
    """
    try:
        config = parse_json(read_text(folder / CONFIG, MEND))
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise CheckpointError(f"{folder / CONFIG}: '{kind}' is not {' or '.join(kinds)}: {MEND}")
        files = _weights(folder)
        shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
        check_config(config)
        with torch.device("meta"), at_most(2 * len(shapes)):
            network = getattr(require("diffusers", "vision", "opening a network"), kind).from_config(config)
        check_tensors(network, shapes, folder)
        if hasattr(network, "rope"):  # its tables are in no file
            known = network.config
            network.rope = type(network.rope)(known.attention_head_dim, known.patch_size, known.rope_max_seq_len)
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        fill(network, weights, folder)
    except CheckpointError:
        raise
    except LamellaError as error:
        raise CheckpointError(f"{folder}: no network ({error})") from None
    except Exception as error:  # of damaged files, anything
        raise CheckpointError(f"{folder}: cannot be opened: {reason_of(error)}: {MEND}") from None
    for name, each in network.named_parameters():
        if set(name.split(".")) & set(getattr(network, "_keep_in_fp32_modules", None) or ()):
            each.data = each.data.float()
    return network.requires_grad_(False).eval()


def write_network(network: Any, folder: Path) -> None:
    """Write a network so that it can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    weights = {name: each.detach().contiguous() for name, each in network.state_dict().items()}
    save_file(weights, folder / f"{NAMES[0]}.safetensors")


def check_config(config: dict[str, Any]) -> None:
    """Check that no number of a config is absurd.

    Raises:
        CheckpointError: for one that is.
    """
    for name, value in config.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
        most = LONGEST if name == "rope_max_seq_len" else LARGEST
        if any(each > most or each < -1 for each in numbers):
            raise CheckpointError(f"{CONFIG}: {name} is {str(value)[:40]}, which no weights here are of: {MEND}")


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Let modules be made in here until they have so many parameters.

    Raises:
        CheckpointError: for one more.
    """
    left = iter(range(count))

    def counted(*_: Any) -> None:
        if next(left, None) is None:
            raise CheckpointError(f"{CONFIG}: more layers than the weights are of: {MEND}")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _weights(folder: Path) -> list[Path]:
    """The files of weights: one, or those of an index, which lie beside it."""
    for name in NAMES:
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            files = sorted(set(parse_json(read_text(index, MEND))["weight_map"].values()))
            outside = next((each for each in files if Path(each).name != each), None)
            if outside is not None:
                raise CheckpointError(f"{index} names {outside}, which is not beside it: {MEND}")
            return [folder / each for each in files]
    raise CheckpointError(f"{folder} has no {NAMES[0]}.safetensors: {MEND}")


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118, no dictionary
