"""The page: what it shows and answers, in a real browser where there is one, and what it lets nobody do."""

from __future__ import annotations

import gc
import hmac
import http.client
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lamella.data import InputContext
from lamella.errors import CalibrationError
from lamella.files import Work
from lamella.methods.agile3d import (
    ClickDecoder,
    ClickLog,
    ClickLogs,
    ClickScene,
    ClickSegmenter,
    ImageEncoder,
    LabelledScenes,
    Scenes,
    Segmenter,
    SegmenterShape,
    Session,
    Viewer,
    collages,
    label,
    read_ply,
    rooms,
    write_ply,
)
from lamella.methods.agile3d.viewer import MARKS, VIEW_3D, display_colours, marked, spacing, subsample
from lamella.runner import run
from lamella.train import TrainingLog

SMALL = SegmenterShape("nano", 0.25, hidden=16, heads=2, feedforward=32, layers=2, background=3)


def fresh() -> ClickSegmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SMALL.build().eval()


@pytest.fixture(scope="module")
def model() -> ClickSegmenter:
    return fresh()


def ball(points: int = 3000, name: str = "ball.ply", seed: int = 0) -> ClickScene:
    """Points on a sphere of one metre around the origin, which an eye sees wherever it stands."""
    drawn = np.random.default_rng(seed)
    away = drawn.normal(size=(points, 3))
    coords = (away / np.linalg.norm(away, axis=1, keepdims=True)).astype(np.float32)
    return ClickScene(coords, (drawn.integers(0, 256, (points, 3)) / 255).astype(np.float32), name=name)


# What is drawn


