"""Text to tokens: `tokenizer.json`, chat templates, and which tokens of a chat the model learns to produce.

Few chat templates mark what the assistant wrote, so each answer is found by rendering the chat again with a mark in
place of that answer, and by what the template writes when it prompts for one. What can't be found for certain is
refused.
"""

import json
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers.decoders import DecodeStream

from lacuna.config import UserError
from lacuna.sandbox import compile_template, rendered

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Unicode reserves these code points for use inside a program: they are never part of a text.
BLANK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a whole character

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
TrainOn = Literal["assistant", "all", "last"]


@dataclass(frozen=True)
class Tokenizer:
    """`tokenizer.json`, chat template and special tokens of a directory; `end_of_turn` matches an added token, and
    `ends` has each id that ends an answer, with what says so."""

    directory: Path
    backend: tokenizers.Tokenizer
    template: jinja2.Template | None
    template_source: str
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    vocabulary_size: int
    end_of_turn: re.Pattern[str]
    ends: dict[int, str]


class EncodedText(NamedTuple):
    """A text's ids, which of them are supervised, and how many are not because they straddle the edge of a span."""

    token: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    straddling_count: int


def load_tokenizer(directory: Path, chat_template: str = "", template_date: str = "2024-07-26") -> Tokenizer:
    """The tokenizer of a Hugging Face directory; `chat_template` is a file that replaces its template, `template_date`
    the day that templates take for today. Raises UserError if a file is missing or can't be read."""
    backend = load_backend(directory)
    settings = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    special_tokens = {
        name: str(token["content"] if isinstance(token, dict) else token)
        for name, token in settings.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    ids = {name: backend.token_to_id(token) for name, token in special_tokens.items()}
    for name in ("bos_token", "eos_token"):
        if name in ids and ids[name] is None:
            raise UserError(
                f"{directory}: {name} {special_tokens[name]!r} is not in tokenizer.json; "
                "do tokenizer_config.json and tokenizer.json belong to the same model?"
            )
    source, origin = find_template(directory, settings, chat_template)
    added_tokens = (token.content for token in backend.get_added_tokens_decoder().values())
    written = sorted((token for token in added_tokens if not token.isspace()), key=len, reverse=True)
    tokenizer = Tokenizer(
        directory=directory,
        backend=backend,
        template=compile_template(source, origin, template_date) if source else None,
        template_source=source,
        special_tokens=special_tokens,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        vocabulary_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        end_of_turn=re.compile(rf"\s*({'|'.join(map(re.escape, written)) or '(?!)'})"),
        ends={},
    )
    return replace(tokenizer, ends=answer_ends(tokenizer))


def load_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        convertible = next((name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()), "")
        loader = f"transformers' AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(…)"
        fix = f"convert {convertible} with {loader}" if convertible else "give a directory in Hugging Face layout"
        raise UserError(f"{path}: no such file; {fix}")
    # Trimmed offsets leave out the spaces that belong to a token; the ids do not depend on them.
    text = re.sub(r'"trim_offsets":\s*true', '"trim_offsets": false', path.read_text("utf-8"))
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise UserError(
            f"{path}: not a tokenizer that `tokenizers` can read ({error}); fetch the file again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not an object; fetch the file again")
    return found


def answer_ends(tokenizer: Tokenizer) -> dict[int, str]:
    """Each id that ends an answer, with what says so: generation_config.json, or config.json where that names none; the
    tokenizer's eos_token; and the token that the chat template writes after an answer, which training teaches.

    Raises:
        UserError: a file names what is no token.
    """
    path, stated = stated_ends(tokenizer.directory)
    for end in stated:
        if type(end) is not int or not 0 <= end < tokenizer.vocabulary_size:
            raise UserError(
                f"{path}: eos_token_id = {end!r} is no token id; write one of the {tokenizer.vocabulary_size:,} of "
                "tokenizer.json, or a list of them"
            )
    ends = dict.fromkeys(stated, path.name)
    if tokenizer.eos_id is not None:
        ends.setdefault(tokenizer.eos_id, "eos_token")
    if (taught := end_of_template(tokenizer)) is not None:
        ends.setdefault(taught, "the chat template")
    return ends


def stated_ends(directory: Path) -> tuple[Path, list[Any]]:
    """What a model's files name as eos_token_id, and the file that does."""
    paths = [directory / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if read_json(path).get("eos_token_id") is not None), paths[0])
    stated = read_json(path).get("eos_token_id")
    return path, stated if isinstance(stated, list) else [] if stated is None else [stated]


