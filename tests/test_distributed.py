"""Processes that find their job, or none, the watchdog that ends a run which hangs, and arrays over the mesh."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of
from jax._src.lib import _jax
from jax.sharding import PartitionSpec

from lacuna import distributed
from lacuna.config import UserError
from lacuna.distributed import Stop, Watchdog, put_batch, shard_rows
from lacuna.model import embed, forward, initial_params, read_model_config


def test_jax_still_has_the_private_names_that_jobs_are_found_and_agree_by() -> None:
    kinds = distributed.ClusterEnv._cluster_types
    assert {"slurm", "ompi"} <= {kind.name for kind in kinds if not kind.opt_in_only_method}
    assert not any(kind.is_env_present() for kind in kinds if not kind.opt_in_only_method)
    assert distributed.global_state.client is None
    store = _jax.DistributedRuntimeClient
    assert all(hasattr(store, name) for name in ("key_value_set", "blocking_key_value_get", "key_value_delete"))


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
    assert "coordinator_address" not in calls[0] and calls[0]["heartbeat_timeout_seconds"] > 24 * 3600


@pytest.mark.parametrize(
    "described",
    [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "two", "JAX_COORDINATOR_ADDRESS": "a:1"}],
)
def test_half_a_description_of_a_job_is_refused(described: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID describe a job together"), distributed.cluster():
        pass


class Ends:
    """Takes down what would end this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines = list[str]()
        for name in ("end_job", "exit_at_once"):
            monkeypatch.setattr(distributed, name, lambda line, code, name=name: self.lines.append(f"{code}: {line}"))
        for name, value in {"STALL_SECONDS": 3.0, "STALL_MEDIANS": 2, "HEARTBEAT_SECONDS": 3}.items():
            monkeypatch.setattr(distributed, name, value)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    return Ends(monkeypatch)


def look(watcher: Any, count: int) -> None:
    """Let so many seconds pass for who looks once a second."""
    for _ in range(count):
        watcher.look()


def test_a_watchdog_ends_a_job_that_reports_nothing_more_and_logs_the_stacks(tmp_path: Path, ends: Ends) -> None:
    watchdog = Watchdog(tmp_path / "log")
    watchdog.report_progress()
    look(watchdog, 3)
    assert ends.lines == []
    look(watchdog, 1)
    assert ends.lines == [f"124: no step has finished for 4 s, so this run has hung; its stacks are in {watchdog.log}"]
    text = (tmp_path / "log").read_text()
    assert ends.lines[0].endswith(text.splitlines()[0]) and "hread 0x" in text and "File " in text


def test_a_watchdog_waits_for_data_as_long_as_they_come(tmp_path: Path, ends: Ends) -> None:
    watchdog = Watchdog(tmp_path / "log")
    watchdog.report_progress()
    with watchdog.waiting(lambda: watchdog.looks // 3 if watchdog.looks < 12 else "no more"):
        look(watchdog, 15)
        assert ends.lines == []
        look(watchdog, 1)
        assert len(ends.lines) == 1
    ends.lines.clear()
    watchdog.report_progress()
    look(watchdog, 9)  # twice the usual interval, and one more
    assert len(ends.lines) == 1  # what came before is no sign of what hangs now


def test_a_watchdogs_clock_stands_still_before_the_first_report_and_during_a_pause(tmp_path: Path, ends: Ends) -> None:
    watchdog = Watchdog(tmp_path / "log")
    look(watchdog, 9)
    watchdog.report_progress()
    watchdog.pause()
    look(watchdog, 9)
    watchdog.report_progress()
    look(watchdog, 3)
    assert ends.lines == []
    look(watchdog, 1)
    assert len(ends.lines) == 1


def test_a_watchdog_allows_for_as_many_of_the_usual_intervals(tmp_path: Path, ends: Ends) -> None:
    watchdog = Watchdog(tmp_path / "log")
    for seconds in (0, 4, 4, 1):
        look(watchdog, seconds)
        watchdog.report_progress()
    ends.lines.clear()
    look(watchdog, 8)
    assert ends.lines == []
    look(watchdog, 1)
    assert len(ends.lines) == 1


def test_a_process_that_was_stopped_did_not_hang(tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the machine runs on while a process is stopped; the watchdog's must not."""
    watchdog = Watchdog(tmp_path / "log")
    watchdog.report_progress()
    look(watchdog, 1)
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000))
    look(watchdog, 1)
    assert ends.lines == []


def test_a_watchdog_looks_until_its_context_ends(tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "WATCH_SECONDS", 0.001)
    watchdog = Watchdog(tmp_path / "log")
    with distributed.repeated(watchdog.look):
        while watchdog.looks < 3:
            time.sleep(0.001)
    time.sleep(0.05)
    looks = watchdog.looks
    time.sleep(0.05)
    assert watchdog.looks == looks


