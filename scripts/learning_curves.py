"""Gather the curves of grpo runs into a table, and draw them.

    uv run --with matplotlib python scripts/learning_curves.py docs/grpo_tiny runs/grpo_tiny_*

writes docs/grpo_tiny.csv and docs/grpo_tiny.svg: a curve of each run, named after its folder.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402  the backend is chosen before

COLUMNS = (
    "step",
    "reward",
    "eval_reward/correct",
    "completion_length",
    "truncated_fraction",
    "entropy",
    "step_seconds",
)


def main() -> None:
    target, *directories = map(Path, sys.argv[1:])
    curves = {directory.name: read(directory) for directory in directories}
    if not curves:
        sys.exit(__doc__)
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", *COLUMNS))
        for name, records in curves.items():
            writer.writerows((name, *(round_off(record.get(column)) for column in COLUMNS)) for record in records)
    draw(curves, target.with_suffix(".svg"))


def read(directory: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def round_off(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Share of held-out problems answered right, and tokens of a completion, by step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, records in curves.items():
        measured = [(r["step"], r["eval_reward/correct"]) for r in records if "eval_reward/correct" in r]
        left.plot(*zip(*measured, strict=True), marker=".", label=name)
        rolled_out = [(r["step"], r["completion_length"]) for r in records if "completion_length" in r]
        right.plot(*zip(*rolled_out, strict=True), label=name)
    left.set(xlabel="step", ylabel="held-out problems right, greedy", ylim=(0, 1))
    right.set(xlabel="step", ylabel="tokens of a completion", ylim=(0, None))
    left.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    matplotlib.rcParams["svg.hashsalt"] = "lacuna"
    figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
