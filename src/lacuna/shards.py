"""Shards: the files of a source that is streamed, found, compared and read in blocks of neighbouring rows.

A jsonl file is cut at every `BLOCK_BYTES` without being read: a block holds the lines that begin in its range. A block
of a parquet table is a row group, and a txt file is one document, so one block.
"""

import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import time
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import ENOSPC
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lacuna.config import DataSource, UserError
from lacuna.documents import (
    COMPRESSED,
    MAX_LINE_BYTES,
    BadFile,
    hub_refusal,
    kind_of,
    line_value,
    local_files,
    open_file,
    quieten_hub,
    skip_line,
    split_range,
    text_columns,
    undecoded,
)
from lacuna.metrics import byte_size, write_atomically

BLOCK_BYTES = 2**18
EDGE_BYTES = 2**16  # at both ends of a file, by which a change is seen
MAX_TEXT_BYTES = 2**28  # of a txt file, which is held whole
STREAMED = (".jsonl", ".ndjson", ".parquet", ".txt")
RETRY_SECONDS = (1, 4, 15)  # before a file is read again that could not be read
# What file systems say of a file that was changed.
CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5")
READERS = 16  # threads that look at files, most of whose time is waiting

Rows = Sequence[tuple[Any, Any]]  # each row with its origin; None where a line is empty


class UnreadableShard(OSError):
    """What could not be read of a file, with its place."""


class Shard(NamedTuple):
    """A file of a streamed source: its size in bytes, -1 where that is not known before it is fetched, what else
    tells that it was changed, the column that a text is given, and where it is fetched from, if `path` is its copy."""

    path: Path
    size: int
    changed: str
    text_column: str
    address: str = ""

    @property
    def name(self) -> str:
        return self.address or str(self.path)

    @property
    def kind(self) -> str:
        return kind_of(self.path)

    @property
    def is_sequential(self) -> bool:
        """Whether its blocks can only be read one after the other."""
        return self.kind in (".jsonl", ".ndjson") and self.path.suffix.lower() in COMPRESSED


# Finding and comparing


def find_shards(source: DataSource, directory: Path, revision: str) -> tuple[list[Shard], str]:
    """The files of a source, none of which is opened or fetched, and of a data set on the hub its revision: the one
    that is asked for, or else the newest.

    Raises:
        UserError: no such file, an empty one, one of a kind that is not streamed, or a slice of files.
    """
    if "[" in source.split:
        raise UserError(
            f"{source.path}: split {source.split!r} can't be streamed, as nothing counts the rows of streamed files; "
            "hold out whole files and leave them out of the path"
        )
    shards = list[Shard]()
    if "://" in source.path:
        shards = remote_shards(source, directory)
    elif files := local_files(source.path):
        split_range(source, 0)
        for path in files:
            facts = path.stat()
            shards.append(Shard(path, facts.st_size, str(facts.st_mtime_ns), source.text_column))
    else:
        revision, addresses = hub_files(source, directory, revision)
        shards = [remote_shard(source, directory, address, -1, "") for address in addresses]
    for shard in shards:
        if shard.kind not in STREAMED:
            raise UserError(
                f"{shard.name}: files of this kind are not streamed; {', '.join(STREAMED)} are, and compressed as "
                f"{' or '.join(COMPRESSED)}; convert it, or leave out streaming"
            )
        if not shard.size:
            raise UserError(f"{shard.name}: it holds no rows; fill it, or leave it out of the path")
        if shard.kind == ".txt" and shard.size > MAX_TEXT_BYTES:
            raise UserError(
                f"{shard.name}: a txt file is one document and held whole, and this one is larger than "
                f"{byte_size(MAX_TEXT_BYTES)}; write its documents as lines of jsonl"
            )
    return shards, revision


def remote_shard(source: DataSource, directory: Path, address: str, size: int, changed: str) -> Shard:
    """A file that is fetched to a directory when it is needed."""
    name = hashlib.sha256(f"{address} {size} {changed}".encode()).hexdigest()[:16]
    return Shard(directory / f"{name}-{address.rpartition('/')[2]}", size, changed, source.text_column, address)


