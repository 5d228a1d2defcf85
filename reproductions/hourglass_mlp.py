"""Hourglass MLP at small scale: digits, rendered scenes, frozen lifts, and feed-forward sublayers of trained models.

On scikit-learn's digits an Hourglass of 19 thousand parameters is compared with conventional networks of equal size,
with and without their two square matrices, and with ablations: a skip connection as narrow as the input, one that is
narrower, a frozen lift, no skip connections. All three tasks are reported, including those on which the shape loses. On
scenes of 16 x 16 pixels all families have a Pareto frontier, and frozen lifts of three widths are compared with trained
ones. Then the least important feed-forward sublayers of a nano Llama are replaced by sub-blocks of half the size,
fitted and healed; and one of SmolLM2's by four sub-blocks of the same total size, or by nothing. Every shape is trained
at two learning rates, of which the better one is chosen on held-out rows.

    python reproductions/hourglass_mlp.py            # about two hours on one core; an interrupted run resumes
    python reproductions/hourglass_mlp.py --quick    # digits, one task and one seed
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import nats, prose, trained, whole
from torch import nn

import lamella
from lamella.data import windows
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.methods.hourglass_mlp import HourglassMLP, Vectors, heal, hourglass_mlp, sensitivity
from lamella.methods.hourglass_mlp.baselines import PlainMLP
from lamella.methods.hourglass_mlp.frontier import TRAINING, train_and_measure
from lamella.methods.hourglass_mlp.method import FITTING
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks, supervised
from lamella.train.fit import fit
from lamella.zoo import open_tokenizer

SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3)
Make = Callable[[int], nn.Module]  # from a seed


def mlp(d_x: int, d_y: int, d_z: int, d_h: int, count: int, lift: str = "trained", readout: bool = True) -> Make:
    """Return a function that builds such a network from a seed."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return HourglassMLP(d_x, d_y, d_z, (d_h,) * count, lift=lift, readout=readout, seed=seed)  # type: ignore[arg-type]

    return make


def plain(seed: int) -> nn.Module:
    """Return the Hourglass of digits without its skip connections."""
    torch.manual_seed(seed)
    return PlainMLP(64, 64, 66, (10,) * 8)


def parameters(make: Make) -> tuple[int, int]:
    network: Any = make(0)
    return network.size.total, network.size.trainable


