"""Eight virtual CPU devices and quick compilation for every test, and the places of reference values and data shelf."""

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Most of the time here goes into compiling: without the first two a training step takes four times as long to compile,
# and parts of a program that are compiled at once take an eighth more than all of it.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**34)  # with a bound JAX locks the cache, which all tests share
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # else the cache's path is a part of each program's key

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

from lacuna.apps import report  # noqa: E402
from lacuna.config import GrpoConfig, PretrainConfig, SftConfig, TrainingConfig  # noqa: E402
from lacuna.metrics import RunLog  # noqa: E402
from lacuna.model import ModelConfig, initial_params  # noqa: E402

settings.register_profile("suite", deadline=None)  # a busy machine is no failure
settings.load_profile("suite")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")

REFERENCE = Path(__file__).parent / "reference"
SHELF = Path(__file__).parents[2] / "shared" / "data"
TINY = Path(__file__).parents[1] / "configs" / "tiny"
if "LACUNA_TEST_PROGRAMS" not in os.environ:  # in the first process of a session, whose workers inherit it
    os.environ["LACUNA_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="lacuna-programs-")
    atexit.register(shutil.rmtree, os.environ["LACUNA_TEST_PROGRAMS"], ignore_errors=True)
PROGRAMS = Path(os.environ["LACUNA_TEST_PROGRAMS"])

gc.set_threshold(100_000, 20, 20)  # tracing makes many objects; looking through all of them was a tenth of the time
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded data of a test go to a folder of its own; compiled programs are shared by the session."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "lacuna").mkdir()
    (cache / "lacuna" / "programs").symlink_to(PROGRAMS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # to write one costs as much; a run keeps all


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run writes its report without curves, which take a second, except where a test is about them."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(report, "plot", lambda *_: ("", 0))


@pytest.fixture
def shelf() -> Path:
    """The data shelf beside the repository, where there is one."""
    if not SHELF.is_dir():
        pytest.skip("no ../shared/data")
    return SHELF


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the first of the eight devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


draw_params = jax.jit(initial_params, static_argnums=1)


def random_params(model: ModelConfig, seed: int = 0) -> Any:
    """Random weights, by one program."""
    return draw_params(jax.random.key(seed), model)


# Whole runs of a small model

SIZES = {
    "vocab_size": 157, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The tiny model's directory with a smaller model in it."""
    return make_small(tmp_path / "small")


def make_small(directory: Path) -> Path:
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    raw = json.loads((TINY / "config.json").read_text())
    vocabulary = {"vocab_size": raw["vocab_size"]}
    (directory / "config.json").write_text(json.dumps(raw | SIZES | vocabulary))
    for name, count in (("heldout.jsonl", 120), ("pretrain.jsonl", 100)):  # a run reads and encodes whole files
        (directory / name).write_text("".join((TINY / name).read_text().splitlines(keepends=True)[:count]))
    return directory


def chat_run(small: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "model_name": str(small), "from_scratch": True, "run_name": "run", "output_dir": str(small.parent / "runs"),
        "data": (
            {"path": str(small / "heldout.jsonl"), "split": "train[:30]"},
            {"path": str(small / "heldout.jsonl"), "split": "train[60:80]", "weight": 1.5},
        ),
        "eval_data": ({"path": str(small / "heldout.jsonl"), "split": "train[100:]"},),
        "sequence_length": 256, "batch_size": 8, "compute_dtype": "float32", "learning_rate": 3e-3, "epochs": 3,
    }  # fmt: skip
    return SftConfig(**settings | changes)


def text_run(small: Path, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "model_name": str(small), "from_scratch": True, "run_name": "run", "output_dir": str(small.parent / "runs"),
        "data": ({"path": str(small / "pretrain.jsonl")},),
        "sequence_length": 128, "batch_size": 16, "compute_dtype": "float32", "steps": 8,
    }  # fmt: skip
    return PretrainConfig(**settings | changes)


def grpo_config(**changes: Any) -> GrpoConfig:
    settings: dict[str, Any] = {
        "model_name": "unused", "run_name": "run", "data": ({"path": "unused"},), "sequence_length": 64,
        "prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_tokens": 9, "compute_dtype": "float32",
        "learning_rate": 1e-2, "steps": 4, "slots": 16,
    }  # fmt: skip
    return GrpoConfig(**settings | changes)


def records(config: TrainingConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def outcome(config: TrainingConfig) -> tuple[list[Any], bytes]:
    """What must be equal bit for bit: the logged numbers of every step and the exported weights."""
    keys = ("step", "loss", "gradient_norm", "learning_rate", "tokens", "target_tokens", "epoch", "eval_loss")
    exported = (config.run_directory / "model" / "model.safetensors").read_bytes()
    return [[record.get(key) for key in keys] for record in records(config)], exported


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """Whatever is compiled during a test, each with the last step that was logged before."""
    found, step, log = [], 0, RunLog.step

    def heard(event: str, duration_secs: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append((step, str(facts.get("fun_name"))))

    def logged(self: RunLog, record: dict[str, Any]) -> None:
        nonlocal step
        step = record["step"]
        log(self, record)

    jax.clear_caches()
    monkeypatch.setattr(RunLog, "step", logged)
    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    jax.monitoring.unregister_event_duration_listener(heard)


def assert_trees_close(ours: Any, expected: Any, rtol: float, atol: float) -> None:
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol, atol, err_msg=jax.tree_util.keystr(path))
