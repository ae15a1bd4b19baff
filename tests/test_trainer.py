"""Training against PyTorch's loop and the formulas, and against itself accumulated, sharded, packed, resumed."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, SIZES, TINY, chat_run, mesh_of, outcome, records, text_run
from jax.sharding import Mesh
from safetensors.numpy import load_file

from lacuna import checkpoint, trainer, weights
from lacuna.config import ModelKeys, SamplingKeys, SftConfig, UserError
from lacuna.data import Batch, Dataset
from lacuna.distributed import put_batch
from lacuna.metrics import RunLog
from lacuna.model import (
    ModelConfig,
    initial_params,
    model_config,
    parameter_counts,
    parameter_table,
    read_model_config,
)
from lacuna.sampler import Request, Sampler
from lacuna.tokenizer import encode, render


def page(**changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "model_name": "unused", "run_name": "run", "data": ({"path": "unused"},), "batch_size": 4,
        "compute_dtype": "float32", "learning_rate": 1e-3, "weight_decay": 0.1, "steps": 50, "warmup_steps": 5,
    }  # fmt: skip
    return SftConfig(**settings | changes)


def random_batch(key: int, micro_batches: int, rows: int, length: int, vocabulary: int) -> Batch:
    """Rows of two documents with padding behind them; a third of the targets do not count."""
    generator = np.random.default_rng(key)
    shape = (micro_batches * rows, length)
    cut, end = generator.integers(2, length // 2, (shape[0], 1)), generator.integers(length // 2, length, (shape[0], 1))
    slot = np.arange(length)
    segment = np.where(slot < cut, 1, np.where(slot < end, 2, 0)).astype(np.int32)
    position = np.where(slot < cut, slot, np.where(slot < end, slot - cut, 0)).astype(np.int32)
    token, target = (generator.integers(0, vocabulary, shape).astype(np.int32) for _ in range(2))
    weight = ((generator.random(shape) < 2 / 3) & (segment > 0)).astype(np.float32)
    arrays: Any = (token, target, weight, segment, position)
    return Batch(*(array.reshape(micro_batches, rows, length) for array in arrays))


def regrouped(batch: Batch, micro_batches: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, leaf.shape[-1]), batch)


def assert_trees_close(ours: Any, expected: Any, rtol: float, atol: float) -> None:
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol, atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("family", ["qwen3", "llama2"])
def test_fifty_steps_follow_pytorch(family: str) -> None:
    model = read_model_config(REFERENCE / family)
    expected = np.load(REFERENCE / "training.npz")
    state = trainer.fresh_state(weights.load_params(REFERENCE / family, model, mesh_of(1, 1, 1)))
    step = jax.jit(trainer.train_step, static_argnums=(3, 4), donate_argnums=0)
    losses, norms, rates = [], [], []
    for number in range(50):
        token, target = (expected[name][number][None].astype(np.int32) for name in ("tokens", "targets"))
        weight = expected["weights"][number][None].astype(np.float32)
        position = np.broadcast_to(np.arange(token.shape[-1], dtype=np.int32), token.shape)
        arrays: Any = (token, target, weight, np.ones_like(token), position)
        state, facts = step(state, Batch(*arrays), trainer.recipe_of(page(), 50), model, page())
        losses.append(float(facts["loss"]))
        norms.append(float(facts["gradient_norm"]))
        rates.append(float(facts["learning_rate"]))
    np.testing.assert_allclose(rates, expected["learning_rates"], rtol=1e-5)
    np.testing.assert_allclose(losses, expected[f"{family}/losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(norms, expected[f"{family}/gradient_norms"], rtol=1e-3)
    rows, leaves = jax.tree.leaves(parameter_table(model)), jax.tree.leaves(state.params)
    for row, leaf in zip(rows, leaves, strict=True):
        for layer, name in enumerate(weights.file_names(row, model)):
            norm = np.linalg.norm(weights.file_tensor(leaf, row, layer, model, np.float32))
            index = list(expected[f"{family}/parameter_names"]).index(name)
            np.testing.assert_allclose(norm, expected[f"{family}/parameter_norms"][index], rtol=1e-4, err_msg=name)


def test_one_step_is_adamw_in_float64_with_decay_on_matrices_alone() -> None:
    model = read_model_config(REFERENCE / "qwen2")
    state = trainer.fresh_state(weights.load_params(REFERENCE / "qwen2", model, mesh_of(1, 1, 1)))
    batch, settings = random_batch(0, 1, 4, 24, model.vocabulary_size), page(clip_norm=0.5)
    recipe = trainer.recipe_of(settings, 50)
    loss, gradients = trainer.whole_batch_gradient(state.params, batch, jnp.int32(0), recipe, model, settings)
    after, facts = trainer.train_step(state, batch, recipe, model, settings)
    wide = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in wide))
    assert norm > 0.5 and float(facts["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(facts["loss"]) == pytest.approx(float(loss))
    for (path, row), before, gradient, ours in zip(
        jax.tree.leaves_with_path(parameter_table(model)),
        jax.tree.leaves(state.params),
        wide,
        jax.tree.leaves(after.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        decays = "norm" not in name and "bias" not in name
        assert row.decays == decays
        clipped, param = gradient * 0.5 / norm, np.asarray(before, np.float64)
        direction = (0.1 * clipped / (1 - 0.9)) / (np.sqrt(0.05 * clipped**2 / (1 - 0.95)) + 1e-8)
        expected = param - 1e-3 / 5 * (direction + (0.1 * param if decays else 0))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_micro_batches_change_neither_loss_nor_gradient(alpha: float) -> None:
    model = read_model_config(REFERENCE / "qwen3")
    params = weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1))
    whole, settings = random_batch(1, 1, 8, 24, model.vocabulary_size), page(neftune_alpha=alpha)
    gradient = jax.jit(trainer.whole_batch_gradient, static_argnums=(4, 5))
    recipe = trainer.recipe_of(settings, 50)
    expected = gradient(params, whole, jnp.int32(3), recipe, model, settings)
    for count in (2, 4):
        ours = gradient(params, regrouped(whole, count), jnp.int32(3), recipe, model, settings)
        assert_trees_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_within_its_bound_and_new_each_step() -> None:
    segment = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    x = jnp.zeros((1, 8, 4))
    noise = trainer.embedding_noise(jax.random.key(0), segment, jnp.int32(0), jnp.float32(3), x)
    bound = 3.0 / np.sqrt(np.array([4, 4, 4, 4, 2, 2, 2, 2]) * 4)
    share = np.abs(noise[0]) / bound[:, None]
    assert share.max() <= 1 and share.max() > 0.8
    for key, row in ((jax.random.key(1), 0), (jax.random.key(0), 1)):
        assert not np.allclose(noise, trainer.embedding_noise(key, segment, jnp.int32(row), jnp.float32(3), x))


def sized(**changes: int) -> ModelConfig:
    raw = json.loads((REFERENCE / "qwen3" / "config.json").read_text())
    return model_config(raw | SIZES | changes, "config.json")


def born(model: ModelConfig, mesh: Mesh) -> trainer.TrainState:
    """Random weights and empty moments over a mesh."""
    make = jax.jit(
        lambda key: trainer.fresh_state(initial_params(key, model)), out_shardings=trainer.state_shardings(model, mesh)
    )
    return make(jax.random.key(0))


def curve(model: ModelConfig, mesh: Mesh, steps: int, rows: int, length: int) -> tuple[Any, np.ndarray]:
    """State and [step, (loss, gradient norm)] of some steps on a mesh, the vocabulary padded as it needs."""
    shards = mesh.shape["tensor"]
    model = replace(model, padded_vocabulary=-(-model.vocabulary_size // shards) * shards)
    facts = []
    with jax.set_mesh(mesh):
        state = born(model, mesh)
        step = jax.jit(trainer.train_step, static_argnums=(3, 4), donate_argnums=0)
        for number in range(steps):
            batch = put_batch(random_batch(number, 1, rows, length, model.vocabulary_size), mesh)
            state, metrics = step(state, batch, trainer.recipe_of(page(), 50), model, page())
            facts.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return state, np.array(facts)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return curve(sized(), mesh_of(1, 1, 1), 30, 8, 16)[1]


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 1, 4), (1, 2, 4), (2, 2, 2)]
)
def test_devices_change_nothing_in_thirty_steps(shape: tuple[int, int, int], one_device: np.ndarray) -> None:
    mesh = mesh_of(*shape)
    state, several = curve(sized(), mesh, 30, 8, 16)
    np.testing.assert_allclose(several, one_device, rtol=1e-5)
    for leaf in jax.tree.leaves((state.params, state.moments)):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * shape[1] * shape[2] == leaf.size


@pytest.mark.parametrize("tensor", [3, 4])
def test_a_vocabulary_that_does_not_divide_is_padded_without_effect(tensor: int, tmp_path: Path) -> None:
    model = sized(vocab_size=152_225, hidden_size=8, num_attention_heads=tensor, num_key_value_heads=tensor)
    mesh = mesh_of(1, 1, tensor)
    _, one = curve(model, mesh_of(1, 1, 1), 3, 2, 16)
    state, several = curve(model, mesh, 3, 2, 16)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    rows = state.params["embedding"].shape[0]
    assert rows > 152_225 and rows % tensor == 0
    for tree in (state.params, state.moments.mu, state.moments.nu):
        assert not np.any(np.asarray(tree["embedding"])[152_225:])
    weights.save_model(tmp_path / "out", state.params, replace(model, padded_vocabulary=rows), REFERENCE / "qwen3")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].shape == (152_225, 8)


@pytest.mark.parametrize(("dtype", "counts"), [("float32", (2, 4, 8)), ("bfloat16", (8,))])
def test_memory_of_a_device_falls_with_their_number(dtype: str, counts: tuple[int, ...]) -> None:
    model = sized(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8, head_dim=32)
    settings, held, temporary, at_birth = page(compute_dtype=dtype), {}, {}, {}
    layer = 4 * parameter_counts(model)["all"] / model.layers
    for count in (1, *counts):
        mesh = mesh_of(1, count, 1)
        with jax.set_mesh(mesh):
            batch = put_batch(random_batch(0, 2, 8, 8, 157), mesh)
            step = jax.jit(trainer.train_step, static_argnums=(3, 4), donate_argnums=0)
            recipe, state = trainer.recipe_of(settings, 50), trainer.abstract_state(model, mesh)
            memory: Any = step.lower(state, batch, recipe, model, settings).compile().memory_analysis()
            make = jax.jit(
                lambda key: trainer.fresh_state(initial_params(key, model)),
                out_shardings=trainer.state_shardings(model, mesh),
            )
            birth: Any = make.lower(jax.random.key(0)).compile().memory_analysis()
        held[count], temporary[count] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        at_birth[count] = birth.temp_size_in_bytes + birth.output_size_in_bytes
    assert held[1] > 3 * 8 * layer and temporary[1] > 8 * layer
    for count in counts:  # a few layers at a time are gathered whole, no more
        assert held[count] < 1.02 * held[1] / count
        assert at_birth[count] < 1.02 * at_birth[1] / count
        assert temporary[count] < 1.02 * temporary[1] / count + 3 * layer


def test_a_step_that_is_not_finite_has_no_effect_and_is_counted() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    state = trainer.fresh_state(weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1)))
    step = jax.jit(trainer.train_step, static_argnums=(3, 4))
    good = random_batch(0, 1, 4, 16, model.vocabulary_size)
    bad = good._replace(weight=good.weight + jnp.inf)
    broken, facts = step(state, bad, trainer.recipe_of(page(), 50), model, page())
    assert int(facts["skipped"]) == 1 and int(broken.step) == 1
    for before, after in zip(*(jax.tree.leaves((s.params, s.moments)) for s in (state, broken)), strict=True):
        np.testing.assert_array_equal(before, after)
    mended, facts = step(broken, good, trainer.recipe_of(page(), 50), model, page())
    assert int(facts["skipped"]) == 0
    assert not np.array_equal(mended.params["embedding"], state.params["embedding"])


# Whole runs


RUNS = {
    "chats, packed, mixed, three epochs, accumulated, with noise": (
        chat_run, {"neftune_alpha": 5.0, "save_every": 2, "eval_every": 3, "keep": 9},
    ),
    "chats, one a row": (chat_run, {"packing": False, "epochs": 1, "save_every": 2, "keep": 9}),
    "text": (text_run, {"save_every": 3, "keep": 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name: str, small: Path) -> None:
    make, changes = RUNS[name]
    whole = make(small, run_name="whole", **changes)
    trainer.run(whole)
    steps = checkpoint.saved_steps(whole.run_directory)
    assert len(steps) >= 2
    cut = make(small, run_name="cut", **changes)
    (cut.run_directory / "checkpoints").mkdir(parents=True)
    for file in ("config.toml", "metrics.jsonl"):  # killed after the next steps were logged
        (cut.run_directory / file).write_bytes((whole.run_directory / file).read_bytes())
    first = checkpoint.checkpoint_directory(whole.run_directory, steps[0])
    first.rename(checkpoint.checkpoint_directory(cut.run_directory, steps[0]))
    trainer.run(make(small, run_name="cut", resume=True, **changes))
    assert outcome(cut) == outcome(whole)
    assert [record["step"] for record in records(cut)] == list(range(1, len(records(whole)) + 1))


def test_a_run_leaves_the_files_of_its_contract(small: Path) -> None:
    page = chat_run(small, epochs=1)
    trainer.run(page)
    directory = page.run_directory
    assert {path.name for path in directory.iterdir()} >= {
        "config.toml", "metrics.jsonl", "run.log", "report.html", "summary.json", "checkpoints", "best", "model",
    }  # fmt: skip
    rows = records(page)
    keys = {
        "step", "loss", "learning_rate", "gradient_norm", "tokens", "target_tokens", "tokens_per_second",
        "target_tokens_per_second", "packing_efficiency", "mfu", "memory_bytes", "step_seconds", "epoch",
    }  # fmt: skip
    assert all(keys <= row.keys() for row in rows) and rows[0]["mfu"] is None
    assert rows[-1]["eval_loss"] > 0 and 0 <= rows[-1]["eval_accuracy"] <= 1
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["steps"] == len(rows) and summary["command"] == "sft" and summary["skipped_steps"] == 0
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert summary["best_eval_loss"] == rows[-1]["eval_loss"] and summary["final_loss"] == rows[-1]["loss"]
    assert (directory / "best").resolve() == checkpoint.checkpoint_directory(directory, len(rows)).resolve()
    exported = read_model_config(directory / "model")
    params = weights.load_params(directory / "model", exported, mesh_of(1, 1, 1))
    state = checkpoint.load_checkpoint(
        directory / "best",
        checkpoint.read_manifest(directory / "best"),
        trainer.abstract_state(exported, mesh_of(1, 1, 1)),
        trainer.saved_shapes(exported),
    )
    assert_trees_close(params, state.params, rtol=0, atol=0)
    assert (directory / "model" / "tokenizer_config.json").read_bytes() == (TINY / "tokenizer_config.json").read_bytes()


def test_each_sample_is_seen_once_an_epoch_and_the_last_batch_is_filled_with_empty_rows(small: Path) -> None:
    page = chat_run(
        small, data=({"path": str(TINY / "heldout.jsonl"), "split": "train[:100]"},), epochs=2, batch_size=8
    )
    trainer.run(page)
    summary = json.loads((page.run_directory / "summary.json").read_text())
    assert summary["data"]["documents"] == 100
    assert summary["tokens"] == 2 * summary["data"]["tokens"]
    assert summary["target_tokens"] == 2 * summary["data"]["target_tokens"]


def test_a_second_run_of_the_same_name_is_refused_before_anything_is_written(small: Path) -> None:
    page = text_run(small, steps=1)
    trainer.run(page)
    before = {path: path.stat().st_mtime_ns for path in page.run_directory.rglob("*")}
    with pytest.raises(UserError, match="--resume .* --overwrite"):
        trainer.run(page)
    assert {path: path.stat().st_mtime_ns for path in page.run_directory.rglob("*")} == before
    with pytest.raises(UserError, match="seed was 0 and is 1. It may change: .*learning_rate, .*steps, .*save_every"):
        trainer.run(text_run(small, steps=2, seed=1, resume=True))


@pytest.mark.parametrize("place", ["prepare", "flush", "evaluate"])
def test_a_signal_at_any_time_finishes_the_step_saves_and_says_how_to_go_on(
    small: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    held_out = ({"path": str(TINY / "pretrain.jsonl"), "split": "train[-5:]"},)
    page = text_run(small, run_name="stopped", eval_data=held_out, eval_every=3)
    usual = getattr(trainer.Loop, place)

    def interrupted(loop: trainer.Loop, *arguments: Any, **named: Any) -> Any:
        if loop.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.undo()
        return usual(loop, *arguments, **named)

    monkeypatch.setattr(trainer.Loop, place, interrupted)
    trainer.run(page)
    (step,) = checkpoint.saved_steps(page.run_directory)
    assert step < 8 and records(page)[-1]["step"] == step and not (page.run_directory / "model").exists()
    assert "config.toml --resume" in (page.run_directory / "run.log").read_text()
    trainer.run(page.model_copy(update={"resume": True}))
    whole = page.model_copy(update={"run_name": "whole"})
    trainer.run(whole)
    assert outcome(page) == outcome(whole)


def test_overwrite_deletes_a_run_and_nothing_else(small: Path) -> None:
    page = text_run(small, steps=1, overwrite=True)
    page.run_directory.mkdir(parents=True)
    thesis = page.run_directory / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="files that are no run"):
        trainer.run(page)
    assert thesis.exists()
    thesis.unlink()
    trainer.run(page)
    trainer.run(page)
    own = page.model_copy(update={"model_name": str(page.run_directory), "from_scratch": False})
    with pytest.raises(UserError, match="would delete"):
        trainer.run(own)
    wrong = page.model_copy(update={"model_name": str(small), "from_scratch": False})
    with pytest.raises(UserError, match="no such file; to train from random weights"):
        trainer.run(wrong)
    assert (page.run_directory / "model" / "config.json").exists()


def test_data_that_changed_since_the_checkpoint_are_refused(small: Path) -> None:
    data = small.parent / "texts.jsonl"
    lines = (TINY / "pretrain.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:50]))
    page = text_run(small, data=({"path": str(data)},), steps=1)
    trainer.run(page)
    data.write_text("".join(lines[:49]))
    with pytest.raises(UserError, match="texts.jsonl: its content has changed"):
        trainer.run(page.model_copy(update={"resume": True, "steps": 2}))


def test_five_steps_in_a_row_without_a_finite_gradient_end_the_run(small: Path) -> None:
    page = text_run(small, learning_rate=1e30, steps=12)
    with pytest.raises(UserError, match=r"step \d+: .* not finite.*rows \d+ to \d+, beginning .*5 steps in a row"):
        trainer.run(page)
    assert [row["gradient_norm"] for row in records(page)][-5:] == [None] * 5


def test_another_learning_rate_or_seed_compiles_nothing_anew() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    state = trainer.fresh_state(weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1)))
    batch, settings = random_batch(0, 1, 2, 8, model.vocabulary_size), page(neftune_alpha=1.0)
    programs = {
        jax.jit(trainer.train_step, static_argnums=(3, 4)).lower(state, batch, recipe, model, settings).as_text()
        for recipe in (trainer.recipe_of(settings, 50), trainer.recipe_of(page(learning_rate=1.0, seed=7), 9))
    }
    assert len(programs) == 1


def test_nothing_is_compiled_after_the_first_steps_evaluation_and_save(
    small: Path, compiled: list[tuple[int, str]]
) -> None:
    page = chat_run(small, eval_every=3, save_every=2, keep=9)
    trainer.run(page)
    assert len(records(page)) >= 9 and len(checkpoint.saved_steps(page.run_directory)) >= 4
    assert any(step == 0 for step, _ in compiled)
    assert [each for each in compiled if each[0] > 3] == []
    assert f"compiled programs are kept in {page.cache_dir}" in (page.run_directory / "run.log").read_text()


def test_a_slow_source_works_while_the_step_runs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, events, loops = text_run(small), [], []
    prepare, source, log = trainer.Loop.prepare, Dataset.batch, RunLog.step

    def watched(loop: trainer.Loop, index: int) -> Any:
        loops.append(loop)
        return prepare(loop, index)

    def slow(dataset: Dataset, index: int, *arguments: Any) -> Batch:
        """Takes until the step before has ended, which nobody waits for here."""
        if index:
            step = loops[-1].pending[-1][1]["loss"]
            events.append(("begun", index, not step.is_ready()))
            step.block_until_ready()
        return source(dataset, index, *arguments)

    def logged(self: RunLog, record: dict[str, Any]) -> None:
        events.append(("logged", record["step"], True))
        log(self, record)

    monkeypatch.setattr(trainer.Loop, "prepare", watched)
    monkeypatch.setattr(Dataset, "batch", slow)
    monkeypatch.setattr(RunLog, "step", logged)
    trainer.run(page)
    begun = {index: at for at, (kind, index, _) in enumerate(events) if kind == "begun"}
    fetched = {index: at for at, (kind, index, _) in enumerate(events) if kind == "logged"}
    assert len(begun) == page.steps - 1 and all(begun[step] < fetched[step] for step in begun)
    assert any(is_running for kind, _, is_running in events if kind == "begun")


def test_training_lowers_the_loss(small: Path) -> None:
    page = chat_run(small, epochs=12, learning_rate=1e-2)
    trainer.run(page)
    losses = [row["loss"] for row in records(page)]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_bfloat16_compute_stays_near_float32_also_for_a_token_met_a_thousand_times() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    params = weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1))
    batch = random_batch(0, 1, 8, 256, model.vocabulary_size)
    batch = batch._replace(token=jnp.where(np.arange(256) % 2, 7, batch.token))
    gradient = jax.jit(trainer.whole_batch_gradient, static_argnums=(4, 5))
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = page(compute_dtype=dtype)
        recipe = trainer.recipe_of(settings, 50)
        found[dtype] = gradient(params, batch, jnp.int32(0), recipe, model, settings)
    (wide_loss, wide), (loss, narrow) = found["float32"], found["bfloat16"]
    assert float(loss) == pytest.approx(float(wide_loss), rel=5e-3)
    for ours, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - expected) < 0.05 * np.linalg.norm(expected)
    met = np.linalg.norm(narrow["embedding"][7] - wide["embedding"][7]) / np.linalg.norm(wide["embedding"][7])
    assert met < 0.02


def test_a_full_disk_is_said_loudly_and_training_goes_on_to_the_next_save(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = text_run(small, steps=8, save_every=2)
    free, usual = [1000, 1000, 10**12, 10**12], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usual(path)._replace(free=free.pop(0)))
    trainer.run(page)
    log = (page.run_directory / "run.log").read_text()
    assert log.count("WARNING: step") == 2 and "are needed, 1 KB are free; training goes on" in log
    assert checkpoint.saved_steps(page.run_directory) == [6, 8] and len(records(page)) == 8


def test_three_full_disks_in_a_row_end_the_run_which_then_goes_on_where_it_was_saved(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = text_run(small, steps=12, save_every=2)
    free, usual = [10**12, 1000, 1000, 1000, 10**12, 10**12], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usual(path)._replace(free=free.pop(0)))
    with pytest.raises(UserError, match="3 saves in a row failed: make room and add --resume"):
        trainer.run(page)
    assert checkpoint.saved_steps(page.run_directory) == [2] and not free[2:]
    monkeypatch.undo()
    trainer.run(page.model_copy(update={"resume": True}))
    whole = page.model_copy(update={"run_name": "whole"})
    trainer.run(whole)
    assert outcome(page) == outcome(whole)


def test_a_damaged_checkpoint_is_stepped_around_by_resume_but_refused_when_asked_for(small: Path) -> None:
    page = text_run(small, steps=4, save_every=2)
    trainer.run(page)
    shards = [checkpoint.checkpoint_directory(page.run_directory, step) / "shard-00000.safetensors" for step in (2, 4)]
    os.truncate(shards[1], 100)
    with pytest.raises(UserError, match="step_00000004.* 100 bytes"):
        trainer.run(page.model_copy(update={"resume_from": str(shards[1].parent)}))
    trainer.run(page.model_copy(update={"resume": True}))
    log = (page.run_directory / "run.log").read_text()
    assert f"checkpoint passed over: {shards[1]}" in log and f"resuming from {shards[0].parent}" in log
    assert "set aside as" in log and [record["step"] for record in records(page)] == [1, 2, 3, 4]
    for shard in shards:
        os.truncate(shard, 100)
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        trainer.run(page.model_copy(update={"resume": True}))


def test_a_run_whose_checkpoints_are_gone_and_a_foreign_directory_are_not_resumed(small: Path) -> None:
    page = text_run(small, steps=2)
    trainer.run(page)
    shutil.rmtree(page.run_directory / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in page.run_directory.rglob("*")}
    with pytest.raises(UserError, match="whose checkpoints are gone"):
        trainer.run(page.model_copy(update={"resume": True}))
    assert {path: path.stat().st_mtime_ns for path in page.run_directory.rglob("*")} == before
    foreign = text_run(small, steps=2, run_name="foreign", resume=True)
    foreign.run_directory.mkdir()
    (foreign.run_directory / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        trainer.run(foreign)
    assert (foreign.run_directory / "metrics.jsonl").read_text() == "mine"


def test_samples_of_a_run_are_what_its_model_generates(small: Path) -> None:
    prompts = ("Nora has 18 marbles.", "How many are 2 jars?")
    run = chat_run(small, steps=2, eval_every=1, sample_prompts=prompts, sample_tokens=9)
    assert trainer.run(run)
    logged = [record["samples"] for record in records(run)]
    assert len(logged) == 2 and all(tuple(samples) == prompts for samples in logged)
    mesh = mesh_of(1, 1, 1)
    source, config, tokenizer = weights.open_model(ModelKeys(model_name=str(run.run_directory)), mesh)
    sampler = Sampler(weights.load_params(source, config, mesh), config, tokenizer, mesh, 1, 64, "float32")
    for prompt in prompts:
        text = render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        token = encode(tokenizer, text, add_special_tokens=False)
        stop = tokenizer.eos_id
        assert stop is not None
        request = Request(tuple(token.tolist()), SamplingKeys(temperature=0.0, max_tokens=9), (stop,))
        assert sampler.generate([request])[0].text == logged[-1][prompt]
    report = (run.run_directory / "report.html").read_text()
    assert "Samples at step 2" in report and prompts[0] in report


def test_a_sample_prompt_that_does_not_fit_is_refused_before_the_run(small: Path) -> None:
    with pytest.raises(UserError, match="max_position_embeddings"):
        trainer.run(chat_run(small, sample_prompts=("word " * 3000,)))
    assert not (small.parent / "runs" / "run" / "metrics.jsonl").exists()
