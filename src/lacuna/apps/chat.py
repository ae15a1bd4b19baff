"""Chat in the terminal, with a model on this machine or on an OpenAI-compatible server.

Both are sources of the same kind: they introduce themselves, count a conversation and answer it piece by piece. The
conversation and its commands are the same for both; only a model on this machine needs jax, which is slow to import.
"""

import codecs
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
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from lacuna.apps.configs import ChatConfig
from lacuna.cli import explain
from lacuna.config import SamplingKeys, UserError, did_you_mean
from lacuna.tokenizer import REPLACEMENT, Message, check_messages, encode, ends_in_words, render, render_prompt

CHAT_COMMANDS = {
    "/system": "TEXT: set the system message; without TEXT, remove it",
    "/reset": "remove all turns",
    "/undo": "remove the last turn",
    "/retry": "answer the last turn again, differently",
    "/save": "FILE: append the conversation to a JSON Lines file that sft can train on",
    "/load": "FILE: continue the last conversation of such a file",
    "/set": "temperature=0.7 …: change sampling rules or the seed; without any, show them",
    "/tokens": "show the length of the conversation",
    "/help": "show this list",
    "/quit": "leave, as Ctrl-D does",
}
RULES = tuple(SamplingKeys.model_fields)
SETTABLE = (*RULES, "seed")
BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty")
FRAME_SECONDS = 0.05
# Control characters become visible symbols, so that no text can control the terminal; carriage returns are dropped.
VISIBLE: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t\r"}
VISIBLE |= {13: None, 0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0x2426)
VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # half a character


class AnswerPiece(NamedTuple):
    """The next part of an answer; the last one says why it ended, `stop` where the model ended it."""

    text: str
    token_count: int
    ended: str = ""


# Sources of answers


