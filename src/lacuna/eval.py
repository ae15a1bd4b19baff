"""Evaluation: the held-out loss of any model on any data that training reads, masked and packed as in training."""

import math
import sys
import time
from functools import partial

import jax
from rich.progress import track

from lacuna import metrics, weights
from lacuna.config import EvalConfig, UserError, to_toml
from lacuna.data import describe, load_dataset
from lacuna.distributed import enable_compilation_cache, is_first, make_mesh, row_shards
from lacuna.model import check_sequence_length, parameter_counts
from lacuna.trainer import held_out_loss


def run(page: EvalConfig) -> None:
    """The command eval: mean loss over all target tokens into summary.json, printed as it is found.

    Raises:
        UserError: whatever about config, model, data or devices can't be evaluated.
    """
    started = time.perf_counter()
    directory = page.run_directory
    if (directory / "summary.json").exists() and not page.overwrite:
        raise UserError(
            f"{directory} holds an evaluation already; add --overwrite to replace it, or another --run-name"
        )
    mesh = make_mesh(page.data_parallel, page.fsdp, page.tensor)
    source, model, tokenizer = weights.open_model(page.model_name, mesh, page.chat_template, page.template_date)
    check_sequence_length(model, page.sequence_length)
    dataset = load_dataset(page.data, tokenizer, page, is_stream=False, is_shuffled=False)
    enable_compilation_cache(page)
    print(f"model: {page.model_name} ({model.family}), {parameter_counts(model)['all']:,} parameters")
    print(f"data: {describe(dataset.facts)}")
    for example in (example for documents in dataset.documents for example in documents.facts["bad_examples"]):
        print(f"left out: {example}")
    with jax.set_mesh(mesh):
        params = weights.load_params(source, model, mesh)
        rows = page.batch_size * row_shards(mesh)
        progress = partial(track, description="Evaluating", transient=True, disable=not sys.stdout.isatty())
        result = held_out_loss(params, dataset, rows, model, mesh, page.compute_dtype, progress)
    summary = {
        "command": "eval",
        **result,
        "perplexity": math.exp(min(result["eval_loss"], 700)),
        "tokens": dataset.facts["tokens"],
        "parameters": parameter_counts(model)["all"],
        "data": dict(dataset.facts),
        "wall_seconds": time.perf_counter() - started,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "versions": metrics.versions(),
    }
    if not is_first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(to_toml(page))
    metrics.write_summary(directory, summary)
    shown = ("eval_loss", "perplexity", "eval_accuracy", "target_tokens")
    print("  ".join(f"{key} {summary[key]:,.6g}" for key in shown))
    print(f"summary: {directory / 'summary.json'}")
