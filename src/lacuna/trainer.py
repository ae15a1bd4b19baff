"""Training: the state, the optimizer step, a run's directory, log and saves, and the loop of pretrain and sft."""

import fcntl
import hashlib
import math
import os
import secrets
import shutil
import socket
import time
import tomllib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
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

from lacuna import checkpoint, metrics
from lacuna.checkpoint import Manifest, OpenedModel, RunFacts, Saver
from lacuna.config import (
    GrpoConfig,
    PretrainConfig,
    RowsConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    accumulation_steps,
    to_toml,
)
from lacuna.data import Batch, Dataset, StreamRows, coloured, describe, load_dataset
from lacuna.distributed import (
    Stop,
    check_same,
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
)
from lacuna.tokenizer import Tokenizer, decode

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.95, 1e-8  # Brown et al. 2020, as Llama after it
FINAL_LEARNING_RATE = 0.1  # of the peak


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


def recipe_of(config: TrainingConfig, steps: int) -> Recipe:
    """The recipe of a run of `steps` steps."""
    numbers = [
        config.learning_rate,
        config.warmup_steps,
        steps,
        config.weight_decay,
        config.clip_norm,
        noise_alpha(config),
    ]
    return Recipe(*map(jnp.asarray, numbers), jax.random.key(config.seed))


