"""SwitchLoRA at small scale: a random full-rank matrix, a nano Llama from scratch, and SmolLM2 healed.

First y = W* x, trained from another random W with rank 8 of 64: LoRA, with its usual initialisation or SwitchLoRA's,
cannot go below the error of the best matrix of rank 8 (Eckart and Young), and exchanging vectors can; ablations omit
the reset of states, the freezing, or exchange all vectors at once. Then a character-level Llama of two million
parameters is trained on Python's documentation from scratch, with a rank of a quarter of the width: all weights, LoRA,
GaLore and SwitchLoRA, and from one warm start ReLoRA and SwitchLoRA, at the best of several rates, over three seeds;
the effect of resetting states is measured at a high rate with frequent exchange. Last, SmolLM2 without 5 of 30 layers
is healed on 31,000 tokens with one seed, which is few: the gain of the exchange needs more steps.

    python reproductions/switchlora.py            # about two hours on one core; an interrupted run resumes
    python reproductions/switchlora.py --quick    # the matrix, and a short nano Llama
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, llama, nats, prose, whole
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
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import (
    Cosine,
    Task,
    TrainConfig,
    TrainingRun,
    add_lora,
    blocks,
    fit,
    mean_loss,
    own,
    response_loss,
)
from lamella.zoo import open_tokenizer

SIZE, LOW = 64, 8  # size of the random matrix, and the rank of adapters
SEEDS = (0, 1, 2)


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


NEVER, OFTEN = ExchangeFrequency(interval=float("inf")), ExchangeFrequency(12, 1.0)
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
ABLATED = [name for name in MAPPED if name.startswith("SwitchLoRA, ") and "descent" not in name]


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
    run.main("SwitchLoRA's error on a random map", "at most a quarter of LoRA's",
             f"{ours['error']:.3f} / {low['error']:.3f}", ours["error"] <= 0.25 * low["error"])  # fmt: skip
    run.main("rank of SwitchLoRA's update", f"at least {4 * LOW}", str(ours["rank"]), ours["rank"] >= 4 * LOW)


# A nano Llama


WIDTH, LAYERS, CONTEXT, BATCH = 208, 4, 64, 8
RANK, WARM = WIDTH // 4, 0.05  # rank, and the fraction of the steps in which a warm start trains all weights
LOWER = (2e-3, 5e-3, 1e-2, 2e-2)  # rates
RATES = {"all weights": (5e-4, 1e-3, 3e-3), "GaLore": (3e-3, 1e-2, 3e-2), "ReLoRA, warm start": (2e-3, 5e-3, 2e-2)}
FAST = 2e-2  # the learning rate at which optimizer states are compared
HOOKS = {  # with frequent exchange
    "SwitchLoRA": SwitchHook,
    "SwitchLoRA, no reset": NoReset,
    "SwitchLoRA, reset of exchanged vectors": OwnReset,
}


def fresh(seed: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(LlamaForCausalLM(llama(len(LETTERS), WIDTH, LAYERS, context=CONTEXT)).eval())


def train_nano(way: str, lr: float, seed: int, steps: int, samples: Sequence[Any], stack: Stack, often: bool) -> Stack:
    """Train a nano Llama for some steps with one method, starting from a stack."""
    config = TrainConfig(
        steps=steps, lr=lr, batch=BATCH, warmup=0.05, seed=seed, save_every=steps, log_every=steps, bf16=True
    )
    rest = 1e-3 / lr  # all methods train embedding, norms and head at the rate of full training
    if way.startswith("SwitchLoRA") and not often:
        with tempfile.TemporaryDirectory() as work:
            return switchlora(stack, samples, rest=rest, config=config, work=Work(work)).stack  # type: ignore[arg-type, return-value]
    view = share(stack.model)
    lora = None if way in ("all weights", "GaLore") else add_lora(view, RANK, alpha=1, seed=seed)
    own(view, lambda name: True)
    options: dict[str, Any] = {"trainable": lambda name: True}
    if lora is not None:
        options = {"trainable": lambda name: ".base_layer." not in name, "optimizer": per_vector(rest)}
    if often:
        assert lora is not None
        options["hooks"] = [HOOKS[way](lora, OFTEN, steps, seed)]
    if way == "GaLore":
        options["optimizer"] = partial(projected_optimizer, r=RANK, inside=stack.architecture.prefix, rest=rest)
    if way.startswith("ReLoRA"):
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


def warmed(run: Run, seed: int, steps: int, samples: Sequence[Any]) -> Stack:
    """Return a nano Llama after a few steps of training all weights, saved for the arms that start from it."""
    folder, few = run.work / f"warm-{seed}", round(WARM * steps)

    def train() -> None:
        train_nano("all weights", 1e-3, seed, few, samples, fresh(seed), False).model.save_pretrained(folder)

    run.arm(f"nano, warm start, seed {seed}", train)
    return Stack(LlamaForCausalLM.from_pretrained(folder).eval())


def nano(run: Run) -> None:
    steps = 40 if run.quick else 800
    samples = whole(prose("calibration", BATCH * steps, CONTEXT, run.seed, TEXTS))
    tests = whole(prose("test", 80 if run.quick else 800, CONTEXT, run.seed, TEXTS))
    chosen_on, told_on = tests[: len(tests) // 2], tests[len(tests) // 2 :]

    def judged(way: str, lr: float, seed: int, often: bool) -> dict[str, Any]:
        start = warmed(run, seed, steps, samples) if "warm" in way else fresh(seed)
        after = train_nano(way, lr, seed, steps // 2 if often else steps, samples, start, often)
        found = spread(start, after, RANK)
        updates = found["updates"].values()
        return {
            "choose": nats(after.model, chosen_on),
            "loss": nats(after.model, told_on),
            "rank": fmean(each["rank"] for each in updates),
            "beyond": fmean(each["beyond"] for each in updates),
            "spectrum": found["spectrum"],
        }

    def arm(way: str, lr: float, seed: int, often: bool = False) -> dict[str, Any]:
        said = f"nano, {way}, {lr:g}, seed {seed}" + (", often" if often else "")
        found: dict[str, Any] = run.arm(said, judged, way, lr, seed, often)
        return found

    seeds = SEEDS[:1] if run.quick else SEEDS
    ways = ["all weights", "LoRA", "SwitchLoRA"]
    ways += [] if run.quick else ["GaLore", "ReLoRA, warm start", "SwitchLoRA, warm start"]
    best: dict[str, float] = {}
    for way in ways:
        rates = (best["SwitchLoRA"],) if way == "SwitchLoRA, warm start" else RATES.get(way, LOWER)
        swept = {lr: arm(way, lr, SEEDS[0])["choose"] for lr in (rates[-1:] if run.quick else rates)}
        best[way] = min(swept, key=lambda lr: swept[lr])
    arms = {way: [arm(way, best[way], seed) for seed in seeds] for way in ways}
    losses = {way: [each["loss"] for each in found] for way, found in arms.items()}

    def mean(way: str, what: str) -> float:
        return fmean(each[what] for each in arms[way])

    quarters = (8, 16, 24)  # indices of a spectrum, 0 to 32
    run.table(
        f"A Llama of width {WIDTH}, {LAYERS} layers, rank {RANK}, {steps} steps of {BATCH} x {CONTEXT}: held-out nats "
        "per character; updates averaged over linear layers",
        ["", "best rate", "loss, mean over seeds", "lowest", "highest", "rank of the update",
         "fraction beyond the rank", *(f"singular value at {index}/32, relative to the first" for index in quarters)],
        [[way, best[way], fmean(each), min(each), max(each), mean(way, "rank"), mean(way, "beyond"),
          *(fmean(one["spectrum"][index] for one in arms[way]) for index in quarters)] for way, each in losses.items()],
    )  # fmt: skip

    def less(way: str, other: str) -> Measured:
        return Measured.over_seeds([a - b for a, b in zip(losses[way], losses[other], strict=True)])

    paired = zip(losses["LoRA"], losses["SwitchLoRA"], losses["all weights"], strict=True)
    gain = less("LoRA", "SwitchLoRA")
    closed = Measured.over_seeds([(low - ours) / (low - full) for low, ours, full in paired])
    run.main("LoRA's loss from scratch less SwitchLoRA's", "above 0", str(gain), gain.at_least(0.0))
    run.further("gap from LoRA to all weights", "at least half closed", str(closed), closed.at_least(0.5))
    if run.quick:
        return
    for other, ours in (("GaLore", "SwitchLoRA"), ("ReLoRA, warm start", "SwitchLoRA, warm start")):
        apart = less(other, ours)
        run.further(f"{other}: loss less that of {ours}", "above 0", str(apart), apart.at_least(0.0))

    fast = {way: [arm(way, FAST, seed, often=True)["loss"] for seed in SEEDS] for way in HOOKS}
    told = [Measured.over_seeds([a - b for a, b in zip(fast[way], fast["SwitchLoRA"], strict=True)]) for way in HOOKS]
    run.table(
        f"The same for {steps // 2} steps at {FAST:g}, with much exchange to the end: what becomes of states",
        ["", "loss, mean over seeds", "lowest", "highest", "less that of SwitchLoRA"],
        [[way, fmean(each), min(each), max(each), str(apart)]
         for (way, each), apart in zip(fast.items(), told, strict=True)],
    )  # fmt: skip


# SmolLM2


def healing(run: Run) -> None:
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")

    def cut(text: str, split: str, count: int) -> Any:
        return windows(tokenizer, lamella.load_text(text, split), count, 128, run.seed)

    plan = lamella.make_plan("shortgpt", stack, cut("pydoc", "calibration", 4))[5]
    samples = blocks(cut("pydoc", "calibration", 240), loss_on="all")
    chosen_on = blocks(cut("general", "test", 16), loss_on="all")
    told_on = blocks(cut("pydoc", "test", 24), loss_on="all")
    config = TrainConfig(steps=60, batch=4, seed=run.seed, save_every=60, log_every=60, bf16=True)
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


# Exactness


def exactness(record: Record) -> None:
    model = adapted(torch.randn(SIZE, SIZE) / SIZE**0.5, 0)
    before = model.linear.get_base_layer().weight.detach().double().clone()
    one = VectorExchange(model.linear, torch.Generator().manual_seed(0))

    def effective() -> Tensor:
        return one.state()["weight"].double() + one.scale * one.b.detach().double() @ one.a.detach().double()

    worst = float((effective() - before).abs().max())
    record.exact("the weight with its pools against itself", "within 1e-5", f"{worst:.1e}", worst <= 1e-5)
    steps = []
    for _ in range(200):
        last = effective()
        one.switch(max(1, one.available() // 2), freeze=0)
        steps.append(float((effective() - last).abs().max()))
    record.exact(
        "the weight before and after each of 200 exchanges", "within 1e-6", f"{max(steps):.1e}", max(steps) <= 1e-6
    )
    stack = fresh(0)
    view = share(stack.model)
    lora = add_lora(view, RANK, alpha=1)
    states = sum(each.numel() for name, each in view.named_parameters() if lora.trains(name))
    formula = RANK * sum(sum(view.get_submodule(name).get_base_layer().weight.shape) for name in lora.modules)
    record.exact("trained parameters besides W", "r (in + out)", f"{states} / {formula}", states == formula)


def experiment(run: Run) -> None:
    run.data = f"random maps of {SIZE} x {SIZE}; characters of pydoc and stdlib for a Llama of {LAYERS} layers" + (
        "" if run.quick else "; pydoc for SmolLM2, its rates chosen on general"
    )
    run.part("exactness", exactness)
    random_map(run)
    nano(run)
    if not run.quick:
        healing(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a short nano Llama, no SmolLM2"))
