"""lamella restore: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lamella.methods.slr.method import _warnings
from lamella.plan import Plan
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
QUICK = ("--min-validity", "0", "--samples", "1", "--json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano Llama as it might have been before: other weights, the same names, shapes and tokenizer."""
    folder = Path(shutil.copytree(NANO_LLAMA, tmp_path_factory.mktemp("pair") / "base"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: value + 0.2 * value.std() * torch.randn(value.shape, generator=generator)
        for key, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions, two to choose on and two to report on: quicker than the built-in task."""
    file = tmp_path_factory.mktemp("questions") / "few.jsonl"
    rows = [{"prompt": f"Pick one of {a} and {b}:", "answers": [a, b]} for a, b in ("AB", "CD", "EF", "GH")]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def done(lamella: Any, *arguments: object) -> dict[str, Any]:
    outcome = lamella("restore", *arguments)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_folder_holds_an_ordinary_checkpoint_with_plan_evidence_and_page(lamella, base, few, tmp_path):
    out = tmp_path / "out"
    evidence = done(lamella, NANO_LLAMA, "--base", base, "-o", out, *QUICK, "--min-quality", "0", "--data", few)
    assert evidence == json.loads((out / "evidence.json").read_text())
    plan = Plan.read(out / "plan.json")
    start, stop = evidence["findings"]["interval"]
    assert plan.weights[0].sites == [f"layers.{layer}" for layer in range(start, stop)] and stop > start
    post, pre, ours = (load_file(folder / "model.safetensors") for folder in (NANO_LLAMA, base, out))
    assert ours.keys() == post.keys()
    inside = tuple(f"model.layers.{layer}." for layer in range(start, stop))
    for key, value in ours.items():
        assert torch.equal(value, (pre if key.startswith(inside) else post)[key])
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 6
    assert (out / "tokenizer.json").is_file() and "Selective Layer Restoration" in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    for part in ("Validity against diversity", "Every interval", "Open questions", "plot-plane"):
        assert part in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_half_precision_stays_as_it_is_on_disk(lamella, base, few, tmp_path):
    folders = []
    for name, source in (("post", NANO_LLAMA), ("pre", base)):
        folders.append(Path(shutil.copytree(source, tmp_path / name)))
        transformers.AutoModelForCausalLM.from_pretrained(source).bfloat16().save_pretrained(folders[-1])
    arguments = [folders[0], "--base", folders[1], "-o", tmp_path / "out", *QUICK, "--min-quality", "0", "--data", few]
    start, stop = done(lamella, *arguments)["findings"]["interval"]
    post, pre, ours = (load_file(folder / "model.safetensors") for folder in (*folders, tmp_path / "out"))
    inside = tuple(f"model.layers.{layer}." for layer in range(start, stop))
    for key, value in ours.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, (pre if key.startswith(inside) else post)[key])


@pytest.mark.exhaustive
def test_every_interval_is_reported_and_the_choice_is_compared_on_other_questions(lamella, base, tmp_path):
    arguments = [NANO_LLAMA, "--base", base, "-o", tmp_path / "out", *QUICK, "--min-quality", "0"]
    evidence = done(lamella, *arguments)
    found = evidence["findings"]["search"]
    assert found["evaluations"] == len(found["points"]) == 21 and found["seconds"] > 0
    assert [len(points) for points in found["soups"].values()] == [21, 21]
    names = {row["name"] for row in evidence["findings"]["report"]}
    assert names == {"post", "pre", "slr", "early", "middle", "late", "random", "all", "soup", "blocks"}
    splits = evidence["provenance"]["inputs"]["questions"]
    assert [splits[name]["split"] for name in ("search", "report")] == ["calibration", "test"]
    assert splits["search"]["sha256"] != splits["report"]["sha256"]
    assert any("restoring all 6 layers" in note for note in evidence["notes"])
    assert done(lamella, *arguments, "--overwrite")["findings"]["search"]["points"] == found["points"]


def test_the_summary_has_the_verdict_the_seconds_and_the_evaluations(lamella, base, few, tmp_path):
    arguments = [NANO_LLAMA, "--base", base, "-o", tmp_path / "out", *QUICK[:-1], "--stride", "3", "--data", few]
    message = lamella("restore", *arguments).out
    for part in ("On held-out questions", "intervals on 2 questions in", "report.html", "SLR"):
        assert part in message


def test_nothing_is_restored_from_a_base_that_is_the_same(lamella, few, tmp_path):
    out = tmp_path / "out"
    arguments = [NANO_LLAMA, "--base", NANO_LLAMA, "-o", out, "--min-validity", "0", "--samples", "0", "--json"]
    evidence = done(lamella, *arguments, "--data", few)
    assert evidence["findings"]["interval"] == [0, 0] and Plan.read(out / "plan.json").weights == []
    assert any("No interval" in note for note in evidence["notes"])
    assert "Nothing was restored" in (out / "report.html").read_text()
    assert "open" not in evidence["findings"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, NANO_LLAMA))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.slow
def test_own_questions_come_from_a_file(lamella, base, few, tmp_path):
    evidence = done(lamella, NANO_LLAMA, "--base", base, "-o", tmp_path / "out", *QUICK, "--data", few)
    assert [evidence["provenance"]["inputs"]["questions"][name]["questions"] for name in ("search", "report")] == [2, 2]
    assert evidence["provenance"]["inputs"]["questions"]["search"]["data"] == str(few)


def test_questions_that_the_model_does_not_answer_are_listed(lamella, base, tmp_path):
    evidence = done(
        lamella,
        NANO_LLAMA,
        "--base",
        base,
        "-o",
        tmp_path / "out",
        "--min-validity",
        "0.005",
        "--samples",
        "0",
        "--json",
    )
    dropped = evidence["findings"]["search"]["dropped"]
    assert 0 < len(dropped) == 40 - evidence["findings"]["search"]["questions"]
    assert dropped[0] in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")


@pytest.mark.slow
def test_an_interrupted_command_resumes_with_the_same_result(lamella, base, few, tmp_path, monkeypatch):
    from lamella.methods.slr.answers import EncodedQuestions

    arguments = [NANO_LLAMA, "--base", base, *QUICK, "--data", few]
    whole = done(lamella, *arguments, "-o", tmp_path / "whole")
    calls, own = [0], EncodedQuestions.scores

    def stop(self, logits):
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return own(self, logits)

    with monkeypatch.context() as patched:
        patched.setattr(EncodedQuestions, "scores", stop)
        assert lamella("restore", *arguments, "-o", tmp_path / "cut").code == 130
    assert (tmp_path / ".cut.work" / "intervals.jsonl").is_file()
    again = done(lamella, *arguments, "-o", tmp_path / "cut")
    for document in (whole, again):
        del document["findings"]["search"]["seconds"]
    assert again == whole and not (tmp_path / ".cut.work").exists()


# Refusals.


def changed(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | fields))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stride", "0"], "stride 0"),
        (["--stride", "7"], "from 1 to 6"),
        (["--data", "no.jsonl"], "give crc or a .jsonl file"),
        (["--min-validity", "0.9"], "lower min_validity"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lamella, base, tmp_path, more, message):
    line = lamella("restore", NANO_LLAMA, "--base", base, "-o", tmp_path / "out", *QUICK, *more).refused()
    assert message in line and not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_refused(lamella, base, tmp_path):
    (tmp_path / "file").write_text("")
    line = lamella("restore", NANO_LLAMA, "--base", base, "-o", tmp_path / "file" / "out", *QUICK).refused()
    assert "cannot be written" in line


def test_a_floor_that_does_not_hold_on_other_questions_is_said() -> None:
    report = [{"name": "post", "quality": 0.8}, {"name": "slr", "quality": 0.7}]
    assert "87.5% of the validity remains, which is" in _warnings(report, 0.9)[0] and _warnings(report, 0.8) == []
    assert "none of the held-out" in _warnings([], 0.9)[0]


def test_the_folder_of_a_model_is_never_the_output(lamella, base, few, model):
    line = lamella("restore", model, "--base", base, "-o", model, *QUICK, "--overwrite", "--data", few).refused()
    assert "is never overwritten" in line


@pytest.mark.parametrize("which", ["config", "shape", "dtype", "depth", "tokenizer", "family"])
def test_two_models_that_do_not_fit_are_refused_by_what_differs(lamella, model, tmp_path, which):
    out, message = tmp_path / "out", {
        "config": "rope_parameters.rope_theta is 10000.0 and 500000.0",
        "shape": "intermediate_size is 256 and 128",
        "dtype": "is F32 [96] and BF16 [96]",
        "depth": "a llama of 5",
        "tokenizer": "the tokenizers differ in",
        "family": "a gpt2 of 4",
    }  # fmt: skip
    if which == "config":
        changed(model, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    elif which == "shape":
        changed(model, intermediate_size=128)
        narrow = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
        narrow.save_pretrained(model)
    elif which == "dtype":
        transformers.AutoModelForCausalLM.from_pretrained(model).bfloat16().save_pretrained(model)
    elif which == "depth":
        changed(model, num_hidden_layers=5)
    elif which == "tokenizer":
        document = json.loads((model / "tokenizer.json").read_text())
        words = document["model"]["vocab"]
        first, second = list(words)[-2:]
        words[first], words[second] = words[second], words[first]
        (model / "tokenizer.json").write_text(json.dumps(document))
    else:
        nano("gpt2").save_pretrained(model)
    line = lamella("restore", NANO_LLAMA, "--base", model, "-o", out, *QUICK).refused()
    assert message[which] in line and not out.exists()
