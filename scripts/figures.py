"""Draw the figures of the documentation: docs/assets/model.svg, plan.svg and phases.svg.

python scripts/figures.py

Each is a panel with its own background, so it can be read on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
STYLE = """
.panel { fill: #fbfaf7; stroke: #d8d4ca; }
text { fill: #22303a; font-family: system-ui, sans-serif; font-size: 14px; }
.quiet { fill: #5f6b73; font-size: 12.5px; }
.code { font-family: ui-monospace, monospace; font-size: 12.5px; }
.title { font-size: 16px; font-weight: 600; }
.box { fill: #ffffff; stroke: #8b98a1; }
.attn, .kept { fill: #ccebe6; stroke: #0d8a7e; }
.mlp, .answer { fill: #fde3d0; stroke: #d9700f; }
.dropped { fill: none; stroke: #9aa5ac; stroke-dasharray: 4 4; }
.line { stroke: #5f6b73; fill: none; stroke-width: 1.6; }
.head { fill: #5f6b73; }
@media (prefers-color-scheme: dark) {
  .panel { fill: #1b2329; stroke: #3a464e; }
  text { fill: #e6ebee; }
  .quiet { fill: #a6b2ba; }
  .box { fill: #263139; stroke: #7d8b94; }
  .attn, .kept { fill: #12504a; stroke: #36b8aa; }
  .mlp, .answer { fill: #663611; stroke: #f0954a; }
  .line { stroke: #a6b2ba; }
  .head { fill: #a6b2ba; }
}
"""


class Figure:
    """An SVG panel with shapes.

    Args:
        title: the title.
        width: the width in pixels.
        height: the height in pixels.
    """

    def __init__(self, title: str, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect class="panel" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", *lines: str) -> None:
        """Add a rectangle with centred lines of text.

        Args:
            x: the left edge.
            y: the top edge.
            width: the width.
            height: the height.
            kind: the CSS class.
            lines: the lines of text.
        """
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            style = "quiet" if number else ""
            self.text(x + width / 2, top + 18 * number, line, style, anchor="middle")

    def text(self, x: float, y: float, line: str, kind: str = "", anchor: str = "start") -> None:
        """Add a line of text.

        Args:
            x: the position of the anchor.
            y: the baseline.
            line: the text.
            kind: the CSS class.
            anchor: the SVG text anchor.
        """
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(line)}</text>')

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        """Add a line through some points.

        Args:
            points: the points.
            arrow: whether it ends with an arrow.
        """
        path = " ".join(f"{x},{y}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<polyline class="line" points="{path}"{end}/>')

    def write(self, name: str) -> None:
        """Write the figure into docs/assets."""
        (ASSETS / name).write_text("".join(self.parts) + "</svg>\n", encoding="utf-8")


def model() -> None:
    """Draw a model, its stacks, a layer with its sublayers, and the names of its sites."""
    figure = Figure("A model is stacks of layers, a layer is sublayers, and each has a site", 860, 430)
    figure.text(30, 38, "model", "title")
    for left, stack, count in ((30, "vision", 3), (150, "text", 5)):
        figure.text(left, 66, f"stack “{stack}”", "quiet")
        for layer in range(count):
            y = 366 - 54 * layer
            figure.box(left, y, 92, 38, "kept" if (stack, layer) == ("text", 2) else "box", f"layer {layer}")
            if layer:
                figure.line((left + 46, y + 54), (left + 46, y + 40))
    figure.line((76, 256), (76, 82), (136, 82), (136, 385), (148, 385))
    figure.line((244, 258), (290, 100), arrow=False)
    figure.line((244, 296), (290, 396), arrow=False)

    figure.text(300, 38, "one layer", "title")
    figure.line((350, 396), (350, 72))
    figure.text(362, 392, "residual stream in", "quiet")
    figure.text(362, 82, "residual stream out", "quiet")
    for top, kind, names in (
        (284, "attn", ("attn", "norm, attention")),
        (150, "mlp", ("mlp", "norm, feed-forward")),
    ):
        figure.line((350, top + 70), (470, top + 70), (470, top + 56))
        figure.box(400, top, 140, 54, kind, *names)
        figure.line((470, top), (470, top - 16), (364, top - 16))
        figure.box(339, top - 27, 22, 22, "box", "+")

    figure.text(590, 38, "its sites", "title")
    for number, (site, what) in enumerate(
        (
            ("layers.2", "the layer"),
            ("layers.2.attn", "a sublayer"),
            ("layers.2.mlp", "the other"),
            ("layers.2.attn.heads", "which heads are kept"),
            ("layers.2.mlp.channels", "which channels are kept"),
            ("hidden.channels", "the hidden size"),
            ("vision.layers.1", "in a model of several stacks"),
        )
    ):
        figure.text(590, 76 + 48 * number, site, "code")
        figure.text(590, 94 + 48 * number, what, "quiet")
    figure.write("model.svg")


def plan() -> None:
    """Draw the way from a model to a plan, a view and an export."""
    figure = Figure("A method creates a plan, a view runs it, an export writes it", 860, 360)
    figure.box(30, 70, 130, 60, "box", "model", "never modified")
    figure.box(30, 190, 130, 60, "box", "calibration text", "input of methods")
    figure.box(220, 120, 130, 70, "attn", "method", "measures, searches")
    figure.line((160, 100), (190, 100), (190, 145), (218, 145))
    figure.line((160, 220), (190, 220), (190, 165), (218, 165))
    figure.box(410, 120, 140, 70, "mlp", "plan.json", "what each site does")
    figure.line((350, 155), (380, 155), (380, 55), (408, 55))
    figure.box(410, 30, 140, 50, "box", "plan series", "selected by budget")
    figure.line((480, 80), (480, 118))
    figure.box(620, 70, 210, 70, "attn", "view", "shares the model's tensors")
    figure.text(725, 158, "owns modules, config and cache", "quiet", anchor="middle")
    figure.line((550, 150), (585, 150), (585, 105), (618, 105))
    figure.line((95, 70), (95, 22), (725, 22), (725, 68))
    figure.box(620, 200, 210, 60, "box", "export", "plain, portable or native")
    figure.line((550, 165), (585, 165), (585, 230), (618, 230))
    figure.box(410, 270, 140, 60, "box", "test text", "held out")
    figure.box(620, 290, 210, 50, "mlp", "evidence, report, card")
    figure.line((550, 300), (585, 300), (585, 315), (618, 315))
    figure.line((725, 260), (725, 288))
    figure.text(30, 318, "Calibration text is never", "quiet")
    figure.text(30, 336, "used for evaluation.", "quiet")
    figure.write("plan.svg")


def phases() -> None:
    """Draw which layers each token runs, and the contents of each layer's cache slot."""
    layers, prompt, answer, kept = 6, 5, 6, {0, 2, 5}
    figure = Figure("Prompts run every layer, generated tokens only some; the cache has holes there", 860, 410)
    left, top, size, gap = 120, 84, 34, 6
    figure.text(left, 38, "prompt", "title")
    figure.text(left + prompt * (size + gap) + 16, 38, "generated tokens", "title")
    figure.text(left, 60, "full depth", "quiet")
    figure.text(left + prompt * (size + gap) + 16, 60, "layers 0, 2 and 5", "quiet")
    for row in range(layers):
        layer = layers - 1 - row
        y = top + row * (size + gap)
        figure.text(left - 16, y + 22, f"layer {layer}", "quiet", anchor="end")
        for column in range(prompt + answer):
            x = left + column * (size + gap) + (16 if column >= prompt else 0)
            runs = column < prompt or layer in kept
            figure.box(x, y, size, size, "dropped" if not runs else "kept" if column < prompt else "answer")
    bottom = top + layers * (size + gap) + 18
    figure.text(left, bottom, "time →", "quiet")

    x = 620
    figure.text(x, 38, "the cache", "title")
    figure.text(x, 60, "contents of its slots at the end", "quiet")
    for row in range(layers):
        layer = layers - 1 - row
        y = top + row * (size + gap)
        if layer in kept:
            figure.box(x, y + 6, 90, 22, "kept", "prompt")
            figure.box(x + 94, y + 6, 108, 22, "answer", "generated")
        else:
            figure.box(x, y + 6, 202, 22, "dropped", "freed")
    figure.text(x, bottom, "Unused entries are freed.", "quiet")
    figure.text(
        left - 90,
        bottom + 30,
        "Step by step with a cache, or in one pass over the whole sequence without one:",
        "quiet",
    )
    figure.text(left - 90, bottom + 48, "the same decisions and the same logits. All state is in the cache.", "quiet")
    figure.write("phases.svg")


if __name__ == "__main__":
    model()
    plan()
    phases()
