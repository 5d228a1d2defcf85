"""SwitchLoRA at small scale: a random map that no low rank reaches, a nano Llama from scratch, and SmolLM2 healed.

First y = W* x, learnt from another random W with rank 8 of 64: LoRA cannot pass the error of the best matrix of rank 8
(Eckart and Young), and exchanging vectors can. Then a character-level Llama that learns Python's documentation from
scratch, with rank a quarter of the width: all weights, LoRA from its usual start and from SwitchLoRA's, ReLoRA, GaLore
and SwitchLoRA, each at the best of three rates, over three seeds. Last, SmolLM2 without 5 of 30 layers is trained back.

    python reproductions/switchlora.py            # about an hour on one core; stopped, it goes on
    python reproductions/switchlora.py --quick    # the map, and a short nano Llama
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import LETTERS, llama, nats, prose, whole
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lamella
from lamella.data import windows
from lamella.files import Work
from lamella.methods.switchlora import Exchange, Frequency, Switching, by_vectors, switchlora
from lamella.methods.switchlora.baselines import Jagged, ReLora, projected
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import (
    Cosine,
    Task,
    TrainConfig,
    add_lora,
    blocks,
    fit,
    mean_loss,
    own,
    response_loss,
)
from lamella.zoo import open_tokenizer

SIZE, LOW = 64, 8  # of the random map, and the rank of adapters
SEEDS = (0, 1, 2)


# A random map


class Map(nn.Module):
    """One linear map, adapted as a model's are."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(start)


def adapted(start: Tensor, seed: int) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    return inject_adapter_in_model(LoraConfig(r=LOW, lora_alpha=1, target_modules=["linear"]), Map(start))


def reached(seed: int, steps: int, frequency: Frequency | None, lr: float, wanted: Tensor, start: Tensor) -> Tensor:
    """W + c B A after training on y = W* x, of LoRA where there is no frequency."""
    model = adapted(start, seed)
    layer: Any = model.linear
    lora: Any = _Alone(model)
    hooks = [] if frequency is None else [Switching(lora, frequency, steps, seed)]
    x = torch.randn(256 * 64, SIZE, generator=torch.Generator().manual_seed(seed))
    rows = [{"x": each} for each in x]

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"x": torch.stack([each["x"] for each in samples])}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (model.linear(batch["x"]) - batch["x"] @ wanted.T).square().sum(-1).mean()

    task = Task(loss, collate=collate, weight=lambda batch: len(batch["x"]))  # type: ignore[arg-type]
    config = TrainConfig(steps=steps, lr=lr, batch=256, clip=1e9, seed=seed, save_every=steps, log_every=steps)
    with tempfile.TemporaryDirectory() as work:
        fit(model, rows, task, config, out=work, trainable=lambda name: ".lora_" in name,
            optimizer=by_vectors(1.0), hooks=hooks)  # fmt: skip
    with torch.no_grad():
        product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        return layer.get_base_layer().weight + product


class _Alone:
    """What :class:`Switching` needs of adapters: where they are."""

    def __init__(self, view: nn.Module) -> None:
        self.view, self.modules = view, ("linear",)


def random_map(run: Run) -> None:
    steps = 4000
    drawn = torch.Generator().manual_seed(run.seed)
    wanted, start = (torch.randn(SIZE, SIZE, generator=drawn) / SIZE**0.5 for _ in range(2))
    change = wanted - start
    size = float(change.norm())
    floor = (float(torch.linalg.svdvals(change)[LOW:].norm()) / size) ** 2
    ways: dict[str, tuple[Frequency | None, float]] = {
        "LoRA": (None, 2e-2),
        "SwitchLoRA": (Frequency(), 2e-2),
        "SwitchLoRA, slower descent (20, 0.3)": (Frequency(20, 0.3), 2e-2),
    }
    if not run.quick:
        ways["SwitchLoRA, no descent (12, 1.0)"] = (Frequency(12, 1.0), 2e-2)

    def found(name: str) -> dict[str, float]:
        end = reached(run.seed, steps, *ways[name], wanted, start)
        values = torch.linalg.svdvals(end - start)
        return {"error": (float((wanted - end).norm()) / size) ** 2, "rank": int((values > 0.01 * values[0]).sum())}

    arms = {name: run.arm(f"map, {name}", found, name) for name in ways}
    run.table(
        f"y = W* x, {SIZE} x {SIZE}, rank {LOW}, {steps} steps; no update of rank {LOW} leaves less than {floor:.3f}",
        ["", "squared error, relative", "rank of the update"],
        [[name, each["error"], each["rank"]] for name, each in arms.items()],
    )
    low, ours = arms["LoRA"], arms["SwitchLoRA"]
    run.exact("LoRA's error on a random map", "at least 0.95 of the floor", f"{low['error']:.3f} / {floor:.3f}",
              low["error"] >= 0.95 * floor)  # fmt: skip
    run.main("SwitchLoRA's error on a random map", "at most a quarter of LoRA's",
             f"{ours['error']:.3f} / {low['error']:.3f}", ours["error"] <= 0.25 * low["error"])  # fmt: skip
    run.main("rank of SwitchLoRA's update", f"at least {4 * LOW}", str(ours["rank"]), ours["rank"] >= 4 * LOW)


