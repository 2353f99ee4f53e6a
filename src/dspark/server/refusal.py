"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dspark.errors import Busy, UserError
from dspark.server.schemas import ChatRequest, CompletionRequest, Message

log = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

# Errors of fields that do not fit together (schemas.py) are of the type of the field that is meant.
OUR_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *Message.model_fields}

# Of errors that FastAPI raises itself
OF_STATUS = {
    # its only one: what Python's JSON reader cannot take
    400: "the body is not JSON that can be read: not UTF-8, nested too deeply, or a number too long",
    404: "nothing is at this path; there are /v1/chat/completions, /v1/completions and /v1/models, and /openapi.json describes them",
}


class Refusal(Exception):
    """A request that is not answered, or not to its end: the HTTP status, why, and what of the request is meant."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def busy(closing: bool, retry_seconds: float = 1.0) -> Refusal:
    wait = {"Retry-After": str(max(1, math.ceil(retry_seconds)))}
    if closing:
        return Refusal(503, "the server is closing", code="closing", headers=wait)
    return Refusal(429, "all places are taken, those for waiting too; try again later", code="queue_full", headers=wait)


def refusal(error: BaseException, closing: bool = False, retry_seconds: float = 1.0) -> Refusal:
    """What a client is told of an error: its own mistakes in full, ours in the log."""
    match error:
        case Refusal():
            return error
        case Busy():
            return busy(closing, retry_seconds)
        case UserError():
            return of_user(error)
        case RequestValidationError():
            return of_validation(error.errors())
        case HTTPException():
            return Refusal(error.status_code, OF_STATUS.get(error.status_code, str(error.detail)), headers=dict(error.headers or {}))
        case RecursionError():
            return Refusal(400, "the request is nested too deeply")
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed on this request; its log says why")


def of_user(error: UserError, param: str | None = None) -> Refusal:
    return Refusal(400, error.message + (f" ({error.hint})" if error.hint else ""), param)


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Mistakes of a user that are found within are in this field of the request."""
    try:
        yield
    except UserError as error:
        raise of_user(error, param) from error


def of_validation(errors: Sequence[dict]) -> Refusal:
    """The error that went deepest, and not for its type if another is as deep: of the members of a union, the one that was meant."""
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    kind, message, loc = error["type"], error["msg"], error["loc"]
    if kind == "json_invalid":
        return Refusal(400, f"the body is not JSON ({error['ctx']['error']} at character {loc[-1] + 1})")
    if loc == ("body",) and isinstance(error.get("input"), bytes):  # FastAPI reads no other type
        return Refusal(400, "the body was not read as JSON: send the header Content-Type: application/json with it")
    if loc == ("body",) and kind in ("model_attributes_type", "missing"):
        return Refusal(400, "the body is not a JSON object: send one")
    steps = [step for step in loc[1:] if isinstance(step, int) or not ("[" in step or step in ("str", "list", "TextPart"))]
    if kind in OUR_FIELDS and steps[-1:] != [kind]:
        steps.append(kind)
    param = ".".join(map(str, steps)) or None
    if kind in ("extra_forbidden", "none_required"):
        return Refusal(400, f"{param} is not supported", param, "unknown_parameter")
    message = message[0].lower() + message[1:]
    return Refusal(400, f"{param}: {message}" if param else message, param, "missing" if kind == "missing" else "invalid_value")


def install(app: FastAPI) -> None:
    """Answer every error of the app in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        closing, retry = request.app.state.closing.is_set(), request.app.state.retry_seconds()
        return refusal(error, closing, retry).response()

    for kind in (Refusal, UserError, RequestValidationError, HTTPException, RecursionError, Exception):
        app.add_exception_handler(kind, answer)
