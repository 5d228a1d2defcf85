"""The caption audit: captions that an attacker recovers from features, against captions from other images' features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from annotated_types import Ge, Le
from tokenizers import Tokenizer, models, pre_tokenizers

from lamella.data import CaptionedImages, Lazy
from lamella.errors import CalibrationError
from lamella.evaluate.texts import TextScores
from lamella.files import Work
from lamella.methods.caprecover.attackers import nearest
from lamella.methods.caprecover.audit import record_features
from lamella.methods.caprecover.captioner import (
    Captioner,
    CaptionLoss,
    recover_captions,
    tokenise_captions,
    train_captioner,
)
from lamella.methods.caprecover.convergence import HELD_OUT
from lamella.methods.caprecover.guard import scales
from lamella.methods.caprecover.method import parse_defences
from lamella.methods.caprecover.victim import Victim
from lamella.registry import command
from lamella.report.images import png_base64
from lamella.results import Study
from lamella.stack import Stack
from lamella.train import Task, TrainConfig, fit
from lamella.train.supervised import stacked
from lamella.zoo import open_tokenizer

TRAINING = TrainConfig(schedule="constant", warmup=0, batch=64, weight_decay=1e-2)
WRITER_TRAINING = TrainConfig(lr=2e-3, schedule="cosine", batch=64)  # of the built-in small decoder
REPORT_IMAGES = 8  # number of images in the report


@command(
    "caprecover",
    "captions",
    on="any",
    brief={"cuts": ("stage1", "pooled"), "guards": ("none",), "steps": 3, "writer_steps": 3, "batch": 4, "count": 900,
           "test_images": 8, "save_every": 2},
)  # fmt: skip
def captions(
    model: Victim,
    images: CaptionedImages,
    writer: Stack | None = None,
    *,
    cuts: tuple[str, ...] = (),
    guards: tuple[str, ...] = ("none",),
    beams: Annotated[int, Ge(1)] = 10,
    length_penalty: Annotated[float, Ge(-10), Le(10)] = 2.0,
    writer_steps: Annotated[int, Ge(1)] = 1500,
    test_images: Annotated[int, Ge(2)] = 500,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Study:
    """Audit a split model: captions that an eavesdropper recovers from the features, at every cut.

    Args:
        model: the trained model; it is frozen.
        images: images with captions; known training images of the model are excluded. One in five is used for testing.
        writer: the frozen decoder that generates captions; if None, a small one trained on the attacker's captions.
        cuts: names of the cuts; all if empty.
        guards: defences: none, uniform, gaussian:10, fixed:10 (in units of a cut's standard deviation), bits:8,
            top:0.1, pooled.
        beams: number of beams of the caption generation; 10 in the published code.
        length_penalty: exponent of the length by which the log-likelihood of a beam is divided; 2 in the published
            code.
        writer_steps: number of training steps of the small decoder.
        test_images: maximum number of test images.
        config: training configuration of each attacker; by default it is trained at a high and then at a low rate, each
            until its loss on a fifth of its images stops improving. ``steps`` is the maximum at each rate.
        work: folder from which an interrupted run resumes.

    Returns:
        For each cut and defence the caption scores, with those of captions generated from other images' features, and
        of the caption of the attacker's image with the most similar features; and some captions with their images.

    Raises:
        CalibrationError: for images without captions, or too few of them.
    """
    selected, defences = model.select_cuts(cuts), parse_defences(guards)
    train, test = model.unseen(images), list(images.part("test").items)[:test_images]
    if not all(each.text for each in (*train, *test)) or len(test) < 2:
        raise CalibrationError(
            "these images have no captions: write them to metadata.jsonl in the folder of the images"
        )
    if len(train) < 2 * HELD_OUT:
        raise CalibrationError(f"{len(train)} images for the attacker are too few: give at least {2 * HELD_OUT}")
    texts, wanted = [each.text for each in train], [each.text for each in test]
    model.check_cuts(model.prepare(test[:8]), selected)
    depends = [model.describe(), images.describe()]
    ours = record_features(model, train, selected, work, "attacker", depends)
    theirs = record_features(model, test, selected, work, "judge", depends)
    spread = scales(ours)
    if writer is None:
        speaker, tokenizer = small_writer(texts, writer_steps, config.seed, work.directory("writer"))
    else:
        speaker, tokenizer = writer.model, open_tokenizer(writer.path or writer.name)
    rows: list[dict[str, Any]] = []
    written: dict[str, list[str]] = {}
    for cut in selected:
        for guard in defences:
            name = f"{cut}, {guard}"
            attacker = Captioner(ours[cut][0].shape, speaker, tokenizer, config.seed)
            loss = CaptionLoss(guard, cut, spread[cut])
            strength = train_captioner(
                attacker, ours[cut], texts, loss, config, work.directory(f"{cut}-{guard}".replace(":", "-"))
            )
            written[name] = recover_captions(attacker, theirs[cut], loss, beams, length_penalty)
            others = Lazy([len(test) - 1, *range(len(test) - 1)], theirs[cut].__getitem__)
            other = recover_captions(attacker, others, loss, beams, length_penalty)
            near = [texts[row] for row in nearest(ours[cut], theirs[cut]).tolist()]  # without the defence
            scores, prior, retrieved = (TextScores.of(each, wanted).as_dict() for each in (written[name], other, near))
            rows.append(
                {"cut": cut, "guard": str(guard), "scores": scores, "prior": prior, "retrieved": retrieved}
                | strength._asdict()
            )
    samples = [
        {
            "image": png_base64([test[n].image]),
            "text": wanted[n],
            "recovered": {name: each[n] for name, each in written.items()},
        }
        for n in range(min(REPORT_IMAGES, len(test)))
    ]
    counts = {"attacker": len(train), "judge": len(test)}
    return Study(findings={"captions": rows, "samples": samples, "images": counts})


def small_writer(texts: Sequence[str], steps: int, seed: int, out: Path) -> tuple[Any, Any]:
    """Train a decoder of four layers on captions only, with a tokenizer of whole words.

    Args:
        texts: the captions.
        steps: number of training steps.
        seed: random seed.
        out: folder for checkpoints.

    Returns:
        The frozen decoder and its tokenizer.
    """
    words = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
            bos_token_id=1, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(shape)

    def loss(speaker: Any, batch: Any) -> Any:
        before = torch.cat([torch.ones_like(batch["ids"][:, :1]), batch["ids"]], dim=1)  # starts with the end token
        labels = before.masked_fill(torch.cat([batch["mask"][:, :1], batch["mask"]], dim=1) == 0, -100)
        return speaker(input_ids=before, labels=labels, use_cache=False).loss

    samples = tokenise_captions(tokenizer, texts)
    task = Task(loss, collate=stacked, weight=lambda batch: len(batch["ids"]))
    config = replace(WRITER_TRAINING, steps=steps, seed=seed, save_every=steps)
    fit(model, samples, task, config, out=out, trainable=lambda name: True)
    return model.eval().requires_grad_(False), tokenizer
