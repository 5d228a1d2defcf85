"""Training: encoding of pairs as samples, and the training stages (2 and 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt

from lamella import processes
from lamella.data.samples import Sample, pairs
from lamella.errors import MethodError
from lamella.measure import Fisher
from lamella.methods.cstrl.anchor import Anchor, AnchoredLoss, Penalty, measure_fisher, read_fisher, sites_of_parameters
from lamella.methods.cstrl.gaps import MASK, PREFIX, Gap
from lamella.stack import Model, Stack, last_stack, open_model, share
from lamella.train import Task, TrainConfig, TrainingLog, choose, fit, own, response_loss

TRAINING = TrainConfig(lr=2e-3, batch=16, weight_decay=0.01, schedule="linear", warmup=0.0)  # the paper's stage 4
GAP_TRAINING = replace(TRAINING, lr=3e-3, batch=32)  # the paper's stage 2
FISHER = "fisher.safetensors"
SUMMARISE = "summarize: "  # T5's prompt for summaries
MIN_SOURCE = 8  # minimum number of source tokens that must fit into a decoder's context


@dataclass(frozen=True)
class TextLengths:
    """Maximum lengths in tokens; longer texts are truncated at the end.

    Attributes:
        source_length: length of a source to summarise.
        summary_length: length of a summary.
        gap_length: length of a masked source, and of its target.
    """

    source_length: Annotated[int, Ge(MIN_SOURCE)] = 512
    summary_length: Annotated[int, Ge(MIN_SOURCE)] = 256
    gap_length: Annotated[int, Ge(MIN_SOURCE)] = 256


@dataclass(frozen=True)
class SummaryTraining:
    """Training on summaries, and evaluation.

    Attributes:
        prefix: text in front of each source; for a student, that of its teacher.
        epochs: number of epochs over the pairs, E, if the training has no steps.
        test_samples: number of test pairs that are summarised before and after training.
    """

    prefix: str = SUMMARISE
    epochs: Annotated[int, Ge(1)] = 20
    test_samples: Annotated[int, Ge(1)] = 200


@dataclass(frozen=True)
class FisherFiles:
    """Files with Fisher information.

    Attributes:
        fisher: file with the Fisher information of the given model; it has been trained on gap sentences already, so
            training starts with summaries.
        save_fisher: save the Fisher information to this file.
    """

    fisher: Path | None = None
    save_fisher: Path | None = None


@dataclass(frozen=True)
class GapTraining:
    """Training on gap sentences.

    Attributes:
        gap_epochs: number of epochs.
        gap_lr: maximum learning rate.
        gap_batch: batch size.
    """

    gap_epochs: Annotated[int, Ge(1)] = 18
    gap_lr: Annotated[float, Gt(0)] = 3e-3
    gap_batch: Annotated[int, Ge(1)] = 32


class PairEncoder:
    """Encode pairs as samples: source and target for an encoder-decoder, or both in one row for a decoder.

    Args:
        model: a model that takes and generates text.
        tokenizer: its tokenizer.

    Raises:
        MethodError: for a model that does not generate text, or a tokenizer without an end token.
    """

    def __init__(self, model: Model, tokenizer: Any) -> None:
        stacks = list(model.stacks.values())
        kinds = [(stack.architecture.modality, stack.architecture.causal) for stack in stacks]
        if kinds not in ([("text", True)], [("text", False), ("text", True)]):
            raise MethodError(f"cstrl trains models that take and generate text; {model.name} has {_described(stacks)}")
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise MethodError("summaries end with the tokenizer's end token: give a tokenizer that has one")
        self.tokenizer, self.encodes = tokenizer, len(stacks) == 2
        limit = getattr(last_stack(model.model).config, "max_position_embeddings", None)
        self.context = None if limit is None else int(limit)

    def samples(self, texts: Iterable[tuple[str, str]], prefix: str, source: int, target: int) -> list[Sample]:
        """Encode sources and targets.

        Args:
            texts: pairs of source and target.
            prefix: text in front of each source.
            source: maximum number of source tokens.
            target: maximum number of target tokens.

        Raises:
            MethodError: if a decoder's context is too short for both.
        """
        if self.context is not None:
            source = min(source, self.context - (0 if self.encodes else target))
            target = min(target, self.context)
        if source < MIN_SOURCE:
            raise MethodError(f"targets of {target} tokens leave no space for a source in a context of {self.context}: "
                              "shorten them (--summary-length, --gap-length)")  # fmt: skip
        if self.encodes:
            return [
                {"input_ids": self._whole(prefix + text, source), "labels": self._whole(summary, target)}
                for text, summary in texts
            ]
        return pairs((self._prompt(prefix + text, source), self._answer(summary, target)) for text, summary in texts)

    def _whole(self, text: str, max_length: int) -> torch.Tensor:
        """Encode a text for an encoder-decoder, with end token."""
        ids = self.tokenizer(text)["input_ids"]
        end = self.tokenizer.eos_token_id
        return torch.tensor([*(ids[:-1] if ids and ids[-1] == end else ids)[: max_length - 1], end])

    def _prompt(self, text: str, max_length: int) -> list[int]:
        """Encode a source and the separator before its summary."""
        parting = self._bare("\n") or [self.tokenizer.eos_token_id]
        return [*self.tokenizer(text)["input_ids"][: max_length - len(parting)], *parting]

    def _answer(self, text: str, max_length: int) -> list[int]:
        return [*self._bare(text)[: max_length - 1], self.tokenizer.eos_token_id]

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def gaps(self, found: Sequence[Gap], max_length: int) -> list[Sample]:
        """Encode masked sources.

        Args:
            found: the masked sources.
            max_length: maximum number of tokens of a source, and of its target.

        Raises:
            MethodError: if the tokenizer maps two masks to the same tokens.
        """
        if self._bare(MASK.format(0)) == self._bare(MASK.format(1)):
            raise MethodError(
                f"the tokenizer maps {MASK.format(0)} and {MASK.format(1)} to the same tokens, so gaps cannot be "
                "distinguished: add these masks to its vocabulary"
            )
        return self.samples([(gap.text, gap.target) for gap in found], PREFIX, max_length, max_length)


def _described(stacks: Sequence[Stack]) -> str:
    return " and ".join(f"{stack.stack} ({stack.architecture.modality})" for stack in stacks)


def with_steps(config: TrainConfig, samples: int, epochs: int) -> TrainConfig:
    """Return a configuration with the steps of some epochs, unless it has steps, evaluated after each epoch.

    Args:
        config: training configuration.
        samples: number of samples.
        epochs: number of epochs.
    """
    size = size_of(config)
    steps = config.steps or -(-epochs * samples // size)
    return replace(config, steps=steps, eval_every=config.eval_every or max(1, samples // size))


def size_of(config: TrainConfig) -> int:
    """Return the number of samples per step."""
    return config.batch * config.accumulate * processes.count()


def trainee(model: Model) -> Any:
    """Return a copy of a model that owns its parameters; tied ones stay tied."""
    view = share(model.model)
    own(view, lambda name: True)
    return view


def fill_gaps(
    model: Model, samples: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]], config: TrainConfig, out: Path
) -> tuple[Model, TrainingLog]:
    """Stage 2: train to generate the masked sentences.

    Args:
        model: the model; it is not changed.
        samples: training samples.
        held_out: held-out samples by name.
        config: training configuration with steps.
        out: folder for checkpoints.
    """
    view = trainee(model)
    log = fit(view, samples, Task(response_loss), config, out=out, trainable=lambda name: True, held_out=held_out)
    return open_model(view.eval(), name=f"{model.name}, gaps filled"), log


def importance_at(model: Model, samples: list[Sample], anchor: Anchor, out: Path) -> Fisher:
    """Stage 3: measure F at the gap-sentence solution, or load it from an earlier interrupted run.

    Args:
        model: the gap-sentence solution.
        samples: the gap-sentence samples.
        anchor: settings of the anchor.
        out: folder in which F is saved.
    """
    file = out / FISHER
    if file.exists():
        return read_fisher(file, model)
    found = measure_fisher(model, samples, anchor.fisher_batch)
    found.save(file)
    return found


def summarise(
    model: Model,
    fisher: Fisher | None,
    samples: Sequence[Sample],
    held_out: Mapping[str, Sequence[Sample]],
    anchor: Anchor,
    config: TrainConfig,
    out: Path,
) -> tuple[Model, TrainingLog, AnchoredLoss]:
    """Stage 4: train on summaries, starting from and anchored to the gap-sentence solution.

    Args:
        model: theta*; it is not changed.
        fisher: F at theta*; None for F = 1.
        samples: training samples.
        held_out: held-out samples by name.
        anchor: strength of the anchor.
        config: training configuration with steps.
        out: folder for checkpoints.
    """
    assert config.steps is not None
    view = trainee(model)
    start = choose(view, lambda name: True)
    importance = None if fisher is None else {name: fisher.tensors[name] for name in start}
    penalty = Penalty(start, importance, anchor.normalize == "mean")
    hook = AnchoredLoss(penalty, anchor, sites_of_parameters(model), samples=len(samples), size=size_of(config),
                    steps=config.steps)  # fmt: skip
    settings = {"anchor": vars(anchor), "fisher": fisher and fisher.provenance}
    log = fit(view, samples, Task(hook.loss), config, out=out, trainable=lambda name: True, held_out=held_out,
              hooks=[hook], settings=settings)  # fmt: skip
    return open_model(view.eval(), name=f"{model.name}, summarising"), log, hook
