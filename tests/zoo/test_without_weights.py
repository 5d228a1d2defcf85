"""Models opened without their weights, some of which are loaded afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamella.errors import CheckpointError
from lamella.plan.filling import load_some
from lamella.zoo import open_model
from lamella.zoo.nano import nano


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_chosen_weights_are_loaded_and_the_others_stay_on_the_meta_device(family: str, tmp_path: Path) -> None:
    nano(family).save_pretrained(tmp_path)
    whole = open_model(tmp_path)
    opened = open_model(tmp_path, weights=False)
    assert all(each.is_meta for each in opened.model.parameters())
    assert opened.describe() == whole.describe()
    chosen = lambda name: ".1." in name or "norm" in name  # noqa: E731
    load_some(opened.model, tmp_path, chosen)
    for name, each in opened.model.named_parameters():
        assert each.is_meta != chosen(name), name
        assert each.is_meta or torch.equal(each, whole.model.get_parameter(name)), name
    load_some(opened.model, tmp_path, lambda name: True)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(opened.model(ids).logits, whole.model(ids).logits)


def test_tied_weights_are_loaded_together(tmp_path: Path) -> None:
    nano("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    opened = open_model(tmp_path, weights=False)
    load_some(opened.model, tmp_path, lambda name: "lm_head" in name)
    model = opened.model
    assert model.lm_head.weight is model.get_input_embeddings().weight and not model.lm_head.weight.is_meta


def test_a_folder_whose_tensors_have_other_names_is_opened_with_its_weights(tmp_path: Path) -> None:
    nano("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path)  # without the head, names lack a prefix
    opened = open_model(tmp_path, weights=False)
    assert not any(each.is_meta for each in opened.model.parameters())


def test_a_chosen_weight_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    nano("llama").save_pretrained(tmp_path / "whole")
    nano("llama", num_hidden_layers=2).save_pretrained(tmp_path / "short")
    opened = open_model(tmp_path / "whole", weights=False)
    with pytest.raises(CheckpointError, match="is missing"):
        load_some(opened.model, tmp_path / "short", lambda name: True)
