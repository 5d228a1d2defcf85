"""What trains: how pairs become samples, and one stage after the other (stages 2 and 4)."""

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
from lamella.methods.cstrl.anchor import Anchor, Anchored, Penalty, measured, read_fisher, sites_of_parameters
from lamella.methods.cstrl.gaps import MASK, PREFIX, Gap
from lamella.stack import Model, Stack, last_stack, open_model, share
from lamella.train import Task, TrainConfig, TrainingLog, choose, fit, own, response_loss

TRAINING = TrainConfig(lr=2e-3, batch=16, weight_decay=0.01, schedule="linear", warmup=0.0)  # the paper's, of stage 4
GAP_TRAINING = replace(TRAINING, lr=3e-3, batch=32)  # of stage 2
FISHER = "fisher.safetensors"
SUMMARISE = "summarize: "  # as T5 is asked
LEAST = 8  # tokens of a source that a decoder must have room for


@dataclass(frozen=True)
class Lengths:
    """Tokens that are read and written; longer texts are cut at their end.

    Attributes:
        source_length: of a source that is summarised.
        summary_length: of a summary.
        gap_length: of a source with gaps, and of what stood there.
    """

    source_length: Annotated[int, Ge(LEAST)] = 512
    summary_length: Annotated[int, Ge(LEAST)] = 256
    gap_length: Annotated[int, Ge(LEAST)] = 256


@dataclass(frozen=True)
class Course:
    """How summaries are learnt, and judged.

    Attributes:
        prefix: before each source that is summarised; of a student, that of its teacher.
        epochs: passes over the pairs, E, where the training has no steps.
        judged: how many pairs of the test are summarised before and after.
    """

    prefix: str = SUMMARISE
    epochs: Annotated[int, Ge(1)] = 20
    judged: Annotated[int, Ge(1)] = 200


@dataclass(frozen=True)
class Stored:
    """Files of importances.

    Attributes:
        fisher: a file of those of the model as it is; it has filled gaps already, and begins with summaries.
        save_fisher: keep the importances in this file, too.
    """

    fisher: Path | None = None
    save_fisher: Path | None = None


@dataclass(frozen=True)
class GapTraining:
    """How gap sentences are learnt, before summaries are.

    Attributes:
        gap_epochs: passes over them.
        gap_lr: the highest learning rate.
        gap_batch: samples in a step.
    """

    gap_epochs: Annotated[int, Ge(1)] = 18
    gap_lr: Annotated[float, Gt(0)] = 3e-3
    gap_batch: Annotated[int, Ge(1)] = 32


class Reading:
    """How one model reads pairs: an encoder the source and a decoder the target, or a decoder both in one row.

    Args:
        model: it must read and write text.
        tokenizer: of it.

    Raises:
        MethodError: for a model that does not write text, or a tokenizer without an end.
    """

    def __init__(self, model: Model, tokenizer: Any) -> None:
        stacks = list(model.stacks.values())
        kinds = [(stack.architecture.modality, stack.architecture.causal) for stack in stacks]
        if kinds not in ([("text", True)], [("text", False), ("text", True)]):
            raise MethodError(f"cstrl trains models that read and write text; {model.name} has {_said(stacks)}")
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise MethodError("summaries end with the tokenizer's end token: give pairs with a tokenizer that has one")
        self.tokenizer, self.encodes = tokenizer, len(stacks) == 2
        limit = getattr(last_stack(model.model).config, "max_position_embeddings", None)
        self.context = None if limit is None else int(limit)

    def samples(self, texts: Iterable[tuple[str, str]], prefix: str, source: int, target: int) -> list[Sample]:
        """Samples of sources and targets.

        Args:
            prefix: what stands before each source.
            source, target: tokens of each at most.

        Raises:
            MethodError: when a decoder has no room for both.
        """
        if self.context is not None:
            source = min(source, self.context - (0 if self.encodes else target))
            target = min(target, self.context)
        if source < LEAST:
            raise MethodError(f"targets of {target} tokens leave no room for a source among {self.context}: make them "
                              "shorter (--summary-length, --gap-length)")  # fmt: skip
        if self.encodes:
            return [
                {"input_ids": self._whole(prefix + read, source), "labels": self._whole(wanted, target)}
                for read, wanted in texts
            ]
        return pairs((self._prompt(prefix + read, source), self._answer(wanted, target)) for read, wanted in texts)

    def _whole(self, text: str, most: int) -> torch.Tensor:
        """A text as an encoder-decoder takes it, with an end."""
        ids = self.tokenizer(text)["input_ids"]
        end = self.tokenizer.eos_token_id
        return torch.tensor([*(ids[:-1] if ids and ids[-1] == end else ids)[: most - 1], end])

    def _prompt(self, text: str, most: int) -> list[int]:
        """A source, and what parts it from its summary."""
        parting = self._bare("\n") or [self.tokenizer.eos_token_id]
        return [*self.tokenizer(text)["input_ids"][: most - len(parting)], *parting]

    def _answer(self, text: str, most: int) -> list[int]:
        return [*self._bare(text)[: most - 1], self.tokenizer.eos_token_id]

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def gaps(self, found: Sequence[Gap], most: int) -> list[Sample]:
        """Samples of sources with gaps.

        Raises:
            MethodError: when the tokenizer cannot tell one mask from the next.
        """
        if self._bare(MASK.format(0)) == self._bare(MASK.format(1)):
            raise MethodError(
                f"the tokenizer reads {MASK.format(0)} and {MASK.format(1)} alike, so gaps could not be told apart: "
                "add these to its tokens"
            )
        return self.samples([(gap.text, gap.wanted) for gap in found], PREFIX, most, most)


