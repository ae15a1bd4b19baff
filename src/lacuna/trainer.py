"""Training: a run's directory and saves, the loop, and the commands pretrain and sft.

`Run.train` is the whole loop; grpo uses it with its own steps.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import time
import tomllib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from lacuna import checkpoint, metrics, weights
from lacuna.checkpoint import Manifest, OpenedModel, RunFacts, Saver, open_model
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
from lacuna.data import Batch, batch_facts
from lacuna.distributed import (
    LOCK,
    Stop,
    Watchdog,
    are_ready,
    check_same,
    enable_compilation_cache,
    from_first,
    held_directory,
    is_first,
    make_mesh,
    put_batch,
    repeated,
    row_shards,
    writing_to,
)
from lacuna.linear import Words
from lacuna.metrics import RunLog, byte_size
from lacuna.model import ModelConfig, check_trainable, joined, parameter_counts
from lacuna.optimizer import (
    RowLoss,
    TrainState,
    everywhere,
    recipe_of,
    saved_shapes,
    saved_state,
    starting_state,
    train_step,
)
from lacuna.streaming import RowData, load_rows
from lacuna.tokenizer import changed_files, decode, ends_in_words, read_json

SKIPS_IN_A_ROW = 5

# The directory of a run

FIXED_ON_RESUME = (
    "model_name", "base_bits", "from_scratch", "data", "sequence_length", "batch_size", "seed", "compute_dtype",
    "packing", "train_on", "chat_template", "template_date", "template_variables", "neftune_alpha", "on_bad_data",
    "train_only", "lora_rank", "lora_alpha", "lora_targets", "lora_scaling", "system_prompt", "prompt_template",
    "prompts_per_step", "completions_per_prompt", "max_completion_tokens", "updates_per_rollout", "reward",
    "environment", "max_turns",
)  # fmt: skip
START_ONLY = ("resume", "resume_from", "overwrite", "show")
COMMAND_OF: dict[type[TrainingConfig], str] = {PretrainConfig: "pretrain", SftConfig: "sft", GrpoConfig: "grpo"}


def check_free(config: TrainingConfig) -> None:
    """Refuse to begin in a directory, held by now, with what the config does not ask to resume or to overwrite.

    | in the directory  | neither | resume, or resume_from in it | overwrite                      |
    |-------------------|---------|------------------------------|--------------------------------|
    | nothing           | begin   | begin                        | begin                          |
    | files of others   | refuse  | refuse                       | refuse                         |
    | a run             | refuse  | resume                       | delete, unless inputs lie in it |
    """
    directory = config.run_directory
    if all(path.name in (LOCK, "config.toml.tmp") for path in directory.iterdir()):
        return
    steps, log = checkpoint.saved_steps(directory), directory / "metrics.jsonl"
    if not steps and not (directory / "config.toml").exists():
        raise UserError(f"{directory} holds files that are no run of ours; choose another run_name or output_dir")
    if config.resume or (config.resume_from and Path(config.resume_from).resolve().is_relative_to(directory.resolve())):
        return
    if config.overwrite:
        needed = [config.model_name, *(source.path for source in (*config.data, *config.eval_data))]
        needed += [path for path in (template_of(config), config.eval_config) if path]
        if inside := [path for path in needed if Path(path).resolve().is_relative_to(directory.resolve())]:
            raise UserError(f"--overwrite would delete {inside[0]}, which this run reads; give it another run_name")
    elif steps or (log.exists() and log.stat().st_size):
        instead = "replace --resume-from by" if config.resume_from else "add"
        raise UserError(f"{directory} holds a run already; {instead} --resume to continue it, --overwrite to delete it")


def checkpoint_to_resume(config: TrainingConfig, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint that the config asks to resume from, the same for all processes; None for a new run."""
    chosen = config.resume_from
    if is_first():
        check_free(config)
    if is_first() and chosen:
        checkpoint.checked_manifest(Path(chosen))
    elif is_first() and config.resume:
        found = checkpoint.newest_good(config.run_directory, say)
        chosen = str(found[0]) if found else ""
        if not found and (config.run_directory / "summary.json").exists():
            raise UserError(
                f"{config.run_directory} holds a run whose checkpoints are gone; choose another run_name, or replace "
                "--resume by --overwrite to delete it and start from scratch"
            )
    chosen = from_first("checkpoint to resume", chosen)
    if not chosen:
        if config.resume:
            say("no checkpoint to resume from yet, so this run starts from step 0")
        return None
    manifest = checkpoint.read_manifest(Path(chosen))
    saved, now = manifest.run.config, masked_config(config)
    if changed := [key for key in FIXED_ON_RESUME if saved.get(key) != now.get(key)]:
        differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise UserError(
            f"{chosen}: {differences}, which a run can't change when it resumes; leave that as it was, or begin "
            "another run by --run-name"
        )
    say(f"resuming from {chosen}")
    return Path(chosen), manifest


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """The model as plain values, without what depends on the devices."""
    kept = {key: value for key, value in asdict(model).items() if key not in ("padded_vocabulary", "attention")}
    return json.loads(json.dumps(kept))


