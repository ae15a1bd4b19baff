"""Eight virtual CPU devices and quick compilation for every test, and the places of reference values and data shelf."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # most of the time here goes into compiling

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")

REFERENCE = Path(__file__).parent / "reference"
SHELF = Path(__file__).parents[2] / "shared" / "data"
TINY = Path(__file__).parents[1] / "configs" / "tiny"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded data and plans of a test go to a folder of its own; compiled programs are not kept between runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
