"""Repairing: train a bad habit away, and say what became of it and of everything else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.data import Pair, load_text, own_texts, read_pair_file, read_pairs, windows, write
from lamella.errors import MethodError
from lamella.evaluate import FidelityTest
from lamella.files import check_free, discard
from lamella.methods.irepair.method import BASELINES, OWN_TOKENS, irepair
from lamella.methods.irepair.page import render_repair
from lamella.methods.irepair.sensitivity import sensitivity
from lamella.methods.irepair.slices import Trace
from lamella.plan import Plan
from lamella.plan.export import export
from lamella.report import check_installed
from lamella.results import environment
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Sample, TrainingLog, blocks, collate, pairs, response_loss
from lamella.train.losses import continuation_log_probs
from lamella.zoo import chat_inputs, open_stack, open_tokenizer

METHODS = {"irepair": {}, **BASELINES}
TESTED = 50  # pairs that nothing is trained on, at most
NEW = 20  # tokens of a continuation that is looked at, as in the paper
NAMES = {"score": "loss on bad"}  # what the trainer calls otherwise
PROFILE = 16  # batches of the profile of the model as it was


def repair(
    model: Any,
    out: str | Path,
    *,
    bad: Path | None = None,
    good: Path | None = None,
    pair_file: Path | None = None,
    utility: str = "self",
    method: str = "irepair",
    match: str | None = None,
    chat: bool = False,
    test: str = "stdlib",
    seed: int = 202,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Repair a model on paired continuations, and export the result.

    A fifth of the pairs, 50 at most, is not trained on: on these the habit is measured before and after.

    Args:
        model: anything that :func:`lamella.open` takes.
        out: the folder to write: the checkpoint with its plan, ``trace.json``, ``evidence.json`` and ``repair.html``.
            Beside it, ``.OUT.repair`` lets an interrupted run go on.
        bad, good: files of continuations; see :func:`lamella.data.read_pairs`.
        pair_file: one file instead of the two; see :func:`lamella.data.read_pair_file`.
        utility: ``self`` for texts that the model writes, or a text; see :func:`lamella.load_text`.
        method: ``irepair``, or to compare with ``dapt``, ``dapt-kl`` or ``dpo``, which train all parameters.
        match: a regular expression that finds the habit in a continuation: then it is counted, and own texts that it
            is found in are not held to.
        chat: whether prompts go through the model's chat template; continuations then end the turn.
        test: the text on which everything else is measured.
        seed: of everything that is drawn.
        overwrite: replace ``out``.
        options: of :func:`lamella.methods.irepair.method.irepair`.

    Returns:
        The evidence.

    Raises:
        MethodError: for an unknown method, options that contradict each other, or pairs that do not fit together.
        CalibrationError: for files that are no paired continuations.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    out = Path(out)
    settings = _settings(method, options or {})
    habit = _pattern(match)
    texts = _read(bad, good, pair_file)
    check_free(out, overwrite)
    check_installed()
    stack = open_stack(model)
    tokenizer = open_tokenizer(stack.path or model)
    to_test = load_text(test, "test")
    test_tokens = windows(tokenizer, to_test, 8, min(256, _context(stack)), seed)
    train, judged = _split([_tokens(tokenizer, each, chat) for each in texts], seed)
    wanted = pairs([(prompt, right) for prompt, _, right in train], loss_on="all")
    unwanted = pairs([(prompt, wrong) for prompt, wrong, _ in train], loss_on="all")
    seen = settings.get("steps", len(train)) * settings.get("batch", 4) + settings.get("validation", 64)
    leash, source = _utility(stack, tokenizer, utility, min(len(train), seen), habit, seed)
    work = out.parent / f".{out.name}.repair"
    plan = irepair(stack, wanted, unwanted, utility=leash, seed=seed, out=work, **settings)
    log, trace = TrainingLog.read(work / "training" / "log.json"), Trace.read(work / "trace.json")

    fidelity = FidelityTest(stack, test_tokens)
    views = {"before": stack.model, "after": apply(stack, plan)}
    continued = {when: write(view, [prompt for prompt, *_ in judged], NEW) for when, view in views.items()}
    evidence = {
        "schema": "lamella.repair/1",
        "model": {"name": stack.name, "family": stack.architecture.name, "layers": len(stack)},
        "method": method,
        "settings": dict(log.settings),
        "measured": plan.provenance["measured"],
        "sites": plan.weights[0].sites if plan.weights else [],
        "share": plan.provenance["measured"]["parameters"] / sum(each.numel() for each in stack.model.parameters()),
        **{
            when: {
                **fidelity.of(view).as_dict(),
                **_on_pairs(view, judged),
                "habit": None if habit is None else _share(tokenizer, continued[when], habit),
            }
            for when, view in views.items()
        },
        "match": match,
        "profile": _profile(stack, {"bad": unwanted, "good": wanted, "utility": leash}, settings.get("batch", 4)),
        "curve": [
            {"step": point.step, "loss": point.loss, **{NAMES.get(name, name): v for name, v in point.parts.items()}}
            for point in log.train
        ],
        "held_out": [{"step": point.step, "loss": point.loss, **point.parts} for point in log.held_out],
        "samples": [
            {"prompt": tokenizer.decode(prompt), **{when: tokenizer.decode(new[n]) for when, new in continued.items()}}
            for n, (prompt, *_) in enumerate(judged[:5])
        ],
        "data": {
            "pairs": {"files": [str(file) for file in (bad, good, pair_file) if file], "sha256": _digest(texts)},
            "utility": source,
            "test": to_test.provenance(test_tokens),
        },
        "counts": {"trained": len(train), "judged": len(judged)},
        "seed": seed,
        "environment": environment(),
    }
    _write(stack, plan, out, evidence, trace, tokenizer, overwrite)
    discard(work, out)
    return evidence


def _settings(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of irepair that carry a method out."""
    if method not in METHODS:
        raise MethodError(f"method='{method}': choose one of {', '.join(METHODS)}")
    clash = sorted(METHODS[method].keys() & options.keys())
    if clash:
        raise MethodError(f"{method} sets {clash[0]}={METHODS[method][clash[0]]} itself: leave {clash[0]} out")
    return {**METHODS[method], **options}


