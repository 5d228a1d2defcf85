"""Token by token and layer by layer: what ran while a model answered a prompt."""

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
        """Check that the file is there."""
        if not Path(name).expanduser().is_file():
            raise CalibrationError(f"no image {name}: give a file that is there")

    def describe(self) -> str:
        """Its name, for provenance."""
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
    """Token by token and layer by layer: what ran while a model answered.

    With a plan that decides while the model runs (ffn-skip, first, lora-drop, void, unified-skip, modes, gamma-mod),
    what it ran and why. Without one nothing is skipped, and a layer shows where it was active for the token: where the
    norm of the token's residual stream grew by at least alpha times the range of growth in earlier layers (L2 Adaptive
    Computation). About an image, the page shows what ran over the image itself; of a model that predicts masked tokens
    (dllm-skip, dmllm-token-redundancy), pass by pass.

    Example: lamella trace smollm2 --plan plan.json --prompt "Why is the sky blue?" -o traced

    Args:
        model: a model, or a folder that Lamella wrote, with its plan.
        plan: a plan that decides while the model runs.
        image: an image that the prompt is about, for a model that reads images.
        prompt: what the model answers.
        alpha: without a plan, how much of the growth so far an active layer adds.
        tokens: the most new tokens.
        steps: denoising steps of a model that predicts masked tokens; one for each token when left out.

    Returns:
        The trace, as findings.

    Raises:
        PlanError: for a plan that decides nothing while the model runs, or no plan for a model that predicts masked
            tokens.
    """
    stack = predicting_stack(model.running if plan is None else model.whole)
    place = stack.path or stack.name
    grid, seen = None, {}
    if image is None:
        tokenizer = open_tokenizer(place)
        inputs: dict[str, Any] = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], stack.device)
    else:
        processing = open_processing(stack, place)
        tokenizer = processing.tokenizer
        inputs = {name: each.to(stack.device) for name, each in processing.question(prompt, [image.pixels]).items()}
        seen, grid = {"image": png(processing.seen(image.pixels))}, processing.grid(inputs)
    found = trace_answer(stack, tokenizer, inputs, plan, alpha=alpha, tokens=tokens, steps=steps, grid=grid)
    return Study(findings=found | seen)
