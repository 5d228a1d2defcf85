"""Memory and speed of the out-of-core export, for a checkpoint that is much larger than its memory limit.

    python benchmarks/out_of_core.py            # 6 GiB of weights, about 12 GB of disk during the run
    python benchmarks/out_of_core.py --size 1   # GiB

A synthetic sharded Llama checkpoint (bfloat16, random bytes) is written; a child process exports a plan that removes
layers, and its peak memory is read from the operating system; then one that prunes heads, channels and the hidden size.
A smaller sharded checkpoint is exported in the same way, and its logits in plain transformers are compared with those
of the plan's view. Results are written to ``benchmarks/results/out_of_core.json``; the exit code tells whether the
claim holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.plan import HeadWidth, ModelReference, Plan, apply_static, checkpoint
from lamella.results.record import HOLDS, VERDICTS
from lamella.stack import Stack

RESULT = Path(__file__).parent / "results" / "out_of_core.json"
LIMIT = 500.0  # MB, of the whole child process, including its imports
SEED = 0
SHARD = 1 << 30
CHILD = """
import json, sys, time
from pathlib import Path
from lamella.plan import Plan
from lamella.plan.export import export_out_of_core
source, plan, out = map(Path, sys.argv[1:])
def peak():  # not ru_maxrss, which in a child starts with the memory of its parent
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
imports, start = peak(), time.perf_counter()
export_out_of_core(source, Plan.read(plan), out)
print(json.dumps({"imports": imports, "peak": peak(), "seconds": time.perf_counter() - start}))
"""


def write_synthetic(config: LlamaConfig, folder: Path) -> int:
    """Write random bytes in the shape of a model's weights, as shards with an index, and return the number of bytes.

    The bytes are drawn once and written repeatedly with different offsets, so no two tensors are equal.
    """
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(other) for other in shards[-1].values()) + 2 * math.prod(shape) > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    noise = memoryview(os.urandom(64 << 20))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
            end += 2 * math.prod(shape)
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            written = 0
            while written < end:
                begin = (written * 7919 + number) % (32 << 20)
                written += stream.write(noise[begin : begin + min(8 << 20, end - written)])
        total += end
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def export_in_child(source: Path, plan: Plan, out: Path) -> dict[str, float]:
    """Export in a separate process, and return its peak memory in bytes and its seconds."""
    plan_file = out.with_suffix(".json")
    plan.write(plan_file)
    command = [sys.executable, "-c", CHILD, source, plan_file, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def without_layers(stack: Stack, removed: list[int]) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in removed])


def narrower(stack: Stack) -> Plan:
    """Return a plan for three quarters of the heads, channels and hidden size, different ones in every layer."""
    drawn = random.Random(SEED)

    def some(count: int) -> list[int]:
        return sorted(drawn.sample(range(count), 3 * count // 4))

    width: dict[str, Any] = {"hidden.channels": some(stack.config.hidden_size)}
    for layer in range(len(stack)):
        heads = some(stack.config.num_attention_heads)
        width[f"layers.{layer}.attn.heads"] = HeadWidth(keep=heads, kv_of=heads)
        width[f"layers.{layer}.mlp.channels"] = some(stack.config.intermediate_size)
    return Plan(model=ModelReference.of(stack), width=width)


def entries_are_equal(source: Path, out: Path, plan: Plan, config: LlamaConfig) -> bool:
    """Compare every tensor of a narrower result with the slice of the original, read by safetensors."""
    hidden, size = plan.widths.hidden, config.hidden_size // config.num_attention_heads
    files = {tensor.name: tensor.file for tensor in checkpoint.read(source).tensors}
    for tensor in checkpoint.read(out).tensors:
        module, layer = tensor.name.split(".")[-2], int((re.findall(r"layers\.(\d+)", tensor.name) or [0])[0])
        heads = [head * size + entry for head in plan.widths.heads[layer].keep for entry in range(size)]
        channels = plan.widths.channels[layer]
        axes = {"q_proj": (heads, hidden), "k_proj": (heads, hidden), "v_proj": (heads, hidden)}
        axes |= {"o_proj": (hidden, heads), "gate_proj": (channels, hidden), "up_proj": (channels, hidden)}
        axes |= {"down_proj": (hidden, channels), "embed_tokens": (None, hidden), "lm_head": (None, hidden)}
        rows, columns = axes.get(module, (hidden, None))
        with safe_open(files[tensor.name], "pt") as old, safe_open(tensor.file, "pt") as new:
            expected = old.get_tensor(tensor.name)
            expected = expected if rows is None else expected[rows]
            expected = expected if columns is None else expected[:, columns]
            if not torch.equal(new.get_tensor(tensor.name).view(torch.int16), expected.view(torch.int16)):
                return False
    return True


def bytes_are_equal(source: Path, out: Path, removed: list[int], layers: int) -> bool:
    """Compare every tensor of the result with the original one, by hash."""
    kept = [layer for layer in range(layers) if layer not in removed]
    origin = {tensor.name: tensor for tensor in checkpoint.read(source).tensors}
    for tensor in checkpoint.read(out).tensors:
        parts = tensor.name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        if _digest(tensor) != _digest(origin[".".join(parts)]):
            return False
    return True


def _digest(tensor: checkpoint.Range) -> bytes:
    digest = hashlib.sha256()
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for begin in range(0, tensor.size, 8 << 20):
            digest.update(stream.read(min(8 << 20, tensor.size - begin)))
    return digest.digest()


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Export a small sharded checkpoint and compare its logits with the view's."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "small", max_shard_size="200KB")
    stack = Stack(LlamaForCausalLM.from_pretrained(folder / "small").eval(), folder / "small")
    plan = without_layers(stack, [1, 4, 5])
    export_in_child(folder / "small", plan, folder / "small-out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "small-out").eval()
    ids = torch.randint(512, (2, 32))
    return (exported(input_ids=ids).logits - apply_static(stack, plan)(input_ids=ids).logits).abs().max().item()


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", type=float, default=6.0, help="GiB of weights to write (default 6)")
    size = parser.parse_args().size

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_hidden_layers=1,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    layer = 2 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048)
    config.num_hidden_layers = max(4, math.ceil((size * 2**30 - 4 * 32000 * 2048) / layer))
    removed = list(range(1, config.num_hidden_layers, 4))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_synthetic(config, folder / "large")
        with torch.device("meta"):
            stack = Stack(LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "large")))
        large = export_in_child(folder / "large", without_layers(stack, removed), folder / "large-out")
        written = sum(tensor.size for tensor in checkpoint.read(folder / "large-out").tensors)
        equal = bytes_are_equal(folder / "large", folder / "large-out", removed, config.num_hidden_layers)
        shutil.rmtree(folder / "large-out")
        plan = narrower(stack)
        narrow = export_in_child(folder / "large", plan, folder / "narrow-out")
        written_narrow = sum(tensor.size for tensor in checkpoint.read(folder / "narrow-out").tensors)
        equal_narrow = entries_are_equal(folder / "large", folder / "narrow-out", plan, config)
        difference = largest_difference(folder)

    peak, peak_narrow = large["peak"] / 1e6, narrow["peak"] / 1e6
    checks: list[dict[str, Any]] = [
        {"name": "source", "expected": "at least 6 GB", "measured": f"{total / 1e9:.2f} GB", "passed": total >= 6e9},
        {"name": "peak memory", "expected": f"< {LIMIT:.0f} MB", "measured": f"{peak:.0f} MB", "passed": peak < LIMIT},
        {
            "name": "bytes of every tensor",
            "expected": "equal",
            "measured": "equal" if equal else "differ",
            "passed": equal,
        },
        {
            "name": "widths: peak memory",
            "expected": f"< {LIMIT:.0f} MB",
            "measured": f"{peak_narrow:.0f} MB",
            "passed": peak_narrow < LIMIT,
        },
        {
            "name": "widths: kept entries of every tensor",
            "expected": "equal",
            "measured": "equal" if equal_narrow else "differ",
            "passed": equal_narrow,
        },
        {"name": "logits against the view", "expected": "0", "measured": f"{difference:g}", "passed": difference == 0},
    ]
    columns = ["export", "source GB", "written GB", "seconds", "MB/s", "peak MB", "of it imports, MB"]
    rows = [
        [name, *(round(value, 2) for value in (total / 1e9, size / 1e9, child["seconds"], size / 1e6 / child["seconds"],
                                               child["peak"] / 1e6, child["imports"] / 1e6))]
        for name, size, child in (
            (f"{len(removed)} of {config.num_hidden_layers} layers removed", written, large),
            ("three quarters of all widths", written_narrow, narrow),
        )
    ]  # fmt: skip
    result = {
        "slug": "out_of_core",
        "verdict": VERDICTS[all(check["passed"] for check in checks)],
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "transformers", "safetensors")},
        "seed": SEED,
        "data": "synthetic Llama checkpoint, bfloat16, random bytes",
        "tables": [{"title": "Out-of-core export", "columns": columns, "rows": rows}],
        "checks": checks,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in (columns, *rows):
        print("  ".join(map(str, row)))
    for check in checks:
        verdict = "pass" if check["passed"] else "FAIL"
        print(f"{verdict}  {check['name']}: {check['measured']} (expected {check['expected']})")
    return 0 if result["verdict"] == HOLDS else 1


if __name__ == "__main__":
    sys.exit(main())
