"""LAC (Void in Language Models) at small scale: SmolLM2-135M-Instruct, nothing trained.

Checks that the three modes are exact, that usage falls as alpha grows, that reading out at the last active layer costs
little while carrying voids breaks the model, that prompts and answers use different layers, and that skipping the least
active layers beats random ones and is as much faster as it should be. "Usage" is never a saving here: `readout` and
`carry` run every layer.

    python reproductions/void.py            # about 10 minutes on 2 cores; an interrupted run resumes
    python reproductions/void.py --quick    # the same claims on less work
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.padded import padded, positions, stepped
from torch import LongTensor, Tensor
from torch.nn.functional import cross_entropy

import lamella
from lamella.evaluate import FidelityTest, bench, measure_step
from lamella.measure import block_influence
from lamella.methods.void import Activity, activity, lac_plan
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.runtime import LayerCall, Pass, Policy, traced, with_policy
from lamella.stack import Stack
from lamella.zoo import open_tokenizer

ALPHAS = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Belgium": "Brussels", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi", "Iraq": "Baghdad", "Iran": "Tehran",
    "Turkey": "Ankara", "Canada": "Ottawa", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb",
    "Argentina": "Buenos Aires", "Colombia": "Bogota", "Venezuela": "Caracas", "Indonesia": "Jakarta", "Qatar": "Doha",
}  # fmt: skip


class FixedActivity(Policy):
    """Run only the active layers of each token and skip the others, as in carry mode, for one row."""

    def __init__(self, stack: Stack, active: Tensor) -> None:
        super().__init__(stack)
        self.active = active  # [time, layers] bool

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        return run.choose(call, ~self.active[None, :, call.index], h, call(h))


class HiddenStates:
    """Hidden states of the original model after every layer for the test rows, to apply the head at any layer."""

    def __init__(self, stack: Stack, tokens: LongTensor) -> None:
        self.stack, self.tokens = stack, tokens
        self.h = []  # for each row [layers + 1, time, hidden]
        for row in tokens.split(1):
            context = stack.context(row)
            points = [context.h[0]]
            points += [h[0] for at, h in stack.walk(context.h, 0, len(stack), context) if at.sublayer == "mlp"]
            self.h.append(torch.stack(points))

    def active(self, alpha: float) -> list[Tensor]:
        """Return LAC's decisions, implemented independently, for each row: [time, layers] bool."""
        decisions = []
        for h in self.h:
            growth = h.double().norm(dim=-1).diff(dim=0)  # [layers, time]
            most, least = growth.cummax(dim=0).values, growth.cummin(dim=0).values
            limit = torch.cat([torch.zeros_like(most[:1]), alpha * (most - least)[:-1]])
            decisions.append((growth >= limit).T)
        return decisions

    def turned(self, share: float) -> list[Tensor]:
        """Mark the fraction of (token, layer) pairs that turn the residual stream most: [time, layers] bool."""
        turns = [1 - torch.cosine_similarity(h[1:], h[:-1], dim=-1).T for h in self.h]
        limit = torch.cat(turns).flatten().quantile(1 - share)
        return [turn >= limit for turn in turns]

    def sure(self, mean_exit: float) -> list[Tensor]:
        """Exit at the first layer whose largest probability passes a threshold, set for this mean: per row [time]."""
        tops = []
        for h in self.h:
            logits = (self.stack.head(h[None, layer]) for layer in range(1, len(h)))
            tops.append(torch.stack([each[0].softmax(dim=-1).amax(dim=-1) for each in logits]))  # [layers, time]

        def exits(limit: float) -> list[Tensor]:
            passed = [top >= limit for top in tops]
            return [torch.where(p.any(dim=0), p.int().argmax(dim=0) + 1, len(p)) for p in passed]

        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(exits(middle)) < mean_exit else (low, middle)
        return exits(high)

    def loss(self, exits: list[Tensor]) -> float:
        """Return nats per token, except the first of each row, when tokens exit after their number of layers [time]."""
        total = 0.0
        for row, h, layers in zip(self.tokens, self.h, exits, strict=True):
            states = h[layers, torch.arange(len(row))][None, :-1]
            total += float(cross_entropy(self.stack.head(states)[0].float(), row[1:], reduction="sum"))
        return total / (self.tokens.numel() - len(self.tokens))

    def shuffled_loss(self, exits: list[Tensor]) -> float:
        """Return the expected loss when the same exits are assigned to random tokens."""
        layers, counts = torch.cat([each[:-1] for each in exits]).unique(return_counts=True)
        everywhere = [self.loss([torch.full_like(each, layer) for each in exits]) for layer in layers.tolist()]
        return float(np.average(everywhere, weights=counts.numpy()))


