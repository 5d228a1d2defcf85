"""GGUF files: read by transformers they equal the checkpoint, and what they cannot express is refused."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AddedToken, GemmaTokenizer

import lamella
from lamella.errors import ArchitectureError, CheckpointError, ExportError, LamellaError, NumericsError
from lamella.plan import HeadWidth, ModelReference, Plan
from lamella.plan.export import export
from lamella.plan.quantize import gguf_bytes, gguf_copy, is_available
from lamella.plan.quantize.gguf import neighbouring
from lamella.plan.quantize.vocabulary import add_tokenizer
from lamella.zoo import convert_gguf, open_tokenizer

from .conftest import NANO_LLAMA, Saved, findings, quantize

IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return lamella.open(folder).model(IDS, use_cache=False).logits


def again(file: Path, folder: Path) -> Path:
    """Return the checkpoint that transformers reads from a GGUF file."""
    folder.mkdir()
    convert_gguf(file, folder)
    return folder


def field(file: Path, key: str) -> Any:
    found = GGUFReader(file).fields[key]
    values = [found.parts[place].tolist() for place in found.data]
    return [value[0] for value in values]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_file_in_32_bits_gives_back_the_logits_of_the_checkpoint(family: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(family)
    file = quantize(folder, tmp_path / "out", "f32")
    back = again(file, tmp_path / "back")
    torch.testing.assert_close(logits(back), logits(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_in_8_bits_gives_back_the_logits_of_rounded_weights(family: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(family)
    file = quantize(folder, tmp_path / "out")
    back = logits(again(file, tmp_path / "back"))
    model = lamella.open(folder).model
    with torch.no_grad():
        for each in model.parameters():
            if each.ndim == 2:  # by the definition: 32 weights share absmax / 127, kept in 16 bits
                blocks = each.double().reshape(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True) / 127
                each.copy_(((blocks / scale).round() * scale.half().double()).reshape(each.shape))
        rounded = model(IDS, use_cache=False).logits
    torch.testing.assert_close(back, rounded, rtol=1e-3, atol=1e-3)
    assert (back - logits(folder)).abs().max() > 0.01  # the weights are not the original's


# Of these, transformers' reader takes the size of heads or the scale of attention from elsewhere.
@pytest.mark.parametrize(("family", "arch"), [("qwen3", "QWEN3"), ("gemma3_text", "GEMMA3")])
def test_a_file_has_every_tensor_of_the_checkpoint(family: str, arch: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(family)
    file = quantize(folder, tmp_path / "out", "f32")
    stored = {each.name: each.data for each in GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 7)
    given = load_file(folder / "model.safetensors")
    assert len(stored) == len(given)
    for name, values in given.items():
        stem, _, what = name.rpartition(".")
        more = 1.0 if family == "gemma3_text" and stem.endswith("norm") else 0.0  # its norms multiply by 1 + weight
        np.testing.assert_array_equal(stored[f"{names.get_name(stem)}.{what}"], values.numpy() + np.float32(more))


def test_the_rows_of_a_head_are_interleaved() -> None:
    rows = np.arange(12.0).reshape(12, 1)  # two heads of six: 0 1 2 | 3 4 5, and 6 7 8 | 9 10 11
    assert neighbouring(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(("kind", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_matrices_have_the_requested_bits(kind: str, bits: float, saved: Saved, tmp_path: Path) -> None:
    file = quantize(saved(), tmp_path / "out", kind)
    for each in GGUFReader(file).tensors:
        assert each.n_bytes * 8 == each.n_elements * (bits if len(each.shape) == 2 else 32), each.name


def test_blocks_are_those_of_the_reference(saved: Saved, tmp_path: Path) -> None:
    folder = saved()
    file = quantize(folder, tmp_path / "out")
    model = lamella.open(folder).model
    copy = gguf_copy(model, "q8_0")
    for ours, given in zip(copy.parameters(), model.parameters(), strict=True):
        values = given.detach().numpy()
        if given.ndim == 2:
            blocks = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(ours.numpy(), values)
    stored = sum(int(each.n_bytes) for each in GGUFReader(file).tensors)
    assert gguf_bytes(model, "q8_0") == stored


def test_rows_that_are_no_whole_blocks_keep_16_bits(saved: Saved, tmp_path: Path) -> None:
    file = quantize(saved(intermediate_size=40), tmp_path / "out")
    kinds = {each.name: each.tensor_type for each in GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0


def test_a_tied_head_is_stored_once(saved: Saved, tmp_path: Path) -> None:
    folder = saved(tie_word_embeddings=True)
    file = quantize(folder, tmp_path / "out", "f32")
    assert "output.weight" not in {each.name for each in GGUFReader(file).tensors}
    torch.testing.assert_close(logits(again(file, tmp_path / "back")), logits(folder))


def test_removed_layers_are_not_in_the_file(saved: Saved, tmp_path: Path) -> None:
    stack = lamella.open(saved())
    cut = export(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]), tmp_path / "cut")
    file = quantize(cut, tmp_path / "out", "f32")
    assert field(file, "llama.block_count") == [3]
    torch.testing.assert_close(logits(again(file, tmp_path / "back")), logits(cut))


def cut_widths(folder: Path, out: Path, width: dict[str, Any], **more: Any) -> Path:
    stack = lamella.open(folder)
    plan = Plan(model=ModelReference.of(stack), width=width, **more)
    return export(stack, plan, out, form="native", tokenizer=open_tokenizer(folder))


CHANNELS = {f"layers.{layer}.mlp.channels": list(range(32 + 8 * layer)) for layer in range(4)}
HEADS = {"layers.1.attn.heads": HeadWidth(keep=[0, 2], kv_of=[0, 1])}


def test_different_widths_are_stored_per_layer(saved: Saved, tmp_path: Path) -> None:
    file = quantize(cut_widths(saved(), tmp_path / "cut", CHANNELS | HEADS), tmp_path / "out")
    assert field(file, "deci.feed_forward_length") == [32, 40, 48, 56]
    assert field(file, "deci.attention.head_count") == [4, 2, 4, 4]
    assert field(file, "deci.attention.head_count_kv") == [2, 2, 2, 2]


def test_tokenizer_and_chat_template_come_back(saved: Saved, tmp_path: Path) -> None:
    folder = saved()
    tokenizer = open_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    file = quantize(folder, tmp_path / "out")
    back = open_tokenizer(again(file, tmp_path / "back"))
    for text in ("def f(x): return x", "  two  spaces\n\nand 123 lines", "naïve 日本語 😀", "<eos> is special"):
        assert back(text).input_ids == tokenizer(text).input_ids
    assert back.chat_template == tokenizer.chat_template
    assert (back.bos_token, back.eos_token, back.pad_token) == ("<bos>", "<eos>", "<pad>")


@pytest.mark.parametrize("kind", ["q8_0", "int8"])
def test_the_licence_goes_with_the_weights(kind: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved()
    (folder / "LICENSE.html").write_text("the terms")
    (folder / "NOTICE").write_text("a notice")
    quantize(folder, tmp_path / "out", kind)
    assert (tmp_path / "out" / "LICENSE.html").read_text() == "the terms"
    assert (tmp_path / "out" / "NOTICE").read_text() == "a notice"


def test_runs_of_spaces_that_are_added_tokens_are_written_as_spaces(tmp_path: Path) -> None:
    """llama.cpp divides the text by them before it replaces spaces; so do the files that it writes itself."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "▁▁", "▁x"]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[("▁", "▁")])
    tokenizer.add_tokens([AddedToken("▁▁", normalized=True)])
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", "gemma3")
    add_tokenizer(writer, tokenizer, len(tokens))
    written = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    assert written == [*tokens[:6], "  ", "▁x"]


