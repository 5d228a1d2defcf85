"""The models that llama.cpp computes as transformers does, and the tensors that it needs of them.

Anything that differs and that a GGUF file cannot express is refused: the file would open, but compute something else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import MODEL_ARCH

from lamella.errors import ArchitectureError, CheckpointError, ExportError
from lamella.plan import checkpoint, native
from lamella.plan.checkpoint import Range
from lamella.plan.width import Widths
from lamella.stack import find_architecture
from lamella.stack.wiring import Sizes

_FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # in every layer


@dataclass(frozen=True)
class Family:
    """What llama.cpp computes for one model type.

    Attributes:
        arch: llama.cpp's architecture.
        uneven: llama.cpp's architecture for layers of different widths; None if it has none.
        neighbours: whether its rotary embeddings rotate adjacent entries of a head.
        ropes: the supported types of position scaling.
        activation: activation function of the MLP.
        norms: offset that transformers adds to the weights of norms.
        period: one layer in each period attends to the whole text, the others to a window.
    """

    arch: MODEL_ARCH
    uneven: MODEL_ARCH | None = None
    neighbours: bool = False
    ropes: tuple[str, ...] = ("default", "linear")
    activation: str = "silu"
    norms: float = 0.0
    period: int = 1


_LLAMA = Family(MODEL_ARCH.LLAMA, MODEL_ARCH.DECI, neighbours=True, ropes=("default", "linear", "llama3"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, activation="gelu_pytorch_tanh", norms=1.0, period=6),
}


def family_of(folder: Path, config: Any) -> Family:
    """Return the entry of the table for a checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.

    Raises:
        ArchitectureError: if there is none.
        ExportError: if the model does something that llama.cpp computes differently.
    """
    model_type = config.model_type.removeprefix(native.MODEL_TYPE.format(""))
    if model_type not in FAMILIES:
        raise ArchitectureError(f"{folder}: a {model_type} cannot be written as GGUF, only {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    metadata = native.read_metadata(checkpoint.read_json(folder / "config.json"), str(folder))
    if metadata is not None and any(len(names) < len(native.SUBLAYERS) for names in metadata.sublayers or ()):
        raise ExportError(
            f"{folder}: single sublayers are removed, but a GGUF file has whole layers: remove whole layers"
        )
    if metadata is not None and metadata.plan is not None:
        raise ExportError(f"{folder}: runs a plan, which llama.cpp does not: give a plain checkpoint")
    differing = [
        (metadata is not None and metadata.width is not None and metadata.width.rescale, "norms with two epsilons"),
        (_activation(config) != family.activation, f"the activation {_activation(config)}"),
        (rope_of(config).get("partial_rotary_factor", 1) != 1, "rotary embeddings of a part of each head"),
        (rope_of(config)["rope_type"] not in family.ropes, f"positions scaled as {rope_of(config)['rope_type']}"),
        (getattr(config, "use_sliding_window", False), "layers that attend to a window"),
        (model_type == "qwen3" and config.attention_bias, "biases in attention"),
        (getattr(config, "use_bidirectional_attention", False), "attention to later tokens"),
        (family.period > 1 and config.layer_types != _windows(config, family), "sliding windows in another order"),
        (getattr(config, "query_pre_attn_scalar", None) not in (None, _head_dim(config)), "a custom attention scale"),
        (getattr(config, "final_logit_softcapping", None) is not None, "soft-capped logits"),
    ]
    for differs, what in differing:
        if differs:
            raise ExportError(f"{folder}: has {what}, which llama.cpp does not compute for a {model_type}")
    return family


def _head_dim(config: Any) -> int:
    return find_architecture(config).sizes_of(config).head_dim


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def rope_of(config: Any) -> dict[str, Any]:
    """Return the settings of rotary embeddings; those of full attention if layers differ."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def _windows(config: Any, family: Family) -> list[str]:
    """Return the layer types that llama.cpp assumes."""
    layers = range(1, config.num_hidden_layers + 1)
    return ["sliding_attention" if layer % family.period else "full_attention" for layer in layers]


