"""Lamella beside what can be installed today, on the same model, the same text and the same sizes.

mergekit (passthrough) writes the checkpoint of one pruned model, and so do `export_out_of_core` and `export`: seconds
and peak memory, each in a process of its own, and the tensors compared byte by byte. short-transformers and optipfair
choose layers to remove, and so do finercut, shortgpt and window: planning time and fidelity at equal size. Every peer
runs in a virtual environment in the cache folder, made from the requirements files beside this one; a peer that cannot
be installed, or that fails on the model, is a row of the first table with the reason.

    python benchmarks/peers.py            # after installing, about 15 minutes
    python benchmarks/peers.py --quick    # one repetition of each
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lamella
from lamella.evaluate import Fidelity, FidelityTest
from lamella.plan import ModelReference, Plan, PlanSeries, checkpoint
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer, resolve
from lamella.zoo.cache import cache_folder

HERE = Path(__file__).parent
MODEL = "smollm2"
SIZES = (4, 7)  # layers removed
WRITTEN = 7  # of them, in the checkpoint that is written
SAME_LOSS = 1e-3  # nats between two programs that read one model

# Children read JSON from stdin and print JSON as their last line. Memory is VmHWM, since the ru_maxrss of a child
# begins with the memory of its parent.
PRELUDE = """
import json, os, pathlib, sys, time
given = json.load(sys.stdin)
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def answer(**values):
    print("\\n" + json.dumps(values))
def timed_write(write):
    imports, begin = peak(), time.perf_counter()
    write()
    written = time.perf_counter() - begin
    for file in pathlib.Path(given["out"]).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    answer(seconds=written, on_disk=time.perf_counter() - begin, peak=peak(), imports=imports)
"""
WRITERS = {
    "mergekit": """
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
slices = [{"sources": [{"model": given["source"], "layer_range": run}]} for run in given["runs"]]
config = MergeConfiguration.model_validate({"merge_method": "passthrough", "slices": slices})
timed_write(lambda: run_merge(config, given["out"], MergeOptions(quiet=True)))
""",
    "export_out_of_core": """
from transformers import LlamaForCausalLM  # otherwise imported on first use, within the measured time
from lamella.plan import Plan
from lamella.plan.export import export_out_of_core
timed_write(lambda: export_out_of_core(given["source"], Plan.read(given["plan"]), given["out"]))
""",
    "export": """
import lamella
from transformers import LlamaForCausalLM
from lamella.plan import Plan
from lamella.plan.export import export
lamella.open
timed_write(lambda: export(lamella.open(given["source"]), Plan.read(given["plan"]), given["out"]))
""",
}
PLANNING = """
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(given["threads"])
ids = torch.tensor(given["tokens"])
model = AutoModelForCausalLM.from_pretrained(given["source"]).eval().float()
with torch.no_grad():
    logits = model(ids[:1]).logits[0, :-1]
loss = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
"""
PLANNERS = {
    # remove_layers() is analyse_layers(), get_best_pruning_start() and prune(); the first two serve every size.
    "short-transformers": """
from short_transformers import ShortTransformer
from short_transformers.utils import get_best_pruning_start
from transformers import BatchEncoding
model = ShortTransformer.from_model(model)
model.clear_memory()
rows = [{"text": row[None]} for row in ids]
begin = time.perf_counter()
result = model.analyse_layers(
    rows, tokenizer=lambda row, **_: BatchEncoding({"input_ids": row}), key="text", limit=len(rows)
)
starts = {size: int(get_best_pruning_start(result, size)) for size in given["sizes"]}
seconds = time.perf_counter() - begin
removed = {size: list(range(start, start + size)) for size, start in starts.items()}
before = list(model.model.layers)
model.prune(starts[given["sizes"][-1]], given["sizes"][-1])
gone = [i for i, layer in enumerate(before) if not any(layer is kept for kept in model.model.layers)]
assert gone == removed[given["sizes"][-1]], "prune removed other layers than were chosen"
answer(seconds=seconds, loss=loss, removed=removed)
""",
    "optipfair, importance": """
