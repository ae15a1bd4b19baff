"""`pretrain --count` and `sft --count`: how many rows and steps an epoch of the data has, streamed data too."""

import math

from rich.progress import Progress

from lacuna.checkpoint import settled
from lacuna.config import RowsConfig
from lacuna.streaming import StreamedData
from lacuna.trainer import read_inputs


def count_rows(config: RowsConfig) -> None:
    """Print the rows and steps of an epoch: of streamed data by one pass over the first source, all of it encoded."""
    config = settled(config)
    _, dataset = read_inputs(config, with_weights=False, place={})
    rows = 0
    if isinstance(dataset, StreamedData):
        with Progress(transient=True) as line:
            task = line.add_task("Counting rows", total=1.0)
            while dataset.epochs_before(rows) < 1:
                dataset.batch(rows, 1)
                rows += 1
                line.update(task, completed=dataset.epochs_before(rows))
    else:
        rows = dataset.row_count(1)
    print(f"data: {dataset.description}")
    print(
        f"{rows:,} rows of {config.sequence_length} tokens an epoch of {config.data[0].path}: set steps to "
        f"{math.ceil(rows / config.batch_size)} for each, {config.batch_size} rows a step"
    )
