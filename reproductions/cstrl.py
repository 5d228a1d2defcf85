"""CSTRL at small scale: SmolLM2-135M learns to write the first line of a docstring from the rest of it.

MIMIC-CXR needs a licence, so the sources are the bodies of docstrings of Python's standard library and of PyTorch, and
the summaries their first lines. 400 pairs have a summary; further bodies have none. Each seed draws them again, and
trains four arms with the same pairs in the same order: on summaries directly; on gap sentences that overlap most with
the summary (for bodies without a summary, with the rest of the body) and then on summaries, without an anchor or with a
Fisher-weighted one; and on random gap sentences and then summaries. Learning rates and the strength of the anchor are
tuned on other docstrings; all arms are evaluated on the same test docstrings.

Three premises come first: a gap sentence can be predicted from its source; training on summaries raises the loss of gap
sentences, so that there is something to prevent; and a teacher summarises better than a student of an eighth of its
parameters that is trained on the same pairs. Students are trained with and without distillation. A student that answers
every source alike says nothing about distillation, so that its different answers are counted before the final seeds.

    python reproductions/cstrl.py            # about 3.5 hours on one core; an interrupted run resumes
    python reproductions/cstrl.py --quick    # a small random Llama on 32 pairs, which shows no effect
"""

from __future__ import annotations

import ast
import random
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lamella
from lamella.data import Sample
from lamella.evaluate import TextScores
from lamella.evaluate.texts import rouge
from lamella.measure import Fisher
from lamella.methods.cstrl import (
    Anchor,
    Gaps,
    PairEncoder,
    SummaryPair,
    fill_gaps,
    gap_sentences,
    generate_texts,
    measure_fisher,
    new_student,
    read_fisher,
    sites_of_parameters,
    spans,
    student_loss,
    summarise,
    with_steps,
)
from lamella.methods.cstrl.recipe import GAP_TRAINING, TRAINING
from lamella.report.figures import Scatter
from lamella.stack import Model, open_model, share
from lamella.train import Task, TrainConfig, fit, mean_loss, response_loss
from lamella.zoo import open_tokenizer

PYTORCH = ("ao", "cuda", "distributed", "fx", "nn", "utils")
SOURCES = (Path(sysconfig.get_path("stdlib")), *(Path(torch.__file__).with_name(part) for part in PYTORCH))
FOREIGN = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "idlelib", "lib2to3"}
PREFIX = "summarize: "
FLOOR = 0.2 / 0.9  # final fraction of lambda, as published
HALF = 0.5  # fraction of the forgetting that an anchor should prevent
DIRECT, FREE, HELD, CHANCE = "direct", "gaps, no anchor", "gaps, anchor", "random gaps, no anchor"
LABELS, DISTILLED = "student, labels only", "student, distilled"
ALPHAS = {LABELS: 0.0, DISTILLED: 0.7}
TUNING = 100  # the seed with which rates and the strength are tuned
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)  # with F divided by its mean
SAFE = 0.6  # fraction of the forgetting that the chosen strength prevents on held-out docstrings, so that half is safe
PREDICTED, FORGOTTEN = 0.1, 0.05  # the premises, in nats


@dataclass(frozen=True)
class Scale:
    """Scale of the experiment.

    Attributes:
        labelled, held_out, test: number of pairs for training, for tuning, and for testing.
        pretrained: whether SmolLM2 is trained, or a small random Llama.
        source, summary, gap: maximum lengths in tokens.
        gap_epochs, epochs, student_epochs: number of epochs.
        fisher: number of gap sentences for F.
    """

    labelled: int = 400
    held_out: int = 100
    test: int = 600
    pretrained: bool = True
    source: int = 40
    summary: int = 14
    gap: int = 48
    gap_epochs: int = 1
    epochs: int = 2
    student_epochs: int = 20
    fisher: int = 128


FULL = Scale()
QUICK = Scale(labelled=32, held_out=16, test=16, pretrained=False, epochs=1, student_epochs=1, fisher=32)


# Data


@cache
def docstrings() -> list[SummaryPair]:
    """Return bodies of at least three sentences with their first lines, in random order.

    Each body and each first line occurs once, so that no answer to a test docstring is in the training data.
    """
    found: dict[str, str] = {}
    for root in SOURCES:
        for file in sorted(root.rglob("*.py")):
            if not FOREIGN.intersection(file.relative_to(root).parts):
                for text in _docstrings(file):
                    first, _, body = text.partition("\n\n")
                    first, body = " ".join(first.split()), " ".join(body.split())
                    if len(first.split()) >= 4 and len(first) < 100 and len(spans(body)) >= 3 and ">>>" not in body:
                        found[body] = first
    pairs = [SummaryPair(body, first) for first, body in {first: body for body, first in found.items()}.items()]
    random.Random(0).shuffle(pairs)
    return pairs


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # templates
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