def end_of_template(tokenizer: Tokenizer) -> int | None:
    """The added token that the chat template writes after an answer; None if there is none, or it refuses this chat."""
    if tokenizer.template is None:
        return None
    try:
        chat = render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": BLANK}])
    except ValueError:
        return None
    end = tokenizer.end_of_turn.match(chat, chat.rfind(BLANK) + 1) if BLANK in chat else None
    return tokenizer.backend.token_to_id(end[1]) if end else None


def ends_in_words(tokenizer: Tokenizer) -> str:
    """What ends an answer, for the lines at the start."""
    ends = [f"{tokenizer.backend.id_to_token(end)!r} ({end}, {origin})" for end, origin in tokenizer.ends.items()]
    return f"an answer ends at {', '.join(ends) or 'nothing but its limit of tokens'}"


def changed_files(tokenizer: Tokenizer, chat_template: str) -> dict[str, str]:
    """The text of files that an export does not take from the tokenizer's directory: a `chat_template` of the user's
    own, wherever one is looked for, and generation_config.json where it does not name all that ends an answer."""
    files: dict[str, dict[str, Any]] = {}
    directory, ends = tokenizer.directory, list(tokenizer.ends)
    (path, stated), generation = stated_ends(directory), directory / "generation_config.json"
    if set(stated) != set(ends) or (generation.is_file() and path != generation):
        config = read_json(directory / "config.json")
        others = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        files[generation.name] = (read_json(generation) or others) | {"eos_token_id": ends}
    if chat_template:
        settings = read_json(directory / "tokenizer_config.json")
        files["tokenizer_config.json"] = settings | {"chat_template": tokenizer.template_source}
    texts = {name: json.dumps(keys, indent=2, ensure_ascii=False) + "\n" for name, keys in files.items()}
    return texts | ({"chat_template.jinja": tokenizer.template_source} if chat_template else {})


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document; raises UserError if the tokenizer names none."""
    if tokenizer.eos_id is None:
        raise UserError(
            f"{tokenizer.directory / 'tokenizer_config.json'}: no eos_token, which has to end a text in training; "
            'add "eos_token": "…" with a token of tokenizer.json'
        )
    return tokenizer.eos_id


def find_template(directory: Path, settings: dict[str, Any], chat_template: str) -> tuple[str, Path]:
    """The template's text, empty if there is none, and the file it came from."""
    path = Path(chat_template) if chat_template else directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8"), path
    if chat_template:
        raise UserError(f"chat_template: {chat_template}: no such file; give the path of a Jinja template")
    origin, template = directory / "tokenizer_config.json", settings.get("chat_template") or ""
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        if "default" not in named:
            raise UserError(f"{origin}: no chat template is named 'default', only {sorted(named)}; give chat_template")
        template = named["default"]
    return str(template), origin


