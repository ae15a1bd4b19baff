"""The chat with a local model, with an OpenAI-compatible server, and at a terminal."""

import io
import itertools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import TINY, make_small, random_params
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lacuna import cli
from lacuna.apps import chat
from lacuna.apps.chat import CHAT_COMMANDS, VISIBLE, AnswerPiece, Chat, Local, Remote
from lacuna.apps.configs import ChatConfig
from lacuna.checkpoint import save_model
from lacuna.cli import parse
from lacuna.config import DataSource, UserError
from lacuna.documents import jsonl_rows, prepare
from lacuna.model import read_model_config
from lacuna.tokenizer import encode, load_tokenizer, render

QUESTION = "Nora has 18 marbles."
PATIENCE = 300  # seconds for what takes a second on a quiet machine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with tokenizer, chat template and generation_config.json."""
    source = make_small(tmp_path_factory.mktemp("models") / "small")
    (source / "generation_config.json").write_text('{"temperature": 0.75, "top_k": 50}')
    model = read_model_config(source)
    save_model(source.parent / "model", random_params(model), model, source)
    return source.parent / "model"


def config_of(directory: Path, **changes: Any) -> ChatConfig:
    settings = {"model_name": str(directory), "capacity": 320, "max_tokens": 12, "compute_dtype": "float32"}
    return ChatConfig(**settings | changes)


@pytest.fixture(scope="module")
def local(directory: Path) -> Local:
    """The model without stop tokens: its answers are random and end at max_tokens."""
    source = Local(config_of(directory))
    source.generator = source.generator._replace(stop_ids=())
    return source


def talk(local: Local, directory: Path, *typed: str, **changes: Any) -> Chat:
    """A chat without a terminal, after these lines were typed."""
    conversation = Chat(config_of(directory, **changes), local, is_terminal=False)
    for line in typed:
        assert conversation.take(line)
    return conversation


def answers(conversation: Chat) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "assistant"]


def test_a_seed_repeats_a_whole_conversation_and_retries_differ(local: Local, directory: Path) -> None:
    typed = QUESTION, "/retry", "And then?", "/retry", "/retry"
    first, again = (talk(local, directory, *typed, seed=7).messages for _ in range(2))
    assert first == again and [message["role"] for message in first] == ["user", "assistant"] * 2
    assert talk(local, directory, *typed, seed=8).messages != first
    tries = [answers(talk(local, directory, QUESTION, *["/retry"] * count))[0] for count in range(3)]
    assert len(set(tries)) == 3
    undone = talk(local, directory, QUESTION, "/retry", "/undo", QUESTION)
    assert answers(undone) == tries[:1]


