"""Runs at the size of published models, with random weights in bfloat16.

Unlike `full_size.py`, which estimates, everything here is created and computed, on the shapes of published models and
with one unit of work: a few sequences, a few steps, a single answer. Every run is a process of its own with one thread.
Memory is the most that the process takes, with Python, its libraries and mapped files; time is that of its processor
for the unit of work, without what a case prepares before it. Nothing is extrapolated. Needs Linux, diffusers and timm.

    python benchmarks/dry_runs.py                 # 2 hours of a core and 100 GB of disk; resumes when interrupted
    python benchmarks/dry_runs.py --quick         # the same on small models
    python benchmarks/dry_runs.py --only inspect  # one run, for example
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_size import LLAMA, PLANNING, SHAPES, USUAL, header_of
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    OPTForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from lamella.data import CaptionedImages, InputContext
from lamella.data.decoding import Sampling
from lamella.data.writer import Completion, Writer, WritingRequest
from lamella.files import Finished, replacing
from lamella.methods.agile3d import ClickScene, SegmenterShape, Session, rooms
from lamella.methods.laptop_diff import Denoiser, Tuples, error, predictions
from lamella.methods.muranet import RecogniserShape, recognise, synthetic_floor_plan
from lamella.needs import free_memory, peak_used_memory
from lamella.results import Record
from lamella.runner import run
from lamella.zoo import prefer
from lamella.zoo.cache import build_once, cache_folder
from lamella.zoo.pull import pull
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import word_tokenizer

STD = 0.02  # standard deviation of random weights
NOISE = 2**24 + 43  # random values, which are written again and again, from other positions on; a prime
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
QWEN_LAYERS = 8  # as many as the memory of a shared machine allowed
RESERVE = 10**9  # bytes of memory that are left to others
FLAT = 300  # MB by which 9 GB more of documents may raise the memory
EVERY = 0.05  # seconds between two looks at the memory
INSPECTION = 10  # minutes in which a model of a billion parameters is inspected


@dataclass
class DryRun:
    """A prepared run.

    Attributes:
        model: what it runs on, in words.
        unit: the unit of work, in words.
        work: does the unit of work.
    """

    model: str
    unit: str
    work: Callable[[], Any]


def random_checkpoint(name: str, config: Any, build: Callable[[Any], Any], files: Callable[[Path], Any]) -> Path:
    """Return the folder of a checkpoint with random weights in bfloat16, written once and tensor by tensor.

    Args:
        name: name of the folder.
        config: config of the model.
        build: class of the model.
        files: writes tokenizer or processor into the folder.
    """
    with init_empty_weights():
        network = build(config)
    network.tie_weights()
    header, size = header_of(network)

    def fill(folder: Path) -> dict[str, Any]:
        config.architectures, config.dtype = [type(network).__name__], torch.bfloat16
        config.save_pretrained(folder)
        files(folder)
        generator = np.random.default_rng(0)
        noise = (
            torch.from_numpy(STD * generator.standard_normal(NOISE, np.float32)).bfloat16().view(torch.int16).numpy()
        )
        ones = torch.ones(NOISE, dtype=torch.bfloat16).view(torch.int16).numpy()
        with (folder / "model.safetensors").open("wb") as weights:
            weights.write(header)
            for each, parameter in network.named_parameters():
                left, start = parameter.numel(), int(generator.integers(NOISE))
                is_norm = parameter.ndim == 1 and each.endswith("weight")
                while left:
                    part = (ones if is_norm else noise)[start : start + left]
                    part.tofile(weights)
                    left, start = left - len(part), 0
        return {"weights": "random", "std": STD}

    return build_once(f"benchmarks-random-{name.replace(' ', '-')}", fill, size // 10**6 + 100)


def llama(name: str, quick: bool) -> Path:
    """Return the checkpoint of a Llama, or of a small one."""
    shape, name = (SMALL, "small Llama") if quick else (SHAPES[name], name)
    config = LlamaConfig(**LLAMA | shape, bos_token_id=1, eos_token_id=2)
    return random_checkpoint(name, config, LlamaForCausalLM, tokens)


def llava(side: int, layers: int) -> Path:
    """Return the checkpoint of LLaVA-1.5, or of a small one for small images."""
    small = side < 336
    tokenizer = word_tokenizer()
    sizes = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = SMALL if small else {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not small:
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": side, "patch_size": 14, **tower},
        text_config={"model_type": "llama", "vocab_size": 32064, **text, "num_hidden_layers": layers, **sizes},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layer=-2,
    )
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    build = LlavaForConditionalGeneration
    return random_checkpoint(f"LLaVA {side} {layers}", config, build, processor.save_pretrained)


def qwen(layers: int, quick: bool) -> Path:
    """Return the checkpoint of Qwen3-VL 30B-A3B with some of its layers, or of a small one."""
    small, processor = shapes_vlm("qwen3_vl_moe", spatial_merge_size=2)
    config = small.config
    if not quick:
        text = {"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
                "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                "num_hidden_layers": layers,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                    "mrope_interleaved": True}}  # fmt: skip
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                 "out_hidden_size": 2048, "num_position_embeddings": 2304, "spatial_merge_size": 2, "patch_size": 16,
                 "temporal_patch_size": 2, "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
        ids = {name: getattr(config, name) for name in vars(config) if name.endswith("token_id")}
        config = Qwen3VLMoeConfig(text_config=config.text_config.to_dict() | text, vision_config=tower, **ids)
        for each in (processor.image_processor, processor.video_processor):
            each.patch_size, each.temporal_patch_size = 16, 2
    name = f"Qwen3-VL {'small' if quick else layers}"
    return random_checkpoint(name, config, Qwen3VLMoeForConditionalGeneration, processor.save_pretrained)


def opt(quick: bool) -> Path:
    """Return the checkpoint of OPT 6.7B, or of a small one."""
    size = (128, 256, 2, 4) if quick else (4096, 16384, 32, 32)
    names = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
    config = OPTConfig(**dict(zip(names, size, strict=True)), word_embed_proj_dim=size[0])
    return random_checkpoint(f"OPT {size[0]} {size[2]}", config, OPTForCausalLM, tokens)


def tokens(folder: Path) -> None:
    """Write SmolLM2's tokenizer."""
    for file in pull("smollm2").glob("*token*"):
        shutil.copy(file, folder)


