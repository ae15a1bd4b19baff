"""The commands: from files, flags and environment variables to a config, and from a config to the room that runs it.

TOML files are layered left to right, flags are the last layer, and `${NAME}` is an environment variable in any of them.
pydantic checks the merged result once, so a flag may fix what a file got wrong. A refusal names the key, where its
value is from, and how to fix it.
"""

import argparse
import inspect
import os
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from lacuna.apps.configs import PLANS, ChatConfig, PlanKeys, ServeConfig
from lacuna.config import (
    DEVICE_MEMORY_SHARE,
    GPU_PLUGINS,
    EvalConfig,
    GrpoConfig,
    Keys,
    PretrainConfig,
    RowsConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    did_you_mean,
    table_of,
    toml_value,
)

Config = TypeVar("Config", bound=Keys)
Values = dict[str, Any]
Typed = str | list[str]


def parse(config: type[Config], arguments: list[str], program: str) -> Config:
    """The page that layers `@ file.toml` and flags make together; `--help` prints it and exits.

    Raises:
        UserError: a line for each thing that is wrong.
    """
    files, flags = split_arguments(arguments)
    values: Values = {}
    origins: dict[str, str] = {}
    for file in files:
        layer = read_toml(file, config)
        values |= layer
        origins |= dict.fromkeys(layer, file)
    typed = read_flags(config, program, flags, values, origins)
    for option, text in typed.items():
        key, *entry = option.split(".")
        if entry:
            values[key] = with_entry(values.get(key, []), int(entry[0]), entry[1], text)
            origins.setdefault(key, "the command line")
        else:
            values[key] = text
            origins[key] = "the command line"
    try:
        return config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(one, config, program, typed, origins) for one in error.errors())) from None


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


def read_toml(file: str, config: type[Keys]) -> Values:
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
    for key in layer.keys() & {key for key, field in config.model_fields.items() if table_of(field)}:
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
    config: type[Keys], program: str, flags: list[str], values: Values, origins: dict[str, str]
) -> dict[str, Typed]:
    """What was typed for each option, a list where it takes several; `--help` shows what the files give, and exits."""
    parser = OptionParser(
        prog=program,
        usage=f"{program} [@ FILE.toml ...] [--option VALUE ...]",
        description=config.__doc__,
        epilog="Files are layered from left to right, and options win. Whatever is true|false has a --no- form, as in "
        "--no-packing. In brackets: the value now in force, and the file it is from.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    spellings: list[str] = []
    for section, members in groupby(options(config, program, flags, values), key=itemgetter(0)):
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
    config: type[Keys], program: str, flags: list[str], values: Values
) -> Iterator[tuple[str, str, FieldInfo, Any]]:
    """Section, name, field and value of each option; a table has as many entries as the files and flags mention."""
    for key, field in config.model_fields.items():
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
            section = next(part for part in reversed(config.__mro__) if key in inspect.get_annotations(part))
            title = f"Only for {program}" if section is config else str(section.__doc__)
            yield title, key, field, values.get(key, field.default)


def explain(
    problem: ErrorDetails, config: type[Keys], program: str, typed: dict[str, Typed], origins: dict[str, str]
) -> str:
    """One of pydantic's errors as a sentence with the key, where its value is from, and the mend."""
    path = [str(part) for part in problem["loc"]]
    message = re.sub(r"^(Input|String|Value error,) |, unable to .*", "", problem["msg"])
    if not path:
        sources = [f"{key} from {origin}" for key, origin in origins.items() if re.search(rf"\b{key}\b", message)]
        return f"{message} ({', '.join(sources)})" if sources else message
    key, name, fields = ".".join(path), path[-1], config.model_fields
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
    if fields is not config.model_fields and name in config.model_fields:
        return f"{place} is a key of {program} itself; write it above the first [[{path[0]}]]"
    if isinstance(problem["input"], dict):
        return f"{place} is no table of {program}; its keys stand at the top, without [{name}]"
    return f"{place} is not a key of {program}{did_you_mean(name, fields)}"


def shown(typed: Typed) -> str:
    """What was typed for an option."""
    return typed if isinstance(typed, str) else " ".join(typed)


def spelling(option: str) -> str:
    return f"--{option.replace('_', '-')}"


PAGES = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "grpo": GrpoConfig,
    "eval": EvalConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
}
XLA_BASE_SHARE = 0.8  # of a GPU's memory, on which its compiler's limit is a percentage


