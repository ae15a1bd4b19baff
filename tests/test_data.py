"""Documents to rows and batches, against brute force and plain statements of what each should hold."""

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacuna.apps.show import coloured
from lacuna.config import PretrainConfig, SftConfig, UserError
from lacuna.data import (
    Dataset,
    Mixture,
    PackedRows,
    Pieces,
    StreamRows,
    describe,
    first_fit,
    fit,
    load_dataset,
    slots_of,
)
from lacuna.documents import Documents
from lacuna.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


# Documents to rows

Mask = list[bool]
masks = st.lists(st.booleans(), min_size=1, max_size=24)
corpora = st.lists(st.lists(masks, min_size=1, max_size=8), min_size=1, max_size=3)
SHORT = [False, True]  # fits every row
DOCUMENT = 100  # token d * DOCUMENT + i is token i of document d


def documents_of(masks: list[Mask], is_prompted: bool = True, first: int = 0) -> Documents:
    """Documents with these supervised tokens, each ending with its last; no token occurs twice."""
    ends = [max((place + 1 for place, learned in enumerate(mask) if learned), default=0) for mask in masks]
    token = [(first + number) * DOCUMENT + place for number, end in enumerate(ends) for place in range(end)]
    supervised = [learned for mask, end in zip(masks, ends, strict=True) for learned in mask[:end]]
    start = np.cumsum([0, *ends])
    return Documents(np.array(token, np.int32), np.array(supervised, bool), start, np.full(len(masks), is_prompted), {})


def texts_of(sizes: list[int]) -> Documents:
    return documents_of([[True] * size for size in sizes], is_prompted=False)


def mixed(parts: Sequence[Pieces], weights: tuple[float, ...] = (), seed: int = 0, is_shuffled: bool = True) -> Mixture:
    return Mixture(tuple(each.shape[1] for each in parts), weights or (1.0,) * len(parts), seed, is_shuffled)


def packed_data(documents: list[Documents], length: int, is_packed: bool = True, **mixture: Any) -> Dataset:
    pieces, facts = zip(*(fit(each, number, length) for number, each in enumerate(documents)), strict=True)
    rows = PackedRows(np.concatenate(pieces, axis=1), mixed(pieces, **mixture), length, is_packed)
    return Dataset(rows, tuple(documents), sum(facts, Counter()))


