"""Products with a frozen matrix and its adapter."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lacuna.linear import PRODUCT, Frozen, linear
from lacuna.quantised import quantise

TOKENS, WIDTH, RANK = 64, 512, 2


def frozen(bits: int) -> Frozen:
    matrix, a, b = (
        0.05 * jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(WIDTH, WIDTH), (WIDTH, RANK), (RANK, WIDTH)])
    )
    base: Any = jax.jit(lambda matrix: quantise(matrix, 4, (WIDTH,)))(matrix) if bits == 4 else matrix
    base = matrix.astype(jnp.bfloat16) if bits == 16 else base
    return Frozen(base, a, b, scale=2.0)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_of_a_product_with_an_adapter_rematerialisation_keeps_the_sum_alone(bits: int) -> None:
    """Each layer more takes the input of one layer and one product: not what base and adapter add to it apart, and no
    copy of the base."""
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)

    def body(x: jax.Array, weight: Frozen) -> tuple[jax.Array, None]:
        return jax.nn.silu(linear(x, weight)), None

    def loss(factors: Any, x: jax.Array, base: Any) -> jax.Array:
        layer: Any = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(layer, x, Frozen(base, *factors, scale=2.0).stack)[0])

    def temporaries(layers: int) -> int:
        one = frozen(bits)
        stack: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype), one)
        x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.float32)
        program = jax.jit(jax.grad(loss)).lower((stack.a, stack.b), x, stack.base).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert (temporaries(20) - temporaries(4)) / 16 < 2.2 * 4 * TOKENS * WIDTH
