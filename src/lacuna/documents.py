"""Documents: rows of files and hub data sets, and their text encoded once and kept in the cache.

Encoded documents are memory-mapped, so a corpus may be larger than memory. They are found again by a hash of all they
depend on: the bytes of the files, the columns, the tokenizer, the chat template, and the code that encodes them.
"""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import DTypeLike
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

from lacuna.config import DataSource, UserError
from lacuna.distributed import writing_to
from lacuna.metrics import content_hash, sync, write_atomically
from lacuna.tokenizer import (
    EncodedText,
    Span,
    Tokenizer,
    TrainOn,
    chat_spans,
    encode,
    encode_spans,
    end_of_text_id,
)

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
MAX_LINE_BYTES = 16 * 2**20
PART_CHARACTERS, SEAM_CHARACTERS = 2**15, 2**8
BATCH_PARTS = 64  # to encode at once: enough to occupy the processors, and not more, as encodings take much memory
SHOWN_BAD_ROWS = 5
TABLE_ROWS = 1000  # of an Arrow table that are read at once
CACHED = ("token", "supervised", "start", "is_prompted")

Used = TypeVar("Used")


class Documents(NamedTuple):
    """The encoded documents of one source: document i is `token[start[i]:start[i + 1]]`, and so is `supervised`.

    Each ends with its last supervised token, as what follows can't change the loss. `is_prompted` documents answer a
    prompt, the others are plain text. `facts` counts rows read, bad rows, and tokens that straddle the edge of what is
    supervised, and those of the rows that were in the cache.
    """

    token: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    start: Int[np.ndarray, " boundary"]
    is_prompted: Bool[np.ndarray, " document"]
    facts: dict[str, Any]


class Prepared(NamedTuple):
    """A document ready for the tokenizer, or a part of a long one: its text, the supervised ranges of characters, and
    the tokens that go before and, supervised, after it."""

    text: str
    spans: list[Span]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    is_prompted: bool = True
    is_last: bool = True


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
        yield next(rows, (str(file), ValueError("it holds no rows; fill it, or leave it out of the path")))
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
                raise ValueError(f'it is {json.dumps(row):.40}, not an object such as {{"messages": [...]}}')
            yield use(origin, row)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            if not skip_bad:
                raise UserError(f"{origin}: {reason} (or leave such rows out with --on-bad-data skip)") from error
            bad.append(f"{origin}: {reason}")


def local_files(path: str) -> list[Path]:
    """The files that a path or glob names, sorted; none if it may name a data set on the hub."""
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


