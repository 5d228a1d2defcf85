"""CoLa, chain of layers: for one sample with a known answer, which layers to skip or repeat to get it right.

Li, Li and Zhou, "Skip a Layer or Loop it? Test-Time Depth Adaptation of Pretrained LLMs", arXiv 2507.07996.

    the model    0 1 2 3 4 5 6 7 ... 29            the root of the tree
    skip(4, 2)   0 1 2 3 6 7 ... 29                an edit leaves out k layers in a row,
    repeat(5, 2) 0 1 2 3 4 5 6 5 6 7 ... 29        or runs k layers in a row once more

A tree search over such edits is rewarded with 1 when the path answers correctly. The reward reads the answer, so this
is a diagnosis and not a way to infer. With a hundred tries some path says almost anything by chance: every search
therefore comes with the same search for *wrong* answers, and with a random search of as many evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path as File
from typing import Annotated, Any

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.cola.page import report
from lamella.methods.cola.paths import PathStudy, ProblemStudy, Settings, study_sample
from lamella.methods.cola.predictor import train_predictor
from lamella.methods.cola.result import Paths
from lamella.methods.cola.running import KnownAnswers, studied
from lamella.methods.cola.samples import Problem, Problems, check_samples
from lamella.plan import ModelReference
from lamella.progress import tracker
from lamella.registry import method
from lamella.signature import Split
from lamella.stack import Stack
from lamella.workers import Workers
from lamella.zoo import open_tokenizer


@method("cola", paper="2507.07996", purpose="measure", verb="cola", brief={"simulations": 4, "tokens": 2})
def cola(
    stack: Stack,
    samples: Problems,
    held_out: Annotated[Problems | None, Split("test")] = None,
    *,
    settings: Settings = Settings(),
    answers: File | None = None,
    workers: Workers = Workers(),  # noqa: B008, frozen
    work: Work = Work(),
) -> Paths:
    """Which layers to skip or repeat so that a model gets a question right: a diagnosis that needs the answer.

    For every sample a tree search looks for the shortest path through the layers that gives the known answer. With
    that many tries some path gives almost any answer, so the same search runs for wrong answers, at random, with
    skips alone and with repeats alone. Read the results beside those controls, never alone.

    The folder holds evidence.json and report.html, study.json (every path, valid or not) and plans/ (one per sample,
    for `lamella apply`). An interrupted run goes on where it was. Example:
    lamella cola smollm2 --samples questions.jsonl --sims 50 -o paths

    Args:
        stack: the opened model.
        samples: prompts with their answers.
        held_out: more samples: train the path predictor on what was found, and run its paths on these.
        settings: of the searches.
        answers: a file of answers by (sample, prompt, path, settings, weights), which several runs can share; one of
            the run's own when left out.
        workers: who studies the samples, on this machine or a Ray cluster; the result is that of one process.
        work: where an interrupted run goes on from.

    Raises:
        CalibrationError: for no samples, two of the same name, or options that one token cannot tell apart.
        MethodError: for a model that is no decoder or has a plan applied, or settings out of range.
    """
    tokenizer = samples.tokenizer or open_tokenizer(stack.path or stack.name)
    journal = answers or work.journal("answers")
    study = search_paths(stack, samples, tokenizer=tokenizer, settings=settings, journal=journal, workers=workers)
    found = Paths(findings=report(study), study=study)
    if held_out is not None:
        found.predictor = train_predictor(stack, study, tokenizer, seed=settings.seed)
        score = found.predictor.score(stack, held_out, tokenizer, settings.tokens)
        found.findings["predictor"] = score._asdict()
    return found


def search_paths(
    stack: Stack,
    samples: Iterable[Problem],
    *,
    tokenizer: Any = None,
    settings: Settings = Settings(),
    journal: str | File | None = None,
    workers: Workers = Workers(),  # noqa: B008, frozen
) -> PathStudy:
    """The searches alone; see :func:`cola`. ``journal`` is the file of answers."""
    samples = check_samples(samples, "samples")
    if not stack.architecture.causal:
        raise MethodError(f"cola works on decoders; {stack.name} is a {stack.architecture.name}")
    if hasattr(stack.model, "lamella_plan"):
        raise MethodError(f"cola searches the layers of a whole model: open {stack.name} without a plan")
    settings.bounds(len(stack))
    tokenizer = tokenizer or open_tokenizer(stack.path or stack.name)
    answers = KnownAnswers(journal, stack)
    done: dict[str, ProblemStudy] = {}
    with tracker("cola: searching paths, by sample", len(samples)) as count, workers.pool() as pool:
        for study in studied(pool, study_sample, stack, tokenizer, samples, settings, answers):
            done[study.sample.id] = study
            count(note=study.sample.id)
    studies = tuple(done[sample.id] for sample in samples)
    return PathStudy(ModelReference.of(stack), stack.architecture.stack, settings, studies)
