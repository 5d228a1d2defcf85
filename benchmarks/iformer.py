"""The time of an Inception mixer, compared with attention of the same width: 56 x 56 positions, eager and compiled.

Three heads of 32 channels, as in the first stage of the published networks: attention alone, attention over means of
2 x 2 positions, and mixers with one attention head, at full and at half resolution, with and without the fusion. All
alternate in one process, and every value is a ratio to attention alone.

    python benchmarks/iformer.py            # about five minutes on one core
    python benchmarks/iformer.py --quick    # one image, a few rounds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lamella.evaluate import turns
from lamella.methods.iformer import InceptionMixer
from lamella.results import Record

SIDE, WIDTH, HEADS = 56, 96, 3
REFERENCE = "attention alone"
POOLED = "mixer, 1 of 3 heads, at half resolution"


class Attention(nn.Module):
    """Multi-head attention over the positions of a feature map [B, H, W, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)
        return out


def mixers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        REFERENCE: Attention(),
        "attention at half resolution, fused": InceptionMixer(WIDTH, HEADS, 3, pool=2),
        "mixer, 1 of 3 heads, at full resolution": InceptionMixer(WIDTH, HEADS, 1),
        POOLED: InceptionMixer(WIDTH, HEADS, 1, pool=2),
        f"{POOLED}, not fused": InceptionMixer(WIDTH, HEADS, 1, pool=2, fused=False),
        "mixer without attention": InceptionMixer(WIDTH, HEADS, 0),
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one picture, a few rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("iformer", "random inputs, random weights, float32", 0)
    rows: dict[str, list[str]] = {}
    batches = (1,) if chosen.quick else (1, 32)
    for batch in batches:
        x = torch.randn(batch, SIDE, SIDE, WIDTH)
        for compiled in (False, True):
            torch.compiler.reset()
            calls = {}
            for name, module in mixers().items():
                run = torch.compile(module.eval()) if compiled else module.eval()
                calls[name] = lambda run=run, x=x: run(x)
            found = turns(calls, REFERENCE, 3 if chosen.quick else 20 if batch == 1 else 7)
            for name, ratio in found.items():
                rows.setdefault(name, []).append(str(ratio))
            how = f"batch {batch}, {'compiled' if compiled else 'eager'}"
            record.check(f"{POOLED}: time relative to attention alone, {how}", "below a half", str(found[POOLED]),
                         found[POOLED].high < 0.5)  # fmt: skip
    columns = [f"batch {batch}, {how}" for batch in batches for how in ("eager", "compiled")]
    title = f"Time on a feature map of {SIDE} x {SIDE} positions and {WIDTH} channels, relative to attention alone: "
    record.table(f"{title}median (quartiles)", ["", *columns], [[name, *cells] for name, cells in rows.items()])
    return record.finish(Path(__file__).parent / "results" / f"iformer{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
