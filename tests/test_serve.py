"""The server over real sockets: OpenAI's own client, hostile clients, and the page in a browser."""

import asyncio
import copy
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import openai
import pytest
from conftest import TINY, make_small, mesh_of, random_params
from pydantic import SecretStr
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from lacuna import checkpoint, model, sampler, weights
from lacuna.apps import protocol, serve
from lacuna.apps.configs import ServeConfig
from lacuna.apps.constraints import forest_of
from lacuna.apps.generator import Generator as ModelGenerator
from lacuna.apps.protocol import ApiError, ChatBody, chat_prompt
from lacuna.cli import parse
from lacuna.config import SamplingKeys, UserError
from lacuna.tokenizer import Tokenizer, decode, encode, load_tokenizer, render

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
    params = random_params(replace(shape, initializer_range=0.4))
    checkpoint.save_model(directory, params, shape, source)
    return directory


@pytest.fixture(scope="module")
def new_generator(directory: Path) -> Callable[..., ModelGenerator]:
    shape, mesh, tokenizer = model.read_model_config(directory), mesh_of(1, 1, 1), load_tokenizer(directory)
    params = weights.load_params(directory, shape, mesh)
    rules = SamplingKeys(temperature=0.0, max_tokens=30)

    def make(tokenizer: Tokenizer = tokenizer, constraint: sampler.Forest | None = None) -> ModelGenerator:
        opened, capacity = (
            checkpoint.OpenedModel(directory, shape, tokenizer, mesh, "", checkpoint.at(directory)),
            1024 if constraint else CAPACITY,
        )
        batch = sampler.Sampler(params, opened, 4, capacity, "float32", constraint)
        return ModelGenerator(batch, directory, rules, (2, 0))

    return make


@dataclass
class Served:
    port: int
    driver: serve.Driver
    generator: ModelGenerator
    clients: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "unused") -> Any:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
        self.clients.append(client)
        return client

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
            served = Served(listener.getsockname()[1], service.driver, generator)
            yield served
            for client in served.clients:
                client.close()
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
    whole = next((place for place, token in enumerate(tokens) if "\ufffd" in token), len(tokens))
    assert whole > 5 and offsets[:whole] == [len("".join(tokens[:place])) for place in range(whole)]
    assert len(offsets) == len(tokens) and offsets == sorted(offsets)
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
        model=NAME, messages=[{"role": "user", "content": parts}], user="me", metadata={"a": "b"}, store=True,
        service_tier="flex", verbosity="medium",
        logit_bias={}, response_format={"type": "text"}, tools=[], tool_choice="none", max_completion_tokens=9,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "temperature": None},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected(alone, max_tokens=9)[0].text
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    with pytest.raises(
        openai.BadRequestError, match="functions: this server does not support it; leave functions"
    ) as refusal:
        client.chat.completions.create(model=NAME, messages=QUESTION, extra_body={"functions": [{"name": "f"}]})
    assert refusal.value.param == "functions" and refusal.value.code == "unsupported_parameter"


def test_fields_that_ask_for_nothing_pass_and_others_are_refused_by_name(served: Served) -> None:
    """What clients send in messages and requests: no template sees it, or it is null."""
    unused = {"id": "m1", "type": "text", "timestamp": 1, "cache_control": {"type": "ephemeral"}, "agent": None}
    body = chat(messages=[QUESTION[0] | unused], max_tokens=2, moderation=None, foo=None, tools=None,
                prompt_cache_options={"mode": "auto"}, stream_options={"continuous_usage_stats": True})  # fmt: skip
    whole, plain = (json.loads(ask(served, CHAT, each)[2]) for each in (body, chat(max_tokens=2)))
    assert whole["choices"] == plain["choices"] and whole["usage"] == plain["usage"]
    for name, value in {"function_call": {"name": "f"}, "audio": {"id": "a"}, "prefix": True}.items():
        status, _, raw = ask(served, CHAT, chat(messages=[{"role": "user", "content": "hi", name: value}]))
        assert status == 400 and json.loads(raw)["error"]["param"] == name


