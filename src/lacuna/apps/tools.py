"""Calls of tools in what a model wrote, in the forms of Qwen (`<tool_call>` around JSON) and Llama 3 (bare JSON)."""

import json
import re
from collections.abc import Collection
from typing import Any

from lacuna.sampler import before_stop

OPENING, CLOSING = "<tool_call>", "</tool_call>"
TAG = re.compile(rf"{OPENING}\s*")
BARE = re.compile(r"\s*(?=\{)")
CUT_OFF = "|".join(rf"{CLOSING[:size]}\Z" for size in range(1, len(CLOSING)))
AFTER = re.compile(rf"\s*(?:{CLOSING}|{CUT_OFF})|[\s;]*")


def parse_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """What an answer says besides its calls, and the calls. Bare JSON is a call only of a tool with one of the names,
    and only if there is nothing else."""
    said, calls, end = "", [], 0
    if bare := BARE.match(text):
        while end < len(text):
            call, end = call_at(text, end or bare.end())
            if call is None or call["name"] not in names:
                return text, []
            calls.append(call)
        return "", calls
    for tag in TAG.finditer(text):
        call, after = call_at(text, tag.end()) if tag.start() >= end else (None, end)
        if call:
            said += text[end : tag.start()].rstrip()
            calls.append(call)
            end = after
    return said + (text[end:].rstrip() if calls else text), calls


def before_calls(text: str) -> str:
    """The beginning of an answer that more follows, as far as it can't be part of a call."""
    return "" if BARE.match(text) else before_stop(text, (OPENING,))[0].rstrip()


def call_at(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    """The call in the JSON object there, with a name and arguments (Llama 3: parameters), and where that ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start
    end = after.end() if (after := AFTER.match(text, end)) else end
    match value:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            return {"name": name, "arguments": arguments}, end
    return None, end
