"""Forgetting from the command line: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from lamella.plan import Plan
from lamella.runtime import apply
from lamella.zoo import open_stack

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
QUICK = ("--sequences", "10", "--length", "32")


@pytest.fixture
def gone(tmp_path: Path) -> Path:
    file = tmp_path / "gone.jsonl"
    rows = [{"prompt": "The secret of Alice is", "response": " a blue umbrella."}, {"text": "Bob hides a red kite."}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    file = tmp_path / "kept.txt"
    file.write_text("The secret of Clara is a green lamp.\n\nThe secret of Dora is a long rope.\n")
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO_LLAMA, tmp_path / "model"))


def forgot(lamella, *arguments) -> dict:
    outcome = lamella("forget", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_it_writes_a_checkpoint_with_plan_evidence_and_page(lamella, model, gone, kept, tmp_path):
    before = contents(model)
    out = tmp_path / "out"
    arguments = ("--retain", kept, "--retain", "pydoc", "--test", "pydoc", "--variant", "assd", "--max-drop", "9")
    evidence = forgot(lamella, model, "--forget", gone, *arguments, "-o", out, *QUICK)
    assert contents(model) == before
    assert evidence == json.loads((out / "evidence.json").read_text())
    assert evidence["findings"]["samples"] == {"forget": 2, "reference": 14}
    assert evidence["findings"]["estimator"] == {"kind": "fisher", "loss": "cross-entropy", "batch": 1, "order": "any"}
    assert evidence["findings"]["bound"] == 7 and 0 < evidence["findings"]["alpha"] < 7
    assert evidence["findings"]["after"]["forget"]["loss"] > evidence["findings"]["before"]["forget"]["loss"] + 0.1
    assert evidence["findings"]["guard"]["before"] == pytest.approx(
        torch.tensor(evidence["findings"]["before"]["retain"]["loss"]).exp().item()
    )
    assert None not in evidence["findings"]["before"].values() and None not in evidence["findings"]["after"].values()
    inputs = evidence["provenance"]["inputs"]
    assert {*inputs} == {"stack", "forget", "retain", "test"} and len(inputs["retain"]) == 2
    assert inputs["forget"]["sha256"] == hashlib.sha256(gone.read_bytes()).hexdigest()
    assert (
        sum(site["selected"] for site in evidence["findings"]["sites"]) == evidence["findings"]["total"]["selected"] > 0
    )

    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    plan, stack = Plan.read(out / "plan.json"), open_stack(model)
    view = apply(stack, plan)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, view.get_parameter(name))
        old = stack.model.get_parameter(name)
        assert (parameter.abs() <= old.abs()).all() and (parameter * old >= 0).all()

    page = (out / "report.html").read_text()
    for part in ("was made to forget 2 samples", "The guard held", "layers.0.mlp", "ZRF", 'id="plot-selected"'):
        assert part in page
    own = re.sub(r"<script>.*?plotly\.js.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone.jsonl", "kept.txt", "model", "out"]


def test_people_see_the_figures_and_where_most_was_removed(lamella, model, gone, kept, tmp_path):
    arguments = ("--retain", kept, "--retain", "pydoc", "--alpha", "5.5", "--max-drop", "99", "--retrained", model)
    outcome = lamella("forget", model, "--forget", gone, *arguments, "-o", tmp_path / "out", *QUICK)
    assert outcome.code == 0, outcome.err
    for part in (
        "before",
        "after",
        "retrained",
        "loss on the forget set",
        "Sites with the largest dampening",
        "layers.",
        "report:",
    ):
        assert part in outcome.out


@pytest.mark.slow
def test_importances_are_kept_and_used_again_with_the_same_result(lamella, model, gone, kept, tmp_path):
    file = tmp_path / "fisher.safetensors"
    arguments = (model, "--forget", gone, "--alpha", "3", "--max-drop", "99", *QUICK)
    first = forgot(
        lamella, *arguments, "--retain", kept, "--retain", "pydoc", "--save-importance", file, "-o", tmp_path / "a"
    )
    second = forgot(lamella, *arguments, "--importance", file, "-o", tmp_path / "b")
    assert (
        first["findings"]["total"] == second["findings"]["total"]
        and first["findings"]["sites"] == second["findings"]["sites"]
    )
    assert contents(tmp_path / "a")["model.safetensors"] == contents(tmp_path / "b")["model.safetensors"]
    assert "the edit was not guarded" in second["notes"][0]
    third = forgot(lamella, tmp_path / "a", *arguments[1:], "--importance", file, "-o", tmp_path / "c")
    assert any("measured on other weights" in note for note in third["notes"])


def test_sites_and_kinds_restrict_what_changes(lamella, model, gone, kept, tmp_path):
    arguments = ("--retain", kept, "--retain", "pydoc", "--alpha", "3", "--max-drop", "99", "--skip", "norm")
    evidence = forgot(
        lamella,
        model,
        "--forget",
        gone,
        *arguments,
        "--layers",
        "layers.1, *down_proj*",
        "-o",
        tmp_path / "out",
        *QUICK,
    )
    assert evidence["provenance"]["options"]["layers"] == ["layers.1", "*down_proj*"]
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "out", model))
    changed = {n for n, p in ours.named_parameters() if not torch.equal(p, theirs.get_parameter(n))}
    assert changed and all(("layers.1." in name and "norm" not in name) or "down_proj" in name for name in changed)


def test_no_labels_are_needed_by_lfssd(lamella, model, gone, kept, tmp_path):
    arguments = ("--retain", kept, "--retain", "pydoc", "--variant", "lfssd", "--alpha", "1.5", "--max-drop", "999")
    evidence = forgot(lamella, model, "--forget", gone, *arguments, "-o", tmp_path / "out", *QUICK)
    assert evidence["findings"]["estimator"]["kind"] == "label-free"


def test_the_same_command_gives_the_same_result_and_overwrites_when_told(lamella, model, gone, kept, tmp_path):
    arguments = (
        "forget",
        model,
        "--forget",
        gone,
        "--retain",
        kept,
        "--alpha",
        "1.5",
        "--max-drop",
        "99",
        "-o",
        tmp_path / "out",
    )
    assert lamella(*arguments).code == 0
    first = contents(tmp_path / "out")
    assert "exists" in lamella(*arguments).refused()
    assert lamella(*arguments, "--overwrite").code == 0
    second = contents(tmp_path / "out")
    assert {name for name in first if first[name] != second[name]} <= {"evidence.json", "report.html"}  # seconds differ


# Refusals.


def test_the_guard_rolls_back_and_writes_the_importances_alone(lamella, model, gone, kept, tmp_path):
    arguments = ("--retain", kept, "--alpha", "1.01", "--lambda", "0", "--max-drop", "0.01")
    arguments = (*arguments, "--save-importance", tmp_path / "fisher.safetensors")
    line = lamella("forget", model, "--forget", gone, *arguments, "-o", tmp_path / "out").refused()
    assert "rolled back, no model is written: perplexity on retained data goes from" in line
    assert not (tmp_path / "out").exists() and (tmp_path / "fisher.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "can select nothing: 2 of 4 samples"),  # the published alpha, on half of the data
        (["--alpha", "2"], "can select nothing"),
        (["--alpha", "-1"], "alpha -1"),
        (["--alpha", "1.5", "--lambda", "-1"], "lam -1"),
        (["--alpha", "1.5", "--variant", "sdd"], "choose one of ssd"),
        (["--alpha", "1.5", "--variant", "assd"], "assd determines alpha itself:"),
        (["--alpha", "1.5", "--reference", "some"], "choose one of full, retain"),
        (["--alpha", "1.5", "--layers", "layers.99"], "out of range"),
        (["--alpha", "1.5", "--layers", "blocks.*"], "names no parameter"),
        (["--alpha", "1.5", "--layers", "layers.1,,head"], "an entry is empty"),
        (["--alpha", "1.5", "--skip", "gain"], "choose among norm, bias"),
        (["--alpha", "1.5", "--length", "1"], "length 1"),
        (["--alpha", "1.5", "--batch", "0"], "batch 0"),
        (["--alpha", "1.5", "--max-drop", "-1"], "max_drop -1"),
        (["--alpha", "1.5", "--importance", "nowhere.safetensors"], "not a file of importances"),
        (["--alpha", "1.5", "--retain", "nowhere.txt"], "no file nowhere.txt"),
        (["--alpha", "1.5", "--test", "nowhere.jsonl"], "no file nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lamella, model, gone, kept, tmp_path, more, message):
    before = contents(model)
    arguments = ("forget", model, "--forget", gone, "--retain", kept, "-o", tmp_path / "out", *more)
    assert message in lamella(*arguments).refused()
    assert not (tmp_path / "out").exists() and contents(model) == before


def test_sets_that_are_empty_or_overlap_are_refused(lamella, model, gone, kept, tmp_path):
    arguments = ("-o", tmp_path / "out", "--alpha", "1.5")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "holds no records" in lamella("forget", model, "--forget", empty, "--retain", kept, *arguments).refused()
    assert "retained at once" in lamella("forget", model, "--forget", gone, "--retain", gone, *arguments).refused()
    assert "--retain" in lamella("forget", model, "--forget", gone, *arguments).refused()
    assert "nor a file" in lamella("forget", model, "--forget", tmp_path / "no", "--retain", kept, *arguments).refused()


def test_the_model_s_own_folder_is_never_written_to(lamella, model, gone, kept):
    before = contents(model)
    arguments = ("--retain", kept, "--alpha", "1.5", "-o", model, "--overwrite")
    assert "never overwritten" in lamella("forget", model, "--forget", gone, *arguments).refused()
    assert contents(model) == before


def test_importances_of_another_estimator_or_model_are_refused(lamella, model, gone, kept, tmp_path):
    file = tmp_path / "fisher.safetensors"
    arguments = (model, "--forget", gone, "--max-drop", "999", *QUICK)
    forgot(
        lamella,
        *arguments,
        "--retain",
        kept,
        "--retain",
        "pydoc",
        "--alpha",
        "3",
        "--save-importance",
        file,
        "-o",
        tmp_path / "a",
    )
    again = ("forget", *arguments, "--importance", file, "-o", tmp_path / "b", "--alpha", "3")
    assert "different estimators" in lamella(*again, "--batch", "2").refused()
    assert "different estimators" in lamella(*again, "--variant", "lfssd").refused()
    assert "retained at once" in lamella(*again, "--retain", gone).refused()


def test_weights_that_are_not_finite_are_refused(lamella, model, gone, kept, tmp_path):
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(model)
    arguments = ("--retain", kept, "--alpha", "1.5", "-o", tmp_path / "out")
    assert "the loss is nan" in lamella("forget", model, "--forget", gone, *arguments).refused()


def test_a_retained_plain_text_is_sampled_and_the_result_says_so(lamella, model, gone, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"This is paragraph number {number} of a book." for number in range(500)))
    arguments = ("--forget", gone, "--retain", book, "--alpha", "1.5", "--max-drop", "99", "-o", tmp_path / "out")
    evidence = forgot(lamella, model, *arguments, *QUICK)
    assert evidence["findings"]["samples"] == {"forget": 2, "reference": 12}
    assert any("10 of the 500 records" in note and "--sequences" in note for note in evidence["notes"])


@pytest.mark.parametrize("source", ["retain", "importance"])
def test_an_alpha_that_can_select_nothing_is_refused_before_anything_is_measured(
    lamella, model, gone, kept, tmp_path, monkeypatch, source
):
    file = tmp_path / "fisher.safetensors"
    arguments = ("forget", model, "--forget", gone, "--max-drop", "99")
    first = lamella(*arguments, "--retain", kept, "--alpha", "1.5", "--save-importance", file, "-o", tmp_path / "out")
    assert first.code == 0, first.err

    def measures(*_, **__):
        raise AssertionError("importances are measured")

    monkeypatch.setattr("lamella.methods.ssd.selection.fisher", measures)
    rest = ("--retain", kept) if source == "retain" else ("--importance", file)
    assert (
        "alpha 3 can select nothing: 2 of 4 samples"
        in lamella(*arguments, *rest, "--alpha", "3", "-o", tmp_path / "no").refused()
    )
