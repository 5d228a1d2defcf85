"""Rotary positions with the names of transformers 4, in addition to those of transformers 5, which still reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamella
from lamella.plan import ModelReference, PhasedPath, Plan, apply_static
from lamella.plan.export import export, export_out_of_core
from lamella.plan.rotary import with_older_names
from lamella.stack import Stack
from lamella.zoo.nano import nano
from lamella.zoo.small import small

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
BASE = {"rope_type": "default", "rope_theta": 500_000.0}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALED = SCALING | {"rope_theta": 500_000.0}
CUTS = {
    "plain": ["layers.1"],
    "portable": ["layers.1.attn", "layers.2.mlp"],
    "native": ["layers.1.attn", "layers.2.mlp"],
    "out of core": ["layers.1"],
}


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def exported(stack: Stack, plan: Plan, out: Path, form: str) -> Path:
    if form != "out of core":
        return export(stack, plan, out, form=form)
    stack.model.save_pretrained(out.parent / "whole")
    return export_out_of_core(out.parent / "whole", plan, out)


@pytest.mark.parametrize("form", CUTS)
@pytest.mark.parametrize("rope", [BASE, SCALED], ids=["base", "llama3"])
def test_every_form_says_base_and_scaling_in_both_spellings(rope: dict[str, Any], form: str, tmp_path: Path) -> None:
    stack = Stack(nano("llama", rope_parameters=rope))
    plan = Plan(model=ModelReference.of(stack), drop=CUTS[form])
    settings = written(out := exported(stack, plan, tmp_path / "out", form))
    assert settings["rope_parameters"] == rope and settings["rope_theta"] == 500_000.0
    assert settings.get("rope_scaling") == (SCALING if rope is SCALED else None)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=form == "native").eval()
    assert model.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, apply_static(stack, plan)(input_ids=IDS).logits)


def test_a_plan_with_the_whole_model_includes_them_too(tmp_path: Path) -> None:
    stack = Stack(nano("llama", rope_parameters=SCALED))
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    plan = Plan(model=ModelReference.of(stack), path=path)
    settings = written(export(stack, plan, tmp_path / "out", form="native"))
    assert (settings["rope_theta"], settings["rope_scaling"]) == (500_000.0, SCALING)
    assert lamella.load(tmp_path / "out").model.config.rope_parameters == SCALED


FULL, SLIDING = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 2e4}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "rope", "older"),
    [
        ("gemma3_text", {"full_attention": FULL, "sliding_attention": SLIDING},
         {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"full_attention": FULL, "sliding_attention": FULL}, {}),
        ("olmo3", {"full_attention": FULL, "sliding_attention": SLIDING | {"rope_theta": 1e6}},
         {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("olmo3", {"full_attention": FULL, "sliding_attention": SLIDING}, {}),
        ("gpt_neox", {**BASE, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 500_000.0, "rotary_pct": 0.5}),
        ("stablelm", {**BASE, "partial_rotary_factor": 0.5}, {"rope_theta": 500_000.0, "partial_rotary_factor": 0.5}),
        ("phi3", {**LONG, "rope_theta": 500_000.0}, {"rope_theta": 500_000.0, "rope_scaling": LONG}),
    ],
    ids=["gemma 3", "gemma 3, both scaled", "olmo 3", "olmo 3, two bases", "gpt-neox", "stablelm", "phi 3"],
)  # fmt: skip
def test_types_with_names_of_their_own_are_spelled_by_them_or_not_at_all(
    model_type: str, rope: dict[str, Any], older: dict[str, Any]
) -> None:
    config = small(model_type).config
    config = type(config).from_dict(config.to_dict() | {"rope_parameters": copy.deepcopy(rope)})
    plain = config.to_dict()
    settings = with_older_names(plain, config)
    assert {name: value for name, value in settings.items() if name not in plain} == older
    ours, theirs = (type(config).from_dict(copy.deepcopy(each)).to_dict() for each in (plain, settings))
    assert ours == theirs


def test_what_a_config_says_already_stays_and_one_without_positions_gets_none() -> None:
    config = nano("llama", rope_parameters=BASE).config
    assert with_older_names(config.to_dict() | {"rope_theta": 7.0}, config)["rope_theta"] == 7.0
    config = nano("gpt2").config
    assert with_older_names(config.to_dict(), config) == config.to_dict()


def test_the_text_of_a_model_with_images_is_spelled_in_its_own_part() -> None:
    config = nano("llava").config
    settings = with_older_names(config.to_dict(), config)
    assert settings["text_config"]["rope_theta"] == config.text_config.rope_parameters["rope_theta"]
    assert "rope_theta" not in settings
