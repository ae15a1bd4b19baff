import gzip
import hashlib
import json
import re
import shutil
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lacuna.config import UserError
from lacuna.sandbox import rendered
from lacuna.tokenizer import (
    BLANK,
    CLOSE,
    OPEN,
    EncodedText,
    TextStream,
    Tokenizer,
    TrainOn,
    changed_files,
    chat_spans,
    check_messages,
    decode,
    encode,
    encode_apart,
    encode_spans,
    end_of_text_id,
    ends_in_words,
    left_out_thoughts,
    load_tokenizer,
    render,
    render_prompt,
)

ROOT = Path(__file__).parents[1]
SHELF = ROOT.parent / "shared" / "data"
PLAIN = str(ROOT / "configs" / "chat_template.jinja")
REFERENCE = json.loads(gzip.decompress((ROOT / "tests" / "reference" / "templates.json.gz").read_bytes()))
WITH_TEMPLATE = ("qwen2.5", "qwen3", "llama-3.2", "tinyllama-1.1b-chat", "minimind-6400")
needs_shelf = [pytest.mark.reference, pytest.mark.skipif(not SHELF.is_dir(), reason="no data shelf beside the project")]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
TRIMMED = CHATML.replace("message.content", "message.content | trim")
# Writes no generation prompt, and nothing but a space precedes the answer.
BRACKETS = """{{- bos_token }}{% for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + '</s>' }}{% endif %}
{%- endfor %}"""
# Prompts for a thought that it leaves out of the turns it writes.
THOUGHT = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
GENERATION = REFERENCE["generation_template"]
TEMPLATES = {
    "chatml": (CHATML, lambda content: content + "<|im_end|>"),
    "trimmed": (TRIMMED, lambda content: content.strip() + "<|im_end|>"),
    "brackets": (BRACKETS, lambda content: " " + content + "</s>"),
    "thought": (THOUGHT, lambda content: content + "<|im_end|>"),
    "generation": (GENERATION, lambda content: content + "<|im_end|>"),
    "plain": (Path(PLAIN).read_text(), lambda content: " " + content + "</s>"),
}
WORLD = (
    "hello world, the answer is\n\n\n 4\r\nUser: go <think>\nsystem user assistant 🦙 Assistant: naïve\n\n1 + 1 = 2\n"
)


@cache
def trained_backend() -> str:
    """A small byte-level tokenizer.json, whose merges reach over line ends."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORLD] * 4, trainer)
    return backend.to_str()


def write_tokenizer(directory: Path, backend: str, **settings: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(backend)
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "tokenizer_class": "Any"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": CHATML, **settings}))
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        name: load_tokenizer(write_tokenizer(directory / name, trained_backend(), chat_template=source))
        for name, (source, _) in TEMPLATES.items()
    }


@cache
def shelf(name: str) -> Tokenizer:
    return load_tokenizer(SHELF / "tokenizers" / name)


def shelf_chats(count: int) -> list[tuple[list, list | None]]:
    """So many rows of each file of chats, spread over the file."""
    chats = []
    for path in sorted((SHELF / "chat").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        chats += [(row["messages"], row.get("tools")) for row in rows[:: max(1, len(rows) // count)][:count]]
    return chats


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: object) -> dict:
    return {"role": "assistant", "content": content, **fields}


def supervised_texts(
    tokenizer: Tokenizer, messages: list, tools: list | None = None, train_on="assistant"
) -> list[str]:
    text, spans = chat_spans(tokenizer, messages, tools, train_on)
    return [text[start:end] for start, end in spans]


def encode_chats(tokenizer: Tokenizer, chats: list[tuple[Any, Any]], train_on: TrainOn) -> list[EncodedText]:
    return list(encode_spans(tokenizer, [chat_spans(tokenizer, *chat, train_on) for chat in chats]))


def byte_lengths(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """Bytes of each token of a byte-level tokenizer, one letter a byte, from the pieces alone."""
    added = {
        index: len(token.content.encode()) for index, token in tokenizer.backend.get_added_tokens_decoder().items()
    }
    return [added.get(index) or len(str(tokenizer.backend.id_to_token(index))) for index in ids.tolist()]


# Text and ids are transformers'


def reference_tokenizers(key: str) -> list:
    return [
        pytest.param(name, [case for case in REFERENCE[key] if case["tokenizer"] == name], marks=needs_shelf, id=name)
        for name in WITH_TEMPLATE
    ]


@pytest.mark.parametrize(("name", "cases"), reference_tokenizers("cases"))
def test_text_and_ids_equal_those_of_transformers(name: str, cases: list[dict]) -> None:
    """TinyLlama's ids are those of its tokenizer.json, from which the ones of transformers 5's own class differ."""
    tokenizer = shelf(name)
    assert len(cases) == 2 * len(REFERENCE["conversations"])
    for case in cases:
        chat = REFERENCE["conversations"][case["conversation"]]
        inputs = (tokenizer, chat["messages"], chat["tools"], case["add_generation_prompt"])
        if "error" in case:
            with pytest.raises(ValueError, match=re.escape(case["error"])):
                render(*inputs)
            continue
        text = render(*inputs)
        assert text == case["text"], case["conversation"]
        assert encode(tokenizer, text, add_special_tokens=False).tolist() == case["ids"], case["conversation"]


@pytest.mark.parametrize(("name", "cases"), reference_tokenizers("rows"))
def test_text_and_ids_of_real_chats_equal_those_of_transformers(name: str, cases: list[dict]) -> None:
    tokenizer = shelf(name)
    for case in cases:
        row = json.loads((SHELF / "chat" / case["file"]).read_text("utf-8").split("\n")[case["row"]])
        if "error" in case:
            with pytest.raises(ValueError, match="single tool-calls"):
                render(tokenizer, row["messages"], row.get("tools"))
            continue
        text = render(tokenizer, row["messages"], row.get("tools"))
        ids = encode(tokenizer, text, add_special_tokens=False).tolist()
        found = [hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in (text, ids)]
        assert found == [case["text"], case["ids"]], (case["file"], case["row"])


@pytest.mark.parametrize(("name", "cases"), reference_tokenizers("masks"))
def test_generation_tag_gives_the_mask_of_transformers(name: str, cases: list[dict], tmp_path: Path) -> None:
    """But for tokens that reach over an edge, which transformers supervises."""
    (tmp_path / "generation.jinja").write_text(GENERATION)
    tokenizer = load_tokenizer(SHELF / "tokenizers" / name, str(tmp_path / "generation.jinja"))
    assert cases or name == "tinyllama-1.1b-chat"
    for case in cases:
        messages = REFERENCE["conversations"][case["conversation"]]["messages"]
        if any(message.get("tool_calls") for message in messages):
            with pytest.raises(ValueError, match="does not write its call of|leaves it out"):
                chat_spans(tokenizer, messages, None, "assistant")
            continue
        if tokenizer.backend.token_to_id("<|im_end|>") is None:  # so text in which answers end would stop none
            with pytest.raises(ValueError, match=r"learned to end in .*<\|im_end\|>', and answers stop only at"):
                encode_chats(tokenizer, [(messages, None)], "assistant")
            continue
        (encoded,) = encode_chats(tokenizer, [(messages, None)], "assistant")
        assert encoded.token.tolist() == case["ids"]
        mask = np.array(list(case["mask"])) == "1"
        assert mask[encoded.supervised].all(), case["conversation"]
        assert mask.sum() - encoded.supervised.sum() == encoded.straddling_count, case["conversation"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in WITH_TEMPLATE])
def test_a_chat_begins_with_at_most_one_bos(name: str) -> None:
    tokenizer = shelf(name)
    (encoded,) = encode_chats(tokenizer, [([user("Hello"), assistant("Hi")], None)], "assistant")
    assert encoded.token[0] != encoded.token[1]
    if name == "llama-3.2":
        assert encoded.token.tolist().count(tokenizer.bos_id) == 1
        assert encode(tokenizer, "Hello", add_special_tokens=True).tolist() == [128000, 9906]


# Supervised text


def answers_of_qwen2(messages: list) -> list[str]:
    return [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]


def answers_of_qwen3(messages: list) -> list[str]:
    """Only an answer after the last question has its thought written, an empty one at the very end."""
    last_question = max(index for index, message in enumerate(messages) if message["role"] == "user")
    answers = []
    for index, message in enumerate(messages):
        thought, is_last = message.get("reasoning_content", ""), index == len(messages) - 1
        if message["role"] == "assistant":
            think = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" if thought or is_last else ""
            think = think if index > last_question else ""
            answers.append(think + (message["content"].lstrip("\n") if think else message["content"]) + "<|im_end|>")
    return answers


def answers_of_minimind(messages: list) -> list[str]:
    """Its prompt holds an empty thought; a real one is the model's own from where it differs."""
    answers = []
    for message in messages:
        if message["role"] == "assistant":
            thought = message.get("reasoning_content", "").strip("\n")
            answers.append(
                (f"{thought}\n</think>\n\n" if thought else "") + message["content"].lstrip("\n") + "<|im_end|>"
            )
    return answers


