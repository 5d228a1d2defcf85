"""Training one slice of a model at a time: at every step some of the parameters are chosen, and only those move.

    score     how hard a loss of its own pulls at each slice; of its gradients only the norms are used
    choose    from the number of the step and these norms to one slice
    update    the gradient of the objective by that slice alone, clipped; all others have none

None is not zero: with gradients of zero RMSprop would forget what it knows of a slice, and Adam would move it. With one
slice that is the whole model this is ordinary training, so methods that choose and methods that do not share one loop,
one optimizer and one order of samples.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.data.samples import Sample, collate
from lamella.errors import TrainingError
from lamella.files import sync, write
from lamella.methods.irepair.sensitivity import gradient_norms
from lamella.progress import tracker
from lamella.train.log import Point, TrainingLog
from lamella.train.mixing import Order
from lamella.train.parameters import only
from lamella.train.runs import LOG, check_same_run, model_digest, samples_digest, settled, short
from lamella.train.schedules import Constant

Example = Mapping[str, Sample]  # samples that belong together, by their roles
Batch = dict[str, dict[str, Tensor]]  # of each role, what collate returns
Slice = Mapping[str, nn.Parameter]
Objective = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Tensor]]]
Score = Callable[[Any, Batch], Tensor]
Choose = Callable[[int, Sequence[float]], int]

ALPHA = 0.99  # of RMSprop's running square; torch's default
TRAINED, BEST, OPTIMIZER, TRACE = "trained.safetensors", "best.safetensors", "optimizer.pt", "trace.json"


@dataclass
class Trace:
    """What was chosen, and by what.

    Attributes:
        chosen: the slice of each step [steps].
        sensitivities: the norms that it was chosen by [steps, slices]; empty where there was no score.
    """

    chosen: list[int] = field(default_factory=list)
    sensitivities: list[list[float]] = field(default_factory=list)

    @property
    def touched(self) -> list[int]:
        """Every slice that was chosen at some step."""
        return sorted(set(self.chosen))

    def write(self, path: Path) -> None:
        """Write the trace as JSON."""
        write(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def fit_slices(
    model: nn.Module,
    slices: Sequence[Slice],
    streams: Sequence[Sequence[Example]],
    objective: Objective,
    choose: Choose,
    *,
    out: Path,
    steps: int,
    lr: float,
    warmup: int,
    clip: float,
    batch: int,
    seed: int,
    score: Score | None = None,
    per_parameter: bool = False,
    bias_correction: bool = False,
    held_out: Sequence[Example] = (),
    eval_every: int = 40,
    patience: int = 30,
    save_every: int = 100,
    log_every: int = 10,
    settings: Mapping[str, Any] | None = None,
    after_eval: Callable[[int], None] | None = None,
) -> tuple[TrainingLog, Trace]:
    """Train a model in place, one slice a step, with RMSprop. Dropout is off.

    Called again after a kill, with a model made in the same way, it goes on from the newest complete checkpoint in
    ``out``; on a CPU the result is the same to the bit as without the kill. With held-out examples the model is left
    with the weights whose held-out loss was lowest.

    Args:
        model: what trains.
        slices: groups of its parameters, by name; a parameter is in one at most.
        streams: examples of each kind; a batch has ``batch`` of every kind, each in an order of its own that is
            shuffled anew for each pass.
        objective: from the model and a batch to the loss, and named parts of it to log.
        choose: from the step, counted from 1, and the sensitivities (none without ``score``) to a slice.
        out: the run's folder.
        steps: the most optimizer steps.
        lr, warmup: the rate, and the steps over which it rises linearly from 0; then it is constant.
        clip: the largest norm of the gradient of the chosen slice.
        batch: examples of each kind in a step.
        seed: of the order of examples.
        score: the loss whose gradient norms are the sensitivities.
        per_parameter: see :func:`lamella.methods.irepair.sensitivity.gradient_norms`.
        bias_correction: RMSprop's running square of a slice starts at 0 and advances only when the slice is chosen, so
            the first step of each is ten times as long as later ones. True corrects it, as Adam does.
        held_out: examples with all roles, to validate on.
        eval_every: examples from one validation to the next.
        patience: validations without improvement after which training stops.
        save_every, log_every: steps from one checkpoint, and from one point of the log, to the next.
        settings: what else decides the result: a run with other settings is not resumed. JSON values.
        after_eval: called with the step when a validation is due, and before the first step.

    Returns:
        The log and the trace, which the newest checkpoint in ``out`` has too.

    Raises:
        TrainingError: for a bad argument, a folder with another run, or a number that is not finite.
    """
    counts = {"steps": steps, "batch": batch, "eval_every": eval_every, "patience": patience}
    _check(streams, clip, counts | {"save_every": save_every, "log_every": log_every})
    schedule = Constant(lr, warmup)
    run = {
        **counts,
        "schedule": schedule.as_dict(),
        "clip": clip,
        "seed": seed,
        "per_parameter": per_parameter,
        "bias_correction": bias_correction,
        **(settings or {}),
        "model": model_digest(model, ()),
        "samples": [_digest(stream) for stream in streams],
        "held_out": _digest(held_out),
    }
    loop = Loop(model, slices, objective, Path(out), settled(run), held_out, 2 * batch)
    orders = [Order(stream, steps, batch, seed + number).picks for number, stream in enumerate(streams)]  # type: ignore[arg-type]
    trained = {name: each for own in slices for name, each in own.items()}
    with tracker("training", steps) as count, only(model, trained), torch.enable_grad():
        model.eval()
        loop.open()
        count(loop.step)
        if loop.step == 0:
            loop.validate()
            if after_eval is not None:
                after_eval(0)
        while loop.step < steps and not loop.finished(patience):
            step = loop.step + 1
            picks = slice((step - 1) * batch, step * batch)
            drawn = [[stream[pick] for pick in order[picks]] for stream, order in zip(streams, orders, strict=True)]  # type: ignore[index]
            loop.examples = short(orders[0][picks])
            rate = schedule(step)
            loop.advance(_collated(drawn, loop.device), choose, score, rate, clip, per_parameter, bias_correction)
            if step * batch // eval_every > (step - 1) * batch // eval_every:
                loop.validate()
                if after_eval is not None:
                    after_eval(step)
            last = step == steps or loop.finished(patience)
            if step % log_every == 0 or step % save_every == 0 or last:  # so no window is open in a checkpoint
                loop.write_point(rate)
            if step % save_every == 0 or last:
                loop.save()
            count(note=f"slice {loop.trace.chosen[-1]}")
        loop.take_best()
    return loop.log, loop.trace


class Loop:
    """The state of a run, one step of it, and how it is saved and found again."""

    def __init__(
        self,
        model: nn.Module,
        slices: Sequence[Slice],
        objective: Objective,
        out: Path,
        settings: dict[str, Any],
        held_out: Sequence[Example],
        size: int,
    ) -> None:
        self.model, self.slices, self.objective, self.out = model, slices, objective, out
        self.device = next(model.parameters()).device
        self.held_out = [held_out[begin : begin + size] for begin in range(0, len(held_out), size)]
        self.log, self.trace = TrainingLog(settings), Trace()
        self.optimizer = torch.optim.RMSprop([{"params": list(each.values())} for each in slices], lr=0.0, alpha=ALPHA)
        self.best: dict[str, Tensor] = {}  # of all slices touched so far, at the lowest held-out loss
        self.window: list[dict[str, float]] = []  # losses since the last point of the log
        self.examples = ""  # of this step, for messages

    @property
    def step(self) -> int:
        return len(self.trace.chosen)

    @property
    def touched(self) -> dict[str, nn.Parameter]:
        """The parameters of every slice that was chosen so far."""
        return {name: each for number in self.trace.touched for name, each in self.slices[number].items()}

    def finished(self, patience: int) -> bool:
        """Whether the last ``patience`` validations brought nothing."""
        losses = [point.loss for point in self.log.held_out]
        return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    def advance(
        self,
        batch: Batch,
        choose: Choose,
        score: Score | None,
        rate: float,
        clip: float,
        per_parameter: bool,
        bias_correction: bool,
    ) -> None:
        """Score, choose, update."""
        norms: list[float] = []
        scored: dict[str, Tensor] = {}
        if score is not None:
            scored["score"] = self._finite(score(self.model, batch), "score")
            measured = gradient_norms(scored["score"], self.slices, per_parameter=per_parameter)
            norms = self._finite(measured, "sensitivity").tolist()
            self.trace.sensitivities.append(norms)
        chosen = choose(self.step + 1, norms)
        own = self.slices[chosen]
        if self.held_out and chosen not in self.trace.chosen:
            self.best |= {name: each.detach().clone() for name, each in own.items()}

        loss, parts = self.objective(self.model, batch)
        self._finite(loss, "loss")
        for parameter, gradient in zip(
            own.values(), torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True
        ):
            parameter.grad = gradient
        self._finite(nn.utils.clip_grad_norm_(own.values(), clip), "gradient")
        times = self.trace.chosen.count(chosen) + 1
        self.optimizer.param_groups[chosen]["lr"] = rate * (math.sqrt(1 - ALPHA**times) if bias_correction else 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trace.chosen.append(chosen)
        self.window.append({name: float(each.detach()) for name, each in {"loss": loss, **parts, **scored}.items()})

    def write_point(self, rate: float) -> None:
        """Add the mean of the losses since the last point to the log."""
        means = {name: sum(each[name] for each in self.window) / len(self.window) for name in self.window[0]}
        self.log.train.append(Point(self.step, means.pop("loss"), means, rate))
        self.window.clear()

    @torch.no_grad()
    def validate(self) -> None:
        """Add a point on the held-out examples; weights better than all before are kept."""
        if not self.held_out:
            return
        total = sum(map(len, self.held_out))
        means: dict[str, float] = {}
        for examples in self.held_out:
            loss, parts = self.objective(self.model, _collated([examples], self.device))
            for name, value in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + float(value) * len(examples) / total
        loss = self._finite(torch.tensor(means.pop("loss")), "held-out loss")
        lowest = min((point.loss for point in self.log.held_out), default=math.inf)
        self.log.held_out.append(Point(self.step, float(loss), means))
        if float(loss) < lowest:
            for name, parameter in self.touched.items():
                self.best[name].copy_(parameter)

    @torch.no_grad()
    def take_best(self) -> None:
        """Leave the model with its best weights, where there was something to validate on."""
        if self.held_out:
            for name, parameter in self.touched.items():
                parameter.copy_(self.best[name])

    def save(self) -> None:
        """Write a checkpoint, which gets its name when it is complete; then older ones go."""
        done = self.out / f"checkpoint-{self.step}"
        partial = self.out / f".{done.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: each.detach().contiguous() for name, each in self.touched.items()}, partial / TRAINED)
        save_file(self.best, partial / BEST)
        torch.save(self.optimizer.state_dict(), partial / OPTIMIZER)
        self.trace.write(partial / TRACE)
        self.log.write(partial / LOG)
        sync(partial)
        partial.replace(done)
        self.log.write(self.out / LOG)
        for path in self.out.glob("checkpoint-*"):
            if path != done:
                shutil.rmtree(path)

    @torch.no_grad()
    def open(self) -> None:
        """Go on from the newest checkpoint of this run, if there is one.

        Raises:
            TrainingError: when the folder holds something else, or cannot be written.
        """
        check_same_run(self.out, self.log.settings)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.out}: cannot be written ({error.strerror}): give another folder") from None
        found = sorted(self.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        if found:
            self._take(found[-1])
        for older in found[:-1]:  # a kill came before they were deleted
            shutil.rmtree(older)
        self.log.write(self.out / LOG)

    def _take(self, newest: Path) -> None:
        """Go on from a checkpoint."""
        self.log, self.trace = TrainingLog.read(newest / LOG), Trace.read(newest / TRACE)
        self.best = load_file(newest / BEST, device=str(self.device))
        for name, tensor in load_file(newest / TRAINED).items():
            self.touched[name].copy_(tensor)
        state = torch.load(newest / OPTIMIZER, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)

    def _finite(self, value: Tensor, what: str) -> Tensor:
        if not torch.isfinite(value).all():
            raise TrainingError(
                f"non-finite {what} at step {self.step + 1}, with examples {self.examples}: lower lr, or look at these "
                f"examples; the last good checkpoint is kept in {self.out}"
            )
        return value


def _collated(drawn: Sequence[Sequence[Example]], device: torch.device) -> Batch:
    """One batch of some examples of each kind, by role."""
    return {
        role: {name: each.to(device) for name, each in collate([example[role] for example in examples]).items()}
        for examples in drawn
        for role in examples[0]
    }


def _digest(examples: Sequence[Example]) -> str:
    return samples_digest([example[role] for example in examples for role in sorted(example)])


def _check(streams: Sequence[Sequence[Example]], clip: float, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise TrainingError(f"{name}={count}: give at least 1")
    if not clip > 0:
        raise TrainingError(f"clip={clip:g}: give the largest norm of a gradient, above 0")
    if not streams or not all(streams):
        raise TrainingError("there are no examples to train on: give some of each kind")
