"""From images with text to a trained model that is served by thresholds: what trains, what is kept, what comes back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.data import MARK, ImageText, ImageTextRow, Processing
from lamella.errors import MethodError
from lamella.methods.gamma_mod import Routing, arank, observe, quantile, thresholds
from lamella.methods.gamma_mod.baselines import mode_layers
from lamella.methods.gamma_mod.recipe import calibrate, convert
from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import NO_LOSS, pairs
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

LAYERS = (1, 2)


@cache
def seeing() -> tuple[Stack, ImageText]:
    """Return a small LLaVA with random weights, and questions with and without images."""
    model, processor = shapes_vlm("llava", num_hidden_layers=4)
    turns = [((each.image,), f"{MARK}\n{each.prompt}", each.answer) for each in examples(("colour", "count"), 7)] + [
        ((), "count the circles", "one")
    ]
    rows = [
        ImageTextRow(images, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        for images, question, answer in turns
    ]
    return Stack(model, stack="text"), ImageText(rows, Processing(processor))


def made(tmp_path: Path, **options: Any) -> Any:
    stack, rows = seeing()
    given = {"layers": LAYERS, "steps": 2, "lr": 1e-3, "batch": 4, "accumulate": 1, "probes": 8}
    return lamella.get_method("gamma-mod")(stack, rows, **given | options, work=lamella.Work(tmp_path))


def test_in_training_half_of_the_image_passes_and_all_else_is_processed() -> None:
    stack, rows = seeing()
    seen = observe(convert(stack, LAYERS, Routing(), 0), rows)
    for row in range(len(rows)):
        here = seen.row == row
        image, ran = seen.image[here], seen.ran[here]
        free = int(image.nonzero().max()) + 1 if image.any() else 0  # up to the end of the image
        assert (~ran).sum(0).tolist() == [free // 2] * 2 and ran[free:].all()
    assert seen.image.any() and seen.kept()["answer"] == [1.0, 1.0]


def test_calibrated_thresholds_keep_what_training_kept() -> None:
    stack, rows = seeing()
    seen = observe(convert(stack, LAYERS, Routing(), 0), rows)
    limits = calibrate(seen)
    for place, limit in enumerate(limits["prefill"]):
        kept = (seen.p[seen.prompt][:, place] > limit).float().mean()
        assert float(kept) == pytest.approx(float(seen.ran[seen.prompt][:, place].float().mean()), abs=0.01)
    assert limits["decode"] == [-1.0, -1.0]


@pytest.mark.parametrize("lr", [2e-5, 1e-3])
def test_a_router_that_keeps_all_at_first_serves_what_training_kept(tmp_path: Path, lr: float) -> None:
    _, rows = seeing()
    found = made(tmp_path, start="keep", steps=6, lr=lr)
    trained = convert(found.stack, LAYERS, Routing(start="keep"), 0)
    trained.lamella_policy.load_state_dict(apply(found.stack, found.plan).lamella_policy.state_dict())
    kept, served = observe(trained, rows), observe(apply(found.stack, found.plan), rows)
    shares = [each.ran[each.prompt].float().mean(0) for each in (kept, served)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.1)
    assert found.findings["kept"]["answer"] == [1.0, 1.0]


def test_which_tokens_pass_at_first_does_not_hang_on_where_they_stand() -> None:
    stack, rows = seeing()
    seen = observe(convert(stack, LAYERS, Routing(start="keep"), 0), rows)
    here = (seen.row == 0) & seen.image
    half = int(here.sum()) // 2
    ran = seen.ran[here][:, 0]
    assert 0 < int(ran[:half].sum()) < half and float(seen.p.float().min()) == 1.0


def test_as_many_pass_without_the_mask() -> None:
    stack, rows = seeing()
    with_mask, without = (observe(convert(stack, LAYERS, Routing(mask=mask), 0), rows) for mask in (True, False))
    for row in range(len(rows)):
        here = with_mask.row == row
        assert with_mask.ran[here].sum(0).tolist() == without.ran[here].sum(0).tolist()
    assert without.kept()["answer"] != [1.0, 1.0]


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 1.0])
def test_a_quantile_keeps_its_share(keep: float) -> None:
    p = torch.rand(400, generator=torch.Generator().manual_seed(0))
    assert float((p > quantile(p, keep)).float().mean()) == pytest.approx(keep)


def test_all_of_the_model_trains_and_the_original_stays(tmp_path: Path) -> None:
    stack, _ = seeing()
    before = {name: each.clone() for name, each in stack.model.state_dict().items()}
    found = made(tmp_path)
    after = found.stack.model.state_dict()
    assert all(torch.equal(each, stack.model.state_dict()[name]) for name, each in before.items())
    moved = {name.split(".")[1] for name, each in before.items() if not torch.equal(each, after[name])}
    assert {"language_model", "multi_modal_projector", "vision_tower"} <= moved
    assert set(found.stack.stacks) == set(stack.stacks) and found.stack.stack == "text"
    assert found.findings["layers"] == list(LAYERS) and set(found.findings["kept"]) == {"image", "prompt", "answer"}
    policy = apply(found.stack, found.plan).lamella_policy
    start = convert(stack, LAYERS, Routing(), 0).lamella_policy
    assert not torch.equal(policy.router, start.router)


def test_thresholds_go_from_all_to_few_tokens(tmp_path: Path) -> None:
    _, rows = seeing()
    found = made(tmp_path)
    series = thresholds(found.stack, found.plan, rows)
    shares = [point.scores["kept tokens"] for point in series.points[1:]]
    assert len(shares) > 3 and shares == sorted(shares, reverse=True) and 0 < shares[-1] < 0.6
    served = observe(apply(found.stack, series[len(series) - 1]), rows)
    assert float(served.ran.double().mean()) == pytest.approx(shares[-1])


def test_the_authors_thresholds_and_modes_are_there(tmp_path: Path) -> None:
    found = made(tmp_path, layers=None, select="sparse", served="constants")
    assert found.findings["layers"] == mode_layers("sparse", 4)
    assert found.findings["thresholds"] == {"prefill": 0.005, "decode": 0.5}


def test_ranks_say_what_they_may_be_compared_with() -> None:
    stack, rows = seeing()
    found = arank(stack, ImageText(rows[:4], rows.processing), fraction=0.5, protect=(0,), rank="effective")
    ranks = found["arank"]
    assert len(ranks["by_layer"]) == 4 and len(ranks["by_sample"]) == 4 and ranks["images"]
    assert ranks["rank"] == "effective" and ranks["dtype"] == "float32" and -1 <= ranks["agreement"] <= 1
    assert len(found["layers"]) == 2 and 0 not in found["layers"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    stack, rows = seeing()
    with pytest.raises(MethodError, match="all 4 layers are protected"):
        made(tmp_path, layers=None)
    with pytest.raises(MethodError, match="there is no layer 9"):
        made(tmp_path, layers=(9,))
    with pytest.raises(MethodError, match="a plan made by gamma-mod"):
        thresholds(stack, Plan(model=ModelReference.of(stack)), rows)
    text = Stack(nano("llama"))
    short = pairs([(torch.tensor([5, 6, 7]), torch.tensor([8, 9]))] * 2)
    with pytest.raises(MethodError, match="there is no layer 99"):
        arank(text, short, protect=(99,))
    silent = [{**row, "labels": torch.full_like(row["labels"], NO_LOSS)} for row in short]
    given = {"layers": (1,), "steps": 1, "work": lamella.Work(tmp_path)}
    with pytest.raises(MethodError, match="have no answers"):
        lamella.get_method("gamma-mod")(text, silent, **given)
