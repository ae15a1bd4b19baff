"""The server over real sockets: OpenAI's own client, hostile clients, and the page in a browser."""

import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import openai
import pytest
from conftest import make_small, mesh_of
from pydantic import SecretStr
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from lacuna import checkpoint, model, sampler, weights
from lacuna.apps import serve
from lacuna.apps.configs import ServeConfig
from lacuna.apps.generator import Generator as ModelGenerator
from lacuna.cli import parse
from lacuna.config import SamplingKeys, UserError
from lacuna.tokenizer import encode, load_tokenizer, render

NAME = "small"
CAPACITY = 320
QUESTION = [{"role": "user", "content": "Nora has 18 marbles. Nora leaves 9 marbles at school. How many?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 300  # seconds for what takes a second on a quiet machine


# A server on a thread


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose next token is hard to guess."""
    directory = tmp_path_factory.mktemp("model") / "small"
    source = make_small(directory.with_name("source"))
    shape = model.read_model_config(source)
    params = model.initial_params(jax.random.key(0), replace(shape, initializer_range=0.4))
    checkpoint.save_model(directory, params, shape, source)
    return directory


@pytest.fixture(scope="module")
def new_generator(directory: Path) -> Callable[[], ModelGenerator]:
    shape, mesh, tokenizer = model.read_model_config(directory), mesh_of(1, 1, 1), load_tokenizer(directory)
    params = weights.load_params(directory, shape, mesh)
    rules = SamplingKeys(temperature=0.0, max_tokens=30)

    def make() -> ModelGenerator:
        batch = sampler.Sampler(
            params, checkpoint.OpenedModel(directory, shape, tokenizer, mesh, ""), 4, CAPACITY, "float32"
        )
        return ModelGenerator(batch, directory, rules, (2, 0))

    return make


@dataclass
class Served:
    port: int
    driver: serve.Driver
    generator: ModelGenerator

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "unused") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def running_count(self) -> int:
        return sum(running is not None for running in self.generator.sampler.running)

    def is_quiet(self) -> bool:
        return self.driver.held == 0 and self.generator.sampler.is_idle and self.running_count() == 0


@contextmanager
def serving(generator: ModelGenerator, **settings: Any) -> Generator[Served]:
    config = ServeConfig(**{"port": 0, "served_name": NAME, "slots": 4, "queue_size": 96, **settings})
    with serve.bind(config) as listener:
        service = serve.make_service(config, generator, listener)
        server = serve.make_server(config, serve.make_app(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield Served(listener.getsockname()[1], service.driver, generator)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(new_generator: Callable[[], ModelGenerator]) -> Iterator[Served]:
    with serving(new_generator()) as served:
        yield served


@pytest.fixture(scope="module")
def alone(new_generator: Callable[[], ModelGenerator]) -> sampler.Sampler:
    """A sampler without a server, for the answers that are expected."""
    return new_generator().sampler


class Gate:
    """Lets every sampler advance only as often as `step` says, or freely while it is open."""

    def __init__(self) -> None:
        self.steps, self.is_open = threading.Semaphore(0), threading.Event()

    def step(self) -> None:
        self.steps.release()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        self.is_open.set()

    def close(self) -> None:
        self.is_open.clear()

    def wait(self) -> None:
        while not self.is_open.is_set() and not self.steps.acquire(timeout=0.01):
            pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Samplers that a test meets at work."""
    advance, gate = sampler.Sampler.advance, Gate()
    monkeypatch.setattr(sampler.Sampler, "advance", lambda *all: gate.wait() or advance(*all))
    with gate:
        yield gate


def eventually(is_true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < end, "this did not become true"
        time.sleep(0.01)


def ask(
    served: Served, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a plain request."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)) as connection:
        connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": QUESTION, **fields}


def expected(alone: sampler.Sampler, text: str | None = None, **fields: Any) -> list[sampler.Completion]:
    """The sampler's completions of a prompt, or of the question asked as a chat."""
    tokenizer = alone.tokenizer
    prompt = render(tokenizer, QUESTION, add_generation_prompt=True) if text is None else text
    names = SamplingKeys.model_fields.keys() & fields.keys()
    rules = SamplingKeys(**{"temperature": 0.0, "max_tokens": 30} | {name: fields.pop(name) for name in names})
    request = sampler.Request(tuple(encode(tokenizer, prompt, False).tolist()), rules, (2, 0), **fields)
    return alone.generate([request])


# OpenAI's client


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 7, "n": 3, "max_tokens": 20}])
def test_answers_are_the_samplers_streamed_or_whole(
    served: Served, alone: sampler.Sampler, fields: dict[str, Any]
) -> None:
    client = served.client()
    whole = client.chat.completions.create(model=NAME, messages=QUESTION, **fields)
    wanted = expected(alone, **fields)
    assert [choice.message.content for choice in whole.choices] == [each.text for each in wanted]
    assert [choice.finish_reason for choice in whole.choices] == [each.finish_reason for each in wanted]
    assert whole.usage and whole.usage.completion_tokens == sum(len(each.tokens) for each in wanted)
    prompt = encode(alone.tokenizer, render(alone.tokenizer, QUESTION, add_generation_prompt=True), False)
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.total_tokens == len(prompt) + whole.usage.completion_tokens
    texts, reasons, usage = [""] * len(wanted), {}, []
    for chunk in client.chat.completions.create(
        model=NAME, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **fields
    ):
        usage.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [each.text for each in wanted]
    assert [reasons[index] for index in range(len(wanted))] == [each.finish_reason for each in wanted]
    assert usage[-1] == whole.usage and not any(usage[:-1]) and len(usage) > 2 * len(wanted)


def test_the_same_seed_repeats_an_answer_and_no_seed_does_not(served: Served) -> None:
    def said(**fields: Any) -> str:
        answer = served.client().chat.completions.create(model=NAME, messages=QUESTION, temperature=2, **fields)
        return answer.choices[0].message.content or ""

    assert said(seed=-5) == said(seed=-5) != said(seed=4)
    assert said() != said()


def test_a_top_p_of_zero_is_greedy(served: Served, alone: sampler.Sampler) -> None:
    fields = {"model": NAME, "messages": QUESTION, "temperature": 1, "top_p": 0}
    answer = served.client().chat.completions.create(**fields)
    assert answer.choices[0].message.content == expected(alone)[0].text


def test_stop_ends_before_the_string(served: Served, alone: sampler.Sampler) -> None:
    (whole,) = expected(alone)
    stop = whole.text[9:13]
    for fields in ({"stop": stop}, {"stop": ["never said", stop]}):
        choice = served.client().chat.completions.create(model=NAME, messages=QUESTION, **fields).choices[0]
        assert choice.message.content == whole.text[: whole.text.index(stop)] and choice.finish_reason == "stop"
    parts = served.client().chat.completions.create(model=NAME, messages=QUESTION, stop=stop, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.text[: whole.text.index(stop)]


def in_ascii(text: str) -> str:
    """The text without characters that may take several tokens."""
    return re.sub(r"[^\x00-\x7f]", "", text)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_samplers_and_their_tokens_make_the_text(
    served: Served, alone: sampler.Sampler, stream: bool
) -> None:
    (wanted,) = expected(alone, top_logprobs=3)
    client, fields = served.client(), {"model": NAME, "stream": stream}
    found: Any = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **fields)
    choices = [chunk.choices[0] for chunk in (found if stream else [found])]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx(wanted.log_probabilities, abs=1e-5)
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
        pytest.approx([value for _, value in top], abs=1e-5) for top in wanted.top_logprobs
    ]
    assert in_ascii("".join(entry.token for entry in entries)) == in_ascii(wanted.text)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries if entry.bytes)
    assert [entry.bytes is None for entry in entries] == ["\ufffd" in entry.token for entry in entries]
    (plain,) = expected(alone, "Ben has", top_logprobs=2)
    found = client.completions.create(prompt="Ben has", logprobs=2, **fields)
    logprobs = [chunk.choices[0].logprobs for chunk in (found if stream else [found]) if chunk.choices[0].logprobs]
    assert sum((each.token_logprobs for each in logprobs), []) == pytest.approx(plain.log_probabilities, abs=1e-5)
    tokens, offsets = (sum((getattr(each, name) for each in logprobs), []) for name in ("tokens", "text_offset"))
    assert in_ascii("".join(tokens)) == in_ascii(plain.text)
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
    assert {len(top) for each in logprobs for top in each.top_logprobs} == {2}


