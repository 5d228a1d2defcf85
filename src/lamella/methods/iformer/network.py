"""The iFormer network: convolution and max-pooling for high frequencies, attention for low ones, in plain torch.

One layer of C channels and n heads keeps a of them; C_l = a C / n channels attend, the first C_h = C - C_l do not::

    X [B, H, W, C] -+- C_h/2 -> 1x1 -> depthwise 3x3 -> GELU -> C_h --+
                    +- C_h/2 -> max-pool 3x3 -> 1x1 -> GELU -> C_h ---+-> Y_c + DW3x3(Y_c) -> 1x1 -> C
                    +- C_l -> mean p x p -> attention -> nearest ------+

The high branch doubles its channels, so the fused map is wider than X. Parameter names are those of the authors'
checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from lamella.errors import MethodError, listed

Paths = Literal["both", "conv", "pool"]
EPS = 1e-6  # of layer norms
SCALED = 2  # stages from this one on have LayerScale, as in the published networks
LARGEST = 16384  # maximum width or number of layers
Size = Annotated[int, Ge(1), Le(LARGEST)]
Sizes = Annotated[tuple[Size, ...], MinLen(1)]  # of all stages


@dataclass(frozen=True)
class StageShape:
    """The shape of an iFormer; defaults to iFormer-S.

    Attributes:
        depths: number of layers of each stage.
        widths: C of each stage.
        attention: number of heads that attend, layer by layer through all stages: the frequency ramp.
        head_dim: channels per head.
        pools: pooling factor per side of each stage's attention; defaults to 2 in the first half of the stages.
        paths: paths of the high branch: conv, pool or both.
        fused: whether a depthwise convolution follows the branches.
        mlp_ratio: MLP intermediate size relative to the hidden size.
        scale: initial value of LayerScale, from the third stage on; 0 for none.

    Raises:
        MethodError: for widths that are not whole heads, or values that do not fit each other.
    """

    depths: Sizes = (3, 3, 9, 3)
    widths: Sizes = (96, 192, 320, 384)
    attention: tuple[Annotated[int, Ge(0)], ...] = (1,) * 3 + (3,) * 3 + (7,) * 4 + (9,) * 5 + (11,) * 3
    head_dim: Size = 32
    pools: tuple[Size, ...] = ()
    paths: Paths = "both"
    fused: bool = True
    mlp_ratio: Annotated[float, Gt(0)] = 4.0
    scale: Annotated[float, Ge(0)] = 1e-6

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or (self.pools and len(self.pools) != len(self.depths)):
            raise MethodError(
                f"depths {listed(self.depths)}; widths {listed(self.widths)}; pools {listed(self.pools)}: give one "
                "value per stage"
            )
        if sum(self.depths) > LARGEST or len(self.attention) != sum(self.depths):
            raise MethodError(
                f"attention has {len(self.attention)} values for {sum(self.depths)} layers: give one per layer"
            )
        for number, (width, kept) in enumerate(zip(self.widths, self.by_stage(), strict=True), start=1):
            if self.head_dim < 1 or width % self.head_dim or width % 2 or self.head_dim % 2:
                raise MethodError(
                    f"stage {number} has {width} channels and heads of {self.head_dim}: give whole heads of even size"
                )
            heads = width // self.head_dim
            wrong = next((each for each in kept if each > heads), None)
            if wrong is not None:
                raise MethodError(f"{wrong} heads attend in stage {number}, which has {heads}: give 0 to {heads}")

    def by_stage(self) -> list[tuple[int, ...]]:
        """Number of attention heads of each layer, grouped by stage."""
        ends = [sum(self.depths[: stage + 1]) for stage in range(len(self.depths))]
        return [self.attention[end - depth : end] for end, depth in zip(ends, self.depths, strict=True)]

    def pooled(self) -> tuple[int, ...]:
        """Pooling factor of each stage's attention."""
        half = len(self.depths) // 2
        return self.pools or tuple(2 if stage < half else 1 for stage in range(len(self.depths)))


SMALL = StageShape()
BASE = StageShape(
    depths=(4, 6, 14, 6), widths=(96, 192, 384, 512),
    attention=(1,) * 4 + (3,) * 6 + (8,) * 7 + (10,) * 7 + (15,) * 6,
)  # fmt: skip
LARGE = StageShape(
    depths=(4, 6, 18, 8), widths=(96, 192, 448, 640),
    attention=(1,) * 4 + (3,) * 6 + (10,) * 9 + (12,) * 9 + (19,) * 8,
)  # fmt: skip


