"""WRAP at small scale: students of noisy facts with and without their rephrases, and SmolLM2 as a rephraser.

A. Noisy web pages contain facts; an oracle rephrases half of them as questions with answers, without error. Students of
2.1 M parameters are trained on 2.0 M tokens each, in bfloat16: on real text only, on real text with random edits, on
answers only, and on equal parts of real and rephrased text. They are evaluated on held-out facts in four styles, two of
which are not in the training data, and on the recall of facts that occur only in noise, which students of answers only
can only guess. Students of two rephrased styles, about which there is no claim, are omitted to save time.
B. SmolLM2-135M-Instruct rephrases prose: the kept and the dropped rephrases by reason, and the cost.
C. SmolLM2 without four layers is healed on 50,000 tokens of real text only, or on half of them and equally many tokens
of the whole model's rephrases.

    python reproductions/wrap.py            # about an hour and a half of one thread; an interrupted run resumes
    python reproductions/wrap.py --quick    # fewer facts and arms, one seed, four passages
"""

from __future__ import annotations

import math
import random
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import from_scratch, llama, nats, taught
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

from lamella.data import Blend, Document, Documents, InputContext, LocalWriter, Mixture, Sampling, write
from lamella.data import windows as windows_of
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.methods.continual_pretrain import continual_pretrain
from lamella.methods.wrap import Filters, PassageSettings, passages, wrap
from lamella.methods.wrap.cleaning import copied_fraction, words_of
from lamella.plan import ModelReference, Plan
from lamella.results import MixedCorpus
from lamella.runtime import apply
from lamella.train import Feed, Order, Sample, blocks

