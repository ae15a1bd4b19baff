"""Data: rows of files and hub data sets, encoded once and kept in the cache, packed into rows, and made into batches.

Encoded documents are memory-mapped, so a corpus may be larger than memory. They are found again by a hash of all they
depend on: the bytes of the files, the columns, the tokenizer, the chat template, and the code that encodes them. The
rows of a run are a function of (seed, row) alone.
"""

import csv
import glob
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import DTypeLike
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.text import Text

from lacuna.config import ChatKeys, DataSource, EvalConfig, RowsConfig, UserError
from lacuna.tokenizer import (
    EncodedText,
    Span,
    Tokenizer,
    TrainOn,
    chat_spans,
    decode,
    encode,
    encode_spans,
    end_of_text_id,
)

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
MAX_LINE_BYTES = 16 * 2**20
PART_CHARACTERS, SEAM_CHARACTERS, BATCH_CHARACTERS = 2**15, 2**8, 2**20
SHOWN_BAD_ROWS = 5

Row = dict[str, Any] | ValueError
Used = TypeVar("Used")


class Documents(NamedTuple):
    """The encoded documents of one source: document i is `token[start[i]:start[i + 1]]`, and so is `supervised`.

    Each ends with its last supervised token, for what stands behind can't change the loss. `is_prompted` documents
    answer a prompt, the others are plain text. `facts` counts rows read, bad rows, and tokens that straddle the edge
    of what is supervised, and says whether all this was in the cache.
    """

    token: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    start: Int[np.ndarray, " boundary"]
    is_prompted: Bool[np.ndarray, " document"]
    facts: dict[str, Any]


class Prepared(NamedTuple):
    """A document ready for the tokenizer, or the next part of a long one: its text, the supervised ranges of
    characters, and the tokens that go before and, supervised, after it."""

    text: str
    spans: list[Span]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    is_prompted: bool = True
    is_last: bool = True


# Reading


def read_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    """Each row with its origin for messages; what can't be read comes as a ValueError with the reason.

    Raises:
        UserError: no such file or data set, or a kind of file that is not read.
    """
    files = local_files(source.path)
    if not files:
        yield from hub_rows(source)
    for file in files:
        rows = file_rows(file, source.text_column)
        yield next(rows, (str(file), ValueError("it holds no rows; fill it, or leave it out of the path")))
        yield from rows


def usable(
    rows: Iterable[tuple[str, Row]], use: Callable[[str, dict[str, Any]], Used], skip_bad: bool, bad: list[str]
) -> Iterator[Used]:
    """What `use` makes of each row; where and why another can't be used is an error, or added to `bad`."""
    for origin, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            used = use(origin, row)
        except UserError:
            raise
        except ValueError as error:
            if not skip_bad:
                raise UserError(f"{origin}: {error} (or leave such rows out with --on-bad-data skip)") from error
            bad.append(f"{origin}: {error}")
        else:
            yield used


def local_files(path: str) -> list[Path]:
    """The files that a path or glob names, sorted; none where it may name a data set on the hub."""
    if Path(path).is_dir():
        raise UserError(f"data path {path!r} is a directory; name its files, as {path.rstrip('/')}/*.jsonl")
    found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    files = [Path(name) for name in found if Path(name).is_file()]
    if not files and (Path(path).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(path)):
        raise UserError(f"data path {path!r}: no such file; paths start from {Path.cwd()}")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: files of this kind are not read; {', '.join(SUFFIXES)} are")
    return files


