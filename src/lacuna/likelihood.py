"""Log-likelihoods: how likely a model finds texts behind others, many at once."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from lacuna.distributed import put_batch, row_shards
from lacuna.loss import token_statistics
from lacuna.model import ModelConfig, cast, embed, forward, head_of
from lacuna.sampling import power_of_two

LEAST_LENGTH = 32
Ids = Sequence[int]


class Scored(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


@partial(jax.jit, static_argnames=("config", "dtype"))
def score(
    params: PyTree[Array],
    token: Int[Array, "1 row token"],
    target: Int[Array, "1 row token"],
    is_scored: Bool[Array, "1 row token"],
    config: ModelConfig,
    dtype: str,
) -> tuple[Float[Array, " row"], Bool[Array, " row"]]:
    """Summed float32 log-probabilities of each row's scored targets, and whether all were the likeliest token."""
    token, target, is_scored = token[0], target[0], is_scored[0]
    compute = cast(params, config, dtype)
    position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)
    hidden = forward(compute, embed(compute, token), jnp.ones_like(token), position, config)
    found = token_statistics(hidden, head_of(compute, config), target, config.vocabulary_size)
    sums = -jnp.sum(jnp.where(is_scored, found[0], 0), axis=-1), jnp.all(found[1] | ~is_scored, axis=-1)
    return jax.lax.with_sharding_constraint(sums, PartitionSpec())


def log_likelihoods(
    params: PyTree[Array],
    pairs: Sequence[tuple[Ids, Ids]],
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    batch_size: int,
    longest: int,
) -> Iterator[tuple[int, Scored]]:
    """Place and score of each (context, continuation), longest first, `batch_size` a device at a time. A context loses
    its left end where both together have more than `longest` tokens to read."""
    rows = batch_size * row_shards(mesh)
    order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
    for begin in range(0, len(order), rows):
        places = order[begin : begin + rows]
        whole = [(*pairs[place][0], *pairs[place][1])[-longest - 1 :] for place in places]
        length = min(max(power_of_two(max(map(len, whole)) - 1), LEAST_LENGTH), longest)
        token, target = np.zeros((2, 1, rows, length), np.int32)
        is_scored = np.zeros((1, rows, length), bool)
        for row, (place, ids) in enumerate(zip(places, whole, strict=True)):
            end = len(ids) - 1
            token[0, row, :end], target[0, row, :end] = ids[:-1], ids[1:]
            is_scored[0, row, max(end - len(pairs[place][1]), 0) : end] = True
        with jax.set_mesh(mesh):
            found = jax.device_get(score(params, *put_batch((token, target, is_scored), mesh), config, dtype))
        for place, log_likelihood, is_greedy in zip(places, *(values[: len(places)] for values in found), strict=True):
            yield place, Scored(float(log_likelihood), bool(is_greedy))
