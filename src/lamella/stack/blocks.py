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


def without_residual(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """What a block of which nothing but the stream is left gives."""
    return x


def resnet_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    for resample in (block.upsample, block.downsample):
        x = x if resample is None else resample(x)
    x = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return x / block.output_scale_factor


def attention_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return x / block.rescale_output_factor


def transformer_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Any:
    if not call.get("return_dict", True):
        return (x,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def basic_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return block.act2(x if block.downsample is None else block.downsample(x))


def bottleneck_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    return block.act3(x if block.downsample is None else block.downsample(x))


def leave_out(block: Any, bypass: Callable[..., Any], keeps: Collection[str]) -> None:
    """Leave of a block what it keeps when it is dropped, in place."""
    for name in [name for name, _ in block.named_children() if name not in keeps]:
        delattr(block, name)
    replace_forward(block, bypass)


@dataclass(frozen=True)
class BlockKind:
    """What blocks of one class are made of.

    Attributes:
        bypass: what is left of one when it is dropped, ``bypass(block, x, call)``.
        writes: where what it adds comes from: with these at zero, it adds nothing.
        keeps: its children that the bypass needs.
        parts: the name of a list in it, each of which is a block of its own where there are several.
    """

    bypass: Bypass
    writes: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    parts: str = ""


@dataclass(frozen=True)
class BlockTable:
    """The blocks of one kind of model.

    Attributes:
        kinds: by the class of a block.
        names: what parts of module paths are called in sites.
        prefix: what sites begin with.
        fixed: the paths of those that must stay, since the model reads more of them than what they give.
    """

    kinds: Mapping[str, BlockKind]
    names: Mapping[str, str]
    prefix: str = ""
    fixed: Collection[str] = ()

    def site(self, path: str) -> str:
        """
        >>> BLOCK_TABLES["UNet2DModel"].site("down_blocks.1.resnets.0")
        'unet.down.1.resnets.0'
        """
        return self.prefix + ".".join(self.names.get(part, part) for part in path.split("."))


TRANSFORMER_WRITES = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
_UNET = BlockTable(
    kinds={
        "ResnetBlock2D": BlockKind(resnet_shortcut, ("conv2",), ("upsample", "downsample", "conv_shortcut")),
        "Attention": BlockKind(attention_shortcut, ("to_out.0",)),
        "Transformer2DModel": BlockKind(transformer_shortcut, ("proj_out",), parts="transformer_blocks"),
        "BasicTransformerBlock": BlockKind(without_residual, TRANSFORMER_WRITES),
    },
    names={"down_blocks": "down", "mid_block": "mid", "up_blocks": "up", "transformer_blocks": "layers"},
    prefix="unet.",
)
BLOCK_TABLES: dict[str, BlockTable] = {  # by the class of the model
    "UNet2DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "DiTTransformer2DModel": BlockTable(
        kinds={"BasicTransformerBlock": BlockKind(without_residual, TRANSFORMER_WRITES)},
        names={"transformer_blocks": "layers"},
        prefix="dit.",
        fixed=("transformer_blocks.0",),  # its norm makes the condition of the model's output, too
    ),
    "ResNet": BlockTable(
        kinds={
            "BasicBlock": BlockKind(basic_shortcut, ("bn2",), ("downsample", "act2")),
            "Bottleneck": BlockKind(bottleneck_shortcut, ("bn3",), ("downsample", "act3")),
        },
        names={},
    ),
}


class Blocks:
    """A model and the addresses of its blocks. Nothing in here writes to the model.

    Args:
        model: a UNet or a DiT of diffusers, or a ResNet of timm.
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
        self.paths = {self.table.site(path): path for path in self._found()}

    def _found(self) -> list[str]:
        found: list[str] = []
        seen: list[str] = []
        for path, module in self.model.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer in seen)  # a block's own parts are none
            kind = self.table.kinds.get(type(module).__name__)
            if kind is None or inside or not self._adds(module) or path in self.table.fixed:
                continue
            seen.append(path)
            parts = len(getattr(module, kind.parts)) if kind.parts else 0
            found += [f"{path}.{kind.parts}.{part}" for part in range(parts)] if parts > 1 else [path]
        return found

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
        return {site: _parameters(self[site]) for site in self.paths}

    def savings(self) -> dict[str, int]:
        """How many parameters are gone when a block is dropped: all but those of its shortcut."""
        return {site: size - sum(map(_parameters, self.kept(site))) for site, size in self.sizes().items()}

    def kept(self, site: str) -> list[nn.Module]:
        """The parts of a block that stay when it is dropped."""
        children = dict(self[site].named_children())
        return [children[name] for name in self.kind(site).keeps if name in children]

    def kind(self, site: str) -> BlockKind:
        """What the block is made of."""
        return self.table.kinds[type(self[site]).__name__]

    def together(self, sites: Collection[str]) -> list[str]:
        """The paths of what is left out with some blocks: one whose parts are all dropped goes as a whole.

        Raises:
            PlanError: for a site that is no block.
        """
        paths = [self._path(site) for site in sites]
        for whole, parts in self._parted():
            if set(parts) <= set(paths):
                paths = [whole, *(each for each in paths if each not in parts)]
        return paths

    def _parted(self) -> list[tuple[str, list[str]]]:
        """The blocks whose parts are blocks of their own, with the paths of these."""
        every = set(self.paths.values())
        wholes = {path.rpartition(".")[0].rpartition(".")[0] for path in every}
        found = {whole: [path for path in every if path.startswith(f"{whole}.")] for whole in wholes}
        kinds = {whole: self.table.kinds.get(type(self.model.get_submodule(whole)).__name__) for whole in wholes}
        return [(whole, parts) for whole, parts in found.items() if kinds[whole] is not None]

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
        """A view of which these blocks are gone, all but their shortcuts; it shares what is left with the model.

        Raises:
            PlanError: for a site that is no block.
        """
        view = share(self.model)
        for path in self.together(sites):
            block = view.get_submodule(path)
            kind = self.table.kinds[type(block).__name__]
            leave_out(block, kind.bypass, kind.keeps)
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


def _parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
