"""Files, good and broken, to rows and documents, against plain statements of what each should hold."""

import csv
import errno
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from lacuna import documents
from lacuna.config import DataSource, UserError
from lacuna.documents import (
    Documents,
    encode_parts,
    example_of,
    load_documents,
    plain_message,
    prepare,
    read_rows,
    seams,
    usable,
)
from lacuna.tokenizer import Tokenizer, TrainOn, chat_spans, decode, encode, encode_spans, load_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"It’s\n“{2 * n}”."}]}
    for n in range(3)
]
TABLE = [{"prompt": "3 + 4\n= ", "completion": "7,\r\n“seven”"}, {"prompt": "", "completion": "007"}]
BOM = b"\xef\xbb\xbf"


def json_lines(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def comma_separated(rows: list[dict[str, Any]], line_end: str = "\n") -> bytes:
    with io.StringIO(newline="") as text:
        table = csv.DictWriter(text, list(rows[0]), lineterminator=line_end)
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    with io.BytesIO() as file:
        datasets.Dataset.from_list(rows).to_parquet(file)
        return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The `datasets` library with a cache of its own, and no way out of this machine."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    yield
    assert not asked


def write(directory: Path, name: str, content: bytes) -> DataSource:
    (directory / name).write_bytes(content)
    return DataSource(path=str(directory / name))


def load(source: DataSource, tokenizer: Tokenizer, cache: Path, skip_bad: bool = False, **changes: Any) -> Documents:
    return load_documents(source, tokenizer, changes.get("train_on", "assistant"), skip_bad, cache)


def texts(loaded: Documents, tokenizer: Tokenizer) -> list[str]:
    edges = zip(loaded.start[:-1], loaded.start[1:], strict=True)
    return [decode(tokenizer, loaded.token[start:stop]) for start, stop in edges]


# Files to rows


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("plain.jsonl", json_lines(CHATS), CHATS),
        ("no_last_line_end.jsonl", json_lines(CHATS).rstrip(), CHATS),
        ("bom.jsonl", BOM + json_lines(CHATS), CHATS),
        ("windows.jsonl", BOM + json_lines(CHATS).replace(b"\n", b"\r\n"), CHATS),
        ("blank_lines.jsonl", b"\n \r\n" + json_lines(CHATS).replace(b"\n", b"\n\n\t\n"), CHATS),
        ("CAPITALS.JSONL", json_lines(CHATS), CHATS),
        ("list.json", json.dumps(CHATS, indent=2).encode(), CHATS),
        ("bom.json", BOM + json.dumps(CHATS).encode(), CHATS),
        ("table.csv", comma_separated(TABLE), TABLE),
        ("windows.csv", BOM + comma_separated(TABLE, "\r\n"), TABLE),
        ("text.txt", "Two\n\nlines…\n".encode(), [{"text": "Two\n\nlines…\n"}]),
        ("bom.txt", BOM + b"One\r\nline", [{"text": "One\r\nline"}]),
        ("table.parquet", parquet(TABLE), TABLE),
        ("chats.parquet", parquet(CHATS), CHATS),
    ],
)
def test_every_kind_of_file_is_read_as_it_is(
    tmp_path: Path, no_network: None, name: str, content: bytes, rows: list[Any]
) -> None:
    assert [row for _, row in read_rows(write(tmp_path, name, content))] == rows


def test_a_glob_reads_its_files_in_order_and_a_file_may_be_named_like_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "[1].jsonl"):
        write(tmp_path, name, json_lines([{"text": name}]))
    (tmp_path / "c.jsonl").mkdir()
    found = read_rows(DataSource(path=str(tmp_path / "?.jsonl")))
    assert [(origin, row) for origin, row in found] == [
        (f"{tmp_path / name} line 1", {"text": name}) for name in ("a.jsonl", "b.jsonl")
    ]
    assert [row for _, row in read_rows(DataSource(path=str(tmp_path / "[1].jsonl")))] == [{"text": "[1].jsonl"}]


