"""Which tests a change can reach, by the imports of modules and by the slugs and files named in strings.

A test depends on the top-level names of its file that it uses, directly or through other names and fixtures,
and on the modules that these are imported from. A module depends on the modules that it imports, at its top or within
functions, for whatever is defined there. Two more kinds of dependency are not imports:

- a string that is a slug, such as ``"finercut"``, is a dependency on that method or command;
- a string that names a folder of the project, such as ``"docs"``, is a dependency on all files in it.

Whatever this graph does not know selects all tests. Where a change in an engine reaches more than a few methods, those
that represent the others are tested, and all of them in CI.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, reduce
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE, SOURCE, TESTS = "lamella", ROOT / "src", ROOT / "tests"
FOLDERS = ("docs", "changes", "reproductions", "scripts", "benchmarks", "tests/models")  # named in strings
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "Makefile", "pyproject.toml")
UNTESTED = ("site/", ".gitignore", "LICENSE")
REGISTRY = ("methods", "commands", "all_commands", "get_method")  # of the registry: they may return any method
FEW = 8  # methods that are all tested when an engine changes; of more, these represent the others:
REPRESENTATIVES = frozenset(
    ("finercut", "ffn-skip", "kore", "ssd", "wrap", "depth-efficiency", "muranet", "heal", "trace")
)
NAMING = (["methods"], ["commands"], ["planners"])  # modules of the package that name methods
KEPT = ROOT / ".pytest_cache" / "selection.json"  # what the files refer to, so that unchanged ones are not parsed again


# What a file refers to


@dataclass(frozen=True)
class Uses:
    """What a piece of code refers to.

    Attributes:
        imports: modules and the names imported from them; an empty name for a whole module.
        names: names and attributes.
        strings: string constants.
    """

    imports: frozenset[tuple[str, str]] = frozenset()
    names: frozenset[str] = frozenset()
    strings: frozenset[str] = frozenset()

    def __or__(self, other: Uses) -> Uses:
        return Uses(self.imports | other.imports, self.names | other.names, self.strings | other.strings)

    @classmethod
    def of(cls, node: ast.AST) -> Uses:
        """What a statement refers to, docstrings and imports for type checkers aside."""
        imports: set[tuple[str, str]] = set()
        names: set[str] = set()
        strings: set[str] = set()
        for each in _walk(node):
            match each:
                case ast.ImportFrom(module=str(module), level=0):
                    imports |= {(module, alias.name) for alias in each.names}
                case ast.Import():
                    imports |= {(alias.name, "") for alias in each.names}
                case ast.Name(id=name) | ast.arg(arg=name):  # an argument of a test is a fixture
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="lamella"), attr="__file__"):
                    strings.add("src")  # it reads the source
                case ast.Attribute(value=ast.Name(id="lamella"), attr=name):
                    imports.add((PACKAGE, name))
                case ast.Attribute(attr=name):
                    names.add(name)
                case ast.Constant(value=str(text)) if len(text) < 200:
                    strings.add(text)
                    if re.fullmatch(rf"{PACKAGE}(\.\w+)+", text):
                        module, _, name = text.rpartition(".")
                        imports.add((module, name))
        return cls(frozenset(imports), frozenset(names), frozenset(strings))


@dataclass(frozen=True)
class File:
    """What the parts of a Python file refer to.

    Attributes:
        uses: by the top-level name that a statement binds; under the empty name all other statements.
        origins: the module and the name there of each top-level name that is imported.
        lazy: the module of each name that is imported when it is first used: a dictionary of strings.
        always: the names that every test uses: fixtures with ``autouse``, and ``pytestmark``.
    """

    uses: dict[str, Uses] = field(default_factory=dict)
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)
    lazy: dict[str, str] = field(default_factory=dict)
    always: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, path: Path) -> File:
        """Parse a file."""
        file = cls()
        for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
            uses, names = Uses.of(node), _bound(node)
            for name in names or [""]:
                file.uses[name] = file.uses.get(name, Uses()) | uses
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                file.origins.update({each.asname or each.name: (node.module, each.name) for each in node.names})
                file.uses.update({name: Uses(frozenset({file.origins[name]})) for name in names})
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                values = [each.value for each in node.value.values if isinstance(each, ast.Constant)]
                keys = [each.value for each in node.value.keys if isinstance(each, ast.Constant)]
                if values and all(str(each).startswith(f"{PACKAGE}.") for each in values):
                    file.lazy.update(zip(keys, values, strict=False))
            if "pytestmark" in names or (isinstance(node, ast.FunctionDef) and _is_autouse(node)):
                file.always.extend(names)
        return file

    @cached_property
    def whole(self) -> Uses:
        """What the file refers to anywhere."""
        return reduce(Uses.__or__, self.uses.values(), Uses())

    def dump(self) -> dict[str, Any]:
        """Return the file as JSON has it."""
        uses = {name: [list(each.imports), list(each.names), list(each.strings)] for name, each in self.uses.items()}
        return {"uses": uses, "origins": self.origins, "lazy": self.lazy, "always": self.always}

    @classmethod
    def load(cls, found: dict[str, Any]) -> File:
        """Read what :meth:`dump` returned."""
        uses = {
            name: Uses(frozenset((module, each) for module, each in imports), frozenset(names), frozenset(strings))
            for name, (imports, names, strings) in found["uses"].items()
        }
        return cls(uses, {name: (a, b) for name, (a, b) in found["origins"].items()}, found["lazy"], found["always"])


def read_files() -> dict[Path, File]:
    """Return what all Python files of the package and of the tests refer to; those that changed are parsed again."""
    try:
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    files, version = {}, Path(__file__).stat().st_mtime_ns
    found: dict[str, Any] = {}
    for path in [*sorted(SOURCE.rglob("*.py")), *sorted(TESTS.rglob("*.py"))]:
        name, stamp = str(path.relative_to(ROOT)), [version, path.stat().st_mtime_ns, path.stat().st_size]
        if kept.get(name, [None])[0] == stamp:
            files[path], found[name] = File.load(kept[name][1]), kept[name]
        else:
            files[path] = File.parse(path)
            found[name] = [stamp, files[path].dump()]
    if found != kept:
        KEPT.parent.mkdir(exist_ok=True)
        partial = KEPT.with_suffix(f".{id(files)}")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(KEPT)
    return files


# Dependencies


class Graph:
    """The dependencies of all modules of the package and of all tests."""

    def __init__(self) -> None:
        files = read_files()
        self.package = {_module(path): file for path, file in files.items() if path.is_relative_to(SOURCE)}
        self.tests = {path: file for path, file in files.items() if path.is_relative_to(TESTS)}
        self.helpers = {path.stem: path for path in self.tests if not path.stem.startswith(("test_", "conftest"))}
        self.slugs = _slugs()
        self._reached: dict[str, frozenset[str]] = {}

    def reached(self, module: str) -> frozenset[str]:
        """Return all modules that a module depends on, itself among them."""
        if module not in self._reached:
            seen: set[str] = set()
            left = [module]
            while left:
                if (name := left.pop()) not in seen and name in self.package:
                    seen.add(name)
                    left += self.direct(name)
            self._reached[module] = frozenset(seen)
        return self._reached[module]

    @cache  # noqa: B019, there is one graph in a process
    def direct(self, name: str) -> frozenset[str]:
        """Return the modules that a module names: in imports, and as slugs, which engines do not know."""
        uses = self.package[name].whole
        slugs = uses.strings & self.slugs.keys() if name.split(".")[1:2] in NAMING else ()
        return self.modules(uses) | {module for slug in slugs for module in self.slugs[slug]}

    def modules(self, uses: Uses) -> frozenset[str]:
        """Return the modules of the package that define what is imported."""
        found = {self._defining(*each) for each in uses.imports if each[0].split(".")[0] == PACKAGE}
        return frozenset(found & self.package.keys())

    def named(self, strings: Iterable[str]) -> set[str]:
        """Return the slugs that strings name: alone, in a list, with a step or an option."""
        found = set()
        for text in strings:
            words = re.split(r"[\s,]+", text) if len(text) < 60 else []
            parts = [*words, *re.findall(r"--([a-z][a-z0-9-]*)\.", text), *re.findall(r"methods[./]([a-z0-9_]+)", text)]
            found |= {each.replace("_", "-") for each in parts} & self.slugs.keys()
        return found

    def _defining(self, module: str, name: str) -> str:
        """The module in which a name is defined that is imported from another one."""
        for _ in range(8):
            if f"{module}.{name}" in self.package:
                return f"{module}.{name}"
            file = self.package.get(module, File())
            origin = file.origins.get(name)
            if origin is not None and origin[0].startswith(PACKAGE):
                module, name = origin
            elif name in file.lazy:
                module = file.lazy[name]
            else:
                break
        return module

    @cache  # noqa: B019
    def of_test(self, path: Path, function: str) -> Uses:
        """Return what a test refers to, through the names and fixtures that it uses.

        Args:
            path: the file of the test.
            function: its top-level name: of the function, or of the class that has it.
        """
        left = [(scope, name) for scope in self._scopes(path) for name in self.tests[scope].always]
        left += [(path, function)] if function in self.tests[path].uses else []
        found, seen = Uses(), set[tuple[Path, str]]()
        while left:
            each = left.pop()
            if each not in seen:
                seen.add(each)
                uses = self.tests[each[0]].uses[each[1]]
                found |= uses
                left += self._links(each[0], uses)
        return found

    @cache  # noqa: B019
    def _scopes(self, path: Path) -> list[Path]:
        """A file, and those whose fixtures it can use."""
        return [path, *(each for parent in path.parents if (each := parent / "conftest.py") in self.tests)]

    def _links(self, path: Path, uses: Uses) -> Iterator[tuple[Path, str]]:
        """The top-level names of test files among what a statement refers to."""
        for scope in self._scopes(path):
            known = self.tests[scope].uses.keys()
            yield from ((scope, name) for name in (uses.names | uses.strings) & known)  # strings: usefixtures
        for module, name in uses.imports:
            helper = self.helpers.get(module)
            if helper is not None and name in self.tests[helper].uses:
                yield helper, name


@cache
def graph() -> Graph:
    """Return the graph of the files as they are."""
    return Graph()


# The tests to run


class Selection:
    """The tests that a set of changed files can reach.

    Args:
        changed: paths of the files, relative to the project.

    Attributes:
        changed: the same.
        everything: why all tests are selected; empty if only some are.
    """

    def __init__(self, changed: Iterable[str]) -> None:
        self.changed, self.everything = list(changed), ""
        self.modules, self.folders, self.paths = set[str](), set[str](), set[Path]()
        for name in self.changed:
            self._add(name)

    def _add(self, name: str) -> None:
        path = ROOT / name
        folder = next((each for each in FOLDERS if name.startswith(f"{each}/")), "")
        if name.startswith(UNTESTED):
            return
        self.paths.add(path)
        if path.is_relative_to(SOURCE):
            self.folders.add("src")  # for tests that read the source
            near = sorted(path.parent.glob("*.py")) or [path.parent.parent / "__init__.py"]
            is_module = path.suffix == ".py" and path.exists()  # a template, data or a deleted file: what is beside it
            self.modules |= {_module(each) for each in ([path] if is_module else near)}
        elif name.startswith("tests/") and path.name.startswith("test_") and path.suffix == ".py":
            pass
        elif name in ("pyproject.toml", "Makefile"):
            self.everything = f"{name} has changed"
        elif folder or name in DOCUMENTS:
            self.folders.add(folder or name)
        else:
            self.everything = f"{name} has changed, and it is not known what depends on it"

    def may_reach(self, path: Path) -> bool:
        """Return whether a test in a file may be reached, whatever the values of its parameters."""
        known = graph().tests.get(path)
        if known is None or self.everything:
            return True
        return any(self._is_open(path, each) or self.reaches(path, each, {}) for each in known.uses if _is_test(each))

    def reaches(self, path: Path, function: str, values: Mapping[str, object]) -> bool:
        """Return whether a test can be reached.

        Args:
            path: its file.
            function: its top-level name in the file.
            values: the values of its parameters.
        """
        if self.everything or path in self.paths:
            return True
        files = [value for value in values.values() if isinstance(value, Path) and value.is_relative_to(ROOT)]
        named = _named(values)
        owners = named if path.parent.name == "conformance" else _method(path) & graph().slugs.keys()
        if owners and owners.isdisjoint(self.tested):
            return False
        if not self.touched.isdisjoint(module for slug in named for module in graph().slugs[slug]):
            return True
        if files:  # it reads them
            return not self.paths.isdisjoint(files)
        return self._is_reached(path, function) or (not named and self._is_open(path, function))

    def changes(self, path: Path, values: Mapping[str, object]) -> bool:
        """Return whether a test in a file, with parameters, is about a method that has changed itself."""
        return not self.own.isdisjoint(_named(values) | _method(path))

    @cached_property
    def own(self) -> frozenset[str]:
        """The methods that have changed themselves."""
        slugs = graph().slugs.items()
        return frozenset(slug for slug, modules in slugs if not self.modules.isdisjoint(modules))

    @cached_property
    def touched(self) -> set[str]:
        """All modules that depend on a changed one."""
        return {module for module in graph().package if not self.modules.isdisjoint(graph().reached(module))}

    @cached_property
    def tested(self) -> frozenset[str]:
        """The methods whose own tests run: those that have changed, and those of an engine that has."""
        slugs = graph().slugs.items()
        clients = frozenset(slug for slug, modules in slugs if not self.touched.isdisjoint(modules))
        return clients if len(clients) <= FEW else self.own | (clients & REPRESENTATIVES)

    @cache  # noqa: B019, there is one selection in a process
    def _is_reached(self, path: Path, function: str) -> bool:
        """Whether a test refers to what has changed, whatever its parameters are."""
        uses = graph().of_test(path, function)
        named = {module for slug in graph().named(uses.strings) for module in graph().slugs[slug]}
        return not self.touched.isdisjoint(graph().modules(uses) | named) or any(
            _names(folder, uses.strings) for folder in self.folders
        )

    @cache  # noqa: B019
    def _is_open(self, path: Path, function: str) -> bool:
        """Whether a method has changed, and a test asks the registry for methods that it does not name."""
        asked = {(f"{PACKAGE}.registry", name) for name in REGISTRY}
        return any(map(_is_of_method, self.modules)) and not asked.isdisjoint(graph().of_test(path, function).imports)


def changed_files(base: str) -> list[str] | None:
    """Return the files that differ from the merge base with a branch, uncommitted changes included.

    Args:
        base: the branch.

    Returns:
        Paths relative to the project; None if it is not known, such as outside of a repository.
    """

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    try:
        (start,) = git("merge-base", "HEAD", base)
        changed = [*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return sorted(set(changed))


def _named(values: Mapping[str, object]) -> set[str]:
    """The slugs among the values of parameters."""
    given = {str(value) for value in values.values() if isinstance(value, str)}
    return graph().named(given | {str(slug) for value in values.values() if (slug := getattr(value, "slug", None))})


def _names(folder: str, strings: Iterable[str]) -> bool:
    """Return whether strings name a folder or a file of the project."""
    last = folder.rpartition("/")[2]
    return any(last == text or f"{last}/" in text for text in strings)


def _slugs() -> dict[str, list[str]]:
    """The modules of each method and command, by slug."""
    found: dict[str, list[str]] = {}
    for home in ("methods", "commands"):
        for path in sorted((SOURCE / PACKAGE / home).iterdir()):
            modules = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            if path.suffix in ("", ".py") and not path.stem.startswith("_"):
                found[path.stem.replace("_", "-")] = [_module(each) for each in modules]
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_of_method(module: str) -> bool:
    return module.split(".")[1:2] in (["methods"], ["commands"])


def _method(path: Path) -> set[str]:
    """The name of the method that a file of tests is about."""
    parts = path.relative_to(TESTS).with_suffix("").parts
    return {parts[1].removeprefix("test_").replace("_", "-")} if parts[0] == "methods" else set()


def _is_test(name: str) -> bool:
    return name.startswith(("test_", "Test"))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without docstrings, and without imports for type checkers."""
    left = [node]
    while left:
        each = left.pop()
        if isinstance(each, ast.If) and "TYPE_CHECKING" in ast.dump(each.test):
            continue
        if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)):
            yield each
            left += ast.iter_child_nodes(each)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
        else:
            yield node


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(each.asname or each.name).split(".")[0] for each in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _is_autouse(node: ast.FunctionDef) -> bool:
    return any("autouse=True" in ast.unparse(each) for each in node.decorator_list)
