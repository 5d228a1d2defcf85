"""The overview of a model: its parts add up, and what it says of each means is what an independent measurement says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lamella
from lamella.commands.overview import parts_of
from lamella.evaluate import step_times
from lamella.methods.shortgpt import shortgpt
from lamella.methods.window import angular_window
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_parts_are_all_weights_each_once(name: str) -> None:
    stack = Stack(nano(name))
    found = parts_of(stack)
    assert sum(found.values()) == sum(each.nbytes for each in stack.model.parameters())
    heads = {id(each): each for each in (stack.model.get_input_embeddings().weight, stack.model.lm_head.weight)}
    assert found["embedding and head"] >= sum(each.nbytes for each in heads.values())
    assert found["attention"] > 0 and found["MLP"] > 0


def test_a_cut_is_the_better_of_two_and_its_loss_that_of_both_whole_models() -> None:
    result = lamella.run("overview", NANO_LLAMA, fractions=(0.34,), sequences=2, length=64)
    found = result.evidence.findings
    (cut,) = [each for each in found["savings"] if each["name"] == "2 layers of 6"]
    stack, tokenizer = lamella.open(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 2, 64, 0)
    test = lamella.windows(tokenizer, lamella.load_text("stdlib", "test"), 8, 256, 0)

    @torch.no_grad()
    def loss(planner: object) -> float:
        plan = planner(stack, calibration).removing(4)  # type: ignore[operator]
        ours, theirs = (
            model(test).logits[:, 63:-1].double().log_softmax(-1) for model in (stack.model, lamella.apply(stack, plan))
        )
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())

    assert cut["kl"]["mean"] == pytest.approx(min(loss(shortgpt), loss(angular_window)), rel=0.02)
    times = step_times(stack)
    assert cut["speedup"] == pytest.approx(
        (6 * (times.attn + times.mlp) + times.rest) / (4 * (times.attn + times.mlp) + times.rest), rel=0.5
    )
    whole = sum(each.nbytes for each in stack.model.parameters())
    layers = sum(each.nbytes for each in stack.layers[0].parameters())
    assert cut["bytes"] == whole - 2 * layers == found["savings"][0]["bytes"] - 2 * layers
