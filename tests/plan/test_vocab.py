"""Plans that keep some tokens: every text is still encoded, and predictions are those of the original among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lamella
from lamella.data import load_text
from lamella.errors import ArchitectureError, LamellaError, MethodError, PlanError
from lamella.evaluate import ByteLoss, FidelityTest
from lamella.plan import ModelReference, Plan, PlanSeries, Point, StackReference, compose, cut_tokenizer, materialise
from lamella.plan.export import export, export_out_of_core
from lamella.plan.tokenizer import Merges, cut_settings, settings_of
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
KEPT = [0, 1, 2, *range(5, 100), 127]  # of the 128 tokens of nano models
IDS = torch.tensor(KEPT)[torch.randint(len(KEPT), (2, 12), generator=torch.Generator().manual_seed(0))]
NEW = torch.searchsorted(torch.tensor(KEPT), IDS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Tokenizers


def on_bytes() -> Any:
    """The tokenizer of the nano Llama: byte-level BPE, like that of GPT-2 and Llama 3."""
    return open_tokenizer(NANO_LLAMA)


def trained(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(load_text("pydoc", "calibration").texts[:20], trainer)
    return tokenizer


def on_characters() -> Any:
    """A tokenizer like that of Llama 2: merged characters, spaces as a token, and bytes for other characters."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    settings = json.loads(trained(tokenizer, special).to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # bytes are tokens, but not added ones
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def with_additions() -> Any:
    """A tokenizer like that of Qwen: Unicode is normalised, and special tokens follow the merged ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(load_text("pydoc", "calibration").texts[:20], trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|start|>"]})
    return found


TOKENIZERS = {"bytes": on_bytes(), "characters": on_characters(), "additions": with_additions()}
WORDS = ["the", " value", " of", "string", "\n", "  ", "é", "日本", "🦙", "<eos>", "</s>", "<|end|>", "<0x41>", "▁"]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=8).map("".join))


@given(name=st.sampled_from(sorted(TOKENIZERS)), text=TEXTS, some=st.sets(st.integers(0, 690), max_size=60))
def test_a_smaller_vocabulary_encodes_every_text(name: str, text: str, some: set[int]) -> None:
    original = TOKENIZERS[name]
    kept = Merges(settings_of(original)).closed(each for each in some if each < len(original))
    smaller = cut_tokenizer(original, kept)
    ids = smaller(text)["input_ids"]
    assert all(0 <= token < len(kept) for token in ids)
    assert smaller.decode(ids) == original.decode(original(text)["input_ids"])
    assert len(ids) >= len(original(text)["input_ids"])


@given(name=st.sampled_from(sorted(TOKENIZERS)), text=TEXTS, other=TEXTS)
def test_a_text_whose_tokens_are_kept_is_encoded_as_before(name: str, text: str, other: str) -> None:
    original = TOKENIZERS[name]
    ids = original(text)["input_ids"]
    kept = Merges(settings_of(original)).closed([*ids, *original(other)["input_ids"]])
    assert [kept[token] for token in cut_tokenizer(original, kept)(text)["input_ids"]] == ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_kept_token_can_be_reached(name: str) -> None:
    original = TOKENIZERS[name]
    settings = settings_of(original)
    kept = Merges(settings).closed(range(0, len(original), 7))
    smaller = cut_tokenizer(original, kept)
    rank = smaller.backend_tokenizer.model
    for token in original.convert_ids_to_tokens(kept):
        if token in settings["model"]["vocab"] and token not in original.all_special_tokens and "<0x" not in token:
            assert [each.value for each in rank.tokenize(token)] == [token]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_all_tokens_kept_give_the_same_tokenizer(name: str) -> None:
    settings = settings_of(TOKENIZERS[name])
    assert cut_settings(settings, range(len(TOKENIZERS[name]))) == settings


def test_merges_that_make_a_token_in_several_ways_keep_the_one_that_is_used() -> None:
    # As converted from SentencePiece: every division of a token into two tokens is a merge.
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {token: 256 + index for index, token in enumerate(["▁", "a", "b", "c", "bc", "ab", "abc"])}
    merges = [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]
    settings = json.loads(Tokenizer(models.BPE(vocab, [], byte_fallback=True)).to_str())
    settings["model"]["merges"] = merges
    known = Merges(settings)
    assert known.parts(vocab["abc"]) == {vocab[each] for each in ("a", "b", "c", "bc", "abc")}
    kept = known.closed([vocab["abc"]])
    cut = Tokenizer.from_str(json.dumps(cut_settings(settings, kept)))
    assert cut.encode("abc").tokens == ["abc"] and cut.encode("ab").tokens == ["a", "b"]


@pytest.mark.parametrize("model", [models.Unigram([("a", 0.0)]), models.WordPiece({"a": 0}), models.BPE({"a": 0}, [])])
def test_tokenizers_that_could_not_encode_every_text_are_refused(model: Any) -> None:
    with pytest.raises(PlanError, match="does not merge bytes"):
        Merges(json.loads(Tokenizer(model).to_str()))


def test_a_vocabulary_without_bytes_or_parts_is_refused() -> None:
    settings = settings_of(TOKENIZERS["bytes"])
    with pytest.raises(PlanError, match=r"lacks 1 tokens .* such as 7: keep bytes"):
        cut_settings(settings, [each for each in range(512) if each != 7])


# Models


def opened(name: str, **overrides: Any) -> Stack:
    return Stack(nano(name, **overrides))


def plan_of(stack: Stack, kept: list[int] = KEPT, **more: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), width={"vocab": kept, **more.pop("width", {})}, **more)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "qwen2"])
def test_a_view_predicts_what_the_original_predicts_among_the_kept_tokens(name: str, tied: bool) -> None:
    stack = opened(name, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}
    view = lamella.apply(stack, plan_of(stack))
    assert torch.equal(view(input_ids=NEW).logits, stack.model(input_ids=IDS).logits[..., KEPT])
    assert view.config.vocab_size == len(KEPT) and stack.config.vocab_size == 128
    embedding, head = view.get_input_embeddings(), view.get_output_embeddings()
    assert embedding.num_embeddings == head.out_features == len(KEPT)
    assert (embedding.weight is head.weight) == tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.model.state_dict().items())
    assert sum(p.numel() for p in view.parameters()) == lamella.cost(stack, plan_of(stack)).parameters


def test_the_ids_of_special_tokens_follow(tmp_path: Path) -> None:
    stack = opened("llama", eos_token_id=[2, 127], pad_token_id=99, bos_token_id=1)
    stack.model.generation_config.suppress_tokens = [98]
    view = lamella.apply(stack, plan_of(stack))
    assert view.config.eos_token_id == [2, len(KEPT) - 1] and view.config.bos_token_id == 1
    assert view.config.pad_token_id == view.get_input_embeddings().padding_idx == KEPT.index(99)
    assert view.generation_config.suppress_tokens == [KEPT.index(98)]
    assert stack.config.eos_token_id == [2, 127] and stack.model.get_input_embeddings().padding_idx == 99
    saved = AutoModelForCausalLM.from_pretrained(export(stack, plan_of(stack), tmp_path / "out"))
    assert saved.generation_config.suppress_tokens == [KEPT.index(98)] and saved.config.pad_token_id == KEPT.index(99)


def test_all_tokens_kept_give_the_same_model(tmp_path: Path) -> None:
    stack = lamella.open(NANO_LLAMA)
    out = export(stack, plan_of(stack, list(range(512))), tmp_path / "out", tokenizer=open_tokenizer(NANO_LLAMA))
    before, after = (load_file(folder / "model.safetensors") for folder in (NANO_LLAMA, out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for file in ("config.json", "tokenizer.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (out, NANO_LLAMA))
        assert ours.items() >= theirs.items()  # exports also have older names of some settings


@pytest.mark.parametrize("out_of_core", [False, True])
def test_an_export_loads_with_its_tokenizer(out_of_core: bool, tmp_path: Path) -> None:
    stack, tokenizer = lamella.open(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    kept = Merges(settings_of(tokenizer)).closed(range(0, 512, 3))
    plan = plan_of(stack, kept, drop=["layers.2"])
    if out_of_core:
        out = export_out_of_core(NANO_LLAMA, plan, tmp_path / "out")
    else:
        out = export(stack, plan, tmp_path / "out", tokenizer=tokenizer)
    model, smaller = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = "The value of 日本 is a string."
    ids = smaller(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == cut_tokenizer(tokenizer, kept)(text)["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, lamella.apply(stack, plan)(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, materialise(stack, plan).model(input_ids=ids).logits)
    new = {name: getattr(smaller, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert new == {name: getattr(model.config, f"{name}_token_id") for name in new}
    assert new == {name: getattr(model.generation_config, f"{name}_token_id") for name in new}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_copied_from_disk_to_disk_in_every_dtype(tied: bool, tmp_path: Path) -> None:
    nano("llama", tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    stack = lamella.open(tmp_path / "source", dtype="auto")
    plan = plan_of(stack, width={"hidden.channels": list(range(16))})
    out = export_out_of_core(tmp_path / "source", plan, tmp_path / "out")
    copied = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    expected = lamella.apply(stack, plan).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.state_dict().items())


def test_files_of_other_tokenizers_do_not_stay_in_an_export(tmp_path: Path) -> None:
    source = tmp_path / "source"
    nano("qwen2", vocab_size=702, eos_token_id=700).save_pretrained(source)
    TOKENIZERS["additions"].save_pretrained(source)
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"700": {"content": "<|end|>"}, "701": {"content": "<|start|>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    stack = lamella.open(source)
    kept = Merges(settings_of(TOKENIZERS["additions"])).closed([300])
    out = export(stack, plan_of(stack, kept), tmp_path / "out")
    assert not (out / "vocab.json").exists() and not (out / "merges.txt").exists()
    added = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert list(added) == [str(len(kept) - 2), str(len(kept) - 1)]
    assert AutoTokenizer.from_pretrained(out)("<|end|>")["input_ids"] == [len(kept) - 2]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("LlamaTokenizer", "characters"),
        ("GemmaTokenizer", "characters"),
        ("GPT2Tokenizer", "bytes"),
        ("Qwen2Tokenizer", "bytes"),
    ],
)
def test_classes_of_transformers_open_the_smaller_tokenizer(kind: str, name: str, tmp_path: Path) -> None:
    model, known = settings_of(TOKENIZERS[name])["model"], TOKENIZERS[name]
    special = {"bos_token": known.bos_token, "eos_token": known.eos_token, "pad_token": known.pad_token}
    special |= dict.fromkeys(("unk_token", "mask_token"), known.eos_token)
    merges = [tuple(pair) for pair in model["merges"]]
    original = getattr(transformers, kind)(vocab=model["vocab"], merges=merges, **special)
    original.save_pretrained(tmp_path / "source")
    ids = {f"{name}_token_id": getattr(original, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    nano("llama", vocab_size=len(original), **ids).save_pretrained(tmp_path / "source")
    stack = lamella.open(tmp_path / "source")
    kept = Merges(settings_of(original)).closed(range(0, len(original), 5))
    smaller = AutoTokenizer.from_pretrained(export(stack, plan_of(stack, kept), tmp_path / "out"))
    assert type(smaller).__name__ == kind and len(smaller) == len(kept)
    for text in ("The value of 日本 is  a string.\n🦙", "  x", "</s><eos> y"):
        encoded = smaller(text)["input_ids"]
        assert smaller.decode(encoded) == original.decode(original(text)["input_ids"]) and max(encoded) < len(kept)


def test_a_native_export_has_the_smaller_vocabulary(tmp_path: Path) -> None:
    stack = lamella.open(NANO_LLAMA)
    kept = Merges(settings_of(open_tokenizer(NANO_LLAMA))).closed([])
    plan = plan_of(stack, kept, drop=["layers.1.mlp"], width={"layers.0.mlp.channels": [3, 4]})
    out = lamella.open(export(stack, plan, tmp_path / "out", form="native"))
    ids = torch.arange(20)[None]
    assert torch.allclose(out.model(input_ids=ids).logits, lamella.apply(stack, plan)(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 1, 2, 128], "128 is out of range; there are 0 to 127"),
        ([0, 2, 1], "ascending order"),
        ([0, 1, 1, 2], "ascending order"),
        ([0, 1, 3], "lacks token 2, which is the eos_token_id of the model: keep it"),
    ],
)
def test_other_lists_are_refused(kept: list[int], message: str) -> None:
    stack = opened("llama", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with pytest.raises((LamellaError, ValueError), match=message):
        lamella.apply(stack, plan_of(stack, kept))


@pytest.mark.parametrize("name", ["llada", "vit", "opt"])
def test_tokens_are_those_of_decoders(name: str) -> None:
    reference = ModelReference.of(opened(name))
    assert reference[None].vocab == (128 if name == "opt" else None)
    if name != "opt":
        with pytest.raises(ValueError, match="only the tokens of a decoder of text can be removed"):
            Plan(model=reference, width={"vocab": [0, 1, 2]})


def test_a_vocabulary_is_part_of_the_plan() -> None:
    stack = opened("llama")
    plan = plan_of(stack)
    assert Plan.parse(plan.dump()) == plan and plan.dump().count("\n") < 60
    assert plan.digest != plan_of(stack, KEPT[:-1]).digest and plan.effect.endswith(f"{len(KEPT)} of 128 tokens kept")
    assert plan.work == Plan(model=plan.model).work and plan.removed == 0
    series = PlanSeries(model=plan.model, points=[Point(), Point(width=plan.width)])
    assert series.renames_tokens and not PlanSeries(model=plan.model, points=[Point()]).renames_tokens
    dropped = compose(plan, Plan(model=plan.model, drop=["layers.1"]))
    assert dropped.vocab == KEPT and dropped.drop == ["layers.1"]
    assert StackReference(family="llama", layers=2).vocab is None


# Comparisons


def test_the_loss_per_byte_is_the_mean_of_the_losses_of_all_tokens() -> None:
    stack, tokenizer = lamella.open(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    texts = ["The value of a string.", "日本 is"]
    expected = []
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logits = stack.model.double()(input_ids=ids).logits[0, :-1]
        expected.append(float(cross_entropy(logits, ids[0, 1:], reduction="sum")) / len(text.encode()))
    found = ByteLoss.of(stack.model, tokenizer, texts)
    assert found.loss.mean == pytest.approx(sum(expected) / 2, rel=1e-6) and found.bytes == 22 + 9
    assert found.length == sum(len(tokenizer(text)["input_ids"]) for text in texts) / 31


def test_a_text_whose_tokens_are_kept_is_never_less_likely() -> None:
    stack, tokenizer = lamella.open(NANO_LLAMA), open_tokenizer(NANO_LLAMA)
    text = load_text("stdlib", "test")[:600]
    kept = Merges(settings_of(tokenizer)).closed(tokenizer(text)["input_ids"])
    whole = ByteLoss.of(stack.model, tokenizer, [text])
    smaller = ByteLoss.of(lamella.apply(stack, plan_of(stack, kept)), cut_tokenizer(tokenizer, kept), [text])
    assert smaller.loss.mean < whole.loss.mean and smaller.length == whole.length


def test_a_comparison_token_by_token_is_refused() -> None:
    stack = opened("llama")
    with pytest.raises(ArchitectureError, match="cannot be compared token by token: compare their loss per byte"):
        FidelityTest(stack, IDS).of(lamella.apply(stack, plan_of(stack)))
    with pytest.raises(MethodError, match=r"texts are tokenized for the original: .*\(lamella apply\)"):
        lamella.registry.get_method("lora")(stack, IDS, plan_of(stack))
