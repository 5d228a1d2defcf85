"""Compression for llama.cpp: its files, its process, and the route that is chosen by its speeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamella as api
from lamella import inputs
from lamella.commands.compress import command as job
from lamella.commands.compress import llama_cpp, race
from lamella.commands.compress.forms import FileForm, Variant
from lamella.commands.compress.llama_cpp import LlamaCpp, _step_times, opened
from lamella.errors import ExportError, LamellaError
from lamella.evaluate import Ratio, StepTimes, Timing
from lamella.plan import Plan
from lamella.plan.quantize import gguf_copy
from lamella.runner import run
from lamella.zoo import open_tokenizer

pytest.importorskip("xllamacpp")

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
SPEED = {"": 1.0, "q8_0": 1.5, "q4_k_m": 1.8}  # of the whole model; a cut is faster by the share of its layers


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test of the command needs: little text, short answers, speeds that are known and not measured."""
    monkeypatch.setitem(inputs.Text.open.__func__.__kwdefaults__, "length", 48)
    for defaults in (inputs.Text.open.__func__.__kwdefaults__, inputs.Opening.judge.__kwdefaults__):
        monkeypatch.setitem(defaults, "sequences", 2)
        monkeypatch.setitem(defaults, "length", 48)
    monkeypatch.setattr(job, "PROMPTS", ("The first",))
    monkeypatch.setattr(race, "CURVE_POINTS", 1)

    def bench(self: LlamaCpp, variants: Mapping[str, Variant], *_: Any, **__: Any) -> dict[str, list[Timing]]:
        found = {}
        for name, (form, stack, plan) in variants.items():
            removed = 0 if plan is None else plan.removed // 2
            speed = Ratio.of([SPEED[form.name] * len(stack) / (len(stack) - removed)])
            found[name] = [Timing(1, (1.0,), (1.0,), speed, speed, 0.0)]
        return found

    monkeypatch.setattr(LlamaCpp, "bench", bench)


@pytest.mark.parametrize(
    ("speedup", "route"), [(1.3, "q8_0"), (1.7, "q4_k_m"), (2.1, "portfolio + q4_k_m"), (3.5, "portfolio + q4_k_m")]
)
@pytest.mark.usefixtures("brief")
def test_the_route_with_the_least_loss_in_llama_cpp_is_written_as_its_file(
    tmp_path: Path, speedup: float, route: str
) -> None:
    out = tmp_path / "out"
    found = run("compress", NANO_LLAMA, out=out, speedup=speedup, heal=None, runtime="llama.cpp").evidence.model_dump()
    chosen = found["chosen"]
    assert (chosen["route"], chosen["reached"]) == (route, True)
    assert found["runtime"]["name"] == "llama.cpp" and found["runtime"]["reference"] == "bf16"
    names = [each["method"] for each in found["curves"]]
    assert names[:2] == ["q8_0", "q4_k_m"]
    assert names[2:] == (["portfolio + q8_0", "portfolio + q4_k_m"] if chosen["cut"] else ["portfolio"])

    kind = chosen["quantised"]
    file = out / f"model-{kind}.gguf"
    assert found["quantised"]["output"] == file.name
    assert found["quantised"]["after"] == file.stat().st_size
    stack, ids = api.open(out), torch.arange(3, 35)[None]  # the unquantised checkpoint is beside the file
    read = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name)
    assert len(stack) == read.config.num_hidden_layers == 6 - len(Plan.read(out / "plan.json").drop)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, gguf_copy(stack.model, kind)(ids).logits, rtol=1e-3, atol=1e-3)

    for page in ("README.md", "report.html"):
        text = (out / page).read_text()
        assert f"A cut is needed for a decode speed-up of {speedup:.2f}\u00d7 in llama.cpp" in text or not chosen["cut"]
        assert (
            f"{kind} alone is enough for a decode speed-up of {speedup:.2f}\u00d7 in llama.cpp" in text or chosen["cut"]
        )
        assert "relative to the original as a bf16 file" in text
    assert f"llama-cli -m FOLDER/{file.name}" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_healed_cut_is_what_the_file_holds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given: dict[str, Any] = {"speedup": 2.1, "runtime": "llama.cpp", "heal_steps": 3}
    found = run("compress", NANO_LLAMA, out=out, **given).evidence.model_dump()
    routes = {each["name"]: each for each in found["routes"]}
    assert found["healing"]["fidelity"] == routes["healed, q4_k_m"]["fidelity"]
    assert routes["healed, q4_k_m"]["decode_speedup"] == routes["cut, q4_k_m"]["decode_speedup"]
    assert not any("lookup" in each for each in routes.values())  # which torch's generate offers
    stack, ids = api.open(out), torch.arange(3, 35)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model-q4_k_m.gguf")
    with torch.no_grad():
        copied = gguf_copy(stack.model, "q4_k_m")(ids).logits
        torch.testing.assert_close(read(ids).logits, copied, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("brief")
def test_a_goal_of_size_is_one_of_the_file(tmp_path: Path) -> None:
    stack = api.open(NANO_LLAMA)
    small = FileForm("q4_k_m", stack, StepTimes(1, 1, 1), kind="q4_k_m").weights()
    large = FileForm("q8_0", stack, StepTimes(1, 1, 1), kind="q8_0").weights()
    given: dict[str, Any] = {"heal": None, "runtime": "llama.cpp", "size": (small + large) / 2e6}
    chosen = run("compress", NANO_LLAMA, out=tmp_path / "out", **given).evidence.model_dump()["chosen"]
    assert (chosen["route"], chosen["reached"]) == ("q4_k_m", True)
    written = (tmp_path / "out" / "model-q4_k_m.gguf").stat().st_size
    assert small < written < small + 60_000  # and the tokenizer


@pytest.mark.usefixtures("brief")
def test_what_llama_cpp_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"out": tmp_path / "out", "heal": None, "runtime": "llama.cpp", "speedup": 1.1}
    with pytest.raises(ExportError, match=r"native checkpoints do not run in llama\.cpp: leave form out"):
        run("compress", NANO_LLAMA, form="native", **given)
    with pytest.raises(ExportError, match="leave quantize out"):
        run("compress", NANO_LLAMA, quantize_kind="q8_0", **given)
    with pytest.raises(ExportError, match=r"llama\.cpp runs plans of whole layers, and those of finercut are others"):
        run("compress", NANO_LLAMA, method=api.planner("finercut", level="sublayer"), **given)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(LamellaError, match=r"llama\.cpp needs xllamacpp: pip install 'lamella\[llama-cpp\]'"):
        run("compress", NANO_LLAMA, **given)


