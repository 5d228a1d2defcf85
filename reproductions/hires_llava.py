"""HiRes-LLaVA at small scale: digits at nine positions of images that are cut into four slices.

The stand-in of the vision tower has four layers and slices of 4 x 4 tokens. It learns whole digits, each within one
slice, and is frozen. Images of 2 x 2 slices show a digit that no seam cuts, or one seam, or both. Tower, adapters and
sampler are those of the library; in place of projector and language model, a layer of attention reads their tokens and
names the digit and its position, as in the pilot that the thresholds come from.

The premise: digits on seams are named at least 30 points less often than those inside a slice. The main claims: with
adapters in all layers, digits on seams are named more often than with the same adapters confined to their slices, which
have as many parameters and cross no seam; and digits inside a slice not less often than without adapters. Every arm is
trained for 350 steps at its own rate, chosen on validation digits; of a seed, arms share the tower, the initial reader,
the images and their order, and all are tested on the same images of other digits. Beside them stand, with three seeds,
the view, slices that overlap and each branch alone, and, with one seed, arms that are trained four times as long, in
which the reader may learn to connect halves itself.

Further checks: queries that are means against learnt ones after few and after all steps, with an eighth of the digits
and with all of them; and two adapters where slices diverge most against two at random. Last, SmolLM2 is the frozen
language model behind the same tower, with a projector and a sampler that are trained.

    python reproductions/hires_llava.py            # about 90 minutes on one core; an interrupted run resumes
    python reproductions/hires_llava.py --quick    # a smoke test of all parts, without SmolLM2
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import lamella
from lamella.data import ImageText, ImageTextRow, Lazy, Processing
from lamella.evaluate import answered
from lamella.methods.hires_llava import HiResLlava, Slicing, TileLayout, compare_neighbours, patch_maps, with_slices
from lamella.methods.hires_llava.recipe import train
from lamella.methods.hires_llava.slicing import make_tiles
from lamella.report.figures import Bars
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo import open_tokenizer
from lamella.zoo.worlds import word_tokenizer

SIDE, PATCH, WIDTH, LAYERS = 16, 4, 64, 4  # of a slice in pixels, and of the tower
DIGIT, SHIFT = 12, 2  # side of a digit, and its largest distance from the middle of its position, in pixels
TRAIN, CHOOSE = 1000, 197  # number of digits to train on and to choose rates on; the other 600 are the test split
SEAMS = np.array([(row == 1) + (column == 1) for row in range(3) for column in range(3)])  # by position
CUTS = {"inside": SEAMS == 0, "one seam": SEAMS == 1, "two seams": SEAMS == 2}
INSIDE, ON_SEAMS = SEAMS == 0, SEAMS > 0
SEEDS, FEW, PILOT = (0, 1, 2, 3, 4, 5), (0, 1, 2), (100, 101)  # of main claims, of further ones, of the premise
RATES = (1e-3, 3e-3, 1e-2)
LEARNING: dict[str, Any] = {"weight_decay": 0.01, "warmup": 0.05, "schedule": "cosine"}
TOWER = TrainConfig(steps=600, lr=2e-3, batch=64, **LEARNING)
ARM = TrainConfig(steps=350, batch=64, **LEARNING)
SHORT, LONG = 100, 1400  # steps of samplers after a short training, and of the long one
ON_SMOLLM2 = TrainConfig(steps=120, lr=1e-3, batch=4, warmup=0.05, schedule="cosine", save_every=40, bf16=True)
SHARES = (1 / 8, 1.0)  # fractions of the digits
BASE: dict[str, Any] = {"view": "none", "sampler": "all", "most_slices": 9}
ALL = list(range(LAYERS))
ALONE, CONFINED, BOTH = "slices alone", "confined adapters", "adapters with both branches"
CLAIMED: dict[str, dict[str, Any]] = {
    ALONE: {},
    CONFINED: {"restored": ALL, "confined": True},
    BOTH: {"restored": ALL},
}
BESIDE: dict[str, dict[str, Any]] = {  # without claims, at the rate of the last two arms above or of the first
    "slices and the view": {"view": "whole"},
    "overlapping slices": {"overlap": 8},
    "adapters, local branch": {"restored": ALL, "branches": "local"},
    "adapters, global branch": {"restored": ALL, "branches": "global"},
}
SAMPLED: dict[str, Any] = {"restored": ALL, "window": 2}


# Digits


@cache
def digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of a part, uint8 [digits, 12, 12], and their classes."""
    data = load_digits()
    large = interpolate(torch.tensor(data.images / 16)[:, None], (DIGIT, DIGIT), mode="bilinear")[:, 0]
    ends = {"train": (0, TRAIN), "choose": (TRAIN, TRAIN + CHOOSE), "test": (TRAIN + CHOOSE, len(large))}[part]
    chosen = np.random.default_rng(0).permutation(len(large))[slice(*ends)]
    return (255 * large.numpy()[chosen]).round().astype(np.uint8), data.target[chosen]


