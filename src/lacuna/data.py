"""Data: files or hub data sets to documents of tokens, documents to packed rows, rows to batches.

Documents are encoded once, into memory-mapped files in the cache, so a corpus may be larger than memory. All that
follows is a pure function of (seed, row number): the place in the data needs no state but the step.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import DTypeLike
from rich.progress import track
from rich.text import Text

from lacuna.config import DataSource, EvalConfig, SftConfig, TrainingConfig, UserError
from lacuna.tokenizer import EncodedText, Tokenizer, chat_spans, decode, encode_spans, end_of_text_id

TrainOn = Literal["assistant", "all", "last"]

CACHE_FORMAT = 1
SHUFFLE_PASS, SHUFFLE_EPOCH, SHUFFLE_ROWS = 1, 2, 3
MAX_LINE_BYTES = 16 * 2**20
ENCODE_BATCH = 512
BUCKETS = 8
SHOWN_BAD_ROWS = 5


class Documents(NamedTuple):
    """The encoded documents of one source: document i is `token[start[i]:start[i + 1]]`, and so is `supervised`.

    `is_prompted` documents answer a prompt: too long, they lose the prompt's left end. The others are plain text and
    are split. `facts` counts rows read, bad rows and tokens straddling the edge of a supervised span.
    """

    token: Int[np.ndarray, " slot"]
    supervised: Bool[np.ndarray, " slot"]
    start: Int[np.ndarray, " boundary"]
    is_prompted: Bool[np.ndarray, " document"]
    facts: dict[str, Any]


class Batch(NamedTuple):
    """Packed rows, NumPy arrays until they are put on the devices. `weight` is 1 where the loss counts, `segment` is
    1, 2, … a document and 0 padding, `position` restarts at 0 with each document."""

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]


class Pieces(NamedTuple):
    """Parts of documents that each fit a row: tokens `start` to `stop` of a source, whose loss counts from `clear` on.

    A piece of n + 1 tokens takes n slots of a row, as each slot holds a token and its successor.
    """

    start: Int[np.ndarray, " piece"]
    stop: Int[np.ndarray, " piece"]
    clear: Int[np.ndarray, " piece"]


# Reading


def local_files(path: str) -> list[Path]:
    """The files that a path or glob names, sorted; none when it is the id of a hub data set."""
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory; name its files, as {path.rstrip('/')}/*.jsonl")
    return sorted(Path(name) for name in glob.glob(path, recursive=True))


def read_rows(source: DataSource) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Each row with its origin for messages; what can't be read as a row comes as a string, the reason."""
    files = local_files(source.path)
    if not files and (any(c in source.path for c in "*?[") or Path(source.path).suffix or source.path.count("/") > 1):
        raise UserError(f"data path {source.path!r}: no such file")
    if not files:
        yield from hub_rows(source)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
        match file.suffix.lower():
            case ".jsonl":
                yield from jsonl_rows(file)
            case ".json":
                yield from json_rows(file)
            case ".txt":
                yield from text_rows(file, source.text_column)
            case ".parquet" | ".csv" as suffix:
                yield from table_rows(file, suffix[1:])
            case suffix:
                raise UserError(
                    f"{file}: files of type {suffix or '(none)'} are not read; jsonl, json, parquet, csv and txt are"
                )


def jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            origin = f"{file} line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                yield origin, f"the line has {len(line) / 2**20:.0f} MB; the most is {MAX_LINE_BYTES >> 20} MB"
            elif line.strip():
                yield origin, parse_line(line)


def parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        return f"broken JSON ({error})"
    return row if isinstance(row, dict) else f"a row must be a JSON object, this is a {type(row).__name__}"


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: broken JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise UserError(f"{file}: must hold one list of rows; for an object a line, name it .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", row if isinstance(row, dict) else "a row must be a JSON object"


def text_rows(file: Path, column: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """A text file is one document."""
    content = file.read_bytes()
    try:
        yield str(file), {column: content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f"{file} line {line}", f"not UTF-8 (byte {error.start + 1})"


def table_rows(file: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        table = datasets.load_dataset(kind, data_files=str(file), split="train")
    except Exception as error:
        raise UserError(f"{file}: not readable as {kind} ({error.__cause__ or error})") from error
    for number, row in enumerate(table, 1):
        yield f"{file} row {number}", dict(row)


def hub_table(source: DataSource) -> Any:
    import datasets

    split, _ = split_slice(source.split)
    try:
        return datasets.load_dataset(source.path, split=split)
    except Exception as error:
        raise UserError(f"data path {source.path!r}: no such file, and as a hub data set: {error}") from error


def hub_rows(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(hub_table(source), 1):
        yield f"{source.path} {source.split} row {number}", dict(row)


def split_slice(split: str) -> tuple[str, tuple[str, str]]:
    """Name and bounds of a split such as `train[:95%]` or `test[100:200]`."""
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+%?|):(-?\d+%?|)\])?", split)
    if not match:
        raise UserError(f"split {split!r} is not understood; write it as train, train[:95%] or test[100:200]")
    return match[1], (match[2] or "", match[3] or "")


def slice_of(split: str, count: int) -> slice:
    def bound(text: str) -> int | None:
        return (round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)) if text else None

    first, last = split_slice(split)[1]
    return slice(bound(first), bound(last))


# Encoding


class Prepared(NamedTuple):
    """A row ready for the tokenizer: its text, the supervised ranges of characters, and how it ends and may be cut."""

    text: str
    spans: list[tuple[int, int]]
    is_chat: bool
    is_prompted: bool


def prepare(row: dict[str, Any] | str, source: DataSource, tokenizer: Tokenizer, train_on: TrainOn) -> Prepared:
    """Text and supervised ranges of a chat, prompt/completion or text row.

    Raises:
        ValueError: why the row can't be used.
    """
    if isinstance(row, str):
        raise ValueError(row)
    prompt, completion = row.get(source.prompt_column), row.get(source.completion_column)
    messages = row.get(source.messages_column)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = prompt + completion
    if messages is not None:
        text, spans = chat_spans(tokenizer, messages, row.get(source.tools_column) or None, train_on)
        return Prepared(text, spans, is_chat=True, is_prompted=True)
    if prompt is not None or completion is not None:
        prompt, completion = (
            checked_text(prompt, source.prompt_column),
            checked_text(completion, source.completion_column),
        )
        first = 0 if train_on == "all" else len(prompt)
        return Prepared(prompt + completion, [(first, len(prompt + completion))], is_chat=False, is_prompted=True)
    if source.text_column in row:
        text = checked_text(row[source.text_column], source.text_column)
        return Prepared(text, [(0, len(text))], is_chat=False, is_prompted=False)
    wanted = (
        f"{source.messages_column}, {source.prompt_column} with {source.completion_column}, or {source.text_column}"
    )
    raise ValueError(f"it has the columns {', '.join(row) or '(none)'}; wanted are {wanted}")


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{column} holds a lone surrogate, half a character, at {error.start + 1}; remove it"
        ) from error
    return value


