"""Text to tokens: `tokenizer.json`, chat templates, and which tokens of a chat the model learns to produce.

Few chat templates mark what the assistant wrote, so each answer is found by rendering the chat again with a mark in
place of that answer, and by what the template writes when it prompts for one. What can't be found for certain is
refused.
"""

import json
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers.decoders import DecodeStream

from lacuna.config import UserError
from lacuna.sandbox import compile_template, names_read, rendered

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
KNOWN_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}  # for templates that don't know the first
CHAT_NAMES, MARKS = {"messages", "tools", "add_generation_prompt"}, {"generation_start", "generation_end"}
ADDED_TOKEN_KEYS = ("single_word", "lstrip", "rstrip", "normalized", "special")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Unicode reserves these code points for use inside a program: they are never part of a text.
BLANK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a whole character

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
TrainOn = Literal["assistant", "all", "last"]
Variables = Mapping[str, Any]
NO_VARIABLES: Variables = MappingProxyType({})


@dataclass(frozen=True)
class Tokenizer:
    """`tokenizer.json`, chat template and special tokens of a directory; `end_of_turn` matches an added token, and
    `ends` has each id that ends an answer, with what says so.

    `template_source` and `template` are for all chats, and `tool_source` and `tool_template` for those with tools, as a
    directory may name another for them. `variables` are what every chat gives its template, `readable` the names of all
    that either reads and a chat may give. `new_words` are its last tokens, which its files lack so far."""

    directory: Path
    backend: tokenizers.Tokenizer
    template: jinja2.Template | None
    template_source: str
    tool_template: jinja2.Template | None
    tool_source: str
    variables: dict[str, Any]
    readable: set[str]
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    vocabulary_size: int
    end_of_turn: re.Pattern[str]
    ends: dict[int, str]
    new_words: tuple[str, ...] = ()


class LostTools(ValueError):
    """A chat template leaves out a tool that it is given."""


class EncodedText(NamedTuple):
    """A text's ids, which of them are supervised, and how many are not because they straddle the edge of a span."""

    token: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    straddling_count: int


def load_tokenizer(
    directory: Path,
    chat_template: str = "",
    template_date: str = "2024-07-26",
    variables: Variables = NO_VARIABLES,
    words: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory; `chat_template` is a file that replaces its template, `template_date`
    the day that templates take for today, and `words` become tokens where they are none. Raises UserError if a file is
    missing or can't be read."""
    backend = load_backend(directory)
    settings = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    add_named_tokens(backend, directory, settings)
    new_words = tuple(word for word in dict.fromkeys(words) if backend.token_to_id(word) is None)
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in new_words])
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
    sources, origin = find_templates(directory, settings, chat_template)
    compiled = {name: compile_template(source, origin, template_date) for name, source in sources.items() if source}
    added_tokens = (token.content for token in backend.get_added_tokens_decoder().values())
    written = sorted((token for token in added_tokens if not token.isspace()), key=len, reverse=True)
    tokenizer = Tokenizer(
        directory=directory,
        backend=backend,
        template=compiled.get("default"),
        template_source=sources["default"],
        tool_template=compiled.get("tool_use", compiled.get("default")),
        tool_source=sources.get("tool_use", sources["default"]),
        variables=dict(variables),
        readable=set().union(*map(names_read, sources.values())) - special_tokens.keys() - CHAT_NAMES - MARKS,
        special_tokens=special_tokens,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        vocabulary_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        end_of_turn=re.compile(rf"\s*({'|'.join(map(re.escape, written)) or '(?!)'})"),
        ends={},
        new_words=new_words,
    )
    if problem := wrong_variable(tokenizer, variables):
        raise UserError(f"template_variables: {problem}")
    return replace(tokenizer, ends=answer_ends(tokenizer))


def wrong_variable(tokenizer: Tokenizer, variables: Variables) -> str:
    """Which variable no template of the tokenizer reads, with those that it does; empty if there is none."""
    unread = sorted(variables.keys() - tokenizer.readable - MARKS)
    names = ", ".join(sorted(tokenizer.readable)) or "none"
    return f"the chat template reads no variable {unread[0]}; those it reads: {names}" if unread else ""