def placed(digit: np.ndarray, middle: Sequence[float], side: int, drawn: np.random.Generator) -> Tensor:
    """Return an image [side, side] with a digit near a position."""
    image = np.zeros((side, side), np.uint8)
    y, x = (round(at - DIGIT / 2) + int(drawn.integers(-SHIFT, SHIFT + 1)) for at in middle)
    image[y : y + DIGIT, x : x + DIGIT] = digit
    return torch.from_numpy(image)


def sample(part: str, seed: int, share: float, number: int) -> dict[str, Tensor]:
    """Return an image of 2 x 2 slices with a random digit; all positions take turns."""
    drawn, (images, labels) = np.random.default_rng((seed, number)), digits(part)
    which, position = int(drawn.integers(round(share * len(images)))), number % 9
    image = placed(images[which], _middle(position), 2 * SIDE, drawn)
    return {"x": image, "digit": torch.tensor(labels[which]), "position": torch.tensor(position)}


def _middle(position: int) -> tuple[float, float]:
    return SIDE / 2 * (1 + position // 3), SIDE / 2 * (1 + position % 3)


@cache
def tests(part: str, count: int) -> dict[str, Tensor]:
    """Return every digit of a part at every position, the same images for all arms."""
    images, labels = (each[:count] for each in digits(part))
    found = [placed(image, _middle(at), 2 * SIDE, np.random.default_rng((7, number, at)))
             for number, image in enumerate(images) for at in range(9)]  # fmt: skip
    return {"x": torch.stack(found), "digit": torch.tensor(labels).repeat_interleave(9)}


def as_pixels(images: Tensor) -> Tensor:
    """Return normalised pixels [images, 3, side, side] of grey ones [images, side, side]."""
    return ((images[:, None] / 255 - MEAN) / SPREAD).expand(-1, 3, -1, -1)


MEAN, SPREAD = 0.12, 0.25


# The tower, and a reader of what it makes of slices


def vision() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.06,
    }  # fmt: skip


class Names(nn.Module):
    """Vision tower with a linear classifier on the mean of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision()))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tower(as_pixels(x)).last_hidden_state[:, 1:].mean(1))
        return logits


def tower(run: Run, seed: int) -> Path:
    """Return the folder of a vision tower that has learnt whole digits within a slice."""
    steps = 4 if run.quick else TOWER.steps or 0
    folder = run.work / f"tower-{steps}-{seed}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(seed)
    model, (images, labels) = Names(), digits("train")

    def whole(number: int) -> dict[str, Tensor]:
        drawn = np.random.default_rng((seed, 1, number))
        which = int(drawn.integers(len(images)))
        return {"x": placed(images[which], (SIDE / 2, SIDE / 2), SIDE, drawn), "y": torch.tensor(labels[which])}

    config = replace(TOWER, steps=steps, seed=seed, save_every=steps)
    rows = Lazy(range(steps * config.batch), whole)
    fit(model, rows, supervised(class_cross_entropy), config, out=run.work / f"names {seed}", trainable=lambda _: True)
    model.tower.save_pretrained(folder)
    return folder


def llava(run: Run, seed: int, text: dict[str, Any], tokenizer: Any) -> Any:
    """Return a LLaVA around the tower, with a new language model."""
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision()}, text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    seen = transformers.CLIPVisionModel.from_pretrained(tower(run, seed))
    model.model.vision_tower.load_state_dict(seen.state_dict())
    return model


def processor_of(tokenizer: Any) -> Any:
    square = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3
    )
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


class Reader(nn.Module):
    """The library's tower and sampler, and a layer of attention that reads their tokens in place of a decoder."""

    def __init__(self, model: HiResLlava, seed: int) -> None:
        super().__init__()
        self.model = model.model
        with torch.no_grad():
            count = self.tokens(torch.zeros(1, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)).shape[1]
        torch.manual_seed(seed)
        self.places, self.question = (nn.Parameter(0.02 * torch.randn(n, WIDTH)) for n in (count, 1))
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.digit, self.position = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 9)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens [images, tokens, width] of grey images [images, side, side], tile by tile."""

        def resize(image: Tensor, height: int, width: int) -> Tensor:
            return interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]

        slicing: Slicing = self.model.slicing
        tiles, grids = zip(*(make_tiles(each, slicing, resize, [0.0] * 3) for each in as_pixels(images)), strict=True)
        features = self.model.features(torch.cat(tiles), TileLayout(slicing, grids))
        found: Tensor = self.model.sampler(features, torch.ones(features.shape[:3], dtype=torch.bool))
        return found.flatten(1, 2).unflatten(0, (len(images), -1)).flatten(1, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the digit and of its position."""
        h = self.norm(self.tokens(images) + self.places)
        h = self.attention(self.question.expand(len(h), 1, -1), h, h, need_weights=False)[0][:, 0]
        return self.digit(h), self.position(h)


