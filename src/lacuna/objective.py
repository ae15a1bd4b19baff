"""The objective of grpo: samples and their advantages, the packed rows of an update, its loss, and the update itself.

The loss is a plain sum over tokens, each with a weight made beforehand, so neither packing nor micro-batches change it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from lacuna import optimizer
from lacuna.checkpoint import OpenedModel
from lacuna.config import GrpoConfig
from lacuna.data import first_fit
from lacuna.distributed import put_batch, row_shards
from lacuna.environments import Turns
from lacuna.model import (
    ModelConfig,
    cast,
    embed,
    forward,
    head_of,
    joined,
    summed_token_loss,
    token_statistics,
    trained_table,
)
from lacuna.optimizer import Facts, Recipe, TrainState

# Nats a token between sampler and trainer, on average, that no rounding explains: one of them has other weights
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.2}
STD_EPSILON = 1e-4  # as TRL adds to a group's standard deviation

# Samples and their rows


@dataclass(frozen=True)
class Sample:
    """A completion with what the update needs of it; a line of rollouts.jsonl. Log-probabilities are in nats: the
    policy's, that is the model's at the sampling temperature, and those under the distribution drawn from, which is
    the policy as top_k, top_p and min_p cut it."""

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
    rewards: dict[str, float | None]
    reward: float
    advantage: float
    turns: Turns | None = None

    @property
    def is_sampled(self) -> Bool[np.ndarray, " token"]:
        """Which of its tokens the model drew, and not an environment wrote."""
        found = np.ones(len(self.tokens), bool)
        for start, stop in self.turns.written if self.turns else ():
            found[start:stop] = False
        return found

    @property
    def sampled_count(self) -> int:
        """How many tokens the model drew."""
        return int(np.sum(self.is_sampled))

    @property
    def is_judged(self) -> bool:
        """Whether any reward applies to it."""
        return not self.rewards or any(value is not None for value in self.rewards.values())


Group = Sequence[Sample]


def group_by_prompt(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each prompt, which follow each other."""
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.place)]


def advantages(rewards: Float[np.ndarray, "group member"], scale_by_std: bool) -> Float[np.ndarray, "group member"]:
    """Rewards less the mean of their group (Shao et al. 2024), over its standard deviation where that is asked for,
    which Dr. GRPO (Liu et al. 2025) advises against. A group whose rewards are equal has advantages of exactly 0, and a
    member without a reward, nan, is left out."""
    found = np.zeros(rewards.shape)
    for group, advantage in zip(rewards, found, strict=True):
        is_judged = ~np.isnan(group)
        judged = group[is_judged]
        if len(judged) and np.ptp(judged) > 0:
            scale = np.std(judged, ddof=1) + STD_EPSILON if scale_by_std else 1.0
            advantage[is_judged] = (judged - np.mean(judged)) / scale
    return found


def kept_samples(groups: Sequence[Group], config: GrpoConfig) -> list[Sample]:
    """Those that the loss counts: not of a group without variance, nor without a reward, nor truncated if these are
    masked (DAPO, Yu et al. 2025). With a divergence to keep small, groups without variance count too."""
    return [
        sample
        for group in groups
        for sample in group
        if (config.kl_weight > 0 or has_variance(group)) and sample.is_judged and not is_masked(sample, config)
    ]


def is_masked(sample: Sample, config: GrpoConfig) -> bool:
    return config.mask_truncated and sample.is_truncated


def has_variance(group: Group) -> bool:
    return len({sample.reward for sample in group if sample.is_judged}) > 1


def chosen_groups(groups: Sequence[Group], config: GrpoConfig) -> list[Group]:
    """Of the groups that a step asked for, those it trains on: the first with variance and, where these are too few,
    the first of the others, so that there are `prompts_per_step` whatever the rewards are."""
    chosen = sorted(groups, key=lambda group: not has_variance(group))[: config.prompts_per_step]
    return sorted(chosen, key=lambda group: group[0].place)


