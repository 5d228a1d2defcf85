r"""Blocks: addressable residual parts of a model that is not a chain of layers, such as a UNet or a ResNet.

    x ---- own part ---- (+) ----        dropped:  x ---------- (+) ----
      \--- shortcut ----/                            \-- shortcut -/

A block can be dropped, recorded, sized and replaced. Execution from one block to another is not available, because what
lies between them (skip connections, resampling, attention to text) belongs to the model. A dropped block that changes
shapes keeps its shortcut, and whatever the model applies after the addition.
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
    """Return the output of a dropped block that leaves its input unchanged.

    Args:
        block: the dropped block; not used.
        x: its input.
        call: its keyword arguments; not used.
    """
    return x


def resnet_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the output of a dropped ResNet block of diffusers.

    Args:
        block: the dropped block.
        x: its input `[batch, channels, height, width]`.
        call: its keyword arguments; not used.
    """
    for resample in (block.upsample, block.downsample):
        x = x if resample is None else resample(x)
    x = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return x / block.output_scale_factor


def attention_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the output of a dropped attention of diffusers.

    Args:
        block: the dropped attention.
        x: its input.
        call: its keyword arguments; not used.
    """
    return x / block.rescale_output_factor


def transformer_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Any:
    """Return the output of a dropped transformer of diffusers.

    Args:
        block: the dropped transformer; not used.
        x: its input.
        call: its keyword arguments; ``return_dict`` decides between a tuple and an output object.
    """
    if not call.get("return_dict", True):
        return (x,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def basic_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the output of a dropped basic block of timm.

    Args:
        block: the dropped block.
        x: its input `[batch, channels, height, width]`.
        call: its keyword arguments; not used.
    """
    return block.act2(x if block.downsample is None else block.downsample(x))


