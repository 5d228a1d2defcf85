"""Architectures without a table entry, derived from the source of the model's own class.

A decoder layer is a sequence of statements. After its attention there is a point at which a single value is passed on,
the residual stream, and that is where its first sublayer ends::

    residual = h                       attn
    h = self.input_layernorm(h)
    h, _ = self.self_attn(h, cache=cache, ...)     <- the last use of the cache
    h = residual + h
    ------------------------------------------ below, only h is read of what was assigned above
    residual = h                       mlp
    h = self.post_attention_layernorm(h)
    h = self.mlp(h)
    h = residual + h
    return h

In a *parallel* layer there is no such point, since the MLP reads the same input as the attention. There, what depends
on the attention's result may only be added; the statements that do not depend on it are run again for the MLP::

    residual = h; h = self.input_layernorm(h); a, _ = self.self_attn(h, cache=cache, ...)       attn gives a
    residual = h; h = self.input_layernorm(h); m = self.mlp(h); return residual + a + m         mlp is given a

Conditions that evaluate to the same value for every layer of the model are resolved first, so the result holds for one
config. Nothing is guessed from names, and nothing of a checkpoint is read or run: the source is that of the installed
transformers, cut in two and compiled. A derivation is proved when a model is opened (:mod:`lamella.stack.proof`).
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lamella.errors import ArchitectureError
from lamella.stack.entry import SIZES, Architecture, DerivedCode, Sublayer
from lamella.stack.readout import final_norm, norm_behind, path_of, readout
from lamella.stack.source import (
    ResolvedBranches,
    Underivable,
    assign,
    exposed,
    forward_of,
    is_sum,
    names_of,
    needed,
    own_name,
    own_names,
    parsed,
    read,
    reads_attribute,
    returning,
    written,
)
from lamella.stack.sublayers import ByKind, Parallel, Returned

NAMES = ("attn", "mlp")
MOST_LAYERS = 1000  # limit for the model that is built without weights in order to inspect it


def derive(config: Any, model_type: str) -> Architecture:
    """Return the architecture of a causal model, derived for its config.

    Args:
        config: config of the model.
        model_type: its model type.

    Raises:
        ArchitectureError: if it cannot be derived, with the reason.
    """
    try:
        known, auto = _class_of(model_type)
        return _derived(_on_meta(config, known), model_type, auto)
    except (Underivable, NotImplementedError) as reason:  # some classes do not return their embedding
        raise ArchitectureError(" ".join(str(reason).split())) from None


def _derived(model: Any, model_type: str, auto: str) -> Architecture:
    embedding = path_of(model, model.get_input_embeddings(), "embedding")
    path, runner, loop = _runs_layers(model, embedding)
    layers = _listed(runner, loop.iter)
    assert layers is not None
    members = list(runner._modules[layers])
    kinds = {type(layer): [each for each in members if type(each) is type(layer)] for layer in members}
    cache = _passed_cache(runner, loop)
    forwards = {kind.__name__: _Forward(kind, some, cache) for kind, some in kinds.items()}
    results = {each.result for each in forwards.values()}
    if len(results) > 1:
        raise Underivable("its layers differ in what they return")
    serves = {name: dict.fromkeys(one for each in forwards.values() for one in each.serves(name)) for name in NAMES}
    found = []
    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        run = ByKind(name, {kind: each.compiled(name) for kind, each in forwards.items()})
        found.append(Sublayer(name, run, tuple(module for module in serves[name] if module not in serves[other])))
    base = _common(path, embedding)
    inside = path.removeprefix(base).removeprefix(".")
    norm = _joined(inside, own) if (own := final_norm(runner, loop)) else ""
    if inside and not norm:
        norm = norm_behind(model.get_submodule(base), inside)
    return Architecture(
        name=model_type,
        sublayers=tuple(found),
        base=base,
        layers=_joined(inside, layers),
        embedding=embedding.removeprefix(base).removeprefix("."),
        norm=norm,
        head=path_of(model, model.get_output_embeddings(), "output projection"),
        readout=readout(model, path),
        cache=cache,
        result=results.pop(),
        sizes=SIZES | {"layers": _counted(runner, layers)},
        auto=auto,
        **_image_fields(model, path),
        sources=tuple(each.source() for each in forwards.values()),
    )


def _image_fields(model: Any, path: str) -> dict[str, Any]:
    """Return additional fields of the entry if the language model is part of a model with images."""
    text = model.config.get_text_config(decoder=True)
    part = next((name for name in model.config.sub_configs or {} if getattr(model.config, name, None) is text), "")
    if not part:
        return {}
    front, _, _ = path.partition(".")
    images = "image_token_id" if getattr(model.config, "image_token_id", None) is not None else ""
    return {"config": part, "front": front, "images": images}


def _common(*paths: str) -> str:
    """Return the innermost module that contains several modules."""
    parts = [path.split(".") for path in paths]
    same = [each[0] for each in zip(*parts, strict=False)]
    length = next((depth for depth, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), len(same))
    return ".".join(same[:length])


def _joined(*path: str) -> str:
    return ".".join(part for part in path if part)


def _counted(runner: Any, layers: str) -> str:
    """Return the name of the config entry for the number of layers, if the class that builds the layers shows it."""
    for statement in ast.walk(parsed(type(runner).__init__)):
        if isinstance(statement, ast.Assign) and own_name(statement.targets[0]) == layers:
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "range" and len(node.args) == 1:
                    _, _, name = ast.unparse(node.args[0]).rpartition("config.")
                    if getattr(getattr(runner, "config", None), name, None) == len(runner._modules[layers]):
                        return name
    return SIZES["layers"]


def _class_of(model_type: str) -> tuple[Any, str]:
    """Return the class of transformers for a model type, with or without images, and its auto class."""
    for auto, names in (
        ("AutoModelForImageTextToText", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        known = getattr(transformers, names[model_type], None) if model_type in names else None
        if known is not None and known.__module__.startswith("transformers.models."):
            return known, auto
    raise Underivable("the installed transformers has no causal language model of this type")


def _on_meta(config: Any, known: Any) -> Any:
    """Return the model of a config without weights."""
    if not hasattr(config, "get_text_config"):
        raise Underivable("its config is not one of transformers")
    config = copy.deepcopy(config)
    layers = getattr(config.get_text_config(decoder=True), SIZES["layers"], None)
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise Underivable(f"its config has {layers} layers")
    try:
        with torch.device("meta"):
            return known(config)
    except Exception as error:  # damaged or exotic configs raise errors of many types
        raise Underivable(f"no model can be built from its config ({' '.join(str(error).split())[:120]})") from None


def _runs_layers(model: Any, embedding: str) -> tuple[str, Any, ast.For]:
    """Return the module whose forward loops over the layers nearest to the embedding: its path, itself, the loop."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) or not type(module).__module__.startswith("transformers.models."):
            continue
        if (loop := _layer_loop(module)) is not None:
            found.append((path, module, loop))
    if not found:
        raise Underivable("none of its modules runs the layers in a loop")
    return max(found, key=lambda each: (len(_common(each[0], embedding)), -len(each[0])))


