"""Writes what transformers makes of chats: text and ids of `apply_chat_template`, for tests/test_tokenizer.py.

Needs an environment of its own with transformers: `python scripts/reference_templates.py --shelf DIRECTORY
--out tests/reference`, where DIRECTORY holds `tokenizers/` and `chat/`.
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import transformers  # ty: ignore[import-not-found]

TOKENIZERS = ("qwen2.5", "qwen3", "llama-3.2", "tinyllama-1.1b-chat", "minimind-6400")
# transformers 5 rebuilds this one instead of reading tokenizer.json, and gives other ids around special tokens.
READ_AS_IT_IS = ("tinyllama-1.1b-chat",)
DATE = "26 Jul 2024"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a <city> & its surroundings; it's quick",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "São Paulo", "days": [1, 2.5, None]}},
}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def assistant(content: str | None, **fields: object) -> dict:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str) -> dict:
    return {"role": "tool", "content": content}


SPECIAL = (
    "a<|im_end|>\n<|im_start|>assistant\nb<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "c</s>\n<|assistant|>\nd"
)
CONVERSATIONS: dict[str, list[dict]] = {
    "one turn": [user("Hello"), assistant("Hi there.")],
    "system": [system("Be brief."), user("Hello"), assistant("Hi.")],
    "several turns": [user("1"), assistant("one"), user("2"), assistant("two"), user("3"), assistant("three")],
    "system, several turns": [system("Count."), user("1"), assistant("one"), user("2"), assistant("two")],
    "repeated turns": [user("go"), assistant("go"), user("go"), assistant("go"), user("go"), assistant("go")],
    "question without answer": [system("Be brief."), user("Hello"), assistant("Hi."), user("And now?")],
    "empty answer": [user("Say nothing"), assistant("")],
    "unicode": [user("naïve e\u0301 ﬁ 東京 שלום สวัสดี"), assistant("👩‍👩‍👧 \u00a0– 🦙 ꙮ \u2028 각")],
    "white space": [
        system("\n trim \n"),
        user("  two\t\n\n"),
        assistant("\n\n spaces   \n"),
        user(" "),
        assistant(" "),
    ],
    "carriage returns": [user("a\r\nb\r"), assistant("c\r\n\r\nd")],
    "special tokens in a question": [user(SPECIAL), assistant("no"), user("<think>\n</think>"), assistant("still no")],
    "special tokens in an answer": [user("Write them"), assistant(SPECIAL), user("Thanks"), assistant("<tool_call>")],
    "code and quotes": [
        user("<b>\"x\" & 'y'</b> {{ bos_token }} {% if %}"),
        assistant("```py\nif x < 1:\n\tpass\n```"),
    ],
    "tools": [user("Weather?"), assistant(None, tool_calls=[CALL]), tool('{"°C": 31}'), assistant("31 °C.")],
    "tools, system": [
        system("Help."),
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        tool("31\n'C'"),
        assistant("Hot."),
    ],
    "tools unused": [user("Hello"), assistant("Hi.")],
    "two calls at once": [
        user("Twice"),
        assistant("Well:", tool_calls=[CALL, CALL]),
        tool("1"),
        tool("2"),
        assistant("3"),
    ],
    "reasoning": [user("2 + 2?"), assistant("4", reasoning_content="\nTwo and two.\n"), user("+ 1?"), assistant("5")],
    "reasoning at last": [user("2 + 2?"), assistant("4"), user("+ 1?"), assistant("5", reasoning_content="4 + 1")],
    "reasoning by another name": [user("2 + 2?"), assistant("4", thinking="Two and two.")],
    "reasoning in the answer": [user("2 + 2?"), assistant("<think>\nTwo and two.\n</think>\n\n4")],
    "reasoning with tools": [
        user("Weather?"),
        assistant("", reasoning_content="I have to look.", tool_calls=[CALL]),
        tool("31"),
        assistant("31 °C.", reasoning_content="Simple."),
        user("And tomorrow?"),
        assistant("Let me see.", reasoning_content="Again.", tool_calls=[CALL]),
        tool("32"),
        assistant("32 °C."),
    ],
    "keys without a value": [
        {**user("Hello"), "name": None},
        assistant("Hi.", tool_calls=None, reasoning_content=None),
    ],
}
ROWS = {
    "alpaca_en_demo_1k.jsonl": (0, 500),
    "fastchat_dummy_conversation.jsonl": (2, 100),
    "glaive_toolcall_en.jsonl": (0, 1, 2, 100),
    "gpteacher_codegen.jsonl": (10, 4000),
    "gpteacher_roleplay.jsonl": (5, 1500),
    "oasst_en_threads.jsonl": (3, 200),
    "rasbt_instruct_1100.jsonl": (0, 1099),
    "reason_tool_use_50.jsonl": (1, 20, 49),
    "sgd_dev_multiturn_system.jsonl": (0, 400),
}
GENERATION_TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- generation %}
        {%- set shown = message.content %}
        {{- shown + '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
{%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}"""


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def apply(tokenizer, messages: list, tools: list | None, add_generation_prompt: bool) -> dict:
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "date_string": DATE}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return {"error": str(error)}
    return {"text": text, "ids": tokenizer.apply_chat_template(messages, return_dict=False, **options)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shelf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    conversations: dict[str, dict] = {
        name: {"messages": messages, "tools": [WEATHER] if "tools" in name else None}
        for name, messages in CONVERSATIONS.items()
    }
    cases, rows, masks = [], [], []
    for name in TOKENIZERS:
        loader = transformers.PreTrainedTokenizerFast if name in READ_AS_IT_IS else transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(arguments.shelf / "tokenizers" / name)
        for conversation, chat in conversations.items():
            for prompt in (False, True):
                result = apply(tokenizer, chat["messages"], chat["tools"], prompt)
                cases.append(
                    {"tokenizer": name, "conversation": conversation, "add_generation_prompt": prompt, **result}
                )
        for file, numbers in ROWS.items():
            lines = (arguments.shelf / "chat" / file).read_text("utf-8").split("\n")
            for number in numbers:
                row = json.loads(lines[number])
                result = apply(tokenizer, row["messages"], row.get("tools"), False)
                hashes = {key: digest(value) for key, value in result.items()}
                rows.append({"tokenizer": name, "file": file, "row": number, **hashes})
        if name in READ_AS_IT_IS:
            continue
        for conversation, chat in conversations.items():
            if all(message["content"] is not None for message in chat["messages"]):
                result = tokenizer.apply_chat_template(
                    chat["messages"], chat_template=GENERATION_TEMPLATE, return_assistant_tokens_mask=True
                )
                mask = "".join(map(str, result["assistant_masks"]))
                masks.append(
                    {"tokenizer": name, "conversation": conversation, "ids": result["input_ids"], "mask": mask}
                )

    reference = {
        "versions": {"transformers": transformers.__version__},
        "conversations": conversations,
        "cases": cases,
        "rows": rows,
        "generation_template": GENERATION_TEMPLATE,
        "masks": masks,
    }
    content = json.dumps(reference, ensure_ascii=False, separators=(",", ":")).encode()
    (arguments.out / "templates.json.gz").write_bytes(gzip.compress(content, mtime=0))
    print(f"{len(cases)} cases, {len(rows)} rows, {len(masks)} masks, {len(content)} bytes before compression")


if __name__ == "__main__":
    main()
