"""Lamella compared with other installable tools, on the same model, the same text and the same sizes.

short-transformers, optipfair and economize select layers to remove, as do portfolio (with the short search of `lamella
compress`), finercut (whole layers, lazily), shortgpt and window: compared are the fidelity at equal size, on samples of
calibration text given to every planner, and the planning time. portfolio uses further windows of the same split for its
selection, as by default. mergekit (passthrough) writes the checkpoint of one pruned model, as do `export_out_of_core`
and `export`: compared are time and peak memory, each in a separate process, and the tensors byte by byte. Every peer
runs in a virtual environment in the cache folder, made from the requirements files in this folder; a peer that cannot
be installed, or fails on the model, is listed in the first table with the reason.

Planning time is processor time of one thread, which depends little on the load of the machine. finercut's exact
searches are omitted, since they would take most of the time: see `benchmarks/planner.py`.

    python benchmarks/peers.py            # after installing, an hour of one core; resumes after an interruption
    python benchmarks/peers.py --quick    # one sample, one repetition
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
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lamella
from lamella.data import InputContext, Text
from lamella.evaluate import Fidelity, FidelityTest
from lamella.files import Finished
from lamella.plan import ModelReference, Plan, checkpoint
from lamella.provenance import PACKAGES, package_version
from lamella.registry import get_method
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer, resolve
from lamella.zoo.cache import cache_folder

HERE = Path(__file__).parent
MODEL = "smollm2"
SIZES = (4, 7, 9)  # layers removed
WRITTEN = 7  # layers removed in the written checkpoint
SAMPLES = 2  # of calibration text
WINDOWS, LENGTH, TESTED = 4, 256, 16  # windows of a sample, tokens of each window, test windows
TWICE = 2.0  # time limit of portfolio, relative to the lazy search
SAME_LOSS = 1e-3  # nats, tolerance between two programs that read one model
PATIENCE = 3600  # timeout in seconds of any step of a peer, including its installation

# Children read JSON from stdin and print JSON as their last line. Memory is VmHWM, since the ru_maxrss of a child
# starts with the memory of its parent.
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
begin = time.process_time()
result = model.analyse_layers(
    rows, tokenizer=lambda row, **_: BatchEncoding({"input_ids": row}), key="text", limit=len(rows)
)
starts = {size: int(get_best_pruning_start(result, size)) for size in given["sizes"]}
seconds = time.process_time() - begin
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
begin = time.process_time()
scores = analyze_layer_importance(model, [row[None] for row in ids], show_progress=False)
order = sorted(scores, key=scores.get)
removed = {size: sorted(order[:size]) for size in given["sizes"]}
seconds = time.process_time() - begin
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
begin = time.process_time()
for size in given["sizes"]:
    model.model.layers = torch.nn.ModuleList(before)
    model = prune_model(model, pruning_type="DEPTH", num_layers_to_remove=size, show_progress=False)
    removed[size] = [i for i, layer in enumerate(before) if not any(layer is kept for kept in model.model.layers)]
answer(seconds=time.process_time() - begin, loss=loss, removed=removed)
""",
    "economize, shortgpt": """
import copy
import economize
from economize.techniques.prune import DepthPruneConfig
removed, seconds = {}, {}
for size in given["sizes"]:
    pruned = copy.deepcopy(model)
    before = list(pruned.model.layers)
    begin = time.process_time()
    economize.apply(pruned, DepthPruneConfig(method="shortgpt", num_blocks=size), calibration=ids)
    seconds[size] = time.process_time() - begin
    removed[size] = [i for i, layer in enumerate(before) if not any(layer is kept for kept in pruned.model.layers)]
answer(seconds=seconds, loss=loss, removed=removed)
""",
    # The search is greedy, so a larger size goes on from a smaller one.
    "economize, sleb": """
import economize
from economize.techniques.prune import DepthPruneConfig
before, removed, seconds, done = list(model.model.layers), {}, {}, 0
begin = time.process_time()
for size in given["sizes"]:
    economize.apply(model, DepthPruneConfig(method="sleb", num_blocks=size - done), calibration=ids)
    seconds[size], done = time.process_time() - begin, size
    removed[size] = [i for i, layer in enumerate(before) if not any(layer is kept for kept in model.model.layers)]
answer(seconds=seconds, loss=loss, removed=removed)
""",
}
Searches = dict[int, tuple[int, ...]]  # the size of a search, and the sizes taken from it
EACH: Searches = {size: (size,) for size in SIZES}  # portfolio refines only the largest sizes
TIMED: Searches = {4: (4,), 9: (7, 9)}  # the searches whose planning time is compared
OURS: dict[str, tuple[str, dict[str, Any], Searches]] = {
    "lamella portfolio": ("portfolio", {"greedy": False, "minutes": 1.6}, EACH),  # as `lamella compress` plans
    "lamella finercut, lazily": ("finercut", {"level": "block", "strategy": "lazy", "exclude_front": 0.0}, TIMED),
    "lamella shortgpt": ("shortgpt", {}, TIMED),
    "lamella window": ("window", {}, TIMED),
}
REQUIREMENTS = {
    "mergekit": "peers-requirements.txt",
    "optipfair": "peers-requirements.txt",
    "economize": "peers-requirements-economize.txt",
    "short-transformers": "peers-requirements-short-transformers.txt",
}


