"""Evaluation: every figure from its raw material, transformers' losses and likelihoods, and evaluations that resume."""

import errno
import itertools
import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, TINY, chat_run, make_small, mesh_of, random_params, records
from pydantic import ValidationError

from lacuna import checkpoint, cli, trainer, weights
from lacuna import eval as evaluation
from lacuna.apps import evaluate
from lacuna.apps.rewards import correct
from lacuna.config import DataSource, EvalConfig, ModelKeys, UserError, to_toml
from lacuna.documents import prepare
from lacuna.eval import Predictions, Problem, Problems, Tasks, log_likelihoods
from lacuna.metrics import LineFile
from lacuna.model import ModelConfig, embed, forward, head_of, logits_of, read_model_config
from lacuna.sampler import Completion
from lacuna.tokenizer import encode, load_tokenizer

LABELS = ("#### 9999", "#### seven of them", "#### 7")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, its embedding so long that repeating a token is likeliest."""
    config_only = make_small(tmp_path_factory.mktemp("model") / "small")
    model = read_model_config(config_only)
    params, directory = random_params(model), config_only.parent / "random"
    checkpoint.save_model(directory, params | {"embedding": 5 * params["embedding"]}, model, config_only)
    return directory


def config_of(directory: Path, output_dir: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "model_name": str(directory), "output_dir": str(output_dir), "run_name": "eval", "tasks": ("generate",),
        "data": ({"path": str(TINY / "heldout.jsonl"), "split": "train[:2]"},), "samples": 3, "temperature": 1.0,
        "max_tokens": 12, "capacity": 256, "slots": 8, "compute_dtype": "float32", "seed": 5, "labels": LABELS,
    }  # fmt: skip
    return EvalConfig(**settings | changes)


def file_of(directory: Path, rows: list[dict[str, Any]]) -> str:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def predictions(config: EvalConfig, task: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.run_directory / "predictions.jsonl").read_text().splitlines())
    return sorted((line for line in lines if line["task"] == task), key=lambda line: (line["row"], line["sample"]))


def summary(config: EvalConfig) -> dict[str, Any]:
    return json.loads((config.run_directory / "summary.json").read_text())


# One run of all tasks


@pytest.fixture(scope="module")
def uninterrupted(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    directory = tmp_path_factory.mktemp("whole")
    rows = [json.loads(line) for line in (TINY / "heldout.jsonl").read_text().splitlines()[:6]]
    for number, row in enumerate(rows):
        row["messages"][-1]["content"] = LABELS[number % 3]
    config = config_of(
        model_directory, directory, tasks=("loss", "generate", "choices"), batch_size=1, sequence_length=256,
        data=({"path": file_of(directory, rows)},),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        cli.run(config)
    return config


@pytest.fixture(scope="module")
def asked(uninterrupted: EvalConfig) -> list[tuple[str, str]]:
    """Prompt and reference answer of each row."""
    lines = Path(uninterrupted.data[0].path).read_text().splitlines()
    chats = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [(template.format(question), answer) for question, answer in chats]


@partial(jax.jit, static_argnames="model")
def logits_alone(params: Any, token: jax.Array, model: ModelConfig) -> jax.Array:
    position = jnp.arange(token.shape[1])[None]
    hidden = forward(params, embed(params, token, "float32"), jnp.ones_like(token), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)


def log_probabilities(directory: Path, context: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of a text after its context, by a pass over both alone, and whether it was the likeliest."""
    model, tokenizer = read_model_config(directory), load_tokenizer(directory)
    token = encode(tokenizer, context + text, add_special_tokens=False)
    start = len(encode(tokenizer, context, add_special_tokens=False))
    params = weights.load_params(directory, model, mesh_of(1, 1, 1))
    padded = jnp.array(np.pad(token, (0, 128 - len(token))))[None]
    logits = np.asarray(logits_alone(params, padded, model), np.float64)[0, start - 1 : len(token) - 1]
    values = logits[np.arange(len(logits)), token[start:]] - np.log(np.exp(logits).sum(axis=1))
    return values, logits.argmax(axis=1) == token[start:]


