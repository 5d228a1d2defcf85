"""Make a draft for a model: a smaller model that proposes its next tokens, cut and trained for acceptance.

A draft is good if the target accepts what it proposes, and if proposing is cheap. With an acceptance rate a, a draft
step that takes c target steps, and a pass over k + 1 tokens that takes v(k) target steps, k proposed tokens give

    speed-up = (1 - a^(k+1)) / (1 - a) / (k c + v(k))           Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8

The target writes the text. Every candidate, the model without some of its layers, learns from the target on it for a
short time; the candidate with the highest predicted speed-up is trained further, and the pair is measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt, MinLen
from torch import Tensor

from lamella.commands.compress.forms import is_int8
from lamella.commands.compress.healing import ADAPTERS, LR, SCHEDULE
from lamella.commands.heal.training import Training
from lamella.data import Text, load_text, windows
from lamella.data.decoding import Prompt, Sampling, decode
from lamella.data.samples import blocks
from lamella.errors import MethodError
from lamella.evaluate import Budget, DraftGain, FidelityTest, Ratio, bench, drafted_prompts
from lamella.evaluate.drafting import pass_costs, predicted_gain
from lamella.files import Finished, Work
from lamella.formatting import counted, percent, ratio
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.plan.quantize import int8_copy
from lamella.planners import DEFAULT
from lamella.progress import track
from lamella.registry import command, get_method
from lamella.report.drafting import gains_table
from lamella.report.figures import Figure, Scatter
from lamella.report.healing import training as training_figure
from lamella.result import Evidence, Summary, Table
from lamella.runtime import Draft, apply
from lamella.signature import Default, Settings
from lamella.stack import Stack, share
from lamella.train import Healed, TrainedEvidence, TrainingLog, refit
from lamella.zoo import computes_well, open_tokenizer

MOST = 8  # proposed tokens
BATCH = 16  # rows that the target writes together
HELD_OUT = 16  # maximum number of blocks on which the accept rate is measured, or for which layers are chosen
TRIALS = 0.5  # fraction of the training time for choosing among the candidates
PLANNING = 0.1  # minutes of all searches, as a fraction of those of training
LEARNT = 0.999  # accept rate from which there is nothing to learn
PROMPT, STEPS = 32, 16  # tokens of the prompt and decoding steps in a round of a timing loop
ANSWER = 48  # tokens that are generated for each prompt


@dataclass(kw_only=True)
class DraftModel(Healed):
    """A model that proposes tokens to another one."""

    kind = "draft"


@dataclass
class DraftCandidate:
    """A model without some of its layers.

    Attributes:
        layers: number of layers that were removed.
        stack: the model, after the last training.
        plan: the plan that it runs under.
        log: the log of the last training.
        trained: whether a training by the target has raised the accept rate.
    """

    layers: int
    stack: Stack
    plan: Plan
    log: TrainingLog
    trained: bool = False

    @property
    def view(self) -> Any:
        """The model under its plan."""
        return apply(self.stack, self.plan)


@command("draft", verb="draft", brief={"sequences": 8, "length": 32, "remove": (0.34,), "steps": 8, "prompts": 1})
def draft(
    stack: Stack,
    target: Stack,
    train: Annotated[Text, Default("general"), Settings(sequences=64)],
    *,
    remove: Annotated[tuple[Annotated[float, Ge(0), Lt(1)], ...], MinLen(1)] = (0.0, 0.25, 0.5),
    minutes: Annotated[float, Gt(0)] = 8.0,
    steps: Annotated[int, Ge(1)] | None = None,
    save_every: Annotated[int, Ge(1)] = 100,
    prompts: Annotated[int, Ge(1)] = 2,
    work: Work = Work(),
    seed: int = 0,
) -> DraftModel:
    """Make a draft: a model that proposes tokens which a larger one accepts, as many as possible in little time.

    Layers are removed as far as the predicted speed-up of the pair grows, and the rest is trained to predict what the
    target predicts, on text that the target writes. Accept rate and speed-up of the pair are measured on four kinds of
    prompts, beside the unchanged model and prompt lookup. The result is an ordinary checkpoint, for `--draft` and for
    transformers, vLLM and llama.cpp.

    Example: lamella draft smollm2 --target smollm2 -o draft
    lamella draft small --target large --train my-prompts.txt --minutes 30 -o draft
    lamella chat large --draft draft

    Args:
        stack: the model that becomes a draft, with the tokens of the target; it is not changed.
        target: the model that verifies.
        train: text whose blocks begin what the target writes: the first quarter of each is the prompt.
        remove: fractions of the layers that are removed, one candidate each.
        minutes: training time of all candidates together.
        steps: optimizer steps of the chosen candidate, instead of minutes; each trial has a quarter of them.
        save_every: steps between checkpoints.
        prompts: number of prompts of each kind on which the pair is measured.
        work: folder from which an interrupted run resumes.
        seed: random seed.

    Returns:
        The draft, with its measurements.

    Raises:
        MethodError: for a target with other tokens.
    """
    if open_tokenizer(target.path or target.name).get_vocab() != train.tokenizer.get_vocab():
        raise MethodError(f"target: {target.name} has other tokens than {stack.name}: give one with the same tokenizer")
    written = own_text(target, train.tokens, seed, work)
    count, length = train.tokens.shape
    fewer = min(HELD_OUT, max(1, count // 4))
    begun = windows(train.tokenizer, load_text(train.source.name, "test"), fewer, length, seed)
    unseen = own_text(target, begun, seed, work.within("test"))
    pair = DraftPair(target, FidelityTest(target, unseen, _prompt(unseen)), pass_costs(target.model, MOST))
    removed = sorted({round(fraction * len(stack)) for fraction in remove})
    search = PLANNING * minutes / len(removed)
    candidates = [_without(stack, layers, written[:HELD_OUT], search) for layers in removed]
    depends = {"target": target.describe(), "train": train.describe(), "seed": seed, "minutes": minutes, "steps": steps}
    finished = Finished(work.journal("trials"), depends | {"removed": removed})
    trials: list[dict[str, Any]] = []
    before: dict[int, float] = {}  # accept rates before training
    for each in track(candidates, "draft: trials") if len(candidates) > 1 else []:
        short = {"minutes": TRIALS * minutes / len(candidates)} if steps is None else {"steps": max(1, steps // 4)}
        before[each.layers] = _train(each, pair, written, short, train, work.within(f"trial-{each.layers}"))
        trials += finished.once(f"without {each.layers}", lambda each=each: pair.rows(each))  # type: ignore[misc]
    layers = max(trials, key=_predicted)["layers"] if trials else candidates[0].layers
    chosen = next(each for each in candidates if each.layers == layers)
    left = {"minutes": minutes * (1 - TRIALS if trials else 1)} if steps is None else {"steps": steps}
    start = _train(chosen, pair, written, left | {"save_every": save_every}, train, work.within("training"))
    rows = pair.rows(chosen)
    best = max(rows, key=_predicted)
    unchanged = max(pair.rows(_whole(stack)), key=_predicted)
    drafts = {
        "prompt lookup": Draft(),
        "unchanged": Draft(stack.name, _proposing(_in_form(stack.model, unchanged["form"]), unchanged["tokens"])),
        "draft": Draft("draft", _proposing(_in_form(chosen.view, best["form"]), best["tokens"])),
    }
    model = _proposing(chosen.stack.model, best["tokens"])
    return DraftModel(
        stack=Stack(model, name=f"{stack.name}, a draft for {target.name}", stack=chosen.stack.stack),
        plan=chosen.plan,
        reference=target,
        log=chosen.log,
        findings={
            "target": target.name,
            "passes": pair.passes,
            "before": before.get(layers, start),
            "trained": chosen.trained,
            "trials": trials,
            "rows": rows,
            "chosen": best,
            "unchanged": unchanged,
            "gains": _gains(target, drafts, drafted_prompts(train.tokenizer, prompts)),
        },
        data={"training": train.describe()},
    )


@dataclass(frozen=True)
class DraftPair:
    """A target, and what its drafts are measured with.

    Attributes:
        target: the model that verifies.
        test: compares a draft with the target on text that the target has written.
        passes: time of a pass over 1, 2, ... tokens, in steps of the target.
    """

    target: Stack
    test: FidelityTest
    passes: list[float]

    def accepted(self, view: Any) -> float:
        """Return the fraction of a model's tokens that the target accepts under greedy decoding."""
        return self.test.of(view).top1.mean

    def rows(self, candidate: DraftCandidate) -> list[dict[str, Any]]:
        """Measure a candidate with its weights as they are, and in int8 where that runs.

        Args:
            candidate: the candidate.

        Returns:
            For each form the removed ``layers``, the accept rate under greedy decoding, the time of a ``step`` in
            steps of the target, and the number of proposed ``tokens`` with the highest ``predicted`` speed-up.
        """
        views = {"": candidate.view}
        if find_spec("torchao") is not None and is_int8(quantised := int8_copy(views[""])):
            views["int8"] = quantised
        timings = bench({"target": self.target.model, **views}, prompt=PROMPT, tokens=STEPS, rounds=3)
        found = []
        for form, view in views.items():
            accepted, step = self.accepted(view), 1 / timings[form][0].decode_speedup.median
            tokens, predicted = predicted_gain(accepted, step, self.passes)
            row = {"layers": candidate.layers, "form": form, "accepted": accepted, "step": step}
            found.append(row | {"tokens": tokens, "predicted": predicted})
        return found


