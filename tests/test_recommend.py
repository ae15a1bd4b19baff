"""From interaction files to semantic ids, a catalogue and the published prompts."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacuna import cli
from lacuna.apps import recommend
from lacuna.apps.configs import PrepareConfig
from lacuna.apps.semantic_ids import k_means, semantic_ids, title_vectors
from lacuna.config import UserError

INDEX = {"0": ["<a_1>", "<b_2>", "<c_3>"], "1": ["<a_10>", "<b_2>", "<c_4>"], "2": ["<a_1>", "<b_2>", "<c_3>"]}
TITLES = {"0": "Glue, 'strong'", "1": 'Tape 2"', "2": "Glue stick"}
SIDS = {item: "".join(words) for item, words in INDEX.items()}
COLUMNS = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid")
INSTRUCTED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. \n\n### Instruction:\n"
)


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of hashed words that is small, as its eigenvectors take seconds."""
    monkeypatch.setattr("lacuna.apps.semantic_ids.HASHED_WORDS", 256)


def published_row(history: list[int], item: int) -> dict[str, Any]:
    past = [str(each) for each in history]
    return {
        "user_id": "A1", "history_item_title": [TITLES[each] for each in past], "item_title": TITLES[str(item)],
        "history_item_id": history, "item_id": item, "history_item_sid": [SIDS[each] for each in past],
        "item_sid": SIDS[str(item)],
    }  # fmt: skip


