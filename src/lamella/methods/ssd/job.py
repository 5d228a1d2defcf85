"""Forgetting: dampen what a language model knows of some records, say what that cost, and export the result."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.data import Record, load_text, read_records, windows
from lamella.errors import CalibrationError, ExportError, LamellaError, MethodError
from lamella.files import check_free
from lamella.measure import check_disjoint
from lamella.methods.ssd.judge import Forgetting, Guard, check_scikit_learn, untrained_like
from lamella.methods.ssd.method import ALPHA, check_bound, check_options, dampen, importances, plan_of
from lamella.methods.ssd.page import render_forgetting
from lamella.plan.export import export
from lamella.plan.places import chosen_parameters
from lamella.report import check_installed
from lamella.results import environment
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Sample, blocks, pairs
from lamella.zoo import open_stack, open_tokenizer

CONSPICUOUS = 0.1  # of membership: this far below the retrained model, what was forgotten stands out


def forget(
    model: Any,
    out: str | Path,
    *,
    forget: str | Path,
    retain: Sequence[str | Path] = (),
    test: str | Path | None = None,
    importance: str | Path | None = None,
    save_importance: str | Path | None = None,
    retrained: Any = None,
    variant: str = "ssd",
    alpha: float | None = None,
    lam: float = 1.0,
    reference_of: str = "full",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    batch: int = 1,
    max_drop: float = 0.05,
    sequences: int = 64,
    length: int = 128,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Let a language model forget some of its training records, and export it.

    Args:
        model: anything that :func:`lamella.open` takes, a decoder; it is not changed, and its folder is not written to.
        out: the folder to write: the checkpoint with its plan, ``evidence.json`` and ``forget.html``.
        forget: a file of records; see :func:`lamella.data.read_records`.
        retain: files of records, or texts of :func:`lamella.load_text`: the rest of the training data, or what stands
            for it. They make F_D together with the forget set, and guard the edit.
        test: the same, that the model never saw; with it, membership inference is measured.
        importance: the file of a stored F_D, which takes the place of the retained data in measuring.
        save_importance: where to keep F_D, for further requests.
        retrained: a model that never saw the forget set, to stand beside.
        variant, alpha, lam, reference_of, layers, skip, batch: see :func:`lamella.methods.ssd.method.ssd`.
        max_drop: how much the perplexity on the retained data may rise, as a share; if it rises more, no model is
            written.
        sequences: of a text that is no file of records.
        length: tokens in a sample; longer records are cut into several.
        seed: chooses the sequences, and is that of the random weights for ZRF.
        overwrite: replace ``out``.

    Returns:
        The evidence.

    Raises:
        LamellaError: one line for every input that cannot be used, or when the guard rolls back.
    """
    out = Path(out)
    check_options(variant, alpha, lam, reference_of)
    _check_folders(model, out, overwrite)
    check_installed()
    if not retain and importance is None:
        raise MethodError("give --retain, the rest of the training data, or --importance, what was measured on it")
    if test is not None and retain:
        check_scikit_learn()
    gone = read_records(forget)
    stack = open_stack(model)
    if not stack.architecture.causal:
        raise MethodError(
            f"{stack.name} is a {stack.architecture.name}, which reads no text: use lamella.methods.ssd in Python"
        )
    tokenizer = open_tokenizer(stack.path or model)
    names = chosen_parameters(stack, layers, skip)  # type: ignore[arg-type]
    read = _Reader(tokenizer, sequences, length, seed)
    samples = read.records(forget, gone)
    kept = [sample for text in retain for sample in read(text, "calibration")]
    unseen = None if test is None else read(test, "test")
    others = {} if retrained is None else {"retrained": open_stack(retrained).model}
    check_disjoint(samples, kept)
    if importance is None and variant != "assd" and batch == 1 and reference_of == "full":
        check_bound(ALPHA if alpha is None else alpha, len(samples), len(samples) + len(kept))
    f, d = importances(
        stack,
        samples,
        retain=None if importance is not None else kept,
        importance=importance,
        reference_of=reference_of,  # type: ignore[arg-type]
        variant=variant,  # type: ignore[arg-type]
        batch=batch,
        seed=seed,
        names=names if save_importance is None else None,
    )
    if save_importance is not None:  # whatever comes of the edit, it can be tried again with other settings
        d.save(save_importance)
    settings = {"variant": variant, "lam": lam, "reference_of": reference_of, "layers": layers, "skip": skip}
    done = dampen(stack, f, d, alpha=alpha, **settings)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="lamella-forget-") as folder:
        plan = plan_of(stack, done, (f, d), settings, Path(folder))
        view = apply(stack, plan)
        guard = Guard.of(stack.model, view, kept, max_drop) if kept else None
        if guard is not None and not guard.kept:
            raise LamellaError(
                f"rolled back, no model is written: {guard}; raise alpha, name layers, or allow more with --max-drop"
            )
        sets: dict[str, Any] = {"forget": samples, "retain": kept or None, "test": unseen}
        sets["untrained"] = untrained_like(stack.model, seed)
        figures = {
            name: Forgetting.of(each, **sets).as_dict()
            for name, each in ({"before": stack.model, "after": view} | others).items()
        }
        evidence = {
            "schema": "lamella.forgetting/1",
            "model": {"name": stack.name, "family": stack.architecture.name, "layers": len(stack)},
            "method": "ssd",
            **{name: plan.provenance[name] for name in ("options", "alpha", "bound", "total", "sites")},
            "estimator": plan.provenance["reference"]["estimator"],
            "samples": {"forget": f.samples, "reference": d.samples},
            **figures,
            "guard": None if guard is None else vars(guard) | {"lost": guard.lost},
            "seconds": {"forget": f.seconds, "reference": d.seconds},
            "data": read.told,
            "notes": _notes(stack, plan.provenance, guard, figures),
            "seed": seed,
            "environment": environment(),
        }
        documents = {"evidence.json": json.dumps(evidence, indent=2) + "\n", "forget.html": render_forgetting(evidence)}
        export(stack, plan, out, overwrite=overwrite, tokenizer=tokenizer, files=documents)
    return evidence


