"""Training of a model under a plan: by the recipe of the plan's method, distillation, or continual pre-training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch

from lamella.data import ImageText, InputContext, Text, load_text, windows
from lamella.errors import MethodError
from lamella.files import Work
from lamella.plan import Plan
from lamella.registry import Method, commands, methods
from lamella.stack import Stack
from lamella.train import Healed, Sample, TrainConfig, blocks, check_vocabulary, distil

Loss = Literal["kd", "kd+hidden", "ce"]

GENERAL = "continual-pretrain"  # heals plans whose method has no recipe
DISTILLATION = "distillation"
FOREIGN = {  # options that a recipe does not have
    GENERAL: ("vocabulary", "minutes"),
    DISTILLATION: ("replay", "past"),
}
PLAIN_TRAINING = (
    "schedule",
    "replay",
    "past",
    "lora",
    "vocabulary",
    "minutes",
)  # options that recipes of methods do not have
SHARDED = (GENERAL, DISTILLATION)  # recipes whose model can be sharded over processes
BLOCKS = 1000  # maximum number of blocks of a text; longer runs repeat them


class TextOnly(MethodError):
    """Images with text, for a recipe that trains on text only."""


@dataclass(frozen=True)
class Training:
    """A training run whose data are loaded and whose options are checked.

    Attributes:
        stack: the model.
        slug: slug of the method that trains, or ``distillation``.
        recipe: the training function.
        inputs: its arguments.
        data: the training data, by role.
        seed: random seed.
    """

    stack: Stack
    slug: str
    recipe: Callable[..., Healed]
    inputs: dict[str, Any]
    data: dict[str, Any]
    seed: int

    @classmethod
    def prepared(
        cls,
        stack: Stack,
        plan: Plan,
        context: InputContext,
        train: Text | ImageText | Sequence[Sample],
        *,
        past: Text | None = None,
        teacher: Stack | None = None,
        loss: Loss | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Training:
        """Choose the recipe and load its data.

        Args:
            stack: the model; it is not changed.
            plan: the plan that it runs under.
            context: the context of the data, with the random seed.
            train: blocks of a text, rows of images with text, or samples.
            past: a sample of the original training data, for replay (continual pre-training only).
            teacher: a model to distil from, if it is not the original.
            loss: ``kd``, KL divergence from the teacher's output; ``kd+hidden``, also matching hidden states; ``ce``,
                cross-entropy on the text. None: the recipe of the plan's method, or continual pre-training.
            options: options of the recipe: fields of its :class:`lamella.train.TrainConfig`, and options of its own.

        Raises:
            MethodError: for options that the recipe does not have, or images if it takes none.
            TrainingError: for a teacher with another vocabulary.
        """
        slug, recipe = _recipe(plan, loss)
        given = _check_options(slug, options or {}, past)
        config = _config(recipe, given, context.seed)
        if teacher is not None:
            check_vocabulary(stack, teacher)
            if loss != "ce":
                given["teacher"] = teacher
        samples, description = _samples(recipe, train, context, whole=slug in (GENERAL, DISTILLATION))
        data = {"training": description}
        if past is not None:
            data["replay"] = past.describe()
            given["past"] = blocks(past.tokens, loss_on="all")
        if slug == GENERAL:
            given["held_out"] = _held_out(train, past, context)
        role = "train" if isinstance(recipe, Method) else "samples"
        inputs = {"plan": plan, role: samples, "config": config, **given}
        return cls(stack, slug, recipe, inputs, data, context.seed)

    def run(self, work: Work) -> tuple[Healed, dict[str, Any]]:
        """Train.

        Args:
            work: the folder of the checkpoints, from which an interrupted run resumes.

        Returns:
            The trained model, with a plan that is bound to it, and the record of the training for evidence.
        """
        torch.manual_seed(self.seed)
        folder: dict[str, Any] = {"work": work} if isinstance(self.recipe, Method) else {"out": work.directory("run")}
        healed: Healed = self.recipe(self.stack, **folder, **self.inputs)
        body = healed.body()
        return healed, {
            "method": self.slug,
            "data": self.data,
            **{name: body[name] for name in ("settings", "curve", "held_out")},
        }


def _samples(
    recipe: Callable[..., Healed], train: Any, context: InputContext, whole: bool
) -> tuple[Sequence[Sample] | ImageText, dict[str, Any]]:
    """Return the data of a recipe, and their description for evidence.

    Args:
        recipe: the training function.
        train: the training data.
        context: the context of the data.
        whole: whether all tokens of a text carry loss, not only those after prompts of various lengths.
    """
    if isinstance(train, ImageText):
        if isinstance(recipe, Method) and "ImageText" not in recipe.inputs["train"].split(" | "):
            raise TextOnly(f"{recipe.slug} trains on text only, but images were given")
        return train, train.describe()
    if isinstance(train, Text):
        length = train.tokens.shape[1]
        prompts = (length // 8, length // 2)
        loss_on: Any = "all" if whole else "response"
        return blocks(train.tokens, prompts, seed=context.seed, loss_on=loss_on), train.describe()
    return train, {"samples": len(train)}


def _held_out(train: Any, past: Text | None, context: InputContext) -> dict[str, list[Sample]]:
    """Return held-out blocks of both texts."""
    found = {}
    for name, text in (("new", train), ("old", past)):
        if isinstance(text, Text):
            count, length = max(1, min(8, train.tokens.shape[0] // 8)), text.tokens.shape[1]
            tokens = windows(context.tokenizer, load_text(text.source.name, "test"), count, length, context.seed)
            found[name] = blocks(tokens, loss_on="all")
    return found


def _check_options(slug: str, options: Mapping[str, Any], past: Text | None) -> dict[str, Any]:
    """Return a copy of the options, if the recipe takes them."""
    names = [*options, *([] if past is None else ["past"])]
    foreign = [name for name in FOREIGN.get(slug, PLAIN_TRAINING) if name in names]
    if foreign:
        raise MethodError(f"{slug} heals by its own recipe, which has no option '{foreign[0]}': leave it out")
    if options.get("shard") and slug not in SHARDED:
        raise MethodError(f"{slug} heals by its own recipe, which cannot be sharded over processes: leave shard out")
    if "replay" in options and past is None:
        raise MethodError("replay needs a text to replay: give past, a text like the original training data")
    return dict(options)


def available(tokenizer: Any, text: str, length: int, least: int) -> int:
    """Return the number of training blocks of a text, limited to ``BLOCKS``.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        length: tokens in a block.
        least: minimum number of blocks.

    Raises:
        CalibrationError: if the text is missing, or has fewer than ``least``.
    """
    source = load_text(text, "calibration")
    parts = (tokenizer(each, add_special_tokens=False, verbose=False) for each in source.apart(tokenizer))
    count = min(BLOCKS, sum(len(each["input_ids"]) // length for each in parts))
    if count < least:
        windows(tokenizer, source, least, length)  # raises the error
    return count


def _recipe(plan: Plan, loss: Loss | None) -> tuple[str, Callable[..., Healed]]:
    """Return the method whose recipe heals a plan, or the one for the loss, and the recipe."""
    own = own_recipe(plan)
    if loss is None and own is not None:
        return own
    if loss is not None and (plan.policy is not None or plan.weights):
        raise MethodError(
            f"{_decided_by(plan)} trains its policy or weights by a loss of its own: leave loss and teacher out"
        )
    if loss is not None and loss != "ce":
        return DISTILLATION, partial(distil, intermediate=loss == "kd+hidden")
    general = recipe_of(GENERAL)
    assert general is not None
    return GENERAL, general


def _config(recipe: Callable[..., Healed], given: dict[str, Any], seed: int) -> TrainConfig:
    """Return the training configuration of the recipe, with given values, which are removed from the options."""
    default = inspect.signature(recipe.call if isinstance(recipe, Method) else recipe).parameters["config"].default
    names = {each.name for each in fields(TrainConfig)} & given.keys()
    return replace(default, seed=seed, **{name: given.pop(name) for name in names})


def own_recipe(plan: Plan) -> tuple[str, Method] | None:
    """Return the method that heals a plan by its own recipe, and the recipe, if there is one.

    Args:
        plan: the plan.
    """
    slug = _decided_by(plan)
    recipe = recipe_of(slug) if slug in methods() else None
    return None if recipe is None else (slug, recipe)


def _decided_by(plan: Plan) -> str:
    """Return the method whose policy a plan runs, or that made it."""
    return plan.policy.name if plan.policy else str(plan.provenance.get("method", ""))


def recipe_of(slug: str) -> Method | None:
    """Return the command of a method that heals its plans: one that takes a plan and returns a healed model.

    Args:
        slug: the method.
    """
    known = commands(slug).values()
    return next(
        (
            each
            for each in known
            if each.result == "Healed" and any("Plan" in kind.split(" | ") for kind in each.inputs.values())
        ),
        None,
    )
