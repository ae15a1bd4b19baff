"""Processes and devices: joining a cluster, agreeing and stopping together, and arrays over the mesh of all devices.

Processes talk through the key-value store of JAX's coordination service, never through collectives on the devices, so
whatever they agree on may happen in a thread while the devices train. The store has no public name yet.
"""

import faulthandler
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from lacuna.config import DeviceKeys, UserError

ROW_AXES = ("data", "fsdp")
AXIS_RULES: dict[str, str] = {"embed": "fsdp", "vocab": "tensor", "kv_head": "tensor", "feedforward": "tensor"}
HEARTBEAT_SECONDS = 20.0
PULSE_SECONDS = 1.0
AGREEMENT_SECONDS = 7 * 24 * 3600.0
WATCH_SECONDS = 1.0
STALL_SECONDS, STALL_MEDIANS = 300.0, 20
ECHO_SECONDS = 1.0
STALL_EXIT_CODE = 124  # as of timeout(1)
AGAIN = "the same command with --resume goes on from the newest checkpoint"

# Processes


@contextmanager
def cluster() -> Generator[None]:
    """This process among those of its job; if one of them fails, all end with a line that says which and why.

    A job is described by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as by scripts/launch.sh, or
    found by JAX (SLURM, Open MPI, Cloud TPU, Kubernetes); without one, nothing is called.
    """
    job = described_job()
    if job is None and not any(
        kind.is_env_present() for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script starts what it does not wait for without
    try:
        jax.distributed.initialize(
            **(job or {}), heartbeat_timeout_seconds=int(3 * HEARTBEAT_SECONDS), shutdown_timeout_seconds=60
        )
    except RuntimeError as error:
        raise UserError(f"the other processes of this job can't be reached: {error}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    has_left = threading.Event()
    for watch in (pulse, listen, hold_on):
        threading.Thread(target=watch, args=(has_left,), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, UserError | KeyboardInterrupt):
            time.sleep(2 * PULSE_SECONDS)  # what ends another process often fails here too; its reason comes meanwhile
        has_left.set()
        fail(error)
    has_left.set()
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)  # threads that wait in JAX's store could abort the interpreter while it cleans up


def described_job() -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that the environment spells out.

    Raises:
        UserError: a part of the description is missing, or no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name, "") for name in names]
    if not any(values[1:]):
        return None
    if not values[0] or not values[1].isdecimal() or not values[2].isdecimal():
        raise UserError(f"{', '.join(names)} describe a job together, but are {values}; see scripts/launch.sh")
    return {"coordinator_address": values[0], "num_processes": int(values[1]), "process_id": int(values[2])}


def is_first() -> bool:
    """Whether this process is the one that speaks, logs and decides for all."""
    return jax.process_index() == 0


def to_first(name: str, value: str) -> list[str]:
    """What each process gives for `name`, in their order, waited for and told to the first process alone."""
    if jax.process_count() == 1:
        return [value]
    publish(name, value)
    if not is_first():
        return []
    values = [ask(f"{name}/{process}") for process in range(jax.process_count())]
    store().key_value_delete(f"lacuna/{name}/")
    return values


def from_first(name: str, value: str) -> str:
    """What the first process gives for `name`; a name serves once."""
    if jax.process_count() == 1:
        return value
    if is_first():
        publish(name, value)
    return ask(f"{name}/0")


def store() -> Any:
    """The job's key-value store."""
    return global_state.client


def publish(name: str, value: str) -> None:
    store().key_value_set(f"lacuna/{name}/{jax.process_index()}", value)


def ask(key: str) -> str:
    return store().blocking_key_value_get(f"lacuna/{key}", int(AGREEMENT_SECONDS * 1000))


def check_same(name: str, value: str) -> None:
    """Refuse to go on where a process has another value than the first."""
    values = to_first(name, value)
    if other := [process for process, given in enumerate(values) if given != values[0]]:
        raise UserError(
            f"{name} differ between process 0 and process {', '.join(map(str, other))}; each process must be started "
            "with the same command and read the same files"
        )


