"""ASGI middleware that runs in vLLM's HTTP server and refuses every request without the key.

vLLM's own check covers the paths under /v1, /v2, /inference and /cohere alone, so /collective_rpc, /sleep,
/update_weights, /metrics and others would be open. `expo/serve.py` names this class in `--middleware`.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from expo.rollout.vllm.key import VARIABLE, authorization

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
REFUSAL = b'{"error": "this server needs its key, in the header Authorization: Bearer KEY"}'


class RequireKey:
    """Passes on requests whose only Authorization header has the key; answers all others with status 401.

    Args:
        app: the server's application.

    Raises: RuntimeError if this process's environment holds no key.
    """

    def __init__(self, app: Application) -> None:
        key = os.environ.get(VARIABLE)
        if not key:
            raise RuntimeError(f"the server has no key: {VARIABLE} is not set")
        self._app, self._expected = app, authorization(key).encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
