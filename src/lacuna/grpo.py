"""Group-relative policy optimization: completions by the sampler, their rewards, and an update by the trainer's step.

One set of weights on one mesh does both. A rollout is a function of (seed, step, index) and the weights, so a run that
was killed continues as if nothing had happened, and every step can be computed again from rollouts.jsonl.
"""

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_alike import shard_alike
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from lacuna import checkpoint, metrics, trainer
from lacuna.checkpoint import OpenedModel
from lacuna.cli import parse
from lacuna.config import EvalConfig, GrpoConfig, SamplingKeys, UserError
from lacuna.data import Epochs, Mixture, first_fit
from lacuna.distributed import (
    check_same,
    enable_compilation_cache,
    from_first,
    is_first,
    make_mesh,
    put_batch,
    row_shards,
)
from lacuna.eval import (
    FORMAL_MARK,
    Problem,
    Problems,
    Subject,
    final_answer,
    is_same_answer,
    marked_answer,
    measure_in_training,
    number_of,
    read_problems,
    read_questions,
)
from lacuna.model import (
    ModelConfig,
    cast,
    check_sequence_length,
    embed,
    forward,
    head_of,
    summed_token_loss,
    token_statistics,
)
from lacuna.sampler import Request, Sampler, generation_defaults
from lacuna.trainer import Recipe, Run, Start, TrainState, apply_gradient, recipe_of, resumed_state, starting_state

RewardFunction = Callable[[str, str, dict[str, Any]], float]


