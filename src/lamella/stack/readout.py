"""What a model does with its final states, read from its source: the last norm, and the computation of the logits."""

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
    """Return the path of a module in a model.

    Args:
        model: the model.
        module: the module.
        what: what to call the module in messages.

    Raises:
        Underivable: if the model does not contain it.
    """
    for path, each in model.named_modules():
        if each is module:
            return path
    raise Underivable(f"it has no {what}")


def final_norm(base: Any, loop: ast.For) -> str:
    """Return the name of the module that is applied after the loop over the layers; empty if there is none.

    Args:
        base: the module whose forward contains the loop.
        loop: the loop.

    Raises:
        Underivable: if there are several such modules.
    """
    behind = _statements_behind(forward_of(type(base)).body, loop)
    norms = []
    for statement in behind:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and (name := own_name(node.func)) is not None:
                module = base._modules.get(name)
                if isinstance(module, nn.Module) and name not in norms:
                    norms.append(name)
    if len(norms) > 1:
        raise Underivable(f"a {type(base).__name__} does more than a norm after its layers")
    return norms[0] if norms else ""


def norm_behind(base: Any, runner: str) -> str:
    """Return the name of the module that is applied to the output of another module of the base: ``h = self.norm(h)``.

    Args:
        base: the module that contains both.
        runner: name of the other module.
    """
    found, has_run = [], False
    for statement in forward_of(type(base)).body:
        if has_run and isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            name = own_name(statement.value.func)
            if name is not None and [ast.unparse(each) for each in statement.value.args] == [*written([statement])]:
                found.append(name)
        has_run = has_run or runner in own_names(statement)
    return found[0] if len(found) == 1 else ""


def _statements_behind(body: list[ast.stmt], loop: ast.For) -> list[ast.stmt]:
    for index, each in enumerate(body):
        if each is loop or (isinstance(each, ast.For) and ast.dump(each) == ast.dump(loop)):
            return body[index + 1 :]
    return []


def readout(model: Any, path: str) -> Callable[..., Any] | None:
    """Return a function that computes the prediction from the final states, if it is more than the output projection.

    It consists of the statements of the model's forward that the logits depend on, between the call of the module that
    runs the layers and the loss.

    Args:
        model: the model.
        path: path of the module that runs the layers.

    Returns:
        ``readout(model, normed, head)``, or None if the output projection is all.
    """
    function = forward_of(type(model))
    runner, _, _ = path.partition(".")
    calls = [number for number, each in enumerate(function.body) if runner in own_names(each)]
    logits = _returned_logits(function)
    if not calls or logits is None:
        return None
    first = function.body[calls[0]]
    head = path_of(model, model.get_output_embeddings(), "output projection")
    transform = _FinalStates(written([first]), head)
    body = []
    for each in function.body[calls[0] + 1 :]:
        if isinstance(each, ast.Return) or "loss" in written([each]):
            break
        if (left := transform.visit(copy.deepcopy(each))) is not None:
            body.append(left)
    body = needed(body, logits)
    if all(_only_names(each) or _only_reads(each) for each in body):
        return None
    lines = "\n".join(ast.unparse(ast.fix_missing_locations(each)) for each in body)
    text = f"def readout(self, normed, head):\n{textwrap.indent(lines, '    ')}\n    return {logits}"
    space = dict(names_of(type(model))) | {"with_head": with_head}
    exec(compile(text, f"<derived from {type(model).__module__}>", "exec"), space)
    space["readout"].__doc__ = text  # part of the digest of a proof
    return space["readout"]


def _returned_logits(function: ast.FunctionDef) -> str | None:
    """Return the name of the variable that a model returns as its logits."""
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "logits" and isinstance(node.value, ast.Name):
            return node.value.id
    return None


def _only_names(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name)


def _only_reads(statement: ast.stmt) -> bool:
    """Return whether a statement is just ``logits = head(states)``."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "head" and isinstance(value.args[0], ast.Name)


class _FinalStates(ast.NodeTransformer):
    """Replaces the output of the layers by ``normed``, and the output projection by ``head``.

    Args:
        outputs: names of the variables that hold the output of the module that runs the layers.
        head: path of the output projection.
    """

    def __init__(self, outputs: set[str], head: str) -> None:
        self.outputs, self.head = outputs, head

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        """Replace ``outputs.last_hidden_state``."""
        if node.attr == "last_hidden_state" and isinstance(node.value, ast.Name) and node.value.id in self.outputs:
            return ast.Name("normed", ast.Load())
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        """Replace ``outputs[0]``, and remove the selection of positions."""
        if isinstance(node.value, ast.Name) and node.value.id in self.outputs and ast.unparse(node.slice) == "0":
            return ast.Name("normed", ast.Load())
        if "slice_indices" in read([node.slice]):  # the positions whose logits are computed
            return self.visit(node.value)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        """Remove conditions that only select a variable."""
        self.generic_visit(node)
        only_selects = not node.orelse and all(_only_names(each) for each in node.body)
        return None if only_selects else node

    def visit_Call(self, node: ast.Call) -> Any:
        """Replace calls of the output projection."""
        if ast.unparse(node.func) == "slice_logits_to_keep":
            return self.visit(node.args[0])
        name, inside = own_name(node.func), ""
        if name is not None and self.head.startswith(f"{name}."):
            inside = self.head.removeprefix(f"{name}.")
            node.func = ast.parse(f"with_head(self.{name}, '{inside}', head)", mode="eval").body
        elif name is not None and name == self.head:
            node.func = ast.Name("head", ast.Load())
        return self.generic_visit(node) if not inside else self._arguments(node)

    def _arguments(self, node: ast.Call) -> ast.Call:
        node.args = [self.visit(each) for each in node.args]
        return node


def with_head(module: nn.Module, path: str, head: nn.Module) -> nn.Module:
    """Return a module that reads final states, with another output projection inside.

    Args:
        module: the module.
        path: path of the output projection inside it.
        head: the other output projection.
    """
    if module.get_submodule(path) is head:
        return module
    other = share(module)
    other.set_submodule(path, head)
    return other