def test_held_out_figures_are_those_of_each_chat_alone(
    uninterrupted: EvalConfig, asked: list[tuple[str, str]], model_directory: Path
) -> None:
    found = [log_probabilities(model_directory, prompt, f"{answer}<|im_end|>") for prompt, answer in asked]
    values, is_likeliest = (np.concatenate(each) for each in zip(*found, strict=True))
    figures = summary(uninterrupted)
    assert figures["eval_loss"] == pytest.approx(-values.mean(), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(np.exp(-values.mean()), rel=1e-6)
    assert figures["eval_accuracy"] == pytest.approx(is_likeliest.mean()) and is_likeliest.any()
    assert figures["target_tokens"] == len(values)


def test_choices_are_made_by_likelihood_in_all_and_per_byte_and_token(
    uninterrupted: EvalConfig, asked: list[tuple[str, str]], model_directory: Path
) -> None:
    lines, is_right = predictions(uninterrupted, "choices"), []
    for line, (prompt, answer) in zip(lines, asked, strict=True):
        values = [log_probabilities(model_directory, prompt, label)[0] for label in LABELS]
        np.testing.assert_allclose(line["log_likelihoods"], [each.sum() for each in values], atol=1e-4)
        ways = [
            [each.sum() / divisor for each, divisor in zip(values, divisors, strict=True)]
            for divisors in ([1, 1, 1], [len(label.encode()) for label in LABELS], [len(each) for each in values])
        ]
        is_right.append([LABELS[np.argmax(way)] == answer for way in ways])
    figures, shares = summary(uninterrupted)["choices"], np.array(is_right, float)
    for way, share in zip(("", "_per_byte", "_per_token"), shares.T, strict=True):
        assert 0 < share.mean() < 1 and figures[f"accuracy{way}"] == pytest.approx(share.mean())
        assert figures[f"accuracy{way}_stderr"] == pytest.approx(share.std(ddof=1) / np.sqrt(len(share)))


def test_every_problem_is_asked_and_judged(uninterrupted: EvalConfig, asked: list[tuple[str, str]]) -> None:
    lines = predictions(uninterrupted, "generate")
    assert [(line["row"], line["sample"]) for line in lines] == list(itertools.product(range(6), range(3)))
    for line in lines:
        prompt, answer = asked[line["row"]]
        assert line["prompt"] == prompt and line["expected"] == answer.removeprefix("#### ")
        assert line["origin"] == f"{uninterrupted.data[0].path} line {line['row'] + 1}"
    assert len({line["output"] for line in lines}) > 12  # samples differ
    figures = summary(uninterrupted)["generate"]
    assert (figures["problems"], figures["samples"]) == (6, 3)
    assert figures["mean_tokens"] == np.mean([line["tokens"] for line in lines])
    assert figures["truncated"] == np.mean([line["tokens"] == 12 for line in lines])


def test_a_killed_evaluation_resumes_to_the_same_answers(
    uninterrupted: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, add = uninterrupted.model_copy(update={"output_dir": str(tmp_path), "slots": 16}), Predictions.add

    def killed(self: Predictions, *line: Any) -> None:
        if len(self.lines) == 7:
            raise KeyboardInterrupt
        add(self, *line)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", killed)
        with pytest.raises(KeyboardInterrupt, match="7 answers are kept in .* the same command again resumes"):
            cli.run(config)
    path = config.run_directory / "predictions.jsonl"
    half = path.read_bytes()
    assert half.count(b"\n") == 7 and not (config.run_directory / "summary.json").exists()
    path.write_bytes(half[:-20])  # the kill hit the last line
    cli.run(config)
    assert path.read_bytes().startswith(half[: half[:-1].rfind(b"\n") + 1])
    for task in ("generate", "choices"):
        assert predictions(config, task) == predictions(uninterrupted, task)
        assert summary(config)[task] == summary(uninterrupted)[task]


def test_an_answer_that_finds_no_room_on_the_disk_ends_the_evaluation(tmp_path: Path) -> None:
    with closing(LineFile(tmp_path / "predictions.jsonl")) as kept:
        whole, kept.file = kept.file, Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="No space left on device; fix that, or choose another output_dir"):
            Predictions(kept).add(("generate", 0, 0), {"output": "4"})
        kept.file = whole


def test_another_evaluation_is_not_mixed_in(uninterrupted: EvalConfig, model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite"):
        cli.run(uninterrupted)
    config = config_of(model_directory, tmp_path)
    cli.run(config)
    (config.run_directory / "summary.json").unlink()
    cooler = config.model_copy(update={"temperature": 0.5})
    with pytest.raises(UserError, match="temperature was 1.0 and is 0.5"):
        cli.run(cooler)
    cli.run(cooler.model_copy(update={"overwrite": True}))
    assert len(predictions(config, "generate")) == 6
    (config.run_directory / "summary.json").unlink()
    path = config.run_directory / "predictions.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1: b'nonsense' is not a JSON object"):
        cli.run(cooler)
    path.write_text('{"task": "generate"}\n')
    with pytest.raises(UserError, match="line 1: .* has no row; delete the line"):
        cli.run(cooler)
    for damage in ("", '{"batch_size": 8', "[1]", "\0" * 20):
        (config.run_directory / "identity.json").write_text(damage)
        with pytest.raises(UserError, match="identity.json: damaged .*; add --overwrite to start over"):
            cli.run(cooler)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--tasks generate", "data is required for generate"),
        ("--tasks generatee", "did you mean generate"),
        ("--samples 4 --data.0.path x.jsonl", "samples = 4 at temperature = 0 are all the same"),
    ],
)
def test_tasks_that_cannot_run_are_refused(flags: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=reason):
        cli.parse(EvalConfig, ["--model-name", "any", *flags.split()], "eval")