def test_completions_take_strings_tokens_and_several(served: Served, alone: sampler.Sampler) -> None:
    texts = ["Ben has", "Clara trades for 2", "Nora"]
    wanted = [expected(alone, text, n=2, seed=3, temperature=1.0) for text in texts]
    create, fields = served.client().completions.create, {"model": NAME, "n": 2, "seed": 3, "temperature": 1.0}
    tokens = [encode(alone.tokenizer, text, False).tolist() for text in texts]
    for prompt in (texts, tokens):
        answer = create(prompt=prompt, **fields)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == [each.text for pair in wanted for each in pair]
        assert answer.usage and answer.usage.prompt_tokens == sum(map(len, tokens))
    streamed = [""] * 6
    for chunk in create(prompt=tokens, stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [each.text for pair in wanted for each in pair]
    assert create(prompt=tokens[0], **fields).choices[1].text == wanted[0][1].text


def test_models_and_harmless_fields_are_as_clients_expect(served: Served, alone: sampler.Sampler) -> None:
    client = served.client()
    assert [each.id for each in client.models.list()] == [client.models.retrieve(NAME).id] == [NAME]
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": parts}], user="me", metadata={"a": "b"}, store=False,
        logit_bias={}, response_format={"type": "text"}, tools=[], tool_choice="none", max_completion_tokens=9,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "temperature": None},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected(alone, max_tokens=9)[0].text
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="calls no tools; leave tools out") as refusal:
        client.chat.completions.create(model=NAME, messages=QUESTION, tools=[tool])
    assert refusal.value.param == "tools" and refusal.value.code == "unsupported_parameter"


