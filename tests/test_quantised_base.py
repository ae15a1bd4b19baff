"""Models whose layers' matrices are frozen in 8 or 4 bits: loaded, computed with, trained on and decoded from."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import chat_run, make_small, mesh_of, random_params, records
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

from lacuna import checkpoint, cli, grpo, optimizer, sampler, trainer
from lacuna.apps import evaluate, generator
from lacuna.apps.configs import MergeConfig, ServeConfig
from lacuna.apps.programs import collectives, read_program
from lacuna.config import LORA_TARGETS, EvalConfig, GrpoConfig, ModelKeys, SamplingKeys, SftConfig, UserError
from lacuna.data import Batch
from lacuna.model import (
    MATRICES,
    Lora,
    ModelConfig,
    Parameter,
    cast,
    decoding_params,
    embed,
    forward,
    head_of,
    joined,
    logits_of,
    parameter_table,
    read_model_config,
    shape_of,
)  # fmt: skip
from lacuna.quantised import Quantised, dequantised, quantise
from lacuna.weights import STATE, StoredTensor, base_of, header_facts, load_params, open_tensors, write_weights

REFERENCE = Path(__file__).parent / "reference" / "quantised"
LORA = Lora(4, 8.0, True, LORA_TARGETS)


def logits_from(directory: Path, mesh: Mesh, token: np.ndarray, **changes: Any) -> np.ndarray:
    config = replace(read_model_config(directory), **changes)
    params = load_params(directory, config, mesh)
    token = np.tile(token, (4, 1))  # rows for all devices
    position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)

    def logits(params: Any, token: jax.Array) -> jax.Array:
        computing = cast(joined(params, {"layers": {}}, config), parameter_table(config), jnp.float32)
        hidden = forward(computing, embed(computing, token, jnp.float32), jnp.ones_like(token), position, config)
        return logits_of(hidden, head_of(params, config), config.vocabulary_size)

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(logits)(params, jnp.asarray(token)))[:2]


@pytest.mark.parametrize(("family", "mesh"), [("llama3", (1, 1, 1)), ("qwen2", (2, 1, 1)), ("qwen3", (1, 4, 2))])
def test_a_model_saved_by_bitsandbytes_has_the_logits_of_its_dequantised_weights(
    family: str, mesh: tuple[int, int, int]
) -> None:
    """In NF4 with scales of 8 bits and of 32, and in 8 bits."""
    expected = np.load(REFERENCE / family / "expected.npz")
    logits = logits_from(REFERENCE / family, mesh_of(*mesh), expected["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def retouched(directory: Path, folder: Path, config: dict[str, Any], **tensors: Any) -> Path:
    """A copy of a model with other keys in its config and other tensors in its files; None drops one."""
    shutil.copytree(directory, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, folder / "model.safetensors")
    return folder


QUERY = "model.layers.1.self_attn.q_proj"
IN_EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
IN_FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("family", "config", "tensors", "words"),
    [
        ("llama3", {"quantization_config": None}, {}, "q_proj.weight: (2048, 1, 'uint8') in the files, (64, 64)"),
        ("qwen3", {"quantization_config": None}, {}, "q_proj.weight: (64, 64, 'int8') in the files, (64, 64) by"),
        (
            "llama3",
            {"quantization_config": IN_EIGHT_BITS},
            {},
            "down_proj.weight: (4096, 1, 'uint8') in the files, (64, 128, 'int8')",
        ),
        ("llama3", {"quantization_config": IN_FOUR_BITS}, {}, "weight.absmax: (64, 'uint8') in the files, (64,) by"),
        ("llama3", {}, {f"{QUERY}.weight": np.zeros((64, 64), np.float32)}, "q_proj.weight: (64, 64) in the files"),
        (
            "llama3",
            {},
            {f"{QUERY}.weight.{STATE}": np.frombuffer(b'{"blocksize": 128, "nested_blocksize": 256}', np.uint8)},
            "q_proj.weight: quant_state.bitsandbytes__nf4 has blocksize = 128",
        ),
        ("llama3", {}, {f"{QUERY}.weight.{STATE}": None}, "has blocksize = None, nested_blocksize = None"),
        (
            "qwen2",
            {},
            {f"{QUERY}.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)},
            "weight.quant_map: other",
        ),
        ("qwen3", {}, {f"{QUERY}.weight_format": np.array(1, np.uint8)}, "q_proj.weight_format is not 0"),
        ("qwen3", {}, {f"{QUERY}.SCB": None}, "q_proj.SCB: missing in the files, (64,) by config.json"),
    ],
)
def test_files_that_are_not_as_their_config_says_are_refused(
    family: str, config: dict[str, Any], tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = retouched(REFERENCE / family, tmp_path / family, config, **tensors)
    with pytest.raises(UserError) as refusal:
        load_params(folder, read_model_config(folder), mesh_of(1, 1, 1))
    assert words in str(refusal.value)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose rows are whole blocks on each of several devices."""
    directory = make_small(tmp_path_factory.mktemp("wide") / "model")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"hidden_size": 256, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 3}
    (directory / "config.json").write_text(json.dumps(raw))
    model = read_model_config(directory)
    write_weights(directory, random_params(model, 3), model, {})
    return directory


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_quantised_while_it_is_loaded_alike_on_any_devices(wide: Path, bits: int) -> None:
    model = replace(read_model_config(wide), bits=bits)
    single, spread = (load_params(wide, model, mesh_of(*mesh)) for mesh in ((1, 1, 1), (2, 2, 2)))
    tensors = open_tensors([wide / "model.safetensors"])
    for name, row in MATRICES.items():
        for layer in range(model.layers):
            dense = np.asarray(tensors[f"model.layers.{layer}.{row.file_name}"])
            wanted = jax.jit(quantise, static_argnums=(1, 2))(dense, bits, dense.shape[:1])
            for params in (single, spread):
                for leaf, expected in zip(
                    jax.tree.leaves(params["layers"][name]), jax.tree.leaves(wanted), strict=True
                ):
                    np.testing.assert_array_equal(np.asarray(leaf)[layer], expected)
    for name, spec in {"query": (None, "tensor", "fsdp"), "down": (None, "fsdp", "tensor")}.items():
        assert spread["layers"][name].codes.sharding.spec == PartitionSpec(*spec)
    token = np.arange(24, dtype=np.int32).reshape(2, 12)
    one, many = (logits_from(wide, mesh_of(*mesh), token, bits=bits) for mesh in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def test_loading_needs_no_more_than_the_model_and_one_layer(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the devices at any time, and on the host in any piece that is read."""
    model = replace(read_model_config(wide), bits=4)
    mesh, held, read = mesh_of(1, 1, 1), list[int](), list[int]()
    before = {id(array) for array in jax.live_arrays()}
    wait, read_box = jax.block_until_ready, StoredTensor.read

    def counted_wait(stack: Any) -> Any:
        held.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in before))
        return wait(stack)

    def counted_read(self: StoredTensor, box: Any) -> np.ndarray:
        values = read_box(self, box)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(jax, "block_until_ready", counted_wait)
    monkeypatch.setattr(StoredTensor, "read", counted_read)
    params = load_params(wide, model, mesh)
    sizes = {row: shape_of(row, model.sizes) for row in jax.tree.leaves(parameter_table(model))}
    one_matrix = max(4 * math.prod(shape[1:]) for row, shape in sizes.items() if row.has_layers)
    whole_rows = max(4 * math.prod(shape) for row, shape in sizes.items() if not row.has_layers)
    assert max(held) <= sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + one_matrix
    assert len(held) == 7 * model.layers and max(read) <= max(one_matrix, whole_rows)


# What a quantised base is computed with


def in_memory(row: Parameter, weight: Quantised, model: ModelConfig) -> jax.Array:
    """A stack dequantised, in the axes that the weight has in memory when it is not quantised."""
    axes = ["layer", *row.file_axes.replace("*", " ").split()]
    dense = dequantised(weight, jnp.float32).reshape([model.sizes[axis] for axis in axes])
    return jnp.transpose(dense, [axes.index(axis) for axis in row.axes.split()])


def drawn(*shape: int) -> np.ndarray:
    return 0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)


def batch_of(rows: int, length: int, vocabulary: int) -> Batch:
    token = np.random.default_rng(5).integers(0, vocabulary, (rows, length), np.int32)
    position = np.broadcast_to(np.arange(length, dtype=np.int32), token.shape)
    ones: Any = np.ones_like(token)
    arrays: Any = token, np.roll(token, -1, 1), ones.astype(np.float32), ones, position
    return Batch(*arrays)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_s_gradient_is_that_over_the_dequantised_matrices(wide: Path, bits: int) -> None:
    model = replace(read_model_config(wide), bits=bits, lora=LORA)
    frozen = load_params(wide, base_of(model), mesh_of(1, 1, 1), as_stored=True)
    dense = frozen | {"layers": dict(frozen["layers"])}
    for name, row in MATRICES.items():
        dense["layers"][name] = jax.jit(in_memory, static_argnums=(0, 2))(row, frozen["layers"][name], model)
    trained = random_params(model, 1)
    trained = jax.tree.map(lambda leaf: leaf + drawn(*leaf.shape), trained)
    batch, loss = batch_of(2, 24, model.vocabulary_size), optimizer.RowLoss("float32", "layer")

    @jax.jit
    def gradient(base: Any, trained: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda params: loss(joined(base, params, model), batch, model, lambda _, x: x)[0])(
            trained
        )

    (ours, ours_by), (wanted, wanted_by) = gradient(frozen, trained, batch), gradient(dense, trained, batch)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    for leaf, expected in zip(jax.tree.leaves(ours_by), jax.tree.leaves(wanted_by), strict=True):
        assert float(jnp.linalg.norm(leaf - expected)) <= 1e-5 * float(jnp.linalg.norm(expected))


def compiled_step(model: ModelConfig, mesh: Mesh) -> Any:
    state, frozen = optimizer.abstract_state(model, mesh), checkpoint.abstract_frozen(model, mesh)
    batch = jax.tree.map(lambda leaf: leaf[None], batch_of(mesh.shape["fsdp"], 16, 160))
    recipe = optimizer.recipe_of(SftConfig(model_name="x", run_name="x", data=({"path": "x"},), learning_rate=1.0), 2)
    loss = optimizer.RowLoss("bfloat16", "layer")
    return optimizer.train_step.lower(state, batch, np.float32(1), recipe, model, loss, None, frozen).compile()


def test_devices_send_each_other_codes_and_not_the_matrices(wide: Path) -> None:
    """In a step that gathers every matrix three times: forward, recomputed, and backward."""
    mesh, bits = mesh_of(1, 8, 1), (4, 0)
    models = (replace(read_model_config(wide), embed=512, feedforward=1536, bits=each, lora=LORA) for each in bits)
    with jax.set_mesh(mesh):
        programs = [read_program(compiled_step(model, mesh).as_text()) for model in models]
    quantised, dense = (
        sum(talk.bytes for talk in collectives(program, 8) if talk.kind == "all-gather") for program in programs
    )
    assert quantised < dense / 2


def test_neither_a_step_nor_decoding_holds_more_than_a_layer_s_matrices_dequantised(wide: Path) -> None:
    """With more layers the temporaries grow by less than an eighth of what a layer's matrices take in 16 bits."""
    mesh = mesh_of(1, 1, 1)
    tall = replace(read_model_config(wide), embed=512, feedforward=1536, bits=4, lora=LORA)

    def growth(temporaries: Any) -> float:
        few, many = (temporaries(replace(tall, layers=layers)) for layers in (2, 6))
        return (many - few) / 4

    def of_step(model: ModelConfig) -> int:
        return compiled_step(model, mesh).memory_analysis().temp_size_in_bytes

    def of_decoding(model: ModelConfig) -> int:
        params = joined(checkpoint.abstract_frozen(model, mesh), checkpoint.abstract_params(model, mesh), model)
        params = jax.eval_shape(lambda params: decoding_params(params, model, jnp.bfloat16), params)
        slots = jax.eval_shape(lambda: sampler.empty_slots(model, 2, 1, "bfloat16"))
        rules = sampler.stacked([sampler.rules_of(sampler.Request((0,)), 0, capacity=1)] * 2)
        arguments = params, slots, rules, None, np.ones(2, bool), np.int32(1), np.int32(1), model
        block: Any = sampler.decode_block.lower(*arguments).compile()
        return block.memory_analysis().temp_size_in_bytes

    matrices = sum(2 * math.prod(shape_of(row, replace(tall, layers=1).sizes)) for row in MATRICES.values())
    with jax.set_mesh(mesh):
        assert growth(of_step) < matrices / 8
        assert growth(of_decoding) < matrices / 8


# Runs


def run_of(wide: Path, folder: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "model_name": str(wide), "from_scratch": False, "output_dir": str(folder), "sequence_length": 128, "epochs": 0,
        "steps": 4, "lora_rank": 4, "base_bits": 4,
    }  # fmt: skip
    return chat_run(wide, **settings | changes)


def opened(config: ModelKeys) -> checkpoint.OpenedModel:
    return checkpoint.open_model(config, mesh_of(1, 1, 1))


def params_of(config: ModelKeys) -> Any:
    return checkpoint.opened_params(opened(config))


def assert_equal(ours: Any, expected: Any) -> None:
    for leaf, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (trainer, grpo):
        monkeypatch.setattr(room, "make_mesh", lambda *_: mesh_of(1, 1, 1))


def test_a_run_on_a_quantised_base_resumes_bit_for_bit_and_its_adapter_knows_the_bits(
    wide: Path, tmp_path: Path, one_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_of(wide, tmp_path, save_every=2)
    cli.run(whole)
    parts = whole.model_copy(update={"run_name": "parts", "resume": True})
    shutil.copytree(whole.run_directory, parts.run_directory)
    shutil.rmtree(parts.run_directory / "checkpoints" / "step_00000004")
    cli.run(parts)
    assert outcome_of_adapter(parts) == outcome_of_adapter(whole)
    adapter = whole.run_directory / "model"
    assert header_facts(adapter / "adapter_model.safetensors")[checkpoint.BITS] == "4"
    for name in (adapter, whole.run_directory / "checkpoints" / "step_00000004"):
        assert (
            opened(ModelKeys(model_name=str(name))).model.held == ", its matrices in 4 bits, with an adapter of rank 4"
        )
        assert opened(ModelKeys(model_name=str(name), base_bits=16)).model.bits == 0
    assert_equal(params_of(ModelKeys(model_name=str(adapter))), params_of(ModelKeys(model_name=str(name))))
    with pytest.raises(UserError, match="trained on a base of 4 bits, and this server's has 16"):
        generator.adapter_of(opened(ModelKeys(model_name=str(wide))), str(adapter), 0)
    for bits in (4, 16):
        generator.adapter_of(opened(ModelKeys(model_name=str(wide), base_bits=bits)), str(adapter), bits)
    cli.run(MergeConfig(model_name=str(adapter), output=str(tmp_path / "merged")))
    line = capsys.readouterr().out.splitlines()[-1]
    near, far = (float(number) for number in re.findall(r"(\S+) merged onto", line))
    assert near < 1e-4 < 1e-2 < far and line.index("dequantised") < line.index("original")


def outcome_of_adapter(config: SftConfig) -> tuple[list[Any], bytes]:
    losses = [(record["step"], record["loss"], record["gradient_norm"]) for record in records(config)]
    return losses, (config.run_directory / "model" / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_of_a_run_is_quantised_as_its_export_is(small_run: SftConfig) -> None:
    directory = small_run.run_directory
    names = directory / "model", directory / "checkpoints" / "step_00000001"
    exported, saved = (params_of(ModelKeys(model_name=str(name), base_bits=8)) for name in names)
    assert isinstance(saved["layers"]["down"].base, Quantised)
    assert_equal(saved, exported)


@pytest.fixture
def small_run(wide: Path, tmp_path: Path, one_device: None) -> SftConfig:
    config = run_of(wide, tmp_path, steps=1, lora_rank=0, base_bits=0)
    cli.run(config)
    return config


def test_eval_and_serve_take_the_base_in_four_bits_as_a_model_of_its_dequantised_weights(
    wide: Path, tmp_path: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (evaluate, generator):
        monkeypatch.setattr(room, "make_mesh", lambda *_: mesh_of(1, 1, 1))
    model = read_model_config(wide)
    quantised = load_params(wide, replace(model, bits=4), mesh_of(1, 1, 1))
    layers = {
        name: in_memory(MATRICES[name], leaf, model) if name in MATRICES else leaf
        for name, leaf in quantised["layers"].items()
    }
    checkpoint.save_model(tmp_path / "dense", quantised | {"layers": layers}, model, wide)
    source, found = {"path": str(wide / "heldout.jsonl"), "split": "train[:20]"}, {}
    for name, bits in ((tmp_path / "dense", 0), (wide, 4)):
        shared: dict[str, Any] = {"model_name": str(name), "base_bits": bits, "compute_dtype": "float32"}
        run = {"output_dir": str(tmp_path), "run_name": f"eval_{bits}", "sequence_length": 256, "batch_size": 4}
        cli.run(EvalConfig(data=(source,), **shared | run))
        summary = json.loads((tmp_path / f"eval_{bits}" / "summary.json").read_text())
        assert (summary["base"], summary["base_bits"], summary["adapter"]) == (str(name), bits or None, None)
        serving = generator.load_generator(ServeConfig(capacity=128, **shared), 2).sampler
        rules = SamplingKeys(temperature=0.0, max_tokens=9)
        answers = serving.generate([sampler.Request(prompt, rules) for prompt in ((5, 9, 33), (40, 2))])
        found[bits] = summary["eval_loss"], [answer.tokens for answer in answers]
    assert found[4][0] == pytest.approx(found[0][0], rel=1e-6) and found[4][1] == found[0][1]


@pytest.mark.parametrize(
    ("family", "bits", "words"),
    [("llama3", 8, "base_bits = 8, but .* holds weights of 4 bits"), ("qwen3", 16, "base_bits = 16, but .* of 8 bits")],
)
def test_other_bits_than_a_file_has_are_refused(family: str, bits: int, words: str) -> None:
    place = checkpoint.at(REFERENCE / family)
    config = ModelKeys(model_name=str(REFERENCE / family), base_bits=bits)
    with pytest.raises(UserError, match=words):
        checkpoint.model_on(place, config, mesh_of(1, 1, 1))


def test_quantised_weights_alone_do_not_train(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights of 4 bits do not train; set lora_rank"):
        cli.run(run_of(wide, tmp_path, lora_rank=0))
    assert not (tmp_path / "run").exists()


def test_reinforcement_on_a_quantised_base_samples_from_what_it_trains(
    wide: Path, tmp_path: Path, one_device: None
) -> None:
    rewards = tmp_path / "vowels.py"
    rewards.write_text(
        "def vowels(prompt, completion, row):\n    return sum(letter in 'aeiou' for letter in completion) / 9\n"
    )
    config = GrpoConfig(
        model_name=str(wide), run_name="run", output_dir=str(tmp_path), data=({"path": str(wide / "heldout.jsonl")},),
        sequence_length=160, prompts_per_step=4, completions_per_prompt=4, max_completion_tokens=9, slots=16, steps=3,
        compute_dtype="float32", learning_rate=1e-2, reward=(f"{rewards}:vowels",), mask_truncated=False, lora_rank=4,
        base_bits=4, kl_weight=0.01,
    )  # fmt: skip
    cli.run(config)
    logged = records(config)
    assert max(record["logprob_difference_max"] for record in logged) <= 1e-5
    assert logged[0]["kl"] == 0 < logged[-1]["kl"] and logged[-1]["gradient_norm"] > 0
