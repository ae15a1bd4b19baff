"""Environments of the user's own: a class whose public methods are tools, or a function that answers.

A class is as TRL takes one: `reset` gets the columns of a row by name, and the text it returns is added to the prompt;
every other public method is a tool, described by its signature and its docstring in Google's style; a tool that raises
tells the model so; `get_reward` is a reward.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter

from lacuna.apps.rewards import Judge, awaited_value, load_rewards, users_object
from lacuna.apps.tools import parse_calls
from lacuna.config import GrpoConfig, UserError
from lacuna.environments import Reply
from lacuna.grpo import Reward
from lacuna.tokenizer import Message, Tools, check_messages

OWN_METHODS = ("reset", "get_reward")
ARGUMENT = re.compile(r"^( *)(\w+)(?: *\([^()\n]*\))?: *(.*(?:\n(?:\1 +.*| *$))*)", re.MULTILINE)


class ToolEnvironment:
    """A class of the user's: its methods are tools, an instance of it each rollout's, used again afterwards."""

    def __init__(self, name: str, cls: type, file: Path | None) -> None:
        """Raises UserError where it has no `reset`, or no tool, or a tool that is not described."""
        self.name, self.cls, self.file = cls.__name__, cls, file
        methods = dict(inspect.getmembers(cls, inspect.isfunction))
        if "reset" not in methods:
            raise UserError(f"environment {name!r}: {self.name} has no method reset, which begins a rollout")
        self.methods = [key for key in methods if not key.startswith("_") and key not in OWN_METHODS]
        if not self.methods:
            raise UserError(f"environment {name!r}: {self.name} has no public method, so no tool; write one")
        self.tools: Tools = [tool_schema(name, methods[key]) for key in self.methods]
        self.asked = inspect.signature(methods["reset"]).parameters
        self.has_reward, self.free = "get_reward" in methods, list[Any]()

    def begin(self, row: dict[str, Any], seed: int) -> tuple[Any, str]:
        instance = self.free.pop() if self.free else self.cls()
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self.asked.values())
        given = {"seed": seed} | row
        said = awaited_value(instance.reset(**{name: given[name] for name in given if name in self.asked or
                                               takes_all and name in row}))  # fmt: skip
        if not isinstance(said, str | None):
            raise UserError(
                f"reset gave {type(said).__name__}; it may give a text that is added to the prompt, or None"
            )
        return instance, said or ""

    def reply(self, instance: Any, chat: list[Message], row: dict[str, Any], text: str) -> Reply:
        said, calls = parse_calls(text, self.methods)
        results = [self.result(instance, call["name"], call["arguments"]) for call in calls]
        turn: Message = {"role": "assistant", "content": said}
        if calls:
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        messages = [
            {"role": "tool", "name": call["name"], "content": str(result)}
            for call, (result, _) in zip(calls, results, strict=True)
        ]
        return Reply(turn, messages, len(calls), sum(is_failure for _, is_failure in results))

    def result(self, instance: Any, name: str, arguments: dict[str, Any]) -> tuple[Any, bool]:
        """What a tool returns, or why it failed, and whether it did."""
        try:
            if name not in self.methods:
                raise ValueError(f"Tool {name} not found.")
            return awaited_value(getattr(instance, name)(**arguments)), False
        except Exception as error:
            return {"error": str(error)}, True

    def give_back(self, instance: Any) -> None:
        self.free.append(instance)

    @property
    def rewards(self) -> list[Reward]:
        """The reward that it gives itself, if it does."""
        judge = Judge(self.name, lambda *_, environment: environment.get_reward(), ("environment",))
        return [Reward(self.name, 1.0, judge, False)] if self.has_reward else []


class StepEnvironment:
    """A function `step(messages, row)` of the user's, which gives the messages that follow, none at the end."""

    tools: Tools = None
    rewards: list[Reward] = []

    def __init__(self, name: str, function: Callable[..., Any], file: Path | None) -> None:
        self.name, self.function, self.file = name.rpartition(":")[2], function, file

    def begin(self, row: dict[str, Any], seed: int) -> tuple[Any, str]:
        return None, ""

    def reply(self, instance: Any, chat: list[Message], row: dict[str, Any], text: str) -> Reply:
        turn: Message = {"role": "assistant", "content": text}
        messages = list(awaited_value(self.function([*chat, turn], row)) or [])
        if messages:
            check_messages(messages, None)
        if any(message["role"] == "assistant" for message in messages):
            raise UserError("it gave a message of the assistant, which the model writes; give those of others")
        return Reply(turn, messages)

    def give_back(self, instance: Any) -> None:
        pass


def load_environment(name: str) -> ToolEnvironment | StepEnvironment | None:
    """The environment of a config, `FILE.py:NAME` or `module:NAME`; None if it names none.

    Raises:
        UserError: it can't be found, or is none.
    """
    if not name:
        return None
    found, file = users_object(name, f"environment {name!r}")
    return ToolEnvironment(name, found, file) if inspect.isclass(found) else StepEnvironment(name, found, file)


def load_judges(config: GrpoConfig) -> tuple[list[Reward], ToolEnvironment | StepEnvironment | None]:
    """The rewards of a config, that of its environment last, and the environment.

    Raises:
        UserError: one of them can't be had, or there is no reward.
    """
    environment = load_environment(config.environment)
    rewards = [*load_rewards(config.reward), *(environment.rewards if environment else [])]
    if not rewards:
        raise UserError(f"reward is empty, and environment {config.environment!r} has no get_reward; name a reward")
    return rewards, environment


def tool_schema(name: str, method: FunctionType) -> dict[str, Any]:
    """A method as chat templates take a tool, as transformers describes it.

    Raises:
        UserError: it lacks a docstring, or an argument its type or its description.
    """
    where = f"environment {name!r}: the tool {method.__name__}"
    text = inspect.getdoc(method) or ""
    description, *sections = re.split(r"\n[ \t]*(Args|Returns|Raises):[ \t]*\n?", text)
    parts = dict(zip(sections[::2], sections[1::2], strict=True))
    described = {match[2]: " ".join(match[3].split()) for match in ARGUMENT.finditer(parts.get("Args", ""))}
    hints, parameters = get_type_hints(method), inspect.signature(method).parameters.values()
    parameters = [each for each in parameters if each.name != "self"]
    properties: dict[str, Any] = {}
    for parameter in parameters:
        for wanted, there in (("type", hints), ("description under Args: in its docstring", described)):
            if parameter.name not in there:
                raise UserError(f"{where} has no {wanted} for {parameter.name}; write one")
        properties[parameter.name] = schema_of(hints[parameter.name], where) | {
            "description": described[parameter.name]
        }
    if not description.strip():
        raise UserError(f"{where} has no docstring, which tells the model what it does; write one")
    required = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    schema: dict[str, Any] = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    function = {"name": method.__name__, "description": description.strip(), "parameters": schema}
    if "return" in hints:
        returned = {"description": parts["Returns"].strip()} if "Returns" in parts else {}
        function["return"] = schema_of(hints["return"], where) | returned
    return {"type": "function", "function": function}


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """A type in JSON Schema."""
    try:
        return TypeAdapter(hint).json_schema()
    except PydanticSchemaGenerationError as error:
        raise UserError(
            f"{where} has the type {hint}, which JSON has not; use int, str, list[str] and the like"
        ) from error
