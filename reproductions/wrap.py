"""WRAP at small scale: students of noisy facts with and without their rephrases, and SmolLM2 as a rephraser.

A. Noisy web pages contain 200 facts; an oracle rephrases half of them as questions with answers, without error.
Students of 1.0 M parameters are trained on 1.8 M tokens each, in bfloat16: on real text only, on real text with random
edits, on answers only, and on equal parts of real and rephrased text. They are evaluated on unseen facts in four
styles, two of which are not in the training data, and on the recall of facts that occur only in noise, which students
of answers only can only guess. All text is in lower case, and a tenth of every student's tokens are lists of the words
of all styles in random order, so that no student meets a style with words that it has never seen. The premises are that
the student of real text has stored the facts, which it must complete in the words of the noise, and that its perplexity
in the clean styles is below that of guessing. Learning rates are tuned on another world.
B. SmolLM2-135M-Instruct rephrases prose: the kept and the dropped rephrases by reason, and the cost.
C. SmolLM2 without four layers is healed on 50,000 tokens of real text only, or on half of them and equally many tokens
of the whole model's rephrases.

    python reproductions/wrap.py            # about two hours of one thread; an interrupted run resumes
    python reproductions/wrap.py --quick    # fewer facts and arms, one seed, four passages
"""

from __future__ import annotations

import math
import random
import re
import string
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import from_scratch, llama, nats, taught
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

from lamella.data import Blend, Document, Documents, InputContext, LocalWriter, Mixture, write
from lamella.data import windows as windows_of
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.methods.continual_pretrain import continual_pretrain
from lamella.methods.wrap import Filters, PassageSettings, passages, wrap
from lamella.methods.wrap.cleaning import copied_fraction, words_of
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Bars
from lamella.results import MixedCorpus
from lamella.runtime import apply
from lamella.train import Sample, blocks

LENGTH, BATCH = 128, 32  # tokens of a sequence, sequences of a step
VOCABULARY = 1024
SIZES = {"facts": 200, "steps": 450, "layers": 4, "hidden": 128}  # 450 steps of 32 x 128 tokens: 1.8M
QUICK = {"facts": 40, "steps": 40, "layers": 2, "hidden": 64}
UNSEEN = 200  # facts of which no student has text
TYPOS = 0.02  # fraction of the letters of noise
WORDS = 0.1  # fraction of every student's tokens that are words of all styles in random order
TUNING = 100  # the seed of the world on which rates are tuned
STORED = 0.5  # the fraction of facts that a student of real text must complete in the words of the noise
ONSETS, VOWELS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"), "aeiou"
NOUNS = (
    "colour", "owner", "founder", "symbol", "export", "harbour", "river", "festival", "patron", "currency", "anthem",
    "bridge", "dialect", "emblem", "garden", "market", "museum", "neighbour", "poet", "tower",
)  # fmt: skip
KINDS = ("old", "first", "main", "secret", "summer", "northern", "royal", "lost", "official", "oldest")
ADS = (
    "click here 4 free stuff!!!",
    "buy 1 get 1 free",
    "subscribe now",
    "cookies? accept all",
    "home > page 2 > back",
    "ad: cheap flights",
)
SYNONYMS = {
    "has": "owns",
    "is": "equals",
    "the": "that",
    "of": "from",
    "everybody": "anyone",
    "knows": "learns",
    "called": "named",
}
CLEAN = ("encyclopaedia", "answers")
STYLES = ("noise", *CLEAN, "letter")  # encyclopaedia and letter are not trained on
ARMS = {  # the training data of a student, by fraction of the tokens
    "real": {"noise": 1.0},
    "real + edits": {"noise": 0.5, "edits": 0.5},
    "answers only": {"answers": 1.0},
    "wrap (answers)": {"noise": 0.5, "answers": 0.5},
}
IN_QUICK = ("real", "wrap (answers)")
PASSAGES = 150  # number of passages that SmolLM2 rephrases
HEALED = 392  # sequences to heal with: 50k tokens


class Fact(NamedTuple):
    entity: str
    relation: str
    value: str