# Generated answers


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 5, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int, correct: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert evaluation.pass_at(k, samples, correct) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_figures_of_generated_answers_are_shares_of_what_was_written() -> None:
    """Three problems with two samples each; the standard error is over problems, not samples."""
    problem = Problem("rows.jsonl line 1", "What is 4 + 3?", (1,), "4 + 3 = 7\n#### 7", {})
    texts = ["so #### 7", "The answer is 7.", "no idea", "<answer>7</answer>", "#### 8", "10 or"]
    completions = [
        Completion(0, number, (1,) * (number + 1), text, (), (), (), "length" if number == 5 else "stop")
        for number, text in enumerate(texts)
    ]
    lines = [evaluation.judged(problem, completion) for completion in completions]
    figures = evaluation.generation_figures(lines, samples=2)
    assert figures["pass@1"] == figures["mean@2"] == 0.5
    assert figures["pass@1_stderr"] == pytest.approx(np.std([1, 0.5, 0], ddof=1) / np.sqrt(3))
    assert figures["pass@2"] == pytest.approx(2 / 3)
    assert figures["truncated"] == figures["unparsable"] == pytest.approx(1 / 6)
    assert [line["parsed"] for line in lines] == [True, True, False, True, True, True]
    assert figures["mean_tokens"] == 3.5


def problems_of(tmp_path: Path, model: Path, *rows: dict[str, Any], **keys: Any) -> Problems:
    source = {"path": file_of(tmp_path, list(rows)), "prompt_column": "question", "completion_column": "answer"}
    config = config_of(model, tmp_path, tasks=("generate",), data=(source | keys,))
    return evaluation.read_problems(config.data, config, load_tokenizer(model), 4096)


