"""Calls of tools: what the templates of Qwen and Llama 3 write is read back, whole and as it grows."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lacuna.apps.tools import before_calls, parse_calls
from lacuna.tokenizer import Tokenizer, load_tokenizer, render

NAMES = ("add", "weather_of")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text("ab {}\"'\\\n;<>/é😀", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("kl", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "unit", "a"]), VALUES, max_size=3)


@cache
def tokenizer_of(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def answer_with(tokenizer: Tokenizer, calls: list[dict[str, Any]]) -> str:
    """What the model writes to call these tools: the template's own turn, without header and end."""
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": {}}} for name in NAMES
    ]
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Go on."}]
    said = {"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}
    prompt = render(tokenizer, asked, tools, add_generation_prompt=True)
    text = render(tokenizer, [*asked, said], tools)
    assert text.startswith(prompt)
    return re.sub(r"^<think>\n*</think>|(<\|im_end\|>|<\|eot_id\|>)\n?$", "", text.removeprefix(prompt))


@pytest.mark.reference
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama-3.2"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_a_template_writes_is_read_back(shelf: Path, name: str, data: st.DataObject) -> None:
    most = 1 if name == "llama-3.2" else 3  # Llama's template takes one call a turn
    calls = data.draw(
        st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(NAMES), "arguments": ARGUMENTS}), min_size=1, max_size=most
        )
    )
    assert parse_calls(answer_with(tokenizer_of(shelf / "tokenizers" / name), calls), NAMES) == ("", calls)


ADD = {"name": "add", "arguments": {"a": 1}}
ADD_TEXT = '{"name": "add", "arguments": {"a": 1}}'
CASES = [
    ("Hello", ("Hello", [])),
    (f"<tool_call>\n{ADD_TEXT}\n</tool_call>", ("", [ADD])),
    (f"Well.\n<tool_call>\n{ADD_TEXT}\n</tool_call>\n<tool_call>{ADD_TEXT}</tool_call>\n", ("Well.", [ADD] * 2)),
    (f"<tool_call>{ADD_TEXT}", ("", [ADD])),  # cut off, or ended early
    *((f"<tool_call>{ADD_TEXT}\n{'</tool_call>'[:size]}", ("", [ADD])) for size in range(1, 12)),
    (f"<tool_call>{ADD_TEXT}</tool and", ("</tool and", [ADD])),
    ("<tool_call>\n{not JSON}\n</tool_call> so", ("<tool_call>\n{not JSON}\n</tool_call> so", [])),
    (f"<tool_call>[]</tool_call> b <tool_call>{ADD_TEXT}</tool_call> c", ("<tool_call>[]</tool_call> b c", [ADD])),
    ('{"name": "add", "parameters": {"a": 1}}', ("", [ADD])),
    ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 1}}', ("", [ADD, ADD])),
    ('{"name": "Ann", "arguments": {}}', ('{"name": "Ann", "arguments": {}}', [])),  # JSON that was asked for
    (ADD_TEXT + " is a call", (ADD_TEXT + " is a call", [])),
    ('{"a": ' * 5000, ('{"a": ' * 5000, [])),
    ("a < b\n\n", ("a < b\n\n", [])),
    ("</tool_call> and <tool_cal", ("</tool_call> and <tool_cal", [])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_text_and_calls_are_parted_and_what_was_streamed_stays(
    text: str, expected: tuple[str, list[dict[str, Any]]]
) -> None:
    assert parse_calls(text, NAMES) == expected
    growing = [before_calls(text[:size]) for size in range(min(len(text), 200))]
    assert all(more.startswith(said) for said, more in pairwise([*growing, expected[0]]))
