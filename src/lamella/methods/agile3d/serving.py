"""The web server of the page: viser's, restricted to clients that know the link and to its own page.

The link contains a random token, as Jupyter's does. It is part of the path, since viser's page opens its websocket at
the path that it was loaded from. Invalid messages from clients print no traceback to the terminal.
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

LOOPBACK = "127.0.0.1"
REFUSED = "Open the whole link that `lamella run agile3d label` has printed.\n"
Admit = Callable[[Any, Any], Any]  # connection and request to a response, or None to proceed to the websocket


def create_server(port: int) -> Any:
    """Start a viser server on the loopback interface, without viser's tunnel.

    Its ``token`` is random; only requests whose path begins with it are answered, and only websockets of its own page.

    Args:
        port: port to serve on; 0 chooses a free one.

    Raises:
        LamellaError: if viser is not installed.
    """
    viser, websockets = (require(each, "click", "the page") for each in ("viser", "websockets.asyncio.server"))
    secret = secrets.token_urlsafe(32)
    silent = logging.Logger("agile3d", logging.CRITICAL + 1)
    serve = websockets.serve

    class LoopbackServer(viser.ViserServer):  # type: ignore[name-defined]
        token = secret

        def request_share_url(self, verbose: bool = True) -> None:
            """Do nothing: a page may ask for the tunnel."""

    def guarded(*args: Any, process_request: Admit, **options: Any) -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # messages viser cannot decode
        return serve(*args, process_request=require_token(secret, process_request), logger=silent, **options)

    with patch.object(websockets, "serve", guarded), redirect_stdout(io.StringIO()):  # viser prints its address
        return LoopbackServer(LOOPBACK, port, label="agile3d", verbose=False)


def require_token(token: str, answer: Admit) -> Admit:
    """Wrap a request handler: requires the token and strips it from the path; refuses websockets from other origins.

    Args:
        token: the first component of the path.
        answer: handler of admitted requests.
    """

    def admit(connection: Any, request: Any) -> Any:
        first, _, rest = request.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(first.encode("utf-8", "surrogateescape"), token.encode()):
            return connection.respond(HTTPStatus.FORBIDDEN, REFUSED)
        request.path = f"/{rest}"
        port = connection.local_address[1]
        own = [[f"http://{host}:{port}"] for host in (LOOPBACK, "localhost")]
        if request.headers.get_all("Upgrade") and request.headers.get_all("Origin") not in own:
            return connection.respond(HTTPStatus.FORBIDDEN, REFUSED)
        return answer(connection, request)

    return admit
