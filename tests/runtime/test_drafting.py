"""Drafting: the tokens are those without a draft, its passes are counted, and it ends where it is slower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import lamella
from lamella.errors import CacheError, MethodError
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.runtime import Clock, Draft, Drafted, apply, generate_counted
from lamella.stack import share
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8] * 6, [0] * 4 + [9, 10, 3, 4] * 5])  # ragged, padded on the left
REPEATED = [0, 1, 2, 2, 3, 4, 5]
MASK = (torch.arange(24) >= torch.tensor([[0], [4]])).long()


def stack() -> Any:
    return lamella.open(NANO_LLAMA)


def plans(opened: Any) -> dict[str, Plan]:
    reference = ModelReference.of(opened)
    return {
        "whole": Plan(model=reference),
        "layers": Plan(model=reference, drop=["layers.2", "layers.3"]),
        "sublayers": Plan(model=reference, drop=["layers.1.attn", "layers.4.mlp"]),
        "repeated": Plan(model=reference, path={"text": PhasedPath(prefill=REPEATED, decode=REPEATED)}),
        "phased": Plan(model=reference, path={"text": PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 1, 4, 5])}),
    }


def always(model: Any, draft: Draft) -> Drafted:
    """Return a drafted model that never finds the draft too slow."""
    found = Drafted(model, draft)
    found._steps = {1: 1e9, 2: 1e9}
    return found


@pytest.mark.parametrize("name", ["whole", "layers", "sublayers", "repeated", "phased"])
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_greedy_tokens_are_those_without_a_draft(name: str, kind: str) -> None:
    opened = stack()
    view = apply(opened, plans(opened)[name])
    draft = Draft() if kind == "lookup" else Draft("cut", apply(opened, plans(opened)["layers"]))
    plain = view.generate(IDS, attention_mask=MASK, **GREEDY)
    drafted = always(view, draft)
    assert torch.equal(drafted.generate(IDS, attention_mask=MASK, **GREEDY), plain)
    assert drafted.counted.proposed > 0


def test_rows_end_where_they_end_without_a_draft() -> None:
    model = stack().model
    plain = model.generate(IDS, attention_mask=MASK, **GREEDY)
    end = int(plain[0, 30])  # a token that a row meets on its way
    settings = GREEDY | {"eos_token_id": end}
    expected = model.generate(IDS, attention_mask=MASK, **settings)
    assert torch.equal(always(model, Draft()).generate(IDS, attention_mask=MASK, **settings), expected)


def test_a_draft_of_the_same_weights_is_always_right_and_passes_are_counted() -> None:
    model = stack().model
    draft = share(model)
    draft.generation_config = GenerationConfig(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    ids, passes = generate_counted(model, IDS[:1], **GREEDY, assistant_model=draft)
    assert torch.equal(ids, model.generate(IDS[:1], attention_mask=MASK[:1], **GREEDY))
    assert passes.accepted == 1
    assert passes.tokens == passes.proposed + passes.passes == 40 - 5  # the first pass, over the prompt, gave five
    assert 0 < passes.verifying < passes.seconds


def test_samples_with_a_draft_have_the_distribution_of_those_without_it() -> None:
    model = nano("llama", vocab_size=4, eos_token_id=None).eval()
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    settings = {"max_new_tokens": 2, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        both = torch.stack(
            [first[token] * model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, -1].softmax(-1)
             for token in range(4)]
        )  # fmt: skip
    drafted, seen, draws = always(model, Draft()), torch.zeros(4, 4), 400
    torch.manual_seed(0)
    for _ in range(draws):
        one, other = drafted.generate(prompt, **settings)[0, -2:].tolist()
        seen[one, other] += 1
    expected = draws * both.double()
    chi_squared = float(((seen - expected) ** 2 / expected).sum())
    assert chi_squared < 15 + 4 * (2 * 15) ** 0.5  # four standard deviations above its mean


def test_drafting_ends_where_it_is_slower_and_says_so() -> None:
    drafted = Drafted(stack().model, Draft())
    assert str(drafted) == "" and drafted.gain is None
    drafted._steps = {2: 1e-9}
    plain = drafted.model.generate(IDS, attention_mask=MASK, **GREEDY)
    for _ in range(2):
        assert torch.equal(drafted.generate(IDS, attention_mask=MASK, **GREEDY), plain)
        assert not drafted.is_on
    assert str(drafted).endswith("x the speed of decoding without it, so drafting has ended.")


def test_streamers_receive_every_token_and_no_draft_is_the_model() -> None:
    model = stack().model
    for draft in (None, Draft()):
        clock = Clock()
        out = Drafted(model, draft).generate(IDS[:1], streamer=clock, **GREEDY)
        assert sum(count for count, _ in clock.given) == out.shape[1]
        assert torch.equal(out, model.generate(IDS[:1], attention_mask=MASK[:1], **GREEDY))


def test_what_cannot_be_drafted_is_refused_in_one_line() -> None:
    with pytest.raises(MethodError, match=r"draft: .* reads an encoder"):
        Drafted(nano("t5"), Draft())
    opened = stack()
    policy = PolicyReference(name="lora-drop", params={"droppable": [1, 2]})
    view = apply(opened, Plan(model=ModelReference.of(opened), policies={opened.stack: policy}))
    with pytest.raises(CacheError, match="counts its steps"):
        always(view, Draft()).generate(IDS[:1], **GREEDY)