def reader(run: Run, seed: int, settings: dict[str, Any]) -> Reader:
    tokenizer = word_tokenizer([])
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }  # fmt: skip
    model = llava(run, seed, text, tokenizer)
    return Reader(with_slices(model, processor_of(tokenizer), seed, **BASE | settings)[0], seed)


def named(model: Reader, batch: Any) -> Tensor:
    return torch.stack([cross_entropy(*each) for each in zip(model(batch["x"]), (batch["digit"], batch["position"]),
                                                             strict=True)]).sum()  # fmt: skip


def is_trained(name: str) -> bool:
    """Return whether a parameter is trained: those of the reader, of adapters and of a sampler."""
    return not name.startswith("model.") or any(part in name for part in ("slice_restore", "sampler"))


def trained(
    run: Run, name: str, settings: dict[str, Any], rate: float, seed: int, steps: int = ARM.steps or 0, share: float = 1
) -> Reader:
    model = reader(run, seed, settings)
    steps = 2 if run.quick else steps
    config = replace(ARM, steps=steps, lr=rate, seed=seed, save_every=steps)
    rows = Lazy(range(steps * config.batch), partial(sample, "train", seed, share))
    out = run.work / f"{name} {seed} {steps} {rate:g} {share:g}"
    fit(model, rows, supervised(named), config, out=out, trainable=is_trained, settings={"share": share})
    return model.eval()


@torch.no_grad()
def logits(model: Reader, images: Tensor) -> Tensor:
    return torch.cat([model(part)[0] for part in images.split(180)])


def validated(run: Run, name: str, settings: dict[str, Any], steps: int, rate: float) -> float:
    """Return the loss of the digits of the validation split, over all positions."""
    chosen = tests("choose", CHOOSE)
    model = trained(run, name, settings, rate, PILOT[0], steps)
    return float(cross_entropy(logits(model, chosen["x"]), chosen["digit"]))


def judged(run: Run, name: str, settings: dict[str, Any], rate: float, seed: int, **how: Any) -> list[list[int]]:
    """Return which digits of the test split are named correctly [digits, positions]."""
    tested = tests("test", 20 if run.quick else 600)
    right = logits(trained(run, name, settings, rate, seed, **how), tested["x"]).argmax(1) == tested["digit"]
    return right.int().view(-1, 9).tolist()


# Claims

Right = Any  # [seeds, digits, positions], 0 or 1


def at(right: Right, where: Any) -> Any:
    """Return how often each digit is right at some positions, in percent [seeds, digits]."""
    return 100 * right[:, :, where].mean(2)


def table_of(run: Run, title: str, arms: dict[str, Right]) -> None:
    rows = [[name, *(str(Measured.over_seeds(at(right, cut).mean(1))) for cut in CUTS.values()), len(right)]
            for name, right in arms.items()]  # fmt: skip
    run.table(title, ["arm", *(f"{name}, %" for name in CUTS), "seeds"], rows)


