"""Runs a command of lacuna with a fault built in: python tests/faults.py KIND STEP COMMAND ARGUMENTS…

The fault strikes the process from outside the code under test: what is patched here calls the original and then
kills, signals, raises or hangs, so src/ knows nothing of it.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lacuna import checkpoint, cli, distributed, metrics, trainer
from lacuna.apps import report


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, strike: Callable[[], None], is_due: Callable[..., bool]) -> None:
    usual = getattr(owner, name)

    def patched(*arguments: Any, **named: Any) -> Any:
        if is_due(*arguments):
            strike()
        return usual(*arguments, **named)

    setattr(owner, name, patched)


def after(owner: Any, name: str, strike: Callable[[], None], is_due: Callable[..., bool]) -> None:
    usual = getattr(owner, name)

    def patched(*arguments: Any, **named: Any) -> Any:
        result = usual(*arguments, **named)
        if is_due(*arguments):
            strike()
        return result

    setattr(owner, name, patched)


def sleep() -> None:
    """Sleep for ever, waking often, as a signal that comes just before a long sleep is only seen after it."""
    while True:
        time.sleep(0.1)


def fail() -> None:
    raise RuntimeError("a fault of the test's own")


def build_in(kind: str, step: int) -> None:
    """Patch lacuna so that the fault strikes at a step."""

    def in_checkpoint(path: Path, *_: Any) -> bool:
        return f"step_{step:08}" in str(path)

    def is_logged(log: Any, record: dict[str, Any]) -> bool:
        return record["step"] == step

    def is_reached(rows: trainer.RowSteps, index: int) -> bool:
        return index == step

    match kind:
        case "none":
            pass
        case "kill":
            after(metrics.RunLog, "step", kill, is_logged)
        case "kill before the rename":
            before(checkpoint, "replace_directory", kill, in_checkpoint)
        case "kill during retention":

            def remove_half(path: Path, **_: Any) -> None:
                if path.name.endswith(".old"):
                    next(path.glob("*.safetensors")).unlink()
                    kill()

            after(checkpoint, "replace_directory", lambda: setattr(shutil, "rmtree", remove_half), in_checkpoint)
        case "term":
            before(trainer.RowSteps, "prepare", lambda: os.kill(os.getpid(), signal.SIGTERM), is_reached)
        case "raise":
            before(trainer.RowSteps, "prepare", fail, is_reached)
        case "sleep":
            before(trainer.RowSteps, "prepare", sleep, is_reached)
        case "short heartbeat":
            distributed.HEARTBEAT_SECONDS = 5
        case "hang":
            distributed.STALL_SECONDS = 3.0
            before(trainer.RowSteps, "prepare", sleep, is_reached)
        case _:
            raise SystemExit(f"no fault {kind!r}")


if __name__ == "__main__":
    setattr(report, "plot", lambda *_: ("", 0))  # noqa: B010  # curves take a second
    build_in(sys.argv[1], int(sys.argv[2]))
    cli.start(sys.argv[3], sys.argv[4:])