def _layer_loop(module: Any) -> ast.For | None:
    """Return the loop of a module's forward that calls the members of a list, or None."""
    try:
        function = forward_of(type(module))
    except Underivable:
        return None
    loops = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For) and _listed(module, node.iter) is not None and _layer_call(node) is not None
    ]
    if len(loops) > 1:
        raise Underivable(f"a {type(module).__name__} runs its layers in several loops")
    return loops[0] if loops else None


def _layer_call(loop: ast.For) -> ast.Call | None:
    """Return the call of a loop's own variable in its body."""
    targets = {each.id for each in ast.walk(loop.target) if isinstance(each, ast.Name)}
    calls = (each for each in ast.walk(loop) if isinstance(each, ast.Call))
    return next((each for each in calls if isinstance(each.func, ast.Name) and each.func.id in targets), None)


def _passed_cache(runner: Any, loop: ast.For) -> str:
    """Return the keyword under which the layers receive the cache."""
    takes = _parameters(parsed(type(runner).forward))
    caches = {each.arg for each in takes if each.annotation is not None and "Cache" in ast.unparse(each.annotation)}
    call = _layer_call(loop)
    assert call is not None
    for keyword in call.keywords:
        if keyword.arg is not None and isinstance(keyword.value, ast.Name) and keyword.value.id in caches:
            return keyword.arg
    return "cache"


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def _listed(module: Any, iterated: ast.expr) -> str | None:
    """Return the name of the module list that an expression iterates over."""
    for name in own_names(iterated):
        if isinstance(module._modules.get(name), nn.ModuleList) and len(module._modules[name]):
            return name
    return None


