"""Training one slice at a time: what moves, what does not, and how it goes on."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lamella.errors import TrainingError
from lamella.methods.irepair import BestSlices, Choices, SliceTraining, by_role, count_examples, layer_parameters
from lamella.stack import Stack
from lamella.train import (
    Constant,
    Hook,
    Task,
    TrainConfig,
    TrainingLog,
    TrainingRun,
    blocks,
    collate,
    fit,
    response_loss,
)
from lamella.train.losses import continuation_log_probs, dpo_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (16, 10), generator=torch.Generator().manual_seed(0))
EXAMPLES = [{"text": sample} for sample in blocks(TOKENS, 3, loss_on="all")]
RUN: dict[str, Any] = {"steps": 12, "lr": 1e-3, "warmup": 4, "clip": 0.5, "batch": 2, "seed": 1, "save_every": 4}


def objective(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = response_loss(model, batch["text"])
    return 2 * loss, {"half": loss}


def score(model: Any, batch: Any) -> Tensor:
    return response_loss(model, batch["text"])


def strongest(step: int, norms: Any) -> int:
    return max(range(len(norms)), key=norms.__getitem__)


def in_turn(step: int, norms: Any) -> int:
    return step % 4


class Looking(Hook):
    def __init__(self, look: Callable[[int], None]) -> None:
        self.look = look

    def evaluated(self, run: TrainingRun) -> None:
        self.look(run.step)


def fit_slices(
    model: Any, slices: Any, examples: Any, objective: Any, choose: Any, *, out: Path, **options: Any
) -> tuple[TrainingLog, Choices]:
    """The loop with its hooks, whose options are among those of the config."""
    looking = [Looking(options.pop("after_eval"))] if "after_eval" in options else []
    score, held_out = options.pop("score", None), options.pop("held_out", ())
    hook = SliceTraining(slices, choose, score, bias_correction=options.pop("bias_correction", False))
    best = BestSlices(hook, options.pop("patience", 30))
    rate = Constant(options.pop("lr"), options.pop("warmup"))
    config = TrainConfig(**{"eval_every": 20} | options).with_schedule(rate)
    inside = {each for own in slices for each in own.values()}
    names = {name for name, each in model.named_parameters() if each in inside}
    task = Task(objective, by_role, count_examples, dropout=False)
    hooks = [hook, *([best] if held_out else []), *looking]
    log = fit(model, examples, task, config, out=out, trainable=names.__contains__, optimizer=hook.optimizer,
              held_out=held_out, hooks=hooks)  # fmt: skip
    return log, hook.trace


def fitted(out: Path, choose: Any = in_turn, **options: Any) -> tuple[Any, TrainingLog, Choices]:
    model = nano("gpt2")
    slices = layer_parameters(Stack(model))
    log, trace = fit_slices(model, slices, EXAMPLES[4:], objective, choose, out=out, **{**RUN, **options})
    return model, log, trace


def weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def test_only_the_chosen_slice_moves_at_each_step(tmp_path: Path) -> None:
    seen = []

    def look(step: int) -> None:
        seen.append(weights(model))

    model = nano("llama")
    slices = layer_parameters(Stack(model))
    options = RUN | {"steps": 4, "eval_every": 1}
    fit_slices(model, slices, EXAMPLES, objective, in_turn, out=tmp_path, after_eval=look, **options)
    assert len(seen) == 5
    for step in range(1, 5):
        moved = {name for name in seen[0] if not torch.equal(seen[step][name], seen[step - 1][name])}
        assert moved == set(slices[step % 4])


def test_it_equals_a_loop_with_two_graphs_and_gradients_that_are_dropped(tmp_path: Path) -> None:
    """The official loop: backward on the score, all gradients cleared, backward on the loss, others' grads None."""
    ours, _, trace = fitted(tmp_path, strongest, score=score)
    theirs = nano("gpt2").eval()
    slices = layer_parameters(Stack(theirs))
    optimizer = torch.optim.RMSprop(theirs.parameters(), lr=1e-3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    for step in range(6):
        batch = {"text": collate([EXAMPLES[4:][n]["text"] for n in order[2 * step : 2 * step + 2]])}
        first = score(theirs, batch)
        loss, _ = objective(theirs, batch)
        first.backward(retain_graph=True)
        norms = [
            math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in each.values() if p.grad is not None))
            for each in slices
        ]
        assert norms == pytest.approx(trace.sensitivities[step], rel=1e-5)
        chosen = strongest(0, norms)
        assert trace.chosen[step] == chosen
        theirs.zero_grad()
        loss.backward()
        for name, parameter in theirs.named_parameters():
            if name not in slices[chosen]:
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(slices[chosen].values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 4)
        optimizer.step()
        theirs.zero_grad()
    whole, _, _ = fitted(tmp_path / "six", strongest, score=score, steps=6)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(whole.get_parameter(name), parameter, atol=1e-6, rtol=0)
    assert ours is not whole


