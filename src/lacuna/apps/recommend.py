"""The command recommend prepare: interactions and items to new words, a catalogue, and prompts with completions.

The published layout, the five tasks and the wording of their prompts, spelling included, are MiniOneRec's (Kong et al.
2025), so that its models and its evaluation can be compared with.
"""

import ast
import json
import math
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lacuna.apps.configs import PrepareConfig
from lacuna.apps.semantic_ids import Vectors, nearest_vectors, semantic_ids, title_vectors
from lacuna.checkpoint import replace_directory
from lacuna.config import LINES, UserError, did_you_mean, printable
from lacuna.distributed import held_directory, writing_to
from lacuna.documents import csv_rows, usable
from lacuna.tokenizer import read_json

SPLITS = "train", "valid", "test"
CATEGORY_WORDS = {
    "Industrial_and_Scientific": "industrial and scientific items",
    "Office_Products": "office products",
    "Toys_and_Games": "toys and games",
    "Sports": "sports and outdoors",
    "Books": "books",
}
LONGEST_HISTORY = 10  # of the published rows
SHARED_WORDS = 2  # of a semantic id, that make items alike
WORDS_OF_ITEM = 3
CUTS, WALKS, NEAREST, MOST_WALKED = 10, 10, 10, 30_000


class Item(NamedTuple):
    """An item: its id in the data, its title, which may be empty, and the words of its semantic id."""

    name: str
    title: str
    words: tuple[str, ...]

    @property
    def sid(self) -> str:
        """The semantic id as the model reads and writes it."""
        return "".join(self.words)


class Step(NamedTuple):
    """What a user did next: the items before, oldest first, and the item after them."""

    history: tuple[str, ...]
    target: str


class Interactions(NamedTuple):
    """The items by id, in order, and each split's steps; `bad` says why rows were left out, and `vectors` has a row for
    each item, none where there are no titles to make them of."""

    items: dict[str, Item]
    steps: dict[str, list[Step]]
    bad: list[str]
    vectors: Vectors


Pair = tuple[str, str]  # prompt and completion

# The published layout


def published_interactions(config: PrepareConfig) -> Interactions:
    """The interactions of a directory with folders index, info, train, valid and test, its parts checked against each
    other.

    Raises:
        UserError: a file is missing, or says something else than another, with its line.
    """
    root, name = Path(config.data), config.category
    index = {key: tuple(words) for key, words in existing(root / "index" / f"{name}.index.json", root, name).items()}
    titles = existing(root / "index" / f"{name}.item.json", root, name)
    items = dict[str, Item]()
    for key, words in index.items():
        if len(words) < WORDS_OF_ITEM or not all(re.fullmatch(r"<[^<>\s]+>", str(word)) for word in words):
            raise UserError(
                f"{name}.index.json: item {key} has {list(words)!r:.60}, not {WORDS_OF_ITEM} words as <a_223>; drop it"
            )
        if key not in titles:
            raise UserError(f"{name}.item.json: item {key} of {name}.index.json is missing; fetch both again")
        items[key] = Item(key, str(titles[key].get("title", "")), words[:WORDS_OF_ITEM])
    info = only_file(root / "info", name, ".txt")
    for number, line in enumerate(info.read_text("utf-8").strip("\n").split("\n"), 1):
        sid, title, key = (line.split("\t") + [""] * 3)[:3]
        if key not in items or (sid, title) != (items[key].sid, items[key].title):
            raise UserError(f"{info} line {number}: item {key!r} is another one in {name}.index.json and item.json")
    bad = list[str]()
    steps = {}
    for split, folder in zip(SPLITS, (config.train, "valid", "test"), strict=True):
        rows = csv_rows(only_file(root / folder, name, ".csv"))
        steps[split] = list(usable(rows, partial(published_step, items), config.on_bad_data == "skip", bad))
    titles = [item.title for item in items.values()]
    return Interactions(items, steps, bad, title_vectors(titles) if all(titles) else np.zeros((0, 1), np.float32))


