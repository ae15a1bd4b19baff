"""Tasks: problems that a model answers or chooses from, its answers judged and kept, and the figures they make."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lacuna.answers import final_answer, is_same_answer, number_of
from lacuna.config import EvalConfig, SamplingKeys, UserError
from lacuna.likelihood import log_likelihoods
from lacuna.predictions import Figures, Line, Predictions, Subject, Tick, capacity_of, sampler_for, seed_of
from lacuna.problems import Problem, read_problems
from lacuna.sampler import Completion, Request, generation_defaults
from lacuna.tokenizer import Tokenizer, encode
from lacuna.weights import OpenedModel

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


def read_questions(page: EvalConfig, model: OpenedModel) -> Questions:
    """What a page's own tasks ask.

    Raises:
        UserError: data that can't be asked.
    """
    if page.harness_tasks:
        from lacuna.harness import load_tasks  # its library is an extra

        load_tasks(page)  # what can't be had is refused now
    if not {"generate", "choices"} & set(page.tasks):
        return Questions((), (), "", ())
    skips_bad = page.on_bad_data == "skip"
    found = read_problems(page.data, page, model.tokenizer, capacity_of(page, model) - 1, skips_bad, wants_answers=True)
    choices, bad = [], list(found.bad)
    for problem in found.problems if "choices" in page.tasks else ():
        try:
            choices.append(choice_of(problem, page))
        except ValueError as error:
            if not skips_bad:
                raise UserError(
                    f"{problem.origin}: {error} (or leave such rows out with --on-bad-data skip)"
                ) from error
            bad.append(f"{problem.origin}: {error}")
    if "choices" in page.tasks and not choices:
        raise UserError(f"no row to choose in ({bad[0]})")
    asked = json.dumps([found.digests, [(choice.choices, choice.right) for choice in choices]])
    return Questions(found.problems, tuple(choices), hashlib.sha256(asked.encode()).hexdigest(), tuple(bad))


def choice_of(problem: Problem, page: EvalConfig) -> Choice:
    """The choices of a row and the right one, which it names by its text, its label or its number from 0. Raises
    ValueError with the reason where that can't be."""
    given, stated = problem.row.get(page.choices_column, page.labels), problem.stated
    names: Sequence[Any] = ()
    if isinstance(given, dict):  # texts and their names, as in ARC
        given, names = given.get("text"), given.get("label") or ()
    if (
        not isinstance(given, list | tuple)
        or len(given) < 2
        or not all(isinstance(each, str) and each for each in given)
    ):
        raise ValueError(
            f"no two texts to choose from in the column {page.choices_column}; set choices_column or labels"
        )
    number = int(stated) if isinstance(stated, int) or str(stated).isdecimal() else -1
    if isinstance(stated, str) and stated in given:
        number = given.index(stated)
    elif stated in names:
        number = list(names).index(stated)
    if not 0 <= number < len(given):
        raise ValueError(f"the answer {stated!r} is none of its {len(given)} choices, nor the number of one")
    return Choice(problem, tuple(given), number)


def measure(page: EvalConfig, subject: Subject, questions: Questions, predictions: Predictions, tick: Tick) -> Figures:
    """The figures of each task but the loss; `tick` hears how many answers are there, and of how many.

    Raises:
        UserError: a task that can't be run.
    """
    figures = {}
    for task in dict.fromkeys(page.tasks):
        if task == "generate":
            answer(page, subject, questions.problems, predictions, tick)
            figures[task] = generation_figures(predictions.of(task), page.samples)
        elif task == "choices":
            choose(page, subject, questions.choices, predictions, tick)
            figures[task] = choice_figures(predictions.of(task))
    if page.harness_tasks:
        from lacuna.harness import run_tasks

        figures |= run_tasks(page, subject, predictions, tick)
    return figures


def measure_in_training(page: EvalConfig, subject: Subject) -> dict[str, float]:
    """The figures of a run's weights at this step, by the keys of its log: eval/<task>/<figure>."""
    figures = measure(page, subject, read_questions(page, subject.model), Predictions(), lambda done, total: None)
    return {
        f"eval/{task}/{name}": value
        for task, found in figures.items()
        for name, value in found.items()
        if isinstance(value, float)
    }


# Generated answers


def answer(
    page: EvalConfig, subject: Subject, problems: Sequence[Problem], predictions: Predictions, tick: Tick
) -> None:
    """Have every problem answered that has not been, and judge each answer as it ends."""
    samples = range(page.samples)
    missing = [
        row for row in range(len(problems)) if any(("generate", row, n) not in predictions.lines for n in samples)
    ]
    rules = SamplingKeys(**{name: getattr(page, name) for name in SamplingKeys.model_fields})
    _, stop_ids = generation_defaults(subject.model.source, subject.model.tokenizer)
    requests = [
        Request(problems[row].token, rules, stop_ids, page.stop, seed_of(page.seed, row), page.samples)
        for row in missing
    ]
    done, total = (len(problems) - len(missing)) * page.samples, len(problems) * page.samples
    tick(done, total)

    def judge(completion: Completion) -> None:
        nonlocal done
        row = missing[completion.request]
        predictions.add("generate", row, completion.index, judged(problems[row], completion))
        tick(done := done + 1, total)

    if missing:
        sampler_for(page, subject, len(missing) * page.samples).generate(requests, judge)


def judged(problem: Problem, completion: Completion) -> Line:
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


def choose(page: EvalConfig, subject: Subject, choices: Sequence[Choice], predictions: Predictions, tick: Tick) -> None:
    """Have a choice made in every row where none has been, by how likely each text is behind the prompt."""
    (_, config, tokenizer), params, mesh = subject
    missing = [row for row in range(len(choices)) if ("choices", row, 0) not in predictions.lines]
    done = len(choices) - len(missing)
    tick(done, len(choices))
    for begin in range(0, len(missing), CHUNK):
        rows = missing[begin : begin + CHUNK]
        pairs = [pair for row in rows for pair in pairs_of(choices[row], tokenizer, capacity_of(page, subject.model))]
        found = log_likelihoods(
            params, pairs, config, mesh, page.compute_dtype, page.batch_size, capacity_of(page, subject.model)
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
        "": likeliest(log_likelihoods),
        "_per_byte": likeliest([value / size for value, size in zip(log_likelihoods, sizes, strict=True)]),
        "_per_token": likeliest([value / count for value, count in zip(log_likelihoods, tokens, strict=True)]),
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


def likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def choice_figures(lines: Sequence[Line]) -> Figures:
    """Accuracy by the plain log-likelihood, by that per byte (acc_norm elsewhere) and per token."""
    figures: Figures = {}
    for way in ("", "_per_byte", "_per_token"):
        figures[f"accuracy{way}"], figures[f"accuracy{way}_stderr"] = mean_and_error(
            [float(line[f"correct{way}"]) for line in lines]
        )
    return figures | {"problems": len(lines)}
