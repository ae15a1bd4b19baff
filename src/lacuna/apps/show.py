"""`sft --show`: the first rows that would be trained on, supervised text in green."""

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from lacuna.checkpoint import settled
from lacuna.config import LINES, SftConfig, printable
from lacuna.data import Batch, describe
from lacuna.tokenizer import Tokenizer, decode
from lacuna.trainer import read_inputs


def show_rows(config: SftConfig) -> None:
    """Print the first rows of a config's data; without colours ⟦ ⟧ are around what is learned."""
    console = Console(highlight=False)
    config = settled(config)
    opened, dataset = read_inputs(config, with_weights=False, place={})
    for row in range(config.show if config.is_streaming else min(config.show, dataset.row_count(1))):
        console.rule(f"row {row + 1}")
        text = coloured(dataset.batch(row, 1), 0, opened.tokenizer, has_marks=not console.is_terminal)
        console.print(text, soft_wrap=True)
    console.print(f"data: {describe(dataset.facts)}")
    for example in dataset.bad_examples:
        console.print(Text(printable(f"left out: {example}", LINES)), soft_wrap=True)


def coloured(batch: Batch, row: int, tokenizer: Tokenizer, has_marks: bool) -> Text:
    """A packed row as text: what is learned is green (or in ⟦ ⟧), its context dim, with a line before each document."""
    text = Text()
    for segment in range(1, int(batch.segment[row].max()) + 1):
        here = np.flatnonzero(batch.segment[row] == segment)
        ids = [batch.token[row, here[0]], *batch.target[row, here]]
        is_learned = [False, *(batch.weight[row, here] > 0)]
        text.append(f"── document {segment}: {len(here)} tokens, {sum(is_learned)} supervised ──\n", style="bold cyan")
        for learned, run in groupby(zip(is_learned, ids, strict=True), lambda pair: pair[0]):
            written = printable(decode(tokenizer, [int(each) for _, each in run]), LINES)
            text.append(f"⟦{written}⟧" if learned and has_marks else written, style="green" if learned else "dim")
        text.append("\n")
    return text
