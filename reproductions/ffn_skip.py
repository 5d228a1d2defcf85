"""FFN-SkipLLM at small scale: SmolLM2-135M-Instruct without training.

Checks that skipping inside generation is exact (cached, batched, padded), that the saturation profile has the paper's
shape, that skipped runs placed by a calibrated threshold cost less than fixed ones at an equal fraction of skipped
MLPs, and that skipping saves time. Whole-layer skipping and the parts of the recipe are compared without a claim.

    python reproductions/ffn_skip.py            # about 10 minutes on 2 cores; an interrupted run resumes
    python reproductions/ffn_skip.py --quick    # the same claims on less work
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.padded import padded, positions, stepped
from torch import LongTensor, Tensor

import lamella
from lamella.evaluate import FidelityTest, bench, measure_step
from lamella.methods.ffn_skip import cold_layers, saturation
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.runtime import LayerCall, Pass, Policy, traced, with_policy
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

PROMPT = 48
ALWAYS = {"warmup": 0, "interleave": [1, 0]}  # every generated token may skip
LETTERS = 4  # length of a repeated sequence, in tokens


def planned(stack: Stack, **params: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="ffn-skip", params=params)})


class Static(Policy):
    """Policy in which all generated tokens skip the MLPs of the same layers."""

    def __init__(self, stack: Stack, skipped: list[int]) -> None:
        super().__init__(stack)
        self.skipped = skipped

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if call.index not in self.skipped:
            return call(h)
        return call.mlp_where(call.attn(h), ~run.phase.response(h.device).expand(h.shape[:2]))


class EarlyExit(Policy):
    """Early exit: generated tokens leave once a layer of the upper half hardly changes their hidden state.

    The layers above still get keys, computed from the exiting hidden state, as in CALM and SkipDecode. This policy
    saves no computation: it only serves to compare losses.
    """

    def __init__(self, stack: Stack, threshold: float) -> None:
        super().__init__(stack)
        self.threshold = threshold

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        response = run.phase.response(h.device).expand(h.shape[:2])
        gone = run.memory.get("gone", torch.zeros_like(response))
        out = run.choose(call, gone, h, call(h))
        if call.index >= self.layers // 2:
            run.memory["gone"] = gone | (response & (torch.cosine_similarity(h, out, dim=-1) > self.threshold))
        return out


class Scale:
    """Losses and skipped fractions of views, on one text."""

    def __init__(self, stack: Stack, tokens: LongTensor) -> None:
        self.stack = stack
        self.test = FidelityTest(stack, tokens, PROMPT)
        self.base = math.log(self.test.of(stack.model).base_perplexity.mean)

    def of(self, view: Any) -> tuple[float, np.ndarray]:
        """Return the nats per continuation token, and the executed sublayers [rows, continuation, layers, 2]."""
        trace = traced(view)
        loss = math.log(self.test.of(view).perplexity.mean)
        ran = np.stack([ran[0, PROMPT:] for ran in trace.ran])
        return loss, ran

    def plan(self, **params: Any) -> tuple[float, np.ndarray]:
        """Return the loss under ffn-skip, and the skipped MLPs [rows, continuation, layers]."""
        loss, ran = self.of(lamella.apply(self.stack, planned(self.stack, **params)))
        return loss, ~ran[..., 1]


def calibrated(stack: Stack, calibration: LongTensor, k: int, **options: Any) -> dict[str, Any]:
    """Return the settings of the method's plan that skips ``k`` MLPs per token, at every token."""
    plan = lamella.make_plan("ffn-skip", stack, calibration, max_skips=k, **ALWAYS, **options)[-1]
    return dict(plan.policy.params)


