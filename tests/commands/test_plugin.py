"""A method of another package gets all that the house has, and no line of Lamella changes for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lamella
from lamella.errors import LamellaError, MethodError
from lamella.evaluate import Budget
from lamella.plan import Plan, PlanSeries
from lamella.registry import get_method, methods
from lamella.results import Evidence
from lamella.runner import run
from lamella.signature import signature
from lamella.zoo import open_stack

ROOT = Path(__file__).parents[2]
NANO = ROOT / "tests" / "models" / "nano-llama"
METHOD = '''
"""Every other: cut every n-th layer, as a list of words says. Nobody, "Of no importance", 2026."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from lamella.data import InputContext, Text
from lamella.errors import CalibrationError
from lamella.evaluate import Budget
from lamella.formatting import counted
from lamella.files import Journal, Work
from lamella.measure import sequences
from lamella.plan import ModelReference, PlanSeries
from lamella.registry import command, method
from lamella.result import Summary, Table
from lamella.results import Corpus, Edit, Evidence, Result, Study
from lamella.plan import Plan
from lamella.signature import Fixture, Named
from lamella.stack import Stack, groups_at


@dataclass(frozen=True)
class Words:
    """Words of a file, or some built-in ones."""

    words: tuple[str, ...]
    default = "abc"
    source_help = "abc, or a file of words"

    @classmethod
    def open(cls, name: str, context: InputContext, *, most: int = 9) -> Words:
        """Words.

        Args:
            name: abc or a file.
            most: words to read at most.
        """
        if name != "abc" and not Path(name).is_file():
            raise CalibrationError(f"no words '{name}': give abc or a file")
        text = "a b c" if name == "abc" else Path(name).read_text()
        return cls(tuple(text.split()[:most]))

    def describe(self):
        return {"words": len(self.words)}


@method("every-other", purpose="prune", brief={"step": 2})
def every_other(
    stack: Stack,
    text: Text,
    words: Words = Words(("a", "b")),
    *,
    step: Annotated[int, Named("every")] = 2,
    budget: Budget = Budget(),
    work: Work = Work(),
    seed: int = 0,
) -> PlanSeries:
    """Remove every n-th layer, one after the other.

    Args:
        stack: the opened model.
        text: is only looked at.
        words: as many layers as there are words may go.
        step: n.
        budget: how far to go.
        work: counts the layers of a run that was stopped.
        seed: before which layer it begins.
    """
    sequences(text)  # refuses too little
    journal = Journal(work.journal("layers"), lambda line: isinstance(line, int))
    layers = list(journal.found)
    for layer in range((step - 1 + seed) % step, len(stack) - 1, step)[len(layers) : len(words.words)]:
        if (Path("stop").exists()) and layers:
            raise KeyboardInterrupt
        journal.add(layer)
        layers.append(layer)
    order = [groups_at("block", stack.positions)[layer] for layer in layers]
    found = {"read": len(journal.found)}
    return PlanSeries.of_removals(ModelReference.of(stack), order, [{}] * (len(order) + 1), **found)


@command("every-other", "cut", verb="cut-every-other")
def cut(stack: Stack, series: PlanSeries, *, point: int = -1) -> Edit:
    """Carry one plan of a series out.

    Args:
        stack: the opened model.
        series: what every-other has made.
        point: which plan.
    """
    return Edit(stack=stack, plan=series[point], findings={"point": point}, notes=["Nothing was measured."])


@dataclass(frozen=True)
class Lines:
    """Lines of a file, which is all that they can be opened from."""

    lines: tuple[str, ...]
    source_help = "a text file, one line after the other"
    example = Fixture("lines.txt", "one\\ntwo three\\n", {"least": 1})

    @classmethod
    def open(cls, name: str, *, least: int = 2) -> Lines:
        """Lines.

        Args:
            name: a file.
            least: how many there must be.
        """
        if not Path(name).is_file():
            raise CalibrationError(f"no file '{name}': give one with lines")
        lines = Path(name).read_text().splitlines()
        if len(lines) < least:
            raise CalibrationError(f"{name} has {len(lines)} lines: give {least}")
        return cls(tuple(lines))

    def describe(self):
        return {"file": "lines.txt", "lines": list(self.lines)}


@dataclass(kw_only=True)
class Doubled(Corpus):
    """Lines, each written several times."""

    texts: list[str]

    def rows(self):
        for text in self.texts:
            yield {"text": text}


@command("every-other", "rewrite")
def rewrite(lines: Lines, *, times: int = 2) -> Doubled:
    """Write each line several times over.

    Args:
        lines: what to write.
        times: how often.
    """
    return Doubled(texts=[" ".join([line] * times) for line in lines.lines], findings={"lines": len(lines.lines)})


