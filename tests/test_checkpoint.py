"""Run states that come back bit for bit on any devices, and damage of every kind that is found and named."""

import json
import os
import resource
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of

from lacuna import checkpoint, trainer
from lacuna.config import UserError
from lacuna.model import ModelConfig, read_model_config

MODEL = read_model_config(REFERENCE / "qwen3")


def facts(step: int) -> checkpoint.RunFacts:
    return checkpoint.RunFacts(
        step=step, best=0.1 + 0.2, wall_seconds=1.5, config={"seed": 0}, model={}, data=("a",), versions={}
    )


def state_on(shape: tuple[int, int, int], model: ModelConfig = MODEL) -> trainer.TrainState:
    params = checkpoint.load_params(REFERENCE / "qwen3", model, mesh_of(*shape))
    state = trainer.fresh_state(params)
    moments = jax.tree.map(lambda leaf: leaf * 2 + (leaf != 0), state.moments)
    return state._replace(moments=moments, step=jnp.int32(7))


def save(run: Path, state: Any, step: int, keep: int = 9, is_best: bool = False) -> Path:
    """The checkpoint of a step, written and committed."""
    saver = checkpoint.Saver(run, keep, "session")
    saver.save(state, trainer.saved_shapes(MODEL), facts(step), is_best)
    saver.wait()
    list(saver.news())
    return checkpoint.checkpoint_directory(run, step)


def padded(vocabulary: int) -> ModelConfig:
    return replace(MODEL, padded_vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("shape", "rows", "other", "other_rows"),
    [
        ((1, 2, 2), 160, (1, 1, 1), 160),
        ((1, 2, 2), 160, (1, 8, 1), 160),
        ((1, 4, 1), 160, (2, 2, 2), 160),
        ((1, 1, 2), 166, (1, 1, 1), 160),
        ((1, 1, 1), 160, (2, 1, 2), 400),  # the second device holds padding alone
    ],
)
def test_a_run_state_comes_back_bit_for_bit_on_any_mesh(
    tmp_path: Path, shape: tuple[int, int, int], rows: int, other: tuple[int, int, int], other_rows: int
) -> None:
    assert MODEL.vocabulary_size == 160
    state = state_on(shape, padded(rows))
    directory = save(tmp_path, state, 7)
    manifest = checkpoint.read_manifest(directory)
    assert manifest.run == facts(7)
    abstract = trainer.abstract_state(padded(other_rows), mesh_of(*other))
    loaded = checkpoint.load_checkpoint(directory, manifest, abstract, trainer.saved_shapes(MODEL))
    for ours, expected, wanted in zip(*map(jax.tree.leaves, (loaded, state, abstract)), strict=True):
        if ours.shape and ours.shape[0] == other_rows != rows:
            assert not np.any(ours[160:])
            ours, expected = ours[:160], expected[:160]
        else:
            assert ours.sharding == wanted.sharding
        np.testing.assert_array_equal(ours, expected)


