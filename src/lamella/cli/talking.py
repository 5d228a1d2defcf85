"""The command that talks to a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, working
from lamella.errors import MethodError


@app.command()
def chat(
    model: ModelArgument,
    plan_file: Annotated[str | None, typer.Option("--plan", help="Apply this plan first.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop, instead of talking.")] = None,
    tokens: Annotated[int, typer.Option(help="The most new tokens of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Talk to a model, to a plan or to an exported checkpoint; answers stream. End with an empty line.

    Example: lamella chat smollm2 --plan plan.json
    """
    import torch

    from lamella.evaluate.speed import denoises
    from lamella.inputs import check_changed
    from lamella.zoo import open_saved, open_tokenizer

    with working():
        for name in (model, plan_file):
            check_changed(name)
        written = open_saved(model)
        tokenizer = open_tokenizer(written.whole.path or model)
        speaker = written.running.model if plan_file is None else written.view(plan_file)
    if denoises(speaker):
        raise MethodError(
            f"{model} predicts masked tokens, and chat writes one after the other: use lamella.runtime.denoise"
        )
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    messages: list[dict[str, str]] = []
    while (said := prompt if prompt is not None else out.input("[bold]you> [/bold]")).strip():
        messages.append({"role": "user", "content": said})
        answer = _answer(speaker, tokenizer, messages, settings, show=not json)
        messages.append({"role": "assistant", "content": answer})
        if prompt is not None:
            break
    if json:
        print_json({"model": model, "plan": plan_file, "messages": messages})


def _answer(speaker: Any, tokenizer: Any, messages: list[dict[str, str]], settings: dict[str, Any], show: bool) -> str:
    """One answer to the whole conversation; every turn is encoded afresh, as any plan needs it."""
    from transformers import TextStreamer

    from lamella.zoo import chat_inputs

    inputs = chat_inputs(tokenizer, messages, speaker.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    ids = speaker.generate(**inputs, **settings, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
