"""The house itself: which room imports which, how large each is, and how much of it a training step runs through."""

import ast
import io
import re
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from cProfile import Profile
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from conftest import text_run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lacuna
from lacuna import cli
from lacuna.trainer import Run

SOURCE = Path(lacuna.__file__).parent
ROOMS = ("config", "answers", "distributed", "metrics", "sandbox", "tokenizer", "documents", "data", "shards",
         "streaming", "attention", "quantised", "linear", "model", "weights", "checkpoint", "sampler",
         "environments", "optimizer", "trainer", "eval", "objective", "grpo", "cli")  # fmt: skip
CORE_LINES, ROOM_LINES, APPS_LINES, PRETRAIN_LINES = 8750, 600, 5515, 900  # of the core 4600 were aimed at
STEP_ROOMS = ("config", "distributed", "metrics", "data", "attention", "linear", "model", "optimizer", "trainer")


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold a token of the program: no blank line, comment or docstring."""
    text, documented = path.read_text(), set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - documented


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of lacuna that a file imports, as lacuna.room, and whether at its top."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lacuna":
            names = [f"lacuna.{alias.name}" for alias in node.names] if node.module == "lacuna" else [node.module]
            yield from ((name, node in tree.body) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names if alias.name.startswith("lacuna"))


def test_the_rooms_are_those_of_the_readme_in_its_order() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+/?)` \|", readme.partition("## The code")[2], re.MULTILINE)
    assert listed == [*ROOMS, "apps/"]
    assert {path.stem for path in SOURCE.glob("*.py")} == {*ROOMS, "__init__"}


def test_a_room_imports_only_from_rooms_above_it_and_none_but_cli_from_apps() -> None:
    for number, room in enumerate(ROOMS[:-1]):
        for module, is_top in imports(SOURCE / f"{room}.py"):
            assert module.split(".")[1] in ROOMS[:number], f"{room} imports {module}"
            assert is_top, f"{room} imports {module} inside a function"


def test_the_house_keeps_its_size() -> None:
    sizes = {room: len(code_lines(SOURCE / f"{room}.py")) for room in ROOMS}
    apps = {path.stem: len(code_lines(path)) for path in (SOURCE / "apps").glob("*.py")}
    assert {room: size for room, size in sizes.items() if size > ROOM_LINES} == {}
    assert sum(sizes.values()) < CORE_LINES, sizes
    assert sum(apps.values()) < APPS_LINES, apps


def test_no_top_level_name_stands_in_two_rooms() -> None:
    found = Counter[str]()
    for path in SOURCE.rglob("*.py"):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        found.update(node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds))
    assert [name for name, count in found.items() if count > 1] == []


def test_a_training_step_runs_through_few_lines(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, train = Profile(subcalls=False, builtins=False), Run.train

    def watched(run: Run, *arguments: Any) -> Any:
        monkeypatch.setattr(run, "save", lambda *_: None)  # what is saved is no part of a step
        monkeypatch.setattr(run, "finish", lambda *_: None)
        return profile.runcall(train, run, *arguments)

    monkeypatch.setattr(Run, "train", watched)
    cli.run(text_run(small, steps=3, sequence_length=88))  # of a length that no other test has traced
    lines = {room: set[int]() for room in STEP_ROOMS}
    for code in (entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)):
        room = Path(code.co_filename).stem
        if room in lines and Path(code.co_filename).parent == SOURCE:
            lines[room] |= function_lines(SOURCE / f"{room}.py", code)
    counts = {room: len(numbers & code_lines(SOURCE / f"{room}.py")) for room, numbers in lines.items()}
    assert 300 < sum(counts.values()) < PRETRAIN_LINES, counts


def function_lines(path: Path, code: CodeType) -> set[int]:
    """Lines of the function that a code object was compiled from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= code.co_firstlineno <= node.body[0].lineno:
                return set(range(first, (node.end_lineno or 0) + 1))
    return set()


def test_every_package_is_pinned_and_no_address_is_written() -> None:
    text = (SOURCE.parents[1] / "pyproject.toml").read_text()
    assert "://" not in text
    pins = [Requirement(pin) for pin in tomllib.loads(text)["tool"]["uv"]["constraint-dependencies"]]
    assert all([each.operator for each in pin.specifier] == ["=="] for pin in pins)
    pinned, needed = {canonicalize_name(pin.name) for pin in pins}, ["lacuna"]
    for name in needed:  # grows meanwhile
        extras = ("", "eval", "endpoint") if name == "lacuna" else ("",)
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not installed
            for requirement in map(Requirement, metadata.requires(name) or []):
                is_needed = any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in extras)
                if is_needed and requirement.name not in needed:
                    needed.append(requirement.name)
    assert sorted({canonicalize_name(name) for name in needed} - pinned) == ["lacuna"]
