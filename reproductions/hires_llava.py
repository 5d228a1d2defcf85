"""HiRes-LLaVA at small scale: a nano LLaVA whose images are cut into four slices, tested on objects that seams cut.

The exactness checks come first. Then a LLaVA is trained in three steps: a vision tower learns single objects, each
within one slice, and is frozen afterwards; the decoder learns to name the object of one slice; and it is trained on
images of two by two slices, pooled, where it learns to name objects that no seam cuts, to locate objects and to count
them. Every arm starts from there and is trained, also with the decoder frozen, on objects at all nine positions, for
the same number of steps:

    slices alone; the adapter confined to each slice, which has the same number of parameters and crosses no seam;
    adapters with both branches; on one seed, the downscaled view beside slices, overlapping slices, and adapters with
    only the local or the global branch; the sampler beside learnt queries, with an eighth of the data and all of it,
    and on one seed pooling, pixel shuffle and convolution; two adapters where seams cost most, and two at random.

Objects are named and located in images of a single object, and counted in images of one or two. A decoder of this size
does not learn to identify one of two objects by its position or name in so short a training.

Last, SmolLM2 is the frozen language model, behind the same tower with a projector and a sampler that are trained.

    python reproductions/hires_llava.py            # about an hour and a half on one core; an interrupted run resumes
    python reproductions/hires_llava.py --quick    # exactness, and a smoke test of all parts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import Run, main
from harness.measured import Measured
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import lamella
from lamella.data import ImageText, ImageTextRow, Processing
from lamella.evaluate import answered
from lamella.methods.hires_llava import (
    CUTS,
    EntityQuestion,
    SelfMiningSampler,
    SliceGrid,
    SliceRestore,
    Slicing,
    TileLayout,
    compare_neighbours,
    cut,
    entity_questions,
    merge,
    patch_maps,
    probe_entities,
    with_slices,
)
from lamella.methods.hires_llava.entities import ENTITIES, STRENGTHS, TASKS, TURNS, WORDS, PlacedEntity, as_row, render
from lamella.methods.hires_llava.recipe import train
from lamella.train import Task, TrainConfig, fit, supervised
from lamella.zoo.opening import open_model, open_processor, open_tokenizer
from lamella.zoo.worlds import COLOURS, word_tokenizer
from lamella.zoo.worlds.language import WORDS as KNOWN

SIDE, PATCH, WIDTH, LAYERS = 32, 4, 96, 4  # config of the tower
TEST, NAMED = 600, 1800  # test questions of all tasks, and further ones on the names of objects
TRAINED = (*("identification",) * 4, "position", "counting")  # identification is the task that seams impair
REST = ("position", "counting")  # the other tasks
SEEDS = (0, 1, 2)
LEARNING: dict[str, Any] = {"weight_decay": 0.05, "warmup": 0.05, "schedule": "cosine", "bf16": True}
TOWER = TrainConfig(steps=900, lr=2e-3, batch=64, save_every=300, **LEARNING)
SIGHT = TrainConfig(steps=700, lr=1e-3, batch=32, save_every=100, **LEARNING)
BASIS = TrainConfig(steps=500, lr=1e-3, batch=32, save_every=100, **LEARNING)
ARM = TrainConfig(steps=350, lr=4e-3, batch=32, save_every=100, **LEARNING)
SHORT = replace(ARM, steps=150)
ON_SMOLLM2 = TrainConfig(steps=120, lr=1e-3, batch=4, warmup=0.05, schedule="cosine", save_every=40, bf16=True)
SHARES = (1 / 8, 1.0)  # fractions of the data of a short training
ROWS = 16_000  # training rows, drawn from a seed
NAMES = [f"{colour} {entity}" for colour in COLOURS for entity in ENTITIES]
BASE: dict[str, Any] = {"view": "none", "sampler": "mine", "window": 2, "most_slices": 9}
ARMS: dict[str, dict[str, Any]] = {
    "slices alone": {},
    "confined adapter": {"restored": range(LAYERS), "confined": True},
    "both": {"restored": range(LAYERS)},
}
BESIDE: dict[str, dict[str, Any]] = {  # one seed, without claims
    "and the view": {"view": "whole"},
    "overlapping slices": {"overlap": 16},
    "local": {"restored": range(LAYERS), "branches": "local"},
    "global": {"restored": range(LAYERS), "branches": "global"},
}


# Exactness


def exactness(run: Run) -> None:
    torch.manual_seed(run.seed)
    slicing = Slicing(16, 4)
    places = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(8), indexing="ij"), -1)
    tiles = torch.stack([places[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(3) for c in range(2)])[None]
    back = torch.equal(cut(merge(tiles, 3, 2), 3, 2), tiles) and torch.equal(merge(tiles, 3, 2)[0], places)
    run.exact("merged by position and cut again", "the same", str(back), back)
    grids = (SliceGrid(2, 3, 20, 41), SliceGrid(1, 1, 16, 16), SliceGrid(2, 2, 32, 32))
    slices = TileLayout(slicing, grids)
    h = torch.randn(slices.starts[-1], 17, 24)
    adapter = SliceRestore(24)
    run.exact(
        "a fresh adapter", "changes no bit", str(torch.equal(adapter(h, slices), h)), torch.equal(adapter(h, slices), h)
    )
    for each in adapter.parameters():
        each.data += 0.3 * torch.randn(each.shape)
    out = adapter(h, slices)
    single = torch.equal(out[slices.starts[1] + 1], h[slices.starts[1] + 1])
    run.exact("an image of one slice", "changes no bit", str(single), single)
    real = slicing.real(grids[0])
    noisy = h.clone()
    noisy[1:7, 1:] += 100 * torch.randn(6, 16, 24) * ~real.flatten(1)[..., None]
    same = torch.equal(adapter(noisy, slices)[1:7, 1:][real.flatten(1)], out[1:7, 1:][real.flatten(1)])
    run.exact("padding", "changes no image patch", str(same), same)
    turned = adapter(
        torch.cat([h[slices.starts[2] :], h[: slices.starts[2]]]), TileLayout(slicing, (grids[2], *grids[:2]))
    )
    apart = float((turned[slices.starts[3] - slices.starts[2] :] - out[: slices.starts[2]]).abs().max())
    run.exact("images in another order", "below 1e-5", f"{apart:.1e}", apart < 1e-5)
    sampler = SelfMiningSampler(24, 2)
    x = h[:, 1:].unflatten(1, (4, 4))
    means = avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    apart = float((sampler(x, torch.ones(x.shape[:3], dtype=torch.bool)) - means).abs().max())
    run.exact("a fresh sampler against average pooling", "below 1e-6", f"{apart:.1e}", apart < 1e-6)


# The vision tower, and the model before slices


def single(number: int, seed: int, part: str = "calibration") -> tuple[np.ndarray, str]:
    """Return an image with an object at a random position within one slice, and its name."""
    drawn = np.random.default_rng((seed, 7, number))
    while True:
        entity, colour = ENTITIES[drawn.integers(len(ENTITIES))], list(COLOURS)[drawn.integers(len(COLOURS))]
        thing = PlacedEntity(entity, colour, 1, 1, int(drawn.integers(TURNS)), int(drawn.integers(STRENGTHS)))
        if thing.part == part:
            break
    # Offset of the window in an image with the object at its centre.
    y, x = drawn.integers(SIDE // 2 - 3, SIDE // 2 + 4, 2)
    return render([thing], SIDE, drawn)[y : y + SIDE, x : x + SIDE], thing.name


def pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    return (x - 0.12) / 0.25


def vision() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.06,
    }  # fmt: skip


class Names(nn.Module):
    """Vision tower with a linear classifier of names on the mean of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision()))
        self.head = nn.Linear(WIDTH, len(NAMES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tower(x).last_hidden_state[:, 1:].mean(1))


def tower_loss(model: Names, batch: Any) -> Tensor:
    return cross_entropy(model(pixels(batch["x"].numpy())), batch["y"])


def tower(run: Run, steps: float) -> Path:
    """Return the folder of a vision tower that names single objects within a slice."""
    config = replace(TOWER, steps=max(2, round(steps * (TOWER.steps or 0))))
    folder = run.work / f"tower-{config.steps}"

    def learn() -> float:
        torch.manual_seed(0)
        model = Names()
        rows = []
        for number in range(min(ROWS, (config.steps or 0) * config.batch)):
            image, name = single(number, 0)
            rows.append({"x": torch.from_numpy(image), "y": torch.tensor(NAMES.index(name))})
        fit(model, rows, supervised(tower_loss), config, out=run.work / "names", trainable=lambda name: True)
        tested = [single(number, 1, "test") for number in range(500)]
        with torch.no_grad():
            found = model.eval()(pixels([image for image, _ in tested])).argmax(-1)
        model.tower.save_pretrained(folder)
        return float(np.mean([NAMES[each] == name for each, (_, name) in zip(found.tolist(), tested, strict=True)]))

    run.arm(f"tower, {config.steps} steps", learn)
    return folder


def sighted(run: Run, steps: float) -> Path:
    """Return the folder of a LLaVA with that tower, frozen, which has learnt to name the object of one slice."""
    config = replace(SIGHT, steps=max(2, round(steps * (SIGHT.steps or 0))))
    folder = run.work / f"sighted-{config.steps}"
    if (folder / "processor_config.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = word_tokenizer([word for word in WORDS if word not in KNOWN])
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 448,
        "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
        "initializer_range": 0.06,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }  # fmt: skip
    model = llava(run, text, tokenizer, steps)
    processor = processor_of(tokenizer)
    rows = [shown(*single(number, 10)) for number in range(min(ROWS, (config.steps or 0) * config.batch))]
    learns = Task(lamella.train.response_loss, collate=Processing(processor).batch)
    fit(model, rows, learns, config, out=run.work / "sight", trainable=lambda name: "vision_tower" not in name)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def basis(run: Run, steps: float) -> Path:
    """Return the folder of the model from which every arm starts: pooled slices, trained on objects without seams."""
    config = replace(BASIS, steps=max(2, round(steps * (BASIS.steps or 0))))
    folder = run.work / f"basis-{config.steps}"
    if (folder / "processor_config.json").is_file():
        return folder
    given = sighted(run, steps)
    model, processor = with_slices(open_model(given).model, open_processor(given), 0, **BASE | {"sampler": "pool"})
    whole = (each for each in plain("calibration", 50) if each.task != "identification" or not each.about.seams)
    rows = [as_row(each) for each in islice(whole, (config.steps or 0) * config.batch)]
    train(model, processor, rows, config, run.work / "basis", language="full")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(run: Run, text: dict[str, Any], tokenizer: Any, steps: float) -> Any:
    """Build a LLaVA around the tower."""
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision()}, text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    seen = transformers.CLIPVisionModel.from_pretrained(tower(run, steps))
    model.model.vision_tower.load_state_dict(seen.state_dict())
    return model


