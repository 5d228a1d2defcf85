"""Text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamella.data import own_texts, write
from lamella.errors import CalibrationError
from lamella.zoo import open_stack, open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


def test_continuations_do_not_depend_on_the_batch_and_are_those_of_generate() -> None:
    model = open_stack(NANO_LLAMA).model
    tokenizer = open_tokenizer(NANO_LLAMA)
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("The", "A function that", "Return the value of")]
    together = write(model, prompts, 8)
    assert all(
        torch.equal(a, b) for a, b in zip(together, [write(model, [each], 8)[0] for each in prompts], strict=True)
    )
    state = torch.get_rng_state()
    first, again, other = (write(model, prompts, 8, top_p=0.9, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    expected = model.generate(prompts[1][None], max_new_tokens=8, do_sample=False)[0, len(prompts[1]) :]
    assert torch.equal(together[1], expected[: len(together[1])])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_an_encoder_decoder_writes_does_not_depend_on_the_batch_and_is_that_of_generate(name: str) -> None:
    model = nano(name).eval()
    model.generation_config.eos_token_id = None
    prompts = [
        torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(length)) for length in (4, 9, 6)
    ]
    together = write(model, prompts, 5)
    alone = [write(model, [each], 5)[0] for each in prompts]
    assert all(len(each) == 5 for each in together)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    expected = model.generate(prompts[0][None], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 1:]
    assert torch.equal(together[0], expected)


def test_own_texts_begin_with_the_start_token_and_only_accepted_ones_count() -> None:
    model = open_stack(NANO_LLAMA).model
    texts = own_texts(model, 5, 12, seed=1, accept=lambda text: len(text) == 13)
    assert len(texts) == 5 and all(text[0] == model.generation_config.bos_token_id for text in texts)
    with pytest.raises(CalibrationError, match="only 0 can be used"):
        own_texts(model, 2, 4, accept=lambda text: False)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(CalibrationError, match="no start token"):
        own_texts(model, 2, 4)


def test_what_follows_the_end_token_is_no_text() -> None:
    model = open_stack(NANO_LLAMA).model
    tokenizer = open_tokenizer(NANO_LLAMA)
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("The", "A function")]
    free = write(model, prompts, 8)
    model.generation_config.eos_token_id = int(free[0][3])
    stopped = write(model, prompts, 8)
    assert torch.equal(stopped[0], free[0][: free[0].tolist().index(int(free[0][3]))])
