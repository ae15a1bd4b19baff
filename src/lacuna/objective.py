"""What GRPO minimises: completions with advantages, packed into rows, and the clipped objective on them.

The loss is a plain sum over tokens, each with a weight made before, so neither packing nor micro-batches change it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_alike import shard_alike
from jaxtyping import Array, Float, Int, PyTree

from lacuna.config import GrpoConfig
from lacuna.data import first_fit
from lacuna.loss import summed_token_loss, token_statistics
from lacuna.model import ModelConfig, cast, embed, forward, head_of

STD_EPSILON = 1e-4  # as TRL adds to a group's standard deviation


@dataclass(frozen=True)
class Sample:
    """A completion with what the update needs of it; a line of rollouts.jsonl. Log-probabilities are in nats: the
    model's own, and those under the distribution drawn from."""

    step: int
    place: int
    index: int
    origin: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    log_probabilities: tuple[float, ...]
    sampled_log_probabilities: tuple[float, ...]
    is_truncated: bool
    rewards: dict[str, float]
    reward: float
    advantage: float


Group = Sequence[Sample]


def grouped(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each prompt, in the order of the prompts."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.place, []).append(sample)
    return list(groups.values())


def advantages(rewards: Float[np.ndarray, "group member"], scale_by_std: bool) -> Float[np.ndarray, "group member"]:
    """Rewards less the mean of their group (Shao et al. 2024), over its standard deviation where that is asked for,
    which Dr. GRPO (Liu et al. 2025) advises against. A group whose rewards are equal has advantages of exactly 0."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale_by_std:
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    return np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, centred, 0.0)


def kept_samples(groups: Sequence[Group], page: GrpoConfig) -> list[Sample]:
    """Those that the loss counts: not of a group without variance, nor truncated if these are masked (DAPO, Yu et al.
    2025). With a divergence to keep small, groups without variance count too."""
    return [
        sample
        for group in groups
        for sample in group
        if (page.kl_weight > 0 or has_variance(group)) and not (page.mask_truncated and sample.is_truncated)
    ]


def has_variance(group: Group) -> bool:
    return any(sample.reward != group[0].reward for sample in group)


def token_weights(kept: Sequence[Sample], page: GrpoConfig) -> Callable[[Sample], float]:
    """What a token of a sample counts in the loss, which is a plain sum then: each token the same (DAPO, Yu et al.
    2025), each sample the same (GRPO, Shao et al. 2024), or each slot of the longest completion (Dr. GRPO)."""
    token_count = sum(len(sample.tokens) for sample in kept)
    match page.loss_normalisation:
        case "token":
            return lambda _: 1 / token_count
        case "sequence":
            return lambda sample: 1 / (len(kept) * len(sample.tokens))
        case "constant":
            return lambda _: 1 / (len(kept) * page.max_completion_tokens)


class RolloutBatch(NamedTuple):
    """Packed rows as in `data.Batch`, with `behind` as in `attention`, whose documents have the positions behind those
    they go on from. `weight` is what a token counts in the loss; `sampled` is the log-probability under the
    distribution drawn from, `old` and `reference` are those of the policy before this rollout's updates and of the
    starting policy."""

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]
    behind: Int[Array, "*rows token"]
    advantage: Float[Array, "*rows token"]
    sampled: Float[Array, "*rows token"]
    old: Float[Array, "*rows token"]
    reference: Float[Array, "*rows token"]


INTEGERS = ("token", "target", "segment", "position", "behind")


def shares_prompts(model: ModelConfig) -> bool:
    """Whether attention can let several completions go on from one prompt."""
    return model.attention == "xla"


def packed_rows(kept: Sequence[Sample], page: GrpoConfig, rows_at_once: int, is_shared: bool) -> RolloutBatch:
    """The samples packed First-Fit-Decreasing into rows, as [micro_batch, row, token].

    Where prompts are shared, samples of one prompt that stand in one row have it in common: it is there once, all but
    its last token, and each sample goes on from it.
    """
    parts = [part for group in grouped(kept) for part in parts_of(group, page.sequence_length, is_shared)]
    parts.sort(key=lambda part: -slots_of(part))
    row_of = first_fit(np.array([slots_of(part) for part in parts], np.int64), page.sequence_length)
    micro_batches = -(-(int(row_of.max(initial=0)) + 1) // rows_at_once)
    shape = micro_batches * rows_at_once, page.sequence_length
    arrays: Any = [np.zeros(shape, np.int32 if name in INTEGERS else np.float32) for name in RolloutBatch._fields]
    rows, weight_of = RolloutBatch(*arrays), token_weights(kept, page)
    for part, number in zip(parts, row_of, strict=True):
        place(part, jax.tree.map(lambda leaf, number=number: leaf[number], rows), weight_of)
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, rows_at_once, -1), rows)


def place(part: Group, row: RolloutBatch, weight_of: Callable[[Sample], float]) -> None:
    """Write a prompt and its samples behind what a row holds; a lone sample is one document with its prompt."""
    *prompt, last = part[0].prompt_tokens
    document, end = int(row.segment.max()) + 1, int(np.count_nonzero(row.segment))
    here = slice(end, end + len(prompt))
    row.token[here], row.segment[here], row.position[here] = prompt, document, np.arange(len(prompt))
    goes_on = len(part) > 1 and len(prompt) > 0
    for number, sample in enumerate(part):
        end, count = here.stop, len(sample.tokens)
        here = slice(end, end + count)
        row.token[here], row.target[here] = (last, *sample.tokens[:-1]), sample.tokens
        row.segment[here], row.behind[here] = document + number + goes_on, (number + 1) * goes_on
        row.position[here] = len(prompt) + np.arange(count)
        row.weight[here], row.advantage[here] = weight_of(sample), sample.advantage
        row.sampled[here] = sample.sampled_log_probabilities


def parts_of(group: Group, capacity: int, is_shared: bool) -> Iterator[Group]:
    """The samples of a prompt that may stand in one row with it."""
    if not is_shared:
        yield from ([sample] for sample in group)
        return
    ordered = sorted(group, key=lambda sample: -len(sample.tokens))
    room = capacity - len(group[0].prompt_tokens) + 1
    place = first_fit(np.array([len(sample.tokens) for sample in ordered], np.int64), room)
    for number in range(int(place.max()) + 1):
        yield [sample for sample, at in zip(ordered, place, strict=True) if at == number]


def slots_of(part: Group) -> int:
    """Slots of a row that samples of one prompt take together, as each slot holds a token and its successor."""
    return len(part[0].prompt_tokens) - 1 + sum(len(sample.tokens) for sample in part)


# The objective


def objective(
    log_probability: Float[Array, "*rows token"], batch: RolloutBatch, page: GrpoConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch, and sums over its tokens to be logged.

    - The clipped ratio of PPO (Schulman et al. 2017), with the asymmetric bounds of DAPO (Yu et al. 2025).
    - Times a truncated importance weight (Espeholt et al. 2018; Yao et al. 2025) of the trainer's policy over the
      distribution that the sampler drew from, which also pays for top_k, top_p and min_p.
    - Plus the divergence from the starting policy, estimated by k3 (Schulman 2020).
    """
    is_counted = batch.weight > 0

    def difference(a: Array, b: Array) -> Array:
        return jnp.where(is_counted, a - b, 0.0)

    old = batch.old if page.updates_per_rollout > 1 else jax.lax.stop_gradient(log_probability)
    ratio = jnp.exp(difference(log_probability, old))
    clipped = jnp.clip(ratio, 1 - page.clip_low, 1 + page.clip_high)
    gain = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    mismatch = jax.lax.stop_gradient(difference(old, batch.sampled))
    importance = jnp.exp(mismatch)
    if page.importance_limit:
        gain *= jnp.minimum(importance, page.importance_limit)
    loss = -gain
    if page.kl_weight:
        from_reference = difference(batch.reference, log_probability)
        divergence = jnp.exp(from_reference) - from_reference - 1
        loss += page.kl_weight * divergence
    facts = {
        "count": jnp.sum(is_counted),
        "clip_fraction": jnp.sum(is_counted & (ratio * batch.advantage > clipped * batch.advantage)),
        "importance_mean": jnp.sum(jnp.where(is_counted, importance, 0.0)),
        "kl": jnp.sum(divergence * is_counted) if page.kl_weight else jnp.zeros(()),
        "logprob_difference_max": jnp.max(jnp.abs(mismatch)),
    }
    return jnp.sum(batch.weight * loss), facts


def hidden_states(params: PyTree[Array], batch: RolloutBatch, model: ModelConfig, page: GrpoConfig) -> Array:
    """Hidden states whose logits are those over the temperature."""
    x = embed(params, batch.token)
    behind = batch.behind if shares_prompts(model) else None
    hidden = forward(params, x, batch.segment, batch.position, model, page.rematerialisation, behind)
    return hidden if page.temperature == 1 else hidden / page.temperature


def objective_of_params(
    params: PyTree[Array], batch: RolloutBatch, model: ModelConfig, page: GrpoConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective, and what is logged."""

    def loss_of(log_probability: Array, part: RolloutBatch) -> Array:
        return objective(log_probability, part, page)[0]

    hidden, head = hidden_states(params, batch, model, page), head_of(params, model)
    loss, found = summed_token_loss(hidden, head, batch.target, batch, loss_of, model.vocabulary_size)
    facts = objective(-found.loss, batch, page)[1]
    return loss, facts | {"entropy": jnp.sum(jnp.where(batch.weight > 0, found.entropy, 0.0))}


@partial(jax.jit, static_argnames=("model", "page"))
def log_probabilities(
    compute: PyTree[Array], batch: RolloutBatch, model: ModelConfig, page: GrpoConfig
) -> Float[Array, "row token"]:
    """Of each target, under the policy of these weights."""
    hidden = hidden_states(compute, batch, model, page)
    return -token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size).loss


@partial(jax.jit, static_argnames=("model", "page"), donate_argnames="total")
def add_gradient(
    total: PyTree[Array], compute: PyTree[Array], batch: RolloutBatch, model: ModelConfig, page: GrpoConfig
) -> PyTree[Array]:
    """Gradient, loss and facts of one more micro-batch, added up in float32."""
    (loss, facts), gradient = jax.value_and_grad(objective_of_params, has_aux=True)(compute, batch, model, page)
    most = jnp.maximum(total[2].pop("logprob_difference_max"), facts.pop("logprob_difference_max"))
    sums = jax.tree.map(jnp.add, total, (gradient, loss, facts))
    return sums[0], sums[1], sums[2] | {"logprob_difference_max": most}


@partial(jax.jit, static_argnames=("model", "dtype"))
def compute_params(params: PyTree[Array], model: ModelConfig, dtype: str) -> PyTree[Array]:
    return cast(params, model, dtype)


@jax.jit
def zeros(params: PyTree[Array]) -> PyTree[Array]:
    """The sums that micro-batches are added to, each lying where its parameter does."""
    names = ("clip_fraction", "importance_mean", "kl", "logprob_difference_max", "entropy")
    facts = {name: jnp.zeros(()) for name in names} | {"count": jnp.zeros((), jnp.int32)}
    gradient = jax.tree.map(lambda leaf: shard_alike(leaf, jnp.zeros(leaf.shape))[1], params)
    return gradient, jnp.zeros(()), facts
