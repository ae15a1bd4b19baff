"""Documents: rows of files and hub data sets, and their text encoded once and kept in the cache.

Encoded documents are memory-mapped, so a corpus may be larger than memory. They are found again by a hash of all they
depend on: the bytes of the files, the columns, the tokenizer, the chat template, and the code that encodes them.
"""

import csv
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Int
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from lacuna.config import DataSource, UserError
from lacuna.distributed import writing_to
from lacuna.metrics import content_hash, file_hash, sync, write_atomically
from lacuna.tokenizer import (
    REASONING_KEYS,
    EncodedText,
    Span,
    Tokenizer,
    TrainOn,
    chat_spans,
    check_messages,
    encode,
    encode_apart,
    encode_spans,
    end_of_text_id,
    has_bos,
    left_out_thoughts,
)

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".parquet", ".arrow")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
MAX_LINE_BYTES = 16 * 2**20
PART_CHARACTERS, SEAM_CHARACTERS = 2**15, 2**8
BATCH_PARTS = 64  # to encode at once: enough to occupy the processors, and not more, as encodings take much memory
SHOWN_BAD_ROWS = 5
TICK_SECONDS = 2.0  # of the coarsest clock of files (FAT)
TABLE_ROWS = 1000  # of an Arrow table that are read at once
CACHED = {"token": np.int32, "supervised": np.bool_, "index": np.int64}

Used = TypeVar("Used")


class BadFile(ValueError):
    """What is wrong is the whole file, not one of its rows."""


class Documents(NamedTuple):
    """The encoded documents of one source: document i is `token[start[i]:start[i + 1]]`, and so is `supervised`.

    Each ends with its last supervised token, as what follows can't change the loss. `is_prompted` documents answer a
    prompt, the others are plain text. `facts` counts rows read, bad rows, those that were in the cache, tokens that
    straddle the edge of what is supervised, the forms of rows, and what of them had no effect.
    """

    token: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    start: Int[np.ndarray, " boundary"]
    is_prompted: Bool[np.ndarray, " document"]
    facts: dict[str, Any]


class Prepared(NamedTuple):
    """A document ready for the tokenizer, or a part of a long one: its text, the supervised ranges of characters, the
    tokens that go before and, supervised, after it, where its completion begins, if it is one after a plain prompt,
    what is counted of its row, and whether prompt and completion are encoded apart."""

    text: str
    spans: list[Span]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    is_prompted: bool = True
    is_last: bool = True
    edge: int = 0
    counted: tuple[str, ...] = ()
    is_apart: bool = False


# Reading


def read_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """Each row with its origin for messages; what can't be read comes as a ValueError with the reason.

    Raises:
        UserError: no such file or data set, or a kind of file that is not read.
    """
    files = local_files(source.path)
    if not files:
        for number, row in enumerate(undecoded(hub_table(source).with_format("arrow").iter(TABLE_ROWS)), 1):
            yield f"{source.path} {source.split} row {number}", row
    for file in files:
        rows = file_rows(file, source.text_column)
        yield next(rows, (str(file), BadFile("it holds no rows; fill it, or leave it out of the path")))
        yield from rows


def usable(
    rows: Iterable[tuple[str, Any]], use: Callable[[str, dict[str, Any]], Used], skip_bad: bool, bad: list[str]
) -> Iterator[Used]:
    """What `use` makes of each row. A row that can't be used raises UserError, or is added to `bad` with the reason."""
    for origin, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                kind = BadFile if isinstance(row, list) and row and isinstance(row[0], dict) else ValueError
                raise kind(f'it is {json.dumps(row):.40}, not an object such as {{"messages": [...]}}')
            yield use(origin, row)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            if not skip_bad:
                way_out = "" if isinstance(error, BadFile) else " (or leave such rows out with --on-bad-data skip)"
                raise UserError(f"{origin}: {reason}{way_out}") from error
            bad.append(f"{origin}: {reason}")


