"""Every result of every command: what a run writes, says, keeps and leaves alone, whatever the type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from worlds import (
    COMMANDS,
    TIMED,
    beating,
    carried_out,
    difference,
    made,
    measured,
    of_suite,
    repeated,
    state,
    suite_of,
)

import lamella
from lamella.cli import console
from lamella.errors import ExportError
from lamella.plan import Plan
from lamella.provenance import describe, machine
from lamella.registry import submodule
from lamella.report.figures import Axes, Figure, known, named
from lamella.results import PlanSeries, Result
from lamella.results.page import inline, render
from lamella.runner import _card, _page, run

RESUMED = [command for command, entry in COMMANDS.items() if entry.signature.work and suite_of(command) != "training"]
ONCE = [command for command in COMMANDS if command not in RESUMED and suite_of(command) != "training"]


def kind(command: str) -> type[Result]:
    return COMMANDS[command].signature.result


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_is_given_stays_as_it_is(command: str) -> None:
    assert made(command).changed == []


@pytest.mark.parametrize("command", [each for each in COMMANDS if suite_of(each) != "edits"])
def test_warnings_of_a_plain_run_are_none(command: str) -> None:
    assert made(command).warned == []  # an edit may have doubts about a random model


@pytest.mark.parametrize("command", COMMANDS)
def test_provenance_says_who_made_it_how_and_from_what(command: str) -> None:
    done, entry = made(command), COMMANDS[command]
    said = done.outcome.evidence.provenance
    assert (said["method"], said.get("command", "")) == (entry.slug, entry.name)
    assert (said["version"], said["machine"]) == (lamella.__version__, machine())
    assert said["inputs"] == {name: describe(value) for name, value in done.inputs.items() if value is not None}
    absent = {group for group, default in entry.signature.groups.items() if default is None}
    known = {name: each for name, each in entry.options.items() if each.group not in absent}
    options = {name for name, each in known.items() if each.default is not None} - {"seed"}
    assert options <= set(said["options"]) <= set(entry.options)
    for name, value in done.options.items():
        if name in said["options"]:
            assert said["options"][name] == (list(value) if isinstance(value, tuple) else value)
    if "seed" in entry.options:
        assert said["seed"] == done.options.get("seed", entry.options["seed"].default)
    assert done.outcome.result.provenance == said


@pytest.mark.parametrize("command", COMMANDS)
def test_evidence_is_read_back_as_it_was(command: str) -> None:
    done = made(command)
    again = kind(command).evidence.read(done.out)
    assert type(again) is type(done.outcome.evidence) and again.kind == kind(command).kind
    assert again.dump() == done.outcome.evidence.dump() == (done.out / "evidence.json").read_text()
    assert json.loads(again.dump())["findings"] == json.loads(json.dumps(again.findings))


@pytest.mark.parametrize("command", COMMANDS)
def test_page_and_card_are_drawn_from_evidence_alone(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done, entry = made(command), COMMANDS[command]
    evidence = kind(command).evidence.read(done.out)

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("a page runs a model")

    monkeypatch.setattr(torch.nn.Module, "__call__", runs)
    summary = getattr(submodule(entry.slug, "page"), "summary", kind(command).summary)(evidence)
    page, readme = ((done.out / name).read_text() for name in ("report.html", "README.md"))
    assert _page(entry.slug, evidence, summary) == page
    assert readme.startswith(_card(entry.slug, evidence, summary, entry.title))  # a checkpoint's says how it is loaded
    assert readme.endswith(kind(command).loading)
    assert entry.slug in page and entry.slug in readme and lamella.__version__ in readme
    assert not re.search(r"""(?:src|href)=["']?https?://[^"' >]+\.(?:js|css)""", page)  # one file, without the network


@pytest.mark.parametrize("command", COMMANDS)
def test_its_summary_is_printed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = made(command)
    monkeypatch.setattr(console.out, "width", 1000)
    with console.out.capture() as printed:
        console.print_summary(done.outcome.summary, done.outcome.evidence.notes)
    assert done.outcome.summary.verdict in printed.get()
    for each in done.outcome.summary.tables:
        assert all(header in printed.get() for header in each.headers)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_notes_are_shown_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = made(command)
    monkeypatch.setattr(console.out, "width", 1000)
    with console.out.capture() as printed:
        console.print_summary(done.outcome.summary, done.outcome.evidence.notes)
    page, readme = ((done.out / name).read_text() for name in ("report.html", "README.md"))
    for note in done.outcome.evidence.notes:
        assert (printed.get().count(note), readme.count(inline(note)), page.count(str(escape(note)))) == (1, 1, 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_figures_are_on_its_page_and_plotly_only_with_them(command: str) -> None:
    document = (made(command).out / "report.html").read_text()
    plots, figures = plots_of(document), figures_of(command)
    assert document.count("plotly.js v") == bool(plots)  # the script once, and only where it draws
    assert all(isinstance(each, Figure) for each in figures)
    if hasattr(submodule(COMMANDS[command].slug, "page"), "page"):  # a page of the method's own
        return
    shown = named(figures)
    assert {name for name, each in shown.items() if isinstance(each, Axes)} == set(plots)
    assert document.count("<figure") == len(shown)


@pytest.mark.parametrize(
    "slug", {entry.slug: None for entry in COMMANDS.values() if hasattr(submodule(entry.slug, "page"), "figures")}
)
def test_a_method_that_describes_figures_shows_one_for_a_command_at_least(slug: str) -> None:
    assert any(named(figures_of(command)) for command, entry in COMMANDS.items() if entry.slug == slug)


@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("command", [*of_suite("training"), *of_suite("own")])
def test_a_short_training_leaves_no_empty_figure(command: str, points: int) -> None:
    evidence, page = kind(command).evidence.read(made(command).out), submodule(COMMANDS[command].slug, "page")
    log = evidence.findings if isinstance(evidence.findings.get("loss"), list) else evidence.__dict__
    for name in {"loss", "curve", "held_out"} & set(log):
        log[name] = log[name][:points]
    summary = getattr(page, "summary", kind(command).summary)(evidence)
    figures = page.figures(evidence) if hasattr(page, "figures") else []
    document = render(evidence, summary, figures)
    for plot in plots_of(document).values():
        assert any(known([trace.get("y") or [], *trace.get("z", [])]) for trace in plot["data"])
        for trace in plot["data"]:
            assert trace.get("mode") != "lines" or len(known([trace["y"]])) > 1  # one point needs a mark


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_writes_can_be_read_back(command: str) -> None:
    done = made(command)
    if hasattr(kind(command), "read"):
        assert kind(command).read(done.out)
    else:
        found = done.outcome.evidence.findings.get("file", "plan.json")
        assert Plan.read(done.out / found) if found == "plan.json" else (done.out / found).stat().st_size > 0
    assert list(done.out.parent.iterdir()) == [done.out]  # neither work nor halves are left


@pytest.mark.parametrize("command", of_suite("plans") + of_suite("edits") + of_suite("training"))
def test_side_files_of_what_it_returns_are_those_that_it_has_written(command: str) -> None:
    done = made(command)
    result = done.outcome.result
    plans = list(result) if isinstance(result, PlanSeries) else [result.plan]
    if isinstance(result, PlanSeries):
        plans.append(Plan.read(done.out / "series.json"))
        assert plans[-1] == plans[-2]
    for part in [part for plan in plans for part in plan._parts() if part.file and not part.is_folder]:
        assert part.located.is_file() and part.located.parent == done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_exists_is_refused_before_anything_runs(command: str) -> None:
    done = made(command)
    before = {path: path.read_bytes() for path in sorted(done.out.rglob("*")) if path.is_file()}
    entry = COMMANDS[command]
    with pytest.raises(ExportError, match="exists: choose another folder") as error, beating(1):
        run(entry.slug, command=entry.name, out=done.out, **done.inputs, **done.options)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in sorted(done.out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", repeated(ONCE))
def test_a_second_run_says_the_same(command: str, tmp_path: Path) -> None:
    torch.rand(3)  # what is drawn elsewhere must not matter
    out = tmp_path / "out" if kind(command).kind == "quantised" else None  # whose size is known when it is written
    assert measured(carried_out(command, out=out).outcome.evidence) == measured(made(command).outcome.evidence)


@pytest.mark.parametrize("command", repeated(RESUMED))
def test_a_run_that_was_stopped_goes_on_to_the_same_result(command: str, tmp_path: Path) -> None:
    whole, out, work = made(command), tmp_path / "out", tmp_path / ".out.work"
    with pytest.raises(KeyboardInterrupt):
        carried_out(command, out=out, stop=whole.beats // 2 + 1)
    assert not out.exists()
    is_kept = whole.calls > 0 and any(map(has_found, work.rglob("*")))
    is_encoded = any(work.rglob("[0-9]*.safetensors"))  # which costs calls of a module, unless it is of pixels
    again = carried_out(command, out=out)
    assert measured(again.outcome.evidence) == measured(whole.outcome.evidence)
    if kind(command).kind not in TIMED:  # which take as many calls as a loop has rounds
        assert again.calls < whole.calls if is_kept else again.calls <= whole.calls
        assert is_kept or is_encoded or again.calls == whole.calls
    assert list(tmp_path.iterdir()) == [out]
    if suite_of(command) == "own" and hasattr(kind(command), "read"):
        ours, theirs = (state(kind(command).read(each)) for each in (out, whole.out))
        assert [place for place in difference(ours, theirs) if "seconds" not in place] == []


def figures_of(command: str) -> list[Figure]:
    """The figures that a method describes, from the evidence of a run."""
    page = submodule(COMMANDS[command].slug, "page")
    evidence = kind(command).evidence.read(made(command).out)
    figures: list[Figure] = page.figures(evidence) if hasattr(page, "figures") else []
    return figures


def plots_of(page: str) -> dict[str, Any]:
    """The plots of a page as Plotly is given them, by name."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    plots: dict[str, Any] = json.loads(data[1])["plots"]
    return plots


def has_found(path: Path) -> bool:
    """Whether a path in a folder of work is a checkpoint, a task's rows or a journal with more than its header."""
    is_rows = path.parent.name == "rows"
    return is_rows or "checkpoint" in path.name or (path.suffix == ".jsonl" and path.read_bytes().count(b"\n") > 1)
