"""KORE on models that read images: what is measured, what trains and what does not, and that plain peft loads it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lamella.data import ImageText, InputContext, Processing
from lamella.evaluate.scored import read_inputs
from lamella.methods.kore import Covariance, input_covariance, kore
from lamella.methods.kore.method import add_adapters, split_weights
from lamella.methods.kore.projector import projector_of
from lamella.results import Tuned
from lamella.runner import run
from lamella.stack import Stack, last_stack, share
from lamella.train import blocks, linear_at
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm

TRAINED: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch": 2, "r": 6}
PROJECTOR = "model.multi_modal_projector"


@cache
def made(kind: str) -> tuple[Stack, Processing]:
    """A small model with random weights, which nobody changes, and what it reads with."""
    model, processor = shapes_vlm(kind, num_hidden_layers=2)
    return last_stack(model), Processing(processor)


def rows(kind: str, tasks: str = "colour", count: int = 4) -> ImageText:
    processing = made(kind)[1]
    return ImageText.open(f"shapes:{tasks}", InputContext(processing_opener=lambda: processing), rows=count)


@cache
def tuned(kind: str) -> Tuned:
    return kore(made(kind)[0], rows(kind, "position"), rows(kind), **TRAINED)


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    given = rows(kind, "count", 3)
    inputs = read_inputs(made(kind)[0].model, given.batch(given))  # what peft wraps does not say what it takes
    return model(**inputs, use_cache=False).logits


@torch.no_grad()
def caught(stack: Stack, given: ImageText, name: str) -> list[tuple[Tensor, Tensor]]:
    """What a map reads of each row [tokens, n], in float64, and which of its positions are an image's."""
    seen: list[Tensor] = []
    hook = stack.model.get_submodule(name).register_forward_hook(lambda _, x, out: seen.append(x[0][0].double()))
    batches = [given.batch([row]) for row in given]
    for batch in batches:
        stack.model(**read_inputs(stack.model, batch), use_cache=False)
    hook.remove()
    image = stack.model.config.image_token_id
    return [(x, batch["input_ids"][0] == image) for x, batch in zip(seen, batches, strict=True)]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("balanced", [False, True])
def test_image_tokens_count_as_any_other_or_together_as_much_as_text(kind: str, balanced: bool) -> None:
    stack, given = made(kind)[0], rows(kind)
    names = linear_at(stack.model)
    found = input_covariance(stack.model, names, given, balanced=balanced)
    for name in (names[0], names[-1]):
        expected = torch.zeros_like(found.of(name)).double()
        for x, image in caught(stack, given, name):
            z = x / x.max().abs()
            share = [len(x) / 2 / image.sum(), len(x) / 2 / (~image).sum()] if balanced else [1.0, 1.0]
            expected += (share[0] * z[image].T @ z[image] + share[1] * z[~image].T @ z[~image]) / 256
        torch.testing.assert_close(found.of(name).double(), expected, rtol=1e-4, atol=1e-7)
    assert found.images == 4 * 64 < found.tokens == sum(len(x) for x, _ in caught(stack, given, names[0]))


def test_the_count_of_image_tokens_comes_back_and_text_alone_has_none(tmp_path: Path) -> None:
    stack = made("llava")[0]
    names = linear_at(stack.model)
    found = input_covariance(stack.model, names, rows("llava"))
    found.save(tmp_path / "old.safetensors")
    both = Covariance.read(tmp_path / "old.safetensors") + found
    assert both.images == 2 * found.images > 0
    assert input_covariance(stack.model, names, torch.randint(12, 40, (2, 8))).images == 0


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_the_text_alone_is_adapted_and_of_llava_the_projector_trains(kind: str) -> None:
    stack, found = made(kind)[0], tuned(kind)
    assert set(found.adapter.modules) == set(linear_at(stack.model)) and found.stack.stack == "text"
    assert all(name.startswith("model.language_model.layers.") for name in found.adapter.modules)
    changed = {
        name
        for name, each in found.stack.model.named_parameters()
        if not torch.equal(each, stack.model.get_parameter(name))
    }
    adapted = {f"{name}.weight" for name in found.adapter.modules}
    projector = {name for name in changed if name.startswith(PROJECTOR)}
    assert changed - projector == adapted and bool(projector) == (kind == "llava")
    assert found.findings["projector"] == (PROJECTOR if kind == "llava" else "")
    assert (logits(found.view, kind) - logits(stack.model, kind)).abs().max() > 1e-3