def pulse(has_left: threading.Event) -> None:
    """Show this process's heartbeat to the first one, which tells all when another's has stopped."""
    client, index = store(), global_state.process_id
    last_change: dict[str, tuple[str, float]] = {}
    beat = 0
    with suppress(Exception):  # whatever ends the service is heard by `listen`
        while not has_left.wait(PULSE_SECONDS):
            beat += 1
            client.key_value_set(f"lacuna/pulse/{index}", str(beat), allow_overwrite=True)
            now = time.monotonic()
            for key, value in client.key_value_dir_get("lacuna/pulse/") if index == 0 else ():
                if last_change.setdefault(key, (value, now))[0] != value:
                    last_change[key] = (value, now)
                if value != "left" and now - last_change[key][1] > HEARTBEAT_SECONDS:
                    process = key.rpartition("/")[2]
                    line = (
                        f"process {process} has not been heard of for {HEARTBEAT_SECONDS:.0f} s, so it is gone; {AGAIN}"
                    )
                    client.key_value_set("lacuna/failure", line)
        client.key_value_set(f"lacuna/pulse/{index}", "left", allow_overwrite=True)


def listen(has_left: threading.Event) -> None:
    """End this process with one line when another has failed."""
    try:
        line = store().blocking_key_value_get("lacuna/failure", int(AGREEMENT_SECONDS * 1000))
    except Exception as error:  # of the coordination service, whose kinds are not public
        line = f"process 0 is gone, and with it the job ({str(error).splitlines()[0]}); {AGAIN}"
    if not has_left.is_set():
        leave_at_once(line, 1)


def hold_on(has_left: threading.Event) -> None:
    """End this process as soon as the connection that it has to the first one breaks.

    JAX ends it then too, a moment later, but with a stack trace in place of a line.
    """
    with suppress(Exception):  # without this connection the process ends all the same, only later
        if is_first():
            with socket.create_server(("", 0)) as server:
                publish("lifeline", str(server.getsockname()[1]))
                _connections = [server.accept()[0] for _ in range(jax.process_count() - 1)]
                threading.Event().wait()  # they are to last as long as this process does
        host, port = str(global_state.coordinator_address).rpartition(":")[0], int(ask("lifeline/0"))
        with socket.create_connection((host, port)) as connection:
            connection.recv(1)
        if not has_left.is_set():
            leave_at_once(f"process 0 is gone, and with it the job; {AGAIN}", 1)


def fail(error: BaseException) -> None:
    """End this process of a job, and by it the others, for an error or an interrupt."""
    code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
    if code == 1:
        traceback.print_exception(error)
    lines = {2: str(error), 130: "interrupted"}
    end_job(lines.get(code, f"{type(error).__name__}: {error}"), code)


def end_job(line: str, code: int) -> NoReturn:
    """End this process, and tell the others why; silently, if another was first to tell."""
    where = f"process {global_state.process_id} on {socket.gethostname()}"
    try:
        if store() is not None:
            store().key_value_set("lacuna/failure", f"{where} ended: {line.splitlines()[0][:500]}")
    except Exception:
        line = ""
    leave_at_once(line, code)


def leave_at_once(line: str, code: int) -> NoReturn:
    """End the process without the exit barrier of the job, in which it would wait for minutes."""
    if line:
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if store() is not None and global_state.process_id == 0:
        time.sleep(2 * PULSE_SECONDS)  # the store ends with this process, and the others are to hear of it first
    os._exit(code)


