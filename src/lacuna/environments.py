"""Turns: rollouts in which an environment answers the model, until one of them has no more to say.

Tokens are only ever appended: those that were sampled stay as they are, and of the chat only what the environment wrote
is encoded, as what the chat template writes after a turn. A rollout keeps its slot of the sampler, and so its cache,
while its environment thinks and others decode. What becomes of it depends on what its environment says, not on when.
"""

import itertools
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lacuna.config import SamplingKeys, TurnKeys, UserError
from lacuna.distributed import from_first, is_first
from lacuna.sampler import Completion, Request, Sampler, joined_parts
from lacuna.tokenizer import BLANK, Message, Span, Tokenizer, Tools, Variables, decode, encode, render, render_prompt

LOOK_SECONDS = 0.2  # between two looks for calls that hang
ROUNDS = itertools.count()  # in which processes agree on what environments said
THOUGHT = f"<think>\n{BLANK}\n</think>\n\n{BLANK}"

# Calls

Outcome = tuple[Any, Any, str]  # of a call: its key, its value, and why it was given up


class Calls:
    """Calls made side by side in up to `workers` threads that nothing has to wait for. One that takes more than
    `seconds`, a limit by the name of `key`, is given up and left behind with its thread."""

    def __init__(self, workers: int, seconds: float, key: str) -> None:
        self.workers, self.seconds, self.key = workers, seconds, key
        self.waiting = deque[tuple[Hashable, Callable[[], Any], int]]()
        self.open, self.began, self.threads = set[Hashable](), dict[Hashable, float](), 0
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.lock = threading.Lock()

    def put(self, key: Hashable, call: Callable[[], Any], retries: int = 0) -> None:
        """Make a call as soon as a thread is free, and again up to `retries` times where it fails."""
        with self.lock:
            self.open.add(key)
            self.waiting.append((key, call, retries))
            self._start_thread()

    def take(self, patience: float) -> list[Outcome]:
        """The calls that ended or are given up since, once there is one, or after `patience` seconds."""
        found = list[Outcome]()
        try:
            found.append(self.outcomes.get(timeout=patience) if patience else self.outcomes.get_nowait())
            while True:
                found.append(self.outcomes.get_nowait())
        except queue.Empty:
            pass
        with self.lock:
            for key in [key for key, began in self.began.items() if time.monotonic() - began > self.seconds]:
                found.append((key, None, f"it took more than {self.seconds:g} s ({self.key})"))
                del self.began[key]
                self.threads -= 1
                self._start_thread()
            self.open.difference_update(key for key, *_ in found)
        return found

    def clear(self) -> None:
        """Make none of the calls that were not begun."""
        with self.lock:
            self.waiting.clear()

    def _start_thread(self) -> None:
        if self.waiting and self.threads < self.workers:
            self.threads += 1
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        """Make calls, one after the other, until none waits or one was given up."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.threads -= 1
                    return
                key, call, retries = self.waiting.popleft()
                self.began[key] = time.monotonic()
            value, problem = None, ""
            for left in range(retries, -1, -1):
                try:
                    value, problem = call(), ""
                except (Exception, SystemExit) as error:
                    problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                with self.lock:
                    if key not in self.began:
                        return
                    self.began[key] = time.monotonic()
                    if not problem or not left:
                        del self.began[key]
                        self.outcomes.put((key, value, problem))
                        break


# Environments and rollouts


@dataclass(frozen=True)
class Problem:
    """A row to ask: its origin, the text and tokens of its prompt, its reference answer or several of which any is
    right, the row itself, the texts to choose from with the place of the right one, where there is a choice, and
    whether the chat template wrote the prompt; and the messages and variables of the template that it was made of."""

    origin: str
    prompt: str
    token: tuple[int, ...]
    answer: str | list[str]
    row: dict[str, Any] = field(repr=False)
    choices: tuple[str, ...] = ()
    right: int = -1
    is_chat: bool = True
    messages: list[Message] = field(default_factory=list, repr=False)
    variables: Variables = field(default_factory=dict, repr=False)


class Reply(NamedTuple):
    """What an environment makes of a turn: that turn as a message, the messages that answer it, none where the rollout
    is over, and how many calls of tools it had and how many of them failed."""

    said: Message
    messages: list[Message]
    calls: int = 0
    failures: int = 0


@runtime_checkable
class Environment(Protocol):
    """What answers the model: its name, the tools it offers, and the file it comes from."""

    name: str
    tools: Tools
    file: Path | None

    def begin(self, row: dict[str, Any], seed: int) -> tuple[Any, str]:
        """An instance that begins with a row, and what it adds to the prompt."""

    def reply(self, instance: Any, chat: list[Message], row: dict[str, Any], text: str) -> Reply:
        """What it says to the text of a turn after this chat."""

    def give_back(self, instance: Any) -> None:
        """Take back an instance that is not needed any more."""


@dataclass
class Turns:
    """The chat of a rollout, the ranges of its tokens that the environment wrote, its number of turns, of calls of
    tools and of those that failed, and whether it ended as it had no turn left."""

    messages: list[Message]
    written: list[Span] = field(default_factory=list)
    count: int = 1
    calls: int = 0
    failures: int = 0
    is_out_of_turns: bool = False


def turn_figures(turns: Sequence[Turns]) -> dict[str, float]:
    """Means of turns, of calls of tools and of failed ones, and the share of rollouts that ended for want of turns."""
    if not turns:
        return {}
    values = [(each.count, each.calls, each.failures, each.is_out_of_turns) for each in turns]
    names = "turns", "tool_calls", "tool_failures", "out_of_turns_fraction"
    return dict(zip(names, np.mean(values, axis=0).tolist(), strict=True))


@dataclass
class Rollout:
    """A problem, by its place and the rollout's index there, a prompt and its completion, whose text is that of the
    last turn; with an environment also its turns, its instance, and why it was given up, if it was."""

    problem: Problem
    key: tuple[int, int]
    prompt: tuple[int, ...]
    completion: Completion
    turns: Turns | None = None
    instance: Any = None
    failure: str = ""
    number: int = -1  # of its request

    @property
    def chat(self) -> Turns:
        """Its turns, which it has."""
        assert self.turns
        return self.turns


class Rollouts:
    """How problems are rolled out: by a sampler, with an environment or without, which fails for good after `retries`
    where it begins, and then ends its rollout if that `is_dropped`; `report` is called as tokens come along."""

    def __init__(
        self, sampler: Sampler, environment: Environment | None, keys: TurnKeys, report: Callable[[], None],
        stop: tuple[str, ...] = (), retries: int = 0, is_dropped: bool = False,
    ) -> None:  # fmt: skip
        self.sampler, self.environment, self.keys, self.report, self.stop = sampler, environment, keys, report, stop
        self.stop_ids, self.retries, self.is_dropped = tuple(sampler.tokenizer.ends), retries, is_dropped

    def of(
        self, problems: Sequence[Problem], seeds: Sequence[int], count: int, rules: SamplingKeys,
        keep: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:  # fmt: skip
        """That many rollouts of each problem, in order, each drawn by the seed of its problem and its index; `keep`
        gets each as it ends.

        Raises:
            UserError: an environment was given up, and its rollout is not to be dropped.
        """
        if self.environment:
            return Conversations(self, self.environment, problems, seeds, count, rules, keep).run()
        pairs = list(zip(problems, seeds, strict=True))
        given, root = (rules, self.stop_ids, self.stop), 0 if self.sampler.constraint else -1
        requests = [Request(problem.token, *given, seed, count, root=root) for problem, seed in pairs]

        def rollout_of(completion: Completion) -> Rollout:
            problem = problems[completion.request]
            return Rollout(problem, (completion.request, completion.index), problem.token, completion)

        def ended(completion: Completion) -> None:
            keep(rollout_of(completion))
            self.report()

        return [rollout_of(completion) for completion in self.sampler.generate(requests, ended)]


class Conversations:
    """Rollouts with their environments, no more of them at once than the sampler has slots, but for the last group."""

    def __init__(
        self, how: Rollouts, environment: Environment, problems: Sequence[Problem], seeds: Sequence[int], count: int,
        rules: SamplingKeys, keep: Callable[[Rollout], None],
    ) -> None:  # fmt: skip
        self.how, self.sampler, self.environment, self.rules, self.keep = how, how.sampler, environment, rules, keep
        self.calls = Calls(how.keys.environment_workers, how.keys.environment_seconds, "environment_seconds")
        self.groups, self.seeds = list[list[Rollout]](), seeds
        for place, problem in enumerate(problems):
            nothing = [Completion(place, index, (), "", (), (), (), "stop") for index in range(count)]
            self.groups.append([
                Rollout(problem, (place, each.index), problem.token, each, Turns(list(problem.messages)))
                for each in nothing
            ])  # fmt: skip
        self.queue, self.open = deque(self.groups), set[tuple[int, int]]()
        self.pending = set[tuple[int, int]]()  # those whose environment thinks
        self.running = dict[tuple[int, int], Rollout]()  # by number of request, and index

    def run(self) -> list[Rollout]:
        """All rollouts, in order."""
        try:
            while self.queue or self.open:
                while self.queue and len(self.open) < len(self.sampler.running):
                    for rollout in self.queue.popleft():
                        self.open.add(rollout.key)
                        self.call(rollout, partial(self.begin, rollout), self.how.retries)
                for place, index, value, problem in self.heard():
                    self.pending.remove((place, index))
                    self.take_in(self.groups[place][index], value, problem)
                for part in self.sampler.advance():
                    self.add_part(self.running[part.request, part.index], part)
                self.how.report()
        finally:
            self.calls.clear()
            for number, _ in self.running:
                self.sampler.cancel(number)
            self.sampler.advance()
        return [rollout for group in self.groups for rollout in group]

    def call(self, rollout: Rollout, call: Callable[[], Any], retries: int = 0) -> None:
        """Ask the environment of a rollout, in the first process alone."""
        self.pending.add(rollout.key)
        if is_first():
            self.calls.put(rollout.key, call, retries)

    def heard(self) -> list[tuple[int, int, Any, str]]:
        """What environments said since, the same in all processes; waits a while where nothing else is to do."""
        if not self.pending:
            return []
        waiting = bool(self.sampler.waiting)  # for a slot
        is_decoding = any(not each.is_waiting if each else waiting for each in self.sampler.running)
        found = self.calls.take(0 if is_decoding else LOOK_SECONDS) if is_first() else []
        lines = [(*key, value, problem) for key, value, problem in found]
        return json.loads(from_first(f"turns {next(ROUNDS)}", json.dumps(lines)))

    def begin(self, rollout: Rollout) -> str:
        """What the environment adds to the prompt of a rollout, of which it has an instance then."""
        row, seed = deepcopy(rollout.problem.row), self.seeds[rollout.key[0]]
        rollout.instance, said = self.environment.begin(row, seed)
        return said

    def take_in(self, rollout: Rollout, value: Any, problem: str) -> None:
        """Continue with what an environment said, or without it."""
        group, begins, chat = self.groups[rollout.key[0]], rollout.number < 0, rollout.chat
        if not begins and not problem:
            self.take_reply(rollout, Reply(*value))
        elif value and not problem:
            chat.messages[-1] = chat.messages[-1] | {"content": chat.messages[-1]["content"] + value}
            given = self.sampler.tokenizer, chat.messages, self.environment.tools, rollout.problem.variables
            rollout.prompt = tuple(encode(given[0], render_prompt(*given), add_special_tokens=False).tolist())
            if len(rollout.prompt) > (room := self.sampler.capacity - 1):
                problem = f"with what reset gave the prompt has {len(rollout.prompt):,} tokens, of {room:,}"
        if problem:
            rollout.failure = f"environment {self.environment.name} on {rollout.problem.origin}: {problem}"
            if not self.how.is_dropped:
                raise UserError(rollout.failure)
            self.close(rollout)
        if begins and self.pending.isdisjoint(each.key for each in group):
            self.submit(group)

    def submit(self, group: Sequence[Rollout]) -> None:
        """Queue what has begun of a group; rollouts with the same prompt share its prefill."""
        for prompt, same in itertools.groupby(group, lambda each: () if each.failure else each.prompt):
            if prompt:
                members = list(same)
                place, first = members[0].key
                given = self.rules, self.how.stop_ids, (), self.seeds[place], len(members)
                number = self.sampler.submit(Request(prompt, *given, first=first, is_held=True))
                for member in members:
                    member.number = number
                    self.running[number, member.key[1]] = member

    def add_part(self, rollout: Rollout, part: Completion) -> None:
        """Take in new tokens; where they end a turn, it is the environment's."""
        rollout.completion = joined_parts([rollout.completion, part])
        text, chat = rollout.completion.text, rollout.chat.messages
        if part.finish_reason == "stop":
            given = rollout.instance, deepcopy(chat), deepcopy(rollout.problem.row), text
            self.call(rollout, partial(self.environment.reply, *given))
        elif part.finish_reason:
            chat.append({"role": "assistant", "content": text})
            self.close(rollout)

    def take_reply(self, rollout: Rollout, reply: Reply) -> None:
        """Append what an environment said, or end the rollout: nothing was said, or no turn or no token is left."""
        chat, made = rollout.chat, len(rollout.completion.tokens)
        chat.messages += [reply.said, *reply.messages]
        chat.calls, chat.failures = chat.calls + reply.calls, chat.failures + reply.failures
        chat.is_out_of_turns = bool(reply.messages) and chat.count == self.how.keys.max_turns
        if not reply.messages or chat.is_out_of_turns:
            return self.close(rollout)
        given = reply.messages, self.environment.tools, rollout.problem.variables
        tokens = appended_tokens(self.sampler.tokenizer, *given)
        if made + len(tokens) >= min(self.rules.max_tokens, self.sampler.capacity - len(rollout.prompt)):
            rollout.completion = replace(rollout.completion, finish_reason="length")
            return self.close(rollout)
        chat.count += 1
        chat.written.append((made, made + len(tokens)))
        rollout.completion = replace(rollout.completion, text="")
        self.sampler.extend(rollout.number, rollout.key[1], tokens)

    def close(self, rollout: Rollout) -> None:
        """Free the slot of a rollout that has ended, if it still holds one."""
        self.open.remove(rollout.key)
        self.sampler.release(rollout.number, rollout.key[1])
        self.keep(rollout)


