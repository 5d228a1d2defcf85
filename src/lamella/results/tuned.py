"""A trained LoRA adapter as a result: what is written is a folder that plain peft loads and merges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.files import new_folder
from lamella.results.adapted import PLAN
from lamella.results.trained import Trained
from lamella.stack import Stack
from lamella.train import Adapter

LOADING = """
## Loading

The folder is an adapter of peft, without the model: `PeftModel.from_pretrained(model, "FOLDER")`, and
`merge_and_unload()` for an ordinary checkpoint. `plan.json` says what ran while it was trained.
"""


@dataclass(kw_only=True)
class Tuned(Trained):
    """A model with a LoRA adapter merged, which shares all other tensors with the original, and the adapter apart.

    The folder has the adapter and the plan under which it was trained, and not the model.

    Attributes:
        adapter: for the original.
    """

    stack: Stack
    adapter: Adapter

    kind: ClassVar[str] = "tuned"

    def body(self) -> dict[str, Any]:
        prefix = self.stack.architecture.prefix
        layers = {name.removeprefix(prefix).split(".", 1)[0] for name in self.adapter.modules}
        sites = [f"layers.{layer}" for layer in sorted(layers, key=int)]
        return super().body() | {"sites": sites, "form": "adapter"}

    def save(self, out: Path, documents: dict[str, str], *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Make a folder with the adapter and the documents, all at once."""
        size = 4 * self.adapter.parameters
        with new_folder(out, size=size, overwrite=overwrite, source=self.stack.path) as folder:
            self.adapter.put(folder)
            self.plan.write(folder / PLAN)
            for name, text in (documents | {"log.json": self.log.dump()}).items():
                said = text.rstrip() + "\n" + LOADING if name == "README.md" else text
                (folder / name).write_text(said, encoding="utf-8")
        self.plan.settle(out)
