"""The way from what was typed to a page: TOML files, flags, and refusals that name the mend.

TOML files are layered left to right, flags are the last layer, and `${NAME}` is an environment variable in any of them.
pydantic checks the merged result once, so a flag may mend what a file got wrong. A refusal names the key, where its
value is from, and the mend.
"""

import argparse
import difflib
import inspect
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined


class UserError(ValueError):
    """A refusal that the user can mend: the commands print it without a traceback and exit with 2."""


class Page(BaseModel):
    """Keys and their checks; a command's page inherits its sections, the first of them as its last base."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def booleans_are_not_numbers(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("should be a number")
        return value

    @property
    def cache_dir(self) -> Path:
        """The directory of what is kept between runs: packing plans, compiled programs."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacuna"


Config = TypeVar("Config", bound=Page)
Values = dict[str, Any]
Typed = str | list[str]


def parse(page: type[Config], arguments: list[str], program: str) -> Config:
    """The page that layers `@ file.toml` and flags make together; `--help` prints it and exits.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    files, flags = split_arguments(arguments)
    values: Values = {}
    origins: dict[str, str] = {}
    for file in files:
        layer = read_toml(file, page)
        values |= layer
        origins |= dict.fromkeys(layer, file)
    typed = read_flags(page, program, flags, values, origins)
    for option, text in typed.items():
        key, *entry = option.split(".")
        if entry:
            values[key] = with_entry(values.get(key, []), int(entry[0]), entry[1], text)
            origins.setdefault(key, "the command line")
        else:
            values[key] = text
            origins[key] = "the command line"
    try:
        return page.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(one, page, program, typed, origins) for one in error.errors())) from None


def to_toml(page: Page, without: Iterable[str] = ()) -> str:
    """The page as TOML that reads back as an equal page, but for the keys left out."""
    plain, tables = [], []
    for key, value in page.model_dump(exclude=set(without)).items():
        if table_of(type(page).model_fields[key]):
            for entry in value:
                tables += ["", f"[[{key}]]", *(f"{name} = {toml_value(entry[name])}" for name in entry)]
        else:
            plain.append(f"{key} = {toml_value(value)}")
    return "\n".join(plain + tables) + "\n"


def toml_value(value: Any) -> str:
    """The value as TOML: JSON, but for the delete character, and `${NAME}` for a secret that the environment holds."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    for name, secret in os.environ.items() if isinstance(value, str) else ():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(secret) >= 8:
            value = value.replace(secret, f"${{{name}}}")
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The files behind `@`, with or without a space, and all the rest."""
    files, flags, remaining = [], [], iter(arguments)
    for argument in remaining:
        if argument.startswith("@"):
            files.append(argument[1:] or next(remaining, ""))
            if not files[-1] or files[-1].startswith("-"):
                raise UserError("@ needs a TOML file behind it, as in @ configs/sft_tiny.toml")
        else:
            flags.append(argument)
    return files, flags


def read_toml(file: str, page: type[Page]) -> Values:
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        siblings = [str(path) for path in Path(file).parent.glob("*.toml")]
        raise UserError(f"{file}: {error.strerror}{did_you_mean(file, siblings)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    try:
        layer = tomllib.loads(text)
    except ValueError as error:
        message = str(error).replace("Cannot overwrite a value", "This key is given twice")
        line = re.search(r"at line (\d+)", message)
        raise UserError(f"{file}: {message}{f': {text.splitlines()[int(line[1]) - 1]}' if line else ''}") from error
    for key in layer.keys() & {key for key, field in page.model_fields.items() if table_of(field)}:
        if not isinstance(layer[key], list) or not all(isinstance(entry, dict) for entry in layer[key]):
            value = toml_value(layer[key])
            raise UserError(f"{file}: {key} = {value} should be tables with a path, each headed [[{key}]]")
    return with_environment(layer, file)


def with_environment(value: Any, place: str) -> Any:
    """The value, each `${NAME}` in its strings replaced by that environment variable."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{place} = {toml_value(value)}: {match[1]} is not in the environment; export it")
        return os.environ[match[1]]

    if isinstance(value, dict):
        return {key: with_environment(entry, f"{place}: {key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [with_environment(entry, place) for entry in value]
    return re.sub(r"\$\{(\w+)\}", variable, value) if isinstance(value, str) else value


def with_entry(entries: list[Values], index: int, name: str, text: Typed) -> list[Values]:
    entries = entries + [{}] * (index + 1 - len(entries))
    return [*entries[:index], entries[index] | {name: text}, *entries[index + 1 :]]


class OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        mend = "needs a value behind it; one that begins with - is written OPTION=VALUE"
        message = (
            message.removeprefix("argument ")
            .replace(": expected one argument", f" {mend}")
            .replace(": expected at least one argument", f" {mend}")
        )
        raise UserError(message.replace(": ignored explicit argument", " takes no value, but has"))


def read_flags(
    page: type[Page], program: str, flags: list[str], values: Values, origins: dict[str, str]
) -> dict[str, Typed]:
    """What was typed for each option, a list where it takes several; `--help` shows what the files give, and exits."""
    parser = OptionParser(
        prog=program,
        usage=f"{program} [@ FILE.toml ...] [--option VALUE ...]",
        description=page.__doc__,
        epilog="Files are layered from left to right, and options win. Whatever is true|false has a --no- form, as in "
        "--no-packing. In brackets: the value now in force, and the file it is from.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    spellings: list[str] = []
    for section, members in groupby(options(page, program, flags, values), key=itemgetter(0)):
        group = parser.add_argument_group(section)
        for _, option, field, value in members:
            value = SecretStr(str(value)) if field.annotation is SecretStr else value
            now = "required" if value is PydanticUndefined else toml_value(value)
            origin = origins.get(option.split(".")[0]) if value != field.default else None
            text = f"{field.description} [{now}{f' from {origin}' if origin else ''}]".replace("%", "%%")
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            kind = "|".join(choices) or getattr(field.annotation, "__name__", "").removeprefix("Secret").upper()
            add = partial(group.add_argument, dest=option)
            spellings.append(spelling(option))
            if field.annotation is not bool:
                count = "+" if get_origin(field.annotation) is tuple else None
                add(spellings[-1], action="append", nargs=count, metavar="TEXT" if count else kind, help=text)
                continue
            add(spellings[-1], action="append", nargs="?", const="true", metavar="true|false", help=text)
            spellings.append(spelling(f"no_{option}"))
            add(spellings[-1], action="append_const", const="false", help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(flags)
    for flag in unknown:
        if flag.startswith("-"):
            name = flag.partition("=")[0]
            raise UserError(f"{name} is not an option of {program}{did_you_mean(name, spellings)}")
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no option; a TOML file is layered as @ {unknown[0]}")
    for option, texts in vars(known).items():
        if len(texts) > 1:
            raise UserError(f"{spelling(option)} is given twice: {' and '.join(map(shown, texts))}; keep one")
    return {option: with_environment(texts[0], spelling(option)) for option, texts in vars(known).items()}


def options(
    page: type[Page], program: str, flags: list[str], values: Values
) -> Iterator[tuple[str, str, FieldInfo, Any]]:
    """Section, name, field and value of each option; a table has as many entries as the files and flags mention."""
    for key, field in page.model_fields.items():
        if table := table_of(field):
            entries = values.get(key, [])
            mentioned = {match[1] for flag in flags if (match := re.match(rf"{spelling(key)}\.(\d+)\.", flag))}
            count = len(mentioned | {str(index) for index in range(len(entries))})
            for index in range(max(count, 1)):
                entry = entries[index] if index < len(entries) else {}
                for name, column in table.model_fields.items():
                    title = f"[[{key}]] {field.description}"
                    yield title, f"{key}.{index}.{name}", column, entry.get(name, column.default)
        else:
            section = next(part for part in reversed(page.__mro__) if key in inspect.get_annotations(part))
            title = f"Only for {program}" if section is page else str(section.__doc__)
            yield title, key, field, values.get(key, field.default)


def explain(
    problem: ErrorDetails, page: type[Page], program: str, typed: dict[str, Typed], origins: dict[str, str]
) -> str:
    """One of pydantic's errors as a sentence with the key, where its value is from, and the mend."""
    path = [str(part) for part in problem["loc"]]
    message = re.sub(r"^(Input|String|Value error,) |, unable to .*", "", problem["msg"])
    if not path:
        sources = [f"{key} from {origin}" for key, origin in origins.items() if re.search(rf"\b{key}\b", message)]
        return f"{message} ({', '.join(sources)})" if sources else message
    key, name, fields = ".".join(path), path[-1], page.model_fields
    if len(path) > 1 and (table := table_of(fields[path[0]])):
        fields = table.model_fields
    place = f"{origins[path[0]]}: {key}" if path[0] in origins else key
    if problem["type"] == "missing":
        option = f"{key}.0.path" if table_of(fields[name]) else key
        return f"{place} is required; give it as {spelling(option)}, or in a file as in {program} @ FILE.toml"
    if problem["type"] != "extra_forbidden":
        if name in fields and fields[name].annotation is SecretStr:
            return f"{place} {message}"
        given = f"{spelling(key)} {shown(typed[key])}" if key in typed else f"{place} = {toml_value(problem['input'])}"
        return f"{given} {message.replace('a valid boolean', 'true or false')}"
    if fields is not page.model_fields and name in page.model_fields:
        return f"{place} is a key of {program} itself; write it above the first [[{path[0]}]]"
    if isinstance(problem["input"], dict):
        return f"{place} is no table of {program}; its keys stand at the top, without [{name}]"
    return f"{place} is not a key of {program}{did_you_mean(name, fields)}"


def shown(typed: Typed) -> str:
    """What was typed for an option."""
    return typed if isinstance(typed, str) else " ".join(typed)


def table_of(field: FieldInfo) -> type[Page] | None:
    """The page of each entry, where a key takes tables."""
    return next(
        (kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Page)), None
    )


def spelling(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