def stream_data(documents: list[Documents], length: int, **mixture: Any) -> Dataset:
    pieces, facts = zip(*(fit(each, number, sys.maxsize) for number, each in enumerate(documents)), strict=True)
    return Dataset(
        StreamRows(np.concatenate(pieces, axis=1), mixed(pieces, **mixture), length),
        tuple(documents),
        sum(facts, Counter()),
    )


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The row of each piece: longest first, into the leftmost row with room, looking at one row after another."""
    room: list[int] = []
    row_of = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        with_room = (row for row, free in enumerate(room) if free >= lengths[piece])
        row_of[piece] = next(with_room, len(room))
        if row_of[piece] == len(room):
            room.append(capacity)
        room[row_of[piece]] -= lengths[piece]
    return row_of


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=120))))
def test_packing_is_first_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert first_fit(np.array(lengths, np.int64), capacity).tolist() == first_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [64, 512, 2048])
def test_packing_of_many_pieces_is_first_fit_decreasing(capacity: int) -> None:
    drawn = np.random.default_rng(capacity).lognormal(math.log(200) - 0.5, 1, 4000)
    lengths = np.clip(drawn.astype(np.int64), 1, capacity)
    row_of = first_fit(lengths, capacity)
    assert row_of.tolist() == first_fit_decreasing(lengths.tolist(), capacity)
    assert np.bincount(row_of, lengths).max() <= capacity


weights = st.decimals("0.01", 3, places=2)


@example([(100, Decimal("0.07")), (100, Decimal("0.29"))], 100, True)  # 0.07 * 100 > 7, and 0.29 * 100 < 29
@given(st.lists(st.tuples(st.integers(1, 12), weights), min_size=1, max_size=3), st.integers(1, 12), st.booleans())
def test_a_weight_is_the_number_of_passes_an_epoch(
    sources: list[tuple[int, Decimal]], epochs: int, is_shuffled: bool
) -> None:
    counts, passes = zip(*sources, strict=True)
    mixture = Mixture(counts, tuple(map(float, passes)), 0, is_shuffled)
    seen = Counter(item for epoch in range(epochs) for item in mixture.epoch(epoch).tolist())
    first = 0
    for count, weight in sources:
        for item in range(first, first + count):
            assert math.floor(epochs * weight) <= seen[item] <= math.ceil(epochs * weight)
        first += count
    assert seen.total() == sum(math.ceil(epochs * weight * count) for count, weight in sources)


def rows_of(dataset: Dataset, rows: Any) -> list[list[list[int]]]:
    return [[column.tolist() for column in dataset.rows.pieces_of(row)] for row in rows]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_row_depends_on_seed_and_number_alone(is_stream: bool) -> None:
    sizes = np.random.default_rng(0).integers(2, 40, (2, 60)).tolist()

    def fresh(seed: int = 0, is_shuffled: bool = True) -> Dataset:
        mixture: dict[str, Any] = {"weights": (1.0, 0.37), "seed": seed, "is_shuffled": is_shuffled}
        documents = [texts_of(each) for each in sizes]
        return stream_data(documents, 32, **mixture) if is_stream else packed_data(documents, 32, **mixture)

    count = fresh().rows.row_count(5)
    assert count > 100
    in_order = rows_of(fresh(), range(count))
    for order in (range(count - 1, -1, -1), np.random.default_rng(1).permutation(count).tolist()):
        for place, row in zip(order, rows_of(fresh(), order), strict=True):
            assert row == in_order[place]
    epoch = fresh().rows.row_count(1)
    assert in_order[:epoch] != in_order[epoch : 2 * epoch]
    assert in_order[:epoch] != rows_of(fresh(seed=1), range(epoch))
    assert rows_of(fresh(0, False), range(epoch)) == rows_of(fresh(1, False), range(epoch))


@settings(max_examples=50)
@given(corpora, st.integers(2, 12), st.booleans(), st.integers(1, 4))
def test_a_segment_is_one_document_and_its_own_successor(
    corpus: list[list[Mask]], length: int, is_packed: bool, batch_size: int
) -> None:
    documents = [documents_of([*each, SHORT], number % 2 == 0, 1 + 9 * number) for number, each in enumerate(corpus)]
    dataset = packed_data(documents, length, is_packed)
    count = dataset.rows.row_count(1)
    for index in range(-(-count // batch_size)):
        batch = dataset.batch(index, batch_size, count)
        for row in range(batch_size):
            token, target, weight, segment, position = (column[row] for column in batch)
            used = int((segment > 0).sum())
            assert not any(column[used:].any() for column in (token, target, weight, segment, position))
            assert not weight[segment == 0].any()
            last = 0
            for number in range(1, segment.max() + 1):
                here = np.flatnonzero(segment == number)
                assert here.tolist() == list(range(last, last := last + len(here)))
                assert position[here].tolist() == list(range(len(here)))
                assert target[here[:-1]].tolist() == token[here[1:]].tolist()
                assert target[here].tolist() == (token[here] + 1).tolist()
                assert len({int(each) // DOCUMENT for each in (*token[here], *target[here])}) == 1
            assert last == used


def expected_targets(mask: Mask, length: int, is_prompted: bool) -> tuple[str, list[int]]:
    """What becomes of a document, and the tokens that are learned of it."""
    learned = [place for place in range(1, len(mask)) if mask[place]]
    if not learned:
        return "without_targets", []
    end = learned[-1]
    if end <= length:
        return "", learned
    if not is_prompted or len(learned) == end:
        return "split", learned
    answer_start = {
        place: max(each for each in range(-1, place) if each < 0 or not mask[each]) + 1 for place in learned
    }
    if end + 1 - answer_start[end] > length:
        return "answer_too_long", []
    return "prompt_cut", [place for place in learned if answer_start[place] > end - length]


@settings(max_examples=200)
@given(st.lists(masks, min_size=1, max_size=6), st.integers(1, 12), st.booleans())
def test_what_is_too_long_is_cut_split_or_dropped_and_counted(
    corpus: list[Mask], length: int, is_prompted: bool
) -> None:
    corpus = [*corpus, SHORT]
    dataset = packed_data([documents_of(corpus, is_prompted)], length)
    learned, slots = [], 0
    for row in range(dataset.rows.row_count(1)):
        batch = dataset.batch(row, 1)
        learned += batch.target[batch.weight > 0].tolist()
        slots += int((batch.segment > 0).sum())
    fates, targets = zip(*(expected_targets(mask, length, is_prompted) for mask in corpus), strict=True)
    expected = [number * DOCUMENT + place for number, places in enumerate(targets) for place in places]
    assert sorted(learned) == expected
    counted = {name: fates.count(name) for name in ("without_targets", "split", "answer_too_long", "prompt_cut")}
    assert counted == {name: dataset.facts[name] for name in counted}
    lost = sum(sum(mask[1:]) for mask in corpus) - len(expected)
    totals = {"documents": len(corpus), "target_tokens": len(expected), "tokens": slots, "targets_cut": lost}
    assert totals == {name: dataset.facts[name] for name in totals}


def test_what_is_cut_keeps_as_much_context_as_fits() -> None:
    #                     question       answer        question       answer
    mask = [False] * 5 + [True] * 4 + [False] * 3 + [True] * 2
    pieces, _ = fit(documents_of([mask]), 0, 6)
    assert [column.tolist() for column in pieces] == [[0], [7], [14], [9]]  # the answer from 5 on is cut at 7


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 12))
def test_the_pieces_of_a_text_make_the_text(sizes: list[int], length: int) -> None:
    texts = texts_of(sizes)
    pieces, _ = fit(texts, 0, length)
    assert slots_of(pieces).max(initial=0) <= length
    made = {number * DOCUMENT for number, size in enumerate(sizes) if size > 1}
    for start, stop in sorted(zip(*pieces[1:3], strict=True)):
        piece = texts.token[start:stop].tolist()
        assert piece[0] in made and made.isdisjoint(piece[1:])
        made.update(piece)
    assert made == {number * DOCUMENT + place for number, size in enumerate(sizes) if size > 1 for place in range(size)}


@given(st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=5), min_size=1, max_size=2), st.integers(1, 40))
def test_a_stream_is_full_rows_of_each_slot_once_an_epoch(sizes: list[list[int]], length: int) -> None:
    dataset = stream_data([texts_of(each) for each in sizes], length)
    slots = {
        (source, start + place)
        for source, (documents, lengths) in enumerate(zip(dataset.documents, sizes, strict=True))
        for start, size in zip(documents.start[:-1].tolist(), lengths, strict=True)
        for place in range(size - 1)
    }
    row_count = dataset.rows.row_count(4)
    assert row_count == max(1, 4 * len(slots) // length)
    seen: dict[int, list[tuple[int, int]]] = {}
    for row in range(row_count):
        batch = dataset.batch(row, 1)
        assert batch.segment.all() and batch.weight.all()
        pieces = zip(*(column.tolist() for column in dataset.rows.pieces_of(row)), strict=True)
        here = [(source, slot) for source, start, stop, _ in pieces for slot in range(start, stop - 1)]
        for place, slot in enumerate(here, row * length):
            seen.setdefault(place // len(slots), []).append(slot)
        assert dataset.rows.epochs_before(row) == pytest.approx(row * length / len(slots))
    for epoch in range(row_count * length // len(slots)):
        assert len(seen[epoch]) == len(slots) and set(seen[epoch]) == slots


def test_a_stream_of_one_text_is_shuffled_by_rows() -> None:
    dataset = stream_data([texts_of([82])], 8)
    first = [dataset.rows.pieces_of(row)[1, 0] for row in range(20)]
    assert sorted(first[:10]) == list(range(0, 80, 8)) != first[:10]
    assert dataset.rows.pieces_of(10)[1].tolist() == [80, 0]  # where an epoch ends and the next begins
    assert sorted(first[11:]) == list(range(7, 79, 8))
    assert np.argsort(first[:9]).tolist() != np.argsort(first[11:]).tolist()


@settings(max_examples=50)
@given(st.lists(st.integers(3, 70), max_size=12), st.integers(2, 64), st.integers(1, 5))
def test_without_packing_a_row_is_one_document_in_one_of_eight_lengths(
    sizes: list[int], length: int, batch_size: int
) -> None:
    sizes = [*sizes, 3]
    dataset = packed_data([documents_of([[False] * 2 + [True] * (size - 2) for size in sizes])], length, False)
    kept = sorted(min(size - 1, length) for size in sizes if size - 2 <= length)
    count, found, widths = dataset.rows.row_count(1), [], set()
    assert count == len(kept)
    for index in range(-(-count // batch_size)):
        batch = dataset.batch(index, batch_size, count)
        assert batch.segment.max() == 1
        found += batch.segment.sum(axis=1).tolist()
        width, longest = batch.token.shape[1], batch.segment.sum(axis=1).max()
        assert longest <= width <= length and (width < longest + -(-length // 8))
        widths.add(width)
    assert sorted(size for size in found if size) == kept
    assert all(width == length or width % -(-length // 8) == 0 for width in widths)


def test_rows_after_the_limit_are_empty() -> None:
    dataset = packed_data([texts_of([5] * 10)], 4)
    assert dataset.rows.row_count(1) == 10
    batches = [dataset.batch(index, 4, 10) for index in range(3)]
    assert [int((batch.segment > 0).any(axis=1).sum()) for batch in batches] == [4, 4, 2]
    assert sum(float(batch.weight.sum()) for batch in batches) == dataset.facts["target_tokens"] == 40
    assert not batches[-1].token[2:].any() and not batches[-1].weight[2:].any()
    assert dataset.batch(2, 4).weight.all()  # without a limit the next epoch follows
    assert dataset.rows.epochs_before(15) == 1.5
    assert isinstance(dataset.rows, PackedRows) and dataset.rows.slot_count(0) == 40


# Whole data sets, with the tokenizer of the tiny configs


def dialogue(question: str, *rest: str) -> str:
    roles = ("user", "assistant") * len(rest)
    turns = zip(roles, (question, *rest), strict=False)
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def dataset_of(tmp_path: Path, *lines: str, is_stream: bool = False, **settings: Any) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    options = {"model_name": "unused", "run_name": "run", "sequence_length": 16}
    options["data"] = ({"path": str(path), "prompt_format": "text"},)
    config = (PretrainConfig if is_stream else SftConfig)(**options | settings)
    return load_dataset(config.data, load_tokenizer(TINY), config, is_stream, is_shuffled=not is_stream)


def test_the_answers_of_chats_are_learned_and_coloured(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, dialogue("How many?", "3 jars.", "And now?", "24."), sequence_length=64)
    batch = dataset.batch(0, 1)
    text = coloured(batch, 0, load_tokenizer(TINY), has_marks=False)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
    assert green == "3 jars.<|im_end|>24.<|im_end|>"
    dim = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "dim")
    assert "How many?" in dim and "And now?" in dim and "24" not in dim
    assert int(batch.weight.sum()) == dataset.facts["target_tokens"]


def test_rows_that_would_control_the_terminal_are_shown_as_text(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, dialogue("\x1b[2J\x1b]0;title\x07\x9b2J\r", "o\tk\n\x1b[31m"), sequence_length=64)
    shown = coloured(dataset.batch(0, 1), 0, load_tokenizer(TINY), has_marks=True).plain
    assert "\\x1b[2J\\x1b]0;title\\x07\\x9b2J\\r" in shown and "⟦o\tk\n\\x1b[31m" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r"}


def test_what_was_counted_is_described_in_words(tmp_path: Path) -> None:
    lines = (
        dialogue("Hi", "3"),
        dialogue("How many stones does Ben have in the end? " * 2, "4"),
        dialogue("Hi", "3 + 4 = 7. " * 9),
        "{",
    )
    first = describe(dataset_of(tmp_path, *lines, on_bad_data="skip").facts)
    again = describe(dataset_of(tmp_path, *lines, on_bad_data="skip").facts)
    assert first.startswith(
        "4 rows read, 1 bad rows left out, 3 chats, 3 samples, 1 samples dropped, as the last answer alone is"
    )
    assert "1 prompts cut from the left" in first and " supervised (" in first
    assert again == first.replace("4 rows read", "4 rows read, 4 of them from the cache")
    sliced = Counter(rows=9, texts=9, outside=2, documents=7, tokens=8, target_tokens=4)
    assert describe(sliced).startswith("9 rows read, 9 texts, 2 of them outside the slice, 7 samples, 8 tokens, 4 ")


def tokens_and_mask(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], Mask]:
    """The tokens of a row and which are supervised, from the pieces of its text, up to the last that is supervised."""
    if "messages" in row:
        headers = [f"<|im_start|>{message['role']}\n" for message in row["messages"]]
        pieces = [
            piece
            for header, message in zip(headers, row["messages"], strict=True)
            for piece in (
                (header, False), (f"{message['content']}<|im_end|>", message["role"] == "assistant"), ("\n", False)
            )
        ]  # fmt: skip
    else:
        pieces = [(row.get("prompt", ""), False), (row.get("completion", row.get("text", "")) + "<|im_end|>", True)]
    encoding = tokenizer.backend.encode("".join(text for text, _ in pieces), add_special_tokens=False)
    learned = [is_learned for text, is_learned in pieces for _ in text]
    mask = [all(learned[start:end]) for start, end in encoding.offsets]
    end = max(place + 1 for place, is_learned in enumerate(mask) if is_learned)
    return encoding.ids[:end], mask[:end]


@pytest.mark.parametrize("length", [16, 48])
def test_what_is_counted_is_what_the_raw_rows_hold(tmp_path: Path, tokenizer: Tokenizer, length: int) -> None:
    random = np.random.default_rng(length)

    def words(most: int) -> str:
        return "".join(f"Ben has {random.integers(99)} jars. " for _ in range(random.integers(1, most))).strip()

    rows: list[dict[str, Any]] = []
    for number in range(60):
        turns = [{"role": "user", "content": words(4)}, {"role": "assistant", "content": words(3)}]
        kinds = {"messages": turns * (1 + number % 3)}, {"prompt": words(5), "completion": words(3)}, {"text": words(9)}
        rows.append(kinds[random.integers(3)])
    bad = ["{", "[]", json.dumps({"messages": []}), json.dumps({"text": 7})]
    lines = random.permutation([*map(json.dumps, rows), *bad]).tolist()
    dataset = dataset_of(tmp_path, *lines, on_bad_data="skip", sequence_length=length)

    masks = [tokens_and_mask(row, tokenizer)[1] for row in rows]
    fates, targets = zip(
        *(expected_targets(mask, length, "text" not in row) for mask, row in zip(masks, rows, strict=True)), strict=True
    )
    kept = [
        (length if fate == "prompt_cut" else 0 if fate in ("answer_too_long", "without_targets") else len(mask) - 1)
        for fate, mask in zip(fates, masks, strict=True)
    ]
    target_count = sum(map(len, targets))
    expected = {"rows": 64, "bad": 4, "documents": 60, "tokens": sum(kept), "target_tokens": target_count}
    expected |= {fate: fates.count(fate) for fate in ("answer_too_long", "prompt_cut", "split")}
    expected |= {"chats": sum("messages" in row for row in rows), "texts": sum("text" in row for row in rows)}
    expected |= {"prompts_as_text": sum("prompt" in row for row in rows)}
    expected |= {"targets_cut": sum(sum(mask[1:]) for mask in masks) - target_count}
    assert dict(dataset.facts) == {name: count for name, count in expected.items() if count}
    assert len([count for count in expected.values() if count]) >= 11
    assert len(dataset.bad_examples) == 4 and all("rows.jsonl line " in example for example in dataset.bad_examples)

    pieces = [size for slots in kept for size in (length,) * (slots // length) + (slots % length,) if size]
    row_count = max(first_fit_decreasing(pieces, length)) + 1
    batches = [dataset.batch(row, 1) for row in range(row_count)]
    assert dataset.rows.row_count(1) == row_count
    assert isinstance(dataset.rows, PackedRows) and dataset.rows.slot_count(0) == sum(kept)
    assert sum(int((batch.segment > 0).sum()) for batch in batches) == sum(kept)
    assert sum(float(batch.weight.sum()) for batch in batches) == target_count
    described = describe(dataset.facts)
    assert described.startswith("64 rows read, 4 bad rows left out, ") and ", 60 samples, " in described
    assert described.endswith(f"{sum(kept):,} tokens, {target_count:,} supervised ({target_count / sum(kept):.1%})")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([dialogue("Hi", "3 + 4 = 7. " * 9)], "1 samples dropped, as the last answer alone is longer than a row"),
        ([json.dumps({"prompt": "3", "completion": "4"}), "{"], None),
        (["{", "[]"], r"2 rows read, 2 bad rows left out.*line 1: not JSON"),
        ([""], "1 rows read, 1 bad rows left out.*rows.jsonl: it holds no rows"),
    ],
)
def test_a_data_set_without_a_target_is_refused(tmp_path: Path, lines: list[str], reason: str | None) -> None:
    if reason is None:
        assert dataset_of(tmp_path, *lines, on_bad_data="skip").facts["target_tokens"]
    else:
        with pytest.raises(UserError, match=f"rows.jsonl, train: no token to learn from .*{reason}"):
            dataset_of(tmp_path, *lines, on_bad_data="skip")


def test_pretraining_reads_texts_only_and_ends_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows.jsonl holds chats or prompts; .* sft"):
        dataset_of(tmp_path, dialogue("Hi", "3"), is_stream=True)
    tokenizer = load_tokenizer(TINY)
    dataset = dataset_of(tmp_path, *(json.dumps({"text": f"Ben has {n}."}) for n in range(20)), is_stream=True)
    rows = [dataset.batch(row, 1) for row in range(dataset.rows.row_count(1))]
    for batch in rows:
        ends = np.flatnonzero(np.diff(batch.segment[0], append=0))
        assert set(batch.target[0, ends[:-1]].tolist()) == {tokenizer.eos_id}
    assert dataset.facts["documents"] == 20 and dataset.facts["tokens"] == dataset.facts["target_tokens"]


def test_a_source_is_sliced_and_weighted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    sources = [{"path": str(path), "split": "train[:75%]", "weight": 2}, {"path": str(path), "split": "train[75%:]"}]
    dataset = dataset_of(tmp_path, *(dialogue("Hi", str(n % 10)) for n in range(8)), data=tuple(sources))
    assert [len(each.start) - 1 for each in dataset.documents] == [6, 2]
    seen = Counter(
        (source, start)
        for row in range(dataset.rows.row_count(1))
        for source, start in zip(*(column.tolist() for column in dataset.rows.pieces_of(row)[:2]), strict=True)
    )
    assert sorted(seen.values()) == [1] * 2 + [2] * 6
    assert {source for (source, _), count in seen.items() if count == 2} == {0}


@pytest.mark.reference
def test_real_chats_fill_their_rows(shelf: Path) -> None:
    config = SftConfig(model_name="unused", run_name="run", data=({"path": str(shelf / "chat" / "[aros]*.jsonl")},))
    tokenizer = load_tokenizer(shelf / "tokenizers" / "qwen2.5")
    dataset = load_dataset(config.data, tokenizer, config, is_stream=False, is_shuffled=True)
    assert dataset.facts["documents"] == 2_991 and isinstance(dataset.rows, PackedRows)
    assert dataset.rows.slot_count(0) == dataset.facts["tokens"]
    assert dataset.facts["tokens"] >= 0.99 * dataset.rows.row_count(1) * config.sequence_length


def test_what_of_a_row_has_no_effect_is_said_at_the_start(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
    rows = [{"messages": [{"role": "user", "content": "2 + 2?"}, thought], "id": 7, "source": "mine", "url": None}]
    facts = dataset_of(tmp_path, *map(json.dumps, rows), sequence_length=64).facts
    assert "1 thoughts, or texts beside calls, left out by the chat template, 1 chats" in describe(facts)
    assert describe(facts).endswith("%); not used: id, source")