def mean(rows: list[Tensor], skip_first: bool = True) -> float:
    return float(torch.cat([row[int(skip_first) :].float() for row in rows]).mean())


def last_active(active: list[Tensor]) -> list[Tensor]:
    """Return the number of layers up to and including the last active one, 0 if none is active: [time]."""
    return [(torch.arange(1, rows.shape[1] + 1) * rows).amax(dim=-1) for rows in active]


def exactness(record: Record, stack: Stack, tokens: LongTensor) -> None:
    """Check the properties that hold for any weights."""
    model: Any = stack.model
    ids = tokens[:2, :28]
    mask = padded(ids, (0, 7))
    real, prompt = mask.bool(), 22
    where = positions(mask)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": where}
    lengths = torch.full((2,), prompt)
    base = model(**given).logits

    sets = {}
    for alpha in (-1e6, 0.0, 0.2, 0.8):
        view = lamella.apply(stack, lac_plan(stack, alpha=alpha, mode="trace"))
        trace = traced(view)
        same = torch.equal(view(**given).logits, base)
        sets[alpha] = trace.joined()[2]["active"][real].astype(bool)
    record.exact("trace", "logits bitwise equal to the model's", same, same)
    growth = trace.joined()[2]["growth"][real]
    record.exact("alpha = 0", "active where norms do not fall", *[np.array_equal(sets[0.0], growth >= 0)] * 2)
    record.exact("alpha far below 0", "all layers from 2 on active", *[bool(sets[-1e6][:, 2:].all())] * 2)
    shrinks = all(bool((b <= a).all()) for a, b in pairwise(sets[alpha] for alpha in (0.0, 0.2, 0.8)))
    record.exact("active sets, per token", "shrink as alpha grows", shrinks, shrinks)

    hidden = HiddenStates(stack, ids[:1])
    exits = last_active(hidden.active(0.8))[0]
    view = lamella.apply(stack, lac_plan(stack, alpha=0.8, mode="readout"))
    lens = stack.head(hidden.h[0][exits, torch.arange(len(exits))][None])
    apart = float((view(ids[:1]).logits - lens).abs().max())
    record.exact("readout and the lens at the last active layer", "logits within 1e-5", apart, apart <= 1e-5)
    full = (view(ids[:1]).logits == model(ids[:1]).logits)[0, exits == len(stack)].all()
    record.exact(
        "readout where the last layer is active", "logits bitwise equal to the model's", bool(full), bool(full)
    )

    for mode in ("readout", "carry"):
        view = lamella.apply(stack, lac_plan(stack, alpha=0.2, mode=mode))
        trace = traced(view)
        lamella.parallel(view, ids, lengths, mask, position_ids=where)
        at_once = trace.joined()[2]
        trace = traced(view)
        stepped(view, ids, mask, prompt)
        apart = np.abs(trace.joined()[2]["norm"] / at_once["norm"] - 1)[real].max()
        record.exact(
            f"norms of cached steps and of one pass, {mode}", "within 1e-4 of each", float(apart), apart <= 1e-4
        )
        trace = traced(view)
        lamella.parallel(view, ids[1:, 7:], torch.tensor([prompt - 7]))
        alone = trace.joined()[2]["active"]
        alike = np.array_equal(alone[0], at_once["active"][1, 7:])
        record.exact(f"a padded row and the row alone, {mode}", "the same active sets", alike, alike)


