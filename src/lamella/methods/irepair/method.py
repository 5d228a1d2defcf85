"""IRepair: at every step, train only the layer that is most responsible for unwanted text.

Imtiaz et al., "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models",
arXiv 2502.07072.

    slice     s_l = | grad_l L_bad |              sensitivity of layer l to the loss on bad continuations
              l*  = argmax s_l                    one layer, chosen again at every step
    repair    L   = beta NLL(good) + gamma mean KL( p_0 || p )     p_0 the original, on general text
    update    layer l* alone: its gradient clipped, one step of RMSprop; every other tensor is unchanged

The gradient of L_bad is a score and never a direction: descending it would make bad text more likely. The most
sensitive layer changes while the model is repaired, so a layer that is chosen once (``fixed``) can stop helping.

A step costs a full backward pass for the slice, and a second one from the head down to l*: training one layer at a time
keeps weights unchanged, but does not save time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Literal

import torch

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.irepair.judge import evaluate_repair, pattern, profile
from lamella.methods.irepair.pairs import Pairs, Triple
from lamella.methods.irepair.recipe import BASELINES, PAPERS, TRAINING, RepairSettings, repair
from lamella.methods.irepair.slices import Choices
from lamella.methods.irepair.utility import Utility
from lamella.registry import method
from lamella.results import Edit
from lamella.signature import Named
from lamella.stack import Stack
from lamella.train import TrainConfig, TrainingLog, pairs

TESTED = 50  # maximum number of test pairs
NAMES = {"score": "loss on bad"}  # names of the trainer's log entries in the findings


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

    At every step, the gradient of the loss on bad continuations selects the responsible layer; that layer alone is
    trained on the good ones, while a KL term keeps the model close to the original on other text. Most tensors stay
    bitwise equal. A fifth of the pairs, 50 at most, is held out to measure the habit. Give some hundreds of pairs, best
    with continuations in the model's own style. An interrupted run resumes from the last checkpoint with the same
    result.

    The folder gets the checkpoint, plan.json (applied to the original it gives the same model; removing it undoes the
    repair), trace.json with the layer of each step, evidence.json and report.html.

    Example: lamella repair smollm2 --bad bad.jsonl --good good.jsonl --match "As an AI" --chat -o repaired
    lamella repair gpt2 --pairs toxic.jsonl --method dpo -o with-dpo

    Args:
        stack: the opened model; it is not changed, and is the reference of the KL.
        rows: prompts, each with an unwanted and a wanted continuation.
        utility: text on which the model's distribution is preserved. It must be similar to the model's training data.
        variant: irepair; or a baseline: dapt (good text, all weights), dapt-kl (with the same KL term), dpo.
        match: a regular expression that detects the habit: it is counted before and after, and the model's own texts
            that contain it are not used as utility text.
        settings: selection of the layer, and the objective.
        config: training settings, with RMSprop; a batch contains pairs, and as many utility texts.
        work: folder for the tensors, from which an interrupted run resumes.

    Returns:
        A plan that replaces the tensors of the trained layers, with the layer of each step.

    Raises:
        MethodError: for contradictory options, or pairs that do not fit together.
        TrainingError: when training fails; the last good checkpoint remains.
    """
    settings, habit = _chosen(variant, settings), pattern(match)
    trained, kept = _split(rows.triples, config.seed)
    wanted = pairs([(prompt, right) for prompt, _, right in trained], loss_on="all")
    unwanted = pairs([(prompt, wrong) for prompt, wrong, _ in trained], loss_on="all")
    needed = (config.steps or len(trained)) * config.batch + settings.validation
    utility_samples = utility.samples(stack, min(len(trained), needed), habit, config.seed)
    folder = Work(work.directory())  # a single folder, even if nothing is kept
    plan = repair(stack, wanted, unwanted, utility=utility_samples, settings=settings, config=config, work=folder)
    log = TrainingLog.read(folder.directory("training") / "log.json")
    trace = Choices.read(folder.directory() / "trace.json")
    edit = Edit(stack=stack, plan=plan)
    edit.files["trace.json"] = json.dumps(asdict(trace)) + "\n"
    texts = {"bad": unwanted, "good": wanted, "utility": utility_samples}
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
        **evaluate_repair({"before": stack.model, "after": edit.view}, kept, rows.tokenizer, habit),
    }
    return edit


def _chosen(variant: str, settings: RepairSettings) -> RepairSettings:
    """The settings of a variant."""
    wanted = BASELINES.get(variant, {})
    clash = sorted(name for name in wanted if getattr(settings, name) != getattr(PAPERS, name))
    if clash:
        raise MethodError(f"{variant} sets {clash[0]} to {wanted[clash[0]]} itself: omit {clash[0]}")
    return replace(settings, **wanted)


def _split(rows: list[Triple], seed: int) -> tuple[list[Triple], list[Triple]]:
    """Training pairs and test pairs."""
    count = min(TESTED, len(rows) // 5)
    if count == 0:
        raise MethodError(f"{len(rows)} pairs: give 5 or more, since a fifth of them is held out for the test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return [rows[n] for n in order[count:]], [rows[n] for n in order[:count]]
