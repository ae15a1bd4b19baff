"""Rewards: what a completion is worth, by functions of ours or of the user's own, called side by side in bounded time.

Calls are made in threads that nothing has to wait for, so one that hangs is left behind at its limit.
"""

import asyncio
import copy
import importlib
import importlib.util
import inspect
import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from lacuna.answers import FORMAL_MARK, SEARCHED, inside_braces, is_right, marked_answer, meaning
from lacuna.config import RewardKeys, UserError
from lacuna.environments import LOOK_SECONDS, Calls
from lacuna.grpo import Answered, Reward, Value

OVERLONG_SHARE = 0.2  # of the most tokens, in which the penalty grows: 4,096 of 20,480 (DAPO, Yu et al. 2025)
# what a function gets that has such a parameter
BY_NAME = ("tokens", "truncated", "max_completion_tokens", "step", "messages", "environment")
STARRED, DOUBLE_STARRED = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
OF_ALL = ("prompts", "completions", "rows", *BY_NAME[:-1], "environments")  # and one that takes all at once
ALL = {"completions", "environments"}  # one of which it has


@dataclass(frozen=True)
class Judge:
    """A function and what it takes by name.

    A function takes the prompt as the model was asked, the completion, and a copy of the data row, in which "answer" is
    the reference answer. It returns a finite number, or None where it does not apply. One with a parameter
    `completions` or `environments` takes lists of all of them, by name, and returns a list.
    """

    name: str
    function: Callable[..., Any]
    asked: tuple[str, ...]

    @property
    def takes_all(self) -> bool:
        """Whether one call is for all completions."""
        return not ALL.isdisjoint(self.asked)

    def __call__(
        self,
        answered: Sequence[Answered],
        step: int,
        keys: RewardKeys,
        failures: list[str],
        report: Callable[[], None],
    ) -> list[Value]:
        """The value of each completion, once all calls have ended or are given up, or one is if that is to stop;
        `failures` gets a line for each that is given up."""
        values: list[Value] = [None] * len(answered)
        places = [[place] for place in range(len(answered))]
        if self.takes_all:
            places = [list(range(len(answered)))] if answered else []
        calls = Calls(keys.reward_workers, keys.reward_seconds, "reward_seconds")
        for number, at in enumerate(places):
            calls.put(number, partial(self.values, [answered[place] for place in at], step), keys.reward_retries)
        while calls.open:
            for number, found, problem in calls.take(LOOK_SECONDS):
                for place, value in zip(places[number], found or (), strict=False):
                    values[place] = value
                if problem:
                    problem_asked, text, *_ = answered[places[number][0]]
                    where = f"reward {self.name} on {problem_asked.origin}"
                    failures.append(f"{where}: {problem}; the completion begins {text[:80]!r}")
                    if keys.on_reward_error == "stop":
                        calls.clear()
                        return values
            report()
        return values

    def values(self, chosen: Sequence[Answered], step: int) -> list[Value]:
        """What the function gives these completions. Raises whatever it raises, or UserError if that is no value."""
        given: dict[str, list[Any]] = {
            "prompts": [each.problem.prompt for each in chosen],
            "completions": [each.text for each in chosen],
            "rows": [copy.deepcopy(each.problem.row) for each in chosen],
            "tokens": [each.tokens for each in chosen],
            "truncated": [each.is_truncated for each in chosen],
            "max_completion_tokens": [each.max_completion_tokens for each in chosen],
            "messages": [copy.deepcopy(each.messages or each.problem.messages) for each in chosen],
            "environment": [each.environment for each in chosen],
            "environments": [each.environment for each in chosen],
        }
        named: dict[str, Any] = {name: given[name] for name in self.asked if name != "step"}
        positional = [] if self.takes_all else [given[name][0] for name in OF_ALL[:3]]
        if not self.takes_all:
            named = {name: values[0] for name, values in named.items()}
        if "step" in self.asked:
            named["step"] = step
        found = awaited_value(self.function(*positional, **named))
        values = list(found) if self.takes_all else [found]
        if len(values) != len(chosen):
            raise UserError(f"it gave {len(values)} values for {len(chosen)} completions")
        numbers = [None if value is None else float(value) for value in values]
        if wrong := [number for number in numbers if number is not None and not math.isfinite(number)]:
            raise UserError(f"it gave {wrong[0]}")
        return numbers


def awaited_value(found: Any) -> Any:
    """What a function gave, waited for if it is async."""
    return (
        asyncio.run_coroutine_threadsafe(awaited(found), event_loop()).result() if inspect.isawaitable(found) else found
    )


async def awaited(value: Any) -> Any:
    return await value


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all async rewards, so that a client of theirs may be used again, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


# Ours


