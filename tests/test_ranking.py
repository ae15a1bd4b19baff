"""What is counted of ranked items: the published figures on hand-made predictions, and the rules of counting."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lacuna import cli
from lacuna.apps.ranking import CountingRules, counting_figures, ranking_figures
from lacuna.config import UserError


def as_published(samples: list[dict[str, Any]], known: set[str]) -> tuple[dict[int, float], dict[int, float], int]:
    """HR, NDCG and invalid count by the published description, step by step and with its logarithms."""
    beams = len(samples[0]["predict"])
    cutoffs = [k for k in (1, 3, 5, 10, 20, 50) if k <= beams]
    hit, gain, wrong = dict.fromkeys(cutoffs, 0.0), dict.fromkeys(cutoffs, 0.0), 0
    for sample in samples:
        target = sample["output"]
        target = target[0].strip('"').strip(" ") if isinstance(target, list) else target.strip(' \n"')
        rank = 10**9
        for place, text in enumerate(sample["predict"]):
            cleaned = text.strip('"\n').strip()
            wrong += cleaned not in known
            if cleaned == target:
                rank = place
                break
        for k in cutoffs:
            if rank < k:
                hit[k] += 1
                gain[k] += 1 / math.log(rank + 2)
    count = len(samples)
    return {k: v / count for k, v in hit.items()}, {k: v / count / (1 / math.log(2)) for k, v in gain.items()}, wrong


HAND_MADE = [
    ([{"output": "a\n", "predict": ["b", "a", "c"]}], {"1": 0.0, "3": 1.0}, {"1": 0.0, "3": 1 / math.log2(3)}, 0),
    ([{"output": "a", "predict": ["b", "b", "a", "a"]}], {"1": 0.0, "3": 1.0}, {"1": 0.0, "3": 0.5}, 0),  # copies rank
    ([{"output": "a", "predict": ["x", "y", "a", "z"]}], {"1": 0.0, "3": 1.0}, {"1": 0.0, "3": 0.5}, 2),  # to the hit
    ([{"output": "c", "predict": ["x", "a", "y"]}], {"1": 0.0, "3": 0.0}, {"1": 0.0, "3": 0.0}, 2),  # without one all
    ([{"output": '"a"\n', "predict": ['"a"\n']}], {"1": 1.0}, {"1": 1.0}, 0),
    ([{"output": "a", "predict": [' "a"']}], {"1": 0.0}, {"1": 0.0}, 1),  # the left quote stays after one pass
    ([{"output": ['"a" '], "predict": ["a"]}], {"1": 0.0}, {"1": 0.0}, 0),  # nor is a list's quote inside spaces taken
    ([{"output": ["a", "b"], "predict": ["a"]}], {"1": 1.0}, {"1": 1.0}, 0),
    ([{"output": ["a\n"], "predict": ["a"]}], {"1": 0.0}, {"1": 0.0}, 0),  # a list's newline stays
    ([{"output": "\ta", "predict": ["\ta"]}], {"1": 0.0}, {"1": 0.0}, 0),  # a target keeps its tab
    ([{"output": "", "predict": ["\n"]}], {"1": 1.0}, {"1": 1.0}, 1),  # nothing equals nothing
    ([{"output": "z", "predict": ["z"]}], {"1": 1.0}, {"1": 1.0}, 1),  # an unknown item can be a hit
    (
        [
            {"output": "a", "predict": ["a", "b", "c"]}, {"output": "b", "predict": []},
            {"output": "c", "predict": ["a", "b", "b", "c"]},
        ],
        {"1": 1 / 3, "3": 1 / 3}, {"1": 1 / 3, "3": 1 / 3}, 0,
    ),  # the first sample's number of beams decides, and of a longer one what is beyond it is no hit
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HAND_MADE)))
def test_figures_are_counted_as_published_on_hand_made_predictions(case: int) -> None:
    samples, hr, ndcg, invalid = HAND_MADE[case]
    found = ranking_figures(samples, {"a", "b", "c", "\ta"})
    assert found["hr"] == pytest.approx(hr, abs=1e-12) and found["ndcg"] == pytest.approx(ndcg, abs=1e-12)
    assert (found["invalid_prediction_count"], found["n_samples"]) == (invalid, len(samples))
    assert found["topk"] == [int(cutoff) for cutoff in hr] and found["n_beams"] == len(samples[0]["predict"])


def test_figures_of_many_predictions_equal_the_published_description() -> None:
    draw = random.Random(1)
    names = [f"<a_{n}>" for n in range(8)]
    dirt = ["", "", " ", "\n", '"', ' "', "\t", " \n"]
    for beams in (1, 4, 5, 20, 48, 50):
        samples = []
        for _ in range(60):
            size = beams if not samples else draw.choice([beams, beams, draw.randint(0, beams + 3)])
            texts = [draw.choice(dirt) + draw.choice([*names, "<b_1>", ""]) + draw.choice(dirt) for _ in range(size)]
            target: Any = draw.choice(names) + draw.choice(dirt)
            samples.append({"predict": texts, "output": [target] if draw.random() < 0.3 else target})
        found, known = ranking_figures(samples, set(names)), set(names)
        hr, ndcg, invalid = as_published(samples, known)
        assert {int(k): v for k, v in found["hr"].items()} == pytest.approx(hr, abs=1e-12)
        assert {int(k): v for k, v in found["ndcg"].items()} == pytest.approx(ndcg, abs=1e-12)
        assert found["invalid_prediction_count"] == invalid


def test_what_can_not_be_counted_is_refused() -> None:
    for samples in ([], [{"output": None, "predict": []}], [{"output": "a"}], [{"output": [], "predict": ["a"]}]):
        with pytest.raises(UserError):
            ranking_figures(samples, set())


def test_the_counting_rules_on_a_few_steps() -> None:
    one, two, three, four = "<a_1><b_1><c_1>", "<a_1><b_1><c_2>", "<a_2><b_1><c_1>", "<a_1><b_1><c_9>"
    steps = [([one], two), ([one, two], three), ([three], two)]
    rules = CountingRules(steps, [one, two, three, four])
    found = rules.recommend([one], 9)
    assert found == {
        "popularity": [two, three, one],
        "transitions": [two, three, one],
        "transitions with shared prefix": [two, one, four, three],
    }
    assert rules.recommend(["<a_7><b_7><c_7>"], 2)["transitions with shared prefix"] == [two, three]


def test_the_counting_rules_reach_the_known_figures_on_industrial(shelf: Path, tmp_path: Path) -> None:
    """Figures counted once by others on the same rows; a row is read by its own reader there."""
    out = tmp_path / "industrial"
    arguments = ["--data", str(shelf / "minionerec"), "--category", "Industrial_and_Scientific"]
    cli.start("recommend", ["prepare", *arguments, "--train", "train_recovered", "--out", str(out)])
    steps = {
        split: [
            (row["history"], row["item"])
            for row in map(json.loads, (out / split / "sequences.jsonl").read_text().splitlines())
        ]
        for split in ("train", "test")
    }
    catalogue = list(dict.fromkeys(line.split("\t")[0] for line in (out / "catalogue.txt").read_text().splitlines()))
    assert (len(catalogue), len(steps["train"]), len(steps["test"])) == (3670, 8350, 4533)
    found = counting_figures(CountingRules(steps["train"], catalogue), steps["test"], 50, set(catalogue))
    rounded = {rule: [round(value, 4) for value in figures["hr"].values()] for rule, figures in found.items()}
    assert rounded == {
        "popularity": [0.0441, 0.0488, 0.0532, 0.0598, 0.0743, 0.1171],
        "transitions": [0.0657, 0.0781, 0.0887, 0.0995, 0.1110, 0.1513],
        "transitions with shared prefix": [0.0664, 0.0854, 0.1066, 0.1416, 0.1723, 0.2138],
    }
    best = found["transitions with shared prefix"]
    assert [round(value, 4) for value in best["ndcg"].values()] == [0.0664, 0.0774, 0.0860, 0.0974, 0.1051, 0.1133]
    assert not any(figures["invalid_prediction_count"] for figures in found.values())
    rows = [json.loads(line) for line in (out / "train" / "sid_item_alignment.jsonl").read_text().splitlines()]
    assert len(rows) == 3670 + 3646
