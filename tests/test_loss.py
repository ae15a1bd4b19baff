"""The chunked loss against the formula, and the memory it does without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from test_model import temporary_bytes

from lacuna import model
from lacuna.apps.programs import collectives, read_program
from lacuna.model import summed_cross_entropy


@pytest.mark.parametrize("shape", [(2, 7), (3, 300), (600, 2)])
@pytest.mark.parametrize("padding", [0, 5])
def test_chunked_cross_entropy_has_the_value_and_gradient_of_the_formula(shape: tuple[int, int], padding: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (*shape, 8)), jax.random.normal(keys[1], (11 + padding, 8))
    target, weight = jax.random.randint(keys[2], shape, 0, 11), jax.random.bernoulli(keys[3], 0.6, shape) * 1.0

    def formula(hidden: jax.Array, head: jax.Array) -> jax.Array:
        log_probability = jax.nn.log_softmax(hidden @ head[:11].T)
        return -jnp.sum(jnp.take_along_axis(log_probability, target[..., None], -1)[..., 0] * weight) * 0.7

    def chunked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return summed_cross_entropy(hidden, head, target, weight, 11) * 0.7

    np.testing.assert_allclose(chunked(hidden, head), formula(hidden, head), rtol=1e-5)
    with jax.default_matmul_precision("float32"):
        expected = jax.grad(formula, (0, 1))(hidden, head)
    for ours, wanted in zip(jax.grad(chunked, (0, 1))(hidden, head), expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_the_full_logits_never_exist() -> None:
    hidden, head = jax.ShapeDtypeStruct((4, 1024, 8), jnp.float32), jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    target, weight = jax.ShapeDtypeStruct((4, 1024), jnp.int32), jax.ShapeDtypeStruct((4, 1024), jnp.float32)
    gradient = jax.jit(jax.grad(summed_cross_entropy, (0, 1)), static_argnums=4)
    temporaries = temporary_bytes(gradient.lower(hidden, head, target, weight, 4096))
    assert temporaries < 0.5 * 4 * 1024 * 4096 * 4


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_the_head_is_sent_once_however_many_chunks_there_are(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, rows = mesh_of(*shape), PartitionSpec(("data", "fsdp"))
    random, sent, found = np.random.default_rng(0), [], []
    hidden, head = random.normal(size=(8, 64, 32)), random.normal(size=(96, 32))
    target, weight = random.integers(0, 96, (8, 64)), random.random((8, 64))
    arrays = [np.asarray(x, np.int32 if x is target else np.float32) for x in (hidden, head, target, weight)]
    specs = rows, PartitionSpec("tensor", "fsdp"), rows, rows
    for chunk in (128, 16):
        monkeypatch.setattr(model, "LOSS_CHUNK", {"cpu": chunk})
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
            gradient = jax.jit(
                jax.grad(lambda *x: summed_cross_entropy(*x, 96), (0, 1)),
                out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs[:2]),
            )
            program = gradient.lower(*placed).compile()
            found.append(program(*placed))
        large = [talk for talk in collectives(read_program(program.as_text() or ""), 8) if talk.bytes > 1024]
        sent.append(sum(talk.bytes for talk in large))
    assert sent[0] == sent[1] > 0
    logits = hidden @ head.T
    slope = np.exp(logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))) - np.eye(96)[target]
    expected = np.einsum("btv,ve,bt->bte", slope, head, weight), np.einsum("btv,bte,bt->ve", slope, hidden, weight)
    for gradients in found:
        for ours, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4)