# What the environment writes


def appended_tokens(
    tokenizer: Tokenizer, messages: list[Message], tools: Tools, variables: Variables, content: str = BLANK
) -> list[int]:
    """The tokens that the chat template writes after the end of a turn of the model: these messages, and the beginning
    of its next turn.

    Raises:
        UserError: the template refuses them, or writes the turn before in another way once they follow.
    """
    called = [{"type": "function", "function": {"name": message["name"], "arguments": {}}}
              for message in messages if message["role"] == "tool"][:1]  # fmt: skip
    answer: Message = {"role": "assistant", "content": content}
    if called:
        answer |= {"content": content.replace(BLANK, ""), "tool_calls": called}
    chat: list[Message] = [{"role": "user", "content": "?"}, answer]
    where = f"{tokenizer.directory}: the chat template"
    try:
        asked, before = (render(tokenizer, chat[:size], tools, variables=variables) for size in (1, 2))
        after = render(tokenizer, [*chat, *messages], tools, True, variables)
    except ValueError as error:
        raise UserError(
            f"{where} refuses what an environment says: {error}; take another with --chat-template"
        ) from error
    ends = [str(tokenizer.backend.id_to_token(end)) for end in tokenizer.ends]
    cut, end = max(((before.rfind(end) + len(end), end) for end in ends if end in before), default=(0, ""))
    written = before.find(messages[0]["name"] if called else BLANK, len(asked))
    if written < 0:
        raise UserError(f"{where} does not write calls of tools; take one that does (--chat-template)")
    if written >= cut:
        raise UserError(f"{where} writes no token that ends a turn of the model; {' or '.join(ends)} should be there")
    if not after.startswith(before[:cut]):
        raise UserError(
            f"{where} writes a turn of the model in another way once another message follows, so a chat would not be "
            "the tokens that were sampled; take one that leaves earlier turns as they were (--chat-template)"
        )
    return encode(tokenizer, end + after[cut:], add_special_tokens=False)[1:].tolist()


def check_template(tokenizer: Tokenizer, environment: Environment, variables: Variables) -> None:
    """Raises UserError where the chat template can't write what an environment says, or rewrites turns before it."""
    names = [str(tool["function"]["name"]) for tool in environment.tools or ()]
    said: Message = {"role": "tool", "name": names[0]} if names else {"role": "user"}
    said["content"] = "1234"
    if tokenizer.template is None or not tokenizer.ends:
        raise UserError(f"{tokenizer.directory}: an environment needs a chat template and a token that ends a turn")
    for content in (BLANK, THOUGHT):
        ids = appended_tokens(tokenizer, [said], environment.tools, variables, content)
        if said["content"] not in decode(tokenizer, ids):
            raise UserError(f"{tokenizer.directory}: the chat template does not write what a tool returns")
