"""Feed-forward sublayers rewritten as narrow sub-blocks: what is fitted is what runs, trains, and is read back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.hourglass_mlp import hourglass_mlp, sensitivity
from lamella.methods.hourglass_mlp.method import FITTING
from lamella.methods.hourglass_mlp.network import ffn_size
from lamella.methods.hourglass_mlp.recipe import heal
from lamella.plan import ModelReference, Plan, modules_of
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks
from lamella.zoo import open_stack
from lamella.zoo.nano import nano, nano_inputs

TOKENS: Any = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
CONFIG = replace(FITTING, steps=8, batch=16, eval_every=4)


def rewritten(stack: Stack, work: Path, **options: Any) -> Any:
    return hourglass_mlp(stack, TOKENS, config=CONFIG, work=Work(work), **options)


def test_the_view_computes_the_fitted_sub_blocks_and_nothing_of_the_old_sublayer(tmp_path: Path) -> None:
    stack, given = Stack(nano("llama")), nano_inputs("llama")
    done = rewritten(stack, tmp_path, layers=(1,), blocks=2)
    view = lamella.apply(stack, done.plan)
    [network] = modules_of(view, stack).values()
    context = stack.context(given)
    with torch.no_grad():
        h = stack.run(context.h, 0, (1, "mlp"), context)
        for block in network.ffn.blocks:  # type: ignore[union-attr]
            normed = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * block.norm.weight
            gate = normed @ block.gate.weight.T
            h = h + (gate * gate.sigmoid() * (normed @ block.up.weight.T)) @ block.down.weight.T
        expected = stack.head(stack.run(h, 2, len(stack), context))
        found = view(**given, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_its_own_export_opens_without_a_word_on_its_weights(tmp_path: Path) -> None:
    nano("llama").save_pretrained(tmp_path / "source")
    stack, given = open_stack(tmp_path / "source", device="cpu"), nano_inputs("llama")
    done = rewritten(stack, tmp_path / "work", layers=(1,), blocks=2)
    done.save(tmp_path / "out", dict)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2  # the model's, and those of the plan
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        view = lamella.load(tmp_path / "out", device="cpu").model
    assert torch.equal(view(**given).logits, lamella.apply(stack, done.plan)(**given).logits)


def test_sub_blocks_have_the_parameters_that_were_asked_for(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    maps = sum(each.numel() for each in stack.layers[1].mlp.parameters())
    for share in (1.0, 0.5):
        done = rewritten(stack, tmp_path / str(share), layers=(1,), blocks=2, share=share)
        [result] = done.findings["sublayers"]
        inner, norms = result["inner"], 2 * 32
        assert result["before"] == maps + 32 and result["parameters"] == ffn_size(32, inner)
        assert ffn_size(32, inner) - norms <= share * maps < ffn_size(32, [each + 1 for each in inner]) - norms
        [network] = modules_of(lamella.apply(stack, done.plan), stack).values()
        assert sum(each.numel() for each in network.parameters()) == result["parameters"]
        assert result["rows"] == round(0.9 * TOKENS.numel())


def test_left_to_itself_it_takes_the_sublayers_that_are_missed_least(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    missed = sensitivity(stack, TOKENS)
    least = sorted(missed, key=lambda position: missed[position])[:2]
    plan = rewritten(stack, tmp_path, count=2, blocks=2).plan
    assert sorted(plan.modules) == sorted(f"layers.{each.layer}.mlp" for each in least)
    base = torch.softmax(stack.model(TOKENS).logits.detach(), -1)
    without = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=[f"layers.{least[0].layer}.mlp"]))
    other = torch.softmax(without(TOKENS).logits.detach(), -1)
    mixed = (base + other) / 2
    divergence = 0.5 * sum((each * (each / mixed).log()).sum(-1).mean() for each in (base, other))
    assert missed[least[0]] == pytest.approx(float(divergence), rel=1e-3)


def test_a_longer_fit_explains_more_and_brings_the_model_nearer_to_itself(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    with torch.no_grad():
        stack.layers[1].mlp.down_proj.weight *= 8  # so that there is something to miss
    original = stack.model(TOKENS).logits
    found = []
    for steps in (1, 200):
        config = replace(CONFIG, steps=steps, lr=5e-3)
        done = hourglass_mlp(stack, TOKENS, layers=(1,), blocks=2, config=config, work=Work(tmp_path / str(steps)))
        explained = done.findings["sublayers"][0]["explained"]["held_out"]
        found.append((explained, float((lamella.apply(stack, done.plan)(TOKENS).logits - original).detach().norm())))
    (early, far), (late, near) = found
    assert late > early + 0.1 and near < far


def test_healing_trains_the_sub_blocks_and_the_rest_and_leaves_the_original_alone(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    before = {name: each.clone() for name, each in stack.model.named_parameters()}
    plan = rewritten(stack, tmp_path / "fitted", layers=(2,), blocks=2).plan
    samples = blocks(TOKENS, loss_on="all")
    config = TrainConfig(steps=4, lr=1e-2, batch=2)
    healed = heal(stack, plan, samples, config=config, work=Work(tmp_path / "healed"))  # type: ignore[arg-type]
    assert all(torch.equal(each, before[name]) for name, each in stack.model.named_parameters())
    [(site, reference)], [old] = healed.plan.modules.items(), plan.modules.values()
    assert site == "layers.2.mlp" and reference.params == old.params and reference.sha256 != old.sha256
    assert not torch.equal(healed.stack.layers[0].mlp.down_proj.weight, stack.layers[0].mlp.down_proj.weight)
    assert torch.equal(healed.stack.unembedding.weight, stack.unembedding.weight)
    (tmp_path / "there").mkdir()
    healed.plan.write(tmp_path / "there" / "plan.json")
    again = Plan.read(tmp_path / "there" / "plan.json")
    views = [lamella.apply(healed.stack, each) for each in (healed.plan, again)]
    first, second = (view(TOKENS).logits for view in views)
    assert torch.equal(first, second)
    assert healed.log.train[-1].loss < healed.log.train[0].loss or len(healed.log.train) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (9,)}, r"layers 9: layers must be different and between 0 and 3"),
        ({"layers": (1, 1)}, "layers must be different"),
        ({"count": 5}, "count 5: .* has 4 layers"),
        ({"layers": (1,), "blocks": 4, "share": 0.01}, "fewer than the 384 of the smallest shape"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_in_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=said) as error:
        rewritten(Stack(nano("llama")), tmp_path, **options)
    assert "\n" not in str(error.value)
