"""Networks without their dropped blocks, in three forms.

========  ====================================================================================================
form      meaning
========  ====================================================================================================
plain     a smaller network of the same class, whose config expresses the dropped blocks. Any diffusers loads it
native    a class saved with the weights, in a file that diffusers runs with ``trust_remote_code=True``
portable  a network of the original shape, whose dropped blocks add zero: it loads anywhere, but saves nothing
========  ====================================================================================================

The file of the native form is the library's own source code. Lamella itself never runs it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal

import torch

from lamella.errors import ExportError
from lamella.stack import BLOCK_TABLES, Blocks, blocks, replace_forward, share
from lamella.zoo.configs import CONFIG
from lamella.zoo.pipelines import CUT, CUT_MODULE, DROPPED, INDEX

Form = Literal["plain", "native", "portable"]
WITHOUT_ATTENTION = {
    "AttnDownBlock2D": "DownBlock2D",
    "AttnUpBlock2D": "UpBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
}

_TEMPLATE = Template('''\
"""A $base of which blocks are gone. Written by Lamella; needs torch and diffusers only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

from diffusers import $base
from torch import Tensor, nn


$replace_forward

$leave_out

$bypasses

LEFT = {$left}


class $name($base):
    """``config.$dropped`` says where the blocks were of which only shortcuts are left."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        model = made[0] if isinstance(made, tuple) else made
        for path in model.config.$dropped:
            block = model.get_submodule(path)
            leave_out(block, *LEFT[type(block).__name__])
        return made
''')


def natural_form(whole: Blocks, dropped: Collection[str]) -> Form:
    """Choose the form that loses nothing of a pruned network and has the fewest requirements for loading.

    Args:
        whole: blocks of the original.
        dropped: sites of the dropped blocks.
    """
    return "native" if _config(whole, dropped) is None else "plain"


def convert(whole: Blocks, network: Any, dropped: Collection[str], form: Form) -> Any:
    """Convert a network without some blocks into one of the forms.

    Args:
        whole: blocks of the original.
        network: a view of it without the dropped blocks, trained or not.
        dropped: sites of the dropped blocks.
        form: the form.

    Raises:
        ExportError: when the plain form cannot express the dropped blocks.
    """
    if form == "plain":
        return plain(whole, network, dropped)
    if form == "portable":
        return portable(whole, network, dropped)
    network.register_to_config(**{DROPPED: whole.together(dropped)})
    return network


def plain(whole: Blocks, network: Any, dropped: Collection[str]) -> Any:
    """Build a smaller network of the same class, whose config expresses the dropped blocks.

    Args:
        whole: blocks of the original.
        network: a view of it without the dropped blocks.
        dropped: sites of the dropped blocks.
    """
    config = _config(whole, dropped)
    if config is None:
        kind = type(whole.model).__name__
        raise ExportError(
            f"no config of a {kind} can express that {', '.join(sorted(dropped)[:3])} ... are dropped: choose the "
            "native or the portable form"
        )
    kept = [path for site, path in whole.paths.items() if site not in dropped]
    made = type(whole.model).from_config(config)
    made.load_state_dict({_renamed(name, kept): each for name, each in network.state_dict().items()}, assign=True)
    return made.eval()


def portable(whole: Blocks, network: Any, dropped: Collection[str]) -> Any:
    """Build a network of the original shape whose dropped blocks add zero.

    Args:
        whole: blocks of the original.
        network: a view of it without the dropped blocks.
        dropped: sites of the dropped blocks.
    """
    made = share(whole.model)
    made.load_state_dict(network.state_dict(), strict=False, assign=True)
    for path in whole.together(dropped):
        block = made.get_submodule(path)
        parts = dict(block.named_modules())
        for part in (parts[name] for name in whole.table.kinds[type(block).__name__].writes if name in parts):
            for name, tensor in list(part.named_parameters()):
                setattr(part, name, torch.nn.Parameter(torch.zeros_like(tensor)))
    return made.eval()


def add_class(folder: Path, part: str, base: str) -> None:
    """Add the class of a network without some blocks to a saved pipeline, and refer to it in its configs.

    Args:
        folder: folder of the pipeline.
        part: name of the network in the pipeline.
        base: class of the original network.
    """
    for file, change in (
        (folder / part / CONFIG, {"_class_name": CUT + base}),
        (folder / INDEX, {part: [CUT_MODULE, CUT + base]}),
    ):
        config = json.loads(file.read_text(encoding="utf-8")) | change
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / part / f"{CUT_MODULE}.py").write_text(modelling_file(base), encoding="utf-8")


def modelling_file(base: str) -> str:
    """Source code saved with the weights of a network of this class."""
    kinds = BLOCK_TABLES[base].kinds
    bypasses = dict.fromkeys(each.bypass for each in kinds.values())
    return _TEMPLATE.substitute(
        base=base,
        name=CUT + base,
        dropped=DROPPED,
        replace_forward=inspect.getsource(replace_forward),
        leave_out=inspect.getsource(blocks.leave_out),
        bypasses="\n\n".join(map(inspect.getsource, bypasses)),
        left=", ".join(f'"{name}": ({each.bypass.__name__}, {each.keeps!r})' for name, each in kinds.items()),
    )


def _renamed(name: str, kept: Sequence[str]) -> str:
    """Name of a parameter in a smaller transformer; those of a UNet keep their names."""
    if not name.startswith("transformer_blocks."):
        return name
    path, rest = ".".join(name.split(".")[:2]), name.split(".", 2)[2]
    return f"transformer_blocks.{0 if path not in kept else kept.index(path) + 1}.{rest}"


def _config(whole: Blocks, dropped: Collection[str]) -> dict[str, Any] | None:
    """The config that expresses the dropped blocks; None if there is none."""
    config = {name: value for name, value in whole.model.config.items() if not name.startswith("_")}
    if "num_layers" in config:  # a transformer: all layers are equal
        return config | {"num_layers": config["num_layers"] - len(dropped)}
    left = set(dropped)

    def gone(start: str) -> bool:
        """Whether all sites with a prefix are dropped; these are then expressed."""
        inside = {site for site in whole.sites if site.startswith(start)}
        found = bool(inside) and inside <= left
        left.difference_update(inside if found else ())
        return found

    if gone("unet.mid."):
        config["mid_block_type"] = None
    elif "add_attention" in config and gone("unet.mid.attentions."):
        config["add_attention"] = False
    for side in ("down", "up"):
        types = config[f"{side}_block_types"]
        config[f"{side}_block_types"] = tuple(
            WITHOUT_ATTENTION[kind] if kind in WITHOUT_ATTENTION and gone(f"unet.{side}.{n}.attentions.") else kind
            for n, kind in enumerate(types)
        )
    return None if left else config
