"""Group-relative policy optimization: completions by the sampler, their rewards, and updates by the trainer's step.

One set of weights on one mesh does both. A rollout is a function of (seed, step, index) and the weights, so a run that
was killed continues as if nothing had happened, and every step can be computed again from rollouts.jsonl. The loss is
a plain sum over tokens, each with a weight made beforehand, so neither packing nor micro-batches change it.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from lacuna import checkpoint, metrics, optimizer, weights
from lacuna.answers import expected_answers
from lacuna.checkpoint import OpenedModel, open_model
from lacuna.config import GrpoConfig, RewardKeys, SamplingKeys, UserError
from lacuna.data import Mixture, first_fit, locate
from lacuna.distributed import from_first, held_directory, is_first, make_mesh, put_batch, row_shards
from lacuna.eval import Problem, Problems, Tasks, measure_in_training, read_problems
from lacuna.model import (
    ModelConfig,
    cast,
    check_trainable,
    embed,
    forward,
    head_of,
    joined,
    summed_token_loss,
    token_statistics,
    trained_table,
)
from lacuna.optimizer import Facts, Recipe, TrainState
from lacuna.sampler import Completion, Request, Sampler, slots_for
from lacuna.tokenizer import decode
from lacuna.trainer import Evaluation, Run, Step

ROLLOUT = 4  # names the random numbers of rollouts, as data's SHUFFLE_… name those of its order
SHOWN_COMPLETIONS = 4
SLOW_REWARD = 0.25  # of a step
# Nats a token between sampler and trainer, on average, that no rounding explains: one of them has other weights
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.2}
STD_EPSILON = 1e-4  # as TRL adds to a group's standard deviation

# Rewards

Value = float | None  # None: it does not apply to this completion


class Answered(NamedTuple):
    """A completion of a problem: its text, its tokens, and whether it was cut off."""

    problem: Problem
    text: str
    tokens: tuple[int, ...] = ()
    is_truncated: bool = False


@dataclass(frozen=True)
class Reward:
    """Its name in logs, its weight in the sum, and what judges completions: given them, the step, the keys, a list for
    why calls were given up and what reports progress, it has a value for each."""

    name: str
    weight: float
    judge: Callable[[Sequence[Answered], int, RewardKeys, list[str], Callable[[], None]], list[Value]]
    needs_answer: bool = False
    file: Path | None = None


def rewards_of(
    rewards: Sequence[Reward],
    answered: Sequence[Answered],
    name: str,
    step: int,
    keys: RewardKeys,
    report: Callable[[], None],
) -> tuple[dict[str, list[Value]], dict[str, float], list[str]]:
    """What each reward gives each completion, the seconds that each took, and why calls were given up, whose values are
    None.

    Only the first process asks, under this name, as a user's function need not give the same everywhere; `report` is
    called while calls are made.

    Raises:
        UserError: a call was given up, and `on_reward_error` is stop.
    """
    values, seconds, failures = dict[str, list[Value]](), dict[str, float](), list[str]()
    for reward in rewards if is_first() else ():
        began = time.perf_counter()
        values[reward.name] = reward.judge(answered, step, keys, failures, report)
        seconds[reward.name] = time.perf_counter() - began
        if failures and keys.on_reward_error == "stop":
            break
    values, seconds, failures = json.loads(from_first(f"rewards of {name}", json.dumps([values, seconds, failures])))
    if failures and keys.on_reward_error == "stop":
        raise UserError(failures[0])
    return values, seconds, failures


def total_reward(rewards: Sequence[Reward], values: dict[str, list[Value]]) -> Float[np.ndarray, " completion"]:
    """The weighted sum of the rewards that apply; nan where none does."""
    weighted = [reward.weight * np.array(values[reward.name], np.float64) for reward in rewards]
    is_judged = np.any(np.isfinite(weighted), axis=0)
    return np.where(is_judged, np.nansum(weighted, axis=0), np.nan)


# Samples and their rows


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
    rewards: dict[str, float | None]
    reward: float
    advantage: float

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
        if (config.kl_weight > 0 or has_variance(group))
        and sample.is_judged
        and not (config.mask_truncated and sample.is_truncated)
    ]


def has_variance(group: Group) -> bool:
    return len({sample.reward for sample in group if sample.is_judged}) > 1


def token_weights(kept: Sequence[Sample], config: GrpoConfig) -> Callable[[Sample], float]:
    """What a token of a sample counts in the loss, which is a plain sum then: each token the same (DAPO, Yu et al.
    2025), each sample the same (GRPO, Shao et al. 2024), or each slot of the longest completion (Dr. GRPO)."""
    token_count = sum(len(sample.tokens) for sample in kept)
    match config.loss_normalisation:
        case "token":
            return lambda _: 1 / token_count
        case "sequence":
            return lambda sample: 1 / (len(kept) * len(sample.tokens))
        case "constant":
            return lambda _: 1 / (len(kept) * config.max_completion_tokens)


class RolloutBatch(NamedTuple):
    """Packed rows as in `data.Batch`, with `prompt_offset` as in `attention`.

    A completion's positions continue those of its prompt. `weight` is what a token counts in the loss, `sampled` its
    log-probability under the distribution drawn from; `old` and `reference` are those of the policy before this
    rollout's updates and of the starting policy.
    """

    token: Int[Array, "*rows token"]
    target: Int[Array, "*rows token"]
    weight: Float[Array, "*rows token"]
    segment: Int[Array, "*rows token"]
    position: Int[Array, "*rows token"]
    prompt_offset: Int[Array, "*rows token"]
    advantage: Float[Array, "*rows token"]
    sampled: Float[Array, "*rows token"]
    old: Float[Array, "*rows token"]
    reference: Float[Array, "*rows token"]


INTEGERS = ("token", "target", "segment", "position", "prompt_offset")


def shares_prompts(model: ModelConfig) -> bool:
    """Whether attention can let several completions continue one prompt."""
    return model.attention == "xla"


def packed_rows(
    kept: Sequence[Sample], config: GrpoConfig, shape: tuple[int, int, int], is_shared: bool
) -> tuple[RolloutBatch, int]:
    """The samples packed First-Fit-Decreasing into rows of `shape` [micro_batch, row, token], and how many of the
    micro-batches hold any.

    Where prompts are shared, samples of one prompt that lie in one row have it in common: it is there once, all but
    its last token, and each sample continues it.
    """
    parts = [part for group in group_by_prompt(kept) for part in parts_of_group(group, shape[2], is_shared)]
    parts.sort(key=lambda part: -slots_of_part(part))
    row_of = first_fit(np.array([slots_of_part(part) for part in parts], np.int64), shape[2])
    arrays: Any = [np.zeros(shape, np.int32 if name in INTEGERS else np.float32) for name in RolloutBatch._fields]
    batch, weight_of = RolloutBatch(*arrays), token_weights(kept, config)
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
        row.weight[here], row.advantage[here] = weight_of(sample), sample.advantage
        row.sampled[here] = sample.sampled_log_probabilities


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

    - The clipped ratio of PPO (Schulman et al. 2017), with the asymmetric bounds of DAPO (Yu et al. 2025).
    - Times a truncated importance weight (Espeholt et al. 2018; Yao et al. 2025) of the trainer's policy over the
      distribution that the sampler drew from, which also corrects for top_k, top_p and min_p.
    - Plus the divergence from the starting policy, estimated by k3 (Schulman 2020).
    """

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
        sizes = model.vocabulary_size, model.is_frozen
        loss, found = summed_token_loss(
            hidden, head, batch.target, batch, lambda *part: self.objective(*part)[0], *sizes
        )
        sums, largest = self.objective(-found.loss, batch)[1]
        return loss, (sums | {"entropy": jnp.sum(jnp.where(batch.weight > 0, found.entropy, 0.0))}, largest)

    def hidden_states(self, params: PyTree[Array], batch: RolloutBatch, model: ModelConfig) -> Array:
        """Hidden states whose logits are those over the temperature."""
        x = embed(params, batch.token, self.compute_dtype)
        offset = batch.prompt_offset if shares_prompts(model) else None
        hidden = forward(params, x, batch.segment, batch.position, model, self.rematerialisation, offset)
        return hidden if self.temperature == 1 else hidden / self.temperature

    def objective(
        self, log_probability: Float[Array, "*rows token"], batch: RolloutBatch
    ) -> tuple[Float[Array, ""], Facts]:
        """The loss of a batch given the log-probabilities of its targets, and what is logged of its tokens."""
        is_counted = batch.weight > 0

        def difference(a: Array, b: Array) -> Array:
            return jnp.where(is_counted, a - b, 0.0)

        old = batch.old if self.is_repeated else jax.lax.stop_gradient(log_probability)
        ratio = jnp.exp(difference(log_probability, old))
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        gain = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
        mismatch = jax.lax.stop_gradient(difference(old, batch.sampled))
        importance = jnp.exp(mismatch)
        if self.importance_limit:
            gain *= jnp.minimum(importance, self.importance_limit)
        loss, divergence = -gain, jnp.zeros(())
        if self.kl_weight:
            from_reference = difference(batch.reference, log_probability)
            divergence = jnp.exp(from_reference) - from_reference - 1
            loss += self.kl_weight * divergence
        sums = {
            "count": jnp.sum(is_counted),
            "clip_fraction": jnp.sum(is_counted & (ratio * batch.advantage > clipped * batch.advantage)),
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
        values = -token_statistics(hidden, head, micro_batch.target, model.vocabulary_size).loss
        return found.at[number].set(values)

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
    shape = update_shape(config, mesh)
    policies = {"reference": reference} if reference is not None else {}
    if config.updates_per_rollout > 1:
        policies["old"] = cast_weights(state.params, model, config.compute_dtype)
    batches, tokens, slots, found = [], 0, 0, []
    for share in np.array_split(np.arange(len(groups)), config.updates_per_rollout):
        if not (kept := kept_samples([groups[number] for number in share], config)):
            batches.append(None)
            continue
        rows, count = packed_rows(kept, config, shape, shares_prompts(model))
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
    if not found:
        return state, {"loss": 0.0, "gradient_norm": 0.0, "target_tokens": 0, "tokens": 0}
    return state, update_facts(jax.device_get(found)) | {"tokens": tokens, "packing_efficiency": tokens / slots}


def difference_too_large(facts: dict[str, Any], config: GrpoConfig) -> str:
    """Why the sampler can't have had the weights that are trained, if so; not known where the sampling rules cut its
    distribution."""
    found, most = facts.get("logprob_difference_mean", 0.0), LARGEST_DIFFERENCE[config.compute_dtype]
    if config.top_k or config.top_p < 1 or config.min_p or found <= most:
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


# Rollouts


class Inputs(NamedTuple):
    """What a run reads before it computes."""

    opened: OpenedModel
    problems: Problems
    held_out: Problems | None
    rewards: Sequence[Reward]


def read_inputs_of_grpo(config: GrpoConfig, rewards: Sequence[Reward]) -> Inputs:
    """Devices, model, problems and rewards of a config, each checked against the others."""
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    opened = open_model(config, mesh, with_weights=not config.from_scratch)
    check_trainable(opened.model, config.sequence_length)
    limits = config.sequence_length - config.max_completion_tokens, any(reward.needs_answer for reward in rewards)
    problems = read_problems(config.data, config, opened.tokenizer, *limits)
    held_out = read_problems(config.eval_data, config, opened.tokenizer, *limits) if config.eval_data else None
    if config.prompts_per_step > len(problems.problems):
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step} is more than the {len(problems.problems)} problems there are"
        )
    return Inputs(opened, problems, held_out, rewards)


