"""Training: the loss, the optimizer step, held-out loss, and the loop that pretrain and sft share."""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree
from rich.console import Console

from lacuna import checkpoint, metrics, runs, tasks, weights
from lacuna.attention import choose_backend
from lacuna.checkpoint import Manifest, RunFacts, Saver
from lacuna.config import (
    PretrainConfig,
    RowsConfig,
    SamplingKeys,
    SftConfig,
    TrainingConfig,
    UserError,
    accumulation_steps,
)
from lacuna.data import Batch, Dataset, StreamRows, coloured, describe, load_dataset
from lacuna.distributed import (
    Stop,
    check_same,
    compiler_options,
    enable_compilation_cache,
    from_first,
    is_first,
    make_mesh,
    put_batch,
    row_shards,
    watchdog,
)
from lacuna.metrics import RunLog, byte_size
from lacuna.model import (
    ModelConfig,
    cast,
    check_sequence_length,
    embed,
    forward,
    head_of,
    initial_params,
    parameter_counts,
    parameter_table,
    partition_spec,
    summed_cross_entropy,
    token_statistics,
)
from lacuna.predictions import Subject
from lacuna.sampler import Request, Sampler, generation_defaults
from lacuna.tokenizer import Tokenizer, decode, encode, render
from lacuna.weights import OpenedModel

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.95, 1e-8  # Brown et al. 2020, as Llama after it
FINAL_LEARNING_RATE = 0.1  # of the peak
SKIPS_IN_A_ROW = 5
SAMPLE_SLOTS = 8


class TrainState(NamedTuple):
    """All that training changes; `skipped` counts the steps in a row that a non-finite gradient left without effect."""

    params: PyTree[Float[Array, "..."]]
    moments: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]


class Recipe(NamedTuple):
    """The numbers of the config that the step computes with; arguments, so that another value compiles nothing anew."""

    learning_rate: Float[Array, ""]
    warmup_steps: Int[Array, ""]
    steps: Int[Array, ""]
    weight_decay: Float[Array, ""]
    clip_norm: Float[Array, ""]
    neftune_alpha: Float[Array, ""]
    noise_key: Key[Array, ""]


def recipe_of(page: TrainingConfig, steps: int) -> Recipe:
    """The recipe of a run of `steps` steps."""
    numbers = [page.learning_rate, page.warmup_steps, steps, page.weight_decay, page.clip_norm, noise_alpha(page)]
    return Recipe(*map(jnp.asarray, numbers), jax.random.key(page.seed))


def noise_alpha(page: TrainingConfig) -> float:
    """Strength of the noise on embeddings, which pretraining does without."""
    return page.neftune_alpha if isinstance(page, SftConfig) else 0.0


# The step

adam = optax.scale_by_adam(ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)


