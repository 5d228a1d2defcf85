"""A plan carried out: the model that it leaves, as a checkpoint."""

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
    """A model with its plan, which is written as a checkpoint.

    Attributes:
        model: the original.
        plan: what it runs.
        form: of the checkpoint.
        out_of_core: whether it is copied from disk to disk.
    """

    model: LazyCheckpoint
    plan: Plan
    form: Form
    out_of_core: bool

    kind: ClassVar[str] = "exported"
    needs_folder: ClassVar[bool] = True

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        files = documents()
        given: dict[str, Any] = {"overwrite": overwrite, "card": files.pop("README.md", None), "files": files}
        if self.out_of_core:
            export_out_of_core(self.model.folder, self.plan, out, **given)
        else:
            export(self.model.opened(), self.plan, out, form=self.form, tokenizer=self.model.processor(), **given)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        found = evidence.findings
        masked = f", {counted(found['masked'], 'weight')} masked" if found["masked"] else ""
        lines = []
        if found["dynamic"]:
            lines.append("what it skips is skipped when lamella.load opens it; plain transformers runs the whole model")
        if found["adapters"]:
            lines.append("its adapters run when lamella.load opens it; plain transformers leaves them out")
        return Summary(f"{found['form']} checkpoint, {found['effect']}{masked}.", lines=lines)


@command("apply", verb="apply", on="any")
def apply_plan(
    plan: Plan, model: Annotated[LazyCheckpoint, Argument()], *, form: FormOrAuto = "auto", out_of_core: bool = False
) -> Exported:
    """Carry a plan out and export the checkpoint.

    Example: lamella apply plan.json smollm2 -o small --form native

    Args:
        plan: a plan, or a series, which stands for its last plan.
        model: the model that the plan is for.
        form: plain: an ordinary checkpoint (whole layers, common widths). portable: the same function everywhere,
            single sublayers zeroed. native: all cuts, with a modelling file of its own; plans that skip while
            generating run when lamella.load opens it. auto: plain where it can, else native.
        out_of_core: copy from disk to disk in place of loading (plain form): a folder of any size takes a small,
            constant amount of memory.

    Returns:
        The model with its plan, which is written as a checkpoint.

    Raises:
        PlanError: for a plan of another model, or one that cannot be copied from disk to disk.
    """
    actual: Form = natural_form(plan) if form == "auto" else form
    if out_of_core:
        if actual != "plain":
            raise PlanError(f"out_of_core writes the plain form, and this plan needs the {actual} one: leave it out")
        _ = model.folder  # refuses what is no local folder
    findings = {
        "form": actual,
        "effect": plan.effect,
        "sublayers_removed": plan.removed,
        "masked": plan.masked,
        "dynamic": not plan.is_static,
        "adapters": bool(plan.adapters),
    }
    return Exported(model=model, plan=plan, form=actual, out_of_core=out_of_core, findings=findings)
