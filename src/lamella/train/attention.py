"""The attention kernel used in a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.backends.cuda import allow_fp16_bf16_reduction_math_sdp, fp16_bf16_reduction_math_sdp_allowed
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST = 512  # tokens per sequence


@contextmanager
def fast_attention(batch: Mapping[str, Any], bf16: bool) -> Iterator[None]:
    """Use unfused attention where it is faster: in bfloat16, on a CPU, for sequences that are not long.

    There, torch's fused CPU kernel takes up to three times as long for both passes, the more so the narrower the heads
    are. Long sequences keep it: it stores no matrix over all pairs of tokens, and its speed catches up.

    Args:
        batch: the inputs of the step; its rows are as long as its ``input_ids`` [batch, time], and unknown without.
        bf16: whether it is computed in bfloat16.
    """
    rows = batch.get("input_ids")
    if not (bf16 and isinstance(rows, Tensor) and rows.device.type == "cpu" and rows.shape[-1] <= LONGEST):
        yield
        return
    before = fp16_bf16_reduction_math_sdp_allowed()
    allow_fp16_bf16_reduction_math_sdp(True)  # otherwise products are in float32, which cancels the speedup
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        allow_fp16_bf16_reduction_math_sdp(before)
