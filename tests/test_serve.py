"""The server over real sockets: OpenAI's own client, hostile clients, and the page in a real browser."""

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

from lacuna import checkpoint, model, sampler
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


# A server on a thread


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says something else at every token."""
    directory = tmp_path_factory.mktemp("model") / "small"
    source = make_small(directory.with_name("source"))
    config = model.read_model_config(source)
    params = model.initial_params(jax.random.key(0), replace(config, initializer_range=0.4))
    checkpoint.save_model(directory, params, config, source)
    return directory


@pytest.fixture(scope="module")
def new_generator(directory: Path) -> Callable[[], ModelGenerator]:
    config, mesh, tokenizer = model.read_model_config(directory), mesh_of(1, 1, 1), load_tokenizer(directory)
    params = checkpoint.load_params(directory, config, mesh)
    rules = SamplingKeys(temperature=0.0, max_tokens=30)

    def make() -> ModelGenerator:
        batch = sampler.Sampler(
            params, checkpoint.OpenedModel(directory, config, tokenizer, mesh, ""), 4, CAPACITY, "float32"
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
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def is_quiet(self) -> bool:
        return self.driver.held == 0 and self.generator.sampler.is_idle


@contextmanager
def serving(generator: ModelGenerator, **settings: Any) -> Generator[Served]:
    page = ServeConfig(**{"port": 0, "served_name": NAME, "slots": 4, "queue_size": 96, **settings})
    with serve.bind(page) as listener:
        service = serve.make_service(page, generator, listener)
        server = serve.make_server(page, serve.make_app(service))
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
    """A sampler that no server has, to ask for what an answer should be."""
    return new_generator().sampler


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that takes its time, so that a test can meet it at work."""
    advance = sampler.Sampler.advance
    monkeypatch.setattr(sampler.Sampler, "advance", lambda *all: time.sleep(0.1) or advance(*all))