def encode_prepared(rows: Sequence[Prepared], tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Tokens of rows, in order; what is no chat gets BOS where the tokenizer wants it, and a supervised EOS."""
    for is_chat, group in groupby(rows, lambda row: row.is_chat):
        texts = [(row.text, row.spans) for row in group]
        for encoded in encode_spans(tokenizer, texts, add_special_tokens=not is_chat):
            if is_chat or (len(encoded.token) and encoded.token[-1] == tokenizer.eos_id):
                yield encoded
            else:
                eos = np.int32(end_of_text_id(tokenizer))
                token, supervised = np.append(encoded.token, eos), np.append(encoded.supervised, True)
                yield EncodedText(token, supervised, encoded.straddling_count)


def load_documents(
    source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, cache: Path
) -> Documents:
    """The documents of a source (its slice, if it names one), encoded now or found in the cache by their content.

    Raises:
        UserError: a file that can't be read, or a bad row (unless `skip_bad`), with file and line.
    """
    directory = cache / "documents" / fingerprint(source, tokenizer, train_on, skip_bad)
    if not (directory / "facts.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            encode_source(source, tokenizer, train_on, skip_bad, Path(scratch))
            if not directory.exists():
                os.rename(scratch, directory)
                os.mkdir(scratch)
    start = np.fromfile(directory / "start", np.int64)
    chosen = slice_of(source.split, len(start) - 1)
    first, last, _ = chosen.indices(len(start) - 1)
    return Documents(
        token=mapped(directory / "token", np.int32),
        supervised=mapped(directory / "supervised", np.bool_),
        start=start[first : max(first, last) + 1],
        is_prompted=np.fromfile(directory / "is_prompted", np.bool_)[chosen],
        facts=json.loads((directory / "facts.json").read_text()),
    )


def mapped(path: Path, dtype: DTypeLike) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def fingerprint(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool) -> str:
    """Names all that the encoded documents depend on: the bytes of the files, the tokenizer, the columns."""
    digest = hashlib.sha256()
    for file in local_files(source.path):
        with file.open("rb") as content:
            digest.update(str(file).encode() + hashlib.file_digest(content, "sha256").digest())
    if not local_files(source.path):
        digest.update(hub_table(source)._fingerprint.encode())
    columns = source.model_dump(exclude={"path", "split", "weight"})
    template = (tokenizer.template_source, tokenizer.special_tokens)
    digest.update(json.dumps([CACHE_FORMAT, columns, template, train_on, skip_bad]).encode())
    digest.update(tokenizer.backend.to_str().encode())
    return digest.hexdigest()[:32]


def encode_source(source: DataSource, tokenizer: Tokenizer, train_on: TrainOn, skip_bad: bool, directory: Path) -> None:
    """Write token, supervised, start, is_prompted and facts.json of every row of a source."""
    count, bad, straddling, end = 0, [], 0, 0
    start, is_prompted = [0], []
    rows = track(
        read_rows(source), description=f"Encoding {source.path}", transient=True, disable=not sys.stdout.isatty()
    )
    with (directory / "token").open("wb") as token_file, (directory / "supervised").open("wb") as supervised_file:
        while group := list(islice(rows, ENCODE_BATCH)):
            prepared = []
            for origin, row in group:
                try:
                    prepared.append(prepare(row, source, tokenizer, train_on))
                except ValueError as error:
                    if not skip_bad:
                        raise UserError(
                            f"{origin}: {error} (or leave such rows out with --on-bad-data skip)"
                        ) from error
                    bad.append(f"{origin}: {error}")
            count += len(group)
            for row, encoded in zip(prepared, encode_prepared(prepared, tokenizer), strict=True):
                token_file.write(encoded.token.tobytes())
                supervised_file.write(encoded.supervised.tobytes())
                straddling += encoded.straddling_count
                end += len(encoded.token)
                start.append(end)
                is_prompted.append(row.is_prompted)
    np.array(start, np.int64).tofile(directory / "start")
    np.array(is_prompted, np.bool_).tofile(directory / "is_prompted")
    facts = {"rows": count, "bad": len(bad), "bad_examples": bad[:SHOWN_BAD_ROWS], "straddling": straddling}
    (directory / "facts.json").write_text(json.dumps(facts))


# Fitting and packing


def fit(documents: Documents, sequence_length: int) -> tuple[Pieces, Counter[str]]:
    """Pieces of documents that fit rows of `sequence_length` slots, in document order, and what became of the rest.

    What stands behind a document's last supervised token is left out, as it can't change the loss. Too long a text is
    split. Too long a chat or prompt loses its left end, and the rest of an answer cut in two does not count; one whose
    last answer alone exceeds the row is dropped, as is a document with nothing supervised.
    """
    learned = np.flatnonzero(documents.supervised)
    begin, end = documents.start[:-1], documents.start[1:]
    is_target = np.searchsorted(learned, begin + 1)  # a document's first token is nobody's target
    last = np.searchsorted(learned, end) - 1
    kept = np.flatnonzero(last >= is_target)
    start, stop = begin[kept], learned[last[kept]] + 1
    fits = stop - start - 1 <= sequence_length
    rows = [Pieces(start[fits], stop[fits], start[fits])]
    facts = Counter(documents=len(begin), without_targets=len(begin) - len(kept))
    for begin, end, is_prompted in zip(start[~fits], stop[~fits], documents.is_prompted[kept][~fits], strict=True):
        if is_prompted:
            rows.append(cut_left(documents.supervised, begin, end, sequence_length, facts))
        else:
            first = np.arange(begin, end - 1, sequence_length)
            rows.append(Pieces(first, np.minimum(first + sequence_length + 1, end), first))
            facts["split"] += 1
    pieces = Pieces(*map(np.concatenate, zip(*rows, strict=True)))
    pieces = Pieces(*(column[np.argsort(pieces.start, kind="stable")] for column in pieces))
    first_target = np.searchsorted(learned, np.maximum(pieces.start + 1, pieces.clear))
    facts["target_tokens"] = int(np.sum(np.searchsorted(learned, pieces.stop) - first_target))
    facts["tokens"] = int(np.sum(pieces.stop - pieces.start - 1))
    return pieces, facts


def cut_left(supervised: Bool[np.ndarray, " slot"], begin: int, end: int, length: int, facts: Counter[str]) -> Pieces:
    """The last `length` slots of a document that is too long, or nothing where its last answer alone is longer."""
    is_context = np.flatnonzero(~supervised[begin:end])
    answer = begin + is_context[-1] + 1 if len(is_context) else begin
    if end - answer > length:
        facts["answer_too_long"] += 1
        return Pieces(*[np.zeros(0, np.int64)] * 3)
    start = end - length - 1
    clear = begin + is_context[np.searchsorted(is_context, start - begin)] if supervised[start] else start
    facts["prompt_cut"] += 1
    facts["targets_cut"] += int(np.sum(supervised[begin + 1 : max(clear, start + 1)]))
    return Pieces(*(np.array([each], np.int64) for each in (start, end, clear)))


def first_fit_decreasing(
    lengths: Int[np.ndarray, " piece"], capacity: int
) -> tuple[Int[np.ndarray, " piece"], Int[np.ndarray, " boundary"]]:
    """First-Fit-Decreasing (Johnson 1973), exactly: row r holds the pieces `order[start[r]:start[r + 1]]`.

    Pieces of one length are placed together: each row, from the left, takes as many as it has room for.
    """
    order = np.argsort(-lengths, kind="stable")
    room, row_of, row_count = np.full(len(lengths), capacity, np.int32), np.empty(len(lengths), np.int32), 0
    values, first = np.unique(-lengths[order], return_index=True)
    for length, begin, end in zip(-values, first, [*first[1:], len(order)], strict=True):
        open_rows = np.flatnonzero(room[:row_count] >= length)[: end - begin]
        taken = room[open_rows] // length
        before = np.cumsum(taken) - taken
        taken = np.clip(end - begin - before, 0, taken)
        new_count = -(-(end - begin - taken.sum()) // (capacity // length))
        rows = np.append(
            np.repeat(open_rows, taken), np.repeat(np.arange(row_count, row_count + new_count), capacity // length)
        )
        row_of[begin:end] = rows[: end - begin]
        row_count += new_count
        np.subtract.at(room, row_of[begin:end], np.int32(length))
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.append(0, np.cumsum(np.bincount(row_of, minlength=row_count)))


# Rows and batches


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a source's documents, one segment of a row; its loss counts from `clear` on."""

    source: int
    start: int
    stop: int
    clear: int


@dataclass(frozen=True)
class Mixture:
    """Items of several sources (documents or pieces) in the order in which each epoch takes them."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    is_shuffled: bool

    def epoch(self, epoch: int) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " item"]]:
        """Source and number of each item: the next weight × count of an endless line of shuffled passes."""
        sources, items = [], []
        for source, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            first, end = math.floor(epoch * weight * count), math.floor((epoch + 1) * weight * count)
            passes = range(first // max(count, 1), -(-end // max(count, 1)))
            shuffled = [self.order(count, SHUFFLE_PASS, source, number) for number in passes]
            begin = first - passes.start * count
            items.append(np.concatenate([np.zeros(0, np.int64), *shuffled])[begin : begin + end - first])
            sources.append(np.full(end - first, source))
        mixed = self.order(sum(map(len, items)), SHUFFLE_EPOCH, epoch)
        return np.concatenate(sources)[mixed], np.concatenate(items)[mixed]

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
    """Rows of whole pieces, packed First-Fit-Decreasing anew in each epoch; unpacked, a row holds one piece."""

    def __init__(self, pieces: Sequence[Pieces], mixture: Mixture, length: int, is_packed: bool, cache: Path) -> None:
        self.pieces, self.mixture, self.length, self.is_packed, self.cache = pieces, mixture, length, is_packed, cache
        self.plan = lru_cache(maxsize=2)(self.plan_of)
        self.epochs = Epochs(lambda epoch: len(self.plan(epoch)[2]) - 1)

    def plan_of(
        self, epoch: int
    ) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " item"], Int[np.ndarray, " boundary"]]:
        """Source and number of the epoch's pieces, row after row, and where each row begins."""
        source, item = self.mixture.epoch(epoch)
        lengths = np.empty(len(item), np.int64)
        for number, pieces in enumerate(self.pieces):
            here = source == number
            lengths[here] = (pieces.stop - pieces.start - 1)[item[here]]
        order, start = np.arange(len(item)), np.arange(len(item) + 1)
        if self.is_packed:
            order, start = packing_plan(lengths, self.length, self.cache)
        rows = self.mixture.order(len(start) - 1, SHUFFLE_ROWS, epoch)
        sizes = np.diff(start)[rows]
        begin = np.cumsum(sizes) - sizes
        order = order[np.repeat(start[:-1][rows] - begin, sizes) + np.arange(len(order))]
        return source[order], item[order], np.append(begin, len(order))

    def row_count(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs."""
        return self.epochs.before(epochs)

    def slot_count(self, epoch: int) -> int:
        """Slots of an epoch that hold a token."""
        source, item, _ = self.plan(epoch)
        sizes = [pieces.stop - pieces.start - 1 for pieces in self.pieces]
        return sum(int(sizes[number][item[source == number]].sum()) for number in range(len(sizes)))

    def epoch_of(self, row: int) -> float:
        """Epochs gone by before a row."""
        return self.epochs.fraction(row)

    def pieces_of(self, row: int) -> list[Piece]:
        """What stands in a row."""
        epoch, row = self.epochs.locate(row)
        source, item, start = self.plan(epoch)
        here = slice(start[row], start[row + 1])
        return [
            Piece(int(number), *(int(column[each]) for column in self.pieces[number]))
            for number, each in zip(source[here], item[here], strict=True)
        ]


class StreamRows:
    """Rows that are always full: an epoch's documents in a line, cut where a row ends, the next epoch behind it."""

    def __init__(self, documents: Sequence[Documents], mixture: Mixture, length: int) -> None:
        self.documents, self.mixture, self.length = documents, mixture, length
        self.plan = lru_cache(maxsize=2)(self.plan_of)
        self.epochs = Epochs(lambda epoch: int(self.plan(epoch)[2][-1]))

    def plan_of(
        self, epoch: int
    ) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " item"], Int[np.ndarray, " item"]]:
        """Source and first token of the epoch's documents, and the slots up to the end of each."""
        source, item = self.mixture.epoch(epoch)
        start, slots = np.empty(len(item), np.int64), np.empty(len(item), np.int64)
        for number, documents in enumerate(self.documents):
            here = source == number
            start[here] = documents.start[item[here]]
            slots[here] = np.diff(documents.start)[item[here]] - 1
        return source, start, np.cumsum(slots)

    def row_count(self, epochs: int) -> int:
        """Full rows of the first `epochs` epochs."""
        return self.epochs.before(epochs) // self.length

    def epoch_of(self, row: int) -> float:
        """Epochs gone by before a row."""
        return self.epochs.fraction(row * self.length)

    def pieces_of(self, row: int) -> list[Piece]:
        """What stands in a row."""
        pieces, slot, end = [], row * self.length, (row + 1) * self.length
        while slot < end:
            epoch, place = self.epochs.locate(slot)
            source, start, ends = self.plan(epoch)
            document = int(np.searchsorted(ends, place, side="right"))
            size = min(int(ends[document]) - place, end - slot)
            first = int(start[document]) + place - (int(ends[document - 1]) if document else 0)
            pieces.append(Piece(int(source[document]), first, first + size + 1, first))
            slot += size
        return pieces


