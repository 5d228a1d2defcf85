"""Sessions, the files that they read and write, and training that makes their models."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lamella.data import InputContext
from lamella.errors import CalibrationError, CheckpointError, MethodError
from lamella.files import Work
from lamella.methods.agile3d import (
    ClickLog,
    ClickScene,
    ClickSegmenter,
    ClickSimulation,
    Scenes,
    Segmenter,
    SegmenterShape,
    Session,
    agile3d,
    judge,
    read_ply,
    rooms,
    write_ply,
)
from lamella.methods.agile3d.clicks import task_labels
from lamella.methods.agile3d.recipe import Statistics, augment_scene, simulate_rounds
from lamella.train import TrainConfig

SMALL = SegmenterShape("nano", 0.25, hidden=16, heads=2, feedforward=32, layers=2, background=3)
BRIEF = TrainConfig(steps=4, lr=1e-3, batch=2, save_every=2, seed=1)
PRACTICE = ClickSimulation(rounds=3)


def two_rooms(part: str = "train") -> Scenes:
    return Scenes.open("rooms", InputContext(seed=5, split="test" if part == "test" else "calibration"), count=2)


@pytest.fixture(scope="module")
def found() -> Segmenter:
    return agile3d(two_rooms(), shape=SMALL, simulation=PRACTICE, config=BRIEF)


@pytest.fixture
def session(found: Segmenter) -> Session:
    return Session(found.model, next(rooms("test", seed=2)))


def test_a_saved_session_is_played_again_to_the_same_labels(session: Session, found: Segmenter, tmp_path: Path) -> None:
    for label, point in ((1, 15_000), (2, 16_000), (0, 3), (1, 15_500)):
        session.add(label, point)
    session.save(tmp_path / "clicks.json")
    again = Session(found.model, session.scene)
    again.replay(ClickLog.read(tmp_path / "clicks.json"))
    assert again.clicks == session.clicks
    assert torch.equal(again.labels(), session.labels())
    assert (tmp_path / "clicks.json").read_text() == again.log.dump()


def test_what_is_undone_was_never_clicked(session: Session) -> None:
    assert not session.labels().any()
    session.add(1, 15_000)
    before = session.labels()
    session.add(2, 40)
    session.undo()
    assert torch.equal(session.labels(), before) and len(session.log.clicks) == 1
    session.undo()
    assert not session.labels().any()
    with pytest.raises(CalibrationError, match="no click to undo"):
        session.undo()


def test_a_click_that_cannot_be_is_refused_and_the_session_goes_on(session: Session) -> None:
    session.add(1, 10)
    before = session.labels()
    for label, point, message in (
        (1, -1, "outside"),
        (1, len(session.scene), "outside"),
        (65, 0, "object 65"),
        (-1, 0, "-1"),
    ):
        with pytest.raises(CalibrationError, match=message):
            session.add(label, point)
    for eye, direction in (([50.0, 0, 5], [0, 0, -1]), ([2.0, 2, 5], [0, 0, 1]), ([float("nan"), 0, 0], [0, 0, 1])):
        with pytest.raises(CalibrationError, match="no point of room"):
            session.add_seen(1, np.array(eye), np.array(direction), reach=0.1)
    assert torch.equal(session.labels(), before) and len(session.clicks) == 1


def test_a_look_strikes_the_first_surface_along_its_line_and_there_the_point_closest_to_it(session: Session) -> None:
    eye, direction = np.array([2.0, -3.0, 2.5]), np.array([0.1, 2.0, -0.9])
    point = session.add_seen(2, eye, direction, reach=0.05)
    unit = direction / np.linalg.norm(direction)
    away = [(float((p - eye) @ unit), float(np.linalg.norm(np.cross(p - eye, unit)))) for p in session.scene.coords]
    in_sight = [n for n, (along, beside) in enumerate(away) if along > 0 and beside <= 0.05]
    nearest = min(away[n][0] for n in in_sight)
    surface = [n for n in in_sight if away[n][0] <= nearest + 0.05]
    assert len(in_sight) > len(surface) > 1 and point == min(surface, key=lambda n: away[n][1])
    assert session.log.clicks == ((2, point),)


def test_clicks_on_another_scene_are_refused_and_change_nothing(session: Session, found: Segmenter) -> None:
    session.add(1, 5)
    other = Session(found.model, next(rooms("test", seed=3)))
    other.add(1, 8)
    for log, message in (
        (session.log, "another scene"),
        (ClickLog(other.scene.digest, ((1, 3), (1, 10**9))), "outside"),
    ):
        with pytest.raises(CalibrationError, match=message):
            other.replay(log)
        assert other.log.clicks == ((1, 8),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": "lamella.clicks/2", "scene": "a", "clicks": []}',
        '{"schema": "lamella.clicks/1", "clicks": []}',
        '{"schema": "lamella.clicks/1", "scene": "a"}',
        '{"schema": "lamella.clicks/1", "scene": "a", "clicks": [{"object": 1}]}',
        '{"schema": "lamella.clicks/1", "scene": "a", "clicks": [{"object": true, "point": 1.5}]}',
        "[" * 5000,
    ],
)
def test_what_is_no_log_of_clicks_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "clicks.json"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=r"clicks\.json") as error:
        ClickLog.read(file)
    assert "\n" not in str(error.value)


# PLY


def points(count: int = 7) -> ClickScene:
    drawn = np.random.default_rng(0)
    colours = (drawn.integers(0, 256, (count, 3)) / 255).astype(np.float32)
    return ClickScene(drawn.normal(size=(count, 3)).astype(np.float32), colours, np.arange(count) - 1)


def test_points_that_are_written_are_read_back(tmp_path: Path) -> None:
    scene = points()
    assert scene.objects is not None
    write_ply(tmp_path / "scene.ply", scene, scene.objects)
    again = read_ply(tmp_path / "scene.ply")
    assert again.digest == scene.digest
    assert np.array_equal(again.objects, scene.objects)  # type: ignore[arg-type]


HEADER = "element vertex 3\nproperty double x\nproperty double y\nproperty double z\nproperty short object\n"
FACES = "element face 1\nproperty list uchar int vertex_indices\n"
VALUES: NDArray[np.float64] = np.array([[0.5, 1, 2], [-3, 4, 5.25], [6, 7, 8]])


def ply(form: str, header: str = HEADER + FACES) -> bytes:
    """Three points as other programs write them, with a face behind them."""
    head = f"ply\r\nformat {form} 1.0\ncomment of a test\n{header}end_header\n".encode()
    if form == "ascii":
        return head + b"0.5 1 2 1\n-3 4 5.25 -7\n6 7 8 2\n3 0 1 2\n"
    order = ">" if form.endswith("big_endian") else "<"
    rows = np.empty(3, [("xyz", f"{order}f8", 3), ("object", f"{order}i2")])
    rows["xyz"], rows["object"] = VALUES, [1, -7, 2]
    return head + rows.tobytes() + b"\x03" + np.arange(3, dtype=f"{order}i4").tobytes()


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_each_form_is_read_with_faces_passed_over_and_no_colour_black(form: str, tmp_path: Path) -> None:
    file = tmp_path / "scene.ply"
    file.write_bytes(ply(form))
    scene = read_ply(file)
    assert np.array_equal(scene.coords, VALUES.astype(np.float32)) and not scene.colours.any()
    assert scene.objects is not None and scene.objects.tolist() == [1, -1, 2]


@pytest.mark.parametrize("name", ["object", "instance"])
def test_what_numbers_objects_is_read_as_such(name: str, tmp_path: Path) -> None:
    file = tmp_path / "scene.ply"
    classes = HEADER.replace("property short object", f"property short {name}\nproperty short label")
    file.write_bytes(
        ply("ascii", classes + FACES)
        .replace(b"1 2 1\n", b"1 2 1 5\n")
        .replace(b"-7", b"-7 5")
        .replace(b"8 2", b"8 2 6")
    )
    assert read_ply(file).objects.tolist() == [1, -1, 2]  # type: ignore[union-attr]
    assert read_ply(file, "label").objects.tolist() == [5, 5, 6]  # type: ignore[union-attr]
    assert read_ply(file, "none").objects is None
    with pytest.raises(CalibrationError, match=r"scene\.ply: its vertices have no 'part': give instances none, or one"):
        read_ply(file, "part")


def test_labels_that_may_be_classes_are_not_taken_for_objects(tmp_path: Path) -> None:
    """A folder of a data set with semantic labels would train on one object per class, without a word."""
    file = tmp_path / "scene.ply"
    file.write_bytes(ply("ascii", HEADER.replace("object", "label")))
    with pytest.raises(
        CalibrationError, match=r"'label' may number classes, not objects: give instances label"
    ) as error:
        Scenes.open(tmp_path, InputContext())
    assert "scene.ply" in str(error.value) and "instances none" in str(error.value) and "\n" not in str(error.value)
    (chosen,) = Scenes.open(tmp_path, InputContext(), instances="label")
    (plain,) = Scenes.open(tmp_path, InputContext(), instances="none")
    assert chosen.objects is not None and chosen.objects.tolist() == [1, -1, 2] and plain.objects is None


BINARY = ply("binary_little_endian")
HOSTILE = {
    "nothing": (b"", "no header"),
    "another format": (b"\x89PNG\r\n", "no header"),
    "no end": (b"ply\nformat ascii 1.0\n" + b"comment\n" * 10_000, "no header"),
    "no format": (b"ply\nelement vertex 0\nend_header\n", "names no format"),
    "an unknown word": (b"ply\nformat ascii 1.0\nimport os\nend_header\n", "import os"),
    "not of this world": (b"ply\nformat ascii 1.0\n\xff\xfe\nend_header\n", "ascii"),
    "no vertices": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "no element 'vertex'"),
    "no height": (ply("ascii", HEADER.replace("property double z\n", "")), "no 'z'"),
    "cut short": (BINARY[:-30], "truncated"),
    "more than it holds": (BINARY.replace(b"vertex 3", b"vertex 3000000000000000"), "truncated"),
    "fewer lines": (ply("ascii").replace(b"vertex 3", b"vertex 9"), "truncated"),
    "words": (ply("ascii").replace(b"5.25", b"five"), "five"),
    "too few values": (ply("ascii").replace(b"1\n-3 4 5.25 -7\n6 7 8 2", b"\n1 2 3\n1 2 3"), "4 values each"),
    "a point that is nowhere": (ply("ascii").replace(b"5.25", b"nan"), "not finite"),
    "a point out of reach": (ply("ascii").replace(b"5.25", b"1e300"), "not finite"),
    "half an object": (ply("ascii").replace(b"-7", b"0.5"), "not an integer"),
    "no point": (ply("ascii", HEADER.replace("vertex 3", "vertex 0")), "no points"),
    "lists first": (ply("binary_little_endian", FACES + HEADER), "lists"),
    "twice the same": (ply("ascii", HEADER + "property float x\n"), "property float x"),
    "bright colours": (
        b"ply\nformat ascii 1.0\nelement vertex 1\n"
        + b"".join(b"property float %s\n" % name for name in (b"x", b"y", b"z", b"red", b"green", b"blue"))
        + b"end_header\n0 0 0 255 0 0\n",
        "outside 0 to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_ply_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    file = tmp_path / "scene.ply"
    file.write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as error:
        read_ply(file)
    assert "scene.ply" in str(error.value) and "\n" not in str(error.value)


def test_any_damage_to_a_ply_is_refused_or_harmless(tmp_path: Path) -> None:
    drawn, file = np.random.default_rng(0), tmp_path / "scene.ply"
    for form in ("ascii", "binary_little_endian"):
        whole = np.frombuffer(ply(form), np.uint8)
        for _ in range(300):
            damaged = whole[: drawn.integers(1, len(whole) + 1)].copy()
            damaged[drawn.integers(len(damaged), size=3)] = drawn.integers(0, 256, 3)
            file.write_bytes(damaged.tobytes())
            try:
                assert 0 < len(read_ply(file)) <= 3
            except CalibrationError as error:
                assert "\n" not in str(error)


def test_scenes_come_from_a_file_a_folder_or_chance(tmp_path: Path) -> None:
    for number in range(3):
        scene = points(5 + number)
        write_ply(tmp_path / f"{number}.ply", scene, np.zeros(len(scene), np.int64))
    reader = InputContext()
    assert [len(each) for each in Scenes.open(tmp_path, reader, count=2)] == [5, 6]
    assert [len(each) for each in Scenes.open(tmp_path / "2.ply", reader)] == [7]
    assert {each.digest for each in two_rooms()}.isdisjoint(each.digest for each in two_rooms("test"))
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "no .ply file, no image, and no scan"),
        ("chairs", "no scenes 'chairs'"),
        ("no.ply", "cannot be read"),
    ):
        with pytest.raises(CalibrationError, match=message):
            Scenes.open(path, reader)


def test_scenes_of_a_folder_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    for number in range(2):
        write_ply(tmp_path / f"{number}.ply", points(5), np.zeros(5, np.int64))
    found = Scenes.open(tmp_path, InputContext())
    write_ply(tmp_path / "1.ply", points(9), np.zeros(9, np.int64))
    assert [len(each) for each in found] == [5, 9]


# Data sets


def scannet(folder: Path, labels: dict[str, list[int]], segments: list[int]) -> Path:
    """A scan as ScanNet has it: seven points on a mesh, in segments, which objects are made of."""
    folder.mkdir(parents=True)
    write_ply(folder / f"{folder.name}_vh_clean_2.ply", points(), np.zeros(7, np.int64))
    groups = [{"objectId": n, "label": label, "segments": each} for n, (label, each) in enumerate(labels.items())]
    documents = {"_vh_clean_2.0.010000.segs.json": {"segIndices": segments}, ".aggregation.json": {"segGroups": groups}}
    for suffix, document in documents.items():
        (folder / f"{folder.name}{suffix}").write_text(json.dumps(document))
    return folder


def test_a_scan_of_scannet_has_its_objects_and_nothing_of_walls_and_floors(tmp_path: Path) -> None:
    labels = {"wall": [3], "chair": [8, 1], "table": [40]}
    scan = scannet(tmp_path / "scans" / "scene0000_00", labels, [8, 3, 1, 40, 5, 3, 8])
    for given in (scan, tmp_path / "scans", tmp_path):
        (found,) = Scenes.open(given, InputContext())
        assert found.name == "scene0000_00" and found.objects is not None
        assert found.objects.tolist() == [2, 0, 2, 3, -1, 0, 2]  # segment 5 is nobody's
        assert np.array_equal(found.coords, points().coords)
    (scan / "scene0000_00.aggregation.json").unlink()  # as in the test split
    assert Scenes.open(scan, InputContext()).scenes[0].objects is None


def test_a_scan_whose_files_do_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    for number, segments in enumerate(([1, 2], [1, 2, 3, 4, 5, 6, -7], [1, 2, 3, 4, 5, 6, 10**12])):
        scan = scannet(tmp_path / f"scene{number}", {"chair": [1]}, segments)
        with pytest.raises(CalibrationError, match="do not fit its points") as error:
            Scenes.open(scan, InputContext())
        assert "\n" not in str(error.value)
    for text in ("{", '{"segGroups": 7}', '{"segGroups": [{"label": "chair"}]}', "[]"):
        (scan / f"{scan.name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": [0] * 7}))
        (scan / f"{scan.name}.aggregation.json").write_text(text)
        with pytest.raises(CalibrationError, match=f"{scan.name}.*download the scan again") as error:
            Scenes.open(scan, InputContext())
        assert "\n" not in str(error.value)


def s3dis(folder: Path, objects: dict[str, str]) -> Path:
    """A room as S3DIS has it: a text file of points for each object."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / f"{folder.name}.txt").write_text("".join(objects.values()))
    for name, text in objects.items():
        (folder / "Annotations" / f"{name}.txt").write_text(text)
    return folder