class Local:
    """A model on this machine."""

    counts_exactly = True

    def __init__(self, config: ChatConfig) -> None:
        """Raises UserError if the model can't be loaded, or lacks the chat template that the config needs."""
        import jax

        from lacuna.apps.generator import load_generator

        self.generator = load_generator(config, jax.device_count() // config.tensor)
        self.tokenizer = self.generator.sampler.tokenizer
        has_template = self.tokenizer.template is not None
        self.is_chat = config.instruct if "instruct" in config.model_fields_set else has_template
        if not has_template and (self.is_chat or config.system):
            raise UserError(
                f"{self.generator.source} has no chat template; give one, as in --chat-template "
                "configs/chat_template.jinja, or leave out --instruct and --system to continue plain text"
            )
        newest = "" if config.model_name else f", the newest run in {config.output_dir}"
        mode = "answers by its chat template" if self.is_chat else "continues plain text, without a chat template"
        self.introduction = (
            f"model: {self.generator.source}{newest}{self.generator.sampler.model.held}; {mode}\n"
            f"capacity: {self.generator.sampler.capacity:,} tokens, conversation and answer together\n"
            f"compute in {self.generator.sampler.dtype}; {ends_in_words(self.tokenizer)}"
        )

    def rules(self, config: ChatConfig) -> str:
        from lacuna.apps.generator import rules_by_origin

        return f"{rules_by_origin(config, self.generator.rules)}; seed={config.seed}"

    def prompt(self, messages: list[Message]) -> tuple[int, ...]:
        as_chat = render if messages[-1]["role"] == "assistant" else render_prompt
        try:
            text = as_chat(self.tokenizer, messages) if self.is_chat else plain_text(messages)
        except ValueError as error:
            raise UserError(f"{error}; /undo removes the turn, /reset starts again") from error
        return tuple(encode(self.tokenizer, text, add_special_tokens=not self.is_chat).tolist())

    def size(self, messages: list[Message]) -> str:
        return f"{len(self.prompt(messages)):,} of {self.generator.sampler.capacity:,} tokens"

    def answer(self, messages: list[Message], config: ChatConfig, seed: int) -> Generator[AnswerPiece]:
        """Raises UserError if the conversation leaves no room for an answer."""
        from lacuna.apps.generator import rules_in_force
        from lacuna.sampler import BLOCK, Request

        sampler, prompt = self.generator.sampler, self.prompt(messages)
        rules, room = rules_in_force(config, self.generator.rules), sampler.capacity - len(prompt)
        if room < 1:
            limit = min(sampler.model.max_positions, sampler.model.sliding_window or sampler.model.max_positions)
            larger = (
                f", a larger --capacity (the model allows {limit:,}) makes room" if limit > sampler.capacity else ""
            )
            raise UserError(
                f"the conversation has {len(prompt):,} tokens and the capacity, answer included, is "
                f"{sampler.capacity:,}; /undo removes the last turn, /reset starts again{larger}"
            )
        cut = f"cut off at max_tokens={rules.max_tokens}" if rules.max_tokens <= room else "the capacity is full"
        number = sampler.submit(Request(prompt, rules, self.generator.stop_ids, seed=seed))
        steps, ended = 1, ""
        try:
            while not ended:
                began = time.perf_counter()
                with interrupts_delayed():  # an interrupted step would lose the batch, whose buffers it was donated
                    parts = sampler.advance(steps)
                steps = min(max(int(steps * FRAME_SECONDS / (time.perf_counter() - began)), 1), BLOCK)
                for part in parts:
                    ended = cut if part.finish_reason == "length" else part.finish_reason
                    yield AnswerPiece(part.text.rstrip(REPLACEMENT) if ended else part.text, len(part.tokens), ended)
        finally:
            sampler.cancel(number)


class Remote:
    """A model on an OpenAI-compatible server."""

    def __init__(self, config: ChatConfig) -> None:
        """Raises UserError if the client is not installed, or the server offers no model and none was given."""
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError("--endpoint needs the openai client; get it by uv run --extra endpoint chat …") from error
        self.url = config.endpoint.rstrip("/") + ("" if urlsplit(config.endpoint).path.strip("/") else "/v1")
        key = config.api_key.get_secret_value() or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = OpenAI(base_url=self.url, api_key=key, max_retries=0)
        self.is_chat, self.usage = config.instruct, None
        self.model, found = config.model_name, ""
        if not self.model:
            with refusals_of(self.url):
                offered = [model.id for model in self.client.models.list().data]
            if not offered:
                raise UserError(f"{self.url} offers no model; give one by --model-name")
            self.model, found = offered[0], f", the first of {len(offered)} that it offers"
        mode = "answers as a chat" if self.is_chat else "continues plain text (--no-instruct)"
        self.introduction = f"model: {self.model} at {self.url}{found}; {mode}"

    @property
    def counts_exactly(self) -> bool:
        """Whether the server reported how many tokens its last answer had."""
        return self.usage is not None

    def rules(self, config: ChatConfig) -> str:
        typed = [f"{name}={getattr(config, name):g}" for name in SETTABLE if name in config.model_fields_set]
        return f"{' '.join(typed)} (typed); the server's defaults for the rest" if typed else "the server's defaults"

    def size(self, messages: list[Message]) -> str:
        if self.usage is None:
            return "only the server can count tokens, and it has reported no count yet"
        prompt, answer = self.usage.prompt_tokens, self.usage.completion_tokens
        return f"{prompt:,} + {answer:,} tokens, prompt and answer, by the server's count at the last turn"

    def answer(self, messages: list[Message], config: ChatConfig, seed: int) -> Generator[AnswerPiece]:
        """Leaves what the user did not choose to the server. Raises UserError with what went wrong there or on the
        way."""
        rules = config.model_dump(include={*RULES} & config.model_fields_set)
        beyond = {name: rules.pop(name) for name in BEYOND_OPENAI if name in rules}
        if "seed" in config.model_fields_set:
            rules["seed"] = seed
        plain = {"prompt": plain_text(messages), "max_tokens": config.max_tokens}
        request: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "extra_body": beyond,
            **rules, **({"messages": messages} if self.is_chat else plain),
        }  # fmt: skip
        create: Any = self.client.chat.completions.create if self.is_chat else self.client.completions.create
        self.usage, count, ended, is_thinking = None, 0, "the server broke off", False
        halves = codecs.getincrementaldecoder("utf-16-le")("replace")  # of characters, which some servers send in turn
        with refusals_of(self.url), create(**request) as stream:
            for chunk in stream:
                self.usage = chunk.usage or self.usage
                for choice in chunk.choices[:1]:
                    text, thought = part_text(choice)
                    mark = "" if bool(thought) == is_thinking else "<think>\n" if thought else "\n</think>\n\n"
                    if text or thought:
                        is_thinking, count = bool(thought), count + 1
                        units = (mark + thought + text).encode("utf-16-le", "surrogatepass")
                        yield AnswerPiece(halves.decode(units), 1)
                    reason = choice.finish_reason
                    ended = "cut off at max_tokens" if reason == "length" else reason or ended
        more = self.usage.completion_tokens - count if self.usage else 0
        yield AnswerPiece(halves.decode(b"", final=True), more, ended)


def part_text(choice: Any) -> tuple[str, str]:
    """The text in a part of an answer, and the reasoning that some servers send separately."""
    delta = getattr(choice, "delta", choice)
    reasoning = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
    return (getattr(delta, "content", None) or getattr(delta, "text", None) or ""), reasoning or ""


