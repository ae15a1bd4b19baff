"""A run that trains, whatever it learns by: its directory and who may write to it, what it goes on from, its log and
checkpoints, and what it leaves behind."""

import fcntl
import os
import secrets
import shutil
import socket
import time
import tomllib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lacuna import checkpoint, metrics, report, weights
from lacuna.attention import choose_backend
from lacuna.checkpoint import Manifest, RunFacts, Saver
from lacuna.config import GrpoConfig, PretrainConfig, SftConfig, TrainingConfig, UserError
from lacuna.data import Dataset
from lacuna.distributed import Stop, from_first, is_first, watchdog
from lacuna.metrics import RunLog
from lacuna.model import ModelConfig, parameter_counts
from lacuna.options import to_toml
from lacuna.trainer import TrainState, saved_shapes

LOCK = "lock"
FIXED_ON_RESUME = (
    "model_name", "from_scratch", "data", "sequence_length", "batch_size", "seed", "compute_dtype", "packing",
    "train_on", "chat_template", "template_date", "neftune_alpha", "on_bad_data", "system_prompt", "prompt_template",
    "prompts_per_step", "completions_per_prompt", "max_completion_tokens", "updates_per_rollout", "reward",
)  # fmt: skip
START_ONLY = ("resume", "resume_from", "overwrite", "show")
NAMES_THE_RUN = ("run_name", "output_dir")
COMMANDS: dict[type[TrainingConfig], str] = {PretrainConfig: "pretrain", SftConfig: "sft", GrpoConfig: "grpo"}

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
def started(page: TrainingConfig) -> Generator[Start]:
    """A run whose directory is held for this job alone, as long as the context or the process lives.

    Raises:
        UserError: another process holds it, or a run that the page does not ask to go on with or to overwrite; or
            the checkpoint that it asks for is not to be had.
    """
    began, lines = time.perf_counter(), list[str]()
    with claimed(page) if is_first() else nullcontext():
        yield Start(checkpoint_to_resume(page, lines.append), lines, began)


@contextmanager
def claimed(page: TrainingConfig) -> Generator[None]:
    """Hold a run's directory as `started` does."""
    directory = page.run_directory
    try:
        check_free(page)  # before anything is written there, and again when no one else can write
        handle = take_lock(directory)
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error
    try:
        check_free(page)
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


def check_free(page: TrainingConfig) -> None:
    """Refuse to begin a run where one is, or to overwrite what is no run or is needed by the new one."""
    directory = page.run_directory
    if not directory.exists() or all(path.name == LOCK for path in directory.iterdir()):
        return
    if not (directory / "config.toml").exists() and not checkpoint.saved_steps(directory):
        raise UserError(f"{directory} holds files that are no run of ours; choose another run_name or output_dir")
    if page.resume or (page.resume_from and Path(page.resume_from).resolve().is_relative_to(directory.resolve())):
        return
    log = directory / "metrics.jsonl"
    if not page.overwrite:
        if checkpoint.saved_steps(directory) or (log.exists() and log.stat().st_size):
            instead = "replace --resume-from by" if page.resume_from else "add"
            raise UserError(
                f"{directory} holds a run already; {instead} --resume to go on with it, --overwrite to delete it"
            )
        return
    needed = [page.model_name, *(source.path for source in (*page.data, *page.eval_data))]
    if inside := [path for path in needed if Path(path).resolve().is_relative_to(directory.resolve())]:
        raise UserError(f"--overwrite would delete {inside[0]}, which this run reads; give it another run_name")


