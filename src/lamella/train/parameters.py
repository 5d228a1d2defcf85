"""Which parameters train, and copies of them for a view."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lamella.errors import TrainingError
from lamella.stack import share

Choice = Callable[[str], bool]


def choose(model: nn.Module, choice: Choice | None = None) -> dict[str, nn.Parameter]:
    """Return the chosen parameters, by their first name.

    Args:
        model: a model or a view.
        choice: from a parameter's name to whether it is chosen. A tied parameter must be chosen under each of its
            names, so excluding the embedding excludes a head that is tied to it. None: those that require a gradient.

    Raises:
        TrainingError: if nothing is chosen.
    """
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    chosen = {
        known[0]: parameter
        for parameter, known in names.items()
        if (parameter.requires_grad if choice is None else all(map(choice, known)))
    }
    if not chosen:
        example = next(iter(names.values()))[-1] if names else "(none)"
        raise TrainingError(
            f"no parameter of {type(model).__name__} is chosen for training: names look like '{example}'"
        )
    return chosen


def batch_norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of batch norms by name: training changes them without gradients."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def own(view: Any, choice: Choice | None = None) -> list[str]:
    """Give a view its own clones of the chosen parameters, so that training them does not change the original.

    A view shares its tensors with the model that it was made of; call this before training any of them. Parameters that
    were tied in the view stay tied. A stack that was opened on the view before still reads the old ones: open it again.

    Args:
        view: what ``lamella.apply`` returned; it is changed in place.
        choice: as in :func:`choose`; None: all that require a gradient.

    Returns:
        The names of the parameters that now belong to the view.
    """
    chosen = choose(view, choice)
    clones = {parameter: copy.deepcopy(parameter) for parameter in chosen.values()}
    for module in view.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in clones:
                setattr(module, name, clones[parameter])
    return list(chosen)


def in_bfloat16(model: Any, kept: Collection[nn.Parameter] = ()) -> Any:
    """Return a copy of a model with its parameters in bfloat16, except for the given ones, which it shares.

    Mixed precision casts float32 parameters in every step; this avoids it for frozen ones.

    Args:
        model: the model, which stays unchanged.
        kept: parameters that keep their dtype and are shared with the copy.
    """
    shared = {id(each) for each in kept}
    cast = {
        id(each): nn.Parameter(each.detach().bfloat16(), requires_grad=False)
        for each in model.parameters()
        if id(each) not in shared
    }
    return share(model, cast)


@contextmanager
def only(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only the given parameters require gradients within a context; flags and modes are restored afterwards.

    Args:
        model: the model.
        trained: the parameters to train, by name.
    """
    flags = [(each, each.requires_grad) for each in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chosen = set(trained.values())
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            if parameter in chosen:
                parameter.grad = None
        for module, training in modes:
            module.training = training
