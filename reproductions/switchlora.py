"""SwitchLoRA at small scale: a nano Llama trained from scratch, a random full-rank matrix, and SmolLM2 healed.

The main claim: trained from scratch with a rank of a quarter of the width, a character-level Llama of Python's
documentation reaches a lower loss than with LoRA. LoRA is trained in two ways, from SwitchLoRA's start without
exchange, as in the authors' code, and as it is common, with B = 0 and a scale of 2; the better one counts. Every arm
has its own learning rate, chosen on validation data, and all share initial weights, data order and test passages.
Further checks compare SwitchLoRA with all weights, GaLore and, from a warm start, ReLoRA, and ask whether half of what
LoRA loses against all weights is gained back; in so short a training it loses little.

Then y = W* x is trained from another random W with rank 8 of 64: LoRA cannot go below the error of the best matrix of
rank 8 (Eckart and Young), and exchanging vectors can. Last, SmolLM2 without 5 of 30 layers is healed on 8,000 tokens
with one seed, which is few: the gain of the exchange needs more steps.

    python reproductions/switchlora.py            # about an hour on one core; an interrupted run resumes
    python reproductions/switchlora.py --quick    # a short nano Llama and the matrix
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Run, main
from harness.design import seeds_needed, tuned
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, llama, nats_by_sample, prose, whole
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lamella
from lamella.data import windows
from lamella.files import Work
from lamella.methods.switchlora import (
    ExchangeFrequency,
    SwitchHook,
    VectorExchange,
    per_vector,
    reset_state,
    switchlora,
)
from lamella.methods.switchlora.baselines import ReLora, RestartedCosine, projected_optimizer
from lamella.methods.switchlora.method import spread
from lamella.methods.switchlora.optimizer import COLUMNS, ROWS
from lamella.report.figures import Scatter
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import (
    Cosine,
    Sample,
    Task,
    TrainConfig,
    TrainingRun,
    add_lora,
    blocks,
    fit,
    own,
    response_loss,
)
from lamella.zoo import open_tokenizer

SIZE, LOW = 64, 8  # size of the random matrix, and the rank of adapters


# A random matrix


class Map(nn.Module):
    """One linear layer, adapted like those of a model."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(start)


def adapted(start: Tensor, seed: int) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    return inject_adapter_in_model(LoraConfig(r=LOW, lora_alpha=1, target_modules=["linear"]), Map(start))


def reached(way: Mapped, seed: int, steps: int, wanted: Tensor, start: Tensor) -> Tensor:
    """Return W + c B A after training on y = W* x."""
    model = adapted(start, seed)
    layer: Any = model.linear
    lora: Any = _Alone(model)
    hooks = [] if way.by is None else [way.by(lora, way.frequency, steps, seed)]
    x = torch.randn(256 * 64, SIZE, generator=torch.Generator().manual_seed(seed))
    rows = [{"x": each} for each in x]

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"x": torch.stack([each["x"] for each in samples])}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (model.linear(batch["x"]) - batch["x"] @ wanted.T).square().sum(-1).mean()

    task = Task(loss, collate=collate, weight=lambda batch: len(batch["x"]))  # type: ignore[arg-type]
    config = TrainConfig(steps=steps, lr=2e-2, batch=256, clip=1e9, seed=seed, save_every=steps, log_every=steps)
    with tempfile.TemporaryDirectory() as work:
        fit(model, rows, task, config, out=work, trainable=lambda name: ".lora_" in name,
            optimizer=per_vector(1.0), hooks=hooks)  # fmt: skip
    with torch.no_grad():
        product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        return layer.get_base_layer().weight + product


class _Alone:
    """The part of the adapters that :class:`SwitchHook` needs."""

    def __init__(self, view: nn.Module) -> None:
        self.view, self.modules = view, ("linear",)


# Ablations


class NoReset(SwitchHook):
    """Ablation in which counterparts keep their optimizer state."""

    def reset(self, optimizer: torch.optim.Optimizer, one: VectorExchange, rows: Tensor, columns: Tensor) -> None:
        pass


