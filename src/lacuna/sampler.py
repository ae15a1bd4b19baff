"""The sampler: one way to generate for chat, server, evaluation and rollouts, with continuous batching.

A batch has a fixed number of slots on the device. A compiled loop decodes some tokens in all of them; then the host
looks at what came, frees the slots that are done and fills them from the queue. What a request gets depends on its
prompt, rules and seed alone: no slot sees another, and randomness is folded from the seed and the token's number.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32
from pydantic import ValidationError

from lacuna import checkpoint
from lacuna.apps.configs import GenerationConfig
from lacuna.checkpoint import OpenedModel
from lacuna.config import SamplingKeys, UserError
from lacuna.distributed import ROW_AXES, enable_compilation_cache, make_mesh, row_shards, shard_rows
from lacuna.metrics import byte_size, free_memory_bytes
from lacuna.model import (
    PAGE,
    Cache,
    ModelConfig,
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
from lacuna.tokenizer import TextStream, Tokenizer, read_json

VOCABULARY_BLOCK = 128


class Rules(NamedTuple):
    """A request's rules as the device reads them, one row a slot."""

    temperature: Float[Array, " slot"]
    top_k: Int[Array, " slot"]
    top_p: Float[Array, " slot"]
    min_p: Float[Array, " slot"]
    repetition_penalty: Float[Array, " slot"]
    frequency_penalty: Float[Array, " slot"]
    presence_penalty: Float[Array, " slot"]
    max_tokens: Int[Array, " slot"]
    seed: UInt32[Array, " slot"]
    index: Int[Array, " slot"]
    top_logprobs: Int[Array, " slot"]
    stop_ids: Int[Array, "slot stop"]


def penalise(
    logits: Float[Array, "slot vocab"],
    is_prompted: Bool[Array, "slot vocab"],
    count: Int[Array, "slot vocab"],
    rules: Rules,
) -> Float[Array, "slot vocab"]:
    """Logits less the penalties: repetition (Keskar et al. 2019) sees the prompt too, the others only what was made."""
    penalty = rules.repetition_penalty[:, None]
    repeated = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(is_prompted | (count > 0), repeated, logits)
    return logits - rules.frequency_penalty[:, None] * count - rules.presence_penalty[:, None] * (count > 0)


def restrict(logits: Float[Array, "slot vocab"], rules: Rules) -> Float[Array, "slot vocab"]:
    """Logits over the temperature, and of those that top_k, top_p and min_p leave over, in this order; others -inf."""
    temperature = jnp.where(rules.temperature > 0, rules.temperature, 1)[:, None]
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    is_filtered = (rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)

    def filtered() -> Float[Array, "slot vocab"]:
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
    rank: UInt32[Array, "slot vocab"], weight: Float[Array, "slot vocab"], target: Float[Array, " slot"]
) -> UInt32[Array, " slot"]:
    """The highest rank from which upwards the weights sum to `target`; 0 where they never do. Found bit by bit, which
    sorts nothing."""

    def set_bit(number: Int[Array, ""], found: UInt32[Array, " slot"]) -> UInt32[Array, " slot"]:
        trial = found | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
        total = jnp.sum(jnp.where(rank >= trial[:, None], weight, 0), axis=-1)
        return jnp.where(total >= target, trial, found)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(rank.shape[:1], jnp.uint32))


def in_blocks(scores: Float[Array, "slot vocab"], filling: float) -> Float[Array, "slot block part"]:
    """The vocabulary in blocks, the last one filled up."""
    padding = ((0, 0), (0, -scores.shape[1] % VOCABULARY_BLOCK))
    return jnp.pad(scores, padding, constant_values=filling).reshape(len(scores), -1, VOCABULARY_BLOCK)