def exactness(record: Record, stack: Stack, ids: Tensor, threshold: float, name: str) -> None:
    """Check point 1 of the claims, on a left-padded batch of 2 or 4 rows."""
    model: Any = stack.model
    pads = (0, 9, 3, 17)[: len(ids)]
    mask = padded(ids, pads)
    real, prompt, lengths = mask.bool(), 22, torch.full((len(ids),), 22)
    layers, k = len(stack), max(len(stack) // 6, 2)

    base, base_cache = stepped(model, ids, mask, prompt)
    same = all(
        torch.equal(stepped(lamella.apply(stack, planned(stack, **params)), ids, mask, prompt)[0], base)
        for params in (
            {"max_skips": 0, "threshold": 0.5} | ALWAYS,
            {"max_skips": k, "threshold": 1.0} | ALWAYS,
            {"max_skips": k, "threshold": 0.5, "warmup": ids.shape[1]},
        )
    )
    record.exact(f"{name}: k = 0, threshold 1 and a long warm-up", "bitwise equal to the base model", same, same)

    view = lamella.apply(stack, planned(stack, max_skips=k, threshold=threshold, warmup=1, interleave=[5, 1]))
    trace = traced(view)
    steps, cache = stepped(view, ids, mask, prompt)
    ran = trace.joined()[0][..., 1]
    trace = traced(view)
    whole = lamella.parallel(view, ids, lengths, mask, position_ids=positions(mask)).logits
    apart = float((steps - whole)[real].abs().max())
    record.exact(f"{name}: cached steps and the teacher-forced forward", "logits within 1e-4", apart, apart <= 1e-4)
    alike = np.array_equal(trace.joined()[0][..., 1][real], ran[real])
    record.exact(f"{name}: cached steps and the teacher-forced forward", "identical decisions", alike, alike)

    apart, alike = 0.0, True
    for row, pad in enumerate(pads):
        trace = traced(view)
        alone, _ = stepped(view, ids[row : row + 1, pad:], mask[row : row + 1, pad:], prompt - pad)
        apart = max(apart, float((alone[0] - steps[row, pad:]).abs().max()))
        alike &= np.array_equal(trace.joined()[0][0, ..., 1], ran[row, pad:])
    record.exact(f"{name}: a left-padded batch and its rows alone", "logits within 1e-5", apart, apart <= 1e-5)
    record.exact(f"{name}: a left-padded batch and its rows alone", "identical decisions", alike, alike)

    as_long = [slot.keys.shape for slot in cache.layers] == [slot.keys.shape for slot in base_cache.layers]
    record.exact(f"{name}: cache of every layer", "as long as the base model's", as_long, as_long)
    skipped, (first, last) = ~ran, cold_layers(layers)
    counts = skipped.sum(-1)
    span = layers - skipped.argmax(-1) - skipped[..., ::-1].argmax(-1)
    runs = bool(counts.any()) and bool((counts <= k).all()) and bool((span == counts)[counts > 0].all())
    record.exact(f"{name}: skips of a token", f"one run of at most {k}", runs, runs)
    warm = not skipped[..., :first].any() and not skipped[..., layers - last :].any()
    record.exact(f"{name}: cold layers", "never skipped", warm, warm)


def exact_nano(record: Record, seed: int) -> None:
    drawn = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(seed))
    exactness(record, Stack(nano("llama", num_hidden_layers=8)), drawn, 0.7, "nano Llama")


def exact_smollm2(record: Record, stack: Stack, tokens: LongTensor) -> None:
    # In float64, since logits around 20 of a batch and of its rows alone differ by 1e-4 in float32 without any plan.
    exactness(record, Stack(copy.deepcopy(stack.model).double()), tokens, 0.975, "SmolLM2")


