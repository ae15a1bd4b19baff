"""Products with a weight: one that trains, or a frozen one with the factors of its adapter, or with rows that train."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from lacuna.distributed import platform
from lacuna.quantised import Quantised, quantised_product

PRODUCT = "product"  # names what comes of a weight, which rematerialisation keeps
TRANSPOSED_BLOCK = 64

Inputs = Float[Array, "token inputs"]
Outputs = Float[Array, "token outputs"]
Matrix = Float[Array, "inputs outputs"]


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "is_by_row"])
@dataclass(frozen=True)
class Frozen:
    """A matrix that does not train, in the dtype in which it is stored, and the factors of its adapter, if it has one.
    Factors may have one more axis than those of a matrix, after that of layers, of several adapters to choose from, or
    where it `is_by_row`, of one for each row of a batch."""

    base: Any
    a: Any = None
    b: Any = None
    scale: float = 1.0
    is_by_row: bool = False

    def cast(self, dtype: DTypeLike) -> "Frozen":
        """The same with its factors in a dtype."""
        a, b = jax.tree.map(lambda factor: factor.astype(dtype), (self.a, self.b))
        return replace(self, a=a, b=b)

    def astype(self, dtype: DTypeLike) -> "Frozen":
        """The same in a dtype, but for what is quantised."""
        return replace(self.cast(dtype), base=getattr(self.base, "astype", lambda _: self.base)(dtype))

    @property
    def stack(self) -> "Frozen":
        """The same for a scan over layers: XLA slices bfloat16 on a CPU as float32, and would copy all of it so."""
        is_copied = platform() == "cpu" and getattr(self.base, "dtype", None) == jnp.bfloat16
        return replace(self, base=jax.lax.bitcast_convert_type(self.base, jnp.uint16)) if is_copied else self


@partial(jax.tree_util.register_dataclass, data_fields=["base", "rows"], meta_fields=["ids"])
@dataclass(frozen=True)
class Words:
    """An embedding or a head that does not train, in the dtype in which it is stored, but for the rows of some tokens,
    which are apart and take the place of its own; those need not be there."""

    base: Any
    rows: Any
    ids: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.array(self.base, np.float32)
        values = np.pad(values, ((0, max(1 + max(self.ids) - len(values), 0)), (0, 0)))
        values[np.array(self.ids)] = self.rows
        return values

    def astype(self, dtype: DTypeLike) -> Float[Array, "vocab embed"]:
        """One matrix in a dtype."""
        return self.base.astype(dtype).at[np.array(self.ids)].set(self.rows.astype(dtype))

    def __getitem__(self, token: Int[Array, "batch token"]) -> Float[Array, "batch token embed"]:
        place = np.full(len(self.base), -1, np.int32)
        place[np.array(self.ids)] = np.arange(len(self.ids))
        found = jnp.asarray(place)[token]
        return jnp.where((found >= 0)[..., None], self.rows[found], self.base[token])


def scores(hidden: Float[Array, "*tokens embed"], head: Any) -> Float[Array, "*tokens vocab"]:
    """The product of hidden states with each row of a head, in float32."""
    if isinstance(head, Words):
        return scores(hidden, head.base).at[..., np.array(head.ids)].set(scores(hidden, head.rows))
    return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)


def gradient_of_scores(
    gradient: Float[Array, "*tokens vocab"], head: Any
) -> tuple[Float[Array, "*tokens embed"], Float[Array, "*tokens trained"]]:
    """The gradient of hidden states, in float32, and that of the scores of rows that train, of all if none is apart."""
    if not isinstance(head, Words):
        return jnp.einsum("...v,ve->...e", gradient, head, preferred_element_type=jnp.float32), gradient
    ids = np.array(head.ids)
    of_rows, of_others = gradient[..., ids], gradient.at[..., ids].set(0)
    return gradient_of_scores(of_others, head.base)[0] + gradient_of_scores(of_rows, head.rows)[0], of_rows


@jax.jit
def for_rows(params: PyTree, adapter: Int[Array, " row"]) -> PyTree:
    """Weights with a choice of adapters, of which each row of a batch gets that of its number; the rest as it was."""

    def choose(weight: Any) -> Any:
        is_choice = isinstance(weight, Frozen) and weight.a is not None
        return replace(weight, a=weight.a[adapter], b=weight.b[adapter], is_by_row=True) if is_choice else weight

    return jax.tree.map(choose, params, is_leaf=lambda weight: isinstance(weight, Frozen))


def linear(
    x: Float[Array, "batch token *inputs"], weight: Float[Array, "*inputs_outputs"] | Frozen
) -> Float[Array, "batch token *outputs"]:
    """Contract the axes of `x` after batch and token with the leading axes of `weight`, as one matrix product; a frozen
    one's adapter, if it has one, adds what it makes of `x`.

    Named after rounding and with all that is added, so that rematerialisation keeps the result and nothing else of it.
    """
    if not isinstance(weight, Frozen):
        return checkpoint_name(plain_product(x, weight), PRODUCT)
    product = base_product(x, weight.base)
    if weight.a is not None:
        factor = plain_product
        if weight.is_by_row:
            factor = jax.vmap(lambda row, factor: plain_product(row[None], factor)[0])
        product = product + factor(weight.scale * factor(x, weight.a), weight.b)
    return checkpoint_name(product, PRODUCT)


def plain_product(
    x: Float[Array, "batch token *inputs"], weight: Float[Array, "*inputs_outputs"]
) -> Float[Array, "batch token *outputs"]:
    """The product with a matrix that trains."""
    return multiplied(x, weight, matrix_product if platform() == "cpu" else jnp.matmul)


def base_product(
    x: Float[Array, "batch token *inputs"], base: Shaped[Array, "*inputs_outputs"] | Quantised
) -> Float[Array, "batch token *outputs"]:
    """The product with a frozen matrix, whatever it is stored as."""
    if not isinstance(base, Quantised):
        base = jax.lax.bitcast_convert_type(base, jnp.bfloat16) if base.dtype == jnp.uint16 else base
        return multiplied(x, base, frozen_product)
    tokens = x.shape[0] * x.shape[1]
    return quantised_product(x.reshape(tokens, -1), base).reshape(*x.shape[:2], *base.outputs)


def multiplied(x: Array, weight: Array, product: Callable[[Array, Array], Array]) -> Array:
    """`x` with batch and token as one axis times `weight` with inputs and outputs as one axis each."""
    inputs = x.ndim - 2
    outputs = weight.shape[inputs:]
    flat = jnp.reshape(weight, (math.prod(weight.shape[:inputs]), math.prod(outputs)))
    return product(x.reshape(-1, flat.shape[0]), flat).reshape(*x.shape[:2], *outputs)


@jax.custom_vjp
def frozen_product(x: Inputs, weight: Matrix) -> Outputs:
    """`x @ weight` for a weight without gradient, which is cast here and kept as it is stored for the backward pass."""
    return _frozen_product_forward(x, weight)[0]


def _frozen_product_forward(x: Inputs, weight: Matrix) -> tuple[Outputs, Matrix]:
    product = partial(_product, "ti,io->to") if platform() == "cpu" else jnp.matmul
    return product(x, weight.astype(x.dtype)), weight


def _frozen_product_backward(weight: Matrix, gradient: Outputs) -> tuple[Inputs, None]:
    gradient = jax.lax.optimization_barrier(gradient)
    return _product("to,io->ti", gradient, weight.astype(gradient.dtype)), None


frozen_product.defvjp(_frozen_product_forward, _frozen_product_backward)


@jax.custom_vjp
def matrix_product(x: Inputs, weight: Matrix) -> Outputs:
    """`x @ weight` on a CPU, summed in float32: XLA has a fast kernel for bfloat16 there only with float32 sums.

    The backward pass first writes the incoming gradient to memory, row-major. Otherwise XLA fuses its computation with
    the transposition that the weight's gradient needs, in a loop that is not vectorised: a fifth of a training step.
    """
    return _product("ti,io->to", x, weight)


def _product(axes: str, x: Array, y: Array) -> Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _matrix_product_backward(residual: tuple[Inputs, Matrix], gradient: Outputs) -> tuple[Inputs, Matrix]:
    x, weight = residual
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    return _product("to,io->ti", gradient, weight), product_over_tokens(x, gradient).astype(weight.dtype)


matrix_product.defvjp(lambda x, weight: (_product("ti,io->to", x, weight), (x, weight)), _matrix_product_backward)


def product_over_tokens(x: Inputs, gradient: Outputs) -> Matrix:
    """A weight's gradient, in float32; on a CPU the fast bfloat16 kernel needs the transpose in memory."""
    if platform() == "cpu" and x.dtype == jnp.bfloat16:
        x = _written_transposed(x)
        return jnp.einsum("it,to->io", x, gradient, preferred_element_type=jnp.float32)
    return jnp.einsum("ti,to->io", x, gradient, preferred_element_type=jnp.float32)


def _written_transposed(x: Float[Array, "row column"]) -> Float[Array, "column row"]:
    """The transpose, block by block: XLA would merge a plain one into the product, which then has no fast kernel."""
    rows, columns = (math.gcd(size, TRANSPOSED_BLOCK) for size in x.shape)
    blocks = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    blocks = jax.lax.optimization_barrier(jnp.transpose(blocks, (2, 0, 3, 1)))
    return jax.lax.optimization_barrier(jnp.transpose(blocks, (0, 2, 1, 3)).reshape(x.shape[::-1]))
