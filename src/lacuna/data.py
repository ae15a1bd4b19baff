"""Data: documents to pieces that fit a row, pieces to packed rows, rows to batches.

All of it is a pure function of (seed, row number): the place in the data needs no state but the step.
"""

import hashlib
import math
import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.text import Text

from lacuna.config import ChatKeys, DataSource, EvalConfig, RowsConfig, UserError
from lacuna.documents import Documents, load_documents
from lacuna.tokenizer import Tokenizer, decode

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


def joined(parts: Iterable[Pieces]) -> Pieces:
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
        return joined(parts)

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
    page: RowsConfig | EvalConfig,
    is_stream: bool,
    is_shuffled: bool,
) -> Dataset:
    """Everything from files to rows; `is_stream` cuts plain text into full rows, as pretraining does.

    Raises:
        UserError: unreadable or bad data with file and line, or nothing to learn from.
    """
    train_on, is_packed = (page.train_on, page.packing) if isinstance(page, ChatKeys) else ("all", True)
    documents, parts, facts = [], [], Counter[str]()
    for number, source in enumerate(sources):
        loaded = load_documents(source, tokenizer, train_on, page.on_bad_data == "skip", page.cache_dir)
        if is_stream and loaded.is_prompted.any():
            raise UserError(f"{source.path} holds chats or prompts; pretrain reads plain text, sft trains on chats")
        pieces, counted = whole(loaded, number) if is_stream else fit(loaded, number, page.sequence_length)
        counted.update({key: loaded.facts[key] for key in ("rows", "bad", "straddling")})
        counted["from_cache"] = loaded.facts["rows"] * loaded.facts["is_cached"]
        if not counted["target_tokens"]:
            reason = "; ".join([describe(counted), *loaded.facts["bad_examples"][:1]])
            raise UserError(f"{source.path}, {source.split}: no token to learn from ({reason})")
        documents.append(loaded)
        parts.append(pieces)
        facts += counted
    counts = tuple(len(each.start) for each in parts)
    mixture = Mixture(counts, tuple(source.weight for source in sources), page.seed, is_shuffled)
    if is_stream:
        rows = StreamRows(joined(parts), mixture, page.sequence_length)
    else:
        rows = PackedRows(joined(parts), mixture, page.sequence_length, is_packed, page.cache_dir)
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
