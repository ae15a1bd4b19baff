"""Weights in and out of Hugging Face layout, run states that come back bit for bit on any devices, damage of every kind
that is found and named, and saves that are killed, held up or out of space."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import REFERENCE, TINY, chat_run, mesh_of, random_params, text_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lacuna import checkpoint, distributed, optimizer, trainer, weights
from lacuna.config import EvalConfig, GrpoConfig, ModelKeys, SftConfig, UserError, name_of_model, to_toml
from lacuna.metrics import byte_size
from lacuna.model import ModelConfig, head_of, read_model_config

MODEL = read_model_config(REFERENCE / "qwen3")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def load(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def padded(vocabulary: int) -> ModelConfig:
    return replace(MODEL, padded_vocabulary=vocabulary)


def assert_trees_equal(ours: Any, expected: Any) -> None:
    for leaf, wanted in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


# Weights in Hugging Face layout


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE / "qwen3", tmp_path / "qwen3"))


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen2_bfloat16", "qwen2_float16", "qwen2_untied", "llama2", "smollm2", "smollm3", "olmo2"]
)
def test_save_load_save_is_byte_equal_and_keeps_every_tensor(family: str, tmp_path: Path) -> None:
    source, mesh = REFERENCE / family, mesh_of(1, 1, 1)
    model = read_model_config(source)
    checkpoint.save_model(tmp_path / "one", weights.load_params(source, model, mesh), model, source)
    again = weights.load_params(tmp_path / "one", model, mesh)
    checkpoint.save_model(tmp_path / "two", again, model, tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    given, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "one" / "model.safetensors")
    assert given.keys() == saved.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == jnp.dtype(model.file_dtype)
        np.testing.assert_array_equal(tensor, given[name].astype(tensor.dtype), err_msg=name)


def test_a_model_saved_in_shards_loads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = mesh_of(1, 1, 1)
    params = weights.load_params(REFERENCE / "qwen3", MODEL, mesh)
    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    checkpoint.save_model(tmp_path / "out", params, MODEL, REFERENCE / "qwen3")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert len(shards) > 2 and max(sizes) <= 50_000 and index["metadata"]["total_size"] == sum(sizes)
    assert_trees_equal(weights.load_params(tmp_path / "out", MODEL, mesh), params)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 2)])
def test_every_device_gets_its_part_of_the_same_weights(shape: tuple[int, int, int]) -> None:
    whole = weights.load_params(REFERENCE / "qwen3", MODEL, mesh_of(1, 1, 1))
    parted = weights.load_params(REFERENCE / "qwen3", MODEL, mesh_of(*shape))
    assert_trees_equal(parted, whole)
    part, full = parted["layers"]["query"].addressable_shards[0].data.size, whole["layers"]["query"].size
    assert part * shape[1] * shape[2] == full


def test_devices_read_no_more_than_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[np.ndarray] = []

    class Counted:
        def __init__(self, piece: Any) -> None:
            self.piece = piece

        def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
            read.append(self.piece[slices])
            return read[-1]

    opened = weights.open_tensors
    monkeypatch.setattr(
        weights,
        "open_tensors",
        lambda paths: {
            name: replace(tensor, pieces=[(box, Counted(piece)) for box, piece in tensor.pieces])
            for name, tensor in opened(paths).items()
        },
    )
    params = weights.load_params(REFERENCE / "qwen3", MODEL, mesh_of(1, 4, 2))
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert 0 < sum(part.nbytes for part in read) <= sum(shard.data.nbytes for shard in shards)
    assert max(part.nbytes for part in read) <= max(shard.data.nbytes for shard in shards)


@pytest.mark.parametrize("rows", [166, 400])  # of 400 the second device holds padding alone
def test_padded_rows_of_the_vocabulary_are_zero_in_memory_and_gone_from_the_file(rows: int, tmp_path: Path) -> None:
    source, mesh = REFERENCE / "qwen2_untied", mesh_of(1, 1, 2)
    model = replace(read_model_config(source), padded_vocabulary=rows)
    params = weights.load_params(source, model, mesh)
    for name, file_name in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        given = load_file(source / "model.safetensors")[file_name]
        np.testing.assert_array_equal(params[name], np.pad(given, ((0, rows - 160), (0, 0))))
    checkpoint.save_model(tmp_path / "out", params, model, source)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape[0] == 160


def test_tensors_that_do_not_fit_are_listed_with_both_shapes(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    tensors["model.extra"] = np.ones(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        weights.load_params(copied, MODEL, mesh_of(1, 1, 1))
    assert set(str(refusal.value).splitlines()[1:]) == {
        "  model.layers.1.mlp.up_proj.weight: missing in the files, (64, 48) by config.json",
        f"  model.norm.weight: (7,) in the files, ({MODEL.embed},) by config.json",
        "  model.extra: (3,) in the files, unknown by config.json",
    }


def test_only_the_first_ten_of_many_wrong_tensors_are_listed(copied: Path) -> None:
    save_file({}, copied / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        weights.load_params(copied, MODEL, mesh_of(1, 1, 1))
    assert str(refusal.value).count(": missing") == 10 and "… and 14 more" in str(refusal.value)


def parted(directory: Path, kept: list[int], is_single: bool = False, scale: int = 1) -> None:
    """Put the tensors into two shards with an index, of which some are kept, and the single file too if asked to."""
    tensors = load_file(directory / "model.safetensors")
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number in kept:
        part = {key: scale * tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, directory / names[number])
    index = {"weight_map": {key: names[at % 2] for at, key in enumerate(sorted(tensors))}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if not is_single:
        (directory / "model.safetensors").unlink()


def adapted(directory: Path) -> None:
    """Turn the directory into one of an adapter with pickled weights, config.json beside it."""
    (directory / "model.safetensors").rename(directory / "adapter_model.bin")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def stored(directory: Path, name: str, dtype: Any) -> None:
    """Store the projections in another dtype, which numpy's own writer may not know."""
    header: dict[str, Any] = {}
    content = b""
    for key, values in load_file(directory / "model.safetensors").items():
        is_other = "q_proj" in key
        raw = values.astype(dtype if is_other else np.float32).tobytes()
        span = [len(content), len(content) + len(raw)]
        header[key] = {"dtype": name if is_other else "F32", "shape": values.shape, "data_offsets": span}
        content += raw
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)


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
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json: not JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "no index"),
        (
            lambda d: parted(d, [0, 1], is_single=True, scale=2),
            "model.safetensors.index.json are both there and differ",
        ),
        (lambda d: parted(d, [0], is_single=True), "are both there and differ; remove what is stale"),
        (lambda d: parted(d, [0]), "model-00002-of-00002.safetensors: no such file, but model.safetensors.index.json"),
        (
            lambda d: parted(d, [0, 1]) or (d / "model.safetensors.index.json").unlink(),
            "no model.safetensors.index.json",
        ),
        (lambda d: (d / "model.safetensors").rename(d / "weights.safetensors"), "weights.safetensors is there, but no"),
        (adapted, "adapter_config.json is there, but no adapter_model.safetensors"),
        (
            lambda d: stored(d, "F8_E4M3", ml_dtypes.float8_e4m3fn),
            "q_proj.weight is stored as F8_E4M3; float32, bfloat16",
        ),
        (lambda d: stored(d, "I32", np.int32), "q_proj.weight is stored as I32; float32, bfloat16"),
        (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json: not JSON"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
    ],
)
def test_damaged_models_are_refused_naming_the_file(copied: Path, spoil: Any, words: str) -> None:
    spoil(copied)
    with pytest.raises(UserError) as refusal:
        weights.load_params(copied, read_model_config(copied), mesh_of(1, 1, 1))
    assert words in str(refusal.value) and str(copied) in str(refusal.value)
    assert "stored as" not in words or "not safetensors" not in str(refusal.value)


