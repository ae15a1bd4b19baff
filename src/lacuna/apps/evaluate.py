"""The command eval: the figures of each task into summary.json, each answer into predictions.jsonl."""

import hashlib
import json
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from lacuna import checkpoint, metrics
from lacuna.apps.configs import RecommendConfig
from lacuna.checkpoint import OpenedModel
from lacuna.config import LINES, EvalConfig, UserError, printable, to_toml
from lacuna.data import Dataset, describe, load_dataset
from lacuna.distributed import (
    check_same,
    enable_compilation_cache,
    from_first,
    held_directory,
    is_first,
    make_mesh,
    writing_to,
)
from lacuna.environments import Environment
from lacuna.eval import Figures, Predictions, ReportProgress, RunHarness, Tasks, held_out_loss, prepare_tasks, run_tasks
from lacuna.model import check_sequence_length, parameter_counts
from lacuna.tokenizer import ends_in_words

FREE_ON_RESUME = {"run_name", "output_dir", "overwrite", "batch_size", "slots", "data_parallel", "fsdp", "tensor",
                  "compilation_cache", "environment_workers", "environment_seconds"}  # fmt: skip


def run_eval(config: EvalConfig, run_harness: RunHarness | None = None, environment: Environment | None = None) -> None:
    """The command eval: figures of each task into summary.json, each answer into predictions.jsonl.

    Raises:
        UserError: whatever about config, model, data or devices can't be evaluated.
    """
    started, config = time.perf_counter(), checkpoint.settled(config)
    directory = config.run_directory
    with held_directory(directory):
        if is_first() and (directory / "summary.json").exists() and not config.overwrite:
            raise UserError(
                f"{directory} holds an evaluation already; add --overwrite to replace it, or another --run-name"
            )
        mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
        opened = checkpoint.open_model(config, mesh)
        dataset = None
        if "loss" in config.tasks:
            check_sequence_length(opened.model, config.sequence_length)
            dataset = load_dataset(config.data, opened.tokenizer, config, is_stream=False, is_shuffled=False)
        tasks = prepare_tasks(config, run_harness, opened, environment)
        enable_compilation_cache(config)
        print_inputs(tasks, dataset)
        if is_first():
            files = [environment.file] if environment and environment.file else []
            begin_evaluation(config, opened, [*tasks.problems.digests, *map(metrics.file_hash, files)])
        from_first("evaluation begun", "")
        with (
            closing(metrics.LineFile(directory / "predictions.jsonl")) as kept,
            progress_bar() as report,
            jax.set_mesh(mesh),
        ):
            predictions = Predictions(kept, report)
            known = hashlib.sha256(repr(sorted(predictions.lines, key=repr)).encode()).hexdigest()
            check_same("earlier predictions", known)  # nobody adds to them before all have read them
            if predictions.lines:
                print(f"resuming with {len(predictions.lines):,} answers of {kept.path}")
            summary: Figures = {"command": "eval"}
            try:
                params = checkpoint.opened_params(opened)
                if dataset:
                    settings = config.batch_size, opened, config.compute_dtype
                    summary |= held_out_loss(params, dataset, *settings, report)
                    summary |= {"tokens": dataset.facts["tokens"], "data": dict(dataset.facts)}
                summary |= run_tasks(tasks, params, predictions)
            except KeyboardInterrupt:
                again = "without --overwrite" if config.overwrite else "again"
                raise KeyboardInterrupt(
                    f"; {len(predictions.lines):,} answers are kept in {directory}, and the same command {again} "
                    "resumes"
                ) from None
        summary |= {
            "parameters": parameter_counts(opened.model)["all"],
            "adapter": str(opened.source) if opened.place.base else None,
            "base": opened.place.base_name,
            "base_bits": opened.model.bits or None,
            "wall_seconds": time.perf_counter() - started,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "versions": metrics.versions(),
        }
        if is_first():
            metrics.write_summary(directory, summary)
            show_summary(summary, directory)
        from_first("evaluation ended", "")  # the others wait here for what the first process writes


def print_inputs(tasks: Tasks, dataset: Dataset | None) -> None:
    """Print what is measured, and on what."""
    config, model, problems = tasks.config, tasks.opened.model, tasks.problems
    print(f"model: {config.model_name} ({model.family}), {parameter_counts(model)['all']:,} parameters{model.held}")
    print(f"compute in {config.compute_dtype}; {tasks.opened.attention_line}")
    if problems.problems:
        print(ends_in_words(tasks.opened.tokenizer))
    bad = list(problems.bad)
    if dataset:
        print(f"data: {describe(dataset.facts)}")
        bad += dataset.bad_examples
    if problems.problems:
        print(f"problems: {len(problems.problems):,}, the first asked as {problems.problems[0].prompt!r}")
    for example in dict.fromkeys(bad):
        print(printable(f"left out: {example}", LINES))


def begin_evaluation(config: EvalConfig | RecommendConfig, opened: OpenedModel, digests: Sequence[str]) -> None:
    """Write down what makes this evaluation the one it is, `digests` of its data included, or compare it with what an
    earlier start wrote.

    Raises:
        UserError: the earlier start was another evaluation.
    """
    directory = config.run_directory
    files = sorted(opened.source.glob("*.safetensors"))
    now = json.loads(config.model_dump_json(exclude=FREE_ON_RESUME)) | {
        "content of data": list(digests),
        "weights of model_name": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    identity = directory / "identity.json"
    with writing_to(directory):
        if config.overwrite:
            for name in ("summary.json", "run_summary.json", "predictions.jsonl", "identity.json"):
                (directory / name).unlink(missing_ok=True)
        try:
            earlier = dict(json.loads(identity.read_text())) if identity.exists() else now
        except (ValueError, TypeError) as error:
            raise UserError(f"{identity}: damaged ({error}); add --overwrite to start over") from error
        if changed := [key for key in now if earlier.get(key) != now[key]]:
            differences = "; ".join(f"{key} was {earlier.get(key)!r} and is {now[key]!r}" for key in changed)
            raise UserError(
                f"{directory} holds a part of another evaluation: {differences}; add --overwrite to start over, or "
                "another --run-name"
            )
        metrics.write_atomically(identity, json.dumps(now))
        metrics.write_atomically(directory / "config.toml", to_toml(config))


@contextmanager
def progress_bar() -> Generator[ReportProgress]:
    """A bar, on a terminal only."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_summary(summary: dict[str, Any], directory: Path) -> None:
    """Print the figures."""
    shown = ("eval_loss", "perplexity", "eval_accuracy", "target_tokens")
    if "eval_loss" in summary:
        print("  ".join(f"{key} {summary[key]:,.6g}" for key in shown))
    for task, figures in summary.items():
        if isinstance(figures, dict) and task not in ("data", "versions"):
            numbers = [f"{key} {value:,.6g}" for key, value in figures.items() if isinstance(value, int | float)]
            print(f"{task}: {'  '.join(numbers)}")
    print(f"summary: {directory / 'summary.json'}")
