"""Repairing from the command line: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import lamella as library
from lamella.methods.irepair import SliceTraining
from lamella.plan import Plan
from lamella.zoo import open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"
QUICK = ("--steps", 10, "--warmup", 2, "--lr", "5e-4", "--test", "pydoc", "--json")
ROWS = [(f"The function f{n} returns", f" a fool, number {n}.", f" the value {n} of x.") for n in range(24)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same pairs in every form."""
    contents = {
        "bad.jsonl": [json.dumps({"prompt": prompt, "text": bad}) for prompt, bad, _ in ROWS],
        "good.jsonl": [json.dumps({"prompt": prompt, "text": good}) for prompt, _, good in ROWS],
        "bad.txt": [f"{prompt}\t{bad.strip()}" for prompt, bad, _ in ROWS],
        "good.txt": [f"{prompt}\t{good.strip()}" for prompt, _, good in ROWS],
        "pairs.jsonl": [json.dumps({"prompt": prompt, "bad": bad, "good": good}) for prompt, bad, good in ROWS],
        "rated.jsonl": [json.dumps({"prompt": prompt, "rejected": b, "chosen": g}) for prompt, b, g in ROWS],
    }
    for name, lines in contents.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return {name: tmp_path / name for name in contents}


def repaired(lamella, *arguments) -> dict:
    outcome = lamella("repair", NANO_LLAMA, *arguments, *QUICK)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_it_writes_a_checkpoint_a_plan_the_trace_and_a_page(lamella, files, tmp_path):
    out = tmp_path / "out"
    evidence = repaired(
        lamella, "--bad", files["bad.jsonl"], "--good", files["good.jsonl"], "--match", "fool", "-o", out
    )
    assert evidence == json.loads((out / "evidence.json").read_text())
    assert evidence["findings"]["after"]["good"] < evidence["findings"]["before"]["good"]
    assert (
        evidence["findings"]["counts"] == {"trained": 20, "judged": 4}
        and evidence["findings"]["before"]["habit"] is not None
    )
    trace = json.loads((out / "trace.json").read_text())
    assert len(trace["chosen"]) == len(trace["sensitivities"]) == 10 and len(trace["sensitivities"][0]) == 6
    assert {name: len(each) for name, each in evidence["findings"]["profile"].items()} == {
        "bad": 6,
        "good": 6,
        "utility": 6,
    }
    page = (out / "report.html").read_text()
    for part in ("The layer of each step", "Before and after", "plot-layers", "plot-profile", "plot-held"):
        assert part in page
    assert not list(tmp_path.glob(".*"))
    stack = open_stack(NANO_LLAMA)
    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    view = library.apply(stack, Plan.read(out / "plan.json"))
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor, view.get_parameter(name))
    touched = set(evidence["sites"])
    for name, tensor in stack.model.named_parameters():
        layer = name.removeprefix("model.layers.").split(".")[0]
        if f"layers.{layer}" not in touched and not any(site.startswith(f"layers.{layer}.") for site in touched):
            assert torch.equal(tensor, exported.get_parameter(name)), name


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "dpo"], ("all", "dpo", 0.5, 1.0)),
        (["--method", "dapt"], ("all", "repair", 1.0, 0.0)),
        (["--method", "dapt-kl"], ("all", "repair", 0.5, 1.0)),
        (
            ["--select", "random", "--gamma", "0", "--bias-correction", "--per-parameter"],
            ("random", "repair", 0.5, 0.0),
        ),
    ],
)
def test_what_it_is_compared_with_runs_by_the_same_command(lamella, files, tmp_path, more, says):
    evidence = repaired(lamella, "--pairs", files["pairs.jsonl"], "-o", tmp_path / "out", "--utility", "pydoc", *more)
    settings = evidence["findings"]["settings"]
    assert tuple(settings[name] for name in ("select", "objective", "beta", "gamma")) == says
    assert settings["bias_correction"] == ("--bias-correction" in more)
    assert evidence["provenance"]["inputs"]["utility"]["data"] == "pydoc"
    page = (tmp_path / "out" / "report.html").read_text()
    assert ('id="plot-layers"' in page) == (says[0] != "all")


def test_people_are_told_what_it_brought_and_cost(lamella, files, tmp_path):
    out = lamella(
        "repair", NANO_LLAMA, "--pairs", files["pairs.jsonl"], "--match", "fool", "-o", tmp_path / "out", *QUICK[:-1]
    ).out
    for part in ("continuations with the habit", "good one more likely", "perplexity on pydoc", "changed: ", "report:"):
        assert part in out
    assert "bad continuations" in lamella("repair", "--help").out


@pytest.mark.slow
def test_chat_puts_prompts_through_the_template_and_ends_the_turn(lamella, files, tmp_path, model):
    plain = repaired(lamella, "--pairs", files["pairs.jsonl"], "-o", tmp_path / "a")
    tokenizer = open_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    tokenizer.save_pretrained(model)
    outcome = lamella("repair", model, "--pairs", files["pairs.jsonl"], "-o", tmp_path / "b", "--chat", *QUICK)
    chatted = json.loads(outcome.out)
    assert chatted["findings"]["samples"][0]["prompt"].startswith("Q: ") and not plain["findings"]["samples"][0][
        "prompt"
    ].startswith("Q: ")


