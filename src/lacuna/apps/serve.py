"""The server: OpenAI-style HTTP over one sampler, whose batch all requests share, and a page to chat with.

One thread owns the sampler and drives it while there is work; the event loop hands it requests and takes the parts of
their completions back. Whatever ends a request, its answer, its client or an error, gives its slots free.
"""

import asyncio
import hmac
import json
import re
import signal
import socket
import sys
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import prometheus_client as prometheus
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lacuna import sampler
from lacuna.apps.configs import ServeConfig, is_loopback
from lacuna.apps.generator import Generator, load_generator, rules_by_origin
from lacuna.apps.protocol import Answer, ApiError, ChatBody, CompletionBody, parse_body, requests_of
from lacuna.config import SamplingKeys, UserError
from lacuna.sampler import Completion, Sampler

STEPS = 8  # tokens between two looks at what came: the grain of a stream
HEADER_SECONDS, BODY_SECONDS = 20, 30  # for a client to send its request's head, and its body
BACKLOG = 2048  # connections that wait to be accepted
RETRY_SECONDS = 1
TIMES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
FAILED = 500, "the model failed on this server; its log says why", None, "internal_error"


# The thread that drives the sampler


class ServerFigures:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        counter, histogram = (
            partial(kind, registry=self.registry) for kind in (prometheus.Counter, prometheus.Histogram)
        )
        self.requests = counter("lacuna_requests", "Answers by path and status", ["path", "status"])
        self.prompt_tokens = counter("lacuna_prompt_tokens", "Tokens of admitted prompts")
        self.completion_tokens = counter("lacuna_completion_tokens", "Tokens generated")
        self.cancelled = counter("lacuna_cancelled", "Requests given up because their client was gone")
        self.seconds = histogram("lacuna_request_seconds", "Time to the end of an answer", buckets=TIMES)
        self.first_seconds = histogram("lacuna_first_token_seconds", "Time to the first tokens", buckets=TIMES)


@dataclass(eq=False)
class Ticket:
    """What one HTTP request has with the driver; `left` counts the completions that have not ended, by request."""

    places: dict[int, int]
    left: dict[int, int]
    admitted: float = field(default_factory=time.perf_counter)
    has_begun: bool = False
    parts: asyncio.Queue[tuple[int, Completion] | None] = field(default_factory=asyncio.Queue)