def test_the_model_sees_all_turns_except_those_undone(local: Local, directory: Path) -> None:
    conversation = talk(local, directory, "/system Be brief.", QUESTION, "No.", "/undo", "And then?")
    seen = [(message["role"], message["content"]) for message in conversation.messages]
    assert seen[:2] == [("system", "Be brief."), ("user", QUESTION)] and seen[3] == ("user", "And then?")
    alone = talk(local, directory, QUESTION)
    assert local.prompt(conversation.messages)[0] == local.prompt(alone.messages)[0]
    assert len(local.prompt(conversation.messages)) > len(local.prompt(alone.messages))
    conversation.take("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    conversation.take("/system")
    assert conversation.messages == []


def test_a_message_that_the_template_leaves_out_is_refused(directory: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages[1:] %}{{ message.content }}<|im_end|>{% endfor %}")
    tokenizer = load_tokenizer(directory, str(template))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    with pytest.raises(UserError, match=r"message 1 \(system\): the chat template leaves it out of this chat.*/undo"):
        Local.prompt(cast(Local, SimpleNamespace(is_chat=True, tokenizer=tokenizer)), messages)


def test_answers_go_to_standard_output_and_the_rest_to_standard_error(
    local: Local, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(local, directory, QUESTION, "/tokens", "/help")
    out, err = capsys.readouterr()
    assert out == answers(conversation)[0] + "\n"
    assert "12 tokens, the first after" in err and "cut off at max_tokens=12" in err
    prompt = encode(local.tokenizer, render(local.tokenizer, conversation.messages), add_special_tokens=False)
    assert f"{len(prompt)} of 320 tokens" in err and all(name in err for name in CHAT_COMMANDS)


def test_a_terminal_gets_every_line_of_an_answer_once_and_in_order(
    local: Local, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces are written as they come, and nothing that was written is drawn again."""
    text = "".join(f"```python\n{'x = 1  # é😀' * 9}{number}\n```\n\n" for number in range(100))
    pieces = [AnswerPiece(text[start : start + 7], 1) for start in range(0, len(text), 7)]
    monkeypatch.setattr(local, "answer", lambda *_: (each for each in [*pieces, AnswerPiece("", 0, "stop")]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Chat(ChatConfig(), local, is_terminal=False).take(QUESTION)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ((1, 2, 2), "5 tokens, the first after 1.50 s, 2.0 tokens/s"),  # four tokens in the two seconds after the first
        ((1,), "1 token, the first after 1.50 s, 0.3 tokens/s"),
    ],
)
def test_the_figures_of_an_answer_are_its_tokens_and_times(
    local: Local,
    counts: tuple[int, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter((10.0, 11.5, 13.5))
    monkeypatch.setattr(chat, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(local, "answer", lambda *_: (AnswerPiece("a", count, "stop") for count in counts))
    Chat(ChatConfig(), local, is_terminal=False).take(QUESTION)
    assert capsys.readouterr().err == line + "\n"


def test_rules_are_shown_with_their_origin_and_can_be_set(
    local: Local, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(local, directory, temperature=0.5)
    shown = local.rules(conversation.config)
    assert shown.startswith("temperature=0.5 max_tokens=12 (typed); top_k=50 (generation_config.json); top_p=1")
    conversation.take("/set temperature=0 top_p=0.5 seed=3")
    shown = " ".join(capsys.readouterr().err.split())
    assert "temperature=0 top_p=0.5 max_tokens=12 (typed)" in shown and "seed=3" in shown
    assert "top_k=50 (generation_config.json)" in shown
    conversation.take(QUESTION)
    assert answers(conversation) == answers(talk(local, directory, QUESTION, temperature=0))


@pytest.mark.parametrize(
    "typed, words",
    [
        ("/sat", "/sat is not a command; did you mean /set?"),
        ("/undo", "there is no turn yet"),
        ("/retry", "there is no turn yet"),
        ("/reset all", "/reset takes no argument"),
        ("/set temperature", "write temperature=…"),
        ("/set temprature=1", "did you mean temperature?"),
        ("/set temperature=hot", 'temperature = "hot" should be a valid number'),
        ("/set top_p=2", "less than or equal to 1"),
        ("/save", "/save needs a file"),
        ("/save there.jsonl", "nothing to save"),
        ("/load nowhere.jsonl", "nowhere.jsonl: No such file"),
        (f"/load {TINY / 'config.json'}", "its last line is not a chat"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why_and_changes_nothing(
    local: Local, directory: Path, typed: str, words: str
) -> None:
    conversation = talk(local, directory)
    config = conversation.config
    with pytest.raises(UserError) as refusal:
        conversation.take(typed)
    assert words in str(refusal.value) and conversation.messages == [] and conversation.config == config


def test_what_is_saved_is_loaded_and_read_as_training_data(local: Local, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": "torn"}')  # without a newline at its end
    first = talk(local, directory, "/system Bé brief.", QUESTION, f"/save {file}")
    second = talk(local, directory, "And then?", f"/save {file}")
    assert talk(local, directory, f"/load {file}").messages == second.messages
    rows = [row for _, row in jsonl_rows(file) if isinstance(row, dict)][1:]
    assert [row["messages"] for row in rows] == [first.messages, second.messages]
    assert all(prepare(row, DataSource(path=str(file)), local.tokenizer, "assistant").spans for row in rows)


def test_a_conversation_beyond_the_capacity_is_refused_with_both_lengths_and_kept(
    local: Local, directory: Path
) -> None:
    conversation = talk(local, directory, QUESTION)
    before = list(conversation.messages)
    with pytest.raises(UserError) as refusal:
        conversation.take("many words " * 200)
    length = len(local.prompt(conversation.messages))
    assert f"{length:,} tokens" in str(refusal.value) and "320; /undo" in str(refusal.value)
    assert len(conversation.messages) == 3
    conversation.take("/undo")
    assert conversation.messages == before and conversation.take("And then?")


def test_an_interrupt_keeps_the_partial_answer_and_leaves_the_sampler_intact(
    local: Local, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored after `nohup pytest &` in a script
    expected = talk(local, directory, QUESTION, "And then?", max_tokens=100).messages
    conversation = talk(local, directory, max_tokens=100)
    with monkeypatch.context() as patched:
        patched.setattr(chat, "print", lambda text="", **_: text and signal.raise_signal(signal.SIGINT), raising=False)
        with pytest.raises(KeyboardInterrupt):
            conversation.take(QUESTION)
    signal.signal(signal.SIGINT, before)
    part = answers(conversation)[0]
    assert part and expected[1]["content"].startswith(part) and part != expected[1]["content"]
    conversation.messages = expected[:2]
    conversation.take("And then?")
    assert conversation.messages == expected


def test_an_incomplete_character_is_not_shown(local: Local, directory: Path) -> None:
    """A quarter of the vocabulary is bytes that are not a character by themselves."""
    config = config_of(directory, temperature=5, top_k=0, max_tokens=1)
    asked = [{"role": "user", "content": QUESTION}]
    texts = ["".join(piece.text for piece in local.answer(asked, config, seed)) for seed in range(30)]
    assert any(texts) and "" in texts and "\ufffd" not in "".join(texts)


def test_a_model_without_a_template_continues_plain_text(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base" / "model"
    shutil.copytree(directory, base)
    raw = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(raw | {"chat_template": None}))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"/one\ntwo \n"), isatty=lambda: False))
    arguments = f"--output-dir {tmp_path} --capacity 320 --max-tokens 12 --compute-dtype float32".split()
    cli.start("chat", arguments)
    out, err = capsys.readouterr()
    assert f"model: {base}, the newest run in {tmp_path}; continues plain text, without a chat template" in err
    source = Local(config_of(base))
    pieces = list(source.answer([{"role": "user", "content": "/one\ntwo "}], config_of(base), seed=chat_seed(1, 0)))
    assert out == "".join(piece.text for piece in pieces) + "\n"
    with pytest.raises(UserError, match="--chat-template"):
        Local(config_of(base, instruct=True))


def chat_seed(turn: int, attempt: int) -> int:
    return chat.random.Random(f"0 {turn} {attempt}").getrandbits(31)


# A server


class Handler(BaseHTTPRequestHandler):
    """Speaks the protocol; the server holds what it answers and what it was asked."""

    server: Any

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "first"}, {"id": "second"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked | {"path": self.path, "key": self.headers["Authorization"]})
        self.send_response(self.server.status)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in self.server.events:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                time.sleep(self.server.pause)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.has_lost_reader.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


def event(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}}


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.pause, server.has_lost_reader, server.status = [], 0.0, threading.Event(), 200
    server.events = [event(content="Hé"), event(content="llo"), event("stop"), USAGE]
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def remote(server: Any, *typed: str, **changes: Any) -> Chat:
    config = ChatConfig(endpoint=server.url, **changes)
    source = Remote(config)
    conversation = Chat(config, source, is_terminal=False)
    for line in typed:
        conversation.take(line)
    source.client.close()
    return conversation


def test_a_server_is_sent_what_was_chosen_and_nothing_else(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    remote(server, QUESTION)
    plain = {"model": "first", "stream": True, "stream_options": {"include_usage": True}}
    place = {"path": "/v1/chat/completions", "key": "Bearer none"}
    assert server.asked == [{"messages": [{"role": "user", "content": QUESTION}], **plain, **place}]
    out, err = capsys.readouterr()
    assert out == "Héllo\n" and err.startswith("9 tokens, the first after")

    typed = "one", "/set temperature=0.5 top_k=3 min_p=0.1 repetition_penalty=1.5", "two", "/tokens"
    remote(server, *typed, seed=3, max_tokens=7, model_name="second", system="Be brief.", api_key="secret")
    asked = server.asked[-1]
    roles = [message["role"] for message in asked.pop("messages")]
    assert roles == ["system", "user", "assistant", "user"]
    rules = {"temperature": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "max_tokens": 7}
    place["key"] = "Bearer secret"
    assert {**asked, "seed": 0} == {**plain, **rules, **place, "model": "second", "seed": 0}
    assert asked["seed"] != server.asked[-2]["seed"]
    assert "5 + 9 tokens" in capsys.readouterr().err


def test_a_server_also_gives_plain_text_and_reasoning(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.events = [
        event(reasoning_content="Hm"),
        event(reasoning_content="m."),
        event(content="Yes."),
        event("length"),
    ]
    assert answers(remote(server, QUESTION)) == ["<think>\nHmm.\n</think>\n\nYes."]
    assert "about 3 tokens" in (err := capsys.readouterr().err) and "cut off at max_tokens" in err
    server.events = [{"choices": [{"index": 0, "text": " a time", "finish_reason": "stop"}]}]
    assert answers(remote(server, "Once upon", instruct=False)) == [" a time"]
    assert server.asked[-1]["path"] == "/v1/completions" and server.asked[-1]["prompt"] == "Once upon"
    assert server.asked[-1]["max_tokens"] == ChatConfig().max_tokens  # servers stop after 16 tokens otherwise


def test_a_server_that_does_not_answer_gives_one_line_and_loses_no_turn(server: Any) -> None:
    config = ChatConfig(endpoint="http://127.0.0.1:1", model_name="x")
    away, here = Remote(config), Remote(ChatConfig(endpoint=server.url))
    conversation = Chat(config, away, is_terminal=False)
    with pytest.raises(UserError, match=r"^http://127.0.0.1:1/v1: .*refused.*does the server run\?$"):
        conversation.take(QUESTION)
    assert conversation.messages == [{"role": "user", "content": QUESTION}]
    conversation.source = here
    conversation.take("/retry")
    assert answers(conversation) == ["Héllo"]
    server.events = [event(content="Hal"), {"error": {"message": "out of\n memory"}}]
    with pytest.raises(UserError, match="out of memory"):
        conversation.take("again")
    assert answers(conversation)[-1] == "Hal"
    away.client.close()
    here.client.close()


def test_halves_of_characters_are_joined_or_replaced(server: Any, tmp_path: Path) -> None:
    server.events = [event(content=piece) for piece in ("Well \ud83d", "\ude00", "! \ude00", " \ud83d")] + [
        event("stop")
    ]
    conversation = remote(server, QUESTION, f"/save {tmp_path / 'chat.jsonl'}")
    assert answers(conversation) == ["Well \U0001f600! \ufffd \ufffd"]
    assert "half \ud83d".translate(VISIBLE) == "half \ufffd"


@pytest.mark.parametrize(
    ("status", "fix"),
    [(400, "--no-instruct"), (401, "--api-key"), (404, "--model-name"), (500, "its log may say more")],
)
def test_a_server_that_refuses_is_not_said_to_be_away(server: Any, status: int, fix: str) -> None:
    server.status = status
    with pytest.raises(UserError) as refusal:
        remote(server, QUESTION)
    assert fix in str(refusal.value) and "does the server run" not in str(refusal.value)


# The terminal

CODE = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lacuna import cli
cli.start("chat", sys.argv[1:])
print("loaded", {"jax", "lacuna.sampler"} & {*sys.modules})
"""


class Terminal:
    """A process at its own terminal, and all that it showed."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip
        os.close(slave)
        self.shown, self.read = "", b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def wait_for(self, words: str) -> None:
        """Read until these words come after those of the last call."""
        until = time.monotonic() + PATIENCE
        while words not in (unread := self.read.decode(errors="ignore")[len(self.shown) :]):
            assert time.monotonic() < until, f"{words!r} did not come: {self.shown}{unread!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.read += os.read(self.master, 65536)
        self.shown += unread[: unread.index(words) + len(words)]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_at_a_terminal_ctrl_c_stops_only_the_answer_and_jax_is_never_loaded(server: Any) -> None:
    server.events = (event(content=f"w{i} ") if i else event(content="**strong** \x1b[35m ") for i in itertools.count())
    server.pause = 0.01
    with Terminal("--endpoint", server.url) as terminal:
        terminal.wait_for("?2004h")
        terminal.type("hello\x1b\rthere\r")
        terminal.wait_for("w9")
        terminal.type("\x03")
        terminal.wait_for("interrupted")
        assert server.has_lost_reader.wait(PATIENCE)
        terminal.wait_for("?2004h")
        server.events, server.pause = [event(content="done."), event("stop")], 0.0
        terminal.type("dropped\x03")
        terminal.wait_for("?2004h")
        terminal.type("again\r")
        terminal.wait_for("tokens/s")
        terminal.wait_for("?2004h")
        server.pause = 0.5
        terminal.type("slowly\r")
        terminal.wait_for("done.")
        terminal.type("typed ahead\r")
        terminal.wait_for("tokens/s")
        terminal.wait_for("tokens/s")
        terminal.wait_for("?2004h")
        terminal.type("\x1b[A")
        terminal.wait_for("typed ahead")
        terminal.type("\x03")
        terminal.wait_for("?2004h")
        terminal.type("/qu")
        terminal.wait_for(CHAT_COMMANDS["/quit"])
        terminal.type("\t")
        terminal.wait_for("it")
        terminal.type("\r")
        terminal.wait_for("loaded set()")
        assert terminal.process.wait(PATIENCE) == 0
    asked = [message["content"] for message in server.asked[-1]["messages"]]
    assert asked[-1] == "typed ahead"
    assert asked[0] == "hello\nthere" and asked[1].startswith("**strong** \x1b[35m w1 w2 ") and asked[2] == "again"
    assert "**strong** ␛[35m" in terminal.shown and "\x1b[35m" not in terminal.shown


def test_keys_send_start_a_line_clear_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*arguments: Any, **options: Any) -> PromptSession:
        return PromptSession(*arguments, **options, input=keyboard, output=DummyOutput())

    monkeypatch.setattr(chat, "PromptSession", session)
    with create_pipe_input() as keyboard:
        keyboard.send_text("one\x1b\rtwo\nthree\r  \rgone\x03kept\r\x04")
        assert list(chat.typed_turns(ChatConfig())) == ["one\ntwo\nthree", "kept"]
    history = FileHistory(ChatConfig().cache_dir / "chat_history")
    assert list(history.load_history_strings())[::2] == ["kept", "one\ntwo\nthree"]


def test_a_note_at_a_terminal_breaks_between_words(
    local: Local, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Chat(ChatConfig(), local, is_terminal=True).take("/help")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert " ".join(" ".join(lines).split()) == " ".join(f"{name} {text}" for name, text in CHAT_COMMANDS.items())


def test_no_character_controls_the_terminal() -> None:
    everything = "".join(map(chr, range(0x110)))
    kept = everything.translate(VISIBLE)
    assert not [char for char in kept if (ord(char) < 32 and char not in "\n\t") or 0x7F <= ord(char) < 0xA0]
    assert "".join(map(chr, range(32, 127))) in kept


# The config


def test_help_hides_the_key_and_names_every_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat.toml").write_text("api_key = 'abcdef'")
    with pytest.raises(SystemExit):
        cli.start("chat", ["@", str(tmp_path / "chat.toml"), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "abcdef" not in shown
    for key, field in ChatConfig.model_fields.items():
        assert f"--{key.replace('_', '-')}" in shown and str(field.description) in shown
    monkeypatch.setenv("MY_KEY", "value of it")
    config = parse(ChatConfig, ["--endpoint", "http://x", "--api-key", "${MY_KEY}"], "chat")
    assert config.api_key.get_secret_value() == "value of it" and "value of it" not in repr(config)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--endpoint 127.0.0.1:8101", "--endpoint 127.0.0.1:8101 is not a URL; write http://127.0.0.1:8101$"),
        ("--endpoint htp://localhost:80/v1", "write http://localhost:80/v1$"),
        ("--endpoint http://x --capacity 5", "capacity can't be chosen for a server"),
        ("--api-key x", "api_key is for a server"),
        ("--no-instruct --system x", "system needs a chat template"),
    ],
)
def test_contradictions_are_refused(arguments: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(ChatConfig, arguments.split(), "chat")
