"""Whether transformers reads an exported model with new words as lacuna does: the same ids, and logits of theirs.

Run twice, where each is installed; the second prints the difference:

    python scripts/reference_new_words.py transformers runs/NAME/model words.txt reference.json
    uv run python scripts/reference_new_words.py lacuna runs/NAME/model words.txt reference.json
"""

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = "Next after {0}{1}, please:\n{2}\n", "{1} {2}{0} a\n\n{3}", "no new word here, 12 of 30"


def read_by_transformers(directory: str, texts: list[str]) -> dict[str, Any]:
    import torch  # ty: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer  # ty: ignore[import-not-found]

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    with torch.no_grad():
        logits = [model(torch.tensor([each])).logits[0, -1].tolist() for each in ids]
    return {"ids": ids, "logits": logits, "text": [tokenizer.decode(each, skip_special_tokens=True) for each in ids]}


def read_by_lacuna(directory: str, texts: list[str]) -> dict[str, Any]:
    import jax.numpy as jnp

    from lacuna.distributed import make_mesh
    from lacuna.model import embed, forward, head_of, logits_of, read_model_config
    from lacuna.tokenizer import decode, encode, load_tokenizer
    from lacuna.weights import load_params

    tokenizer, model = load_tokenizer(Path(directory)), read_model_config(Path(directory))
    params = load_params(Path(directory), model, make_mesh(1, 0, 1))
    ids, logits = [encode(tokenizer, text, add_special_tokens=False) for text in texts], []
    for each in ids:
        token = jnp.asarray(each)[None]
        hidden = forward(
            params, embed(params, token, "float32"), jnp.ones_like(token), jnp.arange(token.shape[1])[None], model
        )
        logits.append(logits_of(hidden, head_of(params, model), model.vocabulary_size)[0, -1].tolist())
    return {
        "ids": [each.tolist() for each in ids],
        "logits": logits,
        "text": [decode(tokenizer, each, skip_special_tokens=True) for each in ids],
    }


def main(reader: str, directory: str, words: str, reference: str) -> None:
    given = Path(words).read_text().split("\n")
    texts = [text.format(*given) for text in TEXTS]
    if reader == "transformers":
        Path(reference).write_text(json.dumps(read_by_transformers(directory, texts)))
        return
    ours, theirs = read_by_lacuna(directory, texts), json.loads(Path(reference).read_text())
    assert ours["ids"] == theirs["ids"], (ours["ids"], theirs["ids"])
    assert ours["text"] == theirs["text"] == texts, (ours["text"], theirs["text"])
    pairs = zip(ours["logits"], theirs["logits"], strict=True)
    largest = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    print(f"the same ids and texts; logits of {len(ours['logits'][0]):,} words differ by at most {largest:.2g}")


main(*sys.argv[1:])
