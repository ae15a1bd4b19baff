"""Streaming: rows of sources that are larger than memory, mixed by weight, in an order that a few integers tell.

Blocks of neighbouring documents are permuted by a keyed permutation, which needs no table, and the documents of a
window of blocks are shuffled: the two levels that Levanter's measurements favour over a full shuffle and over other
approximations of it (marin-community, 2026). What is next is a place of a few integers for each source, so a run
continues after reading one window again, on any devices.
"""

import queue
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from lacuna.config import ChatKeys, DataSource, PretrainConfig, RowsConfig, UserError
from lacuna.data import Batch, Dataset, Mixture, PackedRows, Segment, batch_of, describe, fit, load_dataset, segments_of
from lacuna.distributed import from_first
from lacuna.documents import SHOWN_BAD_ROWS, Documents, Prepared, encode_parts, encoder_digest, parts, prepare, usable
from lacuna.metrics import byte_size, content_hash, file_hash, write_atomically
from lacuna.shards import Rows, block_count, blocks, bytes_below, fetch_ahead, find_shards, permuted, shards_digest
from lacuna.tokenizer import EncodedText, Tokenizer

WINDOW_BYTES = 2**26  # of the blocks whose documents are shuffled together
PACKING_DOCUMENTS, PACKING_TOKENS = 4096, 2**25  # chats that are packed together, fewer where they are long
SHUFFLE_BLOCKS, SHUFFLE_GROUPS, SHUFFLE_WINDOW, SHUFFLE_WHOLE = 11, 12, 13, 14
CHUNK_TOKENS, CHUNKS_AHEAD = 2**16, 8  # encoded while the step runs
KEPT_PLACES = 4  # of the last batches, as one is read ahead of the step


class SourcePlace(NamedTuple):
    """Where a source goes on: with the document after `row` rows of the window that begins at this block of this group
    of files, of which the first `offset` slots are taken; `taken` counts the slots of all its documents so far."""

    epoch: int = 0
    group: int = 0
    block: int = 0
    row: int = 0
    offset: int = 0
    taken: int = 0


class Row(NamedTuple):
    """A row of a file, its place and that of the next one, the epochs over before it, and where it is from; None in
    place of an empty line."""

    place: SourcePlace
    after: SourcePlace
    epochs: float
    origin: Any
    value: Any


class Document(NamedTuple):
    """An encoded document, the place from which it is read again, its epoch, the epochs over before it, what is counted
    of it and of the rows left out just before it, and why the first of those was."""

    place: SourcePlace
    epoch: int
    epochs: float
    token: np.ndarray
    supervised: np.ndarray
    is_prompted: bool
    counted: Counter[str]
    bad: str = ""


# Sources


