"""The labelling page in the browser, served to this machine only.

Points are drawn as discs that face the camera; a click is a line of sight, which the session turns into a point. All
callbacks of the page run under one lock, and errors are shown in the page, which stays usable.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from html import escape
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from lamella.errors import LamellaError, reason_of
from lamella.methods.agile3d.clicks import BACKGROUND
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.scene import ClickScene
from lamella.methods.agile3d.scenes import IMAGE_SUFFIXES, parse
from lamella.methods.agile3d.serving import LOOPBACK, create_server
from lamella.methods.agile3d.session import CLICKS, ClickLog, Session

MAX_POINTS = 100_000  # points: a larger scene is subsampled for display, and labelled in full
DISC_RADIUS = 2.0  # radius of a disc, in distances of neighbouring points, so that surfaces have no gaps
VIEW_3D, VIEW_IMAGE = (0.5, -0.8, 0.5), (0.0, -1.3, 0.0)  # initial camera position, in extents of a scene or an image
OBJECTS = 10  # number of objects offered by the page, the maximum in the paper's training
MARKS = 256  # of clicks, the latest ones; with a fixed number, each with a colour, the browser keeps its shader
PALETTE = np.array(
    [
        (220, 38, 38), (37, 99, 235), (22, 163, 74), (234, 179, 8), (147, 51, 234), (249, 115, 22), (6, 182, 212),
        (236, 72, 153), (132, 204, 22), (120, 53, 15),
    ],
    np.uint8,
)  # fmt: skip
GREY = np.array([0.299, 0.587, 0.114])  # luminance of red, green and blue
INSTRUCTIONS = (
    "Click: a point of the chosen object. Ctrl+click: the background. Keys 1 to 9: choose an object. Drag: rotate."
)
Colours = NDArray[np.uint8]


class Viewer:
    """Labelling sessions in a browser on this machine.

    Args:
        model: the model; it is not changed.
        scenes: scenes to choose from, at least one; more can be opened in the page.
        logs: click logs to start from, by the digest of their scenes.
        port: port of the page; 0 chooses a free one, and the next free one is taken if it is in use.
        max_points: maximum number of points to draw.
        changed: callback that receives the click log of a session after every change.

    Attributes:
        sessions: sessions of the scenes that were viewed, by index of the scene.

    Raises:
        LamellaError: if viser is not installed.
    """

    def __init__(
        self,
        model: ClickSegmenter,
        scenes: Sequence[ClickScene],
        logs: Mapping[str, ClickLog] | None = None,
        *,
        port: int = 0,
        max_points: int = MAX_POINTS,
        changed: Callable[[ClickLog], None] = lambda log: None,
    ) -> None:
        self.model, self.scenes, self.max_points, self.changed = model, scenes, max_points, changed
        self.names, self.opened = [scene.name for scene in scenes], list[ClickScene]()
        self.logs = dict(logs or {})
        self.sessions: dict[int, Session] = {}
        self._lock, self._ended = threading.RLock(), threading.Event()
        self.index = 0
        self.sessions[0] = open_session(model, self.scenes[0], self.logs)
        self.server = create_server(port)
        self._build()
        self._draw()

    @property
    def address(self) -> str:
        """The link to the page, including the access token."""
        return f"http://{LOOPBACK}:{self.server.get_port()}/{self.server.token}/"

    @property
    def session(self) -> Session:
        """The session of the scene that is shown."""
        return self.sessions[self.index]

    def wait(self) -> None:
        """Block until the button Done is pressed."""
        self._ended.wait()

    def stop(self) -> None:
        """Stop the server, after the current callback."""
        with self._lock, redirect_stdout(io.StringIO()):  # viser prints that it has stopped
            self.server.stop()

    # Elements of the page

    def _build(self) -> None:
        gui = self.server.gui
        gui.configure_theme(show_logo=False, show_share_button=False)
        gui.main_panel.dock_right()
        self.chosen = gui.add_dropdown("Scene", self._names(), hint="The scene to label")
        upload = gui.add_upload_button("Open a file", mime_type=",".join((".ply", *IMAGE_SUFFIXES)))
        names = ["background", *(f"object {number}" for number in range(1, OBJECTS + 1))]
        self.clicking = gui.add_dropdown("Clicks are for", names, initial_value=names[1])
        self.plain = gui.add_checkbox("Colours of the scene", False)
        undo = gui.add_button("Undo")
        save, replay = gui.add_button("Save clicks"), gui.add_upload_button("Replay clicks", mime_type=".json")
        export, end = gui.add_button("Export labels"), gui.add_button("Done", color="green")
        self.state = gui.add_html("")
        for number, name in enumerate(names[:10]):
            gui.add_command(f"Click for {name}", hotkey=str(number)).on_trigger(
                lambda _, name=name: setattr(self.clicking, "value", name)
            )
        self.chosen.on_update(self._answer(lambda _: self._choose(self._names().index(self.chosen.value))))
        upload.on_upload(self._answer(lambda _: self._add(upload.value)))
        self.plain.on_update(self._answer(lambda _: self._show()))
        undo.on_click(self._answer(lambda _: self._undo()))
        save.on_click(self._answer(self._save))
        replay.on_upload(self._answer(lambda _: self._replay(replay.value)))
        export.on_click(self._answer(self._export))
        end.on_click(lambda _: self._ended.set())
        self.server.scene.on_click()(self._answer(lambda event: self._click(event, names.index(self.clicking.value))))
        self.server.scene.on_click(modifier="cmd/ctrl")(self._answer(lambda event: self._click(event, BACKGROUND)))

    def _names(self) -> list[str]:
        return [f"{index}. {name}" for index, name in enumerate(self.names, start=1)]

    def _answer(self, do: Callable[[Any], None]) -> Callable[[Any], None]:
        """Wrap a callback: run under the lock, and show errors in the page.

        A client may send any value in place of a choice or a direction, so all exceptions are caught.
        """

        def answered(event: Any) -> None:
            with self._lock:
                try:
                    do(event)
                except Exception as error:
                    self._notify(reason_of(error))

        return answered

    def _notify(self, text: str) -> None:
        for client in self.server.get_clients().values():
            client.add_notification("Error", text, auto_close_seconds=10.0, color="red")

    def _show(self) -> None:
        """Update the colours of the points, the marks of the clicks and the table of objects, all at once."""
        session = self.session
        labels = session.labels().cpu().numpy()
        colours = display_colours(session.scene.colours[self.drawn_points], labels[self.drawn_points], self.plain.value)
        clicked = [point for _, point in session.log.clicks]
        with self.server.atomic():
            self.points.colors = colours
            self.marks.points = self.where[marked(clicked)]
            self.marks.visible = bool(clicked)
            self.state.content = status_html(session, labels)
        self.server.flush()

    # Actions of the user

    def _encode(self, index: int) -> None:
        """Start the session of a scene, with its known clicks."""
        beyond = index - len(self.scenes)
        scene = self.scenes[index] if beyond < 0 else self.opened[beyond]
        self.state.content = f"<p>Encoding {escape(scene.name)}, {len(scene):,} points ...</p>"
        self.sessions[index] = open_session(self.model, scene, self.logs)

    def _choose(self, index: int) -> None:
        """Show another scene; it is encoded the first time."""
        if index not in self.sessions:
            try:
                self._encode(index)
            except LamellaError:
                self.chosen.value = self._names()[self.index]  # which shows that scene again
                raise
        self.index = index
        self._draw()

    def _draw(self) -> None:
        """Draw the scene of the session and reset the camera."""
        scene = self.session.scene
        low, high = scene.coords_3d.min(axis=0), scene.coords_3d.max(axis=0)
        self.middle, extent = (low + high) / 2, float((high - low).max()) or 1.0
        self.where = scene.coords_3d - self.middle  # [P, 3], around 0
        self.drawn_points = subsample(len(scene), self.max_points)
        self.radius = DISC_RADIUS * spacing(self.where[self.drawn_points]) or extent / 100
        self.points = self.server.scene.add_point_cloud(
            "/points", self.where[self.drawn_points], (0, 0, 0), point_size=self.radius, point_shape="circle",
            precision="float32", point_shading="flat",
        )  # fmt: skip
        self.marks = self.server.scene.add_point_cloud(
            "/clicks", self.where[marked([])], np.full((MARKS, 3), 255, np.uint8), point_size=1.2 * self.radius,
            precision="float32", point_shape="diamond", point_shading="flat", visible=False,
        )  # fmt: skip
        eye = extent * np.array(VIEW_IMAGE if scene.is_image else VIEW_3D)
        for camera in (self.server.initial_camera, *(each.camera for each in self.server.get_clients().values())):
            camera.position, camera.look_at = eye, np.zeros(3)
        self._show()

    def _add(self, file: Any) -> None:
        """Open a scene uploaded through the page."""
        self.opened.append(parse(file.content, PurePosixPath(file.name)))
        self.names.append(self.opened[-1].name)
        try:
            self._encode(len(self.names) - 1)
        except LamellaError:
            self.opened.pop()
            self.names.pop()
            self._show()
            raise
        self.chosen.options = self._names()
        self.chosen.value = self._names()[-1]  # triggers the selection callback

    def _click(self, event: Any, label: int) -> None:
        eye = np.array(event.ray_origin) + self.middle
        self.session.add_seen(label, eye, np.array(event.ray_direction), self.radius)
        self._changed()

    def _undo(self) -> None:
        self.session.undo()
        self._changed()

    def _replay(self, file: Any) -> None:
        self.session.replay(ClickLog.parse(file.content, file.name))
        self._changed()

    def _changed(self) -> None:
        self.changed(self.session.log)
        self._show()

    def _save(self, event: Any) -> None:
        self._send(event, CLICKS, self.session.log.dump().encode())

    def _export(self, event: Any) -> None:
        self._send(event, self.session.scene.suffix, self.session.exported())

    def _send(self, event: Any, suffix: str, content: bytes) -> None:
        event.client.send_file_download(self.session.scene.stem + suffix, content, save_immediately=True)


def open_session(model: ClickSegmenter, scene: ClickScene, logs: Mapping[str, ClickLog]) -> Session:
    """Start a session and replay the known clicks of its scene.

    Args:
        model: the model.
        scene: the scene.
        logs: click logs, by the digest of their scenes.
    """
    session = Session(model, scene)
    if scene.digest in logs:
        session.replay(logs[scene.digest])
    return session


def marked(clicked: Sequence[int]) -> NDArray[np.int64]:
    """Return the point of each of :data:`MARKS` marks: the latest clicks, and the last one again in place of more.

    Args:
        clicked: indices of the clicked points.
    """
    found = np.full(MARKS, clicked[-1] if clicked else 0)
    latest = clicked[-MARKS:]
    found[: len(latest)] = latest
    return found


def subsample(count: int, most: int) -> NDArray[np.int64]:
    """Return the sorted indices of the points to draw: all, or a random subset.

    Args:
        count: number of points.
        most: maximum number of points to draw.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def spacing(points: NDArray[Any]) -> float:
    """Return the median distance of points [P, 3] to their nearest neighbour; 0 if all coincide."""
    if len(points) < 2:
        return 0.0
    some = points[:: max(1, len(points) // 1000)]
    near, _ = KDTree(points).query(some, k=2)
    return float(np.median(near[:, 1]))


def display_colours(colours: NDArray[np.float32], labels: NDArray[np.int64], plain: bool) -> Colours:
    """Return the display colours of points [P, 3]: their own, or a pale version tinted by object.

    Args:
        colours: colours of the points in 0..1 [P, 3].
        labels: labels of the points [P].
        plain: show the points' own colours.
    """
    shades = 255 * colours
    if not plain:
        grey = shades @ GREY[:, None]  # [P, 1]
        pale, own = 60 + 0.3 * shades + 0.4 * grey, 0.85 * label_colours(labels) + 0.15 * grey
        shades = np.where(labels[:, None] == BACKGROUND, pale, own)
    return shades.clip(0, 255).astype(np.uint8)


def label_colours(labels: NDArray[np.int64]) -> Colours:
    """Return the colour of each label [n, 3]; white for the background."""
    colours = PALETTE[(labels - 1) % len(PALETTE)]
    return np.where(labels[:, None] == BACKGROUND, 255, colours).astype(np.uint8)


def status_html(session: Session, labels: NDArray[np.int64]) -> str:
    """Return a table of clicks and points per object as HTML.

    Args:
        session: the session.
        labels: labels of the points [P].
    """
    clicks = [label for label, _ in session.log.clicks]
    points = np.bincount(labels, minlength=max([0, *clicks]) + 1)
    rows = []
    for label, count in enumerate(points):
        red, green, blue = label_colours(np.array([label]))[0]
        name = f"object {label}" if label else "background"
        rows.append(
            f'<tr><td><span style="color:rgb({red},{green},{blue});-webkit-text-stroke:1px #777">&#9632;</span> {name}'
            f'</td><td align="right">{clicks.count(label)}</td><td align="right">{count:,}</td></tr>'
        )
    head = '<tr><th align="left"></th><th align="right">clicks</th><th align="right">points</th></tr>'
    return (
        f'<div id="state" data-clicks="{len(clicks)}" style="padding:0 1em;font-size:0.85em">'
        f'<table style="width:100%">{head}{"".join(rows)}</table><p>{INSTRUCTIONS}</p></div>'
    )
