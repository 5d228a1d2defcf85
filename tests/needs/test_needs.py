"""What a command needs: counts are those by hand, known values stay known, and nothing is loaded or changed."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import relu
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from lamella.errors import MethodError
from lamella.needs import current_recorder, extrapolate, has_values, now, recording, without_values
from lamella.runner import needs_of, run
from lamella.stack import share
from lamella.train import TrainConfig, add_lora, blocks, response_loss
from lamella.train.fit import Task, fit
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
ROWS, WIDTH, HIDDEN = 8, 64, 256


class Mlp(nn.Module):
    """Two products whose memory is easily counted."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(relu(self.up(x)))


def test_memory_and_arithmetic_are_those_counted_by_hand() -> None:
    model = Mlp()
    with recording() as needs:
        empty = without_values(model)
        current_recorder().open(empty)  # type: ignore[union-attr]
        out = empty(torch.ones(ROWS, WIDTH))
        assert not has_values(out) and out.shape == (ROWS, WIDTH)
    weights = 4 * 2 * WIDTH * HIDDEN
    assert needs.weights == weights
    (stage,) = needs.stages.values()
    assert stage.multiplications == 2 * ROWS * WIDTH * HIDDEN
    given, inner = 4 * ROWS * WIDTH, 4 * ROWS * HIDDEN
    assert needs.peak == weights + given + 2 * inner  # the product and what relu makes of it; then one of them is freed
    assert all(map(has_values, model.parameters()))


def test_a_module_that_was_seen_is_replayed_with_the_same_needs() -> None:
    model = nano("llama")
    tokens = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))

    def needs(observed: bool) -> Any:
        with recording() as found:
            empty = without_values(model)
            if observed:  # a hook inside, whose calls must not be left out
                calls: list[int] = []
                for layer in empty.model.layers:
                    layer.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
            for _ in range(3):
                empty(input_ids=tokens, use_cache=False)
            if observed:
                assert len(calls) == 3 * len(empty.model.layers)
        return found

    one, other = needs(False), needs(True)
    assert one.stages["the rest"].multiplications == other.stages["the rest"].multiplications
    assert one.peak == other.peak


def test_values_that_are_known_select_exactly_and_others_everything() -> None:
    with recording(), torch.no_grad():
        empty = without_values(nn.Linear(4, 6))
        states = empty(torch.ones(5, 4))
        assert states[torch.tensor([True, False, True, False, False])].shape == (2, 6)
        assert states[states.mean(-1) > 0].shape == (5, 6)
        assert float(states.sum()) == 1.0 and states.tolist()[0] == [1.0] * 6
        counted = torch.zeros(6)
        counted += states.sum(0)  # into a tensor with values, which keeps them
        assert torch.bincount(states.argmax(-1), minlength=6).shape == (6,)


def test_a_large_tensor_is_not_created() -> None:
    with recording() as needs:
        pool = torch.rand(1 << 12, 1 << 26, generator=torch.Generator().manual_seed(0))  # a terabyte
        assert not has_values(pool) and has_values(torch.zeros(4))
        assert float(pool[:, :4].sum()) == 1.0
    assert needs.peak >= 4 << 38


def test_rounds_that_are_left_out_count_and_time_is_predicted() -> None:
    assert list(extrapolate(range(4))) == [0, 1, 2, 3]
    with recording() as needs:
        empty, begin = without_values(nn.Linear(32, 32, bias=False)), now()
        kept = [number for number in extrapolate(range(10), keep=2) if len(empty(torch.ones(1, 32)))]
        assert kept == [0, 1] and now() - begin == pytest.approx(needs.seconds, rel=0.2)
    assert needs.stages["the rest"].multiplications == 10 * 32 * 32


def test_training_is_recorded_with_gradients_and_optimizer_and_changes_nothing(tmp_path: Path) -> None:
    model = nano("llama")
    before = copy.deepcopy(model.state_dict())
    samples = blocks(torch.randint(3, 100, (8, 16)), loss_on="all")
    config = TrainConfig(steps=50, lr=1e-3, batch=2, accumulate=2)
    with recording() as needs:
        log = fit(without_values(model), samples, Task(response_loss), config, out=tmp_path / "one")
        count = needs.stages["training"].multiplications
        fit(without_values(model), samples, Task(response_loss), config.with_steps(0), out=tmp_path / "two")
    assert log.train[-1].step == 50
    assert needs.stages["training"].multiplications == pytest.approx(2 * count)
    parameters = sum(each.numel() for each in model.parameters())
    layers = sum(each.numel() for name, each in model.named_parameters() if "proj" in name or "lm_head" in name)
    assert count == pytest.approx(50 * 2 * 3 * 2 * 16 * layers, rel=0.1)  # a backward pass has two products for one
    assert needs.peak > 4 * 4 * parameters  # weights, gradients and two moments
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_generation_counts_every_token(tmp_path: Path) -> None:
    model, prompt = nano("llama"), torch.zeros(2, 8, dtype=torch.long)
    counts = []
    for tokens in (1, 21):
        with recording() as needs:
            ids = without_values(model).generate(prompt, max_new_tokens=tokens)
        assert ids.shape == (2, 8 + tokens)
        counts.append(needs.stages["the rest"].multiplications)
    layers = sum(each.numel() for name, each in model.named_parameters() if "proj" in name or "lm_head" in name)
    assert counts[1] - counts[0] == pytest.approx(20 * 2 * layers, rel=0.1)


