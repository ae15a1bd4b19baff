"""The command merge: an adapter folded into the weights under it, as a model that any runtime reads."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lacuna import checkpoint, weights
from lacuna.apps.configs import ConvertConfig, MergeConfig
from lacuna.apps.convert import DTYPES, KINDS, run_convert
from lacuna.config import UserError
from lacuna.distributed import make_mesh
from lacuna.model import ModelConfig, cast, embed, forward, head_of, logits_of, parameter_table

PROBE_TOKENS = 64


def run_merge(config: MergeConfig) -> None:
    """Write the model that an adapter makes of its base, one layer of a matrix at a time; of a quantised base, say how
    far the logits of both ways to merge are from those of the adapter as it was trained.

    Raises:
        UserError: it is no adapter, its base has changed, or there is something where the model should go.
    """
    config, mesh = checkpoint.settled(config), make_mesh(1, 1, 1, jax.devices()[:1])
    opened = checkpoint.open_model(config, mesh)
    if not opened.model.lora:
        raise UserError(f"model_name {config.model_name!r} is no adapter, so there is nothing to merge")
    kind = KINDS[config.dtype or opened.model.file_dtype]
    named = {"model_name": config.model_name, "base_name": config.base_name}
    run_convert(ConvertConfig(**named, type=kind, output=config.output, onto=config.onto))
    if opened.model.bits and not opened.model.file_bits:
        ids = jax.random.randint(jax.random.key(0), (1, PROBE_TOKENS), 0, opened.model.vocabulary_size)
        trained = logits(checkpoint.opened_params(opened), opened.model, ids)
        dense = opened._replace(model=replace(opened.model, bits=0))
        plain = replace(dense.model, lora=None, file_dtype=DTYPES[kind])
        found = {
            f"of {config.output}": logits(weights.load_params(Path(config.output), plain, mesh), plain, ids),
            "of the adapter on the original weights": logits(checkpoint.opened_params(dense), dense.model, ids),
        }
        for what, others in found.items():
            difference = float(jnp.max(jnp.abs(others - trained)))
            print(f"largest difference of logits {what} from those that were trained: {difference:.3g}")


def logits(params: PyTree, model: ModelConfig, ids: Array) -> Float[Array, "batch token vocab"]:
    """Logits in float32."""
    params = cast(params, parameter_table(model), "float32")
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones_like(ids), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)