def make_layout(root: Path, **changed: dict[str, Any]) -> Path:
    """A small directory in the published layout; `changed` replaces cells of the first row of a split."""
    name = "Office_Products"
    for folder in ("index", "info", "train", "valid", "test"):
        (root / folder).mkdir(parents=True)
    (root / "index" / f"{name}.index.json").write_text(json.dumps(INDEX))
    (root / "index" / f"{name}.item.json").write_text(
        json.dumps({key: {"title": text} for key, text in TITLES.items()})
    )
    info = "".join(f"{SIDS[item]}\t{TITLES[item]}\t{item}\n" for item in INDEX)
    (root / "info" / f"{name}_5_2016-10-2018-11.txt").write_text(info)
    rows = {"train": [([0], 1), ([0, 1], 2)], "valid": [([2], 1)], "test": [([1, 0], 1)]}
    for split, steps in rows.items():
        with (root / split / f"{name}_5_2016-10-2018-11.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            written = [published_row(*step) for step in steps]
            written[0] |= changed.get(split, {})
            table.writerows(written)
    return root


def prepare_files(*arguments: str) -> None:
    cli.start("recommend", ["prepare", *arguments])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    make_layout(tmp_path / "data")
    prepare_files("--data", str(tmp_path / "data"), "--category", "Office_Products", "--out", str(tmp_path / "out"))
    return tmp_path / "out"


def test_the_published_layout_becomes_words_and_a_catalogue(prepared: Path) -> None:
    assert (prepared / "new_tokens.txt").read_text() == "<a_10>\n<a_1>\n<b_2>\n<c_3>\n<c_4>\n"
    assert (prepared / "catalogue.txt").read_text().splitlines()[1] == f'{SIDS["1"]}\tTape 2"\t1'
    rows = json.loads((prepared / "prepare.json").read_text())["rows"]
    assert rows["train"] == {
        "sid_next_item": 2,
        "sid_item_alignment": 5,
        "fusion_seq_rec": 2,
        "title_to_title": 2,
        "title_history_to_sid": 2,
        "sid_next_item_as_tested": 2,
        "sid_sequence": rows["train"]["sid_sequence"],
        "sid_alike": 30,
    }
    assert 1 <= rows["train"]["sid_sequence"] <= recommend.CUTS
    assert rows["valid"].keys() == rows["train"].keys() - {"sid_item_alignment", "sid_alike"}
    assert rows["test"].keys() == rows["valid"].keys() - {"sid_next_item_as_tested"}
    assert lines_of(prepared / "train" / "sequences.jsonl")[1] == {"history": [SIDS["0"], SIDS["1"]], "item": SIDS["2"]}


def test_each_task_asks_in_the_published_words(prepared: Path) -> None:
    first, second, glue = SIDS["0"], SIDS["1"], "\"Glue, 'strong'\""
    asked = "Can you predict the next possible item that the user may expect?"
    assert lines_of(prepared / "train" / "sid_next_item.jsonl")[1] == {
        "prompt": f"{INSTRUCTED}{asked}\n\n### User Input: \nThe user has interacted with items {first}, {second} in "
        f"chronological order. {asked}\n\n### Response:\n",
        "completion": f"{SIDS['2']}\n",
    }
    (test,) = lines_of(prepared / "test" / "sid_next_item.jsonl")
    assert test["prompt"] == (
        f"{INSTRUCTED}{asked}\n\n### User Input: \nCan you predict the next possible item the user may expect, given "
        f"the following chronological interaction history: {second}, {first}\n\n### Response:\n"
    )
    as_tested = lines_of(prepared / "train" / "sid_next_item_as_tested.jsonl")
    assert as_tested[1]["prompt"] == test["prompt"].replace(f"{second}, {first}", f"{first}, {second}")
    alignment = lines_of(prepared / "train" / "sid_item_alignment.jsonl")
    about = f"{INSTRUCTED}Answer the question about item identification.\n\n### User Input: \n"
    assert [row["completion"] for row in alignment] == [
        "Glue stick\n", 'Tape 2"\n', f"{first}\n", f"{second}\n", f"{first}\n",
    ]  # fmt: skip
    assert alignment[0]["prompt"] == f'{about}What is the title of item "{first}"?\n\n### Response:\n'
    assert alignment[3]["prompt"] == f'{about}Which item has the title: Tape 2"?\n\n### Response:\n'
    fused = lines_of(prepared / "train" / "fusion_seq_rec.jsonl")[1]
    assert fused["completion"] == "Glue stick\n"
    assert fused["prompt"] == (
        f"{INSTRUCTED}Can you recommend the next item for the user based on their interaction history?\n\n### User "
        f"Input: \nThe user has sequentially interacted with items {first}, {second}. Can you recommend the next item "
        "for him? Tell me the title of the item\n\n### Response:\n"
    )
    titles = lines_of(prepared / "train" / "title_to_title.jsonl")
    assert titles[1]["completion"] == '"Glue stick"\n'
    assert titles[1]["prompt"].endswith(
        "\n \n### User Input: \nThe user has palyed the following office productss before: "
        f'{glue},\t"Tape 2""\n\n### Response:\n'
    )
    # random.seed(42) draws 10 and then 1
    assert "with a given office products, it would be appreciated" in titles[0]["prompt"]
    assert titles[1]["prompt"].startswith(f"{INSTRUCTED}Considering the office products that has recently captured")
    assert lines_of(prepared / "valid" / "title_history_to_sid.jsonl")[0] == {
        "prompt": f"{INSTRUCTED}Based on the user's historical interaction with item titles, predict the semantic ID "
        "of the next item they may expect.\n\n### User Input: \nThe user has interacted with the following office "
        'products items in chronological order: "Glue stick". Can you predict the next item the user may '
        "expect?\n\n### Response:\n",
        "completion": f"{second}\n",
    }


def test_bare_rows_are_pieces_of_histories(prepared: Path, tmp_path: Path) -> None:
    """In training each step is learned in about half of the ten cuts, after a part of its history; in a test each is a
    row with all of it."""
    assert lines_of(prepared / "test" / "sid_sequence.jsonl") == [
        {"prompt": f"{SIDS['1']}\n{SIDS['0']}\n", "completion": f"{SIDS['1']}\n"}
    ]
    names = [f"i{item}" for item in range(40 * 8)]  # each is bought once
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(len(names), 4)))
    (tmp_path / "items.csv").write_text("item\n" + "".join(f"{name}\n" for name in names))
    events = "".join(f"u{place // 8},{name},{place}\n" for place, name in enumerate(names))
    (tmp_path / "shop.csv").write_text(f"user,item,time\n{events}")
    files = {"data": "shop.csv", "items": "items.csv", "vectors": "vectors.npy", "out": "bare"}
    cli.run(PrepareConfig(codebook=16, **{key: str(tmp_path / name) for key, name in files.items()}))
    train = tmp_path / "bare" / "train"
    steps = [(*row["history"], row["item"]) for row in lines_of(train / "sequences.jsonl")]
    rows = [(row["prompt"] + row["completion"]).splitlines() for row in lines_of(train / "sid_sequence.jsonl")]
    assert all(row["prompt"].count("\n") == 1 for row in lines_of(train / "sid_sequence.jsonl"))
    learned = Counter((row[end - 1], row[end]) for row in rows for end in range(1, len(row)))
    assert learned.keys() <= {step[-2:] for step in steps} and len(learned) > 0.95 * len(steps)
    assert 4.5 < sum(learned.values()) / len(steps) < 5.5
    ends = {tuple(step[-length:]) for step in steps for length in range(2, len(step) + 1)}
    assert all(tuple(row) in ends for row in rows)