def remote_shards(source: DataSource, directory: Path) -> list[Shard]:
    """The files at an address that a file system of fsspec reads, as s3://bucket/*.jsonl."""
    import fsspec

    try:
        system, path = fsspec.url_to_fs(os.path.expanduser(source.path))
        found = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        facts = [system.info(each) for each in found]
    except Exception as error:  # of file systems of all kinds
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"data path {source.path!r} can't be listed ({reason}); fix that, or the address") from error
    shards = []
    for each in facts:
        if each["type"] == "file":
            changed = repr([each.get(key) for key in CHANGES])
            address, size = system.unstrip_protocol(each["name"]), -1 if each["size"] is None else each["size"]
            shards.append(remote_shard(source, directory, address, size, changed))
    if not shards:
        raise UserError(f"data path {source.path!r}: no such file")
    return shards


def hub_files(source: DataSource, directory: Path, revision: str) -> tuple[str, list[str]]:
    """The revision of a data set on the hub, and the addresses of the files of its split. What was listed once is kept
    for resumed runs and those without a network."""
    import datasets
    from huggingface_hub import constants

    def kept(revision: str) -> Path:
        named = f"{constants.ENDPOINT} {source.path} {source.split} {revision}"
        return directory / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"

    if (revision or constants.HF_HUB_OFFLINE) and kept(revision).exists():
        listed = json.loads(kept(revision).read_text())
        return listed["revision"], listed["addresses"]
    quieten_hub()
    path, _, config = source.path.partition(":")
    try:
        builder = datasets.load_dataset_builder(path, config or None, revision=revision or None)
        files: Any = builder.config.data_files or {}
        if source.split not in files:
            raise ValueError(f'Unknown split "{source.split}". Should be one of {[*files]}')
    except Exception as error:  # its HTTP and storage clients raise their own kinds
        raise hub_refusal(source, error) from error
    addresses = [str(address) for address in files[source.split]]
    found = re.search("@([0-9a-f]{40})/", addresses[0])
    listed = {"revision": found[1] if found else "unknown", "addresses": addresses}
    directory.mkdir(parents=True, exist_ok=True)
    for each in ("", listed["revision"]):
        with suppress(FileNotFoundError):  # another process wrote the same meanwhile
            write_atomically(kept(each), json.dumps(listed))
    return listed["revision"], addresses


def shards_digest(shards: Sequence[Shard]) -> str:
    """A hash of the names, sizes, times, beginnings and ends of files; of those elsewhere what is said of them."""

    def looked_at(shard: Shard) -> bytes:
        name = shard.address or shard.path.name
        digest = hashlib.sha256(repr((name, shard.size, shard.changed)).encode())
        if not shard.address:
            with shard.path.open("rb") as file:
                digest.update(file.read(EDGE_BYTES))
                file.seek(max(shard.size - EDGE_BYTES, 0))
                digest.update(file.read())
        return digest.digest()

    with ThreadPoolExecutor(READERS) as pool:
        return hashlib.sha256(b"".join(pool.map(looked_at, shards))).hexdigest()


# Fetching


