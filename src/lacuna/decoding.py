"""The batch of the sampler as it lies on the devices, and the compiled programs that fill it and decode in it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from lacuna.distributed import ROW_AXES, shard_rows
from lacuna.model import (
    Cache,
    ModelConfig,
    Rotation,
    decode_step,
    decoding_params,
    empty_cache,
    head_of,
    logits_of,
    prefill,
    rotation_table,
)
from lacuna.sampling import Forest, Rules, confine, draw, edges_of, is_leaf, likeliest, penalise, restrict

BLOCK = 32
STOP_IDS = 8
TOP_LOGPROBS = 20


class Slots(NamedTuple):
    """The batch: `token` is the last one, not in the cache yet; `made` tokens were generated behind the prompt."""

    cache: Cache
    token: Int[Array, " slot"]
    length: Int[Array, " slot"]
    made: Int[Array, " slot"]
    node: Int[Array, " slot"]
    is_active: Bool[Array, " slot"]
    is_prompted: Bool[Array, "slot vocab"]
    count: Int[Array, "slot vocab"]
    rules: Rules


class Emitted(NamedTuple):
    """What each step of a block brought: `ended` is -1 where nothing, 0 where more follows, 1 at a stop, 2 at the
    limit."""

    token: Int[Array, "step slot"]
    log_probability: Float[Array, "step slot"]
    sampled_log_probability: Float[Array, "step slot"]
    top_token: Int[Array, "step slot top"]
    top_log_probability: Float[Array, "step slot top"]
    ended: Int[Array, "step slot"]


Carry = tuple[Array, Slots, Emitted]


def sharded(slots: Slots) -> Slots:
    """Slots over the data axes, the cache's heads over tensor."""
    slots = jax.tree.map(shard_rows, slots)
    if jax.sharding.get_abstract_mesh().empty:
        return slots
    spec = PartitionSpec(ROW_AXES, "tensor")
    return slots._replace(cache=jax.lax.with_sharding_constraint(slots.cache, spec))


@partial(jax.jit, static_argnames=("config", "count", "pages", "dtype"))
def empty_slots(config: ModelConfig, count: int, pages: int, dtype: str) -> Slots:
    """A batch in which nothing is active."""
    whole, real = (jnp.zeros(count, kind) for kind in (jnp.int32, jnp.float32))
    rules = Rules(real, whole, real, real, real, real, real, whole, whole.astype(jnp.uint32), whole, whole,
                  jnp.zeros((count, STOP_IDS), jnp.int32))  # fmt: skip
    counts = jnp.zeros((count, config.padded_vocabulary), jnp.int32)
    cache = empty_cache(config, count, pages, dtype)
    return sharded(Slots(cache, whole, whole, whole, whole, whole > 0, counts > 0, counts, rules))


@partial(jax.jit, static_argnames="pages")
def resized(cache: Cache, pages: int) -> Cache:
    """The cache with more pages or fewer."""

    def resize(x: Array) -> Array:
        more = max(pages - x.shape[2], 0)
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :pages]

    return jax.tree.map(resize, cache)


cast_params = jax.jit(decoding_params, static_argnames=("config", "dtype"))
fill_cache = jax.jit(prefill, static_argnames="config")


class Entry(NamedTuple):
    """New completions: their slots (one past the last where there is none), rows of the prefilled prompts, roots."""

    slot: Any
    row: Any
    node: Any


@partial(jax.jit, donate_argnames="slots")
def insert(
    slots: Slots,
    prompts: Cache,
    token: Int[Array, "row token"],
    length: Int[Array, " row"],
    entry: Entry,
    rules: Rules,
    entry_count: Int[Array, ""],
) -> Slots:
    """The batch with new completions in their slots; a prompt's last token is left for the next decode step."""
    slot, row = entry.slot, entry.row

    def place(number: Int[Array, ""], cache: Cache) -> Cache:
        def copy(whole: Array, part: Array) -> Array:
            prompt = jax.lax.dynamic_slice_in_dim(part, row[number], 1)
            return jax.lax.dynamic_update_slice(whole, prompt, (slot[number], 0, 0, 0, 0))

        return jax.tree.map(copy, cache, prompts)

    def put(whole: Array, values: Array) -> Array:
        return whole.at[slot].set(values, mode="drop")

    vocabulary_size = slots.count.shape[1]
    known = jnp.where(jnp.arange(token.shape[1]) < length[:, None], token, vocabulary_size)
    is_prompted = jnp.zeros((token.shape[0], vocabulary_size), bool)
    is_prompted = is_prompted.at[jnp.arange(token.shape[0])[:, None], known].set(True, mode="drop")
    last = jnp.take_along_axis(token, length[:, None] - 1, axis=1)[:, 0]
    return sharded(
        Slots(
            cache=jax.lax.fori_loop(0, entry_count, place, slots.cache),
            token=put(slots.token, last[row]),
            length=put(slots.length, length[row] - 1),
            made=put(slots.made, jnp.zeros_like(row)),
            node=put(slots.node, entry.node),
            is_active=put(slots.is_active, jnp.ones_like(row, bool)),
            is_prompted=put(slots.is_prompted, is_prompted[row]),
            count=put(slots.count, jnp.zeros_like(row)[:, None]),
            rules=jax.tree.map(put, slots.rules, rules),
        )
    )


