"""Constraints: the outputs that a sampler may choose from, and beam search, deterministic with exact sums."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from lacuna.config import SamplingKeys, UserError
from lacuna.distributed import shard, shard_rows
from lacuna.model import (
    PAGE,
    Cache,
    Hidden,
    ModelConfig,
    head_of,
    layer_forward,
    logits_of,
    prefill,
    rms_norm,
    rotation_at,
)
from lacuna.sampler import Forest, Request, Sampler, edges_of, is_leaf, page_count, slots_for


def forest_of(choices: Sequence[Iterable[Sequence[int]]], end_id: int | None = None) -> Forest:
    """A trie for each choice of token sequences, its root the node of the choice's own number; `end_id`, where given,
    follows each sequence.

    Raises:
        UserError: a choice without a sequence, an empty sequence, or one that begins another, which needs an `end_id`.
    """
    end = () if end_id is None else (end_id,)
    paths = [(root, *sequence, *end) for root, choice in enumerate(choices) for sequence in choice]
    if {path[0] for path in paths} != set(range(len(choices))) or any(len(path) < 2 + len(end) for path in paths):
        raise UserError("a choice of allowed outputs needs at least one, and none that is empty")
    rows = np.full((len(paths), max(map(len, paths), default=1)), -1, np.int32)
    for row, path in zip(rows, paths, strict=True):
        row[: len(path)] = path
    return forest_of_rows(rows, len(choices))


def forest_of_rows(rows: Int[np.ndarray, "path step"], root_count: int) -> Forest:
    """The forest of paths, each a root and its tokens with -1 after its end: nodes are numbered level by level in the
    order of their paths, so that sorting the paths makes them, and a node's children follow each other.

    Raises:
        UserError: a path begins another.
    """
    rows = rows[np.lexsort(rows.T[::-1])]
    differs = np.append(True, rows[1:, 0] != rows[:-1, 0])  # from the path before, up to this step
    node, node_count = rows[:, 0], root_count
    counts, tokens = [np.zeros(1, np.int64)], list[np.ndarray]()
    for step in range(1, rows.shape[1]):
        token, before = rows[:, step], differs.copy()
        differs[1:] |= token[1:] != token[:-1]
        if longer := np.flatnonzero(~before[1:] & (token[:-1] < 0) & (token[1:] >= 0)).tolist():
            sequence = rows[longer[0], 1:step].tolist()
            raise UserError(f"the allowed output {sequence} begins another one; give an end_id that ends each")
        is_new = differs & (token >= 0)
        counts.append(np.bincount(node[is_new], minlength=node_count))
        tokens.append(token[is_new])
        node, node_count = np.cumsum(is_new, dtype=np.int32) - 1, int(is_new.sum())
    edges = np.concatenate([*counts, np.zeros(node_count, np.int64)])
    parts = np.cumsum(edges), np.concatenate(tokens), np.arange(edges.max(initial=1))
    return Forest(*(jnp.asarray(part, jnp.int32) for part in parts))


@dataclass(frozen=True)
class Beam:
    """A hypothesis: its tokens, the sum of their log-probabilities, and whether it came to its end."""

    tokens: tuple[int, ...]
    log_probability: float
    is_finished: bool


class Beams(NamedTuple):
    """The hypotheses of a prompt, best first, and the best sum that the search let go, -inf if none."""

    beams: list[Beam]
    dropped: float

    @property
    def certain_count(self) -> int:
        """How many of the first hypotheses are surely those of a search through everything. A sum only falls as its
        path goes on, so no end of a path that was let go is better than the path was by then."""
        return sum(beam.log_probability >= self.dropped for beam in self.beams)


class Search(NamedTuple):
    """Hypotheses of every prompt on the device, the best first. `cache` has the keys and values of each layer for the
    tokens that follow the prompt, whose own are kept once."""

    cache: tuple[tuple[Array, Array], ...]
    token: Int[Array, "prompt beam"]
    score: Float[Array, "prompt beam"]
    node: Int[Array, "prompt beam"]
    is_done: Bool[Array, "prompt beam"]
    history: Int[Array, "prompt beam step"]
    dropped: Float[Array, " prompt"]


def beam_search(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    beam_count: int,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    root: int = -1,
) -> list[Beams]:
    """The likeliest continuations of each prompt: whole paths of the sampler's constraint from `root` on where one is
    given, else up to a stop token or `max_tokens`. Scores are plain sums of the model's log-probabilities over its
    whole vocabulary. At each step the best `beam_count` survive, or all where there are fewer.

    Raises:
        UserError: a prompt that leaves no room for `max_tokens`, or that can't be generated from at all.
    """
    if not prompts or beam_count < 1 or max_tokens < 1:
        raise UserError(
            f"{len(prompts)} prompts, beam_count = {beam_count}, max_tokens = {max_tokens}: each should be 1 or more"
        )
    for prompt in prompts:
        sampler.check(Request(tuple(prompt), SamplingKeys(max_tokens=max_tokens), tuple(stop_ids), root=root))
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_tokens > sampler.capacity:
        raise UserError(
            f"a prompt of {longest:,} tokens and max_tokens = {max_tokens:,} are more than the capacity of "
            f"{sampler.capacity:,}, prompt and completion together; lower max_tokens or shorten the prompt"
        )
    token = np.zeros((slots_for(len(prompts), sampler.mesh), page_count(longest, sampler.capacity) * PAGE), np.int32)
    length = np.ones(len(token), np.int32)
    for row, prompt in enumerate(prompts):
        token[row, : len(prompt)], length[row] = prompt, len(prompt)
    stop = np.array([*stop_ids, -1], np.int32)
    forest = sampler.constraint if root >= 0 else None
    with jax.set_mesh(sampler.mesh):
        found = search(
            sampler.params, token, length, forest, np.int32(root), stop, sampler.model, beam_count, max_tokens
        )
    score, history, is_done, dropped = jax.device_get(found)
    beams: list[list[Beam]] = [[] for _ in token]
    for row, beam in zip(*np.nonzero(score > -np.inf), strict=True):
        tokens = history[row, beam][history[row, beam] >= 0].tolist()
        beams[row].append(Beam(tuple(tokens), float(score[row, beam]), bool(is_done[row, beam])))
    return [Beams(beams[row], float(dropped[row])) for row in range(len(prompts))]


@partial(jax.jit, static_argnames=("model", "beam_count", "max_tokens"))
def search(
    params: PyTree[Array],
    prompt: Int[Array, "prompt token"],
    prompt_length: Int[Array, " prompt"],
    forest: Forest | None,
    root: Int[Array, ""],
    stop_ids: Int[Array, " stop"],
    model: ModelConfig,
    beam_count: int,
    max_tokens: int,
) -> tuple[Array, Array, Array, Array]:
    """Every hypothesis is continued by each possible token and the best sums are kept; finished ones stay. Returns of
    the last ones scores, tokens and whether they ended, and of each prompt the best score that was dropped."""
    prompt, prompt_length = shard_rows(prompt), shard_rows(prompt_length)
    shape = (len(prompt), beam_count)
    hidden, pages = prefill(params, prompt, model)
    prompt_cache = joined_pages(pages)
    last = jnp.take_along_axis(hidden, prompt_length[:, None, None] - 1, axis=1)
    room = jnp.zeros((*shape, max(max_tokens - 1, 1), model.kv_heads, model.head), hidden.dtype)
    start = Search(
        cache=tuple((room, room) for _ in range(model.layers)),
        token=jnp.zeros(shape, jnp.int32),
        score=jnp.broadcast_to(jnp.where(jnp.arange(beam_count) == 0, 0, -jnp.inf), shape),
        node=jnp.broadcast_to(root, shape),
        is_done=jnp.zeros(shape, bool),
        history=jnp.full((*shape, max_tokens), -1, jnp.int32),
        dropped=jnp.full(shape[:1], -jnp.inf),
    )

    def choose(hidden: Hidden, beams: Search, number: Int[Array, ""] | int) -> Search:
        """The best continuations, given the hidden states that follow the hypotheses."""
        logits = logits_of(hidden, head_of(params, model), model.vocabulary_size)
        normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        if forest is None:
            tokens = jnp.broadcast_to(jnp.arange(logits.shape[2]), (*shape, logits.shape[2]))
            children, added = jnp.zeros_like(tokens), jnp.broadcast_to(logits - normalizer, tokens.shape)
        else:
            tokens, children = (x.reshape(*shape, -1) for x in edges_of(forest, beams.node.ravel()))
            logits = jnp.broadcast_to(logits, (*shape, logits.shape[2]))
            added = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=2) - normalizer
            added = jnp.where(tokens < 0, -jnp.inf, added)
        stays = jnp.where(jnp.arange(added.shape[2]) == 0, 0, -jnp.inf)
        total = beams.score[..., None] + jnp.where(beams.is_done[..., None], stays, added)
        total = jnp.pad(total.reshape(shape[0], -1), ((0, 0), (0, 1)), constant_values=-jnp.inf)
        score, choice = jax.lax.top_k(total, beam_count + 1)
        score, choice, best_left = score[:, :-1], choice[:, :-1], score[:, -1]
        parent = choice // added.shape[2]

        def of_parent(x: Array) -> Array:
            return jnp.take_along_axis(x, parent.reshape(*shape, *[1] * (x.ndim - 2)), axis=1)

        was_done = of_parent(beams.is_done)
        token, node = (jnp.take_along_axis(x.reshape(shape[0], -1), choice, axis=1) for x in (tokens, children))
        is_end = jnp.any(token[..., None] == stop_ids, axis=-1)
        if forest is not None:
            is_end |= is_leaf(forest, node)
        return Search(
            cache=jax.tree.map(of_parent, beams.cache),
            token=token,
            score=score,
            node=jnp.where(was_done, of_parent(beams.node), node),
            is_done=was_done | is_end,
            history=of_parent(beams.history).at[:, :, number].set(jnp.where(was_done, -1, token)),
            dropped=jnp.maximum(beams.dropped, best_left),
        )

    def step(carry: tuple[Array, Search]) -> tuple[Array, Search]:
        number, beams = carry
        hidden, cache = beam_step(params, prompt_cache, prompt_length, beams, number - 1, model)
        return number + 1, choose(hidden, beams._replace(cache=cache), number)

    def continues(carry: tuple[Array, Search]) -> Bool[Array, ""]:
        return (carry[0] < max_tokens) & jnp.any(~carry[1].is_done & (carry[1].score > -jnp.inf))

    _, found = jax.lax.while_loop(continues, step, (jnp.ones((), jnp.int32), choose(last, start, 0)))
    return shard(found.score), shard(found.history), shard(found.is_done), shard(found.dropped)


def joined_pages(cache: Cache) -> tuple[tuple[Array, Array], ...]:
    """A prompt's keys [prompt, kv_head, head, token] and values [prompt, kv_head, token, head] without pages."""

    def joined(keys: Array, values: Array) -> tuple[Array, Array]:
        keys = jnp.swapaxes(keys, 2, 3)
        return keys.reshape(*keys.shape[:3], -1), values.reshape(*values.shape[:2], -1, values.shape[-1])

    return tuple(joined(*pages) for pages in cache)


