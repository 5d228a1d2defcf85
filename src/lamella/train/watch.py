"""Callbacks of a training run: the log, held-out losses, hooks, and complete checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from lamella.files import sync
from lamella.progress import Tracker
from lamella.train.config import TrainConfig
from lamella.train.hooks import Hook, TrainingRun
from lamella.train.log import Logged, TrainingLog
from lamella.train.loop import Loop
from lamella.train.runs import LOG, check_same_run
from lamella.train.sharding import gathered

MANIFEST = "replay.json"


class Watch(TrainerCallback):
    """Writes the log and calls the hooks. A checkpoint is complete if it contains the log, which is written last."""

    def __init__(
        self,
        loop: Loop,
        run: TrainingRun,
        held_out: Mapping[str, Sequence[Any]],
        config: TrainConfig,
        hooks: Sequence[Hook],
        count: Tracker,
    ) -> None:
        self.loop = loop
        self.run = run
        self.held_out = {name: samples for name, samples in held_out.items() if samples}
        self.config = config
        self.hooks = hooks
        self.count = count
        self.lr = 0.0
        loop.gradients_computed = self.before_clip

    def open(self, out: Path) -> Path | None:
        """Return the newest complete checkpoint of this run, if any, and load the log and hooks from it.

        Raises:
            TrainingError: if the folder contains something else, or cannot be written.
        """
        check_same_run(out, self.run.log.settings)
        checkpoints = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*")}
        complete = {step: path for step, path in checkpoints.items() if (path / LOG).exists()}
        self.loop.accelerator.wait_for_everyone()  # all have read before one writes
        if complete:
            newest = complete[max(complete)]
            self.run.log = TrainingLog.read(newest / LOG)
            for hook in self.hooks:
                hook.load(newest)
        if self.loop.args.should_save:
            for step in checkpoints.keys() - {max(complete, default=None)}:  # incomplete
                shutil.rmtree(checkpoints[step])
            self.run.log.write(out / LOG)
            if self.loop.order.old:
                self.loop.order.write_manifest(out / MANIFEST)
        return complete[max(complete)] if complete else None

    @property
    def done(self) -> bool:
        """Whether a hook ends the run here."""
        return any(hook.done(self.run) for hook in self.hooks)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the hooks, and evaluate before the first step."""
        self.count(state.global_step)
        for hook in self.hooks:
            hook.begin(self.run)
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the hooks before a step."""
        for hook in self.hooks:
            hook.before_step(self.run)

    def before_clip(self) -> None:
        """Call the hooks before the gradients are clipped."""
        for hook in self.hooks:
            hook.before_clip(self.run)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients, and call the hooks before the optimizer step."""
        gradients = [each.grad for each in self.loop.trained.values() if each.grad is not None]
        self.loop.stop_unless_finite(gathered(torch.nn.utils.get_total_norm(gradients)), "gradient")
        self.lr = float(kwargs["lr_scheduler"].get_last_lr()[0])
        for hook in self.hooks:
            hook.before_update(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the hooks after a step, evaluate and log."""
        for hook in self.hooks:
            hook.after_step(self.run)
        step, log, config = state.global_step, self.run.log, self.config
        last = step == args.max_steps
        if last or step % (config.eval_every or config.save_every) == 0:
            self._evaluate(step)
        if self.done:
            last = control.should_training_stop = control.should_save = True
        if (
            last or step % config.log_every == 0 or step % config.save_every == 0
        ):  # a checkpoint contains no partial log point
            before = log.train[-1].step if log.train else 0
            loss, *parts = (torch.stack(self.loop.values).sum(dim=0) / (step - before)).tolist()
            named = dict(zip(self.loop.names[1:], parts, strict=True)) | self.run.noted()
            log.train.append(Logged(step, loss, named, self.lr))
            self._report({"loss": loss, "learning_rate": self.lr, **named})
            self.loop.values.clear()
        if self.loop.args.should_save and not self.loop.values:
            log.write(Path(args.output_dir) / LOG)
        self.count(note=f"loss {log.train[-1].loss:.4g}" if log.train else "")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint, and delete older ones."""
        self.loop.accelerator.wait_for_everyone()
        if self.loop.args.should_save:
            newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for hook in self.hooks:
                hook.save(newest)
            sync(newest)  # before the log, which marks the checkpoint as complete
            self.run.log.write(newest / LOG)
            for hook in self.hooks:
                hook.saved(newest)
            for path in newest.parent.glob("checkpoint-*"):  # there is a complete one at any time
                if path != newest:
                    shutil.rmtree(path)

    def _evaluate(self, step: int) -> None:
        """Add a point on the held-out samples; every process computes all of it, so none waits for another."""
        points = {name: self._held_out_point(step, samples) for name, samples in self.held_out.items()}
        if "" in points:
            self.run.log.held_out.append(points[""])
        elif points:
            losses = {name: point.loss for name, point in points.items()}
            self.run.log.held_out.append(Logged(step, sum(losses.values()) / len(losses), losses))
        self._report({f"held_out/{name or 'loss'}": point.loss for name, point in points.items()})
        for hook in self.hooks:
            hook.evaluated(self.run)

    def _report(self, values: dict[str, float]) -> None:
        """Pass values of this step to further callbacks, such as TensorBoard's."""
        loop = self.loop
        loop.callback_handler.on_log(loop.args, loop.state, loop.control, dict(values))

    @torch.no_grad()
    def _held_out_point(self, step: int, samples: Sequence[Any]) -> Logged:
        objective: Any = self.loop.model
        objective.eval()  # the next step resets it
        size = self.loop.args.per_device_train_batch_size
        values, total, task = [], 0, self.loop.task
        for start in range(0, len(samples), size):
            batch = send_to_device(task.collate(samples[start : start + size]), self.loop.args.device)
            loss, parts = objective(**batch)
            values.append(torch.stack([loss, *parts.values()]).float() * task.weight(batch))
            total += task.weight(batch)
        self.loop.evaluated()
        mean = torch.stack(values).sum(dim=0) / total
        self.loop.stop_unless_finite(mean, "held-out loss")
        loss, *rest = mean.tolist()
        return Logged(step, loss, dict(zip(parts, rest, strict=True)))
