"""LoRA recycling: decide between merging existing adapters for a task and training a new one.

Liu et al., "The Appeal and Reality of Recycling LoRAs with Adaptive Merging", arXiv 2602.12323.

Given are a model, a pool of LoRAs that others have trained for it, and about 100 examples of a target task. The paper
formulates the known merging methods in one framework and searches it for the best::

    pool --filter--> usable --select--> D_1 .. D_N, and D_0 = T, a LoRA trained on the same examples
    W^m + sum_i f(w_i^m) D_i^m          w fitted on the examples, per module, f = LeakyReLU, from w = 0
    keep w at the lowest held-out loss

and then analyses the gain. In practice it is better than the model alone, hardly better than T, and equally good with
*random* weights in place of the pool's: the gain comes from fitting a few more parameters. Only an adapter that is
related to the task transfers knowledge. Therefore the merge is always compared with::

    base                     the original model
    T                        a LoRA trained on the examples, with usual and with stronger regularisation
    T, answers shuffled      learns the format of answers but not their content
    single, average          the best member of the pool alone; the average of the selected ones, without coefficients
    random weights           the same shapes, ranks, scales and standard deviations, with random values
    T, coefficients only     the fit without a pool

All choices are made on held-out examples and all results are measured on test examples (result.py has the verdict).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge

from lamella.data import Examples
from lamella.files import Work
from lamella.methods.lora_recycling.choosing import closeness
from lamella.methods.lora_recycling.controls import randomise
from lamella.methods.lora_recycling.merging import average
from lamella.methods.lora_recycling.pool import AdapterPool, Members
from lamella.methods.lora_recycling.recipe import FITTING, Mixing, Target
from lamella.methods.lora_recycling.result import MergeVerdict, Recycled
from lamella.methods.lora_recycling.trial import DECAY, DROPOUT, TaskSplits, Trial
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
    pool: AdapterPool,
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
    """Merge adapters of a pool for a task, and test against all controls whether that is worthwhile.

    Args:
        stack: the model that the adapters belong to; it is not changed.
        pool: existing adapters.
        data: about 100 examples of the target task: four fifths for training, a fifth held out for selection; with
            fewer than 20, the same ones are used for both.
        test: test examples; defaults to a quarter of ``data``.
        how: method for the coefficients: ``adaptive`` trains them; ``lorahub`` searches one per adapter without
            gradients; ``pi-tuning`` trains the adapters too.
        select: selection of members: the best by ``evaluation`` on the examples, ``random`` ones, those with the
            highest ``rank``, or those closest to the target LoRA by a score (``closeness``, ``clamp-pm``, ``macro``,
            ``clamp``, ``abs``, ``quasi-fim``, ``l2``).
        k: N, number of selected members; the paper's tables use 5 to 30.
        mixing: definition of the coefficients.
        target: settings of the LoRA that is trained on the examples alone.
        config: settings of the coefficients' training; batch size, schedule and seed also apply to the target LoRA.
        work: folder from which an interrupted run resumes with the same result.

    Returns:
        The best merge as a plain adapter, with the table of all arms and the verdict.

    Raises:
        MethodError: for a pool without usable adapters, or too few examples.
        TrainingError: when training cannot start or does not stay finite.
    """
    splits = TaskSplits.of(data, test, config.seed)
    members = pool.members(stack)
    merged = {"select": select, "k": k, "norms": dict(members.norms)}
    trial = Trial(stack, splits, how, mixing, target, config, work, merged)

    # Arms without a pool.
    trial.add(BASE, None)
    own = trial.trained(TARGET)
    trial.trained(REGULARISED, dropout=DROPOUT, decay=DECAY)
    trial.trained(FORMAT, shuffle=True)
    trial.mixed(ONLY, [own])

    # Arms with the pool, without and with the target's own adapter, and the same with random weights.
    names = selected(members, trial, own, select, k)
    chosen = [of_model(each, stack) for each in members.take(names)]
    single = best_member(members, trial)
    trial.add(SINGLE, of_model(members.load(single), stack), of_pool=True)
    trial.add(AVERAGE, average(chosen), of_pool=True)
    trial.mixed(POOL, chosen, of_pool=True)
    trial.mixed(RANDOM, randomise(chosen, seed=config.seed))
    together = [own, *chosen]
    trial.mixed(BOTH, together, of_pool=True)
    trial.mixed(BOTH_RANDOM, randomise(together, keep=[0], seed=config.seed))

    verdict = MergeVerdict.of(trial.arms)
    assert verdict.ours.adapter is not None
    adapter = verdict.ours.adapter.loaded()
    return Recycled(
        stack=merge(stack, adapter),
        adapter=adapter,
        arms=trial.arms,
        selected=names,
        members=members,
        verdict=verdict,
        notes=notes(trial, members, single),
    )


def selected(members: Members, trial: Trial, own: Adapter, select: Selection, k: int) -> list[str]:
    """Names of the N members to merge, the most useful first.

    Args:
        members: usable members of the pool.
        trial: the trial.
        own: the target's own adapter.
        select: selection method.
        k: N.
    """
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


def best_member(members: Members, trial: Trial) -> str:
    """The member of the whole pool with the lowest loss on the held-out examples, alone.

    Args:
        members: usable members of the pool, selected for the merge or not.
        trial: the trial.
    """
    count = len(trial.splits.train)

    def loss(name: str) -> float:
        return trial.member(name, lambda: members.load(name)).of_examples(count).loss

    return min(members.norms, key=loss)


def of_model(adapter: Adapter, stack: Stack) -> Adapter:
    """Mark an adapter as belonging to the weights of a model, which it has been found to fit.

    Args:
        adapter: the adapter.
        stack: the model.
    """
    return replace(adapter, base=revision(stack.model))


def notes(trial: Trial, members: Members, single: str) -> list[str]:
    """Notes beside the verdict, one sentence each.

    Args:
        trial: the trial.
        members: members of the pool.
        single: name of the best single member.
    """
    by_name = {arm.name: arm.test.accuracy for arm in trial.arms}
    found = [
        f"With random weights, the same adapters answer {by_name[RANDOM]:.3f} of the test (the pool's own "
        f"{by_name[POOL]:.3f}), together with the target LoRA {by_name[BOTH_RANDOM]:.3f} ({by_name[BOTH]:.3f}).",
        f"A LoRA trained on shuffled answers, which can only learn their format, answers {by_name[FORMAT]:.3f} "
        f"(the original model {by_name[BASE]:.3f}).",
        f"The best single member by held-out loss is {single}, which answers {by_name[SINGLE]:.3f}.",
    ]
    if members.refused:
        found.append(f"{len(members.refused)} of {len(members.refused) + len(members.norms)} adapters were rejected.")
    if trial.splits.set_aside:
        found.append(f"No test was given, so {len(trial.splits.test)} of the examples were used as the test split.")
    if trial.splits.train is trial.splits.held_out:
        found.append(f"The same {len(trial.splits.train)} examples are used for training and selection.")
    return found
