"""Stands before every route: who may ask, how much may be sent, and what a browser may do with a page.

Without a key only pages of this server may ask, as `serve` has it: a page of another site, whose name is turned to 127.0.0.1 once
it is loaded, still says its own name as Host. A form is taken with the token that only the board's own pages hold.
"""

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from qwenvl_ft.data.fetch import host_of, is_loopback, is_own_page

FORM_BYTES, PICTURE_BYTES = 256 << 10, 32 << 20  # of a form; of one with a picture
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with less a browser says Origin: null of our own forms, too
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def key_of(authorization: str) -> str:
    """The key of an Authorization header: Bearer, or the password of Basic, which browsers ask their user for."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return given.strip() if scheme.lower() == "bearer" else ""


@dataclass
class Guard:
    """ASGI middleware. `key`: who asks must have it; None lets everybody on this machine in."""

    app: Callable[[Any, Any, Any], Awaitable[None]]
    key: str | None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refusal:
            status, what = refusal
            asks = {"www-authenticate": 'Basic realm="qwenvl-ft board", charset="UTF-8"'} if status == 401 else {}
            answer = PlainTextResponse(f"{what}\n", status, asks | {"connection": "close"})
            await answer(scope, receive, guarded_send)
        else:
            await self.app(scope, receive, guarded_send)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """(status, words) of why a request does not get in."""
        called, origin = headers.get("host", ""), headers.get("origin")
        if self.key is not None:
            if not hmac.compare_digest(key_of(headers.get("authorization", "")).encode("utf-8", "replace"), self.key.encode()):
                return 401, "the key is wrong or missing: give it as the password"
        elif len(headers.getlist("host")) != 1 or not is_loopback(host_of(f"//{called}")):
            return 403, "this board asks for no key and is called localhost only"
        if origin is not None and not is_own_page(origin, called):
            return 403, "this board answers no page of another site"
        if method == "POST":
            length = headers.get("content-length", "")
            if not length.isascii() or not length.isdigit():
                return 411, "say how long the form is"
            most = PICTURE_BYTES if path == "/try" else FORM_BYTES
            if int(length[:20]) > most:
                return 413, f"the form has more than {most:,} bytes"
        return None
