"""Linear layers in 8 bits: every row of weights as integers from -128 to 127 with one scale.

Activations, the embedding and the head keep 16 bits. The folder is in the format of torchao, which transformers writes
and reads, as safetensors. A decoding step runs here on a kernel of torch itself, which reads the integers directly and
needs neither torchao nor a compiler; torchao by itself expands every weight to 16 bits first, unless it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from lamella.errors import ExportError
from lamella.extras import require
from lamella.files import new_folder
from lamella.plan import checkpoint, native
from lamella.plan.filling import pretrained
from lamella.stack import auto_class, share

FEW_ROWS = 16  # below this number of rows of activations, as in a decoding step, the integer kernel is faster
NEEDS = ("quantize", "a model in int8")  # the extra with torchao, and its purpose


class Int8Linear(nn.Module):
    """A linear layer with integer weights.

    Args:
        weight: integer weights [out, in] int8.
        scale: scale of each row [out].
        bias: bias [out], or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` [..., in]; the result is [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def in_integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a matrix [out, in] as integers, and their scales [out], computed as in torchao."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (weight * (1 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def int8_copy(model: Any) -> Any:
    """Return a copy of a model or view in bfloat16 whose linear layers, except the head, have integer weights."""
    sixteen = {id(each): nn.Parameter(each.detach().bfloat16(), requires_grad=False) for each in model.parameters()}
    ours, theirs = share(model, keep=sixteen), dict(model.named_modules())

    def integers(name: str, module: nn.Linear) -> Int8Linear:
        weight, scale = in_integers(theirs[name].weight)
        return Int8Linear(weight, scale.bfloat16(), module.bias)

    return _replace_linear_layers(ours, integers)


def int8_bytes(model: Any, without: Collection[Tensor] = ()) -> int:
    """Return the bytes of the weights of :func:`int8_copy`, computed without making it.

    Args:
        model: the model or view.
        without: parameters that are not counted.
    """
    head, gone = model.get_output_embeddings(), {id(each) for each in without}
    linear = {id(each.weight) for each in model.modules() if type(each) is nn.Linear and each is not head}
    return sum(
        each.numel() + 2 * len(each) if id(each) in linear else 2 * each.numel()
        for each in model.parameters()
        if id(each) not in gone
    )


def run_by_torch(model: Any) -> Any:
    """Replace the torchao linear layers of an opened model by :class:`Int8Linear`, which is faster on a CPU."""

    def integers(name: str, module: nn.Linear) -> nn.Module:
        weight: Any = module.weight
        if not hasattr(weight, "qdata"):
            return module
        return Int8Linear(weight.qdata, weight.scale.flatten().to(model.dtype), module.bias)

    return _replace_linear_layers(model, integers)


def _replace_linear_layers(model: Any, replacement: Callable[[str, nn.Linear], nn.Module]) -> Any:
    """Replace the linear layers of a model, except its head."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, replacement(name, module))
    return model


def write_int8(folder: Path, config: Any, tokenizer: Any, out: Path, overwrite: bool = False) -> int:
    """Write a checkpoint folder as one in int8, which ``lamella.load`` and transformers with torchao read.

    Args:
        folder: a safetensors checkpoint that transformers can open.
        config: its config.
        tokenizer: its tokenizer; None if it has none.
        out: the folder to write; it appears when it is complete.
        overwrite: replace an earlier one.

    Returns:
        The size of its weights in bytes.

    Raises:
        LamellaError: if torchao is not installed.
        CheckpointError: for a folder that cannot be read.
        ExportError: for a native export, or if ``out`` cannot be written.
    """
    quantization = require("torchao.quantization", *NEEDS)
    if native.read_metadata(checkpoint.read_json(folder / "config.json"), str(folder)) is not None:
        raise ExportError(f"{folder}: is a native export, which cannot be stored in int8: export it with --form plain")
    tensors = checkpoint.read(folder).tensors
    with new_folder(out, size=sum(tensor.size for tensor in tensors), overwrite=overwrite, source=folder) as partial:
        model = pretrained(
            getattr(transformers, auto_class(config)),
            folder,
            config=config,
            dtype=torch.bfloat16,
            use_safetensors=True,
            quantization_config=transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        )
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        checkpoint.copy_licence(folder, partial)
        (partial / "README.md").write_text(CARD.format(name=folder.name, auto=auto_class(config)), encoding="utf-8")
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


CARD = """\
# {name} in int8

The weights of the linear layers are 8-bit integers with one scale per row, written by torchao; the rest is bfloat16.

## Loading

With Lamella (`pip install 'lamella[quantize]'`), which decodes with an integer kernel:

```python
import lamella

model = lamella.load("FOLDER").model
```

With transformers and torchao:

```python
from transformers import {auto}

model = {auto}.from_pretrained("FOLDER")
```
"""
