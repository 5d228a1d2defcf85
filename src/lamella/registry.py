"""The registry of commands: a slug names one file or folder, which is read statically and imported when it is used.

    @method("finercut", paper="2405.18218", purpose="prune")
    def finercut(stack: Stack, calibration: Text, *, remove: float = 0.25) -> PlanSeries:
        ...

The signature is the contract: positional parameters are inputs, keyword-only parameters are options with their
defaults, and the return annotation is the type of the result. Everything else is declared in the decorator, in
literals, so that methods are listed from their source; neither they nor torch are imported for it.

A method with several steps has a command for each further step, ``@command("first", "tune")`` in the same folder. Other
packages add methods through the entry-point group ``lamella.methods``: the name of an entry is the slug, its value the
module.
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
KINDS = {  # as named in messages
    "decoder": "decoders",
    EXPERTS: "models with experts",
    CROSS: "decoders with cross-attention to an encoder",
    MASKED: "models that predict masked tokens",
    FEATURES: "encoders that provide features",
    IMAGES: "models of images and text",
    LAYERNORM: "models whose residual stream is known to be read through LayerNorms only (Pre-LN)",
}
MAIN = ("method", "command")  # names of the file in a folder that holds the declaration
RESERVED = frozenset(  # options of every command
    {"slug", "out", "output", "overwrite", "json", "allow_pickle", "of_stack", "command", "help", "debug"}
    | {"config", "dry_run", "estimate", "schema"}
)
PERMISSIONS = frozenset(  # options that must be typed and are never read from a file
    {"allow_pickle", "overwrite", "output", "run_generated_code", "trust_tasks"}
)
HOMES = {"methods": Path(__file__).parent / "methods", "commands": Path(__file__).parent / "commands"}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What the decorator of a command declares.

    Attributes:
        slug: slug of the method: its name on the command line, and that of its file or folder.
        name: name of a further command of the method; empty for the method itself.
        paper: arXiv number; None for methods that are not from a paper.
        purpose: what the method is for.
        on: the models that it works on: a ``decoder``, ``any`` model, one with ``experts``, a decoder with
            cross-attention to an encoder (``cross``), one whose residual stream is read by LayerNorms only
            (``layernorm``), an objective such as ``masked tokens``, names of architectures; or several of these.
        verb: name of its top-level command on the command line, if it has one.
        brief: options, loader settings and inputs with which it runs in seconds on a tiny model, for conformance tests.
        baseline: whether it exists for comparison only.
        slow: whether its search may take hours; ``--method all`` leaves it out.
        dense: whether its plans save no work, since dense kernels compute zeros like any other value.
        unloaded: whether, in a job of several processes, its model is opened without weights where that is possible:
            each process loads those that it needs.
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
    unloaded: bool = False

    @property
    def reproduced(self) -> bool:
        """Whether it has a reproduction: it has a paper and is more than a baseline."""
        return self.paper is not None and not self.baseline


@dataclass(frozen=True, kw_only=True)
class Method(Declaration):
    """A command of a method as declared in its source; the code is imported when it is called.

    Attributes:
        module: name of its module.
        function: name of its function.
        title: first line of the module's docstring.
        summary: first line of the function's docstring.
        inputs: the types of its inputs by parameter, as written.
        result: the type of its result, as written.
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
        """Whether it is a command of Lamella itself and not of a method."""
        return self.module.startswith("lamella.commands.")

    @property
    def text(self) -> str:
        """The name of its text input; empty if there is none."""
        return self._of_kind("Text")

    @property
    def samples(self) -> str:
        """The name of its input of samples, which can be cut from a text; empty if there is none."""
        return self._of_kind("Samples")

    @property
    def reads_images(self) -> bool:
        """Whether images with text can replace its text input, if it has one."""
        return not self.samples and (not self.text or "ImageText" in self.inputs[self.text].split(" | "))

    def _of_kind(self, wanted: str) -> str:
        return next((name for name, kind in self.inputs.items() if kind.split(" | ")[0] == wanted), "")

    @cached_property
    def signature(self) -> Signature:
        """Its inputs, options and result."""
        return signature(self.call)

    @property
    def doc(self) -> str:
        """The docstring of the function."""
        return read_module(self.module).get(self.function).__doc__ or ""

    @cached_property
    def declared(self) -> Signature:
        """The signature as declared in its source, for which nothing is imported.

        Raises:
            MethodError: if a parameter has the name of an option of every command.
        """
        contract = signature(read_module(self.module).get(self.function))
        _check_names(self.slug, contract)
        return contract

    @property
    def options(self) -> Mapping[str, Parameter]:
        """The options with their types, defaults and help."""
        return self.signature.options

    def takes(self, stack: Any) -> bool:
        """Return whether the method works on a model.

        Args:
            stack: the stack of the model.
        """
        return _works_on(self.on, stack)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function with inputs by position and options by name.

        Raises:
            MethodError: for an unknown option.
        """
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

    Its result is stamped with its provenance, and fields of dataclasses among its options can be given one by one.

    Args:
        slug: slug of the method.
        purpose: what the method is for.
        paper: arXiv number.
        on: the models that it works on.
        verb: name of its top-level command.
        brief: options and inputs for conformance tests.
        baseline: whether it exists for comparison only.
        slow: whether its search may take hours.
        dense: whether its plans save no work.
    """
    return partial(_declared_as, slug, "", on)


