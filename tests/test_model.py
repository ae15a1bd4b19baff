"""The model and its loss against transformers' values, float64 formulas, and themselves, packed and recomputed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, mesh_of
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lacuna import weights
from lacuna.apps.programs import collectives, read_program
from lacuna.config import UserError
from lacuna.linear import matrix_product
from lacuna.model import (
    ModelConfig,
    check_sequence_length,
    check_trainable,
    cross_entropy,
    embed,
    forward,
    head_of,
    initial_params,
    logits_of,
    model_config,
    parameter_counts,
    parameter_table,
    partition_spec,
    read_model_config,
    rotary_frequencies,
    rotation_at,
    summed_token_loss,
    token_statistics,
)

FAMILIES = [
    "qwen2", "qwen2_untied", "qwen2_bfloat16", "qwen2_float16", "qwen3", "qwen3_sharded",
    "llama2", "llama3", "llama3_new", "mistral", "smollm2", "qwen3_yarn", "smollm3", "olmo2",
]  # fmt: skip


def load(directory: Path, mesh: Mesh | None = None) -> tuple[ModelConfig, Any]:
    model = read_model_config(directory)
    return model, weights.load_params(directory, model, mesh or mesh_of(1, 1, 1))


@partial(jax.jit, static_argnums=1)
def logits(params: Any, model: ModelConfig, ids: jax.Array, position: jax.Array) -> jax.Array:
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones(ids.shape, int), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)


def positions(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)


def temporary_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_losses_equal_transformers(family: str) -> None:
    model, params = load(REFERENCE / family)
    expected = np.load(REFERENCE / family / "expected.npz")
    ids = expected["input_ids"]
    ours = logits(params, model, ids, expected["position_ids"])
    assert np.std(expected["logits"]) > 0.5
    tolerance = 2e-5 if family in ("qwen3_yarn", "smollm3", "olmo2") else 0
    np.testing.assert_allclose(ours, expected["logits"], atol=tolerance or 2e-4, rtol=tolerance)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(ours)), np.roll(ids, -1, axis=1)[..., None], axis=-1)
    np.testing.assert_allclose(nll[:, :-1, 0], expected["nll"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["smollm3", "olmo2"])
def test_layers_without_rotation_and_norms_over_all_heads_are_the_same_on_several_devices(family: str) -> None:
    mesh, expected = mesh_of(1, 2, 2), np.load(REFERENCE / family / "expected.npz")
    model, params = load(REFERENCE / family, mesh)
    with jax.set_mesh(mesh):
        ours = logits(params, model, expected["input_ids"], expected["position_ids"])
    np.testing.assert_allclose(ours, expected["logits"], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "sizes", "count"),
    [
        ("smollm3", (2048, 11008, 36, 16, 4, 128_256), 3_075_098_624),
        ("olmo2", (2048, 8192, 16, 16, 16, 100_352), 1_484_916_736),
    ],
)
def test_smollm3_3b_and_olmo2_1b_have_the_parameter_count_of_transformers(
    family: str, sizes: tuple[int, ...], count: int
) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    raw = json.loads((REFERENCE / family / "config.json").read_text())
    raw |= dict(zip((*names, "vocab_size"), sizes, strict=True), layer_types=None, no_rope_layers=None)
    assert parameter_counts(model_config(raw, "config.json"))["all"] == count


@pytest.mark.parametrize(
    "case", json.loads((REFERENCE / "rope.json").read_text()), ids=lambda case: str(case["change"])
)
def test_rotation_is_that_which_transformers_makes_of_the_same_config(case: dict[str, Any]) -> None:
    """YaRN in every form, and rope_scaling beside rope_parameters, where the former counts."""
    raw = json.loads((REFERENCE / "qwen3" / "config.json").read_text()) | {"head_dim": 32} | case["change"]
    model = model_config(raw, "config.json")
    np.testing.assert_allclose(rotary_frequencies(model), case["frequencies"], rtol=1e-6)
    cos, sin = rotation_at(jnp.arange(3)[None], model)
    np.testing.assert_allclose(jnp.sqrt(cos**2 + sin**2), np.full(cos.shape, case["magnitude"]), rtol=1e-6)


def test_yarn_stretches_the_positions_that_a_model_takes() -> None:
    raw = json.loads((REFERENCE / "qwen3_yarn" / "config.json").read_text())
    assert raw["max_position_embeddings"] == 2048 == model_config(raw, "config.json").max_positions
    raw["rope_scaling"]["original_max_position_embeddings"] = 2048
    assert model_config(raw, "config.json").max_positions == 4 * 2048


def test_layers_without_rotation_are_those_of_the_config_or_every_fourth() -> None:
    raw = json.loads((REFERENCE / "smollm3" / "config.json").read_text()) | {"num_hidden_layers": 8}
    raw["layer_types"] = raw.pop("no_rope_layers") and None
    assert model_config(raw, "config.json").unrotated_layers == (3, 7)
    assert model_config(raw | {"no_rope_layer_interval": 3}, "config.json").unrotated_layers == (2, 5)
    assert model_config(raw | {"no_rope_layers": [0] + [1] * 7}, "config.json").unrotated_layers == (0,)
    assert model_config(raw | {"model_type": "llama"}, "config.json").unrotated_layers == ()
    with pytest.raises(UserError, match="no_rope_layers"):
        model_config(raw | {"no_rope_layers": [1, 0]}, "config.json")


@pytest.mark.reference
def test_stories260k_equals_its_fixtures(shelf: Path) -> None:
    directory = shelf / "weights" / "stories260k"
    model, params = load(directory)
    for case in json.loads((directory / "fixtures.json").read_text())["cases"]:
        ids = np.array([case["input_ids"]])
        ours = logits(params, model, ids, positions(ids))[0]
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
    model = read_model_config(shelf / "configs" / name)
    counts = parameter_counts(model)
    assert counts["all"] == count
    undecayed = model.layers * 2 * model.embed + model.embed
    undecayed += model.layers * 2 * model.head if model.family == "qwen3" else 0
    undecayed += model.layers * model.head * model.kv_heads * (model.group + 2) if model.family == "qwen2" else 0
    assert counts["all"] - counts["decayed"] == undecayed


def test_packed_documents_have_the_losses_and_gradients_of_documents_alone() -> None:
    """The values are transformers', which ran every document by itself."""
    model, params = load(REFERENCE / "qwen3")
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

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = forward(params, embed(params, batch["token"], "float32"), batch["segment"], batch["position"], model)
        given = hidden, head_of(params, model), batch["target"]
        losses = token_statistics(*given, model.vocabulary_size).loss
        return summed_token_loss(*given, weight, cross_entropy, model.vocabulary_size)[0], losses

    gradients, nll = jax.jit(jax.grad(loss, has_aux=True))(params)
    packed = np.concatenate([np.asarray(nll[here]) for here in places])
    np.testing.assert_allclose(packed, expected["nll"], rtol=1e-5, atol=1e-5)
    table = parameter_table(model)
    files = {
        name: weights.file_tensor(leaf, row, number, model, np.float32)
        for row, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(gradients), strict=True)
        for number, name in enumerate(weights.file_names(row, model))
    }
    assert sorted(files) == sorted(expected["gradient_names"])
    for number, name in enumerate(expected["gradient_names"]):
        norm = expected["gradient_norms"][number]
        np.testing.assert_allclose(np.linalg.norm(files[name]), norm, rtol=1e-5)
        entries = files[name].reshape(-1)[expected["gradient_index"][number]]
        np.testing.assert_allclose(entries, expected["gradient_values"][number], rtol=1e-4, atol=1e-5 * norm)


