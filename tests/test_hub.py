"""Models and data sets by name, from a small server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lacuna.model import read_model_config
from lacuna.weights import load_params

COMMIT = "c0ffee" * 6 + "c0de"
TOKEN = "hf_a_token_of_ours"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(12)
]
KEPT_AT_A_TIME = 10 * 2**20  # bytes, by the hub's library
LARGE = bytes(range(251)) * 100_000

# What the client reads of its environment it reads when imported, so each is a process of its own.
CLIENT = """
import json, sys, time
from pathlib import Path

from lacuna.checkpoint import resolve_model, settled
from lacuna.config import DataSource, ModelKeys, PretrainConfig, UserError
from lacuna.documents import read_rows
from lacuna.shards import blocks, find_shards
from lacuna.streaming import StreamedData
from lacuna.tokenizer import load_tokenizer

time.sleep = lambda seconds: None  # the hub's library waits between its attempts
answers, sys.stdout = sys.stdout, sys.stderr

def answer(value):
    print(json.dumps(value), file=answers)

for wish in sys.argv[1:]:
    kind, name, *split = wish.split()
    try:
        if kind == "data":
            answer([row for _, row in read_rows(DataSource(path=name, split=split[0]))])
        elif kind == "stream":
            found, revision = find_shards(DataSource(path=name, split=split[0]), Path(split[1]), "")
            rows = [row for shard in found for _, _, block in blocks((shard,), 1e9, 0, 0) for _, row in block]
            answer([revision, rows])
        elif kind == "rows":
            data = [{"path": name, "streaming": True}]
            config = PretrainConfig(model_name="m", run_name="r", steps=9, sequence_length=64, data=data)
            stream = StreamedData(config, load_tokenizer(Path(split[0])), json.loads(split[1]))
            rows, first = [], max(stream.starts)
            for row in range(first, first + 9):
                rows.append(stream.batch(row, 1).token.tolist())
                place = stream.place(row + 1) if row < first + 5 else place
            answer([rows, place])
        elif kind == "settled":
            answer(settled(ModelKeys(model_name=name)).model_name)
        else:
            answer(str(resolve_model(name, with_weights=kind == "model")))
    except UserError as error:
        answer(f"error: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Repositories as `files[kind/owner/name][path]`; `gated` maps some to the status that a stranger gets.

    `cuts` holds how many bytes of a file the next answers send before the line drops, `asked` every request.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]], gated: dict[str, int], cuts: dict[str, list[int]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.gated, self.cuts = files, gated, cuts
        self.asked: list[str] = []
        self.commit = COMMIT

    @property
    def endpoint(self) -> str:
        return f"http://localhost:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """Repository facts, file trees, small files, and safetensors by way of a storage host, as on the hub."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path):
            self.repository(*match.groups())
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file((match[1] or "models/") + match[2], match[3])
        elif match := re.fullmatch(r"/storage/(\w+/[^/]+/[^/]+)/(.+)", path):
            self.stored(match[1], match[2])
        else:
            self.send(404)

    do_HEAD = do_GET

    def repository(self, repository: str, what: str | None, revision: str | None, folder: str | None) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            self.send(404, X_Error_Code="RepoNotFound")
        elif folder:
            self.send(404, X_Error_Code="EntryNotFound")
        elif what == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                for path, content in files.items()
            ]
            self.send(200, json.dumps(entries).encode(), Content_Type="application/json")
        else:
            sha = revision if revision and len(revision) == len(COMMIT) else self.hub.commit
            facts = {"id": repository.partition("/")[2], "sha": sha, "siblings": []}
            self.send(200, json.dumps(facts).encode(), Content_Type="application/json")

    def file(self, repository: str, path: str) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            self.send(404, X_Error_Code="RepoNotFound")
        elif repository in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(self.hub.gated[repository], X_Error_Code="GatedRepo")
        elif path not in files:
            self.send(404, X_Error_Code="EntryNotFound")
        elif path.endswith(".safetensors"):
            place = f"http://127.0.0.1:{self.hub.server_port}/storage/{repository}/{path}"
            etag, size = f'"{digest(files[path])}"', str(len(files[path]))
            self.send(302, Location=place, X_Linked_Etag=etag, X_Linked_Size=size)
        else:
            self.send(200, files[path], self.cut(repository, path), ETag=f'"{digest(files[path])}"')

    def stored(self, repository: str, path: str) -> None:
        content = self.hub.files[repository][path]
        first = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        span = {"Content_Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
        self.send(206 if first else 200, content[first:], self.cut(repository, path), **span)

    def cut(self, repository: str, path: str) -> int | None:
        cuts = self.hub.cuts.get(f"{repository}/{path}")
        return cuts.pop(0) if cuts and self.command == "GET" else None

    def send(self, status: int, content: bytes = b"", cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X_Repo_Commit": COMMIT, "Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        self.close_connection = cut is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def tokenizer_files() -> dict[str, bytes]:
    """A tokenizer of the chats' characters, small enough for the reference model's vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["user: assistant: 0123456789 + ?"] + [json.dumps(chat) for chat in CHATS], trainer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    wanted = {name: (REFERENCE / "qwen3" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    wanted |= tokenizer_files()
    others = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/config.json")
    chats = {"train.jsonl": json_lines(CHATS[:8]), "test.jsonl": json_lines(CHATS[8:])}
    files = {
        "models/acme/tiny": wanted | dict.fromkeys(others, b"not wanted"),
        "models/acme/bare": wanted,
        "models/acme/pickled": tokenizer_files() | {"config.json": b"{}", "pytorch_model.bin": b"", "a/b.bin": b""},
        "models/acme/adapter": {
            "adapter_config.json": b'{"base_model_name_or_path": "acme/tiny"}',
            "adapter_model.bin": b"",
        },
        "models/acme/flaky": {"config.json": b"{}", "model.safetensors": LARGE},
        "models/acme/broken": wanted,
        "models/acme/gated": wanted,
        "datasets/acme/chats": chats,
        "datasets/acme/texts": {
            f"train-0000{part}-of-00003.jsonl": json_lines([{"text": f"{n} + {part} {'?' * n}"} for n in range(40)])
            for part in range(3)
        },
        "datasets/acme/gated": chats,
        "datasets/acme/broken": {"train.jsonl": json_lines(CHATS * 20)},
    }
    half = len(wanted["model.safetensors"]) // 2
    cuts = {
        "models/acme/flaky/model.safetensors": [len(LARGE) // 2],
        "models/acme/broken/model.safetensors": [half] + [0] * 5,
        "datasets/acme/broken/train.jsonl": [1000] + [0] * 30,
    }
    with Hub(files, {"models/acme/gated": 401, "datasets/acme/gated": 403}, cuts) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """An endpoint that refuses every connection."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://localhost:{bound.getsockname()[1]}"


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """That of a client with an empty cache and no account."""
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*_proxy", name, re.I)}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu", **more}


class Fetched(NamedTuple):
    """What a client got for each wish: a directory, rows, or a line that begins with error; and what it showed."""

    home: Path
    answers: dict[str, Any]
    shown: str


def fetch(endpoint: str, home: Path, *wishes: str, **more: str) -> Fetched:
    """Run a client at a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command, variables = [sys.executable, "-c", CLIENT, *wishes], environment(endpoint, home, **more)
    with TemporaryFile("w+") as output:
        with subprocess.Popen(command, env=variables, stdout=output, stderr=theirs) as client:
            os.close(theirs)
            shown = b""
            with suppress(OSError):  # so a terminal ends
                while part := os.read(ours, 2**16):
                    shown += part
            os.close(ours)
        assert client.returncode == 0, shown.decode()
        output.seek(0)
        return Fetched(home, dict(zip(wishes, map(json.loads, output), strict=True)), shown.decode())


def sft(endpoint: str, home: Path, model_name: str) -> subprocess.CompletedProcess[str]:
    """Run the console script, which shows a row of the chats."""
    names = ["--model-name", model_name, "--data.0.path", "acme/chats", "--sequence-length", "64", "--show", "1"]
    command = [str(Path(sys.executable).with_name("sft")), *names]
    return subprocess.run(command, env=environment(endpoint, home), capture_output=True, text=True)


@pytest.fixture(scope="module")
def first(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """All that a client with an empty cache asks for at first."""
    models = [f"model acme/{name}" for name in ("tiny", "flaky", "broken", "gated", "absent", "pickled", "adapter")]
    splits = ("chats test", "chats valid", "gated train", "broken train", "absent train")
    data = [f"data acme/{split}" for split in splits]
    home = tmp_path_factory.mktemp("home")
    wishes = (*models, *data, "tokenizer acme/bare", "model ./no/such/place", *NAMED, *streams(home))
    return fetch(hub.endpoint, home, *wishes)


NAMED = ("settled acme/tiny", "settled acme/tiny@v2", f"settled acme/tiny@{COMMIT}", "model acme/tiny@v2")


def streams(home: Path) -> list[str]:
    """What a client asks for that streams, with the folder that it keeps files in."""
    names = ("chats test", "chats valid", "gated train")
    return [f"stream acme/{name} {home / f'streamed_{number}'}" for number, name in enumerate(names)]


def test_a_model_by_name_is_the_local_one(first: Fetched) -> None:
    mesh, local = mesh_of(1, 1, 1), REFERENCE / "qwen3"
    config, directory = read_model_config(local), Path(first.answers["model acme/tiny"])
    assert read_model_config(directory) == config
    params = load_params(directory, config, mesh), load_params(local, config, mesh)
    for fetched, given in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(fetched, given)


def test_only_what_is_read_is_fetched(first: Fetched) -> None:
    files = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(first.answers["tokenizer acme/bare"])) == files
    assert set(os.listdir(first.answers["model acme/tiny"])) == files | {"model.safetensors"}


def test_a_revision_is_asked_for_by_name_and_the_commit_that_was_read_is_kept(first: Fetched, hub: Hub) -> None:
    assert [first.answers[wish] for wish in NAMED[:3]] == [f"acme/tiny@{COMMIT}"] * 3
    assert Path(first.answers["model acme/tiny@v2"]).name == COMMIT
    assert "GET /api/models/acme/tiny/revision/v2" in hub.asked


def test_a_terminal_shows_how_many_bytes_there_are_to_come(first: Fetched) -> None:
    assert f"{len(LARGE) / 1e6:.1f}MB" in first.shown


def test_a_split_of_a_data_set_by_name_is_its_rows(first: Fetched) -> None:
    assert first.answers["data acme/chats test"] == CHATS[8:]


def test_a_dropped_connection_is_resumed_where_it_broke(first: Fetched, hub: Hub) -> None:
    assert Path(first.answers["model acme/flaky"], "model.safetensors").read_bytes() == LARGE
    stored = [line for line in hub.asked if line.startswith("GET /storage/models/acme/flaky/")]
    assert [line.partition("bytes=")[2] for line in stored] == ["", f"{KEPT_AT_A_TIME}-"]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("model acme/absent", ["model_name 'acme/absent'", "no such directory", "no such model on the hub"]),
        ("model ./no/such/place", ["model_name './no/such/place'", "no such directory", "Qwen/Qwen2.5-0.5B"]),
        ("model acme/gated", ["model_name 'acme/gated'", "accept its terms", "`hf auth login`"]),
        ("model acme/broken", ["model_name 'acme/broken'", "download failed", "peer closed", "the same command"]),
        ("model acme/pickled", ["model_name 'acme/pickled'", "pickled weights are never read; convert them"]),
        (
            "model acme/adapter",
            ["model_name 'acme/adapter'", "adapter_config.json is there, but no adapter_model"],
        ),
        ("data acme/absent train", ["data path 'acme/absent'", "no such file", "doesn't exist", "`hf auth login`"]),
        ("data acme/chats valid", ["data path 'acme/chats'", "valid", "['train', 'test']; set split to one"]),
        ("data acme/gated train", ["data path 'acme/gated'", "gated", "accept its terms", "`hf auth login`"]),
        ("data acme/broken train", ["data path 'acme/broken'", "peer closed", "the same command"]),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_a_line(first: Fetched, wish: str, words: list[str]) -> None:
    message = first.answers[wish]
    assert message.startswith("error: ") and "\n" not in message
    assert [part for part in words if part not in message] == []


def test_a_later_run_fetches_what_was_broken_off_and_what_is_now_allowed(first: Fetched, hub: Hub) -> None:
    hub.cuts.clear()
    wishes = ("model acme/broken", "model acme/gated", "data acme/broken train", "data acme/gated train")
    later = fetch(hub.endpoint, first.home, *wishes, HF_TOKEN=TOKEN).answers
    for wish in wishes[:2]:
        files = {path.name: path.read_bytes() for path in Path(later[wish]).iterdir()}
        assert files == hub.files["models/acme/broken"]
    assert later["data acme/broken train"] == CHATS * 20
    assert later["data acme/gated train"] == CHATS[:8]


def test_a_streamed_split_is_its_rows_at_the_revision_that_is_named(first: Fetched, hub: Hub) -> None:
    chats, valid, gated = streams(first.home)
    assert first.answers[chats] == [COMMIT, CHATS[8:]]
    assert "train" in first.answers[valid] and "error" in first.answers[gated]
    fetched = [each for each in hub.asked if "chats/resolve" in each and "GET" in each]
    assert any(f"/resolve/{COMMIT}/test.jsonl" in each for each in fetched)
    (copy,) = (first.home / "streamed_0").glob("*.jsonl")
    assert copy.read_bytes() == json_lines(CHATS[8:])


def test_a_streamed_data_set_stays_at_the_revision_of_its_first_start(hub: Hub, tmp_path: Path) -> None:
    def started(saved: dict[str, Any], cache: str) -> tuple[list[Any], dict[str, Any]]:
        wish = f"rows acme/texts {REFERENCE.parents[1] / 'configs' / 'tiny'} {json.dumps(saved, separators=(',', ':'))}"
        hub.asked.clear()
        home, kept = tmp_path / "home", str(tmp_path / cache)
        return fetch(hub.endpoint, home, wish, XDG_CACHE_HOME=kept).answers[wish]

    try:
        rows, place = started({}, "first")
        assert place["revisions"] == [COMMIT] and place["row"] == 5
        hub.commit = "d0" * 20
        again, later = started(place, "other")
        assert again[:4] == rows[5:] and later["revisions"] == [COMMIT]
        asked = [each for each in hub.asked if "/resolve/" in each and ".jsonl" in each]
        assert asked and all(f"/resolve/{COMMIT}/" in each for each in asked)
    finally:
        hub.commit = COMMIT


def test_offline_the_cache_and_the_files_kept_of_streams_are_enough(first: Fetched, hub: Hub, tmp_path: Path) -> None:
    kept, (chats, *_) = ("model acme/tiny", "tokenizer acme/bare", "data acme/chats test"), streams(first.home)
    lost = {
        "model acme/bare": "error: model_name 'acme/bare': no such directory, not complete in the hub's cache, and ",
        "model acme/new": "error: model_name 'acme/new': no such directory, not complete in the hub's cache, and ",
        "data acme/new train": "error: data path 'acme/new': no such file, and on the hub: Couldn't reach ",
    }
    shutil.copytree(first.home / "streamed_0", tmp_path / "lost")
    next((tmp_path / "lost").glob("*.jsonl")).unlink()
    gone = f"stream acme/chats test {tmp_path / 'lost'}"
    before = len(hub.asked)
    found = fetch(hub.endpoint, first.home, *kept, *lost, chats, gone, HF_HUB_OFFLINE="1").answers
    assert len(hub.asked) == before
    assert [found[wish] for wish in (*kept, chats)] == [first.answers[wish] for wish in (*kept, chats)]
    assert "hf://datasets/acme/chats@" in found[gone] and "can't be fetched" in found[gone]
    for wish, beginning in lost.items():
        assert found[wish].startswith(beginning)
        assert re.search("offline", found[wish], re.IGNORECASE) and "\n" not in found[wish]


def test_the_command_takes_model_and_data_by_name(hub: Hub, tmp_path: Path) -> None:
    shown = sft(hub.endpoint, tmp_path, "acme/tiny")
    assert shown.returncode == 0, shown.stderr
    assert "It is 14." in shown.stdout and "It is 16." not in shown.stdout


def test_the_command_refuses_an_unknown_model_when_the_hub_is_down(first: Fetched, nowhere: str) -> None:
    refused = sft(nowhere, first.home, "acme/other")
    assert refused.returncode == 2
    assert re.fullmatch("error: model_name 'acme/other': .*Connection refused.*\n", refused.stderr), refused.stderr
