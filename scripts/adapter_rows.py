"""Write the rows of a config of sft in the order in which training takes them, for another trainer to train on.

    uv run python scripts/adapter_rows.py ROWS COUNT --model-name MODEL --no-packing --data.0.path CHATS [OPTION ...]

Each line of ROWS is one chat: `input_ids`, and `labels` that are -100 where the loss does not count, as
scripts/reference_adapter_run.py reads them. Give it the options of the run that it is compared with.
"""

import json
import sys
from pathlib import Path

from lacuna.cli import parse, prepare_process
from lacuna.config import SftConfig


def main() -> None:
    path, count, *arguments = sys.argv[1:]
    config = parse(SftConfig, ["--run-name", "rows", *arguments], "adapter_rows")
    if config.packing:
        sys.exit("add --no-packing: a row must be one chat")
    prepare_process()
    from lacuna import checkpoint, trainer

    dataset = trainer.read_inputs(checkpoint.settled(config), with_weights=False, place={})[1]
    batch = dataset.batch(0, int(count))
    lines = []
    for token, target, weight, segment in zip(batch.token, batch.target, batch.weight, batch.segment, strict=True):
        length = int(segment.sum())
        labels = [-100, *(int(t) if w else -100 for t, w in zip(target[:length], weight[:length], strict=True))]
        lines.append(json.dumps({"input_ids": [*token[:length].tolist(), int(target[length - 1])], "labels": labels}))
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
