"""Check attention's values and gradients on this machine's devices against a plain formula.

The tests compile the kernels of GPUs and TPUs; their values can only be checked where there is such a device:

    uv run --extra cuda python scripts/check_attention.py
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from lacuna.attention import MOST_DOCUMENTS, attention, choose_backend
from lacuna.config import ModelKeys
from lacuna.distributed import make_mesh

# Heads, group, size of a head, length of a row, and the lengths of its documents; the rest of the row is padding
CASES = [
    (2, 6, 128, 1024, [400, 1, 300, 323]),
    (2, 7, 64, 1000, [3, 500, 200]),
    (4, 1, 64, 257, [257]),
    (1, 2, 64, 512, [4] * (MOST_DOCUMENTS + 2)),
]
TOLERANCE = 2e-2  # of the largest value, in bfloat16


def plain(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array) -> jax.Array:
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision="highest") * query.shape[-1] ** -0.5
    visible = jnp.tri(segment.shape[1], dtype=bool) & (segment[:, :, None] == segment[:, None])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value, precision="highest")


def main() -> int:
    config, mesh, is_right = ModelKeys(model_name="none"), make_mesh(1, 0, 1), True
    for kv_heads, group, head, length, lengths in CASES:
        backend, line = choose_backend(config, mesh, head)
        row = np.zeros(length, np.int32)
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segment = jnp.asarray(np.stack([row, np.minimum(row, 1)] * mesh.size))
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(len(segment), length, kv_heads, *axes, head) for axes in ((group,), (), (), (group,))]
        *inputs, gradient = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True))
        is_real = (segment > 0)[..., None, None, None]  # the values of padding do not matter

        def results(attend, inputs=inputs, gradient=gradient, segment=segment, is_real=is_real):
            def run(*inputs):
                mixed, pull = jax.vjp(lambda *inputs: attend(*inputs, segment) * is_real, *inputs)
                return mixed, *pull(gradient.astype(mixed.dtype))

            return [np.asarray(x, np.float32) for x in jax.jit(run)(*inputs)]

        with jax.set_mesh(mesh):
            ours = results(lambda *arrays, backend=backend: attention(*arrays, backend=backend))
        errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, results(plain), strict=True)]
        fits = all(error < TOLERANCE for error in errors)  # a nan does not
        is_right &= fits
        shape = f"{kv_heads} × {group} heads of {head}, {len(lengths)} documents in {length} tokens"
        print(f"{line}; {shape}: {', '.join(f'{error:.1e}' for error in errors)} {'right' if fits else 'WRONG'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