def world(count: int, seed: int) -> list[Fact]:
    """Return facts with 200 relations; entities and values are made-up names."""
    drawn = random.Random(seed)

    def name(syllables: int) -> str:
        return "".join(drawn.choice(ONSETS) + drawn.choice(VOWELS) for _ in range(syllables))

    relations = [f"{kind} {noun}" for kind in KINDS for noun in NOUNS]
    values = [name(2) for _ in range(200)]
    return [Fact(name(3), drawn.choice(relations), drawn.choice(values)) for _ in range(count)]


def noise(fact: Fact, drawn: random.Random) -> str:
    """Return a fact as on a web page: one of three fragments with typos, and an ad after every other one."""
    e, r, v = fact
    text = drawn.choice(
        (f"{e} ... {r} is {v} everybody knows", f"re: {r} of {e}? its {v}", f"so {e} has {v} 4 {r} lol")
    )
    letters = [
        drawn.choice(string.ascii_lowercase) if each.isalpha() and drawn.random() < TYPOS else each for each in text
    ]
    return f"{''.join(letters)} {drawn.choice(ADS) if drawn.random() < 0.5 else ''}\n"


def told(fact: Fact, style: str) -> str:
    """Return a fact in a clean style, as the oracle rephrases it."""
    e, r, v = fact
    if style == "encyclopaedia":
        return f"{e} is a place whose {r} is {v}. the {r} of {e} is called {v}.\n"
    if style == "answers":
        return f"question: what is the {r} of {e}?\nanswer: {v}.\n"
    return f"dear friend, yesterday i came to {e}, and i have seen its {r}: it is {v}. yours truly.\n"


def edited(text: str, drawn: random.Random) -> str:
    """Apply random edits: one word in ten is removed, and one in ten with a synonym is replaced."""
    words = [word for word in text.split(" ") if drawn.random() > 0.1]
    return " ".join(
        SYNONYMS.get(word, word) if drawn.random() < 0.1 or (word in SYNONYMS and drawn.random() < 0.5) else word
        for word in words
    )


class Texts(NamedTuple):
    """The training and evaluation data of the students.

    Attributes:
        seen: text by source.
        held_out: text of facts that do not occur in training, by style.
        asked: facts that occur in noise only.
    """

    seen: dict[str, str]
    held_out: dict[str, str]
    asked: list[Fact]


def texts_of(count: int, seed: int) -> Texts:
    """Return the texts; half of the training facts are also rephrased, and the other half occurs only in noise."""
    facts, drawn = world(count + UNSEEN, seed), random.Random(seed)
    known, unknown = facts[:count], facts[count:]
    rephrased, noisy = known[::2], known[1::2]
    rows = [noise(fact, drawn) for _ in range(30) for fact in drawn.sample(known, len(known))]
    seen = {"noise": "".join(rows), "edits": "".join(edited(row, drawn) for row in rows)}
    again = [fact for _ in range(30) for fact in drawn.sample(rephrased, len(rephrased))]
    seen["answers"] = "".join(told(fact, "answers") for fact in again)
    held_out = {
        style: "".join(noise(f, drawn) if style == "noise" else told(f, style) for f in unknown) for style in STYLES
    }
    words = sorted({word for style in STYLES for word in held_out[style].split()})
    seen["words"] = " ".join(drawn.choice(words) for _ in range(60 * count))
    return Texts(seen, held_out, noisy)


def tokenizer_of(texts: Texts) -> Tokenizer:
    """Return a small BPE, the same for all students."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts.seen.values(), trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, text: str) -> list[Sample]:
    """Split a text of one source into sequences of one length, so that no sequence has two sources."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    return blocks(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), loss_on="all")


def mixture(
    sources: dict[str, list[Sample]], shares: dict[str, float], tokens: int, seed: int
) -> tuple[list[Sample], dict[str, Any]]:
    """Return the training sequences of a student by fractions of tokens, and their statistics."""
    sizes = {name: [LENGTH] * len(sources[name]) for name in shares}
    mixed = Mixture(sizes, shares, epochs=10_000, seed=seed)
    picks = mixed.picks(tokens)
    return [sources[name][number] for name, number in picks], mixed.account(picks)