@dataclass(kw_only=True)
class Session(Result):
    """Words that a model has read once, and that can be asked of again without it."""

    states: np.ndarray

    kind = "session"
    needs_folder = True

    @classmethod
    def encode(cls, stack: Stack, words: Words) -> Session:
        """Run the model over the length of each word."""
        with torch.no_grad():
            states = stack.hidden(torch.tensor([[len(word) for word in words.words]]))
        return cls(states=states[0].numpy(), findings={"words": len(words.words)})

    def respond(self, number: int) -> float:
        """How large the state of a word is."""
        return float(np.abs(self.states[number]).sum())

    def write(self, folder: Path) -> None:
        np.save(folder / "states.npy", self.states)

    @classmethod
    def read(cls, path: Path) -> Session:
        return cls(states=np.load(path / "states.npy"))


@command("every-other", "encode")
def encode(stack: Stack, words: Words) -> Session:
    """Read some words once, to be asked about them later.

    Args:
        stack: the opened model.
        words: to read.
    """
    return Session.encode(stack, words)


class Counted(Study):
    """Words, counted."""

    kind = "counted"

    def write(self, folder: Path) -> None:
        (folder / "count.txt").write_text(str(self.findings["count"]))


@command("every-other", "count")
def count(words: Words, *, twice: bool = False) -> Counted:
    """Count the words of a file, and nothing else at all.

    Args:
        words: to count.
        twice: count each word twice.
    """
    return Counted(findings={"count": len(words.words) * (2 if twice else 1)})


