"""Evaluation: held-out loss, likelihoods, generated answers and their comparison, and the command eval."""

import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn, track

from lacuna import checkpoint, metrics, trainer
from lacuna.checkpoint import OpenedModel
from lacuna.config import (
    DataSource,
    EvalConfig,
    ProblemKeys,
    RowsConfig,
    SamplingKeys,
    SftConfig,
    UserError,
    to_toml,
)
from lacuna.data import (
    Batch,
    Dataset,
    bound,
    checked_text,
    describe,
    load_dataset,
    local_bounds,
    local_files,
    read_rows,
    usable,
)
from lacuna.distributed import (
    Watchdog,
    check_same,
    enable_compilation_cache,
    from_first,
    is_first,
    make_mesh,
    put_batch,
    row_shards,
)
from lacuna.model import (
    ModelConfig,
    cast,
    check_sequence_length,
    embed,
    forward,
    head_of,
    parameter_counts,
    token_statistics,
)
from lacuna.sampler import Completion, Request, Sampler, generation_defaults, power_of_two
from lacuna.tokenizer import Message, Tokenizer, check_message, encode, render
from lacuna.trainer import Evaluation

SAMPLE_SLOTS = 8


@partial(jax.jit, static_argnames=("model", "dtype"))
def held_out_sums(params: PyTree[Array], batch: Batch, model: ModelConfig, dtype: str) -> dict[str, Array]:
    """Sums over the targets of a batch [1, row, token]: loss, likeliest-token hits, and targets."""
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    compute = cast(params, model, dtype)
    hidden = forward(compute, embed(compute, batch.token), batch.segment, batch.position, model)
    found = token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size)
    return {"loss": jnp.sum(found.loss * batch.weight), "correct": jnp.sum(found.is_correct * batch.weight)}


