"""The pivot study: each curve against another way to it, cuts by hand, and honesty where there is no pivot."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.layra import Language, pivot
from lamella.methods.layra.pivot import alignment, between, crossing, gradient, lead, means, own_tokens, probe, stages
from lamella.stack import Stack
from lamella.train import blocks, collate
from lamella.zoo.nano import nano

DRAWN = torch.Generator().manual_seed(0)
ENGLISH, OTHER = (blocks(torch.randint(low, low + 30, (8, 12), generator=DRAWN), loss_on="all") for low in (3, 60))
LANGUAGES = {"eng": Language(ENGLISH, ENGLISH[:2], 22), "swh": Language(OTHER, OTHER[:2], 22)}


def stack() -> Stack:
    return Stack(nano("llama", num_hidden_layers=5))


def states(model: Any, ids: Tensor) -> list[Tensor]:
    """The stream after each layer, by hooks on the model itself [time, hidden]."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda module, args, out: seen.append(out[0])) for layer in model.model.layers]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return seen


def test_the_lead_of_english_is_read_off_with_norm_and_head() -> None:
    model = nano("llama", num_hidden_layers=5)
    own, theirs = own_tokens(OTHER, ENGLISH, 128)
    assert set(theirs.tolist()) <= set(range(3, 33)) and set(own.tolist()) <= set(range(60, 90)) and len(own) > 20
    expected = np.zeros(5)
    for row in OTHER:
        for layer, h in enumerate(states(model, row["input_ids"])):
            with torch.no_grad():
                p = model.lm_head(model.model.norm(h)).double().softmax(-1).numpy()
            expected[layer] += (p[:, theirs].sum() - p[:, own].sum()) / (8 * 12)
    assert lead(stack(), OTHER, ENGLISH) == pytest.approx(expected.tolist(), abs=1e-6)


def test_tokens_that_both_languages_use_belong_to_neither() -> None:
    ours, theirs = ([{"input_ids": torch.tensor(row)}] for row in ([5] * 10 + [7] * 10, [6] * 10 + [7] * 9))
    own, other = own_tokens(ours, theirs, 10)
    assert own.tolist() == [5] and other.tolist() == [6]


def test_mean_states_are_those_of_the_model() -> None:
    found = means(stack(), OTHER[:3])
    model = nano("llama", num_hidden_layers=5)
    for row, sample in enumerate(OTHER[:3]):
        for layer, h in enumerate(states(model, sample["input_ids"])):
            torch.testing.assert_close(found[layer, row], h.mean(0), atol=1e-5, rtol=1e-5)


def test_the_probe_is_ridge_regression_on_one_half_judged_on_the_other() -> None:
    drawn = torch.Generator().manual_seed(3)
    given = {name: torch.randn(3, 10, 6, generator=drawn) + shift for name, shift in (("a", 0.0), ("b", 0.7))}
    expected = []
    for layer in range(3):
        x = torch.cat([given["a"][layer], given["b"][layer]]).double().numpy()
        y, train = np.repeat([0, 1], 10), np.tile([True, False], 10)
        x = (x - x[train].mean(0)) / (x[train].std(0, ddof=1) + 1e-6)
        x = np.hstack([x, np.ones((20, 1))])
        normal = x[train].T @ x[train] + np.eye(7)
        w = np.linalg.solve(normal, x[train].T @ np.eye(2)[y[train]])
        expected.append(((x[~train] @ w).argmax(1) == y[~train]).mean())
    assert probe(given) == pytest.approx(expected)
    with pytest.raises(MethodError, match="only one sample"):
        probe({name: each[:, :1] for name, each in given.items()})


def test_alignment_is_the_cosine_of_pairs_above_that_of_others() -> None:
    drawn = torch.Generator().manual_seed(4)
    ours, theirs = (torch.randn(2, 4, 6, generator=drawn) for _ in range(2))

    def cosine(layer: int, i: int, j: int) -> float:
        a, b = ours[layer, i].double().numpy(), theirs[layer, j].double().numpy()
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [
        np.mean([cosine(layer, i, i) for i in range(4)])
        - np.mean([cosine(layer, i, j) for i in range(4) for j in range(4) if i != j])
        for layer in range(2)
    ]
    assert alignment(ours, theirs) == pytest.approx(expected, abs=1e-9)


