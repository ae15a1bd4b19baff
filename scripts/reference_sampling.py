"""Make tests/reference/sampling.npz: what transformers' logits processors leave of random logits, one set a row.

Runs in the environment that scripts/reference_models.py describes:

    ../torch-environment/bin/python scripts/reference_sampling.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
from transformers.generation import logits_process  # ty: ignore[import-not-found]

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"
VOCABULARY, ROWS, SEEN = 300, 12, 20


def main() -> None:
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((ROWS, VOCABULARY))).astype(np.float32)
    seen = random.integers(VOCABULARY, size=(ROWS, SEEN), dtype=np.int32)
    rules = {
        "repetition_penalty": random.choice([1.0, 1.3, 0.7], ROWS),
        "temperature": random.choice([0.3, 1.0, 1.7], ROWS),
        "top_k": random.choice([0, 1, 5, 50, 1000], ROWS),
        "top_p": random.choice([0.05, 0.5, 0.9, 1.0], ROWS),
        "min_p": random.choice([0.0, 0.02, 0.3], ROWS),
    }
    processors = {
        "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    neutral = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def processed(row: int, names: list[str]) -> np.ndarray:
        ids, scores = torch.tensor(seen[row : row + 1], dtype=torch.long), torch.tensor(logits[row : row + 1])
        for name in names:
            if (value := rules[name][row].item()) != neutral[name]:
                scores = processors[name](value)(ids, scores)
        return scores[0].numpy()

    alone = {name: np.stack([processed(row, [name]) for row in range(ROWS)]) for name in processors}
    together = np.stack([processed(row, list(processors)) for row in range(ROWS)])
    arrays: dict[str, Any] = {f"only_{name}": scores for name, scores in alone.items()} | rules
    arrays |= {"logits": logits, "seen": seen, "together": together}
    np.savez_compressed(REFERENCE / "sampling.npz", **arrays)


if __name__ == "__main__":
    main()
