"""MoDES at small scale: a nano Qwen3-VL-MoE that answers questions about rendered shapes, and skips experts.

The exactness checks come first. Then a model of six layers of eight experts, four per token, is trained on rendered
shapes; tasks that it does not learn are excluded from the claims. The reproduction measures how stable the importance
of layers is between halves of the calibration samples; whether the walk along the edge finds the optimum of the whole
grid; how much the answers change, and how many stay correct, when a half and three quarters of all (token, expert)
pairs are skipped by MoDES, by its parts, with the importance of other layers, by NAEE, by fewer experts for all, and at
random; and calibration on questions of another kind. Last, it times a layer of experts of SmolLM2's width.

    python reproductions/modes.py            # an hour and a half of one thread; an interrupted run resumes
    python reproductions/modes.py --quick    # exactness, and the time of a layer
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.vlm import rows_of, trained_vlm
from torch import Tensor

import lamella
from lamella.data import ImageText
from lamella.evaluate import Ratio, answered
from lamella.evaluate.scored import labelled_batches, scored_states
from lamella.measure import spearman
from lamella.methods.modes import AnswerDistance, ExpertSkipping, frontier, layer_importance
from lamella.methods.modes.baselines import Rule, fewer, find_strictness, naee, random_rule
from lamella.methods.modes.method import BATCH, search, skipped, skipping, thresholds
from lamella.methods.modes.policy import MODALITIES
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import apply, parallel, with_policy
from lamella.runtime.gathering import sparsely
from lamella.stack import Stack, last_stack
from lamella.zoo.nano import nano

TASKS = ("colour", "count", "relation")
SHARES = (0.5, 0.75)
CALIBRATION, TEST, GRID = 256, 300, 20
LEARNED = 0.2  # accuracy above that of the most frequent answer from which a task takes part in the claims
WIDE = 2  # random skips must change the answers by this factor more: the wide margin
DRAWS = 2000  # bootstrap samples
UNIFORM = "weights alone, one threshold"
OURS, CHANCE, SHUFFLED = "MoDES", "random skips", "importance of other layers"


# Exactness


def exactness(run: Run) -> None:
    torch.manual_seed(run.seed)
    ids = torch.randint(3, 120, (3, 14))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    stack, lengths, real = Stack(nano("qwen3_moe")), torch.full((3,), 9), mask.bool()
    whole = stack.model(input_ids=ids, attention_mask=mask).logits

    def logits_and_counts(tau: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        alpha = [scale * (1 + layer) / 10 for layer in range(4)]
        params = {"alpha": dict.fromkeys(MODALITIES, alpha), "tau": dict.fromkeys(MODALITIES, scale * tau)}
        reference = PolicyReference(name="modes", params=params)
        view = apply(stack, Plan(model=ModelReference.of(stack), policies={"text": reference}))
        return parallel(view, ids, lengths, mask).logits, view.lamella_policy.counts

    none, _ = logits_and_counts(0.0)
    run.exact("thresholds of 0", "logits bitwise equal to the model's",
              "equal" if torch.equal(none, whole) else "not equal",
              torch.equal(none, whole))  # fmt: skip
    gone, counts = logits_and_counts(1e9)
    context = stack.context({"input_ids": ids, "attention_mask": mask})
    without = stack.head(stack.run(context.h, 0, 4, context, skip=[(layer, "mlp") for layer in range(4)]))
    apart = float((gone - without)[real].abs().max())
    run.exact(
        "all skipped against no experts at all", "below 1e-5", f"{apart:.1e}", apart < 1e-5 and skipped(counts) == 1
    )
    one, other = logits_and_counts(0.12)[0], logits_and_counts(0.12, 8.0)[0]
    run.exact("importance and thresholds, both times 8", "bitwise equal logits",
              "the same" if torch.equal(one, other) else "others", torch.equal(one, other))  # fmt: skip
    apart = masked_apart(stack, ids, mask, one)
    run.exact("skipped pairs against weights of 0", "below 1e-5", f"{apart:.1e}", apart < 1e-5)
    missed = walked(run.seed, 1000)
    run.exact("the walk on 1000 monotone grids", "the cost of the whole grid", f"{missed} differ", missed == 0)


def masked_apart(stack: Stack, ids: Tensor, mask: Tensor, found: Tensor) -> float:
    """Return the distance from logits with the weights of skipped experts set to 0 in the model's own experts."""

    def zeroed(layer: int) -> Callable[..., Any]:
        def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, chosen, weights = args
            return h, chosen, weights * ((1 + layer) / 10 * weights >= 0.12)

        return before

    hooks = [layer.mlp.experts.register_forward_pre_hook(zeroed(index)) for index, layer in enumerate(stack.layers)]
    logits = stack.model(input_ids=ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return float((found - logits)[mask.bool()].abs().max())


def walked(seed: int, count: int) -> int:
    """Return how often the walk misses the optimum of the whole grid, or evaluates too many of its points."""
    drawn, wrong = np.random.default_rng(seed), 0
    for _ in range(count):
        rows, columns = (int(each) for each in drawn.integers(1, 12, 2))
        g, f = (
            (drawn.random((rows, columns)) * (drawn.random((rows, columns)) < 0.6)).cumsum(0).cumsum(1) for _ in "gf"
        )
        share = float(drawn.random() * g[-1, -1])
        best = frontier(rows, columns, lambda i, j, g=g, f=f: (float(g[i, j]), float(f[i, j])), share)
        wrong += best.cost != f[g >= share].min() or best.evaluations > rows + columns
    return wrong


# The nano model


def opened(run: Run) -> tuple[Any, Stack]:
    folder = trained_vlm("qwen3_vl_moe", seed=run.seed)
    return folder, lamella.open(folder).stacks["text"]


def batched(samples: ImageText) -> list[dict[str, Tensor]]:
    return list(labelled_batches(samples, BATCH))


def rows(folder: Any, tasks: Sequence[str], count: int, part: str, seed: int) -> ImageText:
    return rows_of(folder, tasks, count, part, seed)  # type: ignore[arg-type]


def accuracies(run: Run) -> dict[str, list[float]]:
    """Return for every task the accuracy, and that of the most frequent answer alone."""
    folder, stack = opened(run)
    found = {}
    for task in TASKS:
        test = rows(folder, [task], TEST, "test", 1)
        [(_, commonest)] = Counter(each.answer for each in test).most_common(1)
        found[task] = [float(answered(stack.model, test).float().mean()), commonest / len(test)]
    return found


def importance(run: Run, tasks: Sequence[str], half: int | None = None) -> dict[str, list[float]]:
    """Return alpha of all calibration samples, or of every other one."""
    folder, stack = opened(run)
    samples = rows(folder, tasks, CALIBRATION, "calibration", 0)
    chosen = samples if half is None else ImageText(list(samples)[half::2], samples.processing)
    return layer_importance(AnswerDistance(stack, batched(chosen)))


def walk_against_grid(run: Run, tasks: Sequence[str], alpha: dict[str, list[float]]) -> dict[str, Any]:
    """Compare the results of the walk and of the whole grid."""
    folder, stack = opened(run)
    answers = AnswerDistance(stack, batched(rows(folder, tasks, CALIBRATION, "calibration", 0)))
    grids = thresholds(answers, alpha, GRID, "quantile")
    g, f = np.zeros((2, GRID, GRID))
    for i in range(GRID):
        for j in range(GRID):
            cost, counts = skipping(answers, alpha, {"text": grids["text"][i], "image": grids["image"][j]})
            g[i, j], f[i, j] = skipped(counts), cost
    found = []
    for share in (0.25, 0.5, 0.65, 0.75):
        best = frontier(GRID, GRID, lambda i, j: (float(g[i, j]), float(f[i, j])), share)
        found.append([share, best.cost, float(f[g >= share].min()), best.evaluations, best.violations])
    return {"found": found}


def arms(
    stack: Stack, answers: AnswerDistance, alpha: dict[str, list[float]], share: float
) -> dict[str, ExpertSkipping]:
    """Return every rule, with the strictness at which it skips the fraction of calibration pairs."""
    even = dict.fromkeys(MODALITIES, [1.0] * len(stack))

    def apart(weighs: dict[str, list[float]]) -> ExpertSkipping:
        [best] = search(answers, weighs, thresholds(answers, weighs, GRID, "quantile"), [share])
        return ExpertSkipping(stack, alpha=weighs, tau=best.tau)

    def together(weighs: dict[str, list[float]]) -> ExpertSkipping:
        def skips(tau: float) -> float:
            return skipped(skipping(answers, weighs, dict.fromkeys(MODALITIES, tau))[1])

        most = float(torch.cat(list(answers.scores(weighs).values())).max())
        return ExpertSkipping(
            stack, alpha=weighs, tau=dict.fromkeys(MODALITIES, find_strictness(skips, share, 0.0, 2 * most))
        )

    def ruled(keeps: Callable[[Tensor, float], Tensor], high: float) -> ExpertSkipping:
        rule = Rule(stack, keeps)
        measured = AnswerDistance(stack, answers.batches, rule)

        def skips(strict: float) -> float:
            rule.strict = strict
            return skipped(measured.distance()[1])

        rule.strict = find_strictness(skips, share, 0.0, high)
        return rule

    drawn = torch.Generator().manual_seed(0)
    other = {
        name: [each[layer] for layer in torch.randperm(len(each), generator=drawn)] for name, each in alpha.items()
    }
    return {
        OURS: apart(alpha),
        SHUFFLED: apart(other),
        UNIFORM: together(even),
        "weights alone, two thresholds": apart(even),
        "importance, one threshold": together(alpha),
        "NAEE": ruled(naee, 64.0),
        "fewer for all": Rule(stack, fewer, share),
        CHANCE: Rule(stack, random_rule(0), share),
    }


def tested(stack: Stack, policy: ExpertSkipping, test: ImageText) -> dict[str, Any]:
    """Return for every test row the change of its answer and its correctness, and the fractions skipped."""
    view = with_policy(
        stack, Plan(model=ModelReference.of(stack), policies={"text": PolicyReference(name="modes")}), policy
    )
    moved, counts = [], torch.zeros(len(stack), 2, 2, dtype=torch.long)
    with torch.no_grad():
        for batch in batched(test):
            before, after = (scored_states(model, batch)[0] for model in (stack.model, view))
            counts += policy.counts
            p, q = (last_stack(stack.model).logits(each).float().log_softmax(-1) for each in (before, after))
            row = (batch["labels"][:, 1:] >= 0).nonzero()[:, 0]
            kl = (p.exp() * (p - q)).sum(-1)
            size = len(batch["labels"])
            total = torch.zeros(size).index_add(0, row, kl)
            moved += (total / torch.zeros(size).index_add(0, row, torch.ones_like(kl))).tolist()
    chosen, ran = counts.sum(0).unbind(-1)
    return {
        "kl": moved,
        "right": answered(view, test).tolist(),
        "skipped": skipped(counts),
        "text": 1 - int(ran[0]) / int(chosen[0]),
        "image": 1 - int(ran[1]) / int(chosen[1]),
    }


def compared(run: Run, tasks: Sequence[str], alpha: dict[str, list[float]], share: float) -> dict[str, Any]:
    folder, stack = opened(run)
    answers = AnswerDistance(stack, batched(rows(folder, tasks, CALIBRATION // 4, "calibration", 0)))
    test = rows(folder, tasks, TEST, "test", 1)
    whole = answered(stack.model, test).tolist()
    found = {name: tested(stack, policy, test) for name, policy in arms(stack, answers, alpha, share).items()}
    return {"whole": whole, "arms": found}


def shifted(run: Run, judged: str, other: str, share: float) -> dict[str, list[bool]]:
    """Return which answers to one task stay correct, with calibration on that task and on another one."""
    folder, stack = opened(run)
    test = rows(folder, [judged], TEST, "test", 2)
    kept = {"whole": answered(stack.model, test).tolist()}
    for task in (judged, other):
        alpha = importance(run, [task])
        answers = AnswerDistance(stack, batched(rows(folder, [task], CALIBRATION // 4, "calibration", 0)))
        [best] = search(answers, alpha, thresholds(answers, alpha, GRID, "quantile"), [share])
        kept[task] = tested(stack, ExpertSkipping(stack, alpha=alpha, tau=best.tau), test)["right"]
    return kept


def retained(whole: Sequence[bool], right: Sequence[bool], less: Sequence[bool] | None = None) -> Measured:
    """Return the fraction of the model's correct answers that stay correct, or its excess over another rule."""
    drawn = np.random.default_rng(0).integers(len(whole), size=(DRAWS, len(whole)))
    ours = np.array(right, dtype=float) - (0 if less is None else np.array(less, dtype=float))
    base = np.array(whole, dtype=float)
    low, high = np.quantile(ours[drawn].mean(1) / base[drawn].mean(1), (0.025, 0.975))
    return Measured(float(ours.mean() / base.mean()), float(low), float(high))


def claims(run: Run) -> None:
    scores = run.arm("accuracy of the model", accuracies, run)
    run.table(
        "A nano Qwen3-VL-MoE, on test images: % of correct answers",
        ["", *scores],
        [
            [name, *(100 * each[place] for each in scores.values())]
            for place, name in enumerate(("", "most frequent answer"))
        ],
    )
    tasks = [task for task, (right, commonest) in scores.items() if right - commonest >= LEARNED]
    learned = len(tasks) > 1
    said = f"premise: tasks of which it answers {100 * LEARNED:g} points more than the most frequent answer"
    run.exact(said, "two or more", ", ".join(tasks) or "none", learned)
    if not learned:
        tasks = list(TASKS)

    def if_learned(verdict: bool | None) -> bool | None:
        return verdict if learned else None

    alpha = run.arm("importance", importance, run, tasks)
    run.table(
        "Importance of each layer",
        ["modality", *map(str, range(len(alpha["text"])))],
        [[name, *alpha[name]] for name in MODALITIES],
    )
    halves = [run.arm(f"importance, half {half}", importance, run, tasks, half) for half in (0, 1)]
    for name in MODALITIES:
        rho = spearman(halves[0][name], halves[1][name])
        alike = rho is not None and rho >= 0.8
        run.further(f"importance to {name}, rank correlation of two halves", "at least 0.8", rho, if_learned(alike))
    grid = run.arm("the walk against the grid", walk_against_grid, run, tasks, alpha)["found"]
    run.table(
        f"{GRID} x {GRID} thresholds, {CALIBRATION} samples",
        ["fraction to skip", "KL of the walk", "KL of the grid", "evaluations", "monotonicity violations"],
        grid,
    )
    gap = max(1.0 if found == least else found / least if least else np.inf for _, found, least, *_ in grid)
    run.main("KL of the walk in the best of the whole grid", "at most 1.02", gap, if_learned(gap <= 1.02))
    most = max(each[3] for each in grid)
    run.main("evaluations of the walk", f"at most {2 * GRID} of {GRID * GRID}", most, if_learned(most <= 2 * GRID))
    for share in SHARES:
        at_share(run, share, run.arm(f"rules at {share}", compared, run, tasks, alpha, share), learned)
    kept = run.arm("another kind of question", shifted, run, tasks[-1], tasks[0], SHARES[0])
    lost = retained(kept["whole"], kept[tasks[-1]], kept[tasks[0]])
    drop = Measured(*(100 * each for each in (lost.figure, lost.low, lost.high)))
    verdict = if_learned(drop.at_most(2))
    said = f"retention lost on {tasks[-1]} by calibration on {tasks[0]}, points"
    run.further(said, "at most 2", str(drop), verdict)


def at_share(run: Run, share: float, found: dict[str, Any], learned: bool) -> None:
    whole, by_rule = found["whole"], found["arms"]
    run.table(
        f"{share:.0%} of the pairs of calibration skipped, on {len(whole)} test questions",
        ["rule", "KL (nats)", "% correct", "% of the model's correct answers", "% skipped", "of text", "of images",
         "experts per token"],
        [
            [name, fmean(each["kl"]), 100 * fmean(each["right"]), 100 * retained(whole, each["right"]).figure,
             100 * each["skipped"], 100 * each["text"], 100 * each["image"], 4 * (1 - each["skipped"])]
            for name, each in by_rule.items()
        ],
    )  # fmt: skip

    def below(other: str, times: float = 1.0) -> Measured:
        """Return how much more the answers change by another rule, on the same questions."""
        moved = zip(by_rule[OURS]["kl"], by_rule[other]["kl"], strict=True)
        return Measured.over_seeds([b - times * a for a, b in moved])

    def if_learned(verdict: bool | None) -> bool | None:
        return verdict if learned else None

    claim = run.main if share == SHARES[0] else run.further
    for said, apart in (
        ("KL of weights alone less MoDES's", below(UNIFORM)),
        (f"KL of random skips less {WIDE} times MoDES's", below(CHANCE, WIDE)),
    ):
        claim(f"{share:.0%}: {said}", "at least 0", str(apart), if_learned(apart.at_least(0)))
    apart = below(SHUFFLED)
    name = f"{share:.0%}: KL with the importance of other layers less MoDES's"
    run.further(name, "at least 0", str(apart), if_learned(apart.at_least(0)))
    if share == SHARES[0]:
        kept = retained(whole, by_rule[OURS]["right"])
        run.main(f"{share:.0%}: fraction of the model's correct answers that stay correct", "at least 0.97", str(kept),
                 if_learned(kept.at_least(0.97)))  # fmt: skip
    more = by_rule[OURS]["image"] - by_rule[OURS]["text"]
    run.further(
        f"{share:.0%}: fraction skipped of image tokens less that of text tokens", "above 0", more, if_learned(more > 0)
    )


# The time of a layer


def layer_times(run: Run) -> dict[str, Any]:
    """Time a layer of experts, dense and with skipped pairs, interleaved."""
    config = {"hidden_size": 576, "moe_intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 4}
    stack = Stack(nano("qwen3_moe", num_hidden_layers=1, **config))
    experts = stack.layers[0].mlp.experts
    drawn, found = torch.Generator().manual_seed(run.seed), []
    for tokens in (64, 128, 256, 512):
        h = torch.randn(tokens, 576, generator=drawn)
        chosen = torch.rand(tokens, 8, generator=drawn).argsort(1)[:, :4]
        weights = torch.rand(tokens, 4, generator=drawn)
        for share in SHARES:
            keep = torch.rand(tokens, 4, generator=drawn) >= share
            ratios = []
            for _ in range(3 if run.quick else 15):
                begin = time.perf_counter()
                experts(h, chosen, weights)
                middle = time.perf_counter()
                with sparsely(experts, lambda ids, each, keep=keep: keep):
                    experts(h, chosen, weights)
                ratios.append((middle - begin) / (time.perf_counter() - middle))
            ratio = Ratio.of(ratios[1:])
            found.append([tokens, share, ratio.median, ratio.low, ratio.high])
    return {"found": found}


def experiment(run: Run) -> None:
    run.data = "rendered shapes: questions about colour, count and relation; images of held-out test scenes"
    with torch.no_grad():
        run.part("exactness", exactness)
        found = run.arm("time of a layer", layer_times, run)["found"]
    run.table(
        "A layer of 8 experts of 576 x 768, 4 per token: time of the dense layer over that of the sparse one",
        ["tokens", "fraction skipped", "ratio", "lower quartile", "upper quartile"],
        found,
    )
    for share in SHARES:
        last = [Measured(*each[2:]) for each in found if each[1] == share][-1]
        name = f"{share:.0%} of the pairs of 512 tokens skipped: speed-up"
        run.further(name, "at least 1.3", str(last), last.at_least(1.3))
    if not run.quick:
        claims(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="what is exact, and the time of a layer"))