def summary(evidence: Evidence) -> Summary:
    if evidence.kind != "counted":
        return Summary("Every other layer.")
    count = evidence.findings["count"]
    return Summary(f"{counted(count, 'word')}.", [Table("Words", ["count"], [[count]])])
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site folder of a package with a method, as an installer leaves it."""
    site = tmp_path / "site"
    (site / "others").mkdir(parents=True)
    (site / "others" / "__init__.py").write_text("")
    (site / "others" / "every_other.py").write_text(METHOD.lstrip())
    info = site / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lamella.methods]\nevery-other = others.every_other\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    yield site
    for name in [name for name in sys.modules if name.split(".")[0] == "others"]:
        del sys.modules[name]


def succeeded(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_it_has_a_row_among_the_methods(installed, lamella) -> None:
    assert "every-other" in methods()
    rows = json.loads(succeeded(lamella("methods", "--json")))
    assert {"slug": "every-other", "summary": "Remove every n-th layer, one after the other."}.items() <= next(
        row for row in rows if row["slug"] == "every-other"
    ).items()
    assert "others.every_other" not in sys.modules  # listing imports no method


def test_help_comes_from_its_signature_and_docstring(installed, lamella) -> None:
    said = " ".join(succeeded(lamella("run", "every-other", "--help")).replace("│", " ").split())
    for part in ("--every", "N.", "--words", "abc, or a file of words.", "--most", "--share", "--speedup", "--seed"):
        assert part in said, part
    assert "Count the words of a file" in " ".join(succeeded(lamella("run", "--help")).replace("│", " ").split())
    assert "--twice" in succeeded(lamella("run", "every-other", "count", "--help"))
    assert "--point" in succeeded(lamella("cut-every-other", "--help"))


def test_a_run_has_provenance_evidence_page_card_and_files(installed, lamella, tmp_path) -> None:
    (tmp_path / "words.txt").write_text("one two three four")
    given = (NANO, "--length", "32", "--words", tmp_path / "words.txt", "--most", "2", "--every", "2")
    document = json.loads(succeeded(lamella("run", "every-other", *given, "-o", tmp_path / "out", "--json")))
    assert json.loads((tmp_path / "out" / "evidence.json").read_text()) == document
    said = document["provenance"]
    assert (said["method"], said["version"], said["seed"]) == ("every-other", lamella_version(), 0)
    assert said["options"] == {"step": 2} and said["inputs"]["words"] == {"words": 2}
    assert said["inputs"]["text"]["tokens"] == 4 * 32 and said["inputs"]["stack"]["layers"] == 6
    assert [point["removed"] for point in document["points"]] == [0, 2, 4]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "Every other layer." in page and "every-other" in card and "evidence.json" in card
    series = PlanSeries.read(tmp_path / "out" / "series.json")
    assert series[-1].drop == ["layers.1", "layers.3"] and series.provenance["method"] == "every-other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site", "words.txt"]


def lamella_version() -> str:
    return lamella.__version__


def test_a_later_command_takes_the_result_of_an_earlier_one_and_is_evaluated(installed, lamella, tmp_path) -> None:
    succeeded(lamella("run", "every-other", NANO, "--length", "32", "-o", tmp_path / "plans"))
    out = tmp_path / "cut"
    assert "--output" in lamella("cut-every-other", NANO, "--series", tmp_path / "plans" / "series.json").err
    given = ("--series", tmp_path / "plans" / "series.json", "-o", out, "--json")
    document = json.loads(succeeded(lamella("cut-every-other", NANO, *given)))
    assert document["removed"] == 4 and document["fidelity"]["kl"]["mean"] > 0
    assert document["data"]["test"]["split"] == "test" and document["notes"] == ["Nothing was measured."]
    assert document["provenance"]["command"] == "cut"
    assert open_stack(out).config.num_hidden_layers == 4 and Plan.read(out / "plan.json").removed == 4


def test_a_result_of_its_own_is_written_and_read_back(installed, tmp_path) -> None:
    done = run("every-other", "abc", command="count", twice=True, out=tmp_path / "out")
    assert (tmp_path / "out" / "count.txt").read_text() == "6" and done.summary.verdict == "6 words."
    assert type(done.result).read(tmp_path / "out")["count"] == 6
    assert Evidence.read(tmp_path / "out").kind == "counted"


def test_a_corpus_is_written_row_by_row_and_read_back(installed, lamella, tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    succeeded(lamella("run", "every-other", "rewrite", tmp_path / "lines.txt", "--times", "3", "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "data.jsonl").read_text() == '{"text": "one one one"}\n{"text": "two two two"}\n'
    refused = lamella("run", "every-other", "rewrite", tmp_path / "lines.txt", "--least", "9", "-o", tmp_path / "no")
    assert "lines.txt has 2 lines: give 9" in refused.refused()


def test_a_session_reads_once_and_responds_without_the_model(installed, tmp_path) -> None:
    session = run("every-other", NANO, "abc", command="encode", out=tmp_path / "out").result
    hidden = open_stack(NANO).hidden(torch.tensor([[1, 1, 1]]))[0].detach()
    again = type(session).read(tmp_path / "out")
    for number in range(3):
        assert again.respond(number) == session.respond(number) == pytest.approx(float(hidden[number].abs().sum()))


def test_a_run_that_was_stopped_goes_on_and_leaves_nothing_behind(installed, lamella, tmp_path) -> None:
    (tmp_path / "stop").write_text("")
    given = ("run", "every-other", NANO, "--length", "32", "-o", tmp_path / "out")
    assert lamella(*given).code == 130
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.work" / "layers.jsonl").read_text() == "1\n"
    (tmp_path / "stop").unlink()
    succeeded(lamella(*given))
    assert PlanSeries.read(tmp_path / "out" / "series.json").provenance["read"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def test_what_cannot_be_is_one_line_that_names_the_option(installed, lamella, tmp_path) -> None:
    out = tmp_path / "out"
    assert "no words 'none'" in lamella("run", "every-other", NANO, "--words", "none", "-o", out).refused()
    assert "too little text" in lamella("run", "every-other", NANO, "--sequences", "99999", "-o", out).refused()
    assert not out.exists()
    out.mkdir()
    assert "exists" in lamella("run", "every-other", NANO, "-o", out).refused()
    with pytest.raises(MethodError, match=r"every-other has no option 'nonsense'; it has: .*step"):
        run("every-other", NANO, nonsense=1)
    with pytest.raises(MethodError, match="has no command 'paint'; it has: cut, rewrite, encode, count"):
        run("every-other", NANO, command="paint")
    with pytest.raises(LamellaError, match="words"):
        run("every-other", command="count", words="none")


def test_fields_and_whole_dataclasses_are_one_thing(installed) -> None:
    entry = get_method("every-other")
    stack, tokens = open_stack(NANO), torch.zeros(1, 8, dtype=torch.long)
    assert set(signature(entry.call).options) == {"step", "seed", *Budget.__dataclass_fields__}
    assert entry(stack, tokens, share=0.1).provenance["options"]["share"] == 0.1
    with pytest.raises(MethodError, match="share is a field of budget"):
        entry(stack, tokens, share=0.1, budget=entry.signature.groups["budget"])


@pytest.mark.slow
def test_the_conformance_suite_takes_it_up(installed) -> None:
    suite = ROOT / "tests" / "conformance"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    wanted = ["-k", "every-other", "-m", "not exhaustive"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(suite), *wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    names = [line for line in done.stdout.splitlines() if "PASSED" in line]
    for suite, commands in {
        "test_declarations": ("", " count", " cut", " rewrite", " encode"),
        "test_results": ("", " count", " cut", " rewrite", " encode"),
        "test_plans": ("",),
        "test_edits": (" cut",),
        "test_studies": (" count",),
        "test_corpora": (" rewrite",),
    }.items():
        for name in commands:
            taken = [each for each in names if suite in each and re.search(rf"every-other{name}[-\]]", each)]
            assert taken, f"{suite} leaves out every-other{name}"
    assert any("test_inputs" in each and "Lines of every-other" in each for each in names)