def correct(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where the final answer is that of the row's reference answer, else 0."""
    if "answer" not in row:
        raise ValueError("the row has no reference answer; set completion_column to its column")
    return float(is_right(completion, row["answer"]))


def answer_format(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where there is one of `####`, `<answer>` and `\\boxed{}`, closed, with one answer in it, else 0."""
    return float(has_one_answer(completion))


def overlong(
    prompt: str,
    completion: str,
    row: dict[str, Any],
    tokens: Sequence[int],
    truncated: bool,
    max_completion_tokens: int,
) -> float:
    """0 for up to four fifths of the most tokens, from there on falling to -1, which a completion that is cut off has
    (soft overlong punishment of DAPO, Yu et al. 2025)."""
    room = OVERLONG_SHARE * max_completion_tokens
    return -1.0 if truncated else min(0.0, (max_completion_tokens - room - len(tokens)) / room)


def rule(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where a completion is the row's completion but for newlines, quotes and spaces around it, else 0 (MiniOneRec,
    Kong et al. 2025)."""
    if "answer" not in row:
        raise ValueError("the row has no reference answer; set completion_column to its column")
    return float(completion.strip('\n" ') == str(row["answer"]).strip('\n" '))


def rank(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """In a group with a right completion, what confident errors cost: -1 over log2(place + 2), over the sum of these
    for all places, for each wrong one, 0 for a right one; 0 in other groups (as `ranking_only` of MiniOneRec)."""
    found = list[float]()
    asked = zip(prompts, completions, rows, strict=True)
    for _, group in groupby(asked, key=lambda each: (each[0], each[2])):
        is_right = [rule(*each) > 0 for each in group]
        discounts = [1 / math.log2(place + 2) for place in range(len(is_right))]
        costs = [-discount / sum(discounts) for discount in discounts]
        found += [0.0 if right or not any(is_right) else cost for right, cost in zip(is_right, costs, strict=True)]
    return found


BUILT_IN: dict[str, Callable[..., Any]] = {
    "correct": correct,
    "gsm8k_correct": correct,
    "format": answer_format,
    "overlong": overlong,
    "rule": rule,
    "rank": rank,
}


def has_one_answer(text: str) -> bool:
    """Whether a text has just one of the marks `####`, `\\boxed{}` and `<answer>`, closed, with one answer in it that
    is read as mathematics."""
    marks = list(FORMAL_MARK.finditer(text[-SEARCHED:]))
    if len(text) > SEARCHED or len(marks) != 1 or not (answer := marked_answer(text, FORMAL_MARK)):
        return False
    rest = text[marks[0].end() :]
    is_closed = marks[0][0].startswith("#") or "</answer>" in rest.lower()
    is_closed |= marks[0][0].endswith("{") and inside_braces(rest)[1]
    value = meaning(answer)
    return is_closed and value is not None and value[0] != "list"


# Those of a config


def load_rewards(specs: Sequence[str]) -> list[Reward]:
    """The rewards of a config, each `NAME:WEIGHT`; NAME is one of ours, or `FILE.py:FUNCTION`, or `module:FUNCTION`.

    Raises:
        UserError: a spec that can't be read, or a function that can't be found or asks for what there is not.
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
        function, file = (BUILT_IN[name], None) if name in BUILT_IN else reward_function(name, spec)
        short = name.rpartition(":")[2]
        judge = Judge(short, function, asked_by_name(function, spec))
        rewards.append(Reward(short, number, judge, function in (correct, rule, rank), file))
    names = [reward.name for reward in rewards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"reward: {twice.pop()} is named twice; keep one, with its weight")
    return rewards


def asked_by_name(function: Callable[..., Any], spec: str) -> tuple[str, ...]:
    """What a function takes by name. Raises UserError if it asks for what there is not."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions written in C
        return ()
    kinds = {name: each.kind for name, each in parameters.items()}
    known, first = (BY_NAME, 3) if ALL.isdisjoint(kinds) else (OF_ALL, 0)
    asked = [name for name in list(kinds)[first:] if kinds[name] not in (STARRED, DOUBLE_STARRED)]
    if unknown := [name for name in asked if name not in known and parameters[name].default is inspect.Parameter.empty]:
        raise UserError(
            f"reward {spec!r} asks for {unknown[0]}; a reward gets prompt, completion and row, or prompts, completions "
            f"and rows, and by name {', '.join(BY_NAME)}"
        )
    return tuple(name for name in known if name in asked or DOUBLE_STARRED in kinds.values())


def reward_function(name: str, spec: str) -> tuple[Callable[..., Any], Path | None]:
    """A function of the user's own, and its file."""
    if ":" not in name:
        raise UserError(f"reward {spec!r}: no such reward; ours are {', '.join(BUILT_IN)}, yours FILE.py:FUNCTION")
    return users_object(name, f"reward {spec!r}")


def users_object(name: str, what: str) -> tuple[Callable[..., Any], Path | None]:
    """A function or class of a Python file or an importable module, and its file. What lies beside the file, or in the
    working directory, can be imported."""
    place, _, object_name = name.rpartition(":")
    if not place:
        raise UserError(f"{what} should be FILE.py:NAME or module:NAME")
    file = Path(place)
    folder = str(file.parent.resolve() if place.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        if place.endswith(".py"):
            if not file.is_file():
                raise UserError(f"{what}: {place}: no such file; paths start from {Path.cwd()}")
            known = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
            is_free = known is not None and known.origin is not None and Path(known.origin) == file.resolve()
            located = importlib.util.spec_from_file_location(file.stem if is_free else f"reward {place}", place)
            assert located and located.loader
            module = importlib.util.module_from_spec(located)
            sys.modules[located.name] = module  # where dataclasses of the user look for themselves
            located.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {place} fails on import: {type(error).__name__}: {error}") from error
    found = getattr(module, object_name, None)
    if not callable(found):
        raise UserError(f"{what}: {place} has no function {object_name}")
    return found, Path(module.__file__) if module.__file__ else None