class World:
    """The splits of one seed, and their encoding.

    Test pairs are the same for all seeds, held-out ones too; the others are divided again into pairs and bodies without
    a summary.
    """

    def __init__(self, scale: Scale, seed: int) -> None:
        self.scale, self.seed = scale, seed
        every = docstrings()
        self.test, self.held_out = every[: scale.test], every[scale.test : scale.test + scale.held_out]
        rest = every[scale.test + scale.held_out :]
        random.Random(seed).shuffle(rest)
        self.labelled = rest[: scale.labelled]
        self.bodies = [each.source for each in rest[scale.labelled : 2 * scale.labelled]]
        self.encoder = PairEncoder(base(scale.pretrained), open_tokenizer("smollm2"))

    def samples(self, part: Sequence[SummaryPair]) -> list[Sample]:
        return self.encoder.samples(part, PREFIX, self.scale.source, self.scale.summary)

    def gaps(self, score: str) -> list[Sample]:
        """Return the gap sentences for training; bodies without a summary are scored by the rest of the body."""
        found = gap_sentences(self.labelled, self.bodies, Gaps(score=score), self.seed)  # type: ignore[arg-type]
        return self.encoder.gaps(found.gaps, self.scale.gap)

    def gaps_of(self, part: Sequence[SummaryPair]) -> list[Sample]:
        return self.encoder.gaps(gap_sentences(part).gaps, self.scale.gap)

    def config(self, base: TrainConfig, rate: float, samples: Sequence[Sample], epochs: int) -> TrainConfig:
        batch = min(base.batch, 16)
        plain = replace(base, lr=rate, batch=batch, seed=self.seed, bf16=True, save_every=10**6, log_every=50)
        return replace(with_steps(plain, len(samples), epochs), eval_every=None)

    def gap_loss(self, model: Model) -> float:
        return mean_loss(model.model, self.gaps_of(self.test), batch=16)

    def scores(self, model: Model) -> dict[str, Any]:
        """Return ROUGE-1 of each generated test summary, the scores of all, and the loss of test gap sentences."""
        texts = self.texts(model, self.test)
        whole = TextScores.of(texts, [each.summary for each in self.test]).as_dict()
        return {"rouge1": scored(texts, self.test), "all": whole, "gap loss": self.gap_loss(model)}

    def texts(self, model: Model, part: Sequence[SummaryPair]) -> list[str]:
        return generate_texts(model, self.encoder, self.samples(part), self.scale.summary)

    def constant(self) -> float:
        """Return ROUGE-1 of the training summary that is the best constant answer to the held-out pairs."""

        def score(answer: str, part: Sequence[SummaryPair]) -> float:
            return fmean(scored([answer] * len(part), part))

        best = max({each.summary for each in self.labelled}, key=lambda answer: score(answer, self.held_out))
        return score(best, self.test)


def scored(texts: Sequence[str], part: Sequence[SummaryPair]) -> list[float]:
    """Return ROUGE-1 of each text."""
    one = rouge("rouge1")
    return [one(text, each.summary)["rouge1"] for text, each in zip(texts, part, strict=True)]


@cache
def base(pretrained: bool) -> Model:
    """Return SmolLM2, or a small random Llama with its vocabulary."""
    if pretrained:
        return open_model(lamella.open("smollm2").model, name="smollm2")
    tokenizer = open_tokenizer("smollm2")
    torch.manual_seed(0)
    config = llama(len(tokenizer), 32, 2, bos=tokenizer.bos_token_id)
    config.eos_token_id = tokenizer.eos_token_id
    return open_model(LlamaForCausalLM(config).eval(), name="random")


# Arms


def filled(world: World, score: str, rate: float) -> Model:
    """Train on gap sentences: stage 2."""
    samples = world.gaps(score)
    config = world.config(GAP_TRAINING, rate, samples, world.scale.gap_epochs)
    with tempfile.TemporaryDirectory() as work:
        return fill_gaps(base(world.scale.pretrained), samples, {}, config, Path(work))[0]