def test_an_index_beside_a_single_file_of_the_same_tensors_loads(copied: Path) -> None:
    parted(copied, [0, 1], is_single=True)
    ours, expected = (
        weights.load_params(directory, MODEL, mesh_of(1, 1, 1)) for directory in (copied, REFERENCE / "qwen3")
    )
    assert_trees_equal(ours, expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_untied"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "language_model.", "base_model.model.", "less"])
def test_the_prefix_of_a_wrapper_is_taken_off(family: str, prefix: str, tmp_path: Path) -> None:
    """Before every name, or within the body's alone, which may also lack its `model.`."""
    source, model = REFERENCE / family, read_model_config(REFERENCE / family)
    expected, tensors = (read(source) for read in (lambda d: weights.load_params(d, model, mesh_of(1, 1, 1)), load))
    inner = {
        name.replace("model.", "" if prefix == "less" else f"model.{prefix}"): value for name, value in tensors.items()
    }
    for number, renamed in enumerate([inner, {f"{prefix}{name}": value for name, value in tensors.items()}]):
        if prefix != "less" or not number:
            (directory := tmp_path / str(number)).mkdir()
            save_file(renamed, directory / "model.safetensors")
            assert_trees_equal(weights.load_params(directory, model, mesh_of(1, 1, 1)), expected)


def test_of_missing_and_of_unknown_tensors_ten_are_listed(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file(
        {name.replace("layers", "blocks"): value for name, value in tensors.items()}, copied / "model.safetensors"
    )
    with pytest.raises(UserError) as refusal:
        weights.load_params(copied, MODEL, mesh_of(1, 1, 1))
    assert [str(refusal.value).count(word) for word in (": missing", ", unknown by", "… and 12 more")] == [10, 10, 2]


def test_an_untied_model_without_a_head_is_told_of_tying(tmp_path: Path) -> None:
    model, tensors = read_model_config(REFERENCE / "qwen2_untied"), load(REFERENCE / "qwen2_untied")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="if the embedding is the head, set tie_word_embeddings to true"):
        weights.load_params(tmp_path, model, mesh_of(1, 1, 1))


def test_a_head_of_its_own_counts_in_a_model_that_is_tied_by_its_config(copied: Path, tmp_path: Path) -> None:
    tensors, mesh, config = load(copied), mesh_of(1, 1, 1), ModelKeys(model_name=str(copied))
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, copied / "model.safetensors")
    model, line = checkpoint.model_on(checkpoint.at(copied), config, mesh)
    assert model.is_tied and "lm_head" not in line
    save_file(tensors | {"lm_head.weight": 2 * embedding}, copied / "model.safetensors")
    model, line = checkpoint.model_on(checkpoint.at(copied), config, mesh)
    assert not model.is_tied and "lm_head.weight is not the embedding" in line
    params = weights.load_params(copied, model, mesh)
    np.testing.assert_array_equal(head_of(params, model), 2 * embedding)
    checkpoint.save_model(tmp_path / "out", params, model, copied)
    assert not read_model_config(tmp_path / "out").is_tied
    np.testing.assert_array_equal(load(tmp_path / "out")["lm_head.weight"], 2 * embedding)
    random = text_run(copied, from_scratch=True)
    assert checkpoint.model_on(checkpoint.at(copied), random, mesh)[0].is_tied


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("qwen3", {"head_dim": 12, "num_key_value_heads": 4, "architectures": ["Qwen3ForCausalLM"]}),
        ("mistral", {"num_key_value_heads": 4, "architectures": ["MistralForCausalLM"]}),
        ("olmo2", {"architectures": ["Olmo2ForCausalLM"]}),
    ],
)
def test_an_export_states_what_its_config_left_out(family: str, left_out: dict[str, Any], tmp_path: Path) -> None:
    raw = json.loads((REFERENCE / family / "config.json").read_text())
    (source := tmp_path / "source").mkdir()
    (source / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key not in left_out}))
    model = read_model_config(source)
    checkpoint.save_model(tmp_path / "out", random_params(model), model, source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw | left_out
    assert read_model_config(tmp_path / "out") == model


def test_an_export_that_fails_leaves_the_old_model_and_nothing_else(tmp_path: Path) -> None:
    params, directory = weights.load_params(REFERENCE / "qwen3", MODEL, mesh_of(1, 1, 1)), tmp_path / "model"
    checkpoint.save_model(directory, params, MODEL, REFERENCE / "qwen3")
    before = contents(directory)
    with pytest.raises(FileNotFoundError, match="no_such_source"):
        checkpoint.save_model(directory, params, MODEL, tmp_path / "no_such_source")
    assert contents(directory) == before and os.listdir(tmp_path) == ["model"]


def test_a_pointer_in_place_of_weights_is_told_from_damage(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or not safetensors"):
        weights.load_params(copied, MODEL, mesh_of(1, 1, 1))
    file.write_text("version https://git-lfs.invalid/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors: a Git LFS pointer; run `git lfs pull`"):
        weights.load_params(copied, MODEL, mesh_of(1, 1, 1))


def test_a_token_beyond_the_vocabulary_is_named_with_its_file(small: Path) -> None:
    (small / "added_tokens.json").write_text(json.dumps({"<|new|>": 512}))
    with pytest.raises(UserError, match=r"has 513 tokens, the last '<\|new\|>' of added_tokens.json, and .* is 512"):
        checkpoint.open_model(ModelKeys(model_name=str(small)), mesh_of(1, 1, 1), with_weights=False)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run := tmp_path / "mine").mkdir()
    (run / "config.toml").write_text("keep = 3\n")
    with pytest.raises(UserError, match=r"mine/best: no such checkpoint; .*/mine has none \(keep = 3\)"):
        checkpoint.resolve_model(str(run / "best"))
    for step in (100, 200):
        checkpoint.checkpoint_directory(run, step).mkdir(parents=True)
    checkpoint.mark_best(run, checkpoint.checkpoint_directory(run, 200))
    there = r"/mine has step_00000100, step_00000200, best \(keep = 3\)"
    for name in ("checkpoints/step_00000150", "checkpoints", "bset"):
        with pytest.raises(UserError, match=f"mine/{name}: no such checkpoint; .*{there}"):
            checkpoint.resolve_model(str(run / name))
    with pytest.raises(UserError, match=f"a run that has not ended, .*; continue it with --resume; .*{there}"):
        checkpoint.resolve_model(str(run))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    there = there.replace("best", "best, model")
    for name in ("checkpoints", "checkpoints/step_00000150"):
        with pytest.raises(UserError, match=there):
            checkpoint.resolve_model(str(run / name))
    with pytest.raises(UserError, match=f"no manifest, so no checkpoint .*; .*{there}"):
        checkpoint.read_manifest(run)
    monkeypatch.chdir(run)
    assert checkpoint.checkpoints_near(Path("acme/model")) == ""  # an id on the hub


def test_a_model_of_a_run_has_the_name_of_its_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    for place in ("checkpoints/step_00000200", "model", "copied/best"):
        (run / place).mkdir(parents=True)
    checkpoint.mark_best(run, checkpoint.checkpoint_directory(run, 200))
    for place, name in {
        ".": "mine", "model": "mine", "best": "mine/step_00000200", "checkpoints/step_00000200": "mine/step_00000200",
        "copied/best": "copied/best",
    }.items():  # fmt: skip
        assert name_of_model(run / place) == name
        assert eval_of(run / place).run_directory.name == f"eval_{name.replace('/', '_')}"
    assert EvalConfig(**eval_of(run).model_dump() | {"model_name": "acme/best"}).run_directory.name == "eval_best"


# What a config leaves open


def eval_of(small: Path, **changes: Any) -> EvalConfig:
    data = ({"path": str(TINY / "heldout.jsonl")},)
    return EvalConfig(**{"model_name": str(small), "data": data} | changes)


@pytest.mark.parametrize(
    ("command", "platform", "has_instructions", "dtype"),
    [
        (chat_run, "cpu", True, "bfloat16"),
        (chat_run, "cpu", False, "float32"),
        (text_run, "cpu", True, "bfloat16"),
        (text_run, "tpu", False, "bfloat16"),
        (chat_run, "cuda", False, "bfloat16"),
        (eval_of, "cpu", True, "float32"),
        (eval_of, "gpu", False, "bfloat16"),
    ],
)
def test_auto_is_the_type_that_is_fast_on_the_device_for_the_job(
    command: Any, platform: str, has_instructions: bool, dtype: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "multiplies_bfloat16", lambda: has_instructions)
    assert checkpoint.settled(command(small, compute_dtype="auto"), platform).compute_dtype == dtype
    for named in ("float32", "bfloat16"):
        assert checkpoint.settled(command(small, compute_dtype=named), platform).compute_dtype == named


def test_rows_are_by_default_no_longer_than_the_model_allows(small: Path) -> None:
    config = eval_of(small)
    assert config.sequence_length == 2048 and checkpoint.settled(config).sequence_length == 1024
    assert checkpoint.settled(eval_of(small, sequence_length=2048)).sequence_length == 2048  # and is refused later
    grpo = GrpoConfig(model_name=str(small), run_name="run", data=({"path": str(TINY / "heldout.jsonl")},))
    for positions, room in ((1024, 512), (256, 128)):
        raw = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": positions}
        (small / "config.json").write_text(json.dumps(raw))
        decided = checkpoint.settled(grpo)
        assert (decided.sequence_length, decided.max_completion_tokens) == (positions, room)
    raw = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (small / "config.json").write_text(json.dumps(raw))
    assert checkpoint.settled(config).sequence_length == 2048


def test_what_a_run_decided_holds_when_it_resumes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = chat_run(small, resume=True).model_dump(exclude={"sequence_length", "compute_dtype"})
    config = SftConfig(**keys)
    began = config.model_copy(update={"compute_dtype": "bfloat16", "sequence_length": 512})
    config.run_directory.mkdir(parents=True)
    (config.run_directory / "config.toml").write_text(to_toml(began))
    assert checkpoint.settled(config) == began

    by_name = config.model_copy(update={"model_name": "acme/tiny"})
    pinned = began.model_copy(update={"model_name": "acme/tiny@c0ffee"})
    (config.run_directory / "config.toml").write_text(to_toml(pinned))
    monkeypatch.setattr(checkpoint, "resolve_model", lambda name, with_weights: small)
    assert checkpoint.settled(by_name) == pinned
    other = checkpoint.settled(by_name.model_copy(update={"model_name": "acme/tiny@v2"}))
    assert other.model_name == f"acme/tiny@{small.name}"  # the commit that the hub has for v2, for the run to refuse


# Pieces of tensors


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 6), max_size=3))
def test_pieces_are_accepted_if_they_cover_each_element_once_and_read_back_within_any_box(
    chance: Any, shape: list[int]
) -> None:
    cuts = [[0, *sorted(chance.sample(range(1, size), chance.randint(0, size - 1))), size] for size in shape]
    boxes = [tuple(box) for box in product(*(list(zip(cut, cut[1:], strict=False)) for cut in cuts))]
    match chance.choice(["as it is", "gap", "overlap", "moved"]):
        case "gap":
            boxes.remove(chance.choice(boxes))
        case "overlap":
            boxes.append(chance.choice(boxes))
        case "moved" if shape:
            place, axis = chance.randrange(len(boxes)), chance.randrange(len(shape))
            boxes[place] = tuple((a + 1, b + 1) if n == axis else (a, b) for n, (a, b) in enumerate(boxes[place]))
    values = np.asarray(np.arange(1, np.prod(shape) + 1).reshape(shape), np.float32)
    parts = [(box, values[tuple(slice(a, b) for a, b in box)]) for box in boxes]
    tensor = weights.StoredTensor(values.dtype, parts)
    covered = np.zeros([size + 2 for size in shape], int)
    for box in boxes:
        covered[tuple(slice(a + 1, b + 1) for a, b in box)] += 1
    within = np.zeros_like(covered)  # a tensor ends where its last piece does
    within[tuple(slice(1, size + 1) for size in (tensor.shape if boxes else ()))] = bool(boxes)
    assert tensor.is_whole == (bool(boxes) and np.array_equal(covered, within))
    if tensor.is_whole and tensor.shape == tuple(shape):
        wanted = tuple((begin := chance.randint(0, size + 1), begin + chance.randint(0, 4)) for size in shape)
        beyond = np.pad(values, [(0, 6)] * len(shape)) if shape else values
        np.testing.assert_array_equal(tensor.read(wanted), beyond[tuple(slice(a, b) for a, b in wanted)])