def bottleneck_shortcut(block: Any, x: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the output of a dropped bottleneck block of timm.

    Args:
        block: the dropped block.
        x: its input `[batch, channels, height, width]`.
        call: its keyword arguments; not used.
    """
    return block.act3(x if block.downsample is None else block.downsample(x))


def leave_out(block: Any, bypass: Callable[..., Any], keeps: Collection[str]) -> None:
    """Drop a block in place, except for the children that its bypass needs.

    Args:
        block: the block.
        bypass: computes the output of the dropped block, ``bypass(block, x, call)``.
        keeps: names of its children that the bypass needs.
    """
    for name in [name for name, _ in block.named_children() if name not in keeps]:
        delattr(block, name)
    replace_forward(block, bypass)


@dataclass(frozen=True)
class BlockKind:
    """The structure of blocks of one class.

    Attributes:
        bypass: computes the output of a dropped block, ``bypass(block, x, call)``.
        writes: modules that produce what the block adds: if they are zero, it adds nothing.
        keeps: children that the bypass needs.
        parts: name of a list in the block each of whose members is a block of its own if there are several.
    """

    bypass: Bypass
    writes: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    parts: str = ""


@dataclass(frozen=True)
class BlockTable:
    """The blocks of one kind of model.

    Attributes:
        kinds: by class name, the structure of a block.
        names: names in sites for parts of module paths.
        prefix: prefix of sites.
        fixed: paths of blocks that cannot be dropped, because the model reads more of them than their output.
    """

    kinds: Mapping[str, BlockKind]
    names: Mapping[str, str]
    prefix: str = ""
    fixed: Collection[str] = ()

    def site(self, path: str) -> str:
        """Return the site of a block.

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
        fixed=("transformer_blocks.0",),  # its norm also computes the condition of the model's output
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
    """A model with the addresses of its blocks. No method changes the model.

    Args:
        model: a UNet or a DiT of diffusers, or a ResNet of timm.
        name: what to call it in messages.

    Attributes:
        paths: by site, the path of each block in the model.

    Raises:
        ArchitectureError: for a model whose blocks are not known.
    """

    def __init__(self, model: Any, name: str | None = None) -> None:
        kind = type(model).__name__
        if kind not in BLOCK_TABLES:
            known = ", ".join(BLOCK_TABLES)
            raise ArchitectureError(f"the blocks of a {kind} are unknown; supported are {known}")
        self.model, self.name, self.table = model, name or kind, BLOCK_TABLES[kind]
        self.paths = {self.table.site(path): path for path in self._block_paths()}

    def _block_paths(self) -> list[str]:
        found: list[str] = []
        seen: list[str] = []
        for path, module in self.model.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer in seen)  # parts of a block are not blocks themselves
            kind = self.table.kinds.get(type(module).__name__)
            if kind is None or inside or not self._adds(module) or path in self.table.fixed:
                continue
            seen.append(path)
            parts = len(getattr(module, kind.parts)) if kind.parts else 0
            found += [f"{path}.{kind.parts}.{part}" for part in range(parts)] if parts > 1 else [path]
        return found

    @staticmethod
    def _adds(module: Any) -> bool:
        return bool(getattr(module, "residual_connection", True))  # only attentions that add to their input

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Blocks({self.name}: {len(self)} blocks)"

    @property
    def sites(self) -> list[str]:
        """The sites of all blocks."""
        return list(self.paths)

    def __getitem__(self, site: str) -> Any:
        """The module of a block."""
        return self.model.get_submodule(self._path(site))

    def _path(self, site: str) -> str:
        if site not in self.paths:
            raise PlanError(f"'{site}' is not a block of {self.name}; a block is like '{next(iter(self.paths))}'")
        return self.paths[site]

    def sizes(self) -> dict[str, int]:
        """Return the number of parameters of each block, including its shortcut."""
        return {site: _parameters(self[site]) for site in self.paths}

    def savings(self) -> dict[str, int]:
        """Return the number of parameters that dropping each block removes: all except those of its shortcut."""
        return {site: size - sum(map(_parameters, self.kept(site))) for site, size in self.sizes().items()}

    def kept(self, site: str) -> list[nn.Module]:
        """Return the parts of a block that remain when it is dropped."""
        children = dict(self[site].named_children())
        return [children[name] for name in self.kind(site).keeps if name in children]

    def kind(self, site: str) -> BlockKind:
        """Return the structure of a block."""
        return self.table.kinds[type(self[site]).__name__]

    def together(self, sites: Collection[str]) -> list[str]:
        """Return the paths to remove for some sites: a block whose parts are all dropped is removed as a whole.

        Raises:
            PlanError: for a site that is not a block.
        """
        paths = [self._path(site) for site in sites]
        for whole, parts in self._composites():
            if set(parts) <= set(paths):
                paths = [whole, *(each for each in paths if each not in parts)]
        return paths

    def _composites(self) -> list[tuple[str, list[str]]]:
        """Return the blocks whose parts are blocks of their own, with the paths of these parts."""
        every = set(self.paths.values())
        wholes = {path.rpartition(".")[0].rpartition(".")[0] for path in every}
        found = {whole: [path for path in every if path.startswith(f"{whole}.")] for whole in wholes}
        kinds = {whole: self.table.kinds.get(type(self.model.get_submodule(whole)).__name__) for whole in wholes}
        return [(whole, parts) for whole, parts in found.items() if kinds[whole] is not None]

    @torch.no_grad()
    def record(self, *args: Any, **inputs: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
        """Run the model once, and record the input and the output of every block.

        Args:
            args: positional arguments of the model.
            inputs: keyword arguments of the model.

        Returns:
            By site the input and the output of the block, in the order in which they ran, and the model's output.
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
        """Return a view without these blocks, except for their shortcuts; it shares everything else with the model.

        Raises:
            PlanError: for a site that is not a block.
        """
        view = share(self.model)
        for path in self.together(sites):
            block = view.get_submodule(path)
            kind = self.table.kinds[type(block).__name__]
            leave_out(block, kind.bypass, kind.keeps)
        return view

    def replaced(self, modules: Mapping[str, nn.Module]) -> Any:
        """Return a view in which other modules replace blocks; they are called in the same way.

        Args:
            modules: by site, the module.

        Raises:
            PlanError: for a site that is not a block.
        """
        view = share(self.model)
        for site, module in modules.items():
            view.set_submodule(self._path(site), module)
        return view


def _tensor(out: Any) -> Tensor:
    """Return the hidden states from the output of a block."""
    return out if isinstance(out, Tensor) else out[0]


def _parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
