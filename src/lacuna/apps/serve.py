"""The server: OpenAI-compatible HTTP over one sampler, whose batch all requests share, and a page to chat with.

One thread owns the sampler and runs it while there is work; the event loop submits requests to it and receives the
parts of their completions. However a request ends, by its answer, its client or an error, its slots become free.
"""

import asyncio
import hmac
import json
import re
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lacuna import sampler
from lacuna.apps.configs import ServeConfig, is_loopback
from lacuna.apps.generator import Generator, load_generator, rules_by_origin
from lacuna.apps.protocol import COMPLETION_TOKENS, Answer, ApiError, ChatBody, CompletionBody, parse_body, requests_of
from lacuna.config import SamplingKeys, UserError, name_of_model
from lacuna.sampler import Completion, Sampler, Scores
from lacuna.tokenizer import ends_in_words

STEPS = 8  # tokens between two looks at the batch: the granularity of a stream
BODY_SECONDS = 30  # for a client to send its request's body
BODY_BYTES = 2**20  # of the longest body of a request
DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**32  # minus one means that there is no limit
BACKLOG = min(2048, DESCRIPTORS // 4)  # connections that wait to be accepted; they are accepted all at once
RETRY_SECONDS = 1
FAILED = 500, "the model failed on this server; its log says why", None, "internal_error"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would send a stream in lumps
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


# The thread that runs the sampler


@dataclass(eq=False)
class Ticket:
    """One HTTP request at the driver. By number of the sampler's request: its place among the prompts, and how many
    of its completions have not ended. `parts` ends in an exception if the answer can't be completed."""

    places: dict[int, int]
    left: dict[int, int]
    parts: asyncio.Queue[tuple[int, Completion] | Exception] = field(default_factory=asyncio.Queue)


class Driver:
    """Runs the sampler on its own thread; all methods but `run` are called on the event loop's thread."""

    def __init__(self, sampler: Sampler, capacity: int) -> None:
        self.sampler, self.capacity = sampler, capacity
        self.tickets: dict[int, Ticket] = {}
        self.jobs = deque[tuple[Future[list[Scores]], Any]]()
        self.wake = threading.Event()
        self.is_stopping = self.is_dead = False

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self.run, name="sampler", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.is_stopping = True
        self.wake.set()
        self.thread.join()

    def run(self) -> None:
        try:
            while not self.is_stopping:
                self.wake.wait()
                self.wake.clear()
                while (self.jobs or not self.sampler.is_idle) and not self.is_stopping:
                    if self.jobs:
                        self.score(*self.jobs[0])
                    self.loop.call_soon_threadsafe(self.deliver, self.sampler.advance(STEPS))
        except Exception:
            if not self.loop.is_closed():  # as it is after a second Ctrl-C, which ends the server at once
                traceback.print_exc()
                self.loop.call_soon_threadsafe(self.fail)

    def deliver(self, parts: list[Completion]) -> None:
        for part in parts:
            if ticket := self.tickets.get(part.request):
                ticket.left[part.request] -= bool(part.finish_reason)
                ticket.parts.put_nowait((ticket.places[part.request], part))
                if not ticket.left[part.request]:
                    del self.tickets[part.request]

    def fail(self) -> None:
        self.is_dead = True
        for ticket in set(self.tickets.values()):
            ticket.parts.put_nowait(ApiError(*FAILED))
        for future, _ in self.jobs:
            future.set_exception(ApiError(*FAILED))

    def score(self, future: Future[list[Scores]], requests: list[sampler.Request]) -> None:
        found = [self.sampler.scores_of(each.prompt, each.top_logprobs, each.adapter) for each in requests]
        self.jobs.popleft()
        if future.set_running_or_notify_cancel():
            future.set_result(found)

    @property
    def held(self) -> int:
        """Completions that wait or run, and prompts that wait for their scores."""
        return len(self.jobs) + sum(ticket.left[number] for number, ticket in self.tickets.items())

    def check_room(self, requests: list[sampler.Request]) -> None:
        """Raises ApiError if there is no room for these requests."""
        if self.is_dead or self.is_stopping:
            raise ApiError(503, "this server can no longer answer; its log says why", None, "unavailable")
        count = sum(request.n for request in requests)
        if count > self.capacity:
            message = f"n × prompts = {count}, and this server holds {self.capacity} completions at once"
            fix = "lower n, send fewer prompts, or start it with more --slots or a larger --queue-size"
            raise ApiError(400, f"{message}; {fix}", "n")
        if self.held + count > self.capacity:
            message = f"{self.held} completions wait or run, and this server holds {self.capacity}; try again"
            raise ApiError(429, message, None, "queue_full", RETRY_SECONDS)

    async def scored(self, requests: list[sampler.Request]) -> list[Scores]:
        """The scores of each request's prompt."""
        self.check_room(requests)
        self.jobs.append((future := Future[list[Scores]](), requests))
        self.wake.set()
        return await asyncio.wrap_future(future)

    def submit(self, requests: list[sampler.Request]) -> Ticket:
        """Submit requests to the sampler, all or none. Raises ApiError if there is no room for them."""
        self.check_room(requests)
        numbers = [self.sampler.submit(request) for request in requests]
        left = {number: request.n for number, request in zip(numbers, requests, strict=True)}
        ticket = Ticket({number: place for place, number in enumerate(numbers)}, left)
        self.tickets |= dict.fromkeys(numbers, ticket)
        self.wake.set()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Cancel everything of a ticket that has not ended."""
        for number in [number for number in ticket.left if self.tickets.pop(number, None)]:
            self.sampler.cancel(number)
        self.wake.set()


async def answer_parts(ticket: Ticket) -> AsyncIterator[tuple[int, Completion]]:
    """Parts of completions with the places of their prompts, to the last. Raises what ended the answer early."""
    while any(ticket.left.values()) or not ticket.parts.empty():
        part = await ticket.parts.get()
        if isinstance(part, Exception):
            raise part
        yield part


# The endpoints


class Service(NamedTuple):
    """What the endpoints need."""

    config: ServeConfig
    generator: Generator
    driver: Driver
    names: tuple[str, ...]  # of the model, and of its adapters
    url: str
    created: int


def service_of(request: Request) -> Service:
    return request.app.state.service


class Stream(StreamingResponse):
    """Server-sent events; `release` is called however the answer ends, even if it never began."""

    def __init__(self, content: AsyncIterator[str], release: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def generate(kind: type[ChatBody] | type[CompletionBody], request: Request) -> Response:
    """Answer a chat or a completion, streamed or whole."""
    service = service_of(request)
    driver = service.driver
    body = parse_body(kind, await read_body(request))
    adapter = number_of_model(body.model, service)
    made = await run_in_threadpool(requests_of, body, service.generator)
    requests = [replace(each, adapter=adapter) for each in made]
    has_scores = isinstance(body, CompletionBody) and body.echo and body.logprobs is not None
    answer = Answer(body, requests, service.generator.sampler.tokenizer)
    scores = await driver.scored(requests) if has_scores else []
    ticket = Ticket({}, {}) if body.max_tokens == 0 else driver.submit(requests)
    for part in answer.prompts(scores):
        ticket.parts.put_nowait(part)
    if body.stream:
        return Stream(events(answer, ticket), partial(driver.release, ticket))
    watch = asyncio.create_task(report_disconnect(request, ticket))
    try:
        return JSONResponse(answer.whole([part async for part in answer_parts(ticket)]))
    finally:
        watch.cancel()
        driver.release(ticket)


async def report_disconnect(request: Request, ticket: Ticket) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.parts.put_nowait(ClientDisconnect())


async def events(answer: Answer, ticket: Ticket) -> AsyncIterator[str]:
    """A stream's chunks as server-sent events; the status is sent by then, so an error is one more event."""
    for chunk in answer.opening():
        yield event(chunk)
    try:
        async for place, part in answer_parts(ticket):
            for chunk in answer.chunks(place, part):
                yield event(chunk)
    except ApiError as error:
        yield event(error.body())
        return
    if answer.body.stream_options.get("include_usage"):
        yield event(answer.chunk([]) | {"usage": answer.usage()})
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def read_body(request: Request) -> bytes:
    """The JSON body of a request, no longer than the config allows."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY_BYTES:
                    raise ApiError(413, f"the body has more than {BODY_BYTES:,} bytes, the limit here; shorten it")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds; send it at once") from None
    return bytes(body)


def number_of_model(name: str, service: Service) -> int:
    """The number of its adapter, 0 for the model itself."""
    if name not in service.names:
        message = f"no model {name[:200]!r} here; this server has {', '.join(map(repr, service.names))}"
        raise ApiError(404, message, "model", "model_not_found")
    return service.names.index(name)


def model_card(service: Service, name: str) -> dict[str, Any]:
    sampler = service.generator.sampler
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "lacuna",
        "max_model_len": sampler.capacity, "has_chat_template": sampler.tokenizer.template is not None,
    }  # fmt: skip


async def models(request: Request) -> Response:
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [model_card(service, name) for name in service.names]})


async def one_model(request: Request) -> Response:
    service = service_of(request)
    number_of_model(name := request.path_params["name"], service)
    return JSONResponse(model_card(service, name))


async def health(request: Request) -> Response:
    is_dead = service_of(request).driver.is_dead
    return JSONResponse({"status": "failed" if is_dead else "ok"}, 503 if is_dead else 200)


async def index(request: Request) -> Response:
    return HTMLResponse(files("lacuna.apps").joinpath("serve.html").read_text("utf-8"), headers=PAGE_HEADERS)


ROUTES = [
    Route("/", index),
    Route("/v1/chat/completions", partial(generate, ChatBody), methods=["POST"]),
    Route("/v1/completions", partial(generate, CompletionBody), methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", one_model),
    Route("/health", health),
]
PATHS = ", ".join(route.path for route in ROUTES[1:4])


# The app


async def api_error(request: Request, error: Exception) -> Response:
    """Any exception as an error object that reveals nothing about this machine."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        hints = {404: f"there is nothing at this path; this server has {PATHS}", 405: "this path has other methods"}
        error = ApiError(error.status_code, hints.get(error.status_code, error.detail))
    if not isinstance(error, ApiError):
        error = ApiError(*FAILED)
    if error.retry_seconds:
        headers["Retry-After"] = str(error.retry_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def check_entry(request: Request, config: ServeConfig) -> None:
    """Reject requests without the API key; without a key, reject hosts other than loopback (DNS rebinding)."""
    if key := config.api_key.get_secret_value():
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_open = request.url.path in ("/", "/health")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) and scheme.lower() == "bearer"
        if not is_open and not is_right:
            message = "this server needs its key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key")
        return
    if not is_loopback(re.sub(r":\d+$", "", request.headers.get("host", "").lower()).strip("[]")):
        raise ApiError(403, "without a key this server answers only to localhost; set api_key to open it", "host")