def test_the_model_is_written_from_a_checkpoint_as_from_memory(tmp_path: Path) -> None:
    state, source = state_on((1, 2, 2), padded(166)), REFERENCE / "qwen3"
    directory = save(tmp_path, state, 7)
    checkpoint.save_model(tmp_path / "one", state.params, padded(166), source)
    with ExitStack() as stack:
        checkpoint.save_model(tmp_path / "two", checkpoint.saved_params(directory, MODEL, stack), MODEL, source)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_save_holds_a_copy_so_that_training_may_go_on_meanwhile(tmp_path: Path) -> None:
    state = state_on((1, 1, 1))
    expected = jax.tree.map(np.array, state)
    pieces = checkpoint.copied_pieces(state, trainer.saved_shapes(MODEL))
    changed = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 9, state), donate_argnums=0)(state)
    jax.block_until_ready(changed)
    for (name, _, values), wanted in zip(pieces, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(values, wanted, err_msg=name)


def edited(path: Path, change: Any) -> None:
    """Change a manifest so that its own hash is right again."""
    content = json.loads((path / "manifest.json").read_text())["manifest"]
    change(content)
    text = json.dumps({"sha256": checkpoint.content_hash(content), "manifest": content})
    (path / "manifest.json").write_text(text)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def norm_piece(content: Any) -> Any:
    return content["tensors"]["params/final_norm"]["pieces"][0]


DAMAGE = {
    "flipped bit in the last tensor": (lambda d: flip(d / "shard-00000.safetensors", -5), "SHA-256"),
    "flipped bit in the header": (lambda d: flip(d / "shard-00000.safetensors", 20), "SHA-256"),
    "truncated": (lambda d: os.truncate(d / "shard-00000.safetensors", 1000), "1000 bytes, the manifest says"),
    "zero bytes": (lambda d: (d / "shard-00000.safetensors").write_bytes(b""), "0 bytes, the manifest says"),
    "missing shard": (lambda d: (d / "shard-00000.safetensors").unlink(), "missing"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest"),
    "empty manifest": (lambda d: (d / "manifest.json").write_bytes(b""), "damaged"),
    "manifest cut short": (lambda d: os.truncate(d / "manifest.json", 500), "damaged"),
    "manifest of zeros": (lambda d: (d / "manifest.json").write_bytes(bytes(500)), "damaged"),
    "another JSON": (lambda d: (d / "manifest.json").write_text("[1]"), "damaged"),
    "a number changed": (
        lambda d: (d / "manifest.json").write_text(
            (d / "manifest.json").read_text().replace('"wall_seconds": 1.5', '"wall_seconds": 1.6')
        ),
        "SHA-256",
    ),
    "a newer format": (lambda d: edited(d, lambda c: c.update(format=99)), "format 99"),
    "an unknown field": (lambda d: edited(d, lambda c: c.update(extra=1)), "extra"),
    "a gap": (lambda d: edited(d, lambda c: norm_piece(c).update(shape=[MODEL.embed - 1])), "params/final_norm"),
    "an overlap": (
        lambda d: edited(d, lambda c: c["tensors"]["params/final_norm"]["pieces"].append(norm_piece(c))), "exactly once"
    ),
    "beyond the end": (lambda d: edited(d, lambda c: norm_piece(c).update(begin=[1])), "params/final_norm"),
    "no piece": (lambda d: edited(d, lambda c: c["tensors"]["step"].update(pieces=[])), "step do not make up"),
    "a file elsewhere": (
        lambda d: edited(d, lambda c: c["files"].update({"../../x": {"bytes": 1, "sha256": ""}})), "../x: missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, kind: str) -> None:
    spoil, words = DAMAGE[kind]
    state, said = state_on((1, 1, 1)), list[str]()
    for step in (1, 2):
        newest = save(tmp_path, state, step)
    spoil(newest)
    with pytest.raises(UserError, match=str(newest)) as refusal:
        checkpoint.read_manifest(newest)
    assert words in str(refusal.value)
    found = checkpoint.newest_good(tmp_path, said.append)
    assert found and found[0].name == "step_00000001"
    assert len(said) == 1 and words in said[0] and str(newest) in said[0]
    shutil.rmtree(checkpoint.checkpoint_directory(tmp_path, 1))
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole") as refusal:
        checkpoint.newest_good(tmp_path, said.append)
    assert words in str(refusal.value) and str(newest) in str(refusal.value)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="never read.*save_file"):
        checkpoint.read_manifest(tmp_path / name)


def test_old_checkpoints_go_but_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    state = state_on((1, 1, 1))
    (tmp_path / "checkpoints" / "step_00000001.other.tmp").mkdir(parents=True)
    for step in range(1, 6):
        save(tmp_path, state, step, keep=2, is_best=step == 2)
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 5]
    assert (tmp_path / "best").resolve().name == "step_00000002"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_what_is_newer_than_the_checkpoint_a_run_goes_on_from_is_kept_aside(tmp_path: Path) -> None:
    state = state_on((1, 1, 1))
    for step in (1, 2, 3):
        save(tmp_path, state, step, is_best=step == 3)
    moved = checkpoint.set_aside_later(tmp_path, 1)
    assert checkpoint.saved_steps(tmp_path) == [1] and len(moved) == 2 and all(path.is_dir() for path in moved)
    assert not (tmp_path / "best").is_symlink()


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory = save(tmp_path, state_on((1, 1, 1)), 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}


def test_a_full_disk_is_survived_twice_and_no_partial_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, shapes = state_on((1, 1, 1)), trainer.saved_shapes(MODEL)
    first, saver = save(tmp_path, state, 1), checkpoint.Saver(tmp_path, 9, "session")
    before = {path: path.read_bytes() for path in first.iterdir()}

    def try_to_save(step: int) -> list[str]:
        saver.save(state, shapes, facts(step), False)
        saver.wait()
        return list(saver.news())

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert "step 2 could not be saved" in try_to_save(2)[0]
        assert "File too large" in try_to_save(3)[0]
        with pytest.raises(UserError, match="3 saves in a row failed: make room and add --resume"):
            try_to_save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    saver.failures = 0
    (line,) = try_to_save(5)
    assert "are needed, 1 KB are free" in line and "training goes on" in line
    monkeypatch.undo()
    assert "saved" in try_to_save(6)[0] and saver.failures == 0
    checkpoint.read_manifest(checkpoint.checkpoint_directory(tmp_path, 6))


def test_nothing_in_the_source_can_run_what_it_reads() -> None:
    words = ("pickle", "marshal", "torch.load", "np.load(", " eval(", " exec(", "shelve", "joblib", "allow_pickle")
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        text = path.read_text()
        for word in words:
            lines = [line.replace("allow_pickle=False", "") for line in text.splitlines()]
            found = [line for line in lines if word in line and "unpickled" not in line and "never read" not in line]
            assert not found or (path.name, word) == ("data.py", "np.load("), (path, found)
