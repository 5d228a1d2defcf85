"""Evaluate changed models: their fidelity to the original, or the scores of all models on tasks."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from lamella.data import ImageText, Prompts, Text
from lamella.errors import MethodError, PlanError
from lamella.evaluate import ByteLoss, FidelityTest
from lamella.evaluate.confidence import CONFIDENCE, Interval, guarantee, in_percent, rounded
from lamella.evaluate.tasks import open_tasks, score
from lamella.formatting import counted, estimate
from lamella.registry import command
from lamella.report.figures import Figure, Lines, Points, Scatter
from lamella.result import Evidence, Summary, Table
from lamella.results import Study
from lamella.runtime import Drafted
from lamella.signature import Argument, Settings, Split
from lamella.zoo import ComparedModel, NamedDraft, SavedModel, open_tokenizer
from lamella.zoo.draft import OFF
from lamella.zoo.opening import tokenizer_of

Test = Annotated[Text | ImageText | Prompts, Split("test"), Settings(sequences=8, prompts=None)]
Share = Annotated[float, Gt(0), Lt(1)]


class Evaluation(Study):
    """Fidelities, or scores on tasks, of changed models."""

    kind = "evaluation"

    @property
    def code(self) -> int:
        """The exit code: 1 if an agreement was demanded that does not hold, or is undecided."""
        results = self.findings.get("results", {}).values()
        return int(any(each.get("verdict", "holds") != "holds" for each in results))

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the fidelities or scores in a table."""
        found = evidence.findings
        if "scores" in found:
            return _scores(found)
        if "per_byte" in found:
            return _per_byte(found, evidence.data["test"])
        return _fidelities(found, evidence.data["test"])


