"""Beam search, over all outputs or over a trie of allowed ones: deterministic, with exact sums of log-probabilities."""

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
from lacuna.model import PAGE, Cache, ModelConfig, decode_step, empty_cache, head_of, logits_of, prefill, rotation_table
from lacuna.sampler import (
    Forest,
    Request,
    Sampler,
    Trie,
    check_request,
    edges_of,
    forest_of,
    is_leaf,
    page_bucket,
    prompt_pages,
)


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
    trie: Trie | None = None,
) -> list[list[Beam]]:
    """The likeliest continuations of each prompt, best first: whole paths of `trie` where one is given, else up to a
    stop token or `max_tokens`. Deterministic; scores are plain sums of the model's log-probabilities.

    Raises:
        UserError: a prompt that leaves no room for `max_tokens`, or that can't be generated from at all.
    """
    if not prompts or beam_count < 1 or max_tokens < 1:
        raise UserError(
            f"{len(prompts)} prompts, beam_count = {beam_count}, max_tokens = {max_tokens}: each should be 1 or more"
        )
    for prompt in prompts:
        rules = SamplingKeys(max_tokens=max_tokens)
        check_request(Request(tuple(prompt), rules, tuple(stop_ids), trie=trie), sampler.model, sampler.capacity)
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_tokens > sampler.capacity:
        raise UserError(
            f"a prompt of {longest:,} tokens and max_tokens = {max_tokens:,} are more than the capacity of "
            f"{sampler.capacity:,}, prompt and completion together; lower max_tokens or shorten the prompt"
        )
    pages = prompt_pages(longest, sampler.capacity)
    token = np.zeros((len(prompts), pages * PAGE), np.int32)
    for row, prompt in enumerate(prompts):
        token[row, : len(prompt)] = prompt
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    stop = np.array([*stop_ids, -1], np.int32)
    with jax.set_mesh(sampler.mesh):
        beams = search(
            sampler.params, token, length, forest_of([trie])[0] if trie else None, stop, sampler.model,
            beam_count, max_tokens, page_bucket(longest + max_tokens, sampler.capacity),
        )  # fmt: skip
    score, history, is_done = jax.device_get((beams.score, beams.history, beams.is_done))
    return [
        [
            Beam(
                tuple(history[row, beam][history[row, beam] >= 0].tolist()),
                float(score[row, beam]),
                bool(is_done[row, beam]),
            )
            for beam in range(beam_count)
            if score[row, beam] > -np.inf
        ]
        for row in range(len(prompts))
    ]


@partial(jax.jit, static_argnames=("model", "beam_count", "max_tokens", "pages"))
def search(
    params: PyTree[Array],
    prompt: Int[Array, "prompt token"],
    prompt_length: Int[Array, " prompt"],
    forest: Forest | None,
    stop_ids: Int[Array, " stop"],
    model: ModelConfig,
    beam_count: int,
    max_tokens: int,
    pages: int,
) -> Beams:
    """Every hypothesis goes on by each of its tokens, and the best sums go on; one that is done stays as it is."""
    shape = (len(prompt), beam_count)
    last = jnp.take_along_axis(prompt, prompt_length[:, None] - 1, axis=1)
    filled = jax.tree.map(lambda x: jnp.repeat(x, beam_count, axis=0), prefill(params, prompt, model))
    empty = empty_cache(model, math.prod(shape), pages, filled[0][0].dtype)
    start = Beams(
        cache=jax.tree.map(lambda whole, part: whole.at[:, :, : part.shape[2]].set(part), empty, filled),
        token=jnp.broadcast_to(last, shape),
        length=jnp.broadcast_to(prompt_length[:, None] - 1, shape),
        score=jnp.broadcast_to(jnp.where(jnp.arange(beam_count) == 0, 0, -jnp.inf), shape),
        node=jnp.zeros(shape, jnp.int32),
        is_done=jnp.zeros(shape, bool),
        history=jnp.full((*shape, max_tokens), -1, jnp.int32),
    )

    rotations = rotation_table(start.cache, model)

    def step(carry: tuple[Array, Beams]) -> tuple[Array, Beams]:
        number, beams = carry
        token, length = beams.token.ravel(), beams.length.ravel()
        hidden, cache = decode_step(params, beams.cache, token, length, rotations, model)
        log_probability = jax.nn.log_softmax(logits_of(hidden, head_of(params, model), model.vocabulary_size)[:, 0])
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

    def goes_on(carry: tuple[Array, Beams]) -> Bool[Array, ""]:
        return (carry[0] < max_tokens) & jnp.any(~carry[1].is_done & (carry[1].score > -jnp.inf))

    return jax.lax.while_loop(goes_on, step, (jnp.zeros((), jnp.int32), start))[1]