def stable_diffusion(quick: bool) -> Path:
    """Return the folder of Stable Diffusion 1.5 with random weights, or of a small one."""

    def fill(folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        words = [
            "<|startoftext|>",
            "<|endoftext|>",
            *"abcdefghijklmnopqrstuvwxyz",
            *(f"{each}</w>" for each in LETTERS),
        ]
        width, heads = (32, 2) if quick else (768, 12)
        text = CLIPTextConfig(
            vocab_size=len(words) if quick else 49408, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=2 if quick else 12, num_attention_heads=heads, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )  # fmt: skip
        few = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1} if quick else {}
        down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        channels = (32,) * 4 if quick else (128, 256, 512, 512)
        StableDiffusionPipeline(
            unet=UNet2DConditionModel(sample_size=8 if quick else 64, cross_attention_dim=width, **few),
            vae=AutoencoderKL(block_out_channels=channels, down_block_types=down, up_block_types=up,
                              layers_per_block=1 if quick else 2, sample_size=64 if quick else 512),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[],
                                    model_max_length=77),
            scheduler=PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                    skip_prk_steps=True, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip
        return {"weights": "random"}

    return build_once(f"benchmarks-random-stable-diffusion{'-small' if quick else ''}", fill, 2500)


def command(slug: str, *inputs: Any, further: str = "", **options: Any) -> Callable[[], Any]:
    """Return a run of a command that writes its result into a temporary folder."""

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run(slug, *inputs, command=further, out=Path(folder) / "out", **options)

    return work


def shortgpt(quick: bool) -> DryRun:
    name = "Llama 3.2 3B"
    work = command("shortgpt", llama(name, quick), calibration="pydoc", sequences=1, length=256)
    return DryRun(name, "one sequence of 256 tokens", work)


def finercut(quick: bool) -> DryRun:
    name = "Llama 3.2 3B"
    work = command("finercut", llama(name, quick), calibration="pydoc", sequences=1, length=128, share=0.02)
    return DryRun(name, "one sequence of 128 tokens, the first removal out of 32 candidates", work)


def inspect(quick: bool) -> DryRun:
    return DryRun(USUAL, "the whole command with default options", command("depth-efficiency", llama(USUAL, quick)))


def inspect_briefly(quick: bool) -> DryRun:
    return DryRun(USUAL, "the whole command with --brief", command("depth-efficiency", llama(USUAL, quick), brief=True))


def switchlora(quick: bool) -> DryRun:
    options = {"steps": 2, "batch": 1, "length": 32 if quick else 512, "gradient_checkpointing": True}
    work = command("switchlora", llama(USUAL, quick), train="pydoc", **options)
    return DryRun(
        USUAL, "2 steps of 512 tokens with gradient checkpointing, the spectra of the updates, the evaluation", work
    )


def arank(quick: bool) -> DryRun:
    side, layers = (56, 4) if quick else (336, 32)
    options = {"rows": 2, "pixels": side, "probes": 2}
    work = command("gamma-mod", llava(side, layers), further="arank", calibration="shapes:colour", **options)
    return DryRun("LLaVA-1.5 7B", "attention ranks of all layers for two images of 576 tokens", work)


