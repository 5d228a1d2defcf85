"""Linear maps in 8 bits: every row of weights as integers from -128 to 127 and one scale.

Activations, the embedding and the head keep 16 bits. A folder of this kind is in the form of torchao, which
transformers writes and reads, as safetensors. A decoding step of it runs here on a kernel of torch's own, which reads
the integers as they are and needs neither torchao nor a compiler; torchao by itself writes every weight out in 16 bits
first, unless it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
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

FEW = 16  # rows of activations, such as those of a decoding step, for which the kernel for integers is faster
NEEDS = ("quantize", "a model in int8")  # which extra brings torchao, and what for


class Int8Linear(nn.Module):
    """A linear map whose weights are integers.

    Args:
        weight: [out, in] int8.
        scale: of each row [out].
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < FEW and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def in_integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a matrix [out, in] as integers, and their scales [out], as torchao chooses them."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (weight * (1 / scale)[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def int8_copy(model: Any) -> Any:
    """A copy of a model, or of a view, in bfloat16, whose linear maps are integers; all but the head."""
    sixteen = {id(each): nn.Parameter(each.detach().bfloat16(), requires_grad=False) for each in model.parameters()}
    ours, theirs = share(model, keep=sixteen), dict(model.named_modules())

    def integers(name: str, module: nn.Linear) -> Int8Linear:
        weight, scale = in_integers(theirs[name].weight)
        return Int8Linear(weight, scale.bfloat16(), module.bias)

    return _with_linear_maps(ours, integers)


def run_by_torch(model: Any) -> Any:
    """A model that transformers has opened with torchao, run by :class:`Int8Linear`; on a CPU, where that is faster."""

    def integers(name: str, module: nn.Linear) -> nn.Module:
        weight: Any = module.weight
        if not hasattr(weight, "qdata"):
            return module
        return Int8Linear(weight.qdata, weight.scale.flatten().to(model.dtype), module.bias)

    return _with_linear_maps(model, integers)


def _with_linear_maps(model: Any, replaced: Callable[[str, nn.Linear], nn.Module]) -> Any:
    """Replace the linear maps of a model, all but its head."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, replaced(name, module))
    return model


def write_int8(folder: Path, config: Any, tokenizer: Any, out: Path, overwrite: bool = False) -> int:
    """Write a checkpoint folder as one in int8, which ``lamella.load`` and transformers with torchao read.

    Args:
        folder: a safetensors checkpoint that transformers opens by itself.
        config: its config.
        tokenizer: its tokenizer; None where it has none.
        out: the folder to write; it appears when it is complete.
        overwrite: replace an earlier one.

    Returns:
        The bytes of its weights.

    Raises:
        LamellaError: without torchao.
        CheckpointError: for a folder that cannot be read.
        ExportError: for a native export, or when ``out`` cannot be written.
    """
    quantization = require("torchao.quantization", *NEEDS)
    if native.read_metadata(checkpoint.read_json(folder / "config.json"), str(folder)) is not None:
        raise ExportError(f"{folder}: is a native export, which int8 has no form for: export it plainly")
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
        (partial / "README.md").write_text(CARD.format(name=folder.name, auto=auto_class(config)), encoding="utf-8")
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


CARD = """\
# {name} in int8

The linear maps of its layers are 8-bit integers with one scale for each row, written by torchao; the rest is bfloat16.

## Loading

With Lamella (`pip install 'lamella[quantize]'`), which decodes on a kernel for integers:

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
