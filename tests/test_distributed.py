"""Processes that find their job, or none, the watchdog that ends a run which hangs, and arrays over the mesh."""

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
from lacuna.distributed import Watchdog, put_batch, shard_rows
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
    assert "coordinator_address" not in calls[0] and calls[0]["heartbeat_timeout_seconds"] == 20


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
        return forward(params, embed(params, token), token, token, model)

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
