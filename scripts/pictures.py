"""Draw the pictures of the documentation: docs/assets/model.svg, plan.svg and phases.svg.

python scripts/pictures.py

Each is a panel with its own background, so it can be read on light pages and on dark ones.
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
.gone { fill: none; stroke: #9aa5ac; stroke-dasharray: 4 4; }
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


class Picture:
    """Shapes, one after the other, on a panel of a size."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect class="panel" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", *lines: str) -> None:
        """A rectangle with lines of text in its middle."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            style = "quiet" if number else ""
            self.text(x + width / 2, top + 18 * number, line, style, anchor="middle")

    def text(self, x: float, y: float, line: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(line)}</text>')

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<polyline class="line" points="{path}"{end}/>')

    def write(self, name: str) -> None:
        (ASSETS / name).write_text("".join(self.parts) + "</svg>\n", encoding="utf-8")


def model() -> None:
    """A model, its stacks, a layer with its sublayers, and what their sites are called."""
    picture = Picture("A model is stacks of layers, a layer is sublayers, and each has a site", 860, 430)
    picture.text(30, 38, "model", "title")
    for left, stack, count in ((30, "vision", 3), (150, "text", 5)):
        picture.text(left, 66, f"stack “{stack}”", "quiet")
        for layer in range(count):
            y = 366 - 54 * layer
            picture.box(left, y, 92, 38, "kept" if (stack, layer) == ("text", 2) else "box", f"layer {layer}")
            if layer:
                picture.line((left + 46, y + 54), (left + 46, y + 40))
    picture.line((76, 256), (76, 82), (136, 82), (136, 385), (148, 385))
    picture.line((244, 258), (290, 100), arrow=False)
    picture.line((244, 296), (290, 396), arrow=False)

    picture.text(300, 38, "one layer", "title")
    picture.line((350, 396), (350, 72))
    picture.text(362, 392, "the stream comes in", "quiet")
    picture.text(362, 82, "and goes on", "quiet")
    for top, kind, names in (
        (284, "attn", ("attn", "norm, attention")),
        (150, "mlp", ("mlp", "norm, feed-forward")),
    ):
        picture.line((350, top + 70), (470, top + 70), (470, top + 56))
        picture.box(400, top, 140, 54, kind, *names)
        picture.line((470, top), (470, top - 16), (364, top - 16))
        picture.box(339, top - 27, 22, 22, "box", "+")

    picture.text(590, 38, "its sites", "title")
    for number, (site, what) in enumerate(
        (
            ("layers.2", "the layer"),
            ("layers.2.attn", "a sublayer"),
            ("layers.2.mlp", "the other"),
            ("layers.2.attn.heads", "which heads are kept"),
            ("layers.2.mlp.channels", "which channels are"),
            ("hidden.channels", "how wide the stream is"),
            ("vision.layers.1", "in a model of several stacks"),
        )
    ):
        picture.text(590, 76 + 48 * number, site, "code")
        picture.text(590, 94 + 48 * number, what, "quiet")
    picture.write("model.svg")


def plan() -> None:
    """From a model to a plan, a view and an export."""
    picture = Picture("A method decides, a plan says it, a view runs it, an export writes it", 860, 360)
    picture.box(30, 70, 130, 60, "box", "model", "never written to")
    picture.box(30, 190, 130, 60, "box", "calibration text", "what is looked at")
    picture.box(220, 120, 130, 70, "attn", "method", "measures, searches")
    picture.line((160, 100), (190, 100), (190, 145), (218, 145))
    picture.line((160, 220), (190, 220), (190, 165), (218, 165))
    picture.box(410, 120, 140, 70, "mlp", "plan.json", "what each site does")
    picture.line((350, 155), (380, 155), (380, 55), (408, 55))
    picture.box(410, 30, 140, 50, "box", "plan series", "a budget picks one")
    picture.line((480, 80), (480, 118))
    picture.box(620, 70, 210, 70, "attn", "view", "shares the model's tensors")
    picture.text(725, 158, "owns modules, config and cache", "quiet", anchor="middle")
    picture.line((550, 150), (585, 150), (585, 105), (618, 105))
    picture.line((95, 70), (95, 22), (725, 22), (725, 68))
    picture.box(620, 200, 210, 60, "box", "export", "plain, portable or native")
    picture.line((550, 165), (585, 165), (585, 230), (618, 230))
    picture.box(410, 270, 140, 60, "box", "test text", "what judges")
    picture.box(620, 290, 210, 50, "mlp", "evidence, report, card")
    picture.line((550, 300), (585, 300), (585, 315), (618, 315))
    picture.line((725, 260), (725, 288))
    picture.text(30, 318, "Text that a method looked at", "quiet")
    picture.text(30, 336, "never judges its result.", "quiet")
    picture.write("plan.svg")


def phases() -> None:
    """Which layers each token runs, and what each layer's place in the cache then holds."""
    layers, prompt, answer, kept = 6, 5, 6, {0, 2, 5}
    picture = Picture("Prompts run every layer, generated tokens only some; the cache has holes there", 860, 410)
    left, top, size, gap = 120, 84, 34, 6
    picture.text(left, 38, "prompt", "title")
    picture.text(left + prompt * (size + gap) + 16, 38, "generated tokens", "title")
    picture.text(left, 60, "full depth", "quiet")
    picture.text(left + prompt * (size + gap) + 16, 60, "layers 0, 2 and 5", "quiet")
    for row in range(layers):
        layer = layers - 1 - row
        y = top + row * (size + gap)
        picture.text(left - 16, y + 22, f"layer {layer}", "quiet", anchor="end")
        for column in range(prompt + answer):
            x = left + column * (size + gap) + (16 if column >= prompt else 0)
            runs = column < prompt or layer in kept
            picture.box(x, y, size, size, "gone" if not runs else "kept" if column < prompt else "answer")
    bottom = top + layers * (size + gap) + 18
    picture.text(left, bottom, "time →", "quiet")

    x = 620
    picture.text(x, 38, "the cache", "title")
    picture.text(x, 60, "what its slot holds at the end", "quiet")
    for row in range(layers):
        layer = layers - 1 - row
        y = top + row * (size + gap)
        if layer in kept:
            picture.box(x, y + 6, 90, 22, "kept", "prompt")
            picture.box(x + 94, y + 6, 108, 22, "answer", "generated")
        else:
            picture.box(x, y + 6, 202, 22, "gone", "let go")
    picture.text(x, bottom, "What nobody reads is freed.", "quiet")
    picture.text(
        left - 90, bottom + 30, "Step by step with a cache, or over the whole sequence at once without one:", "quiet"
    )
    picture.text(
        left - 90, bottom + 48, "the same decisions, the same logits. What is remembered lies in the cache.", "quiet"
    )
    picture.write("phases.svg")


if __name__ == "__main__":
    model()
    plan()
    phases()
