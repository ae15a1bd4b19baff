"""The optimizer step: what training changes, the step that changes it, and the loss of packed rows.

`train_step` is the whole step, one compiled function; grpo uses it with its own loss.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from lacuna import checkpoint
from lacuna.checkpoint import Manifest, OpenedModel
from lacuna.config import SftConfig, TrainingConfig, VocabularyKeys
from lacuna.data import Batch
from lacuna.model import (
    ModelConfig,
    begin_rows,
    cast,
    cross_entropy,
    embed,
    forward,
    head_of,
    initial_params,
    joined,
    summed_token_loss,
    trained_table,
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
    """The numbers of the config that the step computes with; arguments, so another value compiles nothing again."""

    learning_rate: Float[Array, ""]
    warmup_steps: Int[Array, ""]
    steps: Int[Array, ""]
    weight_decay: Float[Array, ""]
    clip_norm: Float[Array, ""]
    neftune_alpha: Float[Array, ""]
    noise_key: Key[Array, ""]


Noise = Callable[[Int[Array, "row token"], Float[Array, "row token embed"]], Float[Array, "row token embed"]]
Facts = tuple[dict[str, Array], dict[str, Array]]  # of micro-batches: those that are summed, and those of the largest


@runtime_checkable
class Loss(Protocol):
    """What a step minimises: hashable, with all of the config that shapes the program."""

    compute_dtype: str

    def __call__(
        self, params: PyTree[Array], batch: Any, model: ModelConfig, noise: Noise
    ) -> tuple[Float[Array, ""], Facts]:
        """The sum over the tokens of a micro-batch, and what is logged of them."""
        ...


adam = optax.scale_by_adam(ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)


@partial(jax.jit, static_argnames=("model", "loss"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: PyTree[Array],
    divisor: Float[Array, ""] | None,
    recipe: Recipe,
    model: ModelConfig,
    loss: Loss,
    count: Int[Array, ""] | None = None,
    frozen: PyTree | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One AdamW step (Loshchilov & Hutter 2019) on micro-batches [micro_batch, row, token], and what is logged of it.

    `loss` sums over the tokens of a micro-batch. The sums of all are divided once by `divisor`, so each token weighs
    the same wherever it lies; None: its weights are shares already. Only the first `count` micro-batches are used;
    None: all. `frozen` are weights without gradient, if adapters train. A loss or gradient that is not finite changes
    no weight.
    """
    table, rows = trained_table(model), batch.token.shape[1]
    compute = cast(state.params, table, loss.compute_dtype)
    key = jax.random.fold_in(recipe.noise_key, state.step)

    def micro_batch_loss(params: PyTree[Array], number: Int[Array, ""] | int) -> tuple[Array, Facts]:
        micro_batch = jax.tree.map(lambda leaf: leaf[number], batch)
        noise = partial(embedding_noise, key, number * rows, recipe.neftune_alpha)
        return loss(joined(frozen, params, model), micro_batch, model, noise)

    def add_micro_batch(number: Int[Array, ""], total: tuple[PyTree, dict]) -> tuple[PyTree, dict]:
        (value, (sums, largest)), gradient = jax.value_and_grad(micro_batch_loss, has_aux=True)(compute, number)
        summed = jax.tree.map(jnp.add, total[0], (gradient, value, sums))
        return summed, jax.tree.map(jnp.maximum, total[1], largest)

    value, (sums, largest) = jax.eval_shape(lambda: micro_batch_loss(compute, 0))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ((state.params, value, sums), largest))
    micro_batches = batch.token.shape[0] if count is None else count
    (gradient, value, sums), largest = jax.lax.fori_loop(0, micro_batches, add_micro_batch, zero)
    if divisor is not None:
        value, share = value / divisor, 1 / divisor
        gradient = jax.tree.map(lambda leaf: leaf * share, gradient)

    norm = optax.tree.norm(gradient)
    is_finite = jnp.isfinite(value) & jnp.isfinite(norm)
    clip, rate = jnp.minimum(1.0, recipe.clip_norm / norm), learning_rate(state.step, recipe)
    _, moments = adam.update(jax.tree.map(lambda leaf: leaf * clip, gradient), state.moments)
    moments: Any = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), moments, state.moments)
    # From the moments as they are kept: with those of before in the weights' formula XLA copies both
    mean, square = (
        optax.tree.bias_correction(moment, decay, moments.count)
        for moment, decay in ((moments.mu, ADAM_BETA1), (moments.nu, ADAM_BETA2))
    )

    def descend(row: Any, param: Array, mean: Array, square: Array) -> Array:
        direction = mean / (jnp.sqrt(square) + ADAM_EPSILON)
        new = param - rate * (direction + recipe.weight_decay * param if row.decays else direction)
        return jnp.where(is_finite, new, param)

    params = jax.tree.map(descend, table, state.params, mean, square)
    skipped = jnp.where(is_finite, 0, state.skipped + 1)
    facts = {"loss": value, "learning_rate": rate, "gradient_norm": norm, "skipped": skipped}
    return TrainState(params, moments, state.step + 1, skipped), facts | sums | largest


