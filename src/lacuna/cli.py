"""The commands: from files, flags and environment variables to a config, and from a config to the room that runs it.

TOML files are layered left to right, flags are the last layer, and `${NAME}` is an environment variable in any of them.
pydantic checks the merged result once, so a flag may fix what a file got wrong. An error message names the key, where
its value came from, and how to fix it.
"""

import inspect
import io
import os
import platform
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from lacuna.apps.configs import (
    ChatConfig,
    CheckKeys,
    ConvertConfig,
    GrpoCheck,
    GrpoPlan,
    MergeConfig,
    PlanKeys,
    PrepareConfig,
    PretrainCheck,
    PretrainPlan,
    RecommendConfig,
    ServeConfig,
    SftCheck,
    SftPlan,
)
from lacuna.config import (
    LINES,
    TABLES,
    DataSource,
    EvalConfig,
    GrpoConfig,
    Keys,
    PretrainConfig,
    RowsConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    did_you_mean,
    printable,
    toml_value,
)

COMMANDS: dict[str, type[Keys]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "grpo": GrpoConfig,
    "eval": EvalConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "check pretrain": PretrainCheck,
    "check sft": SftCheck,
    "check grpo": GrpoCheck,
    "plan pretrain": PretrainPlan,
    "plan sft": SftPlan,
    "plan grpo": GrpoPlan,
    "recommend prepare": PrepareConfig,
    "recommend eval": RecommendConfig,
}
PREFIXES = {name.split()[0] for name in COMMANDS if " " in name}
COMMAND_LINE = "the command line"
HELP = {"-h", "--help"}
KINDS: dict[Any, str] = {bool: "true|false", int: "INT", float: "FLOAT", str: "STR", SecretStr: "STR"}
FLAG = re.compile(r"--?[a-zA-Z][^\s=]*(=.*)?", re.DOTALL)
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # JAX's own, one of which is installed for GPUs
DEVICE_MEMORY_SHARE = 0.92  # that XLA may take; the rest goes to the driver and to communication
XLA_BASE_SHARE = 0.8  # of a GPU's memory, to which the limit of its compiler is relative

Config = TypeVar("Config", bound=Keys)
Values = dict[str, Any]


# From the command line to a config


class Option(NamedTuple):
    """An option of a command: its key, as in `data.0.path`, and its value in the files, as the help shows it."""

    section: str
    key: str
    field: FieldInfo
    value: str


def parse(config: type[Config], arguments: list[str], program: str) -> Config:
    """The config that the layers `@ file.toml` and the flags make together; `--help` prints the options and exits.

    Raises:
        UserError: a line for each mistake.
    """
    files, flags = split_arguments(arguments)
    values: Values = {}
    origins: dict[str, str] = {}
    for file in files:
        layer = read_toml(file, config)
        values |= layer
        origins |= dict.fromkeys(layer, file)
    options = command_options(config, program, [name for name, _ in flags], values, origins)
    if any(name in HELP for name, _ in flags):
        print(help_text(config, program, options))
        raise SystemExit(0)
    for option, given in read_flags(flags, options, program).items():
        path, layer = option.split("."), values
        if len(path) > 1:
            tables, index = values.setdefault(path[0], []), int(path[1])
            tables += [{} for _ in range(index + 1 - len(tables))]
            layer = tables[index]
        layer[path[-1]] = given
        origins[option] = COMMAND_LINE
        origins.setdefault(path[0], COMMAND_LINE)
    try:
        return config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(one, config, program, origins) for one in error.errors())) from None