def test_a_slice_that_rests_keeps_its_running_square(tmp_path: Path) -> None:
    """None is not zero: with zeros the square would decay by 1 % a step."""
    _, _, trace = fitted(tmp_path, lambda step, norms: 0 if step == 1 else 1, steps=5)
    state = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)["state"]
    slices = layer_parameters(Stack(nano("gpt2")))
    first, second = len(slices[0]), len(slices[1])
    assert trace.touched == [0, 1] and set(state) == set(range(first + second))
    assert all(state[n]["step"] == 1 for n in range(first))
    assert all(state[first + n]["step"] == 4 for n in range(second))


@pytest.mark.parametrize(("correct", "factor"), [(False, 10.0), (True, 1.0)])
def test_the_first_step_of_a_slice_is_ten_rates_long_unless_corrected(tmp_path: Path, correct, factor) -> None:
    before = weights(nano("gpt2"))
    options = {"steps": 8, "bias_correction": correct, "warmup": 0}
    model, _, _ = fitted(tmp_path, lambda step, norms: 2 if step == 8 else 1, **options)
    moves = torch.cat([(model.get_parameter(n).detach() - before[n]).flatten().abs() for n in before if "h.2." in n])
    moves = moves[moves > 1e-6]  # the keys' bias has no gradient
    assert float(moves.median()) == pytest.approx(factor * 1e-3, rel=0.02)


def test_a_rate_of_zero_changes_nothing(tmp_path: Path) -> None:
    model, _, _ = fitted(tmp_path, lr=0.0)
    before = weights(nano("gpt2"))
    assert all(torch.equal(each, before[name]) for name, each in weights(model).items())


def test_the_best_weights_on_held_out_examples_are_kept(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    model = nano("llama")

    def look(step: int) -> None:
        seen[step] = weights(model)

    log, _ = fit_slices(
        model, layer_parameters(Stack(model)), EXAMPLES[4:], objective, in_turn, out=tmp_path,
        held_out=EXAMPLES[:4], after_eval=look, **RUN | {"lr": 3e-3, "eval_every": 1, "steps": 16},
    )  # fmt: skip
    assert [point.step for point in log.held_out] == list(range(17))
    best = min(log.held_out, key=lambda point: point.loss)
    assert best.step < 16, "this rate is meant to be too high"
    assert all(torch.equal(each, seen[best.step][name]) for name, each in weights(model).items())
    whole = {"text": collate([each["text"] for each in EXAMPLES[:4]])}
    assert best.loss == pytest.approx(float(objective(model, whole)[0]), abs=1e-5)


def test_it_stops_when_validation_brings_nothing(tmp_path: Path) -> None:
    options = {"held_out": EXAMPLES[:4], "lr": 0.0, "eval_every": 1, "patience": 3}
    _, log, trace = fitted(tmp_path, **options)
    assert len(log.held_out) == 4 and len(trace.chosen) == 3


@pytest.mark.parametrize("at", [1, 4, 5, 7, 12])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path: Path, at: int) -> None:
    options: dict[str, Any] = {"score": score, "held_out": EXAMPLES[:4], "eval_every": 3, "log_every": 3}
    whole, log, trace = fitted(tmp_path / "whole", strongest, **options)

    def stopping(step: int, norms: Any) -> int:
        if step == at:
            raise KeyboardInterrupt
        return strongest(step, norms)

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut", stopping, **options)
    torch.rand(3)  # what is drawn in between must not matter
    resumed, again, retrace = fitted(tmp_path / "cut", strongest, **options)
    assert again == log and retrace == trace
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "cut").glob("*checkpoint*")] == ["checkpoint-12"]
    finished, _, _ = fitted(tmp_path / "cut", stopping, **options)  # asks for no step any more
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), whole.parameters(), strict=True))


