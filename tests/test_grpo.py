"""Rewards, and runs of grpo against themselves: sharded, resumed, replayed."""

import json
import math
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, TINY, grpo_config, make_small, mesh_of, records
from test_objective import random_samples

from lacuna import checkpoint, cli, grpo, objective, optimizer, trainer
from lacuna.apps.replay import samples_by_step
from lacuna.apps.rewards import Judge, load_rewards, rank, rule
from lacuna.checkpoint import OpenedModel, at, open_model
from lacuna.config import GrpoConfig, RewardKeys, UserError
from lacuna.distributed import make_mesh
from lacuna.environments import Rollout
from lacuna.eval import Problem, Problems
from lacuna.grpo import Answered, Inputs, Reward, rewards_of
from lacuna.metrics import LineFile, read_json_lines
from lacuna.model import embed, forward, head_of, read_model_config
from lacuna.objective import Sample
from lacuna.sampler import Completion, Sampler
from lacuna.tokenizer import decode, load_tokenizer

REWARDS = '''
from pathlib import Path

def letters(prompt, completion, row):
    """The share of letters that are vowels, and so different for most completions."""
    if Path(__file__).with_name("down").exists():
        raise ConnectionError("the judge is down")
    return sum(letter in "aeiou" for letter in completion) / (1 + len(completion))

def sometimes(prompt, completion, row):
    """Of every other problem the completions are all worth the same."""
    return letters(prompt, completion, row) if sum(map(ord, prompt)) % 2 else 0.5

def broken(prompt, completion, row):
    return 1 / 0

def infinite(prompt, completion, row):
    return float("inf")

def leaves(prompt, completion, row):
    raise SystemExit(0)
'''


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def run_config(small: Path, rewards_file: Path, **changes: Any) -> GrpoConfig:
    settings: dict[str, Any] = {
        "model_name": str(small), "from_scratch": True, "output_dir": str(small.parent / "runs"), "seed": 3,
        "data": ({"path": str(small / "heldout.jsonl"), "split": "train[:30]"},), "sequence_length": 160,
        "reward": (f"{rewards_file}:letters:2.0", "correct:1.0"), "mask_truncated": False,
    }  # fmt: skip
    return grpo_config(**settings | changes)


# Rewards


def problem(answer: str) -> Problem:
    return Problem("data.jsonl line 7", "How many?", (1,), answer, {"answer": answer, "question": "How many?"})


def asked(rewards: Sequence[Reward], answered: Sequence[Answered], step: int = 1, **keys: Any) -> Any:
    return rewards_of(rewards, answered, "step 0", step, RewardKeys(**keys), lambda: None)


def test_rewards_of_ours_judge_answer_and_format() -> None:
    rewards = load_rewards(["gsm8k_correct:1.0", "format:0.2"])
    texts = ("#### 1200", "It is 1200.", "#### 7", "none", "#### none", "1200 ####", "the answer is 1200")
    answered = [Answered(problem("so #### 1,200"), text) for text in texts]
    values, seconds, _ = asked(rewards, answered)
    assert values == {"gsm8k_correct": [1, 1, 0, 0, 0, 1, 1], "format": [1, 0, 1, 0, 0, 0, 0]}
    assert [reward.weight for reward in rewards] == [1.0, 0.2] and seconds.keys() == values.keys()


def test_the_penalty_of_long_completions_is_that_of_dapo() -> None:
    (reward,) = load_rewards(["overlong:0.5"])
    lengths = (1, 15, 16, 18, 20, 20, 3)
    answered = [Answered(problem("1"), "", (1,) * length, number > 4, 20) for number, length in enumerate(lengths)]
    expected = [np.clip((16 - length) / 4, -1, 0) for length in lengths[:5]] + [-1, -1]
    assert asked([reward], answered)[0]["overlong"] == pytest.approx(expected) and reward.weight == 0.5


