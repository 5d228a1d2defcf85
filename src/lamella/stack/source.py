"""Functions of a class as source: what they read and write, what may be left out of them, which branch they take."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


class Underivable(Exception):
    """Why an architecture cannot be derived."""


def forward_of(kind: type) -> ast.FunctionDef:
    """The forward of a class, without its docstring."""
    function = parsed(kind.forward)  # type: ignore[attr-defined]
    if any(isinstance(each, ast.Name) and each.id in ("super", "__class__") for each in ast.walk(function)):
        raise Underivable(f"the forward of a {kind.__name__} calls that of its parent")
    return function


def parsed(function: Any) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        raise Underivable("there is no source of its forward") from None
    if not isinstance(tree, ast.FunctionDef):
        raise Underivable("its forward is no plain function")
    tree.decorator_list, tree.returns = [], None
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        tree.body = tree.body[1:] or [ast.Pass()]
    return tree


def names_of(kind: Any) -> dict[str, Any]:
    """The names that the forward of a class can use."""
    return inspect.unwrap(kind.forward).__globals__


class Decided(ast.NodeTransformer):
    """Takes the branch that all layers take, and the annotations away."""

    def __init__(self, layers: Sequence[Any], names: dict[str, Any]) -> None:
        self.layers, self.names = layers, names

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return assign_to(node.target, node.value) if node.value is not None else None

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        decides = isinstance(node.op, ast.Or)  # the value of one part that settles the whole
        left = []
        for value in map(self.visit, node.values):
            known = self._value(value)
            if known is not None and known == decides:
                return ast.Constant(decides)
            if known is None:
                left.append(value)
        if not left:
            return ast.Constant(not decides)
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_If(self, node: ast.If) -> Any:
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
        """What a condition on the layer alone comes to, if that is the same for all layers."""
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
    """The statements of a function, and what it returns at its end."""
    *rest, last = body
    if not isinstance(last, ast.Return) or last.value is None:
        raise Underivable(f"the forward of a {kind.__name__} returns nothing at its end")
    if any(isinstance(each, ast.Return) for statement in rest for each in ast.walk(statement)):
        raise Underivable(f"the forward of a {kind.__name__} returns in several places")
    value = last.value
    if isinstance(value, ast.BinOp) and isinstance(value.left, ast.Tuple):  # (h,) + outputs
        value = ast.Tuple([value.left.elts[0], ast.Constant(None)], ast.Load())
    if isinstance(value, ast.Name):  # outputs = (h,), to which weights are added where they are asked for
        for place, each in enumerate(rest):
            first = each.value if isinstance(each, ast.Assign) else None
            first = first.left if isinstance(first, ast.BinOp) else first
            if isinstance(first, ast.Tuple) and written([each]) == {value.id}:
                return rest[:place], ast.Tuple([first.elts[0]], ast.Load())
    return rest, value


def assign(name: str, value: ast.expr) -> ast.stmt:
    return assign_to(ast.Name(name, ast.Store()), value)


def assign_to(target: Any, value: ast.expr) -> ast.stmt:
    return ast.fix_missing_locations(ast.Assign([target], value))


def own_names(node: ast.AST) -> list[str]:
    """The attributes of ``self`` that are named in there."""
    return [name for each in ast.walk(node) if (name := own_name(each)) is not None]


def own_name(node: ast.AST) -> str | None:
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None  # type: ignore[attr-defined]


def named(statements: Iterable[ast.AST], context: type) -> set[str]:
    return {each.id for statement in statements for each in ast.walk(statement)
            if isinstance(each, ast.Name) and isinstance(each.ctx, context)} - {"self"}  # fmt: skip


def written(statements: Iterable[ast.AST]) -> set[str]:
    return named(statements, ast.Store)


def read(statements: Iterable[ast.AST]) -> set[str]:
    changed = {each.target.id for statement in statements for each in ast.walk(statement)
               if isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name)}  # fmt: skip
    return named(statements, ast.Load) | changed


def exposed(statements: Sequence[ast.stmt], after: set[str]) -> set[str]:
    """What statements may read that they have not written, given what is read after them."""
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
    """The statements without those whose results nobody reads."""
    left: list[ast.stmt] = []
    for each in reversed(body):
        writes = written([each])
        if not writes or writes & exposed(left, {gives}) or isinstance(each, ast.AugAssign):
            left.insert(0, each)
    return left


def only_asks(statement: ast.stmt) -> bool:
    """Whether a statement may be run again behind the cut, since it only asks the stream something: its dtype."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name)


def is_sum(statement: ast.stmt, dependent: set[str]) -> bool:
    """Whether a statement only adds what depends on the attention to something."""

    def adds(node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return adds(node.left) and adds(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dropout_add":
            return True
        return isinstance(node, ast.Name) or not read([node]) & dependent

    if isinstance(statement, ast.AugAssign):
        return isinstance(statement.op, ast.Add) and adds(statement.value)
    return isinstance(statement, ast.Assign) and adds(statement.value)
