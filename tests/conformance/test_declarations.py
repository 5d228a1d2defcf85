"""What every method and every command must declare, whoever wrote it: names, types, options, pages, reproductions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from worlds import COMMANDS, ROOT, SUITES, of_suite, opened, suite_of

import lamella
from lamella.cli.console import parsed
from lamella.errors import MethodError
from lamella.registry import KINDS, Method, Purpose, _check_names, all_commands, get_method, methods
from lamella.signature import EMPTY, entries, kind_of, settings_of, signature
from lamella.source import Module
from lamella.stack import ARCHITECTURES

METHODS = methods()
OURS = [slug for slug, entry in METHODS.items() if entry.module.startswith("lamella.")]  # not those of plugins
HOME = Path(lamella.__file__).parent / "methods"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_declaration_is_complete(command: str) -> None:
    entry = COMMANDS[command]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.slug) and re.fullmatch(r"[a-z0-9-]*", entry.name)
    assert entry.title.strip() == entry.title != ""
    assert entry.purpose in get_args(Purpose) and all(entry.inputs.values()) and entry.result
    assert entry.on in ("any", *KINDS) or set(entry.on) <= {*ARCHITECTURES, *KINDS}
    assert entry.paper is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.paper)
    settings = {name for each in entry.signature.inputs.values() for name in settings_of(each)}
    assert set(entry.brief) <= set(entry.options) | set(entry.inputs) | settings


def declared_in(file: Path) -> list[tuple[str, str]]:
    """The decorators over the functions of a file, with the slug that each says."""
    return [
        (decorator.func.id, ast.literal_eval(decorator.args[0]))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for decorator in getattr(node, "decorator_list", [])
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name)
        and decorator.func.id in ("method", "command")
    ]  # fmt: skip


def test_the_slug_that_a_source_says_is_the_name_of_its_file_or_folder() -> None:
    said: dict[str, list[str]] = {}
    for file in sorted(HOME.rglob("*.py")):
        place = file.relative_to(HOME).parts[0].removesuffix(".py")
        for decorator, slug in declared_in(file):
            assert slug == place.replace("_", "-"), f"{file} declares {slug}"
            said.setdefault(slug, []).append(decorator)
    assert all(decorators.count("method") == 1 for decorators in said.values())
    assert {slug: len(each) for slug, each in said.items()} == {slug: len(all_commands()[slug]) for slug in OURS}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_registry_names_the_function_that_the_source_declares(command: str) -> None:
    entry = COMMANDS[command]
    function = inspect.unwrap(getattr(importlib.import_module(entry.module), entry.function))
    assert (function.__module__, function.__name__) == (entry.module, entry.function)
    declared = declared_in(Path(inspect.getsourcefile(function)))
    assert ("command" if entry.name or entry.is_own else "method", entry.slug) in declared


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_of_the_docstring_says_what_it_does(command: str) -> None:
    entry = COMMANDS[command]
    assert entry.summary.endswith(".") and 20 <= len(entry.summary) <= 120
    if entry.paper:
        assert entry.paper in (inspect.getmodule(entry.call).__doc__ or "")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_given_by_name_have_defaults_and_are_documented(command: str) -> None:
    entry = COMMANDS[command]
    parameters = inspect.signature(entry.call).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(entry.inputs) != []
    if {"Stack", "Model"} & set(entry.inputs.values()):
        assert entry.inputs[positional[0]] in ("Stack", "Model")  # the model comes first
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values())
    for name, option in entry.options.items():
        assert option.default is not EMPTY and (option.hint is not Any or name == "tokenizer"), name
        assert name == "seed" or option.help, name
    for name, given in entry.signature.inputs.items():
        assert given.help, name


def test_every_command_is_in_one_suite() -> None:
    here = Path(__file__).parent
    assert sorted(each for name in SUITES for each in of_suite(name)) == sorted(COMMANDS)
    assert all((here / f"test_{name}.py").is_file() for name in SUITES if name != "own")  # that is test_results.py


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_returns_has_a_suite(command: str) -> None:
    assert suite_of(command) in SUITES, (
        f"{command} returns a {COMMANDS[command].result}, which no suite checks: return one of lamella.results, or "
        "a subclass of Result"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_input_can_be_opened_small(command: str) -> None:
    entry = COMMANDS[command]
    for each in entry.signature.inputs.values():
        kind = kind_of(each)
        assert kind is not None, f"{command} takes {each.name} as it is: give its type an open()"
        made = hasattr(kind, "read") or kind.__name__ in (
            "Stack",
            "Model",
            "SavedModel",
            "LazyCheckpoint",
            "ComparedModel",
            "Results",
            "Adapter",
            "Writer",
        )
        left_out = each.default is not EMPTY and entry.brief.get(each.name, "") is None
        assert made or left_out or hasattr(kind, "example") or hasattr(kind, "default"), (
            f"{command} needs {each.name}: give {kind.__name__} an `example = Fixture(...)`, as lamella.signature says"
        )


@pytest.mark.parametrize("slug", OURS)
def test_it_has_a_page_that_names_its_commands(slug: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{slug}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {slug}\n")
    for name, entry in all_commands()[slug].items():
        is_recipe = entry.result == "Healed" and "plan" in entry.inputs
        typed = "lamella heal" if is_recipe else f"`{name}`" if name else slug
        assert typed in page, f"the page does not say {typed}"


@pytest.mark.parametrize("slug", [slug for slug in OURS if METHODS[slug].reproduced])
def test_it_has_a_reproduction(slug: str) -> None:
    assert (ROOT / "reproductions" / f"{slug.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused_with_the_known_ones(command: str) -> None:
    slug = COMMANDS[command].slug
    with pytest.raises(MethodError, match=f"{slug} has no option 'nonsense'; its options are: ") as error:
        COMMANDS[command](opened("llama"), nonsense=1)
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(MethodError, match="unknown method 'finrcut'; did you mean finercut") as error:
        get_method("finrcut")
    assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="unknown method 'zzzzzz'"):
        get_method("zzzzzz")


def test_the_registry_is_sorted() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert {"finercut", "unified-skip", "shortgpt", "window", "sleb", "random"} <= set(METHODS)


@pytest.mark.parametrize("slug", OURS)
def test_a_baseline_is_one_in_its_declaration_and_in_its_title(slug: str) -> None:
    assert METHODS[slug].baseline == ("baseline" in METHODS[slug].title.lower())


@pytest.mark.parametrize("slug", OURS)
def test_the_changelog_names_it(slug: str) -> None:
    changes = ROOT / "changes" / f"{slug}.md"
    assert changes.is_file() or slug in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), f"write {changes}"


PLUGIN = '''"""Of a plugin: a method from outside."""

from lamella.registry import command, method
from lamella.stack import Stack


@method("of-a-plugin", purpose="measure", on="any", brief={"much": 1})
def of_a_plugin(stack: Stack, *, much: int = 3) -> int:
    """Do nothing at all, but from outside."""
    return much


@command("of-a-plugin", "twice")
def twice(stack: Stack, *, much: int = 3) -> int:
    """Do the same, twice as much, from outside too."""
    return 2 * much
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package with a method of its own as pip would: its module, and the entry point in its metadata."""

    def install(slug: str = "of-a-plugin", source: str = PLUGIN) -> None:
        (tmp_path / "from_outside.py").write_text(source)
        metadata = tmp_path / "from_outside-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: from-outside\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[lamella.methods]\n{slug} = from_outside\n")

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_a_plugin_s_methods_are_found_through_entry_points(plugin: Callable[..., None]) -> None:
    plugin()
    assert "of-a-plugin" in methods() and "from_outside" not in sys.modules  # read, not imported
    found = get_method("of-a-plugin")
    assert isinstance(found, Method) and found.summary == "Do nothing at all, but from outside."
    assert (found.inputs, found.result, found.purpose) == ({"stack": "Stack"}, "int", "measure")
    assert found(opened("llama"), much=2) == 2 and get_method("of-a-plugin", "twice")(opened("llama"), much=2) == 4
    with pytest.raises(MethodError, match="has no command 'thrice'; it has: twice"):
        get_method("of-a-plugin", "thrice")
    with pytest.raises(MethodError, match="returns a int, not plans"):
        lamella.make_plan("of-a-plugin", opened("llama"))
    del sys.modules["from_outside"]


