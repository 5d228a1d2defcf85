"""The commands as a user meets them: training, reading back, tuning, judging, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.errors import CalibrationError, CheckpointError, MethodError
from lamella.files import Work
from lamella.methods.muranet import (
    FloorPlan,
    FloorPlans,
    LossBalance,
    PlanNetwork,
    PlanTraining,
    Recogniser,
    RecogniserShape,
    branch,
    judge,
    muranet,
    read,
    recognise,
    stages_worth,
    synthetic_floor_plan,
    tune,
)
from lamella.methods.muranet.recipe import train_network
from lamella.train import TrainConfig, TrainingLog
from lamella.zoo.opening import Preference

SMALL = RecogniserShape(encoder="nano", size=64, scales=1, neck=8)
PLANS = FloorPlans.of([synthetic_floor_plan(seed, 64) for seed in range(6)])
CONFIG = TrainConfig(steps=2, lr=1e-3, batch=2, clip=1e6)


@pytest.fixture(scope="module")
def found() -> Recogniser:
    return muranet(PLANS, shape=SMALL, config=CONFIG)


@torch.no_grad()
def same(one: Recogniser, other: Recogniser) -> bool:
    ours, theirs = (recognise(each.model, PLANS[0], each.shape.frame, score=0.001) for each in (one, other))
    assert ours.walls is not None and theirs.walls is not None
    return np.array_equal(ours.walls, theirs.walls) and torch.equal(ours.boxes, theirs.boxes)


def test_what_is_written_is_read_back(found: Recogniser, tmp_path: Path) -> None:
    found.write(tmp_path)
    again = Recogniser.read(tmp_path)
    assert same(found, again) and again.describe() == found.describe() and again.log == found.log


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "local-dir:/tmp"},
        {"size": 10**9},
        {"scales": 10**6},
        {"size": 5},
        {"neck": 16},
        {"more": 1},
        {"schema": "lamella.muranet/9"},
        {"classes": []},
        {"insert": [77]},
    ],
)
def test_a_damaged_folder_is_one_line(found: Recogniser, tmp_path: Path, change: dict[str, object]) -> None:
    found.write(tmp_path)
    result = json.loads((tmp_path / "network.json").read_text())
    inner = {name: value for name, value in change.items() if name not in ("more", "schema", "classes")}
    result |= {"shape": result["shape"] | inner} if inner else change
    (tmp_path / "network.json").write_text(json.dumps(result))
    with pytest.raises(CheckpointError, match="no recogniser") as error:
        Recogniser.read(tmp_path)
    assert "\n" not in str(error.value)


def test_inserting_and_splitting_change_nothing_at_first(found: Recogniser) -> None:
    changed = found.changed(insert=(0, 3), split=2)
    assert changed.shape.insert == (0, 3) and changed.shape.split == 2 and same(found, changed)
    with pytest.raises(MethodError, match="inserted already"):
        changed.changed(insert=(3,))
    with pytest.raises(MethodError, match="shares 2 stages"):
        changed.changed(split=3)
    with pytest.raises(MethodError, match="from 0 to 4"):
        found.changed(insert=(5,))


def test_tuning_holds_what_is_frozen_and_trains_what_is_inserted(found: Recogniser, tmp_path: Path) -> None:
    done = tune(found, PLANS, insert=(1,), split=3, training=PlanTraining(frozen=3), config=CONFIG)
    ours, theirs = done.model.encoder.stages, found.model.encoder.stages
    for n in (0, 2):
        for a, b in zip(ours[n].state_dict().values(), theirs[n].state_dict().values(), strict=True):
            assert torch.equal(a, b)
    stage, block = ours[1][0], ours[1][1]  # type: ignore[index]
    for a, b in zip(stage.state_dict().values(), theirs[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert block.g1.abs().max() > 0
    done.write(tmp_path)
    assert same(Recogniser.read(tmp_path), done)


def test_a_network_of_timm_trains_on_frozen_stages(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    shape = replace(SMALL, encoder="resnet18", insert=(2,))
    done = muranet(PLANS, shape=shape, training=PlanTraining(frozen=5), config=CONFIG)
    assert not any(each.training for each in done.model.modules())
    done.write(tmp_path)
    assert same(Recogniser.read(tmp_path), done)
    assert done.model.encoder.stages[2][1].g1.abs().max() > 0  # type: ignore[index]


def test_weights_of_a_timm_network_are_taken_from_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "convnext_atto"):
        whole = timm.create_model(name, pretrained=False)
        save_file({key: each.contiguous() for key, each in whole.state_dict().items()}, tmp_path / "w.safetensors")
        model = replace(SMALL, encoder=name, size=64).build(2, tmp_path / "w.safetensors").eval()
        features = timm.create_model(name, features_only=True, pretrained=False).eval()
        given = whole.state_dict()
        features.load_state_dict({key: given.get(key, given.get(key.replace("_", ".", 1))) for key in
                                  features.state_dict()})  # fmt: skip
        pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
        scaled = (pixels.float() / 255 - model.encoder.mean) / model.encoder.spread
        with torch.no_grad():
            for a, b in zip(model.encoder(pixels)[0], features(scaled), strict=True):
                assert torch.equal(a, b)
    tensors = load_file(tmp_path / "w.safetensors")
    save_file(dict(list(tensors.items())[:5]), tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match="not weights of convnext_atto"):
        replace(SMALL, encoder="convnext_atto").build(2, tmp_path / "less.safetensors")


class PlanOutput:
    """A training that is looked at: the network before and after it, and its log."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.networks: list[PlanNetwork] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.logs: list[TrainingLog] = []
        module = import_module("lamella.methods.muranet.branch")  # whose name is a command's, too
        patch.setattr(module, "train_network", self)

    def __call__(self, network: PlanNetwork, *given: Any, **how: Any) -> TrainingLog:
        self.networks.append(network)
        self.before.append({name: each.clone() for name, each in network.state_dict().items()})
        self.logs.append(train_network(network, *given, **how))
        return self.logs[-1]