@pytest.mark.slow
def test_an_interrupted_command_goes_on_with_the_same_result(lamella, files, tmp_path, monkeypatch):
    args = ("--pairs", files["pairs.jsonl"], "--save-every", 3)
    whole = repaired(lamella, *args, "-o", tmp_path / "whole")
    before_step = SliceTraining.before_step

    def stop(hook, run):
        if run.step == 7:
            raise KeyboardInterrupt
        before_step(hook, run)

    with monkeypatch.context() as patched:
        patched.setattr(SliceTraining, "before_step", stop)
        assert lamella("repair", NANO_LLAMA, *args, "-o", tmp_path / "cut", *QUICK).code == 130
    assert (tmp_path / ".cut.work" / "training" / "checkpoint-6").is_dir()
    assert repaired(lamella, *args, "-o", tmp_path / "cut") == whole


# Refusals.


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--select", "best"], "choose one of max"),
        (["--method", "ppo"], "choose one of irepair"),
        (["--method", "dapt", "--gamma", "2"], "dapt sets gamma to 0.0 itself"),
        (["--match", "("], "is not a regular expression"),
        (["--lr", "1e30", "--warmup", "0"], "non-finite"),
        (["--lr", "-1"], "rates"),
        (["--batch", "0"], "batch 0"),
        (["--utility", "gsm8k"], "is a test set"),
        (["--utility", "nowhere.txt"], "no file nowhere.txt"),
        (["--test", "nowhere.txt"], "no file nowhere.txt"),
        (["--bad", "bad.jsonl"], "give both --bad and --good, or --pairs alone"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lamella, files, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    args = (NANO_LLAMA, "--pairs", files["pairs.jsonl"], "-o", tmp_path / "out", *QUICK, *more)
    assert said in lamella("repair", *args).refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.jsonl", "", "is empty"),
        ("bad.jsonl", "\n \n", "is empty"),
        ("bad.jsonl", '{"prompt": "a", "text": " b"}\n', "has 1 continuations and"),
        ("bad.jsonl", '{"text": " b"}\n', "line 1: the prompt or the text is missing"),
        ("bad.jsonl", '{"prompt": "a", "text": 3}\n', "line 1: the prompt or the text is missing"),
        ("bad.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("bad.jsonl", "not json\n", "line 1 is not JSON"),
        ("bad.txt", "no tab here\n", "line 1: the prompt is missing"),
        ("bad.csv", "a,b\n", "give a .jsonl, .txt, .tsv file"),
        ("bad.jsonl", "same", "both continuations are the same"),
        ("bad.jsonl", "other", "pair 1: "),
        ("bad.jsonl", "blank", "the prompt is missing"),
        ("bad.jsonl", "long", "takes 1024"),
        ("bad.jsonl", "few", "give 5 or more"),
        ("bad.jsonl", None, "cannot be read"),
    ],
)
def test_files_that_are_no_pairs_are_refused_with_the_line(lamella, files, tmp_path, name, content, said):
    good = files["good.jsonl"]
    rows = [dict(json.loads(line)) for line in good.read_text().splitlines()]
    if content == "other":
        content = "\n".join(json.dumps({"prompt": "Else", "text": " b"}) for _ in rows)
    elif content == "same":
        content = good.read_text()
    elif content == "long":
        content = "\n".join(json.dumps(row | {"text": " word" * 2000}) for row in rows)
    elif content == "few":
        good.write_text("\n".join(json.dumps(row) for row in rows[:4]))
        content = "\n".join(json.dumps(row | {"text": " x"}) for row in rows[:4])
    elif content == "blank":
        good.write_text(json.dumps({"prompt": " ", "text": "a"}))
        content = json.dumps({"prompt": " ", "text": "b"})
    bad = tmp_path / f"given-{name}"
    if content is not None:
        bad.write_text(content)
    args = ("--bad", bad, "--good", good, "-o", tmp_path / "out", *QUICK)
    assert said in lamella("repair", NANO_LLAMA, *args).refused()
    assert not (tmp_path / "out").exists()


def test_one_file_of_pairs_with_a_field_missing_is_refused(lamella, files, tmp_path):
    files["pairs.jsonl"].write_text('{"prompt": "a", "good": "b"}\n')
    line = lamella("repair", NANO_LLAMA, "--pairs", files["pairs.jsonl"], "-o", tmp_path / "out", *QUICK).refused()
    assert 'line 1: write {"prompt"' in line


def test_an_output_that_exists_is_replaced_only_when_asked(lamella, files, tmp_path):
    (tmp_path / "out").mkdir()
    args = ("--pairs", files["pairs.jsonl"], "-o", tmp_path / "out")
    assert "add --overwrite" in lamella("repair", NANO_LLAMA, *args, *QUICK).refused()
    repaired(lamella, *args, "--overwrite")
    assert (tmp_path / "out" / "report.html").is_file()