def test_the_log_has_the_mean_of_its_window_and_its_parts(tmp_path: Path) -> None:
    _, log, _ = fitted(tmp_path, score=score, log_every=3)
    assert [point.step for point in log.train] == [3, 4, 6, 8, 9, 12]
    for point in log.train:
        assert point.loss == pytest.approx(2 * point.parts["half"], rel=1e-6)
        assert point.parts["score"] == pytest.approx(point.parts["half"], rel=1e-5)
    assert TrainingLog.read(tmp_path / "log.json") == log
    assert Choices.read(tmp_path / "checkpoint-12" / "trace.json").chosen == [step % 4 for step in range(1, 13)]


def test_flags_modes_and_gradients_are_left_as_they_were(tmp_path: Path) -> None:
    model = nano("gpt2").train()
    model.transformer.wte.weight.requires_grad_(False)
    flags = [each.requires_grad for each in model.parameters()]
    slices = layer_parameters(Stack(model))
    fit_slices(model, slices, EXAMPLES, objective, in_turn, out=tmp_path, **RUN | {"steps": 2})
    assert [each.requires_grad for each in model.parameters()] == flags
    assert model.training and all(each.grad is None for each in model.parameters())


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(TrainingError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_number_that_is_not_finite_stops_at_once_and_says_where(tmp_path: Path) -> None:
    calls = 0

    def broken(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        loss, parts = objective(model, batch)
        return loss * (float("nan") if calls == 6 else 1), parts

    model = nano("gpt2")
    slices = layer_parameters(Stack(model))
    said = refused(lambda: fit_slices(model, slices, EXAMPLES, broken, in_turn, out=tmp_path, **RUN))
    assert "non-finite loss at step 6 of 12, with samples [" in said and str(tmp_path) in said
    assert calls == 6 and (tmp_path / "checkpoint-4").is_dir()
    far = refused(lambda: fitted(tmp_path / "far", lr=1e30, score=score, warmup=0))
    assert "non-finite" in far


def test_bad_arguments_and_other_runs_are_refused(tmp_path: Path) -> None:
    assert "steps 0" in refused(lambda: fitted(tmp_path / "a", steps=0))
    assert "patience 0" in refused(lambda: fitted(tmp_path / "a", patience=0))
    assert "clip 0" in refused(lambda: fitted(tmp_path / "a", clip=0.0))
    assert "rates" in refused(lambda: fitted(tmp_path / "a", lr=-1.0))
    model = nano("gpt2")
    slices = layer_parameters(Stack(model))
    assert "no training samples" in refused(
        lambda: fit_slices(model, slices, [], objective, in_turn, out=tmp_path, **RUN)
    )
    fitted(tmp_path / "b", steps=2)
    assert "contains a run with steps 2, not 3" in refused(lambda: fitted(tmp_path / "b", steps=3))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert "not the folder of a training run" in refused(lambda: fitted(tmp_path / "c"))
    (tmp_path / "d").write_text("a file")
    assert "give another folder" in refused(lambda: fitted(tmp_path / "d" / "e"))


SCRIPT = """
import os, signal, sys
import torch
sys.path[:0] = {path}
torch.set_num_threads(1)
from lamella.methods.irepair import BestSlices, SliceTraining, by_role, count_examples, layer_parameters
from lamella.stack import Stack
from lamella.train import Constant, Task, TrainConfig, blocks, fit, response_loss
from lamella.zoo.nano import nano
out, batch, accumulate, kill = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tokens = torch.randint(3, 128, (16, 10), generator=torch.Generator().manual_seed(0))
examples = [{{"text": sample}} for sample in blocks(tokens, 3, loss_on="all")]
def choose(step, norms):
    if step == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return max(range(len(norms)), key=norms.__getitem__) if step % 3 else step % 4
def loss(model, batch):
    return response_loss(model, batch["text"])
model = nano("gpt2")
slices = SliceTraining(layer_parameters(Stack(model)), choose, loss)
config = TrainConfig(steps=8, schedule=Constant(1e-3, 4), clip=0.5, batch=batch, accumulate=accumulate, save_every=3)
fit(model, examples[4:], Task(loss, by_role, count_examples, dropout=False), config, out=out, held_out=examples[:4],
    trainable=lambda name: name.startswith("transformer.h."), optimizer=slices.optimizer,
    hooks=[slices, BestSlices(slices, 30)])
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_choose_and_train_as_one_does_on_the_same_batches(
    in_two_processes: Callable[..., Any], tmp_path: Path
) -> None:
    """The strongest slice of a step is that of all its examples, whether batches or processes share them."""
    file = tmp_path / "run.py"
    file.write_text(SCRIPT.format(path=[each for each in sys.path if each]), encoding="utf-8")
    for name, batch, accumulate in (("one", 4, 1), ("split", 1, 4)):
        subprocess.run([sys.executable, file, tmp_path / name, str(batch), str(accumulate), "0"], check=True)
    ran = in_two_processes(file, tmp_path / "two", 1, 2, 0)
    assert ran.returncode == 0, ran.stderr
    expected = Choices.read(tmp_path / "one" / "checkpoint-8" / "trace.json")
    assert len(expected.touched) > 1
    for name in ("split", "two"):
        trace = Choices.read(tmp_path / name / "checkpoint-8" / "trace.json")
        assert trace.chosen == expected.chosen
        for ours, theirs in zip(trace.sensitivities, expected.sensitivities, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
        for kind in ("trained", "best"):
            found, wanted = (
                load_file(tmp_path / each / "checkpoint-8" / f"{kind}.safetensors") for each in (name, "one")
            )
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, wanted[key], atol=1e-3, rtol=0)

    assert in_two_processes(file, tmp_path / "killed", 1, 2, 5).returncode != 0
    assert in_two_processes(file, tmp_path / "killed", 1, 2, 0).returncode == 0
    before, after = (load_file(tmp_path / name / "checkpoint-8" / "best.safetensors") for name in ("two", "killed"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_dpo_is_minus_log_sigmoid_of_the_difference_of_log_ratios() -> None:
    model, reference = nano("llama"), nano("llama", seed=3)
    good, bad = (collate([each["text"] for each in rows]) for rows in (EXAMPLES[:3], EXAMPLES[3:6]))

    def by_hand(policy: Any, batch: dict[str, Tensor]) -> Tensor:
        logs = policy(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
        picked = logs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return picked[:, 2:].sum(-1)  # the continuation begins at column 3

    with torch.no_grad():
        torch.testing.assert_close(continuation_log_probs(model, good), by_hand(model, good), rtol=1e-5, atol=1e-5)
        ratio = by_hand(model, good) - by_hand(model, bad) - by_hand(reference, good) + by_hand(reference, bad)
        loss, parts = dpo_loss(model, good, bad, reference=reference)
        assert float(loss) == pytest.approx(float(-(0.1 * ratio).sigmoid().log().mean()), rel=1e-4)
        assert float(parts["ranked"]) == pytest.approx(float((ratio > 0).float().mean()))
        assert float(dpo_loss(model, good, bad, reference=copy.deepcopy(model))[0]) == pytest.approx(math.log(2))