@command("eval", verb="eval", on="any", brief={"sequences": 2, "length": 16})
def evaluate(
    model: SavedModel,
    test: Test,
    changed: Annotated[tuple[ComparedModel, ...], Argument()] = (),
    draft: NamedDraft | None = None,
    *,
    whole: bool = False,
    at_least: Share | None = None,
    confidence: Share = CONFIDENCE,
    tasks: tuple[str, ...] = (),
    limit: Annotated[int, Ge(1)] | None = None,
    chat: bool = False,
    batch: Annotated[int, Ge(1)] = 16,
    trust_tasks: bool = False,
    run_generated_code: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Evaluate changed models: their fidelity to the original, or the scores of all models on tasks.

    Fidelity: KL divergence, top-1 agreement and perplexity on a text or on prompts of your own, with standard errors
    over sequences. The agreement also has a guarantee, which remains valid however often one looks. With tasks
    instead: the scores of the original and of changed models, with standard errors over questions, and paired
    differences, which are more precise since all models answer the same questions. Dynamic plans are scored as they
    generate: full depth on the prompt, reduced depth after it. Models with other tokens, such as those of a smaller
    vocabulary, predict other things, so all models are compared by their loss per byte of the text.

    Example: lamella eval smollm2 plan.json --test gsm8k
    lamella eval smollm2 smaller --test mine.jsonl --at-least 0.9
    lamella eval smollm2 smaller --tasks definitions

    Args:
        model: the original; a folder written by Lamella runs with its plan.
        test: text to evaluate on: of a file its last fifth, since plans may have been made on the rest. The first
            quarter of each sequence is the prompt and not scored. In a .jsonl file each line is a sequence: messages,
            or a prompt and response, of which the last answer is scored, or a text. For a model of images and text,
            rows of these.
        changed: models to evaluate: plan files, exported folders or models.
        draft: what proposes tokens of the answers of tasks, which are then generated one by one: lookup, or a smaller
            model with the same tokenizer. Drafting ends where it is slower than a batch without it.
        whole: evaluate on all of a file, if no plan was made on it.
        at_least: whether the top token agrees with the original's on at least this share of the positions of a prompt,
            on average: sequences are evaluated in random order until this is certain. Exits with 1 if it does not hold,
            or is undecided.
        confidence: probability that the bounds of the agreement hold.
        tasks: tasks to score on instead: definitions, gsm8k, humaneval, a task of lm-eval, or your own task file
            (.yaml). Needs the extra eval.
        limit: maximum number of questions of each task; all if omitted.
        chat: apply the chat template to the questions.
        batch: questions in a batch.
        trust_tasks: task files may name Python functions, which are executed, files elsewhere and data of the hub.
        run_generated_code: humaneval: execute the generated code, in a process without network access, which cannot
            write files and has a short time limit (on Linux; elsewhere a warning names what it may do).
        seed: random seed of the order of sequences, and of few-shot examples.

    Returns:
        Fidelities, losses per byte, or scores by name.

    Raises:
        PlanError: if there is nothing to compare.
    """
    check_options(changed, tasks, trust_tasks, run_generated_code, at_least, draft)
    if tasks:
        options: dict[str, Any] = {"limit": limit, "chat": chat, "batch": batch, "trusted": trust_tasks}
        options |= {"run_generated_code": run_generated_code, "seed": seed}
        return _scored(model, changed, tasks, options, draft or NamedDraft.open(OFF))
    original = model.running
    judge = test.part("whole") if whole else test
    described = judge.describe()
    found: dict[str, Any] = {"model": original.name, "cut": described.get("cut", "")}
    if isinstance(judge, Text) and (losses := _byte_losses(model, judge, changed)):
        if at_least is not None:
            raise PlanError("models with other tokens cannot agree token by token: leave at_least out")
        return Evaluation(findings=found | {"per_byte": losses}, data={"test": described})
    tokens = judge.tokens if isinstance(judge, Text) else judge
    fidelity = FidelityTest(original, tokens, keep=at_least is None)
    results = {}
    for each in changed:
        view = model.view(each.name)
        if at_least is None:
            results[each.name] = fidelity.of(view).as_dict(confidence)
        else:
            results[each.name] = _decided(fidelity, view, at_least, confidence, seed)
    found |= {"at_least": at_least, "available": len(tokens), "results": results}
    return Evaluation(findings=found, data={"test": described})


def check_options(
    changed: tuple[ComparedModel, ...] = (),
    tasks: tuple[str, ...] = (),
    trust_tasks: bool = False,
    run_generated_code: bool = False,
    at_least: float | None = None,
    draft: NamedDraft | str | None = None,
) -> None:
    """Check, before a model is opened, whatever is known to be wrong.

    Args:
        changed: models to evaluate.
        tasks: tasks to score on.
        trust_tasks: whether task files are trusted.
        run_generated_code: whether generated code may be executed.
        at_least: the demanded agreement.
        draft: what proposes tokens of the answers of tasks.

    Raises:
        LamellaError: for unknown tasks, an agreement that is demanded on tasks, a draft without tasks, or nothing to
            compare.
    """
    if draft is not None and not tasks:
        raise MethodError("draft: it proposes tokens of the answers of tasks, and there are none: give tasks")
    if tasks:
        if at_least is not None:
            raise MethodError(
                f"at_least {at_least:g} is an agreement of predictions, not of tasks: leave one of them out"
            )
        open_tasks(tasks, trusted=trust_tasks, run_generated_code=run_generated_code)
    elif not changed:
        raise PlanError("nothing to compare: give plan files, folders or models, or tasks")


def _decided(fidelity: FidelityTest, view: Any, share: float, confidence: float, seed: int) -> dict[str, Any]:
    """Evaluate until it is certain whether a model agrees on this share of positions, or the test ends."""
    bounds, course = Interval(confidence=confidence), []
    for found in fidelity.after_each(view, seed):
        bounds = bounds.within(found.agreement(confidence))
        course.append([bounds.lower, found.top1.mean, bounds.upper])
        if bounds.verdict(share) != "undecided":
            break
    return found.as_dict(confidence) | {"agreement": vars(bounds), "verdict": bounds.verdict(share), "course": course}


def figures(evidence: Evidence) -> list[Figure]:
    """Return the bounds of the agreement: of all models, or where it had to be certain, of each after each sequence.

    Args:
        evidence: the evidence of an evaluation.
    """
    found = evidence.findings
    results = found.get("results", {})
    if results and found["at_least"] is None:
        bounds = [(each["agreement"]["lower"], each["agreement"]["upper"]) for each in results.values()]
        means = [(each["top1"]["mean"], float(row)) for row, each in enumerate(results.values())]
        series = {"mean, with its bounds": Points(means, x_range=bounds)}
        return [Scatter("same top token, share of positions", "", series, rows=list(results), title="Agreement")]
    shown = {name: each["course"] for name, each in results.items()}
    return [
        Lines(
            "evaluated sequences",
            "same top token, share of positions",
            dict(zip(("at least", "mean", "at most"), zip(*course, strict=True), strict=True))
            | {"demanded": [found["at_least"]] * len(course)},
            positions=range(1, len(course) + 1),
            title=f"Agreement of {name} with the original",
        )
        for name, course in shown.items()
    ]


def _byte_losses(model: SavedModel, test: Text, changed: tuple[ComparedModel, ...]) -> dict[str, dict[str, Any]]:
    """Return the loss per byte of all models by name; nothing if all have the original's tokens."""
    tokenizers = {each.name: tokenizer_of(each.name, test.tokenizer) for each in changed}
    if all(each.get_vocab() == test.tokenizer.get_vocab() for each in tokenizers.values()):
        return {}
    base = ByteLoss.of(model.running.model, test.tokenizer, test.strings)
    losses = {model.running.name: base.as_dict()}
    for name, tokenizer in tokenizers.items():
        found = ByteLoss.of(model.view(name), tokenizer, test.strings)
        losses[name] = found.as_dict() | {"difference": vars(found.since(base))}
    return losses


def _scored(
    model: SavedModel,
    changed: tuple[ComparedModel, ...],
    tasks: tuple[str, ...],
    options: dict[str, Any],
    draft: NamedDraft,
) -> Evaluation:
    """Score the original and changed models on tasks."""
    whole, lines = model.whole, {}
    own = open_tokenizer(whole.path or whole.name)
    scores = {}
    for name in (whole.name, *(each.name for each in changed)):
        view, tokenizer = model.running.model, own
        if name != whole.name:
            view, tokenizer = model.view(name), tokenizer_of(name, own)
        writer = Drafted(view, draft.draft_of(view, tokenizer))
        scores[name] = score(view, tokenizer, tasks, writer=writer, **options)
        if str(writer):
            lines[name] = str(writer)
    first, *_ = scores.values()
    found = {
        name: [
            each.as_dict() | ({} if (since := each.since(base)) is None else {"difference": vars(since)})
            for each, base in zip(rows, first, strict=True)
        ]
        for name, rows in scores.items()
    }
    return Evaluation(findings={"model": whole.name, "limit": options["limit"], "scores": found, "drafts": lines})


def _fidelities(found: dict[str, Any], data: dict[str, Any]) -> Summary:
    first = next(iter(found["results"].values()))
    rows = [["(original)", "", "", estimate(first["base_perplexity"])]]
    rows += [
        [name, *(estimate(each[what]) for what in ("kl", "top1", "perplexity"))]
        for name, each in found["results"].items()
    ]
    where = f"{found['cut']} of {data['data']}" if found["cut"] else data["data"]
    if found["at_least"] is None:
        title = f"{first['positions']} tokens in {counted(first['sequences'], 'sequence')}, ± standard error"
    else:  # each model stops after a number of sequences of its own
        title = "the sequences evaluated until the decision, ± standard error"
    columns = ["model", "KL, nats", "same top token", "perplexity"]
    lines = [_guaranteed(name, each, found) for name, each in found["results"].items()]
    return Summary(f"Fidelity to {found['model']} on {where}.", [Table(title, columns, rows)], lines)


def _guaranteed(name: str, each: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the guarantee of a model, or whether the demanded agreement holds."""
    bounds = each["agreement"]
    if "verdict" not in each:
        return f"{name}: {guarantee(bounds)}"
    share, confidence = in_percent(found["at_least"]), in_percent(bounds["confidence"])
    lower, upper = rounded(bounds)
    every = counted(found["available"], "sequence")
    decided = f"{each['verdict']} after {each['sequences']:,} of {every}"
    if each["verdict"] == "undecided":
        decided = f"is undecided after all {every}: give a longer test"
    return (
        f"{name}: agreement on at least {share} of positions {decided}. With {confidence} confidence it is "
        f"between {lower} and {upper} (anytime-valid)."
    )


def _per_byte(found: dict[str, Any], data: dict[str, Any]) -> Summary:
    first = found["per_byte"][found["model"]]
    rows = [
        [name, estimate(each["loss"]), estimate(each["difference"]) if "difference" in each else "", each["length"]]
        for name, each in found["per_byte"].items()
    ]
    title = f"{first['bytes']} bytes in {counted(first['texts'], 'text')}, ± standard error"
    where = f"{found['cut']} of {data['data']}" if found["cut"] else data["data"]
    columns = ["model", "loss, nats per byte", "against the original", "tokens per byte"]
    return Summary(f"Models with different tokens on {where}.", [Table(title, columns, rows)])


def _scores(found: dict[str, Any]) -> Summary:
    first = found["scores"][found["model"]]
    rows = []
    for number, base in enumerate(first):
        for name, scores in found["scores"].items():
            each = scores[number]
            what = f"{base['task']}, {base['metric']}" if name == found["model"] else ""
            difference = each.get("difference") if name != found["model"] else None
            rows.append([what, name, estimate(each), "" if difference is None else estimate(difference)])
    questions = {each["task"]: each["questions"] for each in first}
    title = ", ".join(f"{count} questions of {task}" for task, count in questions.items()) + "; ± standard error"
    columns = ["task", "model", "score", "against the original"]
    lines = [f"{name}: {line}" for name, line in found.get("drafts", {}).items()]
    return Summary(f"Scores of {counted(len(found['scores']), 'model')}.", [Table(title, columns, rows)], lines)
