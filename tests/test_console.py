"""Runs that outlive their console: a reader that leaves, a full disk, a terminal that closes, a narrow encoding."""

import os
import pty
import sys
from pathlib import Path

import pytest

from lacuna import cli
from lacuna.metrics import RunLog

LINE = "Nora → 18 naïve marbles"


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


CONSOLES = {"reader": closed_pipe, "terminal": closed_terminal, "disk": lambda: os.open("/dev/full", os.O_WRONLY)}


def log_a_run(directory: Path) -> None:
    with RunLog(directory, 2) as log:
        for step in (1, 2):
            log.step({"step": step, "loss": 1.0})
        log.info(LINE)
    print("the end", file=sys.stderr, flush=True)
    print("the end", flush=True)


@pytest.mark.parametrize("console", CONSOLES)
def test_a_run_goes_on_without_its_console_and_its_files_hold_it_all(
    console: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(CONSOLES[console](), "w") as stream:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        cli.prepare_streams(outlives_console=True)
        log_a_run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "run.log").read_text().endswith(f"{LINE}\n")


def test_a_run_whose_streams_were_closed_before_its_start_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli.prepare_streams(outlives_console=True)
    with sys.stdout, sys.stderr:
        log_a_run(tmp_path)
    assert (tmp_path / "run.log").read_text().endswith(f"{LINE}\n")


@pytest.mark.parametrize("outlives_console", [True, False])
def test_characters_that_the_encoding_lacks_are_escaped(
    outlives_console: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "out").open("w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        cli.prepare_streams(outlives_console)
        log_a_run(tmp_path / "run")
    assert r"Nora \u2192 18 naïve marbles" in (tmp_path / "out").read_text("latin-1")
    assert (tmp_path / "run" / "run.log").read_text().endswith(f"{LINE}\n")
