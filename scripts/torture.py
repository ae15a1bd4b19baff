"""Kill a run again and again, damage its newest checkpoint in between, and see that nothing is lost.

    uv run python scripts/torture.py
    uv run python scripts/torture.py --campaign same --kills 5 --steps 40

Every start of a run is the same command with --resume, and ends in a SIGKILL: at start-up, in a step, within a save,
and the last one while the finished run is saved and exported. In the campaign `same` there is one device, and all
logged numbers and the exported model must equal an undisturbed run's bit for bit. In `changing` each start has other
devices and processes, sometimes one process of two is killed alone, and losses must be equal to 1e-5. Every run has a
cache of its own, so kills also strike while data are encoded and programs compiled. The seed fixes what is tried, not
the clock.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lacuna.checkpoint import checked_manifest, checkpoint_directory, content_hash, saved_steps
from lacuna.config import UserError
from lacuna.metrics import read_json_lines

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 5
SETTINGS = f"--save-every {SAVE_EVERY} --log-every 1 --eval-every 40 --keep 3 --batch-size 16 --micro-batch-size 2"
LAYOUTS = {"same": [(1, 1)], "changing": [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)]}  # processes, devices
LEARNING_RATE = {"same": "2e-3", "changing": "3e-4"}  # at 2e-3, undisturbed runs on 1 and 8 devices drift apart as well
AT_START, AT_THE_END = "at start-up", "at the end"
ONE_ALONE = ("in a step", "within a save")
MOMENTS = (AT_START, *ONE_ALONE)
FILES = {"shard": "shard-*.safetensors", "manifest": "manifest.json"}
HALF_WRITTEN = "half-written shard"
DAMAGE = (*map(" ".join, itertools.product(("flipped", "truncated", "empty", "missing"), FILES)), "newer manifest")
DAMAGE_SHARE = 0.6
STRIKE_SECONDS = {"in a step": 1.0, "within a save": 0.03, "at the end": 1.0}  # after the moment has come, at most
SAME_DATA = ("tokens", "target_tokens", "epoch")
SAME_NUMBERS = ("loss", "gradient_norm", "learning_rate", "eval_loss", "eval_accuracy")
LOSS_TOLERANCE = 1e-5
PATIENCE_SECONDS = 900
SURVIVOR_SECONDS = 60 + 10  # heartbeat and ten more


class Start(NamedTuple):
    """One start of a run, and where it is to be killed: at `moment`, once step `target` is logged."""

    run: Path
    steps: int
    learning_rate: str
    log: Path
    processes: int = 1
    devices: int = 1
    moment: str = ""
    target: int = 0


class End(NamedTuple):
    """How a start ended: the step it resumed from, none if it never got that far, and the last one logged."""

    codes: list[int]
    is_killed: bool
    is_half_written: bool
    survivor_seconds: float
    resumed: int | None
    reached: int


def main() -> None:
    """Both campaigns, and what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", choices=["same", "changing", "both"], default="both")
    parser.add_argument("--kills", type=int, default=30, help="in each campaign")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/torture"), help="must not exist yet")
    config = parser.parse_args()
    output = config.output_dir.resolve()
    if output.exists():
        sys.exit(f"{output} is there already; delete it, or choose another --output-dir")
    names = ["same", "changing"] if config.campaign == "both" else [config.campaign]
    figures: dict[str, dict[str, Any]] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in names:
            figures[name] = campaign(name, output / name, config.steps, config.kills, random.Random(config.seed))
    except KeyboardInterrupt:
        sys.exit(f"interrupted, all processes are ended; what they wrote is in {output}")
    problems = [f"{name}: {problem}" for name in names for problem in figures[name]["problems"]]
    print("\n".join(["", *problems, f"FAILED, see {output}" if problems else "nothing is lost"]))
    print(json.dumps(figures))
    sys.exit(bool(problems))


