"""The simulated user, and the evaluation by it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import Click, Clicks, apply_clicks, regions, simulate_clicks, task_labels
from lamella.methods.agile3d.judge import CurvePoint, clicks_to, iou_at, mean_iou, nearest_click, play
from lamella.methods.agile3d.loss import click_loss, click_weights, dice_loss
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import ClickScene, Tokens, tokenise


@pytest.fixture(scope="module")
def room() -> Tokens:
    return tokenise(next(rooms("train", seed=3)), 0.12)


def drawn() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_right_prediction_gets_no_click(room: Tokens) -> None:
    assert simulate_clicks(room.objects, room.objects, room.coords, 5, drawn()) == ()


def test_from_all_background_every_object_gets_one_click_on_itself(room: Tokens) -> None:
    truth = task_labels(room.objects, [3, 1, 4])
    clicks = simulate_clicks(truth, torch.zeros_like(truth), room.coords, 3, drawn())
    assert sorted(click.label for click in clicks) == [1, 2, 3]
    assert all(int(truth[click.token]) == click.label for click in clicks)


def test_regions_are_pairs_of_truth_and_prediction_and_clicked_at_their_deepest() -> None:
    random = torch.Generator().manual_seed(0)
    coords = torch.rand(150, 3, generator=random, dtype=torch.float64)
    truth, predicted = (torch.randint(3, (150,), generator=random) for _ in range(2))
    found = regions(truth, predicted, coords)
    apart = torch.cdist(coords, coords)
    pairs = [(t, p) for t in range(3) for p in range(3) if t != p and ((truth == t) & (predicted == p)).any()]
    assert [region.label for region in found] == [t for t, _ in pairs]
    for (t, p), region in zip(pairs, found, strict=True):
        inside = (truth == t) & (predicted == p)
        depth = apart[:, ~inside].min(dim=1).values.where(inside, torch.tensor(0.0))
        assert inside[region.token]
        assert region.depth == pytest.approx(float(depth.max()))
        assert float(depth[region.token]) == pytest.approx(float(depth.max()))


def test_the_deepest_regions_are_clicked_first() -> None:
    coords = torch.arange(20.0)[:, None]
    truth = torch.tensor([1] * 7 + [0] * 6 + [2] * 3 + [0] * 4)
    none = torch.zeros_like(truth)
    assert simulate_clicks(truth, none, coords, 1, drawn()) == (Click(1, 0),)  # at the edge, 7 cells from what is right
    assert sorted(simulate_clicks(truth, none, coords, 2, drawn())) == [Click(1, 0), Click(2, 14)]


def test_a_region_without_an_outside_is_clicked_somewhere() -> None:
    ones = torch.ones(4, dtype=torch.long)
    assert simulate_clicks(ones, 0 * ones, torch.rand(4, 3), 1, drawn()) == (Click(1, 0),)


def test_chosen_objects_are_numbered_and_all_else_is_background() -> None:
    assert task_labels(torch.tensor([-1, 0, 4, 2, 7, 4]), [4, 2]).tolist() == [0, 0, 1, 2, 0, 1]


def test_the_latest_click_of_a_token_wins_and_predictions_stay_as_they_are() -> None:
    predicted = torch.tensor([0, 1, 2])
    assert apply_clicks(predicted, (Click(2, 0), Click(0, 2), Click(1, 0))).tolist() == [1, 1, 0]
    assert predicted.tolist() == [0, 1, 2]


def test_quality_is_the_mean_over_objects_of_the_iou_of_points() -> None:
    labels, truth = torch.tensor([1, 1, 0, 2, 2, 2]), torch.tensor([1, 1, 1, 2, 0, 0])
    assert mean_iou(labels, truth, 2) == pytest.approx((2 / 3 + 1 / 3) / 2)
    with pytest.raises(CalibrationError, match="object 3 of 3 has no point"):
        mean_iou(labels, truth, 3)


def test_measures_of_a_curve_by_hand() -> None:
    reached = [CurvePoint(0, 0.0), CurvePoint(1, 0.5), CurvePoint(1.5, 0.81), CurvePoint(2, 0.85)]
    never = [CurvePoint(0, 0.0), CurvePoint(1, 0.3), CurvePoint(1.5, 0.4), CurvePoint(2, 0.45)]
    assert iou_at([reached, never], 1) == pytest.approx(0.4)
    assert iou_at([reached, never], 2) == pytest.approx(0.65)
    assert clicks_to([reached, never], 0.8, budget=2) == pytest.approx((1.5 + 2) / 2)
    assert clicks_to([reached, never], 0.4, budget=2) == pytest.approx((1 + 1.5) / 2)


def test_a_perfect_answer_ends_the_clicks_and_its_quality_stands_for_the_rest(room: Tokens) -> None:
    sequences: list[Clicks] = []

    def right(clicks: Clicks) -> Tensor:
        sequences.append(clicks)
        return task_labels(room.objects, [1, 2])

    curve = play(right, room, [1, 2], budget=3)
    assert [each.clicks for each in curve] == [0, 1, 1.5, 2, 2.5, 3]
    assert curve[0].iou == 0 and len({each.iou for each in curve[1:]}) == 1
    assert {len(clicks) for clicks in sequences} == {2}


def test_a_round_adds_one_click_and_is_judged_at_every_point_after_clicks_count(room: Tokens) -> None:
    sequences: list[Clicks] = []

    def nothing(clicks: Clicks) -> Tensor:
        sequences.append(clicks)
        return torch.zeros(len(room), dtype=torch.long)

    curve = play(nothing, room, [2, 5], budget=2)
    assert [len(clicks) for clicks in sequences] == [2, 3, 4]
    assert all(before == after[: len(before)] for before, after in pairwise(sequences))
    labels = apply_clicks(torch.zeros(len(room), dtype=torch.long), sequences[0])[room.of_point]
    assert room.scene.objects is not None
    truth = task_labels(torch.from_numpy(room.scene.objects), [2, 5])
    assert curve[1].iou == mean_iou(labels, truth, 2) > 0


def test_without_training_a_token_has_the_label_of_the_nearest_click(room: Tokens) -> None:
    clicks = (Click(1, 5), Click(2, 300), Click(0, 40))
    labels = nearest_click(room)(clicks)
    apart = torch.stack([(room.coords - room.coords[click.token]).norm(dim=1) for click in clicks])
    assert labels.tolist() == [clicks[each].label for each in apart.argmin(dim=0).tolist()]


def test_dice_over_classes_is_one_minus_the_probability_of_the_true_one() -> None:
    logits, truth = torch.randn(30, 4), torch.randint(4, (30,))
    probability = logits.softmax(dim=1)[torch.arange(30), truth]
    torch.testing.assert_close(dice_loss(logits, truth, "token"), 1 - probability, atol=1e-6, rtol=0)
    each = [
        1 - 2 * logits.softmax(1)[truth == k, k].sum() / (logits.softmax(1)[:, k].sum() + (truth == k).sum())
        for k in range(4)
    ]
    torch.testing.assert_close(dice_loss(logits, truth, "class"), torch.stack(each))
    assert not torch.isclose(dice_loss(logits, truth, "class").mean(), dice_loss(logits, truth, "token").mean())


def test_tokens_count_for_more_near_a_click() -> None:
    coords = torch.tensor([[0.0, 0, 0], [0.15, 0, 0], [0.3, 0, 0], [5, 0, 0]])
    torch.testing.assert_close(click_weights(coords, (Click(1, 0),), 0.3), torch.tensor([2.0, 1.4, 0.8, 0.8]))
    nearest_counts = click_weights(coords, (Click(1, 0), Click(2, 3)), 0.3)
    torch.testing.assert_close(nearest_counts, torch.tensor([2.0, 1.4, 0.8, 2.0]))


def test_the_loss_adds_up_layers_by_hand() -> None:
    layers, truth, weights = [torch.randn(5, 3) for _ in range(2)], torch.tensor([0, 1, 2, 1, 0]), torch.rand(5)
    expected = 0.0
    for logits in layers:
        for i in range(5):
            p = float(logits[i].softmax(0)[truth[i]])
            expected += float(weights[i]) * (-np.log(p) + 2 * (1 - p)) / 5
    loss, parts = click_loss(layers, truth, weights)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(parts["cross-entropy"] + 2 * parts["dice"]) == pytest.approx(expected, rel=1e-5)


def test_a_scene_that_cannot_be_used_is_refused_in_one_line() -> None:
    one, grey = np.zeros((1, 3), np.float32), np.full((1, 3), 0.5, np.float32)
    with pytest.raises(CalibrationError, match="no points"):
        ClickScene(one[:0], grey[:0])
    with pytest.raises(CalibrationError, match="position of point 0 is not finite"):
        ClickScene(one + np.float32("nan"), grey)
    with pytest.raises(CalibrationError, match="1 points and 2 objects"):
        ClickScene(one, grey, np.array([1, 2]))
    far = np.array([[0, 0, 0], [1e9, 0, 0]], np.float32)
    with pytest.raises(CalibrationError, match="larger cell size"):
        tokenise(ClickScene(far, np.zeros((2, 3), np.float32)), 0.05)


def test_a_token_stands_for_the_points_of_its_cell_through_the_first_of_them(room: Tokens) -> None:
    coords = torch.from_numpy(room.scene.coords)
    cells = ((coords.double() - coords.double().min(dim=0).values) / 0.12).floor().long()
    assert torch.equal(room.cells[room.of_point], cells)
    first = torch.tensor([int((room.of_point == token).nonzero()[0]) for token in range(0, len(room), 97)])
    assert torch.equal(room.kept[::97], first)


def test_rooms_are_the_same_again_and_those_of_the_two_parts_differ() -> None:
    first, again, other = (next(rooms(part, seed=1)) for part in ("train", "train", "test"))
    assert first.digest == again.digest != other.digest
    assert first.objects is not None
    assert 5 <= first.objects.max() <= 9 and len(first) > 10_000
