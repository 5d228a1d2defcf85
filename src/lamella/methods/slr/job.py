"""Restoring: search which pre-trained layers to put back, compare with soups and other intervals, export the result."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.data import ask, load_questions
from lamella.errors import ExportError, MethodError
from lamella.files import check_free, discard
from lamella.measure import Asked, Question, answer
from lamella.methods.slr.diversity import diversity
from lamella.methods.slr.method import (
    EMPTY,
    Point,
    Search,
    choose,
    measure,
    mixable,
    mixed,
    placed,
    plan_of,
    random_intervals,
    restored,
    search,
    soup,
)
from lamella.methods.slr.page import render_restoration
from lamella.methods.slr.questions import open_questions
from lamella.plan import Plan, checkpoint, parameters_at
from lamella.plan.export import export, export_out_of_core
from lamella.plan.pair import check_pair, check_same_tokens
from lamella.report import check_installed
from lamella.results import environment
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo import open_stack, open_tokenizer

SOUP = 21  # values of alpha, the paper's
DRAWS = 10  # random intervals


def restore(
    model: Any,
    base: Any,
    out: str | Path,
    *,
    data: str = "crc",
    prefill: str = "",
    min_quality: float = 0.9,
    min_validity: float = 0.2,
    stride: int = 1,
    samples: int = 32,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Put pre-trained layers back into a post-trained model, and export the result.

    The interval is chosen on one split of the questions; what is reported comes from the other. Beside it stand the
    soups (all tensors, and those of the layers alone), chosen by the same rule, and other intervals of the same length.

    Args:
        model: the post-trained model, anything that :func:`lamella.open` takes.
        base: the model that it was trained from.
        out: the folder to write: the checkpoint with its plan, ``evidence.json`` and ``restore.html``. Beside it,
            ``.OUT.journal`` lets an interrupted search go on.
        data: ``crc``, or a ``.jsonl`` file of questions; see :func:`lamella.data.load_questions`.
        prefill: what the answer begins with, as for models that open with their reasoning.
        min_quality: the floor of Q, as a share of that of the post-trained model.
        min_validity: questions that the post-trained model answers with less valid mass are left out.
        stride: above 1, a coarse search first and a fine one around its best.
        samples: answers sampled to each of twelve open questions, before and after; 0 leaves them out.
        seed: of random intervals and sampled answers.
        overwrite: replace ``out``.

    Returns:
        The evidence.

    Raises:
        ArchitectureError, PlanError: when layers of one cannot stand in the other.
        CalibrationError: for questions that cannot be read or answered with one token.
        MethodError: for a number out of range, or when the model answers no question.
        ExportError: when ``out`` exists, or cannot be written.
    """
    out = Path(out)
    if samples < 0:
        raise MethodError(f"samples={samples}: give a whole number from 0 on")
    check_free(out, overwrite)
    check_installed()
    splits = {"search": load_questions(data, "calibration"), "report": load_questions(data, "test")}
    post, pre = open_stack(model), open_stack(base)
    if not post.architecture.causal:
        raise MethodError(f"slr works on decoders; {post.name} is a {post.architecture.name}")
    check_pair(post, pre)
    tokenizer = open_tokenizer(post.path or model)
    check_same_tokens(tokenizer, open_tokenizer(pre.path or base))
    to_search, to_report = (ask(tokenizer, questions, prefill) for questions in splits.values())
    journal = _journal(out)
    settings = {"min_quality": min_quality, "min_validity": min_validity, "stride": stride}
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = search(post, pre, to_search, journal=journal / "intervals.jsonl", **settings)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    notes = [str(each.message) for each in told if each.category is UserWarning]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if found.chosen.what == EMPTY:
        notes.append("No interval that keeps the floor is more diverse than the post-trained model.")
    kept = [x for x, q in enumerate(answer(post, to_report).quality.tolist()) if q >= min_validity]
    soups = _soups(post, pre, found.asked)
    report = _report(post, pre, found, soups, to_report.some(kept), seed) if kept else []
    notes += _doubts(report, min_quality)
    evidence: dict[str, Any] = {
        "schema": "lamella.restoration/1",
        "model": {"name": post.name, "base": pre.name, "family": post.architecture.name, "layers": len(post)},
        "method": "slr",
        "interval": list(found.chosen.what),  # type: ignore[arg-type]
        "options": settings | {"prefill": prefill},
        "data": {name: _provenance(data, name, splits[name], asked) for name, asked in
                 (("search", to_search), ("report", to_report))},
        "search": {
            "post": _said(found.post),
            "chosen": _said(found.chosen),
            "points": [_said(point) | {"feasible": found.feasible(point)} for point in found.points],
            "soups": {name: [_said(point) for point in points] for name, points in soups.items()},
            "dropped": list(found.dropped),
            "questions": len(found.asked),
            "evaluations": len(found.points),
            "seconds": seconds,
        },
        "report": report,
        "notes": notes,
        "seed": seed,
        "environment": environment(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lamella-restore-") as folder:
        plan = plan_of(post, pre, found, Path(folder))
        if samples:
            both = {"before": post.model, "after": apply(post, plan)}
            evidence["open"] = {
                when: diversity(each, tokenizer, open_questions(), samples=samples, seed=seed).as_dict()
                for when, each in both.items()
            }
        files = {"evidence.json": json.dumps(evidence, indent=2) + "\n", "restore.html": render_restoration(evidence)}
        _export(post, plan, out, tokenizer, files, overwrite)
    discard(journal, out)
    return evidence


def _journal(out: Path) -> Path:
    """The folder beside ``out`` with which an interrupted search goes on."""
    journal = out.parent / f".{out.name}.journal"
    try:
        journal.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror or error}); choose another folder") from None
    return journal


