"""The decoder: clicks ask the scene what belongs to them, ask each other, and the scene asks them back.

    q [Q, d]  one query a click, B learned ones for the background     s [N, d]  one feature a token

    1  q <- LN(q + MHA(q + e, s + p, s))      click to scene, within what each click's label has won so far
    2  q <- LN(q + MHA(q + e, q + e, q))      click to click
    3  q <- LN(q + W2 relu(W1 q))
    4  s <- LN(s + MHA(s + p, q + e, q))      scene to click
    5  logit of token i for label k = max over k's queries of <s_i, MLP(LN(q))>

e and p are encodings of where a click or a token is, and of when the click was made. One argmax over all labels makes
objects compete: a click on one is evidence against its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.methods.agile3d.clicks import BACKGROUND, Clicks

PERIOD = 10_000  # of the slowest wave that tells the time of a click


@dataclass(frozen=True)
class Encoded:
    """A scene after its one pass through the encoder; every click reads it.

    Attributes:
        f: features of the tokens [N, d].
        p: where they are, encoded [N, d].
    """

    f: Tensor
    p: Tensor

    def detached(self) -> Encoded:
        """The same without its gradient, for clicks that only find out what to click next."""
        return Encoded(self.f.detach(), self.p)


class Place(nn.Module):
    """Where a token is, as waves in fixed random directions (Tancik et al., 2020).

    Args:
        dims: D, of the coordinates.
        hidden: d, even.
        scale: standard deviation of the directions; the paper's 1.
    """

    G: Tensor

    def __init__(self, dims: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("G", scale * torch.randn(dims, hidden // 2))

    @torch.no_grad()
    def forward(self, coords: Tensor) -> Tensor:
        """Coordinates of all tokens of a scene [N, D] to [N, d]; each axis goes from 0 to 1 over the scene."""
        low, high = coords.min(dim=0).values, coords.max(dim=0).values
        extent = torch.where(high > low, high - low, 1)  # a flat scene has an axis without extent
        angles = 2 * math.pi * ((coords - low) / extent) @ self.G
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def time(t: Tensor, hidden: int) -> Tensor:
    """When clicks were made [n], counted from 0 over all objects, as waves [n, d]."""
    rates = PERIOD ** (-torch.arange(0, hidden, 2, device=t.device) / hidden)
    angles = t[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class Layer(nn.Module):
    """Steps 1 to 4.

    Args:
        hidden, heads, feedforward: d, h and F.
    """

    def __init__(self, hidden: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.click_to_scene, self.click_to_click, self.scene_to_click = (
            nn.MultiheadAttention(hidden, heads, batch_first=True) for _ in range(3)
        )
        self.feedforward = nn.Sequential(nn.Linear(hidden, feedforward), nn.ReLU(), nn.Linear(feedforward, hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))

    def forward(self, q: Tensor, e: Tensor, s: Tensor, p: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and their encodings [Q, d], features and theirs [N, d], what a query must not see [Q, N]."""
        q = self.norms[0](q + _attend(self.click_to_scene, q + e, s + p, s, blocked))
        q = self.norms[1](q + _attend(self.click_to_click, q + e, q + e, q))
        q = self.norms[2](q + self.feedforward(q))
        s = self.norms[3](s + _attend(self.scene_to_click, s + p, q + e, q))
        return q, s


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
    attended: Tensor = attention(query, key, value, attn_mask=blocked, need_weights=False)[0]
    return attended


class ClickDecoder(nn.Module):
    """From an encoded scene and clicks to the logits of every token, after every layer.

    Args:
        dims: D, of the coordinates.
        hidden: d, a multiple of twice the heads; the paper's 128.
        heads: h; 8.
        feedforward: F; 1024.
        layers: L; 3.
        background: B, learned queries for the background, which may then have no click; 10.
        scale: of the directions in which places are encoded; 1.
        shared: let one layer run L times.
    """

    def __init__(
        self,
        dims: int,
        hidden: int = 128,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 3,
        background: int = 10,
        scale: float = 1.0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.depth = hidden, layers
        self.place = Place(dims, hidden, scale)
        self.background = nn.Embedding(background, hidden)
        self.background_place = nn.Embedding(background, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, feedforward) for _ in range(1 if shared else layers))
        self.norm = nn.LayerNorm(hidden)
        self.mask = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, scene: Encoded, clicks: Clicks, layers: int | None = None) -> list[Tensor]:
        """The logits of each token for background and objects 1..M, after each layer [N, M + 1].

        M is the highest label that was clicked. A label in between without a click has no chance: its logit is -inf.

        Args:
            scene: with features of the same width.
            clicks: at least one on an object, or none at all.
            layers: how many run: fewer than the model has, or of a shared layer any number.
        """
        q, e, label = self.queries(scene, clicks)
        s, blocked, found = scene.f, None, []
        for step in range(self.depth if layers is None else layers):
            q, s = self.layers[step % len(self.layers)](q, e, s, scene.p, blocked)
            Z = s @ self.mask(self.norm(q)).T  # [N, Q]
            logits = best(Z, label)
            found.append(logits)
            blocked = elsewhere(logits, label)
        return found

    def queries(self, scene: Encoded, clicks: Clicks) -> tuple[Tensor, Tensor, Tensor]:
        """Content and encoding of all queries [Q, d], and their labels [Q].

        They stand in the order of objects, each in the order of its clicks; then the learned ones, and the clicks on
        the background last.
        """
        device = scene.f.device
        times = sorted(range(len(clicks)), key=lambda t: (clicks[t].label == BACKGROUND, clicks[t].label))
        tokens = torch.tensor([clicks[t].token for t in times], dtype=torch.long, device=device)
        labels = torch.tensor([clicks[t].label for t in times], dtype=torch.long, device=device)
        content = scene.f[tokens]  # the gradient goes through them into the encoder
        encoding = scene.p[tokens] + time(torch.tensor(times, device=device), self.hidden)
        objects = int((labels != BACKGROUND).sum())
        learned = self.background.weight, self.background_place.weight, labels.new_zeros(len(self.background.weight))
        q, e, label = (
            torch.cat([each[:objects], ours, each[objects:]])
            for each, ours in zip((content, encoding, labels), learned, strict=True)
        )
        return q, e, label


def best(Z: Tensor, label: Tensor) -> Tensor:
    """Of the logits of queries [N, Q], the highest of each label [N, M + 1]; -inf where a label has no query."""
    none = Z.new_full((len(Z), int(label.max()) + 1), -math.inf)
    return none.scatter_reduce(1, label.expand_as(Z), Z, "amax")


def elsewhere(logits: Tensor, label: Tensor) -> Tensor:
    """What each query must not see [Q, N]: tokens that another label has won; nothing where its own has won none."""
    blocked = label[:, None] != logits.argmax(dim=1)[None]
    return blocked & ~blocked.all(dim=1, keepdim=True)
