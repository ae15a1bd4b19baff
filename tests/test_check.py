"""The command check: no false alarm where all is well, and each fault caught by the promise that names it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import PROGRAMS, REFERENCE, chat_run, make_small, text_run
from mutants import FAULTS, SOURCE
from safetensors.numpy import load_file

from lacuna import cli
from lacuna.apps.plain import plain_cut, plain_frequencies, plain_logits
from lacuna.apps.promises import LEARNED, READ
from lacuna.config import GrpoConfig, SftConfig, UserError, to_toml

BOS = "<|endoftext|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_all_that_can_go_wrong(small: Path) -> Path:
    """The small model with a BOS that its tokenizer adds and its template writes, a rope base of its own, and rules."""
    for name, changes in {
        "config.json": {"rope_theta": 5e5},
        "tokenizer_config.json": {"bos_token": BOS, "chat_template": TEMPLATE},
        "generation_config.json": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
    }.items():
        path = small / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = small / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    return small


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What check sets for the runs that it starts ends with the test."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(jax.device_count()))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of each kind, those of adapters and of reinforcement for a model that is not trained yet."""
    folder = tmp_path_factory.mktemp("check")
    small = with_all_that_can_go_wrong(make_small(folder / "small"))
    (folder / "cache" / "lacuna").mkdir(parents=True)
    (folder / "cache" / "lacuna" / "programs").symlink_to(PROGRAMS)
    base = chat_run(small, steps=1, epochs=1, eval_data=(), run_name="base")
    lora = chat_run(small, model_name=str(base.run_directory), from_scratch=False, lora_rank=4, warmup_steps=2)
    keys = {"model_name", "from_scratch", "output_dir", "data", "sequence_length", "compute_dtype"}
    rollouts = lora.model_dump(include=keys) | {"max_completion_tokens": 32, "top_p": 0.95, "temperature": 0.8}
    configs = {"sft": chat_run(small, warmup_steps=4), "pretrain": text_run(small), "base": base, "lora": lora}
    for name, config in (configs | {"grpo": GrpoConfig(**rollouts, run_name="grpo")}).items():
        (folder / f"{name}.toml").write_text(to_toml(config))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The same, with the model trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        cli.run(cli.parse(SftConfig, ["@", str(folder / "base.toml")], "sft"))
    return folder


def checked(folder: Path, kind: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of check.json, after a check in this process."""
    report = folder / f"{kind}.json"
    command, file = f"check {kind.replace('lora', 'sft')}", str(folder / f"{kind}.toml")
    config = cli.parse(cli.COMMANDS[command], ["@", file, "--check-file", str(report), *arguments], command)
    cli.run(config)
    return json.loads(report.read_text())["promises"]


def caught(folder: Path, names: Iterable[str]) -> None:
    """Assert that each of the faults breaks the promise that names it."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutants.py")), str(folder), *names],
        stdout=subprocess.PIPE, env=environment, check=True, text=True,
    )  # fmt: skip
    found = {line["fault"]: line["promises"] for line in map(json.loads, done.stdout.splitlines())}
    for name in names:
        verdicts = {line["name"]: (line["verdict"], line["compared"]) for line in found[name]}
        verdict, compared = verdicts.get(FAULTS[name].promise, ("", (folder / "log.txt").read_text()[-2000:]))
        assert verdict == "FAIL" and not compared.startswith("can't"), f"{name}: {verdict} {compared}"