class PeerFailed(Exception):
    """A peer that could not be installed or run; the message is the one-line reason."""


@dataclass
class Planned:
    """The selections of one planner, by the number of removed layers, from each sample of calibration text.

    Attributes:
        plans: one for each sample.
        fidelity: of each of them.
        seconds: processor time of planning; one for each sample.
    """

    plans: dict[int, list[Plan]] = field(default_factory=lambda: defaultdict(list))
    fidelity: dict[int, list[Fidelity]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


class Judge:
    """Evaluates each plan once, however many planners select it."""

    def __init__(self, stack: Stack, tokens: Tensor) -> None:
        self.stack, self._test = stack, FidelityTest(stack, tokens)
        self._known: dict[tuple[str, ...], Fidelity] = {}

    def add(self, planned: Planned, size: int, plan: Plan, seconds: float) -> None:
        cut = tuple(plan.drop)
        if cut not in self._known:
            self._known[cut] = self._test.of(lamella.apply(self.stack, plan))
        planned.plans[size].append(plan)
        planned.fidelity[size].append(self._known[cut])
        planned.seconds[size].append(seconds)
        say(f"    {size} layers: KL {self._known[cut].kl}, {seconds:.0f} s: {removed(plan)}")


def removed(plan: Plan) -> str:
    return " ".join(site.removeprefix("layers.") for site in plan.drop)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one sample and one repetition instead of 2 and 3")
    parser.add_argument("--seed", type=int, default=0, help="of the test text; samples have the seeds from it on")
    arguments = parser.parse_args()
    samples, repetitions = (1, 1) if arguments.quick else (SAMPLES, 3)
    torch.set_num_threads(1)  # processor time of one core

    pythons, states = install()
    stack = lamella.open(MODEL)
    tokenizer = open_tokenizer(MODEL)
    readers = [InputContext(lambda: tokenizer, seed) for seed in range(arguments.seed, arguments.seed + samples)]
    calibration = [Text.open("pydoc", reader, sequences=WINDOWS, length=LENGTH) for reader in readers]
    source = lamella.load_text("pydoc", "test")
    tokens = lamella.windows(tokenizer, source, TESTED, LENGTH, arguments.seed)
    data = f"{samples} samples of calibration: {calibration[0].describe()}, test: {source.provenance(tokens)}"
    record = Record("peers", data, arguments.seed)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = Finished(cache_folder() / "benchmarks" / "peers.jsonl", depends(calibration))
        planned = plan_side_by_side(Judge(stack, tokens), finished, calibration, pythons, states, folder)
        written, same = write_side_by_side(
            resolve(MODEL), planned["lamella portfolio"].plans[WRITTEN][0], pythons, states, folder, repetitions
        )
    record.table("Peers", ["peer", "version", "state"], [[peer, *state] for peer, state in states.items()])
    report_quality(record, planned)
    report_writing(record, written, same, repetitions)
    return record.finish(HERE / "results" / ("peers-quick.json" if arguments.quick else "peers.json"))


# Environments of the peers.


def install() -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Return a Python interpreter for every installable peer, and version and state of every peer."""
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
    """Return the interpreter of a virtual environment with these requirements, created once.

    A line such as ``# without: torchaudio`` names transitive dependencies that must be removed.
    """
    folder = cache_folder() / "peers" / requirements.stem
    python, stamp = folder / "bin" / "python", folder / "installed.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        say(f"installing {requirements.name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        output_of([sys.executable, "-m", "venv", str(folder)])
        output_of([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)])
        lines = [line.partition("# without:") for line in requirements.read_text(encoding="utf-8").splitlines()]
        if unwanted := [name for _, marker, names in lines if marker for name in names.split()]:
            output_of([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted])
        stamp.write_text(digest)
    return python


def version_in(python: Path, package: str) -> str:
    """Return the relevant versions of a peer: its own and that of transformers."""
    code = "import sys; from importlib.metadata import version as v; print(v(sys.argv[1]), v('transformers'))"
    own, transformers = output_of([str(python), "-c", code, package]).split()
    return f"{own} with transformers {transformers}"


def run_child(python: str | Path, code: str, **given: Any) -> dict[str, Any]:
    """Run a child script and return its answer."""
    own = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    output = output_of([str(python), "-c", PRELUDE + code], json.dumps(given), os.environ | own)
    return json.loads(output.strip().splitlines()[-1])


def output_of(command: list[str], given: str = "", env: Any = None) -> str:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, env=env, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"did not end within {PATIENCE} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PeerFailed((lines or [f"exit code {done.returncode}"])[-1][:200])
    return done.stdout


def say(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


# Which layers to remove.


def plan_side_by_side(
    judge: Judge,
    finished: Finished,
    samples: list[Text],
    pythons: dict[str, Path],
    states: dict[str, list[str]],
    folder: Path,
) -> dict[str, Planned]:
    """Run every planner on every sample alternately; return ``seconds``, and ``removed`` layers by size."""
    stack = judge.stack
    sources = {"short-transformers": older_copy(resolve(MODEL), folder / "older")}
    planned: dict[str, Planned] = {}
    for number, calibration in enumerate(samples, start=1):
        loss = first_loss(stack, calibration.tokens)
        for name, code in PLANNERS.items():
            peer = name.split(",")[0]
            if states[peer][1] != "runs":
                continue
            source = str(sources.get(peer, resolve(MODEL)))
            given = {"source": source, "tokens": calibration.tokens.tolist(), "sizes": SIZES}
            ask = partial(run_child, pythons[peer], PLANNING + code, threads=torch.get_num_threads(), **given)
            try:
                chosen = finished.once(f"sample {number}: {name}", ask)
                if abs(chosen["loss"] - loss) > SAME_LOSS:
                    raise PeerFailed(f"reads another model: loss {chosen['loss']:.4f} instead of {loss:.4f}")
            except PeerFailed as failure:
                states[peer][1] = f"fails: {failure}"
                planned.pop(name, None)
                continue
            spent = chosen["seconds"]
            for size in SIZES:
                drop = [f"layers.{layer}" for layer in chosen["removed"][str(size)]]
                plan = Plan(model=ModelReference.of(stack), drop=drop)
                seconds = spent[str(size)] if isinstance(spent, dict) else spent
                judge.add(planned.setdefault(name, Planned()), size, plan, seconds)
        for name, (slug, options, searches) in OURS.items():
            for most, sizes in searches.items():
                goal = {"share": most / len(stack)} if "budget" in get_method(slug).signature.groups else {}
                ask = partial(planned_here, stack, calibration, slug, options | goal, sizes)
                chosen = finished.once(f"sample {number}: {name}, up to {most} layers", ask)
                for size in sizes:
                    plan = Plan(model=ModelReference.of(stack), drop=chosen["removed"][str(size)])
                    judge.add(planned.setdefault(name, Planned()), size, plan, chosen["seconds"])
    return planned


def planned_here(
    stack: Stack, calibration: Text, slug: str, options: dict[str, Any], sizes: Sequence[int]
) -> dict[str, Any]:
    """Return the sites that one of our methods removes, and its processor time in seconds."""
    begin = time.process_time()
    series = lamella.make_plan(slug, stack, calibration, **options)
    seconds = time.process_time() - begin
    return {"seconds": seconds, "removed": {size: series.removing(2 * size).drop for size in sizes}}


def depends(samples: list[Text]) -> dict[str, Any]:
    """Return everything that the selections depend on: this file, our planning code, versions, and the texts."""
    here = Path(lamella.__file__).parent
    methods = [here / "methods" / f"{slug}.py" for slug, *_ in OURS.values()]
    files = [*methods, *sorted((here / "search").glob("*.py")), *sorted((here / "measure").glob("*.py"))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in [Path(__file__), *files])).hexdigest()
    versions = [package_version(package) for package in PACKAGES]
    return {"code": code, "versions": versions, "samples": [each.describe() for each in samples]}


@torch.no_grad()
def first_loss(stack: Stack, tokens: Tensor) -> float:
    """Return the loss on the first sequence, to check that a peer reads the same model."""
    logits = stack.model(input_ids=tokens[:1], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


def older_copy(source: Path | str, folder: Path) -> Path:
    """Return the same checkpoint with a config for transformers 4, without ``rope_parameters``."""
    folder.mkdir()
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in Path(source).glob("*.safetensors*"):
        (folder / file.name).symlink_to(file)
    return folder


def report_quality(record: Record, planned: dict[str, Planned]) -> None:
    for size in SIZES:
        rows: list[list[Any]] = []
        for name, chosen in planned.items():
            quality = [
                spread([getattr(each, what).mean for each in chosen.fidelity[size]])
                for what in ("kl", "top1", "perplexity")
            ]
            cuts = Counter(map(removed, chosen.plans[size])).most_common()
            selections = "; ".join(f"{cut} ({times} times)" if times > 1 else cut for cut, times in cuts)
            rows.append([name, *quality, spread(chosen.seconds[size]), selections])
        base = next(iter(planned.values())).fidelity[size][0].base_perplexity
        columns = ["planner", "KL (nats)", "same top token", "perplexity", "planning, CPU seconds", "removed"]
        title = f"{size} of 30 layers removed; median (range) over samples; the original's perplexity is {base}"
        record.table(title, columns, rows)

    ours, lazy = planned["lamella portfolio"], planned["lamella finercut, lazily"]
    for size in SIZES:
        kl = median_kl(ours, size)
        for name in [name for name in planned if not name.startswith("lamella")]:
            bound = median_kl(planned[name], size)
            what = f"KL of portfolio at {size} layers removed, median over samples"
            record.check(what, f"not above {bound:.4g} ({name})", kl, kl <= bound)
    for size in TIMED:
        ratio = statistics.median(a / b for a, b in zip(ours.seconds[size], lazy.seconds[size], strict=True))
        what = f"planning time of portfolio up to {size} layers, over that of the lazy search"
        record.check(what, f"at most {TWICE:g}", ratio, ratio <= TWICE)


def median_kl(planned: Planned, size: int) -> float:
    return statistics.median(each.kl.mean for each in planned.fidelity[size])


def spread(values: list[float]) -> str:
    """Return the median of some values, with their range if there are several."""
    median = f"{statistics.median(values):.4g}"
    return median if len(values) == 1 else f"{median} ({min(values):.4g}-{max(values):.4g})"


# Writing the pruned checkpoint.


def write_side_by_side(
    source: Path | str,
    plan: Plan,
    pythons: dict[str, Path],
    states: dict[str, list[str]],
    folder: Path,
    repetitions: int,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, bool]]:
    """Return the measurements of every writer, and whether its tensors equal mergekit's."""
    plan_file = folder / "plan.json"
    plan.write(plan_file)
    given = {"source": str(source), "plan": str(plan_file), "runs": slices(plan)}
    for file in Path(source).glob("*.safetensors"):  # so that no writer has to read it from the disk first
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
    """Return the remaining layers, as mergekit's ranges [first, past the last]."""
    ranges: list[list[int]] = []
    for run in plan.runs("prefill"):
        if ranges and ranges[-1][1] == run.layer:
            ranges[-1][1] += 1
        else:
            ranges.append([run.layer, run.layer + 1])
    return ranges


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of dtype, shape and bytes of every tensor of a checkpoint, by name."""
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
    def of(name: str, key: str, unit: float = 1.0) -> str:
        return spread([measured[key] / unit for measured in written[name]])

    rows = []
    for name in written:
        times = [of(name, key) for key in ("seconds", "on_disk", "process")]
        memory = [of(name, "peak", 1e6), of(name, "imports", 1e6)]
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