def test_a_room_of_s3dis_has_an_object_for_each_file(tmp_path: Path) -> None:
    objects = {"ceiling_1": "0 0 3 255 0 51\n", "chair_1": "1 0 0 0 0 0\n1 0 1 0 0 0\n", "chair_2": "2 2 0.5 0 0 0\n"}
    room = s3dis(tmp_path / "Area_1" / "office_1", objects)
    for given in (room, tmp_path / "Area_1", tmp_path):
        (found,) = Scenes.open(given, InputContext())
        assert found.name == "Area_1/office_1" and found.stem == "Area_1-office_1"
        assert found.objects is not None and found.objects.tolist() == [0, 2, 2, 3]
        assert found.coords.tolist() == [[0, 0, 3], [1, 0, 0], [1, 0, 1], [2, 2, 0.5]]
        np.testing.assert_allclose(found.colours[0], [1, 0, 0.2])


@pytest.mark.parametrize(
    "text", ["1 2 3 4 5\n", "1 2 3 4 5 6\n1 2\x10 3 4 5 6\n", "a b c d e f\n", "", "1 2 3 300 0 0\n"]
)
def test_a_damaged_room_of_s3dis_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    room = s3dis(tmp_path / "Area_5" / "hallway_6", {"chair_1": text})
    with pytest.raises(CalibrationError, match=r"hallway_6.*download the room again") as error:
        Scenes.open(room, InputContext())
    assert "\n" not in str(error.value)


