"""That grpo makes a model better, and that it is the reward which does: whole runs, so minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 20
REWARDS = """
from random import Random

draw = Random(0)

def chance(prompt, completion, row):
    return float(draw.random() < 0.4)
"""


def command(*arguments: str) -> None:
    """A command of lacuna as a user gives it, on one device."""
    program = [sys.executable, "-c", "from lacuna.cli import main; main()", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run(program, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with sft_halfway in it."""
    folder = tmp_path_factory.mktemp("runs")
    command("sft", "@", "configs/sft_halfway.toml", "--output-dir", str(folder))
    return folder


def held_out(folder: Path, name: str, *reward: str) -> list[float]:
    """Shares of the held-out problems that are right after the first step and after each ten of a run."""
    arguments = ["--output-dir", str(folder), "--run-name", name, "--model-name", str(folder / "sft_halfway")]
    command("grpo", "@", "configs/grpo_tiny.toml", *arguments, "--steps", str(STEPS), "--reward", *reward)
    records = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [record["eval_reward/correct"] for record in records if "eval_reward/correct" in record]


@pytest.fixture(scope="module")
def start(halfway: Path) -> float:
    """The share that is right before reinforcement."""
    model = ["--model-name", str(halfway / "sft_halfway"), "--output-dir", str(halfway), "--run-name", "start"]
    command("eval", "@", "configs/eval_tiny.toml", "--tasks", "generate", *model)
    return json.loads((halfway / "start" / "summary.json").read_text())["generate"]["pass@1"]


@pytest.mark.slow
def test_the_reward_of_right_answers_makes_more_of_them_right(halfway: Path, start: float) -> None:
    assert 0.2 < start < 0.5
    assert held_out(halfway, "right", "correct:1.0")[-1] > start + 0.25


@pytest.mark.slow
def test_the_reward_of_wrong_answers_makes_fewer_right(halfway: Path, start: float) -> None:
    assert held_out(halfway, "wrong", "correct:-1.0")[-1] < start - 0.15


@pytest.mark.slow
def test_a_reward_by_chance_leaves_the_model_as_it_was(halfway: Path, start: float, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    values = held_out(halfway, "chance", f"{tmp_path / 'rewards.py'}:chance:1.0", "correct:0.0")
    assert all(abs(value - start) < 0.1 for value in values)
