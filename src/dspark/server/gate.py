"""What is checked before a request is read: the key, the size, and that the server is open."""

import secrets

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.server.refusal import Refusal, busy
from dspark.server.service import Service


class Gate:
    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self.refuse(scope["path"], headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, self.counted(receive), send)

    def refuse(self, path: str, headers: Headers) -> Refusal | None:
        options = self.service.options
        if path.startswith("/v1/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else ""
            # headers are bytes that were read as latin-1
            if options.api_key and not secrets.compare_digest(given.encode("latin-1"), options.api_key.encode()):
                message = "send the server's API key: Authorization: Bearer KEY" if not given else "this is not the server's API key"
                return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            if self.service.closing.is_set():
                return busy(closing=True)
        size = headers.get("content-length", "")
        return self.too_large() if size.isdecimal() and int(size) > options.max_request_bytes else None

    def too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self.service.options.max_request_bytes} bytes", code="request_too_large")

    def counted(self, receive: Receive) -> Receive:
        """For bodies that come in chunks and do not say their size."""
        size = 0

        async def counting() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.service.options.max_request_bytes:
                raise HTTPException(413, self.too_large().message)
            return message

        return counting