def _said(stacks: Sequence[Stack]) -> str:
    return " and ".join(f"{stack.stack} ({stack.architecture.modality})" for stack in stacks)


def lasting(config: TrainConfig, samples: int, epochs: int) -> TrainConfig:
    """A run of so many passes, unless it has its steps, which is looked at after each."""
    size = size_of(config)
    steps = config.steps or -(-epochs * samples // size)
    return replace(config, steps=steps, eval_every=config.eval_every or max(1, samples // size))


def size_of(config: TrainConfig) -> int:
    """Samples in a step."""
    return config.batch * config.accumulate * processes.count()


def trainee(model: Model) -> Any:
    """A copy of a model with parameters of its own; tied ones stay tied."""
    view = share(model.model)
    own(view, lambda name: True)
    return view


def fill_gaps(
    model: Model, samples: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]], config: TrainConfig, out: Path
) -> tuple[Model, TrainingLog]:
    """Stage 2: learn to write back what the gaps have taken.

    Args:
        config: of a run that has its steps.
    """
    view = trainee(model)
    log = fit(view, samples, Task(response_loss), config, out=out, trainable=lambda name: True, held_out=held_out)
    return open_model(view.eval(), name=f"{model.name}, gaps filled"), log


def importance_at(model: Model, samples: list[Sample], anchor: Anchor, out: Path) -> Fisher:
    """Stage 3: F where the gap sentences have left the model; measured once, whatever stops the run."""
    file = out / FISHER
    if file.exists():
        return read_fisher(file, model)
    found = measured(model, samples, anchor.fisher_batch)
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
) -> tuple[Model, TrainingLog, Anchored]:
    """Stage 4: learn summaries from the gap-sentence solution on, held to it.

    Args:
        model: theta*; it is not changed.
        fisher: F at theta*; None for F = 1.
        config: of a run that has its steps.
    """
    assert config.steps is not None
    view = trainee(model)
    start = choose(view, lambda name: True)
    importance = None if fisher is None else {name: fisher.tensors[name] for name in start}
    penalty = Penalty(start, importance, anchor.normalize == "mean")
    hook = Anchored(penalty, anchor, sites_of_parameters(model), samples=len(samples), size=size_of(config),
                    steps=config.steps)  # fmt: skip
    settings = {"anchor": vars(anchor), "fisher": fisher and fisher.provenance}
    log = fit(view, samples, Task(hook.loss), config, out=out, trainable=lambda name: True, held_out=held_out,
              hooks=[hook], settings=settings)  # fmt: skip
    return open_model(view.eval(), name=f"{model.name}, summarising"), log, hook