def processor_of(tokenizer: Any) -> Any:
    square = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=[0.12] * 3, image_std=[0.25] * 3
    )
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def shown(image: np.ndarray, name: str) -> ImageTextRow:
    turns = ({"role": "user", "content": "<image>\nwhat is in the picture?"}, {"role": "assistant", "content": name})
    return ImageTextRow((image,), turns)


# The arms


def plain(part: str, seed: int, tasks: Sequence[str] = TASKS) -> Iterator[EntityQuestion]:
    """Return the questions that do not refer to one of two objects."""
    return (
        each for each in entity_questions(part, seed, SIDE, tasks) if each.task == "counting" or len(each.things) == 1
    )


def questions(part: str, count: int, seed: int, tasks: Sequence[str] = TASKS) -> list[EntityQuestion]:
    return list(islice(plain(part, seed, tasks), count))


def arm(
    run: Run, seed: int, settings: dict[str, Any], config: TrainConfig, name: str, rows: int = ROWS
) -> dict[str, Any]:
    """Train one arm from the basis on objects at all positions, and evaluate it; see :func:`judged`."""
    scale = 0.01 if run.quick else 1.0
    folder = basis(run, scale)
    changed = dict(settings)
    if "restored" in changed:
        changed["restored"] = list(changed["restored"])
    model, processor = with_slices(open_model(folder).model, open_processor(folder), seed, **BASE | changed)
    steps = max(2, round(scale * (config.steps or 0)))
    asks = questions("calibration", min(rows, steps * config.batch), 100 + seed, TRAINED)
    config = replace(config, steps=steps, seed=seed)
    train(model, processor, [as_row(each) for each in asks], config, run.work / name.replace(" ", "-"),
          settings={"arm": name})  # fmt: skip
    few = 36 if run.quick else 1
    asks = questions("test", TEST // few, 1) + questions("test", NAMED // few, 2, ("identification",))
    return judged(model, processor, asks)


def judged(model: Any, processor: Any, asks: Sequence[EntityQuestion]) -> dict[str, Any]:
    """Return the accuracy of names by the number of seams, that of the other tasks, and the number of tokens."""
    right = answered(model, ImageText([as_row(each) for each in asks], Processing(processor))).numpy()
    tasks, cuts = (np.array([getattr(each, what) for each in asks]) for what in ("task", "cut"))
    return {
        "named": {cut: float(right[(tasks == "identification") & (cuts == cut)].mean()) for cut in CUTS},
        **{task: float(right[tasks == task].mean()) for task in REST},
        "tokens": processor.image_processor.slicing.tokens(2 * SIDE, 2 * SIDE),
    }


def seam(found: dict[str, Any]) -> float:
    """Return the accuracy in percent of names of objects that seams cut: five of nine positions, four with one seam."""
    return 100 * (4 * found["named"]["one seam"] + found["named"]["two seams"]) / 5


def inside(found: dict[str, Any]) -> float:
    return 100 * found["named"]["inside"]


def overall(found: dict[str, Any]) -> float:
    """Return the accuracy in percent over all nine positions."""
    return (4 * inside(found) + 5 * seam(found)) / 9


def table_of(run: Run, title: str, arms: dict[str, list[dict[str, Any]]]) -> None:
    rows = []
    for name, found in arms.items():
        by_cut = [str(Measured.over_seeds([100 * each["named"][cut] for each in found])) for cut in CUTS]
        rest = [100 * float(np.mean([each[what] for each in found])) for what in REST]
        rows.append([name, found[0]["tokens"], *by_cut, *rest, len(found)])
    run.table(
        title, ["arm", "tokens", *(f"{name}, %" for name in CUTS), *(f"{what}, %" for what in REST), "seeds"], rows
    )


def claims(run: Run, seeds: Sequence[int]) -> None:
    found = {
        name: [run.arm(f"{name}, seed {seed}", arm, run, seed, settings, ARM, f"{name} {seed}") for seed in seeds]
        for name, settings in ARMS.items()
    }
    beside = {name: [run.arm(f"{name}, seed 0", arm, run, 0, each, ARM, f"{name} 0")] for name, each in BESIDE.items()}
    table_of(run, f"Identification by the number of seams, and the other tasks: {ARM.steps} steps", found | beside)
    alone, both, confined = found["slices alone"], found["both"], found["confined adapter"]
    gap = Measured.over_seeds([inside(each) - seam(each) for each in alone])
    run.main("slices alone: inside minus cut, points", "at least 30", str(gap), gap.at_least(30))
    crossing = Measured.over_seeds([seam(a) - seam(b) for a, b in zip(both, confined, strict=True)])
    run.main(
        "both branches over the confined adapter on seams, points", "at least 3", str(crossing), crossing.at_least(3)
    )
    kept = Measured.over_seeds([inside(a) - inside(b) for a, b in zip(both, alone, strict=True)])
    run.main("both branches over slices alone inside, points", "at least -1", str(kept), kept.at_least(-1))
    naive = Measured.over_seeds([seam(a) - seam(b) for a, b in zip(both, alone, strict=True)])
    trained = Measured.over_seeds([seam(a) - seam(b) for a, b in zip(confined, alone, strict=True)])
    run.table(
        "Points on seams over slices alone",
        ["of", "points"],
        [["both branches", str(naive)], ["the confined adapter, which crosses no seam", str(trained)]],
    )


def samplers(run: Run, seeds: Sequence[int]) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    beside = [(sampler, 1.0, seeds[:1]) for sampler in ("pool", "shuffle", "convolution")]
    for sampler, share, each in (*product(("mine", "learnt"), SHARES, [seeds]), *beside):
        name = f"{sampler}, {share:.0%} of the data"
        settings = ARMS["both"] | {"sampler": sampler}
        count = round(share * (SHORT.steps or 0) * SHORT.batch)
        found[name] = [
            run.arm(f"{name}, seed {seed}", arm, run, seed, settings, SHORT, f"{name} {seed}", count) for seed in each
        ]
    table_of(run, f"Samplers at 16 tokens of a slice, with adapters: {SHORT.steps} steps", found)
    long = run.arm("learnt, long, seed 0", arm, run, 0, ARMS["both"] | {"sampler": "learnt"}, ARM, "long 0")
    table_of(
        run, f"Learnt queries after {ARM.steps} steps, where mined ones are both branches above", {"learnt": [long]}
    )
    for share in SHARES:
        pairs = zip(*(found[f"{sampler}, {share:.0%} of the data"] for sampler in ("mine", "learnt")), strict=True)
        gain = Measured.over_seeds([overall(a) - overall(b) for a, b in pairs])
        name = f"mined over learnt queries, {share:.0%} of the data, points"
        run.further(name, "at least 0", str(gain), gain.at_least(0))


def placement(run: Run, seeds: Sequence[int]) -> None:
    scores = run.arm("seams of the tower", seam_scores, run)
    run.table("Distances of neighbours across seams and inside slices, and accuracy of a probe, by layer",
              ["before layer", "across", "inside", "difference", *(f"probe, {name}" for name in CUTS)],
              [[layer, *each] for layer, each in enumerate(scores["rows"])])  # fmt: skip
    best = scores["recommended"]
    found: dict[str, list[dict[str, Any]]] = {"where seams cost most": [], "at random": []}
    for seed in seeds:
        drawn = np.random.default_rng(seed)
        others = [pair for pair in ((a, b) for a in range(LAYERS) for b in range(a)) if sorted(pair) != best]
        chance = sorted(others[drawn.integers(len(others))])
        for name, layers in (("where seams cost most", best), ("at random", chance)):
            found[name].append(
                run.arm(f"{name}, seed {seed}", arm, run, seed, {"restored": layers}, SHORT, f"{name} {seed}")
            )
    table_of(run, f"Two adapters, in the layers {best} and in two at random: {SHORT.steps} steps", found)
    gain = Measured.over_seeds([seam(a) - seam(b) for a, b in zip(*found.values(), strict=True)])
    run.further("two adapters by seams over two at random, points", "at least 0", str(gain), gain.at_least(0))


def seam_scores(run: Run) -> dict[str, Any]:
    folder = basis(run, 0.01 if run.quick else 1.0)
    model, processor = with_slices(open_model(folder).model, open_processor(folder), 0, **BASE | {"sampler": "all"})
    asks = questions("calibration", 54 if run.quick else 540, 200, ("identification",))
    maps = patch_maps(model, processor, [each.image for each in asks])
    found = compare_neighbours(maps, SIDE // PATCH)
    probes = probe_entities(maps, asks, model.model.slicing)
    rows = [[*each, *(probes[name][layer] for name in CUTS)]
            for layer, each in enumerate(zip(found.across, found.inside, found.scores, strict=True))]  # fmt: skip
    return {"rows": rows, "recommended": found.rising(2, LAYERS)}


# SmolLM2


def on_smollm2(run: Run) -> dict[str, Any]:
    """Train behind the frozen SmolLM2, and compare its accuracy with images and with grey images."""
    tokenizer = open_tokenizer("smollm2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = lamella.open("smollm2").model
    text = small.config.to_dict() | {"vocab_size": len(tokenizer)}
    small.resize_token_embeddings(len(tokenizer))
    model = llava(run, text, tokenizer, 1.0)
    model.model.language_model.load_state_dict(small.model.state_dict())
    model.tie_weights()
    made, processor = with_slices(model, processor_of(tokenizer), run.seed, **BASE | {"restored": list(range(LAYERS))})
    asks = questions("calibration", (ON_SMOLLM2.steps or 0) * ON_SMOLLM2.batch, 300, ("identification",))
    log = train(
        made, processor, [as_row(each) for each in asks], replace(ON_SMOLLM2, seed=run.seed), run.work / "smollm2"
    )
    test = questions("test", 180, 2, ("identification",))
    blank = [each._replace(image=np.full_like(each.image, 24)) for each in test]
    seen, unseen = (
        answered(made, ImageText([as_row(each) for each in those], Processing(processor)), 8).float().tolist()
        for those in (test, blank)
    )
    often = max(Counter(each.answer for each in asks).items(), key=lambda item: item[1])[0]
    constant = [float(each.answer == often) for each in test]
    return {"seen": seen, "unseen": unseen, "constant": constant, "losses": [log.train[0].loss, log.train[-1].loss]}


def experiment(run: Run) -> None:
    run.data = (
        "36 entities at nine positions of images of two by two slices; the test split has "
        "other rotations and stroke strengths"
    )
    with torch.no_grad():
        run.part("exactness", exactness)
    seeds = SEEDS[:1] if run.quick else SEEDS
    if run.quick:
        run.arm("both", arm, run, 0, ARMS["both"], ARM, "both 0")
        run.arm("seams", seam_scores, run)
        return
    claims(run, seeds)
    samplers(run, seeds)
    placement(run, seeds)
    found = run.arm("SmolLM2", on_smollm2, run)
    arms = {"with images": "seen", "with grey images": "unseen", "always the most frequent answer": "constant"}
    run.table("SmolLM2-135M, frozen, behind the tower", ["", "right answers, %"],
              [[name, 100 * float(np.mean(found[each]))] for name, each in arms.items()])  # fmt: skip
    for name, other in list(arms.items())[1:]:
        more = Measured.over_seeds([100 * (a - b) for a, b in zip(found["seen"], found[other], strict=True)])
        run.further(f"SmolLM2: right answers over those {name}, points", "above 0", str(more), more.low > 0)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="what is exact, and whether all of it runs"))
