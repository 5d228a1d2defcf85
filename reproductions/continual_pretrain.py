"""Continual pre-training at small scale: a byte-level Llama trained on prose, then code; SmolLM2-135M for healing.

D0 is the Python language reference, D1 the source code of the standard library. After D0, a second stage with the same
number of steps continues in several ways: at the minimum learning rate, at the maximum, re-warmed, and re-warmed with
replay. Controls are D1 alone, both datasets together from scratch with twice the compute, adapters, and averaged
weights. Two findings on schedules follow: re-warming costs loss even if the data distribution stays the same, and
infinite schedules avoid that cost. Last, SmolLM2 without 4 of its 30 layers is healed on one domain, with general prose
replayed. The main claim compares replay with training on both texts over eight seeds.

    python reproductions/continual_pretrain.py            # about two hours on one core; an interrupted run resumes
    python reproductions/continual_pretrain.py --quick    # the byte-level claims on less text
"""

from __future__ import annotations

import ast
import copy
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import built, digest, llama, scratch
from torch import Tensor
from transformers import LlamaForCausalLM

import lamella
from lamella.data import windows
from lamella.files import Work
from lamella.methods.continual_pretrain import TRAINING, ContinualDataset, ContinualPretrainer, continual_pretrain
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Constant, Cosine, Infinite, Sample, blocks, infinite, mean_loss, rewarm
from lamella.zoo import open_tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
ENOUGH = 400_000  # characters of code
CONTEXT, BATCH = 64, 12
ALPHAS = (0.01, 0.05, 0.25, 0.5)


