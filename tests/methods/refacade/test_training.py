"""Training: what the losses are, what learns and what stays, and that a killed run goes on to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.refacade import (
    Base,
    Clip,
    DmdLoss,
    Jigsaw,
    StudentAndFake,
    TextureRemover,
    TransferLoss,
    dilate_mask,
    distil,
    euler,
    nano,
    objects,
    recipe,
    removal_samples,
    train_branch,
    train_remover,
    transfer_samples,
)
from lamella.methods.refacade.clips import of_object
from lamella.methods.refacade.flow import BaseLoss, Length, flow_loss
from lamella.methods.refacade.recipe import RemoverLoss
from lamella.train import TrainConfig

from .pipelines import branch, halved, latents, pixels

CONFIG = TrainConfig(steps=4, lr=1e-3, batch=2, save_every=2, schedule="constant", warmup=0)


def clips(count: int = 4, frames: int = 2) -> list[Clip]:
    drawn = objects("train", 0, 16, frames)
    return [of_object(next(drawn)) for _ in range(count)]


def remover(base: Base) -> TextureRemover:
    torch.manual_seed(1)
    return TextureRemover.fresh(base).eval()


def test_the_loss_of_a_perfect_velocity_is_nothing_and_of_none_that_of_the_target() -> None:
    z_0 = torch.randn(8, 3, 1, 4, 4)

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        return (z - z_0) / t.view(-1, 1, 1, 1, 1)

    assert float(flow_loss(perfect, z_0)) < 1e-8
    torch.manual_seed(3)
    found = flow_loss(lambda z, t: torch.zeros_like(z), z_0)
    torch.manual_seed(3)
    torch.rand(8)
    torch.testing.assert_close(found, (torch.randn_like(z_0) - z_0).square().mean())


def test_a_batch_may_see_first_frames_alone() -> None:
    batch = {"clean": torch.zeros(2, 3, 5, 4, 4), "own": torch.zeros(2, 3, 1, 4, 4)}
    torch.manual_seed(0)
    lengths = [Length(0.75)(batch)["clean"].shape[2] for _ in range(400)]
    assert set(lengths) == {1, 5} and 0.67 < lengths.count(1) / 400 < 0.83
    assert {Length()(batch)["clean"].shape[2] for _ in range(20)} == {5}


def test_samples_are_what_the_object_looks_like() -> None:
    base, found = pixels(), clips(2)
    for sample, clip in zip(transfer_samples(base, remover(base), found), found, strict=True):
        background, _, hole = sample["c"].split([3, 3, 1])
        expected = dilate_mask(clip.mask, 3)
        assert torch.equal(hole.movedim(1, 0), expected)
        assert torch.equal(background.movedim(1, 0), clip.frames * (1 - expected))
        inside = (clip.mask[0] > 0).expand(3, -1, -1)
        assert torch.equal(sample["own"][:, 0][inside], clip.frames[0][inside])
        assert bool((sample["own"][:, 0][~inside] == 1).all())
    for sample, clip in zip(removal_samples(base, found), found, strict=True):
        assert torch.equal(sample["foreground"].movedim(1, 0), clip.frames * clip.mask)
        assert torch.equal(sample["untextured"].movedim(1, 0), clip.plain * clip.mask)


@pytest.mark.parametrize("jigsaw", [Jigsaw(), None])
def test_the_branch_alone_learns(jigsaw: Jigsaw | None, tmp_path: Path) -> None:
    base = pixels()
    made = branch(base, silent=True)
    before = {name: each.clone() for name, each in base.network.state_dict().items()}
    samples = transfer_samples(base, remover(base), clips())
    loss = TransferLoss(base, jigsaw)
    batch = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}

    @torch.no_grad()
    def total() -> float:
        torch.manual_seed(7)
        return sum(float(loss(made, batch)) for _ in range(4))

    first = total()
    config = TrainConfig(steps=12, lr=2e-3, batch=4, schedule="constant", warmup=0)
    train_branch(base, made, samples, config, tmp_path / "run", jigsaw=jigsaw)
    assert total() < first
    assert all(torch.equal(each, before[name]) for name, each in base.network.state_dict().items())


def test_the_branch_learns_beside_a_base_of_bfloat16(tmp_path: Path) -> None:
    base = halved()
    made = branch(base, silent=True)
    before = {name: each.clone() for name, each in made.named_parameters()}
    samples = transfer_samples(base, remover(base), clips(2, 1))
    train_branch(base, made, samples, CONFIG, tmp_path / "run")
    moved = [name for name, each in made.named_parameters() if not torch.equal(each, before[name])]
    assert len(moved) > 10 and all(each.dtype == torch.float32 for each in made.parameters())


def test_the_reference_of_a_step_is_jigsawed_again_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = pixels(), []
    drawn = objects("train", 0, 48)
    samples = transfer_samples(base, remover(base), [of_object(next(drawn)) for _ in range(2)])
    batch = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}
    whole = recipe.reference_condition

    def noted(base: Base, puzzle: object) -> object:
        seen.append(puzzle)
        return whole(base, puzzle)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe, "reference_condition", noted)
    made = branch(base)
    with torch.no_grad():
        for _ in range(2):
            TransferLoss(base, Jigsaw(coverage=0.6))(made, batch)
    assert len(seen) == 4 and not torch.equal(seen[0].image, seen[2].image)


def test_the_base_sees_a_white_frame_in_place_of_a_reference() -> None:
    seen: list[torch.Tensor] = []

    def velocity(z: torch.Tensor, t: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
        seen.append(frame)
        return torch.zeros_like(z)

    BaseLoss(velocity, Length())(torch.nn.Identity(), {"clean": torch.zeros(2, 3, 4, 8, 8)})
    assert torch.equal(seen[0], torch.ones(2, 3, 1, 8, 8))


def test_the_base_learns_from_clips_alone() -> None:
    base = Base(copy.deepcopy(pixels().network).requires_grad_(True), None, "fresh")
    loss = BaseLoss(base.velocity, Length())(base.network, {"clean": torch.randn(2, 3, 2, 8, 8)})
    loss.backward()
    assert all(each.grad is not None for name, each in base.network.named_parameters() if "text" not in name)


@pytest.mark.parametrize("opened", [pixels, latents, halved])
def test_the_remover_learns_what_it_should(opened: object, tmp_path: Path) -> None:
    base: Base = opened()  # type: ignore[operator]
    made = remover(base)
    before = {name: each.clone() for name, each in made.named_parameters()}
    train_remover(made, removal_samples(base, clips(4, 1)), CONFIG, tmp_path / "run")
    for name, each in made.named_parameters():
        assert made.trains(name) or torch.equal(each, before[name])
    assert sum(not torch.equal(each, before[name]) for name, each in made.named_parameters()) > 5


# Distillation


def test_a_students_direction_is_dmds() -> None:
    torch.manual_seed(0)
    teacher = remover(pixels())
    fake = remover(pixels())
    for each in fake.parameters():
        each.data.add_(0.02 * torch.randn(each.shape))
    x, branch_inputs = torch.randn(3, 3, 1, 8, 8), torch.randn(3, 3, 1, 8, 8)
    t, eps = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 3, 1, 8, 8)
    share = t.view(3, 1, 1, 1, 1)
    x_t = (1 - share) * x + share * eps
    with torch.no_grad():
        found = DmdLoss(teacher).direction(fake, x, x_t, t, branch_inputs)
        for row in range(3):
            one = slice(row, row + 1)
            mu_r = x_t[one] - t[row] * teacher.velocity(x_t[one], t[one], branch_inputs[one])
            mu_f = x_t[one] - t[row] * fake.velocity(x_t[one], t[one], branch_inputs[one])
            expected = (mu_f - mu_r) / (x[one] - mu_r).abs().mean()
            torch.testing.assert_close(found[one], expected, atol=1e-4, rtol=1e-4)


def test_two_losses_meet_nowhere_and_the_student_moves_along_its_direction() -> None:
    teacher = remover(pixels())
    pair = StudentAndFake(teacher)
    loss = DmdLoss(teacher)
    batch = {"foreground": torch.randn(2, 3, 1, 8, 8)}
    g: list[Tensor] = []
    whole = loss.direction
    loss.direction = lambda *given: g.append(torch.full_like(given[1], 0.25)) or g[-1]  # type: ignore[method-assign]
    torch.manual_seed(0)
    total, parts = loss(pair, batch)
    total.backward()
    assert all(each.grad is None for each in teacher.parameters())
    torch.manual_seed(0)
    alone = copy.deepcopy(teacher).requires_grad_(True)
    x = euler(lambda z, t: alone.velocity(z, t, batch["foreground"]), torch.randn(2, 3, 1, 8, 8), 3, True)
    (x * 0.25 / x.numel()).sum().backward()  # the gradient of the loss is g over the number of elements
    for (name, ours), theirs in zip(pair.student.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert any(float(each.grad.abs().max()) > 0 for each in pair.fake.parameters())
    loss.direction = whole  # type: ignore[method-assign]
    assert float(parts["matching"]) == 0.25


class Bell:
    """The exact velocity of pictures whose numbers are normal, of a mean and a deviation."""

    def __init__(self, mean: float, deviation: float) -> None:
        self.mean, self.deviation = mean, deviation

    def velocity(self, z_t: Tensor, t: Tensor, branch_inputs: Tensor) -> Tensor:
        share = t.view(-1, 1, 1, 1, 1)
        away = (z_t - (1 - share) * self.mean) / ((1 - share) ** 2 * self.deviation**2 + share**2)
        return share * away - (self.mean + (1 - share) * self.deviation**2 * away)  # E[eps - z_0 | z_t]


@pytest.mark.parametrize(("mean", "deviation"), [(1.0, 0.3), (0.0, 0.3), (0.5, 0.6), (0.5, 0.15)])
def test_against_its_direction_a_students_images_become_its_teachers(mean: float, deviation: float) -> None:
    torch.manual_seed(0)
    eps = torch.randn(512, 3, 1, 8, 8)
    x = mean + deviation * eps
    x_t, t, _ = recipe.add_noise(x)
    loss = DmdLoss(Bell(0.5, 0.3))  # type: ignore[arg-type]
    g = loss.direction(Bell(mean, deviation), x, x_t, t, x)  # type: ignore[arg-type]
    to_mean, to_deviation = float(g.mean()), float((g * eps).mean())  # the gradients of either
    if mean == 0.5:
        assert abs(to_mean) < 0.05 < abs(to_deviation) and (to_deviation > 0) == (deviation > 0.3)
    else:
        assert abs(to_mean) > 0.05 and (to_mean > 0) == (mean > 0.5)


def test_the_fake_learns_faster_by_its_factor(tmp_path: Path) -> None:
    base = pixels()
    samples, teacher = removal_samples(base, clips(2)), remover(base)
    pair = StudentAndFake(teacher)
    trained = {name: each for name, each in pair.named_parameters() if pair.trains(name)}
    groups = recipe.two_rate_adamw(pair, trained, CONFIG, 5.0).param_groups
    rates = {each: group["lr"] for group in groups for each in group["params"]}
    assert all(rates[each] == (5.0 if name.startswith("fake.") else 1.0) for name, each in trained.items())
    _, log = distil(teacher, samples, TrainConfig(steps=1, lr=1e-3, batch=2), tmp_path / "run", faster=5.0)
    assert log.settings["algorithm"] == "two_rate_adamw" and log.settings["faster"] == 5.0


@pytest.mark.parametrize("faster", [0.0, -1.0, float("nan"), float("inf")])
def test_a_fake_that_does_not_learn_is_refused(faster: float, tmp_path: Path) -> None:
    base = pixels()
    with pytest.raises(MethodError, match="learning rates of fake and student,"):
        distil(remover(base), removal_samples(base, clips(1)), CONFIG, tmp_path / "run", faster=faster)


def test_only_the_last_step_of_a_student_knows_of_gradients() -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    z = torch.randn(2, 4)
    found = euler(lambda z, t: scale * z, z, 3, True)
    found.sum().backward()
    with torch.no_grad():
        third = euler(lambda z, t: scale * z, z, 3) / (1 - scale / 3)  # before the last step
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (-third / 3).sum(), atol=1e-5, rtol=1e-4)


class Stopped(Exception):
    pass


def test_the_built_in_network_resumes_where_its_training_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano, "STEPS", {"base": 4})
    for name, value in {"COUNT": 4, "BATCH": 2, "SAVE": 2}.items():
        monkeypatch.setattr(nano, name, value)
    calls, whole = [], BaseLoss.__call__

    def counted(self: BaseLoss, *given: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return whole(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(BaseLoss, "__call__", counted)
    built = []
    for folder, stops in (("stopped", True), ("stopped", False), ("straight", False)):
        monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / folder))
        calls[:] = [] if stops else [1] * 4
        if stops:
            with pytest.raises(Stopped):
                Base.built_in("nano")
        else:
            built.append((Base.built_in("nano").network.state_dict(), len(calls) - 4))
    (again, rest), (straight, all_steps) = built
    assert (rest, all_steps) == (2, 4)
    assert all(torch.equal(again[name], each) for name, each in straight.items())
    assert not list(tmp_path.glob("*/.*.work"))


def test_what_another_version_has_begun_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    monkeypatch.setattr(nano, "STEPS", {"base": 1})
    for name, value in {"COUNT": 2, "BATCH": 2}.items():
        monkeypatch.setattr(nano, name, value)
    (tmp_path / ".refacade-base.work").mkdir()
    (tmp_path / ".refacade-base.work" / "log.json").write_text("{}")
    Base.built_in("nano")
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["refacade-base-32-1"]


@pytest.mark.parametrize("what", ["branch", "remover", "distil"])
def test_killed_training_resumes_bitwise(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pixels()
    transfer, removal = transfer_samples(base, remover(base), clips()), removal_samples(base, clips())

    def trained(out: Path) -> dict[str, Tensor]:
        if what == "branch":
            made: nn.Module = branch(base)
            train_branch(base, made, transfer, CONFIG, out)  # type: ignore[arg-type]
        elif what == "remover":
            made = remover(base)
            train_remover(made, removal, CONFIG, out, 0.5)  # type: ignore[arg-type]
        else:
            made, _ = distil(remover(base), removal, CONFIG, out)
        return made.state_dict()

    straight = trained(tmp_path / "straight")
    kind = {"branch": TransferLoss, "remover": RemoverLoss, "distil": DmdLoss}[what]
    calls, whole = [], kind.__call__

    def counted(self: object, *given: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return whole(self, *given)  # type: ignore[operator]

    monkeypatch.setattr(kind, "__call__", counted)
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped")
    monkeypatch.undo()
    torch.manual_seed(99)
    again = trained(tmp_path / "stopped")
    assert all(torch.equal(again[name], each) for name, each in straight.items())
