"""The report of a CoLa study, with the controls needed to interpret it.

A *pair* is one sample with one target. If the model already gives the target, a search can only shorten the path; if it
does not, a path that gives it *flips* the answer. Flipping to the right answer is a repair, and evidence of a hidden
capability only as far as it succeeds more often than flipping to a wrong one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from lamella.formatting import counted, percent, signed
from lamella.measure.scores import Scores
from lamella.methods.cola.paths import PathSearchResult, PathStudy, ProblemStudy
from lamella.methods.cola.samples import Path, same
from lamella.report.figures import Figure, Lines
from lamella.report.page import finite
from lamella.results import Evidence, Summary, Table

SHOWN = 80  # number of characters at the end of a prompt in the table of questions
FLIPS = 10_000  # random sign changes in the test of the excess


def report(study: PathStudy) -> dict[str, Any]:
    """Aggregate a study.

    Args:
        study: the study.

    Returns:
        ``samples`` and ``right``: number of samples, and of those that the model itself answers correctly.
        ``shorter``: over the latter, the fraction with a correct path shorter than the model, by search, and the same
            for
        the control (pairs in which the model gives the wrong target).
        ``repaired``: over the others, the fraction with any correct path, by search, and the control's fraction of
            flips.
        ``valid_paths``: mean number of valid paths per tree search, for right and wrong targets; all pairs, and flips
            only.
        ``excess``: valid paths for the right answer minus the mean over the wrong ones, over the samples where the
            model
        gives neither; with standard error and the p-value of a sign-flip test (one-sided).
        ``best_length``: mean length of the shortest correct path, over samples in which tree and random both found one.
        ``lengths``: number of samples by length of the shortest correct path.
        ``questions``: for each sample its id, the end of its prompt, the right answer, the model's answer, and the
        shortest correct path of the tree search, or None.
        ``categories``: number of samples that went from right or wrong to which length.
        ``skip_rate``, ``repeat_rate``: for each category and layer, the fraction of shortest correct paths.
        ``valid_skip_rate``, ``valid_repeat_rate``: for each layer, the fraction of all correct paths except the model
        itself, every sample with the same weight.
    """
    layers, samples = study.model.layers, study.samples
    right, wrong = [s for s in samples if s.right], [s for s in samples if not s.right]
    searches = list(samples[0].searches)
    given = [outcome for s in samples for outcome in s.wrong if same(s.base, outcome.target)]
    flips = [outcome for s in samples for outcome in s.wrong if not same(s.base, outcome.target)]
    both = [s for s in samples if s.searches["tree"].best and s.searches["random"].best]
    category = {s.sample.id: _category(s, layers) for s in samples}
    best: dict[str, list[Path]] = defaultdict(list)
    for s in samples:
        if (path := s.searches["tree"].best) is not None:
            best[category[s.sample.id]].append(path)
    valid = [rates([p for p in s.searches["tree"].valid if p != tuple(range(layers))], layers) for s in samples]
    return {
        "samples": len(samples),
        "right": len(right),
        "shorter": {name: _share(_is_shorter(s.searches[name], layers) for s in right) for name in searches}
        | {"wrong target": _share(_is_shorter(outcome, layers) for outcome in given)},
        "repaired": {name: _share(bool(s.searches[name].valid) for s in wrong) for name in searches}
        | {"wrong target": _share(bool(outcome.valid) for outcome in flips)},
        "valid_paths": {
            "right answer": _mean(len(s.searches["tree"].valid) for s in samples),
            "wrong answers": _mean(fmean(len(o.valid) for o in s.wrong) for s in samples if s.wrong),
            "right answer, flips": _mean(len(s.searches["tree"].valid) for s in wrong),
            "wrong answers, flips": _mean(len(outcome.valid) for outcome in flips),
        },
        "excess": _excess(wrong, study.settings.seed),
        "best_length": {name: _mean(len(s.searches[name].best or ()) for s in both) for name in ("tree", "random")},
        "lengths": dict(sorted(Counter(len(path) for paths in best.values() for path in paths).items())),
        "categories": dict(sorted(Counter(category.values()).items())),
        "skip_rate": {name: rates(paths, layers)[0].tolist() for name, paths in sorted(best.items())},
        "repeat_rate": {name: rates(paths, layers)[1].tolist() for name, paths in sorted(best.items())},
        "questions": [
            {
                "id": s.sample.id,
                "prompt": s.sample.prompt[-SHOWN:],
                "answer": s.sample.answer,
                "model": s.base,
                "path": s.searches["tree"].best and list(s.searches["tree"].best),
            }
            for s in samples
        ],
        "valid_skip_rate": _over_samples([skipped for skipped, _ in valid]),
        "valid_repeat_rate": _over_samples([repeated for _, repeated in valid]),
    }


def layer_scores(study: PathStudy) -> tuple[Scores, Scores]:
    """Return how often correct paths skip and repeat each layer, each as ``("layer",)`` scores [layers].

    Args:
        study: the study.
    """
    aggregates = report(study)
    provenance = {"method": "cola", "samples": len(study.samples), "seed": study.settings.seed}
    skipped, repeated = (
        np.array(aggregates[f"valid_{what}_rate"] or [math.nan] * study.model.layers) for what in ("skip", "repeat")
    )
    return (
        Scores("fraction of correct paths that skip the layer", ("layer",), skipped, provenance),
        Scores("fraction of correct paths that repeat the layer", ("layer",), repeated, provenance),
    )


def rates(paths: Sequence[Path], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of paths that skip each layer, and that run it more than once; NaN without paths.

    Args:
        paths: the paths.
        layers: number of layers of the model.
    """
    if not paths:
        return np.full(layers, np.nan), np.full(layers, np.nan)
    counts = np.array([np.bincount(path, minlength=layers) for path in paths])
    return (counts == 0).mean(axis=0), (counts > 1).mean(axis=0)


