"""Trained adapters that cannot be merged into weights, as a result: a plan with its side file, without the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.files import new_folder
from lamella.result import Documents
from lamella.train import Trained

PLAN = "plan.json"
LOADING = """
## Loading

`plan.json` specifies the sites of the adapters, and the `.safetensors` file contains their tensors. The model is not in
this folder: use the model that they were trained on, whose weights are checked.

```python
import lamella
from lamella.plan import Plan

stack = lamella.open("MODEL")
model = lamella.apply(stack, Plan.read("FOLDER/plan.json"))
```

To write a folder that includes the model: `lamella apply FOLDER/plan.json MODEL --form native -o WHOLE`.
"""


@dataclass(kw_only=True)
class WithoutModel(Trained):
    """A trained model of which only the plan is written, and not the model."""

    @property
    def size(self) -> int:
        """The size of the written files in bytes."""
        raise NotImplementedError

    def put(self, folder: Path) -> None:
        """Write the files that the plan does not include."""

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write a folder with the plan, its side files and the documents, atomically.

        Args:
            out: the folder.
            documents: returns further documents by name: evidence, page and card.
            overwrite: replace an existing folder.
            tokenizer: ignored, because no checkpoint is written.
        """
        with new_folder(out, size=self.size, overwrite=overwrite, source=self.stack.path) as folder:
            self.put(folder)
            self.plan.write(folder / PLAN)
            for name, text in (documents() | {"log.json": self.log.dump()}).items():
                (folder / name).write_text(text, encoding="utf-8")
        self.plan.settle(out)


@dataclass(kw_only=True)
class Adapted(WithoutModel):
    """Adapters that cannot be merged into weights: they are side files of the plan."""

    kind: ClassVar[str] = "adapted"
    loading: ClassVar[str] = LOADING

    @property
    def size(self) -> int:
        """The size of the adapters' side files in bytes."""
        return sum(each.located.stat().st_size for each in self.plan.adapters)

    def body(self) -> dict[str, Any]:
        """Return the evidence, with the sites of the adapters."""
        sites = [site for adapter in self.plan.adapters for site in adapter.sites]
        return super().body() | {"sites": sites, "form": "adapter"}
