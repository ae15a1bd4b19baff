"""The rules by which a token is drawn, for all slots of a batch at once, and tries of allowed outputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lacuna.config import UserError

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


def likeliest(scores: Float[Array, "slot vocab"]) -> Int[Array, " slot"]:
    """The first token of the highest score: by block, then in it, as XLA's argmax on a CPU goes token by token."""
    blocks = in_blocks(scores, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * VOCABULARY_BLOCK + jnp.argmax(inside, axis=-1)


def draw(
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


def token_trie(sequences: Iterable[Sequence[int]], end_id: int | None = None) -> Trie:
    """The trie of these token sequences, each followed by `end_id` where one is given.

    Raises:
        UserError: no sequence, an empty one, or one that begins another, which needs an `end_id`.
    """
    root: dict[int, Any] = {}
    ends = []
    for sequence in sequences:
        node = root
        for token in (*sequence, *(() if end_id is None else (end_id,))):
            node = node.setdefault(int(token), {})
        ends.append((node, sequence))
    if not ends or root in [node for node, _ in ends]:
        raise UserError("a trie of allowed outputs needs at least one, and none that is empty")
    if longer := [sequence for node, sequence in ends if node]:
        raise UserError(f"the allowed output {list(longer[0])} begins another one; give an end_id that ends each")
    nodes = [root]
    first, tokens, children = [0], [], []
    for node in nodes:
        for token, child in sorted(node.items()):
            tokens.append(token)
            children.append(len(nodes))
            nodes.append(child)
        first.append(len(tokens))
    return Trie(*(np.array(values, np.int32) for values in (first, tokens, children)))


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