def eventually(is_true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "this did not become true"
        time.sleep(0.01)


def ask(
    served: Served, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a plain request."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)) as connection:
        connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": QUESTION, **fields}


def expected(alone: sampler.Sampler, text: str | None = None, **fields: Any) -> list[sampler.Completion]:
    """What the sampler gives to a prompt, or to the question asked as a chat."""
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
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
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


def test_a_seed_repeats_and_its_absence_does_not(served: Served) -> None:
    def said(**fields: Any) -> str:
        answer = served.client().chat.completions.create(model=NAME, messages=QUESTION, temperature=2, **fields)
        return answer.choices[0].message.content or ""

    assert said(seed=-5) == said(seed=-5) != said(seed=4)
    assert said() != said()


def test_no_probability_at_all_is_greedy(served: Served, alone: sampler.Sampler) -> None:
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
    """The text without characters that several tokens may have to make up."""
    return re.sub(r"[^\x00-\x7f]", "", text)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_samplers_and_their_tokens_the_text(
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
        (CHAT, b'{"model": ', 400, None, "invalid JSON"),
        (CHAT, b"\xff\xfe", 400, None, "invalid JSON"),
        (CHAT, b"[" * 5000, 400, None, "invalid JSON"),
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


def test_a_body_has_to_be_json_and_no_longer_than_it_says(served: Served) -> None:
    status, _, _ = ask(served, CHAT, chat(), {"Content-Type": "text/plain"})
    assert status == 415  # else a page of the web could post here without asking first
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", served.port), 60)) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_key_is_wanted_where_one_is_set(new_generator: Callable[[], ModelGenerator]) -> None:
    with serving(new_generator(), api_key=SecretStr("right-key"), host="127.0.0.1") as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right-key"}):
            for path in (CHAT, "/metrics", "/v1/models", "/nothing"):
                status, answer, raw = ask(served, path, chat(), headers)
                assert status == 401 and answer["www-authenticate"] == "Bearer"
                assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.client("right-key").chat.completions.create(model=NAME, messages=QUESTION).choices
        assert ask(served, "/", method="GET")[0] == ask(served, "/health", method="GET")[0] == 200


def test_no_page_of_the_web_reaches_in_under_another_name(served: Served) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", ""):
        assert ask(served, "/v1/models", headers={"Host": host}, method="GET")[0] in (400, 403)
    for host in ("localhost", "[::1]:8000", "127.0.0.1:1"):
        status, headers, _ = ask(served, "/v1/models", headers={"Host": host, "Origin": "http://a"}, method="GET")
        assert status == 200 and "access-control-allow-origin" not in headers


def test_others_are_let_in_only_with_a_key() -> None:
    with pytest.raises(UserError, match="0.0.0.0 opens this server to others; set api_key"):
        parse(ServeConfig, ["--host", "0.0.0.0"], "serve")
    page = parse(ServeConfig, ["--host", "0.0.0.0", "--api-key", "s3cret"], "serve")
    assert "s3cret" not in repr(page) and page.api_key.get_secret_value() == "s3cret"


def test_the_key_is_never_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('api_key = "s3cret key"')
    arguments = ["@", str(tmp_path / "serve.toml")]
    with pytest.raises(SystemExit):
        parse(ServeConfig, [*arguments, "--help"], "serve")
    with pytest.raises(UserError, match="ASCII without spaces") as refusal:
        parse(ServeConfig, arguments, "serve")
    assert "s3cret" not in capsys.readouterr().out + str(refusal.value)


def test_a_full_queue_sends_away_and_says_when_to_return(
    new_generator: Callable[[], ModelGenerator], slow: None
) -> None:
    with serving(new_generator(), queue_size=0) as served, ThreadPoolExecutor() as pool:
        working = pool.submit(ask, served, CHAT, chat(n=4))
        eventually(lambda: served.driver.held)
        status, headers, raw = ask(served, CHAT, chat())
        assert status == 429 and int(headers["retry-after"]) > 0
        assert json.loads(raw)["error"]["code"] == "queue_full"
        assert working.result()[0] == 200
        assert ask(served, CHAT, chat())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_when_the_client_is_gone_its_slots_are_free(
    served: Served, alone: sampler.Sampler, slow: None, stream: bool, n: int
) -> None:
    (whole,) = expected(alone, max_tokens=10**9)
    assert whole.finish_reason == "length" and len(whole.tokens) > 250
    figures = served.driver.figures
    cancelled, generated = figures.cancelled._value.get(), figures.completion_tokens._value.get()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    body = json.dumps(chat(stream=stream, n=n, max_tokens=10**9))
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    eventually(served.driver.running_count)
    if stream:
        connection.getresponse().close()
    connection.close()
    eventually(served.is_quiet)
    assert served.driver.running_count() == 0 and figures.cancelled._value.get() == cancelled + 1
    assert figures.completion_tokens._value.get() - generated < 200 * n


def test_half_open_connections_hold_nobody_up(served: Served, alone: sampler.Sampler) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
    beginnings = [b"", b"GET / HT", head.encode(), f"{head}\r\n{{".encode()]
    connections = [socket.create_connection(("127.0.0.1", served.port), 60) for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(beginnings[number % 4])
    status, _, raw = ask(served, CHAT, chat())
    for connection in connections:
        connection.close()
    assert status == 200
    assert json.loads(raw)["choices"][0]["message"]["content"] == expected(alone)[0].text
    eventually(served.is_quiet)


def test_a_silent_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch, new_generator: Callable[[], ModelGenerator]
) -> None:
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.1)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    with serving(new_generator()) as served:
        for beginning, answer in ((b"GET /", b""), (head.encode(), b"HTTP/1.1 408")):
            with closing(socket.create_connection(("127.0.0.1", served.port), 60)) as connection:
                connection.sendall(beginning)
                assert connection.recv(12) == answer
        with closing(socket.create_connection(("127.0.0.1", served.port), 60)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
            assert answer.endswith(b'{"status":"ok"}')


def test_when_the_sampler_fails_all_are_told(
    new_generator: Callable[[], ModelGenerator],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        time.sleep(0.2)
        raise RuntimeError("/secret/path is on fire")

    monkeypatch.setattr(sampler.Sampler, "advance", broken)
    with serving(new_generator()) as served, ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda stream: ask(served, CHAT, chat(stream=stream)), [False, False, True]))
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
PATHS = [CHAT, CHAT, CHAT, TEXT, TEXT, TEXT, "/", "/v1/models", f"/v1/models/{NAME}", "/metrics", "/health", "/..%2f"]


def fuzzed(chance: random.Random) -> tuple[str, str, bytes]:
    """Method, path and body of a request, near to a good one or far from it."""
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


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_never_break_it(served: Served, directory: Path, count: int) -> None:
    """Some clients leave before they have their answer, and some do not speak HTTP."""
    secrets = [str(directory), str(Path.home()), str(Path(serve.__file__).parent), "Traceback", "serve.py"]

    def send(seed: int) -> int:
        chance = random.Random(seed)
        method, path, raw = fuzzed(chance)
        if chance.random() < 0.05:
            with closing(socket.create_connection(("127.0.0.1", served.port), 120)) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n"[: chance.randrange(32)] + chance.randbytes(200))
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100)[:10] in (b"", b"HTTP/1.1 4")
                return 0
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)) as connection:
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


def test_many_clients_get_what_each_would_get_alone(served: Served, alone: sampler.Sampler) -> None:
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
        said = list(pool.map(one, range(48)))
    assert said == [expected(alone, **fields(number))[0].text for number in range(48)]