def command(
    slug: str,
    name: str = "",
    *,
    on: str | tuple[str, ...] = "decoder",
    verb: str | None = None,
    brief: Mapping[str, Any] | None = None,
    unloaded: bool = False,
) -> Callable[[Function], Function]:
    """Declare a function as a further command of a method, or without a name as one of Lamella's own commands.

    Args:
        slug: slug of the method, or of the command itself.
        name: name of the further command.
        on: the models that it works on.
        verb: name of its top-level command.
        brief: options and inputs for conformance tests.
        unloaded: whether several processes open its model without weights.
    """
    return partial(_declared_as, slug, name, on)


def _declared_as(slug: str, name: str, on: str | tuple[str, ...], function: Function) -> Function:
    @wraps(function)
    def wrapped(*args: Any, **given: Any) -> Any:
        contract = signature(function)
        _check_names(slug, contract)
        given = contract.collect(slug, given)
        check_passed_once(slug, contract, args, given)
        if args and hasattr(args[0], "architecture"):
            check_takes(slug, on, args[0])
        elif args and hasattr(args[0], "stacks") and _takes_one_stack(contract):
            args = (fitting_stack(slug, on, args[0]), *args[1:])
        _check_tokens(slug, (*args, *given.values()))
        result = function(*args, **given)
        provenance = getattr(result, "provenance", None)
        if isinstance(provenance, dict):
            bound = inspect.signature(function).bind(*args, **given)
            bound.apply_defaults()
            inputs = {each: bound.arguments[each] for each in contract.inputs}
            options = {each: value for each, value in bound.arguments.items() if each in contract.options}
            for group in contract.groups:
                parts = [part for part in contract.options.values() if part.group == group]
                value = bound.arguments[group]
                options |= {} if value is None else {part.name: getattr(value, part.part) for part in parts}
            stamp(provenance, slug, name, options, inputs)
        return result

    return wrapped  # type: ignore[return-value]


def _check_tokens(slug: str, values: tuple[Any, ...]) -> None:
    """Check that no plan renames the tokens of an opened model, since texts are tokenized for the original.

    Raises:
        MethodError: if one does.
    """
    is_open = any(hasattr(value, "architecture") for value in values)
    if is_open and any(getattr(value, "renames_tokens", False) for value in values):
        raise MethodError(
            f"{slug}: the plan keeps some tokens only and renames them, but texts are tokenized for the original: "
            f"write the smaller model first (lamella apply), and give it to {slug}"
        )


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
            raise MethodError(f"{slug}: every command has an option named {min(taken)}: choose another name for {name}")


def check_passed_once(slug: str, contract: Signature, inputs: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Check that no input is given both by position and by name.

    Args:
        slug: the command, for messages.
        contract: its signature.
        inputs: values by position.
        given: values by name.

    Raises:
        MethodError: if one is.
    """
    twice = next((name for name, _ in zip(contract.inputs, inputs, strict=False) if name in given), None)
    if twice is not None:
        hint = "; a stack of the model is chosen by its name as of_stack" if twice == "stack" else ""
        raise MethodError(f"{slug}: {twice} is given both by position and by name: give it once{hint}")


def _takes_one_stack(contract: Signature) -> bool:
    """Return whether the first input is one stack of a model, not the whole model."""
    first = next(iter(contract.inputs.values()), None)
    return first is not None and "Stack" in [getattr(kind, "__name__", "") for kind in first.kinds]


def fitting_stack(slug: str, on: str | tuple[str, ...], model: Any) -> Any:
    """Return the only stack of a model that a method works on.

    Args:
        slug: the method.
        on: the models that it works on, as declared.
        model: a model with several stacks.

    Raises:
        MethodError: if it works on none of them, or on several.
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
        slug: the method.
        on: the models that it works on, as declared.
        stack: the stack of the model.

    Raises:
        MethodError: if it does not.
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
    """Return every method by slug, including those of installed plugins."""
    return {slug: known[""] for slug, known in all_commands().items() if not known[""].is_own}


def all_commands() -> dict[str, dict[str, Method]]:
    """Return every command, by slug and name: those of all methods, and Lamella's own."""
    return dict(sorted(_everything().items()))


def commands(slug: str) -> dict[str, Method]:
    """Return the commands of a method by name; the method itself has the empty name.

    Args:
        slug: the method.

    Raises:
        MethodError: for an unknown slug; the message suggests similar ones.
    """
    known = _everything()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4) or sorted(known)
        raise MethodError(f"unknown method '{slug}'; did you mean {' or '.join(near)}? `lamella methods` lists all")
    return known[slug]