def _doubts(report: list[dict[str, Any]], min_quality: float) -> list[str]:
    """What the reader must know of the report."""
    if not report:
        return ["The post-trained model answers none of the questions to report on."]
    rows = {row["name"]: row for row in report}
    kept = rows["slr"]["quality"] / rows["post"]["quality"]
    if kept < min_quality:
        return [f"On questions that nothing was chosen on, {kept:.1%} of the validity is left: less than the floor."]
    return []


def _soups(post: Stack, pre: Stack, asked: Asked) -> dict[str, list[Point]]:
    soups = {"soup": soup(post, pre, asked, n=SOUP)} if mixable(post, pre) else {}
    return soups | {"blocks": soup(post, pre, asked, n=SOUP, blocks_only=True)}


def _report(
    post: Stack, pre: Stack, found: Search, soups: dict[str, list[Point]], asked: Asked, seed: int
) -> list[dict[str, Any]]:
    """Every choice, and what it is compared with, on questions that nothing was chosen on."""
    layers, length = len(post), int(found.chosen.size)
    rows = {"post": measure(post, asked)}
    if mixable(post, pre):
        rows["pre"] = measure(pre, asked)
    others: dict[str, Any] = {"slr": found.chosen.what, "all": (0, layers)} | (placed(layers, length) if length else {})
    drawn = random_intervals(layers, length, draws=DRAWS, seed=seed) if length else []
    wanted = {*others.values(), *drawn} - {EMPTY}
    measured = {point.what: point for point in restored(post, pre, asked, wanted)} | {EMPTY: rows["post"]}
    rows |= {name: measured[what] for name, what in others.items()}
    if drawn:
        quality, spread = (
            sum(getattr(measured[each], name) for each in drawn) / len(drawn) for name in ("quality", "diversity")
        )
        rows["random"] = Point((0, length), quality, spread)
    for name, points in soups.items():
        share = float(choose(points, points[0], found.min_quality).what)  # type: ignore[arg-type]
        rows[name] = measure(mixed(post, pre, share, blocks_only=name == "blocks"), asked, share)
    return [_said(point) | {"name": name} for name, point in rows.items()]


def _said(point: Point) -> dict[str, Any]:
    place = {"interval": list(point.what)} if isinstance(point.what, tuple) else {"share": point.what}
    return place | {"quality": point.quality, "diversity": point.diversity}


def _provenance(data: str, name: str, questions: Sequence[Question], asked: Asked) -> dict[str, Any]:
    text = json.dumps([[each.prompt, each.answers] for each in questions])
    return {
        "data": data,
        "split": "calibration" if name == "search" else "test",
        "questions": len(questions),
        "tokens": int(asked.attention_mask.sum()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _export(post: Stack, plan: Plan, out: Path, tokenizer: Any, files: dict[str, str], overwrite: bool) -> None:
    """Byte by byte where both models are safetensors folders that call their tensors alike, else from memory."""
    i, j = plan.provenance["interval"]
    card = (
        f"# {post.name} with layers of {plan.provenance['base']}\n\nSelective Layer Restoration: "
        + (f"layers {i} to {j - 1} are those of {plan.provenance['base']}" if i < j else "nothing had to be restored")
        + "; all else is unchanged. `restore.html` and `evidence.json` say what that brought."
    )
    if checkpoint.is_safetensors(post.path) and all(edit.is_folder for edit in plan.weights):
        assert post.path is not None
        stored = {each.name for each in checkpoint.read(post.path).tensors}
        if all(stored >= set(parameters_at(post, edit.sites)) for edit in plan.weights):
            export_out_of_core(post.path, plan, out, overwrite=overwrite, card=card, files=files)
            return
    export(post, plan, out, overwrite=overwrite, tokenizer=tokenizer, card=card, files=files)
