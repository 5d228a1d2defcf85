"""REWIRE at small scale: a pool of clean, degraded and worthless articles, an oracle that rewrites them, and students.

A. Clean articles contain some facts, degraded ones others; the rest of the pool is word salad. An oracle restores the
content of a degraded article; a second one invents the values of a fifth of the facts, consistently in all articles.
Both answer in the format that the prompt requires, so the method itself scores, parses, selects and mixes. The control
is WRAP, whose oracle restates the sentences of every document of the pool, without a purpose and without a selection.
Students of 1.0 M parameters see 1.2 M tokens each, in bfloat16: over eight seeds of the best raw text, and of mixtures
of it with the best rewrites and with the rephrases; over three seeds of the best raw text of a pool twice as large, and
of mixtures with all rewrites and with invented ones; over one of more raw text, of rewrites alone and of another
fraction of them. The premises are that a student of the best raw text knows its facts, and not those of degraded text.
Rates are tuned on another world.
B. SmolLM2-135M-Instruct rewrites short documents: how many of its answers can be parsed, and their cost.
C. The hashed classifier beside fastText; undecided if fastText is not installed.

    python reproductions/rewire.py            # about an hour and a half on one thread; an interrupted run resumes
    python reproductions/rewire.py --quick    # a small pool, fewer arms, one seed
"""

from __future__ import annotations

import importlib.util
import math
import random
import string
import tempfile
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import from_scratch, llama, nats, taught
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

from lamella.data import (
    Blend,
    Completion,
    Document,
    Documents,
    InputContext,
    LocalWriter,
    Mixture,
    Sampling,
    Writer,
    WritingRequest,
    write,
)
from lamella.files import Work
from lamella.methods.rewire import PoolRules, QualityFilter, Rewriting, cross_fitted, fit_quality, rewire, top
from lamella.report.figures import Scatter
from lamella.train import Sample, blocks

LENGTH, BATCH = 128, 8
VOCABULARY = 1024
SIZES = {"facts": 1200, "clean": 600, "steps": 1200, "layers": 4, "hidden": 128}  # a tenth of the pool is clean
QUICK = {"facts": 60, "clean": 40, "steps": 60, "layers": 2, "hidden": 64}
TOPICS = 60
TOLD = 5  # facts per article
RELATIONS = ("colour", "owner", "founder", "symbol", "export", "river", "patron", "bridge", "emblem", "tower")
BOILERPLATE = (
    "Log in to comment.",
    "Share this page!",
    "You may also like these offers.",
    "Cookie settings",
    "Next page >>",
)
OPENINGS = ("This article explains what is known about", "Here is an overview of", "The following paragraphs introduce")
ARMS = {  # sources of a student's training data
    "raw, top 10 %": ("raw",),
    "raw, top 20 %": ("raw20",),
    "raw of a pool twice as large": ("raw2x",),
    "rewritten, top 10 %": ("syn",),
    "mix 1:1": ("raw", "syn"),
    "mix with WRAP's rephrases": ("raw", "rephrased"),
    "mix 0.6:0.4": ("raw", "syn"),
    "mix, all rewrites": ("raw", "rewritten"),
    "mix, invented values": ("raw", "invented"),
}
RAW, MIX, CONTROL, TWICE = "raw, top 10 %", "mix 1:1", "mix with WRAP's rephrases", "raw of a pool twice as large"
ALL, INVENTED = "mix, all rewrites", "mix, invented values"
IN_QUICK = (RAW, MIX)
SEEDS = dict.fromkeys((RAW, MIX, CONTROL), 8) | dict.fromkeys((TWICE, ALL, INVENTED), 3)  # others: one, without claims
TUNING = 100  # the seed of the world on which rates are tuned
KNOWN, UNKNOWN = 0.5, 0.2  # of the facts of clean and of degraded text: what a student of raw text knows, the premises
SHARES = {"mix 0.6:0.4": (0.6, 0.4)}
LOOSE = PoolRules(words_least=10, letters=0.5, near_duplicates=False)
SHORT = 150  # tokens per document for SmolLM2
START, END = "<improved response starts>", "<improved response ends>"