class HighMixer(nn.Module):
    """Convolution and pooling paths, each of which doubles its channels [B, 2 (conv + pool), H, W].

    Args:
        conv: channels of the convolution.
        pool: channels of the pooling.
    """

    def __init__(self, conv: int, pool: int) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool
        if conv:
            self.conv1 = nn.Conv2d(conv, 2 * conv, 1, bias=False)
            self.proj1 = nn.Conv2d(2 * conv, 2 * conv, 3, padding=1, groups=2 * conv, bias=False)
        if pool:
            self.max_pool = nn.MaxPool2d(3, stride=1, padding=1)
            self.proj2 = nn.Conv2d(pool, 2 * pool, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [B, conv + pool, H, W]."""
        conv, pool = x.split([self.conv, self.pool], dim=1)
        paths = []
        if self.conv:
            paths.append(self.act(self.proj1(self.conv1(conv))))
        if self.pool:
            paths.append(self.act(self.proj2(self.max_pool(pool))))
        return torch.cat(paths, dim=1)


class LowMixer(nn.Module):
    """Attention over means of p x p positions, without an output projection [B, C_l, H, W].

    Args:
        dim: C_l.
        heads: number of heads.
        pool: p.
    """

    def __init__(self, dim: int, heads: int, pool: int) -> None:
        super().__init__()
        self.heads, self.pool = heads, pool
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [B, C_l, H, W]."""
        batch, dim, height, width = x.shape
        if self.pool > 1:  # incomplete windows at the border are averaged over fewer positions
            x = nn.functional.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        grid = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C_l]
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, dim, *grid)
        if self.pool > 1:
            out = interpolate(out, scale_factor=self.pool, mode="nearest")[..., :height, :width]
        return out