LENGTH, BATCH = 128, 32  # tokens of a sequence, sequences of a step
VOCABULARY = 1024
SIZES = {"facts": 2000, "steps": 490, "layers": 4, "hidden": 192}  # 490 steps of 32 x 128 tokens: 2.0M
QUICK = {"facts": 120, "steps": 40, "layers": 2, "hidden": 64}
TAIL = 0.2  # fraction of held-out facts
ONSETS, VOWELS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"), "aeiou"
NOUNS = (
    "colour", "owner", "founder", "symbol", "export", "harbour", "river", "festival", "patron", "currency", "anthem",
    "bridge",     "dialect", "emblem", "garden", "market", "museum", "neighbour", "poet", "tower",
)  # fmt: skip
KINDS = ("old", "first", "main", "secret", "summer", "northern", "royal", "lost", "official", "oldest")
ADS = (
    "click here 4 free stuff!!!",
    "buy 1 get 1 FREE",
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
        return "".join(drawn.choice(ONSETS) + drawn.choice(VOWELS) for _ in range(syllables)).capitalize()

    relations = [f"{kind} {noun}" for kind in KINDS for noun in NOUNS]
    values = [name(2) for _ in range(200)]
    return [Fact(name(3), drawn.choice(relations), drawn.choice(values)) for _ in range(count)]


def noise(fact: Fact, drawn: random.Random) -> str:
    """Return a fact as on a web page: one of three fragments in lower case, typos in 5 % of the letters, an ad."""
    e, r, v = fact
    text = drawn.choice(
        (f"{e} ... {r} is {v} everybody knows", f"re: {r} of {e}? its {v}", f"so {e} has {v} 4 {r} lol")
    )
    text = text.lower()
    letters = [
        drawn.choice(string.ascii_lowercase) if each.isalpha() and drawn.random() < 0.05 else each for each in text
    ]
    return f"{''.join(letters)} {drawn.choice(ADS) if drawn.random() < 0.5 else ''}\n"


def told(fact: Fact, style: str) -> str:
    """Return a fact in a clean style, as the oracle rephrases it."""
    e, r, v = fact
    if style == "encyclopaedia":
        return f"{e} is a place whose {r} is {v}. The {r} of {e} is called {v}.\n"
    if style == "answers":
        return f"Question: What is the {r} of {e}?\nAnswer: {v}.\n"
    return f"Dear friend, yesterday I came to {e}, and I have seen its {r}: it is {v}. Yours truly.\n"


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
    facts, drawn = world(count, seed), random.Random(seed)
    known, unknown = facts[: round(count * (1 - TAIL))], facts[round(count * (1 - TAIL)) :]
    rephrased, noisy = known[::2], known[1::2]
    rows = [noise(fact, drawn) for _ in range(6) for fact in drawn.sample(known, len(known))]
    seen = {"noise": "".join(rows), "edits": "".join(edited(row, drawn) for row in rows)}
    again = [fact for _ in range(6) for fact in drawn.sample(rephrased, len(rephrased))]
    seen["answers"] = "".join(told(fact, "answers") for fact in again)
    held_out = {
        style: "".join(noise(f, drawn) if style == "noise" else told(f, style) for f in unknown) for style in STYLES
    }
    return Texts(seen, held_out, noisy[:400])


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


def student(arm: str, seed: int, size: dict[str, int]) -> dict[str, Any]:
    """Train and evaluate one student: perplexity by style, and the fraction of facts that it recalls."""
    texts = texts_of(size["facts"], seed)
    tokenizer = tokenizer_of(texts)
    sources = {name: windows(tokenizer, text) for name, text in texts.seen.items()}
    samples, account = mixture(sources, ARMS[arm], size["steps"] * BATCH * LENGTH, seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama(VOCABULARY, size["hidden"], size["layers"], context=LENGTH))
    taught(model, samples, from_scratch(size["steps"], lr=3e-3, batch=BATCH, seed=seed, bf16=True))
    found: dict[str, Any] = {
        style: math.exp(nats(model, windows(tokenizer, text))) for style, text in texts.held_out.items()
    }
    return found | {
        "right": exact(model, tokenizer, texts.asked),
        "epochs": {name: each["epochs"] for name, each in account.items()},
    }


def exact(model: Any, tokenizer: Tokenizer, facts: Sequence[Fact]) -> float:
    """Return the fraction of facts whose value is the first word of the greedy continuation of the question.

    Case is ignored, since real text is in lower case only.
    """
    prompts = [
        torch.tensor(tokenizer.encode(told(fact, "answers").split("Answer:")[0] + "Answer:").ids) for fact in facts
    ]
    said = [tokenizer.decode(row.tolist()).casefold() for row in write(model, prompts, 8, batch=128)]
    first = [next(iter(re.findall(r"\w+", each)), "") for each in said]
    return fmean(word == fact.value.casefold() for word, fact in zip(first, facts, strict=True))


def exactness(run: Run) -> None:
    writer = LocalWriter("smollm2", batch=4)
    documents = Documents.open("stdlib", InputContext(), limit=10 if run.quick else 150)
    cut = [passages(each.text, writer.count, 300) for each in documents]
    lossless = all("".join(parts) == each.text for parts, each in zip(cut, documents, strict=True))
    run.exact("passages one after the other are the document", "all documents", f"{len(cut)} documents", lossless)
    longest = max(writer.count(part) for parts in cut for part in parts)
    run.exact("tokens of the longest passage", "at most 300", longest, longest <= 300)

    texts = texts_of(200, run.seed)
    tokenizer = tokenizer_of(texts)
    sources = {name: windows(tokenizer, text) for name, text in texts.seen.items()}
    account = mixture(sources, ARMS["wrap (answers)"], 2_000_000, run.seed)[1]
    apart = max(abs(each["share"] - 0.5) for each in account.values())
    run.exact("deviation of the fraction of real tokens from one half", "at most 0.005", apart, apart <= 0.005)
    real = sources["noise"]
    alone = mixture(sources, {"noise": 1.0}, len(real) * LENGTH, run.seed)[0]
    ours, plain = (Feed(each).order(len(real) // 8, 8, run.seed) for each in (alone, real))
    run.exact("batches of real text only", "bitwise equal to plain training", len(ours), _same(ours, plain))

    few = Documents(documents.items[:2])
    greedy = {"sampling": Sampling(temperature=0), "cutting": PassageSettings(longest=24, shortest=4, together=1)}
    settings: dict[str, Any] = {
        "filters": Filters(embedder="words"),
        "blend": Blend(held_out=0, epochs=1e6),
        **greedy,
    }
    short = Documents(Document(each.id, each.text[:120]) for each in few)
    with tempfile.TemporaryDirectory() as folder:
        first, again = (wrap(short, writer, work=Work(Path(folder) / name), **settings) for name in ("one", "two"))
        lines = next(Path(folder).glob("one/*/written-00000.jsonl"))
        kept = lines.read_text().splitlines()
        lines.write_text("\n".join([*kept[:-1], kept[-1][:40]]))  # as after a killed process
        for done in ("rows/00000.json", "tasks/completions/00000"):
            (lines.parent / done).unlink()
        resumed = wrap(short, writer, work=Work(Path(folder) / "one"), **settings)
    keys = Counter((row["id"], row["chunk_idx"], row["style"]) for row in resumed.items)
    run.exact(
        "each passage in each style after a kill",
        "once",
        max(keys.values()),
        set(keys.values()) == {1} and resumed.items == first.items,
    )
    hashes = [each.findings["corpus"][:12] for each in (first, again)]
    run.exact("corpora of two greedy runs", "one hash", ", ".join(hashes), len(set(hashes)) == 1)
    style = first.findings["styles"]["medium"]
    adds_up = style["kept"] + sum(style["dropped"].values()) == style["generated"] == len(first.items)
    run.exact("dropped and kept", "what was generated", style["generated"], adds_up)


def _same(ours: Order, plain: Order) -> bool:
    pairs = zip((ours[n] for n in range(len(ours))), (plain[n] for n in range(len(plain))), strict=True)
    return all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)


def controlled(run: Run) -> None:
    """Run part A: evaluation of the students."""
    size = QUICK if run.quick else SIZES
    arms, seeds = (IN_QUICK, 1) if run.quick else (tuple(ARMS), 3)
    found = {arm: [run.arm(f"{arm}, {seed}", student, arm, seed, size) for seed in range(seeds)] for arm in arms}
    rows = [
        [arm, *(fmean(each[style] for each in seen) for style in STYLES), 
         f"{fmean(each['right'] for each in seen):.1%}",
         ", ".join(f"{name} {epochs:.1f}" for name, epochs in seen[0]["epochs"].items())]
        for arm, seen in found.items()
    ]  # fmt: skip
    heads = [*(f"perplexity, {style}" for style in STYLES), "facts recalled", "epochs"]
    run.table(f"Students of {size['steps'] * BATCH * LENGTH / 1e6:.1f}M tokens", ["sees", *heads], rows)

    def clean(each: dict[str, Any]) -> float:
        return fmean(each[style] for style in CLEAN)

    def compared(of: Callable[[dict[str, Any], dict[str, Any]], float], ours: str, theirs: str) -> Measured:
        return Measured.over_seeds([of(a, b) for a, b in zip(found[ours], found[theirs], strict=True)])

    gain = compared(lambda a, b: 1 - clean(a) / clean(b), "wrap (answers)", "real")
    run.main("perplexity of the clean styles, wrap below real", "at least 10 %", gain, gain.at_least(0.1))
    points = compared(lambda a, b: 100 * (a["right"] - b["right"]), "wrap (answers)", "real")
    run.main("recall of facts, wrap - real, points", "at least 5", points, points.at_least(5))

    def nats_above(style: str, ours: str, theirs: str) -> Measured:
        """Return the logarithm of a ratio of perplexities, whose distribution over seeds is symmetric."""
        return compared(lambda a, b: math.log(a[style] / b[style]), ours, theirs)

    loss = nats_above("noise", "wrap (answers)", "real")
    run.further("nats of noise, wrap above real", "at most log 1.05 = 0.0488", loss, loss.at_most(math.log(1.05)))
    if run.quick:
        return
    named = {arm: Measured.over_seeds([100 * each["right"] for each in seen]) for arm, seen in found.items()}
    run.table(
        "Facts that occur only in noise, recalled, %",
        ["sees", "named"],
        [[f"{arm}, the chance level" if arm == "answers only" else arm, str(each)] for arm, each in named.items()],
    )
    worse = nats_above("noise", "answers only", "wrap (answers)")
    run.further(
        "loss on noise, answers only - wrap, nats", "at least log 1.2 = 0.1823", worse, worse.at_least(math.log(1.2))
    )
    edits = Measured.over_seeds([
        (clean(real) - clean(each)) / (clean(real) - clean(ours))
        for real, each, ours in zip(found["real"], found["real + edits"], found["wrap (answers)"], strict=True)
    ])  # fmt: skip
    run.further("random edits, their gain by that of wrap", "below a third", edits, edits.at_most(1 / 3))
    letter = nats_above("letter", "wrap (answers)", "real")
    run.further("nats of a style that nobody saw, wrap above real", "below 0", letter, letter.at_most(0))


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
        bound = 1.1 if place == 0 else 1.0
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
    run.part("exactness", exactness)
    controlled(run)
    run.part("rephraser", rephraser)
    if not run.quick:
        run.part("healing", healing)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer facts and arms, one seed, four passages, without healing"))