def held_out_loss(
    params: PyTree[Array],
    dataset: Dataset,
    batch_size: int,
    opened: OpenedModel,
    dtype: str,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Mean loss (nats), share of targets that were the likeliest token, and count over all targets of a data set."""
    row_count = dataset.rows.row_count(1)
    loss, correct, targets = 0.0, 0.0, 0
    for index in progress(range(-(-row_count // batch_size))):
        batch = dataset.batch(index, batch_size, row_count)
        placed = put_batch(jax.tree.map(lambda leaf: leaf[None], batch), opened.mesh)
        sums = held_out_sums(params, placed, opened.model, dtype)
        loss, correct = loss + float(sums["loss"]), correct + float(sums["correct"])
        targets += int(batch.weight.sum())
    return {"eval_loss": loss / targets, "eval_accuracy": correct / targets, "target_tokens": targets}


def sample_requests(config: RowsConfig, opened: OpenedModel) -> list[Request]:
    """The page's sample prompts as the sampler takes them: sft asks by the chat template, pretrain gives plain text."""
    _, model, tokenizer, _, _ = opened
    rules = SamplingKeys(temperature=0.0, max_tokens=config.sample_tokens)
    _, stop_ids = generation_defaults(tokenizer.directory, tokenizer)
    requests = []
    for prompt in config.sample_prompts:
        chat = [{"role": "user", "content": prompt}]
        try:
            text = (
                render(tokenizer, chat, None, add_generation_prompt=True) if isinstance(config, SftConfig) else prompt
            )
        except ValueError as error:
            raise UserError(f"sample_prompts: {prompt!r}: {error}") from error
        token = encode(tokenizer, text, add_special_tokens=not isinstance(config, SftConfig))
        check_sequence_length(model, len(token) + config.sample_tokens)
        requests.append(Request(tuple(token.tolist()), rules, stop_ids))
    return requests


def sampled_texts(config: RowsConfig, params: PyTree[Array], opened: OpenedModel) -> dict[str, str]:
    """Greedy answers (sft) or continuations (pretrain) of `sample_prompts`."""
    requests = sample_requests(config, opened)
    shards, capacity = row_shards(opened.mesh), max(len(request.prompt) for request in requests) + config.sample_tokens
    slots = -(-min(len(requests), SAMPLE_SLOTS) // shards) * shards
    sampler = Sampler(params, opened, slots, capacity, config.compute_dtype)
    completions = sampler.generate(requests)
    return dict(zip(config.sample_prompts, (completion.text for completion in completions), strict=True))


def evaluation_of_rows(tasks: EvalConfig | None, config: RowsConfig, opened: OpenedModel) -> Evaluation:
    """What pretrain and sft measure while they train: held-out loss, samples, and the tasks of eval_config.

    Raises:
        UserError: what can't be asked.
    """
    held_out, lines, digest = None, list[str](), ""
    if config.eval_data:
        held_out = load_dataset(config.eval_data, opened.tokenizer, config, is_stream=False, is_shuffled=False)
        lines.append(f"held-out data: {describe(held_out.facts)}")
        for documents in held_out.documents:
            lines += [f"left out: {example}" for example in documents.facts["bad_examples"]]
        digest = repr([documents.facts["digest"] for documents in held_out.documents])
    sample_requests(config, opened)
    if tasks:
        read_questions(tasks, opened)

    def measure_params(params: PyTree[Array], watchdog: Watchdog) -> dict[str, Any]:
        def reported(batches: range) -> Iterator[int]:
            for index in batches:
                yield index
                watchdog.report_progress()

        figures: dict[str, Any] = {}
        if config.sample_prompts:
            figures["samples"] = sampled_texts(config, params, opened)
        if tasks:
            watchdog.pause()
            figures |= measure_in_training(tasks, Subject(opened, params))
        watchdog.pause()
        if held_out:
            rows = config.micro_batch_size * row_shards(opened.mesh)
            result = held_out_loss(params, held_out, rows, opened, config.compute_dtype, reported)
            figures |= {key: result[key] for key in ("eval_loss", "eval_accuracy")}
        return figures

    return Evaluation(lines, digest, measure_params)


@dataclass(frozen=True)
class Problem:
    """One row: where it is from, the text and tokens asked, the reference answer, and the row itself; `stated` is the
    answer as the row has it, which may be a number."""

    origin: str
    prompt: str
    token: tuple[int, ...]
    answer: str
    row: dict[str, Any] = field(repr=False)
    stated: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Problems:
    """All problems, source by source; `counts` and `digests` go by source, `bad` tells of rows left out."""

    problems: tuple[Problem, ...]
    counts: tuple[int, ...]
    digests: tuple[str, ...]
    bad: tuple[str, ...]


def read_problems(
    sources: Sequence[DataSource],
    config: ProblemKeys,
    tokenizer: Tokenizer,
    longest: int,
    skips_bad: bool,
    wants_answers: bool,
) -> Problems:
    """The problems of all sources: of a chat, what stands before its last answer is the prompt; else the columns of
    prompt and completion. One of more than `longest` tokens is bad, and one without an answer where they are wanted.

    Raises:
        UserError: unreadable data, a bad row unless they are skipped, or nothing left.
    """
    problems, counts, digests, bad = [], [], [], list[str]()
    for source in sources:
        rows = list(read_rows(source))
        bounds = local_bounds(source.split) if local_files(source.path) else ("", "")
        rows = rows[slice(*(bound(text, len(rows)) for text in bounds))]

        def use(origin: str, row: dict[str, Any], source: DataSource = source) -> Problem:
            return problem_of(origin, row, source, config, tokenizer, longest, wants_answers)

        found = list(usable(rows, use, skips_bad, bad))
        if not found:
            raise UserError(f"{source.path}, {source.split}: no problem to ask ({'; '.join(bad[:1]) or 'no rows'})")
        asked = json.dumps([(problem.token, problem.answer) for problem in found])
        digests.append(hashlib.sha256(asked.encode()).hexdigest())
        counts.append(len(found))
        problems += found
    return Problems(tuple(problems), tuple(counts), tuple(digests), tuple(bad))


def problem_of(
    origin: str,
    row: dict[str, Any],
    source: DataSource,
    config: ProblemKeys,
    tokenizer: Tokenizer,
    longest: int,
    wants_answers: bool,
) -> Problem:
    """The problem in a row. Raises ValueError with the reason where there is none."""
    messages, answer = asked(row, source, config.prompt_template)
    if answer is None and wants_answers:
        raise ValueError(f"no reference answer; set completion_column to its column ({', '.join(row)})")
    if config.system_prompt:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    has_template = tokenizer.template is not None
    if has_template:
        text = render(tokenizer, messages, row.get(source.tools_column) or None, add_generation_prompt=True)
    else:
        text = "\n\n".join(str(message["content"]) for message in messages)
    token = tuple(encode(tokenizer, text, add_special_tokens=not has_template).tolist())
    if len(token) > longest:
        raise ValueError(f"the prompt has {len(token):,} tokens, and there is room for {longest:,}")
    told = {} if answer is None else {"answer": answer}
    return Problem(origin, text, token, answer or "", row | told, row.get(source.completion_column, answer))


def asked(row: dict[str, Any], source: DataSource, prompt_template: str) -> tuple[list[Message], str | None]:
    """The messages before the answer, the last of them in the template, and the reference answer, if there is one."""
    messages, prompt = row.get(source.messages_column), row.get(source.prompt_column)
    answer = row.get(source.completion_column)
    if messages is None and prompt is not None:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"no problem in the columns {', '.join(row) or '(none)'}: wanted are {source.messages_column}, or "
            f"{source.prompt_column} with {source.completion_column}; set prompt_column and the like"
        )
    for number, message in enumerate(messages, 1):
        check_message(f"message {number}", message)
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        *messages, last = messages
        answer = last["content"]
    *before, question = messages
    content = checked_text(question["content"], "content")
    asked = [*before, question | {"content": prompt_template.replace("{prompt}", content)}]
    return asked, None if answer is None else str(answer)


SEEN = 20_000  # characters at the end of a text in which its answer is looked for
MOST_DIGITS = 60
SIGN = r"####|\\boxed\s{0,4}\{|\\fbox\s{0,4}\{|<answer>"
FORMAL_MARK = re.compile(SIGN, re.IGNORECASE)
MARK = re.compile(rf"{SIGN}|\b(?:final\s{{1,4}})?answer\s{{0,4}}(?:is|:|=)", re.IGNORECASE)
ANSWER_END = re.compile(r"</answer>|<\|", re.IGNORECASE)
NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-−–+]?)[ ]?(?:[$€£¥]|\\\$)?[ ]?(?P<minus>[-−–]?)
    (?:\\[dt]?frac\{(?P<top>[-−–]?\d{1,60}(?:\.\d{1,60})?)\}\{(?P<bottom>[-−–]?\d{1,60}(?:\.\d{1,60})?)\}
    |(?P<whole>\d{1,3}(?:,\d{3}){1,19}(?!\d)|\d{1,3}(?:[ _\u202f\u00a0]\d{3}){1,19}(?![\d,])|\d{1,60}(?!\d)|(?=\.\d))
     (?P<part>\.\d{1,60}(?!\d))?(?P<power>[eE][-+]?\d{1,2}(?!\w))?
     (?:(?P<mixed>[ ]\d{1,20})?[ ]?/[ ]?(?P<under>\d{1,60}))?)
    (?!\d|[eE][-+]?\d)""",
    re.VERBOSE,
)
SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})")
SHORT_FRACTION = re.compile(r"(\\[dt]?frac)(\d)(\d)")
NOT_CONTENT = re.compile(r"\\(?:text|mathrm|left|right|,|;|!)|[{}$\\*]")


def final_answer(text: str) -> str | None:
    """What follows the last of the marks `####`, `\\boxed{}`, `<answer>` and "answer is", else the last number."""
    if found := marked_answer(text, MARK):
        return found
    numbers = [match[0].strip() for match in NUMBER.finditer(plain_numbers(text[-SEEN:]))]
    return numbers[-1] if numbers else None


def marked_answer(text: str, mark: re.Pattern[str]) -> str | None:
    """What follows the last of the marks behind which there is anything."""
    text = text[-SEEN:]
    for match in reversed(list(mark.finditer(text))):
        behind = text[match.end() :]
        found = inside_braces(behind) if match[0].endswith("{") else ANSWER_END.split(behind, 1)[0]
        if not match[0].startswith(("<", "\\")):
            found = found.strip().split("\n", 1)[0]
        if found := found.strip(" :*\n\t").rstrip(". "):
            return found
    return None


def inside_braces(text: str) -> str:
    """The text up to the brace that closes one opened before it, all of it where none does."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[: match.start()]
    return text


def number_of(answer: str) -> Fraction | None:
    """The number an answer states: behind its last equals sign the first one, units, currency and separators aside."""
    match = NUMBER.search(plain_numbers(answer[-SEEN:].rpartition("=")[2]))
    if match is None:
        return None
    sign = -1 if (match["sign"] or match["minus"]) in ("-", "−", "–") else 1
    if match["top"]:
        top, bottom = (Fraction(re.sub("[−–]", "-", match[part])) for part in ("top", "bottom"))
        return sign * top / bottom if bottom else None
    value = Fraction(re.sub(r"\D", "", match["whole"]) or 0) + Fraction("0" + (match["part"] or ".0"))
    if match["power"]:
        value *= Fraction(10) ** int(match["power"][1:])
    if match["under"]:
        if not int(match["under"]):
            return None
        under = int(match["under"])
        value = value + Fraction(int(match["mixed"]), under) if match["mixed"] else value / under
    return sign * value


def plain_numbers(text: str) -> str:
    """The text with TeX's thousands separators as commas and its fractions with braces."""
    return SHORT_FRACTION.sub(r"\1{\2}{\3}", SEPARATOR.sub(",", text))


def is_same_answer(answer: str | None, expected: str) -> bool:
    """Whether two answers state the same number or, where one of them states none, the same words."""
    if answer is None:
        return False
    wanted, given = number_of(expected), number_of(answer)
    if wanted is not None and given is not None:
        return wanted == given
    return plain_words(answer) == plain_words(expected)