def modes(quick: bool) -> DryRun:
    layers = 2 if quick else QWEN_LAYERS
    options = {"rows": 2, "pixels": 64 if quick else 448, "points": 2, "skip": 0.1}
    work = command("modes", qwen(layers, quick), calibration="shapes:colour", **options)
    unit = "two images of 196 tokens, two thresholds, then the evaluation"
    return DryRun(f"Qwen3-VL 30B-A3B, {layers} of 48 layers", unit, work)


def laptop_diff(quick: bool) -> DryRun:
    folder, blocks = stable_diffusion(quick), 3
    images = CaptionedImages.open("shapes", InputContext(), count=1)

    def work() -> None:
        denoiser = Denoiser.open(folder)
        samples = Tuples.of(denoiser, images, 1)
        whole = predictions(denoiser, denoiser.network, samples, 1)
        for site in denoiser.blocks.sites[:blocks]:
            error(predictions(denoiser, denoiser.blocks.without([site]), samples, 1), whole)

    unit = f"the effect of {blocks} of the blocks on one sample of 512 x 512 pixels, in float32 as always"
    return DryRun("Stable Diffusion 1.5", unit, work)


def pre_rmsnorm(quick: bool) -> DryRun:
    unit = "the whole command, written to disk"
    return DryRun("OPT 6.7B", unit, command("pre-rmsnorm", opt(quick)))


def slab(quick: bool) -> DryRun:
    shape: dict[str, Any] = {"size": 224, "width": 96, "depth": (2, 2, 6, 2), "window": 7}
    if quick:
        shape = {"size": 32, "width": 24, "depth": (1, 1), "window": 4}
    options = shape | {"family": "swin", "patch": 4, "steps": 1, "batch": 8, "passes": 1, "count": 40}
    work = command("slab", images="digits", further="vision", **options)
    return DryRun("Swin-T of timm", "one step of 8 images, one pass of statistics, folding and the evaluation", work)


def agile3d(quick: bool) -> DryRun:
    points = 10_000 if quick else 1_000_000
    torch.manual_seed(0)
    model = SegmenterShape(encoder="nano" if quick else "res16unet34c").build().eval()
    scene = building(points)

    def work() -> None:
        session = Session(model, scene)
        session.add(1, 0)
        session.labels()

    return DryRun("the paper's network", f"a scan of {points:,} points is encoded once, then one click", work)


def building(points: int) -> ClickScene:
    """Return a scan of adjacent rooms with so many points."""
    many, coords, colours = rooms("test"), [], []
    while sum(map(len, coords)) < points:
        room = next(many)
        row, column = divmod(len(coords), 8)
        coords.append(room.coords + np.array([4.2 * column, 4.2 * row, 0], np.float32))
        colours.append(room.colours)
    return ClickScene(np.concatenate(coords)[:points], np.concatenate(colours)[:points], name="the building")


def muranet(quick: bool) -> DryRun:
    side = 64 if quick else 2000
    torch.manual_seed(0)
    shape = RecogniserShape(encoder="nano", size=64) if quick else RecogniserShape()
    network, plan = shape.build(2).eval(), synthetic_floor_plan(0, side)

    @torch.no_grad()
    def work() -> None:
        recognise(network, plan, shape.frame)

    return DryRun("the paper's base", f"one plan of {side} x {side} pixels, read at {shape.size} x {shape.size}", work)


def skr(quick: bool) -> DryRun:
    grid, count = (32, 3) if quick else (512, 3)
    work = command("skr", f"darcy:grid={grid},count={count}", preconditioner="ilu")
    return DryRun(
        f"Darcy's equation, {grid} x {grid}", f"{count} systems of {grid * grid:,} unknowns, incomplete LU", work
    )


class Echo(Writer):
    """A writer that says the passage again, so that everything but the generation is measured."""

    name = "echo"

    def __init__(self) -> None:
        self.tokenizer = lambda text, **_: {"input_ids": text.split()}

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for request in requests:
            if request.key not in done:
                text = request.messages[-1]["content"].split("Text:\n")[-1]
                yield [(request, Completion(text, True, len(text.split()), len(text.split())))]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def wrap(quick: bool, megabytes: int = 10_000) -> DryRun:
    """Rephrase a file of documents with an echo."""
    megabytes = 1 if quick else megabytes
    file = cache_folder() / "benchmarks" / f"documents-{megabytes}.jsonl.gz"
    if not file.exists():
        generator, words = np.random.default_rng(0), np.array(Path(argparse.__file__).read_text().split())
        left = megabytes * 10**6
        with replacing(file) as unfinished, gzip.open(unfinished, "wt", compresslevel=1) as lines:
            while left > 0:
                sentences = map(" ".join, generator.choice(words, (25, 20)))
                left -= lines.write(json.dumps({"text": ". ".join(sentences)}) + "\n")
    work = command("wrap", documents=file, rephraser=Echo(), embedder="words", together=512)
    return DryRun("a writer that echoes", f"{megabytes} MB of JSONL, compressed", work)