def masked_config(config: TrainingConfig) -> dict[str, Any]:
    """The config as plain values, secrets masked."""
    return tomllib.loads(to_toml(config))


def template_of(config: TrainingConfig) -> str:
    """The file of the chat template that replaces the model's own, if any."""
    return config.chat_template if isinstance(config, SftConfig | GrpoConfig) else ""


def prepare_directory(config: TrainingConfig, opened: OpenedModel, first_step: int, say: Callable[[str], None]) -> None:
    """Delete what --overwrite replaces, rename checkpoints newer than the one resumed, and write config.toml.

    What the model has besides weights is kept for the export, whatever becomes of it while the run trains.
    """
    directory = config.run_directory
    if config.overwrite:
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.toml"):  # last: it names a run
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    for path in checkpoint.set_aside_later(directory, first_step):
        say(f"set aside as {path}: it is newer than the checkpoint this run resumes from")
    metrics.write_atomically(directory / "config.toml", to_toml(config, without=START_ONLY))
    if first_step == 0 or not (directory / checkpoint.SOURCE).is_dir():
        scratch = directory / f"{checkpoint.SOURCE}.tmp"
        changed = changed_files(opened.tokenizer, template_of(config))
        if opened.model.is_adapter:
            changed[weights.ADAPTER] = weights.adapter_config(opened.model, opened.place.base_name)
        checkpoint.copy_description(opened.tokenizer.directory, opened.place.described, scratch, opened.model, changed)
        checkpoint.replace_directory(scratch, directory / checkpoint.SOURCE)


# The run


class Evaluation(NamedTuple):
    """What a loop measures now and then: lines for its log, a digest of what is asked, and the measure itself, which
    takes parameters and the run's watchdog. Of its figures `eval_loss` or `eval_reward` says which model is best."""

    lines: list[str]
    digest: str
    measure: Callable[[PyTree[Array], Watchdog], dict[str, Any]]


Step = tuple[TrainState, dict[str, Any], dict[str, Array]]


