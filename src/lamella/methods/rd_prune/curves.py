"""Rate-distortion curves: how far the output of a model moves when one layer alone loses its smallest weights.

    layer i    w sorted by |w|:  [smallest ... largest]
    amount q   the first int(q n / Q) of them are zero, every other layer is whole
    distortion of an input: the mean squared difference of the output, which is that of the logits

Any torch model is measured by running it. A decoder is measured from the changed sublayer on, since the stream before
it is the original's; and where its head is a plain linear map W, the squared difference of the logits is that of the
final states under W'W, so the head is not run at all. Work is done on a copy that shares the model's tensors: nothing
is ever written to the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.files import write
from lamella.measure.streams import Tokens, sequences
from lamella.plan import fingerprint
from lamella.progress import tracker
from lamella.reading import parse_json
from lamella.stack import Context, Position, Stack, Stream, Weight, matrices, share

Reduce = Literal["mean", "worst"]
Inputs = Tensor | Mapping[str, Tensor]
BATCH = 64  # inputs that run together
TOKENS = 512  # of a decoder that run together
SCHEMA = "lamella.curves/1"
FRONT = Position(-1, "")  # what runs before the stack
STILL = 1e-6  # of the output's variance over inputs: less than this counts as a constant output


@dataclass(frozen=True)
class Distortion:
    """A mean squared difference of outputs: its mean over inputs, and that of the worst input."""

    mean: float
    worst: float

    @classmethod
    def of(cls, per_input: Tensor) -> Distortion:
        return cls(float(per_input.mean()), float(per_input.max()))


@dataclass(frozen=True)
class Curve:
    """What one layer told.

    Attributes:
        size: weights of the layer.
        zeros: how many of them are zero already; removing those costs nothing and is not measured.
        uses: how often an input (a decoder: a token) multiplies with each weight; 0 where that could not be counted.
        severs: whether the output no longer depends on the input when the layer is gone.
        mean, worst: the distortions at the amounts 0/Q to Q/Q [Q + 1].
    """

    size: int
    zeros: int
    uses: float
    severs: bool
    mean: list[float]
    worst: list[float]


@dataclass(frozen=True)
class Curves:
    """The curves of every layer of one model on one calibration set. They answer any budget.

    Attributes:
        header: what they belong to: the hash of the weights, the calibration data, the grid.
        silent: the distortion of an output of zeros: what cannot be worse than no model at all.
        layers: each layer's curve, by the name of its matrix.
    """

    header: dict[str, Any]
    silent: Distortion
    layers: dict[str, Curve] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        return int(self.header["grid"])

    @property
    def sizes(self) -> np.ndarray:
        return np.array([curve.size for curve in self.layers.values()], np.int64)

    @cached_property
    def pruned(self) -> np.ndarray:
        """How many weights each amount removes [layers, Q + 1]."""
        return self.sizes[:, None] * np.arange(self.grid + 1) // self.grid

    def distortion(self, reduce: Reduce) -> np.ndarray:
        """The curves [layers, Q + 1], in float64."""
        return np.array([getattr(curve, reduce) for curve in self.layers.values()])

    def check_model(self, model: nn.Module) -> None:
        """Check that these are the curves of that model as it is now.

        Raises:
            MethodError: when they are of other weights.
        """
        if self.header["weights"] != fingerprint.tensors(model):
            raise MethodError("these curves were measured on other weights than this model has: measure them again")

    @classmethod
    def read(cls, path: str | Path) -> Curves:
        """Read the file that :func:`rate_distortion` wrote.

        Raises:
            MethodError: when it is missing, is no such file, or is not complete.
        """
        found = _read(Path(path))
        if found is None or set(found.layers) != set(found.header["layers"]):
            raise MethodError(f"{path}: holds no complete curves: measure them with rate_distortion(..., path=...)")
        return found


class Probe(Protocol):
    """Runs a copy of a model whose matrices can be replaced, and compares its output with the original's."""

    model: nn.Module
    silent: Tensor

    def distortion(self, changed: Collection[str]) -> Tensor:
        """The distortion of each input [inputs], float64, given which matrices of ``model`` are not the original's."""
        ...

    def uses(self) -> dict[str, float]: ...

    @property
    def still(self) -> bool:
        """Whether the output that was computed last is the same for all inputs."""
        ...


