"""Settings that must be made before any test imports torch or a Hugging Face library, and fixtures for all tests."""

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# More threads than this only make small tensors slower, and several test workers would fight for the cores.
THREADS = 2
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(THREADS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests build their models or take them from the zoo; a look-up at the hub would be a mistake, and should fail at once.
# A test of the hub itself, marked `network`, is run with HF_HUB_OFFLINE=0 in the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import set_seed  # noqa: E402

from lamella import progress  # noqa: E402
from lamella.cli import main  # noqa: E402
from lamella.plan import ModelReference, Plan  # noqa: E402
from lamella.registry import all_commands  # noqa: E402
from lamella.report import page  # noqa: E402
from lamella.zoo import open_stack  # noqa: E402
from lamella.zoo.nano import NANO  # noqa: E402
from selection import Selection, changed_files  # noqa: E402

METHODS = Path(__file__).parent / "methods"
NANO_LLAMA = Path(__file__).parent / "models" / "nano-llama"
CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Few examples, always the same, by default and in CI; many new ones in `make test-all`.
for profile, examples in (("default", 10), ("ci", 40)):
    hypothesis.settings.register_profile(profile, max_examples=examples, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("all", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


DIFFERENT = {"llama", "gpt_neox", "gemma3_text"}  # one after the other, side by side, and between two norms
SELECTION = pytest.StashKey[Selection | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option by which a run selects what has changed."""
    parser.addoption(
        "--changed",
        nargs="?",
        const="main",
        metavar="BRANCH",
        help="run the tests that the changes since the merge base with a branch (main) can reach; all without changes",
    )


def _selection(config: pytest.Config) -> Selection | None:
    """What the changes can reach; None where all tests run."""
    branch = config.getoption("--changed")
    files = None if branch is None else changed_files(branch)
    return Selection(files) if files else None


def pytest_configure(config: pytest.Config) -> None:
    """Select once."""
    config.stash[SELECTION] = _selection(config)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what has changed, and how many files."""
    branch, selection = config.getoption("--changed"), config.stash[SELECTION]
    if branch is None:
        return None
    if selection is None:
        return f"changed since {branch}: nothing that is known, so all tests run"
    reason = f"; all tests run: {selection.everything}" if selection.everything else ""
    return f"changed since {branch}: {len(selection.changed)} files{reason}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import a file whose tests cannot be reached."""
    selection = config.stash[SELECTION]
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if selection is not None and is_test and not selection.may_reach(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before what is not asked for goes
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests run by default, and select those that a change can reach.

    Where a test runs on many families, all but three that differ in structure run in `make test-all` alone, and of
    methods that have not changed all but one in CI. Tests of the table of architectures itself run on all of them.
    """
    on: dict[str, dict[pytest.Item, str]] = defaultdict(dict)
    for item in items:
        family = _values(item).get("name")
        if isinstance(family, str) and family in NANO and item.path.parent.name != "stack":
            on[item.nodeid.partition("[")[0]][item] = family
    for families in on.values():
        if set(families.values()) >= DIFFERENT:
            for item, family in families.items():
                if family not in DIFFERENT:
                    item.add_marker(pytest.mark.exhaustive)
                elif family != "llama" and item.path.is_relative_to(METHODS):
                    item.add_marker(pytest.mark.repeated)
    if config.getoption("--changed") is not None:
        kept = [item for item in items if _is_selected(item, config.stash[SELECTION])]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def _is_selected(item: pytest.Item, selection: Selection | None) -> bool:
    """Whether a test runs after a change; of repeated checks, those of methods that have changed."""
    if item.get_closest_marker("repeated") and (selection is None or not selection.changes(item.path, _values(item))):
        return False
    return selection is None or selection.reaches(item.path, _function(item), _values(item))


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection."""
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After each file, exempt what its tests have left in caches."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Exempt all living objects from garbage collection: Trainer collects after each run, which took half a second."""
    gc.collect()
    gc.freeze()


def _values(item: pytest.Item) -> dict[str, Any]:
    """The values of a test's parameters."""
    spec = getattr(item, "callspec", None)
    return {} if spec is None else spec.params


def _function(item: pytest.Item) -> str:
    """The top-level name of a test: of the function, or of its class."""
    owner = getattr(item, "cls", None)
    return str(getattr(item, "originalname", item.name) if owner is None else owner.__name__)


@pytest.hookimpl(optionalhook=True)  # of xdist, which may be absent
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole groups of tests.

    The marks of xdist have no effect with pytest 9.2, where a test keeps its ID whatever xdist adds to it.
    """
    from xdist.scheduler import LoadScopeScheduling

    slugs = set(all_commands())

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid, slugs)

    return Grouped(config, log) if config.getoption("dist") == "loadgroup" else None


def _group(nodeid: str, slugs: set[str]) -> str:
    """The tests that share what they make, and so run in one process: of a file, or of conformance on one method."""
    path, _, test = nodeid.partition("::")
    if "/conformance/" not in path:
        return path
    words = re.sub(r"[\[\] ]", "-", test)
    return f"conformance of {max((slug for slug in slugs if f'-{slug}-' in words), key=len, default='all')}"


@pytest.fixture(scope="session", autouse=True)
def temporary() -> Iterator[None]:
    """Clear up side files of plans that were given no folder. The path is short: those of sockets have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lamella-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        yield
        tempfile.tempdir = None
        del os.environ["TMPDIR"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed all random generators before each test, so that it is reproducible; no test uses this seed itself."""
    set_seed(4321)


@pytest.fixture(autouse=True)
def light_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed a line in pages instead of plotly's five megabytes, unless a browser draws them."""
    if request.node.get_closest_marker("browser") is None:
        monkeypatch.setattr(page, "_plotly", lambda: "/* plotly.js v0 */")


@pytest.fixture
def in_two_processes() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script, or ``-m`` and a module, with its arguments under ``accelerate launch``."""
    flags = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

    def launched(*command: object) -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port=0", *map(str, command)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(run, check=False, capture_output=True, text=True, env=environment)

    return launched


# The command line, inside the test process, where it is quick.


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line of a refusal."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert "Traceback" not in self.err + self.out
        assert len(lines) == 1 and lines[0].startswith("lamella: "), f"not one line: {self.err}"
        return lines[0]


Lamella = Callable[..., Outcome]


@pytest.fixture
def lamella(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lamella:
    """The command line as a function of its arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lamella", *map(str, arguments)])
        for seconds in ("EVERY", "LONG"):  # a busy machine makes no line of progress more
            monkeypatch.setattr(progress, seconds, 1e8)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A nano Llama with tokenizer, to be damaged."""
    return Path(shutil.copytree(NANO_LLAMA, tmp_path / "model"))


@pytest.fixture
def instructed(model: Path) -> Path:
    """The same with a chat template, as an instruction model has one."""
    (model / "chat_template.jinja").write_text(CHAT)
    return model


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan for the nano Llama that removes two whole layers."""
    return _write_plan(tmp_path / "plan.json", ["layers.2", "layers.4"])


@pytest.fixture
def sublayer_plan(tmp_path: Path) -> Path:
    """A plan for the nano Llama that removes single sublayers."""
    return _write_plan(tmp_path / "sublayers.json", ["layers.1.mlp", "layers.4.attn"])


def _write_plan(file: Path, drop: list[str]) -> Path:
    Plan(model=ModelReference.of(open_stack(NANO_LLAMA)), drop=drop).write(file)
    return file