# Bad and hostile requests


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        (CHAT, b'{"model": ', 400, None, "Invalid JSON"),
        (CHAT, b"\xff\xfe", 400, None, "Invalid JSON"),
        (CHAT, b"[" * 5000, 400, None, "Invalid JSON"),
        (CHAT, rb'{"model": "small", "messages": [{"role": "user", "content": "\ud800"}]}', 400, None, "JSON"),
        (CHAT, [1], 400, None, "object"),
        (CHAT, {"model": NAME}, 400, "messages", "required"),
        (CHAT, chat(messages=[]), 400, "messages", "at least 1"),
        (CHAT, chat(messages=[{"role": "wizard", "content": ""}]), 400, "messages.0.role", "'user'"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages.0.content", "tex"),
        (CHAT, chat(temperature="hot"), 400, "temperature", "number"),
        (CHAT, chat(n=True), 400, "n", "integer"),
        (CHAT, chat(n=10**30), 400, "n", "128"),
        (CHAT, chat(n=101), 400, "n", "100 completions"),
        (CHAT, chat(top_k=2**31), 400, "top_k", "less than"),
        (CHAT, chat(temperatur=1), 400, "temperatur", "not a field"),
        (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "not support"),
        (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "logprobs"),
        (CHAT, chat(max_tokens=3, max_completion_tokens=4), 400, "max_tokens", "differ"),
        (CHAT, chat(stop=[""]), 400, "stop.0", "at least 1"),
        (CHAT, chat(model="../../etc/passwd"), 404, "model", "no model"),
        (CHAT, chat(messages=[{"role": "user", "content": "marbles " * 400}]), 400, "messages", "room for 320"),
        (TEXT, {"model": NAME, "prompt": [1, 99999]}, 400, "prompt", "vocabulary"),
        (TEXT, {"model": NAME, "prompt": [-1]}, 400, "prompt", "vocabulary"),
        (TEXT, {"model": NAME, "prompt": ""}, 400, "prompt", "no token"),
        (TEXT, {"model": NAME, "prompt": []}, 400, "prompt", "at least 1"),
        (TEXT, {"model": NAME, "prompt": {"a": 1}}, 400, "prompt", "list"),
        (TEXT, {"model": NAME, "prompt": "a", "echo": True}, 400, "echo", "leave echo out"),
        (TEXT, b"x" * (2**20 + 1), 413, None, "1,048,576 bytes"),
        ("/v1/chat/completions/../../../etc/passwd", chat(), 404, None, "nothing"),
        ("/%2e%2e/%2e%2e/etc/passwd", chat(), 404, None, "nothing"),
        ("/", chat(), 405, None, "methods"),
    ],
)  # fmt: skip
def test_a_bad_request_gets_an_error_object(
    served: Served, path: str, body: Any, status: int, param: str | None, says: str
) -> None:
    found, _, raw = ask(served, path, body)
    error = json.loads(raw)["error"]
    assert (found, error["param"]) == (status, param) and says in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_must_be_json_and_not_too_long(served: Served) -> None:
    status, _, _ = ask(served, CHAT, chat(), {"Content-Type": "text/plain"})
    assert status == 415  # or any web page could post here without a preflight
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", served.port), PATIENCE)) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_configured_key_is_required(new_generator: Callable[[], ModelGenerator]) -> None:
    with serving(new_generator(), api_key=SecretStr("right-key"), host="127.0.0.1") as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right-key"}):
            for path in (CHAT, "/v1/models", "/nothing"):
                status, answer, raw = ask(served, path, chat(), headers)
                assert status == 401 and answer["www-authenticate"] == "Bearer"
                assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.client("right-key").chat.completions.create(model=NAME, messages=QUESTION).choices
        assert ask(served, "/", method="GET")[0] == ask(served, "/health", method="GET")[0] == 200


