"""What every task needs: the model under test, a sampler for it, and the answers kept so far."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from lacuna.config import EvalConfig, UserError
from lacuna.distributed import is_first, row_shards
from lacuna.sampler import Sampler
from lacuna.weights import OpenedModel

Line = dict[str, Any]
Figures = dict[str, Any]
Tick = Callable[[int, int], None]


class Subject(NamedTuple):
    """A model under test, on its devices."""

    model: OpenedModel
    params: PyTree[Array]
    mesh: Mesh


def capacity_of(page: EvalConfig, model: OpenedModel) -> int:
    """Most tokens of prompt and answer together."""
    return min(page.capacity, model.config.max_positions, model.config.sliding_window or page.capacity)


def sampler_for(page: EvalConfig, subject: Subject, wanted: int) -> Sampler:
    """A sampler with no more slots than are wanted."""
    (_, config, tokenizer), params, mesh = subject
    shards = row_shards(mesh)
    slots = -(-min(page.slots, wanted) // shards) * shards
    return Sampler(params, config, tokenizer, mesh, slots, capacity_of(page, subject.model), page.compute_dtype)


def seed_of(seed: int, name: Any) -> int:
    """A seed for one of many requests."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


class Predictions:
    """Answers by task, row and sample, each a line of a file once it is there; those of an earlier start go before."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if is_first() else None
        kept = kept_lines(path) if path else []
        self.lines = {(line["task"], line["row"], line["sample"]): line for line in kept}

    def digest(self) -> str:
        """A hash of what is known."""
        return hashlib.sha256(repr(sorted(self.lines, key=repr)).encode()).hexdigest()

    def add(self, task: str, row: Any, sample: int, content: Line) -> None:
        """Keep an answer. Raises UserError where it can't be written."""
        if (task, row, sample) in self.lines:
            return
        line = {"task": task, "row": row, "sample": sample} | content
        self.lines[task, row, sample] = line
        if self.path:
            try:
                with self.path.open("ab", buffering=0) as file:
                    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            except OSError as error:
                raise UserError(f"{self.path}: {error.strerror}; mend that, and the same command goes on") from error

    def of(self, task: str) -> list[Line]:
        """The lines of a task in the order of rows and samples."""
        found = [line for (name, _, _), line in self.lines.items() if name == task]
        return sorted(found, key=lambda line: (line["row"], line["sample"]))


def kept_lines(path: Path) -> list[Line]:
    """The whole lines of a file of predictions, from which a half-written last one is cut off.

    Raises:
        UserError: another line is damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content and is_first():
        os.truncate(path, content.rfind(b"\n") + 1)
    lines = []
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            lines.append(line | {"task": line["task"], "row": line["row"], "sample": line["sample"]})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is damaged; remove it, or start anew with --overwrite") from error
    return lines