def check_messages(messages: Any, tools: Any) -> None:
    """Raises ValueError with the reason why these are not the messages and tools of a chat."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"messages is {messages!r:.40}, not a list of messages, so nothing to learn from; drop the line"
        )
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {type(message).__name__}, not an object with role and content")
        role, calls, content = (message.get(key) for key in ("role", "tool_calls", "content"))
        if role not in ROLES:
            raise ValueError(f"{where}: role {role!r} is unknown; write one of {', '.join(ROLES)}")
        if calls is not None and not (isinstance(calls, list) and all(called_name(call) for call in calls)):
            raise ValueError(f"{where}: tool_calls is not a list of objects with the name of a function")
        texts = {key: message[key] for key in REASONING_KEYS if message.get(key) is not None}
        for key, text in (texts if content is None and calls else texts | {"content": content}).items():
            if not isinstance(text, str):
                raise ValueError(f"{where} ({role}): {key} is {type(text).__name__}, not a string")
    if (count := [message["role"] for message in messages].count("system")) > 1:
        raise ValueError(f"{count} system messages; join them into one")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {type(tools).__name__}, not a list of objects")
    text = json.dumps([messages, tools], ensure_ascii=False, default=str)
    if wrong := re.search(f"[{BLANK}{OPEN}{CLOSE}\ud800-\udfff]", text):
        raise ValueError(f"U+{ord(wrong[0]):04X} is half a character or none at all; remove it")


def called_name(call: Any) -> str:
    """The name of the function in a tool call, empty if there is none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: Tools = None,
    add_generation_prompt: bool = False,
    **variables: object,
) -> str:
    """The chat as text, the same as transformers' `apply_chat_template`; `variables` are the template's own, such as
    `enable_thinking`. Raises ValueError if the template, which is foreign code, refuses the chat or fails."""
    if tokenizer.template is None:
        raise UserError(
            f"{tokenizer.directory}: no chat template in chat_template.jinja or tokenizer_config.json; "
            "give one with --chat-template configs/chat_template.jinja"
        )
    values = {
        **tokenizer.special_tokens,
        **variables,
        "messages": [seen_by_template(message) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return rendered(tokenizer.template, values)


def seen_by_template(message: Message) -> Message:
    """A message as transformers shows it: keys without a value left out, reasoning under every name in use."""
    present = {key: value for key, value in message.items() if value is not None}
    for key in REASONING_KEYS:
        if key in present:
            return {"thinking": present[key], **present, "reasoning_content": present[key]}
    return present


def chat_spans(tokenizer: Tokenizer, messages: Any, tools: Any, train_on: TrainOn) -> tuple[str, list[Span]]:
    """The rendered chat and the ranges of its characters that the model learns: what it would have generated, each
    answer with its end-of-turn token. Raises ValueError with the reason if they can't be found for certain."""
    check_messages(messages, tools)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("no assistant message, so nothing to learn from; drop the line or add an answer")
    marked = render(tokenizer, messages, tools, generation_start=OPEN, generation_end=CLOSE)
    text = marked.replace(OPEN, "").replace(CLOSE, "")
    if train_on == "all":
        return text, [(0, len(text))]
    if OPEN in marked:
        edges = accumulate(map(len, re.split(f"[{OPEN}{CLOSE}]", marked)))
        spans = list(zip(edges, edges, strict=False))  # without the piece after the last mark
        check_end(tokenizer, text[: spans[-1][1]])
        return text, spans[-1:] if train_on == "last" else spans
    prompted = render(tokenizer, messages, tools, add_generation_prompt=True)
    header = prompted.removeprefix(text) if prompted.startswith(text) else ""
    spans = []
    for turn in turns[-1:] if train_on == "last" else turns:
        try:
            spans.append(turn_span(tokenizer, messages, tools, turn, text, header))
            if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
                raise ValueError("it overlaps the answer before it")
        except ValueError as error:
            raise ValueError(f"message {turn + 1} (assistant) can't be found in the rendered chat: {error}") from error
    check_end(tokenizer, text[: spans[-1][1]])
    return text, spans


def check_end(tokenizer: Tokenizer, text: str) -> None:
    """Raises ValueError if a chat's last answer, with which `text` ends, is learned with an end that stops none."""
    ends = [str(tokenizer.backend.id_to_token(end)) for end in tokenizer.ends]
    if not text.rstrip().endswith(tuple(ends)):
        raise ValueError(
            f"the last answer is learned to end in {text[-20:]!r}, and answers stop only at {', '.join(ends)}; write "
            "the end inside {% generation %}, or add its id to eos_token_id in generation_config.json"
        )


def turn_span(tokenizer: Tokenizer, messages: list[Message], tools: Tools, turn: int, text: str, header: str) -> Span:
    """The range of one answer in `text`, found by rendering a mark in place of its content; `header` is what the
    template writes to prompt for an answer. Raises ValueError if it can't be found for certain, or is not written."""
    answer = messages[turn]
    blank = {key: value for key, value in answer.items() if key not in (*REASONING_KEYS, "tool_calls")}
    blanked = [*messages[:turn], blank | {"content": BLANK}, *messages[turn + 1 :]]
    before, *afters = render(tokenizer, blanked, tools).split(BLANK)
    if len(afters) != 1:
        raise ValueError(f"the chat template writes its content {len(afters)} times")
    after = afters[0]
    end_of_turn = tokenizer.end_of_turn.match(after)
    if end_of_turn is None:
        raise ValueError(
            f"the chat template continues with {after[:20]!r}, which is no end-of-turn token; "
            "write eos_token after each answer in a template of your own (--chat-template)"
        )
    if not text.endswith(after):
        raise ValueError("the chat template writes what follows differently if the answer differs")
    content_end = len(text) - len(after)
    common = before if text.startswith(before) else os.path.commonprefix([before, text])
    if end_of_turn[1] in before[len(common) :]:
        raise ValueError("the chat template writes what precedes differently if the answer differs")
    if header:
        start = start_after_header(common, header, end_of_turn[1])
    else:
        prompt = render(tokenizer, messages[:turn], tools, add_generation_prompt=True)
        start = len(prompt) if text.startswith(prompt) else None
    if start is None or start > content_end:
        raise ValueError("its beginning is not where the chat template would prompt for it")
    written = text[start:content_end]
    names = [called_name(call) for call in answer.get("tool_calls") or []]
    if missing := [name for name in names if name not in written]:
        raise ValueError(f"the chat template does not write its call of {missing[0]!r}")
    if not names and str(answer["content"]).split("</think>")[-1].strip() not in written:
        raise ValueError("the chat template does not write its content as it is")
    return start, content_end + end_of_turn.end()


def start_after_header(before: str, header: str, end_of_turn: str) -> int | None:
    """Where an answer begins, given what precedes it whatever it is: after the last header, unless a turn ended since.
    A template may prompt with more than it writes before this answer, such as an empty think block: then after that."""
    header_start = before.rfind(header)
    start = header_start + len(header)
    if header_start >= 0 and end_of_turn not in before[start:]:
        return start
    return len(before) if any(before.endswith(header[:size]) for size in range(1, len(header))) else None


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Int[np.ndarray, " token"]:
    """Token ids; `add_special_tokens` adds the BOS that the tokenizer asks for, which a rendered chat already has."""
    return np.array(tokenizer.backend.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)


def encode_spans(tokenizer: Tokenizer, texts: Sequence[tuple[str, list[Span]]]) -> Iterator[EncodedText]:
    """Each text encoded as a whole, with the tokens supervised that lie wholly within one of its spans."""
    encodings = tokenizer.backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
    for encoding, (_, spans) in zip(encodings, texts, strict=True):
        token_start, token_end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        span_start, span_end = np.array([(-1, -1), *spans], np.int64).T
        inside = token_end <= span_end[np.searchsorted(span_start, token_start, "right") - 1]
        touched = token_start < span_end[np.searchsorted(span_start, token_end, "left") - 1]
        supervised = inside & (token_end > token_start)
        yield EncodedText(np.array(encoding.ids, np.int32), supervised, int(np.sum(touched & ~supervised)))


def decode(
    tokenizer: Tokenizer, token: Sequence[int] | Int[np.ndarray, " token"], skip_special_tokens: bool = False
) -> str:
    """The text of these ids."""
    return tokenizer.backend.decode([int(each) for each in token], skip_special_tokens)


class TextStream:
    """The text that follows a prompt, token by token and in whole characters; the pieces and `rest` make all of it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []  # tokens after the last whole character
        self.shown = 0  # characters of theirs that precede this text
        ends_inside_a_character = self._text(prompt).endswith(REPLACEMENT)
        self.stream = DecodeStream([] if ends_inside_a_character else list(prompt), skip_special_tokens=True)
        if ends_inside_a_character:  # it is fed to the stream, as the character belongs to the text that follows
            self.add(prompt)
            self.shown = len(self.rest().rstrip(REPLACEMENT))

    def add(self, token: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        return "".join(map(self._step, token))

    def rest(self) -> str:
        """The text of the tokens after the last whole character."""
        return self._text(self.pending)[self.shown :]

    def _step(self, token: int) -> str:
        self.pending.append(token)
        try:
            piece = self.stream.step(self.tokenizer.backend, token)
        except Exception:  # byte tokens that are no character make the decoder undo the characters before them
            piece = self._text(self.pending)
            self.stream = DecodeStream(self.pending, skip_special_tokens=True)
        if not piece:
            return ""
        piece = piece[self.shown :]
        self.pending, self.shown = [], 0
        return piece

    def _text(self, token: Sequence[int]) -> str:
        return decode(self.tokenizer, token, skip_special_tokens=True)