def test_no_web_page_reaches_the_server_under_another_name(served: Served) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", ""):
        assert ask(served, "/v1/models", headers={"Host": host}, method="GET")[0] in (400, 403)
    for host in ("localhost", "[::1]:8000", "127.0.0.1:1"):
        status, headers, _ = ask(served, "/v1/models", headers={"Host": host, "Origin": "http://a"}, method="GET")
        assert status == 200 and "access-control-allow-origin" not in headers


def test_other_machines_need_a_key() -> None:
    with pytest.raises(UserError, match="0.0.0.0 opens this server to others; set api_key"):
        parse(ServeConfig, ["--host", "0.0.0.0"], "serve")
    config = parse(ServeConfig, ["--host", "0.0.0.0", "--api-key", "s3cret"], "serve")
    assert "s3cret" not in repr(config) and config.api_key.get_secret_value() == "s3cret"


def test_the_key_is_never_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('api_key = "s3cret key"')
    arguments = ["@", str(tmp_path / "serve.toml")]
    with pytest.raises(SystemExit):
        parse(ServeConfig, [*arguments, "--help"], "serve")
    with pytest.raises(UserError, match="ASCII without spaces") as refusal:
        parse(ServeConfig, arguments, "serve")
    assert "s3cret" not in capsys.readouterr().out + str(refusal.value)


