"""The registry: a slug names one file or folder, which is read at once and imported when it is used.

    @method("finercut", paper="2405.18218", purpose="prune")
    def finercut(stack: Stack, calibration: Tokens, *, remove: float = 0.25) -> PlanSeries:
        ...

The signature is the contract: positional parameters are what the method must be given, keyword-only ones are its
options with their defaults, and the return annotation is what comes back. What else there is to know stands in the
decorator, in literals, so the list of all methods comes from their source; neither they nor torch are imported for it.

A method of several steps has a command for each further one, ``@command("first", "tune")`` in the same folder. Packages
outside Lamella add methods through the entry-point group ``lamella.methods``: the name of an entry is the slug, its
value the module.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, partial, wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from lamella.errors import MethodError
from lamella.provenance import stamp
from lamella.signature import Parameter, Signature, settings_of, signature
from lamella.source import locate, read_module

Purpose = Literal["prune", "skip", "heal", "adapt", "repair", "rewrite", "recycle", "measure", "vision"]
Function = TypeVar("Function", bound=Callable[..., Any])

GROUP = "lamella.methods"
MASKED = "masked tokens"
FEATURES = "features"
EXPERTS = "experts"
CROSS = "cross"
LAYERNORM = "layernorm"
IMAGES = "images"
KINDS = {  # as messages call them
    "decoder": "decoders",
    EXPERTS: "models with experts",
    CROSS: "decoders that read an encoder",
    MASKED: "models that predict masked tokens",
    FEATURES: "encoders, whose features others read",
    IMAGES: "models that read images beside text",
    LAYERNORM: "models that are known to read their stream through LayerNorms alone (Pre-LN)",
}
MAIN = ("method", "command")  # the file of a folder that declares it
RESERVED = frozenset(  # options of every command
    {"slug", "out", "output", "overwrite", "json", "allow_pickle", "of_stack", "command", "help", "debug"}
    | {"config", "dry_run", "schema"}
)
PERMISSIONS = frozenset(  # options that are typed, and that no file gives
    {"allow_pickle", "overwrite", "output", "run_generated_code", "trust_tasks"}
)
HOMES = {"methods": Path(__file__).parent / "methods", "commands": Path(__file__).parent / "commands"}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What the decorator of a command says.

    Attributes:
        slug: of the method: its name on the command line, and that of its file or folder.
        name: of a further command of the method; empty for the method itself.
        paper: its arXiv number; a method of our own has none.
        purpose: what it is for.
        on: what it works on: a ``decoder``, ``any`` model, one with ``experts``, one whose decoder reads an encoder
            (``cross``), one whose stream is read through LayerNorms alone (``layernorm``), an objective such as
            ``masked tokens``, the names of architectures; or several of these.
        verb: its command on the command line, where it has one.
        brief: what makes it run in seconds on a tiny model, for the conformance tests: options, settings of inputs, and
            inputs that cannot be the ``example`` of their type.
        baseline: whether it is there to compare with.
        slow: a search that may take hours, which ``--method all`` leaves out.
        dense: its plans leave out no work, since dense kernels compute with zeros as with any number.
    """

    slug: str
    name: str = ""
    paper: str | None = None
    purpose: Purpose = "measure"
    on: str | tuple[str, ...] = "decoder"
    verb: str | None = None
    brief: Mapping[str, Any] = field(default_factory=dict)
    baseline: bool = False
    slow: bool = False
    dense: bool = False

    @property
    def reproduced(self) -> bool:
        """Whether a reproduction stands for it: it has a paper, and is more than there to compare with."""
        return self.paper is not None and not self.baseline


