"""Answers about images: fidelity, exact answers and speed of models of images and text, against transformers alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lamella.data import ImageText, ImageTextRow, InputContext, Processing
from lamella.errors import ArchitectureError
from lamella.evaluate import FidelityTest, answered, bench
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import Model, Stack, open_model
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples, word_tokenizer

KINDS = ("llava", "qwen2_vl", "qwen3_vl_moe", "idefics3")


def made(kind: str) -> tuple[Model, ImageText]:
    model, processor = shapes_vlm(kind, num_hidden_layers=3)
    processing = Processing(processor)
    reader = InputContext(lambda: processing.tokenizer, 0, "test", lambda: processing)
    rows = ImageText.open("shapes:colour+position+list", reader, rows=6)
    return open_model(model), ImageText([*rows, _asked("how many?", "two")], processing)


def by_hand(model: Any, rows: ImageText) -> list[tuple[torch.Tensor, list[int]]]:
    """For each row, the log-probabilities at its answer, float64, and the answer's tokens, by transformers alone."""
    found = []
    for row in rows:
        batch = rows.batch([row])
        start = int(batch["prompt_lengths"][0])
        inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}
        logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1]
        found.append((logits.double().log_softmax(-1), batch["input_ids"][0, start:].tolist()))
    return found


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fidelity_is_over_the_answers_alone(kind: str) -> None:
    opened, rows = made(kind)
    text = list(opened.stacks.values())[-1]
    view = apply(text, Plan(model=ModelReference.of(text), drop=[f"{text.prefix}layers.1"]))
    found = FidelityTest(opened, rows).of(view)
    base, ours = by_hand(opened.model, rows), by_hand(view, rows)
    kl, loss, top1 = [], [], []
    for (p, answer), (q, _) in zip(base, ours, strict=True):
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        loss.append(float(-q[range(len(answer)), answer].mean()))
        top1.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.kl.mean == pytest.approx(math.fsum(kl) / len(kl), rel=1e-4)
    assert math.log(found.perplexity.mean) == pytest.approx(math.fsum(loss) / len(loss), rel=1e-5)
    assert found.top1.mean == pytest.approx(math.fsum(top1) / len(top1))
    assert found.sequences == len(rows) and found.positions == sum(len(answer) for _, answer in base)
    assert FidelityTest(opened, rows).of(opened.model).kl.mean == 0


@torch.no_grad()
def test_a_plan_for_written_tokens_leaves_the_image_whole() -> None:
    opened, rows = made("llava")
    text = opened.stacks["text"]
    path = {"text": PhasedPath(prefill=[0, 1, 2], decode=[0, 2])}
    view = apply(text, Plan(model=ModelReference.of(text), path=path))
    found = FidelityTest(text, rows).of(view)
    batch = rows.batch([rows[0]])
    start = int(batch["prompt_lengths"][0])
    inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}
    whole = view(**inputs, prompt_lengths=torch.tensor([start]), use_cache=False).logits
    assert torch.equal(whole[:, : start - 1], opened.model(**inputs, use_cache=False).logits[:, : start - 1])
    assert found.kl.mean > 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_answered_is_what_greedy_decoding_writes(kind: str) -> None:
    """The answers of every other row are made those that the model writes."""
    opened, rows = made(kind)
    model, tokenizer = opened.model, rows.processing.tokenizer
    wrong = answered(model, rows, batch=3)
    assert not wrong.any()
    mended = []
    for number, row in enumerate(rows):
        prompt = rows.prompts([row])
        out = model.generate(**prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
        words = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
        mended.append(_answering(row, words) if number % 2 else row)
    made_so = ImageText(mended, _Endless(rows.processing.processor))
    assert answered(model, made_so, batch=3).tolist() == [bool(number % 2) for number in range(len(rows))]


class _Endless(Processing):
    """Answers that do not end, so that they are what a model writes in so many tokens."""

    def _tokens(self, text: str, ends: bool) -> list[int]:
        return super()._tokens(text, ends=False)


def _answering(row: ImageTextRow, words: str) -> ImageTextRow:
    return ImageTextRow(row.images, (*row.messages[:-1], {"role": "assistant", "content": words}))


@torch.no_grad()
def test_an_encoder_decoder_is_judged_on_what_it_writes() -> None:
    """On rows without images: which models read what of those is their own matter."""
    tokenizer = word_tokenizer()
    model = nano("bart")
    processing = Processing(tokenizer, encodes=True)
    rows = ImageText([_asked(each.prompt, each.answer) for each in examples(["colour", "list"], 5)], processing)
    opened = open_model(model)
    decoder = opened.stacks["decoder"]
    view = apply(decoder, Plan(model=ModelReference.of(decoder), drop=["decoder.layers.1"]))
    found = FidelityTest(opened, rows).of(view)
    kl = []
    for row in rows:
        batch = rows.batch([row])
        outputs = [
            each(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}) for each in (model, view)
        ]
        p, q = (each.logits[0].double().log_softmax(-1) for each in outputs)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found.kl.mean == pytest.approx(math.fsum(kl) / len(kl), rel=1e-4) and found.kl.mean > 0
    assert not answered(model, rows).any()


def _asked(prompt: str, answer: str) -> ImageTextRow:
    return ImageTextRow((), ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def test_a_vision_tower_continues_no_text() -> None:
    opened, rows = made("llava")
    with pytest.raises(ArchitectureError, match="does not continue text by itself"):
        FidelityTest(opened.stacks["vision"], rows)


def test_bench_times_models_on_the_prompts_of_rows() -> None:
    opened, rows = made("llava")
    text = opened.stacks["text"]
    small = apply(text, Plan(model=ModelReference.of(text), drop=[f"{text.prefix}layers.1"]))
    seen: list[Any] = []
    opened.model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    found = bench({"whole": opened.model, "small": small}, batches=(1, 3), prompt=rows, tokens=2, rounds=2)
    assert [timing.batch for timing in found["small"]] == [1, 3]
    ids = [given["input_ids"].shape for given in seen if "pixel_values" in given]
    assert len(ids) == 2 * 3 and {shape[0] for shape in ids} == {1, 3} and min(shape[1] for shape in ids) > 64
    ragged = [given for given in seen if "pixel_values" not in given and given["input_ids"].shape[0] == 3]
    assert all(given["attention_mask"].shape[1] > 64 for given in ragged), "padding stays padding while decoding"


def test_a_stack_of_text_is_judged_on_rows_too() -> None:
    model, processor = shapes_vlm("llava", num_hidden_layers=2)
    rows = ImageText(made("llava")[1].items, Processing(processor))
    assert FidelityTest(Stack(model, stack="text"), rows).of(model).top1.mean == 1