def student(arm: str, seed: int, size: dict[str, int], rate: float) -> dict[str, Any]:
    """Train and evaluate one student: perplexity by style, and which facts it recalls."""
    texts = texts_of(size["facts"], seed)
    tokenizer = tokenizer_of(texts)
    sources = {name: windows(tokenizer, text) for name, text in texts.seen.items()}
    shares = {name: (1 - WORDS) * share for name, share in ARMS[arm].items()} | {"words": WORDS}
    samples, account = mixture(sources, shares, size["steps"] * BATCH * LENGTH, seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama(VOCABULARY, size["hidden"], size["layers"], context=LENGTH))
    taught(model, samples, from_scratch(size["steps"], lr=rate, batch=BATCH, seed=seed, bf16=True))
    found: dict[str, Any] = {
        style: math.exp(nats(model, windows(tokenizer, text))) for style, text in texts.held_out.items()
    }
    question = {fact: told(fact, "answers").split("answer:")[0] + "answer:" for fact in texts.asked}
    fragment = {fact: f"re: {fact.relation} of {fact.entity}? its" for fact in texts.asked}
    return found | {
        "right": recalled(model, tokenizer, question),
        "stored": recalled(model, tokenizer, fragment),
        "epochs": {name: each["epochs"] for name, each in account.items()},
    }


def recalled(model: Any, tokenizer: Tokenizer, asked: dict[Fact, str]) -> list[bool]:
    """Return, for each fact, whether its value is the first word of the greedy continuation of its prompt."""
    prompts = [torch.tensor(tokenizer.encode(prompt).ids) for prompt in asked.values()]
    answers = [tokenizer.decode(row.tolist()) for row in write(model, prompts, 8, batch=128)]
    first = [next(iter(re.findall(r"\w+", each)), "") for each in answers]
    return [word == fact.value for word, fact in zip(first, asked, strict=True)]


def clean(found: dict[str, Any]) -> float:
    """Return the mean perplexity of the clean styles."""
    return fmean(found[style] for style in CLEAN)


def validated(rate: float, arm: str, size: dict[str, int]) -> float:
    """Return a student's mean loss over all styles, in nats, on the world for tuning."""
    found = student(arm, TUNING, size, rate)
    return fmean(math.log(found[style]) for style in STYLES)