class Driver:
    """Runs the sampler on a thread of its own; every method but `start` and `stop` is for the event loop's thread."""

    def __init__(self, sampler: Sampler, most: int) -> None:
        self.sampler, self.most = sampler, most
        self.figures = ServerFigures()
        self.tickets: dict[int, Ticket] = {}
        self.wake = threading.Event()
        self.is_stopping = self.is_dead = False
        gauge = partial(prometheus.Gauge, registry=self.figures.registry)
        gauge("lacuna_running", "Completions in slots").set_function(self.running_count)
        gauge("lacuna_held", "Completions in slots or in the queue").set_function(lambda: self.held)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self.drive, name="sampler", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.is_stopping = True
        self.wake.set()
        self.thread.join()

    def drive(self) -> None:
        try:
            while not self.is_stopping:
                self.wake.wait()
                self.wake.clear()
                while not self.sampler.is_idle and not self.is_stopping:
                    self.tell(self.deliver, self.sampler.advance(STEPS))
        except Exception:
            traceback.print_exc()
            self.tell(self.fail)

    def tell(self, call: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(call, *arguments)

    def deliver(self, parts: list[Completion]) -> None:
        for part in parts:
            self.figures.completion_tokens.inc(len(part.tokens))
            if ticket := self.tickets.get(part.request):
                if not ticket.has_begun:
                    ticket.has_begun = True
                    self.figures.first_seconds.observe(time.perf_counter() - ticket.admitted)
                ticket.left[part.request] -= bool(part.finish_reason)
                ticket.parts.put_nowait((ticket.places[part.request], part))
                if not ticket.left[part.request]:
                    del self.tickets[part.request]

    def fail(self) -> None:
        self.is_dead = True
        for ticket in set(self.tickets.values()):
            ticket.parts.put_nowait(None)

    @property
    def held(self) -> int:
        """Completions that wait or run."""
        return sum(ticket.left[number] for number, ticket in self.tickets.items())

    def running_count(self) -> int:
        return sum(running is not None for running in self.sampler.running)

    def submit(self, requests: list[sampler.Request]) -> Ticket:
        """Hand requests to the sampler, all or none. Raises ApiError where there is no room for them."""
        if self.is_dead or self.is_stopping:
            raise ApiError(503, "this server is no longer able to answer; its log says why", None, "unavailable")
        count = sum(request.n for request in requests)
        if count > self.most:
            raise ApiError(400, f"n × prompts = {count}, and this server holds {self.most} completions at once", "n")
        if self.held + count > self.most:
            message = f"{self.held} completions wait or run, and this server holds {self.most}; try again"
            raise ApiError(429, message, None, "queue_full", RETRY_SECONDS)
        numbers = [self.sampler.submit(request) for request in requests]
        ticket = Ticket(
            places={number: place for place, number in enumerate(numbers)},
            left={number: request.n for number, request in zip(numbers, requests, strict=True)},
        )
        self.tickets |= dict.fromkeys(numbers, ticket)
        self.figures.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        self.wake.set()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give up whatever of a ticket has not ended."""
        for number in [number for number in ticket.left if self.tickets.pop(number, None)]:
            self.sampler.cancel(number)
            self.figures.cancelled.inc()
        self.wake.set()

    async def parts_of(self, ticket: Ticket) -> AsyncIterator[tuple[int, Completion]]:
        """Parts of completions with the places of their requests, to the last. Raises ApiError if the driver dies."""
        while any(ticket.left.values()) or not ticket.parts.empty():
            if (part := await ticket.parts.get()) is None:
                raise ApiError(*FAILED)
            yield part


# What is answered


class Service(NamedTuple):
    """All that the endpoints need."""

    config: ServeConfig
    generator: Generator
    driver: Driver
    name: str
    url: str
    created: int


def service_of(request: Request) -> Service:
    return request.app.state.service


class Stream(StreamingResponse):
    """Server-sent events; `release` is called however the answer ends, even where it never began."""

    def __init__(self, content: AsyncIterator[str], release: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def generate(kind: type[ChatBody] | type[CompletionBody], request: Request) -> Response:
    """Either endpoint that generates."""
    service = service_of(request)
    driver = service.driver
    body = parse_body(kind, await read_body(request))
    check_name(body.model, service)
    requests = await run_in_threadpool(requests_of, body, service.generator)
    answer = Answer(body, requests, service.generator.sampler.tokenizer)
    ticket = driver.submit(requests)
    if body.stream:
        return Stream(events(answer, driver, ticket), partial(driver.release, ticket))

    async def all_parts() -> list[tuple[int, Completion]]:
        return [part async for part in driver.parts_of(ticket)]

    try:
        return JSONResponse(answer.whole(await unless_gone(request, all_parts())))
    finally:
        driver.release(ticket)


async def events(answer: Answer, driver: Driver, ticket: Ticket) -> AsyncIterator[str]:
    """A stream's chunks as server-sent events; an error after the first can only be told as one more."""
    for chunk in answer.opening():
        yield event(chunk)
    try:
        async for place, part in driver.parts_of(ticket):
            if part.text or part.finish_reason or answer.body.logprobs not in (None, False):
                yield event(answer.chunk([answer.choice(place, part, "delta")]))
            else:
                answer.completion_tokens += len(part.tokens)
    except ApiError as error:
        yield event(error.body())
        return
    if answer.body.wants_usage:
        yield event(answer.chunk([]) | {"usage": answer.usage()})
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of the work; raises ClientDisconnect as soon as nobody waits for it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()


async def read_body(request: Request) -> bytes:
    """The body of a request in JSON, no longer than the page allows."""
    limit = service_of(request).config.body_bytes
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise ApiError(413, f"the body has more than {limit:,} bytes, the most taken here; shorten it")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} seconds; send it at once") from None
    return bytes(body)


def check_name(name: str, service: Service) -> None:
    if name != service.name:
        message = f"no model {name[:200]!r} here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "lacuna",
        "max_model_len": service.generator.sampler.capacity,
    }


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model_card(service_of(request))]})


async def one_model(request: Request) -> Response:
    service = service_of(request)
    check_name(request.path_params["name"], service)
    return JSONResponse(model_card(service))


async def health(request: Request) -> Response:
    is_dead = service_of(request).driver.is_dead
    return JSONResponse({"status": "failed" if is_dead else "ok"}, 503 if is_dead else 200)