def test_a_full_queue_refuses_and_says_when_to_retry(new_generator: Callable[[], ModelGenerator], gate: Gate) -> None:
    with serving(new_generator(), queue_size=0) as served, ThreadPoolExecutor() as pool, gate:
        working = pool.submit(ask, served, CHAT, chat(n=4))
        eventually(lambda: served.driver.held)
        status, headers, raw = ask(served, CHAT, chat())
        assert status == 429 and int(headers["retry-after"]) > 0
        assert json.loads(raw)["error"]["code"] == "queue_full"
        gate.open()
        assert working.result()[0] == 200
        assert ask(served, CHAT, chat())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_when_the_client_leaves_its_slots_are_freed(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch, stream: bool, n: int
) -> None:
    """Three blocks at most are generated: the one before it leaves, and two that the driver may have entered."""
    generated, deliver = [0], serve.Driver.deliver

    def counted(self: serve.Driver, parts: list[sampler.Completion]) -> None:
        generated[0] += sum(len(part.tokens) for part in parts)
        deliver(self, parts)

    monkeypatch.setattr(serve.Driver, "deliver", counted)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    body = json.dumps(chat(stream=stream, n=n, max_tokens=10**9, temperature=1.0))
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    gate.step()
    eventually(served.running_count)
    if stream:
        connection.getresponse().close()
    connection.close()
    eventually(lambda: served.driver.held == 0)
    gate.open()
    eventually(served.is_quiet)
    assert 0 < generated[0] <= 3 * serve.STEPS * 4


def test_half_open_connections_delay_nobody(served: Served, alone: sampler.Sampler) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
    beginnings = [b"", b"GET / HT", head.encode(), f"{head}\r\n{{".encode()]
    connections = [socket.create_connection(("127.0.0.1", served.port), PATIENCE) for _ in range(50)]
    for number, connection in enumerate(connections):
        connection.sendall(beginnings[number % 4])
    status, _, raw = ask(served, CHAT, chat())
    for connection in connections:
        connection.close()
    assert status == 200
    assert json.loads(raw)["choices"][0]["message"]["content"] == expected(alone)[0].text
    eventually(served.is_quiet)


def test_a_body_that_does_not_arrive_is_refused(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.1)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", served.port), PATIENCE)) as connection:
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_if_the_sampler_fails_every_client_gets_an_error(
    new_generator: Callable[[], ModelGenerator],
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        gate.wait()
        raise RuntimeError("/secret/path is on fire")

    monkeypatch.setattr(sampler.Sampler, "advance", broken)
    with serving(new_generator()) as served, ThreadPoolExecutor() as pool, gate:
        working = [pool.submit(ask, served, CHAT, chat(stream=stream)) for stream in (False, False, True)]
        eventually(lambda: served.driver.held == 3)
        gate.open()
        answers = [each.result() for each in working]
        assert [status for status, _, _ in answers] == [500, 500, 200]
        assert all(b'"server_error"' in raw and b"secret" not in raw for _, _, raw in answers)
        assert ask(served, "/health", method="GET")[0] == 503
        assert ask(served, CHAT, chat())[0] == 503
    assert "on fire" in capfd.readouterr().err


VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, 1e308, -0.0, 10**40, "", "a", "small", "marbles " * 500, "\ud83d\ude00", "\0",
    "<|im_end|>", "../../etc/passwd", [], {}, [[]], [1, 2], ["a"], {"type": "text"}, QUESTION, [None], [[1], ["b"]],
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "n", "stream", "stream_options", "seed", "stop", "max_tokens", "temperature",
    "top_p", "frequency_penalty", "presence_penalty", "top_k", "min_p", "repetition_penalty", "logprobs", 
    "top_logprobs", "tools", "user", "max_completion_tokens", "best_of", "echo", "anything",
]  # fmt: skip
PATHS = [CHAT, CHAT, CHAT, TEXT, TEXT, TEXT, "/", "/v1/models", f"/v1/models/{NAME}", "/health", "/..%2f"]


