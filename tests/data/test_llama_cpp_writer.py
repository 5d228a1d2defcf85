"""A GGUF file as the writer: it writes what the checkpoint writes, several requests at a time, and resumes."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

import lamella
from lamella.data import InputContext, LocalWriter, Sampling
from lamella.data.writer import FileWriter, Writer, WritingRequest
from lamella.errors import LamellaError
from lamella.plan.quantize import write_gguf
from lamella.zoo import open_config, open_tokenizer

pytest.importorskip("xllamacpp")
NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
TEXTS = ("The", "A function that returns the value of", "Return the name", "class Path", "If the file does not exist")
REQUESTS = [WritingRequest(str(n), [{"role": "user", "content": text}], 12, n) for n, text in enumerate(TEXTS)]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    shutil.copytree(NANO_LLAMA, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = open_tokenizer(folder / "model")
    write_gguf(folder / "model", open_config(folder / "model"), tokenizer, folder / "nano.gguf", "f32", name="nano")
    return folder / "nano.gguf"


def test_it_writes_what_the_checkpoint_writes(file: Path) -> None:
    writer = Writer.open(file, InputContext(), batch=3)
    assert isinstance(writer, FileWriter)
    found = {request.key: answer for each in writer.write(REQUESTS, GREEDY) for request, answer in each}
    local = LocalWriter(str(file.parent / "model"))
    wanted = {request.key: answer for each in local.write(REQUESTS, GREEDY) for request, answer in each}
    assert {key: answer.text for key, answer in found.items()} == {key: answer.text for key, answer in wanted.items()}
    assert all(found[key].read == wanted[key].read for key in wanted)
    assert all(abs(found[key].tokens - wanted[key].tokens) <= 1 for key in wanted)  # an end token counts or not
    assert writer.count("The file") == local.count("The file")


def test_answered_requests_are_skipped_and_another_process_opens_the_file(file: Path) -> None:
    writer = pickle.loads(pickle.dumps(FileWriter(file, batch=2)))
    found = [request.key for each in writer.write(REQUESTS, GREEDY, {"0", "2"}) for request, _ in each]
    assert sorted(found) == ["1", "3", "4"]
    assert writer.describe()["sha256"] == FileWriter(file).describe()["sha256"]
    long = WritingRequest("long", [{"role": "user", "content": "The " * 5000}], 4, 0)
    assert writer.has_room(REQUESTS[0]) and not writer.has_room(long)


def test_what_it_cannot_do_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(LamellaError, match=r"llama\.cpp cannot run under a draft"):
        Writer.open(file, InputContext(), draft="lookup")
    with pytest.raises(LamellaError, match="there is no file"):
        Writer.open(tmp_path / "missing.gguf", InputContext())
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LamellaError, match="cannot be opened") as error:
        Writer.open(tmp_path / "broken.gguf", InputContext())
    assert "\n" not in str(error.value)
    assert lamella.open(NANO_LLAMA).name  # the process goes on
