"""The decoder: clicks attend to the scene and to one another, and the scene attends to the clicks.

    q [Q, d]  one query per click, B learned ones for the background     s [N, d]  one feature per token

    1  q <- LN(q + MHA(q + e, s + p, s))      click to scene, masked to the tokens that each click's label has won
    2  q <- LN(q + MHA(q + e, q + e, q))      click to click
    3  q <- LN(q + W2 relu(W1 q))
    4  s <- LN(s + MHA(s + p, q + e, q))      scene to click
    5  logit of token i for label k = max over k's queries of <s_i, MLP(LN(q))>

e and p encode the position of a click or token; e also encodes the time of the click. One argmax over all labels makes
objects compete: a click on one is evidence against its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.methods.agile3d.clicks import BACKGROUND, Clicks

PERIOD = 10_000  # longest period of the sinusoids that encode the time of a click


@dataclass(frozen=True)
class EncodedScene:
    """A scene after its one pass through the encoder; every click reuses it.

    Attributes:
        f: features of the tokens [N, d].
        p: position encodings of the tokens [N, d].
    """

    f: Tensor
    p: Tensor

    def detached(self) -> EncodedScene:
        """Return a copy without gradient, to find the next clicks in training."""
        return EncodedScene(self.f.detach(), self.p)


class FourierEncoding(nn.Module):
    """Encode positions as Fourier features with fixed random directions (Tancik et al., 2020).

    Args:
        dims: D, the number of coordinates.
        hidden: d, even.
        scale: standard deviation of the directions; the paper uses 1.
    """

    G: Tensor

    def __init__(self, dims: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("G", scale * torch.randn(dims, hidden // 2))

    @torch.no_grad()
    def forward(self, coords: Tensor) -> Tensor:
        """Encode the coordinates of all tokens of a scene, scaled to 0..1 along each axis, [N, D] to [N, d]."""
        low, high = coords.min(dim=0).values, coords.max(dim=0).values
        extent = torch.where(high > low, high - low, 1)  # an axis without extent would divide by zero
        angles = 2 * math.pi * ((coords - low) / extent) @ self.G
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def time(t: Tensor, hidden: int) -> Tensor:
    """Encode the times of clicks [n], counted from 0 over all objects, as sinusoids [n, d].

    Args:
        t: times of the clicks [n].
        hidden: d, even.
    """
    rates = PERIOD ** (-torch.arange(0, hidden, 2, device=t.device) / hidden)
    angles = t[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class DecoderLayer(nn.Module):
    """One decoder layer, steps 1 to 4.

    Args:
        hidden: d, the hidden size.
        heads: h, the number of attention heads.
        feedforward: F, the intermediate size of the MLP.
    """

    def __init__(self, hidden: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.click_to_scene, self.click_to_click, self.scene_to_click = (
            nn.MultiheadAttention(hidden, heads, batch_first=True) for _ in range(3)
        )
        self.feedforward = nn.Sequential(nn.Linear(hidden, feedforward), nn.ReLU(), nn.Linear(feedforward, hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))

    def forward(self, q: Tensor, e: Tensor, s: Tensor, p: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Update queries and token features.

        Args:
            q: queries [Q, d].
            e: encodings of the queries [Q, d].
            s: token features [N, d].
            p: encodings of the tokens [N, d].
            blocked: mask of the tokens that a query must not attend to [Q, N] bool, or None.
        """
        q = self.norms[0](q + _attend(self.click_to_scene, q + e, s + p, s, blocked))
        q = self.norms[1](q + _attend(self.click_to_click, q + e, q + e, q))
        q = self.norms[2](q + self.feedforward(q))
        s = self.norms[3](s + _attend(self.scene_to_click, s + p, q + e, q))
        return q, s


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
    attended: Tensor = attention(query, key, value, attn_mask=blocked, need_weights=False)[0]
    return attended


class ClickDecoder(nn.Module):
    """Predict the logits of every token from an encoded scene and clicks, after every layer.

    Args:
        dims: D, the number of coordinates.
        hidden: d, a multiple of twice the number of heads; 128 in the paper.
        heads: h, the number of attention heads; 8 in the paper.
        feedforward: F, the intermediate size of the MLP; 1024 in the paper.
        layers: L, the number of layers; 3 in the paper.
        background: B, the number of learned background queries, so that the background needs no click; 10 in the paper.
        scale: standard deviation of the random directions of the position encoding; 1 in the paper.
        shared: run one layer L times (weight sharing).
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
        self.place = FourierEncoding(dims, hidden, scale)
        self.background = nn.Embedding(background, hidden)
        self.background_place = nn.Embedding(background, hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, heads, feedforward) for _ in range(1 if shared else layers))
        self.norm = nn.LayerNorm(hidden)
        self.mask = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, scene: EncodedScene, clicks: Clicks, layers: int | None = None) -> list[Tensor]:
        """Return the logits of each token for background and objects 1..M, after each layer [N, M + 1].

        M is the highest clicked label. A label below M without a click has the logit -inf.

        Args:
            scene: an encoded scene with features of width d.
            clicks: at least one on an object, or none at all.
            layers: number of layers to run: at most as many as the model has, or any number if the layer is shared.
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

    def queries(self, scene: EncodedScene, clicks: Clicks) -> tuple[Tensor, Tensor, Tensor]:
        """Return content and encoding of all queries [Q, d], and their labels [Q].

        They are ordered by object and then by click; the learned background queries follow, and clicks on the
        background come last.

        Args:
            scene: the encoded scene.
            clicks: the clicks so far.
        """
        device = scene.f.device
        times = sorted(range(len(clicks)), key=lambda t: (clicks[t].label == BACKGROUND, clicks[t].label))
        tokens = torch.tensor([clicks[t].token for t in times], dtype=torch.long, device=device)
        labels = torch.tensor([clicks[t].label for t in times], dtype=torch.long, device=device)
        content = scene.f[tokens]  # the gradient flows through the queries into the encoder
        encoding = scene.p[tokens] + time(torch.tensor(times, device=device), self.hidden)
        objects = int((labels != BACKGROUND).sum())
        learned = self.background.weight, self.background_place.weight, labels.new_zeros(len(self.background.weight))
        q, e, label = (
            torch.cat([each[:objects], ours, each[objects:]])
            for each, ours in zip((content, encoding, labels), learned, strict=True)
        )
        return q, e, label


def best(Z: Tensor, label: Tensor) -> Tensor:
    """Reduce query logits [N, Q] to the highest of each label [N, M + 1]; -inf if a label has no query.

    Args:
        Z: logits of the queries [N, Q].
        label: labels of the queries [Q].
    """
    none = Z.new_full((len(Z), int(label.max()) + 1), -math.inf)
    return none.scatter_reduce(1, label.expand_as(Z), Z, "amax")


def elsewhere(logits: Tensor, label: Tensor) -> Tensor:
    """Mask the tokens that each query must not attend to [Q, N]: those won by another label.

    A query whose label has won no token is not masked.

    Args:
        logits: logits of the tokens [N, M + 1].
        label: labels of the queries [Q].
    """
    blocked = label[:, None] != logits.argmax(dim=1)[None]
    return blocked & ~blocked.all(dim=1, keepdim=True)
