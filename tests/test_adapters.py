"""Adapters: what they compute, cost, save and export, and runs that train them."""

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from conftest import REFERENCE, assert_trees_close, chat_run, make_small, mesh_of, random_params, records
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from test_peft import ADAPTERS, FAMILIES
from test_serve import serving
from test_trainer import ROW_LOSS, config, loss_and_gradient, random_batch, sized

from lacuna import checkpoint, cli, grpo, objective, optimizer, sampler, trainer, weights
from lacuna.apps import evaluate, generator
from lacuna.apps.configs import ConvertConfig, MergeConfig, ServeConfig
from lacuna.apps.convert import merged_params
from lacuna.config import LORA_TARGETS, EvalConfig, GrpoConfig, ModelKeys, SamplingKeys, SftConfig, UserError
from lacuna.distributed import put_batch
from lacuna.linear import Frozen, linear
from lacuna.metrics import step_flops
from lacuna.model import (
    MATRICES,
    Lora,
    ModelConfig,
    cross_entropy,
    embed,
    forward,
    head_of,
    joined,
    logits_of,
    parameter_counts,
    read_model_config,
    summed_token_loss,
)

LORA = Lora(3, 6.0, True, LORA_TARGETS)


def opened_adapter(family: str, name: str) -> tuple[ModelConfig, Any, Any]:
    """The model, the frozen weights and the adapter of a reference that peft made."""
    stated: dict[str, Any] = {"lora": weights.read_lora(ADAPTERS / family / name)}
    stated |= {"trained_rows": weights.read_trained_rows(ADAPTERS / family / name)}
    model = replace(read_model_config(REFERENCE / family), **stated)
    mesh = mesh_of(1, 1, 1)
    frozen = weights.load_params(REFERENCE / family, weights.base_of(model), mesh, as_stored=True)
    return model, frozen, weights.load_params(ADAPTERS / family / name, model, mesh)


@partial(jax.jit, static_argnums=1)
def logits(params: Any, model: ModelConfig, ids: Any) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones_like(ids), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)


# What they compute


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_a_new_adapter_changes_no_bit(family: str) -> None:
    model = replace(read_model_config(REFERENCE / family), lora=LORA)
    frozen = weights.load_params(REFERENCE / family, weights.base_of(model), mesh_of(1, 1, 1), as_stored=True)
    trained = random_params(model)
    ids = np.arange(12).reshape(2, 6)
    with_adapter, without = (logits(params, model, ids) for params in (joined(frozen, trained, model), frozen))
    np.testing.assert_array_equal(with_adapter, without)
    for pair in trained["layers"].values():
        assert not pair["b"].any() and 0 < jnp.abs(pair["a"]).max() <= np.prod(pair["a"].shape[1:-1]) ** -0.5


def test_the_gradient_is_that_of_the_whole_matrix_by_the_chain_rule() -> None:
    """Of W + s · a · b the gradient G gives s · G · bᵀ for a, and s · aᵀ · G for b."""
    model, frozen, trained = opened_adapter("qwen3", "all_linear")
    batch = random_batch(0, 2, 2, 16, model.vocabulary_size)
    loss, found = loss_and_gradient(trained, batch, model, frozen=frozen)
    scale, plain = model.lora.scale if model.lora else 0, replace(model, lora=None)
    whole = dict(frozen["layers"])
    for name, pair in trained["layers"].items():
        product = flat(pair["a"], -1) @ flat(pair["b"], 2)
        whole[name] = whole[name] + scale * product.reshape(whole[name].shape)
    expected_loss, gradient = loss_and_gradient(frozen | {"layers": whole}, batch, plain)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, pair in trained["layers"].items():
        a, b = flat(pair["a"], -1), flat(pair["b"], 2)
        of_matrix = gradient["layers"][name].reshape(len(a), a.shape[1], b.shape[2])
        expected = {"a": scale * of_matrix @ b.mT, "b": scale * a.mT @ of_matrix}
        for factor in ("a", "b"):
            ours = found["layers"][name][factor].reshape(expected[factor].shape)
            np.testing.assert_allclose(ours, expected[factor], rtol=1e-4, atol=1e-6, err_msg=f"{name} {factor}")


def flat(factor: Any, split: int) -> Any:
    """A factor with its inputs, or its outputs from axis `split` on, as one axis."""
    sizes = factor.shape
    return factor.reshape((sizes[0], -1, sizes[-1]) if split == -1 else (*sizes[:2], -1))


