"""The sampler: one way to generate for chat, server, evaluation and rollouts, with continuous batching.

A batch has a fixed number of slots on the device. A compiled loop decodes some tokens in all of them; then the host
reads the new tokens, frees the slots that are done and fills them from the queue. What a request gets depends on its
prompt, rules and seed alone: no slot sees another, and randomness is folded from the seed and the token's number.
"""

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from lacuna.checkpoint import OpenedModel
from lacuna.config import SamplingKeys, UserError
from lacuna.distributed import ROW_AXES, row_shards, shard, shard_rows
from lacuna.linear import for_rows
from lacuna.metrics import byte_size, free_memory_bytes
from lacuna.model import (
    PAGE,
    Cache,
    ModelConfig,
    PerSlot,
    Rotation,
    check_sequence_length,
    decode_step,
    decoding_params,
    empty_cache,
    head_of,
    logits_of,
    prefill,
    rotation_table,
)
from lacuna.tokenizer import TextStream

BLOCK = 32  # most tokens between two looks of the host
STOP_IDS = 8
TOP_LOGPROBS = 20
VOCABULARY_BLOCK = 128
PREFILL_ROWS, PREFILL_PAGES = (64, 16, 4, 1), 128
LEAST_PAGES = 4

SlotLogits = Float[Array, "slot vocab"]
Scores = tuple[tuple[float, ...], tuple[Any, ...]]
FinishReason = Literal["", "stop", "length"]
FINISH_REASONS: tuple[FinishReason, ...] = ("", "stop", "length")


# The next token of each slot


class Rules(NamedTuple):
    """The rules of the request in each slot."""

    temperature: Float[Array, " slot"]
    top_k: PerSlot
    top_p: Float[Array, " slot"]
    min_p: Float[Array, " slot"]
    repetition_penalty: Float[Array, " slot"]
    frequency_penalty: Float[Array, " slot"]
    presence_penalty: Float[Array, " slot"]
    max_tokens: PerSlot
    seed: UInt32[Array, " slot"]
    index: PerSlot
    top_logprobs: PerSlot
    stop_ids: Int[Array, "slot stop"]


class Forest(NamedTuple):
    """Allowed outputs as paths: the edges of `node` are those from `first[node]` to `first[node + 1]`, each with a
    token, and lead to one node each, in the same order, after the roots; a node without edges ends the output. `fan`
    counts up to the most edges of a node."""

    first: Int[Array, " node_and_end"]
    token: Int[Array, " edge"]
    fan: Int[Array, " width"]

    @property
    def root_count(self) -> int:
        """How many of the first nodes no edge leads to."""
        return len(self.first) - 1 - len(self.token)


class Slots(NamedTuple):
    """The batch: `token` is the last one, not in the cache yet, `made` the number of generated tokens, `node` the place
    in the forest (-1: unconstrained), and `is_prompted` and `count` are what penalties need to know."""

    cache: Cache
    token: PerSlot
    length: PerSlot
    made: PerSlot
    node: PerSlot
    is_active: Bool[Array, " slot"]
    is_prompted: Bool[Array, "slot vocab"]
    count: Int[Array, "slot vocab"]


class Prompts(NamedTuple):
    """Prompts that were prefilled together, padded to one length."""

    cache: Cache
    token: Int[Array | np.ndarray, "row token"]
    length: Int[Array | np.ndarray, " row"]


class Emitted(NamedTuple):
    """The tokens of a block with their log-probabilities under the model, the same at the temperature, and in the
    distribution drawn from: `ended` is -1 where a slot was idle, 0 where more follows, 1 at a stop, 2 at the limit."""

    token: Int[Array, "step slot"]
    log_probability: Float[Array, "step slot"]
    tempered_log_probability: Float[Array, "step slot"]
    sampled_log_probability: Float[Array, "step slot"]
    ended: Int[Array, "step slot"]
    top_token: Int[Array, "step slot top"]
    top_log_probability: Float[Array, "step slot top"]


def penalise(logits: SlotLogits, slots: Slots, rules: Rules) -> SlotLogits:
    """Logits less the penalties: repetition (Keskar et al. 2019) sees the prompt too, the others generated tokens."""
    is_penalised = (rules.repetition_penalty != 1) | (rules.frequency_penalty != 0) | (rules.presence_penalty != 0)
    is_generated = slots.count > 0

    def penalised() -> SlotLogits:
        penalty = rules.repetition_penalty[:, None]
        repeated = jnp.where(logits < 0, logits * penalty, logits / penalty)
        scores = jnp.where(slots.is_prompted | is_generated, repeated, logits)
        return scores - rules.frequency_penalty[:, None] * slots.count - rules.presence_penalty[:, None] * is_generated

    return jax.lax.cond(jnp.any(is_penalised & slots.is_active), penalised, lambda: logits)


