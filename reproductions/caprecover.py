"""CapRecover at small scale: classes of digits, captions of rendered scenes, and tokens of SmolLM2.

Checks that defences do not change the task, that leaks are measured with several attackers and with attackers who know
the defence, that a fixed mask hides nothing, that captions recovered at deeper cuts contain more of what the victim was
trained on and less of what it discards, and that tokens are recovered near the embedding, topics in deep layers.

A weak attacker recovers little at the first stage only when trained for few steps; the same attacker at the optimum of
its loss is reported too. Scenes are fewer and simpler than photographs: 6,000 for the attacker and 500 for the
evaluation, with one or two objects whose sizes no caption mentions, for a victim of 0.19 million parameters. Captions
are audited without defences.

    python reproductions/caprecover.py            # about two hours on one core; an interrupted run resumes
    python reproductions/caprecover.py --digits   # without captions and SmolLM2, about 25 minutes
    python reproductions/caprecover.py --quick    # two cuts, one seed, few steps
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import lamella
from lamella.data import Captioned, CaptionedImages, InputContext, Lazy, load_text, windows
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
    record_features,
    recover_captions,
    run_attacks,
    scales,
    small_writer,
    train_attacker,
    train_captioner,
)
from lamella.methods.caprecover.attackers import Standardise, pooled
from lamella.methods.caprecover.audit import WHO
from lamella.methods.caprecover.digits import CUTS, prepare
from lamella.methods.caprecover.tokens import RidgeRegression
from lamella.results.record import together
from lamella.stack import Stack
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo import nano, open_tokenizer
from lamella.zoo.worlds import COLOURS, SHAPES, render, scenes

ABOVE = 1e-9  # smallest difference that counts as a rise or a fall

# Classes of digits

VICTIM, ATTACKER = 700, 600  # number of digits; the other 497 are the test split
GUARDS = ("none", "uniform", "gaussian:3", "gaussian:10", "gaussian:30", "fixed:10")
ATTACK = TrainConfig(lr=2e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=1e-2)


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


def victim_of_digits(images: Sequence[Captioned], seed: int, steps: int, out: Path) -> nn.Module:
    torch.manual_seed(seed)
    model = FourStages()
    rows = [{"x": x, "y": torch.tensor(each.label)} for x, each in zip(prepare(images), images, strict=True)]
    config = TrainConfig(steps=steps, lr=2e-3, batch=64, schedule="cosine", warmup=0.1, save_every=steps, seed=seed)
    fit(model, rows, supervised(class_cross_entropy), config, out=out, trainable=lambda name: True)
    return model.eval().requires_grad_(False)


def digits(run: Run) -> None:
    ours, theirs, judges = split_digits()
    guards = [LinkDefence.parse(each) for each in (GUARDS[:1] + GUARDS[-2:] if run.quick else GUARDS)]
    cuts = ["stage1", "pooled"] if run.quick else list(CUTS)
    steps, seeds = (60, 1) if run.quick else (300, 3)
    model = victim_of_digits(ours, run.seed, 80 if run.quick else 300, run.work / "victim")
    victim = Victim(model, CUTS, prepare, "digits")
    sets = AuditData.of(victim, theirs, judges, cuts)
    x, labels = victim.prepare(judges), sets.test_labels
    known = float((victim.output(x).argmax(1) == labels).double().mean())
    run.exact("the victim on unseen digits", "at least 97 %", f"{known:.1%}", known >= 0.97)
    before = {name: each.clone() for name, each in model.state_dict().items()}

    found = run.arm("attacks on digits", attacks, sets, cuts, guards, seeds, steps, run.work)
    links = measure_defences(victim, x, labels, cuts, [*guards, LinkDefence("gaussian", 100.0)])
    moved = max(row["output_change"] for row in links)
    run.exact(
        "logits under noise of up to 100 standard deviations",
        "within 1e-4 of those without noise",
        moved,
        moved <= 1e-4,
    )
    same = all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    run.exact("the victim after the attacks", "bitwise unchanged", same, same)
    results = {(row["cut"], row["attacker"], row["guard"]): row for row in found}
    rows = [
        [
            cut,
            attacker,
            *(
                f"{100 * results[cut, attacker, str(guard)][who]['mean']:.1f}"
                for guard in guards
                for who in ("adaptive", "static")
            ),
        ]
        for cut in cuts
        for attacker in ATTACKERS
    ]
    columns = [f"{guard}{', static' if who == 'static' else ''}" for guard in guards for who in ("adaptive", "static")]
    run.table(f"Digits that attackers recover (%), means over {seeds} seeds", ["cut", "attacker", *columns], rows)
    run.table(
        "Costs of the defences",
        ["cut", "defence", "bytes", "variance of features over noise", "change of logits"],
        [[row["cut"], row["guard"], row["bytes"], row["ratio"] or "", row["output_change"]] for row in links],
    )
    shuffled = [
        run.arm(f"shuffled {seed}", other_pictures, sets, cuts[-1], seed, steps, run.work / f"shuffled {seed}")
        for seed in range(seeds)
    ]
    prior = Measured.over_seeds(shuffled)
    run.exact("attackers trained on features of other images", "within 3 points of the majority class",
              f"{prior}; majority {sets.majority:.3f}", abs(prior.figure - sets.majority) <= 0.03)  # fmt: skip

    def of(cut: str, attacker: str, guard: str = "none", who: str = "adaptive") -> list[float]:
        values: list[float] = results[cut, attacker, guard][who]["values"]
        return values

    first, last = Measured.over_seeds(of(cuts[0], "gap")), Measured.over_seeds(of(cuts[-1], "gap"))
    budget = f"a weak attacker (gap) in {steps} steps"
    run.main(f"{budget}, at the first stage", "at most 40 %", first, first.at_most(0.4))
    run.main(f"{budget}, at the last cut", "at least 90 %", last, last.at_least(0.9))
    means = [float(np.mean(of(cut, "gap"))) for cut in cuts]
    run.main(f"{budget}, over depth", "never falls", [round(each, 3) for each in means], means == sorted(means))
    best = run.arm("gap at its optimum", at_the_optimum, sets, cuts)
    run.table(
        "Digits that a weak attacker (gap) recovers (%), after few steps and at its optimum",
        ["cut", f"in {steps} steps, mean over {seeds} seeds", "at the optimum of its loss"],
        [[cut, 100 * mean, 100 * optimum] for cut, mean, optimum in zip(cuts, means, best, strict=True)],
    )
    run.further("a weak attacker at its optimum, at the first stage", "at most 40 %", best[0], best[0] <= 0.4)
    least = min((Measured.over_seeds(of(cut, "conv")) for cut in cuts), key=lambda each: each.figure)
    run.main("a strong attacker (conv), at any cut", "at least 95 %", least, least.at_least(0.95))
    gaps = [abs(float(np.mean(of(cut, "conv", "fixed:10"))) - float(np.mean(of(cut, "conv")))) for cut in cuts]
    run.further(
        "a fixed mask, for a strong attacker who knows it", "within 1 point of none", max(gaps), max(gaps) <= 0.01
    )
    ahead = {}
    for guard in map(str, guards[1:]):
        knows, not_knows = (
            np.mean([of(cut, attacker, guard, who) for cut in cuts for attacker in ATTACKERS], axis=0) for who in WHO
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
        (Measured.over_seeds(of(cut, attacker, "gaussian:30")) for cut in cuts for attacker in ATTACKERS),
        key=lambda each: each.figure,
    )
    run.further(
        "the strongest attacker under noise of 30 standard deviations", "at most 25 %", loud, loud.at_most(0.25)
    )
    if not run.quick:
        curve = run.arm("sizes", by_size, sets, cuts[1], steps, seeds, run.work / "sizes")
        run.table("Digits recovered by a strong attacker, by its number of images", ["images", "accuracy (%)"], curve)
        outputs = run.arm("outputs", on_outputs, victim, theirs, judges, steps, run.work / "outputs")
        run.exact(
            "a linear attacker on the victim's own logits",
            "at most 2 points below the victim's accuracy",
            outputs,
            outputs >= known - 0.02,
        )


def attacks(
    sets: AuditData, cuts: list[str], guards: list[LinkDefence], seeds: int, steps: int, out: Path
) -> list[dict[str, Any]]:
    return run_attacks(
        sets, cuts=cuts, attackers=list(ATTACKERS), guards=guards, seeds=range(seeds),
        config=replace(ATTACK, steps=steps), work=Work(out / "attacks"), depends=[str(each) for each in guards],
    )  # fmt: skip


def other_pictures(sets: AuditData, cut: str, seed: int, steps: int, out: Path) -> float:
    config = replace(ATTACK, steps=steps, seed=seed)
    return accuracy(
        train_attacker(sets.shuffled(seed), cut, "linear", LinkDefence(), config, out), sets, cut, LinkDefence()
    )


def at_the_optimum(sets: AuditData, cuts: list[str]) -> list[float]:
    """Return the accuracy of the weak attacker (gap) at the optimum of its loss: logistic regression."""
    found = []
    for cut in cuts:
        ours, theirs = (torch.stack(list(part[cut])) for part in (sets.train, sets.test))
        standardised = Standardise(ours.shape[1:]).train()
        standardised.norm.momentum = None  # use the mean and variance of all features
        standardised(ours)
        train, test = (pooled(standardised.eval()(part)).numpy() for part in (ours, theirs))
        attacker = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(train, sets.train_labels)
        found.append(float(attacker.score(test, sets.test_labels)))
    return found


def by_size(sets: AuditData, cut: str, steps: int, seeds: int, out: Path) -> list[list[Any]]:
    rows = []
    for count in (50, 100, 200, 400, len(sets.train_labels)):
        fewer = replace(
            sets,
            train={name: each[:count] for name, each in sets.train.items()},
            train_labels=sets.train_labels[:count],
        )
        shares = []
        for seed in range(seeds):
            config = replace(ATTACK, steps=steps, seed=seed)
            attacker = train_attacker(fewer, cut, "conv", LinkDefence(), config, out / f"{count}-{seed}")
            shares.append(100 * accuracy(attacker, sets, cut, LinkDefence()))
        rows.append([count, str(Measured.over_seeds(shares))])
    return rows


def on_outputs(
    victim: Victim, theirs: Sequence[Captioned], judges: Sequence[Captioned], steps: int, out: Path
) -> float:
    whole = Victim(victim.model, {"logits": "classifier"}, victim.prepare, victim.name)
    sets = AuditData.of(whole, theirs, judges, ["logits"])
    return accuracy(
        train_attacker(sets, "logits", "linear", LinkDefence(), replace(ATTACK, steps=steps), out),
        sets,
        "logits",
        LinkDefence(),
    )


# Captions of scenes

SCENES, JUDGED = 6000, 500
STAGES = ("stage1", "stage4", "pooled")
SEE = TrainConfig(steps=1500, lr=2e-3, batch=64, schedule="cosine", warmup=0.1)
SPEAK = TrainConfig(steps=3000, lr=1e-3, batch=64, schedule="cosine", warmup=0.05)


class SceneNet(nn.Module):
    """Network of four stages on colour images, with a head that predicts which coloured shapes are present anywhere."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for number, (width, stride) in enumerate(((32, 1), (64, 2), (96, 2), (128, 2)), start=1):
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
CELL = re.compile(r"a (\w+) (\w+) in row (\w+) column (\w+)")
NUMBERS = ("one", "two", "three", "four")


