"""Tasks: answers judged, choices against transformers' log-likelihoods, and evaluations that go on where they were."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import REFERENCE, TINY, chat_run, make_small, mesh_of, records
from pydantic import ValidationError

from lacuna import checkpoint, cli
from lacuna import eval as evaluation
from lacuna.cli import parse
from lacuna.config import DataSource, EvalConfig, ModelKeys, UserError, to_toml
from lacuna.eval import Predictions, log_likelihoods
from lacuna.model import initial_params, read_model_config
from lacuna.tokenizer import encode, load_tokenizer
from lacuna.trainer import run_training as train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, as a directory."""
    config_only = make_small(tmp_path_factory.mktemp("model") / "small")
    config = read_model_config(config_only)
    directory = config_only.parent / "random"
    checkpoint.save_model(directory, initial_params(jax.random.key(0), config), config, config_only)
    return directory


def page_of(model: Path, output_dir: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "model_name": str(model), "output_dir": str(output_dir), "run_name": "eval", "tasks": ("generate",),
        "data": ({"path": str(TINY / "heldout.jsonl"), "split": "train[:6]"},), "samples": 3, "temperature": 1.0,
        "max_tokens": 12, "capacity": 256, "slots": 8, "compute_dtype": "float32", "seed": 5,
    }  # fmt: skip
    return EvalConfig(**settings | changes)


def predictions(page: EvalConfig) -> list[dict[str, Any]]:
    lines = (page.run_directory / "predictions.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda line: (line["task"], line["row"], line["sample"]))


def summary(page: EvalConfig) -> dict[str, Any]:
    return json.loads((page.run_directory / "summary.json").read_text())


# Figures


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 5, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int, correct: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert evaluation.pass_at(k, samples, correct) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_standard_error_is_over_problems_not_samples() -> None:
    right = [[True, True], [False, True], [False, False]]
    lines = [
        {"correct": each, "finish_reason": "length", "parsed": False, "tokens": 4} for row in right for each in row
    ]
    figures = evaluation.generation_figures(lines, samples=2)
    assert figures["pass@1"] == figures["mean@2"] == 0.5
    assert figures["pass@1_stderr"] == pytest.approx(np.std([1, 0.5, 0], ddof=1) / np.sqrt(3))
    assert figures["pass@2"] == pytest.approx(2 / 3)
    assert figures["truncated"] == figures["unparsable"] == 1


# Runs


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    page = page_of(model, tmp_path_factory.mktemp("whole"))
    cli.run(page)
    return page


def test_every_problem_is_asked_and_judged(uninterrupted: EvalConfig) -> None:
    lines = predictions(uninterrupted)
    rows = [json.loads(line) for line in (TINY / "heldout.jsonl").read_text().splitlines()[:6]]
    assert [(line["row"], line["sample"]) for line in lines] == list(itertools.product(range(6), range(3)))
    for line in lines:
        question, answer = (message["content"] for message in rows[line["row"]]["messages"])
        assert question in line["prompt"] and line["prompt"].endswith("<|im_start|>assistant\n")
        assert answer not in line["prompt"] and line["expected"] == answer.rpartition("#### ")[2]
        assert line["origin"] == f"{TINY / 'heldout.jsonl'} line {line['row'] + 1}"
    assert len({line["output"] for line in lines}) > 12  # samples differ
    assert summary(uninterrupted)["generate"]["problems"] == 6


def test_a_killed_evaluation_goes_on_to_the_same_answers(
    uninterrupted: EvalConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, add = page_of(model, tmp_path, slots=16), Predictions.add

    def killed(self: Predictions, *line: Any) -> None:
        if len(self.lines) == 7:
            raise KeyboardInterrupt
        add(self, *line)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", killed)
        with pytest.raises(KeyboardInterrupt, match="7 answers are kept in .* the same command again goes on"):
            cli.run(page)
    path = page.run_directory / "predictions.jsonl"
    half = path.read_bytes()
    assert half.count(b"\n") == 7 and not (page.run_directory / "summary.json").exists()
    path.write_bytes(half[:-20])  # the kill hit the last line
    cli.run(page)
    assert path.read_bytes().startswith(half[: half[:-1].rfind(b"\n") + 1])
    assert predictions(page) == predictions(uninterrupted)
    assert summary(page)["generate"] == summary(uninterrupted)["generate"]


def test_another_evaluation_is_not_mixed_in(uninterrupted: EvalConfig, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite"):
        cli.run(uninterrupted)
    page = page_of(model, tmp_path, data=({"path": str(TINY / "heldout.jsonl"), "split": "train[:2]"},))
    cli.run(page)
    (page.run_directory / "summary.json").unlink()
    with pytest.raises(UserError, match="temperature was 1.0 and is 0.5"):
        cli.run(page.model_copy(update={"temperature": 0.5}))
    cli.run(page.model_copy(update={"temperature": 0.5, "overwrite": True}))
    assert len(predictions(page)) == 6
    path = page.run_directory / "predictions.jsonl"
    (page.run_directory / "summary.json").unlink()
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        cli.run(page.model_copy(update={"temperature": 0.5}))


def test_an_evaluation_that_cannot_run_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags, reason in {
        "--tasks generate": "data is required for generate",
        "--tasks generatee": "did you mean generate",
        "--samples 4 --data.0.path x.jsonl": "samples = 4 at temperature = 0 are all alike",
    }.items():
        with pytest.raises(UserError, match=reason):
            parse(EvalConfig, ["--model-name", str(model), *flags.split()], "eval")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Is it?", "completion": "perhaps", "choices": ["yes", "no"]}\n')
    with pytest.raises(UserError, match=r"rows.jsonl line 1: the answer 'perhaps' is none of its 2 choices"):
        cli.run(page_of(model, tmp_path, tasks=("choices",), data=({"path": str(path)},)))


# Choices


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"answer": 2, "choices": ["1", "2", "3"]}, 2),
        ({"answer": "2", "choices": ["1", "2", "3"]}, 1),
        ({"answer": "1", "choices": ["a", "b"]}, 1),
        ({"answer": "C", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}}, 2),
        ({"answer": "positive"}, 0),
        ({"answer": 3, "choices": ["a", "b"]}, None),
        ({"answer": "c", "choices": ["a", "b"]}, None),
    ],
)
def test_the_right_choice_is_named_by_text_label_or_number(
    model: Path, tmp_path: Path, row: dict[str, Any], right: int | None
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Which?"} | row) + "\n")
    source = {"path": str(path), "prompt_column": "question", "completion_column": "answer"}
    page = page_of(model, tmp_path, tasks=("choices",), data=(source,), labels=("positive", "negative"))
    opened = checkpoint.open_model(ModelKeys(model_name=str(model)), mesh_of(1, 1, 1))
    if right is None:
        with pytest.raises(UserError, match="nor the number of one"):
            evaluation.read_questions(page, opened)
    else:
        assert evaluation.read_questions(page, opened).choices[0].right == right


@pytest.mark.reference
def test_choices_have_transformers_log_likelihoods(shelf: Path, tmp_path: Path) -> None:
    rows = json.loads((REFERENCE / "choices_stories260k.json").read_text())
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "prompt_column": "question", "completion_column": "answer"}
    page = page_of(
        shelf / "weights" / "stories260k", tmp_path, tasks=("choices",), data=(source,), batch_size=3, samples=1
    )
    cli.run(page)
    for line, row in zip(predictions(page), rows, strict=True):
        np.testing.assert_allclose(line["log_likelihoods"], row["sums"], atol=2e-4, rtol=0)
    figures, sums = summary(page)["choices"], [np.array(row["sums"]) for row in rows]
    right = [row["answer"] for row in rows]
    sizes = [[len(choice.encode()) for choice in row["choices"]] for row in rows]
    assert figures["accuracy"] == np.mean([np.argmax(each) == at for each, at in zip(sums, right, strict=True)])
    assert figures["accuracy_per_byte"] == np.mean(
        [np.argmax(each / np.array(size)) == at for each, size, at in zip(sums, sizes, right, strict=True)]
    )


