"""The ``serve`` command."""

from __future__ import annotations

import hmac
import inspect
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, errors, print_json, working
from lamella.errors import MethodError
from lamella.extras import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")
IPV6 = ("[", "[::1]")  # what the check of host names reads in http://[::1]:8000
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
TOKEN = "LAMELLA_TOKEN"


@app.command()
def serve(
    model: ModelArgument,
    plan_file: Annotated[str | None, typer.Option("--plan", help="Plan to apply to the model.")] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Proposes tokens, to decode faster: lookup, or a smaller model with the same tokenizer."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of requests that are answered together.")] = 16,
    host: Annotated[
        str, typer.Option(help=f"Address to serve on. Others than this machine's own need {TOKEN}.")
    ] = LOOPBACK[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 chooses a free one.")] = 8000,
    json: JsonOption = False,
) -> None:
    """Serve a model, with or without a plan, to any client of the OpenAI protocol: chat, completions, streaming.

    Requests are answered together. Clients on other machines have to send the token that the environment variable
    LAMELLA_TOKEN holds as their API key. Ctrl-C ends the server.

    Example: lamella serve smollm2 --plan plan.json --draft lookup
    """
    token = os.environ.get(TOKEN)
    if host not in LOOPBACK and not token:
        raise MethodError(f"host {host} can be reached from other machines: set {TOKEN} to a secret that clients send")
    uvicorn = require("uvicorn", "serve", "the server")
    with working():
        server = build(model, plan_file, draft, rows, token, LOOPBACK if host in LOOPBACK else None)
    config = uvicorn.Config(server, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    running = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # whoever reads the address may ask at once
    address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}/v1"
    if json:
        print_json({"model": model, "plan": plan_file, "url": address})
    else:
        errors.print(f"{model} is served at [bold]{address}[/bold]. Ctrl-C ends the server.", highlight=False)
    running.run(sockets=[socket])


def build(
    model: str, plan_file: str | None, draft: str | None, rows: int, token: str | None, hosts: Sequence[str] | None
) -> Any:
    """Return the application of a server.

    Args:
        model: the model.
        plan_file: a plan for it.
        draft: what proposes tokens.
        rows: maximum number of requests that are answered together.
        token: what clients have to send; None asks for nothing.
        hosts: names under which clients may address it; None accepts all.

    Raises:
        MethodError: for a model that does not continue text, or a draft that does not fit.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server

    from lamella.cli.serving.serving import open_served, seeded

    given = open_served(model, plan_file, draft, rows)
    known = given | {
        "chat_handler": seeded(ChatCompletionHandler)(**given),
        "completion_handler": seeded(CompletionHandler)(**given),
        "response_handler": seeded(ResponseHandler)(**given),
    }
    parameters = inspect.signature(build_server).parameters.values()
    needed: dict[str, Any] = {each.name: known.get(each.name) for each in parameters if each.default is each.empty}
    server = build_server(**needed)
    server.router.routes[:] = [each for each in server.router.routes if getattr(each, "path", "") in ANSWERED]
    if hosts is not None:  # a page in a browser on this machine cannot ask under a name of its own
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts, *IPV6])

    @server.middleware("http")
    async def admitted(request: Request, answer: Any) -> Any:
        sent = request.headers.get("Authorization", "").encode()
        if token is not None and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            return JSONResponse({"error": {"message": "send the token of this server as your API key"}}, 401)
        try:
            return await answer(request)
        except Exception as error:
            status = 400 if isinstance(error, ValueError | TypeError | KeyError) else 500  # 400: a tokenizer refuses it
            return JSONResponse({"error": {"message": f"{type(error).__name__}: {error}"}}, status)

    return server
