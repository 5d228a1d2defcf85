"""The diagonal of the empirical Fisher information: how much a model's loss on some data depends on each weight.

    F[i] = 1/M sum over batches of ( d/d theta_i  mean over the batch of the loss )^2

The true diagonal is the case of batches of one, which is the default. Larger batches are a different estimator, in
which gradients of different samples cancel; so an importance records how it was estimated, and is compared only with
others of the same estimator. Label-free importances (arXiv 2402.19308) use |gradient| of the squared norm of the logits
instead.

Gradients of single samples are not computed one by one. A linear layer with input x and output gradient g has the
gradient g x^T, whose square is g^2 (x^2)^T, so one matrix product sums over a whole chunk of samples; a convolution is
the same over patches, norms are sums, and any other module is differentiated sample by sample with torch.func. Models
for which this is not possible (tied weights, weights in modules with children, sequences) run sample by sample. In both
cases a gradient is used as soon as it is computed, and then freed: besides the model, memory holds one copy of its
parameters, the sum, and what one module needs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, layer_norm, unfold
from torch.nn.modules.batchnorm import _BatchNorm

from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.files import replacing
from lamella.measure import labelled
from lamella.measure.labelled import Data, LabelledBatch, Order, are_samples, batches, content, is_pair, outputs
from lamella.plan import fingerprint
from lamella.progress import tracker
from lamella.reading import parse_json
from lamella.stack import Weight, share, weights

Kind = Literal["fisher", "label-free"]
Loss = Callable[[nn.Module, LabelledBatch], Tensor]
Power = Callable[[Tensor], Tensor]

SCHEMA = "lamella.importance/1"
POWERS: dict[Kind, Power] = {"fisher": torch.square, "label-free": torch.abs}
CHUNK = 64  # number of samples that run together
SPACE = 2**18  # elements of single-sample gradients at a time, few enough for a processor's cache


@dataclass(frozen=True)
class Estimator:
    """How an importance was estimated; two importances can be compared only if all fields are equal.

    Attributes:
        kind: ``fisher``, the mean of squared gradients; or ``label-free``, the mean of their absolute values.
        loss: name of the loss that was differentiated.
        batch: number of samples whose mean gradient is squared; 1 for the true diagonal.
        order: how samples were grouped into batches: ``given``, ``by class`` or ``shuffled``; ``any`` for batches of
            one.
    """

    kind: Kind
    loss: str
    batch: int
    order: str

    def __str__(self) -> str:
        cut = "" if self.batch == 1 else f", {self.order}"
        return f"{self.kind} of {self.loss}, batches of {self.batch}{cut}"


class _Lazy(Mapping[str, Tensor]):
    """A mapping of tensors that are computed on access."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Fisher:
    """The importance of every weight of one model on some data. It can be stored in place of the data.

    Attributes:
        tensors: by parameter name, in the parameter's shape, float32 and non-negative.
        estimator: how it was estimated.
        samples: number of samples.
        batches: number of batches that it is the mean of.
        data: SHA-256 of the data.
        weights: SHA-256 of the weights that it was measured on; after an edit it is outdated.
        seconds: duration of the measurement; 0 if it was read from a file.
    """

    tensors: Mapping[str, Tensor]
    estimator: Estimator
    samples: int
    batches: int
    data: str
    weights: str
    seconds: float = 0.0

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything except the tensors and what differs between runs."""
        fields = {name: getattr(self, name) for name in ("samples", "batches", "data", "weights")}
        return fields | {"estimator": asdict(self.estimator)}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the estimator and the counts in its metadata; it appears when it is complete.

        Args:
            path: the file.

        Raises:
            MethodError: if it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
            with replacing(path) as partial:
                save_file(kept, str(partial), metadata={SCHEMA: json.dumps(self.provenance)})
        except (OSError, SafetensorError) as error:
            raise MethodError(f"{path}: importances cannot be written there ({error}): give another file") from None

    @classmethod
    def read(cls, path: str | Path) -> Fisher:
        """Open a file written by :meth:`save`; each tensor is read on access.

        Args:
            path: the file.

        Raises:
            MethodError: if it is missing, damaged, or not such a file.
        """
        try:
            file = safe_open(str(path), framework="pt")
            metadata = parse_json((file.metadata() or {})[SCHEMA])
            return cls(_Lazy(file.keys(), file.get_tensor), Estimator(**metadata.pop("estimator")), **metadata)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise MethodError(
                f"{path}: is not a file of importances ({error.__class__.__name__}): make it with "
                "lamella.measure.fisher, `lamella forget --save-importance` or `lamella run cstrl gaps --save-fisher`"
            ) from None

    def joined(self, other: Fisher) -> Fisher:
        """Return the importance on the combined data: the mean of both, weighted by their numbers of batches.

        Args:
            other: the other importance.

        Raises:
            MethodError: if they cannot be compared.
        """
        self.check_comparable(other)
        fraction = other.batches / (self.batches + other.batches)

        def mean(name: str) -> Tensor:
            return torch.lerp(self.tensors[name], other.tensors[name].to(self.tensors[name].device), fraction)

        both = hashlib.sha256(f"{self.data} {other.data}".encode()).hexdigest()
        samples, count, seconds = (
            getattr(self, name) + getattr(other, name) for name in ("samples", "batches", "seconds")
        )
        return Fisher(_Lazy(self.tensors, mean), self.estimator, samples, count, both, self.weights, seconds)

    def check_comparable(self, other: Fisher) -> None:
        """Check that another importance was estimated in the same way, for the same parameters.

        Args:
            other: the other importance.

        Raises:
            MethodError: if it was not.
        """
        if self.estimator != other.estimator:
            raise MethodError(
                f"these importances are of different estimators ({self.estimator}; {other.estimator}): measure both in "
                "the same way"
            )
        for name in self.tensors:
            if name not in other.tensors:
                raise MethodError(f"one of the importances lacks '{name}': measure both on the same parameters")


def fisher(
    model: nn.Module,
    data: Data,
    *,
    kind: Kind = "fisher",
    loss: Loss | None = None,
    batch: int = 1,
    order: Order = "given",
    seed: int = 0,
    names: Iterable[str] | None = None,
) -> Fisher:
    """Measure the importance of weights in one pass over some data.

    The model runs in eval mode: no dropout, and the running statistics of batch norms stay unchanged. Gradients are
    squared and summed in float32.

    Args:
        model: any torch module; it is not changed.
        data: inputs with labels, see :mod:`lamella.measure.labelled`.
        kind: ``fisher``, squared gradients of the loss; or ``label-free``, absolute gradients of the squared norm of
            the logits.
        loss: computes the *mean* loss of the samples in a batch, from the model and the batch. If None, the
            cross-entropy of the labels, for a sequence the mean over its tokens; without labels, the squared norm of
            the logits.
        batch: number of samples whose mean gradient is squared; 1 for the true diagonal.
        order: how samples are grouped into larger batches; see :func:`lamella.measure.labelled.batches`.
        seed: random seed of the order ``shuffled``.
        names: names of the parameters to measure; all if None. Tied parameters occur once, under their first name.

    Raises:
        CalibrationError: for no data, or a label that the model has no output for.
        NumericsError: for inputs, a loss or gradients that are not finite, or importances that are all zero.
        MethodError: for an option out of range, or an unknown parameter name.
    """
    if kind not in POWERS:
        raise MethodError(f"kind '{kind}': choose fisher or label-free")
    if batch < 1:
        raise MethodError(f"batch {batch}: give at least 1 sample")
    chosen = _selected(model, names)
    named = "cross-entropy" if kind == "fisher" else "squared norm of the logits"
    if loss is not None:
        named = getattr(loss, "__qualname__", type(loss).__qualname__)
    single = batch == 1
    estimator = Estimator(kind, named, batch, "any" if single else order)
    objective = loss or (mean_cross_entropy if kind == "fisher" else mean_output_norm)
    begin = time.perf_counter()
    sums = _Sums(model, chosen, objective, POWERS[kind])
    samples = count = 0
    digest = hashlib.sha256()
    chunk = 1 if are_samples(data) else CHUNK  # sequences run one by one
    with tracker("importances", labelled.count(data)) as step:
        for each in batches(data, chunk if single else batch, "given" if single else order, seed):
            size = _size(each)
            if single:
                sums.add_each(each, samples)
            else:
                sums.add(each, samples)
            samples, count = samples + size, count + (size if single else 1)
            digest.update(content(each))
            step(size)
    if not samples:
        raise CalibrationError("there are no samples to measure importances on: give some")
    means, seconds = sums.mean(count), time.perf_counter() - begin
    return Fisher(means, estimator, samples, count, digest.hexdigest(), fingerprint.tensors(model), seconds)


def _selected(model: nn.Module, names: Iterable[str] | None) -> dict[str, Weight]:
    found = weights(model)
    if names is None:
        return found
    requested = list(names)
    for name in requested:
        if name not in found:
            example = next(iter(found))
            raise MethodError(f"this {type(model).__name__} has no parameter '{name}'; a name is like '{example}'")
    return {name: found[name] for name in requested}


def mean_cross_entropy(model: nn.Module, batch: LabelledBatch, first: int = 0) -> Tensor:
    """Return the mean cross-entropy over samples in nats, for a sequence the mean over its tokens.

    Args:
        model: the model.
        batch: the batch.
        first: number of samples before this batch, for messages.
    """
    losses = []
    for logits, labels in outputs(model, batch, first):
        if labels is None:
            raise CalibrationError("the loss needs labels: give (inputs, labels), or use the label-free kind")
        losses.append(cross_entropy(_wide(logits), labels))
    return torch.stack(losses).mean()


def mean_output_norm(model: nn.Module, batch: LabelledBatch, first: int = 0) -> Tensor:
    """Return the mean squared norm of the logits over samples, for a sequence the mean over its positions.

    Args:
        model: the model.
        batch: the batch.
        first: number of samples before this batch, for messages.
    """
    return torch.stack([_wide(logits).square().sum(-1).mean() for logits, _ in outputs(model, batch, first)]).mean()


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, unless its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Sums:
    """Sums of powers of gradients, each added as soon as it is computed and then freed."""

    def __init__(self, model: nn.Module, chosen: Mapping[str, Weight], loss: Loss, power: Power) -> None:
        self.loss, self.power = loss, power
        self.totals: dict[str, Tensor] = {}
        self.model = _copy(model, chosen)
        for name, weight in chosen.items():
            parameter = weight.of(self.model)
            self.totals[name] = torch.zeros_like(_wide(parameter.detach()))
            parameter.register_post_accumulate_grad_hook(self._accumulate(self.totals[name]))
        self.chunks = _Chunks.of(model, chosen, self.totals, power)
        self.tried = False

    def _accumulate(self, total: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                total.add_(self.power(parameter.grad.to(total.dtype)))
                parameter.grad = None

        return add

    @torch.enable_grad()
    def add(self, batch: LabelledBatch, first: int) -> None:
        """Add the mean gradient of a batch."""
        loss = _loss(self.loss, self.model, batch, first)
        _check_loss(loss, first)
        if loss.requires_grad:  # it depends on a measured parameter
            loss.backward()

    def add_each(self, chunk: LabelledBatch, first: int) -> None:
        """Add the gradients of single samples, all at once if this gives the same result."""
        if not self.tried:
            self.tried = True
            if self.chunks is not None and not self._agree(self.chunks, _part(chunk, slice(0, 2)), first):
                self.chunks = None
        if self.chunks is None or not self.chunks.add(self.loss, chunk, first):
            self._one_by_one(chunk, first)

    def _one_by_one(self, chunk: LabelledBatch, first: int) -> None:
        for index in range(_size(chunk)):
            self.add(_part(chunk, slice(index, index + 1)), first + index)

    def _agree(self, chunks: _Chunks, pair: LabelledBatch, first: int) -> bool:
        """Return whether both ways agree on a few samples.

        They differ for a model that mixes samples or hides a use of weights.
        """
        if not is_pair(pair) or not chunks.add(self.loss, pair, first):
            return False
        at_once = self._sketch()
        self._one_by_one(pair, first)
        return bool(torch.isfinite(at_once).all()) and torch.allclose(
            at_once, self._sketch(), rtol=1e-3, atol=1e-6 * float(at_once.max())
        )

    def _sketch(self) -> Tensor:
        """Return the sum and the norm of each total [totals, 2], and reset the totals to zero."""
        found = torch.stack(
            [torch.stack([total.double().sum(), total.double().norm()]) for total in self.totals.values()]
        )
        for total in self.totals.values():
            total.zero_()
        return found

    def mean(self, count: int) -> dict[str, Tensor]:
        """Return the sums divided by ``count``.

        Raises:
            NumericsError: if a mean is not finite, or all are zero.
        """
        largest = 0.0
        for name, total in self.totals.items():
            total /= count
            if not torch.isfinite(total).all():
                raise NumericsError(f"the gradients of '{name}' are not finite: try float32, or check the weights")
            largest = max(largest, float(total.max()) if total.numel() else 0.0)
        if largest == 0:
            raise NumericsError(
                "all importances are zero: all gradients are 0 in this precision: try float32, or other data"
            )
        return self.totals


class _Chunks:
    """Sums gradients of single samples over chunks, from the inputs of modules and the gradients of their outputs."""

    def __init__(self, model: Any, owners: Mapping[str, dict[str, str]], totals: dict[str, Tensor], power: Power):
        self.model, self.totals, self.power = model, totals, power
        self.quiet, self.size, self.calls, self.fits = False, 0, dict.fromkeys(owners, 0), True
        for path, names in owners.items():
            model.get_submodule(path).register_forward_hook(self._hook(path, names))

    @classmethod
    def of(
        cls, model: nn.Module, chosen: Mapping[str, Weight], totals: dict[str, Tensor], power: Power
    ) -> _Chunks | None:
        """Return None for a model with a weight that is in several modules, or in a module with children."""
        owners: dict[str, dict[str, str]] = {}
        for name, weight in chosen.items():
            path, local = weight.occurrences[0]
            if len(weight.occurrences) > 1 or list(model.get_submodule(path).children()):
                return None
            owners.setdefault(path, {})[local] = name
        return cls(_copy(model, {}), owners, totals, power)

    @torch.enable_grad()
    def add(self, loss: Loss, chunk: LabelledBatch, first: int) -> bool:
        """Add a chunk, or return False if the model does not call its modules as required."""
        self.size, self.fits = len(chunk[0]), True
        self.calls = dict.fromkeys(self.calls, 0)
        mean = _loss(loss, self.model, chunk, first)
        if not self.fits or set(self.calls.values()) != {1}:
            return False
        _check_loss(mean, first)
        (self.size * mean).backward()
        return True

    def _hook(self, path: str, names: dict[str, str]) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            if self.quiet:
                return None
            self.calls[path] += 1
            tensors = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            if not tensors or len(args[0]) != self.size or len(out) != self.size:
                self.fits = False
                return None
            out = out if out.requires_grad else out.detach().requires_grad_().clone()
            x = args[0].detach()
            out.register_hook(lambda g: self._take(module, names, x, g))
            return out

        return hook

    @torch.no_grad()
    def _take(self, module: nn.Module, names: dict[str, str], x: Tensor, g: Tensor) -> None:
        self.quiet = True
        try:
            for local, total in _powers(module, x, g, self.power).items():
                if local in names:
                    self.totals[names[local]] += total.view_as(self.totals[names[local]])
        finally:
            self.quiet = False


def _powers(module: nn.Module, x: Tensor, g: Tensor, power: Power) -> dict[str, Tensor]:
    """Return the sum over samples of powers of the gradients of a module's parameters.

    Args:
        module: the module.
        x: its input [samples, ...].
        g: gradient of the sum of the samples' losses with respect to its output [samples, ...].
        power: the power.
    """
    if isinstance(module, nn.Linear):
        if x.ndim == 2:
            return {"weight": power(g).T @ power(x), "bias": power(g).sum(0)}
        return _products(g.flatten(1, -2).transpose(1, 2), x.flatten(1, -2).transpose(1, 2), power)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        patches = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        groups = g.flatten(2).unflatten(1, (module.groups, -1)), patches.unflatten(1, (module.groups, -1))
        found = [_products(a, b, power) for a, b in zip(*(each.unbind(1) for each in groups), strict=True)]
        return {name: torch.cat([each[name] for each in found]) for name in ("weight", "bias")}
    if isinstance(module, nn.LayerNorm):
        positions = range(1, x.ndim - len(module.normalized_shape))
        return _scales(g, layer_norm(x, module.normalized_shape, eps=module.eps), positions, power)
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        normed = batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        return _scales(g, normed, range(2, x.ndim), power)
    return _differentiated(module, x, g, power)


def _products(g: Tensor, x: Tensor, power: Power) -> dict[str, Tensor]:
    """Return the sums for the products g x^T of each sample, with g and x [samples, features, positions]."""
    step = max(1, SPACE // (g.shape[1] * x.shape[1]))
    parts = zip(g.split(step), x.split(step), strict=True)
    total = sum(power(a @ b.transpose(1, 2)).sum(0) for a, b in parts)
    return {"weight": total, "bias": power(g.sum(2)).sum(0)}  # type: ignore[dict-item]


def _scales(g: Tensor, normed: Tensor, positions: range, power: Power) -> dict[str, Tensor]:
    """Return the sums for a scale and a shift of normalised inputs, summed over the positions of each sample."""
    each = {"weight": g * normed, "bias": g}
    return {name: power(t.sum(tuple(positions)) if positions else t).sum(0) for name, t in each.items()}


def _differentiated(module: nn.Module, x: Tensor, g: Tensor, power: Power) -> dict[str, Tensor]:
    """Return the sums by running the module again for each sample, whatever it is."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}

    def weighted(parameters: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (x[None],))[0] * g).sum()

    each = torch.func.vmap(torch.func.grad(weighted), in_dims=(None, 0, 0))
    step = max(1, SPACE // sum(parameter.numel() for parameter in parameters.values()))
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for a, b in zip(x.split(step), g.split(step), strict=True):
        for name, gradients in each(parameters, a, b).items():
            totals[name] += power(gradients).sum(0)
    return totals


def _copy(model: nn.Module, chosen: Mapping[str, Weight]) -> Any:
    """Return a copy in eval mode that shares the tensors, in which only the chosen parameters require gradients."""
    copy = share(model).eval()
    for name, weight in weights(copy).items():
        weight.put(copy, nn.Parameter(weight.of(copy).detach(), requires_grad=name in chosen))
    return copy


def _size(batch: LabelledBatch) -> int:
    return len(batch[0]) if is_pair(batch) else len(batch)


def _part(batch: LabelledBatch, part: slice) -> LabelledBatch:
    if is_pair(batch):
        inputs, labels = batch
        return inputs[part], None if labels is None else labels[part]
    return batch[part]


def _loss(loss: Loss, model: nn.Module, batch: LabelledBatch, first: int) -> Tensor:
    """Return the loss; Lamella's own losses take the index of the first sample for messages."""
    if loss in (mean_cross_entropy, mean_output_norm):
        return loss(model, batch, first)
    return loss(model, batch)


def _check_loss(loss: Tensor, first: int) -> None:
    if not torch.isfinite(loss):
        raise NumericsError(
            f"the loss is {float(loss.detach()):g} from sample {first} onwards: try float32, or check the weights"
        )