def plain_words(answer: str) -> str:
    """An answer without markup, punctuation at its ends, and case."""
    return " ".join(NOT_CONTENT.sub(" ", answer[-SEEN:]).split()).strip(" .,:;!?\"'()[]").casefold()


LEAST_LENGTH = 32
Ids = Sequence[int]


class Scored(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


@partial(jax.jit, static_argnames=("model", "dtype"))
def score(
    params: PyTree[Array],
    token: Int[Array, "1 row token"],
    target: Int[Array, "1 row token"],
    is_scored: Bool[Array, "1 row token"],
    model: ModelConfig,
    dtype: str,
) -> tuple[Float[Array, " row"], Bool[Array, " row"]]:
    """Summed float32 log-probabilities of each row's scored targets, and whether all were the likeliest token."""
    token, target, is_scored = token[0], target[0], is_scored[0]
    compute = cast(params, model, dtype)
    position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)
    hidden = forward(compute, embed(compute, token), jnp.ones_like(token), position, model)
    found = token_statistics(hidden, head_of(compute, model), target, model.vocabulary_size)
    sums = -jnp.sum(jnp.where(is_scored, found[0], 0), axis=-1), jnp.all(found[1] | ~is_scored, axis=-1)
    return jax.lax.with_sharding_constraint(sums, PartitionSpec())


def log_likelihoods(
    params: PyTree[Array],
    pairs: Sequence[tuple[Ids, Ids]],
    opened: OpenedModel,
    dtype: str,
    batch_size: int,
    longest: int,
) -> Iterator[tuple[int, Scored]]:
    """Place and score of each (context, continuation), longest first, `batch_size` a device at a time. A context loses
    its left end where both together have more than `longest` tokens to read."""
    rows, mesh = batch_size * row_shards(opened.mesh), opened.mesh
    order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
    for begin in range(0, len(order), rows):
        places = order[begin : begin + rows]
        whole = [(*pairs[place][0], *pairs[place][1])[-longest - 1 :] for place in places]
        length = min(max(power_of_two(max(map(len, whole)) - 1), LEAST_LENGTH), longest)
        token, target = np.zeros((2, 1, rows, length), np.int32)
        is_scored = np.zeros((1, rows, length), bool)
        for row, (place, ids) in enumerate(zip(places, whole, strict=True)):
            end = len(ids) - 1
            token[0, row, :end], target[0, row, :end] = ids[:-1], ids[1:]
            is_scored[0, row, max(end - len(pairs[place][1]), 0) : end] = True
        with jax.set_mesh(mesh):
            found = jax.device_get(score(params, *put_batch((token, target, is_scored), mesh), opened.model, dtype))
        for place, log_likelihood, is_greedy in zip(places, *(values[: len(places)] for values in found), strict=True):
            yield place, Scored(float(log_likelihood), bool(is_greedy))


Line = dict[str, Any]
Figures = dict[str, Any]
Tick = Callable[[int, int], None]


class Subject(NamedTuple):
    """A model under test, on its devices."""

    opened: OpenedModel
    params: PyTree[Array]


