"""The single steps on the nano Llama: what each prints, and what it leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer

import lamella as api
from lamella.cli.app import app
from lamella.cli.console import parsed
from lamella.cli.run import unwrapped
from lamella.commands.trace.tracing import trace_answer as trace
from lamella.errors import MethodError
from lamella.plan import ModelReference, Plan, PlanSeries, PolicyReference
from lamella.registry import get_method, methods
from lamella.zoo import NANO_ASSEMBLIES, chat_inputs, nano, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
SHORT = ("--sequences", "2", "--length", "48")
BRIEF = ("--sequences", "2", "--length", "48", "--json")
QUICK = ("--batch", "1", "--prompt", "8", "--tokens", "4", "--rounds", "3")
COMMANDS = {
    *("apply", "bench", "chat", "cola", "compare", "compress", "diff", "draft", "eval", "forget", "heal"),
    *("inspect", "methods", "overview", "plan", "pull", "quantize", "repair", "reproduce", "restore", "serve", "trace"),
    "vocab",
}
IDS = torch.arange(3, 35)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def succeeded(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


# Help.


def test_the_commands_are_those_of_the_manual(lamella):
    helped = succeeded(lamella("--help"))
    group = typer.main.get_command(app)
    context = group.make_context("lamella", ["--help"], resilient_parsing=True)
    assert set(group.list_commands(context)) == COMMANDS | {"run"}
    assert all(command in helped for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS - {"plan"}))
def test_help_says_what_a_command_does(lamella, command):
    helped = succeeded(lamella(command, "--help"))
    assert f"lamella {command}" in helped and "--json" in helped
    assert len(helped.splitlines()) > 10


def test_help_keeps_the_letters_of_what_is_typed_and_sends_nobody_to_the_source(lamella):
    helped = " ".join(succeeded(lamella("run", "finercut", "--help")).replace("│", " ").split())
    assert "jsd, jsd_repo" in helped and "pydoc, stdlib" in helped and "Pydoc" not in helped
    for slug in methods():
        assert " See " not in succeeded(lamella("run", slug, "--help")), slug


def test_a_paragraph_of_help_is_one_line_and_its_commands_are_lines_of_their_own():
    text = """What it
    does.

    More, in
    lines. Example: lamella eval a
    lamella eval b
    """
    assert unwrapped(text) == "What it does.\n\nMore, in lines. Example:\nlamella eval a\nlamella eval b"


def test_the_version_is_that_of_the_package(lamella):
    assert succeeded(lamella("--version")) == f"lamella {api.__version__}\n"


def test_a_wrong_option_exits_with_2(lamella):
    assert lamella("plan", "--sideways").code == 2


# Looking.


def test_methods_lists_the_registry(lamella):
    listed = json.loads(succeeded(lamella("methods", "--json")))
    assert [row["slug"] for row in listed] == list(methods())
    assert all(slug in succeeded(lamella("methods")) for slug in ("finercut", "shortgpt"))


def test_methods_shows_the_options_of_one_with_their_defaults(lamella):
    shown = json.loads(succeeded(lamella("methods", "finercut", "--json")))
    assert (shown["options"]["distance"], shown["options"]["exclude_front"]) == ("jsd", 0.4)
    assert "exclude_front" in succeeded(lamella("methods", "finercut"))


def test_pull_without_a_name_shows_the_zoo(lamella):
    listed = json.loads(succeeded(lamella("pull", "--json")))["findings"]["zoo"]
    assert {"smollm2": "model", "gsm8k": "text"}.items() <= {row["name"]: row["kind"] for row in listed}.items()
    assert "smollm2" in succeeded(lamella("pull"))


def test_inspect_reports_every_layer(lamella, tmp_path):
    report = json.loads(
        succeeded(lamella("inspect", NANO_LLAMA, "--sequences", "1", "--json", "-o", tmp_path / "depth"))
    )
    assert report["model"]["layers"] == 6
    assert len(report["findings"]["scores"]["block_influence"]["values"]) == 6
    assert len(report["findings"]["scores"]["sublayer_removed"]["values"]) == 12
    assert json.loads((tmp_path / "depth" / "evidence.json").read_text()) == report
    assert 'src="http' not in (tmp_path / "depth" / "report.html").read_text()


# Planning.


PLANNING = sorted(
    slug
    for slug, entry in methods().items()
    if entry.result == "PlanSeries" and not entry.dense and not entry.slow and entry.on != "experts"
)


@pytest.mark.parametrize("slug", PLANNING)
def test_every_planning_method_makes_a_plan(lamella, tmp_path, slug):
    reads = SHORT if get_method(slug).text else ()
    printed = succeeded(lamella("plan", slug, NANO_LLAMA, *reads, "--share", "0.34", "-o", tmp_path / "out", "--json"))
    plan, series = Plan.read(tmp_path / "out" / "plan.json"), PlanSeries.read(tmp_path / "out")
    assert plan == series[json.loads(printed)["chosen"]]
    assert 0 < plan.removed <= 0.34 * 12


def test_a_model_with_experts_is_planned_by_skipping_some(lamella, tmp_path):
    folder, plan = tmp_path / "moe", tmp_path / "planned"
    nano("qwen3_moe", vocab_size=512).save_pretrained(folder)
    for file in NANO_LLAMA.glob("tokenizer*"):
        shutil.copy(file, folder)
    succeeded(lamella("plan", "modes", folder, *SHORT, "--points", "6", "--share", "0.34", "-o", plan))
    assert Plan.read(plan / "plan.json").removed > 0


def test_a_search_that_takes_long_by_default_is_cut_short_by_its_options(lamella, tmp_path):
    brief = {"params": "0.8", "population": "4", "elites": "2", "iterations": "2", "rank": "2", "attn": "0.5,1"}
    settings = [part for name, value in brief.items() for part in (f"--{name}", value)]
    succeeded(lamella("plan", "tracenas", NANO_LLAMA, *SHORT, *settings, "-o", tmp_path / "out"))
    whole, smaller = PlanSeries.read(tmp_path / "out")
    assert whole.removed == 0 < smaller.removed


def test_a_plan_of_masks_comes_with_its_file_and_exports_as_an_ordinary_checkpoint(lamella, tmp_path):
    settings, folder = ["--sparsity", "0.5", "--grid", "4"], tmp_path / "planned"
    said = succeeded(lamella("plan", "rd-prune", NANO_LLAMA, *SHORT, *settings, "-o", folder))
    plan = Plan.read(folder / "plan.json")
    assert "weights masked" in said and (folder / plan.weights[0].file).is_file()
    said = succeeded(lamella("apply", folder / "plan.json", NANO_LLAMA, "-o", tmp_path / "out"))
    assert f"{plan.masked:,} weights masked" in said
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    zeros = sum(int((weight == 0).sum()) for weight in exported.parameters())
    assert zeros == plan.masked and (tmp_path / "out" / plan.weights[0].file).is_file()
    assert torch.equal(logits(exported), logits(api.apply(api.open(NANO_LLAMA), plan)))


@pytest.mark.parametrize("pick", [("--share", "0.2"), ("--speedup", "1.2")])
def test_masks_are_not_chosen_by_what_they_do_not_bring(lamella, pick):
    said = lamella("plan", "rd-prune", NANO_LLAMA, *SHORT, "--grid", "2", *pick).refused()
    assert "no sublayers" in said or "1.00 is the highest" in said


def test_a_speedup_picks_the_smallest_cut_that_reaches_it(lamella, tmp_path, step_times):
    arguments = ["plan", "shortgpt", NANO_LLAMA, *SHORT, "--speedup", "1.2"]
    assert "plan 2 is chosen" in succeeded(lamella(*arguments, "-o", tmp_path / "out"))
    series, chosen = PlanSeries.read(tmp_path / "out"), Plan.read(tmp_path / "out" / "plan.json")
    predicted = [step_times.speedup(plan) for plan in series]
    assert predicted[:3] == pytest.approx([1, 38 / 33, 38 / 28])
    assert chosen == series[2] and len(chosen.drop) == 2


def test_a_folder_with_a_plan_stands_for_it(lamella, tmp_path):
    succeeded(lamella("plan", "shortgpt", NANO_LLAMA, *SHORT, "--share", "0.34", "-o", tmp_path / "cut"))
    told = []
    for name in (tmp_path / "cut", tmp_path / "cut" / "plan.json"):
        results = json.loads(succeeded(lamella("eval", NANO_LLAMA, name, *BRIEF)))["findings"]["results"]
        asked = ("chat", NANO_LLAMA, "--plan", name, "--prompt", "The first", "--tokens", "4", "--json")
        told.append((results[str(name)], json.loads(succeeded(lamella(*asked)))["messages"]))
    assert told[0] == told[1] and told[0][0]["kl"]["mean"] > 0


def test_plan_is_run_for_planners(lamella, tmp_path):
    for verb in ("plan", "run"):
        succeeded(lamella(verb, "shortgpt", NANO_LLAMA, *SHORT, "--share", "0.34", "-o", tmp_path / verb))
    assert Plan.read(tmp_path / "plan" / "plan.json") == Plan.read(tmp_path / "run" / "plan.json")
    assert "shortgpt" in succeeded(lamella("plan", "--help")) and "layra" not in succeeded(lamella("plan", "--help"))


def test_a_warning_of_a_method_is_shown_once_as_a_note(lamella):
    done = lamella("run", "minitron", NANO_LLAMA, "--params", "0.3", *SHORT)
    assert (succeeded(done) + done.err).count("more than half at once is hard to heal") == 1
    assert "note: minitron: " in done.out


@pytest.mark.slow
def test_notes_of_a_comparison_are_shown_once(lamella, tmp_path):
    given = ("--new", "stdlib", "--method", "lora", "--steps", "4", "--batch", "2", "--length", "32")
    done = lamella("compare", NANO_LLAMA, *given, "-o", tmp_path / "out")
    texts = [succeeded(done), *((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))]
    assert [text.count("lora learns most and forgets least.") for text in texts] == [1, 1, 1]


def test_options_of_a_method_are_read_by_their_types(lamella, tmp_path):
    options = {"level": "attn", "exclude-front": "0", "strategy": "one_shot", "share": "0.17"}
    settings = [part for name, value in options.items() for part in (f"--{name}", value)]
    succeeded(lamella("plan", "finercut", NANO_LLAMA, *SHORT, *settings, "--largest", "-o", tmp_path / "out"))
    plan = Plan.read(tmp_path / "out" / "plan.json")
    assert len(plan.drop) == 2 and all(site.endswith(".attn") for site in plan.drop)


# Carrying out.


def test_pairs_of_shares_and_of_counts_are_read_by_their_types():
    def read(slug, name, text):
        return parsed(slug, get_method(slug).options[name], text, text)

    assert (read("tracenas", "attn", "0.5,1"), read("tracenas", "multiple", "8")) == ((0.5, 1.0), 8)
    assert read("ffn-skip", "cold", "2,3") == (2, 3)
    with pytest.raises(MethodError, match="numbers separated by commas"):
        read("ffn-skip", "cold", "2.5,3")


@pytest.mark.parametrize("more", [["--form", "plain"], ["--form", "plain", "--out-of-core"], []])
def test_a_plain_export_computes_in_transformers_what_the_plan_does(lamella, plan, tmp_path, more):
    out = tmp_path / "out"
    said = json.loads(succeeded(lamella("apply", plan, NANO_LLAMA, "-o", out, *more, "--json")))
    assert (said["findings"]["form"], said["findings"]["sublayers_removed"]) == ("plain", 4)
    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    view = api.apply(api.open(NANO_LLAMA), Plan.read(plan))
    assert exported.config.num_hidden_layers == 4
    assert torch.equal(logits(exported), logits(view))
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, NANO_LLAMA)]
    assert tokenizers[0]("A few words").input_ids == tokenizers[1]("A few words").input_ids


@pytest.mark.parametrize(("more", "form"), [(["--form", "portable"], "portable"), ([], "native")])
def test_sublayer_plans_are_exported_portable_or_native(lamella, sublayer_plan, tmp_path, more, form):
    out = tmp_path / "out"
    said = json.loads(succeeded(lamella("apply", sublayer_plan, NANO_LLAMA, "-o", out, *more, "--json")))
    assert said["findings"]["form"] == form
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=form == "native")
    view = api.apply(api.open(NANO_LLAMA), Plan.read(sublayer_plan))
    assert torch.allclose(logits(exported), logits(view), atol=1e-5)


def test_a_plan_for_generated_tokens_is_exported_with_a_word_on_what_runs_it(lamella, tmp_path):
    succeeded(lamella("plan", "unified-skip", NANO_LLAMA, "-o", tmp_path / "planned"))
    said = " ".join(
        succeeded(
            lamella("apply", tmp_path / "planned", NANO_LLAMA, "-o", tmp_path / "out", "--form", "native")
        ).split()
    )
    assert "lamella.load" in said and "plain transformers runs the whole model" in said and "removed" not in said


def test_overwrite_replaces_an_earlier_export(lamella, plan, sublayer_plan, tmp_path):
    succeeded(lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "out"))
    succeeded(lamella("apply", sublayer_plan, NANO_LLAMA, "-o", tmp_path / "out", "--form", "portable", "--overwrite"))
    assert Plan.read(tmp_path / "out" / "plan.json") == Plan.read(sublayer_plan)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "plan.json", "sublayers.json"]


# Measuring and talking.


def test_eval_says_which_part_of_a_file_it_uses(lamella, plan, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"Paragraph {n} says that {n} and one are {n + 1}, as it should." for n in range(200)))
    command = ["eval", NANO_LLAMA, plan, "--test", text, *SHORT]
    assert "last fifth" in succeeded(lamella(*command)) and "last fifth" not in succeeded(lamella(*command, "--whole"))
    data = [json.loads(succeeded(lamella(*command, *more, "--json")))["data"]["test"] for more in ([], ["--whole"])]
    assert [each["split"] for each in data] == ["test", "whole"] and data[0]["cut"] == "the last fifth"
    assert "splits calibration and test" in lamella("eval", NANO_LLAMA, plan, "--whole", *SHORT).refused()


def test_eval_of_prompts_stops_when_the_agreement_is_certain_and_exits_with_the_verdict(lamella, plan, tmp_path):
    rows = [{"prompt": f"What is {n} and one?", "response": f"It is {n + 1}, as it should be."} for n in range(150)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", NANO_LLAMA, "--test", file, "--whole", "--json"]
    found = {}
    for share, changed, code in ((0.5, NANO_LLAMA, 0), (0.99, plan, 1), (0.999, NANO_LLAMA, 1)):
        done = lamella(*command, changed, "--at-least", share)
        assert done.code == code, done.err
        (found[share],) = json.loads(done.out)["findings"]["results"].values()
    verdicts = ["holds", "does not hold", "undecided"]
    assert [each["verdict"] for each in found.values()] == verdicts
    assert found[0.5]["sequences"] < 20 and found[0.99]["sequences"] < 150 and found[0.999]["sequences"] == 150
    for each in found.values():
        lower, _, upper = zip(*each["course"], strict=True)
        assert list(lower) == sorted(lower) and list(upper) == sorted(upper, reverse=True)
        assert (each["agreement"]["lower"], each["agreement"]["upper"]) == (lower[-1], upper[-1])
    text = lamella(*command[:-1], NANO_LLAMA, "--at-least", 0.999, "-o", tmp_path / "out").out
    assert "undecided after all 150 sequences" in " ".join(text.split())
    assert "evaluated sequences" in (tmp_path / "out" / "report.html").read_text()
    assert "leave one of them out" in lamella(*command, "--tasks", "definitions", "--at-least", 0.5).refused()


def test_eval_finds_a_plan_and_its_export_equally_far_and_the_original_not_at_all(lamella, plan, tmp_path):
    succeeded(lamella("apply", plan, NANO_LLAMA, "-o", tmp_path / "out"))
    arguments = ["eval", NANO_LLAMA, plan, tmp_path / "out", NANO_LLAMA, *SHORT]
    results = json.loads(succeeded(lamella(*arguments, "--json")))["findings"]["results"]
    of_plan, of_export, of_original = results.values()
    assert of_plan["kl"] == pytest.approx(of_export["kl"], abs=1e-6)
    assert of_plan["kl"]["mean"] > 0.001 and of_plan["positions"] == 2 * 36
    assert (of_original["kl"]["mean"], of_original["top1"]["mean"]) == (pytest.approx(0, abs=1e-7), 1)
    assert "perplexity" in succeeded(lamella(*arguments))


def test_eval_scores_a_native_export_as_its_plan(lamella, sublayer_plan, tmp_path):
    succeeded(lamella("apply", sublayer_plan, NANO_LLAMA, "-o", tmp_path / "out"))
    results = json.loads(succeeded(lamella("eval", NANO_LLAMA, sublayer_plan, tmp_path / "out", *SHORT, "--json")))
    of_plan, of_export = results["findings"]["results"].values()
    assert of_plan["kl"]["mean"] == pytest.approx(of_export["kl"]["mean"], abs=1e-6)


def test_bench_compares_with_the_first_model(lamella, plan):
    document = json.loads(succeeded(lamella("bench", NANO_LLAMA, plan, *QUICK, "--json")))["findings"]
    base, changed = (document["timings"][name][0] for name in ("nano-llama", str(plan)))
    assert base["decode_speedup"]["median"] == 1
    ratio = changed["decode_speedup"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert document["predicted_speedup"][str(plan)] == pytest.approx(38 / 28)
    assert document["cost"][str(plan)]["sublayers"] == 8
    assert "predicted" in succeeded(lamella("bench", NANO_LLAMA, plan, *QUICK))


def test_bench_shows_what_a_draft_gains_on_each_kind_of_prompt(lamella, plan):
    document = json.loads(succeeded(lamella("bench", NANO_LLAMA, plan, *QUICK, "--draft", "lookup", "--json")))
    found = document["findings"]["draft"]
    assert list(found) == ["nano-llama", str(plan)]
    for kinds in found.values():
        assert {"chat", "rewriting"} <= set(kinds)
        for gain in (each for rows in kinds.values() for each in rows):
            assert 0 <= gain["accepted"] <= 1 <= gain["per_pass"] and gain["drafting"] == 0
            assert gain["predicted"] == pytest.approx(gain["per_pass"] / gain["verifying"])
            assert gain["equal"] or gain["tied"]
    assert "Decoding with draft" in succeeded(lamella("bench", NANO_LLAMA, *QUICK, "--draft", NANO_LLAMA))


@pytest.mark.parametrize("draft", ["lookup", NANO_LLAMA])
def test_chat_says_the_same_with_a_draft_and_what_it_gained(lamella, draft):
    arguments = ["chat", NANO_LLAMA, "--prompt", "The first of the first of the first", "--tokens", "24"]
    plain = json.loads(succeeded(lamella(*arguments, "--json")))
    drafted = lamella(*arguments, "--draft", draft, "--json")
    assert json.loads(succeeded(drafted)) == plain
    assert "Draft" in drafted.err and "proposed token" in drafted.err


def test_a_draft_with_other_tokens_and_one_without_tasks_are_refused(lamella, plan):
    for arguments, said in (
        (["eval", NANO_LLAMA, plan, "--draft", "lookup"], "give tasks"),
        (["chat", NANO_LLAMA, "--prompt", "a", "--draft", "smollm2"], "has other tokens than the model"),
    ):
        outcome = lamella(*arguments)
        assert outcome.code == 2 and said in " ".join(outcome.err.split())


@pytest.mark.parametrize("with_plan", [False, True])
def test_chat_answers_a_prompt(lamella, plan, with_plan):
    more = ["--plan", plan] if with_plan else []
    arguments = ["chat", NANO_LLAMA, *more, "--prompt", "The first", "--tokens", "8"]
    messages = json.loads(succeeded(lamella(*arguments, "--json")))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    answer = messages[1]["content"]
    assert answer in " ".join(succeeded(lamella(*arguments)).splitlines()) or "\n" in answer


def test_chat_talks_to_an_export(lamella, sublayer_plan, tmp_path):
    succeeded(lamella("apply", sublayer_plan, NANO_LLAMA, "-o", tmp_path / "out"))
    arguments = ["--prompt", "The first", "--tokens", "8", "--json"]
    exported = json.loads(succeeded(lamella("chat", tmp_path / "out", *arguments)))
    viewed = json.loads(succeeded(lamella("chat", NANO_LLAMA, "--plan", sublayer_plan, *arguments)))
    assert exported["messages"] == viewed["messages"]


def test_reproduce_runs_the_script_and_passes_its_verdict_on(tmp_path):
    (tmp_path / "reproductions" / "results").mkdir(parents=True)
    (tmp_path / "reproductions" / "some_method.py").write_text(
        "import pathlib, sys\n"
        "pathlib.Path('reproductions/results/some-method-quick.json').write_text('{\"verdict\": \"does not hold\"}')\n"
        "sys.exit(1 if sys.argv[1:] == ['--quick', '--fresh'] else 3)\n"
    )
    command = [sys.executable, "-m", "lamella.cli", "reproduce", "some-method", "--quick", "--fresh", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"] == {"verdict": "does not hold", "code": 1}


# Tasks.


def test_eval_scores_the_original_and_what_changed_on_tasks(lamella, plan):
    asked = ("--tasks", "definitions", "--limit", 6)
    said = json.loads(succeeded(lamella("eval", NANO_LLAMA, plan, *asked, "--json")))["findings"]
    original, changed = said["scores"].values()
    assert list(said["scores"]) == ["nano-llama", str(plan)] and said["limit"] == 6
    assert original[0]["questions"] == changed[0]["questions"] == 6 and "error" in original[0]
    assert changed[0]["difference"]["mean"] == pytest.approx(changed[0]["mean"] - original[0]["mean"])
    assert original[0]["difference"] == {"mean": 0.0, "error": 0.0}
    shown = succeeded(lamella("eval", NANO_LLAMA, "--tasks", "definitions", "--limit", 3))
    assert "definitions, acc" in shown and "3 questions of definitions" in shown


def test_eval_refuses_tasks_that_are_unknown_or_run_code_before_it_opens_a_model(lamella):
    assert "--run-generated-code" in lamella("eval", "no-such-model", "--tasks", "humaneval").refused()
    assert "no task file" in lamella("eval", "no-such-model", "--tasks", "definitions,mine.yaml").refused()
    assert "nothing to compare" in lamella("eval", "no-such-model").refused()


def test_eval_takes_a_model_with_several_stacks(lamella, tmp_path):
    folder, file = tmp_path / "llava", tmp_path / "plan.json"
    texts = NANO_ASSEMBLIES["llava"][1]["text_config"] | {"vocab_size": 512}
    nano("llava", text_config=texts, image_token_id=511).save_pretrained(folder)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_LLAMA / each, folder)
    Plan(model=ModelReference.of(api.open(folder)), drop=["text.layers.1"]).write(file)
    said = json.loads(succeeded(lamella("eval", folder, file, *SHORT, "--json")))["findings"]
    assert said["results"][str(file)]["kl"]["mean"] > 1e-6
    said = json.loads(succeeded(lamella("eval", folder, file, "--tasks", "definitions", "--limit", 4, "--json")))[
        "findings"
    ]
    assert [found[0]["questions"] for found in said["scores"].values()] == [4, 4]


def test_a_trace_of_a_plan_takes_a_folder_that_brings_it(lamella, tmp_path: Path) -> None:
    made = tmp_path / "made"
    brief = ("--sequences", 4, "--length", 32, "--layers", 1, "--steps", 1, "--probes", 2)
    succeeded(lamella("run", "gamma-mod", NANO_LLAMA, *brief, "-o", made))
    asked = ("--prompt", "a word", "--tokens", 2)
    shown = succeeded(lamella("trace", made, "--plan", made / "plan.json", *asked))
    assert "% of sublayers" in shown and shown == succeeded(lamella("trace", made, *asked))


@pytest.fixture
def dropping(tmp_path: Path) -> tuple[Path, Path]:
    """A plan that decides while the model runs, and the folder that is written with it."""
    stack = api.open(NANO_LLAMA, device="cpu")
    policy = PolicyReference(name="lora-drop", params={"droppable": [1, 2, 3, 4], "refresh_every": 2})
    plan = Plan(model=ModelReference.of(stack), policies={"text": policy})
    plan.write(tmp_path / "dropping.json")
    return tmp_path / "dropping.json", api.export(stack, plan, tmp_path / "dropping", form="native")


def test_a_trace_of_a_folder_shows_the_plan_in_it(lamella, dropping) -> None:
    plan, folder = dropping
    asked = ("--prompt", "a word", "--tokens", 6, "--json")
    of_folder, of_plan, whole = (
        json.loads(succeeded(lamella("trace", *given, *asked)))["findings"]
        for given in ((folder,), (NANO_LLAMA, "--plan", plan), (NANO_LLAMA,))
    )
    assert of_folder.pop("model") == {"name": "dropping", "layers": 6} and of_plan.pop("model")
    assert of_folder == of_plan and of_folder["policy"] == "lora-drop"
    ran = [
        sum(row)
        for row, token in zip(of_folder["attn"], of_folder["tokens"], strict=True)
        if "answer" in token["phase"]
    ]
    assert ran == [2, 6, 2, 6, 2] and of_folder["attn"] != whole["attn"]
    shown = succeeded(lamella("trace", folder, *asked[:-1]))
    assert "█····█" in shown


def test_a_view_is_traced_as_it_runs(dropping) -> None:
    _, folder = dropping
    view = api.load(folder, device="cpu")
    tokenizer = open_tokenizer(NANO_LLAMA)
    inputs = chat_inputs(tokenizer, [{"role": "user", "content": "a word"}], view.device)
    first, again = (trace(view, tokenizer, inputs, tokens=6) for _ in range(2))
    assert first == again and first["policy"] == "lora-drop" and first["usage"]["answer"] < 1


def test_every_command_opens_a_folder_with_the_plan_in_it(lamella, dropping, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder = dropping
    of_plan = json.loads(succeeded(lamella("eval", NANO_LLAMA, plan, *SHORT, "--json")))["findings"]["results"][
        str(plan)
    ]
    of_folder = json.loads(succeeded(lamella("eval", folder, plan, *SHORT, "--json")))["findings"]["results"][str(plan)]
    assert of_plan["kl"]["mean"] > 1e-6 and of_folder["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert of_folder["base_perplexity"] == of_folder["perplexity"] == of_plan["perplexity"]

    tasks = ("--tasks", "definitions", "--limit", 8, "--json")
    scores = json.loads(succeeded(lamella("eval", folder, plan, *tasks)))["findings"]["scores"]
    assert [each["difference"]["mean"] for each in scores[str(plan)]] == [0] * len(scores[folder.name])

    talk = ("--prompt", "The first", "--tokens", 8, "--json")
    for given, like in (((folder,), plan), ((folder, "--plan", plan), plan)):
        said = json.loads(succeeded(lamella("chat", *given, *talk)))["messages"]
        assert said == json.loads(succeeded(lamella("chat", NANO_LLAMA, "--plan", like, *talk)))["messages"]

    timed = {}
    monkeypatch.setattr(
        "lamella.commands.bench.timed", lambda models, *_: timed.update(models) or dict.fromkeys(models, ())
    )
    found = json.loads(succeeded(lamella("bench", folder, plan, NANO_LLAMA, *QUICK, "--json")))["findings"]
    assert timed[folder.name].lamella_plan.digest == timed[str(plan)].lamella_plan.digest
    assert not hasattr(timed[str(NANO_LLAMA)], "lamella_plan")
    assert found["predicted_speedup"] == {str(plan): pytest.approx(1)}


@pytest.mark.exhaustive
def test_a_model_that_predicts_masked_tokens_goes_from_study_to_smaller_checkpoint(lamella, tmp_path: Path) -> None:
    whole, plan, small = tmp_path / "whole", tmp_path / "planned", tmp_path / "small"
    nano("llada", vocab_size=512, n_layers=6, max_sequence_length=512).save_pretrained(whole)
    for file in NANO_LLAMA.glob("tokenizer*"):
        shutil.copy(file, whole)
    brief = ("--sequences", "2", "--length", "48")
    assert lamella("run", "dllm-skip", "study", whole, *brief, "-o", tmp_path / "study").code == 0
    assert lamella("plan", "dllm-skip", whole, "--theta", "-1", "--k", "2", "-o", plan).code == 0
    assert "4 sublayers removed" in lamella("apply", plan, whole, "-o", small).out
    assert lamella("eval", whole, plan / "plan.json", small, *brief).code == 0
    timed = ("--batch", "1", "--prompt", "8", "--tokens", "2", "--rounds", "1")
    assert lamella("bench", whole, plan / "plan.json", *timed).code == 0
    out = tmp_path / "compressed"
    asked = ("compress", whole, "--speedup", "1.1", "--method", "dllm-skip", "--dllm-skip.theta", "-1")
    assert "predicts masked tokens" in lamella(*asked, "-o", out).refused()
    assert lamella(*asked, "--no-heal", "-o", out).code == 0 and (out / "report.html").is_file()
    for verb in ("chat", "trace"):
        assert "predicts masked tokens" in lamella(verb, whole, "--prompt", "a word").refused()
