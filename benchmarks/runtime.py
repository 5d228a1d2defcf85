"""The decode speed-up of plans relative to the possible one, on SmolLM2.

The cost model measures the time of one attention, one MLP and the rest of a decoding step of the whole model, so the
head and the loop, which no plan removes, are included. For plans that remove sublayers, the ratio of bytes read per
token is also shown, which would be the speed-up of a purely memory-bound model. For methods that take decisions at run
time, the share of executed layers is counted in the timed steps, and the cost model gives the speed-up for that share.
In a batch a sublayer is saved only if no row needs it, so batch 8 is shown without a claim. Models that predict masked
tokens are timed with random weights of SmolLM2's width, a step being a pass over prompt and answer; likewise models
that read images or have experts, of which a prompt is timed, and an encoder-decoder with early exits, of which a whole
request is timed.

    python benchmarks/runtime.py            # about 10 minutes on 2 cores
    python benchmarks/runtime.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lamella
from lamella.data import MARK, ImageText, ImageTextRow, InputContext, Processing
from lamella.evaluate import StepTimes, bench, cost, measure_step
from lamella.evaluate.speed import random_tokens
from lamella.methods.cola import repeat, skip
from lamella.methods.dmllm_token_redundancy import (
    LayerWidths,
    RequestLengths,
    VisualTokenSchedule,
    of_step,
    plan_of,
    text_of,
)
from lamella.methods.first import PromptRouters
from lamella.methods.lora_drop import spread_layers
from lamella.methods.modes.policy import MODALITIES, ExpertSkipping
from lamella.methods.mue import OFF, ExitCosts, Exits, by_flops, by_layers, exit_plan
from lamella.methods.unified_skip import balanced
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.results import Record
from lamella.runtime import Denoising, Sampler, traced, untraced, with_policy
from lamella.stack import Stack, open_model
from lamella.stack.diffusion import LLaDAConfig, LLaDAForMaskedLM
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm

PROMPT = 128
STEPS = 24
WIDTH = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def plans(stack: Stack) -> dict[str, Plan]:
    """Return the plans to time; which layers they remove does not matter for speed."""
    model = ModelReference.of(stack)
    layers = len(stack)

    def without(sites: list[str]) -> Plan:
        return Plan(model=model, drop=sites)

    def inner(count: int) -> list[int]:
        return [layer for layer in range(layers) if layer not in balanced(layers, layers - count)]

    decode = balanced(layers, layers - 10)
    return {
        "nothing removed": without([]),
        "5 layers": without([f"layers.{layer}" for layer in inner(5)]),
        "10 layers": without([f"layers.{layer}" for layer in inner(10)]),
        "15 layers": without([f"layers.{layer}" for layer in inner(15)]),
        "10 attention sublayers": without([f"layers.{layer}.attn" for layer in inner(10)]),
        "10 MLP sublayers": without([f"layers.{layer}.mlp" for layer in inner(10)]),
        "first attention and 9 more": without([f"layers.{layer}.attn" for layer in [0, *inner(9)]]),
        "15 attention, 10 MLP sublayers": without(
            [f"layers.{layer}.attn" for layer in inner(15)] + [f"layers.{layer}.mlp" for layer in inner(10)]
        ),
        "10 layers, while generating": Plan(
            model=model, path={"text": PhasedPath(prefill=list(range(layers)), decode=decode)}
        ),
    }


def measured_steps(stack: Stack, batch: int) -> StepTimes:
    """Return the median of three measurements of the parts of a step's time."""
    read = [measure_step(stack, batch, prompt=PROMPT, steps=STEPS) for _ in range(3)]
    return StepTimes(*(statistics.median(getattr(times, part) for times in read) for part in ("attn", "mlp", "rest")))