def test_a_block_is_tried_on_a_network_that_stays_as_it_is_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    shape = replace(SMALL, encoder="mobilenetv3_small_050")  # whose norms hold an activation, and so have children
    given = Recogniser(model=shape.build(2).eval(), shape=shape, classes=PLANS.classes, log=TrainingLog({}))
    seen = PlanOutput(monkeypatch)
    stages_worth(given, PLANS, stages=(1,), config=CONFIG)
    after = seen.networks[0].state_dict()
    moved = {name for name, each in seen.before[0].items() if not torch.equal(each, after[name])}
    assert moved and all(name.startswith("encoder.stages.1.1.") for name in moved)
    assert {name.rpartition(".")[2] for name in moved} > {"g1", "running_mean"}


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "gradnorm"])
def test_stages_are_judged_by_the_weights_of_the_beginning(
    weighting: Any, found: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = PlanOutput(monkeypatch)
    balance = LossBalance(weighting=weighting, wall_weight=3.0, pace=0.5)
    fast = replace(CONFIG, lr=0.1)
    row = stages_worth(found, PLANS, stages=(1,), balance=balance, config=fast).findings["gains"][0]
    walls, openings = (1, 1) if weighting == "uncertainty" else (3, 1)
    for name, point in (("before", seen.logs[0].held_out[0]), ("after", seen.logs[0].held_out[-1])):
        assert row[name] == pytest.approx(walls * point.parts["walls"] + openings * point.parts["openings"])
    assert row["gain"] == pytest.approx(walls * row["walls"] + openings * row["openings"])
    if weighting == "fixed":
        assert row["after"] == pytest.approx(seen.logs[0].held_out[-1].loss)


def test_networks_are_where_lamella_keeps_them(
    found: Recogniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.write(tmp_path)
    monkeypatch.setattr("lamella.methods.muranet.result.preference", lambda: Preference(device="meta"))
    again = Recogniser.read(tmp_path)
    assert all(each.is_meta for each in again.model.state_dict().values())
    assert all(each.is_meta for each in again.changed(insert=(1,), split=2).model.state_dict().values())
    placed = []
    monkeypatch.setattr("lamella.methods.muranet.method.train_network", lambda model, *_, **__: placed.append(model))
    for run in (lambda: muranet(PLANS, shape=SMALL, config=CONFIG), lambda: tune(found, PLANS, config=CONFIG)):
        with pytest.raises(AttributeError):  # of the log that there is not
            run()
    assert len(placed) == 2 and all(each.is_meta for model in placed for each in model.parameters())


def test_what_the_zoo_has_beside_encoders_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.methods.muranet.method.pull", lambda name: pytest.fail(f"{name} was fetched"))
    for name in ("smollm2", "gsm8k", "humaneval"):
        with pytest.raises(MethodError, match=f"timm has no network '{name}'"):
            muranet(PLANS, shape=replace(SMALL, encoder=name), config=CONFIG)


@pytest.mark.parametrize("change", [
    {"tasks": "walls"}, {"tasks": "openings"}, {"head": "coupled"}, {"spp": True}, {"norm": "group"}, {"deep": True},
    {"attention": "gate"}, {"attention": "local_softmax"}, {"attention": "depthwise"}, {"split": 0},
    {"letterbox": True}, {"paths": "parallel"},
])  # fmt: skip
def test_every_shape_trains_and_is_read_back(change: dict[str, object], tmp_path: Path) -> None:
    shape = replace(SMALL, **change)  # type: ignore[arg-type]
    config = TrainConfig(steps=1, lr=1e-3, batch=2, clip=1e6)
    done = muranet(PLANS, shape=shape, config=config)
    done.write(tmp_path)
    again = Recogniser.read(tmp_path)
    for name, each in done.model.state_dict().items():
        assert torch.equal(each, again.model.state_dict()[name])
    if shape.tasks == "both":
        pytest.importorskip("pycocotools")
        result = judge(again, FloorPlans.of(PLANS[:2])).findings
        assert 0 <= result["wall iou"] <= 1 and set(result["openings"]) == {"door", "window"}


@pytest.mark.parametrize("how", [{"bf16": True}, {"accumulate": 2}])
def test_it_trains_in_half_precision_and_over_several_passes(how: dict[str, object]) -> None:
    done = muranet(PLANS, shape=SMALL, config=replace(CONFIG, **how))  # type: ignore[arg-type]
    assert all(torch.isfinite(each).all() for each in done.model.state_dict().values())
    assert np.isfinite(done.findings["loss"]).all()


def test_the_larger_encoders_have_more_stages() -> None:
    with torch.device("meta"):
        found = [RecogniserShape(encoder=name).build(2).encoder for name in ("mura", "mura-5", "mura-6")]
    assert [each.strides[-1] for each in found] == [32, 64, 128]
    assert found[0].channels == (32, 64, 128, 256, 512) and len(found[2].stages) == 7


def test_tasks_that_part_at_once_train_as_two_networks(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, lr=1e-3, batch=2, clip=1e6, save_every=2)
    x = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    found = {}
    for name, parts in (("parted", {"split": 0}), ("walls", {"tasks": "walls"}), ("openings", {"tasks": "openings"})):
        network = muranet(PLANS, shape=replace(SMALL, **parts), config=config, work=Work(tmp_path / name)).model
        with torch.no_grad():
            found[name] = network(x)
    assert torch.equal(found["parted"].walls[-1], found["walls"].walls[-1])
    assert torch.equal(found["parted"].cells, found["openings"].cells)


def test_plans_of_other_classes_or_without_labels_are_refused(found: Recogniser) -> None:
    other = replace(PLANS, classes=("door", "hatch"))
    with pytest.raises(CalibrationError, match="the model has door, window"):
        judge(found, other)
    bare = FloorPlans.of([FloorPlan("bare.png", PLANS[0].image)])
    for run in (lambda: muranet(bare, shape=SMALL), lambda: branch(found, bare), lambda: stages_worth(found, bare)):
        with pytest.raises(CalibrationError, match=r"bare\.png has no bare\.walls\.png"):
            run()
    assert len(read(found, bare).findings["plans"]) == 1  # which reads what nobody has labelled


def test_one_task_alone_has_no_branch_point() -> None:
    alone = muranet(PLANS, shape=replace(SMALL, tasks="walls"), config=CONFIG)
    with pytest.raises(MethodError, match="share no stage"):
        branch(alone, PLANS)
    with pytest.raises(MethodError, match="the task walls only"):
        stages_worth(alone, PLANS)


@torch.no_grad()
def test_gradients_that_overflow_propose_no_branch_point() -> None:
    found = muranet(PLANS, shape=SMALL, config=CONFIG)
    for each in found.model.encoder.stages[4].parameters():
        each.fill_(1e30)
    with pytest.raises(MethodError, match=f"{PLANS[0].name}.* are not finite"):
        branch(found, PLANS)


def test_shapes_that_do_not_fit_their_encoder_are_refused_in_one_line() -> None:
    for run in (
        lambda: RecogniserShape(encoder="resnet18", spp=True),
        lambda: replace(SMALL, finest=5).build(2),
        lambda: RecogniserShape(encoder="nano", size=64).build(2, Path("weights.safetensors")),
    ):
        with pytest.raises(MethodError) as error:
            run()
        assert "\n" not in str(error.value)
