"""Training against PyTorch's loop and the formulas, and against itself accumulated, sharded, packed, resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, SIZES, assert_trees_close, mesh_of
from jax.sharding import Mesh
from safetensors.numpy import load_file

from lacuna import checkpoint, optimizer, weights
from lacuna.config import SftConfig
from lacuna.data import Batch
from lacuna.distributed import put_batch
from lacuna.model import ModelConfig, initial_params, model_config, parameter_counts, parameter_table, read_model_config

ROW_LOSS = optimizer.RowLoss("float32", "matmuls")


def config(**changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "model_name": "unused", "run_name": "run", "data": ({"path": "unused"},), "batch_size": 4,
        "compute_dtype": "float32", "learning_rate": 1e-3, "weight_decay": 0.1, "steps": 50, "warmup_steps": 5,
    }  # fmt: skip
    return SftConfig(**settings | changes)


def random_batch(key: int, micro_batches: int, rows: int, length: int, vocabulary: int) -> Batch:
    """Rows of two documents with padding after them; a third of the targets do not count."""
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


def take_step(
    state: optimizer.TrainState, batch: Batch, model: ModelConfig, steps: int = 50, frozen: Any = None, **changes: Any
) -> tuple[optimizer.TrainState, dict[str, Any]]:
    """A step of a config with these changes; the state given stays as it is."""
    settings = config(**changes)
    loss = optimizer.RowLoss(settings.compute_dtype, settings.rematerialisation, settings.neftune_alpha > 0)
    state, divisor = jax.tree.map(jnp.copy, state), np.sum(batch.weight, dtype=np.float32)
    recipe = optimizer.recipe_of(settings, steps)
    return optimizer.train_step(state, batch, divisor, recipe, model, loss, None, frozen)


def loss_and_gradient(params: Any, batch: Batch, model: ModelConfig, step: int = 0, **changes: Any) -> tuple[Any, Any]:
    """Loss and gradient of a step, read off the first moments, which are a tenth of an unclipped gradient."""
    state = optimizer.fresh_state(params)._replace(step=jnp.int32(step))
    after, facts = take_step(state, batch, model, clip_norm=1e30, **changes)
    moments: Any = after.moments
    return facts["loss"], jax.tree.map(lambda leaf: leaf / (1 - optimizer.ADAM_BETA1), moments.mu)


def regrouped(batch: Batch, micro_batches: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, leaf.shape[-1]), batch)


class FactsOfTokens(NamedTuple):
    """A loss of nothing, with facts whose names do not tell how those of micro-batches are combined."""

    compute_dtype: str = "float32"

    def __call__(self, params: Any, batch: Batch, model: ModelConfig, noise: Any) -> tuple[jax.Array, optimizer.Facts]:
        tokens, longest = jnp.sum(batch.segment > 0), jnp.max(batch.position)
        return jnp.sum(params["embedding"]) * 0.0, ({"tokens_max": tokens}, {"longest": longest})


def test_facts_of_micro_batches_are_summed_or_the_largest_as_the_loss_says() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    state = optimizer.fresh_state(weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1)))
    batch = random_batch(0, 3, 2, 16, model.vocabulary_size)
    _, facts = optimizer.train_step(
        state, batch, np.float32(1), optimizer.recipe_of(config(), 50), model, FactsOfTokens()
    )
    assert facts["tokens_max"] == np.sum(batch.segment > 0) and facts["longest"] == batch.position.max()


@pytest.mark.parametrize("family", [pytest.param("qwen3", marks=pytest.mark.slow), "llama2"])
def test_fifty_steps_follow_pytorch(family: str) -> None:
    model = read_model_config(REFERENCE / family)
    expected = np.load(REFERENCE / "training.npz")
    state = optimizer.fresh_state(weights.load_params(REFERENCE / family, model, mesh_of(1, 1, 1)))
    losses, norms, rates = [], [], []
    for number in range(50):
        token, target = (expected[name][number][None].astype(np.int32) for name in ("tokens", "targets"))
        weight = expected["weights"][number][None].astype(np.float32)
        position = np.broadcast_to(np.arange(token.shape[-1], dtype=np.int32), token.shape)
        arrays: Any = (token, target, weight, np.ones_like(token), position)
        state, facts = take_step(state, Batch(*arrays), model)
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
    state = optimizer.fresh_state(weights.load_params(REFERENCE / "qwen2", model, mesh_of(1, 1, 1)))
    batch = random_batch(0, 1, 4, 24, model.vocabulary_size)
    loss, gradients = loss_and_gradient(state.params, batch, model)
    after, facts = take_step(state, batch, model, clip_norm=0.5)
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


@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.slow), 5.0])
def test_micro_batches_change_neither_loss_nor_gradient(alpha: float) -> None:
    model = read_model_config(REFERENCE / "qwen3")
    params = weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1))
    whole = random_batch(1, 1, 8, 24, model.vocabulary_size)
    expected = loss_and_gradient(params, whole, model, step=3, neftune_alpha=alpha)
    for count in (2, 4):
        ours = loss_and_gradient(params, regrouped(whole, count), model, step=3, neftune_alpha=alpha)
        assert_trees_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_within_its_bound_and_new_each_step() -> None:
    segment = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    x = jnp.zeros((1, 8, 4))
    noise = optimizer.embedding_noise(jax.random.key(0), 0, jnp.float32(3), segment, x)
    bound = 3.0 / np.sqrt(np.array([4, 4, 4, 4, 2, 2, 2, 2]) * 4)
    share = np.abs(noise[0]) / bound[:, None]
    assert share.max() <= 1 and share.max() > 0.8
    for key, row in ((jax.random.key(1), 0), (jax.random.key(0), 1)):
        assert not np.allclose(noise, optimizer.embedding_noise(key, row, jnp.float32(3), segment, x))


def sized(**changes: int) -> ModelConfig:
    raw = json.loads((REFERENCE / "qwen3" / "config.json").read_text())
    return model_config(raw | SIZES | changes, "config.json")


def born(model: ModelConfig, mesh: Mesh) -> optimizer.TrainState:
    """Random weights and empty moments over a mesh."""
    return birth(model, mesh)(jax.random.key(0))


def birth(model: ModelConfig, mesh: Mesh) -> Any:
    """What makes random weights and empty moments over a mesh from a key."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, optimizer.abstract_state(model, mesh))
    return jax.jit(lambda key: optimizer.fresh_state(initial_params(key, model)), out_shardings=shardings)