def learning_rate(step: Int[Array, ""], recipe: Recipe) -> Float[Array, ""]:
    """Linear warm-up to the peak, then a cosine to a tenth of it (Loshchilov & Hutter 2017); steps count from 0."""
    warmup = recipe.warmup_steps
    progress = (step - warmup) / jnp.maximum(recipe.steps - warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decayed = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine
    return recipe.learning_rate * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decayed)


def embedding_noise(
    key: Key[Array, ""],
    first_row: Int[Array, ""] | int,
    alpha: Float[Array, ""],
    segment: Int[Array, "row token"],
    x: Float[Array, "row token embed"],
) -> Float[Array, "row token embed"]:
    """NEFTune's noise (Jain et al. 2023): uniform within ± alpha / √(document length × embed), a key for each row."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(first_row + jnp.arange(x.shape[0]))
    noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1, maxval=1))(keys)
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=x.shape[1] + 1)[row])(segment)
    return (noise * alpha / jnp.sqrt(lengths[..., None] * x.shape[-1])).astype(x.dtype)


class RowLoss(NamedTuple):
    """The summed cross-entropy (nats) of packed rows; its fields are all of the config that shapes the program."""

    compute_dtype: str
    rematerialisation: str = "none"
    has_noise: bool = False

    def __call__(
        self, params: PyTree[Array], batch: Batch, model: ModelConfig, noise: Noise
    ) -> tuple[Float[Array, ""], Facts]:
        x = embed(params, batch.token, self.compute_dtype)
        if self.has_noise:
            x = x + noise(batch.segment, x)
        hidden = forward(params, x, batch.segment, batch.position, model, self.rematerialisation)
        weighted = batch.target, batch.weight, cross_entropy, model.vocabulary_size, model.is_frozen
        return summed_token_loss(hidden, head_of(params, model), *weighted)[0], ({}, {})


# The state on its devices


def recipe_of(config: TrainingConfig, steps: int, updates: int = 1) -> Recipe:
    """The recipe of a run of so many steps, each of so many updates of the weights."""
    alpha, warmup_steps = config.neftune_alpha if isinstance(config, SftConfig) else 0.0, config.warmup_steps
    numbers = (
        config.learning_rate,
        warmup_steps * updates,
        steps * updates,
        config.weight_decay,
        config.clip_norm,
        alpha,
    )
    return Recipe(*map(jnp.asarray, numbers), jax.random.key(config.seed))


def everywhere(mesh: Mesh) -> NamedSharding:
    """The whole of an array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def fresh_state(params: PyTree[Array]) -> TrainState:
    """The state of a run before its first step."""
    return TrainState(params, adam.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def abstract_state(model: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state."""
    params: Any = checkpoint.abstract_params(model, mesh)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere(mesh))
    return TrainState(params, optax.ScaleByAdamState(scalar, params, params), scalar, scalar)


def saved_shapes(model: ModelConfig) -> TrainState:
    """Shapes of the state in a checkpoint, which does without the rows that pad the vocabulary."""
    return jax.eval_shape(lambda key: fresh_state(initial_params(key, checkpoint.unpadded(model))), jax.random.key(0))


def starting_state(config: TrainingConfig, opened: OpenedModel, frozen: PyTree | None = None) -> TrainState:
    """Weights as the config wants them, random or loaded, and empty moments, each created on its devices. The factors
    of a new adapter are random, whatever its base, and its rows begin as those of the base, which is `frozen`."""
    model, key = opened.model, jax.random.key(config.seed)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, opened.mesh))
    if config.from_scratch or (model.is_frozen and not opened.place.base):
        params = jax.jit(initial_params, static_argnums=1, out_shardings=shardings.params)(key, model)
    else:
        params = checkpoint.trained_params(opened)
    if isinstance(config, VocabularyKeys) and config.new_tokens and not (config.from_scratch or opened.place.base):
        count, init = len(opened.tokenizer.new_words), config.new_token_init
        first = opened.tokenizer.vocabulary_size - count

        def begin(params: PyTree, frozen: PyTree | None) -> PyTree:
            new = begin_rows(params if frozen is None else frozen, key, first, count, init)
            if frozen is None:
                return params | {name: params[name].at[first : first + count].set(new[name]) for name in new}
            for name, ids in model.trained_rows:
                old = frozen[name][np.array(ids)[: len(ids) - count]].astype(jnp.float32)
                params = params | {name: jnp.concatenate([old, new[name]])}
            return params

        params = jax.jit(begin, out_shardings=shardings.params, donate_argnums=0)(params, frozen)
    return jax.jit(fresh_state, out_shardings=shardings, donate_argnums=0)(params)


def saved_state(directory: Path, manifest: Manifest, opened: OpenedModel) -> TrainState:
    """The state in a checkpoint, on the devices."""
    shapes = abstract_state(opened.model, opened.mesh), saved_shapes(opened.model)
    return checkpoint.load_checkpoint(directory, manifest, *shapes)
