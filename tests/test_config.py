import errno
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lacuna import cli, config
from lacuna.cli import parse
from lacuna.config import (
    DataSource,
    EvalConfig,
    PretrainConfig,
    SftConfig,
    UserError,
    accumulation_steps,
    to_toml,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
READERS = [name for name, config in cli.COMMANDS.items() if "data" in config.model_fields and " " not in name]
BASE = 'model_name = "configs/tiny"\nrun_name = "base"\n'
DATA = '[[data]]\npath = "chats.jsonl"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a base.toml that is complete."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSET_NAME", raising=False)
    (tmp_path / "base.toml").write_text(BASE + DATA)
    return tmp_path


def sft(*arguments: str) -> SftConfig:
    return parse(SftConfig, ["@", "base.toml", *arguments], "sft")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the user reads before the command exits with 2."""
    with pytest.raises(SystemExit) as exit:
        cli.start("sft", list(arguments))
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


WRONG_OPTIONS = {
    "typo": ("--learning-rat 5", "--learning-rat is not an option of sft; did you mean --learning-rate?"),
    "typo with equals": (
        "--learning-rat=5",
        "--learning-rat is not an option of sft; did you mean --learning-rate?",
    ),
    "underscore": ("--learning_rate 5", "did you mean --learning-rate?"),
    "one dash": ("-steps 5", "-steps is not an option of sft; did you mean --steps?"),
    "abbreviation": ("--learning 5", "--learning is not an option of sft; did you mean --learning-rate?"),
    "typo in a switch": ("--no-pakcing", "did you mean --no-packing?"),
    "typo in a table": ("--data.0.pat x", "--data.0.pat is not an option of sft; did you mean --data.0.path?"),
    "gap in a table": ("--data.3.path x", "--data.3.path is not an option of sft; did you mean --data."),
    "list": ("--data a.jsonl b.jsonl", "--data is not an option of sft; did you mean --data.0.path?"),
    "wrong type": ("--steps many", "--steps many should be a valid integer"),
    "fraction": ("--steps 1.5", "--steps 1.5 should be a valid integer"),
    "wrong type in a table": ("--data.0.weight much", "--data.0.weight much should be a valid number"),
    "negative": ("--steps -5", "--steps -5 should be greater than or equal to 0"),
    "zero": ("--clip-norm 0", "--clip-norm 0 should be greater than 0"),
    "zero in a table": ("--data.0.weight 0", "--data.0.weight 0 should be greater than 0"),
    "inf": ("--learning-rate inf", "--learning-rate inf should be a finite number"),
    "minus inf": ("--weight-decay=-inf", "--weight-decay -inf should be a finite number"),
    "nan": ("--weight-decay nan", "--weight-decay nan should be a finite number"),
    "choice": ("--compute-dtype fp16", "--compute-dtype fp16 should be 'auto', 'bfloat16' or 'float32'"),
    "switch": ("--resume maybe", "--resume maybe should be true or false"),
    "no value": ("--steps --show 3", "--steps needs a value"),
    "twice": ("--steps 5 --steps=6", "--steps is given twice: 5 and 6"),
    "switch twice": ("--packing --no-packing", "--packing is given twice: true and false"),
    "junk": ("junk", "'junk' belongs to no option; put a value with spaces in quotes"),
    "file without @": ("a.toml", "'a.toml' belongs to no option; a TOML file is layered as @ a.toml"),
    "glob": ("--data.0.path a.jsonl b.jsonl", "put a glob in quotes, or give a second file as --data.1.path"),
    "second glob": ("--data.1.path a.jsonl b.jsonl", "or give a second file as --data.2.path"),
    "file after a path": ("--data.0.path a.jsonl b.toml", "a TOML file is layered as @ b.toml"),
    "nothing after @": ("@", "@ needs a TOML file after it"),
    "option after @": ("@ --steps 5", "@ needs a TOML file after it"),
    "missing file": ("@ bas.toml", "bas.toml: No such file or directory; did you mean base.toml?"),
    "directory": ("@ .", ".: Is a directory"),
    "unset variable": ("--output-dir ${UNSET_NAME}", "UNSET_NAME is not in the environment"),
    "no folder name": ("--run-name a/b", "--run-name a/b should be a plain folder name"),
    "parent folder": ("--run-name ..", "--run-name .. should be a plain folder name"),
    "no day": ("--template-date 2024-13-01", "--template-date 2024-13-01 should be a day such as 2024-07-26"),
    "batch": ("--batch-size 10 --micro-batch-size 4", "batch_size = 10 is not a multiple of the 4 rows"),
    "batch, fixed": (
        "--batch-size 10 --micro-batch-size 4",
        "set batch_size to 8 or 12 (batch_size from the command",
    ),
    "batch on a mesh": (
        "--batch-size 6 --data-parallel 2 --fsdp 4",
        "data_parallel × fsdp = 8); set batch_size to 8",
    ),
    "warm-up": ("--warmup-steps 9 --steps 5", "warmup_steps = 9 is more than steps = 5"),
    "nothing to do": ("--epochs 0", "steps = 0 and epochs = 0"),
    "resume and overwrite": ("--resume --overwrite", "resume and overwrite contradict each other"),
    "no held-out data": ("--eval-every 5", "eval_every = 5 has nothing to do; add [[eval_data]]"),
    "no name": ("--run-name=", "run_name is required"),
}


@pytest.mark.parametrize("flags, words", WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_is_refused_with_its_name_and_the_fix(
    flags: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "@", "base.toml", *flags.split(" "))


WRONG_FILES = {
    "typo": ("learning_rat = 5", DATA, ": learning_rat is not a key of sft; did you mean learning_rate?"),
    "kebab": ("learning-rate = 5", DATA, ": learning-rate is not a key of sft; did you mean learning_rate?"),
    "typo in a table": ("", DATA + "splt = 'test'", ": data.0.splt is not a key of sft; did you mean split?"),
    "key below a table": (
        "",
        DATA + "steps = 5",
        ": data.0.steps is a key of sft itself; write it above the first [[",
    ),
    "header": ("", DATA + "[training]\nsteps = 5", ": training is not a table of sft"),
    "single table": (
        "",
        "[data]\npath = 'x'",
        ': data = {"path": "x"} should be tables with a path, each headed [[data]]',
    ),
    "names": ("data = ['a.jsonl']", "", ': data = ["a.jsonl"] should be tables with a path, each headed [[data]]'),
    "no data": ("", "", "data is required; give it as --data.0.path"),
    "empty data": ("data = []", "", ": data = [] is empty; add a [[data]] table"),
    "no path": ("", "[[data]]\nsplit = 'train'", ": data.0.path is required; give it as --data.0.path"),
    "wrong type": ("steps = 'many'", DATA, ': steps = "many" should be a valid integer'),
    "boolean for number": ("steps = true", DATA, ": steps = true should be a number"),
    "number for boolean": ("packing = 7", DATA, ": packing = 7 should be true or false"),
    "list": ("steps = [1, 2]", DATA, ": steps = [1, 2] should be a valid integer"),
    "negative": ("batch_size = -4", DATA, ": batch_size = -4 should be greater than or equal to 1"),
    "inf": ("learning_rate = inf", DATA, ": learning_rate = Infinity should be a finite number"),
    "nan in a table": ("", DATA + "weight = nan", ": data.0.weight = NaN should be a finite number"),
    "twice": ("steps = 5\nsteps = 6", DATA, ": This key is given twice (at line 4, column 10): steps = 6"),
    "deep": ("steps = " + "[" * 10**5, DATA, ": maximum recursion depth exceeded"),
    "broken": ("steps = ", DATA, ": Invalid value (at line 3, column 9): steps ="),
    "unset": ("output_dir = '${UNSET_NAME}'", DATA, ': output_dir = "${UNSET_NAME}": UNSET_NAME is not in the env'),
    "unset in a table": (
        "",
        "[[data]]\npath = '${UNSET_NAME}'",
        ': data: path = "${UNSET_NAME}": UNSET_NAME is not in',
    ),
    "contradiction": ("steps = 5\nwarmup_steps = 9", DATA, "(steps from bad.toml, warmup_steps from bad.toml)"),
}


@pytest.mark.parametrize("keys, tables, words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_toml_is_refused_with_key_file_and_fix(
    keys: str, tables: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.toml").write_text(f"{BASE}{keys}\n{tables}")
    assert ("bad.toml" + words if words.startswith(":") else words) in refusal(capsys, "@", "bad.toml")


def test_no_arguments_at_all_are_answered_with_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys)
    assert "model_name is required; give it as --model-name" in message and "data is required" in message


def test_a_toml_that_is_not_utf8_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.toml").write_bytes(b'run_name = "\xff"')
    assert "bad.toml: byte 12 is not UTF-8" in refusal(capsys, "@bad.toml")


def test_every_mistake_is_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "@", "base.toml", "--steps", "x", "--seed", "-1", "--train-on", "none")
    assert [line.split()[-1] for line in message.splitlines()] == ["integer", "0", "'last'"]


def test_layers_win_from_left_to_right_and_flags_over_all(folder: Path) -> None:
    (folder / "first.toml").write_text("steps = 1\nseed = 1\nkeep = 1\n[[data]]\npath = 'a'\n[[data]]\npath = 'b'")
    (folder / "second.toml").write_text("\ufeffsteps = 2\nseed = 2\n[[data]]\npath = 'c'")
    config = sft("--steps", "3", "@first.toml", "--data.0.weight", "2", "@", "second.toml")
    assert (config.steps, config.seed, config.keep, config.batch_size) == (3, 2, 1, 64)
    assert config.data == (DataSource(path="c", weight=2.0),)


def test_flags_alone_are_enough_and_tables_grow_in_any_order() -> None:
    arguments = [
        "--model-name",
        "m",
        "--run-name",
        "r",
        "--data.1.path",
        "b",
        "--data.0.path",
        "a",
        "--data.1.weight",
        "2",
    ]
    assert parse(SftConfig, arguments, "sft").data == (
        DataSource(path="a"),
        DataSource(path="b", weight=2),
    )


def test_switches_are_set_by_their_name_by_no_or_by_a_value(folder: Path) -> None:
    spelled = [["--packing"], ["--packing", "true"], ["--packing=false"], ["--no-packing"], []]
    assert [sft(*flags).packing for flags in spelled] == [True, True, False, False, True]


@pytest.mark.parametrize(
    "text, flags",
    [
        ("steps = 5\nwarmup_steps = 9", "--steps 10"),
        ("batch_size = 10\nmicro_batch_size = 4", "--batch-size 12"),
        ("learning_rate = -1", "--learning-rate 1e-3"),
        ("resume = true\noverwrite = true", "--no-resume"),
        ("run_name = ''", "--show 3"),
    ],
)
def test_flags_fix_what_a_file_got_wrong(text: str, flags: str, folder: Path) -> None:
    (folder / "wrong.toml").write_text(text)
    with pytest.raises(UserError):
        sft("@", "wrong.toml")
    sft("@", "wrong.toml", *flags.split())


def test_environment_variables_are_replaced_in_any_string(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "ada")
    monkeypatch.setenv("STEPS", "12")
    (folder / "more.toml").write_text("run_name = '${WHO}_1'\nsteps = '${STEPS}'\n[[data]]\npath = '/home/${WHO}/x'")
    config = sft("@", "more.toml", "--output-dir", "${WHO}")
    assert (config.run_name, config.steps, config.data[0].path, config.output_dir) == (
        "ada_1",
        12,
        "/home/ada/x",
        "ada",
    )


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", READERS)
def test_help_shows_every_key_with_its_description_and_the_value_in_force(
    command: str, columns: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (folder / "base.toml").write_text(BASE + "sequence_length = 48\n" + DATA)
    with pytest.raises(SystemExit) as exit:
        cli.start(command, ["@", "base.toml", "--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert exit.value.code == 0 and max(map(len, shown.splitlines())) <= columns
    own_fields = cli.COMMANDS[command].model_fields
    reads_data = "data" in own_fields
    for fields in (own_fields, DataSource.model_fields if reads_data else {}):
        for key, field in fields.items():
            assert key.replace("_", "-") in words and field.description and field.description in words
    here = ("[48 from base.toml]", '["chats.jsonl" from base.toml]', '["auto"]') if reads_data else ("[4096]",)
    assert all(value in words for value in here)


def test_a_bad_command_line_and_the_help_import_nothing_slow() -> None:
    code = (
        "import sys; from lacuna import cli\n"
        "try: cli.main()\n"
        "except SystemExit as exit: print(exit.code, {'jax', 'numpy', 'datasets', 'tokenizers'} & {*sys.modules})"
    )
    for argument, answer in (("--learning-rat", "2 set()"), ("--help", "0 set()")):
        result = subprocess.run([sys.executable, "-c", code, "sft", argument], capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == answer, result.stderr


def test_the_list_of_commands_keeps_a_name_apart_from_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    cli.start("--help", [])
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in cli.COMMANDS if not any(line.startswith(f"  {name}  ") for line in lines)] == []


def test_main_knows_its_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lacuna"])
    cli.main()
    assert {"pretrain", "sft", "eval"} <= set(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["lacuna", "evl"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2 and "evl is not a command of lacuna; did you mean eval?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["sft"], ["lacuna", "sft"]])
def test_a_command_runs_by_its_script_or_by_name_and_only_refusals_and_interrupts_lose_their_traceback(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Mock()
    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(sys, "argv", [f".venv/bin/{arguments[0]}", *arguments[1:], "@", "base.toml"])
    cli.main()
    assert run.call_args.args == (sft(),)

    for failure, code, words in (
        (UserError("chat.jsonl line 8"), 2, "error: chat.jsonl line 8\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        run.side_effect = failure
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == code and capsys.readouterr().err == words
    run.side_effect = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_the_process_restarts_once_and_keeps_other_tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: started.append(environment))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    cli.prepare_process()
    assert not started
    monkeypatch.delitem(sys.modules, "pytest")
    cli.prepare_process()
    assert started[0]["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", started[0]["GLIBC_TUNABLES"])
    cli.prepare_process()
    assert len(started) == 1


def command_of(file: Path) -> str:
    """The command that the head of a config says to run with it."""
    found = re.search(rf"uv run (?:--extra \w+ )?(\w+) @ configs/{file.name}", file.read_text())
    assert found, file
    return found[1]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_parses_and_its_local_files_are_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parents[1])
    config = parse(cli.COMMANDS[command_of(file)], ["@", str(file)], command_of(file))
    sources = [source.path for key in ("data", "eval_data") for source in getattr(config, key, ())]
    assert all(Path(path).is_file() for path in sources if path.startswith("configs/"))
    assert not file.stem.endswith("tiny") or not sources or sources[0].startswith(("configs/tiny/", "prepared/tiny/"))


def test_there_are_configs_of_every_command_that_reads_data() -> None:
    assert set(READERS) <= {command_of(file) for file in CONFIGS}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: "${" not in text)


@given(
    model_name=TEXT,
    path=TEXT,
    weight=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**32 - 1),
    packing=st.booleans(),
    held_out_count=st.integers(0, 2),
)
def test_a_config_written_as_toml_reads_back_equal(
    model_name: str, path: str, weight: float, learning_rate: float, seed: int, packing: bool, held_out_count: int
) -> None:
    config = SftConfig(
        model_name=model_name,
        run_name="run",
        data=(DataSource(path=path, weight=weight), DataSource(path="b")),
        eval_data=(DataSource(path=path),) * held_out_count,
        learning_rate=learning_rate,
        seed=seed,
        packing=packing,
    )
    assert SftConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_a_secret_of_the_environment_is_written_as_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "correct horse")
    config = sft("--data.0.path", "https://me:${HUB_TOKEN}@example.org/x")
    (folder / "config.toml").write_text(to_toml(config))
    assert "correct horse" not in to_toml(config) and "me:${HUB_TOKEN}@" in to_toml(config)
    assert parse(SftConfig, ["@config.toml"], "sft") == config


def test_a_path_is_no_secret_whatever_variable_holds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a_model").mkdir()
    monkeypatch.setenv("TOKENIZER_DIR", str(folder / "a_model"))
    monkeypatch.setenv("MODEL_KEY", "Qwen/Qwen2.5-0.5B")
    config = sft("--model-name", "Qwen/Qwen2.5-0.5B", "--data.0.path", str(folder / "a_model" / "x.jsonl"))
    assert "$" not in to_toml(config)


def test_an_error_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.start("sft", ["--run-name", "\x1b[2J\x1b]0;title\x07"])
    error = capsys.readouterr().err
    assert "\\x1b[2J" in error and "\x1b" not in error and "\x07" not in error


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_accumulation_multiplies_to_the_batch_or_names_the_nearest_batches(batch: int, micro: int, shards: int) -> None:
    try:
        assert accumulation_steps(batch, micro, shards) * micro * shards == batch
    except UserError as error:
        named = [int(size) for size in re.findall(r"\d+", str(error).split("set batch_size to ")[1])]
        dividing = [size for size in range(1, batch + micro * shards + 1) if size % (micro * shards) == 0]
        assert named == [
            *[size for size in dividing if size < batch][-1:],
            *[size for size in dividing if size > batch][:1],
        ]


def test_configs_are_frozen_and_hash() -> None:
    config = PretrainConfig(model_name="m", run_name="r", data=(DataSource(path="a"),))
    assert hash(config) == hash(config.model_copy())
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 5  # ty: ignore[invalid-assignment]


def test_a_value_may_begin_with_a_dash_where_it_is_a_number_or_has_a_space() -> None:
    flags = ["--model-name", "m", "--data.0.path", "x", "--frequency-penalty", "-1e-3", "--system-prompt", "- be brief"]
    config = parse(EvalConfig, flags, "eval")
    assert (config.frequency_penalty, config.system_prompt) == (-1e-3, "- be brief")


def test_an_evaluation_is_named_after_its_model_unless_named() -> None:
    flags = ["--model-name", "runs/sft_tiny/", "--data.0.path", "x"]
    assert parse(EvalConfig, flags, "eval").run_directory == Path("runs/eval_sft_tiny")
    assert parse(EvalConfig, [*flags, "--run-name", "mine"], "eval").run_directory == Path("runs/mine")


def test_a_key_with_several_texts_takes_them_one_after_another_and_reads_back(tmp_path: Path) -> None:
    arguments = ["--model-name", "m", "--run-name", "r", "--data.0.path", "d", "--sample-prompts", "one two", 'say "3"']
    config = parse(SftConfig, arguments, "sft")
    assert config.sample_prompts == ("one two", 'say "3"')
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert parse(SftConfig, ["@", str(tmp_path / "again.toml")], "sft") == config


@pytest.mark.parametrize(
    ("given", "share", "has_gpus", "flags"),
    [
        ("", "", True, "--xla_gpu_memory_limit_slop_factor=115"),
        ("--xla_a=1", "", True, "--xla_a=1 --xla_gpu_memory_limit_slop_factor=115"),
        ("", "0.4", True, "--xla_gpu_memory_limit_slop_factor=50"),
        ("--xla_gpu_memory_limit_slop_factor=90", "", True, "--xla_gpu_memory_limit_slop_factor=90"),
        ("--xla_a=1", "", False, "--xla_a=1"),
    ],
)
def test_the_compiler_for_gpus_counts_on_the_memory_that_xla_may_take(
    given: str, share: str, has_gpus: bool, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    if not share:
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setattr(cli, "find_spec", lambda name: object() if has_gpus and "cuda" in name else None)
    cli.share_memory()
    assert os.environ["XLA_FLAGS"] == flags and os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == (share or "0.92")


# The cache


@pytest.mark.parametrize("problem", ["no home", "not a directory", "no room"])
def test_a_cache_that_can_not_be_written_moves_with_a_warning(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own, chosen = tmp_path / f"lacuna-{os.getuid()}", tmp_path / problem
    if problem == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # HOME unset, and no entry among the users
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(chosen))
    if problem == "not a directory":
        chosen.write_text("")
    usual = tempfile.TemporaryFile

    def full(dir: Path) -> Any:
        if dir.is_relative_to(chosen):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    config.usable_cache.cache_clear()
    assert config.Keys().cache_dir == own == config.Keys().cache_dir
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: ") and f"the cache is {own}, unless XDG_CACHE_HOME" in line
    assert own.is_dir() and not own.lstat().st_mode & 0o077
    config.usable_cache.cache_clear()


def test_a_cache_is_not_moved_to_where_another_user_can_put_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"lacuna-{os.getuid()}").symlink_to("theirs")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(UserError, match="/dev/null/lacuna: .*; set XDG_CACHE_HOME to a directory with room"):
        _ = config.Keys().cache_dir


def test_template_variables_are_names_with_values_in_json() -> None:
    pairs = "enable_thinking=false", 'mode = "a=b"'
    made = SftConfig(model_name="m", run_name="r", data=({"path": "x"},), template_variables=pairs)
    assert made.template == ("", "2024-07-26", {"enable_thinking": False, "mode": "a=b"}) and hash(made)
    with pytest.raises(ValidationError, match="no NAME=VALUE with a value in JSON; write .*mode=.text"):
        SftConfig(model_name="m", run_name="r", data=({"path": "x"},), template_variables=("mode=brief",))