# Run states


def facts(step: int) -> checkpoint.RunFacts:
    return checkpoint.RunFacts(
        step=step, best=0.1 + 0.2, wall_seconds=1.5, config={"seed": 0}, model={}, data=("a",), versions={}
    )


def state_on(shape: tuple[int, int, int], model: ModelConfig = MODEL) -> optimizer.TrainState:
    params = weights.load_params(REFERENCE / "qwen3", model, mesh_of(*shape))
    state = optimizer.fresh_state(params)
    moments = jax.tree.map(lambda leaf: leaf * 2 + (leaf != 0), state.moments)
    return state._replace(moments=moments, step=jnp.int32(7))


@pytest.fixture(scope="module")
def state() -> optimizer.TrainState:
    return state_on((1, 1, 1))


def reported(saver: checkpoint.Saver) -> list[str]:
    """What a saver says of the saves that have ended."""
    lines = list[str]()
    saver.report(lines.append)
    return lines


def save(run: Path, state: Any, step: int, keep: int = 9, is_best: bool = False) -> Path:
    """The checkpoint of a step, written and committed."""
    saver = checkpoint.Saver(run, keep, "session")
    saver.save(state, optimizer.saved_shapes(MODEL), facts(step), is_best)
    saver.wait()
    reported(saver)
    return checkpoint.checkpoint_directory(run, step)


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
    directory = save(tmp_path / "one", state, 7, is_best=True)
    manifest = checkpoint.checked_manifest(directory)
    assert manifest.run == facts(7)
    abstract = optimizer.abstract_state(padded(other_rows), mesh_of(*other))
    loaded = checkpoint.load_checkpoint(directory, manifest, abstract, optimizer.saved_shapes(MODEL))
    for ours, expected, wanted in zip(*map(jax.tree.leaves, (loaded, state, abstract)), strict=True):
        if ours.shape and ours.shape[0] == other_rows != rows:
            assert not np.any(ours[160:])
            ours, expected = ours[:160], expected[:160]
        else:
            assert ours.sharding == wanted.sharding
        np.testing.assert_array_equal(ours, expected)
    same = optimizer.abstract_state(padded(rows), mesh_of(*shape))
    again = checkpoint.load_checkpoint(directory, manifest, same, optimizer.saved_shapes(MODEL))
    assert contents(save(tmp_path / "two", again, 7, is_best=True)) == contents(directory)


