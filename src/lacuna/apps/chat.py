"""Chat in the terminal, with a model on this machine or behind an OpenAI-style server.

Both are sources of the same kind: they say what they are, count a conversation, and answer it piece by piece. The
conversation, its commands and what the screen shows are the same for both, and need neither jax nor a model.
"""

import json
import os
import random
import re
import signal
import sys
import termios
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import ValidationError
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from lacuna.apps.configs import ChatConfig
from lacuna.cli import explain
from lacuna.config import SamplingKeys, UserError, did_you_mean
from lacuna.sampler import Request, load_generator, rules_by_origin, rules_in_force
from lacuna.tokenizer import REPLACEMENT, Message, check_messages, encode, render

CHAT_COMMANDS = {
    "/system": "TEXT: set the system message; without text, remove it",
    "/reset": "forget all turns",
    "/undo": "take the last turn back",
    "/retry": "answer the last turn again, in another way",
    "/save": "FILE: add the conversation to a jsonl file, as sft reads it",
    "/load": "FILE: go on with the last conversation of such a file",
    "/set": "temperature=0.7 …: change sampling rules or the seed; without any, show them",
    "/tokens": "the length of the conversation",
    "/help": "these lines",
    "/quit": "leave, as Ctrl-D does",
}
RULES = tuple(SamplingKeys.model_fields)
SETTABLE = (*RULES, "seed")
BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty")
FRAME_SECONDS = 0.05
# Control characters as visible signs, so that no text can command the terminal; a carriage return is dropped.
VISIBLE: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t\r"}
VISIBLE |= {13: None, 0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0x2426)


class AnswerPiece(NamedTuple):
    """The next part of an answer; the last says how it ended, `stop` where the model found its end."""

    text: str
    token_count: int
    ended: str = ""


# Who answers