Rows = PackedRows | StreamRows


def packing_plan(
    lengths: Int[np.ndarray, " piece"], capacity: int, cache: Path
) -> tuple[Int[np.ndarray, " piece"], Int[np.ndarray, " boundary"]]:
    """`first_fit_decreasing`, found in the cache where the same lengths were packed before."""
    name = hashlib.sha256(f"{CACHE_FORMAT} {capacity} ".encode() + lengths.astype(np.int64).tobytes()).hexdigest()[:32]
    path = cache / "plans" / f"{name}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as plan:
            return plan["order"], plan["start"]
    order, start = first_fit_decreasing(lengths, capacity)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as scratch:
        np.savez(scratch, order=order, start=start)
    os.replace(scratch.name, path)
    return order, start


def make_batch(rows: Sequence[Sequence[Piece]], documents: Sequence[Documents], length: int) -> Batch:
    """Rows of `length` slots as arrays."""
    arrays: Any = [
        np.zeros((len(rows), length), np.float32 if name == "weight" else np.int32) for name in Batch._fields
    ]
    batch = Batch(*arrays)
    for row, pieces in enumerate(rows):
        slot = 0
        for number, (source, start, stop, clear) in enumerate(pieces, 1):
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

    def batch(self, index: int, batch_size: int, row_limit: int | None = None) -> Batch:
        """Batch `index` of a run; rows from `row_limit` on are empty. Unpacked rows have the least length of eight."""
        rows = [
            self.rows.pieces_of(row) if row_limit is None or row < row_limit else []
            for row in range(index * batch_size, (index + 1) * batch_size)
        ]
        length = self.rows.length
        if isinstance(self.rows, PackedRows) and not self.rows.is_packed:
            longest = max((piece.stop - piece.start - 1 for pieces in rows for piece in pieces), default=1)
            bucket = -(-length // BUCKETS)
            length = min(length, -(-longest // bucket) * bucket)
        return make_batch(rows, self.documents, length)


def load_dataset(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    page: TrainingConfig | EvalConfig,
    is_stream: bool,
    is_shuffled: bool,
) -> Dataset:
    """Everything from files to rows; `is_stream` cuts plain text into full rows, as pretraining does.

    Raises:
        UserError: unreadable or bad data with file and line, or nothing to learn from.
    """
    chat = page if isinstance(page, SftConfig | EvalConfig) else None
    train_on, is_packed = (chat.train_on, chat.packing) if chat else ("all", True)
    documents, pieces, facts = [], [], Counter[str]()
    for source in sources:
        loaded = load_documents(source, tokenizer, train_on, page.on_bad_data == "skip", page.cache_dir)
        documents.append(loaded)
        facts.update({key: loaded.facts[key] for key in ("rows", "bad", "straddling")})
        if is_stream and loaded.is_prompted.any():
            raise UserError(
                f"{source.path} holds chats or prompts, and pretrain reads plain text; train on it with sft"
            )
        if is_stream:
            slots = int(loaded.start[-1] - loaded.start[0]) - len(loaded.start) + 1
            counted = Counter(documents=len(loaded.start) - 1, tokens=slots, target_tokens=slots)
        else:
            fitted, counted = fit(loaded, page.sequence_length)
            pieces.append(fitted)
        facts += counted
        if not counted["target_tokens"]:
            counted["rows"] = loaded.facts["rows"]
            raise UserError(f"{source.path}, {source.split}: no token to learn from ({describe(counted)})")
    counts = [len(each.start) for each in pieces] or [len(each.start) - 1 for each in documents]
    mixture = Mixture(tuple(counts), tuple(source.weight for source in sources), page.seed, is_shuffled)
    if is_stream:
        return Dataset(StreamRows(documents, mixture, page.sequence_length), tuple(documents), facts)
    return Dataset(
        PackedRows(pieces, mixture, page.sequence_length, is_packed, page.cache_dir), tuple(documents), facts
    )


WORDING = {
    "rows": "rows read",
    "bad": "bad rows left out",
    "documents": "samples",
    "without_targets": "samples without a supervised token dropped",
    "answer_too_long": "samples dropped, as the last answer alone is longer than a row",
    "prompt_cut": "prompts cut from the left",
    "targets_cut": "supervised tokens cut with them",
    "split": "texts split over rows",
    "straddling": "tokens on the edge of an answer left unsupervised",
    "tokens": "tokens",
    "target_tokens": "supervised",
}


def describe(facts: Mapping[str, int]) -> str:
    """What was counted, in words."""
    share = f" ({facts['target_tokens'] / facts['tokens']:.1%})" if facts.get("tokens") else ""
    return ", ".join(f"{facts[key]:,} {words}" for key, words in WORDING.items() if facts.get(key)) + share


def coloured(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    """A packed row as text: what is learned in green, the context dim, each document under a line of its own."""
    text = Text()
    for segment in range(1, int(batch.segment[row].max()) + 1):
        here = np.flatnonzero(batch.segment[row] == segment)
        ids = [batch.token[row, here[0]], *batch.target[row, here]]
        is_learned = [False, *(batch.weight[row, here] > 0)]
        text.append(f"── document {segment}: {len(here)} tokens, {sum(is_learned)} supervised ──\n", style="bold cyan")
        for learned, run in groupby(zip(is_learned, ids, strict=True), lambda pair: pair[0]):
            text.append(decode(tokenizer, [int(each) for _, each in run]), style="green" if learned else "dim")
        text.append("\n")
    return text
