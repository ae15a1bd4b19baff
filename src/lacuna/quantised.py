"""Frozen matrices of 8 or 4 bits: quantised, dequantised, multiplied by.

Codes and scales are those of bitsandbytes: int8 with the largest magnitude of each row, or NF4 in blocks of 64 whose
scales are themselves of 8 bits (Dettmers et al. 2023), 4.127 bits a parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lacuna.config import UserError
from lacuna.distributed import platform, shard

BLOCK = 64  # weights of a row that share a scale
OUTER_BLOCK = 256  # scales, in the order of the file, that share an outer scale
# Quantiles of the normal distribution, scaled to ±1 (Dettmers et al. 2023)
NORMAL_MAP = np.array([
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
], np.float32)  # fmt: skip


def dynamic_map() -> Float[np.ndarray, " code"]:
    """The values of 8-bit codes with a dynamic exponent (Dettmers 2016), bit-equal to those of bitsandbytes."""
    decades = []
    for exponent in range(7):
        at, steps = np.arange(2**exponent + 1), 2**exponent
        step = np.float64(np.float32(np.float32(0.9) / np.float32(steps)))
        rising, falling = np.float64(np.float32(0.1)) + step * at, 1 - step * (steps - at)
        bounds = np.where(at <= steps // 2, rising, falling).astype(np.float32)  # each end is met exactly
        decades.append((bounds[:-1] + bounds[1:]) / 2 * np.float32(10.0 ** (exponent - 6)))
    values = np.concatenate(decades)
    return np.sort(np.concatenate([values, -values, np.array([0, 1], np.float32)]))


DYNAMIC_MAP = dynamic_map()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "outer_scale", "offset"],
    meta_fields=["bits", "outputs", "over"],
)
@dataclass(frozen=True)
class Quantised:
    """A matrix [out, in] of a linear layer as it lies in the file, or a stack of them with leading axes.

    `codes` are int8 [out, in], or NF4, two in a byte, the first in its high half: uint8 [out, in / 2]. `scale` is
    float32 [out] with the largest magnitude of each row of int8, and of NF4 [out, in / 64] with that of each block, in
    float32, or in 8 bits where `outer_scale`, float32 [ceil(out × in / 64 / 256)], and `offset`, float32 [], stretch
    it. `outputs` are the axes that `out` merges, `over` the mesh axes over which out and in stay split
    in a product.
    """

    codes: Any
    scale: Any
    outer_scale: Any = None
    offset: Any = None
    bits: int = field(default=4, kw_only=True)
    outputs: tuple[int, ...] = field(kw_only=True)
    over: tuple[str | None, str | None] = field(default=(None, None), kw_only=True)


def stored_bits(raw: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The bits of the layers' matrices in the files, 0 where they are not quantised, and those of a scale.

    Raises:
        UserError: they are quantised otherwise than by bitsandbytes to NF4 or int8.
    """
    fields = raw.get("quantization_config") or {}
    if not fields:
        return 0, 8
    method, kind = fields.get("quant_method"), fields.get("bnb_4bit_quant_type", "fp4")
    storage = fields.get("bnb_4bit_quant_storage", "uint8")
    problem = ""
    if method != "bitsandbytes":
        problem = f"quant_method = {method!r}"
    elif not fields.get("load_in_8bit") and (kind, storage) != ("nf4", "uint8"):
        problem = f"bnb_4bit_quant_type = {kind!r} in bnb_4bit_quant_storage = {storage!r}"
    if problem:
        raise UserError(
            f"{where}: weights quantised with {problem} are not supported; those of bitsandbytes in nf4 or 8 bits are, "
            "and those that are not quantised"
        )
    if fields.get("load_in_8bit"):
        return 8, 32
    return 4, 8 if fields.get("bnb_4bit_use_double_quant") else 32


def check_blocks(name: str, width: int, parts: int) -> None:
    """Refuse NF4 for a matrix whose rows, each split over so many devices, are no whole blocks."""
    if width % BLOCK:
        raise UserError(
            f"{name}: rows of {width} weights are no whole blocks of {BLOCK}, in which 4 bits come; set base_bits to 8"
        )
    if width % (BLOCK * parts):
        raise UserError(
            f"{name}: rows of {width} weights are {width // BLOCK} blocks, which {parts} devices can't share; choose "
            f"fsdp and tensor that divide {width // BLOCK}"
        )


