"""The command merge: an adapter folded into the weights under it, as a model that any runtime reads."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lacuna import checkpoint, weights
from lacuna.apps.configs import ConvertConfig, MergeConfig
from lacuna.apps.convert import KINDS, merged_params, run_convert
from lacuna.config import UserError
from lacuna.distributed import make_mesh
from lacuna.model import ModelConfig, Parameter, cast, embed, forward, head_of, logits_of, parameter_table

PROBE_TOKENS = 64


def run_merge(config: MergeConfig) -> None:
    """Write the model that an adapter makes of its base, one layer of a matrix at a time; of a quantised base, say how
    far the logits of both ways to merge are from those of the adapter as it was trained.

    Raises:
        UserError: it is no adapter, its base has changed, or there is something where the model should go.
    """
    config, mesh = checkpoint.settled(config), make_mesh(1, 1, 1, jax.devices()[:1])
    place = checkpoint.find_model(config)
    if not place.base:
        raise UserError(f"model_name {config.model_name!r} is no adapter, so there is nothing to merge")
    model, line = checkpoint.model_on(place, config, mesh)
    tokenizer: Any = None  # there need be none
    opened = checkpoint.OpenedModel(place.source, model, tokenizer, mesh, line, place)
    kind = KINDS[config.dtype or opened.model.file_dtype]
    named = {"model_name": config.model_name, "base_name": config.base_name}
    run_convert(ConvertConfig(**named, type=kind, output=config.output, onto=config.onto))
    if opened.model.bits and not opened.model.file_bits:
        ids = jax.random.randint(jax.random.key(0), (1, PROBE_TOKENS), 0, opened.model.vocabulary_size)
        trained = logits(checkpoint.opened_params(opened), opened.model, ids)
        dense, found = replace(opened.model, bits=0), list[str]()
        for bits, what in ((opened.model.bits, "dequantised"), (0, "original")):
            params = in_memory(merged_params(opened.place, dense, bits), dense)
            difference = float(jnp.max(jnp.abs(logits(params, weights.base_of(dense), ids) - trained)))
            found.append(f"{difference:.3g} merged onto the {what} weights")
        print(f"largest difference of {PROBE_TOKENS} tokens' logits from those that were trained: {', '.join(found)}")


def in_memory(params: PyTree, model: ModelConfig) -> PyTree:
    """Weights that are made layer by layer, as arrays."""

    def whole(row: Parameter, leaf: Any) -> np.ndarray:
        return np.stack([leaf[layer] for layer in range(model.layers)]) if row.has_layers else np.asarray(leaf)

    return jax.tree.map(whole, parameter_table(model), params)


@partial(jax.jit, static_argnums=1)
def logits(params: PyTree, model: ModelConfig, ids: Array) -> Float[Array, "batch token vocab"]:
    """Logits in float32."""
    params = cast(params, parameter_table(model), "float32")
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = forward(params, embed(params, ids, "float32"), jnp.ones_like(ids), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)
