"""Adapters separate from a model: summed, merged, and saved as folders that plain peft reads and writes.

    theta = theta_0 + sum_k lambda_k s_k B_k A_k

A sum of adapters is exactly one adapter again: their factors are concatenated, A = [A_1; A_2; ...] and
B = [lambda_1 s_1 B_1, lambda_2 s_2 B_2, ...], whatever their ranks, scales and modules. A merge adds all of them in
float32 and rounds to the weight's own type once: added one by one, small updates are lost in bfloat16.

The factors of an adapter that was opened from a file, and those of a sum, are computed on access, one module at a time:
an adapter needs no memory until it is used, so hundreds of them can be merged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import CheckpointError, TrainingError
from lamella.files import new_folder
from lamella.needs import has_values
from lamella.plan.fingerprint import revision
from lamella.reading import parse_json
from lamella.stack import Stack, share

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before the names of modules
HALVES = ".lora_A.weight", ".lora_B.weight"  # what peft puts after them
REVISION = "lamella_base"  # the key of the tensors' metadata that identifies the base weights
PLAIN: dict[str, tuple[Any, ...]] = {  # peft settings that change what an adapter computes, with the supported values
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "loftq_config": ({}, None),
    "eva_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base weights at initialisation
}


Pair = tuple[Tensor, Tensor]


class LazyPairs(Mapping[str, Pair]):
    """Factors by the name of the module, each pair computed on access and never kept.

    Args:
        entries: what each pair is computed from, such as its name in a file.
        load: computes the pair of an entry.
    """

    def __init__(self, entries: Mapping[str, Any], load: Callable[[Any], Pair]) -> None:
        self.entries, self.load = entries, load

    def __getitem__(self, module: str) -> Pair:
        return self.load(self.entries[module])

    def __contains__(self, module: object) -> bool:
        return module in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by the name of the adapted linear module.

    Attributes:
        pairs: A [r, in] and B [out, r]; those of an adapter from a file are read on access, so the file must remain.
        scales: s = alpha / r of each module.
        transposed: whether the modules store their weights as [in, out], as GPT-2's do.
        base: identifies the weights that it was trained on, see :func:`revision`; None if unknown.
        whole: the tensors of modules that were trained in full, such as a projector, by module and name. They replace
            the model's own, like peft's ``modules_to_save``.
    """

    pairs: Mapping[str, Pair]
    scales: Mapping[str, float]
    transposed: bool = False
    base: str | None = None
    whole: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    metavar: ClassVar[str] = "ADAPTER"
    source_help: ClassVar[str] = "the folder of a LoRA adapter, as peft saves it"

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the adapted modules."""
        return tuple(self.pairs)

    @property
    def parameters(self) -> int:
        """The number of parameters: r (in + out) for each module, plus those of modules that were trained in full."""
        whole = sum(each.numel() for tensors in self.whole.values() for each in tensors.values())
        return whole + sum(a.numel() + b.numel() for a, b in self.pairs.values())

    def scaled(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and s B [out, r] of a module, in float32."""
        a, b = self.pairs[module]
        return a.float(), self.scales[module] * b.float()

    def delta(self, module: str) -> Tensor:
        """Return s B A as it is added to the module's weight, in float32."""
        a, b = self.scaled(module)
        product = b @ a
        return product.T if self.transposed else product

    def write(self, folder: str | Path, name: str | None = None) -> Path:
        """Write a folder that ``peft.PeftModel.from_pretrained`` reads.

        Args:
            folder: the new folder.
            name: of the base model, as information and for peft's ``AutoPeftModel``.

        Raises:
            ExportError: if the folder exists or cannot be written.
        """
        folder = Path(folder)
        with new_folder(folder, size=4 * self.parameters) as partial:
            self.write_into(partial, name)
        return folder

    def write_into(self, folder: Path, name: str | None = None) -> None:
        """Write the files of :meth:`write` into an existing folder.

        Args:
            folder: the existing folder.
            name: name of the base model, as information and for peft's ``AutoPeftModel``.
        """
        uniform = self._of_one_rank()
        rank = {len(a) for a, _ in uniform.pairs.values()}.pop()
        config = LoraConfig(
            base_model_name_or_path=name,
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=_alpha(uniform.scales, rank),  # type: ignore[arg-type]
            target_modules=list(uniform.pairs),
            fan_in_fan_out=self.transposed,
            modules_to_save=list(self.whole) or None,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        save_file(uniform._tensors(), folder / TENSORS, {"format": "pt", REVISION: self.base or ""})

    def stored(self, file: Path) -> Adapter:
        """Write the factors into a file, and return the same adapter with factors that are read from there on access.

        Args:
            file: the file, which is replaced if it exists.
        """
        save_file(self._tensors(), file)
        return replace(self, pairs=_pairs_of(file, self.modules))

    def loaded(self) -> Adapter:
        """Return the same adapter with all factors in memory, independent of any file."""
        return replace(self, pairs={name: (a.clone(), b.clone()) for name, (a, b) in self.pairs.items()})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.replacements())
        for module, pair in self.pairs.items():
            tensors |= {f"{module}{half}": tensor for half, tensor in zip(HALVES, pair, strict=True)}
        return {f"{PREFIX}{name}": each.detach().cpu().contiguous() for name, each in tensors.items()}

    def replacements(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of :attr:`whole` by the names of their parameters."""
        for module, tensors in self.whole.items():
            yield from ((f"{module}.{name}", each) for name, each in tensors.items())

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Open a folder with a plain LoRA adapter written by peft or by :meth:`write`.

        Raises:
            CheckpointError: for a folder without such files, or an adapter that is more than plain LoRA.
        """
        folder = Path(folder)
        config = _config(folder)
        with _reading(folder / TENSORS) as file:
            base = (file.metadata() or {}).get(REVISION) or None
            tensors = list(file.keys())
        modules = [name.removeprefix(PREFIX).removesuffix(HALVES[0]) for name in tensors if name.endswith(HALVES[0])]
        known = {f"{PREFIX}{module}{half}" for module in modules for half in HALVES}
        if not modules or known != set(tensors):
            unpaired = min(known ^ set(tensors), default="nothing")
            raise CheckpointError(
                f"{folder / TENSORS}: {unpaired} is not half of a LoRA pair: give a plain LoRA adapter"
            )
        scales = dict.fromkeys(modules, _scale(config))
        return cls(_pairs_of(folder / TENSORS, modules), scales, bool(config.get("fan_in_fan_out")), base)

    def describe(self) -> dict[str, Any]:
        """Return its description for provenance."""
        return {"modules": len(self.pairs), "parameters": self.parameters, "base": self.base}

    def _of_one_rank(self) -> Adapter:
        """Return the same adapter with a uniform rank and scale, as a peft config needs, padded with zeros."""
        rank = max(len(a) for a, _ in self.pairs.values())
        uniform = len({len(a) for a, _ in self.pairs.values()}) == 1 and len(set(self.scales.values())) == 1
        if uniform:
            return self
        pairs = {}
        for name, (a, b) in self.pairs.items():
            padding = rank - len(a)
            b = b * self.scales[name]
            pairs[name] = (nn.functional.pad(a, (0, 0, 0, padding)), nn.functional.pad(b, (0, padding)))
        return replace(self, pairs=pairs, scales=dict.fromkeys(pairs, 1.0))


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Return sum_k lambda_k Delta_k as one adapter, whose rank is the sum of the ranks; exact, and computed on access.

    Args:
        adapters: for the same weights, of any ranks, scales and modules.
        weights: lambda_k; 1 each by default.

    Raises:
        TrainingError: for no adapters, a different number of weights, adapters of different models, or adapters with
            modules that were trained in full.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters):
        raise TrainingError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    bases = {each.base for each in adapters if each.base is not None}
    if len(bases) > 1 or len({each.transposed for each in adapters}) > 1:
        raise TrainingError("these adapters were trained on different base weights: their sum is meaningless")
    replacing = [name for each in adapters for name in each.whole]
    if replacing:
        raise TrainingError(f"an adapter replaces {replacing[0]}, which cannot be summed: merge it alone")

    def joined(name: str) -> Pair:
        of = [(each, weight) for each, weight in zip(adapters, weights, strict=True) if name in each.pairs]
        pairs = [(each.pairs[name], weight * each.scales[name]) for each, weight in of]
        return torch.cat([a for (a, _), _ in pairs]), torch.cat([scale * b for (_, b), scale in pairs], dim=1)

    names = dict.fromkeys(name for each in adapters for name in each.pairs)
    pairs = LazyPairs({name: name for name in names}, joined)
    return Adapter(pairs, dict.fromkeys(names, 1.0), adapters[0].transposed, next(iter(bases), None))