def test_walks_go_from_each_item_to_items_alike(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    vectors, names = draw.normal(size=(40, 6)), [f"i{item}" for item in range(40)]
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "items.csv").write_text("item\n" + "".join(f"{name}\n" for name in names))
    (tmp_path / "shop.csv").write_text("user,item,time\n" + "".join(f"u,i{item % 3},{item}\n" for item in range(60)))
    files = {"data": "shop.csv", "items": "items.csv", "vectors": "vectors.npy", "out": "out"}
    cli.run(PrepareConfig(codebook=4, **{key: str(tmp_path / name) for key, name in files.items()}))
    sids = [line.split("\t")[0] for line in (tmp_path / "out" / "catalogue.txt").read_text().splitlines()]
    place, words = {sid: at for at, sid in enumerate(sids)}, [re.findall("<.*?>", sid)[:2] for sid in sids]
    rows = lines_of(tmp_path / "out" / "train" / "sid_alike.jsonl")
    walks = [[place[sid] for sid in (row["prompt"] + row["completion"]).splitlines()] for row in rows]
    assert Counter(walk[0] for walk in walks) == dict.fromkeys(range(40), recommend.WALKS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    angle = np.arccos(np.clip(unit @ unit.T, -1, 1)) + 9 * np.eye(40)
    is_near = angle.argsort(1).argsort(1) < recommend.NEAREST
    steps = Counter(step for walk in walks for step in zip(walk, walk[1:], strict=False))
    assert all(is_near[a, b] or words[a] == words[b] for a, b in steps)
    by_angle = sum(count for (a, b), count in steps.items() if words[a] != words[b])
    assert sum(steps.values()) / 4 < by_angle < sum(steps.values())
    assert {b for _, b in steps} > {0, 1, 2} and max(Counter(b for walk in walks for b in walk[1:])) < 40


@pytest.mark.parametrize(
    ("split", "cells", "message"),
    [
        ("train", {"item_sid": "<a_1><b_2><c_4>"}, r"train.*line 2: item_sid and item_title are not what the index"),
        ("valid", {"history_item_sid": "['<a_1>']"}, "history_item_sid is not what the index says of the items 2"),
        ("valid", {"history_item_title": "exit()"}, "history_item_title is 'exit\\(\\)', no Python list"),
        ("test", {"item_id": 7}, "test.*line 2: item '7' is not in the index"),
        ("test", {"history_item_id": "[]"}, "history_item_id has 0 items, not 1 to 10"),
    ],
)
def test_a_row_that_contradicts_the_index_is_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, cells: dict[str, Any], message: str
) -> None:
    root = make_layout(tmp_path / "data", **{split: cells})
    config = {"data": str(root), "category": "Office_Products", "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message):
        cli.run(PrepareConfig(**config))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    cli.run(PrepareConfig(**config, on_bad_data="skip"))
    assert "left out: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["bad"] == 1


def test_a_directory_of_others_is_kept_and_ours_is_replaced_only_when_asked(prepared: Path) -> None:
    arguments = ["--data", str(prepared.parent / "data"), "--category", "Office_Products"]
    with pytest.raises(SystemExit):
        prepare_files(*arguments, "--out", str(prepared))
    with pytest.raises(SystemExit):
        prepare_files(*arguments, "--out", str(prepared.parent / "data"), "--overwrite")
    before = (prepared / "train" / "title_to_title.jsonl").read_text()
    prepare_files(*arguments, "--out", str(prepared), "--overwrite", "--seed", "7")
    assert (prepared / "train" / "title_to_title.jsonl").read_text() != before
    assert (prepared.parent / "data" / "index").is_dir()


def test_a_missing_category_is_refused_with_what_there_is(tmp_path: Path) -> None:
    root = make_layout(tmp_path / "data")
    config = {"data": str(root), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="category is required"):
        PrepareConfig(**config)
    with pytest.raises(UserError, match="has the categories Office_Products; did you mean Office_Products?"):
        cli.run(PrepareConfig(**config, category="Office"))
    with pytest.raises(UserError, match="training rows with --train"):
        cli.run(PrepareConfig(**config, category="Office_Products", train="train_recovered"))


# Plain interactions

EVENTS = [
    *(("u1", item, time) for time, item in enumerate("pqrs")),
    *(("u2", item, 10 - time) for time, item in enumerate("srqp")),  # written backwards
    ("u3", "p", 3), ("u3", "q", 20), ("u4", "r", 1),
]  # fmt: skip
SHOP = {"p": "red paint", "q": "blue paint", "r": "steel nails", "s": "brass nails"}


def write_shop(directory: Path, events: list[tuple[str, str, int]] = EVENTS) -> list[str]:
    directory.mkdir(exist_ok=True)
    rows = "".join(f"{user},{item},{time},{SHOP[item]}\n" for user, item, time in events)
    (directory / "shop.csv").write_text(f"user,item,time,title\n{rows}")
    return ["--data", str(directory / "shop.csv"), "--out", str(directory / "out"), "--codebook", "2"]


def sequences_of(out: Path, split: str) -> list[tuple[str, ...]]:
    """Histories and targets as item names."""
    names = {
        sid: name for sid, _, name in (line.split("\t") for line in (out / "catalogue.txt").read_text().splitlines())
    }
    rows = lines_of(out / split / "sequences.jsonl")
    return [tuple(names[sid] for sid in (*row["history"], row["item"])) for row in rows]


def test_the_last_items_of_each_user_are_held_out(tmp_path: Path) -> None:
    prepare_files(*write_shop(tmp_path / "one"), "--history", "2")
    out = tmp_path / "one" / "out"
    assert sequences_of(out, "train") == [("p", "q"), ("p", "q"), ("p", "q")]  # u3 has too few to leave one out
    assert sequences_of(out, "valid") == [("p", "q", "r"), ("p", "q", "r")]
    assert sequences_of(out, "test") == [("q", "r", "s"), ("q", "r", "s")]


def test_the_last_part_of_time_is_held_out(tmp_path: Path) -> None:
    days = [(user, item, 2000 + time) for user, item, time in EVENTS]
    prepare_files(*write_shop(tmp_path / "one", days), "--split", "time")
    out = tmp_path / "one" / "out"
    steps = [step for split in ("train", "valid", "test") for step in sequences_of(out, split)]
    assert sequences_of(out, "test") == [("p", "q")] and len(steps) == 7  # u3's, the last of all
    assert steps[0] == ("p", "q") and steps[2] == ("p", "q", "r", "s")


def test_alike_titles_share_their_first_word(tmp_path: Path) -> None:
    prepare_files(*write_shop(tmp_path / "one"))
    lines = (tmp_path / "one" / "out" / "catalogue.txt").read_text().splitlines()
    first = {name: sid.split("><")[0] for sid, _, name in (line.split("\t") for line in lines)}
    assert first["p"] == first["q"] != first["r"] == first["s"]


def test_vectors_are_matched_to_items_by_line(tmp_path: Path) -> None:
    arguments = write_shop(tmp_path / "one")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{item},{SHOP[item]}\n" for item in "sqpr"))
    np.save(tmp_path / "vectors.npy", np.array([[0.0, 1], [9, 9], [0, 1.1], [9, 9]]))
    given = ["--items", str(tmp_path / "items.csv"), "--vectors", str(tmp_path / "vectors.npy")]
    prepare_files(*arguments, *given)
    lines = (tmp_path / "one" / "out" / "catalogue.txt").read_text().splitlines()
    sids = {name: sid.replace("><", "> <").split() for sid, _, name in (line.split("\t") for line in lines)}
    assert list(sids) == list("sqpr") and sids["s"][0] == sids["p"][0] != sids["q"][0]
    assert sids["q"][:3] == sids["r"][:3] and [sids["q"][3], sids["r"][3]] == ["<d_0>", "<d_1>"]
    assert len(sids["s"]) == len(sids["p"]) == 3 and sids["s"] != sids["p"]
    for wrong in (np.zeros((3, 2)), np.full((4, 2), np.nan), np.array(["a"] * 4)):
        np.save(tmp_path / "vectors.npy", wrong)
        with pytest.raises(SystemExit):
            prepare_files(*arguments, *given, "--overwrite")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,time\nu,p,now\n", "line 2: time is 'now', neither a number nor a day"),
        ("user,item,time\nu,p,inf\n", "line 2: time is 'inf', which is no point in time"),
        ("user,thing,time\nu,p,1\n", r"line 2: user or item is empty; the columns are user, thing, time"),
        ("user,item,time\nu,p,1\nu,q,2\n", "no titles with words to make semantic ids of; give --vectors"),
        ("user,item,time,title\nu,p,1,pin\nv,q,2,nail\n", "no user has two items or more"),
    ],
)
def test_interactions_that_can_not_be_learned_from_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "shop.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        cli.run(PrepareConfig(data=str(tmp_path / "shop.csv"), out=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["shop.csv"]


