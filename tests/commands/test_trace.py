"""The trace of a prompt: over a picture, and of models that predict masked tokens, pass by pass."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamella.commands.trace.report import png, render_trace
from lamella.commands.trace.tracing import trace_answer as trace
from lamella.data import MARK, Processing
from lamella.errors import PlanError
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.stack import open_model
from lamella.zoo import open_stack
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

ONE = examples(["colour"], 1, "test")[0]
LAYERS, IMAGE = 4, 64


def asked(kind: str, pixels: int | None = None) -> tuple[Any, Processing, dict[str, Any]]:
    model, processor = shapes_vlm(kind, num_hidden_layers=LAYERS)
    processing = Processing(processor)
    picture = ONE.image if pixels is None else ONE.image[:pixels]
    stack = open_stack(open_model(model), stack="text")
    return stack, processing, processing.question(ONE.prompt, [picture])


def planned(stack: Any, name: str, **params: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name=name, params=params)})


def test_what_ran_over_a_picture() -> None:
    stack, processing, inputs = asked("llava")
    plan = planned(stack, "gamma-mod", layers=[1, 2], prefill=0.5)
    grid = processing.grid(inputs)
    assert grid == (8, 8)
    report = trace(stack, processing.tokenizer, inputs, plan, tokens=3, grid=grid)
    image = (inputs["input_ids"][0] == stack.model.config.image_token_id).nonzero()[:, 0].tolist()
    assert report["image_grid"] == {"rows": 8, "columns": 8, "cells": image} and len(image) == IMAGE
    assert [token["phase"] for token in report["tokens"]].count("image") == IMAGE
    probability = np.array(report["notes"]["p"], dtype=float)[image]
    ran = np.array(report["attn"])[image]
    assert ran[:, [0, 3]].all() and np.array_equal(ran[:, [1, 2]], probability[:, [1, 2]] > 0.5)
    assert report["usage"]["image"] == pytest.approx(ran.mean()) and 0.5 < ran.mean() < 1


def test_the_page_draws_it(tmp_path: Path) -> None:
    stack, processing, inputs = asked("llava")
    plan = planned(stack, "gamma-mod", layers=[1], prefill=0.5)
    report = trace(stack, processing.tokenizer, inputs, plan, tokens=2, grid=(8, 8))
    report["image"] = png(processing.visible(ONE.image))
    html = render_trace(report)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    ran, probability, odds = data["image_grid"]["views"]
    assert [each["name"] for each in (ran, probability, odds)] == ["layers that ran", "p", "odds"]
    assert [frame["label"] for frame in ran["frames"]] == ["all layers", *(f"layer {n}" for n in range(LAYERS))]
    of_layer = [float(report["attn"][cell][1]) for cell in report["image_grid"]["cells"]]
    assert ran["frames"][2]["values"] == of_layer
    assert ran["frames"][0]["values"] == [(LAYERS - 1 + one) / LAYERS for one in of_layer]
    drawn = data["plots"]["image_grid"]
    assert (
        drawn["layout"]["images"][0]["source"].startswith("data:image/png;base64,") and 'id="plot-image_grid"' in html
    )
    assert [value for row in drawn["data"][0]["z"] for value in row] == ran["frames"][0]["values"]
    del report["image"]
    assert 'id="plot-image_grid"' not in render_trace(report)


def test_where_all_layers_ran_the_page_shows_what_else_tells_tokens_apart() -> None:
    stack, processing, inputs = asked("qwen3_vl_moe")
    even = [1 / LAYERS] * LAYERS
    params = {"alpha": {"text": even, "image": even}, "tau": {"text": 0.0, "image": 1.0}}
    report = trace(stack, processing.tokenizer, inputs, planned(stack, "modes", **params), tokens=2, grid=(8, 8))
    assert set(report["usage"].values()) == {1}
    html = render_trace(report | {"image": png(ONE.image)})
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    assert [each["name"] for each in data["image_grid"]["views"]] == ["experts", "layers that ran"]
    (cells,) = data["plots"]["trace"]["data"]
    assert cells["colorbar"]["title"]["text"] == "experts"
    assert cells["z"] == [list(row) for row in zip(*report["notes"]["experts"], strict=True)]
    heading = re.search("<h1>(.*?)</h1>", html)[1]
    assert "experts in a layer: 4.00 on the first token, 0 on the image, 4.00 on the prompt" in heading
    assert "tau: 0 of text and 1.00 of image" in html


def test_a_model_of_masked_tokens_pass_by_pass() -> None:
    stack, processing, inputs = asked("llava_llada")
    plan = planned(stack, "dmllm-token-redundancy", drops=[[0.5, 0.25]], criterion="divprune")
    report = trace(stack, processing.tokenizer, inputs, plan, tokens=8, steps=4, grid=(8, 8))
    assert [each["step"] for each in report["passes"]] == [0, 1, 2, 3]
    assert [token["step"] for token in report["tokens"] if token["phase"] != "answer"].count(None) == len(
        inputs["input_ids"][0]
    )
    committed = [token["step"] for token in report["tokens"] if token["phase"] == "answer"]
    assert sorted(committed) == [0, 0, 1, 1, 2, 2, 3, 3]
    cells = report["image_grid"]["cells"]
    shares = [np.mean([each["by_token"][cell] for cell in cells]) for each in report["passes"]]
    assert shares == [1, 1, 0.25, 0.25]
    others = len(report["tokens"]) - IMAGE
    assert report["passes"][2]["by_layer"] == pytest.approx([(others + IMAGE / 4) / (others + IMAGE)] * LAYERS)
    html = render_trace(report | {"image": png(ONE.image)})
    assert all(f'id="plot-{name}"' in html for name in ("image_grid", "layers", "tokens"))
    with pytest.raises(PlanError, match="predicts masked tokens"):
        trace(stack, processing.tokenizer, inputs)


def test_how_the_tokens_of_a_picture_lie_over_it() -> None:
    _, processing, inputs = asked("qwen2_vl", pixels=ONE.image.shape[0] // 2)
    rows, columns = processing.grid(inputs)
    assert columns == 2 * rows and rows * columns == int(
        (inputs["input_ids"] == processing.processor.image_token_id).sum()
    )
    _, processing, inputs = asked("idefics3")
    assert processing.grid(inputs) is not None
    tiled = inputs | {"pixel_values": torch.cat([inputs["pixel_values"]] * 2, dim=1)}
    assert processing.grid(tiled) is None


def test_what_of_a_picture_a_model_sees() -> None:
    processing = asked("llava")[1]
    wide = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    crops = getattr(processing.processor.image_processor, "do_center_crop", False)
    assert np.array_equal(processing.visible(wide), wide[:, 2:6] if crops else wide)
    assert MARK not in processing.tokenizer.decode(processing.question("where is it?")["input_ids"][0])
