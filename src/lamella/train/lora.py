"""LoRA on a view, with peft: trained low-rank updates of frozen linear layers.

    y = W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero, so the initial output is unchanged

The view shares W with the model it was made of, and nothing here writes to W: merging works on a clone of it.
Paper: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import TrainingError
from lamella.plan import modules_at
from lamella.plan.fingerprint import revision
from lamella.stack import last_stack
from lamella.train.adapters import Adapter

ADAPTER = "default"  # peft's name of an adapter without a given name


@dataclass
class Lora:
    """The adapters of one view.

    Attributes:
        view: the adapted view.
        modules: names of the adapted modules.
        scale: alpha / r.
        base: identifies the base weights; see :func:`lamella.plan.fingerprint.revision`.
    """

    view: Any
    modules: tuple[str, ...]
    scale: float
    base: str
    _shared: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)  # original weights of merged modules

    def trains(self, name: str) -> bool:
        """Return whether a parameter belongs to the adapters: the ``trainable`` of :func:`lamella.train.fit`."""
        return ".lora_" in name

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapters' tensors by name, for a side file."""
        return {name: each.detach() for name, each in self.view.named_parameters() if self.trains(name)}

    def adapter(self) -> Adapter:
        """Return the current adapters, separate from the view, to be summed, merged or written as a peft folder."""
        pairs, transposed = {}, False
        for name in self.modules:
            module = self.view.get_submodule(name)
            factors = (getattr(module, f"lora_{half}")[ADAPTER].weight for half in "AB")
            a, b = (each.detach().clone() for each in factors)
            pairs[name] = (a, b)
            transposed = module.fan_in_fan_out
        return Adapter(pairs, dict.fromkeys(pairs, self.scale), transposed, self.base)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned.

        Raises:
            TrainingError: for tensors of other adapters.
        """
        ours = self.tensors()
        differ = [name for name in {**ours, **tensors} if _shape(ours, name) != _shape(tensors, name)]
        if differ:
            raise TrainingError(
                f"these are tensors of other adapters: {differ[0]} is {_shape(tensors, differ[0])}, here "
                f"{_shape(ours, differ[0])}; add adapters with the same targets and rank"
            )
        for name, tensor in tensors.items():
            ours[name].copy_(tensor)

    def merge(self) -> None:
        """Merge the adapters into clones of the weights, so that they cost nothing at run time."""
        if self._shared:
            raise TrainingError("these adapters are merged already")
        for name in self.modules:
            module = self.view.get_submodule(name)
            base = module.get_base_layer()
            self._shared[name] = base.weight
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            module.merge()

    def unmerge(self) -> None:
        """Undo :meth:`merge`: the view has the original weights again, bit-identical, and separate adapters."""
        for name, weight in self._shared.items():
            module = self.view.get_submodule(name)
            module.unmerge()
            module.get_base_layer().weight = weight
        self._shared.clear()

    @contextmanager
    def off(self, within: Sequence[str]) -> Iterator[None]:
        """Disable some adapters temporarily: their layers are as before training, without a second checkpoint.

        Args:
            within: prefixes of the names of their modules, such as ``model.layers.3.``.
        """
        chosen = [self.view.get_submodule(name) for name in self.modules if name.startswith(tuple(within))]
        scales = [dict(module.scaling) for module in chosen]
        try:
            for module in chosen:
                module.scaling.update(dict.fromkeys(module.scaling, 0.0))
            yield
        finally:
            for module, scale in zip(chosen, scales, strict=True):
                module.scaling.update(scale)

    def remove(self) -> None:
        """Remove the adapters from the view; its modules and parameters get their old names back.

        Merged updates stay, so merge and remove make a plain model.
        """
        for name in self.modules:
            self.view.set_submodule(name, self.view.get_submodule(name).get_base_layer())
        del self.view.peft_config
        self.modules = ()


def add_lora(
    view: Any,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    *,
    sites: Sequence[str] | None = None,
    seed: int = 0,
) -> Lora:
    """Add LoRA adapters to linear layers of a view.

    Only the view's modules change, and its other parameters keep their ``requires_grad``; train with
    ``fit(view, ..., trainable=lora.trains)``.

    Args:
        view: what ``lamella.apply`` returned (for a model that is not a view, the model's own modules change).
        r: rank.
        alpha: the adapters' output is scaled by alpha / r.
        dropout: on the adapters' input, during training.
        targets: names of linear modules: their last parts (``q_proj``), or full names (``model.layers.3.mlp.up_proj``);
            by default all in the layers, for a model with several stacks in those of the last, the decoder.
        sites: where adapters may be, such as ``layers.3`` or ``layers.3.mlp``; anywhere by default.
        seed: of the random factors.

    Raises:
        TrainingError: for a name that no linear module has, sites without one, or a view with adapters.
        PlanError: for a site that the model does not have.
    """
    if hasattr(view, "peft_config"):
        raise TrainingError("this view has adapters already: remove them first, or take a fresh view")
    modules = linear_at(view, targets, sites)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(modules),
        fan_in_fan_out=isinstance(view.get_submodule(modules[0]), Conv1D),  # GPT-2's weights are transposed
    )
    base = revision(view)
    flags = [(each, each.requires_grad) for each in view.parameters()]
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, view)
    cast_adapter_dtype(view, ADAPTER)  # they train in float32 whatever the precision of the weights
    for parameter, flag in flags:  # peft froze them, and thereby those of the original
        parameter.requires_grad_(flag)
    view.train(view.training)  # new modules are created in training mode, with dropout
    return Lora(view, modules, alpha / r, base)


def linear_at(view: Any, targets: Sequence[str] | None = None, sites: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the linear modules that targets and sites select; see :func:`add_lora`."""
    linear = {name: module for name, module in view.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    chosen: set[str] = set()
    if targets is None:
        chosen = {name for name in linear if name.startswith(last_stack(view).architecture.prefix)}
    for target in targets or ():
        named = {name for name in linear if name == target or name.endswith("." + target)}
        if not named:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise TrainingError(f"no linear module is named '{target}': there are {', '.join(known)}")
        chosen |= named
    if sites is not None:
        allowed = modules_at(last_stack(view), sites)
        chosen = {name for name in chosen if f"{name}.".startswith(allowed)}
        if not chosen:
            raise TrainingError(f"there is no linear module at {', '.join(sites) or 'no site'}: give other sites")
    return tuple(name for name in linear if name in chosen)


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
