"""Runs of pretrain and sft: resumed, stopped, refused, watched, and what they leave behind."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pytest
from conftest import TINY, assert_trees_close, chat_run, make_small, mesh_of, outcome, records, text_run

from lacuna import checkpoint, cli, optimizer, trainer, weights
from lacuna import eval as evaluation
from lacuna.apps import report
from lacuna.apps.configs import ConvertConfig
from lacuna.config import ModelKeys, PretrainConfig, SamplingKeys, SftConfig, TrainingConfig, UserError
from lacuna.data import Batch, Dataset
from lacuna.metrics import RunLog
from lacuna.model import read_model_config
from lacuna.sampler import Request, Sampler
from lacuna.tokenizer import encode, render
from lacuna.trainer import run_training

Run = TypeVar("Run", bound=TrainingConfig)


def finished(directory: Path, make: Callable[..., Run], **changes: Any) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        patch.setattr(report, "plot", lambda *_: ("", 0))
        config = make(make_small(directory / "small"), run_name="whole", save_every=2, keep=9, **changes)
        cli.run(config)
    return config


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> SftConfig:
    """A finished run on chats: packed, mixed, three epochs, accumulated, with noise."""
    changes: dict[str, Any] = {"eval_every": 3, "neftune_alpha": 5.0, "learning_rate": 1e-2, "tensor": 2}
    return finished(tmp_path_factory.mktemp("chats"), chat_run, **changes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A finished run of eight steps on texts."""
    directory = tmp_path_factory.mktemp("texts")
    held_out = ({"path": str(directory / "small" / "pretrain.jsonl"), "split": "train[-5:]"},)
    return finished(directory, text_run, eval_every=4, eval_data=held_out)


def copy_of(whole: Run, name: str, keeps: tuple[int, ...] = (), **changes: Any) -> Run:
    """A run of another name that holds of a finished one what a kill leaves: its log and these checkpoints."""
    copy = whole.model_copy(update={"run_name": name, **changes})
    (copy.run_directory / "checkpoints").mkdir(parents=True)
    for file in ("config.toml", "metrics.jsonl"):
        shutil.copy(whole.run_directory / file, copy.run_directory / file)
    for step in keeps:
        saved = checkpoint.checkpoint_directory
        shutil.copytree(saved(whole.run_directory, step), saved(copy.run_directory, step))
    return copy


