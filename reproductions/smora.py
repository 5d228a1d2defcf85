"""SMoRA at small scale: a nano Llama trained on six string tasks, conflicting linear tasks, and SmolLM2 on four.

The main claim: a character-level Llama, trained here on Python's documentation and on strings to copy, is frozen, and
LoRA, mixtures of LoRAs and SMoRA learn to reverse, rotate, sort, capitalise and count beside it. On held-out strings,
the loss on the answers is lower with SMoRA than with a LoRA of as many active ranks, and not higher than with a top-1
mixture of LoRAs. It is the mean over tasks, paired over seeds and strings, each arm at its own learning rate, chosen on
validation strings. The premise is that the frozen Llama copies strings, without which no adapter learns the tasks.

Further claims compare SMoRA with the top-2 mixture, with a LoRA of as many total ranks, and with blocks of 2 and 4
ranks, and measure the usage of ranks and the load with and without load balancing. Then 8 linear tasks, each with its
own matrix of rank 2 on 32 inputs, where the task can only be inferred from the input: LoRA must average them, experts
can separate them; with one matrix for all tasks nothing can be gained, and all models are trained on noisy examples.
Last, SmolLM2 learns four tasks on short phrases.

    python reproductions/smora.py            # about an hour on one core; an interrupted run resumes
    python reproductions/smora.py --quick    # a smaller Llama at one rate, and two arms of the linear tasks
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, encode, from_scratch, llama, nats_by_sample, prose, taught_once, whole
from torch import Tensor, nn
from torch.nn.functional import linear

import lamella
from lamella.evaluate import Ratio
from lamella.methods.smora import LoadBalance, RankExperts, TaskExamples, Usage, trains, with_prompts
from lamella.methods.smora.baselines import HydraLora, LoraMixture, MosLora
from lamella.plan import ModelReference, Plan, attach
from lamella.report.figures import Bars
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Sample, Task, TrainConfig, add_lora, collate, fit, linear_at, pairs
from lamella.zoo import open_tokenizer

R, K, ALPHA = 64, 8, 16.0
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
BLOCKS: dict[str, Arm] = {
    f"SMoRA 64/8, blocks of {p}": ranks(p) for p in (4, 2)
}  # of 8 there would be one, without a choice
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


def left(arm: str, conflict: bool, steps: int, seed: int, lr: float) -> list[float]:
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


def validated_left(arm: str, conflict: bool, steps: int, lr: float) -> float:
    return left(arm, conflict, steps, 0, lr)[0]


def maps(run: Run) -> None:
    steps = 1200 if run.quick else 3000
    seeds = range(1, 2 if run.quick else 6)
    arms = [HIGH, OURS] if run.quick else [*ARMS, *MORE]

    def over_seeds(names: Sequence[str], conflict: bool) -> dict[str, tuple[float, list[float]]]:
        """Return the best learning rate of each arm, chosen on a seed of its own, and the errors of all others."""
        which = "conflict" if conflict else "one matrix"
        rates = dict.fromkeys(names, 3e-3)
        if not run.quick:
            sweep = {f"{name}, {which}": partial(validated_left, name, conflict, steps) for name in names}
            rates = {name: each.value for name, each in zip(names, tuned(run, sweep, RATES).values(), strict=True)}
        return {
            name: (lr, [run.arm(f"{name}, {which}, seed {seed}", left, name, conflict, steps, seed, lr)[1]
                        for seed in seeds]) for name, lr in rates.items()
        }  # fmt: skip

    apart = over_seeds(arms, True)
    run.table(
        f"{TASKS} tasks, each with a matrix of rank 2, {steps} steps: remaining fraction of the squared error",
        ["", "rate", "mean over seeds", "lowest", "highest"],
        [[name, lr, fmean(each), min(each), max(each)] for name, (lr, each) in apart.items()],
    )

    def ratio(errors: Mapping[str, tuple[float, list[float]]], other: str) -> Measured:
        pairs_ = zip(errors[OURS][1], errors[other][1], strict=True)
        return Measured.over_seeds([float(np.log(ours / theirs)) for ours, theirs in pairs_]).exp()

    against = ratio(apart, HIGH)
    run.further("conflict: SMoRA's error relative to LoRA-64", "at most a fifth", against, against.at_most(0.2))
    for other in (name for name in (TOP_1, TOP_2, *MORE) if name in apart):
        against = ratio(apart, other)
        run.further(f"conflict: SMoRA's error relative to {other}", "at most 1", against, against.at_most(1.0))
    same = over_seeds((HIGH, OURS), False)
    run.table(
        f"One matrix for all tasks, trained with noise of {NOISE:g} on each target; errors without noise",
        ["", "rate", "mean over seeds"],
        [[name, lr, fmean(each)] for name, (lr, each) in same.items()],
    )
    against = ratio(same, HIGH)
    run.further("no conflict: SMoRA's error relative to LoRA-64", "at least 1", against, against.at_least(1.0))


# A nano Llama


WIDTH, LAYERS, BATCH = 208, 4, 16
VOWELS, ALPHABET = "aeiou", "abcdefghijklmnopqrstuvwxyz"
COPIED = 0.9  # fraction of strings that the frozen Llama must copy
FEW = 4  # seeds of arms without a part in the main claim
STRINGS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "mirror": lambda text: text[::-1],  # the same task under another name
    "rotate": lambda text: text[1:] + text[0],
    "upper": str.upper,
    "sort": lambda text: "".join(sorted(text)),
    "vowels": lambda text: str(sum(letter in VOWELS for letter in text)),
}
TWINS = ("reverse", "mirror")


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
        answers = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right += int(((answers == labels) | (labels < 0)).all(1).sum())
    return right / len(samples)


def copies(count: int, seed: int) -> list[Sample]:
    """Return strings to copy: none of the tasks, but a skill that all of them except counting need."""
    drawn = random.Random(seed)
    texts = ["".join(drawn.choices(ALPHABET, k=drawn.randint(4, 24))) for _ in range(count)]
    return pairs((encode(f"\ncopy {text}\n"), encode(f"{text}\n")) for text in texts)


def speller(steps: int) -> Stack:
    """Return the Llama trained on documentation and on copying strings, in place of pre-training; cached.

    Trained on documentation alone, it learnt only to count vowels, with any adapter; a width of 128 learnt no copying.
    """
    half = BATCH * steps // 2

    def samples() -> list[Sample]:
        return whole(prose("calibration", half, 64, 0, TEXTS)) + copies(half, 0)

    config = from_scratch(steps, lr=1e-3, batch=BATCH, betas=(0.9, 0.98), seed=0, bf16=True)
    return taught_once(f"smora-{LAYERS}x{WIDTH}-{steps}", llama(len(LETTERS), WIDTH, LAYERS), samples, config)


def adapted(arm: str, seed: int, sizes: tuple[int, int], lr: float, u: float = U) -> tuple[Any, dict[str, Any]]:
    """Return the view of the Llama trained with an arm, and its experts; sizes are the steps of both trainings."""
    first, steps = sizes
    view = share(speller(first).model)
    made = (ARMS | BLOCKS)[arm](view, linear_at(view), seed)
    config = TrainConfig(steps=steps, lr=lr, batch=BATCH, warmup=0.1, seed=seed, save_every=steps, log_every=steps)
    learn(view, mixed(strings(BATCH * steps // len(STRINGS) + 1, 100 + seed)), LoadBalance(made, u), config)
    return view, made


def validated(arm: str, sizes: tuple[int, int], lr: float) -> float:
    """Return the loss on the answers to validation strings, the mean over tasks, in nats per character."""
    return fmean(nats_by_sample(adapted(arm, 0, sizes, lr)[0], mixed(strings(60, 1))))


def tested(arm: str, sizes: tuple[int, int], lr: float, seed: int, u: float = U) -> dict[str, Any]:
    """Return the loss on the answer to each test string, task by task, exact answers, and the routing."""
    view, made = adapted(arm, seed, sizes, lr, u)
    judged = strings(200, 2)
    found: dict[str, Any] = {
        "losses": nats_by_sample(view, mixed(judged)),
        "exact": {task: exact(view, samples) for task, samples in judged.items()},
    }
    if made:
        selected = {task: samples[:100] for task, samples in judged.items()}
        answers = Usage.of(view, made, selected, answers=True)  # prompts are random letters, in all tasks alike
        load = Usage.of(view, made, selected).load()  # the load of all tokens, on which the balance acts
        found |= {
            "alike": answers.similarity().tolist(),
            "spread": fmean(spread for spread, _ in load),
            "dead": sum(dead for _, dead in load),
        }
    return found


def nano(run: Run) -> None:
    sizes = (80, 40) if run.quick else (1800, 300)
    if not run.quick:
        copied = run.arm("copies", lambda: exact(speller(sizes[0]).model, copies(200, 1)))
        run.premise("fraction of strings that the frozen Llama copies", f"at least {COPIED}", copied, copied >= COPIED)
    names = [LOW, TOP_1, OURS] if run.quick else [*ARMS, *BLOCKS]
    rates = dict.fromkeys(names, 3e-3)
    if not run.quick:
        sweep = {name: partial(validated, name, sizes) for name in names}
        rates = {name: each.value for name, each in tuned(run, sweep, RATES).items()}

    def found(name: str, seed: int, u: float = U) -> dict[str, Any]:
        title = f"{name}, seed {seed}" + ("" if u == U else f", u={u:g}")
        made: dict[str, Any] = run.arm(title, tested, name, sizes, rates[name], seed, u)
        return made

    def losses(name: str, seeds: Sequence[int]) -> Any:  # [seeds, strings]
        return np.array([found(name, seed)["losses"] for seed in seeds])

    seeds = [1] if run.quick else list(range(1, 9))  # three seeds of an earlier version could not decide
    main_arms = (LOW, TOP_1, OURS)
    used = {name: seeds if name in main_arms else seeds[:FEW] for name in names}
    run.freeze(
        "mean over seeds and strings of the other arm's loss on answers less SMoRA's", seeds,
        steps=sizes, batch=BATCH, width=WIDTH, layers=LAYERS, r=R, k=K, alpha=ALPHA, rates=rates,
    )  # fmt: skip
    runs = {name: [found(name, seed) for seed in used[name]] for name in names}
    by = {name: losses(name, used[name]) for name in names}
    tasks = list(STRINGS)
    of_tasks = {name: by[name].mean(0).reshape(len(tasks), -1).mean(1).tolist() for name in names}

    def row(name: str) -> list[Any]:
        means = by[name].mean(1)
        right = 100 * fmean(fmean(each["exact"].values()) for each in runs[name])
        return [name, rates[name], len(used[name]), means.mean(), means.min(), means.max(), *of_tasks[name], right]

    run.table(
        f"A Llama of width {WIDTH}, {LAYERS} layers, {sizes[1]} steps of {BATCH}: nats per character of the answers to "
        "held-out strings",
        ["", "rate", "seeds", "mean", "lowest", "highest", *tasks, "exact answers, %"],
        [row(name) for name in names],
    )
    run.figure("smora-tasks", Bars("task", "nats per character of the answers", of_tasks, tuple(tasks)))

    def above(name: str, ours: str = OURS) -> Measured:
        count = min(len(by[name]), len(by[ours]))
        return Measured.over_seeds_and_items(by[name][:count] - by[ours][:count])

    gain = above(LOW)
    run.main(f"{LOW}: loss on answers less SMoRA's", "above 0", gain, gain.at_least(0))
    gain = above(TOP_1)
    run.main(f"{TOP_1}: loss on answers less SMoRA's", "at least 0", gain, gain.at_least(0))
    right = {name: [100 * fmean(each["exact"].values()) for each in runs[name]] for name in (LOW, OURS)}
    points = Measured.over_seeds([ours - theirs for ours, theirs in zip(right[OURS], right[LOW], strict=True)])
    run.further(f"SMoRA's exact answers less those of {LOW}, in %", "at least 5 points", points, points.at_least(5))
    if run.quick:
        return
    for name in (TOP_2, HIGH):
        gain = above(name)
        run.further(f"{name}: loss on answers less SMoRA's", "above 0", gain, gain.at_least(0))
    for coarse, fine in pairwise([*BLOCKS, OURS]):
        gain = above(coarse, fine)
        run.further(f"{coarse}: loss on answers less that of {fine}", "at least 0", gain, gain.at_least(0))
    routing(run, runs[OURS])

    loads = {u: [found(OURS, seed, u) for seed in seeds[:FEW]] for u in (0.0, U, 1e-3)}
    run.table(
        f"The balance, means over {FEW} seeds",
        ["u", "variation of the load of ranks, mean over layers", "unused ranks", "loss on answers"],
        [[u, fmean(each["spread"] for each in made), fmean(each["dead"] for each in made),
          fmean(fmean(each["losses"]) for each in made)] for u, made in loads.items()],
    )  # fmt: skip
    evener = Measured.over_seeds(
        [without["spread"] - even["spread"] for without, even in zip(loads[0.0], loads[1e-3], strict=True)]
    )
    run.further("variation of the load without the balance less that at u = 1e-3", "above 0", evener,
                evener.at_least(0))  # fmt: skip


def routing(run: Run, found: Sequence[Mapping[str, Any]]) -> None:
    """Compare which ranks the tasks select: one task under two names against different tasks."""
    tasks = list(STRINGS)
    alike = np.array([each["alike"] for each in found])  # [seeds, tasks, tasks]
    rows = [[one, *alike.mean(0)[index].tolist()] for index, one in enumerate(tasks)]
    run.table("Similarity of the ranks that two tasks select, as a cosine over all linear layers", ["", *tasks], rows)
    one, other = (tasks.index(task) for task in TWINS)
    others = [(a, b) for a in range(len(tasks)) for b in range(a) if {a, b} != {one, other}]
    apart = Measured.over_seeds([each[one][other] - fmean(each[a][b] for a, b in others) for each in alike])
    run.further("cosine of one task under two names less that of different tasks", "above 0", apart, apart.at_least(0))


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


def small_model(name: str, seed: int, steps: int, lr: float) -> dict[str, list[list[float]]]:
    """Return the losses of each task's answers, on validation and on test examples."""
    stack, data = lamella.open("smollm2"), phrases("calibration", 100, seed)
    config = TrainConfig(steps=steps, lr=lr, batch=2, warmup=0.1, seed=seed, save_every=steps, log_every=steps)
    view = apply(stack, Plan(model=ModelReference.of(stack)))
    made = ARMS[name](view, linear_at(view), seed)
    learn(view, [with_prompts(each) for each in data], LoadBalance(made, U), config)
    chosen_on, judged_on = (phrases("test", 25, each).by_task() for each in (101, 102))
    return {task: [nats_by_sample(view, each, 8) for each in (chosen_on[task], judged_on[task])] for task in PHRASES}