class OwnReset(SwitchHook):
    """Ablation in which the state of exchanged vectors is reset instead of that of their counterparts."""

    def reset(self, optimizer: torch.optim.Optimizer, one: VectorExchange, rows: Tensor, columns: Tensor) -> None:
        reset_state(optimizer, one.a, rows, ROWS)
        reset_state(optimizer, one.b, columns, COLUMNS)


class AllAtOnce(SwitchHook):
    """Ablation that exchanges all vectors of a layer at once and resets all states, with equal total exchanges."""

    due = 0.0

    def before_update(self, run: TrainingRun) -> None:
        self.due += self.frequency.share(run.step, self.steps)
        if self.due < 1:
            return
        self.due -= 1
        for one in self.exchanges.values():
            rows, columns = one.switch(len(one.a), freeze=0)
            for each, vectors, axis in ((one.a, rows, ROWS), (one.b, columns, COLUMNS)):
                reset_state(run.optimizer, each, vectors, axis)
                each.grad = torch.zeros_like(each)


class Mapped(NamedTuple):
    """Hook of the layer, if any, and its frequency of exchange."""

    by: Callable[..., SwitchHook] | None = SwitchHook
    frequency: ExchangeFrequency = ExchangeFrequency()


NEVER, OFTEN = ExchangeFrequency(interval=1e15), ExchangeFrequency(12, 1.0)
MAPPED = {
    "LoRA": Mapped(None),
    "LoRA from SwitchLoRA's start": Mapped(frequency=NEVER),
    "SwitchLoRA": Mapped(),
    "SwitchLoRA, slower descent (20, 0.3)": Mapped(frequency=ExchangeFrequency(20, 0.3)),
    "SwitchLoRA, no descent (12, 1.0)": Mapped(frequency=OFTEN),
    "SwitchLoRA, no reset": Mapped(NoReset),
    "SwitchLoRA, no freezing": Mapped(frequency=ExchangeFrequency(freeze=0)),
    "SwitchLoRA, reset of exchanged vectors": Mapped(OwnReset),
    "SwitchLoRA, all vectors at once, all states reset": Mapped(AllAtOnce),
}


def random_map(run: Run) -> None:
    steps = 4000
    drawn = torch.Generator().manual_seed(run.seed)
    wanted, start = (torch.randn(SIZE, SIZE, generator=drawn) / SIZE**0.5 for _ in range(2))
    change = wanted - start
    size = float(change.norm())
    floor = (float(torch.linalg.svdvals(change)[LOW:].norm()) / size) ** 2

    def found(name: str) -> dict[str, float]:
        end = reached(MAPPED[name], run.seed, steps, wanted, start)
        values = torch.linalg.svdvals(end - start)
        return {"error": (float((wanted - end).norm()) / size) ** 2, "rank": int((values > 0.01 * values[0]).sum())}

    names = ["LoRA", "SwitchLoRA"] if run.quick else list(MAPPED)
    arms = {name: run.arm(f"map, {name}", found, name) for name in names}
    run.table(
        f"y = W* x, {SIZE} x {SIZE}, rank {LOW}, {steps} steps; no update of rank {LOW} leaves less than {floor:.3f}",
        ["", "squared error, relative", "rank of the update"],
        [[name, each["error"], each["rank"]] for name, each in arms.items()],
    )
    low, ours = arms["LoRA"], arms["SwitchLoRA"]
    near = low["error"] / floor
    run.exact("LoRA's error on a random map, in the floor's", "0.95 to 1.05", f"{near:.3f}", 0.95 <= near <= 1.05)
    run.further("SwitchLoRA's error on a random map", "at most a quarter of LoRA's",
                f"{ours['error']:.3f} / {low['error']:.3f}", ours["error"] <= 0.25 * low["error"])  # fmt: skip
    run.further("rank of SwitchLoRA's update", f"at least {4 * LOW}", str(ours["rank"]), ours["rank"] >= 4 * LOW)


# A nano Llama


