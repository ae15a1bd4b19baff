"""What a run says about itself: floating-point work and memory, its log (console, run.log, metrics.jsonl, Weights &
Biases) and summary.json. Tokens and seconds in a record are those of its own step, not running totals."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import resource
import statistics
import sys
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from lacuna.config import LINES, UserError, printable
from lacuna.distributed import is_first

PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,  # NVIDIA A100 data sheet
    "H100": 989e12,  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity, half of it dense
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, PCIe: 1,513 with sparsity
    "H100 NVL": 835e12,  # NVIDIA H100 data sheet, NVL: 1,671 with sparsity
    "H200": 989e12,  # NVIDIA H200 data sheet, SXM: 1,979 with sparsity
    "H200 NVL": 835e12,  # NVIDIA H200 data sheet, NVL: 1,671 with sparsity
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada GPU architecture white paper, float32 accumulation
    "TPU v4": 275e12,  # Google Cloud documentation, "TPU v4", per chip
    "TPU v5 lite": 197e12,  # Google Cloud documentation, "TPU v5e"
    "TPU v5e": 197e12,  # the same
    "TPU v5": 459e12,  # Google Cloud documentation, "TPU v5p"
    "TPU v6 lite": 918e12,  # Google Cloud documentation, "TPU v6e"
    "TPU v6e": 918e12,  # the same
}
NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
LESSER_NAMES = ("MIG", "Laptop", "RTX 4090 D", "TPU v4 lite")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device by the name jax gives it; None where unknown (CPUs, slices of a GPU)."""
    names = [name for name in PEAK_FLOPS if name in device_kind]
    if not names or any(name in device_kind for name in LESSER_NAMES):
        return None
    return PEAK_FLOPS[max(names, key=len)]


def step_flops(
    matmul_parameters: int,
    trained_parameters: int,
    attention_width: int,
    layers: int,
    lengths: Int[np.ndarray, " document"],
) -> float:
    """Model FLOPs of a forward and backward pass over documents (Chowdhery et al. 2022, PaLM, appendix B).

    A parameter of the matrix products takes 4 for each token, and 2 more if it trains, for its own gradient. Attention
    is causal, hence half of theirs: 12 × layers × attention_width (heads × head size) × length² / 2.
    """
    token_count, squared_length_sum = int(np.sum(lengths)), int(np.sum(np.square(lengths, dtype=np.int64)))
    products = (4.0 * matmul_parameters + 2.0 * trained_parameters) * token_count
    return products + 6.0 * layers * attention_width * squared_length_sum


def memory_bytes() -> int:
    """Peak bytes in use on the fullest local device, or this process's peak resident set where devices don't report."""
    peaks = [stats["peak_bytes_in_use"] for stats in device_memory() if "peak_bytes_in_use" in stats]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def free_memory_bytes() -> int | None:
    """Free bytes of the fullest local device, or a device's share of this machine's; None where neither is reported."""
    devices, machine = device_memory(), Path("/proc/meminfo")
    if all("bytes_limit" in stats for stats in devices):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in devices)
    found = re.search(r"MemAvailable: +(\d+) kB", machine.read_text()) if machine.exists() else None
    return int(found[1]) * 1024 // len(devices) if found else None


