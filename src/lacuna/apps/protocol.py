"""OpenAI's protocol for the server: request bodies to the sampler's requests, completions to answers, and errors.

A field that could change an answer is never ignored: it takes effect, or is refused by name.
"""

import json
import math
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

import tokenizers
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from lacuna.apps.generator import Generator
from lacuna.apps.tools import CLOSING, before_calls, parse_calls
from lacuna.config import SamplingKeys
from lacuna.sampler import TOP_LOGPROBS, Completion, Request, Sampler, Scores, joined_parts
from lacuna.tokenizer import REPLACEMENT, LostTools, TextStream, Tokenizer, called_name, decode, encode, render_prompt

LEAST_TOP_P = 1e-6  # with a smaller one float32 would leave no token
COMPLETION_TOKENS = 16  # of a plain completion that does not say, as in OpenAI's reference
TOO_LONG = "context_length_exceeded"
REASONS = {"extra_forbidden": "this is not a field of this request; leave it out", "missing": "this field is required"}
LEAST_LOG_PROBABILITY = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks
# Fields that change no answer, whatever their value is
IGNORED = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "include_obfuscation", "continuous_usage_stats", "store", "service_tier",
}  # fmt: skip
# Fields that are not supported, and the values besides null with which they ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": (),
    "verbosity": ("medium",), "best_of": (1,), "suffix": ("",), "prefix": (False,),
}  # fmt: skip


@dataclass
class ApiError(Exception):
    """A refusal as OpenAI writes it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_seconds: int = 0

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# Bodies


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        for name in raw.keys() & UNSUPPORTED.keys():
            if raw[name] is not None and raw[name] not in UNSUPPORTED[name]:
                message = f"{name}: this server does not support it; leave {name} out"
                raise ApiError(400, message, name, "unsupported_parameter")
        unused = IGNORED | UNSUPPORTED.keys()
        return {name: value for name, value in raw.items() if name not in unused and value is not None}


def listed(value: Any) -> Any:
    """A single string as a list, null as an empty one."""
    return [] if value is None else [value] if isinstance(value, str) else value


def listed_prompts(value: Any) -> Any:
    """Prompts, each a string or tokens; a single one as a list of one."""
    prompts = [value] if isinstance(value, list) and value and type(value[0]) is int else listed(value)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) or is_tokens(prompt) for prompt in prompts):
        raise ValueError("should be a string, a list of strings, a list of tokens, or a list of those")
    return prompts


def is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def joined_text(value: Any) -> Any:
    """A message's content in parts as one string."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("this model reads text only; send parts of type text, each with a string as its text")
    return "".join(part["text"] for part in value)


StopString = Annotated[str, Field(min_length=1, max_length=256)]


def checked_functions(value: Any) -> Any:
    """Tools, or calls of them."""
    for index, each in enumerate(value if isinstance(value, list) else ()):
        kind = each.get("type") if isinstance(each, dict) else None
        if kind != "function":
            raise ValueError(f'{index}.type should be "function", not {json.dumps(kind):.40}')
        if "function" not in each or not called_name(each):
            raise ValueError(f"{index}.function.name should be the function's name")
    return value


class GenerationBody(Body):
    """The fields that chats and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: dict[str, Any] = {}  # only include_usage matters
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(listed)] = []
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool = False


class MessageBody(Body):
    """A message; of its fields the template sees these, and no other can change an answer."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(joined_text)] = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[Any], BeforeValidator(checked_functions)] = []
    tool_call_id: str | None = None