def input_digests(config: GrpoConfig, inputs: Inputs) -> dict[str, str]:
    """Hashes of what a run reads again when it resumes, besides data: its rewards, and the policy it is held to."""
    files = {f"the file of reward {reward.name}": [reward.file] for reward in inputs.rewards if reward.file}
    if config.kl_weight and not config.from_scratch:
        files[f"the weights of {config.model_name}"] = weights.weight_files(inputs.opened.source)
    return {name: checkpoint.files_digest(paths) for name, paths in files.items()}


def problems_of_step(inputs: Inputs, config: GrpoConfig, step: int) -> list[tuple[int, Problem]]:
    """The problems of a step with their places in the run, in an order that is a function of the seed alone."""
    mixture = Mixture(inputs.problems.counts, tuple(source.weight for source in config.data), config.seed, True)
    size_of = cache(lambda epoch: len(mixture.epoch(epoch)))
    places = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    found = ((place, *locate(place, size_of)) for place in places)
    return [(place, inputs.problems.problems[mixture.epoch(epoch)[at]]) for place, epoch, at in found]


def rollout_facts(groups: Sequence[Group]) -> dict[str, Any]:
    """What is logged of a rollout."""
    samples = [sample for group in groups for sample in group]
    names = samples[0].rewards
    return {
        "reward": mean_value(sample.reward for sample in samples if sample.is_judged),
        "reward_std": float(np.mean([np.std([sample.reward for sample in group]) for group in groups])),
        **{f"reward/{name}": mean_value(sample.rewards[name] for sample in samples) for name in names},
        "completion_length": float(np.mean([len(sample.tokens) for sample in samples])),
        "completion_tokens": sum(len(sample.tokens) for sample in samples),
        "truncated_fraction": float(np.mean([sample.is_truncated for sample in samples])),
        "zero_advantage_fraction": float(np.mean([not has_variance(group) for group in groups])),
    }


