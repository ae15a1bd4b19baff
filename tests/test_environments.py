"""Turns: tokens are only appended, whatever the environment says and however long it takes; its own never count."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pytest
from conftest import TINY, make_small, mesh_of, records

from lacuna import checkpoint, cli, grpo, objective, sampler
from lacuna.apps import environments as apps
from lacuna.apps import evaluate, tools
from lacuna.apps.environments import load_environment, tool_schema
from lacuna.apps.rewards import load_rewards
from lacuna.config import EvalConfig, GrpoConfig, RewardKeys, UserError
from lacuna.environments import Conversations, Problem, Turns, appended_tokens, check_template
from lacuna.grpo import Answered, rewards_of
from lacuna.metrics import read_json_lines
from lacuna.sampler import Completion, Sampler
from lacuna.tokenizer import decode, encode, load_tokenizer, render

TEMPLATE = Path(__file__).parents[1] / "configs" / "tools_template.jinja"
ENDS = (2, 0, *range(300, 362))  # a model that knows nothing ends a turn after some eight tokens

ENVIRONMENTS = '''
import random, time
from pathlib import Path

here = Path(__file__)

def delay():
    if here.with_name("slow").exists():
        time.sleep(random.random() / 20)

def step(messages, row):
    """Answers twice, with what was said last."""
    delay()
    assert messages[0]["role"] == "user" and messages[-1]["role"] == "assistant" and row["answer"]
    if here.with_name("down").exists() and len(messages) > 2 and len(messages[0]["content"]) % 2:
        if len(messages[-1]["content"]) % 2:
            raise ConnectionError("nobody there")
        time.sleep(1000)
    said = [{"role": "user", "content": f"You said {len(messages[-1]['content'])} letters."}]
    return said if len(messages) < 5 else None

class Game:
    """Adds something to the prompt of every second, and counts."""

    def reset(self, seed, **row):
        delay()
        self.total, self.seed = 0, seed
        assert "answer" in row and "messages" in row
        return f" Begin at {seed % 7}." if seed % 2 else None

    def look(self, at: int, times: int = 1) -> str:
        """
        Look somewhere.

        Args:
            at: Where to look.
            times: How often.

        Returns:
            What is there.
        """
        delay()
        self.total += at
        if at % 5 == 0:
            raise ValueError("nothing there")
        return "x" * (at % 9)

    async def wait(self) -> None:
        """Wait."""

    def get_reward(self):
        return self.total % 11

def letters(prompt, completion, row):
    return sum(letter in "aeiou" for letter in completion) / (1 + len(completion))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("turns")
    small = make_small(directory / "small")
    (small / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    (small / "chat_template.jinja").write_text(TEMPLATE.read_text())
    (directory / "worlds.py").write_text(ENVIRONMENTS)
    return directory


def any_calls(text: str, names: Any) -> tuple[str, list[dict[str, Any]]]:
    """Calls of tools in a text of any kind."""
    calls = [{"name": "look", "arguments": {"at": len(text)}}, {"name": "fly", "arguments": {}}]
    return "", calls[: len(text) % 4]


def prepare(patch: pytest.MonkeyPatch) -> None:
    """A slot may have as many stop tokens as the model has ends, and any text calls tools."""
    patch.setattr(sampler, "STOP_IDS", len(ENDS))
    patch.setattr(grpo, "make_mesh", lambda *_: mesh_of(1, 1, 1))
    patch.setattr(apps, "parse_calls", any_calls)


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def run_config(place: Path, name: str, **changes: Any) -> GrpoConfig:
    small = place / "small"
    settings: dict[str, Any] = {
        "model_name": str(small), "from_scratch": True, "output_dir": str(place / "runs"), "seed": 3, "run_name": name,
        "data": ({"path": str(small / "heldout.jsonl"), "split": "train[:30]"},), "sequence_length": 256,
        "reward": (f"{place / 'worlds.py'}:letters:1.0",), "environment": f"{place / 'worlds.py'}:{name}",
        "prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_tokens": 120, "compute_dtype": "float32",
        "learning_rate": 1e-2, "steps": 2, "slots": 6, "max_turns": 4, "mask_truncated": False, "save_every": 1,
    }  # fmt: skip
    return GrpoConfig(**settings | changes)


class Ran(NamedTuple):
    """A run, the tokens of each completion as the sampler drew and was given them, and the rows of its updates."""

    config: GrpoConfig
    drawn: dict[tuple[int, int], list[tuple[int, bool]]]
    rows: list[objective.RolloutBatch]


@pytest.fixture(scope="module", params=["step", "Game"])
def ran(request: pytest.FixtureRequest, place: Path) -> Ran:
    take_part, pack = Sampler._part, objective.packed_rows
    config, drawn, rows = run_config(place, request.param), {}, []

    def part(self: Sampler, slot: int, running: Any, emitted: Any) -> Completion:
        given = len(running.given)
        found = take_part(self, slot, running, emitted)
        tokens = ((token, number < given) for number, token in enumerate(found.tokens))
        drawn.setdefault((found.request, found.index), []).extend(tokens)
        return found

    def packed_rows(*given: Any) -> Any:
        found = pack(*given)
        rows.append(jax.tree.map(np.copy, found[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setattr(Sampler, "_part", part)
        patch.setattr(objective, "packed_rows", packed_rows)
        cli.run(config)
    return Ran(config, drawn, rows)


def lines_of(config: GrpoConfig) -> list[dict[str, Any]]:
    return list(read_json_lines(config.run_directory / "rollouts.jsonl"))


def drawn_by(line: dict[str, Any]) -> list[int]:
    """The tokens of a rollout that its environment did not write."""
    return [
        token for number, token in enumerate(line["tokens"])
        if not any(start <= number < stop for start, stop in line["turns"]["written"])
    ]  # fmt: skip


def test_the_ids_that_are_trained_are_those_that_were_drawn(ran: Ran) -> None:
    lines, tokenizer = lines_of(ran.config), load_tokenizer(Path(ran.config.model_name))
    whole = sorted([token for token, _ in tokens] for tokens in ran.drawn.values())
    assert sorted(line["tokens"] for line in lines) == whole
    drawn = sorted([token for token, is_given in tokens if not is_given] for tokens in ran.drawn.values())
    assert sorted(map(drawn_by, lines)) == drawn
    trained = []
    for batch in ran.rows:
        for row in zip(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in batch), strict=True):
            fields = objective.RolloutBatch(*row)
            for segment in np.unique(fields.segment[fields.weight > 0]):
                here = (fields.segment == segment) & (fields.weight > 0)
                trained.append(fields.target[here].tolist())
    assert sorted(trained) == drawn
    again = [encode(tokenizer, decode(tokenizer, line["tokens"]), False).tolist() for line in lines]
    assert sum(ids != line["tokens"] for ids, line in zip(again, lines, strict=True)) > len(lines) // 2
    assert sum(len(line["turns"]["written"]) > 1 for line in lines) > 3, "hardly a rollout has several turns"


def test_sampler_and_trainer_agree_over_all_turns(ran: Ran) -> None:
    for record in records(ran.config):
        assert 0 < record["logprob_difference_max"] < 1e-5 and record["environment_token_fraction"] > 0.1


def test_what_the_environment_wrote_is_what_the_template_writes(ran: Ran) -> None:
    tokenizer = load_tokenizer(Path(ran.config.model_name))
    for line in lines_of(ran.config):
        messages = [message for message in line["turns"]["messages"] if message["role"] != "assistant"]
        texts = [decode(tokenizer, line["tokens"][start:stop]) for start, stop in line["turns"]["written"]]
        parts = "".join(text.removeprefix("\n") for text in texts).split("<|im_start|>")[1:]
        expected = [f"{message['role']}\n{message['content']}<|im_end|>\n" for message in messages[1:]]
        written = [part for part in parts if part != "assistant\n"]
        assert written == expected[: len(written)] and all(text.endswith("assistant\n") for text in texts)
        asked = decode(tokenizer, line["prompt_tokens"]).split("<|im_start|>")[-2]
        assert asked == f"user\n{messages[0]['content']}<|im_end|>\n"


def test_the_figures_of_turns_are_those_of_the_rollouts(ran: Ran) -> None:
    for record in records(ran.config):
        lines = [line for line in lines_of(ran.config) if line["step"] == record["step"]]
        turns, drawn = [line["turns"] for line in lines], sum(len(drawn_by(line)) for line in lines)
        results = [[each for each in turn["messages"] if each["role"] == "tool"] for turn in turns]
        failed = [sum("error" in each["content"] for each in result) for result in results]
        ends = [turn["is_out_of_turns"] for turn in turns]
        assert record["turns"] == pytest.approx(np.mean([1 + len(turn["written"]) for turn in turns]))
        assert record["tool_calls"] == pytest.approx(np.mean([len(result) for result in results]))
        assert record["tool_failures"] == pytest.approx(np.mean(failed))
        assert record["out_of_turns_fraction"] == pytest.approx(np.mean(ends))
        assert all(
            len(turn["written"]) == ran.config.max_turns - 1 for turn, end in zip(turns, ends, strict=True) if end
        )
        assert record["target_tokens"] == record["completion_tokens"] == drawn
        total = sum(len(line["tokens"]) for line in lines)
        assert record["environment_token_fraction"] == pytest.approx(1 - drawn / total)
    if ran.config.run_name == "Game":
        totals = {line["rewards"]["Game"] for line in lines_of(ran.config)}
        assert len(totals) > 3 and record["tool_failures"] > 0


LOGGED = ("step", "reward", "loss", "gradient_norm", "turns", "tool_calls", "environment_token_fraction")


def test_delays_and_a_kill_inside_a_turn_change_nothing_and_a_replay_is_exact(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, slow = ran.config.run_name, Path(ran.config.environment.partition(":")[0]).with_name("slow")
    config, replies = ran.config.model_copy(update={"run_name": f"{name}_again"}), iter(range(10**6))
    take_reply, first = Conversations.take_reply, sum(line["turns"]["count"] for line in lines_of(ran.config)[:16])

    def dying(*given: Any) -> None:
        assert next(replies) < first, "power cut"
        take_reply(*given)

    slow.touch()
    monkeypatch.setattr(Conversations, "take_reply", dying)
    with pytest.raises(AssertionError, match="power cut"):
        cli.run(config)
    monkeypatch.setattr(Conversations, "take_reply", take_reply)
    assert checkpoint.saved_steps(config.run_directory) == [1]
    cli.run(config.model_copy(update={"resume": True}))
    slow.unlink()
    kept = [(each.run_directory / "rollouts.jsonl").read_text() for each in (config, ran.config)]
    assert kept[0] == kept[1]
    figures = [[[record[key] for key in LOGGED] for record in records(each)] for each in (config, ran.config)]
    assert figures[0] == figures[1]
    capsys.readouterr()
    cli.start("grpo", ["--replay", str(ran.config.run_directory), "--step", "2"])
    again = json.loads(capsys.readouterr().out)
    assert [again[key] for key in LOGGED[1:]] == figures[1][1][1:]


# What fails


def test_an_environment_that_fails_ends_the_run_or_its_rollout(place: Path, ran: Ran) -> None:
    if ran.config.run_name == "Game":
        return
    down = place / "down"
    down.touch()
    try:
        with pytest.raises(UserError, match=r"environment step on .* line \d+: .*; step 1 is saved"):
            first = ran.config.run_directory / "checkpoints" / "step_00000001"
            changes = {"run_name": "down", "resume_from": str(first), "environment_seconds": 0.5}
            cli.run(ran.config.model_copy(update=changes))
        config = run_config(place, "step", run_name="dropped", on_reward_error="drop", steps=1,
                            environment_seconds=0.5)  # fmt: skip
        cli.run(config)
    finally:
        down.unlink()
    lines, (record,) = lines_of(config), records(config)
    failed = [
        line for line in lines
        if len(line["turns"]["messages"][0]["content"]) % 2 and line["turns"]["count"] > 1 and not line["is_truncated"]
    ]  # fmt: skip
    assert 0 < len(failed) < len(lines)
    for line in lines:
        assert (line["rewards"]["letters"] is None) == (line in failed)
        assert line["advantage"] == 0 or line not in failed
    judged = sum(len(drawn_by(line)) for line in lines if line["rewards"]["letters"] is not None)
    assert record["target_tokens"] == judged
    log = (config.run_directory / "run.log").read_text()
    assert "calls were given up, as environment step on" in log


# What is refused, and how tools are described

DESCRIBED = """
{"type": "function", "function": {"name": "many", "description": "Does a lot\\nof things.", "parameters": {
"type": "object", "properties": {"a": {"type": "integer", "description": "First, continued here: with a colon."},
"b": {"type": "number", "description": "Second."}, "c": {"type": "boolean", "description": "Third"},
"d": {"type": "array", "items": {"type": "integer"}, "description": "Fourth."},
"e": {"type": "object", "additionalProperties": {"type": "number"}, "description": "Fifth."},
"f": {"type": "string", "enum": ["m", "km"], "description": "Sixth."}}, "required": ["a"]},
"return": {"type": "integer", "description": "int: What\\n      it is."}}}

