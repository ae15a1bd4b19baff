"""Cut a byte-level BPE tokenizer to the pieces that occur in some rows, for small models from scratch.

    uv run python scripts/cut_vocabulary.py SOURCE DIRECTORY rows.jsonl ... [--words new_tokens.txt]

SOURCE has tokenizer.json and tokenizer_config.json; DIRECTORY gets both, cut. Every text of the rows, outside the new
words, which are given to sft, has the same pieces afterwards, and other texts can still be written, byte by byte.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import tokenizers


def cut(raw: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """The tokenizer with the pieces that are used, those that they are merged from, and all bytes."""
    vocabulary, merges = raw["model"]["vocab"], raw["model"]["merges"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    parts = {"".join(pair): pair for pair in reversed(pairs)}
    kept, waiting = set[str](), list(used)
    while waiting:
        piece = waiting.pop()
        if piece not in kept:
            kept.add(piece)
            waiting += parts.get(piece, [])
    kept |= {piece for piece in vocabulary if len(piece) == 1}
    ordered = sorted(kept, key=vocabulary.__getitem__)
    added = [token | {"id": len(ordered) + place} for place, token in enumerate(raw["added_tokens"])]
    fewer = [pair for pair in pairs if "".join(pair) in kept and set(pair) <= kept]
    model = raw["model"] | {"vocab": {piece: id for id, piece in enumerate(ordered)}, "merges": fewer}
    return raw | {"model": model, "added_tokens": added}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--words", type=Path)
    given = parser.parse_args()
    raw = json.loads((given.source / "tokenizer.json").read_text())
    whole = tokenizers.Tokenizer.from_str(json.dumps(raw))
    words = given.words.read_text().split() if given.words else []
    apart = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
    rows = [json.loads(line) for path in given.rows for line in path.read_text().splitlines()]
    texts = [text for row in rows for key in ("prompt", "completion") for text in apart.split(row[key]) if text]
    texts = list(dict.fromkeys(texts))
    pieces = [encoding.tokens for encoding in whole.encode_batch(texts, add_special_tokens=False)]
    named = {token["content"] for token in raw["added_tokens"]}
    smaller = cut(raw, {piece for each in pieces for piece in each} - named)
    after = tokenizers.Tokenizer.from_str(json.dumps(smaller)).encode_batch(texts, add_special_tokens=False)
    different = [text for text, old, new in zip(texts, pieces, after, strict=True) if old != new.tokens]
    given.directory.mkdir(parents=True, exist_ok=True)
    (given.directory / "tokenizer.json").write_text(json.dumps(smaller, ensure_ascii=False))
    shutil.copyfile(given.source / "tokenizer_config.json", given.directory / "tokenizer_config.json")
    config = json.loads((given.directory / "tokenizer_config.json").read_text())
    ids = {token["content"]: str(token["id"]) for token in smaller["added_tokens"]}
    decoder = {ids[token["content"]]: token for token in config.get("added_tokens_decoder", {}).values()}
    config |= {"added_tokens_decoder": decoder}
    (given.directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    count, before = (len(each["model"]["vocab"]) + len(ids) for each in (smaller, raw))
    print(f"{count:,} of {before:,} tokens; {len(different)} of {len(texts):,} texts differ")


main()
