"""Print Markdown tables of what plan reports for models and accelerators.

    uv run --extra cuda --extra tpu python scripts/plan_tables.py CONFIGS fits|scale

CONFIGS is a folder with a config.json for each model, in folders named after them (Qwen2.5-7B-Instruct, ...). `fits`
asks which micro-batch and rematerialisation fit, `scale` how one model runs on 8, 64 and 256 devices.
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
    Row(model, topology, length, size, kind)
    for model, topology, length, tried in (
        ("Qwen2.5-7B-Instruct", "h200:8", 4096, {"none": (2, 4), "matmuls": (4, 8, 16), "layer": (64,)}),
        ("Qwen2.5-1.5B-Instruct", "h100:1", 4096, {"none": (2, 4), "matmuls": (4, 8), "layer": (64,)}),
        ("Qwen3-0.6B", "rtx4090:1", 2048, {"matmuls": (4, 8), "layer": (16,)}),
        ("Llama-3.1-8B-Instruct", "v5e:16", 2048, {"matmuls": (1,), "layer": (1, 2, 4)}),
        ("Llama-3.1-8B-Instruct", "v6e:8", 4096, {"matmuls": (1,), "layer": (1,)}),
    )
    for kind, sizes in tried.items()
    for size in sizes
]
IN_NODES = {64: ("--data-parallel", "8", "--fsdp", "8"), 256: ("--data-parallel", "32", "--fsdp", "8")}
SCALE = [
    Row(model, f"h100:{devices}", 4096, size, "matmuls", more)
    for model, size in {"Qwen2.5-1.5B-Instruct": 2, "Qwen2.5-7B-Instruct": 1}.items()
    for devices in (8, 64, 256)
    for more in ((), IN_NODES.get(devices))
    if more is not None
] + [Row("Qwen2.5-7B-Instruct", "h100:64", 4096, 4, "matmuls")]
COLUMNS = (
    "model", "devices", "mesh", "rows × tokens", "recomputed", "a device holds", "fits", "sends",
    "through its network card", "compute", "sending, hidden + waited for", "least step", "tokens/s", "MFU at most",
    "compiled in",
)  # fmt: skip
LIMIT_SECONDS = 720


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
    """What plan writes for one micro-batch per device; nothing where it took too long."""
    devices = int(row.topology.partition(":")[2])
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            "--model-name", configs / row.model, "--topology", row.topology, "--sequence-length", row.sequence_length,
            "--micro-batch-size", row.micro_batch_size, "--batch-size", row.micro_batch_size * devices,
            "--rematerialisation", row.rematerialisation, "--plan-file", file.name, "--run-name", "planned",
            "--data.0.path", "unread", "--no-search", *row.more,
        ]  # fmt: skip
        program = [sys.executable, "-c", "from lacuna.cli import main; main()", "plan", "pretrain", *map(str, command)]
        quiet = subprocess.DEVNULL
        try:
            subprocess.run(program, check=True, stdout=quiet, stderr=subprocess.PIPE, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return {}
        except subprocess.CalledProcessError as error:
            sys.exit(f"{row.model} on {row.topology}: {error.stderr.decode().strip()}")
        return json.loads(Path(file.name).read_text())


def through_card(collective: dict[str, Any], per_node: int) -> float:
    """Bytes that each device's network card sends; a ring between nodes is spread over those of all its devices."""
    if collective["reach"] <= per_node:
        return 0.0
    return collective["bytes"] / max(collective["group"] * per_node // collective["reach"], 1)


def cells(row: Row, facts: dict[str, Any]) -> Iterator[str]:
    yield from (row.model, row.topology, " × ".join(str(size) for size in facts["mesh"].values()) if facts else "")
    yield f"{row.micro_batch_size} × {row.sequence_length}"
    if not facts:
        yield from (row.rematerialisation, f"not compiled in {LIMIT_SECONDS} s")
        return
    if not facts["programs"]:
        yield from (row.rematerialisation, "more than the compiler has", "no")
        return
    step = facts["programs"][0]
    yield f"{row.rematerialisation} ({percent(facts['recomputed_share'])})"
    yield byte_size(step["bytes"])
    yield "yes" if facts["fits"] else "no"
    if step["moved_bytes"]:
        yield byte_size(sum(each["bytes"] for each in step["collectives"]))
        yield byte_size(sum(through_card(each, facts["chip"]["per_node"]) for each in step["collectives"]))
        yield f"{step['compute_seconds']:.3g} s"
        yield f"{step['overlapped_seconds']:.2g} + {step['exposed_seconds']:.2g} s"
        yield f"{step['seconds']:.3g} s"
        yield short(facts["tokens_per_second"])
        yield percent(facts["mfu"])
    else:  # the compiler's text could not be read
        yield from ("not known", "not known", f"{step['compute_seconds']:.3g} s", *["not known"] * 4)
    yield f"{step['compile_seconds']:.0f} s"


if __name__ == "__main__":
    main()