# The forward of one class of layers, cut in two.


class _Forward:
    """The forward of a class of layers, with the conditions resolved on which all layers agree.

    Args:
        kind: the class.
        layers: the layers of that class in the model, on the meta device.
        cache: the keyword under which they receive the cache.
    """

    def __init__(self, kind: type, layers: Sequence[Any], cache: str) -> None:
        self.kind, self.layers, self.cache = kind, layers, cache
        self.function = ResolvedBranches(layers, names_of(kind)).visit(copy.deepcopy(forward_of(kind)))
        self.hidden = self.function.args.args[1].arg
        self.arguments = _parameters(self.function)[1:]
        body, returned = returning(self.function.body, self.kind)
        values = returned.elts if isinstance(returned, ast.Tuple) else [returned]
        self.result = Returned(len(values) - 1) if isinstance(returned, ast.Tuple) else None
        self.out = values[0].id if isinstance(values[0], ast.Name) else "hidden_out"
        if not isinstance(values[0], ast.Name):
            body.append(assign(self.out, values[0]))
        self.parts = self._serial(body) or self._parallel(body)

    def _serial(self, body: list[ast.stmt]) -> dict[str, ast.FunctionDef] | None:
        """Cut after the last use of the cache, where only the residual stream is passed on."""
        for cut in range(self._last_use(body) + 1, len(body)):
            first, second = body[:cut], body[cut:]
            passed = exposed(second, {self.out}) & (written(first) | {self.hidden})
            again = [each for each in first if written([each]) & passed and reads_attribute(each)]
            passed -= written(again)
            if len(passed) == 1 and self._calls(second):
                [hidden] = passed
                return {"attn": self._defined("attn", first, hidden),
                        "mlp": self._defined("mlp", again + second, self.out, hidden)}  # fmt: skip
        return None

    def _parallel(self, body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
        """Separate what depends on the attention's result from what does not."""
        last = self._last_use(body) + 1
        attended = written([each for each in body[:last] if self._uses_cache(each)])
        while last < len(body) and read([body[last]]) & written(body) <= attended:  # such as its dropout
            attended |= written([body[last]])
            last += 1
        first, second = body[:last], body[last:]
        given = exposed(second, {self.out}) & attended
        apart = [each for each in first if not written([each]) & attended]
        if len(given) != 1 or not self._calls(second):
            raise Underivable(
                f"a {self.kind.__name__} is not an attention followed by an MLP that pass on one residual stream"
            )
        [attn] = given
        dependent = set(given)
        for each in second:
            if read([each]) & dependent:
                if not is_sum(each, dependent):
                    raise Underivable(f"a {self.kind.__name__} does more than add its attention to its MLP")
                dependent |= written([each])
        return {
            "attn": self._defined("attn", first, attn),
            "mlp": self._defined("mlp", apart + second, self.out, attn=attn),
        }

    def _uses_cache(self, statement: ast.stmt) -> bool:
        passed = self.function.args.kwarg
        return bool(read([statement]) & {self.cache, *([passed.arg] if passed and not self._names_cache else [])})

    @property
    def _names_cache(self) -> bool:
        return any(each.arg == self.cache for each in self.arguments)

    def _last_use(self, body: list[ast.stmt]) -> int:
        uses = [index for index, each in enumerate(body) if self._uses_cache(each)]
        if not uses:
            raise Underivable(f"a {self.kind.__name__} does not take the cache")
        return uses[-1]

    def _calls(self, statements: list[ast.stmt]) -> bool:
        """Return whether statements run some module of the layer."""
        return bool(self._served(statements))

    def _served(self, statements: Iterable[ast.AST]) -> list[str]:
        """Return the children of the layers that run in statements, or in methods that these call."""
        names, seen = [name for each in statements for name in own_names(each)], set()
        found = []
        while names:
            name = names.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if any(isinstance(layer._modules.get(name), nn.Module) for layer in self.layers):
                found.append(name)
            elif inspect.isfunction(method := getattr(self.kind, name, None)):
                names += own_names(parsed(method))
        return found

    def serves(self, name: str) -> list[str]:
        """Return the children of a layer that only this sublayer uses."""
        other = self._served([self.parts["mlp" if name == "attn" else "attn"]])
        return [each for each in self._served([self.parts[name]]) if each not in other]

    def _defined(
        self, name: str, body: list[ast.stmt], gives: str, takes: str | None = None, attn: str | None = None
    ) -> ast.FunctionDef:
        """Return a function of the layer, the hidden states and the other arguments of the layer."""
        function = copy.deepcopy(self.function)
        function.name = f"{self.kind.__name__}_{name}"
        first = function.args.args[1]
        first.arg = takes or first.arg
        if attn is not None:
            function.args.args.insert(2, ast.arg(attn))
            if function.args.defaults and len(function.args.defaults) == len(self.function.args.args) - 1:
                function.args.defaults.pop(0)
        function.body = [*needed(copy.deepcopy(body), gives), ast.Return(ast.Name(gives, ast.Load()))]
        return ast.fix_missing_locations(function)

    @property
    def text(self) -> str:
        """The source of the two functions and of their wrappers, which take the hidden states apart."""
        parts = {name: ast.unparse(each) for name, each in self.parts.items()}
        kind = self.kind.__name__
        parallel = self.is_parallel
        gives = f"Parallel(h, {kind}_attn(layer, h, **call))" if parallel else f"{kind}_attn(layer, h, **call)"
        attn = f"def {kind}_run_attn(layer, h, call):\n    return {gives}"
        if parallel:
            apart = "h, attn = h if isinstance(h, Parallel) else (h, torch.zeros_like(h))"
            mlp = f"def {kind}_run_mlp(layer, h, call):\n    {apart}\n    return {kind}_mlp(layer, h, attn, **call)"
        else:
            mlp = f"def {kind}_run_mlp(layer, h, call):\n    return {kind}_mlp(layer, h, **call)"
        return "\n\n\n".join([parts["attn"], parts["mlp"], attn, mlp])

    @property
    def is_parallel(self) -> bool:
        """Whether the MLP reads the same input as the attention."""
        return len(self.parts["mlp"].args.args) > len(self.parts["attn"].args.args)

    def compiled(self, name: str) -> Callable[..., Any]:
        """Return the function of a sublayer, ``function(layer, h, call)``."""
        space = dict(names_of(self.kind)) | {"Parallel": Parallel, "torch": torch}
        exec(compile(self.text, f"<derived from {self.kind.__module__}>", "exec"), space)
        return space[f"{self.kind.__name__}_run_{name}"]

    def source(self) -> DerivedCode:
        """Return the source of both functions for a native export."""
        known = names_of(self.kind)
        used = {each.id for each in ast.walk(ast.parse(self.text)) if isinstance(each, ast.Name)}
        return DerivedCode(self.text, known["__name__"], tuple(sorted(used & known.keys() - {"torch", "Parallel"})))
