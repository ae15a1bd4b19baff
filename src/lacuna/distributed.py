"""Processes and devices: joining a job, agreeing and stopping together, and arrays over the mesh of all devices.

Processes talk through the key-value store of JAX's coordination service, never through collectives on the devices, so
whatever they agree on may happen in a thread while the devices train.
"""

import faulthandler
import fcntl
import math
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import Counter, deque
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

from lacuna.config import DeviceKeys, ModelKeys, RowsConfig, UserError

ROW_AXES = ("data", "fsdp")
AXIS_RULES: dict[str, str] = {"embed": "fsdp", "vocab": "tensor", "kv_head": "tensor", "feedforward": "tensor"}
HEARTBEAT_SECONDS: int = 60
GRACE_SECONDS = 2.0  # in which the reason of a failure reaches the other processes
AGREEMENT_SECONDS = 7 * 24 * 3600
ECHO_SECONDS = 1.0
WATCH_SECONDS = 1.0
STALL_SECONDS, STALL_MEDIANS = 300.0, 20
STALL_EXIT_CODE = 124  # as of timeout(1)
FAILURE = "lacuna/failure"
LOCK = "lock"
CONTINUE = "to continue from the newest checkpoint, run the same command with --resume"
IS_LEAVING = threading.Event()  # set once this process ends, whatever becomes of the others

# Processes


@contextmanager
def cluster() -> Generator[None]:
    """This process as one of its job's; if one of them fails, all end with a line that says which and why.

    A job is described by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as by scripts/launch.sh, or
    found by JAX (SLURM, Open MPI, Cloud TPU, Kubernetes); without one, nothing is called.
    """
    job = described_job()
    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    if job is None and not any(kind.is_env_present() for kind in kinds):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shell scripts start background jobs without it
    try:
        jax.distributed.initialize(
            **(job or {}), heartbeat_timeout_seconds=AGREEMENT_SECONDS, shutdown_timeout_seconds=60
        )
    except RuntimeError as error:
        raise UserError(f"the other processes of this job can't be reached: {error}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    threading.Thread(target=await_failure, daemon=True).start()
    heartbeats = Heartbeats()
    try:
        with repeated(heartbeats.exchange), repeated(heartbeats.look):
            yield
    except UserError as error:
        end_job(str(error), 2)
    except KeyboardInterrupt:
        end_job("interrupted", 130)
    except BaseException as error:
        time.sleep(GRACE_SECONDS)  # it may follow from the failure of another process, whose reason ends this one
        traceback.print_exception(error)
        end_job(f"{type(error).__name__}: {error}", 1)
    IS_LEAVING.set()
    jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)  # threads that wait in JAX's store could abort the interpreter while it cleans up