def static(record: Record, stack: Stack, rounds: int) -> None:
    """Time plans that are the same for every generated token."""
    chosen = plans(stack)
    views = {name: lamella.apply(stack, plan) for name, plan in chosen.items()}
    # The times of the cost model and of the plans are measured alternately, so that load changes affect both.
    before = measured_steps(stack, 1)
    timings = bench({"whole": stack.model} | views, prompt=PROMPT, tokens=STEPS, rounds=rounds)
    after = measured_steps(stack, 1)
    times = StepTimes(*(statistics.mean(getattr(t, part) for t in (before, after)) for part in ("attn", "mlp", "rest")))

    share = times.rest / times.step(None, len(stack))
    record.table(
        "One decoding step of the whole model, milliseconds",
        ["attention sublayer", "MLP sublayer", "rest", "share of the rest"],
        [[times.attn * 1e3, times.mlp * 1e3, times.rest * 1e3, f"{share:.0%}"]],
    )
    whole = cost(stack, context=PROMPT).bytes_per_token
    rows = []
    for name, plan in chosen.items():
        timing, allowed = timings[name][0], times.speedup(plan)
        measured = timing.decode_speedup
        traffic = whole / cost(stack, plan, context=PROMPT).bytes_per_token
        ratio = measured.median / allowed
        rows.append([name, len(plan.skipped), traffic, allowed, str(measured), ratio, f"{timing.variation:.1%}"])
        if plan.skipped:
            record.check(f"{name}: decode speed-up / cost model", "at least 0.95", ratio, ratio >= 0.95)
        else:
            overhead(record, "nothing removed", measured.median)
    columns = ["plan", "sublayers removed", "bytes ratio", "cost model", "decode speed-up", "measured / cost model"]
    record.table("Decode speed-up at batch 1", [*columns, "variation"], rows)


def overhead(record: Record, name: str, speedup: float) -> None:
    record.check(f"{name}: overhead", "at most 3 %", f"{1 / speedup - 1:+.1%}", speedup >= 0.97)