def test_the_model_is_written_from_a_checkpoint_as_from_memory(tmp_path: Path) -> None:
    state, source = state_on((1, 2, 2), padded(166)), REFERENCE / "qwen3"
    directory = save(tmp_path, state, 7)
    checkpoint.save_model(tmp_path / "one", state.params, padded(166), source)
    checkpoint.save_model(tmp_path / "two", checkpoint.saved_params(directory, MODEL), MODEL, source)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_state_of_another_model_is_refused_by_the_tensor(tmp_path: Path, state: optimizer.TrainState) -> None:
    directory = save(tmp_path, state, 7)
    other = replace(MODEL, feedforward=MODEL.feedforward * 2)
    with pytest.raises(UserError, match=r"params/layers/down is float32 of shape .* wants float32 .* another model's"):
        checkpoint.load_checkpoint(
            directory,
            checkpoint.read_manifest(directory),
            optimizer.abstract_state(other, mesh_of(1, 1, 1)),
            optimizer.saved_shapes(other),
        )


def edited(path: Path, change: Any) -> None:
    """Change a manifest and correct its own hash."""
    content = json.loads((path / "manifest.json").read_text())["manifest"]
    change(content)
    text = json.dumps({"sha256": checkpoint.content_hash(content), "manifest": content})
    (path / "manifest.json").write_text(text)