def local_files(path: str) -> list[Path]:
    """The files that a path or glob names, sorted, or those of a folder of `save_to_disk`; none if it may name a data
    set on the hub."""
    home = Path(os.path.expanduser(path))
    if (home / "state.json").is_file():
        files = [home / each["filename"] for each in parsed((home / "state.json").read_bytes())["_data_files"]]
    elif home.is_dir():
        splits = [f"{path.rstrip('/')}/{each.parent.name}" for each in sorted(home.glob("*/state.json"))]
        raise UserError(
            f"data path {path!r} is a directory; name "
            + (f"one of its splits, as {splits[0]}" if splits else f"its files, as {path.rstrip('/')}/*.jsonl")
        )
    else:
        found = [home] if home.is_file() else sorted(glob.glob(str(home), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
    if not files and (kind_of(home) in SUFFIXES or not HUB_ID.fullmatch(path)):
        fix = "an address is read by streaming = true alone" if "://" in path else f"paths start from {Path.cwd()}"
        raise UserError(f"data path {path!r}: no such file; {fix}")
    for file in files:
        if kind_of(file) not in SUFFIXES:
            kinds = f"{', '.join(SUFFIXES)} are, and compressed as {' or '.join(COMPRESSED)}"
            raise UserError(f"{file}: files of this kind are not read; {kinds}")
    return files


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def open_file(file: Path) -> io.BufferedIOBase:
    """The bytes of a file, or those that it holds compressed."""
    if not (compression := COMPRESSED.get(file.suffix.lower())):
        return file.open("rb")
    import pyarrow

    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(file), compression)))