def campaign(name: str, directory: Path, steps: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """Figures of one run that is killed and damaged at random, and what is wrong with it, if anything."""
    began, whole, run, rate = time.monotonic(), directory / "whole", directory / "killed", LEARNING_RATE[name]
    directory.mkdir(parents=True)
    print(f"{name}: {steps} steps undisturbed", flush=True)
    start = Start(whole, steps, rate, directory / "whole.txt")
    problems = wrong_with(start, carried_out(start, 0, chance), 0, set())
    moments, layouts, kinds = (shuffled(items, chance) for items in (MOMENTS, LAYOUTS[name], (*DAMAGE, HALF_WRITTEN)))
    starts, struck, damage = Counter[str](), Counter[str](), Counter[str]()
    ends: list[End] = []
    damaged: set[int] = set()
    is_over = False
    while not (problems or is_over):
        left, first = kills - struck.total(), newest(run, damaged)
        room = steps - 2 * SAVE_EVERY - first  # the end is left to the last kill
        ahead = min(room, chance.randint(1, max(SAVE_EVERY + 1, 2 * room // max(left, 1))))
        moment = "" if left == 0 else AT_THE_END if left == 1 else next(moments) if room > 0 else AT_START
        target = steps if moment == AT_THE_END else first + ahead
        log = directory / f"start-{len(ends) + 1:03}.txt"
        start = Start(run, steps, rate, log, *next(layouts), moment, target)
        end = carried_out(start, started_in(whole), chance)
        problems, is_over = wrong_with(start, end, first, damaged), left == 0
        ends.append(end)
        starts[f"{start.processes} x {start.devices}"] += 1
        struck[moment] += end.is_killed
        if end.resumed is not None:
            damaged.clear()
        line = f"{len(ends):>4}  {summary(start, end)}"
        if left and len(set(saved_steps(run)) - damaged) > 1 and chance.random() < DAMAGE_SHARE:
            kind, step = next(kinds), newest(run, damaged)
            harm(checkpoint_directory(run, step), kind, chance)
            damage[kind] += 1
            damaged |= set() if kind == HALF_WRITTEN else {step}
            line += f"; then step {step} is harmed: {kind}"
        print(line, flush=True)
    largest, found = (None, problems) if problems else compared(whole, run, steps, name == "same")
    return {
        "steps": steps,
        "starts": starts,
        "kills": struck.total(),
        "kills_by_moment": +struck,
        "kills_that_left_a_half_written_save": sum(end.is_half_written for end in ends),
        "damage": damage.total(),
        "damage_by_kind": damage,
        "steps_redone": sum(end.reached - end.resumed for end in ends if end.resumed is not None) - steps,
        "survivor_seconds": max((end.survivor_seconds for end in ends), default=0),
        "largest_relative_loss_difference": largest,
        "problems": found,
        "seconds": round(time.monotonic() - began),
    }


def shuffled(items: Sequence[Any], chance: random.Random) -> Iterator[Any]:
    """The items in random order, all of them before any comes again."""
    while True:
        yield from chance.sample(items, len(items))


# One start


def carried_out(start: Start, start_seconds: float, chance: random.Random) -> End:
    """Start the run, kill it at its moment, or let it end where it has none."""
    before, survivor_seconds = unfinished(start.run), 0.0
    with started(start) as processes:
        match start.moment:
            case "":
                wait_for(lambda: False, processes)
            case "at start-up":
                strike = time.monotonic() + chance.uniform(0, start_seconds)
                wait_for(lambda: time.monotonic() > strike or has_stepped(start), processes)
            case moment:
                wait_for(lambda: has_stepped(start) and reached_step(start.run) >= start.target, processes)
                if moment == "within a save":
                    wait_for(lambda: bool(unfinished(start.run) - before), processes)
                time.sleep(chance.uniform(0, STRIKE_SECONDS[moment]))
        is_killed = all(process.poll() is None for process in processes)
        if is_killed and start.processes > 1 and start.moment in ONE_ALONE and chance.random() < 0.5:
            chance.choice(processes).kill()
            began = time.monotonic()
            wait_for(lambda: False, processes)
            survivor_seconds = time.monotonic() - began
    is_half_written = is_killed and bool(unfinished(start.run) - before)
    codes = [process.returncode for process in processes]
    return End(codes, is_killed, is_half_written, survivor_seconds, resumed_step(start.log), reached_step(start.run))


@contextmanager
def started(start: Start) -> Generator[list[subprocess.Popen[bytes]]]:
    """The processes of one start, which write to its log; all are gone when the context ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(start.processes)}
    common = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(start.devices),
        "XDG_CACHE_HOME": f"{start.run}-cache",
        **(job if start.processes > 1 else {}),
    }
    command = [
        Path(sys.executable).with_name("sft"), "@", "configs/sft_tiny.toml", *SETTINGS.split(), "--resume",
        "--steps", str(start.steps), "--learning-rate", start.learning_rate,
        "--output-dir", start.run.parent, "--run-name", start.run.name,
    ]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with start.log.open("wb") as log:
            for rank in range(start.processes):
                environment = os.environ | common | ({"JAX_PROCESS_ID": str(rank)} if start.processes > 1 else {})
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(is_so: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until something is so, or all processes have ended."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so() and any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            sys.exit(f"process {processes[0].pid} and its like have hung for {PATIENCE_SECONDS} s")
        time.sleep(0.003)


def harm(directory: Path, kind: str, chance: random.Random) -> None:
    """Damage a checkpoint."""
    fault, file = kind.split()
    path = chance.choice(sorted(directory.glob(FILES[file])))
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    match fault:
        case "flipped":
            content[place] ^= 1
            path.write_bytes(content)
        case "truncated":
            os.truncate(path, place)
        case "empty":
            os.truncate(path, 0)
        case "missing":
            path.unlink()
        case "newer":
            manifest = json.loads(content)["manifest"] | {"format": 99}
            path.write_text(json.dumps({"sha256": content_hash(manifest), "manifest": manifest}))
        case "half-written":
            scratch = directory.with_name(f"{directory.name}.torture.tmp")
            scratch.mkdir(exist_ok=True)
            (scratch / path.name).write_bytes(content[:place])


# What is found


def newest(run: Path, damaged: set[int]) -> int:
    """The step from which a run must resume."""
    return max(set(saved_steps(run)) - damaged, default=0)


def unfinished(run: Path) -> set[Path]:
    """Saves that were begun."""
    return {*run.glob("checkpoints/*.tmp")}


def reached_step(run: Path) -> int:
    """How many steps are logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resumed_step(log: Path) -> int | None:
    """The step from which a start says it resumes."""
    found = re.search(r"resuming from .*step_(\d+)|no checkpoint to resume from", log.read_text())
    return int(found[1] or 0) if found else None


def started_in(whole: Path) -> float:
    """Seconds until the undisturbed run had done its first step."""
    return json.loads((whole / "summary.json").read_text())["first_step_seconds"]


def has_stepped(start: Start) -> bool:
    """Whether a start has logged a step of its own, or has none to do."""
    resumed = resumed_step(start.log)
    return resumed is not None and reached_step(start.run) > min(resumed, start.steps - 1)


def summary(start: Start, end: End) -> str:
    """A line on a start."""
    where = f"{start.processes} × {start.devices} devices"
    steps = "no step" if end.resumed is None else f"steps {end.resumed:>3} to {end.reached:>3}"
    alone = f", one alone, the other ended {end.survivor_seconds:.1f} s later" if end.survivor_seconds else ""
    return f"{where}, {steps:16}, {f'killed {start.moment}{alone}' if end.is_killed else 'ended by itself'}"


def wrong_with(start: Start, end: End, first: int, damaged: set[int]) -> list[str]:
    """What one start did that it must not, given the newest good step and the damaged ones."""
    problems = []
    if not end.is_killed and any(end.codes):
        problems.append(f"ended by itself with exit codes {end.codes}")
    if end.survivor_seconds and 0 in end.codes:
        problems.append(f"one process was killed and the other ended well: {end.codes}")
    if end.survivor_seconds > SURVIVOR_SECONDS:
        problems.append(f"one process was killed and the other survived for {end.survivor_seconds:.0f} s")
    if end.resumed is not None:
        if end.resumed != first:
            problems.append(f"resumed from step {end.resumed}, not from {first}")
        names = [str(checkpoint_directory(start.run, step)) for step in damaged]
        text = start.log.read_text()
        problems += [f"does not name {name}" for name in names if f"checkpoint passed over: {name}" not in text]
    return [f"{start.log}: {problem}" for problem in problems]


def compared(whole: Path, run: Path, steps: int, is_same: bool) -> tuple[float | None, list[str]]:
    """The largest relative difference of two runs' losses, and whatever must not differ or not be there."""
    wanted, found = (read_json_lines(path / "metrics.jsonl") for path in (whole, run))
    problems = [f"left over: {path}" for pattern in ("*.tmp", "*.old", "lock") for path in run.rglob(pattern)]
    for step in saved_steps(run):
        try:
            checked_manifest(checkpoint_directory(run, step))
        except UserError as error:
            problems.append(f"damaged in the end: {error}")
    if [record["step"] for record in found] != list(range(1, steps + 1)):
        return None, [*problems, f"metrics.jsonl does not have each of {steps} steps once, in order"]
    pairs = list(zip(wanted, found, strict=True))
    for key in (*SAME_DATA, *(SAME_NUMBERS if is_same else ())):
        if differing := [ours["step"] for theirs, ours in pairs if ours.get(key) != theirs.get(key)]:
            problems.append(f"{key} differs at {len(differing)} steps, first at {differing[0]}")
    largest = max(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]) for theirs, ours in pairs)
    if largest > LOSS_TOLERANCE:
        problems.append(f"losses differ by up to {largest:.1e} relative, more than {LOSS_TOLERANCE:.0e}")
    for path in sorted((whole / "model").iterdir()) if is_same else ():
        if path.read_bytes() != (run / "model" / path.name).read_bytes():
            problems.append(f"{run / 'model' / path.name} differs from {path}")
    return largest, problems


if __name__ == "__main__":
    main()
