"""A new method is a file, a page, a line for the changelog and a test; every list that names methods is derived."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from lamella.registry import Purpose, all_commands, methods

ROOT = Path(__file__).parent.parent
NEW = {
    "src/lamella/methods/leave_one.py": '''"""Leave one out: the plan that removes one layer, which the caller names."""

from typing import Annotated

from annotated_types import Ge

from lamella.plan import ModelReference, PlanSeries
from lamella.registry import method
from lamella.stack import Stack, groups_at


@method("leave-one", purpose="prune")
def leave_one(stack: Stack, *, layer: Annotated[int, Ge(0)] = 1) -> PlanSeries:
    """Remove the one layer of a model that the caller names.

    Args:
        stack: the model; it is not changed.
        layer: the index of the layer to remove.
    """
    return PlanSeries.of_removals(ModelReference.of(stack), [groups_at("block", stack.positions)[layer]], [{}, {}])
''',
    "docs/methods/leave-one.md": "# leave-one\n\nRemoves the layer that the caller names.\n",
    "changes/leave-one.md": "- `lamella run leave-one MODEL`: removes the layer that the caller names.\n",
    "tests/methods/test_leave_one.py": """from lamella.registry import methods


def test_it_is_registered() -> None:
    assert methods()["leave-one"].summary == "Remove the one layer of a model that the caller names."
""",
}
MODULE = "src/lamella/methods/leave_one.py"
SUMMARY = "Remove the one layer of a model that the caller names."
GENERATED = ("README.md", "CHANGELOG.md")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
LISTED = """
import sys
sys.path.insert(0, "docs")
import hooks
from mkdocs.config.defaults import MkDocsConfig
print(hooks.method_table())
print(hooks.which_table())
config = MkDocsConfig()
config.nav = [{"Methods": ["methods/index.md"]}]
print(hooks.on_config(config).nav)
"""


class Copy:
    """A copy of the repository's files, as the only commit of a repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "a copy")

    def git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout.rstrip("\n")

    def python(self, *arguments: str) -> str:
        """What Python prints, with the copy's package in front of the installed one."""
        path = os.pathsep.join([str(self.folder / "src"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, check=False, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def generate(self) -> None:
        """Write the generated parts of README.md and CHANGELOG.md, as `make lists` does."""
        self.python("scripts/readme.py")
        self.python("scripts/changelog.py")

    def changed(self) -> dict[str, str]:
        """The files that git reports, with their state."""
        lines = self.git("status", "--short", "--untracked-files=all").splitlines()
        return {line[3:]: line[:2].strip() for line in lines}

    def added(self, name: str) -> list[str]:
        """The lines that a file has gained; it must have lost none."""
        lines = [line for line in self.git("diff", "--unified=0", name).splitlines() if line[:3] not in ("---", "+++")]
        assert not [line for line in lines if line.startswith("-")], lines
        return [line[1:] for line in lines if line.startswith("+")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a checkout and git")
    return Copy(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def extended(copy: Copy) -> Copy:
    """The copy with the new method, and with its lists written again."""
    copy.generate()
    assert copy.changed() == {}, "run `make lists` and commit what it writes"
    for name, text in NEW.items():
        (copy.folder / name).write_text(text, encoding="utf-8")
    copy.generate()
    return copy


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_what_the_script_writes() -> None:
    readme = script("readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, methods=readme.method_table()) == text, "run `make lists`"


def test_the_changelog_is_what_the_script_writes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert script("changelog").assembled(text, ROOT / "changes") == text, "run `make lists`"


def test_every_file_of_changes_is_of_a_method_or_a_command() -> None:
    assert {file.stem for file in (ROOT / "changes").iterdir()} <= set(all_commands())


def test_every_purpose_is_in_the_table() -> None:
    readme = script("readme")
    assert set(readme.PURPOSES) == set(get_args(Purpose))
    ours = {slug for slug, entry in methods().items() if entry.module.startswith("lamella.")}
    assert {entry.slug for entries in readme.by_purpose().values() for entry in entries} == ours


@pytest.mark.slow
def test_a_new_method_touches_its_own_files_and_the_generated_lists_alone(extended: Copy) -> None:
    assert extended.changed() == dict.fromkeys(NEW, "??") | dict.fromkeys(GENERATED, "M")
    measured = "docs/methods/leave-one.md#measured"
    row = f"| [`leave-one`](docs/methods/leave-one.md) | {SUMMARY} | our own; [measured]({measured}) |"
    assert extended.added("README.md") == [row]
    assert extended.added("CHANGELOG.md") == NEW["changes/leave-one.md"].splitlines()


@pytest.mark.slow
def test_every_list_shows_a_new_method(extended: Copy) -> None:
    printed = extended.python("-c", LISTED)
    assert f"| [`leave-one`](leave-one.md) | {SUMMARY} | A smaller model |" in printed
    assert "| A smaller model | [`leave-one`](leave-one.md) | none |" in printed
    assert "'methods/leave-one.md'" in printed
    assert "leave-one" in extended.python("-m", "lamella", "methods")
    helped = extended.python("-m", "lamella", "run", "leave-one", "--help")
    assert SUMMARY in helped and "--layer" in helped
    collected = extended.python(*PYTEST, "--collect-only", "tests/conformance", "-k", "leave-one")
    for suite in ("test_declarations.py", "test_results.py", "test_plans.py", "test_bounds.py"):
        assert f"{suite}::" in collected
    assert "1 passed" in extended.python(*PYTEST, "tests/methods/test_leave_one.py")


@pytest.mark.slow
def test_a_new_method_goes_as_it_came(extended: Copy) -> None:
    for name in NEW:
        (extended.folder / name).unlink()
    extended.generate()
    assert extended.changed() == {}
    assert "leave-one" not in extended.python("-m", "lamella", "methods")
    for name, text in NEW.items():
        (extended.folder / name).write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_an_installed_package_brings_a_method_without_any_file_of_lamella(tmp_path: Path) -> None:
    """The lists of the installed program show it; those of the repository leave it out."""
    (tmp_path / "of_a_package.py").write_text(NEW[MODULE].replace("leave-one", "leave-another"), encoding="utf-8")
    information = tmp_path / "of_a_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: of-a-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[lamella.methods]\nleave-another = of_a_package\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)]),
        "COLUMNS": "200",
    }

    def printed(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert "leave-another" in printed("-m", "lamella", "methods")
    assert "--layer" in printed("-m", "lamella", "run", "leave-another", "--help")
    read = "import sys; sys.path.insert(0, 'scripts'); import readme; print(readme.method_table())"
    assert "finercut" in printed("-c", read) and "leave-another" not in printed("-c", read)
    assert "test_results.py::" in printed(*PYTEST, "--collect-only", "tests/conformance", "-k", "leave-another")
