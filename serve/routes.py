"""HTTP in front of the handlers: readiness, bodies, statuses, headers, the paths and their OpenAPI description.

Liveness (`/health`) and readiness (`/ready`) differ: the port answers while programs are still being compiled. What is
wrong with a request is told in the body that the path's clients read.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pydantic.json_schema
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jaxsearch.errors import InputError
from serve.batcher import DeadlineExceeded, QueueFull, Stopped
from serve.dialects import (
    CohereEmbedBody,
    EmbeddingsBody,
    MixedbreadRerankBody,
    RerankBody,
    TeiEmbedBody,
    TeiRerankBody,
    VoyageRerankBody,
)
from serve.engine import Engine
from serve.handlers import Call, ClientLeft, Limits, Reply, Service
from serve.pages import add_pages
from serve.protocol import (
    ERROR_REPLIES,
    PairsBody,
    RequestError,
    ScoreBody,
    SearchBody,
    SearchReplyBody,
    as_tei,
    error_body,
    error_dialect,
    parse,
    read_milliseconds,
    to_json,
)

LARGE_BODY_BYTES = 256 * 1024
"""Bodies above this are parsed in a thread."""
TOO_LARGE = "body_too_large"
DRAIN_SECONDS = 10
"""For so long what still comes of a refused body is read."""
STARTING_SECONDS = 5
STOPPING = "the server is shutting down"
MAX_REQUEST_ID = 128
TIMEOUT_HEADER = "x-timeout-ms"
TIMEOUT_PARAMETER = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Milliseconds from the request's arrival after which the reply is of no use.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
RERANK_BODIES = (RerankBody, VoyageRerankBody, MixedbreadRerankBody, TeiRerankBody)
SCHEMA_PLACE = "#/components/schemas/{model}"

log = logging.getLogger("jaxsearch.serve")


async def _answer(
    service: Service, request: Request, handler: Callable[[Call], Awaitable[Reply]]
) -> Response:
    """Runs a handler and turns whatever it raises into the path's error body."""
    begun, arrived = time.perf_counter(), time.monotonic()
    path = request.url.path
    request_id = request.headers.get("x-request-id", "")[:MAX_REQUEST_ID].strip() or uuid.uuid4().hex
    headers = {"x-request-id": request_id, "x-model-revision": service.engine.bundle.revision}
    body: dict[str, Any] = {}
    response_class = Response
    try:
        _check_ready(service.engine)
        raw = await _read_body(request, service.limits.max_body_bytes)
        if len(raw) > LARGE_BODY_BYTES:
            body = await asyncio.get_running_loop().run_in_executor(service.executor, parse, raw)
        else:
            body = parse(raw)
        is_strict = request.query_params.get("strict") in ("1", "true")
        call = Call(request, body, is_strict, arrived, service.engine.expected_by(arrived))
        if (timeout := request.headers.get(TIMEOUT_HEADER)) is not None:
            call.end_within(read_milliseconds(timeout, TIMEOUT_HEADER))
        reply = await handler(call)
        call.seconds["total"] = time.perf_counter() - begun
        for stage, seconds in call.seconds.items():
            service.engine.telemetry.stage_seconds.labels(stage).observe(seconds)
        timings = {stage: round(1000 * seconds, 3) for stage, seconds in call.seconds.items()}
        if isinstance(reply, dict):  # some clients expect a bare list
            reply = {"timings_ms": timings, **reply, "warnings": call.warnings}
        status, content = 200, to_json(reply)
    except (ClientLeft, ClientDisconnect):
        status, content = 499, b""
    except Exception as error:  # every failure is told in the dialect of the path, and the server lives on
        refusal = _as_request_error(error, request_id)
        dialect = error_dialect(path, body)
        if dialect == "tei":
            refusal = as_tei(refusal)
        if refusal.code == TOO_LARGE and request.state.is_unread:
            response_class, headers["connection"] = _EarlyResponse, "close"
        status = refusal.status
        content = to_json(error_body(refusal, dialect=dialect, request_id=request_id))
        if refusal.retry_after_seconds is not None:
            headers["retry-after"] = str(math.ceil(refusal.retry_after_seconds))
            headers["retry-after-ms"] = str(math.ceil(1000 * refusal.retry_after_seconds))
    if service.engine.state == "stopping":
        headers["connection"] = "close"
    service.engine.telemetry.requests.labels(path, str(status)).inc()
    service.engine.telemetry.request_seconds.labels(path).observe(time.perf_counter() - begun)
    return response_class(content, status, headers, media_type="application/json")