def test_times_may_be_days(tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("user,item,time,title\nu,p,2024-07-26,pin\nu,q,2024-07-25 10:00:00,nail\n")
    cli.run(PrepareConfig(data=str(tmp_path / "shop.csv"), out=str(tmp_path / "out")))
    assert sequences_of(tmp_path / "out", "train") == [("q", "p")]


# Clustering


def test_k_means_finds_what_is_apart() -> None:
    random = np.random.default_rng(0)
    centres = np.array([[0, 0], [50, 0], [0, 50], [50, 50]], np.float32)
    points = np.concatenate([centre + random.normal(size=(30, 2)) for centre in centres]).astype(np.float32)
    found = k_means(points, 4, np.random.default_rng(1))
    means = points.reshape(4, 30, 2).mean(1)
    np.testing.assert_allclose(found[np.lexsort(found.T)], means[np.lexsort(means.T)], atol=1e-4)
    assert len(k_means(np.ones((5, 2), np.float32), 3, random)) == 1  # no more than there are different points


def test_semantic_ids_are_unique_reproducible_and_refine_level_by_level() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    vectors[200:] = vectors[:100]
    ids = semantic_ids(vectors, 6, seed=3)
    assert ids == semantic_ids(vectors, 6, seed=3) != semantic_ids(vectors, 6, seed=4)
    assert len(set(ids)) == 300
    assert all(ids[place][:3] == ids[place + 200][:3] and len(ids[place]) == 4 for place in range(100))
    assert all(word[1] == level for words in ids for word, level in zip(words, "abcd", strict=False))
    spread = [
        sum(vectors[[words[:depth] == each[:depth] for words in ids]].var(0).sum() for each in ids) for depth in (1, 2)
    ]
    assert spread[1] < spread[0] < vectors.var(0).sum() * 300


def test_vectors_of_titles_are_near_where_words_are_shared() -> None:
    titles = ["red wall paint", "wall paint, blue", "steel nails 40 mm", "nails steel 50 mm"]
    vectors = title_vectors(titles)
    products = vectors @ vectors.T
    assert products[0, 1] > 2 * abs(products[0, 2]) and products[2, 3] > 2 * abs(products[1, 3])