async def metrics(request: Request) -> Response:
    text = prometheus.generate_latest(service_of(request).driver.figures.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@cache
def chat_page() -> HTMLResponse:
    """The page with a policy that lets only its own script and style run and speak to this server alone."""
    text = files("lacuna").joinpath("serve.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(each.encode()).digest()).decode()}'" for each in inside)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return HTMLResponse(text, headers=headers)


async def index(request: Request) -> Response:
    return chat_page()


# The app


async def api_error(request: Request, error: Exception) -> Response:
    """Any exception as an error object that tells nothing of this machine."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        mends = {404: "there is nothing at this path; the API begins with /v1", 405: "this path has other methods"}
        error = ApiError(error.status_code, mends.get(error.status_code, error.detail))
    if not isinstance(error, ApiError):
        error = ApiError(*FAILED)
    headers = {"Retry-After": str(error.retry_seconds)} if error.retry_seconds else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def check_entry(request: Request, config: ServeConfig) -> None:
    """Refuse who has no key, or where none is needed, a page of the web whose name was made to point here."""
    if key := config.api_key.get_secret_value():
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_open = request.url.path in ("/", "/health")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) and scheme.lower() == "bearer"
        if not is_open and not is_right:
            message = "this server wants its key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key")
        return
    if not is_loopback(re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]")):
        raise ApiError(403, "without a key this server answers only to localhost; set api_key to open it", "host")


def guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """The app behind the door, where answers are counted."""
    figures = service.driver.figures
    paths = {route.path for route in ROUTES}

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        began, status = time.perf_counter(), 0
        path = scope["path"] if scope["path"] in paths else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
                status = message["status"]
                figures.requests.labels(path, status).inc()
            await send(message)

        request = Request(scope)
        try:
            check_entry(request, service.config)
        except ApiError as error:
            response = await api_error(request, error)
            return await response(scope, receive, counted)
        await app(scope, receive, counted)
        if scope["method"] == "POST" and status == 200:
            figures.seconds.observe(time.perf_counter() - began)

    return guard


ROUTES = [
    Route("/", index),
    Route("/v1/chat/completions", partial(generate, ChatBody), methods=["POST"]),
    Route("/v1/completions", partial(generate, CompletionBody), methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", one_model),
    Route("/health", health),
    Route("/metrics", metrics),
]


def make_service(config: ServeConfig, generator: Generator, listener: socket.socket) -> Service:
    driver = Driver(generator.sampler, config.slots + config.queue_size)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return Service(config, generator, driver, served_name(config, generator.source), url, int(time.time()))


def make_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI app; from its start to its end the sampler belongs to the driver's thread."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        service.driver.start()
        sampler = service.generator.sampler
        print(f"{service.name} at {service.url}, API under /v1; Ctrl-C stops")
        print(sampler.opened.attention_line)
        print(f"slots: {len(sampler.running)}, each of {sampler.capacity:,} tokens, prompt and answer together")
        rules = rules_by_origin(service.config, service.generator.rules)
        print(f"rules, unless a request says otherwise: {rules}", flush=True)
        yield
        await run_in_threadpool(service.driver.stop)

    handlers = dict.fromkeys((HTTPException, ApiError, ClientDisconnect, Exception), api_error)
    app = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    return guarded(app, service)


def served_name(config: ServeConfig, source: Path) -> str:
    """The model's name in answers: what the page says, a hub id as it is, of a directory only the last part."""
    if config.served_name:
        return config.served_name
    if config.model_name and not Path(config.model_name).exists():
        return config.model_name
    return source.resolve().parent.name if source.name == "model" else source.resolve().name


# The command


class Protocol(H11Protocol):
    """HTTP/1.1 that does not wait forever for a client to begin."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self.close_if_silent, self.cycle)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.loop.call_later(HEADER_SECONDS, self.close_if_silent, self.cycle)

    def close_if_silent(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def make_server(config: ServeConfig, app: ASGIApp) -> uvicorn.Server:
    settings = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="on", backlog=BACKLOG, log_level="error", access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=config.drain_seconds,
    )  # fmt: skip
    return uvicorn.Server(settings)


def bind(config: ServeConfig) -> socket.socket:
    """The socket of the page's address, not listening yet. Raises UserError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise UserError(
            f"host = {config.host}, port = {config.port}: {error.strerror}; choose another, or --port 0 for any free one"
        ) from error


def warm_up(generator: Generator) -> None:
    """Compile the smallest shapes: one short prompt, and one for every slot."""
    request = sampler.Request((0,), SamplingKeys(max_tokens=1))
    for count in (1, len(generator.sampler.running)):
        generator.sampler.generate([request] * count)


def leave(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may pass the same signal on once more
    sys.exit(0)


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; what has begun is finished first. Raises UserError where it can't begin."""
    signal.signal(signal.SIGTERM, leave)
    with bind(config) as listener:
        generator = load_generator(config, config.slots)
        warm_up(generator)
        listener.listen(BACKLOG)
        server = make_server(config, make_app(make_service(config, generator, listener)))
        server.run(sockets=[listener])
