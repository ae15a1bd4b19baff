"""Write configs/tiny: a small Qwen3-type model, its tokenizer, and generated text to train it on, from one seed.

    uv run python scripts/make_tiny.py

The chats are arithmetic word problems whose answer repeats each event of the question beside its calculation, so that
a model of a million parameters learns them in minutes; those of short.jsonl are answered by the bare result. The sums
of sums.jsonl are too large for such a model, and those of calls.jsonl are answered by calling a calculator. The
constants below decide how hard they are.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parents[1] / "configs" / "tiny"
SEED = 0

TRAIN_COUNT, SHORT_COUNT, HELDOUT_COUNT, PRETRAIN_COUNT = 4000, 4000, 500, 1500
CALLS_COUNT, SUMS_COUNT, HELDOUT_SUMS_COUNT = 2000, 2000, 300
TERM = (100, 999)
STEPS = (1, 3)
START = (3, 15)
GROUPS, GROUP_SIZE = (2, 4), (2, 5)
OPERAND = {"+": (2, 6), "-": (2, 6), "×": (2, 3)}
RESULT = (1, 20)
GROUPED_SHARE = 0.3
QUESTION_FIRST_SHARE = 0.2

NAMES = "Maya Tom Lena Omar Ruth Ivan Nora Hugo Aisha Ben Clara Diego Emil Freya Kenji Zoe".split()
THINGS = "apples pears marbles books coins shells stickers pencils stamps buttons stones cards".split()
CONTAINERS = "bags boxes jars".split()
EVENTS = {
    "+": (
        "{name} buys {count} more {things}",
        "{name} finds {count} {things}",
        "{name} wins {count} {things}",
        "{friend} gives {name} {count} {things}",
    ),
    "-": (
        "{name} loses {count} {things}",
        "{name} sells {count} {things}",
        "{name} gives {friend} {count} {things}",
        "{name} leaves {count} {things} at school",
    ),
    "×": ("{name} trades for {count} times as many {things}",),
}
WHEN = ("", "Then ", "Later ", "After that ", "The next day ")
ASK = ("How many {things} does {name} have now?", "How many {things} does {name} have in the end?")

PLACES = "by the sea,in a small town,near the forest,on a farm,next to the school".split(",")
COLOURS = "black white brown grey golden".split()
PETS = "cat dog rabbit duck pony".split()
WEATHERS = "sunny rainy windy cold warm".split()
MOODS = "happy tired proud quiet hungry".split()

VOCABULARY = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, _, END_OF_TURN = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TURN,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 1024,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
TOKENIZER_CONFIG = {
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": SPECIAL_TOKENS[END_OF_TURN],
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION_CONFIG = {
    "do_sample": False,
    "eos_token_id": [END_OF_TURN, END_OF_TEXT],
    "pad_token_id": END_OF_TEXT,
}


def calculate(left: int, symbol: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "×": left * right}[symbol]


def opening(random: Random) -> tuple[str, str, int]:
    """What the name has at first, the same as a worked step, and how many that is."""
    if random.random() >= GROUPED_SHARE:
        start = random.randint(*START)
        clause = f"{{name}} has {start} {{things}}"
        return clause, clause, start
    groups, size = random.randint(*GROUPS), random.randint(*GROUP_SIZE)
    clause = f"{{name}} has {groups} {random.choice(CONTAINERS)} with {size} {{things}} each"
    return clause, f"{clause}: {groups} × {size} = {groups * size}", groups * size


def event(total: int, random: Random) -> tuple[str, str, int]:
    """What happens next, the same as a worked step, and the new total, which stays within RESULT."""
    while True:
        symbol = random.choice(list(EVENTS))
        count = random.randint(*OPERAND[symbol])
        result = calculate(total, symbol, count)
        if RESULT[0] <= result <= RESULT[1]:
            clause = random.choice(EVENTS[symbol]).replace("{count}", str(count))
            return clause, f"{clause}: {total} {symbol} {count} = {result}", result


def problem(random: Random) -> tuple[str, str]:
    """A question and its worked answer."""
    first, worked, total = opening(random)
    sentences, lines = [first], [worked]
    for _ in range(random.randint(*STEPS) - (":" in worked)):
        clause, worked, total = event(total, random)
        sentences.append(random.choice(WHEN) + clause)
        lines.append(worked)
    story, ask = ". ".join(sentences) + ".", random.choice(ASK)
    question = f"{ask} {story}" if random.random() < QUESTION_FIRST_SHARE else f"{story} {ask}"
    answer = ".\n".join(lines) + f".\n#### {total}"
    name, friend = random.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": random.choice(THINGS)}
    return question.format(**words), answer.format(**words)


def short_story(random: Random) -> str:
    name, friend = random.sample(NAMES, 2)
    colour, thing, pet = random.choice(COLOURS), random.choice(THINGS), random.choice(PETS)
    weather, mood, count = random.choice(WEATHERS), random.choice(MOODS), random.randint(*OPERAND["+"])
    middle = (
        f"{name} and {friend} look for {thing} and find {count}.",
        f"{friend} shows {name} a box with {count} {colour} {thing}.",
        f"The {pet} runs away and {friend} finds it under a tree.",
        f"{name} draws a {colour} {pet} and gives it to {friend}.",
        f"{friend} tells a story about a {pet} that could count to {count}.",
    )
    sentences = [
        f"{name} lives {random.choice(PLACES)} and has a {colour} {pet}.",
        f"One {weather} day {friend} comes to play.",
        *random.sample(middle, 2),
        f"In the evening they are {mood} and go home.",
    ]
    return " ".join(sentences)


def number_facts(random: Random) -> str:
    """Sums, differences, products and counting around one number."""
    number, step = random.randint(OPERAND["-"][1], START[1]), random.randint(*OPERAND["+"])
    counts = ", ".join(str(number + step * turn) for turn in range(5))
    facts = [f"Count on from {number} by {step}: {counts}."]
    for symbol, operands in OPERAND.items():
        for right in random.sample(range(operands[0], operands[1] + 1), 2):
            facts.append(f"{number} {symbol} {right} = {calculate(number, symbol, right)}.")
    random.shuffle(facts)
    return "\n".join(facts)


def pretraining_text(random: Random) -> str:
    return random.choice((short_story, number_facts))(random)


Item = TypeVar("Item")


def distinct(draw: Callable[[Random], Item], count: int, random: Random) -> list[Item]:
    items: dict[Item, None] = {}
    while len(items) < count:
        items[draw(random)] = None
    return list(items)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with one token per digit, so that numbers are spelled alike wherever they stand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def large_sum(random: Random) -> tuple[int, str, int]:
    """A sum, a difference or a product of large numbers."""
    return random.randint(*TERM), random.choice("+-×"), random.randint(*TERM)


TOOLS = [{"type": "function", "function": {"name": "calculate", "parameters": {"properties": {"expression": {}}}}}]


def answered_sum(terms: tuple[int, str, int], calls: bool) -> dict[str, Any]:
    """A chat about a sum, which the calculator works out or the answer states outright."""
    result, (left, symbol, right) = calculate(*terms), terms
    question, *answer = chat(f"What is {left} {symbol} {right}?", f"#### {result}")["messages"]
    if calls:
        arguments = {"expression": f"{left} {symbol} {right}".replace("×", "*")}
        call = {"type": "function", "function": {"name": "calculate", "arguments": arguments}}
        said = {"role": "tool", "name": "calculate", "content": str(result)}
        answer = [{"role": "assistant", "content": "", "tool_calls": [call]}, said, *answer]
    return {"tools": TOOLS, "messages": [question, *answer]}


def write_json(name: str, value: dict[str, Any]) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(name: str, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / name).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    random = Random(SEED)
    problems = distinct(problem, HELDOUT_COUNT + TRAIN_COUNT + SHORT_COUNT, random)
    chats = [chat(question, answer) for question, answer in problems[: HELDOUT_COUNT + TRAIN_COUNT]]
    short = [chat(question, answer.splitlines()[-1]) for question, answer in problems[HELDOUT_COUNT + TRAIN_COUNT :]]
    texts = distinct(pretraining_text, PRETRAIN_COUNT, random)

    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json("config.json", CONFIG)
    write_json("tokenizer_config.json", TOKENIZER_CONFIG)
    write_json("generation_config.json", GENERATION_CONFIG)
    write_lines("train.jsonl", chats[HELDOUT_COUNT:])
    write_lines("short.jsonl", short)
    write_lines("heldout.jsonl", chats[:HELDOUT_COUNT])
    write_lines("pretrain.jsonl", [{"text": text} for text in texts])
    sums = distinct(large_sum, HELDOUT_SUMS_COUNT + CALLS_COUNT + SUMS_COUNT, Random(SEED))
    chosen = iter(sums)
    for name, count in (("heldout_sums", HELDOUT_SUMS_COUNT), ("calls", CALLS_COUNT), ("sums", SUMS_COUNT)):
        write_lines(f"{name}.jsonl", (answered_sum(next(chosen), name == "calls") for _ in range(count)))
    turns = [f"{message['role']}\n{message['content']}" for row in chats for message in row["messages"]]
    tokenizer = train_tokenizer([*turns, *texts])
    tokenizer.save(str(FOLDER / "tokenizer.json"))


if __name__ == "__main__":
    main()
