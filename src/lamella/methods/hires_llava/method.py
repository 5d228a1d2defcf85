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
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from transformers import LlavaForConditionalGeneration

from lamella.data import ImageText
from lamella.data.images import Image
from lamella.errors import ArchitectureError, CalibrationError, MethodError
from lamella.evaluate import answered
from lamella.files import Work
from lamella.methods.hires_llava.entities import CUTS, SIDE, TASKS, Asked, EntityGrid, question
from lamella.methods.hires_llava.modules import Branches, Scope
from lamella.methods.hires_llava.network import (
    HiResLlava,
    HiResLlavaProcessor,
    SamplerName,
    read_layers,
    sliced,
)
from lamella.methods.hires_llava.recipe import TRAINING, Language, parameters
from lamella.methods.hires_llava.recipe import train as fitted
from lamella.methods.hires_llava.result import Restored
from lamella.methods.hires_llava.seams import compared, placed, probed, streams
from lamella.methods.hires_llava.slicing import Order, View
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.report.images import png_base64
from lamella.results import IMAGES, ImageCorpus, Study
from lamella.runtime import apply
from lamella.signature import Split
from lamella.stack import Model
from lamella.train import TrainConfig

MEASURED = 64  # images on which seams are measured
SHOWN = 6  # questions that a page shows
Place = Literal["even", "seams", "all", "none"]


@dataclass(frozen=True)
class Restoring:
    """How an image is cut, mixed and sampled. What is left out is as the model has it, if it reads slices already.

    Attributes:
        restore: where adapters stand: in every third layer from a quarter of the depth on (``even``, the default), in
            as many where slices drift apart most (``seams``), in ``all``, or in ``none``.
        layers: of the encoder, in place of that.
        branches: of an adapter: ``local``, ``global``, or ``both``, the default.
        sampler: ``mine``, the paper's and the default; ``all`` keeps every patch; ``pool``, ``shuffle``,
            ``convolution`` and ``learnt`` are what others do.
        window: k: one token of k x k patches. By default 3 where that divides a slice, else 2.
        scope: what a query reads: its ``window``, the default, or its ``slice``.
        most_slices: M, the most slices of an image, by default 16; a larger one is made smaller.
        overlap: pixels that neighbouring slices share, in place of adapters; by default 0.
        view: the whole image beside its slices with all its tokens (``whole``, the default), ``sampled`` as they are,
            or ``none``.
        order: of tokens: rows of the whole image (``raster``, the default), or slice by slice (``slices``).
    """

    restore: Place | None = None
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    branches: Branches | None = None
    sampler: SamplerName | None = None
    window: Annotated[int, Ge(1)] | None = None
    scope: Scope | None = None
    most_slices: Annotated[int, Ge(1)] | None = None
    overlap: Annotated[int, Ge(0)] | None = None
    view: View | None = None
    order: Order | None = None

    def settings(self, model: Any) -> dict[str, Any]:
        """The same in the names of the config, without adapters."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("restore", "layers"):
            said.pop(name, None)
        if not isinstance(model, HiResLlava):
            tower = model.config.vision_config
            said = {"window": 3 if tower.image_size // tower.patch_size % 3 == 0 else 2} | said
        return said


@method("hires-llava", paper="2407.08706", purpose="adapt", on="images", brief={"steps": 3})
def hires_llava(
    model: Model,
    train: EntityGrid | ImageText,
    *,
    restoring: Restoring = Restoring(),
    language: Language = "frozen",
    rank: Annotated[int, Ge(1)] = 64,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Restored:
    """Let a model read large images in slices, and train what puts them together again.

    Args:
        model: of LLaVA's class; or what this command has made, which trains on as it was cut. It is not changed.
        train: images with text, of any sizes; or ``entities``, questions about things that seams cut.
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
    made, processor, seams = built(model, train, restoring, config.seed)
    log = fitted(
        made,
        processor,
        train.items,
        config,
        work.directory() / "run",
        language=language,
        rank=rank,
        settings={"restoring": str(restoring), "adapters": made.config.restored},
    )
    tokens = {f"{side} x {side}": _tokens(processor, side) for side in (1, 2, 4) if side**2 <= made.config.most_slices}
    context = getattr(made.config.get_text_config(), "max_position_embeddings", None)
    notes = []
    if context is not None and max(tokens.values()) > context:
        notes.append(
            f"The language model was made for {context} positions, and the largest images take more: give a larger "
            "window, or fewer slices."
        )
    findings: dict[str, Any] = {
        "adapters": list(made.config.restored or []),
        "parameters": {"new": parameters(made), "all": made.num_parameters()},
        "tokens": tokens,
        "seams": seams,
    }
    return Restored(model=made, processor=processor, log=log, findings=findings, notes=notes)


