"""Routes: models as they are and quantised, each measured against the original."""

from __future__ import annotations

import pytest
import torch

import lamella
from lamella.commands.compress.forms import Torch
from lamella.commands.compress.routes import Quantize, check_quantised, routes, variants_of
from lamella.commands.compress.tradeoff import figure, rows
from lamella.errors import ExportError
from lamella.evaluate import FidelityTest
from lamella.plan import ModelReference, PhasedPath, Plan, materialise
from lamella.plan.quantize import int8_copy
from lamella.stack import Stack
from lamella.zoo import nano

TOKENS = torch.randint(3, 120, (3, 32), generator=torch.Generator().manual_seed(0))


def test_all_models_are_quantised_and_measured() -> None:
    stack = Stack(nano("llama"))
    plans = [Plan(model=ModelReference.of(stack), drop=drop) for drop in (["layers.1"], [])]
    models = {"original": (stack, None), "cut": (stack, plans[0]), "healed": (stack, plans[1])}
    test, torch_ = FidelityTest(stack, TOKENS), Torch()
    found = {each["name"]: each for each in routes(test, torch_, variants_of(models, torch_.shown(stack, "q8_0")))}
    assert list(found) == [
        f"{name}{form}" for name in models for form in ("", ", int8", ", q8_0")
    ]  # fmt: skip
    kl = {name: each["fidelity"]["kl"]["mean"] for name, each in found.items()}
    assert kl["original"] == pytest.approx(0, abs=1e-6)
    assert kl["healed"] == pytest.approx(0, abs=1e-6)  # the whole model, in this test
    assert 0 < kl["original, q8_0"] < kl["original, int8"] < 0.1 * kl["cut"]
    assert found["cut"]["fidelity"] == test.of(lamella.apply(stack, plans[0])).as_dict()
    # 32 bits, 34 bytes for 32 numbers, and 8 bits for all matrices but embedding and head, which have 16.
    matrices = 2 * 128 * 32, 4 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32)
    vectors = 9 * 32
    assert found["original"]["bytes"] == 4 * (sum(matrices) + vectors)
    kept = materialise(stack, plans[0]).model.parameters()  # a view holds what it leaves out
    assert found["cut"]["bytes"] == sum(each.nbytes for each in kept) < found["original"]["bytes"]
    assert found["original, q8_0"]["bytes"] == sum(matrices) * 34 / 32 + 4 * vectors
    assert found["cut, q8_0"]["bytes"] == (matrices[0] + matrices[1] * 3 / 4) * 34 / 32 + 4 * (vectors - 2 * 32)
    scales = 4 * (32 * 2 + 16 * 2 + 64 * 2 + 32)
    int8 = int8_copy(stack.model).parameters()
    assert (
        found["original, int8"]["bytes"]
        == sum(each.nbytes for each in int8)
        == 2 * matrices[0] + matrices[1] + 2 * scales + 2 * vectors
    )
    assert [name for name, each in found.items() if each["decode_speedup"] is None] == [
        "original, q8_0", "cut, q8_0", "healed, q8_0"
    ]  # fmt: skip
    assert found["healed"]["decode_speedup"] == found["cut"]["decode_speedup"]  # they have one shape
    evidence = {"routes": list(found.values()), "goal": {"name": "speedup", "value": 1.3}, "runtime": {"name": "torch"}}
    assert [row[0] for row in rows(evidence)] == list(found)
    assert sum(len(each.labels) for each in figure(evidence).series.values()) == 6


def test_a_model_without_linear_maps_has_no_int8() -> None:
    stack = Stack(nano("gpt2"))  # its maps are of a class of their own
    found = routes(
        FidelityTest(stack, TOKENS), Torch(), variants_of({"original": (stack, None)}, Torch().shown(stack, None))
    )
    assert [each["name"] for each in found] == ["original"]


def test_a_model_that_decides_while_it_runs_is_measured_as_it_is() -> None:
    stack = Stack(nano("llama"))
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    models = {"original": (stack, None), "cut": (stack, Plan(model=ModelReference.of(stack), path=path))}
    found = routes(FidelityTest(stack, TOKENS), Torch(), variants_of(models, Torch().shown(stack, None)))
    assert [each["name"] for each in found] == ["original", "original, int8", "cut"]


def test_what_cannot_be_quantised_is_refused() -> None:
    check_quantised(None, "native")
    with pytest.raises(ExportError, match="native checkpoints cannot be quantised"):
        check_quantised(Quantize("q8_0"), "native")
    with pytest.raises(ExportError, match="native checkpoints cannot be quantised"):
        check_quantised(None, "native", allow=("quantize",))


def test_the_decoder_of_a_model_with_images_has_a_form_of_8_bits() -> None:
    stack = lamella.open(nano("llava")).stacks["text"]
    assert [form.stack.stack for form in Torch().forms(stack, quantised=True, cut=True)] == ["text", "text"]
