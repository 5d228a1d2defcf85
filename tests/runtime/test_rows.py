"""A layer that runs for some rows of a batch: others keep their hidden states, from which later tokens see keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import lamella
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import LayerCall, Pass, Policy, empty_cache, parallel, traced, with_policy
from lamella.zoo.nano import nano

ROWS, LENGTH = 4, 9
IDS = torch.randint(3, 120, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
SOURCE = torch.randint(3, 120, (ROWS, 7), generator=torch.Generator().manual_seed(1))
SOURCE_MASK = torch.ones_like(SOURCE)
SOURCE_MASK[2, 4:] = 0


class SomeRows(Policy):
    """Each layer runs for three rows of four."""

    crosses = True

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        runs = torch.arange(len(h)) != call.index % len(h)
        if run.cache is None:
            return run.choose(call, ~runs[:, None], h, call(h))
        rows = runs.nonzero().flatten()
        return h.index_copy(0, rows, call.run_rows(h, rows))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
@torch.no_grad()
def test_steps_equal_whole_sequences_and_count_what_has_run(name: str) -> None:
    model = lamella.open(nano(name, **({"num_decoder_layers": 4} if name == "t5" else {})).double())
    reads = name in ("bart", "t5")
    stack = model.stacks["decoder" if reads else "text"]
    plan = Plan(model=ModelReference.of(model), policies={stack.stack: PolicyReference(name="mue")})
    view = with_policy(stack, plan, SomeRows(stack))
    source = {"input_ids": SOURCE, "attention_mask": SOURCE_MASK} if reads else {}
    ids, mask = ("decoder_input_ids", "decoder_attention_mask") if reads else ("input_ids", "attention_mask")
    whole = parallel(view, {**source, ids: IDS, mask: MASK}, torch.full((ROWS,), 4)).logits
    for cuts in ((1, 2, 3, 4, 5, 6, 7, 8), (4, 6)):
        cache, begin, parts, known = empty_cache(view, 4), 0, [], source
        trace = traced(view)
        for end in (*cuts, LENGTH):
            given: dict[str, Any] = {ids: IDS[:, begin:end], mask: MASK[:, :end]}
            out = view(**known, **given, cache=cache, use_cache=True)
            parts.append(out.logits)
            begin = end
            if reads:
                read = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
                known = {"encoder_outputs": read, "attention_mask": SOURCE_MASK}
        assert (torch.cat(parts, dim=1) - whole)[MASK.bool()].abs().max() <= 1e-9
        ran, _, _ = trace.joined()
        for layer in range(len(stack)):
            assert ran[:, :, layer].all(axis=(1, 2)).tolist() == [row != layer % ROWS for row in range(ROWS)]
            assert not ran[layer % ROWS, :, layer].any()
