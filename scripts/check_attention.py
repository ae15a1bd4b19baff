"""Check attention's values and gradients on this machine's devices against a plain formula, as `check` does on the rows
of a run, for shapes that are hard on kernels.

The tests compile the kernels of GPUs and TPUs; their values can only be checked where there is such a device:

    uv run --extra cuda python scripts/check_attention.py
"""

import sys

import jax
import numpy as np

from lacuna.apps.promises import KERNEL, attention_errors
from lacuna.attention import MOST_DOCUMENTS, choose_backend
from lacuna.config import ModelKeys
from lacuna.distributed import make_mesh

# Heads, group, size of a head, length of a row, and the lengths of its documents; the rest of the row is padding
CASES = [
    (2, 6, 128, 1024, [400, 1, 300, 323]),
    (2, 7, 64, 1000, [3, 500, 200]),
    (4, 1, 64, 257, [257]),
    (1, 2, 64, 512, [4] * (MOST_DOCUMENTS + 2)),
]


def main() -> int:
    config, mesh, is_right = ModelKeys(model_name="none"), make_mesh(1, 0, 1), True
    for kv_heads, group, head, length, lengths in CASES:
        backend, line = choose_backend(config, mesh, head)
        row = np.zeros(length, np.int32)
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segment = np.stack([row, np.minimum(row, 1)] * mesh.size)
        with jax.set_mesh(mesh):
            errors = attention_errors((kv_heads, group, head), segment, backend, "bfloat16")
        fits = all(error <= KERNEL["bfloat16"] for error in errors)  # a nan does not
        is_right &= fits
        shape = f"{kv_heads} × {group} heads of {head}, {len(lengths)} documents in {length} tokens"
        print(f"{line}; {shape}: {', '.join(f'{error:.1e}' for error in errors)} {'right' if fits else 'WRONG'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