def deciding(stack: Stack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return views of every method that takes decisions at run time, and of the same methods with nothing to skip."""
    model, layers = ModelReference.of(stack), len(stack)
    everything = list(range(layers))
    tokens = lamella.windows(open_tokenizer("smollm2"), lamella.load_text("pydoc", "calibration"), 2, 256, 0)

    def path(prefill: list[int], decode: list[int]) -> Any:
        return lamella.apply(
            stack, Plan(model=model, path={stack.architecture.stack: PhasedPath(prefill=prefill, decode=decode)})
        )

    def policy(name: str, **params: Any) -> Any:
        return lamella.apply(stack, Plan(model=model, policies={"text": PolicyReference(name=name, params=params)}))

    def routed(kept: list[int]) -> Any:
        routers = PromptRouters(stack)
        routers.bias.copy_(torch.where(torch.isin(torch.arange(layers), torch.tensor(kept)), 50.0, -50.0))
        return with_policy(stack, Plan(model=model, policies={"text": PolicyReference(name="first")}), routers)

    saturated = {k: lamella.make_plan("ffn-skip", stack, tokens, max_skips=k)[-1] for k in (3, 7)}
    chain = list(repeat(skip(skip(tuple(everything), 18, 4), 8, 2), 5, 1))
    views = {
        "unified-skip, 24 of 30 layers": path(everything, balanced(layers, 24)),
        "void, 4 layers skipped": path(everything, [layer for layer in everything if layer not in (9, 12, 15, 18)]),
        "first, 24 layers kept": routed(balanced(layers, 24)),
        "lora-drop, p = 0.5, c = 4": policy("lora-drop", droppable=spread_layers(layers, 15)),
        "ffn-skip, k = 3": lamella.apply(stack, saturated[3]),
        "ffn-skip, k = 7": lamella.apply(stack, saturated[7]),
        "cola, 6 skipped and 1 repeated": path(chain, chain),
    }
    idle = {
        "first, every layer kept": routed(everything),
        "lora-drop, no droppable layer": policy("lora-drop", droppable=[]),
        "ffn-skip, never saturated": policy("ffn-skip", max_skips=3, threshold=0.999999),
    }
    return views, idle


def work_in_bench(view: Any, batch: int) -> list[tuple[float, float]]:
    """Return the share of tokens that ran each sublayer in the steps of :func:`bench`; its work for a static view."""
    if view.lamella_plan.is_static:
        return view.lamella_plan.work
    trace = traced(view)
    bench({"view": view}, [batch], prompt=PROMPT, tokens=STEPS, rounds=1)
    steady_after, since, ran = view.lamella_policy.steady_after, 0, []
    for executed, prompt in zip(trace.ran, trace.prompt, strict=True):
        since = 0 if prompt.any() else since + 1
        if since > steady_after:
            ran.append(executed.mean(axis=(0, 1)))
    untraced(view)
    return [(float(attn), float(mlp)) for attn, mlp in np.mean(ran, axis=0)]


def dynamic(record: Record, stack: Stack, rounds: int) -> None:
    """Time every method that runs less during generation, at batch sizes 1 and 8."""
    views, idle = deciding(stack)
    for batch in (1, 8):
        work = {name: work_in_bench(view, batch) for name, view in views.items()}
        before = measured_steps(stack, batch)
        timings = bench(
            {"whole": stack.model} | views | (idle if batch == 1 else {}),
            [batch], prompt=PROMPT, tokens=STEPS, rounds=rounds,
        )  # fmt: skip
        after = measured_steps(stack, batch)
        times = StepTimes(
            *(statistics.mean(getattr(t, part) for t in (before, after)) for part in ("attn", "mlp", "rest"))
        )
        rows = []
        for name, shares in work.items():
            allowed = times.step(None, len(stack)) / times.step_of(shares)
            measured = timings[name][0].decode_speedup
            skipped = 1 - sum(map(sum, shares)) / len(stack.positions)
            ratio = measured.median / allowed
            rows.append([name, f"{skipped:.1%}", allowed, str(measured), ratio])
            if batch == 1:
                record.check(f"{name}: decode speed-up / ideal", "at least 0.85", ratio, ratio >= 0.85)
        columns = ["method", "sublayers skipped", "ideal at that share", "decode speed-up", "measured / ideal"]
        record.table(f"Methods that run less while generating, batch {batch}", columns, rows)
        if batch == 1:
            for name in idle:
                overhead(record, name, timings[name][0].decode_speedup.median)


def denoising(record: Record, rounds: int) -> None:
    """Time a denoising step without k of L layers, expected to take 1 - k / L; embedding and head are small here."""
    config = LLaDAConfig(
        vocab_size=1024, d_model=576, n_heads=9, n_kv_heads=3, mlp_hidden_size=1536, n_layers=16, mask_token_id=1023
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = Stack(LLaDAForMaskedLM(config).eval(), name="LLaDA of SmolLM2's width")
    model, layers = ModelReference.of(stack), len(stack)
    views = {
        k: lamella.apply(stack, Plan(model=model, drop=[f"layers.{1 + layer * 14 // k}" for layer in range(k)]))
        for k in (2, 4, 6)
    }
    idle = lamella.apply(stack, Plan(model=model, drop=[]))
    timings = bench({"whole": stack.model, "idle": idle} | {f"{k}": view for k, view in views.items()},
                    prompt=2 * PROMPT - STEPS, tokens=STEPS, rounds=rounds)  # fmt: skip
    overhead(record, "dllm-skip, no layer skipped", timings["idle"][0].decode_speedup.median)
    rows = []
    for k in views:
        measured, expected = timings[f"{k}"][0].decode_speedup, 1 - k / layers
        took = 1 / measured.median / expected
        rows.append([f"{k} of {layers}", expected, 1 / measured.median, took])
        title = f"dllm-skip, {k} of {layers} layers: time of a step / (1 - k / L)"
        record.check(title, "0.9 to 1.1", took, 0.9 <= took <= 1.1)
    title = f"A denoising step over {2 * PROMPT} tokens, random weights of SmolLM2's width"
    record.table(title, ["layers skipped", "1 - k / L", "time relative to the whole model", "ratio"], rows)


def image_tokens(record: Record, rounds: int) -> None:
    """Time a denoising step of a model that reads images, with some tokens dropped, against the FLOPs of its layers."""
    made, processor = shapes_vlm("llava_llada", 0, 64, **WIDTH)
    model = open_model(made)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    messages = ({"role": "user", "content": f"{MARK} list the shapes."}, {"role": "assistant", "content": "circle"})
    inputs = Processing(processor).prompts([ImageTextRow((picture,), messages)])
    stack, sampler = text_of(model), Sampler(length=32, steps=4 * rounds)
    image = int((inputs["input_ids"] == made.config.image_token_id).sum())
    lengths = RequestLengths(image, inputs["input_ids"].shape[1] - image, sampler.length)
    schedules = {
        "a half": VisualTokenSchedule.one_shot(-1, 0.0, 0.5),
        "a quarter": VisualTokenSchedule.one_shot(-1, 0.0, 0.25),
        "dropped after layer 3": VisualTokenSchedule.withdraw(3),
    }
    whole = VisualTokenSchedule()
    views = {name: lamella.apply(model, plan_of(model, each, criterion="divprune")) for name, each in schedules.items()}
    models = {"whole": made, "idle": lamella.apply(model, plan_of(model, whole)), **views}
    requests = {name: Denoising(each, sampler=sampler, **inputs) for name, each in models.items()}
    took: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(sampler.in_all):
        for name, request in requests.items():  # alternately, so that load changes affect all of them
            began = time.perf_counter()
            request.advance()
            took[name].append(time.perf_counter() - began)
    times = {name: statistics.median(each[1:]) for name, each in took.items()}  # tokens are selected in the first step
    overhead(record, "dmllm-token-redundancy, no token dropped", times["whole"] / times["idle"])
    rows = []
    for name, schedule in schedules.items():
        flops = [
            of_step(each, LayerWidths.of(stack), len(stack), 1, sampler.in_all, lengths) for each in (schedule, whole)
        ]
        ideal, measured = flops[0] / flops[1], times[name] / times["whole"]
        ratio = measured / ideal
        rows.append([name, ideal, measured, ratio])
        record.check(
            f"image tokens, {name}: time of a step relative to its FLOPs", "0.8 to 1.2", ratio, 0.8 <= ratio <= 1.2
        )
    title = f"A denoising step with {image} image tokens, random weights of SmolLM2's width"
    record.table(
        title, ["image tokens", "FLOPs relative to the whole model", "time relative to the whole model", "ratio"], rows
    )


def prompts(
    record: Record, title: str, timed: dict[str, Any], shares: dict[str, float], prompt: Any, rounds: int
) -> None:
    """Compare the time of a prompt whose tokens skip some of the work with the time expected from the measured share.

    Args:
        timed: models by name: ``whole``, ``nothing skipped``, ``all skipped``, and those of ``shares``.
        shares: the executed share of the work that ``all skipped`` skips.
    """
    timings = bench(timed, prompt=prompt, tokens=1, rounds=3 * rounds)
    took = {name: statistics.median(each[0].prefill) for name, each in timings.items()}
    overhead(record, f"{title}, nothing skipped", timings["nothing skipped"][0].prefill_speedup.median)
    rows = []
    for name, share in shares.items():
        ideal = took["whole"] / (took["all skipped"] + share * (took["whole"] - took["all skipped"]))
        measured = timings[name][0].prefill_speedup
        rows.append([name, f"{1 - share:.1%}", ideal, str(measured), measured.median / ideal])
        check = f"{title}, {name}: prefill speed-up / ideal"
        record.check(check, "at least 0.85", measured.median / ideal, measured.median >= 0.85 * ideal)
    columns = ["", "work skipped", "ideal at that share", "prefill speed-up", "measured / ideal"]
    description = f"a prompt of {prompt:,} tokens" if isinstance(prompt, int) else "a prompt with an image"
    record.table(f"{title}: {description}, batch 1, random weights of SmolLM2's width", columns, rows)


def tokens_that_pass(record: Record, rounds: int) -> None:
    """Time a prompt with 256 image tokens, most of which skip every second layer."""
    made, processor = shapes_vlm("llava", 0, 64, num_hidden_layers=12, **WIDTH)
    stack = open_model(made).stacks["text"]
    processing = Processing(processor)
    reader = InputContext(lambda: processing.tokenizer, processing_opener=lambda: processing)
    rows = ImageText.open("shapes:colour", reader, rows=1, pixels=64)
    layers = list(range(1, len(stack), 2))
    model = ModelReference.of(stack)

    def view(prefill: float | list[float]) -> Any:
        params = {"layers": layers, "prefill": prefill, "decode": -1.0}
        return lamella.apply(
            stack, Plan(model=model, policies={"text": PolicyReference(name="gamma-mod", params=params)})
        )

    def ran(view: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the share of sublayers that each token ran in these layers [time], and p [time, layers]."""
        trace = traced(view)
        view(**rows.prompts(rows[:1]))
        untraced(view)
        return trace.ran[0][0][:, layers].mean((1, 2)), trace.notes[0]["p"][0][:, layers]

    _, p = ran(view(-1.0))
    some = {f"{skip:.0%} of the tokens": view([float(np.quantile(each, skip)) for each in p.T]) for skip in (0.5, 0.75)}
    shares = {name: float(ran(each)[0].mean()) for name, each in some.items()}
    gone = lamella.apply(stack, Plan(model=model, drop=[f"{stack.prefix}layers.{layer}" for layer in layers]))
    timed = {"whole": made, "nothing skipped": view(-1.0), "all skipped": gone} | some
    prompts(record, "gamma-mod", timed, shares, rows, rounds)


def experts(record: Record, rounds: int) -> None:
    """Time a prompt with tokens that skip low-weight experts, long enough to be dominated by experts."""
    size = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    of_experts = {"moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4}
    stack = Stack(nano("qwen3_moe", num_hidden_layers=4, vocab_size=1024, **size, **of_experts))
    alpha = dict.fromkeys(MODALITIES, [1.0] * len(stack))

    def view(tau: float) -> Any:
        policy = ExpertSkipping(stack, alpha=alpha, tau=dict.fromkeys(MODALITIES, tau))
        reference = PolicyReference(name="modes")
        return with_policy(stack, Plan(model=ModelReference.of(stack), policies={"text": reference}), policy)

    length = 1024  # 64 tokens per expert with three quarters skipped; fewer make matrix products inefficient
    tokens = random_tokens([stack.model], 1, length)
    whole = view(0.0)
    whole.lamella_policy.recorded_scores = heard = []
    whole(input_ids=tokens, use_cache=False)
    scores = torch.cat([each for each, _ in heard]).flatten()
    some = {f"{skip:.0%} of the pairs": view(float(scores.quantile(skip))) for skip in (0.5, 0.75)}
    shares = {}
    for name, each in some.items():
        each(input_ids=tokens, use_cache=False)
        chosen, left = each.lamella_policy.counts.sum((0, 1)).tolist()
        shares[name] = left / chosen
    timed = {"whole": stack.model, "nothing skipped": view(0.0), "all skipped": view(float("inf"))} | some
    prompts(record, "modes", timed, shares, length, rounds)


def exits(record: Record, rounds: int) -> None:
    """Time a request to an encoder-decoder that reads an image and writes four words, with an exit at 40 % of layers.

    The reference is the time of a model that has only the remaining layers.
    """
    sizes = {f"{side}_{name}": each for side in ("encoder", "decoder")
             for name, each in (("ffn_dim", 1536), ("attention_heads", 9))}  # fmt: skip
    made, processor = shapes_vlm("patch_bart", 0, 64, d_model=576, **sizes)
    model, words = open_model(made), 4
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    messages = (
        {"role": "user", "content": f"{MARK} describe the picture."},
        {"role": "assistant", "content": "circle"},
    )
    inputs = Processing(processor, encodes=True).prompts([ImageTextRow((picture,), messages)])
    left = {"no token exits": (OFF, 1, 1), "after layers 2 and 4": (-OFF, 2, 4), "after layers 6 and 3": (-OFF, 6, 3)}
    views, shorter = {}, {}
    for name, (tau, e, j) in left.items():
        gone = [f"{side}.layers.{layer}" for side, at in (("encoder", e), ("decoder", j)) for layer in range(at, 6)]
        if tau != OFF:
            shorter[f"{name}, cut"] = lamella.apply(model, Plan(model=ModelReference.of(model), drop=gone))
        params = {"encoder": {"image": tau, "text": tau, "min_layer": e}, "decoder": {"threshold": tau, "min_layer": j}}
        views[name] = lamella.apply(model, exit_plan(model, params))
    models = {"whole": made, **views, **shorter}
    took: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(4 * rounds + 1):
        for name, each in models.items():
            began = time.perf_counter()
            each.generate(**inputs, max_new_tokens=words, min_new_tokens=words, do_sample=False)
            took[name].append(time.perf_counter() - began)
    times = {name: statistics.median(each[1:]) for name, each in took.items()}
    overhead(record, "mue, no token exits", times["whole"] / times["no token exits"])
    image = int((inputs["input_ids"] == made.config.image_token_id).sum())
    tokens = {"image": torch.tensor([image]), "text": torch.tensor([inputs["input_ids"].shape[1] - image])}
    step, rows = torch.arange(words), []
    for name, (tau, e, j) in left.items():
        if tau == OFF:
            continue
        streams = dict.fromkeys(tokens, torch.tensor([e]))
        taken = Exits(streams, tokens, torch.full_like(step, j), 0 * step, step, torch.tensor([True]), 0.0, {})
        flops = by_flops(taken, ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"]))
        ideal, measured = (times["whole"] / times[each] for each in (f"{name}, cut", name))
        rows.append([name, f"{by_layers(taken, (6, 6)):.1%}", 1 / (1 - flops), ideal, measured, measured / ideal])
        said_so = f"mue, {name}: speed-up / ideal"
        record.check(said_so, "at least 0.85", measured / ideal, measured / ideal >= 0.85)
    title = f"A request with {image} image tokens and {words} generated words, random weights of SmolLM2's width"
    columns = ["exits", "layers skipped", "by FLOPs", "ideal: model cut there", "speed-up", "measured / ideal"]
    record.table(title, columns, rows)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 5

    stack = lamella.open("smollm2")
    record = Record(
        "runtime", f"{PROMPT} random tokens of prompt, {STEPS} decoding steps, {rounds} interleaved rounds", 0
    )
    static(record, stack, rounds)
    dynamic(record, stack, rounds)
    denoising(record, rounds)
    image_tokens(record, rounds)
    tokens_that_pass(record, rounds)
    experts(record, rounds)
    exits(record, rounds)
    name = "runtime-quick.json" if arguments.quick else "runtime.json"
    return record.finish(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    raise SystemExit(main())