def claims(run: Run) -> dict[str, float]:
    """Check the premise and the main claims, and return the rate of each arm."""
    seeds = SEEDS[:1] if run.quick else SEEDS
    if not run.quick:
        pilot = np.array([run.arm(f"pilot, {seed}", judged, run, ALONE, {}, RATES[1], seed) for seed in PILOT], float)
        table_of(run, "Slices alone, with the pilot's seeds", {ALONE: pilot})
        gap = float(at(pilot, INSIDE).mean() - at(pilot, ON_SEAMS).mean())
        run.premise("slices alone: digits named inside a slice less on seams, points", "at least 30", gap, gap >= 30)
    rates = dict.fromkeys(CLAIMED, RATES[1])
    if not run.quick:
        chosen = tuned(run, {name: partial(validated, run, name, each, ARM.steps or 0)
                             for name, each in CLAIMED.items()}, RATES)  # fmt: skip
        rates = {name: each.value for name, each in chosen.items()}
    rates |= {name: rates[BOTH if "restored" in each else ALONE] for name, each in BESIDE.items()}
    run.freeze(
        "mean over seeds and test images on seams of what adapters name correctly less what confined ones do",
        seeds, few=list(FEW), steps=ARM.steps, batch=ARM.batch, rates=rates, short=SHORT, long=LONG,
        shares=list(SHARES),
    )  # fmt: skip

    def of_seeds(name: str, settings: dict[str, Any], seeds: Sequence[int]) -> Right:
        return np.array([run.arm(f"{name}, {seed}", judged, run, name, settings, rates[name], seed) for seed in seeds],
                        float)  # fmt: skip

    found = {name: of_seeds(name, each, seeds) for name, each in CLAIMED.items()}
    found |= {name: of_seeds(name, each, FEW[: len(seeds)]) for name, each in BESIDE.items()}
    table_of(run, f"Digits that are named, by the number of seams: {ARM.steps} steps", found)
    means = {name: [at(right, cut).mean() for cut in CUTS.values()] for name, right in found.items()}
    bars = Bars("position of the digit", "digits that are named, %", means, positions=tuple(CUTS))
    run.figure("hires-llava-seams", bars)
    crossing = Measured.over_seeds_and_items(at(found[BOTH], ON_SEAMS) - at(found[CONFINED], ON_SEAMS))
    run.main("adapters over confined ones on seams, points", "at least 3", crossing, crossing.at_least(3))
    kept = Measured.over_seeds_and_items(at(found[BOTH], INSIDE) - at(found[ALONE], INSIDE))
    run.main("adapters over slices alone inside, points", "at least -1", kept, kept.at_least(-1))
    gaps = {name: Measured.over_seeds_and_items(at(right, ON_SEAMS) - at(found[ALONE][: len(right)], ON_SEAMS))
            for name, right in found.items() if name != ALONE}  # fmt: skip
    run.table("Points on seams over slices alone", ["arm", "points"], [[name, str(gap)] for name, gap in gaps.items()])
    long = {
        name: np.array([run.arm(f"{name}, long", judged, run, name, CLAIMED[name], rates[name], 0, steps=LONG)], float)
        for name in (ALONE, BOTH)
    }
    table_of(run, f"After {LONG} steps", long)
    return rates


def samplers(run: Run) -> None:
    seeds = FEW[:1] if run.quick else FEW
    ways = {name: SAMPLED | {"sampler": name} for name in ("mine", "learnt")}
    rates = dict.fromkeys(ways, RATES[1])
    if not run.quick:
        chosen = tuned(run, {name: partial(validated, run, name, each, SHORT) for name, each in ways.items()}, RATES)
        rates = {name: each.value for name, each in chosen.items()}
    found: dict[str, Right] = {}
    for name, share, steps in product(ways, SHARES, (SHORT, ARM.steps or 0)):
        arm = f"{name}, {share:.0%} of the digits, {steps} steps"
        found[arm] = np.array([run.arm(f"{arm}, {seed}", judged, run, name, ways[name], rates[name], seed,
                                       steps=steps, share=share) for seed in seeds], float)  # fmt: skip
    for name in ("pool", "shuffle", "convolution"):
        way = SAMPLED | {"sampler": name}
        arm = f"{name}, 100% of the digits, {SHORT} steps"
        found[arm] = np.array([run.arm(f"{arm}, 0", judged, run, name, way, rates["mine"], 0, steps=SHORT)], float)
    table_of(run, "Samplers of four tokens per slice, with adapters", found)
    for share, steps in product(SHARES, (SHORT, ARM.steps or 0)):
        ours, theirs = (found[f"{name}, {share:.0%} of the digits, {steps} steps"] for name in ways)
        gain = Measured.over_seeds_and_items(at(ours - theirs, slice(None)))
        name = f"mined over learnt queries, {share:.0%} of the digits, {steps} steps, points"
        run.further(name, "at least 0", gain, gain.at_least(0))


