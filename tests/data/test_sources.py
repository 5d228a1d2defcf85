"""Texts: deterministic, disjoint splits; test sets stay test sets; too little text is refused."""

import copy
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import packaged_modules
from transformers import AutoTokenizer

from lamella.data import Documents, ImageText, InputContext, Source, load_text, windows
from lamella.data.sources import WRITTEN
from lamella.errors import CalibrationError, DownloadError
from lamella.reading import read_rows

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO_LLAMA)


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if len(" ".join(part.split())) >= 40}


@pytest.mark.parametrize("name", ["pydoc", "stdlib"])
def test_built_in_splits_share_no_paragraph(name: str) -> None:
    calibration, test = load_text(name, "calibration"), load_text(name, "test")
    assert min(len(calibration), len(test)) > 100_000
    assert not paragraphs(calibration) & paragraphs(test)


def test_general_shows_conversations_in_the_chat_format_of_its_reader(tokenizer) -> None:
    calibration, test = load_text("general", "calibration"), load_text("general", "test")
    asked = [{row["question"] for row in text.documents if isinstance(row, dict)} for text in (calibration, test)]
    assert min(map(len, asked)) > 20 and not asked[0] & asked[1]
    written = {row["text"] for _, row in read_rows(WRITTEN[1])}
    told = [{row for row in text.documents if isinstance(row, str)} & written for text in (calibration, test)]
    assert min(map(len, told)) > 40 and not told[0] & told[1]
    assert tokenizer.chat_template is None and test.tokenized_by(tokenizer) == test
    chatting = SimpleNamespace(
        chat_template="some",
        apply_chat_template=lambda turns, tokenize: "".join(f"<{t['role']}>{t['content']}</>\n" for t in turns),
    )
    shown = test.tokenized_by(chatting)
    done, cut = (
        next(r for r in test.documents if isinstance(r, dict) and r["finished"] == way) for way in (True, False)
    )
    assert f"<user>{done['question']}</>\n<assistant>{done['answer']}</>" in shown
    assert f"<assistant>{cut['answer'].strip()}\n\n" in shown  # the model had not come to an end


def test_pydoc_is_the_same_every_time_and_names_itself() -> None:
    first, second = load_text("pydoc", "test"), load_text("pydoc", "test")
    assert first == second and first.provenance() == second.provenance()
    assert first.provenance().keys() == {"data", "split", "sha256"}
    assert first.provenance(torch.zeros(4, 8, dtype=torch.long))["tokens"] == 32


@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_test_sets_are_refused_for_calibration(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"'{name}' is a test set and not for calibration"):
        load_text(name, "calibration")


def test_benchmark_rows_become_question_and_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": "4"}\n')
    monkeypatch.setattr("lamella.data.sources.pull", lambda name: tmp_path)
    assert load_text("gsm8k", "test") == "1+1?\n2\n\n2+2?\n4"


def test_a_file_is_cut_once_at_a_paragraph_and_nothing_is_lost(tmp_path: Path) -> None:
    parts = [f"Paragraph {i} has a few words." for i in range(50)]
    file = tmp_path / "book.md"
    file.write_text("\n\n".join(parts))
    calibration, test = load_text(file, "calibration"), load_text(file, "test")
    assert calibration.split("\n\n") + test.split("\n\n") == parts
    assert len(calibration.split("\n\n")) == 40
    assert (calibration.name, calibration.part, test.part) == (str(file), "calibration", "test")


def test_a_file_without_paragraphs_is_cut_between_words(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text(" ".join(f"word{i}" for i in range(100)))
    words = load_text(file, "calibration").split() + load_text(file, "test").split()
    assert words == [f"word{i}" for i in range(100)]


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [{"text": "one", "id": "x"}, {"q": "two", "a": "three"}] * 5))
    assert load_text(file, "calibration").startswith("one\n\ntwo\nthree\n\none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", b'{"number": 1}', "line 1 holds no text"),
        ("a.txt", b"\xff\xfe\x00", "as UTF-8 text"),
        ("missing.txt", None, "no file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as error:
        load_text(tmp_path / name, "test")
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(CalibrationError, match="unknown split 'train'"):
        load_text("pydoc", "train")  # type: ignore[arg-type]


def test_an_unknown_name_without_datasets_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"no text 'pydocs'.*pydoc, stdlib.*lamella\[data\]"):
        load_text("pydocs", "test")


def test_datasets_are_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "for calibration"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "for"}\n{"text": "test"}\n')
    assert load_text(str(tmp_path), "calibration") == "for calibration"
    assert load_text(str(tmp_path), "test") == "for\n\ntest"
    (tmp_path / "outside.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../outside.jsonl\n---\n")
    with pytest.raises(CalibrationError, match=r"train.jsonl: cannot be read"):
        load_text(str(folder), "calibration")


def with_builders(load_dataset: object) -> SimpleNamespace:
    """A module ``datasets`` that loads in another way, and has the builders of the real one."""
    return SimpleNamespace(load_dataset=load_dataset, packaged_modules=packaged_modules)


def test_datasets_names_are_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": [{"text": "for calibration"}], "test": [{"text": "for"}, {"text": "test"}]}

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (path, config, streaming) == ("org/name", "small", True)
        return rows[split]

    monkeypatch.setitem(sys.modules, "datasets", with_builders(load_dataset))
    assert load_text("org/name:small", "calibration") == "for calibration"
    assert load_text("org/name:small", "test") == "for\n\ntest"


