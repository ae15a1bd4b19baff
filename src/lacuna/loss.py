"""The loss over the vocabulary, in chunks of tokens: the array [batch, token, vocab] never exists."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from lacuna.distributed import AXIS_RULES, ROW_AXES, platform, row_shards, shard
from lacuna.model import logits_of, product_over_tokens

LOSS_CHUNK = {"cpu": 512}  # tokens of a device, elsewhere 2048


def _split_tokens(chunk: int, x: Shaped[Array, "batch token *more"]) -> Shaped[Array, "chunk batch chunk_token *more"]:
    """Chunks of that many tokens of each row, zero-padded at the end."""
    count = -(-x.shape[1] // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)


def _joined_tokens(
    length: int, x: Shaped[Array, "chunk batch chunk_token *more"]
) -> Shaped[Array, "batch token *more"]:
    """Rows of `length` tokens from their chunks."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_length(hidden: Array) -> int:
    """Tokens of each row in a chunk, such that no device has more than LOSS_CHUNK of them in its part of the rows."""
    rows_of_a_device = max(hidden.shape[0] // row_shards(jax.sharding.get_abstract_mesh()), 1)
    most = max(1, LOSS_CHUNK.get(platform(), 2048) // rows_of_a_device)
    chunks = -(-hidden.shape[1] // most)
    return -(-hidden.shape[1] // chunks)


def whole_head(head: Float[Array, "vocab embed"], dtype: DTypeLike) -> Float[Array, "vocab embed"]:
    """The head as the chunks need it, sent to all devices before the loop over them, which would send it for each."""
    return shard(head.astype(dtype), AXIS_RULES["vocab"])


class TokenStatistics(NamedTuple):
    """Of each target: its negative log-likelihood and the entropy of its distribution (nats), and whether it was the
    likeliest token."""

    loss: Float[Array, "batch token"]
    is_correct: Bool[Array, "batch token"]
    entropy: Float[Array, "batch token"]


def _chunk_statistics(
    logits: Float[Array, "batch token vocab"], target: Int[Array, "batch token"]
) -> tuple[TokenStatistics, Float[Array, "batch token vocab"], Bool[Array, "batch token vocab"]]:
    """Statistics of the targets, the distributions, and which logits are the targets' own."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    is_target = target[..., None] == jnp.arange(logits.shape[-1])
    loss = normalizer - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    probability = jnp.exp(logits - normalizer[..., None])
    entropy = normalizer - jnp.sum(probability * jnp.where(probability > 0, logits, 0), axis=-1)
    return TokenStatistics(loss, jnp.argmax(logits, axis=-1) == target, entropy), probability, is_target


def token_statistics(
    hidden: Float[Array, "batch token embed"],
    head: Float[Array, "vocab embed"],
    target: Int[Array, "batch token"],
    vocabulary_size: int,
) -> TokenStatistics:
    """Statistics of each target, chunk by chunk; those that nobody uses cost nothing."""

    def chunk_statistics(chunk: tuple[Array, Array]) -> TokenStatistics:
        return _chunk_statistics(logits_of(chunk[0], head, vocabulary_size), chunk[1])[0]

    head = whole_head(head, hidden.dtype)
    chunks = jax.tree.map(partial(_split_tokens, _chunk_length(hidden)), (hidden, target))
    found = jax.lax.map(chunk_statistics, chunks)
    return jax.tree.map(partial(_joined_tokens, hidden.shape[1]), found)


def summed_cross_entropy(
    hidden: Float[Array, "batch token embed"],
    head: Float[Array, "vocab embed"],
    target: Int[Array, "batch token"],
    weight: Float[Array, "batch token"],
    vocabulary_size: int,
) -> Float[Array, ""]:
    """Weighted sum of the targets' negative log-likelihoods, in nats."""
    return summed_token_loss(hidden, head, target, weight, _weighted, vocabulary_size)[0]


def _weighted(log_probability: Float[Array, "batch token"], weight: Float[Array, "batch token"]) -> Float[Array, ""]:
    return -jnp.sum(log_probability * weight)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_token_loss(
    hidden: Float[Array, "batch token embed"],
    head: Float[Array, "vocab embed"],
    target: Int[Array, "batch token"],
    fields: PyTree[Array],
    loss_of: Callable[[Float[Array, "batch token"], Any], Float[Array, ""]],
    vocabulary_size: int,
) -> tuple[Float[Array, ""], TokenStatistics]:
    """A loss that is a sum over targets, `loss_of` their log-probabilities and `fields`, and the targets' statistics.

    Works through the tokens in chunks; differentiated, it makes the gradient of each chunk while its logits are at
    hand, so logits are computed once and the array [batch, token, vocab] never exists. Each device sums the head's
    gradient over its own rows, and these sums are added up once. The statistics have no gradient.
    """
    statistics = token_statistics(hidden, head, target, vocabulary_size)
    return loss_of(-statistics.loss, fields), statistics


def _token_loss_forward(
    hidden: Array, head: Array, target: Array, fields: PyTree[Array], loss_of: Callable, vocabulary_size: int
) -> tuple[tuple[Array, TokenStatistics], tuple[Array, Array]]:
    parts = row_shards(jax.sharding.get_abstract_mesh())
    chunks = jax.tree.map(partial(_split_tokens, _chunk_length(hidden)), (hidden, target, fields))
    compute_head = whole_head(head, hidden.dtype)

    def step(total: tuple[Array, Array], chunk: tuple[Array, Array, PyTree]) -> tuple[tuple[Array, Array], Any]:
        hidden, target, fields = chunk
        logits = logits_of(hidden, compute_head, vocabulary_size)
        statistics, probability, is_target = _chunk_statistics(logits, target)
        loss, slope = jax.value_and_grad(loss_of)(-statistics.loss, fields)
        logit_gradient = (is_target - probability) * slope[..., None]
        logit_gradient = jax.lax.optimization_barrier(logit_gradient.astype(hidden.dtype))
        of_parts = (x.reshape(parts, -1, x.shape[-1]) for x in (logit_gradient, hidden))
        head_gradients = jax.vmap(product_over_tokens)(*of_parts)
        hidden_gradient = jnp.einsum("btv,ve->bte", logit_gradient, compute_head, preferred_element_type=jnp.float32)
        return (total[0] + loss, total[1] + head_gradients), (hidden_gradient.astype(hidden.dtype), statistics)

    zeros = shard(jnp.zeros((parts, *head.shape), jnp.float32), ROW_AXES, AXIS_RULES["vocab"])
    (loss, head_gradients), kept = jax.lax.scan(step, (jnp.zeros(()), zeros), chunks)
    hidden_gradient, statistics = jax.tree.map(partial(_joined_tokens, hidden.shape[1]), kept)
    return (loss, statistics), (hidden_gradient, jnp.sum(head_gradients, axis=0).astype(head.dtype))


def _token_loss_backward(
    loss_of: Callable, vocabulary_size: int, residual: tuple[Array, Array], gradient: tuple[Array, TokenStatistics]
) -> tuple[Array, Array, None, None]:
    hidden_gradient, head_gradient = ((part * gradient[0]).astype(part.dtype) for part in residual)
    return hidden_gradient, head_gradient, None, None


summed_token_loss.defvjp(_token_loss_forward, _token_loss_backward)
