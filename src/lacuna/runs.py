"""A run's directory: who may write to it, where it goes on from, and what must not have changed meanwhile."""

import fcntl
import os
import shutil
import socket
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lacuna import checkpoint
from lacuna.checkpoint import Manifest
from lacuna.config import TrainingConfig, UserError, to_toml
from lacuna.data import Dataset
from lacuna.distributed import from_first, is_first
from lacuna.model import ModelConfig

LOCK = "lock"
FIXED_ON_RESUME = (
    "model_name", "from_scratch", "data", "sequence_length", "batch_size", "seed", "compute_dtype", "packing",
    "train_on", "chat_template", "template_date", "neftune_alpha", "on_bad_data", "system_prompt", "prompt_template",
    "prompts_per_step", "completions_per_prompt", "max_completion_tokens", "updates_per_rollout", "reward",
)  # fmt: skip
START_ONLY = ("resume", "resume_from", "overwrite", "show")
NAMES_THE_RUN = ("run_name", "output_dir")


@contextmanager
def claimed(page: TrainingConfig) -> Generator[None]:
    """Hold a run's directory for this job alone, as long as the context or the process lives.

    Raises:
        UserError: another process holds it, or a run that the page does not ask to go on with or to overwrite.
    """
    if not is_first():
        yield
        return
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
        return None
    manifest = checkpoint.read_manifest(Path(chosen), is_hashed=False)
    saved, now = manifest.run.config, masked_config(page)
    if changed := [key for key in FIXED_ON_RESUME if saved.get(key) != now.get(key)]:
        differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed)
        free = ", ".join(
            key for key in type(page).model_fields if key not in (*FIXED_ON_RESUME, *START_ONLY, *NAMES_THE_RUN)
        )
        raise UserError(f"{chosen}: a run can't change this when it resumes: {differences}. It may change: {free}")
    return Path(chosen), manifest


def check_unchanged(page: TrainingConfig, model: ModelConfig, digests: tuple[str, ...], manifest: Manifest) -> None:
    """Refuse to resume on a model or data that were changed in the meantime."""
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


def newest_run(output_dir: str) -> Path:
    """The run in this folder whose model was written last. Raises UserError where there is none."""
    exported = sorted(Path(output_dir).glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not exported:
        raise UserError(f"{output_dir}: no run with a model in it; give --model-name, or train one first")
    return exported[-1].parents[1]