class Local:
    """A model on this machine."""

    counts_exactly = True

    def __init__(self, config: ChatConfig) -> None:
        """Raises UserError where the model can't be loaded, or can't be talked to in the way that the page asks."""
        import jax

        self.generator = load_generator(config, jax.device_count() // config.tensor)
        self.tokenizer = self.generator.sampler.tokenizer
        has_template = self.tokenizer.template is not None
        self.is_chat = config.instruct if "instruct" in config.model_fields_set else has_template
        if not has_template and (self.is_chat or config.system):
            raise UserError(
                f"{self.generator.source} has no chat template; give one, as in --chat-template "
                "configs/chat_template.jinja, or leave out --instruct and --system, and it continues plain text"
            )

    def introduction(self, config: ChatConfig) -> list[str]:
        newest = "" if config.model_name else f", the newest run in {config.output_dir}"
        way = "answers by its chat template" if self.is_chat else "continues plain text, without a chat template"
        capacity = f"capacity: {self.generator.sampler.capacity:,} tokens, conversation and answer together"
        return [f"model: {self.generator.source}{newest}; {way}", capacity]

    def rules(self, config: ChatConfig) -> str:

        return f"{rules_by_origin(config, self.generator.rules)}; seed={config.seed}"

    def rules_of(self, config: ChatConfig) -> SamplingKeys:

        return rules_in_force(config, self.generator.rules)

    def is_greedy(self, config: ChatConfig) -> bool:
        return self.rules_of(config).temperature == 0

    def prompt(self, messages: list[Message]) -> tuple[int, ...]:
        if not self.is_chat:
            return tuple(encode(self.tokenizer, plain_text(messages), add_special_tokens=True).tolist())
        try:
            text = render(self.tokenizer, messages, add_generation_prompt=messages[-1]["role"] != "assistant")
        except ValueError as error:
            raise UserError(f"{error}; /undo takes the turn back, /reset begins anew") from error
        return tuple(encode(self.tokenizer, text, add_special_tokens=False).tolist())

    def size(self, messages: list[Message]) -> str:
        return f"{len(self.prompt(messages)):,} of {self.generator.sampler.capacity:,} tokens"

    def answer(self, messages: list[Message], config: ChatConfig, seed: int) -> Generator[AnswerPiece]:
        """Raises UserError where the conversation leaves no room for an answer."""
        from lacuna.sampler import BLOCK

        sampler, prompt, rules = self.generator.sampler, self.prompt(messages), self.rules_of(config)
        room = sampler.capacity - len(prompt)
        if room < 1:
            limit = sampler.model.capacity(sampler.model.max_positions)
            larger = f", a larger --capacity (the model has {limit:,}) makes room" if limit > sampler.capacity else ""
            raise UserError(
                f"the conversation has {len(prompt):,} tokens and the capacity, answer included, is "
                f"{sampler.capacity:,}; /undo takes the last turn back, /reset begins anew{larger}"
            )
        cut = f"cut off at max_tokens={rules.max_tokens}" if rules.max_tokens <= room else "the capacity is full"
        number = sampler.submit(Request(prompt, rules, self.generator.stop_ids, seed=seed))
        steps, is_going = 1, True
        try:
            while is_going:
                began = time.perf_counter()
                with interrupts_held_back():  # an interrupted step would lose the batch, which it was given for good
                    parts = sampler.advance(steps)
                steps = min(max(int(steps * FRAME_SECONDS / (time.perf_counter() - began)), 1), BLOCK)
                for part in parts:
                    is_going = not part.finish_reason
                    ended = cut if part.finish_reason == "length" else part.finish_reason
                    yield AnswerPiece(part.text.rstrip(REPLACEMENT) if ended else part.text, len(part.tokens), ended)
        finally:
            sampler.cancel(number)


class Remote:
    """A model behind an OpenAI-style server."""

    def __init__(self, config: ChatConfig) -> None:
        """Raises UserError where the client is missing, or the server has to name a model and does not."""
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError("--endpoint needs the openai client; get it by uv run --extra endpoint chat …") from error
        self.url = config.endpoint.rstrip("/") + ("" if urlsplit(config.endpoint).path.strip("/") else "/v1")
        key = config.api_key.get_secret_value() or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = OpenAI(base_url=self.url, api_key=key, max_retries=0)
        self.is_chat, self.usage = config.instruct, None
        self.model, self.found = config.model_name, ""
        if not self.model:
            with refusals_of(self.url):
                offered = [model.id for model in self.client.models.list().data]
            if not offered:
                raise UserError(f"{self.url} names no model; give one by --model-name")
            self.model, self.found = offered[0], f", the first of {len(offered)} that it names"

    @property
    def counts_exactly(self) -> bool:
        """Whether the server told how many tokens its last answer had."""
        return self.usage is not None

    def introduction(self, config: ChatConfig) -> list[str]:
        way = "answers as a chat" if self.is_chat else "continues plain text (--no-instruct)"
        return [f"model: {self.model} at {self.url}{self.found}; {way}"]

    def rules(self, config: ChatConfig) -> str:
        typed = [f"{name}={getattr(config, name):g}" for name in SETTABLE if name in config.model_fields_set]
        return f"{' '.join(typed)} (typed); all else as the server has it" if typed else "all as the server has them"

    def is_greedy(self, config: ChatConfig) -> bool:
        return "temperature" in config.model_fields_set and config.temperature == 0

    def size(self, messages: list[Message]) -> str:
        if self.usage is None:
            return "only the server can count, and it has told no count yet"
        prompt, answer = self.usage.prompt_tokens, self.usage.completion_tokens
        return f"{prompt:,} + {answer:,} tokens, prompt and answer, by the server's count at the last turn"

    def answer(self, messages: list[Message], config: ChatConfig, seed: int) -> Generator[AnswerPiece]:
        """What the user did not choose is left to the server. Raises UserError with what it or the way to it said."""
        rules = config.model_dump(include={*RULES} & config.model_fields_set)
        beyond = {name: rules.pop(name) for name in BEYOND_OPENAI if name in rules}
        if "seed" in config.model_fields_set:
            rules["seed"] = seed
        request: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "extra_body": beyond,
            **rules,
        } | ({"messages": messages} if self.is_chat else {"prompt": plain_text(messages)})  # fmt: skip
        create: Any = self.client.chat.completions.create if self.is_chat else self.client.completions.create
        self.usage, count, ended, is_thinking = None, 0, "the server broke off", False
        with refusals_of(self.url), create(**request) as stream:
            for chunk in stream:
                self.usage = chunk.usage or self.usage
                for choice in chunk.choices[:1]:
                    text, thought = part_text(choice)
                    turns = "" if bool(thought) == is_thinking else "<think>\n" if thought else "\n</think>\n\n"
                    if text or thought:
                        is_thinking, count = bool(thought), count + 1
                        yield AnswerPiece(turns + thought + text, 1)
                    reason = choice.finish_reason
                    ended = "cut off at max_tokens" if reason == "length" else reason or ended
        yield AnswerPiece("", self.usage.completion_tokens - count if self.usage else 0, ended)


