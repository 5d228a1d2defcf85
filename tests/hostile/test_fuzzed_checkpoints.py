"""Untrusted model folders: each is opened, or rejected in one line, and nothing outside of it is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import EVIL, answered, damaged, dumped, mutated, parts_of, refusal, safetensors_files, share, values

import lamella
from lamella.errors import CheckpointError, LamellaError
from lamella.plan import checkpoint
from lamella.zoo import check_folder, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
HEADER, DATA = parts_of(NANO_LLAMA / "model.safetensors")
CONFIG = json.loads((NANO_LLAMA / "config.json").read_text())
TOKENIZER = json.loads((NANO_LLAMA / "tokenizer.json").read_text())
TOKENIZER["model"]["vocab"] = dict(
    list(TOKENIZER["model"]["vocab"].items())[:80]
)  # small enough to be damaged at random
TOKENIZER["model"]["merges"] = TOKENIZER["model"]["merges"][:10]
SMALL = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.0.b": {"dtype": "I8", "shape": [8], "data_offsets": [24, 32]},
    "model.layers.1.a": {"dtype": "BF16", "shape": [4], "data_offsets": [32, 40]},
    "c": {"dtype": "BOOL", "shape": [0], "data_offsets": [40, 40]},
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

READERS: dict[str, Callable[[Path], Any]] = {
    "read": checkpoint.read,
    "digested": lambda folder: checkpoint.digest(checkpoint.read(folder).tensors),
    "copied": lambda folder: checkpoint.write(checkpoint.read(folder).tensors, made(folder / "copy")),
    "checked": check_folder,
}


@pytest.fixture
def around(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a secret file, which contains the model's folder."""
    return with_canaries(tmp_path_factory.mktemp("around"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint, next to a secret file."""
    return fresh(with_canaries(tmp_path_factory.mktemp("around")) / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano Llama, next to a secret file."""
    return Path(shutil.copytree(NANO_LLAMA, with_canaries(tmp_path_factory.mktemp("around")) / "model"))


def with_canaries(around: Path) -> Path:
    for name in ("canary", "canary.safetensors"):
        shutil.copyfile(NANO_LLAMA / "model.safetensors", around / name)
    return around


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(dumped(CONFIG))
    return folder


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# Headers and bytes of safetensors files.


@pytest.mark.parametrize("reader", READERS)
@example(content=len(b"[" * 50_000).to_bytes(8, "little") + b"[" * 50_000)
@given(content=safetensors_files(SMALL, bytes(40)))
def test_a_damaged_safetensors_file_is_read_or_refused(folder: Path, reader: str, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    with answered(folder):
        READERS[reader](folder)


def test_the_valid_file_that_is_damaged_above_is_one(folder: Path):
    fresh(folder)
    (folder / "model.safetensors").write_bytes(json_file(SMALL))
    for read in READERS.values():
        read(folder)


def json_file(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(40)


@share(4)
@given(content=safetensors_files(HEADER, DATA))
def test_a_model_with_damaged_weights_is_opened_or_refused(model: Path, content: bytes):
    (model / "model.safetensors").write_bytes(content)
    with answered(model):
        lamella.open(model)


# Indexes.


INDEX = {"metadata": {"total_size": 40}, "weight_map": {name: SHARDS[name == "c"] for name in SMALL if name[0] != "_"}}


def written_shards(folder: Path) -> None:
    of = {shard: {n: SMALL[n] for n, s in INDEX["weight_map"].items() if s == shard} for shard in SHARDS}
    of[SHARDS[1]]["c"] = {"dtype": "BOOL", "shape": [0], "data_offsets": [0, 0]}
    for shard, header in of.items():
        text = json.dumps(header).encode()
        (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text + bytes(40 if shard == SHARDS[0] else 0))


@pytest.mark.parametrize("reader", ["read", "checked"])
@given(content=st.one_of(mutated(INDEX), mutated(INDEX, most=1), values).map(dumped).map(str.encode))
def test_a_damaged_index_is_read_or_refused(folder: Path, reader: str, content: bytes):
    written_shards(folder)
    (folder / "model.safetensors.index.json").write_bytes(content)
    with answered(folder):
        READERS[reader](folder)


OUTSIDE = ["../canary", "../canary.safetensors", "a/b", "a\\b", "/etc/passwd", "", ".", "..", "\0", "\ud800", "x" * 300]


@pytest.mark.parametrize("name", [*OUTSIDE, 3, None, ["x"], {}, True, "ABSOLUTE"])
@pytest.mark.parametrize("reader", ["read", "checked", "opened"])
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(around: Path, reader: str, name: Any):
    model = Path(shutil.copytree(NANO_LLAMA, around / "model"))
    name = str(around / "canary.safetensors") if name == "ABSOLUTE" else name
    (model / "model.safetensors").rename(model / SHARDS[0])
    weights = dict.fromkeys(load_file(NANO_LLAMA / "model.safetensors"), SHARDS[0])
    weights["model.norm.weight"] = name
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with answered(model):
        with pytest.raises(CheckpointError) as error:
            {**READERS, "opened": lamella.open}[reader](model)
        assert str(model) in refusal(error.value)


def test_a_shard_of_another_kind_than_a_file_is_refused(around: Path):
    model = fresh(around / "model")
    written_shards(model)
    (model / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (model / SHARDS[1]).unlink()
    os.mkfifo(model / SHARDS[1])
    with answered(model, seconds=5), pytest.raises(CheckpointError):
        checkpoint.read(model)


# Configs, tokenizers, and what else lies in a folder.

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
SIZES += ["num_key_value_heads", "max_position_embeddings"]
ODD_SIZES = [0, -1, 10**6, 10**13, 2**63, 10**40, 0.5, 1e300, True, None, "96", {}]


def restored(model: Path) -> Path:
    """The model as it was before an earlier example."""
    for file in NANO_LLAMA.iterdir():
        if not (model / file.name).exists() or (model / file.name).read_bytes() != file.read_bytes():
            shutil.copyfile(file, model / file.name)
    return model


@share(2)
@example(content=b"[" * 100_000)
@example(content=b'{"model_type": "llama", "num_hidden_layers": ' + b"9" * 5000 + b"}")
@given(
    content=st.one_of(mutated(CONFIG).map(dumped).map(str.encode), st.just(dumped(CONFIG).encode()).flatmap(damaged))
)
def test_a_model_with_a_damaged_config_is_opened_or_refused(model: Path, content: bytes):
    (restored(model) / "config.json").write_bytes(content)
    with answered(model):
        lamella.open(model)


@pytest.mark.parametrize("size", ODD_SIZES, ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_a_config_of_another_size_than_its_weights_is_refused_or_fits(model: Path, name: str, size: Any):
    (restored(model) / "config.json").write_text(json.dumps(CONFIG | {name: size}))
    with answered(model, seconds=10, gigabytes=2):
        opened = lamella.open(model)
        kept = {"num_hidden_layers": len(opened), "vocab_size": opened.unembedding.weight.shape[0]}
        assert kept.get(name, size) == size


@share(4)
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]),
    data=st.data(),
)
def test_a_folder_with_a_damaged_companion_is_opened_or_refused(model: Path, name: str, data: st.DataObject):
    whole: dict[str, Any] = {
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": json.loads((NANO_LLAMA / "tokenizer_config.json").read_text()),
        "generation_config.json": json.loads((NANO_LLAMA / "generation_config.json").read_text()),
        "chat_template.jinja": "{{ messages[0].content }}",
    }
    document = mutated(whole[name]).map(dumped).map(lambda text: text.encode("utf-8", "surrogatepass"))
    content = data.draw(st.one_of(document, st.just(dumped(whole[name]).encode()).flatmap(damaged)))
    (restored(model) / "chat_template.jinja").unlink(missing_ok=True)
    (model / name).write_bytes(content)
    with answered(model):
        lamella.load(model)
    with answered(model):
        tokenizer = open_tokenizer(model)
        tokenizer("Some text.")
    (model / name).unlink()


NAMES = ["model_type", "dtype", "_name_or_path", "auto_map", "quantization_config", "architectures", "rope_parameters"]


@share(2)
@given(name=st.sampled_from(NAMES), text=st.sampled_from(EVIL), nested=st.booleans())
def test_no_name_in_a_config_is_followed(model: Path, name: str, text: str, nested: bool):
    keys = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "quant_method", "rope_type")
    (restored(model) / "config.json").write_text(
        json.dumps(CONFIG | {name: dict.fromkeys(keys, text) if nested else text})
    )
    with answered(model):
        lamella.open(model)


def test_the_undamaged_model_is_opened(model: Path):
    with answered(model):
        try:
            assert len(lamella.open(restored(model))) == 6
        except LamellaError as error:
            raise AssertionError from error


def test_weights_that_no_name_of_the_model_takes_are_harmless(model: Path):
    tensors = load_file(restored(model) / "model.safetensors")
    save_file(
        tensors | {name: tensors["model.norm.weight"].clone() for name in ("../canary", "\n", "x" * 300)},
        model / "model.safetensors",
        {"format": "pt"},
    )
    with answered(model):
        lamella.open(model)
    restored(model)