def learning_rate(step: Int[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """Linear warm-up to the peak, then a cosine to a tenth of it (Loshchilov & Hutter 2017); steps count from 0."""
    warmup = recipe.warmup_steps
    progress = (step - warmup) / jnp.maximum(recipe.steps - warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decayed = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine
    return recipe.learning_rate * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decayed)


def embedding_noise(
    key: Key[Array, ""],
    segment: Int[Array, "row token"],
    first_row: Int[Array, ""],
    alpha: Float[Array, ""],
    x: Float[Array, "row token embed"],
) -> Float[Array, "row token embed"]:
    """NEFTune's noise (Jain et al. 2023): uniform within ± alpha / √(document length × embed), a key for each row."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(x.shape[0]))
    noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1, maxval=1))(keys)
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=x.shape[1] + 1)[row])(segment)
    return (noise * alpha / jnp.sqrt(lengths[..., None] * x.shape[-1])).astype(x.dtype)


def summed_loss(
    params: PyTree[Array],
    batch: Batch,
    model: ModelConfig,
    rematerialisation: str = "none",
    noise: Callable[[Array], Array] | None = None,
) -> Float[Array, ""]:
    """Sum of the batch's weighted token losses (nats); `params` are in the dtype of compute."""
    x = embed(params, batch.token)
    if noise is not None:
        x = x + noise(x)
    hidden = forward(params, x, batch.segment, batch.position, model, rematerialisation)
    return summed_cross_entropy(hidden, head_of(params, model), batch.target, batch.weight, model.vocabulary_size)


def whole_batch_gradient(
    params: PyTree[Array], batch: Batch, step: Int[Array, ""], recipe: Recipe, model: ModelConfig, page: RowsConfig
) -> tuple[Float[Array, ""], PyTree[Array]]:
    """Mean loss over the target tokens of all micro-batches [micro_batch, row, token], and its float32 gradient.

    Sums are divided once, by the number of targets of the whole batch, so each token weighs the same wherever it lies.
    """
    compute = cast(params, model, page.compute_dtype)
    key = jax.random.fold_in(recipe.noise_key, step)

    def accumulate(total: PyTree, micro: tuple[Batch, Array]) -> tuple[PyTree, None]:
        batch, number = micro
        first_row = number * batch.token.shape[0]
        has_noise = noise_alpha(page) > 0
        noise = partial(embedding_noise, key, batch.segment, first_row, recipe.neftune_alpha) if has_noise else None
        parts = jax.value_and_grad(summed_loss)(compute, batch, model, page.rematerialisation, noise)
        return jax.tree.map(jnp.add, total, parts), None

    zero = (jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    total, _ = jax.lax.scan(accumulate, zero, (batch, jnp.arange(batch.token.shape[0])))
    loss, gradients = jax.tree.map(lambda leaf: leaf / jnp.sum(batch.weight), total)
    return loss, gradients


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, model: ModelConfig, page: RowsConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One AdamW step (Loshchilov & Hutter 2019) on [micro_batch, row, token]."""
    loss, gradients = whole_batch_gradient(state.params, batch, state.step, recipe, model, page)
    return apply_gradient(state, loss, gradients, recipe, model)


def apply_gradient(
    state: TrainState, loss: Float[Array, ""], gradients: PyTree[Array], recipe: Recipe, model: ModelConfig
) -> tuple[TrainState, dict[str, Array]]:
    """The AdamW step along a gradient, clipped; one that is not finite has no effect."""
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, recipe.clip_norm / norm)
    direction, moments = adam.update(jax.tree.map(lambda leaf: leaf * clip, gradients), state.moments)
    rate = learning_rate(state.step, recipe)

    def updated(row: Any, param: Array, direction: Array) -> Array:
        return param - rate * (direction + recipe.weight_decay * param if row.decays else direction)

    params = jax.tree.map(updated, parameter_table(model), state.params, direction)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), (params, moments), (state.params, state.moments)
    )
    skipped = jnp.where(is_finite, 0, state.skipped + 1)
    facts = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "skipped": skipped}
    return TrainState(params, moments, state.step + 1, skipped), facts


@partial(jax.jit, static_argnames=("model", "dtype"))
def held_out_sums(params: PyTree[Array], batch: Batch, model: ModelConfig, dtype: str) -> dict[str, Array]:
    """Sums over the targets of a batch [1, row, token]: loss, likeliest-token hits, and targets."""
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    compute = cast(params, model, dtype)
    hidden = forward(compute, embed(compute, batch.token), batch.segment, batch.position, model)
    found = token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size)
    return {"loss": jnp.sum(found.loss * batch.weight), "correct": jnp.sum(found.is_correct * batch.weight)}


# Around the step


def state_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Where each part of the state lies."""
    params: Any = jax.tree.map(lambda row: NamedSharding(mesh, partition_spec(row)), parameter_table(model))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(params, optax.ScaleByAdamState(whole, params, params), whole, whole)


def abstract_state(model: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda key: fresh_state(initial_params(key, model)), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, mesh),
    )


def saved_shapes(model: ModelConfig) -> TrainState:
    """Shapes of the state in a checkpoint, which does without the rows that pad the vocabulary."""
    unpadded = replace(model, padded_vocabulary=model.vocabulary_size)
    return jax.eval_shape(lambda key: fresh_state(initial_params(key, unpadded)), jax.random.key(0))


def fresh_state(params: PyTree[Array]) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(params, adam.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def starting_state(page: TrainingConfig, directory: Path, model: ModelConfig, mesh: Mesh) -> TrainState:
    """Weights as the page wants them, random or loaded, and empty moments, each born on its devices."""
    shardings = state_shardings(model, mesh)
    if page.from_scratch:
        random = jax.jit(lambda key: fresh_state(initial_params(key, model)), out_shardings=shardings)
        return random(jax.random.key(page.seed))
    params = weights.load_params(directory, model, mesh)
    return jax.jit(fresh_state, out_shardings=shardings, donate_argnums=0)(params)


def held_out_loss(
    params: PyTree[Array],
    dataset: Dataset,
    batch_size: int,
    model: ModelConfig,
    mesh: Mesh,
    dtype: str,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Mean loss (nats), share of targets that were the likeliest token, and count over all targets of a data set."""
    row_count = dataset.rows.row_count(1)
    loss, correct, targets = 0.0, 0.0, 0
    for index in progress(range(-(-row_count // batch_size))):
        batch = dataset.batch(index, batch_size, row_count)
        sums = held_out_sums(params, put_batch(jax.tree.map(lambda leaf: leaf[None], batch), mesh), model, dtype)
        loss, correct = loss + float(sums["loss"]), correct + float(sums["correct"])
        targets += int(batch.weight.sum())
    return {"eval_loss": loss / targets, "eval_accuracy": correct / targets, "target_tokens": targets}


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
    started = time.perf_counter()
    if isinstance(page, SftConfig) and page.show:
        inputs = read_inputs(page)
        show(inputs.dataset, inputs.tokenizer, page.show)
        return None
    with runs.claimed(page):
        lines: list[str] = []
        resumed = runs.checkpoint_to_resume(page, lines.append)
        inputs = read_inputs(page)
        if resumed:
            runs.check_unchanged(page, inputs.model, runs.data_digests(inputs.dataset), resumed[1])
            lines.append(f"resuming from {resumed[0]}")
        elif page.resume:
            lines.append("no checkpoint to resume from yet, so this begins at the beginning")
        check_same("config, model or data", fingerprint(page, inputs))
        enable_compilation_cache(page)
        with jax.set_mesh(inputs.mesh):
            return train(page, inputs, resumed, lines, started)


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


def train(
    page: RowsConfig, inputs: Inputs, resumed: tuple[Path, Manifest] | None, lines: list[str], started: float
) -> "tuple[Loop, TrainState]":
    """A run whose directory is claimed and whose data are read; its log begins with `lines`."""
    mesh, model, _, dataset, _ = inputs
    directory, facts = page.run_directory, resumed[1].run if resumed else None
    first_step = facts.step if facts else 0
    source = weights.resolve_model(page.model_name, with_weights=not (resumed or page.from_scratch))
    if resumed:
        state = checkpoint.load_checkpoint(*resumed, abstract_state(model, mesh), saved_shapes(model))
    else:
        state = starting_state(page, source, model, mesh)
    session = from_first("session", secrets.token_hex(4))
    if is_first():
        runs.begin(page, first_step, lines.append)
    row_limit = None if page.steps else dataset.rows.row_count(page.epochs)
    steps = page.steps or -(-dataset.rows.row_count(page.epochs) // page.batch_size)
    config = runs.masked_config(page)
    try:
        run_log = RunLog(directory, steps, page.log_every, first_step, page.wandb, config, is_first())
    except OSError as error:
        raise UserError(f"{directory}: {checkpoint.describe_error(error)}; make room and start again") from error
    with run_log as log:
        for line in (*start_facts(page, inputs, steps), *lines):
            log.info(line)
        recipe = jax.device_put(recipe_of(page, steps), NamedSharding(mesh, PartitionSpec()))
        saver = Saver(directory, page.keep, session)
        saver.newest = resumed[0] if resumed else None
        loop = Loop(page, inputs, log, saver, steps, row_limit, recipe, started)
        if facts:
            loop.earlier_seconds = facts.wall_seconds
            loop.best_eval_loss = facts.best_eval_loss if (directory / "best").exists() else None
        state = loop.train(state)
        if is_first():
            try:
                loop.end(source)
            except OSError as error:
                why = checkpoint.describe_error(error)
                raise UserError(f"{directory}: {why}; all steps are saved: make room and add --resume") from error
        from_first("run ended", "")  # the others wait here for what the first process writes
    return loop, state


def command_of(page: RowsConfig) -> str:
    """Name of the command that a page belongs to."""
    return "pretrain" if isinstance(page, PretrainConfig) else "sft"


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
    """The start-up lines: model, devices, batch arithmetic, data."""
    mesh, model, _, dataset, held_out = inputs
    shards = row_shards(mesh)
    accumulation = accumulation_steps(page.batch_size, page.micro_batch_size, shards)
    counts = parameter_counts(model)
    yield (
        f"model: {page.model_name} ({model.family}), {counts['all']:,} parameters, "
        f"{counts['decayed']:,} with weight decay and {counts['all'] - counts['decayed']:,} without"
    )
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    yield f"devices: {mesh.size} × {kind}{processes}, mesh {shape}, compute in {page.compute_dtype}"
    yield choose_backend(page, mesh, model.head)[1]
    for option, value in compiler_options().items():
        yield f"the step is compiled with {option} = {value}; XLA_FLAGS chooses another"
    yield (
        f"batch: {page.batch_size} rows × {page.sequence_length} tokens = {page.micro_batch_size} a forward pass × "
        f"{shards} data-parallel devices × {accumulation} accumulated; {steps:,} steps"
    )
    yield f"data: {describe(dataset.facts)}; {fill(dataset)}"
    if held_out:
        yield f"held-out data: {describe(held_out.facts)}"
    for data in filter(None, (dataset, held_out)):
        yield from left_out(data)
    if page.compilation_cache:
        yield f"compiled programs are kept in {page.cache_dir / 'programs'}"


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
    log: RunLog
    saver: Saver
    steps: int
    row_limit: int | None
    recipe: Recipe
    started: float
    earlier_seconds: float = 0.0
    best_eval_loss: float | None = None
    step: int = 0
    stop: Stop = field(default_factory=Stop)
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
        if self.step < self.steps:
            batch, record = self.prepare(self.step)
            self.program(state, batch)
        self.clock = time.perf_counter()
        log_file = page.run_directory / "run.log"
        with self.stop.listening(self.log.info), watchdog(self.progress, log_file), self.saver.finishing():
            while self.step < self.steps:
                state, facts = self.program(state, batch)(state, batch, self.recipe)
                self.step += 1
                self.pending.append((record, facts))
                is_last = self.step == self.steps
                if not is_last:
                    batch, record = self.prepare(self.step)
                if self.step % page.log_every == 0:
                    self.flush(leave=1)
                is_eval = is_last or (page.eval_every and self.step % page.eval_every == 0)
                is_best = bool(is_eval) and self.evaluate(state)
                is_stop = self.stop.is_due(self.step)
                is_save = is_last or is_best or is_stop or (page.save_every and self.step % page.save_every == 0)
                if is_eval or is_save:
                    self.flush()
                    if is_save:
                        self.save(state, is_best)
                    self.clock = time.perf_counter()
                self.tell_saved()
                if is_stop:
                    break
            with self.untimed():
                self.saver.wait()
            self.tell_saved()
        if self.saver.failures:
            raise UserError(f"step {self.step} is not saved; make room and go on with --resume")
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
                self.programs[length] = step.lower(state, batch, self.recipe).compile(compiler_options())
            seconds = time.perf_counter() - began
            self.compile_seconds += seconds
            self.clock += seconds
            memory = self.programs[length].memory_analysis()
            held = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            self.log.info(
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
        self.first_step_seconds = self.first_step_seconds or self.clock - self.started
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
            self.log.step(record)
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
        self.log.info(f"{what} ({in_a_row} in a row)")

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
        self.log.sync()
        facts = RunFacts(
            step=self.step,
            best_eval_loss=self.best_eval_loss,
            wall_seconds=self.wall_seconds(),
            config=runs.masked_config(self.page),
            model=runs.model_facts(self.inputs.model),
            data=runs.data_digests(self.inputs.dataset),
            versions=metrics.versions(),
        )
        with self.untimed():
            self.save_seconds.append(self.saver.save(state, saved_shapes(self.inputs.model), facts, is_best))

    def tell_saved(self) -> None:
        """Log the saves that have ended meanwhile."""
        for line in self.saver.news():
            self.log.info(line)

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

    def end(self, source: Path) -> None:
        """Write what a run leaves behind, with the model if all steps are done."""
        page, directory = self.page, self.page.run_directory
        metrics.write_summary(directory, self.summary())
        metrics.write_report(directory)
        if self.step < self.steps:
            again = f"{command_of(page)} @ {directory / 'config.toml'} --resume"
            self.log.info(f"stopped after step {self.step} of {self.steps}, all saved; to go on: uv run {again}")
        else:
            template = page.chat_template if isinstance(page, SftConfig) else ""
            assert self.saver.newest
            with ExitStack() as stack:
                params = checkpoint.saved_params(self.saver.newest, self.inputs.model, stack)
                weights.save_model(directory / "model", params, self.inputs.model, source, template)
            self.log.info(f"model in Hugging Face layout: {directory / 'model'}")
        self.log.info(f"report: {directory / 'report.html'}")

    def wall_seconds(self) -> float:
        """Seconds of the whole run, those before it was resumed included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        records = metrics.read_metrics(self.page.run_directory / "metrics.jsonl")
        return metrics.summarise(records) | {
            "command": command_of(self.page),
            "parameters": parameter_counts(self.inputs.model)["all"],
            "effective_batch_size": self.page.batch_size,
            "accumulation_steps": accumulation_steps(
                self.page.batch_size, self.page.micro_batch_size, row_shards(self.inputs.mesh)
            ),
            "skipped_steps": sum(not math.isfinite(record["loss"] or math.nan) for record in records),
            "data": dict(self.inputs.dataset.facts),
            "wall_seconds": self.wall_seconds(),
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
            "save_hold_up_seconds": max(self.save_seconds, default=None),
            "device_kind": self.inputs.mesh.devices.flat[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "versions": metrics.versions(),
        }
