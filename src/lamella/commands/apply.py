"""Apply a plan to a model, and export the result as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from lamella.errors import PlanError
from lamella.formatting import counted
from lamella.plan import Plan
from lamella.plan.export import Form, FormOrAuto, export, export_out_of_core, natural_form
from lamella.registry import command
from lamella.result import Documents, Evidence, Result, Summary
from lamella.signature import Argument
from lamella.zoo import LazyCheckpoint


@dataclass(kw_only=True)
class Exported(Result):
    """A model with its plan, to be written as a checkpoint.

    Attributes:
        model: the original.
        plan: the plan.
        form: form of the checkpoint.
        out_of_core: whether weights are copied from disk to disk.
    """

    model: LazyCheckpoint
    plan: Plan
    form: Form
    out_of_core: bool

    kind: ClassVar[str] = "exported"
    needs_folder: ClassVar[bool] = True

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write the checkpoint with its documents; see :meth:`lamella.result.Result.save`."""
        files = documents()
        given: dict[str, Any] = {"overwrite": overwrite, "card": files.pop("README.md", None), "files": files}
        if self.out_of_core:
            export_out_of_core(self.model.folder, self.plan, out, **given)
        else:
            export(self.model.opened(), self.plan, out, form=self.form, tokenizer=self.model.processor(), **given)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the form of the checkpoint and the effect of the plan."""
        found = evidence.findings
        masked = f", {counted(found['masked'], 'weight')} masked" if found["masked"] else ""
        lines = []
        if found["dynamic"]:
            lines.append("layers are skipped when lamella.load opens it; plain transformers runs the whole model")
        if found["adapters"]:
            lines.append("its adapters run when lamella.load opens it; plain transformers ignores them")
        return Summary(f"{found['form']} checkpoint, {found['effect']}{masked}.", lines=lines)


@command("apply", verb="apply", on="any")
def apply_plan(
    plan: Plan, model: Annotated[LazyCheckpoint, Argument()], *, form: FormOrAuto = "auto", out_of_core: bool = False
) -> Exported:
    """Apply a plan to a model and export the checkpoint.

    Example: lamella apply plan.json smollm2 -o small --form native

    Args:
        plan: a plan, or a series, of which the last plan is used.
        model: the model that the plan is for.
        form: plain: an ordinary checkpoint (whole layers, common widths). portable: the same function in any tool, with
            single sublayers zeroed. native: all cuts, with a modelling file of its own; dynamic plans run when
            lamella.load opens it. auto: plain if possible, else native.
        out_of_core: copy weights from disk to disk instead of loading them (plain form): a checkpoint of any size needs
            a small, constant amount of memory.

    Returns:
        The model with its plan, to be written as a checkpoint.

    Raises:
        PlanError: for a plan of another model, or one that cannot be copied from disk to disk.
    """
    actual: Form = natural_form(plan) if form == "auto" else form
    if out_of_core:
        if actual != "plain":
            raise PlanError(
                f"out_of_core writes the plain form, but this plan needs the {actual} form: leave out_of_core out"
            )
        _ = model.folder  # refuses models without a local folder
    findings = {
        "form": actual,
        "effect": plan.effect,
        "sublayers_removed": plan.removed,
        "masked": plan.masked,
        "dynamic": not plan.is_static,
        "adapters": bool(plan.adapters),
    }
    return Exported(model=model, plan=plan, form=actual, out_of_core=out_of_core, findings=findings)