def file_rows(file: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    match file.suffix.lower():
        case ".jsonl":
            yield from jsonl_rows(file)
        case ".json":
            yield from json_rows(file)
        case ".csv":
            yield from csv_rows(file)
        case ".parquet":
            yield from parquet_rows(file)
        case ".txt":
            yield from text_rows(file, text_column)


def jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            if len(line) > MAX_LINE_BYTES:
                yield f"{file} line {number}", ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
            elif line.strip():
                yield f"{file} line {number}", as_row(parsed(line.rstrip(b"\r\n")))


def bounded_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines, of which too long a one is cut a byte over the limit, as it need not fit in memory."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        yield line
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(2**16)


def json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    rows = parsed(file.read_bytes())
    if isinstance(rows, list):
        for number, row in enumerate(rows, 1):
            yield f"{file} row {number}", as_row(row)
    else:
        unlisted = ValueError("it must hold one list of rows; a file with an object a line is named .jsonl")
        yield str(file), rows if isinstance(rows, ValueError) else unlisted


def text_rows(file: Path, column: str) -> Iterator[tuple[str, Row]]:
    """A text file is one document."""
    text = decoded(file.read_bytes())
    if isinstance(text, ValueError):
        yield str(file), text
    elif text.strip():
        yield str(file), {column: text}


def csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a table whose first line names the columns; every value is text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            columns = next(reader, [])
            for values in filter(None, reader):
                wrong = ValueError(f"it has {len(values)} values for {len(columns)} columns")
                row = dict(zip(columns, values, strict=False))
                yield f"{file} line {reader.line_num}", row if len(values) == len(columns) else wrong
        except csv.Error as error:
            yield f"{file} line {reader.line_num}", ValueError(f"broken CSV: {error}; what follows it is not read")


def parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        table = quiet_datasets().Dataset.from_parquet(str(file))
    except Exception as error:  # Arrow's and Python's, according to what is broken
        yield str(file), ValueError(f"not readable as parquet: {error.__cause__ or error}")
    else:
        yield from table_rows(table, str(file))


def hub_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    yield from table_rows(hub_table(source), f"{source.path} {source.split}")


def table_rows(table: Iterable[Any], origin: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(table, 1):
        yield f"{origin} row {number}", row


@lru_cache(maxsize=1)
def hub_table(source: DataSource) -> Any:
    """A data set on the hub, with the slice of its split; `path:config` names one of several in a repository."""
    datasets = quiet_datasets()
    path, _, config = source.path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=source.split)
    except Exception as error:  # its HTTP and storage clients raise kinds of their own
        reason = str(error.__cause__ or error).partition("\nExample of usage")[0]
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            mend = "if it is gated, accept its terms on its page; if it is not public, log in with `hf auth login`"
        elif "Config name is missing" in reason:
            mend = f"write it as {path}:CONFIG"
        elif "Unknown split" in reason:
            mend = "set split to one of them"
        else:
            mend = "that mended, the same command fetches what is missing"
        reason = " ".join(reason.split()).rstrip(".")
        raise UserError(f"data path {source.path!r}: no such file, and on the hub: {reason}; {mend}") from error


def quiet_datasets() -> Any:
    """The `datasets` library, with progress bars on a terminal only and errors left to us."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def parsed(content: bytes) -> Any:
    """The value of a JSON text, or a ValueError with the reason why there is none."""
    text = decoded(content)
    if isinstance(text, ValueError):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return ValueError(f"broken JSON: {error.msg} at {place_in_text(text[: error.pos])}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")


def decoded(content: bytes) -> str | ValueError:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = place_in_text(content[: error.start].decode("utf-8-sig"))
        return ValueError(f"{content[error.start : error.end]!r} at {where} is not UTF-8; save the file as UTF-8")


def place_in_text(before: str) -> str:
    """Where a text goes on after `before`; the line goes without saying where there is but one."""
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"line {line} column {column}" if line > 1 else f"column {column}"


def as_row(value: Any) -> Row:
    if isinstance(value, dict | ValueError):
        return value
    return ValueError(f'it is {json.dumps(value):.40}, not an object such as {{"messages": [...]}}')


def local_bounds(split: str) -> tuple[str, str]:
    """Where a split of local files begins and ends, as in `train[:95%]`; empty where it takes all.

    Raises:
        UserError: the split can't be read, or is another than train.
    """
    if match := re.fullmatch(r"train(\[(-?\d+%?)?:(-?\d+%?)?\])?", split):
        return match[2] or "", match[3] or ""
    raise UserError(f"split {split!r}: local files have but one, train; write train, train[:95%] or train[100:200]")


def bound(text: str, count: int) -> int | None:
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text) if text else None


# Encoding


def prepare(row: dict[str, Any], source: DataSource, tokenizer: Tokenizer, train_on: TrainOn) -> Prepared:
    """Text and supervised ranges of a chat, prompt/completion or text row.

    Raises:
        ValueError: why the row can't be used.
    """
    wanted = source.messages_column, source.prompt_column, source.completion_column, source.text_column
    messages, prompt, completion, text = (row.get(column) for column in wanted)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = prompt + completion
    if messages is not None:
        return Prepared(*chat_spans(tokenizer, messages, row.get(source.tools_column) or None, train_on))
    if prompt is not None and completion is not None:
        prompt, completion = checked_text(prompt, wanted[1]), checked_text(completion, wanted[2])
        first, text, is_prompted = 0 if train_on == "all" else len(prompt), prompt + completion, True
    elif text is not None:
        first, text, is_prompted = 0, checked_text(text, wanted[3]), False
    else:
        raise ValueError(
            f"nothing to learn from in the columns {', '.join(row) or '(none)'}: wanted are {wanted[0]}, {wanted[1]} "
            f"with {wanted[2]}, or {wanted[3]}; if yours have other names, set messages_column and the like"
        )
    end = end_of_text_id(tokenizer)
    before = tuple(token for token in tokenizer.backend.encode("").ids[:1] if token == tokenizer.bos_id)
    after = () if text.endswith(tokenizer.special_tokens["eos_token"]) else (end,)
    return Prepared(text, [(first, len(text))], before, after, is_prompted)


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(
            f"{column} holds {half!r} at character {error.start + 1}, half a character; remove it"
        ) from error
    return value


def parts(document: Prepared, tokenizer: Tokenizer) -> Iterator[Prepared]:
    """A plain text in parts of bounded length that have the same tokens as the whole; all else as it is."""
    if document.is_prompted:
        yield document
        return
    text, end = document.text, len(document.text)
    for start, stop in pairwise([0, *seams(text, tokenizer), end]):
        before, after = document.before if start == 0 else (), document.after if stop == end else ()
        yield Prepared(text[start:stop], [(0, stop - start)], before, after, is_prompted=False, is_last=stop == end)


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


def batches(parts: Iterable[Prepared]) -> Iterator[list[Prepared]]:
    """Parts to encode at once: enough to occupy the processors, and not more, as encodings take much memory."""
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def encode_parts(parts: Sequence[Prepared], tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """The tokens of each part; those of an answer to a prompt up to the last that is supervised."""
    for part, encoded in zip(parts, encode_spans(tokenizer, [(part.text, part.spans) for part in parts]), strict=True):
        framed = [part.before, encoded.token, part.after]
        token = np.concatenate(framed, dtype=np.int32, casting="unsafe")
        supervised = np.repeat([False, True], [len(part.before), len(token) - len(part.before)])
        if part.is_prompted:
            supervised[len(part.before) : len(token) - len(part.after)] = encoded.supervised
            length = np.max(np.flatnonzero(supervised) + 1, initial=0)
            token, supervised = token[:length], supervised[:length]
        yield EncodedText(token, supervised, encoded.straddling_count)


# The cache


def load_documents(
    source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, cache: Path
) -> Documents:
    """The documents of a source (its slice, if it names one), encoded now or found in the cache.

    Raises:
        UserError: what can't be read, or a bad row (unless `skip_bad`), with file and line.
    """
    bounds = local_bounds(source.split) if local_files(source.path) else ("", "")
    directory = cache / "documents" / source_fingerprint(source, tokenizer, train_on, skip_bad)
    is_cached = directory.exists()
    if not is_cached:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            encode_source(source, tokenizer, train_on, skip_bad, Path(scratch))
            try:
                os.rename(scratch, directory)
            except OSError:
                if not directory.exists():  # else another process was faster
                    raise
    start = np.fromfile(directory / "start", np.int64)
    first, last, _ = slice(*(bound(text, len(start) - 1) for text in bounds)).indices(len(start) - 1)
    last = max(first, last)
    return Documents(
        token=mapped(directory / "token", np.int32),
        supervised=mapped(directory / "supervised", np.bool_),
        start=start[first : last + 1],
        is_prompted=np.fromfile(directory / "is_prompted", np.bool_)[first:last],
        facts=json.loads((directory / "facts.json").read_text()) | {"is_cached": is_cached},
    )


def mapped(path: Path, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def source_fingerprint(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool) -> str:
    """Names all that the encoded documents depend on."""
    files = local_files(source.path)
    columns = source.model_dump(exclude={"path", "split", "weight"})
    origin = [file.name for file in files] or [source.path, hub_table(source)._fingerprint]
    date = tokenizer.template.globals["strftime_now"]("%F") if tokenizer.template else ""
    template = [tokenizer.template_source, tokenizer.special_tokens, date]
    digest = hashlib.sha256(json.dumps([origin, columns, template, train_on, skip_bad]).encode())
    code = [Path(__file__).with_name(name) for name in ("data.py", "tokenizer.py")]
    with progress() as line:
        for file in line.track([*files, tokenizer.directory / "tokenizer.json", *code], description="Hashing files"):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:32]


def encode_source(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, directory: Path) -> None:
    """Write the files token, supervised, start, is_prompted and facts.json from the rows of a source."""
    bad: list[str] = []
    start, is_prompted, end, straddling, digest = [0], [], 0, 0, hashlib.sha256()
    with (
        (directory / "token").open("wb") as token_file,
        (directory / "supervised").open("wb") as supervised_file,
        progress() as line,
    ):
        rows = line.track(read_rows(source), description=escape(f"Encoding {source.path}"))
        documents = usable(rows, lambda _, row: prepare(row, source, tokenizer, train_on), skip_bad, bad)
        for batch in batches(part for document in documents for part in parts(document, tokenizer)):
            for part, encoded in zip(batch, encode_parts(batch, tokenizer), strict=True):
                token_file.write(encoded.token.tobytes())
                supervised_file.write(encoded.supervised.tobytes())
                digest.update(encoded.token.tobytes() + encoded.supervised.tobytes())
                straddling += encoded.straddling_count
                end += len(encoded.token)
                if part.is_last:
                    start.append(end)
                    is_prompted.append(part.is_prompted)
    np.array(start, np.int64).tofile(directory / "start")
    np.array(is_prompted, np.bool_).tofile(directory / "is_prompted")
    facts = {
        "rows": len(is_prompted) + len(bad),
        "bad": len(bad),
        "bad_examples": bad[:SHOWN_BAD_ROWS],
        "straddling": straddling,
        "digest": digest.hexdigest(),
    }
    (directory / "facts.json").write_text(json.dumps(facts))


def progress() -> Progress:
    """A line that counts what goes by, on a terminal only."""
    columns = "{task.description}", "{task.completed:,}", TimeElapsedColumn()
    return Progress(*columns, transient=True, disable=not sys.stdout.isatty())


SHUFFLE_PASS, SHUFFLE_EPOCH, SHUFFLE_ROWS = 1, 2, 3
BUCKETS = 8


class Batch(NamedTuple):
    """Packed rows, NumPy arrays until they are put on the devices. `weight` is 1 where the loss counts, `segment` is
    1, 2, … a document and 0 padding, `position` restarts at 0 with each document."""

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]


class Pieces(NamedTuple):
    """Parts of documents: tokens `start` to `stop` of a source, whose loss counts from token `clear` on.

    A piece of n + 1 tokens takes n slots of a row, as each slot holds a token and its successor.
    """

    source: Int[np.ndarray, " piece"]
    start: Int[np.ndarray, " piece"]
    stop: Int[np.ndarray, " piece"]
    clear: Int[np.ndarray, " piece"]

    @property
    def slots(self) -> Int[np.ndarray, " piece"]:
        return self.stop - self.start - 1

    def take(self, which: Any) -> "Pieces":
        return Pieces(*(column[which] for column in self))


def joined_pieces(parts: Iterable[Pieces]) -> Pieces:
    return Pieces(*map(np.concatenate, zip(*parts, strict=True)))


# Documents to pieces


def whole(documents: Documents, source: int) -> tuple[Pieces, Counter[str]]:
    """Documents as they are, for rows that cut them where they end."""
    start, stop = documents.start[:-1], documents.start[1:]
    pieces = Pieces(np.full(len(start), source), start, stop, start)
    pieces = pieces.take(pieces.slots > 0)
    slots = int(pieces.slots.sum())
    return pieces, Counter(documents=len(start), tokens=slots, target_tokens=slots)


def fit(documents: Documents, source: int, length: int) -> tuple[Pieces, Counter[str]]:
    """Pieces of documents that fit rows of `length` slots, and what became of the rest.

    Too long a text is split. Too long a chat or prompt loses its left end, and the rest of an answer cut in two does
    not count; one whose last answer alone exceeds the row is dropped, as is a document without a target.
    """
    start, stop = documents.start[:-1], documents.start[1:]
    slots = stop - start - 1
    fits = (slots > 0) & (slots <= length)
    parts = [np.stack([start[fits], stop[fits], start[fits]])]
    facts = Counter(documents=len(slots), without_targets=int(np.sum(slots < 1)))
    for document in np.flatnonzero(slots > length):
        supervised = documents.supervised[start[document] : stop[document]]
        if documents.is_prompted[document] and not supervised[1:].all():
            part = cut_left(supervised, length, facts)
        else:
            first = np.arange(0, slots[document], length)
            part = np.stack([first, np.minimum(first + length, slots[document]) + 1, first])
            facts["split"] += 1
        parts.append(start[document] + part)
    supervised_count = np.count_nonzero(documents.supervised[documents.start[0] : documents.start[-1]])
    first_count = np.count_nonzero(documents.supervised[start[start < stop]])  # a first token is nobody's target
    facts["target_tokens"] = int(supervised_count - first_count - facts["targets_cut"])
    columns = np.concatenate(parts, axis=1)
    pieces = Pieces(np.full(columns.shape[1], source), *columns)
    facts["tokens"] = int(pieces.slots.sum())
    return pieces, facts


def cut_left(supervised: Bool[np.ndarray, " token"], length: int, facts: Counter[str]) -> Int[np.ndarray, "3 piece"]:
    """Start, stop and clear of a document's last `length` slots; nothing where its last answer alone is longer."""
    context = np.flatnonzero(~supervised)
    if len(supervised) - context[-1] - 1 > length:
        facts["answer_too_long"] += 1
        facts["targets_cut"] += int(np.count_nonzero(supervised[1:]))
        return np.zeros((3, 0), np.int64)
    start = len(supervised) - length - 1
    clear = context[np.searchsorted(context, start)]
    facts["prompt_cut"] += 1
    facts["targets_cut"] += int(np.count_nonzero(supervised[1:clear]))
    return np.array([[start], [len(supervised)], [clear]])


# Pieces to rows


def first_fit(lengths: Int[np.ndarray, " piece"], capacity: int) -> Int[np.ndarray, " piece"]:
    """The row of each piece, longest first: First-Fit-Decreasing (Johnson 1973), exactly.

    Pieces of one length are placed together: each row, from the left, takes as many as it has room for.
    """
    room, row_of, row_count = np.full(len(lengths), capacity), np.empty(len(lengths), np.int32), 0
    _, first, counts = np.unique(-lengths, return_index=True, return_counts=True)
    for begin, count in zip(first, counts, strict=True):
        length = lengths[begin]
        new_row_count = -(-count // (capacity // length))
        rows = np.flatnonzero(room[: row_count + new_row_count] >= length)[:count]
        fitting = room[rows] // length
        taken = np.clip(count - np.cumsum(fitting) + fitting, 0, fitting)
        room[rows] -= taken * length
        row_of[begin : begin + count] = np.repeat(rows, taken)
        row_count = max(row_count, row_of[begin + count - 1] + 1)
    return row_of


def packed(lengths: Int[np.ndarray, " piece"], capacity: int, cache: Path) -> Int[np.ndarray, " piece"]:
    """The row of each piece, packed First-Fit-Decreasing.

    The plan depends on the sorted lengths alone, and is kept in the cache by their hash: one does for all epochs.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order].astype(np.int32)
    name = hashlib.sha256(f"{capacity} ".encode() + longest_first.tobytes()).hexdigest()[:32]
    path = cache / "plans" / f"{name}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
            np.save(scratch, first_fit(longest_first, capacity))
        os.replace(scratch.name, path)
    row_of = np.empty(len(lengths), np.int32)
    row_of[order] = np.load(path, allow_pickle=False)
    return row_of


@dataclass(frozen=True)
class Mixture:
    """The order in which epochs take the pieces of several sources, numbered one source after the other."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    is_shuffled: bool

    def epoch(self, epoch: int) -> Int[np.ndarray, " item"]:
        """Numbers of an epoch's pieces: of each source the next weight × count of an endless line of passes."""
        items, before = [np.zeros(0, np.int64)], 0
        for source, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            share = Fraction(str(weight)) * count
            first, end = math.ceil(epoch * share), math.ceil((epoch + 1) * share)
            for number in range(first // count, -(-end // count)):
                shuffled = self.order(count, SHUFFLE_PASS, source, number)
                items.append(before + shuffled[max(first - number * count, 0) : end - number * count])
            before += count
        mixed = np.concatenate(items)
        return mixed[self.order(len(mixed), SHUFFLE_EPOCH, epoch)]

    def order(self, count: int, *names: int) -> Int[np.ndarray, " item"]:
        """A permutation that is a function of the seed and `names` alone."""
        return np.random.default_rng([self.seed, *names]).permutation(count) if self.is_shuffled else np.arange(count)


class Epochs:
    """Where epochs end, in rows or slots counted from the start of the run."""

    def __init__(self, size_of: Callable[[int], int]) -> None:
        self.size_of = size_of
        self.ends = [0]

    def before(self, epoch: int) -> int:
        """Units of all epochs before this one."""
        while len(self.ends) <= epoch:
            self.ends.append(self.ends[-1] + self.size_of(len(self.ends) - 1))
        return self.ends[epoch]

    def locate(self, unit: int) -> tuple[int, int]:
        """Epoch that a unit lies in, and its place there."""
        while self.ends[-1] <= unit:
            self.before(len(self.ends))
        epoch = bisect_right(self.ends, unit) - 1
        return epoch, unit - self.ends[epoch]

    def fraction(self, unit: int) -> float:
        """Epochs gone by before a unit."""
        epoch, place = self.locate(unit)
        return epoch + place / (self.before(epoch + 1) - self.before(epoch))


class PackedRows:
    """Rows of whole pieces, packed anew in each epoch; unpacked, a row holds one piece."""

    def __init__(self, pieces: Pieces, mixture: Mixture, length: int, is_packed: bool, cache: Path) -> None:
        self.pieces, self.mixture, self.length, self.is_packed, self.cache = pieces, mixture, length, is_packed, cache
        self.plan = lru_cache(maxsize=2)(self.plan_of)
        self.epochs = Epochs(lambda epoch: len(self.plan(epoch)[1]) - 1)

    def plan_of(self, epoch: int) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " boundary"]]:
        """The epoch's pieces, row after row, and where each row begins."""
        items = self.mixture.epoch(epoch)
        row_of = packed(self.pieces.slots[items], self.length, self.cache) if self.is_packed else np.arange(len(items))
        row_of = self.mixture.order(int(row_of.max(initial=-1)) + 1, SHUFFLE_ROWS, epoch)[row_of]
        return items[np.argsort(row_of, kind="stable")], np.append(0, np.cumsum(np.bincount(row_of)))

    def row_count(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs."""
        return self.epochs.before(epochs)

    def slot_count(self, epoch: int) -> int:
        """Slots of an epoch that hold a token."""
        return int(self.pieces.slots[self.plan(epoch)[0]].sum())

    def epoch_of(self, row: int) -> float:
        """Epochs gone by before a row."""
        return self.epochs.fraction(row)

    def pieces_of(self, row: int) -> Pieces:
        """What stands in a row."""
        epoch, place = self.epochs.locate(row)
        items, start = self.plan(epoch)
        return self.pieces.take(items[start[place] : start[place + 1]])


class StreamRows:
    """Rows that are always full: an epoch's documents in a line, cut where a row ends, the next epoch behind it."""

    def __init__(self, pieces: Pieces, mixture: Mixture, length: int) -> None:
        self.pieces, self.mixture, self.length = pieces, mixture, length
        self.plan = lru_cache(maxsize=2)(self.plan_of)
        self.order = lru_cache(maxsize=2)(mixture.order)
        self.epochs = Epochs(lambda epoch: int(self.plan(epoch)[1][-1]))

    def plan_of(self, epoch: int) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " boundary"]]:
        """The epoch's documents, and the slot where each begins."""
        items = self.mixture.epoch(epoch)
        return items, np.append(0, np.cumsum(self.pieces.slots[items]))

    def row_count(self, epochs: int) -> int:
        """Full rows of the first `epochs` epochs, but one at least."""
        return max(1, self.epochs.before(epochs) // self.length)

    def epoch_of(self, row: int) -> float:
        """Epochs gone by before a row."""
        return self.epochs.fraction(row * self.length)

    def pieces_of(self, row: int) -> Pieces:
        """What stands in a row."""
        parts, slot = [], self.shuffled(row) * self.length
        end = slot + self.length
        while slot < end:
            epoch, first = self.epochs.locate(slot)
            items, begin = self.plan(epoch)
            last = min(first + end - slot, int(begin[-1]))
            here = slice(np.searchsorted(begin, first, "right") - 1, np.searchsorted(begin, last))
            part, begin = self.pieces.take(items[here]), begin[here]
            start = part.start + np.maximum(first - begin, 0)
            stop = np.minimum(part.start + (last - begin) + 1, part.stop)
            parts.append(Pieces(part.source, start, stop, start))
            slot += last - first
        return joined_pieces(parts)

    def shuffled(self, row: int) -> int:
        """The row of the line that is taken as row `row`: those that lie within one epoch trade places."""
        epoch, _ = self.epochs.locate(row * self.length)
        first, end = -(-self.epochs.before(epoch) // self.length), self.epochs.before(epoch + 1) // self.length
        return first + int(self.order(end - first, SHUFFLE_ROWS, epoch)[row - first]) if row < end else row


Rows = PackedRows | StreamRows


def make_batch(rows: Sequence[Pieces], documents: Sequence[Documents], shape: tuple[int, int]) -> Batch:
    """Rows as arrays of `shape`, which may have room for more rows and slots."""
    dtypes = (np.float32 if name == "weight" else np.int32 for name in Batch._fields)
    arrays: Any = [np.zeros(shape, dtype) for dtype in dtypes]
    batch = Batch(*arrays)
    for row, pieces in enumerate(rows):
        slot = 0
        for number, (source, start, stop, clear) in enumerate(zip(*pieces, strict=True), 1):
            token, supervised = documents[source].token[start:stop], documents[source].supervised[start:stop]
            here = (row, slice(slot, slot := slot + stop - start - 1))
            batch.token[here], batch.target[here] = token[:-1], token[1:]
            batch.weight[here] = supervised[1:] & (np.arange(start + 1, stop) >= clear)
            batch.segment[here], batch.position[here] = number, np.arange(stop - start - 1)
    return batch


@dataclass(frozen=True)
class Dataset:
    """Rows to train or evaluate on, the documents they are cut from, and what was counted on the way."""

    rows: Rows
    documents: tuple[Documents, ...]
    facts: Counter[str]

    @property
    def bad_examples(self) -> list[str]:
        """Where and why the first of the bad rows of each source could not be used."""
        return [example for documents in self.documents for example in documents.facts["bad_examples"]]

    def batch(self, index: int, batch_size: int, row_limit: int | None = None) -> Batch:
        """Batch `index` of a run; rows from `row_limit` on are empty. Unpacked rows have the least of eight lengths."""
        first, end = index * batch_size, (index + 1) * batch_size
        rows = [self.rows.pieces_of(row) for row in range(first, end if row_limit is None else min(end, row_limit))]
        length = self.rows.length
        if isinstance(self.rows, PackedRows) and not self.rows.is_packed:
            longest = max((int(pieces.slots.max()) for pieces in rows), default=1)
            bucket = -(-length // BUCKETS)
            length = min(length, -(-longest // bucket) * bucket)
        return make_batch(rows, self.documents, (batch_size, length))


def load_dataset(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    config: RowsConfig | EvalConfig,
    is_stream: bool,
    is_shuffled: bool,
) -> Dataset:
    """Everything from files to rows; `is_stream` cuts plain text into full rows, as pretraining does.

    Raises:
        UserError: unreadable or bad data with file and line, or nothing to learn from.
    """
    train_on, is_packed = (config.train_on, config.packing) if isinstance(config, ChatKeys) else ("all", True)
    documents, parts, facts = [], [], Counter[str]()
    for number, source in enumerate(sources):
        loaded = load_documents(source, tokenizer, train_on, config.on_bad_data == "skip", config.cache_dir)
        if is_stream and loaded.is_prompted.any():
            raise UserError(f"{source.path} holds chats or prompts; pretrain reads plain text, sft trains on chats")
        pieces, counted = whole(loaded, number) if is_stream else fit(loaded, number, config.sequence_length)
        counted.update({key: loaded.facts[key] for key in ("rows", "bad", "straddling")})
        counted["from_cache"] = loaded.facts["rows"] * loaded.facts["is_cached"]
        if not counted["target_tokens"]:
            reason = "; ".join([describe(counted), *loaded.facts["bad_examples"][:1]])
            raise UserError(f"{source.path}, {source.split}: no token to learn from ({reason})")
        documents.append(loaded)
        parts.append(pieces)
        facts += counted
    counts = tuple(len(each.start) for each in parts)
    mixture = Mixture(counts, tuple(source.weight for source in sources), config.seed, is_shuffled)
    if is_stream:
        rows = StreamRows(joined_pieces(parts), mixture, config.sequence_length)
    else:
        rows = PackedRows(joined_pieces(parts), mixture, config.sequence_length, is_packed, config.cache_dir)
    return Dataset(rows, tuple(documents), facts)


WORDING = {
    "rows": "rows read",
    "from_cache": "of them from the cache",
    "bad": "bad rows left out",
    "documents": "samples",
    "without_targets": "samples without a supervised token dropped",
    "answer_too_long": "samples dropped, as the last answer alone is longer than a row",
    "prompt_cut": "prompts cut from the left",
    "targets_cut": "supervised tokens lost with them",
    "split": "texts split over rows",
    "straddling": "tokens on the edge of an answer left unsupervised",
    "tokens": "tokens",
    "target_tokens": "supervised",
}


def describe(facts: Mapping[str, int]) -> str:
    """What was counted, in words."""
    share = f" ({facts['target_tokens'] / facts['tokens']:.1%})" if facts.get("tokens") else ""
    return ", ".join(f"{facts[key]:,} {words}" for key, words in WORDING.items() if facts.get(key)) + share


def coloured(batch: Batch, row: int, tokenizer: Tokenizer, has_marks: bool) -> Text:
    """A packed row as text: what is learned in green (and in ⟦ ⟧), its context dim, each document under a line."""
    text = Text()
    for segment in range(1, int(batch.segment[row].max()) + 1):
        here = np.flatnonzero(batch.segment[row] == segment)
        ids = [batch.token[row, here[0]], *batch.target[row, here]]
        is_learned = [False, *(batch.weight[row, here] > 0)]
        text.append(f"── document {segment}: {len(here)} tokens, {sum(is_learned)} supervised ──\n", style="bold cyan")
        for learned, run in groupby(zip(is_learned, ids, strict=True), lambda pair: pair[0]):
            written = decode(tokenizer, [int(each) for _, each in run])
            text.append(f"⟦{written}⟧" if learned and has_marks else written, style="green" if learned else "dim")
        text.append("\n")
    return text
