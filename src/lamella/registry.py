"""The registry of methods: one slug, one module, one entry.

A method is a plain function under the decorator :func:`method`. Packages outside Lamella add theirs
through the entry-point group ``lamella.methods``, whose entries name modules to import.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from lamella.errors import MethodError

Kind = Literal["plan", "policy", "study", "training", "edit", "rewrite", "data", "solver", "session"]
METHOD_PACKAGES = ("lamella.methods",)


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        slug: the name on the command line.
        title: the paper's title, or what the baseline is.
        kind: what the callable returns (``plan`` and ``policy`` return a plan series).
        families: ``"decoder"`` (any causal family of the table), ``"any"``, or the names of those it works on.
        needs: what the callable must be given by name, such as ``("calibration",)``.
        arxiv: the paper's arXiv number, or None.
        train: the method's own healing recipe, which `lamella heal` finds, or None.
        baseline: True for a method that exists only to compare with.
        policy: what decides while the model runs, for plans that name this method as their policy.
        faster: whether its plans leave out work. False for plans that only set weights to zero, since dense kernels
            compute with zeros as they do with any number: `lamella compress` races for speed without them.
        quick: False for searches that may take hours: `--method all` leaves them out.
        function: the callable.
    """

    slug: str
    title: str
    kind: Kind
    families: str | tuple[str, ...]
    needs: tuple[str, ...]
    arxiv: str | None
    train: Callable[..., Any] | None
    baseline: bool
    policy: Callable[..., Any] | None
    faster: bool
    quick: bool
    function: Callable[..., Any]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword options of the callable with their defaults."""
        parameters = inspect.signature(self.function).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of the callable's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def takes(self, family: str, causal: bool) -> bool:
        """Whether the method works on a family.

        Args:
            family: its name in the family table.
            causal: True for decoders.
        """
        if isinstance(self.families, tuple):
            return family in self.families
        return causal or self.families == "any"

    def __call__(self, *args: Any, **options: Any) -> Any:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise MethodError(f"{self.slug} has no option '{unknown[0]}'; its options are: {known}")
        return self.function(*args, **options)


_METHODS: dict[str, Method] = {}


def method(
    *,
    slug: str,
    title: str,
    kind: Kind,
    families: str | tuple[str, ...],
    needs: tuple[str, ...] = (),
    arxiv: str | None = None,
    train: Callable[..., Any] | None = None,
    baseline: bool = False,
    policy: Callable[..., Any] | None = None,
    faster: bool = True,
    quick: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a method; the function itself is returned unchanged."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _METHODS.get(slug)
        if known is not None and known.function.__module__ != function.__module__:
            raise MethodError(
                f"two modules register the method '{slug}': {known.function.__module__} and {function.__module__}"
            )
        _METHODS[slug] = Method(
            slug, title, kind, families, needs, arxiv, train, baseline, policy, faster, quick, function
        )
        return function

    return register


def methods() -> dict[str, Method]:
    """Every method by slug: those of this package, then those of installed plugins."""
    for package_name in METHOD_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")
    for entry in entry_points(group="lamella.methods"):
        entry.load()
    return dict(sorted(_METHODS.items()))


def get_method(slug: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: when there is none; the message names the nearest ones.
    """
    known = methods()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4) or list(known)
        raise MethodError(f"unknown method '{slug}'; did you mean {' or '.join(near)}? `lamella methods` lists all")
    return known[slug]
