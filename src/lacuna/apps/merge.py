"""The command merge: an adapter folded into the weights under it, as a model that any runtime reads."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lacuna import checkpoint, weights
from lacuna.apps.configs import MergeConfig
from lacuna.apps.convert import merged_params
from lacuna.checkpoint import OpenedModel
from lacuna.config import UserError
from lacuna.distributed import make_mesh
from lacuna.model import (
    ModelConfig,
    cast,
    embed,
    forward,
    head_of,
    logits_of,
    parameter_table,
)

PROBE_TOKENS = 64


def run_merge(config: MergeConfig) -> None:
    """Write the model that an adapter makes of its base, one layer of a matrix at a time.

    Raises:
        UserError: it is no adapter, its base has changed, or there is something where the model should go.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {config.output!r} is there already; name another")
    config = checkpoint.settled(config)
    opened = checkpoint.open_model(config, make_mesh(1, 1, 1, jax.devices()[:1]))
    if not opened.model.lora:
        raise UserError(f"model_name {config.model_name!r} is no adapter, so there is nothing to merge")
    if config.onto == "original" and opened.model.file_bits:
        raise UserError(f"onto = original, but {opened.base} holds the quantised weights alone; leave it out")
    model = replace(opened.model, lora=None, bits=0, file_bits=0, file_dtype=config.dtype or opened.model.file_dtype)
    is_onto_trained = opened.model.bits and config.onto == "trained"
    as_stored = replace(opened.model, bits=opened.model.file_bits)
    params = merged_params(opened.place, as_stored, opened.model.bits - as_stored.bits if is_onto_trained else 0)
    problems = checkpoint.save_model(output, params, model, opened.place.tokenizer, None, opened.place.described)
    kind = f"its base of {opened.model.bits} bits" if is_onto_trained else str(opened.base)
    print("; WARNING: ".join([f"{output}: merged into {kind}, {model.file_dtype} in Hugging Face layout", *problems]))
    if opened.model.bits and not opened.model.file_bits:
        for what, difference in distances(opened, output, model).items():
            print(f"largest difference from the logits that were trained, {what}: {difference:.3g}")


def distances(opened: OpenedModel, output: Path, model: ModelConfig) -> dict[str, float]:
    """How far the logits of a model that was written are from those of the adapter on its quantised base, and how far
    those of the adapter on the original base are, over the same random tokens."""
    ids = jax.random.randint(jax.random.key(0), (1, PROBE_TOKENS), 0, model.vocabulary_size)
    trained = logits(checkpoint.opened_params(opened), opened.model, ids)
    dense = opened._replace(model=replace(opened.model, bits=0))
    original = logits(checkpoint.opened_params(dense), dense.model, ids)
    written = logits(weights.load_params(output, model, opened.mesh), model, ids)
    return {
        "of what was written": float(jnp.max(jnp.abs(written - trained))),
        "of the adapter on the original weights": float(jnp.max(jnp.abs(original - trained))),
    }


def logits(params: PyTree, model: ModelConfig, ids: Array) -> Float[Array, "batch token vocab"]:
    """Logits in float32."""
    params = cast(params, parameter_table(model), "float32")
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones_like(ids), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)
