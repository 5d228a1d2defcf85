"""LoRA recycling: whether to merge other people's adapters for a task, or to train one's own.

Liu et al., "The Appeal and Reality of Recycling LoRAs with Adaptive Merging", arXiv 2602.12323.

There is a model, a pool of LoRAs that others have trained for it, and about 100 examples of a target task. The paper
puts the known ways to merge into one frame and searches it for the best::

    pool --filter--> usable --select--> D_1 .. D_N, and D_0 = T, a LoRA trained on the same examples
    W^m + sum_i f(w_i^m) D_i^m          w fitted on the examples, per module, f = LeakyReLU, from w = 0
    keep w at the lowest held-out loss

and then asks what the gain is made of. In the wild it is better than the model alone, hardly better than T, and as
good with *random* weights in the place of the pool's: what helps is training a few more numbers. Only an adapter that
belongs to the task carries something over. So the merge never stands alone here, but beside:

    base                     the model as it is
    T                        a LoRA on the examples, with usual and with more regularisation
    T, answers shuffled      learns how answers look and nothing of what they say
    single, average          the best member alone; all of them without coefficients
    random weights           the same shapes, ranks, scales and spread, drawn anew
    T, coefficients only     the fit without a pool

Everything is chosen on held-out examples and judged on others (result.py has the verdict).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge

from lamella.data import Examples
from lamella.files import Work
from lamella.methods.lora_recycling.choosing import closeness
from lamella.methods.lora_recycling.controls import randomised
from lamella.methods.lora_recycling.merging import average
from lamella.methods.lora_recycling.pool import Members, Pool
from lamella.methods.lora_recycling.recipe import FITTING, Mixing, Target
from lamella.methods.lora_recycling.result import Recycled, Verdict
from lamella.methods.lora_recycling.trial import DECAY, DROPOUT, Splits, Trial
from lamella.plan.fingerprint import revision
from lamella.registry import method
from lamella.stack import Stack
from lamella.train import Adapter, TrainConfig, merge

Selection = Literal["evaluation", "random", "rank", "closeness", "clamp-pm", "macro", "clamp", "abs", "quasi-fim", "l2"]
How = Literal["adaptive", "lorahub", "pi-tuning"]

BASE, TARGET, REGULARISED, FORMAT = "base", "target LoRA", "target LoRA, regularised", "target LoRA, answers shuffled"
SINGLE, AVERAGE, POOL, RANDOM = "best single member", "uniform average", "pool", "random weights"
BOTH, BOTH_RANDOM, ONLY = "target + pool", "target + random weights", "target, coefficients only"


@method(
    "lora-recycling",
    paper="2602.12323",
    purpose="recycle",
    brief={"k": 2, "steps": 2, "batch": 4, "eval_every": 1, "save_every": 1, "target_steps": 2, "target_r": 2},
)
def lora_recycling(
    stack: Stack,
    pool: Pool,
    data: Examples,
    test: Examples | None = None,
    *,
    how: How = "adaptive",
    select: Selection = "evaluation",
    k: Annotated[int, Ge(1)] = 30,
    mixing: Mixing = Mixing(),  # noqa: B008, frozen
    target: Target = Target(),  # noqa: B008, frozen
    config: TrainConfig = FITTING,
    work: Work = Work(),
) -> Recycled:
    """Merge adapters of a pool for a task, and find out beside all controls whether that is worth it.

    Args:
        stack: the model that the adapters are for; it is not changed.
        pool: other people's adapters.
        data: about 100 examples of the target task: four fifths train, a fifth is chosen by; the same ones do both
            where there are fewer than 20.
        test: examples to judge by; a quarter of ``data`` when left out.
        how: coefficients are found: ``adaptive`` trains them; ``lorahub`` searches one for each adapter without
            gradients; ``pi-tuning`` trains the adapters too.
        select: which members are merged: the best by ``evaluation`` on the examples, ``random`` ones, those of the
            highest ``rank``, or those closest to the target LoRA by a score (``closeness``, ``clamp-pm``, ``macro``,
            ``clamp``, ``abs``, ``quasi-fim``, ``l2``).
        k: how many of them, N; the paper's tables have 5 to 30.
        mixing: how coefficients are made.
        target: the LoRA that is trained on the examples alone.
        config: of the fit of coefficients; its batch, schedule and seed are those of the target LoRA too.
        work: where an interrupted run goes on from, to the same result.

    Returns:
        The best merge as a plain adapter, with the table of all arms and the verdict.

    Raises:
        MethodError: for a pool without anything of use, or too few examples.
        TrainingError: when training cannot start or stay finite.
    """
    splits = Splits.of(data, test, config.seed)
    members = pool.members(stack)
    merged = {"select": select, "k": k, "norms": dict(members.norms)}
    trial = Trial(stack, splits, how, mixing, target, config, work, merged)

    # What there is without a pool.
    trial.add(BASE, None)
    own = trial.trained(TARGET)
    trial.trained(REGULARISED, dropout=DROPOUT, decay=DECAY)
    trial.trained(FORMAT, shuffle=True)
    trial.mixed(ONLY, [own])

    # The pool, without and with the target's own adapter, and the same with random weights.
    names = selected(members, trial, own, select, k)
    chosen = [of_model(each, stack) for each in members.take(names)]
    single = best_member(members, trial, names)
    trial.add(SINGLE, of_model(members.load(single), stack), of_pool=True)
    trial.add(AVERAGE, average(chosen), of_pool=True)
    trial.mixed(POOL, chosen, of_pool=True)
    trial.mixed(RANDOM, randomised(chosen, seed=config.seed))
    together = [own, *chosen]
    trial.mixed(BOTH, together, of_pool=True)
    trial.mixed(BOTH_RANDOM, randomised(together, keep=[0], seed=config.seed))

    verdict = Verdict.of(trial.arms)
    assert verdict.ours.adapter is not None
    return Recycled(
        stack=merge(stack, verdict.ours.adapter),
        adapter=verdict.ours.adapter,
        arms=trial.arms,
        selected=names,
        members=members,
        verdict=verdict,
        notes=notes(trial, members, single),
    )


def selected(members: Members, trial: Trial, own: Adapter, select: Selection, k: int) -> list[str]:
    """The names of the N members that are merged, the most useful first."""
    names = list(members.norms)
    if select == "random":
        random.Random(trial.config.seed).shuffle(names)
        return names[:k]

    def score(name: str) -> tuple[float, ...]:
        if select == "evaluation":
            found = trial.member(name, lambda: members.load(name))
            return found.accuracy, -found.loss
        if select == "rank":
            return (float(max(len(a) for a, _ in members.load(name).pairs.values())),)
        return (closeness(members.load(name), own, select),)

    scores = {name: score(name) for name in names}
    return sorted(names, key=lambda name: scores[name], reverse=True)[:k]


def best_member(members: Members, trial: Trial, names: Sequence[str]) -> str:
    """Which of some members has the lowest loss on the examples to choose by, alone."""
    count = len(trial.splits.train)

    def loss(name: str) -> float:
        return trial.member(name, lambda: members.load(name)).of_examples(count).loss

    return min(names, key=loss)


def of_model(adapter: Adapter, stack: Stack) -> Adapter:
    """An adapter that says which weights it is for: it has been found to fit them."""
    return replace(adapter, base=revision(stack.model))


def notes(trial: Trial, members: Members, single: str) -> list[str]:
    """What a reader must know beside the verdict, each in one sentence."""
    by_name = {arm.name: arm.test.accuracy for arm in trial.arms}
    found = [
        f"The same adapters with random weights answer {by_name[RANDOM]:.3f} of the test (the pool's own "
        f"{by_name[POOL]:.3f}), with the target LoRA among them {by_name[BOTH_RANDOM]:.3f} ({by_name[BOTH]:.3f}).",
        f"A LoRA trained on shuffled answers, which can learn their format alone, answers {by_name[FORMAT]:.3f} "
        f"(the model itself {by_name[BASE]:.3f}).",
        f"The best single member by held-out loss is {single}, which answers {by_name[SINGLE]:.3f}.",
    ]
    if members.refused:
        found.append(f"{len(members.refused)} of {len(members.refused) + len(members.norms)} adapters were refused.")
    if trial.splits.set_aside:
        found.append(f"No test was given, so {len(trial.splits.test)} of the examples were set aside as one.")
    if trial.splits.train is trial.splits.held_out:
        found.append(f"The same {len(trial.splits.train)} examples train and choose, since there are so few.")
    return found