@pytest.mark.parametrize(
    ("name", "why"),
    [("broken", "ZeroDivisionError: division by zero"), ("infinite", "it gave inf"), ("leaves", "SystemExit: 0")],
)
def test_a_reward_that_fails_names_itself_and_the_row(rewards_file: Path, name: str, why: str) -> None:
    (reward,) = load_rewards([f"{rewards_file}:{name}:1"])
    with pytest.raises(UserError, match=rf"reward {name} on data.jsonl line 7: {why}; the completion begins 'text'"):
        asked([reward], [Answered(problem("1"), "text")])


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("corect:1", "no such reward; ours are correct"),
        ("nowhere.py:score:1", "nowhere.py: no such file"),
        ("{file}:absent:1", "has no function absent"),
        ("correct:nan", "its weight is nan"),
        ("no_such_module:score:1", "fails on import: ModuleNotFoundError"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(rewards_file: Path, spec: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_rewards([spec.replace("{file}", str(rewards_file))])


JUDGES = """
import asyncio, threading, time
from beside import half
barrier, calls, loops = threading.Barrier(4, timeout=60), [], set()

def by_name(prompt, completion, row, messages, step, truncated, tokens):
    row.clear()
    return len(messages) + 10 * step + 100 * truncated + 1000 * len(tokens)

def of_all(completions, rows, **others):
    assert sorted(others) == ["environments", "max_completion_tokens", "messages", "prompts", "step", "tokens",
                              "truncated"]
    return [half(text) if row else None for text, row in zip(completions, rows)]

def short(completions):
    return [1.0]

async def slowly(prompt, completion, row):
    loops.add(asyncio.get_running_loop())
    await asyncio.sleep(1000 * (completion == "hangs"))
    return len(completion)

def together(prompt, completion, row):
    return barrier.wait() * 0.0

def hangs(prompt, completion, row):
    time.sleep(1000 * (completion == "hangs"))
    return 1.0

def flaky(prompt, completion, row):
    calls.append(completion)
    if calls.count(completion) < 3:
        raise ConnectionError("no answer")
    return 1.0

def asks_too_much(prompt, completion, row, weather):
    return 0.0
"""


@pytest.fixture
def judges(tmp_path: Path) -> Callable[[str], Reward]:
    (tmp_path / "math.py").write_text(JUDGES)  # of the name of a module of Python
    (tmp_path / "beside.py").write_text("def half(text):\n    return len(text) / 2\n")
    return lambda name: load_rewards([f"{tmp_path / 'math.py'}:{name}"])[0]


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def of(reward: Reward, texts: Sequence[str], **keys: Any) -> Any:
    values, _, failures = asked([reward], [Answered(problem("1"), text, (1, 2), True) for text in texts], **keys)
    return (values[reward.name], failures) if failures else values[reward.name]


def test_a_reward_gets_what_it_asks_for_and_a_row_of_its_own(judges: Callable[[str], Reward]) -> None:
    here = replace(problem("1"), messages=[{"role": "user", "content": "?"}])
    values, *_ = asked([judges("by_name")], [Answered(here, "a", (1, 2, 3), True)] * 2, step=7)
    assert values == {"by_name": [3171, 3171]} and here.row["answer"] == "1"
    with pytest.raises(UserError, match="asks for weather; a reward gets prompt, completion and row, or prompts"):
        judges("asks_too_much")


def test_a_reward_may_take_all_completions_at_once_or_be_async(judges: Callable[[str], Reward]) -> None:
    assert of(judges("of_all"), ["a", "bcd"]) == [0.5, 1.5]
    with pytest.raises(UserError, match="reward short on data.jsonl line 7: it gave 1 values for 2 completions"):
        of(judges("short"), ["a", "b"])
    assert of(judges("slowly"), ["a", "bcd", "ef"], reward_workers=2) == [1, 3, 2]


def test_calls_are_made_side_by_side_and_again_where_they_fail(judges: Callable[[str], Reward]) -> None:
    assert of(judges("together"), ["a"] * 8, reward_workers=4) == [0.0] * 8  # each waits for three others
    assert of(judges("flaky"), ["a", "b"], reward_retries=2) == [1, 1]
    with pytest.raises(UserError, match="ConnectionError: no answer"):
        of(judges("flaky"), ["c"], reward_retries=1)


@pytest.mark.parametrize("name", ["hangs", "slowly"])
def test_a_call_that_hangs_ends_at_its_limit(judges: Callable[[str], Reward], name: str) -> None:
    values, failures = of(judges(name), ["hangs", "a"], reward_seconds=0.3, on_reward_error="drop")
    assert values == [None, 1] and len(failures) == 1 and "it took more than 0.3 s" in failures[0]
    with pytest.raises(UserError, match="on data.jsonl line 7: it took more than 0.3 s .*; .* begins 'hangs'"):
        of(judges(name), ["hangs", "a"], reward_seconds=0.3)


def test_a_slow_judge_is_work_that_is_reported_while_it_is_done(tmp_path: Path) -> None:
    is_reported = threading.Event()
    reported = Judge("slow", lambda prompt, completion, row: float(is_reported.wait(60)), ())
    reward = Reward("slow", 1.0, reported)
    values, *_ = rewards_of([reward], [Answered(problem("1"), "a")], "step 0", 1, RewardKeys(), is_reported.set)
    assert values == {"slow": [1.0]}


def test_a_reward_may_have_processes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "pooled.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n\n"
        "def length(text):\n    return len(text)\n\n"
        "def score(completions):\n"
        "    with ProcessPoolExecutor(1, get_context('spawn')) as pool:\n"
        "        return list(pool.map(length, completions))\n"
    )
    assert of(load_rewards([f"{tmp_path / 'pooled.py'}:score"])[0], ["a", "bcd"]) == [1, 3]


def test_a_completion_without_a_reward_is_in_no_mean_and_in_no_loss() -> None:
    rewards = [Reward("one", 1.0, lambda *_: []), Reward("two", 2.0, lambda *_: [])]
    values: dict[str, list[float | None]] = {"one": [1.0, None, None, 0.0], "two": [None, 0.5, None, 1.0]}
    total = grpo.total_reward(rewards, values)
    np.testing.assert_array_equal(total, [1.0, 1.0, np.nan, 2.0])
    found = objective.advantages(total[None], False)[0]
    np.testing.assert_allclose(found, [-1 / 3, -1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(
        objective.advantages(total[None], True)[0, 3], 2 / 3 / (np.std([1, 1, 2], ddof=1) + 1e-4)
    )
    group = [
        replace(random_samples(150)[0], rewards={"one": one, "two": two}, reward=float(np.nan_to_num(worth)))
        for one, two, worth in zip(values["one"], values["two"], total, strict=True)
    ]
    assert [sample.is_judged for sample in group] == [True, True, False, True]
    assert objective.kept_samples([group], grpo_config()) == [group[0], group[1], group[3]]
    assert not objective.has_variance(group[:3])
    facts = grpo.rollout_facts([group])
    assert facts["reward"] == 4 / 3 and facts["reward/one"] == 0.5 and facts["reward/two"] == 0.75


def test_special_tokens_but_for_the_one_that_ends_it_reach_a_reward() -> None:
    tokenizer = load_tokenizer(TINY)
    steps: Any = SimpleNamespace(
        inputs=SimpleNamespace(opened=SimpleNamespace(tokenizer=tokenizer)), stop_ids=(2,), special_ids={0, 1, 2},
        config=grpo_config(stop=("cd",)),
    )  # fmt: skip
    ids = tuple(tokenizer.backend.encode("a<|im_start|>b").ids)
    completion = Completion(0, 0, (*ids, 2), "ab", (), (), (), "stop")
    rollout = Rollout(problem("1"), (0, 0), (1,), completion)
    expected = Answered(problem("1"), "a<|im_start|>b", (*ids, 2), False, 9, [])
    assert grpo.RolloutSteps.answered(steps, rollout) == expected
    ids = tuple(tokenizer.backend.encode("a<|im_start|>bcde").ids)
    stopped = Completion(0, 0, ids, "ab", (), (), (), "stop")
    assert grpo.RolloutSteps.answered(steps, replace(rollout, completion=stopped)).text == "a<|im_start|>b"
    plain = Completion(0, 0, (ids[0], 2), "a", (), (), (), "stop")
    assert grpo.RolloutSteps.answered(steps, replace(rollout, completion=plain)).text == "a"


def test_a_module_in_the_working_directory_can_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text("def score(prompt, completion, row):\n    return 2\n")
    monkeypatch.chdir(tmp_path)
    assert of(load_rewards(["my_judge:score"])[0], ["a"]) == [2]


def test_a_run_whose_judge_fails_saves_its_last_step_and_resumes_as_if_it_had_not(
    finished: GrpoConfig, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.model_copy(update={"run_name": "judge_down", "save_every": 0})
    down, usual, updates = Path(finished.reward[0].partition(":")[0]).with_name("down"), grpo.update, iter(range(9))

    def update(*given: Any) -> Any:
        if next(updates) == 2:
            down.touch()
        return usual(*given)

    monkeypatch.setattr(grpo, "update", update)
    try:
        with pytest.raises(UserError, match="ConnectionError: the judge is down; .*; step 3 is saved: .* --resume"):
            cli.run(config)
    finally:
        down.unlink()
    assert checkpoint.saved_steps(config.run_directory)[-1] == 3
    cli.run(config.model_copy(update={"resume": True}))
    assert logged(config) == logged(finished)


def test_a_reward_file_that_leaves_on_import_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(UserError, match="leaves.py fails on import: SystemExit: 0"):
        load_rewards([f"{tmp_path / 'leaves.py'}:score"])


def test_other_weights_of_the_policy_that_a_run_is_held_to_are_refused_by_name(tmp_path: Path) -> None:
    source = Path(shutil.copytree(REFERENCE / "qwen3", tmp_path / "model"))
    shutil.copyfile(TINY / "tokenizer.json", source / "tokenizer.json")
    model, tokenizer = read_model_config(source), load_tokenizer(source)
    opened = OpenedModel(source, model, tokenizer, mesh_of(1, 1, 1), "", at(source))
    inputs = Inputs(opened, Problems((), (), ("a digest",)), None, load_rewards(["correct"]))
    config = grpo_config(model_name=str(source), kl_weight=0.1)
    before = grpo.input_digests(config, inputs)
    facts = {"model": trainer.model_facts(opened.model), "data": ("a digest",), "inputs": before}
    run: Any = SimpleNamespace(
        config=config, inputs=before, resumed=(source, SimpleNamespace(run=SimpleNamespace(**facts)))
    )
    trainer.Run.check_unchanged(run, opened, ("a digest",))
    for path in source.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    run.inputs = grpo.input_digests(config, inputs)
    with pytest.raises(UserError, match=f"the weights of {source}: its content has changed"):
        trainer.Run.check_unchanged(run, opened, ("a digest",))
    assert grpo.input_digests(config.model_copy(update={"kl_weight": 0.0}), inputs) == {}


# Whole runs


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "make_mesh", lambda *_: mesh_of(1, 1, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> GrpoConfig:
    """A run of four steps."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "my_rewards.py").write_text(REWARDS)
    small = make_small(directory / "small")
    config = run_config(small, directory / "my_rewards.py", save_every=2, keep=9, eval_every=2,
                      eval_data=({"path": str(small / "heldout.jsonl"), "split": "train[30:36]"},))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "make_mesh", lambda *_: mesh_of(1, 1, 1))
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        cli.run(config)
    return config


LOGGED = ("step", "reward", "reward/letters", "loss", "gradient_norm", "entropy", "eval_reward", "completion_length")


def logged(config: GrpoConfig) -> list[list[Any]]:
    return [[record.get(key) for key in LOGGED] for record in records(config)]


def test_a_run_logs_saves_resumes_and_replays(
    finished: GrpoConfig, one_device: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards_file = Path(finished.reward[0].partition(":")[0])
    start, first, *_ = records(finished)
    assert start.keys() == {"step", "eval_reward", "eval_reward/letters", "eval_reward/correct"}
    assert {"reward/letters", "reward/correct", "completion_length", "truncated_fraction", "zero_advantage_fraction",
            "clip_fraction", "rollout_seconds", "update_seconds"} <= first.keys()  # fmt: skip
    assert max(record["logprob_difference_max"] for record in records(finished)[1:]) < 1e-4
    directory = finished.run_directory
    lines = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 16 and all(len(line["tokens"]) == len(line["log_probabilities"]) for line in lines)
    assert "Reward" in (directory / "report.html").read_text()

    resumed = finished.model_copy(update={"run_name": "again"})
    rollouts, usual = iter(range(9)), grpo.rewards_of

    def rewards_of(*given: Any) -> Any:
        assert next(rollouts) < 3, "power cut"
        return usual(*given)

    monkeypatch.setattr(grpo, "rewards_of", rewards_of)
    with pytest.raises(AssertionError, match="power cut"):
        cli.run(resumed)
    monkeypatch.setattr(grpo, "rewards_of", usual)
    assert len(records(resumed)) < 5
    cli.run(resumed.model_copy(update={"resume": True}))
    assert logged(resumed) == logged(finished)
    assert (resumed.run_directory / "model" / "model.safetensors").read_bytes() == (
        directory / "model" / "model.safetensors"
    ).read_bytes()
    assert (resumed.run_directory / "rollouts.jsonl").read_text() == (directory / "rollouts.jsonl").read_text()

    working = rewards_file.read_text()
    rewards_file.write_text(working + "\n")
    with pytest.raises(UserError, match="the file of reward letters: its content has changed since the checkpoint"):
        cli.run(resumed.model_copy(update={"resume": True}))
    rewards_file.write_text(working)

    capsys.readouterr()
    arguments = ["--replay", str(directory), "--step", "3"]
    for change in ([], ["--loss-normalisation", "constant"]):
        cli.start("grpo", [*arguments, *change])
        again = json.loads(capsys.readouterr().out)
        same = [again[key] == records(finished)[3][key] for key in ("loss", "gradient_norm", "entropy", "reward")]
        assert same == [True] * 4 if not change else same == [False, False, True, True]

    cli.run(resumed.model_copy(update={"resume": True, "steps": 5, "learning_rate": 1e-3}))
    capsys.readouterr()
    arguments = ["--replay", str(resumed.run_directory), "--step", "4"]
    cli.start("grpo", arguments)
    printed, problems = capsys.readouterr()
    again, record = json.loads(printed), records(finished)[4]
    assert again.pop("skipped") == 0 and again == {name: record[name] for name in again} and not problems
    for step in (2, 4):
        shutil.rmtree(checkpoint.checkpoint_directory(resumed.run_directory, step))
    cli.start("grpo", arguments)
    assert "WARNING: step 1 differs from metrics.jsonl (other devices" in capsys.readouterr().err


def test_groups_whose_rewards_are_alike_are_replaced_by_further_problems(
    small: Path,
    rewards_file: Path,
    one_device: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"refill": 2, "save_every": 1, "keep": 9, "seed": 4, "reward": (f"{rewards_file}:sometimes:1.0",)}
    whole, killed = (run_config(small, rewards_file, run_name=name, **changes) for name in ("whole", "killed"))
    cli.run(whole)
    lines, place = read_json_lines(whole.run_directory / "rollouts.jsonl"), 0
    asked_counts = set[int]()
    for record in records(whole):
        groups: dict[int, list[Any]] = {}
        for line in lines:
            if line["step"] == record["step"]:
                groups.setdefault(line["place"], []).append(line)
        alive = [len({line["reward"] for line in group}) > 1 for group in groups.values()]
        expected = next((count for count in range(4, 8) if sum(alive[:count]) == 4), 8)
        assert list(groups) == [*range(place, place + expected)]
        place += expected
        asked_counts.add(expected)
        used = sum(
            len(line["tokens"])
            for is_alive, group in zip(alive, groups.values(), strict=True)
            for line in group * is_alive
        )
        assert record["target_tokens"] == used and record["prompts"] == expected
        assert record["zero_advantage_fraction"] == pytest.approx(1 - sum(alive) / expected)
    assert 4 < min(asked_counts) < max(asked_counts) == 8, "a step that is filled, and one that can't be"

    calls, usual = iter(range(99)), grpo.rewards_of

    def rewards_of(*given: Any) -> Any:
        assert next(calls) < 6, "power cut"
        return usual(*given)

    monkeypatch.setattr(grpo, "rewards_of", rewards_of)
    with pytest.raises(AssertionError, match="power cut"):
        cli.run(killed)
    monkeypatch.setattr(grpo, "rewards_of", usual)
    assert 0 < len(records(killed)) < 4
    cli.run(killed.model_copy(update={"resume": True}))
    assert logged(killed) == logged(whole)
    for name in ("rollouts.jsonl", "model/model.safetensors"):
        assert (killed.run_directory / name).read_bytes() == (whole.run_directory / name).read_bytes()
    capsys.readouterr()
    cli.start("grpo", ["--replay", str(whole.run_directory), "--step", "3"])
    again, record = json.loads(capsys.readouterr().out), records(whole)[2]
    assert again.pop("skipped") == 0 and again == {name: record[name] for name in again}


def test_an_epoch_asks_each_source_as_often_as_its_weight_says(small: Path, rewards_file: Path) -> None:
    path = str(small / "heldout.jsonl")
    data = ({"path": path, "split": "train[:16]", "weight": 1.5}, {"path": path, "split": "train[16:26]"})
    config = run_config(small, rewards_file, data=data, steps=0, epochs=3)
    problems = Problems(tuple(problem(str(number)) for number in range(26)), (16, 10), ("", ""))
    assert grpo.step_count(config, problems) == (3 * (24 + 10) + 3) // 4
    order = grpo.order_of(config, problems)
    assert [order.size(epochs) for epochs in range(4)] == [0, 34, 68, 102]
    times = np.bincount(np.concatenate([order.epoch(epoch) for epoch in range(2)]))
    assert times.tolist() == [3] * 16 + [2] * 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", "line 2: step: Field required"),
        ('{"step": "x"}', "line 2: step: Input should be a valid integer"),
        ("\0" * 9, "line 2: .* is not a JSON object"),
        ("[" * 9999, "line 2: .* is not a JSON object"),
    ],
)
def test_a_damaged_line_of_rollouts_is_named(finished: GrpoConfig, line: str, reason: str, tmp_path: Path) -> None:
    lines = (finished.run_directory / "rollouts.jsonl").read_text().splitlines()
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join([lines[0], line, *lines[1:], ""]))
    with pytest.raises(UserError, match=f"rollouts.jsonl {reason}"):
        samples_by_step(path, 1)


def test_the_figures_of_a_rollout_are_those_of_its_samples(finished: GrpoConfig) -> None:
    lines = read_json_lines(finished.run_directory / "rollouts.jsonl")
    for record in records(finished)[1:]:
        ours = [line for line in lines if line["step"] == record["step"]]
        groups = np.array([line["reward"] for line in ours]).reshape(4, 4)
        lengths = [len(line["tokens"]) for line in ours]
        expected = {
            "reward": groups.mean(),
            "reward_std": np.sqrt(((groups - groups.mean(1, keepdims=True)) ** 2).mean(1)).mean(),
            "reward/letters": sum(line["rewards"]["letters"] for line in ours) / 16,
            "completion_length": sum(lengths) / 16,
            "completion_tokens": sum(lengths),
            "truncated_fraction": sum(
                length == 9 and line["is_truncated"] for length, line in zip(lengths, ours, strict=True)
            )
            / 16,
            "zero_advantage_fraction": sum(len(set(group)) == 1 for group in groups.tolist()) / 4,
            "target_tokens": sum(lengths),
            "tokens_per_second": sum(lengths) / record["step_seconds"],
        }
        assert {name: record[name] for name in expected} == pytest.approx(expected)
        assert record["tokens"] >= record["target_tokens"]
        used = record["tokens"] / record["packing_efficiency"]  # slots of whole micro-batches of one row
        assert used == pytest.approx(160 * round(used / 160)) and used >= record["tokens"]
        assert record["step_seconds"] >= record["rollout_seconds"] + record["update_seconds"] - 1e-3


def test_a_sampler_with_other_weights_is_seen_in_the_log_and_ends_the_run(
    small: Path, rewards_file: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_weights = Sampler.load

    def disturbed(sampler: Sampler, params: Any) -> None:
        load_weights(sampler, jax.tree.map(lambda leaf: leaf * 1.5, params))

    monkeypatch.setattr(Sampler, "load", disturbed)
    config = run_config(small, rewards_file, steps=1, temperature=0.7, top_p=0.8)
    with pytest.raises(UserError, match="step 1: log-probabilities of sampler and trainer differ by"):
        cli.run(config)
    opened = open_model(config, mesh_of(1, 1, 1), with_weights=False)
    params, model = optimizer.starting_state(config, opened).params, opened.model

    @jax.jit
    def table_of(params: Any, token: Any) -> Any:
        place = jnp.arange(token.shape[1])[None]
        hidden = forward(params, embed(params, token, "float32"), jnp.ones_like(token), place, model)
        return jax.nn.log_softmax(hidden @ head_of(params, model).T / 0.7)

    differences, cut = [], []
    for line in read_json_lines(config.run_directory / "rollouts.jsonl"):
        ids = [*line["prompt_tokens"], *line["tokens"]]
        whole = np.zeros((1, 160), np.int32)
        whole[0, : len(ids)] = ids
        here = slice(len(line["prompt_tokens"]) - 1, len(ids) - 1)
        found = np.asarray(table_of(params, whole))[0, here][np.arange(len(line["tokens"])), line["tokens"]]
        differences.append(np.abs(found - np.array(line["log_probabilities"])).max())
        of_sampler = jax.tree.map(lambda leaf: leaf * 1.5, params)
        probability = np.sort(np.exp(np.asarray(table_of(of_sampler, whole), np.float64)[0, here]))[:, ::-1]
        before = np.cumsum(probability, axis=1) - probability  # of the likelier ones
        cut += [row[mass >= 0.8].sum() for row, mass in zip(probability, before, strict=True)]
    (record,) = records(config)
    assert max(differences) > 0.01 and not checkpoint.saved_steps(config.run_directory)
    assert record["logprob_difference_max"] == pytest.approx(max(differences), rel=1e-3)
    assert record["cut_probability"] == pytest.approx(np.mean(cut), rel=1e-3) and np.mean(cut) > 0.1


def test_the_watchdog_does_not_watch_the_first_rollout_which_compiles(
    small: Path, rewards_file: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, watched = grpo.RolloutSteps.rollout, []

    def noted(steps: grpo.RolloutSteps, asked: Any) -> Any:
        watched.append(steps.run.watchdog.reported_at is not None)
        return rollout(steps, asked)

    monkeypatch.setattr(grpo.RolloutSteps, "rollout", noted)
    held_out = ({"path": str(small / "heldout.jsonl"), "split": "train[30:32]"},)
    cli.run(run_config(small, rewards_file, steps=2, eval_data=held_out))
    assert watched == [False, True]


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_what_is_rewarded_is_done_more_often(small: Path, rewards_file: Path, one_device: None, sign: int) -> None:
    config = run_config(small, rewards_file, steps=10, prompts_per_step=6, completions_per_prompt=8, slots=48,
                      learning_rate=3e-2, reward=(f"{rewards_file}:letters:{sign}.0",))  # fmt: skip
    cli.run(config)
    share = [record["reward/letters"] for record in records(config)]
    assert sign * (np.mean(share[-3:]) - np.mean(share[:3])) > 0.05, share


def test_a_rollout_with_any_text_is_kept_and_cut(tmp_path: Path) -> None:
    sample = Sample(1, 0, 0, "", (1,), (2,), "a\u2028b\x85\r\nc", (0.0,), (0.0,), False, {}, 0.0, 0.0)
    path = tmp_path / "rollouts.jsonl"
    with closing(LineFile(path)) as lines:
        for each in (sample, replace(sample, step=2)):
            lines.write(json.dumps(asdict(each), ensure_ascii=False))
    LineFile(path, last_step=1).close()
    (line,) = read_json_lines(path)
    assert line["text"] == sample.text


def test_eight_devices_do_what_one_does(finished: GrpoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "make_mesh", make_mesh)
    spread = finished.model_copy(
        update={"run_name": "spread", "data_parallel": 2, "fsdp": 2, "tensor": 2, "compilation_cache": False}
    )
    cli.run(spread)
    for one, other in zip(logged(finished), logged(spread), strict=True):
        np.testing.assert_allclose(
            np.array([value or 0 for value in other]), np.array([value or 0 for value in one]), atol=1e-4, rtol=1e-3
        )


def test_several_updates_a_rollout_clip_and_penalise(small: Path, rewards_file: Path, one_device: None) -> None:
    config = run_config(
        small, rewards_file, updates_per_rollout=2, kl_weight=0.05, learning_rate=0.05, steps=3, top_k=20,
        temperature=1.3, warmup_steps=2,
    )  # fmt: skip
    cli.run(config)
    assert [record["learning_rate"] for record in records(config)[:2]] == pytest.approx([0.025, 0.05])  # by the last
    for record in records(config):
        assert record["kl"] > 0 and record["importance_mean"] < 1  # top_k makes what is sampled likelier
        assert record["logprob_difference_max"] < 1e-4 < record["cut_probability"]
    assert any(record["clip_fraction"] > 0 for record in records(config))


@pytest.mark.parametrize(("changes", "why"), [
    ({"mask_truncated": True}, "100% of completions are cut off at max_completion_tokens = 2, and mask_truncated"),
    ({"reward": ("correct:1.0",)}, "the completions of 100% of problems are all worth the same, and 100% of compl"),
])  # fmt: skip
def test_a_run_that_learns_nothing_says_so_and_how_to_change_it(
    small: Path, rewards_file: Path, one_device: None, changes: dict[str, Any], why: str
) -> None:
    settings = {"max_completion_tokens": 2, "temperature": 0.01}  # which no end of a text is drawn in
    config = run_config(small, rewards_file, steps=7, **settings | changes)
    cli.run(config)
    lines = (config.run_directory / "run.log").read_text().splitlines()
    warnings = [line for line in lines if "taught nothing" in line]
    assert len(warnings) == 2 and all(
        re.search(f"WARNING: [36] steps in a row taught nothing: {why}", x) for x in warnings
    )
    empty = [record["empty_updates"] for record in records(config)]
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert summary["empty_steps"] == sum(empty) == 7


def test_a_completion_ends_at_a_stop_text_which_is_trained_on(
    small: Path, rewards_file: Path, one_device: None
) -> None:
    config = run_config(small, rewards_file, steps=1, stop=("e",))
    cli.run(config)
    (record,) = records(config)
    lines = read_json_lines(config.run_directory / "rollouts.jsonl")
    tokenizer = load_tokenizer(small)
    stopped = [line for line in lines if not line["is_truncated"] and line["tokens"][-1] not in tokenizer.ends]
    assert len(stopped) > 4
    for line in stopped:
        whole, before = (decode(tokenizer, tokens) for tokens in (line["tokens"], line["tokens"][:-1]))
        assert line["text"] == whole.partition("e")[0] and "e" in whole and "e" not in before
    groups = [lines[first : first + 4] for first in range(0, 16, 4)]
    alive = [group for group in groups if len({line["reward"] for line in group}) > 1]
    assert record["target_tokens"] == sum(len(line["tokens"]) for group in alive for line in group) > 0


def test_what_does_not_fit_is_refused(small: Path, rewards_file: Path, one_device: None) -> None:
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and there is room for 15"):
        cli.run(run_config(small, rewards_file, sequence_length=24))
    with pytest.raises(UserError, match="prompts_per_step = 40 is more than the 30 problems"):
        cli.run(run_config(small, rewards_file, prompts_per_step=40))


def test_nothing_is_compiled_after_the_first_steps(
    compiled: list[tuple[int, str]], small: Path, rewards_file: Path, one_device: None
) -> None:
    held_out = ({"path": str(small / "heldout.jsonl"), "split": "train[30:36]"},)
    config = run_config(small, rewards_file, steps=8, eval_every=2, save_every=2, eval_data=held_out)
    cli.run(config)
    assert (0, "jit(train_step)") in compiled
    assert {name for step, name in compiled if step > 0} <= {"jit(prefill)"}  # of prompts longer than those before
    assert [each for each in compiled if each[0] > 3] == []
    assert f"compiled programs are kept in {config.cache_dir}" in (config.run_directory / "run.log").read_text()


def test_items_are_judged_by_rule_and_by_their_rank_in_a_group() -> None:
    rows = [{"answer": "<a_1>\n"}] * 3 + [{"answer": "x"}] * 2
    prompts, texts = ["p"] * 3 + ["q"] * 2, ["<a_2>\n", ' "<a_1>"\n', "<a_1> <a_1>", "y", "z"]
    assert [rule(*each) for each in zip(prompts, texts, rows, strict=True)] == [0, 1, 0, 0, 0]
    total = 1 + 1 / math.log2(3) + 1 / 2
    assert rank(prompts, texts, rows) == pytest.approx([-1 / total, 0, -1 / 2 / total, 0, 0])
    with pytest.raises(ValueError, match="no reference answer"):
        rank(["p"], ["y"], [{}])