def likeliest_token(scores: Float[Array, "slot vocab"]) -> Int[Array, " slot"]:
    """The first token of the highest score: by block, then in it, as XLA's argmax on a CPU goes token by token."""
    blocks = in_blocks(scores, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * VOCABULARY_BLOCK + jnp.argmax(inside, axis=-1)


def draw_token(
    scores: Float[Array, "slot vocab"], seed: UInt32[Array, " slot"], index: Int[Array, " slot"], made: Array
) -> Int[Array, " slot"]:
    """A token of each row's softmax, by two uniform numbers: one for a block of the vocabulary, one for the token."""

    def uniforms(seed: Array, index: Array, made: Array) -> Float[Array, " 2"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), made), (2,))

    def pick(mass: Float[Array, "slot part"], uniform: Float[Array, " slot"]) -> Int[Array, " slot"]:
        total = jnp.cumsum(mass, axis=-1)
        return jnp.argmax(total > (uniform * total[:, -1])[:, None], axis=-1)

    weight = in_blocks(jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    uniform = jax.vmap(uniforms)(seed, index, made)
    block = pick(jnp.sum(weight, axis=-1), uniform[:, 0])
    inside = pick(jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
    return block * VOCABULARY_BLOCK + inside


# Constraints: what an output may be


@dataclass(frozen=True, eq=False)
class Trie:
    """Allowed outputs: the edges of `node` are those from `first[node]` to `first[node + 1]`, each a token and a child;
    0 is the root, and a node without edges ends the output."""

    first: Int[np.ndarray, " node_and_end"]
    token: Int[np.ndarray, " edge"]
    child: Int[np.ndarray, " edge"]

    @property
    def width(self) -> int:
        """Most edges of a node."""
        return int(np.max(np.diff(self.first)))


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


class Forest(NamedTuple):
    """Tries on the device, one behind the other; `fan` counts to the most edges of a node."""

    first: Int[Array, " node_and_end"]
    token: Int[Array, " edge"]
    child: Int[Array, " edge"]
    fan: Int[Array, " width"]


def forest_of(tries: Sequence[Trie]) -> tuple[Forest, list[int]]:
    """The tries as one, and the root of each; sizes are rounded up, so that few programs are compiled."""
    roots = np.cumsum([0, *(len(trie.first) for trie in tries)]).tolist()
    edges = np.cumsum([0, *(len(trie.token) for trie in tries)]).tolist()
    ends = [trie.first + edge for trie, edge in zip(tries, edges, strict=False)]
    children = [trie.child + root for trie, root in zip(tries, roots, strict=False)]

    def padded(parts: list[np.ndarray], fill: int) -> np.ndarray:
        whole = np.concatenate([np.zeros(0, np.int32), *parts])
        return np.pad(whole, (0, power_of_two(len(whole) + 2) - len(whole)), constant_values=fill).astype(np.int32)

    width = power_of_two(max((trie.width for trie in tries), default=1))
    arrays = padded(ends, edges[-1]), padded([trie.token for trie in tries], -1), padded(children, 0)
    return Forest(*map(jnp.asarray, arrays), jnp.arange(width)), roots[:-1]


def edges_of(forest: Forest, node: Int[Array, " row"]) -> tuple[Int[Array, "row width"], Int[Array, "row width"]]:
    """Token and child of each edge of a node, -1 where it has no more."""
    edge = forest.first[node][:, None] + forest.fan
    exists = edge < forest.first[node + 1][:, None]
    return jnp.where(exists, forest.token[edge], -1), jnp.where(exists, forest.child[edge], -1)


def is_leaf(forest: Forest, node: Int[Array, "*row"]) -> Bool[Array, "*row"]:
    return forest.first[node] == forest.first[node + 1]


def confine(
    logits: Float[Array, "slot vocab"], forest: Forest, node: Int[Array, " slot"]
) -> Float[Array, "slot vocab"]:
    """Logits of what a node allows, -inf for all else; node -1 allows everything."""
    token, _ = edges_of(forest, jnp.maximum(node, 0))
    token = jnp.where(token < 0, logits.shape[1], token)
    allowed = jnp.zeros(logits.shape, bool).at[jnp.arange(len(node))[:, None], token].set(True, mode="drop")
    return jnp.where(allowed | (node < 0)[:, None], logits, -jnp.inf)


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


@partial(jax.jit, static_argnames=("model", "count", "pages", "dtype"))
def empty_slots(model: ModelConfig, count: int, pages: int, dtype: str) -> Slots:
    """A batch in which nothing is active."""
    whole, real = (jnp.zeros(count, kind) for kind in (jnp.int32, jnp.float32))
    rules = Rules(real, whole, real, real, real, real, real, whole, whole.astype(jnp.uint32), whole, whole,
                  jnp.zeros((count, STOP_IDS), jnp.int32))  # fmt: skip
    counts = jnp.zeros((count, model.padded_vocabulary), jnp.int32)
    cache = empty_cache(model, count, pages, dtype)
    return sharded(Slots(cache, whole, whole, whole, whole, whole > 0, counts > 0, counts, rules))


@partial(jax.jit, static_argnames="pages")
def resized(cache: Cache, pages: int) -> Cache:
    """The cache with more pages or fewer."""

    def resize(x: Array) -> Array:
        more = max(pages - x.shape[2], 0)
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :pages]

    return jax.tree.map(resize, cache)


cast_params = jax.jit(decoding_params, static_argnames=("model", "dtype"))
fill_cache = jax.jit(prefill, static_argnames="model")


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


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def decode_block(
    params: PyTree[Array],
    slots: Slots,
    forest: Forest,
    is_wanted: Bool[Array, " slot"],
    steps: Int[Array, ""],
    patience: Int[Array, ""],
    model: ModelConfig,
) -> tuple[Slots, Emitted]:
    """Up to `steps` tokens in every active slot that is still wanted; less when `patience` slots have come free."""
    slots = slots._replace(is_active=slots.is_active & is_wanted)
    count, top = len(slots.token), min(TOP_LOGPROBS, model.vocabulary_size)
    whole, real = (jnp.zeros((BLOCK, count), kind) for kind in (jnp.int32, jnp.float32))
    tops = (jnp.zeros((BLOCK, count, top), kind) for kind in (jnp.int32, jnp.float32))
    first_count = jnp.sum(slots.is_active)
    rotations = rotation_table(slots.cache, model)

    def goes_on(carry: Carry) -> Bool[Array, ""]:
        active_count = jnp.sum(carry[1].is_active)
        return (carry[0] < steps) & (active_count > 0) & (first_count - active_count < patience)

    def step(carry: Carry) -> Carry:
        number, slots, emitted = carry
        slots, found = next_token(params, slots, forest, rotations, model)
        return number + 1, slots, jax.tree.map(lambda all, one: all.at[number].set(one), emitted, found)

    carry = jnp.zeros((), jnp.int32), slots, Emitted(whole, real, real, *tops, whole - 1)
    _, slots, emitted = jax.lax.while_loop(goes_on, step, carry)
    if not jax.sharding.get_abstract_mesh().empty:
        emitted = jax.lax.with_sharding_constraint(emitted, PartitionSpec())
    return sharded(slots), emitted


def next_token(
    params: PyTree[Array], slots: Slots, forest: Forest, rotations: Rotation, model: ModelConfig
) -> tuple[Slots, Emitted]:
    """One more token in each active slot, by its own rules."""
    rules, row = slots.rules, jnp.arange(len(slots.token))
    hidden, cache = decode_step(params, slots.cache, slots.token, slots.length, rotations, model)
    logits = logits_of(hidden, head_of(params, model), model.vocabulary_size)[:, 0]

    def any_active(condition: Bool[Array, " slot"]) -> Bool[Array, ""]:
        return jnp.any(condition & slots.is_active)

    is_penalised = (rules.repetition_penalty != 1) | (rules.frequency_penalty != 0) | (rules.presence_penalty != 0)
    scores = jax.lax.cond(
        any_active(is_penalised), lambda: penalise(logits, slots.is_prompted, slots.count, rules), lambda: logits
    )
    is_confined = any_active(slots.node >= 0)
    scores = jax.lax.cond(is_confined, lambda: confine(scores, forest, slots.node), lambda: scores)
    best = likeliest_token(scores)

    def sampled() -> tuple[Int[Array, " slot"], Float[Array, " slot"]]:
        kept = restrict(scores, rules)
        token = jnp.where(rules.temperature > 0, draw_token(kept, rules.seed, rules.index, slots.made), best)
        probability = kept[row, token] - jax.nn.logsumexp(kept, axis=-1)
        return token, jnp.where(rules.temperature > 0, probability, 0)

    def greedy() -> tuple[Int[Array, " slot"], Float[Array, " slot"]]:
        return best, jnp.zeros(len(row))

    token, sampled_log_probability = jax.lax.cond(any_active(rules.temperature > 0), sampled, greedy)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    top = min(TOP_LOGPROBS, model.vocabulary_size)
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


PREFILL_ROWS, PREFILL_PAGES = (64, 16, 4, 1), 128
LEAST_PAGES = 4

FinishReason = Literal["", "stop", "length"]
FINISH_REASONS: tuple[FinishReason, ...] = ("", "stop", "length")


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and what to make of it; `n` completions share one prefill, and each has a stream of its own."""

    prompt: tuple[int, ...]
    rules: SamplingKeys = SamplingKeys()
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    top_logprobs: int = 0
    trie: Trie | None = None


@dataclass(frozen=True)
class Completion:
    """What was generated, or the next part of it while `finish_reason` is empty.

    `tokens` hold the stop token or those of the stop string, `text` does not. `log_probabilities` are the model's own,
    `sampled_log_probabilities` those under the distribution drawn from (0 where greedy), both in nats.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    text: str
    log_probabilities: tuple[float, ...]
    sampled_log_probabilities: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason


def joined_parts(parts: Sequence[Completion]) -> Completion:
    """The whole of which these are the parts, in order."""
    return replace(
        parts[-1],
        tokens=tuple(token for part in parts for token in part.tokens),
        text="".join(part.text for part in parts),
        log_probabilities=tuple(value for part in parts for value in part.log_probabilities),
        sampled_log_probabilities=tuple(value for part in parts for value in part.sampled_log_probabilities),
        top_logprobs=tuple(value for part in parts for value in part.top_logprobs),
    )


# The sampler


class Prompts(NamedTuple):
    """Prompts that were prefilled together."""

    cache: Cache
    token: Int[np.ndarray, "row token"]
    length: Int[np.ndarray, " row"]


@dataclass(eq=False)
class Waiting:
    """A request in the queue; its row of the prefilled prompts while some of its completions have no slot yet."""

    number: int
    request: Request
    next_index: int = 0
    prompts: Prompts | None = None
    row: int = 0


@dataclass
class Running:
    """A completion in a slot: where its text stands, and text held back as it may begin a stop string."""

    number: int
    index: int
    request: Request
    stream: TextStream
    length: int
    held: str = ""


Arrivals = dict[Waiting, list[tuple[int, Running]]]


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
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        """Raises UserError where slots or capacity do not suit the model and devices, or the cache does not fit."""
        _, model, tokenizer, mesh, _ = opened
        check_sequence_length(model, capacity)
        if slots < 1 or slots % row_shards(mesh):
            raise UserError(
                f"slots = {slots} do not divide over data × fsdp = {row_shards(mesh)} devices; set a multiple of that"
            )
        check_memory(model, slots, capacity, dtype, mesh)
        self.opened, self.capacity, self.dtype = opened, capacity, dtype
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.numbers = itertools.count()
        self.waiting: deque[Waiting] = deque()
        self.cancellations: deque[int] = deque()
        self.running: list[Running | None] = [None] * slots
        self.tries: list[Trie] = []
        self.forest, self.roots = forest_of([])
        self.load(params)
        with jax.set_mesh(mesh):
            self.pages = page_bucket(1, capacity)
            self.slots = empty_slots(model, slots, self.pages, dtype)

    def load(self, params: PyTree[Array]) -> None:
        """Generate from these weights from now on."""
        with jax.set_mesh(self.mesh):
            self.params = cast_params(params, self.model, self.dtype)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and not any(self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; its completions carry the number returned. Raises UserError where it can't be met."""
        check_request(request, self.model, self.capacity)
        number = next(self.numbers)
        self.waiting.append(Waiting(number, request))
        return number

    def cancel(self, number: int) -> None:
        """Give up a request: at the next `advance` its slots come free, and nothing more of it is told."""
        self.cancellations.append(number)

    def advance(self, steps: int = BLOCK) -> list[Completion]:
        """Admit what waits, decode up to `steps` tokens in every slot, and return the next part of each completion."""
        with jax.set_mesh(self.mesh):
            self._drop_cancelled()
            arrivals = self._assign_slots()
            self._resize(steps)
            self._insert(arrivals)
            if not any(self.running):
                return []
            patience = max(1, len(self.running) // 8) if self.waiting else len(self.running)
            is_wanted = np.array([running is not None for running in self.running])
            self.slots, emitted = decode_block(
                self.params, self.slots, self.forest, is_wanted, np.int32(min(steps, BLOCK)), np.int32(patience),
                self.model,
            )  # fmt: skip
            emitted = jax.device_get(emitted)
        return [self._part(slot, running, emitted) for slot, running in enumerate(self.running) if running]

    def generate(
        self, requests: Sequence[Request], progress: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """All completions of all requests, in order, `request` being the place in `requests`; `progress` sees each as
        it ends. What may become longest starts first, so that nothing long is left to run alone."""
        assert self.is_idle, "another thread's requests would be lost"
        order = sorted(range(len(requests)), key=lambda place: -requests[place].rules.max_tokens)
        place_of = {self.submit(requests[place]): place for place in order}
        parts: dict[tuple[int, int], list[Completion]] = defaultdict(list)
        while not self.is_idle:
            for part in self.advance():
                key = place_of[part.request], part.index
                parts[key].append(replace(part, request=key[0]))
                if part.finish_reason and progress:
                    progress(joined_parts(parts[key]))
        return [joined_parts(parts[key]) for key in sorted(parts)]

    def _drop_cancelled(self) -> None:
        while self.cancellations:
            number = self.cancellations.popleft()
            self.running = [None if running and running.number == number else running for running in self.running]
            for waiting in [waiting for waiting in list(self.waiting) if waiting.number == number]:
                self.waiting.remove(waiting)

    def _assign_slots(self) -> Arrivals:
        """The slots given to what waits, in the order of the queue."""
        arrivals: Arrivals = defaultdict(list)
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                waiting = self.waiting[0]
                request = waiting.request
                stream = TextStream(self.tokenizer, request.prompt)
                running = Running(waiting.number, waiting.next_index, request, stream, len(request.prompt) - 1)
                self.running[slot] = running
                arrivals[waiting].append((slot, running))
                waiting.next_index += 1
                if waiting.next_index == request.n:
                    self.waiting.popleft()
        return arrivals

    def _resize(self, steps: int) -> None:
        """Grow the cache to what the next steps need; shrink it when that is less than a quarter."""
        needed = page_bucket(
            max((running.length for running in self.running if running), default=0) + steps, self.capacity
        )
        if needed > self.pages or 4 * needed <= self.pages:
            self.pages = needed
            self.slots = self.slots._replace(cache=resized(self.slots.cache, needed))

    def _insert(self, arrivals: Arrivals) -> None:
        """Prefill new prompts, those of like length together, and put every arrival into its slot."""
        self._plant([waiting.request.trie for waiting in arrivals if waiting.request.trie])
        groups: dict[int, list[Waiting]] = defaultdict(list)
        for waiting in arrivals:
            if waiting.prompts:
                self._place(waiting.prompts, [waiting], arrivals)
            else:
                groups[prompt_pages(len(waiting.request.prompt), self.capacity)].append(waiting)
        for pages, group in groups.items():
            while group:
                most = max(min(len(group), PREFILL_PAGES // pages), 1)
                size = next(size for size in PREFILL_ROWS if size <= most)
                self._prefill(group[:size], pages, arrivals)
                group = group[size:]

    def _prefill(self, group: list[Waiting], pages: int, arrivals: Arrivals) -> None:
        shards = row_shards(self.mesh)
        token = np.zeros((-(-len(group) // shards) * shards, pages * PAGE), np.int32)
        length = np.ones(len(token), np.int32)
        for row, waiting in enumerate(group):
            length[row] = len(waiting.request.prompt)
            token[row, : length[row]] = waiting.request.prompt
        prompts = Prompts(fill_cache(self.params, token, self.model), token, length)
        for row, waiting in enumerate(group):
            waiting.prompts, waiting.row = prompts, row
        self._place(prompts, group, arrivals)

    def _plant(self, tries: list[Trie]) -> None:
        """Have these tries in the forest; when new ones come, those that nobody walks in go, and the others move."""
        if all(trie in self.tries for trie in tries):
            return
        walked = [running.request.trie for running in self.running if running and running.request.trie]
        before = dict(zip(self.tries, self.roots, strict=True))
        self.tries = list(dict.fromkeys(walked))  # the new ones among them
        self.forest, self.roots = forest_of(self.tries)
        moved = np.zeros(len(self.running), np.int32)
        for slot, running in enumerate(self.running):
            if running and running.request.trie in before:
                trie = running.request.trie
                moved[slot] = self.roots[self.tries.index(trie)] - before[trie]
        node = self.slots.node
        self.slots = self.slots._replace(node=jnp.where(node < 0, node, node + moved))

    def _place(self, prompts: Prompts, group: list[Waiting], arrivals: Arrivals) -> None:
        """Put the arrivals of prompts that were prefilled together into their slots."""
        count = len(self.running)
        entry = Entry(np.full(count, count, np.int32), np.zeros(count, np.int32), np.full(count, -1, np.int32))
        rules = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.slots.rules)
        placed = [(slot, running, waiting.row) for waiting in group for slot, running in arrivals[waiting]]
        for number, (slot, running, row) in enumerate(placed):
            trie = running.request.trie
            entry.slot[number], entry.row[number] = slot, row
            entry.node[number] = self.roots[self.tries.index(trie)] if trie else -1
            for name, value in rules_of(running.request, running.index, self.capacity).items():
                getattr(rules, name)[number] = value
        self.slots = insert(self.slots, *prompts, entry, rules, np.int32(len(placed)))

    def _part(self, slot: int, running: Running, emitted: Emitted) -> Completion:
        """What a block brought for one slot, which is free again where that was the end."""
        ended = emitted.ended[:, slot]
        count = int(np.sum(ended >= 0))
        tokens = emitted.token[:count, slot].tolist()
        running.length += count
        text, count, reason = self._read(running, tokens, FINISH_REASONS[ended[count - 1]])
        if reason:
            self.running[slot] = None
        top = running.request.top_logprobs
        tops = zip(emitted.top_token[:count, slot, :top], emitted.top_log_probability[:count, slot, :top], strict=True)
        return Completion(
            request=running.number,
            index=running.index,
            tokens=tuple(tokens[:count]),
            text=text,
            log_probabilities=tuple(emitted.log_probability[:count, slot].tolist()),
            sampled_log_probabilities=tuple(emitted.sampled_log_probability[:count, slot].tolist()),
            top_logprobs=tuple(tuple(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in tops),
            finish_reason=reason,
        )

    def _read(self, running: Running, tokens: list[int], reason: FinishReason) -> tuple[str, int, FinishReason]:
        """The text of new tokens, how many of them there are up to a stop string, and why they end."""
        stop = running.request.stop
        shown = tokens[:-1] if reason == "stop" and tokens[-1] in running.request.stop_ids else tokens
        stride = 1 if stop else max(len(shown), 1)
        told = ""
        for start in range(0, len(shown), stride):
            piece = running.stream.add(shown[start : start + stride])
            text, running.held, is_stopped = before_stop(running.held + piece, stop)
            told += text
            if is_stopped:
                return told, start + stride, "stop"
        if reason:
            told += "".join(before_stop(running.held + running.stream.rest(), stop)[:2])
        return told, len(tokens), reason


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """The text before the first stop string, the text held back as it may begin one, and whether one occurred."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    if places:
        return text[: min(places)], "", True
    sizes = (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size]))
    cut = len(text) - max(sizes, default=0)
    return text[:cut], text[cut:], False


def prompt_pages(length: int, capacity: int) -> int:
    """Pages of the prefill for a prompt: a power of two, or all there are."""
    return min(power_of_two(-(-length // PAGE)), -(-capacity // PAGE))


def page_bucket(length: int, capacity: int) -> int:
    """Pages of a cache for sequences of up to `length` tokens, from few sizes."""
    return max(prompt_pages(length, capacity), min(LEAST_PAGES, -(-capacity // PAGE)))


def rules_of(request: Request, index: int, capacity: int) -> dict[str, Any]:
    """One slot's row of `Rules`."""
    return request.rules.model_dump() | {
        "max_tokens": min(request.rules.max_tokens, capacity - len(request.prompt)),
        "seed": request.seed % 2**32,
        "index": index,
        "top_logprobs": request.top_logprobs,
        "stop_ids": [*request.stop_ids, *[-1] * (STOP_IDS - len(request.stop_ids))],
    }


def check_request(request: Request, model: ModelConfig, capacity: int) -> None:
    """Refuse what can't be generated."""
    length = len(request.prompt)
    if length >= capacity:
        raise UserError(
            f"the prompt has {length:,} tokens, and prompt and completion together have room for {capacity:,}; "
            f"shorten the prompt to {capacity - 1:,} tokens or less"
        )
    if not length:
        raise UserError("the prompt has no token; begin with the tokenizer's BOS or with some text")
    ids = [*request.prompt, *request.stop_ids, *(request.trie.token.tolist() if request.trie else ())]
    if unknown := [token for token in ids if not 0 <= token < model.vocabulary_size]:
        raise UserError(f"token {unknown[0]} is not in the model's vocabulary of {model.vocabulary_size:,}")
    if len(request.stop_ids) > STOP_IDS:
        raise UserError(f"stop_ids has {len(request.stop_ids)} tokens; at most {STOP_IDS} can stop a completion")
    if not all(request.stop):
        raise UserError("stop holds an empty string, which would stop everything; leave it out")
    if request.n < 1 or not 0 <= request.top_logprobs <= TOP_LOGPROBS:
        raise UserError(
            f"n = {request.n} should be 1 or more, top_logprobs = {request.top_logprobs} 0 to {TOP_LOGPROBS}"
        )


def batch_bytes(model: ModelConfig, slots: int, capacity: int, dtype: str) -> int:
    """Size of a batch with all of its cache, over all devices."""
    tokens = -(-capacity // PAGE) * PAGE
    cache = 2 * model.layers * model.kv_heads * model.head * tokens * jnp.dtype(dtype).itemsize
    return slots * (cache + model.padded_vocabulary * 5)


def check_memory(model: ModelConfig, slots: int, capacity: int, dtype: str, mesh: Mesh) -> None:
    """Refuse a batch that does not fit; growing to its last size it is there one and a half times."""
    total, free = batch_bytes(model, slots, capacity, dtype), free_memory_bytes()
    share = total * 3 // (2 * mesh.size)
    if free is not None and share > free:
        raise UserError(
            f"{slots} slots of {capacity:,} tokens take {byte_size(total)} in {dtype}, {byte_size(share)} on each "
            f"of {mesh.size} devices while growing, and {byte_size(free)} are free there; lower slots or capacity"
        )


def generation_defaults(directory: Path, tokenizer: Tokenizer) -> tuple[SamplingKeys, tuple[int, ...]]:
    """The sampling rules and stop tokens that a model asks for in generation_config.json.

    Raises:
        UserError: a value there that no rule can have.
    """
    path = directory / "generation_config.json"
    raw = read_json(path)
    values = {
        name: raw[name] for name in SamplingKeys.model_fields if raw.get(name) is not None and name != "max_tokens"
    }
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0
    stated = raw.get("eos_token_id")
    stops = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_id]
    try:
        return SamplingKeys(**values), tuple(dict.fromkeys(token for token in stops if token is not None))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path}: {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}; mend the file"
        ) from error


def rules_by_origin(config: SamplingKeys, defaults: SamplingKeys) -> str:
    """The rules in force in words: those that were typed, those of generation_config.json, and all else."""
    rules = rules_in_force(config, defaults)
    by_origin: dict[str, list[str]] = {"typed": [], "generation_config.json": [], "default": []}
    for name in SamplingKeys.model_fields:
        stated = "generation_config.json" if name in defaults.model_fields_set else "default"
        by_origin["typed" if name in config.model_fields_set else stated].append(f"{name}={getattr(rules, name):g}")
    return "; ".join(f"{' '.join(values)} ({origin})" for origin, values in by_origin.items() if values)


def rules_in_force(config: SamplingKeys, defaults: SamplingKeys) -> SamplingKeys:
    """What the user set on a page, the model's defaults for all else."""
    chosen = {name: getattr(config, name) for name in config.model_fields_set if name in SamplingKeys.model_fields}
    return defaults.model_copy(update=chosen)


class Generator(NamedTuple):
    """A model ready to generate: its sampler, the directory it came from, and what a request gets unless it says
    otherwise, from what was typed and else from the model's generation_config.json."""

    sampler: Sampler
    source: Path
    rules: SamplingKeys
    stop_ids: tuple[int, ...]


def load_generator(config: GenerationConfig, slots: int) -> Generator:
    """The model of a page with a sampler of that many slots over all devices.

    Raises:
        UserError: whatever about model, devices or memory can't be used.
    """
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    config = config.model_copy(
        update={"model_name": config.model_name or str(checkpoint.newest_run(config.output_dir))}
    )
    opened = checkpoint.open_model(config, mesh, config.chat_template, config.template_date)
    source, model, tokenizer, _, _ = opened
    defaults, stop_ids = generation_defaults(source, tokenizer)
    enable_compilation_cache(config)
    capacity = model.capacity(config.capacity)
    params = checkpoint.load_params(source, model, mesh)
    sampler = Sampler(params, opened, slots, capacity, config.compute_dtype)
    return Generator(sampler, source, rules_in_force(config, defaults), stop_ids)