@pytest.mark.parametrize("family", ["qwen2", "qwen2_untied", "qwen3_yarn", "llama3_new", "smollm3", "olmo2"])
def test_the_plain_formula_is_transformers(family: str) -> None:
    expected, directory = np.load(REFERENCE / family / "expected.npz"), REFERENCE / family
    tensors, raw = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    logits = plain_logits(tensors, raw, expected["input_ids"], expected["position_ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-4, rtol=0)


def test_the_plain_formulas_turn_and_cut_as_transformers() -> None:
    for case in json.loads((REFERENCE / "rope.json").read_text()):
        raw = json.loads((REFERENCE / "qwen3" / "config.json").read_text()) | {"head_dim": 32} | case["change"]
        frequencies, magnitude = plain_frequencies(raw, 32)
        np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-6)
        assert magnitude == pytest.approx(case["magnitude"])
    reference, names = np.load(REFERENCE / "sampling.npz"), ("temperature", "top_k", "top_p", "min_p")
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name in names:
        for row, logits in enumerate(reference["logits"]):
            expected = reference[f"only_{name}"][row].astype(np.float64)
            expected -= np.log(np.sum(np.exp(expected - expected.max()))) + expected.max()
            found = plain_cut(logits, neutral | {name: reference[name][row].item()})
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nothing_is_wrong_with_what_the_small_model_learns(folder: Path) -> None:
    names = [*READ, *LEARNED, "1 = all devices"]
    lines = checked(folder, "sft", "--only", *names)
    assert {line["name"]: line["verdict"] for line in lines} == dict.fromkeys(names, "pass")
    numbers = {line["name"]: line["number"] for line in lines}
    assert 0.3 < numbers["supervised share"] < 0.9
    compared = {line["name"]: line["compared"] for line in lines}
    assert compared["BOS once"].startswith("of 60 documents, 60 of which begin with BOS")


def test_a_promise_that_is_not_kept_ends_with_1_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "?"}]}] * 3
    rows += [{"messages": [*rows[0]["messages"], {"role": "assistant", "content": "!"}]}] * 2
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = chat_run(folder / "small", data=({"path": str(tmp_path / "bad.jsonl")},), on_bad_data="skip", eval_data=())
    (tmp_path / "sft.toml").write_text(to_toml(bad))
    with pytest.raises(SystemExit, match="1"):
        checked(tmp_path, "sft", "--only", "rows are used")
    assert "FAIL  rows are used: share of rows that are bad or dropped: 2 rows read, 3 bad" in capsys.readouterr().out
    with pytest.raises(UserError, match="only names 'packed = alon'; did you mean packed = alone"):
        checked(folder, "sft", "--only", "packed = alon")
    with pytest.raises(UserError, match="'replay = logged', which does not concern this config"):
        checked(folder, "sft", "--only", "replay = logged")


@pytest.mark.parametrize(
    ("file", "text", "command"),
    [
        ("a.toml", "train_on = 'last'", "sft"), ("a.toml", "reward = []", "grpo"), ("pretrain_it.toml", "", "pretrain"),
        ("sft.toml", "steps = 3", "sft"), ("a.toml", "steps = 3", ""),
    ],
)  # fmt: skip
def test_check_tells_from_the_file_which_command_it_is_for(tmp_path: Path, file: str, text: str, command: str) -> None:
    (tmp_path / file).write_text(text)
    arguments = ["@", str(tmp_path / file)]
    if command:
        assert cli.trained_by(arguments) == command
    else:
        with pytest.raises(UserError, match="write lacuna check sft @"):
            cli.trained_by(arguments)


FAST = ("mask dropped", "EOS unsupervised", "two BOS")


def test_faults_of_what_is_trained_are_caught_by_their_lines(folder: Path) -> None:
    caught(folder, FAST)


def test_what_a_fault_replaces_is_in_its_room_once() -> None:
    counts = {
        name: (SOURCE / "lacuna" / f"{fault.room}.py").read_text().count(fault.text) for name, fault in FAULTS.items()
    }
    assert {name: count for name, count in counts.items() if count != 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in FAST])
def test_a_fault_is_caught_by_its_line(trained: Path, name: str) -> None:
    caught(trained, [name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "pretrain", "lora", "grpo"])
def test_all_promises_are_kept(trained: Path, kind: str) -> None:
    assert [line["name"] for line in checked(trained, kind) if line["verdict"] == "FAIL"] == []