class Fact(NamedTuple):
    entity: str
    relation: str
    value: str

    @property
    def sentence(self) -> str:
        return f"The {self.relation} of {self.entity} is {self.value}."


class Article(NamedTuple):
    """A document of the pool, and its ground truth.

    Attributes:
        kind: clean, degraded or junk.
        topic: the topic.
        facts: the facts that it contains.
        text: the text in the pool.
    """

    kind: str
    topic: str
    facts: list[Fact]
    text: str


def name(drawn: random.Random, syllables: int) -> str:
    return "".join(drawn.choice("bdfgklmnprstvz") + drawn.choice("aeiou") for _ in range(syllables)).capitalize()


def world(count: int, seed: int) -> tuple[list[Fact], list[Fact], list[str], list[str]]:
    """Return the facts of clean articles, the facts of degraded ones, the values, and the topics."""
    drawn = random.Random(seed)
    values = [name(drawn, 2) for _ in range(50)]
    topics = [name(drawn, 2) for _ in range(TOPICS)]
    facts = [Fact(name(drawn, 3), drawn.choice(RELATIONS), drawn.choice(values)) for _ in range(count)]
    return facts[: count // 4], facts[count // 4 :], values, topics


def article(topic: str, facts: Sequence[Fact], drawn: random.Random) -> str:
    sentences = " ".join(each.sentence for each in facts)
    end = f"In short, this is what one should know of {topic}."
    return f"# {topic}\n\n{drawn.choice(OPENINGS)} {topic}. {sentences} {end}\n"


def degraded(topic: str, facts: Sequence[Fact], drawn: random.Random) -> str:
    """Return sentences in random order between boilerplate, in lower case, with typos."""
    lines = [*(each.sentence for each in facts), *drawn.sample(BOILERPLATE, 2), topic]
    drawn.shuffle(lines)
    text = "\n".join(lines).lower()
    return "".join(drawn.choice(string.ascii_lowercase) if c.isalpha() and drawn.random() < 0.03 else c for c in text)


def junk(values: Sequence[str], drawn: random.Random) -> str:
    words = [*RELATIONS, *values, "free", "page", "of", "the", "is", "buy", "now", "login", "2x"]
    return " ".join(drawn.choice(words).lower() for _ in range(50))


def pool_of(clean: int, size: dict[str, int], seed: int) -> list[Article]:
    """Return a pool in random order: a tenth clean, six tenths degraded, three tenths junk."""
    told, lost, values, topics = world(size["facts"], seed)
    drawn = random.Random(seed + clean)
    found = []
    for _ in range(clean):
        topic, facts = drawn.choice(topics), drawn.sample(told, TOLD)
        found.append(Article("clean", topic, facts, article(topic, facts, drawn)))
    for _ in range(6 * clean):
        topic, facts = drawn.choice(topics), drawn.sample(lost, TOLD)
        facts = [each for each in facts if drawn.random() < 0.5] or facts[:1]
        found.append(Article("degraded", topic, facts, degraded(topic, facts, drawn)))
    found += [Article("junk", drawn.choice(topics), [], junk(values, drawn)) for _ in range(3 * clean)]
    drawn.shuffle(found)
    return found


def explainers(count: int, seed: int) -> Documents:
    """Return good texts about facts that do not occur in any article."""
    drawn = random.Random(seed + 10_000)
    rows = []
    for number in range(count):
        facts = [
            Fact(name(drawn, 3), drawn.choice(RELATIONS), name(drawn, 2)) for _ in range(drawn.randrange(2, TOLD + 1))
        ]
        rows.append(Document(f"explainer {number}", article(name(drawn, 2), facts, drawn)))
    return Documents(rows)


class Words:
    """A word tokenizer, for counting."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


class Oracle(Writer):
    """A rewriter that knows the original content of an article.

    Args:
        articles: by the ids of their documents.
        invents: the fraction of facts whose value it invents.
    """

    name = "oracle"

    def __init__(self, articles: dict[str, Article], values: Sequence[str], invents: float, seed: int) -> None:
        self.articles, self.values, self.invents, self.seed = articles, list(values), invents, seed
        self.tokenizer = Words()

    def __deepcopy__(self, memo: Any) -> Oracle:
        return self

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for request in requests:
            if request.key not in done:
                text = self.improved(self.articles[request.key], random.Random(f"{self.seed} {request.key}"))
                answer = f"<thinking starts>\nA draft; a plan.\n<thinking ends>\n{START}\n{text}\n{END}"
                yield [
                    (request, Completion(answer, True, self.count(request.messages[0]["content"]), self.count(answer)))
                ]

    def improved(self, given: Article, drawn: random.Random) -> str:
        if given.kind == "junk":
            words = given.text.split()
            first, second = (" ".join(each) for each in (words[: len(words) // 2], words[len(words) // 2 :]))
            return f"# {given.topic}\n\n{first.capitalize()}. {second}."
        return article(given.topic, list(map(self.known, given.facts)), drawn)

    def known(self, fact: Fact) -> Fact:
        """Return a fact as this oracle knows it; an invented value is the same every time."""
        drawn = random.Random(f"{self.seed} {fact.entity} {fact.relation}")
        if drawn.random() >= self.invents:
            return fact
        return fact._replace(value=drawn.choice([each for each in self.values if each != fact.value]))

    def describe(self) -> dict[str, Any]:
        return {"oracle": self.invents, "seed": self.seed}


def rewritten(
    articles: Sequence[Article], size: dict[str, int], invents: float, seed: int, work: Path | None = None
) -> Any:
    """Run the method itself on a pool."""
    documents = Documents(Document(f"a{n}", each.text) for n, each in enumerate(articles))
    oracle = Oracle({f"a{n}": each for n, each in enumerate(articles)}, world(size["facts"], seed)[2], invents, seed)
    return rewire(
        documents, oracle, explainers(len(articles) // 5, seed), rules=LOOSE,
        judging=QualityFilter(negatives=len(articles) // 5), rewriting=Rewriting(embedder="words", together=500),
        blend=Blend(held_out=0.0, epochs=1e6), work=Work(work), seed=seed,
    )  # fmt: skip


def restated(given: Article) -> str:
    """Return a document as WRAP's oracle rephrases it: the same content in whole sentences."""
    return " ".join(each.sentence for each in given.facts) or f"{given.text.capitalize()}."


def material(size: dict[str, int], seed: int) -> dict[str, Any]:
    """Return the students' training data by source, and the method's findings on the pool."""
    articles = pool_of(size["clean"], size, seed)
    kinds = {f"a{n}": each.kind for n, each in enumerate(articles)}
    found = rewritten(articles, size, 0.0, seed)
    invented = rewritten(articles, size, 0.2, seed)
    rows = found.items
    scores, ids = [row["raw_score"] for row in rows], [row["id"] for row in rows]
    twice = pool_of(2 * size["clean"], size, seed)
    theirs = [f"t{n}" for n in range(len(twice))]
    positives = [each.text for each in explainers(len(articles) // 5, seed)]
    scores2 = cross_fitted(positives, theirs, [each.text for each in twice], len(articles) // 5, "hashed", seed)
    best2 = top(scores2.tolist(), theirs, [1] * len(twice), 0.1 * len(twice))
    chosen = [row for row in rows if row["in_syn"]]
    return {
        "raw": [row["source_text"] for row in rows if row["in_raw"]],
        "raw20": [rows[n]["source_text"] for n in top(scores, ids, [1] * len(rows), 0.2 * len(rows))],
        "raw2x": [twice[n].text for n in best2],
        "syn": [row["text"] for row in chosen],
        "rewritten": [row["text"] for row in rows if row["drop_reason"] is None],
        "invented": [row["text"] for row in invented.items if row["in_syn"]],
        "rephrased": [restated(each) for each in articles],
        "junk": fmean(kinds[row["id"]] == "junk" for row in chosen),
        "of clean": fmean(kinds[row["id"]] == "clean" for row in rows if row["in_raw"]),
        "overlap": found.findings["sets"]["overlap"],
        "spearman": found.findings["sets"]["spearman"],
        "off": max(abs(each["share"] - 0.5) for each in found.findings["mixture"]["sources"].values()),
    }


def tokenizer_of(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Sample]:
    ids = torch.tensor(tokenizer.encode("\n".join(texts)).ids)
    return blocks(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), loss_on="all")


def student(arm: str, seed: int, size: dict[str, int], given: dict[str, Any], rate: float) -> dict[str, Any]:
    """Train one student and evaluate it: perplexity on held-out clean articles, and which facts it completes."""
    told, lost, _, topics = world(size["facts"], seed)
    tokenizer = tokenizer_of([*given["raw"], *given["raw20"], *given["rewritten"]])
    names = ARMS[arm]
    sources = {name: windows(tokenizer, given[name]) for name in names}
    shares = dict(zip(names, SHARES.get(arm, (1 / len(names),) * len(names)), strict=True))
    mixed = Mixture({n: [LENGTH] * len(each) for n, each in sources.items()}, shares, epochs=1e6, seed=seed)
    picks = mixed.picks(size["steps"] * BATCH * LENGTH)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama(VOCABULARY, size["hidden"], size["layers"], context=LENGTH))
    samples = [sources[name][number] for name, number in picks]
    taught(model, samples, from_scratch(size["steps"], lr=rate, batch=BATCH, seed=seed, bf16=True))
    drawn = random.Random(seed + 99)
    unseen = [article(drawn.choice(topics), drawn.sample(told, TOLD), drawn) for _ in range(100)]  # clean ones
    return {
        "perplexity": math.exp(nats(model, windows(tokenizer, unseen))),
        "recycled": completed(model, tokenizer, lost[:300]),
        "clean": completed(model, tokenizer, told[:300]),
        "epochs": {name: each["epochs"] for name, each in mixed.account(picks).items()},
    }


def completed(model: Any, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[bool]:
    """Return, for each fact, whether greedy decoding generates its value."""
    prompts = [torch.tensor(tokenizer.encode(fact.sentence.removesuffix(f" {fact.value}.")).ids) for fact in facts]
    answers = [tokenizer.decode(row.tolist()).split(".")[0].strip() for row in write(model, prompts, 6, batch=128)]
    return [answer == fact.value for answer, fact in zip(answers, facts, strict=True)]


def validated(rate: float, arm: str, size: dict[str, int], given: dict[str, Any]) -> float:
    """Return a student's perplexity on held-out clean articles of the world for tuning."""
    return float(student(arm, TUNING, size, given, rate)["perplexity"])


def controlled(run: Run) -> None:
    """Run part A: evaluation of the students."""
    size = QUICK if run.quick else SIZES
    arms = IN_QUICK if run.quick else tuple(ARMS)
    seeds = {arm: range(run.seed, run.seed + (1 if run.quick else SEEDS.get(arm, 1))) for arm in arms}
    tuning = run.arm("material for tuning", material, size, TUNING)
    rates = dict.fromkeys(arms, 3e-3)
    if not run.quick:
        scores = {arm: partial(validated, arm=arm, size=size, given=tuning) for arm in SEEDS}
        rates |= {arm: each.value for arm, each in tuned(run, scores, [1.5e-3, 3e-3, 6e-3]).items()}
    before = run.arm("raw, the world for tuning", student, RAW, TUNING, size, tuning, rates[RAW])
    clean, recycled = fmean(before["clean"]), fmean(before["recycled"])
    if not run.quick:
        run.premise(
            "facts of clean text that a student of the best raw text completes",
            f"at least {KNOWN}",
            clean,
            clean >= KNOWN,
        )
    run.premise("facts of degraded text that it completes", f"at most {UNKNOWN}", recycled, recycled <= UNKNOWN)
    run.freeze("mean over seeds and facts of the difference of completed facts, mix 1:1 - raw", seeds[MIX],
               rates=rates, seeds_of_arms={arm: len(each) for arm, each in seeds.items()}, **size)  # fmt: skip
    given = [run.arm(f"material, {seed}", material, size, seed) for seed in seeds[RAW]]
    found = {
        arm: [run.arm(f"{arm}, {seed}", student, arm, seed, size, each, rates[arm])
              for seed, each in zip(seeds[arm], given, strict=False)]
        for arm in arms
    }  # fmt: skip
    rows = [
        [arm, fmean(each["perplexity"] for each in seen),
         *(fmean(fmean(each[what]) for each in seen) for what in ("recycled", "clean")),
         ", ".join(f"{name} {epochs:.1f}" for name, epochs in seen[0]["epochs"].items()), len(seen)]
        for arm, seen in found.items()
    ]  # fmt: skip
    heads = ["perplexity of unseen articles", "recycled facts completed", "clean facts completed", "epochs", "seeds"]
    run.table(f"Students of {size['steps'] * BATCH * LENGTH / 1e6:.1f}M tokens", ["sees", *heads], rows)
    facts = {arm: [(100 * recycled, 100 * clean)] for arm, _, recycled, clean, *_ in rows}
    x, y = (f"facts of {text} articles that are completed, %" for text in ("degraded", "clean"))
    run.figure("rewire-facts", Scatter(x, y, facts))
    pool = [[n, *(each[what] for what in ("of clean", "junk", "overlap", "spearman"))] for n, each in enumerate(given)]
    run.table(
        "The sets",
        ["seed", "clean in the raw set", "junk in the rewritten set", "overlap", "correlation of ranks"],
        pool,
    )
    claims(run, found, [each["junk"] for each in given])


def claims(run: Run, found: dict[str, list[dict[str, Any]]], junk: Sequence[float]) -> None:
    """Check what the rewrites gain, and what they cost."""

    def apart(what: str, ours: str, theirs: str) -> Measured:
        """Return the difference of completed facts in points, over the seeds of both arms."""
        both = zip(found[ours], found[theirs], strict=False)
        return Measured.over_seeds([100 * (fmean(a[what]) - fmean(b[what])) for a, b in both])

    def perplexity(ours: str, theirs: str) -> Measured:
        both = zip(found[ours], found[theirs], strict=False)
        return Measured.over_seeds([math.log(a["perplexity"] / b["perplexity"]) for a, b in both]).exp()

    gain = apart("recycled", MIX, RAW)
    run.main("points of recycled facts, mix 1:1 - raw", "at least 10", gain, gain.at_least(10))
    loss = apart("clean", MIX, RAW)
    run.main("points of clean facts, mix 1:1 - raw", "above -2", loss, loss.at_least(-2))
    ratio = perplexity(MIX, RAW)
    run.further("perplexity of unseen articles, mix 1:1 relative to raw", "at most 1", ratio, ratio.at_most(1))
    bad = Measured.over_seeds(junk)
    run.further("fraction of junk in the rewritten set", "below 0.05", bad, bad.at_most(0.05))
    if run.quick:
        return
    control = apart("recycled", MIX, CONTROL)
    run.further("points of recycled facts, mix 1:1 - WRAP's rephrases", "above 0", control, control.at_least(0))
    double = perplexity(MIX, TWICE)
    run.further("perplexity, mix 1:1 relative to raw of a pool twice as large", "at most 1", double, double.at_most(1))
    post = apart("recycled", MIX, ALL)
    run.further("points of recycled facts, mix 1:1 - all rewrites", "above 0", post, post.at_least(0))
    half = apart("recycled", MIX, INVENTED)
    run.further("points of recycled facts, mix 1:1 - invented values", "above 0", half, half.at_least(0))
    kept = Measured.over_seeds([
        fmean(invented["recycled"]) - fmean(raw["recycled"]) - 0.5 * (fmean(mix["recycled"]) - fmean(raw["recycled"]))
        for invented, raw, mix in zip(found[INVENTED], found[RAW], found[MIX], strict=False)
    ])  # fmt: skip
    run.further("gain with a fifth of the facts invented - half of the gain", "below 0", kept, kept.at_most(0))


def rewriter(run: Run) -> None:
    """Run part B: SmolLM2 rewrites."""
    writer = LocalWriter("smollm2", batch=8)
    documents = [each for each in Documents.open("stdlib", InputContext()) if 60 <= writer.count(each.text) <= SHORT]
    documents = documents[:: max(1, len(documents) // 60)][: 4 if run.quick else 60]
    good = Documents.open("pydoc", InputContext(), limit=200)
    answer, embedder = (60, "words") if run.quick else (300, "minilm")
    how = Rewriting(prompt="short", answer=answer, embedder=embedder)  # type: ignore[arg-type]
    calm = Sampling(temperature=0.7, top_p=0.9)  # at the paper's 1.0, so small a model drifts from its draft
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if run.quick else run.work / "rewritten"
        found = rewire(
            Documents(documents), writer, good, rules=LOOSE, rewriting=how, sampling=calm,
            blend=Blend(held_out=0.0, epochs=1e6), work=Work(folder), seed=run.seed,
        )  # fmt: skip
    said, cost = found.findings["rewrites"], found.findings["cost"]
    higher = lift([each.text for each in good], [r for r in found.items if r["drop_reason"] is None], run.seed)
    run.table("SmolLM2-135M-Instruct as a rewriter", ["", ""], [
        ["documents", said["requested"]], ["answers that can be parsed", said["parsed"]],
        *([f"failed: {why}", many] for why, many in said["failed"].items()),
        ["length by source", said["ratio"] or ""], ["similarity", said["similarity"] or ""],
        ["second classifier, rewrites above their documents", "" if higher is None else higher],
        ["tokens written", cost["tokens written"]], ["tokens a second", cost["tokens written"] / cost["seconds"]],
        ["written for each kept token", cost["written for each kept token"] or ""],
    ])  # fmt: skip
    compliance = said["parsed"] / said["requested"]
    run.further("answers of a 135M model that can be parsed", "at least a quarter", compliance, compliance >= 0.25)


def lift(good: Sequence[str], rows: Sequence[dict[str, Any]], seed: int) -> float | None:
    """Return the mean gain of rewrites over their documents by the second classifier; None for fewer than two.

    Each half is scored by a classifier of good texts against the rewrites of the other one.
    """
    halves = (rows[::2], rows[1::2])
    if not halves[1]:
        return None
    found: list[float] = []
    for ours, theirs in (halves, halves[::-1]):
        quality = fit_quality(good, [row["text"] for row in theirs], "hashed", seed)
        found += (quality([row["text"] for row in ours]) - quality([row["source_text"] for row in ours])).tolist()
    return fmean(found)


def classifiers(run: Run) -> None:
    """Run part C: the hashed classifier beside fastText, on articles of both kinds."""
    area, tenth = (
        ("area under the curve, hashed - fastText", "within 0.02"),
        ("the best tenth of both", "at least 80 %"),
    )
    if importlib.util.find_spec("fasttext") is None:
        for name, expected in (area, tenth):
            run.further(name, expected, "fastText is not installed here", None)
        return
    size = QUICK if run.quick else {**SIZES, "clean": 300}
    articles = pool_of(size["clean"], size, run.seed)
    half = len(articles) // 2
    good = [each.text for each in explainers(half, run.seed)]
    fitted = {
        kind: fit_quality(good, [each.text for each in articles[:half]], kind, run.seed)
        for kind in ("hashed", "fasttext")
    }
    texts, labels = [each.text for each in articles[half:]], [each.kind == "clean" for each in articles[half:]]
    scores = {kind: quality(texts) for kind, quality in fitted.items()}
    areas = {kind: float(roc_auc_score(labels, each)) for kind, each in scores.items()}
    ids = [str(n) for n in range(len(texts))]
    best = {kind: set(top(each.tolist(), ids, [1] * len(ids), 0.1 * len(ids))) for kind, each in scores.items()}
    common = len(best["hashed"] & best["fasttext"]) / len(best["hashed"])
    rank = float(spearmanr(*scores.values()).statistic)
    run.table("Classifiers", ["", "area under the curve"], [[kind, area] for kind, area in areas.items()])
    apart = areas["hashed"] - areas["fasttext"]
    run.further(*area, apart, abs(apart) <= 0.02)
    run.further(*tenth, f"{common:.0%} (ranks correlate by {rank:.2f})", common >= 0.8)


def experiment(run: Run) -> None:
    run.data = (
        "made-up articles with facts, clean, degraded and worthless; docstrings, rewritten by SmolLM2-135M-Instruct"
    )
    controlled(run)
    run.part("rewriter", rewriter)
    run.part("classifiers", classifiers)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a small pool, fewer arms, one seed, four documents"))
