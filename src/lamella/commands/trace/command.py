"""Trace the layers that run for each token while a model answers a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt

from lamella.commands.trace.report import png
from lamella.commands.trace.tracing import trace_answer
from lamella.data import open_processing
from lamella.data.images import Image, read_image
from lamella.errors import CalibrationError
from lamella.evaluate.fidelity import predicting_stack
from lamella.plan import Plan
from lamella.registry import command
from lamella.results import Study
from lamella.zoo import SavedModel, chat_inputs, open_tokenizer


@dataclass(frozen=True)
class Photo:
    """An image that a prompt is about.

    Attributes:
        pixels: RGB [height, width, 3], 0 to 255.
        name: name of the file.
    """

    pixels: Image
    name: str

    metavar: ClassVar[str] = "FILE"
    source_help: ClassVar[str] = "an image file, such as photo.png"

    @classmethod
    def open(cls, name: str | Path) -> Photo:
        """Read an image file."""
        return cls(read_image(Path(name).expanduser(), "image"), str(name))

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that the file exists."""
        if not Path(name).expanduser().is_file():
            raise CalibrationError(f"there is no image {name}: give an existing file")

    def describe(self) -> str:
        """Return the name, for provenance."""
        return self.name


@command("trace", verb="trace", on="any", brief={"tokens": 4, "image": None})
def trace(
    model: SavedModel,
    plan: Plan | None = None,
    image: Photo | None = None,
    *,
    prompt: str = "What is the capital of France?",
    alpha: Annotated[float, Gt(0)] = 0.8,
    tokens: Annotated[int, Ge(1)] = 32,
    steps: Annotated[int, Ge(1)] | None = None,
) -> Study:
    """Trace the layers that run for each token while a model answers a prompt.

    With a dynamic plan (ffn-skip, first, lora-drop, void, unified-skip, modes, gamma-mod), the trace shows which layers
    ran and why. Without a plan nothing is skipped, and a layer counts as active for a token if the norm of the token's
    residual stream grew by at least alpha times the range of growth in earlier layers (L2 Adaptive Computation). For a
    prompt about an image, the page shows the layers over the image itself; for a model that predicts masked tokens
    (dllm-skip, dmllm-token-redundancy), pass by pass.

    Example: lamella trace smollm2 --plan plan.json --prompt "Why is the sky blue?" -o traced

    Args:
        model: a model, or a folder written by Lamella, with its plan.
        plan: a dynamic plan.
        image: an image that the prompt is about, for a model of images and text.
        prompt: the prompt.
        alpha: without a plan, the share of the growth so far above which a layer is active.
        tokens: maximum number of new tokens.
        steps: denoising steps of a model that predicts masked tokens; defaults to one per token.

    Returns:
        The trace, as findings.

    Raises:
        PlanError: for a plan that is not dynamic, or no plan for a model that predicts masked tokens.
    """
    stack = predicting_stack(model.running if plan is None else model.whole)
    source = stack.path or stack.name
    grid, shown = None, {}
    if image is None:
        tokenizer = open_tokenizer(source)
        inputs: dict[str, Any] = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], stack.device)
    else:
        processing = open_processing(stack, source)
        tokenizer = processing.tokenizer
        inputs = {name: each.to(stack.device) for name, each in processing.question(prompt, [image.pixels]).items()}
        shown, grid = {"image": png(processing.visible(image.pixels))}, processing.grid(inputs)
    found = trace_answer(stack, tokenizer, inputs, plan, alpha=alpha, tokens=tokens, steps=steps, grid=grid)
    return Study(findings=found | shown)