def beam_step(
    params: PyTree[Array],
    prompt_cache: tuple[tuple[Array, Array], ...],
    prompt_length: Int[Array, " prompt"],
    beams: Search,
    place: Int[Array, ""],
    model: ModelConfig,
) -> tuple[Hidden, tuple[tuple[Array, Array], ...]]:
    """Hidden states after the last token of each hypothesis, the one at `place` after the prompt, and the cache with
    that token. The hypotheses of a prompt are the tokens of a batch's row, all at one position."""
    shape = beams.token.shape
    rotation = rotation_at(jnp.broadcast_to(prompt_length[:, None] + place, shape), model)

    def attend(layer: int, query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(held, new[:, :, None], place, axis=2)
            for held, new in zip(beams.cache[layer], (key, value), strict=True)
        )
        return shared_attention(query, prompt_cache[layer], prompt_length, (keys, values), place), (keys, values)

    x, grown = shard_rows(params["embedding"][beams.token]), []
    for number, layer in enumerate(params["layers"]):
        x, kept = layer_forward(x, layer, number, rotation, partial(attend, number), model)
        grown.append(kept)
    return rms_norm(x, params["final_norm"], model.norm_epsilon), tuple(grown)


def shared_attention(
    query: Float[Array, "prompt beam kv_head group head"],
    prompt_cache: tuple[Float[Array, "prompt kv_head head token"], Float[Array, "prompt kv_head token head"]],
    prompt_length: Int[Array, " prompt"],
    own_cache: tuple[Float[Array, "prompt beam step kv_head head"], Float[Array, "prompt beam step kv_head head"]],
    place: Int[Array, ""],
) -> Float[Array, "prompt beam kv_head group head"]:
    """Attention of each hypothesis to its prompt, whose keys and values are shared, and to its own tokens up to
    `place`."""
    keys, values = prompt_cache
    own_keys, own_values = own_cache
    over_prompt = jnp.einsum("bnkgh,bkhs->bnkgs", query, keys, preferred_element_type=jnp.float32)
    is_prompt = jnp.arange(keys.shape[3]) < prompt_length[:, None]
    over_prompt = jnp.where(is_prompt[:, None, None, None], over_prompt, -jnp.inf)
    over_own = jnp.einsum("bnkgh,bnskh->bnkgs", query, own_keys, preferred_element_type=jnp.float32)
    over_own = jnp.where(jnp.arange(own_keys.shape[2]) <= place, over_own, -jnp.inf)
    scores = jnp.concatenate([over_prompt, over_own], axis=-1) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    of_prompt, of_own = jnp.split(weights, [keys.shape[3]], axis=-1)
    mixed = jnp.einsum("bnkgs,bksh->bnkgh", of_prompt, values, preferred_element_type=jnp.float32)
    mixed += jnp.einsum("bnkgs,bnskh->bnkgh", of_own, own_values, preferred_element_type=jnp.float32)
    return mixed.astype(values.dtype)