def test_each_row_may_have_an_adapter_of_its_own() -> None:
    random = np.random.default_rng(0)
    x, base, a, b = (random.standard_normal(shape) for shape in ((3, 5, 4, 2), (4, 2, 6), (3, 4, 2, 7), (3, 7, 6)))
    found = linear(jnp.asarray(x), Frozen(jnp.asarray(base), jnp.asarray(a), jnp.asarray(b), is_by_row=True))
    flat_x = x.reshape(3, 5, 8)
    expected = flat_x @ base.reshape(8, 6) + flat_x @ a.reshape(3, 8, 7) @ b
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sharded_equals_single_and_micro_batches_add_up() -> None:
    model, frozen, trained = opened_adapter("qwen3", "all_linear")
    batch = random_batch(1, 4, 2, 16, model.vocabulary_size)
    loss, gradient = loss_and_gradient(trained, batch, model, frozen=frozen)
    together = jax.tree.map(lambda leaf: leaf.reshape(1, 8, 16), batch)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        parted = checkpoint.abstract_params(replace(model, lora=None), mesh), checkpoint.abstract_params(model, mesh)
        placed = [
            jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), tree, like)
            for tree, like in zip((frozen, trained), parted, strict=True)
        ]
        other = loss_and_gradient(placed[1], put_batch(together, mesh), model, frozen=placed[0])
    np.testing.assert_allclose(other[0], loss, rtol=1e-6)
    assert_trees_close(other[1], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "llama2"])
def test_rows_apart_have_the_loss_and_the_gradient_of_the_whole_table(family: str) -> None:
    """Of a tied embedding and of two tables, on one device and on eight; the rows lie in no order."""
    model, frozen, trained = opened_adapter(family, "new_tokens")
    ids = np.array([159, 3, 150])
    model = replace(model, trained_rows=tuple((name, tuple(ids.tolist())) for name, _ in model.trained_rows))
    batch = random_batch(2, 2, 4, 16, model.vocabulary_size)
    whole, plain = dict(frozen), replace(model, lora=None, trained_rows=())
    for name, _ in model.trained_rows:
        whole[name] = frozen[name].at[ids].set(trained[name])
    bare = jax.tree.map(jnp.zeros_like, trained["layers"])
    expected_loss, expected = loss_and_gradient(whole, batch, plain)
    mesh, apart = mesh_of(2, 2, 2), trained | {"layers": bare}
    loss, found = loss_and_gradient(apart, batch, model, frozen=frozen)
    with jax.set_mesh(mesh):
        like = checkpoint.abstract_params(weights.base_of(model), mesh), checkpoint.abstract_params(model, mesh)
        placed = [
            jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), tree, shapes)
            for tree, shapes in zip((frozen, apart), like, strict=True)
        ]
        parted = loss_and_gradient(placed[1], put_batch(batch, mesh), model, frozen=placed[0])
    for ours in ((loss, found), parted):
        np.testing.assert_allclose(ours[0], expected_loss, rtol=1e-6)
        for name, _ in model.trained_rows:
            np.testing.assert_allclose(ours[1][name], expected[name][ids], rtol=1e-4, atol=1e-6)
    assert family == "qwen3" or "head" in found


# What they cost


def test_flops_of_a_frozen_base_are_two_thirds() -> None:
    model = replace(read_model_config(REFERENCE / "qwen3"), lora=LORA)
    counts, plain = parameter_counts(model), parameter_counts(replace(model, lora=None))
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(random_params(model))]
    assert counts["trained"] == counts["decayed"] == sum(sizes) and counts["all"] == plain["all"] == plain["trained"]
    tokens, lengths = 20, np.array([8, 12])
    products = step_flops(counts["matmul"], counts["trained_matmul"], 0, 1, lengths)
    assert products == tokens * (4 * plain["matmul"] + 6 * sum(sizes))


