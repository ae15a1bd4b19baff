"""What a run says about itself: floating-point work and memory, its log (console, run.log, metrics.jsonl, Weights &
Biases), summary.json and report.html. Tokens and seconds in a record are those of its own step, not running totals."""

import io
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from lacuna.config import UserError

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
LESSER_NAMES = ("MIG", "Laptop", "RTX 4090 D", "TPU v4 lite")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device by the name jax gives it; None where unknown (CPUs, slices of a GPU)."""
    names = [name for name in PEAK_FLOPS if name in device_kind]
    if not names or any(name in device_kind for name in LESSER_NAMES):
        return None
    return PEAK_FLOPS[max(names, key=len)]


def step_flops(
    matmul_parameters: int, attention_width: int, layers: int, token_count: int, squared_length_sum: int
) -> float:
    """Model FLOPs of a forward and backward pass over real tokens (Chowdhery et al. 2022, PaLM, appendix B).

    Attention is causal, hence half of theirs: 12 × layers × attention_width (heads × head size) × length² / 2.
    """
    return 6.0 * matmul_parameters * token_count + 6.0 * layers * attention_width * squared_length_sum


def memory_bytes() -> int:
    """Peak bytes in use on the fullest local device, or this process's peak resident set where devices do not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("lacuna", "jax", "jaxlib", "optax", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def short(number: float | int) -> str:
    """A few digits and a unit: 1.54 B, 12.3 k, 0.25, 3.0e-04."""
    for unit, size in {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}.items():
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.1e}" if 0 < abs(number) < 1e-3 else f"{number:.3g}"


def byte_size(number: float | int) -> str:
    """A size in memory: 1.54 GB, 12.3 MB."""
    return short(number).replace("B", "G").replace("k", "K") + "B"


def percent(share: float | int) -> str:
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


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new, whatever happens in between."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def text_of(path: Path) -> str:
    """What the file holds, "" if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    write_atomically(directory / "summary.json", json.dumps(strict(summary), indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, none if there is no file; a last line cut short by a kill is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate((line for line in lines if line.endswith(b"\n")), start=1):
        try:
            records.append({} | json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} line {number}: {line[:80]!r} is not a JSON object; delete the line") from error
    return records


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records alone tell for summary.json: totals, medians, first and last."""

    def known(key: str) -> list[float | int]:
        return [record[key] for record in records if record.get(key) is not None]

    def median(key: str) -> float | int | None:
        return statistics.median(known(key)) if known(key) else None

    return {
        "steps": records[-1]["step"] if records else 0,
        "final_loss": records[-1].get("loss") if records else None,
        "best_eval_loss": min(known("eval_loss"), default=None),
        "tokens": sum(known("tokens")),
        "target_tokens": sum(known("target_tokens")),
        "wall_seconds": sum(known("step_seconds")),
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
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


def start_wandb(mode: Literal["online", "offline"], directory: Path, config: dict[str, Any], is_resumed: bool) -> Any:
    """A Weights & Biases run; one resumed online goes on under the id kept in the run directory."""
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("no W&B key on this machine; run `wandb login` once, or set wandb to offline")
    kept = directory / "wandb" / "id"
    is_known = is_resumed and mode == "online" and kept.exists()
    run = wandb.init(
        project=config.get("wandb_project", "lacuna"),
        name=directory.name,
        dir=str(directory),
        mode=mode,
        config=config,
        id=kept.read_text() if is_known else None,
        resume="allow" if is_known else None,
        settings=wandb.Settings(console="off", init_timeout=30),
    )
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(run.id)
    return run


class LineFile:
    """Lines at the end of a file; those that find no room on the disk are kept, and written when there is some."""

    def __init__(self, path: Path, mode: Literal["ab", "wb"]) -> None:
        self.file = path.open(mode, buffering=0)
        self.waiting = b""

    def write(self, line: str) -> None:
        self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError:
            return

    def sync(self) -> None:
        with suppress(OSError):
            os.fsync(self.file.fileno())


class RunLog:
    """Everything a run writes down as it goes; as a context manager it leaves whole files and a sane terminal.

    metrics.jsonl keeps the steps up to `resume_step` and drops the rest; 0 begins anew. Where `is_kept` is false, as in
    all processes of a job but the first, nothing is written or shown.
    """

    def __init__(
        self,
        directory: Path,
        steps: int,
        log_every: int = 1,
        resume_step: int = 0,
        wandb_mode: Literal["off", "online", "offline"] = "off",
        config: dict[str, Any] | None = None,
        is_kept: bool = True,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl" if is_kept else Path(os.devnull)
        if is_kept:
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step] if resume_step else []
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.metrics_file = LineFile(path, "ab")
        self.text_file = LineFile(directory / "run.log" if is_kept else path, "ab" if resume_step else "wb")
        self.steps, self.log_every = steps, log_every
        self.step_seconds: deque[float] = deque(maxlen=100)
        self.console = Console(highlight=False, quiet=not is_kept)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_interactive,
            expand=True,
        )
        self.task = self.bar.add_task("", total=steps, completed=resume_step, numbers="")
        self.wandb: Any = None
        if wandb_mode != "off" and is_kept:
            with self.wandb_may_fail():
                self.wandb = start_wandb(wandb_mode, directory, config or {}, resume_step > 0)
        self.bar.start()

    def info(self, text: str | Text) -> None:
        """Print a line and keep it, without its colours, in run.log."""
        styled = Text.from_ansi(text) if isinstance(text, str) else text
        self.console.print(styled, soft_wrap=True)
        self.text_file.write(styled.plain)

    def step(self, record: dict[str, Any]) -> None:
        """Log one step: every one in metrics.jsonl, on the progress bar and in W&B; a line every `log_every` steps."""
        self.metrics_file.write(json.dumps(strict(record), allow_nan=False))
        step = record["step"]
        if record.get("step_seconds") is not None:
            self.step_seconds.append(record["step_seconds"])
        parts = {key: phrase(record[key]) for key, phrase in PHRASES.items() if record.get(key) is not None}
        if self.step_seconds and step < self.steps:
            parts["left"] = f"{duration(statistics.median(self.step_seconds) * (self.steps - step))} left"
        on_bar = ("reward", "loss", "learning_rate", "tokens_per_second", "mfu", "left")
        self.bar.update(self.task, completed=step, numbers="  ".join(parts[key] for key in on_bar if key in parts))
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
    def wandb_may_fail(self) -> Generator[None, None, None]:
        """Whatever W&B raises ends W&B, never the run."""
        try:
            yield
        except Exception as error:
            self.wandb = None
            reason = f"{type(error).__name__}: {error}"
            self.info(Text(f"Weights & Biases failed, the run goes on with metrics.jsonl alone ({reason})", "bold red"))

    def close(self, exit_code: int = 0) -> None:
        self.bar.stop()
        if self.wandb is not None:
            with self.wandb_may_fail():
                self.wandb.finish(exit_code=exit_code)
        if lost := len(self.metrics_file.waiting) + len(self.text_file.waiting):
            self.console.print(f"WARNING: {byte_size(lost)} of metrics.jsonl and run.log found no room on the disk")
        self.metrics_file.file.close()
        self.text_file.file.close()

    def sync(self) -> None:
        """Wait until all that was logged is on the disk."""
        self.metrics_file.sync()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    line: str  # keys of a record, "" for none
    points: str
    label: Callable[[float], str] = short