def rekeyed(path: Path, key: str, changed: str) -> None:
    """Give a piece another key, and correct the manifest."""
    shard = path / "shard-00000.safetensors"
    tensors = load_file(shard)
    save_file({changed if name == key else name: tensor for name, tensor in tensors.items()}, shard)
    edited(path, lambda content: content.update(shards=[hashlib.sha256(shard.read_bytes()).hexdigest()]))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit in the last tensor": (lambda d: flip(d / "shard-00000.safetensors", -5), "SHA-256"),
    "flipped bit in the header": (lambda d: flip(d / "shard-00000.safetensors", 20), "SHA-256"),
    "truncated": (lambda d: os.truncate(d / "shard-00000.safetensors", 1000), "SHA-256"),
    "zero bytes": (lambda d: (d / "shard-00000.safetensors").write_bytes(b""), "SHA-256"),
    "missing shard": (lambda d: (d / "shard-00000.safetensors").unlink(), "shard-00000.safetensors: No such file"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest"),
    "empty manifest": (lambda d: (d / "manifest.json").write_bytes(b""), "damaged"),
    "manifest cut short": (lambda d: os.truncate(d / "manifest.json", 500), "damaged"),
    "manifest of zeros": (lambda d: (d / "manifest.json").write_bytes(bytes(500)), "damaged"),
    "another JSON": (lambda d: (d / "manifest.json").write_text("[1]"), "damaged"),
    "a deep JSON": (lambda d: (d / "manifest.json").write_text("[" * 10**5), "RecursionError: maximum recursion depth"),
    "a number changed": (
        lambda d: (d / "manifest.json").write_text(
            (d / "manifest.json").read_text().replace('"wall_seconds": 1.5', '"wall_seconds": 1.6')
        ),
        "its SHA-256 is not the one it states",
    ),
    "a newer format": (lambda d: edited(d, lambda c: c.update(format=99, more=1)), "it has format 99"),
    "an unknown field": (lambda d: edited(d, lambda c: c.update(extra=1)), "extra"),
    "a gap": (lambda d: rekeyed(d, "params/final_norm@0", "params/final_norm@1"), "the pieces of params/final_norm"),
    "an overlap": (
        lambda d: rekeyed(d, "params/layers/attention_norm@0,0", "params/layers/feedforward_norm@1,0"),
        "the pieces of params/layers/feedforward_norm",
    ),
    "an axis too many": (lambda d: rekeyed(d, "params/final_norm@0", "params/final_norm@0,0"), "damaged"),
    "no index": (lambda d: rekeyed(d, "params/final_norm@0", "params/final_norm@-"), "damaged"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory, state: optimizer.TrainState) -> Path:
    run = tmp_path_factory.mktemp("saved_twice")
    for step in (1, 2):
        save(run, state, step)
    return run


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, saved_twice: Path, kind: str) -> None:
    spoil, words = DAMAGE[kind]
    run = Path(shutil.copytree(saved_twice, tmp_path / "run"))
    newest, said = checkpoint.checkpoint_directory(run, 2), list[str]()
    spoil(newest)
    with pytest.raises(UserError, match=str(newest)) as refusal:
        checkpoint.checked_manifest(newest)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    found = checkpoint.newest_good(run, said.append)
    assert found and found[0].name == "step_00000001"
    assert len(said) == 1 and words in said[0] and str(newest) in said[0]
    shutil.rmtree(checkpoint.checkpoint_directory(run, 1))
    with pytest.raises(UserError, match="none of its 1 checkpoints is intact") as refusal:
        checkpoint.newest_good(run, said.append)
    assert words in str(refusal.value) and str(newest) in str(refusal.value)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="never read.*save_file"):
        checkpoint.read_manifest(tmp_path / name)