def test_metrics_count_what_was_done(new_generator: Callable[[], ModelGenerator]) -> None:
    with serving(new_generator()) as served:
        answer = json.loads(ask(served, CHAT, chat(n=2))[2])
        ask(served, CHAT, chat(n=0))
        ask(served, "/nowhere/42", method="GET")
        status, headers, raw = ask(served, "/metrics", method="GET")
    text = raw.decode()
    assert status == 200 and headers["content-type"].startswith("text/plain")
    for line in (
        f'lacuna_requests_total{{path="{CHAT}",status="200"}} 1.0',
        'lacuna_requests_total{path="other",status="404"} 1.0',
        f"lacuna_prompt_tokens_total {answer['usage']['prompt_tokens']:.1f}",
        f"lacuna_completion_tokens_total {answer['usage']['completion_tokens']:.1f}",
        "lacuna_running 0.0", "lacuna_held 0.0", "lacuna_first_token_seconds_count 1.0",
        "lacuna_request_seconds_count 1.0",
    ):  # fmt: skip
        assert line in text.splitlines()


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
    return [turn.text for turn in browser.find_elements(By.CSS_SELECTOR, f".turn.{role}")]


def type_question(browser: webdriver.Chrome, text: str) -> None:
    by_id(browser, "prompt").send_keys(text)
    by_id(browser, "send").click()


def open_page(browser: webdriver.Chrome, served: Served) -> None:
    browser.get(served.url)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    eventually(lambda: by_id(browser, "model").text == NAME)


def test_the_page_chats_stops_and_remembers(
    browser: webdriver.Chrome, new_generator: Callable[[], ModelGenerator], slow: None
) -> None:
    with serving(new_generator()) as served:
        open_page(browser, served)
        lengths = set()
        type_question(browser, "How many marbles has Nora?")
        eventually(
            lambda: lengths.add(sum(map(len, turns(browser, "assistant")))) or by_id(browser, "send").is_displayed()
        )
        assert len(lengths) > 2  # it grew before one's eyes
        by_id(browser, "open-settings").click()
        by_id(browser, "max_tokens").send_keys("100000")
        by_id(browser, "close-settings").click()
        type_question(browser, "And Clara?")
        eventually(lambda: len(turns(browser, "assistant")[-1]) > 20)
        by_id(browser, "stop").click()
        eventually(served.is_quiet)
        eventually(by_id(browser, "send").is_displayed)
        assert served.driver.figures.cancelled._value.get() == 1
        said = turns(browser, "user"), turns(browser, "assistant")
        assert said[0] == ["How many marbles has Nora?", "And Clara?"] and said[1][-1].endswith("Stopped.")
        browser.refresh()
        eventually(lambda: turns(browser, "user"))
        assert (turns(browser, "user"), turns(browser, "assistant")) == said
        assert by_id(browser, "max_tokens").get_attribute("value") == "100000"
        by_id(browser, "new").click()
        assert not turns(browser, "user")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


ANSWER = """<img src=x onerror="document.title='broken in'"> <script>document.title='broken in'</script>

## Steps
1. First `<b>code</b>` here
2. **Second** one

- [a link](javascript:alert(1))

```python
for each in "<i>":
    print(each)
```
and the rest"""


def test_text_never_becomes_markup(browser: webdriver.Chrome, served: Served) -> None:
    open_page(browser, served)
    browser.execute_script(
        "localStorage.setItem('lacuna.messages', JSON.stringify(arguments[0]))",
        [{"role": "user", "content": ANSWER}, {"role": "assistant", "content": ANSWER}],
    )
    browser.refresh()
    eventually(lambda: by_id(browser, "model").text == NAME)
    log = by_id(browser, "log")
    tags = {each.tag_name for each in log.find_elements(By.CSS_SELECTOR, "*")}
    assert tags == {"div", "p", "h2", "ol", "ul", "li", "code", "strong", "pre"}
    assert [each.text for each in log.find_elements(By.CSS_SELECTOR, "li")] == [
        "First <b>code</b> here", "Second one", "[a link](javascript:alert(1))",
    ]  # fmt: skip
    assert log.find_element(By.TAG_NAME, "pre").text == 'for each in "<i>":\n    print(each)'
    assert log.find_element(By.CSS_SELECTOR, ".user").text == ANSWER
    assert browser.title == f"{NAME} · lacuna"


@pytest.mark.parametrize("size", [(390, 844), (1280, 800)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_its_window_in_both_themes(
    browser: webdriver.Chrome, served: Served, size: tuple[int, int], theme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500},
    )
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, served)
    type_question(browser, "unbroken" * 40)
    eventually(lambda: turns(browser, "assistant") and by_id(browser, "send").is_displayed())
    widths = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [size[0]] * 2
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 384) == (theme == "dark")
    by_id(browser, "open-settings").click()
    dialog = by_id(browser, "settings").rect
    assert dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= size[0]
    for name in ("new", "open-settings", "send"):
        assert by_id(browser, name).rect["x"] + by_id(browser, name).rect["width"] <= size[0]


def test_the_page_is_one_file_under_a_strict_policy(served: Served) -> None:
    status, headers, raw = ask(served, "/", method="GET")
    text = raw.decode()
    assert status == 200 and len(text.splitlines()) < 450
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(re.fullmatch(r"'sha256-[^']{44}'", policy[name]) for name in ("script-src", "style-src"))
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


# The command


def test_sigterm_finishes_what_has_begun(directory: Path) -> None:
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
        with closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)) as connection:
            body = json.dumps(chat(stream=True, max_tokens=900, temperature=1.5, n=2))
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
