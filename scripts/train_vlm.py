"""Train a small vision-language model on images of rendered shapes, and print its accuracy."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "reproductions"))

from harness.vlm import STAGES, STAGES_SEQ2SEQ, opened_vlm, rows_of, trained_vlm

from lamella.evaluate import answered
from lamella.zoo.vlm import SHAPES_SEQ2SEQ, SHAPES_VLM

TASKS = ("colour", "count", "position", "relation", "caption", "list")
ENTAILED = ("entailment", "premise")  # additional tasks of encoder-decoders


def main() -> None:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The model is cached for the reproductions; an interrupted training resumes when the command is "
        "repeated. The same seed on the same machine gives the same weights.",
    )
    parser.add_argument(
        "model", nargs="?", default="llava", choices=[*SHAPES_VLM, *SHAPES_SEQ2SEQ], help="default: llava"
    )
    parser.add_argument(
        "--stage", default="sft", choices=sorted(STAGES | STAGES_SEQ2SEQ), help="last stage (default: sft)"
    )
    parser.add_argument("-o", "--output", type=Path, help="a folder for a copy of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and rows (default: 0)")
    parser.add_argument("--steps", type=float, default=1.0, help="fraction of all steps, for quick runs (default: 1)")
    parser.add_argument("--rows", type=int, default=200, help="test rows per task (default: 200)")
    options = parser.parse_args()
    stages = STAGES_SEQ2SEQ if options.model in SHAPES_SEQ2SEQ else STAGES
    if options.stage not in stages:
        parser.error(f"the stages of {options.model} are {', '.join(stages)}")
    started = time.monotonic()
    folder = trained_vlm(options.model, options.stage, options.seed, steps=options.steps)
    model = opened_vlm(folder)
    print(f"{options.model}: {model.num_parameters():,} parameters, {time.monotonic() - started:.0f} s, in {folder}")
    tasks = (*TASKS, *ENTAILED) if options.model in SHAPES_SEQ2SEQ else TASKS
    for part in ("test", "novel"):
        scores = [answered(model, rows_of(folder, [task], options.rows, part)).float().mean() for task in tasks]
        print(part, *(f"{task} {score:.1%}" for task, score in zip(tasks, scores, strict=True)), sep="  ")
    if options.output is not None:
        shutil.copytree(folder, options.output)


if __name__ == "__main__":
    main()
