"""Healing: train back what a plan cost, or train a model on."""

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
from lamella.train import Healed, ScheduleName

LENGTH = 256  # tokens of a chosen sample that are read
BATCH = 4  # blocks in a step, where the number of tokens says how long to train


@command("heal", verb="heal", on=("decoder", "masked tokens"), brief={"sequences": 8, "length": 16})
def heal(
    stack: Stack,
    train: Annotated[Text | ImageText, Settings(sequences=64, rows=64)],
    plan: Annotated[Plan | None, Argument()] = None,
    past: Annotated[Text | None, Settings(sequences=64)] = None,
    pool: InstructionPool | None = None,
    teacher: Stack | None = None,
    *,
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
    shard: bool = False,
    work: Work = Work(),
    seed: int = 0,
) -> Healed:
    """Train back what a plan cost, or train a model on.

    unified-skip tunes all but the embedding, first adds LoRA beside its routers, lora-drop trains its corrections
    alone, rd-prune trains everything and holds its masks. Every other plan, and a model without a plan, is trained by
    continual pre-training, to which replay belongs, and on images with text by distillation; schedule and lora serve
    distillation, too. Killed, the same command goes on from the last checkpoint with the same result. Several processes
    share the work under `accelerate launch -m lamella.cli heal`.

    InstructionExample: lamella heal smollm2 plan.json --past stdlib --steps 200 -o healed
    lamella heal small --teacher smollm2 --train general --lora 128 --lr 2e-3 --minutes 8 -o healed
    lamella heal smollm2 plan.json --pool alpaca.jsonl --keep 0.1 -o healed

    Args:
        stack: the model; it is not changed.
        train: what to train on, its calibration split: blocks of a text, or for a model that reads images rows of these
            with text, whose answers are learnt.
        plan: what the model runs under; the whole model when left out.
        past: text like that which the model was trained on before, to replay a share of.
        pool: instructions to train on in place of a text: those are chosen that show what the plan has damaged (paser),
            and ``selection.json`` says why.
        teacher: a model to learn from, such as the original of a checkpoint that was cut before. Fidelity is measured
            against it.
        steps: optimizer steps; the recipe's own number when left out.
        minutes: how long to train, in place of steps; where a teacher is learnt from.
        tokens: one pass over so many tokens of the text, in place of steps and sequences.
        lr: highest learning rate; the recipe's own when left out.
        batch: blocks in one step; the recipe's own when left out.
        schedule: cosine or linear (down to 0), constant, rewarm (warm up, decay to a tenth), infinite (also cool down,
            stay, then anneal), wsd (warm up, stay, anneal) or step (stay, then a tenth); the recipe's own when left
            out.
        loss: kd: the divergence from the teacher's output (the default with a teacher, and for images). kd+hidden:
            hidden states inside, too. ce: the text alone.
        replay: share of every batch that is replayed, such as 0.05; auto measures the shift.
        lora: train adapters of this rank; all parameters when left out.
        keep: share of the pool that is chosen.
        save_every: steps from one checkpoint to the next; the recipe's own when left out.
        tensorboard: a folder in which TensorBoard finds the curves while training runs (extra tensorboard).
        shard: split the model over the processes of accelerate launch, when it does not fit one device.
        work: where an interrupted run goes on from.
        seed: of all random draws.

    Returns:
        The trained model with its plan.

    Raises:
        MethodError: for options that the plan's own recipe does not have, or images where it takes none.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    plan = Plan(model=ModelReference.of(stack)) if plan is None else plan
    plan.check_fits(stack)
    context = reader_of(train, seed)
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
    if len({"steps", "minutes"} & options.keys()) + (tokens is not None) > 1:
        raise MethodError("steps, minutes and tokens all say how long to train: give one of them")
    if shard:
        options["shard"] = True
    if tokens is not None:
        if not isinstance(train, Text) or pool is not None:
            raise MethodError("tokens are those of a text: leave them out, and give steps")
        length = train.tokens.shape[1]
        options["batch"] = batch or BATCH
        options["steps"] = max(1, tokens // (options["batch"] * length))
        train = train.cut(options["steps"] * options["batch"], length)
    shows = isinstance(train, ImageText) and own_recipe(plan) is None
    loss = "kd" if loss is None and (teacher is not None or shows) else loss
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


def reader_of(data: Text | ImageText, seed: int) -> InputContext:
    """What reads for the model that some data were opened for."""
    if isinstance(data, Text):
        return data.context
    processing: Processing = data.processing
    return InputContext(lambda: processing.tokenizer, seed, processing_opener=lambda: processing)
