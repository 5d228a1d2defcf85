"""The vision transformers: timm's ViT and Swin, and transformers' PVT, with linear attention in their first layers.

    ViT     one stage; the head uses the mean over tokens, without a class token
    Swin    stages of width C, 2C, 4C, 8C; attention in windows, a norm after the patches and before each merging
    PVT     stages of width C, 2C, 5C, 8C; keys and values of the first stages are reduced by a convolution with a norm

Linear attention is over all tokens of a stage, without windows and without a reduction, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MinLen
from torch import Tensor, nn
from transformers import PvtConfig, PvtModel

from lamella.errors import MethodError, listed
from lamella.extras import require
from lamella.methods.slab.modules import LinearAttention

Family = Literal["vit", "swin", "pvt"]
Attention = Literal["softmax", "linear"]
LARGEST = 65_536  # maximum side in pixels, and maximum hidden size
GROWTH: dict[Family, tuple[int, ...]] = {"vit": (1,), "swin": (1, 2, 4, 8), "pvt": (1, 2, 5, 8)}  # of width and heads
REDUCTIONS = (8, 4, 2, 1)  # side of the squares of tokens that PVT reduces to one, by stage
EXPANSIONS = (8, 8, 4, 4)  # of PVT's feed-forward sublayers


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer whose head uses the mean over tokens.

    Attributes:
        family: ``vit``, ``swin`` or ``pvt``.
        size: side of the image in pixels.
        patch: side of a patch in pixels; 4 in Swin and PVT.
        channels: 1 for greyscale images, 3 for RGB.
        width: hidden size of the first stage; that of DeiT-T by default, 96 in Swin-T, 64 in PVT.
        depth: number of layers of each stage; that of DeiT-T by default, 2,2,6,2 in Swin-T, 2,2,2,2 in PVT-T.
        heads: number of attention heads of the first stage; that of DeiT-T and Swin-T by default, 1 in PVT.
        window: side of Swin's windows in tokens.
        attention: ``softmax``, or ``linear`` with its local term.
        kernel: kernel size of the local term; 0: none.
        linear: number of layers with linear attention, from the first; all if None. The paper's Swin has 4.
        drop: stochastic depth rate of the last layer, which grows linearly from 0.

    Raises:
        MethodError: for sizes that do not fit each other.
    """

    family: Family = "vit"
    size: Annotated[int, Ge(1), Le(LARGEST)] = 224
    patch: Annotated[int, Ge(1)] = 16
    channels: Annotated[int, Ge(1)] = 3
    width: Annotated[int, Ge(1), Le(LARGEST)] = 192
    depth: Annotated[tuple[Annotated[int, Ge(1), Le(LARGEST)], ...], MinLen(1)] = (12,)
    heads: Annotated[int, Ge(1)] = 3
    window: Annotated[int, Ge(1)] = 7
    attention: Attention = "softmax"
    kernel: Annotated[int, Ge(0)] = 5
    linear: Annotated[int, Ge(0)] | None = None
    drop: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __post_init__(self) -> None:
        most, halved = len(GROWTH[self.family]), self.patch * 2 ** (len(self.depth) - 1)
        if len(self.depth) > most:
            raise MethodError(f"depth {listed(self.depth)}: a {self.family} has at most {most} stages: give one each")
        if self.family == "pvt" and (self.patch != 4 or self.size < 32):
            raise MethodError(f"size {self.size}, patch {self.patch}: a pvt has patches of 4 and at least 32 pixels")
        if self.size % halved or self.width % self.heads:
            raise MethodError(
                f"{self.size} pixels in patches of {halved}, those of the last stage, {self.width} wide with "
                f"{self.heads} heads: give a multiple of the patch, and a multiple of the heads"
            )
        cut = [side for side in self.sides if side > self.window and side % self.window]
        if self.family == "swin" and cut:
            raise MethodError(
                f"window {self.window}: a stage has {cut[0]} tokens per side, and windows with padding cannot be "
                "folded exactly: give a divisor"
            )

    @property
    def sides(self) -> list[int]:
        """The tokens per side of each stage."""
        return [self.size // self.patch // 2**stage for stage in range(len(self.depth))]

    def build(self, classes: int) -> Any:
        """Build the network with random weights.

        Args:
            classes: number of classes.
        """
        growth = GROWTH[self.family][: len(self.depth)]
        widths, heads = ([first * each for each in growth] for first in (self.width, self.heads))
        build = {"vit": self._vit, "swin": self._swin, "pvt": self._pvt}[self.family]
        model, layers = build(classes, widths, heads)
        if self.attention == "linear":
            stages = [stage for stage, depth in enumerate(self.depth) for _ in range(depth)]
            for stage, layer in list(zip(stages, layers, strict=True))[: self.linear]:
                tokens = self.sides[stage] ** 2
                replace_attention(layer, LinearAttention(widths[stage], heads[stage], tokens, self.kernel))
        return model

    def _vit(self, classes: int, widths: list[int], heads: list[int]) -> tuple[Any, list[Any]]:
        model = require("timm", "vision", "vision transformers").create_model(
            "vit_tiny_patch16_224", pretrained=False, class_token=False, global_pool="avg", fc_norm=False,
            img_size=self.size, patch_size=self.patch, in_chans=self.channels, embed_dim=self.width,
            depth=self.depth[0], num_heads=self.heads, num_classes=classes, drop_path_rate=self.drop,
        )  # fmt: skip
        return model, list(model.blocks)

    def _swin(self, classes: int, widths: list[int], heads: list[int]) -> tuple[Any, list[Any]]:
        model = require("timm", "vision", "vision transformers").create_model(
            "swin_tiny_patch4_window7_224", pretrained=False, img_size=self.size, patch_size=self.patch,
            in_chans=self.channels, embed_dim=self.width, depths=self.depth, num_heads=heads, window_size=self.window,
            num_classes=classes, drop_path_rate=self.drop,
        )  # fmt: skip
        return model, [block for stage in model.layers for block in stage.blocks]

    def _pvt(self, classes: int, widths: list[int], heads: list[int]) -> tuple[Any, list[Any]]:
        count = len(widths)
        config = PvtConfig(
            image_size=self.size, num_channels=self.channels, num_encoder_blocks=count, depths=list(self.depth),
            hidden_sizes=widths, num_attention_heads=heads, sequence_reduction_ratios=list(REDUCTIONS[:count]),
            mlp_ratios=list(EXPANSIONS[:count]), patch_sizes=[4, 2, 2, 2][:count], strides=[4, 2, 2, 2][:count],
            drop_path_rate=self.drop,
        )  # fmt: skip
        model = Pvt(config, classes)
        return model, [layer for stage in model.encoder.block for layer in stage]


class Pvt(nn.Module):
    """A PVT without its class token: the head uses the mean over tokens.

    Args:
        config: configuration of the encoder.
        classes: number of classes.
    """

    def __init__(self, config: PvtConfig, classes: int) -> None:
        super().__init__()
        self.encoder: Any = PvtModel(config).encoder
        last: Any = self.encoder.patch_embeddings[-1]
        last.cls_token, last.position_embeddings = None, nn.Parameter(last.position_embeddings[:, 1:].detach().clone())
        self.head = nn.Linear(config.hidden_sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [batch, classes] of images [batch, channels, height, width]."""
        logits: Tensor = self.head(self.encoder(x).last_hidden_state.mean(1))
        return logits


class PvtLinearAttention(nn.Module):
    """Linear attention with the interface of PVT's.

    Args:
        attention: the linear attention.
    """

    def __init__(self, attention: LinearAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **sizes: Any) -> tuple[Tensor]:
        """Apply the attention to hidden states [batch, N, C]; its grid is fixed, so sizes are not used."""
        return (self.attention(hidden_states),)


def replace_attention(layer: Any, attention: LinearAttention) -> None:
    """Replace the attention of a layer by linear attention over all tokens of its stage, in place.

    Args:
        layer: a layer of a ViT, Swin or PVT.
        attention: the linear attention.
    """
    if hasattr(layer, "layer_norm_1"):
        layer.attention = PvtLinearAttention(attention)
        return
    layer.attn = attention
    if hasattr(layer, "window_size"):  # one window, which is not shifted
        layer.window_size, layer.shift_size, layer.attn_mask = layer.input_resolution, (0, 0), None
        layer.window_area = attention.side**2
