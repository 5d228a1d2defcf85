"""The server of the page: viser's, which answers nobody who does not know the link, and no page but its own.

The link holds a random token, as Jupyter's does. It stands in the path, since viser's page opens its websocket at the
path that it was loaded from. Whatever else a client sends, the terminal shows no traceback of it.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import secrets
from collections.abc import Callable
from contextlib import redirect_stdout
from http import HTTPStatus
from typing import Any
from unittest.mock import patch

from lamella.extras import require

HERE = "127.0.0.1"
REFUSED = "Open the whole link that `lamella run agile3d label` has printed.\n"
Admit = Callable[[Any, Any], Any]  # a connection and a request: a response, or None to go on to the websocket


def served(port: int) -> Any:
    """A server of viser on the loopback interface, without viser's tunnel.

    Its ``token`` is random; only requests whose path begins with it are answered, and only websockets of its own page.

    Raises:
        LamellaError: when viser is missing.
    """
    viser, websockets = (require(each, "click", "the page") for each in ("viser", "websockets.asyncio.server"))
    secret = secrets.token_urlsafe(32)
    silent = logging.Logger("agile3d", logging.CRITICAL + 1)
    serve = websockets.serve

    class Here(viser.ViserServer):  # type: ignore[name-defined]
        token = secret

        def request_share_url(self, verbose: bool = True) -> None:
            """Do nothing: a page may ask for the tunnel."""

    def guarded(*args: Any, process_request: Admit, **options: Any) -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # messages that viser cannot read
        return serve(*args, process_request=admitting(secret, process_request), logger=silent, **options)

    with patch.object(websockets, "serve", guarded), redirect_stdout(io.StringIO()):  # it prints its address
        return Here(HERE, port, label="agile3d", verbose=False)


def admitting(token: str, answer: Admit) -> Admit:
    """Requests that know the token are answered, without it in their path; websockets from other origins are not.

    Args:
        token: what the path begins with.
        answer: to those that are admitted.
    """

    def admit(connection: Any, request: Any) -> Any:
        first, _, rest = request.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(first.encode("utf-8", "surrogateescape"), token.encode()):
            return connection.respond(HTTPStatus.FORBIDDEN, REFUSED)
        request.path = f"/{rest}"
        port = connection.local_address[1]
        own = [[f"http://{host}:{port}"] for host in (HERE, "localhost")]
        if request.headers.get_all("Upgrade") and request.headers.get_all("Origin") not in own:
            return connection.respond(HTTPStatus.FORBIDDEN, REFUSED)
        return answer(connection, request)

    return admit