def test_the_end_of_a_choice_is_a_chunk_without_text(served: Served, alone: sampler.Sampler) -> None:
    """As in OpenAI's reference: some clients stop reading at the finish_reason."""
    chunks = list(served.client().chat.completions.create(model=NAME, messages=QUESTION, stream=True, n=2))
    ends = [chunk.choices[0] for chunk in chunks if chunk.choices[0].finish_reason]
    assert [choice.delta.to_dict() for choice in ends] == [{}, {}]
    texts = [
        chunk.choices[0] for chunk in served.client().completions.create(model=NAME, prompt="Ben has", stream=True)
    ]
    assert texts[-1].text == "" and texts[-1].finish_reason
    assert "".join(choice.text for choice in texts if not choice.finish_reason) == expected(alone, "Ben has")[0].text


def test_ignoring_the_end_answers_to_the_limit(new_generator: Callable[..., ModelGenerator]) -> None:
    generator = new_generator()
    (whole,) = expected(generator.sampler)
    with serving(generator._replace(stop_ids=whole.tokens[3:4])) as served:
        found = [json.loads(ask(served, CHAT, chat(ignore_eos=ignore))[2]) for ignore in (False, True)]
    assert found[0]["usage"]["completion_tokens"] <= 4 and found[1]["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(served: Served, alone: sampler.Sampler, stream: bool) -> None:
    """What scoring by likelihood needs: the prompt's tokens, with max_tokens = 0 nothing else."""
    text = "Nora has 18 marbles. Ben has"
    tokens = encode(alone.tokenizer, text, False).tolist()
    params, shape = weights.load_params(alone.opened.source, alone.model, alone.mesh), alone.model
    row, place = jax.numpy.array([tokens]), jax.numpy.arange(len(tokens))[None]
    with jax.set_mesh(alone.mesh):
        hidden = model.forward(params, model.embed(params, row, "float32"), jax.numpy.ones_like(row), place, shape)
        wanted = jax.nn.log_softmax(model.logits_of(hidden, model.head_of(params, shape), shape.vocabulary_size)[0])
    values = [float(wanted[at, token]) for at, token in enumerate(tokens[1:])]

    def asked(**fields: Any) -> list[Any]:
        found: Any = served.client().completions.create(model=NAME, echo=True, logprobs=2, stream=stream, **fields)
        return list(found) if stream else [found]

    for prompt, count in ((text, 0), ([tokens], 0), (tokens, 3)):
        choices = [chunk.choices[0] for chunk in asked(prompt=prompt, max_tokens=count)]
        scored = [choice.logprobs for choice in choices if choice.logprobs]
        found, tops, offsets, names = (
            sum((getattr(each, name) for each in scored), [])
            for name in ("token_logprobs", "top_logprobs", "text_offset", "tokens")
        )
        assert found[0] is tops[0] is None and len(found) == len(tokens) + count
        assert found[1 : len(tokens)] == pytest.approx(values, abs=1e-4)
        for top, each in zip(tops[1:], found[1:], strict=True):
            assert len(top) in (2, 3) and min(top.values()) <= each <= max(top.values()) + 1e-6
        continued = expected(alone, text, max_tokens=count)[0].text if count else ""
        assert "".join(choice.text for choice in choices) == text + continued and offsets[0] == 0
        assert choices[-1].finish_reason == "length"
        assert offsets[: len(tokens)] == [len("".join(names[:at])) for at in range(len(tokens))]
    answer = json.loads(ask(served, TEXT, {"model": NAME, "prompt": text, "echo": True, "max_tokens": 0, "n": 2})[2])
    assert [choice["text"] for choice in answer["choices"]] == [text] * 2
    assert answer["usage"] == {"prompt_tokens": len(tokens), "completion_tokens": 0, "total_tokens": len(tokens)}


def test_plain_completions_have_sixteen_tokens_unless_told_otherwise(
    new_generator: Callable[..., ModelGenerator],
) -> None:
    generator = new_generator()._replace(rules=SamplingKeys(temperature=0.0), stop_ids=())
    with serving(generator) as served:
        for body, count in (({"prompt": "Ben has"}, 16), ({}, 16), ({"prompt": "Ben has", "max_tokens": 17}, 17)):
            answer = json.loads(ask(served, TEXT, {"model": NAME, **body})[2])
            assert answer["usage"]["completion_tokens"] == count


def test_the_sampled_token_is_among_the_likeliest(served: Served) -> None:
    found = served.client().completions.create(
        model=NAME, prompt="Ben has", max_tokens=12, temperature=2, seed=3, logprobs=1
    )
    logprobs = found.choices[0].logprobs
    pairs = list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))
    assert all(value in top.values() for value, top in pairs) and {len(top) for _, top in pairs} == {1, 2}
    alone = (
        served.client().completions.create(model=NAME, prompt="Ben has", max_tokens=3, logprobs=0).choices[0].logprobs
    )
    assert [[*top.values()] for top in alone.top_logprobs] == [[value] for value in alone.token_logprobs]


