"""Streaming: the memory of a pass over a data set, as the data set grows from 5,000 images to 100,000.

Each pass is a separate process that opens the data set as a command does and iterates over it in batches:

    class folders        a folder with a folder of images for each class
    metadata.jsonl       a folder of images with captions
    images with text     rows of a .jsonl file, through the processor of a small LLaVA
    laptop-diff          training data of a small Stable Diffusion: latents and text embeddings are computed, written to
                         memory-mapped files, hashed as training hashes them, and read in a shuffled order
    refacade             clips of four frames, each with a mask and a plain counterpart: latents as above. The large
                         data set has 20,000 clips, the small one 1,000: 180,000 and 9,000 images; the latents of more
                         clips would need too much disk space

Images have 64 x 64 pixels. There are 2,000 different ones; the entries of a data set are hard links to them or rows of
a file, and each entry is decoded separately. Needs Pillow, diffusers and torchvision (extra `vision`).

    python benchmarks/streaming.py            # about a quarter of an hour, and 4 GB of disk
    python benchmarks/streaming.py --quick    # a tenth of the sizes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lamella.results import Record

SIDE, DIFFERENT, CLASSES, FRAMES, BATCH = 64, 2000, 10, 4, 64
LIMIT = 200  # MB
OTHERS = 5  # one image in this many of a folder is kept for testing

# Passes, each in a process of its own


def captioned(folder: Path, count: int) -> int:
    from lamella.data import CaptionedImages, InputContext, batches

    found = CaptionedImages.open(folder, InputContext(), count=count)
    return sum(each.picture.shape[0] == SIDE for batch in batches(found.items, BATCH) for each in batch)


def with_text(folder: Path, count: int) -> int:
    from lamella.data import ImageText, InputContext, Processing
    from lamella.zoo.vlm import shapes_vlm

    processing = Processing(shapes_vlm("llava", num_hidden_layers=2)[1])
    reader = InputContext(lambda: processing.tokenizer, 0, "whole", lambda: processing)
    found = ImageText.open(folder / "rows.jsonl", reader, rows=count)
    return sum(len(batch["pixel_values"]) for batch in found.batches(BATCH))


def diffusion(folder: Path, count: int) -> int:
    from lamella.data import CaptionedImages, InputContext
    from lamella.files import Work
    from lamella.methods.laptop_diff import Denoiser, encode_samples

    pictures = CaptionedImages.open(folder, InputContext(), count=count)
    return trained_on(encode_samples(Denoiser(pipeline(), "small"), pictures, Work(folder.parent / "work")))


def clips(folder: Path, count: int) -> int:
    from lamella.data import InputContext
    from lamella.files import Work
    from lamella.methods.refacade import Base, Objects, removal_samples

    base, objects = Base.open("untrained"), Objects.open(folder, InputContext(), count=count, frames=FRAMES)
    return trained_on(removal_samples(base, objects.fitted(base), Work(folder.parent / "work"), objects.describe()))


def trained_on(samples: Any) -> int:
    """Use samples as training does: hash them, and read them in a shuffled order."""
    from torch.utils.data import DataLoader

    from lamella.train.runs import samples_digest
    from lamella.train.supervised import stacked

    samples_digest(samples)
    loader = DataLoader(samples, BATCH, shuffle=True, collate_fn=stacked, generator=torch.Generator().manual_seed(0))
    return sum(len(next(iter(batch.values()))) for batch in loader)


def pipeline() -> Any:
    """Return Stable Diffusion's parts with random weights: latents of 16 x 16, and embeddings of 16 tokens."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8), latent_channels=4, norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=transformers.CLIPTextModel(config).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=diffusers.DDPMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


# Data sets


def distinct(folder: Path) -> list[Path]:
    """Write the distinct images."""
    folder.mkdir()
    files = []
    for number in range(DIFFERENT):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        files.append(folder / f"{number:04d}.jpg")
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(files[-1], quality=80)
    return files