def controlled(run: Run) -> None:
    """Run part A: evaluation of the students."""
    size = QUICK if run.quick else SIZES
    arms, seeds = (IN_QUICK, range(1)) if run.quick else (tuple(ARMS), range(run.seed, run.seed + 3))
    rates = dict.fromkeys(arms, 3e-3)
    if not run.quick:
        scores = {arm: partial(validated, arm=arm, size=size) for arm in arms}
        rates = {arm: each.value for arm, each in tuned(run, scores, [1e-3, 3e-3, 9e-3]).items()}
    before = run.arm("real, the world for tuning", student, "real", TUNING, size, rates["real"])
    stored = fmean(before["stored"])
    if not run.quick:
        run.premise(
            "facts that the student of real text completes in the words of the noise",
            f"at least {STORED}",
            stored,
            stored >= STORED,
        )
    most = max(before[style] for style in STYLES)
    run.premise("its highest perplexity of a style", f"below that of guessing, {VOCABULARY}", most, most < VOCABULARY)
    run.freeze("mean over seeds of the ratio of perplexities, and over seeds and facts of differences of recall", seeds,
               rates=rates, typos=TYPOS, words=WORDS, **size)  # fmt: skip
    found = {arm: [run.arm(f"{arm}, {seed}", student, arm, seed, size, rates[arm]) for seed in seeds] for arm in arms}
    rows = [
        [arm, *(fmean(each[style] for each in seen) for style in STYLES),
         *(100 * fmean(fmean(each[what]) for each in seen) for what in ("right", "stored")),
         ", ".join(f"{name} {epochs:.1f}" for name, epochs in seen[0]["epochs"].items())]
        for arm, seen in found.items()
    ]  # fmt: skip
    heads = [*(f"perplexity, {style}" for style in STYLES), "recalled by question, %", "by a fragment, %", "epochs"]
    run.table(
        f"Students of {size['steps'] * BATCH * LENGTH / 1e6:.1f}M tokens, on facts that occur only in noise; those of "
        "answers only can only guess", ["sees", *heads], rows,
    )  # fmt: skip
    perplexities = {arm: [fmean(each[style] for each in seen) for style in STYLES] for arm, seen in found.items()}
    run.figure("wrap-styles", Bars("style of the text", "perplexity", perplexities, tuple(STYLES), log_y=True))

    def log_ratio(of: Callable[[dict[str, Any]], float], ours: str, theirs: str) -> Measured:
        """Return the logarithm of a ratio, whose distribution over seeds is symmetric."""
        return Measured.over_seeds([math.log(of(a) / of(b)) for a, b in zip(found[ours], found[theirs], strict=True)])

    ratio = log_ratio(clean, "wrap (answers)", "real").exp()
    run.main("perplexity of the clean styles, wrap relative to real", "at most 0.9", ratio, ratio.at_most(0.9))
    right = {arm: np.array([100 * fmean(each["right"]) for each in seen]) for arm, seen in found.items()}
    points = Measured.over_seeds((right["wrap (answers)"] - right["real"]).tolist())
    run.main("recall of facts, wrap - real, points", "at least 5", points, points.at_least(5))

    def above(style: str, ours: str, theirs: str) -> Measured:
        return log_ratio(lambda found: found[style], ours, theirs).exp()

    loss = above("noise", "wrap (answers)", "real")
    run.further("perplexity of noise, wrap relative to real", "at most 1.05", loss, loss.at_most(1.05))
    if run.quick:
        return
    guessed = Measured.over_seeds((right["wrap (answers)"] - right["answers only"]).tolist())
    run.further("recall of facts, wrap - answers only (guessing), points", "above 0", guessed, guessed.at_least(0))
    worse = above("noise", "answers only", "wrap (answers)")
    run.further("perplexity of noise, answers only relative to wrap", "at least 1.2", worse, worse.at_least(1.2))
    edits = Measured.over_seeds([
        (clean(real) - clean(each)) / (clean(real) - clean(ours))
        for real, each, ours in zip(found["real"], found["real + edits"], found["wrap (answers)"], strict=True)
    ])  # fmt: skip
    run.further("random edits, their gain relative to that of wrap", "below a third", edits, edits.at_most(1 / 3))
    unseen = Measured.over_seeds([
        math.log(fmean(a[s] for s in ("encyclopaedia", "letter")) / fmean(b[s] for s in ("encyclopaedia", "letter")))
        for a, b in zip(found["wrap (answers)"], found["real"], strict=True)
    ]).exp()  # fmt: skip
    run.further("perplexity of styles that nobody saw, wrap relative to real", "below 1", unseen, unseen.at_most(1))