class ChatBody(GenerationBody):
    messages: Annotated[list[MessageBody], Field(min_length=1), FailFast()]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    tools: Annotated[list[Any], BeforeValidator(checked_functions)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return self.tools if self.tool_choice == "auto" else []


class CompletionBody(GenerationBody):
    prompt: Annotated[list[Any], Field(min_length=1, max_length=128), BeforeValidator(listed_prompts)] | None = None
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool = False


def parse_body(kind: type[ChatBody] | type[CompletionBody], raw: bytes) -> ChatBody | CompletionBody:
    """A checked body. Raises ApiError with the first problem."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        loc = [part for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
        param = ".".join(map(str, loc[:-1] if loc[-1:] in (["str"], ["int"]) else loc)) or None
        reason = re.sub("^([A-Z][a-z]+ (?=should)|Value error, )| after validation", "", problem["msg"])
        is_of_value = problem["type"] not in (*REASONS, "value_error", "json_invalid")
        given = f" = {json.dumps(problem['input']):.60} " if is_of_value else ": "
        message = f"{param or 'the body'}{given}{REASONS.get(problem['type'], reason)}"
        if param == "tool_choice":
            message += "; this server can't force a call"
        raise ApiError(400, message, param, "invalid_json" if problem["type"] == "json_invalid" else None) from None


def requests_of(body: ChatBody | CompletionBody, generator: Generator) -> list[Request]:
    """A request for each prompt of a body, with the server's rules for what it leaves out. Raises ApiError."""
    tokenizer, stop = generator.sampler.tokenizer, body.stop
    names = SamplingKeys.model_fields.keys() & body.model_fields_set
    chosen = body.model_dump(include=names, exclude_none=True)
    if "top_p" in chosen:
        chosen["top_p"] = max(chosen["top_p"], LEAST_TOP_P)
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            if body.max_tokens not in (None, body.max_completion_tokens):
                raise ApiError(400, "max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
            chosen["max_tokens"] = body.max_completion_tokens
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", "top_logprobs")
        stop = [*stop, *[CLOSING] * bool(body.offered and not body.parallel_tool_calls)]
        place, prompts, top = "messages", [chat_prompt(body, generator.sampler)], body.top_logprobs or 0
    else:
        place, top = "prompt", body.logprobs or 0
        if "max_tokens" not in generator.rules.model_fields_set:
            chosen = {"max_tokens": COMPLETION_TOKENS} | chosen
        start = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]  # of a new document
        prompts = [
            encoded(prompt, generator.sampler, place, True) if isinstance(prompt, str) else prompt
            for prompt in body.prompt or [start[:1]]
        ]
    requests = [
        Request(
            prompt=tuple(prompt),
            rules=generator.rules.model_copy(update=chosen),
            stop=tuple(stop),
            stop_ids=() if body.ignore_eos else generator.stop_ids,
            n=body.n or 1,
            top_logprobs=top,
            seed=secrets.randbits(32) if body.seed is None else body.seed,
        )  # fmt: skip
        for prompt in prompts
    ]
    for request in requests:
        try:
            generator.sampler.check(request)
        except ValueError as error:
            is_long = len(request.prompt) >= generator.sampler.capacity
            raise ApiError(400, str(error), place, TOO_LONG if is_long else None) from None
    return requests


def chat_prompt(body: ChatBody, sampler: Sampler) -> list[int]:
    if sampler.tokenizer.template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
    if any(message.content is None and not message.tool_calls for message in body.messages):
        raise ApiError(400, "messages: one of them has neither content nor tool_calls; add its content", "messages")
    messages = [message.model_dump(exclude_defaults=True) for message in body.messages]
    try:
        text = render_prompt(sampler.tokenizer, messages, body.offered or None, body.chat_template_kwargs or {})
    except LostTools:
        raise ApiError(400, "tools: this model's chat template does not write them; leave tools out", "tools") from None
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    return encoded(text, sampler, "messages", False)


def encoded(text: str, sampler: Sampler, place: str, add_special_tokens: bool) -> list[int]:
    """The tokens of a prompt, unless its characters alone show that it is too long."""
    longest = longest_token(sampler.tokenizer.backend)
    if len(text) > sampler.capacity * longest:
        fact = f"the prompt has {len(text):,} characters, at most {longest} characters a token"
        raise ApiError(400, f"{fact}, and there is room for {sampler.capacity:,} tokens; shorten it", place, TOO_LONG)
    return encode(sampler.tokenizer, text, add_special_tokens).tolist()


@cache
def longest_token(backend: tokenizers.Tokenizer) -> int:
    """Characters of the longest token."""
    return max(map(len, backend.get_vocab(with_added_tokens=True)))


# Answers


@dataclass
class Answer:
    """An answer while it is generated: what its chunks share, and how far they have come."""

    body: ChatBody | CompletionBody
    requests: list[Request]
    tokenizer: Tokenizer
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    offsets: dict[int, tuple[TextStream, int]] = field(default_factory=dict)
    completion_tokens: int = 0

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatBody)

    def whole(self, parts: Iterable[tuple[int, Completion]]) -> dict[str, Any]:
        """The answer without streaming; each part comes with the place of its prompt."""
        found: dict[tuple[int, int], list[Completion]] = {}
        for place, part in parts:
            found.setdefault((place, part.index), []).append(part)
        choices = [self.choice(key[0], joined_parts(found[key]), "message") for key in sorted(found)]
        return self.framed("chat.completion", choices) | {"usage": self.usage()}

    def prompts(self, scores: Sequence[Scores]) -> Iterator[tuple[int, Completion]]:
        """A first part of each choice with the place of its prompt: the prompt, where it is to be echoed, with its
        scores, if any; and the end, where no token is to follow."""
        if not isinstance(self.body, CompletionBody) or not (self.body.echo or self.body.max_tokens == 0):
            return
        for place, request in enumerate(self.requests):
            given, tokens = (self.body.prompt or [[]])[place], request.prompt if self.body.echo else ()
            text = given if isinstance(given, str) and tokens else decode(self.tokenizer, tokens, True)
            values, tops = scores[place] if scores else ((), ())
            for index in range(request.n):
                self.completion_tokens -= len(tokens)  # which become part of a choice, but are not generated
                reason = "length" if self.body.max_tokens == 0 else ""
                yield place, Completion(-1, index, tokens, text, values, (), tops, reason)

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        first = {"delta": delta, "logprobs": None, "finish_reason": None}
        count = len(self.requests) * self.requests[0].n if self.is_chat else 0
        return [self.chunk([{"index": index} | first]) for index in range(count)]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.body.stream_options.get("include_usage") else {}
        return self.framed("chat.completion.chunk", choices) | usage

    def chunks(self, place: int, part: Completion) -> Iterator[dict[str, Any]]:
        """The next chunks of a stream, if there is anything to say; the end of a choice is a chunk without text."""
        choice = self.choice(place, part, "delta")
        if choice.get("text") or choice.get("delta") or choice["logprobs"]:
            yield self.chunk([choice | {"finish_reason": None}])
        if choice["finish_reason"]:
            nothing = {"delta": {}} if self.is_chat else {"text": ""}
            yield self.chunk([choice | nothing | {"logprobs": None}])

    def framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.token}", "created": self.created,
            "object": kind if self.is_chat else "text_completion", "model": self.body.model, "choices": choices,
        }  # fmt: skip

    def choice(self, place: int, part: Completion, key: Literal["message", "delta"]) -> dict[str, Any]:
        index, reason = place * self.requests[place].n + part.index, part.finish_reason or None
        self.completion_tokens += len(part.tokens)
        if isinstance(self.body, CompletionBody):
            logprobs = self.text_logprobs(index, place, part)
            return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": reason}
        content, calls = part.text, []
        if offered := self.body.offered:
            before, self.texts[index] = before_calls(self.texts[index]), self.texts[index] + part.text
            content = before_calls(self.texts[index])
            if reason:
                content, found = parse_calls(self.texts[index], {called_name(tool) for tool in offered})
                found = found if self.body.parallel_tool_calls else found[:1]
                places = [{"index": number} if key == "delta" else {} for number in range(len(found))]
                calls = [place | written_call(call) for place, call in zip(places, found, strict=True)]
                reason = "tool_calls" if calls and reason == "stop" else reason
            content = content[len(before) :]
        message: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if key == "message":
            message |= {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        elif content:
            message["content"] = content
        return {"index": index, key: message, "logprobs": self.logprobs(part), "finish_reason": reason}

    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"total_tokens": sum(counts.values())}

    def logprobs(self, part: Completion) -> dict[str, Any] | None:
        """Log-probabilities of a chat's tokens, without the token that ended it."""
        if not self.body.logprobs:
            return None
        content = [
            self.entry(token, value) | {"top_logprobs": [self.entry(*each) for each in top]}
            for token, value, top in self.shown(0, part)
        ]
        return {"content": content, "refusal": None}

    def text_logprobs(self, index: int, place: int, part: Completion) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        prompt = () if getattr(self.body, "echo", False) else self.requests[place].prompt
        stream, offset = self.offsets.get(index) or (TextStream(self.tokenizer, prompt), 0)
        rows = []
        for token, value, top in self.shown(place, part):
            likely = {token: value, **dict(top)}  # the token itself is always among them
            scores = finite(value), {self.key(each): finite(likely[each]) for each in likely}
            is_first = math.isnan(value)  # of an echoed prompt, where nothing predicts it
            rows.append((written(self.tokenizer, token), *((None, None) if is_first else scores), offset))
            offset += len(stream.add([token]))
        self.offsets[index] = stream, offset
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[at] for row in rows] for at, name in enumerate(names)}

    def shown(self, place: int, part: Completion) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
        """Token, log-probability and most likely tokens, without the stop token."""
        rows = list(zip(part.tokens, part.log_probabilities, part.top_logprobs, strict=True))
        is_stopped = part.finish_reason == "stop" and rows and rows[-1][0] in self.requests[place].stop_ids
        return rows[:-1] if is_stopped else rows

    def key(self, token: int) -> str:
        """A token's text, or its id if it is not whole characters."""
        text = written(self.tokenizer, token)
        return f"token_id:{token}" if REPLACEMENT in text else text

    def entry(self, token: int, value: float) -> dict[str, Any]:
        text = written(self.tokenizer, token)
        whole = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": finite(value), "bytes": whole}


def written_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    function = call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def finite(log_probability: float) -> float:
    return max(LEAST_LOG_PROBABILITY, log_probability)


def written(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in the middle of a text, as some tokenizers drop a leading space at the beginning."""
    return decode(tokenizer, (token, token))[len(decode(tokenizer, (token,))) :]