def main() -> None:
    """`lacuna <command> …`, the same as the command's own script."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: lacuna COMMAND [@ FILE.toml ...] [--option VALUE ...]\n")
        for name, config in PAGES.items():
            print(f"  {name:10}{config.__doc__}")
        print("  plan COMMAND  What a run of pretrain, sft or grpo would take on accelerators that are not here")
        print("\nEvery option of a command, with the value now in force: lacuna COMMAND --help")
    elif command in (*PAGES, "plan"):
        start(command, arguments)
    else:
        stop(f"error: {command} is not a command of lacuna{did_you_mean(command, (*PAGES, 'plan'))}", 2)


def pretrain() -> None:
    start("pretrain", sys.argv[1:])


def sft() -> None:
    start("sft", sys.argv[1:])


def grpo() -> None:
    start("grpo", sys.argv[1:])


def evaluate() -> None:
    start("eval", sys.argv[1:])


def chat() -> None:
    start("chat", sys.argv[1:])


def serve() -> None:
    start("serve", sys.argv[1:])


def plan() -> None:
    start("plan", sys.argv[1:])


def start(command: str, arguments: list[str]) -> None:
    """Run a command; a UserError exits with 2, an interrupt with 130, each in one line."""
    try:
        share_memory()
        if command == "grpo" and "--replay" in arguments[:-1]:  # a replay begins with the config of its run
            arguments = ["@", f"{arguments[arguments.index('--replay') + 1]}/config.toml", *arguments]
        if command == "plan":
            run(parse(*page_to_plan(arguments)))
            return
        config = parse(PAGES[command], arguments, command)
        if isinstance(config, ChatConfig):
            run(config)
            return
        prepare_process()
        if isinstance(config, ServeConfig):
            run(config)
            return
        from lacuna.distributed import cluster

        with cluster():
            run(config)
    except UserError as error:
        stop(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        stop(f"interrupted{interrupt}", 130)


def run(config: Keys) -> Any:
    """Do what a command's config asks for; each room is imported only here, for jax is slow to import."""
    if isinstance(config, PlanKeys):
        from lacuna.apps.plan import run_plan

        assert isinstance(config, TrainingConfig)
        return run_plan(config)
    if isinstance(config, ChatConfig):
        from lacuna.apps.chat import run_chat

        return run_chat(config)
    if isinstance(config, ServeConfig):
        from lacuna.apps.serve import run_serve

        return run_serve(config)
    if isinstance(config, EvalConfig):
        from lacuna.eval import run_eval

        return run_eval(config, harness_of(config))
    assert isinstance(config, TrainingConfig)
    if isinstance(config, GrpoConfig) and config.replay:
        from lacuna.apps.replay import replay

        return replay(config, parse(GrpoConfig, ["@", f"{config.replay}/config.toml"], "grpo"))
    if isinstance(config, SftConfig) and config.show:
        from lacuna.apps.show import show_rows

        return show_rows(config)
    prepare = tasks_of(config)
    from lacuna.apps.report import write_report

    if isinstance(config, GrpoConfig):
        from lacuna.apps.rewards import load_rewards
        from lacuna.grpo import run_grpo

        return run_grpo(config, load_rewards(config.reward), prepare, write_report)
    assert isinstance(config, RowsConfig)
    from lacuna.eval import evaluation_of_rows
    from lacuna.trainer import run_training

    return run_training(config, partial(evaluation_of_rows, prepare), write_report)


def harness_of(config: EvalConfig) -> Any:
    """What runs the tasks of lm-evaluation-harness, where the config has any; its library is an extra."""
    if not config.harness_tasks:
        return None
    from lacuna.apps.harness import load_tasks

    return load_tasks(config)


def tasks_of(config: TrainingConfig) -> Any:
    """What prepares the tasks of eval_config, as that file is when the run begins, for a model that was opened."""
    if not config.eval_config:
        return None
    tasks = parse(EvalConfig, ["@", config.eval_config, "--model-name", config.model_name], "eval")
    if "loss" in tasks.tasks:
        raise UserError(
            f"{config.eval_config}: tasks has loss, which a run measures on [[eval_data]]; take it out, or give "
            'tasks, as in tasks = ["generate"]'
        )
    from lacuna.eval import prepare_tasks

    return partial(prepare_tasks, tasks, harness_of(tasks))


def page_to_plan(arguments: list[str]) -> tuple[type[TrainingConfig], list[str], str]:
    """The page, arguments and program name of `plan COMMAND …`."""
    command, *rest = arguments or [""]
    if command in ("-h", "--help"):
        print(f"usage: plan COMMAND [@ FILE.toml ...] [--option VALUE ...]\n\nCOMMAND is one of {', '.join(PLANS)}; "
              "plan COMMAND --help shows its options")  # fmt: skip
        raise SystemExit(0)
    if command not in PLANS:
        asked = " (plan COMMAND --help shows its options)" if not command else ""
        raise UserError(
            f"plan needs a command that trains behind it, {', '.join(PLANS)}, as in plan sft @ FILE.toml{asked}"
        )
    return PLANS[command], rest, f"plan {command}"


def stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def share_memory() -> None:
    """Let XLA have its share of an accelerator's memory, and its compiler for GPUs know of it.

    That one counts on 76 % of what the arguments leave otherwise; for what is more it hides no communication and
    computes matrix products again, where all of it would have room.
    """
    usual = str(DEVICE_MEMORY_SHARE)  # JAX takes three quarters otherwise
    share = os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", usual)
    flags, limit = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_memory_limit_slop_factor"
    if limit not in flags and any(find_spec(plugin) for plugin in GPU_PLUGINS):
        try:
            percentage = round(100 * float(share) / XLA_BASE_SHARE)
        except ValueError as error:
            raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION = {share!r} should be a number, as 0.9") from error
        os.environ["XLA_FLAGS"] = f"{flags} {limit}={percentage}".strip()


def prepare_process() -> None:
    """Start again, once, with huge pages in malloc, as XLA on a CPU faults its temporaries in anew at every step."""
    share_memory()
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb=" in tunables or "pytest" in sys.modules:
        return
    environment = os.environ | {"GLIBC_TUNABLES": f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")}
    os.execve(sys.executable, sys.orig_argv, environment)