def part_text(choice: Any) -> tuple[str, str]:
    """The text in a part of an answer, and the reasoning that some servers send beside it."""
    delta = getattr(choice, "delta", choice)
    reasoning = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
    return (getattr(delta, "content", None) or getattr(delta, "text", None) or ""), reasoning or ""


@contextmanager
def refusals_of(url: str) -> Generator[None]:
    """Whatever goes wrong on the way to a server, as one line: the client and its transport raise their own kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{url}: {reason[:400]}; is it the right URL, and does the server run?") from error


def plain_text(messages: list[Message]) -> str:
    """The text that a model without a chat template goes on with: all that was said, as it was said."""
    return "".join(message["content"] or "" for message in messages)


# The conversation


@dataclass
class Chat:
    """A conversation, and where its answers come from and go to; `attempt` counts the answers to the last turn."""

    config: ChatConfig
    source: Local | Remote
    is_terminal: bool
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0

    def __post_init__(self) -> None:
        self.console = Console(highlight=False)
        self.notes = Console(highlight=False, stderr=not self.is_terminal)
        if self.config.system:
            self.messages = [{"role": "system", "content": self.config.system}]

    def say(self, text: str, style: str = "dim") -> None:
        self.notes.print(Text(text.translate(VISIBLE), style), soft_wrap=not self.is_terminal)

    def take(self, typed: str) -> bool:
        """Obey a command or answer a turn; false where that was the last."""
        if typed.startswith("/") and (self.is_terminal or self.source.is_chat):
            return self.obey(*typed.strip().partition(" ")[::2])
        if self.last_role == "user":
            self.messages.pop()
            self.say("this takes the place of the turn before, which has no answer")
        self.messages.append({"role": "user", "content": typed})
        self.attempt = 0
        self.answer()
        return True

    @property
    def last_role(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""

    def obey(self, command: str, argument: str) -> bool:
        """Carry out a command; false where it is to leave. Raises UserError where it can't."""
        argument = argument.strip()
        if argument and command in ("/reset", "/undo", "/retry", "/tokens", "/help", "/quit"):
            raise UserError(f"{command} takes nothing behind it; begin a text that is no command with a space")
        match command:
            case "/system":
                self.set_system(argument)
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                self.say("all turns are forgotten")
            case "/undo":
                turn = self.cut_off_last_turn()
                self.say(f"taken back: {shortened(turn['content'])}")
            case "/retry":
                is_answered = self.last_role != "user"
                turn = self.cut_off_last_turn()
                self.messages.append(turn)
                self.attempt += is_answered
                if self.source.is_greedy(self.config):
                    self.say("temperature is 0, so the answer will be the same; /set temperature=0.7 changes that")
                self.answer()
            case "/save":
                self.save(argument)
            case "/load":
                self.load(argument)
            case "/set":
                self.config = with_settings(self.config, argument)
                self.say(f"rules: {self.source.rules(self.config)}")
            case "/tokens":
                self.say(self.source.size(self.messages) if self.messages else "nothing was said yet")
            case "/help":
                self.say("\n".join(f"{name:8} {text}" for name, text in CHAT_COMMANDS.items()))
            case "/quit":
                return False
            case _:
                mend = did_you_mean(command, CHAT_COMMANDS) or "; /help lists them"
                raise UserError(f"{command} is not a command{mend} (a space before it makes it a text)")
        return True

    def set_system(self, text: str) -> None:
        if text and not self.source.is_chat:
            raise UserError("plain text has no system message; start with --instruct to talk by a chat template")
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        self.say("the system message is set" if text else "there is no system message now")

    def cut_off_last_turn(self) -> Message:
        """The user's last message, taken off with all behind it."""
        turns = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            raise UserError("there is no turn yet; write one first")
        turn = self.messages[turns[-1]]
        self.messages = self.messages[: turns[-1]]
        return turn

    def save(self, file: str) -> None:
        path = file_of(file, "/save")
        if self.last_role != "assistant":
            raise UserError("nothing to save: the conversation has no answer at its end; write a turn, or /retry")
        try:
            before = path.read_bytes() if path.exists() else b""
            with path.open("ab") as lines:
                lines.write(b"\n" if before and not before.endswith(b"\n") else b"")
                lines.write(json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; choose another file") from error
        self.say(f"saved as conversation {len(before.splitlines()) + 1} of {path}")

    def load(self, file: str) -> None:
        path = file_of(file, "/load")
        try:
            *_, last = path.read_bytes().strip().split(b"\n")
            row = json.loads(last)
            check_messages(row["messages"], None)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; /load takes what /save wrote") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its last line is no chat ({error}); /load takes what /save wrote") from error
        self.messages, self.attempt = row.pop("messages"), 0
        left = f"; left aside: {', '.join(row)}" if row else ""
        self.say(f"{len(self.messages)} messages, the last: {shortened(self.messages[-1]['content'])}{left}")

    def answer(self) -> None:
        """Answer the last turn and tell how it went. An answer that was interrupted, or broken off by an error, stays
        as far as it came; where nothing came the turn is left without one."""
        turn = sum(message["role"] == "user" for message in self.messages)
        seed = random.Random(f"{self.config.seed} {turn} {self.attempt}").getrandbits(31)
        text, count, ended, began, first = "", 0, "", time.perf_counter(), 0.0
        is_markdown = self.is_terminal and self.source.is_chat
        try:
            with (
                silent_keys() if self.is_terminal else nullcontext(),
                GrowingMarkdown(self.console) if is_markdown else GrowingText() as shown,
                closing(self.source.answer(self.messages, self.config, seed)) as pieces,
            ):
                for piece in pieces:
                    first = first or time.perf_counter() - began
                    text, count, ended = text + piece.text, count + piece.token_count, piece.ended
                    with interrupts_held_back():
                        shown.add(piece.text)
        except KeyboardInterrupt:
            if not self.is_terminal:
                raise
        finally:
            if text or ended:
                self.messages.append({"role": "assistant", "content": text})
        if not text and not ended:
            return self.say("interrupted before the first token; /retry asks again")
        seconds = time.perf_counter() - began
        rate = (count - 1) / (seconds - first) if count > 1 else count / seconds
        how = f", {ended or 'interrupted'}" if ended != "stop" else ""
        about = "" if self.source.counts_exactly else "about "
        self.say(
            f"{about}{count} token{'s' * (count != 1)}, the first after {first:.2f} s, {about}{rate:.1f} tokens/s{how}"
        )