def answers_of_llama(messages: list) -> list[str]:
    return [message["content"].strip() + "<|eot_id|>" for message in messages if message["role"] == "assistant"]


def answers_of_tinyllama(messages: list) -> list[str]:
    return [message["content"] + "</s>" for message in messages if message["role"] == "assistant"]


ANSWERS = {
    "qwen2.5": answers_of_qwen2,
    "qwen3": answers_of_qwen3,
    "llama-3.2": answers_of_llama,
    "tinyllama-1.1b-chat": answers_of_tinyllama,
    "minimind-6400": answers_of_minimind,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in WITH_TEMPLATE])
def test_real_chats_supervise_each_answer_and_its_end_and_nothing_else(name: str) -> None:
    tokenizer = shelf(name)
    chats = [chat for chat in shelf_chats(50) if not any("tool_calls" in message for message in chat[0])]
    assert len(chats) > 350
    if name == "tinyllama-1.1b-chat":  # writes no tools
        chats = [(messages, None) for messages, _ in chats]
    for (messages, tools), encoded in zip(chats, encode_chats(tokenizer, chats, "assistant"), strict=True):
        expected = ANSWERS[name](messages)
        assert supervised_texts(tokenizer, messages, tools) == expected
        assert encoded.straddling_count == 0
        if name != "tinyllama-1.1b-chat":
            assert decode(tokenizer, encoded.token[encoded.supervised]) == "".join(expected)
        last = supervised_texts(tokenizer, messages, tools, "last")
        assert last == expected[-1:]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in WITH_TEMPLATE])
def test_supervision_starts_where_the_generation_prompt_ends(name: str) -> None:
    tokenizer, found = shelf(name), 0
    for messages, tools in shelf_chats(25):
        tools = None if name == "tinyllama-1.1b-chat" else tools  # it writes none
        try:
            text, spans = chat_spans(tokenizer, messages, tools, "assistant")
        except ValueError as error:
            assert re.search("single tool-calls|does not write its call|leaves it out", str(error))
            continue
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, (start, end) in zip(turns, spans, strict=True):
            prompt = render(tokenizer, messages[:turn], tools, add_generation_prompt=True)
            if text.startswith(prompt):
                found += 1
                assert start == len(prompt)
            assert tokenizer.end_of_turn.fullmatch(
                text[start:end].rpartition("<")[1] + text[start:end].rpartition("<")[2]
            )
    assert found > 300


