"""What a model does with its final states, read from its source: the last norm, and what makes logits of them."""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from lamella.stack.sharing import share
from lamella.stack.source import (
    Underivable,
    forward_of,
    names_of,
    needed,
    own_name,
    own_names,
    read,
    written,
)


def path_of(model: Any, module: Any, what: str) -> str:
    for path, each in model.named_modules():
        if each is module:
            return path
    raise Underivable(f"it has no {what}")


def final_norm(base: Any, loop: ast.For) -> str:
    """The module that the stream goes through behind the loop."""
    behind = _statements_behind(forward_of(type(base)).body, loop)
    called = []
    for statement in behind:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and (name := own_name(node.func)) is not None:
                module = base._modules.get(name)
                if isinstance(module, nn.Module) and name not in called:
                    called.append(name)
    if len(called) > 1:
        raise Underivable(f"a {type(base).__name__} does more than a norm behind its layers")
    return called[0] if called else ""


def norm_behind(base: Any, runner: str) -> str:
    """The module that goes on with what another one inside the base has run: ``h = self.norm(h)``."""
    found, begun = [], False
    for statement in forward_of(type(base)).body:
        if begun and isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            name = own_name(statement.value.func)
            if name is not None and [ast.unparse(each) for each in statement.value.args] == [*written([statement])]:
                found.append(name)
        begun = begun or runner in own_names(statement)
    return found[0] if len(found) == 1 else ""


def _statements_behind(body: list[ast.stmt], loop: ast.For) -> list[ast.stmt]:
    for place, each in enumerate(body):
        if each is loop or (isinstance(each, ast.For) and ast.dump(each) == ast.dump(loop)):
            return body[place + 1 :]
    return []


def readout(model: Any, place: str) -> Callable[..., Any] | None:
    """What a model makes of its final states, where that is more than its output projection.

    Those statements of its forward between the call of what runs the layers and the loss that the logits depend on.
    """
    function = forward_of(type(model))
    runner, _, _ = place.partition(".")
    calls = [number for number, each in enumerate(function.body) if runner in own_names(each)]
    logits = _returned_logits(function)
    if not calls or logits is None:
        return None
    first = function.body[calls[0]]
    head = path_of(model, model.get_output_embeddings(), "output projection")
    reader = _FinalStates(written([first]), head)
    body = []
    for each in function.body[calls[0] + 1 :]:
        if isinstance(each, ast.Return) or "loss" in written([each]):
            break
        if (left := reader.visit(copy.deepcopy(each))) is not None:
            body.append(left)
    body = needed(body, logits)
    if all(_only_names(each) or _only_reads(each) for each in body):
        return None
    lines = "\n".join(ast.unparse(ast.fix_missing_locations(each)) for each in body)
    text = f"def readout(self, normed, head):\n{textwrap.indent(lines, '    ')}\n    return {logits}"
    space = dict(names_of(type(model))) | {"reading_with": reading_with}
    exec(compile(text, f"<derived from {type(model).__module__}>", "exec"), space)
    space["readout"].__doc__ = text  # by which a proof is remembered
    return space["readout"]


def _returned_logits(function: ast.FunctionDef) -> str | None:
    """The name of what a model returns as its logits."""
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "logits" and isinstance(node.value, ast.Name):
            return node.value.id
    return None


def _only_names(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name)


def _only_reads(statement: ast.stmt) -> bool:
    """Whether a statement is no more than ``logits = head(states)``."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "head" and isinstance(value.args[0], ast.Name)


class _FinalStates(ast.NodeTransformer):
    """Writes ``normed`` for what the layers gave, and ``head`` for the output projection.

    Args:
        outputs: what the model calls the output of what runs its layers.
        head: the path of its output projection.
    """

    def __init__(self, outputs: set[str], head: str) -> None:
        self.outputs, self.head = outputs, head

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if node.attr == "last_hidden_state" and isinstance(node.value, ast.Name) and node.value.id in self.outputs:
            return ast.Name("normed", ast.Load())
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id in self.outputs and ast.unparse(node.slice) == "0":
            return ast.Name("normed", ast.Load())
        if "slice_indices" in read([node.slice]):  # the positions whose logits are wanted
            return self.visit(node.value)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        asks_only = not node.orelse and all(_only_names(each) for each in node.body)
        return None if asks_only else node

    def visit_Call(self, node: ast.Call) -> Any:
        if ast.unparse(node.func) == "slice_logits_to_keep":
            return self.visit(node.args[0])
        name, inside = own_name(node.func), ""
        if name is not None and self.head.startswith(f"{name}."):
            inside = self.head.removeprefix(f"{name}.")
            node.func = ast.parse(f"reading_with(self.{name}, '{inside}', head)", mode="eval").body
        elif name is not None and name == self.head:
            node.func = ast.Name("head", ast.Load())
        return self.generic_visit(node) if not inside else self._arguments(node)

    def _arguments(self, node: ast.Call) -> ast.Call:
        node.args = [self.visit(each) for each in node.args]
        return node


def reading_with(reader: nn.Module, path: str, head: nn.Module) -> nn.Module:
    """A module that reads final states, with another output projection inside."""
    if reader.get_submodule(path) is head:
        return reader
    other = share(reader)
    other.set_submodule(path, head)
    return other
