"""Streamed rows against the same order worked out by hand from what is encoded whole; places, shares and refusals."""

import errno
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, chat_run, outcome, records, text_run
from hypothesis import given, settings
from hypothesis import strategies as st

from lacuna import checkpoint, cli, distributed, shards, streaming, trainer
from lacuna.config import DataSource, EvalConfig, PretrainConfig, RowsConfig, SftConfig, UserError
from lacuna.data import Batch
from lacuna.documents import load_documents
from lacuna.shards import permuted
from lacuna.streaming import StreamedData, next_source
from lacuna.tokenizer import Tokenizer, load_tokenizer

BLOCK, WINDOW = 300, 1000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows so small that a small corpus has many, and no pause before what fails is read again."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(streaming, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(streaming, "PACKING_DOCUMENTS", 20)
    monkeypatch.setattr(streaming, "PACKING_TOKENS", 700)
    monkeypatch.setattr(streaming, "CHUNK_TOKENS", 500)
    monkeypatch.setattr(streaming, "CHUNKS_AHEAD", 2)
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0, 0))


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_a_keyed_order_has_every_number_once(count: int, key: int) -> None:
    order = [permuted(place, count, key) for place in range(count)]
    assert sorted(order) == list(range(count))
    assert count < 20 or order != [permuted(place, count, key + 1) for place in range(count)]


def text_of(number: int) -> str:
    draw = np.random.default_rng(number)
    return f"Document {number}: " + " ".join(map(str, draw.integers(0, 10**4, draw.integers(1, 40)).tolist()))


def write_lines(path: Path, numbers: range, opened: Any = open) -> Path:
    with opened(path, "wt") as file:
        for number in numbers:
            file.write(json.dumps({"text": text_of(number)}) + "\n" + "\n" * (number % 7 == 0))
    return path


def write_corpus(directory: Path, count: int = 120) -> str:
    """Two files of lines, and texts of one document each."""
    directory.mkdir(exist_ok=True)
    write_lines(directory / "a.jsonl", range(count))
    write_lines(directory / "c.ndjson", range(count, 2 * count))
    for number in range(5):
        (directory / f"b{number}.txt").write_text(text_of(10**6 + number) * 4)
    return str(directory / "*")


def text_config(*paths: str, **changes: Any) -> PretrainConfig:
    data = tuple({"path": path, "streaming": True} for path in paths)
    given: dict[str, Any] = {"model_name": "m", "run_name": "r", "data": data, "sequence_length": 64, "steps": 1}
    return PretrainConfig(**given | changes)


