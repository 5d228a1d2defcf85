"""Text to calibrate and to evaluate on, in two splits that never overlap.

A text is documents joined by blank lines. Of the built-in sources each document belongs to one split; a user's file
is cut once, at a paragraph; benchmark sets are test splits and refused for calibration.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, Self

import torch
from torch import LongTensor

from lamella.errors import CalibrationError, DownloadError, ExportError
from lamella.extras import is_installed
from lamella.files import write
from lamella.progress import track
from lamella.reading import check_in_folder, read_rows, read_text
from lamella.signature import Fixture
from lamella.zoo.cache import cache_folder
from lamella.zoo.pull import ZOO, pull

Split = Literal["calibration", "test", "whole"]
SPLITS: tuple[Split, ...] = ("calibration", "test")
BUILT_IN: dict[str, str] = {
    "general": "conversations and documents that the embedded model wrote, with some of pydoc and stdlib",
    "pydoc": "Python's own language reference, as `help()` shows it",
    "stdlib": "the docstrings of Python's standard library",
    "gsm8k": "school mathematics questions with solutions (test only)",
    "humaneval": "Python functions with docstrings (test only)",
}
DOCUMENTED = ("pydoc", "stdlib")  # built-in texts that are documents joined
CALIBRATION_SHARE = 0.8  # of a user's file
WRITTEN = [Path(__file__).with_name(f"{kind}.jsonl") for kind in ("conversations", "documents")]  # by the model itself,
SHARE = 0.8  # of the characters of "general" (scripts/write_general.py)
LONGEST = 4000  # characters of a document in it
TENTH = 10  # one of the texts that the model wrote in so many is for testing
CUTS = {"calibration": "the first four fifths", "test": "the last fifth"}
HUB_SPLITS = {"calibration": "train", "test": "test"}  # what datasets call them
HUB_NAME = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
HUB_CHARACTERS = 10_000_000  # read at most this much of a hub dataset
SHORT_PARAGRAPH = 40  # shorter ones ("See also:") may stand in both splits
MIXTURE = "mixture.json"  # beside it, the rows of train.jsonl say of which source they are
PLAIN = Fixture(  # any text file will do
    "text.txt",
    """\
A lighthouse keeper counted the ships that passed at night, and wrote their number into a book before he slept. In the
first winter there were many, and the pages filled quickly. In the second there were few, and he wrote about the sea.

One evening a boat came without a light. He rang the bell, three strokes and three again, until a voice answered from
the dark. "We have been looking for you," it said, "since the lamp went out." The keeper looked up. The lamp was lit, as
it had been every night for eleven years, and its beam went over the water without touching anything.

He went down the stairs with a rope and a lantern. Nobody was at the landing, only the tide, which was rising. In the
morning there was a second line in the book, under his own, in a hand that he did not know: one boat, no light, all
well.