CALL = {"type": "function", "function": {"name": "add", "arguments": {"values": [1, "é<"]}}}
WRITTEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"values": [1, "é<"]}}\n</tool_call>'
TOOL_CHAT = [
    user("Add"),
    assistant("", reasoning_content="A sum.", tool_calls=[CALL]),
    {"role": "tool", "content": "2"},
    assistant("It is 2.", reasoning_content="So."),
    user("Again"),
    assistant(None, reasoning_content="Once more.", tool_calls=[CALL]),
    {"role": "tool", "content": "2"},
    assistant("Still 2.", reasoning_content="Done."),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", ["\n" + WRITTEN_CALL, "It is 2.", "\n" + WRITTEN_CALL, "Still 2."]),
        (
            "qwen3",
            [
                WRITTEN_CALL,
                "It is 2.",
                f"<think>\nOnce more.\n</think>\n\n{WRITTEN_CALL}",
                "<think>\nDone.\n</think>\n\nStill 2.",
            ],
        ),
        (
            "minimind-6400",
            [
                f"A sum.\n</think>\n\n{WRITTEN_CALL}",
                "So.\n</think>\n\nIt is 2.",
                f"Once more.\n</think>\n\n{WRITTEN_CALL}",
                "Done.\n</think>\n\nStill 2.",
            ],
        ),
        (
            "llama-3.2",
            ['{"name": "add", "parameters": {"values": [1, "é<"]}}', "It is 2."]
            + ['{"name": "add", "parameters": {"values": [1, "é<"]}}', "Still 2."],
        ),
    ],
)
@pytest.mark.skipif(not SHELF.is_dir(), reason="no data shelf beside the project")
@pytest.mark.reference
def test_tool_calls_and_thoughts_are_supervised_as_the_template_writes_them(name: str, expected: list[str]) -> None:
    end = "<|eot_id|>" if name == "llama-3.2" else "<|im_end|>"
    found = supervised_texts(shelf(name), TOOL_CHAT, [{"type": "function", "function": {"name": "add"}}])
    # The generation prompt of Qwen2.5 already ends the line that its template begins a bare call with.
    assert [text.lstrip("\n") for text in found] == [text.lstrip("\n") + end for text in expected]


PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<s>",
    "[/INST]",
    "Assistant:",
    "User: ",
    "\n",
]
PIECES += [
    "\n\n",
    " ",
    "\r\n",
    "🦙",
    "👩‍👩‍👧",
    "e\u0301",
    "naïve",
    "\u2028",
    "go",
    "a",
    "<think>\n",
    "</think>",
    "{{ x }}",
]
CHARACTERS = st.characters(codec="utf-8", exclude_characters=[BLANK, OPEN, CLOSE])
CONTENT = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=4), max_size=6).map("".join)
EXCHANGES = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80)
@given(exchanges=EXCHANGES, same=st.booleans())
def test_supervised_text_is_rebuilt_exactly_from_any_messages(
    name: str, small: dict[str, Tokenizer], exchanges: list[tuple[str, str]], same: bool
) -> None:
    tokenizer, expected_answer = small[name], TEMPLATES[name][1]
    exchanges = exchanges[:1] * len(exchanges) if same else exchanges
    messages = [message for ask, answer in exchanges for message in (user(ask), assistant(answer))]
    text, spans = chat_spans(tokenizer, messages, None, "assistant")
    expected = [expected_answer(answer) for _, answer in exchanges]
    assert [text[start:end] for start, end in spans] == expected
    for turn, (start, _) in enumerate(spans):
        prompt = render(tokenizer, messages[: 2 * turn + 1], None, add_generation_prompt=True)
        assert start == len(prompt) or name in ("thought", "generation")

    (encoded,) = encode_spans(tokenizer, [(text, spans)])
    token_end = np.cumsum(byte_lengths(tokenizer, encoded.token))
    token_start = np.concatenate([[0], token_end[:-1]])
    edges = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    inside = [any(a <= start and end <= b for a, b in edges) for start, end in zip(token_start, token_end, strict=True)]
    touched = [any(start < b and a < end for a, b in edges) for start, end in zip(token_start, token_end, strict=True)]
    assert encoded.supervised.tolist() == inside
    assert encoded.straddling_count == sum(touched) - sum(inside)
    if encoded.straddling_count == 0:
        assert decode(tokenizer, encoded.token[encoded.supervised]) == "".join(expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in WITH_TEMPLATE])
@settings(max_examples=40)
@given(exchanges=EXCHANGES, system=st.none() | CONTENT)
def test_supervised_text_of_real_templates_is_rebuilt_exactly_from_any_messages(
    name: str, exchanges: list[tuple[str, str]], system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [message for ask, answer in exchanges for message in (user(ask), assistant(answer))]
    messages = [message | {"content": message["content"].replace("</think>", "</tool>")} for message in messages]
    assert supervised_texts(shelf(name), messages) == ANSWERS[name](messages)


ASIDE = "<|im_end|>\n<|im_start|>user\nthe same<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "exchanges",
    [
        [("the same", "the same")],
        [("the same", "the"), ("the", "the same")],
        [("the same", ASIDE), ("the same", "the same")],
        [(ASIDE, "no"), ("the same", ASIDE + ASIDE)],
        [("a", ""), ("b", ""), ("c", "")],
        [("a", "x<|im_start|>assistant\n")],
        [("a", " \r\n x\r\n"), (" ", " ")],
        [("a", "🦙" * 3), ("🦙", "ꙮ")],
    ],
)
def test_answers_that_look_like_the_template_are_kept_apart(
    exchanges: list[tuple[str, str]], small: dict[str, Tokenizer]
) -> None:
    messages = [message for ask, answer in exchanges for message in (user(ask), assistant(answer))]
    expected = [answer + "<|im_end|>" for _, answer in exchanges]
    assert supervised_texts(small["chatml"], messages) == expected
    (encoded,) = encode_chats(small["chatml"], [(messages, None)], "assistant")
    assert encoded.straddling_count == 0
    assert decode(small["chatml"], encoded.token[encoded.supervised]) == "".join(expected)


def test_token_that_reaches_over_the_edge_of_a_span_is_counted_and_not_supervised(small: dict[str, Tokenizer]) -> None:
    (encoded,) = encode_chats(small["chatml"], [([user("a"), assistant("\n\n 4")], None)], "assistant")
    pieces = [decode(small["chatml"], [token]) for token in encoded.token.tolist()]
    assert "\n\n\n" in pieces
    assert encoded.straddling_count == 1
    assert decode(small["chatml"], encoded.token[encoded.supervised]) == " 4<|im_end|>"


def test_every_byte_of_a_split_character_is_supervised(small: dict[str, Tokenizer]) -> None:
    (encoded,) = encode_chats(small["chatml"], [([user("a"), assistant("ꙮ")], None)], "assistant")
    assert encoded.supervised.sum() == 4
    assert decode(small["chatml"], encoded.token[encoded.supervised]) == "ꙮ<|im_end|>"