def rate_distortion(
    model: nn.Module | Stack,
    inputs: Inputs,
    *,
    grid: int = 100,
    path: str | Path | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Curves:
    """Measure the curve of every matrix of a model (linear maps, convolutions, experts).

    Costs up to layers x grid passes over the inputs, forward only, in eval mode; statistics of batch norms stay as they
    are. What is zero already (an earlier round's masks) is not measured again.

    Args:
        model: any torch module, or a stack; the stack of a decoder is measured faster. It is not changed.
        inputs: for a module, its input [inputs, ...], or several by name; for a decoder, token ids [sequences, time],
            or them with an ``attention_mask``. A few hundred, without labels. Standard-normal noise works too.
        grid: Q, the number of steps between nothing and everything; the authors' default.
        path: a file that is written as measuring goes on; an interrupted measurement continues from it, and a complete
            one is read.
        output: from what the module returns to its outputs before the softmax [inputs, ...]; ``.logits``, the first of
            a tuple, or the tensor itself when left out.

    Raises:
        MethodError: for a grid below 1, a model without matrices, or a file that cannot be written or holds the curves
            of something else.
        CalibrationError: for empty inputs.
        NumericsError: when the output of the model is not finite.
    """
    if grid < 1:
        raise MethodError(f"grid={grid}: give at least one step between nothing and everything")
    found = prunable(model)
    names = list(found)
    header = {
        "schema": SCHEMA,
        "weights": fingerprint.tensors(_module(model)),
        "calibration": _digest(inputs),
        "output": "logits" if output is None else getattr(output, "__qualname__", type(output).__qualname__),
        "grid": grid,
        "layers": names,
    }
    curves = None if path is None else _read(Path(path))
    if curves is not None:
        _check_same(curves.header, header, Path(path or ""))
        if set(curves.layers) == set(names):
            return Curves(curves.header, curves.silent, {name: curves.layers[name] for name in names})
    probe = probe_of(model, inputs, output)
    done = {} if curves is None else dict(curves.layers)
    silent = Distortion.of(probe.silent)
    if path is not None:
        _start(Path(path), header, silent, done)
    uses = probe.uses()
    with tracker("rate-distortion curves", len(names) * grid) as count:
        for name in names:
            if name not in done:
                done[name] = _curve(probe, found[name], grid, uses.get(name, 0.0), count)
                if path is not None:
                    with Path(path).open("a", encoding="utf-8") as file:
                        file.write(_line(name, done[name]))
            else:
                count(grid)
    return Curves(header, silent, {name: done[name] for name in names})


def prunable(model: nn.Module | Stack) -> dict[str, Weight]:
    """The matrices of a model.

    Raises:
        MethodError: when it has none.
    """
    found = matrices(_module(model))
    if not found:
        raise MethodError(f"a {type(_module(model)).__name__} has no linear map and no convolution: nothing to prune")
    return found


def smallest(weight: Tensor) -> Tensor:
    """The places of a matrix by growing magnitude [weights]; of equals the first comes first."""
    return weight.detach().abs().flatten().argsort(stable=True)


def without(weight: Tensor, places: Tensor) -> Tensor:
    """A copy of a matrix with zeros at these places of its flattened form."""
    changed = weight.detach().clone(memory_format=torch.contiguous_format)
    changed.view(-1)[places] = 0
    return changed


@torch.no_grad()
def joint_distortion(
    model: nn.Module | Stack,
    masks: Mapping[str, Tensor],
    inputs: Inputs,
    output: Callable[[Any], Tensor] | None = None,
) -> Distortion:
    """How far the output moves with all layers masked together; beside it, the sum of the curves is a prediction.

    Args:
        model, inputs, output: as in :func:`rate_distortion`.
        masks: what is kept of each matrix, by name, bool in its shape.
    """
    return masked_distortion(probe_of(model, inputs, output), matrices(_module(model)), masks)


@torch.no_grad()
def masked_distortion(probe: Probe, found: Mapping[str, Weight], masks: Mapping[str, Tensor]) -> Distortion:
    """The same with a probe that is there already, for several masks in turn."""
    originals = {name: found[name].of(probe.model) for name in masks}
    try:
        for name, weight in originals.items():
            found[name].put(probe.model, weight.detach() * masks[name].to(weight.device))
        return Distortion.of(probe.distortion(list(masks)))
    finally:
        for name, weight in originals.items():
            found[name].put(probe.model, weight)


def probe_of(model: nn.Module | Stack, inputs: Inputs, output: Callable[[Any], Tensor] | None = None) -> Probe:
    """The quickest way to compare the outputs of a model on these inputs; see :func:`rate_distortion`."""
    if isinstance(model, Stack) and model.architecture.causal:
        return _Decoder(model, inputs)
    return _AnyModel(_module(model), inputs, output or _logits)


@torch.no_grad()
def _curve(probe: Probe, matrix: Weight, grid: int, uses: float, count: Callable[..., None]) -> Curve:
    weight = matrix.of(probe.model)
    order = smallest(weight)
    zeros = int((weight == 0).sum())
    told = {0: Distortion(0.0, 0.0)}
    severs = False
    try:
        for q in range(1, grid + 1):
            pruned = matrix.size * q // grid
            if pruned <= zeros:
                told[q] = told[0]
            else:
                matrix.put(probe.model, without(weight, order[:pruned]))
                told[q] = Distortion.of(probe.distortion([matrix.name]))
                severs = q == grid and probe.still
            count(note=matrix.name)
    finally:
        matrix.put(probe.model, weight)
    return Curve(
        matrix.size, zeros, uses, severs, [told[q].mean for q in range(grid + 1)], [told[q].worst for q in told]
    )


class _AnyModel:
    """A module that is run from its input to its output."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Inputs, output: Callable[[Any], Tensor]) -> None:
        self.model = share(model).eval()
        self.output = output
        sizes = [len(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs.values())]
        if not sizes or min(sizes) == 0 or len(set(sizes)) > 1:
            raise CalibrationError(f"calibration inputs of lengths {sizes}: give the same number of each, at least one")
        self.count = sizes[0]
        parameter = next(model.parameters())
        self.batches = [
            inputs[start : start + BATCH].to(parameter.device)
            if isinstance(inputs, Tensor)
            else {name: tensor[start : start + BATCH].to(parameter.device) for name, tensor in inputs.items()}
            for start in range(0, self.count, BATCH)
        ]
        self.reference = [self._run(batch) for batch in self.batches]
        if not all(torch.isfinite(each).all() for each in self.reference):
            raise NumericsError(f"non-finite output of this {type(model).__name__}: try float32, or check the weights")
        self.silent = torch.cat([each.double().square().flatten(1).mean(1) for each in self.reference]).cpu()
        self._variance = float(_variance(self.reference))
        self._last = self.reference

    def _run(self, batch: Any) -> Tensor:
        out = self.output(self.model(**batch) if isinstance(batch, Mapping) else self.model(batch))
        return out.float().reshape(len(out), -1)

    def distortion(self, changed: Collection[str]) -> Tensor:
        self._last = [self._run(batch) for batch in self.batches]
        pairs = zip(self._last, self.reference, strict=True)
        found = torch.cat([(ours - theirs).square().mean(1).double() for ours, theirs in pairs]).cpu()
        return _finite(found, changed)

    @property
    def still(self) -> bool:
        return float(_variance(self._last)) <= STILL * self._variance

    @torch.no_grad()
    def uses(self) -> dict[str, float]:
        """How often each weight is multiplied for one input, counted by hooks on modules while one batch runs."""
        seen: dict[str, float] = {}
        hooks = []
        rows = min(self.count, BATCH)

        def counting(path: str) -> Callable[..., None]:
            def count(module: Any, given: Any, out: Any) -> None:
                transposed = getattr(module, "transposed", False)
                values = given[0] if transposed else out
                channels = module.in_channels if transposed else _out_features(module)
                seen[path] = seen.get(path, 0.0) + values.numel() / channels / rows

            return count

        found = matrices(self.model)
        for matrix in found.values():
            for path, name in matrix.places:
                module = self.model.get_submodule(path)
                if name == "weight":
                    hooks.append(module.register_forward_hook(counting(path)))
        try:
            self._run(self.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        return {name: sum(seen.get(path, 0.0) for path, _ in matrix.places) for name, matrix in found.items()}


class _Decoder:
    """A stack that is run from the first changed sublayer on.

    Layers come in the order of the stack, so one stream of each batch is enough: it moves on with them.
    """

    @torch.no_grad()
    def __init__(self, stack: Stack, tokens: Tokens) -> None:
        self.original = stack
        self.model = share(stack.model).eval()
        self.stack = Stack(self.model, stack=stack.stack)
        rows = sequences(tokens)
        size = max(1, TOKENS // rows[0]["input_ids"].shape[1])
        self.inputs = [
            {name: torch.cat([row[name] for row in rows[start : start + size]]).to(stack.device) for name in rows[0]}
            for start in range(0, len(rows), size)
        ]
        self.contexts = [self.stack.context(inputs) for inputs in self.inputs]
        self._at = stack.positions[0]
        self._streams: list[Stream] = [context.h for context in self.contexts]
        self.starts = {name: self._start(name) for name in matrices(self.model)}
        config, head = stack.config, stack.unembedding.weight
        self.linear = getattr(config, "final_logit_softcapping", None) is None  # from final states to logits
        wide = head.detach().float()
        self.gram = wide.T @ wide / len(wide)  # (W d)'(W d) / C = d' (W'W / C) d
        self.final = [self._normed(context, h, self._at) for context, h in self._before(self._at)]
        if not all(torch.isfinite(each[0][each[1]]).all() for each in self.final):
            raise NumericsError(f"non-finite final states of {stack.name}: try float32, or check the weights")
        plain = self.linear and getattr(stack.unembedding, "bias", None) is None
        self.silent = torch.cat([_rows(self._square(h) if plain else _mean_square(self._logits(h)), real)
                                 for h, real in self.final])  # fmt: skip
        self.still = False  # every sublayer adds to the stream, so none of them severs it

    def _start(self, name: str) -> Position:
        """The place from which on a matrix matters; before layer 0 for one of the front."""
        architecture = self.stack.architecture
        if name == f"{architecture.head}.weight" or name == f"{architecture.base}.project_out.weight":
            return self.stack.end
        if not name.startswith(architecture.prefix):
            return FRONT
        layer, _, rest = name.removeprefix(architecture.prefix).partition(".")
        served = [each.name for each in architecture.sublayers if rest.startswith(tuple(f"{m}." for m in each.modules))]
        return Position(int(layer), served[-1] if served else architecture.names[0])

    def _before(self, start: Position) -> Iterator[tuple[Context, Stream]]:
        """The original's stream of each batch before a sublayer."""
        if start < self._at:
            self._at, self._streams = self.stack.positions[0], [context.h for context in self.contexts]
        self._streams = [
            self.original.run(h, self._at, start, context)
            for context, h in zip(self.contexts, self._streams, strict=True)
        ]
        self._at = start
        return zip(self.contexts, self._streams, strict=True)

    def _normed(self, context: Context, h: Stream, start: Position) -> tuple[Tensor, Tensor]:
        return self.stack.normed(self.stack.run(h, start, len(self.stack), context)), context.real

    def _logits(self, final: Tensor) -> Tensor:
        return self.original.logits(final).float()

    def _square(self, moved: Tensor) -> Tensor:
        """The mean square over the vocabulary of W moved [batch, time], from moved [batch, time, hidden]."""
        return ((moved.float() @ self.gram) * moved.float()).sum(-1).clamp_(min=0)

    def distortion(self, changed: Collection[str]) -> Tensor:
        start = min(self.starts[name] for name in changed)
        head = f"{self.stack.architecture.head}.weight"
        if start == FRONT:
            fresh = Stack(self.model, stack=self.stack.stack)  # the front of a stack is a copy, made once
            before: Any = [(context, context.h) for context in (fresh.context(inputs) for inputs in self.inputs)]
        else:
            before = self._before(start)
        found = []
        for (context, h), (final, real) in zip(before, self.final, strict=True):
            ours, _ = self._normed(context, h, max(start, self.stack.positions[0]))
            if head in changed or not self.linear:
                squared = _mean_square(self.stack.logits(ours).float() - self._logits(final))
            else:
                squared = self._square(ours.float() - final.float())
            found.append(_rows(squared, real))
        return _finite(torch.cat(found), changed)

    def uses(self) -> dict[str, float]:
        """A token multiplies with every weight once, and with those of the experts that it is sent to."""
        config = self.stack.config
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        share_of_experts = getattr(config, "num_experts_per_tok", 1) / experts
        return {
            name: share_of_experts if matrix.of(self.model).ndim == 3 else 1.0
            for name, matrix in matrices(self.model).items()
        }


def _module(model: nn.Module | Stack) -> nn.Module:
    return model.model if isinstance(model, Stack) else model


def _logits(out: Any) -> Tensor:
    out = getattr(out, "logits", out)
    return out[0] if isinstance(out, tuple) else out


def _out_features(module: Any) -> int:
    return next(getattr(module, name) for name in ("out_channels", "out_features", "nf") if hasattr(module, name))


def _variance(outputs: list[Tensor]) -> Tensor:
    """The variance of outputs [inputs, values] over inputs, summed over values; 0 for a single input."""
    every = torch.cat(outputs).double()
    return (every - every.mean(0)).square().sum()


def _mean_square(values: Tensor) -> Tensor:
    return values.square().mean(-1)


def _rows(squared: Tensor, real: Tensor) -> Tensor:
    """The mean over the real positions of each row [batch], float64, from squares [batch, time]."""
    return (torch.where(real, squared, 0.0).double().sum(1) / real.sum(1)).cpu()


def _finite(found: Tensor, changed: Collection[str]) -> Tensor:
    if not torch.isfinite(found).all():
        raise NumericsError(f"non-finite output with {', '.join(list(changed)[:2])} pruned: try dtype float32")
    return found


def _digest(inputs: Inputs) -> str:
    parts = {"": inputs} if isinstance(inputs, Tensor) else inputs
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {list(parts[name].shape)} {parts[name].dtype};".encode())
        digest.update(parts[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# The file of the curves: JSON lines, a header and then one line for each layer.


def _start(path: Path, header: dict[str, Any], silent: Distortion, done: dict[str, Curve]) -> None:
    lines = [json.dumps(header | {"silent": vars(silent)}) + "\n", *(_line(*item) for item in done.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MethodError(f"{path}: curves cannot be written there ({error.strerror}): give another file") from None
    write(path, "".join(lines))


def _line(name: str, curve: Curve) -> str:
    return json.dumps({"layer": name} | vars(curve)) + "\n"


def _read(path: Path) -> Curves | None:
    """What a file holds, up to the first line that a kill cut short; None where there is no file."""
    if not path.exists():
        return None
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        header = parse_json(first)
        silent = Distortion(**header.pop("silent"))
        if header["schema"] != SCHEMA or not {"weights", "calibration", "output", "grid", "layers"} <= set(header):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise MethodError(f"{path}: is no file of rate-distortion curves: give another name") from None
    curves = Curves(header, silent)
    for line in rest:
        try:
            entry = parse_json(line)
            name = entry.pop("layer")
            curves.layers[name] = Curve(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            break
    return curves


def _check_same(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    said = {"layers": "another model", "weights": "other weights", "calibration": "other calibration data"}
    said |= {key: f"{what} {theirs[key]}, not {ours[key]}" for key, what in (("output", "the"), ("grid", "a grid of"))}
    for key in ("layers", "weights", "calibration", "output", "grid"):
        if theirs[key] != ours[key]:
            raise MethodError(f"{path}: holds the curves of {said[key]}: give another file, or remove this one")
