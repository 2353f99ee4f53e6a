"""The app: OpenAI's endpoints over an engine."""

from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer

from dspark import __version__
from dspark.errors import TargetError
from dspark.server import schemas
from dspark.server.answers import chat_choice, completion_choice, usage
from dspark.server.asks import chat_asks, completion_asks
from dspark.server.gate import Gate
from dspark.server.refusal import install
from dspark.server.schemas import ChatRequest, CompletionRequest
from dspark.server.service import Options, Service
from dspark.server.stream import Chunks, Stream


def make_app(engine: Any, options: Options, metrics: Any = None, canary: Any = None) -> FastAPI:
    """An app that answers from `engine` (dspark.engine.request says what that is). `app.state.close(seconds)` refuses new
    requests and lets those running finish within that time; a `metrics` (server/metrics.py) gets its pages.

    Raises `TargetError` for a target without a tokenizer."""
    if engine.target.tokenizer is None:
        raise TargetError("this target has no tokenizer, so its answers would have no text", "put tokenizer files into its folder")
    app = FastAPI(title="dspark", version=__version__, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    service = Service(engine, options, metrics, canary)
    app.state.closing, app.state.close, app.state.retry_seconds = service.closing, service.close, service.retry_seconds
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, service=service)
    install(app)
    add_endpoints(app, service)
    if metrics is not None:
        from dspark.server.mount import mount

        mount(app, metrics)
    return app


# ---- endpoints

SPECULATION = Annotated[Literal["auto", "off"] | None, Header(description="as the field `speculation`, which wins")]
ERRORS = {
    400: {"description": "the request has a fault, which `error.message` names"},
    401: {"description": "the API key is missing or wrong"},
    404: {"description": "no such model"},
    413: {"description": "the request is too large"},
    429: {"description": "all places are taken; Retry-After says when to try again"},
    500: {"description": "the server failed"},
    503: {"description": "the server is closing"},
    504: {"description": "the answer took longer than this server allows"},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] | {"model": schemas.Error} for status in statuses}


def answered(model: type, *statuses: int) -> dict[int | str, dict[str, Any]]:
    events: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 has no schema for what comes event by event
    return {200: {"model": model, "content": events, "description": "the answer; with `stream`, its chunks"}, **errors(*statuses)}


def add_endpoints(app: FastAPI, service: Service) -> None:
    key = [Depends(HTTPBearer(auto_error=False, scheme_name="key"))] if service.options.api_key else []  # documents it; the gate checks it
    every = tuple(ERRORS) if key else tuple(status for status in ERRORS if status != 401)
    reading = tuple(status for status in every if status in (401, 503))

    @app.post("/v1/chat/completions", dependencies=key, responses=answered(schemas.ChatCompletion, *every))
    async def chat(body: ChatRequest, request: Request, x_dspark_speculation: SPECULATION = None) -> Response:
        """Answer a conversation."""
        exchange = await service.begin(chat_asks, body, x_dspark_speculation)
        if body.stream:
            return Stream(exchange, Chunks(service, exchange, body, service.head("chat.completion.chunk", "chatcmpl")).events())
        await service.whole(exchange, request)
        choices = [chat_choice(index, answer, service.vocabulary) for index, answer in enumerate(exchange.answers)]
        return JSONResponse(service.head("chat.completion", "chatcmpl") | {"choices": choices, "usage": usage(exchange.answers)})

    @app.post("/v1/completions", dependencies=key, responses=answered(schemas.Completion, *every))
    async def complete(body: CompletionRequest, request: Request, x_dspark_speculation: SPECULATION = None) -> Response:
        """Continue a text."""
        exchange = await service.begin(completion_asks, body, x_dspark_speculation)
        if body.stream:
            return Stream(exchange, Chunks(service, exchange, body, service.head("text_completion", "cmpl")).events())
        await service.whole(exchange, request)
        choices = [completion_choice(index, answer, answer.whole, service.vocabulary) for index, answer in enumerate(exchange.answers)]
        return JSONResponse(service.head("text_completion", "cmpl") | {"choices": choices, "usage": usage(exchange.answers)})

    @app.get("/v1/models", dependencies=key, response_model=schemas.Models, responses=errors(*reading))
    async def models() -> dict:
        """The model this server has."""
        return {"object": "list", "data": [service.model]}

    @app.get("/v1/models/{model:path}", dependencies=key, response_model=schemas.Model, responses=errors(404, *reading))
    async def model_named(model: str) -> dict:
        service.check_model(model)
        return service.model

    @app.get("/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
    async def health() -> JSONResponse:
        """200, or 503 while the server closes."""
        closing = service.closing.is_set()
        state = {
            "status": "closing" if closing else "ok", "model": service.options.model,
            "running": len(service.engine.running), "waiting": len(service.engine.waiting),
        }  # fmt: skip
        return JSONResponse(state, 503 if closing else 200)


def document(app: FastAPI) -> dict:
    """The OpenAPI document, without the status FastAPI adds for what is a 400 here."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema
