"""Constraints: the outputs that a sampler may choose from, and beam search, deterministic with exact sums."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from lacuna.config import SamplingKeys, UserError
from lacuna.model import PAGE, Cache, ModelConfig, decode_step, empty_cache, prefill, rotation_table
from lacuna.sampler import LEAST_PAGES, Forest, Request, Sampler, edges_of, is_leaf, page_count


def forest_of(choices: Sequence[Iterable[Sequence[int]]], end_id: int | None = None) -> Forest:
    """A trie for each choice of token sequences, its root the node of the choice's own number; `end_id`, where given,
    follows each sequence.

    Raises:
        UserError: a choice without a sequence, an empty sequence, or one that begins another, which needs an `end_id`.
    """
    nodes: list[dict[int, Any]] = [{} for _ in choices]
    for root, choice in zip(nodes, choices, strict=True):
        add_sequences(root, choice, () if end_id is None else (end_id,))
    first, tokens, children = [0], [], []
    for node in nodes:
        for token, child in sorted(node.items()):
            tokens.append(token)
            children.append(len(nodes))
            nodes.append(child)
        first.append(len(tokens))
    fan = np.arange(max(np.diff(first), default=1))
    return Forest(*(jnp.asarray(values, jnp.int32) for values in (first, tokens, children, fan)))


def add_sequences(root: dict[int, Any], sequences: Iterable[Sequence[int]], end: tuple[int, ...]) -> None:
    """Add a path from `root` for each of the sequences."""
    ends = []
    for sequence in sequences:
        node = root
        for token in (*sequence, *end):
            node = node.setdefault(int(token), {})
        ends.append((node, sequence))
    if not ends or any(node is root for node, _ in ends):
        raise UserError("a choice of allowed outputs needs at least one, and none that is empty")
    if longer := [sequence for node, sequence in ends if node]:
        raise UserError(f"the allowed output {list(longer[0])} begins another one; give an end_id that ends each")


@dataclass(frozen=True)
class Beam:
    """A hypothesis: its tokens, the sum of their log-probabilities, and whether it came to its end."""

    tokens: tuple[int, ...]
    log_probability: float
    is_finished: bool


class Beams(NamedTuple):
    """Hypotheses of every prompt on the device, the best first."""

    cache: Cache
    token: Int[Array, "prompt beam"]
    length: Int[Array, "prompt beam"]
    score: Float[Array, "prompt beam"]
    node: Int[Array, "prompt beam"]
    is_done: Bool[Array, "prompt beam"]
    history: Int[Array, "prompt beam step"]


def beam_search(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    beam_count: int,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    root: int = -1,
) -> list[list[Beam]]:
    """The likeliest continuations of each prompt, best first: whole paths of the sampler's constraint from `root` on
    where one is given, else up to a stop token or `max_tokens`. Scores are plain sums of the model's log-probabilities.

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
    pages = page_count(longest, sampler.capacity)
    token = np.zeros((len(prompts), pages * PAGE), np.int32)
    for row, prompt in enumerate(prompts):
        token[row, : len(prompt)] = prompt
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    stop = np.array([*stop_ids, -1], np.int32)
    forest = sampler.constraint if root >= 0 else None
    bucket = page_count(longest + max_tokens, sampler.capacity, LEAST_PAGES)
    with jax.set_mesh(sampler.mesh):
        beams = search(
            sampler.params, token, length, forest, np.int32(root), stop, sampler.model, beam_count, max_tokens, bucket
        )
    score, history, is_done = jax.device_get((beams.score, beams.history, beams.is_done))
    found: list[list[Beam]] = [[] for _ in prompts]
    for row, beam in zip(*np.nonzero(score > -np.inf), strict=True):
        tokens = history[row, beam][history[row, beam] >= 0].tolist()
        found[row].append(Beam(tuple(tokens), float(score[row, beam]), bool(is_done[row, beam])))
    return found


@partial(jax.jit, static_argnames=("model", "beam_count", "max_tokens", "pages"))
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
    pages: int,
) -> Beams:
    """Every hypothesis is continued by each possible token and the best sums are kept; finished ones stay."""
    shape = (len(prompt), beam_count)
    last = jnp.take_along_axis(prompt, prompt_length[:, None] - 1, axis=1)
    filled = jax.tree.map(lambda x: jnp.repeat(x, beam_count, axis=0), prefill(params, prompt, model)[1])
    empty = empty_cache(model, math.prod(shape), pages, filled[0][0].dtype)
    start = Beams(
        cache=jax.tree.map(lambda whole, part: whole.at[:, :, : part.shape[2]].set(part), empty, filled),
        token=jnp.broadcast_to(last, shape),
        length=jnp.broadcast_to(prompt_length[:, None] - 1, shape),
        score=jnp.broadcast_to(jnp.where(jnp.arange(beam_count) == 0, 0, -jnp.inf), shape),
        node=jnp.broadcast_to(root, shape),
        is_done=jnp.zeros(shape, bool),
        history=jnp.full((*shape, max_tokens), -1, jnp.int32),
    )

    rotations = rotation_table(start.cache, model)

    def step(carry: tuple[Array, Beams]) -> tuple[Array, Beams]:
        number, beams = carry
        token, length = beams.token.ravel(), beams.length.ravel()
        logits, cache = decode_step(params, beams.cache, token, length, rotations, model)
        log_probability = jax.nn.log_softmax(logits)
        if forest is None:
            tokens = jnp.broadcast_to(jnp.arange(model.padded_vocabulary), log_probability.shape)
            children = jnp.zeros_like(tokens)
        else:
            tokens, children = edges_of(forest, beams.node.ravel())
            log_probability = jnp.take_along_axis(log_probability, jnp.maximum(tokens, 0), axis=1)
            log_probability = jnp.where(tokens < 0, -jnp.inf, log_probability)
        tokens, children, added = (x.reshape(*shape, -1) for x in (tokens, children, log_probability))
        stays = jnp.where(jnp.arange(added.shape[2]) == 0, 0, -jnp.inf)
        total = beams.score[..., None] + jnp.where(beams.is_done[..., None], stays, added)
        score, choice = jax.lax.top_k(total.reshape(shape[0], -1), beam_count)
        parent = choice // added.shape[2]

        def of_parent(x: Array) -> Array:
            return jnp.take_along_axis(x, parent.reshape(*shape, *[1] * (x.ndim - 2)), axis=1)

        was_done = of_parent(beams.is_done)
        token, node = (jnp.take_along_axis(x.reshape(shape[0], -1), choice, axis=1) for x in (tokens, children))
        is_end = jnp.any(token[..., None] == stop_ids, axis=-1)
        if forest is not None:
            is_end |= is_leaf(forest, node)
        row = (jnp.arange(shape[0])[:, None] * beam_count + parent).ravel()
        return number + 1, Beams(
            cache=jax.tree.map(lambda x: x[row], cache),
            token=token,
            length=of_parent(beams.length) + ~was_done,
            score=score,
            node=jnp.where(was_done, of_parent(beams.node), node),
            is_done=was_done | is_end,
            history=of_parent(beams.history).at[:, :, number].set(jnp.where(was_done, -1, token)),
        )

    def continues(carry: tuple[Array, Beams]) -> Bool[Array, ""]:
        return (carry[0] < max_tokens) & jnp.any(~carry[1].is_done & (carry[1].score > -jnp.inf))

    return jax.lax.while_loop(continues, step, (jnp.zeros((), jnp.int32), start))[1]