def load_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        convertible = next((name for name in ("tokenizer.model", "vocab.json") if (directory / name).is_file()), "")
        loader = f"transformers' AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(…)"
        needs = " (with sentencepiece and protobuf installed)" if convertible == "tokenizer.model" else ""
        fix = (
            f"convert {convertible} with {loader}{needs}" if convertible else "give a directory in Hugging Face layout"
        )
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


def add_named_tokens(backend: tokenizers.Tokenizer, directory: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that only the files beside tokenizer.json name, as transformers does.

    Raises:
        UserError: one of them would not get the id that it is named with.
    """
    extra = settings.get("extra_special_tokens") or ()
    extra = extra.values() if isinstance(extra, dict) else extra
    named = [*(settings.get("additional_special_tokens") or ()), *extra]
    tokens = {id: token for token, id in read_json(directory / "added_tokens.json").items()}
    tokens |= {int(id): token for id, token in (settings.get("added_tokens_decoder") or {}).items()}
    for id, token in [*sorted(tokens.items()), *((None, token) for token in named)]:
        settings = token if isinstance(token, dict) else {"special": True, "normalized": False}
        content = str(token["content"] if isinstance(token, dict) else token)
        if backend.token_to_id(content) is None:
            chosen = {key: settings[key] for key in ADDED_TOKEN_KEYS if key in settings}
            backend.add_tokens([tokenizers.AddedToken(content, **chosen)])
        if id not in (None, found := backend.token_to_id(content)):
            raise UserError(
                f"{directory}: {content!r} is token {id} by tokenizer_config.json or added_tokens.json, and "
                f"{found} after those of tokenizer.json; write the files again with transformers' "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(…)"
            )


def read_words(path: Path) -> list[str]:
    """The words of a file, one a line.

    Raises:
        UserError: no such file, no word in it, or a line with spaces at its ends or nothing else.
    """
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"new_tokens: {path}: {getattr(error, 'strerror', 0) or error}; give a text file") from error
    for number, line in enumerate(lines, 1):
        if not line or line != line.strip() or not line.isprintable():
            raise UserError(f"{path} line {number}: {line!r} is no word; write one a line, without spaces around it")
    return lines


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


LARGEST = {int: 2**31, float: 1e38}


def read_keys(fields: Mapping[str, Any], keys: Mapping[str, tuple[type, Any]], where: str) -> dict[str, Any]:
    """The value of each key, or its default; refuses what is missing or not of its type.

    A number is above 0, or 0 where that is the default, and not beyond all sense.
    """
    values = {}
    for key, (kind, default) in keys.items():
        value = default if fields.get(key) is None else fields[key]
        if value is None:
            raise UserError(f"{where}: {key!r} is missing")
        is_of_kind = type(value) in ((int, float) if kind is float else (kind,))
        if is_of_kind and kind in (int, float):
            is_of_kind = 0 < value < LARGEST[kind] or value == default == 0
        if not is_of_kind:
            raise UserError(f"{where}: {key!r} = {value!r} is not a {kind.__name__} that a model can have")
        values[key] = kind(value)
    return values


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
    own, wherever one is looked for, generation_config.json where it does not name all that ends an answer, and
    those that list tokens where words are new."""
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
    if tokenizer.new_words:
        added = {
            id: {"content": token.content} | {key: getattr(token, key) for key in ADDED_TOKEN_KEYS}
            for id, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
        }
        entries = [{"id": id} | token for id, token in added.items()]
        files["tokenizer.json"] = read_json(directory / "tokenizer.json") | {"added_tokens": entries}
        settings = files.get("tokenizer_config.json", read_json(directory / "tokenizer_config.json"))
        files["tokenizer_config.json"] = settings | {"added_tokens_decoder": added}  # read by transformers for Qwen
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


def find_templates(directory: Path, settings: dict[str, Any], chat_template: str) -> tuple[dict[str, str], Path]:
    """The templates by name: "default", empty if there is none, and "tool_use", if there is one for chats with tools;
    and the file they came from."""
    path = Path(chat_template) if chat_template else directory / "chat_template.jinja"
    if path.is_file():
        tool_use = directory / "additional_chat_templates" / "tool_use.jinja"
        named = {"tool_use": tool_use.read_text("utf-8")} if not chat_template and tool_use.is_file() else {}
        return named | {"default": path.read_text("utf-8")}, path
    if chat_template:
        raise UserError(f"chat_template: {chat_template}: no such file; give the path of a Jinja template")
    origin, template = directory / "tokenizer_config.json", settings.get("chat_template") or ""
    if not isinstance(template, list):
        return {"default": str(template)}, origin
    named = {item["name"]: item["template"] for item in template}
    if "default" not in named:
        raise UserError(f"{origin}: no chat template is named 'default', only {sorted(named)}; give chat_template")
    return {name: named[name] for name in ("default", "tool_use") if name in named}, origin


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
        if message.get("weight") not in (None, 0, 1):
            raise ValueError(f"{where}: weight is {message['weight']!r}; write 0 for context only, or 1")
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
    variables: Variables = NO_VARIABLES,
) -> str:
    """The chat as text, the same as transformers' `apply_chat_template`; `variables` are the template's own, such as
    `enable_thinking`. Raises ValueError if the template, which is foreign code, refuses the chat or fails."""
    template, source = tokenizer.template, tokenizer.template_source
    if tools:
        template, source = tokenizer.tool_template, tokenizer.tool_source
    if template is None:
        raise UserError(
            f"{tokenizer.directory}: no chat template in chat_template.jinja or tokenizer_config.json; "
            "give one with --chat-template configs/chat_template.jinja"
        )
    if problem := wrong_variable(tokenizer, variables):
        raise ValueError(f"chat_template_kwargs: {problem}")
    values = {
        "documents": None,
        **tokenizer.special_tokens,
        **tokenizer.variables,
        **variables,
        "messages": [seen_by_template(message, source) for message in messages],
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    return rendered(template, values)


class Arguments(dict):
    """Arguments of a call that came as JSON text, which they still are where a template prints or joins them."""

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text))
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __radd__(self, before: str) -> str:
        return before + self.text

    def __add__(self, after: str) -> str:
        return self.text + after