def score(run: Run, what: str, task: Vectors, make: Make, epochs: int, batch: int = 64) -> list[float]:
    """Return the test PSNR of every seed, at the learning rate that is best on held-out rows."""

    def found(lr: float, seed: int) -> list[float]:
        steps = epochs * len(task.train) // batch
        config = replace(TRAINING, steps=steps, lr=lr, seed=seed, batch=batch, eval_every=max(1, steps // 20))
        with tempfile.TemporaryDirectory() as work:
            return train_and_measure(task, make(seed), config, Path(work))

    seeds = SEEDS[:1] if run.quick else SEEDS
    by_rate = {lr: [run.arm(f"{what}, {lr:g}, seed {seed}", found, lr, seed) for seed in seeds] for lr in RATES}
    best = max(by_rate, key=lambda lr: fmean(held for held, _ in by_rate[lr]))
    return [test for _, test in by_rate[best]]


def rows(scores: Mapping[str, Sequence[float]], made: Mapping[str, Make]) -> list[list[Any]]:
    return [[name, *parameters(made[name]), fmean(each), min(each), max(each)] for name, each in scores.items()]


COLUMNS = ["", "parameters", "trainable", "test PSNR, dB", "lowest", "highest"]


# Digits


def digits(run: Run) -> None:
    epochs = 40
    square: dict[str, Make] = {  # d_x = d_y = 64, around 19 thousand parameters
        "Hourglass 66 x 10 x 8": mlp(64, 64, 66, 10, 8),
        "lean 64 x 148 x 1": mlp(64, 64, 64, 148, 1, "none", False),
        "lean 64 x 74 x 2": mlp(64, 64, 64, 74, 2, "none", False),
        "conventional 64 x 84 x 1": mlp(64, 64, 64, 84, 1),
    }
    controls: dict[str, Make] = {
        "as narrow as the input, 64 x 10 x 8": mlp(64, 64, 64, 10, 8),
        "narrower, 48 x 16 x 8": mlp(64, 64, 48, 16, 8),
        "frozen lift, 128 x 10 x 4": mlp(64, 64, 128, 10, 4, "frozen"),
        "conventional, frozen lift, 64 x 84 x 1": mlp(64, 64, 64, 84, 1, "frozen"),
        "no skips, 66 x 10 x 8": plain,
    }
    made = square if run.quick else square | controls
    for name in ("prototype",) if run.quick else ("prototype", "denoise"):
        task = Vectors.open(f"digits:{name}")
        scores = {each: score(run, f"digits, {name}, {each}", task, make, epochs) for each, make in made.items()}
        run.table(f"Digits, {name}: {epochs} epochs, the better of two rates", COLUMNS, rows(scores, made))
        if name == "prototype":
            judge(run, scores, square)
    if not run.quick:
        upscaled = {
            "Hourglass 66 x 16 x 8": mlp(16, 64, 66, 16, 8),
            "Hourglass 128 x 16 x 4": mlp(16, 64, 128, 16, 4),
            "conventional 16 x 512 x 1": mlp(16, 64, 16, 512, 1),
            "conventional 16 x 256 x 2": mlp(16, 64, 16, 256, 2),
        }
        task = Vectors.open("digits:upscale")
        scores = {each: score(run, f"digits, upscale, {each}", task, make, epochs) for each, make in upscaled.items()}
        run.table(f"Digits, upscale: {epochs} epochs, the better of two rates", COLUMNS, rows(scores, upscaled))


def judge(run: Run, scores: Mapping[str, Sequence[float]], square: Mapping[str, Make]) -> None:
    """Check the one claim on digits: generative classification near 20 thousand parameters."""
    sizes = [parameters(make)[0] for make in square.values()]
    apart = max(sizes) / min(sizes) - 1
    run.exact("parameters of the networks that are compared", "within 10 %", f"{100 * apart:.1f} %", apart <= 0.1)
    ours = scores["Hourglass 66 x 10 x 8"]
    for family in ("lean", "conventional"):
        best = max((name for name in square if name.startswith(family)), key=lambda name: fmean(scores[name]))
        gain = Measured.over_seeds([a - b for a, b in zip(ours, scores[best], strict=True)])
        run.main(f"digits to prototypes: Hourglass minus {best}", "at least 1.5 dB", str(gain), gain.at_least(1.5))


# Scenes


def scenes(run: Run) -> None:
    """Report the frontiers at d_x = 256, and the cost of a frozen lift by its width."""
    epochs, pictures = 6, 20_000
    shapes = {
        "Hourglass": [(258, 40, 4), (384, 40, 4), (384, 90, 4)],
        "frozen": [(258, 40, 4), (384, 90, 4), (512, 90, 4)],
        "conventional": [(256, 270, 1), (256, 540, 1), (256, 540, 2)],
        "lean": [(256, 272, 1), (256, 545, 1), (256, 545, 2)],
    }
    how = {
        "Hourglass": ("trained", True),
        "frozen": ("frozen", True),
        "conventional": ("trained", True),
        "lean": ("none", False),
    }
    for name in ("denoise", "upscale"):
        task = Vectors.open(f"scenes:{name}", rows=pictures)
        d_x, made = task.d_in, {}
        for family, sizes in shapes.items():
            if family == "lean" and d_x != 256:
                continue
            for d_z, d_h, count in sizes:
                width = d_x if family == "conventional" else d_z
                lift, readout = how[family]
                made[f"{family} {width} x {d_h} x {count}"] = mlp(d_x, 256, width, d_h, count, lift, readout)
        scores = {each: score(run, f"scenes, {name}, {each}", task, make, epochs, 128) for each, make in made.items()}
        run.table(f"Scenes of 16 x 16, {name}: {epochs} epochs", COLUMNS, rows(scores, made))
        if name == "denoise":
            lines: dict[str, list[tuple[float, float]]] = {}
            for each, found in scores.items():
                lines.setdefault(each.split()[0], []).append((parameters(made[each])[0] / 1000, fmean(found)))
            drawn = Scatter("parameters, thousands", "PSNR on test rows, dB", lines, joined=True)
            run.figure("hourglass-frontier", drawn)


def lifts(run: Run) -> None:
    epochs, widths = 6, (256, 384, 768)
    task = Vectors.open("scenes:denoise", rows=20_000)
    made = {
        f"{lift} lift, d_z = {d_z}": mlp(256, 256, d_z, 40, 4, lift) for lift in ("trained", "frozen") for d_z in widths
    }
    scores = {each: score(run, f"lifts, {each}", task, make, epochs, 128) for each, make in made.items()}
    run.table(f"Trained and frozen lifts, scenes of 16 x 16, denoise: {epochs} epochs", COLUMNS, rows(scores, made))
    frozen = [scores[f"frozen lift, d_z = {d_z}"] for d_z in widths]
    gaps = [[a - b for a, b in zip(scores[f"trained lift, d_z = {d_z}"], cold, strict=True)]
            for d_z, cold in zip(widths, frozen, strict=True)]  # fmt: skip
    grows = Measured.over_seeds([wide - narrow for narrow, wide in zip(frozen[0], frozen[-1], strict=True)])
    shrinks = Measured.over_seeds([narrow - wide for narrow, wide in zip(gaps[0], gaps[-1], strict=True)])
    run.further(
        "frozen lift: three times as wide minus as wide as the input", "above 0 dB", str(grows), grows.at_least(0)
    )
    run.further(
        "gap to a trained lift: as wide as the input minus three times", "above 0 dB", str(shrinks), shrinks.at_least(0)
    )


# A nano Llama

LAYERS, TIME = 6, 96  # layers of a model of 2 million parameters, and characters per sample


def surgery(run: Run) -> None:
    """Replace the least important feed-forward sublayers at half of the parameters, and heal all variants alike."""
    texts = whole(prose("calibration", 2000, TIME, 0, ("pydoc", "stdlib")))
    told_on = whole(prose("test", 200, TIME, 1, ("pydoc", "stdlib")))
    fit_on = torch.stack([each["input_ids"] for each in texts[:530]])  # 51 thousand tokens
    seeds, cut = SEEDS, 2

    def healed(way: str, seed: int) -> list[float]:
        stack = trained(
            texts, layers=LAYERS, hidden=160, steps=1500, seed=seed, name="hourglass", batch=8, heads=5, kv_heads=5
        )
        with tempfile.TemporaryDirectory() as work:
            plan = rewritten(stack, way, fit_on, cut, seed, Path(work) / "fitted")
            before = nats(apply(stack, plan), told_on)
            config = TrainConfig(steps=150, lr=5e-4, batch=8, seed=seed, save_every=150)
            done = heal(stack, plan, texts, config=config, work=Work(Path(work) / "healed"))  # type: ignore[arg-type]
            return [nats(stack.model, told_on), before, nats(apply(done.stack, done.plan), told_on)]

    ways = ["4 sub-blocks", "2 sub-blocks", "one narrow network, fitted", "one narrow network, cut", "nothing"]
    found = {way: [run.arm(f"nano, {way}, seed {seed}", healed, way, seed) for seed in seeds] for way in ways}
    run.table(
        f"{cut} feed-forward sublayers of {LAYERS} at half their parameters, 150 steps of healing: nats per character",
        ["in their place", "original", "before healing", "after healing"],
        [[way, *(fmean(column) for column in zip(*each, strict=True))] for way, each in found.items()],
    )
    for other in ways[2:]:
        apart = Measured.over_seeds(
            [theirs[2] - ours[2] for theirs, ours in zip(found[other], found["4 sub-blocks"], strict=True)]
        )
        run.further(f"after healing: {other} minus 4 sub-blocks", "above 0 nats", str(apart), apart.at_least(0))


def rewritten(stack: Stack, way: str, tokens: Any, count: int, seed: int, work: Path) -> Plan:
    """Return the plan of one variant, at the least important sublayers."""
    missed = sensitivity(stack, tokens[:16])
    layers = tuple(sorted(each.layer for each in sorted(missed, key=lambda position: missed[position])[:count]))
    if way == "nothing":
        return Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}.mlp" for layer in layers])
    if way == "one narrow network, cut":
        width = {f"layers.{layer}.mlp.channels": largest(stack, layer, 0.5) for layer in layers}
        return Plan(model=ModelReference.of(stack), width=width)
    into = {"4 sub-blocks": 4, "2 sub-blocks": 2, "one narrow network, fitted": 1}[way]
    config = replace(FITTING, steps=1000, seed=seed, eval_every=250, save_every=1000)
    return hourglass_mlp(stack, tokens, layers=layers, blocks=into, share=0.5, config=config, work=Work(work)).plan


def largest(stack: Stack, layer: int, share: float) -> list[int]:
    """Return the channels of a feed-forward network whose weights have the largest product of norms."""
    mlp = stack.layers[layer].mlp
    size = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1)
    return sorted(size.topk(round(share * len(size))).indices.tolist())


