"""Healing from the command line: what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.zoo import load, open_stack

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
QUICK = (
    "--sequences",
    "24",
    "--length",
    "48",
    "--steps",
    "12",
    "--batch",
    "4",
    "--lr",
    "5e-4",
    "--test",
    "pydoc",
    "--json",
)


def healed(lamella, *arguments) -> dict:
    outcome = lamella("heal", *arguments)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_a_plan_without_a_recipe_is_healed_by_continual_pre_training(lamella, sublayer_plan, tmp_path):
    out = tmp_path / "out"
    evidence = healed(lamella, NANO_LLAMA, sublayer_plan, "-o", out, *QUICK)
    assert evidence == json.loads((out / "evidence.json").read_text())
    assert evidence["findings"]["recipe"] == "continual-pretrain"
    assert evidence["settings"]["schedule"]["shape"] == "cosine" and evidence["settings"]["replay"] is None
    new = [point["new"] for point in evidence["held_out"]]
    assert new[-1] < new[0]
    assert evidence["fidelity"]["perplexity"]["mean"] < evidence["before"]["perplexity"]["mean"]
    assert Plan.read(out / "plan.json").drop == Plan.read(sublayer_plan).drop
    assert "Held-out loss" in (out / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sublayers.json"]


@pytest.mark.parametrize("more", [[], ["--lora", "4"]])
def test_the_export_computes_what_was_measured(lamella, plan, tmp_path, more):
    evidence = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "out", *QUICK, *more)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.num_hidden_layers == 4
    args = ("eval", NANO_LLAMA, tmp_path / "out", "--test", "pydoc", "--json")
    again = json.loads(lamella(*args).out)["findings"]["results"][str(tmp_path / "out")]
    assert again["kl"]["mean"] == pytest.approx(evidence["fidelity"]["kl"]["mean"], abs=1e-5)


def test_a_model_without_plan_is_trained_on(lamella, tmp_path):
    evidence = healed(lamella, NANO_LLAMA, "-o", tmp_path / "out", *QUICK, "--schedule", "constant")
    assert evidence["before"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert evidence["fidelity"]["kl"]["mean"] > 1e-3
    assert evidence["settings"]["schedule"] == {"shape": "constant", "high": 5e-4, "warmup": 1}
    ours, theirs = load(tmp_path / "out").model, open_stack(NANO_LLAMA).model
    assert not torch.equal(ours.model.layers[0].mlp.up_proj.weight, theirs.model.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize("given", [["--replay", "0.5"], [], ["--replay", "auto"]])
def test_replay_names_its_text_and_its_share(lamella, plan, tmp_path, given):
    replay = ("--past", "stdlib", *given)
    evidence = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "out", *QUICK, *replay)
    assert evidence["data"]["replay"]["data"] == "stdlib"
    assert evidence["settings"]["replay"]["fraction"] in ([0.5] if given == ["--replay", "0.5"] else [0.05, 0.25])
    assert set(evidence["held_out"][0]) == {"step", "loss", "new", "old"}


def test_people_are_told_of_every_text(lamella, plan, tmp_path):
    args = [argument for argument in QUICK if argument != "--json"]
    more = ("--past", "stdlib", "--replay", "0.25", "--schedule", "infinite")
    said = lamella("heal", NANO_LLAMA, plan, "-o", tmp_path / "out", *args, *more).out
    for part in ("Held-out loss", "pydoc (new)", "stdlib (old)", "replayed: 25%", "report:"):
        assert part in said


def test_a_budget_of_tokens_is_one_pass_over_them(lamella, plan, tmp_path):
    args = ("--tokens", "1100", "--length", "32", "--batch", "4", "--json")
    evidence = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "out", *args)
    assert (evidence["settings"]["steps"], evidence["data"]["training"]["tokens"]) == (8, 1024)


def test_minutes_belong_to_recipes_that_learn_from_a_teacher(lamella, plan, tmp_path):
    said = lamella("heal", NANO_LLAMA, plan, "-o", tmp_path / "out", "--minutes", "1").refused()
    assert "continual-pretrain heals by its own recipe, which has no option 'minutes'" in said


@pytest.mark.slow
def test_an_interrupted_command_goes_on_with_the_same_result(lamella, plan, tmp_path, monkeypatch):
    from inspect import unwrap

    from lamella.methods.continual_pretrain import continual_pretrain

    args = (NANO_LLAMA, plan, *QUICK, "--past", "stdlib")
    defaults = unwrap(continual_pretrain).__kwdefaults__
    monkeypatch.setitem(defaults, "config", replace(defaults["config"], save_every=5))
    whole = healed(lamella, *args, "-o", tmp_path / "whole")

    def stop(callback, args, state, control, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.TrainerCallback.on_optimizer_step", stop)
        assert lamella("heal", *args, "-o", tmp_path / "cut").code == 130
    assert list((tmp_path / ".cut.work").rglob("checkpoint-5"))
    assert healed(lamella, *args, "-o", tmp_path / "cut") == whole


def test_tensorboard_finds_the_curves_that_the_log_has(lamella, plan, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    evidence = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "out", *QUICK, "--tensorboard", events)
    found = EventAccumulator(str(events)).Reload()
    losses = {each.step: each.value for each in found.Scalars("train/loss")}
    assert losses == {point["step"]: pytest.approx(point["loss"], rel=1e-6) for point in evidence["curve"]}
    assert [each.step for each in found.Scalars("train/held_out/new")] == [
        each["step"] for each in evidence["held_out"]
    ]


def test_a_cut_is_refitted_without_training(lamella, plan, tmp_path):
    given = ("--way", "refit", "--sequences", "8", "--length", "48", "--test", "stdlib", "--json")
    evidence = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "out", *given)
    assert evidence["findings"]["recipe"] == "refit" and evidence["curve"] == []
    gaps = evidence["findings"]["refit"]
    assert [gap["site"] for gap in gaps] == ["layers.1.mlp", "layers.3.mlp"]
    assert all(gap["after"] < gap["before"] for gap in gaps)
    assert evidence["fidelity"]["kl"]["mean"] < evidence["before"]["kl"]["mean"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Squared relative error of the residual stream behind each gap" in page and "refit took" in page


# Refusals.


def test_refit_has_no_options_of_training_and_needs_a_plan(lamella, plan, tmp_path):
    given = ("-o", tmp_path / "out", "--way", "refit", "--sequences", "4", "--length", "16")
    for more in (["--steps", "4"], ["--loss", "kd"], ["--past", "stdlib"], ["--shard"], ["--teacher", NANO_LLAMA]):
        line = lamella("heal", NANO_LLAMA, plan, *given, *more).refused()
        assert f"refit does not train, so it has no option '{more[0].removeprefix('--')}'" in line
    assert "give a plan" in lamella("heal", NANO_LLAMA, *given).refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replay", "0.05"], "needs a text to replay"),
        (["--replay", "much", "--past", "stdlib"], "--replay much: heal expects auto or float"),
        (["--replay", "2", "--past", "stdlib"], "> 0 and < 1"),
        (["--past", "gsm8k"], "is a test set"),
        (["--schedule", "sideways"], "choose one of cosine"),
        (["--minutes", "1"], "all determine the duration of training"),
        (["--tokens", "1000"], "all determine the duration of training"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lamella, plan, tmp_path, more, said):
    assert said in lamella("heal", NANO_LLAMA, plan, "-o", tmp_path / "out", *QUICK, *more).refused()
    assert not (tmp_path / "out").exists()


def test_a_method_with_a_recipe_takes_no_options_of_another(lamella, tmp_path):
    stack = open_stack(NANO_LLAMA)
    file = tmp_path / "plan.json"
    Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first")}).write(file)
    for more in (["--lora", "4"], ["--schedule", "wsd"], ["--past", "stdlib"]):
        line = lamella("heal", NANO_LLAMA, file, "-o", tmp_path / "out", *QUICK, *more).refused()
        assert "first heals by its own recipe" in line


def pool_of(path: Path, count: int = 24) -> Path:
    """Instructions of two kinds, as a file that people have."""
    rows = [{"instruction": f"Add {n} and {n + 1}.", "output": f"The sum is {2 * n + 1}."} for n in range(count // 2)]
    rows += [
        {"instruction": "Say the word again.", "input": f"word{n}", "output": f"word{n} word{n}"}
        for n in range(count // 2)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_samples_to_heal_with_are_chosen_by_what_the_plan_has_damaged(lamella, sublayer_plan, tmp_path):
    pool = pool_of(tmp_path / "pool.jsonl")
    arguments = ["--pool", pool, "--keep", "0.5", "--steps", "4", "--test", "pydoc", "--json"]
    evidence = healed(lamella, NANO_LLAMA, sublayer_plan, "-o", tmp_path / "out", *arguments)
    report = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert report["budget"] == len(report["selected"]) == 12 and report["pool"] == 24
    training = evidence["data"]["training"]
    assert (training["data"], training["chosen"], training["samples"]) == (str(pool), 12, 24)
    assert "12 of 24 samples" in (tmp_path / "out" / "report.html").read_text()


def test_a_pool_that_is_none_is_refused(lamella, sublayer_plan, tmp_path):
    given = [NANO_LLAMA, sublayer_plan, "-o", tmp_path / "out"]
    assert "jsonl" in lamella("heal", *given, "--pool", tmp_path / "no.jsonl").refused()
    pool = pool_of(tmp_path / "pool.jsonl")
    pool.write_text('{"instruction": "Why?"}\n')
    assert "row 0" in lamella("heal", *given, "--pool", pool).refused()


@pytest.mark.parametrize("loss", [[], ["--loss", "kd+hidden"], ["--loss", "ce"]])
def test_a_checkpoint_that_was_cut_learns_from_its_original(lamella, plan, tmp_path, loss):
    assert lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "cut").code == 0
    evidence = healed(lamella, tmp_path / "cut", "--teacher", NANO_LLAMA, "-o", tmp_path / "out", *QUICK, *loss)
    assert evidence["findings"]["recipe"] == ("continual-pretrain" if "ce" in loss else "distillation")
    assert evidence["before"]["kl"]["mean"] > 0.01  # it is measured against the teacher
    assert evidence["fidelity"]["kl"]["mean"] < evidence["before"]["kl"]["mean"]
    if "ce" not in loss:
        pairs = evidence["settings"]["pairs"]
        assert pairs == ([[0, 0], [1, 2], [2, 3], [3, 5]] if loss else [])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


def test_teachers_and_losses_that_do_not_fit_are_refused(lamella, plan, tmp_path):
    other = transformers.AutoModelForCausalLM.from_pretrained(NANO_LLAMA)
    other.resize_token_embeddings(other.config.vocab_size + 8)
    other.save_pretrained(tmp_path / "other")
    given = [NANO_LLAMA, plan, "-o", tmp_path / "out", *QUICK[:-1]]
    line = lamella("heal", *given, "--teacher", tmp_path / "other").refused()
    assert "same vocabulary" in line
    assert "choose one of kd, kd+hidden, ce" in lamella("heal", *given, "--loss", "mse").refused()
    assert "no option 'replay'" in lamella("heal", *given, "--loss", "kd", "--replay", "0.1").refused()


@pytest.mark.slow
def test_two_processes_share_a_model_and_its_teacher(lamella, plan, in_two_processes, tmp_path):
    args = ["--sequences", "8", "--length", "48", "--steps", "3", "--loss", "kd", "--test", "pydoc", "--json"]
    one = healed(lamella, NANO_LLAMA, plan, "-o", tmp_path / "one", *args, "--batch", "4")
    run = ["-m", "lamella.cli", "heal", NANO_LLAMA, plan, "-o", tmp_path / "two", *args, "--batch", "2", "--shard"]
    ran = in_two_processes(*run)
    assert ran.returncode == 0, ran.stderr
    two = json.loads(ran.stdout)  # one process speaks
    assert two["settings"]["shard"] and two["settings"]["processes"] == 2
    assert two["fidelity"]["kl"]["mean"] == pytest.approx(one["fidelity"]["kl"]["mean"], abs=1e-4)
    assert one["fidelity"]["kl"]["mean"] < one["before"]["kl"]["mean"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "plan.json", "two"]


def test_what_cannot_be_split_is_refused(lamella, plan, tmp_path):
    given = ("heal", NANO_LLAMA, plan, "-o", tmp_path / "out", "--shard", *QUICK)
    assert "accelerate launch" in lamella(*given).refused()
    assert "choose another schedule" in lamella(*given, "--schedule", "infinite").refused()
    known = Plan.read(plan)
    known.model_copy(update={"provenance": {"method": "unified-skip"}}).write(tmp_path / "own.json")
    own = lamella("heal", NANO_LLAMA, tmp_path / "own.json", "-o", tmp_path / "out", "--shard", *QUICK)
    assert "unified-skip heals by its own recipe, which cannot be sharded" in own.refused()
