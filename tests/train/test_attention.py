"""Attention in a training step: unfused where it is faster, with the same values either way."""

from __future__ import annotations

import pytest
import torch
from torch.backends.cuda import flash_sdp_enabled, fp16_bf16_reduction_math_sdp_allowed
from torch.nn.functional import scaled_dot_product_attention

from lamella.train.attention import LONGEST, fast_attention

SHORT = {"input_ids": torch.zeros(2, 40, dtype=torch.long)}


@pytest.mark.parametrize(
    ("batch", "bf16", "fused"),
    [
        (SHORT, True, False),
        (SHORT, False, True),
        ({"input_ids": torch.zeros(1, LONGEST + 1, dtype=torch.long)}, True, True),
        ({"x": torch.zeros(2, 3, 8, 8)}, True, True),
    ],
)
def test_short_rows_in_bfloat16_alone_leave_the_fused_kernel(batch, bf16, fused) -> None:
    before = flash_sdp_enabled(), fp16_bf16_reduction_math_sdp_allowed()
    with fast_attention(batch, bf16):
        assert flash_sdp_enabled() == fused
    assert (flash_sdp_enabled(), fp16_bf16_reduction_math_sdp_allowed()) == before


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_float64_to_the_precision_of_bfloat16(causal) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(2, 3, 40, 16).bfloat16().double() for _ in range(4)]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, weights = (each.to(dtype).requires_grad_() for each in drawn)
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        (out * weights).sum().backward()
        return [each.detach().double() for each in (out, q.grad, k.grad, v.grad)]

    with fast_attention(SHORT, bf16=True):
        found = run(torch.bfloat16)
    for ours, exact in zip(found, run(torch.float64), strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()