CHARTS = (
    Chart("Reward", "mean of a step; held out: greedy", "reward", "eval_reward"),
    Chart("Loss", "nats per target token", "loss", "eval_loss"),
    Chart("Held-out accuracy", "of target tokens", "", "eval_accuracy", percent),
    Chart("Learning rate", "", "learning_rate", ""),
    Chart("Gradient norm", "before clipping", "gradient_norm", ""),
    Chart("Throughput", "real tokens per second", "tokens_per_second", ""),
    Chart("MFU", "of the bfloat16 peak", "mfu", "", percent),
    Chart("Step time", "seconds", "step_seconds", ""),
    Chart("Completion length", "tokens", "completion_length", ""),
    Chart("Entropy", "nats per token", "entropy", ""),
    Chart("Groups without variance", "left out of the loss", "zero_advantage_fraction", "", percent),
    Chart("Sampler against trainer", "largest difference of log-probabilities, nats", "logprob_difference_max", ""),
)
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "final_reward": ("Final reward", "{:.3f}".format),
    "best_eval_reward": ("Best held-out reward", "{:.3f}".format),
    "final_loss": ("Final loss", "{:.4f}".format),
    "best_eval_loss": ("Best held-out loss", "{:.4f}".format),
    "tokens": ("Real tokens", short),
    "tokens_per_second": ("Tokens per second", short),
    "mfu": ("MFU", percent),
    "wall_seconds": ("Wall time", duration),
}
COLOURS = {"#000001": "quiet", "#000002": "rule", "#000003": "line", "#000004": "point"}


