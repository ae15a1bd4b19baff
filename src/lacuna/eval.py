"""Evaluation: the held-out loss of any model on any data that training reads, masked and packed as in training, and
its figures at tasks. Answers are kept as they come, so a run that was ended goes on where it was."""

import json
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn, track

from lacuna import metrics, runs, weights
from lacuna.attention import choose_backend
from lacuna.config import EvalConfig, UserError
from lacuna.data import Dataset, describe, load_dataset
from lacuna.distributed import check_same, enable_compilation_cache, from_first, is_first, make_mesh, row_shards
from lacuna.model import check_sequence_length, parameter_counts
from lacuna.options import to_toml
from lacuna.predictions import Predictions, Subject, Tick
from lacuna.tasks import Questions, measure, read_questions
from lacuna.trainer import held_out_loss
from lacuna.weights import OpenedModel

FREE_ON_RESUME = {"run_name", "output_dir", "overwrite", "batch_size", "slots", "data_parallel", "fsdp", "tensor",
                  "compilation_cache"}  # fmt: skip


def run(page: EvalConfig) -> None:
    """The command eval: figures of each task into summary.json, each answer into predictions.jsonl.

    Raises:
        UserError: whatever about config, model, data or devices can't be evaluated.
    """
    started = time.perf_counter()
    directory = page.run_directory
    check_unfinished(page)
    mesh = make_mesh(page.data_parallel, page.fsdp, page.tensor)
    model = weights.open_model(page, mesh, page.chat_template, page.template_date)
    dataset = None
    if "loss" in page.tasks:
        check_sequence_length(model.config, page.sequence_length)
        dataset = load_dataset(page.data, model.tokenizer, page, is_stream=False, is_shuffled=False)
    questions = read_questions(page, model)
    enable_compilation_cache(page)
    tell(page, model, mesh, dataset, questions)
    with claimed(page):
        if is_first():
            begin(page, model, questions)
        from_first("evaluation begun", "")
        predictions = Predictions(directory / "predictions.jsonl")
        check_same("earlier predictions", predictions.digest())  # nobody goes on before all have read them
        if predictions.lines:
            print(f"going on with {len(predictions.lines):,} answers of {directory / 'predictions.jsonl'}")
        try:
            with jax.set_mesh(mesh):
                subject = Subject(model, weights.load_params(model.source, model.config, mesh), mesh)
                summary = facts(page, subject, dataset) if dataset else {}
                with progress() as tick:
                    summary |= measure(page, subject, questions, predictions, tick)
        except KeyboardInterrupt:
            again = "without --overwrite" if page.overwrite else "again"
            raise KeyboardInterrupt(
                f"; {len(predictions.lines):,} answers are kept in {directory}, and the same command {again} goes on"
            ) from None
        summary = {"command": "eval", **summary} | {
            "parameters": parameter_counts(model.config)["all"],
            "wall_seconds": time.perf_counter() - started,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "versions": metrics.versions(),
        }
        if is_first():
            metrics.write_summary(directory, summary)
            show(summary, directory)
        from_first("evaluation ended", "")  # the others wait here for what the first process writes


def check_unfinished(page: EvalConfig) -> None:
    """Refuse to measure again unasked what has been measured."""
    if (page.run_directory / "summary.json").exists() and not page.overwrite:
        raise UserError(
            f"{page.run_directory} holds an evaluation already; add --overwrite to replace it, or another --run-name"
        )


def tell(page: EvalConfig, model: OpenedModel, mesh: Mesh, dataset: Dataset | None, questions: Questions) -> None:
    """Print what is measured, and on what."""
    count = parameter_counts(model.config)["all"]
    print(f"model: {page.model_name} ({model.config.family}), {count:,} parameters")
    print(choose_backend(page, mesh, model.config.head)[1])
    bad = list(questions.bad)
    if dataset:
        print(f"data: {describe(dataset.facts)}")
        bad += [example for documents in dataset.documents for example in documents.facts["bad_examples"]]
    if questions.problems:
        print(f"problems: {len(questions.problems):,}, the first asked as {questions.problems[0].prompt!r}")
    for example in dict.fromkeys(bad):
        print(f"left out: {example}")


@contextmanager
def claimed(page: EvalConfig) -> Generator[None]:
    """Hold the directory for this job alone."""
    if not is_first():
        yield
        return
    try:
        handle = runs.take_lock(page.run_directory)
    except OSError as error:
        raise UserError(f"{page.run_directory}: {error.strerror}; mend that, or choose another output_dir") from error
    try:
        yield
    finally:
        (page.run_directory / runs.LOCK).unlink(missing_ok=True)
        os.close(handle)


def begin(page: EvalConfig, model: OpenedModel, questions: Questions) -> None:
    """Write down what makes this evaluation the one it is, or compare it with what an earlier start wrote.

    Raises:
        UserError: the earlier start was another evaluation.
    """
    directory = page.run_directory
    check_unfinished(page)  # again, now that no one else can write
    files = sorted(model.source.glob("*.safetensors"))
    now = json.loads(page.model_dump_json(exclude=FREE_ON_RESUME)) | {
        "content of data": questions.digest,
        "weights of model_name": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    identity = directory / "identity.json"
    try:
        if page.overwrite:
            for name in ("summary.json", "predictions.jsonl", "identity.json"):
                (directory / name).unlink(missing_ok=True)
        if identity.exists():
            earlier = json.loads(identity.read_text())
            if changed := [key for key in now if earlier.get(key) != now[key]]:
                differences = "; ".join(f"{key} was {earlier.get(key)!r} and is {now[key]!r}" for key in changed)
                raise UserError(
                    f"{directory} holds a part of another evaluation: {differences}; add --overwrite to start anew, "
                    "or another --run-name"
                )
            return
        metrics.write_atomically(identity, json.dumps(now))
        (directory / "config.toml").write_text(to_toml(page))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error


def facts(page: EvalConfig, subject: Subject, dataset: Dataset) -> dict[str, Any]:
    """What summary.json says of the held-out loss."""
    rows = page.batch_size * row_shards(subject.mesh)
    batches = partial(track, description="Held-out loss", transient=True, disable=not sys.stdout.isatty())
    result = held_out_loss(
        subject.params, dataset, rows, subject.model.config, subject.mesh, page.compute_dtype, batches
    )
    return {
        **result,
        "perplexity": math.exp(min(result["eval_loss"], 700)),
        "tokens": dataset.facts["tokens"],
        "data": dict(dataset.facts),
    }


@contextmanager
def progress() -> Generator[Tick]:
    """A bar of answers done, on a terminal only."""
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("Answers", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(summary: dict[str, Any], directory: Path) -> None:
    """Print the figures."""
    shown = ("eval_loss", "perplexity", "eval_accuracy", "target_tokens")
    if "eval_loss" in summary:
        print("  ".join(f"{key} {summary[key]:,.6g}" for key in shown))
    for task, figures in summary.items():
        if isinstance(figures, dict) and task not in ("data", "versions"):
            numbers = [f"{key} {value:,.6g}" for key, value in figures.items() if isinstance(value, int | float)]
            print(f"{task}: {'  '.join(numbers)}")
    print(f"summary: {directory / 'summary.json'}")
