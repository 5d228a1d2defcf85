"""Small models of images and text: their rows teach what they should, and a training that was killed goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lamella.data import MARK, ImageText, ImageTextRow, Processing
from lamella.evaluate import answered
from lamella.evaluate.scored import read_inputs
from lamella.train import loop
from lamella.zoo.vlm import SHAPES_VLM, shapes_vlm

sys.path.insert(0, str(Path(__file__).parents[2] / "reproductions"))

from harness import vlm

FEW = 0.002  # of the steps: 2 to 5 in each stage
LONGER = 0.015  # 6 steps
WORDS = "model.language_model.embed_tokens.weight"
TRAINED = ("model.front.patches.weight", "model.language_model.decoder.layers.5.fc2.weight")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_stages_ask_for_what_they_say() -> None:
    counts = {name: [len(row.messages[1]["content"].split()) for row in vlm.STAGES[name].rows(40, 1, 32)[1::2]]
              for name in ("naming", "alignment")}  # fmt: skip
    assert set(counts["naming"]) == {6, 12} and set(counts["alignment"]) == {6, 12, 18, 24}  # six words of each thing
    rows = vlm.STAGES["sft"].rows(40, 1, 32)
    for row in rows:
        said = [each["content"] for each in row.messages]
        prompts = [each.removeprefix("<image>\n") for each in said[::2]]
        whole = [number for number, each in enumerate(prompts) if each.startswith(("describe", "list"))]
        assert whole in ([], [len(prompts) - 1]) and said[0].startswith("<image>\n")
    assert sum(len(row.messages) for row in rows) / len(rows) > 10
    assert {row.messages[-2]["content"] for row in rows} >= {"describe the picture.", "list the shapes."}


@pytest.mark.parametrize("kind", SHAPES_VLM)
def test_several_questions_to_a_picture_are_answered_as_each_by_itself(kind: str) -> None:
    model, processor = shapes_vlm(kind, num_hidden_layers=2)
    processing = Processing(processor)
    rows = vlm.questions(3, 1, 32)
    batch = vlm.reading(processing, rows[0].images[0])(rows)
    with torch.no_grad():
        told = batch["labels"][:, 1:] >= 0
        inputs = read_inputs(model, batch)
        logits = model(**inputs | vlm.alone(model, batch), use_cache=False).logits[:, :-1][told]
        place = 0
        for row in rows:
            for asked, answer in zip(row.messages[::2], row.messages[1::2], strict=True):
                text = f"{MARK}\n{asked['content'].removeprefix(MARK).strip()}"
                single = processing.batch([ImageTextRow(row.images, ({**asked, "content": text}, answer))])
                known = model(**read_inputs(model, single), use_cache=False).logits[:, :-1]
                known = known[single["labels"][:, 1:] >= 0]
                torch.testing.assert_close(logits[place : place + len(known)], known, atol=1e-4, rtol=1e-4)
                place += len(known)
    assert place == len(logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl_moe"])
def test_stages_train_what_they_say(kind: str, cache: Path) -> None:
    before = vlm.opened_vlm(vlm.trained_vlm(kind, "text", steps=FEW)).state_dict()
    seeing = [name for name in before if "language_model" not in name and "lm_head" not in name]
    first = shapes_vlm(kind)[0].state_dict()
    assert seeing and all(torch.equal(before[name], first[name]) for name in seeing)
    assert not torch.equal(before[WORDS], first[WORDS])
    after = vlm.opened_vlm(vlm.trained_vlm(kind, "alignment", steps=FEW)).state_dict()
    assert torch.equal(before[WORDS], after[WORDS]) and any(not torch.equal(before[n], after[n]) for n in seeing)
    final = vlm.opened_vlm(folder := vlm.trained_vlm(kind, "sft", steps=FEW)).state_dict()
    assert not torch.equal(final[WORDS], after[WORDS])
    assert not list(cache.glob("training-*")) and folder.parent == cache
    rows = vlm.rows_of(folder, ["colour", "list"], 4)
    assert isinstance(rows, ImageText) and answered(vlm.opened_vlm(folder), rows).shape == (4,)


def test_an_encoder_decoder_learns_one_question_to_a_picture(cache: Path) -> None:
    few, rows = (vlm.STAGES_SEQ2SEQ[stage].rows(80, 1, 32) for stage in ("matching", "sft"))
    asked = [each.task for each in rows]
    assert all(len(each.messages) == 2 for each in rows) and asked.count("entailment") + asked.count("premise") == 40
    things = [{row.messages[1]["content"].count("a ") for row in some if row.task == "caption"} for some in (few, rows)]
    assert things == [{1, 2}, {1, 2, 3, 4}]
    before = shapes_vlm("patch_mbart")[0].state_dict()
    folder = vlm.trained_vlm("patch_mbart", steps=0.001)
    after = vlm.opened_vlm(folder).state_dict()
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in TRAINED)
    some = vlm.rows_of(folder, ["entailment", "caption"], 4)
    assert some.processing.encodes and answered(vlm.opened_vlm(folder), some).shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl_moe"])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = vlm.STAGES["text"]
    monkeypatch.setitem(vlm.STAGES, "text", replace(stage, config=replace(stage.config, save_every=2)))
    whole = vlm.trained_vlm(kind, "text", steps=LONGER)
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "second"))
    step, done = loop.Loop.training_step, []

    def killed(self: loop.Loop, *given: object, **more: object) -> torch.Tensor:
        done.append(None)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(self, *given, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Loop, "training_step", killed)
        vlm.trained_vlm(kind, "text", steps=LONGER)
    assert list((tmp_path / "second").glob("training-*/checkpoint-2"))
    again = vlm.trained_vlm(kind, "text", steps=LONGER)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_are_trained_with_the_loss_that_balances_them() -> None:
    model, processor = shapes_vlm("qwen3_vl_moe", num_hidden_layers=2)
    rows = vlm.shown(3, 0, 32)
    batch = vlm.reading(Processing(processor), rows[0].images[0])(rows)
    loss, parts = vlm.loss(model, batch)
    assert loss.item() == pytest.approx((parts["ce"] + 0.01 * parts["balance"]).item(), rel=1e-6)
    gates = [layer.mlp.gate.weight for layer in model.model.language_model.layers]
    inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths", "picture")}
    states = [each.mlp.gate for each in model.model.language_model.layers]
    seen: list[torch.Tensor] = []
    hooks = [each.register_forward_hook(lambda _, __, out: seen.append(out[0])) for each in states]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool().flatten()
    probabilities = torch.cat([each.softmax(-1)[real] for each in seen])
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(4).indices, 1.0)
    balance = 8 * (chosen.mean(0) * probabilities.mean(0)).sum()
    assert parts["balance"].item() == pytest.approx(float(balance), rel=1e-5)
    loss.backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in gates)