def test_the_caller_keeps_its_model() -> None:
    stack = last_stack(shapes_vlm("llava", num_hidden_layers=2)[0])
    before = {name: each.clone() for name, each in stack.model.state_dict().items()}
    for form in ("lora", "residual"):
        kore(stack, rows("llava", "position"), rows("llava"), form=form, **TRAINED)
    assert all(torch.equal(before[name], each) for name, each in stack.model.state_dict().items())


def test_the_projector_takes_a_tenth_of_the_step_and_none_where_it_is_left() -> None:
    """Adam's first step is its rate, whatever the gradient."""
    stack = made("llava")[0]
    once = TRAINED | {"steps": 1, "schedule": "constant", "warmup": 0.0, "lr": 1e-3}
    found = kore(stack, rows("llava", "position"), rows("llava"), **once)
    moved = {
        name: float((each - stack.model.get_parameter(f"{PROJECTOR}.{name}").detach()).abs().max())
        for name, each in found.adapter.whole[PROJECTOR].items()
    }
    assert all(each == pytest.approx(1e-4, rel=0.05) for each in moved.values())
    largest = max(float(b.abs().max()) for _, b in found.adapter.pairs.values())
    assert largest == pytest.approx(1e-3, rel=0.05)
    still = kore(stack, rows("llava", "position"), rows("llava"), projector=0.0, **once)
    assert not still.adapter.whole and still.findings["projector"] == ""


def test_before_training_it_is_the_model() -> None:
    stack = made("llava")[0]
    view, names = share(stack.model), linear_at(stack.model)
    split = split_weights(view, names, input_covariance(view, names, rows("llava")), 6)
    for form in ("lora", "residual"):
        view = share(stack.model)
        add_adapters(view, names, split, 6, ["layers.0", "layers.1"], form, 0)
        assert (logits(view, "llava") - logits(stack.model, "llava")).abs().max() < 1e-5


def test_old_images_move_no_output_by_more_than_the_bound() -> None:
    """RMS of dW x over old tokens, at their original values, against |B|_2 sqrt(tr(A0 C A0^T)), C the plain mean."""
    stack, found = made("llava")[0], tuned("llava")
    for name in found.adapter.modules[::5]:
        a, b = (each.double() for each in found.adapter.pairs[name])
        x = torch.cat([each for each, _ in caught(stack, rows("llava"), name)])
        change, c = x @ a.T @ b.T, x.T @ x / len(x)
        bound = torch.linalg.matrix_norm(b, 2) * (a @ c @ a.T).trace().sqrt()
        assert change.square().sum(1).mean().sqrt() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_run_is_loaded_and_merged_by_plain_peft(kind: str, tmp_path: Path) -> None:
    for part in shapes_vlm(kind, num_hidden_layers=2):
        part.save_pretrained(tmp_path / "model")
    given = {"train": "shapes:position", "old": "shapes:colour+count", "rows": 8, "of_stack": "text"}
    done = run("kore", tmp_path / "model", out=tmp_path / "out", **given, **TRAINED)
    said = done.evidence.model_dump()
    assert said["findings"]["image tokens"] == 8 * 64 and said["fidelity"]["kl"]["mean"] > 0
    assert said["sites"] == ["text.layers.0", "text.layers.1"]
    loaded = PeftModel.from_pretrained(shapes_vlm(kind, num_hidden_layers=2)[0], tmp_path / "out")
    ours = logits(done.result.view, kind)  # type: ignore[attr-defined]
    assert (logits(loaded, kind) - ours).abs().max() < 1e-4
    assert (logits(loaded.merge_and_unload(), kind) - ours).abs().max() < 1e-4


def test_a_model_of_images_may_learn_from_text_and_keep_text() -> None:
    new = blocks(torch.randint(12, 40, (4, 9)), loss_on="all")
    found = kore(made("llava")[0], new, torch.randint(12, 40, (4, 16)), **TRAINED)
    assert not found.adapter.whole and found.findings["image tokens"] == 0


def test_a_projector_lies_between_tower_and_text() -> None:
    assert projector_of(made("llava")[0]) == PROJECTOR
    assert projector_of(made("qwen2_vl")[0]) == "" and projector_of(Stack(nano("llama"))) == ""