def built(
    model: Model, samples: ImageText, restoring: Restoring, seed: int = 0
) -> tuple[HiResLlava, HiResLlavaProcessor, dict[str, Any] | None]:
    """A model that reads slices, its adapters where they shall stand, and what was measured to put them there."""
    if not samples.processing.takes_images:
        raise MethodError(f"hires-llava works on models that read images, and {model.name} reads text alone")
    if not isinstance(model.model, LlavaForConditionalGeneration):
        kind = type(model.model).__name__
        raise ArchitectureError(f"hires-llava works on models of LLaVA's class; {model.name} is a {kind}")
    like, settings = samples.processing.processor, restoring.settings(model.model)
    if isinstance(model.model, HiResLlava) and restoring.restore is None and not restoring.layers:
        return *sliced(model.model, like, seed, **settings), None
    most = read_layers(model.model.config)
    layers = list(restoring.layers) or _layers(restoring.restore or "even", most)
    if restoring.restore != "seams" or restoring.layers:
        return *sliced(model.model, like, seed, **settings, restored=layers), None
    bare, processor = sliced(model.model, like, seed, **settings, restored=[])
    found = compared(streams(bare, processor, pictures_of(samples, MEASURED)), bare.model.slicing.across)
    layers = placed(found, len(layers), bare)
    made = sliced(model.model, like, seed, **settings, restored=layers)
    return *made, found._asdict() | {"scores": found.scores}


