"""Methods side by side on one text: the same tokens, figures that anybody can measure again, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lamella.commands import compare as job
from lamella.commands.compare import figures, learners, rise
from lamella.data import Passages, load_text, windows
from lamella.data.context import InputContext
from lamella.errors import MethodError
from lamella.methods.lora import lora
from lamella.runner import run
from lamella.stack import Stack
from lamella.train.loop import Loop
from lamella.zoo import open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
SMALL: dict[str, Any] = {"method": ("lora", "layra"), "steps": 4, "batch": 2, "length": 32}


def compare(model: Any, new: str, out: Path | None = None, **given: Any) -> Any:
    """The evidence of a comparison."""
    return run("compare", model, new=new, out=out, **given).evidence


def test_all_methods_that_adapt_to_a_text_are_found_by_what_they_take() -> None:
    found = [each.slug for each in learners()]
    assert {"lora", "layra", "switchlora", "smora", "kore"} <= set(found)
    assert not {"cstrl", "lora-recycling", "continual-pretrain"} & set(found)


@pytest.mark.slow
def test_figures_are_those_of_a_model_that_was_trained_apart() -> None:
    evidence = compare(NANO_LLAMA, "stdlib", **SMALL | {"method": ("lora",)}, at=(1.0,))
    point = evidence.findings["points"]["lora"][0]
    stack, tokenizer = open_stack(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    samples = Passages.open("stdlib", InputContext(lambda: tokenizer), sequences=8, length=32)
    trained = lora(stack, samples, steps=4, batch=2).view
    new, old = (
        windows(tokenizer, load_text(name, "test"), count, 32) for name, count in (("stdlib", 16), ("pydoc", 8))
    )
    assert point["new"] == pytest.approx(loss(trained, new[8:]), abs=1e-5)
    assert point["choose"] == pytest.approx(loss(trained, new[:8]), abs=1e-5)
    rise = loss(trained, old, scored=8) - loss(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), old, scored=8)
    assert point["old"]["pydoc"]["rise"] == pytest.approx(rise, abs=1e-5)
    assert point["tokens"] == 4 * 2 * 32


@torch.no_grad()
def loss(model: Any, tokens: torch.Tensor, scored: int = 1) -> float:
    """The mean negative log-likelihood of all tokens from place ``scored`` on, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, scored - 1 : -1]
    return float(cross_entropy(logits.flatten(0, 1).double(), tokens[:, scored:].flatten()))


@pytest.mark.slow
def test_each_way_begins_at_the_original_and_every_method_sees_as_many_tokens(tmp_path: Path) -> None:
    evidence = compare(NANO_LLAMA, "stdlib", tmp_path / "out", **SMALL, at=(0.5, 1.0))
    points = evidence.findings["points"]
    assert {name: [each["tokens"] for each in run] for name, run in points.items()} == {
        name: [128, 256] for name in points
    }
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["findings"] == json.loads(
        json.dumps(evidence.findings)
    )
    assert "layra" in (tmp_path / "out" / "report.html").read_text()
    (drawn,) = figures(evidence)
    before = (evidence.findings["before"]["new"], 0.0)
    ways = {
        name: [before, *((point["new"], rise(point)) for point in run)]
        for name, run in evidence.findings["points"].items()
    }
    assert len(ways) == 2 and drawn.series == ways
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_all_methods_read_as_many_tokens_as_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where batches are trained on, with a model that is wide enough for the ranks of all methods."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NANO_LLAMA, **shape)).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(NANO_LLAMA).save_pretrained(tmp_path / "wide")
    read: list[int] = []
    step = Loop.training_step

    def counted(loop: Any, model: Any, inputs: Any, *given: Any) -> Any:
        read.append(inputs["input_ids"].numel())
        return step(loop, model, inputs, *given)

    monkeypatch.setattr(Loop, "training_step", counted)
    for entry in learners():
        read.clear()
        given = SMALL | {"method": (entry.slug,), "steps": 2, "length": 16}
        [point] = compare(tmp_path / "wide", "stdlib", **given, at=(1.0,)).findings["points"][entry.slug]
        assert sum(read) == point["tokens"] == 2 * 2 * 16, entry.slug


@pytest.mark.exhaustive
def test_of_several_rates_the_one_is_shown_that_is_best_on_text_that_is_not_reported() -> None:
    tried = {"method": ("lora",), "at": (1.0,)}
    runs = {rate: compare(NANO_LLAMA, "stdlib", **SMALL | tried, lr=(rate,)) for rate in (1e-5, 1e-2)}
    ends = {rate: run.findings["points"]["lora"][0]["choose"] for rate, run in runs.items()}
    both = compare(NANO_LLAMA, "stdlib", **SMALL | tried, lr=(1e-5, 1e-2)).findings["points"]["lora"][0]
    assert both["lr"] == min(ends, key=lambda rate: ends[rate])
    assert both["choose"] == min(ends.values())


@pytest.mark.slow
def test_a_stopped_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(NANO_LLAMA, "stdlib", tmp_path / "whole", **SMALL, at=(1.0,))
    ran: list[str] = []
    run = job.Bench.run

    def counted(bench: Any, entry: Any, *given: Any) -> Any:
        if len(ran) == 1 and entry.slug == "layra":
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(entry.slug)
        return run(bench, entry, *given)

    monkeypatch.setattr(job.Bench, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(NANO_LLAMA, "stdlib", tmp_path / "out", **SMALL, at=(1.0,))
    again = compare(NANO_LLAMA, "stdlib", tmp_path / "out", **SMALL, at=(1.0,))
    assert ran == ["lora", "stopped", "layra"]
    assert again.findings == whole.findings


def test_the_command_prints_the_table(lamella: Any) -> None:
    done = lamella("compare", NANO_LLAMA, "--new", "stdlib", "--method", "lora", "--steps", "1", "--batch", "2",
                   "--length", "32")  # fmt: skip
    assert done.code == 0, done.err
    assert "increase on" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": ("finercut",)}, "does not learn from a text"),
        ({"steps": 0}, ">= 1"),
        ({"at": (2.0,)}, "<= 1"),
        ({"at": ()}, "at least 1 long"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said) as refused:
        compare(NANO_LLAMA, "stdlib", **SMALL | given)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_method_that_refuses_the_model_is_left_out_unless_it_was_named() -> None:
    wide = {"steps": 1, "batch": 2, "length": 32, "at": (1.0,)}
    evidence = compare(NANO_LLAMA, "stdlib", **wide)  # 64 ranks, and the rank that matches a LoRA of 128, are too many
    assert {"lora", "layra", "switchlora"} <= evidence.findings["points"].keys()
    assert [note.split()[0] for note in evidence.notes if "is skipped" in note] == ["kore", "smora"]
    with pytest.raises(MethodError, match="r 64 exceeds"):
        compare(NANO_LLAMA, "stdlib", method=("smora",), **wide)


@pytest.mark.slow
def test_the_model_is_not_changed() -> None:
    stack = Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), NANO_LLAMA)
    before = {name: each.clone() for name, each in stack.model.state_dict().items()}
    compare(stack, "stdlib", **SMALL, at=(1.0,))
    assert all(torch.equal(before[name], each) for name, each in stack.model.state_dict().items())