def profile(record: Record, cosines: Tensor) -> None:
    """Check point 2: the shape of the saturation profile."""
    means, low = cosines.mean(dim=0).tolist(), cosines.quantile(0.1, dim=0).tolist()
    rows = [[layer, mean, tenth] for layer, (mean, tenth) in enumerate(zip(means, low, strict=True))]
    record.table(f"Cosine before and after the MLP's addition, {len(cosines)} tokens", ["layer", "mean", "10 %"], rows)
    lowest = sorted(np.argsort(means)[:2].tolist())
    record.further("the two layers of lowest cosine", "the first and the last", lowest, lowest == [0, len(means) - 1])
    middle, dip = float(np.mean(means[1:-1])), int(np.argmin(means[1:-1])) + 1
    measured = f"{middle:.4f} (lowest: layer {dip}, {means[dip]:.4f})"
    record.further("the plateau between them, on average", "above 0.95", measured, middle > 0.95)


def selection(run: Run, scale: Scale, calibration: LongTensor, cosines: Tensor, seeds: range, quick: bool) -> None:
    """Check point 3: the position of the skipped run, at an equal fraction of skipped MLPs."""
    stack, layers = scale.stack, len(scale.stack)
    first, last = cold_layers(layers)
    for k in (3,) if quick else (3, 7):
        rows: list[list[Any]] = []
        losses: dict[str, float] = {}
        points: dict[str, list[tuple[float, float]]] = {}

        def score(
            name: str,
            results: list[tuple[float, np.ndarray]],
            k: int = k,
            rows: Any = rows,
            losses: Any = losses,
            points: Any = points,
        ) -> float:
            losses[name] = float(np.mean([loss for loss, _ in results]))
            skipped = np.stack([skips for _, skips in results])  # [results, rows, continuation, layers]
            rows.append([name, losses[name], f"{skipped.mean():.1%}", f"{skipped.all(axis=1).mean():.1%}"])
            group = "saturated, fixed thresholds" if name.startswith("saturated, 0") else name
            points.setdefault(group, []).append((100 * float(skipped.mean()), losses[name]))
            return float(skipped.mean()) * layers / k

        params = calibrated(stack, calibration, k)
        print(f"k = {k}: the calibrated threshold is {params['threshold']:.4f}")
        reached = share(stack, params, calibration) * layers / k
        name = f"fraction of MLPs that the calibrated threshold skips on its calibration text, k = {k}"
        run.further(name, "at least 95 % of k", f"{reached:.1%}", reached >= 0.95)

        achieved = score("saturated, calibrated", [scale.plan(**params)])
        for fixed in [] if quick else [0.95, 0.97, 0.975, 0.98, 0.985, 0.99]:
            score(f"saturated, {fixed}", [scale.plan(**params | {"threshold": fixed})])
        # Random runs are omitted at regular intervals, so that they skip no more than the calibrated rule does.
        most = scale.test.tokens.shape[1] - PROMPT - 1
        thinned = {"interleave": [min(int(achieved / (1 - achieved)), most), 1]} if achieved < 1 else {}
        for placement, name in (("random", "random in the window"), ("anywhere", "random anywhere")):
            score(name, [scale.plan(**params | thinned | {"placement": placement, "seed": seed}) for seed in seeds])
        if not quick:
            means = cosines.mean(dim=0)
            top = sorted(range(first, layers - last), key=lambda layer: -float(means[layer]))[:k]
            loss, ran = scale.of(with_policy(stack, planned(stack, max_skips=k, threshold=0), Static(stack, top)))
            score("static, the k most saturated", [(loss, ~ran[..., 1])])
            held = Scale(stack, calibration)
            windows = {
                start: {"max_skips": k, "threshold": -1.0, "cold": [start, layers - start - k]} | ALWAYS
                for start in range(first, layers - last - k + 1)
            }
            best = min(windows, key=lambda start: held.plan(**windows[start])[0])
            name = f"fixed window {best} to {best + k - 1}, best on calibration text"
            score(name, [scale.plan(**windows[best])])
            score("calibrated, no cold layers", [scale.plan(**calibrated(stack, calibration, k, cold=(0, 0)))])
        title = f"At most {k} MLPs per token ({k / layers:.1%}), every generated token (base {scale.base:.3f} nats)"
        run.table(title, ["placement", "nats", "MLPs skipped", "skipped in all rows"], rows)
        run.figure(f"ffn-skip-{k}", Scatter("MLPs skipped, %", "nats per token", points))
        for better, worse in pairwise(["saturated, calibrated", "random in the window", "random anywhere"]):
            measured = f"{losses[better]:.3f} / {losses[worse]:.3f}"
            claim = run.main if better.startswith("saturated") else run.further
            claim(f"{better} against {worse}, k = {k}", "lower loss", measured, losses[better] < losses[worse])


