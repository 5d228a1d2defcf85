"""LoRA-Drop at small scale: a character-level Llama for quality, SmolLM2-135M-Instruct for speed.

The main claim has two parts, each over five models: trained corrections recover the larger part of what untrained reuse
loses, and with half of the layers refreshed every four steps, as in the paper, the loss is close to that of the whole
model. Further checks are the other modes of reuse, of which skipping is the control, that the loss grows with the
fraction of droppable layers and with the interval between refreshes, and that decoding is as fast as its fraction of
layer computation allows.

    python reproductions/lora_drop.py            # about an hour on one core; an interrupted run resumes
    python reproductions/lora_drop.py --quick    # a smaller model, for which training gains less than the claims ask
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import TEXTS, nats, prose, trained

import lamella
from lamella.evaluate import bench, measure_step
from lamella.files import Work
from lamella.methods.lora_drop import spread_layers, tune
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig, collate
from lamella.zoo import open_tokenizer

MARGINS = {"output": 0.9, "delta": 0.09, "skip": 0.17}  # required gain by training, in nats
MODES = tuple(MARGINS)
CLOSE = 0.05  # nats above the whole model that count as close


def planned(stack: Stack, droppable: list[int], **params: Any) -> Plan:
    every = params.get("refresh_every", 4)
    work = [(1 / every, 1 / every) if layer in droppable else (1.0, 1.0) for layer in range(len(stack))]
    reference = PolicyReference(name="lora-drop", params={"droppable": droppable, **params}, work=work)
    return Plan(model=ModelReference.of(stack), policies={stack.stack: reference})


@dataclass(frozen=True)
class Healing:
    """A small model, the training data of its corrections, and the test data."""

    stack: Stack
    train: list[Sample]
    test: list[Sample]

    def losses(self, plan: Plan, steps: int, **options: Any) -> dict[str, Any]:
        """Train under a plan; return the nats per token, over all tokens and by the distance from the last refresh."""
        config = TrainConfig(steps=steps, lr=3e-3, batch=16, save_every=steps)
        with tempfile.TemporaryDirectory() as out:
            with torch.enable_grad():
                plan = tune(self.stack, plan, self.train, config=config, work=Work(Path(out)), **options).plan
            view = lamella.apply(self.stack, plan)
            return {"all": nats(view, self.test), "by distance": by_distance(view, self.test)}


def base_of(seed: int, quick: bool) -> Healing:
    """Return a model that was trained with a seed; all seeds are tested on the same text."""
    sizes = {"layers": 6, "hidden": 64, "steps": 300} if quick else {"layers": 8, "hidden": 128, "steps": 1500}
    length = 48 if quick else 128
    train = prose("calibration", 1600 if quick else 20000, length, seed, TEXTS)
    test = prose("test", 32 if quick else 128, length, 1, TEXTS)
    return Healing(trained(train, **sizes, seed=seed, name="texts"), train, test)


def corrected(
    seed: int, quick: bool, reuse: str, steps: int, half: bool = False, train_keys: str = "match"
) -> dict[str, Any]:
    """Return the loss of the whole model, and with and without trained corrections.

    With ``half``, half of the layers are droppable, all but the first and the last; otherwise every other layer.
    """
    healing = base_of(seed, quick)
    layers = len(healing.stack)
    droppable = spread_layers(layers, layers // 2, 1, 1) if half else list(range(1, layers, 2))[: layers // 2 - 1]
    plan = planned(healing.stack, droppable, reuse=reuse)
    before = nats(lamella.apply(healing.stack, plan), healing.test)
    found = healing.losses(plan, steps, train_keys=train_keys)
    return {"model": nats(healing.stack.model, healing.test), "untrained": before, "trained": found["all"],
            "by distance": found["by distance"]}  # fmt: skip


def ladder(run: Run, seeds: Sequence[int], steps: int) -> None:
    """Check points 2 and 5: the loss with and without training, for every mode of reuse, and its drift."""
    run.freeze(
        "mean over models of the gain by training, of its share of the loss, and of the loss above the whole model",
        seeds,
        steps=steps,
        margins=MARGINS,
        close=CLOSE,
        refresh_every=4,
    )
    rows, drifts = [], []
    for reuse, half in (*product(MODES, [False]), ("output", True)):
        found = [
            run.arm(f"reuse={reuse}, seed {seed}, half {half}", corrected, seed, run.quick, reuse, steps, half)
            for seed in seeds
        ]
        gain = Measured.over_seeds([each["untrained"] - each["trained"] for each in found])
        above = Measured.over_seeds([each["trained"] - each["model"] for each in found])
        share = Measured.over_seeds(
            [(each["untrained"] - each["trained"]) / (each["untrained"] - each["model"]) for each in found]
        )
        means = [fmean(each[key] for each in found) for key in ("model", "untrained", "trained")]
        rows.append([reuse, "half" if half else "every other one", *means, str(gain), str(share), str(above)])
        if half:
            run.main("loss above the whole model, half of the layers, every 4 steps", f"at most {CLOSE} nats", above,
                     above.at_most(CLOSE))  # fmt: skip
            continue
        margin = MARGINS[reuse]
        check = run.main if reuse == "output" else run.further  # the paper's formula; skipping is the control
        check(f"training, reuse={reuse}", f"gains at least {margin} nats", gain, gain.at_least(margin))
        if reuse == "output":
            run.main("share of the loss of untrained reuse that training recovers", "at least 0.5", share,
                     share.at_least(0.5))  # fmt: skip
        run.further(f"above the model, reuse={reuse}", "every mode costs something", above, above.at_least(0))
        distances = [fmean(each["by distance"][k] for each in found) for k in range(4)]
        drifts.append([reuse, *distances])
        if reuse != "skip":  # skip mode has no anchor and therefore no drift
            far = Measured.over_seeds([each["by distance"][3] - each["by distance"][1] for each in found])
            run.further(f"drift, reuse={reuse}", "more loss 3 steps from a refresh than 1", far, far.at_least(0))
    columns = ["reuse", "layers", "model", "untrained", "trained", "gain", "share of the loss", "above the model"]
    run.table(f"Nats per token, refreshed every 4 steps, mean of {len(seeds)} models", columns, rows)
    alternating = [row for row in rows if row[1] == "every other one"]
    bars = {
        name: [row[place] for row in alternating] for place, name in ((2, "model"), (3, "untrained"), (4, "trained"))
    }
    reuses = [row[0] for row in alternating]
    run.figure("lora-drop-reuse", Bars("what a skipped layer reuses", "nats per token", bars, reuses))
    run.table("Drift: nats per token by steps since the refresh", ["reuse", "0", "1", "2", "3"], drifts)
    if not run.quick:
        visible = [
            [reuse, *(run.arm(f"reuse={reuse}, seed {seeds[0]}, keys {keys}", corrected, seeds[0], False, reuse, steps,
                              train_keys=keys)["trained"] for keys in ("match", "release"))]
            for reuse in MODES
        ]  # fmt: skip
        title = "Visible keys in training, first model: nats per token"
        run.table(title, ["reuse", "as in serving", "all, as released"], visible)


def by_distance(view: Any, test: list[Sample]) -> list[float]:
    """Return the loss 0 to 3 steps from the last refresh."""
    sums, counts = torch.zeros(4), torch.zeros(4)
    for start in range(0, len(test), 16):
        batch = collate(test[start : start + 16])
        given = batch["input_ids"], batch["prompt_lengths"], batch["attention_mask"]
        logits = lamella.parallel(view, *given).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        columns = torch.arange(labels.shape[1])[None]
        distance = (columns - batch["prompt_lengths"][:, None] + 1).clamp(min=0) % 4
        for place in range(4):
            where = (distance == place) & (labels != -100)
            sums[place] += loss[where].sum()
            counts[place] += where.sum()
    return (sums / counts).tolist()


def sweep(run: Run, healing: Healing, steps: int) -> None:
    """Check point 3: the loss over p and c, trained at each point, and which points are safe."""
    stack, counts, every = healing.stack, range(1, 6), (2, 4, 8)
    base = nats(stack.model, healing.test)
    rows = []
    for reuse in ("output", "delta"):
        table = {}
        for count, c in product(counts, every):
            plan = planned(stack, spread_layers(len(stack), count, 1, 1), refresh_every=c, reuse=reuse)
            arm = run.arm(f"reuse={reuse}, {count} layers, c = {c}", healing.losses, plan, steps)
            table[count, c] = arm["all"]
        for count in counts:
            rows.append([reuse, f"{count / len(stack):.2f}", *(table[count, c] for c in every)])
        in_p = all(table[a, c] <= table[b, c] for c in every for a, b in pairwise(counts))
        in_c = all(table[n, a] <= table[n, b] for n in counts for a, b in pairwise(every))
        run.further(f"loss over p, reuse={reuse}", "grows with the fraction of droppable layers", str(in_p), in_p)
        run.further(f"loss over c, reuse={reuse}", "grows with the steps between refreshes", str(in_c), in_c)
        safe = [f"p={count / len(stack):.2f} c={c}" for (count, c), loss in table.items() if loss <= base + 0.05]
        rows.append([f"{reuse}: safe within 0.05 nats", ", ".join(safe) or "none", *[""] * len(every)])
    run.table(f"Sweep, nats per token (model {base:.3f})", ["reuse", "p", *(f"c = {c}" for c in every)], rows)


def speed(record: Record, stack: Stack, quick: bool) -> None:
    """Check point 4: decoding time against the cost model, and the size of the cache in bytes."""
    layers = spread_layers(len(stack), 15)
    view = lamella.apply(stack, planned(stack, layers))
    times = measure_step(stack)
    timings = bench(
        {"whole": stack.model, "p = 0.5, c = 4": view},
        [1],
        prompt=64,
        tokens=16 if quick else 256,
        rounds=2 if quick else 3,
    )
    timing = timings["p = 0.5, c = 4"][0]
    predicted = times.speedup(view.lamella_plan)
    share = Measured.over_rounds(timing.decode_speedup, predicted)
    record.table(
        "Decoding SmolLM2, batch 1, half of the layers refreshed every 4 steps",
        ["cost model", "measured", "share"],
        [[predicted, str(timing.decode_speedup), share.figure]],
    )
    record.further("decode speed-up / cost model", "at least 0.85", share, share.at_least(0.85))


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    real = lamella.open("smollm2")
    text = lamella.load_text("pydoc", "test")
    tokens = lamella.windows(open_tokenizer("smollm2"), text, 4, 64, seed)
    run.data = f"{text.provenance(tokens)}; characters of Python's documentation and library"
    run.part("speed", speed, real, quick)

    ladder(run, range(seed, seed + (1 if quick else 5)), 100 if quick else 300)
    if not quick:
        sweep(run, base_of(seed, quick), 150)


if __name__ == "__main__":
    quick = "a smaller model, for which training gains less than the claims ask; under a minute"
    raise SystemExit(main(experiment, quick=quick))