def lora_recycling(quick: bool) -> DryRun:
    count = 4 if quick else 200
    work = command("lora-recycling", llama(USUAL, quick), f"random:count={count},r=8", further="merge", most_norm=1e9)
    return DryRun(USUAL, f"{count} adapters of rank 8 are checked, averaged and merged, then the evaluation", work)


CASES: dict[str, Callable[[bool], DryRun]] = {
    "inspect": inspect,
    "inspect --brief": inspect_briefly,
    "switchlora": switchlora,
    "shortgpt": shortgpt,
    "finercut": finercut,
    "laptop-diff": laptop_diff,
    "gamma-mod arank": arank,
    "modes": modes,
    "pre-rmsnorm": pre_rmsnorm,
    "slab vision": slab,
    "agile3d": agile3d,
    "muranet read": muranet,
    "skr": skr,
    "wrap": wrap,
    "wrap, a tenth": partial(wrap, megabytes=1000),
    "lora-recycling merge": lora_recycling,
}


def end_in_time() -> None:
    """End this process before it takes the last memory of the machine, for which the system might end another one."""
    while free_memory() > RESERVE:
        time.sleep(EVERY)
    print(f"ended with {peak_used_memory() / 1e9:.1f} GB: the memory of the machine is used up", file=sys.stderr)
    os._exit(1)


def child(name: str, quick: bool) -> None:
    """Run one case in this process, and print the result as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    threading.Thread(target=end_in_time, daemon=True).start()
    prefer("bfloat16")
    prepared = CASES[name](quick)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begin = time.process_time()
    prepared.work()
    seconds = time.process_time() - begin
    print(json.dumps({"model": prepared.model, "unit": prepared.unit, "bytes": peak_used_memory(), "seconds": seconds}))


def in_process(name: str, quick: bool) -> dict[str, Any]:
    """Return the result of :func:`child` in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    call = [sys.executable, __file__, "--child", name, *(["--quick"] if quick else [])]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--only", choices=CASES, help="one run")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.child:
        child(arguments.child, quick)
        return 0
    suffix = "-quick" if quick else ""
    finished = Finished(cache_folder() / "benchmarks" / f"dry_runs{suffix}.jsonl", {"std": STD})
    for name in [arguments.only] if arguments.only else CASES:
        found = finished.once(name, partial(in_process, name, quick))
        print(f"{name}: {found['bytes'] / 1e9:.1f} GB, {found['seconds']:.0f} s", flush=True)
    done = {name: finished.once(name, dict) for name in CASES if name in finished}
    record = Record("dry_runs", "random weights in the shapes of published models, bfloat16, one thread", 0)
    rows = [
        [name, each["model"], each["unit"], f"{each['bytes'] / 1e9:.1f}", f"{each['seconds']:.0f}"]
        for name, each in done.items()
    ]
    record.table("Dry runs", ["run", "model", "unit of work", "memory, GB", "processor time, s"], rows)
    record.check("runs that ended", f"all {len(CASES)}", str(len(done)), True if len(done) == len(CASES) else None)
    if not quick:
        checks(record, done)
    return record.finish(Path(__file__).parent / "results" / f"dry_runs{suffix}.json")


def checks(record: Record, done: dict[str, dict[str, Any]]) -> None:
    """Add what a person with a usual machine relies on."""
    planned = [done[name]["bytes"] / 1e9 for name in ("shortgpt", "finercut") if name in done]
    if planned:
        name, most = "planning a model of 3 billion parameters", max(planned)
        record.check(name, f"at most {PLANNING} GB", f"{most:.1f} GB", most <= PLANNING)
    if "inspect" in done:
        minutes = done["inspect"]["seconds"] / 60
        record.check(f"inspecting {USUAL}", f"at most {INSPECTION} minutes", f"{minutes:.1f}", minutes <= INSPECTION)
    if {"wrap", "wrap, a tenth"} <= done.keys():
        growth = (done["wrap"]["bytes"] - done["wrap, a tenth"]["bytes"]) / 1e6
        record.check(
            "memory of ten times as many documents", f"at most {FLAT} MB more", f"{growth:.0f} MB", growth <= FLAT
        )


if __name__ == "__main__":
    raise SystemExit(main())
