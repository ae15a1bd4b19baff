"""Problems: prompts with a reference answer, read from the data that sft reads, and as the model is asked them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lacuna.config import DataSource, ProblemKeys, UserError
from lacuna.documents import bound, checked_text, local_bounds, local_files, read_rows, usable
from lacuna.tokenizer import Message, Tokenizer, check_message, encode, render


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
    page: ProblemKeys,
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
            return problem_of(origin, row, source, page, tokenizer, longest, wants_answers)

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
    page: ProblemKeys,
    tokenizer: Tokenizer,
    longest: int,
    wants_answers: bool,
) -> Problem:
    """The problem in a row. Raises ValueError with the reason where there is none."""
    messages, answer = asked(row, source, page.prompt_template)
    if answer is None and wants_answers:
        raise ValueError(f"no reference answer; set completion_column to its column ({', '.join(row)})")
    if page.system_prompt:
        messages = [{"role": "system", "content": page.system_prompt}, *messages]
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
