"""Comparison of the output of a model with changed matrices with that of the original.

Any torch model is measured by running it. A decoder is run from the changed sublayer on, since the hidden states before
it are the original's; and where its head is a plain linear layer W, the squared difference of the logits equals that of
the final states under W'W, so the head is not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError, NumericsError
from lamella.measure.hidden_states import Tokens, sequences
from lamella.stack import Context, Hidden, Position, Prefixes, Stack, matrices, share

Inputs = Tensor | Mapping[str, Tensor]
FRONT = Position(-1, "")  # the modules before the layers
BATCH = 64  # inputs per forward pass
TOKENS = 512  # tokens per forward pass of a decoder
CONSTANT = 1e-6  # an output with less than this fraction of the original's variance over inputs counts as constant


class Probe(Protocol):
    """Runs a copy of a model whose matrices can be replaced, and compares its output with the original's.

    Attributes:
        model: the copy.
        silent: distortion of an all-zero output, for each input [inputs].
    """

    model: nn.Module
    silent: Tensor

    def distortion(self, changed: Collection[str]) -> Tensor:
        """Return the distortion of each input [inputs], float64, given which matrices of ``model`` were changed."""
        ...

    def uses(self) -> dict[str, float]:
        """Return by matrix how often an input multiplies with each weight; 0 where that cannot be counted."""
        ...

    @property
    def is_constant(self) -> bool:
        """Whether the last computed output is the same for all inputs."""
        ...


def probe_of(model: nn.Module | Stack, inputs: Inputs, output: Callable[[Any], Tensor] | None = None) -> Probe:
    """Return the fastest way to compare the outputs of a model on these inputs; see ``rate_distortion``.

    Args:
        model: a torch module, or a stack; the stack of a decoder is measured faster.
        inputs: input of a module, or several by name; for a decoder, token ids `[sequences, time]`.
        output: maps the module's return value to its outputs before the softmax `[inputs, ...]`; not used for a
            decoder.
    """
    if isinstance(model, Stack) and model.architecture.causal:
        return Decoder(model, inputs)
    return AnyModel(module_of(model), inputs, output or _logits)


class AnyModel:
    """A module that is run from its input to its output."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Inputs, output: Callable[[Any], Tensor]) -> None:
        self.model = share(model).eval()
        self.output = output
        sizes = [len(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs.values())]
        if not sizes or min(sizes) == 0 or len(set(sizes)) > 1:
            raise CalibrationError(
                f"calibration inputs of lengths {sizes}: give tensors of the same length, at least 1"
            )
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
        """Return the distortion of each input [inputs], float64."""
        self._last = [self._run(batch) for batch in self.batches]
        pairs = zip(self._last, self.reference, strict=True)
        found = torch.cat([(ours - theirs).square().mean(1).double() for ours, theirs in pairs]).cpu()
        return _finite(found, changed)

    @property
    def is_constant(self) -> bool:
        """Whether the last computed output is the same for all inputs."""
        return float(_variance(self._last)) <= CONSTANT * self._variance

    @torch.no_grad()
    def uses(self) -> dict[str, float]:
        """Count how often each weight is multiplied for one input, by hooks on modules while one batch runs."""
        counts: dict[str, float] = {}
        hooks = []
        rows = min(self.count, BATCH)

        def counting(path: str) -> Callable[..., None]:
            def count(module: Any, args: Any, out: Any) -> None:
                transposed = getattr(module, "transposed", False)
                values = args[0] if transposed else out
                channels = module.in_channels if transposed else _out_features(module)
                counts[path] = counts.get(path, 0.0) + values.numel() / channels / rows

            return count

        found = matrices(self.model)
        for matrix in found.values():
            for path, name in matrix.occurrences:
                module = self.model.get_submodule(path)
                if name == "weight":
                    hooks.append(module.register_forward_hook(counting(path)))
        try:
            self._run(self.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        return {name: sum(counts.get(path, 0.0) for path, _ in matrix.occurrences) for name, matrix in found.items()}


class Decoder:
    """A stack that is run from the first changed sublayer on.

    Layers are visited in the order of the stack, so only the hidden states before the current layer are kept per batch.
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
        self._prefixes: Prefixes[Position, list[Hidden]] = Prefixes([each.h for each in self.contexts])
        self.starts = {name: self._start(name) for name in matrices(self.model)}
        config, head = stack.config, stack.unembedding.weight
        self.linear = getattr(config, "final_logit_softcapping", None) is None  # from final states to logits
        wide = head.detach().float()
        self.gram = wide.T @ wide / len(wide)  # (W d)'(W d) / C = d' (W'W / C) d
        self.final = [self._normed(context, h, stack.positions[0]) for context, h in self._before(stack.positions[0])]
        if not all(torch.isfinite(each[0][each[1]]).all() for each in self.final):
            raise NumericsError(f"non-finite final states of {stack.name}: try float32, or check the weights")
        plain = self.linear and getattr(stack.unembedding, "bias", None) is None
        self.silent = torch.cat([_rows(self._square(h) if plain else _mean_square(self._logits(h)), real)
                                 for h, real in self.final])  # fmt: skip
        self.is_constant = False  # residual connections bypass every sublayer

    def _start(self, name: str) -> Position:
        """Return the first position that a matrix affects; FRONT for one before the layers."""
        architecture = self.stack.architecture
        if name == f"{architecture.head}.weight" or name == f"{architecture.base}.project_out.weight":
            return self.stack.end
        if not name.startswith(architecture.prefix):
            return FRONT
        layer, _, rest = name.removeprefix(architecture.prefix).partition(".")
        served = [each.name for each in architecture.sublayers if rest.startswith(tuple(f"{m}." for m in each.modules))]
        return Position(int(layer), served[-1] if served else architecture.names[0])

    def _before(self, start: Position) -> Iterator[tuple[Context, Hidden]]:
        """Return the original's hidden states of each batch before a sublayer."""
        chain = tuple(position for position in self.stack.positions if position < start)
        hidden = self._prefixes.behind(chain, self._take, way=False)
        self._prefixes.keep([chain])
        return zip(self.contexts, hidden, strict=True)

    def _take(self, hidden: list[Hidden], chain: tuple[Position, ...]) -> list[Hidden]:
        """Return the original's hidden states of each batch after one more sublayer."""
        run, last, behind = self.original.run, chain[-1], self.original.after(chain[-1])
        return [run(h, last, behind, context) for h, context in zip(hidden, self.contexts, strict=True)]

    def _normed(self, context: Context, h: Hidden, start: Position) -> tuple[Tensor, Tensor]:
        return self.stack.normed(self.stack.run(h, start, len(self.stack), context)), context.real

    def _logits(self, final: Tensor) -> Tensor:
        return self.original.logits(final).float()

    def _square(self, moved: Tensor) -> Tensor:
        """Return the mean square over the vocabulary of W moved [batch, time], from moved [batch, time, hidden]."""
        return ((moved.float() @ self.gram) * moved.float()).sum(-1).clamp_(min=0)

    def distortion(self, changed: Collection[str]) -> Tensor:
        """Return the distortion of each sequence [sequences], float64."""
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
        """A token multiplies with every weight once, and with those of the experts that it is routed to."""
        config = self.stack.config
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        fraction_of_experts = getattr(config, "num_experts_per_tok", 1) / experts
        return {
            name: fraction_of_experts if matrix.of(self.model).ndim == 3 else 1.0
            for name, matrix in matrices(self.model).items()
        }


def module_of(model: nn.Module | Stack) -> nn.Module:
    """Return the torch module of a model or stack."""
    return model.model if isinstance(model, Stack) else model


def _logits(out: Any) -> Tensor:
    out = getattr(out, "logits", out)
    return out[0] if isinstance(out, tuple) else out


def _out_features(module: Any) -> int:
    return next(getattr(module, name) for name in ("out_channels", "out_features", "nf") if hasattr(module, name))


def _variance(outputs: list[Tensor]) -> Tensor:
    """Return the variance of outputs [inputs, values] over inputs, summed over values; 0 for a single input."""
    every = torch.cat(outputs).double()
    return (every - every.mean(0)).square().sum()


def _mean_square(values: Tensor) -> Tensor:
    return values.square().mean(-1)


def _rows(squared: Tensor, real: Tensor) -> Tensor:
    """Return the mean over the real positions of each row [batch], float64, from squares [batch, time]."""
    return (torch.where(real, squared, 0.0).double().sum(1) / real.sum(1)).cpu()


def _finite(found: Tensor, changed: Collection[str]) -> Tensor:
    if not torch.isfinite(found).all():
        raise NumericsError(f"non-finite output with {', '.join(list(changed)[:2])} pruned: try dtype float32")
    return found
