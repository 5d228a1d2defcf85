"""Which tests a change can reach, by the imports of modules and by the slugs and files named in strings.

A test depends on the top-level names of its file that it uses, directly or through other names and fixtures,
and on the modules that these are imported from. A module depends on the modules that it imports, at its top or within
functions, for whatever is defined there. Two more kinds of dependency are no imports:

- a string that is a slug, such as ``"finercut"``, is a dependency on that method or command;
- a string that names a folder of the project, such as ``"docs"``, is a dependency on all files in it.

Whatever this graph does not know selects all tests.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, SOURCE = "lamella", ROOT / "src"
FOLDERS = ("docs", "changes", "reproductions", "scripts", "benchmarks", "tests/models")  # named in strings
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "Makefile", "pyproject.toml")
DYNAMIC = ("methods", "commands", "all_commands", "get_method")  # of the registry: they may return any method
IGNORED = ("site/", ".gitignore", "LICENSE")


@dataclass(frozen=True)
class Uses:
    """What a piece of code refers to.

    Attributes:
        modules: modules of the package.
        names: top-level names of its own file, fixtures among them.
        strings: string constants.
    """

    modules: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    strings: frozenset[str] = frozenset()


@dataclass
class Source:
    """A Python file.

    Attributes:
        name: name of the module; the path relative to the project for files that are no part of the package.
        path: the file.
    """

    name: str
    path: Path
    tree: ast.Module = field(repr=False)

    @cached_property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def bindings(self) -> dict[str, ast.stmt]:
        """The statement that binds each top-level name."""
        return {name: node for node in _statements(self.tree.body) for name in _bound(node)}

    @cached_property
    def lazy(self) -> dict[str, str]:
        """Names that the module imports when they are first used, with their modules: a dictionary of strings."""
        found: dict[str, str] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                pairs = zip(node.value.keys, node.value.values, strict=True)
                values = {
                    k.value: v.value for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)
                }
                found |= {
                    str(k): str(v) for k, v in values.items() if isinstance(v, str) and v.startswith(f"{PACKAGE}.")
                }
        return found


class Graph:
    """The dependencies of all files of the package, the tests, and the scripts that tests import."""

    def __init__(self) -> None:
        self.package = {_module(path): _parsed(_module(path), path) for path in sorted(SOURCE.rglob("*.py"))}
        self.slugs = _slugs()
        self._reached: dict[str, frozenset[str]] = {}

    # The package

    def reached(self, module: str) -> frozenset[str]:
        """All modules that a module depends on, itself among them."""
        if module not in self._reached:
            seen: set[str] = set()
            left = [module]
            while left:
                name = left.pop()
                if name in seen or name not in self.package:
                    continue
                seen.add(name)
                left += self._direct(name)
            self._reached[module] = frozenset(seen)
        return self._reached[module]

    @cache  # noqa: B019, one graph a process
    def _direct(self, name: str) -> frozenset[str]:
        """The modules that a module names, in imports and as slugs."""
        uses = self._uses(self.package[name].tree, self.package[name])
        return uses.modules | {module for slug in self.named(uses.strings) for module in self.slugs[slug]}

    def named(self, strings: Iterable[str]) -> set[str]:
        """The slugs that strings name: alone, in a list, with a step or an option."""
        found = set()
        for text in strings:
            words = re.split(r"[\s,]+", text) if len(text) < 60 else []
            parts = [*words, *re.findall(r"--([a-z][a-z0-9-]*)\.", text), *re.findall(r"methods[./]([a-z0-9_]+)", text)]
            found |= {each.replace("_", "-") for each in parts} & self.slugs.keys()
        return found

    def _resolve(self, module: str, name: str) -> str:
        """The module in which a name is defined that is imported from another one."""
        for _ in range(8):
            if f"{module}.{name}" in self.package:
                return f"{module}.{name}"
            source = self.package.get(module)
            if source is None:
                return module
            node = source.bindings.get(name)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
                original = next(each.name for each in node.names if (each.asname or each.name) == name)
                module, name = node.module, original
            elif name in source.lazy:
                module = source.lazy[name]
            else:
                return module
        return module

    def _uses(self, node: ast.AST, source: Source) -> Uses:
        """What a node refers to; imports for type checkers alone do not count."""
        modules: set[str] = set()
        names: set[str] = set()
        strings: set[str] = set()
        for each in _walk(node):
            if isinstance(each, ast.ImportFrom) and each.module and each.module.split(".")[0] == PACKAGE:
                modules |= {self._resolve(each.module, alias.name) for alias in each.names}
            elif isinstance(each, ast.Import):
                modules |= {alias.name for alias in each.names if alias.name.startswith(f"{PACKAGE}.")}
            elif isinstance(each, ast.Name):
                names.add(each.id)
            elif isinstance(each, ast.arg):
                names.add(each.arg)  # a fixture
            elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == PACKAGE:
                modules.add(self._resolve(PACKAGE, each.attr))
            elif isinstance(each, ast.Constant) and isinstance(each.value, str):
                strings.add(each.value)
                if re.fullmatch(rf"{PACKAGE}(\.\w+)+", each.value):
                    module, _, last = each.value.rpartition(".")
                    modules.add(each.value if each.value in self.package else self._resolve(module, last))
        return Uses(frozenset(modules & self.package.keys()), frozenset(names), frozenset(strings))

    # Tests

    @cached_property
    def _tests(self) -> dict[str, Source]:
        paths = sorted((ROOT / "tests").rglob("*.py"))
        return {str(path): _parsed(str(path.relative_to(ROOT)), path) for path in paths}

    @cached_property
    def _helpers(self) -> dict[str, str]:
        """The files that tests import by their name alone."""
        return {Path(path).stem: path for path in self._tests if not Path(path).stem.startswith(("test_", "conftest"))}

    @cache  # noqa: B019
    def _scopes(self, path: str) -> tuple[str, ...]:
        """A file, and the files whose fixtures it sees."""
        conftests = [str(parent / "conftest.py") for parent in Path(path).parents]
        return (path, *(each for each in conftests if each in self._tests and each != path))

    @cache  # noqa: B019
    def _links(self, path: str, name: str) -> tuple[Uses, tuple[tuple[str, str], ...]]:
        """What a top-level name of a file refers to, and the names of test files among it."""
        source = self._tests[path]
        node = source.bindings[name]
        uses = self._uses(node, source)
        found = [
            (scope, used) for used in uses.names for scope in self._scopes(path) if used in self._tests[scope].bindings
        ]
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module) in self._helpers:
            helper = self._helpers[str(node.module)]
            original = next((each.name for each in node.names if (each.asname or each.name) == name), name)
            found += [(helper, original)] if original in self._tests[helper].bindings else []
        if isinstance(node, ast.ImportFrom):  # of several names, this one alone
            alias = next((each for each in node.names if (each.asname or each.name) == name), None)
            if alias is not None and node.module and node.module.split(".")[0] == PACKAGE:
                module = self._resolve(node.module, alias.name)
                uses = Uses(frozenset({module} & self.package.keys()))
        return uses, tuple(found)

    @cache  # noqa: B019
    def of_test(self, path: str, function: str) -> tuple[frozenset[str], frozenset[str]]:
        """The modules and the strings that a test depends on, through the names and fixtures that it uses.

        Args:
            path: the file of the test.
            function: its top-level name: of the function, or of the class that has it.
        """
        modules, strings, seen = set[str](), set[str](), set[tuple[str, str]]()
        left = [(path, function)] if function in self._tests[path].bindings else []
        for scope in self._scopes(path):  # fixtures that every test uses
            left += [(scope, name) for name, node in self._tests[scope].bindings.items() if _is_autouse(node)]
        while left:
            each = left.pop()
            if each not in seen:
                seen.add(each)
                uses, found = self._links(*each)
                modules |= uses.modules
                strings |= uses.strings
                left += found
        return frozenset(modules), frozenset(strings)

    def is_dynamic(self, path: str, function: str) -> bool:
        """Whether a test asks the registry for methods that it does not name."""
        source = self._tests[path]
        imported = {
            alias.asname or alias.name
            for node in source.tree.body
            if isinstance(node, ast.ImportFrom) and node.module == f"{PACKAGE}.registry"
            for alias in node.names
            if alias.name in DYNAMIC
        }
        node = source.bindings.get(function)
        return node is not None and bool(imported & self._uses(node, source).names)


class Selection:
    """The tests that a set of changed files can reach.

    Args:
        changed: paths of the files, relative to the project.

    Attributes:
        everything: why all tests are selected; empty if only some are.
    """

    def __init__(self, changed: Iterable[str]) -> None:
        self.graph, self.everything = Graph(), ""
        self.modules, self.folders, self.files = set[str](), set[str](), set[Path]()
        for name in changed:
            self._add(name)

    def _add(self, name: str) -> None:
        path = ROOT / name
        folder = next((each for each in FOLDERS if name.startswith(f"{each}/")), "")
        if name.startswith(IGNORED):
            return
        if path.is_relative_to(SOURCE):
            if path.suffix == ".py" and path.exists():
                self.modules.add(_module(path))
            else:  # a template, data, or a file that is gone: whatever its folder has
                near = [_module(each) for each in path.parent.glob("*.py")] or [
                    _module(path.parent.parent / "__init__.py")
                ]
                self.modules |= set(near)
        elif name.startswith("tests/") and path.name.startswith("test_") and path.suffix == ".py":
            self.files.add(path)
        elif folder or name in DOCUMENTS:
            self.folders.add(folder or name)
            if name in ("pyproject.toml", "Makefile"):
                self.everything = f"{name} has changed"
        else:
            self.everything = f"{name} has changed, and it is not known what depends on it"

    def reaches(self, path: Path, function: str, values: Mapping[str, object]) -> bool:
        """Return whether a test can be reached.

        Args:
            path: its file.
            function: its top-level name in the file.
            values: the values of its parameters.
        """
        if self.everything or path in self.files:
            return True
        given = {str(value) for value in values.values() if isinstance(value, str)}
        given |= {str(value.slug) for value in values.values() if isinstance(getattr(value, "slug", None), str)}
        parameters = [value for value in values.values() if isinstance(value, Path) and value.is_relative_to(ROOT)]
        modules, strings = self.graph.of_test(str(path), function)
        slugs = self.graph.named([*strings, *given])
        needed = {*modules, *(module for slug in slugs for module in self.graph.slugs[slug])}
        if any(not self.modules.isdisjoint(self.graph.reached(module)) for module in needed):
            return True
        if any(_names(folder, strings, parameters) for folder in self.folders):
            return True
        changed = {_slug(module) for module in self.modules} - {""}
        on_one = bool(self.graph.named(given))  # its parameter is the method that it asks for
        return bool(changed) and not on_one and self.graph.is_dynamic(str(path), function)


def changed_files(base: str = "main") -> list[str] | None:
    """Return the files that differ from the merge base with a branch, changes that are not committed among them.

    Args:
        base: the branch.

    Returns:
        Paths relative to the project; None if it is not known, such as outside of a repository.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    try:
        start = git("merge-base", "HEAD", base).strip()
        found = (
            git("diff", "--name-only", start).splitlines()
            + git("ls-files", "--others", "--exclude-standard").splitlines()
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted(set(found))


def _names(folder: str, strings: Iterable[str], parameters: Iterable[Path]) -> bool:
    """Return whether strings or parameters name a folder or a file of the project."""
    last = folder.rpartition("/")[2]
    if any(last == text or f"{last}/" in text for text in strings if len(text) < 200):
        return True
    return any(str(path.relative_to(ROOT)).startswith(folder) for path in parameters)


def _slug(module: str) -> str:
    """The method or command that a module belongs to, as a name of its file; empty for engines."""
    parts = module.split(".")
    return parts[2] if parts[1:2] in (["methods"], ["commands"]) and len(parts) > 2 else ""


def _slugs() -> dict[str, list[str]]:
    """The modules of each method and command, by slug."""
    found: dict[str, list[str]] = {}
    for home in ("methods", "commands"):
        for path in sorted((SOURCE / PACKAGE / home).iterdir()):
            slug = path.stem.replace("_", "-")
            if path.is_dir() and path.name != "__pycache__":
                found[slug] = [_module(each) for each in sorted(path.rglob("*.py"))]
            elif path.suffix == ".py" and path.stem != "__init__":
                found[slug] = [_module(path)]
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parsed(name: str, path: Path) -> Source:
    return Source(name, path, ast.parse(path.read_text(encoding="utf-8")))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without docstrings, and without what only type checkers see."""
    yield node
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.If) and "TYPE_CHECKING" in ast.unparse(each.test):
            continue
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            continue
        yield from _walk(each)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
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


def _is_autouse(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "autouse=True" in ast.unparse(each) for each in node.decorator_list
    )