def device_memory() -> list[dict[str, int]]:
    """What each local device reports of its memory, which is nothing on CPUs."""
    return [device.memory_stats() or {} for device in jax.local_devices()]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("lacuna", "jax", "jaxlib", "optax", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def short(number: float | int, letters: str = "kMBT") -> str:
    """Three digits and a letter for each thousandfold: 1.54 B, 12.3 k, 0.25, 3.0e-04."""
    for power in range(len(letters), 0, -1):
        if abs(number) >= 0.9995 * 1000**power:
            return f"{number / 1000**power:.3g} {letters[power - 1]}"
    return f"{number:.1e}" if 0 < abs(number) < 1e-3 else f"{number:.3g}"


def flop_size(number: float | int) -> str:
    """1.54 GFLOP."""
    return short(number, "kMGTP") + "FLOP"


def byte_size(number: float | int) -> str:
    """1.54 GB."""
    return short(number, "KMGT") + "B"


def percent(share: float | int) -> str:
    """12.3%."""
    return f"{100 * share:.3g}%"


def duration(seconds: float | int) -> str:
    """3.2 s, 4 min 05 s or 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def strict(value: Any) -> Any:
    """The value with every NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk; some file systems (CIFS, 9p) can't tell of directories."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SUCH_SYNC):
            raise
    finally:
        os.close(handle)


def content_hash(content: Any) -> str:
    """Hash of a JSON value, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file whole: it holds the old text or the new, whatever happens in between."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    write_atomically(directory / "summary.json", json.dumps(strict(summary), indent=2, allow_nan=False) + "\n")


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with the keys `needed`, none if there is no file; a last line cut short by
    a kill is left out.

    Raises:
        UserError: another line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append({} | json.loads(line))
            missing = [key for key in needed if key not in records[-1]]
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {number}: {line[:80]!r} is not a JSON object; delete the line") from error
        if missing:
            raise UserError(f"{path} line {number}: {line[:80]!r} has no {missing[0]}; delete the line")
    return records


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What summary.json holds of the records alone: totals, medians, first and last."""

    def known(key: str) -> list[Any]:
        return [record[key] for record in records if record.get(key) is not None]

    seconds, waits = sum(known("step_seconds")), known("input_wait_seconds")
    return {
        "steps": records[-1]["step"] if records else 0,
        "final_loss": records[-1].get("loss") if records else None,
        "best_eval_loss": min(known("eval_loss"), default=None),
        "tokens": sum(known("tokens")),
        "target_tokens": sum(known("target_tokens")),
        "wall_seconds": seconds,
        "input_wait_share": sum(waits) / seconds if waits else None,
        **{key: statistics.median(known(key)) if known(key) else None for key in ("tokens_per_second", "mfu")},
    }


def task_figures(records: list[dict[str, Any]]) -> list[str]:
    """The keys under which records have figures of tasks, without their standard errors."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("eval/"))
    return [key for key in keys if "_stderr" not in key]


PHRASES: dict[str, Callable[[float], str]] = {
    "reward": "reward {:.3f}".format,
    "eval_reward": "held-out reward {:.3f}".format,
    "completion_length": "{:.0f} tokens each".format,
    "truncated_fraction": lambda share: f"{percent(share)} truncated",
    "zero_advantage_fraction": lambda share: f"{percent(share)} of groups alike",
    "loss": "loss {:.4f}".format,
    "eval_loss": "held-out loss {:.4f}".format,
    "eval_accuracy": lambda share: f"held-out accuracy {percent(share)}",
    "learning_rate": "rate {:.2e}".format,
    "gradient_norm": "gradient {:.3g}".format,
    "tokens_per_second": lambda number: f"{short(number)} tokens/s",
    "mfu": lambda share: f"MFU {percent(share)}",
}
ON_BAR = ("reward", "loss", "learning_rate", "tokens_per_second", "mfu", "left")


def start_wandb(mode: Literal["online", "offline"], directory: Path, config: dict[str, Any], is_resumed: bool) -> Any:
    """A Weights & Biases run; one resumed online continues under the id kept in the run directory."""
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("no W&B key on this machine; run `wandb login` once, or set wandb to offline")
    kept = directory / "wandb" / "id"
    earlier = kept.read_text() if is_resumed and mode == "online" and kept.exists() else None
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lacuna"), name=directory.name, dir=str(directory), mode=mode,
        config=config, id=earlier, resume="allow" if earlier else None,
        settings=wandb.Settings(console="off", init_timeout=30),
    )  # fmt: skip
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(run.id)
    return run


class LineFile:
    """Lines that the first process of a job appends to a file, which a line cut short by a kill no longer ends.

    Of JSON lines with steps those after `last_step` are dropped first; at 0 any file starts empty. Lines that find no
    room on the disk are kept, and written once there is some.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        self.path, self.waiting = path, b""
        if is_first() and last_step is not None:
            kept = [line for line in read_json_lines(path, "step") if line["step"] <= last_step] if last_step else []
            write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self.file = (path if is_first() else Path(os.devnull)).open("ab", buffering=0)
        if is_first():
            self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def write(self, line: str) -> None:
        """Append a line now, or once there is room for it."""
        self.waiting += line.encode("utf-8", "surrogatepass") + b"\n"
        with suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait for room. Raises OSError if there is none."""
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def close(self) -> None:
        """Close the file, with a warning about lines that found no room."""
        self.file.close()
        if self.waiting:
            print(f"WARNING: {byte_size(len(self.waiting))} of {self.path} found no room on the disk")


class RunLog:
    """Everything a run logs; as a context manager it leaves whole files and a sane terminal.

    metrics.jsonl keeps the steps up to `resume_step` and drops the rest; 0 starts it from scratch. Only the first
    process of a job writes and shows anything.
    """

    def __init__(
        self,
        directory: Path,
        steps: int,
        log_every: int = 1,
        resume_step: int = 0,
        wandb_mode: Literal["off", "online", "offline"] = "off",
        config: dict[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics_file = LineFile(directory / "metrics.jsonl", resume_step)
        self.text_file = LineFile(directory / "run.log", None if resume_step else 0)
        self.steps, self.log_every = steps, log_every
        self.step_seconds: deque[float] = deque(maxlen=100)
        self.console = Console(highlight=False, quiet=not is_first())
        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        columns = SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None), numbers
        is_hidden = not self.console.is_interactive
        self.bar = Progress(*columns, console=self.console, refresh_per_second=4, disable=is_hidden, expand=True)
        self.task = self.bar.add_task("", total=steps, completed=resume_step, numbers="")
        self.wandb: Any = None
        if wandb_mode != "off" and is_first():
            with self.wandb_may_fail():
                self.wandb = start_wandb(wandb_mode, directory, config or {}, resume_step > 0)
        self.bar.start()

    def info(self, text: str | Text) -> None:
        """Print a line and keep it, without its colours, in run.log."""
        styled = Text(printable(Text.from_ansi(text).plain, LINES)) if isinstance(text, str) else text
        self.console.print(styled, soft_wrap=True)
        self.text_file.write(styled.plain)

    def step(self, record: dict[str, Any]) -> None:
        """Log one step: every one in metrics.jsonl, on the progress bar and in W&B; a line every `log_every` steps."""
        self.metrics_file.write(json.dumps(strict(record), allow_nan=False))
        step = record["step"]
        parts = {key: phrase(record[key]) for key, phrase in PHRASES.items() if record.get(key) is not None}
        if record.get("step_seconds") is not None:
            self.step_seconds.append(record["step_seconds"])
        if self.step_seconds and step < self.steps:
            parts["left"] = f"{duration(statistics.median(self.step_seconds) * (self.steps - step))} left"
        self.bar.update(self.task, completed=step, numbers="  ".join(parts[key] for key in ON_BAR if key in parts))
        parts |= {key: f"{key.removeprefix('eval/')} {record[key]:.4g}" for key in task_figures([record])}
        is_evaluation = any(key.startswith(("eval_", "eval/")) or key == "samples" for key in record)
        if is_evaluation or step % self.log_every == 0 or step in (1, self.steps):
            line = f"step {step:>{len(str(self.steps))}}/{self.steps}  {'  '.join(parts.values())}"
            if is_evaluation or not self.console.is_interactive:
                self.info(line)
            else:
                self.text_file.write(line)
        for prompt, text in record.get("samples", {}).items():
            self.info(Text.assemble("  ", (prompt, "bold"), " → ", printable(text)))
        if self.wandb is not None:
            with self.wandb_may_fail():
                self.wandb.log(record, step=step)

    @contextmanager
    def wandb_may_fail(self) -> Generator[None]:
        """Whatever W&B raises ends W&B, never the run."""
        try:
            yield
        except Exception as error:
            self.wandb = None
            reason = f"{type(error).__name__}: {error}"
            self.info(
                Text(f"Weights & Biases failed, the run continues with metrics.jsonl alone ({reason})", "bold red")
            )

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        with suppress(OSError):
            os.fsync(self.metrics_file.file.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if self.wandb is not None:
            with self.wandb_may_fail():
                self.wandb.finish(exit_code=int(kind is not None))
        self.metrics_file.close()
        self.text_file.close()