class _Reader:
    """Files of records and texts, as training samples; it remembers what was read."""

    def __init__(self, tokenizer: Any, sequences: int, length: int, seed: int) -> None:
        if length < 2:
            raise MethodError(f"length={length}: give at least 2 tokens")
        self.tokenizer, self.sequences, self.length, self.seed = tokenizer, sequences, length, seed
        self.told: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str | Path, split: str) -> list[Sample]:
        if Path(name).expanduser().is_file():
            return self.records(name, read_records(name))
        text = load_text(name, split)  # type: ignore[arg-type]
        tokens = windows(self.tokenizer, text, self.sequences, self.length, self.seed)
        self.told[self._role(split)] = text.provenance(tokens)
        return blocks(tokens, loss_on="all")

    def records(self, name: str | Path, found: list[Record]) -> list[Sample]:
        """Each record is a sample, or several where it is long; of a prompt and response, the response carries loss."""
        samples = []
        for number, record in enumerate(found, start=1):
            if record.prompt is not None:
                samples += pairs([(record.prompt, record.text)], self.tokenizer, max_length=self.length)
                continue
            ids = self.tokenizer(record.text, return_tensors="pt", verbose=False)["input_ids"]
            parts = [part for part in ids.split(self.length, dim=1) if part.shape[1] > 1]
            if not parts:
                raise CalibrationError(f"{name}: record {number} has {ids.shape[1]} tokens: at least 2 are needed")
            samples += [sample for part in parts for sample in blocks(part, loss_on="all")]
        content = Path(name).expanduser().read_bytes()
        tokens = sum(len(sample["input_ids"]) for sample in samples)
        told = {"data": str(name), "split": "whole", "tokens": tokens, "sha256": hashlib.sha256(content).hexdigest()}
        self.told[self._role("forget" if not self.told else "retain")] = told
        return samples

    def _role(self, role: str) -> str:
        role = {"calibration": "retain"}.get(role, role)
        same = sum(key.split(" ")[0] == role for key in self.told)
        return role if not same else f"{role} {same + 1}"


def _check_folders(model: Any, out: Path, overwrite: bool) -> None:
    if isinstance(model, str | Path) and Path(model).exists() and Path(model).resolve() == out.resolve():
        raise ExportError(f"{out} is the model itself, which is never written to: choose another folder")
    check_free(out, overwrite)


def _notes(stack: Stack, told: dict[str, Any], guard: Guard | None, figures: dict[str, dict[str, Any]]) -> list[str]:
    notes = []
    if told["stale"]:
        notes.append("F_D was measured on other weights: after an edit it is stale, so measure it again now and then.")
    if guard is None:
        notes.append("No retained data were given, so nothing guarded what should be kept.")
    if told["untouched"]:
        notes.append(
            f"{len(told['untouched'])} buffers with running statistics are no parameters and stay as they are."
        )
    if "retrained" in figures and figures["after"]["membership"] is not None:
        gap = figures["after"]["membership"] - figures["retrained"]["membership"]
        if gap < -CONSPICUOUS:
            notes.append(
                f"Membership is {-gap:.2f} below that of the retrained model: what was forgotten is conspicuous."
            )
    return notes