# By the status of a server that answered
FIXES = {400: "try --no-instruct", 401: "set --api-key or OPENAI_API_KEY", 404: "choose another --model-name"}


@contextmanager
def refusals_of(url: str) -> Generator[None]:
    """Any failure between here and a server as one line: the client and its transport raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        status = getattr(error, "status_code", 0)  # of a server that answered
        fix = FIXES.get(status, "its log may say more") if status else "is it the right URL, and does the server run?"
        raise UserError(f"{url}: {reason[:400]}; {fix}") from error


def plain_text(messages: list[Message]) -> str:
    """The text that a model without a chat template continues: every turn as it was, without separators."""
    return "".join(message["content"] or "" for message in messages)


# The conversation


@dataclass
class Chat:
    """A conversation and the source of its answers; `attempt` counts retries of the last turn."""

    config: ChatConfig
    source: Local | Remote
    is_terminal: bool
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0

    def __post_init__(self) -> None:
        self.notes = Console(highlight=False, stderr=not self.is_terminal)
        if self.config.system:
            self.messages = [{"role": "system", "content": self.config.system}]

    def say(self, text: str, style: str = "dim") -> None:
        self.notes.print(Text(text.translate(VISIBLE), style), soft_wrap=not self.is_terminal)

    def take(self, typed: str) -> bool:
        """Carry out a command or answer a turn; False if it was the last."""
        if typed.startswith("/") and (self.is_terminal or self.source.is_chat):
            command, _, argument = typed.strip().partition(" ")
            return self.run_command(command, argument.strip())
        if self.last_role == "user":
            self.messages.pop()
            self.say("this replaces the previous turn, which has no answer")
        self.messages.append({"role": "user", "content": typed})
        self.attempt = 0
        self.answer()
        return True

    @property
    def last_role(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""

    def run_command(self, command: str, argument: str) -> bool:
        """Carry out a command; False if it was /quit. Raises UserError if it can't be done."""
        if argument and command in ("/reset", "/undo", "/retry", "/tokens", "/help", "/quit"):
            raise UserError(f"{command} takes no argument; start with a space to send this as a message")
        match command:
            case "/system":
                self.set_system(argument)
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                self.say("all turns removed")
            case "/undo":
                self.say(f"removed: {shortened(self.pop_last_turn()['content'])}")
            case "/retry":
                is_answered = self.last_role == "assistant"
                turn = self.pop_last_turn()
                self.messages.append(turn)
                self.attempt += is_answered
                self.answer()
            case "/save" | "/load":
                if not argument:
                    raise UserError(f"{command} needs a file, as in {command} chats.jsonl")
                try:
                    (self.save if command == "/save" else self.load)(Path(os.path.expanduser(argument)))
                except OSError as error:
                    raise UserError(f"{argument}: {error.strerror}; choose another file") from error
            case "/set":
                self.config = with_settings(self.config, argument)
                self.say(f"rules: {self.source.rules(self.config)}")
            case "/tokens":
                self.say(self.source.size(self.messages) if self.messages else "the conversation is empty")
            case "/help":
                self.say("\n".join(f"{name:8} {text}" for name, text in CHAT_COMMANDS.items()))
            case "/quit":
                return False
            case _:
                hint = did_you_mean(command, CHAT_COMMANDS) or "; /help lists them"
                raise UserError(f"{command} is not a command{hint} (start with a space to send it as a message)")
        return True

    def set_system(self, text: str) -> None:
        if text and not self.source.is_chat:
            raise UserError("plain text has no system message; start with --instruct to use a chat template")
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        self.say("system message set" if text else "system message removed")

    def pop_last_turn(self) -> Message:
        """The user's last message, removed from the conversation with everything after it."""
        turns = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            raise UserError("there is no turn yet; write one first")
        turn, self.messages = self.messages[turns[-1]], self.messages[: turns[-1]]
        return turn

    def save(self, path: Path) -> None:
        if self.last_role != "assistant":
            raise UserError("nothing to save: the conversation does not end with an answer; write a turn, or /retry")
        is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a", encoding="utf-8") as lines:
            lines.write("\n" * is_torn + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        self.say(f"saved as the last line of {path}")

    def load(self, path: Path) -> None:
        try:
            messages = json.loads(path.read_bytes().strip().split(b"\n")[-1])["messages"]
            check_messages(messages, None)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its last line is not a chat ({error}); /load reads what /save wrote") from error
        self.messages, self.attempt = messages, 0
        self.say(f"{len(messages)} messages loaded, the last: {shortened(messages[-1]['content'])}")

    def answer(self) -> None:
        """Answer the last turn and report how it went. An answer that is interrupted, or cut short by an error, is
        kept as far as it came; if nothing came, the turn is left without an answer."""
        turn = sum(message["role"] == "user" for message in self.messages)
        seed = random.Random(f"{self.config.seed} {turn} {self.attempt}").getrandbits(31)
        text, count, ended, began, first = "", 0, "", time.perf_counter(), 0.0
        try:
            with closing(self.source.answer(self.messages, self.config, seed)) as pieces:
                for piece in pieces:
                    first = first or time.perf_counter() - began
                    text, count, ended = text + piece.text, count + piece.token_count, piece.ended
                    shown = piece.text.translate(VISIBLE) if sys.stdout.isatty() else piece.text
                    print(shown, end="", flush=True)
        except KeyboardInterrupt:
            if not self.is_terminal:
                raise
        finally:
            if text or ended:
                self.messages.append({"role": "assistant", "content": text})
                print(flush=True)
        if not text and not ended:
            return self.say("interrupted before the first token; /retry asks again")
        seconds = time.perf_counter() - began
        rate = (count - 1) / (seconds - first) if count > 1 else count / seconds
        reason = f", {ended or 'interrupted'}" if ended != "stop" else ""
        about = "" if self.source.counts_exactly else "about "
        plural = "s" * (count != 1)
        self.say(f"{about}{count} token{plural}, the first after {first:.2f} s, {about}{rate:.1f} tokens/s{reason}")


def with_settings(config: ChatConfig, text: str) -> ChatConfig:
    """The config with the NAME=VALUE pairs of `/set`. Raises UserError if one is wrong."""
    settings = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if name not in SETTABLE or not equals:
            hint = did_you_mean(name, SETTABLE) if name not in SETTABLE else f"; write {name}=…"
            raise UserError(f"/set {part}: should be NAME=VALUE with a name of {', '.join(SETTABLE)}{hint}")
        settings[name] = value
    try:
        return ChatConfig.model_validate(config.model_dump(exclude_unset=True) | settings)
    except ValidationError as error:
        raise UserError("\n".join(explain(one, ChatConfig, "chat", {}) for one in error.errors())) from None


def shortened(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")[:60]


# The terminal


@contextmanager
def interrupts_delayed() -> Generator[None]:
    """Ctrl-C takes effect at the end of the block, not inside it."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def silent_keys() -> Generator[None]:
    """What is typed during an answer is not echoed into the text, and is kept unchanged for the next prompt.

    Ctrl-C interrupts an answer even if the parent process ignores SIGINT, as a shell script does for its background
    commands.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = termios.tcgetattr(sys.stdin)
    silent = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def typed_turns(config: ChatConfig) -> Iterator[str]:
    """What the user writes at the prompt: Enter sends, Alt-Enter or Ctrl-J starts a new line, Ctrl-D leaves."""
    try:
        path = config.cache_dir / "chat_history"
        path.touch(mode=0o600)
        history = FileHistory(path)
    except (OSError, UserError):
        history = InMemoryHistory()
    settings = [f"/set {name}=" for name in SETTABLE]
    completer = WordCompleter([*CHAT_COMMANDS, *settings], sentence=True, meta_dict=dict(CHAT_COMMANDS))
    session = PromptSession(multiline=True, history=history, completer=completer, key_bindings=key_bindings())
    while True:
        try:
            typed = session.prompt("> ", prompt_continuation="  ")
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if typed.strip():
            yield typed


def key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def start_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def piped_turns(is_chat: bool) -> Iterator[str]:
    """Each non-empty line of standard input; all of it at once for a model that continues plain text."""
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
        UserError: the model or server can't be used; without a terminal, also a turn that can't be answered.
    """
    source = Remote(config) if config.endpoint else Local(config)
    chat = Chat(config, source, is_terminal=sys.stdin.isatty() and sys.stdout.isatty())
    chat.say(f"{source.introduction}\nrules: {source.rules(config)}")
    if chat.is_terminal:
        keys = "Enter sends, Alt-Enter starts a line, Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands"
        chat.say(keys)
    with silent_keys() if chat.is_terminal else nullcontext():
        for typed in typed_turns(config) if chat.is_terminal else piped_turns(source.is_chat):
            try:
                if not chat.take(typed):
                    break
            except BrokenPipeError:  # the reader of the answers is gone; Python would complain again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(1) from None
            except (UserError, KeyboardInterrupt) as error:
                if not chat.is_terminal:
                    raise
                chat.say(f"error: {error}" if isinstance(error, UserError) else "interrupted", "red")