def seen_by_template(message: Message, source: str) -> Message:
    """A message as transformers shows it: keys without a value left out, reasoning under every name in use.

    Besides, an empty list of calls is none, arguments of calls are parsed for a template that does not ask whether they
    are a string, as OpenAI's format has them as JSON, and a role that the template does not name is the one it knows.
    """
    present = {key: value for key, value in message.items() if value is not None}
    if not present.get("tool_calls", True):
        del present["tool_calls"]
    if "tool_calls" in present and "arguments is string" not in source:
        present["tool_calls"] = [with_parsed_arguments(call) for call in present["tool_calls"]]
    role = present.get("role")
    if role in KNOWN_ROLES and not re.search(rf"['\"]{role}['\"]", source):
        present["role"] = KNOWN_ROLES[role]
    for key in REASONING_KEYS:
        if key in present:
            return {"thinking": present[key], **present, "reasoning_content": present[key]}
    return present


def with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": with_parsed_arguments(call["function"])}
    if not isinstance(text := call.get("arguments"), str):  # there are none, or they are parsed already
        return call
    try:
        return call | {"arguments": Arguments(text)}
    except (TypeError, ValueError):  # not JSON of an object
        return call


def render_prompt(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: Tools = None,
    variables: Variables = NO_VARIABLES,
    add_generation_prompt: bool = True,
) -> str:
    """A chat as text to be answered. Raises ValueError too if the template leaves out a message or a tool."""
    show = partial(render, tokenizer, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt)
    render_marked(show, messages, tools)
    return show(messages)


def render_marked(show: Callable[..., str], messages: list[Message], tools: Tools) -> str:
    """The chat as text but for what the template makes of a mark inside each message that is no answer; raises
    ValueError if it leaves one of them out, or a tool."""
    marked, marks = list(messages), {}
    for number, message in enumerate(messages):
        if message["role"] != "assistant" and (content := message.get("content")):
            marks[number], middle = f"{BLANK}{number}{BLANK}", len(content) // 2
            marked[number] = message | {"content": content[:middle] + marks[number] + content[middle:]}
    text = show(marked)
    if names := [name for tool in tools or () if (name := called_name(tool)) and name not in text]:
        has_calls = any(message.get("tool_calls") for message in messages)  # which need their tools
        way_out = "" if has_calls else ", or leave the tools out (--data.0.tools-column none)"
        fact = f"the chat template does not write the tool {names[0]!r}"
        raise LostTools(f"{fact}; take a template that does (--chat-template){way_out}")
    if left_out := [number for number, mark in marks.items() if mark not in text]:
        number = left_out[0]
        is_answered = messages[-1]["role"] == "assistant" and marks[number] in show(marked[:-1])
        where = "where an answer is last" if is_answered else "of this chat"
        raise ValueError(
            f"message {number + 1} ({messages[number]['role']}): the chat template leaves it out {where}; join it with "
            "the first user message, or take a template that writes it (--chat-template)"
        )
    return re.sub(f"{BLANK}\\d+{BLANK}", "", text)