def described_job() -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that the environment spells out.

    Raises:
        UserError: a part of the description is missing, or not a number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name, "") for name in names)
    if not count and not index:
        return None
    if not address or not count.isdecimal() or not index.isdecimal():
        raise UserError(
            f"{', '.join(names)} describe a job together, but are {[address, count, index]}; see scripts/launch.sh"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def is_first() -> bool:
    """Whether this process is the one that prints, logs and decides for all."""
    return jax.process_index() == 0


def store() -> Any:
    """The job's key-value store, which has no public name in JAX yet."""
    return global_state.client


def ask(key: str) -> str:
    """The value of a key in the store, waited for."""
    return store().blocking_key_value_get(key, AGREEMENT_SECONDS * 1000)


def to_first(name: str, value: str) -> list[str]:
    """In the first process, what each process gives for `name`, in order, waited for; in the others, nothing."""
    if jax.process_count() == 1:
        return [value]
    store().key_value_set(f"lacuna/{name}/{jax.process_index()}", value)
    if not is_first():
        return []
    values = [ask(f"lacuna/{name}/{process}") for process in range(jax.process_count())]
    store().key_value_delete(f"lacuna/{name}/")
    return values


def from_first(name: str, value: str) -> str:
    """What the first process gives for `name`, waited for; a name serves once."""
    if jax.process_count() == 1:
        return value
    if is_first():
        store().key_value_set(f"lacuna/{name}", value)
    return ask(f"lacuna/{name}")


def check_same(name: str, value: str) -> None:
    """Refuse to continue where a process has another value than the first."""
    values = to_first(name, value)
    if other := [process for process, given in enumerate(values) if given != values[0]]:
        raise UserError(
            f"{name} differ between process 0 and process {', '.join(map(str, other))}; start each process "
            "with the same command, reading the same files"
        )


def await_failure() -> None:
    """End this process with one line when another of its job has failed."""
    try:
        line = ask(FAILURE)
    except Exception as error:  # of the coordination service, whose kinds are not public
        line = f"process 0 is gone, and with it the job ({str(error).splitlines()[0]})"
    if not IS_LEAVING.is_set():
        exit_at_once(f"{line}; {CONTINUE}", 1)


class Heartbeats:
    """The signs of life that a job's processes give each other; only seconds count in which who listens runs as well.

    JAX's own heartbeats would end a job that was stopped as a whole, and then continued.
    """

    def __init__(self) -> None:
        self.given, self.latest, self.silence = 0, dict[str, str](), Counter[tuple[int, str]]()

    def exchange(self) -> None:
        """Give this process's sign, and take those of all; waits while the first process, which keeps them, stands."""
        self.given += 1
        with suppress(Exception):  # `await_failure` reports that the store is gone
            store().key_value_set(f"lacuna/beats/{jax.process_index()}", str(self.given), allow_overwrite=True)
            self.latest = dict(store().key_value_dir_get("lacuna/beats/"))

    def look(self) -> None:
        """End this process if another has given no new sign in the last 60 looks."""
        signs = [(process, self.latest.get(f"lacuna/beats/{process}", "")) for process in range(jax.process_count())]
        self.silence = Counter({sign: self.silence[sign] + 1 for sign in signs})
        silent = [process for process, sign in signs if self.silence[process, sign] >= HEARTBEAT_SECONDS]
        if jax.process_index() in silent:  # its own signs do not arrive, so the store is out of its reach too
            exit_at_once(f"process 0 has given no heartbeat for {HEARTBEAT_SECONDS} s; {CONTINUE}", 1)
        if silent:
            end_job(f"process {silent[0]} has given no heartbeat for {HEARTBEAT_SECONDS} s", 1)


@contextmanager
def repeated(work: Callable[[], None]) -> Generator[None]:
    """Do something once a second in a thread of its own, less often while this process stands still."""
    has_ended = threading.Event()

    def work_on() -> None:
        while not has_ended.wait(WATCH_SECONDS):
            work()

    threading.Thread(target=work_on, daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def end_job(line: str, code: int) -> NoReturn:
    """End this process, and with it the others of its job, which print why; silently, if another was first."""
    IS_LEAVING.set()
    if jax.process_count() > 1:
        where = f"process {jax.process_index()} on {socket.gethostname()}"
        try:
            store().key_value_set(FAILURE, f"{where} ended: {line.splitlines()[0][:500]}")
        except Exception:
            line = ""
    exit_at_once(line, code)


def exit_at_once(line: str, code: int) -> NoReturn:
    """End the process without the exit barrier of the job, in which it would wait for minutes."""
    if line:
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.process_count() > 1 and is_first():
        time.sleep(GRACE_SECONDS)  # the store ends with this process
    os._exit(code)


class Stop:
    """Whether someone asked to stop: SIGTERM, Ctrl-C or a terminal that closes lets the step finish; the first two, a
    second time, leave at once.

    In a job of several processes JAX's own handler of SIGTERM makes all of them agree on the step. What follows within
    a second is an echo of the first: a launcher such as uv forwards a signal that the whole group has had already.
    """

    is_asked = False
    asked_at = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; to be called at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.is_asked

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Generator[None]:
        """Listen to signals."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self.is_asked:
                if number != signal.SIGHUP and time.monotonic() - self.asked_at > ECHO_SECONDS:
                    raise KeyboardInterrupt
                return
            self.is_asked, self.asked_at = True, time.monotonic()
            say("stopping after this step; once more to leave at once")
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)

        numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Watchdog:
    """Ends the process when nothing was reported for 300 s and for 20 of its usual intervals.

    Its clock stands still until the first report, and while the process itself was stopped: it counts how often it has
    looked, which it is to do once a second. Data that come slowly are no stall, here or in another process of the job.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.looks = 0
        self.reported_at: int | None = None
        self.intervals: deque[float] = deque(maxlen=100)
        self.progress: Callable[[], Any] | None = None
        self.seen: Any = None
        self.heard = dict[str, str]()

    def report_progress(self) -> None:
        """A unit of work is done; the clock runs from now on."""
        now, before = self.looks, self.reported_at
        self.reported_at = now
        if before is not None:
            self.intervals.append((now - before) * WATCH_SECONDS)

    def pause(self) -> None:
        """What comes now may take its time, such as compiling: the clock stands still until the next report."""
        self.reported_at = None

    @contextmanager
    def waiting(self, progress: Callable[[], Any]) -> Generator[None]:
        """While data are waited for: the clock begins anew whenever `progress` says something else."""
        self.progress = progress
        yield
        self.progress = None

    def look(self) -> None:
        """End the job if it has stalled; the stacks of all threads go to the log."""
        self.looks += 1
        since = self.reported_at
        if since is not None and self.progress and (now := self.progress()) != self.seen:
            self.seen = now
            self.reported_at = since = self.looks
            if jax.process_count() > 1:
                store().key_value_set(f"lacuna/data/{jax.process_index()}", str(self.looks), allow_overwrite=True)
        seconds = (self.looks - since) * WATCH_SECONDS if since is not None else 0.0
        if seconds > max(STALL_SECONDS, STALL_MEDIANS * statistics.median(tuple(self.intervals) or (0.0,))):
            if jax.process_count() > 1 and (heard := dict(store().key_value_dir_get("lacuna/data/"))) != self.heard:
                self.heard, self.reported_at = heard, self.looks
                return
            line = f"no step has finished for {seconds:.0f} s, so this run has hung; its stacks are in {self.log}"
            with suppress(OSError), self.log.open("a") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            end_job(line, STALL_EXIT_CODE)


# Directories that one process of all holds


def describe_error(error: OSError) -> str:
    """Where and what, for a message."""
    return f"{error.filename or 'disk'}: {error.strerror or error}"


@contextmanager
def held_directory(directory: Path) -> Generator[None]:
    """Hold a directory for this job alone, by a lock file with its first process's number and host.

    The lock is of POSIX's kind, which processes that this one forks do not inherit.

    Raises:
        UserError: another process holds it, or it can't be written.
    """
    if not is_first():
        yield
        return
    path = directory / LOCK
    with writing_to(directory):
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(handle, 1000).decode() or "another process"
                os.close(handle)
                raise UserError(
                    f"{directory}: {holder} is using this run; wait for it, or choose another run_name"
                ) from error
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                break
            os.close(handle)  # its holder removed the file on leaving, just before it was locked here
    try:
        with suppress(OSError):  # a full disk takes no name, but the lock holds
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # not empty, as a run that began is
            directory.rmdir()


@contextmanager
def writing_to(directory: Path, fix: str = "fix that, or choose another output_dir") -> Generator[None]:
    """Turn what the file system refuses into a UserError that says how to fix it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{directory}: {describe_error(error)}; {fix}") from error


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


def fast_dtype(config: ModelKeys, platform: str) -> str:
    """What `compute_dtype = "auto"` stands for on devices of a platform: bfloat16, but on a CPU float32 for all that
    decodes, as its cache is converted at each token, and for training without instructions for bfloat16."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "bfloat16" if platform != "cpu" or (isinstance(config, RowsConfig) and multiplies_bfloat16()) else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, by Linux' list of what it has."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and bool(re.search("amx_bf16|avx512_bf16", path.read_text()))


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


def are_ready(figures: Mapping[str, Any]) -> bool:
    """Whether the devices have computed all these arrays, of which there are some."""
    return bool(figures) and all(figure.is_ready() for figure in figures.values())
