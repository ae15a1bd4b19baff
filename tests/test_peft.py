"""Adapters that peft made: read with its logits, and what is not supported refused by name."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, TINY, mesh_of

from lacuna import checkpoint, weights
from lacuna.config import ModelKeys, UserError
from lacuna.model import ModelConfig, cast, embed, forward, head_of, logits_of, parameter_table
from lacuna.tokenizer import load_tokenizer

ADAPTERS = REFERENCE / "adapters"
FAMILIES = ("qwen2", "qwen3", "llama2", "llama3", "mistral", "smollm2", "smollm3", "olmo2")
KNOWN = {"plain", "regular_expression"}


@partial(jax.jit, static_argnums=1)
def logits(params: Any, model: ModelConfig, ids: jax.Array) -> jax.Array:
    params, position = (
        cast(params, parameter_table(model), "float32"),
        jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    )
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones_like(ids), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)


def logits_of_directory(directory: Path, base_name: str, ids: np.ndarray) -> jax.Array:
    config, mesh = ModelKeys(model_name=str(directory), base_name=base_name), mesh_of(1, 1, 1)
    place = checkpoint.find_model(config)
    model, line = checkpoint.model_on(place, config, mesh)
    tokenizer = load_tokenizer(TINY)  # any: the references have none
    opened = checkpoint.OpenedModel(place.source, model, tokenizer, mesh, line, place)
    return logits(checkpoint.opened_params(opened), model, ids)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in FAMILIES for name in ("all_linear", "query_value")),
        *((family, "new_tokens") for family in ("qwen3", "llama2")),
    ],
)
def test_logits_of_an_adapter_are_those_of_peft(family: str, name: str) -> None:
    with np.load(ADAPTERS / family / "expected.npz") as expected:
        ours = logits_of_directory(ADAPTERS / family / name, str(REFERENCE / family), expected["input_ids"])
        np.testing.assert_allclose(ours, expected[name], atol=1e-5, rtol=1e-5)
        assert np.abs(expected[name] - expected["base"]).max() > 0.5


def test_what_an_adapter_may_not_be_is_refused_by_name() -> None:
    cases = {path.name for path in (ADAPTERS / "configs").iterdir()}
    assert cases > KNOWN
    words = {
        "dora": "use_dora = True", "rank_pattern": "rank_pattern = ", "alpha_pattern": "alpha_pattern = ",
        "bias_all": "bias = 'all'", "bias_lora_only": "bias = 'lora_only'", "lora_bias": "lora_bias = True",
        "modules_to_save": "modules_to_save = ['lm_head']", "embedding_target": "'embed_tokens'",
        "one_layer": "layers_to_transform = [1]", "excluded": "exclude_modules = ",
        "pissa": "init_lora_weights = 'pissa'", "layer_replication": "layer_replication = ",
        "activated": "alora_invocation_tokens = ", "classification": "task_type = 'SEQ_CLS'",
        "ia3": "peft_type 'IA3'", "prompt_tuning": "peft_type 'PROMPT_TUNING'",
    }  # fmt: skip
    assert cases - KNOWN == set(words)
    for case, named in words.items():
        with pytest.raises(UserError, match=re.escape(named)):
            weights.read_lora(ADAPTERS / "configs" / case)


def test_targets_may_be_a_regular_expression_if_it_takes_all_layers(tmp_path: Path) -> None:
    plain, expression = (weights.read_lora(ADAPTERS / "configs" / name) for name in ("plain", "regular_expression"))
    assert plain and plain == expression and plain.targets == ("q_proj", "v_proj")
    directory = Path(shutil.copytree(ADAPTERS / "qwen3" / "query_value", tmp_path / "adapter"))
    stated = json.loads((directory / weights.ADAPTER).read_text())
    stated["target_modules"] = r"model\.layers\.0\.self_attn\.(q|v|k)_proj"
    (directory / weights.ADAPTER).write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"k_proj.lora_A.weight: missing in the files"):
        logits_of_directory(directory, str(REFERENCE / "qwen3"), np.zeros((1, 2), np.int32))


def test_a_revision_beside_a_local_base_is_of_no_concern(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ADAPTERS / "qwen3" / "query_value", tmp_path / "adapter"))
    stated = json.loads((directory / weights.ADAPTER).read_text())
    stated |= {"base_model_name_or_path": str(REFERENCE / "qwen3"), "revision": "main"}
    (directory / weights.ADAPTER).write_text(json.dumps(stated))
    assert checkpoint.find_model(ModelKeys(model_name=str(directory))).base == REFERENCE / "qwen3"
