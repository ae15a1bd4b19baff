"""`pretrain --count` and `sft --count`: how many rows and steps an epoch of the data has, streamed data too."""

import math
import sys

from rich.progress import Progress

from lacuna.checkpoint import settled
from lacuna.config import RowsConfig
from lacuna.distributed import is_first, writing_to
from lacuna.streaming import StreamedData
from lacuna.trainer import read_inputs


def count_rows(config: RowsConfig) -> None:
    """Print the rows and steps of an epoch: of streamed data by one pass over the first source, all of it encoded, the
    result of which is kept for runs by epochs."""
    config = settled(config)
    _, dataset = read_inputs(config, with_weights=False, place={})
    if isinstance(dataset, StreamedData) and not dataset.epoch_rows:
        rows = counted_rows(dataset)
        if is_first():
            with writing_to(config.cache_dir):
                dataset.keep_count(rows)
    else:
        rows = dataset.row_count(1)
    print(f"data: {dataset.description}")
    steps = math.ceil(rows / config.batch_size)
    kept = "; it is kept, so epochs will do instead" if config.is_streaming else ""
    print(
        f"{rows:,} rows of {config.sequence_length} tokens an epoch of {config.data[0].path}: set steps to {steps:,} "
        f"for each, {config.batch_size} rows a step{kept}"
    )


def counted_rows(dataset: StreamedData) -> int:
    """The rows that begin in the first epoch, each of which is read and encoded."""
    rows = 0
    with Progress(transient=True, disable=not sys.stdout.isatty()) as line:
        task = line.add_task("Counting rows", total=1.0)
        while (share := dataset.epochs_before(rows)) < 1:
            line.update(task, completed=share)
            dataset.batch(rows, 1)
            rows += 1
    return rows