def own_text(model: Stack, tokens: Tensor, seed: int, work: Work) -> Tensor:
    """Return blocks of which a model has written all but the first quarter, sampled at temperature 1.

    Args:
        model: the model.
        tokens: the blocks that begin them [rows, time].
        seed: random seed; each row has its own.
        work: the folder of the journal.

    Returns:
        Token ids [rows, time].
    """
    prompt, length = _prompt(tokens), tokens.shape[1]
    depends = {"model": model.name, "seed": seed, "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
    finished = Finished(work.journal("written"), depends)
    rows = [Prompt(row, length - prompt, seed + number) for number, row in enumerate(tokens[:, :prompt].tolist())]

    def continued(batch: list[Prompt]) -> list[list[int]]:
        return [list(row.ids) for row in decode(model.model, batch, Sampling(1.0, 1.0), set())]

    found: list[list[int]] = []
    for start in track(range(0, len(rows), BATCH), "draft: the target writes"):
        batch = rows[start : start + BATCH]
        new = finished.once(str(start), lambda batch=batch: continued(batch))  # type: ignore[misc]
        found += [[*row.ids, *ids] for row, ids in zip(batch, new, strict=True)]
    return torch.tensor(found)


def _prompt(tokens: Tensor) -> int:
    """Return the number of tokens of a block that begin it."""
    return max(1, tokens.shape[1] // 4)


def _without(stack: Stack, layers: int, tokens: Tensor, minutes: float) -> DraftCandidate:
    """Return a model without some of its layers, those whose loss a refit of the others corrects best."""
    if not layers:
        return _whole(stack)
    planner, budget = get_method(DEFAULT), Budget(share=layers / len(stack), minutes=minutes)
    series: PlanSeries = planner(stack, tokens, budget=budget, greedy=False, refine=1, refit=True)
    try:
        fitted = refit(stack, series[-1], tokens)
    except MethodError:  # a model whose sublayers do not end in a linear layer
        return DraftCandidate(layers, stack, series[-1], TrainingLog({}))
    assert isinstance(fitted.stack, Stack)
    return DraftCandidate(layers, fitted.stack, fitted.plan, fitted.log)


def _whole(stack: Stack) -> DraftCandidate:
    return DraftCandidate(0, stack, Plan(model=ModelReference.of(stack)), TrainingLog({}))


def _train(
    candidate: DraftCandidate, pair: DraftPair, written: Tensor, time: dict[str, Any], train: Text, work: Work
) -> float:
    """Distil the target into a candidate on text that the target has written, if that raises the accept rate.

    Returns:
        The accept rate before it.
    """
    before = pair.accepted(candidate.view)
    if before >= LEARNT:
        return before
    target, samples = pair.target, blocks(written, loss_on="all")
    bf16 = computes_well(torch.bfloat16, target.device)
    options = ADAPTERS | SCHEDULE | {"lr": LR, "batch": 1, "bf16": bf16, "log_every": 1} | time
    training = Training.prepared(
        candidate.stack, candidate.plan, train.context, samples, teacher=target, loss="kd", options=options
    )
    healed, _ = training.run(work)
    assert isinstance(healed.stack, Stack)
    candidate.log = healed.log  # shown in the report, whether the training is kept or not
    if pair.accepted(apply(healed.stack, healed.plan)) > before:
        candidate.stack, candidate.plan, candidate.trained = healed.stack, healed.plan, True
    return before


def _predicted(row: dict[str, Any]) -> float:
    return float(row["predicted"])


def _in_form(model: Any, form: str) -> Any:
    return int8_copy(model) if form else model


def _proposing(model: Any, tokens: int) -> Any:
    """Return a model, with the same weights, that proposes this number of tokens in transformers' ``generate``."""
    proposing = share(model)
    proposing.generation_config.num_assistant_tokens = tokens
    proposing.generation_config.num_assistant_tokens_schedule = "constant"
    return proposing


def _gains(target: Stack, drafts: dict[str, Draft], prompts: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Return what drafts gain on each prompt, by name and kind of text."""
    return {
        name: {
            kind: [asdict(DraftGain.of(target.model, each, row.to(target.device), ANSWER)) for row in rows]
            for kind, rows in prompts.items()
        }
        for name, each in track(drafts.items(), "draft: measuring")
    }


def summary(evidence: Evidence) -> Summary:
    """Summarise the choice, and what the pair gains.

    Args:
        evidence: the evidence of the draft.
    """
    found = evidence.findings
    best, unchanged = found["chosen"], found["unchanged"]
    form = " in int8" if best["form"] else ""
    measured = Ratio.of([each["measured"] for rows in found["gains"]["draft"].values() for each in rows])
    before = f"{percent(found['before'])} before training" if found["trained"] else "training did not raise it"
    verdict = (
        f"Of the draft without {counted(best['layers'], 'layer')}, {found['target']} accepts "
        f"{percent(best['accepted'])} of the tokens ({before}); of the unchanged "
        f"model, {percent(unchanged['accepted'])}. "
        f"With {counted(best['tokens'], 'token')} at a time{form}, {ratio(best['predicted'])} is predicted and "
        f"{ratio(measured.median)} measured."
    )
    lines = [
        f"Use it: lamella chat {found['target']} --draft FOLDER; generate(..., assistant_model=draft) in transformers, "
        "which reads the number of tokens from the draft; --speculative-config "
        f'{{"method": "draft_model", "model": "FOLDER", "num_speculative_tokens": {best["tokens"]}}} in vLLM; '
        "llama-server -md with the file of lamella quantize FOLDER --kind q8_0."
    ]
    if measured.median <= 1:
        lines.append("The pair is not faster than the target alone on this machine.")
    columns = ["layers removed", "form", "accepted", "step", "tokens", "predicted"]
    rows = [_row(each) for each in [*found["trials"], *found["rows"]]]
    tables = [
        Table("Candidates after their trial, and the chosen one; a step in steps of the target", columns, rows),
        gains_table("Speed-up of the target; time of a pass and of drafting in plain steps", "draft", found["gains"]),
    ]
    return Summary(verdict, tables, lines)


def _row(row: dict[str, Any]) -> list[Any]:
    shown = [row["layers"], row["form"] or "as it is", percent(row["accepted"])]
    return [*shown, f"{row['step']:.2f}", row["tokens"], ratio(row["predicted"])]


def figures(evidence: Evidence) -> list[Figure]:
    """Plot accept rate over the time of a step for all candidates, and the training loss.

    Args:
        evidence: the evidence of the draft.
    """
    assert isinstance(evidence, TrainedEvidence)
    points = {
        f"{each['layers']} removed{', int8' if each['form'] else ''}": [(each["step"], each["accepted"])]
        for each in evidence.findings["trials"] or evidence.findings["rows"]
    }
    scatter = Scatter("time of a step, in steps of the target", "accept rate", points, title="Candidates")
    return [scatter, *([training_figure(evidence.curve)] if evidence.curve else [])]