def share(stack: Stack, params: dict[str, Any], tokens: LongTensor) -> float:
    """Return the fraction of MLPs that a plan skips when all but the first of these tokens are generated."""
    view = lamella.apply(stack, planned(stack, **params))
    trace = traced(view)
    lamella.parallel(view, tokens, torch.ones(len(tokens), dtype=torch.long), logits_to_keep=1)
    return float(1 - trace.joined()[0][:, 1:, :, 1].mean())


def recipe(record: Record, scale: Scale, calibration: LongTensor) -> None:
    """Report, without a claim, the contributions of the paper's warm-up and interleaving."""
    rows, params = [], calibrated(scale.stack, calibration, 7)
    for name, options in {
        "as in the paper": {"warmup": 16, "interleave": [5, 1]},
        "no warm-up": {"interleave": [5, 1]},
        "no interleaving": {"warmup": 16},
        "neither": {},
    }.items():
        loss, skipped = scale.plan(**params | options)
        after = skipped[:, options.get("warmup", 0) :].mean()
        rows.append([name, loss, f"{skipped.mean():.1%}", f"{after:.1%}"])
    record.table("Warm-up and interleaving at k = 7", ["", "nats", "MLPs skipped", "warm-up aside"], rows)


def repeated(ids: LongTensor) -> float:
    """Return the fraction of four-token sequences that occurred before in their row."""
    shares = []
    for row in ids.tolist():
        grams = [tuple(row[i : i + LETTERS]) for i in range(len(row) - LETTERS + 1)]
        shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares))


def whole_layers(record: Record, scale: Scale, calibration: LongTensor, new: int) -> None:
    """Report point 4 without a claim: skipping MLPs against whole layers at about equal compute."""
    stack = scale.stack
    model, layers = ModelReference.of(stack), len(stack)
    k, blocks = 3, 2.25  # an MLP is 75 % of a block of SmolLM2
    views = {"3 MLPs, calibrated": lamella.apply(stack, planned(stack, **calibrated(stack, calibration, k)))}
    for gone in ((13, 14), (9, 10)):
        path = PhasedPath(prefill=list(range(layers)), decode=[i for i in range(layers) if i not in gone])
        plan = Plan(model=model, path={"text": path})
        views[f"blocks {gone[0]} and {gone[1]}"] = lamella.apply(stack, plan)
    held = Scale(stack, calibration)

    def left(threshold: float) -> float:
        return layers - float(held.of(exiting(threshold))[1][..., 0].sum(-1).mean())

    def exiting(threshold: float) -> Any:
        return with_policy(stack, planned(stack, max_skips=k, threshold=0), EarlyExit(stack, threshold))

    low, high = 0.8, 1.0
    for _ in range(7):  # find the threshold that skips the same number of blocks on calibration text
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > blocks else (low, middle)
    views["early exit, keys from the exiting hidden state"] = exiting(high)

    prompts = scale.test.tokens[:, :PROMPT]
    rows = [["whole model", scale.base, "", repeated(continued(stack.model, prompts, new))]]
    for name, view in views.items():
        loss, ran = scale.of(view)
        skipped = (0.25 * (~ran[..., 0]) + 0.75 * (~ran[..., 1])).sum(-1).mean()
        view = exiting(high) if name.startswith("early") else view
        rows.append([name, loss, float(skipped), repeated(continued(view, prompts, new))])
    columns = ["generated tokens skip", "nats", "blocks of work saved", "repeated 4-grams"]
    record.table(f"MLPs or whole layers (greedy answers of {new} tokens)", columns, rows)