{"type": "function", "function": {"name": "plain", "description": "Just this.", "parameters": {"type": "object",
"properties": {}}, "return": {"type": "null"}}}
"""


class Described:
    def many(
        self, a: int, b: float = 1.0, c: bool = False, d: list[int] = [], e: dict[str, float] = {},  # noqa: B006
        f: Literal["m", "km"] = "m",
    ) -> int:  # fmt: skip
        """Does a lot
        of things.

        Args:
            a: First,
                continued here: with a colon.
            b (float): Second.
            c: Third
            d: Fourth.
            e: Fifth.
            f: Sixth.
        Returns:
            int: What
              it is.
        Raises:
            ValueError: never
        """
        return 0

    def plain(self) -> None:
        """Just this."""


def test_tools_are_described_as_transformers_describes_them() -> None:
    """Its `get_json_schema`, version 5.24."""
    assert [tool_schema("x", method) for method in (Described.many, Described.plain)] == [
        json.loads(each) for each in DESCRIBED.split("\n\n")
    ]


BROKEN = '''
class NoReset:
    def look(self) -> str:
        """Look."""
class NoTool:
    def reset(self): pass
class NoType:
    def reset(self): pass
    def look(self, at):
        """Look.

        Args:
            at: Where.
        """
class NoWord:
    def reset(self): pass
    def look(self, at: int):
        """Look."""
class Nameless:
    def reset(self): pass
    def look(self): pass
'''


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NoReset", "NoReset has no method reset"),
        ("NoTool", "NoTool has no public method, so no tool"),
        ("NoType", "the tool look has no type for at"),
        ("NoWord", "the tool look has no description under Args: in its docstring for at"),
        ("Nameless", "the tool look has no docstring"),
        ("Absent", "has no function Absent"),
    ],
)
def test_an_environment_that_is_none_is_refused(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(UserError, match=why):
        load_environment(f"{tmp_path / 'broken.py'}:{name}")


OTHERWISE = "writes a turn of the model in another way"
UNTHINKING = "((message.content if loop.last else message.content.split('</think>')[-1]) or"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text, ""),
        (lambda text: text.replace('"<|im_start|>" ~', '"<|im_start|>"[not loop.last:] ~'), OTHERWISE),
        (lambda text: text.replace("(message.content or", UNTHINKING), OTHERWISE),
        (lambda text: text.replace("message.tool_calls or []", "[]"), "does not write calls of tools"),
        (lambda text: text.replace('"<|im_end|>\\n"', '"\\n"'), "writes no token that ends a turn"),
        (lambda text: text.replace("message.content or", "('' if message.role == 'tool' else message.content) or"),
         "does not write what a tool returns"),
    ],
)  # fmt: skip
def test_a_template_that_can_not_go_on_is_refused_by_name(place: Path, tmp_path: Path, change: Any, why: str) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(change(TEMPLATE.read_text()))
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((TINY / "tokenizer_config.json").read_bytes())
    tokenizer, environment = load_tokenizer(tmp_path, str(template)), load_environment(f"{place / 'worlds.py'}:Game")
    assert environment
    with pytest.raises(UserError, match=f"{tmp_path}: the chat template {why}") if why else nullcontext():
        check_template(tokenizer, environment, {})


@pytest.mark.reference
def test_templates_of_real_models_go_on_or_are_refused(shelf: Path, place: Path) -> None:
    environment = load_environment(f"{place / 'worlds.py'}:Game")
    assert environment
    written = {"qwen2.5": "\n<|im_start|>user\n<tool_response>\n7\n", "llama-3.2": "<|start_header_id|>ipython"}
    for name, begins in written.items():
        tokenizer = load_tokenizer(shelf / "tokenizers" / name)
        check_template(tokenizer, environment, {})
        said = [{"role": "tool", "name": "look", "content": "7"}]
        ids = appended_tokens(tokenizer, said, environment.tools, {})
        chat = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]}]  # fmt: skip
        whole = render(tokenizer, [*chat, *said], environment.tools, add_generation_prompt=True)
        assert whole.endswith(decode(tokenizer, ids)) and decode(tokenizer, ids).startswith(begins)
    with pytest.raises(UserError, match="qwen3: the chat template writes a turn of the model in another way"):
        check_template(load_tokenizer(shelf / "tokenizers" / "qwen3"), environment, {})


def test_rewards_get_their_environments_as_in_trl(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "def of_all(environments, **kwargs):\n    return [each.score for each in environments]\n"
        "def of_one(prompt, completion, row, environment, messages):\n    return environment.score + len(messages)\n"
    )
    rewards = load_rewards([f"{tmp_path / 'judge.py'}:{name}" for name in ("of_all", "of_one")])
    problem = Problem("row", "?", (1,), "", {})
    answered = [Answered(problem, "a", messages=[{}] * n, environment=SimpleNamespace(score=n)) for n in (1, 2)]
    values, *_ = rewards_of(rewards, answered, "turns", 1, RewardKeys(), lambda: None)
    assert values == {"of_all": [1, 2], "of_one": [2, 4]}


def test_no_token_of_the_environment_is_in_a_denominator() -> None:
    turns = Turns([], written=[(1, 3), (4, 5)])
    sample = objective.Sample(1, 0, 0, "", (1,), (7,) * 6, "", (0.0,) * 6, (0.0,) * 6, False, {}, 1.0, 1.0)
    samples = [sample, replace(sample, turns=turns)]
    assert samples[1].is_sampled.tolist() == [True, False, False, True, False, True]
    for normalisation, expected in (("token", [1 / 9, 1 / 9]), ("sequence", [1 / 12, 1 / 6])):
        config = GrpoConfig(model_name="m", run_name="r", data=({"path": "x"},), loss_normalisation=normalisation)
        weight_of = objective.token_weights([samples], config)
        batch, _ = objective.packed_rows(samples, weight_of, (1, 2, 8), is_shared=False)
        sums = sorted(np.unique(batch.weight[batch.weight > 0]).tolist())
        np.testing.assert_allclose(sums, sorted(set(expected)), rtol=1e-6)
        assert np.count_nonzero(batch.weight) == 9


def test_the_calculator_calculates_what_its_data_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "parse_calls", tools.parse_calls)
    environment = load_environment(f"{TINY.parent / 'calculator.py'}:Calculator")
    assert environment
    for line in (TINY / "calls.jsonl").read_text().splitlines()[::40]:
        _, call, result, answer = json.loads(line)["messages"]
        instance, _ = environment.begin({}, 0)
        (function,) = (each["function"] for each in call["tool_calls"])
        text = f"<tool_call>{json.dumps(function)}</tool_call>"
        reply = environment.reply(instance, [], {}, text)
        assert reply.messages == [result] and answer["content"] == f"#### {result['content']}"


def test_an_evaluation_measures_with_the_environment(place: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    if ran.config.run_name == "step":
        return
    monkeypatch.setattr(evaluate, "make_mesh", lambda *_: mesh_of(1, 1, 1))
    data: Any = ({"path": str(place / "small" / "heldout.jsonl"), "split": "train[:9]"},)
    config = EvalConfig(
        model_name=str(ran.config.run_directory / "model"), tasks=("generate",), environment=ran.config.environment,
        data=data, max_turns=3, max_tokens=120, samples=2, temperature=1.0, slots=6, capacity=256,
        output_dir=str(place), run_name="measured", compute_dtype="float32",
    )  # fmt: skip
    cli.run(config)
    figures = json.loads((place / "measured" / "summary.json").read_text())["generate"]
    lines = list(read_json_lines(place / "measured" / "predictions.jsonl"))
    turns = [line["turns"] for line in lines]
    assert len(lines) == 18
    for name, key in (("turns", "count"), ("tool_calls", "calls"), ("tool_failures", "failures")):
        assert figures[name] == pytest.approx(np.mean([turn[key] for turn in turns]))
    assert figures["turns"] > 1 and figures["tool_failures"] > 0