def test_any_answer_of_a_list_is_right_and_an_empty_one_is_refused(model_directory: Path, tmp_path: Path) -> None:
    rows = {"question": "2 + 2?", "answer": ["4", "#### 5"]}, {"question": "Capital?", "answer": "Paris"}
    several, one = problems_of(tmp_path, model_directory, *rows).problems
    assert (several.answer, several.row["answer"], one.answer) == (["4", "#### 5"], ["4", "#### 5"], "Paris")
    for text, right in (("#### 5", True), ("it is 4", True), ("it is 6", False)):
        line = evaluation.judged(several, Completion(0, 0, (1,), text, (), (), (), "stop"))
        assert (line["correct"], line["expected"]) == (right, ["4", "5"])
        assert correct("", text, several.row) == right
    with pytest.raises(UserError, match="rows.jsonl line 1: no reference answer; set completion_column"):
        problems_of(tmp_path, model_directory, {"question": "2 + 2?", "solution": "4"})
    for answer in ("", [], None):
        fix = "the reference in `answer` is empty; fill it, or leave such rows out with --on-bad-data skip"
        with pytest.raises(UserError, match=f"rows.jsonl line 1: {fix}"):
            problems_of(tmp_path, model_directory, {"question": "2 + 2?", "answer": answer})
    with pytest.raises(UserError, match=r"reference answers \[4, 5\] are not all texts"):
        problems_of(tmp_path, model_directory, {"question": "2 + 2?", "answer": [4, 5]})


def test_a_problem_is_asked_as_its_row_is_trained(model_directory: Path, tmp_path: Path) -> None:
    tokenizer, row = load_tokenizer(model_directory), {"question": "3 + 4 = ", "answer": "7"}
    for prompt_format in ("auto", "chat", "text"):
        source = DataSource(path="x", prompt_column="question", completion_column="answer", prompt_format=prompt_format)
        made = prepare(row, source, tokenizer, "assistant")
        (problem,) = problems_of(tmp_path, model_directory, row, prompt_format=prompt_format).problems
        assert made.text[: made.spans[0][0]] == problem.prompt and problem.is_chat == (prompt_format != "text")


# Choices


def test_likelihood_per_byte_and_per_token_may_choose_otherwise() -> None:
    problem = Problem("rows.jsonl line 1", "Which?", (1,), "any", {}, ("a", "ééé ééé", "cccc"))
    lines = [  # in all -2, -3, -3.9; per byte -2, -0.23, -0.98; per token -2, -1.5, -1.3
        evaluation.chosen(replace(problem, right=right), [-2.0, -3.0, -3.9], [1, 2, 3]) for right in (0, 1, 1, 2, 2, 2)
    ]
    figures = evaluation.choice_figures(lines)
    ways = ("accuracy", "accuracy_per_byte", "accuracy_per_token")
    assert [figures[way] for way in ways] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert {line["output"] for line in lines} == {"a"} and figures["problems"] == 6


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"answer": 2, "choices": ["1", "2", "3"]}, 2),
        ({"answer": "2", "choices": ["1", "2", "3"]}, 1),
        ({"answer": "1", "choices": ["a", "b"]}, 1),
        ({"answer": "C", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}}, 2),
        ({"answer": "#### 7"}, 2),
        ({"answer": 3, "choices": ["a", "b"]}, None),
        ({"answer": "c", "choices": ["a", "b"]}, None),
    ],
)
def test_the_right_choice_is_named_by_text_label_or_number(
    model_directory: Path, tmp_path: Path, row: dict[str, Any], right: int | None
) -> None:
    path = file_of(tmp_path, [{"question": "Which?"} | row])
    source = {"path": path, "prompt_column": "question", "completion_column": "answer"}
    config = config_of(model_directory, tmp_path, tasks=("choices",), data=(source,))
    opened = checkpoint.open_model(ModelKeys(model_name=str(model_directory)), mesh_of(1, 1, 1))
    if right is None:
        with pytest.raises(UserError, match=r"rows.jsonl line 1: the answer .* is none of its 2 choices, nor the numb"):
            evaluation.prepare_tasks(config, None, opened)
    else:
        assert evaluation.prepare_tasks(config, None, opened).problems.problems[0].right == right


# Against transformers