class ShardedSource:
    """A source that is read while it is trained on; each epoch has each of its documents once."""

    def __init__(
        self, source: DataSource, number: int, config: RowsConfig, tokenizer: Tokenizer, revision: str
    ) -> None:
        self.source, self.number, self.tokenizer = source, number, tokenizer
        self.wants_text = isinstance(config, PretrainConfig)
        self.seed, self.skip_bad = config.seed, config.on_bad_data == "skip"
        self.train_on = config.train_on if isinstance(config, ChatKeys) else "all"
        self.most_bytes = config.shard_cache * 1e9
        shards, self.revision = find_shards(source, config.cache_dir / "shards", revision)
        together = tuple(shard for shard in shards if not (shard.is_sequential or shard.address))
        apart = [(shard,) for shard in shards if shard.is_sequential or shard.address]
        self.groups = [together, *apart] if together else apart
        self.digest = shards_digest(shards)
        size = sum(shard.size for shard in shards) if all(shard.size >= 0 for shard in shards) else 0
        self.description = (
            f"{source.path}, {len(shards):,} file{'s' * (len(shards) > 1)}{f' of {byte_size(size)}' * bool(size)}"
        )

    def windows(
        self, epoch: int, group: int, block: int
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], list[Rows]]]:
        """The windows of an epoch from the one that begins at a block of a group: where each begins, where the next
        one does, and the rows of its blocks."""
        begin, size, held = (group, block), 0, list[Rows]()
        for place in range(group, len(self.groups)):
            number = self.group(place, epoch)
            if place + 1 < len(self.groups) and (following := self.groups[self.group(place + 1, epoch)][0]).address:
                threading.Thread(target=fetch_ahead, args=(following, self.most_bytes), daemon=True).start()
            first, key = block if place == group else 0, (self.seed, SHUFFLE_BLOCKS, self.number, epoch, number)
            for at, block_size, rows in blocks(self.groups[number], self.most_bytes, first, *key):
                held.append(rows)
                size += block_size
                if size >= WINDOW_BYTES:
                    yield begin, (place, at + 1), held
                    begin, size, held = (place, at + 1), 0, []
        if held:
            yield begin, (len(self.groups), 0), held

    def group(self, place: int, epoch: int) -> int:
        """The group of files that comes at a place in an epoch."""
        return permuted(place, len(self.groups), self.seed, SHUFFLE_GROUPS, self.number, epoch)

    def epochs(self, epoch: int, group: int, block: int) -> float:
        """Epochs over at a block of a group, as far as blocks are counted before they are read."""
        count = block_count(self.groups[self.group(group, epoch)]) if block else 0
        share = block / count if count else 0.0
        return epoch + (group + share) / len(self.groups)

    def rows(self, place: SourcePlace) -> Iterator[Row]:
        """Every row from a place on, epoch after epoch."""
        epoch, group, block, first = place[:4]
        while True:
            for begin, end, held in self.windows(epoch, group, block):
                stop = np.cumsum([len(rows) for rows in held])
                key = self.seed, SHUFFLE_WINDOW, self.number, epoch, *begin
                order = np.random.default_rng(key).permutation(stop[-1])
                after = SourcePlace(epoch + 1) if end[0] == len(self.groups) else SourcePlace(epoch, *end)
                passed, to_pass = self.epochs(epoch, *begin), self.epochs(epoch, *end)
                for row in range(first, len(order)):
                    held_in = int(np.searchsorted(stop, order[row], "right"))
                    origin, value = held[held_in][int(order[row] - stop[held_in]) + len(held[held_in])]
                    next_place = after if row + 1 == len(order) else SourcePlace(epoch, *begin, row + 1)
                    share = passed + (to_pass - passed) * row / len(order)
                    yield Row(SourcePlace(epoch, *begin, row), next_place, share, origin, value)
                first = 0
            epoch, group, block = epoch + 1, 0, 0

    def documents(self, place: SourcePlace) -> Iterator[Document]:
        """Every document from a place on, epoch after epoch.

        Raises:
            UserError: a bad row, unless they are skipped; what can't be read; or an epoch with nothing to learn from.
        """
        waiting, bad = deque[tuple[SourcePlace, int, float, Counter[str], str]](), list[str]()
        now, used = Row(place, place, 0.0, None, None), place.epoch

        def rows() -> Iterator[tuple[Any, Any]]:
            nonlocal now
            for row in self.rows(place):
                now = row
                if row.place.epoch > used + 1:
                    raise self.nothing_to_learn(bad)
                if row.value is not None:
                    yield row.origin, row.value

        def prepared(origin: Any, row: dict[str, Any]) -> Prepared:
            document = prepare(row, self.source, self.tokenizer, self.train_on)
            if document.is_prompted and self.wants_text:
                raise UserError(f"{origin}: a chat or prompt; pretrain reads plain text, sft trains on chats")
            return document

        def pieces() -> Iterator[Prepared]:
            nonlocal used
            again = place
            for document in usable(rows(), prepared, self.skip_bad, bad):
                counted = Counter(document.counted) + Counter(rows=1 + len(bad), bad=len(bad))
                waiting.append((again, now.place.epoch, now.epochs, counted, "".join(bad[:1])))
                again, used = now.after, now.place.epoch
                bad.clear()
                yield from parts(document, self.tokenizer)

        encoded, dropped, again, learned = list[EncodedText](), Counter[str](), place, place.epoch
        for part, tokens in encode_parts(pieces(), self.tokenizer):
            encoded.append(tokens)
            if part.is_last:
                token, supervised = (np.concatenate([each[column] for each in encoded]) for column in (0, 1))
                here, epoch, epochs, counted, example = waiting.popleft()
                again = again if dropped else here
                counted += dropped + Counter(straddling=sum(each.straddling_count for each in encoded))
                encoded, dropped = [], Counter()
                if len(token) > 1:
                    learned = epoch
                    yield Document(again, epoch, epochs, token, supervised, part.is_prompted, counted, example)
                else:
                    dropped = counted + Counter(documents=1, without_targets=1)
                if epoch > learned + 1:
                    raise self.nothing_to_learn(bad)

    def nothing_to_learn(self, bad: list[str]) -> UserError:
        reason = "; ".join(["no token to learn from in an epoch", *bad[:1]])
        return UserError(f"{self.source.path}: {reason}")


