"""Our model as lm-evaluation-harness sees it, against the harness's own model class on transformers."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import REFERENCE

pytest.importorskip("lm_eval", reason="the extra eval is not installed: uv sync --extra eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from lacuna import cli
from lacuna.apps import harness  # noqa: E402
from lacuna.config import (
    EvalConfig,  # noqa: E402
    UserError,  # noqa: E402
)
from lacuna.eval import Predictions  # noqa: E402
from lacuna.tokenizer import load_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[1]
TASKS = ("tiny_choices", "tiny_rolling", "tiny_generate")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks' files name their data from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))  # thousands, read slowly


def config_of(shelf: Path, output_dir: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "model_name": str(shelf / "weights" / "stories260k"), "output_dir": str(output_dir), "run_name": "eval",
        "tasks": TASKS, "task_path": str(REFERENCE / "harness"), "capacity": 512, "slots": 8, "batch_size": 2,
        "compute_dtype": "float32",
    }  # fmt: skip
    return EvalConfig(**settings | changes)


def measured(config: EvalConfig) -> dict[str, Any]:
    cli.run(config)
    return json.loads((config.run_directory / "summary.json").read_text())


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["plain", "chat"])
def test_tasks_have_the_figures_of_the_harness_on_transformers(shelf: Path, tmp_path: Path, way: str) -> None:
    expected = json.loads((REFERENCE / "harness" / "expected.json").read_text())[way]
    template = {"harness_chat": True, "chat_template": "configs/chat_template.jinja"} if way == "chat" else {}
    config = config_of(shelf, tmp_path, **template)
    found = measured(config)
    for task in TASKS:
        for name, value in expected[task]["figures"].items():
            assert found[task][name.removesuffix(",none")] == pytest.approx(value, rel=1e-5), (task, name)
    lines = [json.loads(line) for line in (config.run_directory / "predictions.jsonl").read_text().splitlines()]
    ours = sorted(line["result"] for line in lines if line["task"] == "harness log-likelihood" and line["prompt"])
    theirs = sorted(each[0] for row in expected["tiny_choices"]["responses"] for each in row)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], atol=2e-4, rtol=0)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    texts = sorted(line["output"] for line in lines if line["task"] == "harness generation")
    assert texts == sorted(row[0][0] for row in expected["tiny_generate"]["responses"])


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_a_killed_harness_resumes(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, add = config_of(shelf, tmp_path, tasks=("tiny_choices",)), Predictions.add

    def killed(self: Predictions, *line: Any) -> None:
        if len(self.lines) == 6:
            raise KeyboardInterrupt
        add(self, *line)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", killed)
        with pytest.raises(KeyboardInterrupt, match="6 answers are kept"):
            cli.run(config)
    found = measured(config)
    lines = (config.run_directory / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 15 and found["tiny_choices"]["acc"] == 0.6


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_by_name(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny_choice is none of loss.*did you mean tiny_choices"):
        cli.run(config_of(shelf, tmp_path, tasks=("tiny_choice",)))
    with pytest.raises(UserError, match="task_path = 'nowhere' is no directory"):
        cli.run(config_of(shelf, tmp_path, task_path="nowhere"))


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for message in messages[1:] %}{{ message.content }}{% endfor %}")
    opened = SimpleNamespace(tokenizer=load_tokenizer(ROOT / "configs" / "tiny", str(tmp_path / "chat.jinja")))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    with pytest.raises(UserError, match=r"harness_chat: message 1 \(system\): the chat template leaves it out"):
        harness.Model.apply_chat_template(cast(harness.Model, SimpleNamespace(opened=opened)), messages)