def validated_small(name: str, steps: int, lr: float) -> float:
    return fmean(fmean(validation) for validation, _ in small_model(name, 0, steps, lr).values())


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
    steps = 60
    names = (HIGH, OURS)
    sweep = {f"SmolLM2, {name}": partial(validated_small, name, steps) for name in names}
    rates = [each.value for each in tuned(run, sweep, (3e-4, 1e-3, 3e-3)).values()]
    found = {
        name: run.arm(f"SmolLM2, {name}, test", small_model, name, 1, steps, lr)
        for name, lr in zip(names, rates, strict=True)
    }
    losses = {name: np.array([each[task][1] for task in PHRASES]) for name, each in found.items()}  # [tasks, examples]
    run.table(
        f"SmolLM2, {steps} steps of 2 examples, loss on prompts and answers: held-out nats per token of answers",
        ["", "rate", "mean", *PHRASES],
        [[name, lr, each.mean(), *each.mean(1)] for (name, each), lr in zip(losses.items(), rates, strict=True)],
    )
    gain = Measured.over_seeds_and_items((losses[HIGH] - losses[OURS]).reshape(1, -1))
    run.further("LoRA-64: loss on answers less SMoRA's, SmolLM2", "above 0", gain, gain.at_least(0))
    measured = Measured.over_rounds(Ratio.of(run.arm("SmolLM2, a step", step_ratio, 7)))
    run.further("time per step of SMoRA relative to LoRA-64, SmolLM2", "at most 1.8", measured, measured.at_most(1.8))


def experiment(run: Run) -> None:
    run.data = f"six string tasks beside a Llama of pydoc and stdlib; matrices of {SIZE} x {SIZE}" + (
        "" if run.quick else "; phrases of pydoc for SmolLM2"
    )
    nano(run)
    maps(run)
    if not run.quick:
        smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a short Llama and two arms of the matrices, one seed at one rate"))