def test_the_gradient_of_b_is_that_of_the_weight_times_the_random_half() -> None:
    """dL/dB = s (dL/dW) A^T, from the gradient of the plain model's weights."""
    from lamella.methods.layra.recipe import AdapterShape, with_adapters

    base = stack()
    _, lora = with_adapters(base, [f"layers.{layer}" for layer in range(5)], AdapterShape(), 0)
    batch = collate(OTHER[:4])
    out = base.model(input_ids=batch["input_ids"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(out.reshape(-1, 128), batch["input_ids"][:, 1:].reshape(-1)).backward()
    squares = np.zeros(5)
    for name, (a, _) in lora.adapter().pairs.items():
        whole = base.model.get_submodule(name).weight.grad
        squares[int(name.split(".")[2])] += float((2.0 * whole.double() @ a.double().T).square().sum())
    assert gradient(base, OTHER[:4]) == pytest.approx((squares / squares.sum()).tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("curve", "cut"),
    [
        ([-0.1, -0.1, 0.2, 0.3, 0.1, -0.4], (2, 1)),
        ([-0.1, 0.2, -0.1, 0.3, -0.2, -0.4], (1, 2)),  # the last stage begins where the language leads for good
        ([-0.1, -0.1, -0.2], None),  # English never leads
        ([-0.1, 0.1, 0.2], None),  # and never yields
        ([0.1, 0.1, -0.2], None),  # or leads from the beginning
    ],
)
def test_crossings(curve: list[float], cut: Any) -> None:
    assert crossing(curve) == cut


def test_a_lead_that_is_no_more_than_chance_is_no_pivot() -> None:
    assert stages([-0.03, 0.02, -0.02]) is None and stages([-0.3, 0.2, -0.2]) == (1, 1)


def test_half_heights_cut_what_is_not_flat() -> None:
    assert between([1.0, 0.9, 0.2, 0.1, 0.8], low=True) == (2, 1)
    assert between([0.0, 0.1, 0.9, 0.8, 0.1, 0.0], low=False) == (2, 2)
    assert between([0.50, 0.52, 0.51], low=True) is None and between([1.0, 0.5, 0.0], low=True) is None


def test_a_model_without_a_pivot_falls_back_to_the_fixed_edges_and_says_so() -> None:
    found = pivot(
        stack(), LANGUAGES, parallel=[(a["input_ids"], b["input_ids"]) for a, b in zip(ENGLISH, OTHER, strict=True)]
    )
    assert found.cuts["pivot swh"] is None and not found.found
    assert (found.edges.first, found.edges.last) == (2, 1)  # 10 and 2 of 28, scaled to 5
    assert "No pivot to English was found" in found.notes[0]
    assert set(found.curves) == {"pivot swh", "probe", "alignment", "gradient"}
    assert all(len(curve) == 5 for curve in found.curves.values()) and sum(found.curves["gradient"]) == pytest.approx(1)
    json.dumps(found.findings)


def test_a_pivot_that_is_there_cuts_and_curves_that_disagree_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("lamella.methods.layra.pivot")  # the package's own `pivot` is the command
    base = Stack(nano("llama", num_hidden_layers=8))
    monkeypatch.setattr(module, "lead", lambda *given: [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    monkeypatch.setattr(module, "probe", lambda given: [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0])
    found = pivot(base, LANGUAGES)
    assert found.found and (found.edges.first, found.edges.last) == (3, 1)
    assert any("probe disagrees: it cuts at 1 + 2" in each for each in found.notes)


def test_english_and_another_language_are_needed() -> None:
    for languages in ({"eng": LANGUAGES["eng"]}, {"swh": LANGUAGES["swh"]}):
        with pytest.raises(MethodError, match="give 'eng' and at least one other"):
            pivot(stack(), languages)