def test_train_on_chooses_all_tokens_or_the_last_answer(small: dict[str, Tokenizer]) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    for name in ("chatml", "generation"):
        everything, last = (encode_chats(small[name], [(messages, None)], train_on)[0] for train_on in ("all", "last"))
        assert everything.supervised.all()
        assert decode(small[name], last.token[last.supervised]) == "d<|im_end|>"
        np.testing.assert_array_equal(everything.token, last.token)


def test_prompt_and_completion_are_masked_by_their_span(small: dict[str, Tokenizer]) -> None:
    empty, encoded = encode_spans(small["chatml"], [("", []), ("hello world</s>", [(5, 15)])])
    assert empty.token.shape == empty.supervised.shape == (0,)
    assert decode(small["chatml"], encoded.token[encoded.supervised]) == " world</s>"


# What is refused

GOOD = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([], None, "not a list of messages"),
        ("Hello", None, "not a list of messages"),
        (None, None, "not a list of messages"),
        (["Hello"], None, "message 1 is str, not an object"),
        ([{"content": "a"}], None, "message 1: role None is unknown"),
        ([*GOOD, {"role": "gpt", "content": "a"}], None, "message 3: role 'gpt' is unknown"),
        ([{"role": ["user"], "content": "a"}], None, "is unknown"),
        ([{"role": "user"}, assistant("b")], None, r"message 1 \(user\): content is NoneType"),
        ([user("a"), assistant(None)], None, r"message 2 \(assistant\): content is NoneType"),
        ([user("a"), assistant(None, tool_calls=[])], None, "content is NoneType"),
        ([user("a"), assistant(None, tool_calls=["add"])], None, "tool_calls is not a list of objects with the name"),
        ([user("a"), assistant("", tool_calls=CALL)], None, "tool_calls is not a list"),
        ([user("a"), {"role": "assistant", "content": ["b"]}], None, "content is list"),
        ([user("a"), {"role": "assistant", "content": 4}], None, "content is int"),
        ([user("a"), assistant("b", reasoning_content=["c"])], None, "reasoning_content is list"),
        ([user("a\ud83e"), assistant("b")], None, r"U\+D83E is half a character"),
        ([user("a"), assistant("b", tool_calls=[{"name": "f", "arguments": {"\udc00": 1}}])], None, r"U\+DC00"),
        ([user("a\ufdd1"), assistant("b")], None, r"U\+FDD1"),
        ([{"role": "system", "content": "x"}] * 2 + GOOD, None, "2 system messages"),
        (GOOD, "add", "tools is str"),
        (GOOD, ["add"], "tools is list, not a list of objects"),
    ],
)
def test_bad_messages_are_refused_with_the_reason(messages: object, tools: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_messages(messages, tools)


def test_good_messages_pass() -> None:
    check_messages(GOOD, None)
    check_messages(TOOL_CHAT, [{"name": "add"}])
    check_messages([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{}"}])], [])


def with_template(directory: Path, source: str) -> Tokenizer:
    return load_tokenizer(write_tokenizer(directory, trained_backend(), chat_template=source))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            CHATML.replace("<|im_end|>", ""),
            r"message 2 \(assistant\).*continues with '\\n', which is no end-of-turn token",
        ),
        (CHATML.replace("message.content", "message.content | upper"), "does not write its content as it is"),
        (CHATML.replace("message.content", "message.content + message.content"), "writes its content 2 times"),
        (CHATML.replace("message.content", "''"), r"message 1 \(user\): the chat template leaves it out of this chat"),
        (CHATML.replace("message.content", "(message.content if loop.first else '')"), "writes its content 0 times"),
        (CHATML + "{{- messages[1].content | length }}", "writes what follows differently"),
        ("{{- '<%d' % messages[1].content | length }}" + CHATML, "writes what precedes differently"),
        (
            CHATML.replace("assistant\\n' }}", "model\\n' }}").replace("'<|im_start|>' +", "'# ' +"),
            "its beginning is not",
        ),
        ("{{- raise_exception('roles must alternate') }}", "refuses this chat: roles must alternate"),
        ("{{- messages.append(messages[0]) }}", "refuses this chat: .*append"),
        ("{{- ''.__class__.__mro__ }}", "refuses this chat: .*unsafe"),
        ("{{- messages[0].content + 1 }}", "refuses this chat: .*concatenate"),
    ],
)
def test_chat_whose_answers_cannot_be_found_for_certain_is_refused(source: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        chat_spans(with_template(tmp_path, source), [user("ab"), assistant("cd")], None, "assistant")


def test_added_token_of_white_space_ends_no_turn(tmp_path: Path) -> None:
    backend = Backend.from_str(trained_backend())
    backend.add_tokens(["\n"])
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path, backend.to_str(), chat_template=CHATML.replace("<|im_end|>", ""))
    )
    with pytest.raises(ValueError, match="no end-of-turn token"):
        chat_spans(tokenizer, GOOD, None, "assistant")


def test_answers_that_would_overlap_are_refused(tmp_path: Path) -> None:
    source = """{%- for message in messages %}{{- 'Answer:' if loop.index == 2 }}{{- message.content }}
        {{- ['', '</s>', '', '<|im_end|>'][loop.index0] }}{% endfor %}{{- 'Answer:' if add_generation_prompt }}"""
    with pytest.raises(ValueError, match=r"message 4 \(assistant\) can't be found .* it overlaps the answer before it"):
        chat_spans(with_template(tmp_path, source), [*GOOD, *GOOD], None, "assistant")


def test_template_that_writes_an_empty_answer_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path, CHATML.replace("+ '<|im_end|>", "+ ('\\n' if message.content else '') + '<|im_end|>")
    )
    assert supervised_texts(tokenizer, GOOD) == ["b\n<|im_end|>"]
    with pytest.raises(ValueError, match="its beginning is not where"):
        chat_spans(tokenizer, [user("a"), assistant("")], None, "assistant")


def test_thought_that_the_template_drops_is_not_missed(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML.replace("message.content", "message.content.split('</think>')[-1]"))
    assert supervised_texts(tokenizer, [user("a"), assistant("<think>\nHm.\n</think>\n\nb")]) == ["\n\nb<|im_end|>"]


