"""The harness of reproductions: what is finished stays finished, and the table is that of a run in one go."""

import ast
import inspect
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import lamella
from lamella.evaluate import Ratio
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.registry import get_method, methods
from lamella.results.record import Kind
from lamella.runner import argument_names
from lamella.stack import Stack

ROOT = Path(__file__).parents[2]
REPRODUCTIONS = ROOT / "reproductions"
SCRIPTS = sorted(REPRODUCTIONS.glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
EXAMPLE = '''
"""An example of an experiment."""

import os
import random
import signal
from pathlib import Path

import torch
from harness import Run, main

HERE = Path(__file__).parent
LIMIT = 2.0


def drawn(name: str) -> dict:
    with (HERE / "ran.txt").open("a") as file:
        file.write(name + "\\n")
    if name == "second" and (HERE / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return {"torch": float(torch.rand(())), "python": random.random(), "points": [(1, float("nan"))]}


def judged(run: Run, limit: float) -> None:
    both = [run.arm(name, lambda name=name: drawn(name))["torch"] for name in ("first", "second")]
    run.table("Draws", ["first", "second"], [both])
    run.main("their sum", f"below {limit}", sum(both), sum(both) < limit)
    run.further("their order", "either", both, None)


def experiment(run: Run) -> None:
    run.data = "random numbers"
    run.part("opening", lambda run: run.table("Opening", ["draw"], [[drawn("opening")["python"]]]))
    run.table("Behind a part", ["draw", "journal"], [[random.random(), run.work.name]])
    run.part("judged", judged, LIMIT)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="nothing", other="something"))
'''


class Example:
    """A script in a folder of its own, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.script = folder, folder / "some_method.py"
        folder.mkdir()
        self.script.write_text(EXAMPLE)

    def change(self, before: str, after: str) -> None:
        text = self.script.read_text()
        assert before in text
        self.script.write_text(text.replace(before, after))

    @property
    def ran(self) -> list[str]:
        """The arms that have begun since somebody asked."""
        file = self.folder / "ran.txt"
        lines = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def results(self, name: str = "some-method") -> str:
        """The results file without its date."""
        document = json.loads((self.folder / "results" / f"{name}.json").read_text())
        del document["date"]
        return json.dumps(document)

    def killed_in_its_second_arm(self) -> None:
        (self.folder / "kill").touch()
        path = os.pathsep.join([str(REPRODUCTIONS), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, self.script]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
        assert done.returncode == -9 and self.ran == ["opening", "first", "second"]
        (self.folder / "kill").unlink()


@pytest.fixture
def example(tmp_path, monkeypatch) -> Example:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    return Example(tmp_path / "scripts")


@pytest.fixture
def run(example, monkeypatch) -> Callable[..., int]:
    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(example.script), *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(example.script), run_name="__main__")
        return end.value.code

    return run


def test_a_killed_run_goes_on_and_ends_with_the_results_of_a_run_in_one_go(example, run, tmp_path):
    assert run() == 0
    assert example.ran == ["opening", "first", "second"]
    whole = example.results()
    assert len(set(json.loads(whole)["tables"][2]["rows"][0])) == 1  # each begins with the seed

    example.killed_in_its_second_arm()
    assert run() == 0
    assert example.ran == ["second"]
    assert example.results() == whole
    assert not list((tmp_path / "cache" / "reproductions").iterdir())  # a finished run measures anew next time


@pytest.mark.slow
@pytest.mark.parametrize("change", ["code", "seed", "fresh", "name"])
def test_what_computes_something_else_is_measured_anew(example, run, change):
    example.killed_in_its_second_arm()
    if change == "code":
        example.change("torch.rand(())", "torch.rand(()) / 2")
    if change == "name":
        example.change("drawn(", "sampled(")
        example.change("LIMIT", "THRESHOLD")
    assert run(*{"seed": ["--seed", "1"], "fresh": ["--fresh"]}.get(change, [])) == 0
    assert example.ran == (["second"] if change == "name" else ["opening", "first", "second"])


@pytest.mark.parametrize(("passed", "verdict"), [(False, "premise not met"), (None, "undecided")])
def test_an_experiment_ends_where_its_premise_is_not_met(passed, verdict, example, run):
    example.change(
        '    run.part("judged", judged, LIMIT)',
        f"""\
    run.premise("the effect", "at least 0.5", 0.25, {passed})
    run.part("judged", judged, LIMIT)""",
    )
    assert run() == 1 and example.ran == ["opening"]
    document = json.loads(example.results())
    assert document["verdict"] == verdict and [each["kind"] for each in document["checks"]] == ["premise"]


def test_a_frozen_design_is_written_with_its_digest_and_cannot_be_frozen_again(example, run):
    frozen = '    run.freeze("mean of differences", [3, 4], steps=100)\n'
    example.change('    run.part("judged", judged, LIMIT)', frozen + '    run.part("judged", judged, LIMIT)')
    assert run() == 0
    design = json.loads(example.results())["design"]
    assert design["seeds"] == [3, 4] and design["recipe"] == {"steps": 100} and len(design["digest"]) == 16
    example.change(frozen, 2 * frozen)
    with pytest.raises(ValueError, match="frozen already"):
        run()


def test_an_arm_is_known_by_what_it_computes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.fingerprint import fingerprint

    def of(source: str, name: str = "f", *given: object) -> str:
        module: dict[str, object] = {"__name__": "script"}
        exec(source, module)
        return fingerprint(module[name], *given)

    base = of("STEPS = 3\ndef g(x): return x + STEPS\ndef f(x): return g(x)", "f", 1)
    assert base == of("STEPS = 3\ndef h(y):\n  'Say why.'\n  return y + STEPS  # so\ndef k(x): return h(x)", "k", 1)
    assert base != of("STEPS = 4\ndef g(x): return x + STEPS\ndef f(x): return g(x)", "f", 1)
    assert base != of("STEPS = 3\ndef g(x): return x - STEPS\ndef f(x): return g(x)", "f", 1)
    assert base != of("STEPS = 3\ndef g(x): return x + STEPS\ndef f(x): return g(x)", "f", 2)
    config = "from lamella.train import TrainConfig\nCONFIG = TrainConfig(steps={})\n"
    config += "def f(x): return CONFIG, x in {{'a', 'b', 'c', 'd'}}"
    assert of(config.format(3)) == of(config.format(3)) != of(config.format(4))
    code = "import script; from harness.fingerprint import fingerprint; print(fingerprint(script.f))"
    (tmp_path / "script.py").write_text(config.format(3))
    path = os.pathsep.join([str(tmp_path), str(REPRODUCTIONS), *sys.path])
    found = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1, "sets have another order in every process"
    size = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Size:\n  tuning: int = 2\n"
    size += (
        "  def twice(self): return {} * self.tuning\ndef tuning(run): return {}\ndef f(x): return x.twice() + x.tuning"
    )

    def given(twice: int, other: int) -> str:
        module: dict[str, object] = {"__name__": "script"}
        exec(size.format(twice, other), module)
        return fingerprint(module["f"], module["Size"]())

    assert given(2, 1) == given(2, 3) != given(4, 1), "a function with an attribute's name is not called"
    again = "def f(x): return x and f(x - 1)"
    assert of(again) == of(again) != of("def f(x): return x and f(x - 2)")


def test_a_claim_that_fails_exits_with_1_and_is_written(example, run):
    example.change("LIMIT = 2.0", "LIMIT = -1.0")
    assert run() == 1
    assert json.loads(example.results())["verdict"] == "does not hold"


@pytest.mark.parametrize("variant", ["quick", "other"])
def test_a_run_that_leaves_something_out_has_results_of_its_own(example, run, variant):
    assert run(f"--{variant}", "--seed", "3") == 0
    document = json.loads(example.results(f"some-method-{variant}"))
    assert document["slug"] == "some-method" and document["seed"] == 3
    assert document["tables"][1]["rows"][0][1] == f"some-method-{variant}"  # and a journal
    assert [file.name for file in (example.folder / "results").iterdir()] == [f"some-method-{variant}.json"]


def test_every_method_that_is_no_baseline_has_a_reproduction_and_every_reproduction_a_method():
    ours = {slug for slug, entry in methods().items() if entry.module.startswith("lamella.") and entry.reproduced}
    assert {script.stem.replace("_", "-") for script in SCRIPTS} == ours


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_reproduction_runs_through_the_harness(script, monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    names = runpy.run_path(str(script), run_name=script.stem)
    assert names["main"].__module__ == "harness.run" and callable(names["experiment"])
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)}
    assert calls & {"run.part", "run.arm"} and not calls & {"Record", "argparse.ArgumentParser", "Journal"}
    assert not calls & {"run.check", "record.check"}, "a check says of which kind it is"


@pytest.mark.parametrize(
    "script", [*SCRIPTS, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=lambda script: script.stem
)
def test_every_option_that_a_script_gives_is_one_of_the_command(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("lamella.make_plan", "lamella.run"):
            match node.args:
                case [ast.Constant(value=str(slug)), *_]:
                    known = argument_names(get_method(slug)) | set(inspect.signature(lamella.run).parameters)
                    given = {keyword.arg for keyword in node.keywords if keyword.arg}
                    assert given <= known, f"line {node.lineno}: {slug} has no option {given - known}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_committed_results_know_the_main_claim_and_agree_with_their_checks(script):
    slug = script.stem.replace("_", "-")
    results = REPRODUCTIONS / "results" / f"{slug}.json"
    if not results.exists():  # a method may stand before its full run has ended, and says so
        assert f"<!-- {slug} -->not yet run<!-- end -->" in (ROOT / "README.md").read_text(encoding="utf-8")
        return
    document = json.loads(results.read_text())
    assert all(check["kind"] in get_args(Kind) for check in document["checks"])
    main, premises = ([check["passed"] for check in document["checks"] if check["kind"] == kind]
                      for kind in ("main", "premise"))  # fmt: skip
    expected = "does not hold" if False in main else "undecided" if None in main else "holds"
    if not all(premises):
        expected = "premise not met" if False in premises else "undecided"
    assert (main or not all(premises)) and document["verdict"] == expected


def test_a_mean_over_seeds_decides_where_its_interval_leaves_the_threshold_out(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.measured import Measured

    found = Measured.over_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # a table's 97.5 % quantile of Student's t with two degrees of freedom, times 1 / sqrt(3)
    assert (found.figure, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert [found.at_least(bound) for bound in (-1, 2, 5)] == [True, None, False]
    assert [found.at_most(bound) for bound in (-1, 2, 5)] == [False, None, True]
    assert [found.within(*bounds) for bounds in ((-1, 5), (0, 5), (5, 6))] == [True, None, False]
    alone = Measured.over_seeds([2.0])
    assert (alone.low, alone.high, str(alone)) == (2, 2, "2") and alone.at_least(2) and alone.at_least(2.1) is False


@pytest.mark.parametrize("spread", [(0.3, 1.0, 0.5), (1.0, 0.3, 0.5), (0.0, 1.0, 3.0)], ids=["items", "seeds", "rest"])
def test_an_interval_over_seeds_and_items_covers_the_mean_as_often_as_it_says(spread, monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.measured import Measured

    of_seeds, of_items, rest = spread
    random, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(1000):
        seeds, items = of_seeds * random.normal(size=(4, 1)), of_items * random.normal(size=(1, 50))
        found = Measured.over_seeds_and_items(0.7 + seeds + items + rest * random.normal(size=(4, 50)))
        covered += found.low <= 0.7 <= found.high
        widths.append(found.high - found.low)
    assert covered / 1000 >= 0.92
    known = (of_seeds**2 / 4 + of_items**2 / 50 + rest**2 / 200) ** 0.5  # the standard error of the mean
    assert np.mean(widths) <= 2 * 3.18 * known  # by Student's t with one degree of freedom fewer than seeds


def test_an_interval_over_seeds_and_items_is_students_where_only_one_of_them_varies(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.measured import Measured

    values = np.random.default_rng(0).normal(size=40)
    expected = Measured.over_seeds(values.tolist())
    for same in (np.repeat(values[:, None], 3, axis=1), np.repeat(values[None], 3, axis=0), values[None]):
        found = Measured.over_seeds_and_items(same)
        assert (found.figure, found.low, found.high) == pytest.approx((expected.figure, expected.low, expected.high))
    one = Measured.over_seeds_and_items(np.ones((3, 4)))
    assert (one.low, one.high) == (1, 1)
    assert str(Measured(0.0, -0.1, 0.1).exp()) == "1 (0.9048 to 1.105)"


def test_as_many_seeds_run_as_decide(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.design import seeds_needed

    pilot = [0.9, 1.0, 1.1]  # a standard deviation of 0.1; t quantiles from a table
    assert seeds_needed(pilot, 0.0926) == 7 and 2.446912 * 0.1 / 7**0.5 <= 0.0926 < 2.570582 * 0.1 / 6**0.5
    assert seeds_needed(pilot, 10) == 3 and seeds_needed(pilot, 1e-6) == 12 and seeds_needed(pilot, 0, most=20) == 20


def test_a_grid_of_rates_grows_for_every_arm_until_each_optimum_is_inside(example, run):
    example.change(
        '    run.part("judged", judged, LIMIT)',
        """\
    from math import log10
    from harness.design import tuned
    arms = {"low": lambda rate: abs(log10(rate) + 4), "middle": lambda rate: abs(log10(rate) + 2)}
    found = tuned(run, arms, [1e-3, 1e-2])
    run.main("rates", "inside", [each.value for each in found.values()], all(e.is_interior for e in found.values()))""",
    )
    assert run() == 0
    tables = {each["title"]: each for each in json.loads(example.results())["tables"]}
    rows = tables["Learning rates, chosen on validation data"]["rows"]
    assert [row[:3] for row in rows] == [["low", 1e-4, "yes"], ["middle", 1e-2, "yes"]]
    assert rows[0][3].count(":") == rows[1][3].count(":") == 5  # 1e-5 to 1e-1, the same for both


def test_the_loss_of_each_sample_is_that_of_all_its_labels_within_a_prompt_too(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.nano import LETTERS, llama, nats_by_sample, prose, whole
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(len(LETTERS), 16, 1)).eval()
    responses = prose("test", 3, 24, 0)
    for samples in (responses, whole(responses)):
        with torch.no_grad():
            alone = [float(model(each["input_ids"][None], labels=each["labels"][None]).loss) for each in samples]
        assert nats_by_sample(model, samples) == pytest.approx(alone, rel=1e-4)


def test_the_loss_of_each_sample_runs_its_prompt_as_a_prompt(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.nano import LETTERS, llama, nats_by_sample, prose
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    stack = Stack(LlamaForCausalLM(llama(len(LETTERS), 16, 4)).eval())
    for each in stack.model.parameters():
        each.data *= 1 if each.ndim == 1 else 10  # so that every layer matters
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    view = lamella.apply(stack, Plan(model=ModelReference.of(stack), path=path))
    samples = prose("test", 3, 24, 0)
    alone = []
    for each in samples:
        ids, start, cache = each["input_ids"], int(each["prompt_lengths"]), None
        assert 0 < start < len(ids)
        logits = []
        for piece in (ids[:start], *ids[start:].split(1)):  # the prompt at once, then token by token
            with torch.no_grad():
                out = view(piece[None], cache=cache, use_cache=True)
            logits, cache = [*logits, out.logits[0, -1]], out.past_key_values
        alone.append(float(torch.nn.functional.cross_entropy(torch.stack(logits[:-1]), ids[start:])))
    assert nats_by_sample(view, samples) == pytest.approx(alone, rel=1e-4)
    assert nats_by_sample(stack.model, samples) != pytest.approx(alone, rel=1e-2)


def test_a_speed_decides_where_its_quartiles_leave_the_threshold_out(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from harness.measured import Measured

    share = Measured.over_rounds(Ratio(median=1.8, low=1.6, high=2.2), predicted=2.0)
    assert (share.figure, share.low, share.high) == pytest.approx((0.9, 0.8, 1.1))
    assert [share.within(*bounds) for bounds in ((0.75, 1.15), (0.85, 1.15), (1.15, 2))] == [True, None, False]


def test_arithmetic_has_one_thread_unless_more_are_asked_for(example, run, monkeypatch):
    example.change('run.data = "random numbers"', "run.data = str(torch.get_num_threads())")
    before = torch.get_num_threads()
    try:
        assert run() == 0
        assert json.loads(example.results())["data"] == "1"
        assert run("--threads", "2") == 0
        assert json.loads(example.results())["data"] == "2"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.stem)
def test_every_benchmark_finds_what_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does for a script
    assert callable(runpy.run_path(str(script), run_name=script.stem)["main"])