def noise_alpha(config: TrainingConfig) -> float:
    """Strength of the noise on embeddings, which pretraining does without."""
    return config.neftune_alpha if isinstance(config, SftConfig) else 0.0


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
    params: PyTree[Array], batch: Batch, step: Int[Array, ""], recipe: Recipe, model: ModelConfig, config: RowsConfig
) -> tuple[Float[Array, ""], PyTree[Array]]:
    """Mean loss over the target tokens of all micro-batches [micro_batch, row, token], and its float32 gradient.

    Sums are divided once, by the number of targets of the whole batch, so each token weighs the same wherever it lies.
    """
    compute = cast(params, model, config.compute_dtype)
    key = jax.random.fold_in(recipe.noise_key, step)

    def accumulate(total: PyTree, micro: tuple[Batch, Array]) -> tuple[PyTree, None]:
        batch, number = micro
        first_row = number * batch.token.shape[0]
        has_noise = noise_alpha(config) > 0
        noise = partial(embedding_noise, key, batch.segment, first_row, recipe.neftune_alpha) if has_noise else None
        parts = jax.value_and_grad(summed_loss)(compute, batch, model, config.rematerialisation, noise)
        return jax.tree.map(jnp.add, total, parts), None

    zero = (jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    total, _ = jax.lax.scan(accumulate, zero, (batch, jnp.arange(batch.token.shape[0])))
    loss, gradients = jax.tree.map(lambda leaf: leaf / jnp.sum(batch.weight), total)
    return loss, gradients


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, model: ModelConfig, config: RowsConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One AdamW step (Loshchilov & Hutter 2019) on [micro_batch, row, token]."""
    loss, gradients = whole_batch_gradient(state.params, batch, state.step, recipe, model, config)
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


def starting_state(config: TrainingConfig, directory: Path, model: ModelConfig, mesh: Mesh) -> TrainState:
    """Weights as the page wants them, random or loaded, and empty moments, each born on its devices."""
    shardings = state_shardings(model, mesh)
    if config.from_scratch:
        random = jax.jit(lambda key: fresh_state(initial_params(key, model)), out_shardings=shardings)
        return random(jax.random.key(config.seed))
    params = checkpoint.load_params(directory, model, mesh)
    return jax.jit(fresh_state, out_shardings=shardings, donate_argnums=0)(params)


def resumed_state(resumed: tuple[Path, Manifest], model: ModelConfig, mesh: Mesh) -> TrainState:
    """The state in a checkpoint, on the devices."""
    return checkpoint.load_checkpoint(*resumed, abstract_state(model, mesh), saved_shapes(model))


LOCK = "lock"
FIXED_ON_RESUME = (
    "model_name", "from_scratch", "data", "sequence_length", "batch_size", "seed", "compute_dtype", "packing",
    "train_on", "chat_template", "template_date", "neftune_alpha", "on_bad_data", "system_prompt", "prompt_template",
    "prompts_per_step", "completions_per_prompt", "max_completion_tokens", "updates_per_rollout", "reward",
)  # fmt: skip
START_ONLY = ("resume", "resume_from", "overwrite", "show")
NAMES_THE_RUN = ("run_name", "output_dir")
COMMAND_OF: dict[type[TrainingConfig], str] = {PretrainConfig: "pretrain", SftConfig: "sft", GrpoConfig: "grpo"}

# Its directory


class Start(NamedTuple):
    """How a run begins: the checkpoint it goes on from, lines for its log, and the time."""

    resumed: tuple[Path, Manifest] | None
    lines: list[str]
    time: float

    @property
    def step(self) -> int:
        """Steps done before."""
        return self.resumed[1].run.step if self.resumed else 0


@contextmanager
def started(config: TrainingConfig) -> Generator[Start]:
    """A run whose directory is held for this job alone, as long as the context or the process lives.

    Raises:
        UserError: another process holds it, or a run that the page does not ask to go on with or to overwrite; or
            the checkpoint that it asks for is not to be had.
    """
    began, lines = time.perf_counter(), list[str]()
    with claimed_run(config) if is_first() else nullcontext():
        yield Start(checkpoint_to_resume(config, lines.append), lines, began)


@contextmanager
def claimed_run(config: TrainingConfig) -> Generator[None]:
    """Hold a run's directory as `started` does."""
    directory = config.run_directory
    try:
        check_free(config)  # before anything is written there, and again when no one else can write
        handle = take_lock(directory)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error
    try:
        check_free(config)
        yield
    finally:
        (directory / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # not empty, as a run that began is
            directory.rmdir()


def take_lock(directory: Path) -> int:
    """The open, locked file of a run's lock, with this process's number and host in it."""
    path = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 1000).decode() or "another process"
            os.close(handle)
            raise UserError(f"{directory}: {holder} is at this run; wait for it, or choose another run_name") from error
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            break
        os.close(handle)  # its holder removed the file on leaving, just before it was locked here
    with suppress(OSError):  # a full disk takes no name, but the lock holds
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def check_free(config: TrainingConfig) -> None:
    """Refuse to begin a run where one is, or to overwrite what is no run or is needed by the new one."""
    directory = config.run_directory
    if not directory.exists() or all(path.name == LOCK for path in directory.iterdir()):
        return
    if not (directory / "config.toml").exists() and not checkpoint.saved_steps(directory):
        raise UserError(f"{directory} holds files that are no run of ours; choose another run_name or output_dir")
    if config.resume or (config.resume_from and Path(config.resume_from).resolve().is_relative_to(directory.resolve())):
        return
    log = directory / "metrics.jsonl"
    if not config.overwrite:
        if checkpoint.saved_steps(directory) or (log.exists() and log.stat().st_size):
            instead = "replace --resume-from by" if config.resume_from else "add"
            raise UserError(
                f"{directory} holds a run already; {instead} --resume to go on with it, --overwrite to delete it"
            )
        return
    needed = [config.model_name, *(source.path for source in (*config.data, *config.eval_data))]
    if inside := [path for path in needed if Path(path).resolve().is_relative_to(directory.resolve())]:
        raise UserError(f"--overwrite would delete {inside[0]}, which this run reads; give it another run_name")


def checkpoint_to_resume(config: TrainingConfig, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint that the page asks to go on from, the same for all processes; none for a new run.

    Raises:
        UserError: the given checkpoint or all of this run's are damaged, or a fixed key was changed.
    """
    chosen = config.resume_from
    if is_first() and chosen:
        checkpoint.read_manifest(Path(chosen))
    elif is_first() and config.resume:
        found = checkpoint.newest_good(config.run_directory, say)
        chosen = str(found[0]) if found else ""
        if not found and (config.run_directory / "summary.json").exists():
            raise UserError(
                f"{config.run_directory} holds a run whose checkpoints are gone; to begin anew would replace it, so "
                "choose another run_name, or --overwrite in place of --resume to delete it"
            )
    chosen = from_first("checkpoint to resume", chosen)
    if not chosen:
        if config.resume:
            say("no checkpoint to resume from yet, so this begins at the beginning")
        return None
    manifest = checkpoint.read_manifest(Path(chosen), is_hashed=False)
    saved, now = manifest.run.config, masked_config(config)
    if changed := [key for key in FIXED_ON_RESUME if saved.get(key) != now.get(key)]:
        differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed)
        free = ", ".join(
            key for key in type(config).model_fields if key not in (*FIXED_ON_RESUME, *START_ONLY, *NAMES_THE_RUN)
        )
        raise UserError(f"{chosen}: a run can't change this when it resumes: {differences}. It may change: {free}")
    say(f"resuming from {chosen}")
    return Path(chosen), manifest


def check_unchanged(config: TrainingConfig, model: ModelConfig, digests: tuple[str, ...], start: Start) -> None:
    """Refuse to resume on a model or data that were changed in the meantime."""
    if not start.resumed:
        return
    manifest = start.resumed[1]
    for key, now in model_facts(model).items():
        if now != (saved := manifest.run.model.get(key)):
            raise UserError(f"{config.model_name}: {key} in config.json was {saved!r} and is {now!r}; restore it")
    for source, now, saved in zip(config.data, digests, manifest.run.data, strict=True):
        if now != saved:
            raise UserError(f"{source.path}: its content has changed since the checkpoint; restore it, or start anew")


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """The model as plain values, without what depends on the devices."""
    return {key: value for key, value in asdict(model).items() if key not in ("padded_vocabulary", "attention")}


def data_digests(dataset: Dataset) -> tuple[str, ...]:
    """A hash of each source's encoded documents."""
    return tuple(documents.facts["digest"] for documents in dataset.documents)


def masked_config(config: TrainingConfig) -> dict[str, Any]:
    """The page as plain values, secrets masked."""
    return tomllib.loads(to_toml(config))


def begin_run(config: TrainingConfig, first_step: int, say: Callable[[str], None]) -> None:
    """Clear the claimed directory as the page says, set aside what the run goes on without, write down the config."""
    directory = config.run_directory
    try:
        if config.overwrite:
            for path in sorted(
                directory.iterdir(), key=lambda path: path.name == "config.toml"
            ):  # last: it names a run
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        for path in checkpoint.set_aside_later(directory, first_step):
            say(f"set aside as {path}: it is newer than the checkpoint this goes on from")
        (directory / "config.toml").write_text(to_toml(config, without=START_ONLY))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error


# The run


@dataclass(frozen=True)
class Run:
    """A run under way: what its loop logs to, saves with and ends by."""

    config: TrainingConfig
    opened: OpenedModel
    digests: tuple[str, ...]
    steps: int
    log: RunLog
    saver: Saver
    start: Start

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far, that before it was resumed included."""
        earlier = self.start.resumed[1].run.wall_seconds if self.start.resumed else 0.0
        return earlier + time.perf_counter() - self.start.time

    @contextmanager
    def watched(self, finished: Callable[[], int | None]) -> Generator[Stop]:
        """Around the loop: a signal asks it to stop, a watchdog looks at `finished`, a save under way may end."""
        stop, log_file = Stop(), self.config.run_directory / "run.log"
        with stop.listening(self.log.info), watchdog(finished, log_file), self.saver.finishing():
            yield stop

    def save(self, state: TrainState, step: int, best: float | None, is_best: bool) -> float:
        """Begin to save the checkpoint of a step; the seconds for which this held up the caller."""
        self.log.sync()
        facts = RunFacts(
            step=step,
            best=best,
            wall_seconds=self.seconds,
            config=masked_config(self.config),
            model=model_facts(self.opened.model),
            data=self.digests,
            versions=metrics.versions(),
        )
        return self.saver.save(state, saved_shapes(self.opened.model), facts, is_best)

    def tell_saved(self) -> None:
        """Log the saves that have ended meanwhile."""
        for line in self.saver.news():
            self.log.info(line)

    def wait_for_save(self) -> None:
        """Wait for the last save, and say how it ended.

        Raises:
            UserError: it failed.
        """
        self.saver.wait()
        self.tell_saved()
        if self.saver.failures:
            raise UserError("the last step is not saved; make room and go on with --resume")

    def end(
        self,
        step: int,
        more_facts: Callable[[list[dict[str, Any]]], dict[str, Any]],
        write_report: Callable[[Path], None] | None = None,
    ) -> None:
        """Write what a run leaves behind: summary, with what the loop knows of the logged steps, report, and the model
        if all steps are done."""
        if is_first():
            try:
                self.leave_behind(step, more_facts, write_report)
            except OSError as error:
                why = checkpoint.describe_error(error)
                raise UserError(
                    f"{self.config.run_directory}: {why}; all steps are saved: make room and add --resume"
                ) from error
        from_first("run ended", "")  # the others wait here for what the first process writes

    def leave_behind(
        self,
        step: int,
        more_facts: Callable[[list[dict[str, Any]]], dict[str, Any]],
        write_report: Callable[[Path], None] | None,
    ) -> None:
        """The files of `end`."""
        directory, command = self.config.run_directory, COMMAND_OF[type(self.config)]
        records = metrics.read_json_lines(directory / "metrics.jsonl")
        facts = metrics.summarise(records) | {
            "command": command,
            "parameters": parameter_counts(self.opened.model)["all"],
            "wall_seconds": self.seconds,
            "device_kind": self.opened.mesh.devices.flat[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "versions": metrics.versions(),
        }
        metrics.write_summary(directory, facts | more_facts(records))
        if write_report:
            write_report(directory)
        if step < self.steps:
            again = f"{command} @ {directory / 'config.toml'} --resume"
            self.log.info(f"stopped after step {step} of {self.steps}, all saved; to go on: uv run {again}")
        else:
            template = self.config.chat_template if isinstance(self.config, SftConfig | GrpoConfig) else ""
            assert self.saver.newest
            with ExitStack() as stack:
                params = checkpoint.saved_params(self.saver.newest, self.opened.model, stack)
                checkpoint.save_model(directory / "model", params, self.opened.model, self.opened.source, template)
            self.log.info(f"model in Hugging Face layout: {directory / 'model'}")
        if write_report:
            self.log.info(f"report: {directory / 'report.html'}")


@contextmanager
def under_way(
    config: TrainingConfig,
    start: Start,
    opened: OpenedModel,
    digests: tuple[str, ...],
    steps: int,
    lines: Iterable[str],
) -> Generator[Run]:
    """A run that has started, its log begun with the model, the devices, these lines and those of the start.

    Raises:
        UserError: the directory has no room for it.
    """
    directory, session = config.run_directory, from_first("session", secrets.token_hex(4))
    told = [*model_lines(config, opened), *lines, *start.lines]
    if is_first():
        begin_run(config, start.step, told.append)
    try:
        log = RunLog(directory, steps, config.log_every, start.step, config.wandb, masked_config(config), is_first())
    except OSError as error:
        raise UserError(f"{directory}: {checkpoint.describe_error(error)}; make room and start again") from error
    with log:
        for line in told:
            log.info(line)
        saver = Saver(directory, config.keep, session)
        saver.newest = start.resumed[0] if start.resumed else None
        yield Run(config, opened, digests, steps, log, saver, start)


def model_lines(config: TrainingConfig, opened: OpenedModel) -> Iterator[str]:
    """Start-up lines on the model and the devices."""
    _, model, _, mesh, attention_line = opened
    counts = parameter_counts(model)
    yield (
        f"model: {config.model_name} ({model.family}), {counts['all']:,} parameters, "
        f"{counts['decayed']:,} with weight decay and {counts['all'] - counts['decayed']:,} without"
    )
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    yield f"devices: {mesh.size} × {kind}{processes}, mesh {shape}, compute in {config.compute_dtype}"
    yield attention_line
    if flags := os.environ.get("XLA_FLAGS"):
        yield f"XLA_FLAGS: {flags}"
    if config.compilation_cache:
        yield f"compiled programs are kept in {config.cache_dir / 'programs'}"


SKIPS_IN_A_ROW = 5

# The run


class RowInputs(NamedTuple):
    """What a run reads before it computes; the model has its vocabulary padded for the mesh."""

    opened: OpenedModel
    dataset: Dataset


class Evaluation(NamedTuple):
    """What a loop measures now and then: lines for its log, a digest of what is asked, and the measure itself."""

    lines: list[str]
    digest: str
    measure: Callable[[PyTree[Array], Any], dict[str, Any]]


def run_training(
    config: RowsConfig,
    prepare_evaluation: Callable[[RowsConfig, OpenedModel], Evaluation] | None = None,
    write_report: Callable[[Path], None] | None = None,
) -> "tuple[RowLoop, TrainState] | None":
    """The commands pretrain and sft, from page to exported model; the loop and the state it ended with, if it ran.

    Raises:
        UserError: whatever about config, model, data or devices can't be trained with.
    """
    if isinstance(config, SftConfig) and config.show:
        inputs = read_row_inputs(config)
        show_rows(inputs.dataset, inputs.opened.tokenizer, config.show)
        return None
    with started(config) as start:
        inputs = read_row_inputs(config)
        evaluation = None
        if prepare_evaluation and config.has_evaluation:
            evaluation = prepare_evaluation(config, inputs.opened)
        check_unchanged(config, inputs.opened.model, data_digests(inputs.dataset), start)
        check_same("config, model or data", inputs_fingerprint(config, inputs, evaluation))
        enable_compilation_cache(config)
        with jax.set_mesh(inputs.opened.mesh):
            return train_rows(config, inputs, start, evaluation, write_report)


def read_row_inputs(config: RowsConfig) -> RowInputs:
    """Devices, model config, tokenizer and data of a page, each checked against the others."""
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    accumulation_steps(config.batch_size, config.micro_batch_size, row_shards(mesh))
    template = [config.chat_template, config.template_date] if isinstance(config, SftConfig) else []
    opened = checkpoint.open_model(config, mesh, *template, with_weights=False)
    check_sequence_length(opened.model, config.sequence_length)
    dataset = load_dataset(
        config.data, opened.tokenizer, config, is_stream=isinstance(config, PretrainConfig), is_shuffled=True
    )
    return RowInputs(opened, dataset)


def inputs_fingerprint(config: RowsConfig, inputs: RowInputs, evaluation: Evaluation | None) -> str:
    """A hash of all that the processes of a job must have in common."""
    data = [data_digests(inputs.dataset), evaluation.digest if evaluation else ""]
    first_rows = inputs.dataset.batch(0, config.batch_size)
    parts = repr((masked_config(config), inputs.opened.model, data)), *(leaf.tobytes() for leaf in first_rows)
    return hashlib.sha256(b"".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()


def train_rows(
    config: RowsConfig,
    inputs: RowInputs,
    start: Start,
    evaluation: Evaluation | None,
    write_report: Callable[[Path], None] | None,
) -> "tuple[RowLoop, TrainState]":
    """A run that has started and whose data are read."""
    (_, model, _, mesh, _), dataset = inputs
    source = checkpoint.resolve_model(config.model_name, with_weights=not (start.resumed or config.from_scratch))
    if start.resumed:
        state = resumed_state(start.resumed, model, mesh)
    else:
        state = starting_state(config, source, model, mesh)
    row_limit = None if config.steps else dataset.rows.row_count(config.epochs)
    steps = config.steps or -(-dataset.rows.row_count(config.epochs) // config.batch_size)
    digests, lines = data_digests(dataset), row_lines(config, inputs, steps, evaluation)
    with under_way(config, start, inputs.opened._replace(source=source), digests, steps, lines) as run:
        recipe = jax.device_put(recipe_of(config, steps), NamedSharding(mesh, PartitionSpec()))
        loop = RowLoop(config, inputs, run, row_limit, recipe, evaluation)
        if start.resumed and (config.run_directory / "best").exists():
            loop.best_eval_loss = start.resumed[1].run.best
        state = loop.train(state)
        run.end(loop.step, loop.summary, write_report)
    return loop, state


def show_rows(dataset: Dataset, tokenizer: Tokenizer, count: int) -> None:
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


def row_lines(config: RowsConfig, inputs: RowInputs, steps: int, evaluation: Evaluation | None) -> Iterator[str]:
    """Start-up lines on batch arithmetic and data."""
    shards, dataset = row_shards(inputs.opened.mesh), inputs.dataset
    accumulation = accumulation_steps(config.batch_size, config.micro_batch_size, shards)
    yield (
        f"batch: {config.batch_size} rows × {config.sequence_length} tokens = {config.micro_batch_size} a forward pass × "
        f"{shards} data-parallel devices × {accumulation} accumulated; {steps:,} steps"
    )
    yield f"data: {describe(dataset.facts)}; {fill(dataset)}"
    yield from left_out(dataset)
    if evaluation:
        yield from evaluation.lines


def fill(dataset: Dataset) -> str:
    """Rows of an epoch and the share of their slots that hold a token."""
    rows = dataset.rows.row_count(1)
    if isinstance(dataset.rows, StreamRows):
        return f"{rows:,} full rows an epoch"
    share = dataset.rows.slot_count(0) / (rows * dataset.rows.length)
    return f"{rows:,} rows an epoch, {share:.2%} of their slots filled"


@dataclass
class RowLoop:
    """The training loop and what it keeps at hand; `step` counts the steps done."""

    config: RowsConfig
    inputs: RowInputs
    run: Run
    row_limit: int | None
    recipe: Recipe
    evaluation: Evaluation | None = None
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
        config, self.step = self.config, int(state.step)
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
                if self.step % config.log_every == 0:
                    self.flush(leave=1)
                is_eval = is_last or (config.eval_every and self.step % config.eval_every == 0)
                is_best = bool(is_eval) and self.evaluate(state)
                is_stop = stop.is_due(self.step)
                is_save = is_last or is_best or is_stop or (config.save_every and self.step % config.save_every == 0)
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
        (_, model, _, mesh, _), dataset = self.inputs
        batch = dataset.batch(index, self.config.batch_size, self.row_limit)
        lengths = np.array(
            [count for row in batch.segment for count in np.bincount(row, minlength=2)[1:] if count], np.int64
        )
        record = {
            "step": index + 1,
            "epoch": round(dataset.rows.epoch_of((index + 1) * self.config.batch_size), 4),
            "tokens": int(lengths.sum()),
            "target_tokens": int(batch.weight.sum()),
            "packing_efficiency": float(lengths.sum() / batch.token.size),
            "flops": metrics.step_flops(
                parameter_counts(model)["matmul"],
                model.kv_heads * model.group * model.head,
                model.layers,
                lengths,
            ),
        }
        accumulation = accumulation_steps(self.config.batch_size, self.config.micro_batch_size, row_shards(mesh))
        split = jax.tree.map(lambda leaf: leaf.reshape(accumulation, -1, leaf.shape[1]), batch)
        return put_batch(split, mesh), record

    def program(self, state: TrainState, batch: Batch) -> Any:
        """The compiled step for rows of this length."""
        length = batch.token.shape[-1]
        if length not in self.programs:
            began = time.perf_counter()
            step = jax.jit(
                partial(train_step, model=self.inputs.opened.model, config=self.config), donate_argnames="state"
            )
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
        mesh = self.inputs.opened.mesh
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
        first = (step - 1) * self.config.batch_size
        begin = decode(self.inputs.opened.tokenizer, self.inputs.dataset.batch(first, 1).token[0][:24].tolist())
        what = (
            f"step {step}: the loss or gradient is not finite, so weights and optimizer stay as they were; its data "
            f"are rows {first + 1} to {first + self.config.batch_size}, beginning {begin!r}"
        )
        if in_a_row >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{what}; {in_a_row} steps in a row: lower learning_rate, or look at these data with --show"
            )
        self.run.log.info(f"{what} ({in_a_row} in a row)")

    def evaluate(self, state: TrainState) -> bool:
        """Held-out loss, samples and tasks into the log line of the last step; whether the loss is the best so far."""
        jax.block_until_ready(self.pending[-1][1])
        began = time.perf_counter()
        figures = self.evaluation.measure(state.params, self) if self.evaluation else {}
        self.pending[-1][0].update(figures)
        self.clock += time.perf_counter() - began
        loss = figures.get("eval_loss")
        is_best = loss is not None and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if is_best:
            self.best_eval_loss = loss
        return is_best

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
        config, shards = self.config, row_shards(self.inputs.opened.mesh)
        return {
            "effective_batch_size": config.batch_size,
            "accumulation_steps": accumulation_steps(config.batch_size, config.micro_batch_size, shards),
            "skipped_steps": sum(not math.isfinite(record["loss"] or math.nan) for record in records),
            "data": dict(self.inputs.dataset.facts),
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
            "save_hold_up_seconds": max(self.save_seconds, default=None),
        }