@pytest.mark.parametrize(
    ("slug", "source", "said"),
    [
        ("finercut", PLUGIN, "two packages have the method 'finercut'"),
        ("another", PLUGIN, "declares no method 'another'"),
        ("of-a-plugin", PLUGIN.replace('on="any"', "on=any()"), "must be literals"),
        ("of-a-plugin", PLUGIN.replace('on="any"', 'off="any"'), "no 'off'"),
    ],
)
def test_a_plugin_that_declares_what_cannot_be_is_refused_in_one_line(
    plugin: Callable[..., None], slug: str, source: str, said: str
) -> None:
    plugin(slug, source)
    with pytest.raises(MethodError, match=said) as error:
        methods()
    assert "\n" not in str(error.value)


def test_listing_the_methods_imports_neither_them_nor_torch() -> None:
    code = "import sys, lamella.registry as r; r.methods(); print({name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch'" not in done.stdout and "'lamella'" in done.stdout


TUPLES = [  # every option that is a tuple, with its command
    pytest.param(command, name, id=f"{command} {name}")
    for command, entry in COMMANDS.items()
    for name, option in entry.options.items()
    if any(get_origin(kind) is tuple for kind in option.kinds) and str not in option.kinds
]


def gathered(entry: Method, name: str, value: Any) -> Any:
    """An option as the function gets it, or what a group of options says against its value."""
    try:
        given = entry.signature.collect(entry.slug, {name: value})
    except MethodError as error:
        return str(error)
    option = entry.options[name]
    return getattr(given[option.group], name) if option.group else given[name]