def class_folders(folder: Path, files: list[Path], count: int) -> None:
    for number in range(CLASSES):
        (folder / f"class-{number}").mkdir(parents=True)
    for number in range(with_test(count) + OTHERS * CLASSES):  # of each class, the first is for testing
        os.link(files[number % len(files)], folder / f"class-{number % CLASSES}" / f"{number:06d}.jpg")


def with_captions(folder: Path, files: list[Path], count: int) -> None:
    written(folder, files, "metadata.jsonl", (
        {"file_name": files[number % len(files)].name, "text": f"image {number}"} for number in range(with_test(count))
    ))  # fmt: skip


def with_prompts(folder: Path, files: list[Path], count: int) -> None:
    written(folder, files, "rows.jsonl", (
        {"image": files[number % len(files)].name, "prompt": f"what is {number}?", "answer": f"image {number}"}
        for number in range(count)
    ))  # fmt: skip


def written(folder: Path, files: list[Path], name: str, rows: Iterable[dict[str, str]]) -> None:
    folder.mkdir()
    for file in files:
        os.link(file, folder / file.name)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_test(count: int) -> int:
    """Return the number of images of which ``count`` are not for testing."""
    return -(-count * OTHERS // (OTHERS - 1))


def with_masks(folder: Path, files: list[Path], count: int) -> None:
    folder.mkdir()
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[8:-8, 8:-8] = 255
    Image.fromarray(mask).save(folder.with_suffix(".png"))
    animated = []
    for number in range(len(files) // FRAMES):
        first, *others = (Image.open(file) for file in files[number * FRAMES : (number + 1) * FRAMES])
        animated.append(folder.parent / f"{folder.name}-{number}.webp")
        first.save(animated[-1], save_all=True, append_images=others, quality=60)
    for number in range(count):
        os.link(animated[number % len(animated)], folder / f"{number:06d}.webp")
        os.link(animated[(number + 1) % len(animated)], folder / f"{number:06d}.untextured.webp")
        os.link(folder.with_suffix(".png"), folder / f"{number:06d}.mask.png")


Pass = Callable[[Path, int], int]
PASSES: dict[str, tuple[Pass, Callable[[Path, list[Path], int], None], tuple[int, int]]] = {
    "class folders": (captioned, class_folders, (5_000, 100_000)),
    "metadata.jsonl": (captioned, with_captions, (5_000, 100_000)),
    "images with text": (with_text, with_prompts, (5_000, 100_000)),
    "laptop-diff": (diffusion, with_captions, (5_000, 100_000)),
    "refacade": (clips, with_masks, (1_000, 20_000)),
}


def child(name: str, folder: Path, count: int) -> None:
    """Run one pass, and return its peak memory in MB and its seconds."""
    began = time.perf_counter()
    items = PASSES[name][0](folder, count)
    assert items == count, f"{items} of {count} items"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - began}))


def measured(name: str, files: list[Path], folder: Path, sizes: tuple[int, int]) -> Iterator[dict[str, float]]:
    for count in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            PASSES[name][1](Path(place) / "data", files, count)
            command = [sys.executable, __file__, "--child", name, str(Path(place) / "data"), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            yield json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes")
    parser.add_argument("--child", nargs=3, metavar=("PASS", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], Path(given.child[1]), int(given.child[2]))
        return 0
    record = Record(
        "streaming", f"{DIFFERENT} different JPEG images of {SIDE} x {SIDE} pixels, linked or named repeatedly", 0
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = distinct(Path(folder) / "images")
        for name, (_, _, sizes) in PASSES.items():
            small, large = (size // 10 if given.quick else size for size in sizes)
            few, many = measured(name, files, Path(folder), (small, large))
            rows.append([name, small, large, few["peak"], many["peak"], many["peak"] - few["peak"], many["seconds"]])
    columns = ["data set", "items", "items, large", "peak MB", "peak MB, large", "difference", "seconds, large"]
    record.table("Peak memory of a pass over a data set", columns, rows)
    for name, *_, difference, _ in rows:
        record.check(
            f"{name}: additional memory for the larger data set", f"< {LIMIT} MB", difference, difference < LIMIT
        )
    return record.finish(Path(__file__).parent / "results" / f"streaming{'-quick' if given.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