@dataclass(frozen=True, kw_only=True)
class Method(Declaration):
    """One command of a method as its source declares it; the code is imported when it is called.

    Attributes:
        module, function: where it is.
        title: the first line of its file.
        summary: the first line of its docstring.
        inputs: the types of what it must be given, by parameter, as written.
        result: the type of what comes back, as written.
    """

    module: str
    function: str
    title: str
    summary: str
    inputs: Mapping[str, str]
    result: str

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function itself."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function

    @property
    def is_own(self) -> bool:
        """Whether it is a command of Lamella itself, and no method."""
        return self.module.startswith("lamella.commands.")

    @property
    def text(self) -> str:
        """The name of the text that it measures on; empty where it takes none."""
        return self._of_kind("Text")

    @property
    def samples(self) -> str:
        """The name of its samples, which can be cut from a text; empty where it takes none."""
        return self._of_kind("Samples")

    @property
    def reads_images(self) -> bool:
        """Whether images with text may stand for a text that it takes, if it takes any."""
        return not self.samples and (not self.text or "ImageText" in self.inputs[self.text].split(" | "))

    def _of_kind(self, wanted: str) -> str:
        return next((name for name, kind in self.inputs.items() if kind.split(" | ")[0] == wanted), "")

    @cached_property
    def signature(self) -> Signature:
        """What it takes and returns."""
        return signature(self.call)

    @property
    def doc(self) -> str:
        """The docstring of the function."""
        return read_module(self.module).get(self.function).__doc__ or ""

    @cached_property
    def declared(self) -> Signature:
        """The same as its source declares it, for which nothing is imported.

        Raises:
            MethodError: for a parameter with the name of an option that every command has.
        """
        contract = signature(read_module(self.module).get(self.function))
        _check_names(self.slug, contract)
        return contract

    @property
    def options(self) -> Mapping[str, Parameter]:
        """The options with their types, defaults and meaning."""
        return self.signature.options

    def takes(self, stack: Any) -> bool:
        """Whether the method works on a model."""
        return _works_on(self.on, stack)

    def __call__(self, *args: Any, **options: Any) -> Any:
        parameters = inspect.signature(self.call).parameters.values()
        unknown = sorted(set(options) - set(self.options) - {each.name for each in parameters})
        if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters):
            known = ", ".join(self.options) or "none"
            raise MethodError(f"{self.slug} has no option '{unknown[0]}'; its options are: {known}")
        return self.call(*args, **options)


def method(
    slug: str,
    *,
    purpose: Purpose,
    paper: str | None = None,
    on: str | tuple[str, ...] = "decoder",
    verb: str | None = None,
    brief: Mapping[str, Any] | None = None,
    baseline: bool = False,
    slow: bool = False,
    dense: bool = False,
) -> Callable[[Function], Function]:
    """Declare a function as the method of that slug; see :class:`Declaration`.

    What it returns says where it comes from, and dataclasses among its options can be given field by field.
    """
    return partial(_declared_as, slug, "", on)