After that he counted twice each night. When the numbers were the same he slept. When they were not, he went down to
the landing with the rope and the lantern, and waited there until it was day.
""",
)


class Source(str):
    """A string that remembers where it comes from; a slice of it is a plain string again.

    Attributes:
        name: the built-in name, path or dataset.
        part: the split, ``calibration``, ``test`` or ``whole`` (``split`` is a method of every string).
        cut: which part of a user's file that is, in words; empty where nothing was cut.
        texts: the documents that were joined, one by one; a plain text file is one.
    """

    name: str
    part: Split
    cut: str
    texts: tuple[str, ...]

    def __new__(cls, content: str, name: str, part: Split, cut: str = "", texts: tuple[str, ...] | None = None) -> Self:
        text = super().__new__(cls, content)
        text.name, text.part, text.cut = name, part, cut
        text.texts = (content,) if texts is None else texts
        return text

    def tokenized_by(self, tokenizer: Any) -> str:
        """The text as a model is shown it that has this tokenizer."""
        return str(self)

    def apart(self, tokenizer: Any) -> list[str]:
        """The same, between whose parts windows are cut; one part where any window will do."""
        return [self.tokenized_by(tokenizer)]

    def provenance(self, blocks: LongTensor | None = None) -> dict[str, Any]:
        """What evidence says about the text: its name, split and sha256, and how many tokens of it were used."""
        record: dict[str, Any] = {"data": self.name, "split": self.part} | ({"cut": self.cut} if self.cut else {})
        record["sha256"] = hashlib.sha256(self.encode()).hexdigest()
        if blocks is not None:
            record |= {"windows": list(blocks.shape), "tokens": blocks.numel()}
        return record


class General(Source):
    """Documents of many kinds, mixed: conversations among them are shown in a model's own chat format.

    Attributes:
        documents: texts, and conversations as rows with ``question``, ``answer`` and whether it is ``finished``.
    """

    documents: list[str | dict[str, Any]]

    @classmethod
    def load(cls, split: Split) -> General:
        """Mix one split of what the embedded model wrote with documents of the other built-in texts."""
        rows = [(n, row) for file in WRITTEN for n, (_, row) in enumerate(read_rows(file))]
        documents = [row.get("text", row) for n, row in rows if (n % TENTH == 0) == (split == "test")]
        size = sum(map(len, map(_shown, documents))) * (1 - SHARE) / SHARE
        for texts in (_pydoc(), _stdlib()):
            parts = [document[:LONGEST] for document in _alternate(texts, split)]
            every = max(1, round(sum(map(len, parts)) / (size / 2)))
            documents += parts[::every]
        random.Random(0).shuffle(documents)
        shown = tuple(map(_shown, documents))
        source = cls(_joined(shown), "general", split, texts=shown)
        source.documents = documents
        return source

    def tokenized_by(self, tokenizer: Any) -> str:
        show = _shown if getattr(tokenizer, "chat_template", None) is None else partial(_in_chat_format, tokenizer)
        return "\n\n".join(map(show, self.documents))


class Blended(Source):
    """A mixture of what a model has written with other text: no window has both.

    Attributes:
        sources: the text of each, by its name.
    """

    sources: dict[str, str]

    @classmethod
    def load(cls, file: Path, name: str, split: Split) -> Blended:
        """Read rows that say of which source they are; those that do not are of one."""
        found: dict[str, list[str]] = {}
        texts = []
        for kind, text in _rows(file):
            found.setdefault(kind, []).append(text)
            texts.append(text)
        source = cls(_joined(texts), name, split, texts=tuple(texts))
        source.sources = {kind: _joined(each) for kind, each in found.items()}
        return source

    def apart(self, tokenizer: Any) -> list[str]:
        return list(self.sources.values())


@cache
def _general(split: Split) -> General:
    return General.load(split)


def _shown(document: str | dict[str, Any]) -> str:
    return document if isinstance(document, str) else f"{document['question']}\n\n{document['answer']}"


def _in_chat_format(tokenizer: Any, document: str | dict[str, Any]) -> str:
    if isinstance(document, str):
        return document
    turns = [{"role": "user", "content": document["question"]}, {"role": "assistant", "content": document["answer"]}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    end = text.rfind(document["answer"].strip()) + len(document["answer"].strip())
    return text if document["finished"] or end < len(document["answer"]) else text[:end]


def load_text(name_or_path: str | Path, split: Split) -> Source:
    """One split of a text.

    Args:
        name_or_path: a key of :data:`BUILT_IN`, a ``.txt``, ``.md`` or ``.jsonl`` file, a folder with
            ``train.jsonl`` and ``test.jsonl`` (such as wrap and rewire write, whose sources share no window), or a
            ``datasets`` name (``name`` or ``name:config``).
        split: ``calibration`` or ``test``; of a user's file also ``whole``, for one that is a test set by itself.

    Raises:
        CalibrationError: for an unknown split or source, a test set asked for calibration, or an unreadable file.
        DownloadError: when the source needs the network and there is none.
    """
    name = str(name_or_path)
    file = Path(name).expanduser()
    known: tuple[Split, ...] = (*SPLITS, "whole") if name not in BUILT_IN and file.is_file() else SPLITS
    if split not in known:
        raise CalibrationError(f"unknown split '{split}'; {name} has the splits {' and '.join(known)}")
    check_text(name)
    if name == "general":
        return _general(split)
    if name in DOCUMENTED:
        return _join(built_in_documents(name, split), name, split)
    if name in ZOO and ZOO[name].kind == "text":
        if split == "calibration":
            raise CalibrationError(f"'{name}' is a test set and not for calibration; use pydoc, stdlib or a file")
        return _join(_benchmark(name), name, split)
    if file.is_file():
        texts = _texts(file)
        if split == "whole":
            return Source(_joined(texts), name, split, texts=texts)
        return Source(_cut(_joined(texts), split), name, split, CUTS[split])
    if file.is_dir():  # read here: what a dataset's own files name may lie outside its folder
        part = check_in_folder(file / f"{HUB_SPLITS[split]}.jsonl")
        return Blended.load(part, name, split) if (file / MIXTURE).is_file() else _join(_texts(part), name, split)
    return _join(_hub(name, split), name, split)


def check_text(name_or_path: str | Path) -> None:
    """Check that a text can be read, without reading it: a built-in name, a file that holds something, or a folder.

    Whether the hub has a dataset of that name is found when it is read.

    Raises:
        CalibrationError: one line that says what is missing.
    """
    name = str(name_or_path)
    file = Path(name).expanduser()
    if name in BUILT_IN:
        return
    if file.is_file():
        if file.stat().st_size == 0:
            raise CalibrationError(f"{name} is empty: give a text, or one of {', '.join(BUILT_IN)}")
    elif file.suffix in (".txt", ".md", ".jsonl"):
        raise CalibrationError(f"no file {name}; give an existing text file or one of {', '.join(BUILT_IN)}")
    elif file.is_dir():
        parts = [check_in_folder(file / f"{part}.jsonl") for part in HUB_SPLITS.values()]
        missing = [part.name for part in parts if not part.is_file()]
        if missing:
            raise CalibrationError(f"{file / missing[0]}: cannot be read, since it is missing: give a file")
    elif file.is_absolute() or name.startswith("."):  # a path, and no name of the hub's
        raise CalibrationError(f"no text '{name}': it is neither built in ({', '.join(BUILT_IN)}) nor a file or folder")
    else:
        check_datasets(f"no text '{name}': it is neither built in ({', '.join(BUILT_IN)}) nor a file")


def check_datasets(missing: str) -> None:
    """Check that datasets of the hub can be read.

    Args:
        missing: the beginning of the message where they cannot.

    Raises:
        CalibrationError: when the library for them is missing.
    """
    if not is_installed("datasets"):
        raise CalibrationError(f"{missing}; for datasets of the hub, pip install 'lamella[data]'")


def built_in_documents(name: str, split: Split) -> Iterator[str]:
    """The documents of one split of a built-in text of :data:`DOCUMENTED`."""
    return _alternate(_pydoc() if name == "pydoc" else _stdlib(), split)


def windows(tokenizer: Any, text: str, count: int, length: int, seed: int | None = 0, *, after: int = 0) -> LongTensor:
    """Blocks of consecutive tokens that do not overlap, in the order of the text; of a mixture, source by source.

    A tokenizer that puts a begin token before every text puts it before every block too, as the first of ``length``.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        count: number of blocks.
        length: tokens in each.
        seed: chooses which blocks; None spreads them evenly.
        after: of the blocks that a seed chooses, pass over so many first: those that a draw of that many took.

    Returns:
        LongTensor [count, length].

    Raises:
        CalibrationError: when the text has too few tokens, or ``count`` or ``length`` is too small.
    """
    if count < 1 or length < 2:
        raise CalibrationError(f"asked for {count} windows of {length} tokens; at least 1 window of 2 tokens is needed")
    shown = text.apart(tokenizer) if isinstance(text, Source) else [text]
    tokens = [tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in shown]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if tokenizer("a")["input_ids"][:1] != begin:
        begin = []
    own = length - len(begin)
    places = [(each, start) for each in tokens for start in range(0, len(each) - own + 1, own)]
    available, needed = len(places), after + count
    if available < needed:
        where = f" in the {text.part} split of '{text.name}'" if isinstance(text, Source) else ""
        raise CalibrationError(
            f"too little text: {sum(map(len, tokens))} tokens{where}, but {needed} windows of {length} need "
            f"{needed * own}; give a longer text, or fewer or shorter windows"
        )
    if seed is None:
        chosen = torch.arange(count) * available // count
    else:
        drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        chosen = drawn[after:needed].sort().values
    blocks = [begin + each[start : start + own] for each, start in (places[i] for i in chosen.tolist())]
    return torch.tensor(blocks, dtype=torch.long)  # type: ignore[return-value]


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(texts)


def _join(documents: Iterable[str], name: str, split: Split) -> Source:
    texts = tuple(documents)
    return Source(_joined(texts), name, split, texts=texts)


def _alternate(documents: Iterable[str], split: Split) -> Iterator[str]:
    """Every other document, each without the paragraphs that a longer document repeats.

    Reference texts quote each other (`help("compound")` holds `help("if")`), which would leak across the splits.
    """
    documents = list(documents)
    own: dict[int, list[str]] = {}
    seen: set[str] = set()
    for index in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i)):
        paragraphs = re.split(r"\n\s*\n", documents[index].strip("\n"))
        keys = [" ".join(paragraph.split()) for paragraph in paragraphs]
        own[index] = [p for p, key in zip(paragraphs, keys, strict=True) if key not in seen]
        seen.update(key for key in keys if len(key) >= SHORT_PARAGRAPH)
    for index in range(SPLITS.index(split), len(documents), 2):
        if own[index]:
            yield "\n\n".join(own[index])


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[key] for key in sorted(topics))


@cache
def _stdlib() -> list[str]:
    """One document per module: its docstrings in source order. They are cached, since parsing takes seconds."""
    kept = cache_folder() / "texts" / f"stdlib-{platform.python_version()}.json"
    if kept.is_file():
        with suppress(ValueError):
            documents: list[str] = json.loads(kept.read_text(encoding="utf-8"))
            return documents
    documents = list(_parsed(Path(sysconfig.get_path("stdlib"))))
    with suppress(OSError, ExportError):  # a cache that cannot be written costs the parsing each time, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, json.dumps(documents))
    return documents


def _parsed(root: Path) -> Iterator[str]:
    """The docstrings of each module; files are parsed one at a time and never imported."""
    foreign = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
    for file in track(sorted(root.rglob("*.py")), "reading the standard library"):
        if foreign.intersection(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # templates that are not meant to be parsed
            continue
        if document := "\n\n".join(_docstrings(tree)):
            yield document


def _docstrings(node: ast.AST) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield docstring
    for field in ("body", "orelse", "handlers", "finalbody"):  # statements only: expressions hold no docstrings
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


def benchmark_rows(name: str) -> Iterator[dict[str, Any]]:
    """The documents of a benchmark of the zoo, which is pulled first.

    Raises:
        DownloadError: when it has to be pulled and cannot be.
    """
    file = pull(name) / Path(ZOO[name].member).name
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    yield from map(json.loads, data.decode().splitlines())


def _benchmark(name: str) -> Iterator[str]:
    for row in benchmark_rows(name):
        if name == "gsm8k":
            yield f"{row['question']}\n{row['answer']}"
        else:
            yield row["prompt"] + row["canonical_solution"]


def _texts(file: Path) -> tuple[str, ...]:
    """The rows of a file one by one; a plain text is one."""
    return tuple(text for _, text in _rows(file)) if file.suffix == ".jsonl" else (read_text(file),)


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    """Of each row its source, empty where it names none, and its text."""
    for number, row in read_rows(file):
        source = str(row.get("source", "")) if isinstance(row, dict) else ""
        yield source, _row_text(row, f"{file} line {number}")


def _row_text(row: Any, where: str) -> str:
    """The field ``text``, or else all the string fields of a row in their order (question, answer ...)."""
    fields = row if isinstance(row, dict) else {"text": row}
    strings = [value for value in fields.values() if isinstance(value, str)]
    if isinstance(fields.get("text"), str):
        return fields["text"]
    if not strings:
        raise CalibrationError(f"{where} holds no text; give an object with a field 'text' or other string fields")
    return "\n".join(strings)


def _cut(content: str, split: Split) -> str:
    """The part of a file before or after the break nearest to 80 %: between paragraphs, else lines, else words."""
    target = int(len(content) * CALIBRATION_SHARE)
    cut = target
    for pattern in (r"\n\s*\n", r"\n", r"\s"):
        breaks = [match.end() for match in re.finditer(pattern, content) if match.end() < len(content)]
        if breaks:
            cut = min(breaks, key=lambda place: abs(place - target))
            break
    return content[:cut].rstrip() if split == "calibration" else content[cut:]


def _hub(name: str, split: Split) -> Iterator[str]:
    characters = 0
    for row in hub_rows(name, split, f"no text '{name}': it is neither built in ({', '.join(BUILT_IN)}) nor a file"):
        document = _row_text(row, f"dataset '{name}'")
        characters += len(document)
        yield document
        if characters >= HUB_CHARACTERS:
            return


def hub_rows(name: str, split: Split, missing: str) -> Iterator[Any]:
    """The rows of a dataset of the hub, one at a time.

    Args:
        name: of the dataset, or ``name:config``.
        split: which are wanted.
        missing: what to say where datasets cannot be read at all.

    Raises:
        CalibrationError: when the library for them is missing, or the name is that of a file, a folder or a builder.
        DownloadError: when there is no such dataset, or no network.
    """
    check_datasets(missing)
    import datasets

    path, _, config = name.partition(":")
    _check_on_hub(path, datasets.packaged_modules, missing)
    try:
        rows = iter(datasets.load_dataset(path, config or None, split=HUB_SPLITS[split], streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub client raises many kinds, from many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"cannot load the dataset '{name}' ({reason}); a file and what is built in need no network"
        ) from error
    if first is not None:
        yield first
        yield from rows


def _check_on_hub(name: str, builders: Any, missing: str) -> None:
    """Check that a name can only be that of a dataset of the hub, since ``datasets`` reads local files by others.

    A builder, such as ``text``, ``json`` or ``csv``, reads every file below the current folder.

    Args:
        name: of the dataset, without its config.
        builders: the package whose modules are the builders of ``datasets``.
        missing: what to say where it is anything else.

    Raises:
        CalibrationError: when it is the name of a builder, of a local file or of a folder, or no name of a dataset.
    """
    if name.rstrip("/") in {module.name for module in iter_modules(builders.__path__)}:
        raise CalibrationError(f"{missing}; '{name}' is a builder of datasets and no dataset: give the file itself")
    if not HUB_NAME.fullmatch(name) or Path(name).exists():
        raise CalibrationError(f"{missing}; nor is it the name of a dataset on the hub, such as wikitext or user/name")
