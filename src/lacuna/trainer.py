"""What training changes and by what: the state, the loss, the optimizer step, and the loss on held-out data."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from lacuna import checkpoint, weights
from lacuna.checkpoint import Manifest
from lacuna.config import RowsConfig, SftConfig, TrainingConfig
from lacuna.data import Batch, Dataset
from lacuna.distributed import put_batch
from lacuna.loss import summed_cross_entropy, token_statistics
from lacuna.model import (
    ModelConfig,
    cast,
    embed,
    forward,
    head_of,
    initial_params,
    parameter_table,
    partition_spec,
)

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.95, 1e-8  # Brown et al. 2020, as Llama after it
FINAL_LEARNING_RATE = 0.1  # of the peak


class TrainState(NamedTuple):
    """All that training changes; `skipped` counts the steps in a row that a non-finite gradient left without effect."""

    params: PyTree[Float[Array, "..."]]
    moments: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]


class Recipe(NamedTuple):
    """The numbers of the config that the step computes with; arguments, so that another value compiles nothing anew."""

    learning_rate: Float[Array, ""]
    warmup_steps: Int[Array, ""]
    steps: Int[Array, ""]
    weight_decay: Float[Array, ""]
    clip_norm: Float[Array, ""]
    neftune_alpha: Float[Array, ""]
    noise_key: Key[Array, ""]


def recipe_of(page: TrainingConfig, steps: int) -> Recipe:
    """The recipe of a run of `steps` steps."""
    numbers = [page.learning_rate, page.warmup_steps, steps, page.weight_decay, page.clip_norm, noise_alpha(page)]
    return Recipe(*map(jnp.asarray, numbers), jax.random.key(page.seed))


def noise_alpha(page: TrainingConfig) -> float:
    """Strength of the noise on embeddings, which pretraining does without."""
    return page.neftune_alpha if isinstance(page, SftConfig) else 0.0


# The step

adam = optax.scale_by_adam(ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)


def learning_rate(step: Int[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """Linear warm-up to the peak, then a cosine to a tenth of it (Loshchilov & Hutter 2017); steps count from 0."""
    warmup = recipe.warmup_steps
    progress = (step - warmup) / jnp.maximum(recipe.steps - warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decayed = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine
    return recipe.learning_rate * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decayed)


def embedding_noise(
    key: Key[Array, ""],
    segment: Int[Array, "row token"],
    first_row: Int[Array, ""],
    alpha: Float[Array, ""],
    x: Float[Array, "row token embed"],
) -> Float[Array, "row token embed"]:
    """NEFTune's noise (Jain et al. 2023): uniform within ± alpha / √(document length × embed), a key for each row."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(x.shape[0]))
    noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1, maxval=1))(keys)
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=x.shape[1] + 1)[row])(segment)
    return (noise * alpha / jnp.sqrt(lengths[..., None] * x.shape[-1])).astype(x.dtype)


def summed_loss(
    params: PyTree[Array],
    batch: Batch,
    model: ModelConfig,
    rematerialisation: str = "none",
    noise: Callable[[Array], Array] | None = None,
) -> Float[Array, ""]:
    """Sum of the batch's weighted token losses (nats); `params` are in the dtype of compute."""
    x = embed(params, batch.token)
    if noise is not None:
        x = x + noise(x)
    hidden = forward(params, x, batch.segment, batch.position, model, rematerialisation)
    return summed_cross_entropy(hidden, head_of(params, model), batch.target, batch.weight, model.vocabulary_size)