@pytest.mark.parametrize(("stored", "vocabulary"), [("float32", 0), ("bfloat16", 20_000)])
def test_a_step_holds_no_more_than_a_pass_over_the_base_the_adapter_its_gradient_and_its_moments(
    stored: str, vocabulary: int
) -> None:
    """With layers recomputed: what else the backward pass keeps are the inputs of each matrix with an adapter. And with
    rows of words apart from a vocabulary of which a copy would be seen."""
    plain = sized(hidden_size=128, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, head_dim=32)
    model, mesh = replace(plain, file_dtype=stored, lora=Lora(4, 16.0, True, LORA_TARGETS)), mesh_of(1, 1, 1)
    if vocabulary:
        sizes = {"vocabulary_size": vocabulary, "padded_vocabulary": vocabulary}
        model = replace(model, trained_rows=(("embedding", (7, 5, vocabulary - 1)),), **sizes)
    batch = random_batch(0, 1, 1, 8, model.vocabulary_size)
    loss = ROW_LOSS._replace(rematerialisation="layer")

    def over_the_base(frozen: Any, noise: Any, batch: Any) -> Any:
        """The loss and the gradient of its inputs, which runs backward through every layer."""
        bare = {name: Frozen(frozen["layers"][name]) for name in MATRICES}
        params = frozen | {"layers": frozen["layers"] | bare}

        def loss_of(noise: Any) -> Any:
            x = embed(params, batch.token, "float32") + noise
            hidden = forward(params, x, batch.segment, batch.position, model, "layer")
            weighted = batch.target, batch.weight, cross_entropy, model.vocabulary_size
            return summed_token_loss(hidden, head_of(params, model), *weighted)[0]

        return jax.value_and_grad(loss_of)(noise)

    with jax.set_mesh(mesh):
        frozen, state = checkpoint.abstract_frozen(model, mesh), optimizer.abstract_state(model, mesh)
        recipe = optimizer.recipe_of(config(), 50)
        step = optimizer.train_step.lower(state, batch, np.float32(1), recipe, model, loss, None, frozen)
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        noise = jax.ShapeDtypeStruct((1, 8, model.embed), jnp.float32)
        reference = jax.jit(over_the_base).lower(frozen, noise, one)
        with_adapters, without = held_bytes(step), held_bytes(reference)
    adapter, base = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (state.params, frozen))
    assert base > 10 * adapter  # so that a copy of the base, or of a layer's part for each adapter, would be seen
    assert with_adapters - without < 4 * adapter + 0.01 * without
    head = 4 * vocabulary * model.embed  # in float32
    assert without < (1.5 if stored == "float32" else 2.5) * base + head  # a CPU copies bfloat16 once, as integers


def held_bytes(lowered: Any) -> int:
    as_users_have_it = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    memory = lowered.compile(as_users_have_it).memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


# In and out


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama2", "all_linear"), ("qwen2", "query_value"), ("llama2", "new_tokens"), ("qwen3", "new_tokens")],
)
def test_what_is_exported_is_what_peft_wrote(family: str, name: str, tmp_path: Path) -> None:
    source, (model, _, trained) = ADAPTERS / family / name, opened_adapter(family, name)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / weights.ADAPTER).write_text(weights.adapter_config(model, "acme/base@" + "1" * 40))
    (tmp_path / "out").mkdir()
    weights.write_weights(tmp_path / "out", trained, model, {"base_sha256": "abc"})
    ours, theirs = (load_file(path / weights.ADAPTER_WEIGHTS) for path in (tmp_path / "out", source))
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        np.testing.assert_array_equal(values, theirs[key])
    assert weights.header_facts(tmp_path / "out" / weights.ADAPTER_WEIGHTS)["base_sha256"] == "abc"
    assert weights.read_lora(tmp_path / "config") == weights.read_lora(source) == model.lora
    written, read = (json.loads((path / weights.ADAPTER).read_text()) for path in (tmp_path / "config", source))
    assert written["base_model_name_or_path"] == "acme/base" and written["revision"] == "1" * 40
    assert written["trainable_token_indices"] == read["trainable_token_indices"]
    assert written.keys() <= read.keys()


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "all_linear") for family in FAMILIES), ("qwen3", "new_tokens"), ("llama2", "new_tokens")],
)
def test_merged_equals_adapter_on(family: str, name: str, tmp_path: Path) -> None:
    model, frozen, trained = opened_adapter(family, name)
    named = ModelKeys(model_name=str(ADAPTERS / family / name), base_name=str(REFERENCE / family))
    place, plain, mesh = checkpoint.find_model(named), weights.base_of(model), mesh_of(1, 1, 1)
    weights.write_weights(tmp_path, merged_params(place, model), plain, {})
    merged, ids = weights.load_params(tmp_path, plain, mesh), np.arange(148, 160).reshape(2, 6)
    np.testing.assert_allclose(
        logits(merged, plain, ids), logits(joined(frozen, trained, model), model, ids), atol=1e-5, rtol=1e-5
    )


# Runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    directory = make_small(tmp_path_factory.mktemp("base") / "small")
    model = read_model_config(directory)
    params = random_params(model, 5)
    weights.write_weights(directory, params, model, {})
    return directory


