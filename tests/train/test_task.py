"""Tasks: custom batches, weights and steps, compared with manual computations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.train import Feed, Sample, Task, TrainConfig, fit, infinite, rewarm, warmup_stable_decay

DRAW = torch.Generator().manual_seed(0)
POINTS: list[Sample] = [
    {"x": torch.randn(3, generator=DRAW), "y": torch.randn(2, generator=DRAW), "n": torch.tensor(1 + n % 3)}
    for n in range(12)
]


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def stacked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in samples]) for name in samples[0]}


def errors(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error, mean over samples that count ``n`` times; and that of each output."""
    squares = (model(batch["x"]) - batch["y"]).square() * batch["n"][:, None] / batch["n"].sum()
    first, second = squares.sum(dim=0)
    return first + second, {"first": first, "second": second}


def counted(batch: dict[str, Tensor]) -> int:
    return int(batch["n"].sum())


REGRESSION = Task(errors, collate=stacked, weight=counted)


def test_batches_weigh_as_the_task_says_however_they_are_split(tmp_path: Path) -> None:
    trained = []
    for batch, accumulate in ((6, 1), (2, 3), (1, 6)):
        model = line()
        config = TrainConfig(steps=4, lr=1e-2, batch=batch, accumulate=accumulate, log_every=1)
        log = fit(model, POINTS, REGRESSION, config, out=tmp_path / str(batch), held_out=POINTS[:5])
        trained.append((model.weight.detach(), [point.loss for point in log.train + log.held_out]))
    whole = errors(model, stacked(POINTS[:5]))[0].item()
    assert log.held_out[-1].loss == pytest.approx(whole, rel=1e-5)  # samples weigh, not batches
    for weight, losses in trained[1:]:
        torch.testing.assert_close(weight, trained[0][0], atol=1e-5, rtol=0)
        assert losses == pytest.approx(trained[0][1], rel=1e-4)


def test_a_task_may_do_a_steps_passes_itself(tmp_path: Path) -> None:
    """The gradient of each part is clipped on its own, and they are added: against that in float64, with plain Adam."""
    model = line()

    def clipped(forward: Any, batch: Any, backward: Any) -> Any:
        loss, parts = forward(batch)
        total = [torch.zeros_like(each) for each in model.parameters()]
        for part in parts.values():
            backward(part, retain_graph=True)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for each, parameter in zip(total, model.parameters(), strict=True):
                each += parameter.grad
                parameter.grad = None
        for each, parameter in zip(total, model.parameters(), strict=True):
            parameter.grad = each
        return loss, parts

    task = Task(errors, collate=stacked, weight=counted, passes=clipped)
    config = TrainConfig(steps=5, lr=1e-2, schedule="constant", warmup=0, batch=12, clip=1e9)
    fit(model, POINTS, task, config, out=tmp_path)

    theirs = line().double()
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0)
    batch = {name: each.double() for name, each in stacked(POINTS).items()}
    for _ in range(5):
        total = [torch.zeros_like(each) for each in theirs.parameters()]
        for part in errors(theirs, batch)[1].values():
            gradients = torch.autograd.grad(part, list(theirs.parameters()), retain_graph=True)
            norm = torch.stack([each.square().sum() for each in gradients]).sum().sqrt()
            total = [a + b * min(1, 0.1 / norm) for a, b in zip(total, gradients, strict=True)]
        for each, parameter in zip(total, theirs.parameters(), strict=True):
            parameter.grad = each
        adam.step()
    torch.testing.assert_close(model.weight.double(), theirs.weight, atol=1e-5, rtol=0)


def test_gradients_are_clipped_at_the_norm_that_the_config_says(tmp_path: Path) -> None:
    """Adam's steps do not show it, but its first moments do: 0.09 of the first gradient and 0.1 of the second."""
    moved = {}
    for clip in (1e-3, 1e9):
        model = line()
        config = TrainConfig(steps=2, lr=1e-2, schedule="constant", warmup=0, batch=12, clip=clip, save_every=1)
        fit(model, POINTS, REGRESSION, config, out=tmp_path / str(clip))
        [folder] = (tmp_path / str(clip)).glob("checkpoint-*")
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        moved[clip] = float(torch.cat([each["exp_avg"].flatten() for each in state.values()]).norm())
    assert moved[1e-3] <= 1e-3 * (0.1 + 0.09) + 1e-9 < moved[1e9]