def test_a_dataset_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nwith a long story")

    monkeypatch.setitem(sys.modules, "datasets", with_builders(load_dataset))
    with pytest.raises(DownloadError, match="Couldn't reach the hub") as error:
        load_text("org/name", "test")
    assert "\n" not in str(error.value)


LOCAL = ["text", "json", "csv", "parquet", "arrow", "imagefolder", "webdataset", "text:default", "json/", "text/:x"]
LOCAL += [
    "folder:default",
    "folder/../folder:x",
    "secret.py:x",
    "a/b/c",
    "with space",
    "..:x",
]


@pytest.mark.parametrize("name", LOCAL)
def test_no_name_lets_datasets_read_local_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path, tmp_path / "folder"):
        for ending, content in (("txt", "a secret\n"), ("json", '{"text": "a secret"}\n'), ("csv", "text\na secret\n")):
            (place / f"train.{ending}").write_text(content)
            (place / f"test.{ending}").write_text(content)
    (tmp_path / "secret.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for opened in (
        lambda: load_text(name, "test"),
        lambda: Documents.open(name, InputContext()),
        lambda: ImageText.open(name, InputContext(split="test")),
    ):
        with pytest.raises(CalibrationError, match=re.escape(f"'{name}'")) as error:
            opened()
        assert "\n" not in str(error.value)


def test_a_link_in_a_folder_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "a secret"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(CalibrationError, match=r"train.jsonl: links in a folder are not followed"):
        load_text(str(tmp_path / "folder"), "calibration")
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "secret.jsonl")
    assert load_text(str(link), "whole") == "a secret"  # one that is named by the user


@pytest.mark.parametrize("seed", [0, 1, None])
def test_windows_are_consecutive_and_do_not_overlap(tokenizer, seed: int | None) -> None:
    text = load_text("pydoc", "calibration")[:20_000]
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    blocks = windows(tokenizer, text, count=10, length=64, seed=seed)
    assert blocks.shape == (10, 64) and blocks.dtype == torch.long
    grid = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    places = [int((grid == block).all(1).nonzero()[0]) for block in blocks]
    assert places == sorted(set(places))
    assert torch.equal(blocks, windows(tokenizer, text, count=10, length=64, seed=seed))


def test_the_seed_chooses_the_windows(tokenizer) -> None:
    text = load_text("pydoc", "calibration")[:20_000]
    assert not torch.equal(windows(tokenizer, text, 10, 64, seed=0), windows(tokenizer, text, 10, 64, seed=1))


def test_a_tokenizer_that_begins_texts_begins_every_window() -> None:
    class Begins:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

        def __len__(self) -> int:
            return 128

    assert windows(Begins(), "abcdef", count=3, length=3, seed=None).tolist() == [
        [1, 97, 98],
        [1, 99, 100],
        [1, 101, 102],
    ]


def test_a_token_that_was_added_is_in_the_next_windows(tokenizer) -> None:
    grown, text = copy.deepcopy(tokenizer), "a lighthouse " * 100
    before = windows(grown, text, count=4, length=16)
    grown.add_tokens(["lighthouse"])
    after = windows(grown, text, count=4, length=16)
    assert (before < len(tokenizer)).all() and (after == len(tokenizer)).any()


def test_no_window_of_a_mixture_has_two_sources(tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "eee " * 30, "source": "real"}, {"text": "ooo " * 20, "source": "medium"}] * 6
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "iii " * 100, "id": "a"}))
    joined = "\n\n".join(row["text"] for row in rows)

    def kinds(text: Source) -> set[frozenset[str]]:
        count = available(tokenizer, text)
        return {frozenset(tokenizer.decode(row)) & set("eoi") for row in windows(tokenizer, text, count, 16)}

    def available(tokenizer, text: Source) -> int:
        return sum(len(tokenizer(part)["input_ids"]) // 16 for part in text.apart(tokenizer))

    plain = load_text(tmp_path, "calibration")
    assert plain == joined and {"e", "o"} in kinds(plain)
    (tmp_path / "mixture.json").write_text("{}")  # as wrap and rewire write it
    mixed = load_text(tmp_path, "calibration")
    assert mixed == joined and kinds(mixed) == {frozenset("e"), frozenset("o")}
    assert kinds(load_text(tmp_path, "test")) == {frozenset("i")}


def test_a_text_knows_the_documents_that_it_was_joined_of(tmp_path: Path) -> None:
    rows, note = tmp_path / "rows.jsonl", tmp_path / "note.txt"
    rows.write_text('{"text": "one"}\n{"q": "two", "a": "three"}\n')
    note.write_text("A line.\n\nAnother.")
    assert load_text(rows, "whole").texts == ("one", "two\nthree")
    assert load_text(note, "whole").texts == ("A line.\n\nAnother.",)
    for name in ("pydoc", "general"):
        text = load_text(name, "test")
        assert len(text.texts) > 1 and "\n\n".join(text.texts) == text


def test_too_little_text_says_how_much_there_is_and_is_needed(tokenizer) -> None:
    text = Source("only a few words", "note.txt", "test")
    have = len(tokenizer(text).input_ids)
    with pytest.raises(CalibrationError, match=f"{have} tokens in the test split of 'note.txt', .* need 1024;"):
        windows(tokenizer, text, count=4, length=256)