def token_weights(groups: Sequence[Group], config: GrpoConfig) -> Callable[[Sample], float]:
    """What a token of a sample counts in the loss, which is a plain sum then: each token the same (DAPO, Yu et al.
    2025), each sample the same (GRPO, Shao et al. 2024), or each slot of the longest completion (Dr. GRPO).

    Tokens are those of all `groups`, but for truncated samples that are masked, and samples are all there are: no
    denominator depends on a reward.
    """
    samples = [sample for group in groups for sample in group]
    match config.loss_normalisation:
        case "token":
            token_count = sum(sample.sampled_count for sample in samples if not is_masked(sample, config))
            return lambda _: 1 / token_count
        case "sequence":
            return lambda sample: 1 / (len(samples) * sample.sampled_count)
        case "constant":
            return lambda _: 1 / (len(samples) * config.max_completion_tokens)


class RolloutBatch(NamedTuple):
    """Packed rows as in `data.Batch`, with `prompt_offset` as in `attention`.

    A completion's positions continue those of its prompt. `weight` is what a token counts in the loss, `sampled` its
    log-probability under the distribution drawn from and `uncut` that under the policy of the sampler; `old` and
    `reference` are those of the policy before this rollout's updates and of the starting policy; `sequence_ratio` is
    that of a token's whole completion, where it is used.
    """

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]
    prompt_offset: Int[Array, "*rows token"]
    advantage: Float[Array, "*rows token"]
    sampled: Float[Array, "*rows token"]
    uncut: Float[Array, "*rows token"]
    old: Float[Array, "*rows token"]
    reference: Float[Array, "*rows token"]
    sequence_ratio: Float[Array, "*rows token"]


INTEGERS = ("token", "target", "segment", "position", "prompt_offset")


def shares_prompts(model: ModelConfig) -> bool:
    """Whether attention can let several completions continue one prompt."""
    return model.attention == "xla"


def packed_rows(
    kept: Sequence[Sample], weight_of: Callable[[Sample], float], shape: tuple[int, int, int], is_shared: bool
) -> tuple[RolloutBatch, int]:
    """The samples packed First-Fit-Decreasing into rows of `shape` [micro_batch, row, token], and how many of the
    micro-batches hold any.

    Where prompts are shared, samples of one prompt that lie in one row have it in common: it is there once, all but
    its last token, and each sample continues it.
    """
    same = groupby(kept, key=lambda sample: (sample.place, sample.prompt_tokens))
    parts = [part for _, group in same for part in parts_of_group(list(group), shape[2], is_shared)]
    parts.sort(key=lambda part: -slots_of_part(part))
    row_of = first_fit(np.array([slots_of_part(part) for part in parts], np.int64), shape[2])
    arrays: Any = [np.zeros(shape, np.int32 if name in INTEGERS else np.float32) for name in RolloutBatch._fields]
    batch = RolloutBatch(*arrays)
    for part, number in zip(parts, row_of, strict=True):
        at = divmod(int(number), shape[1])
        place_part(part, RolloutBatch(*(leaf[at] for leaf in batch)), weight_of)
    return batch, int(row_of.max()) // shape[1] + 1


def place_part(part: Group, row: RolloutBatch, weight_of: Callable[[Sample], float]) -> None:
    """Write a prompt and its samples after what a row holds; a lone sample is one document with its prompt."""
    *prompt, last = part[0].prompt_tokens
    document, end = int(row.segment.max()) + 1, int(np.count_nonzero(row.segment))
    here = slice(end, end + len(prompt))
    row.token[here], row.segment[here], row.position[here] = prompt, document, np.arange(len(prompt))
    goes_on = len(part) > 1 and len(prompt) > 0
    for number, sample in enumerate(part):
        end, count = here.stop, len(sample.tokens)
        here = slice(end, end + count)
        row.token[here], row.target[here] = (last, *sample.tokens[:-1]), sample.tokens
        row.segment[here], row.prompt_offset[here] = document + number + goes_on, (number + 1) * goes_on
        row.position[here] = len(prompt) + np.arange(count)
        row.weight[here], row.advantage[here] = weight_of(sample) * sample.is_sampled, sample.advantage
        row.sampled[here], row.uncut[here] = sample.sampled_log_probabilities, sample.log_probabilities


def parts_of_group(group: Group, capacity: int, is_shared: bool) -> Iterator[Group]:
    """The samples of a prompt that may share one row with it."""
    if not is_shared:
        yield from ([sample] for sample in group)
        return
    ordered = sorted(group, key=lambda sample: -len(sample.tokens))
    room = capacity - len(group[0].prompt_tokens) + 1
    place = first_fit(np.array([len(sample.tokens) for sample in ordered], np.int64), room)
    for number in range(int(place.max()) + 1):
        yield [sample for sample, at in zip(ordered, place, strict=True) if at == number]


def slots_of_part(part: Group) -> int:
    """Slots of a row that samples of one prompt take together, as each slot holds a token and its successor."""
    return len(part[0].prompt_tokens) - 1 + sum(len(sample.tokens) for sample in part)


# The objective


class PolicyLoss(NamedTuple):
    """The loss of GRPO on packed completions; its fields are all of the config that shapes the program.

    - The ratio of policies of each token, clipped as in PPO (Schulman et al. 2017) with the asymmetric bounds of DAPO
      (Yu et al. 2025); or that of the whole completion, clipped so (GSPO, Zheng et al. 2025); or each token's, bounded
      from above alone, as a weight of its log-probability (CISPO, MiniMax 2025).
    - Times a truncated importance weight (Espeholt et al. 2018; Yao et al. 2025) of the trainer's policy over the
      distribution that the sampler drew from, which also corrects for top_k, top_p and min_p.
    - Plus the divergence of the policy from the starting one, estimated by k3 (Schulman 2020) times the ratio, without
      which its slope would be that of the divergence of the starting policy from this one (Tang & Munos 2025).
    """

    ratio: str
    clip_low: float
    clip_high: float
    importance_limit: float
    kl_weight: float
    temperature: float
    compute_dtype: str
    rematerialisation: str
    is_repeated: bool

    def __call__(
        self, params: PyTree[Array], batch: RolloutBatch, model: ModelConfig, noise: Any
    ) -> tuple[Float[Array, ""], Facts]:
        hidden, head = self.hidden_states(params, batch, model), head_of(params, model)
        sizes = model.vocabulary_size, model.is_frozen, self.temperature
        if self.ratio == "sequence" and self.is_repeated:
            current = -token_statistics(hidden, head, batch.target, model.vocabulary_size, self.temperature).loss
            batch = batch._replace(sequence_ratio=self.sequence_ratio(jax.lax.stop_gradient(current), batch))
        loss, found = summed_token_loss(
            hidden, head, batch.target, batch, lambda *part: self.objective(*part)[0], *sizes
        )
        sums, largest = self.objective(-found.loss, batch)[1]
        return loss, (sums | {"entropy": jnp.sum(jnp.where(batch.weight > 0, found.entropy, 0.0))}, largest)

    def hidden_states(self, params: PyTree[Array], batch: RolloutBatch, model: ModelConfig) -> Array:
        """The last hidden states of a micro-batch, in the dtype of compute."""
        x = embed(params, batch.token, self.compute_dtype)
        offset = batch.prompt_offset if shares_prompts(model) else None
        return forward(params, x, batch.segment, batch.position, model, self.rematerialisation, offset)

    def sequence_ratio(
        self, log_probability: Float[Array, "row token"], batch: RolloutBatch
    ) -> Float[Array, "row token"]:
        """For each token the geometric mean of the ratios of its completion's tokens."""

        @jax.vmap
        def over_completion(x: Float[Array, " token"], segment: Int[Array, " token"]) -> Float[Array, " token"]:
            return jnp.bincount(segment, x, length=len(x) + 1)[segment]

        is_counted = batch.weight > 0
        change = over_completion(jnp.where(is_counted, log_probability - batch.old, 0.0), batch.segment)
        return jnp.exp(change / jnp.maximum(over_completion(is_counted.astype(jnp.float32), batch.segment), 1))

    def objective(
        self, log_probability: Float[Array, "*rows token"], batch: RolloutBatch
    ) -> tuple[Float[Array, ""], Facts]:
        """The loss of a batch given the log-probabilities of its targets, and what is logged of its tokens."""
        is_counted, fixed = batch.weight > 0, jax.lax.stop_gradient(log_probability)

        def difference(a: Array, b: Array) -> Array:
            return jnp.where(is_counted, a - b, 0.0)

        old = batch.old if self.is_repeated else fixed
        token_ratio = ratio = jnp.exp(difference(log_probability, old))
        if self.ratio == "sequence" and self.is_repeated:  # with the slope of the token's own
            ratio = batch.sequence_ratio * jnp.exp(difference(log_probability, fixed))
        if self.ratio == "cispo":
            bounded = jax.lax.stop_gradient(jnp.minimum(ratio, 1 + self.clip_high))
            is_clipped, gain = ratio > bounded, bounded * batch.advantage * log_probability
        else:
            bounded = jax.lax.stop_gradient(jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high))
            is_clipped = ratio * batch.advantage > bounded * batch.advantage
            gain = jnp.where(is_clipped, bounded, ratio) * batch.advantage
        importance = jnp.exp(jax.lax.stop_gradient(difference(old, batch.sampled)))
        mismatch = jax.lax.stop_gradient(difference(old, batch.uncut))
        if self.importance_limit:
            gain *= jnp.minimum(importance, self.importance_limit)
        loss, divergence = -gain, jnp.zeros(())
        if self.kl_weight:
            from_reference = difference(batch.reference, log_probability)
            divergence = jnp.exp(from_reference) - from_reference - 1
            loss += self.kl_weight * divergence * token_ratio
        sums = {
            "count": jnp.sum(is_counted),
            "clip_fraction": jnp.sum(is_counted & is_clipped),
            "logprob_difference_mean": jnp.sum(jnp.abs(mismatch)),
            "importance_mean": jnp.sum(jnp.where(is_counted, importance, 0.0)),
            "kl": jnp.sum(divergence * is_counted),
        }
        return jnp.sum(batch.weight * loss), (sums, {"logprob_difference_max": jnp.max(jnp.abs(mismatch))})


def policy_loss(config: GrpoConfig) -> PolicyLoss:
    """The loss that a config asks for."""
    shared = {name: getattr(config, name) for name in PolicyLoss._fields if name != "is_repeated"}
    return PolicyLoss(**shared, is_repeated=config.updates_per_rollout > 1)


@partial(jax.jit, static_argnames=("model", "loss"))
def log_probabilities(
    compute: PyTree[Array], batch: RolloutBatch, count: Int[Array, ""], model: ModelConfig, loss: PolicyLoss
) -> Float[Array, "micro_batch row token"]:
    """Of each target in the first `count` micro-batches, under the policy of these weights in the dtype of compute."""

    def fill(number: Int[Array, ""], found: Array) -> Array:
        micro_batch = jax.tree.map(lambda leaf: leaf[number], batch)
        hidden, head = loss.hidden_states(compute, micro_batch, model), head_of(compute, model)
        values = token_statistics(hidden, head, micro_batch.target, model.vocabulary_size, loss.temperature).loss
        return found.at[number].set(-values)

    return jax.lax.fori_loop(0, count, fill, jnp.zeros(batch.token.shape))


def update_shape(config: GrpoConfig, mesh: Mesh) -> tuple[int, int, int]:
    """The shape [micro_batch, row, token] of every update of a run, with room for all samples: one compilation."""
    rows_at_once = config.micro_batch_size * row_shards(mesh)
    most_rows = math.ceil(config.prompts_per_step / config.updates_per_rollout) * config.completions_per_prompt
    return math.ceil(most_rows / rows_at_once), rows_at_once, config.sequence_length


