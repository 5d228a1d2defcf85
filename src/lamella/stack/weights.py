"""The weights of a model: every parameter with all modules that hold it, and the matrices among them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # names in torch's own attention
EXPERTS = ("gate_up_proj", "down_proj")  # all experts of a layer in one parameter [experts, out, in]


@dataclass(frozen=True)
class Weight:
    """One parameter, wherever modules hold it: a head that is tied to the embedding is the same weight.

    Attributes:
        name: name of the parameter.
        occurrences: every module that holds it, with the parameter's name there.
        size: number of its elements.
    """

    name: str
    occurrences: tuple[tuple[str, str], ...]
    size: int

    def of(self, model: nn.Module) -> nn.Parameter:
        """Return the parameter in a model of the same structure."""
        path, name = self.occurrences[0]
        return getattr(model.get_submodule(path), name)

    def put(self, model: nn.Module, weight: Tensor) -> None:
        """Make a model use another weight of the same shape, wherever it used this one.

        Args:
            model: the model, which is changed.
            weight: the new weight.
        """
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        for path, name in self.occurrences:
            setattr(model.get_submodule(path), name, parameter)


def weights(model: nn.Module) -> dict[str, Weight]:
    """Return all weights of a model by name, each once, in the order of its modules."""
    return {name: weight for name, (weight, _) in _weights(model).items()}


def matrices(model: nn.Module) -> dict[str, Weight]:
    """Return the weights that multiply, as opposed to biases, norms, and lookup tables.

    A matrix that some module looks up, such as a head that is tied to the embedding, is not one of them.
    """
    return {name: weight for name, (weight, multiplies) in _weights(model).items() if multiplies}


def _weights(model: nn.Module) -> dict[str, tuple[Weight, bool]]:
    """Return each weight, and whether all modules that hold it multiply with it."""
    holders: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders[parameter].append((path, module, name))
    found = {}
    for parameter, held in holders.items():
        occurrences = tuple((path, name) for path, _, name in held)
        name = ".".join(part for part in occurrences[0] if part)
        multiplies = all(_multiplies(module, name, parameter) for _, module, name in held)
        found[name] = (Weight(name, occurrences, parameter.numel()), multiplies)
    return found


def _multiplies(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if isinstance(module, nn.Linear | _ConvNd | Conv1D):
        return name == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return name in PROJECTIONS
    return name in EXPERTS and parameter.ndim == 3
