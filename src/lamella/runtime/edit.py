"""An edit: a model changed without a training run of its own, as a plan that can be undone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lamella.formatting import estimate, listed
from lamella.plan import Plan, checkpoint, parameters_at
from lamella.plan.export import export, export_out_of_core, natural_form
from lamella.result import Documents, Evidence, Result, Summary, Table
from lamella.runtime.views import apply
from lamella.stack import Model, Stack


class EditEvidence(Evidence):
    """Evidence of a changed model.

    Attributes:
        sites: sites that were changed.
        removed: number of sublayers that the plan removes.
        form: form of the checkpoint.
        fidelity: fidelity to the original on the test text; None if not measured.
    """

    sites: list[str] = Field(default_factory=list)
    removed: float = 0.0
    form: str = "plain"
    fidelity: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Edit(Result):
    """A plan for a model.

    Attributes:
        stack: the model, or the stack of it that changes; it is not changed itself.
        plan: the plan that changes it.
        reference: the model against which its fidelity is measured, if that is not the opened model.
    """

    stack: Model
    plan: Plan
    reference: Stack | None = None

    kind: ClassVar[str] = "edit"
    evidence: ClassVar[type[Evidence]] = EditEvidence
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.provenance = self.plan.provenance  # the same object, so that the plan has it as well

    @property
    def view(self) -> Any:
        """The changed model, which shares its tensors with the original."""
        return apply(self.stack, self.plan)

    def body(self) -> dict[str, Any]:
        """Return the fields of the evidence."""
        sites = list(dict.fromkeys(site for edit in self.plan.weights for site in edit.sites))
        form = natural_form(self.plan, self.stack)
        named = [self.plan.drop, list(self.plan.modules), list(self.plan.width)]
        named.append([self.plan.rewrite.name] if self.plan.rewrite else [])
        return {"sites": next(filter(None, [sites, *named]), []), "removed": self.plan.removed, "form": form}

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Export the checkpoint: byte by byte if all weights come from folders, else from memory.

        Args:
            out: the folder to write.
            documents: returns the text files of the result by name.
            overwrite: replace an earlier result.
            tokenizer: tokenizer or processor to save with the checkpoint.
        """
        files = documents()
        options: dict[str, Any] = {"overwrite": overwrite, "card": files.pop("README.md", None), "files": files}
        if self._is_copied():
            export_out_of_core(self.stack.path, self.plan, out, **options)  # type: ignore[arg-type]
        else:
            form = natural_form(self.plan, self.stack)
            export(self.stack, self.plan, out, form=form, tokenizer=tokenizer, **options)
        self.plan.settle(out)  # the working folder with its side files is deleted

    def _is_copied(self) -> bool:
        """Return whether every tensor of the result is in a safetensors folder under the same name."""
        edits = self.plan.weights
        if not isinstance(self.stack, Stack) or not edits or not all(edit.is_folder for edit in edits):
            return False
        if self.stack.path is None or not checkpoint.is_safetensors(self.stack.path):
            return False
        stored = {each.name for each in checkpoint.read(self.stack.path).tensors}
        return all(stored >= set(parameters_at(self.stack, edit.sites)) for edit in edits)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Return the headline and the table of the edit."""
        assert isinstance(evidence, EditEvidence)
        name = (evidence.model or {}).get("name", "the model")
        changed = listed(evidence.sites)
        tables = [fidelity_table(evidence.fidelity)] if evidence.fidelity else []
        return Summary(f"{evidence.method} has changed {name}: {changed}.", tables)


def fidelity_table(after: dict[str, Any], before: dict[str, Any] | None = None) -> Table:
    """Return a table of perplexity, KL and agreement with standard errors.

    Args:
        after: fidelity of the changed model.
        before: fidelity of an earlier version to compare with; None compares with the original.
    """
    columns = ["before", "after"] if before else ["original", "changed"]
    rows = [["perplexity", estimate((before or after)["perplexity" if before else "base_perplexity"])]]
    rows[0].append(estimate(after["perplexity"]))
    rows.append(["KL from the original, nats", estimate(before["kl"]) if before else "", estimate(after["kl"])])
    rows.append(["same top token", estimate(before["top1"]) if before else "", estimate(after["top1"])])
    return Table("On held-out text", ["", *columns], rows)