from optipfair import prune_model
from optipfair.pruning.depth import analyze_layer_importance
begin = time.perf_counter()
scores = analyze_layer_importance(model, [row[None] for row in ids], show_progress=False)
order = sorted(scores, key=scores.get)
removed = {size: sorted(order[:size]) for size in given["sizes"]}
seconds = time.perf_counter() - begin
before = list(model.model.layers)
last = removed[given["sizes"][-1]]
model = prune_model(model, pruning_type="DEPTH", layer_indices=last, show_progress=False)
gone = [i for i, layer in enumerate(before) if not any(layer is kept for kept in model.model.layers)]
assert gone == last, "prune_model removed other layers than were chosen"
answer(seconds=seconds, loss=loss, removed=removed)
""",
    "optipfair, last layers": """
from copy import copy
from optipfair import prune_model
before, removed = list(model.model.layers), {}
begin = time.perf_counter()
for size in given["sizes"]:
    model.model.layers = torch.nn.ModuleList(before)
    model = prune_model(model, pruning_type="DEPTH", num_layers_to_remove=size, show_progress=False)
    removed[size] = [i for i, layer in enumerate(before) if not any(layer is kept for kept in model.model.layers)]
answer(seconds=time.perf_counter() - begin, loss=loss, removed=removed)
""",
}
REQUIREMENTS = {
    "mergekit": "peers-requirements.txt",
    "optipfair": "peers-requirements.txt",
    "short-transformers": "peers-requirements-short-transformers.txt",
}


class PeerFailed(Exception):
    """A peer that could not be installed or run; the message is the reason, one line."""


@dataclass
class Planned:
    """What one planner chose, and how long it took in each repetition."""

    plans: dict[int, Plan] = field(default_factory=dict)  # by layers removed
    seconds: list[float] = field(default_factory=list)
    fidelity: dict[int, Fidelity] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition instead of 3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    repetitions = 1 if arguments.quick else 3

    pythons, states = install()
    stack = lamella.open(MODEL)
    tokenizer = open_tokenizer(MODEL)
    texts = {split: lamella.load_text("pydoc", split) for split in ("calibration", "test")}
    tokens = {
        "calibration": lamella.windows(tokenizer, texts["calibration"], 4, 256, arguments.seed),
        "test": lamella.windows(tokenizer, texts["test"], 8, 256, arguments.seed),
    }
    data = ", ".join(f"{split}: {texts[split].provenance(tokens[split])}" for split in texts)
    record = Record("peers", data, arguments.seed)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planned = plan_side_by_side(stack, tokens["calibration"], pythons, states, folder, repetitions)
        test = FidelityTest(stack, tokens["test"])
        for chosen in planned.values():
            chosen.fidelity = {size: test.of(lamella.apply(stack, plan)) for size, plan in chosen.plans.items()}
        plan = planned["lamella finercut, layers"].plans[WRITTEN]
        written, same = write_side_by_side(resolve(MODEL), plan, pythons, states, folder, repetitions)

    record.table("Peers", ["peer", "version", "state"], [[peer, *state] for peer, state in states.items()])
    report_quality(record, planned, repetitions)
    report_writing(record, written, same, repetitions)
    return record.finish(HERE / "results" / ("peers-quick.json" if arguments.quick else "peers.json"))


# Peers in their own place.


def install() -> tuple[dict[str, Path], dict[str, list[str]]]:
    """A Python for every peer that can be installed, and version and state of every peer."""
    pythons: dict[str, Path] = {}
    states: dict[str, list[str]] = {}
    for peer, requirements in REQUIREMENTS.items():
        try:
            pythons[peer] = environment_for(HERE / requirements)
            states[peer] = [version_in(pythons[peer], peer), "runs"]
        except PeerFailed as failure:
            states[peer] = ["", f"cannot be installed: {failure}"]
    return pythons, states


def environment_for(requirements: Path) -> Path:
    """The interpreter of a virtual environment with these requirements, made once."""
    folder = cache_folder() / "peers" / requirements.stem
    python, stamp = folder / "bin" / "python", folder / "installed.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        say(f"installing {requirements.name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        output_of([sys.executable, "-m", "venv", str(folder)])
        output_of([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
        stamp.write_text(digest)
    return python


def version_in(python: Path, package: str) -> str:
    """The versions that decide what a peer does: its own and that of transformers."""
    code = "import sys; from importlib.metadata import version as v; print(v(sys.argv[1]), v('transformers'))"
    own, transformers = output_of([str(python), "-c", code, package]).split()
    return f"{own} with transformers {transformers}"


def run_child(python: str | Path, code: str, **given: Any) -> dict[str, Any]:
    """Run a child script and return its answer."""
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    output = output_of([str(python), "-c", PRELUDE + code], json.dumps(given), os.environ | own)
    return json.loads(output.strip().splitlines()[-1])


def output_of(command: list[str], given: str = "", env: Any = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PeerFailed((lines or [f"exit code {done.returncode}"])[-1][:200])
    return done.stdout


def say(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


# Which layers to remove.


def plan_side_by_side(
    stack: Stack,
    calibration: Tensor,
    pythons: dict[str, Path],
    states: dict[str, list[str]],
    folder: Path,
    repetitions: int,
) -> dict[str, Planned]:
    """Every planner in turn, again and again, so that whatever else the machine does meets all of them."""
    largest = max(SIZES)
    ours: dict[str, Callable[[], PlanSeries]] = {
        "lamella finercut, sublayers": lambda: lamella.make_plan(
            "finercut", stack, calibration, remove=largest / len(stack)
        ),
        "lamella finercut, layers": lambda: lamella.make_plan(
            "finercut", stack, calibration, remove=largest / len(stack), level="block"
        ),
        "lamella shortgpt": lambda: lamella.make_plan("shortgpt", stack, calibration),
        "lamella window": lambda: lamella.make_plan("window", stack, calibration),
    }
    loss = first_loss(stack, calibration)
    sources = {"short-transformers": older_copy(resolve(MODEL), folder / "older")}
    reference = ModelReference.of(stack)
    planned: dict[str, Planned] = {}
    for repetition in range(repetitions):
        for name, code in PLANNERS.items():
            peer = name.split(",")[0]
            if states[peer][1] != "runs":
                continue
            say(f"{repetition + 1}/{repetitions} {name}")
            source = str(sources.get(peer, resolve(MODEL)))
            given = {"source": source, "tokens": calibration.tolist(), "sizes": SIZES}
            try:
                found = run_child(pythons[peer], PLANNING + code, threads=torch.get_num_threads(), **given)
                if abs(found["loss"] - loss) > SAME_LOSS:
                    raise PeerFailed(f"reads another model: loss {found['loss']:.4f} instead of {loss:.4f}")
            except PeerFailed as failure:
                states[peer][1] = f"fails: {failure}"
                planned.pop(name, None)
                continue
            chosen = planned.setdefault(name, Planned())
            chosen.seconds.append(found["seconds"])
            chosen.plans = {
                int(size): Plan(model=reference, drop=[f"layers.{layer}" for layer in layers])
                for size, layers in found["removed"].items()
            }
        for name, make in ours.items():
            say(f"{repetition + 1}/{repetitions} {name}")
            begin = time.perf_counter()
            series = make()
            chosen = planned.setdefault(name, Planned())
            chosen.seconds.append(time.perf_counter() - begin)
            chosen.plans = {size: series.removing(2 * size) for size in SIZES}
    return planned


@torch.no_grad()
def first_loss(stack: Stack, tokens: Tensor) -> float:
    """The loss on the first sequence, by which a peer shows that it reads the same model."""
    logits = stack.model(input_ids=tokens[:1], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


def older_copy(source: Path | str, folder: Path) -> Path:
    """The same checkpoint with a config that transformers 4 reads, which knows no ``rope_parameters``."""
    folder.mkdir()
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in Path(source).glob("*.safetensors*"):
        (folder / file.name).symlink_to(file)
    return folder


def report_quality(record: Record, planned: dict[str, Planned], repetitions: int) -> None:
    for size in SIZES:
        rows: list[list[Any]] = []
        for name, chosen in planned.items():
            fidelity, plan = chosen.fidelity[size], chosen.plans[size]
            removed = " ".join(site.removeprefix("layers.") for site in plan.drop)
            seconds = f"{statistics.median(chosen.seconds):.2f}"
            if len(chosen.seconds) > 1:
                seconds += f" ({min(chosen.seconds):.2f}-{max(chosen.seconds):.2f})"
            quality = [str(fidelity.kl), str(fidelity.top1), str(fidelity.perplexity)]
            rows.append([name, len(plan.skipped), *quality, seconds, removed])
        base = next(iter(planned.values())).fidelity[size].base_perplexity
        columns = ["planner", "sublayers", "KL (nats)", "same top token", "perplexity", "planning seconds", "removed"]
        title = f"{size} of 30 layers removed, or as many sublayers; the original's perplexity is {base}"
        record.table(f"{title}; median of {repetitions} (range), for all sizes up to {max(SIZES)}", columns, rows)
    peers = [name for name in planned if not name.startswith("lamella")]
    for size in SIZES if peers else ():
        best = min(peers, key=lambda name: planned[name].fidelity[size].kl.mean)
        bound = planned[best].fidelity[size].kl.mean
        for name in ("lamella finercut, layers", "lamella finercut, sublayers"):
            kl = planned[name].fidelity[size].kl.mean
            expected = f"not above the best peer's ({best}: {bound:.4g})"
            record.check(f"KL of {name} at the size of {size} layers removed", expected, kl, kl <= bound)


# Writing the pruned checkpoint.


def write_side_by_side(
    source: Path | str,
    plan: Plan,
    pythons: dict[str, Path],
    states: dict[str, list[str]],
    folder: Path,
    repetitions: int,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, bool]]:
    """Measurements of every writer, and whether its tensors are mergekit's."""
    plan_file = folder / "plan.json"
    plan.write(plan_file)
    given = {"source": str(source), "plan": str(plan_file), "runs": slices(plan)}
    for file in Path(source).glob("*.safetensors"):  # nobody shall be the one who reads it from the disk first
        file.read_bytes()
    written: dict[str, list[dict[str, float]]] = {}
    tensors: dict[str, dict[str, str]] = {}
    for repetition in range(repetitions):
        for name, code in WRITERS.items():
            if states.get(name, ["", "runs"])[1] != "runs":
                continue
            say(f"{repetition + 1}/{repetitions} writing with {name}")
            out = folder / name
            try:
                begin = time.perf_counter()
                measured = run_child(pythons.get(name, sys.executable), code, **given, out=str(out))
                measured["process"] = time.perf_counter() - begin
                tensors[name] = digests(out)
            except PeerFailed as failure:
                if name not in states:
                    raise
                states[name][1] = f"fails: {failure}"
                written.pop(name, None)
                continue
            finally:
                shutil.rmtree(out, ignore_errors=True)
            written.setdefault(name, []).append(measured)
    return written, {name: tensors[name] == tensors["mergekit"] for name in tensors if "mergekit" in written}


