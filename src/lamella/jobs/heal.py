"""Healing: train back what a plan cost, and say what that brought."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamella.data import ImageText, Reader, load_text, windows
from lamella.errors import MethodError
from lamella.evaluate import FidelityTest
from lamella.evaluate.fidelity import judged
from lamella.files import Work, check_free, discard
from lamella.jobs.checks import check_input, check_source
from lamella.jobs.held_out import held_out, reader_for
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export, natural_form
from lamella.processes import is_first
from lamella.provenance import environment
from lamella.registry import Method, commands, get_method, methods
from lamella.report import render_healing
from lamella.runtime import apply
from lamella.signature import kind_of
from lamella.stack import Stack
from lamella.train import Healed, Sample, TrainConfig, blocks, check_vocabulary, distil
from lamella.zoo import open_model

GENERAL = "continual-pretrain"  # heals what no method has a recipe of its own for
LOSSES = ("ce", "kd", "kd+hidden")
DISTILLATION = "distillation"
FOREIGN = {  # options that a recipe does not have
    GENERAL: ("vocabulary", "minutes"),
    DISTILLATION: ("replay", "replay_text"),
}
PLAIN_TRAINING = ("schedule", "replay", "replay_text", "lora", "vocabulary", "minutes")  # what own recipes do not have
SHARDED = (GENERAL, DISTILLATION)  # recipes whose model can be split over processes


@dataclass(frozen=True)
class Material:
    """What a model is trained back on.

    Attributes:
        text: what to train on, its calibration split; recipes of a method's own cut prompts of many lengths from it.
            For a model that reads images also rows of these with text, whose answers are learnt.
        replay_text: a sample of what the model was trained on before, to replay (continual pre-training only).
        select: a method that chooses what to train on by what the plan has damaged, such as ``paser``. The text is then
            a ``.jsonl`` file of instructions (``instruction``, ``output``, and ``input`` where there is one), and
            ``selection.json`` says what was chosen and why.
        keep: the share of them that is chosen.
        sequences: how many blocks of the text, or rows.
        length: tokens in each; of chosen samples, the longest.
    """

    text: str = "pydoc"
    replay_text: str | None = None
    select: str | None = None
    keep: float = 0.2
    sequences: int = 64
    length: int = 256


PYDOC = Material()


class TextAlone(MethodError):
    """Images with text, for a recipe that trains on text alone."""


def heal(
    model: Any,
    plan: Plan | None,
    out: str | Path,
    *,
    material: Material = PYDOC,
    test: str = "stdlib",
    teacher: Any = None,
    loss: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a model under a plan, and export the result.

    Under ``accelerate launch`` every process does this, shares the work of each step, and the first one writes.

    The plan's method may have a recipe of its own. All other plans, and a model without plan, are trained on the text
    by continual pre-training: cross-entropy, on all parameters or on adapters, with replay of another text; or on
    images with text by distillation.

    Args:
        model: anything that :func:`lamella.open` takes.
        plan: a plan for it, or None.
        out: the folder to write: the checkpoint with its plan, ``log.json``, ``evidence.json`` and ``heal.html``.
            Beside it, ``.OUT.training`` lets an interrupted run go on.
        material: what to train on.
        test: what to measure on; by default text of another kind, so that the gain is not memorisation. Of images with
            text, other rows of what is trained on where a text is named.
        teacher: a model to learn from, anything that :func:`lamella.open` takes: the original of a checkpoint that was
            cut before. Fidelity is then measured against it.
        loss: ``kd``, the divergence from the teacher's output (from the model's own without a plan, when no teacher is
            named); ``kd+hidden``, states inside too; ``ce``, the text alone. Left out: the recipe of the plan's method,
            or ``kd`` where there is a teacher or images, else ``ce``.
        seed: of everything that is drawn.
        overwrite: replace ``out``.
        options: of the recipe: numbers of its :class:`lamella.train.TrainConfig`, such as ``steps`` and ``lr``, and
            options of its own, such as the ``replay`` and ``lora`` of continual pre-training. With ``shard`` the model
            is opened on the host, and measured there before and after.

    Returns:
        The evidence: fidelity before and after, and the training's curves.

    Raises:
        MethodError: for options that the plan's own recipe does not have, or images where it takes none.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    out = Path(out)
    loss = "kd" if teacher is not None and loss is None else loss
    options = options or {}
    check_free(out, overwrite)
    for each in (model, teacher):
        check_input((Stack,), each)
    for each in (material.text, material.replay_text, test):
        check_source(each)
    device = "cpu" if options.get("shard") else None
    stack = judged(open_model(model, device=device))
    plan = Plan(model=ModelReference.of(stack)) if plan is None else plan
    if loss is None and ImageText.fits(stack, material.text) and own_recipe(plan) is None:
        loss = "kd"
    _check_options(plan, options, material, loss)
    plan.check_fits(stack)
    reader = reader_for(stack, model, seed)
    tested, provenance = held_out(reader, stack, test, material.text)
    master = None if teacher is None else judged(open_model(teacher, device=device))
    if master is not None:
        check_vocabulary(stack, master)
    training = Training.prepared(stack, plan, reader, material, master, loss, options)
    fidelity = FidelityTest(master or stack, tested)
    before = fidelity.of(apply(stack, plan))
    work = out.parent / f".{out.name}.training"
    healed, told = training.run(work)
    selection = told.pop("selection", None)
    after = fidelity.of(apply(healed.stack, healed.plan))
    evidence = {
        "schema": "lamella.healing/1",
        "model": stack.name,
        **told,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "seed": seed,
        "environment": environment(),
    }
    evidence["data"]["test"] = provenance
    if not is_first():
        return evidence
    documents = {
        "evidence.json": json.dumps(evidence, indent=2) + "\n",
        "heal.html": render_healing(evidence, selection),
    }
    if selection is not None:
        documents["selection.json"] = json.dumps(selection, indent=2) + "\n"
    export(
        healed.stack,
        healed.plan,
        out,
        form=natural_form(healed.plan, healed.stack),
        overwrite=overwrite,
        tokenizer=reader.processing.processor,
        files=documents,
    )
    discard(work, out)
    return evidence


def train_back(
    stack: Stack,
    plan: Plan,
    reader: Reader,
    work: Path,
    *,
    material: Material = PYDOC,
    teacher: Stack | None = None,
    loss: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Healed, dict[str, Any]]:
    """Train a model under a plan, by the recipe of the plan's method or by continual pre-training.

    Args:
        stack: the model; it is not changed.
        reader: what reads for it; its seed is that of all that is drawn.
        work: the folder of the training's checkpoints, with which an interrupted run goes on.
        material, teacher, loss, options: see :func:`heal`.

    Returns:
        What came out, with a plan that is bound to it, and what evidence says of the training, with the report of the
        selection where there was one.
    """
    return Training.prepared(stack, plan, reader, material, teacher, loss, options).run(work)


@dataclass(frozen=True)
class Training:
    """A training whose texts are read and whose options are checked, so that nothing but the training can fail.

    Attributes:
        recipe: the method that trains, or distillation.
        inputs: what it is given.
        evidence: what there is to say before it has run.
        selection: the report of what chose the samples, where they were chosen.
        seed: of what is drawn.
    """

    stack: Stack
    recipe: Callable[..., Healed]
    inputs: dict[str, Any]
    evidence: dict[str, Any]
    selection: dict[str, Any] | None
    seed: int

    @classmethod
    def prepared(
        cls,
        stack: Stack,
        plan: Plan,
        reader: Reader,
        material: Material,
        teacher: Stack | None,
        loss: str | None,
        options: dict[str, Any] | None,
    ) -> Training:
        """Read what is trained on; see :func:`train_back`."""
        given = _check_options(plan, options or {}, material, loss)
        slug, recipe = _recipe(plan, loss)
        config = _config(recipe, given, reader.seed)
        if teacher is not None and loss != "ce":
            given["teacher"] = teacher
        selection = None
        samples: Sequence[Sample] | ImageText
        if material.select is not None:
            samples, data, selection = _selected(material, stack, plan, reader)
        elif ImageText.fits(stack, material.text):
            samples = _shown(recipe, material, reader)
            data = samples.describe()
        else:
            samples, data = _cut(material, reader, slug in (GENERAL, DISTILLATION))
        evidence: dict[str, Any] = {"method": slug, "data": {"training": data}}
        if material.replay_text is not None:
            to_replay = load_text(material.replay_text, "calibration")
            old = windows(reader.tokenizer, to_replay, material.sequences, material.length, reader.seed)
            evidence["data"]["replay"] = to_replay.provenance(old)
            given["past"] = blocks(old, loss_on="all")
        if slug == GENERAL:
            given["held_out"] = _held_out(material, reader)
        inputs = {"plan": plan, "samples": samples, "config": config, **given}
        return cls(stack, recipe, inputs, evidence, selection, reader.seed)

    def run(self, work: Path) -> tuple[Healed, dict[str, Any]]:
        """Train; see :func:`train_back`."""
        torch.manual_seed(self.seed)
        kept: dict[str, Any] = {"work": Work(work)} if isinstance(self.recipe, Method) else {"out": work / "run"}
        healed: Healed = self.recipe(self.stack, **kept, **self.inputs)
        log = healed.log
        evidence = self.evidence | {
            "settings": dict(log.settings),
            "curve": [{"step": point.step, "loss": point.loss, **point.parts} for point in log.train],
            "held_out": [{"step": point.step, **point.parts} for point in log.held_out],
        }
        return healed, evidence | ({} if self.selection is None else {"selection": self.selection})


def _shown(recipe: Callable[..., Healed], material: Material, reader: Reader) -> ImageText:
    """Rows of images with text, where the recipe takes such rows."""
    if isinstance(recipe, Method) and "ImageText" not in recipe.inputs["samples"].split(" | "):
        raise TextAlone(f"{recipe.slug} trains on text alone, and {material.text} holds images")
    return ImageText.open(material.text, reader, rows=material.sequences)


def _cut(material: Material, reader: Reader, whole: bool) -> tuple[list[Sample], dict[str, Any]]:
    """Blocks of the text, with loss on the ``whole`` of them or after prompts of many lengths, and their provenance."""
    text, length = load_text(material.text, "calibration"), material.length
    tokens = windows(reader.tokenizer, text, material.sequences, length, reader.seed)
    prompts = (length // 8, length // 2)
    return blocks(tokens, prompts, seed=reader.seed, loss_on="all" if whole else "response"), text.provenance(tokens)


def _selected(
    material: Material, stack: Stack, plan: Plan, reader: Reader
) -> tuple[list[Sample], dict[str, Any], dict[str, Any]]:
    """The samples of a pool of instructions that a method chooses, what evidence says of them, and its report."""
    select, pool = material.select or "", Path(material.text)
    choose = get_method(select)
    if choose.result != "Selection":
        raise MethodError(f"{select} chooses no samples; `lamella methods` says what a method returns")
    samples_of = kind_of(choose.signature.inputs["samples"])
    options = {"budget": material.keep, "max_length": material.length}
    chosen = choose(stack, samples_of.open(pool, reader), plan, **options, seed=reader.seed)
    samples, report = chosen.samples(reader.tokenizer, material.length), chosen.findings
    data = {"data": material.text, "samples": len(samples), "of": report["pool"], "by": select}
    return samples, data | {"sha256": hashlib.sha256(pool.expanduser().read_bytes()).hexdigest()}, report


def _held_out(material: Material, reader: Reader) -> dict[str, list[Sample]]:
    """Blocks of both texts that nothing trains on."""
    count = max(1, min(8, material.sequences // 8))
    texts = {"new": material.text if material.select is None else None, "old": material.replay_text}
    return {
        name: blocks(
            windows(reader.tokenizer, load_text(text, "test"), count, material.length, reader.seed), loss_on="all"
        )
        for name, text in texts.items()
        if text is not None
    }


def _check_options(plan: Plan | None, options: dict[str, Any], material: Material, loss: str | None) -> dict[str, Any]:
    """A copy of the options, when they are ones that the plan's recipe takes."""
    slug, _ = _recipe(plan, loss)
    asked = [*options, *(["replay_text"] if material.replay_text else [])]
    foreign = [name for name in FOREIGN.get(slug, PLAIN_TRAINING) if name in asked]
    if foreign:
        raise MethodError(f"{slug} heals by its own recipe, which has no option '{foreign[0]}': leave it out")
    if options.get("shard") and slug not in SHARDED:
        raise MethodError(f"{slug} heals by its own recipe, which cannot be split over processes: leave shard out")
    if "replay" in options and material.replay_text is None:
        raise MethodError("replay needs a text to replay: name one that is like what the model was trained on")
    return dict(options)


