"""Who may ask the page anything: the browser that was given the token, from the page itself.

Other web pages in the same browser can send requests to this machine, and others on the machine
can reach its ports. A request is refused unless its Host is this server's (against DNS rebinding),
its token is right, and, where it changes something, its Origin is this server's (against forged
forms).
"""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_LIMIT = 16 << 10
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a form's Origin is null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application that lets through what may pass.

    Args:
        port: of this server, on the loopback address.
        token: that the address in the terminal holds; a cookie keeps it.
    """

    def __init__(self, app: ASGIApp, port: int, token: str):
        self._app, self._token = app, token
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._cookie = f"smoldpo-{port}"  # cookies know no ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        answer = self._refusal(scope) or self._entrance(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (answer or self._app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("no such method", 405)
        if headers.get("host", "").lower() not in self._hosts:
            return PlainTextResponse("this page is for this machine alone", 403)
        if scope["method"] == "POST":
            if headers.get("origin") not in {f"http://{host}" for host in self._hosts}:
                return PlainTextResponse("the form does not come from this page", 403)
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > BODY_LIMIT:
                return PlainTextResponse("too much at once", 413)
        return None

    def _entrance(self, scope: Scope) -> Response | None:
        """None where the cookie is right; a token in the address is put into one."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", [""])[0]
        if given and scope["method"] == "GET" and self._is_token(given):
            rest = urlencode(query, doseq=True)
            where = scope["path"] if scope["path"].startswith("/") else "/"
            answer = RedirectResponse("/" + where.lstrip("/") + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(self._cookie, given, httponly=True, samesite="strict")
            return answer
        try:
            cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        kept = cookies.get(self._cookie)
        if kept is not None and self._is_token(kept.value):
            return None
        return PlainTextResponse("Open the address that smoldpo web printed, with its token.", 403)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())