def left_out_thoughts(messages: list[Message], text: str) -> int:
    """How many thoughts of answers, and texts beside their calls, are not in a rendered chat."""
    found: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            content = message.get("content") or ""
            found += [str(message[key]) for key in REASONING_KEYS if message.get(key)][:1]
            found += re.findall(r"<think>(.*?)</think>", content, re.DOTALL)
            found += [content.split("</think>")[-1]] if message.get("tool_calls") else []
    return sum(each.strip() not in text for each in found)


def chat_spans(
    tokenizer: Tokenizer, messages: Any, tools: Any, train_on: TrainOn, variables: Variables = NO_VARIABLES
) -> tuple[str, list[Span]]:
    """The rendered chat and the ranges of its characters that the model learns: what it would have generated, each
    answer with its end-of-turn token. Raises ValueError with the reason if they can't be found for certain."""
    check_messages(messages, tools)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("no assistant message, so nothing to learn from; drop the line or add an answer")
    learned = [turn for turn in turns if messages[turn].get("weight") != 0]
    if not learned or train_on == "all" and learned != turns:
        raise ValueError("weight 0 leaves nothing to learn from, or contradicts train_on = all; change one of them")
    show = partial(render, tokenizer, tools=tools, variables=variables)
    marked = show(messages, variables={**variables, "generation_start": OPEN, "generation_end": CLOSE})
    text = marked.replace(OPEN, "").replace(CLOSE, "")
    edges = accumulate(map(len, re.split(f"[{OPEN}{CLOSE}]", marked)))
    found = list(zip(edges, edges, strict=False))  # without the piece after the last mark
    needs_header = not found and train_on != "all"
    prompted = render_marked(partial(show, add_generation_prompt=needs_header), messages, tools)
    if train_on == "all":
        return text, [(0, len(text))]
    if found and len(found) != len(turns):
        raise ValueError(f"the chat template marks {len(found)} answers as generated, and there are {len(turns)}")
    header = prompted.removeprefix(text) if prompted.startswith(text) else ""
    spans, end = list[Span](), tokenizer.end_of_turn
    for turn in learned[-1:] if train_on == "last" else learned:
        try:
            span = found[turns.index(turn)] if found else turn_span(show, end, messages, turn, text, header)
            check_answer(messages[turn], text[slice(*span)])
            if spans and span[0] < spans[-1][1]:
                raise ValueError("it overlaps the answer before it")
        except ValueError as error:
            raise ValueError(f"message {turn + 1} (assistant) can't be found in the rendered chat: {error}") from error
        spans.append(span)
    ends, learned_end = [str(tokenizer.backend.id_to_token(each)) for each in tokenizer.ends], text[: spans[-1][1]]
    if not learned_end.rstrip().endswith(tuple(ends)):
        raise ValueError(
            f"the last answer is learned to end in {learned_end[-20:]!r}, and answers stop only at {', '.join(ends)}; "
            "write the end inside {% generation %}, or add its id to eos_token_id in generation_config.json"
        )
    return text, spans


def check_answer(answer: Message, written: str) -> None:
    """Raises ValueError if what is learned as an answer lacks its calls or, where it has none, its content."""
    names = [called_name(call) for call in answer.get("tool_calls") or []]
    if missing := [name for name in names if name not in written]:
        raise ValueError(f"the chat template does not write its call of {missing[0]!r}")
    if not names and str(answer["content"]).split("</think>")[-1].strip() not in written:
        raise ValueError("the chat template does not write its content as it is")