# Tools

TOOLS_TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|im_start|>{{
message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{%
endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = 'One moment.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
NUMBERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}
PARAMETERS = {"type": "object", "properties": NUMBERS, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "strict": True, "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def caller(new_generator: Callable[..., ModelGenerator], directory: Path, tmp_path_factory: Any) -> Iterator[Served]:
    """A server whose model calls `add`, and says the sum when it has got it: its sampler may write nothing else."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    tokenizer = load_tokenizer(directory, str(template))
    texts = [encode(tokenizer, text, False).tolist() for text in (CALL, "It is 5.")]
    generator = new_generator(tokenizer, forest_of([[text] for text in texts], end_id=2))

    def requests_of(body: Any, generator: ModelGenerator) -> list[sampler.Request]:
        has_result = isinstance(body, ChatBody) and any(message.role == "tool" for message in body.messages)
        requests = protocol.requests_of(body, generator)
        return [replace(each, root=int(has_result)) for each in requests] if generator.sampler.constraint else requests

    with pytest.MonkeyPatch.context() as patch, serving(generator) as served:
        patch.setattr(serve, "requests_of", requests_of)
        yield served


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_calls_tools(caller: Served, stream: bool) -> None:
    fields = {"model": NAME, "messages": QUESTION, "tools": [ADD], "max_tokens": 200, "stream": stream}
    found: Any = caller.client().chat.completions.create(**fields)
    choices = [chunk.choices[0] for chunk in (found if stream else [found])]
    said = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(message.content or "" for message in said) == "One moment."
    (call,) = [call for message in said for call in message.tool_calls or []]
    assert call.type == "function" and call.id and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
    assert choices[-1].finish_reason == "tool_calls" and not (stream and choices[-1].delta.tool_calls)
    result = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "5"},
    ]
    answer = caller.client().chat.completions.create(**fields | {"messages": result, "stream": False})
    assert answer.choices[0].message.content == "It is 5." and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_off_in_its_closing_tag_says_nothing_of_it(caller: Served, stream: bool) -> None:
    tokens = encode(caller.generator.sampler.tokenizer, CALL, False).tolist()
    texts = [decode(caller.generator.sampler.tokenizer, tokens[:count]) for count in range(len(tokens))]
    ends = {count: text.partition("}}\n")[2] for count, text in enumerate(texts)}
    cut = [count for count, end in ends.items() if end and "</tool_call>".startswith(end)]
    assert cut
    for count in cut:
        fields = {"model": NAME, "messages": QUESTION, "tools": [ADD], "max_tokens": count, "stream": stream}
        found: Any = caller.client().chat.completions.create(**fields)
        choices = [chunk.choices[0] for chunk in (found if stream else [found])]
        said = [choice.delta if stream else choice.message for choice in choices]
        assert "".join(message.content or "" for message in said) == "One moment."
        assert sum(len(message.tool_calls or []) for message in said) == 1 and choices[-1].finish_reason == "length"


def test_tools_are_offered_as_the_request_says(caller: Served, served: Served) -> None:
    def asked(server: Served, **fields: Any) -> tuple[int, Any]:
        status, _, raw = ask(server, CHAT, chat(tools=[ADD], max_tokens=200, **fields))
        return status, json.loads(raw)

    _, answer = asked(caller, tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == CALL and answer["choices"][0]["finish_reason"] == "stop"
    offered = asked(caller)[1]["usage"]["prompt_tokens"]
    assert offered > answer["usage"]["prompt_tokens"]
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        (status, answer), wanted = asked(caller, tool_choice=choice), "'none' or 'auto'; this server can't force a call"
        assert status == 400 and answer["error"]["param"] == "tool_choice" and wanted in answer["error"]["message"]
    status, answer = asked(served)
    assert status == 400 and "this model's chat template does not write them" in answer["error"]["message"]
    assert asked(served, tool_choice="none")[0] == 200  # nothing is offered
    _, answer = asked(caller, parallel_tool_calls=False)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "One moment."
    (call,) = choice["message"]["tool_calls"]
    assert call.keys() == {"id", "type", "function"}  # only chunks have an index


def test_an_answer_without_parallel_calls_stops_after_the_first(alone: sampler.Sampler, tmp_path: Path) -> None:
    (template := tmp_path / "tools.jinja").write_text(TOOLS_TEMPLATE)
    generator = ModelGenerator(alone, Path(), SamplingKeys(), ())

    def stop(**fields: Any) -> tuple[str, ...]:
        other = copy.copy(alone)
        other.tokenizer = load_tokenizer(TINY, str(template))
        body = ChatBody.model_validate(chat(stop="x", **fields))
        return protocol.requests_of(body, generator._replace(sampler=other))[0].stop

    assert stop(tools=[ADD]) == stop(parallel_tool_calls=False) == ("x",)
    assert stop(tools=[ADD], parallel_tool_calls=False) == ("x", "</tool_call>")


def test_an_agent_calls_a_function(caller: Served) -> None:
    """pydantic-ai: the model asks for a function, gets its result and answers."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = openai.AsyncOpenAI(base_url=f"{caller.url}/v1", api_key="unused")
    model_of_server = OpenAIChatModel(NAME, provider=OpenAIProvider(openai_client=client))
    agent = pydantic_ai.Agent(model_of_server, model_settings={"max_tokens": 100})
    sums = []

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        sums.append((a, b))
        return a + b

    async def run() -> str:
        async with client:
            return (await agent.run("2 and 3?")).output

    assert asyncio.run(run()) == "It is 5." and sums == [(2, 3)]


# Bad and hostile requests


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        (CHAT, b'{"model": ', 400, None, "Invalid JSON"),
        (CHAT, b"\xff\xfe", 400, None, "Invalid JSON"),
        (CHAT, b"[" * 5000, 400, None, "Invalid JSON"),
        (CHAT, rb'{"model": "small", "messages": [{"role": "user", "content": "\ud800"}]}', 400, None, "JSON"),
        (CHAT, [1], 400, None, "the body = [1] should be"),
        (CHAT, {"model": NAME}, 400, "messages", "messages: this field is required"),
        (CHAT, chat(messages=[]), 400, "messages", "messages = [] should have at least 1 item, not 0"),
        (CHAT, chat(messages=[{"role": "wizard", "content": ""}]), 400, "messages.0.role", "'user'"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages.0.content", "tex"),
        (CHAT, chat(temperature="hot"), 400, "temperature", 'temperature = "hot" should be a valid number'),
        (CHAT, chat(n=True), 400, "n", "integer"),
        (CHAT, chat(n=10**30), 400, "n", "128"),
        (CHAT, chat(n=101), 400, "n", "at once; lower n, send fewer prompts, or"),
        (CHAT, chat(top_k=2**31), 400, "top_k", "less than"),
        (CHAT, chat(temperatur=1), 400, "temperatur", "not a field"),
        (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "not support"),
        (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "logprobs"),
        (CHAT, chat(max_tokens=3, max_completion_tokens=4), 400, "max_tokens", "differ"),
        (CHAT, chat(stop=[""]), 400, "stop.0", 'stop.0 = "" should have at least 1'),
        (CHAT, chat(model="../../etc/passwd"), 404, "model", "no model"),
        (CHAT, chat(messages=[{"role": "user", "content": "marbles " * 400}]), 400, "messages", "room for 320"),
        (TEXT, {"model": NAME, "prompt": [1, 99999]}, 400, "prompt", "vocabulary"),
        (TEXT, {"model": NAME, "prompt": [-1]}, 400, "prompt", "vocabulary"),
        (TEXT, {"model": NAME, "prompt": ""}, 400, "prompt", "no token"),
        (TEXT, {"model": NAME, "prompt": []}, 400, "prompt", "at least 1"),
        (TEXT, {"model": NAME, "prompt": {"a": 1}}, 400, "prompt", "list"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 900_000}]), 400, "messages", "13 characters a token"),
        (CHAT, chat(messages=[{"role": "user"}]), 400, "messages", "neither content nor tool_calls"),
        (CHAT, chat(tools=[ADD, {"type": "function"}]), 400, "tools", "tools: 1.function.name should be"),
        (CHAT, chat(tools=[{"name": "f"}]), 400, "tools", '0.type should be "function", not null'),
        (CHAT, chat(tools=[{"type": "custom"}]), 400, "tools", '0.type should be "function", not "custom"'),
        (CHAT, chat(tools={"name": "f"}), 400, "tools", "array"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens", "max_tokens = 0 should be greater than or equal to 1"),
        (TEXT, b"x" * (2**20 + 1), 413, None, "1,048,576 bytes"),
        ("/v1/chat/completions/../../../etc/passwd", chat(), 404, None, "nothing"),
        ("/%2e%2e/%2e%2e/etc/passwd", chat(), 404, None, "nothing"),
        ("/v1/responses", chat(), 404, None, "/v1/chat/completions, /v1/completions"),
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
    for host in ("localhost", "LocalHost:80", "[::1]:8000", "127.0.0.1:1"):
        status, headers, _ = ask(served, "/v1/models", headers={"Host": host, "Origin": "http://a"}, method="GET")
        assert status == 200 and "access-control-allow-origin" not in headers


def test_only_the_pages_of_allowed_origins_use_the_server(new_generator: Callable[..., ModelGenerator]) -> None:
    page, preflight = "http://localhost:5173", {"Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    with serving(new_generator(), allow_origin=(page,), api_key=SecretStr("right-key")) as served:
        status, headers, _ = ask(served, CHAT, headers={"Origin": page} | preflight, method="OPTIONS")
        assert status == 200 and headers["access-control-allow-origin"] == page
        assert "POST" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"].lower() == "authorization,content-type"
        status, headers, _ = ask(served, CHAT, chat(), {"Origin": page, "Authorization": "Bearer right-key"})
        assert status == 200 and headers["access-control-allow-origin"] == page
        status, headers, _ = ask(served, CHAT, chat(), {"Origin": page})  # a page that is told what is wrong
        assert status == 401 and headers["access-control-allow-origin"] == page
        for method, more in (("OPTIONS", preflight), ("GET", {})):
            _, headers, _ = ask(served, "/v1/models", headers={"Origin": "http://evil.example"} | more, method=method)
            assert "access-control-allow-origin" not in headers
    for given, origin in (("localhost:5173", "http://localhost:5173"), ("https://a.org/chat", "https://a.org")):
        with pytest.raises(UserError, match=f'allow_origin.0 = "{given}" is not an origin; write {origin}$'):
            parse(ServeConfig, ["--allow-origin", given], "serve")
    with pytest.raises(UserError, match="allow_origin = \\* opens this server to every web page; set api_key"):
        parse(ServeConfig, ["--allow-origin", "*"], "serve")


def test_streams_pass_proxies_and_a_wrong_method_names_the_right_one(served: Served) -> None:
    assert ask(served, CHAT, chat(stream=True, max_tokens=1))[1]["x-accel-buffering"] == "no"
    assert ask(served, CHAT, method="GET")[1]["allow"] == "POST"


def test_the_start_says_how_long_answers_of_both_kinds_are(
    new_generator: Callable[..., ModelGenerator], capsys: pytest.CaptureFixture[str]
) -> None:
    generator = new_generator()
    for rules, more in ((SamplingKeys(), "; max_tokens=16 for /v1/completions\n"), (SamplingKeys(max_tokens=7), "")):
        with serving(generator._replace(rules=rules)):
            line = capsys.readouterr().out.partition("rules, unless a request says otherwise: ")[2]
            assert line.endswith(more) and ("/v1/completions" in line) == bool(more)


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
    body = json.dumps(chat(stream=stream, n=n, max_tokens=10**9, temperature=1.0, ignore_eos=True))
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


def test_of_too_many_connections_those_idle_longest_are_closed(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that descriptors never run out, and the server answers whoever asks."""
    monkeypatch.setattr(serve.Connection, "limit", 8)
    monkeypatch.setattr(serve.Connection, "is_logged", False)
    with gate, ThreadPoolExecutor() as pool:
        working = pool.submit(ask, served, CHAT, chat())
        eventually(lambda: served.driver.held)
        idle = [socket.create_connection(("127.0.0.1", served.port), PATIENCE) for _ in range(30)]
        for connection in idle[:20]:
            assert connection.recv(1) == b""
        assert ask(served, "/health", method="GET")[0] == 200
        gate.open()
        assert working.result()[0] == 200
    for connection in idle:
        connection.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["more than 8 connections: those idle longest are closed"]


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


def open_page(browser: webdriver.Chrome, served: Served, messages: list[dict[str, Any]]) -> None:
    browser.get(served.url)
    browser.execute_script("sessionStorage.setItem('lacuna.messages', JSON.stringify(arguments[0]))", messages)
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
            patched.setattr(serve, "number_of_model", refuse)
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


def test_the_page_says_when_an_answer_is_empty_and_still_sends_its_turn(
    browser: webdriver.Chrome, new_generator: Callable[..., ModelGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, asked, parse_body = new_generator(), [], serve.parse_body
    first = expected(
        generator.sampler, render(generator.sampler.tokenizer, [{"role": "user", "content": "Hi"}], None, True)
    )
    monkeypatch.setattr(serve, "parse_body", lambda kind, raw: asked.append(json.loads(raw)) or parse_body(kind, raw))
    with serving(generator._replace(stop_ids=first[0].tokens[:1])) as served:
        open_page(browser, served, [])
        type_question(browser, "Hi")
        eventually(lambda: turns(browser, "assistant") == ["The answer was empty."])
        eventually(by_id(browser, "send").is_displayed)
        type_question(browser, "And now?")
        eventually(lambda: len(asked) == 2)
        eventually(by_id(browser, "send").is_displayed)
    assert [message["content"] for message in asked[1]["messages"]] == ["Hi", "", "And now?"]


def test_an_answer_whose_connection_breaks_off_is_kept_and_no_server_is_said_to_be_away(
    browser: webdriver.Chrome, new_generator: Callable[..., ModelGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_seen = threading.Event()

    async def broken(answer: protocol.Answer, ticket: serve.Ticket) -> Any:
        yield serve.event({"choices": [{"delta": {"content": "Half an ans"}}]})
        await asyncio.to_thread(is_seen.wait, PATIENCE)
        raise asyncio.CancelledError

    with serving(new_generator()) as served:
        open_page(browser, served, [])
        with monkeypatch.context() as patched:
            patched.setattr(serve, "events", broken)
            type_question(browser, "Hi")
            eventually(lambda: "Half an ans" in (turns(browser, "assistant") or [""])[-1])
            is_seen.set()
            eventually(lambda: "broke off" in turns(browser, "assistant")[-1])
        assert turns(browser, "assistant") == ["Half an ans\n\nThe connection broke off.\n\nRetry"]
    type_question(browser, "And now?")
    eventually(lambda: "can't be reached" in turns(browser, "assistant")[-1])
    browser.get_log("browser")


def test_the_page_continues_text_with_a_base_model(
    browser: webdriver.Chrome, new_generator: Callable[..., ModelGenerator], alone: sampler.Sampler
) -> None:
    with serving(new_generator(replace(alone.tokenizer, template=None))) as served:
        open_page(browser, served, [])
        assert "continues text" in (by_id(browser, "prompt").get_attribute("placeholder") or "")
        type_question(browser, "Ben has")
        eventually(lambda: turns(browser, "assistant") and by_id(browser, "send").is_displayed())
        content = browser.execute_script("return messages[1].content")
        assert content == expected(alone, "Ben has", max_tokens=CAPACITY)[0].text


def test_an_answer_that_was_left_is_marked_and_tabs_have_their_own_conversations(
    browser: webdriver.Chrome, served: Served
) -> None:
    half = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Half an ans", "isRunning": True}]
    open_page(browser, served, half)
    assert turns(browser, "assistant") == ["Half an ans\n\nInterrupted, as the page was left.\n\nRetry"]
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    open_page(browser, served, [{"role": "user", "content": "In another tab"}])
    browser.switch_to.window(first)
    browser.execute_script("keep()")
    for handle, said in zip(browser.window_handles, ("Who?", "In another tab"), strict=True):
        browser.switch_to.window(handle)
        browser.refresh()
        eventually(lambda said=said: turns(browser, "user") == [said])
    browser.close()
    browser.switch_to.window(first)


RICH = """> quoted **words**
> in two lines

- one
  1. deep
  2. deeper
     - deepest
- two

| a | b |
|---|---|
| 1 | *2* |

# One *big*
## Two ##
---
#no heading

See [the page](https://example.org/a?b=1), not [this](javascript:alert(1))."""


def test_lists_quotes_tables_and_links_are_drawn(browser: webdriver.Chrome, served: Served) -> None:
    open_page(browser, served, [{"role": "user", "content": "?"}, {"role": "assistant", "content": RICH}])
    found = browser.execute_script("return document.querySelector('.turn.assistant').innerHTML")
    assert found.replace(' start="1"', "") == (
        "<blockquote><p>quoted <strong>words</strong>\nin two lines</p></blockquote>"
        "<ul><li><p>one</p><ol><li><p>deep</p></li><li><p>deeper</p><ul><li><p>deepest</p></li></ul></li></ol></li>"
        "<li><p>two</p></li></ul>"
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><em>2</em></td></tr></table>"
        "<h2>One <em>big</em></h2><h3>Two</h3><hr><p>#no heading</p>"
        '<p>See <a href="https://example.org/a?b=1" target="_blank">the page</a>, not [this](javascript:alert(1)).</p>'
    )


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


def test_a_developer_message_and_template_variables_take_effect_or_are_refused(
    alone: sampler.Sampler, tmp_path: Path
) -> None:
    def prompt(template: str, **fields: Any) -> str:
        (tmp_path / "chat.jinja").write_text(template)
        tokenizer = load_tokenizer(TINY, str(tmp_path / "chat.jinja"))
        body = ChatBody.model_validate(
            chat(messages=[{"role": "developer", "content": "Be brief."}, *QUESTION], **fields)
        )
        other = copy.copy(alone)
        other.tokenizer = tokenizer
        return decode(tokenizer, chat_prompt(body, other))

    named = "{{ mode }}{% for m in messages if m.role in roles %}{{ m.role + ': ' + m.content }}{% endfor %}"
    roles = {"roles": ["system", "user"]}
    assert prompt(named, chat_template_kwargs=roles | {"mode": "no_think "}).startswith(
        "no_think system: Be brief.user"
    )
    with pytest.raises(ApiError, match=r"message 1 \(developer\): the chat template leaves it out of this chat"):
        prompt(named, chat_template_kwargs={"roles": ["user"]})