def test_parquet_tables_are_read_as_they_are_and_images_left_alone(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pictures = pyarrow.array([{"bytes": None, "path": "/no/such/file"}] * 2, pyarrow.struct(
        [("bytes", pyarrow.binary()), ("path", pyarrow.string())]
    ))  # fmt: skip
    kinds = {"text": {"_type": "Value", "dtype": "string"}, "picture": {"_type": "Image"}}
    table = pyarrow.table({"text": ["one", "two"], "picture": pictures})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    pyarrow.parquet.write_table(table, tmp_path / "pictures.parquet")
    found = [row for _, row in read_rows(DataSource(path=str(tmp_path / "pictures.parquet")))]
    assert found == [{"text": "one"}, {"text": "two"}]


def test_a_parquet_table_in_the_place_of_another_of_its_size_and_time_is_read(tmp_path: Path) -> None:
    path, found = tmp_path / "table.parquet", []
    for text in ("one", "two"):
        path.write_bytes(parquet([{"text": text}]))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found += [(path.stat().st_size, row) for _, row in read_rows(DataSource(path=str(path)))]
    assert found == [(found[0][0], {"text": "one"}), (found[0][0], {"text": "two"})]


GOOD = json_lines(CHATS[:1])
HALF = rb'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "3"}]}'


def chat(*messages: Any) -> bytes:
    return json_lines([{"messages": messages}])


USER, ANSWER = {"role": "user", "content": "3?"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Count."}
BAD = {
    "broken_json.jsonl": (GOOD + b'{"messages": [}\n' + GOOD, "line 2: not JSON in UTF-8: Expecting .* column 15"),
    "cut_off.jsonl": (GOOD + GOOD[:-9], "line 2: not JSON in UTF-8: "),
    "nested.jsonl": (GOOD + b"[" * 10**5 + b"\n", "line 2: not JSON in UTF-8: "),
    "list_line.jsonl": (b"[1, 2]\n" + GOOD, r"line 1: it is \[1, 2\], not an object such as \{\"messages\""),
    "number.jsonl": (b"7\n" + GOOD, "line 1: it is 7, not an object"),
    "null.jsonl": (b"\n\nnull\n" + GOOD, "line 3: it is null, not an object"),
    "not_utf8.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', "line 2: not JSON in UTF-8: .* byte 0xe9 in position 13"),
    "empty.jsonl": (b"", "empty.jsonl: it holds no rows; fill it"),
    "blank.jsonl": (b"\n  \r\n\n", "blank.jsonl: it holds no rows"),
    "no_role.jsonl": (GOOD + chat({"content": "3?"}, ANSWER), "line 2: message 1: role None is unknown; write one of"),
    "bad_role.jsonl": (chat(USER, {"role": "gpt", "content": "3"}), "line 1: message 2: role 'gpt' is unknown"),
    "content.jsonl": (chat(USER, ANSWER | {"content": 3}), r"line 1: message 2 \(assistant\): content is int"),
    "no_answer.jsonl": (chat(USER), "line 1: no assistant message"),
    "no_messages.jsonl": (chat(), r"line 1: messages is \[\], not a list of messages"),
    "semicolons.csv": (b"prompt;completion\n1;2\n", "line 1: columns are separated by ';', not by commas; write"),
    "tabs.csv": (b"prompt\tcompletion\n1\t2\n", r"line 1: columns are separated by '\\t', not by commas; write"),
    "pretty.json": (b'{\n', "pretty.json line 1: not JSON in UTF-8: a value of several lines; write it in one"),
    "list.jsonl": (json.dumps(CHATS).encode(), "list.jsonl line 1: it is .*, not an object such as"),
    "wrapped.json": (json.dumps({"version": 1, "data": CHATS}).encode(), "the rows lie under the key 'data'; write"),
    "empty_answer.jsonl": (GOOD + chat(USER, ANSWER | {"content": " "}, USER, ANSWER), "line 2: an answer is empty"),
    "empty_completion.jsonl": (b'{"prompt": "3?", "completion": ""}', "line 1: an answer is empty, so nothing to"),
    "ambiguous.jsonl": (
        b'{"conversations": [], "instruction": "3?", "output": "3"}',
        "conversations, and instruction with output; choose by messages_column or prompt_column",
    ),
    "variable.jsonl": (
        json_lines([CHATS[0] | {"chat_template_kwargs": {"enable_thinkng": False}}]),
        "chat_template_kwargs: the chat template reads no variable enable_thinkng; those it reads: ",
    ),
    "not_messages.jsonl": (b'{"messages": "Hi"}', "line 1: messages is 'Hi', not a list"),
    "surrogate.jsonl": (GOOD + HALF, r"line 2: U\+D83D is half a character"),
    "surrogate_text.jsonl": (rb'{"text": "ab\ud83d"}', r"line 1: text holds '\\ud83d' at character 3, half a"),
    "two_systems.jsonl": (chat(SYSTEM, SYSTEM, USER, ANSWER), "line 1: 2 system messages; join them into one"),
    "columns.jsonl": (b'{"question": "3?", "answer": "3"}', "line 1: .*columns question, answer: wanted are messages"),
    "half_pair.jsonl": (b'{"prompt": "3?", "completion": null}', "line 1: .*columns prompt, completion: wanted"),
    "no_column.jsonl": (b"{}", r"line 1: .*columns \(none\)"),
    "text.jsonl": (b'{"text": 7}', "line 1: text is int, not a string"),
    "prompt.jsonl": (b'{"prompt": ["3?"], "completion": "3"}', "line 1: message 1 is str, not an object with role"),
    "broken.json": (b'[{"text":\n "a"},\n {]', "broken.json: not JSON in UTF-8: .* line 3 column 3"),
    "object.json": (b'{"messages": []}', r"object.json line 1: messages is \[\], not a list"),
    "numbers.json": (b'[{"text": "a"}, 7]', "numbers.json row 2: it is 7, not an object"),
    "empty.json": (b"[]", "empty.json: it holds no rows"),
    "no_value.json": (b"", "no_value.json: it holds no rows"),
    "not_utf8.json": (b'[\n"\xff"]', "not_utf8.json: not JSON in UTF-8: .* byte 0xff in position 3"),
    "empty.txt": (b"", "empty.txt: it holds no rows"),
    "blank.txt": (BOM + b"\n \n", "blank.txt: it holds no rows"),
    "not_utf8.txt": (b"One\nTwo \xff", "not_utf8.txt: .* byte 0xff in position 8: .*; save the file as UTF-8"),
    "empty.csv": (b"", "empty.csv: it holds no rows"),
    "header.csv": (b"text\n", "header.csv: it holds no rows"),
    "short.csv": (b"prompt,completion\n1,2\n3\n", "short.csv line 3: it has not one value for each of 2 columns"),
    "long.csv": (b"prompt,completion\n1,2,3\n4,5\n", "long.csv line 2: it has not one value for each of 2 columns"),
    "quote.csv": (b'text\na\n"b"c\nd\n', "quote.csv line 3: broken CSV: .*; what follows it is not read"),
    "open.csv": (b'text\na\n"b\nc\n', "open.csv line 4: broken CSV: unexpected end of data"),
    "not_utf8.csv": (b"text\na\nb\xff\n", r"not_utf8.csv line 3: text holds '\\udcff' at character 2"),
    "columns.csv": (b"question\na\n", "columns.csv line 2: .*columns question: wanted are messages"),
    "empty.parquet": (b"", "empty.parquet: not readable as parquet: .* 0 bytes"),
    "broken.parquet": (b"PAR1 and so on", "broken.parquet: not readable as parquet: "),
    "cut_off.parquet": (parquet(TABLE)[:-20], "cut_off.parquet: not readable as parquet: "),
    "columns.parquet": (parquet([{"number": 7}]), "columns.parquet row 1: .*columns number: wanted are messages"),
}  # fmt: skip


BAD_FILES = {  # of which no row alone is wrong
    "empty.jsonl", "blank.jsonl", "semicolons.csv", "tabs.csv", "pretty.json", "list.jsonl", "wrapped.json",
    "broken.json", "empty.json", "no_value.json", "not_utf8.json", "empty.txt", "blank.txt", "not_utf8.txt",
    "empty.csv", "header.csv", "empty.parquet", "broken.parquet", "cut_off.parquet",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_refused_with_file_and_line_or_left_out_and_shown(
    tmp_path: Path, tokenizer: Tokenizer, no_network: None, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    content, reason = BAD[name]
    source = write(tmp_path, name, content)
    with pytest.raises(UserError, match=reason) as refusal:
        load(source, tokenizer, tmp_path / "cache")
    assert str(refusal.value).startswith(str(tmp_path))
    assert ("--on-bad-data skip" in str(refusal.value)) == (name not in BAD_FILES)
    assert "\n" not in str(refusal.value)
    facts = load(source, tokenizer, tmp_path / "cache", skip_bad=True).facts
    assert facts["bad"] == 1 and [str(refusal.value)[: len(facts["bad_examples"][0])]] == facts["bad_examples"]
    assert capfd.readouterr() == ("", "")


def test_the_first_few_bad_rows_are_shown_and_all_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [b"7" if number % 2 else GOOD.rstrip() for number in range(40)]
    loaded = load(write(tmp_path, "a.jsonl", b"\n".join(lines)), tokenizer, tmp_path, skip_bad=True)
    assert (loaded.facts["rows"], loaded.facts["bad"], len(loaded.start) - 1) == (40, 20, 20)
    shown = [origin.partition(": ")[0].rpartition(" ")[2] for origin in loaded.facts["bad_examples"]]
    assert shown == ["2", "4", "6", "8", "10"]


def test_a_line_of_fifty_megabytes_is_skipped_without_being_held_in_memory(tmp_path: Path) -> None:
    long = b'{"text": "' + b"a" * 50 * 2**20 + b'"}\n'
    source = write(tmp_path, "long.jsonl", GOOD + long + GOOD + long.rstrip())
    del long
    tracemalloc.start()
    (_, first), (origin, reason), (_, third), (last, _) = read_rows(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first == third == CHATS[0]
    assert (origin, last) == (f"{source.path} line 2", f"{source.path} line 4")
    assert str(reason) == "it is longer than 16 MiB; split it"
    assert peak < 60 * 2**20


@pytest.mark.parametrize(
    ("path", "split", "reason"),
    [
        ("{}", "train", r"is a directory; name its files, as .*/\*\.jsonl"),
        ("{}/absent.jsonl", "train", "absent.jsonl': no such file; paths start from /"),
        ("{}/*.parquet", "train", r"\*\.parquet': no such file"),
        ("absent.csv", "train", "absent.csv': no such file"),
        (
            "{}/notes.xml",
            "train",
            "notes.xml: files of this kind are not read; .jsonl, .ndjson, .json, .txt, .csv, .parquet, .arrow are, and",
        ),
        ("{}/rows.jsonl", "test", "split 'test': local files have only one split, train"),
        ("{}/rows.jsonl", "train[:95%", r"split 'train\[:95%': local files .* train\[:95%\]"),
        ("{}/rows.jsonl", "train[5]", "split"),
    ],
)
def test_what_is_no_data_is_refused_even_if_bad_rows_are_skipped(
    tmp_path: Path, tokenizer: Tokenizer, path: str, split: str, reason: str
) -> None:
    write(tmp_path, "rows.jsonl", json_lines(CHATS))
    write(tmp_path, "notes.xml", b"<a/>")
    with pytest.raises(UserError, match=reason):
        load(DataSource(path=path.format(tmp_path), split=split), tokenizer, tmp_path / "cache", skip_bad=True)


def test_a_row_nested_too_deeply_for_its_use_is_a_bad_row() -> None:
    def use(_: str, row: dict[str, Any]) -> str:
        return json.dumps(row["value"])

    deep: list[Any] = []
    for _ in range(99_999):
        deep = [deep]
    rows, bad = [("a line 1", {"value": deep}), ("a line 2", {"value": 2})], list[str]()
    assert list(usable(rows, use, True, bad)) == ["2"] and bad == ["a line 1: it is nested too deeply"]
    with pytest.raises(UserError, match="^a line 1: it is nested too deeply "):
        list(usable(rows, use, False, bad))
    while deep:  # as Python, too, would take it apart by recursion
        deep = deep.pop()


def test_a_template_without_end_stops_the_run_and_is_no_bad_row(tmp_path: Path) -> None:
    template = "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"
    (tmp_path / "endless.jinja").write_text(template)
    endless = load_tokenizer(TINY, str(tmp_path / "endless.jinja"))
    with pytest.raises(UserError, match="^the chat template loops or writes without end"):
        load(write(tmp_path, "a.jsonl", GOOD), endless, tmp_path, skip_bad=True)


def test_a_refusal_that_is_not_of_a_row_is_not_left_out_with_bad_rows(tmp_path: Path) -> None:
    bare = replace(load_tokenizer(TINY), template=None)
    with pytest.raises(UserError, match="^[^:]*: no chat template"):
        load(write(tmp_path, "a.jsonl", GOOD), bare, tmp_path, skip_bad=True)


def test_the_name_of_a_data_set_may_have_dots_and_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def answer(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options))
        if not arguments[1]:
            raise ValueError(
                "Config name is missing.\nPlease pick one of the available configs: ['a', 'b']\nExample of usage:\n…"
            )
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    source = DataSource(path="acme/Chats-2.5:a", split="test[:5]")
    assert list(read_rows(source)) == [("acme/Chats-2.5:a test[:5] row 1", {"text": "one"})]
    assert asked == [("acme/Chats-2.5", "a", {"split": "test[:5]"})]
    with pytest.raises(
        UserError, match=r"'acme/Chats-2.5': .* configs: \['a', 'b'\]; write it as acme/Chats-2.5:CONFIG"
    ):
        list(read_rows(DataSource(path="acme/Chats-2.5")))


# Rows to tokens


def learned(row: dict[str, Any], tokenizer: Tokenizer, train_on: TrainOn = "assistant", **source: Any) -> list[str]:
    """The text of a row and those parts of it that are learned."""
    made = prepare(row, DataSource(path="unused", **source), tokenizer, train_on)
    return [made.text, *(made.text[start:end] for start, end in made.spans)]


def test_each_kind_of_row_is_learned_as_the_config_says(tokenizer: Tokenizer) -> None:
    source, pair = DataSource(path="unused", prompt_format="text"), {"prompt": "3 + 4 = ", "completion": "7"}
    end = (tokenizer.eos_id,)
    assert prepare(pair, source, tokenizer, "assistant")[:6] == ("3 + 4 = 7", [(8, 9)], (), end, True, True)
    assert prepare(pair, source, tokenizer, "all")[:6] == ("3 + 4 = 7", [(0, 9)], (), end, True, True)
    assert prepare({"text": "a b"}, source, tokenizer, "assistant")[:6] == ("a b", [(0, 3)], (), end, False, True)
    assert prepare({"text": "a<|im_end|>"}, source, tokenizer, "all").after == ()
    for train_on in ("assistant", "all", "last"):
        spans = chat_spans(tokenizer, CHATS[0]["messages"], None, train_on)
        assert prepare(CHATS[0], source, tokenizer, train_on)[:6] == (*spans, (), (), True, True)
    prompt, completion = CHATS[0]["messages"][:1], CHATS[0]["messages"][1:]
    both = prepare({"prompt": prompt, "completion": completion}, source, tokenizer, "assistant")
    assert both == prepare(CHATS[0], source, tokenizer, "assistant")
    renamed = source.model_copy(update={"prompt_column": "question", "completion_column": "answer"})
    row = {"question": "3 + 4 = ", "answer": "7", "messages": None, "text": "not this"}
    assert prepare(row, renamed, tokenizer, "assistant").text == "3 + 4 = 7"
    both_kinds = {"prompt": "not this", "completion": "nor this", **CHATS[0]}
    assert (
        prepare(both_kinds, source, tokenizer, "all").text
        == chat_spans(tokenizer, CHATS[0]["messages"], None, "all")[0]
    )


CHAT = "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
QUESTION, ANSWER = {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "3 + 4?", "completion": "7"},
        {"prompt": [QUESTION], "completion": "7"},
        {"prompt": [QUESTION], "completion": ANSWER},
        {"messages": [QUESTION], "completion": "7"},
        {"messages": json.dumps([QUESTION, ANSWER]), "tools": "", "text": ""},
        {
            "messages": [
                QUESTION | {"content": [{"type": "text", "text": "3 + "}, {"type": "text", "text": "4?"}]},
                ANSWER,
            ]
        },
        {"conversations": [{"from": "human", "value": "3 + 4?"}, {"from": "gpt", "value": "7"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"instruction": "3 + 4?", "input": "", "output": "7"},
        {"messages": [QUESTION, ANSWER | {"tool_calls": [], "function_call": None}], "chat_template_kwargs": {}},
    ],
)
def test_every_form_of_a_chat_is_the_same_chat_for_training_and_for_asking(
    tokenizer: Tokenizer, row: dict[str, Any]
) -> None:
    assert learned(row, tokenizer) == [CHAT, "7<|im_end|>"]
    example = example_of(row, DataSource(path="unused"), tokenizer)
    assert (example.messages, example.reference, example.is_chat) == ([QUESTION], "7", True)
    assert not [each for each in example.counted if each.startswith("unused")]


def test_other_formats_keep_their_input_and_their_system_message(tokenizer: Tokenizer) -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief.", "id": 7}
    text, answer = learned(row, tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n2 and 3<|im_end|>")
    assert learned(row, tokenizer, prompt_column="instruction", completion_column="output") == [text, answer]
    example = example_of(row, DataSource(path="unused"), tokenizer)
    assert example.counted == ("prompts_as_chats", "alpaca", "unused id")
    assert learned(row | {"text": "x"}, tokenizer)[0] == "x"  # a column that the source names comes first
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert plain_message(called)["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_completion_is_counted_as_unused_only_where_it_is(tokenizer: Tokenizer) -> None:
    def unused(row: dict[str, Any]) -> list[str]:
        return [each for each in example_of(row, DataSource(path="unused"), tokenizer).counted if "unused" in each]

    assert unused({"messages": [QUESTION], "completion": [ANSWER]}) == []
    for column in ("messages", "prompt"):
        assert unused({column: [QUESTION, ANSWER], "completion": "8"}) == ["unused completion"]
    with pytest.raises(ValueError, match="messages is 'Hello', not a list of messages"):
        unused({"messages": "Hello", "completion": [ANSWER]})


def test_a_prompt_is_a_chat_or_a_text_as_the_key_says_or_its_own_tokens(tokenizer: Tokenizer) -> None:
    pair = {"prompt": "3 + 4?", "completion": "7"}
    assert learned(pair, tokenizer, prompt_format="text") == ["3 + 4?7", "7"]
    rendered = {"prompt": CHAT[: CHAT.index("7")], "completion": "7<|im_end|>"}
    assert learned(rendered, tokenizer) == [CHAT.rstrip(), "7<|im_end|>"]
    assert learned(rendered, tokenizer, prompt_format="chat")[0].startswith("<|im_start|>user\n<|im_start|>user")
    plain = replace(tokenizer, template=None)
    assert learned(pair, plain) == ["3 + 4?7", "7"]
    with pytest.raises(ValueError, match="completion is int, not a string; write it in quotes"):
        learned(pair | {"completion": 7}, tokenizer)


def test_all_of_a_completion_is_learned_where_a_token_would_straddle_its_beginning(tokenizer: Tokenizer) -> None:
    source = DataSource(path="unused", prompt_format="text")
    rows = [{"prompt": "Ben has ", "completion": "seven"}, {"prompt": "Ben has", "completion": " seven"}]
    made = [prepare(row, source, tokenizer, "assistant") for row in rows]
    assert [encoded.straddling_count for encoded in encode_spans(tokenizer, [each[:2] for each in made])] == [1, 0]
    for (_, encoded), expected in zip(encode_parts(iter(made), tokenizer), ("seven", " seven"), strict=True):
        assert decode(tokenizer, encoded.token[encoded.supervised]) == expected + "<|im_end|>"
        assert decode(tokenizer, encoded.token) == "Ben has seven<|im_end|>"
        assert encoded.straddling_count == 0


def test_an_arrow_table_adds_no_nulls_and_other_files_keep_theirs(tmp_path: Path) -> None:
    calls = [[{"name": "f", "arguments": {"city": "Rome"}}], [{"name": "g", "arguments": {"number": 9}}]]
    rows = [{"messages": [{"role": "assistant", "tool_calls": call}], "tools": None} for call in calls]
    found = [row for _, row in read_rows(write(tmp_path, "rows.parquet", parquet(rows)))]
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    written = {"messages": [{"role": "user", "content": None}]}
    assert [row for _, row in read_rows(write(tmp_path, "rows.jsonl", json_lines([written])))] == [written]


def compressed_by_arrow(content: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.ndjson", json_lines(CHATS)),
        ("rows.json", json_lines(CHATS)),
        ("rows.jsonl.gz", gzip.compress(json_lines(CHATS))),
        ("rows.JSON.GZ", gzip.compress(json.dumps(CHATS).encode())),
        ("rows.jsonl.zst", compressed_by_arrow(json_lines(CHATS))),
        ("rows.csv.gz", gzip.compress(comma_separated([{"messages": json.dumps(row["messages"])} for row in CHATS]))),
    ],
)
def test_files_as_they_are_found_are_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, name, content)
    loaded = load(DataSource(path=f"~/{name}"), tokenizer, tmp_path / "cache")
    expected = load(write(tmp_path, "plain.jsonl", json_lines(CHATS)), tokenizer, tmp_path / "cache")
    assert texts(loaded, tokenizer) == texts(expected, tokenizer)
    assert loaded.facts["counted"] == {"chats": 3}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_compressed_file_that_is_cut_short_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content = json_lines([{"text": f"{n} {n * n}"} for n in range(2000)])
    whole = gzip.compress(content) if name.endswith("gz") else compressed_by_arrow(content)
    *_, (origin, error) = read_rows(write(tmp_path, name, whole[: len(whole) // 2]))
    assert origin.endswith(name) and isinstance(error, ValueError)


def test_a_folder_of_save_to_disk_is_read_or_its_splits_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(CHATS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    for path in (tmp_path / "one", tmp_path / "several" / "train"):
        assert [row for _, row in read_rows(DataSource(path=str(path)))] == CHATS
    with pytest.raises(UserError, match="several' is a directory; name one of its splits, as .*several/train"):
        list(read_rows(DataSource(path=str(tmp_path / "several"))))


def test_a_slice_takes_rows_whether_they_are_good_or_bad(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [json.dumps({"messages": []} if n < 3 else {"text": f"Ben has {n}"}).encode() for n in range(10)]
    source = write(tmp_path, "rows.jsonl", b"\n".join(lines))
    found = []
    for split in ("train[:70%]", "train[70%:]"):
        loaded = load(source.model_copy(update={"split": split}), tokenizer, tmp_path / "cache", skip_bad=True)
        found.append([text.removesuffix("<|im_end|>")[-1] for text in texts(loaded, tokenizer)])
        assert loaded.facts["rows"] == 10 and loaded.facts["outside"] == 7 - len(found[-1])
    assert found == [["3", "4", "5", "6"], ["7", "8", "9"]]


def altered(directory: Path, settings: dict[str, str], **model: Any) -> Tokenizer:
    """The tiny tokenizer with other parts."""
    directory.mkdir()
    whole = json.loads((TINY / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(whole | model))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


def template(*pieces: dict[str, Any]) -> dict[str, Any]:
    special_tokens = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in SPECIAL.items()}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special_tokens}


SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1}
CONTENT = {"Sequence": {"id": "A", "type_id": 0}}
END, BEGIN = ({"SpecialToken": {"id": name, "type_id": 0}} for name in SPECIAL)


@pytest.mark.parametrize(
    ("post_processor", "begin"), [(None, []), (template(BEGIN, CONTENT), [1]), (template(CONTENT, END), [])]
)
def test_a_text_begins_with_bos_where_the_tokenizer_writes_it_and_ends_with_a_learned_eos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, post_processor: dict[str, Any] | None, begin: list[int]
) -> None:
    monkeypatch.setattr(documents, "PART_CHARACTERS", 8)
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    tokenizer = altered(tmp_path / "tokenizer", settings, post_processor=post_processor)
    text = "Ben has 3.\nAnn has 4.\nBoth have 7."
    assert len(list(seams(text, tokenizer))) == 2
    rows = [{"text": text}, {"prompt": text[:3], "completion": text[3:]}]
    loaded = load(write(tmp_path, "rows.jsonl", json_lines(rows)), tokenizer, tmp_path)
    expected = [*begin, *encode(tokenizer, text, add_special_tokens=False), 0]
    size = len(expected)
    assert loaded.start.tolist() == [0, size, 2 * size]
    assert loaded.token.tolist() == expected * 2
    assert loaded.supervised[:size].tolist() == [False] * len(begin) + [True] * (size - len(begin))
    assert decode(tokenizer, loaded.token[size:][loaded.supervised[size:]]) == f"{text[3:]}<|endoftext|>"
    assert loaded.is_prompted.tolist() == [False, True]


def test_a_text_that_begins_with_bos_is_given_no_second_one(tmp_path: Path) -> None:
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = altered(tmp_path / "other", settings, post_processor=template(BEGIN, CONTENT))
    source = DataSource(path="unused")
    assert prepare({"text": "a"}, source, tokenizer, "all").before == (tokenizer.bos_id,)
    assert prepare({"text": "<|im_start|>a"}, source, tokenizer, "all").before == ()


def test_a_document_ends_with_its_last_learned_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [*CHATS[0]["messages"], {"role": "user", "content": "Thanks"}]
    rows = [{"messages": turns}, {"text": ""}, {"prompt": "Ben", "completion": "s"}]
    source = write(tmp_path, "rows.jsonl", json_lines(rows)).model_copy(update={"prompt_format": "text"})
    loaded = load(source, tokenizer, tmp_path)
    first, *others = texts(loaded, tokenizer)
    assert first.endswith("It’s\n“0”.<|im_end|>") and others == ["<|im_end|>", "Bens<|im_end|>"]
    assert loaded.supervised[loaded.start[1:] - 1].all()
    assert "straddling" not in loaded.facts["counted"]


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One for which every line is a seam, and one that puts a space before what it encodes."""
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return [tokenizer, altered(tmp_path_factory.mktemp("altered") / "spaced", {}, pre_tokenizer=spaced)]


@pytest.mark.parametrize("which", [0, 1])
@given(text=st.lists(st.text("ab é\n\t’中1.-", max_size=30), min_size=1, max_size=12).map("\n".join))
def test_a_text_in_parts_has_the_tokens_of_the_whole(tokenizers: list[Tokenizer], which: int, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART_CHARACTERS", 8)
        patch.setattr(documents, "SEAM_CHARACTERS", 24)
        edges = [0, *seams(text, tokenizers[which]), len(text)]
    pairs = zip(edges[:-1], edges[1:], strict=True)
    made = [encode(tokenizers[which], text[start:stop], add_special_tokens=False) for start, stop in pairs]
    assert np.concatenate(made).tolist() == encode(tokenizers[which], text, add_special_tokens=False).tolist()


def test_long_texts_without_seams_are_encoded_few_at_a_time(tokenizer: Tokenizer) -> None:
    taken = list[int]()

    def parts() -> Iterator[documents.Prepared]:
        for size in (10**6, 10**6, 10**6, *[10] * 200):
            taken.append(size)
            yield documents.Prepared("x " * (size // 2), [])

    batches = [[len(part.text) for part in batch] for batch in documents.part_batches(parts())]
    assert batches == [[10**6] * 3, [10] * 64, [10] * 64, [10] * 64, [10] * 8]
    taken.clear()
    next(documents.part_batches(parts()))
    assert len(taken) == 3


def test_a_long_text_is_one_document_although_it_is_encoded_in_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = (TINY / "pretrain.jsonl").read_text().replace("\\n", "\n")
    assert len(list(seams(text, tokenizer))) > 4
    loaded = load(write(tmp_path, "long.txt", text.encode()), tokenizer, tmp_path)
    expected = [*encode(tokenizer, text, add_special_tokens=False), tokenizer.eos_id]
    assert loaded.token.tolist() == expected and loaded.supervised.all()
    assert loaded.start.tolist() == [0, len(expected)] and not loaded.is_prompted.any()


# The cache


@pytest.mark.parametrize("cut", ["0%", "1%", "33%", "50%", "95%", "100%", "0", "7", "36", "-5", "-5%", "99"])
def test_two_slices_at_one_place_are_disjoint_and_complete(tmp_path: Path, tokenizer: Tokenizer, cut: str) -> None:
    rows = [{"text": f"Row {number}."} for number in range(37)]
    path = write(tmp_path, "rows.jsonl", json_lines(rows)).path
    splits = ("train", f"train[:{cut}]", f"train[{cut}:]")
    whole, first, second = (load(DataSource(path=path, split=split), tokenizer, tmp_path) for split in splits)
    assert texts(whole, tokenizer) == [f"Row {number}.<|im_end|>" for number in range(37)]
    assert texts(first, tokenizer) + texts(second, tokenizer) == texts(whole, tokenizer)
    assert len(first.is_prompted) == len(first.start) - 1
    wanted = round(37 * int(cut[:-1]) / 100) if cut.endswith("%") else int(cut)
    assert len(first.start) - 1 == len(rows[:wanted])


def test_a_middle_slice_is_those_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, "rows.jsonl", json_lines([{"text": f"{number}"} for number in range(10)])).path
    loaded = load(DataSource(path=path, split="train[2:4]"), tokenizer, tmp_path)
    assert texts(loaded, tokenizer) == ["2<|im_end|>", "3<|im_end|>"]
    assert len(load(DataSource(path=path, split="train[4:2]"), tokenizer, tmp_path).start) == 1


def encoded(cache: Path) -> set[str]:
    return {path.name for path in (cache / "documents").iterdir()}


def test_the_same_data_are_encoded_once_wherever_the_files_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cache = tmp_path / "cache"
    first = load(write(tmp_path, "rows.jsonl", json_lines(CHATS)), tokenizer, cache)
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere", "rows.jsonl", json_lines(CHATS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "encode_source", None)
        second = load(moved, load_tokenizer(TINY), cache)
    assert (first.facts["from_cache"], second.facts["from_cache"]) == (0, 3)
    for ours, theirs in zip(first[:-1], second[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(encoded(cache)) == 1


@pytest.mark.parametrize("name", ["token", "supervised", "index", "facts.json"])
@pytest.mark.parametrize("damage", ["zeros", "cut off", "flipped", "missing"])
def test_a_damaged_cache_is_named_and_made_anew(
    name: str, damage: str, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, "rows.jsonl", json_lines([*CHATS, {"prompt": "3 + 4 = ", "completion": "7"}]))
    whole = load(source, tokenizer, tmp_path)
    (path,) = tmp_path.glob(f"documents/*/{name}")
    content, middle = path.read_bytes(), path.stat().st_size // 2
    changed = {"zeros": bytes(middle) + content[middle:], "cut off": content[:middle]}
    changed["flipped"] = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.unlink()
    if damage != "missing":
        path.write_bytes(changed[damage])
    assert capsys.readouterr().err == ""
    again = load(source, tokenizer, tmp_path)
    assert str(path.parent) in (said := capsys.readouterr().err) and "damaged" in said and name in said + "facts.json"
    assert again.facts == whole.facts and path.read_bytes() == content
    for one, other in zip(whole[:4], again[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    assert load(source, tokenizer, tmp_path).facts["from_cache"] == 4 and capsys.readouterr().err == ""


def test_a_file_is_hashed_again_only_if_it_may_have_changed_or_that_is_asked(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, hashed, usual = write(tmp_path, "rows.jsonl", json_lines(CHATS)), list[str](), documents.file_hash
    monkeypatch.setattr(documents, "file_hash", lambda path: hashed.append(path.name) or usual(path))

    def hashed_now(verify: bool = False) -> set[str]:
        hashed.clear()
        documents.load_documents(source, tokenizer, "assistant", False, tmp_path / "cache", verify)
        return set(hashed)

    code, kept = {"tokenizer.json", "documents.py", "tokenizer.py", "sandbox.py"}, {"token", "supervised", "index"}
    assert hashed_now() >= {"rows.jsonl", *kept}
    assert hashed_now() >= {"rows.jsonl", *kept}  # written just now, so another change might have the same time
    monkeypatch.setattr(documents, "TICK_SECONDS", -1.0)
    assert hashed_now() >= {"rows.jsonl", *kept}
    assert hashed_now() == set()
    assert hashed_now(verify=True) == {"rows.jsonl", *code, *kept}
    path = Path(source.path)
    os.utime(path, (10**9, 10**9))
    assert hashed_now() == {"rows.jsonl"} and hashed_now() == set()
    path.write_bytes(path.read_bytes().replace(b"7", b"8"))
    os.utime(path, (10**9, 10**9))  # as the change was hidden
    assert hashed_now() >= {"rows.jsonl"}


def test_everything_the_tokens_depend_on_has_its_own_place_in_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cache = tmp_path / "cache"
    source = write(tmp_path, "rows.jsonl", json_lines(CHATS))
    files = {name: (TINY / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}

    def tokenizer_with(name: str = "", before: str = "", after: str = "", **options: Any) -> Tokenizer:
        directory = tmp_path / "tokenizer"
        directory.mkdir(exist_ok=True)
        for file, content in files.items():
            assert before in content or file != name
            (directory / file).write_text(content.replace(before, after) if file == name else content)
        return load_tokenizer(directory, **options)

    load(source, tokenizer_with(), cache)
    load(source, tokenizer, cache)
    assert len(encoded(cache)) == 1
    load(source, tokenizer_with("tokenizer.json", '"lstrip": false', '"lstrip": true'), cache)
    load(source, tokenizer_with("tokenizer_config.json", "message.content ~", "message.content | trim ~"), cache)
    load(
        source,
        tokenizer_with("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"'),
        cache,
    )
    load(source, tokenizer_with(template_date="2025-01-01"), cache)
    load(source, tokenizer, cache, train_on="last")
    load(source, tokenizer, cache, skip_bad=True)
    load(source.model_copy(update={"tools_column": "functions"}), tokenizer, cache)
    load(write(tmp_path, "other_name.jsonl", json_lines(CHATS)), tokenizer, cache)
    load(write(tmp_path, "rows.jsonl", json_lines(CHATS[:2])), tokenizer, cache)
    assert len(encoded(cache)) == 10
    for update in ({"weight": 2.0}, {"split": "train[:1]"}):
        load(source.model_copy(update=update), tokenizer, cache)
    assert len(encoded(cache)) == 10


KILLED = """
import os, signal, sys
from pathlib import Path
from lacuna import documents
from lacuna.config import DataSource
from lacuna.apps.show import coloured
from lacuna.tokenizer import load_tokenizer

whole = documents.encode_parts
def half(parts, tokenizer):
    yield next(whole(parts, tokenizer))
    os.kill(os.getpid(), signal.SIGKILL)
documents.encode_parts = half
path, directory, cache = sys.argv[1:]
documents.load_documents(DataSource(path=path), load_tokenizer(Path(directory)), "all", False, Path(cache))
"""


def test_a_killed_encoding_is_not_taken_for_a_whole_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, cache = write(tmp_path, "rows.jsonl", json_lines(CHATS)), tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", KILLED, source.path, TINY, cache], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = encoded(cache)
    loaded = load(source, tokenizer, cache, train_on="all")
    assert len(loaded.start) == 4 and not loaded.facts["from_cache"]
    (name,) = encoded(cache) - {left}
    assert len(name) == 32 != len(left)


def test_two_processes_may_encode_the_same_at_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = write(tmp_path, "rows.jsonl", json_lines(CHATS)), tmp_path / "cache"
    encode_source, others = documents.encode_source, []

    def overtaken(*arguments: Any) -> None:
        encode_source(*arguments)
        monkeypatch.setattr(documents, "encode_source", encode_source)
        if not others:
            others.append(load(source, tokenizer, cache))

    monkeypatch.setattr(documents, "encode_source", overtaken)
    slower = load(source, tokenizer, cache)
    assert texts(slower, tokenizer) == texts(others[0], tokenizer) and len(slower.start) == 4
    assert len(encoded(cache)) == 1


def test_an_encoding_that_fails_for_another_reason_is_refused_with_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path, "rows.jsonl", json_lines(CHATS))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Permission denied; make room"):
        patch.setattr(os, "rename", refuse)
        load(source, tokenizer, tmp_path)
    assert not encoded(tmp_path)


def refuse(*_: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


# Real chats and texts


@pytest.mark.reference
@pytest.mark.parametrize("name", ["gpt2", "llama-3.2", "minimind-6400", "qwen2.5", "qwen3", "tinyllama-1.1b-chat"])
def test_a_real_text_in_parts_has_the_tokens_of_the_whole(shelf: Path, name: str) -> None:
    tokenizer = load_tokenizer(shelf / "tokenizers" / name)
    text = (shelf / "shakespeare" / "input.txt").read_text()[: 2**18]
    edges = [0, *seams(text, tokenizer), len(text)]
    assert len(edges) > 5 or name == "tinyllama-1.1b-chat"  # which puts a space before whatever it encodes
    pairs = zip(edges[:-1], edges[1:], strict=True)
    made = [encode(tokenizer, text[start:stop], add_special_tokens=False) for start, stop in pairs]
    assert np.concatenate(made).tolist() == encode(tokenizer, text, add_special_tokens=False).tolist()


@pytest.mark.reference
@pytest.mark.parametrize("name", ["llama-3.2", "minimind-6400", "qwen2.5", "qwen3"])
def test_real_chats_with_tools_load_or_are_named(shelf: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shelf / "tokenizers" / name)
    source = DataSource(path=str(shelf / "chat" / "[gr]*_tool*.jsonl"))
    facts = load(source, tokenizer, tmp_path, skip_bad=True).facts
    assert facts["rows"] == 350
    if name == "llama-3.2":
        reason = r"reason_tool_use_50.jsonl line \d+: the chat template refuses this chat: .* single tool-calls at once"
        assert facts["bad"] == 10 and re.search(reason, facts["bad_examples"][0])
        with pytest.raises(UserError, match=reason):
            load(source, tokenizer, tmp_path)
    else:
        assert not facts["bad_examples"]