def test_a_large_scene_is_drawn_thinned_and_a_small_one_whole() -> None:
    assert subsample(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = subsample(1000, 100)
    assert len(some) == 100 == len(set(some.tolist())) and (np.diff(some) > 0).all()


def test_spacing_is_the_distance_of_the_nearest_neighbours() -> None:
    x, y = np.meshgrid(np.arange(20.0), np.arange(20.0))
    assert spacing(0.25 * np.stack([x.ravel(), y.ravel(), 0 * x.ravel()], axis=1)) == 0.25
    assert spacing(np.zeros((1, 3))) == spacing(np.zeros((7, 3))) == 0


def test_objects_have_colours_of_their_own_and_the_background_is_pale() -> None:
    colours = np.full((12, 3), 0.5, np.float32)
    drawn = display_colours(colours, np.arange(12), plain=False)
    assert len(np.unique(drawn[:11], axis=0)) == 11 and (drawn[11] == drawn[1]).all()  # the eleventh repeats the first
    assert np.ptp(drawn[0]) == 0
    assert (display_colours(colours, np.arange(12), plain=True) == 127).all()


def test_a_picture_stands_upright_in_space() -> None:
    scene = next(collages("test"))
    coords_3d = scene.coords_3d
    assert (
        (coords_3d[:, 1] == 0).all() and coords_3d[0].tolist() == [0, 0, 0] and coords_3d[-1].tolist() == [95, 0, -95]
    )


def test_marks_are_the_latest_clicks_and_always_as_many() -> None:
    assert marked([]).tolist() == [0] * MARKS
    assert marked([7, 3]).tolist() == [7, 3, *[3] * (MARKS - 2)]
    assert marked(list(range(MARKS + 5))).tolist() == list(range(5, MARKS + 5))


def test_a_click_changes_what_is_drawn_and_adds_nothing_to_it(
    model: ClickSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clouds that are created again cost the browser a shader for every click."""
    page = Viewer(model, [ball()])
    try:
        made: list[str] = []
        monkeypatch.setattr(page.server.scene, "add_point_cloud", lambda name, *_, **__: made.append(name))
        page.session.add(1, 40)
        page._changed()
        page.session.add(2, 41)
        page._changed()
        assert not made and page.marks.visible
        np.testing.assert_array_equal(page.marks.points[:3], page.where[[40, 41, 41]])
        assert len(np.unique(page.points.colors[[40, 41]], axis=0)) == 2
    finally:
        page.stop()


# The command


class Pressed(Viewer):
    """A page in which somebody clicks twice, and presses Done."""

    def wait(self) -> None:
        self.session.add(1, 16_000)
        self._changed()
        self.session.add(0, 40)
        self._changed()


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(model=fresh(), shape=SMALL, log=TrainingLog({}))


def two_rooms() -> Scenes:
    found = rooms("test", seed=7)
    return Scenes((next(found), next(found)), {"data": "rooms"})


def test_what_was_labelled_in_the_page_is_written_read_back_and_gone_on_from(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("viser")
    monkeypatch.setattr("lamella.methods.agile3d.method.Viewer", Pressed)
    scenes, work = two_rooms(), Work(tmp_path / "work")
    found = label(segmenter, scenes, work=work)
    messages = capsys.readouterr()
    assert "http://127.0.0.1:" in messages.err and messages.out == ""
    assert list(found.logs) == ["001-room-0-of-test"]  # nobody looked at the other
    assert found.findings["scenes"][0]["clicks"] == 2
    (tmp_path / "out").mkdir()
    found.write(tmp_path / "out")
    labelled = read_ply(tmp_path / "out" / "001-room-0-of-test.labelled.ply")
    session = Session(segmenter.model, scenes.scenes[0])
    session.replay(found.logs["001-room-0-of-test"])
    assert np.array_equal(labelled.objects, session.labels().numpy())  # type: ignore[arg-type]

    again = label(segmenter, scenes, ClickLogs.open(tmp_path / "out"), page=False)
    assert [len(log.clicks) for log in again.logs.values()] == [2, 0]
    assert again.exports["001-room-0-of-test.labelled.ply"] == found.exports["001-room-0-of-test.labelled.ply"]
    resumed = label(segmenter, scenes, page=False, work=work)  # as after a kill
    assert resumed.exports == again.exports


def test_clicks_on_no_scene_and_folders_without_any_are_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "a.clicks.json").write_text(ClickLog("0" * 64, ((1, 3),)).dump())
    with pytest.raises(CalibrationError, match="1 of 1 logs belong to none of the scenes"):
        label(segmenter, two_rooms(), ClickLogs.open(tmp_path / "a.clicks.json"), page=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"has no file \*\.clicks\.json"):
        ClickLogs.open(tmp_path / "empty")


def test_names_of_files_stay_in_their_folder(model: ClickSegmenter) -> None:
    names = ["../../etc/passwd", "...", "a b\\c.ply", "é" * 300]
    sessions = [Session(model, ball(50, name)) for name in names]
    found = LabelledScenes.of(sessions)
    assert all("/" not in name and "\\" not in name and len(name) < 110 for name in (*found.logs, *found.exports))
    assert len(found.logs) == len(names)


# The server


@pytest.fixture
def viewer(model: ClickSegmenter) -> Iterator[Viewer]:
    pytest.importorskip("viser")
    page = Viewer(model, [ball(), next(rooms("test", seed=2))])
    yield page
    page.stop()


def test_it_is_served_to_this_machine_alone_and_prints_nothing(
    model: ClickSegmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("viser")
    page = Viewer(model, [ball()])
    sockets = page.server._websock_server
    assert sockets._host == "127.0.0.1" and origin(page) == f"http://127.0.0.1:{page.server.get_port()}"
    assert page.server.request_share_url() is None  # no tunnel into the world
    page.stop()
    assert capsys.readouterr() == ("", "")


def test_a_port_that_is_taken_gives_the_next_free_one(model: ClickSegmenter) -> None:
    pytest.importorskip("viser")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        page = Viewer(model, [ball()], port=taken.getsockname()[1])
        assert page.server.get_port() != taken.getsockname()[1]
        page.stop()


def origin(viewer: Viewer) -> str:
    """That of the page, without the path."""
    return viewer.address.split("/", 3)[0] + "//" + viewer.address.split("/", 3)[2]


def joined(viewer: Viewer, origin: str | None, path: str | None = None) -> Any:
    """A websocket of the page from an origin, at the path of the link or another one."""
    client = pytest.importorskip("websockets.sync.client")
    protocols = [f"viser-v{pytest.importorskip('viser').__version__}"]
    link = viewer.address if path is None else viewer.address.replace(f"/{viewer.server.token}/", path)
    return client.connect(link.replace("http", "ws", 1), subprotocols=protocols, origin=origin)


def status(viewer: Viewer, path: str) -> int:
    """What the server answers to a browser that asks for a path."""
    connection = http.client.HTTPConnection("127.0.0.1", viewer.server.get_port(), timeout=10)
    connection.request("GET", path)
    return connection.getresponse().status


def test_a_page_of_another_site_is_refused(viewer: Viewer) -> None:
    port = viewer.server.get_port()
    for other in (
        "https://evil.example",
        "http://127.0.0.1.evil.example",
        f"http://evil.example:{port}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{port + 1}",  # what else is served on this machine
        f"https://127.0.0.1:{port}",
        "null",
        None,
    ):
        with pytest.raises(pytest.importorskip("websockets").InvalidStatus, match="403"):
            joined(viewer, other)
    for own in (origin(viewer), origin(viewer).replace("127.0.0.1", "localhost")):
        joined(viewer, own).close()


def test_nobody_is_let_in_without_the_token_of_the_link(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    token = viewer.server.token
    assert len(token) >= 43 and f"/{token}/" in viewer.address  # 32 random bytes
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    for path in ("/", "/index.html", f"/{token[:-1]}/", f"/{token}x/", f"/?token={token}", f"/x/{token}/", "/%ff"):
        assert status(viewer, path) == 403
        with pytest.raises(pytest.importorskip("websockets").InvalidStatus, match="403"):
            joined(viewer, origin(viewer), path)
    assert len(compared) == 14 and all(right == token.encode() for _, right in compared)
    for path in (f"/{token}/", f"/{token}", f"/{token}/index.html", f"/{token}/?websocket=here"):
        assert status(viewer, path) == 200
    assert status(viewer, f"/{token}/../../infra/_infra.py") == 404
    other = Viewer(viewer.model, [ball()])
    assert other.server.token != token
    other.stop()


def texts(frame: bytes) -> bytes:
    """The messages of a frame of the server, without their arrays."""
    size = int.from_bytes(frame[8:16], "little")
    return bytes(pytest.importorskip("zstandard").decompress(frame[16 : 16 + size]))


def message(kind: str, **messages: Any) -> bytes:
    """A message as the page sends it."""
    found: bytes = pytest.importorskip("msgspec.msgpack").encode({"type": kind, **messages})
    return found


def here() -> bytes:
    """The message with which a page begins: where its camera stands."""
    zero, sizes = (0.0, 0.0, 0.0), {"fov": 1.0, "near": 0.1, "far": 9.0, "image_height": 9, "image_width": 9}
    return message("ViewerCameraMessage", wxyz=(1.0, 0.0, 0.0, 0.0), position=zero, look_at=(0.0, 1.0, 0.0),
                   up_direction=(0.0, 0.0, 1.0), **sizes)  # fmt: skip


def click(origin: Any, direction: Any) -> bytes:
    return message("ScenePointerMessage", event_type="click", ray_origin=origin, ray_direction=direction,
                   screen_pos=((0.5, 0.5),), modifier=None)  # fmt: skip


def update(viewer: Viewer, value: Any, **more: Any) -> bytes:
    """The message that chooses a scene."""
    return message("GuiUpdateMessage", **{"uuid": viewer.chosen._impl.uuid, "updates": {"value": value}} | more)


def test_what_is_no_message_gives_no_traceback_and_the_page_goes_on(
    viewer: Viewer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    frames = [
        "text", b"", b"\xc1garbage", b"\x81\xa4type\xa7nothing", b"\x80", b"\x91\x01", b"\x81\xa4type\x01",
        update(viewer, "a scene that there is not"), update(viewer, [1]), update(viewer, "1. ball.ply", uuid=[7]),
        update(viewer, "1. ball.ply", updates=3), update(viewer, 2.5, more=1), click(None, None), click("here", 3),
        click((0.0, 0.0), (1.0,)), click(("a", "b", "c"), (0.0, 0.0, 0.0)),
    ]  # fmt: skip
    for frame in frames:
        with joined(viewer, origin(viewer)) as client:
            client.send(here())
            time.sleep(0.1)
            client.send(frame)
            time.sleep(0.1)
    for raw in (b"\x16\x03\x01 no request\r\n\r\n", b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", b"\x00" * 10_000):
        with socket.create_connection(("127.0.0.1", viewer.server.get_port())) as connection:
            connection.sendall(raw)
    path = f"/{viewer.server.token}"
    twice = f"GET {path} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nUpgrade: websocket\r\n\r\n"
    with socket.create_connection(("127.0.0.1", viewer.server.get_port())) as connection:
        connection.sendall(twice.encode())
        connection.recv(100)
    time.sleep(0.3)
    gc.collect()  # asyncio tells of errors that nobody has fetched when it forgets them
    assert capfd.readouterr() == ("", "")
    assert [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")] == []  # printed where none logs
    with joined(viewer, origin(viewer)) as client:
        assert client.recv(timeout=10)
        client.send(here())
        time.sleep(0.1)
        client.send(update(viewer, viewer._names()[1]))
        deadline = time.time() + 10
        while viewer.index != 1 and time.time() < deadline:
            time.sleep(0.05)
    assert viewer.index == 1


def test_a_file_name_that_is_not_utf_8_leaves_the_page_alive(
    model: ClickSegmenter, segmenter: Segmenter, tmp_path: Path
) -> None:
    pytest.importorskip("viser")
    file = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.ply"))
    write_ply(file, ball(60), np.zeros(60, np.int64))
    scenes = Scenes.open(file, InputContext())
    viewer = Viewer(model, [*scenes, ball()])
    try:
        with joined(viewer, origin(viewer)) as client:
            found = texts(client.recv(timeout=10))
        assert b"1. caf?.ply" in found
        viewer._answer(lambda _: viewer._choose(1))(None)
        viewer._answer(lambda _: viewer._choose(0))(None)
        assert viewer.index == 0
    finally:
        viewer.stop()
    run("agile3d", segmenter, file, command="label", page=False, out=tmp_path / "out")
    assert LabelledScenes.read(tmp_path / "out").findings["scenes"][0]["scene"] == "caf?.ply"


def png() -> bytes:
    """Return a small image."""
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(np.zeros((9, 9, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def sent(name: str, content: bytes) -> SimpleNamespace:
    """A file as the page sends it."""
    return SimpleNamespace(name=name, content=content)


def test_what_cannot_be_done_is_said_and_the_session_goes_on(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(viewer, "_notify", messages.append)
    eye = SimpleNamespace(ray_origin=(0.0, -5.0, 0.0), ray_direction=(0.0, 1.0, 0.0))
    viewer._answer(lambda event: viewer._click(event, 1))(eye)
    before = viewer.session.labels()
    header = (
        b"ply\nformat ascii 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    beside = SimpleNamespace(ray_origin=(9.0, -5.0, 0.0), ray_direction=(0.0, 1.0, 0.0))
    requests = [
        (lambda _: viewer._click(beside, 1), "no point of ball.ply at the click"),
        (lambda _: viewer._add(sent("nan.ply", header % 1 + b"0 nan 0\n")), "nan.ply: the position of point 0"),
        (lambda _: viewer._add(sent("none.ply", header % 0)), "none.ply has no points"),
        (lambda _: viewer._add(sent("torn.ply", b"ply\nformat")), "torn.ply: not a valid PLY file of points"),
        (lambda _: viewer._add(sent("far.ply", header % 2 + b"0 0 0\n1e9 0 0\n")), "larger cell size"),
        (lambda _: viewer._add(sent("torn.png", b"\x89PNG")), "torn.png: the image upload cannot be read"),
        (lambda _: viewer._add(sent("flat.png", png())), "flat.png is no scene in space"),
        (lambda _: viewer._replay(sent("torn.json", b"{")), "torn.json: not a valid click log"),
        (lambda _: viewer._replay(sent("bytes.json", b"\xff\xfe")), "bytes.json: not a valid click log"),
        (lambda _: viewer._replay(sent("other.json", ClickLog("0", ()).dump().encode())), "another scene"),
    ]  # fmt: skip
    for number, (do, why) in enumerate(requests, start=1):
        viewer._answer(do)(None)
        assert len(messages) == number and why in messages[-1] and "\n" not in messages[-1]
        assert torch.equal(viewer.session.labels(), before) and viewer.session.scene.name == "ball.ply"
    assert viewer.chosen.value == "1. ball.ply"
    viewer._answer(lambda _: viewer._undo())(None)
    viewer._answer(lambda _: viewer._undo())(None)
    assert messages[-1].startswith("there is no click to undo") and not viewer.session.labels().any()


def test_a_scene_of_half_a_million_points_is_drawn_thinned_and_labelled_in_full(model: ClickSegmenter) -> None:
    pytest.importorskip("viser")
    page = Viewer(model, [ball(500_000)])
    try:
        page._click(SimpleNamespace(ray_origin=(0.0, -5.0, 0.0), ray_direction=(0.0, 1.0, 0.0)), 3)
        assert len(page.points.points) == len(page.points.colors) == 100_000
        labels = page.session.labels()
        assert labels.shape == (500_000,)
        ((label, point),) = page.session.log.clicks
        assert (
            label == labels[point] == 3 and page.session.scene.coords[point, 1] < -0.99
        )  # the side that was looked at
    finally:
        page.stop()


# In the browser


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WITHOUT = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # a sandbox, a graphics card


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("viser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the path")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=WITHOUT)
        yield chromium
        chromium.close()


class Seen:
    """A page in the browser.

    Attributes:
        asked: the URLs of all requests of the page.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.requests = list[str]()
        self.page = browser.new_page(viewport={"width": 1100, "height": 700})
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#state", timeout=60_000)
        self.page.wait_for_timeout(1500)  # until the camera stands where it shall

    def click(self, x: float = 0.0, y: float = 0.0, **how: Any) -> None:
        """Click the canvas, so far from its middle in pixels."""
        box = self.page.locator("canvas").first.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2 + x, box["y"] + box["height"] / 2 + y)
        for key in how.get("keys", ()):
            self.page.keyboard.down(key)
        self.page.mouse.down()
        self.page.mouse.up()
        for key in how.get("keys", ()):
            self.page.keyboard.up(key)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def give(self, name: str, file: Path) -> None:
        """Send a file by an upload button."""
        with self.page.expect_file_chooser() as chooser:
            self.press(name)
        chooser.value.set_files(file)

    def got(self, name: str, to: Path) -> Path:
        """The file that a button downloads."""
        with self.page.expect_download() as download:
            self.press(name)
        file = to / download.value.suggested_filename
        download.value.save_as(file)
        return file

    def clicks(self, count: int) -> None:
        """Wait until the page shows this number of clicks."""
        self.page.wait_for_selector(f'#state[data-clicks="{count}"]', timeout=20_000)

    def says(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=20_000)


@pytest.fixture
def seen(browser: Any, viewer: Viewer) -> Iterator[Seen]:
    seen = Seen(browser, viewer.address)
    yield seen
    seen.page.close()


def coloured_pixels(seen: Seen, red: tuple[int, int], green: tuple[int, int], blue: tuple[int, int]) -> int:
    """How many pixels of the canvas have a colour within these bounds."""
    image = pytest.importorskip("PIL.Image")
    canvas = seen.page.locator("canvas").first.screenshot()
    pixels = np.array(image.open(io.BytesIO(canvas)).convert("RGB"))
    inside = [
        (low <= pixels[..., each]) & (pixels[..., each] <= high) for each, (low, high) in enumerate((red, green, blue))
    ]
    return int(np.logical_and.reduce(inside).sum())


@pytest.mark.slow
def test_clicks_on_the_canvas_label_what_is_seen_there_at_once(seen: Seen, viewer: Viewer) -> None:
    red = (150, 255), (0, 90), (0, 90)
    assert coloured_pixels(seen, *red) < 50
    seen.click()
    seen.clicks(1)
    ((label, point),) = viewer.session.log.clicks
    towards = np.array(VIEW_3D) / np.linalg.norm(VIEW_3D)
    assert (
        label == 1 and viewer.session.scene.coords[point] @ towards > 0.99
    )  # the point of the ball that faces the eye
    seen.page.wait_for_timeout(800)
    assert coloured_pixels(seen, *red) > 500
    seen.page.keyboard.press("2")
    seen.click(60, 40)
    seen.clicks(2)
    seen.click(-60, -40, keys=["Control"])
    seen.clicks(3)
    assert [label for label, _ in viewer.session.log.clicks] == [1, 2, 0]
    labels = viewer.session.labels()
    assert [int(labels[point]) for _, point in viewer.session.log.clicks] == [1, 2, 0]
    messages = seen.page.inner_text("#state")
    assert f"{int((labels == 2).sum()):,}" in messages
    assert all(
        url.startswith((viewer.address, "blob:", "data:")) for url in seen.requests
    )  # no other host is contacted


@pytest.mark.slow
def test_dragging_looks_around_and_clicks_nothing(seen: Seen, viewer: Viewer) -> None:
    seen.click()
    seen.clicks(1)
    box = seen.page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    seen.page.mouse.move(x, y)
    seen.page.mouse.down()
    seen.page.mouse.move(x + 200, y, steps=8)
    seen.page.mouse.up()
    seen.page.wait_for_timeout(1500)
    seen.click()
    seen.clicks(2)
    (_, first), (_, second) = viewer.session.log.clicks
    coords = viewer.session.scene.coords
    assert coords[first] @ coords[second] < 0.9  # another side of the ball


@pytest.mark.slow
def test_clicks_are_undone_saved_replayed_and_their_labels_exported(seen: Seen, viewer: Viewer, tmp_path: Path) -> None:
    for count, (x, y) in enumerate(((0, 0), (50, 30)), start=1):
        seen.click(x, y)
        seen.clicks(count)
    labels = viewer.session.labels()
    saved = seen.got("Save clicks", tmp_path)
    assert saved.name == "ball.clicks.json"
    assert ClickLog.read(saved) == viewer.session.log
    exported = read_ply(seen.got("Export labels", tmp_path))
    assert np.array_equal(exported.objects, labels.numpy())  # type: ignore[arg-type]
    assert exported.digest == viewer.session.scene.digest
    for count in (1, 0):
        seen.press("Undo")
        seen.clicks(count)
    seen.press("Undo")
    seen.says("there is no click to undo")
    assert not viewer.session.labels().any()
    seen.give("Replay clicks", saved)
    seen.clicks(2)
    assert torch.equal(viewer.session.labels(), labels)


@pytest.mark.slow
def test_files_are_opened_in_the_page_and_damaged_ones_leave_it_alive(
    seen: Seen, viewer: Viewer, tmp_path: Path
) -> None:
    seen.click()
    seen.clicks(1)
    (tmp_path / "torn.ply").write_bytes(b"ply\nformat <img src=x onerror=document.title='bad'> 1.0\nend_header\n")
    seen.give("Open a file", tmp_path / "torn.ply")
    seen.says("torn.ply: not a valid PLY file of points")
    assert seen.page.title() != "bad"
    seen.click(-330, 300)
    seen.says("there is no point of ball.ply at the click")
    seen.click(40, 0)
    seen.clicks(2)
    other = ball(2000, seed=5)
    write_ply(tmp_path / "other.ply", other, np.zeros(2000, np.int64))
    seen.give("Open a file", tmp_path / "other.ply")
    seen.clicks(0)
    assert viewer.session.scene.name == "other.ply" and len(viewer.session.scene) == 2000
    seen.click()
    seen.clicks(1)
    viewer.chosen.value = "1. ball.ply"
    seen.clicks(2)
    seen.press("Done")
    viewer._ended.wait(10)
    assert viewer._ended.is_set()


def test_a_picture_is_labelled_where_it_is_clicked(browser: Any) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = ClickSegmenter(ImageEncoder(channels=16), ClickDecoder(2, 16, 2, 32, layers=2, background=3)).eval()
    viewer = Viewer(model, [next(collages("test"))])
    seen = Seen(browser, viewer.address)
    try:
        seen.click()
        seen.clicks(1)
        seen.click(60, 90)
        seen.clicks(2)
        (_, first), (_, second) = viewer.session.log.clicks
        (x, y), (right, below) = (viewer.session.scene.coords[each] for each in (first, second))
        assert abs(x - 47.5) < 3 and abs(y - 47.5) < 3
        assert (below - y) / (right - x) == pytest.approx(1.5, abs=0.2) and right > x
    finally:
        seen.page.close()
        viewer.stop()


@pytest.mark.slow
def test_the_command_serves_a_page_until_done_is_pressed_and_goes_on_after_a_kill(
    browser: Any, segmenter: Segmenter, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    segmenter.write(tmp_path / "model")
    write_ply(tmp_path / "ball.ply", ball(), np.zeros(3000, np.int64))
    command = [sys.executable, "-m", "lamella", "run", "agile3d", "label", str(tmp_path / "model")]
    command += ["--scenes", str(tmp_path / "ball.ply"), "-o", str(tmp_path / "out")]

    def serve() -> tuple[subprocess.Popen[str], Seen]:
        running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert running.stderr is not None
        messages = next(line for line in running.stderr if "http://" in line)
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+", messages)
        assert found
        return running, Seen(browser, found[0])

    running, seen = serve()
    for count, (x, y) in enumerate(((0, 0), (40, 30)), start=1):
        seen.click(x, y)
        seen.clicks(count)
    running.kill()
    running.communicate()
    seen.page.close()
    assert not (tmp_path / "out").exists()
    running, seen = serve()
    seen.clicks(2)
    seen.press("Undo")
    seen.clicks(1)
    seen.press("Done")
    running.communicate(timeout=60)
    seen.page.close()
    assert running.returncode == 0
    found = LabelledScenes.read(tmp_path / "out")
    assert len(found.logs["001-ball"].clicks) == 1 and found.findings["scenes"][0]["scene"] == "ball.ply"
    session = Session(segmenter.model, read_ply(tmp_path / "ball.ply"))
    session.replay(found.logs["001-ball"])
    assert found.exports == {"001-ball.labelled.ply": session.exported()}
    assert not (tmp_path / ".out.work").exists()