@partial(jax.jit, static_argnames=("model", "dtype"))
def cast_weights(params: PyTree[Array], model: ModelConfig, dtype: str) -> PyTree[Array]:
    """A copy of what training changes in the dtype of compute."""
    return cast(params, trained_table(model), dtype)


def update(
    state: TrainState,
    groups: Sequence[Group],
    reference: PyTree[Array] | None,
    recipe: Recipe,
    opened: OpenedModel,
    config: GrpoConfig,
    frozen: PyTree[Array] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """The optimizer steps of one rollout, its groups shared out evenly over them, and what is logged of them: means
    over counted tokens, the loss of the first, the gradient norm of the last."""
    model, mesh, loss = opened.model, opened.mesh, policy_loss(config)
    groups, shape = chosen_groups(groups, config), update_shape(config, mesh)
    policies = {"reference": reference} if reference is not None else {}
    if config.updates_per_rollout > 1:
        policies["old"] = cast_weights(state.params, model, config.compute_dtype)
    batches, tokens, slots, found, taught_count = [], 0, 0, [], 0
    for share in np.array_split(np.arange(len(groups)), config.updates_per_rollout):
        part = [groups[number] for number in share]
        if not (kept := kept_samples(part, config)):
            batches.append(None)
            continue
        taught_count += any(sample.advantage for sample in kept)
        rows, count = packed_rows(kept, token_weights(part, config), shape, shares_prompts(model))
        tokens, slots = tokens + int(np.sum(rows.segment > 0)), slots + count * rows.segment[0].size
        batch, count = put_batch(rows, mesh), np.int32(count)
        for name, policy in policies.items():
            values = log_probabilities(joined(frozen, policy, model), batch, count, model, loss)
            batch = batch._replace(**{name: values})
        batches.append((batch, count))
    for batch in batches:
        if batch is None:  # nothing to learn from: only the step is counted
            state = state._replace(step=state.step + 1)
            continue
        rows, count = batch
        state, facts = optimizer.train_step(state, rows, None, recipe, model, loss, count, frozen)
        found.append(facts)
    empty = {"empty_updates": config.updates_per_rollout - taught_count}
    if not found:
        return state, empty | {"loss": 0.0, "gradient_norm": 0.0, "target_tokens": 0, "tokens": 0}
    return state, empty | update_facts(jax.device_get(found)) | {"tokens": tokens, "packing_efficiency": tokens / slots}


def difference_too_large(facts: dict[str, Any], config: GrpoConfig) -> str:
    """Why the sampler can't have had the weights that are trained, if so."""
    found, most = facts.get("logprob_difference_mean", 0.0), LARGEST_DIFFERENCE[config.compute_dtype]
    if found <= most:
        return ""
    return (
        f"log-probabilities of sampler and trainer differ by {found:.2g} nats a token on average, more than the "
        f"{most:g} that {config.compute_dtype} explains, so the completions are not of the weights that train; this "
        "step is not saved. Please report it with the devices and versions in run.log"
    )


def update_facts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is logged of the updates of a rollout that had something to learn from."""
    count = sum(int(facts["count"]) for facts in found)
    means = ("clip_fraction", "importance_mean", "logprob_difference_mean", "kl", "entropy")
    return {name: float(sum(facts[name] for facts in found) / count) for name in means} | {
        "loss": float(found[0]["loss"]),
        "gradient_norm": float(found[-1]["gradient_norm"]),
        "learning_rate": float(found[-1]["learning_rate"]),
        "logprob_difference_max": float(found[0]["logprob_difference_max"]),
        "skipped": int(found[-1]["skipped"]),
        "skipped_updates": sum(int(facts["skipped"]) > 0 for facts in found),
        "target_tokens": count,
    }
