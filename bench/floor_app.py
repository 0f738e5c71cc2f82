"""A floor: the least a receiver written in Python must do. Read the body, check the signature, answer; store nothing.

`uvicorn bench.floor_app:app`: bare ASGI, no framework.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bench.events import SECRET

_KEY = SECRET.encode()
_ANSWER = b'{"status":"success"}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Answer one request: 200 when it is signed, 400 otherwise."""
    if scope["type"] != "http":
        raise RuntimeError("no lifespan here")
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    header = next((value for name, value in scope["headers"] if name == b"stripe-signature"), b"")
    stamp, _, given = header.partition(b",v1=")
    expected = hmac.digest(_KEY, stamp[2:] + b"." + body, hashlib.sha256).hex().encode()
    status = 200 if hmac.compare_digest(expected, given) else 400
    await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _ANSWER})