def source_code(split: str, package: str = "") -> str:
    """Return the code of Python's standard library, or of one package of it, alternating between the splits.

    Docstrings and comments are removed, since they resemble the prose of D0.
    """
    files = [file for file in sorted((STDLIB / package).glob("*.py")) if file.name[0] != "_"]
    code = ""
    for file in files[split == "test" :: 2]:
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
        code += ast.unparse(tree) + "\n\n"
        if len(code) > ENOUGH:
            break
    return code


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def crops(text: str, count: int, seed: int) -> list[Sample]:
    """Return random excerpts of a text as byte samples."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    drawn = random.Random(seed)
    starts = [drawn.randrange(len(data) - CONTEXT) for _ in range(count)]
    return blocks(torch.stack([data[start : start + CONTEXT] for start in starts]), loss_on="all")


@dataclass(frozen=True)
class Size:
    """Scale: the byte-level Llama, its maximum learning rate (the minimum is a tenth), and the steps of a stage."""

    hidden: int
    layers: int
    high: float
    steps: int
    seed: int

    @property
    def low(self) -> float:
        return self.high / 10

    @property
    def cosine(self) -> Callable[[int], Cosine]:
        return partial(rewarm, lr=self.high)

    def untrained(self) -> Stack:
        channels = 8 * self.hidden // 3
        config = llama(256, self.hidden, self.layers, context=CONTEXT, channels=channels, tied=False)
        torch.manual_seed(self.seed)
        return Stack(LlamaForCausalLM(config).eval(), name="byte-level Llama")

    def runner(self, stack: Stack, schedule: Any, **options: Any) -> ContinualPretrainer:
        every = max(self.steps // 25, 1)
        config = replace(TRAINING, batch=BATCH, seed=self.seed, eval_every=every)
        config = replace(config, schedule=schedule) if isinstance(schedule, str) else config.with_schedule(schedule)
        return ContinualPretrainer(stack, out=scratch("cpt"), config=config, **options)


class Texts:
    """Samples of both datasets: new ones for every stage, and fixed ones that no stage sees."""

    def __init__(self, held_out: int, seed: int) -> None:
        self.text = {
            "D0": {split: str(lamella.load_text("pydoc", split)) for split in ("calibration", "test")},
            "D1": {split: source_code(split) for split in ("calibration", "test")},
        }
        self.seed = seed
        self.held_out = {name: crops(each["test"], held_out, seed) for name, each in self.text.items()}

    def dataset(self, name: str, steps: int, stage: int, held_out: int = 0) -> ContinualDataset:
        """Return new samples for a stage, with some of the held-out ones for curves."""
        samples = crops(self.text[name]["calibration"], steps * BATCH, 100 * self.seed + stage + 1)
        return ContinualDataset(name, samples, self.held_out[name][:held_out])

    def losses(self, stack: Stack) -> list[float]:
        """Return the loss on D0, on D1, and their mean."""
        both = [mean_loss(stack.model, each, batch=64) for each in self.held_out.values()]
        return [*both, sum(both) / 2]


def trained(
    size: Size,
    stack: Stack,
    dataset: ContinualDataset,
    steps: int,
    schedule: Any,
    past: ContinualDataset | None = None,
    **options: Any,
) -> Stack:
    """Train one stage with a fresh optimizer."""
    run = size.runner(stack, schedule, **options)
    if past is not None:
        run.remember(past)
    run.fit(dataset, steps, save_every=steps, log_every=steps)
    return run.healed().stack


@torch.no_grad()
def averaged(ours: Stack, theirs: Stack) -> Stack:
    model = copy.deepcopy(ours.model)
    for mine, other in zip(model.parameters(), theirs.model.parameters(), strict=True):
        mine.copy_((mine + other) / 2)
    return Stack(model)


def first_stage(texts: Texts, size: Size, steps: int) -> Stack:
    """Train the model on D0; cached."""
    old = texts.dataset("D0", steps, 0)

    def build(folder: Path) -> dict[str, Any]:
        trained(size, size.untrained(), old, steps, size.cosine).model.save_pretrained(folder)
        return {"size": asdict(size), "steps": steps}

    return built(
        f"continual-{size.layers}x{size.hidden}-{size.high:g}-{digest(old.samples)}-{steps}-{size.seed}", build
    )


def stages(run: Run, texts: Texts, size: Size, first: int) -> None:
    """Train D0 for ``first`` steps, then continue with D1 in every way."""
    steps, cosine = size.steps, size.cosine
    base = first_stage(texts, size, first)
    old, new = texts.dataset("D0", first, 0), texts.dataset("D1", steps, 1)
    start = texts.losses(base)
    union = ContinualDataset("both", [*old.samples, *new.samples])
    go_on = partial(trained, size, base, new, steps)
    ways: dict[str, Callable[[], Stack]] = {
        "constant, lowest rate": partial(go_on, Constant(size.low)),
        "re-warmed": partial(go_on, cosine),
        **{
            f"re-warmed, {alpha:.0%} replay": partial(go_on, cosine, past=old, replay=alpha)
            for alpha in (ALPHAS[:3] if run.quick else ALPHAS)
        },
        "both from scratch": partial(trained, size, size.untrained(), union, first + steps, cosine),
        "D1 from scratch": partial(trained, size, size.untrained(), new, steps, cosine),
    }
    if not run.quick:
        ways["constant, highest rate"] = partial(go_on, Constant(size.high, steps // 100))
        ways["re-warmed, adapters of rank 8"] = partial(go_on, cosine, lora=8)

    def judged(name: str) -> list[list[float]]:
        stack = ways[name]()
        more = [averaged(base, stack)] if name == "re-warmed" else []
        return [texts.losses(each) for each in (stack, *more)]

    arms = {name: run.arm(f"{first} steps of D0, {name}", judged, name) for name in ways}
    found = {name: losses[0] for name, losses in arms.items()}
    found["average of before and re-warmed"] = arms["re-warmed"][1]
    rows: list[list[Any]] = [[f"none: after {first} steps of D0", 0, *start]]
    rows += [[name, first + steps if name == "both from scratch" else steps, *each] for name, each in found.items()]
    title = f"Held-out nats per byte after {first} steps of D0 and a second stage of {steps}"
    run.table(title, ["second stage", "its steps of compute", "D0", "D1", "mean"], rows)
    points = {name: [(d0, d1)] for name, _, d0, d1, _ in rows}
    axes = [f"held-out nats per byte of {data}" for data in ("D0, old", "D1, new")]
    run.figure(f"continual-pretrain-{first}", Scatter(*axes, points))
    judge(run, found, start, f"{first} steps of D0: ")


def judge(record: Record, found: dict[str, list[float]], start: list[float], where: str) -> None:
    slow, plain, scratch_d1 = (found[name] for name in ("constant, lowest rate", "re-warmed", "D1 from scratch"))
    gain = 1 - plain[1] / slow[1]
    record.further(f"{where}re-warmed against the lowest rate, D1", "5 % lower", f"{gain:.1%}", gain >= 0.05)
    lost = {alpha: found[f"re-warmed, {alpha:.0%} replay"][0] - start[0] for alpha in ALPHAS
            if f"re-warmed, {alpha:.0%} replay" in found}  # fmt: skip
    forgot = plain[0] - start[0]
    slowly = slow[0] - start[0]
    measured = f"{forgot:.3f} against {slowly:.3f}"
    record.further(f"{where}forgetting without replay", "more than at the lowest rate", measured, forgot > slowly)
    curve = [forgot, *lost.values()]
    falls = all(a > b for a, b in pairwise(curve))
    record.further(f"{where}forgetting over alpha", "falls", ", ".join(f"{each:.3f}" for each in curve), falls)
    for alpha, least in ((0.01, 0.1), (0.05, 0.3), (0.25, 0.8)):
        share = 1 - lost[alpha] / forgot
        record.further(
            f"{where}forgetting removed by {alpha:.0%} replay", f"{least:.0%}", f"{share:.0%}", share >= least
        )
    for alpha, most in ((0.05, 0.01), (0.25, 0.03)):
        cost = found[f"re-warmed, {alpha:.0%} replay"][1] / plain[1] - 1
        record.further(f"{where}cost of {alpha:.0%} replay, D1", f"at most {most:.0%}", f"{cost:.1%}", cost <= most)
    worst = max(losses[1] for name, losses in found.items() if name.startswith("re-warmed") and "adapters" not in name)
    measured = f"{worst:.3f} / {scratch_d1[1]:.3f}"
    record.further(f"{where}every re-warmed arm on D1", "below D1 from scratch", measured, worst < scratch_d1[1])


def against_both(size: Size, first: int, held_out: int) -> list[float]:
    """Return the mean loss with 25 % replay, and that of both texts from scratch with the compute of both stages."""
    texts = Texts(held_out, size.seed)
    old, new = texts.dataset("D0", first, 0), texts.dataset("D1", size.steps, 1)
    base = first_stage(texts, size, first)
    replayed = trained(size, base, new, size.steps, size.cosine, past=old, replay=0.25)
    union = ContinualDataset("both", [*old.samples, *new.samples])
    together = trained(size, size.untrained(), union, first + size.steps, size.cosine)
    return [texts.losses(each)[2] for each in (replayed, together)]


def main_claim(run: Run, size: Size, held_out: int, seeds: Sequence[int]) -> None:
    """Replay against training on both texts, paired over seeds: the same initial weights, text and held-out samples."""
    long = (2 if run.quick else 4) * size.steps
    run.freeze(
        "mean over seeds of the ratio of mean losses, 25 % replay to both from scratch",
        seeds,
        steps=size.steps,
        first=long,
        rate=size.high,
        hidden=size.hidden,
        layers=size.layers,
    )
    rows = []
    for first, add in ((size.steps, run.further), (long, run.main)):
        found = [
            run.arm(f"{first} steps of D0 against both, seed {seed}", against_both, replace(size, seed=seed), first,
                    held_out)
            for seed in seeds
        ]  # fmt: skip
        apart = Measured.over_seeds([100 * (replayed / together - 1) for replayed, together in found])
        rows += [[first, seed, *each] for seed, each in zip(seeds, found, strict=True)]
        name = f"{first} steps of D0: mean at 25 % replay against both from scratch, of more compute, % higher"
        add(name, "at most 3", apart, apart.at_most(3))
    columns = ["steps of D0", "seed", "25 % replay", "both from scratch"]
    run.table("Held-out nats per byte, mean of D0 and D1", columns, rows)


def same_distribution(record: Record, texts: Texts, size: Size, base: Stack) -> None:
    """Train on new samples of D0: the effect of re-warming alone."""
    curves = {}
    for name, schedule in {"re-warmed": size.cosine, "constant, lowest rate": Constant(size.low)}.items():
        run = size.runner(base, schedule)
        run.fit(texts.dataset("D0", size.steps, 2, held_out=96), size.steps, save_every=size.steps)
        curves[name] = run.curves
    rows = [
        [step, *(dict(each.of("D0"))[step] for each in curves.values())] for step, _ in curves["re-warmed"].of("D0")
    ]
    record.table("New samples of D0: held-out nats per byte", ["step", *curves], rows[:6] + rows[6::4])
    rise, slow = (each.spike("D0") for each in curves.values())
    record.further("loss while re-warming on the same data", "rises by 1 %", f"{rise:.2%}", rise >= 0.01)
    record.further("loss at the lowest rate on the same data", "rises by less than 1 %", f"{slow:.2%}", slow < 0.01)
    first, last = curves["re-warmed"].of("D0")[0][1], curves["re-warmed"].of("D0")[-1][1]
    record.further("loss after the decay", "below its initial value", f"{last:.3f} / {first:.3f}", last < first)


def endless(record: Record, texts: Texts, size: Size, count: int, cooldowns: Sequence[Any]) -> None:
    """Train stages of D0 without shift: one cosine per stage, or an infinite schedule with annealed branches."""
    steps, anneal = size.steps, round(0.15 * size.steps)
    schedules: dict[str, Any] = {"repeated cosine": size.cosine}
    for cooldown in cooldowns:
        schedules[f"infinite, {cooldown}"] = infinite(steps, size.high, anneal=None, cooldown=cooldown)
    rows, finals, rises, gains = [], {}, {}, []
    for name, schedule in schedules.items():
        run, rises[name] = size.runner(size.untrained(), schedule, replay=0), []
        for stage in range(1, count + 1):
            goes_on = isinstance(schedule, Infinite)
            extra = 0 if goes_on or stage < count else anneal  # all arms end with the same number of steps
            new = texts.dataset("D0", steps + anneal, 10 + stage, held_out=96)
            run.fit(ContinualDataset(f"D0, part {stage}", new.samples, new.held_out), steps + extra, save_every=steps)
            rises[name] += [run.curves.spike(f"D0, part {stage}")] if stage > 1 else []
            before = finals[name] = texts.losses(run.healed().stack)[0]
            if goes_on:
                finals[name] = texts.losses(run.anneal(anneal).stack)[0]
                gains.append(before / finals[name] - 1)
            rows.append([name, stage, before, finals[name]])
    title = f"{count} stages of {steps} steps of D0, anneals of {anneal}: held-out nats per byte"
    record.table(title, ["schedule", "stage", "not annealed", "annealed"], rows)
    if count > 2:  # with fewer and shorter stages, losses have not converged
        spread = max(finals.values()) / min(finals.values()) - 1
        record.further("final losses of all schedules", "within 1 %", f"{spread:.2%}", spread <= 0.01)
    cosine = rises.pop("repeated cosine")
    record.further("loss at each restart of the cosine", "rises", _shares(cosine), min(cosine) > 0)
    calm = [each for values in rises.values() for each in values]
    measured = f"{_shares(calm)} against {_shares(cosine)}"
    record.further(
        "loss where infinite schedules continue", "rises less than at any restart", measured, max(calm) < min(cosine)
    )
    inside = all(0.01 <= gain <= 0.05 for gain in gains)
    record.further("a checkpoint against its annealed branch", "1 to 5 % worse", _shares(gains), inside)


def _shares(values: Sequence[float]) -> str:
    return ", ".join(f"{each:.2%}" for each in values)


def healing(run: Run) -> None:
    """Heal SmolLM2 without 4 of its 30 layers on the source code of one package."""
    seed = run.seed
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")

    def cut(text: str, count: int) -> Tensor:
        return windows(tokenizer, text, count, 256, seed)

    prose = {split: lamella.load_text("pydoc", split) for split in ("calibration", "test")}
    domain = {split: source_code(split, "asyncio") for split in ("calibration", "test")}
    new, old = (
        blocks(cut(domain["calibration"], 120), loss_on="all"),
        blocks(cut(prose["calibration"], 120), loss_on="all"),
    )
    held_out = {
        name: blocks(cut(each["test"], 24), loss_on="all") for name, each in {"new": domain, "old": prose}.items()
    }
    plan = lamella.make_plan("shortgpt", stack, cut(prose["calibration"], 4))[4]
    steps = 80  # of 4 x 256 tokens
    whole = {name: mean_loss(stack.model, each) for name, each in held_out.items()}
    view = lamella.apply(stack, plan)
    before = {name: mean_loss(view, each) for name, each in held_out.items()}
    arms: dict[str, dict[str, Any]] = {
        "constant 1e-5": {"config": {"schedule": "constant", "lr": 1e-5}},
        "re-warmed to 1e-4": {"config": {"lr": 1e-4}},
        "re-warmed to 1e-4, 25 % replay": {"config": {"lr": 1e-4}, "past": old, "replay": 0.25},
    }

    def healed(name: str) -> dict[str, float]:
        options = arms[name]
        config = replace(TRAINING, steps=steps, seed=seed, eval_every=steps, **options.pop("config"))
        work = Work(run.work / f"SmolLM2 {list(arms).index(name)}")
        made = continual_pretrain(stack, new, plan, config=config, held_out=held_out, work=work, **options)
        return made.log.held_out[-1].parts

    found = {name: run.arm(f"SmolLM2, {name}", healed, name) for name in arms}
    rows = [["whole model", whole["new"], whole["old"]], ["4 layers removed", before["new"], before["old"]]]
    rows += [[name, parts["new"], parts["old"]] for name, parts in found.items()]
    run.table("SmolLM2 without 4 of 30 layers: held-out nats per token", ["healed with", "asyncio", "prose"], rows)
    slow, plain, mixed = found.values()
    run.further(
        "SmolLM2: re-warmed on the domain",
        "below constant 1e-5",
        f"{plain['new']:.3f} / {slow['new']:.3f}",
        plain["new"] < slow["new"],
    )
    back = (plain["old"] - mixed["old"]) / (plain["old"] - whole["old"])
    run.further("SmolLM2: fraction of the gap on prose that 25 % replay recovers", "30 %", f"{back:.0%}", back >= 0.3)
    cost = mixed["new"] / plain["new"] - 1
    run.further("SmolLM2: its cost on the domain", "at most 3 %", f"{cost:.1%}", cost <= 0.03)


def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    size = Size(64, 2, 2e-3, 200, seed) if quick else Size(96, 3, 1e-3, 400, seed)
    short = replace(size, steps=150) if quick else size
    texts = Texts(384 if quick else 1024, seed)
    sizes = {name: len(each["calibration"]) for name, each in texts.text.items()}
    run.data = (
        f"bytes of Python's language reference (D0, {sizes['D0']}) and of its library's code (D1, {sizes['D1']}); "
        "every other topic and module is held out"
    )
    main_claim(run, size, 384 if quick else 1024, range(seed, seed + (1 if quick else 8)))
    stages(run, texts, size, size.steps)
    base = first_stage(texts, size, size.steps)
    run.part("same distribution", same_distribution, texts, short, base)
    run.part("endless", endless, texts, short, 2 if quick else 3, ["cosine"] if quick else ["cosine", "invsqrt"])
    if not quick:
        stages(run, texts, size, 4 * size.steps)  # D0 must be learnt well enough to measure forgetting
        healing(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer steps, fewer arms, no SmolLM2; under a minute"))