def continued(model: Any, prompts: LongTensor, new: int) -> LongTensor:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, prompts.shape[1] :]


def speed(record: Record, stack: Stack, quick: bool) -> None:
    """Check point 5: decode speed, without warm-up and full tokens, which a median over steps would not show.

    The benchmark decodes from a random prompt, so the threshold is calibrated on random text too.
    """
    drawn = torch.randint(stack.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    params = calibrated(stack, continued(stack.model, drawn, 24 if quick else 48), 8)
    plan, nothing = (planned(stack, **params | change) for change in ({}, {"threshold": 1.0}))
    models = {"whole": stack.model, "k": lamella.apply(stack, plan), "never": lamella.apply(stack, nothing)}
    rows = []
    for batch in (1,) if quick else (1, 8):
        skipped = skipped_in_bench(stack, plan, batch)
        work = [(1.0, 1.0 - float(each)) for each in skipped]
        expected = PolicyReference(name="ffn-skip", params=plan.policy.params, work=work)
        ideal = measure_step(stack, batch=batch).speedup(plan.model_copy(update={"policies": {"text": expected}}))
        timings = bench(models, [batch], prompt=64, tokens=10 if quick else 128, rounds=3 if quick else 7)
        gained, overhead = timings["k"][0].decode_speedup, timings["never"][0].decode_speedup
        rows.append([batch, f"{skipped.mean():.1%}", str(gained), ideal, gained.median / ideal])
        rows.append([batch, "0.0%", str(overhead), 1.0, overhead.median])
        if batch == 1:
            saved = Measured(*(1 - 1 / each for each in (gained.median, gained.low, gained.high)))
            record.further("decode time saved, batch 1", "5 % or more", saved, saved.at_least(0.05))
    title = "Decode speed at k = 8, interleaved runs; warm-up 0 and interleave (1, 0)"
    record.table(title, ["batch", "MLPs skipped", "speed-up", "ideal at that fraction", "fraction of the ideal"], rows)


def skipped_in_bench(stack: Stack, plan: Plan, batch: int) -> Tensor:
    """Return the fraction of MLPs that the benchmark's own tokens skip in each layer [layers]."""
    view = lamella.apply(stack, plan)
    trace = traced(view)
    bench({"k": view}, [batch], prompt=64, tokens=16, rounds=1)
    ran, prompt, _ = trace.joined()
    return torch.from_numpy(1 - ran[~prompt][..., 1].mean(axis=0))


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    stack = lamella.open("smollm2")
    text, planning = lamella.load_text("pydoc", "test"), lamella.load_text("pydoc", "calibration")
    tokenizer = open_tokenizer("smollm2")
    tokens = lamella.windows(tokenizer, text, 3 if quick else 16, 96 if quick else 192, seed)
    calibration = lamella.windows(tokenizer, planning, 3 if quick else 2, 72 if quick else 256, seed)
    run.data = f"{text.provenance(tokens)}, the first {PROMPT} tokens of each sequence are the prompt"
    run.part("exactness, nano Llama", exact_nano, seed)
    run.part("exactness, SmolLM2", exact_smollm2, stack, tokens[: 2 if quick else 4, : 28 if quick else 40])
    cosines = saturation(stack, calibration)
    run.part("profile", profile, cosines)
    scale = Scale(stack, tokens)
    run.part("selection", selection, scale, calibration, cosines, range(1 if quick else 5), quick)
    if not quick:
        run.part("recipe", recipe, scale, calibration)
        run.part("whole layers", whole_layers, scale, calibration, 96)
    run.part("speed", speed, stack, quick)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer sequences, baselines and steps, under a minute"))