def _layers(place: Place, most: int) -> list[int]:
    """Where adapters stand, among so many layers; those of ``seams`` are as many as the even ones."""
    first, step = {"all": (0, 1), "none": (most, 1)}.get(place, (most // 4, 3))
    return list(range(first, most, step))


def pictures_of(samples: ImageText, most: int | None = None) -> list[Image]:
    """The images of rows.

    Raises:
        CalibrationError: for rows without any.
    """
    found = list(islice((image for each in samples.items for image in each.images), most))
    if not found:
        raise CalibrationError("these rows have no images: give some that have")
    return found


def viewed(model: Model) -> Any:
    """The model in a view, since transformers hangs hooks on what it runs."""
    return apply(model, Plan(model=ModelReference.of(model)))


def _tokens(processor: HiResLlavaProcessor, side: int) -> int:
    """What an image of so many slices on a side takes."""
    slicing = processor.image_processor.slicing
    return slicing.tokens(slicing.reach(side), slicing.reach(side))


@command("hires-llava", "seams", on="images", brief={"adapters": 1})
def seams(
    model: Model,
    calibration: EntityGrid | ImageText,
    *,
    adapters: Annotated[int, Ge(1)] = 4,
    most_slices: Annotated[int, Ge(1)] = 16,
) -> Study:
    """Measure how far slices drift apart in every layer of the encoder, and say where adapters belong.

    Args:
        model: of LLaVA's class; or what ``hires-llava`` has made, with the adapters that it has.
        calibration: whose images are looked at; of ``entities``, a probe also says how well things are read that seams
            cut.
        adapters: how many to place.
        most_slices: M, the most slices of an image; they do not overlap.

    Returns:
        By layer the distances of neighbours across seams and inside slices, and the layers where an adapter belongs.

    Raises:
        CalibrationError: for images without a seam, or too few questions.
    """
    if not calibration.processing.takes_images:
        raise MethodError(f"hires-llava works on models that read images, and {model.name} reads text alone")
    how: dict[str, Any] = {"most_slices": most_slices, "overlap": 0, "sampler": "all"}
    bare, processor = sliced(model.model, calibration.processing.processor, **how)
    pictures = pictures_of(calibration)
    maps = streams(bare, processor, pictures)
    found = compared(maps, bare.model.slicing.across)
    findings: dict[str, Any] = {
        "layers": list(range(len(found.scores) - 1)),
        **found._asdict(),
        "scores": found.scores,
        "placed": placed(found, adapters, bare),
        "pictures": len(pictures),
    }
    if isinstance(calibration, EntityGrid) and calibration.asked[0].picture.shape[0] == 2 * bare.model.slicing.side:
        findings["probe"] = probed(maps, calibration.asked, bare.model.slicing)
    return Study(findings=findings)


@command("hires-llava", "judge", on="images", brief={"questions": 18})
def judge(model: Model, test: Annotated[EntityGrid, Split("test")], *, batch: Annotated[int, Ge(1)] = 32) -> Study:
    """Ask a model about things that a seam cuts, and things that none does.

    Args:
        model: any that reads images.
        test: the questions.
        batch: questions in one pass.

    Returns:
        The share of right answers by task and by cut; for each task the gap between things that no seam cuts and
        things that one does, and their mean; and samples. A weak model can have a small gap: read both together.
    """
    right = answered(viewed(model), test, batch).numpy()
    cuts = np.array([each.cut for each in test.asked])
    tasks = np.array([each.task for each in test.asked])
    known = [task for task in TASKS if (tasks == task).any()]
    table = {
        task: {cut: _share(right[(tasks == task) & (cuts == cut)]) for cut in CUTS} for task in known
    }  # fmt: skip
    overall = {cut: _share(right[cuts == cut]) for cut in CUTS}
    gaps = {task: _gap(right[tasks == task], cuts[tasks == task]) for task in known}
    measured = [each for each in gaps.values() if each is not None]
    findings: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "tasks": table,
        "cuts": overall,
        "gaps": gaps,
        "gap": float(np.mean(measured)) if measured else None,
        "questions": len(right),
        "places": _by_place(test, right),
        "samples": [_sample(each, bool(ok)) for each, ok in zip(test.asked[:SHOWN], right, strict=False)],
    }
    return Study(findings=findings)


def _sample(each: Asked, right: bool) -> dict[str, Any]:
    said = {"prompt": each.prompt, "answer": each.answer, "cut": each.cut, "right": right}
    return said | {"picture": png_base64([each.picture])}


def _share(right: Any) -> float | None:
    return float(right.mean()) if len(right) else None


def _gap(right: Any, cuts: Any) -> float | None:
    inside, cut = _share(right[cuts == CUTS[0]]), _share(right[cuts != CUTS[0]])
    return None if inside is None or cut is None else inside - cut


def _by_place(test: EntityGrid, right: Any) -> list[list[float | None]]:
    """The share of right answers at the nine places."""
    where = np.array([3 * each.about.row + each.about.column for each in test.asked])
    return [[_share(right[where == 3 * row + column]) for column in range(3)] for row in range(3)]


@command("hires-llava", "entities", on="images", brief={"rows": 12, "held_out": 6})
def entities(
    model: Model,
    *,
    rows: Annotated[int, Ge(1)] = 20_000,
    held_out: Annotated[int, Ge(1)] = 2_000,
    seed: Annotated[int, Ge(0)] = 0,
) -> ImageCorpus:
    """Write questions about things at nine places of an image as a data set, which any model of images can train on.

    Args:
        model: for which it is: pictures are twice as large, on a side, as what its tower reads.
        rows: to train on.
        held_out: rows to test on; what is drawn there is drawn in no training row.
        seed: of what is drawn.

    Returns:
        A folder with ``train.jsonl``, ``test.jsonl`` and pictures; ``data.jsonl`` says of each row its task, what is
        asked about, and how that is cut.
    """
    config: Any = model.model.config
    slice_side = int(getattr(config.vision_config, "image_size", 0) or SIDE)
    pictures: dict[str, Callable[[], Image]] = {}
    made = ImageCorpus(items=[], images=pictures)
    for part, name, count in (("calibration", "train", rows), ("test", "test", held_out)):
        kept = made.train if name == "train" else made.test
        for number in range(count):
            each = question(number, part, seed, slice_side)
            file = f"{IMAGES}/{name}-{number:05d}.png"
            row = {"image": file, "prompt": each.prompt, "answer": each.answer}
            kept.append(row)
            made.items.append(row | {"part": name, "task": each.task, "thing": each.about.name, "cut": each.cut})
            pictures[file] = partial(_picture, number, part, seed, slice_side)
    made.findings = {"rows": {part: dict(Counter(row["cut"] for row in made.items if row["part"] == part))
                              for part in ("train", "test")}}  # fmt: skip
    return made


def _picture(number: int, part: str, seed: int, side: int) -> Image:
    return question(number, part, seed, side).picture
