"""The audit of captions: what an attacker writes of pictures that he never sees, beside what he would write anyhow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from annotated_types import Ge
from tokenizers import Tokenizer, models, pre_tokenizers

from lamella.data import CaptionedImages, Lazy
from lamella.errors import CalibrationError
from lamella.evaluate.texts import TextScores
from lamella.files import Work
from lamella.methods.caprecover.audit import recorded
from lamella.methods.caprecover.captioner import Captioner, Spoken, captions_as_rows, recovered, taught
from lamella.methods.caprecover.guard import scales
from lamella.methods.caprecover.method import parsed
from lamella.methods.caprecover.victim import Victim
from lamella.registry import command
from lamella.report.images import png_base64
from lamella.results import Study
from lamella.stack import Stack
from lamella.train import Task, TrainConfig, fit
from lamella.train.supervised import stacked
from lamella.zoo import open_tokenizer

TRAINING = TrainConfig(steps=3000, lr=1e-3, schedule="cosine", batch=64, weight_decay=1e-2)
SPEAKING = TrainConfig(steps=1500, lr=2e-3, schedule="cosine", batch=64)  # of the small writer
SHOWN = 8  # pictures of the report


@command(
    "caprecover",
    "captions",
    on="any",
    brief={"cuts": ("stage1", "pooled"), "guards": ("none",), "steps": 3, "speaks": 3, "batch": 4, "count": 900,
           "judged": 8, "save_every": 2},
)  # fmt: skip
def captions(
    model: Victim,
    images: CaptionedImages,
    writer: Stack | None = None,
    *,
    cuts: tuple[str, ...] = (),
    guards: tuple[str, ...] = ("none",),
    beams: Annotated[int, Ge(1)] = 4,
    speaks: Annotated[int, Ge(1)] = 1500,
    judged: Annotated[int, Ge(2)] = 500,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Study:
    """Audit a split model: which captions an eavesdropper writes of the pictures, at every cut.

    Args:
        model: trained, and frozen.
        images: pictures with captions; those that the model was trained on, where that is known, are left out. One in
            five is kept to judge.
        writer: the decoder that speaks, frozen; a small one that has read the attacker's captions when left out.
        cuts, guards: as in caprecover.
        beams: of the writing.
        speaks: steps in which the small writer learns to speak.
        judged: at most so many pictures are judged.
        config: of each attacker.
        work: where an interrupted run goes on from.

    Returns:
        By cut and defence the scores of the captions beside those that are written of other pictures' features, and
        some of them with their pictures.

    Raises:
        CalibrationError: for pictures without captions.
    """
    chosen, defences = model.chosen(cuts), parsed(guards)
    train, test = model.unseen(images), list(images.part("test").items)[:judged]
    if not all(each.text for each in (*train, *test)) or len(test) < 2:
        raise CalibrationError("these pictures have no captions: put them into metadata.jsonl beside the pictures")
    texts, wanted = [each.text for each in train], [each.text for each in test]
    model.check_cuts(model.prepare(test[:8]), chosen)
    depends = [model.describe(), images.describe()]
    ours = recorded(model, train, chosen, work, "attacker", depends)
    theirs = recorded(model, test, chosen, work, "judge", depends)
    spread = scales(ours)
    if writer is None:
        speaker, tokenizer = small_writer(texts, speaks, config.seed, work.directory("writer"))
    else:
        speaker, tokenizer = writer.model, open_tokenizer(writer.path or writer.name)
    rows: list[dict[str, Any]] = []
    written: dict[str, list[str]] = {}
    for cut in chosen:
        for guard in defences:
            name = f"{cut}, {guard}"
            attacker = Captioner(ours[cut][0].shape, speaker, tokenizer, config.seed)
            loss = Spoken(guard, cut, spread[cut])
            taught(attacker, ours[cut], texts, loss, config, work.directory(f"{cut}-{guard}".replace(":", "-")))
            written[name] = recovered(attacker, theirs[cut], loss, beams)
            others = Lazy([len(test) - 1, *range(len(test) - 1)], theirs[cut].__getitem__)
            other = recovered(attacker, others, loss, beams)
            scores, prior = (TextScores.of(each, wanted).as_dict() for each in (written[name], other))
            rows.append({"cut": cut, "guard": str(guard), "scores": scores, "of other pictures": prior})
    samples = [
        {
            "picture": png_base64([test[n].image]),
            "text": wanted[n],
            "written": {name: each[n] for name, each in written.items()},
        }
        for n in range(min(SHOWN, len(test)))
    ]
    counts = {"attacker": len(train), "judge": len(test)}
    return Study(findings={"captions": rows, "samples": samples, "pictures": counts})


def small_writer(texts: Sequence[str], steps: int, seed: int, out: Path) -> tuple[Any, Any]:
    """A decoder of four layers that has read captions and nothing else, and its tokenizer of whole words."""
    words = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
            bos_token_id=1, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)

    def loss(speaker: Any, batch: Any) -> Any:
        before = torch.cat([torch.ones_like(batch["ids"][:, :1]), batch["ids"]], dim=1)  # from an end to the next
        labels = before.masked_fill(torch.cat([batch["mask"][:, :1], batch["mask"]], dim=1) == 0, -100)
        return speaker(input_ids=before, labels=labels, use_cache=False).loss

    samples = captions_as_rows(tokenizer, texts)
    task = Task(loss, collate=stacked, weight=lambda batch: len(batch["ids"]))
    told = TrainConfig(
        steps=steps, lr=SPEAKING.lr, schedule="cosine", batch=SPEAKING.batch, seed=seed, save_every=max(1, steps)
    )
    fit(model, samples, task, told, out=out, trainable=lambda name: True)
    return model.eval().requires_grad_(False), tokenizer