class Stop:
    """Whether someone asked to stop: SIGTERM or Ctrl-C once lets the step finish, a second time leaves at once.

    In a job of several processes JAX's own handler of SIGTERM makes all of them agree on the step. What follows within
    a second is an echo of the first: a launcher such as uv hands on a signal that the whole group has had already.
    """

    is_asked = False
    asked_at = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; to be called at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.is_asked

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Generator[None]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            if self.is_asked and time.monotonic() - self.asked_at > ECHO_SECONDS:
                raise KeyboardInterrupt
            if self.is_asked:
                return
            self.is_asked, self.asked_at = True, time.monotonic()
            say("stopping after this step; once more to leave at once")
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)

        numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Watchdog:
    """Ends the process when nothing was reported for 300 s and for 20 of its usual intervals.

    Its clock stands still until the first report.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.reported_at: float | None = None
        self.intervals: deque[float] = deque(maxlen=100)

    def report_progress(self) -> None:
        """A unit of work is done; the clock runs from now on."""
        now, before = time.monotonic(), self.reported_at
        self.reported_at = now
        if before is not None:
            self.intervals.append(now - before)

    def pause(self) -> None:
        """What comes now may take its time, such as compiling: the clock stands still until the next report."""
        self.reported_at = None

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch in a thread of its own; on a stall the stacks of all threads go to the log."""
        has_ended = threading.Event()

        def watch() -> None:
            while not has_ended.wait(WATCH_SECONDS):
                since = self.reported_at
                seconds = time.monotonic() - since if since is not None else 0.0
                if seconds > max(STALL_SECONDS, STALL_MEDIANS * statistics.median(tuple(self.intervals) or (0.0,))):
                    line = (
                        f"no step has finished for {seconds:.0f} s, so this run has hung; its stacks are in {self.log}"
                    )
                    with self.log.open("a") as file:
                        print(line, file=file, flush=True)
                        faulthandler.dump_traceback(file, all_threads=True)
                    end_job(line, STALL_EXIT_CODE)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            has_ended.set()


@contextmanager
def watchdog(finished: Callable[[], int | None], log: Path) -> Generator[None]:
    """End the process when `finished`, a count of steps, does not grow for 300 s and 20 of its usual steps.

    The stacks of all threads go to `log`. While the count is None, as during compilation, time does not run.
    """
    has_ended = threading.Event()

    def watch() -> None:
        count, since, seconds = finished(), time.monotonic(), deque[float](maxlen=100)
        while not has_ended.wait(PULSE_SECONDS):
            now, current = time.monotonic(), finished()
            if current is None or current != count:
                if current is not None and count is not None:
                    seconds.append((now - since) / (current - count))
                count, since = current, now
            elif now - since > max(STALL_SECONDS, STALL_MEDIANS * statistics.median(seconds or [0.0])):
                line = f"no step has finished for {now - since:.0f} s, so this run has hung; its stacks are in {log}"
                with log.open("a") as file:
                    print(line, file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                end_job(line, STALL_EXIT_CODE)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


# Devices


def enable_compilation_cache(config: DeviceKeys) -> None:
    """Keep compiled programs on disk, small ones too."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(config.cache_dir / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_mesh(data_parallel: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over those given; `fsdp` = 0 takes what the other two leave over.

    Raises:
        UserError: the three numbers do not multiply to the number of devices.
    """
    count = len(devices) if devices else jax.device_count()
    shape = (data_parallel, fsdp or max(count // (data_parallel * tensor), 1), tensor)
    if math.prod(shape) != count:
        raise UserError(
            f"data_parallel × fsdp × tensor = {' × '.join(map(str, shape))} = {math.prod(shape)}, but the devices "
            f"are {count}; choose divisors of {count}, and fsdp = 0 for those left over"
        )
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


def check_divisible(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh axis that does not divide a logical axis it shards."""
    for axis, mesh_axis in AXIS_RULES.items():
        if sizes[axis] % mesh.shape[mesh_axis]:
            shared = math.gcd(*(sizes[other] for other, rule in AXIS_RULES.items() if rule == mesh_axis))
            raise UserError(
                f"{mesh_axis} = {mesh.shape[mesh_axis]} does not divide the model's {axis} = {sizes[axis]}; "
                f"set {mesh_axis} to a divisor of {shared}"
            )


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split; without a mesh there is one."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)


def platform() -> str:
    """What the devices of the mesh in force are: cpu, gpu or tpu; this machine's, if there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shard(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """State over which axes of the mesh in force, if there is one, leading axes of `x` lie; the others are whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def shard_rows(x: Array) -> Array:
    """State that the leading axis lies over the data axes of the mesh in force, if there is one."""
    return shard(x, ROW_AXES)


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree[Array]:
    """Host arrays [micro_batch, row, …], the same on every process, on the devices, rows split over the data axes."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), batch)