def restrict(logits: SlotLogits, rules: Rules) -> SlotLogits:
    """Logits over the temperature; those that top_k, top_p and min_p, in this order, rule out are -inf."""
    temperature = jnp.where(rules.temperature > 0, rules.temperature, 1)[:, None]
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    is_filtered = (rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)

    def filtered() -> SlotLogits:
        bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
        rank = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
        most = jnp.where(rules.top_k > 0, rules.top_k, jnp.inf)
        kept = rank >= threshold(rank, jnp.ones_like(scores), most)[:, None]
        probability = jax.nn.softmax(jnp.where(kept, scores, -jnp.inf), axis=-1)
        mass = jnp.where(rules.top_p < 1, rules.top_p, jnp.inf)
        kept &= rank >= threshold(rank, probability, mass)[:, None]
        kept &= scores >= jnp.log(rules.min_p)[:, None]
        return jnp.where(kept, scores, -jnp.inf)

    return jax.lax.cond(jnp.any(is_filtered), filtered, lambda: scores)


def threshold(
    rank: UInt32[Array, "slot vocab"], weight: SlotLogits, target: Float[Array, " slot"]
) -> UInt32[Array, " slot"]:
    """The highest rank such that the weights of this rank and above sum to `target`; 0 where there is none. Found bit
    by bit, without a sort."""

    def set_bit(number: Int[Array, ""], found: UInt32[Array, " slot"]) -> UInt32[Array, " slot"]:
        trial = found | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
        total = jnp.sum(jnp.where(rank >= trial[:, None], weight, 0), axis=-1)
        return jnp.where(total >= target, trial, found)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(rank.shape[:1], jnp.uint32))


def in_blocks(scores: SlotLogits, filling: float) -> Float[Array, "slot block part"]:
    """The vocabulary in blocks, the last one padded."""
    padding = ((0, 0), (0, -scores.shape[1] % VOCABULARY_BLOCK))
    return jnp.pad(scores, padding, constant_values=filling).reshape(len(scores), -1, VOCABULARY_BLOCK)