def test_rematerialisation_changes_memory_and_not_gradients() -> None:
    model, params = load(REFERENCE / "qwen3")
    ids = jax.random.randint(jax.random.key(0), (2, 32), 0, model.vocabulary_size)
    position, segment = jnp.asarray(positions(np.asarray(ids))), jnp.ones(ids.shape, int)

    def loss(params: Any, policy: str) -> jax.Array:
        return jnp.sum(forward(params, embed(params, ids, "float32"), segment, position, model, policy) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    programs = {policy: gradient.lower(params, policy).compile() for policy in ("none", "matmuls", "layer")}
    expected = jax.tree.leaves(programs["none"](params))
    for policy in ("matmuls", "layer"):
        assert temporary_bytes(programs[policy]) < temporary_bytes(programs["none"])
        for ours, wanted in zip(jax.tree.leaves(programs[policy](params)), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


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
    product, backward = jax.vjp(jax.jit(matrix_product), *arrays[:2])
    found = (product, *backward(arrays[2]))
    for ours, wanted in zip(found, (x @ weight, gradient @ weight.T, x.T @ gradient), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, float), wanted, rtol=tolerance, atol=1e-4)


def test_initial_weights_have_their_spread_and_do_not_depend_on_other_rows() -> None:
    draw = jax.jit(initial_params, static_argnums=1)
    model = read_model_config(REFERENCE / "qwen2_untied")
    params = draw(jax.random.key(0), model)
    layers = params["layers"]
    assert np.std(layers["query"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(layers["down"]) == pytest.approx(0.02 / np.sqrt(2 * model.layers), rel=0.05)
    assert np.all(layers["attention_norm"] == 1) and np.all(layers["query_bias"] == 0)
    tied = draw(jax.random.key(0), read_model_config(REFERENCE / "qwen2"))
    np.testing.assert_array_equal(tied["embedding"], params["embedding"])


def test_initial_weights_are_the_same_on_every_mesh() -> None:
    model, mesh = read_model_config(REFERENCE / "qwen3"), mesh_of(1, 4, 2)
    shardings = jax.tree.map(lambda row: NamedSharding(mesh, partition_spec(row)), parameter_table(model))
    alone, spread = (
        jax.jit(initial_params, static_argnums=1, out_shardings=out)(jax.random.key(3), model)
        for out in (None, shardings)
    )
    for ours, wanted in zip(*map(jax.tree.leaves, (spread, alone)), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'factor' is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "'factor' = 0"),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn", "factor": 4}},
            "which alone has rope_theta = 1000000.0",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "quantised with quant_method = 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised with quant_method = 'fp8'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised with bnb_4bit_quant_type = 'fp4'",
        ),
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
        ({"num_key_value_heads": 0}, "'num_key_value_heads' = 0"),
        ({"head_dim": 0}, "'head_dim' = 0"),
        ({"num_hidden_layers": 10**30}, "'num_hidden_layers' = 1000"),
        ({"rope_theta": 10**400}, "'rope_theta' = 1000"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' = nan"),
        ({"hidden_size": 2, "head_dim": None}, "head_dim = 1 is odd"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_theta = 1.0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    raw = json.loads((REFERENCE / "llama2" / "config.json").read_text()) | change
    with pytest.raises(UserError, match="config.json: ") as refusal:
        model_config(raw, "config.json")
    assert words in str(refusal.value)


def test_rows_beyond_a_sliding_window_or_the_positions_are_refused() -> None:
    raw = json.loads((REFERENCE / "mistral" / "config.json").read_text()) | {"sliding_window": 64}
    model = model_config(raw, "config.json")
    check_sequence_length(model, 64)
    with pytest.raises(UserError, match="sliding window = 64"):
        check_sequence_length(model, 65)
    with pytest.raises(UserError, match="max_position_embeddings = 2048"):
        check_sequence_length(read_model_config(REFERENCE / "llama2"), 4096)


def test_a_window_counts_where_it_binds_a_layer() -> None:
    qwen, mistral = (json.loads((REFERENCE / name / "config.json").read_text()) for name in ("qwen2", "mistral"))
    window = {"use_sliding_window": True, "sliding_window": 64}
    for change, found in (
        ({"max_window_layers": 1}, 64), ({"max_window_layers": 2}, 0), ({"layer_types": ["full_attention"] * 2}, 0),
        ({"max_window_layers": None}, 64), ({"layer_types": ["full_attention", "sliding_attention"]}, 64),
    ):  # fmt: skip
        assert model_config(qwen | window | change, "config.json").sliding_window == found
    other = qwen | window | {"max_window_layers": 2, "model_type": "smollm3"}  # where that key says nothing
    assert model_config(other, "config.json").sliding_window == 64
    assert mistral.pop("sliding_window") is None
    assert model_config(mistral, "config.json").sliding_window == 4096  # as transformers takes a missing key


def test_other_words_for_the_same_and_a_bias_that_mistral_never_has_are_taken_as_transformers_takes_them() -> None:
    raw = json.loads((REFERENCE / "mistral" / "config.json").read_text())
    other = {"torch_dtype": "torch.float32", "hidden_act": "swish", "attention_bias": True}
    assert model_config(raw | other, "config.json") == model_config(raw, "config.json")


def test_dropout_matters_in_training_alone() -> None:
    raw = json.loads((REFERENCE / "llama2" / "config.json").read_text()) | {"attention_dropout": 0.1}
    model = model_config(raw, "config.json")
    check_sequence_length(model, 64)
    with pytest.raises(UserError, match="attention_dropout = 0.1 .* set it to 0 to train without"):
        check_trainable(model, 64)


def test_capacity_is_what_is_wanted_within_positions_and_sliding_window() -> None:
    raw = json.loads((REFERENCE / "mistral" / "config.json").read_text())
    for window, wanted, capacity in [(None, 48, 48), (None, 10**6, raw["max_position_embeddings"]), (64, 96, 64)]:
        assert model_config(raw | {"sliding_window": window}, "config.json").capacity(wanted) == capacity


# The loss


@pytest.mark.parametrize(("shape", "padding"), [((2, 7), 5), ((3, 300), 0), ((600, 2), 5)])
def test_loss_and_statistics_and_gradients_are_those_of_float64(shape: tuple[int, int], padding: int) -> None:
    """One chunk, several chunks with a remainder, and more rows than a chunk has tokens; padded vocabulary or not."""
    random = np.random.default_rng(0)
    arrays = random.normal(size=(*shape, 8)), random.normal(size=(11 + padding, 8)), random.random(shape)
    hidden, head, weight = (np.asarray(x, np.float32).astype(np.float64) for x in arrays)
    weight = np.where(random.random(shape) < 0.6, weight, 0)
    scores = np.einsum("bte,ve->btv", hidden, head[:11])
    target = np.where(random.random(shape) < 0.5, np.argmax(scores, -1), random.integers(0, 11, shape))
    probability = np.exp(scores) / np.sum(np.exp(scores), -1, keepdims=True)
    losses = -np.log(np.take_along_axis(probability, target[..., None], -1)[..., 0])
    slope = 0.7 * (probability - np.eye(11)[target]) * weight[..., None]
    expected = {
        "sum": 0.7 * np.sum(losses * weight),
        "loss": losses,
        "is_correct": np.argmax(scores, -1) == target,
        "entropy": -np.sum(probability * np.log(probability), -1),
        "hidden": np.einsum("btv,ve->bte", slope, head[:11]),
        "head": np.pad(np.einsum("btv,bte->ve", slope, hidden), ((0, padding), (0, 0))),
    }

    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, Any]:
        given = hidden, head, jnp.asarray(target), jnp.asarray(weight, jnp.float32)
        total, statistics = summed_token_loss(*given, cross_entropy, 11)
        return 0.7 * total, statistics

    given = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    (total, trained), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)
    evaluated = jax.jit(token_statistics, static_argnums=3)(*given, jnp.asarray(target), 11)
    for statistics in (trained, evaluated):
        found = statistics._asdict() | {"sum": total, "hidden": gradients[0], "head": gradients[1]}
        assert 0.2 < np.mean(found["is_correct"]) < 0.8
        for name, wanted in expected.items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_temperature_divides_float32_logits() -> None:
    random = np.random.default_rng(0)
    hidden, head = (jnp.asarray(random.normal(size=shape), "bfloat16") for shape in ((2, 5, 32), (97, 32)))
    target, weight = jnp.asarray(random.integers(0, 97, (2, 5))), jnp.asarray(random.random((2, 5)), "float32")
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 0.6
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logits, np.asarray(target)[..., None], -1)[..., 0]
    found = token_statistics(hidden, head, target, 97, 0.6).loss
    np.testing.assert_allclose(found, expected, atol=1e-5)
    loss, _ = summed_token_loss(hidden, head, target, weight, cross_entropy, 97, False, 0.6)
    np.testing.assert_allclose(loss, np.sum(expected * weight), rtol=1e-5)


def test_the_full_logits_never_exist() -> None:
    hidden, head = jax.ShapeDtypeStruct((4, 1024, 8), jnp.float32), jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    target, weight = jax.ShapeDtypeStruct((4, 1024), jnp.int32), jax.ShapeDtypeStruct((4, 1024), jnp.float32)
    gradient = jax.jit(jax.grad(lambda *x: summed_token_loss(*x, cross_entropy, 4096)[0], (0, 1)))
    temporaries = temporary_bytes(gradient.lower(hidden, head, target, weight).compile())
    assert temporaries < 0.5 * 4 * 1024 * 4096 * 4


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_the_head_is_gathered_once_for_any_number_of_chunks(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, rows = mesh_of(*shape), PartitionSpec(("data", "fsdp"))
    random, sent, found = np.random.default_rng(0), [], []
    hidden, head = random.normal(size=(8, 64, 32)), random.normal(size=(96, 32))
    target, weight = random.integers(0, 96, (8, 64)), random.random((8, 64))
    arrays = [np.asarray(x, np.int32 if x is target else np.float32) for x in (hidden, head, target, weight)]
    specs = rows, PartitionSpec("tensor", "fsdp"), rows, rows
    for chunk in (128, 16):
        monkeypatch.setattr("lacuna.model.LOSS_CHUNK", chunk)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
            gradient = jax.jit(
                jax.grad(lambda *x: summed_token_loss(*x, cross_entropy, 96)[0], (0, 1)),
                out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs[:2]),
            )
            program = gradient.lower(*placed).compile()
            found.append(program(*placed))
        large = [talk for talk in collectives(read_program(program.as_text() or ""), 8) if talk.bytes > 1024]
        sent.append(sum(talk.bytes for talk in large))
    assert sent[0] == sent[1] > 0
    logits = hidden @ head.T
    slope = np.exp(logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))) - np.eye(96)[target]
    expected = np.einsum("btv,ve,bt->bte", slope, head, weight), np.einsum("btv,bte,bt->ve", slope, hidden, weight)
    for gradients in found:
        for ours, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4)