def _pattern(match: str | None) -> re.Pattern[str] | None:
    try:
        return None if match is None else re.compile(match)
    except re.error as error:
        raise MethodError(f"match='{match}' is no regular expression ({error}): mend or leave it out") from None


def _read(bad: Path | None, good: Path | None, pair_file: Path | None) -> list[Pair]:
    if pair_file is not None and bad is None and good is None:
        return read_pair_file(pair_file)
    if bad is None or good is None or pair_file is not None:
        raise MethodError("give both --bad and --good, or --pairs alone: each bad continuation needs a good one")
    return read_pairs(bad, good)


def _tokens(tokenizer: Any, pair: Pair, chat: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt, bad and good continuation as token ids [time]."""
    if chat:
        messages = [{"role": "user", "content": pair.prompt}]
        prompt = chat_inputs(tokenizer, messages, torch.device("cpu"))["input_ids"][0]
    else:
        prompt = torch.tensor(tokenizer(pair.prompt)["input_ids"], dtype=torch.long)
    end = [tokenizer.eos_token_id] if chat and tokenizer.eos_token_id is not None else []
    bad, good = (
        torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], *end], dtype=torch.long)
        for text in (pair.bad, pair.good)
    )
    return prompt, bad, good


def _split(rows: list[tuple[Tensor, Tensor, Tensor]], seed: int) -> tuple[list[Any], list[Any]]:
    """What is trained on, and what is not."""
    count = min(TESTED, len(rows) // 5)
    if count == 0:
        raise MethodError(f"{len(rows)} pairs: give 5 or more, since a fifth of them is kept to measure on")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return [rows[n] for n in order[count:]], [rows[n] for n in order[:count]]


def _utility(
    stack: Stack, tokenizer: Any, utility: str, count: int, habit: re.Pattern[str] | None, seed: int
) -> tuple[list[Sample], dict[str, Any]]:
    """Text in general, and what evidence says of it."""
    length = min(OWN_TOKENS, _context(stack) - 1)
    if utility != "self":
        text = load_text(utility, "calibration")
        tokens = windows(tokenizer, text, count, length, seed)
        return blocks(tokens, loss_on="all"), text.provenance(tokens)
    texts = own_texts(
        stack.model,
        count,
        length,
        seed=seed,
        accept=lambda each: len(each) > 1 and (habit is None or not habit.search(tokenizer.decode(each[1:]))),
    )
    written = hashlib.sha256(b"".join(each.numpy().tobytes() for each in texts)).hexdigest()
    source = {"data": "the model's own samples", "split": "calibration", "tokens": sum(map(len, texts))}
    return [blocks(each[None], loss_on="all")[0] for each in texts], source | {"sha256": written}


def _context(stack: Stack) -> int:
    return int(getattr(stack.config, "max_position_embeddings", None) or 1024)


@torch.no_grad()
def _on_pairs(model: Any, judged: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """The loss on both continuations, in nats per token, and how often the good one is likelier per token."""
    losses = {}
    for place, name in ((1, "bad"), (2, "good")):
        rows = pairs([(row[0], row[place]) for row in judged], loss_on="all")
        sums = torch.cat([continuation_log_probs(model, _on(model, rows[n : n + 4])) for n in range(0, len(rows), 4)])
        losses[name] = -sums.cpu() / torch.tensor([len(row[place]) for row in judged])
    preferred = (losses["good"] < losses["bad"]).float().mean()
    return {"bad": float(losses["bad"].mean()), "good": float(losses["good"].mean()), "preferred": float(preferred)}


def _profile(stack: Stack, texts: dict[str, Sequence[Sample]], size: int) -> dict[str, list[float]]:
    """Which layers each kind of text pulls at in the model as it was."""
    return {
        name: sensitivity(
            stack,
            [_on(stack.model, rows[n : n + size]) for n in range(0, min(len(rows), PROFILE * size), size)],
            response_loss,
        ).values.tolist()
        for name, rows in texts.items()
    }


def _on(model: Any, rows: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples as a batch where the model is."""
    device = next(model.parameters()).device
    return {name: each.to(device) for name, each in collate(rows).items()}


def _share(tokenizer: Any, texts: Sequence[Tensor], habit: re.Pattern[str]) -> float:
    return sum(bool(habit.search(tokenizer.decode(each))) for each in texts) / len(texts)


def _digest(texts: Sequence[Pair]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _write(
    stack: Stack, plan: Plan, out: Path, evidence: dict[str, Any], trace: Trace, tokenizer: Any, overwrite: bool
) -> None:
    documents = {
        "evidence.json": json.dumps(evidence, indent=2) + "\n",
        "trace.json": json.dumps({"chosen": trace.chosen, "sensitivities": trace.sensitivities}) + "\n",
        "repair.html": render_repair(evidence, trace.chosen, trace.sensitivities),
    }
    where = ", ".join(evidence["sites"]) or "nothing"
    card = (
        f"# {stack.name}, repaired by Lamella\n\nTrained on {evidence['counts']['trained']} pairs of continuations "
        f"with {evidence['method']}. Changed: {where} ({evidence['share']:.1%} of all parameters); every other tensor "
        "is the original's. `evidence.json` has every measurement, `trace.json` the layer of each step, `repair.html` "
        "both to look at."
    )
    export(stack, plan, out, overwrite=overwrite, tokenizer=tokenizer, card=card, files=documents)