class WholeSource:
    """A source that was encoded before, in the same terms; the documents of each epoch are shuffled."""

    def __init__(self, source: DataSource, number: int, config: RowsConfig, tokenizer: Tokenizer) -> None:
        is_text = isinstance(config, PretrainConfig)
        (self.held,) = load_dataset([source], tokenizer, config, is_text, is_shuffled=False).documents
        self.key, self.revision = (config.seed, SHUFFLE_WHOLE, number), ""
        self.digest = self.held.facts["digest"]
        self.usable = np.flatnonzero(np.diff(self.held.start) > 1)
        self.description = f"{source.path}, {len(self.usable):,} documents encoded before"

    def documents(self, place: SourcePlace) -> Iterator[Document]:
        """Every document from a place on, epoch after epoch."""
        epoch, first, held = place.epoch, place.row, self.held
        while True:
            order = np.random.default_rng((*self.key, epoch)).permutation(self.usable)
            for row in range(first, len(order)):
                inside = slice(held.start[order[row]], held.start[order[row] + 1])
                columns = held.token[inside], held.supervised[inside], bool(held.is_prompted[order[row]])
                yield Document(SourcePlace(epoch, row=row), epoch, epoch + row / len(order), *columns, Counter(rows=1))
            epoch, first = epoch + 1, 0


def ahead(documents: Iterator[Document]) -> Generator[Document]:
    """The same documents, which another thread reads and encodes meanwhile, a few chunks in advance."""
    chunks, is_over = queue.Queue[list[Document] | BaseException](CHUNKS_AHEAD), threading.Event()

    def put(chunk: list[Document] | BaseException) -> None:
        while not is_over.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=0.1)
                return

    def read() -> None:
        chunk, size = list[Document](), 0
        try:
            for document in documents:
                chunk.append(document)
                size += len(document.token)
                if size >= CHUNK_TOKENS:
                    put(chunk)
                    chunk, size = [], 0
                if is_over.is_set():
                    return
        except BaseException as error:
            put(chunk)
            put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            chunk = chunks.get()
            if isinstance(chunk, BaseException):
                raise chunk
            yield from chunk
    finally:
        is_over.set()


# Mixing


def next_source(taken: Sequence[int], weights: Sequence[int], sizes: Sequence[int]) -> int:
    """The source that gives the next piece, of which each has one of `sizes` slots to give.

    Worst-case fair weighted fair queueing (Bennett & Zhang 1996), in integers: of the sources that are not ahead of
    their share the one whose share comes first to the end of its piece. So what a source has given differs from its
    share by less than the longest piece, always.
    """
    total, weight = sum(taken), sum(weights)
    fair = [number for number, count in enumerate(taken) if count * weight <= weights[number] * total]
    return min(fair, key=lambda number: (Fraction(taken[number] + sizes[number], weights[number]), number))


class Line:
    """The documents of all sources in one line, taken piece by piece; `places` are where each source goes on."""

    def __init__(
        self, sources: Sequence[ShardedSource | WholeSource], weights: Sequence[int], places: Sequence[SourcePlace]
    ) -> None:
        self.weights, self.places, self.heads = weights, list(places), list[Document]()
        self.documents = [ahead(source.documents(place)) for source, place in zip(sources, places, strict=True)]

    def __enter__(self) -> "Line":
        self.heads = [next(documents) for documents in self.documents]
        return self

    def __exit__(self, *_: object) -> None:
        for documents in self.documents:
            documents.close()

    def take(self, limit: int, is_whole: bool) -> tuple[Document, int, int]:
        """The document that comes next, and from which slot to which it is taken: at most `limit` slots of it or, if it
        `is_whole`, all, which count as at most so many."""
        left = [len(head.token) - 1 - place.offset for head, place in zip(self.heads, self.places, strict=True)]
        sizes = [min(each, limit) for each in left]
        source = next_source([place.taken for place in self.places], self.weights, sizes)
        document, (*_, offset, taken) = self.heads[source], self.places[source]
        stop, taken = offset + (left if is_whole else sizes)[source], taken + sizes[source]
        if stop < len(document.token) - 1:
            self.places[source] = document.place._replace(offset=stop, taken=taken)
        else:
            self.heads[source] = next(self.documents[source])
            self.places[source] = self.heads[source].place._replace(offset=0, taken=taken)
        return document, offset, stop