def fuzzed(chance: random.Random) -> tuple[str, str, bytes]:
    """Method, path and body of a request, similar to a good one or not at all."""
    path = chance.choice(PATHS)
    body: Any = {"model": NAME, "max_tokens": chance.randrange(1, 12), "stream": chance.random() < 0.3}
    body |= {"messages": QUESTION} if path == CHAT else {"prompt": "Ben has"}
    for _ in range(chance.randrange(4)):
        body[chance.choice(FIELDS)] = chance.choice(VALUES)
    raw = json.dumps(body).encode()
    if chance.random() < 0.15:
        raw = bytes(chance.choice((byte, chance.randrange(256))) for byte in raw[: chance.randrange(len(raw))])
    method = "POST" if chance.random() < 0.85 else chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
    return method, path, raw


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_never_break_the_server(served: Served, directory: Path, count: int) -> None:
    """Some clients leave before they get their answer, and some do not speak HTTP."""
    secrets = [str(directory), str(Path.home()), str(Path(serve.__file__).parent), "Traceback", "serve.py"]

    def send(seed: int) -> int:
        chance = random.Random(seed)
        method, path, raw = fuzzed(chance)
        if chance.random() < 0.05:
            with closing(socket.create_connection(("127.0.0.1", served.port), PATIENCE)) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n"[: chance.randrange(32)] + chance.randbytes(200))
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100)[:10] in (b"", b"HTTP/1.1 4")
                return 0
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)) as connection:
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            if chance.random() < 0.1:
                return 0
            response = connection.getresponse()
            text = response.read().decode()
            assert not [secret for secret in secrets if secret in text]
            if response.status >= 400 and method != "HEAD":
                assert json.loads(text)["error"]["message"]
            assert '"server_error"' not in text
            return response.status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(send, range(count)))
    assert {200, 400, 404, 405} <= set(statuses) <= {0, 200, 400, 404, 405, 429}
    assert statuses.count(200) > count / 10
    eventually(served.is_quiet)
    assert ask(served, CHAT, chat())[0] == 200


# Load


def test_many_clients_get_what_each_would_alone(served: Served, alone: sampler.Sampler) -> None:
    def fields(number: int) -> dict[str, Any]:
        limits = {"max_tokens": 5 + 3 * number % 40, "seed": number}
        return limits | ({"temperature": 1.0, "top_p": 0.9} if number % 2 else {"temperature": 0.0})

    def one(number: int) -> str:
        found = served.client().chat.completions.create(
            model=NAME, messages=QUESTION, stream=number % 3 == 0, **fields(number)
        )
        if number % 3:
            return found.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)

    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(one, range(24)))
    assert said == [expected(alone, **fields(number))[0].text for number in range(24)]


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver; install them as .ci/run does")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(driver))
    yield browser
    browser.quit()