def _category(study: ProblemStudy, layers: int) -> str:
    before = "right" if study.right else "wrong"
    best = study.searches["tree"].best
    if best is None:
        return "wrong to wrong"
    length = "shorter" if len(best) < layers else "same length" if len(best) == layers else "longer"
    return f"{before} to right, {length}"


def _is_shorter(outcome: PathSearchResult, layers: int) -> bool:
    return outcome.best is not None and len(outcome.best) < layers


def _share(truths: Iterable[bool]) -> float | None:
    return _mean(float(truth) for truth in truths)


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None of nothing, since JSON has no NaN."""
    values = list(values)
    return fmean(values) if values else None


def _over_samples(rows: list[np.ndarray]) -> list[float] | None:
    found = [row for row in rows if not np.isnan(row).any()]
    return np.mean(found, axis=0).tolist() if found else None


def _excess(wrong: Sequence[ProblemStudy], seed: int) -> dict[str, Any]:
    """Test whether more valid paths lead to the right answer than to a wrong one; the model gives neither."""
    differences = []
    for each in wrong:
        controls = [len(outcome.valid) for outcome in each.wrong if not same(each.base, outcome.target)]
        if controls:
            differences.append(len(each.searches["tree"].valid) - fmean(controls))
    if len(differences) < 2:
        return {"samples": len(differences), "mean": _mean(differences), "standard_error": None, "p": None}
    values = np.array(differences)
    signs = np.random.default_rng(seed).choice([-1, 1], size=(FLIPS, len(values)))
    as_large = int(((signs * values).mean(axis=1) >= values.mean() - 1e-12).sum())
    return {
        "samples": len(values),
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))),
        "p": (as_large + 1) / (FLIPS + 1),
    }


SEARCHES = {
    "tree": "tree search",
    "random": "random (as many evaluations)",
    "skip": "skips only",
    "repeat": "repeats only",
    "wrong target": "a wrong answer (control)",
}


def summary(evidence: Evidence) -> Summary:
    """Summarise how often each search answers a question right, with the controls."""
    record = finite(evidence.model_dump(by_alias=True))
    found, name = record["findings"], record["model"]["name"]
    rows = [
        [text, percent(found["shorter"][each]), percent(found["repaired"][each])] for each, text in SEARCHES.items()
    ]
    lines = []
    excess = found["excess"]
    if excess["p"] is not None:
        lines.append(
            f"valid paths above the control, over {counted(excess['samples'], 'sample')}: {signed(excess['mean'])} "
            f"± {excess['standard_error']:.2f} (p = {excess['p']:.3f})"
        )
    if "predictor" in found:
        score = found["predictor"]
        lines.append(
            f"path predictor on {counted(score['samples'], 'held-out sample')}: pass@1 {percent(score['pass_1'])}, "
            f"pass@5 {percent(score['pass_5'])} (which of 5 needs the answer), the model itself "
            f"{percent(score['base'])}"
        )
    verdict = f"{name} answers {found['right']} of {counted(found['samples'], 'question')} itself."
    paths = Table("Paths", ["search", "right: shorter path", "wrong: any path"], rows)
    return Summary(verdict, [paths, _questions(found["questions"], record["model"]["layers"])], lines)


def _questions(questions: Sequence[Mapping[str, Any]], layers: int) -> Table:
    """Tabulate every question with the model's answer and the shortest correct path."""
    rows = [
        [each["id"], " ".join(each["prompt"].split()), each["answer"].strip(), each["model"].strip(),
         "" if each["path"] is None else len(each["path"]), describe_path(each["path"], layers)]
        for each in questions
    ]  # fmt: skip
    heads = ["question", "end of the prompt", "right answer", "model's answer", "layers of the shortest path", "path"]
    return Table("Questions, with the shortest correct path of the tree search", heads, rows)


def describe_path(path: Sequence[int] | None, layers: int) -> str:
    """Describe a path in words: the layers it skips, and those it runs more than once.

    Args:
        path: the path, or None if none was found.
        layers: number of layers of the model.
    """
    if path is None:
        return "none found"
    counts = Counter(path)
    gone = [str(layer) for layer in range(layers) if layer not in counts]
    again = [f"{layer} ({count} times)" for layer, count in sorted(counts.items()) if count > 1]
    parts = [f"without {', '.join(gone)}"] if gone else []
    return "; ".join([*parts, *([f"repeats {', '.join(again)}"] if again else [])]) or "the model itself"


def figures(evidence: Evidence) -> list[Figure]:
    """Plot how often correct paths skip and repeat each layer."""
    found = finite(evidence.findings)
    lines = {"skipped": found["valid_skip_rate"] or [], "repeated": found["valid_repeat_rate"] or []}
    caption = "Fraction of all correct paths except the model itself, every sample with the same weight."
    return [Lines("layer", "fraction of paths", lines, caption=caption)]