def sweep(run: Run, stack: Stack, tokens: LongTensor, alphas: list[float]) -> None:
    """Check points 1 and 2: usage and losses over alpha, and readout against other early exits."""
    test, hidden = FidelityTest(stack, tokens, prompt=1), HiddenStates(stack, tokens)
    base = hidden.loss([torch.full((tokens.shape[1],), len(stack))] * len(tokens))
    rows, usage, readout, carry, carried, shuffled = [], [], [], [], [], []
    for alpha in alphas:
        active = hidden.active(alpha)
        exits = last_active(active)
        usage.append(mean(active))
        losses = []
        for mode in ("readout", "carry"):
            view = lamella.apply(stack, lac_plan(stack, alpha=alpha, mode=mode))
            trace = traced(view)
            losses.append(math.log(test.of(view).perplexity.mean))
        readout.append(losses[0])
        carry.append(losses[1])
        used = np.stack([notes["active"][0, 1:] for notes in trace.notes]).mean()  # of carry, the last one
        cosine = last_active(hidden.turned(usage[-1]))
        shuffled.append(hidden.shuffled_loss(exits))
        others = [shuffled[-1], hidden.loss(cosine)]
        carried.append(100 * used)
        rows.append([alpha, f"{usage[-1]:.1%}", mean(exits), losses[0], *others, f"{used:.1%}", losses[1]])
    title = f"LAC over alpha, position 0 aside (whole model {base:.3f} nats; readout and carry run every layer)"
    columns = [
        "alpha", "active", "mean last active", "readout", "exits at random", "by cosine", "active, carried", "carry"
    ]  # fmt: skip
    run.table(title, columns, rows)
    # carry has its own fraction of active layers, since it changes the residual stream.
    lines = {
        name: [(100 * share, row[place]) for share, row in zip(usage, rows, strict=True)]
        for place, name in ((3, "readout"), (4, "exits at random"))
    }
    lines["carry"] = list(zip(carried, carry, strict=True))
    run.figure("void-usage", Scatter("active layers, %", "nats per token", lines, joined=True, log_y=True))

    falls = all(after < before for before, after in pairwise(usage))
    run.further("usage as alpha grows", "falls strictly", " ".join(f"{u:.1%}" for u in usage), falls)
    within = [loss - base for loss, share in zip(readout, usage, strict=True) if share >= 0.3]
    run.further("readout down to 30 % usage", "within 0.4 nats of the whole model", max(within), max(within) <= 0.4)
    worse = all(c > r for a, c, r in zip(alphas, carry, readout, strict=True) if a > 0)
    run.further("carry against readout at every alpha above 0", "higher loss", worse, worse)
    gap = carry[alphas.index(0.2)] - readout[alphas.index(0.2)]
    run.further("the same at alpha = 0.2", "more than 1 nat", gap, gap > 1)
    for alpha, ours, blind in zip(alphas, readout, shuffled, strict=True):
        if alpha > 0:
            name = f"readout against exits at random tokens, alpha = {alpha}"
            run.further(name, "lower loss", f"{ours:.3f} / {blind:.3f}", ours < blind)


def controls(record: Record, stack: Stack, tokens: LongTensor) -> None:
    """Evaluate baselines that apply the head at every layer, on one row, without claims."""
    hidden = HiddenStates(stack, tokens)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for alpha in (0.2, 0.8):
        active = hidden.active(alpha)
        exits = last_active(active)
        drawn = []
        for each in active:
            order = torch.rand(each.shape, generator=generator).argsort(dim=-1).argsort(dim=-1)
            voids = order < (~each).sum(dim=-1, keepdim=True)
            voids[0] = False
            drawn.append(voids)
        carried, loss = lac_plan(stack, alpha=alpha, mode="carry"), 0.0
        for row, voids in zip(tokens, drawn, strict=True):
            logits = with_policy(stack, carried, FixedActivity(stack, ~voids))(row[None], use_cache=False).logits[
                0, :-1
            ]
            loss += float(cross_entropy(logits.float(), row[1:])) / len(tokens)
        view = lamella.apply(stack, carried)
        own = float(
            np.mean([float(cross_entropy(view(r[None], use_cache=False).logits[0, :-1], r[1:])) for r in tokens])
        )
        rows.append([alpha, mean(exits), hidden.loss(exits), hidden.loss(hidden.sure(mean(exits))), own, loss])
    columns = ["alpha", "mean exit", "readout", "by confidence, equal mean exit", "carry", "as many random voids"]
    record.table("Controls, nats", columns, rows)