def test_a_command_is_estimated_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.zoo.opening.pretrained", lambda *_: pytest.fail("weights are loaded"))
    needs = needs_of("lora", NANO_LLAMA, train="pydoc", steps=3, length=32, sequences=4)
    parameters = sum(each.numel() for each in nano_llama().parameters())
    assert 4 * parameters <= needs.weights <= 4.1 * parameters and not needs.cut
    assert {"training", "fidelity"} <= set(needs.stages)
    summary = needs.summary()
    assert "GB of memory" in summary.verdict and any(row[0] == "training" for row in summary.tables[0].rows)


def test_weights_are_compared_only_where_there_are_any(tmp_path: Path) -> None:
    stack = lamella.open(NANO_LLAMA)
    add_lora(share(stack.model), sites=["layers.0"], seed=1).adapter().write_into(tmp_path)
    given = {"sequences": 4, "held_out_sequences": 4, "length": 16}
    needs = needs_of(
        "layra", NANO_LLAMA, NANO_LLAMA, tmp_path, command="equip", judged={"a": "pydoc"}, out=tmp_path / "out", **given
    )
    assert not needs.cut and needs.stages["the rest"].multiplications > 0


def test_a_schedule_of_random_paths_is_estimated(tmp_path: Path) -> None:
    given = {"train": "pydoc", "stages": 3, "steps": 3, "sequences": 8, "length": 16, "out": tmp_path / "out"}
    needs = needs_of("skippipe", NANO_LLAMA, command="train", **given)
    assert not needs.cut and needs.stages["training"].multiplications > 0


def nano_llama() -> Any:
    return LlamaForCausalLM.from_pretrained(NANO_LLAMA)


def test_more_of_everything_needs_more() -> None:
    def needs(**options: Any) -> Any:
        return needs_of("lora", NANO_LLAMA, train="pydoc", **{"steps": 4, "length": 32, "sequences": 8} | options)

    usual = needs()
    assert needs(steps=40).seconds > 3 * usual.stages["training"].seconds
    assert needs(length=96).peak > usual.peak and needs(r=64).peak > usual.peak


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig.from_pretrained(NANO_LLAMA)).save_pretrained(folder)
    for file in NANO_LLAMA.glob("tokenizer*"):
        shutil.copy(file, folder)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr("lamella.runner.free_memory", lambda: size + 1)
    monkeypatch.setattr("lamella.needs.recorder.free_memory", lambda: size + 1)
    with pytest.raises(MethodError, match=r"lora needs about .* are free: use --dtype bfloat16, or try .*--batch"):
        run("lora", folder, train="pydoc", steps=3, length=32, sequences=4)
    with monkeypatch.context() as several:  # which share the work, so that the estimate of one says nothing
        several.setattr("lamella.processes.count", lambda: 2)
        assert run("shortgpt", folder, sequences=2, length=16).result.points
    monkeypatch.setattr("lamella.runner.free_memory", lambda: 3 * size)
    monkeypatch.setattr("lamella.needs.recorder.free_memory", lambda: 3 * size)
    assert run("shortgpt", folder, sequences=2, length=16).result.points
    shown = capsys.readouterr().err  # what a large model needs is shown as the run starts
    assert re.search(r"shortgpt: [\d.]+ GB of memory", shown)


def test_an_option_that_is_wrong_is_refused_and_not_estimated() -> None:
    with pytest.raises(MethodError, match="no option 'minutes'"):
        needs_of("heal", NANO_LLAMA, minutes=2.0, sequences=4, length=16)


@pytest.mark.slow
def test_the_command_line_shows_it_and_writes_nothing(lamella: Any, tmp_path: Path) -> None:
    done = lamella("run", "lora", NANO_LLAMA, "--steps", 3, "-o", tmp_path / "out", "--estimate")
    assert done.code == 0 and "GB of memory" in done.out and "training" in done.out
    assert not list(tmp_path.iterdir())