def adapter_run(base: Path, **changes: Any) -> SftConfig:
    settings = {"from_scratch": False, "lora_rank": 4, "learning_rate": 1e-2, "steps": 6, "epochs": 1}
    return chat_run(base, **settings | {"eval_every": 3, "save_every": 2, "keep": 9} | changes)


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SftConfig:
    """A run of six steps."""
    config = adapter_run(base, run_name="adapted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda *_: mesh_of(1, 1, 1))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cli.run(config)
    return config


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (trainer, evaluate, generator, grpo):
        monkeypatch.setattr(room, "make_mesh", lambda *_: mesh_of(1, 1, 1))


def test_a_run_saves_the_adapter_and_its_moments_alone_and_exports_it(adapted: SftConfig) -> None:
    directory, losses = adapted.run_directory, [record["loss"] for record in records(adapted)]
    assert losses[-1] < losses[0] - 0.1
    opened = checkpoint.open_model(ModelKeys(model_name=str(directory)), mesh_of(1, 1, 1))
    size = 4 * parameter_counts(opened.model)["trained"]
    for step in checkpoint.saved_steps(directory):
        file = checkpoint.shard_path(checkpoint.checkpoint_directory(directory, step), 0)
        assert 3 * size < file.stat().st_size < 3.2 * size + 20_000
    assert {path.name for path in (directory / "model").glob("*")} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    exported = weights.load_params(directory / "model", opened.model, opened.mesh)
    last = checkpoint.open_model(ModelKeys(model_name=str(directory / "checkpoints/step_00000006")), mesh_of(1, 2, 2))
    assert_trees_close(exported, checkpoint.trained_params(last), 0, 0)
    cli.run(ConvertConfig(model_name=str(directory / "best"), to="peft", output=str(directory.parent / "exported")))
    assert weights.read_lora(directory.parent / "exported") == opened.model.lora


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(adapted: SftConfig, one_device: None) -> None:
    cut = adapted.model_copy(update={"run_name": "cut", "resume": True})
    for name in ("config.toml", "metrics.jsonl", "source", "checkpoints/step_00000002"):
        source, target = adapted.run_directory / name, cut.run_directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    cli.run(cut)
    whole, again = ((each.run_directory / "model" / weights.ADAPTER_WEIGHTS) for each in (adapted, cut))
    assert whole.read_bytes() == again.read_bytes()
    figures = [[(record["loss"], record["gradient_norm"]) for record in records(each)] for each in (adapted, cut)]
    assert figures[0] == figures[1]


def test_a_run_and_what_is_merged_of_it_are_measured_alike(adapted: SftConfig, one_device: None) -> None:
    directory, output = adapted.run_directory, str(adapted.run_directory.parent)
    cli.run(MergeConfig(model_name=str(directory), output=f"{output}/merged"))
    (source,) = adapted.eval_data
    shared: dict[str, Any] = {"data": (source,), "output_dir": output, "sequence_length": 256}
    for name in ("adapted", "merged"):
        cli.run(EvalConfig(model_name=f"{output}/{name}", run_name=f"{name}_eval", **shared))
        summary = json.loads((Path(output) / f"{name}_eval" / "summary.json").read_text())
        assert summary["eval_loss"] == pytest.approx(records(adapted)[-1]["eval_loss"], rel=1e-6)
    assert not (Path(output) / "merged" / weights.ADAPTER).exists()


def test_a_base_that_changed_is_refused_by_name(adapted: SftConfig, base: Path, tmp_path: Path) -> None:
    other, mesh = Path(shutil.copytree(base, tmp_path / "other")), mesh_of(1, 1, 1)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, other / "model.safetensors")
    for name in ("model", "checkpoints/step_00000004"):
        keys = ModelKeys(model_name=str(adapted.run_directory / name), base_name=str(other))
        with pytest.raises(UserError, match=f"{other}: not the weights that the adapter .* was trained on"):
            checkpoint.opened_params(checkpoint.open_model(keys, mesh))
    run = trainer.Run(adapted.model_copy(update={"resume": True}), lambda _: None)
    run.inputs = {checkpoint.BASE: "another"}
    opened = checkpoint.open_model(checkpoint.settled(adapted), mesh)
    with pytest.raises(UserError, match="the weights under the adapter: its content has changed"):
        run.check_unchanged(opened, run.resumed[1].run.data if run.resumed else ())


def test_training_goes_on_from_an_adapter_of_its_own_shape(adapted: SftConfig) -> None:
    name = str(adapted.run_directory)
    keys: dict[str, Any] = {**adapted.model_dump(exclude_unset=True), "model_name": name, "run_name": "more"}
    keys = {key: value for key, value in keys.items() if not key.startswith("lora")}
    config = checkpoint.settled(SftConfig(**keys))
    assert (config.lora_rank, config.lora_scaling) == (4, "stabilised")
    opened = checkpoint.open_model(config, mesh_of(1, 1, 1))
    state = optimizer.starting_state(config, opened)
    assert_trees_close(state.params, checkpoint.trained_params(opened), 0, 0)
    assert all(pair["b"].any() for pair in state.params["layers"].values())
    with pytest.raises(UserError, match="lora_rank = 8, but .* is an adapter with 4"):
        checkpoint.settled(SftConfig(**keys, lora_rank=8))
    with pytest.raises(UserError, match="from_scratch = true, but .* is an adapter"):
        checkpoint.settled(SftConfig(**keys | {"from_scratch": True}))