def checkpoint_to_resume(page: TrainingConfig, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint that the page asks to go on from, the same for all processes; none for a new run.

    Raises:
        UserError: the given checkpoint or all of this run's are damaged, or a fixed key was changed.
    """
    chosen = page.resume_from
    if is_first() and chosen:
        checkpoint.read_manifest(Path(chosen))
    elif is_first() and page.resume:
        found = checkpoint.newest_good(page.run_directory, say)
        chosen = str(found[0]) if found else ""
        if not found and (page.run_directory / "summary.json").exists():
            raise UserError(
                f"{page.run_directory} holds a run whose checkpoints are gone; to begin anew would replace it, so "
                "choose another run_name, or --overwrite in place of --resume to delete it"
            )
    chosen = from_first("checkpoint to resume", chosen)
    if not chosen:
        if page.resume:
            say("no checkpoint to resume from yet, so this begins at the beginning")
        return None
    manifest = checkpoint.read_manifest(Path(chosen), is_hashed=False)
    saved, now = manifest.run.config, masked_config(page)
    if changed := [key for key in FIXED_ON_RESUME if saved.get(key) != now.get(key)]:
        differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed)
        free = ", ".join(
            key for key in type(page).model_fields if key not in (*FIXED_ON_RESUME, *START_ONLY, *NAMES_THE_RUN)
        )
        raise UserError(f"{chosen}: a run can't change this when it resumes: {differences}. It may change: {free}")
    say(f"resuming from {chosen}")
    return Path(chosen), manifest


def check_unchanged(page: TrainingConfig, model: ModelConfig, digests: tuple[str, ...], start: Start) -> None:
    """Refuse to resume on a model or data that were changed in the meantime."""
    if not start.resumed:
        return
    manifest = start.resumed[1]
    for key, now in model_facts(model).items():
        if now != (saved := manifest.run.model.get(key)):
            raise UserError(f"{page.model_name}: {key} in config.json was {saved!r} and is {now!r}; restore it")
    for source, now, saved in zip(page.data, digests, manifest.run.data, strict=True):
        if now != saved:
            raise UserError(f"{source.path}: its content has changed since the checkpoint; restore it, or start anew")


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """The model as plain values, without what depends on the devices."""
    return {key: value for key, value in asdict(model).items() if key not in ("padded_vocabulary", "attention")}


def data_digests(dataset: Dataset) -> tuple[str, ...]:
    """A hash of each source's encoded documents."""
    return tuple(documents.facts["digest"] for documents in dataset.documents)


def masked_config(page: TrainingConfig) -> dict[str, Any]:
    """The page as plain values, secrets masked."""
    return tomllib.loads(to_toml(page))


def begin(page: TrainingConfig, first_step: int, say: Callable[[str], None]) -> None:
    """Clear the claimed directory as the page says, set aside what the run goes on without, write down the config."""
    directory = page.run_directory
    try:
        if page.overwrite:
            for path in sorted(
                directory.iterdir(), key=lambda path: path.name == "config.toml"
            ):  # last: it names a run
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        for path in checkpoint.set_aside_later(directory, first_step):
            say(f"set aside as {path}: it is newer than the checkpoint this goes on from")
        (directory / "config.toml").write_text(to_toml(page, without=START_ONLY))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error


# The run


@dataclass(frozen=True)
class Run:
    """A run under way: what its loop logs to, saves with and ends by."""

    page: TrainingConfig
    model: ModelConfig
    mesh: Mesh
    source: Path
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
        stop, log_file = Stop(), self.page.run_directory / "run.log"
        with stop.listening(self.log.info), watchdog(finished, log_file), self.saver.finishing():
            yield stop

    def save(self, state: TrainState, step: int, best_eval_loss: float | None, is_best: bool) -> float:
        """Begin to save the checkpoint of a step; the seconds for which this held up the caller."""
        self.log.sync()
        facts = RunFacts(
            step=step,
            best_eval_loss=best_eval_loss,
            wall_seconds=self.seconds,
            config=masked_config(self.page),
            model=model_facts(self.model),
            data=self.digests,
            versions=metrics.versions(),
        )
        return self.saver.save(state, saved_shapes(self.model), facts, is_best)

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

    def end(self, step: int, more_facts: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """Write what a run leaves behind: summary, with what the loop knows of the logged steps, report, and the model
        if all steps are done."""
        if is_first():
            try:
                self.leave_behind(step, more_facts)
            except OSError as error:
                why = checkpoint.describe_error(error)
                raise UserError(
                    f"{self.page.run_directory}: {why}; all steps are saved: make room and add --resume"
                ) from error
        from_first("run ended", "")  # the others wait here for what the first process writes

    def leave_behind(self, step: int, more_facts: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """The files of `end`."""
        directory, command = self.page.run_directory, COMMANDS[type(self.page)]
        records = metrics.read_metrics(directory / "metrics.jsonl")
        facts = metrics.summarise(records) | {
            "command": command,
            "parameters": parameter_counts(self.model)["all"],
            "wall_seconds": self.seconds,
            "device_kind": self.mesh.devices.flat[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "versions": metrics.versions(),
        }
        metrics.write_summary(directory, facts | more_facts(records))
        report.write_report(directory)
        if step < self.steps:
            again = f"{command} @ {directory / 'config.toml'} --resume"
            self.log.info(f"stopped after step {step} of {self.steps}, all saved; to go on: uv run {again}")
        else:
            template = self.page.chat_template if isinstance(self.page, SftConfig | GrpoConfig) else ""
            assert self.saver.newest
            with ExitStack() as stack:
                params = checkpoint.saved_params(self.saver.newest, self.model, stack)
                weights.save_model(directory / "model", params, self.model, self.source, template)
            self.log.info(f"model in Hugging Face layout: {directory / 'model'}")
        self.log.info(f"report: {directory / 'report.html'}")


@contextmanager
def under_way(
    page: TrainingConfig,
    start: Start,
    model: ModelConfig,
    mesh: Mesh,
    source: Path,
    digests: tuple[str, ...],
    steps: int,
    lines: Iterable[str],
) -> Generator[Run]:
    """A run that has started, its log begun with the model, the devices, these lines and those of the start.

    Raises:
        UserError: the directory has no room for it.
    """
    directory, session = page.run_directory, from_first("session", secrets.token_hex(4))
    told = [*model_lines(page, model, mesh), *lines, *start.lines]
    if is_first():
        begin(page, start.step, told.append)
    try:
        log = RunLog(directory, steps, page.log_every, start.step, page.wandb, masked_config(page), is_first())
    except OSError as error:
        raise UserError(f"{directory}: {checkpoint.describe_error(error)}; make room and start again") from error
    with log:
        for line in told:
            log.info(line)
        saver = Saver(directory, page.keep, session)
        saver.newest = start.resumed[0] if start.resumed else None
        yield Run(page, model, mesh, source, digests, steps, log, saver, start)


def model_lines(page: TrainingConfig, model: ModelConfig, mesh: Mesh) -> Iterator[str]:
    """Start-up lines on the model and the devices."""
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
    if flags := os.environ.get("XLA_FLAGS"):
        yield f"XLA_FLAGS: {flags}"
    if page.compilation_cache:
        yield f"compiled programs are kept in {page.cache_dir / 'programs'}"
