"""Replay: one step of a grpo run computed again from its rollouts.jsonl, under this config's objective."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from pydantic import TypeAdapter, ValidationError

from lacuna import checkpoint
from lacuna.apps.rewards import load_rewards
from lacuna.config import GrpoConfig, UserError
from lacuna.distributed import enable_compilation_cache
from lacuna.grpo import read_inputs_of_grpo, rollout_facts, step_count, total_reward
from lacuna.metrics import read_json_lines
from lacuna.objective import Group, Sample, advantages, cast_weights, group_by_prompt, update
from lacuna.optimizer import everywhere, recipe_of, saved_state, starting_state

SAMPLES = TypeAdapter(Sample)


def replay(config: GrpoConfig, original: GrpoConfig) -> None:
    """Compute a step again and print what is logged of it; `original` is the config of the run itself.

    The weights before it come from the newest checkpoint before it and the updates since, as the run itself made them.

    Raises:
        UserError: no such run or step.
    """
    config, directory = checkpoint.settled(config), Path(config.replay)
    steps = samples_by_step(directory / "rollouts.jsonl", config.step)
    inputs = read_inputs_of_grpo(config, load_rewards(config.reward))
    opened = inputs.opened
    enable_compilation_cache(config)
    with jax.set_mesh(opened.mesh):
        state, frozen = starting_state(config, opened), checkpoint.frozen_params(opened)
        reference = cast_weights(state.params, opened.model, config.compute_dtype) if config.kl_weight else None
        if saved := [step for step in checkpoint.saved_steps(directory) if step < config.step]:
            place = checkpoint.checkpoint_directory(directory, max(saved))
            state = saved_state(place, checkpoint.checked_manifest(place), opened)
        for step in range(int(state.step) // original.updates_per_rollout + 1, config.step + 1):
            current = config if step == config.step else original
            recipe = recipe_of(current, step_count(current, inputs.problems), current.updates_per_rollout)
            groups = scored_again(group_by_prompt(steps[step]), current)
            recipe = jax.device_put(recipe, everywhere(opened.mesh))
            state, facts = update(state, groups, reference, recipe, opened, current, frozen)
    print(json.dumps({"step": config.step} | rollout_facts(groups) | facts, indent=1))


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
    rewards = load_rewards(config.reward)
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