def get_method(slug: str, name: str = "") -> Method:
    """Return a method, or a further command of it.

    Args:
        slug: the method.
        name: name of the further command; empty for the method itself.

    Raises:
        MethodError: if there is none; the message suggests similar ones.
    """
    known = commands(slug)
    if name not in known:
        raise MethodError(f"{slug} has no command '{name}'; it has: {', '.join(filter(None, known)) or 'none'}")
    return known[name]


def submodule(slug: str, name: str) -> Any:
    """Return the submodule of a method with one kind of its code, such as ``policy``; of a file, the module itself.

    Args:
        slug: the method.
        name: name of the submodule.

    Raises:
        MethodError: for an unknown slug.
    """
    module = get_method(slug).module
    package, _, last = module.rpartition(".")
    if last in MAIN:
        folder = Path(importlib.import_module(package).__path__[0])
        if (folder / f"{name}.py").is_file() or (folder / name).is_dir():
            return importlib.import_module(f"{package}.{name}")
    return importlib.import_module(module)


def import_network(model_type: str) -> None:
    """Import the network of a method whose ``model_type`` is its slug with underscores; the network registers itself.

    Nothing happens for any other type: the type of a checkpoint is only a name.

    Args:
        model_type: the ``model_type`` of a checkpoint.
    """
    slug = model_type.replace("_", "-")
    if "_" in model_type and slug in _everything():
        submodule(slug, "network")


# Reading


def _everything() -> dict[str, dict[str, Method]]:
    found: dict[str, dict[str, Method]] = {}
    for package, home in HOMES.items():
        for path in sorted(home.iterdir()):
            is_module = path.suffix == ".py" and path.stem != "__init__"
            if is_module or any((path / f"{main}.py").is_file() for main in MAIN):
                slug = path.stem.replace("_", "-")
                found[slug] = _read(slug, f"lamella.{package}.{path.stem}", path)
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            raise MethodError(f"two packages have the method '{entry.name}': Lamella itself and {entry.value}")
        found[entry.name] = _read(entry.name, entry.module, _locate(entry.module))
    return found


@cache
def _read(slug: str, module: str, path: Path) -> dict[str, Method]:
    """Return the commands that a file or a folder declares, by name."""
    files = {module: path}
    if path.is_dir():
        files = {f"{module}.{file.stem}": file for file in sorted(path.glob("*.py"))}
    found = {each.name: each for name, file in files.items() for each in _declared(name, file) if each.slug == slug}
    if "" not in found:
        raise MethodError(f"{path} declares no method '{slug}': write @method(\"{slug}\", ...) over its function")
    return found


def _declared(module: str, file: Path) -> Iterator[Method]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    title = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    for node in (each for each in tree.body if isinstance(each, ast.FunctionDef)):
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in ("method", "command"):
                declaration = _literals(decorator, file)
                positional = node.args.posonlyargs + node.args.args
                yield Method(
                    **declaration,
                    module=module,
                    function=node.name,
                    title=title,
                    summary=(ast.get_docstring(node) or "").split("\n", 1)[0],
                    inputs={each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in positional},
                    result=ast.unparse(node.returns) if node.returns else "",
                )


def _literals(decorator: ast.Call, file: Path) -> dict[str, Any]:
    try:
        positional = dict(zip(("slug", "name"), map(ast.literal_eval, decorator.args), strict=False))
        found = positional | {str(each.arg): ast.literal_eval(each.value) for each in decorator.keywords}
    except ValueError:
        raise MethodError(f"{file} line {decorator.lineno}: the arguments of the decorator must be literals") from None
    unknown = set(found) - {each.name for each in fields(Declaration)}
    if unknown or "slug" not in found:
        wrong = f"no '{min(unknown)}'" if unknown else "a slug"
        raise MethodError(f"{file} line {decorator.lineno}: a declaration has {wrong}")
    return found


def _locate(module: str) -> Path:
    """Return the file or folder of a module of another package, without importing it.

    Raises:
        MethodError: if it is not installed.
    """
    try:
        return locate(module)
    except ModuleNotFoundError:
        raise MethodError(
            f"the entry point of a plugin names {module}, which is not installed: install it again"
        ) from None
