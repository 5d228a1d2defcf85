"""Bad input: one clear line on stderr, exit code 2, no traceback, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lamella.errors import MethodError
from lamella.runner import run
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
SHORT = ("--sequences", "2", "--length", "48")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Plans and models that do not belong together.


@pytest.mark.parametrize("more", [(), ("--out-of-core",)])
def test_a_plan_for_another_model_is_not_applied(lamella, plan, tmp_path, more):
    nano("llama").save_pretrained(tmp_path / "other")
    line = lamella("apply", plan, tmp_path / "other", "-o", tmp_path / "out", *more).refused()
    assert "6 layers" in line and "of 4" in line
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model_is_not_scored(lamella, plan, model):
    settings = json.loads((model / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 1e6
    (model / "config.json").write_text(json.dumps(settings))
    assert "another architecture" in lamella("eval", model, plan, *SHORT).refused()


def test_a_plan_that_names_layers_that_are_not_there_is_refused_by_field(lamella, plan, tmp_path):
    document = json.loads(plan.read_text())
    document["drop"] = ["layers.9"]
    plan.write_text(json.dumps(document))
    line = lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "out").refused()
    assert str(plan) in line and "layers.9" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "lamella.plan/2"}', "\udcff"])
def test_a_file_that_is_no_plan_is_refused(lamella, tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert str(file) in lamella("apply", file, NANO_LLAMA, "-o", tmp_path / "out").refused()


def test_a_plan_file_that_is_not_there_is_refused(lamella, tmp_path):
    assert "cannot be read" in lamella("apply", tmp_path / "no.json", NANO_LLAMA, "-o", tmp_path / "out").refused()


# Checkpoints.


def truncate(model: Path) -> str:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return "model.safetensors"


def truncate_header(model: Path) -> str:
    os.truncate(model / "model.safetensors", 20)
    return "model.safetensors"


def lose_a_shard(model: Path) -> str:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="500KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def damage_the_index(model: Path) -> str:
    lose_a_shard(model)
    (model / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json"


def lose_the_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return str(model)


def lose_a_tensor(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return "down_proj"


def damage_the_config(model: Path) -> str:
    config = model / "config.json"
    config.write_text(config.read_text()[:100])
    return "config.json"


def empty_the_config(model: Path) -> str:
    (model / "config.json").write_text("{}")
    return str(model)


def list_in_the_config(model: Path) -> str:
    (model / "config.json").write_text("[]")
    return "config.json"


def lose_the_config(model: Path) -> str:
    (model / "config.json").unlink()
    return "config.json"


DAMAGES = [
    truncate,
    truncate_header,
    lose_a_shard,
    damage_the_index,
    lose_the_weights,
    lose_a_tensor,
    damage_the_config,
    empty_the_config,
    list_in_the_config,
    lose_the_config,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["plan", "apply", "out of core", "eval"])
def test_a_damaged_checkpoint_is_refused_by_name(lamella, plan, model, tmp_path, command, damage):
    named = damage(model)
    arguments: dict[str, list[Any]] = {
        "plan": ["plan", "random", model, "-o", tmp_path / "out"],
        "apply": ["apply", plan, model, "-o", tmp_path / "out"],
        "out of core": ["apply", plan, model, "-o", tmp_path / "out", "--out-of-core"],
        "eval": ["eval", NANO_LLAMA, model, *SHORT],
    }
    assert named in lamella(*arguments[command]).refused()
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_opened_only_when_allowed(lamella, model, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "--allow-pickle" in lamella("plan", "random", model).refused()
    assert lamella("plan", "random", model, "--allow-pickle").code == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
    ],
    ids=["bert", "mamba"],
)
@pytest.mark.parametrize("command", [["plan", "random"], ["inspect"]])
def test_an_unknown_architecture_shows_how_to_add_it(lamella, tmp_path, make, command):
    made = make()
    made.save_pretrained(tmp_path / "model")
    line = lamella(*command, tmp_path / "model").refused()
    if made.config.model_type == "bert":  # which could be derived, were it a decoder
        assert "see later tokens, so with this config it is not a decoder" in line
    else:
        assert "Architecture(name='mamba'" in line and "register_architecture" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "command",
    [["plan", "finercut"], ["plan", "shortgpt"], ["plan", "window"], ["plan", "sleb"], ["inspect"], ["compress"]],
)
def test_activations_that_are_not_finite_are_named_by_site(lamella, model, tmp_path, command, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    more = {"plan": SHORT, "inspect": ["--sequences", "1"], "compress": ["--speedup", "1.02"]}[command[0]]
    assert "after layers.3.mlp of" in lamella(*command, model, *more, "-o", tmp_path / "out").refused()
    assert not any((tmp_path / "out").rglob("*"))


def test_a_changed_model_with_activations_that_are_not_finite_is_refused(lamella, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert "non-finite" in lamella("eval", NANO_LLAMA, model, *SHORT).refused()


# Methods and their options.


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "finecut", NANO_LLAMA],
        ["methods", "finecut"],
        ["compress", NANO_LLAMA, "--method", "finecut", "-o", "x"],
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(lamella, command):
    line = lamella(*command).refused()
    assert "'finecut'" in line and "did you mean finercut" in line


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        (("--level", "sideways"), "choose one of sublayer, attn, mlp, block"),
        (("--distance", "miles"), "choose one of jsd, jsd_repo"),
        (("--share", "2"), ">= 0 and <= 1"),
        (("--exclude-front", "0.99"), "exclude_front"),
    ],
)
def test_a_bad_option_of_a_method_is_answered_with_what_it_takes(lamella, setting, answer, tmp_path):
    assert answer in lamella("plan", "finercut", NANO_LLAMA, *SHORT, *setting).refused()
    option, value = setting
    if option != "--share":  # which is one of the job's own
        dotted = ("--method", "finercut", f"--finercut.{option[2:]}", value)
        assert answer in lamella("compress", NANO_LLAMA, *dotted, "-o", tmp_path / "out").refused()


def test_options_of_planners_are_those_that_race(lamella, tmp_path):
    given = ("compress", NANO_LLAMA, "-o", tmp_path / "out", "--finercut.level", "attn")
    line = lamella(*given, "--method", "shortgpt").refused()
    assert "finercut, which is not among the planners: add it to --method" in line
    wrong = lamella(*given, "--method", "finercut", "--finercut.lewel", "attn")
    assert wrong.code == 2 and "--finercut.level" in wrong.err
    assert "did you mean finercut" in lamella("compress", NANO_LLAMA, "-o", "x", "--finecut.level", "attn").refused()
    helped = lamella("compress", "--method", "finercut", "--help").out
    assert "Options of finercut" in helped and "--finercut.level" in helped


def test_minutes_are_refused_where_no_search_would_keep_them(lamella):
    assert lamella("plan", "finercut", "--help").out.count("--minutes") == 1
    assert "--minutes" not in lamella("plan", "shortgpt", "--help").out
    outcome = lamella("plan", "shortgpt", NANO_LLAMA, "--minutes", "1")
    assert outcome.code == 2 and "--minutes" in outcome.err
    with pytest.raises(MethodError, match="shortgpt has no option 'minutes'"):
        run("shortgpt", NANO_LLAMA, minutes=1.0)


@pytest.mark.parametrize("batch", ["0", "1,", "two", "-1", "1,1.5"])
def test_batch_sizes_are_whole_numbers(lamella, plan, batch):
    assert "batch" in lamella("bench", NANO_LLAMA, plan, "--batch", batch).refused()


@pytest.mark.parametrize("form", ["plane", "auto "])
def test_an_unknown_form_is_answered_with_the_known(lamella, plan, tmp_path, form):
    line = lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "out", "--form", form).refused()
    assert "auto, plain, portable, native" in line


@pytest.mark.parametrize("more", [["--form", "plain"], ["--out-of-core"], ["--out-of-core", "--form", "native"]])
def test_a_form_that_cannot_say_the_plan_is_refused(lamella, sublayer_plan, tmp_path, more):
    lamella("apply", sublayer_plan, NANO_LLAMA, "-o", tmp_path / "out", *more).refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--kind", "q4", "-o", "out"], "choose one of q8_0, int8"),
        (["-o", "there"], "there exists"),
    ],
)
def test_what_cannot_be_quantised_so_is_refused(lamella, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("a model")
    assert said in lamella("quantize", NANO_LLAMA, *given).refused()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"there": "a model"}


def test_a_compression_that_cannot_be_quantised_is_refused_before_any_work(lamella, tmp_path):
    for given, said in ((["q4"], "choose one of q8_0"), (["q8_0", "--form", "native"], "native checkpoints cannot be")):
        assert said in lamella("compress", NANO_LLAMA, "-o", tmp_path / "out", "--quantize-kind", *given).refused()
    assert not list(tmp_path.iterdir())


def test_an_unknown_reproduction_is_refused(lamella, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "reproductions/" in lamella("reproduce", "finercut").refused()


# Targets.


def highest(line: str) -> float:
    *_, number = re.findall(r"\d+\.\d\d", line)
    return float(number)


def test_a_plan_that_cannot_reach_the_speedup_says_the_highest_that_can_be(lamella, tmp_path):
    arguments = ["plan", "shortgpt", NANO_LLAMA, *SHORT, "--speedup", "50", "-o", tmp_path / "out"]
    assert 1 < highest(lamella(*arguments).refused()) < 50
    assert not (tmp_path / "out").exists()


def test_a_compression_that_cannot_reach_the_speedup_says_the_highest_that_can_be(lamella, tmp_path):
    arguments = ["compress", NANO_LLAMA, "--allow", "cut", "--speedup", "50", "-o", tmp_path / "out"]
    assert highest(lamella(*arguments).refused()) == pytest.approx(38 / (8 + 2))  # the last MLP stays
    assert list(tmp_path.iterdir()) == []


def test_an_alpha_out_of_its_range_is_refused(lamella):
    line = lamella("plan", "void", NANO_LLAMA, "--alpha", "7", *SHORT).refused()
    assert "alpha 7.0: give a number >= 0 and <= 1" in line


def test_a_name_that_is_given_twice_is_refused(lamella, tmp_path):
    texts = ("--languages", "swh=one.txt", "--languages", "swh=two.txt")
    line = lamella("run", "layra", NANO_LLAMA, *texts, "-o", tmp_path / "out").refused()
    assert "--languages swh=two.txt: 'swh' is given twice" in line


# Texts.


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "finercut", NANO_LLAMA, "--calibration", "TEXT"],
        ["eval", NANO_LLAMA, NANO_LLAMA, "--test", "TEXT"],
        ["inspect", NANO_LLAMA, "--calibration", "TEXT"],
        ["compress", NANO_LLAMA, "--calibration", "TEXT", "-o", "out"],
    ],
    ids=lambda command: command[0],
)
def test_too_little_text_is_refused(lamella, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "short.txt"
    text.write_text("Only a few words.\n\nAnd a few more.")
    line = lamella(*[text if word == "TEXT" else word for word in command]).refused()
    assert "too little text" in line and str(text) in line
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("option", ["--sequences", "--length"])
def test_no_text_at_all_is_refused(lamella, option):
    lamella("plan", "finercut", NANO_LLAMA, option, "0").refused()


@pytest.mark.parametrize("text", ["gsm8k", "humaneval"])
def test_test_sets_are_not_for_calibration(lamella, text):
    assert "not for calibration" in lamella("plan", "finercut", NANO_LLAMA, "--calibration", text).refused()
    line = lamella("compress", NANO_LLAMA, "--calibration", text, "-o", "out").refused()
    assert "not for calibration" in line


def test_a_text_file_that_is_not_there_is_refused(lamella):
    assert "no file missing.txt" in lamella("plan", "finercut", NANO_LLAMA, "--calibration", "missing.txt").refused()


# The disk and what is on it.


def test_no_space_is_noticed_before_anything_is_written(lamella, plan, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 20))
    for more in ([], ["--out-of-core"]):
        line = lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "out", *more).refused()
        assert "needs" in line and "free" in line
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("command", ["apply", "out of core", "compress"])
def test_an_existing_output_is_left_as_it_is(lamella, plan, model, tmp_path, command):
    before = contents(model)
    arguments: dict[str, list[Any]] = {
        "apply": ["apply", plan, NANO_LLAMA, "-o", model],
        "out of core": ["apply", plan, NANO_LLAMA, "-o", model, "--out-of-core"],
        "compress": ["compress", NANO_LLAMA, "-o", model],
    }
    line = lamella(*arguments[command]).refused()
    assert str(model) in line and "--overwrite" in line
    assert contents(model) == before


def test_a_folder_that_is_no_model_is_not_overwritten(lamella, plan, tmp_path):
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "a.txt").write_text("dear")
    lamella("apply", plan, NANO_LLAMA, "-o", letters, "--overwrite").refused()
    assert contents(letters) == {"a.txt": b"dear"}


def test_the_model_is_not_overwritten_by_its_own_export(lamella, plan, model):
    before = contents(model)
    lamella("apply", plan, model, "-o", model, "--overwrite").refused()
    assert contents(model) == before


def test_a_failing_overwrite_leaves_the_older_version(lamella, plan, model, tmp_path, monkeypatch):
    old = tmp_path / "out"
    assert lamella("apply", plan, NANO_LLAMA, "-o", old).code == 0
    before = contents(old)
    truncate(model)
    lamella("apply", plan, model, "-o", old, "--overwrite").refused()
    assert contents(old) == before


@pytest.mark.parametrize("command", [["plan", "random", NANO_LLAMA], ["inspect", NANO_LLAMA, "--sequences", "1"]])
def test_an_output_that_cannot_be_written_is_refused(lamella, tmp_path, command):
    (tmp_path / "file").write_text("in the way")
    assert "file" in lamella(*command, "-o", tmp_path / "file" / "out").refused()


# The network.


def test_a_hub_model_without_network_is_refused(lamella):
    line = lamella("plan", "random", "lamella-tests/no-such-model").refused()
    assert "'lamella-tests/no-such-model'" in line and "network" in line


def test_a_folder_that_is_mistyped_is_answered_with_the_one_beside_it(lamella, model, tmp_path):
    for path in (tmp_path / "modle", f"{tmp_path}/modle/"):
        line = lamella("plan", "random", path).refused()
        assert f"did you mean {model}" in line and "hub" not in line and "network" not in line


@pytest.mark.parametrize("name", ["/no/such/place", "./here", "../there", "~/nowhere", "a/b/c", "some folder"])
def test_a_path_that_is_not_there_does_not_blame_the_hub(lamella, name):
    line = lamella("plan", "random", name).refused()
    assert f"no folder {name}" in line and "hub" not in line


def test_a_gguf_file_says_how_to_convert_it(lamella, tmp_path):
    file = tmp_path / "model.Q4_1.gguf"
    assert "no file" in lamella("plan", "random", file).refused()
    file.write_bytes(b"GGUF")
    line = lamella("plan", "random", file).refused()
    assert "convert_gguf" in line and "hub" not in line


def test_a_file_is_no_model(lamella, model):
    assert "is a file" in lamella("plan", "random", model / "model.safetensors").refused()


def test_a_zoo_model_without_network_is_refused(lamella, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    outcome = lamella("pull", "smollm2")
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.code == 2 and line.startswith("lamella: cannot pull 'smollm2'") and "LAMELLA_CACHE" in line
    assert "Traceback" not in outcome.err
    assert [file for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")] == []


def test_an_unknown_zoo_name_is_answered_with_the_nearest(lamella):
    assert "smollm2" in lamella("pull", "smollm3").refused()


# The frame around all of them.


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "lamella.cli", "--debug", "apply", "no.json", str(NANO_LLAMA), "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" in done.stderr and "PlanError" in done.stderr


@pytest.mark.slow
def test_an_error_in_a_process_of_its_own_is_one_line_too(tmp_path):
    command = [sys.executable, "-m", "lamella.cli", "apply", "no.json", str(NANO_LLAMA), "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("lamella: no.json")


def test_brackets_in_a_name_are_printed_as_they_are(lamella, tmp_path):
    assert "[bold]x[/bold].json" in lamella("apply", "[bold]x[/bold].json", NANO_LLAMA, "-o", tmp_path / "o").refused()
