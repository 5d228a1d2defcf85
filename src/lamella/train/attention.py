"""How attention is computed in a step of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.backends.cuda import allow_fp16_bf16_reduction_math_sdp, fp16_bf16_reduction_math_sdp_allowed
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST = 512  # tokens in a row


@contextmanager
def quick_attention(batch: Mapping[str, Any], bf16: bool) -> Iterator[None]:
    """Attention by plain products, where that is quicker: in bfloat16, on a processor, over rows that are not long.

    With torch's fused kernel for processors both passes take up to three times as long there, the longer the narrower
    heads are. Long rows keep it: it holds no number for every pair of tokens, and catches up.

    Args:
        batch: what the step is given; its rows are as long as its ``input_ids`` [batch, time], and unknown without.
        bf16: whether it is computed in bfloat16.
    """
    rows = batch.get("input_ids")
    if not (bf16 and isinstance(rows, Tensor) and rows.device.type == "cpu" and rows.shape[-1] <= LONGEST):
        yield
        return
    before = fp16_bf16_reduction_math_sdp_allowed()
    allow_fp16_bf16_reduction_math_sdp(True)  # otherwise products are in float32, which takes the gain away
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        allow_fp16_bf16_reduction_math_sdp(before)