# Rows


class Start(NamedTuple):
    """All that is needed to read on from a row: the places of the sources, how many times chats were packed, and what
    was counted."""

    row: int
    places: tuple[SourcePlace, ...]
    packings: int
    counted: Counter[str]


class StreamedData:
    """Rows whose documents are read and encoded while the steps run; to those who train, as a Dataset."""

    def __init__(self, config: RowsConfig, tokenizer: Tokenizer, saved: Mapping[str, Any]) -> None:
        self.length, self.seed, self.is_text = config.sequence_length, config.seed, isinstance(config, PretrainConfig)
        self.is_packed = config.packing if isinstance(config, ChatKeys) else True
        revisions = saved.get("revisions", [""] * len(config.data))
        self.sources = [
            ShardedSource(source, number, config, tokenizer, revisions[number])
            if source.streaming
            else WholeSource(source, number, config, tokenizer)
            for number, source in enumerate(config.data)
        ]
        self.digests = tuple(source.digest for source in self.sources)
        order = config.model_dump(include={"data", "sequence_length", "seed", "packing", "train_on", "on_bad_data"})
        named = content_hash([order, self.digests, encoder_digest(tokenizer, file_hash)])
        self.count_file = config.cache_dir / "counts" / named[:32]
        shares = [Fraction(str(source.weight)) for source in config.data]
        common = lcm(*(share.denominator for share in shares))
        self.weights = [int(share * common) for share in shares]
        start = Start(0, (SourcePlace(),) * len(self.sources), 0, Counter())
        self.starts = {0: (start, 0.0)}  # by the row that comes next, with the epochs over by then
        if saved:
            places = tuple(SourcePlace(*place) for place in saved["places"])
            start = Start(saved["row"], places, saved["packings"], Counter(saved["counted"]))
            self.starts[start.row] = start, 0.0
        self.facts, self.bad_examples = start.counted, list[str]()
        self.reading: Generator[tuple[list[Segment], Start, float]] | None = None
        self.next_row, self.made = 0, dict[tuple[int, int], Batch]()
        self.directory, self.begun = config.cache_dir / "shards", 0  # documents, since the start of this process

    @property
    def description(self) -> str:
        """What is read, in words."""
        return "; ".join(source.description for source in self.sources)

    @cached_property
    def epoch_rows(self) -> int:
        """Rows of an epoch of the first source, as `keep_count` kept them for the first process; 0 where it did not."""
        return int(from_first("rows of an epoch", self.count_file.read_text() if self.count_file.exists() else "0"))

    def keep_count(self, rows: int) -> None:
        """Keep how many rows an epoch of the first source has, for all runs that have the same."""
        self.count_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.count_file, str(rows))

    def row_count(self, epochs: int) -> int:
        """Rows of some epochs of the first source, each taken for as long as the first.

        Raises:
            UserError: nobody has counted them.
        """
        if not self.epoch_rows:
            raise UserError(
                "steps is required, as nobody has counted these streamed data: set steps to the tokens to train on / "
                "(batch_size × sequence_length), or run this command with --count once, after which epochs will do"
            )
        return epochs * self.epoch_rows

    def epochs_before(self, row: int) -> float:
        """Epochs of the first source that are over before a row, which was the end of a batch a short while ago."""
        return self.starts[row][1]

    def place(self, row: int) -> dict[str, Any]:
        """What is kept in a checkpoint to continue at a row, which was the end of a batch a short while ago."""
        return self.starts[row][0]._asdict() | {"revisions": [source.revision for source in self.sources]}

    def progress(self) -> Any:
        """What changes while a batch is waited for, as long as its documents or files come."""
        return self.begun, bytes_below(self.directory)

    def batch(self, index: int, batch_size: int, row_limit: int | None = None) -> Batch:
        """Batch `index` of a run. In order, each document is read once; any other batch has a window read again."""
        if (index, batch_size) not in self.made:
            first, end = index * batch_size, (index + 1) * batch_size
            rows, starts, epochs = zip(*map(self.row, range(first, end)), strict=True)
            self.starts[end] = starts[-1], epochs[-1]
            for old in sorted(self.starts)[1:-KEPT_PLACES]:
                del self.starts[old]
            self.made = {(index, batch_size): batch_of(rows, batch_size, self.length, not self.is_packed)}
        return self.made[index, batch_size]

    def row(self, row: int) -> tuple[list[Segment], Start, float]:
        """What a row of the run holds, where to read on after it, and the epochs over by then."""
        if self.reading is None or row != self.next_row:
            if self.reading:
                self.reading.close()
            start, _ = self.starts[max(known for known in self.starts if known <= row)]
            self.reading, self.next_row = (self.text_rows if self.is_text else self.chat_rows)(start), start.row
        while True:
            found = next(self.reading)
            self.next_row += 1
            if self.next_row > row:
                return found

    def text_rows(self, start: Start) -> Generator[tuple[list[Segment], Start, float]]:
        """Full rows, of documents that are cut wherever a row is full."""
        row, counted = start.row, Counter(start.counted)
        self.facts = counted
        with Line(self.sources, self.weights, start.places) as line:
            while True:
                segments, room = [], self.length
                while room:
                    document, begin, stop = line.take(room, is_whole=False)
                    if not begin:
                        self.count(document, counted)
                    inside = slice(begin, stop + 1)
                    segments.append((document.token[inside], document.supervised[inside]))
                    room -= stop - begin
                    learned = int(np.count_nonzero(document.supervised[begin + 1 : stop + 1]))
                    counted.update(documents=not begin, tokens=stop - begin, target_tokens=learned)
                row += 1
                yield segments, Start(row, tuple(line.places), 0, Counter(counted)), line.heads[0].epochs

    def chat_rows(self, start: Start) -> Generator[tuple[list[Segment], Start, float]]:
        """Rows of whole documents, as many packed together as are in a window, but never of two epochs."""
        row, packings, counted = start.row, start.packings, Counter(start.counted)
        self.facts = counted
        with Line(self.sources, self.weights, start.places) as line:
            while True:
                begin = Start(row, tuple(line.places), packings, Counter(counted))
                epochs, held, room = line.heads[0].epochs, list[Document](), PACKING_TOKENS
                epoch = [head.epoch for head in line.heads]
                while room > 0 and len(held) < PACKING_DOCUMENTS and epoch == [head.epoch for head in line.heads]:
                    held.append(line.take(self.length, is_whole=True)[0])
                    room -= len(held[-1].token)
                    self.count(held[-1], counted)
                token, supervised = (
                    np.concatenate([getattr(each, name) for each in held]) for name in Documents._fields[:2]
                )
                stop = np.cumsum([0, *(len(each.token) for each in held)])
                documents = Documents(token, supervised, stop, np.array([each.is_prompted for each in held]), {})
                pieces, facts = fit(documents, 0, self.length)
                counted.update(facts)
                if not facts["tokens"]:
                    raise UserError(f"no token to learn from in {len(held):,} samples ({describe(counted)})")
                once = Mixture((pieces.shape[1],), (1.0,), self.seed, is_shuffled=True)
                items, first = PackedRows(pieces, once, self.length, self.is_packed).plan(packings)
                packings += 1
                after = Start(row + len(first) - 1, tuple(line.places), packings, Counter(counted))
                for number in range(len(first) - 1):
                    row += 1
                    segments = segments_of(pieces[:, items[first[number] : first[number + 1]]], (documents,))
                    share = (number + 1) / (len(first) - 1)
                    epochs_over = epochs + share * (line.heads[0].epochs - epochs)
                    yield segments, after if row == after.row else begin, epochs_over

    def count(self, document: Document, counted: Counter[str]) -> None:
        """Count a document that is begun, and keep the first of the rows left out before it for the log."""
        self.begun += 1
        counted.update(document.counted)
        if document.bad and len(self.bad_examples) < SHOWN_BAD_ROWS:
            self.bad_examples.append(document.bad)


RowData = Dataset | StreamedData


def load_rows(config: RowsConfig, tokenizer: Tokenizer, place: Mapping[str, Any]) -> RowData:
    """The rows that a config trains on, from files to batches; if they are streamed, from a place on."""
    if config.is_streaming:
        return StreamedData(config, tokenizer, place)
    return load_dataset(config.data, tokenizer, config, isinstance(config, PretrainConfig), is_shuffled=True)