def sampler_for(config: EvalConfig, subject: Subject, wanted: int) -> Sampler:
    """A sampler with no more slots than are wanted."""
    shards = row_shards(subject.opened.mesh)
    slots = -(-min(config.slots, wanted) // shards) * shards
    capacity = subject.opened.model.capacity(config.capacity)
    return Sampler(subject.params, subject.opened, slots, capacity, config.compute_dtype)


def seed_of(seed: int, name: Any) -> int:
    """A seed for one of many requests."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


class Predictions:
    """Answers by task, row and sample, each a line of a file once it is there; those of an earlier start go before."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if is_first() else None
        kept = kept_lines(path) if path else []
        self.lines = {(line["task"], line["row"], line["sample"]): line for line in kept}

    def digest(self) -> str:
        """A hash of what is known."""
        return hashlib.sha256(repr(sorted(self.lines, key=repr)).encode()).hexdigest()

    def add(self, task: str, row: Any, sample: int, content: Line) -> None:
        """Keep an answer. Raises UserError where it can't be written."""
        if (task, row, sample) in self.lines:
            return
        line = {"task": task, "row": row, "sample": sample} | content
        self.lines[task, row, sample] = line
        if self.path:
            try:
                with self.path.open("ab", buffering=0) as file:
                    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror}; mend that, and the same command goes on") from error

    def of(self, task: str) -> list[Line]:
        """The lines of a task in the order of rows and samples."""
        found = [line for (name, _, _), line in self.lines.items() if name == task]
        return sorted(found, key=lambda line: (line["row"], line["sample"]))


def kept_lines(path: Path) -> list[Line]:
    """The whole lines of a file of predictions, from which a half-written last one is cut off.

    Raises:
        UserError: another line is damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content and is_first():
        os.truncate(path, content.rfind(b"\n") + 1)
    lines = []
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            lines.append(line | {"task": line["task"], "row": line["row"], "sample": line["sample"]})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is damaged; remove it, or start anew with --overwrite") from error
    return lines


CHUNK = 64


class Choice(NamedTuple):
    """What a problem lets one choose from, and which of them is right."""

    problem: Problem
    choices: tuple[str, ...]
    right: int


class Questions(NamedTuple):
    """The problems of a page's own tasks, a digest of them, and rows left out."""

    problems: tuple[Problem, ...]
    choices: tuple[Choice, ...]
    digest: str
    bad: tuple[str, ...]


def read_questions(config: EvalConfig, opened: OpenedModel) -> Questions:
    """What a page's own tasks ask.

    Raises:
        UserError: data that can't be asked.
    """
    if config.harness_tasks:
        from lacuna.apps.harness import load_tasks  # its library is an extra

        load_tasks(config)  # what can't be had is refused now
    if not {"generate", "choices"} & set(config.tasks):
        return Questions((), (), "", ())
    skips_bad = config.on_bad_data == "skip"
    found = read_problems(
        config.data, config, opened.tokenizer, opened.model.capacity(config.capacity) - 1, skips_bad, wants_answers=True
    )
    choices, bad = [], list(found.bad)
    for problem in found.problems if "choices" in config.tasks else ():
        try:
            choices.append(choice_of(problem, config))
        except ValueError as error:
            if not skips_bad:
                raise UserError(
                    f"{problem.origin}: {error} (or leave such rows out with --on-bad-data skip)"
                ) from error
            bad.append(f"{problem.origin}: {error}")
    if "choices" in config.tasks and not choices:
        raise UserError(f"no row to choose in ({bad[0]})")
    asked = json.dumps([found.digests, [(choice.choices, choice.right) for choice in choices]])
    return Questions(found.problems, tuple(choices), hashlib.sha256(asked.encode()).hexdigest(), tuple(bad))


def choice_of(problem: Problem, config: EvalConfig) -> Choice:
    """The choices of a row and the right one, which it names by its text, its label or its number from 0. Raises
    ValueError with the reason where that can't be."""
    given, stated = problem.row.get(config.choices_column, config.labels), problem.stated
    names: Sequence[Any] = ()
    if isinstance(given, dict):  # texts and their names, as in ARC
        given, names = given.get("text"), given.get("label") or ()
    if (
        not isinstance(given, list | tuple)
        or len(given) < 2
        or not all(isinstance(each, str) and each for each in given)
    ):
        raise ValueError(
            f"no two texts to choose from in the column {config.choices_column}; set choices_column or labels"
        )
    number = int(stated) if isinstance(stated, int) or str(stated).isdecimal() else -1
    if isinstance(stated, str) and stated in given:
        number = given.index(stated)
    elif stated in names:
        number = list(names).index(stated)
    if not 0 <= number < len(given):
        raise ValueError(f"the answer {stated!r} is none of its {len(given)} choices, nor the number of one")
    return Choice(problem, tuple(given), number)


