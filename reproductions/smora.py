"""SMoRA at small scale: conflicting linear tasks, a nano Llama trained on eight string tasks, and SmolLM2 on four.

First the paper's identities. Then 8 tasks, each with its own matrix of rank 2 on 32 inputs, where the task can only be
inferred from the input: LoRA must average them, experts can separate them; with one matrix for all tasks nothing can be
gained, and all models are trained on noisy examples. Then a character-level Llama of two million parameters, trained
here on Python's documentation and on strings to copy, is frozen, and LoRA, mixtures of LoRAs and SMoRA learn to
reverse, rotate, sort, count and decipher strings beside it, each at the best of three rates, over three seeds; so do
blocks of 4 and of 2 ranks. The usage of ranks and the load are measured with and without load balancing. Last, SmolLM2
learns four tasks on short phrases.

    python reproductions/smora.py            # about an hour on one core; an interrupted run resumes
    python reproductions/smora.py --quick    # the identities, and the linear tasks for one seed
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, encode, from_scratch, llama, prose, taught_once, whole
from torch import Tensor, nn
from torch.nn.functional import linear

import lamella
from lamella.evaluate import Ratio
from lamella.files import Work
from lamella.methods.smora import (
    KERNELS,
    ExpertSettings,
    LoadBalance,
    RankExperts,
    TaskExamples,
    Usage,
    dense,
    smora,
    trains,
    with_prompts,
)
from lamella.methods.smora.baselines import HydraLora, LoraMixture, MosLora
from lamella.methods.smora.method import active_sites
from lamella.plan import ModelReference, Plan, attach, keep_adapters
from lamella.plan.fingerprint import revision
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Sample, Task, TrainConfig, add_lora, collate, fit, linear_at, mean_loss, pairs
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano as small

R, K, ALPHA = 64, 8, 16.0
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)
U = 1e-5  # update rate of the balance, from the authors

# Adapters beside linear layers: functions of a model and its layers that return the experts of SMoRA, if any.
Arm = Callable[[Any, Sequence[str], int], dict[str, Any]]


def low_rank(r: int) -> Arm:
    def put(view: Any, names: Sequence[str], seed: int) -> dict[str, Any]:
        add_lora(view, r, int(ALPHA), targets=names, seed=seed)
        return {}

    return put


def mixture(kind: Any, **settings: Any) -> Arm:
    def put(view: Any, names: Sequence[str], seed: int) -> dict[str, Any]:
        attach(view, names, partial(kind, **settings), seed=seed)
        return {}

    return put


def ranks(p: int = 1) -> Arm:
    def put(view: Any, names: Sequence[str], seed: int) -> dict[str, Any]:
        made: dict[str, Any] = attach(view, names, partial(RankExperts, r=R, k=K, p=p, alpha=ALPHA), seed=seed)
        return made

    return put


OURS, LOW, HIGH = "SMoRA 64/8", "LoRA-8", "LoRA-64"
TOP_1, TOP_2 = "MoE 8x8, top-1", "MoE 8x8, top-2"
ARMS: dict[str, Arm] = {
    LOW: low_rank(K),
    HIGH: low_rank(R),
    TOP_1: mixture(LoraMixture, mixing="top-1"),
    TOP_2: mixture(LoraMixture, mixing="top-2"),
    OURS: ranks(),
}
MORE: dict[str, Arm] = {
    "MoE 8x8, soft": mixture(LoraMixture, mixing="soft"),
    "SMEAR 8x8": mixture(LoraMixture, mixing="smear"),
    "HydraLoRA 4x8": mixture(HydraLora),
    "MosLoRA-64": mixture(MosLora),
}


def learn(model: Any, samples: Sequence[Any], even: LoadBalance, config: TrainConfig, task: Task | None = None) -> None:
    """Train the adapters beside a model's linear layers; in arms without ranks, the balance has no effect."""
    task = task or Task(even.loss, passes=even.passes)
    with tempfile.TemporaryDirectory() as work, torch.enable_grad():
        fit(model, samples, task, config, out=work, trainable=trains, hooks=[even] if even.experts else [])
    model.eval()


# Conflicting tasks


SIZE, TASKS, CUE = 32, 8, 4.0
NOISE = 1.0  # noise on the training data of the single-matrix task: without it, LoRA's error is at rounding level


