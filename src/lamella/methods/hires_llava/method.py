"""HiRes-LLaVA: repair the fragmentation caused by slicing images (Huang et al., CVPR 2025, arXiv 2407.08706).

A LLaVA-type model processes a large image as slices that are encoded separately, so objects on a seam are split.

    1  cut       slices of the encoder's input size, and one view of the whole        slicing.py
    2  restore   in chosen layers of the encoder, slices become one map, are mixed    modules.py, SliceRestore
                 locally and globally, and are cut again; the encoder stays frozen
    3  sample    one token per window, whose query is the mean of the window          modules.py, SelfMiningSampler
    4  input     the view, then all rows of the whole image, each with an end token   network.py
    5  train     adapters, sampler and projector; later the language model too        recipe.py

No code of the authors is public, and only the abstract and summaries of the paper were available: the position and
width of adapters, the grid, the order of tokens and the training hyperparameters are choices of Lamella, available as
options. ``hires-llava seams`` is an addition of Lamella: it measures in which layers slices diverge, and so where to
place adapters. ``hires-llava judge`` tests a model on objects that are cut by seams.
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
from lamella.methods.hires_llava.entities import CUTS, SIDE, TASKS, EntityGrid, EntityQuestion, question
from lamella.methods.hires_llava.modules import Branches, Scope
from lamella.methods.hires_llava.network import (
    HiResLlava,
    HiResLlavaProcessor,
    SamplerName,
    read_layers,
    with_slices,
)
from lamella.methods.hires_llava.recipe import TRAINING, Language, parameters
from lamella.methods.hires_llava.recipe import train as fitted
from lamella.methods.hires_llava.result import Restored
from lamella.methods.hires_llava.seams import compare_neighbours, patch_maps, probe_entities, select_layers
from lamella.methods.hires_llava.slicing import Order, View
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.report.images import png_base64
from lamella.results import IMAGES, ImageCorpus, Study
from lamella.runtime import apply
from lamella.signature import Split
from lamella.stack import Model
from lamella.train import TrainConfig

MEASURED = 64  # images for measuring the seams
SHOWN = 6  # sample questions on the page
AdapterPlacement = Literal["even", "seams", "all", "none"]


@dataclass(frozen=True)
class Restoring:
    """How an image is cut, mixed and sampled. None keeps the setting of a model that already uses slices.

    Attributes:
        restore: position of the adapters: every third layer from a quarter of the depth on (``even``, the default), the
            same number of layers where slices diverge most (``seams``), ``all`` layers or ``none``.
        layers: layers of the encoder, in place of ``restore``.
        branches: branches of an adapter: ``local``, ``global``, or ``both`` (default).
        sampler: ``mine``, the paper's and the default; ``all`` keeps every patch; ``pool``, ``shuffle``,
            ``convolution`` and ``learnt`` are baselines.
        window: k: one token of k x k patches. Defaults to 3 where that divides a slice, else 2.
        scope: context of a query: its ``window`` (default) or its ``slice``.
        most_slices: M, the maximum number of slices per image, by default 16; larger images are scaled down.
        overlap: pixels shared by neighbouring slices, in place of adapters; defaults to 0.
        view: the whole image beside its slices with all its tokens (``whole``, the default), ``sampled`` like the
            slices, or ``none``.
        order: order of the tokens: rows of the whole image (``raster``, the default), or slice by slice (``slices``).
    """

    restore: AdapterPlacement | None = None
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
        """Convert to fields of the model's config, without the positions of the adapters.

        Args:
            model: the model, whose patch grid sets the default window.
        """
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("restore", "layers"):
            settings.pop(name, None)
        if not isinstance(model, HiResLlava):
            tower = model.config.vision_config
            settings = {"window": 3 if tower.image_size // tower.patch_size % 3 == 0 else 2} | settings
        return settings


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
    """Let a LLaVA-type model process large images in slices, and train the modules that reconnect the slices.

    Args:
        model: a model of LLaVA's class, or the result of this command, which is trained further with its own slicing.
            It is not changed.
        train: images with text, of any size; or ``entities``, questions about objects that are cut by seams.
        restoring: how slices are cut, mixed and sampled.
        language: whether the language model trains too: ``frozen``, by ``lora`` that is merged afterwards, or in
            ``full``. The paper starts with captions and a frozen one, and ends with instructions and a trained one.
        rank: LoRA rank; its output is scaled by 2.
        config: training settings. LLaVA-1.5 aligns at 1e-3 and tunes the language model at 2e-5, or with LoRA at 2e-4.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        A checkpoint with its processor, which ``lamella.open`` loads.

    Raises:
        ArchitectureError: for a model that is not of LLaVA's class, or an unsupported vision tower.
        MethodError: for layers that do not exist, or sizes that do not fit each other.
        TrainingError: when training cannot start or does not stay finite.
    """
    made, processor, seams = build(model, train, restoring, config.seed)
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
            f"The language model was made for {context} positions, but the largest images take more: use a larger "
            "window or fewer slices."
        )
    findings: dict[str, Any] = {
        "adapters": list(made.config.restored or []),
        "parameters": {"new": parameters(made), "all": made.num_parameters()},
        "tokens": tokens,
        "seams": seams,
    }
    return Restored(model=made, processor=processor, log=log, findings=findings, notes=notes)


def build(
    model: Model, samples: ImageText, restoring: Restoring, seed: int = 0
) -> tuple[HiResLlava, HiResLlavaProcessor, dict[str, Any] | None]:
    """Build a model that uses slices, with its adapters in place.

    Args:
        model: a model of LLaVA's class.
        samples: images with text, used to measure the seams if ``restoring.restore`` is ``seams``.
        restoring: how slices are cut, mixed and sampled.
        seed: random seed of the new modules.

    Returns:
        The model, its processor, and the measured seam distances or None.
    """
    if not samples.processing.takes_images:
        raise MethodError(f"hires-llava requires a model that takes images, but {model.name} takes text only")
    if not isinstance(model.model, LlavaForConditionalGeneration):
        kind = type(model.model).__name__
        raise ArchitectureError(f"hires-llava works on models of LLaVA's class; {model.name} is a {kind}")
    like, settings = samples.processing.processor, restoring.settings(model.model)
    if isinstance(model.model, HiResLlava) and restoring.restore is None and not restoring.layers:
        return *with_slices(model.model, like, seed, **settings), None
    most = read_layers(model.model.config)
    layers = list(restoring.layers) or _layers(restoring.restore or "even", most)
    if restoring.restore != "seams" or restoring.layers:
        return *with_slices(model.model, like, seed, **settings, restored=layers), None
    bare, processor = with_slices(model.model, like, seed, **settings, restored=[])
    found = compare_neighbours(patch_maps(bare, processor, images_of(samples, MEASURED)), bare.model.slicing.across)
    layers = select_layers(found, len(layers), bare)
    made = with_slices(model.model, like, seed, **settings, restored=layers)
    return *made, found._asdict() | {"scores": found.scores}


def _layers(placement: AdapterPlacement, most: int) -> list[int]:
    """The layers with adapters among the first ``most``; ``seams`` gets as many as ``even``."""
    first, step = {"all": (0, 1), "none": (most, 1)}.get(placement, (most // 4, 3))
    return list(range(first, most, step))


def images_of(samples: ImageText, most: int | None = None) -> list[Image]:
    """Collect the images of rows.

    Args:
        samples: images with text.
        most: maximum number of images; None for all.

    Returns:
        The images.

    Raises:
        CalibrationError: for rows without images.
    """
    found = list(islice((image for each in samples.items for image in each.images), most))
    if not found:
        raise CalibrationError("these rows have no images: give rows with images")
    return found


def as_view(model: Model) -> Any:
    """Wrap the model in a view, because transformers attaches hooks to the model that it runs."""
    return apply(model, Plan(model=ModelReference.of(model)))


def _tokens(processor: HiResLlavaProcessor, side: int) -> int:
    """Number of tokens of an image of ``side`` x ``side`` slices."""
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
    """Measure how far slices diverge in every layer of the encoder, and recommend layers for the adapters.

    Args:
        model: a model of LLaVA's class, or the result of ``hires-llava`` with its adapters.
        calibration: rows whose images are used; for ``entities``, a linear probe also measures how well objects that
            are cut by seams are recognised.
        adapters: number of adapters to place.
        most_slices: M, the maximum number of slices per image; they do not overlap.

    Returns:
        For every layer the distances of neighbours across seams and inside slices, and the layers recommended for
        adapters.

    Raises:
        CalibrationError: for images without a seam, or too few questions.
    """
    if not calibration.processing.takes_images:
        raise MethodError(f"hires-llava requires a model that takes images, but {model.name} takes text only")
    how: dict[str, Any] = {"most_slices": most_slices, "overlap": 0, "sampler": "all"}
    bare, processor = with_slices(model.model, calibration.processing.processor, **how)
    images = images_of(calibration)
    maps = patch_maps(bare, processor, images)
    found = compare_neighbours(maps, bare.model.slicing.across)
    findings: dict[str, Any] = {
        "layers": list(range(len(found.scores) - 1)),
        **found._asdict(),
        "scores": found.scores,
        "recommended": select_layers(found, adapters, bare),
        "images": len(images),
    }
    if isinstance(calibration, EntityGrid) and calibration.questions[0].image.shape[0] == 2 * bare.model.slicing.side:
        findings["probe"] = probe_entities(maps, calibration.questions, bare.model.slicing)
    return Study(findings=findings)


@command("hires-llava", "judge", on="images", brief={"questions": 18})
def judge(model: Model, test: Annotated[EntityGrid, Split("test")], *, batch: Annotated[int, Ge(1)] = 32) -> Study:
    """Compare a model's accuracy on objects that are cut by a seam with that on objects inside a slice.

    Args:
        model: any model that takes images.
        test: the questions.
        batch: questions per batch.

    Returns:
        Accuracy by task and by number of seams; for each task the gap between objects inside a slice and objects on a
        seam, and the mean gap; and sample questions. A weak model can have a small gap, so consider both together.
    """
    right = answered(as_view(model), test, batch).numpy()
    cuts = np.array([each.cut for each in test.questions])
    tasks = np.array([each.task for each in test.questions])
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
        "positions": _by_position(test, right),
        "samples": [_sample(each, bool(ok)) for each, ok in zip(test.questions[:SHOWN], right, strict=False)],
    }
    return Study(findings=findings)


def _sample(each: EntityQuestion, right: bool) -> dict[str, Any]:
    sample = {"prompt": each.prompt, "answer": each.answer, "cut": each.cut, "right": right}
    return sample | {"image": png_base64([each.image])}


def _share(right: Any) -> float | None:
    return float(right.mean()) if len(right) else None


def _gap(right: Any, cuts: Any) -> float | None:
    inside, cut = _share(right[cuts == CUTS[0]]), _share(right[cuts != CUTS[0]])
    return None if inside is None or cut is None else inside - cut


def _by_position(test: EntityGrid, right: Any) -> list[list[float | None]]:
    """Accuracy at the nine positions."""
    where = np.array([3 * each.about.row + each.about.column for each in test.questions])
    return [[_share(right[where == 3 * row + column]) for column in range(3)] for row in range(3)]


@command("hires-llava", "entities", on="images", brief={"rows": 12, "held_out": 6})
def entities(
    model: Model,
    *,
    rows: Annotated[int, Ge(1)] = 20_000,
    held_out: Annotated[int, Ge(1)] = 2_000,
    seed: Annotated[int, Ge(0)] = 0,
) -> ImageCorpus:
    """Write questions about entities at nine positions of an image as a training and test dataset.

    Args:
        model: the model to generate for: the images have twice the side of its encoder's input.
        rows: number of training rows.
        held_out: number of test rows; their entities do not occur in training rows.
        seed: random seed of the images.

    Returns:
        A folder with ``train.jsonl``, ``test.jsonl`` and the images; ``data.jsonl`` gives for each row its task, the
        entity that the question is about, and how many seams cut it.
    """
    config: Any = model.model.config
    slice_side = int(getattr(config.vision_config, "image_size", 0) or SIDE)
    images: dict[str, Callable[[], Image]] = {}
    made = ImageCorpus(items=[], images=images)
    for part, name, count in (("calibration", "train", rows), ("test", "test", held_out)):
        kept = made.train if name == "train" else made.test
        for number in range(count):
            each = question(number, part, seed, slice_side)
            file = f"{IMAGES}/{name}-{number:05d}.png"
            row = {"image": file, "prompt": each.prompt, "answer": each.answer}
            kept.append(row)
            made.items.append(row | {"part": name, "task": each.task, "thing": each.about.name, "cut": each.cut})
            images[file] = partial(_image, number, part, seed, slice_side)
    made.findings = {"rows": {part: dict(Counter(row["cut"] for row in made.items if row["part"] == part))
                              for part in ("train", "test")}}  # fmt: skip
    return made


def _image(number: int, part: str, seed: int, side: int) -> Image:
    return question(number, part, seed, side).image