def placement(run: Run, rate: float) -> None:
    """Compare two adapters in the layers in which slices diverge most with two in others, drawn at random."""
    found: dict[str, list[Any]] = {"where slices diverge most": [], "at random": []}
    rows = []
    for seed in FEW[:1] if run.quick else FEW:
        seen = run.arm(f"divergence, {seed}", divergence, run, seed)
        best = seen["recommended"]
        others = [sorted(pair) for pair in product(ALL, ALL) if pair[0] < pair[1] and sorted(pair) != best]
        chance = others[np.random.default_rng(seed).integers(len(others))]
        rows.append([seed, str(best), str(chance), *seen["scores"]])
        for name, layers in zip(found, (best, chance), strict=True):
            found[name].append(run.arm(f"{name}, {seed}", judged, run, name, {"restored": layers}, rate, seed))
    columns = ["seed", "layers", "at random", *(f"before layer {n}" for n in ALL), "after the last"]
    run.table("Distance of neighbours across seams less that inside slices", columns, rows)
    arms = {name: np.array(each, float) for name, each in found.items()}
    table_of(run, f"Two adapters: {ARM.steps} steps", arms)
    ours, theirs = arms.values()
    gain = Measured.over_seeds_and_items(at(ours, ON_SEAMS) - at(theirs, ON_SEAMS))
    run.further("two adapters where slices diverge over two at random, points", "at least 0", gain, gain.at_least(0))


def divergence(run: Run, seed: int) -> dict[str, Any]:
    tokenizer = word_tokenizer([])
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH,
            "num_hidden_layers": 1, "num_attention_heads": 1}  # fmt: skip
    model, processor = with_slices(llava(run, seed, text, tokenizer), processor_of(tokenizer), seed, **BASE)
    images = [np.repeat(sample("train", 200, 1.0, number)["x"].numpy()[..., None], 3, 2) for number in range(360)]
    found = compare_neighbours(patch_maps(model, processor, images), SIDE // PATCH)
    return {"scores": found.scores, "recommended": found.rising(2, LAYERS)}


# SmolLM2

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def on_smollm2(run: Run) -> dict[str, Any]:
    """Train behind the frozen SmolLM2, and compare its accuracy with images and with black images."""
    tokenizer = open_tokenizer("smollm2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = lamella.open("smollm2").model
    small.resize_token_embeddings(len(tokenizer))
    model = llava(run, SEEDS[0], small.config.to_dict() | {"vocab_size": len(tokenizer)}, tokenizer)
    model.model.language_model.load_state_dict(small.model.state_dict())
    model.tie_weights()
    settings = BASE | SAMPLED | {"sampler": "mine"}
    made, processor = with_slices(model, processor_of(tokenizer), run.seed, **settings)

    def row(image: Tensor, digit: int) -> ImageTextRow:
        pixels = np.repeat(image.numpy()[..., None], 3, 2)
        turns = ({"role": "user", "content": "<image>\nwhich digit does the image show?"},
                 {"role": "assistant", "content": NUMBERS[digit]})  # fmt: skip
        return ImageTextRow((pixels,), turns)

    drawn = [sample("train", 300, 1.0, n) for n in range((ON_SMOLLM2.steps or 0) * ON_SMOLLM2.batch)]
    asks = [row(each["x"], int(each["digit"])) for each in drawn]
    log = train(made, processor, asks, replace(ON_SMOLLM2, seed=run.seed), run.work / "smollm2")
    tested = tests("test", 30)
    labels = tested["digit"].tolist()
    seen, unseen = (
        answered(made, ImageText([row(image, label) for image, label in zip(images, labels, strict=True)],
                                 Processing(processor)), 8).float().tolist()
        for images in (tested["x"], torch.zeros_like(tested["x"]))
    )  # fmt: skip
    often = max(Counter(int(each["digit"]) for each in drawn).items(), key=lambda item: item[1])[0]
    constant = [float(label == often) for label in labels]
    return {"seen": seen, "unseen": unseen, "constant": constant, "losses": [log.train[0].loss, log.train[-1].loss]}


def experiment(run: Run) -> None:
    run.data = (
        f"scikit-learn's digits, {TRAIN} to train on, {CHOOSE} to choose rates on and 600 to test on, each at nine "
        "positions of images of two by two slices"
    )
    rates = claims(run)
    samplers(run)
    placement(run, rates[BOTH])
    if run.quick:
        return
    found = run.arm("SmolLM2", on_smollm2, run)
    arms = {"with images": "seen", "with black images": "unseen", "always the most frequent answer": "constant"}
    run.table("SmolLM2-135M, frozen, behind the tower", ["", "right answers, %"],
              [[name, 100 * float(np.mean(found[each]))] for name, each in arms.items()])  # fmt: skip
    for name, other in list(arms.items())[1:]:
        apart = (np.array(found["seen"]) - np.array(found[other])).reshape(1, -1, 9)
        more = Measured.over_seeds_and_items(at(apart, slice(None)))
        run.further(f"SmolLM2: right answers over those {name}, points", "at least 0", more, more.at_least(0))


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a few steps of every part, without SmolLM2"))