def test_tool_call_that_the_template_leaves_out_is_refused(small: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="does not write its call of 'add'"):
        chat_spans(small["chatml"], [user("a"), assistant("", tool_calls=[CALL])], None, "assistant")


# What ends an answer


@pytest.mark.parametrize(
    ("files", "ends"),
    [  # `</s>`, the tokenizer's eos_token, is 1, and the chat template ends turns with `<|im_end|>`, 3
        ({}, {1: "eos_token", 3: "the chat template"}),
        ({"config.json": {"eos_token_id": 2}}, {2: "config.json", 1: "eos_token", 3: "the chat template"}),
        (
            {"generation_config.json": {"eos_token_id": [1, 0]}, "config.json": {"eos_token_id": 2}},
            {1: "generation_config.json", 0: "generation_config.json", 3: "the chat template"},
        ),
        (
            {"generation_config.json": {"top_p": 0.5}, "config.json": {"eos_token_id": [3]}},
            {3: "config.json", 1: "eos_token"},
        ),
    ],
)
def test_an_answer_ends_at_what_the_files_name_and_at_what_the_template_teaches(
    files: dict, ends: dict, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, trained_backend())
    for name, keys in files.items():
        (tmp_path / name).write_text(json.dumps(keys))
    tokenizer = load_tokenizer(tmp_path)
    assert list(tokenizer.ends.items()) == list(ends.items())
    assert "'<|im_end|>' (3, " in ends_in_words(tokenizer)
    exported = tmp_path / "exported"
    shutil.copytree(tmp_path, exported)
    for name, text in changed_files(tokenizer, "").items():
        (exported / name).write_text(text)
    assert set(load_tokenizer(exported).ends) == set(ends)  # the same, and now its consumers read all in one file
    named = json.loads((exported / "generation_config.json").read_text())
    assert named == files.get("generation_config.json", {}) | {"eos_token_id": list(ends)}
    assert changed_files(load_tokenizer(exported), "") == {}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_supervised_turn_ends_an_answer(name: str, small: dict[str, Tokenizer]) -> None:
    tokenizer = small[name]
    (encoded,) = encode_chats(tokenizer, [(GOOD, None)], "assistant")
    assert int(encoded.token[encoded.supervised][-1]) in tokenizer.ends


def test_without_a_template_or_with_one_that_refuses_the_files_alone_say_what_ends_an_answer(tmp_path: Path) -> None:
    assert with_template(tmp_path, "").ends == {1: "eos_token"}
    assert with_template(tmp_path, "{{ raise_exception('no') }}").ends == {1: "eos_token"}
    write_tokenizer(tmp_path, trained_backend(), chat_template="", eos_token=None)
    assert ends_in_words(load_tokenizer(tmp_path)) == "an answer ends at nothing but its limit of tokens"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", r"generation_config.json: holds a list, not an object"),
        ("[" * 10**5, r"generation_config.json: not JSON \(maximum recursion depth"),
        ('{"eos_token_id": "2"}', r"generation_config.json: eos_token_id = '2' is no token id; write one of the \d+"),
        ('{"eos_token_id": [1, [2]]}', r"eos_token_id = \[2\] is no token id"),
        ('{"eos_token_id": true}', r"eos_token_id = True is no token id"),
        ('{"eos_token_id": 99999}', r"eos_token_id = 99999 is no token id"),
    ],
)
def test_an_end_that_is_no_token_is_refused_with_its_file(text: str, reason: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, trained_backend())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        load_tokenizer(tmp_path)


def test_answers_learned_with_an_end_that_would_stop_none_are_refused(tmp_path: Path) -> None:
    content = "{{ message.content }}"
    tag = f"{{% if loop.first %}}{content}{{% else %}}{{% generation %}}{content}{{% endgeneration %}}{{% endif %}}"
    source = f"{{% for message in messages %}}{tag}{{{{ '<|im_end|>' }}}}{{% endfor %}}"
    with pytest.raises(ValueError, match=r"learned to end in '.*b', and answers stop only at </s>, <\|im_end\|>"):
        chat_spans(with_template(tmp_path, source), GOOD, None, "assistant")
    late = CHATML.replace("'<|im_end|>\\n'", "('<s>' if loop.index > 2 else '<|im_end|>') + '\\n'")
    with pytest.raises(ValueError, match="answers stop only at"):
        chat_spans(with_template(tmp_path, late), [*GOOD, *GOOD], None, "assistant")


def test_a_template_of_the_users_own_is_exported_wherever_one_is_looked_for(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, trained_backend())
    files = changed_files(load_tokenizer(directory, PLAIN), PLAIN)
    assert files["chat_template.jinja"] == Path(PLAIN).read_text()
    before = json.loads((directory / "tokenizer_config.json").read_text())
    assert json.loads(files["tokenizer_config.json"]) == before | {"chat_template": Path(PLAIN).read_text()}


# What a chat carries is written, learned, counted or refused