# Saving


def test_a_save_copies_the_state_so_that_the_next_step_reuses_its_memory(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pointers(state: optimizer.TrainState) -> list[int]:
        return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) for shard in leaf.global_shards]

    state = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)
    expected, before = jax.tree.map(np.array, state), pointers(state)
    may_write, write_pieces = threading.Event(), checkpoint.write_pieces
    monkeypatch.setattr(checkpoint, "write_pieces", lambda *given: may_write.wait() and write_pieces(*given))
    saver = checkpoint.Saver(tmp_path, 9, "session")
    saver.save(state, optimizer.saved_shapes(MODEL), facts(1), False)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 9, state), donate_argnums=0)
    changed = jax.block_until_ready(step(state))
    assert pointers(changed) == before
    may_write.set()
    saver.wait()
    directory = checkpoint.checkpoint_directory(tmp_path, 1)
    abstract = optimizer.abstract_state(MODEL, mesh_of(1, 1, 1))
    assert_trees_equal(
        checkpoint.load_checkpoint(
            directory, checkpoint.read_manifest(directory), abstract, optimizer.saved_shapes(MODEL)
        ),
        expected,
    )


def test_a_save_returns_before_it_is_written_and_the_next_waits_for_it(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write_pieces = threading.Event(), checkpoint.write_pieces
    monkeypatch.setattr(checkpoint, "write_pieces", lambda *given: may_write.wait() and write_pieces(*given))
    saver, shapes = checkpoint.Saver(tmp_path, 9, "session"), optimizer.saved_shapes(MODEL)
    saver.save(state, shapes, facts(1), True)
    assert reported(saver) == [] and saver.newest is None and not checkpoint.saved_steps(tmp_path)
    threading.Timer(0.25, may_write.set).start()
    assert saver.save(state, shapes, facts(2), False) >= 0.2
    saver.wait()
    first, second = reported(saver)
    assert (first.split(" (")[0], second.split(" (")[0]) == (
        f"saved {checkpoint.checkpoint_directory(tmp_path, 1)}, the best so far",
        f"saved {saver.newest}",
    )
    tensors = load_file(checkpoint.checkpoint_directory(tmp_path, 1) / "shard-00000.safetensors")
    size, seconds = re.findall(r"\((.+) in (\d+\.\d) s\)$", first)[0]
    assert size == byte_size(sum(tensor.nbytes for tensor in tensors.values())) and float(seconds) >= 0.2


def test_an_error_waits_for_the_save_under_way_but_a_user_who_leaves_does_not(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write_pieces = threading.Event(), checkpoint.write_pieces
    monkeypatch.setattr(checkpoint, "write_pieces", lambda *given: may_write.wait() and write_pieces(*given))
    saver = checkpoint.Saver(tmp_path, 9, "session")
    saver.save(state, optimizer.saved_shapes(MODEL), facts(1), False)
    with pytest.raises(KeyboardInterrupt), saver.finishing():
        raise KeyboardInterrupt
    assert not checkpoint.saved_steps(tmp_path)
    threading.Timer(0.1, may_write.set).start()
    with pytest.raises(ZeroDivisionError), saver.finishing():
        raise ZeroDivisionError
    assert checkpoint.saved_steps(tmp_path) == [1]


def test_an_error_of_the_program_while_saving_is_raised_where_it_is_noticed(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *given: 1 // 0)
    saver = checkpoint.Saver(tmp_path, 9, "session")
    saver.save(state, optimizer.saved_shapes(MODEL), facts(1), False)
    saver.wait()
    with pytest.raises(ZeroDivisionError):
        reported(saver)


def fails(number: int, is_due: Callable[..., bool], usual: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the system's that gives an error where due."""

    def failing(*given: Any, **named: Any) -> Any:
        if is_due(*given):
            raise OSError(number, os.strerror(number), str(given[0]))
        return usual(*given, **named)

    return failing


def saved_with(saver: checkpoint.Saver, state: optimizer.TrainState, step: int, best: float | None = None) -> str:
    """The line of a save, with a figure that may be the best."""
    given = facts(step).model_copy(update={"best": best})
    saver.save(state, optimizer.saved_shapes(MODEL), given, best is not None)
    saver.wait()
    (line,) = reported(saver)
    return line


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_can_not_sync_directories_is_saved_to(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", fails(number, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode), os.fsync))
    assert "WARNING" not in saved_with(checkpoint.Saver(tmp_path, 9, "session"), state, 1)
    monkeypatch.setattr(os, "fsync", fails(number, lambda _: True, os.fsync))
    assert "step 2 could not be saved" in saved_with(checkpoint.Saver(tmp_path, 9, "session"), state, 2)


AFTERWARDS = {
    "the sync of the folder": (os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}").endswith("points")),
    "the removal of an old one": (shutil, "rmtree", lambda path, *_: str(path).endswith(".old")),
    "the rename of an old one": (os, "rename", lambda path, *_: str(path).endswith("step_00000001")),
    "the link to the best": (os, "replace", lambda _, path: str(path).endswith("best")),
}  # fmt: skip


@pytest.mark.parametrize("what", AFTERWARDS)
def test_what_fails_after_a_checkpoint_has_its_name_is_a_warning(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    saver = checkpoint.Saver(tmp_path, 1, "session")
    save(tmp_path, state, 1)
    owner, name, is_due = AFTERWARDS[what]
    monkeypatch.setattr(owner, name, fails(errno.EIO, is_due, getattr(owner, name)))
    line = saved_with(saver, state, 2, best=1.0)
    assert line.startswith("saved ") and "WARNING" in line and os.strerror(errno.EIO) in line
    assert saver.failures == 0 and saver.newest and saver.newest.name == "step_00000002"
    monkeypatch.undo()
    assert "WARNING" not in saved_with(saver, state, 3, best=0.5)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000003"]


def test_where_there_are_no_symbolic_links_best_is_a_file_that_names_it(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", fails(errno.EPERM, lambda *_: True, os.symlink))
    saver = checkpoint.Saver(tmp_path, 1, "session")
    lines = [saved_with(saver, state, step, best) for step, best in ((1, 3.0), (2, 2.0), (3, None), (4, None))]
    assert not any("WARNING" in line for line in lines)
    assert (tmp_path / "best").read_text() == "checkpoints/step_00000002\n"
    assert checkpoint.best_checkpoint(tmp_path) == checkpoint.checkpoint_directory(tmp_path, 2).resolve()
    assert checkpoint.saved_steps(tmp_path) == [2, 4]
    checkpoint.set_aside_later(tmp_path, 1)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_copy_that_followed_the_link_to_the_best_becomes_a_link_again(
    tmp_path: Path, state: optimizer.TrainState, is_there: bool
) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "run", state, step, is_best=step == 1)
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    original = checkpoint.checkpoint_directory(copy, 1)
    if not is_there:
        shutil.rmtree(original)
    assert (copy / "best").is_dir() and not (copy / "best").is_symlink()
    checkpoint.set_aside_later(copy, 3)
    assert (copy / "best").is_symlink() and checkpoint.best_checkpoint(copy) == original.resolve()
    checkpoint.checked_manifest(original)
    assert saved_with(checkpoint.Saver(copy, 9, "session"), state, 4, best=1.0).startswith("saved ")
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [f"step_0000000{n}" for n in (1, 2, 3, 4)]


def test_the_best_is_that_of_what_is_saved(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = checkpoint.Saver(tmp_path, 9, "session")
    saved_with(saver, state, 1, best=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_pieces", fails(errno.EIO, lambda *_: True, checkpoint.write_pieces))
        assert "could not be saved" in saved_with(saver, state, 2, best=1.0)
    assert saver.best == 3.0
    saved_with(saver, state, 3)
    assert checkpoint.read_manifest(checkpoint.checkpoint_directory(tmp_path, 3)).run.best == 3.0
    run: Any = SimpleNamespace(saver=saver)
    better: Any = partial(trainer.Run.better_figure, run)
    assert better({"eval_loss": 2.0}) == 2.0 and better({"eval_loss": 3.0}) is None and better({"loss": 1.0}) is None
    assert better({"eval_reward": 4.0, "eval_loss": 9.0}) == 4.0 and better({"eval_loss": float("nan")}) is None
    saved_with(saver, state, 4, best=2.0)
    assert saver.best == 2.0 and checkpoint.best_checkpoint(tmp_path).name == "step_00000004"


def test_old_checkpoints_go_but_the_newest_and_the_best_stay(tmp_path: Path, state: optimizer.TrainState) -> None:
    (tmp_path / "checkpoints" / "step_00000001.other.tmp").mkdir(parents=True)
    for step in range(1, 6):
        save(tmp_path, state, step, keep=2, is_best=step == 2)
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 5]
    assert (tmp_path / "best").resolve().name == "step_00000002"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_checkpoints_newer_than_the_one_a_run_resumes_from_are_set_aside(
    tmp_path: Path, state: optimizer.TrainState
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state, step, is_best=step == 3)
    moved = checkpoint.set_aside_later(tmp_path, 1)
    assert checkpoint.saved_steps(tmp_path) == [1] and len(moved) == 2 and all(path.is_dir() for path in moved)
    assert not (tmp_path / "best").is_symlink()


def test_files_are_readable_as_the_umask_says(tmp_path: Path, state: optimizer.TrainState) -> None:
    before = os.umask(0o027)
    try:
        directory = save(tmp_path, state, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the save's own runs after it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def killed_after(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: kill(function(*given))


def remove_half(path: Path, **_: Any) -> None:
    if path.name.endswith(".old") and path.exists():
        next(path.glob("*.safetensors")).unlink()
        kill()


KILLS = {
    "after a shard": (checkpoint, "write_pieces", killed_after(checkpoint.write_pieces)),
    "before the manifest": (checkpoint, "write_manifest", kill),
    "before the rename": (checkpoint, "replace_directory", kill),
    "after the rename": (checkpoint, "replace_directory", killed_after(checkpoint.replace_directory)),
    "during retention": (shutil, "rmtree", remove_half),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_at_any_point_of_a_save_leaves_an_intact_checkpoint_and_leftovers_only_until_the_next_save(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    first = save(tmp_path, state, 2, keep=1)
    before = contents(first)
    saver, said = checkpoint.Saver(tmp_path, 1, "session"), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(*KILLS[point])
        saver.save(state, optimizer.saved_shapes(MODEL), facts(4), False)
        saver.wait()
    with pytest.raises(Killed):
        reported(saver)
    found = checkpoint.newest_good(tmp_path, said.append)
    assert found and not said and found[1].run.step == (4 if point in ("after the rename", "during retention") else 2)
    assert (found[0] != first or contents(first) == before) and len(os.listdir(tmp_path / "checkpoints")) == 2
    save(tmp_path, state, 6, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000006"]


def test_a_full_disk_is_survived_twice_and_no_partial_file_stays(
    tmp_path: Path, state: optimizer.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, first = optimizer.saved_shapes(MODEL), save(tmp_path, state, 1)
    saver, before = checkpoint.Saver(tmp_path, 9, "session"), contents(first)

    def try_to_save(step: int) -> list[str]:
        saver.save(state, shapes, facts(step), False)
        saver.wait()
        return reported(saver)

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
    assert contents(first) == before
    usage, saver.failures = shutil.disk_usage(tmp_path), 0
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    (line,) = try_to_save(5)
    assert f"{byte_size(size)} are needed, {byte_size(size - 1)} are free" in line and "training continues" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert "saved" in try_to_save(6)[0] and saver.failures == 0
    checkpoint.checked_manifest(checkpoint.checkpoint_directory(tmp_path, 6))