def command(
    slug: str,
    name: str = "",
    *,
    on: str | tuple[str, ...] = "decoder",
    verb: str | None = None,
    brief: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Declare a function as a further command of the method of that slug, or without a name as one of Lamella's own."""
    return partial(_declared_as, slug, name, on)


def _declared_as(slug: str, name: str, on: str | tuple[str, ...], function: Function) -> Function:
    @wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        contract = signature(function)
        _check_names(slug, contract)
        given = contract.gathered(slug, given)
        check_passed_once(slug, contract, args, given)
        if args and hasattr(args[0], "architecture"):
            check_takes(slug, on, args[0])
        elif args and hasattr(args[0], "stacks") and _takes_one_stack(contract):
            args = (fitting_stack(slug, on, args[0]), *args[1:])
        result = function(*args, **given)
        said = getattr(result, "provenance", None)
        if isinstance(said, dict):
            bound = inspect.signature(function).bind(*args, **given)
            bound.apply_defaults()
            inputs = {each: bound.arguments[each] for each in contract.inputs}
            options = {each: value for each, value in bound.arguments.items() if each in contract.options}
            for group in contract.groups:
                parts = [part for part in contract.options.values() if part.group == group]
                value = bound.arguments[group]
                options |= {} if value is None else {part.name: getattr(value, part.part) for part in parts}
            stamp(said, slug, name, options, inputs)
        return result

    return called  # type: ignore[return-value]


def _check_names(slug: str, contract: Signature) -> None:
    """Check that no parameter of a command, and no setting of its inputs, has the name of an option of the runner.

    Raises:
        MethodError: one line that names it.
    """
    names = {**contract.inputs, **contract.options}
    names |= {name: each for parameter in contract.inputs.values() for name, each in settings_of(parameter).items()}
    for name, each in names.items():
        taken = {name, each.option.removeprefix("--").replace("-", "_")} & RESERVED
        if taken:
            raise MethodError(
                f"{slug}: every command has an option called {min(taken)}: choose another name for {name}"
            )


def check_passed_once(slug: str, contract: Signature, inputs: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Check that no input is given by its place and by its name.

    Raises:
        MethodError: one line that says so.
    """
    twice = next((name for name, _ in zip(contract.inputs, inputs, strict=False) if name in given), None)
    if twice is not None:
        hint = "; a stack of the model is chosen by its name as of_stack" if twice == "stack" else ""
        raise MethodError(f"{slug}: {twice} is given twice, in its place and by its name: leave one of them out{hint}")


def _takes_one_stack(contract: Signature) -> bool:
    """Whether the first input is one stack of a model, not all of it."""
    first = next(iter(contract.inputs.values()), None)
    return first is not None and "Stack" in [getattr(kind, "__name__", "") for kind in first.kinds]


def fitting_stack(slug: str, on: str | tuple[str, ...], model: Any) -> Any:
    """The only stack of a model that a method works on.

    Args:
        on: what it works on, as it declares.
        model: one with several stacks.

    Raises:
        MethodError: when it works on none of them, or on several.
    """
    fitting = [stack for stack in model.stacks.values() if _works_on(on, stack)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [stack.stack for stack in fitting]
        raise MethodError(
            f"{slug} works on the stacks {' and '.join(names)} of {model.name}: choose one with --stack {names[-1]} "
            "(of_stack in Python)"
        )
    found = " and ".join(f"{name}, a {stack.architecture.name}" for name, stack in model.stacks.items())
    raise MethodError(f"{slug} works on {_described(on)}; {model.name} has the stacks {found}")


def check_takes(slug: str, on: str | tuple[str, ...], stack: Any) -> None:
    """Check that a method works on a model.

    Args:
        on: what it works on, as it declares.

    Raises:
        MethodError: one line that says so.
    """
    architecture = stack.architecture
    if not _works_on(on, stack):
        kind = f", which predicts {architecture.objective}" if architecture.denoises else ""
        raise MethodError(f"{slug} works on {_described(on)}; {stack.name} is a {architecture.name}{kind}")


def _described(on: str | tuple[str, ...]) -> str:
    return ", ".join(KINDS.get(each, each) for each in _kinds(on))


def _kinds(on: str | tuple[str, ...]) -> tuple[str, ...]:
    return (on,) if isinstance(on, str) else on


def _works_on(on: str | tuple[str, ...], stack: Any) -> bool:
    architecture, kinds = stack.architecture, _kinds(on)
    fits = {"any", architecture.name, architecture.objective} | ({"decoder"} if architecture.causal else set())
    fits |= {CROSS} if CROSS in architecture.names else set()
    fits |= {IMAGES} if architecture.images else set()
    fits |= {LAYERNORM} if architecture.centred_before(stack.config) else set()
    return not fits.isdisjoint(kinds) or (EXPERTS in kinds and stack.experts is not None)


def methods() -> dict[str, Method]:
    """Every method by slug, those of installed plugins among them."""
    return {slug: known[""] for slug, known in all_commands().items() if not known[""].is_own}


def all_commands() -> dict[str, dict[str, Method]]:
    """Every command, by slug and name: those of all methods, and Lamella's own."""
    return dict(sorted(_everything().items()))


def commands(slug: str) -> dict[str, Method]:
    """The commands of a method by name, the method itself under the empty one.

    Raises:
        MethodError: for an unknown slug; the message names the nearest ones.
    """
    known = _everything()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4) or sorted(known)
        raise MethodError(f"unknown method '{slug}'; did you mean {' or '.join(near)}? `lamella methods` lists all")
    return known[slug]


def get_method(slug: str, name: str = "") -> Method:
    """A method, or a command of it.

    Raises:
        MethodError: when there is none; the message names the nearest ones.
    """
    known = commands(slug)
    if name not in known:
        raise MethodError(f"{slug} has no command '{name}'; it has: {', '.join(filter(None, known)) or 'none'}")
    return known[name]


def room(slug: str, name: str) -> Any:
    """The module of a method that holds one kind of its code: of a folder the file of that name, such as ``policy``.

    Raises:
        MethodError: for an unknown slug.
    """
    module = get_method(slug).module
    package, _, last = module.rpartition(".")
    if last in MAIN:
        place = Path(importlib.import_module(package).__path__[0])
        if (place / f"{name}.py").is_file() or (place / name).is_dir():
            return importlib.import_module(f"{package}.{name}")
    return importlib.import_module(module)


def bring(model_type: str) -> None:
    """Import the class of model that a method brings, whose type is its slug with underscores; it registers itself.

    Nothing happens for any other type: of a checkpoint, the type is a name and no more.
    """
    slug = model_type.replace("_", "-")
    if "_" in model_type and slug in _everything():
        room(slug, "network")


# Reading


def _everything() -> dict[str, dict[str, Method]]:
    found: dict[str, dict[str, Method]] = {}
    for package, home in HOMES.items():
        for place in sorted(home.iterdir()):
            is_module = place.suffix == ".py" and place.stem != "__init__"
            if is_module or any((place / f"{main}.py").is_file() for main in MAIN):
                slug = place.stem.replace("_", "-")
                found[slug] = _read(slug, f"lamella.{package}.{place.stem}", place)
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            raise MethodError(f"two packages have the method '{entry.name}': Lamella itself and {entry.value}")
        found[entry.name] = _read(entry.name, entry.module, _place(entry.module))
    return found


@cache
def _read(slug: str, module: str, place: Path) -> dict[str, Method]:
    """The commands that a file or a folder declares, by name."""
    files = {module: place}
    if place.is_dir():
        files = {f"{module}.{file.stem}": file for file in sorted(place.glob("*.py"))}
    found = {each.name: each for name, file in files.items() for each in _declared(name, file) if each.slug == slug}
    if "" not in found:
        raise MethodError(f"{place} declares no method '{slug}': write @method(\"{slug}\", ...) over its function")
    return found


def _declared(module: str, file: Path) -> Iterator[Method]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    title = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    for node in (each for each in tree.body if isinstance(each, ast.FunctionDef)):
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in ("method", "command"):
                said = _literals(decorator, file)
                positional = node.args.posonlyargs + node.args.args
                yield Method(
                    **said,
                    module=module,
                    function=node.name,
                    title=title,
                    summary=(ast.get_docstring(node) or "").split("\n", 1)[0],
                    inputs={each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in positional},
                    result=ast.unparse(node.returns) if node.returns else "",
                )


def _literals(decorator: ast.Call, file: Path) -> dict[str, Any]:
    try:
        given = dict(zip(("slug", "name"), map(ast.literal_eval, decorator.args), strict=False))
        said = given | {str(each.arg): ast.literal_eval(each.value) for each in decorator.keywords}
    except ValueError:
        raise MethodError(f"{file} line {decorator.lineno}: what a decorator declares must be literals") from None
    unknown = set(said) - {each.name for each in fields(Declaration)}
    if unknown or "slug" not in said:
        wrong = f"no '{min(unknown)}'" if unknown else "a slug"
        raise MethodError(f"{file} line {decorator.lineno}: a declaration has {wrong}")
    return said


def _place(module: str) -> Path:
    """The file or folder of a module of another package, found without importing it.

    Raises:
        MethodError: when it is not there.
    """
    try:
        return locate(module)
    except ModuleNotFoundError:
        raise MethodError(
            f"the entry point of a plugin names {module}, which is not installed: install it again"
        ) from None