def likeliest_token(scores: SlotLogits) -> PerSlot:
    """The first token of the highest score: by block, then within it, as XLA's argmax on a CPU is slow."""
    blocks = in_blocks(scores, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * VOCABULARY_BLOCK + jnp.argmax(inside, axis=-1)


def draw_token(scores: SlotLogits, seed: UInt32[Array, " slot"], index: PerSlot, made: Array) -> PerSlot:
    """A token of each row's softmax, by two uniform numbers: one for a block of the vocabulary, one for the token."""

    def uniforms(seed: Array, index: Array, made: Array) -> Float[Array, " 2"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), made), (2,))

    def pick(mass: Float[Array, "slot part"], uniform: Float[Array, " slot"]) -> PerSlot:
        total = jnp.cumsum(mass, axis=-1)
        return jnp.argmax(total > (uniform * total[:, -1])[:, None], axis=-1)

    weight = in_blocks(jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    uniform = jax.vmap(uniforms)(seed, index, made)
    block = pick(jnp.sum(weight, axis=-1), uniform[:, 0])
    inside = pick(jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
    return block * VOCABULARY_BLOCK + inside


def choose_token(
    scores: SlotLogits, rules: Rules, made: PerSlot, is_active: Bool[Array, " slot"]
) -> tuple[PerSlot, Float[Array, " slot"]]:
    """A token for each slot, and its log-probability in the distribution it was drawn from: 0 where greedy."""
    likeliest, is_drawn = likeliest_token(scores), rules.temperature > 0

    def draw() -> tuple[PerSlot, Float[Array, " slot"]]:
        kept = restrict(scores, rules)
        token = jnp.where(is_drawn, draw_token(kept, rules.seed, rules.index, made), likeliest)
        log_probability = kept[jnp.arange(len(token)), token] - jax.nn.logsumexp(kept, axis=-1)
        return token, jnp.where(is_drawn, log_probability, 0)

    return jax.lax.cond(jnp.any(is_drawn & is_active), draw, lambda: (likeliest, jnp.zeros(len(likeliest))))


def edges_of(forest: Forest, node: Int[Array, " row"]) -> tuple[Int[Array, "row width"], Int[Array, "row width"]]:
    """Token and child of each edge of a node, -1 where it has no more."""
    edge = forest.first[node][:, None] + forest.fan
    exists = edge < forest.first[node + 1][:, None]
    return jnp.where(exists, forest.token[edge], -1), jnp.where(exists, edge + forest.root_count, -1)


def is_leaf(forest: Forest, node: Int[Array, "*row"]) -> Bool[Array, "*row"]:
    return forest.first[node] == forest.first[node + 1]


def confine(logits: SlotLogits, forest: Forest, node: PerSlot) -> SlotLogits:
    """Logits of the tokens that a node allows, -inf for all others; node -1 allows everything."""
    token, _ = edges_of(forest, jnp.maximum(node, 0))
    token = jnp.where(token < 0, logits.shape[1], token)
    allowed = jnp.zeros(logits.shape, bool).at[jnp.arange(len(node))[:, None], token].set(True, mode="drop")
    return jnp.where(allowed | (node < 0)[:, None], logits, -jnp.inf)


def follow(forest: Forest, node: PerSlot, token: PerSlot) -> PerSlot:
    """The child that a token leads to; -1 from node -1."""
    tokens, children = edges_of(forest, jnp.maximum(node, 0))
    child = jnp.max(jnp.where(tokens == token[:, None], children, 0), axis=-1)
    return jnp.where(node < 0, -1, child)


def next_token(
    params: PyTree[Array], slots: Slots, rules: Rules, constraint: Forest | None, rotations: Rotation,
    model: ModelConfig, given: PerSlot | None = None,
) -> tuple[Slots, Emitted]:  # fmt: skip
    """One more token in each active slot: penalise, constrain, choose, measure, and see whether it is the last. One
    that is `given`, not -1, is neither drawn nor the last."""
    logits, cache = decode_step(params, slots.cache, slots.token, slots.length, rotations, model)
    row = jnp.arange(len(logits))
    scores = penalise(logits, slots, rules)
    if constraint:
        scores = confine(scores, constraint, slots.node)
    token, sampled_log_probability = choose_token(scores, rules, slots.made, slots.is_active)
    is_given, is_prompted = jnp.zeros(len(row), bool), slots.is_prompted
    if given is not None:
        is_given = slots.is_active & (given >= 0)
        token = jnp.where(is_given, given, token)
        sampled_log_probability = jnp.where(is_given, 0, sampled_log_probability)
        is_prompted = is_prompted.at[row, token].max(is_given)

    normalizer = jax.nn.logsumexp(logits, axis=-1)
    log_probability = logits[row, token] - normalizer
    temperature = jnp.where(rules.temperature > 0, rules.temperature, 1)

    def tempered() -> Float[Array, " slot"]:
        scaled = logits / temperature[:, None]
        return scaled[row, token] - jax.nn.logsumexp(scaled, axis=-1)

    tempered_log_probability = jax.lax.cond(
        jnp.any((temperature != 1) & slots.is_active), tempered, lambda: log_probability
    )
    top = min(TOP_LOGPROBS, model.vocabulary_size)
    top_logits, top_token = jax.lax.cond(
        jnp.any((rules.top_logprobs > 0) & slots.is_active),
        lambda: tuple(jax.lax.top_k(logits, top)),
        lambda: (jnp.zeros((len(row), top)), jnp.zeros((len(row), top), jnp.int32)),
    )

    is_stop = jnp.any(token[:, None] == rules.stop_ids, axis=-1) & ~is_given
    node = slots.node
    if constraint:
        node = follow(constraint, node, token)
        is_stop |= (node >= 0) & is_leaf(constraint, node)
    is_full = slots.made + 1 >= rules.max_tokens
    ended = jnp.where(slots.is_active, jnp.where(is_stop, 1, jnp.where(is_full, 2, 0)), jnp.int32(-1))
    step = slots.is_active.astype(jnp.int32)
    slots = slots._replace(
        cache=cache,
        token=jnp.where(slots.is_active, token, slots.token),
        length=slots.length + step,
        made=slots.made + step,
        node=node,
        is_active=ended == 0,
        is_prompted=is_prompted,
        count=slots.count.at[row, token].add(step * ~is_given),
    )
    top_log_probability = top_logits - normalizer[:, None]
    measured = log_probability, tempered_log_probability, sampled_log_probability
    return slots, Emitted(token, *measured, ended, top_token, top_log_probability)


# The batch on the device


def sharded(slots: Slots) -> Slots:
    """Slots over the data axes, the cache's heads over tensor."""
    cache = jax.tree.map(lambda x: shard(x, ROW_AXES, "tensor"), slots.cache)
    return jax.tree.map(shard_rows, slots._replace(cache=()))._replace(cache=cache)


@partial(jax.jit, static_argnames=("model", "count", "pages", "dtype"))
def empty_slots(model: ModelConfig, count: int, pages: int, dtype: str) -> Slots:
    """A batch in which nothing is active."""
    zero, counts = jnp.zeros(count, jnp.int32), jnp.zeros((count, model.padded_vocabulary), jnp.int32)
    cache = empty_cache(model, count, pages, dtype)
    return sharded(Slots(cache, zero, zero, zero, zero, zero > 0, counts > 0, counts))


@partial(jax.jit, static_argnames="pages")
def resized(cache: Cache, pages: int) -> Cache:
    """The cache with more pages or fewer."""
    padding = ((0, 0), (0, 0), (0, max(pages - cache[0][0].shape[2], 0)), (0, 0), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x[:, :, :pages], padding), cache)


cast_params = jax.jit(decoding_params, static_argnames=("model", "dtype"))
fill_cache = jax.jit(lambda params, token, model: prefill(params, token, model)[1], static_argnames="model")


@partial(jax.jit, static_argnames="model")
def score_tokens(
    params: PyTree[Array], token: Int[Array, "row token"], model: ModelConfig
) -> tuple[Float[Array, " token"], Int[Array, "token top"], Float[Array, "token top"]]:
    """Of each token of the first row but its last: the log-probability (nats) of the next one, and the likeliest tokens
    there with theirs. In batches, as the logits of a whole prompt are large."""
    hidden, _ = prefill(params, token, model)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logits = logits_of(part[0][None, None], head_of(params, model), model.vocabulary_size)[0, 0]
        logits -= jax.nn.logsumexp(logits)
        top, top_token = jax.lax.top_k(logits, min(TOP_LOGPROBS, model.vocabulary_size))
        return logits[part[1]], top_token, top

    return jax.lax.map(score, (hidden[0], jnp.roll(token[0], -1)), batch_size=PAGE)


@partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, prompts: Prompts, is_new: Bool[Array, " slot"], row: PerSlot, root: PerSlot) -> Slots:
    """The batch with a new completion in each slot of `is_new`, of the prompt in that `row`, from that `root` of the
    forest; a prompt's last token is left for the next decode step."""
    new_slot = jnp.nonzero(is_new, size=len(is_new))[0]

    def place(number: Int[Array, ""], cache: Cache) -> Cache:
        slot = new_slot[number]

        def copy(whole: Array, part: Array) -> Array:
            prompt = jax.lax.dynamic_slice_in_dim(part, row[slot], 1)
            return jax.lax.dynamic_update_slice(whole, prompt, (slot, 0, 0, 0, 0))

        return jax.tree.map(copy, cache, prompts.cache)

    token, length = prompts.token, prompts.length
    last = jnp.take_along_axis(token, length[:, None] - 1, axis=1)[:, 0]
    known = jnp.where(jnp.arange(token.shape[1]) < length[:, None], token, slots.count.shape[1])
    is_prompted = jnp.zeros((len(token), slots.count.shape[1]), bool)
    is_prompted = is_prompted.at[jnp.arange(len(token))[:, None], known].set(True, mode="drop")
    slots = Slots(
        cache=jax.lax.fori_loop(0, jnp.sum(is_new), place, slots.cache),
        token=jnp.where(is_new, last[row], slots.token),
        length=jnp.where(is_new, length[row] - 1, slots.length),
        made=jnp.where(is_new, 0, slots.made),
        node=jnp.where(is_new, root, slots.node),
        is_active=slots.is_active | is_new,
        is_prompted=jnp.where(is_new[:, None], is_prompted[row], slots.is_prompted),
        count=jnp.where(is_new[:, None], 0, slots.count),
    )
    return sharded(slots)


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def decode_block(
    params: PyTree[Array],
    slots: Slots,
    rules: Rules,
    constraint: Forest | None,
    is_wanted: Bool[Array, " slot"],
    steps: Int[Array, ""],
    patience: Int[Array, ""],
    model: ModelConfig,
    given: Int[Array, "step slot"] | None = None,
) -> tuple[Slots, Emitted]:
    """Up to `steps` tokens in every active slot that is still wanted; fewer when `patience` slots have become free. A
    slot with a `given` token for the first step is active again, and continues with all that it has."""
    if given is not None:
        slots = slots._replace(is_active=slots.is_active | (given[0] >= 0))
    slots = slots._replace(is_active=slots.is_active & is_wanted)
    rules = jax.tree.map(shard_rows, rules)
    count, top = len(slots.token), min(TOP_LOGPROBS, model.vocabulary_size)
    whole, real = (jnp.zeros((BLOCK, count), kind) for kind in (jnp.int32, jnp.float32))
    tops = (jnp.zeros((BLOCK, count, top), kind) for kind in (jnp.int32, jnp.float32))
    first_count = jnp.sum(slots.is_active)
    rotations = rotation_table(slots.cache, model)

    def continues(carry: tuple[Array, Slots, Emitted]) -> Bool[Array, ""]:
        active_count = jnp.sum(carry[1].is_active)
        return (carry[0] < steps) & (active_count > 0) & (first_count - active_count < patience)

    def step(carry: tuple[Array, Slots, Emitted]) -> tuple[Array, Slots, Emitted]:
        number, slots, emitted = carry
        now = None if given is None else given[number]
        slots, found = next_token(params, slots, rules, constraint, rotations, model, now)
        return number + 1, slots, jax.tree.map(lambda all, one: all.at[number].set(one), emitted, found)

    carry = jnp.zeros((), jnp.int32), slots, Emitted(whole, real, real, real, whole - 1, *tops)
    _, slots, emitted = jax.lax.while_loop(continues, step, carry)
    return sharded(slots), jax.tree.map(shard, emitted)