def measure(
    config: EvalConfig, subject: Subject, questions: Questions, predictions: Predictions, tick: Tick
) -> Figures:
    """The figures of each task but the loss; `tick` hears how many answers are there, and of how many.

    Raises:
        UserError: a task that can't be run.
    """
    figures = {}
    for task in dict.fromkeys(config.tasks):
        if task == "generate":
            answer(config, subject, questions.problems, predictions, tick)
            figures[task] = generation_figures(predictions.of(task), config.samples)
        elif task == "choices":
            choose(config, subject, questions.choices, predictions, tick)
            figures[task] = choice_figures(predictions.of(task))
    if config.harness_tasks:
        from lacuna.apps.harness import run_tasks

        figures |= run_tasks(config, subject, predictions, tick)
    return figures


def measure_in_training(config: EvalConfig, subject: Subject) -> dict[str, float]:
    """The figures of a run's weights at this step, by the keys of its log: eval/<task>/<figure>."""
    figures = measure(config, subject, read_questions(config, subject.opened), Predictions(), lambda done, total: None)
    return {
        f"eval/{task}/{name}": value
        for task, found in figures.items()
        for name, value in found.items()
        if isinstance(value, float)
    }


# Generated answers


def answer(
    config: EvalConfig, subject: Subject, problems: Sequence[Problem], predictions: Predictions, tick: Tick
) -> None:
    """Have every problem answered that has not been, and judge each answer as it ends."""
    samples = range(config.samples)
    missing = [
        row for row in range(len(problems)) if any(("generate", row, n) not in predictions.lines for n in samples)
    ]
    rules = SamplingKeys(**{name: getattr(config, name) for name in SamplingKeys.model_fields})
    _, stop_ids = generation_defaults(subject.opened.source, subject.opened.tokenizer)
    requests = [
        Request(problems[row].token, rules, stop_ids, config.stop, seed_of(config.seed, row), config.samples)
        for row in missing
    ]
    done, total = (len(problems) - len(missing)) * config.samples, len(problems) * config.samples
    tick(done, total)

    def judge(completion: Completion) -> None:
        nonlocal done
        row = missing[completion.request]
        predictions.add("generate", row, completion.index, judge_answer(problems[row], completion))
        tick(done := done + 1, total)

    if missing:
        sampler_for(config, subject, len(missing) * config.samples).generate(requests, judge)


def judge_answer(problem: Problem, completion: Completion) -> Line:
    """What predictions.jsonl says of a completion."""
    expected = final_answer(problem.answer) or problem.answer
    extracted = final_answer(completion.text)
    return {
        "origin": problem.origin,
        "prompt": problem.prompt,
        "output": completion.text,
        "extracted": extracted,
        "expected": expected,
        "correct": is_same_answer(extracted, expected),
        "parsed": extracted is not None and (number_of(expected) is None or number_of(extracted) is not None),
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
    }


def pass_at(k: int, samples: int, correct: int) -> float:
    """Chance that one of k out of `samples` completions is right, without bias (Chen et al. 2021)."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value has none of."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def generation_figures(lines: Sequence[Line], samples: int) -> Figures:
    """Shares of right, truncated and unparsable answers; the standard error is over problems."""
    correct = [sum(line["correct"] for line in lines[at : at + samples]) for at in range(0, len(lines), samples)]
    mean, error = mean_and_error([count / samples for count in correct])
    powers = (2**exponent for exponent in range(1, samples.bit_length()))
    more = {
        f"pass@{k}": statistics.fmean(pass_at(k, samples, count) for count in correct)
        for k in sorted({*powers, samples} - {1})
    }
    return {
        "pass@1": mean,
        "pass@1_stderr": error,
        **more,
        **({f"mean@{samples}": mean} if samples > 1 else {}),
        "truncated": statistics.fmean(line["finish_reason"] == "length" for line in lines),
        "unparsable": statistics.fmean(not line["parsed"] for line in lines),
        "mean_tokens": statistics.fmean(line["tokens"] for line in lines),
        "problems": len(correct),
        "samples": samples,
    }


# Choices


def choose(
    config: EvalConfig, subject: Subject, choices: Sequence[Choice], predictions: Predictions, tick: Tick
) -> None:
    """Have a choice made in every row where none has been, by how likely each text is behind the prompt."""
    opened, params = subject
    missing = [row for row in range(len(choices)) if ("choices", row, 0) not in predictions.lines]
    done = len(choices) - len(missing)
    tick(done, len(choices))
    for begin in range(0, len(missing), CHUNK):
        rows = missing[begin : begin + CHUNK]
        pairs = [
            pair
            for row in rows
            for pair in pairs_of(choices[row], opened.tokenizer, subject.opened.model.capacity(config.capacity))
        ]
        found = log_likelihoods(
            params, pairs, opened, config.compute_dtype, config.batch_size, opened.model.capacity(config.capacity)
        )
        scores = iter([scored.log_likelihood for _, scored in sorted(found)])
        continuations = iter(pairs)
        for row in rows:
            count = len(choices[row].choices)
            values = [next(scores) for _ in range(count)]
            tokens = [len(next(continuations)[1]) for _ in range(count)]
            predictions.add("choices", row, 0, chosen(choices[row], values, tokens))
        tick(done := done + len(rows), len(choices))


def pairs_of(choice: Choice, tokenizer: Tokenizer, longest: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens of the prompt and of each choice behind it; where no chat template ends the prompt, a space does."""
    has_template = tokenizer.template is not None
    for text in choice.choices:
        whole = choice.problem.prompt + ("" if has_template else " ") + text
        ids = tuple(encode(tokenizer, whole, add_special_tokens=not has_template).tolist())
        start = len(choice.problem.token)
        if len(ids) <= start or len(ids) > longest + 1:
            raise UserError(
                f"{choice.problem.origin}: prompt and choice {text:.40!r} have {len(ids):,} tokens, the prompt "
                f"{start:,}, and there is room for {longest:,}; shorten them, or raise capacity"
            )
        yield ids[:start], ids[start:]