def test_positions_of_a_llama_3_are_scaled_as_its_config_says(saved: Saved, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = saved(rope_parameters=rope)
    file = quantize(folder, tmp_path / "out", "f32")
    [factors] = [each.data for each in GGUFReader(file).tensors if each.name == "rope_freqs.weight"]
    plain = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    model = lamella.open(folder).model.model
    np.testing.assert_allclose(plain / factors, model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)  # short waves stay, long ones are stretched


REFUSED: dict[str, tuple[str, dict[str, Any], type[LamellaError], str]] = {
    "a family": ("gpt2", {}, ArchitectureError, "a gpt2 cannot be written as GGUF, only llama"),
    "windows": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, ExportError, "windows in another order"),
    "scale": ("gemma3_text", {"query_pre_attn_scalar": 16}, ExportError, "a custom attention scale"),
    "biases": ("qwen3", {"attention_bias": True}, ExportError, "biases in attention"),
    "activation": ("llama", {"hidden_act": "relu"}, ExportError, "the activation relu"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(what: str, saved: Saved, tmp_path: Path) -> None:
    family, overrides, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        quantize(saved(family, **overrides), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_whole_layers_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder, out = saved(), tmp_path / "out"
    uneven = {"layers.1.attn.heads": HeadWidth(keep=[0, 1, 2], kv_of=[0, 0, 1])}
    with pytest.raises(ExportError, match="single sublayers are removed"):
        quantize(cut_widths(folder, tmp_path / "sublayer", {}, drop=["layers.1.mlp"]), out)
    with pytest.raises(ExportError, match="layer 1 groups its heads unevenly"):
        quantize(cut_widths(folder, tmp_path / "heads", uneven), out)
    with pytest.raises(ExportError, match="layers of different widths"):
        quantize(cut_widths(saved("qwen2"), tmp_path / "qwen2", CHANNELS), out)
    assert not out.exists()


def test_damaged_checkpoints_are_refused(saved: Saved, tmp_path: Path) -> None:
    folder, out = saved(), tmp_path / "out"
    given = load_file(folder / "model.safetensors")
    first = "model.layers.0.mlp.up_proj.weight"
    for changed, error, message in (
        ({first: given[first][:32]}, CheckpointError, "layer 0 is not as wide as its config.json says"),
        ({first: given[first] * float("nan")}, NumericsError, f"{first}: has entries that q8_0 cannot hold"),
        ({first: given[first].to(torch.int8)}, ExportError, "is I8: give the unquantised checkpoint"),
        ({first: given[first][0].clone()}, CheckpointError, r"has the shape \[32\]"),
        ({"../../evil": given[first].clone()}, ExportError, "llama.cpp has no tensor for ../../evil"),
    ):
        save_file(given | changed, folder / "model.safetensors")
        with pytest.raises(error, match=message):
            quantize(folder, out)
    save_file({name: each for name, each in given.items() if name != first}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not those of 4 whole layers"):
        quantize(folder, out)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing half-written


def test_a_tokenizer_that_splits_otherwise_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = saved()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"type": "ByteLevel"', '"type": "Whitespace"', 1))
    with pytest.raises(ExportError, match="this tokenizer splits text by Whitespace"):
        quantize(folder, tmp_path / "out")
    with pytest.raises(ExportError, match="has a token 511, but the embedding 300 rows"):
        quantize(saved(vocab_size=300), tmp_path / "out")


@pytest.mark.parametrize(("given", "asked"), [([], None), (["--quantize-kind", "int8"], "int8")])
def test_a_compression_is_quantised_only_on_request(
    given: list[str], asked: str | None, lamella: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(slug: str, **options: Any) -> None:
        assert options.get("quantize_kind") == asked and "quantize" not in options
        raise LamellaError("the command was called")

    monkeypatch.setattr("lamella.runner.run", run)
    done = lamella("compress", str(NANO_LLAMA), *given, "-o", str(tmp_path / "out"))
    assert done.err == "lamella: the command was called\n"


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_comes_back_from_8_bits(tmp_path: Path) -> None:
    file, report = quantize("smollm2", tmp_path / "out"), findings(tmp_path / "out")
    assert 3.6 < report["before"] / report["after"] < 3.8  # 34 bytes for 32 weights, the tokenizer, the vectors
    back = again(file, tmp_path / "back")
    tokenizer, ours = open_tokenizer("smollm2"), open_tokenizer(back)
    text = str(lamella.load_text("pydoc", "test"))[:4000]
    assert ours(text).input_ids == tokenizer(text).input_ids
    copy = gguf_copy(lamella.open("smollm2").model, "q8_0")
    ids = torch.tensor([tokenizer(text).input_ids[:64]])
    with torch.no_grad():
        torch.testing.assert_close(
            lamella.open(back).model(ids).logits, copy(ids).logits, rtol=1e-3, atol=1e-2
        )  # the same weights, but for the order in which rows are added up


# 4 bits

needs_llama_cpp = pytest.mark.skipif(not is_available("q4_k_m"), reason="needs xllamacpp")


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_in_4_bits_gives_back_the_logits_of_its_copy(family: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(family, hidden_size=256, intermediate_size=512)  # whole blocks of 256 values
    model = lamella.open(folder).model
    file = quantize(folder, tmp_path / "out", "q4_k_m")
    with torch.no_grad():
        copied = gguf_copy(model, "q4_k_m")(IDS, use_cache=False).logits
    back = logits(again(file, tmp_path / "back"))
    torch.testing.assert_close(back, copied, rtol=1e-3, atol=1e-3)
    assert (back - logits(folder)).abs().max() > 0.01
    assert gguf_bytes(model, "q4_k_m") == sum(int(each.n_bytes) for each in GGUFReader(file).tensors)


@needs_llama_cpp
def test_types_are_mixed_as_by_llama_quantize(tmp_path: Path) -> None:
    file = quantize(NANO_LLAMA, tmp_path / "out", "q4_k_m")
    kinds = {each.name: each.tensor_type.name for each in GGUFReader(file).tensors}
    # What llama-quantize printed for the f32 file of this model, whose hidden size, 96, is no whole block of 256.
    assert Counter(kinds.values()) == {"Q5_0": 34, "F32": 13, "Q4_K": 4, "Q8_0": 3, "Q6_K": 2}
    assert kinds["blk.5.attn_v.weight"] == "Q8_0" and kinds["blk.5.ffn_down.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.5.attn_q.weight"] == "Q5_0"


def test_4_bits_without_llama_cpp_are_refused(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(LamellaError, match=r"llama\.cpp needs xllamacpp: pip install 'lamella\[llama-cpp\]'"):
        quantize(saved(intermediate_size=256), tmp_path / "out", "q4_k_m")
