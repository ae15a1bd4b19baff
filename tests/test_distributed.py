"""Processes that find their job, or none, and the watchdog that ends a run which hangs."""

import time
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import mesh_of

from lacuna import distributed
from lacuna.config import UserError


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


def test_compiler_options_are_for_several_gpus_and_give_way_to_xla_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "xla_gpu_experimental_parallel_collective_overlap_limit"
    with jax.set_mesh(mesh_of(1, 8, 1)):
        assert distributed.compiler_options() == {}
        monkeypatch.setattr(distributed, "platform", lambda: "gpu")
        assert distributed.compiler_options() == {name: 2}
        monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 --{name}=1")
        assert distributed.compiler_options() == {}
    monkeypatch.delenv("XLA_FLAGS")
    with jax.set_mesh(mesh_of(1, 1, 1)):
        assert distributed.compiler_options() == {}