class InceptionMixer(nn.Module):
    """Token mixer on a map of any size, [B, H, W, C].

    Args:
        dim: C.
        heads: n, which divides C into even parts.
        attention: a, the number of heads that attend.
        pool: p, pooling factor per side of their map.
        paths: paths of the other channels: half of them each, or all in one.
        fused: whether a depthwise convolution follows the branches.

    Raises:
        MethodError: for heads that do not divide C.
    """

    def __init__(
        self, dim: int, heads: int, attention: int, pool: int = 1, paths: Paths = "both", fused: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads or not 0 <= attention <= heads:
            raise MethodError(
                f"{attention} of {heads} heads for {dim} channels: give a number of heads that divides them"
            )
        self.low_dim = attention * (dim // heads)
        self.high_dim = dim - self.low_dim
        if self.high_dim % 2:
            raise MethodError(f"{self.high_dim} channels for two paths: give an even number")
        if self.high_dim:
            conv = {"both": self.high_dim // 2, "conv": self.high_dim, "pool": 0}[paths]
            self.high_mixer = HighMixer(conv, self.high_dim - conv)
        if self.low_dim:
            self.low_mixer = LowMixer(self.low_dim, attention, pool)
        width = 2 * self.high_dim + self.low_dim
        self.conv_fuse = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False) if fused else None
        self.proj = nn.Conv2d(width, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [B, H, W, C]."""
        high, low = x.permute(0, 3, 1, 2).split([self.high_dim, self.low_dim], dim=1)
        branches = []
        if self.high_dim:
            branches.append(self.high_mixer(high))
        if self.low_dim:
            branches.append(self.low_mixer(low))
        y = torch.cat(branches, dim=1)
        if self.conv_fuse is not None:
            y = y + self.conv_fuse(y)
        out: Tensor = self.proj(y).permute(0, 2, 3, 1)
        return out


class Mlp(nn.Module):
    """The feed-forward sublayer, over the last axis.

    Args:
        dim: channels.
        hidden: intermediate size.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sublayer."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a branch for a random fraction of the rows and rescale the others.

    Args:
        share: fraction of dropped rows.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Apply stochastic depth."""
        if not self.training or self.share == 0:
            return x
        keep = 1 - self.share
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class InceptionBlock(nn.Module):
    """X + s1 Mixer(LN(X)), then X + s2 MLP(LN(X)).

    Args:
        dim: channels.
        mixer: the token mixer.
        mlp_ratio: MLP intermediate size relative to ``dim``.
        scale: initial value of LayerScale; 0 for none.
        drop_path: stochastic depth rate.
    """

    def __init__(self, dim: int, mixer: InceptionMixer, mlp_ratio: float, scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim, EPS), Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), scale)) if scale else None
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), scale)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [B, H, W, C]."""
        mixed = self.attn(self.norm1(x))
        x = x + self.drop_path(mixed if self.layer_scale_1 is None else self.layer_scale_1 * mixed)
        fed = self.mlp(self.norm2(x))
        return x + self.drop_path(fed if self.layer_scale_2 is None else self.layer_scale_2 * fed)


class Stem(nn.Module):
    """Two convolutions of stride 2: [B, channels, H, W] to [B, H/4, W/4, C].

    Args:
        channels: channels of the images.
        dim: C.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj1, self.norm1 = nn.Conv2d(channels, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2)
        self.proj2, self.norm2 = nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Embed images x."""
        x = self.act(self.norm1(self.proj1(x)))
        out: Tensor = self.norm2(self.proj2(x)).permute(0, 2, 3, 1)
        return out


class Downsample(nn.Module):
    """Convolution of stride 2 between stages: [B, H, W, C] to [B, H/2, W/2, C'].

    Args:
        before: C.
        dim: C'.
    """

    def __init__(self, before: int, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(before, dim, 3, 2, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the map x."""
        out: Tensor = self.norm(self.proj(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return out


class InceptionTransformer(nn.Module):
    """An iFormer for images of any size: position embeddings are resized to the actual grid.

    Args:
        shape: its shape.
        img_size: side, or height and width, in pixels for which the position embeddings are created.
        in_chans: channels of an image.
        num_classes: number of classes; 0 for no head.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last layer; it rises linearly from 0.
        global_pool: "avg", or "" for the map itself.
    """

    def __init__(
        self,
        shape: StageShape = SMALL,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if global_pool not in ("avg", ""):
            raise MethodError(f"global_pool '{global_pool}': choose avg or an empty string")
        self.shape, self.num_classes, self.in_chans, self.global_pool = shape, num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = shape.widths[-1]
        self.grad_checkpointing = False
        self.stages = len(shape.depths)
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**stage, "module": f"blocks{stage + 1}"}
            for stage, width in enumerate(shape.widths)
        ]
        if not 0 <= drop_path_rate < 1:
            raise MethodError(f"a drop path of {drop_path_rate:g}: give a value of at least 0 and below 1")
        grid = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = _halved(_halved(grid))
        rates = torch.linspace(0, drop_path_rate, sum(shape.depths), device="cpu").tolist()
        for stage, (width, kept, pool) in enumerate(zip(shape.widths, shape.by_stage(), shape.pooled(), strict=True)):
            number, scale = stage + 1, shape.scale if stage >= SCALED else 0.0
            if stage == 0:
                self.patch_embed = Stem(in_chans, width)
            else:
                self.add_module(f"patch_embed{number}", Downsample(shape.widths[stage - 1], width))
                grid = _halved(grid)
            self.register_parameter(f"pos_embed{number}", nn.Parameter(torch.zeros(1, *grid, width)))
            heads = width // shape.head_dim
            first = sum(shape.depths[:stage])
            blocks = [
                InceptionBlock(width, InceptionMixer(width, heads, attention, pool, shape.paths, shape.fused),
                               shape.mlp_ratio, scale, rates[first + layer])
                for layer, attention in enumerate(kept)
            ]  # fmt: skip
            self.add_module(f"blocks{number}", nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(shape.widths[-1], EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(shape.widths[-1], num_classes) if num_classes else nn.Identity()
        self.apply(start)
        for stage in range(self.stages):
            nn.init.trunc_normal_(self.get_parameter(f"pos_embed{stage + 1}"), std=0.02)

    def stage(self, x: Tensor, stage: int) -> Tensor:
        """Run one stage with its embedding: from images or the map of the previous stage to a map [B, H, W, C].

        Args:
            x: images or map.
            stage: index of the stage.
        """
        number = "" if stage == 0 else str(stage + 1)
        x = self.get_submodule(f"patch_embed{number}")(x)
        x = x + resized(self.get_parameter(f"pos_embed{stage + 1}"), x.shape[1:3])
        blocks: Any = self.get_submodule(f"blocks{stage + 1}")
        if self.grad_checkpointing and self.training:
            for block in blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x
        out: Tensor = blocks(x)
        return out

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map [B, H/32, W/32, C], normed, from images [B, channels, H, W]."""
        for stage in range(self.stages):
            x = self.stage(x, stage)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits [B, classes] from the last map.

        Args:
            x: the last map.
            pre_logits: return the input of the head instead.
        """
        x = self.head_drop(x.mean((1, 2)) if self.global_pool else x)
        out: Tensor = x if pre_logits else self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, classes] from images [B, channels, H, W]."""
        return self.forward_head(self.forward_features(x))


def resized(positions: Tensor, grid: torch.Size | tuple[int, ...]) -> Tensor:
    """Resize position embeddings [1, H, W, C] to another grid, bilinear.

    Args:
        positions: the embeddings.
        grid: height and width of the new grid.
    """
    if tuple(positions.shape[1:3]) == tuple(grid):
        return positions
    moved = positions.permute(0, 3, 1, 2)
    return interpolate(moved, size=tuple(grid), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def adapt_checkpoint(weights: Mapping[str, Tensor], network: InceptionTransformer) -> dict[str, Tensor]:
    """Adapt a checkpoint, including the authors' ones, to the position grids of a network.

    Args:
        weights: the checkpoint.
        network: the network.
    """
    found = dict(weights.get("state_dict", weights.get("model", weights)))
    for stage in range(network.stages):
        name = f"pos_embed{stage + 1}"
        if name in found and found[name].ndim == 4:
            found[name] = resized(found[name], network.get_parameter(name).shape[1:3])
    return found


def _halved(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Size of a map after a convolution of stride 2."""
    return tuple(-(-side // 2) for side in grid)


def start(module: nn.Module) -> None:
    """Initialise linear layers and convolutions: truncated normal with standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
