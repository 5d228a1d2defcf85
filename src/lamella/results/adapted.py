"""Trained adapters that no weight can say, as a result: a plan with its side file, without the model."""

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

`plan.json` says where the adapters stand, and the `.safetensors` file beside it holds their tensors. The model itself
is not in this folder: take the one that it was trained beside, whose weights are checked.

```python
import lamella
from lamella.plan import Plan

stack = lamella.open("MODEL")
model = lamella.apply(stack, Plan.read("FOLDER/plan.json"))
```

In one folder with the model: `lamella apply FOLDER/plan.json MODEL --form native -o WHOLE`.
"""


@dataclass(kw_only=True)
class Beside(Trained):
    """A model that was trained beside its weights: what is written is the plan, and not the model."""

    @property
    def size(self) -> int:
        """Bytes of what is written."""
        raise NotImplementedError

    def put(self, folder: Path) -> None:
        """Write what the plan does not bring along."""

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Make a folder with the plan, its side files and the documents, all at once."""
        with new_folder(out, size=self.size, overwrite=overwrite, source=self.stack.path) as folder:
            self.put(folder)
            self.plan.write(folder / PLAN)
            for name, text in (documents() | {"log.json": self.log.dump()}).items():
                (folder / name).write_text(text, encoding="utf-8")
        self.plan.settle(out)


@dataclass(kw_only=True)
class Adapted(Beside):
    """Adapters that no weight can say: they are side files of the plan."""

    kind: ClassVar[str] = "adapted"
    loading: ClassVar[str] = LOADING

    @property
    def size(self) -> int:
        return sum(each.located.stat().st_size for each in self.plan.adapters)

    def body(self) -> dict[str, Any]:
        sites = [site for adapter in self.plan.adapters for site in adapter.sites]
        return super().body() | {"sites": sites, "form": "adapter"}