def charts_of(records: list[dict[str, Any]]) -> list[Chart]:
    """What is drawn: the charts of every run, each of several rewards, and the figures of tasks."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("reward/"))
    rewards = [Chart(key, "unweighted", key, f"eval_{key}") for key in keys] if len(keys) > 1 else []
    tasks = [Chart(key.removeprefix("eval/"), "", "", key) for key in task_figures(records)]
    return [*CHARTS, *rewards, *tasks]


def printable(text: str) -> str:
    """A text on one line of the terminal, without what would control it."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the key is present and not null."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def draw(chart: Chart, records: list[dict[str, Any]]) -> tuple[str, int]:
    """An inline SVG in the page's colours, "" without values, and how many values lie above its axis.

    Long runs show median and range of up to 300 groups of steps; only in the loss may rare large values set the scale.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    (step, value), (point_step, point) = series(records, chart.line), series(records, chart.points)
    if not len(step) + len(point):
        return "", 0
    above, top = 0, max([*value, *point])
    figure = Figure(figsize=(5, 2.5))
    axes = figure.add_axes((0.11, 0.12, 0.87, 0.84))
    if len(step):
        groups = np.array_split(np.arange(len(step)), min(len(step), 300))
        low, middle, high = ([f(value[group]) for group in groups] for f in (np.min, np.median, np.max))
        centre = [step[group].mean() for group in groups]
        axes.fill_between(centre, low, high, color="#000003", alpha=0.22, linewidth=0)
        axes.plot(centre, middle, color="#000003", linewidth=1.2, marker="o" if len(step) == 1 else "")
    axes.plot(point_step, point, color="#000004", linewidth=1, marker="o", markersize=3)
    if chart.title != "Loss":
        usual = 1.3 * np.percentile(value, 98) if len(value) > 20 else top
        above = int(np.sum(value > usual)) if top > 2 * usual else 0
        axes.set_ylim(0, (usual if above else 1.06 * top) or 1)
    axes.set_xlim(0, 1.01 * max(1, records[-1]["step"]))
    axes.grid(axis="y", color="#000002", linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor="#000001", labelsize=8, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: chart.label(number)))
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        unstamped = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unstamped)
    svg = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return f'<svg viewBox="0 0 360 180" role="img" aria-label="{chart.title} by step">{svg}', above


def fact(value: Any) -> str:
    """A value of summary.json as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.6g}"
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


def write_report(directory: Path) -> None:
    """report.html from config.toml, metrics.jsonl and summary.json, as far as they are there yet."""
    from jinja2 import Environment

    config, summary = (text_of(directory / name) for name in ("config.toml", "summary.json"))
    records = read_metrics(directory / "metrics.jsonl")
    live, ended = summarise(records), json.loads(summary or "{}")
    facts = live | ended if ended.get("steps") == live["steps"] else ended | live
    steps, total = facts["steps"], tomllib.loads(config).get("steps") or 0
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    html = page.render(
        name=directory.resolve().name,
        command=facts.get("command", "run"),
        steps=f"{steps:,} of {total:,} steps" if total > steps else f"{steps:,} steps",
        written=time.strftime("%Y-%m-%d %H:%M"),
        lost_count=sum("loss" in record and record["loss"] is None for record in records),
        figures={name: write(facts[key]) for key, (name, write) in FIGURES.items() if facts.get(key) is not None},
        is_evaluated=live["best_eval_loss"] is not None,
        charts=[(chart, *draw(chart, records)) for chart in charts_of(records)],
        samples=next(((each["step"], each["samples"]) for each in reversed(records) if each.get("samples")), None),
        facts={key: fact(value) for key, value in facts.items()},
        config=config,
    )
    write_atomically(directory / "report.html", html)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · lacuna</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #5f6977; --rule: #e4e7eb; --line: #2a6fdb;
  --point: #c94f16 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e7eb; --quiet: #98a2b0; --rule: #2b3038; --line: #6ca4f8; --point: #f2935c }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 0 0 .5rem; font-size: 1rem }
p { margin: .35rem 0 0 }
p, span, dt, th { color: var(--quiet) }
strong, .held-out { color: var(--point) }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.1rem; margin: 1.75rem 0 2.5rem;
  padding: 1.1rem 0; border: solid var(--rule); border-width: 1px 0 }
dd { margin: 0; font-size: 1.3rem; white-space: nowrap }
dt, span, table, pre { font-size: .87rem }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.25rem 2.5rem }
figure, section { margin: 0; min-width: 0 }
section:first-of-type { grid-column-start: 1 }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline; margin-bottom: .4rem }
figcaption, dd { font-weight: 600 }
span { font-weight: 400 }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-family: inherit !important }
@media (max-width: 30rem) { svg text { font-size: 10px !important } }
table { width: 100%; border-collapse: collapse }
th, td { padding: .35rem 0; border-top: 1px solid var(--rule); text-align: left; vertical-align: top }
th { width: 11rem; font-weight: 400 }
td { overflow-wrap: anywhere }
.text { white-space: pre-wrap }
pre { margin: 0; padding: .6rem 0; overflow-x: auto; border-top: 1px solid var(--rule) }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ command }} · {{ steps }} · written {{ written }}
{% if lost_count %}· <strong>{{ lost_count }} without a finite loss</strong>{% endif %}</p>
<dl>
{% for name, value in figures.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<main>
{% for chart, svg, above in charts if svg %}
<figure><figcaption>{{ chart.title }}<span>{{ chart.unit }}</span>
{% if chart.line and chart.points and is_evaluated %}<span class="held-out">● held-out</span>{% endif %}
{% if above %}<span>{{ above }} above the axis</span>{% endif %}</figcaption>{{ svg | safe }}</figure>
{% endfor %}
{% if samples %}
<section><h2>Samples at step {{ samples[0] }}</h2><table>
{% for prompt, text in samples[1].items() %}
<tr><th>{{ prompt }}</th><td class="text">{{ text }}</td></tr>
{% endfor %}
</table></section>
{% endif %}
<section><h2>Facts</h2><table>
{% for key, value in facts.items() %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></section>
<section><h2>config.toml</h2><pre>{{ config }}</pre></section>
</main>
</body>
</html>
"""