def _as_request_error(error: Exception, request_id: str) -> RequestError:
    match error:
        case RequestError():
            return error
        case InputError():
            return RequestError(400, str(error))
        case QueueFull():
            return RequestError(
                429, str(error), code="queue_full", retry_after_seconds=max(error.retry_after_seconds, 0.05)
            )
        case DeadlineExceeded():
            return RequestError(504, str(error), code="deadline_exceeded")
        case Stopped():
            return RequestError(503, str(error), code="stopping", retry_after_seconds=STARTING_SECONDS)
    log.error("request %s failed", request_id, exc_info=error)
    return RequestError(500, f"internal error; the server's log has it under {request_id}", code="internal")


def _check_ready(engine: Engine) -> None:
    if engine.state == "failed":
        raise RequestError(503, f"not ready: {engine.failure}", code="not_ready", retry_after_seconds=60)
    if engine.state == "stopping":
        raise RequestError(503, STOPPING, code="stopping", retry_after_seconds=STARTING_SECONDS)
    if engine.state != "ready":
        raise RequestError(
            503, f"not ready: {engine.state}", code="not_ready", retry_after_seconds=STARTING_SECONDS
        )


async def _read_body(request: Request, limit: int) -> bytes:
    """The body.

    Raises: RequestError 413 as soon as its header or what came of it says that it is too large; then
        `request.state.is_unread` says whether more comes. ClientDisconnect.
    """
    chunks, size, is_unread = [], 0, True
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > limit
    while is_unread and not is_too_large:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        is_unread, is_too_large = message.get("more_body", False), size > limit
    if is_too_large:
        request.state.is_unread = is_unread
        message = f"the body has {declared or f'over {limit}'} bytes, at most {limit} are allowed; split the request"
        raise RequestError(413, message, code=TOO_LARGE)
    return b"".join(chunks)


