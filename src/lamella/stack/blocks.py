r"""Blocks: addressable residual parts of a model that is no chain, such as a UNet or a convolutional network.

    x ---- own part ---- (+) ----        dropped:  x ---------- (+) ----
      \--- shortcut ----/                            \-- shortcut -/

A block can be dropped, recorded, sized and replaced. There is no running from one to the next: what lies between them
(skip connections, resampling, attention to text) is the model's own. A dropped block that changes shapes keeps its
shortcut, and whatever the model applies behind the addition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, PlanError
from lamella.stack.sharing import replace_forward, share

Bypass = Callable[[Any, Tensor, dict[str, Any]], Any]


def _resnet_2d(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    for resample in (block.upsample, block.downsample):
        x = x if resample is None else resample(x)
    x = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return x / block.output_scale_factor


def _attention(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return x / block.rescale_output_factor


def _transformer_2d(block: Any, x: Tensor, call: dict[str, Any]) -> Any:
    if not call.get("return_dict", True):
        return (x,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def _basic(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return block.act2(x if block.downsample is None else block.downsample(x))


def _bottleneck(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return block.act3(x if block.downsample is None else block.downsample(x))


@dataclass(frozen=True)
class BlockTable:
    """The blocks of one kind of model.

    Attributes:
        kinds: by the class of a block, what is left of it when it is dropped, ``bypass(block, x, call)``.
        names: what parts of module paths are called in sites.
        prefix: what sites begin with.
    """

    kinds: Mapping[str, Bypass]
    names: Mapping[str, str]
    prefix: str = ""

    def site(self, path: str) -> str:
        """
        >>> BLOCK_TABLES["UNet2DModel"].site("down_blocks.1.resnets.0")
        'unet.down.1.resnets.0'
        """
        return self.prefix + ".".join(self.names.get(part, part) for part in path.split("."))


_UNET = BlockTable(
    kinds={"ResnetBlock2D": _resnet_2d, "Attention": _attention, "Transformer2DModel": _transformer_2d},
    names={"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"},
    prefix="unet.",
)
BLOCK_TABLES: dict[str, BlockTable] = {  # by the class of the model
    "UNet2DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "ResNet": BlockTable(kinds={"BasicBlock": _basic, "Bottleneck": _bottleneck}, names={}),
}


class Blocks:
    """A model and the addresses of its blocks. Nothing in here writes to the model.

    Args:
        model: a UNet of diffusers, or a ResNet of timm.
        name: what to call it in messages.

    Attributes:
        paths: by site, where each block is in the model.

    Raises:
        ArchitectureError: for a model whose blocks are not known.
    """

    def __init__(self, model: Any, name: str | None = None) -> None:
        kind = type(model).__name__
        if kind not in BLOCK_TABLES:
            known = ", ".join(BLOCK_TABLES)
            raise ArchitectureError(f"the blocks of a {kind} are not known; known are {known}")
        self.model, self.name, self.table = model, name or kind, BLOCK_TABLES[kind]
        self.paths = dict(self._found())

    def _found(self) -> list[tuple[str, str]]:
        found: list[str] = []
        for path, module in self.model.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer in found)  # a block's own parts are none
            if type(module).__name__ in self.table.kinds and not inside and self._adds(module):
                found.append(path)
        return [(self.table.site(path), path) for path in found]

    @staticmethod
    def _adds(module: Any) -> bool:
        return bool(getattr(module, "residual_connection", True))  # of attentions, those that add to what they read

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Blocks({self.name}: {len(self)} blocks)"

    @property
    def sites(self) -> list[str]:
        return list(self.paths)

    def __getitem__(self, site: str) -> Any:
        """The module of a block."""
        return self.model.get_submodule(self._path(site))

    def _path(self, site: str) -> str:
        if site not in self.paths:
            raise PlanError(f"'{site}' is no block of {self.name}; a block is like '{next(iter(self.paths))}'")
        return self.paths[site]

    def sizes(self) -> dict[str, int]:
        """The number of parameters of each block, its shortcut included."""
        return {site: sum(p.numel() for p in self[site].parameters()) for site in self.paths}

    @torch.no_grad()
    def record(self, *args: Any, **inputs: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
        """Run the model once, and keep what every block reads and gives.

        Returns:
            By site what the block reads and what it gives, in the order in which they ran, and the model's output.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        copy = share(self.model)

        def note(site: str) -> Callable[..., None]:
            return lambda module, given, out: seen.update({site: (given[0], _tensor(out))})

        for site, path in self.paths.items():
            copy.get_submodule(path).register_forward_hook(note(site))
        output = copy(*args, **inputs)
        return seen, output

    def without(self, sites: Collection[str]) -> Any:
        """A view in which these blocks leave out all but their shortcut; it shares every tensor with the model.

        Raises:
            PlanError: for a site that is no block.
        """
        view = share(self.model)
        for path in map(self._path, sites):
            block = view.get_submodule(path)
            replace_forward(block, self.table.kinds[type(block).__name__])
        return view

    def replaced(self, modules: Mapping[str, nn.Module]) -> Any:
        """A view in which other modules stand in the place of blocks; they are called as the blocks are.

        Raises:
            PlanError: for a site that is no block.
        """
        view = share(self.model)
        for site, module in modules.items():
            view.set_submodule(self._path(site), module)
        return view


def _tensor(out: Any) -> Tensor:
    """The stream among what a block returns."""
    return out if isinstance(out, Tensor) else out[0]