def caption_of(scene: Any) -> str:
    """Describe every shape with its colour and cell, in reading order."""
    return " and ".join(
        f"a {t.colour} {t.shape} in row {NUMBERS[t.row]} column {NUMBERS[t.column]}" for t in scene.things
    )


def pictured(part: Any, count: int, seed: int) -> list[tuple[Captioned, Tensor]]:
    """Render images of one or two shapes with their captions and the coloured shapes that are present."""
    found = []
    for number, scene in enumerate(islice(scenes(part, seed, (1, 2)), count)):
        there = torch.tensor([float(any((t.colour, t.shape) == kind for t in scene.objects)) for kind in KINDS])
        found.append((Captioned(render(scene, seed=(seed, number)), caption_of(scene)), there))
    return found


def as_pixels(images: Sequence[Captioned]) -> Tensor:
    return torch.stack([torch.from_numpy(each.image).permute(2, 0, 1) / 127.5 - 1 for each in images])


def seeing(count: int, steps: int, seed: int, out: Path) -> nn.Module:
    """Train a victim on which shapes are present; it can discard their positions."""
    torch.manual_seed(seed)
    model = SceneNet()
    rows = [{"x": as_pixels([image])[0], "y": there} for image, there in pictured("calibration", count, seed + 1)]

    def presence(network: Any, batch: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(network(batch["x"]), batch["y"])

    fit(
        model,
        rows,
        supervised(presence),
        replace(SEE, steps=steps, seed=seed, save_every=steps),
        out=out,
        trainable=lambda name: True,
    )
    return model.eval().requires_grad_(False)


def attributes(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the percentage of colours, shapes and cells that captions get right, each separately and in any order.

    A caption with a red and a blue object in the wrong cells has the colours right; additional objects lower the score.
    """
    right = {"colour": 0, "shape": 0, "cell": 0}
    count = 0
    for ours, theirs in zip(written, wanted, strict=True):
        text, true = CELL.findall(ours), CELL.findall(theirs)
        count += max(len(text), len(true))
        for name, part in (("colour", slice(0, 1)), ("shape", slice(1, 2)), ("cell", slice(2, 4))):
            right[name] += (Counter(each[part] for each in text) & Counter(each[part] for each in true)).total()
    return {name: 100 * each / count for name, each in right.items()}


def of_captions(run: Run) -> None:
    count, test_images = (200, 40) if run.quick else (SCENES, JUDGED)
    model = seeing(count, 20 if run.quick else SEE.steps or 0, run.seed, run.work / "seeing")
    victim = Victim(model, {each: each if each != "pooled" else "pool" for each in STAGES}, as_pixels, "scenes")
    cuts = ["stage1", "pooled"] if run.quick else list(STAGES)
    found = {
        cut: [
            run.arm(f"captions at {cut}, {seed}", attacked, run, victim, cut, seed, count, test_images)
            for seed in ((0,) if run.quick else (0, 1, 2))
        ]
        for cut in cuts
    }

    def mean(cut: str, of: str, name: str) -> float:
        return float(np.mean([each[of][name] for each in found[cut]]))

    scores = ("colour", "shape", "cell", "rougeL", "bleu", "bleu1_precision")
    run.table(
        "Scores of the captions (0 to 100), means over seeds; in brackets captions from other images' features",
        ["cut", "colour", "shape", "cell", "ROUGE-L", "BLEU", "word precision"],
        [
            [
                cut,
                *(f"{mean(cut, 'own', name):.1f} ({mean(cut, 'other', name):.1f})" for name in scores),
            ]
            for cut in cuts
        ],
    )
    run.table(
        "Examples of captions",
        ["true caption", *found],
        [
            [truth, *(found[cut][0]["some"][n] for cut in found)]
            for n, truth in enumerate(next(iter(found.values()))[0]["true"])
        ],
    )

    def gaps(cut: str, name: str) -> Any:
        """Return for each seed the gain over captions from other images' features."""
        return np.array([each["own"][name] - each["other"][name] for each in found[cut]])

    first, last = cuts[0], cuts[-1]
    for name in ("colour", "shape"):
        grows = Measured.over_seeds((gaps(last, name) - gaps(first, name)).tolist())
        run.main(
            f"gain on what the victim was trained on ({name}), from the first cut to the last",
            "at least 20 points more",
            grows,
            grows.at_least(20),
        )
    where = Measured.over_seeds((gaps(last, "cell") - gaps(cuts[-2], "cell")).tolist())
    run.main("cells of things, from the last feature map to pooled features", "falls", where, where.at_most(-ABOVE))


def attacked(run: Run, victim: Victim, cut: str, seed: int, count: int, test_images: int) -> dict[str, Any]:
    theirs = [image for image, _ in pictured("calibration", count, run.seed + 2)]
    judges = [image for image, _ in pictured("test", test_images, run.seed + 3)]
    texts, wanted = [each.text for each in theirs], [each.text for each in judges]
    steps = (20, 20) if run.quick else (1500, SPEAK.steps or 0)
    speaker, tokenizer = small_writer(texts, steps[0], run.seed, run.work / "writer")  # shared by all arms
    before = {name: each.clone() for name, each in speaker.state_dict().items()}
    ours, seen = record_features(victim, theirs, [cut])[cut], record_features(victim, judges, [cut])[cut]
    loss = CaptionLoss(LinkDefence(), cut, scales({cut: ours})[cut])
    captioner = Captioner(ours[0].shape, speaker, tokenizer, seed)
    train_captioner(
        captioner, ours, texts, loss, replace(SPEAK, steps=steps[1], seed=seed), run.work / f"captioner {cut} {seed}"
    )
    if not all(torch.equal(each, before[name]) for name, each in speaker.state_dict().items()):
        raise AssertionError("the writer has changed")
    others = Lazy([len(judges) - 1, *range(len(judges) - 1)], seen.__getitem__)
    written, other = recover_captions(captioner, seen, loss), recover_captions(captioner, others, loss)
    return {
        "own": attributes(written, wanted) | TextScores.of(written, wanted).as_dict(),
        "other": attributes(other, wanted) | TextScores.of(other, wanted).as_dict(),
        "some": written[:5],
        "true": wanted[:5],
    }


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