# Requests and completions


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to continue it; its `n` completions, numbered from `first`, share one prefill, and each draws
    its own random numbers. `root` is the node of the sampler's constraint that outputs start from; -1 allows
    everything. `adapter` is the number of one of the sampler's adapters. One that `is_held` keeps its slot, and the
    cache, where it stops, until the sampler is told to `extend` or to `release` it."""

    prompt: tuple[int, ...]
    rules: SamplingKeys = SamplingKeys()
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    top_logprobs: int = 0
    root: int = -1
    adapter: int = 0
    first: int = 0
    is_held: bool = False


@dataclass(frozen=True)
class Completion:
    """What was generated, or the next part of it while `finish_reason` is empty.

    `tokens` include the stop token or those of the stop string, `text` does not. `log_probabilities` are the model's
    own, `tempered_log_probabilities` the same at the temperature, `sampled_log_probabilities` those in the distribution
    drawn from (0 where greedy), all in nats.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    text: str
    log_probabilities: tuple[float, ...]
    sampled_log_probabilities: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason
    tempered_log_probabilities: tuple[float, ...] = ()


def joined_parts(parts: Sequence[Completion]) -> Completion:
    """The whole completion of these parts, in order."""
    values = ("log_probabilities", "tempered_log_probabilities", "sampled_log_probabilities", "top_logprobs")
    names = ("tokens", *values)
    whole = {name: tuple(itertools.chain.from_iterable(getattr(part, name) for part in parts)) for name in names}
    return replace(parts[-1], text="".join(part.text for part in parts), **whole)


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """The text before the first stop string, the text held back as it may begin one, and whether one occurred."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    if places:
        return text[: min(places)], "", True
    sizes = (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size]))
    cut = len(text) - max(sizes, default=0)
    return text[:cut], text[cut:], False


@dataclass
class Running:
    """A completion in a slot: its text so far, the end of it held back as it may begin a stop string, tokens that it
    continues with before any is drawn, and whether it waits for such."""

    number: int
    index: int
    request: Request
    stream: TextStream
    length: int
    held: str = ""
    given: tuple[int, ...] = ()
    is_waiting: bool = False

    def read(self, tokens: list[int], reason: FinishReason) -> tuple[str, int, FinishReason]:
        """The text of new tokens, the number of those up to a stop string, and the reason why they end."""
        stop, whole = self.request.stop, ""
        shown = tokens[:-1] if reason == "stop" and tokens[-1] in self.request.stop_ids else tokens
        for count, token in enumerate(shown, 1):
            text, self.held, is_stopped = before_stop(self.held + self.stream.add([token]), stop)
            whole += text
            if is_stopped:
                return whole, count, "stop"
        if reason:
            whole += "".join(before_stop(self.held + self.stream.rest(), stop)[:2])
        return whole, len(tokens), reason


# The sampler


class Sampler:
    """Continuous batching over `slots` sequences of up to `capacity` tokens, prompt and completion together.

    `submit` and `cancel` may be called from any thread, the rest from one thread at a time.
    """

    def __init__(
        self,
        params: PyTree[Array],
        opened: OpenedModel,
        slots: int,
        capacity: int,
        dtype: str = "bfloat16",
        constraint: Forest | None = None,
        adapter_count: int = 0,
    ) -> None:
        """Raises UserError where slots, capacity or constraint do not suit the model and devices, or the cache does not
        fit. `constraint` is what requests with a `root` may output, `adapter_count` how many adapters `params` have to
        choose from, if they have more than one."""
        model, mesh = opened.model, opened.mesh
        check_sequence_length(model, capacity)
        if slots < 1 or slots % row_shards(mesh):
            raise UserError(
                f"slots = {slots} do not divide over data × fsdp = {row_shards(mesh)} devices; set a multiple of that"
            )
        check_memory(model, slots, capacity, dtype, mesh)
        self.opened, self.model, self.tokenizer, self.mesh = opened, model, opened.tokenizer, mesh
        self.capacity, self.dtype, self.adapter_count = capacity, dtype, adapter_count
        self.constraint, self.roots = None, {-1}
        if constraint:
            forest = jax.device_get(constraint)
            check_vocabulary(forest.token.tolist(), model)
            self.constraint = jax.device_put(forest, NamedSharding(mesh, PartitionSpec()))
            self.roots.update(np.flatnonzero(np.diff(forest.first)).tolist())
        self.numbers = itertools.count()
        self.waiting: deque[tuple[int, int, Request]] = deque()  # each a request's number, a completion's index in it
        self.prefilled: dict[int, tuple[Prompts, int]] = {}  # by number, where some completions still wait: the row
        self.cancellations: deque[int] = deque()
        self.running: list[Running | None] = [None] * slots
        self.rules = [rules_of(Request((0,)), 0, capacity)] * slots
        self.load(params)
        with jax.set_mesh(mesh):
            self.slots = empty_slots(model, slots, page_count(1, capacity, LEAST_PAGES), dtype)

    def load(self, params: PyTree[Array]) -> None:
        """Generate from these weights from now on."""
        self.params = None  # what was there makes room
        with jax.set_mesh(self.mesh):
            self.params = cast_params(params, self.model, self.dtype)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self.waiting and not any(self.running)

    def check(self, request: Request) -> None:
        """Raises UserError where the request can't be generated."""
        length, stop_count, n, top = len(request.prompt), len(request.stop_ids), request.n, request.top_logprobs
        refusals = {
            f"the prompt has {length:,} tokens, and prompt and completion together have room for {self.capacity:,}; "
            f"shorten the prompt to {self.capacity - 1:,} tokens or less": length >= self.capacity,
            "the prompt has no token; begin with the tokenizer's BOS or with some text": not length,
            f"stop_ids has {stop_count} tokens; at most {STOP_IDS} can stop a completion": stop_count > STOP_IDS,
            "stop holds an empty string, which would stop everything; leave it out": not all(request.stop),
            f"n = {n} should be 1 or more, top_logprobs = {top} 0 to {TOP_LOGPROBS}":
                n < 1 or not 0 <= top <= TOP_LOGPROBS,
            f"root = {request.root} is no node of the sampler's constraint with tokens to choose from; "
            "give the Sampler a constraint with it, or leave root at -1": request.root not in self.roots,
            f"adapter = {request.adapter} is none of the sampler's {self.adapter_count}":
                not 0 <= request.adapter < max(self.adapter_count, 1),
            "a request that is held has no stop strings, as its slot may be past one": request.is_held and request.stop,
        }  # fmt: skip
        for problem, is_there in refusals.items():
            if is_there:
                raise UserError(problem)
        check_vocabulary([*request.prompt, *request.stop_ids], self.model)

    def submit(self, request: Request) -> int:
        """Queue a request; its completions carry the number returned. Raises UserError where it can't be generated."""
        self.check(request)
        number = next(self.numbers)
        self.waiting.extend((number, request.first + index, request) for index in range(request.n))
        return number

    def extend(self, number: int, index: int, tokens: Sequence[int]) -> None:
        """Continue a completion that is held with these tokens, which count as its own, and then with what it draws."""
        (running,) = [each for each in self.running if each and (each.number, each.index) == (number, index)]
        running.given, running.is_waiting = tuple(tokens), False
        running.stream = TextStream(self.tokenizer, tokens)

    def release(self, number: int, index: int) -> None:
        """Free the slot of a completion that is held, if it has one."""
        key = number, index
        self.running = [None if each and (each.number, each.index) == key else each for each in self.running]

    def cancel(self, number: int) -> None:
        """Drop a request: at the next `advance` its slots become free, and no more parts of it are returned."""
        self.cancellations.append(number)

    def advance(self, steps: int = BLOCK) -> list[Completion]:
        """Admit waiting requests, decode up to `steps` tokens in every slot, and return the next part of each."""
        with jax.set_mesh(self.mesh):
            self._drop_cancelled()
            arrivals = self._assign_slots()
            self._resize(steps)
            self._insert(arrivals)
            is_wanted = np.array([running is not None and not running.is_waiting for running in self.running])
            if not any(is_wanted):
                return []
            is_awaited = bool(self.waiting) or any(running.request.is_held for running in self.running if running)
            patience = max(1, len(self.running) // 8) if is_awaited else len(self.running)
            limits = np.int32(min(steps, BLOCK)), np.int32(patience)
            adapters = [running.request.adapter if running else 0 for running in self.running]
            self.slots, emitted = decode_block(
                self.params_of(adapters),
                self.slots,
                stacked(self.rules),
                self.constraint,
                is_wanted,
                *limits,
                self.model,
                self._given(),
            )
            if not any(running.request.top_logprobs for running in self.running if running):
                nothing = np.zeros((BLOCK, len(self.running), 0))
                emitted = emitted._replace(top_token=nothing, top_log_probability=nothing)
            emitted = jax.device_get(emitted)
        slots = enumerate(self.running)
        return [self._part(slot, running, emitted) for slot, running in slots if running and is_wanted[slot]]

    def generate(
        self, requests: Sequence[Request], progress: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """All completions of all requests, in order, `request` being the index in `requests`; `progress` gets each when
        it is done. The longest by max_tokens start first, so that none of them is left to run alone."""
        assert self.is_idle, "another thread's requests would be lost"
        order = sorted(range(len(requests)), key=lambda index: -requests[index].rules.max_tokens)
        index_of = {self.submit(requests[index]): index for index in order}
        parts: dict[tuple[int, int], list[Completion]] = defaultdict(list)
        while not self.is_idle:
            for part in self.advance():
                key = index_of[part.request], part.index
                parts[key].append(replace(part, request=key[0]))
                if part.finish_reason and progress:
                    progress(joined_parts(parts[key]))
        return [joined_parts(parts[key]) for key in sorted(parts)]

    def scores_of(self, prompt: tuple[int, ...], top: int, adapter: int = 0) -> Scores:
        """The log-probability in nats of each token of a prompt given those before it, nan for the first, and the
        likeliest `top` tokens in its place with theirs."""
        token = np.zeros((slots_for(1, self.mesh), page_count(len(prompt), self.capacity) * PAGE), np.int32)
        token[:, : len(prompt)] = prompt
        with jax.set_mesh(self.mesh):
            found = jax.device_get(score_tokens(self.params_of([adapter] * len(token)), token, self.model))
        values, ids, tops = (part[: len(prompt) - 1].tolist() for part in found)
        likeliest = (tuple(zip(row[:top], value[:top], strict=True)) for row, value in zip(ids, tops, strict=True))
        return (math.nan, *values), ((), *likeliest)

    def _drop_cancelled(self) -> None:
        while self.cancellations:
            number = self.cancellations.popleft()
            self.running = [None if running and running.number == number else running for running in self.running]
            for entry in [entry for entry in list(self.waiting) if entry[0] == number]:
                self.waiting.remove(entry)
            self.prefilled.pop(number, None)

    def _assign_slots(self) -> dict[int, Running]:
        """Give free slots to waiting completions, in the order of the queue."""
        arrivals: dict[int, Running] = {}
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                number, index, request = self.waiting.popleft()
                stream = TextStream(self.tokenizer, request.prompt)
                self.running[slot] = arrivals[slot] = Running(number, index, request, stream, len(request.prompt) - 1)
                self.rules[slot] = rules_of(request, index, self.capacity)
        return arrivals

    def _resize(self, steps: int) -> None:
        """Grow the cache to what the next steps need; shrink it when they need a quarter or less."""
        longest = max((running.length for running in self.running if running), default=0)
        pages, needed = self.slots.cache[0][0].shape[2], page_count(longest + steps, self.capacity, LEAST_PAGES)
        if needed > pages or 4 * needed <= pages:
            self.slots = self.slots._replace(cache=resized(self.slots.cache, needed))

    def _given(self) -> Int[np.ndarray, "step slot"] | None:
        """The tokens that slots continue with in the next block; None if none has any."""
        if not any(running.given for running in self.running if running):
            return None
        given = np.full((BLOCK, len(self.running)), -1, np.int32)
        for slot, running in enumerate(self.running):
            tokens = running.given[:BLOCK] if running else ()
            given[: len(tokens), slot] = tokens
        return given

    def _insert(self, arrivals: dict[int, Running]) -> None:
        """Prefill new prompts, those of similar length together, and put every arrival into its slot."""
        requests = {running.number: running.request for running in arrivals.values()}
        groups: dict[int, list[int]] = defaultdict(list)
        for number, request in requests.items():
            if number not in self.prefilled:
                groups[page_count(len(request.prompt), self.capacity)].append(number)
        for pages, group in groups.items():
            while group:
                most = max(min(len(group), PREFILL_PAGES // pages), 1)
                size = next(size for size in PREFILL_ROWS if size <= most)
                prompts = self._prefill([requests[number] for number in group[:size]], pages)
                self.prefilled |= {number: (prompts, row) for row, number in enumerate(group[:size])}
                group = group[size:]
        source: list[Prompts | None] = [None] * len(self.running)
        row, root = (np.zeros(len(self.running), np.int32) for _ in range(2))
        for slot, running in arrivals.items():
            source[slot], row[slot] = self.prefilled[running.number]
            root[slot] = running.request.root
            if running.index == running.request.first + running.request.n - 1:
                del self.prefilled[running.number]
        for prompts in {id(prompts): prompts for prompts in source if prompts}.values():
            is_new = np.array([each is prompts for each in source])
            self.slots = insert(self.slots, prompts, is_new, row, root)

    def _prefill(self, requests: Sequence[Request], pages: int) -> Prompts:
        token = np.zeros((slots_for(len(requests), self.mesh), pages * PAGE), np.int32)
        length, adapters = np.ones(len(token), np.int32), [0] * len(token)
        for row, request in enumerate(requests):
            length[row], adapters[row] = len(request.prompt), request.adapter
            token[row, : len(request.prompt)] = request.prompt
        return Prompts(fill_cache(self.params_of(adapters), token, self.model), token, length)

    def params_of(self, adapters: Sequence[int]) -> PyTree[Array]:
        """The weights for a batch whose rows have the adapters of these numbers."""
        return for_rows(self.params, np.array(adapters, np.int32)) if self.adapter_count else self.params

    def _part(self, slot: int, running: Running, emitted: Emitted) -> Completion:
        """The new tokens of one slot, which becomes free if they end the completion."""
        count = int(np.sum(emitted.ended[:, slot] >= 0))
        new = jax.tree.map(lambda x: x[:count, slot].tolist(), emitted)
        running.length += count
        given_count = min(count, len(running.given))
        running.given = running.given[given_count:]
        text, count, reason = running.read(new.token[given_count:], FINISH_REASONS[new.ended[-1]])
        count += given_count
        if reason == "stop" and running.request.is_held:
            running.is_waiting = True
        elif reason:
            self.running[slot] = None
        top = running.request.top_logprobs
        tops = zip(new.top_token[:count], new.top_log_probability[:count], strict=True)
        return Completion(
            request=running.number,
            index=running.index,
            tokens=tuple(new.token[:count]),
            text=text,
            log_probabilities=tuple(new.log_probability[:count]),
            tempered_log_probabilities=tuple(new.tempered_log_probability[:count]),
            sampled_log_probabilities=tuple(new.sampled_log_probability[:count]),
            top_logprobs=tuple(tuple(zip(ids[:top], values[:top], strict=True)) for ids, values in tops),
            finish_reason=reason,
        )


# Sizes and limits


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def slots_for(wanted: int, mesh: Mesh | AbstractMesh) -> int:
    """The least number of slots from `wanted` up that divides over the devices."""
    return math.ceil(wanted / row_shards(mesh)) * row_shards(mesh)


def page_count(length: int, capacity: int, least: int = 1) -> int:
    """Pages for up to `length` tokens, from few sizes: a power of two from `least` up, or all there are."""
    return min(max(power_of_two(math.ceil(length / PAGE)), least), math.ceil(capacity / PAGE))


def rules_of(request: Request, index: int, capacity: int) -> Rules:
    """The rules of one completion, a number each."""
    values: dict[str, Any] = request.rules.model_dump() | {
        "top_k": min(request.rules.top_k, 2**31 - 1),
        "max_tokens": min(request.rules.max_tokens, capacity - len(request.prompt)),
        "seed": np.uint32(request.seed % 2**32),
        "index": index,
        "top_logprobs": request.top_logprobs,
        "stop_ids": [*request.stop_ids, *[-1] * (STOP_IDS - len(request.stop_ids))],
    }
    return Rules(**values)


def stacked(rules: Sequence[Rules]) -> Rules:
    """The rules of every slot, an array each."""
    return Rules(*map(np.array, zip(*rules, strict=True)))


def check_vocabulary(token: Sequence[int], model: ModelConfig) -> None:
    """Refuse ids that are no token."""
    if unknown := [each for each in token if not 0 <= each < model.vocabulary_size]:
        raise UserError(f"token {unknown[0]} is not in the model's vocabulary of {model.vocabulary_size:,}")


def check_memory(model: ModelConfig, slots: int, capacity: int, dtype: str, mesh: Mesh) -> None:
    """Refuse a batch that does not fit; while it grows to its last size it takes one and a half times that."""
    batch = jax.eval_shape(partial(empty_slots, model, slots, math.ceil(capacity / PAGE), dtype))
    total, free = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)), free_memory_bytes()
    share = total * 3 // (2 * mesh.size)
    if free is not None and share > free:
        raise UserError(
            f"{slots} slots of {capacity:,} tokens take {byte_size(total)} in {dtype}, {byte_size(share)} on each "
            f"of {mesh.size} devices while growing, and {byte_size(free)} are free there; lower slots or capacity"
        )
