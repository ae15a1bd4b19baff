"""Print tables of what plan says for models and accelerators, in Markdown.

    uv run --extra cuda --extra tpu python scripts/plan_tables.py CONFIGS fits|scale

CONFIGS is a folder with a config.json for each model, in folders named after them (Qwen2.5-7B-Instruct, ...). `fits`
asks which micro-batch and rematerialisation fit, `scale` what becomes of one model on 8, 64 and 256 devices.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lacuna.metrics import byte_size, percent, short


class Row(NamedTuple):
    model: str
    topology: str
    sequence_length: int
    micro_batch_size: int
    rematerialisation: str
    more: tuple[str, ...] = ()


FITS = [
    Row("Qwen2.5-7B-Instruct", "h200:8", 4096, 1, "none"),
    Row("Qwen2.5-7B-Instruct", "h200:8", 4096, 2, "none"),
    Row("Qwen2.5-1.5B-Instruct", "h100:1", 4096, 1, "none"),
    Row("Qwen2.5-1.5B-Instruct", "h100:1", 4096, 2, "none"),
    Row("Qwen2.5-1.5B-Instruct", "h100:1", 4096, 4, "matmuls"),
    Row("Qwen3-0.6B", "rtx4090:1", 2048, 1, "matmuls"),
    Row("Qwen3-0.6B", "rtx4090:1", 2048, 2, "layer"),
    Row("Llama-3.1-8B-Instruct", "v5e:16", 2048, 1, "layer"),
    Row("Llama-3.1-8B-Instruct", "v6e:8", 2048, 1, "layer"),
]
SCALE = [
    Row("Qwen2.5-1.5B-Instruct", "h100:8", 4096, 2, "none"),
    Row("Qwen2.5-1.5B-Instruct", "h100:64", 4096, 2, "none"),
    Row("Qwen2.5-1.5B-Instruct", "h100:64", 4096, 2, "none", ("--data-parallel", "8", "--fsdp", "8")),
    Row("Qwen2.5-1.5B-Instruct", "h100:256", 4096, 2, "none", ("--data-parallel", "32", "--fsdp", "8")),
    Row("Qwen2.5-7B-Instruct", "h100:8", 4096, 1, "none"),
    Row("Qwen2.5-7B-Instruct", "h100:64", 4096, 1, "none"),
    Row("Qwen2.5-7B-Instruct", "h100:64", 4096, 1, "none", ("--data-parallel", "8", "--fsdp", "8")),
    Row("Qwen2.5-7B-Instruct", "h100:256", 4096, 1, "none", ("--data-parallel", "32", "--fsdp", "8")),
]
COLUMNS = (
    "model", "devices", "mesh", "rows × tokens", "recomputed", "a device holds", "fits", "sent a device and step",
    "least step", "tokens/s", "MFU at most",
)  # fmt: skip


def main() -> None:
    match sys.argv[1:]:
        case [configs, "fits"]:
            rows = FITS
        case [configs, "scale"]:
            rows = SCALE
        case _:
            sys.exit(__doc__)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(cells(row, planned(Path(configs), row))) + " |", flush=True)


def planned(configs: Path, row: Row) -> dict[str, Any]:
    """What plan writes down for one micro-batch a step on each device."""
    devices = int(row.topology.partition(":")[2])
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            "--model-name", configs / row.model, "--topology", row.topology, "--sequence-length", row.sequence_length,
            "--micro-batch-size", row.micro_batch_size, "--batch-size", row.micro_batch_size * devices,
            "--rematerialisation", row.rematerialisation, "--plan-file", file.name, "--run-name", "planned",
            "--data.0.path", "unread", "--no-search", *row.more,
        ]  # fmt: skip
        program = [sys.executable, "-c", "from lacuna.cli import main; main()", "plan", "pretrain", *map(str, command)]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())


def cells(row: Row, facts: dict[str, Any]) -> Iterator[str]:
    step = facts["programs"][0]
    yield from (row.model, row.topology, " × ".join(str(size) for size in facts["mesh"].values()))
    yield f"{row.micro_batch_size} × {row.sequence_length}"
    yield f"{row.rematerialisation} ({percent(facts['recomputed_share'])})"
    yield byte_size(step["bytes"])
    yield "yes" if facts["fits"] else "no"
    yield byte_size(sum(each["bytes"] for each in step["collectives"]))
    yield f"{step['seconds']:.3g} s"
    yield short(facts["tokens_per_second"])
    yield percent(facts["mfu"])


if __name__ == "__main__":
    main()
