"""Weights in and out of Hugging Face layout: every device gets its part, and what does not fit is named."""

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of
from safetensors.numpy import load_file, save_file

from lacuna import checkpoint
from lacuna.config import UserError
from lacuna.model import read_model_config


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE / "qwen3", tmp_path / "qwen3"))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_bfloat16", "qwen2_float16", "qwen2_untied", "llama2", "smollm2"])
def test_save_load_save_is_byte_equal_and_keeps_every_tensor(family: str, tmp_path: Path) -> None:
    source, mesh = REFERENCE / family, mesh_of(1, 1, 1)
    model = read_model_config(source)
    checkpoint.save_model(tmp_path / "one", checkpoint.load_params(source, model, mesh), model, source)
    checkpoint.save_model(
        tmp_path / "two", checkpoint.load_params(tmp_path / "one", model, mesh), model, tmp_path / "one"
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    given, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    assert given.keys() == saved.keys()
    for name, tensor in saved.items():
        assert np.dtype(checkpoint.FILE_DTYPES[model.file_dtype]) == tensor.dtype
        np.testing.assert_array_equal(tensor, given[name].astype(tensor.dtype), err_msg=name)


def test_a_model_saved_in_shards_loads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = read_model_config(REFERENCE / "qwen3"), mesh_of(1, 1, 1)
    params = checkpoint.load_params(REFERENCE / "qwen3", model, mesh)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    checkpoint.save_model(tmp_path / "out", params, model, REFERENCE / "qwen3")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    for ours, expected in zip(
        *map(jax.tree.leaves, (checkpoint.load_params(tmp_path / "out", model, mesh), params)), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 2)])
def test_every_device_gets_its_part_of_the_same_weights(shape: tuple[int, int, int]) -> None:
    model = read_model_config(REFERENCE / "qwen3")
    whole = checkpoint.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1))
    parted = checkpoint.load_params(REFERENCE / "qwen3", model, mesh_of(*shape))
    for ours, expected in zip(*map(jax.tree.leaves, (parted, whole)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    part, full = parted["layers"]["query"].addressable_shards[0].data.size, whole["layers"]["query"].size
    assert part * shape[1] * shape[2] == full


def test_devices_read_no_more_than_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = read_model_config(REFERENCE / "qwen3"), []
    opened = checkpoint.open_tensors

    def counted(directory: Path, stack: ExitStack) -> dict[str, checkpoint.FileTensor]:
        def counting(tensor: checkpoint.FileTensor) -> checkpoint.FileTensor:
            return tensor._replace(read=lambda slices: read.append(tensor.read(slices)) or read[-1])

        return {name: counting(tensor) for name, tensor in opened(directory, stack).items()}

    monkeypatch.setattr(checkpoint, "open_tensors", counted)
    params = checkpoint.load_params(REFERENCE / "qwen3", model, mesh_of(1, 4, 2))
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert sum(part.nbytes for part in read) <= sum(shard.data.nbytes for shard in shards)
    assert max(part.nbytes for part in read) <= max(shard.data.nbytes for shard in shards)


def test_padded_rows_of_the_vocabulary_are_zero_in_memory_and_gone_from_the_file(tmp_path: Path) -> None:
    source, mesh = REFERENCE / "qwen2_untied", mesh_of(1, 1, 2)
    model = replace(read_model_config(source), padded_vocabulary=166)
    params = checkpoint.load_params(source, model, mesh)
    assert params["embedding"].shape[0] == 166 and not np.any(np.asarray(params["embedding"])[160:])
    assert not np.any(np.asarray(params["head"])[160:])
    checkpoint.save_model(tmp_path / "out", params, model, source)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape[0] == 160


def test_tensors_that_do_not_fit_are_listed_with_both_shapes(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    tensors["model.extra"] = np.ones(3, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors")
    model = read_model_config(copied)
    with pytest.raises(UserError) as refusal:
        checkpoint.load_params(copied, model, mesh_of(1, 1, 1))
    message = str(refusal.value)
    assert f"model.norm.weight has shape (7,), the config wants ({model.embed},)" in message
    assert "model.layers.1.mlp.up_proj.weight is missing" in message and "(64, 48)" in message
    assert "model.extra of shape (3,)" in message


def test_only_the_first_ten_of_many_wrong_tensors_are_listed(copied: Path) -> None:
    save_file({}, copied / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        checkpoint.load_params(copied, read_model_config(copied), mesh_of(1, 1, 1))
    assert str(refusal.value).count(" is missing") == 10 and "… and 14 more" in str(refusal.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "--from-scratch"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights are never read"),
        (lambda d: os.truncate(d / "model.safetensors", 100_000), "damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
            "'../model.safetensors', which is not in the same directory",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "no index"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
    ],
)
def test_damaged_models_are_refused_naming_the_file(copied: Path, spoil: Any, words: str) -> None:
    spoil(copied)
    with pytest.raises(UserError) as refusal:
        checkpoint.load_params(copied, read_model_config(copied), mesh_of(1, 1, 1))
    assert words in str(refusal.value) and str(copied) in str(refusal.value)
