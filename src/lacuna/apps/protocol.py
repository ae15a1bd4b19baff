"""OpenAI's protocol for the server: request bodies to the sampler's requests, completions to answers, and errors.

A field that could change an answer is never ignored: it takes effect, or is refused by name.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from lacuna.apps.generator import Generator
from lacuna.config import SamplingKeys
from lacuna.sampler import TOP_LOGPROBS, Completion, Request, joined_parts
from lacuna.tokenizer import REPLACEMENT, Tokenizer, decode, encode, render

LEAST_TOP_P = 1e-6  # with a smaller one float32 would leave no token
LEAST_LOG_PROBABILITY = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks
# Fields that change no answer, whatever their value is
IGNORED = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
    "include_obfuscation",
}  # fmt: skip
# Fields that are not supported, and the values besides null with which they ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": (), "verbosity": (), "store": (False,),
    "service_tier": ("auto", "default"), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "tool_calls": ([],), "refusal": ("",), "annotations": ([],),
}  # fmt: skip
OPENAI_REASONS = dict.fromkeys(
    ("tools", "tool_choice", "functions", "function_call", "tool_calls"), "this server calls no tools"
)


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
                reason = OPENAI_REASONS.get(name, "this server does not support it")
                raise ApiError(400, f"{name}: {reason}; leave {name} out", name, "unsupported_parameter")
        return {name: value for name, value in raw.items() if name not in IGNORED and name not in UNSUPPORTED}


class StreamOptions(Body):
    include_usage: bool | None = None


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


class GenerationBody(Body):
    """The fields that chats and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(listed)] = []
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text)]
    name: str | None = None
    reasoning_content: str | None = None


class ChatBody(GenerationBody):
    messages: Annotated[list[MessageBody], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


class CompletionBody(GenerationBody):
    prompt: Annotated[list[Any], Field(min_length=1, max_length=128), BeforeValidator(listed_prompts)]
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)


def parse_body(kind: type[ChatBody] | type[CompletionBody], raw: bytes) -> ChatBody | CompletionBody:
    """A checked body. Raises ApiError with the first problem."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        loc = [part for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
        param = ".".join(map(str, loc[:-1] if loc[-1:] in (["str"], ["int"]) else loc)) or None
        reason = problem["msg"].removeprefix("Value error, ").removesuffix(" after validation")
        if problem["type"] == "extra_forbidden":
            reason = "this is not a field of this request; leave it out"
        message = f"{param or 'the body'}: {reason}"
        raise ApiError(400, message, param, "invalid_json" if problem["type"] == "json_invalid" else None) from None


def requests_of(body: ChatBody | CompletionBody, generator: Generator) -> list[Request]:
    """A request for each prompt of a body, with the server's rules for what it leaves out. Raises ApiError."""
    tokenizer = generator.sampler.tokenizer
    names = SamplingKeys.model_fields.keys() & body.model_fields_set
    chosen = {name: value for name in names if (value := getattr(body, name)) is not None}
    if "top_p" in chosen:
        chosen["top_p"] = max(chosen["top_p"], LEAST_TOP_P)
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            if body.max_tokens not in (None, body.max_completion_tokens):
                raise ApiError(400, "max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
            chosen["max_tokens"] = body.max_completion_tokens
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", "top_logprobs")
        place, prompts, top = "messages", [chat_prompt(body, tokenizer)], body.top_logprobs or 0
    else:
        place, top = "prompt", body.logprobs or 0
        prompts = [
            encode(tokenizer, prompt, True).tolist() if isinstance(prompt, str) else prompt for prompt in body.prompt
        ]
    requests = [
        Request(
            prompt=tuple(prompt),
            rules=generator.rules.model_copy(update=chosen),
            stop_ids=generator.stop_ids,
            stop=tuple(body.stop),
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            n=body.n or 1,
            top_logprobs=top,
        )
        for prompt in prompts
    ]
    for request in requests:
        try:
            generator.sampler.check(request)
        except ValueError as error:
            is_long = len(request.prompt) >= generator.sampler.capacity
            raise ApiError(400, str(error), place, "context_length_exceeded" if is_long else None) from None
    return requests


def chat_prompt(body: ChatBody, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
    try:
        text = render(
            tokenizer, [message.model_dump(exclude_none=True) for message in body.messages], add_generation_prompt=True
        )
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    return encode(tokenizer, text, False).tolist()


# Answers


@dataclass
class Answer:
    """An answer while it is generated: what its chunks share, and how far they have come."""

    body: ChatBody | CompletionBody
    requests: list[Request]
    tokenizer: Tokenizer
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    offsets: dict[int, int] = field(default_factory=dict)

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

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(len(self.requests) * self.requests[0].n)
        ]
        return [self.chunk([choice]) for choice in choices] if self.is_chat else []

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.framed("chat.completion.chunk", choices) | ({"usage": None} if self.body.wants_usage else {})

    def framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.token}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
        }

    def choice(self, place: int, part: Completion, key: Literal["message", "delta"]) -> dict[str, Any]:
        index = place * self.requests[place].n + part.index
        self.completion_tokens += len(part.tokens)
        if not self.is_chat:
            content = {"text": part.text, "logprobs": self.text_logprobs(index, place, part)}
        else:
            text = {"role": "assistant", "content": part.text, "refusal": None}
            content = {key: text if key == "message" else {"content": part.text}, "logprobs": self.logprobs(part)}
        return {"index": index, **content, "finish_reason": part.finish_reason or None}

    def usage(self) -> dict[str, int]:
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

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
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, value, top in self.shown(place, part):
            text = written(self.tokenizer, token)
            found["tokens"].append(text)
            found["token_logprobs"].append(max(LEAST_LOG_PROBABILITY, value))
            found["top_logprobs"].append({self.key(each): max(LEAST_LOG_PROBABILITY, other) for each, other in top})
            found["text_offset"].append(self.offsets.get(index, 0))
            self.offsets[index] = found["text_offset"][-1] + len(text)
        return found

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
        return {"token": text, "logprob": max(LEAST_LOG_PROBABILITY, value), "bytes": whole}


def written(tokenizer: Tokenizer, token: int) -> str:
    """A token's text in the middle of a text, as some tokenizers drop a leading space at the beginning."""
    return decode(tokenizer, (token, token))[len(decode(tokenizer, (token,))) :]