@pytest.mark.reference
def test_likelihoods_do_not_depend_on_batch_or_devices(shelf: Path) -> None:
    directory = shelf / "weights" / "stories260k"
    rows = json.loads((REFERENCE / "choices_stories260k.json").read_text())
    tokenizer, found = load_tokenizer(directory), []
    pairs, greedy = [], []
    for row in rows:
        context = encode(tokenizer, row["question"], True).tolist()
        for choice in row["choices"]:
            pairs.append((context, encode(tokenizer, f"{row['question']} {choice}", True).tolist()[len(context) :]))
        greedy += row["is_greedy"]
    for mesh, batch_size in ((mesh_of(1, 1, 1), 4), (mesh_of(2, 2, 2), 1)):
        opened = checkpoint.open_model(ModelKeys(model_name=str(directory)), mesh)
        params = checkpoint.load_params(directory, opened.model, mesh)
        scored = sorted(log_likelihoods(params, pairs, opened, "float32", batch_size, longest=512))
        found.append([each.log_likelihood for _, each in scored])
        assert [each.is_greedy for _, each in scored] == greedy
    np.testing.assert_allclose(found[0], found[1], atol=1e-4, rtol=0)
    assert any(greedy) and not all(greedy)


# Tasks of a run


def test_a_run_measures_tasks_as_eval_does_on_its_model(small: Path, tmp_path: Path) -> None:
    page = page_of(small, tmp_path, tasks=("generate", "choices"), labels=("#### 9", "#### 7"), samples=2)
    chats = [
        {"prompt": f"Is it {word}?", "completion": answer}
        for word, answer in (("nine", "#### 9"), ("seven", "#### 7"), ("less than nine", "#### 7"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    page = page.model_copy(update={"data": (DataSource(path=str(path)),)})
    file = tmp_path / "eval.toml"
    file.write_text(to_toml(page, without=("task_path",)))
    run = chat_run(small, steps=2, eval_every=1, eval_config=str(file), eval_data=())
    train(run)
    logged = [record for record in records(run) if "eval/generate/pass@1" in record]
    assert [record["step"] for record in logged] == [1, 2]
    cli.run(page.model_copy(update={"model_name": str(run.run_directory)}))
    for task in ("generate", "choices"):
        for name, value in summary(page)[task].items():
            if isinstance(value, float):
                assert logged[-1][f"eval/{task}/{name}"] == pytest.approx(value, abs=1e-6), (task, name)
    assert "choices/accuracy" in (run.run_directory / "report.html").read_text()
    assert "choices/accuracy" in (run.run_directory / "run.log").read_text()


def test_the_tasks_of_a_run_are_checked_before_it_begins(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.toml"
    for text, reason in {
        'tasks = ["loss"]\n[[data]]\npath = "x.jsonl"\n': "tasks has loss, which a run measures on",
        'tasks = ["generate"]\n': "data is required for generate",
        'tasks = ["generate"]\nslot = 3\n': "slot is not a key of eval; did you mean slots",
    }.items():
        file.write_text(text)
        with pytest.raises((ValidationError, UserError), match=reason):
            chat_run(small, eval_config=str(file))
    file.write_text('tasks = ["generate"]\n[[data]]\npath = "absent.jsonl"\n')
    with pytest.raises(UserError, match="absent.jsonl"):
        train(chat_run(small, eval_config=str(file)))