def whole_batch_gradient(
    params: PyTree[Array], batch: Batch, step: Int[Array, ""], recipe: Recipe, model: ModelConfig, page: RowsConfig
) -> tuple[Float[Array, ""], PyTree[Array]]:
    """Mean loss over the target tokens of all micro-batches [micro_batch, row, token], and its float32 gradient.

    Sums are divided once, by the number of targets of the whole batch, so each token weighs the same wherever it lies.
    """
    compute = cast(params, model, page.compute_dtype)
    key = jax.random.fold_in(recipe.noise_key, step)

    def accumulate(total: PyTree, micro: tuple[Batch, Array]) -> tuple[PyTree, None]:
        batch, number = micro
        first_row = number * batch.token.shape[0]
        has_noise = noise_alpha(page) > 0
        noise = partial(embedding_noise, key, batch.segment, first_row, recipe.neftune_alpha) if has_noise else None
        parts = jax.value_and_grad(summed_loss)(compute, batch, model, page.rematerialisation, noise)
        return jax.tree.map(jnp.add, total, parts), None

    zero = (jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    total, _ = jax.lax.scan(accumulate, zero, (batch, jnp.arange(batch.token.shape[0])))
    loss, gradients = jax.tree.map(lambda leaf: leaf / jnp.sum(batch.weight), total)
    return loss, gradients


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, model: ModelConfig, page: RowsConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One AdamW step (Loshchilov & Hutter 2019) on [micro_batch, row, token]."""
    loss, gradients = whole_batch_gradient(state.params, batch, state.step, recipe, model, page)
    return apply_gradient(state, loss, gradients, recipe, model)


def apply_gradient(
    state: TrainState, loss: Float[Array, ""], gradients: PyTree[Array], recipe: Recipe, model: ModelConfig
) -> tuple[TrainState, dict[str, Array]]:
    """The AdamW step along a gradient, clipped; one that is not finite has no effect."""
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    clip = jnp.minimum(1.0, recipe.clip_norm / norm)
    direction, moments = adam.update(jax.tree.map(lambda leaf: leaf * clip, gradients), state.moments)
    rate = learning_rate(state.step, recipe)

    def updated(row: Any, param: Array, direction: Array) -> Array:
        return param - rate * (direction + recipe.weight_decay * param if row.decays else direction)

    params = jax.tree.map(updated, parameter_table(model), state.params, direction)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), (params, moments), (state.params, state.moments)
    )
    skipped = jnp.where(is_finite, 0, state.skipped + 1)
    facts = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "skipped": skipped}
    return TrainState(params, moments, state.step + 1, skipped), facts


@partial(jax.jit, static_argnames=("model", "dtype"))
def held_out_sums(params: PyTree[Array], batch: Batch, model: ModelConfig, dtype: str) -> dict[str, Array]:
    """Sums over the targets of a batch [1, row, token]: loss, likeliest-token hits, and targets."""
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    compute = cast(params, model, dtype)
    hidden = forward(compute, embed(compute, batch.token), batch.segment, batch.position, model)
    found = token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size)
    return {"loss": jnp.sum(found.loss * batch.weight), "correct": jnp.sum(found.is_correct * batch.weight)}


# Around the step


def state_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Where each part of the state lies."""
    params: Any = jax.tree.map(lambda row: NamedSharding(mesh, partition_spec(row)), parameter_table(model))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(params, optax.ScaleByAdamState(whole, params, params), whole, whole)


def abstract_state(model: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda key: fresh_state(initial_params(key, model)), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, mesh),
    )


def saved_shapes(model: ModelConfig) -> TrainState:
    """Shapes of the state in a checkpoint, which does without the rows that pad the vocabulary."""
    unpadded = replace(model, padded_vocabulary=model.vocabulary_size)
    return jax.eval_shape(lambda key: fresh_state(initial_params(key, unpadded)), jax.random.key(0))


def fresh_state(params: PyTree[Array]) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(params, adam.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def starting_state(page: TrainingConfig, directory: Path, model: ModelConfig, mesh: Mesh) -> TrainState:
    """Weights as the page wants them, random or loaded, and empty moments, each born on its devices."""
    shardings = state_shardings(model, mesh)
    if page.from_scratch:
        random = jax.jit(lambda key: fresh_state(initial_params(key, model)), out_shardings=shardings)
        return random(jax.random.key(page.seed))
    params = weights.load_params(directory, model, mesh)
    return jax.jit(fresh_state, out_shardings=shardings, donate_argnums=0)(params)


def resumed_state(resumed: tuple[Path, Manifest], model: ModelConfig, mesh: Mesh) -> TrainState:
    """The state in a checkpoint, on the devices."""
    return checkpoint.load_checkpoint(*resumed, abstract_state(model, mesh), saved_shapes(model))


def held_out_loss(
    params: PyTree[Array],
    dataset: Dataset,
    batch_size: int,
    model: ModelConfig,
    mesh: Mesh,
    dtype: str,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Mean loss (nats), share of targets that were the likeliest token, and count over all targets of a data set."""
    row_count = dataset.rows.row_count(1)
    loss, correct, targets = 0.0, 0.0, 0
    for index in progress(range(-(-row_count // batch_size))):
        batch = dataset.batch(index, batch_size, row_count)
        sums = held_out_sums(params, put_batch(jax.tree.map(lambda leaf: leaf[None], batch), mesh), model, dtype)
        loss, correct = loss + float(sums["loss"]), correct + float(sums["correct"])
        targets += int(batch.weight.sum())
    return {"eval_loss": loss / targets, "eval_accuracy": correct / targets, "target_tokens": targets}