def correct(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where the final answer is that of the row's reference answer, else 0."""
    if "answer" not in row:
        raise ValueError("the row has no reference answer; set completion_column to its column")
    expected = final_answer(row["answer"]) or row["answer"]
    return float(is_same_answer(final_answer(completion), expected))


def answer_format(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where a number follows `####` or `<answer>`, or stands in `\\boxed{}` or `\\fbox{}`, else 0."""
    found = marked_answer(completion, FORMAL_MARK)
    return float(found is not None and number_of(found) is not None)


BUILT_IN: dict[str, RewardFunction] = {"correct": correct, "gsm8k_correct": correct, "format": answer_format}


@dataclass(frozen=True)
class Reward:
    """A function, its weight in the sum, and its name in logs.

    A function takes the prompt as the model was asked, the completion, and the data row, in which "answer" is the
    reference answer, and returns a finite number.
    """

    name: str
    weight: float
    function: RewardFunction


def load_rewards(specs: Sequence[str]) -> list[Reward]:
    """The rewards of a config, each `NAME:WEIGHT`; NAME is one of ours, or `FILE.py:FUNCTION`, or `module:FUNCTION`.

    Raises:
        UserError: a spec that can't be read, or a function that can't be found.
    """
    rewards = []
    for spec in specs:
        name, _, weight = spec.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            name, number = spec, 1.0
        if not math.isfinite(number):
            raise UserError(f"reward {spec!r}: its weight is {weight}; write a finite number")
        function = BUILT_IN.get(name) or users_function(name, spec)
        rewards.append(Reward(name.rpartition(":")[2], number, function))
    names = [reward.name for reward in rewards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"reward: {twice.pop()} is named twice; keep one, with its weight")
    return rewards


def users_function(name: str, spec: str) -> RewardFunction:
    """A function of a Python file or an importable module."""
    place, _, function_name = name.rpartition(":")
    if not place:
        raise UserError(f"reward {spec!r}: no such reward; ours are {', '.join(BUILT_IN)}, yours FILE.py:FUNCTION")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UserError(f"reward {spec!r}: {place}: no such file; paths start from {Path.cwd()}")
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert found and found.loader
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module  # where dataclasses of the user look for themselves
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {spec!r}: {place} fails on import: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {place} has no function {function_name}")
    return function


def rewards_of(
    rewards: Sequence[Reward], pairs: Sequence[tuple[Problem, str]]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """What each reward gives each completion, and the seconds that each took.

    Raises:
        UserError: a function fails or gives no finite number; names it, the row and the completion.
    """
    values: dict[str, list[float]] = {}
    seconds = {}
    for reward in rewards:
        began = time.perf_counter()
        values[reward.name] = [value_of(reward, problem, completion) for problem, completion in pairs]
        seconds[reward.name] = time.perf_counter() - began
    return values, seconds


def value_of(reward: Reward, problem: Problem, completion: str) -> float:
    try:
        value = float(reward.function(problem.prompt, completion, problem.row))
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    else:
        if math.isfinite(value):
            return value
        wrong = f"it gave {value}"
    raise UserError(f"reward {reward.name} on {problem.origin}: {wrong}; the completion begins {completion[:80]!r}")


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


def kept_samples(groups: Sequence[Group], config: GrpoConfig) -> list[Sample]:
    """Those that the loss counts: not of a group without variance, nor truncated if these are masked (DAPO, Yu et al.
    2025). With a divergence to keep small, groups without variance count too."""
    return [
        sample
        for group in groups
        for sample in group
        if (config.kl_weight > 0 or has_variance(group)) and not (config.mask_truncated and sample.is_truncated)
    ]


def has_variance(group: Group) -> bool:
    return any(sample.reward != group[0].reward for sample in group)


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
    """Packed rows as in `data.Batch`; `prompt_offset` links a completion to its prompt as in `attention`, and its
    positions continue the prompt's. `weight` is what a token counts in the loss; `sampled` is the log-probability under
    the distribution drawn from, `old` and `reference` are those of the policy before this rollout's updates and of the
    starting policy."""

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
    """Whether attention can let several completions go on from one prompt."""
    return model.attention == "xla"


def packed_rows(kept: Sequence[Sample], config: GrpoConfig, rows_at_once: int, is_shared: bool) -> RolloutBatch:
    """The samples packed First-Fit-Decreasing into rows, as [micro_batch, row, token].

    Where prompts are shared, samples of one prompt that stand in one row have it in common: it is there once, all but
    its last token, and each sample goes on from it.
    """
    parts = [part for group in grouped(kept) for part in parts_of(group, config.sequence_length, is_shared)]
    parts.sort(key=lambda part: -slots_of_part(part))
    row_of = first_fit(np.array([slots_of_part(part) for part in parts], np.int64), config.sequence_length)
    micro_batches = -(-(int(row_of.max(initial=0)) + 1) // rows_at_once)
    shape = micro_batches * rows_at_once, config.sequence_length
    arrays: Any = [np.zeros(shape, np.int32 if name in INTEGERS else np.float32) for name in RolloutBatch._fields]
    rows, weight_of = RolloutBatch(*arrays), token_weights(kept, config)
    for part, number in zip(parts, row_of, strict=True):
        place_part(part, jax.tree.map(lambda leaf, number=number: leaf[number], rows), weight_of)
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, rows_at_once, -1), rows)


def place_part(part: Group, row: RolloutBatch, weight_of: Callable[[Sample], float]) -> None:
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
        row.segment[here], row.prompt_offset[here] = document + number + goes_on, (number + 1) * goes_on
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


def slots_of_part(part: Group) -> int:
    """Slots of a row that samples of one prompt take together, as each slot holds a token and its successor."""
    return len(part[0].prompt_tokens) - 1 + sum(len(sample.tokens) for sample in part)


# The objective


def objective(
    log_probability: Float[Array, "*rows token"], batch: RolloutBatch, config: GrpoConfig
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

    old = batch.old if config.updates_per_rollout > 1 else jax.lax.stop_gradient(log_probability)
    ratio = jnp.exp(difference(log_probability, old))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gain = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    mismatch = jax.lax.stop_gradient(difference(old, batch.sampled))
    importance = jnp.exp(mismatch)
    if config.importance_limit:
        gain *= jnp.minimum(importance, config.importance_limit)
    loss = -gain
    if config.kl_weight:
        from_reference = difference(batch.reference, log_probability)
        divergence = jnp.exp(from_reference) - from_reference - 1
        loss += config.kl_weight * divergence
    facts = {
        "count": jnp.sum(is_counted),
        "clip_fraction": jnp.sum(is_counted & (ratio * batch.advantage > clipped * batch.advantage)),
        "importance_mean": jnp.sum(jnp.where(is_counted, importance, 0.0)),
        "kl": jnp.sum(divergence * is_counted) if config.kl_weight else jnp.zeros(()),
        "logprob_difference_max": jnp.max(jnp.abs(mismatch)),
    }
    return jnp.sum(batch.weight * loss), facts


def hidden_states(params: PyTree[Array], batch: RolloutBatch, model: ModelConfig, config: GrpoConfig) -> Array:
    """Hidden states whose logits are those over the temperature."""
    x = embed(params, batch.token)
    prompt_offset = batch.prompt_offset if shares_prompts(model) else None
    hidden = forward(params, x, batch.segment, batch.position, model, config.rematerialisation, prompt_offset)
    return hidden if config.temperature == 1 else hidden / config.temperature


def objective_of_params(
    params: PyTree[Array], batch: RolloutBatch, model: ModelConfig, config: GrpoConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective, and what is logged."""

    def loss_of(log_probability: Array, part: RolloutBatch) -> Array:
        return objective(log_probability, part, config)[0]

    hidden, head = hidden_states(params, batch, model, config), head_of(params, model)
    loss, found = summed_token_loss(hidden, head, batch.target, batch, loss_of, model.vocabulary_size)
    facts = objective(-found.loss, batch, config)[1]
    return loss, facts | {"entropy": jnp.sum(jnp.where(batch.weight > 0, found.entropy, 0.0))}


@partial(jax.jit, static_argnames=("model", "config"))
def log_probabilities(
    compute: PyTree[Array], batch: RolloutBatch, model: ModelConfig, config: GrpoConfig
) -> Float[Array, "row token"]:
    """Of each target, under the policy of these weights."""
    hidden = hidden_states(compute, batch, model, config)
    return -token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size).loss


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames="total")
def add_gradient(
    total: PyTree[Array], compute: PyTree[Array], batch: RolloutBatch, model: ModelConfig, config: GrpoConfig
) -> PyTree[Array]:
    """Gradient, loss and facts of one more micro-batch, added up in float32."""
    (loss, facts), gradient = jax.value_and_grad(objective_of_params, has_aux=True)(compute, batch, model, config)
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


ROLLOUT = 4  # names the random numbers of rollouts, as data's SHUFFLE_… name those of its order
SHOWN_COMPLETIONS = 4
SLOW_REWARD = 0.25  # of a step


# The update

step_along = jax.jit(apply_gradient, static_argnames="model", donate_argnames="state")


def update(
    state: TrainState,
    groups: Sequence[Group],
    reference: PyTree[Array] | None,
    recipe: Recipe,
    inputs: "ProblemInputs",
    config: GrpoConfig,
) -> tuple[TrainState, dict[str, Any]]:
    """The optimizer steps of one rollout, its groups shared out evenly over them, and what is logged of them: means
    over counted tokens, the loss of the first, the gradient norm of the last."""
    mesh, model = inputs.opened.mesh, inputs.opened.model
    rows_at_once = config.micro_batch_size * row_shards(mesh)
    parts = []
    for share in np.array_split(np.arange(len(groups)), config.updates_per_rollout):
        kept = kept_samples([groups[number] for number in share], config)
        parts.append(packed_rows(kept, config, rows_at_once, shares_prompts(model)) if kept else None)
    batches = [put_micro_batches(part, mesh) if part else [] for part in parts]

    def filled(params: PyTree[Array], name: str) -> None:
        for micro_batches in batches:
            micro_batches[:] = [
                each._replace(**{name: log_probabilities(params, each, model, config)}) for each in micro_batches
            ]

    if config.updates_per_rollout > 1:
        filled(compute_params(state.params, model, config.compute_dtype), "old")
    if reference is not None:
        filled(reference, "reference")
    found = []
    for micro_batches in batches:
        if not micro_batches:  # nothing to learn from: only the step is counted
            state = state._replace(step=state.step + 1)
            continue
        compute, total = compute_params(state.params, model, config.compute_dtype), zeros(state.params)
        for micro_batch in micro_batches:
            total = add_gradient(total, compute, micro_batch, model, config)
        gradients, loss, facts = total
        state, stepped = step_along(state, loss, gradients, recipe, model)
        found.append(facts | stepped)
    return state, described(jax.device_get(found), [part for part in parts if part])


def put_micro_batches(batch: RolloutBatch, mesh: Mesh) -> list[RolloutBatch]:
    """Each micro-batch on the devices."""
    parts = (jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], batch) for at in range(batch.token.shape[0]))
    return [jax.tree.map(lambda leaf: leaf[0], put_batch(part, mesh)) for part in parts]


def described(found: list[dict[str, Any]], parts: list[RolloutBatch]) -> dict[str, Any]:
    """What is logged of the updates of a rollout."""
    if not found:
        return {"loss": 0.0, "gradient_norm": 0.0, "target_tokens": 0, "tokens": 0}
    count = sum(int(facts["count"]) for facts in found)
    means = {
        name: float(sum(facts[name] for facts in found) / count)
        for name in ("clip_fraction", "importance_mean", "kl", "entropy")
    }
    tokens = sum(int(np.sum(part.segment > 0)) for part in parts)
    return means | {
        "loss": float(found[0]["loss"]),
        "gradient_norm": float(found[-1]["gradient_norm"]),
        "learning_rate": float(found[-1]["learning_rate"]),
        "logprob_difference_max": float(found[0]["logprob_difference_max"]),
        "skipped_updates": sum(int(facts["skipped"]) > 0 for facts in found),
        "target_tokens": count,
        "tokens": tokens,
        "packing_efficiency": tokens / sum(part.segment.size for part in parts),
    }


# The run


class ProblemInputs(NamedTuple):
    """What a run reads before it computes."""

    opened: OpenedModel
    problems: Problems
    held_out: Problems | None
    rewards: list[Reward]
    stop_ids: tuple[int, ...]
    tasks: EvalConfig | None


def read_problem_inputs(config: GrpoConfig, tasks: EvalConfig | None = None) -> ProblemInputs:
    """Devices, model, problems and rewards of a page, each checked against the others."""
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    rewards = load_rewards(config.reward)
    template = config.chat_template, config.template_date
    opened = checkpoint.open_model(config, mesh, *template, with_weights=not config.from_scratch)
    source, model, tokenizer, _, _ = opened
    check_sequence_length(model, config.sequence_length)
    longest, skips_bad = config.sequence_length - config.max_completion_tokens, config.on_bad_data == "skip"
    wants_answers = any(reward.function is correct for reward in rewards)
    problems = read_problems(config.data, config, tokenizer, longest, skips_bad, wants_answers)
    held_out = (
        read_problems(config.eval_data, config, tokenizer, longest, skips_bad, wants_answers)
        if config.eval_data
        else None
    )
    if config.prompts_per_step > len(problems.problems):
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step} is more than the {len(problems.problems)} problems there are"
        )
    if tasks:
        read_questions(tasks, opened)  # what can't be asked is refused now
    stop_ids = generation_defaults(source, tokenizer)[1]
    return ProblemInputs(opened, problems, held_out, rewards, stop_ids, tasks)


def run_grpo(
    config: GrpoConfig, tasks: EvalConfig | None = None, write_report: Callable[[Path], None] | None = None
) -> None:
    """The command grpo, from page to exported model, or the replay of one step.

    Raises:
        UserError: whatever about config, model, data, rewards or devices can't be trained with.
    """
    if config.replay:
        replay(config)
        return
    with trainer.started(config) as start:
        inputs = read_problem_inputs(config, tasks)
        trainer.check_unchanged(config, inputs.opened.model, inputs.problems.digests, start)
        check_same("config, model or data", json.dumps([trainer.masked_config(config), inputs.problems.digests]))
        enable_compilation_cache(config)
        with jax.set_mesh(inputs.opened.mesh):
            train_policy(config, inputs, start, write_report)


def train_policy(
    config: GrpoConfig, inputs: ProblemInputs, start: Start, write_report: Callable[[Path], None] | None
) -> None:
    """A run that has started and whose problems are read."""
    source, model, _, mesh, _ = inputs.opened
    fresh = partial(starting_state, config, source, model, mesh)
    reference = compute_params(fresh().params, model, config.compute_dtype) if config.kl_weight else None
    state = resumed_state(start.resumed, model, mesh) if start.resumed else fresh()
    steps, shards = step_count(config, inputs), row_shards(mesh)
    lines = problem_lines(config, inputs, steps)
    with trainer.under_way(config, start, inputs.opened, inputs.problems.digests, steps, lines) as run:
        if is_first():
            keep_rollouts(config.run_directory / "rollouts.jsonl", start.step)
        recipe = recipe_of(config, steps * config.updates_per_rollout)
        recipe = jax.device_put(recipe, NamedSharding(mesh, PartitionSpec()))
        slots = -(-min(config.slots, config.prompts_per_step * config.completions_per_prompt) // shards) * shards
        sampler = Sampler(state.params, inputs.opened, slots, config.sequence_length, config.compute_dtype)
        loop = RolloutLoop(config, inputs, run, recipe, sampler, reference, start.step)
        if start.resumed:
            loop.best_reward = start.resumed[1].run.best
        loop.train(state)
        run.end(loop.step, loop.summary, write_report)


def step_count(config: GrpoConfig, inputs: ProblemInputs) -> int:
    """Rollouts of the whole run."""
    return config.steps or -(-config.epochs * len(inputs.problems.problems) // config.prompts_per_step)


def problem_lines(config: GrpoConfig, inputs: ProblemInputs, steps: int) -> Iterator[str]:
    """Start-up lines on the step, the problems and the rewards."""
    once = (
        "once for all of its completions in a row"
        if shares_prompts(inputs.opened.model)
        else "anew for each completion"
    )
    yield f"in the update a prompt is computed {once}"
    completions = config.prompts_per_step * config.completions_per_prompt
    yield (
        f"a step: {config.prompts_per_step} problems × {config.completions_per_prompt} completions = {completions}, up to "
        f"{config.max_completion_tokens} tokens each, {config.updates_per_rollout} updates; {steps:,} steps"
    )
    held_out = f", {len(inputs.held_out.problems):,} held out" if inputs.held_out else ""
    yield f"problems: {len(inputs.problems.problems):,}{held_out}, {len(inputs.problems.bad):,} bad rows left out"
    for line in inputs.problems.bad[:5]:
        yield f"left out: {line}"
    yield f"rewards: {', '.join(f'{reward.name} × {reward.weight:g}' for reward in inputs.rewards)}"


@dataclass
class RolloutLoop:
    """The loop of rollouts and updates; `step` counts the rollouts done."""

    config: GrpoConfig
    inputs: ProblemInputs
    run: Run
    recipe: Recipe
    sampler: Sampler
    reference: PyTree[Array] | None
    step: int
    best_reward: float | None = None
    work_done: int | None = None

    def train(self, state: TrainState) -> TrainState:
        """Every step that is left: roll out, update, evaluate, log and save."""
        config = self.config
        with self.run.watched(lambda: self.work_done) as stop:
            if self.step == 0 and self.inputs.held_out:
                self.run.log.step({"step": 0, **self.held_out_rewards(state)})
            while self.step < self.run.steps:
                began = time.perf_counter()
                self.sampler.load(state.params)
                groups, record = rollout(self.sampler, self.inputs, config, self.step, self.worked)
                middle = time.perf_counter()
                state, facts = update(state, groups, self.reference, self.recipe, self.inputs, config)
                ended = time.perf_counter()
                self.step += 1
                self.work_done = (self.work_done or 0) + 1
                record |= facts | {"rollout_seconds": middle - began, "update_seconds": ended - middle}
                record |= {
                    "step_seconds": ended - began,
                    "tokens_per_second": record["completion_tokens"] / (ended - began),
                    "memory_bytes": metrics.memory_bytes(),
                }
                self.tell_slow_rewards(record)
                is_last = self.step == self.run.steps
                is_eval = is_last or (config.eval_every and self.step % config.eval_every == 0)
                if is_eval or self.step == 1:
                    record["samples"] = self.shown(groups)
                if is_eval and self.inputs.tasks:
                    self.work_done = None  # what compiles anew may take its time
                    record |= measure_in_training(self.inputs.tasks, Subject(self.inputs.opened, state.params))
                    self.work_done = self.step
                is_best = False
                if is_eval and self.inputs.held_out:
                    record |= self.held_out_rewards(state)
                    is_best = self.best_reward is None or record["eval_reward"] > self.best_reward
                    self.best_reward = record["eval_reward"] if is_best else self.best_reward
                if is_first():
                    write_rollouts(config.run_directory / "rollouts.jsonl", groups)
                self.run.log.step({"step": self.step, **record})
                is_stop = stop.is_due(self.step)
                if is_last or is_best or is_stop or (config.save_every and self.step % config.save_every == 0):
                    self.run.save(state, self.step, self.best_reward, is_best)
                self.run.tell_saved()
                if is_stop:
                    break
            self.work_done = None
            self.run.wait_for_save()
        return state

    def worked(self) -> None:
        """Count a completion, for the watchdog; the first step may take its time to compile."""
        if self.work_done is not None:
            self.work_done += 1

    def tell_slow_rewards(self, record: dict[str, Any]) -> None:
        """Say which rewards hold the step up."""
        for name, seconds in record.pop("reward_seconds").items():
            record[f"reward_seconds/{name}"] = seconds
            if seconds > max(1.0, SLOW_REWARD * record["step_seconds"]):
                self.run.log.info(f"reward {name} took {seconds:.1f} s of {record['step_seconds']:.1f} s of this step")

    def held_out_rewards(self, state: TrainState) -> dict[str, float]:
        """Mean rewards of greedy completions of the held-out problems."""
        assert self.inputs.held_out
        self.sampler.load(state.params)
        problems = self.inputs.held_out.problems
        rules = SamplingKeys(temperature=0.0, max_tokens=self.config.max_completion_tokens)
        requests = [Request(problem.token, rules, self.inputs.stop_ids) for problem in problems]
        texts = [completion.text for completion in self.sampler.generate(requests, lambda _: self.worked())]
        pairs = list(zip(problems, texts, strict=True))
        values, total, _ = score_completions(self.inputs.rewards, pairs, f"evaluation {self.step}")
        means = {f"eval_reward/{name}": float(np.mean(value)) for name, value in values.items()}
        return {"eval_reward": float(np.mean(total))} | means

    def shown(self, groups: Sequence[Group]) -> dict[str, str]:
        """Some problems of the last rollout, each with its answer, and one completion with what it was worth."""
        asked = dict(problems_of_step(self.inputs, self.config, self.step - 1))
        found = {}
        for sample in (group[0] for group in groups[:SHOWN_COMPLETIONS]):
            problem = asked[sample.place]
            worth = [f"{name} {value:g}" for name, value in sample.rewards.items()]
            expected = [f"expected {final_answer(problem.answer) or problem.answer}"] if problem.answer else []
            told = ", ".join((*expected, *worth, f"advantage {sample.advantage:.2f}"))
            found[f"{problem.prompt} ({problem.origin})"] = f"{sample.text} ({told})"
        return found

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """What summary.json holds of rewards, `records` being those of the steps."""
        return {
            "best_eval_reward": self.best_reward,
            "final_reward": records[-1].get("reward") if records else None,
            "skipped_steps": sum(record.get("skipped_updates", 0) for record in records),
        }


# Rollouts


def problems_of_step(inputs: ProblemInputs, config: GrpoConfig, step: int) -> list[tuple[int, Problem]]:
    """The problems of a step with their places in the run, in an order that is a function of the seed alone."""
    mixture = Mixture(inputs.problems.counts, tuple(source.weight for source in config.data), config.seed, True)
    epochs = Epochs(lambda epoch: len(mixture.epoch(epoch)))
    places = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    found = ((place, *epochs.locate(place)) for place in places)
    return [(place, inputs.problems.problems[mixture.epoch(epoch)[at]]) for place, epoch, at in found]


def rollout(
    sampler: Sampler, inputs: ProblemInputs, config: GrpoConfig, step: int, worked: Callable[[], None]
) -> tuple[list[list[Sample]], dict[str, Any]]:
    """The groups of a step, each completion with its rewards and advantage, and what is logged of them."""
    asked = problems_of_step(inputs, config, step)
    seeds = (int(np.random.default_rng([config.seed, ROLLOUT, place]).integers(2**32)) for place, _ in asked)
    size = config.completions_per_prompt
    requests = [
        Request(problem.token, config.rules, inputs.stop_ids, seed=seed, n=size)
        for (_, problem), seed in zip(asked, seeds, strict=True)
    ]
    completions = sampler.generate(requests, lambda _: worked())
    pairs = [(asked[completion.request][1], completion.text) for completion in completions]
    values, total, seconds = score_completions(inputs.rewards, pairs, f"step {step}")
    advantage = advantages(total.reshape(-1, size), config.scale_by_std).ravel()
    samples = [
        Sample(
            step=step + 1,
            place=asked[completion.request][0],
            index=completion.index,
            origin=asked[completion.request][1].origin,
            prompt_tokens=asked[completion.request][1].token,
            tokens=completion.tokens,
            text=completion.text,
            log_probabilities=completion.log_probabilities,
            sampled_log_probabilities=completion.sampled_log_probabilities,
            is_truncated=completion.finish_reason == "length",
            rewards={name: value[number] for name, value in values.items()},
            reward=float(total[number]),
            advantage=float(advantage[number]),
        )
        for number, completion in enumerate(completions)
    ]
    groups = grouped(samples)
    return groups, rollout_facts(groups) | {"reward_seconds": seconds}


def score_completions(
    rewards: Sequence[Reward], pairs: Sequence[tuple[Problem, str]], name: str
) -> tuple[dict[str, list[float]], Float[np.ndarray, " completion"], dict[str, float]]:
    """What each completion is worth: by reward, in all, and the seconds that took.

    Only the first process asks, under this name, as a user's function need not give the same everywhere.
    """
    found = json.dumps(rewards_of(rewards, pairs)) if is_first() else ""
    values, seconds = json.loads(from_first(f"rewards of {name}", found))
    return values, total_reward(rewards, values), seconds


def total_reward(rewards: Sequence[Reward], values: dict[str, list[float]]) -> Float[np.ndarray, " completion"]:
    """The weighted sum of the rewards."""
    return np.sum([reward.weight * np.array(values[reward.name]) for reward in rewards], axis=0)


def rollout_facts(groups: Sequence[Group]) -> dict[str, Any]:
    """What is logged of a rollout."""
    samples = [sample for group in groups for sample in group]
    names = samples[0].rewards
    return {
        "reward": float(np.mean([sample.reward for sample in samples])),
        "reward_std": float(np.mean([np.std([sample.reward for sample in group]) for group in groups])),
        **{f"reward/{name}": float(np.mean([sample.rewards[name] for sample in samples])) for name in names},
        "completion_length": float(np.mean([len(sample.tokens) for sample in samples])),
        "completion_tokens": sum(len(sample.tokens) for sample in samples),
        "truncated_fraction": float(np.mean([sample.is_truncated for sample in samples])),
        "zero_advantage_fraction": float(np.mean([not has_variance(group) for group in groups])),
    }


def write_rollouts(path: Path, groups: Sequence[Group]) -> None:
    """Append a step's samples, a line each."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for group in groups for sample in group)


def keep_rollouts(path: Path, last_step: int) -> None:
    """Drop the samples behind a step, and a line that was not written whole."""
    lines = rollout_lines(path) if path.is_file() and last_step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    metrics.write_atomically(path, "".join(kept))


def rollout_lines(path: Path) -> list[str]:
    """The lines of rollouts.jsonl, whose texts may hold what else ends lines in Unicode."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return list(file)


# Replay


def replay(config: GrpoConfig) -> None:
    """Compute one step of a run again from its rollouts.jsonl, under this page's objective, and print what is logged.

    The weights before it come from the newest checkpoint before it and the updates since, as the run itself made them.

    Raises:
        UserError: no such run or step.
    """
    directory = Path(config.replay)
    path = directory / "rollouts.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --replay takes the directory of a grpo run")
    steps: dict[int, list[Sample]] = {}
    for line in rollout_lines(path):
        raw = json.loads(line)
        if raw["step"] <= config.step:
            lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
            steps.setdefault(raw["step"], []).append(Sample(**raw | lists))
    if config.step not in steps:
        raise UserError(f"{path} has no step {config.step}; its last is {max(steps, default=0)}")
    original = parse(GrpoConfig, ["@", str(directory / "config.toml")], "grpo")
    inputs = read_problem_inputs(config)
    enable_compilation_cache(config)
    with jax.set_mesh(inputs.opened.mesh):
        state, reference = before_step(config, directory, inputs)
        recipes = [recipe_of(each, step_count(each, inputs) * each.updates_per_rollout) for each in (original, config)]
        whole = NamedSharding(inputs.opened.mesh, PartitionSpec())
        first = int(state.step) // original.updates_per_rollout + 1
        for step in range(first, config.step):
            groups = judged_again(grouped(steps[step]), original)
            state, _ = update(state, groups, reference, jax.device_put(recipes[0], whole), inputs, original)
        groups = judged_again(grouped(steps[config.step]), config)
        _, facts = update(state, groups, reference, jax.device_put(recipes[1], whole), inputs, config)
    print(json.dumps({"step": config.step} | rollout_facts(groups) | facts, indent=1))


def before_step(config: GrpoConfig, directory: Path, inputs: ProblemInputs) -> tuple[TrainState, PyTree[Array] | None]:
    """The newest saved state before the page's step, and the starting policy where the objective looks at it."""
    model, mesh = inputs.opened.model, inputs.opened.mesh
    source = inputs.opened.source
    start = starting_state(config, source, model, mesh)
    reference = compute_params(start.params, model, config.compute_dtype) if config.kl_weight else None
    saved = [step for step in checkpoint.saved_steps(directory) if step < config.step]
    if not saved:
        return start, reference
    place = checkpoint.checkpoint_directory(directory, max(saved))
    return resumed_state((place, checkpoint.read_manifest(place)), model, mesh), reference


def judged_again(groups: Sequence[Group], config: GrpoConfig) -> list[list[Sample]]:
    """The groups with the sums of rewards and the advantages that this page gives them."""
    rewards = load_rewards(config.reward)
    if missing := [reward.name for reward in rewards if reward.name not in groups[0][0].rewards]:
        raise UserError(f"reward {missing[0]} is not in rollouts.jsonl, which has {', '.join(groups[0][0].rewards)}")
    samples = [sample for group in groups for sample in group]
    values = {reward.name: [sample.rewards[reward.name] for sample in samples] for reward in rewards}
    total = total_reward(rewards, values)
    advantage = advantages(total.reshape(len(groups), -1), config.scale_by_std).ravel()
    return grouped(
        replace(sample, reward=float(worth), advantage=float(better))
        for sample, worth, better in zip(samples, total, advantage, strict=True)
    )
