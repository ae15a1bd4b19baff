"""report.html: the curves, samples and facts of a run on one self-contained page."""

import io
import json
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lacuna.metrics import duration, percent, read_json_lines, short, summarise, task_figures, write_atomically


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


def series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the key is present and not null."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def plot(chart: Chart, records: list[dict[str, Any]]) -> tuple[str, int]:
    """An inline SVG in the page's colours, "" without values, and how many values lie above its axis.

    Long runs show median and range of up to 300 groups of steps; only in the loss may rare large values set the scale.
    """
    os.environ["MPLBACKEND"] = "svg"  # a notebook exports its own, which need not be installed here
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

    config, summary = (
        path.read_text() if path.exists() else "" for path in (directory / "config.toml", directory / "summary.json")
    )
    records = read_json_lines(directory / "metrics.jsonl")
    live, ended = summarise(records), json.loads(summary or "{}")
    facts = live | ended if ended.get("steps") == live["steps"] else ended | live
    steps, total = facts["steps"], tomllib.loads(config).get("steps") or 0
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("lacuna.apps").joinpath("report.html").read_text("utf-8")
    )
    html = template.render(
        name=directory.resolve().name,
        command=facts.get("command", "run"),
        steps=f"{steps:,} of {total:,} steps" if total > steps else f"{steps:,} steps",
        written=time.strftime("%Y-%m-%d %H:%M"),
        lost_count=sum("loss" in record and record["loss"] is None for record in records),
        figures={name: write(facts[key]) for key, (name, write) in FIGURES.items() if facts.get(key) is not None},
        is_evaluated=live["best_eval_loss"] is not None,
        charts=[(chart, *plot(chart, records)) for chart in charts_of(records)],
        samples=next(((each["step"], each["samples"]) for each in reversed(records) if each.get("samples")), None),
        facts={key: fact(value) for key, value in facts.items()},
        config=config,
    )
    write_atomically(directory / "report.html", html)