def test_the_parts_of_a_step_are_those_from_which_it_was_made() -> None:
    form = FileForm("", api.open(NANO_LLAMA), StepTimes(0, 0, 1), kind="bf16")
    found = _step_times(form, whole=6 * 0.1 + 0.4, half=3 * 0.1 + 0.4, removed=3)
    assert found.attn + found.mlp == pytest.approx(0.1) and found.rest == pytest.approx(0.4)
    attention, mlp = (2 * 96 * 96 + 2 * 48 * 96), 3 * 256 * 96
    assert found.attn / found.mlp == pytest.approx(attention / mlp, rel=0.01)  # norms are read as well


# The process.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Files of the nano Llama, by name."""
    runtime = LlamaCpp(open_tokenizer(NANO_LLAMA))
    stack = api.open(NANO_LLAMA)
    yield {each.kind: runtime._file(each, stack, None) for each in runtime.shown(stack)}


def test_every_file_is_timed_in_every_round(files: dict[str, Path]) -> None:
    with opened(files, 64) as ask:
        for _ in range(2):
            seconds = ask({"prompt": list(range(3, 35)), "tokens": 4})
            assert list(seconds) == list(files) == ["bf16", "q8_0", "q4_k_m"]
            assert all(prefill > 0 and step > 0 for prefill, step in seconds.values())


def test_speeds_are_ratios_to_the_file_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "STEPS", 2)
    stack = api.open(NANO_LLAMA)
    original, *quantised = LlamaCpp(open_tokenizer(NANO_LLAMA)).forms(stack, quantised=True, cut=False)
    assert original.speedup == Ratio(1.0, 1.0, 1.0) and (original.name, original.kind) == ("", "bf16")
    assert [each.name for each in quantised] == ["q8_0", "q4_k_m"]
    assert all(each.speedup.low > 0 for each in quantised)


def test_a_file_that_llama_cpp_cannot_open_is_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF")
    with (
        pytest.raises(LamellaError, match=r"llama\.cpp could not run broken: .+") as refusal,
        opened({"broken": file}, 64),
    ):
        pass
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children of a killed process on Linux only")
def test_the_process_of_llama_cpp_ends_with_the_one_that_started_it(files: dict[str, Path]) -> None:
    script = (
        "import sys, time, subprocess\n"
        "from pathlib import Path\n"
        "from lamella.commands.compress.llama_cpp import opened\n"
        "from multiprocessing import active_children\n"
        "with opened({'file': Path(sys.argv[1])}, 64) as ask:\n"
        "    [child] = Path(f'/proc/self/task/{__import__(\"os\").getpid()}/children').read_text().split()\n"
        "    print(child, flush=True)\n"
        "    time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(files["q8_0"])], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it runs
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process of llama.cpp still runs")