def curve(model: ModelConfig, mesh: Mesh, steps: int, rows: int, length: int) -> tuple[Any, np.ndarray]:
    """State and [step, (loss, gradient norm)] of some steps on a mesh, the vocabulary padded as it needs."""
    shards = mesh.shape["tensor"]
    model = replace(model, padded_vocabulary=-(-model.vocabulary_size // shards) * shards)
    facts = []
    with jax.set_mesh(mesh):
        state = born(model, mesh)
        for number in range(steps):
            batch = put_batch(random_batch(number, 1, rows, length, model.vocabulary_size), mesh)
            state, metrics = take_step(state, batch, model)
            facts.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return state, np.array(facts)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return curve(sized(), mesh_of(1, 1, 1), 10, 8, 16)[1]


@pytest.mark.parametrize(
    "shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 1, 4))), (1, 8, 1), (2, 2, 2)]
)
def test_devices_change_nothing_in_ten_steps(shape: tuple[int, int, int], one_device: np.ndarray) -> None:
    mesh = mesh_of(*shape)
    state, several = curve(sized(), mesh, 10, 8, 16)
    np.testing.assert_allclose(several, one_device, rtol=1e-5)
    for leaf in jax.tree.leaves((state.params, state.moments)):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * shape[1] * shape[2] == leaf.size


def test_a_vocabulary_that_does_not_divide_is_padded_without_effect(tmp_path: Path) -> None:
    tensor = 3
    model = sized(vocab_size=152_225, hidden_size=8, num_attention_heads=tensor, num_key_value_heads=tensor)
    mesh = mesh_of(1, 1, tensor)
    _, one = curve(model, mesh_of(1, 1, 1), 3, 2, 16)
    state, several = curve(model, mesh, 3, 2, 16)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    rows = state.params["embedding"].shape[0]
    assert rows > 152_225 and rows % tensor == 0
    for tree in (state.params, state.moments.mu, state.moments.nu):
        assert not np.any(np.asarray(tree["embedding"])[152_225:])
    checkpoint.save_model(tmp_path / "out", state.params, replace(model, padded_vocabulary=rows), REFERENCE / "qwen3")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].shape == (152_225, 8)


@pytest.mark.parametrize(
    ("dtype", "counts"), [("float32", (8,)), pytest.param("bfloat16", (8,), marks=pytest.mark.slow)]
)
def test_memory_of_a_device_falls_with_their_number(dtype: str, counts: tuple[int, ...]) -> None:
    model = sized(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8, head_dim=32)
    held, temporary, at_birth = {}, {}, {}
    layer = 4 * parameter_counts(model)["all"] / model.layers
    for count in (1, *counts):
        mesh = mesh_of(1, count, 1)
        with jax.set_mesh(mesh):
            batch = put_batch(random_batch(0, 2, 8, 8, 157), mesh)
            recipe, state = optimizer.recipe_of(config(), 50), optimizer.abstract_state(model, mesh)
            lowered = optimizer.train_step.lower(
                state, batch, np.float32(1), recipe, model, ROW_LOSS._replace(compute_dtype=dtype)
            )
            memory: Any = lowered.compile().memory_analysis()
            new: Any = birth(model, mesh).lower(jax.random.key(0)).compile().memory_analysis()
        held[count], temporary[count] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        at_birth[count] = new.temp_size_in_bytes + new.output_size_in_bytes
    assert held[1] > 3 * 8 * layer and temporary[1] > 8 * layer
    for count in counts:  # a few layers at a time are gathered whole, no more
        assert held[count] < 1.02 * held[1] / count
        assert at_birth[count] < 1.02 * at_birth[1] / count
        assert temporary[count] < 1.02 * temporary[1] / count + 3 * layer


def test_a_step_that_is_not_finite_has_no_effect_and_is_counted() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    state = optimizer.fresh_state(weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1)))
    good = random_batch(0, 1, 4, 16, model.vocabulary_size)
    bad = good._replace(weight=good.weight + jnp.inf)
    broken, facts = take_step(state, bad, model)
    assert int(facts["skipped"]) == 1 and int(broken.step) == 1
    for before, after in zip(*(jax.tree.leaves((s.params, s.moments)) for s in (state, broken)), strict=True):
        np.testing.assert_array_equal(before, after)
    after, facts = take_step(broken, good, model)
    assert int(facts["skipped"]) == 0
    assert not np.array_equal(after.params["embedding"], state.params["embedding"])


