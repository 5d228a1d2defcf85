"""The cost of rank-one experts: the sparse and the dense kernel compared with LoRA, at SmolLM2's width.

A Llama of six layers as wide as SmolLM2-135M, with random weights; every linear layer has 64 ranks, of which 8 are
active, or a LoRA of rank 64. Training, a long prompt, and a decoding step run alternately, so that load changes affect
all of them.

    python benchmarks/smora.py            # about two minutes on one core
    python benchmarks/smora.py --quick    # two layers
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.evaluate import Ratio
from lamella.methods.smora import KERNELS, RankExperts, trains
from lamella.plan import attach
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import add_lora, linear_at

R, K = 64, 8
LORA, DENSE, SPARSE = "LoRA", "SMoRA, dense", "SMoRA, sparse"
VOCABULARY = 4096


def stack(layers: int) -> Stack:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Stack(LlamaForCausalLM(config).eval())


def views(plain: Stack) -> dict[str, Any]:
    """Return the model with LoRA, and with the same experts under either kernel."""
    found = {"no adapter": share(plain.model), LORA: share(plain.model)}
    add_lora(found[LORA], R, 16)
    for name, kernel in ((DENSE, "dense"), (SPARSE, "sparse")):
        found[name] = share(plain.model)
        made: dict[str, Any] = attach(found[name], linear_at(found[name]), partial(RankExperts, r=R, k=K))
        for each in made.values():
            each.kernel = kernel
            nn.init.normal_(each.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
    return found


@torch.no_grad()
def difference(made: RankExperts) -> float:
    """Return the difference of the kernels on one input; in a whole model, rounding would change routing."""
    x = torch.randn(64, made.lora_A.shape[1], generator=torch.Generator().manual_seed(2))
    route = made.route(x)
    one, other = (kernel(x, made.lora_A, made.lora_B, route) for kernel in KERNELS.values())
    return float((one - other).abs().max())


def trained(view: Any, ids: Tensor) -> None:
    """Run one forward and one backward pass."""
    view.train()
    with torch.enable_grad():
        loss = view(ids, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
    view.eval()


def read(view: Any, ids: Tensor) -> None:
    with torch.no_grad():
        view(ids)


def rounds(all_views: dict[str, Any], work: Callable[[Any], None], count: int) -> dict[str, list[float]]:
    """Return the seconds of each view in each round; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in all_views}
    for number in range(count + 1):
        for name, view in all_views.items():
            begin = time.perf_counter()
            work(view)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(record: Record, layers: int, count: int) -> None:
    plain = stack(layers)
    found = views(plain)
    ids = torch.randint(VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(record.seed))
    apart = max(map(difference, (each for each in found[DENSE].modules() if isinstance(each, RankExperts))))
    record.check("both kernels of each linear layer", "the same within 1e-5", f"{apart:.1e}", apart <= 1e-5)
    for parameter in plain.model.parameters():
        parameter.requires_grad_(False)
    for name in (LORA, DENSE, SPARSE):
        for each, parameter in found[name].named_parameters():
            parameter.requires_grad_(trains(each))
    workloads: list[tuple[str, Callable[[Any], None], int]] = [
        ("training, 4 x 128 tokens", partial(trained, ids=ids), count),
        ("reading 512 tokens", partial(read, ids=ids.flatten()[None]), count),
        ("one token", partial(read, ids=ids[:1, :1]), 5 * count),
    ]
    rows, ratios = [], {}
    for what, work, times in workloads:
        seconds = rounds(found, work, times)
        for name in found:
            ratio = Ratio.of([a / b for a, b in zip(seconds[name], seconds[LORA], strict=True)])
            ratios[what, name] = ratio
            rows.append([what, name, ratio.median, ratio.low, ratio.high])
    record.table(f"{layers} layers, rank {R}: time relative to LoRA, {count} interleaved rounds",
                 ["", "per linear layer", "ratio, median", "lower quartile", "upper quartile"], rows)  # fmt: skip
    step = ratios[workloads[0][0], DENSE]
    record.check("training step of the dense kernel relative to LoRA's", "at most 1.8", str(step), step.median <= 1.8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, three rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("smora", "random token ids; random weights at the width of SmolLM2-135M, float32", 0)
    compare(record, 2 if chosen.quick else 6, 3 if chosen.quick else 9)
    return record.finish(Path(__file__).parent / "results" / f"smora{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