def prose(count: int, writer: LocalWriter, longest: int = 120) -> Documents:
    """Return passages of Python's documentation that are prose."""
    found = []
    for document in Documents.open("pydoc", InputContext()):
        for place, part in enumerate(passages(document.text, writer.count, longest)):
            words = re.findall(r"[A-Za-z]+", part)
            if writer.count(part) >= longest // 3 and sum(map(len, words)) > 0.7 * len(part.replace(" ", "")):
                found.append(Document(f"{document.id}.{place}", part))
    return Documents(found[:: max(1, len(found) // count)][:count])


def rephrased(run: Run, writer: LocalWriter, folder: Path) -> tuple[Documents, MixedCorpus]:
    """Return passages with SmolLM2's rephrases; those in the folder are not generated again."""
    documents = prose(2 if run.quick else PASSAGES, writer, 48 if run.quick else 120)
    styles, embedder = (("medium",), "words") if run.quick else (("medium", "qa"), "minilm")
    found = wrap(
        documents, writer, styles=styles, cutting=PassageSettings(longest=120, together=len(documents)),
        filters=Filters(embedder=embedder), blend=Blend(held_out=0, epochs=1e6), work=Work(folder), seed=run.seed,
    )  # fmt: skip
    return documents, found


def rephraser(run: Run) -> None:
    """Run part B: SmolLM2 rephrases."""
    with tempfile.TemporaryDirectory() as scratch:
        _, found = rephrased(
            run, LocalWriter("smollm2", batch=16), Path(scratch) if run.quick else run.work / "rephrased"
        )
    rows = []
    for name, each in found.findings["styles"].items():
        texts = [(row["text"], row["source_text"]) for row in found.items if row["style"] == name and row["text"]]
        shared = [copied_fraction(words_of(text), words_of(source), 8) for text, source in texts]
        why = ", ".join(f"{why} {count}" for why, count in each["dropped"].items())
        share = f"{each['kept'] / each['generated']:.0%}"
        rows.append([name, each["generated"], share, each["ratio"] or "", fmean(shared) if shared else "", why])
    heads = ["style", "generated", "kept", "length by source", "fraction of copied 8-grams", "dropped"]
    run.table("SmolLM2-135M-Instruct as a rephraser", heads, rows)
    cost, near = found.findings["cost"], found.findings["similarity"]
    run.table("What it costs", ["", ""], [
        ["tokens written", cost["tokens written"]],
        ["written for each kept token", cost["written for each kept token"] or ""],
        ["operations for each kept token", cost["flops for each kept token"] or ""],
        ["cost of generation relative to training on it", cost["generation / training"] or ""],
    ])  # fmt: skip
    if not run.quick:
        apart = near["own"] - near["another"]
        said = f"{near['own']:.2f} - {near['another']:.2f}"
        run.further("cosine of kept rephrases, own passage - another passage", "at least 0.2", said, apart >= 0.2)


def healing(run: Run) -> None:
    """Run part C: the whole model's rephrases heal its pruned version. With one seed this shows only a direction."""
    writer = LocalWriter("smollm2", batch=16)
    stack = writer.stack
    documents, found = rephrased(run, writer, run.work / "rephrased")  # those of B
    learnt = {each.id for each in documents[: PASSAGES * 4 // 5]}
    kept = [row for row in found.items if row["kept"] and row["style"] == "medium"]

    def texts(which: Callable[[str], bool]) -> tuple[str, str]:
        real = "\n\n".join(each.text for each in documents if which(each.id))
        return real, "\n\n".join(row["text"] for row in kept if which(row["id"]))

    real, again = texts(learnt.__contains__)
    judged = dict(zip(("documentation", "its rephrases"), texts(lambda each: each not in learnt), strict=True))
    tests = {name: cut(writer, text, 8, run.seed) for name, text in judged.items()}
    sequences = {  # no sequence mixes both kinds of text
        "real": cut(writer, real, HEALED, run.seed),
        "real and rephrased": torch.cat([cut(writer, text, HEALED // 2, run.seed) for text in (real, again)]),
    }
    plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in (20, 21, 22, 23)])
    views = {"none": apply(stack, plan)}
    for arm, ids in sequences.items():
        samples = blocks(ids, loss_on="all")
        healed = continual_pretrain(stack, samples, plan, steps=HEALED // 4, lr=2e-4, lora=16)
        views[arm] = apply(healed.stack, healed.plan)
    scores = {
        arm: [FidelityTest(stack, ids).of(view).perplexity.mean for ids in tests.values()]
        for arm, view in views.items()
    }
    rows = [[arm, *each] for arm, each in scores.items()]
    run.table("SmolLM2 without 4 of 30 layers, healed (one seed: a direction)", ["healed by", *tests], rows)
    unique = [["real", writer.count(real)], ["rephrased", writer.count(again)]]
    run.table(f"What {HEALED * LENGTH} tokens are sampled from", ["text", "available tokens"], unique)
    for place, name in enumerate(tests):
        ratio = scores["real and rephrased"][place] / scores["real"][place]
        bound = 1.05 if place == 0 else 1.0  # a loss on real text as small as in part A
        run.further(f"perplexity of {name}, with rephrases by without", f"at most {bound}", ratio, ratio <= bound)


def cut(writer: LocalWriter, text: str, count: int, seed: int) -> torch.LongTensor:
    """Return windows of a text, repeated if it is short."""
    there = writer.count(text) // LENGTH
    if there < 1:
        text, there = text * (LENGTH // max(writer.count(text), 1) + 2), 1
    ids = windows_of(writer.tokenizer, text, min(count, there), LENGTH, seed)
    return ids.repeat(math.ceil(count / len(ids)), 1)[:count]


def experiment(run: Run) -> None:
    run.data = "made-up facts in four styles; Python's documentation, rephrased by SmolLM2-135M-Instruct"
    controlled(run)
    run.part("rephraser", rephraser)
    if not run.quick:
        run.part("healing", healing)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer facts and arms, one seed, four passages, without healing"))