class Run:
    """A run that trains, in a directory that is held for it: what its loop logs to, saves with and ends by; `step`
    counts the steps done.

    Raises:
        UserError: a run lies there that the config neither resumes nor overwrites; or the checkpoint to resume from is
            damaged, or was made with another fixed key.
    """

    def __init__(self, config: TrainingConfig, write_report: Callable[[Path], None]) -> None:
        self.config, self.write_report = config, write_report
        self.began = self.clock = time.perf_counter()
        self.lines = list[str]()
        self.resumed = checkpoint_to_resume(config, self.lines.append)
        self.step, self.worse = (self.resumed[1].run.step, self.resumed[1].run.worse) if self.resumed else (0, 0)
        self.inputs = dict[str, str]()  # hashes of what else is read again when the run resumes
        self.place = self.resumed[1].run.place if self.resumed else {}  # of streamed data, at `step`
        self.compile_seconds, self.save_seconds = 0.0, list[float]()
        self.first_step_seconds: float | None = None

    def check_unchanged(self, opened: OpenedModel, digests: tuple[str, ...]) -> None:
        """Refuse to resume on a model or data that changed in the meantime."""
        if not self.resumed:
            return
        name, before = self.config.model_name, self.resumed[1].run
        facts = model_facts(opened.model)
        for key, saved in before.model.items():
            if saved != (now := facts.get(key)):
                raise UserError(f"{name}: {key} in config.json was {saved!r} and is {now!r}; restore it")
        paths = [source.path for source in self.config.data]
        pairs = [*zip(paths, digests, before.data, strict=True)]
        for name, now in self.inputs.items():
            label = f"{opened.base}, the weights under the adapter" if name == checkpoint.BASE else name
            pairs.append((label, now, before.inputs.get(name, now)))
        for name, now, saved in pairs:
            if now != saved:
                raise UserError(f"{name}: its content has changed since the checkpoint; restore it, or start again")

    @contextmanager
    def begun(
        self, opened: OpenedModel, digests: tuple[str, ...], steps: int, lines: Iterable[str], read: str = ""
    ) -> Generator[TrainState]:
        """The state to begin with, of the checkpoint or new, on the mesh and with the log open, which begins with the
        model, the devices, these lines and those of the start.

        Raises:
            UserError: config, model or data, of which `read` is more that can be compared, differ between processes;
                model or data changed since the checkpoint; or the directory has no room for the log.
        """
        config, directory = self.config, self.config.run_directory
        check_same("config, model or data", repr((masked_config(config), opened.model, digests, read)))
        if opened.base and is_first():
            self.inputs |= {checkpoint.BASE: weights.files_digest(weights.weight_files(opened.base))}
        self.check_unchanged(opened, digests)
        enable_compilation_cache(config)
        self.opened, self.digests, self.steps = opened, digests, self.step if self.is_out_of_patience else steps
        self.watchdog = Watchdog(directory / "run.log")
        newest, manifest = self.resumed or (None, None)
        best = manifest.run.best if manifest and checkpoint.best_checkpoint(directory).is_dir() else None
        self.saver = Saver(directory, config.keep, from_first("session", secrets.token_hex(4)), newest, best)
        lines = [*model_lines(config, opened), *lines, *self.lines]
        with jax.set_mesh(opened.mesh):
            self.frozen = checkpoint.frozen_params(opened)
            state = saved_state(*self.resumed, opened) if self.resumed else starting_state(config, opened, self.frozen)
            with writing_to(directory):
                if is_first():
                    prepare_directory(config, opened, self.step, lines.append)
                self.log = RunLog(directory, steps, config.log_every, self.step, config.wandb, masked_config(config))
            with self.log:
                for line in lines:
                    self.log.info(line)
                self.clock = time.perf_counter()
                yield state

    def train(
        self,
        state: TrainState,
        take_step: Callable[[TrainState], Step],
        evaluation: Evaluation | None,
        describe_step: Callable[[int], str],
    ) -> TrainState:
        """Every step that is left: take it, log the one before while it runs, then evaluate and save where due.

        `take_step` returns the new state, the step's record, and figures that are still being computed on the devices;
        `describe_step` says what a step was trained on, where it had no effect.
        """
        config, stop, unlogged = self.config, Stop(), None
        with stop.listening(self.log.info), repeated(self.watchdog.look), self.saver.finishing():
            while self.step < self.steps:
                state, record, figures = take_step(state)
                self.step += 1
                if unlogged:
                    self.log_step(*unlogged, describe_step)
                unlogged = record, figures
                best = None
                is_evaluation = evaluation is not None and self.is_due(config.eval_every, self.step)
                if evaluation and is_evaluation:
                    jax.block_until_ready(figures)
                    with self.off_the_clock():
                        record |= evaluation.measure(self.whole(state.params), self.watchdog)
                        best = self.better_figure(record)
                    self.worse = self.worse + 1 if best is None else 0
                    if self.is_out_of_patience:
                        self.steps = self.step
                        self.log.info(f"nothing better in {self.worse} evaluations in a row, so this step is the last")
                is_stop = stop.is_due(self.step)
                is_save = is_stop or best is not None or self.is_due(config.save_every, self.step)
                if is_save or is_evaluation or not figures:  # without figures the step has ended
                    self.log_step(*unlogged, describe_step)
                    unlogged = None
                if is_save:
                    with self.off_the_clock():
                        self.save(state, best)
                self.saver.report(self.log.info)
                if is_stop:
                    break
            self.watchdog.pause()
            self.saver.wait()
            self.saver.report(self.log.info)
        if self.saver.failures:
            raise UserError("the last step is not saved; make room and continue with --resume")
        return state

    def whole(self, params: PyTree[Array]) -> PyTree[Array]:
        """All weights to compute with: those that train, on those that do not."""
        return joined(self.frozen, params, self.opened.model)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations in a row were not better that the run ends."""
        return 0 < self.config.patience <= self.worse

    def is_due(self, every: int, step: int) -> bool:
        """Whether what comes `every` so many steps, 0 only at the end, comes after this step."""
        return step == self.steps or (every > 0 and step % every == 0)

    def better_figure(self, figures: dict[str, Any]) -> float | None:
        """The held-out loss or reward, if lower or higher than that of every state that is saved; waits for a save
        under way, which could be of a better one."""
        sign, value = (1, figures.get("eval_reward")) if "eval_reward" in figures else (-1, figures.get("eval_loss"))

        def is_better() -> bool:
            return value is not None and (self.saver.best is None or sign * value > sign * self.saver.best)

        if is_better():
            self.saver.wait()
        return value if is_better() else None

    @contextmanager
    def off_the_clock(self) -> Generator[None]:
        """For work that is no part of a step: `step_seconds` leaves it out, and the watchdog pauses."""
        began = time.perf_counter()
        self.watchdog.pause()
        yield
        self.watchdog.report_progress()
        self.clock += time.perf_counter() - began

    def log_step(self, record: dict[str, Any], figures: dict[str, Array], describe_step: Callable[[int], str]) -> None:
        """Wait for a step and log it; its seconds are those since the end of the step before, off the clock ones apart.

        Raises:
            UserError: the gradient was not finite for five steps in a row.
        """
        record |= {name: value.item() for name, value in jax.device_get(figures).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.first_step_seconds = self.first_step_seconds or now - self.began
        self.watchdog.report_progress()
        skipped, flops = record.pop("skipped", 0), record.get("flops")
        peak = metrics.peak_flops(self.opened.mesh.devices.flat[0].device_kind)
        record |= {
            "step_seconds": seconds,
            "tokens_per_second": record.get("completion_tokens", record["tokens"]) / seconds,
            "target_tokens_per_second": record["target_tokens"] / seconds,
            "mfu": flops / seconds / (peak * self.opened.mesh.size) if flops and peak else None,
            "memory_bytes": metrics.memory_bytes(),
        }
        self.log.step(record)
        if skipped:
            what = (
                f"step {record['step']}: the loss or gradient is not finite, so weights and optimizer stay as they "
                f"were; {describe_step(record['step'])}"
            )
            if skipped >= SKIPS_IN_A_ROW:
                raise UserError(f"{what}; {skipped} steps in a row: lower learning_rate, or look at these data")
            self.log.info(f"{what} ({skipped} in a row)")

    def compile(self, function: Any, name: str, *arguments: Any, **named: Any) -> Any:
        """A jitted function compiled for these arguments, off the clock; a line says what it takes."""
        began = time.perf_counter()
        with self.off_the_clock():
            program = function.lower(*arguments, **named).compile()
        seconds, memory = time.perf_counter() - began, program.memory_analysis()
        self.compile_seconds += seconds
        self.log.info(
            f"compiled {name} in {seconds:.1f} s; a device holds {byte_size(memory.argument_size_in_bytes)} of state "
            f"and batch and {byte_size(memory.temp_size_in_bytes)} of temporaries"
        )
        return program

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far, that before it was resumed included."""
        earlier = self.resumed[1].run.wall_seconds if self.resumed else 0.0
        return earlier + time.perf_counter() - self.began

    def save(self, state: TrainState, best: float | None) -> None:
        """Begin to save the checkpoint of this step, whose figure may be the best; training waits only for the copy off
        the devices."""
        self.log.sync()
        facts = RunFacts(
            step=self.step,
            best=best,
            worse=self.worse,
            wall_seconds=self.seconds,
            config=masked_config(self.config),
            model=model_facts(self.opened.model),
            data=self.digests,
            inputs=self.inputs,
            place=self.place,
            versions=metrics.versions(),
        )
        shapes = saved_shapes(self.opened.model)
        self.save_seconds.append(self.saver.save(state, shapes, facts, is_best=best is not None))

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the model if all steps are done, summary.json, with these facts of the loop, and the report."""
        if is_first():
            with writing_to(self.config.run_directory, "all steps are saved: make room and add --resume"):
                self.write_results(facts)
        from_first("run ended", "")  # the others wait here for what the first process writes

    def write_results(self, facts: dict[str, Any]) -> None:
        directory, command, opened = self.config.run_directory, COMMAND_OF[type(self.config)], self.opened
        if is_ended := self.step == self.steps:
            assert self.saver.newest
            best = checkpoint.best_checkpoint(directory)
            chosen = best if self.is_out_of_patience and best.is_dir() else self.saver.newest
            params, model = self.exported(chosen)
            facts_of_base = {name: digest for name, digest in self.inputs.items() if name == checkpoint.BASE}
            facts_of_base |= {checkpoint.BITS: str(model.bits)}
            target, source = directory / "model", directory / checkpoint.SOURCE
            problems = checkpoint.save_model(target, params, model, source, facts_of_base if model.is_adapter else {})
            what = "adapter in PEFT's" if model.is_adapter else "model in Hugging Face"
            self.log.info("; WARNING: ".join([f"{what} layout: {directory / 'model'}", *problems]))
        records = metrics.read_json_lines(directory / "metrics.jsonl")
        skipped = (record.get("skipped_updates", "loss" in record and record["loss"] is None) for record in records)
        summary = metrics.summarise(records) | {
            "skipped_steps": sum(skipped),
            "command": command,
            "parameters": parameter_counts(opened.model)["all"],
            "trained_parameters": parameter_counts(opened.model)["trained"],
            "wall_seconds": self.seconds,
            "device_kind": opened.mesh.devices.flat[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "versions": metrics.versions(),
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
            "save_hold_up_seconds": max(self.save_seconds, default=None),
        }
        metrics.write_summary(directory, summary | facts)
        try:
            self.write_report(directory)
            self.log.info(f"report: {directory / 'report.html'}")
        except Exception as error:  # of whatever draws it; nothing else needs it
            self.log.info(f"WARNING: no report.html ({type(error).__name__}: {error}); all else is written")
        if not is_ended:
            again = f"{command} @ {directory / 'config.toml'} --resume"
            self.log.info(f"stopped after step {self.step} of {self.steps}, all saved; to resume: uv run {again}")

    def exported(self, chosen: Path) -> tuple[PyTree, ModelConfig]:
        """What a checkpoint holds for others: a model, or an adapter; rows that trained alone take their places in the
        base, so that they are a model."""
        model = self.opened.model
        params = checkpoint.saved_params(chosen, model)
        if model.lora or not model.trained_rows:
            return params, model
        self.frozen = None  # makes room
        host = make_mesh(1, 1, 1, jax.local_devices(backend="cpu")[:1])
        whole: Any = jax.tree.map(np.asarray, checkpoint.frozen_params(self.opened._replace(mesh=host)))
        rows = {name: Words(whole[name], params[name], ids) for name, ids in model.trained_rows}
        return whole | rows, weights.base_of(model)


def model_lines(config: TrainingConfig, opened: OpenedModel) -> Iterator[str]:
    """Start-up lines on the model and the devices."""
    counts, mesh = parameter_counts(opened.model), opened.mesh
    decayed = f"{counts['decayed']:,} with weight decay and {counts['trained'] - counts['decayed']:,} without"
    if lora := opened.model.lora:
        bits = f"in {opened.model.bits} bits, " if opened.model.bits else ""
        decayed = f"{bits}frozen; {counts['trained']:,} of adapters train: rank {lora.rank}, scale {lora.scale:g}, on "
        decayed += ", ".join(lora.targets)
    yield f"model: {config.model_name} ({opened.model.family}), {counts['all']:,} parameters, {decayed}"
    if dropout := read_json(stated := opened.place.adapter / weights.ADAPTER).get("lora_dropout"):
        yield f"lora_dropout = {dropout} of {stated} is left out: the adapter trains on without dropout"
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    yield f"devices: {mesh.size} × {kind}{processes}, mesh {shape}, compute in {config.compute_dtype}"
    yield opened.attention_line
    if words := opened.tokenizer.new_words:
        last, rows = opened.tokenizer.vocabulary_size - 1, opened.model.vocabulary_size
        yield f"new words: {len(words):,}, {words[0]} first, the last of them token {last:,} of {rows:,} rows"
    if rows := opened.model.trained_rows:
        ids, beside = rows[0][1], ", beside the adapter" if opened.model.lora else ", and nothing else"
        tables = " and ".join(name for name, _ in rows)
        yield f"of {tables} the rows of {len(ids):,} tokens train, from {min(ids):,} to {max(ids):,}{beside}"
    yield ends_in_words(opened.tokenizer)
    if flags := os.environ.get("XLA_FLAGS"):
        yield f"XLA_FLAGS: {flags}"
    if config.compilation_cache:
        yield f"compiled programs are kept in {config.cache_dir / 'programs'}"


# The commands pretrain and sft


def run_training(
    config: RowsConfig,
    prepare_evaluation: Callable[[RowsConfig, OpenedModel], Evaluation],
    write_report: Callable[[Path], None],
) -> "tuple[RowSteps, TrainState]":
    """The commands pretrain and sft, from config to exported model; its steps and the state it ended with.

    Raises:
        UserError: whatever about config, model, data or devices can't be trained with.
    """
    config = checkpoint.settled(config)
    with held_directory(config.run_directory):
        run = Run(config, write_report)
        needs_weights = bool(config.lora_rank or config.train_only) or not (run.resumed or config.from_scratch)
        opened, dataset = read_inputs(config, needs_weights, run.place)
        steps = config.steps or math.ceil(dataset.row_count(config.epochs) / config.batch_size)
        run.inputs |= {path: metrics.file_hash(Path(path)) for path in [config.new_tokens] if path}
        evaluation = prepare_evaluation(config, opened) if config.has_evaluation else None
        run.check_unchanged(opened, dataset.digests)  # before rows are read, at a place in what may have changed
        rows = hashlib.sha256(b"".join(leaf.tobytes() for leaf in dataset.batch(run.step, config.batch_size)))
        read = rows.hexdigest() + (evaluation.digest if evaluation else "")
        lines = [*row_lines(config, opened.mesh, dataset, steps), *(evaluation.lines if evaluation else [])]
        with run.begun(opened, dataset.digests, steps, lines, read) as state:
            rows = RowSteps(config, run, dataset)
            state = run.train(state, rows.take, evaluation, rows.describe)
            run.finish(rows.facts())
        return rows, state


def read_inputs(config: RowsConfig, with_weights: bool, place: dict[str, Any]) -> tuple[OpenedModel, RowData]:
    """The model and the data of a config, each checked against the other and the devices; streamed data go on at a
    place, or begin where it is empty."""
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    accumulation_steps(config.batch_size, config.micro_batch_size, row_shards(mesh))
    opened = open_model(config, mesh, with_weights=with_weights)
    check_trainable(opened.model, config.sequence_length)
    return opened, load_rows(config, opened.tokenizer, place)


class RowSteps:
    """The steps of pretrain and sft: while one runs on the devices, the next batch is prepared."""

    def __init__(self, config: RowsConfig, run: Run, dataset: RowData) -> None:
        self.config, self.run, self.dataset = config, run, dataset
        self.row_limit = None if config.steps else dataset.row_count(config.epochs)
        self.accumulation = accumulation_steps(config.batch_size, config.micro_batch_size, row_shards(run.opened.mesh))
        self.recipe = jax.device_put(recipe_of(config, run.steps), everywhere(run.opened.mesh))
        has_noise = isinstance(config, SftConfig) and config.neftune_alpha > 0
        self.loss = RowLoss(config.compute_dtype, config.rematerialisation, has_noise)
        self.ready: tuple[Batch, dict[str, Any]] | None = None
        self.programs, self.running = dict[int, Any](), dict[str, Array]()
        self.reported_count = 0  # of bad rows

    def take(self, state: TrainState) -> Step:
        """Dispatch a step, and prepare the batch of the next one while it runs."""
        batch, record = self.ready or self.prepare(self.run.step)
        arguments = state, batch, np.float32(record["target_tokens"]), self.recipe
        if (length := batch.token.shape[-1]) not in self.programs:
            static = {"model": self.run.opened.model, "loss": self.loss}
            name = f"the step for rows of {length} tokens"
            jax.block_until_ready(self.running)  # its seconds are its own, and those of compiling no step's
            self.programs[length] = self.run.compile(train_step, name, *arguments, **static, frozen=self.run.frozen)
        state, self.running = self.programs[length](*arguments, frozen=self.run.frozen)
        self.run.place = self.dataset.place(record["step"] * self.config.batch_size)
        self.ready = self.prepare(record["step"]) if record["step"] < self.run.steps else None
        return state, record, self.running

    def prepare(self, index: int) -> tuple[Batch, dict[str, Any]]:
        """Batch `index` on the devices, as [micro_batch, row, token], and what its log line knows beforehand."""
        began, model = time.perf_counter(), self.run.opened.model
        with self.run.watchdog.waiting(self.dataset.progress):
            batch = self.dataset.batch(index, self.config.batch_size, self.row_limit)
        counts = parameter_counts(model)
        facts, lengths = batch_facts(batch)
        record = facts | {
            "step": index + 1,
            "epoch": round(self.dataset.epochs_before((index + 1) * self.config.batch_size), 4),
            "flops": metrics.step_flops(
                counts["matmul"],
                counts["trained_matmul"],
                model.kv_heads * model.group * model.head,
                model.layers,
                lengths,
            ),
        }
        split = jax.tree.map(lambda leaf: leaf.reshape(self.accumulation, -1, leaf.shape[1]), batch)
        placed = put_batch(split, self.run.opened.mesh)
        record["input_wait_seconds"] = (time.perf_counter() - began) * are_ready(self.running)  # at most
        for example in self.dataset.bad_examples[self.reported_count :]:
            self.run.log.info(f"left out: {example}")
        self.reported_count = len(self.dataset.bad_examples)
        return placed, record

    def describe(self, step: int) -> str:
        """The rows of a step, for a message."""
        first = (step - 1) * self.config.batch_size
        text = decode(self.run.opened.tokenizer, self.dataset.batch(first, 1).token[0][:24].tolist())
        return f"its data are rows {first + 1} to {first + self.config.batch_size}, beginning {text!r}"

    def facts(self) -> dict[str, Any]:
        """What summary.json holds of rows."""
        return {
            "best_eval_loss": self.run.saver.best,
            "effective_batch_size": self.config.batch_size,
            "accumulation_steps": self.accumulation,
            "data": dict(self.dataset.facts),
        }


def row_lines(config: RowsConfig, mesh: Mesh, dataset: RowData, steps: int) -> Iterator[str]:
    """Start-up lines on batch arithmetic and data."""
    shards = row_shards(mesh)
    accumulation = accumulation_steps(config.batch_size, config.micro_batch_size, shards)
    yield (
        f"batch: {config.batch_size} rows × {config.sequence_length} tokens = {config.micro_batch_size} a forward "
        f"pass × {shards} data-parallel devices × {accumulation} accumulated; {steps:,} steps"
    )
    yield f"data: {dataset.description}"