# A nano Llama


WIDTH, LAYERS, CONTEXT, BATCH = 128, 4, 64, 16
FULL, LOWER = (5e-4, 1e-3, 3e-3), (5e-3, 1e-2, 2e-2)  # rates
RATES = {"all weights": FULL, "GaLore": (3e-3, 1e-2, 3e-2)}


def fresh(seed: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(LlamaForCausalLM(llama(len(LETTERS), WIDTH, LAYERS, context=CONTEXT)).eval())


def learnt(way: str, lr: float, seed: int, steps: int, samples: Sequence[Any]) -> Any:
    """A nano Llama that has read for so many steps."""
    stack, r = fresh(seed), WIDTH // 4
    config = TrainConfig(steps=steps, lr=lr, batch=BATCH, warmup=0.05, seed=seed, save_every=steps, log_every=steps)
    if way == "SwitchLoRA":
        with tempfile.TemporaryDirectory() as work:
            return switchlora(stack, samples, config=config, work=Work(work)).stack.model
    view = share(stack.model)
    options: dict[str, Any] = {}
    if way == "all weights":
        own(view, lambda name: True)
        options = {"trainable": lambda name: True}
    elif way == "GaLore":
        own(view, lambda name: True)
        factory = partial(projected, r=r, inside=stack.architecture.prefix, rest=1e-3 / lr)
        options = {"trainable": lambda name: True, "optimizer": factory}
    else:
        lora = add_lora(view, r, alpha=1, seed=seed)
        own(view, lambda name: True)
        options = {"trainable": lambda name: ".base_layer." not in name, "optimizer": by_vectors(1e-3 / lr)}
        if way == "LoRA from SwitchLoRA's start":
            options["hooks"] = [Switching(lora, Frequency(interval=float("inf")), steps, seed)]
        if way == "ReLoRA":
            every = steps // 8
            options["hooks"] = [ReLora(lora, every, seed)]
            cosine = Cosine(lr, 0.0, max(1, steps // 20), steps)
            config = config.following(Jagged(cosine, every, max(1, steps // 100)))
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, Task(response_loss), config, out=work, **options)
    return view.eval()


def nano(run: Run) -> None:
    steps = 200 if run.quick else 2000
    samples = whole(prose("calibration", 16 * steps // 4, CONTEXT, run.seed))
    tests = whole(prose("test", 400, CONTEXT, run.seed))
    chosen_on, told_on = tests[:200], tests[200:]
    ways = ["all weights", "LoRA", "SwitchLoRA"]
    if not run.quick:
        ways[2:2] = ["LoRA from SwitchLoRA's start", "ReLoRA", "GaLore"]

    def judged(way: str, lr: float, seed: int) -> list[float]:
        model = learnt(way, lr, seed, steps, samples)
        return [nats(model, chosen_on), nats(model, told_on)]

    def arm(way: str, lr: float, seed: int) -> list[float]:
        found: list[float] = run.arm(f"nano, {way}, {lr:g}, seed {seed}", judged, way, lr, seed)
        return found

    best = {}
    for way in ways:
        rates = RATES.get(way, LOWER)
        swept = {lr: arm(way, lr, SEEDS[0])[0] for lr in (rates[1:2] if run.quick else rates)}
        best[way] = min(swept, key=lambda lr: swept[lr])
    seeds = SEEDS[:1] if run.quick else SEEDS
    losses = {way: [arm(way, best[way], seed)[1] for seed in seeds] for way in ways}
    run.table(
        f"A Llama of width {WIDTH}, {LAYERS} layers, rank {WIDTH // 4}, {steps} steps: held-out nats per character",
        ["", "best rate", "loss, mean over seeds", "lowest", "highest"],
        [[way, best[way], sum(each) / len(each), min(each), max(each)] for way, each in losses.items()],
    )
    paired = list(zip(losses["LoRA"], losses["SwitchLoRA"], losses["all weights"], strict=True))
    gain = Measured.over_seeds([low - ours for low, ours, _ in paired])
    closed = Measured.over_seeds([(low - ours) / (low - full) for low, ours, full in paired])
    run.main("LoRA's loss from scratch less SwitchLoRA's", "above 0", str(gain), gain.at_least(0.0))
    run.further("gap from LoRA to all weights", "half of it closed", str(closed), closed.at_least(0.5))
    for other in ("LoRA from SwitchLoRA's start", "ReLoRA", "GaLore"):
        if other in losses:
            apart = Measured.over_seeds(
                [theirs - ours for theirs, ours in zip(losses[other], losses["SwitchLoRA"], strict=True)]
            )
            run.further(f"{other}'s loss less SwitchLoRA's", "above 0", str(apart), apart.at_least(0.0))


# SmolLM2


def healing(run: Run) -> None:
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")

    def cut(text: str, split: str, count: int) -> Any:
        return windows(tokenizer, lamella.load_text(text, split), count, 128, run.seed)

    plan = lamella.make_plan("shortgpt", stack, cut("pydoc", "calibration", 4))[5]
    samples = blocks(cut("pydoc", "calibration", 240), loss_on="all")
    chosen_on = blocks(cut("general", "test", 16), loss_on="all")
    told_on = blocks(cut("pydoc", "test", 24), loss_on="all")
    config = TrainConfig(steps=60, batch=4, seed=run.seed, save_every=60, log_every=60)
    ways: dict[str, tuple[float, ...]] = {
        "LoRA": (5e-4, 2e-3),
        "SwitchLoRA": (5e-3, 2e-2),
        "all weights": (5e-5, 2e-4),
    }

    def trained(way: str, lr: float) -> list[float]:
        rated = replace(config, lr=lr)
        with tempfile.TemporaryDirectory() as work:
            if way == "SwitchLoRA":
                made = switchlora(stack, samples, plan, r=32, rest=0.0, config=rated, work=Work(work))
                view = apply(made.stack, plan)
            else:
                view = apply(stack, plan)
                trains: Callable[[str], bool] = lambda name: name.startswith(stack.architecture.prefix)  # noqa: E731
                if way == "LoRA":
                    trains = add_lora(view, 32, alpha=64, seed=run.seed).trains
                own(view, trains)
                fit(view, samples, Task(response_loss), rated, out=work, trainable=trains)
        return [mean_loss(view, chosen_on), mean_loss(view, told_on)]

    found = {way: [run.arm(f"SmolLM2, {way}, {lr:g}", trained, way, lr) for lr in rates] for way, rates in ways.items()}
    best = {way: min(each)[1] for way, each in found.items()}
    before = mean_loss(apply(stack, plan), told_on)
    run.table(
        "SmolLM2 without 5 of 30 layers, 60 steps of 4 x 128 tokens: held-out nats per token",
        ["healed with", "loss"],
        [["whole model", mean_loss(stack.model, told_on)], ["not healed", before], *[[k, v] for k, v in best.items()]],
    )
    apart = best["SwitchLoRA"] - best["LoRA"]
    run.further("SwitchLoRA's loss less LoRA's, healing", "at most 0.02", f"{apart:.4f}", apart <= 0.02)


# What holds to the digit


def exactness(record: Record) -> None:
    model = adapted(torch.randn(SIZE, SIZE) / SIZE**0.5, 0)
    before = model.linear.get_base_layer().weight.detach().double().clone()
    one = Exchange(model.linear, torch.Generator().manual_seed(0))

    def effective() -> Tensor:
        return one.state()["weight"].double() + one.scale * one.b.detach().double() @ one.a.detach().double()

    worst = float((effective() - before).abs().max())
    record.exact("the weight with its pools against itself", "within 1e-5", f"{worst:.1e}", worst <= 1e-5)
    steps = []
    for _ in range(200):
        last = effective()
        one.switch(max(1, one.room() // 2), freeze=0)
        steps.append(float((effective() - last).abs().max()))
    record.exact(
        "the weight before and after each of 200 exchanges", "within 1e-6", f"{max(steps):.1e}", max(steps) <= 1e-6
    )
    stack = fresh(0)
    view = share(stack.model)
    lora = add_lora(view, WIDTH // 4, alpha=1)
    states = sum(each.numel() for name, each in view.named_parameters() if lora.trains(name))
    formula = WIDTH // 4 * sum(sum(view.get_submodule(name).get_base_layer().weight.shape) for name in lora.modules)
    record.exact("numbers that train beside W", "r (in + out)", f"{states} / {formula}", states == formula)


def experiment(run: Run) -> None:
    run.data = f"random maps of {SIZE} x {SIZE}; characters of pydoc for a Llama of {LAYERS} layers" + (
        "" if run.quick else "; pydoc for SmolLM2, its rates chosen on general"
    )
    run.part("exactness", exactness)
    random_map(run)
    nano(run)
    if not run.quick:
        healing(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a short nano Llama, no SmolLM2"))