class GuardedRouter(Router):
    """The endpoints for those whom `check_entry` lets in."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            check_entry(Request(scope), scope["app"].state.service.config)
        await super().__call__(scope, receive, send)


def make_service(config: ServeConfig, generator: Generator, listener: socket.socket) -> Service:
    driver = Driver(generator.sampler, config.slots + config.queue_size)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = served_name(config, generator.source), *(each.partition("=")[0] for each in config.adapters)
    if names[0] in names[1:]:
        raise UserError(f"adapters has {names[0]}, the name of the model itself; give the model another --served-name")
    return Service(config, generator, driver, names, url, int(time.time()))


def make_app(service: Service) -> ASGIApp:
    """The server as an ASGI app; while it runs, the sampler belongs to the driver's thread."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        service.driver.start()
        sampler = service.generator.sampler
        print(f"{', '.join(service.names)} at {service.url}, API under /v1; Ctrl-C stops")
        print(f"compute in {sampler.dtype}{sampler.model.held}; {sampler.opened.attention_line}")
        print(ends_in_words(sampler.tokenizer))
        print(f"slots: {len(sampler.running)}, each of {sampler.capacity:,} tokens, prompt and answer together")
        rules = rules_by_origin(service.config, service.generator.rules)
        has_limit = "max_tokens" in service.generator.rules.model_fields_set
        plain = "" if has_limit else f"; max_tokens={COMPLETION_TOKENS} for /v1/completions"
        print(f"rules, unless a request says otherwise: {rules}{plain}", flush=True)
        yield
        await run_in_threadpool(service.driver.stop)

    handlers = dict.fromkeys((HTTPException, ApiError, ClientDisconnect, Exception), api_error)
    app = Starlette(exception_handlers=handlers)
    app.router = GuardedRouter(ROUTES, redirect_slashes=False, lifespan=lifespan)
    app.state.service = service
    if origins := service.config.allow_origin:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def served_name(config: ServeConfig, source: Path) -> str:
    """The model's name in answers: the config's, a hub id as it is, or that of its directory."""
    if config.served_name:
        return config.served_name
    if config.model_name and not Path(config.model_name).exists():
        return config.model_name
    return name_of_model(source)