def split_arguments(arguments: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The files after `@`, with or without a space, and each flag with the texts after it."""
    files: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("@"):
            files.append(argument[1:] or next(remaining, ""))
            if not files[-1] or files[-1].startswith("-"):
                raise UserError("@ needs a TOML file after it, as in @ configs/sft_tiny.toml")
        elif FLAG.fullmatch(argument):
            name, equals, text = argument.partition("=")
            flags.append((name, [text] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        else:
            refuse_value(argument)
    return files, flags


def read_toml(file: str, config: type[Keys]) -> Values:
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
        layer = tomllib.loads(text)
    except OSError as error:
        siblings = [str(path) for path in Path(file).parent.glob("*.toml")]
        raise UserError(f"{file}: {error.strerror}{did_you_mean(file, siblings)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        message = str(error).replace("Cannot overwrite a value", "This key is given twice")
        line = re.search(r"at line (\d+)", message)
        raise UserError(f"{file}: {message}{f': {text.splitlines()[int(line[1]) - 1]}' if line else ''}") from error
    for key in tables_of(config) & layer.keys():
        if not isinstance(layer[key], list) or not all(isinstance(entry, dict) for entry in layer[key]):
            value = toml_value(layer[key])
            raise UserError(f"{file}: {key} = {value} should be tables with a path, each headed [[{key}]]")
    return with_environment(layer, file)


def tables_of(config: type[Keys]) -> set[str]:
    """The keys of a config that are written as [[tables]]."""
    fields = config.model_fields
    return {key for key in TABLES if key in fields and get_origin(fields[key].annotation) is tuple}


def with_environment(value: Any, place: str) -> Any:
    """The value, with each `${NAME}` in its strings replaced by that environment variable."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{place} = {toml_value(value)}: {match[1]} is not in the environment; export it")
        return os.environ[match[1]]

    if isinstance(value, dict):
        return {key: with_environment(entry, f"{place}: {key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [with_environment(entry, place) for entry in value]
    return re.sub(r"\$\{(\w+)\}", variable, value) if isinstance(value, str) else value


def command_options(
    config: type[Keys], program: str, flags: list[str], values: Values, origins: dict[str, str]
) -> dict[str, Option]:
    """Each option by its spelling; `[[data]]` has as many entries as the files and flags mention."""
    found = []
    for key, field in config.model_fields.items():
        if key in tables_of(config):
            entries = values.get(key, [])
            mentioned = {flag.split(".")[1] for flag in flags if re.match(rf"{spelling(key)}\.\d+\.", flag)}
            count = len(mentioned | {*map(str, range(len(entries)))}) or 1
            for index, entry in enumerate((entries + [{}] * count)[:count]):
                for name, column in DataSource.model_fields.items():
                    value = value_in_force(column, entry, name, origins.get(key))
                    found.append(Option(f"[[{key}]] {field.description}", f"{key}.{index}.{name}", column, value))
        else:
            owner = next(part for part in reversed(config.__mro__) if key in inspect.get_annotations(part))
            section = f"Only for {program}" if owner is config else str(owner.__doc__)
            found.append(Option(section, key, field, value_in_force(field, values, key, origins.get(key))))
    return {spelling(option.key): option for option in found}


def spelling(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def value_in_force(field: FieldInfo, layer: Values, name: str, origin: str | None) -> str:
    if name not in layer:
        return "required" if field.is_required() else toml_value(field.default)
    value = SecretStr(str(layer[name])) if field.annotation is SecretStr else layer[name]
    return f"{toml_value(value)} from {origin}"


def help_text(config: type[Keys], program: str, options: dict[str, Option]) -> str:
    width, margin = shutil.get_terminal_size().columns, 34
    fill = partial(textwrap.fill, width=width, subsequent_indent=" " * margin, break_on_hyphens=False)
    lines = [f"usage: {program} [@ FILE.toml ...] [--option VALUE ...]\n\n{config.__doc__}"]
    for section, members in groupby(options.items(), key=lambda member: member[1].section):
        lines.append(f"\n{section}:")
        for name, option in members:
            kind = option.field.annotation
            choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else "TEXT ..."
            head = f"  {name} {KINDS.get(kind, choices)}"
            if len(head) >= margin:
                lines.append(head)
                head = ""
            text = f"{option.field.description} [{option.value}]"
            lines.append(fill(text, initial_indent=head.ljust(margin)))
    end = (
        "Files are layered from left to right, and options override them. Options that are true|false have a --no- "
        "form, as in --no-packing. In brackets: the value now in force, and the file it comes from."
    )
    return "\n".join([*lines, "", textwrap.fill(end, width)])


def read_flags(flags: list[tuple[str, list[str]]], options: dict[str, Option], program: str) -> Values:
    """The text given for each key, a list if the key takes several."""
    negated = {f"--no-{name[2:]}": name for name, option in options.items() if option.field.annotation is bool}
    values: Values = {}
    for name, texts in flags:
        if name not in options and name not in negated:
            raise UserError(f"{name} is not an option of {program}{did_you_mean(name, [*options, *negated])}")
        option = options[negated.get(name, name)]
        if name in negated:
            texts = ["false", *texts]
        elif not texts and option.field.annotation is bool:
            texts = ["true"]
        if not texts:
            raise UserError(f"{name} needs a value; one that begins with - is written {name}=VALUE")
        takes_several = get_origin(option.field.annotation) is tuple
        if len(texts) > 1 and not takes_several:
            refuse_value(texts[1], name)
        value = with_environment(texts if takes_several else texts[0], name)
        if option.key in values:
            both = f"{shown(values[option.key])} and {shown(value)}"
            raise UserError(f"{spelling(option.key)} is given twice: {both}; keep one")
        values[option.key] = value
    return values


def refuse_value(text: str, option: str = "") -> NoReturn:
    fix = f"a TOML file is layered as @ {text}" if text.endswith(".toml") else "put a value with spaces in quotes"
    if option.endswith(".path") and not text.endswith(".toml"):
        other = re.sub(r"\d+", lambda index: str(int(index[0]) + 1), option)
        fix = f"put a glob in quotes, or give a second file as {other}"
    raise UserError(f"{text!r} belongs to no option; {fix}")


def explain(problem: Mapping[str, Any], config: type[Keys], program: str, origins: dict[str, str]) -> str:
    """One of pydantic's errors as a sentence with the key, where its value came from, and how to fix it."""
    path = [str(part) for part in problem["loc"]]
    message = re.sub(r"^(Input|String|Value error,) |, unable to .*", "", problem["msg"])
    if not path:
        sources = [f"{key} from {origin}" for key, origin in origins.items() if re.search(rf"\b{key}\b", message)]
        return f"{message} ({', '.join(sources)})" if sources else message
    key, name = ".".join(path), path[-1]
    fields = DataSource.model_fields if len(path) > 1 and path[0] in TABLES else config.model_fields
    place = f"{origins[path[0]]}: {key}" if path[0] in origins else key
    if problem["type"] == "missing":
        option = f"{key}.0.path" if key in tables_of(config) else key
        return f"{place} is required; give it as {spelling(option)}, or in a file as in {program} @ FILE.toml"
    if problem["type"] != "extra_forbidden":
        if name in fields and fields[name].annotation is SecretStr:
            return f"{place} {message}"
        value, is_typed = problem["input"], origins.get(key) == COMMAND_LINE
        given = f"{spelling(key)} {shown(value)}" if is_typed else f"{place} = {toml_value(value)}"
        return f"{given} {message.replace('a valid boolean', 'true or false')}"
    if path[0] in TABLES and name in config.model_fields:
        return f"{place} is a key of {program} itself; write it above the first [[{path[0]}]]"
    if isinstance(problem["input"], dict):
        return f"{place} is not a table of {program}; write its keys at the top, without [{name}]"
    return f"{place} is not a key of {program}{did_you_mean(name, fields)}"


def shown(typed: str | list[str]) -> str:
    """What was typed for an option."""
    return typed if isinstance(typed, str) else " ".join(typed)


# From a config to the room that runs it


def main() -> None:
    """`lacuna COMMAND …`, or the script that is named after the command."""
    script = Path(sys.argv[0]).name
    is_command = script in {name.split()[0] for name in COMMANDS}
    command, *arguments = [script] * is_command + sys.argv[1:] or ["--help"]
    start(command, arguments)


def start(command: str, arguments: list[str]) -> None:
    """Run a command; a UserError exits with 2, an interrupt with 130, each with its message and no traceback."""
    try:
        if command == "check" and "@" in "".join(arguments) and f"check {arguments[0]}" not in COMMANDS:
            arguments = [trained_by(arguments), *arguments]
        if command in PREFIXES and arguments:
            command, arguments = f"{command} {arguments[0]}", arguments[1:]
        if command.split()[-1] in HELP:
            print("usage: lacuna COMMAND [@ FILE.toml ...] [--option VALUE ...]\n")
            for name, config in COMMANDS.items():
                print(f"  {name:19}{config.__doc__}")
            print("\nEvery option of a command, with the value now in force: lacuna COMMAND --help")
            return
        if command not in COMMANDS:
            raise UserError(
                f"{command} is not a command of lacuna{did_you_mean(command, COMMANDS)}; lacuna --help lists them"
            )
        if command == "grpo" and "--replay" in arguments[:-1]:
            arguments = [*run_config(arguments[arguments.index("--replay") + 1]), *arguments]
        config = parse(COMMANDS[command], arguments, command)
        prepare_process()
        prepare_streams(outlives_console=isinstance(config, TrainingConfig))
        if isinstance(
            config, PlanKeys | CheckKeys | ChatConfig | ServeConfig | ConvertConfig | MergeConfig | PrepareConfig
        ):
            run(config)
        else:
            from lacuna.distributed import cluster

            with cluster():
                run(config)
    except (UserError, KeyboardInterrupt) as error:
        is_refusal = isinstance(error, UserError)
        print(printable(f"error: {error}" if is_refusal else f"interrupted{error}", LINES), file=sys.stderr)
        raise SystemExit(2 if is_refusal else 130) from None


def run(config: Keys) -> Any:
    """Do what a config asks for; each room is imported only here, as jax is slow to import."""
    if isinstance(config, PretrainPlan | SftPlan | GrpoPlan):
        from lacuna.apps.plan import run_plan

        return run_plan(config)
    if isinstance(config, PretrainCheck | SftCheck | GrpoCheck):
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # for what has to be equal on one device and on all
        from lacuna.apps.check import run_check

        return run_check(config)
    if isinstance(config, ChatConfig):
        from lacuna.apps.chat import run_chat

        return run_chat(config)
    if isinstance(config, ServeConfig):
        from lacuna.apps.serve import run_serve

        return run_serve(config)
    if isinstance(config, MergeConfig):
        from lacuna.apps.merge import run_merge

        return run_merge(config)
    if isinstance(config, ConvertConfig):
        from lacuna.apps.convert import run_convert

        return run_convert(config)
    if isinstance(config, PrepareConfig):
        from lacuna.apps.recommend import run_prepare

        return run_prepare(config)
    if isinstance(config, RecommendConfig):
        from lacuna.apps.ranking import run_recommend

        return run_recommend(config)
    if isinstance(config, EvalConfig):
        from lacuna.apps.environments import load_environment
        from lacuna.apps.evaluate import run_eval

        return run_eval(config, harness_of(config), load_environment(config.environment))
    if isinstance(config, GrpoConfig) and config.replay:
        from lacuna.apps.replay import replay

        return replay(config, parse(GrpoConfig, run_config(config.replay), "grpo"))
    if isinstance(config, RowsConfig) and config.count:
        from lacuna.apps.count import count_rows

        return count_rows(config)
    if isinstance(config, SftConfig) and config.show:
        from lacuna.apps.show import show_rows

        return show_rows(config)
    from lacuna.apps.report import write_report

    assert isinstance(config, GrpoConfig | RowsConfig)
    tasks = tasks_of(config)
    if isinstance(config, GrpoConfig):
        from lacuna.apps.environments import load_judges
        from lacuna.apps.ranking import catalogue_forest
        from lacuna.grpo import run_grpo

        constrain = catalogue_forest if config.constrain else None
        return run_grpo(config, *load_judges(config), tasks, write_report, constrain)
    from lacuna.eval import evaluation_of_rows
    from lacuna.trainer import run_training

    return run_training(config, partial(evaluation_of_rows, tasks), write_report)


def trained_by(arguments: list[str]) -> str:
    """The command that the files of `check @ FILE` are for: the one that alone has one of their keys, or else the one
    that a file's name begins with. Raises UserError if neither tells."""
    files, _ = split_arguments(arguments)
    keys = {key for file in files for key in read_toml(file, SftConfig)}
    fields = {name: COMMANDS[name].model_fields.keys() for name in ("grpo", "sft", "pretrain")}
    for name, own in fields.items():
        if keys & own - set().union(*(other for each, other in fields.items() if each != name)):
            return name
    for name in fields:
        if any(Path(file).name.startswith(name) for file in files):
            return name
    raise UserError(
        f"which command {' '.join(files)} is for can't be told from it; write lacuna check sft @ {files[0]}"
    )


def run_config(directory: str) -> list[str]:
    """The arguments that read the config of an earlier run."""
    return ["@", f"{directory}/config.toml"]


def harness_of(config: EvalConfig) -> Any:
    """What runs the tasks of lm-evaluation-harness, if the config names any; its library is an extra."""
    if not config.harness_tasks:
        return None
    from lacuna.apps.harness import load_tasks

    return load_tasks(config)


def tasks_of(config: TrainingConfig) -> Any:
    """What prepares the tasks of `eval_config`, read when the run begins, for an opened model."""
    if not config.eval_config:
        return None
    tasks = parse(EvalConfig, ["@", config.eval_config, "--model-name", config.model_name], "eval")
    if "loss" in tasks.tasks:
        raise UserError(
            f"{config.eval_config}: tasks has loss, which a run measures on [[eval_data]]; remove it, or set "
            'tasks, as in tasks = ["generate"]'
        )
    from lacuna.apps.environments import load_environment
    from lacuna.eval import prepare_tasks

    return partial(prepare_tasks, tasks, harness_of(tasks), environment=load_environment(tasks.environment))


# The process


def share_memory() -> None:
    """Give XLA its share of an accelerator's memory, and pass the limit to its compiler for GPUs.

    The compiler assumes 76 % of what the arguments leave otherwise; beyond that it hides no communication and
    recomputes matrix products, although everything would fit.
    """
    share = os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(DEVICE_MEMORY_SHARE))  # JAX's default is 0.75
    flags, limit = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_memory_limit_slop_factor"
    if limit not in flags and any(find_spec(plugin) for plugin in GPU_PLUGINS):
        try:
            percentage = round(100 * float(share) / XLA_BASE_SHARE)
        except ValueError as error:
            raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION = {share!r} should be a number, as 0.9") from error
        os.environ["XLA_FLAGS"] = f"{flags} {limit}={percentage}".strip()


class LastingFile(io.FileIO):
    """An open descriptor that takes whatever is written, even if its terminal, pipe or disk no longer does."""

    def write(self, content: Any) -> int:
        with suppress(OSError):
            return super().write(content)
        return len(content)


def prepare_streams(outlives_console: bool) -> None:
    """Let standard output escape what its encoding lacks; that of a run may also go away, as its files hold it all."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))
            continue
        with suppress(AttributeError, io.UnsupportedOperation):  # of streams that are no files
            stream.reconfigure(errors="backslashreplace")
            if outlives_console:
                raw = io.BufferedWriter(LastingFile(stream.fileno(), "wb", closefd=False))
                stream = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, stream)


def prepare_process() -> None:
    """Restart once with huge pages in malloc; without them a CPU faults in XLA's temporaries again at every step."""
    share_memory()
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb=" in tunables or "pytest" in sys.modules:
        return
    environment = os.environ | {"GLIBC_TUNABLES": f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")}
    os.execve(sys.executable, sys.orig_argv, environment)
