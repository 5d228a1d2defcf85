"""An OLMo is a Llama once its embedding and projections are recentred, and opens without code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm import to_llama
from lamella.stack import open_model
from lamella.zoo.nano import nano, randomise

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def olmo(**changes: Any) -> Any:
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES | changes)).eval()
    randomise(model, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(3)  # so that a forgotten mean is loud
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
@torch.no_grad()
def test_it_computes_the_same_and_generates_the_same_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    model = olmo(**changes)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    to_llama(open_model(model, name="olmo")).save_pretrained(tmp_path)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert type(llama) is transformers.LlamaForCausalLM and not list(tmp_path.glob("*.py"))
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    torch.testing.assert_close(llama(ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(llama.generate(ids, **options), model.generate(ids, **options))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    naive = transformers.LlamaForCausalLM(llama.config).eval()  # the mistake: nothing recentred
    naive.load_state_dict(before, strict=False)
    assert float((naive(ids).logits - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_what_llama_cannot_express_is_refused_in_one_line() -> None:
    for model in (olmo(clip_qkv=8.0), nano("gpt2")):
        with pytest.raises(MethodError, match="has no Llama layout") as found:
            to_llama(open_model(model, name="it"))
        assert "\n" not in str(found.value)