# Whole runs


def test_another_learning_rate_or_seed_compiles_nothing_again() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    state = optimizer.fresh_state(weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1)))
    batch = random_batch(0, 1, 2, 8, model.vocabulary_size)
    recipes = optimizer.recipe_of(config(), 50), optimizer.recipe_of(config(learning_rate=1.0, seed=7), 9)
    programs = {
        optimizer.train_step.lower(state, batch, np.float32(1), recipe, model, ROW_LOSS).as_text() for recipe in recipes
    }
    assert len(programs) == 1


def test_bfloat16_compute_stays_near_float32_also_for_a_token_met_a_thousand_times() -> None:
    model = read_model_config(REFERENCE / "qwen3")
    params = weights.load_params(REFERENCE / "qwen3", model, mesh_of(1, 1, 1))
    batch = random_batch(0, 1, 8, 256, model.vocabulary_size)
    batch = batch._replace(token=jnp.where(np.arange(256) % 2, 7, batch.token))
    found = {dtype: loss_and_gradient(params, batch, model, compute_dtype=dtype) for dtype in ("float32", "bfloat16")}
    (wide_loss, wide), (loss, narrow) = found["float32"], found["bfloat16"]
    assert float(loss) == pytest.approx(float(wide_loss), rel=5e-3)
    for ours, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - expected) < 0.05 * np.linalg.norm(expected)
    met = np.linalg.norm(narrow["embedding"][7] - wide["embedding"][7]) / np.linalg.norm(wide["embedding"][7])
    assert met < 0.02