def phases(record: Record, seen: Activity, seed: int) -> None:
    """Check point 3: prompts and answers use different layers."""
    prompt, response = (getattr(seen, phase).numpy() for phase in ("prompt", "response"))
    rows = [
        [layer, *(float(each[:, layer].mean()) for each in (prompt, response, seen.sink.numpy()))]
        for layer in range(prompt.shape[1])
    ]
    record.table("How often each layer is active, alpha = 0.2", ["layer", "prompt", "response", "position 0"], rows)
    record.table("Usage in per cent", list(seen.usage()), [list(seen.usage().values())])

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        one, other = one.mean(axis=0), other.mean(axis=0)
        return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2)

    both, drawn = np.concatenate([prompt, response]), np.random.default_rng(seed)
    measured, count = distance(prompt, response), 999
    larger = 0
    for _ in range(count):
        mixed = both[drawn.permutation(len(both))]
        larger += distance(mixed[: len(prompt)], mixed[len(prompt) :]) >= measured
    p = (larger + 1) / (count + 1)
    record.main(
        "prompt and answer, total variation of layer use", "p below 0.05", f"{measured:.3f}, p = {p:.3f}", p < 0.05
    )


def choices(record: Record, stack: Stack, alphas: list[float], seed: int, items: int) -> None:
    """Check point 4: a question with four answers, answered by likelihood."""
    tokenizer, drawn = open_tokenizer("smollm2"), np.random.default_rng(seed)
    questions = []
    for country in drawn.permutation(list(CAPITALS))[:items]:
        wrong = [each for each in CAPITALS.values() if each != CAPITALS[country]]
        options = drawn.permutation([CAPITALS[country], *drawn.choice(wrong, 3, replace=False)]).tolist()
        start = tokenizer(f"The capital of {country} is")["input_ids"]
        ends = [tokenizer(f" {option}", add_special_tokens=False)["input_ids"] for option in options]
        questions.append((start, ends, options.index(CAPITALS[country])))

    def right(model: Any) -> np.ndarray:
        answers = []
        for start, ends, answer in questions:
            length = len(start) + max(map(len, ends))
            ids = torch.tensor([(start + end + [0] * length)[:length] for end in ends])
            logits = model(ids, use_cache=False).logits.log_softmax(dim=-1)
            scores = [
                float(sum(logits[row, len(start) + i - 1, token] for i, token in enumerate(end)))
                for row, end in enumerate(ends)
            ]
            answers.append(int(np.argmax(scores)) == answer)
        return np.array(answers, dtype=float)

    base = right(stack.model)
    resampled = drawn.integers(0, items, (2000, items))
    rows = [["whole model", "100.0%", base.mean(), ""]]
    for alpha in alphas:
        view = lamella.apply(stack, lac_plan(stack, alpha=alpha, mode="readout"))
        trace = traced(view)
        scored = right(view)
        usage = float(np.concatenate([notes["active"][:, 1:].reshape(-1) for notes in trace.notes]).mean())
        low, high = np.quantile((scored - base)[resampled].mean(axis=1), [0.025, 0.975])
        rows.append([f"alpha = {alpha}", f"{usage:.1%}", scored.mean(), f"{low:+.3f} to {high:+.3f}"])
        if 0.5 <= usage <= 0.7:
            name = f"capitals, readout at {usage:.0%} usage"
            record.main(name, "no significant loss", f"difference {low:+.3f} to {high:+.3f}", high >= 0)
    title = f"Capitals: {items} questions with four shuffled answers, by likelihood (chance 0.25)"
    record.table(title, ["readout", "active", "accuracy", "difference, 95 % bootstrap"], rows)
    record.exact(
        "capitals, whole model", "above chance (lower 95 % bound)", *above_chance(base[resampled].mean(axis=1))
    )