# SmolLM2


def smollm2(run: Run) -> None:
    """Replace one sublayer of 2.65 million parameters by four sub-blocks of equal total size, fitted to 200k tokens."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    site, work = "layers.15.mlp", run.work / "smollm2"
    tokens = windows(tokenizer, lamella.load_text("general", "calibration"), 782, 256, run.seed)
    config = TrainConfig(steps=40, lr=1e-4, warmup=0.1, batch=2, seed=run.seed, save_every=20)

    def found(way: str) -> dict[str, Any]:
        judged = FidelityTest(stack, windows(tokenizer, lamella.load_text("pydoc", "test"), 8, 256, run.seed))
        plan, sublayer = Plan(model=ModelReference.of(stack), drop=[site]), None
        if way == "4 sub-blocks":
            fitting = replace(FITTING, seed=run.seed)
            done = hourglass_mlp(stack, tokens, layers=(15,), blocks=4, config=fitting, work=Work(work / "fitted"))
            plan, sublayer = done.plan, done.findings["sublayers"][0]
        before = judged.of(apply(stack, plan)).as_dict()
        samples: Any = blocks(tokens, loss_on="all")
        healed = heal(stack, plan, samples, config=config, work=Work(work / way.replace(" ", "-")))
        return {"sublayer": sublayer, "fitted": before, "healed": judged.of(apply(healed.stack, healed.plan)).as_dict()}

    each = {way: run.arm(f"SmolLM2, {way}", found, way) for way in ("4 sub-blocks", "nothing")}
    sublayer = each["4 sub-blocks"]["sublayer"]
    before = each["nothing"]["fitted"]["base_perplexity"]["mean"]
    lines: list[list[Any]] = [["the original", sublayer["before"], before, 0.0, None, None]]
    for way, parameters in (("4 sub-blocks", sublayer["parameters"]), ("nothing", 0)):
        figures = [each[way][when][what]["mean"] for when in ("fitted", "healed") for what in ("perplexity", "kl")]
        lines.append([way, parameters, *figures])
    run.table(
        f"SmolLM2-135M, the feed-forward sublayer of layer 15 by {len(sublayer['inner'])} sub-blocks of inner width "
        f"{sublayer['inner'][0]}; {config.steps} steps of healing",
        ["in its place", "parameters", "perplexity, fitted", "KL, fitted", "perplexity, healed", "KL, healed"],
        lines,
    )
    explained = sublayer["explained"]["held_out"]
    run.further("R^2 of the sub-blocks on held-out tokens", "above 0", f"{explained:.3f}", explained > 0)
    ours, theirs = (each[way]["healed"]["kl"]["mean"] for way in ("4 sub-blocks", "nothing"))
    run.further("after healing: KL of 4 sub-blocks", f"below {theirs:.3f}, of nothing", f"{ours:.3f}", ours < theirs)


# Exactness


def exactness(record: Record) -> None:
    torch.manual_seed(0)
    network = HourglassMLP(64, 64, 80, (12, 12))
    count = sum(each.numel() for each in network.parameters())
    formula = 80 * 64 + 80 * 64 + 2 * 80 * 24
    record.exact("parameters", "d_z d_x + d_z d_y + 2 d_z sum d_h", f"{count} / {formula}", count == formula)
    x = torch.rand(32, 64)
    bare = nn.Sequential(network.lift, network.readout, nn.Sigmoid())
    for block in network.blocks:
        nn.init.zeros_(block.w2.weight)  # type: ignore[union-attr, arg-type]
    equal = bool(torch.equal(network(x), bare(x)))
    record.exact("blocks whose second linear layer is zero", "the identity, bitwise", str(equal), equal)
    lean = HourglassMLP(64, 64, 64, (), lift="none", readout=False)
    equal = bool(torch.equal(lean(x), torch.sigmoid(x)))
    record.exact("no blocks and no linear layers", "sigmoid(x), bitwise", str(equal), equal)
    frozen = HourglassMLP(64, 64, 80, (12, 12), lift="frozen", seed=5)
    before = frozen.lift.weight.clone()  # type: ignore[union-attr, operator]
    task = Vectors.open("digits:prototype")
    with tempfile.TemporaryDirectory() as work:
        config = TrainConfig(steps=20, lr=1e-2, batch=64, weight_decay=0.1)
        fit(frozen, task.train, supervised(), config, out=work)
        [state] = Path(work).glob("checkpoint-*/optimizer.pt")
        shapes = [tuple(each["exp_avg"].shape) for each in torch.load(state, weights_only=True)["state"].values()]
    equal = bool(torch.equal(frozen.lift.weight, before)) and (80, 64) not in shapes  # type: ignore[arg-type]
    record.exact("a frozen lift after training", "the same bits, no optimizer state", str(equal), equal)
    again = HourglassMLP(64, 64, 80, (12, 12), lift="frozen", seed=0)
    again.load_state_dict(frozen.state_dict())
    equal = bool(torch.equal(again.lift.weight, before))  # type: ignore[arg-type]
    record.exact("a frozen lift from its seed", "the same bits", str(equal), equal)


def experiment(run: Run) -> None:
    run.data = "scikit-learn's digits, 1100 to train, 200 to choose on, 497 to judge" + (
        "" if run.quick else "; 20 thousand rendered scenes of 16 x 16; pydoc and stdlib; general and pydoc for SmolLM2"
    )
    run.part("exactness", exactness)
    digits(run)
    if not run.quick:
        scenes(run)
        lifts(run)
        surgery(run)
        smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="digits to prototypes alone, one seed"))