class _EarlyResponse(Response):
    """Sent before the body is read. What comes of that is dropped, for a while: a client that still sends would
    otherwise not see the reply."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})


def create_app(
    engine: Engine, limits: Limits | None = None, *, on_prepared: Callable[[], None] | None = None
) -> FastAPI:
    """The application. On start-up it prepares the engine in a thread and calls `on_prepared` after that, ready or
    failed; on shutdown it answers what is queued."""
    service = Service(engine, limits or Limits())

    def prepare() -> None:
        try:
            engine.prepare()
        except InputError:
            pass  # `engine.failure` has it for whoever asks
        except Exception as error:
            log.error("not ready: %s", error, exc_info=True)
        if on_prepared is not None:
            on_prepared()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread = threading.Thread(target=prepare, name="prepare", daemon=True)
        thread.start()
        yield
        await asyncio.to_thread(thread.join)
        await asyncio.to_thread(engine.close)
        engine.telemetry.close()
        service.executor.shutdown()

    app = FastAPIOffline(
        title="jaxsearch",
        lifespan=lifespan,
        redoc_url=None,
        static_url="/web/api",
        favicon_url="/web/icon.svg",
    )
    posts = [
        (service.search, ("/v1/search",), (SearchBody,)),
        (service.rerank, ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking"), RERANK_BODIES),
        (service.score, ("/v1/score", "/score"), (ScoreBody, PairsBody)),
        (service.embeddings, ("/v1/embeddings", "/embeddings"), (EmbeddingsBody,)),
        (service.embeddings, ("/v2/embed",), (CohereEmbedBody,)),
        (service.embeddings, ("/embed",), (TeiEmbedBody,)),
    ]
    for handler, paths, bodies in posts:
        for path in paths:
            _add_post(app, service, path, handler, bodies)
    _add_gets(app, service)
    add_pages(app)
    bodies = [body for _, _, bodies in posts for body in bodies]
    _describe(app, [*bodies, SearchReplyBody, *ERROR_REPLIES.values()])

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow", "")
        told = f"not allowed, use {allowed}" if allowed else error.detail.lower()
        message = f"{request.method} {request.url.path}: {told}; /docs lists what there is"
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        refusal = RequestError(error.status_code, message, code=code)
        dialect = error_dialect(request.url.path, {})
        content = to_json(error_body(refusal, dialect=dialect, request_id=uuid.uuid4().hex))
        return Response(content, error.status_code, error.headers, media_type="application/json")

    return app


def _add_post(
    app: FastAPI,
    service: Service,
    path: str,
    handler: Callable[[Call], Awaitable[Reply]],
    bodies: Sequence[type[pydantic.BaseModel]],
) -> None:
    async def endpoint(request: Request) -> Response:
        return await _answer(service, request, handler)

    dialects = dict.fromkeys(error_dialect(path, dict.fromkeys(body.model_fields)) for body in bodies)
    refused = _json_content([ERROR_REPLIES[dialect] for dialect in dialects])
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_model=None,
        responses={
            **({200: {"content": _json_content([SearchReplyBody])}} if SearchBody in bodies else {}),
            "4XX": {"description": "Refused: the message says what to change", "content": refused},
            "5XX": {"description": "Not ready, too late, or a failure of the server", "content": refused},
        },
        summary=path.rpartition("/")[2].capitalize(),
        description=" ".join((bodies[0].__doc__ or "").split()),
        openapi_extra={
            "parameters": [TIMEOUT_PARAMETER],
            "requestBody": {"required": True, "content": _json_content(bodies)},
        },
    )


def _json_content(models: Sequence[type[pydantic.BaseModel]]) -> dict[str, Any]:
    """JSON of one of these, for `/openapi.json`."""
    schemas = [{"$ref": SCHEMA_PLACE.format(model=model.__name__)} for model in models]
    return {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}


def _describe(app: FastAPI, models: Sequence[type[pydantic.BaseModel]]) -> None:
    """Puts the schemas of bodies and errors, which are checked by hand and not by FastAPI, into `/openapi.json`."""
    mode: pydantic.json_schema.JsonSchemaMode = "validation"
    _, found = pydantic.json_schema.models_json_schema(
        [(model, mode) for model in models], ref_template=SCHEMA_PLACE
    )

    def openapi() -> dict[str, Any]:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        return described | {"components": {"schemas": found["$defs"]}}

    app.openapi = openapi


def _add_gets(app: FastAPI, service: Service) -> None:
    engine = service.engine

    def reply(value: Reply, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        return Response(to_json(value), status, headers, media_type="application/json")

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return reply({"status": "alive", "state": engine.state})

    @app.get("/ready", responses={503: {"description": "Not ready; the message says why"}})
    async def ready() -> Response:
        try:
            _check_ready(engine)
        except RequestError as error:
            seconds = str(math.ceil(error.retry_after_seconds or STARTING_SECONDS))
            return reply({"state": engine.state, "message": error.message}, 503, {"retry-after": seconds})
        return reply({"state": engine.state, "num_programs": engine.num_programs})

    @app.get("/info")
    @app.get("/server_info")
    @app.get("/get_server_info")
    async def info() -> Response:
        return reply(service.info())

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> Response:
        return reply(service.models())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        engine.telemetry.queue_tokens.set(engine.batcher.queue_tokens)
        engine.telemetry.running_seconds.set(engine.batcher.running_seconds)
        return Response(engine.telemetry.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