class FakeStore:
    """The store of a job with three processes, of which the others give signs when told."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.is_gone = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        if self.is_gone:
            raise RuntimeError("no one there")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return list(self.values.items())


def test_a_watchdog_waits_for_another_process_whose_data_come(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ours, other = FakeStore(), Watchdog(tmp_path / "log"), Watchdog(tmp_path / "other")
    monkeypatch.setattr(distributed, "store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ours.report_progress()
    other.report_progress()
    with other.waiting(lambda: min(other.looks, 9)):
        for _ in range(12):
            look(ours, 1)
            look(other, 1)
    assert ends.lines == []
    look(ours, 4)
    assert len(ends.lines) == 1 and ends.lines[0].endswith(str(ours.log))


@pytest.mark.parametrize("own", [0, 1])
def test_a_process_that_gives_no_sign_for_a_while_ends_the_job_but_a_pause_of_all_does_not(
    own: int, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, beats = FakeStore(), distributed.Heartbeats()
    monkeypatch.setattr(distributed, "store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: own)
    for number in range(9):
        store.values |= {f"lacuna/beats/{other}": str(number) for other in range(3)}
        beats.exchange()
        beats.look()
    assert ends.lines == []
    for number in range(2):
        store.values |= {f"lacuna/beats/{1 - own}": f"on {number}"}
        beats.exchange()
        beats.look()
    assert ends.lines == ["1: process 2 has given no heartbeat for 3 s"]
    ends.lines.clear()
    beats = distributed.Heartbeats()
    beats.exchange()
    store.is_gone = True
    for _ in range(3):
        beats.exchange()
        beats.look()
    assert ends.lines[0].startswith("1: process 0 has given no heartbeat for 3 s; to continue from")


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_closes_asks_to_stop_unless_that_is_ignored_as_under_nohup(is_ignored: bool) -> None:
    said, usual = list[str](), signal.getsignal(signal.SIGHUP)
    before = signal.SIG_IGN if is_ignored else signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)
    try:
        stop = Stop()
        with stop.listening(said.append):
            os.kill(os.getpid(), signal.SIGHUP)
            stop.asked_at -= 100
            os.kill(os.getpid(), signal.SIGHUP)  # comes again, and is no wish to leave at once
        assert stop.is_due(1) is not is_ignored and len(said) == (not is_ignored)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, usual)


# Directories


def test_a_lock_is_not_inherited_by_a_process_that_its_holder_forked(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom lacuna.distributed import held_directory\n"
        "with held_directory(Path(sys.argv[1])):\n    child = os.fork()\n    if child == 0:\n        time.sleep(100)\n"
        "    print(child, flush=True)\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"process {holder.pid} on .* is using this run"):
                with distributed.held_directory(tmp_path / "run"):
                    pass
            holder.kill()
            holder.wait()
            with distributed.held_directory(tmp_path / "run"):
                assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on")
        finally:
            os.kill(child, signal.SIGKILL)


# Devices


def test_rows_of_a_batch_lie_in_parts_on_the_data_axes() -> None:
    batch = {"token": np.arange(3 * 8 * 5).reshape(3, 8, 5), "weight": np.arange(24.0).reshape(3, 8)}
    mesh = mesh_of(2, 2, 2)
    for name, leaf in put_batch(batch, mesh).items():
        assert leaf.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
        for shard in leaf.addressable_shards:
            (data, fsdp, _), first = np.argwhere(mesh.devices == shard.device)[0], 0
            first = 2 * (2 * data + fsdp)
            np.testing.assert_array_equal(shard.data, batch[name][:, first : first + 2])


def test_rows_are_sharded_as_stated_and_left_alone_without_a_mesh() -> None:
    x = jnp.ones((8, 4))
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert jax.jit(shard_rows)(x).sharding.shard_shape(x.shape) == (2, 4)
    assert jax.jit(shard_rows)(x).sharding.is_fully_replicated


def stated_rows(jaxpr: Any) -> list[tuple[int, ...]]:
    """Shapes that a program states to lie in rows over the data axes, those of inner programs too."""
    shapes = []
    for each in jaxpr.eqns:
        if each.primitive.name == "sharding_constraint" and each.params["sharding"].spec[0] == ("data", "fsdp"):
            shapes.append(each.outvars[0].aval.shape)
        inner = [part.jaxpr if hasattr(part, "jaxpr") else part for part in each.params.values()]
        shapes += [shape for part in inner if hasattr(part, "eqns") for shape in stated_rows(part)]
    return shapes


def test_the_residual_stream_is_stated_to_be_sharded_when_embedded_and_twice_in_a_layer() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    params = jax.eval_shape(lambda key: initial_params(key, model), jax.random.key(0))
    token = jax.ShapeDtypeStruct((8, 16), np.int32)

    def hidden(params: Any, token: Any) -> Any:
        return forward(params, embed(params, token, "float32"), token, token, model)

    with jax.set_mesh(mesh_of(2, 2, 1)):
        program = jax.make_jaxpr(hidden)(params, token)
    assert stated_rows(program.jaxpr).count((8, 16, model.embed)) == 3


@pytest.mark.parametrize("sizes", [(3, 0, 1), (2, 2, 4), (16, 0, 1)])
def test_a_mesh_that_is_not_all_devices_is_refused_with_a_way_out(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="but the devices are 8; choose divisors of 8, and fsdp = 0"):
        distributed.make_mesh(*sizes)


def test_fsdp_of_zero_takes_the_devices_left_over() -> None:
    assert dict(distributed.make_mesh(2, 0, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_axis_that_does_not_divide_the_model_is_refused_with_those_that_do() -> None:
    sizes = {"embed": 32, "vocab": 160, "kv_head": 6, "feedforward": 48}
    distributed.check_divisible(mesh_of(1, 4, 2), sizes)
    with pytest.raises(
        UserError, match="tensor = 4 does not divide the model's kv_head = 6; set tensor to a divisor of 2"
    ):
        distributed.check_divisible(mesh_of(1, 2, 4), sizes)