ROLES_BY_NAME = """{{- '<|im_start|>system\\nDefault<|im_end|>\\n' if messages[0].role != 'system' }}
{%- for message in messages %}{% if message.role in ('system', 'user', 'assistant', 'tool') %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CALLS = CHATML.replace(
    "message.content",
    "(message.content or '') + ((message.tool_calls[0].function.arguments | tojson) if message.tool_calls else '')",
)
# As Mistral's: turns must alternate but for calls, and the system message stands before a user message that is last.
ALTERNATING = """{%- set system = messages[0].content if messages[0].role == 'system' %}{{- bos_token }}
{%- set turns = messages[1:] if system else messages %}{% set ns = namespace(i=0) %}
{%- for m in turns if not (m.role == 'tool' or m.tool_calls is defined) %}
    {%- if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- set ns.i = ns.i + 1 %}{% endfor %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{- ('[TOOLS]' + (tools | tojson) if tools and loop.last) }}
    {{- '[INST] ' + (system + ' ' if system and loop.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
    {{- '[CALLS]' + (m.tool_calls | map(attribute='function') | list | tojson) + '</s>' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '</s>' }}
{%- else %}{{- '[RESULT]' + m.content + '[/RESULT]' }}{% endif %}{% endfor %}"""


def test_a_role_that_the_template_does_not_name_is_written_as_one_it_knows(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, ROLES_BY_NAME)
    chat = [{"role": "developer", "content": "Be brief."}, user("a"), assistant("b")]
    assert chat_spans(tokenizer, chat, None, "assistant")[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    chat = [user("a"), assistant("b"), {"role": "function", "name": "f", "content": "31"}, assistant("c")]
    assert "<|im_start|>tool\n31<|im_end|>" in chat_spans(tokenizer, chat, None, "assistant")[0]
    known = with_template(tmp_path, ROLES_BY_NAME.replace("'tool')", "'developer')"))
    assert render(known, [{"role": "developer", "content": "Be brief."}]).endswith("developer\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize("source", [CHATML, GENERATION])
def test_a_message_of_weight_0_is_context_only(tmp_path: Path, source: str) -> None:
    tokenizer = with_template(tmp_path, source)
    chat = [user("2 + 2?"), assistant("wrong", weight=0), user("Again."), assistant("4", weight=1)]
    assert supervised_texts(tokenizer, chat) == supervised_texts(tokenizer, chat, None, "last") == ["4<|im_end|>"]
    with pytest.raises(ValueError, match="weight 0 .*contradicts train_on = all"):
        chat_spans(tokenizer, chat, None, "all")
    with pytest.raises(ValueError, match="weight 0 leaves nothing to learn from"):
        chat_spans(tokenizer, chat[:2], None, "assistant")
    with pytest.raises(ValueError, match=r"message 2: weight is 0.5; write 0"):
        check_messages([user("a"), assistant("b", weight=0.5)], None)


def test_arguments_in_json_are_parsed_and_stay_text_where_a_template_takes_text(tmp_path: Path) -> None:
    arguments = '{"city":"Rome","days":null}'
    chat = [
        user("a"),
        assistant(None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}]),
    ]
    parsed = [
        user("a"),
        assistant(
            None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": json.loads(arguments)}}]
        ),
    ]
    tokenizer = with_template(tmp_path, CALLS)
    assert render(tokenizer, chat) == render(tokenizer, parsed)
    assert '{"city": "Rome", "days": null}' in render(tokenizer, chat)
    for written in ("{{ call }}", "{{ 'a' + call }}", "{{ call + 'a' }}", "{{ call ~ 'a' }}"):
        source = "{% set call = messages[1].tool_calls[0].function.arguments %}" + written
        assert arguments in render(with_template(tmp_path, source), chat)
    asked = "{% set call = messages[1].tool_calls[0].function %}{{ call.arguments if call.arguments is string }}"
    assert render(with_template(tmp_path, asked), chat) == arguments


def test_an_empty_list_of_calls_is_no_call(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path,
        CHATML.replace("{{- '<|im_start|>'", "{{- 'calls' if message.tool_calls is defined }}{{- '<|im_start|>'"),
    )
    chat = [user("a"), assistant("b", tool_calls=[], refusal=None)]
    assert render(tokenizer, chat) == render(tokenizer, GOOD) and "calls" not in render(tokenizer, chat)


def test_a_message_or_tool_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokenizer = with_template(tmp_path, CHATML)
    for messages, way_out in ((GOOD, True), ([*GOOD, user("a"), assistant("", tool_calls=[CALL])], False)):
        with pytest.raises(ValueError, match="does not write the tool 'add'; take a template that does") as refusal:
            chat_spans(tokenizer, messages, tools, "assistant")
        assert ("--data.0.tools-column none" in str(refusal.value)) == way_out
    only_turns = CHATML.replace(
        "{{- '<|im_start|>' + message", "{{- '' if message.role == 'system' else '<|im_start|>' + message"
    )
    with pytest.raises(ValueError, match=r"message 1 \(system\): the chat template leaves it out of this chat"):
        render_prompt(with_template(tmp_path, only_turns), [{"role": "system", "content": "x"}, user("a")])
    with pytest.raises(ValueError, match="does not write its call of 'add'"):
        chat_spans(
            with_template(tmp_path, GENERATION), [user("a"), assistant("", tool_calls=[CALL])], None, "assistant"
        )


@pytest.mark.parametrize("exchanges", [1, 2, 5])
def test_a_chat_is_rendered_once_for_each_answer_and_few_times_besides(
    small: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, exchanges: int
) -> None:
    counts, messages = list[tuple[Any, ...]](), GOOD * exchanges
    monkeypatch.setattr("lacuna.tokenizer.rendered", lambda *given: counts.append(given) or rendered(*given))
    cases: list[tuple[str, TrainOn, int]] = [("chatml", "assistant", exchanges + 2), ("chatml", "last", 3)]
    cases += [("chatml", "all", 2), ("generation", "assistant", 2)]
    for name, train_on, count in cases:
        chat_spans(small[name], messages, None, train_on)
        assert len(counts) == count
        counts.clear()
    render_prompt(small["chatml"], messages[:1])
    assert len(counts) == 2


def test_a_template_that_is_stable_in_part_works_or_says_what_it_leaves_out(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, ALTERNATING)
    calls = [user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "31"}, assistant("b")]
    written = '[CALLS][{"name": "add", "arguments": {"values": [1, "é<"]}}]</s>'
    assert supervised_texts(tokenizer, calls) == [written, " b</s>"]
    turns = [*GOOD, user("c"), assistant("d")]
    assert supervised_texts(tokenizer, [*turns, user("e")], [{"name": "add"}]) == [" b</s>", " d</s>"]
    with pytest.raises(ValueError, match=r"message 1 \(system\): .* leaves it out where an answer is last; join it"):
        chat_spans(tokenizer, [{"role": "system", "content": "x"}, *GOOD], None, "assistant")


def test_thoughts_and_texts_that_are_left_out_are_counted() -> None:
    chat = [
        user("a"),
        assistant("b", reasoning_content=" one \n", thinking="one"),
        assistant("<think>\ntwo\n</think>\n\nc"),
        assistant("three", tool_calls=[CALL]),
    ]
    assert left_out_thoughts(chat, "one two three") == 0
    assert left_out_thoughts(chat, "b c add") == 3


def test_variables_reach_the_template_from_its_tokenizer_and_from_a_chat(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, trained_backend(), chat_template="{{ mode }} {{ enable_thinking }}")
    tokenizer = load_tokenizer(directory, "", "2024-07-26", {"mode": "brief", "enable_thinking": True})
    assert render(tokenizer, GOOD) == "brief True"
    assert render(tokenizer, GOOD, variables={"enable_thinking": False}) == "brief False"
    for name in ("messages", "enable_thinkng"):
        wrong = f"the chat template reads no variable {name}; those it reads: enable_thinking, mode"
        with pytest.raises(ValueError, match=f"chat_template_kwargs: {wrong}"):
            render(tokenizer, GOOD, variables={name: []})
        with pytest.raises(UserError, match=f"template_variables: {wrong}"):
            load_tokenizer(directory, "", "2024-07-26", {"mode": "brief", name: []})


def test_a_variable_that_one_of_two_templates_reads_may_be_given(tmp_path: Path) -> None:
    named = [
        {
            "name": "default",
            "template": "{% macro m() %}{{ mode }}{% endmacro %}{{ bos_token }}{{ strftime_now('%d') }}",
        },
        {
            "name": "tool_use",
            "template": "{% if not brief is defined %}{% set brief = 1 %}{% endif %}{{ tools }}{{ brief }}",
        },
    ]
    directory = write_tokenizer(tmp_path, trained_backend(), chat_template=named)
    assert load_tokenizer(directory, "", "2024-07-26", {"mode": 1, "brief": 2}).readable == {"mode", "brief"}


def test_a_chat_with_tools_takes_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    directory = write_tokenizer(tmp_path, trained_backend(), chat_template=named)
    assert render(load_tokenizer(directory), GOOD, [{"name": "add"}]) == '[{"name": "add"}]'
    assert render(load_tokenizer(directory), GOOD) == render(load_tokenizer(directory), GOOD, []) == "plain"
    (directory / "chat_template.jinja").write_text("file")
    assert render(load_tokenizer(directory), GOOD, [{"name": "add"}]) == "file"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert render(load_tokenizer(directory), GOOD, [{"name": "add"}]) == "tools"


@pytest.mark.parametrize(
    "place", ["added_tokens_decoder", "added_tokens.json", "additional_special_tokens", "extra_special_tokens"]
)
def test_a_token_named_beside_the_tokenizer_is_one_token(tmp_path: Path, place: str) -> None:
    size = load_tokenizer(write_tokenizer(tmp_path, trained_backend())).vocabulary_size

    def named(id: int) -> Tokenizer:
        values: dict[str, Any] = {
            "added_tokens_decoder": {str(id): {"content": "<|new|>", "special": True}},
            "additional_special_tokens": ["<|new|>"],
            "extra_special_tokens": {"x_token": "<|new|>"},
        }
        write_tokenizer(tmp_path, trained_backend(), **{key: value for key, value in values.items() if key == place})
        if place == "added_tokens.json":
            (tmp_path / place).write_text(json.dumps({"<|new|>": id}))
        return load_tokenizer(tmp_path)

    tokenizer = named(size)
    assert size in encode(tokenizer, "a<|new|>b", add_special_tokens=False) and tokenizer.vocabulary_size == size + 1
    if place.startswith("added"):
        with pytest.raises(UserError, match=rf"'<\|new\|>' is token {size + 5} by .*, and {size} after"):
            named(size + 5)


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    backend = Backend.from_str(trained_backend())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, backend.to_str()))
    plain, written = (encode(tokenizer, text, add_special_tokens=True).tolist() for text in ("hello", "<s>hello"))
    assert plain == written and plain.count(tokenizer.bos_id) == 1
    assert encode(tokenizer, "<s><s>hello", add_special_tokens=True).tolist() == [0, *plain]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in (*WITH_TEMPLATE, "gpt2")])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Sentiment: ", "positive"), ("a\n", "\nb"), ("x", "y"), ("1", " 2")]
)
def test_a_completion_encoded_apart_is_learned_whole_and_asked_for_as_trained(
    name: str, prompt: str, completion: str
) -> None:
    tokenizer = shelf(name)
    encoded = encode_apart(tokenizer, prompt, completion)
    asked = encode(tokenizer, prompt, add_special_tokens=False)
    assert encoded.token[~encoded.supervised].tolist() == asked.tolist()
    text = decode(tokenizer, encoded.token)
    assert text == prompt + completion
    assert decode(tokenizer, encoded.token[encoded.supervised]).strip() == completion.strip()


# Loading


def test_template_comes_from_the_named_file_then_jinja_file_then_config(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, trained_backend(), chat_template="from config")
    assert render(load_tokenizer(directory), GOOD) == "from config"
    (directory / "chat_template.jinja").write_text("from file\n")
    assert render(load_tokenizer(directory), GOOD) == "from file"
    (directory / "named.jinja").write_text("named {{ bos_token }}{{ pad_token }}{{ eos_token }}")
    named = load_tokenizer(directory, str(directory / "named.jinja"))
    assert render(named, GOOD) == "named <s></s>"
    assert named.template_source == "named {{ bos_token }}{{ pad_token }}{{ eos_token }}"


def test_default_is_taken_from_a_list_of_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained_backend(), chat_template=named))
    assert render(tokenizer, GOOD) == "default"
    with pytest.raises(UserError, match=r"no chat template is named 'default', only \['tool_use'\]"):
        load_tokenizer(write_tokenizer(tmp_path, trained_backend(), chat_template=named[:1]))


def test_special_tokens_of_the_map_fill_those_missing_in_the_config(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, trained_backend(), pad_token=None)
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>", "unk_token": {"content": "<s>"}}')
    tokenizer = load_tokenizer(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory).eos_id == 3


def test_missing_or_broken_files_are_named_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: no such file; give a directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="convert tokenizer.model with transformers.* .with sentencepiece and protobuf"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    directory = write_tokenizer(tmp_path, trained_backend(), eos_token="<none>")
    with pytest.raises(UserError, match=r"eos_token '<none>' is not in tokenizer.json"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not JSON"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config.json: no eos_token"):
        end_of_text_id(load_tokenizer(directory))
    with pytest.raises(UserError, match=r"no chat template .* --chat-template configs/chat_template.jinja"):
        render(load_tokenizer(directory), GOOD)
    with pytest.raises(UserError, match=r"absent.jinja: no such file"):
        load_tokenizer(directory, str(tmp_path / "absent.jinja"))
    (directory / "chat_template.jinja").write_text("{{ 1 }}\n{% if %}")
    with pytest.raises(UserError, match=r"chat_template.jinja: line 2 of the chat template"):
        load_tokenizer(directory)


def test_loaded_tokenizer_neither_truncates_nor_pads_nor_trims_offsets(tmp_path: Path) -> None:
    backend = Backend.from_str(trained_backend())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, backend.to_str()))
    text = "the answer is  4 \n"
    (encoded,) = encode_spans(tokenizer, [(text, [(0, len(text))])])
    assert decode(tokenizer, encoded.token) == text
    assert encoded.supervised.all()


def test_template_may_be_indented_leave_loops_and_write_plain_json(tmp_path: Path) -> None:
    source = """  {% for message in messages %}
    {% if loop.index == 2 %}{% break %}{% endif %}
{{ message | tojson(indent=1) }}
  {% endfor %}
end"""
    text = render(with_template(tmp_path, source), [user("<é 'x'>"), assistant("b")])
    assert text == '{\n "role": "user",\n "content": "<é \'x\'>"\n}\nend'


def test_template_date_is_today(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, trained_backend(), chat_template="{{ strftime_now('%d %b %Y') }}")
    assert render(load_tokenizer(directory), GOOD) == "26 Jul 2024"
    assert render(load_tokenizer(directory, template_date="2031-01-02"), GOOD) == "02 Jan 2031"


def test_vocabulary_size_is_one_more_than_the_largest_id(small: dict[str, Tokenizer]) -> None:
    tokenizer = small["chatml"]
    assert tokenizer.backend.id_to_token(tokenizer.vocabulary_size - 1) is not None
    assert tokenizer.backend.id_to_token(tokenizer.vocabulary_size) is None


# Text that grows token by token

TEXTS = ["plain words, and  spaces", "naïve café 東京 🦜🦜 ไทย", "a\n\n\tb", "🏳️‍🌈 e\u0301"]


def text_of(tokenizer: Tokenizer, token: list[int]) -> str:
    return decode(tokenizer, token, skip_special_tokens=True)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in (*WITH_TEMPLATE, "gpt2")])
@pytest.mark.parametrize("text", TEXTS)
def test_text_streamed_token_by_token_is_whole_and_never_half_a_character(name: str, text: str) -> None:
    tokenizer = shelf(name)
    token = encode(tokenizer, "Say: " + text, add_special_tokens=False).tolist()
    whole = text_of(tokenizer, token)
    for prompt in range(1, len(token)):
        stream = TextStream(tokenizer, token[:prompt])
        pieces = "".join(stream.add([each]) for each in token[prompt:])
        assert "\ufffd" not in pieces and stream.rest() == ""
        assert TextStream(tokenizer, token[:prompt]).add(token[prompt:]) == pieces
        prefixes = [commonprefix([text_of(tokenizer, token[:end]), whole]) for end in range(1, prompt + 1)]
        assert max(prefixes, key=len) + pieces == whole


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_shelf) for name in (*WITH_TEMPLATE, "gpt2")])
def test_broken_characters_neither_repeat_nor_lose_other_text(name: str) -> None:
    """Byte tokens in any order between words: each whole word comes once, despite broken characters beside it."""
    tokenizer, random = shelf(name), np.random.default_rng(0)
    word, bird = (encode(tokenizer, text, add_special_tokens=False).tolist() for text in (" word", "🦜é🦜"))
    for _ in range(50):
        parts = [word if random.random() < 0.3 else [int(random.choice(bird))] for _ in range(20)]
        token = [each for part in parts for each in part]
        for prompt in (1, 5, 10):
            stream = TextStream(tokenizer, token[:prompt])
            text = "".join(stream.add([each]) for each in token[prompt:]) + stream.rest()
            whole = text_of(tokenizer, token)
            assert text.count("word") == whole.count("word") - text_of(tokenizer, token[:prompt]).count("word")


def test_a_broken_character_is_streamed_once_it_has_ended(small: dict[str, Tokenizer]) -> None:
    tokenizer = small["chatml"]
    bird = encode(tokenizer, "ꙮ", add_special_tokens=False).tolist()
    letter = encode(tokenizer, "x", add_special_tokens=False).tolist()
    assert len(bird) >= 2
    stream = TextStream(tokenizer, letter)
    assert (stream.add(bird[:1]), stream.rest(), stream.add(letter), stream.rest()) == ("", "\ufffd", "\ufffdx", "")


# configs/chat_template.jinja


def test_plain_template_writes_a_line_for_each_message(small: dict[str, Tokenizer]) -> None:
    messages = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("Bye")]
    text = render(small["plain"], messages, add_generation_prompt=True)
    assert text == "<s>System: Be kind.\nUser: Hi\nAssistant: Hello.</s>\nUser: Bye\nAssistant:"
    with pytest.raises(ValueError, match="knows no tools and no role 'tool'"):
        render(small["plain"], [user("a"), {"role": "tool", "content": "b"}])


@pytest.mark.skipif(not SHELF.is_dir(), reason="no data shelf beside the project")
@pytest.mark.reference
@pytest.mark.parametrize("name", ["weights/stories260k", "tokenizers/gpt2"])
def test_plain_template_trains_answers_of_models_without_one(name: str) -> None:
    tokenizer = load_tokenizer(SHELF / name, PLAIN)
    chats = [(chat[0], None) for chat in shelf_chats(20) if not any("tool_calls" in message for message in chat[0])]
    eos = tokenizer.special_tokens["eos_token"]
    for (messages, _), encoded in zip(chats, encode_chats(tokenizer, chats, "assistant"), strict=True):
        answers = [f" {message['content']}{eos}" for message in messages if message["role"] == "assistant"]
        assert supervised_texts(tokenizer, messages) == answers
        assert encoded.straddling_count == 0
        assert encoded.token[0] == tokenizer.bos_id
        assert np.sum(encoded.token[encoded.supervised] == tokenizer.eos_id) == len(answers)
        assert encoded.token.max() < tokenizer.vocabulary_size
