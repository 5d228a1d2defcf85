"""The page in the browser: sessions of whoever sits at this machine, which it serves to nobody else.

Points are drawn as discs that face the eye; a click is a line of sight, which the session turns into a point. Every
answer to the page is made under one lock, and what cannot be done is said there, after which the page goes on.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Mapping
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
from lamella.methods.agile3d.scene import Scene
from lamella.methods.agile3d.scenes import PICTURES, parse
from lamella.methods.agile3d.serving import HERE, served
from lamella.methods.agile3d.session import CLICKS, ClickLog, Session

DRAWN = 100_000  # points: a scene of more is drawn thinned, and labelled in full
CLOSED = 2.0  # radius of a disc, in distances of neighbouring points: surfaces have no gaps
ABOVE, BEFORE = (0.5, -0.8, 0.5), (0.0, -1.3, 0.0)  # where the eye is at first, in extents of a scene or a picture
OBJECTS = 10  # that the page offers: as many as training has seen at once
PALETTE = np.array(
    [
        (220, 38, 38), (37, 99, 235), (22, 163, 74), (234, 179, 8), (147, 51, 234), (249, 115, 22), (6, 182, 212),
        (236, 72, 153), (132, 204, 22), (120, 53, 15),
    ],
    np.uint8,
)  # fmt: skip
GREY = np.array([0.299, 0.587, 0.114])  # how bright red, green and blue look
HOW = (
    "Click: a point of the object that is chosen. Ctrl+click: of the background. Keys 1 to 9 choose. Drag: look around."
)
Colours = NDArray[np.uint8]


class Viewer:
    """Sessions in a browser on this machine.

    Args:
        model: is not changed.
        scenes: that can be chosen, at least one; others are opened in the page.
        logs: of clicks to begin with, by the digest of their scenes.
        port: of this machine; any that is free when 0, and the next free one where it is taken.
        drawn: at most so many points are.
        changed: is told the log of a session that has changed.

    Attributes:
        sessions: of the scenes that were looked at, by their place.

    Raises:
        LamellaError: when viser is missing.
    """

    def __init__(
        self,
        model: ClickSegmenter,
        scenes: Iterable[Scene],
        logs: Mapping[str, ClickLog] | None = None,
        *,
        port: int = 0,
        drawn: int = DRAWN,
        changed: Callable[[ClickLog], None] = lambda log: None,
    ) -> None:
        self.model, self.scenes, self.drawn, self.changed = model, list(scenes), drawn, changed
        self.logs = dict(logs or {})
        self.sessions: dict[int, Session] = {}
        self._lock, self._ended = threading.RLock(), threading.Event()
        self.place = 0
        self.sessions[0] = opened(model, self.scenes[0], self.logs)
        self.server = served(port)
        self._build()
        self._look()

    @property
    def address(self) -> str:
        """The link to the page, with the token that lets whoever has it in."""
        return f"http://{HERE}:{self.server.get_port()}/{self.server.token}/"

    @property
    def session(self) -> Session:
        """That of the scene which is looked at."""
        return self.sessions[self.place]

    def wait(self) -> None:
        """Until somebody presses the button that ends it."""
        self._ended.wait()

    def stop(self) -> None:
        """Serve no more, once what was asked last is done."""
        with self._lock, redirect_stdout(io.StringIO()):  # it prints that it has stopped
            self.server.stop()

    # What the page shows

    def _build(self) -> None:
        gui = self.server.gui
        gui.configure_theme(show_logo=False, show_share_button=False)
        gui.main_panel.dock_right()
        self.chosen = gui.add_dropdown("Scene", self._names(), hint="What is labelled")
        upload = gui.add_upload_button("Open a file", mime_type=",".join((".ply", *PICTURES)))
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
        return [f"{place}. {scene.name}" for place, scene in enumerate(self.scenes, start=1)]

    def _answer(self, do: Callable[[Any], None]) -> Callable[[Any], None]:
        """A response to the page, one at a time; what cannot be done is said in the page.

        A client may send any value where the page sends a choice or a direction, so any error is answered.
        """

        def answered(event: Any) -> None:
            with self._lock:
                try:
                    do(event)
                except Exception as error:
                    self._say(reason_of(error))

        return answered

    def _say(self, text: str) -> None:
        for client in self.server.get_clients().values():
            client.add_notification("That cannot be done", text, auto_close_seconds=10.0, color="red")

    def _show(self) -> None:
        """Colours by labels, a mark at every click, and what there is of each object."""
        session = self.session
        labels = session.labels().cpu().numpy()
        self.points.colors = coloured(session.scene.colours[self.shown], labels[self.shown], self.plain.value)
        clicked = [point for _, point in session.log.clicks]
        self.server.scene.add_point_cloud(
            "/clicks", self.where[clicked or [0]], (255, 255, 255), point_size=1.2 * self.radius, precision="float32",
            point_shape="diamond", visible=bool(clicked),
        )  # fmt: skip
        self.state.content = told(session, labels)

    # What is done there

    def _encode(self, place: int) -> None:
        """Begin the session of a scene, with the clicks on it that are known."""
        scene = self.scenes[place]
        self.state.content = f"<p>Encoding {escape(scene.name)}, {len(scene):,} points ...</p>"
        self.sessions[place] = opened(self.model, scene, self.logs)

    def _choose(self, place: int) -> None:
        """Look at another scene; the first time it is encoded."""
        if place not in self.sessions:
            try:
                self._encode(place)
            except LamellaError:
                self.chosen.value = self._names()[self.place]  # which looks at that again
                raise
        self.place = place
        self._look()

    def _look(self) -> None:
        """Draw the scene of the session, and stand before it."""
        scene = self.session.scene
        low, high = scene.placed.min(axis=0), scene.placed.max(axis=0)
        self.middle, extent = (low + high) / 2, float((high - low).max()) or 1.0
        self.where = scene.placed - self.middle  # [P, 3], around 0
        self.shown = thinned(len(scene), self.drawn)
        self.radius = CLOSED * spacing(self.where[self.shown]) or extent / 100
        self.points = self.server.scene.add_point_cloud(
            "/points", self.where[self.shown], (0, 0, 0), point_size=self.radius, point_shape="circle",
            precision="float32", point_shading="flat",
        )  # fmt: skip
        eye = extent * np.array(BEFORE if scene.flat else ABOVE)
        for camera in (self.server.initial_camera, *(each.camera for each in self.server.get_clients().values())):
            camera.position, camera.look_at = eye, np.zeros(3)
        self._show()

    def _add(self, file: Any) -> None:
        """Open a scene that the page has sent."""
        self.scenes.append(parse(file.content, PurePosixPath(file.name)))
        try:
            self._encode(len(self.scenes) - 1)
        except LamellaError:
            self.scenes.pop()
            self._show()
            raise
        self.chosen.options = self._names()
        self.chosen.value = self._names()[-1]  # which chooses it

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
        self._send(event, self.session.scene.ending, self.session.exported())

    def _send(self, event: Any, ending: str, content: bytes) -> None:
        event.client.send_file_download(self.session.scene.stem + ending, content, save_immediately=True)


def opened(model: ClickSegmenter, scene: Scene, logs: Mapping[str, ClickLog]) -> Session:
    """A session in which the clicks on this scene that are known have been made."""
    session = Session(model, scene)
    if scene.digest in logs:
        session.replay(logs[scene.digest])
    return session


def thinned(count: int, most: int) -> NDArray[np.int64]:
    """Which points are drawn: all, or so many drawn by chance, in their order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def spacing(points: NDArray[Any]) -> float:
    """How far points are from their nearest neighbours, in the middle of many [P, 3]; 0 where all are in one place."""
    if len(points) < 2:
        return 0.0
    some = points[:: max(1, len(points) // 1000)]
    near, _ = KDTree(points).query(some, k=2)
    return float(np.median(near[:, 1]))


def coloured(colours: NDArray[np.float32], labels: NDArray[np.int64], plain: bool) -> Colours:
    """Points [P, 3] as they are, or pale with each object in a colour of its own."""
    seen = 255 * colours
    if not plain:
        grey = seen @ GREY[:, None]  # [P, 1]
        pale, own = 60 + 0.3 * seen + 0.4 * grey, 0.85 * of_labels(labels) + 0.15 * grey
        seen = np.where(labels[:, None] == BACKGROUND, pale, own)
    return seen.clip(0, 255).astype(np.uint8)


def of_labels(labels: NDArray[np.int64]) -> Colours:
    """The colour of each object [n, 3], white for the background."""
    colours = PALETTE[(labels - 1) % len(PALETTE)]
    return np.where(labels[:, None] == BACKGROUND, 255, colours).astype(np.uint8)


def told(session: Session, labels: NDArray[np.int64]) -> str:
    """How much there is of each object, as HTML."""
    clicks = [label for label, _ in session.log.clicks]
    points = np.bincount(labels, minlength=max([0, *clicks]) + 1)
    rows = []
    for label, count in enumerate(points):
        red, green, blue = of_labels(np.array([label]))[0]
        name = f"object {label}" if label else "background"
        rows.append(
            f'<tr><td><span style="color:rgb({red},{green},{blue});-webkit-text-stroke:1px #777">&#9632;</span> {name}'
            f'</td><td align="right">{clicks.count(label)}</td><td align="right">{count:,}</td></tr>'
        )
    head = '<tr><th align="left"></th><th align="right">clicks</th><th align="right">points</th></tr>'
    return (
        f'<div id="state" data-clicks="{len(clicks)}" style="padding:0 1em;font-size:0.85em">'
        f'<table style="width:100%">{head}{"".join(rows)}</table><p>{HOW}</p></div>'
    )
