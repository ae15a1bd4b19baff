"""Evaluation: held-out loss, problems answered by generated text or by choice, and what training measures."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from lacuna.answers import expected_answers, final_answer, is_right, number_of
from lacuna.checkpoint import OpenedModel
from lacuna.config import DataSource, EvalConfig, GrpoConfig, RowsConfig, SamplingKeys, SftConfig, UserError
from lacuna.data import Batch, Dataset, describe, load_dataset
from lacuna.distributed import Watchdog, fast_dtype, put_batch, row_shards, writing_to
from lacuna.documents import (
    Example,
    checked_text,
    example_of,
    joined_contents,
    read_rows,
    split_range,
    usable,
)
from lacuna.environments import Environment, Problem, Rollout, Rollouts, Turns, check_template, turn_figures
from lacuna.metrics import LineFile, read_json_lines
from lacuna.model import (
    ModelConfig,
    cast,
    check_sequence_length,
    embed,
    forward,
    head_of,
    parameter_table,
    token_statistics,
)
from lacuna.sampler import Completion, Request, Sampler, power_of_two, slots_for
from lacuna.tokenizer import NO_VARIABLES, Message, Tokenizer, Variables, check_messages, encode, render_prompt
from lacuna.trainer import Evaluation

ReportProgress = Callable[[int, int], None]  # called with how much is done, and of how much
Key = tuple[str, int | str, int]  # task, row and sample
Line = dict[str, Any]
Figures = dict[str, Any]

# Held-out loss and likelihoods


@partial(jax.jit, static_argnames=("model", "dtype"))
def score(
    params: PyTree[Array], batch: Batch, model: ModelConfig, dtype: str
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " row"], Bool[Array, " row"]]:
    """Over the targets of a batch [1, row, token]: the summed loss (nats) and how many were the likeliest token; and of
    each row, its summed loss and whether all of its targets were the likeliest token."""
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    compute = cast(params, parameter_table(model), dtype)
    hidden = forward(compute, embed(compute, batch.token, dtype), batch.segment, batch.position, model)
    found = token_statistics(hidden, head_of(compute, model), batch.target, model.vocabulary_size)
    loss, correct = found.loss * batch.weight, found.is_correct * batch.weight
    is_greedy = jnp.all(found.is_correct | (batch.weight == 0), axis=-1)
    scores = jnp.sum(loss), jnp.sum(correct), jnp.sum(loss, axis=-1), is_greedy
    return jax.lax.with_sharding_constraint(scores, PartitionSpec())


def held_out_loss(
    params: PyTree[Array], dataset: Dataset, batch_size: int, opened: OpenedModel, dtype: str, report: ReportProgress
) -> Figures:
    """Mean loss (nats) and its perplexity, share of targets that were the likeliest token, and count over all targets
    of a data set, of which each device gets `batch_size` rows at a time."""
    rows, row_count = batch_size * row_shards(opened.mesh), dataset.rows.row_count(1)
    loss, correct, targets, batches = 0.0, 0.0, 0, math.ceil(row_count / rows)
    for index in range(batches):
        batch = dataset.batch(index, rows, row_count)
        placed = put_batch(jax.tree.map(lambda leaf: leaf[None], batch), opened.mesh)
        batch_loss, batch_correct, *_ = score(params, placed, opened.model, dtype)
        loss, correct = loss + float(batch_loss), correct + float(batch_correct)
        targets += int(batch.weight.sum())
        report(index + 1, batches)
    loss, accuracy = loss / targets, correct / targets
    perplexity = math.exp(min(loss, 700))
    return {"eval_loss": loss, "perplexity": perplexity, "eval_accuracy": accuracy, "target_tokens": targets}


LEAST_LENGTH = 32  # of the rows that are scored, whose lengths are powers of two


def log_likelihoods(
    tasks: "Tasks", params: PyTree[Array], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, float, bool]]:
    """Of each (context, continuation), longest first: its place, the continuation's log-likelihood in nats, and whether
    greedy decoding would write it. A context loses its left end where both are too long together."""
    config, (_, model, _, mesh, *_), longest = tasks.config, tasks.opened, tasks.capacity
    rows = config.batch_size * row_shards(mesh)
    order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
    for begin in range(0, len(order), rows):
        places = order[begin : begin + rows]
        whole = [(*pairs[place][0], *pairs[place][1])[-longest - 1 :] for place in places]
        length = min(max(power_of_two(max(map(len, whole)) - 1), LEAST_LENGTH), longest)
        token, target = np.zeros((2, 1, rows, length), np.int32)
        weight, segment = np.zeros(token.shape, np.float32), np.ones_like(token)
        for row, (place, ids) in enumerate(zip(places, whole, strict=True)):
            end = len(ids) - 1
            token[0, row, :end], target[0, row, :end] = ids[:-1], ids[1:]
            weight[0, row, max(end - len(pairs[place][1]), 0) : end] = 1
        position = np.broadcast_to(np.arange(length, dtype=np.int32), token.shape)
        batch: Any = token, target, weight, segment, position
        scores = score(params, put_batch(Batch(*batch), mesh), model, config.compute_dtype)
        *_, loss, is_greedy = jax.device_get(scores)
        yield from ((place, -float(loss[row]), bool(is_greedy[row])) for row, place in enumerate(places))


# Problems


class Problems(NamedTuple):
    """The problems of all sources, how many and with which digest by source, and why rows were left out."""

    problems: tuple[Problem, ...] = ()
    counts: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()


def read_problems(
    sources: Sequence[DataSource],
    config: GrpoConfig | EvalConfig,
    tokenizer: Tokenizer,
    longest: int,
    needs_answers: bool = True,
    environment: Environment | None = None,
) -> Problems:
    """The problems of all sources, with the tools of an environment. A row is bad if its prompt has more than `longest`
    tokens, or if it lacks the answer or the choices that are needed.

    Raises:
        UserError: unreadable data, a bad row unless the config skips them, or nothing left.
    """

    def problem_of(source: DataSource, origin: str, row: dict[str, Any]) -> Problem:
        example = example_of(row, source, tokenizer)
        messages, answer = question_and_answer(example, config.prompt_template)
        if not answer and needs_answers:
            if (column := source.completion_column) in row:
                fix = "fill it, or leave such rows out with --on-bad-data skip"
                raise ValueError(f"the reference in `{column}` is empty; {fix}")
            raise ValueError(f"no reference answer; set completion_column to its column ({', '.join(row)})")
        if config.system_prompt:
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        is_chat = example.is_chat and tokenizer.template is not None
        tools = environment.tools if environment else example.tools
        if environment and not is_chat:
            raise ValueError("it is asked as plain text, and an environment needs a chat; set prompt_format to chat")
        if tools and example.tools and tools is not example.tools:
            raise ValueError("it has tools, and so has the environment; leave its own out (--data.0.tools-column none)")
        text, token = prompt_of(tokenizer, messages, is_chat, tools, example.variables)
        if len(token) > longest:
            raise ValueError(f"the prompt has {len(token):,} tokens, and there is room for {longest:,}")
        has_choices = isinstance(config, EvalConfig) and "choices" in config.tasks
        choices = choices_of(row, example.reference, config) if has_choices else ()
        reference = {"answer": answer} if answer else {}
        made_of = {"is_chat": is_chat, "messages": messages, "variables": example.variables}
        return Problem(origin, text, token, answer or "", row | reference, *choices, **made_of)

    if environment:
        check_template(tokenizer, environment, NO_VARIABLES)
    problems, counts, digests, bad = [], [], [], list[str]()
    for source in sources:
        rows = list(read_rows(source))
        chosen_rows = (rows[number] for number in split_range(source, len(rows)))
        found = list(usable(chosen_rows, partial(problem_of, source), config.on_bad_data == "skip", bad))
        if not found:
            raise UserError(f"{source.path}, {source.split}: no problem to ask ({'; '.join(bad[:1]) or 'no rows'})")
        asked = [(each.token, each.answer, *([each.choices, each.right] if each.choices else [])) for each in found]
        digests.append(hashlib.sha256(json.dumps(asked).encode()).hexdigest())
        counts.append(len(found))
        problems += found
    return Problems(tuple(problems), tuple(counts), tuple(digests), tuple(bad))


def prompt_of(
    tokenizer: Tokenizer, messages: list[Message], is_chat: bool, tools: Any = None, variables: Variables = NO_VARIABLES
) -> tuple[str, tuple[int, ...]]:
    """Text and tokens of messages to answer: by the chat template, or else their plain texts."""
    if is_chat:
        text = render_prompt(tokenizer, messages, tools, variables)
    else:
        text = joined_contents(messages)
    return text, tuple(encode(tokenizer, text, add_special_tokens=not is_chat).tolist())


def question_and_answer(example: Example, prompt_template: str) -> tuple[list[Message], str | list[str]]:
    """The messages before the answer, the last of them in the template, and the reference answer, empty if there is
    none; of several, any is right."""
    if example.text is not None:
        raise ValueError("it is a plain text, so no problem to ask; set prompt_column or messages_column")
    check_messages(example.messages, example.tools)
    *before, question = example.messages
    content = checked_text(question["content"], "content")
    answer = example.reference
    if not isinstance(answer, list):
        answer = "" if answer is None else str(answer)
    elif not all(isinstance(each, str) and each.strip() for each in answer):
        raise ValueError(f"the reference answers {json.dumps(answer):.40} are not all texts; write each in quotes")
    return [*before, question | {"content": prompt_template.replace("{prompt}", content)}], answer


def choices_of(row: dict[str, Any], answer: Any, config: EvalConfig) -> tuple[tuple[str, ...], int]:
    """What a row lets one choose from, and the place of the right text, which its answer names by text, label or number
    from 0."""
    given, names = row.get("choices", config.labels), ()
    if isinstance(given, dict):  # texts and their labels, as in ARC
        given, names = given.get("text"), given.get("label") or ()
    is_list = isinstance(given, list | tuple)
    if not is_list or len(given) < 2 or not all(isinstance(each, str) and each for each in given):
        raise ValueError("no two texts to choose from in the column choices; rename the column, or set labels")
    number = int(answer) if isinstance(answer, int) or str(answer).isdecimal() else -1
    right = next((list(texts).index(answer) for texts in (given, names) if answer in texts), number)
    if not 0 <= right < len(given):
        raise ValueError(f"the answer {answer!r} is none of its {len(given)} choices, nor the number of one")
    return tuple(given), right


# Tasks


class Predictions:
    """Answers by task, row and sample. Each is appended to a file, if there is one, as soon as it is known; those of an
    earlier start are read from it."""

    def __init__(self, kept: LineFile | None = None, report: ReportProgress = lambda done, total: None) -> None:
        earlier = read_json_lines(kept.path, "task", "row", "sample") if kept else []
        self.lines: dict[Key, Line] = {(line["task"], line["row"], line["sample"]): line for line in earlier}
        self.kept, self.report = kept, report
        self.done = self.total = 0

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Places of the keys that have no answer yet; from now on progress is reported over all of these keys."""
        places = [place for place, key in enumerate(keys) if key not in self.lines]
        self.done, self.total = len(keys) - len(places), len(keys)
        self.report(self.done, self.total)
        return places

    def add(self, key: Key, content: Line) -> None:
        """Keep an answer, unless there is one. Raises UserError where it can't be written."""
        if key in self.lines:
            return
        self.lines[key] = dict(zip(("task", "row", "sample"), key, strict=True)) | content
        if self.kept:
            self.kept.write(json.dumps(self.lines[key], ensure_ascii=False))
            with writing_to(self.kept.path.parent):
                self.kept.flush()
        self.done += 1
        self.report(self.done, self.total)