@pytest.mark.parametrize(("command", "name"), TUPLES)
def test_a_list_or_a_string_with_commas_stands_for_a_tuple(command: str, name: str) -> None:
    entry = COMMANDS[command]
    option = entry.options[name]
    kind = next(entries(kind) for kind in option.kinds if get_origin(kind) is tuple)
    value = {int: "3", float: "0.5"}.get(kind[0], str(next(iter(get_args(kind[0])), "word")))
    text = value if Ellipsis in kind else ", ".join([value] * len(kind))
    wanted = parsed(entry.slug, option, text, f"--{name} {text}") if kind[0] in (int, float, str) else (value,)
    assert gathered(entry, name, text) == gathered(entry, name, wanted)
    assert gathered(entry, name, list(wanted)) == gathered(entry, name, wanted)
    with pytest.raises(MethodError, match=f"{entry.slug}: {name} .*empty entry"):
        entry.signature.collect(entry.slug, {name: f"{value},,{value}"})
    if kind[0] in (int, float):
        with pytest.raises(MethodError, match=f"{entry.slug}: {name} word: give .*numbers"):
            entry.signature.collect(entry.slug, {name: "word"})


def test_a_name_given_for_a_tuple_of_names_is_one_name_to_the_method() -> None:
    with pytest.raises(MethodError, match="has no cut 'nosuch'"):
        lamella.run("caprecover", "digits", images="digits", cuts="nosuch")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_has_the_name_of_one_of_the_runner(command: str) -> None:
    assert COMMANDS[command].declared.options is not None  # it is refused when its source is read


@pytest.mark.parametrize(
    ("parameter", "name"),
    [("output: float = 1.0", "output"), ('stack_: Annotated[str, Named("of-stack")] = ""', "of_stack")],
)
def test_an_option_with_the_name_of_one_of_the_runner_is_refused(parameter: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from typing import Annotated\n"
        "from lamella.registry import method\nfrom lamella.signature import Named\n"
        'from lamella.stack import Stack\n\n@method("mine", purpose="prune")\n'
        f'def mine(stack: Stack, *, {parameter}) -> None:\n    """Do nothing."""\n'
    )
    function = Module("mine", file).get("mine")
    with pytest.raises(MethodError, match=f"mine: every command has an option named {name}"):
        _check_names("mine", signature(function))
