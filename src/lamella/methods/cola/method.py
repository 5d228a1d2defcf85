"""CoLa, chain of layers: search the layers to skip or repeat so that one sample with a known answer is answered right.

Li, Li and Zhou, "Skip a Layer or Loop it? Test-Time Depth Adaptation of Pretrained LLMs", arXiv 2507.07996.

    the model    0 1 2 3 4 5 6 7 ... 29            the root of the tree
    skip(4, 2)   0 1 2 3 6 7 ... 29                an edit skips k consecutive layers,
    repeat(5, 2) 0 1 2 3 4 5 6 5 6 7 ... 29        or runs k consecutive layers once more

A tree search over such edits has reward 1 if the path answers correctly. Since the reward needs the answer, this is a
diagnosis and not an inference method. With a hundred trials, some path gives almost any answer at random: every search
therefore comes with the same search for *wrong* answers, and with a random search of as many evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path as File
from typing import Annotated, Any

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.cola.page import report
from lamella.methods.cola.paths import PathSettings, PathStudy, ProblemStudy, study_sample
from lamella.methods.cola.predictor import train_predictor
from lamella.methods.cola.result import Paths
from lamella.methods.cola.running import KnownAnswers, run_studies
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
    settings: PathSettings = PathSettings(),
    answers: File | None = None,
    workers: Workers = Workers(),  # noqa: B008, frozen
    work: Work = Work(),
) -> Paths:
    """Search the layers to skip or repeat so that a model answers a question right: a diagnosis that needs the answer.

    For every sample a tree search looks for the shortest path through the layers that gives the known answer. With
    that many trials some path gives almost any answer, so the same search also runs for wrong answers, at random, with
    skips only and with repeats only. Compare the results with these controls.

    The folder contains evidence.json and report.html, study.json (every path, valid or not) and plans/ (one per sample,
    for `lamella apply`). An interrupted run resumes. Example:
    lamella cola smollm2 --samples questions.jsonl --sims 50 -o paths

    Args:
        stack: the opened model.
        samples: prompts with their answers.
        held_out: held-out samples: if given, a path predictor is trained on the paths found and evaluated on these.
        settings: settings of the searches.
        answers: file with cached answers by (sample, prompt, path, settings, weights), which several runs can share; if
            None, the run has its own.
        workers: processes that study the samples, on this machine or a Ray cluster; the result does not depend on them.
        work: folder from which an interrupted run resumes.

    Returns:
        The paths with their findings, and the predictor if ``held_out`` is given.

    Raises:
        CalibrationError: if there are no samples, two with the same id, or options that one token cannot distinguish.
        MethodError: for a model that is not a decoder or has a plan applied, or settings that do not fit its layers.
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
    settings: PathSettings = PathSettings(),
    journal: str | File | None = None,
    workers: Workers = Workers(),  # noqa: B008, frozen
) -> PathStudy:
    """Run the searches only; see :func:`cola`.

    Args:
        stack: the opened model.
        samples: prompts with their answers.
        tokenizer: the model's own tokenizer if None.
        settings: settings of the searches.
        journal: file with cached answers.
        workers: processes that study the samples.
    """
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
        for study in run_studies(pool, study_sample, stack, tokenizer, samples, settings, answers):
            done[study.sample.id] = study
            count(note=study.sample.id)
    studies = tuple(done[sample.id] for sample in samples)
    return PathStudy(ModelReference.of(stack), stack.architecture.stack, settings, studies)