@pytest.mark.parametrize("name", ["chats", "texts"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    whole = request.getfixturevalue(name)
    assert len(checkpoint.saved_steps(whole.run_directory)) >= 4
    cut = copy_of(whole, "cut", keeps=(2,), resume=True)
    cli.run(cut)
    assert outcome(cut) == outcome(whole)
    assert [record["step"] for record in records(cut)] == list(range(1, len(records(whole)) + 1))


def test_a_run_leaves_the_files_of_its_contract(chats: SftConfig) -> None:
    directory = chats.run_directory
    assert {path.name for path in directory.iterdir()} >= {
        "config.toml", "metrics.jsonl", "run.log", "report.html", "summary.json", "checkpoints", "best", "model",
    }  # fmt: skip
    rows = records(chats)
    keys = {
        "step", "loss", "learning_rate", "gradient_norm", "tokens", "target_tokens", "tokens_per_second",
        "target_tokens_per_second", "packing_efficiency", "mfu", "memory_bytes", "step_seconds", "epoch",
    }  # fmt: skip
    assert all(keys <= row.keys() for row in rows) and rows[0]["mfu"] is None
    assert rows[-1]["eval_loss"] > 0 and 0 <= rows[-1]["eval_accuracy"] <= 1
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["steps"] == len(rows) and summary["command"] == "sft" and summary["skipped_steps"] == 0
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert summary["best_eval_loss"] == losses[best] and summary["final_loss"] == rows[-1]["loss"]
    assert (directory / "best").resolve() == checkpoint.checkpoint_directory(directory, best).resolve()
    exported = read_model_config(directory / "model")
    params = weights.load_params(directory / "model", exported, mesh_of(1, 1, 1))
    last = checkpoint.checkpoint_directory(directory, len(rows))
    state = checkpoint.load_checkpoint(
        last,
        checkpoint.read_manifest(last),
        optimizer.abstract_state(exported, mesh_of(1, 1, 1)),
        optimizer.saved_shapes(exported),
    )
    assert_trees_close(params, state.params, rtol=0, atol=0)
    assert (directory / "model" / "tokenizer_config.json").read_bytes() == (TINY / "tokenizer_config.json").read_bytes()


def test_each_sample_is_seen_once_an_epoch_and_the_last_batch_is_filled_with_empty_rows(small: Path) -> None:
    config = chat_run(
        small, data=({"path": str(small / "heldout.jsonl"), "split": "train[:100]"},), epochs=2, batch_size=8
    )
    cli.run(config)
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert summary["data"]["documents"] == 100
    assert summary["tokens"] == 2 * summary["data"]["tokens"]
    assert summary["target_tokens"] == 2 * summary["data"]["target_tokens"]


def test_a_second_run_of_the_same_name_is_refused_before_anything_is_written(texts: PretrainConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in texts.run_directory.rglob("*")}
    with pytest.raises(UserError, match="--resume .* --overwrite"):
        cli.run(texts)
    with pytest.raises(UserError, match="seed was 0 and is 1, which a run can't change when it resumes; leave that"):
        cli.run(texts.model_copy(update={"seed": 1, "resume": True}))
    assert {path: path.stat().st_mtime_ns for path in texts.run_directory.rglob("*")} == before


@pytest.mark.parametrize("place", ["prepare", "evaluate"])
def test_a_signal_at_any_time_finishes_the_step_saves_and_says_how_to_resume(
    texts: PretrainConfig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config = texts.model_copy(update={"run_name": f"stopped_in_{place}", "save_every": 0})
    room, name = {"prepare": (trainer.RowSteps, "prepare"), "evaluate": (evaluation, "held_out_loss")}[place]
    usual = getattr(room, name)

    def interrupted(*arguments: Any) -> Any:
        if name == "held_out_loss" or arguments[1] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(room, name, usual)
        return usual(*arguments)

    monkeypatch.setattr(room, name, interrupted)
    cli.run(config)
    (step,) = checkpoint.saved_steps(config.run_directory)
    assert step < 8 and records(config)[-1]["step"] == step and not (config.run_directory / "model").exists()
    assert "config.toml --resume" in (config.run_directory / "run.log").read_text()
    cli.run(config.model_copy(update={"resume": True}))
    assert outcome(config) == outcome(texts)


def test_overwrite_deletes_a_run_and_nothing_else(small: Path) -> None:
    config = text_run(small, steps=1, overwrite=True)
    config.run_directory.mkdir(parents=True)
    thesis = config.run_directory / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="files that are no run"):
        cli.run(config)
    assert thesis.exists()
    thesis.unlink()
    cli.run(config)
    cli.run(config)
    own = config.model_copy(update={"model_name": str(config.run_directory), "from_scratch": False})
    with pytest.raises(UserError, match="would delete"):
        cli.run(own)
    wrong = config.model_copy(update={"model_name": str(small), "from_scratch": False})
    with pytest.raises(UserError, match="to train from random weights"):
        cli.run(wrong)
    assert (config.run_directory / "model" / "config.json").exists()


def test_the_export_is_whole_whatever_becomes_of_the_models_directory_while_the_run_trains(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = small.parent / "template.jinja"
    template.write_text((TINY.parent / "chat_template.jinja").read_text())
    described = {path.name: path.read_bytes() for path in small.glob("*.json")}
    config, usual = chat_run(small, epochs=1, chat_template=str(template)), trainer.RowSteps.take

    def take(rows: trainer.RowSteps, state: Any) -> Any:
        if small.exists():
            shutil.rmtree(small)
            template.unlink()
        return usual(rows, state)

    monkeypatch.setattr(trainer.RowSteps, "take", take)
    cli.run(config)
    exported = {path.name: path.read_bytes() for path in (config.run_directory / "model").iterdir()}
    assert exported.keys() == described.keys() | {"model.safetensors", "chat_template.jinja"}
    assert exported["config.json"] == described["config.json"]
    assert exported["chat_template.jinja"] == (TINY.parent / "chat_template.jinja").read_bytes()


def test_overwrite_spares_the_chat_template_and_the_tasks_that_the_run_reads(small: Path) -> None:
    config = chat_run(small, overwrite=True)
    for key in ("chat_template", "eval_config"):
        inside = config.run_directory / "file"
        config.run_directory.mkdir(parents=True, exist_ok=True)
        (config.run_directory / "config.toml").write_text("")
        with pytest.raises(UserError, match=f"--overwrite would delete {inside}, which this run reads"):
            trainer.check_free(config.model_copy(update={key: str(inside)}))


def test_what_an_aborted_start_left_is_not_exported(small: Path) -> None:
    config = text_run(small)
    left = config.run_directory / checkpoint.SOURCE
    left.mkdir(parents=True)
    (left / "config.json").write_text("of another model")
    opened = checkpoint.open_model(config, mesh_of(1, 1, 1), with_weights=False)
    trainer.prepare_directory(config, opened, 0, print)
    assert (left / "config.json").read_bytes() == (small / "config.json").read_bytes()
    (small / "config.json").write_text("changed since")
    trainer.prepare_directory(config, opened, 5, print)
    assert "changed since" not in (left / "config.json").read_text()


def test_a_report_that_fails_costs_nothing_but_a_line(small: Path) -> None:
    config = text_run(small, steps=1)

    def fail(directory: Path) -> None:
        raise ValueError("no such backend")

    run_training(config, partial(evaluation.evaluation_of_rows, None), fail)
    assert (config.run_directory / "model" / "model.safetensors").exists()
    assert json.loads((config.run_directory / "summary.json").read_text())["steps"] == 1
    assert "WARNING: no report.html (ValueError: no such backend)" in (config.run_directory / "run.log").read_text()


def test_after_saves_that_failed_the_best_of_those_saved_is_linked_and_told(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ({"path": str(small / "pretrain.jsonl"), "split": "train[-5:]"},)
    config = text_run(small, steps=5, eval_data=held_out, eval_every=1, keep=9)
    losses = iter([4.0, 1.0, 3.0, 2.0, 5.0])
    with_free({2: 1000}, monkeypatch)
    monkeypatch.setattr(evaluation, "held_out_loss", lambda *_: {"eval_loss": next(losses), "eval_accuracy": 0.5})
    cli.run(config)
    assert checkpoint.saved_steps(config.run_directory) == [1, 3, 4, 5]
    assert checkpoint.best_checkpoint(config.run_directory).name == "step_00000004"
    assert json.loads((config.run_directory / "summary.json").read_text())["best_eval_loss"] == 2.0


def test_data_that_changed_since_the_checkpoint_are_refused(small: Path) -> None:
    data = small.parent / "texts.jsonl"
    lines = (TINY / "pretrain.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:50]))
    config = text_run(small, data=({"path": str(data)},), steps=1)
    cli.run(config)
    data.write_text("".join(lines[:49]))
    with pytest.raises(UserError, match="texts.jsonl: its content has changed"):
        cli.run(config.model_copy(update={"resume": True, "steps": 2}))


def test_five_steps_in_a_row_without_a_finite_gradient_end_the_run(small: Path) -> None:
    config = text_run(small, learning_rate=1e30, steps=12)
    with pytest.raises(UserError, match=r"step \d+: .* not finite.*rows \d+ to \d+, beginning .*5 steps in a row"):
        cli.run(config)
    assert [row["gradient_norm"] for row in records(config)][-5:] == [None] * 5


def test_nothing_is_compiled_after_the_first_steps_evaluation_and_save(
    small: Path, compiled: list[tuple[int, str]]
) -> None:
    config = chat_run(small, eval_every=3, save_every=2, keep=9)
    cli.run(config)
    assert len(records(config)) >= 9 and len(checkpoint.saved_steps(config.run_directory)) >= 4
    assert any(step == 0 for step, _ in compiled)
    assert [each for each in compiled if each[0] > 3] == []
    assert f"compiled programs are kept in {config.cache_dir}" in (config.run_directory / "run.log").read_text()


def test_a_slow_source_works_while_the_step_runs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, events, loops = text_run(small), [], []
    prepare, source, log = trainer.RowSteps.prepare, Dataset.batch, RunLog.step

    def watched(loop: trainer.RowSteps, index: int) -> Any:
        loops.append(loop)
        return prepare(loop, index)

    def slow(dataset: Dataset, index: int, *arguments: Any) -> Batch:
        """Takes until the step before has ended, which nobody waits for here."""
        if index:
            step = loops[-1].running["loss"]
            events.append(("begun", index, not step.is_ready()))
            step.block_until_ready()
        return source(dataset, index, *arguments)

    def logged(self: RunLog, record: dict[str, Any]) -> None:
        events.append(("logged", record["step"], True))
        log(self, record)

    monkeypatch.setattr(trainer.RowSteps, "prepare", watched)
    monkeypatch.setattr(Dataset, "batch", slow)
    monkeypatch.setattr(RunLog, "step", logged)
    cli.run(config)
    begun = {index: at for at, (kind, index, _) in enumerate(events) if kind == "begun"}
    fetched = {index: at for at, (kind, index, _) in enumerate(events) if kind == "logged"}
    assert len(begun) == config.steps - 1 and all(begun[step] < fetched[step] for step in begun)
    assert any(is_running for kind, _, is_running in events if kind == "begun")


def test_training_lowers_the_loss(chats: SftConfig) -> None:
    losses = [row["loss"] for row in records(chats)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def with_free(bytes_at: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk seem to have so many bytes free at the save of each of these steps, and enough at others."""
    usual = shutil.disk_usage

    def usage(path: Path) -> Any:
        step = re.search(r"step_(\d+)", str(path))
        return usual(path)._replace(free=bytes_at.get(int(step[1]) if step else 0, 10**12))

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_full_disk_is_logged_as_a_warning_and_training_continues_to_the_next_save(
    texts: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = texts.model_copy(update={"run_name": "full"})
    with_free({2: 1000, 4: 1000}, monkeypatch)
    cli.run(config)
    log = (config.run_directory / "run.log").read_text()
    assert log.count("WARNING: step") == 2 and "are needed, 1 KB are free; training continues" in log
    assert checkpoint.saved_steps(config.run_directory) == [6, 8] and len(records(config)) == 8


def test_three_full_disks_in_a_row_end_the_run_which_then_resumes_where_it_was_saved(
    texts: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, enough = texts.model_copy(update={"run_name": "fuller"}), shutil.disk_usage
    with_free({4: 1000, 6: 1000, 8: 1000}, monkeypatch)
    with pytest.raises(UserError, match="3 saves in a row failed: make room and add --resume"):
        cli.run(config)
    assert checkpoint.saved_steps(config.run_directory) == [2]
    monkeypatch.setattr(shutil, "disk_usage", enough)
    cli.run(config.model_copy(update={"resume": True}))
    assert outcome(config) == outcome(texts)


def test_a_damaged_checkpoint_is_stepped_around_by_resume_but_refused_when_asked_for(
    texts: PretrainConfig,
) -> None:
    config = copy_of(texts, "damaged", keeps=(2, 4), steps=4)
    shards = [
        checkpoint.checkpoint_directory(config.run_directory, step) / "shard-00000.safetensors" for step in (2, 4)
    ]
    os.truncate(shards[1], 100)
    with pytest.raises(UserError, match="step_00000004.* its SHA-256 is not the manifest's"):
        cli.run(config.model_copy(update={"resume_from": str(shards[1].parent)}))
    cli.run(config.model_copy(update={"resume": True}))
    log = (config.run_directory / "run.log").read_text()
    assert f"checkpoint passed over: {shards[1]}" in log and f"resuming from {shards[0].parent}" in log
    assert "set aside as" in log and [record["step"] for record in records(config)] == [1, 2, 3, 4]
    for shard in shards:
        os.truncate(shard, 100)
    with pytest.raises(UserError, match="none of its 2 checkpoints is intact"):
        cli.run(config.model_copy(update={"resume": True}))


def test_a_run_whose_checkpoints_are_gone_and_a_foreign_directory_are_not_resumed(texts: PretrainConfig) -> None:
    config = copy_of(texts, "gone")
    shutil.copy(texts.run_directory / "summary.json", config.run_directory)
    before = {path: path.stat().st_mtime_ns for path in config.run_directory.rglob("*")}
    with pytest.raises(UserError, match="whose checkpoints are gone"):
        cli.run(config.model_copy(update={"resume": True}))
    assert {path: path.stat().st_mtime_ns for path in config.run_directory.rglob("*")} == before
    foreign = texts.model_copy(update={"run_name": "foreign", "resume": True})
    foreign.run_directory.mkdir()
    (foreign.run_directory / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        cli.run(foreign)
    assert (foreign.run_directory / "metrics.jsonl").read_text() == "mine"


def test_a_checkpoint_is_a_model_wherever_one_is_named(chats: SftConfig, tmp_path: Path) -> None:
    run, last = chats.run_directory, max(checkpoint.saved_steps(chats.run_directory))
    for place, shape in ((run / "checkpoints" / f"step_{last:08}", (1, 4, 2)), (run / "best", (1, 1, 1))):
        config, mesh = chats.model_copy(update={"model_name": str(place), "from_scratch": False}), mesh_of(*shape)
        opened = checkpoint.open_model(checkpoint.settled(config), mesh)
        params = optimizer.starting_state(config, opened).params
        held = checkpoint.saved_params(place, opened.model)
        assert_trees_close(params, jax.tree.map(np.asarray, held), 0, 0)
        if place.name != "best":
            ended = weights.load_params(run / "model", opened.model, mesh)
            assert_trees_close(params, ended, 0, 0)
        cli.run(ConvertConfig(model_name=str(place), output=str(tmp_path / place.name)))
        exported = weights.load_params(tmp_path / place.name, opened.model, mesh)
        assert_trees_close(exported, params, 0, 0)
        files = {path.name for path in (tmp_path / place.name).iterdir()}
        assert files == {path.name for path in (run / "model").iterdir()}
    (link := tmp_path / "whole" / "best").parent.mkdir()  # where there are no symbolic links
    shutil.copytree(run / "source", link.parent / "source")
    shutil.copytree((run / "best").resolve(), link.parent / "checkpoints" / "step_00000001")
    link.write_text("checkpoints/step_00000001\n")
    assert_trees_close(
        checkpoint.opened_params(opened._replace(source=checkpoint.resolve_model(str(link)))), params, 0, 0
    )
    with pytest.raises(UserError, match="is there already"):
        cli.run(ConvertConfig(model_name=str(run / "best"), output=str(tmp_path)))


def test_a_checkpoint_outside_its_run_is_refused_with_what_it_lacks(chats: SftConfig, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(chats.run_directory / "best", tmp_path / "moved"))
    with pytest.raises(UserError, match=r"its config.json and tokenizer are in .*/source, which is not there"):
        checkpoint.open_model(ModelKeys(model_name=str(moved)), mesh_of(1, 1, 1))
    unended = copy_of(chats, "unended").run_directory
    with pytest.raises(UserError, match="a run that has not ended.*; continue it with --resume; .*unended has none"):
        checkpoint.open_model(ModelKeys(model_name=str(unended)), mesh_of(1, 1, 1))


def test_samples_of_a_run_are_what_its_model_generates(small: Path) -> None:
    prompts = ("Nora has 18 marbles.", "How many are 2 jars?")
    run = chat_run(small, steps=2, eval_every=1, sample_prompts=prompts, sample_tokens=9)
    assert cli.run(run)
    logged = [record["samples"] for record in records(run)]
    assert len(logged) == 2 and all(tuple(samples) == prompts for samples in logged)
    mesh = mesh_of(1, 1, 1)
    opened = checkpoint.open_model(ModelKeys(model_name=str(run.run_directory)), mesh)
    source, model, tokenizer, *_ = opened
    sampler = Sampler(weights.load_params(source, model, mesh), opened, 1, 64, "float32")
    for prompt in prompts:
        text = render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        token = encode(tokenizer, text, add_special_tokens=False)
        stop = tokenizer.eos_id
        assert stop is not None
        request = Request(tuple(token.tolist()), SamplingKeys(temperature=0.0, max_tokens=9), (stop,))
        assert sampler.generate([request])[0].text == logged[-1][prompt]
    report = (run.run_directory / "report.html").read_text()
    assert "Samples at step 2" in report and prompts[0] in report


def test_a_sample_prompt_that_does_not_fit_is_refused_before_the_run(small: Path) -> None:
    with pytest.raises(UserError, match="max_position_embeddings"):
        cli.run(chat_run(small, sample_prompts=("word " * 3000,)))
    assert not (small.parent / "runs" / "run" / "metrics.jsonl").exists()


def test_a_run_ends_when_its_patience_does_and_exports_the_best(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.2, 1.0])  # the third in a row that is no better comes at step 10
    monkeypatch.setattr("lacuna.eval.held_out_loss", lambda *_: {"eval_loss": next(losses), "eval_accuracy": 0.0})
    config = chat_run(small, steps=20, eval_every=2, patience=3, keep=9)
    cli.run(config)
    figures = [each["eval_loss"] for each in records(config) if "eval_loss" in each]
    assert figures == [3.0, 2.0, 2.5, 2.0, 2.2] and records(config)[-1]["step"] == 10
    best = config.run_directory / "checkpoints" / "step_00000004"
    assert (config.run_directory / "best").resolve() == best
    exported = weights.model_tensors(config.run_directory / "model")["model.embed_tokens.weight"]
    saved = weights.open_tensors(sorted(best.glob("*.safetensors")))["params/embedding"]
    np.testing.assert_array_equal(np.asarray(exported), np.asarray(saved))
    cli.run(config.model_copy(update={"resume": True}))  # it has ended, and a second start finds that
    assert records(config)[-1]["step"] == 10
    losses = iter([2.5, 2.4, 1.0, *[0.5] * 5])
    cli.run(config.model_copy(update={"resume": True, "patience": 7}))
    assert records(config)[-1]["step"] == 20
    with pytest.raises(ValueError, match="has nothing to watch"):
        chat_run(small, patience=3, eval_data=(), eval_every=2)