# The command grpo


def run_grpo(
    config: GrpoConfig,
    rewards: Sequence[Reward],
    prepare: Callable[[OpenedModel], Tasks] | None,
    write_report: Callable[[Path], None],
) -> None:
    """The command grpo, from config to exported model; `prepare` makes the tasks to run now and then.

    Raises:
        UserError: whatever about config, model, data, rewards or devices can't be trained with.
    """
    config = checkpoint.settled(config)
    with held_directory(config.run_directory):
        run = Run(config, write_report)
        inputs = read_inputs_of_grpo(config, rewards)
        opened, digests = inputs.opened, inputs.problems.digests
        run.inputs = input_digests(config, inputs) if is_first() else {}
        tasks = prepare(opened) if prepare else None
        count = step_count(config, inputs)
        with run.begun(opened, digests, count, problem_lines(config, inputs, count)) as state:
            reference = None
            if config.kl_weight:
                first = optimizer.starting_state(config, opened) if run.resumed else state
                reference = cast_weights(first.params, opened.model, config.compute_dtype)
            with closing(metrics.LineFile(config.run_directory / "rollouts.jsonl", run.step)) as kept:
                steps = RolloutSteps(config, inputs, run, reference, tasks, run.whole(state.params), kept)
                evaluation = Evaluation([], "", steps.measure) if inputs.held_out or tasks else None
                if inputs.held_out and run.step == 0:
                    with run.off_the_clock():
                        run.log.step({"step": 0, **steps.held_out_rewards(run.whole(state.params))})
                run.train(
                    state, steps.take, evaluation, "its completions are those of step {} in rollouts.jsonl".format
                )
            last = metrics.read_json_lines(config.run_directory / "metrics.jsonl")[-1:]
            final = last[0].get("reward") if last else None
            run.finish({"best_eval_reward": run.saver.best, "final_reward": final})


def slot_count(config: GrpoConfig, mesh: Mesh) -> int:
    """Completions generated at once: no more than a rollout has, and so many that they divide over the devices."""
    return slots_for(min(config.slots, config.prompts_per_step * config.completions_per_prompt), mesh)


def step_count(config: GrpoConfig, inputs: Inputs) -> int:
    """Rollouts of the whole run."""
    return config.steps or math.ceil(config.epochs * len(inputs.problems.problems) / config.prompts_per_step)


def problem_lines(config: GrpoConfig, inputs: Inputs, steps: int) -> Iterator[str]:
    """Start-up lines on the step, the problems and the rewards."""
    is_shared = shares_prompts(inputs.opened.model)
    once = "once for all of its completions in a row" if is_shared else "again for each completion"
    yield f"in the update a prompt is computed {once}"
    completions = config.prompts_per_step * config.completions_per_prompt
    yield (
        f"a step: {config.prompts_per_step} problems × {config.completions_per_prompt} completions = {completions}, up "
        f"to {config.max_completion_tokens} tokens each, {config.updates_per_rollout} updates; {steps:,} steps"
    )
    held_out = f", {len(inputs.held_out.problems):,} held out" if inputs.held_out else ""
    yield f"problems: {len(inputs.problems.problems):,}{held_out}, {len(inputs.problems.bad):,} bad rows left out"
    for line in inputs.problems.bad[:5]:
        yield f"left out: {line}"
    yield f"rewards: {', '.join(f'{reward.name} × {reward.weight:g}' for reward in inputs.rewards)}"


class RolloutSteps:
    """The steps of grpo: roll out, score, update."""

    def __init__(
        self,
        config: GrpoConfig,
        inputs: Inputs,
        run: Run,
        reference: PyTree[Array] | None,
        tasks: Tasks | None,
        params: PyTree[Array],
        kept: metrics.LineFile,
    ) -> None:
        self.config, self.inputs, self.run, self.kept = config, inputs, run, kept
        self.reference, self.tasks = reference, tasks
        opened = inputs.opened
        recipe = optimizer.recipe_of(config, run.steps * config.updates_per_rollout)
        self.recipe = jax.device_put(recipe, optimizer.everywhere(opened.mesh))
        slots = slot_count(config, opened.mesh)
        self.sampler = Sampler(params, opened, slots, config.sequence_length, config.compute_dtype)
        self.stop_ids = tuple(opened.tokenizer.ends)
        added = opened.tokenizer.backend.get_added_tokens_decoder()
        self.special_ids = {id for id, token in added.items() if token.special}

    def take(self, state: TrainState) -> Step:
        """One rollout, its rewards and its updates."""
        config, run, began = self.config, self.run, time.perf_counter()
        if run.first_step_seconds is None:
            run.watchdog.pause()  # the first step may take its time to compile
        self.sampler.load(run.whole(state.params))
        asked = problems_of_step(self.inputs, config, run.step)
        try:
            groups, reward_seconds = self.rollout(asked)
        except UserError as error:
            raise UserError(f"{error}{self.saved(state)}") from error
        middle = time.perf_counter()
        state, facts = update(state, groups, self.reference, self.recipe, self.inputs.opened, config, run.frozen)
        ended = time.perf_counter()
        record = {"step": run.step + 1, **rollout_facts(groups), **facts}
        record |= {"rollout_seconds": middle - began, "update_seconds": ended - middle}
        for name, seconds in reward_seconds.items():
            record[f"reward_seconds/{name}"] = seconds
            if seconds > max(1.0, SLOW_REWARD * (ended - began)):
                run.log.info(f"reward {name} took {seconds:.1f} s of {ended - began:.1f} s of this step")
        if run.step == 0 or run.is_due(config.eval_every, run.step + 1):
            record["samples"] = shown_samples(groups, dict(asked))
        for sample in (sample for group in groups for sample in group):
            self.kept.write(json.dumps(asdict(sample), ensure_ascii=False))
        if problem := difference_too_large(facts, config):
            run.log.step(record)
            raise UserError(f"step {run.step + 1}: {problem}")
        return state, record, {}

    def saved(self, state: TrainState) -> str:
        """Save the last whole step, unless it is saved or there is none; says how to continue from it."""
        run = self.run
        if not run.step:
            return ""
        if run.step not in checkpoint.saved_steps(self.config.run_directory):
            run.save(state, None)
            run.saver.wait()
            run.saver.report(run.log.info)
        return f"; step {run.step} is saved: fix the reward and continue with --resume"

    def rollout(self, asked: list[tuple[int, Problem]]) -> tuple[list[list[Sample]], dict[str, float]]:
        """The groups of a step, each completion with its rewards and advantage, and the seconds of each reward."""
        config, rewards, size = self.config, self.inputs.rewards, self.config.completions_per_prompt
        requests = []
        for place, problem in asked:
            seed = int(np.random.default_rng([config.seed, ROLLOUT, place]).integers(2**32))
            requests.append(Request(problem.token, config.rules, self.stop_ids, seed=seed, n=size))
        completions = self.sampler.generate(requests, self.report_completion)
        answered = [self.answered(asked[completion.request][1], completion) for completion in completions]
        values, seconds = self.values(answered, f"step {self.run.step}")
        total = total_reward(rewards, values)
        advantage = advantages(total.reshape(-1, size), config.scale_by_std).ravel()
        samples = [
            Sample(
                step=self.run.step + 1,
                place=asked[completion.request][0],
                index=completion.index,
                origin=problem.origin,
                prompt_tokens=problem.token,
                tokens=completion.tokens,
                text=text,
                log_probabilities=completion.log_probabilities,
                sampled_log_probabilities=completion.sampled_log_probabilities,
                is_truncated=completion.finish_reason == "length",
                rewards={name: value[number] for name, value in values.items()},
                reward=float(np.nan_to_num(total[number])),
                advantage=float(advantage[number]),
            )
            for number, (completion, (problem, text, *_)) in enumerate(zip(completions, answered, strict=True))
        ]
        return group_by_prompt(samples), seconds

    def answered(self, problem: Problem, completion: Completion) -> Answered:
        """A completion as rewards see it: all its text but the token that ended it, special tokens too."""
        tokenizer, shown, text = self.inputs.opened.tokenizer, completion.tokens, completion.text
        if completion.finish_reason == "stop" and shown and shown[-1] in self.stop_ids:
            shown = shown[:-1]
        if self.special_ids.intersection(shown):
            text = decode(tokenizer, shown)
        return Answered(problem, text, completion.tokens, completion.finish_reason == "length")

    def values(self, answered: Sequence[Answered], name: str) -> tuple[dict[str, list[Value]], dict[str, float]]:
        """What each reward gives each completion, and the seconds of each; says so where calls were given up."""
        run = self.run
        if not is_first():
            run.watchdog.pause()
        given = rewards_of(self.inputs.rewards, answered, name, run.step + 1, self.config, self.report_progress)
        values, seconds, failures = given
        if failures:
            run.log.info(f"WARNING: {len(failures)} calls of rewards were given up, as {failures[0]}")
        return values, seconds

    def report_completion(self, completion: Completion) -> None:
        self.report_progress()

    def report_progress(self) -> None:
        """Report progress to the watchdog; the first step may take its time to compile."""
        if self.run.first_step_seconds is not None:
            self.run.watchdog.report_progress()

    def measure(self, params: PyTree[Array], watchdog: Any) -> dict[str, Any]:
        """Figures of the tasks, and mean rewards of greedy completions of the held-out problems."""
        figures = measure_in_training(self.tasks, params) if self.tasks else {}
        try:
            return figures | (self.held_out_rewards(params) if self.inputs.held_out else {})
        except UserError as error:  # a step that fails so saves and stops
            self.run.log.info(f"WARNING: nothing was measured: {error}")
            return figures

    def held_out_rewards(self, params: PyTree[Array]) -> dict[str, float | None]:
        """Mean rewards of greedy completions of the held-out problems."""
        assert self.inputs.held_out
        self.sampler.load(params)
        problems = self.inputs.held_out.problems
        rules = SamplingKeys(temperature=0.0, max_tokens=self.config.max_completion_tokens)
        requests = [Request(problem.token, rules, self.stop_ids) for problem in problems]
        completions = self.sampler.generate(requests, self.report_completion)
        answered = [self.answered(*each) for each in zip(problems, completions, strict=True)]
        values, _ = self.values(answered, f"evaluation {self.run.step}")
        means = {f"eval_reward/{name}": mean_value(value) for name, value in values.items()}
        return {"eval_reward": mean_value(total_reward(self.inputs.rewards, values))} | means


def mean_value(values: Iterable[Value]) -> float | None:
    """The mean of the rewards that apply, None if none does."""
    found = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(found)) if found else None


def shown_samples(groups: Sequence[Group], asked: dict[int, Problem]) -> dict[str, str]:
    """Some problems of a rollout, each with its answer, and one completion with what it was worth."""
    found = {}
    for sample in (group[0] for group in groups[:SHOWN_COMPLETIONS]):
        problem = asked[sample.place]
        worth = [f"{name} {'none' if value is None else f'{value:g}'}" for name, value in sample.rewards.items()]
        expected = [f"expected {' or '.join(expected_answers(problem.answer))}"] if problem.answer else []
        facts = ", ".join((*expected, *worth, f"advantage {sample.advantage:.2f}"))
        found[f"{problem.prompt} ({problem.origin})"] = f"{sample.text} ({facts})"
    return found