# The command


class Connection(H11Protocol):
    """A connection of a server that never runs out of descriptors: of more than `limit` the one idle longest is closed,
    or the new one if none is idle."""

    limit, is_logged = min(4096, DESCRIPTORS // 2), False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.began = time.monotonic()
        others: list[Any] = [each for each in self.connections if not each.transport.is_closing()]
        if len(others) > self.limit:
            idle = [each for each in others if each is not self and (not each.cycle or each.cycle.response_complete)]
            min(idle, key=lambda each: each.began, default=self).transport.close()
            if not Connection.is_logged:
                Connection.is_logged = True
                print(f"more than {self.limit:,} connections: those idle longest are closed", file=sys.stderr)


def make_server(config: ServeConfig, app: ASGIApp) -> uvicorn.Server:
    settings = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", backlog=BACKLOG, log_level="error", access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=config.drain_seconds,
    )  # fmt: skip
    return uvicorn.Server(settings)


def bind(config: ServeConfig) -> socket.socket:
    """A socket bound to the config's address, not listening yet. Raises UserError if it can't be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        place = f"host = {config.host}, port = {config.port}"
        raise UserError(f"{place}: {error.strerror}; choose another, or --port 0 for any free one") from error


def warm_up(generator: Generator) -> None:
    """Compile the smallest shapes: one short prompt, and one for each slot."""
    request = sampler.Request((0,), SamplingKeys(max_tokens=1))
    for count in (1, len(generator.sampler.running)):
        generator.sampler.generate([request] * count)


def exit_cleanly(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may send it a second time
    sys.exit(0)


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the answers that have begun. Raises UserError if it can't start."""
    signal.signal(signal.SIGTERM, exit_cleanly)
    with bind(config) as listener:
        generator = load_generator(config, config.slots)
        warm_up(generator)
        listener.listen(BACKLOG)
        server = make_server(config, make_app(make_service(config, generator, listener)))
        server.run(sockets=[listener])