@partial(jax.jit, static_argnames="config", donate_argnames="slots")
def decode_block(
    params: PyTree[Array],
    slots: Slots,
    forest: Forest,
    is_wanted: Bool[Array, " slot"],
    steps: Int[Array, ""],
    patience: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Slots, Emitted]:
    """Up to `steps` tokens in every active slot that is still wanted; less when `patience` slots have come free."""
    slots = slots._replace(is_active=slots.is_active & is_wanted)
    count, top = len(slots.token), min(TOP_LOGPROBS, config.vocabulary_size)
    whole, real = (jnp.zeros((BLOCK, count), kind) for kind in (jnp.int32, jnp.float32))
    tops = (jnp.zeros((BLOCK, count, top), kind) for kind in (jnp.int32, jnp.float32))
    first_count = jnp.sum(slots.is_active)
    rotations = rotation_table(slots.cache, config)

    def goes_on(carry: Carry) -> Bool[Array, ""]:
        active_count = jnp.sum(carry[1].is_active)
        return (carry[0] < steps) & (active_count > 0) & (first_count - active_count < patience)

    def step(carry: Carry) -> Carry:
        number, slots, emitted = carry
        slots, found = next_token(params, slots, forest, rotations, config)
        return number + 1, slots, jax.tree.map(lambda all, one: all.at[number].set(one), emitted, found)

    carry = jnp.zeros((), jnp.int32), slots, Emitted(whole, real, real, *tops, whole - 1)
    _, slots, emitted = jax.lax.while_loop(goes_on, step, carry)
    if not jax.sharding.get_abstract_mesh().empty:
        emitted = jax.lax.with_sharding_constraint(emitted, PartitionSpec())
    return sharded(slots), emitted


def next_token(
    params: PyTree[Array], slots: Slots, forest: Forest, rotations: Rotation, config: ModelConfig
) -> tuple[Slots, Emitted]:
    """One more token in each active slot, by its own rules."""
    rules, row = slots.rules, jnp.arange(len(slots.token))
    hidden, cache = decode_step(params, slots.cache, slots.token, slots.length, rotations, config)
    logits = logits_of(hidden, head_of(params, config), config.vocabulary_size)[:, 0]

    def any_active(condition: Bool[Array, " slot"]) -> Bool[Array, ""]:
        return jnp.any(condition & slots.is_active)

    is_penalised = (rules.repetition_penalty != 1) | (rules.frequency_penalty != 0) | (rules.presence_penalty != 0)
    scores = jax.lax.cond(
        any_active(is_penalised), lambda: penalise(logits, slots.is_prompted, slots.count, rules), lambda: logits
    )
    is_confined = any_active(slots.node >= 0)
    scores = jax.lax.cond(is_confined, lambda: confine(scores, forest, slots.node), lambda: scores)
    best = likeliest(scores)

    def sampled() -> tuple[Int[Array, " slot"], Float[Array, " slot"]]:
        kept = restrict(scores, rules)
        token = jnp.where(rules.temperature > 0, draw(kept, rules.seed, rules.index, slots.made), best)
        probability = kept[row, token] - jax.nn.logsumexp(kept, axis=-1)
        return token, jnp.where(rules.temperature > 0, probability, 0)

    def greedy() -> tuple[Int[Array, " slot"], Float[Array, " slot"]]:
        return best, jnp.zeros(len(row))

    token, sampled_log_probability = jax.lax.cond(any_active(rules.temperature > 0), sampled, greedy)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    top = min(TOP_LOGPROBS, config.vocabulary_size)
    top_logits, top_token = jax.lax.cond(
        any_active(rules.top_logprobs > 0),
        lambda: tuple(jax.lax.top_k(logits, top)),
        lambda: (jnp.zeros((len(row), top)), jnp.zeros((len(row), top), jnp.int32)),
    )

    def follow() -> tuple[Int[Array, " slot"], Bool[Array, " slot"]]:
        tokens, children = edges_of(forest, jnp.maximum(slots.node, 0))
        child = jnp.max(jnp.where(tokens == token[:, None], children, 0), axis=-1)
        return jnp.where(slots.node < 0, -1, child), (slots.node >= 0) & is_leaf(forest, child)

    node, is_complete = jax.lax.cond(is_confined, follow, lambda: (slots.node, jnp.zeros(len(row), bool)))
    is_stopped = jnp.any(token[:, None] == rules.stop_ids, axis=-1) | is_complete
    is_full = slots.made + 1 >= rules.max_tokens
    going = slots.is_active.astype(jnp.int32)
    ended = jnp.where(slots.is_active, jnp.where(is_stopped, 1, jnp.where(is_full, 2, 0)), jnp.int32(-1))
    emitted = Emitted(
        token=token,
        log_probability=logits[row, token] - normalizer,
        sampled_log_probability=sampled_log_probability,
        top_token=top_token,
        top_log_probability=top_logits - normalizer[:, None],
        ended=ended,
    )
    return slots._replace(
        cache=cache,
        token=token,
        length=slots.length + going,
        made=slots.made + going,
        node=node,
        is_active=ended == 0,
        count=slots.count.at[row, token].add(going),
    ), emitted