WIDTH, LAYERS, CONTEXT, BATCH = 128, 4, 64, 8
RANK = WIDTH // 4  # the paper's
WARM = 0.05  # fraction of the steps in which a warm start trains all weights
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
REST = 1e-3  # the learning rate of embedding, norms and head in all arms but that of all weights
MARGIN = 0.02  # nats per character, half of the pilot's difference of the better LoRA and SwitchLoRA
FULL, GALORE, OURS = "all weights", "GaLore", "SwitchLoRA"
LORAS = ("LoRA, B = 0, scale 2", "LoRA from SwitchLoRA's start")
WARMED = ("ReLoRA, warm start", "SwitchLoRA, warm start")
FAST = 1e-2  # the learning rate at which optimizer states are compared
HOOKS = {  # with frequent exchange
    OURS: SwitchHook,
    "SwitchLoRA, no reset": NoReset,
    "SwitchLoRA, reset of exchanged vectors": OwnReset,
}


def fresh(seed: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(LlamaForCausalLM(llama(len(LETTERS), WIDTH, LAYERS, context=CONTEXT)).eval())


def passages(use: str, count: int, seed: int = 0) -> list[Sample]:
    """Return passages to train on, or of the first (``choose``) or second (``test``) half of the test text."""
    if use == "train":
        return whole(prose("calibration", count, CONTEXT, seed, TEXTS))
    return whole(prose("test", count, CONTEXT, 0, TEXTS, part=(0.0, 0.5) if use == "choose" else (0.5, 1.0)))


def train_nano(way: str, lr: float, seed: int, steps: int, often: bool = False) -> tuple[Stack, Stack]:
    """Return a nano Llama before and after training with one method; ``often`` exchanges vectors frequently."""
    start, samples = fresh(seed), passages("train", BATCH * steps, seed)
    if way in WARMED:
        few = round(WARM * steps)
        start = trained_from(start, FULL, 1e-3, seed, few, samples[: BATCH * few], False)
    return start, trained_from(start, way, lr, seed, steps, samples, often)


def trained_from(
    stack: Stack, way: str, lr: float, seed: int, steps: int, samples: Sequence[Sample], often: bool
) -> Stack:
    config = TrainConfig(steps=steps, lr=lr, batch=BATCH, warmup=0.05, seed=seed, save_every=steps, log_every=steps)
    rest = REST / lr
    if way in (OURS, LORAS[1], WARMED[1]) and not often:
        frequency = NEVER if way == LORAS[1] else ExchangeFrequency()
        with tempfile.TemporaryDirectory() as work:
            made = switchlora(
                stack, samples, r=RANK, rest=rest, frequency=frequency, config=config, work=Work(Path(work))
            )
        return made.stack  # type: ignore[return-value]
    view = share(stack.model)
    lora = None if way in (FULL, GALORE) else add_lora(view, RANK, alpha=1 if often else 2 * RANK, seed=seed)
    own(view, lambda name: True)
    options: dict[str, Any] = {"trainable": lambda name: True}
    if lora is not None:
        options = {"trainable": lambda name: ".base_layer." not in name, "optimizer": per_vector(rest)}
    if often:
        options["hooks"] = [HOOKS[way](lora, OFTEN, steps, seed)]  # type: ignore[arg-type]
    if way == GALORE:
        options["optimizer"] = partial(projected_optimizer, r=RANK, inside=stack.architecture.prefix, rest=rest)
    if way == WARMED[0]:
        every = steps // 8
        options["hooks"] = [ReLora(lora, every, seed)]  # type: ignore[arg-type]
        cosine = Cosine(lr, 0.0, max(1, steps // 20), steps)
        config = config.with_schedule(RestartedCosine(cosine, every, max(1, steps // 100)))
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, Task(response_loss), config, out=work, **options)
    if lora is not None:
        lora.merge()
        lora.remove()
    return Stack(view.eval())


def validated(way: str, steps: int, count: int, seed: int, lr: float) -> float:
    """Return the loss on the validation passages, in nats per character."""
    return fmean(nats_by_sample(train_nano(way, lr, seed, steps)[1].model, passages("choose", count)))


def tested(way: str, lr: float, seed: int, steps: int, count: int, often: bool = False) -> dict[str, Any]:
    """Return the loss of each test passage, and the rank and spectrum of the update."""
    start, after = train_nano(way, lr, seed, steps, often)
    found = spread(start, after, RANK)
    updates = found["updates"].values()
    return {
        "losses": nats_by_sample(after.model, passages("test", count)),
        "rank": fmean(each["rank"] for each in updates),
        "beyond": fmean(each["beyond"] for each in updates),
        "spectrum": found["spectrum"],
    }


def nano(run: Run) -> None:
    steps, count = (60, 64) if run.quick else (600, 512)
    ways = [FULL, *LORAS, OURS, *([] if run.quick else [GALORE, WARMED[0]])]
    sweep = {way: partial(validated, way, steps, count, run.seed) for way in ways}
    rates, low = {way: 1e-2 if way in (OURS, LORAS[1]) else 1e-3 for way in ways}, LORAS[1]
    if not run.quick:
        chosen = tuned(run, sweep, RATES)
        rates = {way: each.value for way, each in chosen.items()}
        low = min(LORAS, key=lambda way: min(chosen[way].scores.values()))

    def found(way: str, seed: int) -> dict[str, Any]:
        made: dict[str, Any] = run.arm(f"{way}, seed {seed}", tested, way, rates[way], seed, steps, count)
        return made

    def losses(way: str, seeds: Sequence[int]) -> Any:  # [seeds, passages]
        return np.array([found(way, seed)["losses"] for seed in seeds])

    seeds = [run.seed]
    if not run.quick:
        pilot = [run.seed + 1 + each for each in range(3)]
        apart = (losses(low, pilot) - losses(OURS, pilot)).mean(1)
        first = pilot[-1] + 1
        seeds = list(range(first, first + max(4, seeds_needed(apart, MARGIN, most=8))))
    run.freeze(
        "mean over seeds and passages of the better LoRA's loss less SwitchLoRA's",
        seeds, steps=steps, batch=BATCH, width=WIDTH, layers=LAYERS, rank=RANK, rates=rates, lora=low, tests=count,
    )  # fmt: skip
    if not run.quick:
        rates[WARMED[1]] = rates[OURS]
        ways.append(WARMED[1])
    by = {way: losses(way, seeds) for way in ways}
    quarters = (8, 16, 24)  # indices of a spectrum, 0 to 32

    def row(way: str) -> list[Any]:
        each = [found(way, seed) for seed in seeds]
        means = by[way].mean(1)
        return [way, rates[way], means.mean(), means.min(), means.max(), fmean(one["rank"] for one in each),
                fmean(one["beyond"] for one in each),
                *(fmean(one["spectrum"][index] for one in each) for index in quarters)]  # fmt: skip

    run.table(
        f"A Llama of width {WIDTH}, {LAYERS} layers, rank {RANK}, {steps} steps of {BATCH} x {CONTEXT}: held-out nats "
        f"per character over {len(seeds)} seeds; updates averaged over linear layers",
        ["", "rate", "loss, mean over seeds", "lowest", "highest", "rank of the update", "fraction beyond the rank",
         *(f"singular value at {index}/32, relative to the first" for index in quarters)],
        [row(way) for way in ways],
    )  # fmt: skip
    ranks = {way: [(fmean(found(way, seed)["rank"] for seed in seeds), float(by[way].mean()))] for way in ways}
    run.figure("switchlora-ranks", Scatter("rank of the update, mean over linear layers", "held-out loss, nats", ranks))

    def more(way: str, ours: str = OURS) -> Measured:
        return Measured.over_seeds_and_items(by[way] - by[ours])

    gain = more(low)
    run.main(f"{low}: loss from scratch less SwitchLoRA's", "above 0", gain, gain.at_least(0.0))
    gap = Measured.over_seeds_and_items(by[low] - by[FULL])
    run.further(f"{low}: loss less that of all weights", "above 0: there is a gap to close", gap, gap.at_least(0.0))
    half = Measured.over_seeds_and_items((by[low] + by[FULL]) / 2 - by[OURS])
    run.further("halfway from that LoRA to all weights, less SwitchLoRA's loss", "at least 0: half of the gap closed",
                half, half.at_least(0.0))  # fmt: skip
    pairs = [(way, OURS) for way in (*LORAS, GALORE, FULL) if way != low] + [WARMED]
    for way, ours in pairs:
        if way in by:
            apart = more(way, ours)
            run.further(f"{way}: loss less that of {ours}", "above 0", apart, apart.at_least(0.0))
    if run.quick:
        return
    often = {way: np.array([run.arm(f"{way}, often, seed {seed}", tested, way, FAST, seed, steps // 2, count, True)
                            ["losses"] for seed in seeds]) for way in HOOKS}  # fmt: skip
    run.table(
        f"The same for {steps // 2} steps at {FAST:g}, with frequent exchange to the end: what becomes of states",
        ["", "loss, mean over seeds", "above SwitchLoRA's"],
        [[way, each.mean(), str(Measured.over_seeds_and_items(each - often[OURS]))] for way, each in often.items()],
    )


# SmolLM2


HEALING: dict[str, tuple[float, ...]] = {  # rates; each arm's grid extends beyond its edges
    "LoRA": (5e-4, 1e-3, 2e-3),
    "SwitchLoRA": (5e-3, 1e-2, 2e-2),
    "all weights": (5e-5, 1e-4, 2e-4),
}


def healed(way: str, seed: int, lr: float) -> list[list[float]]:
    """Return the loss of each window, on validation and on test data, of SmolLM2 without 5 layers; "" is not healed."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")

    def cut(text: str, split: str, count: int) -> Any:
        return windows(tokenizer, lamella.load_text(text, split), count, 64, seed)

    plan = lamella.make_plan("shortgpt", stack, cut("pydoc", "calibration", 8))[5]
    samples = blocks(cut("pydoc", "calibration", 120), loss_on="all")
    config = TrainConfig(steps=30, batch=4, lr=lr or 1e-3, seed=seed, save_every=30, log_every=30)
    view = apply(stack, plan)
    with tempfile.TemporaryDirectory() as work:
        if way == "SwitchLoRA":
            made = switchlora(stack, samples, plan, r=32, rest=0.0, config=config, work=Work(Path(work)))
            view = apply(made.stack, plan)
        elif way:
            trains: Callable[[str], bool] = lambda name: name.startswith(stack.architecture.prefix)  # noqa: E731
            if way == "LoRA":
                trains = add_lora(view, 32, alpha=64, seed=seed).trains
            own(view, trains)
            fit(view, samples, Task(response_loss), config, out=work, trainable=trains)
    judged = (cut("general", "test", 32), cut("pydoc", "test", 48))
    return [nats_by_sample(view, blocks(each, loss_on="all"), 8) for each in judged]


def healing(run: Run) -> None:
    rates = {
        way: tuned(run, {f"SmolLM2, {way}": partial(scored, way, run.seed)}, grid)[f"SmolLM2, {way}"].value
        for way, grid in HEALING.items()
    }
    seed = run.seed + 1
    losses = {
        way or "not healed": np.array(run.arm(f"SmolLM2, {way or 'not healed'}, {lr:g}", healed, way, seed, lr)[1])
        for way, lr in {"": 0.0, **rates}.items()
    }
    run.table(
        "SmolLM2 without 5 of 30 layers, 30 steps of 4 x 64 tokens: held-out nats per token",
        ["healed with", "rate", "loss"],
        [[way, rates.get(way, ""), each.mean()] for way, each in losses.items()],
    )
    apart = Measured.over_seeds_and_items([losses["SwitchLoRA"] - losses["LoRA"]])
    run.further("SwitchLoRA's loss less LoRA's, healing", "at most 0.02", apart, apart.at_most(0.02))


def scored(way: str, seed: int, lr: float) -> float:
    return fmean(healed(way, seed, lr)[0])


def experiment(run: Run) -> None:
    run.data = f"characters of pydoc and stdlib for a Llama of {LAYERS} layers; random maps of {SIZE} x {SIZE}" + (
        "" if run.quick else "; pydoc for SmolLM2, its rates chosen on general"
    )
    nano(run)
    random_map(run)
    if not run.quick:
        healing(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a short nano Llama at one rate, two arms of the matrix, no SmolLM2"))
