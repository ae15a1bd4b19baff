"""Group-relative policy optimization: completions by the sampler, their rewards, and updates by the trainer's step.

One set of weights on one mesh does both. A rollout is a function of (seed, step, index) and the weights, so a run that
was killed continues as if nothing had happened, and every step can be computed again from rollouts.jsonl.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from lacuna import checkpoint, metrics, optimizer, weights
from lacuna.answers import expected_answers
from lacuna.checkpoint import OpenedModel, open_model
from lacuna.config import GrpoConfig, RewardKeys, SamplingKeys, UserError
from lacuna.data import Mixture, locate
from lacuna.distributed import from_first, held_directory, is_first, make_mesh
from lacuna.environments import Environment, Problem, Rollout, Rollouts, turn_figures
from lacuna.eval import Problems, Tasks, measure_in_training, read_problems
from lacuna.model import check_trainable
from lacuna.objective import (
    Group,
    Sample,
    advantages,
    cast_weights,
    difference_too_large,
    group_by_prompt,
    has_variance,
    shares_prompts,
    update,
)
from lacuna.optimizer import TrainState
from lacuna.sampler import Forest, Sampler, before_stop, slots_for
from lacuna.tokenizer import Message, decode
from lacuna.trainer import Evaluation, Run, Step

ROLLOUT = 4  # names the random numbers of rollouts, as data's SHUFFLE_… name those of its order
SHOWN_COMPLETIONS = 4
SLOW_REWARD = 0.25  # of a step
EMPTY_STEPS = 3  # in a row, until a line says that nothing is learned

# Rewards

Value = float | None  # None: it does not apply to this completion


class Answered(NamedTuple):
    """A completion of a problem: its text, its tokens, whether it was cut off, and how many tokens it might have; with
    an environment the text of its last turn, the whole chat, and the instance that it had, if there are such."""

    problem: Problem
    text: str
    tokens: tuple[int, ...] = ()
    is_truncated: bool = False
    max_completion_tokens: int = 0
    messages: Sequence[Message] = ()
    environment: Any = None


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


# Rollouts


class Inputs(NamedTuple):
    """What a run reads before it computes."""

    opened: OpenedModel
    problems: Problems
    held_out: Problems | None
    rewards: Sequence[Reward]
    environment: Environment | None = None


def read_inputs_of_grpo(config: GrpoConfig, rewards: Sequence[Reward], environment: Environment | None) -> Inputs:
    """Devices, model, problems, rewards and environment of a config, each checked against the others."""
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    opened = open_model(config, mesh, with_weights=not config.from_scratch)
    check_trainable(opened.model, config.sequence_length)
    limits = config.sequence_length - config.max_completion_tokens, any(reward.needs_answer for reward in rewards)
    how = config, opened.tokenizer, *limits, environment
    problems = read_problems(config.data, *how)
    held_out = read_problems(config.eval_data, *how) if config.eval_data else None
    if config.prompts_per_step > len(problems.problems):
        raise UserError(
            f"prompts_per_step = {config.prompts_per_step} is more than the {len(problems.problems)} problems there are"
        )
    return Inputs(opened, problems, held_out, rewards, environment)


def input_digests(config: GrpoConfig, inputs: Inputs) -> dict[str, str]:
    """Hashes of what a run reads again when it resumes, besides data: its rewards, the completions that
    it allows, and the policy it is held to."""
    files = {f"the file of reward {reward.name}": [reward.file] for reward in inputs.rewards if reward.file}
    if inputs.environment and inputs.environment.file:
        files[f"the file of environment {inputs.environment.name}"] = [inputs.environment.file]
    if config.constrain:
        files["what constrain names"] = [Path(config.constrain)]
    if config.kl_weight and not config.from_scratch:
        files[f"the weights of {config.model_name}"] = weights.weight_files(inputs.opened.source)
    return {name: weights.files_digest(paths) for name, paths in files.items()}


def order_of(config: GrpoConfig, problems: Problems) -> Mixture:
    """The order of the problems, a function of the seed alone."""
    return Mixture(problems.counts, tuple(source.weight for source in config.data), config.seed, True)


def rollout_facts(groups: Sequence[Group]) -> dict[str, Any]:
    """What is logged of a rollout."""
    samples = [sample for group in groups for sample in group]
    names, tokens = samples[0].rewards, sum(sample.sampled_count for sample in samples)
    uncut, sampled = (
        np.concatenate([np.array(getattr(sample, name))[sample.is_sampled] for sample in samples])
        for name in ("log_probabilities", "sampled_log_probabilities")
    )
    return {
        "reward": mean_value(sample.reward for sample in samples if sample.is_judged),
        "reward_std": float(np.mean([np.std([sample.reward for sample in group]) for group in groups])),
        **{f"reward/{name}": mean_value(sample.rewards[name] for sample in samples) for name in names},
        "completion_length": tokens / len(samples),
        "completion_tokens": tokens,
        "truncated_fraction": float(np.mean([sample.is_truncated for sample in samples])),
        "zero_advantage_fraction": float(np.mean([not has_variance(group) for group in groups])),
        "prompts": len(groups),
        "cut_probability": float(np.mean(-np.expm1(np.minimum(uncut - sampled, 0)))),
        **turn_figures(turns := [sample.turns for sample in samples if sample.turns]),
        **({"environment_token_fraction": 1 - tokens / sum(len(sample.tokens) for sample in samples)} if turns else {}),
    }


# The command grpo


def run_grpo(
    config: GrpoConfig,
    rewards: Sequence[Reward],
    environment: Environment | None,
    prepare: Callable[[OpenedModel], Tasks] | None,
    write_report: Callable[[Path], None],
    constrain: Callable[[GrpoConfig, OpenedModel], Forest] | None = None,
) -> TrainState:
    """The command grpo, from config to exported model; `prepare` makes the tasks to run now and then, `constrain` the
    completions that alone are allowed. The state it ended with.

    Raises:
        UserError: whatever about config, model, data, rewards or devices can't be trained with.
    """
    config = checkpoint.settled(config)
    with held_directory(config.run_directory):
        run = Run(config, write_report)
        inputs = read_inputs_of_grpo(config, rewards, environment)
        opened, digests = inputs.opened, inputs.problems.digests
        run.inputs = input_digests(config, inputs) if is_first() else {}
        tasks = prepare(opened) if prepare else None
        constraint = constrain(config, opened) if constrain else None
        count = step_count(config, inputs.problems)
        with run.begun(opened, digests, count, problem_lines(config, inputs, count)) as state:
            reference = None
            if config.kl_weight:
                first = optimizer.starting_state(config, opened, run.frozen) if run.resumed else state
                reference = cast_weights(first.params, opened.model, config.compute_dtype)
            with closing(metrics.LineFile(config.run_directory / "rollouts.jsonl", run.step)) as kept:
                params = run.whole(state.params)
                steps = RolloutSteps(config, inputs, run, reference, tasks, params, kept, constraint)
                evaluation = Evaluation([], "", steps.measure) if inputs.held_out or tasks else None
                if inputs.held_out and run.step == 0:
                    with run.off_the_clock():
                        run.log.step({"step": 0, **steps.held_out_rewards(run.whole(state.params))})
                state = run.train(
                    state, steps.take, evaluation, "its completions are those of step {} in rollouts.jsonl".format
                )
            logged = metrics.read_json_lines(config.run_directory / "metrics.jsonl")
            empty = sum(record.get("empty_updates") == config.updates_per_rollout for record in logged)
            final = logged[-1].get("reward") if logged else None
            run.finish({"best_eval_reward": run.saver.best, "final_reward": final, "empty_steps": empty})
        return state


def slot_count(config: GrpoConfig, mesh: Mesh) -> int:
    """Completions generated at once: no more than a rollout has, and so many that they divide over the devices."""
    return slots_for(min(config.slots, config.prompts_per_step * config.completions_per_prompt), mesh)


def step_count(config: GrpoConfig, problems: Problems) -> int:
    """Steps of the whole run, refills not counted."""
    return config.steps or math.ceil(order_of(config, problems).size(config.epochs) / config.prompts_per_step)


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
    if config.refill > 1:
        yield f"groups whose rewards are all alike are replaced, by asking up to {config.refill} times as many problems"
    held_out = f", {len(inputs.held_out.problems):,} held out" if inputs.held_out else ""
    yield f"problems: {len(inputs.problems.problems):,}{held_out}, {len(inputs.problems.bad):,} bad rows left out"
    for line in inputs.problems.bad[:5]:
        yield f"left out: {line}"
    yield f"rewards: {', '.join(f'{reward.name} × {reward.weight:g}' for reward in inputs.rewards)}"
    if environment := inputs.environment:
        tools = ", ".join(str(tool["function"]["name"]) for tool in environment.tools or ())
        yield f"environment {environment.name}, up to {config.max_turns} turns, tools: {tools or 'none'}"


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
        constraint: Forest | None = None,
    ) -> None:
        self.config, self.inputs, self.run, self.kept = config, inputs, run, kept
        self.reference, self.tasks = reference, tasks
        opened = inputs.opened
        recipe = optimizer.recipe_of(config, run.steps, config.updates_per_rollout)
        order = order_of(config, inputs.problems)
        self.epoch = lru_cache(maxsize=2)(order.epoch)
        self.epoch_size = lambda epoch: order.size(epoch + 1) - order.size(epoch)
        self.recipe = jax.device_put(recipe, optimizer.everywhere(opened.mesh))
        slots = slot_count(config, opened.mesh)
        self.sampler = Sampler(params, opened, slots, config.sequence_length, config.compute_dtype, constraint)
        how = config.stop, config.reward_retries, config.on_reward_error == "drop"
        self.rollouts = Rollouts(self.sampler, inputs.environment, config, self.report_progress, *how)
        self.stop_ids = self.rollouts.stop_ids
        added = opened.tokenizer.backend.get_added_tokens_decoder()
        self.empty_count = 0  # of steps in a row
        self.special_ids = {id for id, token in added.items() if token.special}

    def take(self, state: TrainState) -> Step:
        """One rollout, its rewards and its updates."""
        config, run, began = self.config, self.run, time.perf_counter()
        if run.first_step_seconds is None:
            run.watchdog.pause()  # the first step may take its time to compile
        self.sampler.load(run.whole(state.params))
        first = run.place.get("problem", run.step * config.prompts_per_step)
        try:
            groups, reward_seconds = self.filled(first)
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
            record["samples"] = shown_samples(groups, self.problem)
        for sample in (sample for group in groups for sample in group):
            self.kept.write(json.dumps(asdict(sample), ensure_ascii=False))
        if problem := difference_too_large(facts, config):
            run.log.step(record)
            raise UserError(f"step {run.step + 1}: {problem}")
        self.empty_count = self.empty_count + 1 if facts["empty_updates"] == config.updates_per_rollout else 0
        if self.empty_count and self.empty_count % EMPTY_STEPS == 0:
            run.log.info(f"WARNING: {self.empty_count} steps in a row taught nothing: {why_empty(record, config)}")
        run.place = {"problem": first + len(groups)}
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
        return f"; step {run.step} is saved: fix it and continue with --resume"

    def problem(self, place: int) -> Problem:
        """The problem at a place of the run."""
        epoch, at = locate(place, self.epoch_size)
        return self.inputs.problems.problems[self.epoch(epoch)[at]]

    def filled(self, first: int) -> tuple[list[list[Sample]], dict[str, float]]:
        """The groups of a step, whose problems begin at a place of the run, and the seconds of each reward.

        As long as fewer than `prompts_per_step` groups have variance, as many further problems are asked as are
        missing, up to `refill` times as many in all (dynamic sampling, Yu et al. 2025).
        """
        wanted, groups, seconds = self.config.prompts_per_step, list[list[Sample]](), Counter[str]()
        while missing := min(wanted - sum(map(has_variance, groups)), self.config.refill * wanted - len(groups)):
            places = range(first + len(groups), first + len(groups) + missing)
            found, taken = self.rollout([(place, self.problem(place)) for place in places])
            groups += found
            seconds.update(taken)
        return groups, dict(seconds)

    def rollout(self, asked: list[tuple[int, Problem]]) -> tuple[list[list[Sample]], dict[str, float]]:
        """The groups of problems, each with its place, each completion with its rewards and advantage, and the seconds
        of each reward."""
        config, rewards, size = self.config, self.inputs.rewards, self.config.completions_per_prompt
        seeds = [int(np.random.default_rng([config.seed, ROLLOUT, place]).integers(2**32)) for place, _ in asked]
        given = [problem for _, problem in asked], seeds, size, config.rules, f"problems from {asked[0][0]}"
        rollouts, answered, values, seconds = self.judged_rollouts(*given)
        total = total_reward(rewards, values)
        advantage = advantages(total.reshape(-1, size), config.scale_by_std).ravel()
        samples = [
            Sample(
                step=self.run.step + 1,
                place=asked[rollout.key[0]][0],
                index=rollout.key[1],
                origin=problem.origin,
                prompt_tokens=rollout.prompt,
                tokens=completion.tokens,
                text=text,
                log_probabilities=completion.tempered_log_probabilities,
                sampled_log_probabilities=completion.sampled_log_probabilities,
                is_truncated=completion.finish_reason == "length",
                rewards={name: value[number] for name, value in values.items()},
                reward=float(np.nan_to_num(total[number])),
                advantage=float(advantage[number]),
                turns=rollout.turns,
            )
            for number, (rollout, (problem, text, *_)) in enumerate(zip(rollouts, answered, strict=True))
            for completion in [rollout.completion]
        ]
        return group_by_prompt(samples), seconds

    def judged_rollouts(
        self, problems: Sequence[Problem], seeds: Sequence[int], count: int, rules: SamplingKeys, name: str
    ) -> tuple[list[Rollout], list[Answered], dict[str, list[Value]], dict[str, float]]:
        """That many rollouts of each problem, as rewards see them, and what each reward gives each, none where the
        environment was given up, and the seconds of each reward; says so where calls were given up."""
        config, run, environment = self.config, self.run, self.inputs.environment
        rollouts = self.rollouts.of(problems, seeds, count, rules)
        answered = [self.answered(rollout) for rollout in rollouts]
        judged = [each for each, rollout in zip(answered, rollouts, strict=True) if not rollout.failure]
        if not is_first():
            run.watchdog.pause()
        values, seconds, failures = rewards_of(
            self.inputs.rewards, judged, name, run.step + 1, config, self.report_progress
        )
        if given_up := [*(rollout.failure for rollout in rollouts if rollout.failure), *failures]:
            run.log.info(f"WARNING: {len(given_up)} calls were given up, as {given_up[0]}")
        found = {reward: iter(values[reward]) for reward in values}
        values = {name: [None if each.failure else next(found[name]) for each in rollouts] for name in found}
        for rollout in rollouts:
            if environment and rollout.instance is not None and not rollout.failure:
                environment.give_back(rollout.instance)
        return rollouts, answered, values, seconds

    def answered(self, rollout: Rollout) -> Answered:
        """A completion as rewards see it: all the text of its last turn but the token that ended it, special tokens
        too."""
        problem, completion, turns = rollout.problem, rollout.completion, rollout.turns
        shown, text = completion.tokens, completion.text
        if turns and turns.written:
            shown = shown[turns.written[-1][1] :]
        if shown and shown[-1] in self.stop_ids:
            shown = shown[:-1]
        if self.special_ids.intersection(shown):
            text = "".join(before_stop(decode(self.inputs.opened.tokenizer, shown), self.config.stop)[:2])
        longest, messages = self.config.max_completion_tokens, turns.messages if turns else problem.messages
        is_truncated = completion.finish_reason == "length"
        return Answered(problem, text, completion.tokens, is_truncated, longest, messages, rollout.instance)

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
        given = problems, range(len(problems)), 1, rules, f"evaluation {self.run.step}"
        rollouts, _, values, _ = self.judged_rollouts(*given)
        means = {f"eval_reward/{name}": mean_value(value) for name, value in values.items()}
        turns = turn_figures([rollout.turns for rollout in rollouts if rollout.turns])
        means |= {f"eval_{name}": value for name, value in turns.items()}
        return {"eval_reward": mean_value(total_reward(self.inputs.rewards, values))} | means


def why_empty(record: dict[str, Any], config: GrpoConfig) -> str:
    """What keeps a step from teaching anything, and what to change."""
    cut, alike = record["truncated_fraction"], record["zero_advantage_fraction"]
    are_cut = f"{cut:.0%} of completions are cut off at max_completion_tokens = {config.max_completion_tokens}"
    if config.mask_truncated and cut > 0.5:
        return f"{are_cut}, and mask_truncated leaves them out; raise max_completion_tokens"
    advice = (
        "raise max_completion_tokens"
        if cut > 0.5
        else "ask problems that are answered rightly at times, or more completions of each (completions_per_prompt, "
        "refill), or see in rollouts.jsonl whether the rewards tell good from bad"
    )
    return f"the completions of {alike:.0%} of problems are all worth the same, and {are_cut}; {advice}"


def mean_value(values: Iterable[Value]) -> float | None:
    """The mean of the rewards that apply, None if none does."""
    found = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(found)) if found else None


def shown_samples(groups: Sequence[Group], problem_at: Callable[[int], Problem]) -> dict[str, str]:
    """Some problems of a rollout, each with its answer, and one completion with what it was worth."""
    found = {}
    for sample in (group[0] for group in groups[:SHOWN_COMPLETIONS]):
        problem = problem_at(sample.place)
        worth = [f"{name} {'none' if value is None else f'{value:g}'}" for name, value in sample.rewards.items()]
        expected = [f"expected {' or '.join(expected_answers(problem.answer))}"] if problem.answer else []
        facts = ", ".join((*expected, *worth, f"advantage {sample.advantage:.2f}"))
        found[f"{problem.prompt} ({problem.origin})"] = f"{sample.text} ({facts})"
    return found
