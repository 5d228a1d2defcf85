"""CapRecover at small scale: classes of digits, captions of rendered scenes, and tokens of SmolLM2.

The claims: a weak attacker recovers more classes at deeper cuts, and a strong one nearly all at any cut; a fixed mask
hides nothing; captions recovered at deeper cuts contain more of what the victim was trained on and less of what it
discards; tokens are recovered near the embedding. Every attacker is trained until its loss on held-out images stops
improving, as in the command, those of captions for at most 3,000 steps at each rate: an attacker that is stopped early
makes a cut look safe. Further checks are that the weak attacker reaches the optimum of its loss, that attackers who
know a defence are ahead of those who do not, and that topics are recovered in deep layers.

The attackers of captions own 12,000 scenes of one or two objects, for victims of 0.39 million parameters, one for each
seed. Captions are scored word by word, given the true words before (teacher forcing), so that one wrong word does not
change the scores of the rest, and beam search has no influence; each score is compared with that from the features of
another image. In the earlier version of this experiment, with generated captions, the differences of three seeds had
standard deviations of 5 to 16 points: six seeds are used. Captions are audited without defences.

    python reproductions/caprecover.py            # about four hours on one core; an interrupted run resumes
    python reproductions/caprecover.py --digits   # without captions and SmolLM2, about an hour
    python reproductions/caprecover.py --quick    # two cuts, one seed, few steps
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import seeds_needed
from harness.measured import Measured
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import lamella
from lamella.data import Captioned, CaptionedImages, InputContext, Lazy, batches, load_text, windows
from lamella.evaluate.texts import TextScores
from lamella.files import Work
from lamella.methods.caprecover import (
    ATTACKERS,
    AuditData,
    Captioner,
    CaptionLoss,
    FourStages,
    LinkDefence,
    Victim,
    accuracy,
    hidden_states,
    measure_defences,
    nearest,
    record_features,
    recover_captions,
    run_attacks,
    scales,
    small_writer,
    train_attacker,
    train_captioner,
)
from lamella.methods.caprecover.attackers import AttackerKind, pooled
from lamella.methods.caprecover.audit import BATCH, WHO
from lamella.methods.caprecover.captioner import tokenise_captions
from lamella.methods.caprecover.captions import TRAINING as SPEAK
from lamella.methods.caprecover.digits import CUTS, prepare
from lamella.methods.caprecover.method import TRAINING as ATTACK
from lamella.methods.caprecover.tokens import RidgeRegression
from lamella.report.figures import Bars
from lamella.results.record import together
from lamella.stack import Stack
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo import nano, open_tokenizer
from lamella.zoo.worlds import COLOURS, SHAPES, render, scenes

ABOVE = 1e-9  # smallest difference that counts as a rise or a fall

# Classes of digits

VICTIM, ATTACKER = 700, 600  # number of digits; the other 497 are the test split
GUARDS = ("none", "uniform", "gaussian:3", "gaussian:10", "gaussian:30", "fixed:10")
DEFENDED = ("stage1", "stage3", "pooled")  # cuts at which the defences are compared
LEARNED = TrainConfig(steps=300, lr=2e-3, schedule="cosine", warmup=0.1, batch=64)  # of the victim
PILOT, MARGIN, MOST = (100, 101, 102), 0.02, 5  # seeds, precision of an accuracy, and maximum number of final seeds


def split_digits() -> list[list[Captioned]]:
    """Split the digits into disjoint sets for the victim, the attackers and the evaluation."""
    every = [
        each
        for part in ("calibration", "test")
        for each in CaptionedImages.open("digits", InputContext(split=part), count=2000).items  # type: ignore[arg-type]
    ]
    order = np.random.default_rng(0).permutation(len(every)).tolist()
    return [
        [every[each] for each in order[a:b]]
        for a, b in ((0, VICTIM), (VICTIM, VICTIM + ATTACKER), (VICTIM + ATTACKER, len(every)))
    ]


def victim_of_digits(images: Sequence[Captioned], seed: int, out: Path) -> Victim:
    torch.manual_seed(seed)
    model = FourStages()
    rows = [{"x": x, "y": torch.tensor(each.label)} for x, each in zip(prepare(images), images, strict=True)]
    config = replace(LEARNED, save_every=1000, seed=seed)
    fit(model, rows, supervised(class_cross_entropy), config, out=out, trainable=lambda name: True)
    return Victim(model.eval().requires_grad_(False), CUTS, prepare, "digits")


def digits(run: Run) -> None:
    ours, theirs, judges = split_digits()
    guards = [LinkDefence.parse(each) for each in (GUARDS[:1] + GUARDS[-2:] if run.quick else GUARDS)]
    cuts, defended = (["stage1", "pooled"], ["pooled"]) if run.quick else (list(CUTS), list(DEFENDED))
    steps = 8 if run.quick else None
    victim = victim_of_digits(ours, run.seed, run.work / "victim")
    sets = AuditData.of(victim, theirs, judges, cuts, Work(run.work / "features"), run.variant)
    x, labels = victim.prepare(judges), sets.test_labels
    known = float((victim.output(x).argmax(1) == labels).double().mean())
    run.premise("accuracy of the victim on unseen digits", "at least 97 %", f"{known:.1%}", known >= 0.97)
    seeds = range(1)
    if not run.quick:
        tight = [run.arm(f"pilot, {seed}", one_attack, sets, "stage1", "conv", "gaussian:30", seed, steps, run.work)
                 for seed in PILOT]  # fmt: skip
        seeds = range(seeds_needed(tight, MARGIN, MOST))
    run.freeze(
        "digits: mean accuracy over seeds; captions: over seeds and objects, of differences between cuts of the words "
        "read from an image's features less those from another image's",
        [*seeds],
        guards=list(map(str, guards)), defended=defended, attackers=list(ATTACKERS), caption_seeds=list(SEEDS),
        scenes=SCENES, tests=JUDGED, longest=LONGEST,
    )  # fmt: skip
    others = [cut for cut in cuts if cut not in defended]
    found = run.arm("attacks on digits", attacks, sets, others, guards[:1], seeds, steps, run.work / "attacks")
    found += run.arm("defended digits", attacks, sets, defended, guards, seeds, steps, run.work / "defended")
    results = {(row["cut"], row["attacker"], row["guard"]): row for row in found}
    columns = [f"{guard}{', static' if who == 'static' else ''}" for guard in guards for who in WHO]
    rows = []
    for cut in cuts:
        for attacker in ATTACKERS:
            known_here = [results.get((cut, attacker, str(guard))) for guard in guards]
            shares = [row and f"{100 * row[who]['mean']:.1f}" for row in known_here for who in WHO]
            rows.append([cut, attacker, *shares, results[cut, attacker, "none"]["steps"]])
    run.table(
        f"Digits that attackers recover (%), means over {len(seeds)} seeds; steps without a defence",
        ["cut", "attacker", *columns, "steps"],
        rows,
    )
    late = [" ".join(key) for key, row in results.items() if not row["converged"]]
    run.table("Attackers that were still improving at the maximum number of steps", ["attackers"],
              [[each] for each in late or ["none"]])  # fmt: skip
    links = measure_defences(victim, x, labels, cuts, [*guards, LinkDefence("gaussian", 100.0)])
    run.table(
        "Costs of the defences",
        ["cut", "defence", "bytes", "variance of features over noise", "change of logits"],
        [[row["cut"], row["guard"], row["bytes"], row["ratio"] or "", row["output_change"]] for row in links],
    )

    def of(cut: str, attacker: str, guard: str = "none", who: str = "adaptive") -> list[float]:
        values: list[float] = results[cut, attacker, guard][who]["values"]
        return values

    strongest = {
        said: [100 * max(fmean(of(cut, name, str(guard), who)) for cut in defended for name in ATTACKERS)
               for guard in guards]
        for who, said in zip(WHO, ("trained on the defence", "trained without it"), strict=True)
    }  # fmt: skip
    run.figure("caprecover-digits", Bars("defence", "digits recovered, %", strongest, [str(each) for each in guards]))
    first, last = Measured.over_seeds(of(cuts[0], "gap")), Measured.over_seeds(of(cuts[-1], "gap"))
    run.main("a weak attacker (gap), at the first stage", "at most 40 %", first, first.at_most(0.4))
    run.main("a weak attacker (gap), at the last cut", "at least 90 %", last, last.at_least(0.9))
    means = [fmean(of(cut, "gap")) for cut in cuts]
    run.main("a weak attacker (gap), over depth", "never falls", [round(each, 3) for each in means],
             means == sorted(means))  # fmt: skip
    least = min((Measured.over_seeds(of(cut, "conv")) for cut in cuts), key=lambda each: each.figure)
    run.main("a strong attacker (conv), at any cut", "at least 95 %", least, least.at_least(0.95))
    best = run.arm("gap at its optimum", at_the_optimum, sets, cuts)
    run.table(
        "Digits that a weak attacker (gap) recovers (%), as trained and at the optimum of its loss",
        ["cut", "as trained", "at the optimum"],
        [[cut, 100 * mean, 100 * optimum] for cut, mean, optimum in zip(cuts, means, best, strict=True)],
    )
    behind = max(optimum - mean for optimum, mean in zip(best, means, strict=True))
    run.further("accuracy that gap lacks to the optimum of its loss, at any cut", "at most 3 points",
                f"{100 * behind:.1f}", behind <= 0.03)  # fmt: skip
    gaps = [abs(fmean(of(cut, "conv", "fixed:10")) - fmean(of(cut, "conv"))) for cut in defended]
    run.further(
        "a fixed mask, for a strong attacker who knows it", "within 1 point of none", max(gaps), max(gaps) <= 0.01
    )
    ahead = {}
    for guard in map(str, guards[1:]):
        knows, not_knows = (
            np.mean([of(cut, attacker, guard, who) for cut in defended for attacker in ATTACKERS], axis=0)
            for who in WHO
        )
        ahead[guard] = Measured.over_seeds((knows - not_knows).tolist())
    least_of = min(ahead, key=lambda guard: ahead[guard].figure)
    run.further(
        "gain of knowing the defence, mean over cuts and attackers, smallest over defences",
        "at least 0",
        f"{ahead[least_of]} of {least_of}",
        together([each.at_least(0) for each in ahead.values()]),
    )
    loud = max(
        (Measured.over_seeds(of(cut, attacker, "gaussian:30")) for cut in defended for attacker in ATTACKERS),
        key=lambda each: each.figure,
    )
    run.further(
        "the strongest attacker under noise of 30 standard deviations", "at most 25 %", loud, loud.at_most(0.25)
    )
    prior = [run.arm(f"shuffled, {seed}", other_images, sets, cuts[-1], seed, steps, run.work) for seed in seeds]
    above = Measured.over_seeds([each - sets.majority for each in prior])
    run.further("attackers trained on features of other images, less the majority class", "at most 3 points",
                above, above.at_most(0.03))  # fmt: skip
    if not run.quick:
        curve = run.arm("sizes", by_size, sets, "stage3", seeds, run.work)
        run.table("Digits recovered by a strong attacker at stage3, by its number of images", ["images", "%"], curve)
        outputs = run.arm("outputs", on_outputs, victim, theirs, judges, run.work)
        run.further(
            "a linear attacker on the victim's own logits, less the victim's accuracy",
            "at least -2 points",
            f"{100 * (outputs - known):.1f}",
            outputs >= known - 0.02,
        )


def one_attack(
    sets: AuditData, cut: str, kind: AttackerKind, guard: str, seed: int, steps: int | None, out: Path
) -> float:
    """Return the accuracy of one attacker who knows the defence."""
    defence, config = LinkDefence.parse(guard), replace(ATTACK, steps=steps, seed=seed)
    folder = out / f"one {cut} {kind} {seed} {len(sets.train_labels)}"
    return accuracy(train_attacker(sets, cut, kind, defence, config, folder).model, sets, cut, defence)


def attacks(
    sets: AuditData, cuts: list[str], guards: list[LinkDefence], seeds: Sequence[int], steps: int | None, out: Path
) -> list[dict[str, Any]]:
    return run_attacks(
        sets, cuts=cuts, attackers=list(ATTACKERS), guards=guards, seeds=seeds, config=replace(ATTACK, steps=steps),
        work=Work(out), depends=[str(each) for each in guards],
    )  # fmt: skip


def other_images(sets: AuditData, cut: str, seed: int, steps: int | None, out: Path) -> float:
    return one_attack(sets.shuffled(seed), cut, "linear", "none", seed, steps, out / "shuffled")


def at_the_optimum(sets: AuditData, cuts: list[str]) -> list[float]:
    """Return the accuracy of the weak attacker (gap) at the optimum of its loss: logistic regression."""
    found = []
    for cut in cuts:
        train, test = (pooled(torch.stack(list(part[cut]))).numpy() for part in (sets.train, sets.test))
        attacker = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(train, sets.train_labels)
        found.append(float(attacker.score(test, sets.test_labels)))
    return found


def by_size(sets: AuditData, cut: str, seeds: Sequence[int], out: Path) -> list[list[Any]]:
    rows = []
    for count in (50, 100, 200, 400, len(sets.train_labels)):
        fewer = replace(
            sets,
            train={name: each[:count] for name, each in sets.train.items()},
            train_labels=sets.train_labels[:count],
        )
        shares = [100 * one_attack(fewer, cut, "conv", "none", seed, None, out) for seed in seeds]
        rows.append([count, str(Measured.over_seeds(shares))])
    return rows


def on_outputs(victim: Victim, theirs: Sequence[Captioned], judges: Sequence[Captioned], out: Path) -> float:
    whole = Victim(victim.model, {"logits": "classifier"}, victim.prepare, victim.name)
    sets = AuditData.of(whole, theirs, judges, ["logits"])
    return one_attack(sets, "logits", "linear", "none", 0, None, out / "outputs")


# Captions of scenes

SCENES, JUDGED, WRITTEN = 12_000, 2_000, 200  # number of scenes to attack with, to test on, and to write captions of
SEEDS = (0, 1, 2, 3, 4, 5)
STAGES = ("stage1", "stage4", "pooled")
SEE = TrainConfig(steps=800, lr=2e-3, batch=64, schedule="cosine", warmup=0.1)
WRITER_STEPS, LONGEST = 600, 3000  # training steps of the decoder, and maximum number of steps of attackers at a rate
ATTRIBUTES = {"colour": 0, "shape": 1, "cell": 3}  # by the position of their word among the five of an object


class SceneNet(nn.Module):
    """Network of four stages on colour images, with a head that predicts which coloured shapes are present anywhere."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for number, (width, stride) in enumerate(((32, 2), (64, 2), (128, 2), (256, 1)), start=1):
            convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            self.add_module(f"stage{number}", nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(before, len(SHAPES) * len(COLOURS))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, 5):
            x = self.get_submodule(f"stage{number}")(x)
        logits: Tensor = self.classifier(self.pool(x))
        return logits


KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def caption_of(scene: Any) -> str:
    """Describe every object with its colour, shape and cell, in reading order: ``red circle at a3 and ...``."""
    return " and ".join(f"{t.colour} {t.shape} at {'abcd'[t.row]}{t.column + 1}" for t in scene.objects)


def captioned(part: Any, count: int, seed: int) -> list[tuple[Captioned, Tensor]]:
    """Render images of one or two shapes with their captions and the coloured shapes that are present."""
    found = []
    for number, scene in enumerate(islice(scenes(part, seed, (1, 2)), count)):
        there = torch.tensor([float(any((t.colour, t.shape) == kind for t in scene.objects)) for kind in KINDS])
        found.append((Captioned(render(scene, seed=(seed, number)), caption_of(scene)), there))
    return found


def as_pixels(images: Sequence[Captioned]) -> Tensor:
    return torch.stack([torch.from_numpy(each.image).permute(2, 0, 1) / 127.5 - 1 for each in images])


def seeing(run: Run, seed: int) -> Victim:
    """Return a victim that is trained on which shapes are present; it can discard their positions."""
    steps = 8 if run.quick else SEE.steps or 0
    torch.manual_seed(seed)
    model = SceneNet()
    rows = [
        {"x": as_pixels([image])[0], "y": there} for image, there in captioned("calibration", _count(run), 1000 + seed)
    ]

    def presence(network: Any, batch: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(network(batch["x"]), batch["y"])

    fit(
        model,
        rows,
        supervised(presence),
        replace(SEE, steps=steps, seed=seed, save_every=steps),
        out=run.work / f"seeing {seed}",
        trainable=lambda name: True,
    )
    cuts = {each: each if each != "pooled" else "pool" for each in STAGES}
    return Victim(model.eval().requires_grad_(False), cuts, as_pixels, "scenes")


def _count(run: Run) -> int:
    return 200 if run.quick else SCENES


def recognised(run: Run, seed: int) -> float:
    """Return the F1 of the presence of coloured shapes that a victim predicts."""
    victim = seeing(run, seed)
    tested = captioned("test", 500, 2)
    truth = torch.stack([there for _, there in tested]) > 0.5
    found = victim.output(as_pixels([image for image, _ in tested])) > 0
    return float(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def of_captions(run: Run) -> None:
    seeds, cuts = (SEEDS[:1], ["stage1", "pooled"]) if run.quick else (SEEDS, list(STAGES))
    seen = [run.arm(f"victim of scenes, {seed}", recognised, run, seed) for seed in seeds]
    if not run.quick:
        run.premise("F1 of the victims of captions on unseen scenes, lowest of the seeds", "at least 90 %",
                    f"{min(seen):.1%}", min(seen) >= 0.9)  # fmt: skip
    found = {cut: [run.arm(f"captions at {cut}, {seed}", attacked, run, cut, seed) for seed in seeds] for cut in cuts}

    def right(cut: str, of: str, name: str) -> Any:  # [seeds, captions], in points
        return 100 * np.array([each[of][name] for each in found[cut]], float)

    def said(cut: str, of: str) -> float:
        return fmean(each[of] for each in found[cut])

    def pair(cut: str, name: str) -> str:
        return f"{right(cut, 'own', name).mean():.1f} ({right(cut, 'other', name).mean():.1f})"

    run.table(
        f"Captions, means over {len(seeds)} seeds: % of words read from the features, given the words before; in "
        "brackets from those of another image. ROUGE-L of greedy captions, of those from another image, and of the "
        "caption of the most similar image",
        ["cut", *ATTRIBUTES, "ROUGE-L", "another image", "most similar image", "steps"],
        [
            [
                cut,
                *(pair(cut, name) for name in ATTRIBUTES),
                *(said(cut, of) for of in ("written", "written, other", "retrieved", "steps")),
            ]
            for cut in cuts
        ],
    )  # fmt: skip
    late = [[cut, seed] for cut in cuts for seed, each in zip(seeds, found[cut], strict=True) if not each["converged"]]
    run.table("Attackers that were still improving at the maximum number of steps", ["cut", "seed"],
              late or [["none", ""]])  # fmt: skip
    examples = next(iter(found.values()))[0]["true"]
    run.table("Examples of greedy captions", ["true caption", *found],
              [[truth, *(found[cut][0]["some"][n] for cut in found)] for n, truth in enumerate(examples)])  # fmt: skip

    def gain(cut: str, name: str) -> Any:
        """Return for each seed and caption the gain over another image's features."""
        return right(cut, "own", name) - right(cut, "other", name)

    first, last = cuts[0], cuts[-1]
    for name in ("colour", "shape"):
        grows = Measured.over_seeds_and_items(gain(last, name) - gain(first, name))
        run.main(
            f"gain on what the victim was trained on ({name}), from the first cut to the last",
            "at least 20 points more",
            grows,
            grows.at_least(20),
        )
    where = Measured.over_seeds_and_items(gain(last, "cell") - gain(cuts[-2], "cell"))
    run.main("cells of objects, from the last feature map to pooled features", "falls", where, where.at_most(-ABOVE))


def attacked(run: Run, cut: str, seed: int) -> dict[str, Any]:
    """Train a captioner on the features of one cut, and return the fractions of words that it reads in each caption."""
    tests, written, longest = (40, 8, 6) if run.quick else (JUDGED, WRITTEN, LONGEST)
    victim = seeing(run, seed)
    theirs = [image for image, _ in captioned("calibration", _count(run), 1)]
    judges = [image for image, _ in captioned("test", tests, 3)]
    texts, wanted = [each.text for each in theirs], [each.text for each in judges]
    steps = 6 if run.quick else WRITER_STEPS
    speaker, tokenizer = small_writer(texts, steps, run.seed, run.work / "writer")  # shared by all arms
    work = Work(run.work / f"features {cut} {seed}")  # files that are mapped into memory
    ours, seen = (
        record_features(victim, each, [cut], work, name, [cut, seed])[cut]
        for name, each in (("ours", theirs), ("seen", judges))
    )
    loss = CaptionLoss(LinkDefence(), cut, scales({cut: ours})[cut])
    captioner = Captioner(ours[0].shape, speaker, tokenizer, seed)
    config = replace(SPEAK, steps=longest, seed=seed, save_every=longest)
    strength = train_captioner(captioner, ours, texts, loss, config, run.work / f"captioner {cut} {seed}")
    others = Lazy([tests - 1, *range(tests - 1)], seen.__getitem__)
    near = [texts[row] for row in nearest(ours, seen[:written]).tolist()]
    own, other = (recover_captions(captioner, each[:written], loss, beams=1) for each in (seen, others))
    scores = {"written": own, "written, other": other, "retrieved": near}
    found = {
        "own": words_read(captioner, seen, wanted),
        "other": words_read(captioner, others, wanted),
        **{name: TextScores.of(each, wanted[:written]).rougeL for name, each in scores.items()},
        **strength._asdict(),
        "some": own[:5],
        "true": wanted[:5],
    }
    shutil.rmtree(work.directory())  # some hundred megabytes
    return found


@torch.no_grad()
def words_read(captioner: Captioner, features: Sequence[Tensor], texts: Sequence[str]) -> dict[str, list[float]]:
    """Return for each caption the fraction of its objects whose colour, shape and cell are read from the features.

    Each word is the most likely one given the features and the true words before it.
    """
    rows = tokenise_captions(captioner.tokenizer, texts)
    right: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    samples = Lazy(range(len(rows)), lambda number: (features[number], rows[number]))
    for batch in batches(samples, BATCH):
        x = torch.stack([each for each, _ in batch])
        ids, mask = (torch.stack([row[name] for _, row in batch]) for name in ("ids", "mask"))
        same = (captioner.logits(x, ids, mask).argmax(-1) == ids).float()
        for row, length in zip(same, mask.sum(1).tolist(), strict=True):
            for name, offset in ATTRIBUTES.items():
                right[name].append(float(row[offset : length - 1 : 5].mean()))  # without the end token
    return right


# Words and topics of a language model

TOPICS = [
    "cooking",
    "football",
    "chess",
    "weather",
    "gardening",
    "surgery",
    "banking",
    "sailing",
    "painting",
    "poetry",
    "physics",
    "farming",
    "fishing",
    "traffic",
    "astronomy",
    "elections",
    "music",
    "carpentry",
    "history",
    "cinema",
]
FRAMES = (
    "Yesterday we talked about {}.",
    "She wrote a long letter about {}.",
    "There is a new book on {}.",
    "Nobody in the room knew much of {}.",
    "He has been fond of {} for years.",
    "The lecture on {} was full.",
    "I asked my aunt what she thinks of {}.",
    "The museum shows how {} began.",
)
BEHIND = " That is all there is to say of it."  # the topic is probed after this text, which does not contain it


def of_words(run: Run) -> None:
    if run.quick:
        stack, ids = (
            Stack(nano("llama")),
            [torch.randint(3, 100, (40, 16), generator=torch.Generator().manual_seed(s)) for s in (0, 1)],
        )
        layers = [0, 3]
    else:
        stack = lamella.open("smollm2")
        tokenizer = open_tokenizer("smollm2")
        ids = [
            windows(tokenizer, load_text("pydoc", part), n, 256, run.seed)
            for part, n in (("calibration", 96), ("test", 16))
        ]
        layers = [0, 7, 14, 21, 28]
    read = run.arm("tokens", reading, stack, ids, layers)
    columns = ["after layer", "none", "gaussian:3", "gaussian:10", "gaussian:10, static"]
    run.table(
        "Tokens that a linear attacker recovers (%)",
        columns,
        [[layer, *each] for layer, each in zip(layers, read, strict=True)],
    )
    run.main("tokens after the first layer", "at least 95 %", read[0][0], read[0][0] >= 95)
    clean = [each[0] for each in read]
    run.further("recovered tokens over depth", "decreasing", clean, clean == sorted(clean, reverse=True))
    if not run.quick:
        topics = run.arm("topics", of_topics, stack, tokenizer, layers)
        run.table(
            "Topics that a linear attacker recovers after the sentence (%), leave-one-frame-out",
            ["after layer", "topics"],
            [[layer, str(Measured.over_seeds(each))] for layer, each in zip(layers, topics, strict=True)],
        )
        rise = Measured.over_seeds([last - first for first, last in zip(topics[0], topics[-1], strict=True)])
        run.further("topics, gain from the first to the last layer in points", "above 0", rise, rise.at_least(ABOVE))


def reading(stack: Stack, ids: list[Tensor], layers: list[int]) -> list[list[float]]:
    train, judge = (hidden_states(stack, each, layers) for each in ids)
    embedding = stack.vocabulary[0].weight.detach().float().cpu()
    rows = []
    for layer in layers:
        scale = float(train.h[layer].std())
        clean = RidgeRegression.of(train.h[layer], embedding[train.ids])

        def share(attacker: RidgeRegression, guard: LinkDefence, layer: int = layer, scale: float = scale) -> float:
            test_text = guard.send("cut", judge.h[layer], scale, 1)
            return 100 * float((attacker.tokens(test_text, embedding) == judge.ids).double().mean())

        row = [share(clean, LinkDefence())]
        for amount in (3.0, 10.0):
            guard = LinkDefence("gaussian", amount)
            row.append(
                share(RidgeRegression.of(guard.send("cut", train.h[layer], scale, 0), embedding[train.ids]), guard)
            )
        rows.append([*row, share(clean, LinkDefence("gaussian", 10.0))])
    return rows


def of_topics(stack: Stack, tokenizer: Any, layers: list[int]) -> list[list[float]]:
    """Return, for each layer, the percentage of topics that a linear probe of the last token's hidden state recovers.

    The result has one value per frame; the probe of a frame is trained on all other frames.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for frame in FRAMES:
        for topic in TOPICS:
            ids = tokenizer(frame.format(topic) + BEHIND, return_tensors="pt")["input_ids"]
            for layer, h in hidden_states(stack, ids, layers).h.items():
                found[layer].append(h[-1])
    frame_index = torch.arange(len(FRAMES)).repeat_interleave(len(TOPICS))
    labels = torch.arange(len(TOPICS)).repeat(len(FRAMES))
    one_hot = nn.functional.one_hot(labels, len(TOPICS)).double()
    shares: list[list[float]] = []
    for layer in layers:
        h = torch.stack(found[layer]).double()
        shares.append([])
        for frame in range(len(FRAMES)):
            seen = frame_index != frame
            attacker = RidgeRegression.of(h[seen], one_hot[seen])
            text = (h[~seen] @ attacker.weight + attacker.bias).argmax(1)
            shares[-1].append(100 * float((text == labels[~seen]).double().mean()))
    return shares


def experiment(run: Run) -> None:
    run.data = "scikit-learn's digits; rendered scenes with captions; pydoc and sentences on twenty topics for SmolLM2"
    digits(run)
    if run.variant == "digits":
        return
    of_captions(run)
    of_words(run)


if __name__ == "__main__":
    raise SystemExit(
        main(
            experiment,
            quick="two cuts, one seed, few steps, a nano language model",
            digits="no captions and no SmolLM2",
        )
    )
