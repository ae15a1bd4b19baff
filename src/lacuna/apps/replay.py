"""Replay: one step of a grpo run computed again from its rollouts.jsonl, under this config's objective."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from lacuna import checkpoint
from lacuna.apps.environments import load_judges
from lacuna.config import GrpoConfig, RunKeys, UserError
from lacuna.distributed import enable_compilation_cache
from lacuna.grpo import read_inputs_of_grpo, rollout_facts, step_count, total_reward
from lacuna.metrics import read_json_lines
from lacuna.objective import Group, Sample, advantages, cast_weights, group_by_prompt, update
from lacuna.optimizer import everywhere, recipe_of, saved_state, starting_state
from lacuna.trainer import FIXED_ON_RESUME, START_ONLY

SAMPLES = TypeAdapter(Sample)


def replay(config: GrpoConfig, last: GrpoConfig) -> None:
    """Compute a step again and print what is logged of it, with what `config` changes of the run's `last` config.

    The weights before it come from the newest checkpoint before it and the updates since, each as its step was made.
    What was logged and does not come out again is named.

    Raises:
        UserError: no such run or step.
    """
    directory = Path(config.replay)
    changes = {key: value for key, value in config if value != getattr(last, key)}
    config = checkpoint.settled(config)
    steps = samples_by_step(directory / "rollouts.jsonl", config.step)
    logged = {record["step"]: record for record in read_json_lines(directory / "metrics.jsonl")}
    inputs = read_inputs_of_grpo(config, *load_judges(config))
    opened, made = inputs.opened, {step: config_of_step(directory, step, last) for step in range(1, config.step + 1)}
    enable_compilation_cache(config)
    with jax.set_mesh(opened.mesh):
        frozen = checkpoint.frozen_params(opened)
        state = starting_state(config, opened, frozen)
        is_held = any(each.kl_weight for each in (config, *made.values()))
        reference = cast_weights(state.params, opened.model, config.compute_dtype) if is_held else None
        if saved := [step for step in checkpoint.saved_steps(directory) if step < config.step]:
            place = checkpoint.checkpoint_directory(directory, max(saved))
            state = saved_state(place, checkpoint.checked_manifest(place), opened)
        for step in range(int(state.step) // last.updates_per_rollout + 1, config.step + 1):
            current = made[step].model_copy(update=changes) if step == config.step else made[step]
            recipe = recipe_of(current, step_count(current, inputs.problems), current.updates_per_rollout)
            groups = scored_again(group_by_prompt(steps[step]), current)
            recipe = jax.device_put(recipe, everywhere(opened.mesh))
            state, facts = update(state, groups, reference, recipe, opened, current, frozen)
            facts = rollout_facts(groups) | facts
            if step < config.step or changes.keys() <= {"replay", "step"}:
                warn_of_other_values(step, facts, logged.get(step, {}))
    print(json.dumps({"step": config.step} | facts, indent=1))


def config_of_step(directory: Path, step: int, last: GrpoConfig) -> GrpoConfig:
    """The config that a step was made with: of the first checkpoint from there on, or else the run's last."""
    later = [saved for saved in checkpoint.saved_steps(directory) if saved >= step]
    if not later:
        return last
    saved = checkpoint.read_manifest(checkpoint.checkpoint_directory(directory, min(later))).run.config
    fixed = (*FIXED_ON_RESUME, *START_ONLY, *RunKeys.model_fields)
    return type(last).model_validate(dict(last) | {key: saved[key] for key in saved if key not in fixed})


def warn_of_other_values(step: int, facts: dict[str, Any], record: dict[str, Any]) -> None:
    """Name what differs from the log, to stderr."""
    names = [name for name in facts if name in record and facts[name] != record[name]]
    if names:
        other = ", ".join(f"{name} is {facts[name]} and was {record[name]}" for name in names)
        reasons = "other devices or versions, or the config of a checkpoint that is gone"
        print(f"WARNING: step {step} differs from metrics.jsonl ({reasons}): {other}", file=sys.stderr)


def samples_by_step(path: Path, last_step: int) -> dict[int, list[Sample]]:
    """The samples of a run's steps up to the last."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --replay takes the directory of a grpo run")
    steps: dict[int, list[Sample]] = {}
    for number, raw in enumerate(read_json_lines(path), 1):
        try:
            sample = SAMPLES.validate_python(raw)
        except ValidationError as error:
            wrong = error.errors()[0]
            key = ".".join(map(str, wrong["loc"]))
            raise UserError(f"{path} line {number}: {key}: {wrong['msg']}; restore the file from a copy") from error
        if sample.step <= last_step:
            steps.setdefault(sample.step, []).append(sample)
    if last_step not in steps:
        raise UserError(f"{path} has no step {last_step}; its last is {max(steps, default=0)}")
    return steps


def scored_again(groups: Sequence[Group], config: GrpoConfig) -> list[list[Sample]]:
    """The groups with the sums of rewards and the advantages that this config gives them."""
    rewards, _ = load_judges(config)
    if missing := [reward.name for reward in rewards if reward.name not in groups[0][0].rewards]:
        raise UserError(f"reward {missing[0]} is not in rollouts.jsonl, which has {', '.join(groups[0][0].rewards)}")
    samples = [sample for group in groups for sample in group]
    values = {reward.name: [sample.rewards[reward.name] for sample in samples] for reward in rewards}
    total = total_reward(rewards, values)
    advantage = advantages(total.reshape(len(groups), -1), config.scale_by_std).ravel()
    return group_by_prompt(
        replace(sample, reward=float(worth), advantage=float(better))
        for sample, worth, better in zip(samples, total, advantage, strict=True)
    )
