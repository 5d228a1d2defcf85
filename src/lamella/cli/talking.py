"""The commands that talk to a model, and look at it while it answers."""

from __future__ import annotations

from math import ceil
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

    from lamella.evaluate.speed import denoises
    from lamella.jobs.checks import check_changed
    from lamella.zoo import open_tokenizer, open_written

    with working():
        for name in (model, plan_file):
            check_changed(name)
        written = open_written(model)
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


@app.command()
def trace(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What the model answers.")] = "What is the capital of France?",
    image: Annotated[
        Path | None, typer.Option(help="A picture that the prompt is about, for a model that reads images.")
    ] = None,
    plan_file: Annotated[str | None, typer.Option("--plan", help="A plan that decides while the model runs.")] = None,
    alpha: Annotated[
        float, typer.Option(help="Without a plan: how much of the growth so far an active layer adds.")
    ] = 0.8,
    tokens: Annotated[int, typer.Option(help="The most new tokens.")] = 32,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of a model that predicts masked tokens; one a token by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write this page, such as trace.html.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Token by token and layer by layer: what ran while a model answered.

    With a plan that decides while the model runs (ffn-skip, first, lora-drop, void, unified-skip, modes, gamma-mod),
    what it ran and why. Without one nothing is skipped, and a layer shows where it was active for the token: where the
    norm of the token's stream grew by at least alpha times the range of growth in earlier layers (L2 Adaptive
    Computation). About a picture, the page shows what ran over the picture itself; of a model that predicts masked
    tokens (dllm-skip, dmllm-token-redundancy), pass by pass.

    Example: lamella trace smollm2 --plan plan.json --prompt "Why is the sky blue?" -o trace.html
    """
    from lamella.data import open_processing
    from lamella.data.pictures import read_picture
    from lamella.evaluate.fidelity import judged
    from lamella.files import write
    from lamella.jobs.checks import check_changed
    from lamella.jobs.trace import trace as run
    from lamella.plan import Plan
    from lamella.report import render_trace
    from lamella.zoo import chat_inputs, open_tokenizer, open_written

    with working():
        for name in (model, plan_file):
            check_changed(name)
        written = open_written(model)
        stack = judged(written.running if plan_file is None else written.whole)
        plan = None if plan_file is None else Plan.read(plan_file)
        picture, grid = None, None
        if image is None:
            tokenizer = open_tokenizer(stack.path or model)
            inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], stack.device)
        else:
            processing = open_processing(stack, model)
            tokenizer, picture = processing.tokenizer, read_picture(image, "--image")
            inputs = {name: each.to(stack.device) for name, each in processing.question(prompt, [picture]).items()}
            picture, grid = processing.seen(picture), processing.grid(inputs)
        report = run(stack, tokenizer, inputs, plan, alpha=alpha, tokens=tokens, steps=steps, grid=grid)
    if output is not None:
        write(output, render_trace(report, picture))
    if json:
        print_json(report)
        return
    _show(report)
    if output is not None:
        out.print(f"page: {output}", soft_wrap=True)


CELLS = ("[dim]·[/dim]", "▀", "▄", "█")  # nothing, attention, MLP, both
LEVELS = "·▁▂▃▄▅▆▇█"  # shares
COLOURS = {"first": "yellow", "image": "magenta", "prompt": "cyan", "answer": "green"}


def _show(report: dict[str, Any]) -> None:
    """One line per token or pass: its layers from left to right."""
    from rich.markup import escape

    out.print(
        f"[bold]{escape(report['model']['name'])}[/bold]: layers 0 to {report['model']['layers'] - 1}, left to right"
    )
    if "passes" in report:
        _show_passes(report)
    else:
        _show_tokens(report)
    for phase, share in report["usage"].items():
        out.print(f"[{COLOURS[phase]}]{phase:>7}[/] {100 * share:.1f} % of sublayers", highlight=False)


def _show_tokens(report: dict[str, Any]) -> None:
    from rich.markup import escape

    out.print("[dim]█ both sublayers   ▀ attention   ▄ MLP   · nothing[/dim]")
    for token, attn, mlp in zip(report["tokens"], report["attn"], report["mlp"], strict=True):
        cells = "".join(CELLS[int(a) + 2 * int(m)] for a, m in zip(attn, mlp, strict=True))
        text = escape(repr(token["text"])[1:-1][:14].ljust(14))
        out.print(f"{text} [{COLOURS[token['phase']]}]{cells}[/]", highlight=False)


def _show_passes(report: dict[str, Any]) -> None:
    from rich.markup import escape

    out.print("[dim]█ for all tokens of the pass   ▄ for half of them   · for none; then what the step committed[/dim]")
    for number, each in enumerate(report["passes"]):
        cells = "".join(LEVELS[ceil(share * (len(LEVELS) - 1))] for share in each["by_layer"])
        committed = "".join(token["text"] for token in report["tokens"] if token["step"] == each["step"])
        out.print(f"pass {number:>3} [green]{cells}[/] {escape(repr(committed)[1:-1])}", highlight=False)


def _answer(speaker: Any, tokenizer: Any, messages: list[dict[str, str]], settings: dict[str, Any], show: bool) -> str:
    """One answer to the whole conversation; every turn is encoded afresh, as any plan needs it."""
    from transformers import TextStreamer

    from lamella.zoo import chat_inputs

    inputs = chat_inputs(tokenizer, messages, speaker.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    ids = speaker.generate(**inputs, **settings, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
