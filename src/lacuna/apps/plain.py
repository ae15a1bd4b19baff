"""Plain formulas that `check` compares with: a model, its sampling rules and its learning rate, as papers have them.

Nothing here uses a room of the house: a model is read from config.json and the tensors of its files by their names
there, one document a row, every score and every logit in memory, its gradient by differentiation alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Tensors = Mapping[str, Any]  # arrays
PRECISE = jax.lax.Precision.HIGHEST


def plain_frequencies(raw: Mapping[str, Any], head: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of channels, and what multiplies cosine and sine."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    base = rope.get("rope_theta", raw.get("rope_theta", 2e6 if raw["model_type"] == "smollm3" else 10000.0))
    pair = np.arange(head // 2)
    frequency = base ** (-2.0 * pair / head)
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor", 1.0)
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)
        smooth = (turns - low) / (high - low)
        between = (1 - smooth) * frequency / factor + smooth * frequency
        return np.where(turns < low, frequency / factor, np.where(turns > high, frequency, between)), 1.0
    if kind == "yarn":
        fast, slow = (
            head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, head - 1)
        ramp = np.clip((pair - fast) / max(slow - fast, 0.001), 0, 1)
        over, under = (0.1 * (rope.get(key) or 0) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        implied = over / under if rope.get("mscale") and rope.get("mscale_all_dim") else 0.1 * math.log(factor) + 1
        return (1 - ramp) * frequency + ramp * frequency / factor, rope.get("attention_factor") or implied
    return frequency, 1.0


def plain_attention(
    query: Float[Array, "batch token kv_head group head"],
    key: Float[Array, "batch token kv_head head"],
    value: Float[Array, "batch token kv_head head"],
    segment: Int[Array, "batch token"],
) -> Float[Array, "batch token kv_head group head"]:
    """Causal attention within each document (Vaswani et al. 2017), in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=PRECISE) / math.sqrt(query.shape[-1])
    visible = jnp.tri(segment.shape[1], dtype=bool) & (segment[:, :, None] == segment[:, None])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value, precision=PRECISE)


def plain_logits(
    tensors: Tensors,
    raw: Mapping[str, Any],
    token: Int[Array, "document token"],
    position: Int[Array, "document token"] | None = None,
) -> Float[Array, "document token vocab"]:
    """The logits after each token of documents that lie alone in their rows, padded at the end; positions count from 0
    unless they are given."""
    heads, epsilon = raw["num_attention_heads"], raw["rms_norm_eps"]
    kv_heads = raw.get("num_key_value_heads") or heads
    head = raw.get("head_dim") or raw["hidden_size"] // heads
    frequency, magnitude = plain_frequencies(raw, head)
    counted = np.arange(token.shape[1])[None] if position is None else np.asarray(position)
    angle = (counted[..., None] * frequency)[:, :, None]
    cosine, sine = magnitude * np.cos(angle, dtype=np.float32), magnitude * np.sin(angle, dtype=np.float32)
    interval = raw.get("no_rope_layer_interval") or 4
    turned = raw.get("no_rope_layers") or [(layer + 1) % interval for layer in range(raw["num_hidden_layers"])]

    def norm(x: Array, name: str) -> Array:
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * tensors[name]

    def linear(x: Array, name: str) -> Array:
        product = jnp.einsum("bti,oi->bto", x, tensors[f"{name}.weight"], precision=PRECISE)
        return product + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else product

    def turn(x: Array, layer: int) -> Array:
        if raw["model_type"] == "smollm3" and not turned[layer]:
            return x
        left, right = x[..., : head // 2], x[..., head // 2 :]
        return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)

    def heads_of(x: Array, stem: str, name: str, count: int) -> Array:
        x, scale = linear(x, f"{stem}{name}_proj"), f"{stem}{name}_norm.weight"
        if scale in tensors and len(tensors[scale]) != head:  # over all heads
            return norm(x, scale).reshape(*x.shape[:2], count, head)
        x = x.reshape(*x.shape[:2], count, head)
        return norm(x, scale) if scale in tensors else x

    x = tensors["model.embed_tokens.weight"][token]
    for layer in range(raw["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        before = f"{stem}input_layernorm.weight" in tensors  # else the outputs are normed
        y = norm(x, f"{stem}input_layernorm.weight") if before else x
        query, key, value = (
            heads_of(y, f"{stem}self_attn.", name, count)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        query = turn(query, layer).reshape(*token.shape, kv_heads, heads // kv_heads, head)
        mixed = plain_attention(query, turn(key, layer), value, jnp.ones_like(token))
        y = linear(mixed.reshape(*token.shape, -1), f"{stem}self_attn.o_proj")
        x = x + (y if before else norm(y, f"{stem}post_attention_layernorm.weight"))
        y = norm(x, f"{stem}post_attention_layernorm.weight") if before else x
        gate, up = (linear(y, f"{stem}mlp.{name}_proj") for name in ("gate", "up"))
        y = linear(gate / (1 + jnp.exp(-gate)) * up, f"{stem}mlp.down_proj")
        x = x + (y if before else norm(y, f"{stem}post_feedforward_layernorm.weight"))
    head_matrix = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return jnp.einsum("bte,ve->btv", norm(x, "model.norm.weight"), head_matrix, precision=PRECISE)


def plain_cut(logits: Float[np.ndarray, " vocab"], rules: Mapping[str, float]) -> Float[np.ndarray, " vocab"]:
    """The log-probabilities that a token is drawn from: over the temperature, then what top_k, top_p and min_p keep."""
    scores = logits.astype(np.float64) / rules["temperature"]
    order = np.argsort(-scores, kind="stable")
    kept = order[: rules["top_k"]] if rules["top_k"] else order
    probability = np.exp(scores[kept] - scores[order[0]])
    before = np.cumsum(probability / probability.sum()) - probability / probability.sum()
    kept = kept[((before < rules["top_p"]) | (rules["top_p"] == 1)) & (probability >= rules["min_p"])]
    found = np.full(len(scores), -np.inf)
    found[kept] = scores[kept] - np.log(np.sum(np.exp(scores[kept] - scores[order[0]]))) - scores[order[0]]
    return found


def plain_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to a tenth of it (Loshchilov & Hutter 2017); steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
