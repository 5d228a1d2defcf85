"""The anchor against closed forms: its schedule, its penalty and gradient, and Fisher information."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from lamella.data.samples import collate
from lamella.errors import MethodError
from lamella.measure import fisher
from lamella.methods.cstrl import (
    Anchor,
    AnchoredLoss,
    Penalty,
    fill_gaps,
    measure_fisher,
    read_fisher,
    sites_of_parameters,
    summarise,
    with_steps,
)
from lamella.stack import Model, Stack, share
from lamella.train import Task, TrainConfig, fit, own, pairs, response_loss
from lamella.zoo.nano import nano

DRAWN = torch.Generator().manual_seed(0)
CONFIG = TrainConfig(steps=8, lr=1e-3, batch=4, log_every=1, save_every=4)


def samples(count: int = 12) -> list[dict[str, Tensor]]:
    """Of an encoder-decoder, ragged on both sides."""
    return [
        {
            "input_ids": torch.randint(3, 100, (5 + number % 4,), generator=DRAWN),
            "labels": torch.randint(3, 100, (2 + number % 3,), generator=DRAWN),
        }
        for number in range(count)
    ]


SAMPLES = samples()


def t5(**changes: object) -> Model:
    return Model(nano("t5", dropout_rate=0.1, **changes))


def decoder_samples() -> list[dict[str, Tensor]]:
    return pairs([(each["input_ids"], each["labels"]) for each in SAMPLES])


@pytest.mark.parametrize(("epoch", "strength"), [(0, 0.9), (10, 0.45), (16, 0.2), (20, 0.2)])
def test_lambda_falls_once_an_epoch_down_to_its_floor(epoch: int, strength: float) -> None:
    assert Anchor().strength(epoch, 20) == pytest.approx(strength)
    assert Anchor(decay="constant").strength(epoch, 20) == 0.9
    assert Anchor(lam=0).strength(epoch, 20) == 0
    assert Anchor(lam=0.1).strength(epoch, 20) == 0.1  # never above where it begins


@pytest.mark.parametrize("pairs", [41, 401])
def test_there_are_as_many_epochs_as_were_asked_for_whatever_the_batches(pairs: int) -> None:
    steps = with_steps(replace(CONFIG, steps=None, batch=16), pairs, 20).steps
    assert steps is not None
    hook = AnchoredLoss(Penalty({}, {}), Anchor(), {}, samples=pairs, size=16, steps=steps)
    assert hook.epochs == 20 and hook.anchor.strength(10, hook.epochs) == 0.45
    assert [hook.epoch(step) for step in range(steps) if hook._is_last(step)] == list(range(20))


def penalised(uniform: bool = False) -> tuple[Penalty, dict[str, Tensor], dict[str, Tensor]]:
    """A penalty, the point where it stands, and one beside it."""
    start = {"a": torch.randn(3, 4, generator=DRAWN), "b": torch.randn(5, generator=DRAWN)}
    importance = {name: torch.rand(each.shape, generator=DRAWN) for name, each in start.items()}
    theta = {name: (each + torch.randn(each.shape, generator=DRAWN)).requires_grad_() for name, each in start.items()}
    return Penalty(start, None if uniform else importance), start, theta


def test_the_penalty_and_its_gradient_are_zero_at_the_start() -> None:
    penalty, start, _ = penalised()
    theta = {name: each.clone().requires_grad_() for name, each in start.items()}
    value = penalty.of(theta)
    value.backward()
    assert value == 0 and all(torch.equal(each.grad, torch.zeros_like(each)) for each in theta.values())
    assert all(not penalty.gradient(name, each).any() for name, each in theta.items())


def test_the_gradient_of_the_penalty_is_2_lambda_f_times_the_distance() -> None:
    penalty, start, theta = penalised()
    (0.9 * penalty.of(theta)).backward()
    for name, each in theta.items():
        wanted = 2 * 0.9 * penalty.importance[name].double() * (each.detach().double() - start[name].double())
        assert torch.allclose(each.grad.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(0.9 * penalty.gradient(name, each), each.grad)


def test_with_f_of_1_it_is_l2_sp() -> None:
    penalty, start, theta = penalised(uniform=True)
    ones = Penalty(start, {name: torch.ones_like(each) for name, each in start.items()})
    assert torch.equal(penalty.of(theta), ones.of(theta))
    whole = sum((each.detach() - start[name]).square().sum() for name, each in theta.items())
    assert float(penalty.of(theta).detach()) == pytest.approx(float(whole), rel=1e-6)


def test_normalised_its_mean_is_1() -> None:
    _, start, _ = penalised()
    importance = {name: 1e-6 * torch.rand(each.shape, generator=DRAWN) for name, each in start.items()}
    normal = Penalty(start, importance, normalize=True)
    assert torch.cat([each.flatten() for each in normal.importance.values()]).mean() == pytest.approx(1, rel=1e-5)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def test_fisher_information_of_batches_of_a_softmax_layer_is_its_closed_form() -> None:
    torch.manual_seed(0)
    model = Softmax()
    x, y = torch.randn(10, 4), torch.randint(0, 3, (10,))
    found = fisher(model, (x, y), batch=4).tensors["map.weight"]
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for start in (0, 4, 8):  # d CE / d W of a batch: the mean of (p - y) x^T
        xs, ys = x[start : start + 4].double(), y[start : start + 4]
        apart = softmax(xs @ model.map.weight.detach().double().T, dim=-1) - one_hot(ys, 3)
        wanted += (apart.T @ xs / len(xs)).square() / 3
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-10)


def loop(model: Model, batches: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """F by plain backward passes over whole batches, each row alone, so that nothing is padded."""
    copy = share(model.model).eval()
    own(copy, lambda name: True)
    total = {name: torch.zeros(each.shape, dtype=torch.float64) for name, each in copy.named_parameters()}
    for batch in batches:
        copy.zero_grad()
        tokens = sum(len(each["labels"]) for each in batch)
        loss = sum(
            nn.functional.cross_entropy(
                copy(input_ids=each["input_ids"][None], labels=each["labels"][None]).logits[0],
                each["labels"],
                reduction="sum",
            )
            for each in batch
        )
        (loss / tokens).backward()
        for name, each in copy.named_parameters():
            total[name] += each.grad.double().square() / len(batches)
    return total


def test_fisher_information_of_an_encoder_decoder_knows_no_padding_and_tied_weights_once() -> None:
    model = t5()
    found = measure_fisher(model, SAMPLES, 4)
    assert (found.batches, found.samples) == (3, 12) and set(found.tensors) == dict(
        model.model.named_parameters()
    ).keys()
    assert "lm_head.weight" not in found.tensors and "encoder.embed_tokens.weight" not in found.tensors
    with torch.enable_grad():
        wanted = loop(model, [SAMPLES[start : start + 4] for start in (0, 4, 8)])
    for name, each in wanted.items():
        assert torch.allclose(found.tensors[name].double(), each, rtol=1e-3, atol=1e-9), name
    wide = [SAMPLES[:4], [{"input_ids": torch.arange(3, 60), "labels": torch.arange(3, 30)}]]
    narrow = collate(wide[0])
    padded = {name: each[:4] for name, each in collate([*wide[0], *wide[1]]).items()}
    assert padded["input_ids"].shape[1] > narrow["input_ids"].shape[1]
    assert torch.allclose(response_loss(model.model, padded), response_loss(model.model, narrow), rtol=1e-6)


def test_a_file_of_importances_must_be_of_these_weights(tmp_path: Path) -> None:
    model, other = t5(), Model(nano("t5", seed=1))
    found = measure_fisher(model, SAMPLES, 4)
    found.save(tmp_path / "f.safetensors")
    again = read_fisher(tmp_path / "f.safetensors", model)
    assert all(torch.equal(again.tensors[name], each) for name, each in found.tensors.items())
    assert again.estimator.batch == 4
    with pytest.raises(MethodError, match="belongs to other weights than") as error:
        read_fisher(tmp_path / "f.safetensors", other)
    assert "\n" not in str(error.value)
    some = dict(list(found.tensors.items())[:-1])
    type(found)(**{**vars(found), "tensors": some}).save(tmp_path / "some.safetensors")
    with pytest.raises(MethodError, match="has no values for"):
        read_fisher(tmp_path / "some.safetensors", model)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_with_lambda_0_it_is_plain_fine_tuning_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = t5() if kind == "t5" else Stack(nano("llama", attention_dropout=0.1))
    data = SAMPLES if kind == "t5" else decoder_samples()
    found = measure_fisher(model, data, 4)
    ours, log, hook = summarise(model, found, data, {"all": data}, Anchor(lam=0), CONFIG, tmp_path / "anchored")
    view = share(model.model)
    own(view, lambda name: True)
    plain = fit(view, data, Task(response_loss), CONFIG, out=tmp_path / "plain", trainable=lambda name: True,
                held_out={"all": data})  # fmt: skip
    theirs = dict(view.named_parameters())
    assert all(torch.equal(each, theirs[name]) for name, each in ours.model.named_parameters())
    assert [point.loss for point in log.train] == [point.loss for point in plain.train]
    assert [point.loss for point in log.held_out] == [point.loss for point in plain.held_out]
    assert all(row["ratio"] == 0 and row["lambda"] == 0 for row in hook.rows)


def test_the_anchor_holds_what_matters_and_says_by_epoch_what_it_did(tmp_path: Path) -> None:
    model = t5()
    found = measure_fisher(model, SAMPLES, 4)
    before = {name: each.clone() for name, each in model.model.named_parameters()}
    rows = {}
    for lam in (0.0, 30.0):
        anchor = Anchor(lam=lam, normalize="mean")
        _, log, hook = summarise(model, found, SAMPLES, {}, anchor, CONFIG, tmp_path / f"{lam:g}")
        rows[lam] = hook.rows
        assert [row["epoch"] for row in hook.rows] == [0, 1, 2] and hook.rows[-1]["step"] == 8
        assert [row["lambda"] for row in hook.rows] == pytest.approx([lam * (1 - e / 3) for e in range(3)])
        assert [point.parts["lambda"] for point in log.train] == pytest.approx(
            [lam * (1 - e / 3) for e in (0,) * 3 + (1,) * 3 + (2,) * 2]
        )
        for point in log.train:
            assert point.loss == pytest.approx(point.parts["task"] + point.parts["penalty"], rel=1e-5)
        assert set(hook.rows[-1]["sites"]) == set(sites_of_parameters(model).values())
        assert hook.rows[-1]["penalty"] == pytest.approx(
            sum(each["penalty"] for each in hook.rows[-1]["sites"].values())
        )
    assert rows[30.0][-1]["penalty"] < 0.5 * rows[0.0][-1]["penalty"]
    assert rows[30.0][-1]["ratio"] > 0
    assert all(torch.equal(each, before[name]) for name, each in model.model.named_parameters())


def test_before_a_run_begins_the_loss_is_that_at_the_start() -> None:
    """As in an estimate, which records the loss without the hooks of a run."""
    model, batch = t5(), collate(SAMPLES[:2])
    start = dict(model.model.named_parameters())
    hook = AnchoredLoss(Penalty(start, None), Anchor(), {}, samples=2, size=2, steps=1)
    with torch.enable_grad():
        loss, parts = hook.loss(model.model.eval(), batch)
    assert parts["penalty"] == 0 and torch.equal(loss, parts["task"])


def test_the_ratio_is_that_of_the_two_gradients(tmp_path: Path) -> None:
    model = Model(nano("t5", dropout_rate=0.0))
    found = measure_fisher(model, SAMPLES, 4)
    one = TrainConfig(steps=2, lr=1e-2, batch=12, schedule="constant", warmup=0.0)
    trained, _, hook = summarise(model, found, SAMPLES, {}, Anchor(lam=5.0, decay="constant"), one, tmp_path / "two")
    # What the second step saw are the weights after the first.
    first, _, _ = summarise(model, found, SAMPLES, {}, Anchor(lam=5.0, decay="constant"), TrainConfig(
        steps=1, lr=1e-2, batch=12, schedule="constant", warmup=0.0), tmp_path / "one")  # fmt: skip
    view, start = first.model, dict(model.model.named_parameters())
    with torch.enable_grad():
        for each in view.parameters():
            each.requires_grad_()
        response_loss(view, collate(SAMPLES)).backward()
    task = torch.cat([each.grad.flatten() for each in view.parameters()]).norm()
    pull = torch.cat([
        (10.0 * found.tensors[name] * (each.detach() - start[name].detach())).flatten()
        for name, each in view.named_parameters()
    ]).norm()  # fmt: skip
    assert hook.rows[-1]["ratio"] == pytest.approx(float(pull / task), rel=1e-3)
    assert trained is not first


def test_gap_training_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = t5()
    before = {name: each.clone() for name, each in model.model.named_parameters()}
    filled, log = fill_gaps(model, SAMPLES, {"all": SAMPLES}, CONFIG, tmp_path / "run")
    assert all(torch.equal(each, before[name]) for name, each in model.model.named_parameters())
    assert log.train[-1].loss < log.train[0].loss
    assert filled.model.lm_head.weight is filled.model.shared.weight  # tied as before