def with_settings(config: ChatConfig, text: str) -> ChatConfig:
    """The page with what `/set` names. Raises UserError where that can't be."""
    settings = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if name not in SETTABLE or not equals:
            mend = did_you_mean(name, SETTABLE) if name not in SETTABLE else f"; write {name}=…"
            raise UserError(f"/set {part}: should be NAME=VALUE with a name of {', '.join(SETTABLE)}{mend}")
        settings[name] = value
    try:
        return ChatConfig.model_validate(config.model_dump(exclude_unset=True) | settings)
    except ValidationError as error:
        raise UserError("\n".join(explain(one, ChatConfig, "chat", {}, {}) for one in error.errors())) from None


def file_of(text: str, command: str) -> Path:
    if not text:
        raise UserError(f"{command} needs a file behind it, as in {command} chats.jsonl")
    return Path(text).expanduser()


def shortened(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")[:60]


# What the screen shows


@contextmanager
def interrupts_held_back() -> Generator[None]:
    """Ctrl-C takes effect at the end of the block, not within."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def silent_keys() -> Generator[None]:
    """What is typed during an answer waits for the prompt as it is and does not break into the text."""
    before = termios.tcgetattr(sys.stdin)
    silent = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class GrowingText:
    """An answer as it is; no control character of it reaches a terminal."""

    def __enter__(self) -> "GrowingText":
        return self

    def add(self, text: str) -> None:
        print(text.translate(VISIBLE) if sys.stdout.isatty() else text, end="", flush=True)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not UserError:
            print(flush=True)


PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def markdown(text: str) -> Markdown:
    """Markdown in which tags are shown as they are, a line ends where its source does, and links show their address."""
    config = Markdown("", hyperlinks=False)
    config.parsed = PARSER.parse(text)
    for child in (child for token in config.parsed for child in token.children or ()):
        child.type = "hardbreak" if child.type == "softbreak" else child.type
    return config


def blocks_of(text: str) -> list[str]:
    """Markdown's blocks; the last may go on, and nothing that follows can change those before it."""
    lines = text.split("\n")
    starts = [token.map[0] for token in PARSER.parse(text) if token.level == 0 and token.map]
    return ["\n".join(lines[start:end]) for start, end in pairwise([0, *starts[1:], len(lines)])]


class GrowingMarkdown:
    """Markdown while it comes: what is finished is printed for good, only the end of the last block is drawn again."""

    def __init__(self, console: Console) -> None:
        self.console, self.rest = console, ""
        self.live = Live(self, console=console, refresh_per_second=12, transient=True, redirect_stderr=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in drawn(self.rest, console)[-max(options.size.height - 2, 1) :]:
            yield from [*line, Segment.line()]

    def __enter__(self) -> "GrowingMarkdown":
        self.live.start()
        return self

    def add(self, text: str) -> None:
        whole, newline, line = (self.rest + text.translate(VISIBLE)).rpartition("\n")
        *done, last = blocks_of(whole + newline)
        self.rest = last + line  # what an unfinished line begins can't be told yet
        self.print(done)

    def print(self, blocks: list[str]) -> None:
        for line in (line for block in blocks for line in drawn(block, self.console)):
            self.console.print(Segments([*line, Segment.line()]), end="")

    def __exit__(self, *_: object) -> None:
        last, self.rest = self.rest, ""
        self.print(blocks_of(last))
        self.live.stop()


def drawn(block: str, console: Console) -> list[list[Segment]]:
    """The lines of a block and an empty one behind it, whatever space it would put around itself."""
    lines = console.render_lines(markdown(block), pad=False)
    full = [place for place, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
    return [*lines[full[0] : full[-1] + 1], []] if full else []


# What is typed


def typed_turns(config: ChatConfig) -> Iterator[str]:
    """What the user writes at the prompt: Enter sends, Alt-Enter or Ctrl-J begins a line, Ctrl-D leaves."""
    path = config.cache_dir / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(path)
    except OSError:
        history = InMemoryHistory()
    settings = [f"/set {name}=" for name in SETTABLE]
    completer = WordCompleter([*CHAT_COMMANDS, *settings], sentence=True, meta_dict=dict(CHAT_COMMANDS))
    session = PromptSession(multiline=True, history=history, completer=completer, key_bindings=keys())
    while True:
        try:
            typed = session.prompt("> ", prompt_continuation="  ")
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if typed.strip():
            yield typed


def keys() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return bindings


def piped_turns(is_chat: bool) -> Iterator[str]:
    """Each line of standard input that is not empty; for a model that continues plain text the whole of it."""
    stream = sys.stdin.buffer
    for number, line in enumerate(stream if is_chat else [stream.read()], 1):
        try:
            text = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {number}: byte {error.start} is not UTF-8") from error
        if text.strip() or not is_chat:
            yield text


def run_chat(config: ChatConfig) -> None:
    """The command chat: answers at the terminal, or to each line of standard input.

    Raises:
        UserError: whatever about model, server or, without a terminal, input can't be used.
    """
    source = Remote(config) if config.endpoint else Local(config)
    chat = Chat(config, source, is_terminal=sys.stdin.isatty() and sys.stdout.isatty())
    chat.say("\n".join([*source.introduction(config), f"rules: {source.rules(config)}"]))
    if chat.is_terminal:
        chat.say(
            "Enter sends, Alt-Enter begins a line, Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands"
        )
    for typed in typed_turns(config) if chat.is_terminal else piped_turns(source.is_chat):
        try:
            if not chat.take(typed):
                break
        except BrokenPipeError:  # whoever read the answers has left; Python would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (UserError, KeyboardInterrupt) as error:
            if not chat.is_terminal:
                raise
            chat.say(f"error: {error}" if isinstance(error, UserError) else "interrupted", "red")
