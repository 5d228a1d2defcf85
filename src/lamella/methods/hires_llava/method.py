"""HiRes-LLaVA: restore what slicing a high-resolution image breaks (Huang et al., CVPR 2025, arXiv 2407.08706).

A model of LLaVA's kind reads a large image as slices, each encoded by itself: what a seam cuts is seen by halves.

    1  cut       slices of the encoder's size, and one view of the whole              slicing.py
    2  restore   in chosen layers of the encoder, slices become one map, are mixed    modules.py, SliceRestore
                 locally and globally, and are cut again; the encoder stays frozen
    3  sample    tokens of windows, whose queries are the windows' own means          modules.py, SelfMiningSampler
    4  read      the view, then all rows of the whole image, each with its end        network.py
    5  train     adapters, sampler and projector; later the language model too        recipe.py

No code of the authors is public, and the paper's body was not at hand: where an adapter stands, how wide it is, the
grid, the order of tokens and the training in numbers are choices of ours, and options here. ``hires-llava seams`` is
ours, too: it measures where slices drift apart, and so where to put adapters. ``hires-llava judge`` asks about things
that seams cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from lamella.data import ImageText
from lamella.data.pictures import Picture
from lamella.errors import MethodError
from lamella.evaluate import answered
from lamella.files import Work
from lamella.methods.hires_llava.entities import CUTS, TASKS, Asked, EntityGrid, question
from lamella.methods.hires_llava.modules import Branches, Scope
from lamella.methods.hires_llava.network import (
    HiResLlava,
    HiResLlavaProcessor,
    processor_for,
    read_layers,
    sliced,
)
from lamella.methods.hires_llava.recipe import TRAINING, Language, parameters, train
from lamella.methods.hires_llava.result import Restored
from lamella.methods.hires_llava.seams import compared, placed, probed, streams
from lamella.methods.hires_llava.slicing import Order, View
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.report.pictures import embedded
from lamella.results import PICTURES, Illustrated, Study
from lamella.runtime import apply
from lamella.signature import Split
from lamella.stack import Model
from lamella.train import TrainConfig

MEASURED = 64  # images on which seams are measured
SHOWN = 6  # questions that a page shows
Place = Literal["even", "seams", "all", "none"]


@dataclass(frozen=True)
class Restoring:
    """How an image is cut, mixed and sampled.

    Attributes:
        restore: where adapters stand: in every third layer from a quarter of the depth on (``even``), in as many where
            slices drift apart most (``seams``), in ``all``, or in ``none``.
        layers: of the encoder, in place of that.
        branches: of an adapter: ``local``, ``global``, or both.
        sampler: ``mine``, the paper's; ``all`` keeps every patch; ``pool``, ``shuffle``, ``convolution`` and ``learnt``
            are what others do.
        window: k: one token of k x k patches. Left out, 3 where that divides a slice, else 2.
        scope: what a query reads: its ``window``, or its ``slice``.
        most_slices: M, the most slices of an image; a larger one is made smaller.
        overlap: pixels that neighbouring slices share, in place of adapters.
        view: the whole image beside its slices with all its tokens (``whole``), ``sampled`` as they are, or ``none``.
        order: of tokens: rows of the whole image (``raster``), or slice by slice (``slices``).
    """

    restore: Place = "even"
    layers: tuple[int, ...] = ()
    branches: Branches = "both"
    sampler: str = "mine"
    window: int | None = None
    scope: Scope = "window"
    most_slices: int = 16
    overlap: int = 0
    view: View = "whole"
    order: Order = "raster"

    def settings(self, model: Any) -> dict[str, Any]:
        """The same in the names of the config, without adapters."""
        said = asdict(self)
        for name in ("restore", "layers"):
            del said[name]
        tower = model.config.vision_config
        across = tower.image_size // tower.patch_size
        return said | {"window": self.window or (3 if across % 3 == 0 else 2)}


@method("hires-llava", paper="2407.08706", purpose="adapt", on="images", brief={"steps": 3})
def hires_llava(
    model: Model,
    samples: EntityGrid | ImageText,
    *,
    restoring: Restoring = Restoring(),
    language: Language = "frozen",
    rank: int = 64,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Restored:
    """Let a model read large images in slices, and train what puts them together again.

    Args:
        model: of LLaVA's class; or what this command has made, which trains on as it was cut. It is not changed.
        samples: images with text, of any sizes; or ``entities``, questions about things that seams cut.
        restoring: what is done to slices.
        language: whether the language model trains too: not at all, by LoRA that is merged, or in ``full``. The paper
            begins with captions and a frozen one, and ends with instructions and it trained.
        rank: of LoRA; its output is scaled by 2.
        config: of the training. LLaVA-1.5 aligns at 1e-3 and tunes the language model at 2e-5, or by LoRA at 2e-4.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        A checkpoint with its processor, which ``lamella.open`` opens.

    Raises:
        ArchitectureError: for a model that is not LLaVA's kind, or whose tower is not known.
        MethodError: for layers that there are not, or sizes that do not fit each other.
        TrainingError: when training cannot start or stay finite.
    """
    made, processor, seams = built(model, samples, restoring, config.seed)
    log = train(
        made,
        processor,
        samples.items,
        config,
        work.place() / "run",
        language=language,
        rank=rank,
        settings={"restoring": str(restoring), "adapters": made.config.restored},
    )
    findings: dict[str, Any] = {
        "adapters": list(made.config.restored or []),
        "parameters": {"new": parameters(made), "all": made.num_parameters()},
        "tokens": {
            f"{rows} x {columns}": _tokens(processor, rows, columns) for rows, columns in ((1, 1), (2, 2), (4, 4))
        },
        "seams": seams,
    }
    return Restored(model=made, processor=processor, log=log, findings=findings)


def built(
    model: Model, samples: ImageText, restoring: Restoring, seed: int = 0
) -> tuple[HiResLlava, HiResLlavaProcessor, dict[str, Any] | None]:
    """A model that reads slices, its adapters where they shall stand, and what was measured to put them there."""
    if not samples.processing.sees:
        raise MethodError(f"hires-llava works on models that read images, and {model.name} reads text alone")
    like = samples.processing.processor
    if isinstance(model.model, HiResLlava) and restoring == Restoring():
        return *sliced(model.model, like, seed), None
    settings = restoring.settings(model.model)
    most = read_layers(model.model.config) if hasattr(model.model.config, "vision_feature_layer") else 0
    layers, seams = sorted(restoring.layers), None
    if not layers and restoring.restore in ("even", "seams"):
        layers = list(range(most // 4, most, 3))
    if not layers and restoring.restore == "all":
        layers = list(range(most))
    if restoring.restore == "seams" and not restoring.layers:
        bare, processor = sliced(model.model, like, seed, **settings, restored=[])
        pictures = [image for each in samples.items for image in each.images][:MEASURED]
        found = compared(streams(bare, processor, pictures), bare.model.slicing.across)
        layers, seams = placed(found, len(layers), bare), found._asdict() | {"scores": found.scores}
    made, processor = sliced(model.model, like, seed, **settings, restored=layers)
    return made, processor, seams


def viewed(model: Model) -> Any:
    """The model in a view, since transformers hangs hooks on what it runs."""
    return apply(model, Plan(model=ModelReference.of(model)))


def _tokens(processor: HiResLlavaProcessor, rows: int, columns: int) -> int:
    slicing = processor.image_processor.slicing
    return slicing.tokens(slicing.reach(rows), slicing.reach(columns))


@command("hires-llava", "seams", on="images", brief={"adapters": 1})
def seams(
    model: Model,
    samples: EntityGrid | ImageText,
    *,
    adapters: int = 4,
    restoring: Restoring = Restoring(),
) -> Study:
    """Measure how far slices drift apart in every layer of the encoder, and say where adapters belong.

    Args:
        model: of LLaVA's class, or what ``hires-llava`` has made.
        samples: whose images are looked at; of ``entities``, a probe also says how well things are read that seams cut.
        adapters: how many to place.
        restoring: how images are cut; what else it says plays no part.

    Returns:
        By layer the distances of neighbours across seams and inside slices, and the layers where an adapter belongs.
    """
    if samples.processing.sees and isinstance(model.model, HiResLlava):
        bare, processor = viewed(model), processor_for(model.model.config, samples.processing.processor)
    else:
        made = Restoring(restore="none", most_slices=restoring.most_slices, overlap=restoring.overlap, sampler="all")
        bare, processor, _ = built(model, samples, made)
    pictures = [image for each in samples.items for image in each.images]
    maps = streams(bare, processor, pictures)
    found = compared(maps, bare.model.slicing.across)
    findings: dict[str, Any] = {
        "layers": list(range(len(found.scores) - 1)),
        **found._asdict(),
        "scores": found.scores,
        "placed": placed(found, adapters, bare),
        "pictures": len(pictures),
    }
    if isinstance(samples, EntityGrid) and samples.asked[0].picture.shape[0] == 2 * bare.model.slicing.side:
        findings["probe"] = probed(maps, samples.asked, bare.model.slicing)
    return Study(findings=findings)


@command("hires-llava", "judge", on="images", brief={"questions": 18})
def judge(model: Model, test: Annotated[EntityGrid, Split("test")], *, batch: int = 32) -> Study:
    """Ask a model about things that a seam cuts, and things that none does.

    Args:
        model: any that reads images.
        test: the questions.
        batch: questions in one pass.

    Returns:
        The share of right answers by task and by cut, the gap between both, and samples; a weak model can have a small
        gap, so both are to be read together.
    """
    right = answered(viewed(model), test, batch).numpy()
    cuts = np.array([each.cut for each in test.asked])
    tasks = np.array([each.task for each in test.asked])
    known = [task for task in TASKS if (tasks == task).any()]
    table = {
        task: {cut: _share(right[(tasks == task) & (cuts == cut)]) for cut in CUTS} for task in known
    }  # fmt: skip
    overall = {cut: _share(right[cuts == cut]) for cut in CUTS}
    seam = _share(right[cuts != CUTS[0]])
    inside = overall[CUTS[0]]
    findings: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "tasks": table,
        "cuts": overall,
        "gap": None if inside is None or seam is None else inside - seam,
        "questions": len(right),
        "places": _by_place(test, right),
        "samples": [_sample(each, bool(ok)) for each, ok in zip(test.asked[:SHOWN], right, strict=False)],
    }
    return Study(findings=findings)


def _sample(each: Asked, right: bool) -> dict[str, Any]:
    said = {"prompt": each.prompt, "answer": each.answer, "cut": each.cut, "right": right}
    return said | {"picture": embedded([each.picture])}


def _share(right: Any) -> float | None:
    return float(right.mean()) if len(right) else None


def _by_place(test: EntityGrid, right: Any) -> list[list[float | None]]:
    """The share of right answers at the nine places."""
    where = np.array([3 * each.about.row + each.about.column for each in test.asked])
    return [[_share(right[where == 3 * row + column]) for column in range(3)] for row in range(3)]


@command("hires-llava", "entities", on="images", brief={"rows": 12, "held_out": 6})
def entities(model: Model, *, rows: int = 20_000, held_out: int = 2_000, seed: int = 0) -> Illustrated:
    """Write questions about things at nine places of an image as a data set, which any model of images can train on.

    Args:
        model: for which it is: pictures are twice as large, on a side, as what its tower reads.
        rows: to train on.
        held_out: rows to test on; what is drawn there is drawn in no training row.
        seed: of what is drawn.

    Returns:
        A folder with ``train.jsonl``, ``test.jsonl`` and pictures; ``data.jsonl`` says of each row its task, what is
        asked about, and how that is cut.

    Raises:
        MethodError: for no rows.
    """
    if min(rows, held_out) < 1:
        raise MethodError(f"hires-llava: {rows} rows to train on and {held_out} to test on: give 1 or more of both")
    config: Any = model.model.config
    slice_side: int = config.vision_config.image_size
    pictures: dict[str, Callable[[], Picture]] = {}
    made = Illustrated(items=[], pictures=pictures)
    for part, name, count in (("calibration", "train", rows), ("test", "test", held_out)):
        kept = made.train if name == "train" else made.test
        for number in range(count):
            each = question(number, part, seed, slice_side)
            file = f"{PICTURES}/{name}-{number:05d}.png"
            row = {"image": file, "prompt": each.prompt, "answer": each.answer}
            kept.append(row)
            made.items.append(row | {"part": name, "task": each.task, "thing": each.about.name, "cut": each.cut})
            pictures[file] = partial(_picture, number, part, seed, slice_side)
    made.findings = {"rows": {part: dict(Counter(row["cut"] for row in made.items if row["part"] == part))
                              for part in ("train", "test")}}  # fmt: skip
    return made


def _picture(number: int, part: str, seed: int, side: int) -> Picture:
    return question(number, part, seed, side).picture