def existing(path: Path, root: Path, category: str) -> dict[str, Any]:
    """The object in a file that has to be there."""
    if not path.is_file():
        known = sorted(each.name.removesuffix(".index.json") for each in (root / "index").glob("*.index.json"))
        has = f"{root} has the categories {', '.join(known)}" if known else f"{root} has no index/*.index.json"
        raise UserError(f"{path}: no such file; {has}{did_you_mean(category, known)}")
    return read_json(path)


def only_file(folder: Path, category: str, suffix: str) -> Path:
    """The one file of a category in a folder, whose name goes on with the years it is of."""
    found = sorted(folder.glob(f"{category}*{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        fix = "put it there, or name the folder of training rows with --train" if not found else "keep one"
        raise UserError(f"{folder}: one file {category}*{suffix} is wanted, there are: {names}; {fix}")
    return found[0]


def published_step(items: dict[str, Item], origin: str, row: dict[str, Any]) -> Step:
    """A row of the published CSV. Raises ValueError where it is not what the catalogue says."""
    history = tuple(str(key) for key in literal_list(row, "history_item_id"))
    target = row.get("item_id", "")
    if not 1 <= len(history) <= LONGEST_HISTORY:
        raise ValueError(f"history_item_id has {len(history)} items, not 1 to {LONGEST_HISTORY}")
    if unknown := [key for key in (*history, target) if key not in items]:
        raise ValueError(f"item {unknown[0]!r} is not in the index")
    known = {
        "history_item_sid": [items[key].sid for key in history],
        "history_item_title": [items[key].title for key in history],
    }
    for column, wanted in known.items():
        if literal_list(row, column) != wanted:
            raise ValueError(f"{column} is not what the index says of the items {', '.join(history)}")
    if (row.get("item_sid"), row.get("item_title")) != (items[target].sid, items[target].title):
        raise ValueError(f"item_sid and item_title are not what the index says of item {target}")
    return Step(history, target)


def literal_list(row: dict[str, Any], column: str) -> list[Any]:
    """A cell with a Python list, which is parsed, never run."""
    try:
        value = ast.literal_eval(row.get(column, ""))
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{column} is {row.get(column, 'missing')!r:.40}, no Python list") from error
    if not isinstance(value, list):
        raise ValueError(f"{column} is {type(value).__name__}, not a list")
    return value


# Plain interactions


def plain_interactions(config: PrepareConfig) -> Interactions:
    """The interactions of a CSV with the columns user, item, time and perhaps title; semantic ids come from the vectors
    or, without any, from the titles.

    Raises:
        UserError: what can't be read, with its line; no vectors and no titles; or nothing to learn from.
    """
    bad, titles = list[str](), dict[str, str]()
    path = Path(config.data)
    events = list(usable(csv_rows(path), plain_event, config.on_bad_data == "skip", bad))
    if config.items:
        rows = usable(csv_rows(Path(config.items)), plain_item, config.on_bad_data == "skip", bad)
        for name, title in rows:
            if name in titles:
                raise UserError(f"{config.items}: item {name!r} is there twice; keep one line of it")
            titles[name] = title
        if unknown := [event.item for event in events if event.item not in titles]:
            raise UserError(f"{config.items}: item {unknown[0]!r} of {path} is missing; add a line for it")
    for event in events:
        titles.setdefault(event.item, event.title)
    vectors = given_vectors(config, len(titles)) if config.vectors else title_vectors(list(titles.values()))
    ids = semantic_ids(vectors, config.codebook, config.seed)
    items = {name: Item(name, title, words) for (name, title), words in zip(titles.items(), ids, strict=True)}
    steps = steps_by_time(events, config) if config.split == "time" else steps_by_user(events, config)
    if not steps["train"]:
        raise UserError(f"{path}: no user has two items or more to learn from; add interactions")
    return Interactions(items, steps, bad, vectors)


class Event(NamedTuple):
    """A user chose an item at a time, in seconds or any other unit."""

    user: str
    item: str
    time: float
    title: str


def plain_event(origin: str, row: dict[str, Any]) -> Event:
    """A row of plain interactions. Raises ValueError where a column is missing or no time."""
    user, item, time = (row.get(column) or "" for column in ("user", "item", "time"))
    if not user or not item:
        raise ValueError(f"user or item is empty; the columns are {', '.join(row)}, wanted are user,item,time[,title]")
    try:
        seconds = float(time)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(time).timestamp()
        except ValueError as error:
            raise ValueError(f"time is {time!r:.30}, neither a number nor a day such as 2024-07-26") from error
    if not math.isfinite(seconds):
        raise ValueError(f"time is {time!r:.30}, which is no point in time")
    return Event(user, item, seconds, str(row.get("title") or ""))


def plain_item(origin: str, row: dict[str, Any]) -> tuple[str, str]:
    """The id and title of a line of items. Raises ValueError where the id is missing."""
    if not row.get("item"):
        raise ValueError(f"item is empty; the columns are {', '.join(row)}, wanted are item[,title]")
    return row["item"], row.get("title") or ""


def given_vectors(config: PrepareConfig, count: int) -> np.ndarray:
    """The vectors of the items. Raises UserError where they are not one finite row for each."""
    if not config.items:
        raise UserError("vectors need --items FILE.csv, whose lines are the items of the vectors, in their order")
    try:
        vectors = np.load(config.vectors, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{config.vectors}: no array that numpy can read ({error}); save it with numpy.save") from error
    if vectors.ndim != 2 or len(vectors) != count or vectors.dtype.kind not in "fiu":
        raise UserError(
            f"{config.vectors}: {vectors.dtype} of shape {vectors.shape}; wanted is a row of numbers for each of the "
            f"{count:,} items of {config.items}"
        )
    if not np.isfinite(vectors).all():
        raise UserError(f"{config.vectors}: row {np.argwhere(~np.isfinite(vectors))[0][0]} is not finite; repair it")
    return vectors


def sequences(events: Iterable[Event], longest: int) -> Iterator[tuple[str, float, int, Step]]:
    """Each user's steps in order of time, with the user, the step's time and how many the user has after it."""
    by_user = defaultdict[str, list[Event]](list)
    for event in events:
        by_user[event.user].append(event)
    for user, chosen in by_user.items():
        chosen.sort(key=lambda event: event.time)  # stable, so equal times keep the order of the file
        for place in range(1, len(chosen)):
            before = tuple(event.item for event in chosen[max(place - longest, 0) : place])
            yield user, chosen[place].time, len(chosen) - place - 1, Step(before, chosen[place].item)


def steps_by_user(events: Iterable[Event], config: PrepareConfig) -> dict[str, list[Step]]:
    """Leave-one-out: each user's last step is for testing, the one before for validation, all others for training; a
    user with one step or two leaves none out but for training."""
    steps: dict[str, list[Step]] = {split: [] for split in SPLITS}
    total = Counter[str](event.user for event in events)
    for user, _, left, step in sequences(events, config.history):
        split = ("test", "valid")[left] if left < 2 and total[user] > 3 else "train"
        steps[split].append(step)
    return steps


def steps_by_time(events: Iterable[Event], config: PrepareConfig) -> dict[str, list[Step]]:
    """All steps in order of time: the first eight tenths for training, the next for validation, the last for tests."""
    ordered = sorted(sequences(events, config.history), key=lambda found: found[1])
    bounds = [0, int(0.8 * len(ordered)), int(0.9 * len(ordered)), len(ordered)]
    parts = (ordered[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False))
    return {split: [step for *_, step in part] for split, part in zip(SPLITS, parts, strict=True)}


# The tasks

FRAME = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. \n\n### Instruction:\n"
)
USER, RESPONSE = "### User Input: \n", "\n\n### Response:\n"
NEXT_ITEM = "Can you predict the next possible item that the user may expect?"
TEST_QUESTION = (
    "Can you predict the next possible item the user may expect, given the following chronological interaction "
    "history: "
)
IDENTIFY = "Answer the question about item identification."
FUSION = "Can you recommend the next item for the user based on their interaction history?"
HISTORY_TO_SID = (
    "Based on the user's historical interaction with item titles, predict the semantic ID of the next item they may "
    "expect."
)
TITLE_INSTRUCTIONS = (
    "Given a list of {c} the user recetenly enjoy, please write a new {c} that the user may bought",
    "Considering the {c} that has recently captured the user's interest, kindly create a compilation of other {c} that "
    "the user might have played prior to this.",
    "Based on the user's current gaming preference, please draft a list of potential {c} they may have experienced "
    "beforehand.",
    "Reflecting on the {c} the user has taken pleasure in recently, we request that you formulate a list of {c} that "
    "may have preceded the user's current enjoyment.",
    "In light of the recent gaming enjoyment expressed by the user, please assemble a list of {c} that could "
    "potentially include past titles the user has engaged with.",
    "Taking into account the {c} that has lately provided enjoyment to the user, please put together an inventory of "
    "{c} the user might have explored previously.",
    "Given the user's newfound enjoyment of a particular {c}, would you kindly generate a roster of other {c} that "
    "might resonate with their past gaming experiences?",
    "In response to the user's recent fondness for a specific {c}, we seek your assistance in listing possible {c} the "
    "user may have delighted in earlier.",
    "With respect to the {c} currently enjoyed by the user, please compile a suggestive list of {c} they may have "
    "played in the past.",
    "Bearing in mind the {c} that the user has recently been enthralled by, please construct a catalog of other {c} "
    "that the user potentially partook in beforehand.",
    "In relation to the user's recent entertainment with a given {c}, it would be appreciated if you could curate a "
    "list of {c} that might form part of the user's previous gaming history.",
)


def framed(instruction: str, user: str, end: str = "\n\n") -> str:
    """The published prompt; its first piece ends after `end`."""
    return f"{FRAME}{instruction}{end}{USER}{user}{RESPONSE}"


def user_input(prompt: str) -> str:
    """What a framed prompt says between its headings, or all of another."""
    return (prompt.partition(USER)[2] or prompt).removesuffix(RESPONSE)


def joined_sids(items: dict[str, Item], step: Step) -> str:
    return ", ".join(items[name].sid for name in step.history)


def quoted(items: dict[str, Item], step: Step, separator: str) -> str:
    return separator.join(f'"{items[name].title}"' for name in step.history)


def next_item(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """Semantic ids of the history to that of the next item; a test asks in other words than training does."""
    if split == "test":
        yield from next_item_as_tested(found, split, words, seed)
        return
    for step in found.steps[split]:
        history = joined_sids(found.items, step)
        asked = f"The user has interacted with items {history} in chronological order. {NEXT_ITEM}"
        yield framed(NEXT_ITEM, asked), f"{found.items[step.target].sid}\n"


def next_item_as_tested(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """The same in the words of the test, which a model from scratch can't know to mean the same."""
    for step in found.steps[split]:
        yield framed(NEXT_ITEM, TEST_QUESTION + joined_sids(found.items, step)), f"{found.items[step.target].sid}\n"


def item_alignment(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """The title of each semantic id, then the semantic id of each title; of items that share one the last counts."""
    titles = {item.sid: item.title for item in found.items.values()}
    sids = {item.title: item.sid for item in found.items.values()}
    if split == "train":
        for sid, title in titles.items():
            yield framed(IDENTIFY, f'What is the title of item "{sid}"?'), f"{title}\n"
        for title, sid in sids.items():
            yield framed(IDENTIFY, f"Which item has the title: {title}?"), f"{sid}\n"


def fusion(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """Semantic ids of the history to the title of the next item."""
    titles = {item.sid: item.title for item in found.items.values()}
    for step in found.steps[split]:
        asked = (
            f"The user has sequentially interacted with items {joined_sids(found.items, step)}. Can you recommend the "
            "next item for him? Tell me the title of the item"
        )
        sid = found.items[step.target].sid
        yield framed(FUSION, asked), f"{titles.get(sid) or sid}\n"


def title_to_title(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """Titles of the history to that of the next item, asked in one of eleven ways."""
    draw = random.Random(seed)
    for step in found.steps[split]:
        instruction = TITLE_INSTRUCTIONS[draw.randint(0, len(TITLE_INSTRUCTIONS) - 1)].replace("{c}", words)
        titles = quoted(found.items, step, ",\t")
        asked = f"The user has palyed the following {words}s before: {titles}"
        yield framed(instruction, asked, "\n \n"), f'"{found.items[step.target].title}"\n'


def titles_to_sid(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """Titles of the history to the semantic id of the next item."""
    for step in found.steps[split]:
        asked = (
            f"The user has interacted with the following {words} items in chronological order: "
            f"{quoted(found.items, step, ', ')}. Can you predict the next item the user may expect?"
        )
        yield framed(HISTORY_TO_SID, asked), f"{found.items[step.target].sid}\n"


def whole_histories(steps: Sequence[Step]) -> Iterator[tuple[str, ...]]:
    """The items of each user, as far as steps tell: those of a step that another one continues are left out."""
    continued = Counter(step.history for step in steps)
    for step in steps:
        items = *step.history, step.target
        if continued[items]:
            continued[items] -= 1
        else:
            yield items


def sequence(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """Semantic ids alone, one a line, for models from scratch. In training each user's items are cut into pieces,
    between two of them with even chance, and ten times anew: whole histories would soon be known by heart."""
    lines, draw = {name: f"{item.sid}\n" for name, item in found.items.items()}, random.Random(seed)
    if split != SPLITS[0]:
        yield from (("".join(lines[name] for name in step.history), lines[step.target]) for step in found.steps[split])
        return
    for items in [*whole_histories(found.steps[split])] * CUTS:
        begin = 0
        for end in range(1, len(items) + 1):
            if end == len(items) or draw.random() < 0.5:
                if end - begin > 1:
                    yield lines[items[begin]], "".join(lines[name] for name in items[begin + 1 : end])
                begin = end


def alike(found: Interactions, split: str, words: str, seed: int) -> Iterator[Pair]:
    """The same of what nobody chose: walks from each item to items alike, which a model from scratch can't know. A step
    goes to one of the nearest vectors, or to one that shares the first words of its semantic id, and rather to what was
    chosen often. Walks end as often as histories do, so that an end says nothing of what was chosen."""
    names, draw = list(found.items), random.Random(seed)
    if split != SPLITS[0] or not 1 < len(found.vectors) <= MOST_WALKED:
        return
    chosen = Counter(
        name for step in found.steps[split] for name in (*step.history[: 1 // len(step.history)], step.target)
    )
    weights, sharing = np.array([chosen[name] + 0.5 for name in names]), defaultdict[Any, list[int]](list)
    for place, item in enumerate(found.items.values()):
        sharing[item.words[:SHARED_WORDS]].append(place)
    near, cosines = nearest_vectors(found.vectors, NEAREST)
    likely = np.cumsum(np.maximum(cosines, 1e-3) ** 3 * np.sqrt(weights[near]), 1).tolist()
    peers = {key: np.cumsum(weights[places]).tolist() for key, places in sharing.items()}
    ends = 1 / np.mean([len(items) - 1 for items in whole_histories(found.steps[split])])
    for start in [*range(len(names))] * WALKS:
        walk = [start]
        while len(walk) == 1 or draw.random() > ends:
            key = found.items[names[walk[-1]]].words[:SHARED_WORDS]
            ways = near[walk[-1]].tolist(), likely[walk[-1]]
            if len(sharing[key]) > 1 and draw.random() < 0.5:
                ways = sharing[key], peers[key]
            walk += draw.choices(ways[0], cum_weights=ways[1])
        sids = [f"{found.items[names[place]].sid}\n" for place in walk]
        yield sids[0], "".join(sids[1:])


Task = Callable[[Interactions, str, str, int], Iterator[Pair]]
TASKS: dict[str, Task] = {
    "sid_next_item": next_item,
    "sid_item_alignment": item_alignment,
    "fusion_seq_rec": fusion,
    "title_to_title": title_to_title,
    "title_history_to_sid": titles_to_sid,
    "sid_next_item_as_tested": next_item_as_tested,
    "sid_sequence": sequence,
    "sid_alike": alike,
}
WITHOUT_TITLES = "sid_next_item", "sid_next_item_as_tested", "sid_sequence", "sid_alike"

# The command


def run_prepare(config: PrepareConfig) -> None:
    """The command recommend prepare: the new words, the catalogue, and the rows of each task and split.

    Raises:
        UserError: whatever about the data can't be used, or files of others in the way.
    """
    out = Path(config.out)
    if out.exists() and not ((out / "prepare.json").is_file() and config.overwrite):
        fix = "add --overwrite to replace it" if (out / "prepare.json").is_file() else "choose another --out"
        raise UserError(f"{out} is there already; {fix}")
    found = published_interactions(config) if Path(config.data).is_dir() else plain_interactions(config)
    for reason in found.bad:
        print(printable(f"left out: {reason}", LINES))
    scratch = out.with_name(out.name + ".tmp")
    with held_directory(out.with_name(out.name + ".lock")), writing_to(out):
        shutil.rmtree(scratch, ignore_errors=True)
        counts = write_prepared(scratch, found, config)
        facts = {"category": config.category, "items": len(found.items), "rows": counts, "bad": len(found.bad)}
        (scratch / "prepare.json").write_text(json.dumps(facts, indent=1) + "\n")
        for problem in replace_directory(scratch, out):
            print(f"WARNING: {problem}")


def write_prepared(directory: Path, found: Interactions, config: PrepareConfig) -> dict[str, dict[str, int]]:
    """Write all files of a prepared directory but prepare.json, and print what is in them; rows by split and task."""
    items = list(found.items.values())
    new_words = sorted({word for item in items for word in item.words})
    directory.mkdir(parents=True)
    (directory / "new_tokens.txt").write_text("".join(f"{word}\n" for word in new_words), "utf-8")
    lines = (f"{item.sid}\t{' '.join(item.title.split())}\t{item.name}\n" for item in items)
    (directory / "catalogue.txt").write_text("".join(lines), "utf-8")
    distinct = len({item.sid for item in items})
    levels = Counter(word.partition("_")[0].lstrip("<") for word in new_words)
    print(
        f"catalogue: {len(items):,} items, {distinct:,} semantic ids of {len(new_words):,} words "
        f"({', '.join(f'{count} {level}' for level, count in sorted(levels.items()))})"
    )
    words = CATEGORY_WORDS.get(config.category, config.category.replace("_", " ").lower() or "items")
    has_titles = all(item.title for item in items)
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        (directory / split).mkdir()
        steps = found.steps[split]
        sequences = (
            {"history": [found.items[name].sid for name in step.history], "item": found.items[step.target].sid}
            for step in steps
        )
        write_lines(directory / split / "sequences.jsonl", sequences)
        counts[split] = {}
        for task, rows_of in TASKS.items():
            if (has_titles or task in WITHOUT_TITLES) and (split, task) != ("test", "sid_next_item_as_tested"):
                rows = list(rows_of(found, split, words, config.seed))
                if rows:
                    counts[split][task] = len(rows)
                    path = directory / split / f"{task}.jsonl"
                    write_lines(path, ({"prompt": prompt, "completion": answer} for prompt, answer in rows))
                    print(f"{split}/{task}: {len(rows):,} rows, the first {rows[0][0]!r} → {rows[0][1]!r}")
    if not has_titles:
        print("some items have no title, so there are only tasks without titles")
    if len(items) > MOST_WALKED:
        print(f"no sid_alike: {len(items):,} items are more than the {MOST_WALKED:,} that it compares with each other")
    return counts


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
