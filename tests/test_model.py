"""The model against transformers' values and float64 formulas, and against itself packed, padded and recomputed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of

from lacuna import checkpoint, model
from lacuna.config import UserError
from lacuna.model import summed_cross_entropy, token_statistics

FAMILIES = [
    "qwen2", "qwen2_untied", "qwen2_bfloat16", "qwen2_float16", "qwen3", "qwen3_sharded",
    "llama2", "llama3", "llama3_new", "mistral", "smollm2",
]  # fmt: skip


def load(directory: Path) -> tuple[model.ModelConfig, Any]:
    config = model.read_model_config(directory)
    return config, checkpoint.load_params(directory, config, mesh_of(1, 1, 1))


@partial(jax.jit, static_argnums=1)
def logits(params: Any, config: model.ModelConfig, ids: jax.Array, position: jax.Array) -> jax.Array:
    segment = jnp.ones(ids.shape, int)
    hidden = model.forward(params, model.embed(params, ids), segment, position, config)
    return model.logits_of(hidden, model.head_of(params, config), config.vocabulary_size)


def positions(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)


def temporary_bytes(lowered: Any) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_losses_equal_transformers(family: str) -> None:
    config, params = load(REFERENCE / family)
    expected = np.load(REFERENCE / family / "expected.npz")
    ids = expected["input_ids"]
    ours = logits(params, config, ids, expected["position_ids"])
    assert np.std(expected["logits"]) > 0.5
    np.testing.assert_allclose(ours, expected["logits"], atol=2e-4, rtol=0)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(ours)), np.roll(ids, -1, axis=1)[..., None], axis=-1)
    np.testing.assert_allclose(nll[:, :-1, 0], expected["nll"], atol=2e-4, rtol=0)


@pytest.mark.reference
def test_stories260k_equals_its_fixtures(shelf: Path) -> None:
    directory = shelf / "weights" / "stories260k"
    config, params = load(directory)
    for case in json.loads((directory / "fixtures.json").read_text())["cases"]:
        ids = np.array([case["input_ids"]])
        ours = logits(params, config, ids, positions(ids))[0]
        np.testing.assert_allclose(ours[-1], case["last_logits"], atol=2e-4, rtol=0)
        given = [key for key in case if "nll" in key]
        log_probability = jax.nn.log_softmax(ours[:-1])
        nll = -np.take_along_axis(np.asarray(log_probability), ids[0, 1:, None], axis=1)[:, 0]
        np.testing.assert_allclose(nll, np.array(case[given[0]], float).reshape(-1)[-len(nll) :], atol=2e-4, rtol=0)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-8B", 8_190_735_360),
        ("Llama-3.2-1B-Instruct", 1_235_814_400),
        ("Llama-3.2-3B-Instruct", 3_212_749_824),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
        ("TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("SmolLM2-135M", 134_515_008),
        ("Mistral-7B-Instruct-v0.3", 7_248_023_552),
    ],
)
def test_published_models_have_their_parameter_count(shelf: Path, name: str, count: int) -> None:
    config = model.read_model_config(shelf / "configs" / name)
    counts = model.parameter_counts(config)
    assert counts["all"] == count
    undecayed = config.layers * 2 * config.embed + config.embed
    undecayed += config.layers * 2 * config.head if config.has_query_key_norm else 0
    undecayed += config.layers * config.head * config.kv_heads * (config.group + 2) if config.has_qkv_bias else 0
    assert counts["all"] - counts["decayed"] == undecayed


def test_packed_documents_have_the_losses_and_gradients_of_documents_alone() -> None:
    """The values are transformers', which ran every document by itself."""
    config, params = load(REFERENCE / "qwen3")
    expected = np.load(REFERENCE / "packed.npz")
    lengths = expected["lengths"]
    ends = np.cumsum(lengths)
    row = 60
    arrays = {name: np.zeros((2, row), np.int32) for name in ("token", "target", "segment", "position")}
    places = []
    at, segment = [0, 0], [0, 0]
    for begin, end in zip(ends - lengths, ends, strict=True):
        size = end - begin - 1
        where = 0 if at[0] + size <= row else 1
        here = (where, slice(at[where], at[where] + size))
        segment[where] += 1
        ids = expected["tokens"][begin:end].astype(np.int32)
        arrays["token"][here], arrays["target"][here] = ids[:-1], ids[1:]
        arrays["segment"][here], arrays["position"][here] = segment[where], np.arange(size)
        at[where] += size
        places.append(here)
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    weight = (batch["segment"] > 0).astype(jnp.float32)

    def loss(params: Any) -> jax.Array:
        hidden = model.forward(params, model.embed(params, batch["token"]), batch["segment"], batch["position"], config)
        head = model.head_of(params, config)
        return summed_cross_entropy(hidden, head, batch["target"], weight, config.vocabulary_size)

    hidden = model.forward(params, model.embed(params, batch["token"]), batch["segment"], batch["position"], config)
    nll = token_statistics(hidden, model.head_of(params, config), batch["target"], config.vocabulary_size).loss
    packed = np.concatenate([np.asarray(nll[here]) for here in places])
    np.testing.assert_allclose(packed, expected["nll"], rtol=1e-5, atol=1e-5)
    gradients = jax.grad(loss)(params)
    table = model.parameter_table(config)
    files = {
        name: checkpoint.file_tensor(leaf, row, number, config, np.float32)
        for row, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(gradients), strict=True)
        for number, name in enumerate(checkpoint.file_names(row, config))
    }
    assert sorted(files) == sorted(expected["gradient_names"])
    for number, name in enumerate(expected["gradient_names"]):
        norm = expected["gradient_norms"][number]
        np.testing.assert_allclose(np.linalg.norm(files[name]), norm, rtol=1e-5)
        entries = files[name].reshape(-1)[expected["gradient_index"][number]]
        np.testing.assert_allclose(entries, expected["gradient_values"][number], rtol=1e-4, atol=1e-5 * norm)