@pytest.mark.reference
@pytest.mark.parametrize("packing", [True, False])
def test_held_out_loss_equals_transformers_on_each_text_alone(shelf: Path, tmp_path: Path, packing: bool) -> None:
    expected = json.loads((REFERENCE / "eval_stories260k.json").read_text())
    lines = (shelf / "chat" / "rasbt_instruct_1100.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)["messages"][0]["content"] for line in lines]
    config = config_of(
        shelf / "weights" / "stories260k", tmp_path, tasks=("loss",), sequence_length=256, batch_size=1,
        data=({"path": file_of(tmp_path, [{"text": text} for text in texts])},), packing=packing,
    )  # fmt: skip
    cli.run(config)
    figures = summary(config)
    assert figures["target_tokens"] == expected["target_tokens"]
    assert figures["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(expected["eval_loss"]), rel=1e-4)


@pytest.mark.reference
def test_choices_have_transformers_log_likelihoods(shelf: Path, tmp_path: Path) -> None:
    rows = json.loads((REFERENCE / "choices_stories260k.json").read_text())
    source = {"path": file_of(tmp_path, rows), "prompt_column": "question", "completion_column": "answer"}
    config = config_of(shelf / "weights" / "stories260k", tmp_path, tasks=("choices",), data=(source,), batch_size=3)
    cli.run(config)
    for line, row in zip(predictions(config, "choices"), rows, strict=True):
        np.testing.assert_allclose(line["log_likelihoods"], row["sums"], atol=2e-4, rtol=0)


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
        config = config_of(directory, Path("runs"), batch_size=batch_size, capacity=512)
        with jax.set_mesh(mesh):
            params = weights.load_params(directory, opened.model, mesh)
            scored = sorted(log_likelihoods(Tasks(config, opened, Problems(), None), params, pairs))
        found.append([log_likelihood for _, log_likelihood, _ in scored])
        assert [is_greedy for *_, is_greedy in scored] == greedy
    np.testing.assert_allclose(found[0], found[1], atol=1e-4, rtol=0)
    assert any(greedy) and not all(greedy)


# Tasks of a run


@pytest.mark.curves
def test_a_run_measures_tasks_as_eval_does_on_its_model(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (evaluate, trainer):
        monkeypatch.setattr(room, "make_mesh", lambda *_: mesh_of(1, 1, 1))
    asked = (("more", LABELS[0]), ("seven", LABELS[2]), ("less than nine", LABELS[2]))
    rows = [{"prompt": f"Is it {word}?", "completion": answer} for word, answer in asked]
    source = DataSource(path=file_of(tmp_path, rows))
    config = config_of(small, tmp_path, tasks=("generate", "choices"), samples=2, data=(source,))
    file = tmp_path / "eval.toml"
    file.write_text(to_toml(config, without=("task_path",)))
    run = chat_run(small, steps=2, eval_every=1, eval_config=str(file), eval_data=())
    cli.run(run)
    logged = [record for record in records(run) if "eval/generate/pass@1" in record]
    assert [record["step"] for record in logged] == [1, 2]
    cli.run(config.model_copy(update={"model_name": str(run.run_directory)}))
    for task in ("generate", "choices"):
        for name, value in summary(config)[task].items():
            if isinstance(value, float):
                assert logged[-1][f"eval/{task}/{name}"] == pytest.approx(value, abs=1e-6), (task, name)
    assert "choices/accuracy" in (run.run_directory / "report.html").read_text()
    assert "choices/accuracy" in (run.run_directory / "run.log").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('tasks = ["loss"]\n[[data]]\npath = "x.jsonl"\n', "tasks has loss, which a run measures on"),
        ('tasks = ["generate"]\n', "data is required for generate"),
        ('tasks = ["generate"]\nslot = 3\n', "slot is not a key of eval; did you mean slots"),
        ('tasks = ["generate"]\n[[data]]\npath = "absent.jsonl"\n', "absent.jsonl"),
    ],
)
def test_the_tasks_of_a_run_are_checked_before_it_begins(small: Path, tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "eval.toml"
    file.write_text(text)
    with pytest.raises((ValidationError, UserError), match=reason):
        cli.run(chat_run(small, eval_config=str(file)))
