"""A plain loop with transformers' beam search over a catalogue, for `scripts/bench.py recommend`, which starts it.

Needs an environment of its own with torch and transformers. Reads one line of JSON: the directory of a model, prompts
and paths of the catalogue as tokens, beams, prompts at once. Prints true when it is ready, and for each further line
the seconds that all prompts took, and the paths found for each, best first.
"""

import json
import sys
import time
from typing import Any

import torch  # ty: ignore[import-not-found]
from transformers import AutoModelForCausalLM  # ty: ignore[import-not-found]


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    prompts, paths, beams, size = asked["prompts"], asked["paths"], asked["beams"], asked["batch_size"]
    end, depth = paths[0][-1], max(map(len, paths))
    trie: dict[int, Any] = {}
    for path in paths:
        node = trie
        for token in path:
            node = node.setdefault(token, {})

    def recommend(batch: list[list[int]]) -> list[list[list[int]]]:
        longest = max(map(len, batch))
        tokens = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])

        def allowed(_: int, written: torch.Tensor) -> list[int]:
            node: Any = trie
            for token in written[longest:].tolist():
                node = node.get(token, {})
            return list(node) or [end]

        found = model.generate(
            tokens, attention_mask=mask, num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
            max_new_tokens=depth, do_sample=False, prefix_allowed_tokens_fn=allowed, pad_token_id=end, eos_token_id=end,
        )  # fmt: skip
        return found[:, longest:].reshape(len(batch), beams, -1).tolist()

    print("true", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        with torch.inference_mode():
            found = [each for at in range(0, len(prompts), size) for each in recommend(prompts[at : at + size])]
        print(json.dumps([time.perf_counter() - began, found]), flush=True)


main()