@pytest.mark.parametrize("policy", ["matmuls", "layer"])
def test_rematerialisation_changes_memory_and_not_gradients(policy: str) -> None:
    config, params = load(REFERENCE / "qwen3")
    ids = jax.random.randint(jax.random.key(0), (2, 32), 0, config.vocabulary_size)
    position, segment = jnp.asarray(positions(np.asarray(ids))), jnp.ones(ids.shape, int)

    def loss(params: Any, policy: str) -> jax.Array:
        return jnp.sum(model.forward(params, model.embed(params, ids), segment, position, config, policy) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, expected in zip(*map(jax.tree.leaves, (gradient(params, policy), gradient(params, "none"))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    held = {name: temporary_bytes(gradient.lower(params, name)) for name in ("none", policy)}
    assert held[policy] < held["none"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("sizes", [(192, 128, 64), (6, 7, 5), (1, 64, 3)])
def test_a_product_and_its_gradients_are_those_of_float64_rounded_once(
    sizes: tuple[int, int, int], dtype: str, tolerance: float
) -> None:
    tokens, inputs, outputs = sizes
    random = np.random.default_rng(0)
    shapes = (tokens, inputs), (inputs, outputs), (tokens, outputs)
    arrays = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
    x, weight, gradient = (np.asarray(each, np.float64) for each in arrays)
    product, backward = jax.vjp(jax.jit(model.matrix_product), *arrays[:2])
    found = (product, *backward(arrays[2]))
    for ours, wanted in zip(found, (x @ weight, gradient @ weight.T, x.T @ gradient), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, float), wanted, rtol=tolerance, atol=1e-4)


def test_initial_weights_have_their_spread_and_do_not_depend_on_other_rows() -> None:
    config = model.read_model_config(REFERENCE / "qwen2_untied")
    params = model.initial_params(jax.random.key(0), config)
    layers = params["layers"]
    assert np.std(layers["query"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layers["down"]) == pytest.approx(0.02 / np.sqrt(2 * config.layers), rel=0.05)
    assert np.all(layers["attention_norm"] == 1) and np.all(layers["query_bias"] == 0)
    tied = model.initial_params(jax.random.key(0), model.read_model_config(REFERENCE / "qwen2"))
    np.testing.assert_array_equal(tied["embedding"], params["embedding"])


def test_initial_weights_are_the_same_on_every_mesh() -> None:
    config = model.read_model_config(REFERENCE / "qwen3")
    mesh = mesh_of(1, 4, 2)
    shardings = jax.tree.map(
        lambda row: jax.NamedSharding(mesh, model.partition_spec(row)), model.parameter_table(config)
    )
    draw = jax.jit(model.initial_params, static_argnums=1, out_shardings=shardings)
    for ours, alone in zip(
        jax.tree.leaves(draw(jax.random.key(3), config)),
        jax.tree.leaves(jax.jit(model.initial_params, static_argnums=1)(jax.random.key(3), config)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"dtype": "int8", "torch_dtype": None}, "int8"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "ForSequenceClassification"),
        ({"head_dim": 31}, "head_dim = 31 is odd"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' = 0"),
        ({"vocab_size": "512"}, "'vocab_size' = '512'"),
        ({"rope_theta": "x"}, "'rope_theta' = 'x'"),
        ({"attention_bias": "yes"}, "'attention_bias' = 'yes'"),
        ({"layer_types": 3}, "'layer_types' = 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    raw = json.loads((REFERENCE / "llama2" / "config.json").read_text()) | change
    with pytest.raises(UserError, match="config.json: ") as refusal:
        model.model_config(raw, "config.json")
    assert words in str(refusal.value)


def test_rows_beyond_a_sliding_window_or_the_positions_are_refused() -> None:
    raw = json.loads((REFERENCE / "mistral" / "config.json").read_text()) | {"sliding_window": 64}
    config = model.model_config(raw, "config.json")
    model.check_sequence_length(config, 64)
    with pytest.raises(UserError, match="sliding window = 64"):
        model.check_sequence_length(config, 65)
    with pytest.raises(UserError, match="max_position_embeddings = 2048"):
        model.check_sequence_length(model.read_model_config(REFERENCE / "llama2"), 4096)


def test_capacity_is_what_is_wanted_within_positions_and_sliding_window() -> None:
    raw = json.loads((REFERENCE / "mistral" / "config.json").read_text())
    for window, wanted, capacity in [(None, 48, 48), (None, 10**6, raw["max_position_embeddings"]), (64, 96, 64)]:
        assert model.model_config(raw | {"sliding_window": window}, "config.json").capacity(wanted) == capacity
