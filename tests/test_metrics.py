"""The work and memory a step is credited with, how numbers read, and what the log keeps through kills and failures."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import records, text_run

from lacuna import cli, metrics
from lacuna.config import UserError
from lacuna.metrics import (
    LineFile,
    RunLog,
    byte_size,
    duration,
    flop_size,
    peak_flops,
    percent,
    read_json_lines,
    short,
    step_flops,
    write_summary,
)


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 / step, "learning_rate": 3e-4, "tokens": 100, "tokens_per_second": 50.0} | values


def steps_on_disk(directory: Path) -> list[int]:
    return [entry["step"] for entry in read_json_lines(directory / "metrics.jsonl")]


def write_steps(directory: Path, first: int, last: int) -> None:
    with RunLog(directory, steps=10, resume_step=first - 1) as log:
        for step in range(first, last + 1):
            log.step(record(step))


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H20", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_goes_by_the_longest_name_and_is_unknown_for_slices(device_kind: str, teraflops: int | None) -> None:
    assert peak_flops(device_kind) == (teraflops and teraflops * 1e12)


def test_matmul_flops_equal_a_count_over_tokens_and_weights() -> None:
    matrices, lengths = [(6, 8), (8, 6), (6, 20)], [3, 1]
    total = 0
    for _ in range(sum(lengths)):
        for inputs, outputs in matrices:
            forward = sum(2 for _ in range(inputs) for _ in range(outputs))  # a multiplication and an addition
            total += 3 * forward  # and twice as much backward: for the weights and for the inputs
    parameters = sum(inputs * outputs for inputs, outputs in matrices)
    assert step_flops(parameters, parameters, 0, 1, np.array(lengths)) == total


def test_attention_flops_equal_a_count_over_visible_keys() -> None:
    heads, head, layers, lengths = 3, 8, 5, (1, 7, 20)
    total = 0.0
    for length in lengths:
        for query in range(length):
            visible = query + 0.5  # the convention: half a square, so the diagonal counts half
            scores = mixed = 2 * heads * head * visible
            total += 3 * layers * (scores + mixed)
    assert step_flops(0, 0, heads * head, layers, np.array(lengths)) == pytest.approx(total)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_the_peak_of_memory_rises_by_what_is_allocated_above_it() -> None:
    before = metrics.memory_bytes()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = np.ones(before - resident + 500_000_000, np.uint8)
    assert 400e6 < metrics.memory_bytes() - before < 700e6
    peak = metrics.memory_bytes()
    del held
    assert metrics.memory_bytes() == pytest.approx(peak, abs=50e6)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_devices_without_a_report_share_the_free_memory_of_the_machine() -> None:
    free, page = metrics.free_memory_bytes(), os.sysconf("SC_PAGE_SIZE")
    assert free and os.sysconf("SC_AVPHYS_PAGES") * page / 2 < free * jax.local_device_count()
    assert free * jax.local_device_count() < os.sysconf("SC_PHYS_PAGES") * page


def test_memory_of_devices_is_that_of_the_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [
        {"peak_bytes_in_use": 70, "bytes_in_use": 50, "bytes_limit": 100},
        {"peak_bytes_in_use": 90, "bytes_in_use": 20, "bytes_limit": 100},
    ]
    devices = [SimpleNamespace(memory_stats=lambda report=report: report) for report in reports]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert (metrics.memory_bytes(), metrics.free_memory_bytes()) == (90, 50)


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (short, 1_543_714_304, "1.54 B"),
        (short, 12_345, "12.3 k"),
        (short, 999_999, "1 M"),
        (short, 999_499, "999 k"),
        (short, -2_500, "-2.5 k"),
        (short, 7e15, "7e+03 T"),
        (short, 0.5, "0.5"),
        (short, 3e-4, "3.0e-04"),
        (short, 0, "0"),
        (byte_size, 512, "512B"),
        (byte_size, 12_345, "12.3 KB"),
        (byte_size, 80e9, "80 GB"),
        (flop_size, 989e12, "989 TFLOP"),
        (flop_size, 1.2e15, "1.2 PFLOP"),
        (percent, 0.4117, "41.2%"),
        (percent, 1, "100%"),
        (duration, 3.21, "3.2 s"),
        (duration, 59.94, "59.9 s"),
        (duration, 59.96, "1 min 00 s"),
        (duration, 245, "4 min 05 s"),
        (duration, 3_599.6, "1 h 00 min"),
        (duration, 90_061, "25 h 01 min"),
    ],
)
def test_how_numbers_read(write: Callable[[float], str], number: float, text: str) -> None:
    assert write(number) == text


def test_the_line_of_a_step_holds_its_numbers(tmp_path: Path) -> None:
    values = {
        "reward": 0.5, "eval_reward": 0.625, "completion_length": 31.4, "truncated_fraction": 0.25,
        "zero_advantage_fraction": 0.125, "eval_loss": 2.34567, "eval_accuracy": 0.5123, "gradient_norm": 1.2345,
        "mfu": 0.4117, "eval/gsm8k/accuracy": 0.75, "eval/gsm8k/accuracy_stderr": 0.1,
    }  # fmt: skip
    with RunLog(tmp_path, steps=2) as log:
        log.step(record(2, **values))
    assert (tmp_path / "run.log").read_text() == (
        "step 2/2  reward 0.500  held-out reward 0.625  31 tokens each  25% truncated  12.5% of groups alike  "
        "loss 2.0000  held-out loss 2.3457  held-out accuracy 51.2%  rate 3.00e-04  gradient 1.23  50 tokens/s  "
        "MFU 41.2%  gsm8k/accuracy 0.75\n"
    )


def test_speeds_of_a_run_are_those_of_its_steps_and_the_summary_holds_totals_and_medians(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 1e9
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: peak)
    config = text_run(small, steps=6, log_every=1, batch_size=16, micro_batch_size=2)
    began = time.perf_counter()
    rows, _ = cli.run(config)
    wall_seconds = time.perf_counter() - began
    entries = records(config)
    raw = json.loads((small / "config.json").read_text())
    width, kept = raw["hidden_size"], raw["num_key_value_heads"] * raw["head_dim"]
    heads, layers = raw["num_attention_heads"] * raw["head_dim"], raw["num_hidden_layers"]
    of_layer = 2 * width * heads + 2 * width * kept + 3 * width * raw["intermediate_size"]
    for number, entry in enumerate(entries):
        seconds, segment = entry["step_seconds"], rows.dataset.batch(number, 16).segment
        lengths = [np.sum(row == document) for row in segment for document in range(1, row.max() + 1)]
        products = 6 * sum(lengths) * (layers * of_layer + width * raw["vocab_size"])
        assert entry["flops"] == products + sum(3 * layers * 4 * heads * length**2 / 2 for length in lengths)
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / seconds)
        assert entry["target_tokens_per_second"] == pytest.approx(entry["target_tokens"] / seconds)
        assert entry["mfu"] == pytest.approx(entry["flops"] / (seconds * 8 * peak))  # eight devices
        assert 1e8 < entry["memory_bytes"] <= metrics.memory_bytes()
    assert 0 < sum(entry["step_seconds"] for entry in entries) < wall_seconds
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert summary["tokens"] == sum(entry["tokens"] for entry in entries)
    assert summary["target_tokens"] == sum(entry["target_tokens"] for entry in entries)
    for key in ("tokens_per_second", "mfu"):
        assert summary[key] == pytest.approx(np.median([entry[key] for entry in entries]))
    assert sum(entry["step_seconds"] for entry in entries) < summary["wall_seconds"] < wall_seconds
    assert (summary["steps"], summary["final_loss"]) == (6, entries[-1]["loss"])


def test_no_step_is_there_twice_after_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, 5, 8)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert after[:4] == before[:4]
    assert (tmp_path / "run.log").read_text().count("step  5/10") == 2


def test_a_run_started_from_scratch_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLog(tmp_path, steps=10) as log:
            log.step({"step": 0, "eval_loss": 5.0})
            assert steps_on_disk(tmp_path) == [0]
            log.step(record(3))
    write_steps(tmp_path, 1, 1)
    assert steps_on_disk(tmp_path) == [1]
    assert "step  3/10" not in (tmp_path / "run.log").read_text()


def test_a_line_cut_short_by_a_kill_is_dropped_even_if_it_parses(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    for tail in ('{"step": 4, "lo', '{"step": 4}'):
        path.write_text("".join(f"{json.dumps(record(step))}\n" for step in (1, 2, 3)) + tail)
        assert steps_on_disk(tmp_path) == [1, 2, 3]
        write_steps(tmp_path, 5, 5)
        assert steps_on_disk(tmp_path) == [1, 2, 3, 5]


def test_only_line_feeds_end_a_line_of_json(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d", "e\x1cf"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "lines.jsonl").write_text(lines, "utf-8", newline="")
    assert [entry["text"] for entry in read_json_lines(tmp_path / "lines.jsonl")] == texts
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2: b'nonsense"):
        read_json_lines(tmp_path / "metrics.jsonl")


class FullDisk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError("No space left on device")
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_lines_are_appended_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"row": 1}\n{"ro')
    with closing(LineFile(path)) as lines:
        lines.write('{"row": 2}')
    assert path.read_text() == '{"row": 1}\n{"row": 2}\n'


@pytest.mark.parametrize("is_freed", [True, False])
def test_a_full_disk_ends_no_run_and_takes_no_line_that_later_finds_room(
    is_freed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, steps=4) as log:
        log.step(record(1))
        disk = FullDisk(log.metrics_file.file, 20)
        monkeypatch.setattr(log.metrics_file, "file", disk)
        log.step(record(2))
        log.step(record(3))
        assert steps_on_disk(tmp_path) == [1]
        disk.room = 10_000 if is_freed else 0
        log.step(record(4))
    assert steps_on_disk(tmp_path) == ([1, 2, 3, 4] if is_freed else [1])
    assert ("found no room on the disk" in capsys.readouterr().out) == (not is_freed)


def test_each_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=3) as log:
        for step in (1, 2, 3):
            log.step(record(step))
            assert steps_on_disk(tmp_path) == list(range(1, step + 1))


def test_non_finite_numbers_are_null_on_disk_and_nan_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, steps=1) as log:
        log.step(record(1, loss=math.nan, gradient_norm=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entry["loss"] is None and entry["gradient_norm"] is None
    assert "loss nan" in capsys.readouterr().out


def test_lines_come_every_log_step_at_the_ends_and_at_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, steps=11, log_every=5) as log:
        for step in range(1, 12):
            log.step(record(step, eval_loss=2.5) if step == 7 else record(step))
    out = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"step +(\d+)/11", out)] == [1, 5, 7, 10, 11]
    assert "held-out loss 2.5000" in out
    assert (tmp_path / "run.log").read_text() == out
    assert len(steps_on_disk(tmp_path)) == 11


def test_time_left_is_the_median_step_times_the_steps_to_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, steps=100) as log:
        for step, seconds in enumerate((60.0, 2.0, 2.0), start=1):
            log.step(record(step, step_seconds=seconds))
    assert "3 min 14 s left" in capsys.readouterr().out.splitlines()[-1]


def test_run_log_has_no_colour_codes_and_brackets_survive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, steps=1) as log:
        log.info("\x1b[31mred\x1b[0m [bold]not markup[/bold] " + "long " * 60)
    expected = "red [bold]not markup[/bold] " + "long " * 60 + "\n"
    assert (tmp_path / "run.log").read_text() == expected
    assert capsys.readouterr().out == expected


def test_a_line_that_would_control_the_terminal_is_logged_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, steps=1) as log:
        log.info("left out: a.jsonl line 1: \x1b]0;title\x07\x9b2J\x08 一\u200d二\n\tmore")
    expected = "left out: a.jsonl line 1: 0;title\\x9b2J 一\u200d二\n\tmore\n"
    assert (tmp_path / "run.log").read_text() == expected
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_exception_passes_and_leaves_whole_files_and_a_sane_terminal(
    exception: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(exception), RunLog(tmp_path, steps=5) as log:
        log.step(record(1))
        raise exception
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    out = capsys.readouterr().out
    assert hidden in out and out.endswith(shown) and "step 1/5" in out and "loss 4.0000" in out
    assert log.metrics_file.file.closed and log.text_file.file.closed
    assert steps_on_disk(tmp_path) == [1]
    assert (tmp_path / "run.log").read_text() == "step 1/5  loss 4.0000  rate 3.00e-04  50 tokens/s\n"


class FakeWandb:
    """Records the calls and fails in the one named; like wandb's module and its run in one."""

    id = "abc"

    def __init__(self, failing: str, has_key: bool = True) -> None:
        self.failing, self.has_key, self.calls = failing, has_key, []
        self.Settings = SimpleNamespace

    def call(self, name: str, values: Any) -> None:
        self.calls.append((name, values))
        if name == self.failing:
            raise ConnectionError("no route")

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.has_key

    def init(self, **settings: Any) -> "FakeWandb":
        self.call("init", settings)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.call("log", (step, values["loss"]))

    def finish(self, exit_code: int) -> None:
        self.call("finish", exit_code)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_wandb_is_reported_once_and_the_log_continues(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(tmp_path, steps=3, wandb_mode="offline", config={"seed": 1}) as log:
        for step in (1, 2, 3):
            log.step(record(step))
    assert steps_on_disk(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().out.count("ConnectionError: no route") == 1
    assert [name for name, _ in fake.calls].count(failing) == 1
    assert fake.calls[0][1]["config"] == {"seed": 1}


def test_wandb_without_the_package_or_a_key_is_reported_and_the_log_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, message in ((None, "ModuleNotFoundError"), (FakeWandb("", has_key=False), "run `wandb login`")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with RunLog(tmp_path, steps=1, wandb_mode="online") as log:
            log.step(record(1))
        assert message in capsys.readouterr().out
        assert steps_on_disk(tmp_path) == [1]


def test_wandb_gets_each_step_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb("")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1):
        with RunLog(tmp_path, steps=2, resume_step=resume_step, wandb_mode="online") as log:
            log.step(record(resume_step + 1))
    begun, first, ended, resumed, second, _ = fake.calls
    assert (first, second, ended) == (("log", (1, 4.0)), ("log", (2, 2.0)), ("finish", 0))
    assert (begun[1]["id"], begun[1]["resume"]) == (None, None)
    assert (resumed[1]["id"], resumed[1]["resume"]) == ("abc", "allow")


def test_a_failed_write_leaves_the_old_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(tmp_path, {"steps": 1, "final_loss": math.nan, "versions": metrics.versions()})
    before = (tmp_path / "summary.json").read_text()
    assert json.loads(before)["final_loss"] is None and json.loads(before)["versions"]["lacuna"]

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(metrics.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, {"steps": 2})
    assert (tmp_path / "summary.json").read_text() == before


def test_summarise_takes_totals_and_medians_and_skips_nulls() -> None:
    entries = [record(1, mfu=None), record(2, eval_loss=2.0), record(3, tokens_per_second=80.0, eval_loss=3.0)]
    summary = metrics.summarise(entries)
    assert (summary["steps"], summary["tokens"], summary["tokens_per_second"]) == (3, 300, 50.0)
    assert (summary["best_eval_loss"], summary["mfu"], summary["final_loss"]) == (2.0, None, 4.0 / 3)
    assert summary["input_wait_share"] is None  # as of a run without rows
    times = ({"input_wait_seconds": wait, "step_seconds": 2.0} for wait in (0.5, 0.0, 1.0))
    assert metrics.summarise([{"step": 1} | each for each in times])["input_wait_share"] == pytest.approx(1.5 / 6)