def summarising(
    world: World, start: Model, rate: float, fisher: Fisher | None = None, lam: float = 0.0
) -> tuple[Model, dict[str, Any]]:
    """Train on summaries, with an anchor if F is given: stage 4. Also return what the anchor did."""
    samples = world.samples(world.labelled)
    config = world.config(TRAINING, rate, samples, world.scale.epochs)
    kind = "uniform" if fisher is None else "fisher"
    anchor = Anchor(importance=kind, lam=lam, floor=FLOOR * lam, normalize="mean")  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as work:
        model, _, hook = summarise(start, fisher, samples, {}, anchor, config, Path(work))
    return model, {"ratio": max(row["ratio"] for row in hook.rows), "sites": hook.rows[-1]["sites"]}


def validated_gaps(rate: float, scale: Scale, seed: int) -> float:
    world = World(scale, seed)
    return mean_loss(filled(world, "rouge-bleu", rate).model, world.gaps_of(world.held_out), batch=16)


def validated(rate: float, scale: Scale, seed: int, folder: Path | None = None) -> float:
    """Return the held-out loss of summaries, directly or after the gap sentences of a folder."""
    world = World(scale, seed)
    start = base(scale.pretrained) if folder is None else opened(folder)
    return mean_loss(summarising(world, start, rate)[0].model, world.samples(world.held_out), batch=16)


def prepared(scale: Scale, seed: int, gap_rate: float, folder: Path) -> dict[str, float]:
    """Keep a gap-sentence solution with F in a folder; return the losses of held-out gaps, with a wrong source too."""
    world = World(scale, seed)
    start = filled(world, "rouge-bleu", gap_rate)
    start.model.save_pretrained(folder)
    importance(world, start).save(folder / "fisher.safetensors")
    gaps = gap_sentences(world.held_out).gaps
    turned = [gap._replace(text=other.text) for gap, other in zip(gaps, [*gaps[1:], gaps[0]], strict=True)]
    own, wrong = (mean_loss(start.model, world.encoder.gaps(each, scale.gap), batch=16) for each in (gaps, turned))
    return {"own source": own, "another source": wrong}


def importance(world: World, start: Model) -> Fisher:
    """Measure F at the gap-sentence solution: stage 3."""
    return measure_fisher(start, world.gaps("rouge-bleu")[: world.scale.fisher], 32)


def opened(folder: Path) -> Model:
    return open_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), name="gaps filled")


def rises(scale: Scale, seed: int, folder: Path, rate: float, lam: float) -> list[float]:
    """Return the increase of the held-out gap loss, and the held-out loss of summaries, for one strength."""
    world, start = World(scale, seed), opened(folder)
    fisher = read_fisher(folder / "fisher.safetensors", start) if lam else None
    model, _ = summarising(world, start, rate, fisher, lam)
    gaps = world.gaps_of(world.held_out)
    after, before = (mean_loss(each.model, gaps, batch=16) for each in (model, start))
    return [after - before, mean_loss(model.model, world.samples(world.held_out), batch=16)]


def teaching(scale: Scale, seed: int, rate: float, folder: Path) -> list[float]:
    """Train on summaries directly, keep this teacher in a folder, and return its :func:`held_out_scores`."""
    world = World(scale, seed)
    teacher, _ = summarising(world, base(scale.pretrained), rate)
    teacher.model.save_pretrained(folder)
    return held_out_scores(world, teacher)


def held_out_scores(world: World, model: Model) -> list[float]:
    """Return ROUGE-1 of the held-out pairs, and the number of different texts."""
    texts = world.texts(model, world.held_out)
    return [fmean(scored(texts, world.held_out)), len(set(texts))]


def taught(world: World, teacher: Model, rate: float, alpha: float) -> Model:
    """Train a student of an eighth of the parameters: stage 5; with alpha = 0, on labels only."""
    student, samples = new_student(teacher, 8, world.seed), world.samples(world.labelled)
    config = world.config(TRAINING, rate, samples, world.scale.student_epochs)
    weight = alpha / config.batch**2  # as published
    frozen = share(teacher.model).eval()
    loss = partial(student_loss, teacher=frozen, temperature=20.0, alpha=alpha, divergence=weight)
    task = Task(loss, frozen=(frozen,)) if alpha else Task(response_loss)
    with tempfile.TemporaryDirectory() as work:
        fit(student.model, samples, task, config, out=work, trainable=lambda name: True)
    return open_model(student.model.eval())


def validated_student(rate: float, scale: Scale, seed: int, alpha: float, folder: Path) -> float:
    world = World(scale, seed)
    return mean_loss(taught(world, opened(folder), rate, alpha).model, world.samples(world.held_out), batch=16)


def without_teacher(scale: Scale, seed: int, rate: float, folder: Path) -> list[float]:
    """Train a student on labels only, and return its :func:`held_out_scores`."""
    world = World(scale, seed)
    return held_out_scores(world, taught(world, opened(folder), rate, 0.0))


