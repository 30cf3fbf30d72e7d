"""The HTTP routes. Turns bodies into requests of the service, and what comes out of it into answers."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from flowspec import __version__
from flowspec.complaints import Complaints
from flowspec.config import ServerConfig
from flowspec.core import SamplingParams
from flowspec.engine.engine import Engine
from flowspec.errors import TOO_LONG, FlowspecError, UsageError, WorkerError
from flowspec.server import replies
from flowspec.server.answer import Answer
from flowspec.server.feed import Feed
from flowspec.server.guard import Guard, Hosts
from flowspec.server.metrics import Metrics
from flowspec.server.replies import Chats, Completions, Json
from flowspec.server.schemas import (
    NO_LIMIT,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from flowspec.server.service import QueueFullError, Service
from flowspec.server.tokens import Tokens

logger = logging.getLogger("flowspec.server")

DASHBOARD = Path(__file__).parent / "dashboard"
RETRY_AFTER_S = 1
DEFAULT_COMPLETION_TOKENS = 16  # as at OpenAI
_EVENTS = "text/event-stream"


class ModelNotFoundError(UsageError):
    """A request names a model that is not served."""


class Api:
    """What the routes share."""

    def __init__(self, engine: Engine, config: ServerConfig, model: str) -> None:
        self.engine = engine
        self.config = config
        self.model = model
        self.service = Service(engine, config.max_waiting, config.stuck_after_s)
        self.tokens = Tokens(engine)
        self.metrics = Metrics(model)
        self.metrics.watch(self.service)
        self.defaults = engine.served_defaults
        self.start_s = int(time())
        self._complaints = Complaints(logger)
        if (problem := engine.model.chat_template.problem) is not None:
            logger.warning("warning: %s cannot chat: %s", model, problem)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ModelNotFoundError(f"the model {name!r} is not served here, but {self.model!r} is")

    async def generate(
        self,
        http: Request,
        body: GenerateBody,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int | None,
        num_logprobs: int | None,
        shape: Completions,
        echoes: Sequence[str],
    ) -> Response:
        """Run ``n`` choices of each prompt and answer at once, or as a stream."""
        if unknown := body.unknown_fields():
            self._complaints.warn(f"ignored unknown fields: {', '.join(unknown[:20])}")
        jobs: list[tuple[tuple[int, ...], SamplingParams]] = []
        for prompt_ids in prompts:
            wanted = self._max_tokens(prompt_ids, max_tokens)
            for choice in range(body.n):
                params = body.params(
                    self.defaults, wanted, num_logprobs, choice, self.engine.model.checkpoint.vocab_size
                )
                self.engine.check(prompt_ids, params)
                jobs.append((prompt_ids, params))
        name = f"{shape.prefix}-{uuid.uuid4().hex}"
        answer = Answer(self.service, name, body, shape, echoes, self.config.spec_stats)
        answer.submit(jobs)
        if body.stream:
            return _Stream(answer)
        collecting = asyncio.ensure_future(answer.collect())
        leaving = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody reads it
            return _json(collecting.result())
        finally:
            collecting.cancel()
            leaving.cancel()
            answer.cancel()

    def _max_tokens(self, prompt_ids: tuple[int, ...], wanted: int | None) -> int:
        """Tokens to generate; by default as many as there is room for. Raises ``UsageError``."""
        wanted = None if wanted == NO_LIMIT else wanted
        room = self.engine.model.checkpoint.max_positions - len(prompt_ids)
        if wanted is not None and 0 < room < wanted:
            raise UsageError(
                f"max_tokens is {wanted}, but behind the prompt's {len(prompt_ids)} tokens {self.model} has room for "
                f"{room} more",
                field="max_tokens",
                code=TOO_LONG,
            )
        return wanted or max(1, self.engine.room(len(prompt_ids)))


class _Stream(StreamingResponse):
    """An answer as server-sent events. A client may be gone before the first one is asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.stream(), media_type=_EVENTS, headers={"cache-control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(value: Json, status: int = 200) -> Response:
    return Response(replies.encode(value), status, media_type="application/json")


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 429 else dict(headers or {})
    # A text with half a character in it cannot be sent.
    message = message.encode("utf-8", "replace").decode()
    return JSONResponse(replies.error(message, kind, param, code), status, headers)


def _told(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with the first bad field, and its name if it has one."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid" or len(first["loc"]) < 2:
        return f"the body is no valid request: {first['msg']}", None
    field = str(first["loc"][1])
    # A field that may have several forms has one complaint for each.
    complaints = dict.fromkeys(str(e["msg"]) for e in errors if str(e["loc"][1:2]) == str(first["loc"][1:2]))
    return f"{field}: {', or '.join(complaints)}", field


def create_app(engine: Engine, config: ServerConfig, feed: Feed | None = None, model: str | None = None) -> FastAPI:
    """The application. It owns the engine while it runs, and closes it at its end.

    ``feed``: without it there is no dashboard. ``model``: the name that
    clients know the model by.
    """
    api = Api(engine, config, model or engine.model.checkpoint.title)
    if feed is not None:
        feed.watch(api.service, api.model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.service.start()
        yield
        await api.service.stop()

    app = FastAPI(title="flowspec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.api = api
    _add_error_handlers(app)
    _add_openai_routes(app, api)
    _add_service_routes(app, api)
    if feed is not None:
        _add_dashboard_routes(app, feed)
    app.add_middleware(Guard, config.api_key, config.max_body_bytes, Hosts.of(config))
    if config.cors_origins:  # before the guard: a browser's preflight brings no key
        app.add_middleware(CORSMiddleware, config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, *_told(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        told = {
            404: f"no such route: {request.url.path}; the routes are listed in /openapi.json",
            405: f"{request.url.path} takes no {request.method}",
        }
        return _error(error.status_code, told.get(error.status_code, str(error.detail)), headers=error.headers)

    @app.exception_handler(ModelNotFoundError)
    async def on_wrong_model(request: Request, error: ModelNotFoundError) -> JSONResponse:
        return _error(404, str(error), "model", "model_not_found")

    @app.exception_handler(UsageError)
    async def on_usage(request: Request, error: UsageError) -> JSONResponse:
        return _error(400, str(error), error.field, error.code)

    @app.exception_handler(QueueFullError)
    async def on_full(request: Request, error: QueueFullError) -> JSONResponse:
        return _error(429, str(error))

    @app.exception_handler(WorkerError)
    async def on_failed(request: Request, error: WorkerError) -> JSONResponse:
        return _error(503, str(error))

    @app.exception_handler(FlowspecError)
    async def on_error(request: Request, error: FlowspecError) -> JSONResponse:
        return _error(500, str(error))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request met a bug", exc_info=error)
        return _error(500, "an internal error; the server's log has more")


def _add_openai_routes(app: FastAPI, api: Api) -> None:
    entry = {"id": api.model, "object": "model", "created": api.start_s, "owned_by": "flowspec"}
    entry |= {"max_model_len": api.engine.model.checkpoint.max_positions}

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        api.check_model(name)
        return entry

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        api.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise UsageError("echo with logprobs is not supported: those of a prompt are not computed; leave one out")
        given = body.prompts()
        prompts = [await api.tokens.encode(prompt) for prompt in given]
        echoes = [""] * len(given)
        if body.echo:
            echoes = [prompt if isinstance(prompt, str) else await api.tokens.decode(prompt) for prompt in given]
        max_tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        shape = Completions(api.model, api.engine.model.vocabulary)
        all_echoes = [echo for echo in echoes for _ in range(body.n)]
        return await api.generate(http, body, prompts, max_tokens, body.logprobs, shape, all_echoes)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        api.check_model(body.model)
        messages = [message.plain() for message in body.messages]
        prompt_ids = await api.tokens.encode_chat(messages, body.chat_template_kwargs)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        shape = Chats(api.model, api.engine.model.vocabulary)
        max_tokens = body.max_completion_tokens or body.max_tokens
        return await api.generate(http, body, [prompt_ids], max_tokens, num_logprobs, shape, [""] * body.n)


def _add_service_routes(app: FastAPI, api: Api) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Json:
        api.check_model(body.model)
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            ids = await api.tokens.encode_chat(messages, body.chat_template_kwargs)
        else:
            ids = await api.tokens.encode(body.prompt or "", body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": api.engine.model.checkpoint.max_positions}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Json:
        api.check_model(body.model)
        return {"prompt": await api.tokens.decode(body.tokens)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=Response)
    async def health(verbose: str = "") -> Response:
        service, engine = api.service, api.engine.status()
        fault = service.failure or ("no progress with work queued" if service.is_stuck else None)
        # While a device is away requests wait: whoever starts servers again on bad health should not now.
        problem, status = fault or engine.problem, 200 if fault is None else 503
        named = "bad" if fault is not None else "degraded" if problem is not None else "ok"
        if verbose not in ("1", "true"):
            return _json({"status": named, "problem": problem}) if named == "degraded" else Response(status_code=status)
        stages = [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "state": stage.state if service.failure is None else "down",
                "busy_s": round(stage.busy_s, 3),
            }
            for stage in engine.stages
        ]
        told: Json = {"running": engine.num_running, "waiting": service.num_waiting}
        if engine.draft_worker is not None:
            told["draft_worker"] = {"address": engine.draft_worker.address, "state": engine.draft_worker.state}
        return _json({"status": named, "problem": problem, "stages": stages} | told, status)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(api.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Json:
        return {"version": __version__}


def _add_dashboard_routes(app: FastAPI, feed: Feed) -> None:
    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(DASHBOARD / "index.html")

    @app.get("/dashboard/state", include_in_schema=False)
    async def state() -> Json:
        return feed.state()

    @app.get("/dashboard/events", include_in_schema=False)
    async def events(request: str | None = None) -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            async for snapshot in feed.events(request):
                yield replies.event(snapshot)

        return StreamingResponse(stream(), media_type=_EVENTS, headers={"cache-control": "no-store"})

    app.mount("/static", StaticFiles(directory=DASHBOARD), name="static")