@torch.no_grad()
def merge(stack: Stack, adapter: Adapter, weight: float = 1.0) -> Stack:
    """Return the model with ``weight`` times an adapter merged; it shares all other tensors with the original.

    Args:
        stack: the model; it is not changed. With weight 0 the output is bit-identical.
        adapter: for these weights.
        weight: lambda.

    Raises:
        TrainingError: for an adapter of another model or revision, or of a weight that another module shares.
    """
    check_fits(stack, adapter)
    merged = with_updates(stack, ((name, weight * adapter.delta(name)) for name in adapter.modules if weight))
    for name, new in adapter.replacements():
        path, _, last = name.rpartition(".")
        module = merged.model.get_submodule(path)
        old = getattr(module, last)
        mixed = torch.lerp(old.float(), new.to(old.device).float(), weight).to(old.dtype)
        setattr(module, last, nn.Parameter(mixed, requires_grad=old.requires_grad))
    return merged


@torch.no_grad()
def with_updates(stack: Stack, updates: Iterable[tuple[str, Tensor]]) -> Stack:
    """Return the model with updates added to its weights, each in float32 and rounded once; one is held at a time.

    Args:
        stack: the model; it is not changed, and shares all other tensors with the result.
        updates: names of linear modules, each with the update of its weight, in the weight's own shape.
    """
    model = share(stack.model)
    for name, update in updates:
        module = model.get_submodule(name)
        old = module.weight
        new = old.float() + update.to(old.device)
        module.weight = nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
    return Stack(model, name=f"{stack.name}, adapted", stack=stack.stack)


