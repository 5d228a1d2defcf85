"""Parts that are fitted to a recording reach what algebra says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import TrainingError
from lamella.measure import Recording
from lamella.methods.hourglass_mlp import fit_part
from lamella.train import TrainConfig


def test_a_linear_part_reaches_least_squares(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = x @ torch.randn(5, 3, generator=generator) + 0.5 * torch.randn(400, 3, generator=generator)
    torch.manual_seed(0)
    part = nn.Linear(5, 3, bias=False)
    config = TrainConfig(steps=600, lr=3e-2, batch=100, eval_every=600, save_every=600)
    fitted = fit_part(part, Recording(x, y), config, held_out=0.25, out=tmp_path)
    best = torch.linalg.lstsq(x[:300].double(), y[:300].double()).solution
    mean = y[:300].double().mean(0)
    expected = 1 - float(
        (x[:300].double() @ best - y[:300].double()).square().sum() / (y[:300].double() - mean).square().sum()
    )
    assert fitted.rows == 300
    assert expected - 0.002 < fitted.explained[0] <= expected + 1e-6
    assert fitted.log.train[-1].loss == pytest.approx(1 - expected, abs=0.05)


@pytest.mark.parametrize("shape", [(7, 6), (4, 4, 6)])  # a sequence of tokens, and a map
def test_parts_that_mix_what_is_in_a_row_are_fitted_like_any_other(shape: tuple[int, ...], tmp_path: Path) -> None:
    class Mixing(nn.Module):
        """An attention over all places of a row."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1, -2)
            return self.attention(flat, flat, flat, need_weights=False)[0].view(x.shape)

    torch.manual_seed(0)
    teacher, part = Mixing(), Mixing()
    x = torch.randn(60, *shape)
    with torch.no_grad():
        recording = Recording.of((some, teacher(some)) for some in x.split(20))
    before = recording.explained(part)
    config = TrainConfig(steps=150, lr=1e-2, batch=20, eval_every=50, save_every=150)
    fitted = fit_part(part, recording, config, out=tmp_path)
    assert fitted.explained[1] > max(0.5, before)


def test_outputs_that_never_change_are_refused(tmp_path: Path) -> None:
    recording = Recording(torch.randn(8, 3), torch.ones(8, 3))
    with pytest.raises(TrainingError, match="nothing to fit"):
        fit_part(nn.Linear(3, 3), recording, TrainConfig(steps=6, lr=1e-2, batch=8), held_out=0.5, out=tmp_path)