def file_rows(file: Path, text_column: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, the last of them a ValueError if the file can't be read, or no further."""
    try:
        match file.suffix.lower():
            case ".jsonl":
                yield from jsonl_rows(file)
            case ".csv":
                yield from csv_rows(file)
            case ".txt":  # one document
                if (text := file.read_bytes().decode("utf-8-sig")).strip():
                    yield str(file), {text_column: text}
            case _:
                for number, row in enumerate(table_of(file), 1):
                    yield f"{file} row {number}", row
    except ValueError as error:
        fix = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        yield str(file), ValueError(f"{error}{fix}")


def jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file's lines; of a line that is too long, and so may not fit in memory, only the number."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            try:
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(2**16)
                    raise ValueError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
                if line.strip():
                    yield f"{file} line {number}", parsed(line)
            except ValueError as error:
                yield f"{file} line {number}", error


def csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names the columns; every value is text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            for row in table:
                wrong = ValueError(f"it has not one value for each of {len(table.fieldnames or ())} columns")
                yield f"{file} line {table.line_num}", wrong if None in (*row, *row.values()) else row
        except csv.Error as error:
            reason = f"broken CSV: {error}; what follows it is not read"
            yield f"{file} line {table.reader.line_num}", ValueError(reason)


def table_of(file: Path) -> Iterable[Any]:
    """The rows of a parquet table or a JSON list."""
    if file.suffix.lower() == ".parquet":
        return parquet_rows(file)
    if not isinstance(rows := parsed(file.read_bytes()), list):
        raise ValueError("it must hold one list of rows; name a file with one object per line .jsonl")
    return rows


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, without columns of bytes, which are no text."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [field.name for field in table.schema_arrow if "binary" not in str(field.type)]
            yield from undecoded(table.iter_batches(TABLE_ROWS, columns=columns))
    except Exception as error:  # of Arrow or Python, depending on what is broken
        raise ValueError(f"not readable as parquet: {error}") from error


def undecoded(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows of Arrow's tables as they are: what says it is an image, in a file or at an address, is not opened."""
    for batch in batches:
        yield from batch.to_pylist()


def parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from error


@lru_cache(maxsize=1)
def hub_table(source: DataSource) -> Any:
    """A split of a data set on the hub, or a slice of it; `path:config` names one of several in a repository."""
    datasets = quiet_datasets()
    path, _, config = source.path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=source.split)
    except Exception as error:  # its HTTP and storage clients raise their own kinds
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
        raise UserError(f"data path {source.path!r}: no such file, and on the hub: {reason}; {fix}") from error


def quiet_datasets() -> Any:
    """The `datasets` library, which shows progress on a terminal only and leaves errors to us."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def split_bounds(source: DataSource) -> tuple[str, str]:
    """Where the split of local files begins and ends, as in `train[:95%]`; a data set on the hub is fetched as its
    split, and all of it is wanted.

    Raises:
        UserError: the split can't be read, or is not train.
    """
    if not local_files(source.path):
        return "0%", "100%"
    if match := re.fullmatch(r"train(\[(-?\d+%?)?:(-?\d+%?)?\])?", source.split):
        return match[2] or "0%", match[3] or "100%"
    raise UserError(
        f"split {source.split!r}: local files have only one split, train; write train, train[:95%] or train[100:200]"
    )


def slice_between(bounds: tuple[str, str], count: int) -> slice:
    """The slice of `count` rows that the bounds of a split name, by number or in percent."""
    return slice(*(round(int(each[:-1]) * count / 100) if each.endswith("%") else int(each) for each in bounds))


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


def encode_parts(parts: Iterator[Prepared], tokenizer: Tokenizer) -> Iterator[tuple[Prepared, EncodedText]]:
    """Each part with its tokens; those of an answer to a prompt up to the last that is supervised."""
    for batch in iter(lambda: list(islice(parts, BATCH_PARTS)), []):
        for part, encoded in zip(batch, encode_spans(tokenizer, [part[:2] for part in batch]), strict=True):
            token = np.concatenate([part.before, encoded.token, part.after], dtype=np.int32, casting="unsafe")
            supervised = np.arange(len(token)) >= len(part.before)
            if part.is_prompted:
                supervised[len(part.before) : len(token) - len(part.after)] = encoded.supervised
                length = np.max(np.flatnonzero(supervised) + 1, initial=0)
                token, supervised = token[:length], supervised[:length]
            yield part, EncodedText(token, supervised, encoded.straddling_count)


# The cache


def load_documents(
    source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, cache_dir: Path
) -> Documents:
    """The documents of a source (its slice, if it names one), encoded now or found in the cache.

    Raises:
        UserError: what can't be read, or a bad row (unless `skip_bad`), with file and line.
    """
    bounds = split_bounds(source)
    directory = cache_dir / "documents" / source_fingerprint(source, tokenizer, train_on, skip_bad)
    if not (cached := intact_facts(directory)):
        with writing_to(directory.parent, "make room, or set XDG_CACHE_HOME to a directory that has some"):
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                encode_source(source, tokenizer, train_on, skip_bad, Path(scratch))
                try:
                    os.rename(scratch, directory)
                except OSError:
                    if not directory.exists():  # else another process was faster
                        raise
    if not (facts := cached or intact_facts(directory)):
        raise UserError(f"{directory}: what was written there can't be read again; is the disk sound?")
    start, is_prompted = np.fromfile(directory / "start", np.int64), np.fromfile(directory / "is_prompted", np.bool_)
    first, last, _ = slice_between(bounds, len(is_prompted)).indices(len(is_prompted))
    last = max(first, last)
    return Documents(
        token=mapped(directory / "token", np.int32),
        supervised=mapped(directory / "supervised", np.bool_),
        start=start[first : last + 1],
        is_prompted=is_prompted[first:last],
        facts=facts | {"from_cache": facts["rows"] * bool(cached)},
    )


def intact_facts(directory: Path) -> dict[str, Any] | None:
    """What was counted of encoded documents whose files are as they were written; a damaged directory is removed."""
    if not directory.exists():
        return None
    try:
        facts, sha256 = json.loads((directory / "facts.json").read_text())
        damaged = [] if content_hash(facts) == sha256 else ["facts.json"]
        damaged += [name for name in CACHED if file_hash(directory / name) != facts["sha256"][name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        damaged = [f"{type(error).__name__}: {error}"]
    if not damaged:
        return facts
    print(f"WARNING: encoded anew, as the cache {directory} is damaged ({', '.join(damaged)})", file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    return None


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mapped(path: Path, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def source_fingerprint(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool) -> str:
    """A hash of all that the encoded documents depend on."""
    files = local_files(source.path)
    columns = source.model_dump(exclude={"path", "split", "weight"})
    origin = [file.name for file in files] or [source.path, hub_table(source)._fingerprint]
    date = tokenizer.template.globals["strftime_now"]("%F") if tokenizer.template else ""
    sources = tokenizer.template_source, tokenizer.tool_source
    template = [*sources, tokenizer.variables, tokenizer.special_tokens, date]
    digest = hashlib.sha256(json.dumps([origin, columns, template, train_on, skip_bad]).encode())
    code = [Path(__file__).with_name(name) for name in ("documents.py", "tokenizer.py", "sandbox.py")]
    with progress() as line:
        for file in line.track([*files, tokenizer.directory / "tokenizer.json", *code], description="Hashing files"):
            digest.update(bytes.fromhex(file_hash(file)))
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
        pieces = (part for document in documents for part in parts(document, tokenizer))
        for part, (token, supervised, straddling_count) in encode_parts(pieces, tokenizer):
            token_file.write(token.tobytes())
            supervised_file.write(supervised.tobytes())
            digest.update(token.tobytes() + supervised.tobytes())
            straddling += straddling_count
            end += len(token)
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
        "sha256": {name: file_hash(directory / name) for name in CACHED},
    }
    for name in CACHED:
        sync(directory / name)
    write_atomically(directory / "facts.json", json.dumps([facts, content_hash(facts)]))


def progress() -> Progress:
    """A line that counts what was read, on a terminal only."""
    columns = "{task.description}", "{task.completed:,}", TimeElapsedColumn()
    return Progress(*columns, transient=True, disable=not sys.stdout.isatty())
