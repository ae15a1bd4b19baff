"""Data: encoded documents packed into rows, and made into batches. Rows are a function of (seed, row) alone."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from lacuna.config import ChatKeys, DataSource, EvalConfig, RowsConfig, UserError
from lacuna.documents import Documents, load_documents
from lacuna.tokenizer import Tokenizer

SHUFFLE_PASS, SHUFFLE_EPOCH, SHUFFLE_ROWS = 1, 2, 3
BUCKETS = 8


class Batch(NamedTuple):
    """Packed rows, NumPy arrays until they are put on the devices. `weight` is 1 where the loss counts, `segment` is
    1, 2, … for each document and 0 for padding, `position` restarts at 0 with each document."""

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]


# Parts of documents, one a column: source, first token, end of its tokens, and the token that its loss counts from. A
# piece of n + 1 tokens takes n slots of a row, as each slot holds a token and its successor.
Pieces = Int[np.ndarray, "4 piece"]
# The tokens of a piece, and which of them the loss counts where they are targets.
Segment = tuple[np.ndarray, np.ndarray]


def slots_of(pieces: Pieces) -> Int[np.ndarray, " piece"]:
    _, start, stop, _ = pieces
    return stop - start - 1


# Documents to pieces


def fit(documents: Documents, source: int, length: int) -> tuple[Pieces, Counter[str]]:
    """Pieces of documents that fit rows of `length` slots, and what became of the rest.

    A text that is too long is split. A chat or prompt that is too long loses its left end, and what is left of an
    answer cut in two does not count; it is dropped if its last answer alone exceeds the row, as is any document
    without a target.
    """
    start, stop = documents.start[:-1], documents.start[1:]
    slots = stop - start - 1
    fits = (slots > 0) & (slots <= length)
    parts = [np.stack([start[fits], stop[fits], start[fits]])]
    facts = Counter(documents=len(slots), without_targets=int(np.sum(slots < 1)))
    for document in np.flatnonzero(slots > length):
        first, end = start[document], stop[document]
        context = first + np.flatnonzero(~documents.supervised[first:end])
        if not documents.is_prompted[document] or documents.supervised[first + 1 : end].all():
            begin = np.arange(first, end - 1, length)
            parts.append(np.stack([begin, np.minimum(begin + length + 1, end), begin]))
            facts["split"] += 1
        elif end - context[-1] - 1 > length:
            facts["answer_too_long"] += 1
            facts["targets_cut"] += int(np.count_nonzero(documents.supervised[first + 1 : end]))
        else:
            begin = end - length - 1
            loss_start = context[np.searchsorted(context, begin)]
            parts.append(np.array([[begin], [end], [loss_start]]))
            facts["prompt_cut"] += 1
            facts["targets_cut"] += int(np.count_nonzero(documents.supervised[first + 1 : loss_start]))
    supervised_count = np.count_nonzero(documents.supervised[documents.start[0] : documents.start[-1]])
    first_count = np.count_nonzero(documents.supervised[start[start < stop]])  # a first token is never a target
    facts["target_tokens"] = int(supervised_count - first_count - facts["targets_cut"])
    pieces = np.insert(np.concatenate(parts, axis=1), 0, source, axis=0)
    facts["tokens"] = int(slots_of(pieces).sum())
    return pieces, facts


# Pieces to rows


def first_fit(lengths: Int[np.ndarray, " piece"], capacity: int) -> Int[np.ndarray, " piece"]:
    """The row of each piece, the longest first: First-Fit-Decreasing (Johnson 1973), exactly.

    Pieces of one length are placed at once: the leftmost row takes as many as fit, and leaves the others to the next.
    """
    order = np.argsort(-lengths, kind="stable")
    room, row_of, row_count = np.full(len(lengths), capacity), np.empty(len(lengths), np.int32), 0
    longest_first, first, counts = np.unique(-lengths[order], return_index=True, return_counts=True)
    for length, begin, count in zip(-longest_first, first, counts, strict=True):
        new_row_count = math.ceil(count / (capacity // length))
        rows = np.flatnonzero(room[: row_count + new_row_count] >= length)[:count]
        fitting = room[rows] // length
        left_over = count - (np.cumsum(fitting) - fitting)  # by the rows before
        taken = np.clip(left_over, 0, fitting)
        room[rows] -= taken * length
        row_of[order[begin : begin + count]] = placed = np.repeat(rows, taken)
        row_count = max(row_count, placed[-1] + 1)
    return row_of


@dataclass(frozen=True)
class Mixture:
    """The order in which epochs take the pieces of several sources, numbered one source after the other."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    is_shuffled: bool

    def size(self, epochs: int) -> int:
        """Pieces that the first `epochs` epochs take."""
        pairs = zip(self.counts, self.weights, strict=True)
        return sum(math.ceil(epochs * Fraction(str(weight)) * count) for count, weight in pairs)

    def epoch(self, epoch: int) -> Int[np.ndarray, " item"]:
        """Numbers of an epoch's pieces: of each source the next weight × count of an endless line of passes."""
        items, before = [np.zeros(0, np.int64)], 0
        for source, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            share = Fraction(str(weight)) * count
            first, end = math.ceil(epoch * share), math.ceil((epoch + 1) * share)
            for number in range(first // count, math.ceil(end / count)):
                shuffled = self.order(count, SHUFFLE_PASS, source, number)
                items.append(before + shuffled[max(first - number * count, 0) : end - number * count])
            before += count
        mixed = np.concatenate(items)
        return mixed[self.order(len(mixed), SHUFFLE_EPOCH, epoch)]

    def order(self, count: int, *names: int) -> Int[np.ndarray, " item"]:
        """A permutation that is a function of the seed and `names` alone."""
        return np.random.default_rng([self.seed, *names]).permutation(count) if self.is_shuffled else np.arange(count)


def locate(place: int, size_of: Callable[[int], int]) -> tuple[int, int]:
    """The epoch that a place in the run lies in, and the place in that epoch; `size_of` an epoch counts its places."""
    epoch = 0
    while place >= size_of(epoch):
        place -= size_of(epoch)
        epoch += 1
    return epoch, place


def epochs_before(place: int, size_of: Callable[[int], int]) -> float:
    """Epochs that are over at a place in the run, with the fraction of its own."""
    epoch, place = locate(place, size_of)
    return epoch + place / size_of(epoch)


class PackedRows:
    """Rows of whole pieces, packed again in each epoch; if not `is_packed`, a row holds one piece."""

    def __init__(self, pieces: Pieces, mixture: Mixture, length: int, is_packed: bool) -> None:
        self.pieces, self.mixture, self.length, self.is_packed = pieces, mixture, length, is_packed
        self.plan = lru_cache(maxsize=2)(self._plan)
        self.size_of = cache(lambda epoch: len(self.plan(epoch)[1]) - 1)

    def _plan(self, epoch: int) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " boundary"]]:
        """The epoch's pieces, row after row, and where each row begins among them."""
        items = self.mixture.epoch(epoch)
        row_of = first_fit(slots_of(self.pieces)[items], self.length) if self.is_packed else np.arange(len(items))
        row_of = self.mixture.order(int(row_of.max(initial=-1)) + 1, SHUFFLE_ROWS, epoch)[row_of]
        return items[np.argsort(row_of, kind="stable")], np.append(0, np.cumsum(np.bincount(row_of)))

    def row_count(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs."""
        return sum(map(self.size_of, range(epochs)))

    def slot_count(self, epoch: int) -> int:
        """Slots of an epoch that hold a token."""
        return int(slots_of(self.pieces)[self.plan(epoch)[0]].sum())

    def epochs_before(self, row: int) -> float:
        """Epochs that are over before a row of the run."""
        return epochs_before(row, self.size_of)

    def pieces_of(self, row: int) -> Pieces:
        """What a row of the run holds."""
        epoch, row = locate(row, self.size_of)
        items, start = self.plan(epoch)
        return self.pieces[:, items[start[row] : start[row + 1]]]


class StreamRows:
    """Rows that are always full: the documents of all epochs in one line of slots, cut wherever a row is full."""

    def __init__(self, pieces: Pieces, mixture: Mixture, length: int) -> None:
        self.pieces, self.mixture, self.length = pieces, mixture, length
        self.plan = lru_cache(maxsize=2)(self._plan)
        self.order = lru_cache(maxsize=2)(mixture.order)
        self.size_of = cache(lambda epoch: int(self.plan(epoch)[1][-1]))

    def _plan(self, epoch: int) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " boundary"]]:
        """The epoch's documents, and the slot of the epoch where each begins."""
        items = self.mixture.epoch(epoch)
        return items, np.append(0, np.cumsum(slots_of(self.pieces)[items]))

    def row_count(self, epochs: int) -> int:
        """Full rows of the first `epochs` epochs, but one at least."""
        return max(1, sum(map(self.size_of, range(epochs))) // self.length)

    def epochs_before(self, row: int) -> float:
        """Epochs that are over before a row of the run."""
        return epochs_before(row * self.length, self.size_of)

    def pieces_of(self, row: int) -> Pieces:
        """What a row of the run holds."""
        place = self.shuffled(row) * self.length
        end, parts = place + self.length, []
        while place < end:
            epoch, slot = locate(place, self.size_of)
            stop_slot = min(slot + end - place, self.size_of(epoch))
            items, begin = self.plan(epoch)
            inside = slice(np.searchsorted(begin, slot, "right") - 1, np.searchsorted(begin, stop_slot))
            source, first, stop, _ = self.pieces[:, items[inside]]
            start = first + np.maximum(slot - begin[inside], 0)
            stop = np.minimum(first + stop_slot - begin[inside] + 1, stop)
            parts.append(np.stack([source, start, stop, start]))
            place += stop_slot - slot
        return np.concatenate(parts, axis=1)

    def shuffled(self, row: int) -> int:
        """The row of the line that is taken as row `row`: those that lie within one epoch trade places."""
        epoch, slot = locate(row * self.length, self.size_of)
        before = row * self.length - slot
        first, end = math.ceil(before / self.length), (before + self.size_of(epoch)) // self.length
        return first + int(self.order(end - first, SHUFFLE_ROWS, epoch)[row - first]) if row < end else row


@dataclass(frozen=True)
class Dataset:
    """Rows to train or evaluate on, the documents they are cut from, and what was counted on the way."""

    rows: PackedRows | StreamRows
    documents: tuple[Documents, ...]
    facts: Counter[str]

    @property
    def bad_examples(self) -> list[str]:
        """Where and why the first of the bad rows of each source could not be used."""
        return [example for documents in self.documents for example in documents.facts["bad_examples"]]

    @property
    def digests(self) -> tuple[str, ...]:
        """A hash of the content of each source."""
        return tuple(documents.facts["digest"] for documents in self.documents)

    @property
    def description(self) -> str:
        """What was counted and how full the rows are, in words."""
        row_count = self.rows.row_count(1)
        fill = f"{row_count:,} full rows an epoch"
        if isinstance(self.rows, PackedRows):
            share = self.rows.slot_count(0) / (row_count * self.rows.length)
            fill = f"{row_count:,} rows an epoch, {share:.2%} of their slots filled"
        return f"{describe(self.facts)}; {fill}"

    def row_count(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs."""
        return self.rows.row_count(epochs)

    def epochs_before(self, row: int) -> float:
        """Epochs that are over before a row of the run."""
        return self.rows.epochs_before(row)

    def place(self, row: int) -> dict[str, Any]:
        """What is kept to continue at a row of the run: nothing, as rows are found by their numbers."""
        return {}

    def progress(self) -> Any:
        """What changes while a batch is waited for: nothing, as all is here."""

    def batch(self, index: int, batch_size: int, row_limit: int | None = None) -> Batch:
        """Batch `index` of a run; rows from `row_limit` on are empty. Unpacked rows have the least of eight lengths."""
        first, end = index * batch_size, (index + 1) * batch_size
        rows = [self.row(row) for row in range(first, end if row_limit is None else min(end, row_limit))]
        is_unpacked = isinstance(self.rows, PackedRows) and not self.rows.is_packed
        return batch_of(rows, batch_size, self.rows.length, is_unpacked)

    def row(self, row: int) -> list[Segment]:
        """What a row of the run holds."""
        return segments_of(self.rows.pieces_of(row), self.documents)


def segments_of(pieces: Pieces, documents: Sequence[Documents]) -> list[Segment]:
    """The tokens of pieces, and which of them the loss counts."""
    found = []
    for source, start, stop, loss_start in pieces.T.tolist():
        token, supervised = (column[start:stop] for column in documents[source][:2])
        found.append((token, supervised & (np.arange(start, stop) >= loss_start)))
    return found


def batch_of(rows: Sequence[Sequence[Segment]], batch_size: int, length: int, is_unpacked: bool) -> Batch:
    """A batch of `batch_size` rows, of which those that are not given are empty. Unpacked rows have the least of eight
    lengths."""
    if is_unpacked:
        longest = max((len(token) - 1 for row in rows for token, _ in row), default=1)
        bucket = math.ceil(length / BUCKETS)
        length = min(length, math.ceil(longest / bucket) * bucket)
    shape = batch_size, length
    arrays: Any = [np.zeros(shape, np.float32 if name == "weight" else np.int32) for name in Batch._fields]
    batch = Batch(*arrays)
    for row, segments in enumerate(rows):
        slot = 0
        for number, (token, is_learned) in enumerate(segments, 1):
            here = (row, slice(slot, slot := slot + len(token) - 1))
            batch.token[here], batch.target[here], batch.weight[here] = token[:-1], token[1:], is_learned[1:]
            batch.segment[here], batch.position[here] = number, np.arange(len(token) - 1)
    return batch


def batch_facts(batch: Batch) -> tuple[dict[str, Any], Int[np.ndarray, " document"]]:
    """What is logged of a batch, and the lengths of its documents."""
    lengths = np.concatenate([np.bincount(row)[1:] for row in batch.segment]).astype(np.int64)
    tokens, targets = int(lengths.sum()), int(batch.weight.sum())
    return {"tokens": tokens, "target_tokens": targets, "packing_efficiency": tokens / batch.token.size}, lengths


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
        loaded = load_documents(
            source, tokenizer, train_on, config.on_bad_data == "skip", config.cache_dir, config.verify_data
        )
        if is_stream and loaded.is_prompted.any():
            raise UserError(f"{source.path} holds chats or prompts; pretrain reads plain text, sft trains on chats")
        pieces, counted = fit(loaded, number, sys.maxsize if is_stream else config.sequence_length)
        counted.update({key: loaded.facts[key] for key in ("rows", "from_cache", "bad", "outside")})
        counted.update(loaded.facts["counted"])
        if not counted["target_tokens"]:
            reason = "; ".join([describe(counted), *loaded.facts["bad_examples"][:1]])
            raise UserError(f"{source.path}, {source.split}: no token to learn from ({reason})")
        documents.append(loaded)
        parts.append(pieces)
        facts += counted
    weights = tuple(source.weight for source in sources)
    pieces, length = np.concatenate(parts, axis=1), config.sequence_length
    mixture = Mixture(tuple(part.shape[1] for part in parts), weights, config.seed, is_shuffled)
    rows = StreamRows(pieces, mixture, length) if is_stream else PackedRows(pieces, mixture, length, is_packed)
    return Dataset(rows, tuple(documents), facts)


WORDING = {
    "rows": "rows read",
    "from_cache": "of them from the cache",
    "bad": "bad rows left out",
    "straddling": "tokens on the edge of an answer left unsupervised",
    "thoughts": "thoughts, or texts beside calls, left out by the chat template",
    "chats": "chats",
    "prompts_as_chats": "prompts with completions as chats",
    "prompts_as_text": "prompts with completions as text",
    "texts": "texts",
    "sharegpt": "of them ShareGPT's",
    "alpaca": "of them Alpaca's",
    "outside": "of them outside the slice",
    "documents": "samples",
    "without_targets": "samples without a supervised token dropped",
    "answer_too_long": "samples dropped, as the last answer alone is longer than a row",
    "prompt_cut": "prompts cut from the left",
    "targets_cut": "supervised tokens lost with them",
    "split": "texts split over rows",
    "tokens": "tokens",
    "target_tokens": "supervised",
}


def describe(facts: Mapping[str, int]) -> str:
    """What was counted, in words."""
    share = f" ({facts['target_tokens'] / facts['tokens']:.1%})" if facts.get("tokens") else ""
    unused = [key.removeprefix("unused ") for key in facts if key.startswith("unused ")]
    note = f"; not used: {', '.join(unused)}" if unused else ""
    return ", ".join(f"{facts[key]:,} {words}" for key, words in WORDING.items() if facts.get(key)) + share + note