def quantise(weight: Float[Array, "out in"], bits: int, outputs: tuple[int, ...], nested: bool = True) -> Quantised:
    """The matrix in 8 or 4 bits; `nested` scales are of 8 bits.

    Sums and outer blocks run over the scales of the whole matrix in the order of the file on every device, so the
    result does not depend on how the matrix is sharded.
    """
    if bits == 8:
        scale = jnp.max(jnp.abs(weight), axis=1)
        codes = jnp.round(weight * (reciprocal(scale) * 127)[:, None])
        return Quantised(codes.astype(jnp.int8), scale, bits=8, outputs=outputs)
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    codes = nearest(blocks, scale, NORMAL_MAP).reshape(len(weight), -1, 2)
    codes = codes[..., 0] << 4 | codes[..., 1]
    if not nested:
        return Quantised(codes, scale, outputs=outputs)
    flat = shard(scale.reshape(-1), None)
    offset = pairwise_sum(flat) / len(flat)
    centred = jnp.pad(flat - offset, (0, -len(flat) % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)
    outer_scale = jnp.max(jnp.abs(centred), axis=-1)
    inner = nearest(centred, outer_scale, DYNAMIC_MAP).reshape(-1)[: len(flat)].reshape(scale.shape)
    return Quantised(codes, inner, outer_scale, offset, outputs=outputs)


def nearest(
    x: Float[Array, "*blocks value"], scale: Float[Array, "*blocks"], table: Float[np.ndarray, " code"]
) -> Shaped[Array, "*blocks value"]:
    """The code of the table's value nearest to each value in units of its block's scale, the lower one of two."""
    middle = (table[:-1] + table[1:]) / 2
    units = jnp.clip(x * reciprocal(scale)[..., None], -1, 1)
    return jnp.searchsorted(middle, units, method="compare_all").astype(jnp.uint8)


def reciprocal(scale: Float[Array, "*blocks"]) -> Float[Array, "*blocks"]:
    """One over each scale, and one for that of zeros alone."""
    return 1 / jnp.where(scale > 0, scale, 1)


def pairwise_sum(x: Float[Array, " value"]) -> Float[Array, ""]:
    """The sum by halves: in the same order on any devices."""
    while len(x) > 1:
        x = jnp.pad(x, (0, len(x) % 2))
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def dequantised(weight: Quantised, dtype: DTypeLike) -> Float[Array, "*layers out in"]:
    """The matrix: a code's value × its scale in float32, rounded to `dtype`."""
    if weight.bits == 8:
        wide = weight.codes.astype(jnp.float32) * weight.scale[..., None]
        return (wide * np.float32(1 / 127)).astype(dtype)
    scale = block_scale(weight)
    codes = jnp.stack([weight.codes >> 4, weight.codes & 15], axis=-1).reshape(*scale.shape, BLOCK)
    values = jnp.asarray(NORMAL_MAP).at[codes].get(mode="promise_in_bounds")
    return (values * scale[..., None]).astype(dtype).reshape(*scale.shape[:-1], -1)


def block_scale(weight: Quantised) -> Float[Array, "*layers out block"]:
    """The scale of each block of 64 in float32."""
    if weight.outer_scale is None:
        return weight.scale
    *layers, out, blocks = weight.scale.shape
    outer = jnp.repeat(weight.outer_scale, OUTER_BLOCK, axis=-1)[..., : out * blocks].reshape(weight.scale.shape)
    inner = jnp.asarray(DYNAMIC_MAP).at[weight.scale].get(mode="promise_in_bounds")
    inner = jax.lax.optimization_barrier(inner * outer)  # rounded before the sum, not in one step with it
    return inner + weight.offset[..., None, None]


@jax.custom_vjp
def quantised_product(x: Float[Array, "token in"], weight: Quantised) -> Float[Array, "token out"]:
    """`x @ weight.T`, the matrix dequantised for it, and again for the gradient of `x`; it has none itself.

    So what is kept between the two are the codes, which are there already.
    """
    return _multiplied("ti,oi->to", x, weight)


def _multiplied(axes: str, x: Float[Array, "token _"], weight: Quantised) -> Float[Array, "token _"]:
    """The matrix depends on `x` by a zero: in a loop over tokens XLA would dequantise those of all layers once, before
    it, and hold them."""
    codes, scale = (shard(leaf, *weight.over[: leaf.ndim]) for leaf in (weight.codes, weight.scale))
    zero = jnp.isnan(x[0, 0]).astype(jnp.float32) * 0
    gathered = replace(weight, codes=codes, scale=scale)  # in few bits
    matrix = dequantised(jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), gathered), x.dtype)
    if platform() != "cpu":
        return jnp.einsum(axes, x, matrix)
    return jnp.einsum(axes, x, matrix, preferred_element_type=jnp.float32).astype(x.dtype)


quantised_product.defvjp(
    lambda x, weight: (_multiplied("ti,oi->to", x, weight), weight),
    lambda weight, gradient: (_multiplied("to,oi->ti", gradient, weight), None),
)
