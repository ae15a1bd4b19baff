"""Processes that find their job, or none, and the watchdog that ends a run which hangs."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lacuna import distributed
from lacuna.config import UserError
from lacuna.distributed import Watchdog


def test_without_a_job_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("there is no job"))
    with distributed.cluster():
        assert distributed.to_first("name", "value") == ["value"]
        assert distributed.from_first("name", "value") == "value"
        distributed.check_same("name", "value")


def test_a_job_of_slurm_is_joined_as_jax_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def initialize(**arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("no one there")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    with pytest.raises(UserError, match="can't be reached: no one there"), distributed.cluster():
        pass
    assert "coordinator_address" not in calls[0] and calls[0]["heartbeat_timeout_seconds"] == 60


@pytest.mark.parametrize(
    "described",
    [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "two", "JAX_COORDINATOR_ADDRESS": "a:1"}],
)
def test_half_a_description_of_a_job_is_refused(described: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID describe a job together"), distributed.cluster():
        pass


class Stall:
    """A watchdog that looks often and allows for 1 s and 2 usual intervals, on a clock that the test sets."""

    def __init__(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WATCH_SECONDS": 0.005, "STALL_SECONDS": 1.0, "STALL_MEDIANS": 2}.items():
            monkeypatch.setattr(distributed, name, value)
        self.now, self.lines, self.watchdog = 0.0, list[str](), Watchdog(log)
        monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(distributed, "end_job", lambda line, code: self.lines.append(f"{code}: {line}"))

    def is_noticed_at(self, now: float) -> bool:
        """Whether the watchdog, looking at this time, would end the job."""
        self.now, before = now, len(self.lines)
        time.sleep(0.1)
        return len(self.lines) > before


def test_a_watchdog_ends_a_job_that_reports_nothing_more_and_logs_the_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(tmp_path / "log", monkeypatch)
    with stall.watchdog.watching():
        stall.watchdog.report_progress()
        assert not stall.is_noticed_at(0.9)
        assert stall.is_noticed_at(2.0)
    assert stall.lines[0].startswith("124: no step has finished for 2 s") and str(tmp_path / "log") in stall.lines[0]
    text = (tmp_path / "log").read_text()
    assert stall.lines[0].endswith(text.splitlines()[0]) and "Thread 0x" in text and "in is_noticed_at" in text


def test_a_watchdogs_clock_stands_still_before_the_first_report_during_a_pause_and_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(tmp_path / "log", monkeypatch)
    with stall.watchdog.watching():
        assert not stall.is_noticed_at(100.0)
        stall.watchdog.report_progress()
        stall.watchdog.pause()
        assert not stall.is_noticed_at(200.0)
        stall.watchdog.report_progress()
        assert not stall.is_noticed_at(200.9)
        assert stall.is_noticed_at(202.0)
    time.sleep(0.05)
    assert not stall.is_noticed_at(300.0)


def test_a_watchdog_allows_for_as_many_of_the_usual_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stall = Stall(tmp_path / "log", monkeypatch)
    with stall.watchdog.watching():
        for stall.now in (0.0, 3.0, 6.0, 6.1):
            stall.watchdog.report_progress()
        assert not stall.is_noticed_at(12.0)
        assert stall.is_noticed_at(12.2)


def test_the_watchdog_ends_what_stands_still_but_not_what_moves_or_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(distributed, "PULSE_SECONDS", 0.02)
    monkeypatch.setattr(distributed, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(distributed, "end_job", lambda line, code: ended.append(code))
    steps = iter(range(1_000_000))
    for moving in (lambda: next(steps), lambda: None):
        with distributed.watchdog(moving, tmp_path / "log"):
            time.sleep(0.8)
    assert not ended and not (tmp_path / "log").exists()
    with distributed.watchdog(lambda: 1, tmp_path / "log"):
        time.sleep(0.8)
    assert ended and set(ended) == {124} and "Thread 0x" in (tmp_path / "log").read_text()