# The tensors of the checkpoint.


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint by llama.cpp's names, and their widths.

    Attributes:
        layers: tensors of each layer.
        outside: tensors outside the layers.
        head_dim: size of a head.
    """

    layers: list[dict[str, Range]]
    outside: dict[str, Range]
    head_dim: int

    @property
    def tokens(self) -> int:
        """The size of the vocabulary."""
        return self.outside["token_embd.weight"].shape[0]

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.outside["token_embd.weight"].shape[1]

    @property
    def heads(self) -> list[int]:
        """The number of query heads of each layer."""
        return [layer["attn_q.weight"].shape[0] // self.head_dim for layer in self.layers]

    @property
    def kv_heads(self) -> list[int]:
        """The number of key-value heads of each layer."""
        return [layer["attn_k.weight"].shape[0] // self.head_dim for layer in self.layers]

    @property
    def channels(self) -> list[int]:
        """The number of MLP channels of each layer."""
        return [layer["ffn_up.weight"].shape[0] for layer in self.layers]

    @property
    def even(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(zip(self.heads, self.kv_heads, self.channels, strict=True))) == 1


def layout_of(folder: Path, config: Any, family: Family) -> Layout:
    """Locate the tensors of a checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.
        family: its entry of the table.

    Raises:
        CheckpointError: if they are not those of whole layers.
        ExportError: if they are quantised, or llama.cpp does not know one.
    """
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    layers: dict[int, dict[str, Range]] = defaultdict(dict)
    outside: dict[str, Range] = {}
    for tensor in checkpoint.read(folder).tensors:
        stem, _, what = tensor.name.rpartition(".")
        if what == "inv_freq" or (stem == "lm_head" and config.tie_word_embeddings):
            continue  # derived from the config, or the tied embedding
        if tensor.dtype not in _FLOATS:
            raise ExportError(f"{folder}: {tensor.name} is {tensor.dtype}: give the unquantised checkpoint")
        name = names.get_name(stem)
        if name is None or what not in ("weight", "bias"):
            raise ExportError(f"{folder}: llama.cpp has no tensor for {tensor.name} in a {config.model_type}")
        if len(tensor.shape) != (1 if what == "bias" or name.endswith("norm") else 2):
            raise CheckpointError(f"{folder}: {tensor.name} has the shape {list(tensor.shape)}; get it again")
        if match := _LAYER.fullmatch(f"{name}.{what}"):
            layers[int(match[1])][match[2]] = tensor
        else:
            outside[f"{name}.{what}"] = tensor
    ends = {"token_embd.weight", "output_norm.weight"} | (set() if config.tie_word_embeddings else {"output.weight"})
    matrices = {f"{name}.weight" for name in _MATRICES}
    count = config.num_hidden_layers
    if set(outside) != ends or set(layers) != set(range(count)) or not all(
        matrices <= set(layer) == set(layers[0]) for layer in layers.values()
    ):  # fmt: skip
        raise CheckpointError(f"{folder}: its tensors are not those of {count} whole layers; get it again")
    sizes = find_architecture(config).sizes_of(config)
    layout = Layout([layers[layer] for layer in range(count)], outside, sizes.head_dim)
    _check_widths(folder, config, layout, sizes)
    return layout


def _check_widths(folder: Path, config: Any, layout: Layout, sizes: Sizes) -> None:
    """Check that tensors have the widths of the config, and that heads are grouped as llama.cpp groups them.

    Raises:
        CheckpointError: if widths differ.
        ExportError: if query heads share key-value heads unevenly.
    """
    counts = getattr(config, "lamella", {}).get("width")
    widths = Widths() if counts is None else Widths.of_counts(counts)
    for layer, found in enumerate(zip(layout.heads, layout.kv_heads, layout.channels, strict=True)):
        heads = widths.heads.get(layer)
        if heads is not None and not heads.regular:
            raise ExportError(f"{folder}: layer {layer} groups its heads unevenly, which llama.cpp does not compute")
        wanted = (sizes.heads, sizes.kv_heads) if heads is None else (len(heads.keep), len(heads.kv_keep))
        if found != (*wanted, len(widths.channels.get(layer, range(sizes.channels)))):
            raise CheckpointError(f"{folder}: layer {layer} is not as wide as its config.json says; get it again")