def file_rows(file: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, the last of them a ValueError if the file can't be read, or no further."""
    try:
        match kind_of(file):
            case ".jsonl" | ".ndjson":
                yield from jsonl_rows(file)
            case ".csv":
                yield from csv_rows(file)
            case ".txt":  # one document
                with open_file(file) as stream:
                    if (text := stream.read().decode("utf-8-sig")).strip():
                        yield str(file), {text_column: text}
            case ".json":
                with open_file(file) as stream:
                    content = stream.read()
                if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    yield from ((f"{file} row {number}", row) for number, row in enumerate(parsed(content), 1))
                else:
                    yield from jsonl_rows(file)
            case _:
                for number, row in enumerate(table_of(file), 1):
                    yield f"{file} row {number}", row
    except (ValueError, OSError) as error:
        fix = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        yield str(file), BadFile(f"{error}{fix}")


def jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file's lines; of a line that is too long, and so may not fit in memory, only the number."""
    with open_file(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                skip_line(stream, line)
            if line.strip():
                yield f"{file} line {number}", line_value(line)


def skip_line(stream: io.BufferedIOBase, read: bytes = b"-") -> int:
    """Read a line to its end, if what was `read` of it does not hold that; the number of bytes."""
    count = 0
    while read and not read.endswith(b"\n"):
        read = stream.readline(2**16)
        count += len(read)
    return count


def line_value(line: bytes) -> Any:
    """The value of a line of jsonl, or a ValueError with the reason why it has none."""
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
        if line.strip() in (b"[", b"{"):
            raise BadFile("not JSON in UTF-8: a value of several lines; write it in one, or all in a list in .json")
        return parsed(line)
    except ValueError as error:
        return error


def csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names the columns; every value is text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with (
        open_file(file) as stream,
        io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        table = csv.DictReader(lines, strict=True)
        try:
            names = table.fieldnames or [""]
            if len(names) == 1 and (separator := re.search("[;\t]", names[0])):
                raise BadFile(f"line 1: columns are separated by {separator[0]!r}, not by commas; write commas")
            for row in table:
                wrong = ValueError(f"it has not one value for each of {len(table.fieldnames or ())} columns")
                yield f"{file} line {table.line_num}", wrong if None in (*row, *row.values()) else row
        except csv.Error as error:
            reason = f"broken CSV: {error}; what follows it is not read"
            yield f"{file} line {table.reader.line_num}", ValueError(reason)


def table_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet table, or of one of Arrow as `save_to_disk` writes it, without columns of bytes, which are
    no text."""
    import pyarrow.parquet

    try:
        if kind_of(file) == ".arrow":
            with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
                yield from undecoded(batches)
            return
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from undecoded(table.iter_batches(TABLE_ROWS, columns=text_columns(table)))
    except Exception as error:  # of Arrow or Python, depending on what is broken
        raise ValueError(f"not readable as {kind_of(file)[1:]}: {error}") from error


def text_columns(table: Any) -> list[str]:
    """The columns of a parquet table without those of bytes."""
    return [field.name for field in table.schema_arrow if "binary" not in str(field.type)]


def undecoded(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of Arrow's tables as they are: what says it is an image, in a file or at an address, is not opened.
    Nulls in objects go, as there each object has the keys of all."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(each) for key, each in value.items() if each is not None}
        return [kept(each) for each in value] if isinstance(value, list) else value

    for batch in batches:
        yield from ({column: kept(value) for column, value in row.items()} for row in batch.to_pylist())


def parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from error


@lru_cache(maxsize=1)
def hub_table(source: DataSource) -> Any:
    """A split of a data set on the hub, or a slice of it; `path:config` names one of several in a repository."""
    import datasets

    quieten_hub()
    path, _, config = source.path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=source.split)
    except Exception as error:  # its HTTP and storage clients raise their own kinds
        raise hub_refusal(source, error) from error


def quieten_hub() -> None:
    """Silence what the hub's library prints: its errors are reported by us, and its progress at a terminal only."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def hub_refusal(source: DataSource, error: Exception) -> UserError:
    """Why a data set on the hub can't be had, and what to do about it."""
    import datasets.exceptions

    path = source.path.partition(":")[0]
    reason = str(error.__cause__ or error).partition("\nExample of usage")[0]
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        fix = "if it is gated, accept its terms on its page; if it is not public, log in with `hf auth login`"
    elif "Config name is missing" in reason:
        fix = f"write it as {path}:CONFIG"
    elif "Unknown split" in reason:
        fix = "set split to one of them"
    else:
        fix = "fix that, and the same command fetches what is missing"
    reason = " ".join(reason.split()).rstrip(".")
    return UserError(f"data path {source.path!r}: no such file, and on the hub: {reason}; {fix}")


def split_range(source: DataSource, count: int) -> range:
    """Which of the `count` rows of local files are in the split, as in `train[:95%]`; all of a data set on the hub,
    which is fetched as its split.

    Raises:
        UserError: the split can't be read, or is not train.
    """
    if not local_files(source.path):
        return range(count)
    if not (match := re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", source.split)):
        raise UserError(
            f"split {source.split!r}: local files have only one split, train; write train, train[:95%] or "
            "train[100:200]"
        )
    bounds = match[1] or "0%", match[2] or "100%"
    ends = [round(int(each[:-1]) * count / 100) if each.endswith("%") else int(each) for each in bounds]
    return range(count)[slice(*ends)]


# Encoding


class Example(NamedTuple):
    """A row as every command sees it: a plain text, or messages and the answer to them, if there is one: a message, or
    what a column holds. `is_chat` says whether the chat template writes them, `counted` what is said of the row at the
    start."""

    messages: list[Any]
    answer: Any
    is_chat: bool
    text: str | None
    tools: Any
    variables: dict[str, Any]
    counted: tuple[str, ...]

    @property
    def reference(self) -> Any:
        """The answer as what a model's is compared with."""
        return self.answer.get("content") if isinstance(self.answer, dict) else self.answer


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}


def example_of(row: dict[str, Any], source: DataSource, tokenizer: Tokenizer) -> Example:
    """A row as it is trained on and asked, by the columns that its source names or those of another format.

    Raises:
        ValueError: why the row can't be used.
    """
    names = "messages", "prompt", "completion", "text", "tools"
    columns = {name: getattr(source, f"{name}_column") for name in names}
    held = {name: row.get(column) for name, column in columns.items()}
    used, form = {columns["tools"], "chat_template_kwargs"}, ""
    present = {column for column, value in row.items() if value is not None}
    taken = {columns[name] for name in ("messages", "prompt", "text") if held[name] is not None}
    if not taken and {"conversations", "instruction", "output"} <= present:
        raise ValueError("conversations, and instruction with output; choose by messages_column or prompt_column")
    if taken <= {"conversations"} <= present:
        form, held["messages"] = "sharegpt", row["conversations"]
        used |= {"conversations", "system"}
    elif taken <= {"instruction", "output"} <= present:
        asked = [checked_text(row[column], column) for column in ("instruction", "input") if row.get(column)]
        form, held["prompt"], held["completion"] = "alpaca", "\n\n".join(asked), row["output"]
        used |= {"instruction", "input", "output", "system"}
    messages, tools = from_json(held["messages"]), from_json(held["tools"])
    prompt, answer, variables = held["prompt"], held["completion"], row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"chat_template_kwargs is {type(variables).__name__}, not an object of template variables")
    kind, text, is_chat = "chats", None, True
    if messages is not None:
        used.add(columns["messages"])
    elif prompt is not None and (answer is not None or held["text"] is None):
        used.add(columns["prompt"])
        messages = prompt
        if not isinstance(prompt, list):
            messages = [{"role": "user", "content": checked_text(prompt, columns["prompt"])}]
            has_format = tokenizer.template is None or tokenizer.end_of_turn.match(prompt)
            is_chat = source.prompt_format == "chat" or source.prompt_format == "auto" and not has_format
            kind = "prompts_as_chats" if is_chat else "prompts_as_text"
    elif held["text"] is not None:
        used.add(columns["text"])
        kind, text, messages, answer, is_chat = "texts", checked_text(held["text"], columns["text"]), [], None, False
    else:
        raise no_columns(row, source)
    if not isinstance(messages, list):
        check_messages(messages, None)
    if form and row.get("system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    given = [answer] if isinstance(answer, dict) else answer
    if isinstance(given, list) and any(isinstance(each, dict) for each in given):
        messages, answer = [*messages, *given], None
        used.add(columns["completion"])
    messages = [plain_message(message) for message in messages]
    if len(messages) > 1 and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        *messages, answer = messages
    elif answer is not None:
        used.add(columns["completion"])
    unused = (f"unused {column}" for column in row if column not in used and row[column] not in (None, ""))
    return Example(messages, answer, is_chat, text, tools or None, variables, (kind, *filter(None, [form]), *unused))


def no_columns(row: dict[str, Any], source: DataSource) -> ValueError:
    known = {source.messages_column, source.prompt_column, source.text_column, "conversations", "instruction"}
    for key, rows in row.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and known & rows[0].keys():
            return BadFile(f"the rows lie under the key {key!r}; write that list alone")
    return ValueError(
        f"nothing to learn from in the columns {', '.join(row) or '(none)'}: wanted are {source.messages_column}, "
        f"{source.prompt_column} with {source.completion_column}, or {source.text_column}; if yours have other names, "
        "set messages_column and the like"
    )


def from_json(value: Any) -> Any:
    """A column that may hold its list as JSON text, as in tables; nothing if the text is empty."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def plain_message(message: Any) -> Any:
    """A message with role and content: those of ShareGPT have from and value, older ones one function_call, and its
    text may be in parts."""
    if not isinstance(message, dict):
        return message
    message = dict(message)
    if "from" in message and "role" not in message:
        role, content = message.pop("from"), message.pop("value", None)
        message = {"role": SHAREGPT_ROLES.get(str(role), role), "content": content, **message}
    if call := message.pop("function_call", None):
        message["tool_calls"] = [{"type": "function", "function": call}]
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(isinstance(part, dict) and "text" in part for part in parts):
        message["content"] = "".join(checked_text(part["text"], "text") for part in parts)
    return message


def joined_contents(messages: list[Any]) -> str:
    """Messages without a chat template."""
    return "\n\n".join(str(message["content"]) for message in messages)


def prepare(row: dict[str, Any], source: DataSource, tokenizer: Tokenizer, train_on: TrainOn) -> Prepared:
    """Text and supervised ranges of a chat, prompt/completion or text row.

    Raises:
        ValueError: why the row can't be used.
    """
    example = example_of(row, source, tokenizer)
    messages, answer, counted = example.messages, example.answer, example.counted
    if answer is not None and not isinstance(answer, dict):
        answer = {"role": "assistant", "content": checked_text(answer, source.completion_column)}
    if answer is None and counted[0].startswith("prompts"):
        raise no_columns(row, source)
    messages = messages if answer is None else [*messages, answer]
    said = [each for each in messages if isinstance(each, dict) and each.get("role") == "assistant"]
    for each in said[-1:] if train_on == "last" else said:
        contents = (str(each.get(key) or "").strip() for key in ("content", "tool_calls", *REASONING_KEYS))
        if each.get("weight") != 0 and not any(contents):
            raise ValueError("an answer is empty, so nothing to learn from; fill it, or give it weight 0")
    if source.encode_apart and not counted[0].startswith("prompts_as_text"):
        raise BadFile(
            "encode_apart is for prompts with completions as text; leave it out, or set prompt_format to text"
        )
    if example.is_chat:
        text, spans = chat_spans(tokenizer, messages, example.tools, train_on, example.variables)
        return Prepared(text, spans, counted=(*counted, *["thoughts"] * left_out_thoughts(messages, text)))
    edge, text = 0, example.text
    if text is None:
        prompt = joined_contents(messages[:-1])
        edge, text = len(prompt), prompt + answer["content"]
    first = edge if train_on != "all" else 0
    start = tokenizer.backend.encode("").ids[:1] if not has_bos(tokenizer, text) else []
    before = tuple(token for token in start if token == tokenizer.bos_id)
    after = () if text.endswith(tokenizer.special_tokens["eos_token"]) else (end_of_text_id(tokenizer),)
    spans, is_prompted = [(first, len(text))], example.text is None
    return Prepared(text, spans, before, after, is_prompted, edge=edge, counted=counted, is_apart=source.encode_apart)


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, not a string; write it in quotes, or leave the row out")
    if half := re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{column} holds {half[0]!r} at character {half.start() + 1}, half a character; remove it")
    return value


def parts(document: Prepared, tokenizer: Tokenizer) -> Iterator[Prepared]:
    """A plain text in parts of bounded length that have the same tokens as the whole; all else as it is."""
    if document.is_prompted:
        yield document
        return
    text, end = document.text, len(document.text)
    for start, stop in pairwise([0, *seams(text, tokenizer), end]):
        before, after = document.before if start == 0 else (), document.after if stop == end else ()
        yield document._replace(
            text=text[start:stop], spans=[(0, stop - start)], before=before, after=after, is_last=stop == end
        )


def seams(text: str, tokenizer: Tokenizer) -> Iterator[int]:
    """Line beginnings where a long text may be cut, as what surrounds them has the same tokens in two as in one."""
    due = PART_CHARACTERS
    for line_end in re.finditer(r"\n(?=\S)", text):
        if (cut := line_end.end()) >= due:
            due = cut + PART_CHARACTERS
            first, last = max(cut - SEAM_CHARACTERS, 0), cut + SEAM_CHARACTERS
            around = text[first:cut], text[cut:last], text[first:last]
            left, right, both = (encode(tokenizer, each, add_special_tokens=False) for each in around)
            if np.array_equal(both, np.concatenate([left, right])):
                yield cut


def part_batches(parts: Iterator[Prepared]) -> Iterator[list[Prepared]]:
    """Parts that are encoded at once: fewer where they are long, as texts of tokenizers that see no seams are."""
    batch, size = list[Prepared](), 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if len(batch) == BATCH_PARTS or size >= BATCH_PARTS * PART_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_parts(parts: Iterator[Prepared], tokenizer: Tokenizer) -> Iterator[tuple[Prepared, EncodedText]]:
    """Each part with its tokens; those of an answer to a prompt up to the last that is supervised."""
    for batch in part_batches(parts):
        for part, encoded in zip(batch, encode_spans(tokenizer, [part[:2] for part in batch]), strict=True):
            if part.edge and (encoded.straddling_count or part.is_apart):
                encoded = encode_apart(tokenizer, part.text[: part.edge], part.text[part.edge :])
                encoded.supervised[:] |= part.spans[0][0] == 0
            token = np.concatenate([part.before, encoded.token, part.after], dtype=np.int32, casting="unsafe")
            supervised = np.arange(len(token)) >= len(part.before)
            if part.is_prompted:
                supervised[len(part.before) : len(token) - len(part.after)] = encoded.supervised
                length = np.max(np.flatnonzero(supervised) + 1, initial=0)
                token, supervised = token[:length], supervised[:length]
            yield part, EncodedText(token, supervised, encoded.straddling_count)


# The cache


def load_documents(
    source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, cache_dir: Path, verify: bool = False
) -> Documents:
    """The documents of a source (its slice, if it names one), encoded now or found in the cache. Files whose size and
    time are those of before are taken for the same, unless `verify` asks to hash them again.

    Raises:
        UserError: what can't be read, or a bad row (unless `skip_bad`), with file and line.
    """
    split_range(source, 0)  # refused before the rows are read
    hash_of = partial(remembered_hash, memory=cache_dir / "hashes", verify=verify)
    directory = cache_dir / "documents" / source_fingerprint(source, tokenizer, train_on, skip_bad, hash_of)
    if not (cached := intact_facts(directory, hash_of)):
        with writing_to(directory.parent, "make room, or set XDG_CACHE_HOME to a directory that has some"):
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                encode_source(source, tokenizer, train_on, skip_bad, Path(scratch))
                try:
                    os.rename(scratch, directory)
                except OSError:
                    if not directory.exists():  # else another process was faster
                        raise
    if not (facts := cached or intact_facts(directory, file_hash)):
        raise UserError(f"{directory}: what was written there can't be read again; is the disk sound?")
    token, supervised, index = (
        np.asarray(np.memmap(path, dtype, mode="r"))
        if (path := directory / name).stat().st_size
        else np.zeros(0, dtype)
        for name, dtype in CACHED.items()
    )
    row, is_prompted, stop = index.reshape(3, -1)
    rows = split_range(source, facts["rows"])
    first, last = np.searchsorted(row, (rows.start, max(rows.start, rows.stop))).tolist()
    facts |= {"from_cache": facts["rows"] * bool(cached), "outside": len(row) - (last - first)}
    start = np.append(0, stop)[first : last + 1]
    return Documents(token, supervised, start, is_prompted[first:last].astype(bool), facts)


def intact_facts(directory: Path, hash_of: Callable[[Path], str]) -> dict[str, Any] | None:
    """What was counted of encoded documents whose files are as they were written; a damaged directory is removed."""
    if not directory.exists():
        return None
    try:
        facts = json.loads((directory / "facts.json").read_text())
        damaged = [] if facts.pop("content_hash") == content_hash(facts) else ["facts.json"]
        damaged += [name for name in CACHED if hash_of(directory / name) != facts["sha256"][name]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        damaged = [f"{type(error).__name__}: {error}"]
    if not damaged:
        return facts
    print(f"WARNING: encoded again, as the cache {directory} is damaged ({', '.join(damaged)})", file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    return None


def remembered_hash(file: Path, memory: Path, verify: bool) -> str:
    """The hash of a file, kept in the directory `memory` for as long as path, size and times stay the same; `verify`
    computes it again. A file that was changed just now may be so again within one tick of its clock, so isn't kept."""
    facts, path = file.stat(), str(file.resolve())
    now = [path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    kept = memory / hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if not verify and kept.exists():
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(kept.read_text())
            if known["file"] == now:
                return str(known["sha256"])
    found = file_hash(file)
    if time.time() - max(facts.st_mtime, facts.st_ctime) > TICK_SECONDS:
        with suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps({"file": now, "sha256": found}))
    return found


def source_fingerprint(
    source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, hash_of: Callable[[Path], str]
) -> str:
    """A hash of all that the encoded documents depend on."""
    files = local_files(source.path)
    columns = source.model_dump(exclude={"path", "split", "weight", "streaming"})
    origin = [file.name for file in files] or [source.path, hub_table(source)._fingerprint]
    with progress() as line:
        hashes = [hash_of(file) for file in line.track(files, description="Hashing files")]
    encoder = encoder_digest(tokenizer, hash_of)
    return content_hash([origin, hashes, columns, encoder, train_on, skip_bad])[:32]


def encoder_digest(tokenizer: Tokenizer, hash_of: Callable[[Path], str]) -> str:
    """A hash of all that the tokens of a row depend on, besides the row and what of it is learned."""
    date = tokenizer.template.globals["strftime_now"]("%F") if tokenizer.template else ""
    sources = tokenizer.template_source, tokenizer.tool_source
    template = [*sources, tokenizer.variables, tokenizer.special_tokens, date, tokenizer.new_words]
    code = [Path(__file__).with_name(name) for name in ("documents.py", "tokenizer.py", "sandbox.py")]
    return content_hash([template, [hash_of(file) for file in [tokenizer.directory / "tokenizer.json", *code]]])


def encode_source(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, directory: Path) -> None:
    """Write token, supervised, index and facts.json from the rows of a source; index has of each document the number of
    its row, as there are bad rows between, whether it answers a prompt, and where it ends."""
    bad, row_of, counted = list[str](), list[int](), Counter[str]()
    is_prompted, stop, end, digest = list[bool](), list[int](), 0, hashlib.sha256()
    with (
        (directory / "token").open("wb") as token_file,
        (directory / "supervised").open("wb") as supervised_file,
        progress() as line,
    ):
        rows = line.track(read_rows(source), description=escape(f"Encoding {source.path}"))
        documents = usable(rows, lambda _, row: prepare(row, source, tokenizer, train_on), skip_bad, bad)

        def pieces() -> Iterator[Prepared]:
            for document in documents:
                row_of.append(len(row_of) + len(bad))
                counted.update(document.counted)
                yield from parts(document, tokenizer)

        for part, (token, supervised, straddling_count) in encode_parts(pieces(), tokenizer):
            token_file.write(token.tobytes())
            supervised_file.write(supervised.tobytes())
            digest.update(token.tobytes() + supervised.tobytes())
            counted += Counter(straddling=straddling_count)
            end += len(token)
            if part.is_last:
                stop.append(end)
                is_prompted.append(part.is_prompted)
    np.array([row_of, is_prompted, stop], np.int64).tofile(directory / "index")
    facts = {
        "rows": len(stop) + len(bad),
        "bad": len(bad),
        "bad_examples": bad[:SHOWN_BAD_ROWS],
        "counted": counted,
        "digest": digest.hexdigest(),
        "sha256": {name: file_hash(directory / name) for name in CACHED},
    }
    for name in CACHED:
        sync(directory / name)
    write_atomically(directory / "facts.json", json.dumps(facts | {"content_hash": content_hash(facts)}))


def progress() -> Progress:
    """A line that counts what was read, on a terminal only."""
    columns = "{task.description}", "{task.completed:,}", TimeElapsedColumn()
    return Progress(*columns, transient=True, disable=not sys.stdout.isatty())