def above_chance(means: np.ndarray) -> tuple[float, bool]:
    low = float(np.quantile(means, 0.025))
    return low, low > 0.25


def plans(
    record: Record, stack: Stack, tokens: LongTensor, calibration: LongTensor, seen: Activity, quick: bool
) -> None:
    """Check point 5: skip the least active layers during generation."""
    layers, model = len(stack), ModelReference.of(stack)
    free = list(range(2, layers - 1))
    often = seen.frequency("response").tolist()
    influence = block_influence(stack, calibration).values
    test, drawn = FidelityTest(stack, tokens), np.random.default_rng(0)

    def skipping(gone: list[int]) -> Plan:
        path = PhasedPath(prefill=list(range(layers)), decode=[layer for layer in range(layers) if layer not in gone])
        return Plan(model=model, path={"text": path})

    def loss(gone: list[int]) -> float:
        return math.log(test.of(lamella.apply(stack, skipping(gone))).perplexity.mean)

    base = math.log(test.of(stack.model).perplexity.mean)
    rows = []
    for k in (2,) if quick else (1, 2, 3, 4):
        ours = sorted(free, key=lambda layer: often[layer])[:k]
        known = sorted(free, key=lambda layer: float(influence[layer]))[:k]
        blind = [loss(drawn.choice(free, k, replace=False).tolist()) - base for _ in range(3 if quick else 20)]
        found, by_influence = loss(ours) - base, loss(known) - base
        rows.append(
            [k, str(sorted(ours)), found, float(np.mean(blind)), float(np.min(blind)), str(sorted(known)), by_influence]
        )
        measured = f"{found:.3f} / {np.mean(blind):.3f}"
        record.further(
            f"the {k} least active layers against random ones",
            "lower loss than their mean",
            measured,
            found < np.mean(blind),
        )
    columns = ["k", "least active", "lost", "random: mean", "best", "least influence", "lost"]
    record.table(f"Nats lost by skipping k layers in the answer (whole model {base:.3f})", columns, rows)

    k = 4
    view = lamella.apply(stack, skipping(sorted(free, key=lambda layer: often[layer])[:k]))
    times = measure_step(stack)
    layer_time = layers * (times.attn + times.mlp) / times.step(None, layers)  # of the whole step
    timing = bench(
        {"whole": stack.model, "view": view}, [1], prompt=32 if quick else 64, tokens=16 if quick else 64, rounds=5
    )["view"][0]
    speedup = timing.decode_speedup
    saved = Measured(
        *((1 - 1 / each) / layer_time / (k / layers) for each in (speedup.median, speedup.low, speedup.high))
    )
    record.table("Decode speed, interleaved runs", ["k", "speed-up"], [[k, str(timing.decode_speedup)]])
    record.further(f"layer time saved at k = {k}, against {k}/{layers}", "within 20 %", saved, saved.within(0.8, 1.2))


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    stack = lamella.open("smollm2")
    text, planning = lamella.load_text("pydoc", "test"), lamella.load_text("pydoc", "calibration")
    tokenizer = open_tokenizer("smollm2")
    tokens = lamella.windows(tokenizer, text, 2 if quick else 8, 48 if quick else 192, seed)
    calibration = lamella.windows(tokenizer, planning, 4 if quick else 20, 48, seed)
    run.data = f"{text.provenance(tokens)}"
    run.part("exactness", exactness, stack, tokens)
    run.part("sweep", sweep, stack, tokens, [0.0, 0.2, 0.8] if quick else ALPHAS)
    seen = activity(stack, calibration, alpha=0.2, max_new_tokens=16 if quick else 48)
    run.part("phases", phases, seen, seed)
    run.part("choices", choices, stack, [0.2] if quick else ALPHAS, seed, 16 if quick else len(CAPITALS))
    run.part("plans", plans, stack, tokens, calibration, seen, quick)
    if not quick:
        run.part("controls", controls, stack, tokens[:2])


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer sequences, alphas and draws, under a minute"))