def chosen(choice: Choice, log_likelihoods: list[float], tokens: list[int]) -> Line:
    """What predictions.jsonl says of a choice."""
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in choice.choices]
    best = {
        "": index_of_highest(log_likelihoods),
        "_per_byte": index_of_highest([value / size for value, size in zip(log_likelihoods, sizes, strict=True)]),
        "_per_token": index_of_highest([value / count for value, count in zip(log_likelihoods, tokens, strict=True)]),
    }
    return {
        "origin": choice.problem.origin,
        "prompt": choice.problem.prompt,
        "output": choice.choices[best[""]],
        "extracted": best[""],
        "expected": choice.right,
        "correct": best[""] == choice.right,
        **{f"correct{way}": number == choice.right for way, number in best.items() if way},
        "log_likelihoods": log_likelihoods,
    }


def index_of_highest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def choice_figures(lines: Sequence[Line]) -> Figures:
    """Accuracy by the plain log-likelihood, by that per byte (acc_norm elsewhere) and per token."""
    figures: Figures = {}
    for way in ("", "_per_byte", "_per_token"):
        figures[f"accuracy{way}"], figures[f"accuracy{way}_stderr"] = mean_and_error(
            [float(line[f"correct{way}"]) for line in lines]
        )
    return figures | {"problems": len(lines)}


FREE_ON_RESUME = {"run_name", "output_dir", "overwrite", "batch_size", "slots", "data_parallel", "fsdp", "tensor",
                  "compilation_cache"}  # fmt: skip


def run_eval(config: EvalConfig) -> None:
    """The command eval: figures of each task into summary.json, each answer into predictions.jsonl.

    Raises:
        UserError: whatever about config, model, data or devices can't be evaluated.
    """
    started = time.perf_counter()
    directory = config.run_directory
    check_unfinished(config)
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor)
    opened = checkpoint.open_model(config, mesh, config.chat_template, config.template_date)
    dataset = None
    if "loss" in config.tasks:
        check_sequence_length(opened.model, config.sequence_length)
        dataset = load_dataset(config.data, opened.tokenizer, config, is_stream=False, is_shuffled=False)
    questions = read_questions(config, opened)
    enable_compilation_cache(config)
    print_inputs(config, opened, dataset, questions)
    with trainer.held_directory(config.run_directory) if is_first() else nullcontext():
        if is_first():
            begin_evaluation(config, opened, questions)
        from_first("evaluation begun", "")
        predictions = Predictions(directory / "predictions.jsonl")
        check_same("earlier predictions", predictions.digest())  # nobody goes on before all have read them
        if predictions.lines:
            print(f"going on with {len(predictions.lines):,} answers of {directory / 'predictions.jsonl'}")
        try:
            with jax.set_mesh(mesh):
                subject = Subject(opened, checkpoint.load_params(opened.source, opened.model, mesh))
                summary = facts(config, subject, dataset) if dataset else {}
                with progress_bar() as tick:
                    summary |= measure(config, subject, questions, predictions, tick)
        except KeyboardInterrupt:
            again = "without --overwrite" if config.overwrite else "again"
            raise KeyboardInterrupt(
                f"; {len(predictions.lines):,} answers are kept in {directory}, and the same command {again} goes on"
            ) from None
        summary = {"command": "eval", **summary} | {
            "parameters": parameter_counts(opened.model)["all"],
            "wall_seconds": time.perf_counter() - started,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "versions": metrics.versions(),
        }
        if is_first():
            metrics.write_summary(directory, summary)
            show_summary(summary, directory)
        from_first("evaluation ended", "")  # the others wait here for what the first process writes