def check_fits(stack: Stack, adapter: Adapter) -> None:
    """Check that an adapter belongs to a model.

    Args:
        stack: the model.
        adapter: the adapter.

    Raises:
        TrainingError: naming the first difference.
    """
    holders: dict[int, int] = {}
    for module in stack.model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    linear = {name: each for name, each in stack.model.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    for name in adapter.modules:
        if name not in linear:
            raise TrainingError(f"{stack.name} has no linear module {name}: this adapter is for another model")
        (a, b), found = adapter.pairs[name], list(linear[name].weight.shape)
        expected = [a.shape[1], len(b)] if adapter.transposed else [len(b), a.shape[1]]
        if found != expected:
            raise TrainingError(f"{name} of {stack.name} is {found}, the adapter's {expected}: it is for another model")
        if holders[id(linear[name].weight)] > 1:
            raise TrainingError(f"{name} of {stack.name} shares its weight with another module: it cannot be adapted")
    shapes = {name: list(each.shape) for name, each in stack.model.named_parameters()}
    for name, new in adapter.replacements():
        if shapes.get(name) != list(new.shape):
            raise TrainingError(f"{stack.name} has no {name} of {list(new.shape)}: this adapter is for another model")
    known = all(map(has_values, stack.model.parameters()))  # not in an estimate
    if known and adapter.base is not None and adapter.base != revision(stack.model):
        raise TrainingError(
            f"{stack.name} has other weights than the model that this adapter was trained on: give that revision"
        )


def _pairs_of(file: Path, modules: Iterable[str]) -> LazyPairs:
    """Return the factors in a file, each pair read on access."""
    return LazyPairs({name: f"{PREFIX}{name}" for name in modules}, partial(_read_pair, file))


def _read_pair(file: Path, name: str) -> Pair:
    with _reading(file) as tensors:
        return tensors.get_tensor(f"{name}{HALVES[0]}"), tensors.get_tensor(f"{name}{HALVES[1]}")


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """Open the file of an adapter.

    Raises:
        CheckpointError: for a file that is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}): save the adapter again") from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json((folder / CONFIG).read_bytes())
        if not isinstance(config, dict) or config["peft_type"] != "LORA":
            raise ValueError
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{folder} is not the folder of a LoRA adapter: give one that peft has saved") from None
    for name, known in PLAIN.items():
        if config.get(name, known[0]) not in known:
            value = json.dumps(config[name])
            raise CheckpointError(f"{folder / CONFIG}: {name} is {value}: only plain LoRA is supported")
    return config


def _scale(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _alpha(scales: Mapping[str, float], rank: int) -> int | float:
    alpha = next(iter(scales.values())) * rank
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha
