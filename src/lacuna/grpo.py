"""Group-relative policy optimization: completions by the sampler, their rewards, and an update by the trainer's step.

One set of weights on one mesh does both. A rollout is a function of (seed, step, index) and the weights, so a run that
was killed goes on as if nothing had happened, and every step can be computed again from rollouts.jsonl.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from lacuna import checkpoint, metrics, runs, weights
from lacuna.answers import final_answer
from lacuna.config import GrpoConfig, SamplingKeys, UserError
from lacuna.data import Epochs, Mixture
from lacuna.distributed import (
    check_same,
    enable_compilation_cache,
    from_first,
    is_first,
    make_mesh,
    put_batch,
    row_shards,
)
from lacuna.model import ModelConfig, check_sequence_length
from lacuna.objective import (
    Group,
    RolloutBatch,
    Sample,
    add_gradient,
    advantages,
    compute_params,
    grouped,
    has_variance,
    kept_samples,
    log_probabilities,
    packed_rows,
    shares_prompts,
    zeros,
)
from lacuna.options import parse
from lacuna.predictions import Subject
from lacuna.problems import Problem, Problems, read_problems
from lacuna.rewards import Reward, correct, load_rewards, rewards_of
from lacuna.runs import Run, Start
from lacuna.sampler import Request, Sampler, generation_defaults
from lacuna.tasks import measure_in_training, read_questions
from lacuna.tokenizer import Tokenizer
from lacuna.trainer import Recipe, TrainState, apply_gradient, recipe_of, resumed_state, starting_state
from lacuna.weights import OpenedModel

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
    inputs: "Inputs",
    page: GrpoConfig,
) -> tuple[TrainState, dict[str, Any]]:
    """The optimizer steps of one rollout, its groups shared out evenly over them, and what is logged of them: means
    over counted tokens, the loss of the first, the gradient norm of the last."""
    mesh, model = inputs.mesh, inputs.model
    rows_at_once = page.micro_batch_size * row_shards(mesh)
    parts = []
    for share in np.array_split(np.arange(len(groups)), page.updates_per_rollout):
        kept = kept_samples([groups[number] for number in share], page)
        parts.append(packed_rows(kept, page, rows_at_once, shares_prompts(model)) if kept else None)
    batches = [put_micro_batches(part, mesh) if part else [] for part in parts]

    def filled(params: PyTree[Array], name: str) -> None:
        for micro_batches in batches:
            micro_batches[:] = [
                each._replace(**{name: log_probabilities(params, each, model, page)}) for each in micro_batches
            ]

    if page.updates_per_rollout > 1:
        filled(compute_params(state.params, model, page.compute_dtype), "old")
    if reference is not None:
        filled(reference, "reference")
    found = []
    for micro_batches in batches:
        if not micro_batches:  # nothing to learn from: only the step is counted
            state = state._replace(step=state.step + 1)
            continue
        compute, total = compute_params(state.params, model, page.compute_dtype), zeros(state.params)
        for micro_batch in micro_batches:
            total = add_gradient(total, compute, micro_batch, model, page)
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


class Inputs(NamedTuple):
    """What a run reads before it computes."""

    mesh: Mesh
    model: ModelConfig
    tokenizer: Tokenizer
    source: Path
    problems: Problems
    held_out: Problems | None
    rewards: list[Reward]
    stop_ids: tuple[int, ...]


def read_inputs(page: GrpoConfig) -> Inputs:
    """Devices, model, problems and rewards of a page, each checked against the others."""
    mesh = make_mesh(page.data_parallel, page.fsdp, page.tensor)
    rewards = load_rewards(page.reward)
    template = page.chat_template, page.template_date
    source, model, tokenizer = weights.open_model(page, mesh, *template, with_weights=False)
    check_sequence_length(model, page.sequence_length)
    longest, skips_bad = page.sequence_length - page.max_completion_tokens, page.on_bad_data == "skip"
    wants_answers = any(reward.function is correct for reward in rewards)
    problems = read_problems(page.data, page, tokenizer, longest, skips_bad, wants_answers)
    held_out = (
        read_problems(page.eval_data, page, tokenizer, longest, skips_bad, wants_answers) if page.eval_data else None
    )
    if page.prompts_per_step > len(problems.problems):
        raise UserError(
            f"prompts_per_step = {page.prompts_per_step} is more than the {len(problems.problems)} problems there are"
        )
    if page.evaluation:
        read_questions(page.evaluation, OpenedModel(source, model, tokenizer))  # what can't be asked is refused now
    stop_ids = generation_defaults(source, tokenizer)[1]
    return Inputs(mesh, model, tokenizer, source, problems, held_out, rewards, stop_ids)


def run(page: GrpoConfig) -> None:
    """The command grpo, from page to exported model, or the replay of one step.

    Raises:
        UserError: whatever about config, model, data, rewards or devices can't be trained with.
    """
    if page.replay:
        replay(page)
        return
    with runs.started(page) as start:
        inputs = read_inputs(page)
        runs.check_unchanged(page, inputs.model, inputs.problems.digests, start)
        check_same("config, model or data", json.dumps([runs.masked_config(page), inputs.problems.digests]))
        enable_compilation_cache(page)
        with jax.set_mesh(inputs.mesh):
            train(page, inputs, start)


def train(page: GrpoConfig, inputs: Inputs, start: Start) -> None:
    """A run that has started and whose problems are read."""
    model, mesh = inputs.model, inputs.mesh
    source = weights.resolve_model(page.model_name, with_weights=not page.from_scratch)
    fresh = partial(starting_state, page, source, model, mesh)
    reference = compute_params(fresh().params, model, page.compute_dtype) if page.kl_weight else None
    state = resumed_state(start.resumed, model, mesh) if start.resumed else fresh()
    steps, shards = step_count(page, inputs), row_shards(mesh)
    lines = start_facts(page, inputs, steps)
    with runs.under_way(page, start, model, mesh, inputs.source, inputs.problems.digests, steps, lines) as run:
        if is_first():
            keep_rollouts(page.run_directory / "rollouts.jsonl", start.step)
        recipe = recipe_of(page, steps * page.updates_per_rollout)
        recipe = jax.device_put(recipe, NamedSharding(mesh, PartitionSpec()))
        slots = -(-min(page.slots, page.prompts_per_step * page.completions_per_prompt) // shards) * shards
        sampler = Sampler(state.params, model, inputs.tokenizer, mesh, slots, page.sequence_length, page.compute_dtype)
        loop = Loop(page, inputs, run, recipe, sampler, reference, start.step)
        if start.resumed and start.resumed[1].run.best_eval_loss is not None:
            loop.best_reward = -start.resumed[1].run.best_eval_loss
        loop.train(state)
        run.end(loop.step, loop.summary)


def step_count(page: GrpoConfig, inputs: Inputs) -> int:
    """Rollouts of the whole run."""
    return page.steps or -(-page.epochs * len(inputs.problems.problems) // page.prompts_per_step)


def start_facts(page: GrpoConfig, inputs: Inputs, steps: int) -> Iterator[str]:
    """Start-up lines on the step, the problems and the rewards."""
    once = "once for all of its completions in a row" if shares_prompts(inputs.model) else "anew for each completion"
    yield f"in the update a prompt is computed {once}"
    completions = page.prompts_per_step * page.completions_per_prompt
    yield (
        f"a step: {page.prompts_per_step} problems × {page.completions_per_prompt} completions = {completions}, up to "
        f"{page.max_completion_tokens} tokens each, {page.updates_per_rollout} updates; {steps:,} steps"
    )
    held_out = f", {len(inputs.held_out.problems):,} held out" if inputs.held_out else ""
    yield f"problems: {len(inputs.problems.problems):,}{held_out}, {len(inputs.problems.bad):,} bad rows left out"
    for line in inputs.problems.bad[:5]:
        yield f"left out: {line}"
    yield f"rewards: {', '.join(f'{reward.name} × {reward.weight:g}' for reward in inputs.rewards)}"


@dataclass
class Loop:
    """The loop of rollouts and updates; `step` counts the rollouts done."""

    page: GrpoConfig
    inputs: Inputs
    run: Run
    recipe: Recipe
    sampler: Sampler
    reference: PyTree[Array] | None
    step: int
    best_reward: float | None = None
    work_done: int | None = None

    def train(self, state: TrainState) -> TrainState:
        """Every step that is left: roll out, update, evaluate, log and save."""
        page = self.page
        with self.run.watched(lambda: self.work_done) as stop:
            if self.step == 0 and self.inputs.held_out:
                self.run.log.step({"step": 0, **self.held_out_rewards(state)})
            while self.step < self.run.steps:
                began = time.perf_counter()
                self.sampler.load(state.params)
                groups, record = rollout(self.sampler, self.inputs, page, self.step, self.worked)
                middle = time.perf_counter()
                state, facts = update(state, groups, self.reference, self.recipe, self.inputs, page)
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
                is_eval = is_last or (page.eval_every and self.step % page.eval_every == 0)
                if is_eval or self.step == 1:
                    record["samples"] = self.shown(groups)
                if is_eval and page.evaluation:
                    self.work_done = None  # what compiles anew may take its time
                    model = OpenedModel(self.inputs.source, self.inputs.model, self.inputs.tokenizer)
                    record |= measure_in_training(page.evaluation, Subject(model, state.params, self.inputs.mesh))
                    self.work_done = self.step
                is_best = False
                if is_eval and self.inputs.held_out:
                    record |= self.held_out_rewards(state)
                    is_best = self.best_reward is None or record["eval_reward"] > self.best_reward
                    self.best_reward = record["eval_reward"] if is_best else self.best_reward
                if is_first():
                    write_rollouts(page.run_directory / "rollouts.jsonl", groups)
                self.run.log.step({"step": self.step, **record})
                is_stop = stop.is_due(self.step)
                if is_last or is_best or is_stop or (page.save_every and self.step % page.save_every == 0):
                    worst = None if self.best_reward is None else -self.best_reward
                    self.run.save(state, self.step, worst, is_best)
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
        rules = SamplingKeys(temperature=0.0, max_tokens=self.page.max_completion_tokens)
        requests = [Request(problem.token, rules, self.inputs.stop_ids) for problem in problems]
        texts = [completion.text for completion in self.sampler.generate(requests, lambda _: self.worked())]
        pairs = list(zip(problems, texts, strict=True))
        values, total, _ = judged(self.inputs.rewards, pairs, f"evaluation {self.step}")
        means = {f"eval_reward/{name}": float(np.mean(value)) for name, value in values.items()}
        return {"eval_reward": float(np.mean(total))} | means

    def shown(self, groups: Sequence[Group]) -> dict[str, str]:
        """Some problems of the last rollout, each with its answer, and one completion with what it was worth."""
        asked = dict(problems_of_step(self.inputs, self.page, self.step - 1))
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


def problems_of_step(inputs: Inputs, page: GrpoConfig, step: int) -> list[tuple[int, Problem]]:
    """The problems of a step with their places in the run, in an order that is a function of the seed alone."""
    mixture = Mixture(inputs.problems.counts, tuple(source.weight for source in page.data), page.seed, True)
    epochs = Epochs(lambda epoch: len(mixture.epoch(epoch)))
    places = range(step * page.prompts_per_step, (step + 1) * page.prompts_per_step)
    found = ((place, *epochs.locate(place)) for place in places)
    return [(place, inputs.problems.problems[mixture.epoch(epoch)[at]]) for place, epoch, at in found]


def rollout(
    sampler: Sampler, inputs: Inputs, page: GrpoConfig, step: int, worked: Callable[[], None]
) -> tuple[list[list[Sample]], dict[str, Any]]:
    """The groups of a step, each completion with its rewards and advantage, and what is logged of them."""
    asked = problems_of_step(inputs, page, step)
    seeds = (int(np.random.default_rng([page.seed, ROLLOUT, place]).integers(2**32)) for place, _ in asked)
    size = page.completions_per_prompt
    requests = [
        Request(problem.token, page.rules, inputs.stop_ids, seed=seed, n=size)
        for (_, problem), seed in zip(asked, seeds, strict=True)
    ]
    completions = sampler.generate(requests, lambda _: worked())
    pairs = [(asked[completion.request][1], completion.text) for completion in completions]
    values, total, seconds = judged(inputs.rewards, pairs, f"step {step}")
    advantage = advantages(total.reshape(-1, size), page.scale_by_std).ravel()
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


def judged(
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


def replay(page: GrpoConfig) -> None:
    """Compute one step of a run again from its rollouts.jsonl, under this page's objective, and print what is logged.

    The weights before it come from the newest checkpoint before it and the updates since, as the run itself made them.

    Raises:
        UserError: no such run or step.
    """
    directory = Path(page.replay)
    path = directory / "rollouts.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --replay takes the directory of a grpo run")
    steps: dict[int, list[Sample]] = {}
    for line in rollout_lines(path):
        raw = json.loads(line)
        if raw["step"] <= page.step:
            lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
            steps.setdefault(raw["step"], []).append(Sample(**raw | lists))
    if page.step not in steps:
        raise UserError(f"{path} has no step {page.step}; its last is {max(steps, default=0)}")
    original = parse(GrpoConfig, ["@", str(directory / "config.toml")], "grpo")
    inputs = read_inputs(page)
    enable_compilation_cache(page)
    with jax.set_mesh(inputs.mesh):
        state, reference = before_step(page, directory, inputs)
        recipes = [recipe_of(each, step_count(each, inputs) * each.updates_per_rollout) for each in (original, page)]
        whole = NamedSharding(inputs.mesh, PartitionSpec())
        first = int(state.step) // original.updates_per_rollout + 1
        for step in range(first, page.step):
            groups = judged_again(grouped(steps[step]), original)
            state, _ = update(state, groups, reference, jax.device_put(recipes[0], whole), inputs, original)
        groups = judged_again(grouped(steps[page.step]), page)
        _, facts = update(state, groups, reference, jax.device_put(recipes[1], whole), inputs, page)
    print(json.dumps({"step": page.step} | rollout_facts(groups) | facts, indent=1))


def before_step(page: GrpoConfig, directory: Path, inputs: Inputs) -> tuple[TrainState, PyTree[Array] | None]:
    """The newest saved state before the page's step, and the starting policy where the objective looks at it."""
    model, mesh = inputs.model, inputs.mesh
    source = weights.resolve_model(page.model_name, with_weights=not page.from_scratch)
    start = starting_state(page, source, model, mesh)
    reference = compute_params(start.params, model, page.compute_dtype) if page.kl_weight else None
    saved = [step for step in checkpoint.saved_steps(directory) if step < page.step]
    if not saved:
        return start, reference
    place = checkpoint.checkpoint_directory(directory, max(saved))
    return resumed_state((place, checkpoint.read_manifest(place)), model, mesh), reference


def judged_again(groups: Sequence[Group], page: GrpoConfig) -> list[list[Sample]]:
    """The groups with the sums of rewards and the advantages that this page gives them."""
    rewards = load_rewards(page.reward)
    if missing := [reward.name for reward in rewards if reward.name not in groups[0][0].rewards]:
        raise UserError(f"reward {missing[0]} is not in rollouts.jsonl, which has {', '.join(groups[0][0].rewards)}")
    samples = [sample for group in groups for sample in group]
    values = {reward.name: [sample.rewards[reward.name] for sample in samples] for reward in rewards}
    total = total_reward(rewards, values)
    advantage = advantages(total.reshape(len(groups), -1), page.scale_by_std).ravel()
    return grouped(
        replace(sample, reward=float(worth), advantage=float(better))
        for sample, worth, better in zip(samples, total, advantage, strict=True)
    )
