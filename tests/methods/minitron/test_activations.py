"""Activation importance: the formulas of the paper, computed again from whole activations in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lamella.errors import ArchitectureError, CheckpointError, NumericsError
from lamella.methods.minitron import Importance, activation_importance
from lamella.stack import Stack, share
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
NAMES = ["llama", "qwen3", "gpt2"]
NORMS = {"gpt2": ("ln_1", "ln_2")}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def seen(stack: Stack, rows: list[torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """What each module sees of each row, whole: [tokens, units]."""
    model = share(stack.model)
    layers = Stack(model).layers
    found: dict[str, np.ndarray] = {}
    for number, layer in enumerate(layers):
        for kind, path in (("mlp", stack.architecture["mlp"].out), ("attn", stack.architecture["attn"].out)):
            layer.get_submodule(path).register_forward_pre_hook(
                lambda module, args, key=(number, kind): found.update({key: args[0][0].double().numpy()})
            )
        for norm in NORMS.get(stack.architecture.name, ("input_layernorm", "post_attention_layernorm")):
            layer.get_submodule(norm).register_forward_hook(
                lambda module, args, out, key=(number, norm): found.update({key: out[0].double().numpy()})
            )
    kept = []
    for row in rows:
        model(row[None])
        kept.append(dict(found))
    return kept


def aggregated(rows: list[np.ndarray], batch_agg: str, seq_agg: str) -> np.ndarray:
    over_tokens = {
        "mean": lambda a: np.abs(a).mean(0),
        "l2": lambda a: np.sqrt((a**2).sum(0)),
        "var": lambda a: ((a - a.mean(0)) ** 2).mean(0),
    }[seq_agg]
    values = np.stack([over_tokens(row) for row in rows])
    if batch_agg == "var":
        return ((values - values.mean(0)) ** 2).mean(0)
    return np.abs(values).mean(0) if batch_agg == "mean" else np.sqrt((values**2).sum(0))


@pytest.mark.parametrize("seq_agg", ["mean", "l2", "var"])
@pytest.mark.parametrize("batch_agg", ["l2", "mean", "var"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_formulas_over_whole_activations(name: str, batch_agg: str, seq_agg: str) -> None:
    stack = Stack(nano(name))
    found = activation_importance(stack, IDS, batch_agg=batch_agg, seq_agg=seq_agg)
    rows = seen(stack, list(IDS))
    norms = [key for key in rows[0] if key[1] not in ("mlp", "attn")]
    stream = sum(aggregated([row[key] for row in rows], batch_agg, seq_agg) for key in norms)
    np.testing.assert_allclose(found.hidden.values, stream, rtol=1e-4, atol=1e-7)
    for layer in range(4):
        channels = aggregated([row[layer, "mlp"] for row in rows], batch_agg, seq_agg)
        np.testing.assert_allclose(found.channels.values[layer], channels, rtol=1e-4, atol=1e-7)
        norms_of_heads = [np.linalg.norm(row[layer, "attn"].reshape(11, 4, 8), axis=-1) for row in rows]
        heads = aggregated(norms_of_heads, batch_agg, seq_agg)
        np.testing.assert_allclose(found.heads.values[layer], heads, rtol=1e-4, atol=1e-7)
    assert len(norms) == 8 and found.hidden.values.shape == (32,) and found.heads.dims == ("layer", "head")


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_count(name: str) -> None:
    stack = Stack(nano(name))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[2, :1] = 0
    padded = activation_importance(stack, {"input_ids": IDS, "attention_mask": mask})
    alone = [activation_importance(stack, IDS[row : row + 1, start:]) for row, start in ((0, 4), (1, 0), (2, 1))]
    for axis in ("channels", "heads"):
        expected = np.sqrt(sum(getattr(each, axis).values ** 2 for each in alone))
        np.testing.assert_allclose(getattr(padded, axis).values, expected, rtol=1e-4)


def test_half_precision_models_are_reduced_in_float32() -> None:
    model = nano("llama").to(torch.bfloat16)
    rows = seen(Stack(model), list(IDS))
    found = activation_importance(Stack(model), IDS)
    expected = aggregated([row[0, "mlp"] for row in rows], "l2", "mean")
    np.testing.assert_allclose(found.channels.values[0], expected, rtol=1e-5)


def test_scores_survive_a_file(tmp_path: Path) -> None:
    found = activation_importance(Stack(nano("llama")), IDS)
    found.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    for axis in ("channels", "heads", "hidden"):
        assert np.array_equal(getattr(again, axis).values, getattr(found, axis).values)
        assert getattr(again, axis).provenance == getattr(found, axis).provenance
    (tmp_path / "other").write_text("x")
    for file in ("other", "missing"):
        with pytest.raises(CheckpointError, match="holds no importance scores"):
            Importance.load(tmp_path / file)


def test_what_cannot_be_scored_is_refused_in_one_line() -> None:
    with pytest.raises(ArchitectureError, match="cannot score gemma3_text models, whose widths are unknown"):
        activation_importance(Stack(nano("gemma3_text")), IDS)
    broken = nano("llama")
    broken.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"at layers\.2\.mlp\.channels"):
        activation_importance(Stack(broken), IDS)