class Net(nn.Module):
    """One frozen linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(SIZE, SIZE, bias=False)
        self.map.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(x)
        return out


class World:
    """Inputs that reveal their task, and the matrix of rank 2 that each task adds to a shared one."""

    def __init__(self, seed: int, conflict: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(SIZE, SIZE, generator=self.generator) / SIZE**0.5
        self.cues = CUE * self._orthonormal(TASKS)
        maps = [4 * self._orthonormal(2).T @ self._orthonormal(2) for _ in range(TASKS)]
        self.layers = torch.stack(maps if conflict else maps[:1] * TASKS)

    def _orthonormal(self, rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=self.generator)).Q[:rows]

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and the outputs that their tasks add [count, 32] each."""
        task = torch.randint(TASKS, (count,), generator=self.generator)
        x = self.cues[task] + torch.randn(count, SIZE, generator=self.generator)
        return x, torch.einsum("nod,nd->no", self.layers[task], x)


def squares(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(-1).mean()


def columns(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def left(arm: str, lr: float, seed: int, steps: int, conflict: bool) -> list[float]:
    """Return the remaining squared error of the tasks' outputs, on validation and on test data."""
    world = World(seed, conflict)
    x, y = world.sample(8192)
    noise = 0.0 if conflict else NOISE * torch.randn(y.shape, generator=world.generator)
    rows = [{"x": a, "y": b} for a, b in zip(x, linear(x, world.start) + y + noise, strict=True)]
    model = Net(world.start)
    even = LoadBalance((ARMS | MORE)[arm](model, ["map"], seed), U)
    task = Task(squares, collate=columns, weight=lambda batch: len(batch["x"]), passes=even.passes)
    config = TrainConfig(steps=steps, lr=lr, batch=64, seed=seed, save_every=steps, log_every=steps)
    learn(model, rows, even, config, task)
    found = []
    for _ in range(2):
        x, y = world.sample(4096)
        with torch.no_grad():
            wrong = model(x) - linear(x, world.start) - y
        found.append(float(wrong.square().sum() / y.square().sum()))
    return found


def maps(run: Run) -> None:
    steps = 1200 if run.quick else 3000
    seeds, rates = (SEEDS[:1], RATES[1:2]) if run.quick else (SEEDS, RATES)
    arms = [HIGH, OURS] if run.quick else [*ARMS, *MORE]

    def arm(name: str, lr: float, seed: int, conflict: bool) -> list[float]:
        said = f"maps, {name}, {lr:g}, seed {seed}" + ("" if conflict else ", one map")
        found: list[float] = run.arm(said, left, name, lr, seed, steps, conflict)
        return found

    def over_seeds(name: str, conflict: bool) -> tuple[float, list[float]]:
        """Return the best learning rate, chosen on the first seed, and the errors of all seeds."""
        best = min(rates, key=lambda lr: arm(name, lr, SEEDS[0], conflict)[0])
        return best, [arm(name, best, seed, conflict)[1] for seed in seeds]

    apart = {name: over_seeds(name, True) for name in arms}
    run.table(
        f"{TASKS} tasks, each with a matrix of rank 2, {steps} steps: remaining fraction of the squared error",
        ["", "best rate", "mean over seeds", "lowest", "highest"],
        [[name, lr, fmean(each), min(each), max(each)] for name, (lr, each) in apart.items()],
    )
    ratio = Measured.over_seeds([ours / theirs for ours, theirs in zip(apart[OURS][1], apart[HIGH][1], strict=True)])
    run.main("conflict: SMoRA's error relative to LoRA-64", "at most a fifth", str(ratio), ratio.at_most(0.2))
    same = {name: over_seeds(name, False) for name in (HIGH, OURS)}
    run.table(
        f"One matrix for all tasks, trained with noise of {NOISE:g} on each target; errors without noise",
        ["", "best rate", "mean over seeds"],
        [[name, lr, fmean(each)] for name, (lr, each) in same.items()],
    )
    ratio = Measured.over_seeds([ours / theirs for ours, theirs in zip(same[OURS][1], same[HIGH][1], strict=True)])
    run.further("no conflict: SMoRA's error relative to LoRA-64", "not below 1 by more than its interval", str(ratio),
                ratio.at_least(1.0) is not False)  # fmt: skip


# A nano Llama


WIDTH, LAYERS, BATCH = 208, 4, 16
VOWELS, ALPHABET = "aeiou", "abcdefghijklmnopqrstuvwxyz"


def cipher(seed: int) -> Callable[[str], str]:
    """Return a substitution of letters."""
    table = str.maketrans(ALPHABET, "".join(random.Random(seed).sample(ALPHABET, len(ALPHABET))))
    return lambda text: text.translate(table)


STRINGS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "mirror": lambda text: text[::-1],  # the same task under another name
    "rotate": lambda text: text[1:] + text[0],
    "upper": str.upper,
    "sort": lambda text: "".join(sorted(text)),
    "vowels": lambda text: str(sum(letter in VOWELS for letter in text)),
    "north": cipher(1),
    "south": cipher(2),
}
TWINS, RIVALS = ("reverse", "mirror"), ("north", "south")


def strings(count: int, seed: int) -> dict[str, list[Sample]]:
    """Return `count` examples of each task, with loss on answers only, since random letters are unpredictable."""
    drawn = random.Random(seed)
    found = {}
    for task, answer in STRINGS.items():
        texts = ["".join(drawn.choices(ALPHABET, k=drawn.randint(4, 6))) for _ in range(count)]
        found[task] = pairs((encode(f"\n{task} {text}\n"), encode(f"{answer(text)}\n")) for text in texts)
    return found


def mixed(by_task: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    return [sample for samples in by_task.values() for sample in samples]


@torch.no_grad()
def exact(model: Any, samples: Sequence[Sample], size: int = 64) -> float:
    """Return the fraction of exact answers of greedy generation, which one forward pass determines."""
    right = 0
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        said = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right += int(((said == labels) | (labels < 0)).all(1).sum())
    return right / len(samples)


def copies(count: int, seed: int) -> list[Sample]:
    """Return strings to copy: none of the tasks, but a skill that all of them except counting need."""
    drawn = random.Random(seed)
    texts = ["".join(drawn.choices(ALPHABET, k=drawn.randint(4, 24))) for _ in range(count)]
    return pairs((encode(f"\ncopy {text}\n"), encode(f"{text}\n")) for text in texts)


def speller(seed: int) -> Stack:
    """Return the Llama trained on documentation and on copying strings, in place of pre-training; cached.

    Trained on documentation alone, it learnt only to count vowels, with any adapter.
    """
    steps = 1800
    half = BATCH * steps // 2

    def samples() -> list[Sample]:
        return whole(prose("calibration", half, 64, seed, TEXTS)) + copies(half, seed)

    config = from_scratch(steps, lr=1e-3, batch=BATCH, betas=(0.9, 0.98), seed=seed, bf16=True)
    name = f"smora-copies-{LAYERS}x{WIDTH}-{steps}-{seed}"
    return taught_once(name, llama(len(LETTERS), WIDTH, LAYERS), samples, config)


def spelt(arm: Arm, lr: float, seed: int, steps: int, u: float = U) -> dict[str, Any]:
    """Train and evaluate a model on validation and test data by task, and measure its routing."""
    stack = speller(0)
    view = share(stack.model)
    made = arm(view, linear_at(view), seed)
    config = TrainConfig(
        steps=steps, lr=lr, batch=BATCH, warmup=0.1, seed=seed, save_every=steps, log_every=steps, bf16=True
    )
    learn(view, mixed(strings(1600, 100 + seed)), LoadBalance(made, u), config)
    chosen_on, told_on = strings(60, 1), strings(200, 2)
    found = {
        "chosen": exact(view, mixed(chosen_on)),
        "told": {task: exact(view, samples) for task, samples in told_on.items()},
    }
    if made:
        looked_at = {task: samples[:100] for task, samples in told_on.items()}
        answers = Usage.of(view, made, looked_at, answers=True)  # prompts are random letters, in all tasks alike
        load = Usage.of(view, made, looked_at).load()  # the load of all tokens, on which the balance acts
        found |= {
            "alike": answers.similarity().tolist(),
            "spread": fmean(spread for spread, _ in load),
            "dead": sum(dead for _, dead in load),
        }
    return found


def nano(run: Run) -> None:
    steps = 700

    def arm(name: str, put: Arm, lr: float, seed: int, u: float = U) -> dict[str, Any]:
        said = f"nano, {name}, {lr:g}, seed {seed}" + ("" if u == U else f", u={u:g}")
        found: dict[str, Any] = run.arm(said, spelt, put, lr, seed, steps, u)
        return found

    def swept(name: str, put: Arm) -> tuple[float, list[dict[str, Any]]]:
        """Return the best learning rate, chosen on the first seed, and the results of all seeds."""
        best = max(RATES, key=lambda lr: arm(name, put, lr, SEEDS[0])["chosen"])
        return best, [arm(name, put, best, seed) for seed in SEEDS]

    def means(found: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the exact answers in %, seed by seed."""
        return [100 * fmean(each["told"].values()) for each in found]

    copied = 100 * run.arm("nano, copies", lambda: exact(speller(0).model, copies(200, 1)))
    run.exact("premise: strings that the Llama copies before", "at least 90 %", f"{copied:.1f} %", copied >= 90)
    best, runs = {}, {}
    for name, put in ARMS.items():
        best[name], runs[name] = swept(name, put)
    scores = {name: means(found) for name, found in runs.items()}
    run.table(
        f"A Llama of width {WIDTH}, {LAYERS} layers, {steps} steps of {BATCH}: exact answers in %",
        ["", "best rate", "mean", "lowest", "highest", *STRINGS],
        [
            [name, best[name], fmean(scores[name]), min(scores[name]), max(scores[name])]
            + [100 * fmean(each["told"][task] for each in found) for task in STRINGS]
            for name, found in runs.items()
        ],
    )

    def above(other: str) -> Measured:
        return Measured.over_seeds([a - b for a, b in zip(scores[OURS], scores[other], strict=True)])

    run.main("SMoRA's exact answers less LoRA-8's", "at least 5 points", str(above(LOW)), above(LOW).at_least(5))
    run.main("SMoRA's exact answers less those of MoE top-1", "at least 0", str(above(TOP_1)), above(TOP_1).at_least(0))
    run.further("SMoRA's exact answers less those of MoE top-2", "at least 0", str(above(TOP_2)),
                above(TOP_2).at_least(0))  # fmt: skip
    run.further("SMoRA's exact answers less LoRA-64's", "at least 0", str(above(HIGH)), above(HIGH).at_least(0))

    # With blocks of 8 there is one at a time, whose gate is 1: that end is MoE top-1.
    blocks = {1: (best[OURS], scores[OURS])}
    for p in (2, 4):
        lr, found = swept(f"blocks of {p}", ranks(p))
        blocks[p] = lr, means(found)
    order = sorted(blocks, reverse=True)
    run.table("64 ranks, 8 of them run, in blocks: exact answers in %", ["p", "best rate", "mean", "lowest", "highest"],
              [[p, lr, fmean(each), min(each), max(each)] for p in order for lr, each in [blocks[p]]])  # fmt: skip
    for coarse, fine in pairwise(order):
        gain = Measured.over_seeds([a - b for a, b in zip(blocks[fine][1], blocks[coarse][1], strict=True)])
        run.further(f"exact answers with blocks of {fine} less of {coarse}", "at least -1 point", str(gain),
                    gain.at_least(-1))  # fmt: skip

    names = list(STRINGS)

    def alike(found: Mapping[str, Any], pair: tuple[str, str]) -> float:
        return float(found["alike"][names.index(pair[0])][names.index(pair[1])])

    rows = [[one, *(fmean(alike(each, (one, other)) for each in runs[OURS]) for other in names)] for one in names]
    run.table("How alike two tasks choose their ranks, as a cosine over all maps", ["", *names], rows)
    apart = Measured.over_seeds([alike(each, TWINS) - alike(each, RIVALS) for each in runs[OURS]])
    run.further("cosine of one task under two names less that of two ciphers", "above 0", str(apart),
                apart.at_least(0))  # fmt: skip

    loads = {u: [arm(OURS, ARMS[OURS], best[OURS], seed, u) for seed in SEEDS] for u in (0.0, U, 1e-3)}
    run.table(
        f"The balance, means over {len(SEEDS)} seeds",
        ["u", "variation of the load of ranks, mean over layers", "unused ranks", "exact answers in %"],
        [[u, fmean(each["spread"] for each in found), fmean(each["dead"] for each in found), fmean(means(found))]
         for u, found in loads.items()],
    )  # fmt: skip
    evener = Measured.over_seeds(
        [without["spread"] - even["spread"] for without, even in zip(loads[0.0], loads[1e-3], strict=True)]
    )
    run.further("variation of the load without the balance less that at u = 1e-3", "above 0", str(evener),
                evener.at_least(0))  # fmt: skip


# SmolLM2


PHRASES: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "capitals": ("Write in capitals", lambda words: " ".join(words).upper()),
    "initials": ("Give the first letters", lambda words: "".join(word[0] for word in words)),
    "last": ("Give the last word", lambda words: words[-1]),
    "backwards": ("Turn the words round", lambda words: " ".join(words[::-1])),
}


def phrases(split: str, count: int, seed: int) -> TaskExamples:
    """Return tasks on three words of documentation."""
    tokenizer, drawn = open_tokenizer("smollm2"), random.Random(seed)
    words = sorted(set(re.findall(r"\b[a-z]{3,8}\b", str(lamella.load_text("pydoc", split)))))
    rows, tasks = [], []
    for task, (asked, answer) in PHRASES.items():
        for _ in range(count):
            chosen = drawn.sample(words, 3)
            rows.append((f"{asked}: {' '.join(chosen)}\nAnswer:", f" {answer(chosen)}"))
            tasks.append(task)
    return TaskExamples(pairs(rows, tokenizer, max_length=64), tasks=tasks)


def small_model(lr: float, ours: bool, steps: int, seed: int) -> dict[str, list[float]]:
    """Return the validation and test losses of each task's answers."""
    stack, data = lamella.open("smollm2"), phrases("calibration", 200, seed)
    config = TrainConfig(
        steps=steps, lr=lr, batch=2, warmup=0.1, seed=seed, save_every=steps, log_every=steps, bf16=True
    )
    if ours:
        with tempfile.TemporaryDirectory() as work:
            view = smora(stack, data, config=config, work=Work(Path(work))).view
    else:
        view = apply(stack, Plan(model=ModelReference.of(stack)))
        add_lora(view, R, int(ALPHA), seed=seed)
        learn(view, [with_prompts(each) for each in data], LoadBalance({}, U), config)
    chosen_on, told_on = (phrases("test", 25, each).by_task() for each in (seed + 1, seed + 2))
    return {task: [mean_loss(view, chosen_on[task]), mean_loss(view, told_on[task])] for task in PHRASES}


def step_ratio(rounds: int) -> list[float]:
    """Return the ratio of step times of SMoRA and LoRA-64, interleaved."""
    stack, batch = lamella.open("smollm2"), collate(phrases("calibration", 1, 0).items)
    steps = {}
    for name in (HIGH, OURS):
        view = apply(stack, Plan(model=ModelReference.of(stack)))
        even = LoadBalance(ARMS[name](view, linear_at(view), 0), U)
        view.train()
        for each, parameter in view.named_parameters():
            parameter.requires_grad_(trains(each))
        optimizer = torch.optim.AdamW([each for each in view.parameters() if each.requires_grad], lr=1e-6)
        steps[name] = partial(step, view, even, optimizer, batch)
    ratios = []
    for _ in range(rounds + 1):
        seconds = {}
        for name, once in steps.items():
            begin = time.perf_counter()
            once()
            seconds[name] = time.perf_counter() - begin
        ratios.append(seconds[OURS] / seconds[HIGH])
    for parameter in stack.model.parameters():
        parameter.requires_grad_(True)
    return ratios[1:]


@torch.enable_grad()
def step(view: Any, even: LoadBalance, optimizer: Any, batch: Any) -> None:
    """Run forward, backward, the balance, and the update."""
    even.loss(view, batch).backward()
    even.update()
    optimizer.step()
    optimizer.zero_grad()


def smollm2(run: Run) -> None:
    steps, rates = 200, (2e-4, 1e-3)
    found = {}
    for name, ours in ((HIGH, False), (OURS, True)):
        swept = [run.arm(f"SmolLM2, {name}, {lr:g}", small_model, lr, ours, steps, run.seed) for lr in rates]
        found[name] = min(swept, key=lambda each: fmean(chosen for chosen, _ in each.values()))
    run.table(
        f"SmolLM2, {steps} steps of 2 examples, loss on prompts and answers: held-out nats per token of answers",
        ["", "mean", *PHRASES],
        [[name, fmean(told for _, told in each.values()), *(each[task][1] for task in PHRASES)]
         for name, each in found.items()],
    )  # fmt: skip
    ratio = Ratio.of(run.arm("SmolLM2, a step", step_ratio, 7))
    measured = Measured.over_rounds(ratio)
    run.further(
        "time per step of SMoRA relative to LoRA-64, SmolLM2", "at most 1.8", str(measured), measured.at_most(1.8)
    )


# Exactness


def drawn(made: RankExperts) -> RankExperts:
    with torch.no_grad():
        made.lora_B.copy_(torch.randn(made.lora_B.shape) / 4)
    return made


@torch.no_grad()
def identities(record: Record) -> None:
    torch.manual_seed(record.seed)
    x, y = torch.randn(100, 64), torch.randn(100, 48)
    a, b, gates = torch.randn(8, 8, 64) / 8, torch.randn(8, 48, 8) / 3, torch.rand(100, 8)
    several = sum(gates[:, e : e + 1] * linear(linear(x, a[e]), b[e]) for e in range(8))
    one = linear(linear(x, a.flatten(0, 1)) * gates.repeat_interleave(8, dim=1), torch.cat(list(b), dim=1))
    worst = float((several - one).abs().max())
    said = "8 LoRAs with gates against one LoRA with gates over blocks"
    record.exact(said, "below 1e-5", f"{worst:.1e}", worst < 1e-5)

    made = drawn(RankExperts(64, 48, r=R, k=R))
    made.lora_router.zero_()
    lora = y + ALPHA / R * linear(linear(x, made.lora_A), made.lora_B)
    worst = float((made(x, y) - lora).abs().max())
    record.exact("all ranks, constant scores, against LoRA", "0", f"{worst:g}", worst == 0)
    same = torch.equal(RankExperts(64, 48)(x, y), y)
    record.exact(
        "untrained experts on a linear layer", "bitwise equal to the layer", "the same" if same else "another", same
    )

    route = drawn(RankExperts(64, 48)).route(x)
    off = float((route.gates.mean(-1) - 1).abs().max())
    record.exact("mean gate of the 8 chosen", "1 within 1e-6", f"{off:.1e}", route.ranks.shape[1] == K and off <= 1e-6)


def kernels(record: Record) -> None:
    found = []
    for kernel in KERNELS:
        torch.manual_seed(record.seed)
        made = drawn(RankExperts(64, 48))
        made.kernel = kernel
        x = torch.randn(200, 64, requires_grad=True)
        made(x, torch.zeros(200, 48)).square().mean().backward()
        found.append([x.grad, *(each.grad for each in made.parameters())])
    apart = max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))  # type: ignore[operator, union-attr]
    record.exact("gradients of the sparse against the dense kernel", "below 1e-5", f"{apart:.1e}", apart < 1e-5)

    made = RankExperts(6, 5, r=6, k=2).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    route = made.route(x)
    given = [each.detach().requires_grad_() for each in (x, made.lora_A, torch.randn(5, 6).double(), route.gates)]
    right = torch.autograd.gradcheck(lambda x, a, b, gates: dense(x, a, b, route._replace(gates=gates)), given)
    record.exact("gradients against finite differences, float64", "equal", "equal" if right else "unequal", right)


def decoding(run: Run) -> None:
    """Compare cached with uncached decoding, and the adapters before and after loading from a side file."""
    stack = Stack(small("llama")) if run.quick else lamella.open("smollm2")
    settings = ExpertSettings(r=8, k=2) if run.quick else ExpertSettings()
    view = apply(stack, Plan(model=ModelReference.of(stack)))
    made: dict[str, Any] = attach(view, linear_at(view), partial(RankExperts, r=settings.r, k=settings.k))
    with torch.no_grad():
        for each in made.values():
            each.lora_B.normal_(std=0.02)
    ids = torch.randint(8, 90, (1, 12), generator=torch.Generator().manual_seed(run.seed))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (view.generate(ids, **options, use_cache=use, pad_token_id=0) for use in (True, False))
    apart = float((torch.stack(cached.logits) - torch.stack(plain.logits)).abs().max())
    same = torch.equal(cached.sequences, plain.sequences)
    run.exact("greedy decoding with a cache against without", "the same tokens, logits below 1e-4",
              f"{'the same' if same else 'others'}, {apart:.1e}", same and apart < 1e-4)  # fmt: skip

    plan = Plan(model=ModelReference.of(stack))
    told = {"name": "smora", "params": {"r": settings.r, "k": settings.k}, "sites": active_sites(stack, plan)}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        kept = keep_adapters(plan, made, Path(folder), base=revision(stack.model), **told)  # type: ignore[arg-type]
        again = torch.equal(apply(stack, kept)(ids).logits, view(ids).logits)
    run.exact("logits of a saved and opened adapter", "bitwise equal", "the same" if again else "others", again)


def exactness(run: Run) -> None:
    identities(run)
    kernels(run)
    decoding(run)


def experiment(run: Run) -> None:
    run.data = f"maps of {SIZE} x {SIZE}" + (
        "" if run.quick else "; eight string tasks beside a Llama of pydoc and stdlib; phrases of pydoc for SmolLM2"
    )
    run.part("exactness", exactness)
    maps(run)
    if not run.quick:
        nano(run)
        smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="the identities and the maps, one seed at one rate"))