def stream_of(config: RowsConfig, tokenizer: Tokenizer, saved: dict[str, Any] | None = None) -> StreamedData:
    return StreamedData(config, tokenizer, saved or {})


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def order_by_hand(path: str, seed: int, epoch: int) -> list[list[int]]:
    """Numbers of the documents of an epoch as they lie in the files, window by window, from the layout of the files."""
    blocks, sizes, rows = list[list[int]](), list[int](), 0
    for file in sorted(Path(path).parent.glob("*")):
        content = file.read_bytes()
        if file.suffix == ".txt":
            blocks.append([rows])
            sizes.append(len(content))
            rows += 1
            continue
        of_file = [list[int]() for _ in range(-(-len(content) // BLOCK))]
        place = 0
        for line in content.splitlines(keepends=True):
            of_file[place // BLOCK].append(rows if line.strip() else -1)
            rows += bool(line.strip())
            place += len(line)
        blocks += of_file
        sizes += [BLOCK] * len(of_file)
    windows, held, size, begin = list[list[int]](), list[int](), 0, 0
    for place in range(len(blocks)):
        block = permuted(place, len(blocks), seed, streaming.SHUFFLE_BLOCKS, 0, epoch, 0)
        held += blocks[block]
        size += sizes[block]
        if size >= WINDOW or place == len(blocks) - 1:
            key = seed, streaming.SHUFFLE_WINDOW, 0, epoch, 0, begin
            windows.append(
                [held[each] for each in np.random.default_rng(key).permutation(len(held)) if held[each] >= 0]
            )
            held, size, begin = [], 0, place + 1
    return windows


@pytest.mark.parametrize("seed", [0, 5])
def test_streamed_texts_are_those_of_the_cache_in_the_same_order(
    tmp_path: Path, tokenizer: Tokenizer, seed: int
) -> None:
    path = write_corpus(tmp_path / "corpus")
    whole = load_documents(DataSource(path=path), tokenizer, "all", False, tmp_path / "cache")
    windows = [window for epoch in range(3) for window in order_by_hand(path, seed, epoch)]
    assert len(windows) > 30
    line = [whole.token[whole.start[each] : whole.start[each + 1]] for window in windows for each in window]
    assert len(line) == 3 * 245
    token, target, segment = (np.concatenate(columns) for columns in zip(
        *((each[:-1], each[1:], np.full(len(each) - 1, number)) for number, each in enumerate(line)), strict=True
    ))  # fmt: skip
    length, size = 64, 4
    stream = stream_of(text_config(path, seed=seed), tokenizer)
    for index in range(len(token) // (length * size)):
        batch = stream.batch(index, size)
        here = slice(index * length * size, (index + 1) * length * size)
        assert np.array_equal(batch.token.ravel(), token[here]) and np.array_equal(batch.target.ravel(), target[here])
        assert batch.weight.all()
        for row, documents in enumerate(segment[here].reshape(size, length)):
            starts = np.flatnonzero(np.diff(documents, prepend=-1))
            assert batch.segment[row].tolist() == np.cumsum(np.diff(documents, prepend=-1) > 0).tolist()
            ends = np.append(starts[1:], length)
            assert batch.position[row].tolist() == [
                place for a, b in zip(starts, ends, strict=True) for place in range(b - a)
            ]
    assert 2.5 < stream.epochs_before((index + 1) * size) <= 3


def test_the_first_document_and_that_after_a_resume_come_after_reading_one_window(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 2**14)
    path, read, usual = write_lines(tmp_path / "a.jsonl", range(1500)), list[int](), shards.rows_of_block
    monkeypatch.setattr(shards, "rows_of_block", lambda shard, number: read.append(number) or usual(shard, number))
    (source,) = stream_of(text_config(str(path)), tokenizer).sources
    assert not read and path.stat().st_size > 8 * 2**14
    documents = source.documents(streaming.SourcePlace())
    places = [next(documents).place]
    assert 0 < len(read) <= 2**14 // BLOCK + 1
    places += [next(documents).place for _ in range(400)]
    read.clear()
    again = source.documents(places[-1])
    assert (first := next(again).place) == places[-1] and first.block > 2 * (2**14 // BLOCK) and first.row > 0
    assert 0 < len(read) <= 2**14 // BLOCK + 1


def chats(path: Path, count: int) -> str:
    with path.open("w") as file:
        for number in range(count):
            asked, answer = (
                {"role": "user", "content": text_of(number)[:60]},
                {"role": "assistant", "content": f"{number}"},
            )
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    return str(path)


def chat_config(*paths: str, **changes: Any) -> SftConfig:
    data = tuple({"path": path, "streaming": True} for path in paths)
    given: dict[str, Any] = {"model_name": "m", "run_name": "r", "data": data, "sequence_length": 128, "steps": 1}
    return SftConfig(**given | changes)


def write_kinds(directory: Path) -> list[str]:
    """A source of each kind: lines, lines compressed in two files, a table in row groups, and one encoded whole."""
    import pyarrow
    import pyarrow.parquet

    directory.mkdir()
    write_lines(directory / "plain.jsonl", range(90))
    for number in range(2):
        write_lines(directory / f"{number}.jsonl.gz", range(100 + 60 * number, 160 + 60 * number), gzip.open)
    table = pyarrow.table({"text": [text_of(number) for number in range(300, 380)]})
    pyarrow.parquet.write_table(table, directory / "t.parquet", row_group_size=7)
    write_lines(directory / "whole.jsonl", range(400, 430))
    return [str(directory / name) for name in ("plain.jsonl", "*.gz", "t.parquet", "whole.jsonl")]


def mixed_config(directory: Path, make: Any = text_config, **changes: Any) -> RowsConfig:
    paths = write_kinds(directory)
    data = [
        {"path": path, "weight": weight, "streaming": "whole" not in path}
        for path, weight in zip(paths, (3.0, 0.5, 1.25, 1.0), strict=True)
    ]
    return make(data=data, **changes)


@pytest.mark.parametrize("kind", ["texts", "chats", "unpacked", "mixed texts", "mixed chats"])
def test_a_stream_goes_on_from_the_place_of_any_batch(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    size, count = 3, 60
    if kind == "texts":
        config: RowsConfig = text_config(write_corpus(tmp_path / "corpus", 20))
    elif "mixed" in kind:
        make = chat_config if "chats" in kind else text_config
        config = mixed_config(tmp_path / "kinds", make, sequence_length=300 if "chats" in kind else 64)
    else:
        config = chat_config(chats(tmp_path / "chats.jsonl", 70), packing=kind == "chats")
    whole = stream_of(config, tokenizer)
    expected, places, facts = [], [], []
    for index in range(count):
        expected.append(whole.batch(index, size))
        places.append((whole.place((index + 1) * size), whole.epochs_before((index + 1) * size)))
        facts.append(Counter(whole.facts))
    assert "mixed" in kind or places[-1][1] > 1
    for index in range(0, count - 4, 7):
        place = json.loads(json.dumps(places[index][0]))
        again = stream_of(config, tokenizer, place)
        for later in range(index + 1, index + 4):
            assert equal(again.batch(later, size), expected[later])
            assert (again.place((later + 1) * size), again.epochs_before((later + 1) * size)) == places[later]
            assert again.facts == facts[later]
    assert equal(again.batch(0, size), expected[0])  # as a message shows it, out of order
    assert equal(again.batch(count - 1, size), expected[-1])
    assert not any(equal(one, other) for one, other in zip(expected, expected[1:], strict=False))


@pytest.mark.parametrize("length", [64, 1000])
def test_each_epoch_of_chats_has_each_once_and_whole(tmp_path: Path, tokenizer: Tokenizer, length: int) -> None:
    stream = stream_of(chat_config(chats(tmp_path / "chats.jsonl", 45), sequence_length=length), tokenizer)
    seen, row = list[str](), 0
    while len(seen) < 3 * 45:
        batch = stream.batch(row, 1)
        row += 1
        for number in range(1, batch.segment.max() + 1):
            here = batch.segment[0] == number
            answer = tokenizer.backend.decode(batch.target[0][here & (batch.weight[0] > 0)].tolist())
            seen.append(answer.strip())
    epochs = [Counter(seen[first : first + 45]) for first in (0, 45, 90)]
    assert epochs == [Counter(str(number) for number in range(45))] * 3
    assert seen[:45] != seen[45:90] and seen[:45] != sorted(seen[:45], key=int)


@pytest.mark.reference
def test_real_chats_fill_their_rows_in_windows(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PACKING_DOCUMENTS", 4096)
    monkeypatch.setattr(streaming, "PACKING_TOKENS", 2**25)
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 2**26)
    config = chat_config(str(shelf / "chat" / "gpteacher_codegen.jsonl"), sequence_length=2048)
    stream, row, filled = stream_of(config, load_tokenizer(shelf / "tokenizers" / "qwen2.5")), 0, list[float]()
    while stream.epochs_before(row) < 0.9:  # one window of 4,096 documents
        filled.append(float((stream.batch(row, 1).segment > 0).mean()))
        row += 1
    assert stream.facts["documents"] == 4096 and np.mean(filled) > 0.98


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 20), sizes), min_size=1, max_size=6), st.sampled_from([16, 10**6]))
def test_what_a_source_gave_differs_from_its_share_by_less_than_a_piece(
    sources: list[tuple[int, list[int]]], length: int
) -> None:
    weights, documents = zip(*sources, strict=True)
    taken, place, room = [0] * len(weights), [0] * len(weights), length
    left = [each[0] for each in documents]
    longest = min(max(map(max, documents)), length)
    for _ in range(200):
        offered = [min(each, room) for each in left]
        source = next_source(taken, weights, offered)
        taken[source] += offered[source]
        left[source] -= offered[source]
        room = room - offered[source] or length
        if not left[source]:
            place[source] += 1
            left[source] = documents[source][place[source] % len(documents[source])]
        for weight, count in zip(weights, taken, strict=True):
            assert abs(count * sum(weights) - weight * sum(taken)) < longest * sum(weights)


@pytest.mark.parametrize("make", [text_config, chat_config])
def test_sources_are_mixed_by_their_share_of_the_tokens(tmp_path: Path, tokenizer: Tokenizer, make: Any) -> None:
    draw, weights = np.random.default_rng(0), np.array([3, 0.5, 1.25, 1])
    for letter in "abcd":
        lines = [json.dumps({"text": letter * int(draw.integers(1, 90))}) for _ in range(30)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    data = [
        {"path": str(tmp_path / f"{letter}.jsonl"), "weight": weight, "streaming": letter != "d"}
        for letter, weight in zip("abcd", weights, strict=True)
    ]
    stream, taken = stream_of(make(data=data, sequence_length=64), tokenizer), np.zeros(4)
    for index in range(200):
        batch = stream.batch(index, 1)
        for number in range(1, batch.segment.max() + 1):
            (letter,) = set(tokenizer.backend.decode(batch.token[0][batch.segment[0] == number].tolist()))
            taken["abcd".index(letter)] += np.count_nonzero(batch.segment[0] == number)
        if make is text_config:  # chats lie in windows in any order
            assert np.abs(taken - weights / weights.sum() * taken.sum()).max() < 64
    given = np.array([place[-1] for place in stream.place(200)["places"]])
    assert np.abs(given - weights / weights.sum() * given.sum()).max() < 64 and given.min() > 300


@pytest.mark.parametrize("make", [text_run, chat_run])
def test_a_streamed_run_that_is_resumed_is_the_uninterrupted_one(small: Path, make: Any) -> None:
    held = small / ("pretrain.jsonl" if make is text_run else "heldout.jsonl")
    data = [{"path": str(held), "streaming": True}, {"path": str(small / held.name), "weight": 0.5}]
    changes: dict[str, Any] = {
        "data": data,
        "steps": 6,
        "epochs": 1,
        "save_every": 2,
        "keep": 9,
        "sequence_length": 128,
    }
    whole, again = (make(small, run_name=name, **changes) for name in ("whole", "again"))
    cli.run(whole)
    for step in (2, 4):
        chosen = str(checkpoint.checkpoint_directory(whole.run_directory, step))
        cli.run(again.model_copy(update={"resume_from": chosen, "overwrite": False, "run_name": f"again{step}"}))
        other = again.model_copy(update={"run_name": f"again{step}"})
        assert outcome(other)[0] == outcome(whole)[0][step:] and outcome(other)[1] == outcome(whole)[1]
        facts = [json.loads((each.run_directory / "summary.json").read_text())["data"] for each in (whole, other)]
        assert facts[0] == facts[1] and facts[0]["documents"] > 20
    with held.open("a") as file:
        file.write(held.read_text().splitlines()[0])
    with pytest.raises(UserError, match=re.escape(f"{held}: its content has changed")):
        cli.run(again.model_copy(update={"resume_from": chosen, "run_name": "changed"}))
    assert all(record["packing_efficiency"] > 0.3 for record in records(whole))


def test_an_epoch_is_counted_once_and_runs_by_epochs_then_have_their_steps(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, data = [], [{"path": str(small / "pretrain.jsonl"), "streaming": True}]
    streamed = text_run(small, data=data, epochs=2, steps=0)
    with pytest.raises(UserError, match="steps is required, as nobody has counted.*--count once"):
        cli.run(streamed)
    assert not (streamed.run_directory / "config.toml").exists()
    for config in (text_run(small, count=True), streamed.model_copy(update={"count": True})):
        cli.run(config)
        said.append(
            re.search(r"([\d,]+) rows of 128 tokens an epoch of .*: set steps to (\d+)", capsys.readouterr().out)
        )
    assert said[0] and said[1]
    rows = int(said[1][1])
    assert int(said[0][1]) + 1 == rows > 40  # only whole rows, or with the one that the epoch ends in
    assert int(said[1][2]) == -(-rows // 16)
    assert not list((small.parent / "runs").glob("*/metrics.jsonl"))
    cli.run(streamed)
    found = records(streamed)
    assert len(found) == -(-2 * rows // 16) and found[-2]["epoch"] < 2 <= found[-1]["epoch"] < 2.4
    assert sum(each["tokens"] for each in found) == len(found) * 16 * 128
    with monkeypatch.context() as patch:
        patch.setattr(StreamedData, "batch", None)
        cli.run(streamed.model_copy(update={"count": True}))  # kept, so nothing is read
    assert f"{rows} rows of 128 tokens an epoch" in capsys.readouterr().out
    for changed in ({"seed": 1}, {"sequence_length": 64}, {"on_bad_data": "skip"}, {"run_name": "of another file"}):
        if "run_name" in changed:
            with (small / "pretrain.jsonl").open("a") as file:
                file.write('{"text": "One more."}\n')
        with pytest.raises(UserError, match="nobody has counted"):
            cli.run(streamed.model_copy(update={"run_name": "changed", **changed}))
    with pytest.raises(ValueError, match="eval_data can't be streamed"):
        text_run(small, data=data, eval_data=[{"path": "a", "streaming": True}])
    with pytest.raises(ValueError, match="can be streamed by pretrain and sft alone"):
        EvalConfig(model_name="m", data=tuple(map(DataSource.model_validate, data)))


def test_rows_of_streamed_chats_are_shown(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(chat_run(small, data=[{"path": str(small / "heldout.jsonl"), "streaming": True}], show=2))
    shown = capsys.readouterr().out
    assert "row 2" in shown and "row 3" not in shown and "⟦" in shown


# What can be wrong


@pytest.mark.parametrize(("name", "opened"), [("rows.jsonl", open), ("rows.jsonl.gz", gzip.open)])
def test_a_bad_row_is_refused_with_file_and_line_or_counted_also_when_resumed(
    tmp_path: Path, tokenizer: Tokenizer, name: str, opened: Any
) -> None:
    good = [json.dumps({"text": text_of(number)}) for number in range(40)]
    lines = [*good[:11], '{"text"', "", *good[11:30], "[1]", '{"text": 3}', *good[30:], '{"prompt": "1"}']
    with opened(tmp_path / name, "wt") as file:
        file.write("\n".join(lines))
    path, reasons = str(tmp_path / name), {12: "not JSON", 33: "not an object", 34: "not a string", 45: "nothing to"}
    with pytest.raises(UserError, match=f"{re.escape(path)} line (12|33|34|45): .*--on-bad-data skip"):
        stream_of(text_config(path), tokenizer).batch(40, 1)
    config = text_config(path, on_bad_data="skip")
    stream = stream_of(config, tokenizer)
    for index in range(200):
        stream.batch(index, 1)
        if index % 23 == 5:
            again = stream_of(config, tokenizer, json.loads(json.dumps(stream.place(index + 1))))
            again.batch(index + 1, 1)
            stream.batch(index + 1, 1)
            assert again.facts == stream.facts
            stream = again
    assert stream.facts["bad"] > 7
    epochs = int(stream.epochs_before(200))
    assert epochs >= 2 and 4 * epochs <= stream.facts["bad"] <= 4 * (epochs + 1)
    assert stream.facts["rows"] - stream.facts["bad"] == stream.facts["documents"]
    whole = stream_of(config, tokenizer)
    whole.batch(150, 1)
    for example in whole.bad_examples:
        (number,) = [line for line in reasons if example.startswith(f"{path} line {line}: ")]
        assert reasons[number] in example
    assert len(whole.bad_examples) == 5 or whole.facts["bad"] < 5


def test_what_cannot_be_read_is_tried_again_and_then_refused_with_its_place(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", range(300), gzip.open)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, after [\d,]+ bytes of what it holds: .*--resume continues"):
        stream_of(text_config(str(path)), tokenizer).batch(10**6, 1)
    lost = write_lines(tmp_path / "b.jsonl", range(40))
    stream = stream_of(text_config(str(lost)), tokenizer)
    lost.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"b\.jsonl, block \d+ of \d+: No such file"):
        stream.batch(0, 1)
    (tmp_path / "moved").rename(lost)
    expected = stream_of(text_config(str(lost)), tokenizer).batch(30, 2)
    read, failures = shards.rows_of_block, Counter[int]()

    def fails_now_and_then(shard: shards.Shard, number: int) -> shards.Rows:
        failures[number] += 1
        if failures[number] % 3:
            raise OSError("the network file system is away")
        return read(shard, number)

    monkeypatch.setattr(shards, "rows_of_block", fails_now_and_then)
    assert equal(stream_of(text_config(str(lost)), tokenizer).batch(30, 2), expected)


REFUSED = [
    ({"name": "rows.csv", "content": "text\n1\n"}, "rows.csv: files of this kind are not streamed"),
    ({"content": ""}, "rows.jsonl: it holds no rows"),
    ({"split": "train[:50%]"}, "can't be streamed, as nothing counts"),
    ({"split": "test"}, "local files have only one split"),
    ({"content": '{"prompt": "1", "completion": "2"}'}, "rows.jsonl line 1: a chat or prompt"),
    ({"content": '{"text": ""}\n' * 5}, "rows.jsonl: no token to learn from in an epoch"),
    ({"content": "\n{\n", "on_bad_data": "skip"}, "rows.jsonl: no token to learn from in an epoch; .*line 2: not JSON"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_not_streamed_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, given: dict[str, str], message: str
) -> None:
    path = tmp_path / given.get("name", "rows.jsonl")
    path.write_text(given.get("content", '{"text": "a"}\n'))
    data = [{"path": str(path), "streaming": True, "split": given.get("split", "train")}]
    with pytest.raises(UserError, match=message):
        stream_of(text_config(data=data, on_bad_data=given.get("on_bad_data", "error")), tokenizer).batch(0, 1)


def test_an_address_that_is_not_streamed_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"memory://a/\*.jsonl': no such file; an address is read by streaming = true"):
        load_documents(DataSource(path="memory://a/*.jsonl"), tokenizer, "all", False, tmp_path)


def test_any_change_of_a_file_changes_the_digest_of_its_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", range(40))
    os.utime(path, (10**9, 10**9))
    config, digests = text_config(str(tmp_path / "*.jsonl")), set[tuple[str, ...]]()
    content = path.read_bytes()
    for number, (text, second) in enumerate(
        [(content, 9), (content, 8), (b" " + content[1:], 8), (content[:-1] + b" ", 8), (content + b"\n", 8)]
    ):
        path.write_bytes(text)
        os.utime(path, (second, second))
        digests.add(stream_of(config, tokenizer).digests)
        assert stream_of(config, tokenizer).digests in digests and len(digests) == number + 1
    write_lines(tmp_path / "b.jsonl", range(2))
    assert stream_of(config, tokenizer).digests not in digests


# Files from elsewhere


def test_the_revision_of_the_first_start_is_asked_for_when_a_run_is_resumed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, usual = list[str](), streaming.find_shards

    def found(source: DataSource, directory: Path, revision: str) -> tuple[list[shards.Shard], str]:
        asked.append(revision)
        return usual(source, directory, "")[0], revision or f"newest of {len(asked)}"

    monkeypatch.setattr(streaming, "find_shards", found)
    config = text_config(str(write_lines(tmp_path / "a.jsonl", range(40))))
    stream = stream_of(config, tokenizer)
    stream.batch(0, 1)
    again = stream_of(config, tokenizer, json.loads(json.dumps(stream.place(1))))
    again.batch(1, 1)
    assert asked == ["", "newest of 1"] and again.place(2)["revisions"] == ["newest of 1"]


def test_files_of_an_address_are_fetched_one_ahead_and_few_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(8):
        write_lines(tmp_path / "one.jsonl", range(20 * number, 20 * number + 20))
        memory.pipe(f"/corpus/{number}.jsonl", (tmp_path / "one.jsonl").read_bytes())
    opened, fails, largest = fsspec.open, Counter[str](), 0

    def cut_off(address: str, mode: str) -> Any:
        fails[address] += 1
        if fails[address] == 2:
            raise OSError("no route to host")
        return opened(address, mode)

    monkeypatch.setattr(fsspec, "open", cut_off)
    config = text_config("memory://corpus/*.jsonl", shard_cache=2.1 * 20 * 130 / 1e9)
    (directory := config.cache_dir / "shards").mkdir(parents=True)
    stream, tokens = stream_of(config, tokenizer), list[int]()
    for index in range(700):
        batch = stream.batch(index, 1)
        tokens += [*batch.token[0].tolist()]
        largest = max(largest, len(list(directory.glob("*.jsonl"))))
    texts = tokenizer.backend.decode(tokens).split("Document ")
    seen = Counter(int(text.partition(":")[0]) for text in texts[1:-1] if ":" in text)
    epochs = int(stream.epochs_before(700))
    assert epochs >= 2 and set(seen) == set(range(160)) and set(seen.values()) <= {epochs, epochs + 1}
    assert 2 <= largest <= 3 and max(fails.values()) > 2
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="make room in .*shards, or lower shard_cache"):
        patch.setattr(shards, "fetch", lambda _: (_ for _ in ()).throw(full))
        stream_of(config, tokenizer).batch(2000, 1)
    memory.rm("/corpus", recursive=True)
    with pytest.raises(UserError, match="memory:///corpus/.*can't be fetched"):
        stream.batch(2000, 1)


def test_a_run_that_waits_for_a_file_has_not_hung_while_its_bytes_come(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fsspec

    memory, usual, ends = fsspec.filesystem("memory"), shards.fetch, list[str]()
    for number in range(2):
        write_lines(small / "one.jsonl", range(26 * number, 26 * number + 26))
        memory.pipe(f"/slow/{number}.jsonl", (small / "one.jsonl").read_bytes())
    for name in ("streaming.CHUNK_TOKENS", "streaming.WINDOW_BYTES", "documents.BATCH_PARTS"):
        monkeypatch.setattr(f"lacuna.{name}", 1)  # so each document comes as soon as it is here
    monkeypatch.setattr(streaming, "fetch_ahead", lambda *_: None)
    fetched, watchdogs, started = list[str](), list[distributed.Watchdog](), distributed.Watchdog
    monkeypatch.setattr(trainer, "Watchdog", lambda log: watchdogs.append(started(log)) or watchdogs[0])
    monkeypatch.setattr(trainer, "repeated", lambda _: nullcontext())
    monkeypatch.setattr(distributed, "STALL_SECONDS", 3.0)
    monkeypatch.setattr(distributed, "STALL_MEDIANS", 0)
    monkeypatch.setattr(distributed, "end_job", lambda line, _: ends.append(line))

    def slow(shard: shards.Shard) -> None:
        fetched.append(shard.name)
        if len(fetched) == 2:
            for _ in range(9000):  # until the second step waits, for which the first file has too few tokens
                if watchdogs and watchdogs[0].reported_at is not None and watchdogs[0].progress:
                    break
                time.sleep(0.01)
            part = shard.path.with_name("a.part")
            for size in range(9):
                part.write_bytes(bytes(size))
                watchdogs[0].look()
            assert not ends
            for _ in range(4):
                watchdogs[0].look()
            assert len(ends) == 1 and "no step has finished for 4 s" in ends[0]
            part.unlink()
        usual(shard)

    monkeypatch.setattr(shards, "fetch", slow)
    config = text_run(small, data=[{"path": "memory://slow/*.jsonl", "streaming": True}], steps=2)
    cli.run(config)
    assert len(fetched) == 2 and len(ends) == 1 and len(records(config)) == 2
    assert f"fetching {fetched[0]} of " in capsys.readouterr().out


READ_THREE_WINDOWS = """
import resource, sys
from pathlib import Path
from lacuna import streaming
from lacuna.config import PretrainConfig
from lacuna.tokenizer import load_tokenizer

streaming.WINDOW_BYTES = 2**24
data = [{"path": sys.argv[1], "streaming": True}]
config = PretrainConfig(model_name="m", run_name="r", steps=1, sequence_length=2048, data=data)
stream, index = streaming.StreamedData(config, load_tokenizer(Path(sys.argv[2])), {}), 0
while stream.place(index)["places"][0][2] < 128:
    stream.batch(index, 1)
    index += 1
print(index, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_the_same_for_ten_times_the_corpus(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text_of(number) * 8}) + "\n" for number in range(2000)]
    draw, part = np.random.default_rng(0), list[str]()
    while sum(map(len, part)) < 20e6:
        part += [lines[number] for number in draw.integers(0, len(lines), 1000)]
    (tmp_path / "000.jsonl").write_text("".join(part))
    peaks = []
    for count in (10, 100):
        for number in range(1, count):
            if not (path := tmp_path / f"{number:03}.jsonl").exists():
                path.write_bytes((tmp_path / "000.jsonl").read_bytes())
        command = [sys.executable, "-c", READ_THREE_WINDOWS, str(tmp_path / "*.jsonl"), str(TINY)]
        read, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(read) > 2000
        peaks.append(int(peak))
    assert abs(peaks[1] - peaks[0]) < 0.1 * peaks[0]