@pytest.mark.parametrize("key", [{"lora_alpha": 32.0}, {"lora_targets": ("q_proj",)}, {"lora_scaling": "plain"}])
def test_a_key_of_adapters_where_none_trains_is_refused(base: Path, key: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(key))} = .* none trains while lora_rank is 0"):
        checkpoint.settled(adapter_run(base, lora_rank=0, **key))
    checkpoint.settled(adapter_run(base, lora_rank=2, **key))


def test_what_names_no_base_or_an_adapter_as_base_is_refused(adapted: SftConfig, base: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(adapted.run_directory / "model", tmp_path / "adapter"))
    stated = json.loads((directory / weights.ADAPTER).read_text())
    for name, words in (
        (None, "names no base_model_name"),
        ("", "add --base-name"),
        ("gone/gone", "its base:"),
    ):
        (directory / weights.ADAPTER).write_text(json.dumps(stated | {"base_model_name_or_path": name}))
        with pytest.raises(UserError, match=words):
            checkpoint.find_model(ModelKeys(model_name=str(directory)), with_weights=False)
    with pytest.raises(UserError, match="is an adapter, and so is its base"):
        checkpoint.find_model(ModelKeys(model_name=str(directory), base_name=str(adapted.run_directory)))
    (directory / weights.ADAPTER).write_text(json.dumps(stated))
    (directory / weights.ADAPTER_WEIGHTS).write_bytes((directory / weights.ADAPTER_WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match="adapter_model.safetensors: damaged"):
        checkpoint.opened_params(checkpoint.open_model(ModelKeys(model_name=str(directory)), mesh_of(1, 1, 1)))
    other = replace(read_model_config(base), feedforward=32)
    with pytest.raises(UserError, match=f"{base}: the weights do not fit config.json"):  # that of the base
        weights.checked_tensors(base, other)
    with pytest.raises(UserError, match="base_name = 'x', but .* is no adapter"):
        checkpoint.find_model(ModelKeys(model_name=str(base), base_name="x"))
    with pytest.raises(UserError, match="is no adapter, so there is nothing to merge"):
        cli.run(MergeConfig(model_name=str(base), output=str(tmp_path / "out")))


def test_a_base_is_hashed_once_and_shown_while_it_is_loaded(
    adapted: SftConfig, base: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where training goes on from an adapter, and by a server of two adapters of it."""
    hashed, shown, usual = list[str](), io.StringIO(), weights.file_hash
    monkeypatch.setattr(weights, "file_hash", lambda path: hashed.append(path.name) or usual(path))
    monkeypatch.setattr(weights, "progress", lambda: Progress(console=Console(file=shown, force_terminal=True)))
    weights.digest_of.cache_clear()
    keys = adapted.model_dump(exclude_unset=True) | {"model_name": str(adapted.run_directory), "run_name": "hashed"}
    keys = {key: value for key, value in keys.items() if not key.startswith("lora")} | {"steps": 1, "eval_every": 0}
    cli.run(SftConfig(**keys))
    assert hashed == ["model.safetensors"]
    opened = checkpoint.open_model(ModelKeys(model_name=str(base)), mesh_of(1, 1, 1))
    for name in (adapted.run_directory, Path(adapted.output_dir) / "hashed"):
        generator.adapter_of(opened, str(name), 0)
    assert hashed == ["model.safetensors"]
    assert "Hashing weights" in shown.getvalue() and "Loading weights" in shown.getvalue()


def test_what_can_be_no_adapter_is_refused_before_anything_is_read(
    adapted: SftConfig, base: Path, tmp_path: Path, one_device: None
) -> None:
    with pytest.raises(UserError, match="lora_rank = 40, but q_proj has a side of 32|lora_rank = 40, but .* of 32"):
        checkpoint.open_model(adapter_run(base, lora_rank=40), mesh_of(1, 1, 1))
    directory = Path(shutil.copytree(adapted.run_directory / "model", tmp_path / "adapter"))
    stated = json.loads((directory / weights.ADAPTER).read_text())
    (directory / weights.ADAPTER).write_text(json.dumps(stated | {"lora_dropout": 0.05}))
    config = checkpoint.settled(SftConfig(model_name=str(directory), run_name="x", data=adapted.data))
    lines = trainer.model_lines(config, checkpoint.open_model(config, mesh_of(1, 1, 1)))
    assert any(line.startswith("lora_dropout = 0.05 of") for line in lines)
    (directory / weights.ADAPTER).write_text(json.dumps(stated | {"r": 0}))
    with pytest.raises(UserError, match="r = 0, so the adapter changes nothing"):
        weights.read_lora(directory)
    (directory / weights.ADAPTER).write_text(json.dumps(stated | {"trainable_token_indices": [3, 3]}))
    with pytest.raises(UserError, match="trainable_token_indices = .* there twice"):
        weights.read_trained_rows(directory)
    (directory / weights.ADAPTER).write_text(json.dumps(stated))
    (directory / weights.ADAPTER_WEIGHTS).unlink()
    missing = EvalConfig(model_name=str(directory), data=({"path": "not_read"},), output_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"but no {weights.ADAPTER_WEIGHTS}; save the adapter again"):
        cli.run(missing)


def test_a_merge_needs_no_tokenizer_and_leaves_nothing_where_it_is_interrupted(
    adapted: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(adapted.run_directory / "model", tmp_path / "adapter"))
    (directory / "tokenizer.json").unlink()
    base = Path(shutil.copytree(adapted.model_name, tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    merge = MergeConfig(model_name=str(directory), base_name=str(base), output=str(tmp_path / "out" / "merged"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "file_tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.run(merge)
    assert list((tmp_path / "out").iterdir()) == []
    cli.run(merge)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


# New words


WORDS = ("<a_1>", "<b_2>", "<|im_end|>", "<c_3>")


@pytest.fixture(scope="module")
def worded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SftConfig:
    """A run of four steps on a base of 8 bits, with three new words and a token that is there, in two parts."""
    words = tmp_path_factory.mktemp("words") / "words.txt"
    words.write_text("".join(f"{word}\n" for word in WORDS))
    rows = [{"prompt": f"{n} <a_1>\n", "completion": "<b_2><c_3>\n"} for n in range(16)]
    (words.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(words.parent / "rows.jsonl"), "prompt_format": "text", "encode_apart": True}
    shared: dict[str, Any] = {"new_tokens": str(words), "data": (source,), "eval_data": (), "eval_every": 0, "steps": 4}
    config = adapter_run(base, run_name="worded", batch_size=4, base_bits=8, **shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda *_: mesh_of(1, 1, 1))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cli.run(config)
    return config


def test_rows_of_words_train_beside_an_adapter_and_nothing_else_of_the_vocabulary(
    worded: SftConfig, base: Path, tmp_path: Path, one_device: None
) -> None:
    directory, losses = worded.run_directory, [record["loss"] for record in records(worded)]
    assert losses[-1] < losses[0] - 0.1
    opened = checkpoint.open_model(ModelKeys(model_name=str(directory)), mesh_of(1, 1, 1))
    old, model = read_model_config(base).vocabulary_size, opened.model
    end = opened.tokenizer.backend.token_to_id("<|im_end|>") or 0
    assert model.trained_rows == (("embedding", (end, old, old + 1, old + 2)),) and model.bits == 8
    assert [opened.tokenizer.backend.token_to_id(word) for word in WORDS] == [old, old + 1, end, old + 2]
    stated = json.loads((directory / "model" / weights.ADAPTER).read_text())
    assert stated["trainable_token_indices"] == [end, old, old + 1, old + 2]
    exported = load_file(directory / "model" / weights.ADAPTER_WEIGHTS)
    assert exported["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"].shape == (
        4,
        model.embed,
    )
    size = 4 * parameter_counts(model)["trained"]
    assert size == sum(tensor.nbytes for tensor in exported.values())
    file = checkpoint.shard_path(checkpoint.checkpoint_directory(directory, 4), 0)
    assert 3 * size < file.stat().st_size < 3.2 * size + 20_000
    cli.run(MergeConfig(model_name=str(directory), output=str(tmp_path / "merged")))
    before, after = (weights.model_tensors(place) for place in (base, tmp_path / "merged"))
    was, now = (np.asarray(tensors["model.embed_tokens.weight"]) for tensors in (before, after))
    kept = np.delete(np.arange(old), end)
    np.testing.assert_array_equal(now[kept], was[kept])
    assert len(now) == old + 3 and (now[end] != was[end]).any()
    config = checkpoint.settled(worded)
    begun = checkpoint.open_model(config, mesh_of(1, 1, 1))
    rows = optimizer.starting_state(config, begun, checkpoint.frozen_params(begun)).params["embedding"]
    np.testing.assert_array_equal(rows[0], was[end])  # it was there, and begins as it was
    assert (now[[end, old, old + 1, old + 2]] != np.asarray(rows)).any(axis=1).all()
    ids, merged = np.array([[5, old, end, old + 2]]), read_model_config(tmp_path / "merged")
    wanted = logits(weights.load_params(tmp_path / "merged", merged, mesh_of(1, 1, 1)), merged, ids)
    np.testing.assert_allclose(logits(checkpoint.opened_params(opened), model, ids), wanted, atol=1e-5, rtol=1e-5)


def test_a_run_with_words_resumes_bit_for_bit_and_goes_on_from_its_adapter(
    worded: SftConfig, base: Path, one_device: None
) -> None:
    cut = worded.model_copy(update={"run_name": "cut_words", "resume": True})
    for name in ("config.toml", "metrics.jsonl", "source", "checkpoints/step_00000002"):
        source, target = worded.run_directory / name, cut.run_directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    cli.run(cut)
    whole, again = ((each.run_directory / "model" / weights.ADAPTER_WEIGHTS) for each in (worded, cut))
    assert whole.read_bytes() == again.read_bytes()
    keys: dict[str, Any] = worded.model_dump(exclude_unset=True) | {"model_name": str(worded.run_directory)}
    keys = {key: value for key, value in keys.items() if not key.startswith("lora")}
    config = checkpoint.settled(SftConfig(**keys))
    opened = checkpoint.open_model(config, mesh_of(1, 1, 1))
    state = optimizer.starting_state(config, opened, checkpoint.frozen_params(opened))
    assert_trees_close(state.params, checkpoint.trained_params(opened), 0, 0)
    Path(config.new_tokens).with_name("more.txt").write_text("<d_4>\n")
    more = config.model_copy(update={"new_tokens": str(Path(config.new_tokens).with_name("more.txt"))})
    with pytest.raises(UserError, match="is an adapter with rows of other tokens, or none"):
        checkpoint.open_model(more, mesh_of(1, 1, 1))
    with pytest.raises(UserError, match="is an adapter, which trains too"):
        checkpoint.open_model(checkpoint.settled(SftConfig(**keys, train_only="new_tokens")), mesh_of(1, 1, 1))
    with pytest.raises(UserError, match="which has rows of its own for 4 tokens"):
        generator.adapter_of(
            checkpoint.open_model(ModelKeys(model_name=str(base)), mesh_of(1, 1, 1)), keys["model_name"], 0
        )
    with pytest.raises(ValueError, match="train_only and lora_rank contradict"):
        adapter_run(base, new_tokens=config.new_tokens, train_only="new_tokens")


# Reinforcement


def grpo_of(base: Path, **changes: Any) -> GrpoConfig:
    (base / "letters.py").write_text("def letters(prompt, completion, row):\n    return completion.count('e')\n")
    settings: dict[str, Any] = {
        "model_name": str(base), "run_name": "grpo", "output_dir": str(base.parent / "runs"), "lora_rank": 4,
        "data": ({"path": str(base / "heldout.jsonl"), "split": "train[:30]"},),
        "reward": (f"{base}/letters.py:letters:1",),
        "prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_tokens": 16, "sequence_length": 160,
        "steps": 3, "slots": 16, "compute_dtype": "float32", "learning_rate": 1e-2, "mask_truncated": False,
    }  # fmt: skip
    return GrpoConfig(**settings | changes)


def test_the_sampler_has_the_adapter_at_every_step_and_the_reference_is_the_adapter_at_the_start(
    base: Path, adapted: SftConfig, worded: SftConfig, one_device: None
) -> None:
    fresh = grpo_of(base, kl_weight=0.1)
    shared: dict[str, Any] = {"kl_weight": 0.1, "steps": 2}
    continued = grpo_of(base, model_name=str(adapted.run_directory), run_name="continued", **shared)
    with_words = grpo_of(base, model_name=str(worded.run_directory), run_name="with_words", **shared)
    for each in (fresh, continued, with_words):
        cli.run(each)
        found = records(each)
        assert max(record["logprob_difference_max"] for record in found) < 1e-5
        assert found[0]["kl"] < 1e-9 < 1e-4 < found[-1]["kl"]


def test_a_reference_with_the_adapter_off_is_the_base_loaded_alone(base: Path) -> None:
    model = read_model_config(base)
    plain = weights.load_params(base, model, mesh_of(1, 1, 1))
    with_lora = replace(model, lora=LORA)
    start, config = random_params(with_lora, 1), grpo_of(base, temperature=0.7)
    batch = random_batch(3, 2, 2, 32, model.vocabulary_size)
    zero = np.zeros(batch.token.shape, np.float32)
    arrays: Any = *batch, zero.astype(np.int32), *[zero] * 6
    rows = objective.RolloutBatch(*arrays)
    loss, count = objective.policy_loss(config), np.int32(2)
    found = objective.log_probabilities(joined(plain, start, with_lora), rows, count, with_lora, loss)
    np.testing.assert_allclose(found, objective.log_probabilities(plain, rows, count, model, loss), atol=1e-6, rtol=0)


def test_a_sampler_that_reads_the_base_ends_the_run(
    base: Path, one_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sampler.Sampler.load

    def without_adapters(self: sampler.Sampler, params: Any) -> None:
        layers = {
            name: replace(leaf, a=None, b=None) if isinstance(leaf, Frozen) else leaf
            for name, leaf in params["layers"].items()
        }
        load(self, params | {"layers": layers})

    monkeypatch.setattr(sampler.Sampler, "load", without_adapters)
    fault = grpo_of(base, run_name="fault")
    with pytest.raises(UserError, match="step 2: log-probabilities of sampler and trainer differ by"):
        cli.run(fault)
    first, second = records(fault)
    assert first["logprob_difference_max"] < 1e-5 < 1e-3 < second["logprob_difference_max"]


# Several at once


@pytest.fixture(scope="module")
def two_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the small model, of another rank and other targets, that change what it answers."""
    directory, found = tmp_path_factory.mktemp("two"), {}
    for number, lora in enumerate((Lora(4, 8.0, True, LORA_TARGETS), Lora(2, 3.0, False, ("q_proj", "down_proj")))):
        model, place = replace(read_model_config(base), lora=lora), directory / str(number)
        random = np.random.default_rng(number)
        trained = random_params(model, number)
        trained = jax.tree.map(lambda leaf, random=random: leaf + random.standard_normal(leaf.shape) / 2, trained)
        config = json.loads(weights.adapter_config(model, str(base)))
        (directory / f"source{number}").mkdir()
        (directory / f"source{number}" / weights.ADAPTER).write_text(json.dumps(config))
        checkpoint.save_model(place, trained, model, directory / f"source{number}", {}, base)
        found[f"n{number}"] = place
    return found


def test_a_server_answers_for_several_adapters_in_one_batch_each_as_if_alone(
    base: Path, two_adapters: dict[str, Path], one_device: None
) -> None:
    shared: dict[str, Any] = {"compute_dtype": "float32", "capacity": 128, "temperature": 0.0, "port": 0, "slots": 4}
    named = tuple(f"{name}={directory}" for name, directory in two_adapters.items())
    together = generator.load_generator(ServeConfig(model_name=str(base), adapters=named, **shared), 4)
    rules, prompts = SamplingKeys(temperature=0.0, max_tokens=12), [(5, 9, 33, 7), (40, 2, 17)]
    requests = [sampler.Request(prompt, rules, adapter=number) for prompt in prompts for number in range(3)]
    found = together.sampler.generate(requests)
    for number, name in enumerate((base, *two_adapters.values())):
        alone = generator.load_generator(ServeConfig(model_name=str(name), **shared), 4).sampler
        expected = alone.generate([sampler.Request(prompt, rules) for prompt in prompts])
        ours = found[number::3]
        assert [each.tokens for each in ours] == [each.tokens for each in expected]
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)
        scores = together.sampler.scores_of(prompts[0], 0, number)[0], alone.scores_of(prompts[0], 0)[0]
        np.testing.assert_allclose(*scores, atol=1e-4)
    assert len({found[number].log_probabilities for number in range(3)}) == 3
    again = together.sampler.generate(requests[1:2])[0]
    assert again.tokens == found[1].tokens
    np.testing.assert_allclose(again.log_probabilities, found[1].log_probabilities, atol=1e-5)

    with serving(together, adapters=named, served_name="base") as server:
        client = server.client()
        assert [model.id for model in client.models.list().data] == ["base", "n0", "n1"]
        for number, name in enumerate(("base", "n0", "n1")):
            answer = client.completions.create(model=name, prompt=list(prompts[0]), max_tokens=12, temperature=0)
            assert answer.model == name and answer.choices[0].text == found[number].text
        with pytest.raises(openai.NotFoundError, match="this server has 'base', 'n0', 'n1'"):
            client.completions.create(model="n2", prompt="x")


def test_adapters_of_another_base_or_without_a_name_are_refused(
    base: Path, two_adapters: dict[str, Path], adapted: SftConfig, tmp_path: Path, one_device: None
) -> None:
    other, adapter = Path(shutil.copytree(base, tmp_path / "other")), two_adapters["n0"]

    def load(model_name: Path, *named: str) -> None:
        generator.load_generator(ServeConfig(model_name=str(model_name), adapters=named, compute_dtype="float32"), 4)

    moved = Path(shutil.copytree(adapter, tmp_path / "moved")) / weights.ADAPTER
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match=f"whose base is {other}, and this server has {base}"):
        load(base, f"a={moved.parent}")
    with pytest.raises(UserError, match="which is no adapter"):
        load(base, f"a={other}")
    with pytest.raises(UserError, match="is an adapter itself"):
        load(adapter, f"a={adapter}")
    opened = checkpoint.open_model(ModelKeys(model_name=str(other)), mesh_of(1, 1, 1))
    lora, _ = generator.adapter_of(opened, str(adapted.run_directory), 0)  # its base by content, wherever that lies
    assert lora.rank == adapted.lora_rank
    for named in (("runs/sql",), ("a=x", "a=y")):
        with pytest.raises(ValueError, match="NAME=DIRECTORY"):
            ServeConfig(model_name="x", adapters=named)
