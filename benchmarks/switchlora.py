"""The cost of exchanging vectors: SwitchLoRA's training step relative to LoRA's, and the bytes of its optimizer.

A Llama of six layers as wide as SmolLM2-135M, with random weights and adapters of a quarter of its width. Both train
with Lamella's loop alternately, a few steps at a time, at the start of SwitchLoRA's schedule, where most vectors are
exchanged.

    python benchmarks/switchlora.py            # about four minutes on one core
    python benchmarks/switchlora.py --quick    # two layers
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.evaluate import Ratio
from lamella.methods.switchlora import ExchangeFrequency, SwitchHook, per_vector
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import Hook, Lora, Sample, Task, TrainConfig, TrainingRun, add_lora, blocks, fit, own, response_loss

R, VOCABULARY = 144, 4096
STEPS, WARM = 6, 2  # steps of one turn, and untimed steps among them
LONG = 10_000  # steps of the schedule, of which only the first are run
COSTLIEST = 1.25
REST = 0.05


class Watch(Hook):
    """Records the times of steps, and the size of the optimizer state in bytes."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.bytes = 0

    def after_step(self, run: TrainingRun) -> None:
        self.ends.append(time.perf_counter())

    def end(self, run: TrainingRun) -> None:
        self.bytes = sum(
            each.nbytes for state in run.optimizer.state.values() for each in state.values() if torch.is_tensor(each)
        )

    @property
    def seconds(self) -> float:
        """Return the median time of a step."""
        return statistics.median(after - before for before, after in pairwise(self.ends[WARM - 1 :]))


def adapted(plain: Stack, exchanged: bool) -> tuple[Any, Lora]:
    view = share(plain.model)
    lora = add_lora(view, R, alpha=1)
    own(view, lambda name: ".base_layer." in name or (exchanged and not name.startswith("lamella_")))
    return view, lora


def turn(plain: Stack, samples: list[Sample], exchanged: bool, steps: int) -> tuple[Watch, Lora]:
    """Run a few steps from the beginning."""
    view, lora = adapted(plain, exchanged)
    watch = Watch()
    hooks: list[Hook] = [watch]
    if exchanged:
        hooks.insert(0, SwitchHook(lora, ExchangeFrequency(), LONG, 0))
    config = TrainConfig(steps=steps, lr=1e-3, schedule="constant", batch=4, save_every=LONG, log_every=LONG)
    more: dict[str, Any] = {"optimizer": per_vector(REST)} if exchanged else {}
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, Task(response_loss), config, out=work, trainable=lora.trains, hooks=hooks, **more)
    return watch, lora


def compare(record: Record, layers: int, rounds: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Stack(LlamaForCausalLM(config).eval())
    tokens = torch.randint(VOCABULARY, (4 * STEPS, 128), generator=torch.Generator().manual_seed(record.seed))
    samples = blocks(tokens, loss_on="all")
    ratios, rows = [], []
    for _ in range(rounds):
        (low, _), (ours, lora) = (turn(plain, samples, exchanged, STEPS) for exchanged in (False, True))
        ratios.append(ours.seconds / low.seconds)
        rows.append([low.seconds, ours.seconds, ratios[-1]])
    record.table(f"A step of 4 x 128 tokens, {layers} layers, rank {R}; seconds in each round",
                 ["LoRA", "SwitchLoRA", "ratio"], rows)  # fmt: skip
    ratio = Ratio.of(ratios)
    held = True if ratio.high <= COSTLIEST else False if ratio.low > COSTLIEST else None  # otherwise undecided
    record.check("a step of SwitchLoRA relative to LoRA's", f"at most {COSTLIEST}", str(ratio), held)

    # Two moments of each parameter, and a step count of each vector, all in four bytes.
    shapes = [lora.view.get_submodule(name).get_base_layer().weight.shape for name in lora.modules]
    expected = sum(4 * (2 * R * (m + n) + 2 * R) for m, n in shapes)
    whole = sum(each.numel() for name, each in plain.model.named_parameters() if name.startswith("model.layers.")
                and each.ndim == 2)  # fmt: skip
    record.table("Bytes of the optimizer state of the linear layers", ["", "bytes"],
                 [["SwitchLoRA", ours.bytes], ["by the formula, 4 (2 r (m + n) + 2 r) for each", expected],
                  ["AdamW of all their weights", 8 * whole]])  # fmt: skip
    record.check("bytes of the optimizer state", f"{expected}", str(ours.bytes), ours.bytes == expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("switchlora", "random token ids; random weights at the width of SmolLM2-135M, float32", 0)
    compare(record, 2 if chosen.quick else 6, 2 if chosen.quick else 7)
    return record.finish(Path(__file__).parent / "results" / f"switchlora{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