def slices(plan: Plan) -> list[list[int]]:
    """The layers that stay, as mergekit's ranges [first, past the last]."""
    ranges: list[list[int]] = []
    for run in plan.runs("prefill"):
        if ranges and ranges[-1][1] == run.layer:
            ranges[-1][1] += 1
        else:
            ranges.append([run.layer, run.layer + 1])
    return ranges


def digests(folder: Path) -> dict[str, str]:
    """A hash of dtype, shape and bytes of every tensor of a checkpoint, by name."""
    found = {}
    for tensor in checkpoint.read(folder).tensors:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            content = hashlib.sha256(stream.read(tensor.size)).hexdigest()
        found[tensor.name] = f"{tensor.dtype} {tensor.shape} {content}"
    return found


def report_writing(
    record: Record, written: dict[str, list[dict[str, float]]], same: dict[str, bool], repetitions: int
) -> None:
    def spread(name: str, key: str, unit: float = 1.0) -> str:
        values = [measured[key] / unit for measured in written[name]]
        return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"

    rows = []
    for name in written:
        times = [spread(name, key) for key in ("seconds", "on_disk", "process")]
        memory = [spread(name, "peak", 1e6), spread(name, "imports", 1e6)]
        rows.append([name, *times, *memory, {True: "yes", False: "no", None: ""}[same.get(name)]])
    columns = ["writer", "seconds", "until on disk", "whole process", "peak MB", "of it imports MB"]
    columns.append("mergekit's tensors")
    title = f"Writing the checkpoint without {WRITTEN} layers, median of {repetitions} interleaved runs (range)"
    record.table(title, columns, rows)
    if "mergekit" not in written:
        return
    for name in ("export_out_of_core", "export"):
        record.check(f"tensors of {name}", "the same as mergekit's", "same" if same[name] else "others", same[name])
    theirs = statistics.median(measured["peak"] for measured in written["mergekit"]) / 1e6
    mine = statistics.median(measured["peak"] for measured in written["export_out_of_core"]) / 1e6
    record.check("peak memory of export_out_of_core, MB", f"below mergekit's {theirs:.4g}", mine, mine < theirs)


if __name__ == "__main__":
    raise SystemExit(main())
