"""The ``chat`` command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, errors, out, print_json, working
from lamella.errors import MethodError


@app.command()
def chat(
    model: ModelArgument,
    plan_file: Annotated[str | None, typer.Option("--plan", help="Plan to apply to the model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit.")] = None,
    tokens: Annotated[int, typer.Option(help="Maximum number of new tokens per answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    draft: Annotated[
        str | None,
        typer.Option(help="Proposes tokens, to decode faster: lookup, or a smaller model with the same tokenizer."),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Chat with a model, with or without a plan, or with an exported checkpoint; answers are streamed.

    An empty line ends the chat.

    Example: lamella chat smollm2 --plan plan.json
    """
    import torch

    from lamella.cli.generator import open_generator
    from lamella.evaluate.speed import denoises
    from lamella.runtime import Drafted

    with working():
        _, view, tokenizer, opened = open_generator(model, plan_file, draft)
    if denoises(view):
        raise MethodError(
            f"{model} predicts masked tokens, but chat generates one token after the other: use lamella.runtime.denoise"
        )
    generator = Drafted(view, opened)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    messages: list[dict[str, str]] = []
    while (message := prompt if prompt is not None else out.input("[bold]you> [/bold]")).strip():
        messages.append({"role": "user", "content": message})
        answer = _answer(generator, tokenizer, messages, settings, show=not json)
        messages.append({"role": "assistant", "content": answer})
        if gain := str(generator):
            errors.print(f"[dim]{gain}[/dim]", highlight=False)
        if prompt is not None:
            break
    if json:
        print_json({"model": model, "plan": plan_file, "messages": messages})


def _answer(
    generator: Any, tokenizer: Any, messages: list[dict[str, str]], settings: dict[str, Any], show: bool
) -> str:
    """Generate one answer to the whole conversation; every turn is encoded again, since plans may require it."""
    from transformers import TextStreamer

    from lamella.zoo import chat_inputs

    inputs = chat_inputs(tokenizer, messages, generator.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    ids = generator.generate(**inputs, **settings, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