def directly(scale: Scale, seed: int, rate: float, student_rates: Mapping[str, float]) -> dict[str, Any]:
    """Train on summaries directly; this model is also the teacher of two students."""
    world = World(scale, seed)
    teacher, _ = summarising(world, base(scale.pretrained), rate)
    found = {DIRECT: world.scores(teacher)}
    for arm, alpha in ALPHAS.items():
        found[arm] = world.scores(taught(world, teacher, student_rates[arm], alpha))
    return found | {"constant": world.constant()}


def after_gaps(scale: Scale, seed: int, score: str, gap_rate: float, rate: float, lam: float) -> dict[str, Any]:
    """Train on gap sentences and then on summaries, without an anchor, and with one after selected gap sentences."""
    world = World(scale, seed)
    start = filled(world, score, gap_rate)
    before = world.gap_loss(start)
    free, _ = summarising(world, start, rate)
    if score == "random":
        return {CHANCE: world.scores(free) | {"rise": world.gap_loss(free) - before}}
    fisher = importance(world, start)
    held, trace = summarising(world, start, rate, fisher, lam)
    found = {FREE: world.scores(free), HELD: world.scores(held)}
    rise = {arm: each | {"rise": each["gap loss"] - before} for arm, each in found.items()}
    sites, sums = sites_of_parameters(start), dict[str, float]()
    for name, each in fisher.tensors.items():
        sums[sites[name]] = sums.get(sites[name], 0.0) + float(each.double().sum())
    return rise | {"before": before, "ratio": trace["ratio"], "sites": trace["sites"], "sums": sums}


# The experiment


def experiment(run: Run) -> None:
    scale, tuning, folder = (QUICK if run.quick else FULL), run.seed + TUNING, run.work
    seeds = range(run.seed + 3, run.seed + (4 if run.quick else 6))  # the first three were a pilot's
    run.data = (
        f"docstrings of Python's standard library and of PyTorch: {scale.labelled} with their first line, others "
        f"without, {scale.held_out} for validation, {scale.test} for testing"
    )
    grid = [1e-2, 3e-2, 9e-2] if run.quick else [3e-5, 1e-4, 3e-4]
    world: dict[str, Any] = {"scale": scale, "seed": tuning}
    (gaps,) = tuned(run, {"gap sentences": partial(validated_gaps, **world)}, grid).values()
    solution = folder / "gaps"
    apart = run.arm("gap sentences of the tuning seed", prepared, scale, tuning, gaps.value, solution)
    known = apart["another source"] - apart["own source"]
    if not run.quick:
        run.premise(
            "loss of gap sentences by another source - by their own, nats",
            f"at least {PREDICTED}",
            known,
            known >= PREDICTED,
        )

    starts = {DIRECT: partial(validated, **world), FREE: partial(validated, **world, folder=solution)}
    rates = {arm: each.value for arm, each in tuned(run, starts, grid).items()}
    lam = strength(run, scale, tuning, solution, rates[FREE])

    teacher = folder / "teacher"
    theirs = run.arm("teacher of the tuning seed", teaching, scale, tuning, rates[DIRECT], teacher)
    students = {arm: partial(validated_student, **world, alpha=ALPHAS[arm], folder=teacher) for arm in ALPHAS}
    student_rates = {
        arm: each.value for arm, each in tuned(run, students, grid if run.quick else [3e-4, 1e-3, 3e-3]).items()
    }
    alone = run.arm("student of the tuning seed", without_teacher, scale, tuning, student_rates[LABELS], teacher)
    if not run.quick:
        gap = theirs[0] - alone[0]
        run.premise("ROUGE-1 of the teacher - of a student of labels only, held-out pairs", "at least 1", gap, gap >= 1)
    varied = alone[1] / theirs[1]
    run.further("different summaries of a student of labels only relative to the teacher's, held-out pairs",
                "at least half", varied, varied >= 0.5)  # fmt: skip

    run.freeze("mean over seeds and test docstrings of paired differences of ROUGE-1", seeds, **asdict(scale),
               gap_rate=gaps.value, rates=rates, strength=lam, student_rates=student_rates)  # fmt: skip
    found: list[dict[str, Any]] = []
    for seed in seeds:
        direct = run.arm(f"{DIRECT} and students, {seed}", directly, scale, seed, rates[DIRECT], student_rates)
        first = partial(after_gaps, scale, seed, gap_rate=gaps.value, rate=rates[FREE], lam=lam)
        chosen = run.arm(f"gaps by overlap, {seed}", first, "rouge-bleu")
        found.append(direct | chosen | run.arm(f"random gaps, {seed}", first, "random"))
    tables(run, found)
    claims(run, found)
    layers(run, found)


