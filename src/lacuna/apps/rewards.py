"""Rewards: what a completion is worth, by functions of ours or by the user's own."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lacuna.answers import has_one_answer, is_right
from lacuna.config import UserError
from lacuna.grpo import Reward, RewardFunction


def correct(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where the final answer is that of the row's reference answer, else 0."""
    if "answer" not in row:
        raise ValueError("the row has no reference answer; set completion_column to its column")
    return float(is_right(completion, row["answer"]))


def answer_format(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where there is one of `####`, `<answer>` and `\\boxed{}`, closed, with one answer in it, else 0."""
    return float(has_one_answer(completion))


BUILT_IN: dict[str, RewardFunction] = {"correct": correct, "gsm8k_correct": correct, "format": answer_format}


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
        function, file = (BUILT_IN[name], None) if name in BUILT_IN else users_function(name, spec)
        rewards.append(Reward(name.rpartition(":")[2], number, function, function is correct, file))
    names = [reward.name for reward in rewards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"reward: {twice.pop()} is named twice; keep one, with its weight")
    return rewards


def users_function(name: str, spec: str) -> tuple[RewardFunction, Path | None]:
    """A function of a Python file or an importable module, and its file."""
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
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {spec!r}: {place} fails on import: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {place} has no function {function_name}")
    return function, Path(module.__file__) if module.__file__ else None
