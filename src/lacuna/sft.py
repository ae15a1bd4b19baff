"""The commands pretrain and sft: what a run reads, and the loop that trains on its rows."""

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console

from lacuna import metrics, runs, tasks, weights
from lacuna.config import PretrainConfig, RowsConfig, SamplingKeys, SftConfig, UserError, accumulation_steps
from lacuna.data import Batch, Dataset, StreamRows, coloured, describe, load_dataset
from lacuna.distributed import check_same, enable_compilation_cache, make_mesh, put_batch, row_shards
from lacuna.metrics import byte_size
from lacuna.model import ModelConfig, check_sequence_length, parameter_counts
from lacuna.predictions import Subject
from lacuna.runs import Run, Start
from lacuna.sampler import Request, Sampler, generation_defaults
from lacuna.tokenizer import Tokenizer, decode, encode, render
from lacuna.trainer import Recipe, TrainState, held_out_loss, recipe_of, resumed_state, starting_state, train_step
from lacuna.weights import OpenedModel

SKIPS_IN_A_ROW = 5
SAMPLE_SLOTS = 8

# The run


class Inputs(NamedTuple):
    """What a run reads before it computes; the model has its vocabulary padded for the mesh."""

    mesh: Mesh
    model: ModelConfig
    tokenizer: Tokenizer
    dataset: Dataset
    held_out: Dataset | None


def run(page: RowsConfig) -> "tuple[Loop, TrainState] | None":
    """The commands pretrain and sft, from page to exported model; the loop and the state it ended with, if it ran.

    Raises:
        UserError: whatever about config, model, data or devices can't be trained with.
    """
    if isinstance(page, SftConfig) and page.show:
        inputs = read_inputs(page)
        show(inputs.dataset, inputs.tokenizer, page.show)
        return None
    with runs.started(page) as start:
        inputs = read_inputs(page)
        runs.check_unchanged(page, inputs.model, runs.data_digests(inputs.dataset), start)
        check_same("config, model or data", fingerprint(page, inputs))
        enable_compilation_cache(page)
        with jax.set_mesh(inputs.mesh):
            return train(page, inputs, start)


def read_inputs(page: RowsConfig) -> Inputs:
    """Devices, model config, tokenizer and data of a page, each checked against the others."""
    mesh = make_mesh(page.data_parallel, page.fsdp, page.tensor)
    accumulation_steps(page.batch_size, page.micro_batch_size, row_shards(mesh))
    template = [page.chat_template, page.template_date] if isinstance(page, SftConfig) else []
    _, model, tokenizer = weights.open_model(page, mesh, *template, with_weights=False)
    check_sequence_length(model, page.sequence_length)
    dataset = load_dataset(page.data, tokenizer, page, is_stream=isinstance(page, PretrainConfig), is_shuffled=True)
    held_out = None
    if page.eval_data:
        held_out = load_dataset(page.eval_data, tokenizer, page, is_stream=False, is_shuffled=False)
    inputs = Inputs(mesh, model, tokenizer, dataset, held_out)
    sample_requests(page, inputs)  # what can't be asked is refused now
    if page.evaluation:
        tasks.read_questions(page.evaluation, OpenedModel(tokenizer.directory, model, tokenizer))
    return inputs


def sample_requests(page: RowsConfig, inputs: Inputs) -> list[Request]:
    """The page's sample prompts as the sampler takes them: sft asks by the chat template, pretrain gives plain text."""
    _, model, tokenizer, _, _ = inputs
    rules = SamplingKeys(temperature=0.0, max_tokens=page.sample_tokens)
    _, stop_ids = generation_defaults(tokenizer.directory, tokenizer)
    requests = []
    for prompt in page.sample_prompts:
        chat = [{"role": "user", "content": prompt}]
        try:
            text = render(tokenizer, chat, None, add_generation_prompt=True) if isinstance(page, SftConfig) else prompt
        except ValueError as error:
            raise UserError(f"sample_prompts: {prompt!r}: {error}") from error
        token = encode(tokenizer, text, add_special_tokens=not isinstance(page, SftConfig))
        check_sequence_length(model, len(token) + page.sample_tokens)
        requests.append(Request(tuple(token.tolist()), rules, stop_ids))
    return requests


