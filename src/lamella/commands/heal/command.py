"""Healing: training that recovers what a plan has cost, or continued training of a model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from lamella.commands.heal.training import Loss, Training, own_recipe
from lamella.data import ImageText, InputContext, Processing, Text
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.paser.pool import InstructionPool
from lamella.plan import ModelReference, Plan
from lamella.registry import command, get_method
from lamella.signature import Argument, Settings
from lamella.stack import Stack
from lamella.train import Healed, ScheduleName, refit

LENGTH = 256  # maximum tokens of a selected sample
BATCH = 4  # blocks in a step, if the duration is given in tokens


@command("heal", verb="heal", on=("decoder", "masked tokens"), brief={"sequences": 8, "length": 16})
def heal(
    stack: Stack,
    train: Annotated[Text | ImageText, Settings(sequences=64, rows=64)],
    plan: Annotated[Plan | None, Argument()] = None,
    past: Annotated[Text | None, Settings(sequences=64)] = None,
    pool: InstructionPool | None = None,
    teacher: Stack | None = None,
    *,
    way: Literal["auto", "refit"] = "auto",
    steps: Annotated[int, Ge(1)] | None = None,
    minutes: Annotated[float, Gt(0)] | None = None,
    tokens: Annotated[int, Ge(1)] | None = None,
    lr: Annotated[float, Gt(0)] | None = None,
    batch: Annotated[int, Ge(1)] | None = None,
    schedule: ScheduleName | None = None,
    loss: Loss | None = None,
    replay: Literal["auto"] | Annotated[float, Gt(0), Lt(1)] | None = None,
    lora: Annotated[int, Ge(1)] | None = None,
    keep: Annotated[float, Gt(0), Le(1)] = 0.2,
    save_every: Annotated[int, Ge(1)] | None = None,
    tensorboard: str | None = None,
    gradient_checkpointing: bool = False,
    shard: bool = False,
    work: Work = Work(),
    seed: int = 0,
) -> Healed:
    """Train a model to recover what a plan has cost, or continue its training.

    unified-skip tunes everything but the embedding, first trains LoRA adapters and its routers, lora-drop trains its
    corrections only, rd-prune trains everything and keeps its masks. Any other plan, and a model without a plan, is
    trained by continual pre-training, optionally with replay, and on images with text by distillation; schedule and
    lora apply to distillation, too. After a kill, the same command resumes from the last checkpoint with the same
    result. Several processes share the work under `accelerate launch -m lamella.cli heal`.

    Example: lamella heal smollm2 plan.json --past stdlib --steps 200 -o healed
    lamella heal small --teacher smollm2 --train general --lora 128 --lr 2e-3 --minutes 8 -o healed
    lamella heal smollm2 plan.json --pool alpaca.jsonl --keep 0.1 -o healed
    lamella heal smollm2 plan.json --way refit --train general --sequences 8 -o healed

    Args:
        stack: the model; it is not changed.
        train: training data, of its calibration split: blocks of a text, or for a model of images and text, rows of
            these, with loss on the answers.
        plan: the plan that the model runs under; the unchanged model if omitted.
        past: text like that of the original pre-training, of which a share is replayed.
        pool: instructions to train on instead of a text: those that show what the plan has damaged are selected
            (paser), and ``selection.json`` records why.
        teacher: a model to distil from, such as the original of a checkpoint that was pruned before. Fidelity is
            measured against it.
        way: auto: training. refit: no training, but a correction of the linear layers in front of what the plan
            removes or narrows, by least squares on the training data; it takes seconds, and has no other option.
        steps: number of optimizer steps; defaults to that of the recipe.
        minutes: training time instead of steps, for distillation.
        tokens: train one epoch on this many tokens of the text, instead of steps and sequences.
        lr: peak learning rate; defaults to that of the recipe.
        batch: blocks in one step; defaults to that of the recipe.
        schedule: learning-rate schedule: cosine or linear (to 0), constant, rewarm (warm up, decay to a tenth),
            infinite (warm up, cool down, constant, anneal), wsd (warm up, constant, anneal) or step (constant, then a
            tenth); defaults to that of the recipe.
        loss: kd: KL divergence from the teacher's output (the default with a teacher, and for images). kd+hidden: also
            match hidden states. ce: cross-entropy on the text only.
        replay: share of every batch that is replayed, such as 0.05; auto measures the distribution shift.
        lora: train LoRA adapters of this rank; all parameters if omitted.
        keep: share of the pool that is selected.
        save_every: steps between checkpoints; defaults to that of the recipe.
        tensorboard: folder for TensorBoard curves during training (extra tensorboard).
        gradient_checkpointing: keep only the inputs of the layers, and compute the layers again in the backward pass: a
            third more time for much less memory, with the same result.
        shard: shard the model over the processes of accelerate launch, if it does not fit one device.
        work: folder from which an interrupted run resumes.
        seed: random seed.

    Returns:
        The trained model with its plan.

    Raises:
        MethodError: for options that the plan's own recipe does not have, images if it takes none, or a plan or model
            that cannot be refitted.
        TrainingError: if training fails; the last good checkpoint is kept.
    """
    plan = Plan(model=ModelReference.of(stack)) if plan is None else plan
    plan.check_fits(stack)
    context = context_of(train, seed)
    named: dict[str, Any] = {
        "steps": steps,
        "minutes": minutes,
        "lr": lr,
        "batch": batch,
        "schedule": schedule,
        "replay": replay,
    }
    named |= {"lora": lora, "save_every": save_every, "tensorboard": tensorboard}
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if way == "refit":
        others = {
            "tokens": tokens,
            "loss": loss,
            "past": past,
            "pool": pool,
            "teacher": teacher,
            "gradient_checkpointing": gradient_checkpointing or None,
            "shard": shard or None,
        }
        given = [*options, *(name for name, value in others.items() if value is not None)]
        return _refitted(stack, plan, train, given)
    if len({"steps", "minutes"} & options.keys()) + (tokens is not None) > 1:
        raise MethodError("steps, minutes and tokens all determine the duration of training: give one of them")
    options |= {
        name: True for name, value in (("shard", shard), ("gradient_checkpointing", gradient_checkpointing)) if value
    }
    if tokens is not None:
        if not isinstance(train, Text) or pool is not None:
            raise MethodError("tokens count those of a text: give steps instead")
        length = train.tokens.shape[1]
        options["batch"] = batch or BATCH
        options["steps"] = max(1, tokens // (options["batch"] * length))
        train = train.cut(options["steps"] * options["batch"], length)
    has_images = isinstance(train, ImageText) and own_recipe(plan) is None
    loss = "kd" if loss is None and (teacher is not None or has_images) else loss
    material: Any = train
    chosen = None
    if pool is not None:
        length = train.tokens.shape[1] if isinstance(train, Text) else LENGTH
        chosen = get_method("paser")(stack, pool, plan, budget=keep, max_length=length, seed=seed)
        material = chosen.samples(context.tokenizer, length)
    training = Training.prepared(stack, plan, context, material, past=past, teacher=teacher, loss=loss, options=options)
    healed, _ = training.run(work)
    healed.reference, healed.data = teacher, training.data
    healed.findings["recipe"] = training.slug
    if pool is not None and chosen is not None:
        healed.data["training"] |= pool.describe() | {"chosen": len(material), "by": "paser"}
        healed.findings["selection"] = chosen.findings
        healed.files["selection.json"] = json.dumps(chosen.findings, indent=2) + "\n"
    return healed


def _refitted(stack: Stack, plan: Plan, train: Text | ImageText, options: list[str]) -> Healed:
    """Return the model whose linear layers are corrected in closed form.

    Args:
        stack: the model.
        plan: the plan.
        train: the data that the corrections are fitted to.
        options: names of the options of training that were given.

    Raises:
        MethodError: for a plan that changes nothing, or options of training.
    """
    if options:
        raise MethodError(f"refit does not train, so it has no option '{options[0]}': leave it out")
    if not any(plan.decision.values()):
        raise MethodError("refit corrects what a plan has removed: give a plan")
    healed = refit(stack, plan, train)
    healed.data = {"training": train.describe()}
    healed.findings["recipe"] = "refit"
    return healed


def context_of(data: Text | ImageText, seed: int) -> InputContext:
    """Return the context in which some data were opened.

    Args:
        data: the data.
        seed: random seed.
    """
    if isinstance(data, Text):
        return data.context
    processing: Processing = data.processing
    return InputContext(lambda: processing.tokenizer, seed, processing_opener=lambda: processing)