def strength(run: Run, scale: Scale, seed: int, folder: Path, rate: float) -> float:
    """Return the smallest strength that prevents enough of the increase of the held-out gap loss, else the largest."""
    tried = {lam: run.arm(f"strength {lam:g}", rises, scale, seed, folder, rate, lam) for lam in (0.0, *LAMBDAS)}
    run.table("Strength of the anchor, on held-out docstrings", ["lambda", "rise of the gap loss", "summary loss"],
              [[lam, *each] for lam, each in tried.items()])  # fmt: skip
    free = tried[0.0][0]
    if not run.quick:
        run.premise(
            "increase of the gap loss without an anchor, nats", f"at least {FORGOTTEN}", free, free >= FORGOTTEN
        )
    return next((lam for lam in LAMBDAS if tried[lam][0] <= (1 - SAFE) * free), LAMBDAS[-1])


def tables(run: Run, found: Sequence[Mapping[str, Any]]) -> None:
    names = ("rouge1", "rouge2", "rougeL", "bleu", "bleu1_precision", "distinct", "length")
    rows: list[list[Any]] = []
    for arm in (DIRECT, FREE, HELD, CHANCE, *ALPHAS):
        scores = [fmean(each[arm]["all"][name] for each in found) for name in names]
        rows.append([arm, *scores, fmean(each[arm]["rise"] for each in found) if "rise" in found[0][arm] else None])
    rows.append(["constant answer", fmean(each["constant"] for each in found), *[None] * len(names)])
    run.table(
        f"First lines of test docstrings; means over {len(found)} seeds",
        ["", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "word precision", "distinct", "length", "rise of the gap loss"],
        rows,
    )


def claims(run: Run, found: Sequence[Mapping[str, Any]]) -> None:
    """Check what gap sentences, the anchor and distillation gain."""

    def apart(one: str, other: str) -> Measured:
        scores = [[np.array(each[arm]["rouge1"]) for each in found] for arm in (one, other)]
        return Measured.over_seeds_and_items(np.stack(scores[0]) - np.stack(scores[1]))

    gain = apart(FREE, DIRECT)
    run.main("ROUGE-1 gain of gap sentences over direct fine-tuning", "at least 3", gain, gain.at_least(3.0))
    saved = Measured.over_seeds([1 - each[HELD]["rise"] / each[FREE]["rise"] for each in found])
    run.main("fraction of the increase of the gap loss that the anchor prevents", "at least half", saved,
             saved.at_least(HALF))  # fmt: skip
    cost = apart(FREE, HELD)
    run.main("its cost in ROUGE-1", "at most 1", cost, cost.at_most(1.0))
    chosen = apart(FREE, CHANCE)
    run.further("ROUGE-1 gain of selected over random gaps", "at least 1", chosen, chosen.at_least(1.0))
    distilled = apart(DISTILLED, LABELS)
    run.further("ROUGE-1 gain of distillation over labels only", "at least 1", distilled, distilled.at_least(1.0))
    share = Measured.over_seeds(
        [each[DISTILLED]["all"]["distinct"] / each[DIRECT]["all"]["distinct"] for each in found]
    )
    run.further("distinct summaries of the student relative to the teacher's", "at least half", share,
                share.at_least(0.5))  # fmt: skip
    above = Measured.over_seeds([fmean(each[DISTILLED]["rouge1"]) - each["constant"] for each in found])
    run.further("ROUGE-1 gain of the distilled student over the constant answer", "at least 10", above,
                above.at_least(10.0))  # fmt: skip
    across, up = "rise of the loss of gap sentences, nats", "ROUGE-1 of summaries"
    points = {
        arm: [(fmean(each[arm]["rise"] for each in found), fmean(each[arm]["all"]["rouge1"] for each in found))]
        for arm in (FREE, HELD, CHANCE)
    }
    run.figure("cstrl-retention", Scatter(across, up, points))


def layers(run: Run, found: Sequence[Mapping[str, Any]]) -> None:
    """Report the drift and the penalty by layer."""
    rows = [
        [site, fmean(each["sums"][site] for each in found)]
        + [fmean(each["sites"][site][what] for each in found) for what in ("drift", "penalty")]
        for site in found[0]["sums"]
    ]
    run.table("By layer, with the anchor", ["layer", "sum of F", "drift", "penalty"], rows)
    ratio = min(each["ratio"] for each in found)
    run.further("gradient norm of the anchor relative to the task's", "at least 1e-3", ratio, ratio >= 1e-3)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a small random Llama on 32 pairs, which shows no effect"))
