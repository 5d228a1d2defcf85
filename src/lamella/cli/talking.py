"""The commands that talk to a model, and look at it while it answers."""

from __future__ import annotations

from pathlib import Path
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

    from lamella.cli.measuring import open_changed
    from lamella.evaluate.speed import denoises
    from lamella.zoo import load, open_tokenizer

    with working():
        stack = load(model)
        tokenizer = open_tokenizer(stack.path or model)
    if denoises(stack.model):
        raise MethodError(
            f"{model} predicts masked tokens, and chat writes one after the other: use lamella.runtime.denoise"
        )
    speaker = stack.model if plan_file is None else open_changed(plan_file, stack)
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


@app.command()
def trace(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What the model answers.")] = "What is the capital of France?",
    plan_file: Annotated[str | None, typer.Option("--plan", help="A plan that decides while the model runs.")] = None,
    alpha: Annotated[
        float, typer.Option(help="Without a plan: how much of the growth so far an active layer adds.")
    ] = 0.8,
    tokens: Annotated[int, typer.Option(help="The most new tokens.")] = 32,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write this page, such as trace.html.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Token by token and layer by layer: what ran while a model answered.

    With a plan that decides while the model runs (ffn-skip, first, lora-drop, void, unified-skip), what it ran and
    why. Without one nothing is skipped, and a layer shows where it was active for the token: where the norm of the
    token's stream grew by at least alpha times the range of growth in earlier layers (L2 Adaptive Computation).

    Example: lamella trace smollm2 --plan plan.json --prompt "Why is the sky blue?" -o trace.html
    """
    from lamella.files import write
    from lamella.jobs.trace import trace as run
    from lamella.plan import Plan
    from lamella.report import render_trace
    from lamella.zoo import chat_inputs, load, open_stack, open_tokenizer

    with working():
        stack = open_stack(load(model))
        tokenizer = open_tokenizer(stack.path or model)
        plan = None if plan_file is None else Plan.read(plan_file)
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], stack.device)
        report = run(stack, tokenizer, inputs, plan, alpha=alpha, tokens=tokens)
    if output is not None:
        write(output, render_trace(report))
    if json:
        print_json(report)
        return
    _show(report)
    if output is not None:
        out.print(f"page: {output}", soft_wrap=True)


CELLS = ("[dim]·[/dim]", "▀", "▄", "█")  # nothing, attention, MLP, both
COLOURS = {"first": "yellow", "prompt": "cyan", "answer": "green"}


def _show(report: dict[str, Any]) -> None:
    """One line per token: its layers from left to right."""
    from rich.markup import escape

    out.print(
        f"[bold]{escape(report['model']['name'])}[/bold]: layers 0 to {report['model']['layers'] - 1}, left to right"
    )
    out.print("[dim]█ both sublayers   ▀ attention   ▄ MLP   · nothing[/dim]")
    for token, attn, mlp in zip(report["tokens"], report["attn"], report["mlp"], strict=True):
        cells = "".join(CELLS[int(a) + 2 * int(m)] for a, m in zip(attn, mlp, strict=True))
        text = escape(repr(token["text"])[1:-1][:14].ljust(14))
        out.print(f"{text} [{COLOURS[token['phase']]}]{cells}[/]", highlight=False)
    for phase, share in report["usage"].items():
        out.print(f"[{COLOURS[phase]}]{phase:>7}[/] {100 * share:.1f} % of sublayers", highlight=False)


def _answer(speaker: Any, tokenizer: Any, messages: list[dict[str, str]], settings: dict[str, Any], show: bool) -> str:
    """One answer to the whole conversation; every turn is encoded afresh, as any plan needs it."""
    from transformers import TextStreamer

    from lamella.zoo import chat_inputs

    inputs = chat_inputs(tokenizer, messages, speaker.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    ids = speaker.generate(**inputs, **settings, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