def turn_span(
    show: Callable[..., str], end: re.Pattern[str], messages: list[Message], turn: int, text: str, header: str
) -> Span:
    """The range of one answer in `text`, found by rendering a mark in place of its content; `header` is what the
    template writes to prompt for an answer, `end` matches the end of a turn. Raises ValueError if it can't be found for
    certain, or is not written."""
    before, after = around_answer(show, end, messages, turn)
    end_of_turn = end.match(after)
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
    start = None
    if not header and text.startswith(prompt := show(messages[:turn], add_generation_prompt=True)):
        start = len(prompt)
    elif header := header or after_last_message(show, messages[:turn]):
        start = start_after_header(common, header, end_of_turn[1])
    if start is None or start > content_end:
        raise ValueError("its beginning is not where the chat template would prompt for it")
    return start, content_end + end_of_turn.end()


def around_answer(
    show: Callable[..., str], end: re.Pattern[str], messages: list[Message], turn: int
) -> tuple[str, str]:
    """What the template writes before and after an answer's content; if it refuses the chat without the answer's calls,
    before the name in the last of them and after that call."""
    answer, calls = messages[turn], messages[turn].get("tool_calls")
    blank = {key: value for key, value in answer.items() if key not in (*REASONING_KEYS, "tool_calls")}
    try:
        before, *afters = show([*messages[:turn], blank | {"content": BLANK}, *messages[turn + 1 :]]).split(BLANK)
    except ValueError:
        if not calls:
            raise
        name = {"name": BLANK, "arguments": {}}
        last = calls[-1] | ({"function": calls[-1]["function"] | name} if "function" in calls[-1] else name)
        marked = answer | {"tool_calls": [*calls[:-1], last]}
        before, *afters = show([*messages[:turn], marked, *messages[turn + 1 :]]).split(BLANK)
        afters = [after[found.start() if (found := end.search(after)) else 0 :] for after in afters]
    if len(afters) != 1:
        raise ValueError(f"the chat template writes its content {len(afters)} times")
    return before, afters[0]


def after_last_message(show: Callable[..., str], messages: list[Message]) -> str:
    """What the template writes between the last message's content and the answer it prompts for."""
    if not messages:
        return ""
    marked = [*messages[:-1], messages[-1] | {"content": BLANK}]
    return show(marked, add_generation_prompt=True).split(BLANK)[-1]


def start_after_header(before: str, header: str, end_of_turn: str) -> int | None:
    """Where an answer begins, given what precedes it whatever it is: after the last header, unless a turn ended since.
    A template may prompt with more than it writes before this answer, such as an empty think block: then after that."""
    header_start = before.rfind(header)
    start = header_start + len(header)
    if header_start >= 0 and end_of_turn not in before[start:]:
        return start
    return len(before) if any(before.endswith(header[:size]) for size in range(1, len(header))) else None


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Int[np.ndarray, " token"]:
    """Token ids; `add_special_tokens` adds the BOS that the tokenizer asks for, which a rendered chat
    already has, and a text may have."""
    (encoding,) = tokenizer.backend.encode_batch([text], add_special_tokens=add_special_tokens)  # without Python's lock
    ids = encoding.ids
    return np.array(ids[1:] if has_bos(tokenizer, text) and ids[:2] == [tokenizer.bos_id] * 2 else ids, np.int32)


def has_bos(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text begins with the tokenizer's BOS, written out."""
    return tokenizer.bos_id is not None and text.startswith(tokenizer.special_tokens["bos_token"])


def encode_apart(tokenizer: Tokenizer, prompt: str, completion: str) -> EncodedText:
    """A prompt and its completion encoded each by itself, as in generation, and all of the completion supervised."""
    token = encode(tokenizer, prompt, add_special_tokens=False), encode_continuation(tokenizer, completion)
    return EncodedText(np.concatenate(token), np.repeat([False, True], [len(each) for each in token]), 0)


def encode_continuation(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " token"]:
    """Token ids of a text that follows another, so without the space that some tokenizers put before any text."""
    for before in ("\n", "x"):
        encoding = tokenizer.backend.encode(before + text, add_special_tokens=False)
        place = sum(end <= len(before) for _, end in encoding.offsets)
        if all(start >= len(before) for start, _ in encoding.offsets[place:]):
            return np.array(encoding.ids[place:], np.int32)
    return encode(tokenizer, text, add_special_tokens=False)


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
