"""What protects the annotation page: response headers, signed forms, limits of rate and size."""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from time import monotonic
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MAX_BODY = 4096
"""Bytes of a form; its own fields take some 300."""
_MAX_FIELDS = 20
_MAX_CLIENTS = 10_000
"""Clients whose rate is remembered."""


def content_security_policy(script_hash: str, style_hash: str) -> str:
    """Return the policy of a page with one script and one style, both inline; nothing is loaded."""
    return (
        f"default-src 'none'; script-src '{script_hash}'; style-src '{style_hash}'; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )


class SecurityHeaders:
    """ASGI middleware that adds headers to every response, those of errors included."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app = app
        self._headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "X-Robots-Tag": "noindex",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class RateLimiter:
    """A token bucket for each client.

    Args:
        rate: requests a second that a client may make for ever.
        burst: requests that it may make at once.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By client, the one longest unseen first: requests left, and when that was counted."""

    def check(self, client: str) -> None:
        """Count a request.

        Raises:
            HTTPException: 429, the client has made too many.
        """
        now = monotonic()
        left, counted = self._buckets.pop(client, (float(self._burst), now))
        left = min(left + (now - counted) * self._rate, self._burst)
        is_allowed = left >= 1
        self._buckets[client] = (left - is_allowed, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not is_allowed:
            raise HTTPException(429, headers={"Retry-After": "1"})


def sign(key: bytes, *parts: str | int) -> str:
    """Return the signature of what a form is about, as hex digits."""
    message = "\n".join(f"{len(str(part))} {part}" for part in parts)
    return hmac.new(key, message.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def is_signed(key: bytes, signature: str, *parts: str | int) -> bool:
    """Return whether a form was signed with this key."""
    return hmac.compare_digest(signature.encode("utf-8", "replace"), sign(key, *parts).encode())


def refuse_other_sites(request: Request) -> None:
    """Refuse a form that another site sends, as far as the browser tells.

    Raises:
        HTTPException: 403, the page that sent it is of another origin.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403)


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a URL-encoded form.

    Raises:
        HTTPException: 413, it is too large; 400, it is not valid, or has a field twice.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(413)
    try:
        pairs: Sequence[tuple[str, str]] = parse_qsl(
            body.decode("ascii"), strict_parsing=True, max_num_fields=_MAX_FIELDS, errors="strict"
        )
    except ValueError as error:
        raise HTTPException(400) from error
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise HTTPException(400)
    return fields
