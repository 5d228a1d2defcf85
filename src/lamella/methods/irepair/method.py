"""IRepair: at every step, repair only the layer that is most responsible for what a model shall not write.

Imtiaz et al., "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models",
arXiv 2502.07072.

    slice     s_l = | grad_l L_bad |              how hard the loss on bad continuations pulls at layer l
              l*  = argmax s_l                    one layer, chosen anew at every step
    repair    L   = beta NLL(good) + gamma mean KL( p_0 || p )     p_0 the original, on text in general
    update    layer l* alone: its gradient clipped, one step of RMSprop; every other tensor stays as it is

The gradient of L_bad is a score and never a direction: descending it would make bad text likelier. Which layer is the
strongest moves while the model is repaired, so a layer that is chosen once (``fixed``) can stop helping.

A step costs a full backward for the slice, and a second one from the head down to l*: repairing one layer at a time
saves weights from being moved, not time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Literal

import torch

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.irepair.judge import judged, pattern, profile
from lamella.methods.irepair.pairs import Pairs, Triple
from lamella.methods.irepair.recipe import BASELINES, PAPERS, TRAINING, RepairSettings, repair
from lamella.methods.irepair.slices import Choices
from lamella.methods.irepair.utility import Utility
from lamella.registry import method
from lamella.results import Edit
from lamella.signature import Named
from lamella.stack import Stack
from lamella.train import TrainConfig, TrainingLog, pairs

TESTED = 50  # pairs that nothing is trained on, at most
NAMES = {"score": "loss on bad"}  # what the trainer calls otherwise


@method(
    "irepair",
    paper="2502.07072",
    purpose="repair",
    verb="repair",
    brief={"steps": 3, "warmup": 1, "lr": 1e-3, "validation": 0},
)
def irepair(
    stack: Stack,
    rows: Annotated[Pairs, Named("pairs")],
    utility: Utility,
    *,
    variant: Annotated[Literal["irepair", "dapt", "dapt-kl", "dpo"], Named("method")] = "irepair",
    match: str | None = None,
    settings: RepairSettings = PAPERS,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Edit:
    """Train a bad habit away, at each step only in the layer that is most responsible for it.

    At every step the loss on bad continuations says which layer to blame; that layer alone takes a step towards the
    good ones, held to the original on other text. Most tensors stay as they are to the bit. A fifth of the pairs, 50 at
    most, is kept to measure the habit on. Give some hundreds of pairs, best with continuations in the model's own
    style. Killed, the same command goes on from the last checkpoint with the same result.

    The folder gets the checkpoint, plan.json (applied to the original it gives the same, dropped it is undone),
    trace.json with the layer of each step, evidence.json and report.html.

    Example: lamella repair smollm2 --bad bad.jsonl --good good.jsonl --match "As an AI" --chat -o repaired
    lamella repair gpt2 --pairs toxic.jsonl --method dpo -o with-dpo

    Args:
        stack: the opened model; it is not changed, and is the reference of the KL.
        rows: prompts, each with what the model shall not write and what it shall write instead.
        utility: text whose distribution is to stay. It must be like what the model was trained on.
        variant: irepair; or to compare with dapt (good text, all weights), dapt-kl (with the same leash), dpo.
        match: a regular expression that finds the habit: it is counted before and after, and own texts that it is found
            in are not held to.
        settings: how the layer is chosen, and what is trained for.
        config: of the training, with RMSprop; a batch is of pairs, and of as many utility texts.
        work: where an interrupted run goes on from, and for the tensors.

    Returns:
        A plan that replaces the tensors of the layers that were touched, and says which step chose which.

    Raises:
        MethodError: for options that contradict each other, or pairs that do not fit together.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    settings, habit = _chosen(variant, settings), pattern(match)
    trained, kept = _split(rows.triples, config.seed)
    wanted = pairs([(prompt, right) for prompt, _, right in trained], loss_on="all")
    unwanted = pairs([(prompt, wrong) for prompt, wrong, _ in trained], loss_on="all")
    seen = (config.steps or len(trained)) * config.batch + settings.validation
    leash = utility.samples(stack, min(len(trained), seen), habit, config.seed)
    here = Work(work.directory())  # one folder, also where nothing is kept
    plan = repair(stack, wanted, unwanted, utility=leash, settings=settings, config=config, work=here)
    log = TrainingLog.read(here.directory("training") / "log.json")
    trace = Choices.read(here.directory() / "trace.json")
    edit = Edit(stack=stack, plan=plan)
    edit.files["trace.json"] = json.dumps(asdict(trace)) + "\n"
    texts = {"bad": unwanted, "good": wanted, "utility": leash}
    measured = plan.provenance["measured"]
    edit.findings |= {
        "variant": variant,
        "match": match,
        "settings": dict(log.settings),
        "measured": measured,
        "share": measured["parameters"] / sum(each.numel() for each in stack.model.parameters()),
        "counts": {"trained": len(trained), "judged": len(kept)},
        "trace": asdict(trace),
        "profile": profile(stack, texts, config.batch),
        "curve": [
            {"step": point.step, "loss": point.loss, **{NAMES.get(name, name): v for name, v in point.parts.items()}}
            for point in log.train
        ],
        "held_out": [{"step": point.step, "loss": point.loss, **point.parts} for point in log.held_out],
        **judged({"before": stack.model, "after": edit.view}, kept, rows.tokenizer, habit),
    }
    return edit


def _chosen(variant: str, settings: RepairSettings) -> RepairSettings:
    """The settings that carry a variant out."""
    wanted = BASELINES.get(variant, {})
    clash = sorted(name for name in wanted if getattr(settings, name) != getattr(PAPERS, name))
    if clash:
        raise MethodError(f"{variant} sets {clash[0]} itself, to {wanted[clash[0]]}: leave {clash[0]} out")
    return replace(settings, **wanted)


def _split(rows: list[Triple], seed: int) -> tuple[list[Triple], list[Triple]]:
    """What is trained on, and what is not."""
    count = min(TESTED, len(rows) // 5)
    if count == 0:
        raise MethodError(f"{len(rows)} pairs: give 5 or more, since a fifth of them is kept to measure on")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return [rows[n] for n in order[count:]], [rows[n] for n in order[:count]]
