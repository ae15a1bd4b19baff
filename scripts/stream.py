"""Make a corpus of any size, and time how it is streamed; each prints one JSON line.

    uv run python scripts/stream.py make /tmp/corpus 20 shakespeare.txt    # gigabytes, of documents of a text's lines
    uv run python scripts/stream.py read "/tmp/corpus/*.jsonl" TOKENIZER_DIRECTORY 30    # megabytes of tokens' text

`read` has no device at work: the rate is that of reading and encoding alone.
"""

import json
import random
import resource
import sys
import time
from pathlib import Path

from lacuna.config import PretrainConfig
from lacuna.streaming import StreamedData
from lacuna.tokenizer import load_tokenizer

FILE_BYTES = 25_000_000
BYTES_PER_TOKEN = 4


def make(directory: Path, size: float, text: Path) -> dict[str, float]:
    """Eight different files, which are then repeated under other names."""
    directory.mkdir(parents=True, exist_ok=True)
    lines, draw, written, count = text.read_text().splitlines(), random.Random(0), 0, 0
    while written < size:
        path = directory / f"{count:04}.jsonl"
        if count >= 8:
            path.write_bytes((directory / f"{count % 8:04}.jsonl").read_bytes())
        else:
            with path.open("w") as file:
                while file.tell() < min(FILE_BYTES, size):
                    start = draw.randrange(len(lines))
                    document = [str(draw.random()), *lines[start : start + draw.randrange(5, 90)]]
                    file.write(json.dumps({"text": "\n".join(document)}) + "\n")
        written, count = written + path.stat().st_size, count + 1
    return {"files": count, "bytes": written}


def read(path: str, tokenizer: Path, size: float) -> dict[str, float]:
    """Seconds until the source is found and compared, and until the first row; rates; the peak of memory."""
    loaded, began = load_tokenizer(tokenizer), time.perf_counter()
    data = ({"path": path, "streaming": True},)
    config = PretrainConfig.model_validate(
        {"model_name": "-", "run_name": "-", "steps": 1, "sequence_length": 2048, "data": data}
    )
    busy, stream = time.process_time(), StreamedData(config, loaded, {})
    found = time.perf_counter() - began
    stream.batch(0, 1)
    first, row = time.perf_counter() - began, 1
    while stream.facts["tokens"] * BYTES_PER_TOKEN < size:
        stream.batch(row, 1)
        row += 1
    seconds = time.perf_counter() - began
    return {
        "found_seconds": found,
        "first_row_seconds": first,
        "documents_per_second": stream.facts["documents"] / seconds,
        "tokens_per_second": stream.facts["tokens"] / seconds,
        "tokens_per_processor_second": stream.facts["tokens"] / (time.process_time() - busy),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", directory, gigabytes, text]:
            print(json.dumps(make(Path(directory), float(gigabytes) * 1e9, Path(text))))
        case ["read", path, tokenizer, megabytes]:
            print(json.dumps(read(path, Path(tokenizer), float(megabytes) * 1e6)))
        case _:
            raise SystemExit(__doc__)
