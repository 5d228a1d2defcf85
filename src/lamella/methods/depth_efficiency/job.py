"""The depth report of ``lamella inspect``: what every layer and sublayer does, before anything is decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lamella.data import load_text, windows
from lamella.errors import ArchitectureError, CalibrationError, ExportError
from lamella.files import write
from lamella.measure import (
    OutputDistance,
    Scores,
    angular_distance,
    block_influence,
    describe,
    stream_norms,
    sublayer_influence,
)
from lamella.methods.depth_efficiency.linear_maps import linear_maps
from lamella.methods.depth_efficiency.method import depth_efficiency
from lamella.methods.depth_efficiency.page import render_depth
from lamella.progress import track
from lamella.report import check_installed
from lamella.results import environment
from lamella.stack import Level, Stack, groups_at
from lamella.zoo import open_stack, open_tokenizer

LENGTH = 256  # tokens in each sequence
STUDY_LENGTH = 128  # in those of the study, which runs the model some hundred times
LEVELS: dict[str, Level] = {"sublayer": "sublayer", "layer": "block"}  # what is left out alone
MAPPED = 30  # tokens for each channel of the source that maps are fitted on and tested with


def depth_report(
    model: Any,
    *,
    text: str = "pydoc",
    sequences: int = 4,
    seed: int = 0,
    study: bool = True,
    compare: Any = None,
    output: Path | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Measure a model layer by layer.

    Args:
        model: anything that :func:`lamella.open` takes; a decoder with a tokenizer.
        text: what to measure on, its calibration split; see :func:`lamella.load_text`.
        sequences: how many sequences of 256 tokens.
        seed: chooses the sequences.
        study: whether to add what takes minutes: the effect of every layer on later ones, and on later tokens.
        compare: another decoder with the same tokenizer, for linear maps from this model to it.
        output: a folder for ``depth.html`` and ``depth.json``; made when it is not there, other files in it stay.
        allow_pickle: also open pickle checkpoints, which can run code of their author.

    Returns:
        ``model``, ``data``, ``environment``, ``seed`` and ``scores``. The scores, each as
        :meth:`lamella.measure.Scores.as_dict` gives it: ``block_influence`` [layers],
        ``sublayer_influence`` [sublayers], ``stream_norm`` [layers + 1], ``angular_distance`` [start, length], and the
        output's Jensen-Shannon divergence in nats without one sublayer or one layer, ``sublayer_removed`` [sublayers]
        and ``layer_removed`` [layers]. With ``study`` also that, as
        :meth:`lamella.methods.depth_efficiency.method.DepthStudy.as_dict` gives it, and with ``compare`` the ``maps``,
        as :meth:`lamella.methods.depth_efficiency.linear_maps.LinearMaps.as_dict` does.

    Raises:
        ArchitectureError: for a model that reads no text.
        CalibrationError: for too little text, or models to compare that do not read the same tokens.
        ExportError: when ``output`` cannot be written.
        LamellaError: when ``output`` is given and plotly or jinja2 is missing.
    """
    if output is not None:
        check_installed()
        _make_folder(Path(output))
    stack = _open_decoder(model, allow_pickle)
    other = None if compare is None else _open_decoder(compare, allow_pickle)
    source = load_text(text, "calibration")
    tokenizer = open_tokenizer(stack.path or model)
    tokens = windows(tokenizer, source, sequences, LENGTH, seed)
    data = source.provenance(tokens)
    report = {
        "schema": "lamella.methods.depth_efficiency.job/1",
        "model": {
            "name": stack.name,
            "family": stack.architecture.name,
            "layers": len(stack),
            "parameters": sum(parameter.numel() for parameter in stack.model.parameters()),
        },
        "data": data,
        "environment": environment(),
        "seed": seed,
        "scores": {
            "block_influence": block_influence(stack, tokens).as_dict(),
            "sublayer_influence": sublayer_influence(stack, tokens).as_dict(),
            "stream_norm": stream_norms(stack, tokens).as_dict(),
            "angular_distance": angular_distance(stack, tokens).as_dict(),
        }
        | {name: scores.as_dict() for name, scores in _removed_alone(stack, tokens).items()},
    }
    if study:
        rows = windows(tokenizer, source, sequences, STUDY_LENGTH, seed)
        report["study"] = {"data": source.provenance(rows)} | depth_efficiency(stack, rows, seed=seed).as_dict()
    if other is not None:
        if open_tokenizer(other.path or compare).get_vocab() != tokenizer.get_vocab():
            raise CalibrationError(f"{stack.name} and {other.name} have different tokenizers: maps need one for both")
        count = -(-MAPPED * stack.unembedding.weight.shape[1] // LENGTH)
        rows = windows(tokenizer, source, count, LENGTH, seed)
        maps = linear_maps(stack, other, rows).as_dict()
        report["maps"] = {"data": source.provenance(rows), "target": other.name} | maps
    if output is not None:
        write(Path(output) / "depth.html", render_depth(report))
        write(Path(output) / "depth.json", json.dumps(report, indent=2) + "\n")
    return report


def _open_decoder(model: Any, allow_pickle: bool) -> Stack:
    stack = open_stack(model, allow_pickle=allow_pickle)
    if not stack.architecture.causal:
        raise ArchitectureError(
            f"{stack.name} is a {stack.architecture.name}, which reads no text: the depth report measures decoders"
        )
    return stack


def _removed_alone(stack: Stack, tokens: Any) -> dict[str, Scores]:
    """What the output loses with one sublayer, or one layer, left out."""
    distance = OutputDistance(stack, tokens, "jsd")
    candidates = {what: groups_at(level, stack.positions) for what, level in LEVELS.items()}
    scores = {}
    for what, groups in candidates.items():
        values = [distance.cost((), group, np.inf).value for group in track(groups, f"each {what} alone")]
        name = f"{what}_removed"
        scores[name] = Scores(
            f"output JSD without the {what} (nats)", (what,), np.array(values), {"tokens": describe(tokens)}
        )
    return scores


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
