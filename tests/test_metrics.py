"""The work a step is credited with, what the sinks keep through kills and failures, and the report page."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lacuna import metrics
from lacuna.config import UserError
from lacuna.metrics import RunLog, peak_flops, read_json_lines, short, step_flops, write_summary


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


def test_step_flops_of_an_example_worked_by_hand() -> None:
    parameters = 6 * 1_000_000 * 300
    attention = 6 * 2 * 64 * (100**2 + 200**2)
    assert step_flops(1_000_000, 64, 2, np.array([100, 200])) == parameters + attention


def test_attention_flops_equal_a_count_over_visible_keys() -> None:
    heads, head, layers, lengths = 3, 8, 5, (1, 7, 20)
    total = 0.0
    for length in lengths:
        for query in range(length):
            visible = query + 0.5  # the convention: half a square, so the diagonal counts half
            scores = mixed = 2 * heads * head * visible
            total += 3 * layers * (scores + mixed)
    assert step_flops(0, heads * head, layers, np.array(lengths)) == pytest.approx(total)


def test_memory_is_at_least_what_this_process_holds() -> None:
    held = bytearray(64 << 20)
    assert len(held) < metrics.memory_bytes() < 1 << 40


@pytest.mark.parametrize(
    ("number", "text"), [(1543714304, "1.54 B"), (12345, "12.3 k"), (999_999, "1 M"), (0.5, "0.5"), (3e-4, "3.0e-04")]
)
def test_short_numbers(number: float | int, text: str) -> None:
    assert short(number) == text


def test_no_step_is_there_twice_after_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, 5, 8)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert after[:4] == before[:4]
    assert (tmp_path / "run.log").read_text().count("step  5/10") == 2


def test_a_run_begun_anew_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
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
def test_a_failing_wandb_is_told_once_and_the_log_goes_on(
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


def test_wandb_without_the_package_or_a_key_is_told_and_the_log_goes_on(
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
    records = [record(1, mfu=None), record(2, eval_loss=2.0), record(3, tokens_per_second=80.0, eval_loss=3.0)]
    summary = metrics.summarise(records)
    assert (summary["steps"], summary["tokens"], summary["tokens_per_second"]) == (3, 300, 50.0)
    assert (summary["best_eval_loss"], summary["mfu"], summary["final_loss"]) == (2.0, None, 4.0 / 3)