def fingerprint(page: RowsConfig, inputs: Inputs) -> str:
    """A hash of all that the processes of a job must have in common."""
    data = [runs.data_digests(data) for data in (inputs.dataset, inputs.held_out) if data]
    first_rows = inputs.dataset.batch(0, page.batch_size)
    parts = repr((runs.masked_config(page), inputs.model, data)), *(leaf.tobytes() for leaf in first_rows)
    return hashlib.sha256(b"".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()


def train(page: RowsConfig, inputs: Inputs, start: Start) -> "tuple[Loop, TrainState]":
    """A run that has started and whose data are read."""
    mesh, model, _, dataset, _ = inputs
    source = weights.resolve_model(page.model_name, with_weights=not (start.resumed or page.from_scratch))
    if start.resumed:
        state = resumed_state(start.resumed, model, mesh)
    else:
        state = starting_state(page, source, model, mesh)
    row_limit = None if page.steps else dataset.rows.row_count(page.epochs)
    steps = page.steps or -(-dataset.rows.row_count(page.epochs) // page.batch_size)
    digests, lines = runs.data_digests(dataset), start_facts(page, inputs, steps)
    with runs.under_way(page, start, model, mesh, source, digests, steps, lines) as run:
        recipe = jax.device_put(recipe_of(page, steps), NamedSharding(mesh, PartitionSpec()))
        loop = Loop(page, inputs, run, row_limit, recipe)
        if start.resumed and (page.run_directory / "best").exists():
            loop.best_eval_loss = start.resumed[1].run.best_eval_loss
        state = loop.train(state)
        run.end(loop.step, loop.summary)
    return loop, state


def show(dataset: Dataset, tokenizer: Tokenizer, count: int) -> None:
    """Print the first rows that would be trained on, supervised text in green, or in ⟦ ⟧ where there is no colour."""
    console = Console(highlight=False)
    for row in range(min(count, dataset.rows.row_count(1))):
        console.rule(f"row {row + 1}")
        text = coloured(dataset.batch(row, 1), 0, tokenizer, has_marks=not console.is_terminal)
        console.print(text, soft_wrap=True)
    console.print(f"data: {describe(dataset.facts)}")
    for example in left_out(dataset):
        console.print(example)


def left_out(dataset: Dataset) -> Iterator[str]:
    """Lines on the first of the bad rows."""
    for documents in dataset.documents:
        yield from (f"left out: {example}" for example in documents.facts["bad_examples"])


def start_facts(page: RowsConfig, inputs: Inputs, steps: int) -> Iterator[str]:
    """Start-up lines on batch arithmetic and data."""
    shards, (_, _, _, dataset, held_out) = row_shards(inputs.mesh), inputs
    accumulation = accumulation_steps(page.batch_size, page.micro_batch_size, shards)
    yield (
        f"batch: {page.batch_size} rows × {page.sequence_length} tokens = {page.micro_batch_size} a forward pass × "
        f"{shards} data-parallel devices × {accumulation} accumulated; {steps:,} steps"
    )
    yield f"data: {describe(dataset.facts)}; {fill(dataset)}"
    if held_out:
        yield f"held-out data: {describe(held_out.facts)}"
    for data in filter(None, (dataset, held_out)):
        yield from left_out(data)


def fill(dataset: Dataset) -> str:
    """Rows of an epoch and the share of their slots that hold a token."""
    rows = dataset.rows.row_count(1)
    if isinstance(dataset.rows, StreamRows):
        return f"{rows:,} full rows an epoch"
    share = dataset.rows.slot_count(0) / (rows * dataset.rows.length)
    return f"{rows:,} rows an epoch, {share:.2%} of their slots filled"


@dataclass
class Loop:
    """The training loop and what it keeps at hand; `step` counts the steps done."""

    page: RowsConfig
    inputs: Inputs
    run: Run
    row_limit: int | None
    recipe: Recipe
    best_eval_loss: float | None = None
    step: int = 0
    pending: list[tuple[dict[str, Any], dict[str, Array]]] = field(default_factory=list)
    programs: dict[int, Any] = field(default_factory=dict)
    save_seconds: list[float] = field(default_factory=list)
    work_done: int = 0
    is_timed: bool = False
    clock: float = 0.0
    compile_seconds: float = 0.0
    first_step_seconds: float | None = None

    def train(self, state: TrainState) -> TrainState:
        """Every step that is left: dispatch it, prepare the next batch while it runs, then log, evaluate and save."""
        page, self.step = self.page, int(state.step)
        if self.step < self.run.steps:
            batch, record = self.prepare(self.step)
            self.program(state, batch)
        self.clock = time.perf_counter()
        with self.run.watched(self.progress) as stop:
            while self.step < self.run.steps:
                state, facts = self.program(state, batch)(state, batch, self.recipe)
                self.step += 1
                self.pending.append((record, facts))
                is_last = self.step == self.run.steps
                if not is_last:
                    batch, record = self.prepare(self.step)
                if self.step % page.log_every == 0:
                    self.flush(leave=1)
                is_eval = is_last or (page.eval_every and self.step % page.eval_every == 0)
                is_best = bool(is_eval) and self.evaluate(state)
                is_stop = stop.is_due(self.step)
                is_save = is_last or is_best or is_stop or (page.save_every and self.step % page.save_every == 0)
                if is_eval or is_save:
                    self.flush()
                    if is_save:
                        self.save(state, is_best)
                    self.clock = time.perf_counter()
                self.run.tell_saved()
                if is_stop:
                    break
            with self.untimed():
                self.run.wait_for_save()
        return state

    def prepare(self, index: int) -> tuple[Batch, dict[str, Any]]:
        """Batch `index` on the devices, as [micro_batch, row, token], and what its log line knows beforehand."""
        mesh, model, _, dataset, _ = self.inputs
        batch = dataset.batch(index, self.page.batch_size, self.row_limit)
        lengths = np.array(
            [count for row in batch.segment for count in np.bincount(row, minlength=2)[1:] if count], np.int64
        )
        record = {
            "step": index + 1,
            "epoch": round(dataset.rows.epoch_of((index + 1) * self.page.batch_size), 4),
            "tokens": int(lengths.sum()),
            "target_tokens": int(batch.weight.sum()),
            "packing_efficiency": float(lengths.sum() / batch.token.size),
            "flops": metrics.step_flops(
                parameter_counts(model)["matmul"],
                model.kv_heads * model.group * model.head,
                model.layers,
                int(lengths.sum()),
                int(np.sum(lengths**2)),
            ),
        }
        accumulation = accumulation_steps(self.page.batch_size, self.page.micro_batch_size, row_shards(mesh))
        split = jax.tree.map(lambda leaf: leaf.reshape(accumulation, -1, leaf.shape[1]), batch)
        return put_batch(split, mesh), record

    def program(self, state: TrainState, batch: Batch) -> Any:
        """The compiled step for rows of this length."""
        length = batch.token.shape[-1]
        if length not in self.programs:
            began = time.perf_counter()
            step = jax.jit(partial(train_step, model=self.inputs.model, page=self.page), donate_argnames="state")
            with self.untimed():
                self.programs[length] = step.lower(state, batch, self.recipe).compile()
            seconds = time.perf_counter() - began
            self.compile_seconds += seconds
            self.clock += seconds
            memory = self.programs[length].memory_analysis()
            held = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            self.run.log.info(
                f"compiled the step for rows of {length} tokens in {seconds:.1f} s; a device holds "
                f"{byte_size(held[0])} of state and batch and {byte_size(held[1])} of temporaries"
            )
        return self.programs[length]

    def flush(self, leave: int = 0) -> None:
        """Fetch and log the finished steps but the last `leave`, which may still run.

        Raises:
            UserError: the gradient was not finite for five steps in a row.
        """
        count = len(self.pending) - leave
        if count <= 0:
            return
        ready, self.pending = self.pending[:count], self.pending[count:]
        fetched = jax.device_get([facts for _, facts in ready])
        seconds = (time.perf_counter() - self.clock) / count
        self.clock = time.perf_counter()
        self.first_step_seconds = self.first_step_seconds or self.clock - self.run.start.time
        self.work_done += count
        mesh = self.inputs.mesh
        peak = metrics.peak_flops(mesh.devices.flat[0].device_kind)
        for (record, _), facts in zip(ready, fetched, strict=True):
            skipped = int(facts.pop("skipped"))
            record |= {key: float(value) for key, value in facts.items()}
            record |= {
                "step_seconds": seconds,
                "tokens_per_second": record["tokens"] / seconds,
                "target_tokens_per_second": record["target_tokens"] / seconds,
                "mfu": record["flops"] / seconds / (peak * mesh.size) if peak else None,
                "memory_bytes": metrics.memory_bytes(),
            }
            self.run.log.step(record)
            if skipped:
                self.report_skip(record["step"], skipped)

    def report_skip(self, step: int, in_a_row: int) -> None:
        """Say that a step had no effect; the fifth in a row ends the run."""
        first = (step - 1) * self.page.batch_size
        begin = decode(self.inputs.tokenizer, self.inputs.dataset.batch(first, 1).token[0][:24].tolist())
        what = (
            f"step {step}: the loss or gradient is not finite, so weights and optimizer stay as they were; its data "
            f"are rows {first + 1} to {first + self.page.batch_size}, beginning {begin!r}"
        )
        if in_a_row >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{what}; {in_a_row} steps in a row: lower learning_rate, or look at these data with --show"
            )
        self.run.log.info(f"{what} ({in_a_row} in a row)")

    def evaluate(self, state: TrainState) -> bool:
        """Held-out loss, samples and tasks into the log line of the last step; whether the loss is the best so far."""
        mesh, model, tokenizer, _, held_out = self.inputs
        jax.block_until_ready(self.pending[-1][1])
        began = time.perf_counter()
        if self.page.sample_prompts:
            self.pending[-1][0]["samples"] = self.samples(state)
        if self.page.evaluation:
            subject = Subject(OpenedModel(tokenizer.directory, model, tokenizer), state.params, mesh)
            with self.untimed():
                self.pending[-1][0].update(tasks.measure_in_training(self.page.evaluation, subject))
        if held_out is None:
            self.clock += time.perf_counter() - began
            return False
        rows, dtype = self.page.micro_batch_size * row_shards(mesh), self.page.compute_dtype
        result = held_out_loss(state.params, held_out, rows, model, mesh, dtype, self.counted)
        self.pending[-1][0].update(eval_loss=result["eval_loss"], eval_accuracy=result["eval_accuracy"])
        self.clock += time.perf_counter() - began
        is_best = self.best_eval_loss is None or result["eval_loss"] < self.best_eval_loss
        if is_best:
            self.best_eval_loss = result["eval_loss"]
        return is_best

    def samples(self, state: TrainState) -> dict[str, str]:
        """How the model now answers each of the page's prompts, or goes on from it, by greedy decoding."""
        mesh, model, tokenizer, _, _ = self.inputs
        requests = sample_requests(self.page, self.inputs)
        shards, capacity = row_shards(mesh), max(len(request.prompt) for request in requests) + self.page.sample_tokens
        slots = -(-min(len(requests), SAMPLE_SLOTS) // shards) * shards
        with self.untimed():
            sampler = Sampler(state.params, model, tokenizer, mesh, slots, capacity, self.page.compute_dtype)
            completions = sampler.generate(requests)
        return dict(zip(self.page.sample_prompts, (completion.text for completion in completions), strict=True))

    def counted(self, batches: range) -> Iterator[int]:
        """The batches of an evaluation, each counted as work done, the first untimed as it compiles."""
        for index in batches:
            with nullcontext() if index else self.untimed():
                yield index
            self.work_done += 1

    def save(self, state: TrainState, is_best: bool) -> None:
        """Begin to save the checkpoint of this step."""
        with self.untimed():
            self.save_seconds.append(self.run.save(state, self.step, self.best_eval_loss, is_best))

    def progress(self) -> int | None:
        """Pieces of work done so far, for the watchdog; none while something runs that may take its time."""
        if not self.is_timed:
            return None
        losses: list[Any] = [facts["loss"] for _, facts in tuple(self.pending)]
        return self.work_done + sum(loss.is_ready() for loss in losses)

    @contextmanager
    def untimed(self) -> Generator[None]:
        """Where the watchdog looks away: compilers and disks may take long."""
        self.is_timed = False
        yield
        self.is_timed = True

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json holds of rows and steps, `records` being those of the steps."""
        page, shards = self.page, row_shards(self.inputs.mesh)
        return {
            "effective_batch_size": page.batch_size,
            "accumulation_steps": accumulation_steps(page.batch_size, page.micro_batch_size, shards),
            "skipped_steps": sum(not math.isfinite(record["loss"] or math.nan) for record in records),
            "data": dict(self.inputs.dataset.facts),
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
            "save_hold_up_seconds": max(self.save_seconds, default=None),
        }