def check_unfinished(config: EvalConfig) -> None:
    """Refuse to measure again unasked what has been measured."""
    if (config.run_directory / "summary.json").exists() and not config.overwrite:
        raise UserError(
            f"{config.run_directory} holds an evaluation already; add --overwrite to replace it, or another --run-name"
        )


def print_inputs(config: EvalConfig, opened: OpenedModel, dataset: Dataset | None, questions: Questions) -> None:
    """Print what is measured, and on what."""
    count = parameter_counts(opened.model)["all"]
    print(f"model: {config.model_name} ({opened.model.family}), {count:,} parameters")
    print(opened.attention_line)
    bad = list(questions.bad)
    if dataset:
        print(f"data: {describe(dataset.facts)}")
        bad += [example for documents in dataset.documents for example in documents.facts["bad_examples"]]
    if questions.problems:
        print(f"problems: {len(questions.problems):,}, the first asked as {questions.problems[0].prompt!r}")
    for example in dict.fromkeys(bad):
        print(f"left out: {example}")


def begin_evaluation(config: EvalConfig, opened: OpenedModel, questions: Questions) -> None:
    """Write down what makes this evaluation the one it is, or compare it with what an earlier start wrote.

    Raises:
        UserError: the earlier start was another evaluation.
    """
    directory = config.run_directory
    check_unfinished(config)  # again, now that no one else can write
    files = sorted(opened.source.glob("*.safetensors"))
    now = json.loads(config.model_dump_json(exclude=FREE_ON_RESUME)) | {
        "content of data": questions.digest,
        "weights of model_name": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    identity = directory / "identity.json"
    try:
        if config.overwrite:
            for name in ("summary.json", "predictions.jsonl", "identity.json"):
                (directory / name).unlink(missing_ok=True)
        if identity.exists():
            earlier = json.loads(identity.read_text())
            if changed := [key for key in now if earlier.get(key) != now[key]]:
                differences = "; ".join(f"{key} was {earlier.get(key)!r} and is {now[key]!r}" for key in changed)
                raise UserError(
                    f"{directory} holds a part of another evaluation: {differences}; add --overwrite to start anew, "
                    "or another --run-name"
                )
            return
        metrics.write_atomically(identity, json.dumps(now))
        (directory / "config.toml").write_text(to_toml(config))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; mend that, or choose another output_dir") from error


def facts(config: EvalConfig, subject: Subject, dataset: Dataset) -> dict[str, Any]:
    """What summary.json says of the held-out loss."""
    rows = config.batch_size * row_shards(subject.opened.mesh)
    batches = partial(track, description="Held-out loss", transient=True, disable=not sys.stdout.isatty())
    result = held_out_loss(subject.params, dataset, rows, subject.opened, config.compute_dtype, batches)
    return {
        **result,
        "perplexity": math.exp(min(result["eval_loss"], 700)),
        "tokens": dataset.facts["tokens"],
        "data": dict(dataset.facts),
    }


@contextmanager
def progress_bar() -> Generator[Tick]:
    """A bar of answers done, on a terminal only."""
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("Answers", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_summary(summary: dict[str, Any], directory: Path) -> None:
    """Print the figures."""
    shown = ("eval_loss", "perplexity", "eval_accuracy", "target_tokens")
    if "eval_loss" in summary:
        print("  ".join(f"{key} {summary[key]:,.6g}" for key in shown))
    for task, figures in summary.items():
        if isinstance(figures, dict) and task not in ("data", "versions"):
            numbers = [f"{key} {value:,.6g}" for key, value in figures.items() if isinstance(value, int | float)]
            print(f"{task}: {'  '.join(numbers)}")
    print(f"summary: {directory / 'summary.json'}")
