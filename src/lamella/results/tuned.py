"""A trained LoRA adapter as a result, written as a folder that plain peft loads and merges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.results.adapted import WithoutModel
from lamella.stack import Stack
from lamella.train import Adapter

LOADING = """
## Loading

The folder is an adapter of peft, without the model: `PeftModel.from_pretrained(model, "FOLDER")`, and
`merge_and_unload()` for an ordinary checkpoint. `plan.json` is the plan under which it was trained.
"""


@dataclass(kw_only=True)
class Tuned(WithoutModel):
    """A model with a merged LoRA adapter, which shares all other tensors with the original, and the separate adapter.

    The folder contains the adapter and the plan under which it was trained, but not the model.

    Attributes:
        adapter: for the original.
    """

    stack: Stack
    adapter: Adapter

    kind: ClassVar[str] = "tuned"
    loading: ClassVar[str] = LOADING

    @property
    def size(self) -> int:
        """The approximate size of the adapter in bytes."""
        return 4 * self.adapter.parameters

    def body(self) -> dict[str, Any]:
        """Return the evidence, with the adapted layers as sites."""
        prefix = self.stack.architecture.prefix
        layers = {name.removeprefix(prefix).split(".", 1)[0] for name in self.adapter.modules}
        sites = [f"{self.stack.prefix}layers.{layer}" for layer in sorted(layers, key=int)]
        return super().body() | {"sites": sites, "form": "adapter"}

    def put(self, folder: Path) -> None:
        """Write the adapter in peft's format."""
        self.adapter.write_into(folder)
