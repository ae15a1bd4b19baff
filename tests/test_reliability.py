"""Runs that are killed, stopped, filled up or hung at any point, alone and as several processes, and resume exactly."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import chat_run, mesh_of, outcome, records, text_run

from lacuna import checkpoint, cli, grpo
from lacuna.config import GrpoConfig, PretrainConfig, TrainingConfig, UserError, to_toml

FAULTS = Path(__file__).with_name("faults.py")
PATIENCE = 300
CHATS = {"neftune_alpha": 5.0, "steps": 20, "batch_size": 8, "micro_batch_size": 4, "save_every": 3, "eval_every": 5}
COMMANDS = {"pretrain": (text_run, {"steps": 20, "save_every": 3}), "sft": (chat_run, CHATS)}


class Job:
    """One or several processes at a run, with a fault built into one of them, or into all."""

    def __init__(
        self,
        config: TrainingConfig,
        fault: str = "none",
        step: int = 0,
        more: tuple[str, ...] = (),
        processes: int = 1,
        devices: int = 1,
        faulty: int | None = 0,
        last_only: tuple[str, ...] = (),
    ) -> None:
        file = config.run_directory.parent / f"{config.run_name}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_toml(config))
        command = next(name for name, kind in cli.COMMANDS.items() if type(config) is kind)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
        common = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, FAULTS, *((fault, str(step)) if faulty in (rank, None) else ("none", "0")),
                 command, f"@{file}", *more, *(last_only if rank == processes - 1 else ())],
                env=os.environ | common | job | ({"JAX_PROCESS_ID": str(rank)} if job else {}),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for(self, file: Path, words: str) -> None:
        """Wait until a file of the run holds some words."""
        end = time.monotonic() + PATIENCE
        while not (file.exists() and words in file.read_text()):
            assert time.monotonic() < end and any(process.poll() is None for process in self.processes), words
            time.sleep(0.05)

    def end(self) -> tuple[list[int], str]:
        """Exit codes, and what all wrote."""
        outputs = [process.communicate(timeout=PATIENCE) for process in self.processes]
        return [process.returncode for process in self.processes], "".join(text for pair in outputs for text in pair)


def finished(config: TrainingConfig, *arguments: Any, **named: Any) -> str:
    """What a job wrote that ended well."""
    with Job(config, *arguments, **named) as job:
        codes, output = job.end()
        assert not any(codes), output
    return output


def killed_at_each(kills: list[int], name: str, small: Path, **fewer: int) -> None:
    """A run killed after each of the steps `kills`, each time resumed, is the uninterrupted one."""
    make, changes = COMMANDS[name]
    whole, cut = (make(small, run_name=run, **changes | fewer) for run in ("whole", "cut"))
    finished(whole)
    for step in kills:
        with Job(cut, "kill", step, ("--resume",)) as job:
            assert job.end()[0] == [-signal.SIGKILL]
    finished(cut, more=("--resume",))
    assert outcome(cut) == outcome(whole)
    assert [record["step"] for record in records(cut)] == list(range(1, len(records(whole)) + 1))
    assert len(records(whole)) == whole.steps


@pytest.mark.parametrize("name", [pytest.param("pretrain", marks=pytest.mark.slow), "sft"])
def test_a_run_killed_after_a_step_is_the_uninterrupted_run_bit_for_bit(name: str, small: Path) -> None:
    killed_at_each([6], name, small, steps=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_after_each_of_twenty_steps_is_the_uninterrupted_run_bit_for_bit(name: str, small: Path) -> None:
    killed_at_each(list(range(1, 21)), name, small)


@pytest.mark.slow
def test_a_run_killed_within_two_saves_is_the_uninterrupted_run_and_leaves_nothing_behind(small: Path) -> None:
    changes = {"steps": 8, "save_every": 2, "keep": 1}
    whole, cut = (text_run(small, run_name=run, **changes) for run in ("whole", "cut"))
    finished(whole)
    newest = Path()
    for point, step, saved in (("before the rename", 4, 2), ("during retention", 6, 6)):
        with Job(cut, f"kill {point}", step, ("--resume",)) as job:
            assert job.end()[0] == [-signal.SIGKILL]
        newest = checkpoint.checkpoint_directory(cut.run_directory, saved)
        said: list[str] = []
        assert checkpoint.newest_good(cut.run_directory, said.append) == (newest, checkpoint.checked_manifest(newest))
        assert not said
    assert f"resuming from {newest}" in finished(cut, more=("--resume",))
    assert [path.name for path in (cut.run_directory / "checkpoints").iterdir()] == ["step_00000008"]
    assert outcome(cut) == outcome(whole)


def test_a_run_that_is_at_work_is_refused_to_a_second_process_by_name(small: Path) -> None:
    config = text_run(small, steps=10_000)
    with Job(config) as first:
        first.wait_for(config.run_directory / "metrics.jsonl", '"step": 1,')
        for more in ("resume", "overwrite"):
            with pytest.raises(UserError, match=f"process {first.processes[0].pid} on {socket.gethostname()}"):
                cli.run(config.model_copy(update={more: True}))
        first.processes[0].send_signal(signal.SIGTERM)
        codes, output = first.end()
    assert codes == [0] and "to resume: uv run pretrain" in output
    assert json.loads((config.run_directory / "summary.json").read_text())["steps"] == len(records(config))
    assert not (config.run_directory / "lock").exists()


def test_a_second_interrupt_leaves_at_once(small: Path) -> None:
    config = text_run(small, steps=10_000)
    with Job(config, "sleep", 4) as job:
        job.wait_for(config.run_directory / "metrics.jsonl", '"step": 2,')
        job.processes[0].send_signal(signal.SIGINT)
        job.processes[0].send_signal(signal.SIGTERM)  # an echo, as of a launcher, which leaves it as it is
        job.wait_for(config.run_directory / "run.log", "once more to leave at once")
        with pytest.raises(subprocess.TimeoutExpired):
            job.processes[0].wait(1.5)
        job.processes[0].send_signal(signal.SIGINT)
        codes, output = job.end()
    assert codes == [130] and "interrupted" in output and "Traceback" not in output


def test_a_step_that_never_ends_is_ended_with_the_stacks_of_all_threads(small: Path) -> None:
    config = text_run(small, steps=10)
    with Job(config, "hang", 3) as job:
        codes, output = job.end()
    assert codes == [124] and "no step has finished for" in output
    log = (config.run_directory / "run.log").read_text()
    assert "Thread 0x" in log and "in prepare" not in log.partition("no step has finished")[0] and "faults.py" in log


# Several processes


def text_job(small: Path, **changes: Any) -> PretrainConfig:
    return text_run(small, **{"batch_size": 8, "micro_batch_size": 2, "steps": 12, "save_every": 4} | changes)


def losses(config: TrainingConfig) -> list[float]:
    return [record["loss"] for record in records(config)]


@pytest.mark.slow
def test_two_processes_are_one_with_as_many_devices_and_resume_each_others_runs(small: Path) -> None:
    alone, together = (text_job(small, run_name=name, fsdp=2, tensor=2) for name in ("alone", "together"))
    finished(alone, devices=4)
    finished(together, processes=2, devices=2)
    assert len(records(together)) == 12
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
    saved = checkpoint.checkpoint_directory(together.run_directory, 12)
    assert len(checkpoint.checked_manifest(saved).shards) == 2
    assert all((saved / f"shard-0000{process}.safetensors").stat().st_size > 10_000 for process in range(2))
    first = checkpoint.checkpoint_directory(alone.run_directory, 8)
    for name, processes, devices in (("one", 1, 1), ("two of two", 2, 2)):
        layout: dict[str, Any] = {"fsdp": 0, "tensor": 1, "micro_batch_size": 2}
        other = text_job(small, run_name=name, **layout)
        finished(other, more=("--resume-from", str(first)), processes=processes, devices=devices)
        assert [record["step"] for record in records(other)] == [9, 10, 11, 12]
        np.testing.assert_allclose(losses(other), losses(alone)[8:], rtol=1e-5)


@pytest.mark.slow
def test_a_streamed_run_that_is_killed_goes_on_with_other_devices_and_processes(small: Path) -> None:
    data = [{"path": str(small / "pretrain.jsonl"), "streaming": True, "weight": weight} for weight in (3, 1)]
    changes: dict[str, Any] = {"data": data, "steps": 12, "save_every": 1, "keep": 20, "micro_batch_size": 1}
    alone, cut = (text_run(small, run_name=name, **changes) for name in ("alone", "cut"))
    finished(alone)
    for step, processes, devices in ((2, 1, 1), (4, 1, 2), (6, 2, 1), (8, 1, 8), (10, 2, 4)):
        with Job(cut, "kill", step, ("--resume",), processes, devices, faulty=None) as job:
            assert -signal.SIGKILL in job.end()[0]
    finished(cut, more=("--resume",))
    np.testing.assert_allclose(losses(cut), losses(alone), rtol=1e-5)
    for step in range(1, 13):
        saved = [checkpoint.checkpoint_directory(each.run_directory, step) for each in (alone, cut)]
        places = [checkpoint.checked_manifest(each).run.place for each in saved]
        assert places[0] == places[1] and places[0]["row"] == 16 * step
    assert [record["epoch"] for record in records(cut)] == [record["epoch"] for record in records(alone)]


def test_grpo_in_two_processes_is_that_in_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = small.parent / "rewards.py"
    rewards.write_text("def length(prompt, completion, row):\n    return len(completion) / 10\n")
    settings: dict[str, Any] = {
        "model_name": str(small), "from_scratch": True, "output_dir": str(small.parent / "runs"), "steps": 2,
        "data": ({"path": str(small / "heldout.jsonl"), "split": "train[:20]"},), "sequence_length": 160,
        "prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_tokens": 8, "slots": 8,
        "compute_dtype": "float32", "reward": (f"{rewards}:length:1",), "mask_truncated": False, "learning_rate": 1e-2,
    }  # fmt: skip
    alone, together = (GrpoConfig(run_name=name, **settings) for name in ("alone", "together"))
    finished(together, processes=2)
    monkeypatch.setattr(grpo, "make_mesh", lambda *_: mesh_of(2, 1, 1))
    cli.run(alone)
    for one, other in zip(records(alone), records(together), strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("signalled", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_saved_step(small: Path, signalled: int) -> None:
    config = text_job(small, steps=10_000)
    with Job(config, processes=2) as job:
        job.wait_for(config.run_directory / "metrics.jsonl", '"step": 3,')
        job.processes[signalled].send_signal(signal.SIGTERM)
        codes, output = job.end()
    assert codes == [0, 0], output
    step = checkpoint.saved_steps(config.run_directory)[-1]
    assert records(config)[-1]["step"] == step and f"stopped after step {step}" in output
    assert len(checkpoint.checked_manifest(checkpoint.checkpoint_directory(config.run_directory, step)).shards) == 2


@pytest.mark.parametrize(
    ("fault", "victim", "why"),
    [
        ("kill", 0, "process 0 is gone|leader task was preempted/died"),  # whichever is faster: ours, or JAX
        pytest.param("raise", 0, "process 0 on {host} ended: RuntimeError", marks=pytest.mark.slow),
        pytest.param("raise", 1, "process 1 on {host} ended: RuntimeError", marks=pytest.mark.slow),
    ],
)
def test_when_one_of_two_processes_ends_the_other_ends_too_and_says_why(
    fault: str, victim: int, why: str, small: Path
) -> None:
    with Job(text_job(small, steps=10_000), fault, 5, processes=2, faulty=victim) as job:
        codes, output = job.end()
    assert all(codes) and re.search(why.format(host=socket.gethostname()), output), output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_is_missed_by_its_heartbeat_alone(small: Path, victim: int) -> None:
    config = text_job(small, steps=10_000)
    with Job(config, "short heartbeat", processes=2, faulty=None) as job:
        job.wait_for(config.run_directory / "metrics.jsonl", '"step": 5,')
        job.processes[victim].send_signal(signal.SIGSTOP)
        survivor = job.processes[1 - victim]
        output = "".join(survivor.communicate(timeout=PATIENCE))
    assert survivor.returncode and "heartbeat" in output.lower(), output
    finished(config, more=("--resume", "--steps", "12"))
    assert [record["step"] for record in records(config)] == list(range(1, 13))


def test_processes_that_read_other_data_are_refused_before_anything_is_trained(small: Path) -> None:
    config = text_job(small)
    with Job(config, processes=2, last_only=("--data.0.split", "train[:99]")) as job:
        codes, output = job.end()
    assert all(codes) and "config, model or data differ between process 0 and process 1" in output
    assert not config.run_directory.exists()