def by_id(browser: webdriver.Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def turns(browser: webdriver.Chrome, role: str) -> list[str]:
    """Their texts at one moment, as a stream replaces its element all the time."""
    script = "return [...document.querySelectorAll(`.turn.${arguments[0]}`)].map((turn) => turn.innerText)"
    return browser.execute_script(script, role)


def type_question(browser: webdriver.Chrome, text: str) -> None:
    by_id(browser, "prompt").send_keys(text)
    by_id(browser, "send").click()


def open_page(browser: webdriver.Chrome, served: Served, messages: list[dict[str, str]]) -> None:
    browser.get(served.url)
    browser.execute_script("localStorage.setItem('lacuna.messages', JSON.stringify(arguments[0]))", messages)
    browser.refresh()
    eventually(lambda: by_id(browser, "model").text == NAME)


def test_the_page_streams_stops_retries_and_remembers_on_a_phone(
    browser: webdriver.Chrome,
    new_generator: Callable[[], ModelGenerator],
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with serving(new_generator()) as served, gate:
        open_page(browser, served, [])
        type_question(browser, "How many marbles has Nora?" + "unbroken" * 12)
        gate.step()
        eventually(lambda: len(turns(browser, "assistant")[-1]) > 3)
        first = turns(browser, "assistant")[-1].rstrip("…")
        gate.step()
        eventually(lambda: len(turns(browser, "assistant")[-1]) > len(first) + 3)
        gate.open()
        eventually(by_id(browser, "send").is_displayed)
        assert turns(browser, "assistant")[-1].startswith(first[:3])
        gate.close()
        type_question(browser, "And Clara?")
        gate.step()
        eventually(lambda: len(turns(browser, "assistant")[-1]) > 3)
        by_id(browser, "stop").click()
        eventually(lambda: served.driver.held == 0)
        gate.open()
        eventually(by_id(browser, "send").is_displayed)
        assert turns(browser, "assistant")[-1].endswith("Stopped.")

        def refuse(*_: Any) -> None:
            raise serve.ApiError(429, "no room now")

        with monkeypatch.context() as patched:
            patched.setattr(serve, "check_name", refuse)
            type_question(browser, "And Ben?")
            eventually(lambda: "no room now" in turns(browser, "assistant")[-1])
        browser.find_element(By.CSS_SELECTOR, ".turn.assistant button").click()
        eventually(lambda: by_id(browser, "send").is_displayed() and "no room" not in turns(browser, "assistant")[-1])
        said = turns(browser, "user"), turns(browser, "assistant")
        assert said[0][1:] == ["And Clara?", "And Ben?"] and len(said[1]) == 3 and "Retry" not in said[1][-1]
        assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        for name in ("new", "send"):
            assert by_id(browser, name).rect["x"] + by_id(browser, name).rect["width"] <= 390
        browser.refresh()
        eventually(lambda: turns(browser, "user"))
        assert (turns(browser, "user"), turns(browser, "assistant")) == said
        by_id(browser, "new").click()
        assert not turns(browser, "user")
        log = browser.get_log("browser")
        assert [entry for entry in log if entry["level"] == "SEVERE" and "429" not in entry["message"]] == []


ANSWER = """<img src=x onerror="document.title='broken in'"> <script>document.title='broken in'</script>

**Steps** in *order*
1. First `<b>code</b>` here
2. **Second** one

- [a link](javascript:alert(1))

```python
for each in "<i>":
    print(each)
```
and the rest"""


def test_text_never_becomes_markup(browser: webdriver.Chrome, served: Served) -> None:
    open_page(browser, served, [{"role": role, "content": ANSWER} for role in ("user", "assistant")])
    log = by_id(browser, "log")
    tags = {each.tag_name for each in log.find_elements(By.CSS_SELECTOR, "*")}
    assert tags == {"div", "p", "ol", "ul", "li", "code", "strong", "em", "pre"}
    assert [each.text for each in log.find_elements(By.CSS_SELECTOR, "li")] == [
        "First <b>code</b> here", "Second one", "[a link](javascript:alert(1))",
    ]  # fmt: skip
    assert log.find_element(By.TAG_NAME, "pre").text == 'for each in "<i>":\n    print(each)'
    assert log.find_element(By.CSS_SELECTOR, ".user").text == ANSWER
    assert browser.title == f"{NAME} · lacuna"

    backgrounds = []
    for theme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        backgrounds.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert backgrounds[0] > 600 and backgrounds[1] < 100


def test_the_page_is_one_file_under_a_strict_policy(served: Served) -> None:
    status, headers, raw = ask(served, "/", method="GET")
    text = raw.decode()
    assert status == 200 and len(text.splitlines()) < 300
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and "server" not in headers


# The command


def test_sigterm_finishes_the_answers_that_have_begun(directory: Path) -> None:
    arguments = ["--model-name", str(directory), "--port", "0", "--compute-dtype", "float32", "--slots", "2"]
    program = "import sys; from lacuna.cli import main; sys.argv[1:1] = ['serve']; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        found = re.match(r"small at http://127\.0\.0\.1:(\d+)", line)
        if not found:
            process.kill()
        assert found, line + process.stderr.read()
        with closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=PATIENCE)) as connection:
            body = json.dumps(chat(stream=True, max_tokens=900, temperature=1.5, n=2))
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(PATIENCE) == 0
        shape = json.loads((directory / "config.json").read_text())
        capacity = min(4096, shape["max_position_embeddings"])
        assert f"slots: 2, each of {capacity:,} tokens" in process.stdout.read()
        assert process.stderr.read() == ""
