"""Settings that must be made before any test imports torch or a Hugging Face library, and fixtures for all tests."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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

from lamella import progress  # noqa: E402
from lamella.cli import main  # noqa: E402
from lamella.plan import ModelReference, Plan  # noqa: E402
from lamella.zoo import open_stack  # noqa: E402
from lamella.zoo.nano import NANO  # noqa: E402

NANO_LLAMA = Path(__file__).parent / "models" / "nano-llama"
CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Few examples, always the same, in the default run; many new ones in `make test-all`.
hypothesis.settings.register_profile("default", max_examples=40, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("all", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


DIFFERENT = {"llama", "gpt_neox", "gemma3_text"}  # one after the other, side by side, and between two norms


@pytest.hookimpl(tryfirst=True)  # before what is not asked for goes
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests run by default, and which in one process.

    Where a test runs on many families, all but three that differ in structure run in `make test-all` alone. Tests of
    the table of architectures itself run on all of them.
    """
    on: dict[str, dict[pytest.Item, str]] = defaultdict(dict)
    for item in items:
        spec = getattr(item, "callspec", None)
        family = None if spec is None else spec.params.get("name")
        if isinstance(family, str) and family in NANO and item.path.parent.name != "stack":
            on[item.nodeid.partition("[")[0]][item] = family
        if item.path.parent.name == "conformance":
            item.add_marker(pytest.mark.xdist_group("conformance"))  # its suites look at one run of each command
    for families in on.values():
        if set(families.values()) >= DIFFERENT:
            for item, family in families.items():
                if family not in DIFFERENT:
                    item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(scope="session", autouse=True)
def temporary() -> Iterator[None]:
    """Clear up side files of plans that were given no folder. The path is short: those of sockets have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="lamella-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        yield
        tempfile.tempdir = None
        del os.environ["TMPDIR"]


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