RunHarness = Callable[["Tasks", PyTree[Array], Predictions], dict[str, Figures]]


class Tasks(NamedTuple):
    """The tasks of a config with the problems that they ask, for any weights of a model; `run_harness` runs those of
    lm-evaluation-harness, if the config has any."""

    config: EvalConfig
    opened: OpenedModel
    problems: Problems
    run_harness: RunHarness | None
    environment: Environment | None = None

    @property
    def capacity(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.opened.model.capacity(self.config.capacity)


def prepare_tasks(
    config: EvalConfig, run_harness: RunHarness | None, opened: OpenedModel, environment: Environment | None = None
) -> Tasks:
    """The tasks of a config, ready to run.

    Raises:
        UserError: problems that can't be asked.
    """
    config = config.model_copy(update={"compute_dtype": fast_dtype(config, jax.default_backend())})
    problems = Problems()
    if {"generate", "choices"} & set(config.tasks):
        longest = opened.model.capacity(config.capacity) - 1
        problems = read_problems(config.data, config, opened.tokenizer, longest, environment=environment)
    return Tasks(config, opened, problems, run_harness, environment)


def run_tasks(tasks: Tasks, params: PyTree[Array], predictions: Predictions) -> dict[str, Figures]:
    """The figures of each task but the loss.

    Raises:
        UserError: a task that can't be run.
    """
    ours = {"generate": answer_problems, "choices": choose}
    figures = {task: ours[task](tasks, params, predictions) for task in tasks.config.tasks if task in ours}
    return figures | (tasks.run_harness(tasks, params, predictions) if tasks.run_harness else {})


def measure_in_training(tasks: Tasks, params: PyTree[Array]) -> dict[str, float]:
    """The figures of a run's weights at this step, by the keys of its log: eval/<task>/<figure>."""
    return {
        f"eval/{task}/{name}": value
        for task, figures in run_tasks(tasks, params, Predictions()).items()
        for name, value in figures.items()
        if isinstance(value, float)
    }


def complete(
    tasks: Tasks, params: PyTree[Array], requests: Sequence[Request], keep: Callable[[Completion], None]
) -> None:
    """Generate what is requested, in no more slots than that takes; `keep` gets each completion as it ends."""
    if requests:
        sampler_for(tasks, params, sum(request.n for request in requests)).generate(requests, keep)


def sampler_for(tasks: Tasks, params: PyTree[Array], count: int) -> Sampler:
    """A sampler for that many completions."""
    slots = slots_for(min(tasks.config.slots, count), tasks.opened.mesh)
    return Sampler(params, tasks.opened, slots, tasks.capacity, tasks.config.compute_dtype)


def seed_of(seed: int, name: Any) -> int:
    """A seed for one of many requests."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


def line_of(problem: Problem, output: str, extracted: Any, expected: Any) -> Line:
    """What predictions.jsonl says of an answer of any kind."""
    asked = {"origin": problem.origin, "prompt": problem.prompt}
    return asked | {"output": output, "extracted": extracted, "expected": expected}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value does not have."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


# Generated answers


def answer_problems(tasks: Tasks, params: PyTree[Array], predictions: Predictions) -> Figures:
    """Generate and judge the answers that are missing; the figures of all."""
    config, problems = tasks.config, tasks.problems.problems
    keys: list[Key] = [("generate", row, sample) for row in range(len(problems)) for sample in range(config.samples)]
    rows = list(dict.fromkeys(place // config.samples for place in predictions.missing(keys)))
    rules = SamplingKeys(**config.model_dump(include=set(SamplingKeys.model_fields)))

    def keep(rollout: Rollout) -> None:
        row = rows[rollout.key[0]]
        turns = {"turns": asdict(rollout.turns)} if rollout.turns else {}
        predictions.add(("generate", row, rollout.key[1]), judged(rollout.problem, rollout.completion) | turns)
        if tasks.environment:
            tasks.environment.give_back(rollout.instance)

    if rows:
        sampler = sampler_for(tasks, params, len(rows) * config.samples)
        rollouts = Rollouts(sampler, tasks.environment, config, lambda: None, config.stop)
        seeds = [seed_of(config.seed, row) for row in rows]
        rollouts.of([problems[row] for row in rows], seeds, config.samples, rules, keep)
    return generation_figures([predictions.lines[key] for key in keys], config.samples)


def judged(problem: Problem, completion: Completion) -> Line:
    """What predictions.jsonl says of a completion."""
    extracted, expected = final_answer(completion.text), expected_answers(problem.answer)
    has_text = any(number_of(each) is None for each in expected)
    shown = expected if isinstance(problem.answer, list) else expected[0]
    return line_of(problem, completion.text, extracted, shown) | {
        "correct": is_right(completion.text, problem.answer),
        "parsed": extracted is not None and (has_text or number_of(extracted) is not None),
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
    }


def pass_at(k: int, samples: int, correct: int) -> float:
    """Chance that one of k out of `samples` completions is right, without bias (Chen et al. 2021)."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def generation_figures(lines: Sequence[Line], samples: int) -> Figures:
    """Shares of right, truncated and unparsable answers; the standard error is over problems."""
    correct = [sum(line["correct"] for line in lines[at : at + samples]) for at in range(0, len(lines), samples)]
    mean, error = mean_and_error([count / samples for count in correct])
    powers = {2**exponent for exponent in range(1, samples.bit_length())}
    figures: Figures = {"pass@1": mean, "pass@1_stderr": error}
    for k in sorted((powers | {samples}) - {1}):
        figures[f"pass@{k}"] = statistics.fmean(pass_at(k, samples, count) for count in correct)
    if samples > 1:
        figures[f"mean@{samples}"] = mean
    return figures | {
        "truncated": statistics.fmean(line["finish_reason"] == "length" for line in lines),
        "unparsable": statistics.fmean(not line["parsed"] for line in lines),
        "mean_tokens": statistics.fmean(line["tokens"] for line in lines),
        **turn_figures([Turns(**line["turns"]) for line in lines if "turns" in line]),
        "problems": len(correct),
        "samples": samples,
    }


# Choices

CHUNK = 64  # problems whose choices are scored together, longest first
WAYS = "", "_per_byte", "_per_token"


def choose(tasks: Tasks, params: PyTree[Array], predictions: Predictions) -> Figures:
    """Make the choices that are missing, by how likely each text is after the prompt; the figures of all."""
    problems = tasks.problems.problems
    keys: list[Key] = [("choices", row, 0) for row in range(len(problems))]
    rows = predictions.missing(keys)
    for begin in range(0, len(rows), CHUNK):
        pairs = [list(choice_tokens(tasks, problems[row])) for row in rows[begin : begin + CHUNK]]
        found = sorted(log_likelihoods(tasks, params, [pair for parts in pairs for pair in parts]))
        values = iter(value for _, value, _ in found)
        for row, parts in zip(rows[begin : begin + CHUNK], pairs, strict=True):
            likelihoods = [next(values) for _ in parts]
            predictions.add(keys[row], chosen(problems[row], likelihoods, [len(text) for _, text in parts]))
    return choice_figures([predictions.lines[key] for key in keys])


def choice_tokens(tasks: Tasks, problem: Problem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens of the prompt and of each choice after it; where no chat template ends the prompt, a space does."""
    tokenizer, start = tasks.opened.tokenizer, len(problem.token)
    for text in problem.choices:
        whole = problem.prompt + ("" if problem.is_chat else " ") + text
        ids = tuple(encode(tokenizer, whole, add_special_tokens=not problem.is_chat).tolist())
        if not start < len(ids) <= tasks.capacity + 1:
            raise UserError(
                f"{problem.origin}: prompt and choice {text:.40!r} have {len(ids):,} tokens, the prompt {start:,}, and "
                f"there is room for {tasks.capacity:,}; shorten them, or raise capacity"
            )
        yield ids[:start], ids[start:]


def chosen(problem: Problem, log_likelihoods: Sequence[float], tokens: Sequence[int]) -> Line:
    """What predictions.jsonl says of a choice."""
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in problem.choices]
    best = {}
    for way, divisors in zip(WAYS, ([1] * len(sizes), sizes, tokens), strict=True):
        values = [value / divisor for value, divisor in zip(log_likelihoods, divisors, strict=True)]
        best[way] = values.index(max(values))
    is_right = {f"correct{way}": place == problem.right for way, place in best.items()}
    line = line_of(problem, problem.choices[best[""]], best[""], problem.right)
    return line | is_right | {"log_likelihoods": log_likelihoods}


def choice_figures(lines: Sequence[Line]) -> Figures:
    """Accuracy by the plain log-likelihood, by that per byte (acc_norm elsewhere) and per token."""
    figures: Figures = {}
    for way in WAYS:
        mean, error = mean_and_error([float(line[f"correct{way}"]) for line in lines])
        figures |= {f"accuracy{way}": mean, f"accuracy{way}_stderr": error}
    return figures | {"problems": len(lines)}


# While training

SAMPLE_SLOTS = 8


def evaluation_of_rows(
    prepare: Callable[[OpenedModel], Tasks] | None, config: RowsConfig, opened: OpenedModel
) -> Evaluation:
    """What pretrain and sft measure while they train: greedy answers (sft) or continuations (pretrain) of the sample
    prompts, the tasks of eval_config, and the held-out loss.

    Raises:
        UserError: what can't be asked.
    """
    requests, tasks = sample_requests(config, opened), prepare(opened) if prepare else None
    held_out, lines, digest = None, list[str](), ""
    if config.eval_data:
        held_out = load_dataset(config.eval_data, opened.tokenizer, config, is_stream=False, is_shuffled=False)
        lines = [f"held-out data: {describe(held_out.facts)}", *(f"left out: {row}" for row in held_out.bad_examples)]
        digest = repr([documents.facts["digest"] for documents in held_out.documents])

    def measure(params: PyTree[Array], watchdog: Watchdog) -> Figures:
        figures: Figures = {}
        if requests:
            capacity = max(len(request.prompt) for request in requests) + config.sample_tokens
            slots = slots_for(min(len(requests), SAMPLE_SLOTS), opened.mesh)
            completions = Sampler(params, opened, slots, capacity, config.compute_dtype).generate(requests)
            texts = (completion.text for completion in completions)
            figures["samples"] = dict(zip(config.sample_prompts, texts, strict=True))
        if tasks:
            figures |= measure_in_training(tasks, params)
        if held_out:
            settings = config.micro_batch_size, opened, config.compute_dtype
            result = held_out_loss(params, held_out, *settings, lambda done, total: watchdog.report_progress())
            figures |= {key: result[key] for key in ("eval_loss", "eval_accuracy")}
        return figures

    return Evaluation(lines, digest, measure)


def sample_requests(config: RowsConfig, opened: OpenedModel) -> list[Request]:
    """The sample prompts as the sampler takes them: in the chat template for sft, as plain text for pretrain."""
    stop_ids = tuple(opened.tokenizer.ends)
    rules, requests = SamplingKeys(temperature=0.0, max_tokens=config.sample_tokens), []
    for prompt in config.sample_prompts:
        messages: list[Message] = [{"role": "user", "content": prompt}]
        try:
            _, token = prompt_of(opened.tokenizer, messages, isinstance(config, SftConfig))
        except ValueError as error:
            raise UserError(f"sample_prompts: {prompt!r}: {error}") from error
        check_sequence_length(opened.model, len(token) + config.sample_tokens)
        requests.append(Request(token, rules, stop_ids))
    return requests