def fetched(shard: Shard, most_bytes: float) -> Shard:
    """A file that is here: as it is, or as the copy that is fetched unless it is kept from an earlier time.

    Copies that were not read for longest are deleted first, until all that are kept have `most_bytes` at most.

    Raises:
        UnreadableShard: it can't be fetched, or there is no room for it.
    """
    if not shard.address:
        return shard
    try:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with shard.path.with_name(f"{shard.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one machine fetch it once
            if not shard.path.exists():
                make_room(shard.path.parent, most_bytes - max(shard.size, 0))
                fetch(shard)
            os.utime(shard.path)
            return shard._replace(size=shard.path.stat().st_size)
    except Exception as error:  # of file systems of all kinds
        fix = (
            f"; make room in {shard.path.parent}, or lower shard_cache" if getattr(error, "errno", 0) == ENOSPC else ""
        )
        raise UnreadableShard(f"{shard.address} can't be fetched ({type(error).__name__}: {error}){fix}") from error


def fetch_ahead(shard: Shard, most_bytes: float) -> None:
    """Fetch a file before it is read; if that fails, reading it tries again and says why."""
    with suppress(UnreadableShard):
        fetched(shard, most_bytes)


def make_room(directory: Path, most_bytes: float) -> None:
    """Delete the copies that were not read for longest, until the others have `most_bytes` at most."""
    copies = list[tuple[float, int, Path]]()
    for path in directory.glob("*-*"):
        with suppress(FileNotFoundError):  # another process deletes as well
            facts = path.stat()
            copies.append((facts.st_mtime, facts.st_size, path))
    size = sum(each[1] for each in copies)
    for _, freed, path in sorted(copies):
        if size > most_bytes and path.suffix not in (".lock", ".d"):
            path.unlink(missing_ok=True)
            size -= freed


def fetch(shard: Shard) -> None:
    """Copy a file from its address; what an earlier attempt left is continued."""
    part = shard.path.with_name(f"{shard.path.name}.part")
    if match := re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", shard.address):
        import huggingface_hub

        scratch = Path(f"{part}.d")
        got = huggingface_hub.hf_hub_download(
            match[1], match[3], repo_type="dataset", revision=match[2], local_dir=scratch
        )
        os.replace(got, shard.path)
        shutil.rmtree(scratch, ignore_errors=True)
        return
    import fsspec

    with fsspec.open(shard.address, "rb") as remote, part.open("ab") as copy:
        if copy.tell():
            remote.seek(copy.tell())
        shutil.copyfileobj(remote, copy, 2**20)
    if (size := part.stat().st_size) != shard.size >= 0:
        part.unlink()
        raise OSError(f"{size:,} bytes came of {shard.size:,}")
    part.replace(shard.path)


def bytes_below(directory: Path) -> int:
    """Bytes of all files below a directory, which grow while one is fetched, by whichever process."""
    sizes = list[int]()
    with suppress(OSError):  # one is gone by now
        sizes.extend(path.stat().st_size for path in directory.rglob("*"))
    return sum(sizes)


# Order


def permuted(place: int, count: int, *key: int) -> int:
    """What comes at a place in an order of `count` things that `key` chooses, without a table of them: four rounds of a
    Feistel network (Luby & Rackoff 1988), repeated until the number is below `count` (Black & Rogaway 2002)."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(4):
            mixed = hashlib.blake2b(repr((key, number, right)).encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed) & mask)
        if (place := left << half | right) < count:
            return place


@lru_cache(maxsize=64)
def block_sizes(shards: tuple[Shard, ...]) -> list[list[int]]:
    """Bytes of the blocks of each of these files, which is known without reading them."""

    def sizes(shard: Shard) -> list[int]:
        if shard.kind == ".parquet":
            with readable(shard, "its row groups"), parquet(shard) as table:
                return [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
        return [shard.size] if shard.kind == ".txt" else [BLOCK_BYTES] * -(-shard.size // BLOCK_BYTES)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(sizes, shards))


def block_count(shards: tuple[Shard, ...]) -> int:
    """Blocks of these files; 0 where nobody knows before they are read."""
    return 0 if shards[0].is_sequential or shards[0].address else sum(map(len, block_sizes(shards)))


# Reading


def blocks(shards: tuple[Shard, ...], most_bytes: float, first: int, *key: int) -> Iterator[tuple[int, int, Rows]]:
    """The blocks of files from the one at place `first` of the order that `key` chooses, each with its place and its
    size in bytes. The order of a compressed file is its own. Of files that are fetched `most_bytes` are kept.

    Raises:
        UserError: what can't be read, with its place, after some attempts.
    """
    failures = 0
    while True:
        try:
            for shard in shards:
                if shard.address and not shard.path.exists():
                    print(f"fetching {shard.name}{f' of {byte_size(shard.size)}' * (shard.size > 0)}", flush=True)
            here = tuple(fetched(shard, most_bytes) for shard in shards)
            read = sequential_blocks(here[0], first) if here[0].is_sequential else any_blocks(here, first, *key)
            for place, size, rows in read:
                yield place, size, rows
                first, failures = place + 1, 0
            return
        except UnreadableShard as error:
            if failures == len(RETRY_SECONDS):
                raise UserError(f"{error}; restore it, and --resume continues from the last checkpoint") from error
            time.sleep(RETRY_SECONDS[failures])
            failures += 1


def any_blocks(shards: tuple[Shard, ...], first: int, *key: int) -> Iterator[tuple[int, int, Rows]]:
    """The blocks of files that are read at any place."""
    sizes = block_sizes(shards)
    ends = list(accumulate(map(len, sizes)))
    for place in range(first, ends[-1]):
        block = permuted(place, ends[-1], *key)
        shard = bisect_right(ends, block)
        number = block - ends[shard] + len(sizes[shard])
        with readable(shards[shard], f"block {number + 1} of {len(sizes[shard])}"):
            rows = rows_of_block(shards[shard], number)
        yield place, sizes[shard][number], rows


def rows_of_block(shard: Shard, number: int) -> Rows:
    """The rows of one block of a file."""
    if shard.kind == ".parquet":
        with parquet(shard) as table:
            before = sum(table.metadata.row_group(group).num_rows for group in range(number))
            return TableBlock(shard, before, table.read_row_group(number, columns=text_columns(table)))
    if shard.kind == ".txt":
        with open_file(shard.path) as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return [(shard.name, BadFile(f"{error}; save the file as UTF-8"))]
        return [(shard.name, {shard.text_column: text} if text.strip() else None)]
    with shard.path.open("rb") as stream:
        begin = number * BLOCK_BYTES
        if begin:
            stream.seek(begin - 1)
            begin += skip_line(stream) - 1
        return LineBlock(shard, begin, lines_before(stream, begin, (number + 1) * BLOCK_BYTES)[0])


def sequential_blocks(shard: Shard, first: int) -> Iterator[tuple[int, int, Rows]]:
    """The blocks of a compressed file from block `first`; what is before it is decompressed and passed over."""
    number, begin = first, 0
    with readable(shard, "its beginning"):
        stream = open_file(shard.path)
    with stream:
        with readable(shard, f"the first {byte_size(first * BLOCK_BYTES)} that it holds"):
            while left := max(first * BLOCK_BYTES - 1, 0) - begin:
                if not (part := stream.read(min(left, 2**20))):
                    return
                begin += len(part)
            begin += skip_line(stream) if first else 0
        while True:
            with readable(shard, f"after {begin:,} bytes of what it holds"):
                content, end = lines_before(stream, begin, (number + 1) * BLOCK_BYTES)
            if begin == end < (number + 1) * BLOCK_BYTES:
                return
            yield number, BLOCK_BYTES, LineBlock(shard, begin, content)
            number, begin = number + 1, end


def lines_before(stream: io.BufferedIOBase, begin: int, end: int) -> tuple[bytes, int]:
    """The lines that begin before the place `end` of a file, at whose place `begin` a line begins; and where the next
    one does. The last is cut where it is too long for a line."""
    content = stream.read(end - begin) if begin < end else b""
    begin += len(content)
    if content and not content.endswith(b"\n"):
        rest = stream.readline(MAX_LINE_BYTES + 1)
        begin += len(rest) + skip_line(stream, rest)
        content += rest
    return content, begin


@contextmanager
def readable(shard: Shard, where: str) -> Generator[None]:
    """Say of what can't be read which file it is, and where."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableShard(f"{shard.name}, {where}: {reason}") from error


def parquet(shard: Shard) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(shard.path)


class LineBlock(Sequence[tuple[Any, Any]]):
    """Lines that lie one after another from a place in a file, parsed when they are asked for."""

    def __init__(self, shard: Shard, first: int, content: bytes) -> None:
        self.shard, self.first, self.content = shard, first, content
        stop = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        self.stop = stop if content.endswith(b"\n") or not content else np.append(stop, len(content))

    def __len__(self) -> int:
        return len(self.stop)

    def __getitem__(self, number: Any) -> Any:
        start = int(self.stop[number - 1]) if number else 0
        line = self.content[start : self.stop[number]]
        return LineAt(self.shard, self.first + start), line_value(line) if line.strip() else None


class LineAt(NamedTuple):
    """Where a line is; its number is counted when it is written, as that reads the file up to there."""

    shard: Shard
    offset: int

    def __str__(self) -> str:
        count, left = 1, self.offset
        with open_file(self.shard.path) as stream:
            while left and (part := stream.read(min(left, 2**20))):
                count, left = count + part.count(b"\n"), left - len(part)
        return f"{self.shard.name} line {count}"


class TableBlock(Sequence[tuple[Any, Any]]):
    """The rows of a row group, before which its file has `before` rows."""

    def __init__(self, shard: Shard, before: int, table: Any) -> None:
        self.shard, self.before, self.table = shard, before, table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: Any) -> Any:
        (row,) = undecoded([self.table.slice(number, 1)])
        return f"{self.shard.name} row {self.before + number + 1}", row