def test_a_task_without_dropout_trains_the_model_as_it_is_used(tmp_path: Path) -> None:
    modes: list[bool] = []

    def watching(model: Any, batch: Any) -> Any:
        modes.append(model.training)
        return errors(model[0], batch)

    for dropout in (True, False):
        task = Task(watching, collate=stacked, weight=counted, dropout=dropout)
        fit(nn.Sequential(line()), POINTS, task, TrainConfig(steps=2, lr=0.0), out=tmp_path / str(dropout))
    assert modes == [True, True, False, False]


def test_samples_get_others_along_each_in_an_order_of_its_own(tmp_path: Path) -> None:
    """By roles: what the loss sees are pairs, and each of both kinds comes once in a pass over its own."""
    seen: list[tuple[int, int]] = []

    def by_role(samples: Any) -> Any:
        return {role: stacked([each[role] for each in samples]) for role in samples[0]}

    def watching(model: Any, batch: Any) -> Tensor:
        seen.extend(zip(batch["a"]["k"].tolist(), batch["b"]["k"].tolist(), strict=True))
        return model(batch["a"]["k"][:, None].float().expand(-1, 3)).sum()

    first, second = ([{role: {"k": torch.tensor(k)}} for k in range(n)] for role, n in (("a", 6), ("b", 4)))
    task = Task(watching, collate=by_role, weight=lambda batch: len(batch["a"]["k"]))
    config = TrainConfig(steps=6, lr=1e-3, batch=2, seed=3)
    log = fit(line(), Feed(first, along=[second]), task, config, out=tmp_path)
    assert [sorted(a for a, _ in seen[k : k + 6]) for k in (0, 6)] == [list(range(6))] * 2
    assert [sorted(b for _, b in seen[k : k + 4]) for k in (0, 4, 8)] == [list(range(4))] * 3
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist() for n, seed in ((6, 3), (4, 4))]
    assert ([a for a, _ in seen[:6]], [b for _, b in seen[:4]]) == tuple(orders)
    assert len(log.settings["along"]) == 1
    with pytest.raises(TrainingError, match=r"along .*, not None"):
        fit(line(), Feed(first), task, config, out=tmp_path)
    with pytest.raises(TrainingError, match="no training samples"):
        Feed(first, along=[[]])


def test_one_pass_over_the_samples_is_what_a_run_without_steps_takes(tmp_path: Path) -> None:
    config = TrainConfig(lr=1e-2, batch=2, accumulate=2)
    assert fit(line(), POINTS, REGRESSION, config, out=tmp_path).settings["steps"] == 3
    assert TrainConfig(batch=5).with_steps(12).steps == 2 and TrainConfig(batch=50).with_steps(12).steps == 1


@pytest.mark.parametrize(("name", "shape"), [("rewarm", rewarm), ("infinite", infinite), ("wsd", warmup_stable_decay)])
def test_schedules_have_names_and_a_warm_up_in_shares_or_steps(name: str, shape: Any, tmp_path: Path) -> None:
    for warmup, share in ((None, 0.01), (0.25, 0.25), (2, 0.25)):
        config = TrainConfig(steps=8, lr=1e-2, schedule=name, warmup=warmup, log_every=1)
        log = fit(line(), POINTS, REGRESSION, config, out=tmp_path / f"{warmup}")
        assert [point.lr for point in log.train] == [shape(8, 1e-2, warmup=share)(t) for t in range(1, 9)]
    by_steps, by_share = (TrainConfig(steps=8, lr=1.0, warmup=each).rates for each in (2, 0.25))
    assert by_steps == by_share and by_steps.warmup == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps 0: give at least 1"),
        ({"clip": 0.0}, "clip 0: give the maximum gradient norm"),
        ({"clip": float("nan")}, "clip nan"),
        ({"save_every": -1}, "save_every -1"),
    ],
)
def test_invalid_settings_are_refused_at_construction(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**wrong)
