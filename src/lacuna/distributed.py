"""Devices: the mesh, which logical axis lies on which mesh axis, and host batches as arrays over all devices."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from lacuna.config import UserError

ROW_AXES = ("data", "fsdp")
AXIS_RULES: dict[str, str] = {"embed": "fsdp", "vocab": "tensor", "kv_head": "tensor", "feedforward": "tensor"}


def make_mesh(data_parallel: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over all devices; `fsdp` = 0 takes what the other two leave over.

    Raises:
        UserError: the three numbers do not multiply to the number of devices.
    """
    count = jax.device_count()
    shape = (data_parallel, fsdp or max(count // (data_parallel * tensor), 1), tensor)
    if math.prod(shape) != count:
        raise UserError(
            f"data_parallel × fsdp × tensor = {' × '.join(map(str, shape))} = {math.prod(shape)}, but the devices "
            f"are {count}; choose divisors of {count}, and fsdp = 0 for those left over"
        )
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def check_divisible(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh axis that does not divide a logical axis it shards."""
    for axis, mesh_axis in AXIS_RULES.items():
        if sizes[axis] % mesh.shape[mesh_axis]:
            shared = math.gcd(*(sizes[other] for other, rule in AXIS_RULES.items() if rule == mesh_axis))
            raise UserError(
                f"{mesh_axis} = {mesh.shape[mesh_axis]} does not divide the model's {axis} = {sizes[axis]}; "
                f"set {mesh_axis} to a divisor of {shared}"
            )


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def shard_rows(x: Array) -> Array:
    """State that the leading axis lies over the data axes of the mesh in force, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree[Array]:
    """Host arrays [micro_batch, row, …] on the devices, rows split over the data axes."""
    return jax.device_put(batch, jax.NamedSharding(mesh, PartitionSpec(None, ROW_AXES)))