def _recipe(plan: Plan | None, loss: str | None) -> tuple[str, Callable[..., Healed]]:
    """The method whose recipe heals a plan, or the one that a loss asks for, and the recipe."""
    own = None if plan is None else own_recipe(plan)
    if loss is None and own is not None:
        return own
    if loss is not None and loss not in LOSSES:
        raise MethodError(f"loss '{loss}': choose one of {', '.join(LOSSES)}")
    if loss is not None and plan is not None and (plan.policy is not None or plan.weights):
        raise MethodError(
            f"{_decided_by(plan)} trains what it decides or holds by a loss of its own: leave the loss and teacher out"
        )
    if loss is not None and loss != "ce":
        return DISTILLATION, partial(distil, intermediate=loss == "kd+hidden")
    general = recipe_of(GENERAL)
    assert general is not None
    return GENERAL, general


def _config(recipe: Callable[..., Healed], given: dict[str, Any], seed: int) -> TrainConfig:
    """The recipe's own training, with what was given of it, which is taken out of the options."""
    default = inspect.signature(recipe.call if isinstance(recipe, Method) else recipe).parameters["config"].default
    names = {each.name for each in fields(TrainConfig)} & given.keys()
    return replace(default, seed=seed, **{name: given.pop(name) for name in names})


def own_recipe(plan: Plan) -> tuple[str, Method] | None:
    """The method that heals a plan by a recipe of its own, and the recipe, if there is one."""
    slug = _decided_by(plan)
    recipe = recipe_of(slug) if slug in methods() else None
    return None if recipe is None else (slug, recipe)


def _decided_by(plan: Plan) -> str:
    """The method whose policy a plan runs, or that made it."""
    return plan.policy.name if plan.policy else str(plan.provenance.get("method", ""))


def recipe_of(slug: str) -> Method | None:
    """The command of a method that trains back what a plan cost: what takes a plan and returns a healed model."""
    known = commands(slug).values()
    return next(
        (
            each
            for each in known
            if each.result == "Healed" and any("Plan" in kind.split(" | ") for kind in each.inputs.values())
        ),
        None,
    )