# Training


def test_training_changes_every_part_and_its_statistics(found: Segmenter) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BRIEF.seed)
        fresh = SMALL.build().state_dict()
    changed = {name for name, each in found.model.state_dict().items() if not torch.equal(each, fresh[name])}
    assert fresh.keys() - changed <= {"decoder.place.G"}


class Stop(Exception):
    """What a kill is here."""


def test_training_that_was_stopped_goes_on_to_the_bit(
    found: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, save = Work(tmp_path), Statistics.save

    def stops(self: Statistics, folder: Path) -> None:
        save(self, folder)
        if folder.name == "checkpoint-4":
            raise Stop

    monkeypatch.setattr(Statistics, "save", stops)
    with pytest.raises(Stop):
        agile3d(two_rooms(), shape=SMALL, simulation=PRACTICE, config=BRIEF, work=work)
    monkeypatch.setattr(Statistics, "save", save)
    again = agile3d(two_rooms(), shape=SMALL, simulation=PRACTICE, config=BRIEF, work=work)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name


def test_a_model_is_read_back_and_a_damaged_one_refused(found: Segmenter, tmp_path: Path) -> None:
    found.write(tmp_path)
    again = Segmenter.read(tmp_path)
    assert again.describe() == found.describe() and again.shape == SMALL
    scene = next(rooms("test"))
    for model in (found.model, again.model):
        assert isinstance(model, ClickSegmenter) and not model.training
    ours, theirs = (Session(each, scene) for each in (found.model, again.model))
    for each in (ours, theirs):
        each.add(1, 9000)
    assert torch.equal(ours.labels(), theirs.labels())
    message = json.loads((tmp_path / "network.json").read_text())
    shapes = ({"hidden": 10**9}, {"hidden": 32}, {"encoder": "os.system"}, {"voxel": "x"}, {"more": 1})
    for wrong in (*({"shape": message["shape"] | each} for each in shapes), {"more": 1}, {"schema": "2"}):
        (tmp_path / "network.json").write_text(json.dumps(message | wrong))
        with pytest.raises(CheckpointError, match="no segmenter") as error:
            Segmenter.read(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no segmenter"):
        Segmenter.read(tmp_path / "none")


def test_a_round_of_training_clicks_as_often_as_there_are_objects(found: Segmenter) -> None:
    tokens = found.model.tokenise(next(rooms("train")))
    with torch.no_grad():
        (encoded,) = found.model.encode([tokens])
    truth = task_labels(tokens.objects, [2, 5, 1])
    clicks = simulate_rounds(found.model, tokens, encoded, truth, 3, np.random.default_rng(0))
    assert sorted(click.label for click in clicks[:3]) == [1, 2, 3]  # one on each, when all is background
    assert len(clicks) == 9  # this model is wrong in more than three ways
    assert all(int(truth[click.token]) == click.label for click in clicks)
    again = simulate_rounds(found.model, tokens, encoded, truth, 2, np.random.default_rng(0))
    assert again == clicks[:6]


def test_scenes_without_objects_cannot_be_learnt_from() -> None:
    nothing = Scenes((replace(next(rooms("train")), objects=None, name="plain.ply"),), {})
    with pytest.raises(CalibrationError, match=r"plain\.ply shows no object"):
        agile3d(nothing, shape=SMALL, simulation=PRACTICE, config=BRIEF)


def test_what_cannot_be_judged_is_refused(found: Segmenter) -> None:
    nothing = Scenes((replace(next(rooms("test")), objects=None, name="plain.ply"),), {})
    with pytest.raises(CalibrationError, match=r"plain\.ply shows no object"):
        judge(found, nothing, budget=1)
    with pytest.raises(MethodError, match="depth 3: the model has 2 layers"):
        judge(found, two_rooms("test"), budget=1, depth=3)


def test_sizes_that_fit_no_model_are_refused() -> None:
    with pytest.raises(MethodError, match="hidden 30: give an even multiple of the 4 heads"):
        replace(SMALL, hidden=30, heads=4)


def test_a_turned_scene_keeps_distances_heights_and_objects() -> None:
    scene = next(islice(rooms("train"), 1, None))
    moved = augment_scene(scene, np.random.default_rng(3))
    assert not np.allclose(moved.coords, scene.coords) and moved.objects is scene.objects
    some = slice(None, None, 400)
    apart = [np.linalg.norm(each.coords[some, None] - each.coords[None, some], axis=2) for each in (scene, moved)]
    np.testing.assert_allclose(*apart, atol=1e-4)
    np.testing.assert_allclose(moved.coords[:, 2], scene.coords[:, 2], atol=1e-6)


def test_a_judge_tells_both_and_draws_the_same_again(found: Segmenter) -> None:
    tests = two_rooms("test")
    study = judge(found, tests, budget=2, objects=2)
    for arm in ("agile3d", "nearest click"):
        assert set(study[arm]["iou"]) == {"1", "2"} and all(0 <= iou <= 1 for iou in study[arm]["iou"].values())
        assert all(each <= 2 for each in study[arm]["clicks"].values())
    assert judge(found, tests, budget=2, objects=2).findings == study.findings
