"""Functions of a class as source: names read and written, removable statements, and resolved branches."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


class Underivable(Exception):
    """The reason why an architecture cannot be derived."""


def forward_of(kind: type) -> ast.FunctionDef:
    """Return the forward of a class, without its docstring.

    Raises:
        Underivable: if it calls the forward of its parent class.
    """
    function = parsed(kind.forward)  # type: ignore[attr-defined]
    if any(isinstance(each, ast.Name) and each.id in ("super", "__class__") for each in ast.walk(function)):
        raise Underivable(f"the forward of a {kind.__name__} calls that of its parent")
    return function


def parsed(function: Any) -> ast.FunctionDef:
    """Return the syntax tree of a function, without docstring, decorators and return annotation.

    Raises:
        Underivable: if there is no source, or it is not a function definition.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        raise Underivable("the source of its forward is not available") from None
    if not isinstance(tree, ast.FunctionDef):
        raise Underivable("its forward is not a plain function")
    tree.decorator_list, tree.returns = [], None
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        tree.body = tree.body[1:] or [ast.Pass()]
    return tree


def names_of(kind: Any) -> dict[str, Any]:
    """Return the global names that the forward of a class can use."""
    return inspect.unwrap(kind.forward).__globals__


class ResolvedBranches(ast.NodeTransformer):
    """Resolves conditions that have the same value for all layers, and removes annotations.

    Args:
        layers: the layers.
        names: global names of their forward.
    """

    def __init__(self, layers: Sequence[Any], names: dict[str, Any]) -> None:
        self.layers, self.names = layers, names

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Remove the annotation of an argument."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """Remove the annotation of an assignment."""
        return assign_to(node.target, node.value) if node.value is not None else None

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        """Simplify a boolean expression."""
        decisive = isinstance(node.op, ast.Or)  # the value of one part that determines the whole
        left = []
        for value in map(self.visit, node.values):
            known = self._value(value)
            if known is not None and known == decisive:
                return ast.Constant(decisive)
            if known is None:
                left.append(value)
        if not left:
            return ast.Constant(not decisive)
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_If(self, node: ast.If) -> Any:
        """Replace a resolved condition by the branch that is taken."""
        node.test = self.visit(node.test)
        known = self._value(node.test)
        if known is not None:
            return self._all(node.body if known else node.orelse)
        node.body = self._all(node.body) or [ast.Pass()]
        node.orelse = self._all(node.orelse)
        return node

    def _all(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for each in statements:
            visited = self.visit(each)
            found += visited if isinstance(visited, list) else [] if visited is None else [visited]
        return found

    def _value(self, test: ast.expr) -> bool | None:
        """Return the value of a condition that depends on the layer only, if it is the same for all layers."""
        if isinstance(test, ast.Constant):
            return bool(test.value)
        names = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)}
        calls = any(isinstance(each, ast.Call) for each in ast.walk(test))
        if calls or names != {"self"} or any(name == "training" for name in own_names(test)):
            return None
        code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(test))), "<a condition>", "eval")
        found = {bool(eval(code, self.names, {"self": layer})) for layer in self.layers}
        return found.pop() if len(found) == 1 else None


def returning(body: list[ast.stmt], kind: type) -> tuple[list[ast.stmt], ast.expr]:
    """Return the statements of a function, and the expression that it returns at its end.

    Args:
        body: the statements.
        kind: class of the function, for messages.

    Raises:
        Underivable: if it returns nothing, or in several places.
    """
    *rest, last = body
    if not isinstance(last, ast.Return) or last.value is None:
        raise Underivable(f"the forward of a {kind.__name__} returns nothing at its end")
    if any(isinstance(each, ast.Return) for statement in rest for each in ast.walk(statement)):
        raise Underivable(f"the forward of a {kind.__name__} returns at several points")
    value = last.value
    if isinstance(value, ast.BinOp) and isinstance(value.left, ast.Tuple):  # (h,) + outputs
        value = ast.Tuple([value.left.elts[0], ast.Constant(None)], ast.Load())
    if isinstance(value, ast.Name):  # outputs = (h,), to which attention weights are added on request
        for index, each in enumerate(rest):
            first = each.value if isinstance(each, ast.Assign) else None
            first = first.left if isinstance(first, ast.BinOp) else first
            if isinstance(first, ast.Tuple) and written([each]) == {value.id}:
                return rest[:index], ast.Tuple([first.elts[0]], ast.Load())
    return rest, value


def assign(name: str, value: ast.expr) -> ast.stmt:
    """Return an assignment to a variable.

    Args:
        name: name of the variable.
        value: the assigned expression.
    """
    return assign_to(ast.Name(name, ast.Store()), value)


def assign_to(target: Any, value: ast.expr) -> ast.stmt:
    """Return an assignment to a target.

    Args:
        target: the expression that is assigned to, in the context ``ast.Store``.
        value: the assigned expression.
    """
    return ast.fix_missing_locations(ast.Assign([target], value))


def own_names(node: ast.AST) -> list[str]:
    """Return the attributes of ``self`` that occur in a syntax tree."""
    return [name for each in ast.walk(node) if (name := own_name(each)) is not None]


def own_name(node: ast.AST) -> str | None:
    """Return the name of an attribute of ``self``, or None for another node."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None  # type: ignore[attr-defined]


def named(statements: Iterable[ast.AST], context: type) -> set[str]:
    """Return the names that statements use in a context: ``ast.Load`` or ``ast.Store``.

    Args:
        statements: the statements.
        context: ``ast.Load`` for names that are read, ``ast.Store`` for names that are assigned.
    """
    return {each.id for statement in statements for each in ast.walk(statement)
            if isinstance(each, ast.Name) and isinstance(each.ctx, context)} - {"self"}  # fmt: skip


def written(statements: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements assign."""
    return named(statements, ast.Store)


def read(statements: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements read."""
    changed = {each.target.id for statement in statements for each in ast.walk(statement)
               if isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name)}  # fmt: skip
    return named(statements, ast.Load) | changed


def exposed(statements: Sequence[ast.stmt], after: set[str]) -> set[str]:
    """Return the names that statements may read before they assign them.

    Args:
        statements: the statements.
        after: names that are read after them.
    """
    live = set(after)
    for each in reversed(statements):
        if isinstance(each, ast.If):
            live = exposed(each.body, live) | exposed(each.orelse, live) | read([each.test])
        elif isinstance(each, ast.Raise):
            live = read([each])
        else:
            live = (live - written([each])) | read([each])
    return live


def needed(body: list[ast.stmt], gives: str) -> list[ast.stmt]:
    """Return the statements without those whose results are not used.

    Args:
        body: the statements.
        gives: name of the result.
    """
    left: list[ast.stmt] = []
    for each in reversed(body):
        writes = written([each])
        if not writes or writes & exposed(left, {gives}) or isinstance(each, ast.AugAssign):
            left.insert(0, each)
    return left


def reads_attribute(statement: ast.stmt) -> bool:
    """Return whether a statement only reads an attribute of a variable, such as its dtype, and may be run again."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name)


def is_sum(statement: ast.stmt, dependent: set[str]) -> bool:
    """Return whether a statement only adds what depends on the attention to something.

    Args:
        statement: the statement.
        dependent: names that depend on the attention.
    """

    def adds(node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return adds(node.left) and adds(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dropout_add":
            return True
        return isinstance(node, ast.Name) or not read([node]) & dependent

    if isinstance(statement, ast.AugAssign):
        return isinstance(statement.op, ast.Add) and adds(statement.value)
    return isinstance(statement, ast.Assign) and adds(statement.value)
